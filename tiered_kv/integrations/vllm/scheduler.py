"""The scheduler's side of the connector: looks blocks up, plans loads and stores. It never waits for another process.

It sees the same shared memory as the workers. A request whose blocks are all in this machine's memory is loaded within its first step.
Otherwise it waits until a worker's thread has loaded them. While the request waits, a thread asks which blocks other machines have.
"""

import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from tiered_kv.checkpoint_files import adapter_file_digest
from tiered_kv.client.page_client import PageClient
from tiered_kv.errors import TieredKVError
from tiered_kv.integrations.vllm.asker import Asker
from tiered_kv.integrations.vllm.events import Events
from tiered_kv.integrations.vllm.messages import Handshake, RequestBlocks, Step, WorkerReport, keys_of
from tiered_kv.integrations.vllm.settings import Settings, log
from tiered_kv.keys import BlockKey, Namespace
from tiered_kv.layout import OpaqueLayout


@dataclass
class Offer:
    """The result of a request's look-up of `asked` blocks, from block `start` on.

    `tiers`: the tier of each leading block to load. `waits`: whether the request must wait for the load. `declined`: the tiers of the
    blocks after them, which were found, but which the engine computes faster.
    """

    scope: bytes
    start: int
    asked: int
    tiers: list[str]
    waits: bool
    declined: list[str] = field(default_factory=list)


@dataclass
class TrackedRequest:
    """A request to which vLLM has given blocks. `blocks`: their numbers in vLLM's KV cache.

    `stored`: how many leading blocks the workers were already told to store. `tiers`: the number of loaded blocks by tier.
    """

    request: Any
    scope: bytes | None
    blocks: list[int]
    stored: int = 0
    tiers: dict[str, int] = field(default_factory=dict)


