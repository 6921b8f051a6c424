"""What Hugging Face's formats call our networks, both ways: the keys of config.json, the names of weights.

A network is written in the first format that computes the same, with no code of ours where there is one:

gpt2       GPT-2's shape, also with another activation, without biases, or untied
llama      RMSNorm, rotary positions, SwiGLU: Llama (arXiv 2302.13971)
qwen3      the same with qk_norm: Qwen3 (arXiv 2505.09388)
arcee      RMSNorm, rotary positions, an activation without gate: Arcee's AFM
distrogpt  all others: by hf/modeling_distrogpt.py, which lies in the folder then
"""

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from distrogpt.checkpoint import build_model, config_of
from model import EPS, GPT, GPTConfig

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "arcee": "ArceeForCausalLM",
    "distrogpt": "DistroGPTForCausalLM",
}
CODE = "modeling_distrogpt"  # of hf/, for the last of them
ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu2": "relu2", "swiglu": "silu"}
OUR_ACTIVATIONS = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
OUR_ACTIVATIONS |= {"gelu_pytorch_tanh": "gelu_tanh", "swish": "swiglu"}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # in gpt2's files (in, out), not (out, in)
MASKS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # constants that old files keep
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
Weights = dict[str, torch.Tensor]


def model_type_of(config: GPTConfig) -> str:
    """The format that this network is written in: a key of ARCHITECTURES."""
    gated = config.activation == "swiglu"
    if config.logit_softcap or config.embedding_skip:
        return "distrogpt"
    if config.norm == "layernorm" and not (config.rotary or config.qk_norm or gated):
        return "gpt2" if config.kv_heads == config.n_head else "distrogpt"
    if config.norm == "rmsnorm" and config.rotary:
        if gated and config.qk_norm and not config.bias:
            return "qwen3"
        if not config.qk_norm:
            return "llama" if gated else "arcee"
    return "distrogpt"


def to_settings(config: GPTConfig, dtype: torch.dtype, begin: int, end: int | None) -> dict[str, Any]:
    """What config.json says of a network; `begin` and `end` are the ids that begin and end a text."""
    kind = model_type_of(config)
    common = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "bos_token_id": begin,
        "eos_token_id": end,
        "pad_token_id": end,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if kind == "gpt2":
        return common | {
            "n_positions": config.block_size,
            "n_ctx": config.block_size,  # where llama.cpp looks
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": 4 * config.n_embd,
            "activation_function": ACTIVATIONS[config.activation],
            "layer_norm_epsilon": 1e-5,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
            "bias": config.bias,  # theirs always have them; False: they are zero, and ours has none
        }
    if kind == "distrogpt":
        files = {
            "AutoConfig": f"{CODE}.DistroGPTConfig",
            "AutoModelForCausalLM": f"{CODE}.{ARCHITECTURES[kind]}",
        }
        shape = {name: value for name, value in asdict(config).items() if name not in ("tied", "zero_init")}
        return common | shape | {"n_kv_head": config.kv_heads, "auto_map": files}
    biases = {"attention_bias": config.bias} | ({} if kind == "qwen3" else {"mlp_bias": config.bias})
    return common | {
        "hidden_size": config.n_embd,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.n_embd // config.n_head,
        "hidden_act": ACTIVATIONS[config.activation],
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": EPS,
        "rope_theta": 10000.0,  # transformers before 5, llama.cpp
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_dropout": config.dropout,
        **biases,
    }


def to_weights(config: GPTConfig, weights: Mapping[str, torch.Tensor]) -> Weights:
    """The weights of a network in the names and layout of its format; vocab_size rows of the tables."""
    tables = ("transformer.wte.weight", "lm_head.weight")
    ours = {name: w[: config.vocab_size] if name in tables else w for name, w in weights.items()}
    if config.tied:
        del ours["lm_head.weight"]
    kind = model_type_of(config)
    theirs = ours
    if kind == "gpt2":
        theirs = {name: w.t() if name.endswith(CONV1D) else w for name, w in ours.items()}
        if not config.bias:
            names = [name for name in ours if ".h." in name or ".ln_f." in name]
            theirs |= {f"{name.removesuffix('weight')}bias": torch.zeros(len(ours[name])) for name in names}
    elif kind != "distrogpt":
        theirs = to_llama(config, ours)
    return {name: w.contiguous() for name, w in theirs.items()}


