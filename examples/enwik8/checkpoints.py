"""Checkpoints of a run that hold whatever happens: a process that is killed while it saves leaves the one before.

    runs/NAME/checkpoint-STEP     whole, by its name: what `accelerate` saves, and `Progress`
    runs/NAME/checkpoint.part     one that was being written, or deleted, when the process was stopped

A folder is written as checkpoint.part, brought to the disk, renamed, and only then those before it go.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from command_line import UsageError
from enwik8.config import Config, check_resumed, of_run
from enwik8.config_file import load_config
from enwik8.report import METRICS
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch.nn import Module

CONFIG = 'config.json'
PART = 'checkpoint.part'
WEIGHTS = 'model.safetensors'  # of what accelerate saves


class Progress:
    """What a training goes on from beside model, optimizer and scheduler: the steps taken, and the draw of batches."""

    def __init__(self, seed: int) -> None:
        self.step, self.generator = 0, torch.Generator().manual_seed(seed)
        self.curve: list[tuple[int, float]] = []  # of every report, the step and bits per byte over tokens

    def state_dict(self) -> dict[str, Any]:
        """Return what `accelerate` saves. The stream of the samples is in it too: old versions of it lose their own."""
        streams = {'batches': self.generator.get_state(), 'samples': torch.get_rng_state()}
        return {'step': self.step, 'curve': self.curve, **streams}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.step, self.curve[:] = state['step'], state.get('curve', [])
        self.generator.set_state(state['batches'])
        torch.set_rng_state(state['samples'])


def register(accelerator: Accelerator, progress: Progress) -> None:
    """Have checkpoints hold the progress, and weights by the names they have in one process, however many there are."""
    accelerator.register_for_checkpointing(progress)

    def bare_weights(models: list[Module], weights: list[dict[str, Any]], folder: str) -> None:
        weights[:] = [accelerator.unwrap_model(model).state_dict() for model in models]

    def bare_models(models: list[Module], folder: str) -> None:
        models[:] = [accelerator.unwrap_model(model) for model in models]

    accelerator.register_save_state_pre_hook(bare_weights)
    accelerator.register_load_state_pre_hook(bare_models)


def last_checkpoint(run: Path) -> Path | None:
    """Return the last whole checkpoint of a run."""
    return max(checkpoints(run), key=step_of, default=None)


def checkpoints(run: Path) -> list[Path]:
    """Return the whole checkpoints of a run."""
    return [path for path in run.glob('checkpoint-*') if re.fullmatch(r'checkpoint-\d+', path.name)]


def step_of(checkpoint: Path) -> int:
    """Return the step a checkpoint was made after."""
    return int(checkpoint.name.partition('-')[2])


def begin(accelerator: Accelerator, run: Path, config: Config, log: TextIO) -> None:
    """Go on from the last checkpoint of a run where that is wished, else start it afresh. Raises `UsageError`."""
    checkpoint = None
    if accelerator.is_main_process:
        checkpoint = last_checkpoint(run) if config.resume else None
        if checkpoint is not None:
            check_resumed(config, load_config(run / CONFIG), run)
        keep_only(checkpoint, run)
        cut_back(log, run / METRICS, 0 if checkpoint is None else step_of(checkpoint))
        write_whole(run / CONFIG, json.dumps(of_run(config), indent=2) + '\n')
    [checkpoint] = broadcast_object_list([checkpoint])
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))


def keep_only(kept: Path | None, run: Path) -> None:
    """Delete every other checkpoint of a run, the last one last, and what a process left that was killed."""
    for checkpoint in sorted(checkpoints(run), key=step_of):
        if checkpoint != kept:
            delete(checkpoint)
    shutil.rmtree(run / PART, ignore_errors=True)


def save(accelerator: Accelerator, run: Path, step: int) -> None:
    """Write the checkpoint of a step, in all processes together, then delete those before it. Raises `UsageError`."""
    part, is_writer = run / PART, accelerator.is_main_process
    with nothing_left_of(part):
        if is_writer:
            shutil.rmtree(part, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(part))
        accelerator.wait_for_everyone()
        if is_writer:
            for path in (*part.iterdir(), part):
                to_disk(path)
            os.rename(part, run / f'checkpoint-{step}')
            to_disk(run)
            keep_only(run / f'checkpoint-{step}', run)
    accelerator.wait_for_everyone()


@contextmanager
def nothing_left_of(part: Path) -> Iterator[None]:
    """Where the disk takes no more, free what was written, and say so in one line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's own of a full disk is a RuntimeError
        shutil.rmtree(part, ignore_errors=True)
        why = (isinstance(error, OSError) and error.strerror) or str(error).partition('\n')[0]
        raise UsageError(f'cannot write a checkpoint to {part.parent}: {why}') from error


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint, which is never half there under its own name."""
    part = checkpoint.with_name(PART)
    shutil.rmtree(part, ignore_errors=True)
    os.rename(checkpoint, part)
    shutil.rmtree(part, ignore_errors=True)


def to_disk(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole, or as it was before."""
    part = path.with_name(f'{path.name}.part')
    try:
        part.write_text(text)
        to_disk(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def cut_back(log: TextIO, path: Path, step: int) -> None:
    """Cut a log open for appending back to what a run had written of `step` steps; half a line at its end goes too."""
    size = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)['step'] > step or not line.endswith(b'\n'):
                break
        except (ValueError, TypeError, KeyError):
            break
        size += len(line)
    log.truncate(size)


def load_weights(model: Module, run: Path) -> int:
    """Give a model the weights of a run's last checkpoint, and return its step. Raises `UsageError`."""
    checkpoint = last_checkpoint(run)
    if checkpoint is None:
        raise UsageError(f'{run} holds no checkpoint')
    load_model(model, checkpoint / WEIGHTS)
    return step_of(checkpoint)
