"""The model against transformers' GPT-2, and properties that it must have."""

import math

import pytest
import torch
from torch.nn import functional as F

from distrogpt.inference.decoder import stream
from distrogpt.inference.sampling import SamplingParams, sample_token, uniform_noise
from model import GPT, GPTConfig

SMALL = {"block_size": 32, "vocab_size": 96, "n_layer": 3, "n_head": 4, "n_embd": 32}


def small(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **changes})).eval()


def random_ids(*shape: int, vocab_size: int = 96) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def hf_gpt2(tmp_path_factory):
    """transformers' GPT-2 with random weights, large enough to tell formulas apart; and its folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    shape = {"n_positions": 32, "vocab_size": 96, "n_layer": 3, "n_head": 4, "n_embd": 32}
    theirs = GPT2LMHeadModel(
        GPT2Config(**shape, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(folder)
    return theirs, folder


@pytest.mark.parametrize("vocab_size", [96, 1000, 50257, 50304])
def test_loss_at_initialisation_is_that_of_uniform_probabilities(vocab_size):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=vocab_size, block_size=64, n_layer=4, n_head=4, n_embd=128))
    idx = random_ids(8, 65, vocab_size=vocab_size)
    _, loss = model(idx[:, :-1], idx[:, 1:])
    assert loss.item() == pytest.approx(math.log(vocab_size), rel=0.02)


def test_gpt2_has_124_million_parameters_under_its_names():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))
    assert model.get_num_params(non_embedding=False) == 124_439_808
    assert model.get_num_params() == 124_439_808 - 1024 * 768
    names = set(model.state_dict())
    assert len(names) == 149
    assert {
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "transformer.ln_f.bias",
        "lm_head.weight",
    } < names
    in_a_block = {name.removeprefix("transformer.h.11.") for name in names if ".h.11." in name}
    layers = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    assert in_a_block == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_initialisation_is_gpt2s():
    model = GPT(GPTConfig(block_size=256, vocab_size=1000, n_layer=8, n_head=4, n_embd=256))
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05), name
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name


def test_logits_and_loss_equal_transformers(hf_gpt2):
    theirs, folder = hf_gpt2
    ours = GPT.from_pretrained(str(folder)).eval()
    idx = random_ids(4, 33)
    with torch.no_grad():
        logits, loss = ours(idx[:, :-1], idx[:, 1:])
        expected = theirs(idx[:, :-1]).logits
    assert expected.std() > 1  # not a comparison of zeros
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    expected_loss = F.cross_entropy(expected.reshape(-1, 96).double(), idx[:, 1:].reshape(-1))
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-4)
    with torch.no_grad():
        exact = GPT(GPTConfig(**SMALL, activation="gelu")).eval()
        exact.load_state_dict(ours.state_dict())
        other = exact(idx[:, :-1], idx[:, 1:])[0]
        assert (other - expected).abs().max() > 1e-3  # the test can tell GELUs apart


def test_greedy_generation_equals_transformers(hf_gpt2):
    theirs, folder = hf_gpt2
    ours = GPT.from_pretrained(str(folder)).eval()
    idx = random_ids(2, 4)
    expected = theirs.generate(idx, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert ours.generate(idx, 20, temperature=0).tolist() == expected.tolist()


def test_from_pretrained_overrides_dropout_only(hf_gpt2):
    _, folder = hf_gpt2
    assert GPT.from_pretrained(str(folder), {"dropout": 0.25}).config.dropout == 0.25
    with pytest.raises(ValueError, match="only dropout"):
        GPT.from_pretrained(str(folder), {"n_layer": 2})


def test_from_pretrained_refuses_other_networks(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_positions": 8, "vocab_size": 16, "n_layer": 1, "n_head": 1, "n_embd": 8}
    GPT2LMHeadModel(GPT2Config(**shape, activation_function="relu")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="activation_function=relu"):
        GPT.from_pretrained(str(tmp_path))


def test_from_pretrained_refuses_weights_that_are_missing_or_not_finite(hf_gpt2, tmp_path):
    from safetensors.torch import load_file, save_file

    _, folder = hf_gpt2
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = load_file(folder / "model.safetensors")
    fewer = {
        name: tensor
        for name, tensor in weights.items()
        if ".h.1." not in name and not name.startswith("h.1.")
    }
    assert len(fewer) == len(weights) - 12
    save_file(fewer, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing, NaN or infinite"):
        GPT.from_pretrained(str(tmp_path))
    weights["transformer.ln_f.bias"][3] = math.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing, NaN or infinite"):
        GPT.from_pretrained(str(tmp_path))


def test_attention_is_causal():
    model = small()
    idx = random_ids(1, 16)
    changed = idx.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 96
    with torch.no_grad():
        before, after = (model(ids, ids)[0] for ids in (idx, changed))
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert (before[:, 10:] != after[:, 10:]).any(dim=-1).all()


def test_without_targets_only_the_last_position_has_logits():
    model = small()
    idx = random_ids(3, 9)
    with torch.no_grad():
        logits, loss = model(idx)
        full, _ = model(idx, idx)
    assert loss is None and logits.shape == (3, 1, 96)
    torch.testing.assert_close(logits[:, 0], full[:, -1])


def test_targets_of_minus_one_do_not_count():
    model = small()
    idx = random_ids(2, 9)
    targets = idx.roll(-1, 1)
    targets[:, 4:] = -1
    with torch.no_grad():
        _, loss = model(idx, targets)
        _, expected = model(idx[:, :4], targets[:, :4])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_dropout_is_active_in_training_only():
    model = small(dropout=0.5)
    idx = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(model(idx)[0], model(idx)[0])
        model.train()
        assert not torch.equal(model(idx)[0], model(idx)[0])


def test_bias_false_has_no_biases():
    assert not [name for name in small(bias=False).state_dict() if name.endswith("bias")]


def test_too_long_input_is_refused():
    with pytest.raises(ValueError, match="33 tokens"):
        small()(random_ids(1, 33))


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_embd": 30},
        {"n_layer": 0},
        {"block_size": -1},
        {"vocab_size": 0},
        {"dropout": 1.0},
        {"activation": "relu6"},
    ],
)
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GPTConfig(**{**SMALL, **wrong})


def test_crop_block_size_keeps_the_logits():
    model, idx = small(), random_ids(2, 8)
    with torch.no_grad():
        before, _ = model(idx, idx)
        model.crop_block_size(8)
        after, _ = model(idx, idx)
    assert torch.equal(before, after) and model.config.block_size == 8
    assert model.transformer.wpe.weight.requires_grad and model.transformer.wpe.weight.shape == (8, 32)
    for wrong in (9, 0):
        with pytest.raises(ValueError, match="block_size"):
            model.crop_block_size(wrong)


def test_only_matrices_and_embeddings_decay():
    model = small()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    decayed, rest = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0
    assert all(p.dim() == 2 for p in decayed["params"]) and all(p.dim() == 1 for p in rest["params"])
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_generate_keeps_the_prompt_and_continues_past_block_size():
    model, idx = small(), random_ids(2, 30)
    torch.manual_seed(0)
    out = model.generate(idx, 10, temperature=0.9, top_k=5)
    assert out.shape == (2, 40) and torch.equal(out[:, :30], idx)
    with torch.no_grad():
        greedy = model.generate(idx, 10, temperature=0)
        for t in range(30, 40):
            logits, _ = model(greedy[:, max(0, t - 32) : t])
            assert torch.equal(logits[:, 0].argmax(-1), greedy[:, t])


@pytest.mark.parametrize("config", [{}, {"rotary": True, "n_kv_head": 2, "qk_norm": True, "n_embd": 64}])
def test_stream_and_generate_give_the_same_greedy_tokens(config):
    """The batched decoder and the short one in model.py, also past block_size."""
    model = GPT(GPTConfig(**{**SMALL, **config})).eval()
    for parameter in model.parameters():
        parameter.data *= 5  # so that earlier tokens matter
    idx = random_ids(3, 20)
    greedy = torch.cat([ids for ids, _ in stream(model, idx, SamplingParams(0.0), torch.zeros(3, 40))], 1)
    assert len(greedy.unique()) > 5
    assert torch.equal(greedy, model.generate(idx, 40, temperature=0)[:, 20:])


def test_generate_samples_by_temperature_and_top_k():
    model, idx = small(), random_ids(1, 4)
    torch.manual_seed(0)
    with torch.no_grad():
        logits = model(idx)[0][0, 0]
    candidates = logits.topk(3).indices
    expected = (logits[candidates] / 0.5).softmax(-1)
    ids = model.generate(idx.expand(4000, -1), 1, temperature=0.5, top_k=3)[:, 4]
    frequencies = torch.stack([(ids == id).float().mean() for id in candidates])
    torch.testing.assert_close(frequencies, expected, atol=0.03, rtol=0)


def test_padding_of_the_vocabulary_is_never_sampled():
    model = small()
    with torch.no_grad():
        model.lm_head.weight[90:] += 10 * model.transformer.ln_f.weight  # the padding has the highest logits
    steps = stream(model, random_ids(8, 4), SamplingParams(1.5), torch.rand(8, 20), vocab_size=90)
    assert max(int(ids.max()) for ids, _ in steps) < 90


def test_sampling_follows_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(20_000, 4)
    uniforms = uniform_noise(0, 20_000, 1)
    for temperature, top_k, n in ((1.0, None, 4), (0.7, None, 4), (1.0, 2, 2), (2.0, 3, 3), (1.0, 9, 4)):
        ids = sample_token(logits, SamplingParams(temperature, top_k), uniforms)
        frequencies = ids.flatten().bincount(minlength=4) / len(logits)
        expected = torch.softmax(logits[0].double() / temperature, 0)
        expected[: 4 - n] = 0
        assert torch.allclose(frequencies.double(), expected / expected.sum(), atol=0.02), (
            temperature,
            top_k,
        )
        assert (frequencies[: 4 - n] == 0).all()


def test_mfu_counts_flops_as_palm_does():
    model = small()
    parameters, attention = model.get_num_params(), 12 * 3 * 32 * 32
    flops = (6 * parameters + attention) * 32 * 5
    assert model.estimate_mfu(5, 2.0) == pytest.approx(flops / 2 / 312e12)
    assert model.estimate_mfu(5, 2.0, peak_flops=1e9) == pytest.approx(flops / 2 / 1e9)


def greedy_without_cache(model: GPT, idx: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        with torch.no_grad():
            logits, _ = model(idx[:, -model.config.block_size :])
        idx = torch.cat([idx, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("prompt", [1, 7, 31])
def test_greedy_with_the_cache_equals_greedy_without(B, prompt):
    model = small(n_layer=4)
    for parameter in model.parameters():
        parameter.data *= 5  # so that earlier tokens matter
    idx = random_ids(B, prompt)
    expected = greedy_without_cache(model, idx, 32 - prompt)
    assert len(expected.unique()) > 5
    assert bool((model.generate(idx, 32 - prompt, temperature=0.0) == expected).all())
    shared = idx[:1].expand(4, -1)
    assert bool((model.generate(shared, 32 - prompt, temperature=0.0) == expected[:1]).all())


@pytest.mark.parametrize("prompt", [3, 32, 40])
def test_past_block_size_three_quarters_are_read_again(prompt):
    model = small()
    for parameter in model.parameters():
        parameter.data *= 5
    idx = random_ids(2, prompt)
    ids = model.generate(idx, 60, temperature=0.0)
    expected = idx
    window = idx[:, -32:]
    for _ in range(60):  # as in the docstring of generate, without a cache
        with torch.no_grad():
            logits, _ = model(window)
        next_id = logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, next_id], dim=1)
        window = torch.cat([window, next_id], dim=1)
        if window.size(1) > 32:
            window = window[:, -24:]
    assert bool((ids == expected).all())


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        model = small(dropout=0.2).train()
        model.activation_checkpointing = recompute
        torch.manual_seed(3)
        _, loss = model(random_ids(2, 32), random_ids(2, 32))
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(bool((a == b).all()) for a, b in zip(*gradients, strict=True))


def test_activation_checkpointing_works_with_the_cache():
    model = small().train()
    model.activation_checkpointing = True
    idx = random_ids(2, 7)
    expected = greedy_without_cache(model, idx, 12)
    assert bool((model.generate(idx, 12, temperature=0.0) == expected).all())


def test_return_logits_false_returns_the_loss_only():
    model, idx, targets = small(), random_ids(2, 7), random_ids(2, 7)
    assert model(idx, targets, return_logits=False)[0] is None
    assert torch.equal(model(idx, targets, return_logits=False)[1], model(idx, targets)[1])
