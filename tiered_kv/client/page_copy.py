"""Copies between an engine's KV pages and blocks in the arena: many pieces in one call, without the interpreter's lock.

An engine keeps the KV of one of its blocks as one page in each of several arrays, such as an array a layer. A block of the cache is
these pages one after the other. On the CPU each page is one `memmove`, which is fastest as long as no other thread wants the interpreter's
lock. Beside a busy thread, 330 copies wait for the lock 330 times. So as soon as copies take too long, one system call makes all that
are left: `process_vm_readv` on this process itself (docs/design/027). Pages on an accelerator are gathered there first, and cross the
bus as one tensor a block.
"""

import ctypes
import errno
import logging
import os
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from tiered_kv.errors import Kind, TieredKVError

log = logging.getLogger(__name__)

PIECES_MAX = 1024
"""The most pieces that the kernel takes in one call (IOV_MAX)."""
PATIENCE_S = 0.001
SLOW_BYTES_PER_S = 2 << 30
"""Copies one by one may take PATIENCE_S plus the time of a copy at this rate. After that a system call makes the rest."""
BYTES_MAX = 1 << 30
"""The most bytes that we copy in one call. The kernel's limit is 2 GiB."""


class Pages(Protocol):
    """The pages of an engine. `block_bytes`: the bytes of one block's pages together."""

    block_bytes: int

    def scatter(self, memory: torch.Tensor, offsets: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy the payload at `offsets[i]` of `memory` (1-D uint8, on the CPU) to the pages of block `blocks[i]`, for each i."""

    def gather(self, memory: torch.Tensor, offsets: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy the pages of block `blocks[i]` to the payload at `offsets[i]` of `memory`, for each i."""


def pages_of(arrays: Sequence[torch.Tensor]) -> Pages:
    """Returns the pages in `arrays`. Each array is (blocks, page bytes) of uint8 with contiguous rows, all on one device.

    Raises (kind `layout`) for other arrays.
    """
    if not arrays:
        raise TieredKVError(Kind.LAYOUT, "pages: at least one array is needed")
    for number, array in enumerate(arrays):
        if array.ndim != 2 or array.dtype != torch.uint8 or array.stride(1) != 1 or not array.numel():
            raise TieredKVError(
                Kind.LAYOUT,
                f"pages: array {number} must be (blocks, bytes) of uint8 with contiguous rows,"
                f" got {tuple(array.shape)} of {array.dtype} with strides {array.stride()}",
            )
        if array.device != arrays[0].device or len(array) != len(arrays[0]):
            raise TieredKVError(
                Kind.LAYOUT,
                f"pages: all arrays must be on one device and have as many blocks, got {len(array)} on {array.device} in array {number},"
                f" and {len(arrays[0])} on {arrays[0].device} in array 0",
            )
    return HostPages(arrays) if arrays[0].is_cpu else DevicePages(arrays)


class HostPages:
    """Pages in this process's memory. Copies of any number of blocks are a few system calls."""

    def __init__(self, arrays: Sequence[torch.Tensor]) -> None:
        self._arrays = list(arrays)  # keeps their memory alive
        self._count = len(arrays[0])
        self._bases = np.array([array.data_ptr() for array in arrays], np.uint64)
        self._steps = np.array([array.stride(0) for array in arrays], np.uint64)
        self._sizes = np.array([array.shape[1] for array in arrays], np.uint64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.block_bytes = int(self._sizes.sum())

    def scatter(self, memory: torch.Tensor, offsets: Sequence[int], blocks: Sequence[int]) -> None:
        pages, payloads, sizes = self._pieces(memory, offsets, blocks)
        copy_pieces(pages, payloads, sizes)

    def gather(self, memory: torch.Tensor, offsets: Sequence[int], blocks: Sequence[int]) -> None:
        pages, payloads, sizes = self._pieces(memory, offsets, blocks)
        copy_pieces(payloads, pages, sizes)

    def _pieces(self, memory: torch.Tensor, offsets: Sequence[int], blocks: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the address of each page, the address of its piece of a payload, and its size. Checks all bounds."""
        _check_bounds(memory, offsets, blocks, self.block_bytes, self._count)
        numbers, starts = np.array(blocks, np.uint64)[:, None], np.array(offsets, np.uint64)[:, None]
        pages = self._bases + numbers * self._steps
        payloads = np.uint64(memory.data_ptr()) + starts + self._starts
        return pages.ravel(), payloads.ravel(), np.tile(self._sizes, len(blocks))


class DevicePages:
    """Pages on an accelerator, or anywhere that torch can index.

    A transfer is one indexed copy for each array, and one copy across the bus for each block.
    """

    def __init__(self, arrays: Sequence[torch.Tensor]) -> None:
        self._arrays = list(arrays)
        self._sizes = [array.shape[1] for array in arrays]
        self.block_bytes = sum(self._sizes)

    def scatter(self, memory: torch.Tensor, offsets: Sequence[int], blocks: Sequence[int]) -> None:
        _check_bounds(memory, offsets, blocks, self.block_bytes, len(self._arrays[0]))
        device = self._arrays[0].device
        staged = torch.empty(len(blocks), self.block_bytes, dtype=torch.uint8, device=device)
        for row, offset in zip(staged, offsets, strict=True):
            row.copy_(memory[offset : offset + self.block_bytes])
        numbers = torch.tensor(list(blocks), dtype=torch.int64, device=device)
        for array, part in zip(self._arrays, staged.split(self._sizes, 1), strict=True):
            array.index_copy_(0, numbers, part)
        _settle(device)

    def gather(self, memory: torch.Tensor, offsets: Sequence[int], blocks: Sequence[int]) -> None:
        _check_bounds(memory, offsets, blocks, self.block_bytes, len(self._arrays[0]))
        device = self._arrays[0].device
        numbers = torch.tensor(list(blocks), dtype=torch.int64, device=device)
        staged = torch.cat([array.index_select(0, numbers) for array in self._arrays], 1)
        for row, offset in zip(staged, offsets, strict=True):
            memory[offset : offset + self.block_bytes].copy_(row)
        _settle(device)


def _settle(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _check_bounds(memory: torch.Tensor, offsets: Sequence[int], blocks: Sequence[int], block_bytes: int, count: int) -> None:
    """Raise ValueError unless every copy stays within the memory and the pages: a wrong number would overwrite other memory."""
    if len(offsets) != len(blocks):
        raise ValueError(f"pages: as many offsets as blocks are needed, got {len(offsets)} and {len(blocks)}")
    if not memory.is_cpu or memory.dtype != torch.uint8 or not memory.is_contiguous():
        raise ValueError(f"pages: memory must be contiguous uint8 on the CPU, got {memory.dtype} on {memory.device}")
    if blocks and not (min(blocks) >= 0 and max(blocks) < count):
        raise ValueError(f"pages: block numbers must be from 0 to {count - 1}, got {min(blocks)} to {max(blocks)}")
    if offsets and not (min(offsets) >= 0 and max(offsets) + block_bytes <= memory.numel()):
        raise ValueError(f"pages: offsets must be from 0 to {memory.numel() - block_bytes}, got {min(offsets)} to {max(offsets)}")


# One system call for many copies

_libc = ctypes.CDLL(None, use_errno=True)
_readv = getattr(_libc, "process_vm_readv", None)
if _readv is not None:
    _readv.argtypes = [ctypes.c_int, *(ctypes.c_void_p, ctypes.c_ulong) * 2, ctypes.c_ulong]
    _readv.restype = ctypes.c_ssize_t
_is_refused = _readv is None  # not Linux


def copy_pieces(targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> None:
    """Copy `sizes[i]` bytes from the address `sources[i]` to `targets[i]`, for each i. All arrays are uint64.

    The kernel makes most of the copies, many in one system call, while the interpreter's lock is free. Raises (kind `memory`) if an
    address is not mapped. An address that is mapped but wrong is not noticed: the caller must ensure that all are right.
    """
    global _is_refused
    first, ends = 0 if _is_refused else _copied_alone(targets, sources, sizes), np.cumsum(sizes)
    while first < len(sizes):
        done = int(ends[first - 1]) if first else 0
        last = min(first + PIECES_MAX, int(np.searchsorted(ends, done + BYTES_MAX, "right")))
        last = max(last, first + 1)
        if _is_refused or not _copied(targets[first:last], sources[first:last], sizes[first:last]):
            _is_refused = True
            for target, source, nbytes in zip(*(each[first:last].tolist() for each in (targets, sources, sizes)), strict=True):
                ctypes.memmove(target, source, nbytes)
        first = last


def _copied_alone(targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> int:
    """Copy piece by piece until that takes too long, because another thread holds the lock. Returns how many pieces were copied."""
    until_s = time.perf_counter() + PATIENCE_S
    for number, (target, source, nbytes) in enumerate(zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True)):
        ctypes.memmove(target, source, nbytes)
        until_s += nbytes / SLOW_BYTES_PER_S
        if time.perf_counter() > until_s:
            return number + 1
    return len(sizes)


def _copied(targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> bool:
    """Copy the pieces in one call. Returns False if the system does not allow that."""
    local, remote = np.stack([targets, sizes], 1), np.stack([sources, sizes], 1)  # arrays of struct iovec
    count, nbytes = len(sizes), int(sizes.sum())
    assert _readv is not None
    copied = _readv(os.getpid(), local.ctypes.data, count, remote.ctypes.data, count, 0)
    if copied == nbytes:
        return True
    number = ctypes.get_errno() if copied < 0 else 0
    if copied >= 0 or number == errno.EFAULT:
        raise TieredKVError(Kind.MEMORY, f"pages: only {max(copied, 0)} of {nbytes} bytes could be copied; mapped memory has gone")
    log.warning("copies of KV pages are made one by one, because process_vm_readv is refused (%s)", os.strerror(number))
    return False
