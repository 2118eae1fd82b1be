"""How a model goes on from the beginning of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from command_line import UsageError
from enwik8.sequences import to_batch
from torch.nn import Module


@torch.no_grad()
def continuations(model: Module, prompts: Sequence[bytes], length: int, step: int) -> list[bytes]:
    """Draw `length` bytes after each prompt, from a model that was trained for `step` steps. Raises `UsageError`."""
    device = next(model.parameters()).device
    batch = {name: t.to(device) for name, t in to_batch(prompts).items()}
    check_finite(model(**batch).item(), step)  # nobody can draw from probabilities that are nan
    generated = model.generate(batch['x'], length, prompt_lens=batch['lens'])  # (b, length)
    return [bytes(ids) for ids in generated.tolist()]


def check_finite(loss: float, step: int) -> None:
    """Raise `UsageError` where a training has gone astray."""
    if not math.isfinite(loss):
        raise UsageError(f'the loss is not finite at step {step}: --learning-rate may be too large')


def printable(text: bytes) -> str:
    """Decode bytes for a terminal."""
    decoded = text.decode(errors='replace')
    return ''.join(char if char.isprintable() or char == '\n' else '\N{REPLACEMENT CHARACTER}' for char in decoded)
