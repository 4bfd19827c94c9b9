"""Tests of the Triton kernels: equal to torch in the interpreter, used only where they run, faster than torch on a GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.sources import ROOT
from tests.unit.codecs.kv import as_bytes, kv_of
from tiered_kv.codecs import codec_for, integer
from tiered_kv.codecs.integer import kernels_of
from tiered_kv.codecs.rotation import rope_of_theta
from tiered_kv.layout import KVLayout

CASES = Path(__file__).with_name("kernel_cases.py")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs the extra `triton`")


@needs_triton
def test_kernels_decode_as_torch_does() -> None:
    """Runs in a separate process, because Triton decides on its interpreter when it is imported."""
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def test_on_a_cpu_torch_decodes() -> None:
    assert kernels_of(torch.device("cpu")) is None


def test_without_triton_torch_decodes_on_gpus_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiered_kv.codecs.kernels", None)  # makes the import fail
    monkeypatch.delattr("tiered_kv.codecs.kernels", raising=False)
    assert kernels_of.__wrapped__(torch.device("cuda", 0)) is None


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_kernels_decode_faster_than_torch_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch, record_property) -> None:
    layout = KVLayout(32, 8, 128, "bfloat16", 64)
    codec = codec_for(name, layout, rope=rope_of_theta(5e5, 128)).at(64)
    payload, out = codec.encode(as_bytes(kv_of(layout))).payload, torch.empty(layout.block_shape, dtype=torch.bfloat16, device="cuda")
    took_ms = {}
    for path, chosen in (("triton", kernels_of(out.device)), ("torch", None)):
        monkeypatch.setattr(integer, "kernels_of", lambda device, chosen=chosen: chosen)
        codec.decode_kv(payload, out)
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        for _ in range(20):
            codec.decode_kv(payload, out)
        ended.record()
        ended.synchronize()
        took_ms[path] = begun.elapsed_time(ended) / 20
        record_property(f"{path}_ms", took_ms[path])
    assert took_ms["triton"] < took_ms["torch"]
