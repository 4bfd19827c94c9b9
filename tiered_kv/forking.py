"""What a process that was forked must not share with its parent: sockets, locks that another thread held, descriptions of files.

An object that has such things registers itself here; its `after_fork` is called in the child, before anything else runs there.
"""

import os
from typing import Protocol
from weakref import WeakSet


class ForkAware(Protocol):
    """An object that has to change in a child process before it is used there."""

    def after_fork(self) -> None:
        """Give up what belongs to the parent; called in the child, where the calling thread is the only one. Must not raise."""


_registered: WeakSet[ForkAware] = WeakSet()


def register(thing: ForkAware) -> None:
    """Call `thing.after_fork()` in every child of this process, for as long as the object lives."""
    _registered.add(thing)


def _after_fork_in_child() -> None:
    for thing in list(_registered):
        thing.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
