"""A stream that was cut, flipped, reordered, repeated or made up: no wrong byte is ever visible, and each is a counted refusal."""

import random
import socket
from collections import Counter

import msgpack
import pytest

from tests.unit.peers.pairs import PATIENCE_S, channel_pair, within
from tests.unit.serving.prompts import LAYOUT, NAMESPACE, block_of, kv_of, tokens_of
from tiered_kv.blocks import Tier
from tiered_kv.errors import TieredKVError
from tiered_kv.node import peer_admission
from tiered_kv.node.node import Node
from tiered_kv.node.peer_admission import Admission
from tiered_kv.node.peers import block_server
from tiered_kv.node.peers.block_server import BlockServer
from tiered_kv.node.peers.figures import PeerFigures
from tiered_kv.node.peers.transfer import StreamTransfer
from tiered_kv.node.worker_session import NodeSession
from tiered_kv.protocol.messages import BlockRun
from tiered_kv.protocol.peer_channel import Channel

PATH = (1, 2, 0, 1)
ROOT = NAMESPACE.root(LAYOUT)
RAW = LAYOUT.block_bytes
TRIES = 1100
"""For each of five kinds of damage."""


class Tape:
    """Stands in for a node's connections: each is a channel on which a recorded stream is played."""

    def __init__(self) -> None:
        self.wire = b""

    def take(self, address: str, limit: object) -> Channel:
        sender, receiver = channel_pair()
        sender._connection.sendall(self.wire)
        sender._connection.shutdown(socket.SHUT_WR)
        self._sender = sender
        return receiver

    def give_back(self, address: str, channel: Channel) -> None:
        self.drop(channel)

    def drop(self, channel: Channel) -> None:
        channel.close()
        self._sender.close()


