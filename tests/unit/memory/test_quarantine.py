"""A restarted node finds, through the kernel, the ranges that a running worker still writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiered_kv
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.memory.extents import ExtentAllocator
from tiered_kv.memory.locks import locked_ranges, merged, share_range, unlock_range

WORKER = """
import sys
from tiered_kv.memory.view import NodeView
view = NodeView.open(sys.argv[1])
ranges = [(int(a), int(b)) for a, b in (pair.split("+") for pair in sys.argv[2:])]
with view.guard(ranges, view.generation) as held:
    print("held" if held else "restarted", flush=True)
    sys.stdin.readline()
print("released", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def start_worker():
    """Starts a process that guards ranges until it gets a line of input, and ends at the next line."""
    workers = []
    repository = str(Path(tiered_kv.__path__[0]).parent)

    def start(directory, *ranges):
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(directory), *ranges],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": repository},
        )
        workers.append(worker)
        assert worker.stdout.readline() == "held\n"
        return worker

    yield start
    for worker in workers:
        worker.kill()
        worker.communicate()


def everything(node):
    return [(0, node.files.arena_bytes)]


def test_a_restarted_node_sees_a_workers_ranges_until_it_releases_them(start_node, kill, start_worker):
    first = start_node()
    worker = start_worker(first.files.directory, "1000+100", "8192+512", "8704+512")
    kill(first)
    second = start_node()
    held = locked_ranges(second.files.arena_fd, everything(second))
    assert held == [(512, 1024), (8192, 1024)]
    allocator = ExtentAllocator(second.files.arena_bytes)
    for offset, nbytes in held:
        allocator.claim(offset, nbytes)
    assert allocator.used_bytes == 2048
    assert locked_ranges(second.files.arena_fd, allocator.free_ranges()) == []
    worker.stdin.write("\n")
    worker.stdin.flush()
    assert worker.stdout.readline() == "released\n"
    assert locked_ranges(second.files.arena_fd, everything(second)) == []


def test_a_killed_worker_keeps_no_range_locked(node, start_worker):
    worker = start_worker(node.files.directory, "0+4096")
    assert locked_ranges(node.files.arena_fd, everything(node)) == [(0, 4096)]
    worker.kill()
    worker.wait()
    assert locked_ranges(node.files.arena_fd, everything(node)) == []


def test_locks_of_several_holders_are_found_in_any_order(node):
    holders = [os.open(node.files.arena_path, os.O_RDWR) for _ in range(3)]
    for at in (9, 3, 20, 1):
        share_range(holders[at % 3], at * 512, 512)
    found = locked_ranges(node.files.arena_fd, everything(node))
    assert found == [(512, 512), (3 * 512, 512), (9 * 512, 512), (20 * 512, 512)]
    assert locked_ranges(node.files.arena_fd, [(512, 1024), (9 * 512 + 100, 12)]) == [(512, 512), (9 * 512 + 100, 12)]
    unlock_range(holders[0], 0, 4096)
    assert locked_ranges(node.files.arena_fd, [(0, 4096)]) == [(512, 512)]
    for fd in holders:
        os.close(fd)
    assert locked_ranges(node.files.arena_fd, everything(node)) == []


def test_adjacent_ranges_are_merged():
    assert merged([(20, 5), (0, 10), (10, 5), (22, 10)]) == [(0, 15), (20, 12)]
    assert merged([(0, 100), (10, 5)]) == [(0, 100)]
    assert merged([]) == []


def test_a_guard_detects_a_restart_of_the_node_since_the_reservation(start_node, kill):
    first = start_node()
    before = first.view.generation
    with first.view.guard([(0, 512)], before) as same:
        assert same
    kill(first)
    start_node()
    with first.view.guard([(0, 512)], before) as same:
        assert not same
    with first.view.guard([(0, 512)], first.view.generation) as same:
        assert same


def test_a_guard_is_released_when_its_block_raises(node):
    with pytest.raises(ZeroDivisionError), node.view.guard([(0, 512)], 1):
        assert locked_ranges(node.files.arena_fd, everything(node)) == [(0, 512)]
        raise ZeroDivisionError
    assert locked_ranges(node.files.arena_fd, everything(node)) == []


def test_a_guard_out_of_bounds_is_rejected_and_locks_nothing(node):
    with pytest.raises(TieredKVError) as caught, node.view.guard([(0, 512), (node.files.arena_bytes, 1)], 1):
        pass
    assert caught.value.kind is Kind.MEMORY
    assert locked_ranges(node.files.arena_fd, everything(node)) == []


def test_closing_a_view_inside_a_guard_releases_it(start_node):
    node = start_node()
    with node.view.guard([(0, 512)], 1):
        node.view.close()
        assert locked_ranges(node.files.arena_fd, everything(node)) == []
