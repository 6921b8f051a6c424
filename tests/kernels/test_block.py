"""Blocks that train as one node of autograd against those of model.py."""

import copy
import logging
import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distrogpt.kernels import block, build
from distrogpt.kernels.block import CPUBlock, call, unfuse
from distrogpt.kernels.cpu import use_cpu_kernels
from model import GPT, Block, GPTConfig, KVCache

needs_compiler = pytest.mark.skipif(block.kernels() is None, reason="block.cpp cannot be compiled here")
BF16 = torch.bfloat16
VARIANTS = [
    {"activation": "gelu"},
    {"activation": "gelu_tanh", "bias": False, "n_head": 2},
    {"activation": "gelu", "n_kv_head": 1},
    {"activation": "gelu_tanh", "n_embd": 192, "n_head": 2},  # heads of 96 channels
]


def model_of(T: int = 40, **settings: object) -> GPT:
    """A model whose weights, also those of norms and biases, are large enough to matter."""
    torch.manual_seed(0)
    shape = {"block_size": T, "vocab_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 64}
    model = GPT(GPTConfig(**{**shape, **settings})).train()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4) if p.dim() == 2 else p.add_(torch.randn_like(p), alpha=0.2)
    return model


def step(model: GPT, dtype: torch.dtype = BF16, T: int = 40) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients."""
    x, y = torch.randint(32, (2, 3, T), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    torch.manual_seed(2)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        _, loss = model(x, y)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def is_fused(model: GPT, **how: object) -> bool:
    """Whether a training step differs from that of the plain blocks, and by no more than rounding."""
    fused = use_cpu_kernels(model)
    plain = copy.deepcopy(fused)
    for layer in plain.transformer.h:
        layer.__class__ = Block
    (loss, gradients), (expected_loss, expected) = step(fused, **how), step(plain, **how)
    assert loss == pytest.approx(expected_loss, abs=0.02)
    return any(bool((gradients[name] != expected[name]).any()) for name in expected)


@needs_compiler
@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("T", [1, 5, 64, 130])
def test_gradients_are_as_near_to_those_in_fp32_as_autocasts(settings, T):
    model = model_of(T, **settings)
    expected_loss, expected = step(copy.deepcopy(model), torch.float32, T)
    plain, fused = use_cpu_kernels(copy.deepcopy(model)), use_cpu_kernels(copy.deepcopy(model))
    for layer in plain.transformer.h:
        unfuse(layer)
    _, autocast = step(plain, T=T)
    loss, gradients = step(fused, T=T)
    assert loss == pytest.approx(expected_loss, rel=0.003)
    for name, exact in expected.items():
        error, usual = (gradients[name] - exact).norm(), (autocast[name] - exact).norm()
        assert error <= 1.5 * usual + 0.004 * exact.norm() + 1e-9, name
        assert gradients[name].dtype == torch.float32


@needs_compiler
def test_training_gives_the_same_losses():
    curves = []
    for fused in (False, True):
        model = use_cpu_kernels(model_of())
        if not fused:
            for layer in model.transformer.h:
                unfuse(layer)
        optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
        for _ in range(60):
            losses.append(step(model)[0])
            optimizer.step()
        curves.append(losses)
    assert curves[1] != curves[0] and curves[1][-1] < 0.5 * curves[1][0]
    assert curves[1] == pytest.approx(curves[0], rel=0.01, abs=0.02)


# dropout


def masked_weights(p: float, seed: int, B: int, T: int, H: int) -> torch.Tensor:
    """Attention's weights after dropout, (B, H, T, T), for queries of zeros, by values that are one-hot."""
    qkv = torch.zeros(B, T, 3, H, 64, dtype=BF16)
    qkv[:, :, 2] = torch.eye(T, 64)[None, :, None]
    y, lse = torch.empty(B, T, H, 64, dtype=BF16), torch.empty(B, H, T)
    call("attention", B, T, H, H, 64, qkv, y, lse, 0.1, seed, p)
    return y.transpose(1, 2)[..., :T].float()


