"""The interface of every tier: a name, a cap that is never exceeded, and bookkeeping that can be checked."""

from abc import ABC, abstractmethod
from typing import Self


class StorageTier(ABC):
    """Storage for blocks. A context manager that closes itself."""

    name: str
    """The label of the tier, as in `blocks.Tier`."""

    @property
    @abstractmethod
    def capacity_bytes(self) -> int:
        """The cap in bytes, which includes headers and rounding."""

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes that count against the cap; never above `capacity_bytes`."""

    @abstractmethod
    def check(self) -> None:
        """Recount the stored bytes and assert that the bookkeeping agrees and the cap holds. Slow; for tests."""

    @abstractmethod
    def close(self) -> None:
        """Release memory, files and locks. A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
