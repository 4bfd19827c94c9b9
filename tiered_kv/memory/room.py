"""The room in shared memory: how much is free, and the error if it is too little."""

import os
from pathlib import Path

from tiered_kv.errors import Kind, TieredKVError


def available_bytes(shm_path: Path) -> int:
    """Returns the free bytes of the file system; on /dev/shm at most the machine's free memory and swap."""
    facts = os.statvfs(shm_path)
    room_bytes = facts.f_bavail * facts.f_frsize
    if os.stat(shm_path).st_dev == os.stat("/dev/shm").st_dev:
        import psutil  # here, so that workers, which only attach, do not load it

        room_bytes = min(room_bytes, psutil.virtual_memory().available + psutil.swap_memory().free)
    return room_bytes


def require_room(shm_path: Path, needed_bytes: int) -> None:
    """Raise (kind `memory`) if there is too little room. Without this check, a tmpfs would fill up before it fails, for all its users."""
    room_bytes = available_bytes(shm_path)
    if needed_bytes > room_bytes:
        raise too_small(shm_path, needed_bytes, room_bytes)


def too_small(shm_path: Path, needed_bytes: int, available_bytes: int) -> TieredKVError:
    """Returns the error for a node whose files do not fit into shared memory."""
    return TieredKVError(
        Kind.MEMORY,
        f"host: {needed_bytes / 2**20:.1f} MiB are needed, but shm_path {shm_path} has {available_bytes / 2**20:.1f} MiB available;"
        " lower host, enlarge the shared memory (containers: --shm-size), or set shm_path to a larger memory file system",
        setting="host",
        shm_path=str(shm_path),
        needed_bytes=needed_bytes,
        available_bytes=available_bytes,
    )
