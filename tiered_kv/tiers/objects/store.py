"""The interface of object storage for the objects tier and checkpoints: named bytes, written whole, read by range."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

from tiered_kv.codecs.base import Buffer, byte_view
from tiered_kv.errors import Kind, TieredKVError

OBJECTS, CHECKPOINT = "objects", "checkpoint"


def role_of(setting: str) -> str:
    """Returns "objects" if `setting` is that of the objects tier, else "checkpoint". Error messages begin with this word."""
    return OBJECTS if setting == OBJECTS else CHECKPOINT


OBJECT_BYTES_MAX = 2 << 30
"""The largest object that is read at once, such as the manifest of ten million blocks. Packs are read in ranges."""


class ObjectStore(ABC):
    """Objects by name below one URL. Thread-safe. Failures raise `TieredKVError` of kind `storage` that names the store's setting.

    A name is a file name without folders. Objects in deeper folders belong to other stores.
    """

    url: str
    """The store's URL without credentials. `open_store(url)` opens the same store."""
    setting: str = OBJECTS
    """The setting that named the URL, for error messages."""

    @abstractmethod
    def put(self, name: str, buffers: Sequence[Buffer]) -> None:
        """Write an object of these buffers, and replace an object of that name. Atomic: readers see all of it or nothing.

        The object is durable when this returns. If it raises, the object may exist or not.
        """

    @abstractmethod
    def get(self, name: str) -> memoryview:
        """Returns all bytes of an object. Raises if the object does not exist (with `missing=True` in the context)."""

    @abstractmethod
    def get_range(self, name: str, offset: int, nbytes: int) -> memoryview:
        """Returns exactly `nbytes` bytes of an object from `offset` on.

        Raises as `get` does, and (kind `corrupt`) if the object ends earlier.
        """

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Returns the size in bytes of every object by its name, in the order of the names."""

    @abstractmethod
    def delete(self, names: Sequence[str]) -> None:
        """Remove objects. Ignores names of missing objects."""

    @abstractmethod
    def close(self) -> None:
        """Close connections. A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def failed(self, doing: str, reason: object, **context: object) -> TieredKVError:
        """Returns the error for an operation that failed."""
        return TieredKVError(Kind.STORAGE, f"{role_of(self.setting)}: {self.url} {doing}: {reason}", setting=self.setting, **context)

    def check_size(self, name: str, nbytes: int) -> None:
        """Raise (kind `corrupt`) if an object is too large to be read at once."""
        if nbytes > OBJECT_BYTES_MAX:
            message = f"{role_of(self.setting)}: {self.url} {name} must be at most {OBJECT_BYTES_MAX} bytes, got {nbytes}"
            raise TieredKVError(Kind.CORRUPT, message, object=name)

    def short(self, name: str, offset: int, nbytes: int, found: int) -> TieredKVError:
        """Returns the error for an object that ends before the requested range does."""
        message = f"{role_of(self.setting)}: {self.url} {name} has {found} of the {nbytes} bytes from byte {offset} on"
        return TieredKVError(Kind.CORRUPT, message, object=name, offset=offset)


class MemoryStore(ObjectStore):
    """Objects in this process's memory: for tests, and as the plainest example of a store."""

    def __init__(self, url: str = "memory://") -> None:
        self.url = url
        self.objects: dict[str, bytes] = {}

    def put(self, name: str, buffers: Sequence[Buffer]) -> None:
        self.objects[name] = b"".join(byte_view(buffer) for buffer in buffers)

    def get(self, name: str) -> memoryview:
        if name not in self.objects:
            raise self.failed(f"get {name}", "there is no such object", missing=True)
        return memoryview(self.objects[name])

    def get_range(self, name: str, offset: int, nbytes: int) -> memoryview:
        view = self.get(name)[offset : offset + nbytes]
        if len(view) != nbytes:
            raise self.short(name, offset, nbytes, len(view))
        return view

    def sizes(self) -> dict[str, int]:
        return {name: len(content) for name, content in sorted(self.objects.items())}

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self.objects.pop(name, None)

    def close(self) -> None:
        """Does nothing: there is no connection."""
