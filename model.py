"""GPT in one file: the network and its settings, GPT-2's weights in, one token after another with a KV cache.

The defaults of GPTConfig are GPT-2; its later settings are what came since, each alone or with others.

Shapes: B sequences, T positions, C = n_embd channels, V = vocab_size; H = n_head heads of D = C/H channels,
K = n_kv_head of keys and values.
Sources: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) and the weights released
with it; the transformer (arXiv 1706.03762); GELU (arXiv 1606.08415); those of the settings stand beside them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from distrogpt.inference.decoder import SamplingParams, stream
from distrogpt.kernels.cpu import KVCache, causal_attention, dropout, rms_norm, rotate, rotation


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """The first half of the channels gates the second (arXiv 2002.05202): (..., 2N) to (..., N)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # GPT-2's
    "gelu": F.gelu,  # the exact one, with which nanoGPT trains
    "relu2": lambda x: F.relu(x).square(),  # arXiv 2109.08668
    "swiglu": swiglu,
}
NORMS = ("layernorm", "rmsnorm")


@dataclass
class GPTConfig:
    """The shape of a network; the defaults are GPT-2 124M. Raises ValueError where it cannot be built."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50,257, padded to a multiple of 64, which GPUs multiply faster
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    activation: str = "gelu_tanh"
    norm: str = "layernorm"  # "rmsnorm": only the length is normalised, without weights (arXiv 1910.07467)
    rotary: bool = False  # positions turn queries and keys, and are in no table (arXiv 2104.09864)
    qk_norm: bool = False  # queries and keys of equal length: scores cannot grow large (arXiv 2010.04245)
    n_kv_head: int | None = None  # of keys and values, each read by n_head/n_kv_head heads (arXiv 2305.13245)
    tied: bool = True  # one table reads and writes tokens (arXiv 1608.05859); False: two
    logit_softcap: float = 0.0  # bounds logits by cap·tanh(logits/cap) (arXiv 2408.00118); 0 is off
    embedding_skip: bool = False  # each block reads the stream and the embeddings, by weights that it learns
    zero_init: bool = False  # blocks begin as nothing: c_proj, and a head of its own, start at zero

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1 and below 2**31")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; change one")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}; it must be at least 0 and below 1")
        for name, known in (("activation", ACTIVATIONS), ("norm", NORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}; it must be one of {', '.join(known)}")
        if self.n_kv_head is not None and (self.n_kv_head < 1 or self.n_head % self.n_kv_head):
            raise ValueError(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}; change one")
        if self.rotary and self.n_embd // self.n_head % 2:
            raise ValueError(f"rotary turns pairs: n_embd/n_head={self.n_embd // self.n_head} must be even")
        self.logit_softcap = float(self.logit_softcap)
        if not 0 <= self.logit_softcap < math.inf:
            raise ValueError(f"logit_softcap={self.logit_softcap}; it must be at least 0 and finite")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values: K."""
        return self.n_kv_head or self.n_head

    @property
    def mlp_width(self) -> int:
        """Channels within an MLP; a gated one has three matrices, not two."""
        return 16 * math.ceil(self.n_embd / 6) if self.activation == "swiglu" else 4 * self.n_embd


