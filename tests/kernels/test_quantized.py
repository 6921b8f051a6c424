"""Packed and 8-bit weights: products near those of nn.Linear."""

import copy

import pytest
import torch

from distrogpt.kernels.quantized import Int8Linear, PackedLinear


@pytest.mark.parametrize(("layer", "error"), [(PackedLinear, 0.004), (Int8Linear, 0.012)])
@pytest.mark.parametrize("rows", [1, 3, 20])  # few and many rows take different kernels
@pytest.mark.parametrize("bias", [True, False])
def test_products_with_packed_and_8_bit_weights_are_nearly_exact(layer, error, rows, bias):
    """In theory: 2^-9 / sqrt(3) for each bf16 factor; for 8 bits a step of 4 sigma / 127 over sqrt(12)."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(768, 300, bias=bias), torch.randn(rows, 1, 768)
    torch.nn.init.normal_(linear.weight)
    if bias:
        torch.nn.init.normal_(linear.bias, std=768**0.5)  # as large as the products
    with torch.no_grad():
        exact, result = linear(x), layer(copy.deepcopy(linear).bfloat16())(x.bfloat16()).float()
    assert result.shape == exact.shape
    assert (result - exact).norm() < error * exact.norm()


@pytest.mark.parametrize("width", [30, 40, 48, 100])  # torch's kernel takes multiples of 16 only
@pytest.mark.parametrize("outputs", [1, 7, 64])
def test_8_bit_products_of_any_width(width, outputs):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(width, outputs), torch.randn(2, width)
    with torch.no_grad():
        exact, result = linear(x), Int8Linear(copy.deepcopy(linear).bfloat16())(x.bfloat16()).float()
    assert (result - exact).norm() < 0.03 * exact.norm()


def test_8_bit_weights_are_rounded_to_the_nearest_step():
    linear = torch.nn.Linear(40, 30)
    packed = Int8Linear(linear)
    back = packed.weight.float() * packed.scale.float()[:, None]
    assert packed.weight.dtype == torch.int8
    error = (back - linear.weight).abs() / packed.scale.float()[:, None]  # in steps
    assert error.max() <= 0.75  # above 0.5, as values over 127 steps are clamped
