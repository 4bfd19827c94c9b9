"""Threads that decode a fetch's blocks in parallel, each block on one thread, straight into the tensor of the fetch.

torch would use several threads for one block. On a busy machine these wait for each other, and a fetch takes many times as long
(measured: 0.05 s became 2.7 s for 16 blocks of 1.5 MB).
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager

from tiered_kv.threads import DaemonThreads, work_alone

THREADS_MAX = 4
CLOSE_WAIT_S = 0.1
"""How long `close` waits for the blocks that are being decoded. One takes milliseconds."""


class Results:
    """The decoding jobs of one fetch and their outcomes, in the order in which the jobs were added."""

    def __init__(self, threads: DaemonThreads) -> None:
        self._threads = threads
        self._jobs: list[Future[bool]] = []
        self.leading = 0
        """How many leading jobs returned True; known once all jobs have ended."""

    def add(self, job: Callable[..., bool], *arguments: object) -> None:
        """Queue a job."""
        self._jobs.append(self._threads.submit(job, *arguments))

    def settle(self) -> None:
        """Wait for the jobs, in order, until one has failed. Then cancel those that have not begun, and wait for the running ones.

        Afterwards no job writes to the tensor of the fetch.
        """
        try:
            while self.leading < len(self._jobs) and self._jobs[self.leading].result():
                self.leading += 1
        finally:
            for job in self._jobs:
                job.cancel()
            wait(self._jobs)


class Decoders:
    """A pool of decoding threads, each started when it is first needed."""

    def __init__(self) -> None:
        threads = min(THREADS_MAX, os.cpu_count() or 1)
        self._threads = DaemonThreads(threads, "tkv-decode", work_alone)

    @contextmanager
    def side_by_side(self) -> Iterator[Results]:
        """Yields a `Results`: jobs added to it run in parallel. When the context exits, all jobs have ended."""
        results = Results(self._threads)
        try:
            yield results
        finally:
            results.settle()

    def close(self) -> None:
        """End the threads. Waits at most CLOSE_WAIT_S for blocks that are being decoded."""
        self._threads.stop(CLOSE_WAIT_S)
