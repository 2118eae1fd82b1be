"""Train a byte-level decoder on real text with any weighting of the loss, and see what it does at each length.

    python examples/train_enwik8.py                                   # token: every byte counts the same
    python examples/train_enwik8.py --equal-loss-weight-batch         # sequence: every line counts the same
    python examples/train_enwik8.py --layout packed                   # the same loss, no padding
    accelerate launch --multi_gpu examples/train_enwik8.py --preset base

    python examples/train_enwik8.py --resume --checkpoint-every 50    # goes on where it was stopped, however that was

A run leaves config.json, metrics.jsonl, loss_by_length.png and its last checkpoint in runs/NAME/.

b - sequences in a batch
n - positions
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

# read when torch is imported: threads that wait for one another sleep, where they would spin and hold up a busy machine
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import command_line  # noqa: F401  before any package: it says which one is missing
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from command_line import one_line_errors, open_log, say, writable_folder
from enwik8.checkpoints import CONFIG, Progress, begin, register, save
from enwik8.config import Config, check_tracker, of_run, resolve, run_name
from enwik8.config_file import load_config
from enwik8.model import build_model
from enwik8.report import METRICS, PICTURE, Row, costs, draw_by_length, report, reports_of, table
from enwik8.sampling import check_finite, generate, sample
from enwik8.schedule import fall, rate
from enwik8.sequences import Split, draw, source_of, split_text, to_batch
from enwik8.signals import Stopped, noticed_signals
from enwik8.text import read_text
from torch import Tensor
from torch.nn import Module
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm import tqdm

from xtloss import global_normalizer

Batch = dict[str, Tensor]  # what the wrapper's forward takes

MAX_GRAD_NORM = 0.5  # as upstream


class Training(NamedTuple):
    """What takes the steps, and how far it is."""

    accelerator: Accelerator
    model: Module
    forward: Callable[..., Tensor]  # the model, compiled where that is wished
    optimizer: Optimizer
    schedule: LRScheduler
    progress: Progress
    quiet: bool

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        if not self.quiet:
            say(line)


def prepare(config: Config, accelerator: Accelerator, quiet: bool) -> Training:
    """Build all that a training consists of."""
    torch.manual_seed(config.seed)
    model = build_model(config)
    optimizer = Adam(model.parameters(), lr=config.learning_rate)
    progress = Progress(config.seed)
    schedule = LambdaLR(optimizer, lambda step: rate(step, config, progress.curve))
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    register(accelerator, progress)
    forward = torch.compile(model) if config.compile else model
    return Training(accelerator, model, forward, optimizer, schedule, progress, quiet)


def micro_batches_of(step: Sequence[bytes], config: Config, accelerator: Accelerator) -> list[Batch]:
    """Return this process's share of the sequences of one optimizer step, as `grad_accum` batches, maybe empty ones."""
    share = step[accelerator.process_index :: accelerator.num_processes]
    parts = (share[index :: config.grad_accum] for index in range(config.grad_accum))
    return [send_to_device(to_batch(part, config.layout, config.seq_len + 1), accelerator.device) for part in parts]


def optimizer_step(training: Training, micro_batches: list[Batch]) -> tuple[float, float]:
    """Take one step on the loss of all micro-batches of all processes together.

    Returns that loss (nats, as weighted) and the norm of its gradient, before it is clipped.

    They share one normalizer, so the step is the same however its sequences are spread.
    """
    accelerator, model, forward, optimizer, schedule, *_ = training
    wrapper = accelerator.unwrap_model(model)
    normalizer = global_normalizer(sum(wrapper.loss_normalizer(**batch) for batch in micro_batches))
    total = torch.zeros((), device=accelerator.device)
    for index, batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            loss = forward(**batch, normalizer=normalizer)
            accelerator.backward(loss)
        total += loss.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return accelerator.reduce(total, 'mean').item(), float(norm)


def validate(training: Training, held_out: Sequence[bytes], config: Config) -> list[Row]:
    """Report on the held-out sequences; each process scores its share of the batches."""
    accelerator, model = training.accelerator, training.model
    batch_size = config.batch_size * config.grad_accum
    by_length = sorted(held_out, key=len)  # little padding
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    share = batches[accelerator.process_index :: accelerator.num_processes]
    bar = tqdm(share, desc='validation', leave=False, disable=training.quiet)
    model.eval()
    on_device = (send_to_device(to_batch(batch), accelerator.device) for batch in bar)
    found = list(costs(accelerator.unwrap_model(model), on_device))
    model.train()
    return report(gather_object(found), longest=config.seq_len + 1)


