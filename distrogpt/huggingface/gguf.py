"""GGUF, llama.cpp's format: the sizes of a network, its weights and its tokenizer in one file.

llama.cpp computes networks of four kinds; ARCHITECTURES has the settings that each of them requires. Their
weights are those of Hugging Face's formats, with two differences: matrices are (out, in) in all of them, and
llama and arcee rotate neighbouring channels, as ours does.
"""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distrogpt.checkpoint import atomic_write
from distrogpt.data.tokenizer import (
    BYTE_CHARS,
    END_OF_TEXT,
    CharTokenizer,
    IdTokenizer,
    Tokenizer,
    start_token,
)
from distrogpt.errors import UserError, quote
from distrogpt.huggingface.formats import CONV1D, Weights, in_pairs, is_rotated, model_type_of, to_weights
from distrogpt.settings import SampleConfig
from model import EPS, GPTConfig

NEW = {"norm": "rmsnorm", "rotary": True}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {**NEW, "qk_norm": True, "activation": "swiglu", "bias": False},
    "arcee": {**NEW, "qk_norm": False, "activation": "relu2", "bias": False},
    "llama": {**NEW, "qk_norm": False, "activation": "swiglu"},
    "gpt2": {
        "norm": "layernorm",
        "rotary": False,
        "qk_norm": False,
        "activation": "gelu_tanh",
        "n_kv_head": None,
    },
}
OFF = {"logit_softcap": 0.0, "embedding_skip": False, "key_offset": False}  # in all of them
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # the numbers of general.file_type
NORMAL, CONTROL = 1, 3  # types of tokens
MAGIC = b"GGUF"  # the first bytes of a file
PADDING = "<|unused|>"  # a token of llama.cpp's vocabulary that ours lacks


def obstacles(shape: GPTConfig) -> dict[str, Any]:
    """The settings that llama.cpp cannot compute, and the values that it can: those of its most similar
    network. Empty if it has this network."""
    if shape.kv_heads == shape.n_head:
        shape = replace(shape, n_kv_head=None)
    if shape.activation == "gelu":  # as near as gelu_tanh to llama.cpp's, which reads a table in f16
        shape = replace(shape, activation="gelu_tanh")
    required = [{**settings, **OFF} for settings in ARCHITECTURES.values()]
    differing = [{k: v for k, v in settings.items() if getattr(shape, k) != v} for settings in required]
    return min(differing, key=len)


def check_network(shape: GPTConfig, action: str = "train one") -> None:
    """Raises UserError if llama.cpp has no such network; `action` is what to do with another one."""
    if needed := obstacles(shape):
        has = ", ".join(f"{name}={getattr(shape, name)}" for name in needed)
        flags = " ".join(f"--{name}={value}" for name, value in needed.items())
        raise UserError(f"llama.cpp cannot run a network with {has}; {action} with {flags} (docs/export.md)")


