"""Answers a prompt cold, from vLLM's own cache and from ours, in an engine of a small random model. Prints JSON. A process of its own:

    python -m tests.vllm.small_engine CLUSTER FOLDER KIND RANKS

KIND: "llama", or "gemma", which has layers with a sliding window. RANKS: tensor-parallel ranks, each a process on its own core.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_HOST_IP="127.0.0.1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # for `zero_pages`, which is sent to the workers
)
TOKENS, TOP = 700, 20
SIZES: dict[str, Any] = {
    **{"vocab_size": 49152, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 64, "max_position_embeddings": 4096},
}


def make_model(kind: str, folder: Path) -> None:
    """Write a model of random weights, with the tokenizer of the demo's model."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

    from tiered_kv.tools.demo.model import ensure_default_model

    torch.manual_seed(0)
    if kind == "gemma":
        model: Any = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, num_hidden_layers=6, sliding_window=256))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=3))
    model.save_pretrained(folder)
    for file in ensure_default_model().glob("*token*"):
        shutil.copy(file, folder)


def zero_pages(worker: Any) -> int:
    """Zero the KV of one rank. Returns the number of its tensors."""
    caches = worker.model_runner.kv_caches
    for cache in caches:
        cache.zero_()
    return len(caches)


def main() -> None:
    cluster, folder, kind, ranks = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    if not (folder / "config.json").exists():
        make_model(kind, folder)
    if ranks > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(core) for core in sorted(os.sched_getaffinity(0))[:ranks])
    from vllm import LLM, SamplingParams

    transfer = {
        "kv_connector": "TieredKV",
        "kv_connector_module_path": "tiered_kv.integrations.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"cluster": cluster},
    }
    options = {"dtype": "float32", "max_model_len": 2048, "enforce_eager": True, "disable_log_stats": False}
    llm = LLM(str(folder), tensor_parallel_size=ranks, kv_transfer_config=transfer, **options)
    sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=TOP, ignore_eos=True)
    prompt = [(place * 31 + place * place % 977) % 20000 + 100 for place in range(TOKENS)]

    def answer() -> dict[str, Any]:
        output = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]
        made = output.outputs[0]
        places = [{str(token): each.logprob for token, each in place.items()} for place in made.logprobs]
        return {"tokens": list(made.token_ids), "logprobs": places, "cached": output.num_cached_tokens}

    answers = {"cold": answer(), "repeat": answer()}
    assert llm.reset_prefix_cache() is True
    assert all(llm.collective_rpc(zero_pages))
    answers["reload"] = answer()
    counts = {each.name: each.value for each in llm.get_metrics() if "tiered_kv" in each.name and hasattr(each, "value")}
    print("RESULT " + json.dumps({"answers": answers, "counts": counts}))


if __name__ == "__main__":
    main()
