"""The scheduler's side offers only what is worth loading, by the measurements that the workers report."""

# ruff: noqa: F401, F811 - fixtures are imported by name

from tests.vllm.test_sides import T, client, has, make, request, worker
from tiered_kv.client.page_client import Estimates
from tiered_kv.client.prefill_cost import PrefillCost
from tiered_kv.integrations.vllm.messages import Step, WorkerReport

ESTIMATES = Estimates(PrefillCost(1e-3), {"disk": (0.01, 1e-9)})


def test_only_what_is_worth_loading_is_offered(make, client):
    side, asked = make(recompute_tokens_per_s=500), request()
    has(client, side, asked, ["host", "disk", "disk"])
    client.worth = 1
    assert side.matched(asked, 0) == (T, False)  # what is left is loaded within the step
    assert client.asked_worth == [(["host", "disk", "disk"], 0, 500.0)]
    side.allocated(asked, [7, 8, 9, 10], T)
    assert side.tiers_of(asked) == {"host": 1}
    assert client.declines == ["disk", "disk"]
    assert side.counts()["declined_blocks"] == 2


def test_nothing_worth_loading_is_a_miss(make, client):
    side, asked = make(), request()
    has(client, side, asked, ["disk"] * 3)
    client.worth = 0
    assert side.matched(asked, 0) == (0, False)
    side.allocated(asked, [7, 8, 9, 10], 0)
    assert client.declines == ["disk"] * 3


def test_a_worker_reports_its_measurements_once(worker, client):
    assert worker.report() is None
    client.measured = ESTIMATES
    assert worker.report() == WorkerReport(0, [], ESTIMATES)
    assert worker.report() is None
    worker.store(Step(1))


def test_the_scheduler_uses_what_the_workers_measured(make, client):
    side = make()
    side.learned(set(), WorkerReport(0, []).aggregate(WorkerReport(0, [], ESTIMATES)))
    assert client.measured == ESTIMATES
    side.learned(set(), WorkerReport(0, []))
    assert client.measured == ESTIMATES
