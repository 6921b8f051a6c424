"""GPT-2 in one file: the network, GPT-2's weights in, AdamW's groups, generation with a KV cache.

Shapes: B sequences, T positions, C = n_embd channels, H = n_head heads, V = vocab_size.
Sources: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) and the weights released
with it; the transformer (arXiv 1706.03762); GELU (arXiv 1606.08415).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from runtime import cuda_graph

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
    activation: str = "gelu_tanh"  # GPT-2's; "gelu" is the exact one, with which nanoGPT trains

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; change one")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}; it must be at least 0 and below 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}; it must be one of {', '.join(ACTIVATIONS)}")


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """F.dropout (arXiv 1207.0580); on CPUs from random bytes, ten times as fast, p to the nearest 1/256."""
    if not training or p == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    dropped = min(max(round(256 * p), 1), 255)  # bytes below this drop
    noise = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    noise = noise.view(torch.uint8)[: x.numel()].view(x.shape)
    keep = torch.ge(noise, dropped, out=torch.empty(x.shape, dtype=x.dtype))
    return x * keep.mul_(256 / (256 - dropped))


@lru_cache(maxsize=64)
def causal_bias(begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores of positions begin..end-1: -inf where a later one is read. (rows, end)"""
    return torch.full((end - begin, end), -math.inf, dtype=dtype).triu(1 + begin)


