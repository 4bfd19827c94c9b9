"""What every way to a node must do for a worker. Subclass in a test module and say how a session is opened."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict, replace
from hashlib import blake2b

import numpy as np
import pytest

from tiered_kv.blocks import Tier
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import Namespace
from tiered_kv.layout import KVLayout, OpaqueLayout
from tiered_kv.node.node import Node
from tiered_kv.protocol.messages import BlockRun
from tiered_kv.protocol.model_info import ModelInfo
from tiered_kv.protocol.probes import Probe
from tiered_kv.protocol.session import Session

NBYTES = 64 << 10
PATIENCE_S = 30.0


def key_of(number: int) -> bytes:
    return blake2b(str(number).encode(), digest_size=32).digest()


ROOT = key_of(-1)
OPAQUE = {"block_bytes": 4096, "block_tokens": 16, "description": "pages of a test", "item_bytes": 2}


def keys_of(count: int, first: int = 0) -> list[bytes]:
    """The keys of a chain of blocks."""
    return [key_of(first + at) for at in range(count)]


def wait_until(node: Node, condition: Callable[[], bool]) -> None:
    """Wait until the engine's state is as it should be; whatever changes it wakes the waiting."""
    with node.engine.lock:
        assert node.engine.freed.wait_for(condition, PATIENCE_S)


