"""The client: a worker's access to the cache. It reads from shared memory without a call, and calls its node for everything else.

Axes: L layers, 2 (key, value), H KV heads, N tokens, D head dim. No fault of the cache raises an exception here: if the node does not
answer, a fetch is a miss, and a store is refused. Errors mean that the caller broke the contract (kinds `tokens`, `layout`) or used a
closed client (`closed`).
"""

import logging
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypedDict, TypeVar, Union

import torch

from tiered_kv import forking
from tiered_kv.blocks import PEER, Explained, Fetched, Hint, Match, Stored, Tier
from tiered_kv.client.access import AccessHolder, NodeAccess
from tiered_kv.client.kv_copy import LayerPairs
from tiered_kv.client.prefill_savings import Savings
from tiered_kv.client.profile import Timed, untimed
from tiered_kv.client.reader import BlockSource, Found
from tiered_kv.client.session_pool import SessionPool
from tiered_kv.client.writer import BlockWriter
from tiered_kv.clock import Clock, SystemClock
from tiered_kv.codecs import codec_by_id
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey, Namespace, as_token_ids
from tiered_kv.layout import KVLayout
from tiered_kv.protocol.messages import NodeStats
from tiered_kv.protocol.session import Session

if TYPE_CHECKING:
    import numpy as np

    from tiered_kv.protocol.probes import Probe

log = logging.getLogger(__name__)

WARN_EVERY_S = 30.0
QUESTION_S_MAX = 1.0
"""The longest wait of `match`, `explain`, `stats` and hints for an answer. The setting `fetch_deadline_ms` may shorten it."""
EPOCH_BITS = 63
LABELS = {tier.value: tier.label for tier in Tier}

TokenIds = Union[Sequence[int], "np.ndarray", torch.Tensor]


P = ParamSpec("P")
R = TypeVar("R")


class ClientStats(TypedDict):
    """The counts of a client, and the figures of its node (None while the node does not answer)."""

    client: dict[str, float | None]
    node: NodeStats | None


def _while_open(method: Callable[Concatenate["Client", P], R]) -> Callable[Concatenate["Client", P], R]:
    """Decorate a method whose memory another thread's `close` may unmap. Then it raises (kind `closed`), as later calls do."""

    @wraps(method)
    def guarded(self: "Client", /, *arguments: P.args, **options: P.kwargs) -> R:
        try:
            return method(self, *arguments, **options)
        except (ValueError, AttributeError):  # a released view; an arena that `close` removed
            self._check_open()
            raise

    return guarded


class Names(NamedTuple):
    """The namespace of a client at one moment. Each call reads it once, so that a change affects later calls only."""

    namespace: Namespace
    root: BlockKey
    keys: Callable[["np.ndarray"], list[BlockKey]]


