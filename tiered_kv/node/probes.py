"""A node's probes (`protocol.probes`): saved in files that outlive the node, and matched by the coordinator while it answers."""

import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import msgpack

from tiered_kv.errors import TieredKVError
from tiered_kv.keys import KEY_BYTES, BlockKey
from tiered_kv.protocol.probes import Probe, ProbeBook, Variants
from tiered_kv.unpacking import unpacked

log = logging.getLogger(__name__)

FILE_NAME = "probes"
FILE_BYTES_MAX = 256 << 20


class NodeProbes:
    """A node's probes, saved in one file in each of `folders`. Thread-safe.

    `ask` matches a probe at the coordinator, as `Link.probe` does; None for a node without a coordinator.
    """

    def __init__(self, folders: Iterable[Path], ask: Callable[[BlockKey, Variants, Probe], Variants] | None) -> None:
        self.book = ProbeBook()
        self._files = [folder / FILE_NAME for folder in folders]
        self._ask = ask
        self._saving = threading.Lock()
        for file in self._files:
            for root, variants in _loaded(file):
                self.book.adopt(root, variants)

    def match(self, root: BlockKey, probe: Probe) -> str:
        """Returns the variant of `root` that a model with this probe belongs to.

        The coordinator's answer decides; while it does not answer, the node matches the probe itself.
        """
        before = self.book.variants(root)
        if self._ask is not None:
            try:
                self.book.replace(root, self._ask(root, before, probe))
            except TieredKVError as error:
                log.info("the coordinator gave no answer about a probe, so this node matches it by itself: %s", error)
        variant = self.book.match(root, probe)
        if self.book.variants(root) != before:
            self._save()
        return variant

    def _save(self) -> None:
        """Rewrite the files. If one cannot be written, a restarted node does not know its probes."""
        with self._saving:
            packed = msgpack.packb(self.book.everything())
            for file in self._files:
                part = file.with_name(f"{FILE_NAME}.part")
                try:
                    part.write_bytes(packed)
                    part.replace(file)
                except OSError as error:
                    log.warning("cannot write probes to %s: %s", file, error)


def _read(file: Path) -> bytes:
    """Returns the bytes of a file. Raises ValueError if there are more than FILE_BYTES_MAX."""
    with file.open("rb") as opened:
        data = opened.read(FILE_BYTES_MAX + 1)
    if len(data) > FILE_BYTES_MAX:
        raise ValueError(f"{file} must be at most {FILE_BYTES_MAX} bytes")
    return data


def _loaded(file: Path) -> list[tuple[BlockKey, Variants]]:
    """Returns the probes in a file; fewer or none if it is damaged or missing."""
    found: list[tuple[BlockKey, Variants]] = []
    with suppress(OSError, ValueError, TypeError, TieredKVError, msgpack.UnpackException):
        for root, variants in unpacked(_read(file)):
            if type(root) is bytes and len(root) == KEY_BYTES:
                found.append((root, [(str(name), Probe.of_message(probe)) for name, probe in variants]))
    return found
