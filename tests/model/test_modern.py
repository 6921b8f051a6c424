"""Combinations of GPTConfig's settings: against the formulas in float64, trained, sampled and saved."""

import copy
import itertools
import math
import random
from dataclasses import fields

import pytest
import torch
from torch.nn import functional as F

from distrogpt import settings as settings_file
from distrogpt.checkpoint import (
    atomic_write,
    load_checkpoint,
    restore_model,
    restore_optimizers,
    training_state,
)
from distrogpt.inference.decoder import decode, optimize_for_inference, prefill, stream
from distrogpt.inference.sampling import SamplingParams
from distrogpt.kernels.cpu import use_cpu_kernels
from distrogpt.runtime import Runtime
from distrogpt.settings import TrainConfig
from distrogpt.training.batches import MicroBatch
from distrogpt.training.optim import make_optimizers
from model import ACTIVATIONS, GPT, NORMS, GPTConfig, KVCache
from train import training_step

SMALL = {"block_size": 16, "vocab_size": 24, "n_layer": 2, "n_head": 4, "n_embd": 24}
VALUES = {
    "bias": (False, True),
    "activation": ("gelu_tanh", "relu2", "swiglu"),
    "norm": ("layernorm", "rmsnorm"),
    "rotary": (False, True),
    "qk_norm": (False, True),
    "n_kv_head": (None, 2, 1),
    "tied": (True, False),
    "logit_softcap": (0.0, 3.0),
    "embedding_skip": (False, True),
    "key_offset": (False, True),
    "zero_init": (False, True),
}
ALL = [dict(zip(VALUES, values, strict=True)) for values in itertools.product(*VALUES.values())]
MODERN = {name: values[1] for name, values in VALUES.items()}


