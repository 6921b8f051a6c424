"""The tasks of eval.py. Each NAME_task checks its settings and data, and returns a function that runs it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from distrogpt.checkpoint import check_range
from distrogpt.data.dataset import Dataset, open_dataset
from distrogpt.data.meta import GPT2_META, tokenizers_differ
from distrogpt.data.tokenizer import IdTokenizer, Tokenizer, encode_prompt, keep_ends
from distrogpt.errors import UserError
from distrogpt.evaluation.evaluator import Evaluator
from distrogpt.evaluation.exact_match import answer_problems, load_problems
from distrogpt.evaluation.introspection import next_tokens
from distrogpt.evaluation.loss import mean_losses
from distrogpt.evaluation.multiple_choice import GPT2_HELLASWAG, answer_multiple_choice, load_questions
from distrogpt.inference.sampler import read_prompt
from distrogpt.kernels.cpu import to_device
from distrogpt.loading import find_tokenizer, is_here, load_trained
from distrogpt.runtime import Runtime
from distrogpt.settings import EVAL_TASKS, EvalConfig, TrainConfig
from model import GPT

Result = dict[str, Any]
Task = Callable[[], Result]


class LoadedModel(NamedTuple):
    """A trained model on its device, and the settings and data description of its checkpoint."""

    model: GPT
    tokenizer: Tokenizer | None  # None if no task needs one
    settings: dict[str, Any]  # of its training, {} if they are unknown
    meta: dict[str, Any]  # of its dataset
    source: str  # its path or name
    runtime: Runtime


def load_tasks(config: EvalConfig, runtime: Runtime) -> tuple[str, dict[str, Task]]:
    """The model's source, for display, and the checked tasks of the settings. Raises UserError."""
    model, contents, source = load_trained(config.out_dir, config.init_from)
    check_range(model, runtime.dtype)
    settings, meta = contents.get("config", {}), contents.get("meta", {}) if contents else GPT2_META
    names = [name.strip() for name in config.tasks.split(",") if name.strip()] or [config.tasks]
    if names == ["auto"]:
        names = ["accuracy" if settings.get("loss_after") else "loss"]
        for name, reason in config.unused_by(names).items():
            if getattr(config, name) != getattr(EvalConfig, name):
                raise UserError(f"{name} has no effect: {reason}; leave it out, or set --tasks")
    for name in names:
        if name not in EVAL_TASKS:
            known = ", ".join(EVAL_TASKS)
            raise UserError(f"tasks={name[:40]} is unknown; choose from {known}, separated by commas")
    tokenizer = None
    if set(names) != {"loss"}:  # the loss needs no tokenizer
        tokenizer = find_tokenizer(contents, model.config.vocab_size, source, config.dataset)
    path, model = source.partition(", step ")[0], to_device(model, runtime.device).eval()
    loaded = LoadedModel(model, tokenizer, settings, meta, path, runtime)
    return source, {name: TASKS[name](config, loaded, name) for name in names}


def open_eval_data(config: EvalConfig, loaded: LoadedModel, **settings: Any) -> tuple[Dataset, TrainConfig]:
    """The dataset of the settings, by default the one of the training, and its settings. Raises UserError."""
    dataset, source = config.dataset or loaded.settings.get("dataset"), loaded.source
    if not dataset:
        raise UserError(f"{source} does not name the dataset that it was trained on; give --dataset=NAME")
    if not config.dataset and not is_here(dataset):
        raise UserError(f"{source} was trained on {dataset[:200]}, which is not here; give --dataset=FOLDER")
    train_config = TrainConfig(dataset=dataset, eval_iters=0, eval_splits=config.split, **settings)
    data, advice = open_dataset(train_config, (config.split,)), "use a dataset with the model's tokenizer"
    if tokenizers_differ(loaded.meta.get("tokenizer"), data.meta["tokenizer"]):
        raise UserError(f"{dataset} has a different tokenizer than {source}; {advice}")
    if data.meta["vocab_size"] > loaded.model.config.vocab_size:
        raise UserError(f"{dataset} has a larger vocabulary than {source}; {advice}")
    return data, train_config


def loss_task(config: EvalConfig, loaded: LoadedModel, name: str) -> Task:
    """Loss, perplexity and bits per byte of a split; each token is predicted once."""
    longest, stride = loaded.model.config.block_size, config.stride
    T = config.block_size or longest
    settings: dict[str, Any] = {"block_size": T, "loss_after": loaded.settings.get("loss_after")}
    if T > longest:
        raise UserError(f"block_size={T} is larger than that of {loaded.source}; set {longest} or less")
    if loaded.settings.get("sampling") == "lines":
        settings["sampling"] = "lines"
        if stride:
            raise UserError("stride has no meaning for a model trained with sampling=lines; leave it out")
    if stride and stride > T:
        raise UserError(f"stride={stride} is larger than the window of {T} tokens; set {T} or less")
    data, train_config = open_eval_data(config, loaded, batch_size=config.batch_size or 16, **settings)
    evaluator = Evaluator(train_config, data, loaded.runtime)

    def task() -> Result:
        parts = evaluator.part_losses(loaded.model, config.split, stride=stride)
        means = mean_losses(data, {config.split: [loss for loss, _ in parts]}, config.split)
        loss, tokens = means.pop(config.split), sum(count for _, count in parts)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700)), **means, "tokens": tokens}

    return task


