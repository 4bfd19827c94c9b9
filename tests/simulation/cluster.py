"""A simulated cluster: coordinator, nodes and workers, each a simulated process, with functions to start, end and damage them."""

import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.history.history import Operation
from tests.simulation.files import FAULTS_OF_STORES, DiskFaults, DiskFiles
from tests.simulation.link import Network, SimulatedLink
from tests.simulation.plan import Plan
from tests.simulation.scheduler import Process, SimulationError, World
from tests.simulation.sockets import Wires
from tiered_kv.clock import SystemClock
from tiered_kv.config import Config
from tiered_kv.coordinator.coordinator import Coordinator
from tiered_kv.coordinator.lookup_server import LookupServer
from tiered_kv.errors import TieredKVError
from tiered_kv.memory import words
from tiered_kv.node.node import Node
from tiered_kv.node.peers.network import StreamLink
from tiered_kv.protocol.node_record import NodeRecord, write_record
from tiered_kv.protocol.peer_address import PeerPlace
from tiered_kv.protocol.peer_channel import PeerIdentity
from tiered_kv.protocol.peer_transport import Link
from tiered_kv.protocol.unix_socket import SessionServer

CLUSTER = "sim"
SECRET = bytes(range(32))
SETTINGS: dict[str, Any] = {
    "block_tokens": 4,
    "disk_segment": "64KiB",
    "store_wait_ms": 200,
    "fetch_deadline_ms": 500,
    "heartbeat_s": 0.2,
    "node_timeout_s": 1.0,
}


