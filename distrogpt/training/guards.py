"""Losses that jump."""

import logging

log = logging.getLogger("distrogpt")


class LossSpikeDetector:
    """Reports a loss far above those before it, at most once in `window` steps: by a tenth of their running
    mean, and by six times their usual distance from it."""

    def __init__(self, window: int = 50) -> None:
        self.window = window
        self.mean, self.distance, self.count = 0.0, 0.0, 0
        self.last_report: int | None = None

    def update(self, step: int, loss: float) -> None:
        above = loss - self.mean
        recently = self.last_report is not None and step < self.last_report + self.window
        if self.count >= self.window and above > max(0.1 * self.mean, 6 * self.distance) and not recently:
            self.last_report = step
            log.info(f"note     step {step}: the loss jumped to {loss:.4f}, where {self.mean:.4f} was usual")
        self.count += 1
        weight = max(1 / self.count, 0.02)  # of the newest loss; a plain mean at first
        self.mean += weight * above
        self.distance += weight * (abs(above) - self.distance)
