"""Other implementations to compare with: nanoGPT from a checkout, transformers' GPT-2."""

import contextlib
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from distrogpt.benchmark.timing import float32_precision
from distrogpt.errors import UserError
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig
from distrogpt.training.batches import BatchLoader

HF = "transformers"


class HuggingFaceGPT2(torch.nn.Module):
    """transformers' GPT-2 with nanoGPT's interface. Raises UserError."""

    def __init__(self, config: BenchConfig, vocab_size: int) -> None:
        super().__init__()
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError:
            raise UserError("transformers is not installed; pip install transformers") from None

        shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
        shape |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
        shape |= {"bos_token_id": None, "eos_token_id": None, "n_positions": config.block_size}
        self.gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **shape))

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.gpt2(idx, use_cache=False).logits  # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)

    def generate(self, idx: torch.Tensor, max_new_tokens: int, **sampling: float) -> torch.Tensor:
        lengths = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens, "eos_token_id": None}
        return self.gpt2.generate(idx, do_sample=True, pad_token_id=0, **lengths, **sampling)


def baseline_name(against: str) -> str:
    """A short name for tables, other than "ours"."""
    name = HF if against == HF else Path(against).resolve().name
    return "theirs" if name in ("", "ours") else name


def baseline_model(config: BenchConfig, vocab_size: int) -> torch.nn.Module:
    """nanoGPT's GPT from the checkout config.against, or transformers' GPT-2. Raises UserError."""
    if config.against == HF:
        return HuggingFaceGPT2(config, vocab_size)
    path = Path(config.against) / "model.py"
    if not path.is_file():
        raise UserError(f"against={config.against} has no model.py; name a nanoGPT checkout, or transformers")
    spec = importlib.util.spec_from_file_location("baseline", path)
    module = sys.modules["baseline"] = importlib.util.module_from_spec(spec)
    names = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    try:
        with contextlib.redirect_stdout(None):
            spec.loader.exec_module(module)
            shape = {name: getattr(config, name) for name in names}
            return module.GPT(module.GPTConfig(vocab_size=vocab_size, **shape))
    except Exception as error:  # a file of any other project
        raise UserError(f"{path} is not nanoGPT's ({error}); name a nanoGPT checkout") from None


def default_precision(runtime: Runtime) -> contextlib.AbstractContextManager:
    """torch's fp32 products on a CPU: a baseline does not get our enable_onednn_float32."""
    on_cpu = runtime.device.type == "cpu"
    return float32_precision("highest" if on_cpu else torch.get_float32_matmul_precision())


def baseline_step(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    batches: BatchLoader,
    grad_clip: float,
    runtime: Runtime,
) -> None:
    """A training step as nanoGPT does it."""
    with default_precision(runtime):
        for x, y, *_ in batches:
            with runtime.autocast():
                _, loss = model(x, y.contiguous())
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        optimizers[0].step()
        optimizers[0].zero_grad(set_to_none=True)


def baseline_generate(
    config: BenchConfig, max_new_tokens: int, vocab_size: int, runtime: Runtime
) -> Callable[[torch.Tensor], object]:
    """A function that samples tokens after a prompt (1, T): nanoGPT as in its sample.py, transformers in our
    compute dtype."""
    model = baseline_model(config, vocab_size).to(runtime.device).eval()
    if config.against == HF:
        model.to(runtime.dtype)
    if config.against == HF or runtime.device.type == "cpu":
        runtime = replace(runtime, dtype=torch.float32)  # without autocast

    def generate(idx: torch.Tensor) -> None:
        with default_precision(runtime), runtime.autocast():
            model.generate(idx, max_new_tokens, temperature=0.8, top_k=200)

    return generate