@needs_compiler
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_attention_drops_its_fraction_and_its_gradient_fits(p):
    B, T, H, D, seed = 3, 64, 2, 64, 12345
    kept = masked_weights(p, seed, B, T, H) > 0
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    assert not bool(kept[..., ~causal].any())
    kept_of_causal = kept[..., causal].float()
    assert abs(kept_of_causal.mean() - (1 - p)) < 0.02
    neighbours = (kept_of_causal[..., 1:] * kept_of_causal[..., :-1]).mean()  # independent of each other
    assert abs(neighbours - (1 - p) ** 2) < 0.03
    assert len({str(mask.tolist()) for mask in kept.flatten(0, 1)}) == B * H  # each head has its own
    other = masked_weights(p, seed + (1 << 32), B, T, H) > 0
    assert abs((kept ^ other)[..., causal].float().mean() - 2 * p * (1 - p)) < 0.03

    torch.manual_seed(0)
    qkv, dy = torch.randn(B, T, 3, H, D).to(BF16), torch.randn(B, T, H, D).to(BF16)
    y, lse, dqkv = torch.empty_like(dy), torch.empty(B, H, T), torch.empty_like(qkv)
    call("attention", B, T, H, H, D, qkv, y, lse, D**-0.5, seed, p)
    call("attention_backward", B, T, H, H, D, qkv, y, dy, lse, D**-0.5, dqkv, seed, p)
    exact = qkv.float().requires_grad_()
    q, k, v = exact.permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT * D**-0.5).masked_fill(~causal, -math.inf)
    expected = (scores.softmax(-1) * kept / (1 - p) @ v).transpose(1, 2)
    expected.backward(dy.float())
    torch.testing.assert_close(y.float(), expected.detach(), atol=0.02, rtol=0.02)
    torch.testing.assert_close(dqkv.float(), exact.grad, atol=0.04, rtol=0.02)