def to_llama(config: GPTConfig, ours: Weights) -> Weights:
    """Our weights as llama, qwen3 and arcee have them: a matrix for each purpose; norms of weight 1."""
    C, D, H, K = config.n_embd, config.n_embd // config.n_head, config.n_head, config.kv_heads
    up = ("gate_proj", "up_proj") if config.activation == "swiglu" else ("up_proj",)
    theirs = {"model.embed_tokens.weight": ours["transformer.wte.weight"], "model.norm.weight": torch.ones(C)}
    if not config.tied:
        theirs["lm_head.weight"] = ours["lm_head.weight"]
    for number in range(config.n_layer):
        h, there = f"transformer.h.{number}", f"model.layers.{number}"
        for what in ("weight", "bias") if config.bias else ("weight",):
            q, k, v = ours[f"{h}.attn.c_attn.{what}"].split((H * D, K * D, K * D))  # (rows, C) or (rows,)
            theirs[f"{there}.self_attn.q_proj.{what}"] = in_halves(q, D)
            theirs[f"{there}.self_attn.k_proj.{what}"] = in_halves(k, D)
            theirs[f"{there}.self_attn.v_proj.{what}"] = v
            theirs[f"{there}.self_attn.o_proj.{what}"] = ours[f"{h}.attn.c_proj.{what}"]
            parts = ours[f"{h}.mlp.c_fc.{what}"].chunk(len(up))
            theirs |= {f"{there}.mlp.{name}.{what}": part for name, part in zip(up, parts, strict=True)}
            theirs[f"{there}.mlp.down_proj.{what}"] = ours[f"{h}.mlp.c_proj.{what}"]
        theirs[f"{there}.input_layernorm.weight"] = torch.ones(C)
        theirs[f"{there}.post_attention_layernorm.weight"] = torch.ones(C)
        if config.qk_norm:
            theirs[f"{there}.self_attn.q_norm.weight"] = torch.full((D,), score_factor(D))
            theirs[f"{there}.self_attn.k_norm.weight"] = torch.ones(D)
    return theirs


def score_factor(D: int) -> float:
    """What Qwen3's scale of scores, 1/√D, is to be multiplied with to be that of our qk_norm, 12/D."""
    return 12 / D**0.5


def is_score_factor(found: torch.Tensor, D: int) -> bool:
    """Whether these numbers (D,) are all score_factor(D), in whatever type they were stored."""
    exact = torch.tensor(score_factor(D))
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    return any(bool(torch.allclose(found, exact.to(kind).float(), rtol=1e-6, atol=0)) for kind in kinds)


