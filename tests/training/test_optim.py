"""How weights change: each optimizer against its formula, groups and rates, schedules."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import TINY

from configurator import read_settings
from distrogpt.data.dataset import open_dataset
from distrogpt.runtime import Runtime
from distrogpt.settings import TrainConfig
from distrogpt.training.batches import step_batches
from distrogpt.training.optim import POLYNOMIALS, Muon, make_optimizers, orthogonalize
from distrogpt.training.schedule import get_lr, set_learning_rates
from distrogpt.training.startup import initial_model
from model import GPT, GPTConfig
from train import train

CPU = Runtime(torch.device("cpu"), torch.float32)
SHAPE = {"block_size": 8, "vocab_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 8}


def config_of(*flags: object) -> TrainConfig:
    return read_settings(TrainConfig, [*TINY, *map(str, flags)])


def by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """What orthogonalize says of itself, in float64: U f(S) Vᵀ."""
    U, S, Vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    S = S / math.sqrt(1.02 * S.pow(4).sum().sqrt().item())
    for a, b, c in POLYNOMIALS:
        S = a * S + b * S**3 + c * S**5
    return U @ S.diag() @ Vt


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("shapes", [[(32, 32)], [(32, 96), (96, 32), (32, 32)], [(1, 5)], [(7, 3), (3, 8)]])
def test_orthogonalize_is_the_polynomials_of_the_singular_values(shapes, dtype, tolerance):
    torch.manual_seed(0)
    stacks = [torch.randn(3, *shape) * 1e-3 for shape in shapes]
    for stack, found in zip(stacks, orthogonalize(stacks, dtype), strict=True):
        assert found.shape == stack.shape
        for matrix, one in zip(stack, found, strict=True):
            torch.testing.assert_close(
                one.double(), by_singular_values(matrix), atol=tolerance, rtol=tolerance
            )
            assert torch.linalg.svdvals(one.double()).max() < (1.35 if dtype == torch.float32 else 1.7)


def test_orthogonalize_lifts_what_is_small_and_leaves_zeros():
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0] for _ in range(2))
    for smallest, least in ((0.05, 0.6), (0.005, 0.2)):
        S = torch.logspace(0, math.log10(smallest), 64, dtype=torch.float64)
        found = orthogonalize([(U * S @ V)[None].float()], torch.bfloat16)[0][0].double()
        assert torch.linalg.svdvals(found).min() > least
        assert (U.T @ found @ V.T).diagonal().min() > least  # along the same directions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_does_not_care_for_the_size_of_a_gradient(dtype):
    torch.manual_seed(0)
    x = torch.randn(1, 32, 64)
    expected = orthogonalize([x], dtype)[0]
    for size in (1e-4, 1e-7, 1e6):
        torch.testing.assert_close(orthogonalize([x * size], dtype)[0], expected, atol=0.1, rtol=0.1)
    for exponent in range(8, 46):  # what is hardly a gradient moves nothing far
        assert orthogonalize([x * 10.0**-exponent], dtype)[0].abs().max() < 1.5
    assert not orthogonalize([x * 0], dtype)[0].any()


def test_a_momentum_that_fades_away_moves_nothing_far():
    """As of a matrix that gets no gradient any more: its mean becomes smaller than any number."""
    p = torch.nn.Parameter(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)))
    muon = Muon([{"params": [p]}], torch.bfloat16, lr=1e-4, momentum=0.5, weight_decay=0.0)
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    for _ in range(300):
        muon.step()
        p.grad = torch.zeros_like(p)
    assert bool(p.isfinite().all()) and p.abs().max() < 5


def test_muon_is_momentum_nesterov_and_decay_of_the_formula():
    torch.manual_seed(0)
    matrices = [
        torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 24), (24, 8), (8, 24), (8, 8), (4, 8))
    ]
    weights, means = (
        [p.detach().double() for p in matrices],
        [torch.zeros(p.shape).double() for p in matrices],
    )
    muon = Muon([{"params": matrices}], torch.float32, lr=0.1, momentum=0.8, weight_decay=0.3)
    for step in range(4):
        muon.param_groups[0]["lr"] = lr = 0.1 / (step + 1)
        for i, p in enumerate(matrices):
            p.grad = torch.randn(p.shape)
            means[i] = 0.8 * means[i] + 0.2 * p.grad.double()
            update = by_singular_values(0.8 * means[i] + 0.2 * p.grad.double())
            wide = math.sqrt(max(1, p.size(0) / p.size(1)))
            weights[i] = weights[i] * (1 - lr * 0.3) - lr * wide * update
        muon.step()
    for p, expected in zip(matrices, weights, strict=True):
        torch.testing.assert_close(p.detach().double(), expected, atol=1e-4, rtol=1e-4)


def test_parts_of_a_matrix_are_matrices():
    torch.manual_seed(0)
    whole, gradient = torch.randn(12, 8), torch.randn(12, 8)
    stacked = torch.nn.Parameter(whole.clone())
    single = [torch.nn.Parameter(part.clone()) for part in whole.split(4)]
    stacked.grad, parts = gradient.clone(), gradient.split(4)
    for p, part in zip(single, parts, strict=True):
        p.grad = part.clone()
    Muon([{"params": [stacked], "parts": 3}], torch.float32, lr=0.1).step()
    Muon([{"params": single}], torch.float32, lr=0.1).step()
    torch.testing.assert_close(stacked, torch.cat(single))


def test_muon_goes_where_torchs_goes():
    """Another polynomial, but the same direction: and its state can be loaded by torch's."""
    torch.manual_seed(0)
    start = torch.randn(16, 48)
    moved = []
    for kind in (partial(Muon, dtype=torch.bfloat16), torch.optim.Muon):
        p = torch.nn.Parameter(start.clone())
        optimizer = kind([{"params": [p]}], lr=0.1, momentum=0.9, weight_decay=0.0)
        for seed in range(3):
            p.grad = torch.randn(16, 48, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        moved.append((p.detach() - start).flatten())
        kind([{"params": [p]}], lr=0.1).load_state_dict(optimizer.state_dict())
    assert torch.cosine_similarity(*moved, dim=0) > 0.94  # torch's own are 0.7 to 1.2
    assert 0.8 < moved[0].norm() / moved[1].norm() < 1.25


def test_muon_passes_what_has_no_gradient():
    p = torch.nn.Parameter(torch.ones(4, 4))
    Muon([{"params": [p]}], torch.float32, lr=0.1).step()
    assert bool((p == 1).all())


def names_of(model: GPT, parameters: list) -> set[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in parameters}


def test_who_trains_what_at_which_rate():
    model = GPT(GPTConfig(**SHAPE, tied=False, embedding_skip=True))
    rates = ("--embedding_lr=0.3", "--head_lr=0.04", "--muon_lr=0.05", "--learning_rate=0.01")
    config = config_of("--optimizer=muon", *rates, "--weight_decay=0.2", "--decay_lr=False", "--momentum=0.7")
    adamw, muon = make_optimizers(model, config, CPU)
    set_learning_rates([adamw, muon], 5, config)
    found = {
        (group["lr"], group["weight_decay"], group.get("parts")): names_of(model, group["params"])
        for optimizer in (adamw, muon)
        for group in optimizer.param_groups
    }
    every = {name for name, _ in model.named_parameters()}
    matrices = {name for name in every if ".c_" in name and name.endswith("weight")}
    assert len(matrices) == 8
    assert found == {
        (0.3, 0.2, None): {"transformer.wte.weight", "transformer.wpe.weight"},
        (0.04, 0.2, None): {"lm_head.weight"},
        (0.01, 0.0, None): {n for n in every if n.endswith(("bias", "skip")) or "ln_" in n},
        (0.05, 0.2, 1): {name for name in matrices if "c_attn" not in name},
        (0.05, 0.2, 6): {name for name in matrices if "c_attn" in name},  # 2 heads of q, k and v
    }
    assert muon.param_groups[0]["momentum"] == 0.7


def test_a_tied_head_is_an_embedding_and_adamw_alone_has_nanogpts_two_groups():
    model = GPT(GPTConfig(**SHAPE))
    for optimizer in (
        make_optimizers(model, config_of(), CPU)[0],
        model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu"),
    ):
        decayed, rest = optimizer.param_groups
        assert [p.dim() for p in decayed["params"]] == [2] * 10 and {p.dim() for p in rest["params"]} == {1}
    config = config_of("--optimizer=sgd", "--embedding_lr=0.5", "--momentum=0")
    for decay in (0.0, 0.1):  # the groups are the same: a run may be resumed with another
        assert len(model.configure_optimizers(decay, 1e-2, (0.9, 0.95), "cpu").param_groups) == 2
    (sgd,) = make_optimizers(model, config, CPU)
    assert isinstance(sgd, torch.optim.SGD)
    assert {group["lr"]: len(group["params"]) for group in sgd.param_groups}[0.5] == 2


def steps_with(config: TrainConfig, steps: int = 6) -> tuple[dict, dict, list[dict], list[float]]:
    """The weights of a small model before and after steps on random gradients, those, and the rates."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, bias=True))
    before = {name: p.detach().double() for name, p in model.named_parameters()}
    (optimizer,) = make_optimizers(model, config, CPU)
    gradients, rates = [], []
    for step in range(steps):
        set_learning_rates([optimizer], step, config)
        gradients.append({name: torch.randn(p.shape) for name, p in model.named_parameters()})
        for name, p in model.named_parameters():
            p.grad = gradients[-1][name].clone()
        optimizer.step()
        rates.append(get_lr(step, config))
    after = {name: p.detach().double() for name, p in model.named_parameters()}
    return before, after, gradients, rates


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_sgd_is_momentum_nesterov_and_decay_of_the_formula(momentum):
    config = config_of("--optimizer=sgd", f"--momentum={momentum}", "--weight_decay=0.3")
    before, after, gradients, rates = steps_with(config)
    for name, p in before.items():
        mean = 0.0
        for gradient, rate in zip(gradients, rates, strict=True):
            g = gradient[name].double() + (0.3 * p if p.dim() > 1 else 0)
            mean = momentum * mean + g
            p = p - rate * (g + momentum * mean)
        torch.testing.assert_close(after[name], p, atol=1e-5, rtol=1e-5, msg=name)


def test_adamw_is_the_papers_formula():
    config = config_of("--beta1=0.8", "--beta2=0.9", "--weight_decay=0.3", "--learning_rate=0.05")
    before, after, gradients, rates = steps_with(config)
    assert len(set(rates)) == len(rates)
    for name, p in before.items():
        mean = square = 0.0
        for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
            g = gradient[name].double()
            mean, square = 0.8 * mean + 0.2 * g, 0.9 * square + 0.1 * g * g
            update = mean / (1 - 0.8**t) / ((square / (1 - 0.9**t)).sqrt() + 1e-8)
            p = p - rate * update - rate * (0.3 * p if p.dim() > 1 else 0)
        torch.testing.assert_close(after[name], p, atol=1e-5, rtol=1e-5, msg=name)


def test_a_run_with_sgd_is_torchs_run_by_hand(tmp_path, dataset):
    """Interrupted, too; with clipping, accumulation and the schedule."""
    flags = ["--optimizer=sgd", "--momentum=0.9", "--learning_rate=0.5", "--weight_decay=0.05", "--seed=7"]
    flags += ["--gradient_accumulation_steps=2", "--grad_clip=0.4", f"--dataset={dataset}"]
    flags += [f"--out_dir={tmp_path}", "--lr_decay_iters=9"]
    train(config_of(*flags, "--max_iters=4"))
    config = config_of(*flags, "--max_iters=9", "--init_from=resume")
    found = dict(train(config).model.named_parameters())
    data, runtime = open_dataset(config), Runtime(torch.device("cpu"), torch.float32)
    model, _ = initial_model(replace(config, init_from="scratch"), data.meta)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.dim() == 1]},
    ]
    sgd = torch.optim.SGD(groups, lr=0.5, momentum=0.9, nesterov=True)
    for step in range(9):
        share = (step + 1) / 3 if step < 2 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 7)) / 2
        for group in sgd.param_groups:
            group["lr"] = 0.5 * share
        batches = step_batches(data, config, runtime, step)
        x, y = (torch.cat([getattr(batch, name) for batch in batches]) for name in "xy")
        model(x, y)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.4)
        sgd.step()
        sgd.zero_grad()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p, atol=1e-5, rtol=1e-5, msg=name)


def test_each_group_follows_the_schedule_from_its_own_rate():
    model = GPT(GPTConfig(**SHAPE))
    config = config_of("--optimizer=muon", "--muon_lr=0.05", "--learning_rate=0.01", "--max_iters=100")
    optimizers = make_optimizers(model, config, CPU)
    for step in (0, 1, 30, 70, 99, 100):
        set_learning_rates(optimizers, step, config)
        assert optimizers[0].param_groups[0]["lr"] == pytest.approx(get_lr(step, config))
        assert optimizers[1].param_groups[0]["lr"] == pytest.approx(5 * get_lr(step, config))


def test_learning_rate_rises_and_falls_along_a_cosine():
    config = config_of("--learning_rate=1", "--warmup_iters=10", "--lr_decay_iters=110", "--min_lr=0.2")
    rates = [get_lr(step, config) for step in range(200)]
    assert rates[0] == pytest.approx(1 / 11) and rates[9] == pytest.approx(10 / 11)
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.6) and rates[35] == pytest.approx(0.6 + 0.4 / math.sqrt(2))
    assert rates[110:] == [0.2] * 90
    assert all(rates[i] > rates[i + 1] for i in range(10, 110))
    assert {get_lr(step, config_of("--decay_lr=False")) for step in range(30)} == {1e-2}
    defaults = config_of("--max_iters=50")
    assert get_lr(50, defaults) == pytest.approx(1e-3) and get_lr(49, defaults) > 1e-3


def test_learning_rate_is_stable_and_then_falls_along_a_line():
    flags = ("--lr_schedule=wsd", "--cooldown=0.25", "--learning_rate=1", "--min_lr=0.2", "--max_iters=200")
    config = config_of(*flags, "--warmup_iters=10")
    rates = [get_lr(step, config) for step in range(300)]
    assert rates[4] == pytest.approx(5 / 11)
    assert rates[10:151] == [1.0] * 141
    assert rates[175] == pytest.approx(0.6) and rates[199] == pytest.approx(0.2 + 0.8 / 50)
    assert rates[200:] == [0.2] * 100
    whole = config_of(*flags, "--warmup_iters=0", "--cooldown=1", "--min_lr=0")
    assert get_lr(0, whole) == 1 and get_lr(50, whole) == pytest.approx(0.75)
