"""Bugs that the simulation must find. Each is patched in by a test and is not in the product."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from tiered_kv.blocks import Location, Tier
from tiered_kv.client import reader
from tiered_kv.codecs import frame
from tiered_kv.memory.view import NodeView
from tiered_kv.node.quarantine import ExtentQuarantine
from tiered_kv.store import events as ev
from tiered_kv.store.engine import Engine


def _no_recheck() -> list[Any]:
    """A reader believes what it has copied without comparing the sequence numbers again."""
    return [
        patch.object(NodeView, "valid", lambda self, slot: True),
        patch.object(NodeView, "all_valid", lambda self, slots: True),
    ]


def _no_key_check() -> list[Any]:
    """A frame is accepted for whatever key it is read under."""
    verified = frame._verified

    def careless(fixed: Any, header: Any, payload: Any, tail: Any, key: bytes, namespace: bytes | None) -> Any:
        return verified(fixed, header, payload, tail, fixed.key, namespace)

    return [patch.object(frame, "_verified", careless)]


def _freed_early() -> list[Any]:
    """The extent of a block that moves down is freed when its copy begins, not when it has ended."""
    start, apply = Engine._start, Engine._apply

    def start_and_free(self: Engine, copies: list[ev.Copy]) -> None:
        for copy in copies:
            block = self.machine.blocks.get(copy.key)
            if block is not None and block.leaving is Tier.HOST and copy.target is not Tier.HOST:
                self._mover.free(copy.source)
                _freed(self).add(copy.source)
        start(self, copies)

    def apply_unless_freed(self: Engine, instruction: Any) -> bool:
        if isinstance(instruction, ev.Free) and instruction.location in _freed(self):
            _freed(self).discard(instruction.location)
            return True
        return apply(self, instruction)

    def _freed(engine: Engine) -> set[Location]:
        found: set[Location] = vars(engine).setdefault("freed_early", set())
        return found

    return [patch.object(Engine, "_start", start_and_free), patch.object(Engine, "_apply", apply_unless_freed)]


def _no_quarantine() -> list[Any]:
    """Extents are free as soon as their session or their node has ended, though a worker may still write to them."""

    def abandon(self: ExtentQuarantine, reserved: dict[int, int]) -> None:
        for offset, nbytes in reserved.items():
            self._host.extents.free(self._host.extent_range(offset, nbytes)[0])

    return [patch.object(ExtentQuarantine, "abandon", abandon), patch.object(ExtentQuarantine, "find_writers", lambda self: None)]


def _no_header_check() -> list[Any]:
    """A reader does not compare the header of a block in host memory with its key, nor the sequence number."""
    return [*_no_recheck(), patch.object(reader.BlockSource, "_named", lambda self, found, offsets: len(found))]


PLANTED: dict[str, Callable[[], Iterable[Any]]] = {
    "seqlock": _no_recheck,
    "frame key": _no_key_check,
    "freed early": _freed_early,
    "quarantine": _no_quarantine,
    "header": _no_header_check,
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """A context in which the product has one of the bugs."""
    patches = list(PLANTED[name]())
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in reversed(patches):
            each.stop()
