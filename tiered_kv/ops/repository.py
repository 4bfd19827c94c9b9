"""The checkpoints of one store: packs that they share, a manifest each, `LATEST`, and leases. docs/checkpoint-format.md has the rules.

What a listing shows may lag behind or be gone already; unknown objects are left alone.
"""

import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b
from typing import NamedTuple

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.ops.collecting import Collected, collect
from tiered_kv.ops.leases import COLLECTING, SKEW_S, TTL_S, Lease, mark_of, marks_in
from tiered_kv.ops.manifest import Manifest, Model, created_of, is_like_manifest, new_name
from tiered_kv.ops.verifying import Problem, verify
from tiered_kv.tiers.footer import ROW_BYTES, TRAILER_BYTES, footer_bytes, unpack_trailer
from tiered_kv.tiers.objectstore import ObjectStore
from tiered_kv.tiers.packs import pack_prefix, read_footer
from tiered_kv.tiers.stores import open_store

log = logging.getLogger(__name__)

LATEST = "LATEST"
THREADS = 8
_POINTER = re.compile(rb"TKVLATEST 1 (?P<name>[^\n]+) (?P<digest>[0-9a-f]{64})\n")
_POLL_S = 1.0
_LISTED_WITHIN_S = 60.0
Block = tuple[BlockKey, BlockKey]  # key and root


class Place(NamedTuple):
    """Where the frame of a block lies."""

    pack: str
    offset: int
    stored_bytes: int
    raw_bytes: int
    codec: int


class Known(NamedTuple):
    """Blocks, by key and root, that lie in packs which are there, and the bytes of all these packs."""

    places: dict[Block, Place]
    packs: dict[str, int]


class Listed(NamedTuple):
    """One checkpoint for people. `bytes`: of its frames; `shared_bytes`: of packs that others name as well. `error`: why it is none."""

    name: str
    created_s: float
    blocks: int = 0
    bytes: int = 0
    pack_bytes: int = 0
    shared_bytes: int = 0
    models: tuple[Model, ...] = ()
    error: str | None = None


