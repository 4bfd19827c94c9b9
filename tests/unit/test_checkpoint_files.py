"""The identity of a model from its files: it changes with every file that an engine may load, and with nothing else."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tiered_kv import file_sums
from tiered_kv.checkpoint_files import adapter_file_digest, architecture_digest, weights_digest
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import Namespace

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "dtype": "bfloat16", "transformers_version": "5.0"}


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


def as_a_new_process():
    file_sums._known.clear()


def error_of(call, *arguments, **options):
    with pytest.raises(TieredKVError) as caught:
        call(*arguments, **options)
    assert caught.value.kind == Kind.MODEL
    return str(caught.value)


# --- which files count


def overwrite(name, content=b"other"):
    def change(model):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(content)

    return change


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


# --- content


def test_every_byte_counts_whatever_the_pieces(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    content = bytearray(os.urandom(1000))
    path.write_bytes(content)
    monkeypatch.setattr(file_sums, "PIECE_BYTES", 256)
    before = weights_digest(tmp_path)
    monkeypatch.setattr(file_sums, "READ_BYTES", 100)
    as_a_new_process()
    (tmp_path / "cache" / "file_sums" / "sums.json").unlink()
    assert weights_digest(tmp_path) == before
    seen = {before}
    for at in (0, 99, 100, 255, 256, 511, 999):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        seen.add(weights_digest(tmp_path))
    path.write_bytes(content[256:512] + content[:256] + content[512:])
    seen.add(weights_digest(tmp_path))
    path.write_bytes(content + b"\0")
    seen.add(weights_digest(tmp_path))
    path.write_bytes(b"")
    seen.add(weights_digest(tmp_path))
    assert len(seen) == 11


@pytest.mark.parametrize("in_place", [True, False])
def test_a_byte_changed_under_equal_size_and_time(model, in_place, tmp_path):
    path = model / SHARDS[0]
    before, facts = weights_digest(model), path.stat()
    content = b"X" + path.read_bytes()[1:]
    target = path if in_place else tmp_path / "fresh"
    target.write_bytes(content)
    os.utime(target, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    target.rename(path)
    assert path.stat()[6:9:2] == facts[6:9:2]  # size and modification time
    assert weights_digest(model) != before


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


# --- remembered sums


def test_a_later_process_reads_nothing(model, reads):
    before = weights_digest(model)
    assert sorted(reads) == sorted([*SHARDS, "model.safetensors.index.json"])
    reads.clear()
    as_a_new_process()
    assert weights_digest(model) == before
    (model / SHARDS[1]).touch()
    as_a_new_process()
    assert weights_digest(model) == before
    assert reads == [SHARDS[1]]


def test_a_file_that_changed_just_now_is_not_remembered(model, reads, monkeypatch):
    monkeypatch.setattr(file_sums, "SETTLED_S", 3600)
    before = weights_digest(model)
    assert weights_digest(model) == before
    assert len(reads) == 6


def test_a_modification_time_in_the_future_does_not_matter(model, reads):
    for path in model.iterdir():
        os.utime(path, (2**33, 2**33))
    weights_digest(model)
    weights_digest(model)
    assert len(reads) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(os.urandom(1000)),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"format": 1}'),
        lambda path: path.write_text('{"format": 1, "sums": 7}'),
        lambda path: path.write_text('{"format": 1, "sums": [7, [], ["x", false, 1, 2, 3, 4, 5, 6], [1, false, 1, 2, 3, 4, 5, "x"]]}'),
        lambda path: path.write_text(path.read_text().replace('"format": 1', '"format": 0')),
        lambda path: path.write_text("[" * 100000),
        lambda path: path.write_bytes(b" " * (file_sums.SUMS_BYTES_MAX + 1)),
        lambda path: path.chmod(0o666),
        lambda path: path.unlink(),
    ],
)
def test_a_damaged_memory_is_ignored_and_replaced(model, own_cache, reads, damage):
    before = weights_digest(model)
    damage(own_cache / "sums.json")
    for expected in (6, 6):
        as_a_new_process()
        assert weights_digest(model) == before
        assert len(reads) == expected


@pytest.mark.parametrize("name", ["", "sums.json", "sums.lock", "reading"])
def test_without_a_usable_folder_files_are_read(model, own_cache, reads, name, caplog):
    own_cache.parent.mkdir()
    if not name:
        own_cache.write_text("a file where the folder should be")
    elif name == "reading":
        for number in range(file_sums.LOCKS):
            (own_cache / f"reading-{number:02}.lock").mkdir(parents=True)
    else:
        (own_cache / name).mkdir(parents=True)
    before = weights_digest(model)
    assert weights_digest(model) == before
    assert len(reads) == 3
    assert ("cannot be remembered" in caplog.text) == (name in ("", "sums.json"))


def test_few_sums_are_remembered(tmp_path, own_cache, monkeypatch):
    monkeypatch.setattr(file_sums, "SUMS_MAX", 3)
    paths = [tmp_path / f"{number}.gguf" for number in range(5)]
    for path in paths:
        path.write_text(path.name)
        weights_digest(path)
        assert len(file_sums._known) <= 3
    assert [Path(state.path) for state in file_sums.SumStore(own_cache).load()] == paths[2:]
    monkeypatch.setattr(file_sums, "SUMS_BYTES_MAX", 400)
    weights_digest(tmp_path)
    as_a_new_process()
    assert len(file_sums.SumStore(own_cache).load()) <= 3
    assert (own_cache / "sums.json").stat().st_size <= 400


@pytest.mark.parametrize("save_s", [0, 5])
def test_sums_are_saved_while_others_are_read_and_after_an_error(model, monkeypatch, own_cache, save_s):
    monkeypatch.setattr(file_sums, "SAVE_S", save_s)
    plain, saved = file_sums._piece_sum, []

    def spy(state, start, nbytes):
        if Path(state.path).name == SHARDS[1]:
            saved.extend(file_sums.SumStore(own_cache).load())
            raise OSError(5, "Input/output error")
        return plain(state, start, nbytes)

    monkeypatch.setattr(file_sums, "_piece_sum", spy)
    assert error_of(weights_digest, model) == f"{model / SHARDS[1]}: cannot be read (Input/output error)"
    assert len(saved) == (0 if save_s else 1)
    assert [Path(state.path).name for state in file_sums.SumStore(own_cache).load()] == [SHARDS[0]]


def test_a_folder_of_ones_own(model, tmp_path, own_cache):
    assert weights_digest(model, cache=tmp_path / "mine") == weights_digest(model)
    assert (tmp_path / "mine" / "sums.json").stat().st_mode & 0o777 == 0o600
    assert not own_cache.exists()


READER = """
import sys, time
from pathlib import Path
from tiered_kv import checkpoint_files, file_sums
model, events, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
file_sums.SETTLED_S = 0
plain = file_sums._piece_sum

