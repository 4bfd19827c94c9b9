"""The check that a node shows only blocks whose lossy error the plan of their model allows.

All blocks that were not stored by this node's workers are checked here: blocks that a former node left in memory, on disk or in objects,
blocks of a checkpoint, and blocks from a peer. A block that fails is a miss and can be stored again (docs/design/023).
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable

from tiered_kv.blocks import BlockInfo
from tiered_kv.codecs import codec_by_id, is_lossy
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.node.compression import BlockData, BlockEncoder

log = logging.getLogger(__name__)

MIXED = "mixed"
_ROUNDING = 1 + 2.0**-22  # tolerance for errors that were stored as f32


class Allowance:
    """Checks blocks against the plans of a `BlockEncoder`, and counts the blocks that fail, by source. Thread-safe.

    Until a worker introduces a model, its blocks may have the largest error that the settings allow. Lossy blocks that are admitted
    before then are remembered, because the model's plan may not allow them.
    """

    def __init__(self, encoder: BlockEncoder) -> None:
        self._encoder = encoder
        self._lock = threading.Lock()
        self._undecided: dict[BlockKey, dict[BlockKey, float]] = {}  # by root: errors of blocks admitted before there was a plan
        self._refused: Counter[tuple[str, str]] = Counter()  # by source and codec

    def admits(
        self, key: BlockKey, root: BlockKey | None, codec: int, error: float | None, look: Callable[[], float | None] = lambda: None
    ) -> bool:
        """Returns whether workers may read a block. `codec`: the id of its codec. `error`: its lossy error.

        The error is unknown if it is None, or 0 with a lossy codec. `look` is then called and may find it. A block whose error stays
        unknown is admitted, unless no lossy block is allowed at all. `check` sees its error later, when the block is read.
        """
        most = self._encoder.most_error(root)
        if most == 0:
            return not error and not is_lossy(codec)
        if not error and is_lossy(codec):
            error = look()
        if not error:
            return True
        if not 0 < error <= most * _ROUNDING:
            return False
        if root is not None and not self._encoder.has_plan(root):
            with self._lock:
                self._undecided.setdefault(root, {})[key] = error
        return True

    def check(self, block: BlockData, info: BlockInfo) -> None:
        """Raise (kind `corrupt`) if workers may not read this block. Call it when the block has been read from its tier."""
        codec = block.frame.codec.id if block.frame is not None else 0
        if not self.admits(info.key, info.root, codec, block.error):
            self.refuse("read", 1, codec)
            raise TieredKVError(Kind.CORRUPT, self._reason(block.error, info.root), too_lossy=True)

    def refuse(self, where: str, blocks: int, codec: int | None = None) -> None:
        """Count blocks that workers may not read. `where`: the source of the blocks. The first refusal of each source is logged.

        `codec`: the id of their codec, None if they may have several.
        """
        if blocks:
            with self._lock:
                is_first = all(source != where for source, _ in self._refused)
                self._refused[where, MIXED if codec is None else codec_by_id(codec).name] += blocks
            if is_first:
                log.warning(
                    "%d blocks are not shown (source: %s): their error is larger than quality, codec or error_budget allow now; "
                    "storing them again replaces them. Further blocks are only counted, as too_lossy",
                    blocks,
                    where,
                )

    def decide(self, root: BlockKey) -> list[BlockKey]:
        """Apply a model's new plan. Returns the keys of blocks that were admitted before, with an error that the plan does not allow."""
        with self._lock:
            known = self._undecided.pop(root, {})
        most = self._encoder.most_error(root) * _ROUNDING
        return [key for key, error in known.items() if error > most]

    def stats(self) -> dict[str, int]:
        """Returns by source how many blocks were refused since the node started, because their error was larger than allowed."""
        sums: Counter[str] = Counter()
        for (where, _), blocks in self.refusals().items():
            sums[where] += blocks
        return dict(sums)

    def refusals(self) -> dict[tuple[str, str], int]:
        """Returns the same counts by source and codec. The codec is MIXED for blocks that were refused together."""
        with self._lock:
            return dict(self._refused)

    def _reason(self, error: float, root: BlockKey | None) -> str:
        return f"the block is too lossy: its error is {error:.2g}, this node allows at most {self._encoder.most_error(root):.2g}"
