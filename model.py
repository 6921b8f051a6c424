"""GPT in one file: copied alone, it trains, loads GPT-2's weights, and generates with a KV cache.

The defaults of GPTConfig are GPT-2. The settings after `bias` are later improvements; each works alone.

Shapes: B sequences, T positions, C = n_embd channels, V = vocab_size; H = n_head query heads of D = C/H
channels, K = n_kv_head key/value heads; S positions of a KV cache.
Sources: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) and its weights; the
transformer (arXiv 1706.03762); GELU (arXiv 1606.08415); the settings name their own.

distrogpt/kernels can replace the nn.Dropout, RMSNorm, Rotary, Attention and nn.Linear layers by faster ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def swiglu(x: Tensor) -> Tensor:
    """The first half of the channels gates the second (arXiv 2002.05202): (..., 2N) to (..., N)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # GPT-2's
    "gelu": F.gelu,  # the exact one, with which nanoGPT trains
    "relu2": lambda x: F.relu(x).square(),  # arXiv 2109.08668
    "swiglu": swiglu,
}
NORMS = ("layernorm", "rmsnorm")
EPS = 1e-6  # of RMSNorm: keeps a row of zeros from being divided by zero


@dataclass
class GPTConfig:
    """The shape of a network; the defaults are GPT-2 124M. Raises ValueError if it cannot be built."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50,257, padded to a multiple of 64 for faster matrix products on GPUs
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    activation: str = "gelu_tanh"
    norm: str = "layernorm"  # or "rmsnorm", without learned weights (arXiv 1910.07467)
    rotary: bool = False  # rotary position embeddings instead of a table (arXiv 2104.09864)
    qk_norm: bool = False  # RMSNorm on queries and keys, which bounds the scores (arXiv 2010.04245)
    n_kv_head: int | None = None  # fewer key/value heads: grouped-query attention (arXiv 2305.13245)
    tied: bool = True  # token embedding and lm_head share their weights (arXiv 1608.05859)
    logit_softcap: float = 0.0  # cap · tanh(logits / cap) (arXiv 2408.00118); 0 is off
    embedding_skip: bool = False  # each block reads a learned mix of the residual stream and the embeddings
    zero_init: bool = False  # projections into the residual stream, and an untied lm_head, start at zero
    qk_norm_weights: bool = False  # qk_norm with learned weights and GPT-2's scale, as Qwen3 has it
    key_offset: bool = False  # half of each key is that of the position before (cf. arXiv 2209.11895)

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name}={getattr(self, name)} is out of range; use 1 to 2**31 - 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; change one")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is out of range; it must be at least 0 and below 1")
        for name, known in (("activation", ACTIVATIONS), ("norm", NORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(known)}")
        if self.n_kv_head is not None and (self.n_kv_head < 1 or self.n_head % self.n_kv_head):
            raise ValueError(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}; change one")
        if (self.rotary or self.key_offset) and self.head_dim % 2:
            need = "rotary and key_offset need an even n_embd/n_head"
            raise ValueError(f"{need}, which is {self.head_dim}; change one")
        if self.qk_norm_weights and not self.qk_norm:
            raise ValueError("qk_norm_weights has no effect without qk_norm; set both")
        self.logit_softcap = float(self.logit_softcap)
        if not 0 <= self.logit_softcap < math.inf:
            raise ValueError(f"logit_softcap={self.logit_softcap} is out of range; it must be at least 0")

    @property
    def head_dim(self) -> int:
        """Channels of a head: D."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Key/value heads: K."""
        return self.n_kv_head or self.n_head

    @property
    def mlp_width(self) -> int:
        """Hidden channels of an MLP; SwiGLU has three matrices instead of two, so they are narrower."""
        return 16 * math.ceil(self.n_embd / 6) if self.activation == "swiglu" else 4 * self.n_embd


