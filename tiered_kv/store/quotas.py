"""Tenants' shares of the tiers: the bytes and blocks of each tenant, and the blocks that a tenant above its quota loses."""

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from typing import cast

from tiered_kv.blocks import Location, Tier
from tiered_kv.keys import BlockKey
from tiered_kv.policy import EvictionPolicy, LRUPolicy
from tiered_kv.store.movement import Block

QUEUE_SHARE = 1 / 8
"""The share of a quota that may be on its way to a lower tier. Further blocks are dropped instead of copied."""
Share = tuple[str, Tier]


class Quotas:
    """Counts blocks by tenant and tier. `limits`: the most bytes of some tenants in some tiers.

    `tenant_of` returns the tenant of a root, "" if the root is unknown. For each limit, the tenant's blocks in the tier are kept in an
    order of their own: least recently used first, children before parents. So finding victims does not look at other tenants' blocks.
    """

    def __init__(
        self, limits: Mapping[str, Mapping[Tier, int]] | None = None, tenant_of: Callable[[BlockKey | None], str] = lambda root: ""
    ) -> None:
        self.limits: dict[Share, int] = {(tenant, tier): size for tenant, each in (limits or {}).items() for tier, size in each.items()}
        self.tenant_of = tenant_of
        self.bytes: Counter[Share] = Counter()
        self.blocks: Counter[Share] = Counter()
        self._leaving: Counter[Share] = Counter()  # bytes being copied to a lower tier, after which they leave
        self._orders: dict[Share, EvictionPolicy] = {share: LRUPolicy() for share in self.limits}

    def placed(self, key: BlockKey, block: Block, location: Location) -> None:
        """Note that a block has a copy at a location."""
        share = block.tenant, location.tier
        self.bytes[share] += location.stored_bytes
        self.blocks[share] += 1
        if share in self._orders:
            self._orders[share].add([key], block.link, location.stored_bytes)

    def dropped(self, key: BlockKey, block: Block, location: Location) -> None:
        """Note that a block has no copy at a location any more."""
        share = block.tenant, location.tier
        self.bytes[share] -= location.stored_bytes
        self.blocks[share] -= 1
        if share in self._orders:
            self._orders[share].remove(key)

    def resized(self, key: BlockKey, block: Block, before: Location, after: Location) -> None:
        """Note that a copy has another size in the same tier."""
        share = block.tenant, after.tier
        self.bytes[share] += after.stored_bytes - before.stored_bytes
        if share in self._orders:
            self._orders[share].resize(key, after.stored_bytes)

    def used(self, known: Sequence[tuple[BlockKey, Block]]) -> None:
        """Note a use of consecutive blocks of one chain. All of them have the same tenant."""
        for share, order in self._orders.items():
            if share[0] == known[0][1].tenant and (here := [key for key, block in known if share[1] in block.copies]):
                order.use(here)

    def leaves(self, block: Block, tier: Tier | None) -> None:
        """Note that `block` will be dropped from `tier` when its copying to a lower tier has ended. None: it will not be dropped."""
        for each, sign in ((block.leaving, -1), (tier, 1)):
            if each is not None and each in block.copies and (block.tenant, each) in self.limits:
                self._leaving[block.tenant, each] += sign * block.copies[each].stored_bytes
        block.leaving = tier

    def room(self, tenant: str, tier: Tier) -> int | None:
        """Returns how many bytes a tenant may still add to a tier, negative above its quota; None without a quota."""
        share = tenant, tier
        limit = self.limits.get(share)
        return None if limit is None else limit - self.bytes[share] + self._leaving[share]

    def lacking(self, tenant: str, tier: Tier, nbytes: int) -> int:
        """Returns how many bytes a tenant must free in a tier before it may add `nbytes`; 0 if there is room, or no quota."""
        room = self.room(tenant, tier)
        return 0 if room is None else max(nbytes - room, 0)

    def fitting(self, tenant: str, tier: Tier, nbytes: int) -> int:
        """Returns how many blocks of `nbytes` a tenant with a quota may add to a tier."""
        return max((self.room(tenant, tier) or 0) // nbytes, 0)

    def exceeded(self) -> list[Share]:
        """Returns the pairs of tenant and tier in which the tenant exceeds its quota."""
        return [share for share in self.limits if self.bytes[share] - self._leaving[share] > self.limits[share]]

    def victims(self, share: Share, nbytes: int, protected: Container[BlockKey], now_s: float) -> list[BlockKey]:
        """Returns blocks of a tenant to evict from a tier. They free `nbytes`, or less if too few blocks may be evicted."""
        return cast("list[BlockKey]", self._orders[share].victims(nbytes, protected, now_s))

    def queue_bytes(self, share: Share) -> float:
        """Returns how many more bytes of a tenant may be queued now to be copied to a lower tier."""
        return max(self.limits[share] * QUEUE_SHARE - self._leaving[share], 0)

    def check(self, blocks: Mapping[BlockKey, Block]) -> None:
        """Assert that all counts are right."""
        copies = [(block.tenant, location, block, key) for key, block in blocks.items() for location in block.copies.values()]
        for share in {*self.bytes, *self.limits, *((tenant, location.tier) for tenant, location, *_ in copies)}:
            here = [(location, block, key) for tenant, location, block, key in copies if (tenant, location.tier) == share]
            assert self.bytes[share] == sum(location.stored_bytes for location, *_ in here)
            assert self.blocks[share] == len(here)
            if share in self._orders:
                leaving = sum(location.stored_bytes for location, block, _ in here if block.leaving is location.tier)
                assert self._leaving[share] == leaving
                assert len(self._orders[share]) == len(here)
                assert all(key in self._orders[share] for *_, key in here)
                self._orders[share].check()
