"""How the ranks train one model: each has a full copy (DDP), or a shard of each weight, of its gradient and
of its optimizer state, as DTensors (FSDP2)."""

import logging
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from distrogpt.errors import UserError
from distrogpt.kernels.compile import maybe_compile
from distrogpt.kernels.cpu import to_device, use_cpu_kernels
from distrogpt.runtime import Runtime, activity, enable_onednn_float32
from distrogpt.settings import TrainConfig

log = logging.getLogger("distrogpt")

STEPS_PER_MINUTE = 300  # a guess, before the first step, of whether compiling pays in a run of some minutes


def steps_to_expect(config: TrainConfig) -> int:
    """Of the whole run: resumed, it computes as before."""
    if config.max_minutes is None:
        return config.max_iters
    return min(config.max_iters, round(config.max_minutes * STEPS_PER_MINUTE))


@activity("preparing the model")
def distribute(model: torch.nn.Module, config: TrainConfig, runtime: Runtime) -> torch.nn.Module:
    """Bring the model to its device, compile it if configured, and wrap it to train on all ranks."""
    enable_onednn_float32(runtime)
    model.activation_checkpointing = config.activation_checkpointing
    steps = 1 if config.eval_only else steps_to_expect(config)
    sharded = config.shard and runtime.world_size > 1
    if not sharded:
        to_device(model, runtime.device)
    elif runtime.device.type == "cpu":
        use_cpu_kernels(model)
    maybe_compile(model, config.compile, runtime.device, steps, model.transformer.h if sharded else ())
    if config.shard and not sharded:
        log.info("note     shard=True has no effect with a single rank")
    return wrap_distributed(model, config.shard, runtime)


def wrap_distributed(model: torch.nn.Module, shard: bool, runtime: Runtime) -> torch.nn.Module:
    """The module to call for training on all ranks. Its gradients are the means over the ranks.

    DDP (arXiv 2006.15704) keeps a copy per rank. With `shard`, FSDP2 (arXiv 2304.11277) keeps an equal shard
    of every weight in fp32 per rank, and gathers a layer in the compute dtype when needed. Raises UserError.
    """
    if runtime.world_size == 1 and not dist.is_initialized():
        return model
    if not shard:
        devices = [runtime.device] if runtime.device.type == "cuda" else None
        return DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
    if runtime.dtype == torch.float16:
        raise UserError("shard=True does not support float16; use --dtype=bfloat16 or float32")
    from torch.distributed.device_mesh import init_device_mesh  # half a second
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # a warning about in-place operations, which blocks do not use
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
    mixed_precision = MixedPrecisionPolicy(runtime.dtype, torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        for layer in (block.attn, block.mlp):  # what autocast multiplies in bf16; it keeps norms in fp32
            fully_shard(layer, mesh=mesh, mp_policy=mixed_precision)
    fully_shard(model, mesh=mesh)
    return model


def weights_are_finite(model: torch.nn.Module, runtime: Runtime) -> bool:
    """Whether all weights on all ranks are finite."""
    finite = all(bool(local(p).isfinite().all()) for p in model.parameters())
    return runtime.all_reduce_sum(not finite)[0] == 0


def is_dtensor(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor; other tensors as they are."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a DTensor, a call that all ranks have to make; other tensors as they are."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A full tensor of the shape of `parameter`, sharded like it."""
    if not is_dtensor(parameter) or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, tensor = parameter.device_mesh, tensor.to(parameter.device)
    return distribute_tensor(tensor, mesh, parameter.placements, src_data_rank=None)  # sends nothing


def gather_to_cpu(tree: Any, keep: bool) -> Any:
    """A copy of nested dicts and lists with full tensors on the CPU, or None for each tensor on ranks that do
    not `keep` it. Shards are gathered, so all ranks have to call it."""
    if isinstance(tree, torch.Tensor):
        tensor = full_tensor(tree.detach())
        return tensor.to("cpu", copy=True) if keep else None
    if isinstance(tree, dict):
        return {key: gather_to_cpu(value, keep) for key, value in tree.items()}
    return [gather_to_cpu(value, keep) for value in tree] if isinstance(tree, list) else tree