class Cluster:
    """The processes of one simulation, by name, and the objects that run in them."""

    def __init__(self, world: World, wires: Wires, plan: Plan, folder: Path) -> None:
        self.world = world
        self.wires = wires
        self.plan = plan
        self.network = Network()
        wires.is_cut = lambda one, other: frozenset((one, other)) in self.network.cut
        self.processes: dict[str, Process] = {}
        self.nodes: dict[str, Node] = {}
        self.servers: dict[str, SessionServer] = {}
        self.streams: dict[str, StreamLink] = {}
        self.history: list[Operation] = []
        self.dirty: set[str] = set()
        """Nodes whose index was damaged and not yet mended."""
        self._folder = folder
        self.disks = {f"n{number}": DiskFaults() for number in range(plan.nodes)}
        self.stores = {name: DiskFaults() for name in self.disks}
        FAULTS_OF_STORES.clear()
        FAULTS_OF_STORES.update(self.stores)
        DiskFiles.faults_by_process = dict(self.disks)
        for worker in range(plan.workers):
            DiskFiles.faults_by_process[f"w{worker}"] = self.disks[plan.node_of(worker)]
        self.start_coordinator()
        for name in self.disks:
            (folder / name / "shm").mkdir(parents=True)
            (folder / name / "disk").mkdir()
            self.start_node(name)

    # Processes

    def process(self, name: str) -> Process:
        """Start a process of this name. The former one has ended."""
        self.processes[name] = process = Process(self.world, name)
        return process

    def start_coordinator(self) -> None:
        """Start a coordinator that knows nothing."""
        process = self.process("coordinator")
        self.coordinator = coordinator = Coordinator(SystemClock(), SETTINGS["node_timeout_s"])
        self.lookups_at: str | None = None

        def serve() -> None:
            server = LookupServer(coordinator, PeerIdentity(CLUSTER, "coordinator", SECRET), _listener("10.0.0.1"))
            self.lookups_at = server.address

        if self.plan.streams:
            self.world.spawn(process, "start", serve)

    def start_node(self, name: str) -> None:
        """Start a node, which serves as soon as it has started."""
        process = self.process(name)
        process.on_crash.append(lambda: self._forget(name))
        self.world.spawn(process, "start", lambda: self._serve(name, process))

    def _forget(self, name: str) -> None:
        self.nodes.pop(name, None)
        self.servers.pop(name, None)
        self.dirty.discard(name)

    def _serve(self, name: str, process: Process) -> None:
        """Start the parts of a node as the node actor's constructor does."""
        place = self._folder / name
        settings = {**SETTINGS, **self.plan.settings, "shm_path": str(place / "shm")}
        if settings["disk"]:
            settings["disk_path"] = str(place / "disk")
        if settings["objects_cap"]:
            settings["objects"] = str(place / "objects")
        else:
            del settings["objects_cap"]
        link: Link = SimulatedLink(self, process)
        labels = {}
        if self.plan.streams:
            link = StreamLink(link, PeerIdentity(CLUSTER, name, SECRET), _listener(f"10.0.1.{name[1:]}"))
            labels["peer_address"] = link.address
            self.streams[name] = link
        try:
            node = Node(Config.of(settings), CLUSTER, name, link, labels=labels, at_beat=lambda: self._end_unless_in_place(name))
            if isinstance(link, StreamLink):
                link.serve(node)
            server = SessionServer(f"{node.directory}/sock", node.open_session, node.report_commits)
            write_record(NodeRecord(CLUSTER, CLUSTER, name, node.info(), package="simulated"))
        except (TieredKVError, OSError) as error:  # OSError: its files were removed meanwhile; Ray then starts it again
            self.world.note(f"{name} cannot start: {str(error).replace(str(self._folder), '')}")
            process.crash()
            return
        self.nodes[name], self.servers[name] = node, server
        self.world.note(f"{name} serves {len(node.engine.machine.blocks)} blocks")

    def _end_unless_in_place(self, name: str) -> None:
        """Do as the node actor does: end a node whose files were removed, and start it again with new files."""
        node = self.nodes.get(name)
        if node is not None and not node.is_in_place():
            node.abdicate()
            self.processes[name].crash()

    def directory(self, node: str) -> str:
        """Returns a node's folder in shared memory."""
        return str(self._folder / node / "shm" / f"tkv-{CLUSTER}-{node}")

    def end_node(self, name: str, remove: bool) -> None:
        """End a node in order. Returns when it has ended, and its process with it."""
        node, server, process = self.nodes.get(name), self.servers.get(name), self.processes[name]
        if node is None or server is None or not process.is_alive:
            return
        waiting: list[Any] = []

        def end() -> None:
            server.close()
            if name in self.streams:
                self.streams[name].close()
            node.close(remove=remove)
            self.world.note(f"{name} has ended in order")
            self.world.wake(waiting)
            process.crash()

        del self.nodes[name], self.servers[name]
        process.on_crash.append(lambda: self.world.wake(waiting))
        self.world.spawn(process, "end", end)
        self.world.wait(waiting, 20.0)
        process.crash()

    def machine_of(self, process: str) -> str:
        """Returns the node on whose machine a process runs."""
        return self.plan.node_of(int(process[1:])) if process.startswith("w") else process

    # What can be wrong

    def damaged(self, frames: list[list[bytes]]) -> list[list[bytes]]:
        """Returns the frames of a transfer as they arrive: two swapped, or one with a flipped bit, if the network has such faults now."""
        draw, network = self.world.random, self.network
        if network.misdirected_share and len(frames) > 1 and draw.random() < network.misdirected_share:
            first, second = draw.sample(range(len(frames)), 2)
            frames[first], frames[second] = frames[second], frames[first]
        if network.damaged_share and frames and draw.random() < network.damaged_share:
            pieces = draw.choice(frames)
            at = draw.randrange(len(pieces))
            piece = bytearray(pieces[at])
            if piece:
                piece[draw.randrange(len(piece))] ^= 1 << draw.randrange(8)
                pieces[at] = bytes(piece)
        return frames

    def flip(self, name: str, where: str) -> None:
        """Flip one bit of a node's files."""
        draw = self.world.random
        paths = {
            "disk": lambda: sorted((self._folder / name / "disk").glob("node-*/segment-*")),
            "host": lambda: [Path(self.directory(name)) / "arena"],
            "index": lambda: [Path(self.directory(name)) / "index"],
        }[where]()
        paths = [path for path in paths if path.exists() and path.stat().st_size]
        if not paths:
            return
        path = draw.choice(paths)
        at = draw.randrange(path.stat().st_size)
        if where == "index":
            shown = _shown_slots(path)
            if not shown:
                return
            at = draw.choice(shown) + draw.randrange(words.SLOT_BYTES)
            self.dirty.add(name)
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << draw.randrange(8)]))

    # Invariants

    def check(self) -> None:
        """Check the nodes whose locks are free: machine, tiers, index and extents agree, and the caps hold."""
        with self.world.atomic():
            for name, node in list(self.nodes.items()):
                lock: Any = node.engine.lock
                if lock.owner is not None or not self.processes[name].is_alive or name in self.dirty:
                    continue
                try:
                    node.engine.check() if node.engine.is_busy or node._stopped else node.check()
                except AssertionError as error:
                    message = f"{name}: {type(error).__name__}: {error}"
                    raise SimulationError(f"check of a node: {str(error)[:40]}", message) from error

    def check_directory(self) -> str | None:
        """Returns a text if the coordinator's directory is wrong, None if it lists exactly the blocks of the nodes."""
        with self.world.atomic():
            self.coordinator.check()
            directory = self.coordinator._directory
            for name, node in self.nodes.items():
                keys = list(node.engine.machine.blocks)
                unlisted = [key for key in keys if not any(name in names for names in directory.locate([key], ""))]
                if unlisted or directory.count(name) != len(keys):
                    return f"{name} has {len(keys)} blocks, the directory lists {directory.count(name)} of it and not {len(unlisted)}"
            known = sorted(each["node"] for each in self.coordinator.nodes())
            return None if known == sorted(self.nodes) else f"the coordinator knows {known}"

    def close(self) -> None:
        """Remove the files."""
        with suppress(OSError):
            shutil.rmtree(self._folder)


def _listener(host: str) -> Any:
    """Returns a listening socket of the calling process, at an address of its own machine."""
    place = PeerPlace.of(None)
    assert place is not None
    return place.listen(host)


def _shown_slots(path: Path) -> list[int]:
    """Returns the file offsets of those slots of an index that have a block.

    A flipped bit in an empty slot would only make look-ups slower.
    """
    data = path.read_bytes()
    starts = range(words.HEADER_BYTES, words.ticks_offset(words.SLOTS_MIN), words.SLOT_BYTES)
    return [start for start in starts if words.FIELDS.unpack_from(data, start + words.KEY_OFFSET)[1] & 0xFF]


class ErrorLog(logging.Handler):
    """Makes an error that a background thread of tiered_kv logs a failure of the simulation."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        if self._world.over:
            return
        cause = record.exc_info[1] if record.exc_info else None
        message = f"logged as an error: {record.getMessage()}: {cause!r}"
        failure = SimulationError(f"logged: {record.msg}: {type(cause).__name__}", message)
        failure.__cause__ = cause
        self._world.fail(failure)
