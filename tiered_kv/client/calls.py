"""What a call of a client works with: the namespace at its beginning, and the guard against `close` by another thread."""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, NamedTuple, ParamSpec, Protocol, TypedDict, TypeVar

from tiered_kv.keys import BlockKey, Namespace
from tiered_kv.protocol.messages import NodeStats

if TYPE_CHECKING:
    import numpy as np


class Closable(Protocol):
    """A client, as `while_open` sees it."""

    def _check_open(self) -> None:
        """Raise (kind `closed`) if the client is closed."""


P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=Closable)


class ClientStats(TypedDict):
    """The counts of a client, and the figures of its node (None while the node does not answer)."""

    client: dict[str, float | None]
    node: NodeStats | None


def while_open(method: Callable[Concatenate[C, P], R]) -> Callable[Concatenate[C, P], R]:
    """Decorate a method that uses memory which `close`, called by another thread, may unmap.

    The method then raises (kind `closed`), as calls after `close` do.
    """

    @wraps(method)
    def guarded(self: C, /, *arguments: P.args, **options: P.kwargs) -> R:
        try:
            return method(self, *arguments, **options)
        except (ValueError, AttributeError):  # a released view; an arena that `close` removed
            self._check_open()
            raise

    return guarded


class Names(NamedTuple):
    """The namespace of a client at one moment. Each call reads it once, so that a change affects later calls only.

    `mark`: the value of `NodeView.mark` when the weight epoch was read. None if the weight epoch or the tenant's salt is not known:
    then every look-up is a miss, and every store is refused.
    """

    namespace: Namespace
    root: BlockKey
    keys: Callable[["np.ndarray"], list[BlockKey]]
    mark: tuple[int, int] | None = None
