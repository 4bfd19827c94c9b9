"""The scheduler's side of the connector: looks blocks up, plans loads and stores. It never waits for another process.

It sees the same shared memory as the workers. A request whose blocks are all in this machine's memory is loaded within its first step.
Otherwise it waits until a worker's thread has loaded them. What other machines hold is asked by a thread, while the request waits.
"""

import logging
import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from tiered_kv.checkpoint_files import adapter_file_digest
from tiered_kv.client.page_client import PageClient
from tiered_kv.errors import TieredKVError
from tiered_kv.integrations.vllm.events import Events
from tiered_kv.integrations.vllm.messages import Blocks, Handshake, Report, Step, keys_of
from tiered_kv.integrations.vllm.settings import Settings
from tiered_kv.keys import BlockKey, Namespace
from tiered_kv.layout import OpaqueLayout

log = logging.getLogger(__name__)

HEX_ID_CHARS = 64
ANSWERS_MAX = 4096


@dataclass
class Offer:
    """What was promised to vLLM for a request: `count` blocks from block `start` on, and their tiers."""

    scope: bytes
    start: int
    tiers: list[str]
    waits: bool


@dataclass
class Tracked:
    """A request that vLLM has given blocks to. `stored`: its leading blocks that were offered to the store already."""

    request: Any
    scope: bytes | None
    blocks: list[int]
    stored: int = 0
    tiers: dict[str, int] = field(default_factory=dict)


