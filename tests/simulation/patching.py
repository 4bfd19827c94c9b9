"""Puts the simulated modules into the places of the real ones, in all modules of tiered_kv that run in a node, a worker or the coordinator.

Sizes are made small, so that a few blocks fill a tier. The seqlock's barriers become switch points: the code has one exactly between its
steps, for machines that may reorder memory accesses.
"""

import concurrent.futures._base
import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import tiered_kv.node.node  # noqa: F401 - with all that it imports
from tests.simulation.files import Descriptors, DiskFiles, OsModule, request
from tests.simulation.primitives import QUEUE, SECRETS, THREADING, TIME, world_here
from tests.simulation.scheduler import World
from tests.simulation.sockets import SocketModule, Wires
from tiered_kv import config, forking, threads
from tiered_kv.client import connect, decoders, kv_copy, page_copy  # noqa: F401
from tiered_kv.coordinator import coordinator, directory  # noqa: F401
from tiered_kv.memory import extents, index, words
from tiered_kv.node import seals, storage, tier_factory
from tiered_kv.tiers import host
from tiered_kv.tiers.disk import folder, segments, tier
from tiered_kv.tiers.objects.folder_store import FolderStore

FOLDERS = ("client", "node", "coordinator", "memory", "protocol", "store", "tiers")
ROOTS = ("tiered_kv.threads", "tiered_kv.clock", "tiered_kv.keys")
SMALLEST_BYTES = 16 << 10
NAP_SHARE = 0.15
"""How often a copy between a worker's tensor and the arena is interrupted."""
UNPACK_S_MAX, PACK_S_MAX = 0.01, 0.06
"""For how long it is interrupted at most: a fetch must end in time, and a node may restart during a store."""
FENCE_SHARE = 0.1
"""How often another task is next at a step of the seqlock."""


def _modules() -> list[ModuleType]:
    """Returns the modules of tiered_kv whose names are replaced."""
    prefixes = tuple(f"tiered_kv.{folder}" for folder in FOLDERS)
    names = [name for name in sys.modules if name.startswith(prefixes) or name in ROOTS]
    return [sys.modules[name] for name in sorted(names)]


def _yields(call: Any, share: float | None = None, nap_s_max: float = 0.0) -> Any:
    """Returns a function that calls `call` between two switch points. `nap_s_max`: for how long at most the task may then be paused."""

    def pausing(*arguments: Any, **options: Any) -> Any:
        world = world_here()
        if world is None or world.over:
            return call(*arguments, **options)
        world.reach(call.__name__)
        for each in (True, False):
            if nap_s_max and world.random.random() < NAP_SHARE:
                world.sleep(world.random.random() * nap_s_max)
            else:
                world.pause(share)
            if each:
                result = call(*arguments, **options)
        return result

    return pausing


def _fence() -> None:
    world = world_here()
    if world is not None and not world.over:
        world.pause(FENCE_SHARE)


class _NoFinalizer:
    """Stands in for `weakref.finalize` of an object that is never freed."""

    def __init__(self, *_: object) -> None:
        self.atexit = False

    def detach(self) -> None:
        pass


def _open(path: Any, mode: str, opener: Any) -> Any:
    """As `open`, for a file object that closes its descriptor itself."""
    return open(path, mode, opener=lambda path, flags: os.open(path, flags, 0o600))


@contextmanager
def simulated(world: World, wires: Wires, *, fences: bool) -> Iterator[Descriptors]:
    """A context in which tiered_kv runs in `world`. `fences`: whether the steps of the seqlock are switch points."""
    descriptors = Descriptors()
    os_module = OsModule(descriptors, wires)
    replaced: dict[str, tuple[object, object]] = {
        "threading": (threading, THREADING),
        "time": (time, TIME),
        "queue": (queue, QUEUE),
        "secrets": (secrets, SECRETS),
        "socket": (socket, SocketModule(wires)),
        "os": (os, os_module),
    }
    with ExitStack() as undo:
        for module in _modules():
            for name, (real, simulated_one) in replaced.items():
                if vars(module).get(name) is real:
                    undo.enter_context(patch.object(module, name, simulated_one))
        for name in ("threading", "time"):
            undo.enter_context(patch.object(concurrent.futures._base, name, replaced[name][1]))
        for target, name, value in _replacements(os_module, fences):
            undo.enter_context(patch.object(target, name, value, create=name in ("open", "hash")))
        undo.callback(descriptors.close)
        yield descriptors


def _replacements(os_module: OsModule, fences: bool) -> list[tuple[Any, str, Any]]:
    """Returns (object, attribute, value in the simulation)."""
    return [
        (config, "MIN_HOST_BYTES", SMALLEST_BYTES),
        (config, "MIN_TIER_BYTES", SMALLEST_BYTES // 2),
        (words, "WEAKLY_ORDERED", fences),
        (words, "fence", _fence),
        (seals, "stand_back", lambda nice: None),  # the priority of a carrier could not be raised again
        (tier_factory, "_warn_of_unused", lambda root: None),  # reads /proc/locks, where all of the machine's locks are
        (storage, "work_alone", lambda: None),
        (decoders, "work_alone", lambda: None),
        (threads, "weakref", SimpleNamespace(finalize=_NoFinalizer)),  # the moment when an object is freed must decide nothing
        (forking, "register", lambda thing: None),  # a simulation never forks
        (directory, "hash", lambda key: int.from_bytes(key[:8], "big")),  # Python's own differs from process to process
        (folder, "open", _open),
        (segments, "Files", lambda: DiskFiles(os_module)),
        (tier, "Files", lambda: DiskFiles(os_module)),
        (kv_copy.ArenaBlocks, "unpack", _yields(kv_copy.ArenaBlocks.unpack, 0.5, UNPACK_S_MAX)),
        (kv_copy.ArenaBlocks, "pack", _yields(kv_copy.ArenaBlocks.pack, 0.5, PACK_S_MAX)),
        (page_copy.HostPages, "scatter", _yields(page_copy.HostPages.scatter, 0.5, UNPACK_S_MAX)),
        (page_copy.HostPages, "gather", _yields(page_copy.HostPages.gather, 0.5, PACK_S_MAX)),
        *((FolderStore, name, request(vars(FolderStore)[name])) for name in ("put", "get", "get_range")),
        (host.HostTier, "sign", _yields(host.HostTier.sign, 0.02)),
        (extents.ExtentAllocator, "free", _yields(extents.ExtentAllocator.free, 0.02)),
        (index.IndexWriter, "put", _yields(index.IndexWriter.put, 0.02)),
        (index.IndexWriter, "remove", _yields(index.IndexWriter.remove, 0.02)),
    ]
