"""Threads that decode a fetch's blocks side by side, each block on one thread, straight to where its tokens belong.

torch would put several threads on one block; where the machine is busy these wait for each other, and a fetch takes many times as
long (measured: 0.05 s became 2.7 s for 16 blocks of 1.5 MB).
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager

from tiered_kv.threads import DaemonThreads, work_alone

THREADS_MAX = 4
CLOSE_WAIT_S = 0.1
"""A block is decoded in milliseconds."""


class Results:
    """What became of the jobs of one fetch, in their order."""

    def __init__(self, threads: DaemonThreads) -> None:
        self._threads = threads
        self._jobs: list[Future[bool]] = []
        self.leading = 0
        """How many jobs, from the first on, said True; known when all have ended."""

    def add(self, job: Callable[..., bool], *arguments: object) -> None:
        """Have a job done."""
        self._jobs.append(self._threads.submit(job, *arguments))

    def settle(self) -> None:
        """Wait for the jobs up to the first that failed; the others do not begin any more, and none writes anything afterwards."""
        try:
            while self.leading < len(self._jobs) and self._jobs[self.leading].result():
                self.leading += 1
        finally:
            for job in self._jobs:
                job.cancel()
            wait(self._jobs)


class Decoders:
    """Threads that are there once somebody needs them."""

    def __init__(self) -> None:
        threads = min(THREADS_MAX, os.cpu_count() or 1)
        self._threads = DaemonThreads(threads, "tkv-decode", work_alone)

    @contextmanager
    def side_by_side(self) -> Iterator[Results]:
        """Jobs may be added inside; all have ended behind it."""
        results = Results(self._threads)
        try:
            yield results
        finally:
            results.settle()

    def close(self) -> None:
        """End the threads; waits at most CLOSE_WAIT_S for a block that is being decoded."""
        self._threads.stop(CLOSE_WAIT_S)