class RMSNorm(nn.Module):
    """rms_norm as a module, in the type of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x).to(x.dtype)


def norm_layer(config: GPTConfig) -> nn.Module:
    """What stands before each layer that reads the residual stream."""
    return RMSNorm() if config.norm == "rmsnorm" else nn.LayerNorm(config.n_embd, bias=config.bias)


class CausalSelfAttention(nn.Module):
    """Every position reads from itself and those before it, in n_head independent ways."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.kv_heads, self.qk_norm = config.n_head, config.kv_heads, config.qk_norm
        self.dropout = config.dropout
        self.D = config.n_embd // config.n_head
        # of the scores; equal lengths bound them: by √D at GPT-2's, too little to choose one position alone
        self.scale = 12 / self.D if config.qk_norm else self.D**-0.5
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.kv_heads) * self.D, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self,
        x: torch.Tensor,
        turn: torch.Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        position: torch.Tensor | None = None,
    ) -> torch.Tensor:
        B, T, C = x.shape
        H, K = self.n_head, self.kv_heads
        heads = self.c_attn(x).view(B, T, H + 2 * K, self.D).transpose(1, 2)  # (B, H + 2K, T, D)
        qk, v = heads.split((H + K, K), dim=1)
        if self.qk_norm:
            qk = rms_norm(qk)
        if turn is not None:
            qk = rotate(qk, turn)
        q, k = qk.to(v.dtype).split((H, K), dim=1)
        if cache is None:
            p = self.dropout if self.training else 0.0
            y = causal_attention(q, k, v, self.scale, p)  # (B, H, T, D)
        else:
            y = cache.attend(layer, q, k, v, self.scale, position).to(x.dtype)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        return dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Every position thinks for itself, four times as wide."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.activation = ACTIVATIONS[config.activation]
        width, gated = config.mlp_width, config.activation == "swiglu"
        self.c_fc = nn.Linear(config.n_embd, 2 * width if gated else width, bias=config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.activation(self.c_fc(x))  # (B, T, width)
        return dropout(self.c_proj(h), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP: each reads the residual stream, normalised, and adds to it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = norm_layer(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = norm_layer(config)
        self.mlp = MLP(config)
        self.skip = nn.Parameter(torch.empty(2)) if config.embedding_skip else None

    def forward(self, x: torch.Tensor, x0: torch.Tensor, *past: Any) -> torch.Tensor:
        if self.skip is not None:
            x = self.skip[0] * x + self.skip[1] * x0
        x = x + self.attn(self.ln_1(x), *past).to(x.dtype)  # a sum of mixed types is slow on CPUs
        return x + self.mlp(self.ln_2(x)).to(x.dtype)


class GPT(nn.Module):
    """Token ids in, a score for each possible next token out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: less memory, a third more arithmetic (arXiv 1604.06174)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": norm_layer(config),
            }
        )
        if config.rotary:
            del self.transformer["wpe"]
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: deviation 0.02, and 0.02/√(2·n_layer) (or 0) in the layers that add to the stream."""
        residual_std = 0.0 if self.config.zero_init else 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("skip"):
                parameter.copy_(torch.tensor([1.0, 0.0]))  # the stream alone
            elif parameter.dim() < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)  # LayerNorms are 1, biases 0
            else:
                parameter.normal_(std=residual_std if name.endswith("c_proj.weight") else 0.02)
        if self.config.zero_init and not self.config.tied:
            self.lm_head.weight.zero_()

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, only_loss: bool = False
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits and mean cross-entropy of the next token, in nats.

        idx (B, T), T <= block_size; targets (B, T), where -1 is not counted.
        With targets: logits (B, T, V), or None with only_loss, and the loss. Without: logits of the last
        position (B, 1, V) and None.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.scores(x[:, -1:]), None  # (B, 1, V): nobody asks for the other positions
        logits = self.scores(x)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return None if only_loss else logits, loss  # compiled, returned logits cost a gradient of their size

    def hidden(
        self, idx: torch.Tensor, cache: KVCache | None = None, position: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What lm_head reads, (B, T, C), of idx (B, T): tokens from position 0 on, or at `position`
        (1 or B, T), beside what the cache has."""
        T, config = idx.size(1), self.config
        if T > config.block_size and position is None:
            raise ValueError(f"{T} tokens do not fit into block_size={config.block_size}")
        positions = torch.arange(T, device=idx.device)[None] if position is None else position
        x, turn = self.transformer.wte(idx), None  # (B, T, C)
        if config.rotary:
            turn = rotation(config.block_size, config.n_embd // config.n_head, idx.device)
            turn = turn[:, positions].unsqueeze(2)  # (2, 1 or B, 1, T, D/2)
        else:
            x = x + self.transformer.wpe(positions)
        x = x0 = dropout(x, config.dropout, self.training)
        for layer, block in enumerate(self.transformer.h):
            if cache is not None:
                x = block(x, x0, turn, cache, layer, position)
            elif self.activation_checkpointing and self.training:
                x = checkpoint(block, x, x0, turn, use_reentrant=False)
            else:
                x = block(x, x0, turn)
        return self.transformer.ln_f(x)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of x (..., C)."""
        logits, cap = self.lm_head(x), self.config.logit_softcap
        return cap * torch.tanh(logits.float() / cap) if cap else logits

    def prefill(self, idx: torch.Tensor, last: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Read idx (N, T) from position 0 on into the cache; logits (N, V) of what follows position
        `last` (N,) of each, behind which nothing counts."""
        x = self.hidden(idx, cache)
        return self.scores(x[torch.arange(len(x), device=x.device), last])

    def decode(self, ids: torch.Tensor, position: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Read a token more of each sequence, ids (B, 1) at position (1 or B, 1); next logits (B, V)."""
        return self.scores(self.hidden(ids, cache, position)[:, -1])

    def log_likelihood(
        self,
        idx: torch.Tensor,
        places: torch.Tensor,
        targets: torch.Tensor,
        cache: Any = None,
        position: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logarithms (N,) of the chances of the ids `targets` (N,) to follow `places` (N,) of idx (B, T), all
        of its rows being one."""
        x = self.hidden(idx, cache, position).flatten(0, 1)[places]  # (N, C)
        parts = zip(x.split(256), targets.split(256), strict=True)  # all logits at once would take gigabytes
        return torch.cat([-F.cross_entropy(self.scores(x).float(), y, reduction="none") for x, y in parts])

    @torch.no_grad()
    def generate(
        self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None
    ) -> torch.Tensor:
        """idx (B, T) with max_new_tokens sampled ones after it, (B, T + max_new_tokens): decoding.stream."""
        drawn = stream(self, idx, max_new_tokens, SamplingParams(temperature, top_k))
        return torch.cat([idx, *(ids for ids, _ in drawn)], dim=1)

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict[str, Any] | None = None) -> "GPT":
        """The weights of gpt2, gpt2-medium, gpt2-large, gpt2-xl, or of a folder or hub name in one of the
        formats that huggingface.py knows.

        `override_args` may set dropout. Raises OSError where the weights cannot be had, ValueError where they
        are of another network or another setting is overridden.
        """
        from distrogpt.huggingface.formats import find_folder, read_pretrained

        if set(override_args or {}) - {"dropout"}:
            raise ValueError(f"only dropout can be overridden, not {', '.join(override_args)}")
        return read_pretrained(find_folder(model_type), **(override_args or {}))

    def crop_block_size(self, block_size: int) -> None:
        """Forget the positions from block_size on: a shorter context, the same weights. Raises ValueError."""
        if not 1 <= block_size <= self.config.block_size:
            longest = self.config.block_size
            raise ValueError(f"block_size={block_size} does not fit the model; choose 1 to {longest}")
        self.config.block_size = block_size
        if not self.config.rotary:
            kept = self.transformer.wpe.weight.detach()[:block_size].clone()
            self.transformer.wpe = nn.Embedding.from_pretrained(kept, freeze=False)

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.AdamW:
        """AdamW (arXiv 1711.05101) that decays matrices and embeddings, not biases and LayerNorms."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = device_type in ("cuda", "cpu")  # one kernel for all parameters
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters; with non_embedding, without wpe, and without wte where it is not lm_head."""
        total = sum(p.numel() for p in self.parameters())
        if not non_embedding:
            return total
        total -= 0 if self.config.rotary else self.transformer.wpe.weight.numel()
        return total if self.config.tied else total - self.transformer.wte.weight.numel()

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token, counted as in PaLM (arXiv 2204.02311, B)."""
        attention = 12 * self.config.n_layer * self.config.n_embd * self.config.block_size
        return 6 * self.get_num_params() + attention

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, peak_flops: float = 312e12) -> float:
        """Share of peak_flops (an A100's in bf16) that fwdbwd_per_iter sequences in dt seconds reach."""
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops
