"""A node in a separate process, which a test can stop, kill, and start again."""

import json
import signal
import time
import uuid
from collections.abc import Callable

from tests.hostile.nursery import Nursery, Program

PATIENCE_S = 30.0


class NodeProcess:
    """Runs `tiered_kv.tools.bench.node` with these settings, and with the same ids after `kill`. `info`: as `Node.info`.

    It is a child of `nursery`, which the fixture of this name sets.
    """

    nursery: Nursery | None = None

    def __init__(self, cluster: str | None = None, cluster_id: str | None = None, **settings: object) -> None:
        self.cluster_id = cluster_id or uuid.uuid4().hex[:8]
        self.cluster = cluster or self.cluster_id
        self.settings = {"host": "4MiB", **settings}
        self.start()

    def start(self, **settings: object) -> None:
        """Start the node, with these settings changed."""
        self.settings |= settings
        arguments = (json.dumps(self.settings), self.cluster_id, self.cluster)
        self.process = Program(self.nursery, "tiered_kv.tools.bench.node", *arguments)
        self.info = json.loads(self.process.stdout.readline())

    def stop(self) -> None:
        """Make the node hang with SIGSTOP. Returns once its running calls have ended."""
        self.process.send_signal(signal.SIGSTOP)
        self.process.wait_until_stopped()

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill the node with SIGKILL. Its files stay."""
        self.process.kill()
        self.process.close()

    def close(self) -> None:
        """Shut the node down, which removes its files. A second call does nothing."""
        if self.process.poll() is None:
            self.go_on()
        self.process.close()

    def __enter__(self) -> "NodeProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def until(condition: Callable[[], bool], what: str, within_s: float = PATIENCE_S) -> None:
    """Poll a condition of another process until it holds. Fails after `within_s`."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {within_s} s: {what}"
        time.sleep(0.02)
