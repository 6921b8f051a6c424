"""distroGPT's network for Hugging Face's transformers (5.0 and newer), in one file and plain torch.

export.py copies it beside a model that no architecture of transformers computes. Shapes: B sequences, T new
positions, S positions with those in the cache, C = n_embd channels, V = vocab_size; H = n_head query heads of
D = C/H channels, K = n_kv_head key/value heads.
"""

import inspect
import math
from dataclasses import fields
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

EPS = 1e-6  # of RMSNorm
DEFAULTS: dict[str, Any] = {
    "block_size": 1024,
    "vocab_size": 50257,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": True,
    "activation": "gelu_tanh",  # or gelu, relu2, swiglu
    "norm": "layernorm",  # or rmsnorm, without weights
    "rotary": False,  # rotary position embeddings instead of a table
    "qk_norm": False,  # RMSNorm on queries and keys
    "qk_norm_weights": False,  # qk_norm with learned weights, and GPT-2's scale of scores
    "n_kv_head": None,  # None: n_head
    "logit_softcap": 0.0,  # 0 is off
    "embedding_skip": False,  # each block reads a learned mix of the residual stream and the embeddings
    "key_offset": False,  # half of each key is that of the position before
    "initializer_range": 0.02,
    "use_cache": True,
}
# forward returns the cache by the name that generate reads: "cache" since transformers 5.24
CACHE = "cache" if "cache" in [field.name for field in fields(CausalLMOutputWithPast)] else "past_key_values"
# before transformers 5.4, a cache of fixed size must be given the positions to write at
CACHE_TAKES_POSITIONS = "cache_kwargs" in inspect.signature(Cache.update).parameters
LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels", "ignore_index")
# further arguments of forward that may be given with the one value that is computed
FIXED_ARGUMENTS = {"output_attentions": False, "output_router_logits": False, "is_causal": True}


class DistroGPTConfig(PretrainedConfig):
    """The shape of a network: DEFAULTS, which are GPT-2's, and the settings of any PretrainedConfig."""

    model_type = "distrogpt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "block_size",
    }

    def __init__(self, tie_word_embeddings: bool = True, **kwargs: Any) -> None:
        for name, default in DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        self.n_kv_head = self.n_kv_head or self.n_head
        known = self.activation in ("gelu_tanh", "gelu", "relu2", "swiglu")
        if not known or self.norm not in ("layernorm", "rmsnorm"):
            raise ValueError(f"activation={self.activation}, norm={self.norm}: one of them is not supported")
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def rotary_cos_sin(positions: Tensor, D: int) -> Tensor:
    """cos and sin of the rotation angles at positions (B, T): (2, B, 1, T, D/2)."""
    inv_freq = 1 / 10_000.0 ** (torch.arange(0, D, 2, device=positions.device) / D)  # (D/2,)
    angles = positions[:, None, :, None] * inv_freq
    return torch.stack((angles.cos(), angles.sin()))


