"""One OpenAI server of vLLM with the connector, as a process of its own: starts it, sends it prompts, reads its metrics, and stops it."""

import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tiered_kv.errors import Kind, TieredKVError

HOST = "127.0.0.1"
START_WITHIN_S = 900.0
ANSWER_WITHIN_S = 900.0
STOP_WITHIN_S = 10.0
LOG_LINES_SHOWN = 15
CPU_KV_GIB = "1"
"""vLLM's own KV cache of one server on a CPU. On a GPU the servers share `GPU_SHARE` of its memory."""
GPU_SHARE = 0.85
_SAMPLE = re.compile(r"^(vllm:\w+?)(?:\{(.*)\})? ([^ ]+)$")
_SHARES = re.compile(r"tiered_kv shares blocks of (\d+) tokens and (\d+) bytes")
_ERROR = re.compile(r"(Error|error|refused|cannot)\b")


class Completion(NamedTuple):
    """The new tokens of one request, their text, and the seconds from the request to the first token."""

    token_ids: list[int]
    text: str
    ttft_s: float


def check_installed() -> None:
    """Raise (kind `config`) if this Python has no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        message = "--engine vllm: vLLM must be installed in the Python environment of tiered_kv; see docs/vllm.md, or run make demo-vllm"
        raise TieredKVError(Kind.CONFIG, message, setting="engine")


def transfer_config(cluster: str, **extra: Any) -> str:
    """Returns the value of vLLM's `--kv-transfer-config` for a cluster. `extra`: more entries of `kv_connector_extra_config`."""
    return json.dumps(
        {
            "kv_connector": "TieredKV",
            "kv_connector_module_path": "tiered_kv.integrations.vllm.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"cluster": cluster, **extra},
        }
    )


class VllmServer:
    """The process of one server, which the constructor starts. `wait` ends when the server can answer.

    `options`: more arguments of vLLM's server. `servers`: how many servers share a GPU's memory. The server's log is written to the
    folder `logs`.
    """

    def __init__(self, name: str, model: str, transfer: str, logs: Path, options: Sequence[str] = (), servers: int = 1) -> None:
        self.name, self._log = name, logs / f"vllm-{name}.log"
        self.port = _free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", HOST, "--port", str(self.port)]
        command += ["--model", model, "--served-model-name", "demo", "--enforce-eager", "--generation-config", "vllm"]
        command += ["--kv-transfer-config", transfer, *_memory_options(servers), *options]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(), start_new_session=True
            )

    def wait(self, within_s: float = START_WITHIN_S) -> Iterator[float]:
        """Yields the seconds waited, about once a second, until the server answers.

        Raises (kind `model`) with the end of the log if the process ends, or does not answer within `within_s`.
        """
        begun_s = time.monotonic()
        while not self._is_ready():
            waited_s = time.monotonic() - begun_s
            if self.process.poll() is not None or waited_s > within_s:
                ended = f"ended with status {self.process.returncode}" if self.process.poll() is not None else "is not ready"
                raise TieredKVError(Kind.MODEL, f"vLLM server {self.name} {ended} after {waited_s:.0f} s; its log ends:\n{self.log_end()}")
            yield waited_s
            time.sleep(1.0)

    def ask(self, prompt: Sequence[int] | str, new_tokens: int, salt: str | None = None) -> Completion:
        """Complete a prompt greedily. `salt`: only requests with the same salt share KV. Raises (kind `model`) if the request fails."""
        body = {"model": "demo", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True, "return_token_ids": True}
        if salt is not None:
            body["cache_salt"] = salt
        begun_s, first_s, ids, text = time.perf_counter(), 0.0, list[int](), ""
        try:
            for event in self._events(json.dumps(body)):
                if "error" in event:
                    raise TieredKVError(Kind.MODEL, f"vLLM server {self.name} failed a request: {event['error']}")
                for choice in event.get("choices", ()):
                    new = choice.get("token_ids") or []
                    first_s = first_s or (time.perf_counter() - begun_s if new else 0.0)
                    ids += new
                    text += choice.get("text") or ""
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise TieredKVError(
                Kind.MODEL, f"vLLM server {self.name} did not answer ({error!r}); its log ends:\n{self.log_end()}"
            ) from error
        return Completion(ids, text, first_s)

    def metrics(self) -> dict[str, float]:
        """Returns vLLM's metrics by name. Samples with a label `source` or `tier` are summed under `name:value`, with its value."""
        found: dict[str, float] = {}
        for line in self._get("/metrics").decode().splitlines():
            sample = _SAMPLE.match(line)
            if sample is None:
                continue
            name, labels = sample[1].removesuffix("_total"), sample[2] or ""
            kind = re.search(r'(?:source|tier)="([^"]*)"', labels)
            key = f"{name}:{kind[1]}" if kind else name
            found[key] = found.get(key, 0.0) + float(sample[3])
        return found

    def block(self) -> tuple[int, int] | None:
        """Returns the size of one block that the connector shares, as (tokens, bytes), from the server's log.

        Returns None if the log has no such line, as without the connector.
        """
        found = _SHARES.search(self._log.read_text(errors="replace"))
        return (int(found[1]), int(found[2])) if found else None

    def log_end(self, lines: int = LOG_LINES_SHOWN) -> str:
        """Returns the last `lines` lines of the log, preceded by up to three earlier lines that name an error."""
        with suppress(OSError):
            written = self._log.read_text(errors="replace").splitlines()
            errors = [line for line in written[:-lines] if _ERROR.search(line)]
            return "\n".join([*errors[-3:], *written[-lines:]])
        return "(no log)"

    def signal(self, number: int) -> None:
        """Send a signal to all processes of the server, also to those that still run after the first one has ended."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _is_ready(self) -> bool:
        with suppress(OSError, http.client.HTTPException, TieredKVError):
            self._get("/health", within_s=5.0)
            return True
        return False

    def _get(self, path: str, within_s: float = 30.0) -> bytes:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=within_s)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
            if response.status != 200:
                raise TieredKVError(Kind.MODEL, f"vLLM server {self.name} answered {path} with status {response.status}")
            return body
        finally:
            connection.close()

    def _events(self, body: str) -> Iterator[dict[str, Any]]:
        """Yields the events of a streamed completion. `body`: the request as JSON."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=ANSWER_WITHIN_S)
        try:
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                said = response.read(2000).decode(errors="replace")
                raise TieredKVError(Kind.MODEL, f"vLLM server {self.name} refused a request with status {response.status}: {said}")
            for line in response:
                data = line.strip().removeprefix(b"data: ")
                if line.startswith(b"data: ") and data != b"[DONE]":
                    yield json.loads(data)
        finally:
            connection.close()


def stop(servers: Sequence[VllmServer]) -> None:
    """End servers with all their processes: send SIGTERM to all of them, and SIGKILL to those left after STOP_WITHIN_S."""
    for server in servers:
        server.signal(signal.SIGTERM)
    deadline_s = time.monotonic() + STOP_WITHIN_S
    for server in servers:
        with suppress(subprocess.TimeoutExpired):
            server.process.wait(max(deadline_s - time.monotonic(), 0.0))
    for server in servers:
        server.signal(signal.SIGKILL)
        server.process.wait()


def _environment() -> Mapping[str, str]:
    """Returns the environment of a server: that of this process, with defaults for a small machine where a variable is not set."""
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": CPU_KV_GIB, "VLLM_HOST_IP": HOST}
    return {**defaults, **os.environ}


def _memory_options(servers: int) -> list[str]:
    import torch

    return ["--gpu-memory-utilization", f"{GPU_SHARE / servers:.2f}"] if torch.cuda.is_available() else []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
