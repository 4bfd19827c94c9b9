"""Triton kernels that decode the integer codecs on a GPU: they unpack, dequantize, rotate and scatter a part in one pass.

The reference is the torch path of `grouped`. A GPU multiplies and adds in one step. So before the final rounding, a kernel's
numbers may differ from the reference by one unit in the last place of float32, or of the product's dtype in a part that is
multiplied by the spreading matrix. After rounding, a number equals the reference or is the adjacent number of the destination's
dtype. Triton's interpreter on CPUs truncates instead of rounding to bf16, which also gives the adjacent number at most.
The interpreter cannot multiply bf16 matrices.
Importing this module needs triton (Tillet et al. 2019) from the extra `triton`. No other module imports triton.
Shapes: a part is (L, H, T, D) as in `parts`. One program decodes some tokens of one head.
"""

import logging
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from tiered_kv.codecs.parts import product_dtype
from tiered_kv.codecs.rotation import Turning, rope_of_theta, spreading_matrix, turning

BITS = (8, 4)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PROGRAM_TOKENS = 16
PRODUCT_DIM_MIN = 16
NO_TURN, HALVES, NEIGHBOURS = 0, 1, 2
_log = logging.getLogger(__name__)


@triton.jit
def _dequantize(codes, scales, row, token, channel, mask, second_half, plane, tokens, dim, BITS: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """Returns the dequantized float32 numbers (tokens, channels) of a head. `plane` is the offset of the steps in `scales`."""
    place = (row * tokens + token[:, None]) * dim + channel[None, :]
    if BITS == 8:
        code = tl.load(codes + place, mask=mask, other=0)
    else:
        is_high = place >= second_half
        byte = tl.load(codes + tl.where(is_high, place - second_half, place), mask=mask, other=0)
        code = tl.where(is_high, byte >> 4, byte & 15)
    if PER_CHANNEL:
        group, within = row * dim + channel[None, :], channel[None, :] < dim
    else:
        group, within = row * tokens + token[:, None], token[:, None] < tokens
    least = tl.load(scales + group, mask=within, other=0.0)
    step = tl.load(scales + plane + group, mask=within, other=0.0)
    return code.to(tl.float32) * step + least


@triton.jit
def _restore(
    codes,
    scales,
    cos,
    sin,
    matrix,
    out,
    second_half,
    plane,
    heads,
    tokens,
    dim,
    pairs,
    stride_l,
    stride_h,
    stride_t,
    stride_d,
    BITS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    TURN: tl.constexpr,
    SPREAD: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, CHANNELS)
    mask = (token[:, None] < tokens) & (channel[None, :] < dim)
    x = _dequantize(codes, scales, row, token, channel, mask, second_half, plane, tokens, dim, BITS, PER_CHANNEL)
    if TURN != 0:
        if TURN == 1:
            is_first, pair = channel < pairs, channel % pairs
            partner = tl.where(is_first, channel + pairs, channel - pairs)
        else:
            is_first, pair = channel % 2 == 0, channel // 2
            partner = tl.where(is_first, channel + 1, channel - 1)
        turns = mask & (channel[None, :] < 2 * pairs)
        other = _dequantize(codes, scales, row, token, partner, turns, second_half, plane, tokens, dim, BITS, PER_CHANNEL)
        cosine = tl.load(cos + token[:, None] * dim + channel[None, :], mask=mask, other=0.0)
        sine = tl.load(sin + token[:, None] * pairs + pair[None, :], mask=turns, other=0.0)
        x = x * cosine + tl.where(is_first[None, :], -other, other) * sine
    if SPREAD:
        square = (channel[:, None] < dim) & (channel[None, :] < dim)
        factor = tl.load(matrix + channel[:, None] * dim + channel[None, :], mask=square, other=0.0)
        x = tl.dot(tl.where(mask, x, 0.0).to(factor.dtype), factor, input_precision="ieee")
    place = (row // heads) * stride_l + (row % heads) * stride_h + token[:, None].to(tl.int64) * stride_t + channel[None, :] * stride_d
    tl.store(out + place, x.to(out.dtype.element_ty), mask=mask)


def restore(
    codes: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    *,
    bits: int,
    per_channel: bool,
    turn: Turning | None = None,
    is_halves: bool = True,
    matrix: torch.Tensor | None = None,
) -> None:
    """Decodes packed codes (1-D u8) and scales (2, L, H, n) in float32 into `out` (L, H, T, D), of one of DTYPES and of any strides.

    `turn` is RoPE for the part's tokens; `is_halves` says how its channels are paired (see `rotation.turning`).
    `matrix` (D, D), if given, multiplies the decoded numbers to undo spreading (see `rotation.spreading_matrix`).
    All tensors must be on one device.
    """
    layers, heads, tokens, dim = out.shape
    count = layers * heads * tokens * dim
    none = scales  # a placeholder that the kernel never reads
    how = NO_TURN if turn is None or not turn.sin.shape[1] else HALVES if is_halves else NEIGHBOURS
    channels = triton.next_power_of_2(dim)
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        _restore[layers * heads, triton.cdiv(tokens, PROGRAM_TOKENS)](
            codes,
            scales,
            turn.cos if turn is not None and how else none,
            turn.sin if turn is not None and how else none,
            none if matrix is None else matrix,
            out,
            (count + 1) // 2,
            scales[0].numel(),
            heads,
            tokens,
            dim,
            turn.sin.shape[1] if turn is not None and how else 1,
            *out.stride(),
            BITS=bits,
            PER_CHANNEL=per_channel,
            TURN=how,
            SPREAD=matrix is not None,
            TOKENS=PROGRAM_TOKENS,
            CHANNELS=channels if matrix is None else max(channels, PRODUCT_DIM_MIN),
        )


def works_on(device: torch.device) -> bool:
    """Whether the kernels compile on a device and decode correctly there. Costs seconds.

    Tests RoPE and spreading on a small block. Logs a failure; the torch path then decodes on that device.
    """
    try:
        right = _turns_rightly(device) and _spreads_rightly(device)
    except Exception:  # noqa: BLE001 - boundary: a GPU's compiler may fail in any way, and torch can decode as well
        _log.warning("Triton kernels do not run on %s; codecs decode with torch there", device, exc_info=True)
        return False
    if not right:
        _log.warning("Triton kernels decode incorrectly on %s; codecs decode with torch there", device)
    return right


def _turns_rightly(device: torch.device) -> bool:
    codes = torch.arange(128, dtype=torch.uint8)
    scales = torch.tensor([-1.0, 0.03125]).repeat_interleave(16).view(2, 1, 2, 8)
    turn = turning(rope_of_theta(100.0, 8), True, 3, 8, 8)
    numbers = (codes * 0.03125 - 1).view(1, 2, 8, 8)
    out = torch.zeros(1, 2, 8, 8, device=device)
    restore(codes.to(device), scales.to(device), out, bits=8, per_channel=True, turn=turn.to(device))
    return torch.allclose(out.cpu(), turn.turn(numbers, torch.empty_like(numbers)), atol=1e-5)


def _spreads_rightly(device: torch.device) -> bool:
    codes = torch.arange(128, dtype=torch.uint8).view(1, 1, 8, 16) % 16
    scales = torch.tensor([-1.0, 0.125]).repeat_interleave(8).view(2, 1, 1, 8)
    low, high = codes.view(2, -1)
    out = torch.zeros(1, 1, 8, 16, dtype=torch.bfloat16, device=device)
    matrix = spreading_matrix(16).to(product_dtype(out))
    restore((low | high << 4).to(device), scales.to(device), out, bits=4, per_channel=False, matrix=matrix.to(device))
    return torch.allclose(out.cpu().float(), (codes * 0.125 - 1) @ matrix.float(), rtol=2**-7, atol=1e-3)
