"""torch.compile, if it pays and works here; and CUDA graphs."""

import logging
import os
import warnings
from collections.abc import Callable, Iterable

import torch
import torch.nn as nn

log = logging.getLogger("distrogpt")


def maybe_compile(
    model: nn.Module, wanted: bool | str, device: torch.device, steps: int, modules: Iterable[nn.Module] = ()
) -> bool:
    """Compile the model, or some of its modules, in place if that is wanted and works here. Logs why not;
    returns whether it did.

    'auto' depends on the `steps` to come, as compiling takes half a minute. On CPUs (and Apple's GPUs), it
    saves some 2 ms per step of a small model, and nothing from a few million parameters on.
    """
    if not wanted:
        return False
    if wanted == "auto":
        small = sum(p.numel() for p in model.parameters()) < 3e6
        if device.type != "cuda" and not small:
            log.info(f"compile  off: compiling does not speed up a model of this size on {device.type}")
            return False
        if steps < (200 if device.type == "cuda" else 20_000):
            log.info(f"compile  off: compiling takes half a minute, more than it saves in {steps} steps")
            return False
    if error := compile_error(device):
        log.info(f"note     {error}")
        return False
    for module in modules or (model,):
        module.compile()
    return True


def compile_error(device: torch.device) -> str:
    """Why torch.compile does not work here, "" if it does. What it compiles is cached on disk."""
    # beside other caches and not in /tmp, so that the next run, also after a restart, compiles in 2 s
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser("~/.cache/torchinductor"))
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # no compiler, no triton, an unsupported Python: all end here
        reason = str(error).strip() or type(error).__name__
        return f"torch.compile does not work here ({reason.splitlines()[0]}); continuing without it"
    return ""


@torch.no_grad()
def cuda_graph(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[..., torch.Tensor]:
    """`function` as one CUDA graph, one launch instead of hundreds, for inputs of these shapes; it is run on
    these inputs first. Each call overwrites the result of the one before."""
    static_inputs = [tensor.clone() for tensor in inputs]  # each replay reads these
    device, autocast = static_inputs[0].device, torch.is_autocast_enabled("cuda")
    with torch.cuda.device(device), torch.autocast("cuda", enabled=autocast, cache_enabled=False):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # the setup of kernels at their first use must not be recorded
            for _ in range(3):
                function(*static_inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = function(*static_inputs)

    def replay(*inputs: torch.Tensor) -> torch.Tensor:
        for static, value in zip(static_inputs, inputs, strict=True):
            static.copy_(value)
        graph.replay()
        return output

    return replay
