"""Models of others, to be timed beside ours: nanoGPT's from a checkout, transformers' GPT-2."""

import contextlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from distrogpt.data.dataset import Dataset
from distrogpt.errors import UserError
from distrogpt.kernels.compile import maybe_compile
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig
from distrogpt.training.batches import step_batches

Step = Callable[[int], object]


@contextlib.contextmanager
def as_others(runtime: Runtime) -> Iterator[None]:
    """fp32 products as torch does them by default on a CPU: what ours changed is not given to others."""
    before = torch.get_float32_matmul_precision()
    if runtime.device.type == "cpu":
        torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def others_model(against: str, config: BenchConfig, vocab_size: int) -> torch.nn.Module:
    """nanoGPT's GPT from the checkout at `against`, or transformers' GPT-2. Raises UserError."""
    if against == "transformers":
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError:
            raise UserError("transformers is not installed; pip install transformers") from None

        shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
        shape |= {"vocab_size": vocab_size, "n_positions": config.block_size}
        return GPT2LMHeadModel(GPT2Config(**shape, **drops, bos_token_id=None, eos_token_id=None))
    path = Path(against) / "model.py"
    if not path.is_file():
        raise UserError(f"against={against} has no model.py; name a nanoGPT checkout, or transformers")
    spec = importlib.util.spec_from_file_location("others", path)
    module = sys.modules["others"] = importlib.util.module_from_spec(spec)
    names = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    try:
        with contextlib.redirect_stdout(None):
            spec.loader.exec_module(module)
            shape = {name: getattr(config, name) for name in names}
            return module.GPT(module.GPTConfig(vocab_size=vocab_size, **shape)).train()
    except Exception as error:  # a file of any other project
        raise UserError(f"{path} is not nanoGPT's ({error}); name a nanoGPT checkout") from None


def others_step(
    against: str, config: BenchConfig, data: Dataset, vocab_size: int, runtime: Runtime
) -> tuple[torch.nn.Module, Step]:
    """Their model, and a training step as they do it: fp32 on CPUs, autocast and compiled on a GPU."""
    other = others_model(against, config, vocab_size).to(runtime.device).train()
    on_gpu = runtime.device.type == "cuda"
    lr, betas = config.learning_rate, (config.beta1, config.beta2)
    if against == "transformers":
        optimizer = torch.optim.AdamW(other.parameters(), lr, betas, weight_decay=config.weight_decay)
    else:
        with contextlib.redirect_stdout(None):
            optimizer = other.configure_optimizers(config.weight_decay, lr, betas, runtime.device.type)
    if on_gpu:
        maybe_compile(other, config.compile, runtime.device, config.max_iters)
    place = replace(runtime, dtype=runtime.dtype if on_gpu else torch.float32)
    batches = step_batches(data, config, runtime, 0)

    def step(number: int) -> None:
        nonlocal batches
        with as_others(runtime):
            for x, y, *_ in batches:
                with place.autocast():
                    if against == "transformers":
                        logits = other(x, use_cache=False).logits
                        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
                    else:
                        _, loss = other(x, y.contiguous())
                (loss / len(batches)).backward()
            torch.nn.utils.clip_grad_norm_(other.parameters(), config.grad_clip or math.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        batches = step_batches(data, config, runtime, number + 1)  # theirs does so, too

    return other, step


def others_generate(
    against: str, config: BenchConfig, new: int, vocab_size: int, runtime: Runtime
) -> Callable[[torch.Tensor], object]:
    """Their generation of `new` tokens after a prompt (1, T): nanoGPT's as its sample.py does it,
    transformers' in the arithmetic that ours runs in."""
    other = others_model(against, config, vocab_size).to(runtime.device).eval()
    if against == "transformers":
        other.to(runtime.dtype)
        choices = {
            "do_sample": True,
            "temperature": 0.8,
            "top_k": 200,
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        return lambda idx: other.generate(idx, max_new_tokens=new, min_new_tokens=new, **choices)
    place = replace(runtime, dtype=torch.float32) if runtime.device.type == "cpu" else runtime

    def generate(idx: torch.Tensor) -> None:
        with as_others(runtime), place.autocast():
            other.generate(idx, new, temperature=0.8, top_k=200)

    return generate
