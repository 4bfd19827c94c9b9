"""The workers' side of the connector: copies blocks between vLLM's pages and the node.

Loads that a step needs run before its forward pass. Other loads run in a thread, while their requests wait. Stores run after the
forward pass. A block that cannot be loaded is reported to vLLM, which computes it.
"""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from tiered_kv.client.page_client import Chain, Estimates, PageClient
from tiered_kv.client.page_copy import pages_of
from tiered_kv.integrations.vllm.identity import layout_of, namespace_of
from tiered_kv.integrations.vllm.messages import Handshake, RequestBlocks, Step, WorkerReport
from tiered_kv.integrations.vllm.pages import pages_in
from tiered_kv.integrations.vllm.settings import Settings, log
from tiered_kv.integrations.vllm.versions import replicas_of, runs_on_cpu


class Worker:
    """Makes the loads and stores of one rank. vLLM calls it from one thread.

    `attach(layout, namespace)` returns a client.
    """

    def __init__(
        self, config: Any, kv_cache_config: Any, settings: Settings, attach: Callable[..., PageClient], rank: int, world: int
    ) -> None:
        self._config, self._kv_cache_config, self._settings = config, kv_cache_config, settings
        self._attach, self._ranks = attach, world
        replicas = replicas_of(config, kv_cache_config)
        self._rank, self._world = rank // replicas, world // replicas
        self._is_writer = rank % replicas == 0  # of ranks with identical KV, the first one stores it
        self._client: PageClient | None = None
        self._computes_in_step = runs_on_cpu()  # on a GPU, the forward pass continues after its call has returned
        self._computing_since_s = 0.0
        self._failed_blocks: set[int] = set()
        self._failed_step = 0  # the last step whose own loads failed
        self._resets = 0
        self._stored: list[bytes] = []
        self._estimates: Estimates | None = None  # those reported last
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._waiting: set[str] = set()  # requests whose waiting loads have not ended
        self._finished: set[str] = set()  # requests whose waiting loads have ended
        self._failed_later: set[int] = set()
        self._queue: queue.SimpleQueue[tuple[RequestBlocks, int, float] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.records_stores = False
        """Whether to report the hashes of newly stored blocks, for KV events."""

    def register(self, kv_caches: dict[str, Any]) -> None:
        """Examine vLLM's KV cache, and connect to the node if there is one. Raises (kinds `layout`, `model`) if sharing is unsafe."""
        blocks = self._kv_cache_config.num_blocks
        arrays = pages_in(kv_caches, blocks)
        tokens = self._kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self.layout = layout_of(self._config, arrays, kv_caches, blocks, tokens)
        begun_s = time.monotonic()
        self.namespace = namespace_of(self._config, tenant=self._settings.tenant, rank=self._rank, world=self._world)
        self._pages = pages_of(arrays)
        self._client = self._attach(self.layout, self.namespace)
        log.info(
            "tiered_kv shares blocks of %d tokens and %d bytes of %s under the root %s (identity read in %.2f s)",
            tokens,
            self.layout.block_bytes,
            self.layout.description,
            self._client.root.hex()[:12],
            time.monotonic() - begun_s,
        )

    def handshake(self) -> Handshake | None:
        """Returns the message from which the scheduler's side computes this rank's keys, or None if this worker shares nothing."""
        return Handshake(self._ranks, asdict(self.namespace), asdict(self.layout)) if self._client is not None else None

    def load(self, step: Step) -> None:
        """Start the loads of a step, and wait until those that its forward pass needs have ended."""
        self._resets = step.resets
        for blocks in step.later:
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(target=self._load_waiting, name="tkv-vllm-load", daemon=True)
                thread.start()
                self._thread = thread
            with self._lock:
                self._waiting.add(blocks.request)
            self._queue.put((blocks, step.resets, time.perf_counter()))
        for blocks in step.now:
            failed = self._loaded(blocks, may_call=False)
            if failed:
                self._failed_blocks.update(failed)
                self._failed_step = step.number

    def begin(self) -> None:
        """Note the time at which a step begins."""
        self._computing_since_s = time.perf_counter()

    def give_up(self, step: Step) -> None:
        """Report the loads of a step as failed, because `load` raised an error. The thread reports the loads that it was given."""
        for blocks in step.now:
            self._failed_blocks.update(blocks.blocks)
            self._failed_step = step.number
        with self._lock:
            for blocks in step.later:
                if blocks.request not in self._waiting | self._finished:
                    self._finished.add(blocks.request)
                    self._failed_later.update(blocks.blocks)

    def store(self, step: Step) -> None:
        """Store the blocks that the step has completed, unless it may have computed with a block that failed to load."""
        if self._client is not None and self._computes_in_step:
            self._client.note_prefill(step.prefill_tokens, time.perf_counter() - self._computing_since_s)
        if self._client is None or not self._is_writer or not step.stores or step.acknowledged < self._failed_step:
            return
        begun_s, wait_s = time.perf_counter(), self._settings.store_wait_ms / 1000
        for blocks in step.stores:
            left_s = max(wait_s - (time.perf_counter() - begun_s), 0.0)
            chain = self._chain(self._client, blocks)
            if chain is None:
                continue  # the engine may have computed them with former weights
            stored = self._client.store(chain, self._pages, blocks.blocks, wait_s=left_s)
            with self._lock:
                self._counts["stored_blocks"] += stored.new
                self._counts["refused_blocks"] += stored.refused
            if self.records_stores and not stored.refused:
                self._stored += blocks.hashes
        with self._lock:
            self._counts["store_seconds"] += time.perf_counter() - begun_s

    @staticmethod
    def _chain(client: PageClient, blocks: RequestBlocks) -> Chain | None:
        """Returns the chain of these blocks, or None if the weight epoch was raised since they were planned."""
        root = client.root  # read before the epoch, so that it cannot be a later epoch's root
        return blocks.chain(root) if client.weight_epoch == blocks.weight_epoch else None

    def finished(self) -> set[str]:
        """Returns the requests whose waiting loads have ended since the last call."""
        with self._lock:
            finished, self._finished = self._finished, set()
            self._failed_blocks |= self._failed_later
            self._failed_later = set()
            return finished

    def failed(self) -> set[int]:
        """Returns vLLM's numbers of the blocks that failed to load since the last call.

        Call it after `finished`, which adds the failures of waiting loads.
        """
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def report(self) -> WorkerReport | None:
        """Returns the report to the scheduler's side, or None if there is nothing to report."""
        stored, self._stored = self._stored, []
        estimates = self._client.estimates() if self._client is not None else None
        new = estimates if estimates != self._estimates else None
        self._estimates = estimates
        return WorkerReport(self._failed_step, stored, new) if stored or self._failed_step or new else None

    def counts(self) -> dict[str, Any]:
        """Returns the counts since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return {name: count for name, count in counts.items() if count}

    def close(self) -> None:
        """Stop the thread and disconnect."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(timeout=5.0)
        if self._client is not None:
            self._client.close()

    def _load_waiting(self) -> None:
        """Make the waiting loads, one after the other, until `close`. Every load is reported as ended, even if it fails."""
        while (job := self._queue.get()) is not None:
            blocks, resets, since_s = job
            failed = self._loaded(blocks, may_call=True, since_s=since_s) if resets == self._resets else blocks.blocks
            if resets != self._resets:  # the blocks were planned before a reset
                failed = blocks.blocks
            with self._lock:
                self._waiting.discard(blocks.request)
                self._finished.add(blocks.request)
                self._failed_later.update(failed)

    def _loaded(self, blocks: RequestBlocks, may_call: bool, since_s: float | None = None) -> list[int]:
        """Load blocks. Returns vLLM's numbers of those that could not be loaded. Never raises.

        `may_call`: whether to ask the node for blocks that this process cannot read. `since_s`: when the request began to wait.
        """
        begun_s, done, by_tier = time.perf_counter(), 0, dict[str, int]()
        try:
            if self._client is not None and (chain := self._chain(self._client, blocks)) is not None:
                deadline_s = self._settings.load_deadline_ms / 1000 or self._client.deadline_s
                if since_s is not None:  # blocks in this machine's memory are loaded in any case
                    deadline_s = max(deadline_s - (begun_s - since_s), 0.0)
                done, by_tier = self._client.load(chain, self._pages, blocks.blocks, deadline_s=deadline_s, may_call=may_call)
        except Exception:  # noqa: BLE001 - named boundary: a block that is not reported would be taken for loaded
            log.exception("tiered_kv: a load ended with an error, so its blocks are computed")
        with self._lock:
            self._counts["loaded_blocks"] += done
            self._counts["failed_blocks"] += len(blocks.blocks) - done
            self._counts["load_seconds"] += time.perf_counter() - begun_s
            for tier, count in by_tier.items():
                self._counts[f"loaded_blocks_{tier}"] += count
        return blocks.blocks[done:]
