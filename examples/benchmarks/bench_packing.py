"""Compare packed and unpadded with padded training on real lines: tokens per second of a training step, and the loss.

    python examples/benchmarks/bench_packing.py --data PATH [--lines 32] [--vocab 256] [--threads 2]

The same random batches of lines go through x-transformers' own wrapper on padded rows, xtloss on padded rows, xtloss on
padded rows with unpad=True, and xtloss on packed rows: one network, forward and backward, interleaved. Tokens are real
ones: bytes of lines.

b - rows
n - positions
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script, its own folder alone is searched
import command_line  # noqa: F401  before any package: it says which one is missing
import torch
import tyro
from command_line import UsageError, one_line_errors, say
from enwik8.config import PRESETS
from enwik8.sequences import draw, split_text, to_batch
from enwik8.text import find_text, read_text
from measuring import begin, timed
from tqdm import tqdm
from x_transformers import AutoregressiveWrapper as Upstream
from x_transformers import Decoder, TransformerWrapper

from xtloss import AutoregressiveWrapper

UPSTREAM, OURS = 'x-transformers', ('padded', 'unpad', 'packed')
Round = dict[str, tuple[float, float]]  # of each peer, the loss and the real tokens per second


@dataclass(frozen=True)
class Config:
    """Compare packed with padded training on real lines; the network is the tiny preset of train_enwik8.py.

    Lines of enwik8 take about a minute on one core, those of the built-in text, which are short and alike, half of it.
    """

    data: str = 'auto'
    """As in train_enwik8.py."""
    lines: tuple[int, ...] = (8, 16, 32)
    """Lines a batch; each is measured."""
    max_len: int = 512
    """Lines are cut there; the rows of a packed batch are as long."""
    vocab: int = 256
    """Of the network; bytes use the first 256 ids."""
    rounds: int = 7
    threads: int | None = None
    seed: int = 0
    device: Literal['cpu', 'cuda'] = 'cpu'


def compare(config: Config) -> None:
    """Measure and print a table."""
    if config.vocab < 256:
        raise UsageError(f'--vocab must be at least 256: there are so many bytes, got {config.vocab}')
    begin(config)
    torch.manual_seed(config.seed)
    source = find_text(config.data)
    lines = split_text(read_text(source, None), 'lines', config.max_len, 1).train
    net = network(config)

    mean, deviation = statistics.fmean(map(len, lines)), statistics.pstdev(map(len, lines))
    say(f'{source}, lines of {mean:.0f} ± {deviation:.0f} bytes, vocabulary {config.vocab}')
    say(f'{"":>6}{"real tokens per second":^52}{"/ x-transformers":^30}{"largest":>10}')
    columns = ''.join(f'{name:>12}' for name in OURS) + ''.join(f'{name:>10}' for name in OURS)
    say(f'{"lines":>6}{UPSTREAM:>16}{columns}{"Δ loss":>10}')
    generator = torch.Generator().manual_seed(config.seed)
    for count in config.lines:
        rounds: list[Round] = []
        measured = measure(net, lines, count, config, generator)
        try:
            rounds.extend(tqdm(measured, f'{count} lines', config.rounds, leave=False, disable=None))
        finally:  # Ctrl-C too leaves what was measured so far
            if rounds:
                say(row(count, rounds))


def network(config: Config) -> TransformerWrapper:
    """Build the network of the tiny preset."""
    tiny = PRESETS['tiny']
    attn_layers = Decoder(
        dim=tiny['dim'], depth=tiny['depth'], heads=tiny['heads'], rotary_pos_emb=True, attn_flash=True, verbose=False
    )
    net = TransformerWrapper(num_tokens=config.vocab, max_seq_len=config.max_len, attn_layers=attn_layers)
    return net.to(config.device)


def row(count: int, rounds: Sequence[Round]) -> str:
    """Return a line of the table: medians over rounds of the speeds, and of their ratios within a round."""

    def median(name: str, over: str | None = None) -> float:
        return statistics.median(found[name][1] / (found[over][1] if over else 1) for found in rounds)

    losses = [[found[name][0] for name in (UPSTREAM, *OURS)] for found in rounds]
    difference = max(abs(loss - theirs) / max(theirs, 1e-9) for theirs, *ours in losses for loss in ours)
    return (
        f'{count:>6}{median(UPSTREAM):>16,.0f}'
        + ''.join(f'{median(name):>12,.0f}' for name in OURS)
        + ''.join(f'{median(name, UPSTREAM):>9.2f}x' for name in OURS)
        + f'{difference:>10.1e}'
    )


def measure(
    net: TransformerWrapper, lines: Sequence[bytes], count: int, config: Config, generator: torch.Generator
) -> Iterator[Round]:
    """Yield what was measured of each peer, round by round."""
    peers = {
        UPSTREAM: Upstream(net),
        'padded': AutoregressiveWrapper(net),
        'unpad': AutoregressiveWrapper(net, unpad=True),
        'packed': AutoregressiveWrapper(net),
    }
    for round_ in range(config.rounds + 1):
        batch = draw(lines, count, generator)
        padded = {name: t.to(config.device) for name, t in to_batch(batch).items()}
        packed = {name: t.to(config.device) for name, t in to_batch(batch, 'packed', config.max_len).items()}
        found = {}
        for name, wrapper in peers.items():
            loss, seconds = timed(net, partial(wrapper, **(packed if name == 'packed' else padded)))
            found[name] = (loss, sum(map(len, batch)) / seconds)
        if round_ > 0:  # the first warms up
            yield found


def main(args: Sequence[str] | None = None) -> None:
    """Compare as the command line says."""
    with one_line_errors(Path(__file__).name):
        compare(tyro.cli(Config, args=args))


if __name__ == '__main__':
    main()
