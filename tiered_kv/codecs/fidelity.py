"""Measures how far a decoded block is from the original."""

import torch

ELEMENTS = 1 << 17
"""Whole layers of about this many numbers are compared at a time, so that intermediate results stay in the processor's cache."""
NORM_LEAST, NORM_GREATEST = 1e-10, 1e10


def relative_error(kv: torch.Tensor, again: torch.Tensor) -> float:
    """Returns the relative mean squared error of `again` against `kv` (both L, 2, H, T, D).

    It is the mean squared error divided by the mean square of `kv`, computed for K and for V of each layer. Returns the
    greatest of these. It is NaN or infinity if either tensor has a number that is not finite, or if a layer's K or V is all
    zeros in `kv` only.
    """
    work = torch.float64 if kv.dtype is torch.float64 else torch.float32
    step = max(ELEMENTS // max(kv[0].numel(), 1), 1)
    pairs = zip(kv.split(step), again.split(step), strict=True)
    return float(torch.cat([_of_layers(x.to(work), y.to(work)) for x, y in pairs]).max())


def _of_layers(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns the errors (L, 2) of some layers. Scales the layers first if a square might overflow or underflow."""
    norm = _norm(x)
    if not ((norm > NORM_LEAST) & (norm < NORM_GREATEST)).all():
        greatest = x.abs().amax((2, 3, 4), keepdim=True)
        unit = torch.where(greatest == 0, 1, greatest)
        x, y = x / unit, y / unit
        norm = _norm(x)
    apart = _norm(y - x)
    return torch.where(apart == 0, 0, apart.div_(norm).square_())


def _norm(x: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(x, dim=(2, 3, 4))
    return norm
