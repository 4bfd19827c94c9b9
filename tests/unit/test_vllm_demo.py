"""The demo with vLLM, as far as it needs no vLLM: what it reads from a server's metrics and log, and the figures it makes of them."""

import http.server
import importlib.util
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tiered_kv.cluster.commands.cli import main, parser
from tiered_kv.errors import TieredKVError
from tiered_kv.tools.demo import vllm_demo
from tiered_kv.tools.demo.vllm_server import Completion, VllmServer, check_installed, transfer_config

METRICS = """# HELP vllm:prefix_cache_hits_total Prefix cache hits, in terms of number of cached tokens.
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="demo"} 128.0
vllm:external_prefix_cache_hits_total{engine="0",model_name="demo"} 640.0
vllm:tiered_kv_loaded_blocks_by_tier_total{engine="0",model_name="demo",tier="host"} 3.0
vllm:tiered_kv_loaded_blocks_by_tier_total{engine="0",model_name="demo",tier="peer"} 2.0
vllm:tiered_kv_stored_blocks_total{engine="0",model_name="demo"} 1.0
process_open_fds 3.0
"""
LOG = "(Worker pid=7) INFO 11-30 08:33:01 [worker.py:70] tiered_kv shares blocks of 128 tokens and 2949120 bytes of vllm 0.32.0 CPU_ATTN\n"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as vLLM's server does. `bodies`: the completions asked for. `status`: of the next completion."""

    bodies: list[dict] = []
    status = 200

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(METRICS.encode())

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.status)
        self.end_headers()
        for ids, text in (([], ""), ([5], " a"), ([6, 7], " b")):
            self.wfile.write(f"data: {json.dumps({'choices': [{'token_ids': ids, 'text': text}]})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[VllmServer]:
    """Yields a server object whose process is left out: its port is that of a server in this process."""
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever, args=(0.01,))
    thread.start()
    made = VllmServer.__new__(VllmServer)
    made.name, made.port, made._log = "A", web.server_port, tmp_path / "log"
    made._log.write_text(LOG)
    Handler.bodies, Handler.status = [], 200
    try:
        yield made
    finally:
        web.shutdown()
        web.server_close()
        thread.join()


def test_metrics_are_read_by_name_and_label(server: VllmServer) -> None:
    counts = server.metrics()
    assert counts["vllm:prefix_cache_hits"] == 128
    assert counts["vllm:tiered_kv_loaded_blocks_by_tier:peer"] == 2
    assert not any("process" in name for name in counts)


def test_an_answer_has_the_tokens_and_the_text(server: VllmServer) -> None:
    answer = server.ask([1, 2], 3, salt="s")
    assert answer[:2] == ([5, 6, 7], " a b")
    assert answer.ttft_s > 0
    assert Handler.bodies[0]["cache_salt"] == "s"
    assert Handler.bodies[0]["prompt"] == [1, 2]


def test_a_refused_request_is_an_error_with_the_servers_words(server: VllmServer) -> None:
    Handler.status = 400
    with pytest.raises(TieredKVError, match="status 400"):
        server.ask([1], 3)


def test_the_size_of_a_block_is_in_the_log(server: VllmServer) -> None:
    assert server.block() == (128, 2949120)
    server._log.write_text("tiered_kv is off for this engine: …\n")
    assert server.block() is None
    with pytest.raises(TieredKVError, match="does not use tiered_kv"):
        vllm_demo._about(server)


def test_a_record_splits_the_reused_tokens_by_tier(server: VllmServer) -> None:
    counts = vllm_demo._counts({}, server.metrics())
    record = vllm_demo._record("A", list(range(800)), Completion([1], "x", 0.5), counts)
    assert record["reused_tokens_by_tier"] == {"vllm": 128, "host": 384, "peer": 256}
    assert (record["reused_tokens"], record["computed_prompt_tokens"]) == (768, 32)
    assert record["stored_blocks"]["new"] == 1


def test_the_tables_show_every_request() -> None:
    base = {
        "document": "d",
        "prompt_tokens": 800,
        "ttft_s": 0.5,
        "in_process_ttft_s": 0.4,
        "plain_ttft_s": 2.0,
        "stored_blocks": {"new": 1},
    }
    texts = {"output_ids": [1], "reference_ids": [2], "output_text": "x", "reference_text": "y"}
    requests = [
        {**base, **texts, "replica": "A", "reused_tokens_by_tier": {}, "equal": True},
        {**base, **texts, "replica": "B", "reused_tokens_by_tier": {"vllm": 128, "host": 512}, "equal": False},
    ]
    replicas = [{"replica": name, "prompt_tokens": 800, "reused_tokens_by_tier": {"host": 512} if name == "B" else {}} for name in "AB"]
    result = {"requests": requests, "replicas": replicas, "reused_tokens": 640, "prompt_tokens": 1600, "token_hit_ratio": 0.4, "equal": 1}
    result |= {"all_equal": False, "passed": False, "dtype": "float32", "reference": "a cold run"}
    console = Console(record=True, width=140, quiet=False)
    vllm_demo.show(result, console)
    text = console.export_text()
    assert "host 512" in text
    assert "4.0 × longer" in text
    assert "d: differs from new token 1 on" in text
    assert "1 of 2 are token for token equal" in text


def test_without_vllm_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TieredKVError, match="make demo-vllm"):
        check_installed()
    assert main(["demo", "--engine", "vllm"]) == 2
    assert "docs/vllm.md" in capsys.readouterr().out


def test_the_connector_gets_the_cluster_and_the_node() -> None:
    transfer = json.loads(transfer_config("demo-1", node="node-1"))
    assert transfer["kv_connector_extra_config"] == {"cluster": "demo-1", "node": "node-1"}
    assert transfer["kv_load_failure_policy"] == "recompute"
    assert parser().parse_args(["demo"]).engine == "transformers"
