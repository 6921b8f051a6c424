"""Every combination of GPTConfig's settings: against the formulas in float64, trained, sampled, saved."""

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
    "zero_init": (False, True),
}
ALL = [dict(zip(VALUES, values, strict=True)) for values in itertools.product(*VALUES.values())]
MODERN = {name: values[1] for name, values in VALUES.items()}


def made(cpu_kernels: bool = False, **settings) -> GPT:
    """A model in which everything matters: all weights are random, also those that begin as zeros or ones."""
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
    """Logits (B, T, V) by the formulas, in float64, a head and a position at a time where that is plain."""
    c, w = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    T, D = idx.size(1), c.n_embd // c.n_head

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(1).double())

    def norm(x, name):
        if c.norm == "rmsnorm":
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

    def head(x):  # queries or keys (B, T, D), normalised and turned
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

    x = w["transformer.wte.weight"][idx]
    if not c.rotary:
        x = x + w["transformer.wpe.weight"][:T]
    embedded, later = x, torch.ones(T, T).triu(1).bool()
    K = c.n_kv_head or c.n_head
    for i in range(c.n_layer):
        block = f"transformer.h.{i}"
        if c.embedding_skip:
            x = w[f"{block}.skip"][0] * x + w[f"{block}.skip"][1] * embedded
        parts = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(D, dim=-1)
        read = []
        for h in range(c.n_head):
            kv = h // (c.n_head // K)
            q, k, v = head(parts[h]), head(parts[c.n_head + kv]), parts[c.n_head + K + kv]
            scores = q @ k.mT * (12 / D if c.qk_norm else 1 / math.sqrt(D))
            read.append(scores.masked_fill(later, -math.inf).softmax(-1) @ v)
        x = x + linear(torch.cat(read, -1), f"{block}.attn.c_proj")
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


PICKED = random.Random(0).sample(ALL, 200)  # enough for each triple of values; four processes share them


def test_what_is_picked_has_each_triple_of_values():
    assert len(ALL) == 2**8 * 9
    for names in itertools.combinations(VALUES, 3):
        wanted = set(itertools.product(*(VALUES[name] for name in names)))
        assert {tuple(picked[name] for name in names) for picked in PICKED} == wanted, names


@pytest.mark.parametrize("part", range(4))
def test_each_combination_gives_the_formulas_logits(part):
    idx = ids(2, 7)
    for number, settings in enumerate(PICKED[part::4]):
        model = made(cpu_kernels=number % 2 == 0, **settings)
        logits, loss = model(idx, idx)
        expected = reference(model, idx)
        assert expected.std() > 0.1
        torch.testing.assert_close(logits.double(), expected, atol=2e-4, rtol=1e-3, msg=str(settings))
        loss.backward()
        assert all(bool(p.grad.any()) for p in model.parameters()), settings  # every weight learns
        wanted = F.cross_entropy(expected.flatten(0, 1), idx.flatten())
        assert loss.item() == pytest.approx(wanted.item(), 1e-3)


@pytest.mark.parametrize("part", range(4))
def test_each_combination_samples_with_the_cache_as_without(part):
    """Also where the block is full and the window slides: 20 tokens after a prompt of 5, a block of 16."""
    for number, settings in enumerate(PICKED[part::4]):
        model = made(cpu_kernels=number % 2 == 0, **settings)
        found = torch.cat(
            [
                ids(2, 5),
                *(new for new, _ in stream(model, ids(2, 5), SamplingParams(0.0), torch.zeros(2, 20))),
            ],
            dim=1,
        )
        window = idx = ids(2, 5)
        for _ in range(20):
            with torch.no_grad():
                next_id = model(window)[0][:, -1].argmax(-1, keepdim=True)
            idx = torch.cat([idx, next_id], dim=1)
            window = torch.cat([window, next_id], dim=1)
            window = window[:, -12:] if window.size(1) > 16 else window  # the last three quarters
        assert torch.equal(found, idx), settings


