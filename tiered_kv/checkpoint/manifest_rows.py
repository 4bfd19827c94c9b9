"""The blocks of a checkpoint as rows, stored as columns of little-endian numbers. Reading a million rows takes about two seconds.

    keys 32 each | parent u32 (the row's number, 0xffffffff: none) | root u16 (the model's number) | depth u32 | pack u32 |
    offset u64 | stored u32 | raw u32 | codec u16 | tier u8 | hits u32

docs/checkpoint-format.md has the rules for the rows of one checkpoint. `pack_rows` and `unpack_rows` check these rules.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tiered_kv.blocks import BlockInfo
from tiered_kv.keys import KEY_BYTES, BlockKey

ROWS_MAX = 1 << 26
MODELS_MAX = 1 << 16
HITS_MAX = (1 << 32) - 1
"""A higher number of uses is stored as this number."""
NO_PARENT = (1 << 32) - 1

_DTYPES = {
    "parent": "<u4",
    "root": "<u2",
    "depth": "<u4",
    "pack": "<u4",
    "offset": "<u8",
    "stored": "<u4",
    "raw": "<u4",
    "codec": "<u2",
    "tier": "u1",
    "hits": "<u4",
}


class Row(NamedTuple):
    """One block of a checkpoint: its position in its chain, and the location of its frame in a pack.

    `depth`: the number of ancestors. `pack`: the pack's index in `Manifest.packs`. `tier`: the `Tier` from which it was written.
    `hits`: the number of uses since it was stored.
    """

    key: BlockKey
    parent: BlockKey | None
    root: BlockKey
    depth: int
    pack: int
    offset: int
    stored_bytes: int
    raw_bytes: int
    codec: int
    tier: int
    hits: int

    @property
    def info(self) -> BlockInfo:
        """The block's key, parent, root and depth."""
        return BlockInfo(self.key, self.parent, self.root, self.depth)


def pack_rows(rows: Sequence[Row], roots: Sequence[BlockKey], packs: Sequence[int]) -> dict[str, bytes]:
    """Encode rows as columns. Returns the bytes of each column by name.

    `roots`: the roots of the models. `packs`: the size of each pack in bytes. Raises ValueError if the rows break a rule of the format.
    """
    if len(rows) > ROWS_MAX or len(roots) > MODELS_MAX:
        raise ValueError(f"a checkpoint can have at most {ROWS_MAX} blocks of {MODELS_MAX} models, got {len(rows)} of {len(roots)}")
    known = {root: number for number, root in enumerate(roots)}
    places = {(row.key, row.root): number for number, row in enumerate(rows)}
    keys = b"".join(row.key for row in rows)
    if len(keys) != KEY_BYTES * len(rows):
        raise ValueError(f"key: every key must be {KEY_BYTES} bytes")
    try:
        values = {
            "parent": [NO_PARENT if row.parent is None else places[row.parent, row.root] for row in rows],
            "root": [known[row.root] for row in rows],
            "hits": [min(row.hits, HITS_MAX) for row in rows],
        }
        values |= {name: [getattr(row, name) for row in rows] for name in ("depth", "pack", "offset", "codec", "tier")}
        values |= {name: [getattr(row, f"{name}_bytes") for row in rows] for name in ("stored", "raw")}
        columns = {name: np.array(values[name], dtype) for name, dtype in _DTYPES.items()}
    except KeyError as error:
        raise ValueError("parent, root: every parent and root must be in the checkpoint") from error
    except OverflowError as error:
        raise ValueError(f"a number does not fit in its column: {error}") from error
    _check(columns, len(roots), packs)
    if len(places) != len(rows):
        raise ValueError("key: a block occurs twice")
    return {"keys": keys} | {name: column.tobytes() for name, column in columns.items()}


def unpack_rows(columns: Mapping[str, bytes], count: int, roots: Sequence[BlockKey], packs: Sequence[int]) -> tuple[Row, ...]:
    """Returns the `count` rows that `pack_rows` has encoded in these columns.

    Raises ValueError if the columns break a rule of the format, and KeyError if a column is missing.
    """
    keys = columns["keys"]
    if not 0 <= count <= ROWS_MAX or len(keys) != KEY_BYTES * count:
        raise ValueError(f"keys: must be {KEY_BYTES} bytes per block, got {len(keys)} bytes for {count} blocks")
    found = {name: np.frombuffer(columns[name], dtype) for name, dtype in _DTYPES.items()}
    for name, column in found.items():
        if len(column) != count:
            raise ValueError(f"column {name}: must have {count} numbers, one per block, got {len(column)}")
    _check(found, len(roots), packs)
    named = [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]
    parents = list(map([*named, None].__getitem__, np.minimum(found["parent"], count).tolist()))
    its_root = list(map(roots.__getitem__, found["root"].tolist()))
    numbers = (found[name].tolist() for name in ("depth", "pack", "offset", "stored", "raw", "codec", "tier", "hits"))
    if len(set(named)) != count and len(set(zip(named, its_root, strict=True))) != count:
        raise ValueError("key: a block occurs twice")
    return tuple(map(Row._make, zip(named, parents, its_root, *numbers, strict=True)))


def _check(columns: Mapping[str, np.ndarray], models: int, packs: Sequence[int]) -> None:
    """Raises ValueError unless every row has a known root, is listed after its parent, has the right depth, and is within its pack."""
    own = np.arange(len(columns["parent"]))
    parent, root, depth = (columns[name].astype(np.int64) for name in ("parent", "root", "depth"))
    first = parent == NO_PARENT
    parent_row = np.where(first, 0, parent)
    if ((parent_row >= own) & ~first).any():
        raise ValueError("parent: every block must come after its parent")
    if (root >= models).any():
        raise ValueError(f"root: must be below the number of models, {models}, got {root.max()}")
    if (~first & (root[parent_row] != root)).any():
        raise ValueError("root: a block and its parent must have the same root")
    if (depth != np.where(first, 0, depth[parent_row] + 1)).any():
        raise ValueError("depth: must be 0 for the first block of a chain, else one more than the parent's")
    if (columns["pack"] >= len(packs)).any():
        raise ValueError(f"pack: must be below the number of packs, {len(packs)}, got {columns['pack'].max()}")
    ends = np.array(packs, np.uint64)[columns["pack"]]
    stored = columns["stored"].astype(np.uint64)
    if (stored > ends).any() or (columns["offset"] > ends - np.minimum(stored, ends)).any():
        raise ValueError("offset, stored: every block must be within its pack")
    if not (columns["stored"].all() and columns["raw"].all() and columns["tier"].all()):
        raise ValueError("stored, raw, tier: must be above 0")
