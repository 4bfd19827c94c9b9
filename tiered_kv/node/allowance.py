"""Which blocks a node may show: those that carry no more error than the plan of their model allows.

Whatever was not stored here by a worker passes this one check: what a former node left in memory, on disk and in objects, what a
checkpoint has, what a peer sends. A block that does not pass is a miss, and can be stored again (docs/design/023).
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable

from tiered_kv.codecs import is_lossy
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.node.compression import BlockData, Coder
from tiered_kv.tiers.host import Lineage

log = logging.getLogger(__name__)

_ROUNDING = 1 + 2.0**-22  # of errors that were kept as f32


class Allowance:
    """The check, by the plans that a `Coder` has; and a count of the blocks that did not pass it, by where they were. Thread-safe.

    Before a worker introduces a model, its blocks may carry what the settings allow at most. Those that may turn out to carry too much
    are remembered until then.
    """

    def __init__(self, coder: Coder) -> None:
        self._coder = coder
        self._lock = threading.Lock()
        self._undecided: dict[BlockKey, dict[BlockKey, float]] = {}  # by root: blocks that were let pass before there was a plan
        self._refused: Counter[str] = Counter()

    def admits(
        self, key: BlockKey, root: BlockKey | None, codec: int, error: float | None, look: Callable[[], float | None] = lambda: None
    ) -> bool:
        """Whether a block may be shown that lies in the codec of that id, and carries `error`.

        An error of None or, of a lossy codec, 0 is one that is not known: `look` may find it. What stays unknown passes, unless
        nothing lossy may; it is looked at when it is read.
        """
        most = self._coder.most_error(root)
        if most == 0:
            return not error and not is_lossy(codec)
        if not error and is_lossy(codec):
            error = look()
        if not error:
            return True
        if not 0 < error <= most * _ROUNDING:
            return False
        if root is not None and not self._coder.has_plan(root):
            with self._lock:
                self._undecided.setdefault(root, {})[key] = error
        return True

    def check(self, held: BlockData, lineage: Lineage) -> None:
        """Raise (kind `corrupt`) for a block that was read and may not be shown."""
        codec = held.frame.codec.id if held.frame is not None else 0
        if not self.admits(lineage.key, lineage.root, codec, held.error):
            self.refuse("read", 1)
            raise TieredKVError(Kind.CORRUPT, self._reason(held.error, lineage.root), too_lossy=True)

    def refuse(self, where: str, blocks: int) -> None:
        """Count blocks that may not be shown; the first time for each place the log says so."""
        if blocks:
            with self._lock:
                is_first = not self._refused[where]
                self._refused[where] += blocks
            if is_first:
                log.warning(
                    "%d blocks are not shown (%s): they carry more error than quality, codec or error_budget allow now; "
                    "storing them again replaces them. Further ones are only counted, as too_lossy",
                    blocks,
                    where,
                )

    def decide(self, root: BlockKey) -> list[BlockKey]:
        """The model has a plan now. Returns the blocks that were let pass and carry more error than it allows."""
        with self._lock:
            known = self._undecided.pop(root, {})
        most = self._coder.most_error(root) * _ROUNDING
        return [key for key, error in known.items() if error > most]

    def stats(self) -> dict[str, int]:
        """By place: blocks that were not shown since the node began."""
        with self._lock:
            return dict(self._refused)

    def _reason(self, error: float, root: BlockKey | None) -> str:
        return f"the block is too lossy: it carries an error of {error:.2g}, at most {self._coder.most_error(root):.2g} is allowed here"
