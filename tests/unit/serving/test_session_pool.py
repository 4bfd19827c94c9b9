"""The pool of a client's sessions: what it does with the time of a call."""

from types import SimpleNamespace

import pytest

from tiered_kv.client.session_pool import SessionPool
from tiered_kv.clock import ManualClock
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol.session import Life

LIFE = Life(identity=7, generation=1)


def pool_of(clock: ManualClock, connecting_s: float) -> SessionPool:
    """Returns a pool whose node needs this long to answer a connection."""

    def connect(wait_s: float) -> SimpleNamespace:
        clock.advance(connecting_s)
        return SimpleNamespace(life=LIFE, allow=lambda wait_s: None, close=lambda: None)

    view = SimpleNamespace(identity=LIFE.identity, generation=LIFE.generation, heartbeat_ns=0, directory="made up")
    return SessionPool(connect, view, clock)


def test_a_call_whose_time_went_into_connecting_is_not_made_but_the_next_one_has_a_session() -> None:
    clock = ManualClock()
    pool = pool_of(clock, connecting_s=0.045)
    with pytest.raises(TieredKVError, match="took all of the call's") as raised, pool.session(0.02):
        pytest.fail("it would end too late")
    assert raised.value.kind is Kind.TRANSPORT
    with pool.session(0.02) as session:
        assert session.life == LIFE
    assert clock.now_s() == pytest.approx(0.045)


def test_a_call_is_made_after_a_connection_in_time() -> None:
    clock = ManualClock()
    with pool_of(clock, connecting_s=0.015).session(0.02) as session:
        assert session.life == LIFE
