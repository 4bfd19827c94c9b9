"""The node's side of one worker's session: checks the worker's arguments, and keeps track of its reservations."""

import reprlib
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tiered_kv.blocks import BlockInfo, Hint, Location, Tier
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import KEY_BYTES, BlockKey
from tiered_kv.node.insight.explaining import explain, known_namespaces
from tiered_kv.node.packed import Packed
from tiered_kv.protocol.epochs import FAMILIES_MAX
from tiered_kv.protocol.explanation import KEYS_MAX, Explanation, KnownNamespace
from tiered_kv.protocol.messages import BlockRun, Introduction, NodeStats, PackedBlock
from tiered_kv.protocol.model_info import ModelInfo
from tiered_kv.protocol.probes import Probe
from tiered_kv.protocol.session import PROTOCOL, Life

if TYPE_CHECKING:
    from tiered_kv.node.node import Node

LOCK_WAIT_S = 0.05  # no thread holds the engine's lock during I/O; decisions under it may take some milliseconds


class NodeSession:
    """One worker's session, in the node's process. `reserved` maps payload offsets to bytes; the engine's lock guards it."""

    def __init__(self, node: "Node") -> None:
        self._node = node
        self.reserved: dict[int, int] = {}
        self.tenant = ""
        """The tenant of the namespace that was introduced last. The tenant's quota limits reservations."""
        self.life = Life(node.storage.index.identity, node.storage.index.generation)

    def allow(self, wait_s: float) -> None:
        pass

    def hello(self, protocol: int) -> dict[str, int]:
        """Answer the first request over a socket. Returns the protocol version, the node's life, and the size of its arena.

        Raises (kind `transport`) if the worker uses another version of the protocol.
        """
        if protocol != PROTOCOL:
            raise TieredKVError(
                Kind.TRANSPORT,
                f"the worker speaks version {protocol!r} of the session protocol, this node version {PROTOCOL};"
                " run one version of tiered_kv on this machine",
            )
        return {"protocol": PROTOCOL, **self.life._asdict(), "arena_bytes": self._node.storage.index.arena_bytes}

    def reserve(self, nbytes: int, keys: list[BlockKey], parent: BlockKey | None, wait_s: float | None = None) -> list[int]:
        offsets = self.reserve_within(nbytes, keys, parent, self._node.config.store_wait_ms / 1000 if wait_s is None else _seconds(wait_s))
        if not offsets:
            self._node.service.refused(len(keys))
            with self._node.engine.lock:
                self._node.gone.refused(keys)
                self._node.ceiling.stored(keys)
        return offsets

    def reserve_within(
        self, nbytes: int, keys: list[BlockKey], parent: BlockKey | None, wait_s: float, *, is_coded: bool = False
    ) -> list[int]:
        """As `reserve`, but also for encoded blocks (`is_coded`). Returns within `wait_s` plus some milliseconds."""
        are_keys = isinstance(keys, list) and all(type(key) is bytes and len(key) == KEY_BYTES for key in keys)
        if not isinstance(nbytes, int) or nbytes < 1 or not are_keys:
            raise TieredKVError(
                Kind.LAYOUT, f"reserve: nbytes must be a positive integer and keys a list of {KEY_BYTES}-byte keys, got nbytes={nbytes!r}"
            )
        begun_s = time.monotonic()
        lock = self._node.engine.lock
        if not lock.acquire(timeout=wait_s + LOCK_WAIT_S):
            return []
        try:
            self._node.check_open()
            left_s = max(begun_s + wait_s - time.monotonic(), 0.0)
            # releases the lock while it waits
            offsets = self._node.engine.reserve(nbytes, keys, parent, left_s, is_coded=is_coded, tenant=self.tenant)
            if not self._node.is_open(self):
                self._node.free_extents(offsets)
                raise TieredKVError(Kind.TRANSPORT, "reserve: the session was closed while the reservation was made")
            self.reserved.update(dict.fromkeys(offsets, nbytes))
        finally:
            lock.release()
        return offsets

    def introduce(self, root: BlockKey, info: dict[str, Any]) -> Introduction:
        _check_chain(root, [])
        introduction = self._node.introduce(root, ModelInfo.of_message(info))
        self.tenant = self._node.epochs.tenant_of(root)
        return introduction

    def commit(self, root: BlockKey, nbytes: int, blocks: list[PackedBlock]) -> list[bool]:
        _check_chain(root, [block[:2] for block in blocks])
        packed = []
        for block in blocks:
            key, parent, offset, depth = block[:4]
            digest = _digest(*block[4:]) if len(block) > 4 else None
            info = BlockInfo(key, parent, root, _whole(depth))
            packed.append(Packed(info, Location(Tier.HOST, 0, 0, offset, nbytes, nbytes), 0.0, digest))
        with self._node.running():
            self._node.ceiling.stored([each.info.key for each in packed])
            return self.commit_packed(packed)

    def commit_packed(self, packed: list[Packed], *, note_touches: bool = True) -> list[bool]:
        """As `commit`, for blocks of any size, raw or encoded.

        `note_touches`: first report earlier uses to the policy, which may take a millisecond. Otherwise the next beat reports them.
        """
        with self._node.running():
            self._take({each.location.offset: each.location.stored_bytes for each in packed}, len(packed))
            return self._node.commit(packed, note_touches=note_touches)

    def release(self, offsets: list[int]) -> None:
        if not offsets:
            return
        with self._node.running():
            self._take(dict.fromkeys(offsets), len(offsets))
            self._node.free_extents(offsets)

    def pull(self, run: BlockRun, wait_s: float) -> int:
        _check_chain(run.root, [(key, run.parent) for key in run.keys])
        checked = run._replace(keys=list(dict.fromkeys(run.keys)), depth=_whole(run.depth))
        return self._node.pull(checked, _seconds(wait_s))

    def doubt(self, keys: list[BlockKey]) -> None:
        for key in keys:
            _check_chain(key, [])
        self._node.doubt(keys)

    def bring(self, keys: list[BlockKey], wait_s: float) -> None:
        for key in keys:
            _check_chain(key, [])
        self._node.bring(keys, _seconds(wait_s))

    def hint(
        self, last_block: BlockKey, answer_tokens: int | None, pinned_s: float | None, reuse_within_s: float | None, ended: bool
    ) -> None:
        _check_chain(last_block, [])
        self._node.hint(last_block, Hint(answer_tokens, pinned_s, reuse_within_s, ended))

    def locate(self, keys: list[BlockKey], wait_s: float) -> list[list[str]]:
        return self._node.locate(keys, _seconds(wait_s))

    def explain(self, keys: list[BlockKey], wait_s: float, ask_peers: bool) -> Explanation:
        if type(keys) is not list or len(keys) > KEYS_MAX:
            raise TieredKVError(Kind.TRANSPORT, f"explain: expected a list of at most {KEYS_MAX} keys, got {reprlib.repr(keys)}")
        for key in keys:
            _check_chain(key, [])
        return explain(self._node, keys, _seconds(wait_s), ask_peers=bool(ask_peers))

    def namespaces(self, tenant: str) -> list[KnownNamespace]:
        return known_namespaces(self._node, tenant)

    def probe(self, root: BlockKey, probe: Sequence[Any]) -> str:
        _check_chain(root, [])
        return self._node.probes.match(root, Probe.of_message(probe))

    def salt(self, tenant: str) -> str:
        return self._node.salt(tenant)

    def new_epoch(self, families: list[bytes], keep: bool) -> tuple[int, list[str]]:
        if type(families) is not list or not 0 < len(families) <= FAMILIES_MAX:
            raise TieredKVError(Kind.TRANSPORT, f"new_epoch: expected 1 to {FAMILIES_MAX} families, got {reprlib.repr(families)}")
        for family in families:
            _check_chain(family, [])
        return self._node.epochs.new_epoch(families, bool(keep))

    def stats(self) -> NodeStats:
        return self._node.stats()

    def close(self) -> None:
        self._node.session_closed(self)

    def _take(self, sizes: Mapping[int, int | None], count: int) -> None:
        """Remove extents from the session. `sizes`: bytes by offset; None accepts any size. `count`: how many offsets the worker sent.

        Raises (kind `transport`) if an offset was sent twice, or the session has not reserved an extent there with this size.
        """
        ours = all(offset in self.reserved and nbytes in (None, self.reserved[offset]) for offset, nbytes in sizes.items())
        if not ours or len(sizes) != count:
            raise TieredKVError(
                Kind.TRANSPORT, f"offsets must be distinct extents reserved by the worker's session, with their sizes, got {[*sizes]!r}"
            )
        for offset in sizes:
            del self.reserved[offset]


