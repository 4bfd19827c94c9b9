"""The node: owns the tiers of one machine, and serves its workers' sessions and its peers. Plain Python, thread-safe.

Its files in shared memory outlive it: a new node with the same ids finds its blocks (design 2.1).
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

from tiered_kv import forking
from tiered_kv.blocks import GoneCause, Hint, Location, Tier
from tiered_kv.clock import Clock, SystemClock
from tiered_kv.config import Config, salt_of
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey, check_tenant
from tiered_kv.node.admission.commits import commit
from tiered_kv.node.admission.epochs import NodeEpochs
from tiered_kv.node.checkpoints.loader import CheckpointLoader
from tiered_kv.node.checkpoints.steps import CheckpointRequest, StepAnswer
from tiered_kv.node.checkpoints.writer import CheckpointWriter
from tiered_kv.node.insight.ceiling import Ceiling
from tiered_kv.node.learning import Learning, history_of, policy_of
from tiered_kv.node.lifetime.counters import ServiceCounters
from tiered_kv.node.monitoring.meters import Meters
from tiered_kv.node.monitoring.stats import node_stats
from tiered_kv.node.packed import Packed
from tiered_kv.node.peer_admission import Admission
from tiered_kv.node.probes import NodeProbes
from tiered_kv.node.puller import Puller
from tiered_kv.node.reporter import Reporter
from tiered_kv.node.seals import Seals
from tiered_kv.node.storage import NodeStorage
from tiered_kv.node.trace_recorder import ObservedHistory
from tiered_kv.node.trace_recording import Recorded, Recording
from tiered_kv.node.worker_session import NodeSession
from tiered_kv.policy import History
from tiered_kv.protocol.messages import NO_PEERS, BlockRun, Introduction, NodeInfo, NodeStats, PeerStats
from tiered_kv.protocol.model_info import ModelInfo
from tiered_kv.protocol.peer_transport import FramePieces, Holders, Link
from tiered_kv.protocol.probes import Probe, Variants
from tiered_kv.store import events as ev
from tiered_kv.store.engine import IN_MEMORY, QUEUE_BYTES_MIN, QUEUE_SHARE, Engine
from tiered_kv.store.gone import GoneBlocks
from tiered_kv.store.machine import StoreMachine
from tiered_kv.store.quotas import Quotas
from tiered_kv.threads import CheckedLock, Closer

log = logging.getLogger(__name__)

BEAT_S = 0.1
CLOSE_WITHIN_S = 5.0  # after this time `close` leaves running copies and the disk to a background thread


class Node:
    """One machine's part of the cache. `directory`: the folder in which its workers find index and arena.

    Raises a `TieredKVError` that names the setting if shared memory or disk cannot be allocated. `at_beat` is called after each beat.
    `secret`: the cluster's secret. Without one, tenants have no salts.
    """

    def __init__(
        self,
        config: Config,
        cluster_id: str,
        node_id: str,
        link: Link | None = None,
        *,
        clock: Clock | None = None,
        labels: dict[str, str] | None = None,
        mounted_bytes: int = 0,
        secret: bytes = b"",
        at_beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self._labels, self.link = labels or {}, link
        self.tenants = config.tenant_settings
        self._tenant_secret = self.tenants.secret(secret)
        self.node_id = node_id
        self.clock = self._clock = clock or SystemClock()
        self.storage = NodeStorage(config, cluster_id, node_id, mounted_bytes)
        self.directory = self.storage.directory
        history = history_of(config)
        observed = ObservedHistory(history)
        self.ceiling = Ceiling(sum(self.storage.capacities.values()), self.storage.index.tallies)
        self.gone = GoneBlocks(self._clock.now_s, self.ceiling)
        self.engine = self._make_engine(history, observed)
        self._recording = Recording(observed, self.engine.machine.blocks, config.block_tokens)
        self._learning = Learning(history, self.engine.lock, self._clock)
        self.epochs = NodeEpochs(self, self._lasting_folders(), link, self._clock.now_s)
        self.engine.handle(recovered := self.storage.restore())
        self.epochs.recovered(recovered)
        self.service = ServiceCounters(self.clock, self.storage.index.generation)
        self.meters = Meters(self)
        self.seals = Seals(self.engine, self.storage)
        self.probes = NodeProbes(self._lasting_folders(), self._ask_probe if link else None)
        self.checkpoint_loader = CheckpointLoader(self)
        self.checkpoint_writer = CheckpointWriter(self, lambda: self.checkpoint_loader.models)
        self._sessions: dict[NodeSession, None] = {}
        self._too_lossy: dict[BlockKey, None] = {}  # blocks to drop; guarded by the engine's lock
        self._reporter = self._make_reporter(link) if link else None
        self._puller = self._make_puller(link, self._reporter) if link and self._reporter else None
        self._stopped, self._refusal = False, "is closed"  # guarded by the engine's lock
        self._closing = threading.Event()
        self._at_beat = at_beat
        forking.register(self)
        self._closer = Closer()
        self._beats = threading.Thread(target=self._run_beats, name="tkv-beat", daemon=True)
        self._beats.start()
        self.seals.start()
        if self._reporter:
            self._reporter.start()

    def after_fork(self) -> None:
        """Make this node unusable in a forked child process. All calls fail there, as on a closed node."""
        self.engine.lock = threading.RLock()
        self.engine.freed = threading.Condition(self.engine.lock)
        self._closing = threading.Event()
        self._closing.set()
        self._stopped, self._refusal = True, "belongs to the process that this one was forked from"

    def info(self) -> NodeInfo:
        """Returns the data that a worker needs to attach: the folders of index, arena, socket and segments, and the settings."""
        disk = self.storage.disk
        info: dict[str, Any] = {
            "node": self.node_id,
            "directory": str(self.directory),
            "disk_folder": str(disk.folder) if disk else None,
            "has_device": self.storage.device is not None,
            "block_tokens": self.config.block_tokens,
            "fetch_deadline_ms": self.config.fetch_deadline_ms,
            "store_wait_ms": self.config.store_wait_ms,
            "verify_host": self.config.verify_host,
            **self._labels,
        }
        return cast("NodeInfo", info)

    def open_session(self) -> NodeSession:
        """Open a session for one worker. Close it when the worker leaves."""
        with self.running():
            session = NodeSession(self)
            self._sessions[session] = None
        return session

    def running(self) -> CheckedLock:
        """A context that holds the engine's lock while the node is open. Raises (kind `transport`) if the node is closed."""
        return CheckedLock(self.engine.lock, self.check_open)

    def check_open(self) -> None:
        """Raise (kind `transport`) if the node is closed. Call with the engine's lock."""
        if self._stopped:
            raise TieredKVError(Kind.TRANSPORT, f"the node {self.node_id} {self._refusal}", node=self.node_id)

    def is_open(self, session: NodeSession) -> bool:
        """Returns whether the session is open."""
        return session in self._sessions

    def session_closed(self, session: NodeSession) -> None:
        """Free the extents that a closed session had reserved, at once or when no worker writes to them any more."""
        with self.engine.lock:
            if self._sessions.pop(session, ...) is None and not self._stopped:
                self.storage.quarantine.abandon(session.reserved)
                session.reserved.clear()
                self.engine.freed.notify_all()

    def salt(self, tenant: str) -> str:
        """Returns the salt of a tenant's namespaces in this cluster."""
        check_tenant(tenant)
        return salt_of(tenant, self._tenant_secret)

    def introduce(self, root: BlockKey, info: ModelInfo) -> Introduction:
        """Register a worker's model, as `BlockEncoder.introduce`. The model's blocks on this node can be encoded from now on."""
        self.epochs.learn(root, namespace := info.known_namespace())
        if namespace is not None:
            self.tenants.check_block(namespace.tenant, info.layout.block_bytes)
        encoder = self.storage.encoder
        is_new = not encoder.knows(root, info)
        introduction = encoder.introduce(root, info)
        if is_new:
            with self.running():
                self.engine.machine.shrinking.retry_all()
                self._too_lossy |= dict.fromkeys(self.storage.allowance.decide(root))
            self._drop_too_lossy()
        return introduction

    def _drop_too_lossy(self) -> None:
        """Drop the blocks that a new plan does not allow. Blocks that are being copied or read are tried again at the next beat."""
        machine, dropped = self.engine.machine, 0
        with self.engine.lock:
            for key in list(self._too_lossy):
                block = machine.blocks.get(key)
                if block is not None and (block.copying_to is not None or machine.pinned(key)):
                    continue
                del self._too_lossy[key]
                dropped += block is not None
                self.engine.handle(
                    [ev.Lost(key, each, GoneCause.TOO_LOSSY) for each in (*block.copies.values(),)] if block is not None else []
                )
        self.storage.allowance.refuse("introduced", dropped)

    def commit(self, packed: list[Packed], *, note_touches: bool = True) -> list[bool]:
        """Make packed blocks visible. Each block must follow its parent. Returns for each block whether it is new on this node.

        If the list is shorter than `packed`, the other blocks stay invisible and their extents are freed: the index has no room for
        them, or their weights have ended. Raises (kind `transport`), with all extents freed, unless each depth is the parent's plus 1.
        """
        with self.running():
            added = commit(self, packed, self._clock.now_s(), note_touches=note_touches)
        self.report_soon()
        return added

    def report_soon(self) -> None:
        """Have the reporter's thread report to the coordinator now."""
        if self._reporter:
            self._reporter.wake()

    def hint(self, last_block: BlockKey, hint: Hint) -> None:
        """Apply a worker's hint about the future of the chain whose deepest block is `last_block`."""
        with self.running():
            self.engine.drain_touches()
            self.engine.handle([ev.Hinted(last_block, hint, self._clock.now_s())])

    def free_extents(self, offsets: Iterable[int]) -> None:
        """Free reserved extents. No worker may be writing to them."""
        with self.running():
            for offset in offsets:
                self.storage.host.free(offset)
            self.engine.freed.notify_all()

    def pull(self, run: BlockRun, wait_s: float) -> int:
        """Fetch the leading blocks of `run` from other nodes. Returns how many of them this node has afterwards."""
        if not self._puller or not run.keys or self.epochs.is_closed(run.root):
            return 0
        with closing(self.open_session()) as session:
            session.tenant = self.epochs.tenant_of(run.root)
            admit = Admission(self, session, run)
            return self._puller.pull(run.keys, run.nbytes, wait_s, admit, self.engine.machine.blocks.__contains__)

    def doubt(self, keys: list[BlockKey]) -> None:
        """Check blocks that a worker could not read: rewrite wrong index slots, and drop damaged blocks."""
        for key in keys:
            with self.running():
                self.seals.examine(key)

    def bring(self, keys: list[BlockKey], wait_s: float) -> None:
        """Load blocks into host memory from tiers that workers cannot read themselves. Waits at most `wait_s`."""
        with self.running():
            self.engine.drain_touches()
        self.engine.bring(keys, wait_s)

    def locate(self, keys: list[BlockKey], wait_s: float | None = None) -> list[list[str]]:
        """As `Link.locate`; [] without a coordinator. `wait_s` None stands for the deadline of a fetch."""
        return self._reporter.locate(keys, self.config.fetch_deadline_ms / 1000 if wait_s is None else wait_s) if self._reporter else []

    def holders(self, keys: list[BlockKey], wait_s: float) -> Holders | None:
        """As `Link.holders`, with peers whose last request failed as silent ones; None without a coordinator."""
        return self._reporter.holders(keys, wait_s).without(self._puller.avoided()) if self._reporter and self._puller else None

    @contextmanager
    def serving(self, keys: list[BlockKey]) -> Iterator[list[FramePieces]]:
        """Yields the leading blocks of `keys` that this node has, as frames. Their bytes do not change inside the with block."""
        with self.pinned(keys) as here:
            yield list(self.storage.frames(here))

    @contextmanager
    def pinned(self, keys: Sequence[BlockKey]) -> Iterator[list[tuple[BlockKey, BlockKey | None, Location]]]:
        """Yields the leading `keys` that this node has, with root and location. Their bytes do not change inside the with block.

        Copies in other tiers may be added meanwhile. Read each block at the yielded location, in the codec that the location names.
        """
        machine = self.engine.machine
        with self.running():
            here: list[tuple[BlockKey, BlockKey | None, Location]] = []
            for key in keys:
                block = machine.blocks.get(key)
                if block is None or self.epochs.is_closed(block.root):
                    break
                here.append((key, block.root, block.copies.get(Tier.HOST, block.best)))
            self.engine.handle([ev.Pinned(key) for key, _, _ in here])
        try:
            yield here
        finally:
            self.engine.handle([ev.Unpinned(key) for key, _, _ in here])

    def hold(self, keys: Sequence[BlockKey]) -> list[int]:
        """Pin the leading `keys` that are raw in host memory, until `let_go`. Returns the offsets of their payloads."""
        offsets: list[int] = []
        with self.running():
            for key in keys:
                block = self.engine.machine.blocks.get(key)
                if block is None or Tier.HOST not in block.copies or block.copies[Tier.HOST].codec or self.epochs.is_closed(block.root):
                    break
                offsets.append(block.copies[Tier.HOST].offset)
                self.engine.handle([ev.Pinned(key)])
        return offsets

    def let_go(self, keys: Sequence[BlockKey]) -> None:
        """End one `hold` of each of these blocks."""
        self.engine.handle([ev.Unpinned(key) for key in keys])

    def forget(self, root: BlockKey) -> None:
        """Drop all blocks below `root`, in every tier. None of them may be held."""
        self.engine.settle()
        with self.running():
            blocks = self.engine.machine.blocks
            ours = [key for key, block in blocks.items() if block.root == root]
            for key in reversed(ours):  # children were added after their parents
                self.engine.handle([ev.Lost(key, each, GoneCause.FORGOTTEN) for each in list(blocks[key].copies.values())])

    def report(self) -> None:
        """Report to the coordinator now instead of at the next heartbeat."""
        if self._reporter and not self._closing.is_set():
            self._reporter.report_once()

    def checkpoint(self, request: CheckpointRequest[StepAnswer]) -> StepAnswer:
        """Carry out one step of writing or restoring a checkpoint. Returns the step's answer. `checkpoints.steps` lists the errors."""
        return request.run(self)

    def record(self, on: bool, salt: bytes = b"") -> float:
        """Start or stop recording requests. Returns for how many seconds requests have been recorded, 0 after a stop.

        Block keys leave the node as numbers hashed with `salt`, at most 64 bytes. A start with the same salt continues a recording.
        Raises (kind `cluster`) while a recording with another salt is running. A recording ends by itself if nobody reads it for a minute.
        """
        with self.running():
            self.engine.drain_touches()  # earlier uses are not part of the recording
            if on:
                return self._recording.start(salt, self._clock.now_s())
            self._recording.stop()
            return 0.0

    def recorded(self, everything: bool = False) -> Recorded:
        """Returns the requests finished since the last call (with `everything`, all), in the simulator's format.

        Their times are ms since the recording started. Raises (kind `closed`) if no recording is running.
        """
        with self.running():
            self.engine.drain_touches()
            return self._recording.take(self._clock.now_s(), everything)

    def stats(self) -> NodeStats:
        """Returns the node's figures, including all uses by workers so far, ready for JSON. Sizes are bytes."""
        return node_stats(self, self._sessions, self._learning, self._recording, self._reporter)

    def peer_stats(self) -> PeerStats:
        """Returns the figures of this node's transfers with its peers."""
        return self.link.stats() if self.link else NO_PEERS

    def beat(self) -> None:
        """Do the periodic work: apply touches, free extents of dead workers, write the heartbeat."""
        self.engine.drain_touches()
        with self.engine.lock:
            self.storage.beat()
            self.checkpoint_loader.thin_out()
            self._recording.beat(self._clock.now_s())
            self.ceiling.beat()
            if not self._reporter:
                self.engine.journal.clear()
        if self._too_lossy:
            self._drop_too_lossy()
        self.checkpoint_writer.beat()
        self.epochs.beat()
        self.meters.clients.beat()

    def report_commits(self) -> None:
        """Report committed blocks to the eviction policy, if many have not been. Call it while no worker waits for an answer."""
        if self.engine.machine.has_many_unreported_commits:
            with self.engine.lock:
                self.engine.machine.report_commits()

    def is_in_place(self) -> bool:
        """Returns whether workers can find this node: its directory and socket still have their names."""
        return self.storage.is_in_place()

    def abdicate(self) -> None:
        """Mark this node's files as closed for workers that map them. For a node that is no longer in place."""
        self.storage.index.close_state()

    def check(self) -> None:
        """Assert that machine, index, tiers and reservations agree. Settle the engine first: running promotions would look like leaks."""
        with self.engine.lock:
            if self._stopped:
                raise TieredKVError(Kind.CLOSED, f"the node {self.node_id} is closed")
            self.engine.check()
            late = dict.fromkeys(self.engine.machine.endings.offsets(), 0)
            self.storage.check(self.engine.machine.blocks, [late, *(session.reserved for session in self._sessions)])

    def close(self, remove: bool = True, *, afterwards: Callable[[], None] = lambda: None, within_s: float = CLOSE_WITHIN_S) -> None:
        """Stop all threads. With `remove`, readers see a closed node and every file is deleted. Else all files stay for a restart.

        If a disk or an object store hangs, this returns after `within_s`, and a background thread finishes the work once they answer:
        running copies, the footers of open segments (their frames are found without footers), and the removal of disk files.
        `afterwards` is called when all work is done.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        if not self._closer.run(lambda: self._end(remove, afterwards), within_s):
            log.warning("the node %s is closed, but its disk or object store has not answered for %.0f s", self.node_id, within_s)
            self._stopped = True
            if remove:
                self.storage.withdraw()

    def _end(self, remove: bool, afterwards: Callable[[], None]) -> None:
        """Close all parts of the node. Each part is closed after those that use it."""
        self._beats.join()
        self.seals.close()
        self.checkpoint_writer.close()
        self.checkpoint_loader.close()
        if self._reporter:
            self._reporter.close()
        self.engine.close()
        with self.engine.lock:
            self._stopped = True
        self.storage.close(remove)
        afterwards()

    def _make_engine(self, history: History, observed: ObservedHistory) -> Engine:
        config, storage = self.config, self.storage
        memory = [tier for tier in storage.capacities if tier in IN_MEMORY]
        policies = {tier: policy_of(config, history, storage.capacities[tier]) for tier in memory}
        quotas = Quotas(self.tenants.quotas, lambda root: self.epochs.tenant_of(root))
        machine = StoreMachine(storage.capacities, policies, observed, shrinks=storage.encoder.shrinks, quotas=quotas, observer=self.gone)
        queue_bytes = max(QUEUE_BYTES_MIN, int(config.host * QUEUE_SHARE))
        return Engine(machine, storage.index, storage, self._clock, config.io_threads, queue_bytes=queue_bytes)

    def _make_reporter(self, link: Link) -> Reporter:
        return Reporter(
            link,
            self.node_id,
            self.config.heartbeat_s,
            take_changes=self._take_changes,
            inventory=self._inventory,
            describe=lambda: (self.info(), self.stats()),
            set_peers=self.storage.index.set_peers,
            learning=self._learning,
            probes=self.probes.book.everything,
            epochs=self.epochs,
            clock=self._clock,
        )

    def _make_puller(self, link: Link, reporter: Reporter) -> Puller:
        forgotten_s = self.config.node_timeout_s + self.config.heartbeat_s
        return Puller(link, reporter.locate, self._clock, forgotten_s, on_transfer=self.meters.transfer.add)

    def _lasting_folders(self) -> list[Path]:
        """Returns the folders whose files outlive this node, as its blocks do."""
        return [self.directory, *([Path(disk.folder)] if (disk := self.storage.disk) and self.storage.keeps_disk else [])]

    def _ask_probe(self, root: BlockKey, known: Variants, probe: Probe) -> Variants:
        assert self._reporter is not None
        return self._reporter.probe(root, known, probe)

    def _take_changes(self) -> dict[BlockKey, bool]:
        with self.engine.lock:
            changes = dict(self.engine.journal)
            self.engine.journal.clear()
            return changes

    def _inventory(self) -> list[BlockKey]:
        with self.engine.lock:
            return list(self.engine.machine.blocks)

    def _run_beats(self) -> None:
        """Do the periodic work every BEAT_S until the node closes. An error in one beat is logged and does not stop the next."""
        while not self._closing.wait(BEAT_S):
            try:
                self.beat()
                self._at_beat()
            except Exception:
                log.exception("the node's beat failed")
