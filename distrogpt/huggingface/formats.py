"""Hugging Face's formats, in both directions: the keys of config.json, and the names and layout of weights.

A network is written in the first format that computes exactly the same:

gpt2       GPT-2, also with another activation, without biases, or untied
llama      RMSNorm, rotary positions and SwiGLU (arXiv 2302.13971)
qwen3      Llama with qk_norm (arXiv 2505.09388)
arcee      RMSNorm, rotary positions and an activation without a gate (Arcee's AFM)
distrogpt  all others; the folder then has its code, modeling_distrogpt.py
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import torch

from distrogpt.checkpoint import (
    build_model,
    check_finite,
    check_weights,
    make_config,
    meta_model,
    tie_weights,
    without_wrappers,
)
from model import EPS, GPT, GPTConfig

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "arcee": "ArceeForCausalLM",
    "distrogpt": "DistroGPTForCausalLM",
}
CODE = "modeling_distrogpt"  # the module that computes the last of them
ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu2": "relu2", "swiglu": "silu"}
OUR_ACTIVATIONS = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
OUR_ACTIVATIONS |= {"gelu_pytorch_tanh": "gelu_tanh", "swish": "swiglu"}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in, out) in gpt2's files, not (out, in)
NORMS = {"attn.c_attn": "input_layernorm", "mlp.c_fc": "post_attention_layernorm"}  # before them
LLAMA_SIZES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
LLAMA_SIZES |= {"max_position_embeddings": "block_size", "vocab_size": "vocab_size"}
# keys of our config.json, and of any in transformers, that do not change what the network computes
OTHER_KEYS = """architectures auto_map bos_token_id chunk_size_feed_forward dropout dtype eos_token_id
    id2label initializer_range label2id model_type name_or_path output_attentions output_hidden_states
    pad_token_id problem_type return_dict tie_word_embeddings torch_dtype transformers_version use_cache
    zero_init""".split()
CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # in old files, besides the weights
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
Weights = dict[str, torch.Tensor]


def model_type_of(config: GPTConfig) -> str:
    """The format in which this network is written: a key of ARCHITECTURES."""
    gated = config.activation == "swiglu"
    if config.logit_softcap or config.embedding_skip or config.key_offset:
        return "distrogpt"
    if config.norm == "layernorm" and not (config.rotary or config.qk_norm or gated):
        return "gpt2" if config.kv_heads == config.n_head else "distrogpt"
    if config.norm == "rmsnorm" and config.rotary:
        if gated and config.qk_norm and not config.bias:
            return "qwen3"
        if not config.qk_norm:
            return "llama" if gated else "arcee"
    return "distrogpt"


def to_settings(config: GPTConfig, dtype: str, bos: int, eos: int | None) -> dict[str, Any]:
    """config.json; `bos` and `eos` are the ids that begin and end a text."""
    kind = model_type_of(config)
    common = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": eos,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
    }
    if kind == "gpt2":
        return common | {
            "n_positions": config.block_size,
            "n_ctx": config.block_size,  # for llama.cpp
            **{name: getattr(config, name) for name in ("n_embd", "n_layer", "n_head")},
            "n_inner": 4 * config.n_embd,
            "activation_function": ACTIVATIONS[config.activation],
            "layer_norm_epsilon": 1e-5,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
            "bias": config.bias,  # theirs always has biases; False: they are zero
        }
    if kind == "distrogpt":
        auto_map = {"AutoConfig": f"{CODE}.DistroGPTConfig"}
        auto_map |= {"AutoModelForCausalLM": f"{CODE}.{ARCHITECTURES[kind]}"}
        shape = {name: value for name, value in asdict(config).items() if name not in ("tied", "zero_init")}
        return common | shape | {"n_kv_head": config.kv_heads, "auto_map": auto_map}
    biases = ("attention_bias",) if kind == "qwen3" else ("attention_bias", "mlp_bias")
    return common | {
        **{theirs: getattr(config, ours) for theirs, ours in LLAMA_SIZES.items()},
        "intermediate_size": config.mlp_width,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": ACTIVATIONS[config.activation],
        "rms_norm_eps": EPS,
        "rope_theta": 10000.0,  # transformers before 5, llama.cpp
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_dropout": config.dropout,
        **dict.fromkeys(biases, config.bias),
    }


def to_weights(config: GPTConfig, weights: Mapping[str, torch.Tensor]) -> Weights:
    """The weights of a network in its format. Embeddings from config.vocab_size on are cut off."""
    embeddings = ("transformer.wte.weight", "lm_head.weight")
    ours = {name: w[: config.vocab_size] if name in embeddings else w for name, w in weights.items()}
    if config.tied:
        del ours["lm_head.weight"]
    kind = model_type_of(config)
    if kind == "distrogpt":
        theirs = ours
    elif kind == "gpt2":
        theirs = {name: w.t() if name.endswith(CONV1D) else w for name, w in ours.items()}
        if not config.bias:
            names = [name for name in ours if ".h." in name or ".ln_f." in name]
            theirs |= {f"{name.removesuffix('weight')}bias": torch.zeros(len(ours[name])) for name in names}
    else:
        theirs = to_llama(config, ours)
    return {name: w.contiguous() for name, w in theirs.items()}


def llama_layers(config: GPTConfig) -> Iterator[tuple[str, dict[str, int], str | None]]:
    """For each weight and bias of our blocks: its name, llama's names of its parts with their rows, and the
    name of the norm that it reads."""
    C, K, D, width = config.n_embd, config.kv_heads, config.head_dim, config.mlp_width
    gate = {"mlp.gate_proj": width} if config.activation == "swiglu" else {}
    layers = {
        "attn.c_attn": {"self_attn.q_proj": C, "self_attn.k_proj": K * D, "self_attn.v_proj": K * D},
        "attn.c_proj": {"self_attn.o_proj": C},
        "mlp.c_fc": {**gate, "mlp.up_proj": width},
        "mlp.c_proj": {"mlp.down_proj": C},
    }
    kinds = ("weight", "bias") if config.bias else ("weight",)
    for n, (ours, theirs), kind in product(range(config.n_layer), layers.items(), kinds):
        parts = {f"model.layers.{n}.{name}.{kind}": rows for name, rows in theirs.items()}
        norm = f"model.layers.{n}.{NORMS[ours]}.weight" if kind == "weight" and ours in NORMS else None
        yield f"transformer.h.{n}.{ours}.{kind}", parts, norm


def to_llama(config: GPTConfig, ours: Weights) -> Weights:
    """Our weights as llama, qwen3 and arcee have them; the weights of their norms are 1."""
    C, D = config.n_embd, config.head_dim
    theirs = {"model.embed_tokens.weight": ours["transformer.wte.weight"], "model.norm.weight": torch.ones(C)}
    if not config.tied:
        theirs["lm_head.weight"] = ours["lm_head.weight"]
    for name, parts, norm in llama_layers(config):
        split = ours[name].split(list(parts.values()))
        for part, w in zip(parts, split, strict=True):
            theirs[part] = in_halves(w, D) if is_rotated(part) else w
        if norm:
            theirs[norm] = torch.ones(C)
    plain = {"q": torch.full((D,), 12 / D**0.5), "k": torch.ones(D)}  # from 1/√D to our scale of scores, 12/D
    for n, name in product(range(config.n_layer if config.qk_norm else 0), "qk"):
        learned = ours.get(f"transformer.h.{n}.attn.{name}_weight")
        w = plain[name].clone() if learned is None else in_halves(learned, D)
        theirs[f"model.layers.{n}.self_attn.{name}_norm.weight"] = w
    return theirs


def from_llama(config: GPTConfig, theirs: Weights) -> tuple[GPTConfig, Weights]:
    """The weights of llama, qwen3 or arcee as ours; each norm's are multiplied into what reads it, the last
    one's into lm_head, which cannot stay tied if they are not 1. Raises ValueError."""
    config = tie_weights(config, theirs, "model.embed_tokens.weight")
    if config.tied:
        del theirs["lm_head.weight"]
    with torch.device("meta"):
        check_weights(theirs, to_weights(config, meta_model(config, len(theirs)).state_dict()))
    D, last_norm = config.head_dim, theirs["model.norm.weight"]
    embeddings = theirs["model.embed_tokens.weight"]
    head = theirs.get("lm_head.weight", embeddings)
    ours = {"transformer.wte.weight": embeddings, "lm_head.weight": head * last_norm}
    for name, parts, norm in llama_layers(config):
        w = torch.cat([in_pairs(theirs[part], D) if is_rotated(part) else theirs[part] for part in parts])
        ours[name] = w * theirs[norm] if norm else w
    qk_norms = {
        f"transformer.h.{n}.attn.{name}_weight": theirs[f"model.layers.{n}.self_attn.{name}_norm.weight"]
        for n, name in product(range(config.n_layer if config.qk_norm else 0), "qk")
    }
    if not are_plain(list(qk_norms.values()), D):
        ours |= {name: in_pairs(w, D) for name, w in qk_norms.items()}
        config = replace(config, qk_norm_weights=True)
    return replace(config, tied=config.tied and bool((last_norm == 1).all())), ours


