"""A vLLM engine in this process, with what the tests need of its inside.

Tests compare an answer from the cache with the answer computed cold. Before each reload, vLLM's own prefix cache is dropped and every
KV tensor is zeroed, so the KV can only come from the cache.
"""

import gc
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BLOCK = 32
"""Tokens of a block. Small blocks make short prompts, which compute fast."""
SLOW_MODEL = 1.0
"""Tokens a second, as the connector is told, so that it loads all blocks. In truth the tests' models compute faster than a disk loads."""
TOP = 20
ANSWER = 6


@dataclass
class Answer:
    """One answer: its tokens, the log-probabilities of the likeliest TOP tokens at each, and how many prompt tokens were cached."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[dict[int, float]]
    cached: int

    def assert_same(self, other: "Answer") -> None:
        """Fail unless both answers are equal to the last bit."""
        assert self.tokens == other.tokens
        assert self.distance(other) == 0.0

    def distance(self, other: "Answer") -> float:
        """Returns the largest difference of a log-probability of the same token; infinity if the likeliest tokens differ."""
        pairs = list(zip(self.logprobs, other.logprobs, strict=True))
        if any(mine.keys() != theirs.keys() for mine, theirs in pairs):
            return math.inf
        return max(abs(mine[token] - theirs[token]) for mine, theirs in pairs for token in mine)


class Engine:
    """An engine with our connector. `extra`: the connector's own settings. A context manager.

    `counts`: what the connector has counted since the last `forget`.
    """

    def __init__(
        self, model: str, cluster: str, *, extra: dict[str, Any] | None = None, transfer: dict[str, Any] | None = None, **options: Any
    ) -> None:
        from vllm import LLM

        connector = {
            "kv_connector": "TieredKV",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_module_path": "tiered_kv.integrations.vllm.connector",
            "kv_connector_extra_config": {"cluster": cluster, "recompute_tokens_per_s": SLOW_MODEL, **(extra or {})},
            **(transfer or {}),
        }
        usual = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "block_size": BLOCK, "disable_log_stats": False}
        self.llm = LLM(model, kv_transfer_config=connector, **{**usual, **options})
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.counts: Counter[str] = Counter()
        self._number = 0
        for side in (self.planner, self.worker):
            self._record(side)

    @property
    def planner(self) -> Any:
        """The connector's scheduler side."""
        return self.scheduler.connector._scheduler

    @property
    def worker(self) -> Any:
        """The connector's workers' side."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker

    @property
    def runner(self) -> Any:
        return self.core.model_executor.driver_worker.worker.model_runner

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Shut the engine down. Fails if the connector leaves a thread."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.core, self.scheduler
        cleanup_dist_env_and_memory()
        gc.collect()
        left = [thread.name for thread in threading.enumerate() if thread.name.startswith("tkv-")]
        assert not left, f"threads left by the connector: {left}"

    def _record(self, side: Any) -> None:
        taken = side.counts

        def counts() -> dict[str, Any]:
            found = taken()
            self.counts.update(found)
            return found

        side.counts = counts

    # Prompts

    def prompt(self, seed: int, tokens: int) -> list[int]:
        """Returns a text of `tokens` tokens. Texts of different seeds differ from the first block on."""
        text = f"In the year {seed} " + " ".join(
            f"the mill {seed * 31 + i} at river {i * 7 % 13} had {i % 5} stones," for i in range(tokens // 8 + 2)
        )
        return self.llm.get_tokenizer().encode(text)[:tokens]

    def sampling(self, **options: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(**{"temperature": 0, "max_tokens": ANSWER, "logprobs": TOP, "ignore_eos": True, **options})

    # Running

    def run(self, *prompts: Sequence[int] | dict[str, Any], lora: Any = None, **options: Any) -> list[Answer]:
        """Answer prompts as one batch. Each is a list of tokens, or a prompt as vLLM takes it."""
        given = [each if isinstance(each, dict) else {"prompt_token_ids": list(each)} for each in prompts]
        outputs = self.llm.generate(given, self.sampling(**options), use_tqdm=False, lora_request=lora)
        return [_answer(output) for output in outputs]

    def ask(self, prompt: Sequence[int] | dict[str, Any], **options: Any) -> Answer:
        return self.run(prompt, **options)[0]

    def add(self, prompt: Sequence[int], lora: Any = None, **options: Any) -> str:
        """Add a request, which `step` runs. Returns its name."""
        self._number += 1
        name = f"added-{self._number}"
        given = prompt if isinstance(prompt, dict) else {"prompt_token_ids": list(prompt)}
        self.llm.llm_engine.add_request(name, given, self.sampling(**options), lora_request=lora)
        return name

    def step(self) -> list[Any]:
        """Run one step. Returns the outputs of requests that have ended."""
        return [output for output in self.llm.llm_engine.step() if output.finished]

    def finish(self, within_s: float = 120.0) -> dict[str, Answer]:
        """Run all added requests to their end. Returns their answers by name."""
        answers, deadline_s = {}, time.monotonic() + within_s
        while self.llm.llm_engine.has_unfinished_requests():
            assert time.monotonic() < deadline_s, f"not finished within {within_s} s"
            answers |= {output.request_id: _answer(output) for output in self.step()}
        return answers

    def abort(self, name: str) -> None:
        self.llm.llm_engine.abort_request([name])

    # Forgetting

    def forget(self) -> None:
        """Drop vLLM's own prefix cache, zero the KV, and begin to count anew."""
        assert self.scheduler.reset_prefix_cache() is True
        self.zero()
        self.counts.clear()

    def zero(self) -> None:
        for cache in self.runner.kv_caches:
            cache.zero_()

    def reload(self, prompt: Sequence[int] | dict[str, Any], **options: Any) -> Answer:
        """Answer a prompt with nothing but what the cache has."""
        self.forget()
        return self.ask(prompt, **options)


def _answer(output: Any) -> Answer:
    made = output.outputs[0]
    logprobs = [{token: each.logprob for token, each in place.items()} for place in made.logprobs or ()]
    return Answer(list(output.prompt_token_ids or ()), list(made.token_ids), logprobs, output.num_cached_tokens)
