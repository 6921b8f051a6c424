"""The tasks of eval.py: NAME_task checks what its task needs, and returns a function that computes it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from distrogpt.data.dataset import Dataset, open_dataset
from distrogpt.data.meta import GPT2_META, other_tokenizer
from distrogpt.data.tokenizer import Tokenizer, ids_of_prompt
from distrogpt.errors import UserError
from distrogpt.evaluation.evaluator import Evaluator
from distrogpt.evaluation.exact_match import answer_problems, check_prompt_length, load_problems
from distrogpt.evaluation.introspection import next_tokens
from distrogpt.evaluation.loss import mean_losses
from distrogpt.evaluation.multiple_choice import GPT2_HELLASWAG, answer_multiple_choice, load_questions
from distrogpt.inference.sampler import read_prompt
from distrogpt.loading import find_tokenizer, load_trained
from distrogpt.runtime import Runtime
from distrogpt.settings import EVAL_TASKS, EvalConfig, TrainConfig
from model import GPT

Result = dict[str, Any]
Task = Callable[[], Result]


class LoadedModel(NamedTuple):
    """A trained model on its device, and what is known about it."""

    model: GPT
    tokenizer: Tokenizer | None  # None if no task needs one
    contents: dict[str, Any]  # of its checkpoint, {} if it has none
    source: str
    runtime: Runtime

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of its training, {} if unknown."""
        return self.contents.get("config", {})

    @property
    def block_size(self) -> int:
        return self.model.config.block_size


def load_tasks(config: EvalConfig, runtime: Runtime) -> tuple[str, dict[str, Task]]:
    """What the model is called, and the tasks that the settings name, checked. Raises UserError."""
    model, contents, source = load_trained(config.out_dir, config.init_from)
    names = task_names(config, contents.get("config", {}))
    tokenizer = None
    if names != ["loss"]:  # the loss needs no tokenizer
        tokenizer = find_tokenizer(contents, model.config.vocab_size, source)
    loaded = LoadedModel(model.to(runtime.device).eval(), tokenizer, contents, source, runtime)
    return source, {name: TASKS[name](config, loaded, name) for name in names}


def task_names(config: EvalConfig, settings: dict[str, Any]) -> list[str]:
    """The names in `tasks`; auto depends on the settings of the training. Raises UserError."""
    if config.tasks == "auto":
        return ["accuracy" if settings.get("loss_after") else "loss"]
    names = [name.strip() for name in config.tasks.split(",") if name.strip()] or [config.tasks]
    for name in names:
        if name not in EVAL_TASKS:
            raise UserError(f"tasks={name[:40]} is not known; name some of {', '.join(EVAL_TASKS)}, by comma")
    return list(dict.fromkeys(names))


def open_eval_data(config: EvalConfig, loaded: LoadedModel, **settings: Any) -> tuple[Dataset, TrainConfig]:
    """The dataset that the settings name, or else the one of the training, and how it is read. UserError."""
    dataset = config.dataset or loaded.settings.get("dataset")
    if not dataset:
        raise UserError(f"{loaded.source} names no dataset; give --dataset=NAME")
    train_config = TrainConfig(dataset=dataset, eval_iters=0, eval_splits=config.split, **settings)
    data = open_dataset(train_config, (config.split,))
    if loaded.contents:
        tokenizer = loaded.contents.get("meta", data.meta)["tokenizer"]
    else:
        tokenizer = GPT2_META["tokenizer"]
    if other_tokenizer(tokenizer, data.meta["tokenizer"]):
        raise UserError(f"{loaded.source} has another tokenizer than {dataset}; use a dataset of its own")
    if data.meta["vocab_size"] > loaded.model.config.vocab_size:
        raise UserError(f"{dataset} has more tokens than {loaded.source} knows; use a dataset of its own")
    return data, train_config