def multiple_choice_task(config: EvalConfig, loaded: LoadedModel, name: str) -> Task:
    """The accuracy of choosing the ending with the largest sum (acc) or mean (acc_norm) of log-probs."""
    if name == "choice" and not config.input:
        raise UserError("the task choice needs a file of questions; set --input=FILE, or --tasks=hellaswag")
    if not config.input and isinstance(loaded.tokenizer, IdTokenizer):
        raise UserError(
            f"{loaded.source} has no tokenizer for HellaSwag's text; leave out the task hellaswag"
        )
    model, runtime = loaded.model, loaded.runtime
    limits = (model.config.block_size, config.max_items)
    questions = load_questions(config.input, "--input=FILE", loaded.tokenizer, *limits, runtime)

    def task() -> Result:
        chosen = answer_multiple_choice(model, questions, runtime, config.batch_size or 16)
        accuracies = (chosen == [[question.label] for question in questions]).mean(axis=0).tolist()
        result = dict(zip(("acc", "acc_norm"), accuracies, strict=True), questions=len(questions))
        if name == "hellaswag" and config.init_from in GPT2_HELLASWAG:
            result["published"] = GPT2_HELLASWAG[config.init_from]
        return result

    return task


def exact_match_task(config: EvalConfig, loaded: LoadedModel, name: str) -> Task:
    """Exact match on held-out lines: the prompt of a line ends with the separator, the rest is the answer."""
    model, runtime, decode = loaded.model, loaded.runtime, loaded.tokenizer.decode
    separator = config.separator or loaded.settings.get("loss_after") or "="
    data, _ = open_eval_data(config, loaded, block_size=1, loss_after=separator)
    problems = load_problems(data, model.config.block_size, config.split, config.max_items)

    def task() -> Result:
        answers = answer_problems(model, data, problems, runtime, config.batch_size or 256)
        wrong = [
            {"prompt": decode(prompt), "given": decode(answer), "right": decode(expected)}
            for (prompt, expected), answer in zip(problems, answers, strict=True)
            if answer != expected
        ]
        n, right = len(problems), len(problems) - len(wrong)
        return {"exact": right / n, "right": right, "lines": n, "wrong": wrong[: config.show]}

    return task


def next_token_task(config: EvalConfig, loaded: LoadedModel, name: str) -> Task:
    """The most likely next tokens after a prompt."""
    prompt, tokenizer = read_prompt(config.start), loaded.tokenizer
    ids = {"the prompt": encode_prompt(tokenizer, prompt)}
    (ids,) = keep_ends(ids, loaded.model.config.block_size)

    def task() -> Result:
        count = max(config.show, 1)
        pairs = next_tokens(loaded.model, ids, tokenizer.vocab_size, loaded.runtime, count)
        rows = [{"token": tokenizer.decode([i]), "id": i, "probability": prob} for i, prob in pairs]
        return {"prompt": prompt, "tokens": rows}

    return task


TASKS = {
    "loss": loss_task,
    "hellaswag": multiple_choice_task,
    "choice": multiple_choice_task,
    "accuracy": exact_match_task,
    "next": next_token_task,
}


def result_table(results: dict[str, Result]) -> str:
    """The results of all tasks as a table, one value per line."""
    rows = [(name, *row) for name, result in results.items() for row in result_rows(result)]
    width = max(len(what) for _, what, _ in rows)
    return "\n".join(f"{name:10} {what:{width}}  {value}" for name, what, value in rows)


def result_rows(result: Result) -> list[tuple[str, str]]:
    """The names of a task's values, and the values as text."""
    if "prompt" in result:
        return [(repr(row["token"]), f"{100 * row['probability']:.2f} %") for row in result["tokens"]]
    if "exact" in result:
        exact = f"{100 * result['exact']:.1f} % ({result['right']} of {result['lines']})"
        wrong = [
            f"{one['prompt']} got {one['given'] or 'nothing'}, expected {one['right']}"
            for one in result["wrong"]
        ]
        return [("exact", exact), *(("wrong", line) for line in wrong)]
    rows = []
    for what, value in result.items():
        if isinstance(value, dict):
            rows += [(f"{what} {key}", f"{level:.4f}") for key, level in value.items()]
        elif what != "seconds":
            rows.append((what, f"{value:.4f}" if isinstance(value, float) else f"{value:,}"))
    return rows
