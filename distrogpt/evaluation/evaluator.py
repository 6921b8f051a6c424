"""The evaluations of train.py: losses and, if configured, HellaSwag, exact match and samples."""

import logging
from dataclasses import replace

import numpy as np
import torch

from distrogpt.data.dataset import Dataset, evaluation_windows, measured_splits, to_xy
from distrogpt.data.token_stream import TokenStream
from distrogpt.data.tokenizer import encode_prompt, keep_ends, tokenizer_of
from distrogpt.errors import UserError
from distrogpt.evaluation.batches import EvaluationStopped, StopCheck
from distrogpt.evaluation.exact_match import answer_problems, load_problems
from distrogpt.evaluation.loss import Losses, mean_losses
from distrogpt.evaluation.multiple_choice import answer_multiple_choice, load_questions
from distrogpt.inference.decoder import stream
from distrogpt.inference.sampler import read_prompt
from distrogpt.inference.sampling import SamplingParams, uniform_noise
from distrogpt.runtime import Runtime, activity, progress_bar
from distrogpt.settings import TrainConfig
from model import GPT

log = logging.getLogger("distrogpt")


class Evaluator:
    """Evaluates a model during training. The best checkpoint has the lowest loss on the split `monitor`.
    `error` is set if this rank's data files changed during the run."""

    def __init__(self, config: TrainConfig, data: Dataset, runtime: Runtime) -> None:
        """Raises UserError if something that the settings need is missing."""
        self.config, self.data, self.runtime = config, data, runtime
        self.monitor = measured_splits(config)[-1]
        self.error: UserError | None = None
        # ranks share the questions and lines; but if the weights are sharded, each rank has to answer all
        self.task_runtime = replace(runtime, rank=0, world_size=1) if config.shard else runtime
        if config.eval_hellaswag or config.eval_samples:
            if config.eval_hellaswag and not data.meta["tokenizer"]:
                advice = "prepare it again with this repository, or leave out --eval_hellaswag"
                raise UserError(f"the dataset has no tokenizer, which HellaSwag needs; {advice}")
            self.tokenizer = tokenizer_of(data.meta)
        if config.eval_hellaswag:
            file, sizes = config.hellaswag_input, (config.block_size, config.hellaswag_items)
            flag = "--hellaswag_input=FILE"
            self.questions = load_questions(file, flag, self.tokenizer, *sizes, runtime)
        if config.eval_accuracy:
            if data.separator is None:
                advice = "set it, for example --loss_after='='"
                raise UserError(f"eval_accuracy needs loss_after, which ends the prompt of a line; {advice}")
            if "val" not in data.parts[0].streams:
                raise UserError("eval_accuracy reads val, which eval_splits=train excludes; remove one")
            self.problems = load_problems(data, config.block_size)
        if config.eval_samples:
            self.sample_start = read_prompt(config.sample_start, "the sample_start file")
            prompt = {"sample_start": encode_prompt(self.tokenizer, self.sample_start)}
            (self.prompt,) = keep_ends(prompt, config.block_size, log.info)

    def evaluate(self, model: GPT, stop_requested: StopCheck = lambda: False) -> Losses | None:
        """Losses and, if configured, hellaswag (acc_norm) and accuracy from 0 to 1; None on all ranks if one
        requests a stop or finds that its data changed. Raises UserError if no token counts for the loss."""
        model.eval()
        try:
            splits = measured_splits(self.config)
            parts = {split: self.part_losses(model, split, stop_requested) for split in splits}
            results = mean_losses(self.data, {split: [loss for loss, _ in parts[split]] for split in splits})
            if hasattr(model, "unshard"):  # tasks call other methods than forward
                model.unshard()
            results |= self.accuracies(model, lambda: self.runtime.all_reduce_sum(stop_requested())[0] > 0)
        except EvaluationStopped:
            results = None
        if hasattr(model, "unshard"):
            model.reshard()
        model.train()
        return results

    def part_losses(
        self, model: GPT, split: str, stop_requested: StopCheck = lambda: False, stride: int | None = None
    ) -> list[tuple[float, int]]:
        """The mean loss in nats of each part of a split, and its number of targets. With a stride,
        overlapping windows that many tokens apart cover the whole split. Raises EvaluationStopped and
        UserError."""
        results = []
        for number, part in enumerate(self.data.parts):
            windows = evaluation_windows(part, number, split, self.config, self.runtime.world_size, stride)
            loss_sum, count = self.summed_loss(model, part.streams[split], *windows, stop_requested)
            if not count:
                separator, advice = f"the separator {self.config.loss_after!r}", "choose another separator"
                raise UserError(f"{part.name}: {split} has no tokens after {separator}; {advice}")
            results.append((loss_sum / count, int(count)))
        return results

    @torch.no_grad()
    def summed_loss(
        self, model: GPT, tokens: TokenStream, starts: np.ndarray, skip: np.ndarray, stop_requested: StopCheck
    ) -> tuple[float, float]:
        """The sum of the losses over the windows that start at starts (N,), and the number of targets. The
        first skip (N,) targets of each window do not count. The batches are distributed over the ranks."""
        B, T, runtime = self.config.batch_size, self.config.block_size, self.runtime
        firsts = range(runtime.rank * B, len(starts), runtime.world_size * B)
        sums = torch.zeros(len(firsts), 2, device=runtime.device)  # loss and number of targets of each batch
        with progress_bar(0, len(firsts), runtime, " batches", f"evaluating {tokens.name}") as advance:
            for i, first in enumerate(firsts):
                try:
                    windows = tokens.windows(starts[first : first + B], T + 1)  # (B, T + 1)
                except UserError as error:
                    self.error = error
                if runtime.all_reduce_sum(self.error is not None or stop_requested())[0]:
                    raise EvaluationStopped(str(self.error or "another rank stopped; see its message"))
                counted = np.arange(T) >= skip[first : first + B, None]  # (B, T)
                loss_mask = self.data.loss_mask(windows)
                x, y = to_xy(windows, counted if loss_mask is None else counted & loss_mask, runtime)
                with runtime.autocast():
                    _, loss = model(x, y, return_logits=False)
                count = (y >= 0).sum()
                sums[i, 0] = torch.where(count > 0, loss.float() * count, 0.0)  # the mean of no losses is nan
                sums[i, 1] = count
                advance()
        return tuple(runtime.all_reduce_sum(*sums.cpu().double().sum(dim=0).tolist()))

    def accuracies(self, model: GPT, stop_requested: StopCheck) -> dict[str, float]:
        """hellaswag and accuracy; `stop_requested` has to return the same on all ranks."""
        runtime, B, results = self.task_runtime, self.config.batch_size, {}
        if self.config.eval_hellaswag:
            chosen = answer_multiple_choice(model, self.questions, runtime, B, stop_requested)
            labels = [question.label for question in self.questions]
            results["hellaswag"] = float(np.mean(chosen[:, 1] == labels))
        if self.config.eval_accuracy:
            answers = answer_problems(model, self.data, self.problems, runtime, 4 * B, stop_requested)
            right = [answer == problem.answer for answer, problem in zip(answers, self.problems, strict=True)]
            results["accuracy"] = float(np.mean(right))
        if self.config.eval_samples:
            self.log_samples(model)
        return results

    @activity("sampling")
    def log_samples(self, model: GPT) -> None:
        """Log eval_samples texts that begin with sample_start, with the same random numbers at each
        evaluation."""
        config, n = self.config, self.config.eval_samples
        uniforms = uniform_noise(config.seed, n, config.sample_tokens)
        prompts, vocab_size = [torch.tensor(self.prompt)], self.data.meta["vocab_size"]
        with self.runtime.autocast():
            steps = stream(model, prompts, SamplingParams(0.8, 200), uniforms, vocab_size, graph=False)
            ids = torch.cat([step.ids for step in steps], dim=1)  # (n, sample_tokens)
        for number, row in enumerate(ids.tolist(), 1):
            log.info(f"sample {number}: {self.sample_start}{self.tokenizer.decode(row)}")
