"""Fits the tables of the codecs: the predictor of a layer's KV, and the axes and steps in which the residual is rounded.

The axes are scaled so that one step changes the next tokens' distribution equally along each of them. For that, errors e are
weighted by eᵀ G e, with the Fisher information G of K and of V (see `capture`). The axes are those of the Karhunen-Loève transform
in that metric. `unit` then measures the effect of a step. Layers are fitted in order, each with the decoded KV of the layers before it.
"""

from collections.abc import Callable

import numpy as np
import torch

from tiered_kv.codecs.calibrated.tables import EcuqTables, XlayerTables
from tiered_kv.tools.calibrate.capture import CapturedKV, Geometry

LogLine = Callable[[str], None]
STEP = 1e-4
"""The step at which layers are fitted. The tables work for other steps too."""
RIDGE = 1e-3
"""The ridge regularization of the predictor, as a part of the features' mean power."""
FLOOR = 1.0
"""A lower bound for the sensitivity of each axis, relative to the mean.

It is needed because the gradients come from few texts.
"""
ECUQ_FLOOR = 0.75
V_STEP = 0.8
"""The step of V relative to that of K.

V needs finer steps, because its errors add up over the tokens that attend to it.
"""


def fit_ecuq(captured: CapturedKV, geometry: Geometry) -> EcuqTables:
    """Returns the tables of the codec ecuq: mean, step and spread of each channel, in the order (2, H, D)."""
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


def fit_xlayer(captured: CapturedKV, geometry: Geometry, log: LogLine) -> XlayerTables:
    """Returns the tables of the transform codec, xlayer. Needs memory for the KV of four layers in float32."""
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
            log(f"fitted layer {layer + 1} of {layers}" + (f", group {group + 1} of {groups}" if groups > 1 else ""))
    return XlayerTables(mean.view(layers, -1), spread.view(layers, -1), matrix)


def _fit_layer(x: torch.Tensor, features: torch.Tensor, fisher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit one layer. x: (N, C) minus its mean. features: (N, 2C), the decoded KV of the two layers before.

    Returns the standard deviations of the coefficients (C,), and the matrix (C, 3C).
    """
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
    """Returns the matrix square root of the Fisher information of K and V (2, C/2, C/2), and the inverse of this root.

    Both are block-diagonal (C, C) matrices.
    """
    size = fisher.shape[-1]
    floor = FLOOR * _tiny_guard(fisher.diagonal(dim1=-2, dim2=-1).mean(-1))
    power, axes = torch.linalg.eigh(fisher + floor[:, None, None] * torch.eye(size, dtype=fisher.dtype))
    roots = power.sqrt()
    roots[1] /= V_STEP
    metric, inverse = ((axes * each[:, None]) @ axes.transpose(-1, -2) for each in (roots, 1 / roots))
    return torch.block_diag(*metric), torch.block_diag(*inverse)


def _decoded(x: torch.Tensor, features: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Returns a layer (N, C) after encoding and decoding it at the step of the fit."""
    size = x.shape[1]
    predicted = features @ matrix[:, : 2 * size].float().T
    basis = matrix[:, 2 * size :].float() * STEP
    analysis = torch.from_numpy(np.linalg.inv(basis.double().numpy())).float()
    codes = ((x - predicted) @ analysis.T).round_()
    return predicted.addmm_(codes, basis.T).bfloat16().float()


def _plain(x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Returns a table (L, C) with its channels reordered from the axes (G, 2, H/G, D) to (2, H, D)."""
    heads = geometry.kv_heads // geometry.groups
    return x.view(len(x), geometry.groups, 2, heads, -1).transpose(1, 2).reshape(len(x), -1).contiguous()


def _tiny_guard(x: torch.Tensor) -> torch.Tensor:
    """Returns `x` with each value raised to at least a tiny positive number, so that quotients stay finite.

    Values of 0 occur because a layer may be constant, or have no effect at all.
    """
    return x.clamp_min(1e-20)
