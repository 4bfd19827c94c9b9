"""Measures the speed of codecs, relative to a memcpy of the raw bytes in the same run and to a prefill of the same tokens.

Each thread has its own blocks and computes alone (torch with one thread). Copying, encoding and decoding cycle through a working
set larger than the processor's caches, so that they read and write main memory. They alternate every few blocks, because a fetch
also has a few blocks. With several threads all run the same operation at the same time, including the memcpy.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from statistics import median
from threading import Barrier
from typing import Any

import torch

from tiered_kv.codecs import Calibration, Codec, Encoded, codec_for
from tiered_kv.integrations.prefix import prefix_kv
from tiered_kv.layout import KVLayout
from tiered_kv.tools.bench.quality import CODECS, encoded_block

WORKING_SET_BYTES = 256 << 20
TURNS, TURNS_LEAST = 12, 4
TURN_BLOCKS = 8
SECONDS_MAX = 10.0
"""After this time fewer than `TURNS` turns are measured, but at least `TURNS_LEAST`."""


@dataclass(frozen=True)
class _Lane:
    """The data of one thread: for each block its codec, its raw bytes, the output of decoding, and its encoded payload."""

    codecs: list[Codec]
    raws: list[torch.Tensor]
    outs: list[torch.Tensor]
    payloads: list[tuple[Codec, memoryview]]

    def seconds(self, operation: str, first: int) -> list[float]:
        """Returns the seconds of an operation on each of the next `TURN_BLOCKS` blocks, starting at block `first`."""
        run: Callable[[int], Any] = getattr(self, f"_{operation}")
        return [_seconds(run, at % len(self.raws)) for at in range(first, first + TURN_BLOCKS)]

    def _copy(self, at: int) -> None:
        self.outs[at].copy_(self.raws[at])

    def _encode(self, at: int) -> None:
        self.codecs[at].encode(self.raws[at])

    def _decode(self, at: int) -> None:
        codec, payload = self.payloads[at]
        codec.decode(payload, self.outs[at])


OPERATIONS = ("copy", "encode", "decode")


def speeds(
    kvs: Sequence[torch.Tensor],
    codecs: Sequence[str] = CODECS,
    rope: bytes | None = None,
    block_tokens: Sequence[int] = (16, 64, 256),
    *,
    threads: int = 1,
    calibration: Calibration | None = None,
    working_set_bytes: int = WORKING_SET_BYTES,
    turns: int = TURNS,
) -> list[dict]:
    """Measure encoding and decoding the blocks of some texts' KV, relative to memcpy. Returns one record per codec and block size.

    kvs: the KV of each text, (L, 2, H, T, D), starting at position 0. The speed ratios are ratios of median times.
    `decode_us_per_token` is the time in one thread while the other threads decode too. Needs memory for twice the working set and
    for the payloads.
    """
    with one_thread():
        return [
            _speed(_TextBlocks.of(kvs, name, tokens, rope, calibration), threads, working_set_bytes, turns)
            for tokens in block_tokens
            for name in codecs
        ]


def prefill_us_per_token(model: Any, ids: torch.Tensor) -> float:
    """Returns the microseconds per token of a prefill of the prompt (1, n) with one thread: the faster of two runs."""
    with one_thread():
        return 1e6 * min(_seconds(lambda _: prefix_kv(model, ids, model.dtype), 0) for _ in range(2)) / ids.shape[1]


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread until the end of the with block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _TextBlocks:
    """The blocks of some texts: their raw bytes, and their encoded form in one codec."""

    name: str
    layout: KVLayout
    codecs: list[Codec]
    raws: list[torch.Tensor]
    encoded: list[Encoded]

    @classmethod
    def of(cls, kvs: Sequence[torch.Tensor], name: str, tokens: int, rope: bytes | None, calibration: Calibration | None) -> "_TextBlocks":
        layers, _, heads, _, dim = kvs[0].shape
        layout = KVLayout(layers, heads, dim, kvs[0].dtype, tokens)
        codec = codec_for(name, layout, rope=rope, calibration=calibration)
        places = [(kv, start) for kv in kvs for start in range(0, kv.shape[3] - tokens + 1, tokens)]
        pairs = [encoded_block(kv, codec, start, tokens) for kv, start in places]
        return cls(name, layout, [codec.at(start) for _, start in places], *map(list, zip(*pairs, strict=True)))

    def lane(self, nbytes: int) -> _Lane:
        """Returns the data of one thread: copies of all blocks, as often as they fit into `nbytes` but at least once."""
        rounds = max(nbytes // (self.layout.block_bytes * len(self.raws)), 1)
        raws = [raw.clone() for _ in range(rounds) for raw in self.raws]
        payloads = [(each.codec, memoryview(bytes(each.payload))) for _ in range(rounds) for each in self.encoded]
        return _Lane(self.codecs * rounds, raws, [torch.zeros_like(raw) for raw in raws], payloads)

    @property
    def ratio(self) -> float:
        return sum(raw.numel() for raw in self.raws) / sum(each.payload.nbytes for each in self.encoded)


def _speed(blocks: _TextBlocks, threads: int, working_set_bytes: int, turns: int) -> dict:
    took_s = _took_s([blocks.lane(working_set_bytes // threads) for _ in range(threads)], turns)
    memcpy_s, encode_s, decode_s = (median(took_s[operation]) for operation in OPERATIONS)
    return {
        "codec": blocks.name,
        "threads": threads,
        "block_tokens": blocks.layout.block_tokens,
        "block_bytes": blocks.layout.block_bytes,
        "ratio": blocks.ratio,
        "blocks": len(blocks.encoded),
        "fell_back": sum(bool(each.fell_back) for each in blocks.encoded),
        "memcpy_bytes_s": threads * blocks.layout.block_bytes / memcpy_s,
        "encode_vs_memcpy": memcpy_s / encode_s,
        "decode_vs_memcpy": memcpy_s / decode_s,
        "decode_us_per_token": 1e6 * decode_s / blocks.layout.block_tokens,
        "repetitions": len(took_s["decode"]),
    }


def _took_s(lanes: list[_Lane], turns: int) -> dict[str, list[float]]:
    """Returns the seconds of single blocks by operation.

    All lanes run the same operation at a time, each in its own thread.
    """
    took_s: dict[str, list[float]] = {operation: [] for operation in OPERATIONS}
    together = Barrier(len(lanes))

    def run(lane: _Lane, operation: str, first: int) -> list[float]:
        together.wait()
        return lane.seconds(operation, first)

    end_s = time.perf_counter() + SECONDS_MAX
    with ThreadPoolExecutor(len(lanes), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for turn in range(turns):
            if turn >= TURNS_LEAST and time.perf_counter() > end_s:
                break
            for place, operation in enumerate(OPERATIONS):
                first = turn * TURN_BLOCKS + place * len(lanes[0].raws) // len(OPERATIONS)
                for found_s in pool.map(run, lanes, repeat(operation), repeat(first)):
                    took_s[operation] += found_s
    return took_s


def _seconds(run: Callable[[int], Any], at: int) -> float:
    begun = time.perf_counter()
    run(at)
    return time.perf_counter() - begun
