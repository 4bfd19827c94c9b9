"""Bounds the number of different labels of a metric, which Prometheus keeps in memory for hours."""

import threading
from collections.abc import Hashable
from typing import Generic, TypeVar

LABELS_MAX = 50
"""The most values of one label, or of one pair of labels. Further ones are counted under OTHER."""
OTHER = "other"

T = TypeVar("T", bound=Hashable)


class BoundedLabels(Generic[T]):
    """Gives the first LABELS_MAX names their own label, and all later names the label `other`. Thread-safe.

    A name keeps its label, because a count that moved from one label to another would look like a restart.
    """

    def __init__(self, other: T) -> None:
        self._other = other
        self._known: set[T] = set()
        self._lock = threading.Lock()

    def label(self, name: T) -> T:
        """Returns the label for a name."""
        with self._lock:
            if name in self._known:
                return name
            if len(self._known) >= LABELS_MAX or name == self._other:
                return self._other
            self._known.add(name)
        return name
