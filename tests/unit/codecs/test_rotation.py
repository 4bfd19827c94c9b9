"""Tests of rotations: RoPE equals that of transformers and can be undone, and spreading matrices are orthogonal."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tiered_kv.codecs.rotation import check_rope, rope_of, rope_of_theta, spreading_matrix, turning
from tiered_kv.errors import Kind, TieredKVError


def turned(x: torch.Tensor, rope: bytes, start: int, *, halves: bool = True, back: bool = False) -> torch.Tensor:
    return turning(rope, halves, start, *x.shape[-2:]).turn(x, torch.full_like(x, torch.nan), back)


@pytest.mark.parametrize("start", [0, 64, 100_000])
def test_rotates_as_llama_does(start: int) -> None:
    x = torch.randn(2, 3, 10, 32)
    angles = torch.arange(start, start + 10, dtype=torch.float32)[:, None] / 10_000 ** (torch.arange(0, 32, 2) / 32)
    angles = torch.cat([angles, angles], -1)[None]
    expected, _ = apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())
    torch.testing.assert_close(turned(x, rope_of_theta(10_000, 32), start), expected, rtol=1e-4, atol=1e-4 if start < 1000 else 2e-2)


def test_rotates_neighbours_as_complex_numbers() -> None:
    x = torch.randn(5, 8)
    angles = torch.arange(3.0, 8.0)[:, None] / 500 ** (torch.arange(0, 8, 2) / 8)
    turns = torch.polar(torch.ones_like(angles), angles)
    expected = torch.view_as_real(torch.view_as_complex(x.view(5, 4, 2)) * turns).view(5, 8)
    torch.testing.assert_close(turned(x, rope_of_theta(500, 8), 3, halves=False), expected)


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("rotary_dim", [4, 16])
def test_rotating_back_undoes_rope_and_other_channels_do_not_change(rotary_dim: int, halves: bool) -> None:
    x, rope = torch.randn(2, 7, 16), rope_of_theta(1e4, rotary_dim)
    there = turned(x, rope, 1000, halves=halves)
    assert torch.equal(there[..., rotary_dim:], x[..., rotary_dim:])
    torch.testing.assert_close(turned(there, rope, 1000, halves=halves, back=True), x)


@pytest.mark.parametrize("dim", [1, 2, 64, 128, 80, 96, 3])
def test_spreading_matrices_are_orthogonal_with_small_entries(dim: int) -> None:
    matrix = spreading_matrix(dim)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim), rtol=0, atol=1e-5)
    assert matrix.abs().max() <= (2 / dim) ** 0.5 + 1e-6


@pytest.mark.parametrize("rope", [b"123", bytes(4 * 9), [1.0], rope_of([float("nan")]), rope_of([float("inf")])])
def test_an_invalid_rope_is_refused(rope) -> None:
    with pytest.raises(TieredKVError, match="rope") as caught:
        check_rope(rope, 16)
    assert caught.value.kind is Kind.CONFIG


@pytest.mark.parametrize("rope", [None, b"", rope_of_theta(1e4, 16), rope_of_theta(1e4, 4)])
def test_a_valid_rope_is_accepted(rope) -> None:
    check_rope(rope, 16)
