"""The checkpoints of one object store: shared packs, one manifest per checkpoint, `LATEST`, and leases.

docs/checkpoint-format.md has the rules. A listing of the object store may lack new objects, and may show deleted ones. Unknown
objects are never changed.
"""

import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b
from typing import NamedTuple, TypeVar

from tiered_kv.checkpoint.garbage_collection import CollectionResult, collect
from tiered_kv.checkpoint.leases import COLLECTING, SKEW_S, TTL_S, Lease, marker_of, markers_in
from tiered_kv.checkpoint.manifest import Manifest, Model, created_of, is_like_manifest, new_name
from tiered_kv.checkpoint.verify import Problem, verify
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.tiers.disk.footer import ROW_BYTES, TRAILER_BYTES, Entry, footer_bytes, unpack_trailer
from tiered_kv.tiers.objects.open_store import open_store
from tiered_kv.tiers.objects.packs import pack_prefix, read_footer
from tiered_kv.tiers.objects.store import ObjectStore

log = logging.getLogger(__name__)

LATEST = "LATEST"
THREADS = 8
_POINTER = re.compile(rb"TKVLATEST 1 (?P<name>[^\n]+) (?P<digest>[0-9a-f]{64})\n")
_POLL_S = 1.0
_LISTED_WITHIN_S = 60.0
BlockId = tuple[BlockKey, BlockKey]
"""A block's key, and the root of its model."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class PackEntry(NamedTuple):
    """The location of a block's frame: its pack, and its offset and size in that pack, in bytes.

    `raw_bytes`: the size of the decoded block. `codec`: the number of the frame's codec.
    """

    pack: str
    offset: int
    stored_bytes: int
    raw_bytes: int
    codec: int


class KnownPacks(NamedTuple):
    """The packs in an object store. entries: the frame of each block, by key and root. packs: the size of each pack in bytes, by name."""

    entries: dict[BlockId, PackEntry]
    packs: dict[str, int]


class CheckpointSummary(NamedTuple):
    """One checkpoint in a listing for people.

    bytes: the size of its frames in total. pack_bytes: the size of its packs in total. shared_bytes: the size of those packs that
    other checkpoints use too. error: a description of the damage if the checkpoint is damaged, else None.
    """

    name: str
    created_s: float
    blocks: int = 0
    bytes: int = 0
    pack_bytes: int = 0
    shared_bytes: int = 0
    models: tuple[Model, ...] = ()
    error: str | None = None


class Repository:
    """The checkpoints in the object store `store`. Thread-safe. Its methods raise (kind `storage`) if the object store fails.

    `now_s`: returns the Unix time. The clocks of all processes that use the object store must be within `SKEW_S` of each other.
    """

    def __init__(self, store: ObjectStore, now_s: Callable[[], float] = time.time, sleep: Callable[[float], object] = time.sleep) -> None:
        self.store = store
        self.now_s = now_s
        self._sleep = sleep

    def names(self) -> list[str]:
        """Returns the names of all objects that may be manifests.

        Names that people chose are first, then the generated ones, oldest first.
        """
        return self.names_in(self.store.sizes())

    @staticmethod
    def names_in(listed: Iterable[str]) -> list[str]:
        """Returns those names of a listing that may be manifests, in the order of `names`."""
        return sorted(filter(may_be_manifest, listed), key=lambda name: (created_of(name) is not None, name))

    def latest(self) -> str:
        """Returns the name of the newest checkpoint.

        Considers the generated names in the listing, and the name in the object LATEST. Raises (kind `storage`) if there is no
        checkpoint.
        """
        for name in self._newest():
            return name
        raise self._none_there()

    def read_latest(self, log: Callable[[str], object] = log.warning) -> tuple[str, Manifest]:
        """Returns the name and the manifest of the newest undamaged checkpoint. Calls `log` for each newer, damaged checkpoint.

        Raises (kind `storage`) if there is no checkpoint, and (kind `corrupt`) if all are damaged.
        """
        damaged: list[TieredKVError] = []
        for name in self._newest():
            try:
                return name, Manifest.read(self.store, name)
            except TieredKVError as error:
                if error.kind is not Kind.CORRUPT:
                    raise
                damaged.append(error)
                log(f"{error}; trying the next older one")
        raise damaged[0] if damaged else self._none_there()

    def _none_there(self) -> TieredKVError:
        return TieredKVError(Kind.STORAGE, f"there is no checkpoint in {self.store.url}", missing=True)

    def _newest(self) -> Iterator[str]:
        """Yields the names of the existing checkpoints that `latest` considers, newest first."""
        listed = [name for name in self.names() if created_of(name) is not None]
        try:
            pointed = self.pointed()
        except TieredKVError as error:
            if error.kind is not Kind.CORRUPT:
                raise
            log.warning("%s; using the listing instead", error)
            pointed = None
        created = {name: created_of(name) for name in listed}
        if pointed is not None:
            created[pointed] = self._created(pointed)
        for name in sorted(created, key=lambda name: (created[name], name), reverse=True):
            if self.is_there(name):
                yield name
            else:
                log.warning("checkpoint %s was deleted; trying the next older one", name)

    def pointed(self) -> str | None:
        """Returns the checkpoint's name in the object LATEST, or None if there is none. Raises (kind `corrupt`) if LATEST is damaged."""
        try:
            content = bytes(self.store.get(LATEST))
        except TieredKVError as error:
            if error.context.get("missing"):
                return None
            raise
        pointer = _POINTER.fullmatch(content)
        if not pointer or pointer["digest"].decode() != _name_digest(pointer["name"]):
            raise TieredKVError(
                Kind.CORRUPT, f"{LATEST} in {self.store.url} is damaged, or was written by a newer version of tiered_kv", object=LATEST
            )
        return pointer["name"].decode()

    def read(self, name: str | None = None) -> Manifest:
        """Returns the manifest of the checkpoint `name`, or of the latest checkpoint if `name` is None.

        Raises the errors of `Manifest.read` and `latest`.
        """
        return Manifest.read(self.store, self.latest() if name is None else name)

    def publish(self, manifest: Manifest, name: str | None = None, lease: Lease | None = None) -> str:
        """Write a manifest, and then its name to the object LATEST. Returns the checkpoint's name, generated if `name` is None.

        All packs of the manifest must exist. `lease`: is renewed first. If it expires during the write, `confirm` checks the packs
        before LATEST is written. Raises (kind `config`) if the name is invalid.
        """
        name = new_name(self.now_s()) if name is None else name
        if not may_be_manifest(name):
            raise TieredKVError(
                Kind.CONFIG,
                f"name: must not begin with '.', contain '/', or have the form of a pack's or a lease's name, got {name!r}",
                setting="name",
            )
        if lease:
            lease.renew()
        manifest.write(self.store, name)
        if lease and lease.left_s <= 0:
            self.confirm(manifest.packs)
        self.point(name)
        return name

    def point(self, name: str) -> None:
        """Make the checkpoint `name` the latest: write its name to the object LATEST."""
        self.store.put(LATEST, [b"TKVLATEST 1 %s %s\n" % (name.encode(), _name_digest(name.encode()).encode())])

    def known(self) -> KnownPacks:
        """Returns the blocks in all complete packs, and the sizes of all packs.

        The blocks of a pack are read from the manifests that name the pack, and the newest manifest takes precedence. If no manifest
        names it, they are read from its footer. Damaged objects are logged and left out. Cost: reads every manifest, and the footer
        of every pack that no manifest names (a crash leaves such packs).
        """
        sizes = self.store.sizes()
        packs = {name: nbytes for name, nbytes in sizes.items() if pack_prefix(name) == ""}
        manifests = [each for each in self._each(self._readable, self.names_in(sizes)) if each]
        named = {pack for manifest in manifests for pack, _ in manifest.packs}
        entries: dict[BlockId, PackEntry] = {}
        for name, listed in self._each(self._entries, [(name, nbytes) for name, nbytes in packs.items() if name not in named]):
            entries |= entries_in(name, listed)
        for manifest in sorted(manifests, key=lambda each: each.created_s):
            whole = [packs.get(name) == nbytes for name, nbytes in manifest.packs]
            entries |= {
                (row.key, row.root): PackEntry(manifest.packs[row.pack][0], row.offset, row.stored_bytes, row.raw_bytes, row.codec)
                for row in manifest.rows
                if whole[row.pack]
            }
        return KnownPacks(entries, packs)

    def confirm(self, packs: Iterable[tuple[str, int]]) -> None:
        """Check that each of these packs (name and bytes) exists in full, by reading its end.

        Raises (kind `storage`) for the first pack that is missing or incomplete.
        """
        for problem in self._each(self._missing, list(packs)):
            if problem:
                raise TieredKVError(Kind.STORAGE, problem, missing=True)

    @contextmanager
    def lease(self, kind: str = "checkpoint", log: Callable[[str], object] = log.info) -> Iterator[Lease]:
        """Hold a lease until the end of the with block. Meanwhile no process deletes anything in this object store.

        Writers of checkpoints need a lease, and so do readers of a checkpoint that must not be deleted. If another process is
        deleting, calls `log` and waits until it has finished. Raises (kind `storage`) if the wait takes too long. The caller must
        renew the lease before `TTL_S` has passed.
        """
        self._await_collector(log)
        lease = Lease(self.store, kind, self.now_s)
        try:
            self._await_collector(log, lease)
            yield lease
        finally:
            lease.release()

    def collect(self, keep: int | None) -> CollectionResult:
        """Delete old checkpoints, and packs that no checkpoint uses. Returns the counts.

        The `keep` newest checkpoints with generated names are kept, or all of them if `keep` is None. Checkpoints with names that
        people chose are always kept.
        """
        return collect(self, keep)

    def overview(self) -> list[CheckpointSummary]:
        """Returns a summary of every checkpoint, including damaged ones, in the order of `names`. Cost: reads every manifest."""
        names = self.names()
        found = dict(zip(names, self._each(self._manifest_or_error, names), strict=True))
        users: dict[str, int] = {}
        for manifest in found.values():
            for pack, _ in manifest.packs if isinstance(manifest, Manifest) else ():
                users[pack] = users.get(pack, 0) + 1
        return [_listed(name, manifest, users) for name, manifest in found.items() if manifest is not None]

    def verify(
        self, names: Collection[str] | None = None, progress: Callable[[int, int], object] = lambda done, total: None
    ) -> list[Problem]:
        """Read every byte of the checkpoints `names`, or of all objects if `names` is None. Returns the damaged and missing objects.

        `progress`: called with the number of bytes verified so far, and the number in total.
        """
        return verify(self, names, progress)

    def _each(self, function: Callable[[Item], Result], items: Collection[Item]) -> list[Result]:
        """Call `function` on each item, in several threads. Returns the results in order."""
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(function, items))

    def is_there(self, name: str) -> bool:
        """Returns whether the object exists. Reads its first byte, because listings may be out of date."""
        try:
            self.store.get_range(name, 0, 1)
        except TieredKVError as error:
            if error.context.get("missing"):
                return False
            if error.kind is Kind.CORRUPT or self.store.sizes().get(name) == 0:  # some stores refuse to read a range of an empty object
                return True
            raise
        return True

    def _created(self, name: str) -> float:
        created = created_of(name)
        if created is None:
            manifest = self._readable(name)
            created = manifest.created_s if manifest else 0.0
        return created

    def _readable(self, name: str) -> Manifest | None:
        """Returns a manifest, or None if it does not exist or is damaged. Damage is logged."""
        manifest = self._manifest_or_error(name)
        if isinstance(manifest, TieredKVError):
            log.warning("left out: %s", manifest)
        return manifest if isinstance(manifest, Manifest) else None

    def _manifest_or_error(self, name: str) -> Manifest | TieredKVError | None:
        """Returns a manifest, or the error if it is damaged, or None if the object does not exist or is not a manifest."""
        try:
            return Manifest.read(self.store, name)
        except TieredKVError as error:
            if error.context.get("missing"):
                return None
            if error.kind is not Kind.CORRUPT:
                raise
            return error if self.is_manifest(name) else None

    def is_manifest(self, name: str) -> bool:
        """Returns whether an unreadable object counts as a damaged manifest, judged by its name or its first bytes."""
        if name.endswith(".tkv"):
            return True
        try:
            return is_like_manifest(self.store.get(name))
        except TieredKVError as error:
            if error.context.get("missing"):
                return False
            raise

    def _entries(self, pack: tuple[str, int]) -> tuple[str, tuple[Entry, ...]]:
        try:
            return pack[0], read_footer(self.store, *pack).entries
        except TieredKVError as error:
            if error.kind is not Kind.CORRUPT and not error.context.get("missing"):
                raise
            log.warning("left out: %s", error)
            return pack[0], ()

    def _missing(self, pack: tuple[str, int]) -> str | None:
        """Read the end of a pack (name and bytes). Returns a description of the problem, or None if the pack exists in full."""
        name, nbytes = pack
        try:
            trailer = unpack_trailer(self.store.get_range(name, max(nbytes - TRAILER_BYTES, 0), TRAILER_BYTES))
        except TieredKVError as error:
            if error.kind is not Kind.CORRUPT and not error.context.get("missing"):
                raise
            return f"the pack {name} is missing or incomplete: {error}"
        if trailer is None or trailer.rows_offset + footer_bytes(trailer.rows) != nbytes:
            return f"the pack {name} is incomplete: its {nbytes} bytes do not end with its footer"
        return None

    def _await_collector(self, log: Callable[[str], object], lease: Lease | None = None) -> None:
        """Wait until a listing shows no unexpired delete mark of a process, and shows the lease if one is given.

        Raises (kind `storage`) if the wait takes too long.
        """
        begun = self.now_s()
        while True:
            listed = self.store.sizes()
            now_s = self.now_s()
            marks = [mark.name for mark in markers_in(listed) if mark.kind == COLLECTING and mark.is_live(now_s)]
            unlisted = "" if lease is None or lease.name in listed else lease.name
            if not marks and not unlisted:
                return
            if now_s - begun > (TTL_S + SKEW_S + _LISTED_WITHIN_S if marks else _LISTED_WITHIN_S):
                what = f"the delete mark {marks[0]} is still there" if marks else f"the listing does not show the new lease {unlisted}"
                raise TieredKVError(Kind.STORAGE, f"gave up waiting for other processes on {self.store.url}: {what}", object=what)
            log(
                f"waiting for another process that deletes old packs ({marks[0]})" if marks else "waiting for the listing to show the lease"
            )
            if lease:
                lease.renew_if_half_gone()
            self._sleep(_POLL_S)


