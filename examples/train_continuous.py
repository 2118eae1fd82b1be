"""Train on recordings of a noisy damped oscillation, each as long as it takes to calm down, and go on past their ends.

    python examples/train_continuous.py

A recording stops when the oscillation has decayed, so a network can tell its last frame. x-transformers' own wrapper
trains that frame to predict the padding behind it; a network trained so falls off where a recording ends. Both are
trained here, on the same batches. A run leaves config.json, metrics.json and prediction.png in runs/NAME/.

b - recordings in a batch
n - frames
d - features: position and velocity
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import command_line  # noqa: F401  before any package: it says which one is missing
import torch
import tyro
import x_transformers
from command_line import UsageError, judge, one_line_errors, say, writable_folder
from matplotlib.figure import Figure
from palette import LIBRARIES
from torch import Generator, Tensor, nn
from torch.optim import Adam
from tqdm import tqdm
from x_transformers import ContinuousTransformerWrapper, Decoder

from xtloss import ContinuousAutoregressiveWrapper

REST = 2.0  # where the oscillation comes to rest: far from 0, the value of padding
SHORTEST, LONGEST = 12, 64  # frames of a recording
AHEAD = 16  # frames to go on past the end of a recording
PICTURE = 'prediction.png'

Weighting = Literal['token', 'sequence', 'square', 'padded', 'sequence_sum']


@dataclass(frozen=True)
class Config:
    """Train on recordings of varying duration with xtloss, and with x-transformers' own wrapper; compare them."""

    equal_loss_weight_batch: bool = False
    """Every recording weighs the same in our loss, however long: loss_weighting 'sequence'."""
    loss_weighting: Weighting | float | None = None
    """A weighting by name, or p in [0, 1]: a frame of a recording of L targets weighs L^-p. None: 'token'."""
    noise: float = 0.02
    """Standard deviation of what is added to each feature of each frame."""
    dim: int = 64
    depth: int = 2
    heads: int = 4
    batch_size: int = 24
    learning_rate: float = 2e-3
    steps: int = 400
    """Optimizer steps of each training."""
    held_out: int = 128
    """Recordings to measure on."""
    seed: int = 0
    """Of the parameters and of the recordings, which are the same for both wrappers."""
    name: str = 'oscillation'
    """The results go to runs/NAME, over those of an earlier run."""


class Recordings(NamedTuple):
    """Noisy frames up to each recording's end, 0 from there on; and how the oscillation really goes on."""

    x: Tensor  # (b, n, d)
    lens: Tensor  # (b,)
    truth: Tensor  # (b, n + AHEAD, d), without noise


def record(count: int, noise: float, generator: Generator) -> Recordings:
    """Record damped oscillations around REST until they have decayed to a tenth of where they started.

    position = REST + amplitude · exp(-decay · t) · cos(pulsation · t + phase), and the velocity in units of the same.
    """
    lens = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=generator)
    amplitude, pulsation, phase = torch.rand(3, count, 1, generator=generator).unbind()  # (b, 1)
    amplitude, pulsation, phase = 1 + amplitude, 0.4 + 0.4 * pulsation, 2 * math.pi * phase
    decay = math.log(10) / lens[:, None]

    t = torch.arange(LONGEST + AHEAD)
    envelope, angle = amplitude * (-decay * t).exp(), pulsation * t + phase  # (b, n + AHEAD)
    truth = torch.stack((REST + envelope * angle.cos(), -envelope * angle.sin()), dim=-1)

    x = truth[:, :LONGEST] + noise * torch.randn(count, LONGEST, 2, generator=generator)
    is_padding = torch.arange(LONGEST) >= lens[:, None]
    return Recordings(x.masked_fill(is_padding[..., None], 0.0), lens, truth)


def build_network(config: Config) -> ContinuousTransformerWrapper:
    """Build the network; the same parameters for the same seed."""
    torch.manual_seed(config.seed)
    layers = Decoder(
        dim=config.dim,
        depth=config.depth,
        heads=config.heads,
        attn_dim_head=config.dim // config.heads,
        attn_flash=True,
        rotary_pos_emb=True,
        verbose=False,
    )
    return ContinuousTransformerWrapper(
        dim_in=2, dim_out=2, max_seq_len=LONGEST + AHEAD, use_abs_pos_emb=False, attn_layers=layers
    )