class Repository:
    """The checkpoints in `store`. `now_s`: Unix time, which must be about the same for all who work on one store.

    Raises (kind `storage`) when the store does. Thread-safe.
    """

    def __init__(self, store: ObjectStore, now_s: Callable[[], float] = time.time, sleep: Callable[[float], object] = time.sleep) -> None:
        self.store = store
        self.now_s = now_s
        self._sleep = sleep

    def names(self) -> list[str]:
        """Manifests by name, or what may be one: first those that people named, then the generated ones, oldest first."""
        return self.names_in(self.store.sizes())

    @staticmethod
    def names_in(listed: Iterable[str]) -> list[str]:
        """As `names`, of a listing."""
        return sorted(filter(may_be_manifest, listed), key=lambda name: (created_of(name) is not None, name))

    def latest(self) -> str:
        """The newest checkpoint: of the generated ones that are listed and the one that LATEST names. Raises where there is none."""
        for name in self._newest():
            return name
        raise self._none_there()

    def read_latest(self, say: Callable[[str], object] = log.warning) -> tuple[str, Manifest]:
        """The newest checkpoint whose manifest is whole, with its name; says which newer ones are damaged. Raises where there is none."""
        damaged: list[TieredKVError] = []
        for name in self._newest():
            try:
                return name, Manifest.read(self.store, name)
            except TieredKVError as error:
                if error.kind is not Kind.CORRUPT:
                    raise
                damaged.append(error)
                say(f"{error}; the one before it counts")
        raise damaged[0] if damaged else self._none_there()

    def _none_there(self) -> TieredKVError:
        return TieredKVError(Kind.STORAGE, f"there is no checkpoint in {self.store.url}", missing=True)

    def _newest(self) -> Iterator[str]:
        """Checkpoints that are there, the newest first."""
        listed = [name for name in self.names() if created_of(name) is not None]
        try:
            pointed = self.pointed()
        except TieredKVError as error:
            if error.kind is not Kind.CORRUPT:
                raise
            log.warning("%s; what is listed counts", error)
            pointed = None
        created = {name: created_of(name) for name in listed}
        if pointed is not None:
            created[pointed] = self._created(pointed)
        for name in sorted(created, key=lambda name: (created[name], name), reverse=True):
            if self.is_there(name):
                yield name
            else:
                log.warning("checkpoint %s is gone; the one before it counts", name)

    def pointed(self) -> str | None:
        """What LATEST says, None where it is missing; raises (kind `corrupt`) if it is damaged."""
        try:
            content = bytes(self.store.get(LATEST))
        except TieredKVError as error:
            if error.context.get("missing"):
                return None
            raise
        said = _POINTER.fullmatch(content)
        if not said or said["digest"].decode() != _name_digest(said["name"]):
            raise TieredKVError(Kind.CORRUPT, f"{LATEST} in {self.store.url} is damaged, or of a newer version", object=LATEST)
        return said["name"].decode()

    def read(self, name: str | None = None) -> Manifest:
        """The checkpoint of that name, None: the latest. Raises as `Manifest.read` and `latest`."""
        return Manifest.read(self.store, self.latest() if name is None else name)

    def publish(self, manifest: Manifest, name: str | None = None, lease: Lease | None = None) -> str:
        """Put a manifest whose packs are all there, and then LATEST; its name, a new one if none is given.

        `lease`: renewed before; if it runs out meanwhile the packs are confirmed once more.
        """
        name = new_name(self.now_s()) if name is None else name
        if not may_be_manifest(name):
            raise TieredKVError(Kind.CONFIG, f"{name!r} is no name for a checkpoint", setting="name")
        if lease:
            lease.renew()
        manifest.write(self.store, name)
        if lease and lease.left_s <= 0:
            self.confirm(manifest.packs)
        self.point(name)
        return name

    def point(self, name: str) -> None:
        """Let LATEST name this checkpoint."""
        self.store.put(LATEST, [b"TKVLATEST 1 %s %s\n" % (name.encode(), _name_digest(name.encode()).encode())])

    def known(self) -> Known:
        """Every block in a pack that is listed in full: of all manifests, the newest last, and of packs that none of them names.

        What is damaged is logged and left out. Cost: reads every manifest, and the footers of what a crash has left.
        """
        sizes = self.store.sizes()
        packs = {name: nbytes for name, nbytes in sizes.items() if pack_prefix(name) == ""}
        manifests = [each for each in self._each(self._readable, self.names_in(sizes)) if each]
        named = {pack for manifest in manifests for pack, _ in manifest.packs}
        places: dict[Block, Place] = {}
        for name, entries in self._each(self._entries, [(name, nbytes) for name, nbytes in packs.items() if name not in named]):
            places |= {
                (each.key, each.root): Place(name, each.offset, each.stored_bytes, each.raw_bytes, each.codec)
                for each in entries
                if each.root is not None
            }
        for manifest in sorted(manifests, key=lambda each: each.created_s):
            whole = [packs.get(name) == nbytes for name, nbytes in manifest.packs]
            places |= {
                (row.key, row.root): Place(manifest.packs[row.pack][0], row.offset, row.stored_bytes, row.raw_bytes, row.codec)
                for row in manifest.rows
                if whole[row.pack]
            }
        return Known(places, packs)

    def confirm(self, packs: Iterable[tuple[str, int]]) -> None:
        """Raise (kind `storage`), naming the first, unless each of these packs is there, by reading its end."""
        for problem in self._each(self._missing, list(packs)):
            if problem:
                raise TieredKVError(Kind.STORAGE, problem, missing=True)

    @contextmanager
    def lease(self, kind: str = "checkpoint", say: Callable[[str], object] = log.info) -> Iterator[Lease]:
        """Nothing is deleted here while this is held: by whoever writes checkpoints, or reads one that may not go meanwhile.

        Waits for somebody who is deleting, and says so. Renew it before it runs out (`TTL_S`). Raises (kind `storage`) where
        that takes too long.
        """
        self._await_collector(say)
        lease = Lease(self.store, kind, self.now_s)
        try:
            self._await_collector(say, lease)
            yield lease
        finally:
            lease.release()

    def collect(self, keep: int | None) -> Collected:
        """Delete generated checkpoints but the `keep` newest (None: none of them), and packs that no checkpoint names any more."""
        return collect(self, keep)

    def overview(self) -> list[Listed]:
        """All checkpoints in the order of `names`, the damaged ones among them. Cost: reads every manifest."""
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
        """What is damaged of these checkpoints (None: of everything), reading every byte. `progress`: bytes done, bytes in all."""
        return verify(self, names, progress)

    def _each(self, function: Callable, items: Collection) -> list:
        """`function` of each, in several threads, in order."""
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(function, items))

    def is_there(self, name: str) -> bool:
        """Whether the object can be read, whatever a listing says."""
        try:
            self.store.get_range(name, 0, 1)
        except TieredKVError as error:
            if error.context.get("missing"):
                return False
            if error.kind is Kind.CORRUPT or self.store.sizes().get(name) == 0:  # some stores give no range of an empty object
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
        """A manifest, None (logged) for what is none."""
        manifest = self._manifest_or_error(name)
        if isinstance(manifest, TieredKVError):
            log.warning("left out: %s", manifest)
        return manifest if isinstance(manifest, Manifest) else None

    def _manifest_or_error(self, name: str) -> Manifest | TieredKVError | None:
        """A manifest, or what is wrong with it; None for an object that is gone or was never one."""
        try:
            return Manifest.read(self.store, name)
        except TieredKVError as error:
            if error.context.get("missing"):
                return None
            if error.kind is not Kind.CORRUPT:
                raise
            return error if self.is_manifest(name) else None

    def is_manifest(self, name: str) -> bool:
        """Whether an object that cannot be read as a manifest is taken for one: by its name, or by how it begins."""
        if name.endswith(".tkv"):
            return True
        try:
            return is_like_manifest(self.store.get(name))
        except TieredKVError as error:
            if error.context.get("missing"):
                return False
            raise

    def _entries(self, pack: tuple[str, int]) -> tuple[str, tuple]:
        try:
            return pack[0], read_footer(self.store, *pack).entries
        except TieredKVError as error:
            if error.kind is not Kind.CORRUPT and not error.context.get("missing"):
                raise
            log.warning("left out: %s", error)
            return pack[0], ()

    def _missing(self, pack: tuple[str, int]) -> str | None:
        name, nbytes = pack
        try:
            trailer = unpack_trailer(self.store.get_range(name, max(nbytes - TRAILER_BYTES, 0), TRAILER_BYTES))
        except TieredKVError as error:
            if error.kind is not Kind.CORRUPT and not error.context.get("missing"):
                raise
            return f"the pack {name} is not there in full: {error}"
        if trailer is None or trailer.rows_offset + footer_bytes(trailer.rows) != nbytes:
            return f"the pack {name} is not there in full: its {nbytes} bytes do not end in its footer"
        return None

    def _await_collector(self, say: Callable[[str], object], lease: Lease | None = None) -> None:
        """Return when nobody deletes, in a listing that shows the lease."""
        begun = self.now_s()
        while True:
            listed = self.store.sizes()
            now_s = self.now_s()
            marks = [mark.name for mark in marks_in(listed) if mark.kind == COLLECTING and mark.is_live(now_s)]
            if not marks and (lease is None or lease.name in listed):
                return
            if now_s - begun > (TTL_S + SKEW_S + _LISTED_WITHIN_S if marks else _LISTED_WITHIN_S):
                what = f"{marks[0]} still deletes" if marks else f"the listing does not show {lease.name}"
                raise TieredKVError(Kind.STORAGE, f"waited in vain on {self.store.url}: {what}", object=what)
            say(f"waiting for {marks[0]}, which deletes what no checkpoint needs" if marks else "waiting for the listing to show the lease")
            if lease:
                lease.renew_if_half_gone()
            self._sleep(_POLL_S)


