"""What train.py measures at an evaluation: losses, and as configured HellaSwag, exact answers, samples."""

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from distrogpt.data.dataset import Dataset, evaluation_windows, measured_splits
from distrogpt.data.tokenizer import encode_prompt, from_description
from distrogpt.errors import UserError
from distrogpt.evaluation.loss import EvalWindows, Losses, mean_losses, never, summed_loss
from distrogpt.evaluation.tasks import answers, check_lengths, choices, held_out_lines, open_questions
from distrogpt.inference.decoder import stream
from distrogpt.inference.sampling import SamplingParams, uniform_noise
from distrogpt.runtime import Runtime
from distrogpt.settings import TrainConfig
from model import GPT

log = logging.getLogger("distrogpt")


class Evaluator:
    """Measures a model during training.

    `monitor` is the split whose loss chooses the best checkpoint. `error` is set if this rank finds that its
    data changed under the run; `evaluate` then returns None on all ranks, so that they stop together.
    """

    def __init__(self, config: TrainConfig, data: Dataset, runtime: Runtime) -> None:
        """Raises UserError if something that the settings ask for is missing."""
        self.config, self.data, self.runtime = config, data, runtime
        self.monitor = measured_splits(config)[-1]
        self.error: UserError | None = None
        # the ranks share questions and lines; with sharded weights, they have to call the model equally often
        self.task_runtime = replace(runtime, rank=0, world_size=1) if config.shard else runtime
        if config.eval_hellaswag or config.eval_samples:
            if not data.meta["tokenizer"]:
                raise UserError("the dataset names no tokenizer, so nothing can be asked; prepare it here")
            self.tokenizer = from_description(data.meta["tokenizer"])
        if config.eval_hellaswag:
            sizes = (config.block_size, config.hellaswag_items)
            self.questions = open_questions(config.hellaswag_input, self.tokenizer, *sizes, runtime)
        if config.eval_accuracy:
            if data.separator is None:
                raise UserError("eval_accuracy asks val's lines up to loss_after; give --loss_after='=', say")
            if "val" not in data.parts[0].streams:
                raise UserError(
                    "eval_accuracy asks val's lines, eval_splits=train reads none; leave one of them out"
                )
            self.problems = held_out_lines(data)
            check_lengths(self.problems, config.block_size, config.loss_after)
        if config.eval_samples:
            self.prompt = encode_prompt(self.tokenizer, config.sample_start)
            check_lengths([(self.prompt, [])], config.block_size, "")

    def evaluate(self, model: GPT, stop_requested: Callable[[], bool] = never) -> Losses | None:
        """Losses and, if configured, hellaswag (acc_norm) and accuracy, between 0 and 1; samples are logged.

        Returns None on all ranks if one of them requests a stop or finds that its data changed. Raises
        UserError if no target counts. Leaves the model in training mode.
        """
        model.eval()
        results = self.losses(model, stop_requested)
        if results is not None:
            if isinstance(model, FSDPModule):  # the tasks call hidden_states and logits, not forward
                model.unshard()
            scores = self.scores(model, lambda: self.runtime.all_reduce_sum(stop_requested())[0] > 0)
            results = None if scores is None else results | scores
            if isinstance(model, FSDPModule):
                model.reshard()
        model.train()
        return results

    def losses(self, model: GPT, stop_requested: Callable[[], bool]) -> Losses | None:
        """Mean loss per token of each measured split, in nats; of a mixture, weighted as its parts are."""
        config = self.config
        losses: dict[str, list[float]] = {split: [] for split in measured_splits(config)}
        for number, part in enumerate(self.data.parts):
            for split, split_losses in losses.items():
                starts, skip = evaluation_windows(part, number, split, config, self.runtime.world_size)
                sizes = (config.batch_size, config.block_size)
                windows = EvalWindows(part.streams[split], starts, skip, *sizes)
                try:
                    result = summed_loss(model, self.data, windows, self.runtime, stop_requested)
                except UserError as error:
                    self.error, result = error, None
                if result is None:
                    return None
                loss_sum, count = result
                if not count:
                    raise UserError(
                        f"{part.name}: no target of {split} stands after loss_after={config.loss_after}; "
                        "choose another"
                    )
                split_losses.append(loss_sum / count)
        return mean_losses(self.data, losses)

    def scores(self, model: GPT, stop_requested: Callable[[], bool]) -> dict[str, float] | None:
        """hellaswag and accuracy. `stop_requested` has to return the same on all ranks."""
        config, scores = self.config, {}
        if config.eval_hellaswag:
            chosen = choices(model, self.questions, self.task_runtime, config.batch_size, stop_requested)
            if chosen is None:
                return None
            labels = [question.label for question in self.questions]
            scores["hellaswag"] = float(np.mean(chosen[:, 1] == labels))
        if config.eval_accuracy:
            newline, vocab_size, B = self.data.newline, self.data.meta["vocab_size"], 4 * config.batch_size
            given = answers(model, self.problems, newline, vocab_size, self.task_runtime, B, stop_requested)
            if given is None:
                return None
            scores["accuracy"] = float(np.mean([answer.given == answer.right for answer in given]))
        if config.eval_samples:
            self.log_samples(model)
        return scores

    def log_samples(self, model: GPT) -> None:
        """Log eval_samples texts that begin with sample_start, drawn alike at each evaluation."""
        config, n = self.config, self.config.eval_samples
        uniforms = uniform_noise(config.seed, n, config.sample_tokens)
        prompts, vocab_size = [torch.tensor(self.prompt)], self.data.meta["vocab_size"]
        with self.runtime.autocast():
            steps = stream(model, prompts, SamplingParams(0.8, 200), uniforms, vocab_size, graph=False)
            ids = torch.cat([step.ids for step in steps], dim=1)  # (n, sample_tokens)
        for number, row in enumerate(ids.tolist(), 1):
            log.info(f"sample {number}: {config.sample_start}{self.tokenizer.decode(row)}")
