"""Optimizers: AdamW, Muon or SGD; gradient clipping."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from distrogpt.checkpoint import restore_optimizers
from distrogpt.runtime import Runtime
from distrogpt.settings import TrainConfig
from distrogpt.training.distributed import full_tensor, is_dtensor, local, shard_like
from model import GPT, GPTConfig

# Coefficients of Muon's iteration, a polynomial a·x + b·x³ + c·x⁵ for each step. Each is the one nearest to
# 1 (by its largest error) on the image of [0.01, 1] under those before: Polar Express (arXiv 2505.16932).
# Steeper ones are not stable in bf16.
POLYNOMIALS = ((8.0937, -23.6209, 17.4463), (3.6376, -2.7228, 0.5367), (2.6626, -1.9782, 0.4527))


@torch.no_grad()
def orthogonalize(stacks: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Bring the singular values of each matrix near to 1: stacks (N, rows, columns) with the same shorter
    side, computed in `dtype`, fp32 or bf16.

    Newton-Schulz iteration on the square matrices x xᵀ, all of them at once; x is multiplied at the end.
    Values above 1/100 of the bound below end between 0.7 and 1.3, in bf16 up to a few tenths further out;
    smaller ones are multiplied by up to 78. Zeros stay zeros.
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


def unwrapped(method: Callable) -> Callable:
    """A method without the wrapper that loads torch's compiler at its first call."""
    return getattr(method, "__wrapped__", method)


class UncompiledOptimizer:
    """Methods of torch's optimizers, but uncompiled training starts 1.3 s sooner."""

    add_param_group = unwrapped(Optimizer.add_param_group)
    zero_grad = unwrapped(Optimizer.zero_grad)
    state_dict = unwrapped(Optimizer.state_dict)
    load_state_dict = unwrapped(Optimizer.load_state_dict)


class AdamW(UncompiledOptimizer, torch.optim.AdamW):
    step = torch.no_grad()(unwrapped(torch.optim.AdamW.step))


class SGD(UncompiledOptimizer, torch.optim.SGD):
    step = torch.no_grad()(unwrapped(torch.optim.SGD.step))


