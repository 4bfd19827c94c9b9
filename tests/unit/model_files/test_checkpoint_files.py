"""The identity of a model from its files: it changes with every file that an engine may load, and with nothing else."""

import json
import os

import pytest

from tests.unit.model_files.files import CONFIG, SHARDS, as_a_new_process, error_of, overwrite
from tiered_kv import file_sums
from tiered_kv.checkpoint_files import adapter_file_digest, architecture_digest, weights_digest
from tiered_kv.errors import TieredKVError
from tiered_kv.keys import Namespace

# --- which files count


def rename(model):
    (model / SHARDS[1]).rename(model / "model-00003-of-00003.safetensors")


def swap(model):
    (model / SHARDS[0]).rename(model / "aside")
    (model / SHARDS[1]).rename(model / SHARDS[0])
    (model / "aside").rename(model / SHARDS[1])


@pytest.mark.parametrize(
    "change",
    [
        overwrite(SHARDS[0]),
        rename,
        swap,
        overwrite("model-00003-of-00003.safetensors"),
        overwrite("pytorch_model.bin"),
        overwrite("consolidated.safetensors"),
        overwrite("model.tensors"),
        overwrite("whisper/model.safetensors"),
        overwrite("model.safetensors.index.json", b'{"weight_map": {}}'),
        overwrite("hf_quant_config.json"),
        overwrite("quantize_config.json"),
        overwrite("params.json"),
        overwrite("modeling_own.py"),
        overwrite("config.json", json.dumps(CONFIG | {"hidden_size": 9}).encode()),
        overwrite("config.json", json.dumps(CONFIG | {"architectures": ["Other"]}).encode()),
        overwrite("config.json", json.dumps(CONFIG | {"dtype": "float16"}).encode()),
    ],
)
def test_what_changes_the_weights_changes_the_digest(model, change):
    before = weights_digest(model)
    change(model)
    assert weights_digest(model) != before


@pytest.mark.parametrize(
    "change",
    [
        overwrite("tokenizer.json"),
        overwrite("tokenizer_config.json"),
        overwrite("generation_config.json"),
        overwrite("README.md"),
        overwrite("optimizer.pt"),
        overwrite("training_args.bin"),
        overwrite("._model.safetensors"),
        overwrite(".cache/model.safetensors"),
        overwrite("original/consolidated.00.pth"),
        overwrite("checkpoint-500/model.safetensors"),
        overwrite("config.json", json.dumps(CONFIG | {"transformers_version": "6.0"}, indent=3).encode()),
    ],
)
def test_what_does_not_change_the_weights_leaves_the_digest(model, change):
    before = weights_digest(model)
    change(model)
    assert weights_digest(model) == before


def test_the_digest_does_not_depend_on_the_folder(model, tmp_path):
    before = weights_digest(model)
    assert weights_digest(model.rename(tmp_path / "elsewhere")) == before
    assert weights_digest(str(tmp_path / "elsewhere") + "/") == before


def test_an_older_state_is_the_model_where_its_folder_is_given(model):
    overwrite("checkpoint-500/model.safetensors")(model)
    assert weights_digest(model / "checkpoint-500") != weights_digest(model)


def test_other_formats_are_left_out_of_the_models_own_folder_only(model):
    overwrite("whisper/model.safetensors")(model)
    before = weights_digest(model)
    (model / "whisper" / "original").mkdir()
    overwrite("whisper/original/model.pth")(model)
    assert weights_digest(model) != before


def test_only_metas_format(tmp_path):
    overwrite("original/consolidated.00.pth", b"a")(tmp_path)
    before = weights_digest(tmp_path)
    overwrite("original/consolidated.00.pth", b"b")(tmp_path)
    assert weights_digest(tmp_path) != before


def test_folders_that_link_to_each_other_are_read_once(model, reads):
    (model / "sub").mkdir()
    (model / "sub" / "up").symlink_to(model)
    weights_digest(model)
    assert len(reads) == len(set(reads)) == 3