def random_model(cpu_kernels: bool = False, **settings) -> GPT:
    """A model whose weights are all random, also those that are initialised as zeros or ones."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **settings})).eval()
    if cpu_kernels:
        use_cpu_kernels(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape)
    return model


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(24, shape, generator=torch.Generator().manual_seed(1))


def reference(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) by the formulas, in float64."""
    c, w = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    T, D = idx.size(1), c.n_embd // c.n_head

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(1).double())

    def norm(x, name):
        if c.norm == "rmsnorm":
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

    def head(x):  # queries or keys (B, T, D), normalised and rotated
        if c.qk_norm:
            x = x * math.sqrt(D) / (x.pow(2).sum(-1, keepdim=True) + D * 1e-6).sqrt()
        if c.rotary:
            x = x.clone()
            for t in range(T):
                for i in range(0, D, 2):
                    angle = t / 10_000 ** (i / D)
                    a, b = x[:, t, i].clone(), x[:, t, i + 1].clone()
                    x[:, t, i] = a * math.cos(angle) - b * math.sin(angle)
                    x[:, t, i + 1] = a * math.sin(angle) + b * math.cos(angle)
        return x

    def key(x):
        x = head(x)
        if c.key_offset:
            before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
            x = torch.where(torch.arange(D) < D // 2, x, before)
        return x

    x = w["transformer.wte.weight"][idx]
    if not c.rotary:
        x = x + w["transformer.wpe.weight"][:T]
    x0, later = x, torch.ones(T, T).triu(1).bool()
    K = c.n_kv_head or c.n_head
    for i in range(c.n_layer):
        block = f"transformer.h.{i}"
        if c.embedding_skip:
            x = w[f"{block}.skip"][0] * x + w[f"{block}.skip"][1] * x0
        parts = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(D, dim=-1)
        heads = []
        for h in range(c.n_head):
            kv = h // (c.n_head // K)
            q, k, v = head(parts[h]), key(parts[c.n_head + kv]), parts[c.n_head + K + kv]
            scores = q @ k.mT * (12 / D if c.qk_norm else 1 / math.sqrt(D))
            heads.append(scores.masked_fill(later, -math.inf).softmax(-1) @ v)
        x = x + linear(torch.cat(heads, -1), f"{block}.attn.c_proj")
        h = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        if c.activation == "gelu_tanh":
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        elif c.activation == "relu2":
            h = h.clamp(min=0) ** 2
        else:
            gate, up = h[..., : h.size(-1) // 2], h[..., h.size(-1) // 2 :]
            h = gate / (1 + (-gate).exp()) * up
        x = x + linear(h, f"{block}.mlp.c_proj")
    logits = norm(x, "transformer.ln_f") @ w["lm_head.weight"].T
    return c.logit_softcap * torch.tanh(logits / c.logit_softcap) if c.logit_softcap else logits


COMBINATIONS = random.Random(0).sample(ALL, 200)  # every triple of values


def test_combinations_include_each_triple_of_values():
    assert len(ALL) == 2**9 * 9
    for names in itertools.combinations(VALUES, 3):
        expected = set(itertools.product(*(VALUES[name] for name in names)))
        assert {tuple(values[name] for name in names) for values in COMBINATIONS} == expected, names


@pytest.mark.parametrize("part", range(4))
def test_logits_of_each_combination_follow_the_formulas(part):
    idx = ids(2, 7)
    for number, settings in enumerate(COMBINATIONS[part::4]):
        model = random_model(cpu_kernels=number % 2 == 0, **settings)
        logits, loss = model(idx, idx)
        expected = reference(model, idx)
        assert expected.std() > 0.1
        torch.testing.assert_close(logits.double(), expected, atol=2e-4, rtol=1e-3, msg=str(settings))
        loss.backward()
        assert all(bool(p.grad.any()) for p in model.parameters()), settings  # every weight has a gradient
        expected_loss = F.cross_entropy(expected.flatten(0, 1), idx.flatten())
        assert loss.item() == pytest.approx(expected_loss.item(), 1e-3)


@pytest.mark.parametrize("part", range(4))
def test_each_combination_samples_the_same_with_and_without_the_cache(part):
    """Also past block_size: 20 tokens after a prompt of 5, in a block of 16."""
    for number, settings in enumerate(COMBINATIONS[part::4]):
        model = random_model(cpu_kernels=number % 2 == 0, **settings)
        steps = stream(model, ids(2, 5), SamplingParams(0.0), torch.zeros(2, 20))
        sampled = torch.cat([ids(2, 5), *(new_ids for new_ids, _ in steps)], dim=1)
        window = idx = ids(2, 5)
        for _ in range(20):
            with torch.no_grad():
                next_id = model(window)[0][:, -1].argmax(-1, keepdim=True)
            idx = torch.cat([idx, next_id], dim=1)
            window = torch.cat([window, next_id], dim=1)
            window = window[:, -12:] if window.size(1) > 16 else window  # the last three quarters
        assert torch.equal(sampled, idx), settings


@pytest.mark.parametrize("part", range(4))
def test_each_combination_trains_and_resumes_bit_for_bit(part, tmp_path):
    runtime, scaler = Runtime(torch.device("cpu"), torch.bfloat16), torch.amp.GradScaler("cpu", enabled=False)
    batches = [MicroBatch(ids(4, 17)[:, :-1], ids(4, 17)[:, 1:], 0)]
    path = tmp_path / "ckpt.pt"
    for number, settings in enumerate(COMBINATIONS[part::4]):
        optimizer = ("adamw", "muon", "sgd")[number % 3]
        config = TrainConfig(optimizer=optimizer, learning_rate=1e-2, n_layer=2, n_head=4, n_embd=24)
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SMALL, **settings))
        initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizers = make_optimizers(model, config, runtime)
        losses = [training_step(model, optimizers, scaler, batches, 1.0, runtime).loss for _ in range(4)]
        assert losses[3] < losses[0], settings
        if optimizer != "sgd":  # whose steps are as small as the gradients
            unchanged = [
                name for name, tensor in model.state_dict().items() if torch.equal(initial[name], tensor)
            ]
            assert unchanged == [], settings

        state = training_state(model, optimizers, iter_num=4, best_val_loss=1.0)
        atomic_write(lambda file, state=state: torch.save(state, file), path)
        contents = load_checkpoint(path)
        restored = restore_model(contents, path)
        assert restored.config == model.config
        restored_optimizers = make_optimizers(restored, config, runtime)
        restore_optimizers(restored_optimizers, contents, tmp_path)
        for m, its_optimizers in ((model, optimizers), (restored, restored_optimizers)):
            training_step(m, its_optimizers, scaler, batches, 1.0, runtime)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, restored.state_dict()[name]), (settings, name)


