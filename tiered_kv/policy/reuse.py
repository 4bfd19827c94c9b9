"""The reuse index: how much it is worth to keep a block, judged by how soon similar blocks were used again.

A class is a group of blocks with a similar past: similar counts of uses, gaps since the previous request of the chain, hot
prefixes and lengths of the answer. A kind is the number of a class, or stands for a worker's hint: no further use, or a use
within some time. Age is the time since a block's last use.

A hazard is the probability of a use at some age, if there was none before. Hazards by class and age are estimated from the
intervals between uses. Intervals that are still open count as censored (Kaplan & Meier, JASA 1958). Classes with few intervals
are shrunk towards coarser classes. The index of a block is its Gittins index (Gittins, JRSS B 1979): the best ratio, over all
future ages, of the probability of a use until that age to the time for which the block is kept. All data is in arrays, and the
counts of several nodes can be added.
"""

import numpy as np

FIRST_S = 2.0**-8
OCTAVES = 28
"""Number of octaves of age. The first ones end at 2^-8 s, 2^-7 s and so on; each is as long as all earlier ones. The last has no end."""

USES, GAPS, HOTS, ANSWERS = 6, 5, 8, 3
CLASSES = USES * GAPS * HOTS * ANSWERS
"""A class combines four buckets: uses so far, gap since the chain's previous turn, hot prefix, length of the answer."""

ENDED = CLASSES
"""Kind of blocks that will not be used again, as their worker reported. A greater kind gives the octave of the expected use."""
ROWS = CLASSES + 1 + OCTAVES

_USES_FROM = np.array([2, 3, 5, 9, 17])
_GAP_FROM_S = np.array([10.0, 60.0, 300.0])  # bucket 0 means no previous turn
_ANSWER_FROM_TOKENS = np.array([65, 257])
_USES_BUCKET = np.searchsorted(_USES_FROM, np.arange(256), side="right")

_PSEUDO = 128.0  # the coarser class counts as this many observations
_CARRY = 0.5  # how much of a class's deviation at one age is expected at the next
_NOTHING_KNOWN = 0.1
"""Chance of reuse within an octave without data. It is the same at every age, so that the index falls with age, as in LRU."""
_EXPECTED_TRUE = 0.9  # the assumed probability that a worker's expectation comes true
_COUNT_MAX = 1e12  # larger counts cannot be genuine
_DECAY = 0.98

_EDGES_S = np.concatenate([[0.0], FIRST_S * 2.0 ** np.arange(OCTAVES - 1)])
_WIDTHS_S = np.append(np.diff(_EDGES_S), _EDGES_S[-1])
_ENDS_S = _EDGES_S + _WIDTHS_S


def kinds(uses: np.ndarray, gap: int, hot: int, answer: int) -> np.ndarray:
    """Returns the classes of blocks of one chain as int64. `uses`: each block's count of uses.

    All the blocks have the buckets `gap`, `hot` and `answer`.
    """
    found: np.ndarray = ((_USES_BUCKET[uses] * GAPS + gap) * HOTS + hot) * ANSWERS + answer
    return found


def gap_bucket(gap_s: float) -> int:
    """Returns the number of the bucket (range) of a gap: the seconds between a request and the previous request of the same chain."""
    return 1 + int(np.searchsorted(_GAP_FROM_S, gap_s, side="right"))


