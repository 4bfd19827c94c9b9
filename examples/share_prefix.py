"""Two replicas of one model share a prefix: the second one computes only the tokens after it.

Needs a cluster: `tiered-kv up`, then `python examples/share_prefix.py [MODEL]`. MODEL is a folder or a Hugging Face id (default:
the demo's model).
"""

import sys

import ray
import torch

import tiered_kv
from tiered_kv.cluster.attach import join
from tiered_kv.integrations.transformers import CachedModel
from tiered_kv.tools.demo.model import load_model

DOCUMENT = "The lighthouse keeper wrote down the weather every evening, the wind first and then the height of the sea. " * 12
QUESTIONS = ["What did the keeper write down first?", "When did the keeper write?"]


@ray.remote(num_cpus=0)
class Replica:
    def __init__(self, model: str | None) -> None:
        self.model, self.tokenizer = load_model(model, torch.float32)
        self.cached = CachedModel(self.model, tiered_kv.attach(self.model, self.tokenizer))

    def answer(self, question: str) -> dict:
        message = {"role": "user", "content": f"{DOCUMENT}\n{question}"}
        ids = self.tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True, return_tensors="pt").input_ids
        output, report = self.cached.run(ids, max_new_tokens=12, do_sample=False)
        text = self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        return {"text": text, "prompt": report.prompt_tokens, "reused": report.reused_tokens, "ttft_s": report.seconds_to_first_token}


join("default")
replicas = [Replica.remote(sys.argv[1] if len(sys.argv) > 1 else None) for _ in QUESTIONS]
answers = [ray.get(replica.answer.remote(question)) for replica, question in zip(replicas, QUESTIONS, strict=True)]
for number, answer in enumerate(answers):
    print(f"replica {number}: reused {answer['reused']} of {answer['prompt']} tokens, {answer['ttft_s']:.2f} s to the first token")
    print(f"  {answer['text'].strip()}")
assert answers[1]["reused"] > 0