class Recorder:
    """Stands in for the server's channel. Collects what is sent, one entry for each message or payload."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self._channel, other = channel_pair()
        other.close()
        self._channel.send_bytes = lambda buffers, limit: self.sent.extend(bytes(buffer) for buffer in buffers)

    def send(self, message: object, limit: object, payload: object = ()) -> None:
        self._channel.send(message, limit, payload)

    def close(self) -> None:
        self._channel.close()


class Theatre:
    """A node that fetches from the tape, and what it should get."""

    def __init__(self, node: Node, keys: list[bytes]) -> None:
        self.node = node
        self.keys = keys
        self.raw = {key: block_of(PATH[: depth + 1]).contiguous().view(-1).numpy().tobytes() for depth, key in enumerate(keys)}
        self.tape = Tape()
        self.figures = PeerFigures()

    def fetch(self, wire: bytes) -> str | None:
        """Play a stream to a transfer of all keys. Returns the reason of the refusal, None if all blocks came. Forgets them at last."""
        self.tape.wire = wire
        session = self.node.open_session()
        reason = None
        try:
            run = BlockRun(ROOT, RAW, None, self.keys, 0)
            transfer = StreamTransfer(self.tape, self.figures, "n0", "nowhere", self.keys)
            assert transfer.deliver(Admission(self.node, session, run), PATIENCE_S, PATIENCE_S, lambda: None) == len(self.keys)
        except TieredKVError as error:
            reason = error.context["reason"]
        assert not session.reserved, "extents of a failed transfer are free again"
        session.close()
        self.check()
        self.node.forget(ROOT)
        return reason

    def check(self) -> None:
        """Assert that each visible block has its right bytes."""
        for key, block in self.node.engine.machine.blocks.items():
            location = block.copies[Tier.HOST]
            assert self.node.storage.host.payload(location.offset, RAW).numpy().tobytes() == self.raw[key], "wrong bytes are visible"


def recorded(node: Node, keys: list[bytes]) -> list[bytes]:
    """Returns the stream with which a node answers a request for keys, in parts: messages and payloads."""
    recorder = Recorder()
    BlockServer(node, PeerFigures())._send_run(recorder, PATIENCE_S, keys)
    recorder.close()
    return recorder.sent


@pytest.fixture
def theatre(node_factory, client_factory, monkeypatch) -> tuple[Theatre, list[bytes]]:
    monkeypatch.setattr(block_server, "FIRST_BLOCKS", 2)  # so that the stream has several batches
    monkeypatch.setattr(block_server, "BATCH_BYTES", 2 * RAW)
    monkeypatch.setattr(StreamTransfer, "_doubt", lambda self, key: None)
    holder = node_factory(host="1MiB", node_id="n0")
    client = client_factory(holder, LAYOUT, NAMESPACE)
    client.store(tokens_of(PATH), kv_of(PATH))
    keys = [bytes.fromhex(each.key) for each in client.explain(tokens_of(PATH))]
    made = Theatre(node_factory(host="1MiB", node_id="n1"), keys)
    return made, recorded(holder, keys)


def test_an_undamaged_stream_brings_all_blocks(theatre) -> None:
    made, parts = theatre
    assert len(parts) == 2 * (1 + 2), "two batches of two blocks; no message ends a run of which all blocks came"
    assert made.fetch(b"".join(parts)) is None


def test_memory_for_raw_blocks_is_reserved_once_before_the_peer_has_offered_them(theatre, monkeypatch) -> None:
    made, parts = theatre
    reserved, reserve = [], NodeSession.reserve_within

    def counting(self: NodeSession, nbytes: int, keys: list[bytes], *rest: object, **options: object) -> list[int]:
        reserved.append(len(keys))
        return reserve(self, nbytes, keys, *rest, **options)

    monkeypatch.setattr(NodeSession, "reserve_within", counting)
    assert made.fetch(b"".join(parts)) is None
    assert reserved == [len(made.keys)]
    monkeypatch.setattr(peer_admission, "EXPECTED_BYTES", 1)
    assert made.fetch(b"".join(parts)) is None
    assert reserved[1:] == [1, 1, 2], "one block is expected; the others get room when they are offered"


def flipped(dice: random.Random, parts: list[bytes]) -> bytes:
    wire = bytearray(b"".join(parts))
    for _ in range(dice.choice((1, 1, 1, 2, 8))):
        wire[dice.randrange(len(wire))] ^= 1 << dice.randrange(8)
    return bytes(wire)


def cut(dice: random.Random, parts: list[bytes]) -> bytes:
    wire = b"".join(parts)
    start = dice.randrange(len(wire))
    return wire[:start] if dice.random() < 0.5 else wire[:start] + wire[start + dice.randrange(1, len(wire) - start + 1) :]


def reordered(dice: random.Random, parts: list[bytes]) -> bytes:
    a, b = dice.sample(range(len(parts)), 2)
    moved = list(parts)
    moved[a], moved[b] = moved[b], moved[a]
    return b"".join(moved)


def repeated(dice: random.Random, parts: list[bytes]) -> bytes:
    """A part is replaced by, or followed by, an earlier or a later one."""
    at, other = dice.sample(range(len(parts) - 1), 2)
    return b"".join([*parts[:at], parts[other], *parts[at + (dice.random() < 0.5) :]])


def with_other_lengths(dice: random.Random, parts: list[bytes]) -> bytes:
    changed = list(parts)
    at = dice.choice([number for number, part in enumerate(parts) if len(part) < RAW])
    length = dice.choice((0, 1, 2**32 - 1, dice.randrange(2**32), dice.randrange(2**12)))
    changed[at] = length.to_bytes(4, "little") + parts[at][4:]
    return b"".join(changed)


@pytest.mark.parametrize("damage", [flipped, cut, reordered, repeated, with_other_lengths])
def test_no_damaged_stream_shows_a_wrong_byte_and_each_is_counted(theatre, damage) -> None:
    made, parts = theatre
    whole, dice, reasons = b"".join(parts), random.Random(31), Counter()
    for _ in range(TRIES):
        wire = damage(dice, parts)
        if wire != whole:
            reasons[made.fetch(wire)] += 1
    assert None not in reasons, "each is refused"
    assert set(reasons) <= {"mac", "checksum", "closed", "length", "message"}
    assert sum(reasons.values()) > TRIES * 0.9
    pair = made.figures.stats(None, {})["peers"]["n0"]
    assert pair["failures"] == dict(reasons)
    made.node.check()


def lied(parts: list[bytes], offers: list[list], payloads: list[bytes]) -> bytes:
    """Returns a stream of a peer that knows the secret and sends these offers and payloads."""
    recorder = Recorder()
    recorder.send(["blocks", offers], within(), [memoryview(payload) for payload in payloads])
    recorder.send(["end"], within())
    recorder.close()
    return b"".join(recorder.sent)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (lambda offers, payloads: (offers[::-1], payloads[::-1]), "key"),
        (lambda offers, payloads: (offers, payloads[::-1]), "checksum"),
        (lambda offers, payloads: (offers[:1], [bytes(RAW)]), "checksum"),
        (lambda offers, payloads: ([[RAW, RAW // 2, 0, offers[0][3]]], payloads), "size"),
        (lambda offers, payloads: ([[2**31, RAW, 0, b""]], payloads), "size"),
        (lambda offers, payloads: ([[RAW, RAW, 0, bytes(128)]], payloads), "header"),
        (lambda offers, payloads: ([[RAW, RAW, 0, b""]], payloads), "checksum"),
        (lambda offers, payloads: ([[RAW, RAW, 7, offers[0][3]]], payloads), "size"),
        (lambda offers, payloads: ([[0, RAW, 0, b""]], payloads), "unexpected"),
        (lambda offers, payloads: ([[-1, RAW, 0, b""]], payloads), "unexpected"),
        (lambda offers, payloads: ([[RAW, RAW, 0, b"short"]], payloads), "unexpected"),
        (lambda offers, payloads: ([[RAW, True, 0, b""]], payloads), "unexpected"),
        (lambda offers, payloads: ([[RAW]], payloads), "unexpected"),
        (lambda offers, payloads: ([7, None], payloads), "unexpected"),
        (lambda offers, payloads: ([], payloads), "unexpected"),
        (lambda offers, payloads: (offers * 3, payloads * 3), "unexpected"),
    ],
)
def test_a_peer_with_the_secret_that_sends_something_else_is_refused(theatre, lie, reason) -> None:
    made, parts = theatre
    offers = [list(offer) for offer in sent_offers(parts)]
    offers, payloads = lie(offers, parts[1:3])
    assert made.fetch(lied(parts, offers, payloads)) == reason


def sent_offers(parts: list[bytes]) -> list:
    return msgpack.unpackb(parts[0][4:-16])[1]


def test_a_block_of_another_model_is_refused(theatre) -> None:
    made, parts = theatre
    session = made.node.open_session()
    made.tape.wire = b"".join(parts)
    run = BlockRun(b"r" * 32, RAW, None, made.keys, 0)
    transfer = StreamTransfer(made.tape, made.figures, "n0", "nowhere", made.keys)
    with pytest.raises(TieredKVError, match="another model"):
        transfer.deliver(Admission(made.node, session, run), PATIENCE_S, PATIENCE_S, lambda: None)
    session.close()
    assert not made.node.engine.machine.blocks


def test_blocks_before_a_damaged_one_stay(theatre) -> None:
    made, parts = theatre
    parts = [*parts[:4], bytes([parts[4][0] ^ 1]) + parts[4][1:], *parts[5:]]
    made.tape.wire = b"".join(parts)
    session = made.node.open_session()
    transfer = StreamTransfer(made.tape, made.figures, "n0", "nowhere", made.keys)
    with pytest.raises(TieredKVError, match="seal"):
        transfer.deliver(Admission(made.node, session, BlockRun(ROOT, RAW, None, made.keys, 0)), PATIENCE_S, PATIENCE_S, lambda: None)
    session.close()
    assert list(made.node.engine.machine.blocks) == made.keys[:2]
    made.check()
