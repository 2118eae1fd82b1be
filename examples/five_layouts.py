"""Lay the same sequences out in five ways, and measure how far each gradient is from that of one padded batch.

    python examples/five_layouts.py [--loss-weighting sequence] [--out runs/five_layouts]

Prints a table and draws five_layouts.png, for xtloss and for the wrapper of x-transformers on the same network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import command_line  # noqa: F401  before any package: it says which one is missing
import torch
import tyro
from command_line import UsageError, flag, judge, one_line_errors, writable_folder
from matplotlib.figure import Figure
from palette import LIBRARIES
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from x_transformers import AutoregressiveWrapper as Upstream
from x_transformers import Decoder, TransformerWrapper

from xtloss import AutoregressiveWrapper, pack

Batch = dict[str, Tensor]

MORE = 32  # tokens of padding that nobody needs


@dataclass
class Config:
    """Lay the same sequences out in five ways, and measure how far each gradient is from that of one padded batch."""

    loss_weighting: Literal['token', 'sequence', 'square', 'sequence_sum'] | float = 'sequence'
    """Weighting of xtloss; x-transformers has the mean over tokens alone."""
    sequences: int = 24
    """At least 8: one for each micro-batch."""
    max_len: int = 96
    """The longest of them, at least 2 tokens."""
    seed: int = 0
    out: Path = Path('runs/five_layouts')
    """The folder of the picture."""


def layouts(sequences: list[Tensor], max_len: int) -> dict[str, list[list[Batch]]]:
    """Lay the sequences out: ranks of micro-batches, each the arguments of a wrapper's forward."""

    def right(part: list[Tensor], extra: int = 0) -> Batch:
        x = pad_sequence([*part, torch.zeros(max(map(len, part)) + extra, dtype=torch.long)], batch_first=True)[:-1]
        return {'x': x, 'lens': torch.tensor([len(s) for s in part])}

    def left(part: list[Tensor]) -> Batch:
        padded = right([s.flip(0) for s in part])
        mask = torch.arange(padded['x'].shape[1]) < padded['lens'][:, None]
        return {'x': padded['x'].flip(1), 'mask': mask.flip(1)}

    packed, segment_ids = pack(sequences, max_len)
    half, eighth = len(sequences) // 2, len(sequences) // 8
    return {
        'one batch': [[right(sequences)]],
        'reversed,\nmore padding': [[right(sequences[::-1], extra=MORE)]],
        'left padding': [[left(sequences)]],
        'micro-batches': [[right(sequences[i : i + eighth]) for i in range(0, len(sequences), eighth)]],
        'packed': [[{'x': packed, 'segment_ids': segment_ids}]],
        'two ranks': [[right(sequences[:half])], [right(sequences[half:])]],
    }


def gradient(net: torch.nn.Module, ranks: list[list[Batch]], loss: Callable[[Batch, int], Tensor]) -> Tensor:
    """Return the gradient of all parameters, summed over micro-batches, averaged over ranks as DDP does, flat."""
    net.zero_grad()
    for micro_batches in ranks:
        for batch in micro_batches:
            (loss(batch, len(micro_batches)) / len(ranks)).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def compare(config: Config) -> dict[str, dict[str, float]]:
    """Return, for each wrapper and layout, max |Δ gradient| / max |gradient| to one padded batch."""
    torch.manual_seed(config.seed)
    attn_layers = Decoder(dim=64, depth=2, heads=2, attn_dim_head=32, rotary_pos_emb=True, verbose=False)
    net = TransformerWrapper(num_tokens=256, max_seq_len=config.max_len + MORE, attn_layers=attn_layers)
    ours = AutoregressiveWrapper(net, loss_weighting=config.loss_weighting)
    upstream = Upstream(net)

    lengths = torch.randint(2, config.max_len + 1, (config.sequences,)).sort().values.tolist()
    sequences = [torch.randint(1, 256, (length,)) for length in lengths]

    def of_upstream(batch: Batch, micro_batches: int) -> Tensor:
        kwargs = {name: value for name, value in batch.items() if name != 'segment_ids'}
        return upstream(**kwargs) / micro_batches

    gradients: dict[str, dict[str, Tensor]] = {wrapper: {} for wrapper in LIBRARIES}
    for name, ranks in layouts(sequences, config.max_len).items():
        Z = sum(ours.loss_normalizer(**batch) for batches in ranks for batch in batches) / len(ranks)
        of_ours = lambda batch, _, Z=Z: ours(**batch, normalizer=Z)  # noqa: E731
        for wrapper, loss in zip(gradients, (of_ours, of_upstream), strict=True):
            gradients[wrapper][name] = gradient(net, ranks, loss)

    def distance(g: Tensor, reference: Tensor) -> float:
        return float((g - reference).abs().max() / reference.abs().max())

    return {
        wrapper: {name: distance(g, of['one batch']) for name, g in of.items() if name != 'one batch'}
        for wrapper, of in gradients.items()
    }


def table(distances: dict[str, dict[str, float]]) -> str:
    """Return the distances as text, aligned."""
    lines = [f'{"max |Δ gradient| / max |gradient|":<34}' + ''.join(f'{wrapper:>16}' for wrapper in distances)]
    for name in next(iter(distances.values())):
        lines.append(f'{name.replace(chr(10), " "):<34}' + ''.join(f'{of[name]:>16.1e}' for of in distances.values()))
    return '\n'.join(lines)


def draw(distances: dict[str, dict[str, float]], path: Path) -> None:
    """Draw the distances, and the line below which gradients count as equal."""
    figure = Figure(figsize=(8, 3.6), layout='constrained')
    axes = figure.add_subplot()
    for offset, (wrapper, of) in zip((-0.2, 0.2), distances.items(), strict=True):
        heights = [max(value, 1e-9) for value in of.values()]
        where = [group + offset for group in range(len(of))]
        axes.bar(where, heights, width=0.38, label=wrapper, color=LIBRARIES[wrapper])
    axes.set_yscale('log')
    axes.set_ylim(1e-8, 100)
    axes.axhline(1e-5, color='black', linewidth=1, linestyle='--', label='1e-5, what xtloss promises in float32')
    axes.set_xticks(range(len(of)), list(of))
    axes.set_ylabel('max |Δ gradient| / max |gradient|')
    axes.spines[['top', 'right']].set_visible(False)
    figure.legend(frameon=False, ncols=3, loc='outside upper center')
    figure.savefig(path, dpi=144)


def main(args: Sequence[str] | None = None) -> None:
    """Compare as the command line says, print and draw."""
    with one_line_errors(Path(__file__).name):
        config = tyro.cli(Config, args=args)
        judge(config)
        for name, least in (('sequences', 8), ('max_len', 2)):
            if getattr(config, name) < least:
                raise UsageError(f'{flag(name)} must be at least {least}, got {getattr(config, name)}')
        picture = writable_folder(config.out) / 'five_layouts.png'
        try:
            distances = compare(config)
        except ValueError as error:  # a weighting that is none
            raise UsageError(str(error)) from error
        print(table(distances))
        draw(distances, picture)
        print(f'drawn in {picture}')


if __name__ == '__main__':
    main()
