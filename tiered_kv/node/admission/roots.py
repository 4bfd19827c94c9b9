"""A node's book of the roots of its blocks and of the weight epochs. It is saved as one file in each folder that outlives the node."""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgpack

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import KEY_BYTES, BlockKey, Namespace
from tiered_kv.protocol.epochs import Epoch, EpochBook
from tiered_kv.unpacking import unpacked

log = logging.getLogger(__name__)

FILE_NAME = "roots"
FILE_BYTES_MAX = 16 << 20
ROOTS_MAX = 4096
NAME_CHARACTERS_MAX = 64


class RootInfo(NamedTuple):
    """A root's family, weight epoch and tenant, and the start of the name of its weights.

    `purged_below`: by number of a lower tier, the first segment that was begun after the root was last purged.
    """

    family: bytes
    number: int
    tenant: str
    weights: str
    purged_below: dict[int, int] = {}

    @classmethod
    def of(cls, namespace: Namespace) -> Self:
        """Returns the facts of a namespace's roots."""
        return cls(namespace.family, namespace.weight_epoch, namespace.tenant, namespace.weights[:NAME_CHARACTERS_MAX])

    @classmethod
    def of_message(cls, message: Any) -> Self:
        """Returns the facts in a file. Raises (kind `corrupt`) if they are invalid."""
        facts = cls(*message)
        types = [type(each) for each in facts]
        purged = facts.purged_below if types[-1] is dict else {None: None}
        if types != [bytes, int, str, str, dict] or not all(type(each) is int for pair in purged.items() for each in pair):
            raise TieredKVError(Kind.CORRUPT, "the facts of a root must be family, number, tenant, weights and purged segments")
        return facts


class RootBook:
    """The facts of the ROOTS_MAX most recently introduced roots, and the epochs of all families. Thread-safe."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self.epochs = EpochBook()
        self._roots: dict[BlockKey, RootInfo] = {}
        self._files = [folder / FILE_NAME for folder in folders]
        self._lock = threading.Lock()
        self._saving = threading.Lock()
        for file in self._files:
            epochs, roots = _loaded(file)
            self.epochs.adopt(epochs)
            self._roots |= roots

    def learn(self, root: BlockKey, facts: RootInfo) -> bool:
        """Record the facts of a root, unless it is known. Returns whether it is new."""
        with self._lock:
            known = self._roots.pop(root, None)
            self._roots[root] = known if known is not None else facts
            if len(self._roots) > ROOTS_MAX:
                del self._roots[next(iter(self._roots))]
        return known is None

    def facts(self, root: BlockKey | None) -> RootInfo | None:
        """Returns the facts of a root, or None if it is not known."""
        return self._roots.get(root) if root is not None else None

    def of_families(self, families: Iterable[bytes]) -> list[BlockKey]:
        """Returns the known roots of these families."""
        wanted = set(families)
        return self._those(lambda facts: facts.family in wanted)

    def ended(self) -> list[BlockKey]:
        """Returns the known roots whose weights have ended."""
        return self._those(lambda facts: facts.number < self.epochs.floor(facts.family))

    def has_ended(self, facts: RootInfo) -> bool:
        """Returns whether the weights of a root with these facts have ended."""
        return facts.number < self.epochs.floor(facts.family)

    def purged(self, roots: Iterable[BlockKey], segments: dict[int, int]) -> None:
        """Record that the blocks below these roots were purged. `segments`: by lower tier, the first segment without purged blocks."""
        with self._lock:
            for root in roots:
                self._roots[root] = self._roots[root]._replace(purged_below=segments)

    def forget_segments(self, next_segments: Mapping[int, int]) -> bool:
        """Lower the segments in `purged_below` to the next segments of a node that has just started. Returns whether any was lowered.

        Such a node may give the number of a removed segment to a new one, whose blocks were not purged.
        """
        with self._lock:
            before = dict(self._roots)
            for root, info in before.items():
                left = {tier: min(below, next_segments.get(tier, below)) for tier, below in info.purged_below.items()}
                self._roots[root] = info._replace(purged_below=left)
            return before != self._roots

    def everything(self) -> dict[BlockKey, RootInfo]:
        """Returns all known roots."""
        with self._lock:
            return dict(self._roots)

    def save(self) -> None:
        """Rewrite the files.

        If a file cannot be written, a restarted node may show blocks of ended epochs until the coordinator has answered it.
        """
        with self._saving:
            packed = msgpack.packb({"epochs": self.epochs.everything(), "roots": list(self.everything().items())})
            for file in self._files:
                part = file.with_name(f"{FILE_NAME}.part")
                try:
                    part.write_bytes(packed)
                    part.chmod(0o600)
                    part.replace(file)
                except OSError as error:
                    log.warning("cannot write weight epochs to %s: %s", file, error)

    def _those(self, is_one: Callable[[RootInfo], bool]) -> list[BlockKey]:
        return [root for root, facts in self.everything().items() if is_one(facts)]


def _loaded(file: Path) -> tuple[list[Epoch], dict[BlockKey, RootInfo]]:
    """Returns the epochs and roots in a file; fewer or none if the file is damaged or missing."""
    epochs: list[Epoch] = []
    roots: dict[BlockKey, RootInfo] = {}
    with suppress(OSError, ValueError, TypeError, KeyError, TieredKVError, msgpack.UnpackException):
        if file.stat().st_size > FILE_BYTES_MAX:
            raise TieredKVError(Kind.CORRUPT, f"{file} must be at most {FILE_BYTES_MAX} bytes")
        found = unpacked(file.read_bytes(), keys=int)
        epochs += map(Epoch.of_message, found["epochs"])
        for root, facts in found["roots"]:
            if type(root) is bytes and len(root) == KEY_BYTES:
                roots[root] = RootInfo.of_message(facts)
    return epochs, roots
