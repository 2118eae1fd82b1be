"""Time and memory of head and loss: xtloss beside x-transformers, torch, and the matrix products nobody can avoid.

    python examples/benchmarks/bench_loss.py            # one shape, about 5 minutes
    python examples/benchmarks/bench_loss.py --vocab 50257 --dim 768 --tokens 2048 --uncounted 0.5
    python examples/benchmarks/bench_loss.py --suite    # the table of the gallery, about 10 minutes
    python examples/benchmarks/bench_loss.py --traffic  # bytes, not seconds: what a GPU's time is made of

Forward and backward, interleaved in rounds, warmed up. Times are medians; ratios are medians of the ratio within a
round. Peak memory is that of one pass in a process of its own, beyond what the inputs take. Each comparison is a line
as soon as it is over; the tables come at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script, its own folder alone is searched
import command_line  # noqa: F401  before any package: it says which one is missing
import torch
import traffic
import tyro
from bench_peers import (
    BY_COLUMNS,
    CHUNKED,
    HEADS,
    OURS,
    PRODUCTS,
    STEP_OURS,
    STEP_UPSTREAM,
    UPSTREAM,
    XL_OURS,
    XL_UPSTREAM,
    Problem,
    Run,
    Shape,
    Times,
    measure_memory,
    measure_times,
    problem,
)  # fmt: skip
from command_line import UsageError, one_line_errors, writable_folder
from matplotlib.figure import Figure
from measuring import begin
from palette import LIBRARIES, OTHERS
from torch import Tensor

MIB = 2**20
BEHIND = {'facecolor': 'white', 'edgecolor': 'none', 'pad': 1}  # of a number, so that no line goes through it


@dataclass(frozen=True)
class Config:
    """Measure time and memory of head and loss, and of whole training steps."""

    device: Literal['cpu', 'cuda'] = 'cpu'
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    vocab: int = 32768
    dim: int = 512
    tokens: int = 4096
    uncounted: float = 0.0
    """The part of the targets that does not count, in [0, 1)."""
    depth: int = 4
    """Layers of the network, for the whole training step."""
    threads: int | None = None
    """None: as many as torch takes by itself."""

    suite: bool = False
    """Measure the shapes of the gallery's table, not the one above."""
    traffic: bool = False
    """Count the bytes that each peer moves for a logit, in float32 and bfloat16, and measure nothing."""
    rounds: int = 3
    """Rounds of each comparison, at the least."""
    seconds: float = 30.0
    """Rounds of each comparison go on for so long, at the least."""
    memory: bool = True
    """Measure peak memory too; on a CPU, on Linux only."""
    out: Path = Path('runs/bench_loss')
    """Where bench_loss.png goes."""


class Comparison(NamedTuple):
    """Peers that were given one shape: milliseconds, and bytes where they were measured."""

    shape: Shape
    times: Times
    memory: dict[Run, int]
    peers: tuple[str, ...]

    def baseline(self, peer: str) -> str:
        """Return upstream's peer of the same kind."""
        return STEP_UPSTREAM if peer == STEP_OURS else UPSTREAM if peer in HEADS else peer


def comparison_table(c: Comparison) -> str:
    """Return the peers as a markdown table."""
    lines = [
        f'| {c.shape} | ms | / {PRODUCTS} | / {UPSTREAM} | extra peak MiB | / {UPSTREAM} |',
        '|---|---:|---:|---:|---:|---:|',
    ]
    for peer in c.peers:
        run, base = (peer, c.shape), (c.baseline(peer), c.shape)
        per_products = f'{c.times.ratio(run, (PRODUCTS, c.shape)):.2f}' if peer in HEADS else ''
        per_upstream = f'{c.times.ratio(run, base):.2f}'
        mib = f'{c.memory[run] / MIB:,.0f}' if run in c.memory else ''
        of_memory = f'{c.memory[run] / c.memory[base]:.2f}' if run in c.memory and c.memory.get(base) else ''
        row = (peer, f'{c.times.ms(run):,.0f}', per_products, per_upstream, mib, of_memory)
        lines.append(f'| {" | ".join(row)} |')
    return '\n'.join(lines)


class Row(NamedTuple):
    """A line of the suite's table."""

    what: str
    at_most: float | None
    measured: float | None


def suite_table(rows: list[Row]) -> str:
    """Return the rows as a markdown table."""
    lines = ['| | at most | measured | |', '|---|---:|---:|---|']
    for what, at_most, measured in rows:
        bound, value = (
            '' if number is None else f'{number:.{digits}f}' for number, digits in ((at_most, 2), (measured, 3))
        )
        over = 'over' if at_most is not None and measured is not None and measured > at_most else ''
        lines.append(f'| {what} | {bound} | {value} | {over} |')
    return '\n'.join(lines)