def inherited(kind: int) -> tuple[int, int]:
    """Returns the buckets of gap and hot prefix that a block of this kind passes on to its descendants, (0, 0) if it has none."""
    return (kind // (ANSWERS * HOTS) % GAPS, kind // ANSWERS % HOTS) if kind < CLASSES else (0, 0)


def answered(kind: np.ndarray, tokens: int) -> np.ndarray:
    """Returns the classes of blocks after their request was answered with `tokens` tokens."""
    answer = int(np.searchsorted(_ANSWER_FROM_TOKENS, tokens, side="right"))
    return np.where(kind < CLASSES, kind // ANSWERS * ANSWERS + answer, kind)


def expected_kind(within_s: float) -> int:
    """Returns the kind of blocks that a worker, by its hint, expects to be used within `within_s` seconds."""
    return ENDED + 1 + int(_octave_of(np.array([within_s]))[0])


class ReuseModel:
    """Counts intervals between uses of blocks, and computes the table of reuse indices from the counts."""

    def __init__(self) -> None:
        self._used = np.zeros((CLASSES, OCTAVES))  # intervals that ended with a use, by length
        self._lost = np.zeros((CLASSES, OCTAVES))  # intervals whose block was forgotten, by its age then
        self._others = np.zeros((2, CLASSES, OCTAVES))  # ended and open intervals of other nodes
        self._unused = np.ones((CLASSES, OCTAVES + 1))  # share of blocks not used before each octave, as of the last table

    def ended(self, kind: np.ndarray, age_s: np.ndarray) -> None:
        """Counts intervals that ended with a use: blocks of these kinds were used again at these ages."""
        _count(self._used, kind, age_s)

    def lost_sight(self, kind: np.ndarray, age_s: np.ndarray) -> None:
        """Counts censored intervals: blocks of these kinds were not used until these ages and then forgotten, so later uses are unknown."""
        _count(self._lost, kind, age_s)

    def forget_hot(self, bucket: int) -> None:
        """Drops the counts of a bucket of hot prefixes, because another prefix gets the bucket."""
        for counts in (self._used, self._lost):
            counts.reshape(USES, GAPS, HOTS, ANSWERS, OCTAVES)[:, :, bucket] = 0

    def table(self, kind: np.ndarray, age_s: np.ndarray) -> np.ndarray:
        """Returns the reuse index by kind, at the start of each octave of age, in uses a second: float32 (ROWS x OCTAVES), flat.

        `kind`, `age_s`: of the blocks whose next use is not known yet (their intervals are open).
        """
        used, open_ = np.stack(self._counts(kind, age_s)) + self._others
        hazard = hazards(used, open_)
        self._unused[:, 1:] = np.cumprod(1 - hazard, axis=1)
        classes = gittins(hazard)
        usual = gittins(hazards(used.sum(0, keepdims=True), open_.sum(0, keepdims=True)))[0]
        return np.concatenate([classes, np.zeros((1, OCTAVES)), _expected(usual)]).astype(np.float32).ravel()

    def fade(self) -> None:
        """Multiplies all counts so far by `_DECAY`, so that new uses weigh more than old ones."""
        self._used *= _DECAY
        self._lost *= _DECAY

    def chance(self, kind: int, age_s: float, within_s: float) -> float:
        """Returns the probability that a block of this kind and age is used within `within_s` seconds, as of the last call of `table`."""
        if kind >= CLASSES:
            return float(kind != ENDED)
        octaves = np.arange(OCTAVES + 1)
        now, then = np.interp(np.log2(np.maximum([age_s, age_s + within_s], FIRST_S) / FIRST_S) + 1, octaves, self._unused[kind])
        return float(1 - then / now)

    def statistics(self, kind: np.ndarray, age_s: np.ndarray) -> bytes:
        """Returns this node's counts of ended and open intervals as bytes: number of rows u32 | rows u16 | ended f32 | open f32."""
        return _packed(np.stack(self._counts(kind, age_s)))

    def adopt(self, others: bytes) -> None:
        """Adds other nodes' counts (`statistics`) to the model, in place of those of earlier calls. Raises ValueError for invalid bytes."""
        self._others = _unpacked(others)

    def _counts(self, kind: np.ndarray, age_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        open_ = self._lost.copy()
        _count(open_, kind, age_s)
        return self._used, open_


def merge_statistics(statistics: list[bytes]) -> bytes:
    """Returns the sum of several nodes' counts (`ReuseModel.statistics`). Raises ValueError for invalid bytes."""
    return _packed(sum((_unpacked(each) for each in statistics), np.zeros((2, CLASSES, OCTAVES))))


def hazards(used: np.ndarray, open_: np.ndarray) -> np.ndarray:
    """Returns hazards (classes, OCTAVES): the probability that a block that reached an octave of age is used within that octave.

    `used`, `open_`: counts of intervals by class, and by the octave in which they ended or were last seen open. Each has one
    row, or a row for every class.
    """
    prior = np.full((1, 1, 1, 1, OCTAVES), _NOTHING_KNOWN)
    for ended, censored in zip(_coarse_to_fine(used), _coarse_to_fine(open_), strict=True):
        at_risk = np.cumsum((ended + censored)[..., ::-1], -1)[..., ::-1] - censored / 2  # actuarial: at risk for half an octave
        estimate = np.empty(ended.shape)
        drift = np.ones(ended.shape[:-1])
        for octave in range(OCTAVES):
            before = np.clip(prior[..., octave] * drift**_CARRY, 1e-6, 0.98)
            estimate[..., octave] = (ended[..., octave] + _PSEUDO * before) / (at_risk[..., octave] + _PSEUDO)
            drift = estimate[..., octave] / prior[..., octave]
        prior = estimate
    return prior.reshape(-1, OCTAVES)


def gittins(hazard: np.ndarray) -> np.ndarray:
    """Returns the Gittins index (classes, OCTAVES) at the start of each octave of age, in uses a second."""
    index, alive, held_s = (np.full(hazard.shape, each) for each in (0.0, 1.0, 0.0))  # by the octave in which the interval starts
    for octave in range(OCTAVES):
        started = slice(0, octave + 1)
        used = alive[:, started] * hazard[:, octave : octave + 1]
        held_s[:, started] += (alive[:, started] - used / 2) * _WIDTHS_S[octave]
        alive[:, started] -= used
        index[:, started] = np.maximum(index[:, started], (1 - alive[:, started]) / held_s[:, started])
    return index


def _expected(usual: np.ndarray) -> np.ndarray:
    """Returns the index of blocks with an expected use: (octave of the expected use, octave of age).

    The index is high until the expected time is over. From then on it is `usual`, the index of blocks of any class.
    """
    left_s = _ENDS_S[:, None] - _EDGES_S[None, :]
    return np.where(left_s > 0, np.maximum(_EXPECTED_TRUE / np.maximum(left_s, FIRST_S), usual), usual)


def _coarse_to_fine(counts: np.ndarray) -> list[np.ndarray]:
    """Returns four arrays of counts, from coarse to fine: of all blocks, by uses, by uses and gap, and by class.

    Each is shaped to broadcast over the next.
    """
    if len(counts) == 1:
        return [counts.reshape(1, 1, 1, 1, OCTAVES)]
    classes = counts.reshape(USES, GAPS, HOTS, ANSWERS, OCTAVES)
    gaps = classes.sum((2, 3), keepdims=True)
    uses = gaps.sum(1, keepdims=True)
    return [uses.sum(0, keepdims=True), uses, gaps, classes]


def _octave_of(age_s: np.ndarray) -> np.ndarray:
    return np.maximum(np.searchsorted(_EDGES_S, age_s, side="right") - 1, 0)


def _count(counts: np.ndarray, kind: np.ndarray, age_s: np.ndarray) -> None:
    places = kind.astype(np.int64) * OCTAVES + _octave_of(age_s)
    np.add.at(counts.reshape(-1), places[places < CLASSES * OCTAVES], 1.0)


def _packed(counts: np.ndarray) -> bytes:
    rows = np.flatnonzero(counts.any((0, 2)))
    return np.uint32(len(rows)).tobytes() + rows.astype(np.uint16).tobytes() + counts[:, rows].astype(np.float32).tobytes()


def _unpacked(statistics: bytes) -> np.ndarray:
    count = int(np.frombuffer(statistics, np.uint32, 1)[0])
    rows = np.frombuffer(statistics, np.uint16, count, 4)
    values = np.frombuffer(statistics, np.float32, -1, 4 + 2 * count).reshape(2, count, OCTAVES)
    if (rows >= CLASSES).any() or not ((values >= 0) & (values <= _COUNT_MAX)).all():
        raise ValueError("invalid statistics of reuse: a class or a count is out of range")
    counts = np.zeros((2, CLASSES, OCTAVES))
    counts[:, rows] = values
    return counts
