"""Checkpoints for the tests. Block n is always the same, and a child of block n - 1 unless n is a multiple of ten."""

from collections.abc import Iterable, Sequence

from tests.unit.tiers.records import ROOT, key_of, record_of
from tiered_kv.blocks import Tier
from tiered_kv.checkpoint.manifest import Manifest, Model
from tiered_kv.checkpoint.manifest_rows import Row
from tiered_kv.checkpoint.repository import Repository, reusable
from tiered_kv.layout import KVLayout
from tiered_kv.tiers.log import Record
from tiered_kv.tiers.objects.packs import PackInfo, PackWriter
from tiered_kv.tiers.objects.store import MemoryStore, ObjectStore

NOW_S = 1_767_225_600.0
LAYOUT = KVLayout(2, 1, 8, "bfloat16", 20)
MODELS = (Model(ROOT, LAYOUT, "tiny", {"weights": "of a test", "tenant": "default"}),)
FRAME_BYTES = 300


class Clock:
    """Unix time that passes only in `sleep`."""

    def __init__(self) -> None:
        self.now = NOW_S

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def chained(number: int) -> Record:
    record = record_of(number, FRAME_BYTES)
    return record if number % 10 else record._replace(info=record.info._replace(parent=None))


def pack(store: ObjectStore, numbers: Iterable[int]) -> PackInfo:
    """Write the blocks with these numbers to one pack."""
    writer = PackWriter(store)
    for number in numbers:
        writer.add(chained(number))
    return writer.finish()


def row(number: int, at: int, offset: int, hits: int = 0) -> Row:
    """Returns the row of a block in pack number `at`."""
    record = chained(number)
    return Row(
        record.key, record.info.parent, ROOT, number % 10, at, offset, FRAME_BYTES, record.raw_bytes, record.codec, Tier.HOST.value, hits
    )


def manifest(packs: Sequence[PackInfo], created_s: float = NOW_S) -> Manifest:
    """Returns a manifest of all blocks in these packs."""
    depths: dict[bytes, int] = {}
    rows = []
    for at, info in enumerate(packs):
        for each in info.entries:
            depths[each.key] = 0 if each.parent is None else depths[each.parent] + 1
            facts = at, each.offset, each.stored_bytes, each.raw_bytes, each.codec, Tier.HOST.value, 0
            rows.append(Row(each.key, each.parent, ROOT, depths[each.key], *facts))
    return Manifest(tuple((info.name, info.nbytes) for info in packs), MODELS, tuple(rows), created_s, "test", {})


def checkpoint(repository: Repository, numbers: Sequence[int], name: str | None = None) -> str:
    """Write a checkpoint as a cluster does: under a lease, and without writing blocks again that are in a pack."""
    with repository.lease() as lease:
        return checkpoint_unsafely(repository, numbers, name, lease)


def checkpoint_unsafely(repository: Repository, numbers: Sequence[int], name: str | None = None, lease=None) -> str:
    known = repository.known()
    kept = reusable(known, [(key_of(number), ROOT) for number in numbers])
    new = [number for number in numbers if (key_of(number), ROOT) not in kept]
    places = {key: (place.pack, place.offset) for (key, _), place in kept.items()}
    sizes = dict(known.packs)
    if new:
        info = pack(repository.store, new)
        places |= {each.key: (info.name, each.offset) for each in info.entries}
        sizes[info.name] = info.nbytes
    names = sorted({pack for pack, _ in places.values()})
    packs = [(name, sizes[name]) for name in names]
    rows = tuple(row(number, names.index(places[key_of(number)][0]), places[key_of(number)][1]) for number in numbers)
    if lease:
        lease.renew()
    repository.confirm(packs)
    return repository.publish(Manifest(tuple(packs), MODELS, rows, repository.now_s(), "test", {}), name, lease)


def repository(store: ObjectStore | None = None) -> Repository:
    """Returns a repository whose time passes only when it waits."""
    clock = Clock()
    return Repository(MemoryStore() if store is None else store, clock, clock.sleep)


def flipped(content: bytes, at: int, bit: int = 0) -> bytes:
    return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]
