"""Request traces in Mooncake's format: one JSON object a line, uncompressed or compressed with gzip or zstandard.

Fields: `timestamp` (ms), `input_length` and `output_length` (tokens), `hash_ids` (one id for each block of the input). The last
block of an input may be partial. Equal ids mean equal prefixes. Format: Qin et al., Mooncake, FAST 2025.
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
_TOKENS_BITS = 40  # a request with 2 ** 40 tokens or more is an error


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace: its time, the keys of its full blocks from the first on, and its lengths in tokens."""

    time_s: float
    keys: list[int]
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Trace:
    """A trace in memory, sorted by time. It contains only full blocks, numbered 0, 1, … in the order of their first use.

    Request i has the blocks `ids[offsets[i]:offsets[i + 1]]`. About 20 MB for 5 million blocks.
    """

    name: str
    block_tokens: int
    times_s: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    ids: np.ndarray
    offsets: np.ndarray
    notes: tuple[str, ...] = field(default=())
    """Messages for the user about how the file was read."""

    def __len__(self) -> int:
        return len(self.times_s)

    def __iter__(self) -> Iterator[Request]:
        bounds = self.offsets.tolist()
        lengths = zip(self.times_s.tolist(), self.input_tokens.tolist(), self.output_tokens.tolist(), strict=True)
        for at, (time_s, input_tokens, output_tokens) in enumerate(lengths):
            yield Request(time_s, self.ids[bounds[at] : bounds[at + 1]].tolist(), input_tokens, output_tokens)

    @property
    def unique_blocks(self) -> int:
        """The number of different blocks in the trace."""
        return int(self.ids.max()) + 1 if len(self.ids) else 0

    def check(self) -> None:
        """Assert that the arrays are consistent."""
        assert len(self.times_s) == len(self.input_tokens) == len(self.output_tokens) == len(self.offsets) - 1
        assert self.offsets[0] == 0
        assert self.offsets[-1] == len(self.ids)
        assert (np.diff(self.times_s) >= 0).all()
        assert (np.diff(self.offsets) == self.input_tokens // self.block_tokens).all()
        assert len(np.unique(self.ids)) == self.unique_blocks
        assert first_misplaced(self.ids, self.offsets) is None


def read_trace(path: str | Path, *, block_tokens: int | None = None, rekey: bool = False) -> Trace:
    """Returns the trace in the file `path`, sorted by time.

    `block_tokens`: number of tokens in a block. None takes it from `-bN` in the file's name, or else derives it from the lengths.
    `rekey`: for traces whose ids hash only a block's own content. A block is then identified by its id and all previous ids of its
    request. Raises (kind `config`), naming file and line, if the trace is invalid.
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
    """Find blocks whose parent is not the same as at their first use.

    Returns the index in `ids` of the first such block and the number of such blocks, or None if there is none.
    """
    if not len(ids):
        return None
    parents = _parents(ids, offsets)
    first_parents = np.empty(int(ids.max()) + 1, ids.dtype)
    first_parents[ids[::-1]] = parents[::-1]
    wrong = np.flatnonzero(first_parents[ids] != parents)
    return (int(wrong[0]), len(wrong)) if len(wrong) else None


def _parents(ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    parents = np.concatenate([np.array([-1], ids.dtype), ids[:-1]])
    parents[offsets[:-1][offsets[:-1] < offsets[1:]]] = -1
    return parents


class _Raw:
    """The requests of a file, validated one by one. Ids are numbers in order of appearance, and partial blocks are included."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines, self.counts = array("q"), array("q")
        self.times_s, self.inputs, self.outputs = array("d"), array("q"), array("q")
        self.ids = array("i")
        self._numbers: dict[Any, int] = {}

    def add(self, number: int, text: bytes) -> None:
        """Add one line of the file. Line numbers start at 1."""
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
            raise _error(self.name, number, f"must be a JSON object, got invalid JSON ({error})") from None
        if not isinstance(found, dict):
            raise _error(self.name, number, f"must be a JSON object, got {type(found).__name__}")
        missing = [name for name in _FIELDS if name not in found]
        if missing:
            raise _error(self.name, number, f"must have the field {missing[0]}, got only {', '.join(map(str, found)) or 'no fields'}")
        time_ms, input_tokens, output_tokens, ids = (found[name] for name in _FIELDS)
        if type(time_ms) not in (int, float) or not 0 <= time_ms < math.inf:
            raise _error(self.name, number, f"timestamp must be a time in ms of at least 0, got {time_ms!r}")
        for name, value in (("input_length", input_tokens), ("output_length", output_tokens)):
            if type(value) is not int or not 0 <= value < 1 << _TOKENS_BITS:
                raise _error(self.name, number, f"{name} must be a number of tokens from 0 to 2^{_TOKENS_BITS} - 1, got {value!r}")
        if not isinstance(ids, list) or not _ID_TYPES.issuperset(map(type, ids)):
            elements = [each for each in ids if type(each) not in _ID_TYPES] if isinstance(ids, list) else []
            got = f"the element {elements[0]!r:.80}" if elements else f"{ids!r:.80}"
            raise _error(self.name, number, f"hash_ids must be a list of numbers or strings, got {got}")
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
        raise _error(path.name, None, f"is damaged or incomplete ({error})") from error


def _unpacked(file: IO[bytes]) -> Iterable[bytes]:
    """Returns the lines of a file. The file's first bytes decide how it is decompressed."""
    magic = file.read(4)
    file.seek(0)
    if magic == b"\x28\xb5\x2f\xfd":
        return _split(_zstd_chunks(file))
    return gzip.open(file) if magic[:2] == b"\x1f\x8b" else file


def _zstd_chunks(file: IO[bytes]) -> Iterator[bytes]:
    """Yields the content of all zstd frames of a file. The library's own reader would treat a truncated file as a shorter one."""
    packed = zstandard.ZstdDecompressor()
    frame = packed.decompressobj()
    while data := file.read(_CHUNK_BYTES):
        while data:
            frame = packed.decompressobj() if frame.eof else frame
            yield frame.decompress(data)
            data = frame.unused_data
    if not frame.eof:
        raise EOFError("the file ends inside a zstd frame")


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
            raise TieredKVError(Kind.CONFIG, f"--block-tokens: must be at least 1, got {given}", setting="block_tokens")
        return given
    return int(named[1]) if named else _fitting_block_tokens(raw)


def _fitting_block_tokens(raw: _Raw) -> int:
    """Returns the block size in tokens that fits the lengths and the numbers of ids of all requests.

    If several sizes fit, which differ by at most a quarter, returns the only power of two among them. Raises (kind `config`) if
    no size can be chosen this way.
    """
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
    said = "the block size cannot be derived from the lengths: give --block-tokens (Mooncake's own traces: 512)"
    raise _error(raw.name, None, said)


def _bounds(tokens: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Returns the largest block size for which `blocks` full blocks fit into `tokens`."""
    return np.where(blocks > 0, tokens // np.maximum(blocks, 1), 1 << _TOKENS_BITS)


def _full_blocks(raw: _Raw, block_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids and offsets of a `Trace`, without partial blocks. The ids are renumbered without gaps."""
    inputs, counts = np.array(raw.inputs), np.array(raw.counts)
    full = inputs // block_tokens
    wrong = np.flatnonzero((counts < full) | (counts > full + 1))  # some writers add an id for a last block without tokens
    if len(wrong):
        at = wrong[0]
        allowed = f"{full[at]} or {full[at] + 1} ids for {inputs[at]} tokens in blocks of {block_tokens}"
        said = f"hash_ids must have {allowed}, got {counts[at]} (see --block-tokens)"
        raise _error(raw.name, raw.lines[at], said)
    starts = np.cumsum(counts) - counts
    offsets = np.concatenate([[0], np.cumsum(full)])
    places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], full)
    return _dense(np.frombuffer(raw.ids, np.int32)[places] if len(places) else np.empty(0, np.int32)), offsets


