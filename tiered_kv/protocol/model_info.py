"""What a worker says of its model when it attaches, so that its node can code the model's blocks."""

from dataclasses import asdict, dataclass, field
from typing import Any, Self

import msgpack

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import Namespace
from tiered_kv.layout import KVLayout

FACTS_BYTES_MAX = 64 << 10


@dataclass(frozen=True)
class ModelFacts:
    """`weights` as in `Namespace`: what tells a calibration of this model from others.

    `rope`: the inverse frequencies of the model's rotation of K (see `codecs.rotation`), b"" if it has none, None if unknown: K is
    then coded as it is, which costs quality, not correctness. `rope_halves`: how channels are paired. `namespace`: the fields of
    the worker's namespace, as plain data; None from a worker of an older version. Two facts about one root differ in it only so.
    """

    layout: KVLayout
    weights: str
    rope: bytes | None = None
    rope_halves: bool = True
    namespace: dict[str, Any] | None = field(default=None, hash=False)

    def known_namespace(self) -> Namespace | None:
        """The namespace that the worker has named."""
        return None if self.namespace is None else Namespace(**self.namespace)

    def as_message(self) -> dict[str, Any]:
        """As msgpack carries it; `of_message` is the inverse."""
        return asdict(self)

    @classmethod
    def of_message(cls, message: Any) -> Self:
        """Raises (kind `transport`) for what is none, as from a worker of another version, and for more than FACTS_BYTES_MAX."""
        try:
            if len(msgpack.packb(message)) > FACTS_BYTES_MAX:
                raise TieredKVError(Kind.TRANSPORT, f"more than {FACTS_BYTES_MAX} bytes")
            facts = cls(**{**message, "layout": KVLayout(**message["layout"])})
            is_one = isinstance(facts.weights, str) and isinstance(facts.rope, bytes | None) and isinstance(facts.rope_halves, bool)
            known = facts.known_namespace()
            is_one &= known is None or asdict(known) == facts.namespace
        except (TypeError, KeyError, ValueError, TieredKVError) as error:
            raise TieredKVError(Kind.TRANSPORT, f"a worker said of its model what cannot be: {error}") from error
        if not is_one:
            raise TieredKVError(Kind.TRANSPORT, f"a worker said of its model what cannot be: {message!r}")
        return facts
