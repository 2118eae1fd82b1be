"""How a model goes on from the beginning of a text."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from command_line import UsageError, judge
from enwik8.checkpoints import CONFIG, load_weights
from enwik8.config import Config
from enwik8.config_file import load_config
from enwik8.model import build_model
from enwik8.sequences import to_batch
from torch.nn import Module

PROMPT = 32  # bytes


def generate(config: Config) -> None:
    """Print how the model of a run goes on from a prompt. Raises `UsageError`."""
    judge(config)
    prompt, run = os.fsencode(config.prompt or ''), Path(config.generate_from)
    if not prompt:
        raise UsageError('--generate-from wants a --prompt of at least one byte')
    began = load_config(run / CONFIG)
    model = build_model(began)
    step = load_weights(model, run)
    torch.manual_seed(config.seed)
    [text] = continuations(model, [prompt], config.generate_length or began.generate_length, step)
    print(printable(prompt + text))


def sample(model: Module, held_out: Sequence[bytes], length: int, step: int) -> str:
    """Return how the model goes on from the beginnings of three held-out sequences. Raises `UsageError`."""
    prompts = [sequence[:PROMPT] for sequence in held_out[:3]]
    drawn = continuations(model, prompts, length, step)
    return '\n'.join(
        f'{"-" * 30}\n{printable(prompt)} >>> {printable(text)}' for prompt, text in zip(prompts, drawn, strict=True)
    )


@torch.no_grad()
def continuations(model: Module, prompts: Sequence[bytes], length: int, step: int) -> list[bytes]:
    """Draw `length` bytes after each prompt, from a model that was trained for `step` steps. Raises `UsageError`."""
    batch = send_to_device(to_batch(prompts), next(model.parameters()).device)
    check_finite(model(**batch).item(), step)  # nobody can draw from probabilities that are nan
    generated = model.generate(batch['x'], length, prompt_lens=batch['lens'])  # (b, length)
    return [bytes(ids) for ids in generated.tolist()]


class Diverged(UsageError):
    """A training has gone astray."""


def check_finite(loss: float, step: int) -> None:
    """Raise `Diverged` where a training has gone astray."""
    if not math.isfinite(loss):
        raise Diverged(f'the loss is not finite at step {step}: --learning-rate may be too large')


def printable(text: bytes) -> str:
    """Decode bytes for a terminal."""
    decoded = text.decode(errors='replace')
    return ''.join(char if char.isprintable() or char == '\n' else '\N{REPLACEMENT CHARACTER}' for char in decoded)
