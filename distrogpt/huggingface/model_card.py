"""The model card of an export: its README.md, which the Hugging Face hub shows."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distrogpt.data.meta import GPT2_META
from distrogpt.data.tokenizer import CharTokenizer, IdTokenizer, Tokenizer, start_token
from distrogpt.errors import quote
from distrogpt.huggingface.formats import ARCHITECTURES, model_type_of
from distrogpt.huggingface.gguf import obstacles
from distrogpt.settings import TrainConfig
from model import GPTConfig

# settings that are reported even if they are defaults, and settings that are never reported
MAIN = """gradient_accumulation_steps batch_size block_size max_iters optimizer learning_rate weight_decay
    dropout""".split()
NEVER_REPORTED = """out_dir dataset init_from hellaswag_input wandb_log wandb_project wandb_run_name
    tensorboard_log loss_plot log_interval eval_samples sample_start sample_tokens eval_interval eval_iters
    save_interval keep_checkpoints always_save_checkpoint device compile backend shard
    activation_checkpointing eval_only""".split()
SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
TOKENIZERS = {"char": "characters", "byte": "bytes", "bpe": "own byte-pair encoding", "gpt2": "GPT-2's"}
NO_END = "It has no end-of-text or padding token: process texts of different lengths one at a time."
NO_TOKENIZER = "It has no tokenizer: inputs and outputs are token ids."
TRUST = """No architecture of transformers computes this network. `trust_remote_code=True` lets transformers \
5.0 and newer run `modeling_distrogpt.py` of this folder; read it first."""
LICENCE = """This card states no licence: the owner of the weights and of the training text chooses one and \
adds it above as `license:`."""


def public_meta(meta: dict[str, Any] | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """The dataset's meta.json for other people: without paths of this machine."""
    meta = {**(meta or GPT2_META), "tokenizer": tokenizer.describe(), "vocab_size": tokenizer.vocab_size}
    if "source" in meta:
        sources = str(meta["source"]).split(", ")
        meta["source"] = ", ".join(Path(s).name if Path(s).is_absolute() else s for s in sources)
    return meta


def unsupported_by(shape: GPTConfig) -> dict[str, str]:
    """Why vLLM and llama.cpp cannot run this network; "" if they can."""
    kind, activation = model_type_of(shape), shape.activation
    unknown, lacks = "does not support this network", ", ".join(obstacles(shape))
    if kind == "distrogpt":
        return {"vLLM": unknown, "llama.cpp": f"{unknown} (because of {lacks})"}
    fixed = {"arcee": "relu2"}.get(kind, activation)  # the only one that vLLM computes
    other = "" if activation == fixed else f"would compute another activation than {activation}"
    return {"vLLM": other, "llama.cpp": f"{unknown} (because of {lacks})" if lacks else ""}


def how_to_load(folder: str, shape: GPTConfig, tokenizer: Tokenizer) -> list[str]:
    """Lines of Python that load the export, and a command for each program that can."""
    own_code = model_type_of(shape) == "distrogpt"
    trust = ", trust_remote_code=True" if own_code else ""
    unsupported, quoted, name = unsupported_by(shape), repr(folder), quote(folder)
    args: dict[str, Any] = {"pretrained": folder} | ({"trust_remote_code": True} if own_code else {})
    if tokenizer.end_of_text is None:  # comes before a text without context
        args["prefix_token_id"] = start_token(tokenizer)
    model_args = ",".join(f"{key}={value}" for key, value in args.items())
    if name != folder or "," in folder:  # lm_eval does not understand shell quotes within its list
        model_args = quote(json.dumps(args, ensure_ascii=False))
    tasks = "hellaswag"
    if isinstance(tokenizer, CharTokenizer):  # hellaswag has other characters
        tasks = "choice --include_path distrogpt/huggingface   # in distroGPT; reads questions.jsonl"
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"model = AutoModelForCausalLM.from_pretrained({quoted}{trust})",
        f"tokenizer = AutoTokenizer.from_pretrained({quoted}{trust})",
        f"# lm_eval --model hf --model_args {model_args} --tasks {tasks}",
    ]
    has_tokenizer = not isinstance(tokenizer, IdTokenizer)
    if not has_tokenizer:
        lines = ["from transformers import AutoModelForCausalLM", lines[1]]
    if not unsupported["vLLM"]:
        lines.append(f"# vllm serve {name}" + ("" if has_tokenizer else " --skip-tokenizer-init"))
    if not unsupported["llama.cpp"]:
        to = quote(f"{folder}.gguf")
        lines.append(f"# python export.py --init_from={name} --to={to} --gguf=q8_0   # a file for llama.cpp")
    return [*lines, f"# python sample.py --init_from={name}   # in distroGPT"]