def loss_task(config: EvalConfig, loaded: LoadedModel, name: str) -> Task:
    """Loss, perplexity and bits per byte of a split. Each token but the first is a target once; if the
    training sampled lines, its own evaluation windows are read."""
    settings = {"loss_after": loaded.settings.get("loss_after"), "batch_size": config.batch_size or 16}
    T, stride = config.block_size or loaded.block_size, config.stride
    if T > loaded.block_size:
        raise UserError(f"block_size={T} is longer than the model reads; give {loaded.block_size} or less")
    if loaded.settings.get("sampling") == "lines":
        settings["sampling"] = "lines"
        if stride:
            raise UserError("stride is for text; this run's windows begin with lines: leave it out")
    if stride and stride > T:
        raise UserError(f"stride={stride} is longer than a window of {T} tokens; give {T} or less")
    data, train_config = open_eval_data(config, loaded, block_size=T, **settings)
    evaluator = Evaluator(train_config, data, loaded.runtime)

    def task() -> Result:
        parts = evaluator.part_losses(loaded.model, config.split, stride=stride)
        if parts is None:
            raise evaluator.error or UserError("another rank cannot read its data; see its error")
        means = mean_losses(data, {config.split: [loss for loss, _ in parts]}, config.split)
        loss, tokens = means.pop(config.split), sum(count for _, count in parts)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700)), **means, "tokens": tokens}

    return task


def multiple_choice_task(config: EvalConfig, loaded: LoadedModel, name: str) -> Task:
    """How often the most likely ending is the right one, by the sum (acc) and by the mean (acc_norm) of the
    log-probabilities of its tokens."""
    if name == "choice" and not config.input:
        raise UserError("choice reads a file; give --input=FILE, or --tasks=hellaswag")
    runtime = loaded.runtime
    questions = load_questions(config.input, loaded.tokenizer, loaded.block_size, config.max_items, runtime)

    def task() -> Result:
        chosen = answer_multiple_choice(loaded.model, questions, runtime, config.batch_size or 16)
        right = chosen == [[question.label] for question in questions]  # (N, 2)
        acc, acc_norm = right.mean(axis=0).tolist()
        result = {"acc": acc, "acc_norm": acc_norm, "questions": len(questions)}
        if name == "hellaswag" and config.init_from in GPT2_HELLASWAG:
            acc, acc_norm = GPT2_HELLASWAG[config.init_from]
            result["published"] = {"acc": acc, "acc_norm": acc_norm}
        return result

    return task


def exact_match_task(config: EvalConfig, loaded: LoadedModel, name: str) -> Task:
    """How many held-out lines are answered exactly; a prompt ends with the separator, its answer follows."""
    separator = config.separator or loaded.settings.get("loss_after") or "="
    data, _ = open_eval_data(config, loaded, block_size=1, loss_after=separator)
    problems = load_problems(data, loaded.block_size, config.split, config.max_items)

    def task() -> Result:
        answers = answer_problems(loaded.model, data, problems, loaded.runtime, config.batch_size or 256)
        pairs = zip(problems, answers, strict=True)
        wrong = [(*problem, answer) for problem, answer in pairs if answer != problem.answer]
        right, decode = len(problems) - len(wrong), loaded.tokenizer.decode
        shown = [
            {"prompt": decode(prompt), "given": decode(given), "right": decode(answer)}
            for prompt, answer, given in wrong[: config.show]
        ]
        return {"exact": right / len(problems), "right": right, "lines": len(problems), "wrong": shown}

    return task


def next_token_task(config: EvalConfig, loaded: LoadedModel, name: str) -> Task:
    """The most likely next tokens after a prompt."""
    prompt, tokenizer = read_prompt(config.start), loaded.tokenizer
    ids = ids_of_prompt(tokenizer, prompt)
    check_prompt_length(ids, loaded.block_size)

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
    """The results of all tasks, one value per line."""
    rows = [(name, what, value) for name, result in results.items() for what, value in result_rows(result)]
    width = max(len(what) for _, what, _ in rows)
    return "\n".join(f"{name:10} {what:{width}}  {value}" for name, what, value in rows)


def result_rows(result: Result) -> list[tuple[str, str]]:
    """The values of a result and their names, as texts."""
    if "prompt" in result:
        return [(repr(row["token"]), f"{100 * row['probability']:.2f} %") for row in result["tokens"]]
    if "exact" in result:
        exact = f"{100 * result['exact']:.1f} % ({result['right']} of {result['lines']})"
        wrong = [f"{one['prompt']}{one['given']}, not {one['right']}" for one in result["wrong"]]
        return [("exact", exact), *(("wrong", line) for line in wrong)]
    rows = []
    for what, value in result.items():
        if isinstance(value, dict):
            rows += [(f"{what} {key}", f"{level:.4f}") for key, level in value.items()]
        elif what != "seconds":
            rows.append((what, f"{value:.4f}" if isinstance(value, float) else f"{value:,}"))
    return rows
