"""The identity of a model from the files of its checkpoint, for engines that show no model object, such as vLLM.

A digest covers every file that an engine may load or that changes what the weights mean: it is better to read too many files, which
costs a miss, than too few, which gives another model's KV. So all formats in a folder count, subfolders too, and code (`*.py`), which
`trust_remote_code` runs. Left out are tokenizers, texts, `generation_config.json`, a trainer's states, hidden files, and, in a folder
that has weights itself, the subfolders `original`, `metal`, `checkpoint-N` and `global_stepN`, which hold the model in another format or
as it was earlier.

A snapshot in a Hugging Face hub cache links to files that are named by the sha256 of their content. Of these only the name, the size and
4 MiB in 64 samples are read, in case somebody has written to the file since. So a hub snapshot and a copy of it in a plain folder do not
share blocks: that would need the sha256 of all files.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.file_sums import Progress, naming, sums_of
from tiered_kv.identity import NOT_IDENTITY, plain, text_digest

WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".tensors", ".npy", ".npz"})
MEANING = frozenset({".json", ".py"})
NOT_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"})
"""Files of a training run that are named like weights. vLLM does not load them either."""
NOT_MEANING = frozenset(
    {
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "tekken.json"),
        *("chat_template.json", "generation_config.json", "trainer_state.json"),
        *("all_results.json", "train_results.json", "eval_results.json"),
    }
)
_OTHER_FOLDERS = re.compile(r"original|metal|checkpoint-\d+|global_step\d+")
_SPLIT = re.compile(r"(.*)-\d{5}-of-(\d{5})(\.\w+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ADAPTER = re.compile(r"adapter_config\.json|(adapter_|new_embeddings).*")
# For a checkpoint no class and no loaded model says these, so its config does.
_NOT_IDENTITY = tuple(name for name in NOT_IDENTITY if name not in ("architectures", "dtype", "torch_dtype"))
CONFIG_BYTES_MAX = 16 << 20


class _File(NamedTuple):
    """A file of a checkpoint: its name relative to the checkpoint's folder, and the sha256 in a hub cache's name for it, or ""."""

    name: str
    path: Path
    sha256: str


def weights_digest(folder: str | Path, *, cache: Path | None = None, progress: Progress | None = None) -> str:
    """Returns a hex digest of a model's files, by content and by name relative to `folder`, a local folder or a single file.

    Reads all files once, on several threads, and remembers their sums in `cache` (None: `file_sums` in the user's cache folder), so that
    a later process needs only their sizes and times. Of processes that start together one reads and the others wait, at most 30
    minutes. `progress` gets a line about every 10 s of reading or waiting; None writes it to the log. Raises (kind `model`) without such a
    folder, for a folder without weights, and for files that cannot be read.
    """
    files = _weight_files(_existing(folder))
    configs = [file for file in files if file.path.name == "config.json"]
    summed = [file for file in files if file.path.name != "config.json"]
    sums = sums_of({file.path: bool(file.sha256) for file in summed}, cache, progress)
    rows = [[file.name, file.sha256, sums[file.path]] for file in summed]
    rows += [[file.name, "", text_digest(_config_of(file.path))] for file in configs]
    return text_digest(["checkpoint files", sorted(rows)])


def architecture_digest(folder: str | Path, settings: Mapping[str, Any] | None = None) -> str:
    """Returns a hex digest of the `config.json` of a model's folder, if it has one, and of `settings`.

    Leaves out what does not change KV (`identity.NOT_IDENTITY`), but not the dtype and the class. Raises (kind `model`) if the file is
    not JSON.
    """
    if settings is not None and not isinstance(settings, Mapping):
        raise TieredKVError(Kind.CONFIG, f"settings: must be a mapping, got {type(settings).__name__}", setting="settings")
    path = _existing(folder)
    config = (path if path.is_dir() else path.parent) / "config.json"
    return text_digest([_config_of(config) if config.exists() else None, dict(settings or {})])


def adapter_file_digest(folder: str | Path, *, cache: Path | None = None) -> str:
    """Returns a hex digest of a LoRA adapter's files: weights (`adapter_model.*`), `adapter_config.json` and `new_embeddings.*`.

    Costs about 100 µs if this process has read them before: the sums are remembered as in `weights_digest`. Raises (kind `model`)
    without such a folder, without weights in it, and for files that cannot be read.
    """
    path = os.fspath(folder)
    with naming(path), os.scandir(path) as entries:
        names = sorted(entry.name for entry in entries if _ADAPTER.fullmatch(entry.name))
    if not any(name.startswith("adapter_model.") and os.path.splitext(name)[1] in WEIGHTS for name in names):
        raise TieredKVError(Kind.MODEL, f"{path}: has no weights of an adapter (adapter_model.safetensors or .bin)", path=path)
    paths = {name: Path(path, name) for name in names}
    sums = sums_of(dict.fromkeys(paths.values(), False), cache)
    return text_digest(["adapter files", [[name, sums[each]] for name, each in paths.items()]])


def _existing(folder: str | Path) -> Path:
    path = Path(folder).expanduser()
    if not path.exists():
        raise TieredKVError(
            Kind.MODEL, f"{path}: no such folder; a model's name on a hub must be given as its local folder", path=str(path)
        )
    return path


def _weight_files(path: Path) -> list[_File]:
    """Returns the files of a checkpoint that its digest covers. Raises (kind `model`) if there are no weights among them."""
    if path.is_dir():
        files = list(_files_below(path))
        if not any(_is_weights(file.path.name) for file in files):
            raise TieredKVError(Kind.MODEL, f"{path}: has no files with weights ({', '.join(sorted(WEIGHTS))})", path=str(path))
        return files
    with naming(path.parent):
        names = sorted(os.listdir(path.parent))
    split = _SPLIT.fullmatch(path.name)
    parts = {name for name in names if split and (other := _SPLIT.fullmatch(name)) and other.groups() == split.groups()}
    projectors = {name for name in names if name.startswith("mmproj") and name.endswith(".gguf")}
    meaning = {name for name in names if _has_meaning(name)}
    return [_file(path.parent, path.parent / name) for name in sorted({path.name} | parts | projectors | meaning)]


def _files_below(top: Path) -> Iterator[_File]:
    """Yields the files of a folder and its subfolders that the digest covers. Follows links, and visits each folder once."""
    seen = set()
    for where, folders, names in os.walk(top, followlinks=True, onerror=_refuse):
        with naming(where):
            facts = os.stat(where)
        if (facts.st_dev, facts.st_ino) in seen:
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if Path(where) == top and any(_is_weights(name) for name in names):
            folders[:] = [name for name in folders if not _OTHER_FOLDERS.fullmatch(name)]
        yield from (_file(top, Path(where, name)) for name in names if _is_weights(name) or _has_meaning(name))


def _refuse(error: OSError) -> None:
    """For `os.walk`, which else leaves out folders that it cannot list."""
    raise TieredKVError(Kind.MODEL, f"{error.filename}: cannot be read ({error.strerror})", path=error.filename) from error


def _file(top: Path, path: Path) -> _File:
    return _File(path.relative_to(top).as_posix(), path, _hub_sha256(path))


def _is_weights(name: str) -> bool:
    return os.path.splitext(name.lower())[1] in WEIGHTS and name not in NOT_WEIGHTS and not name.startswith(".")


def _has_meaning(name: str) -> bool:
    return os.path.splitext(name)[1] in MEANING and name not in NOT_MEANING and not name.startswith(".")


def _hub_sha256(path: Path) -> str:
    """Returns the sha256 that a hub cache names a file by, `REPO/snapshots/REVISION/… -> REPO/blobs/SHA256`; "" for all other files.

    Small files have a git id of 40 digits instead. The blob itself may be a link to another that is named by another hash.
    """
    try:
        blob = path.parent / os.readlink(path)
    except OSError:  # not a link
        return ""
    if blob.parent.name != "blobs" or not _SHA256.fullmatch(blob.name):
        return ""
    snapshots = Path(os.path.realpath(blob.parent)).parent / "snapshots"
    return blob.name if Path(os.path.realpath(path.parent)).is_relative_to(snapshots) else ""


def _config_of(path: Path) -> Any:
    """Returns the content of a `config.json` without what does not change KV. Raises (kind `model`) if it is not JSON."""
    with naming(path), path.open("rb") as file:
        content = file.read(CONFIG_BYTES_MAX)
    try:
        return plain(json.loads(content), leave_out=_NOT_IDENTITY)
    except (ValueError, RecursionError) as error:
        raise TieredKVError(Kind.MODEL, f"{path}: must be JSON ({error})", path=str(path)) from error