def in_halves(rows: torch.Tensor, D: int) -> torch.Tensor:
    """Rows of queries or keys (N·D, ...), of which our rotary positions turn neighbours, in the order of
    transformers', which turn the i-th of a head's first half with the i-th of its second."""
    return rows.unflatten(0, (-1, D // 2, 2)).transpose(1, 2).flatten(0, 2)


def in_pairs(rows: torch.Tensor, D: int) -> torch.Tensor:
    """in_halves backwards."""
    return rows.unflatten(0, (-1, 2, D // 2)).transpose(1, 2).flatten(0, 2)


def find_folder(name: str) -> Path:
    """The folder of that name, or that of the hub's files, downloaded once. Raises OSError, ImportError."""
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, allow_patterns=["config.json", "meta.json", "model*.safetensors*"]))
    if not list(folder.glob("model*.safetensors*")):  # an old one
        snapshot_download(name, allow_patterns=["pytorch_model*.bin*"])
    return folder


def read_pretrained(folder: Path, dropout: float = 0.0) -> GPT:
    """The network, in fp32, of a folder in one of the formats, of any origin.

    Runs no code of it. Raises OSError where a file cannot be read, ValueError where it is not such a network.
    """
    settings = read_object(folder / "config.json")
    kind = settings.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type={kind} in config.json is none of {', '.join(ARCHITECTURES)}")
    of_kind = {"gpt2": from_gpt2_settings, "distrogpt": from_own_settings}.get(kind, from_llama_settings)
    config = config_of({**of_kind(settings), "dropout": dropout})
    theirs = {name: w for name, w in read_weights(folder).items() if not name.endswith(MASKS)}
    if config.n_layer > len(theirs):
        raise ValueError(f"n_layer={config.n_layer}, but there are {len(theirs)} weights")
    if kind == "gpt2":
        weights = from_gpt2(config, theirs, settings.get("bias") is False)
    elif kind == "distrogpt":
        weights = theirs
    else:
        weights = from_llama(config, theirs)
    if config.tied:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return build_model(config, weights)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file of JSON. Raises OSError, ValueError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:  # deeply nested brackets
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no object")
    return found


def read_weights(folder: Path) -> Weights:
    """All tensors of model.safetensors, or else pytorch_model.bin, be they in several files, in fp32."""
    for name in WEIGHT_FILES:
        files, index = [name], folder / f"{name}.index.json"
        if not (folder / name).is_file() and index.is_file():
            files = sorted({str(file) for file in read_object(index).get("weight_map", {}).values()})
        elif not (folder / name).is_file():
            continue
        tensors: Weights = {}
        for file in files:
            if Path(file).name != file:
                raise ValueError(f"{index.name} names what is no file beside it: {file[:40]}")
            tensors |= read_tensors(folder / file)
        for key, tensor in tensors.items():
            if not torch.is_tensor(tensor) or not tensor.is_floating_point():
                raise ValueError(f"{str(key)[:60]} is no tensor of fractions")
        return {key: tensor.float().contiguous() for key, tensor in tensors.items()}
    raise ValueError(f"there is neither {' nor '.join(WEIGHT_FILES)}")


def read_tensors(path: Path) -> Weights:
    """The tensors of one file."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's guesses at what is wrong
        found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no weights")
    return found


def asked(settings: dict[str, Any], **wanted: Any) -> None:
    """Raises ValueError where a setting is there and is not the only value that our networks have."""
    for key, value in wanted.items():
        found = settings.get(key, value)
        if found is not None and found != value:
            raise ValueError(f"{key}={str(found)[:40]} is not {value}, which is all that this network can be")


def activation_of(settings: dict[str, Any], key: str, default: str, gated: bool) -> str:
    """Our name of an activation. Raises ValueError where we have it not."""
    theirs = settings.get(key, default)
    ours = OUR_ACTIVATIONS.get(theirs) if isinstance(theirs, str) else None
    if ours is None or (ours == "swiglu") != gated:
        raise ValueError(f"{key}={str(theirs)[:40]} is not among the activations of such a network here")
    return ours


def from_gpt2_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Our shape of a GPT2Config, given or by its defaults. Raises ValueError where it is another network."""
    asked(
        settings,
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    defaults = {"vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
    shape = {name: settings.get(name, default) for name, default in defaults.items()}
    if settings.get("n_inner") not in (None, 4 * shape["n_embd"]):
        raise ValueError(
            f"n_inner={str(settings['n_inner'])[:40]} is not four times n_embd={shape['n_embd']}"
        )
    return shape | {
        "block_size": settings.get("n_positions", 1024),
        "activation": activation_of(settings, "activation_function", "gelu_new", gated=False),
        "tied": settings.get("tie_word_embeddings", True),
    }


def from_gpt2(config: GPTConfig, theirs: Weights, no_biases: bool) -> Weights:
    """gpt2's weights as ours, which have no biases where all are zero and were not there before; then
    config.bias becomes False."""
    weights = {}
    for name, w in theirs.items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        weights[name] = w.t().contiguous() if name.endswith(CONV1D) and w.dim() == 2 else w
    biases = [name for name in weights if name.endswith(".bias")]
    if no_biases and not any(weights[name].any() for name in biases):
        config.bias = False
        weights = {name: w for name, w in weights.items() if name not in biases}
    return weights


def from_own_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Our shape of a config.json of our own format. Raises ValueError."""
    names = [name for name in asdict(GPTConfig()) if name not in ("tied", "zero_init", "dropout")]
    missing = [name for name in names if name not in settings]
    if missing:
        raise ValueError(f"config.json lacks {missing[0]}")
    shape = {name: settings[name] for name in names} | {"tied": settings.get("tie_word_embeddings", True)}
    return shape | {"n_kv_head": fewer(shape["n_kv_head"], shape["n_head"])}


def fewer(kv_heads: Any, heads: Any) -> Any:
    """n_kv_head as it is by default where there are no fewer than heads."""
    return None if kv_heads == heads else kv_heads


def from_llama_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Our shape of a LlamaConfig, Qwen3Config or ArceeConfig. Raises ValueError where ours is another."""
    kind, gated = settings["model_type"], settings["model_type"] != "arcee"
    needed = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size")
    for name in (*needed, "max_position_embeddings", "rms_norm_eps"):
        value = settings.get(name)
        if not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"{name}={str(value)[:40]} is no positive number")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError("rope_parameters is no object")
    asked(settings, rms_norm_eps=EPS, rope_theta=10000.0, use_sliding_window=False)
    asked(rope, rope_type="default", type="default", rope_theta=10000.0, partial_rotary_factor=1.0)
    D = settings["hidden_size"] // settings["num_attention_heads"]
    asked(settings, pretraining_tp=1, head_dim=D)
    bias = bool(settings.get("attention_bias"))
    asked(settings, **({"attention_bias": False} if kind == "qwen3" else {"mlp_bias": bias}))
    shape = {
        "block_size": settings["max_position_embeddings"],
        "vocab_size": settings["vocab_size"],
        "n_layer": settings["num_hidden_layers"],
        "n_head": settings["num_attention_heads"],
        "n_embd": settings["hidden_size"],
        "n_kv_head": fewer(settings.get("num_key_value_heads"), settings["num_attention_heads"]),
        "bias": bias,
        "norm": "rmsnorm",
        "rotary": True,
        "qk_norm": kind == "qwen3",
        "activation": activation_of(settings, "hidden_act", "silu" if gated else "relu2", gated),
        "tied": settings.get("tie_word_embeddings", False),
    }
    asked(settings, intermediate_size=config_of(shape).mlp_width)
    return shape


def from_llama(config: GPTConfig, theirs: Weights) -> Weights:
    """Weights of llama, qwen3 or arcee as ours; those of norms go into the layers that read from them. Where
    the last norm has any, lm_head becomes a table of its own: config.tied is False then. ValueError."""
    D, C = config.n_embd // config.n_head, config.n_embd
    left = dict(theirs)

    def take(name: str, *shape: int) -> torch.Tensor:
        if name not in left:
            raise ValueError(f"{name} is missing")
        if shape and left[name].shape != shape:
            raise ValueError(f"{name} is not of shape {shape}")
        return left.pop(name)

    up = ("gate_proj", "up_proj") if config.activation == "swiglu" else ("up_proj",)
    kinds = ("weight", "bias") if config.bias else ("weight",)
    rows = {"q_proj": C, "k_proj": config.kv_heads * D, "v_proj": config.kv_heads * D}
    ours = {"transformer.wte.weight": take("model.embed_tokens.weight", config.vocab_size, C)}
    head, last = left.pop("lm_head.weight", None), take("model.norm.weight", C)
    if config.tied and not bool((last == 1).all()):
        config.tied, head = False, ours["transformer.wte.weight"]
    if not config.tied:
        if head is None:
            raise ValueError("lm_head.weight is missing")
        ours["lm_head.weight"] = head * last
    for number in range(config.n_layer):
        h, there = f"transformer.h.{number}", f"model.layers.{number}"
        norms = [take(f"{there}.{name}_layernorm.weight", C) for name in ("input", "post_attention")]
        for what in kinds:
            shape = (C,) if what == "weight" else ()
            qkv = [take(f"{there}.self_attn.{name}.{what}", n, *shape) for name, n in rows.items()]
            qkv = torch.cat([in_pairs(qkv[0], D), in_pairs(qkv[1], D), qkv[2]])
            fc = torch.cat([take(f"{there}.mlp.{name}.{what}", config.mlp_width, *shape) for name in up])
            weight = what == "weight"
            ours[f"{h}.attn.c_attn.{what}"] = qkv * norms[0] if weight else qkv
            ours[f"{h}.mlp.c_fc.{what}"] = fc * norms[1] if weight else fc
            ours[f"{h}.attn.c_proj.{what}"] = take(f"{there}.self_attn.o_proj.{what}")
            ours[f"{h}.mlp.c_proj.{what}"] = take(f"{there}.mlp.down_proj.{what}")
        if config.qk_norm:
            factor = take(f"{there}.self_attn.q_norm.weight", D) * take(f"{there}.self_attn.k_norm.weight", D)
            if not is_score_factor(factor, D):
                raise ValueError(
                    f"{there}.self_attn.q_norm has weights of its own, for which ours has no place"
                )
    if left:
        raise ValueError(f"{min(left)[:60]} has no place in this network")
    return ours
