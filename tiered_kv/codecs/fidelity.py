"""How far a block is from what it was."""

import torch


def relative_error(kv: torch.Tensor, again: torch.Tensor) -> float:
    """The mean squared error of `again` over the mean square of `kv` (L, 2, H, T, D), of that layer's K or V where it is greatest.

    NaN or infinity if either has a number that is not finite, or if zeros became something else.
    """
    work = torch.float64 if kv.dtype is torch.float64 else torch.float32
    return float(torch.stack([_of_layer(x.to(work), y.to(work)) for x, y in zip(kv, again, strict=True)]).max())


def _of_layer(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(2,) of K and V (2, H, T, D), which are scaled so that no square leaves the range of floats."""
    greatest = x.abs().amax((1, 2, 3), keepdim=True)
    unit = torch.where(greatest == 0, 1, greatest)
    apart = torch.linalg.vector_norm((y - x).div_(unit), dim=(1, 2, 3)).square()
    return torch.where(apart == 0, 0, apart / torch.linalg.vector_norm(x / unit, dim=(1, 2, 3)).square())
