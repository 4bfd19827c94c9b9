"""Running a function in a forked child, with a bound: a child that hangs is killed by its pid."""

import os
import pickle
import select
import signal
import traceback
from collections.abc import Callable
from typing import Any

CHILD_WITHIN_S = 20.0


def in_child(call: Callable[[], Any], within_s: float = CHILD_WITHIN_S) -> Any:
    """What `call` returns in a forked child of this process. Fails if it raises there, or does not end within `within_s`."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            outcome = True, call()
        except BaseException:  # noqa: BLE001 - a child that raised into pytest would go on as a second one
            outcome = False, traceback.format_exc()
        os.write(writing, pickle.dumps(outcome))
        os._exit(0)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], within_s)
        if not ready:
            os.kill(pid, signal.SIGKILL)
        with os.fdopen(os.dup(reading), "rb") as file:
            sent = file.read()
    finally:
        os.close(reading)
        os.waitpid(pid, 0)
    assert sent, f"the child did not end within {within_s} s"
    is_good, value = pickle.loads(sent)
    assert is_good, value
    return value
