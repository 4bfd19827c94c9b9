"""Reads memory figures: of this process, its machine or container, and its GPU."""

from pathlib import Path
from typing import NamedTuple

import psutil

_CGROUP = Path("/sys/fs/cgroup")  # psutil reports the machine, not the container


class MemoryFigures(NamedTuple):
    """Sizes of memory in bytes, of the host or of a CUDA device.

    `total_bytes`: for the host, the container's limit if it is lower than the machine's memory. `process_bytes`: for the host, the
    resident memory of this process; for a CUDA device, what torch has reserved in it.
    """

    total_bytes: int
    available_bytes: int
    process_bytes: int

    @property
    def used_share(self) -> float:
        """The share of `total_bytes` that is in use, 0 to 1."""
        return 1 - self.available_bytes / self.total_bytes if self.total_bytes else 0.0


def host_memory() -> MemoryFigures:
    """Returns the memory figures of the machine or container, from the kernel. Cost: about 100 µs."""
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is not None and used is not None and limit < total:
        cached = _inactive_file_bytes()
        total, available = limit, min(max(limit - used + cached, 0), available)
    return MemoryFigures(total, available, psutil.Process().memory_info().rss)


def device_memory(device: object) -> MemoryFigures | None:
    """Returns the memory figures of a CUDA device, or None for any other device."""
    import torch

    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    available, total = torch.cuda.mem_get_info(device)
    return MemoryFigures(total, available, torch.cuda.memory_reserved(device))


def _number(path: Path) -> int | None:
    """Returns the number in a kernel file, or None if there is no such file or no limit."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _inactive_file_bytes() -> int:
    """Returns the bytes of cached files that the container could free at once."""
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