def draw(comparisons: list[Comparison], path: Path) -> None:
    """Draw time and memory of the heads, a row of panels for each shape."""
    figure = Figure(figsize=(12, 0.6 + 3.4 * len(comparisons)), layout='constrained')
    panels = figure.subplots(len(comparisons), 2, squeeze=False, sharey='row')
    for (left, right), c in zip(panels, comparisons, strict=True):
        peers = [peer for peer in c.peers if peer in HEADS][::-1]
        colors = [LIBRARIES.get(peer, OTHERS) for peer in peers]
        runs = [(peer, c.shape) for peer in peers]
        bars = left.barh(peers, [c.times.ms(run) for run in runs], color=colors)
        products = c.times.ms((PRODUCTS, c.shape))
        left.axvline(products, color='black', linestyle=':', linewidth=1, zorder=0, label=PRODUCTS)
        left.bar_label(bars, [f'{c.times.ms(run):,.0f}' for run in runs], padding=3, bbox=BEHIND)
        left.legend(loc='lower right', frameon=False)
        left.set_xlabel('forward and backward of head and loss, ms')
        left.set_title(str(c.shape), loc='left')
        if c.memory:
            mib = [c.memory.get(run, 0) / MIB for run in runs]
            right.bar_label(right.barh(peers, mib, color=colors), [f'{value:,.0f}' for value in mib], padding=3)
        right.set_xlabel('extra peak memory, MiB')
        for axes in (left, right):
            axes.margins(x=0.14)
            axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=144)


def one_shape(config: Config, shape: Shape) -> tuple[list[Comparison], list[Row]]:
    """Compare all peers at one shape, heads with heads and whole steps with whole steps."""
    peers = (*HEADS, STEP_UPSTREAM, STEP_OURS)
    memory = measured_memory(config, [(peer, shape) for peer in peers])
    heads = measured_times(config, [(peer, shape) for peer in HEADS], title='head and loss')
    steps = measured_times(config, [(STEP_UPSTREAM, shape), (STEP_OURS, shape)], title='whole step')
    return [Comparison(shape, Times(heads.seconds | steps.seconds), memory, peers)], []


class SuiteShapes(NamedTuple):
    """The shapes of the gallery's table."""

    a: Shape
    b: Shape
    uncounted: Shape  # a, of which 75% does not count
    twice: Shape  # a, with 2N tokens
    step: Shape
    padded: Shape  # step, of which 75% is padding
    characters: Shape  # a whole step in which the head is small


def suite_shapes(like: Shape) -> SuiteShapes:
    """Return them for a device and a dtype."""
    a = like._replace(tokens=4096, dim=512, vocab=32768, uncounted=0.0, rows=8)
    b = a._replace(tokens=2048, dim=768, vocab=50257)
    step = a._replace(dim=256, depth=4)
    characters = a._replace(tokens=2048, vocab=256, rows=4, depth=6)
    return SuiteShapes(
        a, b, a._replace(uncounted=0.75), a._replace(tokens=8192), step, step._replace(uncounted=0.75), characters
    )