def are_plain(norms: list[torch.Tensor], D: int) -> bool:
    """Whether the weights of q_norm and k_norm, alternating, only change Qwen3's scale of scores, 1/√D, to
    ours, 12/D, in one of the dtypes in which they may have been stored."""
    exact = torch.tensor(12 / D**0.5)
    stored = [exact.to(dtype).float() for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    scales = [q[0] * k[0] for q, k in zip(norms[::2], norms[1::2], strict=True)]
    known = all(any(torch.allclose(scale, one, rtol=1e-6, atol=0) for one in stored) for scale in scales)
    return known and all(bool((w == w[0]).all()) for w in norms)


def is_rotated(name: str) -> bool:
    return name.split(".")[-2] in ("q_proj", "k_proj")


def in_halves(rows: torch.Tensor, D: int) -> torch.Tensor:
    """Reorder rows (N·D, ...) of heads: ours rotates neighbours, transformers channels of two halves."""
    return rows.unflatten(0, (-1, D // 2, 2)).transpose(1, 2).flatten(0, 2)


def in_pairs(rows: torch.Tensor, D: int) -> torch.Tensor:
    """The inverse of in_halves."""
    return rows.unflatten(0, (-1, 2, D // 2)).transpose(1, 2).flatten(0, 2)


def find_folder(name: str) -> Path:
    """The folder of that name, or that of the hub's files, downloaded once. Raises OSError or ImportError."""
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        with suppress(HTTPError):  # any answer will do; an unreachable hub is retried for 30 s by its client
            urlopen(constants.ENDPOINT, timeout=10).close()
    folder = Path(snapshot_download(name, allow_patterns=["config.json", "meta.json", "model*.safetensors*"]))
    if not list(folder.glob("model*.safetensors*")):  # an old model
        snapshot_download(name, allow_patterns=["pytorch_model*.bin*"])
    return folder


def read_pretrained(folder: Path, dropout: float = 0.0) -> GPT:
    """The network, in fp32, of a folder in one of the formats, of any origin; none of its code is run. Raises
    ValueError if it is another network, errors of many types if a file is damaged."""
    settings = json.loads((folder / "config.json").read_bytes())
    kind = settings.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type={kind} in config.json is not one of {', '.join(ARCHITECTURES)}")
    require(settings, quantization_config=None, pruned_heads={})
    shape_of = {"gpt2": from_gpt2_settings, "distrogpt": from_own_settings}.get(kind, from_llama_settings)
    config = make_config({**shape_of(settings), "dropout": dropout})
    implied = "norm rotary qk_norm logit_softcap embedding_skip key_offset".split()  # by the other formats
    require(settings, **{name: getattr(config, name) for name in implied})
    if config.n_kv_head == config.n_head:
        config = replace(config, n_kv_head=None)
    weights = without_wrappers(read_weights(folder), ("_orig_mod", "module"))
    weights = {name: w for name, w in weights.items() if not name.endswith(CONSTANTS)}
    check_finite(weights)
    if kind == "gpt2":
        config, weights = from_gpt2(config, weights, settings.get("bias") is False)
    elif kind != "distrogpt":
        config, weights = from_llama(config, weights)
    return build_model(tie_weights(config, weights), weights)


def read_weights(folder: Path) -> Weights:
    """All tensors of model.safetensors, or else pytorch_model.bin, in one file or several, in fp32."""
    from safetensors.torch import load_file

    files: set[str] = set()
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if not files and (folder / name).is_file():
            files = {name}
        elif not files and index.is_file():
            files = {*map(str, json.loads(index.read_bytes())["weight_map"].values())}
    if not files:
        raise ValueError(f"it has neither {' nor '.join(WEIGHT_FILES)}")
    if elsewhere := [file for file in files if Path(file).name != file]:
        raise ValueError(f"the index of the weights names a file that is not beside it: {elsewhere[0][:40]}")
    tensors: Weights = {}
    for path in [folder / file for file in sorted(files)]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch guesses what is wrong
            safe = path.suffix == ".safetensors"
            tensors |= load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    for name, tensor in tensors.items():
        if not torch.is_tensor(tensor) or not tensor.is_floating_point():
            raise ValueError(f"{str(name)[:60]} is not a floating-point tensor")
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def require(settings: dict[str, Any], **expected: Any) -> None:
    """Raises ValueError if a setting is present with another value, which our networks do not support."""
    for key, value in expected.items():
        given = settings.get(key)
        if given is not None and given != value:
            raise ValueError(f"{key}={str(given)[:40]} is not supported; only {value} is")


def activation_of(settings: dict[str, Any], key: str, default: str, gated: bool) -> str:
    """Our name of an activation. Raises ValueError if it is not supported."""
    theirs = str(settings.get(key, default))
    ours = OUR_ACTIVATIONS.get(theirs)
    if ours is None or (ours == "swiglu") != gated:
        raise ValueError(f"{key}={theirs[:40]} is not supported for this model_type")
    return ours


def from_gpt2_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of GPTConfig for a GPT2Config. Raises ValueError if ours computes another network."""
    defaults = {"vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
    shape = {name: settings.get(name, default) for name, default in defaults.items()}
    require(settings, layer_norm_epsilon=1e-5, scale_attn_weights=True, n_inner=4 * shape["n_embd"])
    require(settings, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return shape | {
        "block_size": settings.get("n_positions", 1024),
        "activation": activation_of(settings, "activation_function", "gelu_new", gated=False),
        "tied": settings.get("tie_word_embeddings", True),
    }


def from_gpt2(config: GPTConfig, theirs: Weights, no_biases: bool) -> tuple[GPTConfig, Weights]:
    """gpt2's weights as ours. With no_biases, biases that are all zero are removed, as the config says."""
    weights = {}
    for name, w in theirs.items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        weights[name] = w.t().contiguous() if name.endswith(CONV1D) and w.dim() == 2 else w
    biases = [name for name in weights if name.endswith(".bias")]
    if no_biases and not any(weights[name].any() for name in biases):
        config = replace(config, bias=False)
        weights = {name: w for name, w in weights.items() if name not in biases}
    return config, weights


def from_own_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of GPTConfig for our own config.json; one that is missing is None. Raises ValueError for
    unknown keys, which a newer version may have written, unless their value is None or zero."""
    names = set(asdict(GPTConfig())) - {"tied", "zero_init", "dropout"}
    for key, value in settings.items():
        if value and key not in (*names, *OTHER_KEYS) and not key.startswith("_"):
            raise ValueError(f"config.json has an unknown {key[:40]}={str(value)[:40]}, which may matter")
    later = {"qk_norm_weights": False, "key_offset": False}  # not in the config.json of older versions
    shape = {name: settings.get(name, later.get(name)) for name in names}
    return shape | {"tied": settings.get("tie_word_embeddings", True)}


def from_llama_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of GPTConfig for a LlamaConfig, Qwen3Config or ArceeConfig. Raises ValueError if ours
    computes another network."""
    for name in (*LLAMA_SIZES, "intermediate_size", "rms_norm_eps"):
        value = settings.get(name)
        if not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"{name}={str(value)[:40]} is not a positive number")
    for rope in (settings, *(settings.get(key) or {} for key in ("rope_parameters", "rope_scaling"))):
        require(rope, rope_type="default", type="default", rope_theta=10000.0, partial_rotary_factor=1.0)
    require(settings, rms_norm_eps=EPS, use_sliding_window=False, pretraining_tp=1)
    for layer in settings.get("layer_types") or ():
        require({"layer_types": layer}, layer_types="full_attention")
    require(settings, head_dim=settings["hidden_size"] // settings["num_attention_heads"])
    is_qwen, gated = settings["model_type"] == "qwen3", settings["model_type"] != "arcee"
    bias = bool(settings.get("attention_bias"))
    require(settings, **{"attention_bias": False} if is_qwen else {"mlp_bias": bias})
    shape = {ours: settings[theirs] for theirs, ours in LLAMA_SIZES.items()} | {
        "n_kv_head": settings.get("num_key_value_heads"),
        "bias": bias,
        "norm": "rmsnorm",
        "rotary": True,
        "qk_norm": is_qwen,
        "activation": activation_of(settings, "hidden_act", "silu" if gated else "relu2", gated),
        "tied": settings.get("tie_word_embeddings", False),
    }
    require(settings, intermediate_size=make_config(shape).mlp_width)
    return shape
