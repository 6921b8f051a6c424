"""How the ranks share one model: each has all of it (DDP), or a part of each weight (FSDP2).

With parts, weights, gradients and averages are DTensors: what a rank holds is `local`, all of it `whole`.
"""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from distrogpt.errors import UserError
from distrogpt.runtime import Runtime


def wrap_distributed(model: torch.nn.Module, shard: bool, runtime: Runtime) -> torch.nn.Module:
    """What is called to train `model` on all ranks. Its gradients are the means over the ranks.

    DDP (arXiv 2006.15704) copies; with `shard`, FSDP2 (arXiv 2304.11277) leaves each rank an equal part of
    every weight in fp32, and gathers a layer's in the run's arithmetic at its turn. Raises UserError.
    """
    if runtime.world_size == 1 and not dist.is_initialized():
        return model
    if not shard:
        devices = [runtime.device] if runtime.device.type == "cuda" else None
        return DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
    if runtime.dtype == torch.float16:
        raise UserError("shard=True has no scaling of fp16's loss; use --dtype=bfloat16 or float32")
    from torch.distributed.device_mesh import init_device_mesh  # half a second
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    warnings.filterwarnings(
        "ignore", "FSDP2-wrapped module"
    )  # of operations in place, which blocks do not use
    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
    half = MixedPrecisionPolicy(runtime.dtype, torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        for part in (block.attn, block.mlp):  # what autocast multiplies in bf16; it keeps norms in fp32
            fully_shard(part, mesh=mesh, mp_policy=half)
    fully_shard(model, mesh=mesh)
    return model


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, on every rank; all have to ask."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Of a whole tensor in the shape of `parameter`, what this rank's part of it is, as a DTensor too."""
    if not is_dtensor(parameter) or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, tensor = parameter.device_mesh, tensor.to(parameter.device)
    return distribute_tensor(tensor, mesh, parameter.placements, src_data_rank=None)  # nothing is sent


def gather_to_cpu(tree: Any, keep: bool) -> Any:
    """A copy of nested dicts and lists with whole tensors on the CPU; None for each where this rank does not
    keep it. Parts are gathered, so all ranks have to ask."""
    if isinstance(tree, torch.Tensor):
        tensor = full_tensor(tree.detach())
        return tensor.to("cpu", copy=True) if keep else None
    if isinstance(tree, dict):
        return {key: gather_to_cpu(value, keep) for key, value in tree.items()}
    return [gather_to_cpu(value, keep) for value in tree] if isinstance(tree, list) else tree
