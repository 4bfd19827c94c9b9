"""Checks of a node's answers: a worker uses only answers of the expected types, within the bounds of its request.

Otherwise a node of another version, or damaged memory, could make a worker overwrite another worker's block.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeGuard

from tiered_kv.errors import Kind
from tiered_kv.memory.extents import ALIGNMENT
from tiered_kv.protocol.explanation import NAMESPACES_MAX
from tiered_kv.protocol.session import PROTOCOL
from tiered_kv.tiers.host import HEADER_BYTES

U64_MAX = (1 << 64) - 1
_PAYLOAD_ALIGNED = HEADER_BYTES % ALIGNMENT


def is_answer(message: object, number: int) -> TypeGuard[list[Any]]:
    """Returns whether a message is the value that answers request `number`."""
    return type(message) is list and len(message) == 3 and _is_numbered(message, number) and message[1] is True


def is_error(message: object, number: int) -> TypeGuard[list[Any]]:
    """Returns whether a message is the error that answers request `number`: its kind and a text."""
    if type(message) is not list or len(message) != 4 or not _is_numbered(message, number) or message[1] is not False:
        return False
    return type(message[2]) is str and message[2] in _KINDS and type(message[3]) is str


def _is_numbered(message: list[Any], number: int) -> bool:
    return type(message[0]) is int and message[0] == number


def are_offsets(answer: object, requested: int, nbytes: int, arena_bytes: int) -> bool:
    """Returns whether the answer lists valid payload offsets of at most `requested` extents of `nbytes` each.

    The extents must be aligned, within the arena, and must not overlap.
    """
    if type(answer) is not list or len(answer) > requested:
        return False
    before, offset_max, is_ascending = -nbytes, arena_bytes - nbytes, True
    for offset in answer:
        if type(offset) is not int or offset % ALIGNMENT != _PAYLOAD_ALIGNED or not 0 <= offset <= offset_max:
            return False
        is_ascending = is_ascending and offset - before >= nbytes
        before = offset
    return is_ascending or all(following - offset >= nbytes for offset, following in pairwise(sorted(answer)))


def are_booleans(answer: object, count_max: int) -> bool:
    """Returns whether the answer is a list of at most `count_max` booleans."""
    return type(answer) is list and len(answer) <= count_max and set(map(type, answer)) <= {bool}


def are_names(answer: object, count_max: int) -> bool:
    """Returns whether the answer is a list of at most `count_max` lists of names."""
    if type(answer) is not list or len(answer) > count_max:
        return False
    return all(type(names) is list and all(type(name) is str for name in names) for names in answer)


def is_explanation(answer: object, count: int) -> bool:
    """Returns whether the answer is an `Explanation` of `count` blocks."""
    if type(answer) is not dict or type(answer.get("node")) is not str or type(answer.get("directory")) is not bool:
        return False
    blocks, recorded_s = answer.get("blocks"), answer.get("recorded_s")
    return type(recorded_s) is float and type(blocks) is list and len(blocks) == count and all(map(_is_whereabouts, blocks))


def _is_whereabouts(block: object) -> bool:
    if type(block) is not dict or type(block.get("tier", 0)) not in (str, type(None)):
        return False
    lists: list[Any] = [block.get("nodes"), block.get("silent")]
    if not are_names(lists, len(lists)):
        return False
    gone = block.get("gone", 0)
    return gone is None or (type(gone) is dict and all(type(gone.get(name)) in types for name, types in _GONE.items()))


def _are_namespaces(answer: object) -> bool:
    if type(answer) is not list or len(answer) > NAMESPACES_MAX:
        return False
    return all(type(each) is dict and type(each.get("namespace")) is type(each.get("layout")) is dict for each in answer)


def is_whole(answer: object, largest: int) -> bool:
    """Returns whether the answer is a whole number from 0 to `largest`."""
    return type(answer) is int and 0 <= answer <= largest


def _is_hello(answer: object) -> bool:
    if type(answer) is not dict or answer.get("protocol") != PROTOCOL:
        return False
    numbers = [answer.get(name) for name in ("identity", "generation", "arena_bytes")]
    return all(is_whole(number, U64_MAX) for number in numbers) and bool(numbers[0])


def _is_introduction(answer: object) -> bool:
    if type(answer) is not dict or type(answer.get("plan")) is not dict:
        return False
    path = answer.get("calibration", 0)
    return path is None or (type(path) is str and "\0" not in path)


def _is_epoch(answer: object) -> bool:
    if type(answer) is not list or len(answer) != 2 or not is_whole(answer[0], U64_MAX):
        return False
    return type(answer[1]) is list and all(type(name) is str for name in answer[1])


def _is_text(answer: object) -> bool:
    return type(answer) is str


def _is_none(answer: object) -> bool:
    return answer is None


_GONE: dict[str, set[type]] = {
    "node": {str},
    "tier": {str, type(None)},
    "cause": {str},
    "age_s": {float},
    "uses": {int},
    "standing": {float, type(None)},
}
_KINDS = frozenset(kind.value for kind in Kind)

CHECKS: dict[str, Callable[[object], bool]] = {
    "hello": _is_hello,
    "introduce": _is_introduction,
    "probe": _is_text,
    "salt": _is_text,
    "namespaces": _are_namespaces,
    "new_epoch": _is_epoch,
    "release": _is_none,
    "doubt": _is_none,
    "bring": _is_none,
    "hint": _is_none,
    "stats": lambda answer: type(answer) is dict,
}
"""The check of each request's answer, for requests whose valid answers do not depend on the arguments."""