class Scheduler:
    """Looks up blocks, and plans loads and stores, for one engine. vLLM calls it from one thread.

    `attach(layout, namespace)` returns a client. `loads_in_step`: whether a forward pass may wait for loads from this machine's memory.
    """

    def __init__(self, config: Any, settings: Settings, attach: Callable[..., PageClient], block_tokens: int, loads_in_step: bool) -> None:
        self._config, self._settings, self._attach = config, settings, attach
        self.block_tokens, self._loads_in_step = block_tokens, loads_in_step
        self._can_load = config.kv_transfer_config.is_kv_consumer
        self._can_store = config.kv_transfer_config.is_kv_producer
        self._client: PageClient | None = None
        self._ranks: list[tuple[Namespace, OpaqueLayout]] = []
        self._roots: list[BlockKey] = []
        self._root = b""
        self._weight_epoch = 0
        self._epoch = settings.epoch
        self._resets = 0
        self._number = 0
        self._acknowledged = 0
        self._offers: dict[str, Offer] = {}
        self._known_keys: dict[str, tuple[tuple[bytes, int, int], list[list[BlockKey]]]] = {}
        self._requests: dict[str, TrackedRequest] = {}
        self._leaving: list[TrackedRequest] = []
        self._failed: set[str] = set()  # requests of which a load has failed
        self._old: set[str] = set()  # requests that had blocks when the cache was reset
        self._adapters: dict[int, tuple[str, str | None]] = {}  # by id: the path and the digest of its first use
        self._now: list[RequestBlocks] = []
        self._later: list[RequestBlocks] = []
        self._counts: Counter[str] = Counter()
        self._asker = Asker()
        self.events: Events | None = None

    def meet(self, workers: dict[int, Handshake]) -> None:
        """Receive the workers' namespaces and layouts, and connect. Until then, and if a rank is missing, no blocks are looked up."""
        ranks = [workers[number] for number in sorted(workers)]
        if not ranks:
            return
        if len(ranks) != ranks[0].ranks:
            log.warning("tiered_kv: only %d of %d ranks can share their KV, so nothing is shared", len(ranks), ranks[0].ranks)
            return
        layouts = [OpaqueLayout(**each.layout) for each in ranks]
        namespaces = [Namespace(**each.namespace) for each in ranks]
        if len({layout.block_bytes for layout in layouts}) > 1:
            log.warning("tiered_kv: the ranks have blocks of different sizes, so nothing is shared")
            return
        self._ranks = list(zip(namespaces, layouts, strict=True))
        self._client = self._attach(layouts[0], namespaces[0])
        self._learn_roots()
        self._asker.client = self._client

    def _learn_roots(self) -> None:
        """Compute the ranks' roots for the cluster's present weight epoch."""
        assert self._client is not None
        self._root, self._weight_epoch = self._client.root, self._client.weight_epoch
        roots = [self._client.filled(namespace).root(layout) for namespace, layout in self._ranks]
        self._roots = list(dict.fromkeys(roots))

    def _follow(self) -> None:
        """Forget all blocks if the cluster's weight epoch was raised. Makes no call to the node.

        Blocks of the current requests are no longer stored, because their KV is of the former weights.
        """
        if self._client is not None and self._client.root != self._root:
            log.info("tiered_kv: the cluster's weight epoch was raised, so blocks of the former weights are forgotten")
            self._learn_roots()
            self._known_keys.clear()
            self._forget_all()

    # Look-up

    def matched(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """Returns how many tokens after the computed tokens can be loaded, and whether the request must wait for this load.

        The number is None until other nodes have answered which blocks they have.
        """
        self._follow()
        self._offers.pop(request.request_id, None)
        scope = self._scope(request)
        if self._client is None or scope is None or not self._can_load or request.request_id in self._failed:
            return 0, False  # after a failed load, the same blocks might fail over and over, and the request never run
        if getattr(request, "skip_reading_prefix_cache", False):
            return 0, False  # it needs the log-probabilities of its prompt, and vLLM 0.29 loads nevertheless
        start = computed_tokens // self.block_tokens
        end = min((request.num_tokens - 1) // self.block_tokens, len(request.block_hashes))
        if computed_tokens % self.block_tokens or end <= start:
            return 0, False
        by_rank = self._keys(request, scope, start, end)
        looks = [self._client.look(keys) for keys in by_rank]
        tiers, at_once = min((look.tiers for look in looks), key=len), min(look.at_once for look in looks)
        if len(tiers) < end - start and self._client.has_peers and self._settings.ask_nodes_ms:
            more = self._asker.answer(request.request_id, [keys[len(tiers) :] for keys in by_rank], self._settings.ask_nodes_ms / 1000)
            if more is None:
                return None, False
            tiers = [*tiers, *["peer"] * more]
        paying = self._client.worth_loading(tiers, start, self._settings.recompute_tokens_per_s)
        tiers, declined = tiers[:paying], tiers[paying:]
        waits = not self._loads_in_step or at_once < len(tiers)
        self._offers[request.request_id] = Offer(scope, start, end - start, tiers, waits, declined)
        if not tiers:
            return 0, False
        self._asker.hold([keys[len(tiers) - 1] for keys in by_rank], self._settings.hold_s)
        return len(tiers) * self.block_tokens, waits

    def _keys(self, request: Any, scope: bytes, start: int, end: int) -> list[list[BlockKey]]:
        """Returns the keys of a request's blocks for each rank. They are remembered until vLLM gives the request its blocks."""
        wanted = scope, start, end
        known = self._known_keys.get(request.request_id)
        if known is None or known[0] != wanted:
            hashes = request.block_hashes[start:end]
            known = self._known_keys[request.request_id] = wanted, [keys_of(root, scope, hashes) for root in self._roots]
        return known[1]

    def _scope(self, request: Any) -> bytes | None:
        """Returns the scope of a request: a digest of its epoch and adapter. None if the request must not be cached."""
        if request.request_id in self._old:
            return None
        adapter = ""
        if request.lora_request is not None:
            found = self._adapter(request.lora_request)
            if found is None:
                return None
            adapter = found
        if request.mm_features and not self._settings.allow_mm_uuids:
            return None
        return blake2b(f"{self._epoch} {adapter}".encode(), digest_size=16).digest()

    def _adapter(self, lora: Any) -> str | None:
        """Returns the digest of a LoRA adapter's files, or None if they are unreadable or have changed since the id's first use.

        vLLM reads the files at the first use, and again after it has dropped the adapter from its memory.
        """
        if getattr(lora, "load_inplace", False):
            return None
        path, digest = self._adapters.setdefault(lora.lora_int_id, (lora.lora_path, self._adapter_digest(lora)))
        if digest is not None and (lora.lora_path != path or self._adapter_digest(lora) != digest):
            log.warning("tiered_kv: requests with the adapter %s are not cached: its files have changed", lora.lora_name)
            self._adapters[lora.lora_int_id] = path, None
            return None
        return digest

    def _adapter_digest(self, lora: Any) -> str | None:
        try:
            return adapter_file_digest(lora.lora_path)
        except TieredKVError as error:
            if lora.lora_int_id not in self._adapters:
                log.warning("tiered_kv: requests with the adapter %s are not cached: %s", lora.lora_name, error)
            return None

    # Plans

    def allocated(self, request: Any, blocks: list[int], external_tokens: int) -> None:
        """Record the blocks that vLLM has given to a request, and plan the load that vLLM has accepted."""
        offer = self._offers.get(request.request_id)
        count = min(external_tokens // self.block_tokens, len(offer.tiers)) if offer is not None else 0
        tracked = self._requests[request.request_id] = TrackedRequest(request, None, list(blocks))
        if offer is not None and count:  # first of all: a request whose load is lost would wait for ever
            tracked.tiers = dict(Counter(offer.tiers[:count]))
            load = self._blocks(tracked, offer.scope, offer.start, offer.start + count)
            (self._later if offer.waits else self._now).append(load)
        self._offers.pop(request.request_id, None)
        self._forget_look_up(request)
        tracked.scope = self._scope(request)
        self._counts["bypassed_requests"] += tracked.scope is None
        if offer is not None and self._client is not None:
            self._counts["asked_blocks"] += offer.asked
            self._counts["promised_blocks"] += count
            self._client.missed(offer.asked - count)
            self._counts["declined_blocks"] += len(offer.declined)
            self._client.declined(offer.declined)

    def give_up(self, request: Any, blocks: list[int], external_tokens: int) -> None:
        """Plan a load that will fail, because `allocated` raised an error. Otherwise vLLM would take the blocks for loaded.

        Does nothing if `allocated` had already planned the load.
        """
        offer = self._offers.pop(request.request_id, None)
        self._requests.pop(request.request_id, None)
        if offer is not None and external_tokens:
            lost = blocks[offer.start : offer.start + external_tokens // self.block_tokens]
            load = RequestBlocks(request.request_id, offer.scope, [], None, offer.start, lost)
            (self._later if offer.waits else self._now).append(load)

    def step(self, stores: list[RequestBlocks]) -> Step:
        """Returns the work of the step that vLLM has scheduled: the planned loads, and these stores."""
        self._number += 1
        self._leaving = []
        step = Step(self._number, self._now, self._later, stores, self._acknowledged, self._resets)
        self._now, self._later = [], []
        return step

    def stores_of(self, output: Any) -> list[RequestBlocks]:
        """Returns the blocks that the scheduled step completes, for the workers to store."""
        self._follow()
        computed = {each.req_id: each.num_computed_tokens for each in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        for name, tokens, new in zip(cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True):
            computed[name] = tokens
            tracked = self._requests.get(name)
            if tracked is not None and new is not None:
                tracked.blocks = list(new[0]) if name in cached.resumed_req_ids else tracked.blocks + list(new[0])
        if not self._can_store or self._client is None:
            return []
        stores = []
        for name, tokens in output.num_scheduled_tokens.items():
            tracked = self._requests.get(name)
            if tracked is not None and tracked.scope is not None:
                stores += self._stores(tracked, computed.get(name, 0), tokens)
        return stores

    def distrust(self) -> list[RequestBlocks]:
        """Stop storing blocks of the current requests, because `stores_of` raised an error and their blocks are not certain. Returns []."""
        for tracked in self._requests.values():
            tracked.scope = None
        return []

    def _stores(self, tracked: TrackedRequest, computed: int, tokens: int) -> list[RequestBlocks]:
        """Returns the blocks of a request that are complete after `computed` plus `tokens` tokens, and that are not stored yet."""
        start = min(tracked.stored, computed // self.block_tokens)
        end = min((computed + tokens) // self.block_tokens, len(tracked.request.block_hashes), len(tracked.blocks))
        if end <= start:
            return []
        tracked.stored = end
        assert tracked.scope is not None
        if self.events is not None:
            self.events.offered(tracked.request, tracked.scope, start, end)
        return [self._blocks(tracked, tracked.scope, start, end)]

    def _blocks(self, tracked: TrackedRequest, scope: bytes, start: int, end: int) -> RequestBlocks:
        hashes = tracked.request.block_hashes
        before = bytes(hashes[start - 1]) if start else None
        named = [bytes(each) for each in hashes[start:end]]
        return RequestBlocks(tracked.request.request_id, scope, named, before, start, tracked.blocks[start:end], self._weight_epoch)

    # Results

    def learned(self, invalid_blocks: set[int], report: WorkerReport | None) -> set[int]:
        """Record the outcome of a step. Returns the blocks that vLLM must not keep for later requests.

        These are the `invalid_blocks` of failed loads, and all later blocks of the same requests. If several requests share an invalid
        block, vLLM makes only the first request compute it, and that request may be aborted. So here each of them computes the block.
        The workers are told again to store the blocks once they are computed.
        """
        if report is not None:
            self._acknowledged = max(self._acknowledged, report.failed_step)
            if report.estimates is not None and self._client is not None:
                self._client.adopt(report.estimates)
            if self.events is not None:
                self.events.stored(report.stored)
        spoiled = set(invalid_blocks)
        for tracked in [*self._requests.values(), *self._leaving] if invalid_blocks else ():
            tracked.stored = 0
            first = next((number for number, block in enumerate(tracked.blocks) if block in invalid_blocks), None)
            if first is None:
                continue
            spoiled.update(tracked.blocks[first:])
            request = tracked.request
            if request.request_id in self._requests:
                self._failed.add(request.request_id)
                request.num_computed_tokens = min(request.num_computed_tokens, first * self.block_tokens)
        return spoiled

    def is_here(self, scope: bytes, block_hash: bytes) -> bool:
        """Returns whether this machine's node has the block of every rank now. Makes no call to the node."""
        client = self._client
        return client is not None and all(client.look(keys_of(root, scope, [block_hash])).tiers for root in self._roots)

    def tiers_of(self, request: Any) -> dict[str, int]:
        """Returns the number of blocks in a request's load, by tier."""
        tracked = self._requests.get(request.request_id)
        return tracked.tiers if tracked else {}

    def finished(self, request: Any) -> None:
        """Forget a request. Its blocks are remembered until the next step, because the current step's outcome may not be known yet."""
        tracked = self._requests.pop(request.request_id, None)
        if tracked is not None:
            self._leaving.append(tracked)
        self._old.discard(request.request_id)
        self._failed.discard(request.request_id)
        self._offers.pop(request.request_id, None)
        self._forget_look_up(request)

    def _forget_look_up(self, request: Any) -> None:
        self._known_keys.pop(request.request_id, None)
        self._asker.forget(request.request_id)

    def reset(self) -> None:
        """Forget all blocks stored so far, unless the setting `on_reset` is "keep". Other engines' blocks are not affected."""
        if self._settings.on_reset == "keep":
            return
        self._epoch = secrets.randbits(63)
        self._forget_all()

    def _forget_all(self) -> None:
        self._resets += 1
        self._offers.clear()
        self._old.update(self._requests)
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
