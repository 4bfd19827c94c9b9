"""The manifest of a checkpoint: its blocks, hottest first, their packs, and their models. It is written last, and atomically.

    manifest = magic "TKVMANIF" | version u32 | body bytes u64 | body (msgpack) | BLAKE2b-256 of all preceding bytes

docs/checkpoint-format.md describes the body. Version 1, which lists its blocks only in the packs' footers, will always be readable.
"""

import logging
import re
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any, NamedTuple, Self

import msgpack

from tiered_kv.blocks import Tier
from tiered_kv.checkpoint.manifest_rows import Row, pack_rows, unpack_rows
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import KEY_BYTES, BlockKey
from tiered_kv.layout import KVLayout, Layout, OpaqueLayout, layout_of
from tiered_kv.tiers.objects.packs import pack_prefix, read_footer
from tiered_kv.tiers.objects.store import ObjectStore
from tiered_kv.unpacking import unpacked

log = logging.getLogger(__name__)

MAGIC = b"TKVMANIF"
VERSION = 2
_START = struct.Struct("<8sI")
_BODY_BYTES = {1: struct.Struct("<I"), 2: struct.Struct("<Q")}
_DIGEST_BYTES = 32
ITEMS_MAX = 1 << 24
"""The largest number of packs or models in a checkpoint. It does not limit rows, which are stored in a few columns."""
_PICKLE = b"\x80"  # the first byte of a pickle of protocol 2 and above
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_STAMP = "%Y%m%dT%H%M%S.%fZ"
_GENERATED = re.compile(r"ckpt-(\d{8}T\d{6}\.\d{6}Z)-[0-9a-f]{8}\.tkv")


class Model(NamedTuple):
    """A model, identified by its root: its layout (None: unknown), a name to show to people, and the fields of its `Namespace` if known."""

    root: BlockKey
    layout: Layout | None = None
    name: str = ""
    namespace: dict[str, Any] | None = None


class Manifest(NamedTuple):
    """One checkpoint. `packs`: the name of each pack, and its size in bytes.

    `rows`: the blocks, hottest first, every parent before its children.

    `created_s`: Unix time, 0 if unknown. `origin`: the name of the cluster that wrote the checkpoint. `extra`: plain data that the
    writer stores for its own use.
    """

    packs: tuple[tuple[str, int], ...]
    models: tuple[Model, ...]
    rows: tuple[Row, ...]
    created_s: float
    origin: str
    extra: dict[str, Any]

    def write(self, store: ObjectStore, name: str) -> None:
        """Write the manifest atomically under `name`, replacing any object there.

        Raises ValueError if `read` would refuse the manifest.
        """
        _check(self)
        columns = pack_rows(self.rows, [model.root for model in self.models], [nbytes for _, nbytes in self.packs])
        facts = {"packs": [list(each) for each in self.packs]} | _plain_models(self.models)
        facts |= {"created_s": self.created_s, "origin": self.origin, "extra": self.extra}
        body = msgpack.packb(facts | {"rows": len(self.rows), "columns": columns})
        head = _START.pack(MAGIC, VERSION) + _BODY_BYTES[VERSION].pack(len(body))
        store.put(name, [head, body, _digest(head, body)])

    @classmethod
    def read(cls, store: ObjectStore, name: str) -> Self:
        """Returns the manifest `name` after verifying it.

        Raises (kind `storage`) if there is no such object, and (kind `corrupt`) if the object is not a valid manifest. Nothing
        is unpickled, so a forged manifest cannot run code. Cost: about two seconds for a million blocks.
        """
        version, body = _opened(name, store.get(name))
        try:
            facts = unpacked(body, items_max=ITEMS_MAX)
            if version == 1:
                facts |= {"created_s": 0.0, "origin": "", "models": [[*each, None] for each in facts["models"]]}
            models = _models(facts)
            packs = tuple((pack, nbytes) for pack, nbytes in facts["packs"])
            found = cls(packs, models, (), facts["created_s"], facts["origin"], facts["extra"])
            _check(found)
            roots = [model.root for model in models]
            if version == 1:
                return found._replace(rows=_rows_in_packs(store, name, packs, roots))
            return found._replace(rows=unpack_rows(facts["columns"], facts["rows"], roots, [nbytes for _, nbytes in packs]))
        except TieredKVError as error:
            if error.kind is not Kind.LAYOUT:
                raise
            raise _corrupt(name, f"its content is invalid: {error}") from error
        except (
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
        ) as error:  # the digest is right, so another program has written it, or it is forged
            raise _corrupt(name, f"its content is invalid: {error}") from error