def until(event):
    deadline_s = time.monotonic() + 60
    while not (events / event).exists() and time.monotonic() < deadline_s:
        time.sleep(0.01)

def spy(state, start, nbytes):
    with (events / "reads").open("a") as file:
        file.write(name)
    (events / "reading").touch()
    until("waiting")
    return plain(state, start, nbytes)

def progress(line):
    assert line.startswith("waiting for another process"), line
    (events / "waiting").touch()

file_sums._piece_sum = spy
if name == "b":
    until("reading")
print(checkpoint_files.weights_digest(model, progress=progress))
"""


def test_of_two_processes_one_reads(model, tmp_path):
    events = tmp_path / "events"
    events.mkdir()
    both = [
        subprocess.Popen([sys.executable, "-c", READER, str(model), str(events), name], stdout=subprocess.PIPE, text=True) for name in "ab"
    ]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs == [weights_digest(model) + "\n"] * 2
    assert (events / "reads").read_text() == "aaa"


def test_waiting_has_an_end(model, own_cache, monkeypatch):
    monkeypatch.setattr(file_sums, "READ_WAIT_S", 0)
    monkeypatch.setattr(file_sums, "WRITE_WAIT_S", 0)
    own_cache.mkdir(parents=True)
    before = weights_digest(model)
    (own_cache / "sums.json").unlink()
    as_a_new_process()
    with file_sums._locked(own_cache / "sums.lock", 0):
        for number in range(file_sums.LOCKS):
            (own_cache / f"reading-{number:02}.lock").touch()
        states = [
            file_sums.state_of(str(path), False) for path in model.iterdir() if path.name in (*SHARDS, "model.safetensors.index.json")
        ]
        with file_sums.SumStore(own_cache).turn(min(states), print):
            assert weights_digest(model) == before


def test_lines_tell_how_far_reading_is(model, monkeypatch):
    """The last piece is read only when a line says that the ones before it are done."""
    monkeypatch.setattr(file_sums, "REPORT_S", 0.01)
    monkeypatch.setattr(file_sums, "PIECE_BYTES", 1000)
    monkeypatch.setattr(file_sums, "THREADS_MAX", 1)
    path, plain, is_told, lines = model / SHARDS[0], file_sums._piece_sum, threading.Event(), []
    path.write_bytes(bytes(4000))

    def hold(state, start, nbytes):
        assert start < 3000 or is_told.wait(60)
        return plain(state, start, nbytes)

    def progress(line):
        lines.append(line)
        if line.startswith("reading the model's files: 3.0 of 7.2 GB"):
            is_told.set()

    monkeypatch.setattr(file_sums, "GB", 1000)
    monkeypatch.setattr(file_sums, "_piece_sum", hold)
    weights_digest(path, progress=progress)
    assert is_told.is_set(), lines


def test_a_file_that_changes_while_it_is_read(model, monkeypatch):
    plain, path = file_sums._piece_sum, model / SHARDS[0]
    times = [1]

    def change(state, start, nbytes):
        found = plain(state, start, nbytes)
        if Path(state.path) == path and times[0]:
            times[0] -= 1
            with path.open("ab") as file:
                file.write(b"more")
        return found

    monkeypatch.setattr(file_sums, "_piece_sum", change)
    once = weights_digest(model)
    as_a_new_process()
    assert weights_digest(model) == once
    path.write_bytes(b"other")
    times[0] = 100
    assert error_of(weights_digest, model) == f"{path}: changed while it was read, 3 times"


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
