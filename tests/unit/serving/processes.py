"""A node in a separate process, which a test can stop, kill, and start again."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable

PATIENCE_S = 30.0


class NodeProcess:
    """Runs `tiered_kv.tools.bench.node` with these settings, and with the same ids after `kill`. `info`: as `Node.info`."""

    def __init__(self, cluster: str | None = None, cluster_id: str | None = None, **settings: object) -> None:
        self.cluster_id = cluster_id or uuid.uuid4().hex[:8]
        self.cluster = cluster or self.cluster_id
        self.settings = {"host": "4MiB", **settings}
        self.start()

    def start(self, **settings: object) -> None:
        """Start the node, with these settings changed."""
        self.settings |= settings
        command = [sys.executable, "-m", "tiered_kv.tools.bench.node", json.dumps(self.settings), self.cluster_id, self.cluster]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.info = json.loads(self.process.stdout.readline())

    def stop(self) -> None:
        """Make the node hang with SIGSTOP. Returns once its running calls have ended."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill the node with SIGKILL. Its files stay."""
        self.process.kill()
        self._reap()

    def close(self) -> None:
        """Shut the node down, which removes its files. A second call does nothing."""
        if self.process.poll() is None:
            self.go_on()
            self.process.stdin.close()
        self._reap()

    def _reap(self) -> None:
        self.process.wait(PATIENCE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()

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
