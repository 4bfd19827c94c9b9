"""A worker's description of its model, sent when it attaches, so that its node can encode the model's blocks."""

import reprlib
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import msgpack

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import Namespace
from tiered_kv.layout import Layout, layout_of

FACTS_BYTES_MAX = 64 << 10


@dataclass(frozen=True)
class ModelInfo:
    """The description of a model that its node needs.

    `weights`: as in `Namespace`; identifies the model's calibration. `rope`: the inverse frequencies of the model's rotation of K
    (see `codecs.rotation`), b"" for a model without rotation, None if unknown. With None, K is encoded without undoing the
    rotation, which costs quality, not correctness. `rope_halves`: whether the rotation pairs channels of two halves, as in Llama, or
    neighbouring channels, as in GPT-J. `namespace`: the fields of the worker's namespace as plain data, None from a worker of an older
    version. Descriptions of one root may differ only in whether they have one.
    """

    layout: Layout
    weights: str
    rope: bytes | None = None
    rope_halves: bool = True
    namespace: dict[str, Any] | None = field(default=None, hash=False)

    def known_namespace(self) -> Namespace | None:
        """Returns the namespace that the worker sent; None if it sent none."""
        return None if self.namespace is None else Namespace(**self.namespace)

    def as_message(self) -> dict[str, Any]:
        """Returns plain data for msgpack. `of_message` is the inverse."""
        return asdict(self)

    @classmethod
    def of_message(cls, message: Any) -> Self:
        """Returns the description in a message. Raises (kind `transport`) if it is invalid or larger than FACTS_BYTES_MAX.

        A worker of another version may send such a message.
        """
        try:
            if len(msgpack.packb(message)) > FACTS_BYTES_MAX:
                raise TieredKVError(Kind.TRANSPORT, f"it must be at most {FACTS_BYTES_MAX} bytes")
            info = cls(**{**message, "layout": layout_of(message["layout"])})
            is_valid = isinstance(info.weights, str) and isinstance(info.rope, bytes | None) and isinstance(info.rope_halves, bool)
            known = info.known_namespace()
            is_valid &= known is None or asdict(known) == {"salt": "", "weight_epoch": 0, **(info.namespace or {})}
        except (TypeError, KeyError, ValueError, TieredKVError) as error:
            raise TieredKVError(Kind.TRANSPORT, f"invalid model description from a worker: {error}") from error
        if not is_valid:
            raise TieredKVError(
                Kind.TRANSPORT,
                f"invalid model description from a worker: expected weights, rope, rope_halves and namespace, got {reprlib.repr(message)}",
            )
        return info
