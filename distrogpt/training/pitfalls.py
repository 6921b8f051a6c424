"""Valid settings with which a run would silently learn or measure nothing."""

from distrogpt.data.dataset import Dataset
from distrogpt.settings import TrainConfig
from distrogpt.training.schedule import get_lr

FEW_TARGETS = 1000  # the mean loss of fewer is off by several hundredths, by chance


def pitfalls(config: TrainConfig, data: Dataset) -> list[str]:
    """A line for each problem, with what to do."""
    if config.eval_only:
        new = config.init_from == "scratch"
        untrained = "eval_only evaluates a new, untrained model, not out_dir's; add --init_from=resume"
        return [untrained] if new else []
    if config.max_iters == 0:
        return ["max_iters=0 trains nothing"]
    if config.max_iters < 10:  # a short test, which learns nothing anyway
        return of_the_data(config, data)
    return [*of_the_schedule(config), *of_evaluations(config), *of_the_data(config, data)]


def of_the_schedule(config: TrainConfig) -> list[str]:
    """What is wrong with the learning rate, if anything is."""
    steps, warmup, peak = config.max_iters, config.warmup_iters, config.learning_rate
    found = []
    if peak < 1e-7:
        found.append(f"learning_rate={peak:g} hardly changes the weights; 1e-4 to 1e-3 is usual")
    if peak * config.weight_decay > 0.5:
        found.append(
            f"weight_decay={config.weight_decay:g} removes more than half of each weight per step; lower it"
        )
    if not config.decay_lr or config.max_minutes is not None:  # the schedule is fitted to the time
        return found
    end = steps if config.lr_decay_iters is None else config.lr_decay_iters
    min_lr = peak / 10 if config.min_lr is None else config.min_lr
    last = f"its last step has {get_lr(steps - 1, config) / peak:.0%} of learning_rate"
    if warmup >= steps:
        advice = f"set --warmup_iters={steps // 20}, or train longer"
        found.append(f"warmup_iters={warmup} does not end within the run of {steps} steps: {last}; {advice}")
    elif warmup >= end:
        found.append(
            f"lr_decay_iters={end} is within warmup_iters={warmup}: no step has the full rate; raise it"
        )
    elif end > steps:
        found.append(
            f"lr_decay_iters={end} is beyond the run of {steps} steps: {last}; set --lr_decay_iters=None"
        )
    elif min_lr == 0 and end < steps:
        found.append(
            f"min_lr=0 from step {end} (lr_decay_iters): later steps learn nothing; raise one of them"
        )
    elif config.lr_schedule == "wsd" and end - warmup < 0.9 * config.cooldown * end:
        found.append(f"cooldown={config.cooldown:g} begins within warmup_iters={warmup}; lower one of them")
    if min_lr > peak:
        found.append(f"min_lr={min_lr:g} is above learning_rate={peak:g}: the rate will rise; lower min_lr")
    return found


def of_evaluations(config: TrainConfig) -> list[str]:
    """What is wrong with their number and size, if anything is."""
    steps, found = config.max_iters, []
    tenth = max(1, steps // 10)
    for name, effect in (
        ("eval_interval", "it is evaluated only at the start and the end"),
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
        count = f"the run has only {evaluations} after the first"
        found.append(
            f"patience={config.patience} evaluations cannot stop it early: {count}; lower --eval_interval"
        )
    targets = config.eval_iters * config.batch_size * config.block_size
    if 0 < targets < FEW_TARGETS:
        found.append(
            f"eval_iters={config.eval_iters}: the loss of {targets} tokens is noisy; raise it, or set it to 0"
        )
    return found


def of_the_data(config: TrainConfig, data: Dataset) -> list[str]:
    """What is wrong with the size of the splits, if anything is."""
    found = []
    for part in data.parts:
        stream = part.streams.get("val")
        if stream is not None and len(stream) < max(FEW_TARGETS, 4 * config.block_size):
            few = f"{part.folder} has only {len(stream)} val tokens"
            found.append(f"{few}: their loss, which chooses ckpt.pt, is mostly noise; use more text for val")
    tokens = sum(len(part.streams["train"]) for part in data.parts)
    step = config.gradient_accumulation_steps * config.batch_size * config.block_size
    if step > tokens and config.sampling != "lines":
        found.append(f"a step reads {step:,} tokens, more than train's {tokens:,}; lower batch_size")
    return found
