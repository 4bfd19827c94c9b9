"""Without chains, the classic policies are the published algorithms: they hit the same requests as libcachesim."""

import random
from bisect import bisect

import pytest

from tiered_kv.policy import History, create_policy

libcachesim = pytest.importorskip("libcachesim")

PEERS = {"lru": "LRU", "fifo": "FIFO", "lfu": "LFU", "sieve": "Sieve", "arc": "ARC", "s3fifo": "S3FIFO"}
OBJECTS = 2_000


def skewed(seed: int, requests: int) -> list[int]:
    """Returns Zipf-distributed objects whose ranks drift, with an occasional scan."""
    chance = random.Random(seed)
    sums, total = [], 0.0
    for rank in range(1, OBJECTS + 1):
        total += rank**-0.8
        sums.append(total)
    found = []
    while len(found) < requests:
        if chance.random() < 0.001:
            start = chance.randrange(10_000, 20_000)
            found += range(start, start + 150)
        found.append((bisect(sums, chance.random() * total) + len(found) // 40) % 5_000)
    return found[:requests]


TRACES = {"skewed": skewed(1, 12_000), "other": skewed(2, 12_000), "loop": [number % 300 for number in range(6_000)]}


def hits(name: str, capacity: int, objects: list[int]) -> list[bool]:
    policy = create_policy(name, History(), capacity)
    found = []
    for each in objects:
        found.append(each in policy)
        if found[-1]:
            policy.use([each])
            continue
        if len(policy) == capacity:
            for victim in policy.victims(1, (), 0.0, incoming=[each]):
                policy.remove(victim)
        policy.add([each], None, 1)
    policy.check()
    return found


def peer_hits(name: str, capacity: int, objects: list[int]) -> list[bool]:
    cache = getattr(libcachesim, PEERS[name])(cache_size=capacity)
    found = []
    for each in objects:
        request = libcachesim.Request()
        request.obj_id, request.obj_size = each, 1
        found.append(bool(cache.get(request)))
    return found


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("capacity", [20, 99, 250, 1_000])
@pytest.mark.parametrize("name", PEERS)
def test_the_same_requests_hit_as_in_libcachesim(name, capacity, trace):
    mine, theirs = hits(name, capacity, TRACES[trace]), peer_hits(name, capacity, TRACES[trace])
    assert mine == theirs, f"first at request {next(at for at, pair in enumerate(zip(mine, theirs)) if pair[0] != pair[1])}"
