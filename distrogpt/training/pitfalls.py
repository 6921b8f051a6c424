"""Settings that are valid, but with which a run learns or measures nothing, and says nothing of it."""

from distrogpt.data.dataset import Dataset
from distrogpt.settings import TrainConfig
from distrogpt.training.optim import get_lr

FEW_TARGETS = 1000  # of which the mean loss is off by some hundredths, by chance alone


def pitfalls(config: TrainConfig, data: Dataset) -> list[str]:
    """A line for each, with what to do."""
    if config.eval_only:
        new = config.init_from == "scratch"
        return ["eval_only measures a new network, not out_dir's; add --init_from=resume"] if new else []
    if config.max_iters == 0:
        return ["max_iters=0 trains nothing"]
    if config.max_iters < 10:  # a try, which learns nothing anyway
        return of_the_data(config, data)
    return [*of_the_schedule(config), *of_evaluations(config), *of_the_data(config, data)]


def of_the_schedule(config: TrainConfig) -> list[str]:
    """What is wrong with the learning rate, if anything is."""
    steps, warmup, peak = config.max_iters, config.warmup_iters, config.learning_rate
    found = []
    if peak < 1e-7:
        found.append(f"learning_rate={peak:g} changes next to nothing; 1e-4 to 1e-3 is usual")
    if peak * config.weight_decay > 0.5:
        found.append(
            f"weight_decay={config.weight_decay:g} takes away most of a weight at each step; lower it"
        )
    if not config.decay_lr:
        return found
    end = steps if config.lr_decay_iters is None else config.lr_decay_iters
    min_lr = peak / 10 if config.min_lr is None else config.min_lr
    last = f"the run's {steps} steps end at {get_lr(steps - 1, config) / peak:.0%} of learning_rate"
    if warmup >= steps:
        advice = f"set --warmup_iters={steps // 20}, or more steps"
        found.append(f"warmup_iters={warmup} is as long as the run: {last}; {advice}")
    elif warmup >= end:
        found.append(
            f"lr_decay_iters={end} is within the warm-up of {warmup} steps: no step has the full rate"
        )
    elif end > steps:
        found.append(
            f"lr_decay_iters={end} is beyond the run: {last}; --lr_decay_iters=None follows max_iters"
        )
    elif min_lr == 0 and end < steps:
        found.append(
            f"from step {end} on (lr_decay_iters), the rate is min_lr=0: nothing is learned any more"
        )
    elif config.lr_schedule == "wsd" and end - warmup < 0.9 * config.cooldown * end:
        found.append(
            f"cooldown={config.cooldown:g} begins within the warm-up of {warmup} steps; lower one of them"
        )
    if min_lr > peak:
        found.append(f"min_lr={min_lr:g} is above learning_rate={peak:g}: the rate rises to it; lower it")
    return found


def of_evaluations(config: TrainConfig) -> list[str]:
    """What is wrong with their number and size, if anything is."""
    steps, found = config.max_iters, []
    tenth = max(1, steps // 10)
    for name, effect in (
        ("eval_interval", "it is evaluated only at its start and end"),
        ("save_interval", "it is saved only after evaluations"),
        ("log_interval", "only its last step is logged"),
    ):
        interval = getattr(config, name)
        if interval is not None and interval > steps:
            found.append(
                f"{name}={interval} is longer than the run of {steps} steps: {effect}; set --{name}={tenth}"
            )
    evaluations = -(-steps // config.eval_interval)
    if config.patience is not None and config.patience >= evaluations:
        count = f"the run has {evaluations} after the first"
        found.append(
            f"patience={config.patience} evaluations cannot end it early: {count}; lower --eval_interval"
        )
    targets = config.eval_iters * config.batch_size * config.block_size
    if 0 < targets < FEW_TARGETS:
        found.append(
            f"eval_iters={config.eval_iters} measures {targets} tokens, mostly chance; raise it, or 0 for all"
        )
    return found


def of_the_data(config: TrainConfig, data: Dataset) -> list[str]:
    """What is wrong with the size of the splits, if anything is."""
    found = []
    for part in data.parts:
        stream = part.streams.get("val")
        if stream is not None and len(stream) < max(FEW_TARGETS, 4 * config.block_size):
            few = f"{part.folder} has {len(stream)} tokens of val"
            found.append(f"{few}: their loss says little, and chooses ckpt.pt; keep more text aside")
    tokens = sum(len(part.streams["train"]) for part in data.parts)
    step = config.gradient_accumulation_steps * config.batch_size * config.block_size
    if step > tokens and config.sampling != "lines":
        found.append(f"a step reads {step} tokens, more than the {tokens} there are; lower batch_size")
    return found
