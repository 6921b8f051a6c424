"""How the weights change: AdamW, Muon or SGD, and the learning rate over the steps of a run."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn

from distrogpt.settings import TrainConfig
from distrogpt.training.distributed import full_tensor, is_dtensor, local, shard_like

# Coefficients of Muon's iteration, a polynomial a·x + b·x³ + c·x⁵ for each step. Each is the one nearest to
# 1 (by its largest error) on what those before make of [0.01, 1]: Polar Express's idea (arXiv 2505.16932).
# What is steeper is not stable in bf16.
POLYNOMIALS = ((8.0937, -23.6209, 17.4463), (3.6376, -2.7228, 0.5367), (2.6626, -1.9782, 0.4527))


def get_lr(step: int, config: TrainConfig) -> float:
    """Learning rate of a step: a linear rise over warmup_iters, then what lr_schedule says.

    'cosine': half a cosine down to min_lr at lr_decay_iters, then min_lr. 'wsd' (warm-up, stable, decay,
    arXiv 2405.18392): constant, then in the last `cooldown` of the steps a line down to min_lr.
    """
    highest = config.learning_rate
    if not config.decay_lr:
        return highest
    lowest = highest / 10 if config.min_lr is None else config.min_lr
    last = config.max_iters if config.lr_decay_iters is None else config.lr_decay_iters
    if step < config.warmup_iters:
        return highest * (step + 1) / (config.warmup_iters + 1)
    if step >= last:
        return lowest
    if config.lr_schedule == "cosine":
        done = (step - config.warmup_iters) / (last - config.warmup_iters)
        return lowest + (highest - lowest) * (1 + math.cos(math.pi * done)) / 2
    left = (last - step) / (config.cooldown * last)  # of the cooldown; above 1 before it
    return lowest + (highest - lowest) * min(1.0, left)


@torch.no_grad()
def orthogonalize(stacks: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Bring the singular values of each matrix near to 1: stacks of (N, rows, columns), which have their
    shorter side in common, in the arithmetic of `dtype`, fp32 or bf16.

    It is Newton and Schulz's iteration, but on the square matrices x xᵀ, all of them at once; x itself is
    multiplied at the end. Values above 1/100 of the bound below end between 0.7 and 1.3, which bf16 blurs by
    some tenths more; smaller ones are multiplied by up to 78. Zeros stay zeros.
    """
    xs = [stack.to(dtype) for stack in stacks]
    grams = torch.cat([x.mT @ x if x.size(1) > x.size(2) else x @ x.mT for x in xs])  # (all, short, short)
    # of the square of the largest singular value: the root of the sum of the fourth powers of all, whose
    # squares underflow below 1e-18; so gradients below 1e-9 stay small
    bound = grams.norm(dim=(1, 2), keepdim=True).mul_(1.02).clamp_(min=1e-17)
    gram, factor, product = grams / bound, None, None
    for a, b, c in POLYNOMIALS:
        if factor is not None:
            gram = factor @ gram @ factor  # of what x is by now; polynomials of one matrix commute
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
    products = (product / bound.sqrt()).split([len(x) for x in xs])
    return [x @ p if x.size(1) > x.size(2) else p @ x for x, p in zip(xs, products, strict=True)]


