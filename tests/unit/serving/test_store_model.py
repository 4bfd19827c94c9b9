"""The whole store of one node, through a client, compared with a dictionary: every hit is the stored block."""

import os
import tempfile
import uuid
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.unit.serving.prompts import NAMESPACE, assert_is_prefix, kv_of, tokens_of
from tiered_kv import Config, KVLayout
from tiered_kv.blocks import Tier
from tiered_kv.client.connect import client_of
from tiered_kv.node.node import Node
from tiered_kv.tiers.disk.segments import segment_path

LARGE = KVLayout(2, 2, 16, "float32", 64)  # 32 KiB: 30 fill the arena of a 1 MiB host tier
SMALL = KVLayout(1, 1, 8, "bfloat16", 4)  # 128 B: 128 fill its index
SETTINGS = {
    "host": (LARGE, {}),
    "host and disk": (LARGE, {"disk": "1MiB", "store_wait_ms": 10_000}),
    "host and a larger disk": (LARGE, {"disk": "8MiB", "disk_segment": "256KiB", "store_wait_ms": 10_000}),
    "crowded index": (SMALL, {"disk": "1MiB"}),
    "host and device": (LARGE, {"device": "1MiB:cpu"}),
    "host and objects": (LARGE, {"objects": "memory://", "objects_cap": "2MiB", "store_wait_ms": 10_000}),
    "all tiers": (LARGE, {"device": "1MiB:cpu", "disk": "1MiB", "objects": "objects", "objects_cap": "4MiB", "store_wait_ms": 10_000}),
}
PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=10).map(tuple)
FAR_PATHS = st.tuples(st.integers(3, 40), PATHS).map(lambda both: both[:1] + both[1])


class StoreModel(RuleBasedStateMachine):
    """The state machine of the test. `stored` has every path whose block was ever stored."""

    @initialize(kind=st.sampled_from(sorted(SETTINGS)))
    def begin(self, kind: str) -> None:
        self.layout, options = SETTINGS[kind]
        self.folder = tempfile.TemporaryDirectory()
        (Path(self.folder.name) / "disk").mkdir()
        if options.get("objects") == "objects":
            options = {**options, "objects": f"{self.folder.name}/objects"}
        self.config = Config.of({"host": "1MiB", "disk_path": f"{self.folder.name}/disk", **options})
        self.cluster_id = uuid.uuid4().hex[:8]
        self.node = self.start()
        self.client = client_of(self.node.info(), self.layout, NAMESPACE, connect=lambda: self.node.open_session())
        self.stored: set[tuple[int, ...]] = set()

    def start(self) -> Node:
        return Node(self.config, self.cluster_id, "n0")

    @rule(path=PATHS | FAR_PATHS)
    def store(self, path) -> None:
        before = self.client.match(tokens_of(path, self.layout)).tokens // self.layout.block_tokens
        done = self.client.store(tokens_of(path, self.layout), kv_of(path, self.layout))
        assert done.new + done.present + done.refused == len(path)
        assert done.present >= before
        self.stored |= {path[:end] for end in range(1, len(path) + 1)}
        if not done.refused and not done.present:
            assert self.client.match(tokens_of(path, self.layout)).tokens == len(path) * self.layout.block_tokens

    @rule(path=PATHS, first=st.integers(0, 9))
    def store_the_end(self, path, first: int) -> None:
        first = min(first, len(path) - 1)
        done = self.client.store(tokens_of(path, self.layout), kv_of(path, self.layout, first), start=first * self.layout.block_tokens)
        assert done.new + done.present + done.refused == len(path) - first
        self.stored |= {path[:end] for end in range(first + 1, len(path) + 1)}

    @rule(first=st.integers(100, 10_000))
    def fill(self, first: int) -> None:
        """Store many chains that are never used again, so that every tier evicts blocks."""
        for turn in range(first, first + 12):
            self.store((turn, 0, 1, 2))

    @rule(path=PATHS | FAR_PATHS, deadline_ms=st.sampled_from([None, 0]))
    def fetch(self, path, deadline_ms) -> None:
        blocks = assert_is_prefix(self.client.fetch(tokens_of(path, self.layout), deadline_ms=deadline_ms), path, self.layout)
        assert all(path[:end] in self.stored for end in range(1, blocks + 1))

    @rule()
    def settle(self) -> None:
        self.node.engine.drain_touches()
        self.node.engine.settle()

    @rule(pick=st.integers(0, 1000), byte=st.integers(0, 100_000))
    def damage_a_block_on_disk(self, pick: int, byte: int) -> None:
        self.settle()
        on_disk = sorted(block.copies[Tier.DISK] for block in self.node.engine.machine.blocks.values() if Tier.DISK in block.copies)
        if on_disk:
            location = on_disk[pick % len(on_disk)]
            at = location.offset + byte % location.stored_bytes
            fd = os.open(segment_path(self.node.storage.disk.folder, location.segment), os.O_RDWR)
            os.pwrite(fd, bytes([os.pread(fd, 1, at)[0] ^ 0x10]), at)
            os.close(fd)

    @rule()
    def restart(self) -> None:
        self.settle()
        before = {key: set(block.copies) for key, block in self.node.engine.machine.blocks.items()}
        self.node.close(remove=False)
        self.node = self.start()
        after = {key: set(block.copies) for key, block in self.node.engine.machine.blocks.items()}
        gone = {Tier.DEVICE} if self.config.objects != "memory://" else {Tier.DEVICE, Tier.OBJECTS}
        assert all(tiers - gone <= after.get(key, set()) for key, tiers in before.items())
        back = {tier for key, tiers in after.items() for tier in tiers - before.get(key, set())}
        assert not back & {Tier.DEVICE, Tier.HOST}, "only what was given up in a segment that is still there may come back"

    @invariant()
    def caps_hold_and_books_agree(self) -> None:
        for tier in self.node.stats()["tiers"].values():
            assert tier["used_bytes"] <= tier["capacity_bytes"]
        self.node.engine.settle()
        self.node.check()
        assert sum(path.stat().st_size for path in Path(self.folder.name).rglob("*.tkv")) <= self.config.disk

    def teardown(self) -> None:
        self.client.close()
        self.node.close()
        self.folder.cleanup()


TestStoreModel = StoreModel.TestCase
TestStoreModel.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
