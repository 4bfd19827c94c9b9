"""Causes the faults of a simulation when its plan says so, and ends them at the end."""

import shutil
from collections.abc import Callable
from typing import Any

from tests.simulation.cluster import Cluster
from tests.simulation.files import DiskFaults
from tests.simulation.link import Network
from tests.simulation.plan import FAULTS, Step
from tests.simulation.sockets import DELAY_S_MAX

PACK_S_MAX = 1.5
"""For how long a worker is interrupted at most while its node crashes and starts again."""


class Faults:
    """Causes the faults of a plan, and ends those that last for a while."""

    NAMES = frozenset(FAULTS)

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._world = cluster.world
        self._mending: set[str] = set()
        self.pending = 0
        """Faults that will still end, or crashes that will still happen."""

    def cause(self, step: Step) -> None:
        """Cause one fault."""
        self._world.note(f"fault: {step}")
        getattr(self, "_" + step.what.replace(" ", "_"))(step.who, **step.arguments)

    def _later(self, seconds: float, call: Callable[[], Any]) -> None:
        """Call a function, which must not wait, after some time."""
        self.pending += 1

        def end() -> None:
            self.pending -= 1
            call()

        self._world.after(seconds, end)

    # Processes

    def _crash(self, who: str, steps: int, again_s: float) -> None:
        process = self._cluster.processes[who]
        if process.is_alive:
            process.crash_at_step = process.steps + steps
            process.on_crash.append(lambda: self._later(again_s, lambda: self._start(who)))

    def _crash_while_packing(self, who: str, again_s: float) -> None:
        """Crash a node when a worker on its machine next copies blocks into memory reserved for it."""

        def crash(worker: str) -> None:
            if self._cluster.machine_of(worker) == who:
                self._world.reached.clear()
                self._crash(who, 0, again_s)
                self._cluster.processes[who].crash()
                pause_s = self._world.random.random() * PACK_S_MAX
                self._cluster.processes[worker].interrupted_s += pause_s
                self._world.sleep(pause_s)

        self._world.reached.update(pack=crash, gather=crash)

    def _remove_files(self, who: str, again_s: float) -> None:
        """Remove a node's directory in shared memory. The node then ends by itself, and is started again."""
        process = self._cluster.processes[who]
        shutil.rmtree(self._cluster.directory(who), ignore_errors=True)
        process.on_crash.append(lambda: self._later(again_s, lambda: self._start(who)))

    def _bad_objects(self, who: str, errors: float, pause_s: float, for_s: float) -> None:
        self._for_a_while(self._cluster.stores[who], for_s, error_share=errors, slow_s_max=pause_s)

    def _start(self, who: str) -> None:
        if not self._cluster.processes[who].is_alive:
            self._cluster.start_node(who)

    def _restart(self, who: str, remove: bool) -> None:
        self._cluster.end_node(who, remove)
        self._start(who)

    def _stop(self, who: str, for_s: float) -> None:
        process = self._cluster.processes[who]
        process.stop()
        self._later(for_s, process.go_on)

    def _slow(self, who: str, pause_s: float, for_s: float) -> None:
        process = self._cluster.processes[who]
        process.pause_share, process.pause_s_max = 0.05, pause_s
        self._later(for_s, lambda: setattr(process, "pause_share", 0.0))

    def _crash_worker(self, who: str, steps: int) -> None:
        process = self._cluster.processes[who]
        process.crash_at_step = process.steps + steps

    def _crash_coordinator(self, who: str, steps: int, again_s: float) -> None:
        process = self._cluster.processes[who]
        if process.is_alive:
            process.crash_at_step = process.steps + steps
            process.on_crash.append(lambda: self._later(again_s, self._start_coordinator))

    def _start_coordinator(self) -> None:
        if not self._cluster.processes["coordinator"].is_alive:
            self._cluster.start_coordinator()

    def _stop_coordinator(self, who: str, for_s: float) -> None:
        self._stop(who, for_s)

    # Network

    def _cut(self, who: str, from_: str, for_s: float) -> None:
        pair = frozenset((who, from_))
        self._cluster.network.cut.add(pair)
        self._later(for_s, lambda: self._cluster.network.cut.discard(pair))

    def _bad_network(self, who: str, lost: float, twice: float, delay_s: float, for_s: float) -> None:
        self._for_a_while(self._cluster.network, for_s, lost_share=lost, twice_share=twice, delay_s_max=delay_s)

    def _bad_frames(self, who: str, damaged: float, misdirected: float, for_s: float) -> None:
        self._for_a_while(self._cluster.network, for_s, damaged_share=damaged, misdirected_share=misdirected)
        self._for_a_while(self._cluster.wires, for_s, flip_share=damaged)

    def _bad_sockets(self, who: str, breaks: float, delay_s: float, for_s: float) -> None:
        self._for_a_while(self._cluster.wires, for_s, break_share=breaks, delay_s_max=delay_s, piece_share=0.2)

    def _for_a_while(self, thing: Any, for_s: float, **values: Any) -> None:
        usual = {name: vars(NORMAL[type(thing).__name__]).get(name, 0.0) for name in values}
        vars(thing).update(values)
        self._later(for_s, lambda: vars(thing).update(usual))

    # Disk

    def _full_disk(self, who: str, for_s: float) -> None:
        self._for_a_while(self._cluster.disks[who], for_s, full=True)

    def _bad_disk(self, who: str, errors: float, flips: float, misdirected: float, for_s: float) -> None:
        self._for_a_while(self._cluster.disks[who], for_s, error_share=errors, flip_share=flips, misdirected_share=misdirected)

    def _slow_disk(self, who: str, pause_s: float, for_s: float) -> None:
        self._for_a_while(self._cluster.disks[who], for_s, slow_s_max=pause_s)

    def _hung_disk(self, who: str, for_s: float) -> None:
        self._for_a_while(self._cluster.disks[who], for_s, hangs=True)

    def _torn_write(self, who: str, again_s: float) -> None:
        process = self._cluster.processes[who]
        self._cluster.disks[who].torn_crash = True
        if process.is_alive:
            process.on_crash.append(lambda: self._later(again_s, lambda: self._start(who)))

    def _flip(self, who: str, where: str) -> None:
        self._cluster.flip(who, where)

    def _wall_clock(self, who: str, jump_s: float) -> None:
        self._world.wall_offset_s += jump_s

    # The end

    def heal(self) -> None:
        """End all faults, and start what has crashed. Workers that crashed stay away."""
        cluster = self._cluster
        vars(cluster.network).update(vars(Network()))
        for disk in [*cluster.disks.values(), *cluster.stores.values()]:
            vars(disk).update(vars(DiskFaults()))
        vars(cluster.wires).update(vars(_Wires()))
        for process in cluster.processes.values():
            process.crash_at_step = None
            process.pause_share = 0.0
            if process.is_alive and process.is_stopped:
                process.go_on()
        self._start_coordinator()
        for name in cluster.disks:
            self._start(name)
        self._mend()

    def _mend(self) -> None:
        """Repair damaged indexes, as each node's scrubber (the thread that checks them) would later."""
        for name in sorted(self._cluster.dirty & self._cluster.nodes.keys() - self._mending):
            self._mending.add(name)
            self._world.spawn(self._cluster.processes[name], "scrub", lambda name=name: self._scrub(name))

    def _scrub(self, name: str) -> None:
        try:
            self._cluster.nodes[name].seals.scrub()
            self._cluster.dirty.discard(name)
        finally:
            self._mending.discard(name)


class _Wires:
    def __init__(self) -> None:
        self.delay_s_max = DELAY_S_MAX
        self.break_share = self.piece_share = self.flip_share = 0.0


NORMAL: dict[str, Any] = {"Network": Network(), "DiskFaults": DiskFaults(), "Wires": _Wires()}