@contextmanager
def open_repository(url: str, *, create: bool = True) -> Iterator[Repository]:
    """Open the checkpoints at a URL, and close the object store at the end of the with block. `open_store` lists the forms of URLs.

    `create=False`: for reading only. A missing folder is then an error; it is not created.
    """
    with open_store(url, setting="url", create=create) as store:
        yield Repository(store)


def reusable(known: KnownPacks, wanted: Iterable[BlockId]) -> dict[BlockId, PackEntry]:
    """Returns the wanted blocks that a new checkpoint may use from existing packs, with their entries.

    A pack is reused if at least half of its bytes are wanted. Wanted blocks in other packs must be written again. So at most half
    of the bytes in a checkpoint's packs are unused.
    """
    found = {block: known.entries[block] for block in wanted if block in known.entries}
    live: dict[str, int] = {}
    for entry in found.values():
        live[entry.pack] = live.get(entry.pack, 0) + entry.stored_bytes + ROW_BYTES
    kept = {pack for pack, nbytes in live.items() if 2 * nbytes >= known.packs[pack] - TRAILER_BYTES}
    return {block: entry for block, entry in found.items() if entry.pack in kept}


def may_be_manifest(name: str) -> bool:
    """Returns whether a checkpoint may have this name. Hidden names, names in folders, and names of packs and leases are excluded."""
    if not name or name == LATEST or "/" in name or "\n" in name or name.startswith(".") or name.endswith(".part"):
        return False
    return pack_prefix(name) is None and marker_of(name) is None


def _listed(name: str, manifest: Manifest | TieredKVError, users: dict[str, int]) -> CheckpointSummary:
    created_s = created_of(name) or 0.0
    if isinstance(manifest, TieredKVError):
        return CheckpointSummary(name, created_s, error=str(manifest))
    shared = sum(nbytes for pack, nbytes in manifest.packs if users[pack] > 1)
    stored = sum(row.stored_bytes for row in manifest.rows)
    pack_bytes = sum(nbytes for _, nbytes in manifest.packs)
    return CheckpointSummary(name, manifest.created_s or created_s, len(manifest.rows), stored, pack_bytes, shared, manifest.models)


def _name_digest(name: bytes) -> str:
    return blake2b(name, digest_size=32).hexdigest()


def entries_in(pack: str, listed: Iterable[Entry]) -> dict[BlockId, PackEntry]:
    """Returns the entries of a pack's footer by key and root. Blocks without a root are left out."""
    return {
        (each.key, each.root): PackEntry(pack, each.offset, each.stored_bytes, each.raw_bytes, each.codec)
        for each in listed
        if each.root is not None
    }
