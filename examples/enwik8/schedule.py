"""The learning rate of every step, and where a training ends that goes on until it is flat."""

from __future__ import annotations

import math
from collections.abc import Sequence

from enwik8.config import Config
from enwik8.over_seeds import slope

LEAST = 4  # reports in a second half, or one of them decides by its noise
FULL_PER_FALL = 4  # steps at the full learning rate for a step of the decay, where a training goes on until it is flat


def fall(config: Config, curve: Sequence[tuple[int, float]] = ()) -> tuple[int, int]:
    """Return the steps after which the learning rate begins to fall, and after which the training ends.

    `curve` holds what was reported so far: steps, and bits per byte over tokens. With `until_flat` the learning rate
    stays up until the slope of the second half of a curve is above -`until_flat` bits per 100 steps, and what decay
    there is takes a fifth of all steps, so that no run is compared before its learning rate fell.
    """
    if config.until_flat is None:
        return config.warmup_steps, config.steps
    decays = config.decay != 'none'
    latest = config.steps * FULL_PER_FALL // (FULL_PER_FALL + 1) if decays else config.steps
    for count, (step, _) in enumerate(curve, start=1):
        half = [(at / 100, bits) for at, bits in curve[:count] if at >= step / 2]
        is_late_enough = config.warmup_steps < step < latest and len(half) >= LEAST
        if is_late_enough and slope(half) > -config.until_flat:
            return step, step + (step // FULL_PER_FALL if decays else 0)
    return latest, config.steps


def rate(step: int, config: Config, curve: Sequence[tuple[int, float]] = ()) -> float:
    """Return the part of the learning rate that the step after `step` others takes."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    begin, end = fall(config, curve)
    decayed = max(0, step - begin) / max(1, end - begin)
    return {'none': 1.0, 'linear': 1 - decayed, 'cosine': (1 + math.cos(math.pi * decayed)) / 2}[config.decay]
