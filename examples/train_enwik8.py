"""Train a byte-level decoder on real text with any weighting of the loss, and see what it does at each length.

    python examples/train_enwik8.py                                   # token: every byte counts the same
    python examples/train_enwik8.py --equal-loss-weight-batch         # sequence: every line counts the same
    python examples/train_enwik8.py --layout packed                   # the same loss, no padding
    accelerate launch --multi_gpu examples/train_enwik8.py --preset base

A run leaves config.json, metrics.jsonl and loss_by_length.png in runs/NAME/.

b - sequences in a batch
n - positions
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# read when torch is imported: threads that wait for one another sleep, where they would spin and hold up a busy machine
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from command_line import UsageError, one_line_errors, open_log, writable_folder
from enwik8.config import Config, resolve, run_name
from enwik8.report import METRICS, PICTURE, Row, costs, draw_by_length, report, table
from enwik8.text import find_text, read_text
from torch import Tensor
from torch.nn import Module
from torch.optim import Adam, Optimizer
from tqdm import tqdm

with warnings.catch_warnings():
    warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated')  # x-transformers calls it when imported
    from enwik8.sequences import draw, split_text, to_batch
    from x_transformers import Decoder, TransformerWrapper

    from xtloss import AutoregressiveWrapper, global_normalizer

Batch = dict[str, Tensor]  # what the wrapper's forward takes

MAX_GRAD_NORM = 0.5  # as upstream
PROMPT = 32  # bytes


def build_model(config: Config) -> AutoregressiveWrapper:
    """Build the network and its loss. Raises `UsageError` for a weighting that is none."""
    net = TransformerWrapper(
        num_tokens=256,
        max_seq_len=config.seq_len,
        attn_layers=Decoder(
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            rotary_pos_emb=True,
            attn_flash=True,
            attn_orthog_projected_values=config.orthog_values,
            attn_orthog_projected_values_per_head=config.orthog_values,
            verbose=False,
        ),
    )
    try:
        return AutoregressiveWrapper(
            net,
            equal_loss_weight_batch=config.equal_loss_weight_batch,
            loss_weighting=config.loss_weighting,
            unpad=config.unpad,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def micro_batches_of(step: Sequence[bytes], config: Config, accelerator: Accelerator) -> list[Batch]:
    """Return this process's share of the sequences of one optimizer step, as `grad_accum` batches, maybe empty ones."""
    share = step[accelerator.process_index :: accelerator.num_processes]
    return [
        to_device(to_batch(share[index :: config.grad_accum], config.layout, config.seq_len + 1), accelerator.device)
        for index in range(config.grad_accum)
    ]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to a device."""
    return {name: t.to(device) for name, t in batch.items()}


def optimizer_step(accelerator: Accelerator, model: Module, optimizer: Optimizer, micro_batches: list[Batch]) -> float:
    """Take one step on the loss of all micro-batches of all processes together; return that loss (nats, as weighted).

    They share one normalizer, so the step is the same however its sequences are spread.
    """
    wrapper = accelerator.unwrap_model(model)
    normalizer = global_normalizer(sum(wrapper.loss_normalizer(**batch) for batch in micro_batches))
    total = torch.zeros((), device=accelerator.device)
    for index, batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            loss = model(**batch, normalizer=normalizer)
            accelerator.backward(loss)
        total += loss.detach()
    accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return accelerator.reduce(total, 'mean').item()


def validate(accelerator: Accelerator, model: Module, held_out: Sequence[bytes], config: Config) -> list[Row]:
    """Report on the held-out sequences; each process scores its share of the batches."""
    batch_size = config.batch_size * config.grad_accum
    by_length = sorted(held_out, key=len)  # little padding
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    share = batches[accelerator.process_index :: accelerator.num_processes]
    bar = tqdm(share, desc='validation', leave=False, disable=not accelerator.is_main_process)
    model.eval()
    on_device = (to_device(to_batch(batch), accelerator.device) for batch in bar)
    found = list(costs(accelerator.unwrap_model(model), on_device))
    model.train()
    return report(gather_object(found), longest=config.seq_len + 1)


@torch.no_grad()
def sample(accelerator: Accelerator, model: Module, held_out: Sequence[bytes], length: int, step: int) -> str:
    """Return how the model goes on from the beginnings of three held-out sequences."""
    prompts = [sequence[:PROMPT] for sequence in held_out[:3]]
    batch = to_device(to_batch(prompts), accelerator.device)
    wrapper = accelerator.unwrap_model(model)
    check_finite(wrapper(**batch).item(), step)  # nobody can draw from probabilities that are nan
    generated = wrapper.generate(batch['x'], length, prompt_lens=batch['lens'])  # (b, length)
    return '\n'.join(
        f'{"-" * 30}\n{printable(prompt)} >>> {printable(bytes(ids))}'
        for prompt, ids in zip(prompts, generated.tolist(), strict=True)
    )


def check_finite(loss: float, step: int) -> None:
    """Raise `UsageError` where a training has gone astray."""
    if not math.isfinite(loss):
        raise UsageError(f'the loss is not finite at step {step}: --learning-rate may be too large')


def printable(text: bytes) -> str:
    """Decode bytes for a terminal."""
    decoded = text.decode(errors='replace')
    return ''.join(char if char.isprintable() or char == '\n' else '\N{REPLACEMENT CHARACTER}' for char in decoded)


def train(config: Config) -> None:
    """Run one training, from its options to its report."""
    on_cpu = not any(backend.is_available() for backend in (torch.cuda, torch.xpu, torch.backends.mps))
    accelerator = Accelerator(cpu=on_cpu)  # on CPU, it joins the processes of torchrun only when told so
    main, say = accelerator.is_main_process, accelerator.on_main_process(tqdm.write)

    config = resolve(config, accelerator.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    model = build_model(config)
    say(f'preset {config.preset}, on {accelerator.device} x {accelerator.num_processes}')

    source = find_text(config.data) if main else ''
    source = broadcast_object_list([source])[0]
    split = split_text(read_text(source, config.max_bytes), config.sequences, config.seq_len + 1, config.held_out)
    config = replace(config, data=source, name=config.name or run_name(config, source))
    say(f'{source}: {len(split.train):,} {config.sequences} to train on, {len(split.held_out):,} held out')

    model, optimizer = accelerator.prepare(model, Adam(model.parameters(), lr=config.learning_rate))
    generator = torch.Generator().manual_seed(config.seed)  # of the batches alone

    folder = Path('runs') / config.name
    with open_log(writable_folder(folder) / METRICS) if main else open(os.devnull, 'w') as metrics:
        if main:
            (folder / 'config.json').write_text(json.dumps(asdict(config), indent=2) + '\n')

        def log(**record: Any) -> None:
            print(json.dumps(record), file=metrics, flush=True)

        for step in (bar := tqdm(range(1, config.steps + 1), desc='training', disable=not main)):
            start = time.perf_counter()
            sequences = draw(split.train, config.batch_size * config.grad_accum, generator)  # of all processes
            loss = optimizer_step(accelerator, model, optimizer, micro_batches_of(sequences, config, accelerator))
            check_finite(loss, step)
            tokens_per_second = sum(map(len, sequences)) / (time.perf_counter() - start)
            bar.set_postfix(loss=f'{loss:.3f}', tokens_per_second=f'{tokens_per_second:,.0f}', refresh=False)
            log(step=step, train_loss=loss, tokens_per_second=round(tokens_per_second))

            is_last = step == config.steps
            if is_last or step % config.validate_every == 0:
                rows = validate(accelerator, model, split.held_out, config)
                over_tokens, over_sequences = rows[-1].over_tokens, rows[-1].over_sequences
                check_finite(over_tokens, step)
                log(step=step, bits_per_byte=[row._asdict() for row in rows])
                say(f'step {step:,}: {over_tokens:.3f} bits per byte over tokens, {over_sequences:.3f} over sequences')
            if main and (is_last or step % config.generate_every == 0):
                say(sample(accelerator, model, split.held_out, config.generate_length, step))

    say(f'\n{table(rows)}\n')
    if main:
        draw_by_length({config.name: rows}, folder / PICTURE)
    say(f'{folder}: config.json, {METRICS}, {PICTURE}')
    accelerator.wait_for_everyone()
    model, optimizer = accelerator.free_memory(model, optimizer)  # the last owner of a process group may hang
    accelerator.end_training()


def main(args: Sequence[str] | None = None) -> None:
    """Train as the command line says; exit with 2 and one line where it, or the text, is no good."""
    with one_line_errors(Path(__file__).name):
        train(tyro.cli(Config, args=args))


if __name__ == '__main__':
    main()
