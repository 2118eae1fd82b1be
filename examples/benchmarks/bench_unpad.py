"""Is `unpad=True` ever slower? A training step with it over the same step without, at every filling of the batch.

    python examples/benchmarks/bench_unpad.py [--widths 128 512 2048] [--fillings 0.2 0.6 1.0] [--threads 2]

Rows padded on the right, their lengths spread evenly around the filling; 8,192 positions a batch. Forward and backward,
interleaved; a ratio is the median of the ratios within a round.

b - rows
n - positions
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script, its own folder alone is searched
import command_line  # noqa: F401  before any package: it says which one is missing
import torch
import tyro
from command_line import UsageError, one_line_errors, say
from enwik8.config import PRESETS
from measuring import begin, timed
from torch import Tensor
from x_transformers import Decoder, TransformerWrapper

from xtloss import AutoregressiveWrapper


@dataclass(frozen=True)
class Config:
    """Compare a step with unpad=True to the step without; the network is the tiny preset of train_enwik8.py.

    By rows of 128 and 512, 7 rounds of 4,096 positions take about two and a half minutes on one core.
    """

    widths: tuple[int, ...] = (128, 512, 2048)
    """Of a batch, n."""
    fillings: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
    """The part of a batch that is real tokens, in (0, 1]."""
    positions: int = 8192
    """Of a batch, b * n."""
    vocab: int = 256
    rounds: int = 7
    threads: int | None = None
    device: Literal['cpu', 'cuda'] = 'cpu'


def compare(config: Config) -> None:
    """Measure and print a table."""
    if max(config.fillings) > 1:
        raise UsageError(f'--fillings must be at most 1, got {max(config.fillings)}')
    begin(config)
    say(f'{"":>6}{"":>7}{"step with unpad / without, filled to":>40}')
    say(f'{"n":>6}{"flash":>7}' + ''.join(f'{filling:>8.0%}' for filling in config.fillings))
    for n in config.widths:
        for flash in (True, False):
            net = network(n, flash, config)
            print(f'{n:>6}{"yes" if flash else "no":>7}', end='', flush=True)
            for filling in config.fillings:  # each number as it is known: Ctrl-C leaves what was measured so far
                print(f'{measure(net, lengths(filling, n, config), n, config):>8.2f}', end='', flush=True)
            print(flush=True)


def network(n: int, flash: bool, config: Config) -> TransformerWrapper:
    """Build the network of the tiny preset."""
    torch.manual_seed(0)
    sizes = {name: PRESETS['tiny'][name] for name in ('dim', 'depth', 'heads')}
    attn_layers = Decoder(**sizes, rotary_pos_emb=True, attn_flash=flash, verbose=False)
    return TransformerWrapper(num_tokens=config.vocab, max_seq_len=n, attn_layers=attn_layers).to(config.device)


def lengths(filling: float, n: int, config: Config) -> Tensor:
    """Return `lens`, (b,): spread evenly around filling * n, as widely as there is room."""
    b = max(config.positions // n, 2)
    room = min(filling, 1 - filling)
    return (n * torch.linspace(filling - room, filling + room, b, device=config.device)).round().long().clamp(min=1)


def measure(net: TransformerWrapper, lens: Tensor, n: int, config: Config) -> float:
    """Return the time of a step with unpad over that of the step without."""
    x = torch.randint(0, config.vocab, (len(lens), n), device=config.device)
    without, unpadded = (AutoregressiveWrapper(net, unpad=unpad) for unpad in (False, True))
    ratios = []
    for round_ in range(config.rounds + 1):
        before, after = (timed(net, lambda model=model: model(x, lens=lens))[1] for model in (without, unpadded))
        ratios += [after / before] if round_ else []  # the first warms up
    return statistics.median(ratios)


def main(args: Sequence[str] | None = None) -> None:
    """Compare as the command line says."""
    with one_line_errors(Path(__file__).name):
        compare(tyro.cli(Config, args=args))


if __name__ == '__main__':
    main()
