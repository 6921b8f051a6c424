"""distroGPT's network for Hugging Face's transformers (5.0 and newer), in one file and plain torch.

export.py copies it beside a model whose settings no architecture of transformers computes. The names of the
weights are distroGPT's. Shapes: B sequences, T positions, S of them with those read before, C = n_embd
channels, V = vocab_size; H = n_head heads of D = C/H numbers, K = n_kv_head of keys and values.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

EPS = 1e-6  # of RMSNorm

# the name of the cache in what forward returns, where generate looks for it: cache since transformers 5.24
CACHE = "cache" if "cache" in [field.name for field in fields(CausalLMOutputWithPast)] else "past_key_values"
# before transformers 5.4, a cache of fixed size writes where it is told to
CACHE_TAKES_POSITIONS = "cache_kwargs" in inspect.signature(Cache.update).parameters
# further arguments of forward: those that only the loss reads
FOR_THE_LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")
# and those that have one value here, so that to give it changes nothing
ONLY = {"output_attentions": False, "output_router_logits": False, "is_causal": True}


class DistroGPTConfig(PretrainedConfig):
    """The shape of a network; the defaults are GPT-2's."""

    model_type = "distrogpt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
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
        activation: str = "gelu_tanh",  # or gelu, relu2, swiglu
        norm: str = "layernorm",  # or rmsnorm, without weights
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
        if activation not in ("gelu_tanh", "gelu", "relu2", "swiglu") or norm not in ("layernorm", "rmsnorm"):
            raise ValueError(f"activation={activation}, norm={norm}: one of them is not known here")
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
        *written: dict[str, torch.Tensor],
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
            k, v = cache.update(k, v, self.layer, *written)  # (B, K, S, D)
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
        if config.tie_word_embeddings and transformers.__version__ == "5.3.0":
            # which, of models that bring their code, takes the tied weight for one that was loaded
            raise ImportError("transformers 5.3.0 leaves lm_head.weight of this model empty: use another")
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
        cache: Cache | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, T, V), or of the last logits_to_keep positions, of input_ids (B, T).

        attention_mask (B, S) is 0 where a token is padding; positions count from the first that is none.
        With labels (B, T), which may be the input_ids themselves: the mean loss of the next token, where
        they are not -100. `cache` and past_key_values are two names of one argument. Raises ValueError where
        the arguments contradict each other, or where more tokens come than there are positions in a table;
        TypeError where one is not supported.
        """
        config, more = self.config, self.known(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.transformer["wte"](input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        T, cache = x.size(1), one_cache(past_key_values, cache)
        if cache is None and chosen(use_cache, config.use_cache and not self.training):
            cache = DynamicCache(config=config)
        before = 0 if cache is None else int(cache.get_seq_length())
        now = torch.arange(before, before + T, device=x.device)  # (T,)
        check_positions(attention_mask, position_ids, before, T)
        if position_ids is None:
            position_ids = default_positions(attention_mask, now)
        x, turn = self.placed(x, position_ids, before)
        written = [{"cache_position": now}] if CACHE_TAKES_POSITIONS else []
        reads = (turn, visibility(attention_mask, now), cache, *written)
        x = F.dropout(x, config.dropout, self.training)
        states, keep_states = [x], chosen(output_hidden_states, config.output_hidden_states)
        for block in self.transformer["h"]:
            x = block(x, states[0], *reads)
            if keep_states:
                states.append(x)
        x = self.transformer["ln_f"](x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, cap, loss = self.lm_head(x[:, kept]), config.logit_softcap, None
        if cap:
            logits = cap * torch.tanh(logits.float() / cap)
        if labels is not None or "shift_labels" in more:
            loss = self.loss_function(logits, labels, vocab_size=config.vocab_size, **more)
        hidden = (*states[:-1], x) if keep_states else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=hidden, **{CACHE: cache})
        return output if chosen(return_dict, config.return_dict) else output.to_tuple()

    def known(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Those of the further arguments of forward that it reads. Raises TypeError where another one would
        change the result, or asks for more than is computed."""
        given = {name: value for name, value in arguments.items() if value is not None}
        read = {}
        for name, value in {"output_attentions": bool(self.config.output_attentions), **given}.items():
            # a cache counts its tokens: cache_position, which comes before transformers 5.4, says no more
            harmless = name == "cache_position" or (name in ONLY and value is ONLY[name])
            if name in FOR_THE_LOSS:
                read[name] = value
            elif not harmless:
                raise TypeError(
                    f"distroGPT's network does not support {name}: leave it out, or, if transformers adds "
                    "it, take modeling_distrogpt.py from a newer distroGPT"
                )
        return read

    def placed(
        self, x: torch.Tensor, position_ids: torch.Tensor, before: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings x (B, T, C) with their positions added; or as they are, and the rotation."""
        config = self.config
        if config.rotary:
            return x, rotation(position_ids, config.n_embd // config.n_head)
        if before + x.size(1) > config.block_size and int(position_ids.max()) >= config.block_size:
            raise ValueError(f"this model reads {config.block_size} tokens at most; shorten the text")
        return x + self.transformer["wpe"](position_ids), None


def chosen(value: Any, default: Any) -> Any:
    """An argument, or what holds where it is None."""
    return default if value is None else value


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, given by either of its names. Raises ValueError where there are two."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument; give one")
    return chosen(cache, past_key_values)


def check_positions(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, before: int, T: int
) -> None:
    """Raises ValueError where T new tokens behind `before` others could not read what the caller means."""
    if attention_mask is None:
        if position_ids is not None and T > 1 and bool((position_ids.diff(dim=-1) < 1).any()):
            raise ValueError(
                "position_ids do not count up in every row; texts packed into one row would read each other: "
                "give an attention_mask"
            )
        return
    if getattr(attention_mask, "ndim", None) not in (2, 4):
        raise ValueError("attention_mask is no tensor of 2 or 4 dimensions")
    if attention_mask.ndim == 2 and attention_mask.size(1) != before + T:
        size = attention_mask.size(1)
        raise ValueError(f"attention_mask is for {size} tokens; {before} are in the cache, {T} are new")


def default_positions(attention_mask: torch.Tensor | None, now: torch.Tensor) -> torch.Tensor:
    """Positions (1 or B, T), counted from the first token that is no padding."""
    if attention_mask is None or attention_mask.ndim == 4:
        return now[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -len(now) :]


def visibility(attention_mask: torch.Tensor | None, now: torch.Tensor) -> Callable[[int], torch.Tensor]:
    """visible_positions of S keys, made by the first block for all: S is known only when a cache gives its
    keys, as one of fixed size gives more than were read."""
    masks: dict[int, torch.Tensor] = {}

    def visible(S: int) -> torch.Tensor:
        if S not in masks:
            masks[S] = visible_positions(attention_mask, now, S)
        return masks[S]

    return visible


def visible_positions(attention_mask: torch.Tensor | None, now: torch.Tensor, S: int) -> torch.Tensor:
    """Whether each new token, in the cache at `now` (T,), reads each of S, as many as there are or a cache of
    fixed size has room for: (1 or B, 1, T, S).

    Padding is read by none but itself, which keeps its row from being empty. A mask of four dimensions is
    what the caller wants it to be.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    there = torch.arange(S, device=now.device)  # (S,)
    visible = (there <= now[:, None])[None, None]
    if attention_mask is not None:
        mask = F.pad(attention_mask.bool(), (0, S - attention_mask.size(1)))  # (B, S)
        visible = visible & (mask[:, None, None] | (there == now[:, None]))
    return visible
