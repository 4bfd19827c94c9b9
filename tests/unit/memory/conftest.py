"""Nodes for the tests of memory. Their files are below tmp_path; all are checked and closed, and no descriptor stays open."""

import gc
import os
import struct
from typing import NamedTuple

import pytest

from tiered_kv.blocks import Location, Tier
from tiered_kv.memory.index import IndexWriter
from tiered_kv.memory.shared import NodeFiles
from tiered_kv.memory.view import NodeView


class Node(NamedTuple):
    files: NodeFiles
    index: IndexWriter
    view: NodeView


def make_key(number: int, home: int | None = None) -> bytes:
    """Returns a different key for every number. Its look-up starts at slot `home`."""
    return struct.pack("@4Q", number if home is None else home, number, ~number & (1 << 64) - 1, 7)


def make_location(number: int, stored_bytes: int = 512) -> Location:
    """Returns a location for a number. Extents of different numbers do not overlap."""
    return Location(Tier.HOST, 0, 0, number * 512, stored_bytes, 512)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def no_descriptor_leaks():
    before = _descriptors()
    yield
    if _descriptors() > before:
        gc.collect()  # what is only waiting for the collector is no leak
    assert _descriptors() <= before


@pytest.fixture
def start_node(tmp_path, no_descriptor_leaks):
    """A function that returns a node's files, writer and one reader. A second call with the same name is a restart."""
    nodes = []

    def start(name: str = "n", host_bytes: int = 1 << 20) -> Node:
        files, _ = NodeFiles.open_or_create(tmp_path, "c", name, host_bytes)
        nodes.append(Node(files, IndexWriter(files), NodeView.open(files.directory)))
        return nodes[-1]

    yield start
    for node in nodes:
        node.index.check()
        node.view.check()
        node.view.close()
        node.index.close()
        node.files.close()


@pytest.fixture
def node(start_node) -> Node:
    return start_node()


@pytest.fixture(scope="session")
def key():
    return make_key


@pytest.fixture(scope="session")
def location():
    return make_location


def crash(node: Node) -> None:
    """Do what the kernel does when a writer is killed: close everything, and leave the words unchanged."""
    node.index.close()
    node.files.close()


@pytest.fixture(scope="session")
def kill():
    return crash