@contextmanager
def open_repository(url: str, *, create: bool = True) -> Iterator[Repository]:
    """The checkpoints at a URL, as `open_store` knows them; closed at the end. `create=False`: to read only, a folder is not made."""
    with open_store(url, setting="url", create=create) as store:
        yield Repository(store)


def reusable(known: Known, wanted: Iterable[Block]) -> dict[Block, Place]:
    """Where wanted blocks may stay: in packs of which at least half is wanted. The others are to be written again, so that of all
    packs that a checkpoint names no more than half is dead.
    """
    found = {block: known.places[block] for block in wanted if block in known.places}
    live: dict[str, int] = {}
    for place in found.values():
        live[place.pack] = live.get(place.pack, 0) + place.stored_bytes + ROW_BYTES
    kept = {pack for pack, nbytes in live.items() if 2 * nbytes >= known.packs[pack] - TRAILER_BYTES}
    return {block: place for block, place in found.items() if place.pack in kept}


def may_be_manifest(name: str) -> bool:
    """Whether that can be the name of a checkpoint: no other object's of a repository, no hidden file's, in no folder."""
    if not name or name == LATEST or "/" in name or "\n" in name or name.startswith(".") or name.endswith(".part"):
        return False
    return pack_prefix(name) is None and mark_of(name) is None


def _listed(name: str, manifest: Manifest | TieredKVError, users: dict[str, int]) -> Listed:
    created_s = created_of(name) or 0.0
    if isinstance(manifest, TieredKVError):
        return Listed(name, created_s, error=str(manifest))
    shared = sum(nbytes for pack, nbytes in manifest.packs if users[pack] > 1)
    stored = sum(row.stored_bytes for row in manifest.rows)
    pack_bytes = sum(nbytes for _, nbytes in manifest.packs)
    return Listed(name, manifest.created_s or created_s, len(manifest.rows), stored, pack_bytes, shared, manifest.models)


def _name_digest(name: bytes) -> str:
    return blake2b(name, digest_size=32).hexdigest()
