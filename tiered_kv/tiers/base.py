"""What every tier is, whatever it is made of: a name, a cap that holds at every moment, and books that can be checked."""

from abc import ABC, abstractmethod
from typing import Self


class Tier(ABC):
    """A place for blocks. A context manager that closes itself."""

    name: str
    """The label of the tier, as in `blocks.Tier`."""

    @property
    @abstractmethod
    def capacity_bytes(self) -> int:
        """The cap, headers and rounding included."""

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes that count against the cap; never above `capacity_bytes`."""

    @abstractmethod
    def check(self) -> None:
        """Recount from what is really there and assert that the books agree and the cap holds. Slow; for tests."""

    @abstractmethod
    def close(self) -> None:
        """Let go of memory, files and locks; a second time does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
