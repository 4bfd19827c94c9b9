"""The package's only exception class, and its kinds.

Expected outcomes (a miss, a full tier, a lost race) are return values. An exception means that a setting is wrong, that a caller broke
the contract, or that the machine failed in a way that the caller must know about.
"""

from enum import StrEnum


class Kind(StrEnum):
    """The kind of an error, for code that handles kinds differently."""

    CONFIG = "config"  # a setting that cannot be used
    LAYOUT = "layout"  # KV of a shape, dtype or device other than the layout's
    TOKENS = "tokens"  # invalid token ids
    MODEL = "model"  # a model whose KV cannot be shared correctly
    MEMORY = "memory"  # shared memory that is too small, damaged or of another user
    STORAGE = "storage"  # disk full, unreadable or in use by others
    CORRUPT = "corrupt"  # bytes that are not what was stored
    TRANSPORT = "transport"  # another process did not answer
    CLUSTER = "cluster"  # no cluster, two clusters, a Ray that does not answer
    CLOSED = "closed"  # used after close


class TieredKVError(Exception):
    """An error of tiered_kv: a `kind`, a sentence for people, and the details as `context`."""

    def __init__(self, kind: Kind, message: str, **context: object) -> None:
        super().__init__(message)
        self.kind = kind
        self.context = context

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the error with its kind and context, so that Ray can send it to another process."""
        return (_rebuild, (self.kind, str(self), self.context))


def _rebuild(kind: Kind, message: str, context: dict[str, object]) -> TieredKVError:
    return TieredKVError(kind, message, **context)
