"""distroGPT's network for Hugging Face's transformers (5.0 and newer), in one file and plain torch.

export.py copies it beside a model whose settings no architecture of transformers computes. The names of the
weights are distroGPT's. Shapes: B sequences, T positions, S of them with those read before, C = n_embd
channels, V = vocab_size; H = n_head heads of D = C/H numbers, K = n_kv_head of keys and values.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

EPS = 1e-6  # of RMSNorm


class DistroGPTConfig(PretrainedConfig):
    """The shape of a network; the defaults are GPT-2's."""

    model_type = "distrogpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "block_size",
    }

    def __init__(
        self,
        block_size: int = 1024,
        vocab_size: int = 50257,
        n_layer: int = 12,
        n_head: int = 12,
        n_embd: int = 768,
        dropout: float = 0.0,
        bias: bool = True,
        activation: str = "gelu_tanh",  # gelu, relu2, swiglu
        norm: str = "layernorm",  # rmsnorm: without weights
        rotary: bool = False,  # positions turn queries and keys, and are in no table
        qk_norm: bool = False,  # queries and keys of equal length
        n_kv_head: int | None = None,  # None: n_head
        logit_softcap: float = 0.0,  # 0 is off
        embedding_skip: bool = False,  # each block reads the embeddings, too
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.block_size, self.vocab_size = block_size, vocab_size
        self.n_layer, self.n_head, self.n_embd = n_layer, n_head, n_embd
        self.dropout, self.bias, self.activation = dropout, bias, activation
        self.norm, self.rotary, self.qk_norm = norm, rotary, qk_norm
        self.n_kv_head = n_kv_head or n_head
        self.logit_softcap, self.embedding_skip = logit_softcap, embedding_skip
        self.initializer_range, self.use_cache = initializer_range, use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """x over the root of the mean of its squares, over the last dimension, in fp32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPS)


def rotation(positions: torch.Tensor, D: int) -> torch.Tensor:
    """Cosine and sine of the angles of rotary positions (B, T): (2, B, 1, T, D/2)."""
    speed = 1 / 10_000.0 ** (torch.arange(0, D, 2, device=positions.device) / D)  # (D/2,)
    angle = positions[:, None, :, None] * speed
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn each pair of neighbours in the last dimension of x (B, H, T, D), in fp32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, H, T, D/2)
    cos, sin = turn
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


class RMSNorm(nn.Module):
    """rms_norm as a module, in the type of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x).to(x.dtype)


def norm_layer(config: DistroGPTConfig) -> nn.Module:
    return RMSNorm() if config.norm == "rmsnorm" else nn.LayerNorm(config.n_embd, bias=config.bias)


