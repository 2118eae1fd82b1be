"""Lay the same sequences out in five ways, and measure how far each gradient is from that of one padded batch.

    python examples/five_layouts.py [--loss-weighting sequence] [--out runs/five_layouts]

Prints a table and draws five_layouts.png, for xtloss and for the wrapper of x-transformers on the same network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import torch
import tyro
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from x_transformers import AutoregressiveWrapper as Upstream
from x_transformers import Decoder, TransformerWrapper

from xtloss import AutoregressiveWrapper, pack

Batch = dict[str, Tensor]


@dataclass
class Config:
    """What to compare, and where to put the picture."""

    loss_weighting: str = 'sequence'
    """Weighting of xtloss; x-transformers has the mean over tokens alone."""
    sequences: int = 24
    max_len: int = 96
    seed: int = 0
    out: Path = Path('runs/five_layouts')


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
        'reversed,\nmore padding': [[right(sequences[::-1], extra=32)]],
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


def main(config: Config) -> None:
    """Compare and draw."""
    torch.manual_seed(config.seed)
    attn_layers = Decoder(dim=64, depth=2, heads=2, attn_dim_head=32, rotary_pos_emb=True, verbose=False)
    net = TransformerWrapper(num_tokens=256, max_seq_len=1024, attn_layers=attn_layers)
    ours = AutoregressiveWrapper(net, loss_weighting=config.loss_weighting)
    upstream = Upstream(net)

    lengths = torch.randint(2, config.max_len + 1, (config.sequences,)).sort().values.tolist()
    sequences = [torch.randint(1, 256, (length,)) for length in lengths]

    def of_upstream(batch: Batch, micro_batches: int) -> Tensor:
        kwargs = {name: value for name, value in batch.items() if name != 'segment_ids'}
        return upstream(**kwargs) / micro_batches

    gradients: dict[str, dict[str, Tensor]] = {f'xtloss, {config.loss_weighting!r}': {}, 'x-transformers': {}}
    for name, ranks in layouts(sequences, config.max_len).items():
        Z = sum(ours.loss_normalizer(**batch) for batches in ranks for batch in batches) / len(ranks)
        of_ours = lambda batch, _, Z=Z: ours(**batch, normalizer=Z)  # noqa: E731
        for wrapper, loss in zip(gradients, (of_ours, of_upstream), strict=True):
            gradients[wrapper][name] = gradient(net, ranks, loss)

    print(f'{"max |Δ gradient| / max |gradient|":<34}' + ''.join(f'{wrapper:>24}' for wrapper in gradients))
    _, axes = plt.subplots(figsize=(8, 3.6), layout='constrained')
    differences: dict[str, list[float]] = {wrapper: [] for wrapper in gradients}
    names = list(next(iter(gradients.values())))[1:]
    for name in names:
        for wrapper, of in gradients.items():
            reference = of['one batch']
            differences[wrapper].append(float((of[name] - reference).abs().max() / reference.abs().max()))
        row = ''.join(f'{difference[-1]:>24.1e}' for difference in differences.values())
        print(f'{name.replace(chr(10), " "):<34}{row}')

    for offset, (wrapper, values) in zip((-0.2, 0.2), differences.items(), strict=True):
        axes.bar([i + offset for i in range(len(names))], [max(v, 1e-9) for v in values], width=0.38, label=wrapper)
    axes.set_yscale('log')
    axes.set_ylim(1e-8, 100)
    axes.axhline(1e-5, color='grey', linewidth=0.8, linestyle='--')
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel('max |Δ gradient| / max |gradient|')
    axes.set_title('The same sequences, five layouts: distance from the gradient of one padded batch', fontsize=10)
    axes.legend()
    config.out.mkdir(parents=True, exist_ok=True)
    plt.savefig(config.out / 'five_layouts.png', dpi=150)
    print(f'drawn in {config.out / "five_layouts.png"}')


if __name__ == '__main__':
    main(tyro.cli(Config, description=__doc__))