@needs_compiler
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_residual_sum_and_norm_with_dropout_equal_torchs(p):
    N, C, seed = 50, 64, 7
    torch.manual_seed(0)
    x, y, weight, bias = torch.randn(N, C), torch.ones(N, C, dtype=BF16), torch.rand(C) + 0.5, torch.randn(C)
    residual, normed, stats = torch.empty(N, C), torch.empty(N, C, dtype=BF16), torch.empty(2, N)
    call("add_norm", N, C, x, y, residual, weight, bias, normed, stats, seed, p)
    kept = residual - x  # what is left of the ones
    assert abs((kept == 0).float().mean() - p) < 0.03
    torch.testing.assert_close(kept, (kept != 0) / (1 - p), atol=1e-5, rtol=0)
    exact, w, b = residual.clone().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    expected = F.layer_norm(exact, (C,), w, b)
    torch.testing.assert_close(normed.float(), expected.detach(), atol=0.01, rtol=0.005)

    dnormed, dresidual = torch.randn(N, C).to(BF16), torch.randn(N, C)
    dx, dy, dparameters = torch.empty(N, C), torch.empty(N, C, dtype=BF16), torch.empty(2, C)
    call("norm_backward", N, C, dnormed, residual, stats, weight, dresidual, dx, dy, dparameters, seed, p)
    expected.backward(dnormed.float())
    torch.testing.assert_close(dx, exact.grad + dresidual, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(dparameters, torch.stack((w.grad, b.grad)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(dy.float(), dx * (kept != 0) / (1 - p), atol=1e-5, rtol=0.005)
    call("cast", N, C, dx, dy, seed, p)  # the same mask
    torch.testing.assert_close(dy.float(), dx * (kept != 0) / (1 - p), atol=1e-5, rtol=0.005)


@needs_compiler
@pytest.mark.parametrize("tanh", [False, True])
def test_gelu_and_its_gradient_equal_torchs(tanh):
    x = torch.cat(
        [torch.linspace(-12, 12, 4000), torch.tensor([0.0, -0.0, 300, -300, 1e30, -1e30] + 10 * [1])]
    )
    x = x.to(BF16)
    y, dy = F.gelu(x), torch.ones_like(x)
    if tanh:
        call("gelu_tanh", x.numel(), x, y)
    call("gelu_backward", x.numel(), x, dy, tanh)
    exact = x.float().requires_grad_()
    expected = F.gelu(exact, approximate="tanh" if tanh else "none")
    expected.sum().backward()
    finite = x.abs() < 1e20
    torch.testing.assert_close(y.float(), expected.detach(), atol=1e-5, rtol=0.005)
    torch.testing.assert_close(dy.float()[finite], exact.grad[finite], atol=1e-5, rtol=0.005)


@needs_compiler
@pytest.mark.parametrize("branch", ["attn", "mlp"])
def test_the_backward_pass_of_a_block_has_the_forward_passs_masks(branch):
    """The output is linear in the bias of a branch, if that of the MLP has no weights."""
    layer = use_cpu_kernels(model_of(dropout=0.3)).transformer.h[0]
    x, dy = torch.randn(3, 40, 64), torch.randn(3, 40, 64)
    nn.init.zeros_(layer.mlp.c_proj.weight)
    bias = layer.get_parameter(f"{branch}.c_proj.bias")

    def output(value: float) -> torch.Tensor:
        nn.init.constant_(bias, value)
        torch.manual_seed(0)
        with torch.autocast("cpu", BF16):
            return layer(x, x, torch.arange(40)[None], None, None, None)

    y = output(0.0)
    y.backward(dy)
    change = ((output(64.0) - y) * dy).sum((0, 1)) / 64
    torch.testing.assert_close(bias.grad, change.detach(), atol=0.3, rtol=0.02)
    assert (bias.grad - dy.sum((0, 1))).abs().max() > 1  # some of dy is dropped


@needs_compiler
def test_dropout_depends_on_the_seed_alone_and_is_recomputed():
    model = use_cpu_kernels(model_of(dropout=0.2))
    loss, gradients = step(model)
    again, same = step(model)
    model.activation_checkpointing = True
    recomputed, also = step(model)
    assert loss == again == recomputed
    for name, expected in gradients.items():
        assert bool((same[name] == expected).all()) and bool((also[name] == expected).all())
    quiet, _ = step(use_cpu_kernels(model_of()))
    assert loss != quiet and loss == pytest.approx(quiet, rel=0.2)


@needs_compiler
def test_values_that_are_not_finite_reach_loss_and_gradients():
    for bad in (math.nan, math.inf):
        for name in ("attn.c_attn.weight", "mlp.c_fc.weight", "ln_2.weight"):
            model = use_cpu_kernels(model_of())
            with torch.no_grad():
                model.transformer.h[0].get_parameter(name).view(-1)[3] = bad
            loss, gradients = step(model)
            assert not math.isfinite(loss)
            assert not all(bool(g.isfinite().all()) for g in gradients.values())


# what is not covered


@needs_compiler
def test_only_training_in_bf16_is_fused(monkeypatch):
    assert is_fused(model_of())
    assert not is_fused(model_of(), dtype=torch.float32)
    assert is_fused(model_of(n_kv_head=2))
    for other in (
        {"norm": "rmsnorm"}, {"rotary": True}, {"qk_norm": True}, {"key_offset": True},
        {"embedding_skip": True}, {"activation": "swiglu"}, {"activation": "relu2"},
        {"n_head": 8},  # heads of 8 channels
    ):  # fmt: skip
        assert not is_fused(model_of(**other)), other
    monkeypatch.setattr(block, "LONGEST", 39)
    assert not is_fused(model_of())
    sixteen = model_of()
    sixteen.transformer.h[0].mlp.c_proj.bfloat16()
    monkeypatch.undo()
    layer, x = use_cpu_kernels(sixteen).transformer.h[0], torch.randn(1, 8, 64)
    with torch.autocast("cpu", BF16):
        y = layer(x, x, torch.arange(8)[None], None, None, None)
    assert "BlockFunction" not in str(y.grad_fn)


@needs_compiler
def test_inference_masks_and_caches_use_the_plain_block():
    model = model_of(dropout=0.2)
    fused, plain = use_cpu_kernels(copy.deepcopy(model)), use_cpu_kernels(copy.deepcopy(model))
    for layer in plain.transformer.h:
        unfuse(layer)
    assert type(fused.transformer.h[0]) is CPUBlock and type(plain.transformer.h[0]) is Block
    idx, at, mask = torch.randint(32, (2, 8)), torch.arange(8)[None], torch.zeros(1, 1, 8, 8)
    with torch.autocast("cpu", BF16):
        masked = []
        for m in (fused, plain):
            torch.manual_seed(0)
            masked.append(m.hidden_states(idx, at, mask))
        assert bool((masked[0] == masked[1]).all())
        for m in (fused, plain):
            m.eval()
        assert bool((fused(idx)[0] == plain(idx)[0]).all())  # with gradients
        with torch.no_grad():
            caches = [KVCache(model.config, 2, 8) for _ in range(2)]
            cached = [m.hidden_states(idx, at, None, cache)
                      for m, cache in zip((fused, plain), caches, strict=True)]  # fmt: skip
            assert bool((cached[0] == cached[1]).all()) and bool((caches[0].kv == caches[1].kv).all())


@needs_compiler
def test_compiled_models_are_traced_through_the_layers():
    model = use_cpu_kernels(model_of())
    expected, _ = step(copy.deepcopy(model))
    compiled = torch.compile(model, backend="aot_eager")
    loss, _ = step(compiled)
    assert loss == pytest.approx(expected, rel=0.003)


# the compiler


@pytest.fixture
def fresh_compiler(monkeypatch, tmp_path) -> Iterator[None]:
    monkeypatch.setenv("HOME", str(tmp_path))
    functions = (block.kernels, build.build_error, build.library)
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


@needs_compiler
def test_without_a_compiler_the_layers_train(fresh_compiler, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(logging.getLogger("distrogpt"), "propagate", True)
    with caplog.at_level(logging.INFO, "distrogpt"):
        assert not is_fused(model_of())
    (note,) = {record.message for record in caplog.records if "training" in record.message}
    assert note.startswith("note     training is slower than it could be: ")


def test_names_of_weights_stay_and_copies_train():
    model = model_of()
    names = list(model.state_dict())
    use_cpu_kernels(model)
    assert list(model.state_dict()) == names and isinstance(model.transformer.h[0], nn.Module)
    loss, _ = step(copy.deepcopy(model))
    assert loss == step(model)[0]