class Client:
    """Fetches and stores the KV of token prefixes, in the blocks of one layout under one namespace.

    Safe to use from several threads. On the same node, a fetch takes about 60 µs plus the copy and calls no other process. A store
    makes two round trips of about 30 µs besides its copy.
    """

    def __init__(
        self,
        layout: KVLayout,
        namespace: Namespace,
        holder: AccessHolder,
        introduce: Callable[[Session, Namespace], None] = lambda session, namespace: None,
        *,
        clock: Clock | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.layout = layout
        self.followed: object | None = None
        """The `integrations.modelstate.ModelState` of the model that the client serves; None without one. Of several models, the last."""
        self._timed: Timed = untimed
        self._names = self._names_of(namespace)
        self._introduce = introduce
        self._holder = holder
        self._clock = clock or SystemClock()
        self._on_close = on_close
        self._counts: Counter[str] = Counter()
        self._savings = Savings()
        self._lock = threading.Lock()
        self._use_lock = threading.Lock()
        self._closed = False
        self._warn_again_s = float("-inf")
        forking.register(self)

    def after_fork(self) -> None:
        """Renew the locks in a child process: threads of the parent may have held them."""
        self._lock, self._use_lock = threading.Lock(), threading.Lock()

    @property
    def _source(self) -> BlockSource:
        """The reader of the present life of the node's files."""
        return self._holder.present.source

    @property
    def _writer(self) -> BlockWriter:
        """The writer into the present life of the node's files."""
        return self._holder.present.writer

    @property
    def _pool(self) -> SessionPool:
        """The sessions with the node's present life."""
        return self._holder.present.pool

    def greet(self, wait_s: float, must_answer: bool = False) -> None:
        """Connect to the node now. Raises if its settings do not fit this model; with `must_answer`, also if it does not answer."""
        try:
            self._pool.check(wait_s)
        except TieredKVError as error:
            if error.kind is not Kind.TRANSPORT or must_answer:
                raise
            self._degraded("greeting", error)

    @_while_open
    def match(self, token_ids: TokenIds) -> Match:
        """Returns the longest prefix of whole blocks that a fetch could return now, and its tiers. Moves no data.

        `token_ids`: one prompt, as a list, array or tensor of whole numbers.
        """
        keys, access = self._keys(token_ids), self._holder.take()
        found = access.source.find(keys)
        by_tier = self._tokens_by_tier(found)
        rest = keys[len(found) :]
        if rest and access.source.peers:
            elsewhere = len(self._locate(access, rest))
            if elsewhere:
                by_tier[PEER] = elsewhere * self.layout.block_tokens
        return Match(sum(by_tier.values()), by_tier)

    @_while_open
    def fetch(
        self, token_ids: TokenIds, out: torch.Tensor | None = None, *, deadline_ms: int | None = None, namespace: Namespace | None = None
    ) -> Fetched:
        """Returns the KV of the longest prefix of whole blocks that can be read in time.

        `out`: a tensor (L, 2, H, N, D) of the layout's dtype on any device, with any N. As many whole blocks of the prefix as fit are
        written to its first tokens; the rest of it is undefined. Without `out`, the KV is newly allocated on the CPU.
        `deadline_ms` bounds the wait for other nodes and disks (default: the cluster's setting). Later blocks are misses.
        `namespace`: the namespace to read (default: the client's current one, which another thread may change with `use`).
        """
        begun_s = self._clock.now_s()
        names, access = self._names_for(namespace), self._holder.take()
        keys, source = self._keys(token_ids, names), access.source
        if out is not None:
            room = out.shape[-2] if getattr(out, "ndim", 0) == 5 else len(keys) * self.layout.block_tokens
            self.layout.check_kv(out, room, "out")
            if 0 in out.stride() and any(step == 0 and size > 1 for step, size in zip(out.stride(), out.shape, strict=True)):
                raise TieredKVError(
                    Kind.LAYOUT, "out: must be a tensor that can be written to, got an expanded tensor, whose elements share memory"
                )
            keys = keys[: out.shape[-2] // self.layout.block_tokens]
        deadline_s = self._clock.now_s() + (access.deadline_s if deadline_ms is None else deadline_ms / 1000)
        found = first_found = source.find(keys)
        if hidden := source.hidden(found):
            found = self._bring(access, keys, hidden, deadline_s)
        local = len(found)
        if local < len(keys) and source.peers:
            found = found + self._pull(access, names.root, keys, local, deadline_s)
        kv = out
        if kv is None:
            kv = torch.empty(self.layout.kv_shape(len(found) * self.layout.block_tokens), dtype=self.layout.torch_dtype)
        read = source.read(found, kv, lambda: self._clock.now_s() >= deadline_s)
        if doubted := source.doubted():
            self._ask(access, lambda session: session.doubt(doubted), None, max(deadline_s - self._clock.now_s(), 0.0))
        # Includes the block that could not be read, which the node examines; excludes the blocks that this fetch pulled.
        source.touch(found[: min(len(read) + 1, local)])
        where = [*first_found, *found[len(first_found) : local]]  # the tiers before this fetch moved any block
        by_tier = self._tokens_by_tier(where[: len(read)])
        if len(read) > local:
            by_tier[PEER] = (len(read) - local) * self.layout.block_tokens
        tokens = len(read) * self.layout.block_tokens
        self._count(fetches=1, asked_blocks=len(keys), hit_blocks=len(read))
        saved_s = self._savings.fetched(tokens, self._clock.now_s() - begun_s)
        source.tally(len(keys), len(read), tokens, int(saved_s * 1e6))
        return Fetched(tokens, kv if kv.shape[-2] == tokens else kv.narrow(-2, 0, tokens), by_tier)

    @_while_open
    def store(
        self,
        token_ids: TokenIds,
        kv: torch.Tensor | LayerPairs,
        *,
        start: int = 0,
        hint: Hint | None = None,
        namespace: Namespace | None = None,
    ) -> Stored:
        """Store the whole blocks of `kv`, the KV of `token_ids[start:]`. They are visible to every worker of the node on return.

        `kv`: a tensor (L, 2, H, N, D) on any device, or for each layer a pair (key, value), each (H, N, D), where
        N = len(token_ids) - start. A block that starts before token `start` is left out, as are tokens after the last whole block.
        Waits for room at most for the setting `store_wait_ms` in all. Blocks that get no room are `refused`. Storing does not count
        as a use of blocks that already exist; fetching them did. `hint`: expectations about the chain's future, also possible with
        `kv` of no tokens if the whole prompt is stored already. It costs one more small call. `namespace`: as for `fetch`.
        """
        begun_s = self._clock.now_s()
        ids = as_token_ids(token_ids)
        self._check_open()
        access = self._holder.take()
        deadline_s = begun_s + access.store_wait_s
        if not isinstance(hint, Hint | None):
            raise TieredKVError(Kind.CONFIG, f"hint: must be a tiered_kv.Hint or None, got {type(hint).__name__}", setting="hint")
        names = self._names_for(namespace)
        keys = names.keys(ids)
        kv = access.writer.checked(kv, len(ids), start)
        first = -(-start // self.layout.block_tokens)
        shown = access.source.lookup_all(keys)
        missing = [block for block in range(first, len(keys)) if shown[block] is None]
        new = present = 0
        try:
            while missing:
                wait_s = max(deadline_s - self._clock.now_s(), 0.0)
                with access.pool.session(wait_s) as session:
                    taken, added = access.writer.write(session, names.root, keys, missing, kv, start, wait_s)
                new, present = new + added, present + taken - added
                missing = missing[taken:]
                if not taken or self._clock.now_s() >= deadline_s:
                    break
        except TieredKVError as error:
            self._degraded("store", error)
        if hint is not None and keys:
            known = (hint.answer_tokens, hint.pinned_s, hint.reuse_within_s, hint.ended)
            self._ask(access, lambda session: session.hint(keys[-1], *known), None, max(deadline_s - self._clock.now_s(), 0.0))
        present += sum(slot is not None for slot in shown[first:])
        self._count(stores=1, new_blocks=new, present_blocks=present, refused_blocks=len(missing))
        return Stored(new, present, len(missing))

    @_while_open
    def explain(self, token_ids: TokenIds) -> list[Explained]:
        """Returns a record of each block of the prompt: its tier and codec, or the reason why it would be a miss."""
        keys, access = self._keys(token_ids), self._holder.take()
        slots = access.source.lookup_all(keys)
        rest = [key for key, slot in zip(keys, slots, strict=True) if slot is None]
        elsewhere: dict[BlockKey, list[str]] = {}
        if rest and access.source.peers:
            elsewhere = dict(zip(rest, self._locate(access, rest), strict=False))
        records, broken = [], False
        for block, (key, slot) in enumerate(zip(keys, slots, strict=True)):
            after_miss = "an ancestor is missing" if broken else ""
            if slot is not None:
                tier, codec = Tier(slot.tier).label, codec_by_id(slot.codec).name
                records.append(Explained(block, key.hex(), tier, codec, slot.stored_bytes, after_miss or "hit"))
            elif key in elsewhere:
                records.append(Explained(block, key.hex(), PEER, None, 0, after_miss or f"held by {', '.join(elsewhere[key])}"))
            else:
                broken = True
                records.append(Explained(block, key.hex(), None, None, 0, access.source.reason_of_miss))
        return records

    def note_prefill(self, tokens: int, seconds: float) -> None:
        """Record that the worker's model computed `tokens` of a prompt in `seconds`, with none of them fetched.

        The average of these is the prefill rate. It gives the `prefill_seconds_saved` of later fetches: the time to compute their
        tokens at that rate, less the time of the fetch. `CachedModel` calls this; code that calls `fetch` itself should too. Fewer
        than 64 tokens measure no rate and are left out. Calls no other process.
        """
        self._savings.note_prefill(tokens, seconds)

    def stats(self) -> ClientStats:
        """Returns the counts of this client, and the figures of its node (None while the node does not answer).

        `prefill_tokens_saved`: tokens that fetches delivered. `prefill_seconds_saved`: see `note_prefill`; 0 while
        `prefill_tokens_per_s` is None.
        """
        self._check_open()
        access = self._holder.take()
        node = self._ask(access, _stats_of, None, _question_s(access))
        return {"client": self.own_stats(), "node": node}

    def own_stats(self) -> dict[str, float | None]:
        """Returns the counts of this client alone. Calls no other process."""
        with self._lock:
            own: dict[str, Any] = dict(self._counts)
        own |= self._savings.stats()
        return own | {"node_calls": self._holder.calls, "retries": self._holder.retries}

    @property
    def namespace(self) -> Namespace:
        """The namespace of later calls."""
        return self._names.namespace

    def use(self, namespace: Namespace) -> None:
        """Use another namespace, of the same layout, from the next call on. Calls that are running keep the former one.

        Raises, and changes nothing, if the node's settings do not fit the new namespace's model. Costs a call of about 50 µs.
        """
        self._check_open()
        with self._use_lock:
            access = self._holder.take()
            try:
                with access.pool.session(_question_s(access)) as session:
                    self._introduce(session, namespace)
            except TieredKVError as error:
                if error.kind is not Kind.TRANSPORT:
                    raise
                self._degraded("change of namespace", error)  # the next session will introduce it
            self._names = self._names_of(namespace)

    def new_epoch(self, epoch: int | None = None) -> int:
        """Move to another epoch of the namespace, after a change of the model that the client cannot detect. Returns its number.

        `epoch`: a number chosen by the caller, such as the training step. Workers with the same number share blocks. Without it, the
        number is random and unique. Blocks stored under another epoch are never found under this one.
        """
        number = secrets.randbits(EPOCH_BITS) if epoch is None else epoch
        self.use(replace(self.namespace, epoch=number))
        return number

    def variant_of(self, namespace: Namespace, probe: "Probe") -> str | None:
        """Returns the variant of a namespace that a model with this probe belongs to; None while the node does not answer. One call."""
        root, access = namespace.root(self.layout), self._holder.take()

        def question(session: Session) -> str | None:
            return session.probe(root, list(probe))

        return self._ask(access, question, None, _question_s(access))

    def measure(self, timed: Timed) -> None:
        """Replace each stage's function by `timed(stage, function)` (`client.profile`). To be called once, before any use."""

        def prepare(access: NodeAccess) -> None:
            access.writer.measure(timed)
            access.source.measure(timed)

        self._timed = timed
        self._names = self._names_of(self.namespace)
        self._holder.prepare = prepare
        prepare(self._holder.present)

    @property
    def node_calls(self) -> int:
        """The number of calls from this client to its node. Fetches of local blocks make none."""
        return self._holder.calls

    def close(self) -> None:
        """Unmap the node's memory and close the sessions. Closing twice is fine."""
        if not self._closed:
            self._closed = True
            self._holder.close()
            self._on_close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _names_of(self, namespace: Namespace) -> Names:
        chain = namespace.chain(self.layout)
        return Names(namespace, chain.root, self._timed("hash", chain.keys))

    def _names_for(self, namespace: Namespace | None) -> Names:
        present = self._names
        return present if namespace is None or namespace is present.namespace else self._names_of(namespace)

    def _keys(self, token_ids: TokenIds, names: Names | None = None) -> list[BlockKey]:
        self._check_open()
        return (names or self._names).keys(as_token_ids(token_ids))

    def _locate(self, access: NodeAccess, keys: list[BlockKey]) -> list[list[str]]:
        """Returns the other nodes that hold each of the leading keys; none if the node does not answer."""
        wait_s, no_nodes = _question_s(access), list[list[str]]()
        return self._ask(access, lambda session: session.locate(keys, wait_s), no_nodes, wait_s)

    def _bring(self, access: NodeAccess, keys: list[BlockKey], hidden: list[BlockKey], deadline_s: float) -> list[Found]:
        """Have the node load blocks that only it can read. Returns the leading keys that the index then shows."""
        wait_s = deadline_s - self._clock.now_s()
        if wait_s > 0:
            self._ask(access, lambda session: session.bring(hidden, wait_s), None, wait_s)
        return access.source.find(keys)

    def _pull(self, access: NodeAccess, root: BlockKey, keys: list[BlockKey], local: int, deadline_s: float) -> list[Found]:
        wait_s = deadline_s - self._clock.now_s()
        if wait_s <= 0:
            return []
        parent, rest = keys[local - 1] if local else None, keys[local:]

        def question(session: Session) -> int | None:
            return session.pull(root, self.layout.block_bytes, parent, rest, local, wait_s)

        count = self._ask(access, question, None, wait_s)
        return access.source.find(rest[:count])  # None, for no answer in time, finds all that arrived by now

    def _ask(self, access: NodeAccess, question: Callable[[Session], R], otherwise: R, wait_s: float) -> R:
        """Returns the node's answer; `otherwise` if there is none within `wait_s`."""
        try:
            with access.pool.session(wait_s) as session:
                return question(session)
        except TieredKVError as error:
            self._degraded("question", error)
            return otherwise

    def _degraded(self, what: str, error: TieredKVError) -> None:
        if error.kind is Kind.CLOSED:
            raise error
        self._count(degraded=1)
        now_s = self._clock.now_s()
        if now_s >= self._warn_again_s:
            self._warn_again_s = now_s + WARN_EVERY_S
            log.warning("the node did not answer, so a %s went on without it (not logged again for %.0f s): %s", what, WARN_EVERY_S, error)

    def _tokens_by_tier(self, found: Sequence[Found]) -> dict[str, int]:
        blocks: dict[int, int] = {}
        for each in found:
            tier = each.slot.tier
            blocks[tier] = blocks.get(tier, 0) + 1
        return {LABELS[tier]: count * self.layout.block_tokens for tier, count in blocks.items()}

    def _count(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def _check_open(self) -> None:
        if self._closed:
            raise TieredKVError(Kind.CLOSED, "the client is closed")


def _question_s(access: NodeAccess) -> float:
    """Returns the longest wait for a call that delivers no block."""
    return min(access.deadline_s, QUESTION_S_MAX)


def _stats_of(session: Session) -> NodeStats | None:
    return session.stats()
