"""The processes of the demo: a replica is a model with a cache client, the reference is the same model without the cache.

Axes: L layers, 2 (key, value), H KV heads, T tokens, D head dim.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

import tiered_kv
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.integrations.transformers import CachedModel, cache_from_kv, check_supported, kv_from_cache
from tiered_kv.layout import KVLayout
from tiered_kv.tools.demo.model import load_model


def _loaded(model: str | None, dtype: str, threads: int) -> tuple[Any, Any]:
    torch.set_num_threads(threads)  # the same in all processes, because the order of summation depends on it
    return load_model(model, getattr(torch, dtype))


class _FirstTokenStreamer:
    """A streamer for `generate` that records the seconds to the first new token."""

    def __init__(self) -> None:
        self._begun_s = time.perf_counter()
        self._calls = 0
        self.seconds = 0.0

    def put(self, _: torch.Tensor) -> None:
        self._calls += 1  # the first call has the prompt
        if self._calls == 2:
            self.seconds = time.perf_counter() - self._begun_s

    def end(self) -> None:
        pass


class Replica:
    """Answers prompts, using the cache of the cluster that this process has joined."""

    def __init__(self, name: str, model: str | None, dtype: str, threads: int, cluster: str) -> None:
        self._name = name
        self._model, self._tokenizer = _loaded(model, dtype, threads)
        self._client = tiered_kv.attach(self._model, self._tokenizer, cluster=cluster)
        self._cached = CachedModel(self._model, self._client)

    def describe(self) -> dict:
        """Returns the sizes of this model's KV: bytes per token, and tokens and bytes per block."""
        layout = self._client.layout
        return {"block_tokens": layout.block_tokens, "block_bytes": layout.block_bytes, "token_bytes": layout.token_bytes}

    def answer(self, ids: Sequence[int], new_tokens: int) -> dict:
        """Answer one prompt greedily.

        Returns the output's token ids, the number of reused tokens by tier, and the seconds to the first token, among others.
        """
        output, report = self._cached.run(torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False)
        facts = asdict(report)
        return {
            "replica": self._name,
            "prompt_tokens": report.prompt_tokens,
            "reused_tokens": report.reused_tokens,
            "reused_tokens_by_tier": report.reused_tokens_by_tier,
            "computed_prompt_tokens": report.computed_prompt_tokens,
            "ttft_s": report.seconds_to_first_token,
            "fetch_s": report.seconds_fetch,
            "store_s": report.seconds_store,
            "stored_blocks": facts["stored"],
            "output_ids": output[0, len(ids) :].tolist(),
        }

    def close(self) -> None:
        """Detach from the cache."""
        self._client.close()


class Reference:
    """The same model in one process without the cache: plain `generate`, and reuse of its own `past_key_values`.

    It keeps the KV of the blocks that it has computed, unchanged. For every prompt it reuses exactly as many tokens as the
    replica did, so that the comparison measures only the cache.
    """

    def __init__(self, model: str | None, dtype: str, threads: int, block_tokens: int) -> None:
        self._model, self._tokenizer = _loaded(model, dtype, threads)
        shape = check_supported(self._model)
        self._layout: KVLayout = shape.layout(block_tokens)
        self._blocks: dict[bytes, torch.Tensor] = {}  # token ids of the whole prefix -> its last block (L, 2, H, T, D)

    def plain(self, ids: Sequence[int], new_tokens: int) -> dict:
        """Answer one prompt with a plain `generate`. Returns the output's token ids and the seconds to the first one."""
        output, seconds = self._generate(ids, new_tokens, None)
        return {"output_ids": output.sequences[0, len(ids) :].tolist(), "ttft_s": seconds}

    def reusing(self, ids: Sequence[int], new_tokens: int, reused_tokens: int) -> dict:
        """Answer one prompt, reusing the KV of its first `reused_tokens` tokens from earlier prompts of this process.

        Returns the output's token ids and the seconds to the first one.
        """
        prefix = self._prefix(ids, reused_tokens)
        cache = cache_from_kv(prefix, self._model.config)
        output, seconds = self._generate(ids, new_tokens, cache)
        sequence = output.sequences[0].tolist()
        self._keep(sequence, output.past_key_values)
        return {"output_ids": sequence[len(ids) :], "ttft_s": seconds}

    def _generate(self, ids: Sequence[int], new_tokens: int, cache: Any) -> tuple[Any, float]:
        first = _FirstTokenStreamer()
        reuse = {} if cache is None else {"past_key_values": cache}
        output = self._model.generate(
            torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, streamer=first, **reuse
        )
        return output, first.seconds

    def _prefix(self, ids: Sequence[int], tokens: int) -> torch.Tensor:
        t = self._layout.block_tokens
        ends = range(t, -(-tokens // t) * t + 1, t)
        try:
            blocks = [self._blocks[_name(ids[:end])] for end in ends]
        except KeyError as error:
            raise TieredKVError(Kind.MODEL, f"a replica reused {tokens} tokens, but no earlier prompt has computed all of them") from error
        whole = torch.cat(blocks, dim=-2) if blocks else torch.empty(self._layout.kv_shape(0), dtype=self._layout.torch_dtype)
        return whole[..., :tokens, :]

    def _keep(self, sequence: Sequence[int], cache: Any) -> None:
        t = self._layout.block_tokens
        for end in range(t, cache.get_seq_length() + 1, t):
            name = _name(sequence[:end])
            if name not in self._blocks:
                self._blocks[name] = kv_from_cache(cache, end - t, end)


def _name(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, "<u4").tobytes()