class Scheduler:
    """Looks up and plans for one engine. vLLM calls it from one thread.

    `attach(layout, namespace)` returns a client. `loads_in_step`: whether a forward pass may wait for loads from this machine's memory.
    """

    def __init__(self, config: Any, settings: Settings, attach: Callable[..., PageClient], block_tokens: int, loads_in_step: bool) -> None:
        self._config, self._settings, self._attach = config, settings, attach
        self.block_tokens, self._loads_in_step = block_tokens, loads_in_step
        self._can_load = config.kv_transfer_config.is_kv_consumer
        self._can_store = config.kv_transfer_config.is_kv_producer
        self._client: PageClient | None = None
        self._roots: list[BlockKey] = []
        self._epoch = settings.epoch
        self._resets = 0
        self._number = 0
        self._acknowledged = 0
        self._offers: dict[str, Offer] = {}
        self._requests: dict[str, Tracked] = {}
        self._adapters: dict[int, str | None] = {}
        self._now: list[Blocks] = []
        self._later: list[Blocks] = []
        self._counts: Counter[str] = Counter()
        self._asker = Asker()
        self.events: Events | None = None

    def meet(self, workers: dict[int, Handshake]) -> None:
        """Learn the workers' namespaces and layouts. Until then nothing is looked up."""
        ranks = [workers[number] for number in sorted(workers)]
        layouts = [OpaqueLayout(**each.layout) for each in ranks]
        namespaces = [Namespace(**each.namespace) for each in ranks]
        self._roots = [namespace.root(layout) for namespace, layout in zip(namespaces, layouts, strict=True)]
        if len({layout.block_bytes for layout in layouts}) > 1:
            log.warning("tiered_kv: the ranks have blocks of different sizes, so nothing is shared")
            self._roots = []
            return
        self._client = self._attach(layouts[0], namespaces[0])
        self._asker.client = self._client

    # Look-up

    def matched(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """Returns how many tokens after the computed ones can be loaded, None while other nodes are asked, and whether to wait for them."""
        self._offers.pop(request.request_id, None)
        scope = self._scope(request)
        if self._client is None or scope is None or not self._can_load:
            return 0, False
        start = computed_tokens // self.block_tokens
        end = min((request.num_tokens - 1) // self.block_tokens, len(request.block_hashes))
        if computed_tokens % self.block_tokens or end <= start:
            return 0, False
        hashes = request.block_hashes[start:end]
        by_rank = [keys_of(root, scope, hashes) for root in self._roots]
        tiers = min((self._client.find(keys) for keys in by_rank), key=len)
        if len(tiers) < len(hashes) and self._client.has_peers and self._settings.ask_nodes_ms:
            more = self._asker.answer(request.request_id, [keys[len(tiers) :] for keys in by_rank], self._settings.ask_nodes_ms / 1000)
            if more is None:
                return None, False
            tiers = [*tiers, *["peer"] * more]
        if not tiers:
            self._offers[request.request_id] = Offer(scope, start, [], False)
            return 0, False
        at_once = min(self._client.at_once(keys[: len(tiers)]) for keys in by_rank)
        waits = not (self._loads_in_step and at_once == len(tiers))
        self._offers[request.request_id] = Offer(scope, start, tiers, waits)
        self._asker.hold([keys[len(tiers) - 1] for keys in by_rank], self._settings.hold_s)
        return len(tiers) * self.block_tokens, waits

    def _scope(self, request: Any) -> bytes | None:
        """Returns what must be equal for this request besides the namespace; None if it must not be cached."""
        adapter = ""
        if request.lora_request is not None:
            found = self._adapter(request.lora_request)
            if found is None:
                return None
            adapter = found
        if not self._settings.allow_mm_uuids and not all(map(_is_content_hash, request.mm_features or ())):
            return None
        return blake2b(f"{self._epoch} {adapter}".encode(), digest_size=16).digest()

    def _adapter(self, lora: Any) -> str | None:
        """Returns the digest of an adapter's files at its first use; None if they cannot be read, or may be replaced while in use."""
        if getattr(lora, "load_inplace", False):
            return None
        if lora.lora_int_id not in self._adapters:
            try:
                self._adapters[lora.lora_int_id] = adapter_file_digest(lora.lora_path)
            except TieredKVError as error:
                log.warning("tiered_kv: requests with the adapter %s are not cached: %s", lora.lora_name, error)
                self._adapters[lora.lora_int_id] = None
        return self._adapters[lora.lora_int_id]

    # Plans

    def allocated(self, request: Any, blocks: list[int], external_tokens: int) -> None:
        """Take note of a request's blocks, and plan the load that vLLM has accepted."""
        offer = self._offers.pop(request.request_id, None)
        scope = self._scope(request)
        tracked = self._requests[request.request_id] = Tracked(request, scope, list(blocks))
        if scope is None:
            self._counts["bypassed_requests"] += 1
        if offer is None:
            return
        count = min(external_tokens // self.block_tokens, len(offer.tiers))
        asked = max((request.num_tokens - 1) // self.block_tokens - offer.start, 0)
        self._counts["asked_blocks"] += asked
        self._counts["promised_blocks"] += count
        if self._client is not None:
            self._client.missed(asked - count)
        self._asker.forget(request.request_id)
        if not count:
            return
        start, end = offer.start, offer.start + count
        tracked.tiers = dict(Counter(offer.tiers[:count]))
        load = self._blocks(tracked, offer.scope, start, end)
        (self._later if offer.waits else self._now).append(load)

    def step(self, output: Any) -> Step:
        """Returns the work of the step that vLLM has scheduled."""
        self._number += 1
        ends = {each.req_id: each.num_computed_tokens for each in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        for number, name in enumerate(cached.req_ids):
            ends[name] = cached.num_computed_tokens[number]
            tracked, new = self._requests.get(name), cached.new_block_ids[number]
            if tracked is None or new is None:
                continue
            if name in cached.resumed_req_ids:
                tracked.blocks = list(new[0])
            else:
                tracked.blocks += new[0][max(len(tracked.blocks) - _first_new(tracked.blocks, new[0]), 0) :]
        stores = []
        for name, tokens in output.num_scheduled_tokens.items():
            tracked = self._requests.get(name)
            if tracked is not None and tracked.scope is not None and self._can_store and self._client is not None:
                stores += self._stores(tracked, ends.get(name, 0), tokens)
        step = Step(self._number, self._now, self._later, stores, self._acknowledged, self._resets)
        self._now, self._later = [], []
        return step

    def _stores(self, tracked: Tracked, computed: int, tokens: int) -> list[Blocks]:
        """Returns the blocks of a request that are complete after `tokens` more than the `computed` tokens, and were not offered yet."""
        start = min(tracked.stored, computed // self.block_tokens)
        end = min((computed + tokens) // self.block_tokens, len(tracked.request.block_hashes), len(tracked.blocks))
        if end <= start:
            return []
        tracked.stored = end
        assert tracked.scope is not None
        if self.events is not None:
            self.events.offered(tracked.request, tracked.scope, start, end)
        return [self._blocks(tracked, tracked.scope, start, end)]

    def _blocks(self, tracked: Tracked, scope: bytes, start: int, end: int) -> Blocks:
        hashes = tracked.request.block_hashes
        before = bytes(hashes[start - 1]) if start else None
        named = [bytes(each) for each in hashes[start:end]]
        return Blocks(tracked.request.request_id, scope, named, before, start, tracked.blocks[start:end])

    # Results

    def learned(self, invalid_blocks: set[int], report: Report | None) -> None:
        """Take note of a step's outcome. After a failed load, blocks are offered to the store again once they are computed."""
        if report is not None:
            self._acknowledged = max(self._acknowledged, report.failed_step)
            if self.events is not None:
                self.events.stored(report.stored)
        if invalid_blocks:
            for tracked in self._requests.values():
                tracked.stored = 0

    def is_here(self, scope: bytes, block_hash: bytes) -> bool:
        """Whether this machine's node has a block of all ranks now. No call."""
        client = self._client
        return client is not None and all(client.find(keys_of(root, scope, [block_hash])) for root in self._roots)

    def tiers_of(self, request: Any) -> dict[str, int]:
        """Returns the number of blocks of a request's load by tier."""
        tracked = self._requests.get(request.request_id)
        return tracked.tiers if tracked else {}

    def finished(self, request: Any) -> None:
        """Forget a request."""
        self._requests.pop(request.request_id, None)
        self._offers.pop(request.request_id, None)
        self._asker.forget(request.request_id)

    def reset(self) -> None:
        """Forget all blocks stored so far, unless the setting `on_reset` says to keep them. Other engines keep theirs."""
        if self._settings.on_reset == "keep":
            return
        self._epoch = secrets.randbits(63)
        self._resets += 1
        self._offers.clear()
        for tracked in self._requests.values():
            tracked.scope = None  # its blocks may be of the old weights

    def counts(self) -> dict[str, Any]:
        """Returns the counts since the last call."""
        self._counts["unanswered_lookups"] += self._asker.take_unanswered()
        counts, self._counts = self._counts, Counter()
        return {name: count for name, count in counts.items() if count}

    def close(self) -> None:
        """Stop the thread and disconnect."""
        self._asker.close()
        if self._client is not None:
            self._client.close()


def _first_new(known: list[int], new: list[int]) -> int:
    """Returns the position of the first of vLLM's new blocks in a request's known blocks, or their number if they are not among them."""
    width = len(new)
    if width and known[-width:] == new:
        return len(known) - width
    return len(known)


def _is_content_hash(feature: Any) -> bool:
    """Whether the id of an image or the like is a hash of its content, not a name that the user gave."""
    name = feature.identifier.rsplit(":", 1)[-1]
    return len(name) == HEX_ID_CHARS and all(char in "0123456789abcdef" for char in name)


@dataclass
class _Question:
    keys: list[list[BlockKey]]
    until_s: float
    found: int | None = None


class Asker:
    """Asks the node, on a thread of its own, what other machines hold, and to keep promised blocks. The scheduler never waits for it."""

    def __init__(self) -> None:
        self.client: PageClient | None = None
        self._questions: dict[str, _Question] = {}
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._held_until_s: dict[BlockKey, float] = {}
        self._unanswered = 0

    def answer(self, request: str, keys: list[list[BlockKey]], wait_s: float) -> int | None:
        """Returns how many leading keys of each list other nodes hold, 0 once `wait_s` is over; None while that is not known."""
        question = self._questions.get(request)
        if question is None or question.keys[0][:1] != keys[0][:1]:
            if len(self._questions) >= ANSWERS_MAX:
                return 0
            question = self._questions[request] = _Question(keys, time.monotonic() + wait_s)
            self._submit(lambda: self._ask(question))
            return None
        if question.found is not None:
            return question.found
        if time.monotonic() < question.until_s:
            return None
        question.found = 0
        self._unanswered += 1
        return 0

    def hold(self, keys: list[BlockKey], seconds: float) -> None:
        """Keep blocks and their ancestors from eviction. A block that is held for at least half of that time is not held again."""
        now_s = time.monotonic()
        if len(self._held_until_s) >= ANSWERS_MAX:
            self._held_until_s = {key: until_s for key, until_s in self._held_until_s.items() if until_s > now_s}
        for key in keys:
            if seconds and self._held_until_s.get(key, 0.0) < now_s + seconds / 2:
                self._held_until_s[key] = now_s + seconds
                self._submit(lambda key=key: self.client and self.client.hold(key, seconds))  # type: ignore[misc]

    def forget(self, request: str) -> None:
        """Drop what is known for a request."""
        self._questions.pop(request, None)

    def take_unanswered(self) -> int:
        """Returns how many questions were not answered in time since the last call."""
        count, self._unanswered = self._unanswered, 0
        return count

    def close(self) -> None:
        """Stop the thread."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def _submit(self, job: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tkv-vllm-ask", daemon=True)
            self._thread.start()
        self._queue.put(job)

    def _ask(self, question: _Question) -> None:
        if self.client is not None and question.found is None:
            question.found = min(self.client.locate(keys) for keys in question.keys)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                job()
            except Exception:  # named boundary: later questions need the thread
                log.exception("tiered_kv: a question to the node ended with an error")
