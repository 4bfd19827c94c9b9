"""Verifies checkpoints by reading every byte, and reports damaged and missing objects."""

from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from tiered_kv.checkpoint.manifest import Manifest
from tiered_kv.codecs.frame import open_frame
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.tiers.objects.packs import pack_prefix, read_footer
from tiered_kv.tiers.objects.store import ObjectStore

if TYPE_CHECKING:
    from tiered_kv.checkpoint.repository import Repository

RANGE_BYTES = 16 << 20
THREADS = 8


class Problem(NamedTuple):
    """The name of a damaged or missing object, and a description of the problem."""

    object: str
    message: str


class _ListedFrame(NamedTuple):
    """The description of a frame in a pack's footer or in a manifest."""

    offset: int
    stored_bytes: int
    key: BlockKey
    root: BlockKey | None
    raw_bytes: int
    codec: int

    @property
    def end(self) -> int:
        return self.offset + self.stored_bytes


class _Range(NamedTuple):
    """Frames of one pack that are read with one request."""

    pack: str
    frames: list[_ListedFrame]

    @property
    def nbytes(self) -> int:
        return max(frame.end for frame in self.frames) - self.frames[0].offset


def verify(repository: "Repository", names: Collection[str] | None, progress: Callable[[int, int], object]) -> list[Problem]:
    """Verify checkpoints, as `Repository.verify` describes. Returns the problems without duplicates."""
    store = repository.store
    sizes = store.sizes()
    chosen = repository.names_in(sizes) if names is None else list(names)
    manifests, problems = _manifests(repository, chosen, names is not None)
    packs = {name: nbytes for name, nbytes in sizes.items() if names is None and pack_prefix(name) == ""}
    if names is None:
        problems += _pointer(repository)
    for name, manifest in manifests.items():
        for pack, nbytes in manifest.packs:
            packs.setdefault(pack, sizes.get(pack, nbytes))
            if packs[pack] != nbytes:
                problems.append(Problem(pack, f"it must have {nbytes} bytes as listed in checkpoint {name}, got {packs[pack]}"))
    with ThreadPoolExecutor(THREADS) as pool:
        footers = dict(zip(packs, pool.map(lambda pack: _footer(store, *pack), packs.items()), strict=True))
        problems += [found for found in footers.values() if isinstance(found, Problem)]
        frames = {pack: set() if isinstance(found, Problem) else found for pack, found in footers.items()}
        for name, manifest in manifests.items():
            problems += _rows(name, manifest, footers, frames)
        for pack, nbytes in packs.items():
            beyond = {frame for frame in frames[pack] if frame.end > nbytes}
            problems += [Problem(pack, f"at byte {frame.offset}: the pack ends within this block") for frame in beyond]
            frames[pack] -= beyond
        ranges = [each for pack, found in frames.items() for each in _ranges(pack, found)]
        done, total = 0, sum(each.nbytes for each in ranges)
        progress(0, total)
        for each, found in zip(ranges, pool.map(lambda each: _read(store, each), ranges), strict=True):
            problems += found
            done += each.nbytes
            progress(done, total)
    return list(dict.fromkeys(problems))


def _manifests(repository: "Repository", names: Iterable[str], were_named: bool) -> tuple[dict[str, Manifest], list[Problem]]:
    """Read the manifests `names`. Returns the valid ones by name, and a problem for each invalid one.

    `were_named`: whether the user chose the names. If not, an object that was never a manifest is not a problem.
    """
    found: dict[str, Manifest] = {}
    problems: list[Problem] = []
    for name in names:
        try:
            found[name] = Manifest.read(repository.store, name)
        except TieredKVError as error:
            if not _is_damage(error):
                raise
            if were_named or error.kind is Kind.STORAGE or repository.is_manifest(name):
                problems.append(Problem(name, str(error)))
    return found, problems


def _pointer(repository: "Repository") -> list[Problem]:
    try:
        pointed = repository.pointed()
    except TieredKVError as error:
        if error.kind is not Kind.CORRUPT:
            raise
        return [Problem("LATEST", str(error))]
    if pointed is not None and not repository.is_there(pointed):
        return [Problem("LATEST", f"it names {pointed}, which does not exist")]
    return []


def _footer(store: ObjectStore, pack: str, nbytes: int) -> set[_ListedFrame] | Problem:
    try:
        entries = read_footer(store, pack, nbytes).entries
    except TieredKVError as error:
        if not _is_damage(error):
            raise
        return Problem(pack, str(error))
    return {_ListedFrame(each.offset, each.stored_bytes, each.key, each.root, each.raw_bytes, each.codec) for each in entries}


def _rows(
    name: str, manifest: Manifest, footers: dict[str, set[_ListedFrame] | Problem], frames: dict[str, set[_ListedFrame]]
) -> Iterable[Problem]:
    """Yields a problem for each row of a manifest whose frame is not in the footer of its pack.

    If a pack has no valid footer, the frames of its rows are added to `frames` instead, so that their bytes are still verified.
    """
    for row in manifest.rows:
        pack = manifest.packs[row.pack][0]
        frame = _ListedFrame(row.offset, row.stored_bytes, row.key, row.root, row.raw_bytes, row.codec)
        if isinstance(footers[pack], Problem):
            frames[pack].add(frame)
        elif frame not in footers[pack]:
            yield Problem(name, f"its block {row.key.hex()} is not in the footer of pack {pack} as described")


def _ranges(pack: str, frames: Collection[_ListedFrame]) -> Iterable[_Range]:
    """Group the frames of a pack into ranges of up to `RANGE_BYTES`. A larger frame is a range of its own."""
    current: list[_ListedFrame] = []
    for frame in sorted(frames, key=lambda frame: (frame.offset, frame.stored_bytes, frame.key)):
        if current and frame.end - current[0].offset > RANGE_BYTES:
            yield _Range(pack, current)
            current = []
        current.append(frame)
    if current:
        yield _Range(pack, current)


def _read(store: ObjectStore, each: _Range) -> list[Problem]:
    begin = each.frames[0].offset
    try:
        view = store.get_range(each.pack, begin, each.nbytes)
    except TieredKVError as error:
        if not _is_damage(error):
            raise
        return [Problem(each.pack, str(error))]
    problems = []
    for frame in each.frames:
        where = f"at byte {frame.offset}"
        try:
            found = open_frame(view[frame.offset - begin : frame.end - begin], frame.key, frame.root)
        except TieredKVError as error:
            problems.append(Problem(each.pack, f"{where}: {error}"))
            continue
        if (found.codec.id, found.raw_bytes) != (frame.codec, frame.raw_bytes):
            expected = f"codec {frame.codec} and {frame.raw_bytes} raw bytes"
            message = f"{where}: the frame must have {expected}, got {found.codec.id} and {found.raw_bytes}"
            problems.append(Problem(each.pack, message))
    return problems


def _is_damage(error: TieredKVError) -> bool:
    return error.kind is Kind.CORRUPT or bool(error.context.get("missing"))
