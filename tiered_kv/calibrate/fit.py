"""The fit of the tables: what a layer's KV is predicted by, and the axes and steps that its rest is rounded along.

A step costs the same in the next tokens' distribution along every axis: errors e are weighed by eᵀ G e with the Fisher information G
of K and of V (see `capture`); `unit` then measures what a step comes to. The axes are those of the Karhunen-Loève transform in
that metric. Layers are fitted in order, on what decoding makes of the ones before.
"""

from collections.abc import Callable

import numpy as np
import torch

from tiered_kv.calibrate.capture import Captured, Geometry
from tiered_kv.codecs.calibration import EcuqTables, XlayerTables

Say = Callable[[str], None]
STEP = 1e-4
"""The step that layers are fitted at; the tables serve for others too."""
RIDGE = 1e-3
"""Of the predictor, as a part of the features' mean power."""
FLOOR = 1.0
"""Each axis counts as if it were at least this many times as sensitive as a mean one: gradients are of few texts."""
ECUQ_FLOOR = 0.75
V_STEP = 0.8
"""V is rounded this much finer: its errors add up over the tokens that attend to it."""


def fit_ecuq(captured: Captured, geometry: Geometry) -> EcuqTables:
    """Mean, step and spread of each channel, in the order (2, H, D)."""
    layers, channels = geometry.layers, geometry.channels
    mean, spread = torch.empty(layers, channels), torch.empty(layers, channels)
    for layer in range(layers):
        x = captured.kv[layer].float()
        spread[layer], mean[layer] = torch.std_mean(x, 0)
    sensitivity = captured.fisher.diagonal(dim1=-2, dim2=-1)  # (L, 2, G, C/2G)
    floor = ECUQ_FLOOR * sensitivity.mean((-1, -2), keepdim=True)
    width = _tiny_guard(sensitivity + floor).rsqrt()
    width[:, 1] *= V_STEP
    width = width.transpose(1, 2).reshape(layers, channels)
    return EcuqTables(*(_plain(each, geometry) for each in (mean, width, spread / width)))


def fit_xlayer(captured: Captured, geometry: Geometry, say: Say) -> XlayerTables:
    """The tables of the transform codec. Holds four layers' KV in float32 at a time."""
    layers, groups, size = geometry.layers, geometry.groups, geometry.channels // geometry.groups
    mean, spread = torch.empty(layers, groups, size), torch.empty(layers, groups, size)
    matrix = torch.empty(layers, groups, size, 3 * size, dtype=torch.bfloat16)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        features = torch.zeros(captured.kv.shape[1], 2 * size)
        for layer in range(layers):
            x = captured.kv[layer, :, part].float()
            mean[layer, group] = x.mean(0)
            x -= mean[layer, group]
            spread[layer, group], matrix[layer, group] = _fit_layer(x, features, captured.fisher[layer, :, group])
            decoded = _decoded(x, features, matrix[layer, group])
            features[:, :size] = features[:, size:]
            features[:, size:] = decoded
            say(f"fitted layer {layer + 1} of {layers}" + (f", group {group + 1} of {groups}" if groups > 1 else ""))
    return XlayerTables(mean.view(layers, -1), spread.view(layers, -1), matrix)


def _fit_layer(x: torch.Tensor, features: torch.Tensor, fisher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Deviations of the coefficients (C,) and the matrix (C, 3C) of one layer: x (N, C) less its mean, features (N, 2C)."""
    gram = features.T @ features
    ridge = RIDGE * _tiny_guard(gram.diagonal().mean())
    padded = gram.double() + ridge * torch.eye(len(gram), dtype=torch.float64)
    predictor = torch.cholesky_solve((features.T @ x).double(), torch.linalg.cholesky(padded)).float()
    rest = x - features @ predictor
    covariance = (rest.T @ rest).double() / len(rest)
    metric, inverse = _metric(fisher.double())
    power, axes = torch.linalg.eigh(metric @ covariance @ metric)
    power, axes = power.flip(0), axes.flip(1)
    matrix = torch.cat([predictor.T, (inverse @ axes).float()], 1)
    return power.clamp_min(0).sqrt().float(), matrix.bfloat16()


def _metric(fisher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The square root of the Fisher information of K and V (2, C/2, C/2), a (C, C) matrix of two blocks, and its inverse."""
    size = fisher.shape[-1]
    floor = FLOOR * _tiny_guard(fisher.diagonal(dim1=-2, dim2=-1).mean(-1))
    power, axes = torch.linalg.eigh(fisher + floor[:, None, None] * torch.eye(size, dtype=fisher.dtype))
    roots = power.sqrt()
    roots[1] /= V_STEP
    metric, inverse = ((axes * each[:, None]) @ axes.transpose(-1, -2) for each in (roots, 1 / roots))
    return torch.block_diag(*metric), torch.block_diag(*inverse)


def _decoded(x: torch.Tensor, features: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """What decoding makes of a layer (N, C) at the step of the fit."""
    size = x.shape[1]
    predicted = features @ matrix[:, : 2 * size].float().T
    basis = matrix[:, 2 * size :].float() * STEP
    analysis = torch.from_numpy(np.linalg.inv(basis.double().numpy())).float()
    codes = ((x - predicted) @ analysis.T).round_()
    return predicted.addmm_(codes, basis.T).bfloat16().float()


def _plain(x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """(L, C) in the order (G, 2, H/G, D) as (2, H, D)."""
    heads = geometry.kv_heads // geometry.groups
    return x.view(len(x), geometry.groups, 2, heads, -1).transpose(1, 2).reshape(len(x), -1).contiguous()


def _tiny_guard(x: torch.Tensor) -> torch.Tensor:
    """`x`, nowhere below what keeps a quotient finite: a layer may be constant, or no later token may feel it."""
    return x.clamp_min(1e-20)
