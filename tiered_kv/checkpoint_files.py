"""Identifies a model by its files (a model checkpoint), for engines that show no model object, such as vLLM.

A digest covers every file that an engine may load, and every file that may change the meaning of the weights. A file too many costs
only misses. A file too few could give one model the KV of another. So all formats in a folder and its subfolders count, and also code
(`*.py`), which `trust_remote_code` runs. Left out are tokenizers, texts, `generation_config.json`, a trainer's states and hidden files.
If a folder has weights itself, its subfolders `original`, `metal`, `checkpoint-N` and `global_stepN` are left out too: they contain the
model in another format or in an earlier state.

A snapshot in a Hugging Face hub cache links to files whose names are the sha256 of their content. Of such a file, only the name, the
size and 64 samples (4 MiB) are read. The samples show whether somebody has written to the file since. So a hub snapshot and a copy of it
in a plain folder do not share blocks: that would need the sha256 of all files.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.file_sums import Progress, sums_of, unreadable
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
_ADAPTER = re.compile(rf"(adapter_|new_embeddings).*({'|'.join(map(re.escape, sorted(WEIGHTS | {'.json'})))})")
# Without a loaded model, only the config has these settings, so they are part of the digest here.
_NOT_IDENTITY = tuple(name for name in NOT_IDENTITY if name not in ("architectures", "dtype", "torch_dtype"))
CONFIG_BYTES_MAX = 16 << 20


class _File(NamedTuple):
    """A file of a model: its name relative to the model's folder, its path, and the sha256 by which a hub cache names it, or ""."""

    name: str
    path: Path
    sha256: str


def weights_digest(folder: str | Path, *, cache: Path | None = None, progress: Progress | None = None) -> str:
    """Returns a hex digest of the content and relative names of a model's files. `folder`: a local folder or a single file.

    Reads all files once, on several threads. Remembers their sums in `cache` (None: `file_sums` in the user's cache folder), so that
    a later process reads only the files' sizes and times. If several processes start together, one reads and the others wait for it,
    at most 30 minutes. `progress` is called with a line about every 10 s of reading or waiting; None writes the lines to the log.
    Raises (kind `model`) if there is no such folder, if it has no weights, or if a file cannot be read.
    """
    files = _weight_files(_existing(folder))
    configs = [file for file in files if file.path.name == "config.json"]
    summed = [file for file in files if file.path.name != "config.json"]
    sums = sums_of({str(file.path): bool(file.sha256) for file in summed}, cache, progress)
    rows = [[file.name, file.sha256, sums[str(file.path)]] for file in summed]
    rows += [[file.name, "", text_digest(_config_of(file.path))] for file in configs]
    return text_digest(["checkpoint files", sorted(rows)])


def architecture_digest(folder: str | Path, settings: Mapping[str, Any] | None = None) -> str:
    """Returns a hex digest of the `config.json` of a model's folder, if it has one, and of `settings`.

    Leaves out settings that do not change KV (`identity.NOT_IDENTITY`), but includes the dtype and the class. Raises (kind `model`) if
    the file is not JSON.
    """
    if settings is not None and not isinstance(settings, Mapping):
        raise TieredKVError(Kind.CONFIG, f"settings: must be a mapping, got {type(settings).__name__}", setting="settings")
    path = _existing(folder)
    config = (path if path.is_dir() else path.parent) / "config.json"
    return text_digest([_config_of(config) if config.exists() else None, dict(settings or {})])


def adapter_file_digest(folder: str | Path, *, cache: Path | None = None) -> str:
    """Returns a hex digest of a LoRA adapter's files: weights (`adapter_model.*`), `adapter_config.json` and `new_embeddings.*`.

    Costs about 50 µs if this process has read the files before: their sums are remembered as in `weights_digest`. Raises (kind
    `model`) if there is no such folder, if it has no weights, or if a file cannot be read.
    """
    path = os.path.expanduser(folder)
    try:
        names = sorted(name for name in os.listdir(path) if _ADAPTER.fullmatch(name))
    except OSError as error:
        raise unreadable(path, error) from error
    if not any(name.startswith("adapter_model.") and os.path.splitext(name)[1] in WEIGHTS for name in names):
        raise TieredKVError(Kind.MODEL, f"{path}: has no weights of an adapter (adapter_model.safetensors or .bin)", path=path)
    paths = {name: os.path.join(path, name) for name in names}
    sums = sums_of(dict.fromkeys(paths.values(), False), cache)
    return blake2b(json.dumps(["adapter files", [[name, sums[paths[name]]] for name in names]]).encode(), digest_size=32).hexdigest()


def _existing(folder: str | Path) -> Path:
    path = Path(folder).expanduser()
    if not path.exists():
        raise TieredKVError(
            Kind.MODEL, f"{path}: no such folder; a model's name on a hub must be given as its local folder", path=str(path)
        )
    return path


def _weight_files(path: Path) -> list[_File]:
    """Returns the files that the digest of a model covers. `path`: the model's folder, or one file with its weights.

    Raises (kind `model`) if a folder contains no weights.
    """
    if path.is_dir():
        files = list(_files_below(path))
        if not any(_is_weights(file.path.name) for file in files):
            raise TieredKVError(Kind.MODEL, f"{path}: has no files with weights ({', '.join(sorted(WEIGHTS))})", path=str(path))
        return files
    try:
        names = sorted(os.listdir(path.parent))
    except OSError as error:
        raise unreadable(path.parent, error) from error
    split = _SPLIT.fullmatch(path.name)
    parts = {name for name in names if split and (other := _SPLIT.fullmatch(name)) and other.groups() == split.groups()}
    projectors = {name for name in names if name.startswith("mmproj") and name.endswith(".gguf")}
    meaning = {name for name in names if _has_meaning(name)}
    return [_file(path.parent, path.parent / name) for name in sorted({path.name} | parts | projectors | meaning)]


def _files_below(top: Path) -> Iterator[_File]:
    """Yields the files of a folder and its subfolders that the digest covers. Follows links, and visits each folder once."""
    seen = set()
    for where, folders, names in os.walk(top, followlinks=True, onerror=_refuse):
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
    """Raises (kind `model`) for a folder that `os.walk` cannot list. Otherwise `os.walk` would silently leave it out."""
    raise unreadable(error.filename, error) from error


def _file(top: Path, path: Path) -> _File:
    return _File(path.relative_to(top).as_posix(), path, _hub_sha256(path))


def _is_weights(name: str) -> bool:
    return os.path.splitext(name.lower())[1] in WEIGHTS and name not in NOT_WEIGHTS and not name.startswith(".")


def _has_meaning(name: str) -> bool:
    return os.path.splitext(name)[1] in MEANING and name not in NOT_MEANING and not name.startswith(".")


def _hub_sha256(path: Path) -> str:
    """Returns the sha256 by which a hub cache names a file (`REPO/snapshots/REVISION/… -> REPO/blobs/SHA256`), else "".

    A small file is named by a git id of 40 digits instead, and gives "". The blob may itself be a link to a blob with another hash.
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
    """Returns the content of a `config.json`, without settings that do not change KV. Raises (kind `model`) if it is not JSON."""
    try:
        with path.open("rb") as file:
            content = file.read(CONFIG_BYTES_MAX)
        return plain(json.loads(content), leave_out=_NOT_IDENTITY)
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise TieredKVError(Kind.MODEL, f"{path}: must be JSON ({error})", path=str(path)) from error