def check_file(to: Path, shown: str, overwrite: bool) -> None:
    """Raises UserError if `to`, called `shown` by the user, exists and may not be replaced."""
    if not os.path.lexists(to):
        return
    try:
        with open(to, "rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise UserError(f"{shown} cannot be read ({error.strerror}); choose another file for --to") from None
    if not is_gguf:
        raise UserError(f"{shown} is not a GGUF file, so it is not replaced; choose another file for --to")
    if not overwrite:
        raise UserError(f"{shown} exists already; choose another file, or set --overwrite=True")


def is_padded(tokenizer: Tokenizer) -> bool:
    """Whether the file has one token more than the tokenizer. llama.cpp's tokenizer of merges needs a token
    that ends texts: unless one is named, it is the one with id 11."""
    ends = tokenizer.end_of_text is not None or isinstance(tokenizer, IdTokenizer)
    return not ends and not are_bytes(pieces_of(tokenizer))


def pieces_of(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each id but that of end_of_text, which is the last. Raises UserError if they have none."""
    count = tokenizer.vocab_size - (tokenizer.end_of_text is not None)
    if isinstance(tokenizer, CharTokenizer):
        try:
            return [char.encode() for char in tokenizer.chars]
        except UnicodeEncodeError:
            raise UserError("the vocabulary has surrogates, which GGUF cannot store; remove them") from None
    return [tokenizer.decode_bytes([i]) for i in range(count)]


def are_bytes(pieces: list[bytes]) -> bool:
    return all(len(piece) == 1 for piece in pieces)


def merges_of(tokenizer: Tokenizer, pieces: list[list[str]]) -> list[str]:
    """The merges of a byte-pair encoding; for characters, those that join the bytes of each."""
    pairs: list[tuple[str, str]] = list(tokenizer.merges)
    if isinstance(tokenizer, CharTokenizer):
        pairs = [("".join(piece[:n]), piece[n]) for piece in pieces for n in range(1, len(piece))]
    return [" ".join(pair) for pair in dict.fromkeys(pairs)]


def tokenizer_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    """The keys of the tokenizer, with which llama.cpp encodes every text as ours does. Raises UserError.

    A vocabulary of single bytes (ASCII characters, or all bytes) becomes RWKV's kind, which matches bytes: an
    unknown one is an error. Others become GPT-2's kind, which merges bytes, and skips unknown characters."""
    if isinstance(tokenizer, IdTokenizer):
        return {"model": "none"}
    pieces, end = pieces_of(tokenizer), tokenizer.end_of_text
    fields: dict[str, Any] = {"bos_token_id": start_token(tokenizer), "add_bos_token": False}
    if are_bytes(pieces):
        fields |= {"model": "rwkv"}
        tokens = [f"\\x{piece[0]:02x}" for piece in pieces]
    else:
        visible = [[BYTE_CHARS[b] for b in piece] for piece in pieces]
        fields |= {"model": "gpt2", "pre": "gpt-2", "merges": merges_of(tokenizer, visible)}
        tokens = ["".join(piece) for piece in visible]
    types = [NORMAL] * len(tokens)
    if end is not None or is_padded(tokenizer):
        fields["eos_token_id"] = len(tokens)
        tokens, types = [*tokens, PADDING if end is None else END_OF_TEXT], [*types, CONTROL]
        if end is None:  # programs of llama.cpp never choose it
            fields["suppress_tokens"] = [len(tokens) - 1]
    return {**fields, "tokens": tokens, "token_type": types}


def network_fields(shape: GPTConfig) -> dict[str, Any]:
    """The keys of the network's sizes."""
    fields = {
        "context_length": shape.block_size,
        "embedding_length": shape.n_embd,
        "block_count": shape.n_layer,
        "feed_forward_length": shape.mlp_width,
        "attention.head_count": shape.n_head,
        "attention.head_count_kv": shape.kv_heads,
        "vocab_size": shape.vocab_size,
    }
    if shape.norm == "layernorm":
        return {**fields, "attention.layer_norm_epsilon": 1e-5}
    rope = {"rope.dimension_count": shape.head_dim, "rope.freq_base": 10000.0}
    return {**fields, "attention.layer_norm_rms_epsilon": EPS, **rope}


def gguf_weights(shape: GPTConfig, weights: Weights, padded: bool) -> Weights:
    """Our weights by llama.cpp's names, in its layout, fp32. With `padded`, the embeddings have one row more:
    the mean of the others, so that its logit is never the largest."""
    import gguf

    kind = model_type_of(shape)
    (architecture,) = [number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind]
    names = gguf.get_tensor_name_map(architecture, shape.n_layer)
    result = {}
    for name, w in to_weights(shape, weights).items():
        if name.endswith(CONV1D):
            w = w.t()
        elif kind != "qwen3" and is_rotated(name):
            w = in_pairs(w, shape.head_dim)
        result[names.get_name(name, try_suffixes=(".weight", ".bias"))] = w.float().contiguous()
    for name in ("token_embd.weight", "output.weight"):
        if padded and name in result:
            result[name] = torch.cat([result[name], result[name].mean(0, keepdim=True)])
    return result


def type_of(name: str, w: torch.Tensor, file_type: str) -> str:
    """The type of a weight: f32 for vectors and positions; f16 if q8_0 cannot store its rows."""
    if w.dim() == 1 or name == "position_embd.weight":
        return "f32"
    return "f16" if file_type == "q8_0" and w.size(1) % 32 else file_type


def check_range(name: str, w: torch.Tensor, kind: str) -> None:
    """Raises UserError if a weight is not finite in its type; scales of q8_0, the largest / 127, are f16."""
    stored = {"f32": w, "bf16": w.bfloat16(), "f16": w.half(), "q8_0": (w / 127).half()}[kind]
    if not stored.isfinite().all():
        larger = "f32" if kind == "bf16" else "bf16"
        raise UserError(f"{name} has weights that are not finite in {kind}; choose {larger} instead")


def write_gguf(
    to: Path, shape: GPTConfig, weights: Weights, tokenizer: Tokenizer, file_type: str
) -> dict[str, str]:
    """Write the network with our weights, and its tokenizer, as one file: complete, or not at all.

    Returns the type of each weight. Raises UserError, or MachineError if the disk fails."""
    import gguf

    check_network(shape)
    padded, kind = is_padded(tokenizer), model_type_of(shape)
    tensors = gguf_weights(shape, weights, padded)
    fields = {f"{kind}.{name}": value for name, value in network_fields(shape).items()}
    fields[f"{kind}.vocab_size"] += padded
    fields |= {f"tokenizer.ggml.{name}": value for name, value in tokenizer_fields(tokenizer).items()}
    fields |= {"general.type": "model", "general.file_type": FILE_TYPES[file_type]}
    fields |= {"general.quantization_version": gguf.GGML_QUANT_VERSION}
    writer = gguf.GGUFWriter(None, kind)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    adders |= {str: writer.add_string, list: writer.add_array}
    for name, value in fields.items():
        adders[type(value)](name, value)
    types = {name: type_of(name, w, file_type) for name, w in tensors.items()}
    for name, w in tensors.items():
        check_range(name, w, types[name])
        stored = gguf.GGMLQuantizationType[types[name].upper()]
        writer.add_tensor(name, gguf.quantize(w.numpy(), stored), raw_dtype=stored)

    def write(path: str) -> None:
        writer.write_header_to_file(Path(path))
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    try:
        to.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{to.parent} cannot be created ({error.strerror}); choose another file") from None
    atomic_write(lambda file: write(file.name), to, needed=sum(t.nbytes for t in writer.tensors[0].values()))
    return types


def how_to_run(shown: str, shape: GPTConfig, tokenizer: Tokenizer, types: dict[str, str]) -> list[str]:
    """Lines that say what the file has, Python that runs it in llama.cpp, and its limits."""
    counts = Counter(types.values())
    weights = ", ".join(f"{counts[kind]} in {kind}" for kind in FILE_TYPES if counts[kind])
    lines = [
        f"{shown}: {model_type_of(shape)}, {os.path.getsize(shown) / 1e6:,.1f} MB, weights: {weights}",
        "from llama_cpp import Llama   # pip install llama-cpp-python",
        f"llm = Llama({shown!r}, n_ctx=0, verbose=False)",
    ]
    temperature, top_k, length = SampleConfig.temperature, SampleConfig.top_k, min(100, shape.block_size // 2)
    if isinstance(tokenizer, IdTokenizer):
        lines.append(f"ids = llm.generate([0], temp={temperature}, top_k={top_k}, top_p=1, min_p=0)")
        lines.append(f"print([next(ids) for _ in range({length})])")
    else:
        prompt = example_prompt(tokenizer)
        sampling = f"temperature={temperature}, top_k={top_k}, top_p=1, min_p=0"
        sampling += f", logit_bias={{{tokenizer.vocab_size}: -100}}" if is_padded(tokenizer) else ""
        lines.append(f'text = llm({prompt!r}, max_tokens={length}, {sampling})["choices"][0]["text"]')
        lines.append("print(text)")
        flags = f"-no-cnv -n {length} --temp {temperature} --top-k {top_k} --top-p 1 --min-p 0"
        lines.append(f"# llama-completion -m {quote(shown)} -p {quote(prompt)} {flags}")
    return [*lines, *limits_of(shape, tokenizer)]


def example_prompt(tokenizer: Tokenizer) -> str:
    """A short text that the tokenizer can encode."""
    if isinstance(tokenizer, CharTokenizer) and not set("The") <= set(tokenizer.chars):
        return next(filter(str.isalnum, tokenizer.chars), tokenizer.chars[0])
    return "The"


def limits_of(shape: GPTConfig, tokenizer: Tokenizer) -> list[str]:
    """The limits of the file in llama.cpp, a sentence each."""
    limits = [f"It reads {shape.block_size} tokens, prompt included: llama.cpp does not move this window."]
    if isinstance(tokenizer, IdTokenizer):
        return ["It has no tokenizer: inputs and outputs are token ids.", *limits]
    if isinstance(tokenizer, CharTokenizer):
        others = "are an error" if are_bytes(pieces_of(tokenizer)) else "are left out by llama.cpp"
        limits.append(f"Its vocabulary is {len(tokenizer.chars)} characters; all others {others}.")
    if is_padded(tokenizer):
        limits.append(f"llama.cpp needs a token that ends texts: {tokenizer.vocab_size}, never trained.")
    return limits