def _dense(ids: np.ndarray) -> np.ndarray:
    """Returns ids renumbered as 0, 1, … in the order of their first use."""
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    return rank[inverse]


def _rekeyed(ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Returns ids of prefixes for ids of block contents. A prefix's id is the number of its node in a trie of all requests."""
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
        f"a block has another parent than at its first use, or is twice in one request, like {count} of {len(ids)} blocks in the file; "
        "if ids hash only a block's own content, use --rekey"
    )
    raise _error(raw.name, raw.lines[at], said)


def _by_time(raw: _Raw, block_tokens: int, ids: np.ndarray, offsets: np.ndarray) -> Trace:
    times_s, inputs, outputs = (np.array(each) for each in (raw.times_s, raw.inputs, raw.outputs))
    if len(times_s) > 1 and not np.ptp(times_s):
        note = f"{raw.name}: all requests have the same time; replayed as one request a second"
        return Trace(raw.name, block_tokens, np.arange(len(times_s), dtype=float), inputs, outputs, ids, offsets, (note,))
    early = int((np.diff(times_s) < 0).sum())
    if not early:
        return Trace(raw.name, block_tokens, times_s, inputs, outputs, ids, offsets)
    order = np.argsort(times_s, kind="stable")
    counts = np.diff(offsets)[order]
    sorted_offsets = np.concatenate([[0], np.cumsum(counts)])
    places = np.arange(offsets[-1]) + np.repeat(offsets[:-1][order] - sorted_offsets[:-1], counts)
    note = f"{raw.name}: {early} requests have an earlier time than the previous line; sorted by time"
    return Trace(raw.name, block_tokens, times_s[order], inputs[order], outputs[order], _dense(ids[places]), sorted_offsets, (note,))


def _error(name: str, line: int | None, said: str) -> TieredKVError:
    where = name if line is None else f"{name}, line {line}"
    return TieredKVError(Kind.CONFIG, f"trace {where}: {said}", setting="trace")
