"""What pictures need: matplotlib, which is an extra, and a file that can be written."""

from pathlib import Path
from typing import Any

from tiered_kv.errors import Kind, TieredKVError


def figure(size_inches: tuple[float, float]) -> Any:
    """An empty figure; raises (kind `config`) naming --plot and the extra where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        said = "--plot: needs matplotlib, which is not installed: pip install 'tiered-kv[plot]'"
        raise TieredKVError(Kind.CONFIG, said, setting="plot") from error
    return Figure(size_inches)


def check_target(path: str) -> None:
    """Refuse, before any work, a picture that could not be drawn or written."""
    endings = set(figure((1, 1)).canvas.get_supported_filetypes())
    if Path(path).suffix.lstrip(".") not in endings:
        raise TieredKVError(Kind.CONFIG, f"--plot: {path} has none of the endings {', '.join(sorted(endings))}", setting="plot")
    if not Path(path).absolute().parent.is_dir():
        raise TieredKVError(Kind.CONFIG, f"--plot: {path} is in no folder that exists", setting="plot")


def write(drawn: Any, path: str) -> None:
    """Write a figure to `path`, whose ending says the format."""
    try:
        drawn.savefig(path)
    except OSError as error:
        raise TieredKVError(Kind.CONFIG, f"--plot: cannot write {path} ({error.strerror})", setting="plot") from error
