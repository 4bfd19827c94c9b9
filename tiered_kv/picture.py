"""Draws and writes pictures with matplotlib, which is an optional dependency (an extra)."""

from pathlib import Path
from typing import Any

from tiered_kv.errors import Kind, TieredKVError


def figure(size_inches: tuple[float, float]) -> Any:
    """Returns an empty figure. Raises (kind `config`), naming --plot and the extra, if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        said = "--plot: needs matplotlib, which is not installed: pip install 'tiered-kv[plot]'"
        raise TieredKVError(Kind.CONFIG, said, setting="plot") from error
    return Figure(size_inches)


def check_target(path: str) -> None:
    """Raise (kind `config`) if a picture cannot be drawn, or cannot be written to `path`. Call it before any other work."""
    endings = set(figure((1, 1)).canvas.get_supported_filetypes())
    if Path(path).suffix.lstrip(".") not in endings:
        raise TieredKVError(Kind.CONFIG, f"--plot: {path} has none of the endings {', '.join(sorted(endings))}", setting="plot")
    if not Path(path).absolute().parent.is_dir():
        raise TieredKVError(Kind.CONFIG, f"--plot: {path} is in no folder that exists", setting="plot")


def write(drawn: Any, path: str) -> None:
    """Write a figure to `path`. The ending of the path determines the format."""
    try:
        drawn.savefig(path)
    except OSError as error:
        raise TieredKVError(Kind.CONFIG, f"--plot: cannot write {path} ({error.strerror})", setting="plot") from error
