"""Request traces in Mooncake's format: one JSON object a line, plain, gzip or zstandard.

Fields: `timestamp` (ms), `input_length` and `output_length` (tokens), `hash_ids` (one id a block of the input, the last
block perhaps partial; equal ids mean equal prefixes). Format: Qin et al., Mooncake, FAST 2025.
"""

import gzip
import json
import math
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import zstandard

from tiered_kv.errors import Kind, TieredKVError

_FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")
_ID_TYPES = {int, str, float}
_CHUNK_BYTES = 1 << 20
_TOKENS_BITS = 40  # more tokens than this in a request are a mistake


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace: when it came, its full blocks root first, its lengths in tokens."""

    time_s: float
    keys: list[int]
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Trace:
    """A trace in memory: full blocks only, as ids 0, 1, … in the order of their first use; requests by time.

    Request i has the blocks `ids[offsets[i]:offsets[i + 1]]`. Some 20 MB for 5 million blocks.
    """

    name: str
    block_tokens: int
    times_s: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    ids: np.ndarray
    offsets: np.ndarray
    notes: tuple[str, ...] = field(default=())
    """What people should know of how it was read."""

    def __len__(self) -> int:
        return len(self.times_s)

    def __iter__(self) -> Iterator[Request]:
        bounds = self.offsets.tolist()
        lengths = zip(self.times_s.tolist(), self.input_tokens.tolist(), self.output_tokens.tolist(), strict=True)
        for at, (time_s, input_tokens, output_tokens) in enumerate(lengths):
            yield Request(time_s, self.ids[bounds[at] : bounds[at + 1]].tolist(), input_tokens, output_tokens)

    @property
    def unique_blocks(self) -> int:
        """How many blocks there are, each counted once."""
        return int(self.ids.max()) + 1 if len(self.ids) else 0

    def check(self) -> None:
        """Assert that the arrays fit together."""
        assert len(self.times_s) == len(self.input_tokens) == len(self.output_tokens) == len(self.offsets) - 1
        assert self.offsets[0] == 0
        assert self.offsets[-1] == len(self.ids)
        assert (np.diff(self.times_s) >= 0).all()
        assert (np.diff(self.offsets) == self.input_tokens // self.block_tokens).all()
        assert len(np.unique(self.ids)) == self.unique_blocks
        assert first_misplaced(self.ids, self.offsets) is None


def read_trace(path: str | Path, *, block_tokens: int | None = None, rekey: bool = False) -> Trace:
    """The trace in the file `path`; its times sorted if they are not.

    `block_tokens`: tokens of a block; without it from `-bN` in the file's name, else the one that fits all lengths.
    `rekey`: ids hash a block's own content; a block is then known by its id and all ids before it.
    Errors (`Kind.CONFIG`) name file and line.
    """
    path = Path(path)
    raw = _Raw(path.name)
    for number, text in _lines(path):
        raw.add(number, text)
    if not raw.times_s:
        raise _error(path.name, None, "has no requests")
    tokens = _block_tokens(raw, block_tokens)
    ids, offsets = _full_blocks(raw, tokens)
    if rekey:
        ids = _rekeyed(ids, offsets)
    else:
        _refuse_content_ids(raw, ids, offsets)
    return _by_time(raw, tokens, ids, offsets)


def first_misplaced(ids: np.ndarray, offsets: np.ndarray) -> tuple[int, int] | None:
    """Of blocks that stand behind another block than where they stood first: the first one's place, and how many."""
    if not len(ids):
        return None
    behind = _parents(ids, offsets)
    first_behind = np.empty(int(ids.max()) + 1, ids.dtype)
    first_behind[ids[::-1]] = behind[::-1]
    wrong = np.flatnonzero(first_behind[ids] != behind)
    return (int(wrong[0]), len(wrong)) if len(wrong) else None


