"""What a worker believes of a node's answers: those of the types and within the bounds of what was asked.

A node of another version, or memory that was damaged, must not make a worker pack over a block that is somebody else's.
"""

from collections.abc import Callable
from typing import Any

from tiered_kv.errors import Kind
from tiered_kv.memory.extents import ALIGNMENT
from tiered_kv.service.session import PROTOCOL
from tiered_kv.tiers.host import HEADER_BYTES

U64_MAX = (1 << 64) - 1


def is_answer(message: Any, number: int) -> bool:
    """Whether a message is the value that answers request `number`."""
    return type(message) is list and len(message) == 3 and _is_numbered(message, number) and message[1] is True


def is_error(message: Any, number: int) -> bool:
    """Whether a message is the error that answers request `number`: its kind and a text."""
    if type(message) is not list or len(message) != 4 or not _is_numbered(message, number) or message[1] is not False:
        return False
    return type(message[2]) is str and message[2] in _KINDS and type(message[3]) is str


def _is_numbered(message: list, number: int) -> bool:
    return type(message[0]) is int and message[0] == number


def are_offsets(answer: Any, asked: int, nbytes: int, arena_bytes: int) -> bool:
    """Whether these can be the payloads' offsets of at most `asked` extents of `nbytes` each: in the arena, apart from each other."""
    if type(answer) is not list or len(answer) > asked or any(type(offset) is not int for offset in answer):
        return False
    ordered = sorted(answer)
    ends = [offset + nbytes for offset in ordered]
    apart = all(end <= following for end, following in zip(ends, ordered[1:], strict=False))
    aligned = all(offset % ALIGNMENT == HEADER_BYTES % ALIGNMENT for offset in ordered)
    return apart and aligned and (not ordered or (ordered[0] >= 0 and ends[-1] <= arena_bytes))


def are_truths(answer: Any, most: int) -> bool:
    """Whether this is a list of at most so many booleans."""
    return type(answer) is list and len(answer) <= most and all(type(each) is bool for each in answer)


def are_names(answer: Any, most: int) -> bool:
    """Whether this is a list of at most so many lists of names."""
    if type(answer) is not list or len(answer) > most:
        return False
    return all(type(names) is list and all(type(name) is str for name in names) for names in answer)


def is_whole(answer: Any, most: int) -> bool:
    """Whether this is a number from 0 to `most`."""
    return type(answer) is int and 0 <= answer <= most


def _is_hello(answer: Any) -> bool:
    if type(answer) is not dict or answer.get("protocol") != PROTOCOL:
        return False
    numbers = [answer.get(name) for name in ("identity", "generation", "arena_bytes")]
    return all(is_whole(number, U64_MAX) for number in numbers) and bool(numbers[0])


def _is_introduction(answer: Any) -> bool:
    if type(answer) is not dict or type(answer.get("plan")) is not dict:
        return False
    path = answer.get("calibration", 0)
    return path is None or (type(path) is str and "\0" not in path)


def _is_text(answer: Any) -> bool:
    return type(answer) is str


def _is_nothing(answer: Any) -> bool:
    return answer is None


_KINDS = frozenset(kind.value for kind in Kind)

CHECKS: dict[str, Callable[[Any], bool]] = {
    "hello": _is_hello,
    "introduce": _is_introduction,
    "probe": _is_text,
    "release": _is_nothing,
    "doubt": _is_nothing,
    "bring": _is_nothing,
    "hint": _is_nothing,
    "stats": lambda answer: type(answer) is dict,
}
"""By request what its answer must be, where that does not depend on what was asked."""