def test_a_single_file_counts_with_its_parts_and_its_folders_settings(tmp_path):
    single, parts = tmp_path / "model.gguf", [tmp_path / f"big-0000{number}-of-00002.gguf" for number in (1, 2)]
    for path in (single, *parts):
        path.write_bytes(path.name.encode())
    before = weights_digest(single), weights_digest(parts[0])
    parts[1].write_bytes(b"other")
    after = weights_digest(single), weights_digest(parts[0])
    assert after[0] == before[0] != after[1] != before[1]
    for name in ("config.json", "mmproj-f16.gguf"):
        (tmp_path / name).write_text("{}")
        before, after = after, (weights_digest(single), weights_digest(parts[0]))
        assert before[0] != after[0] and before[1] != after[1]
    single.write_bytes(b"other")
    assert weights_digest(single) != after[0]


# --- hub caches


def hub_snapshot(tmp_path, name="a" * 64, content=b"weights" * 1000):
    repo = tmp_path / "models--owner--name"
    (repo / "snapshots" / "rev").mkdir(parents=True)
    (repo / "blobs").mkdir()
    small = "b" * 40
    for blob, link, data in [(name, "model.safetensors", content), (small, "config.json", json.dumps(CONFIG).encode())]:
        (repo / "blobs" / blob).write_bytes(data)
        (repo / "snapshots" / "rev" / link).symlink_to(f"../../blobs/{blob}")
    return repo / "snapshots" / "rev"


@pytest.fixture
def few_samples(monkeypatch):
    monkeypatch.setattr(file_sums, "SAMPLES", 4)
    monkeypatch.setattr(file_sums, "SAMPLE_BYTES", 10)


def test_a_hub_snapshot_is_named_by_its_hash_and_hardly_read(tmp_path, reads, few_samples):
    first = weights_digest(hub_snapshot(tmp_path / "a"))
    assert len(reads) == 4
    assert weights_digest(hub_snapshot(tmp_path / "b")) == first
    assert weights_digest(hub_snapshot(tmp_path / "c", name="c" * 64)) != first


@pytest.mark.parametrize("at", [0, 6999])
def test_a_blob_that_was_written_to_is_another_one(tmp_path, few_samples, at):
    snapshot = hub_snapshot(tmp_path)
    before = weights_digest(snapshot)
    with (snapshot / "model.safetensors").open("r+b") as file:
        file.seek(at)
        file.write(b"X")
    assert weights_digest(snapshot) != before


def test_a_copy_of_a_snapshot_is_read_whole(tmp_path, few_samples, reads):
    """A decision: they do not share blocks, because a copy's sha256 would cost several times what its sum costs."""
    snapshot = hub_snapshot(tmp_path)
    (tmp_path / "copy").mkdir()
    for path in snapshot.iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    hub, copy = weights_digest(snapshot), weights_digest(tmp_path / "copy")
    assert hub != copy
    assert len(reads) == 4 + 1


def test_a_shared_blob_store_names_blobs_by_another_hash(tmp_path, few_samples):
    """Newer hub caches link the blob of a repository to a store of all repositories, named by a hash that is no sha256."""
    plain = weights_digest(hub_snapshot(tmp_path / "a"))
    snapshot = hub_snapshot(tmp_path / "b")
    blob = snapshot / "../../blobs" / ("a" * 64)
    (tmp_path / "blobs" / "dd").mkdir(parents=True)
    blob.rename(tmp_path / "blobs" / "dd" / ("d" * 64))
    blob.symlink_to(tmp_path / "blobs" / "dd" / ("d" * 64))
    assert weights_digest(snapshot) == plain


def test_a_link_elsewhere_to_a_file_named_like_a_hash_is_read_whole(tmp_path, few_samples, reads):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / ("a" * 64)).write_bytes(b"weights" * 1000)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "blobs" / ("a" * 64))
    weights_digest(tmp_path / "model")
    assert len(reads) == 1


