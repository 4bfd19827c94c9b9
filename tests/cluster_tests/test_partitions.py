"""The network between two machines is cut and healed while workers on both go on. Needs root: see `tests.faults.machines`."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import history
from tests.faults.history import Operation
from tests.faults.machines import Machines, why_not
from tests.faults.ray_machines import RayMachines
from tests.faults.workers import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

WHOLE_WITHIN_S = 30.0
"""The bar. `status` gets twice as long, because it starts a process and joins Ray first."""
LATE_MS = 500.0
"""Of a bar of 50 ms, which `benchmarks/faults.py` measures, on a machine that is busy."""
CUT_S = 5.0
IN_FLIGHT_S = 1.0
DEAD_WITHIN_S = 60.0
HEALTH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_timeout_ms": 3000}
"""With its threshold of 5, Ray gives a machine up after 15 to 20 s; with its defaults after about 65 s."""


@pytest.fixture(scope="module")
def ray() -> Iterator[RayMachines]:
    """A cluster of two cache nodes, each on a machine of its own with a worker."""
    with (
        tempfile.TemporaryDirectory(prefix="tkv-p-") as scratch,
        tempfile.TemporaryDirectory(prefix="tkv-m-") as own,
        Machines(2, Path(own)) as machines,
    ):
        ray = RayMachines(machines, Path(scratch), Path(own), "parted", **HEALTH)
        ray.up("--host", "24MiB")
        for number in (0, 1):
            ray.start_worker(number, f"worker-{number}", "--number", str(number), "--pause-ms", "25")
        yield ray


def of(worker: int, operations: list[Operation]) -> list[Operation]:
    return [each for each in operations if each.worker == f"worker-{worker}"]


def assert_whole(ray: RayMachines, healed_ns: int) -> None:
    """Both workers hit blocks of the other machine within 30 s of the heal, and `status` finds nothing wrong."""
    for worker in (0, 1):
        wait_until(
            lambda: history.hits(of(worker, ray.workers.history(healed_ns)))["peer"],  # noqa: B023 - called at once
            WHOLE_WITHIN_S - (time.monotonic_ns() - healed_ns) / 1e9,
            f"worker {worker} hits blocks of the other machine",
        )
    print(f"hits across the link {(time.monotonic_ns() - healed_ns) / 1e9:.1f} s after the heal")
    while texts := ray.degraded():
        print(f"{(time.monotonic_ns() - healed_ns) / 1e9:.1f} s after the heal: {texts}")
        assert time.monotonic_ns() < healed_ns + 2 * WHOLE_WITHIN_S * 1e9, texts
        time.sleep(0.5)
    print(f"status ok {(time.monotonic_ns() - healed_ns) / 1e9:.1f} s after the heal")


def assert_right(ray: RayMachines, since_ns: int) -> None:
    assert history.faults_of(ray.workers.history()) == []
    operations = ray.workers.history(since_ns)
    print(f"longest fetch: {history.longest_overrun_ms(operations):.1f} ms beyond its deadline, of {len(operations)} operations")
    assert history.longest_overrun_ms(operations) < LATE_MS


def test_a_cut_that_is_healed_before_ray_gives_the_machine_up_costs_misses_only(ray: RayMachines) -> None:
    begun_ns = time.monotonic_ns()
    wait_until(lambda: history.hits(ray.workers.history(begun_ns))["peer"], WHOLE_WITHIN_S, "blocks cross the link")
    ray.machines.cut(1)
    time.sleep(IN_FLIGHT_S)
    cut_ns = time.monotonic_ns()
    time.sleep(CUT_S)
    meanwhile = ray.workers.history(cut_ns)
    ray.machines.heal(1)
    assert_whole(ray, time.monotonic_ns())
    for worker in (0, 1):
        tiers = history.hits(of(worker, meanwhile))
        assert tiers["host"] > 0, "what is on the same machine is hit during the cut"
        assert tiers["peer"] == 0, "nothing crosses a link that is cut"
        assert not any(each.refused for each in of(worker, meanwhile)), "stores do not need the other machine"
    assert_right(ray, begun_ns)


@pytest.mark.skipif("TIERED_KV_LONG_TESTS" not in os.environ, reason="takes a minute; make hostile runs it")
def test_after_a_cut_in_which_ray_gave_the_machine_up_its_worker_still_hits_what_is_in_memory(ray: RayMachines) -> None:
    """Its raylet ends itself after the heal, and with it the cache node. A Ray that is started there again gets its node back."""
    begun_ns = time.monotonic_ns()
    wait_until(lambda: history.hits(ray.workers.history(begun_ns))["peer"], WHOLE_WITHIN_S, "blocks cross the link")
    ray.machines.cut(1)
    cut_s = time.monotonic()
    wait_until(lambda: any("node-1" in text for text in ray.degraded()), DEAD_WITHIN_S, "status names the lost node")
    print(f"status names node-1 {time.monotonic() - cut_s:.1f} s after the cut")
    wait_until(lambda: ray.is_dead(1), DEAD_WITHIN_S, "Ray gives the machine up")
    print(f"Ray gives the machine up {time.monotonic() - cut_s:.1f} s after the cut")
    ray.machines.heal(1)
    healed_s = time.monotonic()
    wait_until(lambda: not ray.pids(1, "ray::NodeActor"), DEAD_WITHIN_S, "the node of the machine that Ray gave up ends")
    print(f"node-1 ended {time.monotonic() - healed_s:.1f} s after the heal")
    alone_ns = time.monotonic_ns()
    time.sleep(IN_FLIGHT_S)
    alone = of(1, ray.workers.history(alone_ns))
    assert history.hits(alone)["host"] > 0, "files in shared memory outlive their node"
    assert any(each.refused for each in alone), "new blocks are refused"
    assert_right(ray, begun_ns)
    ray.start_ray(1)
    assert_whole(ray, time.monotonic_ns())
    assert_right(ray, begun_ns)