def take_steps(training: Training, split: Split, config: Config, log: Callable[..., None]) -> Iterator[int]:
    """Take the steps that are left; yield each when it is over, reported on as the options say."""
    accelerator, progress, quiet = training.accelerator, training.progress, training.quiet
    steps = range(progress.step + 1, fall(config, progress.curve)[1] + 1)
    reported = time.perf_counter()
    for step in (bar := tqdm(steps, 'training', total=config.steps, initial=progress.step, disable=quiet or not steps)):
        start = time.perf_counter()
        sequences = draw(split.train, config.batch_size * config.grad_accum, progress.generator)  # of all processes
        learning_rate = training.schedule.get_last_lr()[0]
        loss, norm = optimizer_step(training, micro_batches_of(sequences, config, accelerator))
        check_finite(loss, step)
        speed = round(sum(map(len, sequences)) / (time.perf_counter() - start))
        bar.set_postfix(loss=f'{loss:.3f}', tokens_per_second=f'{speed:,}', refresh=False)
        log(step=step, train_loss=loss, grad_norm=norm, learning_rate=learning_rate, tokens_per_second=speed)

        is_last = step == fall(config, progress.curve)[1]
        if is_last or step % config.validate_every == 0:
            rows = validate(training, split.held_out, config)
            over_tokens, over_sequences = rows[-1].over_tokens, rows[-1].over_sequences
            check_finite(over_tokens, step)
            progress.curve.append((step, over_tokens))
            is_last = step == fall(config, progress.curve)[1]  # it may be flat now
            seconds, reported = round(time.perf_counter() - reported, 3), time.perf_counter()
            log(step=step, bits_per_byte=[row._asdict() for row in rows], seconds=seconds)
            accelerator.log({'over_tokens': over_tokens, 'over_sequences': over_sequences}, step=step)
            training.say(
                f'step {step:,}: {over_tokens:.3f} bits per byte over tokens, {over_sequences:.3f} over sequences'
            )
        if not quiet and (is_last or step % config.generate_every == 0):
            training.say(sample(accelerator.unwrap_model(training.model), split.held_out, config.generate_length, step))
        progress.step = step
        yield step
        if is_last:
            break


def train(config: Config, *, on_step: Callable[[int], object] | None = None) -> None:
    """Run one training, from its options to its report; with `on_step`, tell of each step to that and print nothing."""
    check_tracker(config.tracker)
    on_cpu = not any(backend.is_available() for backend in (torch.cuda, torch.xpu, torch.backends.mps))
    accelerator = Accelerator(
        cpu=on_cpu,  # on CPU, it joins the processes of torchrun only when told so
        log_with=None if config.tracker == 'none' else config.tracker,
        project_dir='runs',
        step_scheduler_with_optimizer=False,  # it would take a step for each process
    )
    main = accelerator.is_main_process
    config = resolve(config, accelerator.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    training = prepare(config, accelerator, quiet=on_step is not None or not main)
    say, progress, signum = training.say, training.progress, 0
    say(f'preset {config.preset}, on {accelerator.device} x {accelerator.num_processes}')

    [source] = broadcast_object_list([source_of(config.data, config.sequences, say) if main else ''])
    split = split_text(read_text(source, config.max_bytes), config.sequences, config.seq_len + 1, config.held_out)
    config = replace(config, data=source, name=config.name or run_name(config, source))
    say(f'{source}: {len(split.train):,} {config.sequences} to train on, {len(split.held_out):,} held out')

    folder = Path('runs') / config.name
    with (
        open_log(writable_folder(folder) / METRICS) if main else open(os.devnull, 'w') as log_file,
        noticed_signals() as wish,
    ):
        begin(accelerator, folder, config, log_file)
        accelerator.init_trackers(config.name if config.tracker == 'tensorboard' else 'train_enwik8', of_run(config))
        if progress.step:
            say(f'{folder}: {progress.step:,} of {config.steps:,} steps are taken')

        def log(**record: Any) -> None:
            print(json.dumps(record), file=log_file, flush=True)
            accelerator.log({name: value for name, value in record.items() if isinstance(value, float)}, record['step'])

        for step in take_steps(training, split, config, log):
            signum = wish.of_any(accelerator)
            is_last = step == fall(config, progress.curve)[1]
            if is_last or signum or (config.checkpoint_every and step % config.checkpoint_every == 0):
                save(accelerator, folder, step)
            if on_step is not None:
                on_step(step)
            if signum:
                break

    is_finished = progress.step >= fall(config, progress.curve)[1]
    if main and is_finished:
        rows = reports_of(folder)[-1].rows
        draw_by_length({config.name: rows}, folder / PICTURE)
        say(f'\n{table(rows)}\n\n{folder}: {CONFIG}, {METRICS}, {PICTURE}')
    accelerator.wait_for_everyone()
    del training, say  # the last owner of a process group may hang
    accelerator.free_memory()
    accelerator.end_training()
    if not is_finished:
        raise Stopped(f'stopped after step {progress.step:,}: --resume goes on from {folder}', signum)


def main(args: Sequence[str] | None = None) -> None:
    """Do what the command line says; exit with 2 and one line where it, or the text, is no good."""
    with one_line_errors(Path(__file__).name):
        config = tyro.cli(Config, args=args)
        if config.config is not None:
            config = tyro.cli(Config, args=args, default=load_config(Path(config.config)))
        train(config) if config.generate_from is None else generate(config)


if __name__ == '__main__':
    main()
