"""The CPU layers against those of model.py."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distrogpt.kernels import replace_layers
from distrogpt.kernels.cpu import CPUAttention, CPUDropout, CPURMSNorm, CPURotary, dropout, use_cpu_kernels
from model import GPT, Attention, GPTConfig, RMSNorm, Rotary, rotary_cos_sin


@pytest.mark.parametrize("T", [1, 5, 128, 129, 300, 700])
def test_attention_equals_torchs(T):
    qkv = torch.randn(3, 2, 3, T, 8, generator=torch.Generator().manual_seed(T)).requires_grad_()
    gradient = torch.randn(2, 3, T, 8, generator=torch.Generator().manual_seed(1))
    plain, ours = Attention(8**-0.5, 0.0), CPUAttention(8**-0.5, 0.0)
    expected = plain(*qkv)
    (expected_gradient,) = torch.autograd.grad(expected, qkv, gradient)
    y = ours(*qkv)
    (result,) = torch.autograd.grad(y, qkv, gradient)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result, expected_gradient, atol=2e-5, rtol=1e-5)
    in_bf16 = ours(*qkv.detach().bfloat16())
    assert in_bf16.dtype == torch.bfloat16
    torch.testing.assert_close(in_bf16.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("T", "masks"), [(1, 1), (1, 2), (5, 2)])
@pytest.mark.parametrize("K", [4, 2])
def test_attention_with_a_mask_equals_torchs(T, masks, K):
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 4, T, 8), torch.randn(2, 2, K, 16, 8)
    mask = torch.zeros(masks, 1, T, 16).masked_fill_(torch.rand(masks, 1, T, 16) < 0.5, -math.inf)
    mask[..., 0] = 0
    expected = Attention(0.3, 0.0)(q, k, v, mask)
    torch.testing.assert_close(CPUAttention(0.3, 0.0)(q, k, v, mask), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.2, 0.5, 0.999])
def test_dropout_drops_its_fraction_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(1000, 1003, requires_grad=True)
    y = dropout(x, p)
    dropped = (y == 0).float().mean().item()
    assert abs(dropped - p) < 1 / 256
    scale = 1 / (1 - round(dropped * 256) / 256)
    assert len(y.unique()) == 2 and y.max().item() == pytest.approx(scale, 1e-3)
    y.sum().backward()
    assert bool((x.grad == y).all())  # the same mask in the backward pass
    layer = CPUDropout(p)
    assert layer.eval()(x) is x
    torch.manual_seed(0)
    assert bool((layer.train()(x) == y).all())
    if 0.05 < p < 0.95:  # neighbours are dropped independently of each other
        is_zero = (y == 0).float()
        assert abs((is_zero[:, 1:] * is_zero[:, :-1]).mean().item() - dropped**2) < 0.003


def test_rms_norm_has_torchs_values_and_gradients():
    x = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(0)).mul_(3).requires_grad_()
    gradient = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(1))
    expected = F.rms_norm(x, (12,), eps=1e-6)
    (expected_gradient,) = torch.autograd.grad(expected, x, gradient)
    norm = CPURMSNorm()
    (result,) = torch.autograd.grad(norm(x), x, gradient)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(result, expected_gradient)
    assert norm(torch.zeros(2, 4)).tolist() == [[0.0] * 4] * 2


def test_rotary_equals_the_plain_layer_also_compiled():
    x, cos_sin = torch.randn(2, 3, 5, 8, requires_grad=True), rotary_cos_sin(torch.arange(5)[None], 8)
    expected, layer = Rotary()(x, cos_sin), CPURotary()
    torch.testing.assert_close(layer(x, cos_sin), expected)
    torch.testing.assert_close(torch.compile(layer, backend="eager")(x, cos_sin), expected)
    # a rotation keeps lengths, and q·k depends on the distance only
    rotated = layer(x[:1, :1, :1].expand(1, 1, 5, 8), cos_sin)[0, 0]
    torch.testing.assert_close(rotated.norm(dim=-1), x[0, 0, 0].norm().expand(5))
    torch.testing.assert_close(rotated[1] @ rotated[3], rotated[0] @ rotated[2])


def test_layers_are_replaced_in_one_model_only():
    config = GPTConfig(8, 16, 2, 2, 16, dropout=0.1, norm="rmsnorm", rotary=True, qk_norm=True)
    model, other = GPT(config), GPT(config).eval()
    names = list(model.state_dict())
    use_cpu_kernels(model)
    plain = {nn.Dropout, RMSNorm, Rotary, Attention}
    assert not plain & {type(layer) for layer in model.modules()}
    assert plain < {type(layer) for layer in other.modules()}
    assert list(model.state_dict()) == names and all(layer.training for layer in model.modules())
    replace_layers(other, {nn.Dropout: lambda layer: nn.Identity()})
    assert not any(layer.training for layer in other.modules())