def suite(config: Config, s: SuiteShapes) -> tuple[list[Comparison], list[Row]]:
    """Measure everything the gallery's table has."""
    some = tuple(peer for peer in (PRODUCTS, BY_COLUMNS, UPSTREAM, *CHUNKED, OURS) if peer in HEADS)
    memory = measured_memory(
        config,
        [(peer, s.a) for peer in HEADS]
        + [(OURS, s.twice)]
        + [(peer, s.b) for peer in some]
        + [(peer, s.step) for peer in (XL_UPSTREAM, XL_OURS)],
    )
    at_a = measured_times(config, [(p, s.a) for p in HEADS] + [(OURS, s.uncounted), (OURS, s.twice)], title=str(s.a))
    at_b = measured_times(config, [(peer, s.b) for peer in some], title=str(s.b))
    pair = (STEP_UPSTREAM, STEP_OURS)
    steps = measured_times(config, [(peer, shape) for shape in (s.step, s.padded) for peer in pair], title='whole step')
    xl = measured_times(config, [(peer, s.step) for peer in (XL_UPSTREAM, XL_OURS)], title='whole XL step')
    small = measured_times(config, [(peer, s.characters) for peer in pair], title='whole step, V=256')

    rows = []
    for times, shape in ((at_a, s.a), (at_b, s.b)):
        others = {PRODUCTS: 1.10, BY_COLUMNS: 1.12, UPSTREAM: 0.50, CHUNKED[0]: 0.75, CHUNKED[1]: None}
        rows += [
            Row(f'head + loss / {peer}, {shape}', at_most, times.ratio((OURS, shape), (peer, shape)))
            for peer, at_most in others.items()
            if peer in HEADS
        ]

    def memory_ratio(run: Run, other: Run, *, gradients: bool = True) -> float | None:
        if not memory:
            return None
        own, others = (memory[r] - (0 if gradients else gradient_bytes(r[1])) for r in (run, other))
        return own / others

    rows += [
        Row(f'extra peak memory / x-transformers, {s.a}', 0.10, memory_ratio((OURS, s.a), (UPSTREAM, s.a))),
        Row(f'extra peak memory / x-transformers, {s.b}', 0.16, memory_ratio((OURS, s.b), (UPSTREAM, s.b))),
        Row('75% of the targets uncounted / none', 0.30, at_a.ratio((OURS, s.uncounted), (OURS, s.a))),
    ]
    for times, shape, what, at_most in (
        (steps, s.step, 'nothing masked', 0.50),
        (steps, s.padded, '75% padding', 0.30),
        (small, s.characters, 'nothing masked', 1.03),
    ):
        size = f'd={shape.dim}, depth {shape.depth}, V={shape.vocab}, {shape.rows} x {shape.tokens // shape.rows}'
        ratio = times.ratio((STEP_OURS, shape), (STEP_UPSTREAM, shape))
        rows.append(Row(f'whole step / x-transformers, {size}, {what}', at_most, ratio))
    size = f'd={s.step.dim}, depth {s.step.depth}, V={s.step.vocab}, two segments'
    runs = (XL_OURS, s.step), (XL_UPSTREAM, s.step)
    rows += [
        Row(f'whole XL step / x-transformers, {size}', 0.50, xl.ratio(*runs)),
        Row(f'extra peak memory of it / x-transformers, {size}', 0.30, memory_ratio(*runs)),
        Row('time at 2N / at N', 2.1, at_a.ratio((OURS, s.twice), (OURS, s.a))),
        Row(
            'extra peak memory at 2N / at N, beyond the gradients',
            1.1,
            memory_ratio((OURS, s.twice), (OURS, s.a), gradients=False),
        ),
    ]
    return [Comparison(s.a, at_a, memory, tuple(HEADS)), Comparison(s.b, at_b, memory, some)], rows


def traffic_table(shape: Shape) -> str:
    """Return the bytes that every peer moves, and both paths of xtloss; what runs inside one operation is not seen."""

    def in_dtype(peer: Callable[[Problem], Tensor | None]) -> Callable[[torch.dtype], Tensor | None]:
        return lambda dtype: peer(problem(shape._replace(dtype=dtype)))

    peers = {name: (in_dtype(peer), False) for name, peer in HEADS.items() if name not in (PRODUCTS, BY_COLUMNS)}
    if shape.device == 'cpu':
        peers |= {f'{OURS}, as on an accelerator': (in_dtype(HEADS[OURS]), True)}
    return traffic.table(peers, logits=round(shape.tokens * (1 - shape.uncounted)) * shape.vocab, dim=shape.dim)


def gradient_bytes(shape: Shape) -> int:
    """Bytes of dX and dW."""
    return (shape.tokens + shape.vocab) * shape.dim * shape.dtype.itemsize


def measured_memory(config: Config, runs: list[Run]) -> dict[Run, int]:
    return measure_memory(runs, threads=torch.get_num_threads()) if config.memory else {}


def measured_times(config: Config, runs: list[Run], title: str) -> Times:
    return measure_times(runs, rounds=config.rounds, seconds=config.seconds, title=title)


def check(config: Config) -> None:
    """Judge the options. Raises `UsageError`."""
    if config.uncounted >= 1:
        raise UsageError(f'--uncounted must be in [0, 1), got {config.uncounted}')
    if config.tokens < 2:
        raise UsageError(f'--tokens must be at least 2: one predicts nothing, got {config.tokens}')
    if config.memory and not config.traffic and config.device == 'cpu' and not Path('/proc/self/status').exists():
        raise UsageError('--no-memory is wanted: on a CPU, peak memory is measured on Linux only')


def compare(config: Config) -> None:
    """Measure, print and draw."""
    check(config)
    begin(config)
    shape = Shape(
        config.tokens,
        config.dim,
        config.vocab,
        config.uncounted,
        rows=gcd(config.tokens, 8),
        depth=config.depth,
        device=config.device,
        dtype=getattr(torch, config.dtype),
    )
    if config.traffic:
        print(traffic_table(shape))
        return
    picture = writable_folder(config.out) / 'bench_loss.png'
    comparisons, rows = suite(config, suite_shapes(shape)) if config.suite else one_shape(config, shape)
    for comparison in comparisons:
        print(f'\n{comparison_table(comparison)}')
    if rows:
        print(f'\n{suite_table(rows)}')
    draw(comparisons, picture)
    print(f'\n{picture}')


def main(args: Sequence[str] | None = None) -> None:
    """Compare as the command line says."""
    with one_line_errors(Path(__file__).name):
        compare(tyro.cli(Config, args=args, description=__doc__))


if __name__ == '__main__':
    main()
