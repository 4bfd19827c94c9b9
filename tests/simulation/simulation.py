"""Runs one simulation: starts the cluster of a plan, causes faults, ends them, and checks that the cluster recovers."""

import gc
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.history.history import wrong_blocks
from tests.simulation.carriers import Carriers, carriers
from tests.simulation.cluster import Cluster, ErrorLog
from tests.simulation.faults import Faults
from tests.simulation.page_workers import PageWorker
from tests.simulation.patching import simulated
from tests.simulation.plan import Plan, Step
from tests.simulation.scheduler import SimulationError, World
from tests.simulation.sockets import Wires
from tests.simulation.workers import Worker

SHM = "/dev/shm"
DONE_WITHIN_S = 120.0
WHOLE_WITHIN_S = 15.0
LOOK_EVERY_S = 0.3
HITS_WITHIN_S = 10.0
AGAIN_BLOCKS = 2
AGAIN = [
    Step("", "store", 0.0, {"document": 0, "blocks": AGAIN_BLOCKS}),
    Step("", "fetch", 0.0, {"document": 0, "blocks": AGAIN_BLOCKS, "ms": 1000}),
]


COLLECT_EVERY = 8
"""Simulations after which the garbage is collected, which takes longer than a small simulation."""


class _Garbage:
    count = 0


@dataclass(frozen=True)
class Outcome:
    """The result of a simulation. `digest`: the hash of its history. `failure`: None if all invariants held."""

    plan: Plan
    digest: str
    log: list[str]
    steps: int
    seconds: float
    failure: BaseException | None

    @property
    def kind(self) -> str | None:
        """The kind of failure, as a text that is the same for the same cause; None without a failure."""
        if self.failure is None:
            return None
        return self.failure.kind if isinstance(self.failure, SimulationError) else repr(self.failure)


def simulate(plan: Plan, on: Carriers | None = None) -> Outcome:
    """Run a plan, `on` greenlets or threads. Returns its outcome, which the plan alone decides."""
    world = World(plan.seed, plan.switch_share, plan.step_s, on or carriers())
    wires = Wires(world)
    folder = Path(tempfile.mkdtemp(prefix="sim-tkv-", dir=SHM))
    errors, log = ErrorLog(world), logging.getLogger("tiered_kv")
    former = log.level, log.propagate
    log.setLevel(logging.ERROR)
    log.propagate = False
    log.addHandler(errors)
    collects = gc.isenabled()
    gc.disable()  # a collection in the middle would run finalizers at a moment that depends on what ran before
    failure: BaseException | None = None
    try:
        with simulated(world, wires, fences=plan.fences):
            try:
                world.run(lambda: Director(world, wires, plan, folder).direct())
            except Exception as error:  # noqa: BLE001 - whatever the simulated system raised
                failure = error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        log.removeHandler(errors)
        log.setLevel(former[0])
        log.propagate = former[1]
        _Garbage.count += 1
        if _Garbage.count % COLLECT_EVERY == 0:
            gc.collect()
        if collects:
            gc.enable()
    return Outcome(plan, world.digest(), world.log, world.steps, world.now_s - 1000, failure)


class Director:
    """The first task of a simulation: starts everything, does what the plan says, and judges at the end."""

    def __init__(self, world: World, wires: Wires, plan: Plan, folder: Path) -> None:
        self._world = world
        self._plan = plan
        self._cluster = Cluster(world, wires, plan, folder)
        self._faults = Faults(self._cluster)

    def direct(self) -> None:
        """Run the whole simulation. Raises the first broken invariant."""
        world, plan = self._world, self._plan
        by_worker = {
            f"w{number}": [step for step in plan.steps if step.who == f"w{number}" and step.what not in Faults.NAMES]
            for number in range(plan.workers)
        }
        workers = [
            (PageWorker if number in plan.engines else Worker)(self._cluster, number, by_worker[f"w{number}"])
            for number in range(plan.workers)
        ]
        begun_s = world.now_s
        for step in (step for step in plan.steps if step.what in Faults.NAMES):
            if step.at_s > world.now_s - begun_s:
                world.sleep(begun_s + step.at_s - world.now_s)
            self._faults.cause(step)
        while not all(worker.is_done for worker in workers):
            world.sleep(LOOK_EVERY_S)
            if not self._faults.pending:
                self._faults.heal()
            if world.now_s - begun_s > DONE_WITHIN_S:
                stuck = [worker.name for worker in workers if not worker.is_done]
                raise SimulationError("workers never end", f"{stuck} have not ended after {DONE_WITHIN_S} s")
        self._faults.heal()
        self._become_whole()
        self._serve_again(workers)
        self._cluster.check()
        for wrong in wrong_blocks(self._cluster.history):
            raise SimulationError("a fetch that no store explains", str(wrong))

    def _become_whole(self) -> None:
        """Wait until the directory lists exactly the blocks of the nodes."""
        world, cluster = self._world, self._cluster
        until_s = world.now_s + WHOLE_WITHIN_S
        while True:
            world.sleep(LOOK_EVERY_S)
            self._faults.heal()
            if len(cluster.nodes) == self._plan.nodes:
                wrong = cluster.check_directory()
                busy = [name for name, node in cluster.nodes.items() if node.engine.is_busy or node.engine.journal]
                if wrong is None and not busy:
                    return
            else:
                wrong, busy = f"only {sorted(cluster.nodes)} run", []
            if world.now_s > until_s:
                raise SimulationError("the cluster does not become whole", f"after {WHOLE_WITHIN_S} s: {wrong}; busy: {busy}")

    def _serve_again(self, workers: list[Worker]) -> None:
        """Make each worker that has not crashed store and fetch, to check that it can use its node again."""
        world = self._world
        for worker in workers:
            until_s = world.now_s + HITS_WITHIN_S
            worker.hit_blocks = 0
            while worker.is_alive and worker.hit_blocks < AGAIN_BLOCKS:
                if world.now_s > until_s:
                    raise SimulationError("a worker does not hit again", f"{worker.name}: {world.log[-2:]}")
                worker.again(AGAIN)
                while not worker.is_done:
                    world.sleep(0.1)
