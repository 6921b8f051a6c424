"""The micro-batches of a training step."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from distrogpt.data.dataset import Dataset, step_windows, to_xy
from distrogpt.errors import UserError
from distrogpt.runtime import Runtime
from distrogpt.settings import TrainConfig


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
    while a GPU is still computing. `error` is set if that fails, so that all ranks can stop together."""

    def __init__(self, data: Dataset, config: TrainConfig, runtime: Runtime, step: int) -> None:
        self.data, self.config, self.runtime, self.step = data, config, runtime, step
        self.error: UserError | None = None
        self.current = [] if config.eval_only else step_batches(data, config, runtime, step)

    def __len__(self) -> int:
        return len(self.current)

    def __iter__(self) -> Iterator[MicroBatch]:
        yield from self.current
        self.step += 1
        try:
            self.current = step_batches(self.data, self.config, self.runtime, self.step)
        except UserError as error:
            self.error = error