class Attention(nn.Module):
    """Every position reads from itself and those before it, as far as visible(S) lets it."""

    def __init__(self, config: DistroGPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout, self.qk_norm = layer, config.dropout, config.qk_norm
        self.H, self.K, self.D = config.n_head, config.n_kv_head, config.n_embd // config.n_head
        self.scale = 12 / self.D if config.qk_norm else self.D**-0.5
        self.c_attn = nn.Linear(config.n_embd, (self.H + 2 * self.K) * self.D, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self,
        x: torch.Tensor,
        turn: torch.Tensor | None,
        visible: Callable[[int], torch.Tensor],
        cache: Cache | None,
    ) -> torch.Tensor:
        B, T, C = x.shape
        H, K = self.H, self.K
        heads = self.c_attn(x).view(B, T, H + 2 * K, self.D).transpose(1, 2)  # (B, H + 2K, T, D)
        qk, v = heads.split((H + K, K), dim=1)
        if self.qk_norm:
            qk = rms_norm(qk)
        if turn is not None:
            qk = rotate(qk, turn)
        q, k = qk.to(v.dtype).split((H, K), dim=1)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)  # (B, K, S, D)
        if H != K:
            k, v = (each.repeat_interleave(H // K, dim=1) for each in (k, v))
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, visible(k.size(2)), p, scale=self.scale)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Every position thinks for itself."""

    def __init__(self, config: DistroGPTConfig) -> None:
        super().__init__()
        self.activation, self.dropout = config.activation, config.dropout
        gated = config.activation == "swiglu"
        width = 16 * math.ceil(config.n_embd / 6) if gated else 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, 2 * width if gated else width, bias=config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c_fc(x)
        if self.activation == "swiglu":
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        elif self.activation == "relu2":
            x = F.relu(x).square()
        else:
            x = F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then MLP: each reads the residual stream, normalised, and adds to it."""

    def __init__(self, config: DistroGPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1, self.attn = norm_layer(config), Attention(config, layer)
        self.ln_2, self.mlp = norm_layer(config), MLP(config)
        self.skip = nn.Parameter(torch.tensor([1.0, 0.0])) if config.embedding_skip else None

    def forward(self, x: torch.Tensor, x0: torch.Tensor, *reads: Any) -> torch.Tensor:
        if self.skip is not None:
            x = self.skip[0] * x + self.skip[1] * x0
        x = x + self.attn(self.ln_1(x), *reads)
        return x + self.mlp(self.ln_2(x))


class DistroGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """Token ids in, a score for each possible next token out."""

    config_class = DistroGPTConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: DistroGPTConfig) -> None:
        super().__init__(config)
        parts = {
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            "ln_f": norm_layer(config),
        }
        if config.rotary:
            del parts["wpe"]
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer["wte"] = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), or of the last logits_to_keep positions, of input_ids (B, T).

        attention_mask (B, S) is 0 where a token is padding; positions count from the first that is none.
        With labels (B, T), which may be the input_ids themselves: the mean loss of the next token, where
        they are not -100. Raises ValueError where more tokens come than there are positions in a table.
        """
        x = self.transformer["wte"](input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        B, T, _ = x.shape
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        before = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if position_ids is None:
            position_ids = torch.arange(before, before + T, device=x.device).expand(B, T)
            if attention_mask is not None and attention_mask.dim() == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        turn = None
        if self.config.rotary:
            turn = rotation(position_ids, self.config.n_embd // self.config.n_head)
        else:
            if before + T > self.config.block_size and int(position_ids.max()) >= self.config.block_size:
                raise ValueError(
                    f"this model reads {self.config.block_size} tokens at most; shorten the text"
                )
            x = x + self.transformer["wpe"](position_ids)
        masks: dict[int, torch.Tensor] = {}

        def visible(S: int) -> torch.Tensor:
            # made by the first block, for all: S is known only when a cache gives its keys, as one of fixed
            # size gives more than were read
            if S not in masks:
                masks[S] = visible_positions(attention_mask, before, T, x.device, S)
            return masks[S]

        x = x0 = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer["h"]:
            x = block(x, x0, turn, visible, past_key_values)
        x = self.transformer["ln_f"](x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, cap = self.lm_head(x[:, kept]), self.config.logit_softcap
        if cap:
            logits = cap * torch.tanh(logits.float() / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


def visible_positions(
    attention_mask: torch.Tensor | None, before: int, T: int, device: torch.device, S: int
) -> torch.Tensor:
    """Whether each of T new positions, which stand behind `before` others, reads each of S, as many as there
    are or a cache of fixed size has room for: (1 or B, 1, T, S).

    Padding is read by none but itself, which keeps its row from being empty. A mask of four dimensions is
    what the caller wants it to be.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    now = torch.arange(before, before + T, device=device)[:, None]  # (T, 1)
    there = torch.arange(S, device=device)  # (S,)
    visible = (there <= now)[None, None]
    if attention_mask is not None:
        mask = F.pad(attention_mask.bool(), (0, max(0, S - attention_mask.size(1))))[:, :S]  # (B, S)
        visible = visible & (mask[:, None, None] | (there == now))
    return visible
