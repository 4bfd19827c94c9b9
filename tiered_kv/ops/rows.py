"""The blocks of a checkpoint as rows, and the rows as columns of little-endian numbers: a million are read in about two seconds.

    keys 32 each | parent u32 (the row's number, 0xffffffff: none) | root u16 (the model's number) | depth u32 | pack u32 |
    offset u64 | stored u32 | raw u32 | codec u16 | tier u8 | hits u32

docs/checkpoint-format.md has the rules that the rows of one checkpoint keep; both ways check them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tiered_kv.keys import KEY_BYTES, BlockKey

ROWS_MAX = 1 << 26
MODELS_MAX = 1 << 16
HITS_MAX = (1 << 32) - 1
"""More uses are kept as so many."""
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
    """One block of a checkpoint: where it stands in its chain, and where its frame lies.

    `depth`: blocks before it in its chain. `pack`: which of the checkpoint's packs. `tier`: the `Tier` it was in.
    `hits`: uses since it was stored.
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


def pack_rows(rows: Sequence[Row], roots: Sequence[BlockKey], packs: Sequence[int]) -> dict[str, bytes]:
    """The columns of rows below these roots, in packs of so many bytes. Raises ValueError for rows that no checkpoint may have."""
    if len(rows) > ROWS_MAX or len(roots) > MODELS_MAX:
        raise ValueError(f"{len(rows)} blocks of {len(roots)} models; at most {ROWS_MAX} of {MODELS_MAX} fit into a checkpoint")
    known = {root: number for number, root in enumerate(roots)}
    places = {(row.key, row.root): number for number, row in enumerate(rows)}
    keys = b"".join(row.key for row in rows)
    if len(keys) != KEY_BYTES * len(rows):
        raise ValueError(f"a key that has not {KEY_BYTES} bytes")
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
        raise ValueError("a block whose parent or root is not in the checkpoint") from error
    except OverflowError as error:
        raise ValueError(f"a number that its column does not hold: {error}") from error
    _check(columns, len(roots), packs)
    if len(places) != len(rows):
        raise ValueError("a block that is there twice")
    return {"keys": keys} | {name: column.tobytes() for name, column in columns.items()}


def unpack_rows(columns: Mapping[str, bytes], count: int, roots: Sequence[BlockKey], packs: Sequence[int]) -> tuple[Row, ...]:
    """The inverse of `pack_rows`; raises ValueError (and KeyError for a missing column) for columns that it cannot have made."""
    keys = columns["keys"]
    if not 0 <= count <= ROWS_MAX or len(keys) != KEY_BYTES * count:
        raise ValueError(f"{len(keys)} bytes of keys for {count} blocks")
    found = {name: np.frombuffer(columns[name], dtype) for name, dtype in _DTYPES.items()}
    for name, column in found.items():
        if len(column) != count:
            raise ValueError(f"a column {name} of {len(column)} numbers for {count} blocks")
    _check(found, len(roots), packs)
    named = [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]
    parents = list(map([*named, None].__getitem__, np.minimum(found["parent"], count).tolist()))
    its_root = list(map(roots.__getitem__, found["root"].tolist()))
    numbers = (found[name].tolist() for name in ("depth", "pack", "offset", "stored", "raw", "codec", "tier", "hits"))
    if len(set(named)) != count and len(set(zip(named, its_root, strict=True))) != count:
        raise ValueError("a block that is there twice")
    return tuple(map(Row._make, zip(named, parents, its_root, *numbers, strict=True)))


def _check(columns: Mapping[str, np.ndarray], models: int, packs: Sequence[int]) -> None:
    """Raise ValueError unless every row is below a known root, in its pack, and behind its parent."""
    own = np.arange(len(columns["parent"]))
    parent, root, depth = (columns[name].astype(np.int64) for name in ("parent", "root", "depth"))
    first = parent == NO_PARENT
    before = np.where(first, 0, parent)
    if ((before >= own) & ~first).any():
        raise ValueError("a block that stands before its parent")
    if (root >= models).any():
        raise ValueError("a block of a model that is not there")
    if (~first & (root[before] != root)).any():
        raise ValueError("a block behind one of another model")
    if (depth != np.where(first, 0, depth[before] + 1)).any():
        raise ValueError("a block whose depth is not that of its chain")
    if (columns["pack"] >= len(packs)).any():
        raise ValueError("a block in a pack that is not there")
    ends = np.array(packs, np.uint64)[columns["pack"]]
    stored = columns["stored"].astype(np.uint64)
    if (stored > ends).any() or (columns["offset"] > ends - np.minimum(stored, ends)).any():
        raise ValueError("a block that lies behind the end of its pack")
    if not (columns["stored"].all() and columns["raw"].all() and columns["tier"].all()):
        raise ValueError("a block without bytes or tier")