class RMSNorm(nn.Module):
    """x divided by its root mean square over the last dimension, without weights (arXiv 1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=EPS)


def norm_layer(config: GPTConfig) -> nn.Module:
    return RMSNorm() if config.norm == "rmsnorm" else nn.LayerNorm(config.n_embd, bias=config.bias)


def rotary_cos_sin(positions: Tensor, D: int) -> Tensor:
    """cos and sin of the rotation angles at positions (B, T): (2, B, 1, T, D/2).

    At position t, the i-th pair of channels is rotated by t / 10000^(2i/D)."""
    inv_freq = 1 / 10_000.0 ** (torch.arange(0, D, 2, device=positions.device) / D)  # (D/2,)
    angles = positions[:, None, :, None] * inv_freq
    return torch.stack((angles.cos(), angles.sin()))


class Rotary(nn.Module):
    """Rotates each pair of neighbouring channels of x (B, heads, T, D), in fp32."""

    def forward(self, x: Tensor, cos_sin: Tensor) -> Tensor:
        (a, b), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), cos_sin
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def offset_keys(k: Tensor, mask: Tensor | None) -> Tensor:
    """k (B, K, T, D) with half of the channels from the position before; 0 if there is none.

    With these keys, one layer can find what followed a token before. With a mask (1 or B, 1, T, T), the
    position before is the last one that is read."""
    kept, moved = k.chunk(2, dim=-1)
    moved = F.pad(moved, (0, 0, 1, 0))  # (B, K, 1 + T, D/2)
    if mask is None:
        return torch.cat((kept, moved[:, :, :-1]), dim=-1)
    numbers = (mask == 0).tril(-1) * torch.arange(1, k.size(2) + 1, device=k.device)  # (1 or B, 1, T, T)
    return torch.cat((kept, moved.gather(2, numbers.amax(-1)[..., None].expand_as(kept))), dim=-1)


class Attention(nn.Module):
    """softmax(scale q kᵀ + mask) v; without a mask, causal."""

    def __init__(self, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q (B, H, T, D), k and v (B, K, S, D), mask (1 or B, 1, T, S) of 0 and -inf: to q's shape."""
        p, grouped = self.dropout if self.training else 0.0, q.size(1) != k.size(1)
        y = F.scaled_dot_product_attention(
            q.to(k.dtype), k, v, mask, p, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
        )
        return y.to(q.dtype)  # a cache may be in another dtype


