"""GPT-2 in one file: the network, GPT-2's weights in, AdamW's groups, generation.

Shapes: B sequences, T positions, C = n_embd channels, H = n_head heads, V = vocab_size.
Sources: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) and the weights released
with it; the transformer (arXiv 1706.03762); GELU (arXiv 1606.08415).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

ACTIVATIONS = {"gelu_tanh": "tanh", "gelu": "none"}  # to the name of F.gelu's approximation


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
    activation: str = (
        "gelu_tanh"  # GPT-2's; "gelu" is the exact one, which nanoGPT's checkpoints were trained with
    )

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; change one of them"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}; it must be at least 0 and below 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}; it must be one of {', '.join(ACTIVATIONS)}")


class CausalSelfAttention(nn.Module):
    """Every position reads from itself and those before it, in n_head independent ways."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, C/H) each
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, H, T, C/H)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Every position thinks for itself, four times as wide."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.approximate = ACTIVATIONS[config.activation]
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.c_fc(x), approximate=self.approximate)  # (B, T, 4C)
        return F.dropout(self.c_proj(h), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP: each reads the residual stream, normalised, and adds to it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token ids in, a score for each possible next token out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: the same table reads and writes tokens
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: deviation 0.02, and 0.02/√(2·n_layer) in the layers that add to the residual stream."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)  # LayerNorms are 1, biases 0
            else:
                parameter.normal_(std=residual_std if name.endswith("c_proj.weight") else 0.02)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits and mean cross-entropy of the next token, in nats.

        idx (B, T), T <= block_size; targets (B, T), where -1 is not counted.
        With targets: logits (B, T, V) and the loss. Without: logits of the last position (B, 1, V) and None.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size={self.config.block_size}")
        positions = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None  # (B, 1, V): nobody asks for the other positions
        logits = self.lm_head(x)  # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> torch.Tensor:
        """idx (B, T) with max_new_tokens sampled ones after it: (B, T + max_new_tokens). See `stream`."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k)], dim=1)

    def stream(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        vocab_size: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield the next token of each of the B sequences, (B, 1), max_new_tokens times.

        Past block_size, only the last block_size tokens are read. Ids from `vocab_size` on are never drawn: a
        padded vocabulary has them, no tokenizer can read them. The caller sets eval mode.
        """
        for _ in range(max_new_tokens):
            with torch.no_grad():
                logits, _ = self(idx[:, -self.config.block_size :])  # (B, 1, V)
                next_id = sample_token(logits[:, -1, :vocab_size], temperature, top_k)  # (B, 1)
            idx = torch.cat([idx, next_id], dim=1)
            yield next_id

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict[str, Any] | None = None) -> "GPT":
        """GPT-2's weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder or hub name of that format.

        `override_args` may set dropout. Raises OSError where the weights cannot be had, ValueError where they
        are not a GPT-2's or another setting is overridden.
        """
        from transformers import GPT2LMHeadModel

        if set(override_args or {}) - {"dropout"}:
            raise ValueError(f"only dropout can be overridden, not {', '.join(override_args)}")
        theirs, info = GPT2LMHeadModel.from_pretrained(
            model_type, dtype=torch.float32, output_loading_info=True
        )
        missing = set(info["missing_keys"]) - {"lm_head.weight"}  # tied, so not stored
        if missing:
            raise ValueError(f"{len(missing)} weights are missing, such as {min(missing)}")
        model = cls(gpt2_config(theirs.config, **(override_args or {})))
        conv1d = (
            "c_attn.weight",
            "c_proj.weight",
            "c_fc.weight",
        )  # stored (in, out), where nn.Linear has (out, in)
        weights = {
            name: tensor.t() if name.endswith(conv1d) else tensor
            for name, tensor in theirs.state_dict().items()
            if not name.endswith((".attn.bias", ".attn.masked_bias"))  # old files keep the causal mask
        }
        model.load_state_dict(weights)
        return model

    def crop_block_size(self, block_size: int) -> None:
        """Forget the positions from block_size on: a shorter context, the same weights. Raises ValueError."""
        if not 1 <= block_size <= self.config.block_size:
            longest = self.config.block_size
            raise ValueError(
                f"block_size={block_size} does not fit the model's {longest}; choose 1 to {longest}"
            )
        self.config.block_size = block_size
        self.transformer.wpe = nn.Embedding.from_pretrained(
            self.transformer.wpe.weight.detach()[:block_size].clone(), freeze=False
        )

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
        """Number of parameters; wte counts, as it is the head too; wpe only where non_embedding=False."""
        total = sum(p.numel() for p in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token, counted as in PaLM (arXiv 2204.02311, B)."""
        config = self.config
        attention = 12 * config.n_layer * config.n_embd * config.block_size
        return 6 * self.get_num_params() + attention

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, peak_flops: float = 312e12) -> float:
        """Share of peak_flops (an A100's in bf16) that fwdbwd_per_iter sequences in dt seconds reach."""
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops


def sample_token(logits: torch.Tensor, temperature: float, top_k: int | None) -> torch.Tensor:
    """Draw one id for each row of logits (B, V): (B, 1). Temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1)


def gpt2_config(theirs: Any, **overrides: Any) -> GPTConfig:
    """GPTConfig of a transformers GPT2Config. Raises ValueError where theirs is not GPT-2 as released."""
    as_released = {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    for key, value in as_released.items():
        if getattr(theirs, key, value) != value:
            raise ValueError(
                f"{key}={getattr(theirs, key)} is not GPT-2's {value}; this model cannot be loaded"
            )
    if theirs.n_inner not in (None, 4 * theirs.n_embd):
        raise ValueError(f"n_inner={theirs.n_inner} is not four times n_embd; this model cannot be loaded")
    return GPTConfig(
        block_size=theirs.n_positions,
        vocab_size=theirs.vocab_size,
        n_layer=theirs.n_layer,
        n_head=theirs.n_head,
        n_embd=theirs.n_embd,
        **overrides,
    )
