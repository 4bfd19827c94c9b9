"""The base class of a node's clients: access to the present life of the node's files, sessions, counts, and the namespace."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self, TypeVar

from tiered_kv import forking
from tiered_kv.blocks import PEER, Stored, Tier
from tiered_kv.client.access import AccessHolder, NodeAccess
from tiered_kv.client.calls import ClientStats, Names
from tiered_kv.client.load_costs import LoadCosts, LoadCostStats, LoadPart
from tiered_kv.client.prefill_cost import PrefillTimes
from tiered_kv.client.prefill_savings import Savings
from tiered_kv.client.profile import Timed, untimed
from tiered_kv.client.reader import BlockSource, FoundBlock
from tiered_kv.client.session_pool import SessionPool
from tiered_kv.client.writer import BlockWriter
from tiered_kv.clock import Clock, SystemClock
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import DEFAULT_TENANT, BlockKey, Namespace
from tiered_kv.layout import Layout
from tiered_kv.protocol.epochs import FAMILIES_MAX
from tiered_kv.protocol.messages import BlockRun, NodeStats
from tiered_kv.protocol.peer_transport import SPREAD_WITHIN_S
from tiered_kv.protocol.session import Session
from tiered_kv.threads import DaemonThreads

log = logging.getLogger(__name__)

WARN_EVERY_S = 30.0
QUESTION_S_MAX = 1.0
"""The longest wait of `match`, `explain`, `stats` and hints for an answer. The setting `fetch_deadline_ms` may shorten it."""
REPORT_LATE_S = 0.005
"""How long after its deadline a fetch may still report damaged blocks. With the time of that call it ends 50 ms late at most."""
PULLS_AT_ONCE = 8
"""The most pulls of one client that run in threads of their own at a time. Further pulls wait for their turn."""
LABELS = {tier.value: tier.label for tier in Tier}
ALL_PEERS = LoadPart(PEER, 1, 0)
"""The other nodes, where it is not known which of them has the blocks."""

R = TypeVar("R")


class NodeClient:
    """A worker's access to its node, for blocks of one layout under one namespace. Safe to use from several threads."""

    def __init__(
        self,
        layout: Layout,
        namespace: Namespace,
        holder: AccessHolder,
        introduce: Callable[[Session, Namespace], None] = lambda session, namespace: None,
        *,
        clock: Clock | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.layout = layout
        self._timed: Timed = untimed
        self._names = self._names_of(namespace)
        self._numbers: dict[bytes, int] = {}  # by family, the largest weight epoch that this client has met
        self._introduce = introduce
        self._holder = holder
        self._clock = clock or SystemClock()
        self._on_close = on_close
        self._counts: Counter[str] = Counter()
        self._noted_retries = 0
        self._savings = Savings()
        self._prefills = PrefillTimes()
        self._costs = LoadCosts(self._clock)
        self._lock = threading.Lock()
        self._use_lock = threading.Lock()
        self._closed = False
        self._pulls = DaemonThreads(PULLS_AT_ONCE, "tkv-pull")  # starts its threads at the first use
        self._warn_again_s = float("-inf")
        forking.register(self)

    def after_fork(self) -> None:
        """Renew the locks in a forked child process: threads of the parent may have held the old ones."""
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
        """Connect to the node now. Raises if the node's settings do not fit this model.

        With `must_answer`, also raises if the node does not answer.
        """
        try:
            self._pool.check(wait_s)
        except TieredKVError as error:
            if error.kind is not Kind.TRANSPORT or must_answer:
                raise
            self._degraded("greeting", error)

    def stats(self) -> ClientStats:
        """Returns the counts of this client, and the figures of its node (None while the node does not answer).

        `prefill_tokens_saved`: tokens that fetches delivered. `prefill_seconds_saved`: see `note_prefill`; 0 while
        `prefill_tokens_per_s` is None.
        """
        self._check_open()
        access = self._holder.take()
        node = self._ask(access, _stats_of, None, question_s(access))
        return {"client": self.own_stats(), "node": node}

    def own_stats(self) -> dict[str, float | None]:
        """Returns the counts of this client alone. Calls no other process."""
        with self._lock:
            own: dict[str, Any] = dict(self._counts)
        own |= self._savings.stats()
        return own | {"node_calls": self._holder.calls, "retries": self._holder.retries}

    @property
    def namespace(self) -> Namespace:
        """The namespace that the next call will use, with the present weight epoch.

        Code that computes KV and stores it later should read this before it computes, and pass it to `store`. Then KV of former
        weights cannot be stored as KV of newer ones.
        """
        return self._names.namespace if self._closed else self._present()[1].namespace

    def use(self, namespace: Namespace) -> None:
        """Use another namespace, of the same layout, from the next call on. Calls that are running keep the former one.

        Raises, and changes nothing, if the node's settings do not fit the new namespace's model. Costs a call of about 50 µs.
        """
        self._check_open()
        with self._use_lock:
            access = self._holder.take()
            names = self._read(access, self._names_of(namespace))
            try:
                with access.pool.session(question_s(access)) as session:
                    self._introduce(session, names.namespace)
            except TieredKVError as error:
                if error.kind is not Kind.TRANSPORT:
                    raise
                self._degraded("change of namespace", error)  # the next session will introduce it
            self._names = names

    def new_epoch(self, epoch: int | None = None, *, keep: bool = False) -> int:
        """Move to another epoch of the namespace, after a change of the model that the client cannot detect. Returns the new number.

        Without `epoch`, the weight epoch of all models that this client has served is raised for all workers of all nodes. When this
        returns, this tenant's blocks of the former weights cannot be fetched from any node any more. No fetch or store that is still
        running can bring them back. With `keep`, these blocks are unreachable too, but they are evicted in time instead of dropped.
        Raises (kind `cluster`) if some nodes did not confirm. The error's context has `epoch` and `nodes`. These nodes may show former
        blocks to their own workers until they reach the coordinator again. Raises (kind `transport`), with nothing changed, if the node
        or the coordinator does not answer.

        With `epoch`, a number chosen by the caller such as the training step, only this client moves. Workers with the same number share
        blocks, blocks stored under another number are never found under this one, and nothing is dropped. See
        docs/weights-and-tenants.md for when to use which.
        """
        if epoch is not None:
            self.use(replace(self.namespace, epoch=epoch))
            return epoch
        self._check_open()
        access, _ = self._present()
        with self._lock:
            families = list(self._numbers)
        with access.pool.session(SPREAD_WITHIN_S + question_s(access)) as session:
            number, unreached = session.new_epoch(families, keep)
        self._present()
        if unreached:
            raise TieredKVError(
                Kind.CLUSTER,
                f"the weight epoch is {number} now, but these nodes did not confirm it and may still show blocks of the former weights to"
                f" their workers: {', '.join(unreached)}. Each node adopts the epoch as soon as it reaches the coordinator; if you cannot"
                " wait for that, end these nodes",
                epoch=number,
                nodes=unreached,
            )
        return number

    def note_prefill(self, tokens: int, seconds: float, position: int = 0) -> None:
        """Record that the worker's model computed `tokens` of a prompt in `seconds`, with none of them fetched.

        `position`: the number of tokens before them. The average of these records is the prefill rate. With it, later fetches add to
        `prefill_seconds_saved`: the time to compute the fetched tokens at this rate, less the time of the fetch. From the third record
        on, fetches do not load what the model computes faster (docs/load-or-compute.md). `CachedModel` calls this. Code that calls
        `fetch` itself should call it too. Records of fewer than 64 tokens are ignored: they do not measure the rate. Calls no other
        process.
        """
        self._savings.note_prefill(tokens, seconds)
        self._prefills.note(tokens, seconds, position)

    def load_costs(self) -> dict[str, LoadCostStats]:
        """Returns the measured latency and rate of each source of loads: of tiers by their label, and of peers as `peer NAME`.

        Memory of this machine is not among them. The latency of `directory` is the time to ask which nodes have some blocks. Calls no
        other process.
        """
        return self._costs.stats()

    def measure(self, timed: Timed) -> None:
        """Measure each stage: replace its function by `timed(stage, function)` (`client.profile`). Call this once, before any use."""

        def prepare(access: NodeAccess) -> None:
            access.writer.measure(timed)
            access.source.measure(timed)

        self._timed = timed
        self._names = self._names_of(self.namespace)
        self._holder.prepare = prepare
        prepare(self._holder.present)

    @property
    def has_node(self) -> bool:
        """Whether the client has found a node. The node may have ended since."""
        return not self._holder.present.is_vacant

    @property
    def node_calls(self) -> int:
        """The number of calls from this client to its node. Fetches of local blocks make none."""
        return self._holder.calls

    def close(self) -> None:
        """Unmap the node's memory and close the sessions. Closing twice is fine."""
        if not self._closed:
            self._closed = True
            self._pulls.shutdown(wait=False)
            self._holder.close()
            self._on_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _names_of(self, namespace: Namespace) -> Names:
        chain = namespace.chain(self.layout)
        return Names(namespace, chain.root, self._timed("hash", chain.keys))

    def _present(self, namespace: Namespace | None = None) -> tuple[NodeAccess, Names]:
        """Returns the access and the `Names` that one call uses. Without `namespace`, they are of the client's own, as it is now."""
        access = self._holder.take()
        names = self._names
        if names.mark != access.view.mark:
            new = self._read(access, names)
            with self._lock:
                if self._names is names:
                    self._names = new
            names = new
        if namespace is not None and namespace is not names.namespace:
            names = self._names_of(namespace)._replace(mark=names.mark)
        return access, names

    def _read(self, access: NodeAccess, names: Names) -> Names:
        """Returns `names` with the weight epoch that the node publishes now. The epoch never goes back to a smaller number."""
        family, salt = names.namespace.family, self._salt(access, names.namespace.tenant)
        mark, number = access.view.weight_epoch(family) or (None, 0)
        with self._lock:
            number = self._numbers[family] = max(number, self._numbers.pop(family, 0))
            if len(self._numbers) > FAMILIES_MAX:
                del self._numbers[next(iter(self._numbers))]
        if (salt or "", number) != (names.namespace.salt, names.namespace.weight_epoch):
            names = self._names_of(replace(names.namespace, salt=salt or "", weight_epoch=number))
        return names._replace(mark=mark if salt is not None else None)

    def _salt(self, access: NodeAccess, tenant: str) -> str | None:
        """Returns the salt of a tenant; None while it is not known, because no node has answered yet."""
        if tenant == DEFAULT_TENANT:
            return ""
        if tenant not in access.salts and not access.is_vacant:
            self._ask(access, lambda session: self._learn_salt(access, session, tenant), None, question_s(access))
        return access.salts.get(tenant)

    @staticmethod
    def _learn_salt(access: NodeAccess, session: Session, tenant: str) -> None:
        if tenant != DEFAULT_TENANT and tenant not in access.salts:
            access.salts[tenant] = session.salt(tenant)

    def introduce_in(self, access: NodeAccess, session: Session) -> None:
        """Introduce this client's namespace in a new session."""
        present = self._names
        self._learn_salt(access, session, present.namespace.tenant)
        names = self._read(access, present)
        self._introduce(session, names.namespace)
        access.introduced[names.root] = session.life

    def _is_current(self, access: NodeAccess, names: Names) -> bool:
        """Returns whether the weights that a call used are still the present ones. Check this last, before a call returns blocks."""
        if access.view.mark == names.mark:
            return True
        found = access.view.weight_epoch(names.namespace.family)
        return names.mark is not None and found is not None and found[1] <= names.namespace.weight_epoch

    def _tell(self, access: NodeAccess, session: Session, names: Names) -> None:
        """Introduce a namespace in a session if the node does not know it yet, because the weight epoch has changed."""
        if access.introduced.get(names.root) != session.life:
            self._introduce(session, names.namespace)
            access.introduced[names.root] = session.life

    def _ask(self, access: NodeAccess, question: Callable[[Session], R], otherwise: R, wait_s: float) -> R:
        """Returns the node's answer to `question`, or `otherwise` if the node does not answer within `wait_s`."""
        try:
            with access.pool.session(wait_s) as session:
                return question(session)
        except TieredKVError as error:
            self._degraded("question", error)
            return otherwise

    def _bring(
        self, access: NodeAccess, keys: list[BlockKey], found: list[FoundBlock], hidden: list[BlockKey], until_s: float
    ) -> list[FoundBlock]:
        """Have the node load the `hidden` ones of the `found` blocks, which only it can read.

        Returns the leading blocks of `keys` that are then readable.
        """
        begun_s = self._clock.now_s()
        wait_s = until_s - begun_s
        if wait_s > 0:
            self._ask(access, lambda session: session.bring(hidden, wait_s), None, wait_s)
            self._note_brought(access.source, found, set(hidden), self._clock.now_s() - begun_s)
        return access.source.find(keys)

    def _note_brought(self, source: BlockSource, found: list[FoundBlock], hidden: set[BlockKey], seconds: float) -> None:
        """Record how long the node took to load the `hidden` ones of these blocks from their tiers."""
        asked = [each for each in found if each.key in hidden]
        is_here = [slot is not None and slot.tier <= Tier.DISK for slot in source.lookup_all([each.key for each in asked])]
        for tier in {each.slot.tier for each in asked}:
            loaded = sum(each.slot.stored_bytes for each, here in zip(asked, is_here, strict=True) if here and each.slot.tier == tier)
            if loaded:
                self._costs.note(LABELS[tier], loaded, seconds)
            else:
                self._costs.note_silence(LABELS[tier], asked[0].slot.stored_bytes, seconds)

    def _pull(
        self, access: NodeAccess, names: Names, run: BlockRun, until_s: float, peers: Sequence[LoadPart] = (ALL_PEERS,)
    ) -> list[FoundBlock]:
        """Have the node fetch the blocks of `run` from other nodes. Returns the leading ones that the index then contains.

        `peers`: the peers whose blocks they are.
        """
        begun_s = self._clock.now_s()
        wait_s = until_s - begun_s
        if wait_s <= 0:
            return []
        before = len(access.source.find(run.keys))

        def question(session: Session) -> int | None:
            self._tell(access, session, names)
            left_s = until_s - self._clock.now_s()
            return session.pull(run, left_s) if left_s > 0 else None  # two late answers together would be much too late

        count = self._ask(access, question, None, wait_s)
        found = access.source.find(run.keys[:count])  # count is None without an answer in time: find all that have arrived
        self._costs.note_pull(peers, len(found) - before, run.nbytes, self._clock.now_s() - begun_s)
        return found

    def _report_damage(self, access: NodeAccess, until_s: float) -> None:
        """Report to the node the blocks that looked damaged, unless `until_s` is over. Then a later fetch reports them."""
        left_s = until_s - self._clock.now_s()
        if left_s > -REPORT_LATE_S and (doubted := access.source.doubted()):
            self._ask(access, lambda session: session.doubt(doubted), None, max(left_s, 0.0))

    def _store_missing(
        self,
        access: NodeAccess,
        names: Names,
        missing: list[int],
        until_s: float,
        write: Callable[[Session, list[int], float], tuple[int, int]],
        answer_s: float = 0.0,
    ) -> Stored:
        """Store the `missing` blocks by calling `write` until none is left or `until_s` is over.

        `write(session, missing, wait_s)` stores some leading blocks of `missing`. It returns how many it stored, and how many of these
        are new. `answer_s`: how much longer than `until_s` the node may take to answer.
        """
        new = present = 0
        if names.mark is None:
            return Stored(0, 0, len(missing))
        try:
            while missing:
                wait_s = max(until_s - self._clock.now_s(), 0.0)
                with access.pool.session(wait_s + answer_s) as session:
                    self._tell(access, session, names)
                    taken, added = write(session, missing, wait_s)
                new, present = new + added, present + taken - added
                missing = missing[taken:]
                if not taken or self._clock.now_s() >= until_s:
                    break
        except TieredKVError as error:
            self._degraded("store", error)
        return Stored(new, present, len(missing))

    def _note_fetch(self, source: BlockSource, names: Names, asked: int, hits: dict[str, int], begun_s: float) -> None:
        """Add a fetch and the prefill time that it saved to the counts of this client and of its node.

        `asked`: the number of blocks. `hits`: the number of blocks that were read, by tier. `begun_s`: when the fetch began.
        """
        hit, took_s = sum(hits.values()), self._clock.now_s() - begun_s
        tokens = hit * self.layout.block_tokens
        saved_us = int(self._savings.fetched(tokens, took_s) * 1e6)
        source.tally(asked, hit, tokens, saved_us)
        with self._lock:
            retries, self._noted_retries = self._holder.retries - self._noted_retries, self._holder.retries
        counts = {"fetches": 1, "asked_blocks": asked, "missed_blocks": asked - hit}
        counts |= {f"hit_blocks_{tier}": count for tier, count in hits.items()}
        self._count(hit_blocks=hit, **counts)
        counts |= {"prefill_tokens_saved": tokens, "prefill_us_saved": saved_us, "retries": retries}
        source.counts.add(names.root, names.namespace, counts, fetch_s=took_s)

    def _note(
        self,
        source: BlockSource,
        names: Names,
        counts: dict[str, int],
        store_s: float | None = None,
    ) -> None:
        """Add to the counts of this client, and to those that its node exports (`memory.client_page.COUNTS`). About 5 µs, no call.

        `store_s`: the duration of a store, for the node's histogram.
        """
        self._count(**counts)
        source.counts.add(names.root, names.namespace, counts, store_s=store_s)

    def _degraded(self, what: str, error: TieredKVError) -> None:
        if error.kind is Kind.CLOSED:
            raise error
        self._note(self._holder.present.source, self._names, {"degraded": 1})
        now_s = self._clock.now_s()
        if now_s >= self._warn_again_s:
            self._warn_again_s = now_s + WARN_EVERY_S
            log.warning("the node did not answer, so a %s went on without it (not logged again for %.0f s): %s", what, WARN_EVERY_S, error)

    def _tokens_by_tier(self, found: Sequence[FoundBlock], pulled: int = 0) -> dict[str, int]:
        """Returns the numbers of tokens in the `found` blocks, and in `pulled` blocks from other nodes."""
        blocks: dict[int, int] = {}
        for each in found:
            tier = each.slot.tier
            blocks[tier] = blocks.get(tier, 0) + 1
        tokens = {LABELS[tier]: count * self.layout.block_tokens for tier, count in blocks.items()}
        return tokens | {PEER: pulled * self.layout.block_tokens} if pulled else tokens

    def _count(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def _check_open(self) -> None:
        if self._closed:
            raise TieredKVError(Kind.CLOSED, "the client is closed")


def question_s(access: NodeAccess) -> float:
    """Returns the longest time, in seconds, that a call which delivers no block may wait for the node."""
    return min(access.deadline_s, QUESTION_S_MAX)


def _stats_of(session: Session) -> NodeStats | None:
    return session.stats()
