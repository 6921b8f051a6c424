"""The micro-batches of a training step."""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from distrogpt.data.dataset import Dataset, step_windows, to_xy
from distrogpt.errors import UserError
from distrogpt.runtime import Runtime
from distrogpt.settings import TrainConfig

TOKENS_AT_ONCE, STEPS_AT_ONCE = 8192, 16  # read ahead at most


class MicroBatch(NamedTuple):
    x: torch.Tensor  # (B, T)
    y: torch.Tensor  # (B, T)
    dropout_seed: int
    weight: float = 1.0  # in the step's loss: its share of the targets that count, times the micro-steps


def step_batches(data: Dataset, config: TrainConfig, runtime: Runtime, step: int) -> list[MicroBatch]:
    """This rank's micro-batches of a step, whose samples are drawn as one set, by seed and step alone. Raises
    UserError if the data changed, or if a micro-batch has no target that counts."""
    B, T, micro_steps = config.batch_size, config.block_size, config.gradient_accumulation_steps
    parts, starts = (array.reshape(micro_steps, B) for array in step_windows(data, config, step))
    mine = range(runtime.rank, micro_steps, runtime.world_size)
    needed = mine if data.separator is None else range(micro_steps)  # weights need all masks
    windows = {i: data.windows("train", parts[i], starts[i], T + 1) for i in needed}
    masks = {i: data.loss_mask(ids) for i, ids in windows.items()}
    weights = np.ones(micro_steps)
    if data.separator is not None:
        counts = np.array([mask.sum() for mask in masks.values()])
        if not counts.all():
            reason = f"a micro-batch has no tokens after loss_after={config.loss_after} to learn from"
            raise UserError(f"{reason}; raise batch_size, or choose another loss_after")
        weights = counts / counts.mean()
    batches = []
    for i in mine:
        seed = np.random.SeedSequence((config.seed, step, i)).generate_state(1, np.uint64)
        batches.append(MicroBatch(*to_xy(windows[i], masks[i], runtime), int(seed[0]), float(weights[i])))
    return batches


class BatchLoader:
    """This rank's micro-batches, step by step: an iteration yields those of a step, then reads the next ones
    while a GPU is still computing. `error` is set if that fails, so that all ranks can stop together.

    Small batches are read for several steps at once: between two small steps, Python's own code is no longer
    in the caches, and reading takes 0.5 ms instead of 0.05."""

    def __init__(self, data: Dataset, config: TrainConfig, runtime: Runtime, step: int) -> None:
        self.data, self.config, self.runtime, self.step = data, config, runtime, step
        self.error: UserError | None = None
        self.current = [] if config.eval_only else step_batches(data, config, runtime, step)
        self.ahead: deque[list[MicroBatch]] = deque()  # those of the steps after it
        tokens = len(self.current) * config.batch_size * config.block_size
        self.read_at_once = min(max(1, TOKENS_AT_ONCE // max(1, tokens)), STEPS_AT_ONCE)

    def __len__(self) -> int:
        return len(self.current)

    def __iter__(self) -> Iterator[MicroBatch]:
        yield from self.current
        self.step += 1
        if not self.ahead:
            self.read_ahead()
        if self.ahead:
            self.current = self.ahead.popleft()

    def read_ahead(self) -> None:
        """Read the batches of this step and those after it; sets `error` if that of this step fails."""
        for step in range(self.step, self.step + self.read_at_once):
            try:
                self.ahead.append(step_batches(self.data, self.config, self.runtime, step))
            except UserError as error:
                if not self.ahead:
                    self.error = error
                return