# --- errors


def test_errors_name_what_is_wrong(tmp_path):
    assert "no such folder" in error_of(weights_digest, tmp_path / "none")
    assert "no such folder" in error_of(Namespace.of_checkpoint, "owner/name")
    assert "has no files with weights" in error_of(weights_digest, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "optimizer.pt").write_text("{}")
    assert "has no files with weights" in error_of(Namespace.of_checkpoint, tmp_path)
    link = tmp_path / "model.safetensors"
    link.symlink_to(tmp_path / "missing")
    assert error_of(weights_digest, tmp_path) == f"{link}: cannot be read (No such file or directory)"
    link.unlink()
    os.mkfifo(link)
    assert error_of(weights_digest, tmp_path) == f"{link}: must be a regular file"
    link.unlink()
    link.write_text("weights")
    (tmp_path / "config.json").write_text("{")
    assert f"{tmp_path / 'config.json'}: must be JSON" in error_of(weights_digest, tmp_path)
    assert f"{tmp_path / 'config.json'}: must be JSON" in error_of(architecture_digest, tmp_path)


def test_a_folder_that_cannot_be_listed(model, monkeypatch):
    def refuse(top, followlinks, onerror):
        onerror(PermissionError(13, "Permission denied", "/model/sub"))

    monkeypatch.setattr(os, "walk", refuse)
    assert error_of(weights_digest, model) == "/model/sub: cannot be read (Permission denied)"


# --- adapters


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"adapter")
    (folder / "adapter_config.json").write_text('{"r": 8}')
    return folder


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "new_embeddings.safetensors", "adapter_model.bin"])
def test_an_adapter_changed_in_place_is_another_one(adapter, name):
    before = adapter_file_digest(adapter)
    overwrite(name)(adapter)
    assert adapter_file_digest(adapter) != before


def test_other_files_of_an_adapter_do_not_count(adapter, tmp_path, reads):
    before = adapter_file_digest(adapter)
    for name in ("README.md", "optimizer.pt", "tokenizer.json", "checkpoint-5/adapter_model.safetensors"):
        overwrite(name)(adapter)
    assert adapter_file_digest(str(adapter)) == before
    as_a_new_process()
    assert adapter_file_digest(adapter) == before
    assert len(reads) == 2
    assert adapter_file_digest(adapter.rename(tmp_path / "elsewhere")) == before


def test_errors_of_adapters(adapter, tmp_path):
    assert "cannot be read (No such file or directory)" in error_of(adapter_file_digest, tmp_path / "none")
    (adapter / "adapter_model.safetensors").unlink()
    assert "has no weights of an adapter" in error_of(adapter_file_digest, adapter)


# --- namespaces


def test_the_namespace_of_a_checkpoint(model):
    namespace = Namespace.of_checkpoint(model, tenant="t", rank=1, world=2, epoch=3, settings={"dtype": "auto"})
    assert namespace.weights == weights_digest(model)
    assert namespace.architecture == architecture_digest(model, {"dtype": "auto"})
    assert (namespace.tenant, namespace.rank, namespace.world, namespace.epoch) == ("t", 1, 2, 3)
    assert Namespace.of_checkpoint(str(model)) == Namespace.of_checkpoint(model, settings={})


def test_settings_and_config_make_the_architecture(model):
    digests = {architecture_digest(model, settings) for settings in (None, {"dtype": "auto"}, {"dtype": "float16"}, {"rope": {"theta": 1}})}
    (model / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 5}))
    digests.add(architecture_digest(model))
    (model / "config.json").unlink()
    digests.add(architecture_digest(model))
    digests.add(architecture_digest(model / SHARDS[0], {"x": 1}))
    assert len(digests) == 7
    with pytest.raises(TieredKVError, match="settings: must be a mapping, got list"):
        Namespace.of_checkpoint(model, settings=[1])
