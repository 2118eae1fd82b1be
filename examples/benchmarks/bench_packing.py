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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm
from x_transformers import AutoregressiveWrapper as Upstream
from x_transformers import Decoder, TransformerWrapper

from xtloss import AutoregressiveWrapper

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script, its own folder alone is searched
from command_line import UsageError, judge, one_line_errors
from enwik8.config import PRESETS
from enwik8.sequences import draw, split_text, to_batch
from enwik8.text import find_text, read_text

UPSTREAM, OURS = 'x-transformers', ('padded', 'unpad', 'packed')


@dataclass(frozen=True)
class Config:
    """Compare packed with padded training on real lines; the network is the tiny preset of train_enwik8.py."""

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
    judge(config)
    if config.vocab < 256:
        raise UsageError(f'--vocab must be at least 256: there are so many bytes, got {config.vocab}')
    if config.device == 'cuda' and not torch.cuda.is_available():
        raise UsageError('--device cuda: no CUDA device here')
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    source = find_text(config.data)
    lines = split_text(read_text(source, None), 'lines', config.max_len, 1).train
    net = network(config)

    print(f'{source}, lines of {sum(map(len, lines)) / len(lines):.0f} bytes on average, vocabulary {config.vocab}')
    print(f'{"":>6}{"real tokens per second":^52}{"/ x-transformers":^30}{"largest":>10}')
    columns = ''.join(f'{name:>12}' for name in OURS) + ''.join(f'{name:>10}' for name in OURS)
    print(f'{"lines":>6}{UPSTREAM:>16}{columns}{"Δ loss":>10}')
    generator = torch.Generator().manual_seed(config.seed)
    for count in config.lines:
        speeds, difference = measure(net, lines, count, config, generator)
        median = {name: statistics.median(speed) for name, speed in speeds.items()}
        over = {
            name: statistics.median(a / b for a, b in zip(speeds[name], speeds[UPSTREAM], strict=True)) for name in OURS
        }
        print(
            f'{count:>6}{median[UPSTREAM]:>16,.0f}'
            + ''.join(f'{median[name]:>12,.0f}' for name in OURS)
            + ''.join(f'{over[name]:>9.2f}x' for name in OURS)
            + f'{difference:>10.1e}'
        )


def network(config: Config) -> TransformerWrapper:
    """Build the network of the tiny preset."""
    tiny = PRESETS['tiny']
    attn_layers = Decoder(
        dim=tiny['dim'], depth=tiny['depth'], heads=tiny['heads'], rotary_pos_emb=True, attn_flash=True, verbose=False
    )
    net = TransformerWrapper(num_tokens=config.vocab, max_seq_len=config.max_len, attn_layers=attn_layers)
    return net.to(config.device)


def measure(
    net: TransformerWrapper, lines: Sequence[bytes], count: int, config: Config, generator: torch.Generator
) -> tuple[dict[str, list[float]], float]:
    """Return the real tokens per second of each round by each peer, and the largest relative difference of losses."""
    peers = {
        UPSTREAM: Upstream(net),
        'padded': AutoregressiveWrapper(net),
        'unpad': AutoregressiveWrapper(net, unpad=True),
        'packed': AutoregressiveWrapper(net),
    }
    speeds: dict[str, list[float]] = {name: [] for name in peers}
    difference = 0.0
    for round_ in tqdm(range(config.rounds + 1), desc=f'{count} lines', leave=False):
        batch = draw(lines, count, generator)
        padded = {name: t.to(config.device) for name, t in to_batch(batch).items()}
        packed = {name: t.to(config.device) for name, t in to_batch(batch, 'packed', config.max_len).items()}
        losses = []
        for name, wrapper in peers.items():
            loss, seconds = timed(net, partial(wrapper, **(packed if name == 'packed' else padded)))
            losses.append(loss)
            if round_ > 0:  # the first warms up
                speeds[name].append(sum(map(len, batch)) / seconds)
        difference = max(difference, *(abs(loss - losses[0]) / max(losses[0], 1e-9) for loss in losses))
    return speeds, difference


def timed(net: Module, step: Callable[[], Tensor]) -> tuple[float, float]:
    """Run a forward and a backward; return the loss and the seconds."""
    net.zero_grad()
    synchronize()
    start = time.perf_counter()
    loss = step()
    loss.backward()
    synchronize()
    return loss.item(), time.perf_counter() - start


def synchronize() -> None:
    """Wait for the device, where it runs ahead of Python."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(args: Sequence[str] | None = None) -> None:
    """Compare as the command line says."""
    with one_line_errors(Path(__file__).name):
        compare(tyro.cli(Config, args=args))


if __name__ == '__main__':
    main()
