"""Object storage as the objects tier and checkpoints need it: named bytes, written whole, read by range."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

from tiered_kv.codecs.base import Buffer, byte_view
from tiered_kv.errors import Kind, TieredKVError

OBJECTS, CHECKPOINT = "objects", "checkpoint"


def role_of(setting: str) -> str:
    """What a store that was named by this setting is for, in messages: a tier's objects, or a checkpoint (all other settings)."""
    return OBJECTS if setting == OBJECTS else CHECKPOINT


class ObjectStore(ABC):
    """Objects by name below one URL. Thread-safe. Failures are `TieredKVError` of kind `storage` that names the store's setting.

    A name is a file name without folders. What lies deeper below the URL belongs to other stores.
    """

    url: str
    """For people: where this is, without credentials. `open_store` opens the same place by it."""
    setting: str = OBJECTS
    """What named the URL, and what to change when it cannot be used."""

    @abstractmethod
    def put(self, name: str, buffers: Sequence[Buffer]) -> None:
        """Write an object of these buffers, in place of one of that name. Atomic: others see all of it or nothing.

        Durable when it returns. When it raises, the object may be there or not.
        """

    @abstractmethod
    def get(self, name: str) -> memoryview:
        """All bytes of an object; raises (with `missing=True` in the context) where there is none."""

    @abstractmethod
    def get_range(self, name: str, offset: int, nbytes: int) -> memoryview:
        """Exactly `nbytes` bytes from `offset` on; raises as `get` does, and (kind `corrupt`) if the object ends before."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Every object's name, in the order of the names, and its bytes."""

    @abstractmethod
    def delete(self, names: Sequence[str]) -> None:
        """Remove objects; those that are not there are as good as removed."""

    @abstractmethod
    def close(self) -> None:
        """Let go of connections; a second time does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def failed(self, doing: str, reason: object, **context: object) -> TieredKVError:
        """The error of this store for something that it could not do."""
        return TieredKVError(Kind.STORAGE, f"{role_of(self.setting)}: {self.url} {doing}: {reason}", setting=self.setting, **context)

    def short(self, name: str, offset: int, nbytes: int, found: int) -> TieredKVError:
        """The error for an object that ends before what is looked for."""
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
        """Nothing to let go of."""
