"""Who is at work on a store of checkpoints: objects whose names say all, so that no content of theirs can be damaged.

    lease-KIND-ID-UNTIL    somebody writes or reads checkpoints: nothing may be deleted
    gc-ID-UNTIL            somebody deletes: who comes waits until this is gone

UNTIL is in Unix seconds. Each side puts its own object first and then looks for the other's, in a listing that shows its own: of
two that come at once at least one sees the other. docs/checkpoint-format.md has the rules.
"""

import logging
import math
import re
import uuid
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.objectstore import ObjectStore

log = logging.getLogger(__name__)

TTL_S = 600
SKEW_S = 60
"""By how much the clocks of two machines may differ: others' leases are respected for so much longer."""
COLLECTING = "gc"
_NAME = re.compile(r"(?:lease-(?P<kind>[a-z]+)|gc)-(?P<id>[0-9a-f]{16})-(?P<until>\d{1,15})")


class Mark(NamedTuple):
    """What the name of a lease says, or that of a collector's mark (kind `gc`)."""

    name: str
    kind: str
    until_s: int

    def is_live(self, now_s: float) -> bool:
        """Whether its holder may still be at work, should the clocks differ."""
        return now_s < self.until_s + SKEW_S


def mark_of(name: str) -> Mark | None:
    """What an object's name says; None for anything that is neither lease nor mark."""
    named = _NAME.fullmatch(name)
    return named and Mark(name, named["kind"] or COLLECTING, int(named["until"]))


def marks_in(names: Iterable[str]) -> list[Mark]:
    """The leases and marks among objects' names."""
    return [mark for mark in map(mark_of, names) if mark]


class Lease:
    """One lease that this process holds (kind `gc`: a mark), from its making until `release`. Not thread-safe.

    Raises (kind `storage`) when the store does.
    """

    def __init__(self, store: ObjectStore, kind: str, now_s: Callable[[], float]) -> None:
        if not re.fullmatch("[a-z]+", kind):
            raise ValueError(f"a lease of the kind {kind!r}")
        self.kind = kind
        self._store, self._now_s = store, now_s
        self._id = uuid.uuid4().hex[:16]
        self.name, self._until_s = "", math.inf
        self.renew()

    @property
    def left_s(self) -> float:
        """Seconds until it runs out; 0 or less if it has."""
        return self._until_s - self._now_s()

    def renew(self) -> None:
        """Hold it for `TTL_S` from now on. Raises (kind `storage`) if it had run out before that: others may have deleted meanwhile."""
        self.check()
        old, until_s = self.name, math.ceil(self._now_s()) + TTL_S
        name = f"{'' if self.kind == COLLECTING else 'lease-'}{self.kind}-{self._id}-{until_s}"
        if name == old:
            return
        self._store.put(name, [b"1"])  # not every store takes an empty object
        try:
            self.check()
        except TieredKVError:
            self._remove(name)
            raise
        self.name, self._until_s = name, until_s
        if old:
            self._remove(old)

    def renew_if_half_gone(self) -> None:
        """As `renew`, when that is due."""
        if self.left_s < TTL_S / 2:
            self.renew()

    def check(self) -> None:
        """Raise (kind `storage`) if it has run out."""
        if self.left_s <= 0:
            message = (
                f"the lease {self.name} on {self._store.url} ran out before it was renewed; what was found there may be deleted by now"
            )
            raise TieredKVError(Kind.STORAGE, message, object=self.name)

    def release(self) -> None:
        """Give it back. A failure is logged: it runs out by itself."""
        self._remove(self.name)

    def _remove(self, name: str) -> None:
        try:
            self._store.delete([name])
        except TieredKVError as error:
            log.warning("the lease %s stays until it runs out: %s", name, error)
