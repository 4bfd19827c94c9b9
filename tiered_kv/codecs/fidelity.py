"""How far a block is from what it was."""

import torch

ELEMENTS = 1 << 17
"""As many numbers are compared at a time as whole layers have: what comes in between stays in the processor's cache."""
NORM_LEAST, NORM_GREATEST = 1e-10, 1e10


def relative_error(kv: torch.Tensor, again: torch.Tensor) -> float:
    """The mean squared error of `again` over the mean square of `kv` (L, 2, H, T, D), of that layer's K or V where it is greatest.

    NaN or infinity if either has a number that is not finite, or if zeros became something else.
    """
    work = torch.float64 if kv.dtype is torch.float64 else torch.float32
    step = max(ELEMENTS // max(kv[0].numel(), 1), 1)
    pairs = zip(kv.split(step), again.split(step), strict=True)
    return float(torch.cat([_of_layers(x.to(work), y.to(work)) for x, y in pairs]).max())


def _of_layers(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(L, 2) of some layers, which are scaled where a square might leave the range of floats."""
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