def new_name(now_s: float) -> str:
    """Returns a unique name for a checkpoint created at this Unix time. Such names sort by time."""
    created = _EPOCH + timedelta(microseconds=round(now_s * 1_000_000))
    return f"ckpt-{created.strftime(_STAMP)}-{uuid.uuid4().hex[:8]}.tkv"


def created_of(name: str) -> float | None:
    """Returns the Unix time in a name from `new_name`, or None for any other name."""
    generated = _GENERATED.fullmatch(name)
    if generated is None:
        return None
    try:
        created = datetime.strptime(generated[1], _STAMP).replace(tzinfo=UTC)
    except ValueError:  # for example a thirteenth month
        return None
    return (created - _EPOCH).total_seconds()


def is_like_manifest(data: bytes | memoryview) -> bool:
    """Returns whether an unreadable object is probably a damaged manifest, judged by its first bytes."""
    return sum(a == b for a, b in zip(MAGIC, bytes(data[: len(MAGIC)]), strict=False)) >= len(MAGIC) // 2


def plain_layout(layout: KVLayout) -> list[int | str]:
    """Returns a layout as a list for msgpack. `KVLayout(*plain)` is the inverse."""
    return [layout.layers, layout.kv_heads, layout.head_dim, layout.dtype, layout.block_tokens]


def _plain_models(models: Sequence[Model]) -> dict[str, Any]:
    """Returns the fields of the body that describe models. `_models` is the inverse.

    The field `opaque_layouts` exists only if a model has an opaque layout. Readers that do not know the field treat such layouts as
    unknown.
    """
    plain = [[each.root, plain_layout(each.layout) if isinstance(each.layout, KVLayout) else None, *each[2:]] for each in models]
    opaque = {each.root: asdict(each.layout) for each in models if isinstance(each.layout, OpaqueLayout)}
    return {"models": plain} | ({"opaque_layouts": opaque} if opaque else {})


def _models(facts: Mapping[str, Any]) -> tuple[Model, ...]:
    """Returns the models in the body of a manifest. Raises (kind `layout`), ValueError or TypeError if a description is invalid."""
    opaque = {root: layout_of(plain) for root, plain in facts.get("opaque_layouts", {}).items()}
    models = []
    for root, plain, *rest in facts["models"]:
        layout = opaque.pop(root, None) if plain is None else KVLayout(*plain)
        models.append(Model(root, layout, *rest))
        if plain is None and isinstance(layout, KVLayout):
            raise ValueError(f"opaque_layouts: must be opaque, got {layout}")
    if opaque:
        raise ValueError("opaque_layouts: every root must be that of exactly one model, and that model must have no other layout")
    return tuple(models)


def _opened(name: str, view: memoryview) -> tuple[int, memoryview]:
    """Verify the bytes of a manifest. Returns its version and its body. Raises (kind `corrupt`) if they are invalid."""
    if view[: len(MAGIC)] != MAGIC:
        is_a = "a pickle, which is not opened: it could run code" if view[:1] == _PICKLE else "not a checkpoint of tiered_kv"
        raise _corrupt(name, f"it is {is_a}")
    if len(view) < _START.size:
        raise _corrupt(name, "it is cut off within its header")
    _, version = _START.unpack_from(view)
    if version not in _BODY_BYTES:
        raise _corrupt(name, f"its version must be at most {VERSION}, got {version}; a newer tiered_kv may be able to read it")
    begin, end = _START.size + _BODY_BYTES[version].size, len(view) - _DIGEST_BYTES
    if end < begin:
        raise _corrupt(name, "it is cut off within its header")
    (nbytes,) = _BODY_BYTES[version].unpack_from(view, _START.size)
    if begin + nbytes != end or view[end:] != _digest(view[:end]):
        raise _corrupt(name, "it is damaged")
    return version, view[begin:end]


