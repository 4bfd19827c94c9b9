"""The one exception of the package and its kinds.

Expected outcomes (a miss, a full tier, a lost race) are values; an exception means that a setting is wrong,
a caller broke the contract, or the machine failed in a way that the caller has to know of.
"""

from enum import StrEnum


class Kind(StrEnum):
    """What went wrong, for code that wants to tell cases apart."""

    CONFIG = "config"  # a setting that cannot be used
    LAYOUT = "layout"  # KV of a shape, dtype or device other than the layout's
    TOKENS = "tokens"  # token ids that are none
    MODEL = "model"  # a model whose KV cannot be shared correctly
    MEMORY = "memory"  # shared memory too small, foreign or damaged
    STORAGE = "storage"  # disk full, unreadable or in use by others
    CORRUPT = "corrupt"  # bytes that are not what was stored
    TRANSPORT = "transport"  # another process did not answer
    CLUSTER = "cluster"  # no cluster, two clusters, a Ray that does not answer
    CLOSED = "closed"  # used after close


class TieredKVError(Exception):
    """An error of tiered_kv: a `kind`, a sentence for people, and the facts behind it as `context`."""

    def __init__(self, kind: Kind, message: str, **context: object) -> None:
        super().__init__(message)
        self.kind = kind
        self.context = context

    def __reduce__(self) -> tuple:
        """Keep kind and context when Ray carries the error to another process."""
        return (_rebuild, (self.kind, str(self), self.context))


def _rebuild(kind: Kind, message: str, context: dict) -> TieredKVError:
    return TieredKVError(kind, message, **context)
