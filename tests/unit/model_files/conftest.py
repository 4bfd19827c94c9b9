"""A model's folder, a cache folder of the test's own, and a spy on what is read."""

import json
from pathlib import Path

import pytest

from tests.unit.model_files.files import CONFIG, SHARDS
from tiered_kv import file_sums


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, nothing known yet, and files that count as settled at once."""
    monkeypatch.setenv("TIERED_KV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_sums, "SETTLED_S", 0)
    file_sums._known.clear()
    yield tmp_path / "cache" / "file_sums"
    file_sums._known.clear()


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in SHARDS:
        (folder / name).write_bytes(name.encode() * 100)
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def reads(monkeypatch):
    """The names of the files of which a piece is read, in order."""
    names = []
    plain = file_sums._piece_sum

    def spy(state, start, nbytes):
        names.append(Path(state.path).name)
        return plain(state, start, nbytes)

    monkeypatch.setattr(file_sums, "_piece_sum", spy)
    return names
