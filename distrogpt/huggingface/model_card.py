"""The model card of an export: its README.md, which Hugging Face's hub shows."""

import json
import math
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distrogpt.data.meta import GPT2_META
from distrogpt.data.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer, start_token
from distrogpt.huggingface.formats import ARCHITECTURES, model_type_of
from distrogpt.settings import TrainConfig
from model import GPTConfig

# settings that are told though they are the defaults; those that say nothing of what was learned
MAIN = (
    *("gradient_accumulation_steps", "batch_size", "block_size", "max_iters", "optimizer", "learning_rate"),
    *("weight_decay", "dropout"),
)
NOT_TOLD = (
    *("out_dir", "dataset", "init_from", "hellaswag_input", "wandb_log", "wandb_project", "wandb_run_name"),
    *("tensorboard_log", "loss_plot", "log_interval", "eval_samples", "sample_start", "sample_tokens"),
    *("eval_interval", "eval_iters", "save_interval", "keep_checkpoints", "always_save_checkpoint"),
    *("device", "compile", "backend", "shard", "activation_checkpointing", "eval_only"),
)


def shared_meta(meta: dict[str, Any] | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """What may be told of the dataset to whoever gets the folder: no paths of this machine."""
    meta = {**(meta or GPT2_META), "tokenizer": tokenizer.describe(), "vocab_size": tokenizer.vocab_size}
    if "source" in meta:
        parts = str(meta["source"]).split(", ")
        meta["source"] = ", ".join(Path(part).name if Path(part).is_absolute() else part for part in parts)
    return meta


def runs_in(shape: GPTConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """Of vLLM and llama.cpp why they cannot run this very network, "" where they can."""
    kind, activation = model_type_of(shape), shape.activation
    if kind == "distrogpt":
        return dict.fromkeys(("vLLM", "llama.cpp"), "does not know this network")
    its_own = {"gpt2": "gelu_tanh", "arcee": "relu2"}.get(kind, activation)  # all that is computed there
    other = "" if activation == its_own else f"computes another activation than {activation}"
    unknown = "" if isinstance(tokenizer, GPT2Tokenizer) else "does not know this tokenizer"
    return {"vLLM": "" if kind == "gpt2" else other, "llama.cpp": other or unknown}


def how_to_load(folder: str, shape: GPTConfig, tokenizer: Tokenizer) -> list[str]:
    """Lines of Python that load it, and a command for each program that can."""
    own = model_type_of(shape) == "distrogpt"
    runs, quoted, name = runs_in(shape, tokenizer), repr(folder), shlex.quote(folder)
    trust = ", trust_remote_code=True" if own else ""
    args: dict[str, Any] = {"pretrained": folder} | ({"trust_remote_code": True} if own else {})
    if tokenizer.end_of_text is None:  # what stands before a text without context
        args["prefix_token_id"] = start_token(tokenizer)
    told = ",".join(f"{key}={value}" for key, value in args.items())
    if name != folder or "," in folder:  # lm_eval has quotes of its own there
        told = shlex.quote(json.dumps(args, ensure_ascii=False))
    tasks = "hellaswag"
    if isinstance(tokenizer, CharTokenizer):  # others' questions have other characters
        tasks = "choice --include_path hf   # distroGPT's hf; reads questions.jsonl"
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"model = AutoModelForCausalLM.from_pretrained({quoted}{trust})",
        f"tokenizer = AutoTokenizer.from_pretrained({quoted}{trust})",
        f"# lm_eval --model hf --model_args {told} --tasks {tasks}",
    ]
    lines += [] if runs["vLLM"] else [f"# vllm serve {name}"]
    lines += [] if runs["llama.cpp"] else [f"# python convert_hf_to_gguf.py {name}   # llama.cpp's"]
    return [*lines, f"# python sample.py --init_from={name}   # distroGPT's"]


def limits_of(tokenizer: Tokenizer) -> list[str]:
    """What it cannot do, a sentence each."""
    limits = []
    if isinstance(tokenizer, CharTokenizer):
        limits += [f"Characters outside of its {len(tokenizer.chars)} are an error."]
    if tokenizer.end_of_text is None:
        limits += ["No token ends a text or fills up a batch: texts of several lengths are read one by one."]
    return limits


def model_card(
    name: str,
    shape: GPTConfig,
    tokenizer: Tokenizer,
    contents: dict[str, Any],
    meta: dict[str, Any],
    count: int,
    dtype: str,
) -> str:
    """The text of README.md, of a network of `count` weights. `contents` is its checkpoint, {} where there
    is none, `meta` what is told of its dataset."""
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- distrogpt"]
    kind = model_type_of(shape)
    about = f"A GPT of {count:,} parameters, trained with distroGPT and written by its `export.py`."
    sections = {
        "Load it": "\n".join(["```python", *how_to_load(name, shape, tokenizer), "```"]),
        "The network": table({"architecture": ARCHITECTURES[kind], **told_shape(shape), "weights": dtype}),
        "The data": table(told_data(contents.get("config", {}), meta)),
        "The losses": table(told_losses(contents, meta)),
        "The training": table(told_settings(contents.get("config", {}))),
        "Licence": "None is claimed here: whoever owns the weights and the text that they come from decides, "
        "and names it above as `license:`.",
    }
    if kind == "distrogpt":
        sections["Load it"] += (
            "\n\n`trust_remote_code=True` lets transformers, 5.0 and newer, run `modeling_distrogpt.py` of "
            "this folder, as none of its own architectures computes this network; read it first."
        )
    sections["Load it"] += "".join(f"\n\n{limit}" for limit in limits_of(tokenizer))
    reasons = runs_in(shape, tokenizer).items()
    sections["Load it"] += "".join(f"\n\n{program} {reason}." for program, reason in reasons if reason)
    body = [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    return "\n".join(["---", *front, "---", "", f"# {cell(name)}", "", about, "", "\n\n".join(body), ""])


def table(rows: dict[str, Any]) -> str:
    """A table of Markdown; nothing where there are no rows."""
    if not rows:
        return ""
    lines = [f"| {key} | {cell(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def cell(value: Any) -> str:
    """A value as one line of plain text, cut to 200 characters."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = " ".join(str(value).split())[:200]
    return "".join("\\" + char if char in "|<>[]`*_\\" else char for char in text)


def told_shape(shape: GPTConfig) -> dict[str, Any]:
    """The settings of a network that tell it from GPT-2, and its sizes."""
    sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    found, default = asdict(shape), asdict(GPTConfig())
    hidden = ("dropout", "zero_init")
    return {
        name: value
        for name, value in found.items()
        if name in sizes or (value != default[name] and name not in hidden)
    }


def told_data(config: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    """What is known of the dataset."""
    names = str(config.get("dataset", "")).split(",")
    told = {"name": ", ".join(name.rstrip("/\\").replace("\\", "/").split("/")[-1] for name in names)}
    if len(names) == 1:  # of a mixture, meta is the first one's
        told |= {f"{split} tokens": count for split, count in meta.get("tokens", {}).items()}
        told |= {f"{split} bytes of text": count for split, count in meta.get("bytes", {}).items()}
        told |= {key: meta[key] for key in ("source", "sha256") if key in meta}
    kinds = {"char": "characters", "byte": "bytes", "bpe": "own byte-pair encoding", "gpt2": "GPT-2's"}
    tokenizer = f"{kinds[meta['tokenizer']['kind']]}, {meta['vocab_size']} tokens"
    return {key: value for key, value in told.items() if value} | {"tokenizer": tokenizer}


def told_losses(contents: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    """Steps and losses of a checkpoint, in nats per token; bits per byte where the sizes are known."""
    if "iter_num" not in contents:
        return {}
    config = contents.get("config", {})
    split = "train" if config.get("eval_splits") == "train" else "val"
    loss = float(contents.get("val_loss", contents.get("best_val_loss", math.inf)))
    told: dict[str, Any] = {"step": contents["iter_num"]}
    if math.isfinite(loss):
        told[f"{split} loss"] = f"{loss:.4f}"
        tokens, size = (meta.get(key, {}).get(split) for key in ("tokens", "bytes"))
        if tokens and size and not config.get("loss_after") and "," not in str(config.get("dataset")):
            told[f"{split} bits per byte"] = f"{loss / math.log(2) * tokens / size:.4f}"
    best = float(contents.get("best_val_loss", math.inf))
    if math.isfinite(best):
        told[f"best {split} loss of the run"] = f"{best:.4f}"
    if contents.get("seconds"):
        told["minutes of training"] = f"{contents['seconds'] / 60:.1f}"
    return told


def told_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of training that are not the defaults, and the main ones; not the network's."""
    default = asdict(TrainConfig())
    shape = asdict(GPTConfig())
    return {
        name: value if isinstance(value, (int, float, str)) else json.dumps(value, default=str)
        for name, value in config.items()
        if name in default
        and name not in NOT_TOLD
        and (name in MAIN or (value != default[name] and name not in shape))
    }
