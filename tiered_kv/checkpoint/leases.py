"""Leases and delete marks: objects beside the checkpoints. All state is in the objects' names, so damaged content cannot matter.

    lease-KIND-ID-UNTIL    a lease: a process writes or reads checkpoints, so nothing may be deleted
    gc-ID-UNTIL            a delete mark: a process deletes, so others wait until the mark is removed or expired

UNTIL is in Unix seconds. Each process first writes its own object. Then it looks for the objects of other processes in a listing
that includes its own. So if two processes start at the same time, at least one sees the other's object.
docs/checkpoint-format.md has the rules.
"""

import logging
import math
import re
import uuid
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.objects.store import ObjectStore

log = logging.getLogger(__name__)

TTL_S = 600
SKEW_S = 60
"""The largest allowed difference between the clocks of two machines. Leases of other processes are respected this much longer."""
COLLECTING = "gc"
_NAME = re.compile(r"(?:lease-(?P<kind>[a-z]+)|gc)-(?P<id>[0-9a-f]{16})-(?P<until>\d{1,15})")


class GcMarker(NamedTuple):
    """A lease or a delete mark (kind `gc`), parsed from the name of its object. Garbage collection looks for both."""

    name: str
    kind: str
    until_s: int

    def is_live(self, now_s: float) -> bool:
        """Returns whether the process that wrote it may still be working. Clocks may differ by `SKEW_S`."""
        return now_s < self.until_s + SKEW_S


def marker_of(name: str) -> GcMarker | None:
    """Parse the name of a lease or of a delete mark (a `gc-` object). Returns None for the name of any other object."""
    named = _NAME.fullmatch(name)
    return named and GcMarker(name, named["kind"] or COLLECTING, int(named["until"]))


def markers_in(names: Iterable[str]) -> list[GcMarker]:
    """Returns the leases and delete marks among these names of objects."""
    return [mark for mark in map(marker_of, names) if mark]


class Lease:
    """A lease or a delete mark (kind `gc`) of this process. The constructor writes its object, `release` removes it. Not thread-safe.

    Every method except `release` raises (kind `storage`) if the object store fails.
    """

    def __init__(self, store: ObjectStore, kind: str, now_s: Callable[[], float]) -> None:
        if not re.fullmatch("[a-z]+", kind):
            raise ValueError(f"kind: must be lower-case letters, got {kind!r}")
        self.kind = kind
        self._store, self._now_s = store, now_s
        self._id = uuid.uuid4().hex[:16]
        self.name, self._until_s = "", math.inf
        self.renew()

    @property
    def left_s(self) -> float:
        """Seconds until the lease expires; 0 or less if it has expired."""
        return self._until_s - self._now_s()

    def renew(self) -> None:
        """Extend the lease to `TTL_S` from now.

        Raises (kind `storage`) if it has expired already, because another process may have deleted objects since then.
        """
        self.check()
        old, until_s = self.name, math.ceil(self._now_s()) + TTL_S
        name = f"{'' if self.kind == COLLECTING else 'lease-'}{self.kind}-{self._id}-{until_s}"
        if name == old:
            return
        self._store.put(name, [b"1"])  # some stores refuse empty objects
        try:
            self.check()
        except TieredKVError:
            self._remove(name)
            raise
        self.name, self._until_s = name, until_s
        if old:
            self._remove(old)

    def renew_if_half_gone(self) -> None:
        """Renew the lease if less than half of `TTL_S` is left."""
        if self.left_s < TTL_S / 2:
            self.renew()

    def check(self) -> None:
        """Raises (kind `storage`) if the lease has expired."""
        if self.left_s <= 0:
            message = (
                f"the lease {self.name} on {self._store.url} expired before it was renewed; objects found under it may be deleted by now"
            )
            raise TieredKVError(Kind.STORAGE, message, object=self.name)

    def release(self) -> None:
        """Remove the lease. A failure is only logged, because the lease expires by itself."""
        self._remove(self.name)

    def _remove(self, name: str) -> None:
        try:
            self._store.delete([name])
        except TieredKVError as error:
            log.warning("the lease %s could not be removed and stays until it expires: %s", name, error)
