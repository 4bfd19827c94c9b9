"""The node: owns the tiers of one machine, serves its workers' sessions and its peers. Plain Python, thread-safe.

Its files in shared memory outlive it: a node made again under the same ids finds its blocks (design 2.1).
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from tiered_kv import forking
from tiered_kv.blocks import Hint, Location, Tier
from tiered_kv.clock import Clock, SystemClock
from tiered_kv.config import Config
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.node.checkpoints.loader import INDEX_SHARE, CheckpointLoader
from tiered_kv.node.checkpoints.steps import CheckpointRequest, StepAnswer
from tiered_kv.node.checkpoints.writer import CheckpointWriter
from tiered_kv.node.learning import Learning, history_of, policy_of
from tiered_kv.node.packed import Packed, runs_of_packed
from tiered_kv.node.peer_admission import Admission
from tiered_kv.node.probes import NodeProbes
from tiered_kv.node.puller import Puller
from tiered_kv.node.reporter import Reporter
from tiered_kv.node.seals import Seals
from tiered_kv.node.storage import Place
from tiered_kv.node.trace_recorder import ObservedHistory
from tiered_kv.node.trace_recording import Recorded, Recording
from tiered_kv.node.worker_session import NodeSession
from tiered_kv.policy import History
from tiered_kv.protocol.model_info import ModelFacts
from tiered_kv.protocol.peer_transport import FramePieces, Link
from tiered_kv.store import events as ev
from tiered_kv.store.engine import IN_MEMORY, QUEUE_BYTES_MIN, QUEUE_SHARE, Engine
from tiered_kv.store.machine import StoreMachine
from tiered_kv.threads import Closer
from tiered_kv.tiers.host import Lineage

log = logging.getLogger(__name__)

BEAT_S = 0.1
CLOSE_WITHIN_S = 5.0
"""How long closing waits for copies under way and for the disk, before it leaves them to a thread that nobody waits for."""


class Node:
    """One machine's part of the cache; `directory` is where its workers find index and arena.

    Raises `TieredKVError` that names the setting when shared memory or disk cannot be had. `at_beat` is called after each beat.
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
        at_beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self._labels = labels or {}
        self.node_id = node_id
        self._clock = clock or SystemClock()
        self.place = Place(config, cluster_id, node_id, mounted_bytes)
        history = history_of(config)
        observed = ObservedHistory(history)
        self.engine = self._make_engine(history, observed)
        self._recording = Recording(observed, self.engine.machine.blocks, config.block_tokens)
        self._learning = Learning(history, self.engine.lock, self._clock)
        self.engine.handle(self.place.restore())
        self.seals = Seals(self.engine, self.place)
        self.directory = self.place.directory
        self.probes = NodeProbes(self._lasting_folders(), (lambda *asked: self._reporter.probe(*asked)) if link else None)
        self.checkpoint_loader = CheckpointLoader(self)
        self.checkpoint_writer = CheckpointWriter(self, lambda: self.checkpoint_loader.models)
        self._sessions: dict[NodeSession, None] = {}
        self._too_lossy: dict[BlockKey, None] = {}  # to be given up; guarded by the engine's lock
        self._reporter = self._make_reporter(link) if link else None
        self._puller = self._make_puller(link, self._reporter) if link and self._reporter else None
        self._stopped = False  # guarded by the engine's lock
        self._gone = "is closed"
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
        """A child process has no node: everything that is asked of this one there is refused, as of one that is closed."""
        self.engine.lock = threading.RLock()
        self.engine.freed = threading.Condition(self.engine.lock)
        self._closing = threading.Event()
        self._closing.set()
        self._stopped, self._gone = True, "belongs to the process that this one was forked from"

    def info(self) -> dict:
        """What a worker needs to attach: where index, arena, socket and segments are, and the cluster's settings."""
        disk = self.place.disk
        return {
            "node": self.node_id,
            "directory": str(self.directory),
            "disk_folder": str(disk.folder) if disk else None,
            "has_device": self.place.device is not None,
            "block_tokens": self.config.block_tokens,
            "fetch_deadline_ms": self.config.fetch_deadline_ms,
            "store_wait_ms": self.config.store_wait_ms,
            "verify_host": self.config.verify_host,
            **self._labels,
        }

    def open_session(self) -> NodeSession:
        """A session for one worker; close it when the worker leaves."""
        with self.running():
            session = NodeSession(self)
            self._sessions[session] = None
        return session

    @contextmanager
    def running(self) -> Iterator[None]:
        """The engine's lock, held while the node is there; raises (kind `transport`) once it is closed."""
        with self.engine.lock:
            if self._stopped:
                raise TieredKVError(Kind.TRANSPORT, f"the node {self.node_id} {self._gone}", node=self.node_id)
            yield

    def is_open(self, session: NodeSession) -> bool:
        """Whether the session has not been closed."""
        return session in self._sessions

    def session_closed(self, session: NodeSession) -> None:
        """Take back what the session had reserved, at once or when nobody writes there any more."""
        with self.engine.lock:
            if self._sessions.pop(session, ...) is None and not self._stopped:
                self.place.quarantine.abandon(session.reserved)
                session.reserved.clear()
                self.engine.freed.notify_all()

    def introduce(self, root: BlockKey, facts: ModelFacts) -> dict:
        """A worker's model, as `Coder.introduce`; blocks of it that were here before can be coded from now on."""
        coder = self.place.coder
        is_new = not coder.knows(root, facts)
        told = coder.introduce(root, facts)
        if is_new:
            with self.running():
                self.engine.machine.shrinking.hope()
                self._too_lossy |= dict.fromkeys(self.place.allowance.decide(root))
            self._give_up_too_lossy()
        return told

    def _give_up_too_lossy(self) -> None:
        """Give up the blocks that a new plan does not allow; those that are being copied or read at the next beat."""
        machine, given_up = self.engine.machine, 0
        with self.engine.lock:
            for key in list(self._too_lossy):
                block = machine.blocks.get(key)
                if block is not None and (block.copying_to is not None or machine.pinned(key)):
                    continue
                del self._too_lossy[key]
                given_up += block is not None
                self.engine.handle([ev.Lost(key, location) for location in (*block.copies.values(),)] if block is not None else [])
        self.place.allowance.refuse("introduced", given_up)

    def commit(self, root: BlockKey, packed: list[Packed]) -> list[bool]:
        """Make packed blocks, root first, visible; False for one that was there already.

        Fewer answers than blocks: the index has no room for the others, whose extents are free again. Raises (kind `transport`), with
        all extents free again, unless each block is deeper by one than its parent.
        """
        with self.running():
            self._check_places(packed)
            self.engine.drain_touches()
            taken = packed[: self._index_room_for(packed)]
            added = [not self.engine.machine.has(each.key, Tier.HOST) for each in taken]
            for key, parent, location, depth, error, digest in taken:
                self.place.sign(location, Lineage(key, parent, root, depth), error, digest)
            self.engine.handle(runs_of_packed(root, taken, self._clock.now_s()))
            self.seals.committed([each.key for each in taken if each.digest is None])
            self.seals.mend_slots(each.key for each, is_new in zip(taken, added, strict=True) if not is_new)
            self.free_extents(each.location.offset for each in packed[len(taken) :])
        if self._reporter:
            self._reporter.wake()
        return added

    def _check_places(self, packed: list[Packed]) -> None:
        """Refuse blocks that cannot be where a worker says: links among them might be a cycle."""
        wrong = self.engine.machine.chains.misplaced((each.key, each.parent, each.depth) for each in packed)
        if wrong is not None:
            self.free_extents(each.location.offset for each in packed)
            raise TieredKVError(Kind.TRANSPORT, f"nothing of a commit is shown: {wrong}")

    def hint(self, tail: BlockKey, hint: Hint) -> None:
        """What a worker knows of the future of the chain that ends with `tail`."""
        with self.running():
            self.engine.drain_touches()
            self.engine.handle([ev.Hinted(tail, hint, self._clock.now_s())])

    def _index_room_for(self, blocks: list[Packed]) -> int:
        """How many of the blocks, from the first on, the index can show, after room was made for them."""
        if len(blocks) <= self.place.index_room:
            return len(blocks)
        known = self.engine.machine.blocks
        missing = sum(each.key not in known for each in blocks) - self.place.index_room
        if missing <= 0:
            return len(blocks)
        self.engine.handle([ev.Crowded(missing, blocks[0].parent, self._clock.now_s())])
        room = self.place.index_room
        for count, each in enumerate(blocks):
            room -= each.key not in known
            if room < 0:
                return count
        return len(blocks)

    def free_extents(self, offsets: Iterable[int]) -> None:
        """Give reserved extents back, which nobody writes to."""
        with self.running():
            for offset in offsets:
                self.place.host.free(offset)
            self.engine.freed.notify_all()

    def pull(self, root: BlockKey, nbytes: int, tail: BlockKey | None, keys: list[BlockKey], depth: int, wait_s: float) -> int:
        """Fetch the leading blocks of `keys` from other nodes; how many are here at the end.

        The first stands behind `tail`, with `depth` blocks before it.
        """
        if not self._puller or not keys:
            return 0
        with closing(self.open_session()) as session:
            admit = Admission(self, session, root, nbytes, keys, tail, depth)
            return self._puller.pull(keys, nbytes, wait_s, admit, self._is_visible)

    def doubt(self, keys: list[BlockKey]) -> None:
        """A worker could not read these blocks where the index shows them: wrong slots are written anew, damaged blocks are given up."""
        for key in keys:
            with self.running():
                self.seals.examine(key)

    def bring(self, keys: list[BlockKey], wait_s: float) -> None:
        """Have blocks that are here, but where a worker cannot read them, in host memory; waits at most `wait_s`."""
        with self.running():
            self.engine.drain_touches()
        self.engine.bring(keys, wait_s)

    def locate(self, keys: list[BlockKey], wait_s: float | None = None) -> list[list[str]]:
        """For the leading keys that some other node holds: the nodes that do. Waits at most `wait_s`, None for a fetch's deadline."""
        wait_s = self.config.fetch_deadline_ms / 1000 if wait_s is None else wait_s
        return self._reporter.locate(keys, wait_s) if self._reporter else []

    @contextmanager
    def serving(self, keys: list[BlockKey]) -> Iterator[list[FramePieces]]:
        """The leading `keys` that are here, as frames; their bytes stay as they are inside the with block."""
        with self.pinned(keys) as here:
            yield list(self.place.frames(here))

    @contextmanager
    def pinned(self, keys: Sequence[BlockKey]) -> Iterator[list[tuple[BlockKey, BlockKey | None, Location]]]:
        """The leading `keys` that are here, with their roots, and where their bytes stay as they are inside the with block.

        Other copies may come meanwhile: what is read is where this says, and in the codec that it says.
        """
        machine = self.engine.machine
        with self.running():
            here: list[tuple[BlockKey, BlockKey | None, Location]] = []
            for key in keys:
                block = machine.blocks.get(key)
                if block is None:
                    break
                here.append((key, block.root, block.copies.get(Tier.HOST, block.best)))
            self.engine.handle([ev.Pinned(key) for key, _, _ in here])
        try:
            yield here
        finally:
            self.engine.handle([ev.Unpinned(key) for key, _, _ in here])

    def hold(self, keys: Sequence[BlockKey]) -> list[int]:
        """Keep the leading `keys` that lie in host memory as they were stored there, until `let_go`; their payloads' offsets."""
        offsets = []
        with self.running():
            for key in keys:
                block = self.engine.machine.blocks.get(key)
                if block is None or Tier.HOST not in block.copies or block.copies[Tier.HOST].codec:
                    break
                offsets.append(block.copies[Tier.HOST].offset)
                self.engine.handle([ev.Pinned(key)])
        return offsets

    def let_go(self, keys: Sequence[BlockKey]) -> None:
        """End one `hold` of each of these blocks."""
        self.engine.handle([ev.Unpinned(key) for key in keys])

    def forget(self, root: BlockKey) -> None:
        """Give up all blocks below `root`, in every tier; nobody may be holding one."""
        self.engine.settle()
        with self.running():
            blocks = self.engine.machine.blocks
            ours = [key for key, block in blocks.items() if block.root == root]
            for key in reversed(ours):  # children came later
                self.engine.handle([ev.Lost(key, location) for location in list(blocks[key].copies.values())])

    def report(self) -> None:
        """Tell the coordinator now what would be told in a moment."""
        if self._reporter and not self._closing.is_set():
            self._reporter.report_once()

    def checkpoint(self, request: CheckpointRequest[StepAnswer]) -> StepAnswer:
        """Carry out one step of writing or restoring a checkpoint. Returns its answer; raises as the step in `checkpoints.steps`."""
        return request.run(self)

    def record(self, on: bool, salt: bytes = b"") -> float:
        """Begin or end to record requests; for how many seconds they are being recorded by now.

        Block keys leave the node as numbers that only `salt`, at most 64 bytes, could explain; the same salt goes on.

        Raises (kind `cluster`) while somebody records with another salt. Ends by itself when nobody has read for a minute.
        """
        with self.running():
            self.engine.drain_touches()  # what was used before it began is not part of it
            if on:
                return self._recording.start(salt, self._clock.now_s())
            self._recording.stop()
            return 0.0

    def recorded(self, everything: bool = False) -> Recorded:
        """Requests since the last call that are over (or all), in the simulator's format; times in ms since `record`.

        Raises (kind `closed`) while nothing is recorded.
        """
        with self.running():
            self.engine.drain_touches()
            return self._recording.take(self._clock.now_s(), everything)

    def stats(self) -> dict:
        """The node's figures, up to the last use of any worker, ready for JSON. Sizes in bytes."""
        machine = self.engine.machine
        with self.running():
            self.engine.drain_touches()
            tiers = self.place.usage()
            for tier in tiers:
                tiers[tier]["blocks"] = machine.blocks_by_tier[Tier[tier.upper()]]
            if self.place.disk:
                tiers[Tier.DISK.label]["write_amplification"] = self.place.disk.write_amplification
            asked, hit = self.place.index.tallies()
            saved_tokens, saved_s = self.place.index.savings()
            return {
                "node": self.node_id,
                "tiers": tiers,
                "blocks": len(machine.blocks),
                "asked_blocks": asked,
                "hit_blocks": hit,
                "prefill_tokens_saved": saved_tokens,
                "prefill_seconds_saved": saved_s,
                "sessions": len(self._sessions),
                "reserved_bytes": sum(sum(session.reserved.values()) for session in self._sessions),
                "leaving_bytes": self.engine.leaving_bytes,
                "counts": dict(machine.counts),
                "codecs": self.place.coder.stats(),
                "too_lossy": self.place.allowance.stats(),
                "policy": {"name": self.config.policy} | self._learning.stats(),
                "recording": self._recording.is_on,
                "filling": self.checkpoint_loader.stats(),
                "saved": self.checkpoint_writer.last,
                "seals": self.seals.stats(),
                "coordinator": self._reporter.reachable if self._reporter else None,
            }

    def beat(self) -> None:
        """What has to be done now and then: use the touches, take back what dead workers held, say that we live."""
        self.engine.drain_touches()
        with self.engine.lock:
            self.place.beat()
            self._thin_out()
            self._recording.beat(self._clock.now_s())
            if not self._reporter:
                self.engine.journal.clear()
        if self._too_lossy:
            self._give_up_too_lossy()
        self.checkpoint_writer.beat()

    def _thin_out(self) -> None:
        """Keep slots of the index free of what a checkpoint alone holds."""
        missing = int(self.place.index.capacity_blocks * (1 - INDEX_SHARE)) - self.place.index_room
        if missing > 0 and self.engine.machine.blocks_by_tier[Tier.CHECKPOINT]:
            self.engine.handle([ev.Unmounted(missing)])

    def catch_up(self) -> None:
        """Let the policy hear of what was committed, while no worker waits for an answer."""
        if self.engine.machine.behind:
            with self.engine.lock:
                self.engine.machine.catch_up()

    def is_in_place(self) -> bool:
        """Whether workers find this node: its directory and socket still have their names."""
        return self.place.is_in_place()

    def abdicate(self) -> None:
        """Tell workers that map this node's files that they are no longer those of a node; for one that is not in place."""
        self.place.index.close_state()

    def check(self) -> None:
        """Assert that machine, index, tiers and reservations agree. Settle the engine before: promotions under way are not known here."""
        with self.engine.lock:
            if self._stopped:
                raise TieredKVError(Kind.CLOSED, f"the node {self.node_id} is closed")
            self.engine.check()
            self.place.check(self.engine.machine.blocks, [session.reserved for session in self._sessions])

    def close(self, remove: bool = True, *, afterwards: Callable[[], None] = lambda: None, within_s: float = CLOSE_WITHIN_S) -> None:
        """Stop all threads. With `remove`, readers see a closed node and every file is deleted; without, all stays for a restart.

        Where a disk or an object store hangs this returns after `within_s` all the same, and a thread of its own goes on when they
        answer, at last with `afterwards`. Until then given up: copies under way, footers of open segments (their frames are
        found without), and the removal of disk files.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        if not self._closer.run(lambda: self._end(remove, afterwards), within_s):
            log.warning("the node %s is closed, but its disk or object store has not answered for %.0f s", self.node_id, within_s)
            self._stopped = True
            if remove:
                self.place.withdraw()

    def _end(self, remove: bool, afterwards: Callable[[], None]) -> None:
        """Close one part after the other, each when what uses it has ended."""
        self._beats.join()
        self.seals.close()
        self.checkpoint_writer.close()
        self.checkpoint_loader.close()
        if self._reporter:
            self._reporter.close()
        self.engine.close()
        with self.engine.lock:
            self._stopped = True
        self.place.close(remove)
        afterwards()

    def _make_engine(self, history: History, observed: ObservedHistory) -> Engine:
        config, place = self.config, self.place
        memory = [tier for tier in place.capacities if tier in IN_MEMORY]
        policies = {tier: policy_of(config, history, place.capacities[tier]) for tier in memory}
        machine = StoreMachine(place.capacities, policies, observed, shrinks=place.coder.shrinks)
        queue_bytes = max(QUEUE_BYTES_MIN, int(config.host * QUEUE_SHARE))
        return Engine(machine, place.index, place, self._clock, config.io_threads, queue_bytes=queue_bytes)

    def _make_reporter(self, link: Link) -> Reporter:
        return Reporter(
            link,
            self.node_id,
            self.config.heartbeat_s,
            take_changes=self._take_changes,
            inventory=self._inventory,
            describe=lambda: (self.info(), self.stats()),
            set_peers=self.place.index.set_peers,
            learning=self._learning,
            probes=self.probes.book.everything,
            clock=self._clock,
        )

    def _make_puller(self, link: Link, reporter: Reporter) -> Puller:
        forgotten_s = self.config.node_timeout_s + self.config.heartbeat_s
        return Puller(link, reporter.locate, self._clock, self.config.pull_chunk, forgotten_s)

    def _lasting_folders(self) -> list[Path]:
        """Where a file outlives this node as long as its blocks do."""
        disk = self.place.disk
        return [self.directory, *([Path(disk.folder)] if disk and self.place.keeps_disk else [])]

    def _take_changes(self) -> dict[BlockKey, bool]:
        with self.engine.lock:
            changes = dict(self.engine.journal)
            self.engine.journal.clear()
            return changes

    def _inventory(self) -> list[BlockKey]:
        with self.engine.lock:
            return list(self.engine.machine.blocks)

    def _is_visible(self, key: BlockKey) -> bool:
        return key in self.engine.machine.blocks

    def _run_beats(self) -> None:
        """Boundary of the thread: a beat that fails is logged, the next one is tried."""
        while not self._closing.wait(BEAT_S):
            try:
                self.beat()
                self._at_beat()
            except Exception:
                log.exception("the node's beat failed")
