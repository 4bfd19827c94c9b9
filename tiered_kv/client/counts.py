"""The counts of one client in shared memory, by namespace, for the metrics of its node."""

import threading
from collections.abc import Mapping
from pathlib import Path

from tiered_kv import forking
from tiered_kv.keys import BlockKey, Namespace
from tiered_kv.layout import Layout
from tiered_kv.memory.client_page import ClientPage

PAGES_MAX = 8
"""The most namespaces that one client counts apart. The others are counted together."""
ROOTS_MAX = 64
OTHER = "other"
NAMESPACE_CHARACTERS = 12


def namespace_label(family: bytes) -> str:
    """Returns the short name of a family of namespaces in metrics: the start of what `status` calls `family`."""
    return family.hex()[:NAMESPACE_CHARACTERS]


class CountPages:
    """Adds to the pages of one client in one life of its node's files. Thread-safe.

    `directory`: the node's directory; None without a node, then nothing is counted.
    """

    def __init__(self, directory: Path | None, layout: Layout) -> None:
        self._directory = directory
        self._layout = layout
        self._by_root: dict[BlockKey, ClientPage] = {}  # a weight epoch has a root of its own, and the page of its namespace
        self._pages: dict[tuple[str, str], ClientPage] = {}
        self._lock = threading.Lock()
        forking.register(self)

    def after_fork(self) -> None:
        """Forget the parent's pages in a child process, which creates its own."""
        self._lock, self._by_root, self._pages = threading.Lock(), {}, {}

    def add(
        self,
        root: BlockKey,
        namespace: Namespace,
        counts: Mapping[str, int],
        *,
        fetch_s: float | None = None,
        store_s: float | None = None,
    ) -> None:
        """Add to the counts of a namespace, and record the duration of a fetch or a store. `root`: the namespace's root."""
        page = self._by_root.get(root) or self._page_of(root, namespace)
        page.add(counts, fetch_s=fetch_s, store_s=store_s)

    def _page_of(self, root: BlockKey, namespace: Namespace) -> ClientPage:
        names = namespace_label(namespace.family), namespace.tenant
        with self._lock:
            if names not in self._pages and len(self._pages) >= PAGES_MAX:
                names = OTHER, OTHER
            page = self._pages.get(names)
            if page is None:
                page = self._pages[names] = self._made(*names)
            while len(self._by_root) >= ROOTS_MAX:
                del self._by_root[next(iter(self._by_root))]
            self._by_root[root] = page
        return page

    def _made(self, namespace: str, tenant: str) -> ClientPage:
        if self._directory is None:
            return ClientPage.nowhere()
        return ClientPage.create(self._directory, namespace, tenant, self._layout.block_tokens, self._layout.block_bytes)

    def close(self) -> None:
        """Close all pages. May be called twice."""
        with self._lock:
            pages, self._pages, self._by_root = list(self._pages.values()), {}, {}
            self._directory = None  # calls that are still running count nowhere
        for page in pages:
            page.close()