def _parents(ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    parents = np.concatenate([np.array([-1], ids.dtype), ids[:-1]])
    parents[offsets[:-1][offsets[:-1] < offsets[1:]]] = -1
    return parents


class _Raw:
    """The file's requests, checked one by one; ids as numbers in order of appearance, partial blocks included."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines, self.counts = array("q"), array("q")
        self.times_s, self.inputs, self.outputs = array("d"), array("q"), array("q")
        self.ids = array("i")
        self._numbers: dict[Any, int] = {}

    def add(self, number: int, text: bytes) -> None:
        """Take one line; lines are counted from 1."""
        time_ms, input_tokens, output_tokens, ids = self._parsed(number, text)
        self.lines.append(number)
        self.times_s.append(time_ms / 1000)
        self.inputs.append(input_tokens)
        self.outputs.append(output_tokens)
        self.counts.append(len(ids))
        numbers = self._numbers
        self.ids.extend([numbers.setdefault(each, len(numbers)) for each in ids])

    def _parsed(self, number: int, text: bytes) -> tuple[float, int, int, list]:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _error(self.name, number, f"is no JSON ({error})") from None
        if not isinstance(found, dict):
            raise _error(self.name, number, "is no JSON object")
        missing = [name for name in _FIELDS if name not in found]
        if missing:
            raise _error(self.name, number, f"has no {missing[0]}")
        time_ms, input_tokens, output_tokens, ids = (found[name] for name in _FIELDS)
        if type(time_ms) not in (int, float) or not 0 <= time_ms < math.inf:
            raise _error(self.name, number, f"timestamp is no time in ms: {time_ms!r}")
        for name, value in (("input_length", input_tokens), ("output_length", output_tokens)):
            if type(value) is not int or not 0 <= value < 1 << _TOKENS_BITS:
                raise _error(self.name, number, f"{name} is no number of tokens: {value!r}")
        if not isinstance(ids, list) or not _ID_TYPES.issuperset(map(type, ids)):
            raise _error(self.name, number, "hash_ids is no list of numbers or strings")
        return time_ms, input_tokens, output_tokens, ids


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(_unpacked(file), 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise _error(path.name, None, f"cannot be read ({error.strerror or error})") from error
    except (zstandard.ZstdError, EOFError, zlib.error) as error:
        raise _error(path.name, None, f"is damaged ({error})") from error


def _unpacked(file: IO[bytes]) -> Iterable[bytes]:
    """The lines of a file, whatever its first bytes say it is packed with."""
    magic = file.read(4)
    file.seek(0)
    if magic == b"\x28\xb5\x2f\xfd":
        return _split(_zstd_chunks(file))
    return gzip.open(file) if magic[:2] == b"\x1f\x8b" else file


def _zstd_chunks(file: IO[bytes]) -> Iterator[bytes]:
    """The content of one frame after another; unlike the library's reader it does not take a cut file for a short one."""
    packed = zstandard.ZstdDecompressor()
    frame = packed.decompressobj()
    while data := file.read(_CHUNK_BYTES):
        while data:
            frame = packed.decompressobj() if frame.eof else frame
            yield frame.decompress(data)
            data = frame.unused_data
    if not frame.eof:
        raise EOFError("it ends within a frame")


def _split(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    yield rest


def _block_tokens(raw: _Raw, given: int | None) -> int:
    named = re.search(r"-b([1-9]\d*)(?=[._-]|$)", raw.name)
    if given is not None:
        if given < 1:
            raise TieredKVError(Kind.CONFIG, f"--block-tokens: {given} is no number of tokens", setting="block_tokens")
        return given
    return int(named[1]) if named else _fitting_block_tokens(raw)


def _fitting_block_tokens(raw: _Raw) -> int:
    """The block size that explains how many ids each request has; of several that are close the only power of two."""
    inputs, counts = np.array(raw.inputs), np.array(raw.counts)
    fewer, more = np.maximum(counts - 1, 0), counts + 1
    with_partial = -(-inputs // np.maximum(counts, 1)), _bounds(inputs - 1, fewer)
    full_only = inputs // more + 1, _bounds(inputs, counts)
    mixed = full_only[0], _bounds(inputs, fewer)
    for lows, highs in (with_partial, full_only, mixed):
        low, high = max(1, int(lows.max())), int(highs.min())
        fitting = [low] if low == high else [1 << bit for bit in range(_TOKENS_BITS) if low <= 1 << bit <= high]
        if len(fitting) == 1 and high <= 1.25 * low:
            return fitting[0]
    raise _error(raw.name, None, "does not show how many tokens a block has: give --block-tokens (Mooncake's own traces: 512)")


def _bounds(tokens: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """The largest block size of which `blocks` blocks fit into `tokens`."""
    return np.where(blocks > 0, tokens // np.maximum(blocks, 1), 1 << _TOKENS_BITS)


def _full_blocks(raw: _Raw, block_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and offsets without partial blocks, ids renumbered without gaps."""
    inputs, counts = np.array(raw.inputs), np.array(raw.counts)
    full = inputs // block_tokens
    wrong = np.flatnonzero((counts < full) | (counts > full + 1))  # some writers give an id to a last block of no tokens
    if len(wrong):
        at = wrong[0]
        said = f"has {counts[at]} hash_ids, but {inputs[at]} tokens are {full[at]} blocks of {block_tokens} (see --block-tokens)"
        raise _error(raw.name, raw.lines[at], said)
    starts = np.cumsum(counts) - counts
    offsets = np.concatenate([[0], np.cumsum(full)])
    places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], full)
    return _dense(np.frombuffer(raw.ids, np.int32)[places] if len(places) else np.empty(0, np.int32)), offsets


def _dense(ids: np.ndarray) -> np.ndarray:
    """The same ids as 0, 1, … in the order of their first use."""
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    return rank[inverse]


def _rekeyed(ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Ids of prefixes from ids of contents: the nodes of the trie of all requests."""
    nodes: dict[int, int] = {}
    width = int(ids.max()) + 1 if len(ids) else 1
    out = array("i")
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        node = -1
        for each in ids[begin:end].tolist():
            node = nodes.setdefault((node + 1) * width + each, len(nodes))
            out.append(node)
    return np.array(out, np.int32)


def _refuse_content_ids(raw: _Raw, ids: np.ndarray, offsets: np.ndarray) -> None:
    misplaced = first_misplaced(ids, offsets)
    if misplaced is None:
        return
    place, count = misplaced
    at = int(np.searchsorted(offsets, place, side="right")) - 1
    said = (
        f"has a block behind another block than before (or twice in one request), as {count} of {len(ids)} blocks have: "
        "ids that hash a block's content alone need --rekey"
    )
    raise _error(raw.name, raw.lines[at], said)


def _by_time(raw: _Raw, block_tokens: int, ids: np.ndarray, offsets: np.ndarray) -> Trace:
    times_s, inputs, outputs = (np.array(each) for each in (raw.times_s, raw.inputs, raw.outputs))
    if len(times_s) > 1 and not np.ptp(times_s):
        note = f"{raw.name}: all requests have the same time; taken as one a second"
        return Trace(raw.name, block_tokens, np.arange(len(times_s), dtype=float), inputs, outputs, ids, offsets, (note,))
    early = int((np.diff(times_s) < 0).sum())
    if not early:
        return Trace(raw.name, block_tokens, times_s, inputs, outputs, ids, offsets)
    order = np.argsort(times_s, kind="stable")
    counts = np.diff(offsets)[order]
    sorted_offsets = np.concatenate([[0], np.cumsum(counts)])
    places = np.arange(offsets[-1]) + np.repeat(offsets[:-1][order] - sorted_offsets[:-1], counts)
    note = f"{raw.name}: {early} requests come before their predecessor; sorted by time"
    return Trace(raw.name, block_tokens, times_s[order], inputs[order], outputs[order], _dense(ids[places]), sorted_offsets, (note,))


def _error(name: str, line: int | None, said: str) -> TieredKVError:
    where = name if line is None else f"{name}, line {line}"
    return TieredKVError(Kind.CONFIG, f"trace {where}: {said}", setting="trace")