def train(label: str, model: nn.Module, config: Config) -> None:
    """Train one wrapper on batches that hang on the seed alone."""
    generator = Generator().manual_seed(config.seed)
    optimizer = Adam(model.parameters(), lr=config.learning_rate)
    bar = tqdm(range(1, config.steps + 1), desc=label, disable=None)
    for step in bar:
        batch = record(config.batch_size, config.noise, generator)
        loss = model(batch.x, lens=batch.lens)
        if not loss.isfinite():
            raise UsageError(f'the loss is not finite at step {step}: --learning-rate may be too large')
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f'{loss.item():.4f}', refresh=False)


@torch.no_grad()
def measure(model: nn.Module, held_out: Recordings) -> dict[str, float]:
    """Return the root mean square error of the position one frame ahead: inside the recordings, and past their ends."""
    predicted = model.net(held_out.x)[..., 0]  # (b, n), causal: padding comes after what is read here
    error = (predicted - held_out.truth[:, 1 : LONGEST + 1, 0]).square()
    last = held_out.lens[:, None] - 1
    position = torch.arange(LONGEST)
    inside = (position >= SHORTEST // 2) & (position < last)  # it takes some frames to tell an oscillation
    return {
        'inside': error[inside].mean().sqrt().item(),
        'at the end': error.gather(1, last).mean().sqrt().item(),
    }


def draw(models: dict[str, nn.Module], held_out: Recordings, path: Path) -> None:
    """Draw recordings of different lengths, how they really went on, and how each model goes on."""
    by_length = held_out.lens.argsort()
    chosen = by_length[[len(by_length) * part // 4 for part in (1, 2, 3)]].tolist()
    figure = Figure(figsize=(9, 7), layout='constrained')
    for axes, row in zip(figure.subplots(len(chosen), sharex=True), chosen, strict=True):
        end = int(held_out.lens[row])
        axes.plot(held_out.truth[row, : end + AHEAD, 0], color='black', linewidth=1, label='truth')
        axes.plot(held_out.x[row, :end, 0], '.', color='grey', markersize=4, label='recording')
        for label, model in models.items():
            ahead = model.generate(held_out.x[row, :end], AHEAD)  # (AHEAD, d)
            colour = LIBRARIES[label]
            axes.plot(range(end, end + AHEAD), ahead[:, 0], linewidth=2, color=colour, label=f'predicted, {label}')
        axes.axvline(end - 0.5, color='grey', linewidth=0.8, label='end of the recording')
        axes.axhline(0, color='grey', linewidth=0.8, linestyle=':', label='value of padding')
        axes.set_ylabel('position')
        axes.spines[['top', 'right']].set_visible(False)
    axes.set_xlabel('frame')
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, ncols=3, loc='outside upper center')
    figure.savefig(path, dpi=144)


def table(measured: dict[str, dict[str, float]], noise: float) -> str:
    """Return the errors as text, aligned."""
    head = f'{"trained with":>16}  {"inside":>8}  {"at the end":>10}'
    body = (f'{label:>16}  {row["inside"]:>8.4f}  {row["at the end"]:>10.4f}' for label, row in measured.items())
    title = f'position one frame ahead, root mean square error (noise {noise:g})'
    return '\n'.join((title, head, '-' * len(head), *body))


def compare(config: Config) -> None:
    """Train both wrappers, measure, and draw."""
    judge(config)
    if config.dim % config.heads:
        raise UsageError(f'--dim must be a multiple of --heads, got {config.dim} and {config.heads}')
    torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it brings
    try:
        models = {
            'x-transformers': x_transformers.ContinuousAutoregressiveWrapper(build_network(config)),
            'xtloss': ContinuousAutoregressiveWrapper(
                build_network(config),
                equal_loss_weight_batch=config.equal_loss_weight_batch,
                loss_weighting=config.loss_weighting,
            ),
        }
    except ValueError as error:
        raise UsageError(str(error)) from error
    folder = writable_folder(Path('runs') / config.name)
    (folder / 'config.json').write_text(json.dumps(asdict(config), indent=2) + '\n')

    held_out = record(config.held_out, config.noise, Generator().manual_seed(config.seed + 1))
    measured = {}
    for label, model in models.items():
        train(label, model, config)
        model.eval()
        measured[label] = measure(model, held_out)
        say(f'{label}: trained, {config.steps} steps')

    print(f'\n{table(measured, config.noise)}\n')
    (folder / 'metrics.json').write_text(json.dumps(measured, indent=2) + '\n')
    draw(models, held_out, folder / PICTURE)
    print(f'{folder}: config.json, metrics.json, {PICTURE}')


def main(args: Sequence[str] | None = None) -> None:
    """Compare as the command line says."""
    with one_line_errors(Path(__file__).name):
        compare(tyro.cli(Config, args=args))


if __name__ == '__main__':
    main()
