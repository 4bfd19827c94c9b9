"""Deletes old checkpoints, and packs that no checkpoint uses.

Other processes may write checkpoints at the same time. In case of doubt, nothing is deleted.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tiered_kv.checkpoint.leases import COLLECTING, Lease, markers_in
from tiered_kv.checkpoint.manifest import Manifest, created_of
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.objects.packs import pack_prefix

if TYPE_CHECKING:
    from tiered_kv.checkpoint.repository import Repository


class CollectionResult(NamedTuple):
    """The numbers of deleted manifests and packs, and the bytes of both in total. `skipped`: why nothing was deleted, else ""."""

    manifests_deleted: int = 0
    packs_deleted: int = 0
    bytes_deleted: int = 0
    skipped: str = ""


def collect(repository: "Repository", keep: int | None) -> CollectionResult:
    """Delete old checkpoints and unused packs, as `Repository.collect` describes. Returns the counts.

    A delete mark is an object that makes other processes wait (see `leases`). The order of the steps makes this safe: write a
    delete mark, look for leases, write a second mark (the fence, which proves that the next listing is up to date), list the
    objects, read all manifests, delete.
    """
    if keep is not None and keep < 1:
        raise TieredKVError(Kind.CONFIG, f"keep: must be a whole number of at least 1, got {keep!r}", setting="keep")
    mark = Lease(repository.store, COLLECTING, repository.now_s)
    try:
        if reason := _others(repository, mark):
            return CollectionResult(skipped=reason)
        return _collect_marked(repository, keep, mark)
    finally:
        mark.release()


def _others(repository: "Repository", mark: Lease) -> str:
    """Returns the reason why nothing may be deleted now, or "" if deleting is safe.

    Removes expired leases and delete marks of other processes.
    """
    listed = repository.store.sizes()
    others = [each for each in markers_in(listed) if each.name != mark.name]
    now_s = repository.now_s()
    if expired := [each.name for each in others if not each.is_live(now_s)]:
        repository.store.delete(expired)
    if mark.name not in listed:
        return _LAGS
    live = [each for each in others if each.is_live(now_s)]
    return f"another process is working on this store: {live[0].name}" if live else ""


_LAGS = "the listing of the store is not up to date"


def _collect_marked(repository: "Repository", keep: int | None, mark: Lease) -> CollectionResult:
    """Delete old checkpoints and unused packs. Returns the counts.

    The caller has made sure that no other process is working, and has written the delete mark `mark`. Processes that start now
    wait until the mark is removed.
    """
    fence = Lease(
        repository.store, COLLECTING, repository.now_s
    )  # a listing that shows the fence also shows every manifest published before it
    try:
        sizes = repository.store.sizes()
    finally:
        fence.release()
    if fence.name not in sizes:
        return CollectionResult(skipped=_LAGS)
    kept, doomed, pointed = _chosen(repository, sizes, keep)
    named: set[str] = set()
    for name in kept:
        try:
            named.update(pack for pack, _ in Manifest.read(repository.store, name).packs)
        except TieredKVError as error:
            if error.kind is not Kind.CORRUPT and not error.context.get("missing"):
                raise
            if error.kind is not Kind.CORRUPT or repository.is_manifest(name):
                return CollectionResult(skipped=f"the packs of a checkpoint are unknown: {error}")
    if pointed in doomed:
        repository.point(max(name for name in kept if created_of(name) is not None))
    packs = [name for name in sizes if pack_prefix(name) == "" and name not in named]
    _delete(repository, [*doomed, *packs], mark)
    return CollectionResult(len(doomed), len(packs), sum(sizes[name] for name in [*doomed, *packs]))


def _chosen(repository: "Repository", sizes: dict[str, int], keep: int | None) -> tuple[list[str], list[str], str | None]:
    """Returns the names of the manifests to keep, of those to delete, and of the newest, as the object LATEST says (None: unreadable).

    The manifest that LATEST names is kept even if the listing does not show it yet.
    """
    names = repository.names_in(sizes)
    generated = [name for name in names if created_of(name) is not None]
    doomed = generated[: -keep or None] if keep is not None else []
    kept = [name for name in names if name not in set(doomed)]
    try:
        pointed = repository.pointed()
    except TieredKVError as error:
        if error.kind is not Kind.CORRUPT:
            raise
        pointed = None
    if pointed is not None and pointed not in sizes and repository.is_there(pointed):
        kept.append(pointed)
    return kept, doomed, pointed


def _delete(repository: "Repository", names: Sequence[str], mark: Lease) -> None:
    """Delete objects one by one, and renew the delete mark before it expires. Raises (kind `storage`) if it has expired."""
    for name in names:
        mark.renew_if_half_gone()
        repository.store.delete([name])
