"""Two Ray tasks use the cache: one attaches and stores, the other attaches and fetches.

Needs a cluster: `tiered-kv up`, then `python examples/attach_worker.py`. The workers here have their own engine, so they describe
their KV: a namespace (the weights) and a layout (the shape).
"""

import ray
import torch

import tiered_kv
from tiered_kv.cluster.attach import join

LAYOUT = tiered_kv.KVLayout(layers=4, kv_heads=2, head_dim=64, dtype="bfloat16", block_tokens=64)
NAMESPACE = tiered_kv.Namespace(weights="sha256 of my checkpoint", tenant="examples")
PROMPT = list(range(300))  # token ids: 4 whole blocks of 64 tokens, and 44 more tokens, which are not stored


@ray.remote
def compute_and_store() -> str:
    kv = torch.randn(LAYOUT.kv_shape(len(PROMPT)), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with tiered_kv.attach(namespace=NAMESPACE, layout=LAYOUT) as client:
        return str(client.store(PROMPT, kv))


@ray.remote
def fetch() -> tuple[int, dict[str, int], float]:
    with tiered_kv.attach(namespace=NAMESPACE, layout=LAYOUT) as client:
        fetched = client.fetch(PROMPT)
        return fetched.tokens, fetched.tokens_by_tier, fetched.kv.float().std().item()


join("default")
print("stored:", ray.get(compute_and_store.remote()))
tokens, by_tier, spread = ray.get(fetch.remote())
print(f"another task fetched {tokens} of {len(PROMPT)} tokens from {by_tier}; their standard deviation is {spread:.2f}")
assert tokens == 256