def apply_rotary(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate each pair of neighbouring channels of x (B, heads, T, D), in fp32."""
    (a, b), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), cos_sin  # (B, heads, T, D/2)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def norm_layer(config: DistroGPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=EPS, elementwise_affine=False)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


def offset_keys(k: Tensor, numbers: Tensor | None) -> Tensor:
    """k (B, K, S, D) with half of the channels from the position before; 0 if there is none. `numbers`, (1 or
    B, 1, S, 1), are 1 + the position before, or 0; None: of consecutive positions."""
    kept, moved = k.chunk(2, dim=-1)
    moved = F.pad(moved, (0, 0, 1, 0))  # (B, K, 1 + S, D/2)
    if numbers is None:
        return torch.cat((kept, moved[:, :, :-1]), dim=-1)
    return torch.cat((kept, moved.gather(2, numbers.expand_as(kept))), dim=-1)


# inputs of all blocks: cos_sin, cache, new positions, attention_mask, and what is made of it, by number of
# keys: the mask, and the numbers of offset_keys
Context = tuple[Tensor | None, Cache | None, Tensor, Tensor | None, dict[int, tuple[Tensor, Tensor | None]]]


class Attention(nn.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, config: DistroGPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.qk_norm, self.key_offset = config.qk_norm, config.key_offset
        self.H, self.K, self.D = config.n_head, config.n_kv_head, config.n_embd // config.n_head
        learned = config.qk_norm_weights
        self.q_weight, self.k_weight = (nn.Parameter(torch.ones(self.D)) if learned else None for _ in "qk")
        self.scale = 12 / self.D if config.qk_norm and not learned else self.D**-0.5
        self.c_attn = nn.Linear(config.n_embd, (self.H + 2 * self.K) * self.D, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        cos_sin, cache, new, attention_mask, masks = context
        B, T, C = x.shape
        H, K = self.H, self.K
        heads = self.c_attn(x).view(B, T, H + 2 * K, self.D).transpose(1, 2)  # (B, H + 2K, T, D)
        qk, v = heads.split((H + K, K), dim=1)
        if self.qk_norm:
            qk = F.rms_norm(qk.float(), (self.D,), eps=EPS)
        if self.q_weight is not None:
            qk = qk * torch.cat((self.q_weight.expand(H, 1, -1), self.k_weight.expand(K, 1, -1)))
        if cos_sin is not None:
            qk = apply_rotary(qk, cos_sin)
        q, k = qk.to(v.dtype).split((H, K), dim=1)
        if cache is not None:
            written_at = [{"cache_position": new}] if CACHE_TAKES_POSITIONS else []
            k, v = cache.update(k, v, self.layer, *written_at)  # (B, K, S, D)
        S, p = k.size(2), self.dropout if self.training else 0.0
        if S not in masks:
            numbers = positions_before(attention_mask, T, S) if self.key_offset else None
            masks[S] = make_mask(attention_mask, new, S), numbers
        mask, numbers = masks[S]
        if self.key_offset:
            k = offset_keys(k, numbers)
        if H != K:
            k, v = (heads.repeat_interleave(H // K, dim=1) for heads in (k, v))  # (B, H, S, D)
        y = F.scaled_dot_product_attention(q, k, v, mask, p, scale=self.scale)  # (B, H, T, D)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Two matrices with a nonlinearity between them, applied to each position alone."""

    def __init__(self, config: DistroGPTConfig) -> None:
        super().__init__()
        self.activation, self.dropout = config.activation, config.dropout
        gated = config.activation == "swiglu"
        width = 16 * math.ceil(config.n_embd / 6) if gated else 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, 2 * width if gated else width, bias=config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
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
    """Attention, then MLP: each reads the normalised residual stream and adds to it."""

    def __init__(self, config: DistroGPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1, self.attn = norm_layer(config), Attention(config, layer)
        self.ln_2, self.mlp = norm_layer(config), MLP(config)
        self.skip = nn.Parameter(torch.tensor([1.0, 0.0])) if config.embedding_skip else None

    def forward(self, x: Tensor, x0: Tensor, context: Context) -> Tensor:
        if self.skip is not None:
            x = self.skip[0] * x + self.skip[1] * x0
        x = x + self.attn(self.ln_1(x), context)
        return x + self.mlp(self.ln_2(x))


class DistroGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """Token ids in, logits of the next token out."""

    config_class = DistroGPTConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: DistroGPTConfig) -> None:
        super().__init__(config)
        if config.tie_word_embeddings and transformers.__version__ == "5.3.0":
            # with custom code, this version assumes that a tied weight was loaded
            raise ImportError("transformers 5.3.0 leaves lm_head.weight of this model empty; use a newer one")
        layers = {
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            "ln_f": norm_layer(config),
        }
        if config.rotary:
            del layers["wpe"]
        self.transformer = nn.ModuleDict(layers)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer["wte"] = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, T, V), or of the last logits_to_keep positions, of input_ids (B, T).

        attention_mask (B, S) is 0 for padding; positions count from the first token that is not padding.
        With labels (B, T), which may be input_ids: the mean loss of the next token, without labels of -100.
        Raises ValueError for arguments that contradict each other, TypeError for unsupported ones.
        """
        config, loss_arguments = self.config, self.loss_arguments(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.transformer["wte"](input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        if past_key_values is not None and cache is not None and past_key_values is not cache:
            raise ValueError("past_key_values and cache are two names of one argument; give one")
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        if cache is None and use_cache:
            cache = DynamicCache(config=config)
        past, T = 0 if cache is None else int(cache.get_seq_length()), x.size(1)
        new = torch.arange(past, past + T, device=x.device)  # (T,)
        position_ids = checked_positions(attention_mask, position_ids, new, past)
        x, cos_sin = self.add_positions(x, position_ids, past)
        x = x0 = F.dropout(x, config.dropout, self.training)
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        hidden_states, context = [], (cos_sin, cache, new, attention_mask, {})
        for block in self.transformer["h"]:
            if output_hidden_states:
                hidden_states.append(x)
            x = block(x, x0, context)
        x = self.transformer["ln_f"](x)
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, cap, loss = self.lm_head(x[:, positions]), config.logit_softcap, None
        if cap:
            logits = cap * torch.tanh(logits.float() / cap)
        if labels is not None or "shift_labels" in loss_arguments:
            loss = self.loss_function(logits, labels, vocab_size=config.vocab_size, **loss_arguments)
        states = (*hidden_states, x) if output_hidden_states else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=states, **{CACHE: cache})
        if return_dict is None:
            return_dict = config.return_dict
        return output if return_dict else output.to_tuple()

    def loss_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of forward that the loss reads. Raises TypeError for others that change the result."""
        given = {name: value for name, value in kwargs.items() if value is not None}
        for name, value in {"output_attentions": bool(self.config.output_attentions), **given}.items():
            is_fixed = name in FIXED_ARGUMENTS and value is FIXED_ARGUMENTS[name]
            # cache_position (before transformers 5.4) repeats what the cache knows
            if name not in (*LOSS_ARGUMENTS, "cache_position") and not is_fixed:
                raise TypeError(f"distroGPT's network does not support {name}; omit it, or update this file")
        return {name: value for name, value in given.items() if name in LOSS_ARGUMENTS}

    def add_positions(self, x: Tensor, position_ids: Tensor, past: int) -> tuple[Tensor, Tensor | None]:
        """x (B, T, C) with position embeddings added; or x as it is, and the rotary cos_sin."""
        config = self.config
        if config.rotary:
            return x, rotary_cos_sin(position_ids, config.n_embd // config.n_head)
        if past + x.size(1) > config.block_size and int(position_ids.max()) >= config.block_size:
            raise ValueError(f"this model reads {config.block_size} tokens at most; shorten the text")
        return x + self.transformer["wpe"](position_ids), None


def checked_positions(
    attention_mask: Tensor | None, position_ids: Tensor | None, new: Tensor, past: int
) -> Tensor:
    """Positions (1 or B, T) of the tokens after `past` others, by default from the first that is not padding.
    Raises ValueError if the arguments do not say which tokens attend to which."""
    ndim, T = None if attention_mask is None else getattr(attention_mask, "ndim", 0), len(new)
    if ndim not in (None, 2, 4):
        raise ValueError("attention_mask must be a tensor of 2 or 4 dimensions")
    if ndim == 2 and attention_mask.size(1) != past + T:
        size = attention_mask.size(1)
        raise ValueError(f"attention_mask is for {size} tokens, but {past} are in the cache and {T} are new")
    if position_ids is not None:
        if ndim is None and T > 1 and bool((position_ids.diff(dim=-1) < 1).any()):
            raise ValueError("texts packed into one row (position_ids) need a 4D attention_mask")
        return position_ids
    if ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
    return new[None]


def make_mask(attention_mask: Tensor | None, new: Tensor, S: int) -> Tensor:
    """Whether each new position (T,) attends to each of the S keys, unused ones included if the cache has a
    fixed size: (1 or B, 1, T, S). Padding attends only to itself, so that no row is empty."""
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    keys = torch.arange(S, device=new.device)  # (S,)
    mask = (keys <= new[:, None])[None, None]  # (1, 1, T, S)
    if attention_mask is not None:
        is_text = F.pad(attention_mask.bool(), (0, S - attention_mask.size(1)))  # (B, S)
        mask = mask & (is_text[:, None, None] | (keys == new[:, None]))
    return mask


def positions_before(attention_mask: Tensor | None, T: int, S: int) -> Tensor | None:
    """1 + the position before each of S keys, padding left out, or 0: (B, 1, S, 1); None without padding. A
    mask of 4 dimensions may hide texts that are packed into one row from each other, if all S are new."""
    if attention_mask is None:
        return None
    counted = torch.arange(1, S + 1, device=attention_mask.device)
    if attention_mask.ndim == 4:
        reads = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0  # (B, H, T, S)
        if T == S:
            return (reads[:, :1].tril(-1) * counted).amax(-1)[..., None]
        is_text = reads[:, 0, -1]  # (B, S)
    else:
        is_text = F.pad(attention_mask.bool(), (0, S - attention_mask.size(1)))
    latest = (is_text * counted).cummax(dim=-1).values
    return F.pad(latest[:, :-1], (1, 0))[:, None, :, None]