@pytest.mark.parametrize("static", [False, True])  # static: as on a GPU, with a mask over the whole cache
@pytest.mark.parametrize("settings", [{}, MODERN, {"cpu_kernels": True}, {**MODERN, "cpu_kernels": True}])
def test_decoding_gives_the_logits_of_a_forward_pass(settings, static):
    model, idx = random_model(**settings), ids(2, 16)
    with torch.no_grad():
        expected = model(idx, targets=idx)[0]  # (B, T, V)
        cache = KVCache(model.config, 2, 16)
        logits = prefill(model, idx[:, :9], torch.tensor([4, 4]), cache)  # later tokens have no effect
        torch.testing.assert_close(logits, expected[:, 4], atol=1e-4, rtol=1e-4)
        for t in range(5, 16):
            cache.length = 16 if static else t + 1
            logits = decode(model, idx[:, t : t + 1], torch.tensor([[t]] * (1 + t % 2)), cache)
            torch.testing.assert_close(logits, expected[:, t], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("int8", [False, True])
def test_a_modern_model_optimized_for_inference_has_nearly_the_same_logits(int8):
    model, idx = random_model(**{**MODERN, "n_embd": 64, "activation": "swiglu"}), ids(2, 16)
    optimized = optimize_for_inference(copy.deepcopy(model), torch.bfloat16, int8)
    with torch.no_grad():
        expected, logits = model(idx, idx)[0], optimized(idx, idx)[0].float()
    assert (logits - expected).abs().mean() < 0.1 * expected.std()
    assert len(list(stream(optimized, idx[:, :3], SamplingParams(0.8, 5), torch.rand(2, 10)))) == 10


def test_train_config_and_gpt_config_have_the_same_names():
    assert set(settings_file.ACTIVATIONS) == set(ACTIVATIONS) and set(settings_file.NORMS) == set(NORMS)
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    of_loaded_weights = {
        "vocab_size",
        "qk_norm_weights",
    }  # the dataset's, and those that a Qwen3 brings along
    assert {field.name for field in fields(GPTConfig)} - set(defaults) == of_loaded_weights
    changed = {f.name for f in fields(GPTConfig) if f.name in defaults and f.default != defaults[f.name]}
    assert changed == {"bias"}  # as in nanoGPT


def test_zero_init_starts_with_uniform_probabilities():
    model = GPT(GPTConfig(**SMALL, zero_init=True, tied=False))
    assert model(ids(2, 7), ids(2, 7))[1].item() == pytest.approx(math.log(24), rel=1e-6)
    transformer = GPT(GPTConfig(**SMALL, zero_init=True)).transformer
    x = torch.randn(1, 3, 24)
    assert torch.equal(transformer.h[0](x, x, None, None, None, None), x)


def test_parameters_of_embeddings_are_not_counted():
    tied, untied = GPT(GPTConfig(**SMALL)), GPT(GPTConfig(**SMALL, tied=False, rotary=True))
    assert untied.get_num_params() == tied.get_num_params()  # a product with C x V weights at the end
    assert untied.get_num_params(non_embedding=False) == tied.get_num_params(False) + 24 * 24 - 16 * 24


def test_fewer_key_value_heads_make_the_cache_smaller():
    sizes = []
    for heads in (4, 1):
        config = GPTConfig(**SMALL, n_kv_head=heads)
        sizes.append(KVCache(config, 1, 16).kv.numel())
    assert sizes[0] == 4 * sizes[1]


def test_crop_block_size_of_a_rotary_model_keeps_its_logits():
    model = random_model(**MODERN)
    with torch.no_grad():
        before, _ = model(ids(2, 8), ids(2, 8))
        model.crop_block_size(8)
        after, _ = model(ids(2, 8), ids(2, 8))
    assert torch.equal(before, after) and model.config.block_size == 8


@pytest.mark.parametrize("cpu_kernels", [False, True])
def test_a_branch_under_a_mask_gives_what_it_gives_alone(cpu_kernels):
    """Two continuations of a context in one row, as eval.py has the endings of a question."""
    model, context, first, second = (
        random_model(cpu_kernels, **MODERN),
        ids(1, 5),
        ids(1, 3),
        ids(1, 9)[:, 5:],
    )
    row = torch.cat((context, first, second), dim=1)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8]])
    mask = torch.full((12, 12), -math.inf).triu(1)
    mask[8:, 5:8] = -math.inf
    with torch.no_grad():
        x = model.hidden_states(row, positions, mask[None, None])
        torch.testing.assert_close(x[:, :8], model.hidden_states(row[:, :8]), atol=1e-4, rtol=1e-4)
        alone = model.hidden_states(torch.cat((context, second), dim=1))
    torch.testing.assert_close(x[:, 8:], alone[:, 5:], atol=1e-4, rtol=1e-4)
