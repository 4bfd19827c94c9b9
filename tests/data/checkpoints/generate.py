"""Makes a checkpoint of each version of the format: `python -m tests.data.checkpoints.generate` writes what is not here yet beside itself.

What is here is never made again: these are the bytes that every later version must read.
"""

from hashlib import blake2b
from pathlib import Path

import msgpack

from tests.unit.checkpoint.checkpoints import MODELS, NOW_S, manifest, pack, row
from tests.unit.tiers.records import ROOT
from tiered_kv.checkpoint.manifest import Manifest, Model, plain_layout
from tiered_kv.checkpoint.repository import Repository
from tiered_kv.layout import OpaqueLayout
from tiered_kv.tiers.objects.store import MemoryStore, ObjectStore

HERE = Path(__file__).parent
VERSION_1 = "cache_state.pkl"
VERSION_2 = "ckpt-20260101T000000.000000Z-00000002.tkv"
WITH_OPAQUE_LAYOUT = "opaque_layout.tkv"
UNKNOWN = Model(bytes(32))
OPAQUE = Model(ROOT, OpaqueLayout(4096, 16, "pages of an engine, of bfloat16 · 2", 2), "engine", MODELS[0].namespace)


def expected() -> Manifest:
    """The checkpoint of version 2: blocks 10 and 11 in one pack, 0 to 2 in another, of which 1 is used often."""
    packs = pack(MemoryStore(), [10, 11]), pack(MemoryStore(), [0, 1, 2])
    offsets = {info_at: [each.offset for each in info.entries] for info_at, info in enumerate(packs)}
    rows = [row(0, 1, offsets[1][0], hits=70_000), row(1, 1, offsets[1][1], hits=70_000), row(10, 0, offsets[0][0], hits=3)]
    rows += [row(11, 0, offsets[0][1]), row(2, 1, offsets[1][2])]
    named = tuple((info.name, info.nbytes) for info in packs)
    return Manifest(named, (*MODELS, UNKNOWN), tuple(rows), NOW_S + 0.5, "examples", {"note": "read for ever"})


def expected_with_opaque_layout() -> Manifest:
    """A checkpoint of version 2 with a model of an opaque layout: the blocks 10 and 11."""
    found = manifest([pack(MemoryStore(), [10, 11])], created_s=NOW_S - 1.0)
    return found._replace(models=(UNKNOWN, OPAQUE, MODELS[0]._replace(root=bytes([1] * 32))), origin="examples")


def expected_of_version_1() -> Manifest:
    """The one of version 1: the same blocks, as they stand in the packs."""
    found = manifest([pack(MemoryStore(), [10, 11]), pack(MemoryStore(), [0, 1, 2])], created_s=0.0)
    return found._replace(models=(MODELS[0]._replace(namespace=None),), origin="", extra={"positions": []})


def write_version_1(store: ObjectStore, name: str) -> None:
    """What the first version of the package wrote."""
    wanted = expected_of_version_1()
    models = [[ROOT, plain_layout(model.layout), model.name] for model in wanted.models]
    body = msgpack.packb({"packs": [list(each) for each in wanted.packs], "models": models, "extra": wanted.extra})
    head = b"TKVMANIF" + (1).to_bytes(4, "little") + len(body).to_bytes(4, "little")
    store.put(name, [head, body, blake2b(head + body, digest_size=32).digest()])


def write_all(store: ObjectStore) -> None:
    """Every object of the examples."""
    pack(store, [10, 11])
    pack(store, [0, 1, 2])
    write_version_1(store, VERSION_1)
    Repository(store).publish(expected(), VERSION_2)
    expected_with_opaque_layout().write(store, WITH_OPAQUE_LAYOUT)


if __name__ == "__main__":
    made = MemoryStore()
    write_all(made)
    for name, content in made.objects.items():
        if not (HERE / name).exists():
            (HERE / name).write_bytes(content)
