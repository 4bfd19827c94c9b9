"""Fault injection for tests: wraps a tier, or the system calls that it makes, so that planned calls fail in planned ways.

    files = Faulty(Files(), Plan(pwritev={2: fails(errno.ENOSPC)}))          # the second write finds the disk full
    tier = Faulty(DiskTier(folder, cap, segment, owner="a"), Plan(read={EVERY: waits(entered, gate)}))

A fault is a function `fault(call, *arguments)` that runs instead of `call` and may make the call itself.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from tiered_kv.tiers.log import AppendResult, Record, Refusal

Fault = Callable[..., Any]
EVERY = 0
"""The number that stands in a plan for every call without a fault of its own."""

_PATIENCE_S = 60.0


class FaultPlan:
    """The planned faults, by name of the operation and number of the call (from 1, or `EVERY`). Thread-safe."""

    def __init__(self, **faults: Mapping[int, Fault]) -> None:
        self._faults = faults
        self._lock = threading.Lock()
        self.calls: Counter[str] = Counter()

    def run(self, name: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Make one call of the operation `name`. If a fault is planned for this call, run the fault instead. Returns the result."""
        with self._lock:
            self.calls[name] += 1
            number = self.calls[name]
        faults = self._faults.get(name, {})
        fault = faults.get(number) or faults.get(EVERY)
        return fault(call, *arguments, **options) if fault else call(*arguments, **options)


class Faulty:
    """A wrapper with the attributes of `wrapped`. Its methods run with the faults of `plan`."""

    def __init__(self, wrapped: Any, plan: FaultPlan) -> None:
        self._wrapped = wrapped
        self._plan = plan

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._wrapped, name)
        if not callable(value):
            return value
        return lambda *arguments, **options: self._plan.run(name, value, *arguments, **options)


def fails(code: int) -> Fault:
    """Returns a fault: a system call that fails with the errno `code`."""

    def fault(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fault


def raises(error: Exception) -> Fault:
    """Returns a fault: a call that raises `error`."""

    def fault(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        raise error

    return fault


def short(nbytes: int) -> Fault:
    """Returns a fault: a `pwritev` or `preadv` that moves only the first `nbytes` bytes."""

    def fault(call: Callable[..., int], fd: int, buffers: list[memoryview], offset: int) -> int:
        first, left = [], nbytes
        for buffer in buffers:
            first.append(buffer[:left])
            left -= len(first[-1])
        return call(fd, first, offset)

    return fault


def waits(entered: threading.Event, gate: threading.Event) -> Fault:
    """Returns a fault: a slow call, which sets `entered` and then waits until `gate` is set."""

    def fault(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        entered.set()
        if not gate.wait(_PATIENCE_S):
            raise TimeoutError(f"waits: the gate must be set within {_PATIENCE_S} s")
        return call(*arguments, **options)

    return fault


def refuses(reason: Refusal) -> Fault:
    """Returns a fault: an `append` that writes nothing and refuses every record for `reason`."""

    def fault(call: Callable[..., Any], records: list[Record]) -> list[AppendResult]:
        return [AppendResult(None, reason) for _ in records]

    return fault