def _check_chain(root: BlockKey, blocks: list[tuple[BlockKey, BlockKey | None]]) -> None:
    """Raise (kind `transport`) if a worker sent invalid keys: `root` and `blocks` (key, parent) must be keys of KEY_BYTES bytes."""
    for key, parent in ((root, None), *blocks):
        is_block = type(key) is bytes and len(key) == KEY_BYTES
        has_parent = parent is None or (type(parent) is bytes and len(parent) == KEY_BYTES)
        if not is_block or not has_parent or key == parent:
            raise TieredKVError(
                Kind.TRANSPORT, f"key and parent must be different keys of {KEY_BYTES} bytes, got key={key!r}, parent={parent!r}"
            )


def _whole(depth: object) -> int:
    """Returns `depth` if it is a valid depth of a block, a whole number of 32 bits; else raises (kind `transport`)."""
    if type(depth) is not int or not 0 <= depth < 1 << 32:
        raise TieredKVError(Kind.TRANSPORT, f"depth must be a whole number from 0 to 2**32 - 1, got {depth!r}")
    return depth


def _seconds(wait_s: object) -> float:
    """Returns `wait_s` if it is a finite number of seconds, 0 or more; else raises (kind `transport`)."""
    if isinstance(wait_s, bool) or not isinstance(wait_s, int | float) or not 0 <= wait_s < float("inf"):
        raise TieredKVError(Kind.TRANSPORT, f"wait_s must be a finite number of seconds, 0 or more, got {wait_s!r}")
    return wait_s


def _digest(digest: object = None) -> int | None:
    """Returns `digest` if it is None or a whole number of 64 bits; else raises (kind `transport`)."""
    if digest is not None and (type(digest) is not int or not 0 <= digest < 1 << 64):
        raise TieredKVError(Kind.TRANSPORT, f"commit: a digest must be a whole number of 64 bits, got {digest!r}")
    return digest
