"""What watches over a run: reasons to end it early, losses that jump, a crowded machine."""

import math
from collections.abc import Callable

from distrogpt.data.dataset import measured_splits
from distrogpt.openmp import ThreadWaits
from distrogpt.settings import TrainConfig

Say = Callable[[str], None]


def early_stop_reason(config: TrainConfig, step: int, seconds: float, no_lower: int) -> str:
    """Why a run ends after a step that is not its last one, "" where it goes on or would end anyway: after so
    many seconds of training, and so many evaluations in a row without a lower loss."""
    if step >= config.max_iters:
        return ""
    if config.patience is not None and no_lower >= config.patience:
        return f"no lower {measured_splits(config)[-1]} loss in {no_lower} evaluation{'s' * (no_lower > 1)}"
    late = config.max_minutes is not None and seconds >= 60 * config.max_minutes
    return f"max_minutes={config.max_minutes:g} are over" if late else ""


def spike_watch(say: Say, after: int = 50) -> Callable[[int, float], None]:
    """Returns a function of a step and its loss that tells, once in `after` steps, of a loss far above those
    before it: by a tenth of their running mean and by six times their usual distance from it."""
    mean, distance, seen, told = 0.0, 0.0, 0, -math.inf

    def watch(step: int, loss: float) -> None:
        nonlocal mean, distance, seen, told
        above = loss - mean
        if seen >= after and above > max(0.1 * mean, 6 * distance) and step >= told + after:
            told = step
            say(f"note     step {step}: the loss jumped to {loss:.4f}, where {mean:.4f} was usual")
        seen += 1
        share = max(1 / seen, 0.02)  # of the newest one; a plain mean at first
        mean += share * above
        distance += share * (abs(above) - distance)

    return watch


def crowd_watch(waits: ThreadWaits, say: Say) -> Callable[[], None]:
    """Returns a function that says, once, that other programs use a CPU's cores."""
    said = False

    def watch() -> None:
        nonlocal said
        if waits.sleeping and not said:
            said = True
            say("note     other programs use the cores: steps take longer, and threads sleep while they wait")

    return watch
