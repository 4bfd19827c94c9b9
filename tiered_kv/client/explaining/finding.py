"""Puts together where each block of a prompt is, or why it would be a miss: from the index, the node's answer and the client's notes."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from tiered_kv.blocks import PEER, Explained, Reason, Tier
from tiered_kv.client.explaining.miss_notes import MissNotes
from tiered_kv.codecs import codec_by_id
from tiered_kv.errors import TieredKVError
from tiered_kv.keys import BlockKey, Namespace
from tiered_kv.layout import Layout, layout_of
from tiered_kv.memory.view import Slot
from tiered_kv.protocol.explanation import Explanation, GoneRecord, KnownNamespace, Whereabouts

DIGEST_SHOWN = 12
"""The most characters of a namespace's field that a reason shows."""
NOT_COMPARED = ("salt",)  # a secret that follows from the tenant

EVICTED = {
    "dropped": "its room was needed, and no lower tier took it",
    "not_admitted": "its room was needed, and nothing suggested that it would be used again",
    "under_pressure": "its room was needed, and the tier below was too slow",
    "over_quota": "its tenant was above its quota",
    "index_full": "the index had no slot left",
    "reclaimed": "its segment was the oldest, and it had not been used enough since to be written again",
    "unmounted": "the index was nearly full, and only the mounted checkpoint had it",
}
"""The causes of an eviction, in words."""
REMOVED = {
    "too_lossy": "it had more error than the settings allow",
    "forgotten": "its namespace was removed",
    "ended": "the epoch of its weights has ended, or its namespace was purged",
}
"""The causes for which a block was removed on purpose, in words."""


@dataclass(frozen=True)
class OtherNamespace:
    """A namespace in which the same tokens were stored. `fields`: by name of each field that differs, its values here and there.

    `tokens`: how many leading tokens are stored there now. `tokens_once`: as `tokens`, with blocks that are gone meanwhile.
    """

    fields: dict[str, tuple[object, object]]
    tokens: int
    tokens_once: int


@dataclass(frozen=True)
class Finding:
    """What a client knows about the blocks of a prompt. `answer`: the node's, None if it did not answer.

    `answer` has an entry for each block that is not in the index, in order.
    """

    keys: Sequence[BlockKey]
    slots: Sequence[Slot | None]
    answer: Explanation | None
    block_tokens: int
    is_closed: bool
    notes: MissNotes
    now_s: float
    others: Sequence[OtherNamespace] = field(default_factory=list)

    def records(self) -> list[Explained]:
        """Returns a record of each block."""
        answered = iter(self.answer["blocks"]) if self.answer else iter(())
        records: list[Explained] = []
        is_broken = False
        for block, (key, slot) in enumerate(zip(self.keys, self.slots, strict=True)):
            record = self._here(block, key, slot) if slot is not None else self._elsewhere(block, key, next(answered, None))
            if record.tier is None:
                is_broken = True
            elif is_broken:
                record = replace(record, why=Reason.ANCESTOR, reason="an ancestor is missing")
            records.append(record)
        return records

    def _here(self, block: int, key: BlockKey, slot: Slot) -> Explained:
        tier, codec = Tier(slot.tier).label, codec_by_id(slot.codec).name
        return self._noted(key, Explained(block, key.hex(), tier, codec, slot.stored_bytes, "hit"))

    def _elsewhere(self, block: int, key: BlockKey, found: Whereabouts | None) -> Explained:
        if found and found["nodes"]:
            names = found["nodes"]
            held = Explained(block, key.hex(), PEER, None, 0, f"held by {', '.join(names)}", Reason.PEER, names[0], {"nodes": names})
            return self._noted(key, held)
        why, reason, node, details = self._miss(block, found)
        return Explained(block, key.hex(), None, None, 0, reason, why, node, details)

    def _noted(self, key: BlockKey, record: Explained) -> Explained:
        """Returns the record, with the reason why the client's last fetch did not read the block, if it did not."""
        note = self.notes.of(key)
        if note is None:
            return record
        ago_s = max(self.now_s - note.at_s, 0.0)
        text = "reached its deadline before this block" if note.why is Reason.DEADLINE else "declined it: computing it is faster"
        reason = f"{record.reason} now, but the last fetch, {ago(ago_s)}, {text}"
        return replace(record, reason=reason, why=note.why, details={**record.details, "age_s": ago_s})

    def _miss(self, block: int, found: Whereabouts | None) -> tuple[Reason, str, str | None, dict[str, Any]]:
        """Returns why a block is a miss: for programs, in words, the node concerned, and the figures."""
        if self.is_closed:
            return Reason.CLOSED, "the node is closed", None, {}
        if self.answer is None or found is None:
            return Reason.NODE_SILENT, "the node of this machine does not answer", None, {}
        if silent := found["silent"]:
            return Reason.NODE_SILENT, f"on {', '.join(silent)}, which does not answer", silent[0], {"nodes": silent}
        other = self._other(block)
        if found["gone"] and not (other and found["gone"]["cause"] == "refused"):
            return _gone(found["gone"])
        if other:
            differs = ", ".join(f"{name} (here {_shown(ours)}, there {_shown(theirs)})" for name, (ours, theirs) in other.fields.items())
            verb = "are" if other.tokens >= (block + 1) * self.block_tokens else "were"
            reason = f"these tokens {verb} stored under another namespace, which differs in {differs}"
            return Reason.OTHER_NAMESPACE, reason, None, {"fields": {name: list(pair) for name, pair in other.fields.items()}}
        return self._never()

    def _other(self, block: int) -> OtherNamespace | None:
        """Returns the namespace that has the tokens up to the end of a block, else one that had them, with the fewest differences."""
        end = (block + 1) * self.block_tokens
        have = [each for each in self.others if each.tokens >= end] or [each for each in self.others if each.tokens_once >= end]
        return min(have, key=lambda each: len(each.fields), default=None)

    def _never(self) -> tuple[Reason, str, str | None, dict[str, Any]]:
        assert self.answer is not None
        recorded_s = self.answer["recorded_s"]
        reason = f"never stored, as far as {self.answer['node']} has recorded ({duration(recorded_s)})"
        if not self.answer["directory"]:
            reason += "; other nodes could not be asked"
        return Reason.NEVER_STORED, reason, None, {"recorded_s": recorded_s, "asked_others": self.answer["directory"]}