def limits_of(tokenizer: Tokenizer) -> list[str]:
    """The limits of the tokenizer, a sentence each."""
    if isinstance(tokenizer, IdTokenizer):
        return [NO_TOKENIZER]
    limits = [] if tokenizer.end_of_text is not None else [NO_END]
    if isinstance(tokenizer, CharTokenizer):
        limits.insert(0, f"Its vocabulary is {len(tokenizer.chars)} characters; all others are an error.")
    return limits


def model_card(
    name: str, shape: GPTConfig, tokenizer: Tokenizer, contents: dict[str, Any], count: int, dtype: str
) -> str:
    """The text of README.md, for `count` weights of type `dtype`; `contents` is their checkpoint, or {}."""
    kind, config = model_type_of(shape), contents.get("config", {})
    meta = public_meta(contents.get("meta"), tokenizer)
    reasons = unsupported_by(shape).items()
    loading = ["\n".join(["```python", *how_to_load(name, shape, tokenizer), "```"])]
    if kind == "distrogpt":
        loading.append(TRUST)
    loading += [*limits_of(tokenizer), *(f"{program} {reason}." for program, reason in reasons if reason)]
    sections = {
        "How to load it": "\n\n".join(loading),
        "Model": table({"architecture": ARCHITECTURES[kind], **shape_rows(shape), "weights": dtype}),
        "Training data": table(data_rows(config, meta)),
        "Losses": table(loss_rows(contents, meta)),
        "Training settings": table(settings_rows(config)),
        "Licence": LICENCE,
    }
    front_matter = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- distrogpt\n---\n"
    about = f"A GPT of {count:,} parameters, trained with distroGPT and exported with its `export.py`.\n"
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return "\n".join([front_matter, f"# {cell(name)}\n", about, body, ""])


def table(rows: dict[str, Any]) -> str:
    """A table in Markdown; "" if there are no rows."""
    lines = [f"| {key} | {cell(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else ""


def cell(value: Any) -> str:
    """A value as one line of plain text in Markdown, cut to 200 characters."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = " ".join(str(value).split())[:200]
    return "".join("\\" + char if char in "|<>[]`*_\\" else char for char in text)


def shape_rows(shape: GPTConfig) -> dict[str, Any]:
    """The sizes of the network, and its differences from GPT-2."""
    default, values = asdict(GPTConfig()), asdict(shape)
    values |= {"dropout": default["dropout"], "zero_init": default["zero_init"]}  # of the training alone
    return {name: value for name, value in values.items() if name in SIZES or value != default[name]}


def data_rows(config: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    """The known properties of the dataset."""
    names = str(config.get("dataset", "")).split(",")
    rows = {"name": ", ".join(name.rstrip("/\\").replace("\\", "/").split("/")[-1] for name in names)}
    if len(names) == 1:  # for a mixture, meta is that of its first part
        rows |= {f"{split} tokens": count for split, count in meta.get("tokens", {}).items()}
        rows |= {f"{split} bytes of text": count for split, count in meta.get("bytes", {}).items()}
        rows |= {key: meta[key] for key in ("source", "sha256") if key in meta}
    kind = TOKENIZERS[meta["tokenizer"]["kind"]] if meta["tokenizer"] else "none"
    tokenizer = f"{kind}, {meta['vocab_size']} tokens"
    return {key: value for key, value in rows.items() if value} | {"tokenizer": tokenizer}


def loss_rows(contents: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    """The step and losses of a checkpoint, in nats per token, and bits per byte if the sizes are known."""
    if "iter_num" not in contents:
        return {}
    config = contents.get("config", {})
    split = "train" if config.get("eval_splits") == "train" else "val"
    best = float(contents.get("best_val_loss", math.inf))
    loss = float(contents.get("val_loss", best))
    rows: dict[str, Any] = {"step": contents["iter_num"]}
    if math.isfinite(loss):
        rows[f"{split} loss"] = f"{loss:.4f}"
        tokens, size = (meta.get(key, {}).get(split) for key in ("tokens", "bytes"))
        if tokens and size and not config.get("loss_after") and "," not in str(config.get("dataset")):
            rows[f"{split} bits per byte"] = f"{loss / math.log(2) * tokens / size:.4f}"
    if math.isfinite(best):
        rows[f"best {split} loss of the run"] = f"{best:.4f}"
    if contents.get("seconds"):
        rows["minutes of training"] = f"{contents['seconds'] / 60:.1f}"
    return rows


def settings_rows(config: dict[str, Any]) -> dict[str, Any]:
    """The main settings of the training, and others that are not the defaults; not the network's."""
    others = {name: value for name, value in asdict(TrainConfig()).items() if name not in asdict(GPTConfig())}
    if config.get("max_minutes"):  # the steps are in another row
        config = {name: value for name, value in config.items() if name != "max_iters"}
    return {
        name: value
        for name, value in config.items()
        if name in MAIN or (name in others and name not in NEVER_REPORTED and value != others[name])
    }