def unwrapped(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of torch's optimizers without the wrapper that loads torch's compiler at its first call."""
    return getattr(method, "__wrapped__", method)


class Light:
    """What torch's optimizers do, but uncompiled training starts 1.3 s sooner: the compiler is not loaded."""

    add_param_group = unwrapped(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrapped(torch.optim.Optimizer.zero_grad)
    state_dict = unwrapped(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrapped(torch.optim.Optimizer.load_state_dict)


class AdamW(Light, torch.optim.AdamW):
    step = torch.no_grad()(unwrapped(torch.optim.AdamW.step))


class SGD(Light, torch.optim.SGD):
    step = torch.no_grad()(unwrapped(torch.optim.SGD.step))


class Muon(Light, torch.optim.Muon):
    """torch.optim.Muon (https://kellerjordan.github.io/posts/muon/, arXiv 2502.16982), but all matrices of a
    size are orthogonalised at once, in three steps for torch's five: small ones in a third of the time."""

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, **settings: float) -> None:
        """A group may have "parts": its matrices' rows are that many matrices, one after another."""
        super().__init__(groups, **settings)
        self.dtype = dtype  # of its products

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            of_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    of_shape.setdefault(p.shape, []).append(p)
            for short in {min(shape) for shape in of_shape}:
                same = [matrices for shape, matrices in of_shape.items() if min(shape) == short]
                count = 1 if is_dtensor(same[0][0]) else len(max(same, key=len))  # whole on a rank at a time
                for begin in range(0, len(max(same, key=len)), count):
                    self.step_together([matrices[begin : begin + count] for matrices in same], group)

    def step_together(self, same: list[list[nn.Parameter]], group: dict[str, Any]) -> None:
        """Step lists of matrices, each list's of one shape, whose shorter sides are all the same."""
        same, parts = [matrices for matrices in same if matrices], group.get("parts", 1)
        ahead = [self.average(matrices, group["momentum"]) for matrices in same]
        stacks = [x.view(len(x) * parts, -1, x.size(2)) for x in ahead]
        for matrices, updates in zip(same, orthogonalize(stacks, self.dtype), strict=True):
            _, rows, columns = updates.shape
            rate = group["lr"] * math.sqrt(max(1, rows / columns))
            updates = updates.reshape(len(matrices), -1, columns)
            ours = [local(shard_like(u, p)) for u, p in zip(updates, matrices, strict=True)]
            theirs = [local(p) for p in matrices]
            torch._foreach_mul_(theirs, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(theirs, ours, alpha=-rate)

    def average(self, matrices: list[nn.Parameter], momentum: float) -> torch.Tensor:
        """Update the running means of the gradients, and look ahead as Nesterov: (N, rows, columns).

        A mean is shared among the ranks as its weight is; what is orthogonalised is whole, on each of them.
        """
        for p in matrices:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        means = [local(self.state[p]["momentum_buffer"]) for p in matrices]
        gradients = [local(p.grad) for p in matrices]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        torch._foreach_lerp_(gradients, means, momentum)  # in place: nobody reads the gradients after this
        return torch.stack([full_tensor(p.grad) for p in matrices])


def adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    learning_rate: float,
    betas: tuple[float, float],
    device_type: str,
    embedding_lr: float | None = None,
    head_lr: float | None = None,
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) that decays matrices and embeddings, not biases and norms.

    wte and wpe may have a learning rate of their own, and so may lm_head where it is no part of wte.
    """
    groups = param_groups(named_parameters, weight_decay, learning_rate, embedding_lr, head_lr)
    fused = device_type in ("cuda", "cpu")  # one kernel for all parameters
    return AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    learning_rate: float,
    embedding_lr: float | None,
    head_lr: float | None,
) -> list[dict[str, Any]]:
    """Groups of parameters: matrices and vectors, as in nanoGPT, and what has a learning rate of its own."""
    groups: dict[Any, dict[str, Any]] = {}
    for name, p in named_parameters:
        own = embedding_lr if "wte" in name or "wpe" in name else head_lr if "lm_head" in name else None
        key = name.split(".")[0] if own is not None else p.dim() >= 2
        decay = weight_decay if p.dim() >= 2 else 0.0
        rate = learning_rate if own is None else own
        groups.setdefault(key, {"params": [], "lr": rate, "weight_decay": decay})["params"].append(p)
    return list(groups.values())


def num_submatrices(name: str, shape: Any) -> int:
    """How many matrices the rows of a weight are: a query, key or value for each head; SwiGLU's two halves.

    Orthogonalised together, keys and queries, whose gradients are small at first, would hardly move.
    """
    if "c_attn" in name:
        return shape.n_head + 2 * shape.kv_heads
    return 2 if "c_fc" in name and shape.activation == "swiglu" else 1


def make_optimizers(
    model: nn.Module, config: TrainConfig, device_type: str, dtype: torch.dtype
) -> list[torch.optim.Optimizer]:
    """What config.optimizer says: AdamW or SGD for all, or AdamW for all but the matrices of the blocks, and
    Muon for those. `dtype` is the arithmetic of the run.
    """
    named = list(model.named_parameters())
    own_rates = (config.embedding_lr, config.head_lr)
    if config.optimizer == "sgd":
        groups = param_groups(named, config.weight_decay, config.learning_rate, *own_rates)
        optimizers = [SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0)]
    else:
        takes_muon = config.optimizer == "muon"
        muons = {name: p for name, p in named if takes_muon and ".h." in name and p.dim() == 2}
        others = [(name, p) for name, p in named if name not in muons]
        betas = (config.beta1, config.beta2)
        optimizers = [
            adamw(others, config.weight_decay, config.learning_rate, betas, device_type, *own_rates)
        ]
        if muons:
            products = dtype if dtype == torch.bfloat16 else torch.float32  # fp16's range is too small
            by_parts: dict[int, list[nn.Parameter]] = {}
            for name, p in muons.items():
                by_parts.setdefault(num_submatrices(name, model.config), []).append(p)
            groups = [{"params": ps, "parts": parts} for parts, ps in by_parts.items()]
            rest = {"weight_decay": config.weight_decay, "momentum": config.momentum}
            optimizers.append(Muon(groups, products, lr=config.muon_lr, **rest))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers


def set_learning_rates(optimizers: list[torch.optim.Optimizer], step: int, config: TrainConfig) -> None:
    """Give each group its own highest rate times the share that the schedule leaves of it at this step."""
    share = get_lr(step, config) / config.learning_rate
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = share * group["initial_lr"]


def clip_gradients(model: nn.Module, grad_clip: float) -> torch.Tensor:
    """Clip the gradient to a norm of grad_clip, unless that is 0; its norm before, still on the device."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if grad_clip:
        nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    return full_tensor(norm)