def _gone(record: GoneRecord) -> tuple[Reason, str, str | None, dict[str, Any]]:
    cause, tier, when = record["cause"], record["tier"], ago(record["age_s"])
    details = {name: value for name, value in record.items() if name != "node"}
    if cause in EVICTED:
        words = f"evicted from {tier} of {record['node']} {when}: {EVICTED[cause]}"
        if record["standing"] is not None:
            words += f"; its value was {record['standing']:.0%} of the lowest value that stayed"
        return Reason.EVICTED, f"{words} (used {record['uses']} ×)", record["node"], details
    if cause == "damaged":
        return Reason.DAMAGED, f"damaged in {tier} of {record['node']}, and quarantined {when}", record["node"], details
    if cause == "refused":
        return Reason.REFUSED, f"not stored: {record['node']} had no room for it in time, {when}", record["node"], details
    words = REMOVED.get(cause, cause)
    return Reason.REMOVED, f"removed from {tier} of {record['node']} {when}: {words}", record["node"], details


def other_namespaces(
    known: Sequence[KnownNamespace],
    own: Namespace,
    layout: Layout,
    token_ids: np.ndarray,
    ask: Callable[[list[BlockKey]], Explanation | None],
) -> list[OtherNamespace]:
    """Returns the known namespaces other than `own` in which leading tokens of the prompt are stored, or were.

    `ask(keys)`: returns the node's answer about these blocks.
    """
    found: list[OtherNamespace] = []
    for each in known:
        try:
            other, its_layout = Namespace(**each["namespace"]), layout_of(each["layout"])
        except (TypeError, KeyError, ValueError, TieredKVError):  # of a node of another version
            continue
        fields = _differences(own, layout, other, its_layout)
        keys = other.chain(its_layout).keys(token_ids) if fields else []
        answer = ask(keys) if keys else None
        if answer is not None:
            has = [bool(block["tier"] or block["nodes"]) for block in answer["blocks"]]
            had = [there or block["gone"] is not None for there, block in zip(has, answer["blocks"], strict=True)]
            step = its_layout.block_tokens
            if had[0]:
                found.append(OtherNamespace(fields, _leading(has) * step, _leading(had) * step))
    return found


def _differences(own: Namespace, layout: Layout, other: Namespace, its_layout: Layout) -> dict[str, tuple[object, object]]:
    ours = {name: value for name, value in asdict(own).items() if name not in NOT_COMPARED}
    theirs = asdict(other)
    fields = {name: (value, theirs[name]) for name, value in ours.items() if value != theirs[name]}
    if type(layout) is not type(its_layout):
        return fields | {"layout": (layout.spec, its_layout.spec)}
    our_layout, its_own = asdict(layout), asdict(its_layout)
    return fields | {f"layout.{name}": (value, its_own[name]) for name, value in our_layout.items() if value != its_own[name]}


def _leading(flags: Sequence[bool]) -> int:
    return next((count for count, flag in enumerate(flags) if not flag), len(flags))


def _shown(value: object) -> str:
    text = str(value)
    return repr(text[:DIGEST_SHOWN] + "…") if len(text) > DIGEST_SHOWN else repr(value)


def duration(seconds: float) -> str:
    """Returns a time as text for people: `5 s`, `12 min`, `3.2 h`."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def ago(seconds: float) -> str:
    """Returns an age as text for people: `12 min ago`."""
    return f"{duration(seconds)} ago"