class TransportContract:
    """A suite; the node has a host tier of 1 MiB and no disk."""

    @abstractmethod
    def open(self, node: Node) -> Session:
        """A session of its own for one worker."""

    @pytest.fixture
    def node(self, node_factory) -> Node:
        return node_factory(host="1MiB", store_wait_ms=0)

    @pytest.fixture
    def session(self, node: Node, checked) -> Session:
        return checked(self.open(node))

    def chain(self, offsets: list[int], first: int = 0) -> list[tuple[bytes, bytes | None, int, int]]:
        places = enumerate(offsets, first)
        return [(key_of(at), key_of(at - 1) if at else None, offset, at) for at, offset in places]

    def store(self, session: Session, count: int, first: int = 0) -> list[bool]:
        return session.commit(ROOT, NBYTES, self.chain(session.reserve(NBYTES, keys_of(count, first), None), first))

    def test_reserved_extents_do_not_overlap(self, node, session) -> None:
        offsets = session.reserve(NBYTES, keys_of(8), None)
        assert len(offsets) == 8
        assert all(after - before >= NBYTES for before, after in zip(sorted(offsets), sorted(offsets)[1:], strict=False))
        assert node.stats()["reserved_bytes"] == 8 * NBYTES

    def test_a_probe_that_agrees_is_the_first_variant(self, session) -> None:
        rows = [1.0, 1.0, 2.0, 2.0]
        first, other = (Probe(np.array(rows, "<f4").tobytes(), 2, 1e-3, 1e-3) for rows in (rows, rows[::-1]))
        assert session.probe(ROOT, list(first)) == session.probe(ROOT, list(first)) == ""
        assert session.probe(ROOT, list(other)) != ""

    def test_nothing_is_visible_before_its_commit(self, node, session) -> None:
        offsets = session.reserve(NBYTES, keys_of(2), None)
        assert not dict(node.storage.index.items())
        assert session.commit(ROOT, NBYTES, self.chain(offsets)) == [True, True]
        shown = dict(node.storage.index.items())
        assert {key: location.offset for key, location in shown.items()} == {key_of(0): offsets[0], key_of(1): offsets[1]}
        assert all(location.tier is Tier.HOST for location in shown.values())

    def test_a_block_that_was_there_is_not_new_and_its_extent_is_free_again(self, node, session) -> None:
        assert self.store(session, 2) == [True, True]
        used = node.stats()["tiers"]["host"]["used_bytes"]
        assert self.store(session, 3) == [False, False, True]
        assert node.stats()["tiers"]["host"]["used_bytes"] == used * 3 // 2
        assert node.stats()["reserved_bytes"] == 0

    def test_released_extents_are_free(self, node, session) -> None:
        session.release(session.reserve(NBYTES, keys_of(4), None))
        assert node.stats()["tiers"]["host"]["used_bytes"] == node.stats()["reserved_bytes"] == 0

    def test_fewer_extents_than_asked_is_back_pressure_and_none_a_refusal(self, session) -> None:
        first = session.reserve(NBYTES, keys_of(100), None)
        assert 8 < len(first) < 16
        assert session.reserve(NBYTES, keys_of(1), None) == []

    def test_a_block_larger_than_the_tier_is_refused_and_drives_nobody_out(self, node, session) -> None:
        self.store(session, 4)
        assert session.reserve(1 << 20, keys_of(1), None) == []
        assert node.stats()["blocks"] == 4

    def test_old_blocks_make_room_for_new_ones(self, node, session) -> None:
        for first in range(0, 60, 4):
            assert self.store(session, 4, first) == [True] * 4
        assert 8 < node.stats()["blocks"] < 16

    @pytest.mark.parametrize(("nbytes", "keys"), [(0, []), (-1, []), (NBYTES, 1), ("many", []), (NBYTES, ["key"]), (NBYTES, [b"short"])])
    def test_what_is_no_size_or_no_key_is_refused(self, session, nbytes, keys) -> None:
        with pytest.raises(TieredKVError) as refusal:
            session.reserve(nbytes, keys, None)
        assert refusal.value.kind is Kind.LAYOUT

    def test_only_what_a_session_has_reserved_can_it_commit_or_release(self, node, session, checked) -> None:
        other = checked(self.open(node))
        (theirs,), (ours,) = other.reserve(NBYTES, keys_of(1), None), session.reserve(NBYTES, keys_of(1), None)
        for wrong in ([theirs], [ours, ours], [ours + 512], [-1]):
            with pytest.raises(TieredKVError):
                session.commit(ROOT, NBYTES, self.chain(wrong))
            with pytest.raises(TieredKVError):
                session.release(wrong)
        with pytest.raises(TieredKVError):
            session.commit(ROOT, 2 * NBYTES, self.chain([ours]))  # its neighbour's bytes as well
        assert session.commit(ROOT, NBYTES, self.chain([ours])) == [True]
        assert node.stats()["blocks"] == 1

    @pytest.mark.parametrize("bad", [b"short", b"x" * 33, "text", 7, None])
    def test_what_is_no_key_is_refused_and_the_extent_stays_reserved(self, node, session, bad) -> None:
        (offset,) = session.reserve(NBYTES, keys_of(1), None)
        for root, key, parent in [(ROOT, bad, None), (bad, key_of(1), None), (ROOT, key_of(1), bad or b"")]:
            with pytest.raises(TieredKVError):
                session.commit(root, NBYTES, [(key, parent, offset, 0)])
        with pytest.raises(TieredKVError):
            session.commit(ROOT, NBYTES, [(key_of(1), key_of(1), offset, 0)])
        for depth in (-1, 1 << 32, "0", None, True):
            with pytest.raises(TieredKVError):
                session.commit(ROOT, NBYTES, [(key_of(1), None, offset, depth)])
        assert node.stats()["reserved_bytes"] == NBYTES
        session.release([offset])

    def test_a_block_twice_in_one_commit_is_one_block(self, node, session) -> None:
        a, b = session.reserve(NBYTES, keys_of(2), None)
        session.commit(ROOT, NBYTES, [(key_of(1), None, a, 0), (key_of(1), None, b, 0)])
        assert node.stats()["blocks"] == 1

    def test_a_model_is_introduced_by_facts_that_can_be(self, node, session) -> None:
        facts = ModelInfo(KVLayout(2, 2, 16, "bfloat16", 16), "some weights", b"", True)
        told = session.introduce(ROOT, facts.as_message())
        assert told == {"plan": {"host": {"codec": "raw", "why": "quality exact"}}, "calibration": None}
        assert list(node.stats()["codecs"]["plans"]) == [ROOT.hex()[:12]]
        good = facts.as_message()
        for bad in (
            None,
            {},
            good | {"weights": 7},
            good | {"rope": "none"},
            good | {"layout": {}},
            good | {"layout": None},
            good | {"layout": good["layout"] | {"description": "of both kinds"}},
            good | {"layout": OPAQUE | {"block_bytes": 4095}},
            good | {"layout": OPAQUE | {"item_bytes": True}},
            good | {"layout": OPAQUE | {"description": "two\nlines"}},
            good | {"layout": {"block_bytes": 4096, "block_tokens": 16}},
            good | {"more": 1},
            good | {"weights": "w" * (1 << 20)},
        ):
            with pytest.raises(TieredKVError):
                session.introduce(ROOT, bad)

    def test_a_model_of_an_opaque_layout_is_introduced(self, node, session) -> None:
        facts = ModelInfo(OpaqueLayout(**OPAQUE), "some weights", None, True)
        assert facts.as_message()["layout"] == OPAQUE
        session.introduce(ROOT, facts.as_message())
        assert node.storage.encoder.models() == {ROOT: facts}

    def test_the_namespace_of_a_model_stays_known_when_an_older_worker_names_none(self, node, session) -> None:
        facts = ModelInfo(KVLayout(2, 2, 16, "bfloat16", 16), "some weights", b"", True)
        known = asdict(Namespace(weights="some weights", rank=1, world=2))
        session.introduce(ROOT, facts.as_message())
        assert node.storage.encoder.models() == {ROOT: facts}
        session.introduce(ROOT, facts.as_message() | {"namespace": known})
        session.introduce(ROOT, {name: value for name, value in facts.as_message().items() if name != "namespace"})
        assert node.storage.encoder.knows(ROOT, facts)
        session.introduce(ROOT, replace(facts, rope=None).as_message())
        assert node.storage.encoder.models() == {ROOT: replace(facts, rope=None, namespace=known)}
        for bad in (7, "w", [], {}, {"weights": ""}, known | {"rank": 2}, known | {"more": 1}, known | {"rank": True}, {"weights": "w"}):
            with pytest.raises(TieredKVError, check=lambda error: error.kind is Kind.TRANSPORT):
                session.introduce(ROOT, facts.as_message() | {"namespace": bad})

    def test_a_block_that_a_worker_doubts_stays_if_it_can_be_read(self, node, session) -> None:
        self.store(session, 2)
        session.doubt([key_of(1), key_of(9)])
        assert node.stats()["blocks"] == 2

    def test_alone_a_node_can_locate_and_pull_nothing(self, session) -> None:
        assert session.locate([key_of(1)], 1.0) == []
        assert session.pull(BlockRun(ROOT, NBYTES, None, [key_of(1)], 0), 1.0) == 0
        assert session.pull(BlockRun(ROOT, NBYTES, None, [], 0), 1.0) == 0

    def test_hints_and_wishes_are_taken_and_nonsense_is_not(self, node, session) -> None:
        self.store(session, 2)
        session.bring([key_of(1), key_of(9)], 0.0)
        session.hint(key_of(1), 12, 30.0, None, False)
        assert node.engine.machine.held(key_of(0))
        for nonsense in (
            lambda: session.hint(b"short", None, None, None, True),
            lambda: session.hint(key_of(1), -1, None, None, False),
            lambda: session.bring(["key"], 0.0),
        ):
            with pytest.raises(TieredKVError):
                nonsense()
        assert node.stats()["blocks"] == 2

    def test_closing_gives_back_what_was_reserved_and_keeps_what_was_committed(self, node) -> None:
        session = self.open(node)
        self.store(session, 2)
        session.reserve(NBYTES, keys_of(4), None)
        session.close()
        session.close()
        wait_until(node, lambda: node.stats()["sessions"] == 0)
        assert node.stats()["blocks"] == 2
        assert node.stats()["tiers"]["host"]["used_bytes"] < 3 * NBYTES

    def test_sessions_are_counted(self, node, session, checked) -> None:
        checked(self.open(node)).reserve(NBYTES, keys_of(1), None)
        assert session.stats()["sessions"] == 2

    def test_many_keys_in_one_message(self, session) -> None:
        assert session.locate([key_of(number) for number in range(20_000)], 1.0) == []