class KVCache:
    """Keys and values of the tokens read so far, (n_layer, 2, B, K, size, D), allocated once.

    Queries read its first `length` positions: lower it to what is filled to save time, or leave it so that
    shapes stay the same, as CUDA graphs need them. With key_offset, half of each key is stored one position
    later, where it is read; so there is a position more."""

    def __init__(self, config: GPTConfig, B: int, size: int, device: Any = None, dtype: Any = None) -> None:
        self.length, self.key_offset = size, config.key_offset
        shape = (config.n_layer, 2, B, config.kv_heads, size + self.key_offset, config.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.layers = self.kv.unbind(0)

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (N, K, T, D) of the first N sequences at positions (1 or N, T); returns all that is
        stored, (N, K, length, D)."""
        kv = self.layers[layer][:, : len(k)]  # (2, N, K, size, D)
        parts = [(kv[0], k), (kv[1], v)]
        if self.key_offset:
            (kept, moved), (k, later) = kv[0].chunk(2, dim=-1), k.chunk(2, dim=-1)
            parts[0:1] = [(kept, k), (moved[:, :, 1:], later)]
        for stored, new in parts:
            if len(positions) == 1:
                stored.index_copy_(2, positions[0], new.to(kv.dtype))
            else:
                stored.scatter_(2, positions[:, None, :, None].expand_as(new), new.to(kv.dtype))
        return kv[:, :, :, : self.length].unbind(0)


class CausalSelfAttention(nn.Module):
    """Each position attends to itself and those before it, in n_head independent heads."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.D, self.key_offset = layer, config.head_dim, config.key_offset
        self.n_head, self.kv_heads = config.n_head, config.kv_heads
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.kv_heads) * self.D, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.qk_norm = RMSNorm() if config.qk_norm else None
        self.rotary = Rotary() if config.rotary else None
        learned = config.qk_norm_weights
        self.q_weight, self.k_weight = (nn.Parameter(torch.ones(self.D)) if learned else None for _ in "qk")
        # with qk_norm, q·k is at most D: GPT-2's 1/√D would leave scores too small to single out a position
        scale = 12 / self.D if config.qk_norm and not learned else self.D**-0.5
        self.attention = Attention(scale, config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, at: Tensor, cos_sin: Tensor | None, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """x (B, T, C) at positions `at` (1 or B, T) to (B, T, C)."""
        B, T, C = x.shape
        H, K = self.n_head, self.kv_heads
        heads = self.c_attn(x).view(B, T, H + 2 * K, self.D).transpose(1, 2)  # (B, H + 2K, T, D)
        qk, v = heads.split((H + K, K), dim=1)
        if self.qk_norm is not None:
            qk = self.qk_norm(qk.float())
        if self.q_weight is not None:
            qk = qk * torch.cat((self.q_weight.expand(H, 1, -1), self.k_weight.expand(K, 1, -1)))
        if self.rotary is not None:
            qk = self.rotary(qk, cos_sin)
        q, k = qk.to(v.dtype).split((H, K), dim=1)
        stored = None if cache is None else cache.update(self.layer, k, v, at)  # each (B, K, S, D)
        if stored is not None and mask is not None:  # without a mask, it is a prompt, which reads itself
            k, v = stored
        elif self.key_offset:
            k = offset_keys(k, mask)
        y = self.attention(q, k, v, mask)  # (B, H, T, D)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))  # (B, T, C)


class MLP(nn.Module):
    """Two matrices with a nonlinearity between them, applied to each position alone."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, gated = config.mlp_width, config.activation == "swiglu"
        self.activation = ACTIVATIONS[config.activation]
        self.c_fc = nn.Linear(config.n_embd, 2 * width if gated else width, bias=config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP: each reads the normalised residual stream and adds to it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = norm_layer(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = norm_layer(config)
        self.mlp = MLP(config)
        self.skip = nn.Parameter(torch.empty(2)) if config.embedding_skip else None

    def forward(self, x: Tensor, x0: Tensor, *context: Any) -> Tensor:
        """x and the embeddings x0 (B, T, C) to (B, T, C); `context` is attention's other inputs."""
        if self.skip is not None:
            x = self.skip[0] * x + self.skip[1] * x0
        x = x + self.attn(self.ln_1(x), *context).to(x.dtype)  # adding mixed dtypes is slow on CPUs
        return x + self.mlp(self.ln_2(x)).to(x.dtype)


def embedding(rows: int, columns: int) -> nn.Embedding:
    """nn.Embedding without its initialisation, which is slow on the meta device."""
    return nn.Embedding.from_pretrained(torch.empty(rows, columns), freeze=False)


class GPT(nn.Module):
    """Token ids in, logits of the next token out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # recompute activations in the backward pass (arXiv 1604.06174)
        self.transformer = nn.ModuleDict(
            {
                "wte": embedding(config.vocab_size, config.n_embd),
                "wpe": embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": norm_layer(config),
            }
        )
        if config.rotary:
            del self.transformer["wpe"]
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight
        if not self.lm_head.weight.is_meta:  # on the meta device, weights are to be loaded
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: standard deviation 0.02, and 0.02/√(2·n_layer) in projections into the residual stream."""
        residual_std = 0.0 if self.config.zero_init else 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("skip"):
                parameter.copy_(torch.tensor([1.0, 0.0]))  # the residual stream alone
            elif parameter.dim() < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)  # LayerNorm weights 1, biases 0
            else:
                parameter.normal_(std=residual_std if name.endswith("c_proj.weight") else 0.02)
        if self.config.zero_init and not self.config.tied:
            self.lm_head.weight.zero_()

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, return_logits: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits and mean cross-entropy, in nats, of idx and targets (B, T); targets of -1 do not count.

        With targets: logits (B, T, V), or None without return_logits, and the loss. Without: logits of the
        last position, (B, 1, V), and None."""
        x = self.hidden_states(idx)
        if targets is None:
            return self.logits(x[:, -1:]), None
        logits = self.logits(x)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        # compiled, returned logits would cost a gradient of their size
        return (logits if return_logits else None), loss

    def hidden_states(
        self,
        idx: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The inputs of lm_head, (B, T, C), for idx (B, T).

        Positions are 0..T-1 unless `positions` (1 or B, T) are given. Attention is causal, also over a cache,
        unless a mask (1 or B, 1, T, S) is added to its scores: 0 for a key that is read, else -inf."""
        T, config = idx.size(1), self.config
        if positions is None and T > config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size={config.block_size}")
        if positions is not None and mask is None and cache is not None:
            later = torch.arange(cache.length, device=idx.device) > positions[:, None, :, None]
            mask = torch.zeros_like(later, dtype=cache.kv.dtype)  # (1 or B, 1, T, S)
            mask.masked_fill_(later, -math.inf)
        at = torch.arange(T, device=idx.device)[None] if positions is None else positions
        x, cos_sin = self.transformer.wte(idx), None  # (B, T, C)
        if config.rotary:
            cos_sin = rotary_cos_sin(at, config.head_dim)
        else:
            x = x + self.transformer.wpe(at)
        x = x0 = self.transformer.drop(x)
        for block in self.transformer.h:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, x0, at, cos_sin, mask, cache, use_reentrant=False)
            else:
                x = block(x, x0, at, cos_sin, mask, cache)
        return self.transformer.ln_f(x)

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) to (..., V)."""
        logits, cap = self.lm_head(x), self.config.logit_softcap
        return cap * torch.tanh(logits.float() / cap) if cap else logits

    @torch.no_grad()
    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None
    ) -> Tensor:
        """idx (B, T) followed by max_new_tokens sampled tokens; call eval() first. Temperature 0 is greedy.

        Each token is read once. When block_size is full, the last three quarters of it are read again."""
        size = self.config.block_size
        length = min(idx.size(1) + max_new_tokens, size)
        cache = KVCache(self.config, len(idx), length, idx.device, self.transformer.wte.weight.dtype)
        new, positions = idx[:, -size:], None  # the tokens to read next, and their positions
        for _ in range(max_new_tokens):
            logits = self.logits(self.hidden_states(new, positions, cache=cache)[:, -1])  # (B, V)
            if temperature:
                logits = logits / temperature
                if top_k:
                    lowest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < lowest, -math.inf)
                ids = torch.multinomial(logits.float().softmax(dim=-1), num_samples=1)  # (B, 1)
            else:
                ids = logits.argmax(dim=-1, keepdim=True)
            idx = torch.cat([idx, ids], dim=1)
            end = new.size(1) if positions is None else int(positions) + 1
            if end < size:
                new, positions = ids, torch.tensor([[end]], device=idx.device)
            else:
                new, positions = idx[:, -max(1, size * 3 // 4) :], None
        return idx

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict[str, Any] | None = None) -> "GPT":
        """The weights of gpt2, gpt2-medium, gpt2-large or gpt2-xl, or of a folder that transformers wrote.

        `override_args` may set dropout. Raises OSError or ValueError if that is not a GPT-2."""
        from transformers import GPT2LMHeadModel

        if set(override_args or {}) - {"dropout"}:
            raise ValueError(f"only dropout can be overridden, not {', '.join(override_args)}")
        theirs, report = GPT2LMHeadModel.from_pretrained(model_type, output_loading_info=True)
        if (kind := theirs.config.activation_function) != "gelu_new":
            raise ValueError(f"{model_type}: activation_function={kind} is not GPT-2's, gelu_new")
        shape = {"block_size": theirs.config.n_positions, "vocab_size": theirs.config.vocab_size}
        shape |= {name: getattr(theirs.config, name) for name in ("n_layer", "n_head", "n_embd")}
        model = cls(GPTConfig(**shape, **(override_args or {})))
        conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored as (in, out), not (out, in)
        weights = {name: w.t() if name.endswith(conv1d) else w for name, w in theirs.state_dict().items()}
        if report["missing_keys"] or not all(w.isfinite().all() for w in weights.values()):
            raise ValueError(f"{model_type} has weights that are missing, NaN or infinite")
        model.load_state_dict(weights)
        return model

    def crop_block_size(self, block_size: int) -> None:
        """Drop the positions from block_size on: a shorter context, the same weights. Raises ValueError."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size} is out of range; choose 1 to {self.config.block_size}")
        self.config.block_size = block_size
        if not self.config.rotary:
            kept = self.transformer.wpe.weight.detach()[:block_size].clone()
            self.transformer.wpe = nn.Embedding.from_pretrained(kept, freeze=False)

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.AdamW:
        """AdamW (arXiv 1711.05101) that decays matrices and embeddings, not biases and norms."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = device_type in ("cuda", "cpu")  # one kernel for all parameters
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters; with non_embedding, without wpe, and without wte unless lm_head shares it."""
        total = sum(p.numel() for p in self.parameters())
        if not non_embedding:
            return total
        total -= 0 if self.config.rotary else self.transformer.wpe.weight.numel()
        return total if self.config.tied else total - self.transformer.wte.weight.numel()

    def flops_per_token(self) -> int:
        """FLOPs to train on one token, forward and backward, as in PaLM (arXiv 2204.02311, appendix B)."""
        attention = 12 * self.config.n_layer * self.config.n_embd * self.config.block_size
        return 6 * self.get_num_params() + attention

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, peak_flops: float = 312e12) -> float:
        """Model FLOPs utilisation of fwdbwd_per_iter sequences in dt seconds: the fraction of peak_flops, by
        default an A100's in bf16."""
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops
