"""The link through Ray where Ray hangs: nobody waits longer than asked, and what hangs is not piled upon. Ray is a stand-in here."""

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from tiered_kv.actors import link
from tiered_kv.actors.link import LOCATES_AT_ONCE, RayLink
from tiered_kv.coordinator.coordinator import Report
from tiered_kv.errors import Kind, TieredKVError

PATIENCE_S = 30.0
IN_TIME_S = 2.0
KEYS = [b"k" * 32]
REPORT = Report("n0", 0, [], [], {}, {})


class Call(threading.Event):
    """A call that was sent to an actor: set once it is answered."""

    answer: object = None

    def reply(self, answer: object) -> None:
        self.answer = answer
        self.set()


METHODS = ("report", "locate", "serve", "holders", "recall")


class Ray:
    """Actors whose methods answer when the test says so; `gcs` is clear while the control store hangs."""

    def __init__(self) -> None:
        self.gcs = threading.Event()
        self.gcs.set()
        self.asked: list[str] = []
        self.calls: list[Call] = []

    def get_actor(self, name: str, namespace: str) -> object:
        self.asked.append(name)
        assert self.gcs.wait(PATIENCE_S)
        return SimpleNamespace(**{method: SimpleNamespace(remote=self._send) for method in METHODS})

    def _send(self, *_: object) -> Call:
        self.calls.append(Call())
        return self.calls[-1]

    def get(self, call: Call, timeout: float) -> object:
        if not call.wait(timeout):
            raise link.GetTimeoutError("too late")
        return call.answer

    def wait(self, calls: list[Call], timeout: float, fetch_local: bool = True) -> tuple[list[Call], list[Call]]:
        calls[0].wait(timeout)
        return [call for call in calls if call.is_set()], [call for call in calls if not call.is_set()]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ray]:
    stand_in = Ray()
    monkeypatch.setattr(link, "ray", stand_in)
    monkeypatch.setattr(link, "CONTROL_WAIT_S", 0.1)
    yield stand_in
    stand_in.gcs.set()
    for call in stand_in.calls:
        call.set()


def refused(call: Callable, *arguments: object) -> tuple[TieredKVError, float]:
    """How a call that must fail does, and how long it takes."""
    begun_s = time.monotonic()
    with pytest.raises(TieredKVError) as caught:
        call(*arguments)
    assert caught.value.kind is Kind.TRANSPORT
    return caught.value, time.monotonic() - begun_s


def test_a_question_waits_no_longer_than_it_may(ray: Ray) -> None:
    reached = RayLink("c", "n0")
    _, took_s = refused(reached.locate, KEYS, 0.02)
    assert took_s < IN_TIME_S
    _, took_s = refused(reached.locate, KEYS, 1000.0)
    assert took_s < IN_TIME_S, "and never longer than the link's own bound"


def test_questions_of_explain_wait_no_longer_than_they_may(ray: Ray) -> None:
    reached = RayLink("c", "n0")
    _, took_s = refused(reached.holders, KEYS, 0.02)
    assert took_s < IN_TIME_S
    for control_store_answers in (True, False):
        if not control_store_answers:
            ray.gcs.clear()
        begun_s = time.monotonic()
        assert reached.recall(["n1", "n2"], KEYS, 0.05) == {}, "peers that do not answer are left out"
        assert time.monotonic() - begun_s < IN_TIME_S


def test_an_answer_that_comes_in_time_is_had(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "CONTROL_WAIT_S", PATIENCE_S)
    monkeypatch.setattr(ray, "get", lambda call, timeout: [["n1"]])
    assert RayLink("c", "n0").locate(KEYS, PATIENCE_S) == [["n1"]]


def test_while_the_control_store_hangs_no_more_calls_are_piled_up_than_there_are_threads(ray: Ray) -> None:
    reached = RayLink("c", "n0")
    ray.gcs.clear()
    for _ in range(3 * LOCATES_AT_ONCE):
        _, took_s = refused(reached.locate, KEYS, 0.01)
        assert took_s < IN_TIME_S
    for _ in range(3):
        refused(reached.report, REPORT)
    assert len(ray.asked) <= LOCATES_AT_ONCE + 1


def test_a_coordinator_that_hangs_has_one_report_in_its_queue(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = RayLink("c", "n0")
    for _ in range(3):
        refused(reached.report, REPORT)
    assert len(ray.calls) == 1
    ray.calls[0].reply("the answer that nobody waits for any more")
    monkeypatch.setattr(link, "CONTROL_WAIT_S", PATIENCE_S)
    answered = threading.Thread(target=lambda: outcome.append(reached.report(REPORT)))
    outcome: list = []
    answered.start()
    deadline_s = time.monotonic() + PATIENCE_S
    while not outcome and time.monotonic() < deadline_s:
        for call in ray.calls[1:]:  # of the last refused report too, if its thread still waited when the answer came
            call.reply("the answer")
        time.sleep(0.01)  # polls for the next report, orders nothing
    answered.join(PATIENCE_S)
    assert outcome == ["the answer"], "once that is answered the next report is sent"


def test_a_peer_is_asked_without_waiting_and_its_silence_is_told(ray: Ray) -> None:
    reached = RayLink("c", "n0")
    ray.gcs.clear()
    begun_s = time.monotonic()
    transfer = reached.request("n1", KEYS)
    transfer.prefetch()
    assert time.monotonic() - begun_s < IN_TIME_S
    error, took_s = refused(transfer.frames, 0.06)
    assert took_s < IN_TIME_S
    assert error.context["hung"]
    ray.gcs.set()
    error, _ = refused(reached.request("n1", KEYS).frames, 0.06)
    assert error.context["hung"], "the peer has the call and does not answer it"
    error, _ = refused(reached.request("n1", KEYS).frames, 0.001)
    assert not error.context["hung"], "so short a wait says nothing"


def test_frames_have_one_deadline_for_the_answer_and_the_object(ray: Ray) -> None:
    transfer = RayLink("c", "n0").request("n1", KEYS)
    transfer._sent.result(PATIENCE_S)
    frames = Call()
    ray.calls[0].reply([frames])
    transfer.prefetch()
    error, took_s = refused(transfer.frames, 0.06)
    assert took_s < IN_TIME_S
    assert not error.context["hung"], "it has answered; its blocks are under way"
    frames.reply([[b"frame"]])
    assert transfer.frames(PATIENCE_S) == [[b"frame"]]