@pytest.mark.parametrize("part", range(4))
def test_each_combination_trains_is_saved_and_goes_on_bit_for_bit(part, tmp_path):
    place, scaler = Runtime(torch.device("cpu"), torch.bfloat16), torch.amp.GradScaler("cpu", enabled=False)
    batches = [MicroBatch(ids(4, 17)[:, :-1], ids(4, 17)[:, 1:], 0)]
    path = tmp_path / "ckpt.pt"
    for number, settings in enumerate(PICKED[part::4]):
        optimizer = ("adamw", "muon", "sgd")[number % 3]
        config = TrainConfig(optimizer=optimizer, learning_rate=1e-2, n_layer=2, n_head=4, n_embd=24)
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SMALL, **settings))
        begin = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizers = make_optimizers(model, config, "cpu", torch.bfloat16)
        losses = [training_step(model, optimizers, scaler, batches, 1.0, place).loss for _ in range(4)]
        assert losses[3] < losses[0], settings
        if optimizer != "sgd":  # whose steps are as small as the gradients
            same = [name for name, tensor in model.state_dict().items() if torch.equal(begin[name], tensor)]
            assert same == [], settings

        state = training_state(model, optimizers, iter_num=4, best_val_loss=1.0)
        atomic_write(lambda file, state=state: torch.save(state, file), path)
        contents = load_checkpoint(path)
        restored = restore_model(contents, path)
        assert restored.config == model.config
        others = make_optimizers(restored, config, "cpu", torch.bfloat16)
        restore_optimizers(others, contents, tmp_path)
        for one, its in ((model, optimizers), (restored, others)):
            training_step(one, its, scaler, batches, 1.0, place)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, restored.state_dict()[name]), (settings, name)


@pytest.mark.parametrize("static", [False, True])  # static: as on a GPU, with a mask over the whole cache
@pytest.mark.parametrize("settings", [{}, MODERN, {"cpu_kernels": True}, {**MODERN, "cpu_kernels": True}])
def test_decoding_scores_each_position_as_the_whole_sequence_does(settings, static):
    model, idx = made(**settings), ids(2, 16)
    with torch.no_grad():
        expected = model(idx, targets=idx)[0]  # (B, T, V)
        cache = KVCache(model.config, 2, 16)
        found = prefill(model, idx[:, :9], torch.tensor([4, 4]), cache)  # what is behind has no effect
        torch.testing.assert_close(found, expected[:, 4], atol=1e-4, rtol=1e-4)
        for t in range(5, 16):
            cache.length = 16 if static else t + 1
            found = decode(model, idx[:, t : t + 1], torch.tensor([[t]] * (1 + t % 2)), cache)
            torch.testing.assert_close(found, expected[:, t], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("int8", [False, True])
def test_a_modern_model_made_ready_to_decode_scores_nearly_the_same(int8):
    model, idx = made(**{**MODERN, "n_embd": 64, "activation": "swiglu"}), ids(2, 16)
    ready = optimize_for_inference(copy.deepcopy(model), torch.bfloat16, int8)
    with torch.no_grad():
        expected, found = model(idx, idx)[0], ready(idx, idx)[0].float()
    assert (found - expected).abs().mean() < 0.1 * expected.std()
    assert len(list(stream(ready, idx[:, :3], SamplingParams(0.8, 5), torch.rand(2, 10)))) == 10


def test_settings_and_network_know_the_same_names():
    assert set(settings_file.ACTIVATIONS) == set(ACTIVATIONS) and set(settings_file.NORMS) == set(NORMS)
    theirs = {field.name: field.default for field in fields(TrainConfig)}
    assert {field.name for field in fields(GPTConfig)} - set(theirs) == {"vocab_size"}
    changed = {f.name for f in fields(GPTConfig) if f.name in theirs and f.default != theirs[f.name]}
    assert changed == {"bias"}  # as in nanoGPT


def test_zero_init_begins_with_equal_chances():
    model = GPT(GPTConfig(**SMALL, zero_init=True, tied=False))
    assert model(ids(2, 7), ids(2, 7))[1].item() == pytest.approx(math.log(24), rel=1e-6)
    blocks_of = GPT(GPTConfig(**SMALL, zero_init=True)).transformer
    x = torch.randn(1, 3, 24)
    assert torch.equal(blocks_of.h[0](x, x), x)


def test_parameters_are_counted_as_they_are_used():
    tied, untied = GPT(GPTConfig(**SMALL)), GPT(GPTConfig(**SMALL, tied=False, rotary=True))
    assert untied.get_num_params() == tied.get_num_params()  # a product with C x V weights at the end
    assert untied.get_num_params(non_embedding=False) == tied.get_num_params(False) + 24 * 24 - 16 * 24


def test_fewer_heads_of_keys_and_values_make_a_smaller_cache():
    sizes = []
    for heads in (4, 1):
        config = GPTConfig(**SMALL, n_kv_head=heads)
        sizes.append(KVCache(config, 1, 16).kv.numel())
    assert sizes[0] == 4 * sizes[1]


def test_a_rotary_model_is_cropped_and_keeps_its_logits():
    model = made(**MODERN)
    with torch.no_grad():
        before, _ = model(ids(2, 8), ids(2, 8))
        model.crop_block_size(8)
        after, _ = model(ids(2, 8), ids(2, 8))
    assert torch.equal(before, after) and model.config.block_size == 8
