"""Other implementations to compare with: nanoGPT from a checkout, transformers' GPT-2."""

import contextlib
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from distrogpt.benchmark.timing import float32_precision
from distrogpt.data.dataset import Dataset
from distrogpt.errors import UserError
from distrogpt.kernels.compile import maybe_compile
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig
from distrogpt.training.batches import step_batches

HF = "transformers"


def default_precision(runtime: Runtime) -> str:
    """torch's default on a CPU: a baseline does not get our enable_onednn_float32."""
    return "highest" if runtime.device.type == "cpu" else torch.get_float32_matmul_precision()


def baseline_name(against: str) -> str:
    """A short name for tables, other than "ours"."""
    name = HF if against == HF else Path(against).resolve().name
    return "theirs" if name in ("", "ours") else name


def baseline_model(config: BenchConfig, vocab_size: int) -> torch.nn.Module:
    """nanoGPT's GPT from the checkout config.against, or transformers' GPT-2. Raises UserError."""
    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
    if config.against == HF:
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError:
            raise UserError("transformers is not installed; pip install transformers") from None

        shape |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
        shape |= dict.fromkeys(("bos_token_id", "eos_token_id"))
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=config.block_size, **shape))
    path = Path(config.against) / "model.py"
    if not path.is_file():
        raise UserError(f"against={config.against} has no model.py; name a nanoGPT checkout, or transformers")
    spec = importlib.util.spec_from_file_location("baseline", path)
    module = sys.modules["baseline"] = importlib.util.module_from_spec(spec)
    shape |= {name: getattr(config, name) for name in ("block_size", "dropout", "bias")}
    try:
        with contextlib.redirect_stdout(None):
            spec.loader.exec_module(module)
            return module.GPT(module.GPTConfig(vocab_size=vocab_size, **shape))
    except Exception as error:  # a file of any other project
        raise UserError(f"{path} is not nanoGPT's ({error}); name a nanoGPT checkout") from None


@dataclass
class BaselineTrainer:
    """A training step as the baseline does it: fp32 on CPUs, autocast and compiled on GPUs."""

    config: BenchConfig
    data: Dataset
    vocab_size: int
    runtime: Runtime

    def __post_init__(self) -> None:
        config, device = self.config, self.runtime.device
        self.model = baseline_model(config, self.vocab_size).to(device).train()
        lr, betas = config.learning_rate, (config.beta1, config.beta2)
        if config.against == HF:
            parameters = self.model.parameters()
            self.optimizer = torch.optim.AdamW(parameters, lr, betas, weight_decay=config.weight_decay)
        else:
            with contextlib.redirect_stdout(None):
                self.optimizer = self.model.configure_optimizers(config.weight_decay, lr, betas, device.type)
        if device.type == "cuda":
            maybe_compile(self.model, config.compile, device, config.max_iters)
        else:
            self.runtime = replace(self.runtime, dtype=torch.float32)
        self.batches = step_batches(self.data, config, self.runtime, 0)

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.config.against != HF:
            return self.model(x, y.contiguous())[1]
        logits = self.model(x, use_cache=False).logits  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)

    def __call__(self, number: int) -> None:
        with float32_precision(default_precision(self.runtime)):
            for x, y, *_ in self.batches:
                with self.runtime.autocast():
                    loss = self.loss(x, y)
                (loss / len(self.batches)).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.batches = step_batches(self.data, self.config, self.runtime, number + 1)


def baseline_generate(
    config: BenchConfig, max_new_tokens: int, vocab_size: int, runtime: Runtime
) -> Callable[[torch.Tensor], object]:
    """A function that samples tokens after a prompt (1, T): nanoGPT as in its sample.py, transformers in our
    compute dtype."""
    model = baseline_model(config, vocab_size).to(runtime.device).eval()
    sampling = {"temperature": 0.8, "top_k": 200}
    if config.against == HF:
        model.to(runtime.dtype)
        sampling |= {
            "do_sample": True,
            "pad_token_id": 0,
            "eos_token_id": None,
            "min_new_tokens": max_new_tokens,
        }
        return lambda idx: model.generate(idx, max_new_tokens=max_new_tokens, **sampling)
    if runtime.device.type == "cpu":
        runtime = replace(runtime, dtype=torch.float32)

    def generate(idx: torch.Tensor) -> None:
        with float32_precision(default_precision(runtime)), runtime.autocast():
            model.generate(idx, max_new_tokens, **sampling)

    return generate
