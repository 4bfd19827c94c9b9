"""Asks the node what the scheduler's side must know. A thread does this, because the scheduler never waits for another process."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tiered_kv.client.page_client import PageClient
from tiered_kv.integrations.vllm.settings import log
from tiered_kv.keys import BlockKey

ANSWERS_MAX = 4096


@dataclass
class _PendingQuestion:
    keys: list[list[BlockKey]]
    until_s: float
    found: int | None = None


class Asker:
    """Asks the node which blocks other machines have, and asks it to keep promised blocks from eviction.

    A thread of its own does this. The scheduler never waits for the thread.
    """

    def __init__(self) -> None:
        self.client: PageClient | None = None
        self._questions: dict[str, _PendingQuestion] = {}
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._held_until_s: dict[BlockKey, float] = {}
        self._unanswered = 0

    def answer(self, request: str, keys: list[list[BlockKey]], wait_s: float) -> int | None:
        """Returns how many leading blocks of every list are on other nodes, or None while the node has not answered yet.

        The first call for a request asks the node. If it has not answered after `wait_s`, the result is 0.
        """
        question = self._questions.get(request)
        if question is None or question.keys[0][:1] != keys[0][:1]:
            if len(self._questions) >= ANSWERS_MAX:
                return 0
            until_s = question.until_s if question is not None else time.monotonic() + wait_s  # one wait per request in total
            question = self._questions[request] = _PendingQuestion(keys, until_s)
            self._submit(lambda: self._ask(question))
            return None
        if question.found is not None:
            return question.found
        if time.monotonic() < question.until_s:
            return None
        question.found = 0
        self._unanswered += 1
        return 0

    def hold(self, keys: list[BlockKey], seconds: float) -> None:
        """Keep blocks and their ancestors from eviction for `seconds`.

        A block that is already kept for at least half of this time is not sent to the node again.
        """
        now_s = time.monotonic()
        if len(self._held_until_s) >= ANSWERS_MAX:
            self._held_until_s = {key: until_s for key, until_s in self._held_until_s.items() if until_s > now_s}
        for key in keys:
            if seconds and self._queue.qsize() < ANSWERS_MAX and self._held_until_s.get(key, 0.0) < now_s + seconds / 2:
                self._held_until_s[key] = now_s + seconds
                self._submit(lambda key=key: self.client and self.client.hold(key, seconds))  # type: ignore[misc]

    def forget(self, request: str) -> None:
        """Forget the question of a request, and its answer."""
        self._questions.pop(request, None)

    def take_unanswered(self) -> int:
        """Returns how many questions were not answered in time since the last call."""
        count, self._unanswered = self._unanswered, 0
        return count

    def close(self) -> None:
        """Stop the thread."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def _submit(self, job: Callable[[], None]) -> None:
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._run, name="tkv-vllm-ask", daemon=True)
            thread.start()
            self._thread = thread
        self._queue.put(job)

    def _ask(self, question: _PendingQuestion) -> None:
        if self.client is not None and question.found is None:
            question.found = min(self.client.locate(keys) for keys in question.keys)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                job()
            except Exception:  # noqa: BLE001 - named boundary: later questions need the thread
                log.exception("tiered_kv: a question to the node ended with an error")