def causal_attention(qkv: torch.Tensor, p: float) -> torch.Tensor:
    """softmax(q kᵀ/√D) v where no position reads a later one: qkv (3, B, H, T, D) to (B, H, T, D).

    p is the dropout of the weights. On GPUs torch's own kernel; on CPUs plain products, in bf16 and with
    dropout several times as fast.
    """
    if qkv.device.type != "cpu":
        return F.scaled_dot_product_attention(*qkv, dropout_p=p, is_causal=True)
    _, B, H, T, D = qkv.shape
    q, k, v = qkv.reshape(3, B * H, T, D)
    rows = max(128, T // 4)  # of queries at a time: most of what a causal model may not read is not computed
    parts = []
    for begin in range(0, T, rows):
        end = min(begin + rows, T)
        bias = causal_bias(begin, end, q.dtype)
        scores = torch.baddbmm(bias, q[:, begin:end], k[:, :end].transpose(1, 2), alpha=D**-0.5)
        weights = dropout(scores.softmax(dim=-1), p, training=True)  # (B·H, rows, end)
        parts.append(torch.bmm(weights, v[:, :end]))
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return y.view(B, H, T, D)


class KVCache:
    """Keys and values of the tokens read so far, for B sequences of up to `size`, allocated once."""

    def __init__(self, config: GPTConfig, B: int, size: int, like: torch.Tensor) -> None:
        self.static = like.is_cuda  # the same shapes at every token, for CUDA graphs
        size += -size % 8 if self.static else 0  # a mask of another length would be copied at every reading
        shape = (config.n_layer, 2, B, config.n_head, size, config.n_embd // config.n_head)
        # on CPUs in fp32: torch's attention of one query is four times as fast as in bf16
        dtype = like.dtype if like.is_cuda else torch.float32
        self.layers = torch.zeros(shape, device=like.device, dtype=dtype).unbind(0)
        self.dtype = dtype
        self.length = 0  # tokens in it

    def attend(self, layer: int, qkv: torch.Tensor, position: torch.Tensor | None) -> torch.Tensor:
        """Put in new keys and values, and read for the queries: qkv (3, B, H, T, D) to (B, H, T, D).

        T tokens from 0 on, or one at `position` (1,).
        """
        past = self.layers[layer]  # (2, B, H, size, D)
        if position is None:
            past[:, :, :, : qkv.size(3)] = qkv[1:]  # one row of qkv goes into all B
            return causal_attention(qkv, 0.0)
        qkv = qkv.to(self.dtype)
        past.index_copy_(3, position, qkv[1:])
        if self.static:
            if layer == 0:  # what is added to the scores in all layers: -inf after `position`
                later = torch.arange(past.size(3), device=past.device) > position
                self.bias = torch.zeros_like(later, dtype=self.dtype).masked_fill_(later, -math.inf)[None]
            return F.scaled_dot_product_attention(qkv[0], past[0], past[1], attn_mask=self.bias)
        keys, values = past[:, :, :, : self.length + 1]
        return F.scaled_dot_product_attention(qkv[0], keys, values)


class CausalSelfAttention(nn.Module):
    """Every position reads from itself and those before it, in n_head independent ways."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self,
        x: torch.Tensor,
        cache: KVCache | None = None,
        layer: int = 0,
        position: torch.Tensor | None = None,
    ) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, C/H)
        if cache is None:
            y = causal_attention(qkv, self.dropout if self.training else 0.0)  # (B, H, T, C/H)
        else:
            y = cache.attend(layer, qkv, position).to(x.dtype)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        return dropout(y, self.dropout, self.training)


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
        return dropout(self.c_proj(h), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP: each reads the residual stream, normalised, and adds to it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, *past: Any) -> torch.Tensor:
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
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, only_loss: bool = False
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits and mean cross-entropy of the next token, in nats.

        idx (B, T), T <= block_size; targets (B, T), where -1 is not counted.
        With targets: logits (B, T, V), or None with only_loss, and the loss. Without: logits of the last
        position (B, 1, V) and None.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x[:, -1:]), None  # (B, 1, V): nobody asks for the other positions
        logits = self.lm_head(x)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return None if only_loss else logits, loss  # compiled, returned logits cost a gradient of their size

    def hidden(
        self, idx: torch.Tensor, cache: KVCache | None = None, position: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What lm_head reads, (B, T, C), of idx (B, T): tokens from position 0 on, or one at `position`."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size={self.config.block_size}")
        positions = torch.arange(T, device=idx.device) if position is None else position
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.transformer.h):
            if cache is not None:
                x = block(x, cache, layer, position)
            elif self.activation_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.transformer.ln_f(x)

    def prefill(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Read idx (1 or B, T) from position 0 on into the cache; logits of what comes next (1 or B, V)."""
        x = self.hidden(idx, cache)
        cache.length = idx.size(1)
        return self.lm_head(x[:, -1])

    def decode(self, ids: torch.Tensor, position: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Read one more token of each sequence, ids (B, 1) at position (1,); logits of the next (B, V)."""
        return self.lm_head(self.hidden(ids, cache, position)[:, -1])

    @torch.no_grad()
    def generate(
        self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None
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

        Each token is read once: keys and values are kept. Where block_size is full, the last three quarters
        of it are read anew, as positions from 0 on, which makes room for the next quarter. Ids from
        `vocab_size` on are never drawn: a padded vocabulary has them, no tokenizer can read them. The caller
        sets eval mode.
        """
        block_size, weight = self.config.block_size, self.transformer.wte.weight
        window = idx[:, -block_size:]  # the newest tokens, at most block_size
        size = min(block_size, window.size(1) + max_new_tokens)
        cache = KVCache(self.config, len(idx), size, weight)
        decode = partial(self.decode, cache=cache)
        recorded, next_id = not weight.is_cuda, window[:, -1:]
        for number in range(max_new_tokens):
            with torch.no_grad():
                if number == 0:
                    same = bool((window == window[:1]).all())  # one prompt for all samples is read once
                    logits = self.prefill(window[:1] if same else window, cache).expand(len(idx), -1)
                elif cache.length == block_size:
                    window = window[:, -max(1, block_size * 3 // 4) :]
                    logits = self.prefill(window, cache)
                else:
                    position = torch.full((1,), cache.length, device=idx.device)
                    if not recorded:
                        decode, recorded = cuda_graph(decode, next_id, position), True
                    logits = decode(next_id, position)
                    cache.length += 1
                next_id = sample_token(logits[:, :vocab_size], temperature, top_k)  # (B, 1)
                window = torch.cat([window, next_id], dim=1)
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
        how = {"dtype": torch.float32, "output_loading_info": True}
        theirs, info = GPT2LMHeadModel.from_pretrained(model_type, **how)
        missing = set(info["missing_keys"]) - {"lm_head.weight"}  # tied, so not stored
        if missing:
            raise ValueError(f"{len(missing)} weights are missing, such as {min(missing)}")
        model = cls(gpt2_config(theirs.config, **(override_args or {})))
        conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored (in, out), not (out, in)
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
            raise ValueError(f"block_size={block_size} does not fit the model; choose 1 to {longest}")
        self.config.block_size = block_size
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
        """Number of parameters; wte counts, as it is the head too; wpe only where non_embedding=False."""
        total = sum(p.numel() for p in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token, counted as in PaLM (arXiv 2204.02311, B)."""
        attention = 12 * self.config.n_layer * self.config.n_embd * self.config.block_size
        return 6 * self.get_num_params() + attention

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, peak_flops: float = 312e12) -> float:
        """Share of peak_flops (an A100's in bf16) that fwdbwd_per_iter sequences in dt seconds reach."""
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops


def sample_token(logits: torch.Tensor, temperature: float, top_k: int | None) -> torch.Tensor:
    """Draw one id for each row of logits (B, V): (B, 1). Temperature 0 takes the likeliest."""
    if temperature < 1e-5:  # 0, or too small to divide by
        return logits.argmax(dim=-1, keepdim=True)
    if not top_k or top_k >= logits.size(-1):
        return torch.multinomial((logits.float() / temperature).softmax(dim=-1), num_samples=1)
    values, ids = logits.topk(top_k)  # (B, top_k)
    chosen = torch.multinomial((values.float() / temperature).softmax(dim=-1), num_samples=1)  # (B, 1)
    return ids.gather(1, chosen)


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
            raise ValueError(f"{key}={getattr(theirs, key)} is not GPT-2's {value}; it cannot be loaded")
    if theirs.n_inner not in (None, 4 * theirs.n_embd):
        raise ValueError(f"n_inner={theirs.n_inner} is not four times n_embd; this model cannot be loaded")
    shape = {name: getattr(theirs, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    return GPTConfig(block_size=theirs.n_positions, **shape, **overrides)
