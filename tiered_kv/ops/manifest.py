"""The manifest of a checkpoint: which packs it consists of, and of which models. Written last and atomically; docs/pack-format.md.

manifest = magic "TKVMANIF" | version u32 | body bytes u32 | body (msgpack) | BLAKE2b-256 of all before
"""

import struct
from hashlib import blake2b
from typing import Any, NamedTuple, Self

import msgpack

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import KVLayout
from tiered_kv.tiers.objectstore import ObjectStore

MAGIC = b"TKVMANIF"
VERSION = 1
_HEAD = struct.Struct("<8sII")
_DIGEST_BYTES = 32
_PICKLE = b"\x80"  # the first byte of a pickle of protocol 2 and above


class Model(NamedTuple):
    """Blocks below one root: their layout, and what people call the model."""

    root: bytes
    layout: KVLayout
    name: str = ""


class Manifest(NamedTuple):
    """Packs by name and bytes, the models whose blocks are in them, and what the writer wants to find again (plain data)."""

    packs: tuple[tuple[str, int], ...]
    models: tuple[Model, ...]
    extra: dict[str, Any]

    def write(self, store: ObjectStore, name: str) -> None:
        """Put it under `name`, in place of what was there: all of it or nothing."""
        models = [[model.root, plain_layout(model.layout), model.name] for model in self.models]
        body = msgpack.packb({"packs": [list(each) for each in self.packs], "models": models, "extra": self.extra})
        head = _HEAD.pack(MAGIC, VERSION, len(body))
        store.put(name, [head, body, _digest(head + body)])

    @classmethod
    def read(cls, store: ObjectStore, name: str) -> Self:
        """Raises (kind `storage`) where there is none, (kind `corrupt`) for anything else; a pickle is never opened as one."""
        data = bytes(store.get(name))
        if data[: len(MAGIC)] != MAGIC:
            is_a = "a pickle, which is not opened: it could run code" if data[:1] == _PICKLE else "no checkpoint of tiered_kv"
            raise _corrupt(name, f"it is {is_a}")
        if len(data) < _HEAD.size + _DIGEST_BYTES:
            raise _corrupt(name, "it ends in its header")
        _, version, nbytes = _HEAD.unpack_from(data)
        if not 1 <= version <= VERSION:
            raise _corrupt(name, f"it has version {version}, this package reads up to version {VERSION}")
        body = data[_HEAD.size : _HEAD.size + nbytes]
        if len(data) != _HEAD.size + nbytes + _DIGEST_BYTES or data[-_DIGEST_BYTES:] != _digest(data[:-_DIGEST_BYTES]):
            raise _corrupt(name, "it is damaged")
        facts = msgpack.unpackb(body)
        models = tuple(Model(root, KVLayout(*layout), known) for root, layout, known in facts["models"])
        return cls(tuple((pack, size) for pack, size in facts["packs"]), models, facts["extra"])


def plain_layout(layout: KVLayout) -> list:
    """A layout as msgpack carries it; `KVLayout(*plain)` is the inverse."""
    return [layout.layers, layout.kv_heads, layout.head_dim, layout.dtype, layout.block_tokens]


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _corrupt(name: str, reason: str) -> TieredKVError:
    return TieredKVError(Kind.CORRUPT, f"checkpoint {name}: {reason}", object=name)
