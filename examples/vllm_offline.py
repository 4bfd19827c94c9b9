"""vLLM in a script: what the model has computed once is loaded from the cluster, by this process and by the next one.

Needs vLLM (docs/vllm.md) and a cluster: `tiered-kv up --host 2GiB`, then `python examples/vllm_offline.py [MODEL]`. Run it twice: the
second process loads what the first one has computed. MODEL is a folder or a Hugging Face id (default: the demo's model).
"""

import os
import sys
import time

from vllm import LLM, SamplingParams

from tiered_kv.tools.demo.model import ensure_default_model

DOCUMENT = "The lighthouse keeper wrote down the weather every evening, the wind first and then the height of the sea. " * 40
QUESTIONS = ["What did the keeper write down first?", "When did the keeper write?"]
CONNECTOR = {"kv_connector": "TieredKV", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(ensure_default_model(print))
    llm = LLM(model, max_model_len=2048, enforce_eager=True, kv_transfer_config=CONNECTOR)
    for question in QUESTIONS:
        begun_s = time.perf_counter()
        [output] = llm.generate(
            [f"{DOCUMENT}\nQuestion: {question}\nAnswer:"], SamplingParams(temperature=0, max_tokens=12), use_tqdm=False
        )
        seconds = time.perf_counter() - begun_s
        print(f"{output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens were not computed; {seconds:.2f} s in all")
        print(f"  {output.outputs[0].text.strip()}")
        llm.reset_prefix_cache()  # empties vLLM's own cache only, so the next question needs the cluster


if __name__ == "__main__":  # vLLM starts processes that import this file
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB of KV cache, if this machine has no GPU
    main()
