"""Resets objects in a forked child that it must not share with its parent: sockets, locks held by other threads, open files.

Such an object registers itself here. Its `after_fork` is called in the child, before any other code runs there.
"""

import os
from typing import Protocol
from weakref import WeakSet


class ForkAware(Protocol):
    """An object that must be reset in a child process before it is used there."""

    def after_fork(self) -> None:
        """Drop what belongs to the parent. Called in the child, whose only thread is the calling one. Must not raise."""


_registered: WeakSet[ForkAware] = WeakSet()


def register(thing: ForkAware) -> None:
    """Call `thing.after_fork()` in every later child of this process, as long as the object exists."""
    _registered.add(thing)


def _after_fork_in_child() -> None:
    for thing in list(_registered):
        thing.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