class Muon(UncompiledOptimizer, torch.optim.Muon):
    """torch.optim.Muon (https://kellerjordan.github.io/posts/muon/, arXiv 2502.16982), but all matrices of a
    size are orthogonalised at once, in three iterations instead of five: in a third of the time if small.
    A group may have "parts": the rows of its matrices are that many matrices, one after another."""

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, **settings: float) -> None:
        super().__init__(groups, **settings)
        self.dtype = dtype  # of its matrix products

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shorter_side in {min(shape) for shape in by_shape}:
                stacks = [ps for shape, ps in by_shape.items() if min(shape) == shorter_side]
                longest = len(max(stacks, key=len))
                chunk = 1 if is_dtensor(stacks[0][0]) else longest  # gathered on a rank one at a time
                for begin in range(0, longest, chunk):
                    chunks = [ps[begin : begin + chunk] for ps in stacks if len(ps) > begin]
                    self.update(chunks, group)

    def update(self, stacks: list[list[nn.Parameter]], group: dict[str, Any]) -> None:
        """Update lists of matrices, each list of one shape, whose shorter sides are all the same."""
        parts = group.get("parts", 1)
        momenta = [self.nesterov_momentum(ps, group["momentum"]) for ps in stacks]  # (N, rows, columns)
        momenta = [m.view(len(m) * parts, -1, m.size(2)) for m in momenta]
        for ps, updates in zip(stacks, orthogonalize(momenta, self.dtype), strict=True):
            _, rows, columns = updates.shape
            lr = group["lr"] * math.sqrt(max(1, rows / columns))
            updates = updates.reshape(len(ps), -1, columns)
            local_updates = [local(shard_like(u, p)) for u, p in zip(updates, ps, strict=True)]
            local_ps = [local(p) for p in ps]
            torch._foreach_mul_(local_ps, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(local_ps, local_updates, alpha=-lr)

    def nesterov_momentum(self, ps: list[nn.Parameter], momentum: float) -> torch.Tensor:
        """Update the averages of the gradients, sharded as the weights are, and look ahead as Nesterov does:
        (N, rows, columns), whole on each rank."""
        for p in ps:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        averages = [local(self.state[p]["momentum_buffer"]) for p in ps]
        gradients = [local(p.grad) for p in ps]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        torch._foreach_lerp_(gradients, averages, momentum)  # in place: the gradients are not read after this
        return torch.stack([full_tensor(p.grad) for p in ps])


def param_groups(named: list[tuple[str, nn.Parameter]], config: TrainConfig) -> list[dict[str, Any]]:
    """Matrices and vectors, which are not decayed, as in nanoGPT; and embeddings and an untied lm_head if
    they have learning rates of their own."""
    own_lrs = {"wte": config.embedding_lr, "wpe": config.embedding_lr, "lm_head": config.head_lr}
    groups: dict[Any, dict[str, Any]] = {}
    for name, p in named:
        own_lr = next((lr for part, lr in own_lrs.items() if part in name), None)
        key = p.dim() >= 2 if own_lr is None else name.split(".")[0]
        lr = config.learning_rate if own_lr is None else own_lr
        weight_decay = config.weight_decay if p.dim() >= 2 else 0.0
        groups.setdefault(key, {"params": [], "lr": lr, "weight_decay": weight_decay})["params"].append(p)
    return list(groups.values())


def num_submatrices(name: str, shape: GPTConfig) -> int:
    """The number of matrices in the rows of a weight: a query, key or value for each head; SwiGLU's halves.
    Orthogonalised together, keys and queries, whose gradients are small at first, would hardly move."""
    if "c_attn" in name:
        return shape.n_head + 2 * shape.kv_heads
    return 2 if "c_fc" in name and shape.activation == "swiglu" else 1


def make_optimizers(model: GPT, config: TrainConfig, runtime: Runtime) -> list[Optimizer]:
    """AdamW or SGD for all parameters; or AdamW, and Muon for the matrices of the blocks."""
    muon_weights: dict[int, list[nn.Parameter]] = {}  # by the number of their submatrices
    others = []
    for name, p in model.named_parameters():
        if config.optimizer == "muon" and ".h." in name and p.dim() == 2:
            muon_weights.setdefault(num_submatrices(name, model.config), []).append(p)
        else:
            others.append((name, p))
    groups, lr, momentum = param_groups(others, config), config.learning_rate, config.momentum
    if config.optimizer == "sgd":
        optimizers = [SGD(groups, momentum=momentum, nesterov=momentum > 0)]
    else:
        fused = runtime.device.type in ("cuda", "cpu")  # one kernel for all parameters
        optimizers = [AdamW(groups, lr=lr, betas=(config.beta1, config.beta2), fused=fused)]
    if muon_weights:
        # fp16's range is too small
        dtype = torch.bfloat16 if runtime.dtype == torch.bfloat16 else torch.float32
        groups = [{"params": ps, "parts": parts} for parts, ps in muon_weights.items()]
        settings = {"lr": config.muon_lr, "weight_decay": config.weight_decay, "momentum": momentum}
        optimizers.append(Muon(groups, dtype, **settings))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def training_optimizers(
    model: GPT, config: TrainConfig, runtime: Runtime, checkpoint: dict[str, Any]
) -> tuple[list[Optimizer], GradScaler]:
    """The optimizers and fp16's loss scaling, with the averages and the scale of a checkpoint, {} for a new
    run. Raises UserError if they do not fit."""
    optimizers, scaler = make_optimizers(model, config, runtime), runtime.grad_scaler()
    if "optimizer" in checkpoint and not config.eval_only:
        restore_optimizers(optimizers, checkpoint, Path(config.out_dir))
        scaler.load_state_dict(checkpoint.get("scaler") or scaler.state_dict())
    return optimizers, scaler


def clip_gradients(optimizers: list[Optimizer], grad_clip: float) -> torch.Tensor:
    """Clip the gradient of the optimizers' parameters to a norm of grad_clip, unless that is 0; its norm
    before, still on the device."""
    # model.parameters() takes longer than the norm of a small model
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    parameters = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    whole = full_tensor(norm)
    if grad_clip and (whole.device.type != "cpu" or whole >= grad_clip):  # a GPU would have to be waited for
        nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    return whole