def _check(manifest: Manifest) -> None:
    """Raises ValueError if a field is invalid. The rows are checked by `pack_rows` and `unpack_rows`."""
    names = [name for name, _ in manifest.packs]
    if len(set(names)) != len(names) or not all(isinstance(name, str) and pack_prefix(name) == "" for name in names):
        raise ValueError("packs: every name must be a valid name of a pack, and occur only once")
    if not all(_is_count(nbytes) for _, nbytes in manifest.packs):
        raise ValueError("packs: every size must be a positive whole number")
    roots = [model.root for model in manifest.models]
    if len(set(roots)) != len(roots) or not all(isinstance(root, bytes) and len(root) == KEY_BYTES for root in roots):
        raise ValueError(f"models: every root must be {KEY_BYTES} bytes, and occur only once")
    for model in manifest.models:
        if not isinstance(model.layout, KVLayout | OpaqueLayout | None):
            raise ValueError(f"models: layout must be a KVLayout, an OpaqueLayout or None, got {model.layout!r}")
        if not isinstance(model.name, str) or not isinstance(model.namespace, dict | None):
            raise ValueError(f"models: name must be a string and namespace a mapping or None, got {model.name!r} and {model.namespace!r}")
    if not isinstance(manifest.created_s, float | int) or not 0 <= manifest.created_s < float("inf"):
        raise ValueError(f"created_s: must be a finite number of at least 0, got {manifest.created_s!r}")
    if not isinstance(manifest.origin, str) or not isinstance(manifest.extra, dict):
        raise ValueError(f"origin must be a string and extra a mapping, got {manifest.origin!r} and {type(manifest.extra).__name__}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 63


def _rows_in_packs(store: ObjectStore, name: str, packs: Sequence[tuple[str, int]], roots: Sequence[BlockKey]) -> tuple[Row, ...]:
    """Returns the rows of a checkpoint of version 1, from the packs' footers.

    A block whose parent is not among the rows is left out, because it could never be a hit.
    """
    depths: dict[tuple[BlockKey, BlockKey], int] = {}
    rows: list[Row] = []
    lost = 0
    for number, (pack, nbytes) in enumerate(packs):
        try:
            entries = read_footer(store, pack, nbytes).entries
        except TieredKVError as error:
            if error.kind is not Kind.CORRUPT and not error.context.get("missing"):
                raise
            raise TieredKVError(Kind.CORRUPT, f"checkpoint {name}: its pack {pack}: {error}", object=pack) from error
        for key, parent, root, codec, offset, stored_bytes, raw_bytes, _ in entries:
            if root is None or root not in roots:
                raise ValueError(f"pack {pack}: a block has a root that is not in the manifest")
            depth = 0 if parent is None else depths.get((parent, root), -2) + 1
            if depth < 0 or (key, root) in depths:
                lost += 1
                continue
            depths[key, root] = depth
            rows.append(Row(key, parent, root, depth, number, offset, stored_bytes, raw_bytes, codec, Tier.HOST.value, 0))
    if lost:
        log.warning("checkpoint %s: %d of %d blocks are left out, because it does not contain their parents", name, lost, lost + len(rows))
    return tuple(rows)


def _digest(*parts: bytes | memoryview) -> bytes:
    whole = blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        whole.update(part)
    return whole.digest()


def _corrupt(name: str, reason: str) -> TieredKVError:
    return TieredKVError(Kind.CORRUPT, f"checkpoint {name}: {reason}", object=name)
