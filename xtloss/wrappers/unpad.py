"""No compute goes into padding: the real tokens of a batch, in fewer or shorter rows.

Dims: b batch, n positions, d width; r rows, m positions in a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtloss.losses.transforms import functorch_active, has_values
from xtloss.packing.layout import Layout, best_fit_decreasing, one_to_a_row, sequence_numbers, token_index
from xtloss.packing.sequences import CPU
from xtloss.packing.verdict import trusted
from xtloss.weighting.targets import Outputs, real_positions

TELLING = ('lens', 'mask', 'seq_start_pos')  # what says which tokens are real
PER_TOKEN = ('embed_ids', 'sum_embeds', 'condition', 'self_attn_kv_mask')  # what the network reads of each token
OF_THE_BATCH = frozenset(('loss_mask', 'loss_weight', 'normalizer', *TELLING, *PER_TOKEN))
MASK_FREE_WIDTH = 512  # see `pays`


class Plan(NamedTuple):
    """Where the tokens go."""

    source: Tensor  # (r, m) int64: which of the b · n tokens lies where; -1: none
    shape: tuple[int, int]  # (b, n)
    segment_ids: Tensor | None  # (r, m) int64; None: one sequence a row, on its left
    has_holes: bool  # whether `mask` hides tokens between real ones

    def take(self, t: Tensor, fill: Any) -> Tensor:
        """(b, n, ...) -> (r, m, ...): each token's, and `fill` where there is none."""
        taken = t.flatten(0, 1)[self.source.clamp(min=0)]
        is_token = (self.source >= 0).view(*self.source.shape, *[1] * (t.ndim - 2))
        return torch.where(is_token, taken, fill)

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """What the wrapper's forward was given, for these rows: right padding needs no mask."""
        rows = {name: value for name, value in given.items() if name not in (*TELLING, *PER_TOKEN)}
        if 'embed_ids' in given:
            rows['embed_ids'] = {name: self.take(t, 0) for name, t in given['embed_ids'].items()}
        if 'sum_embeds' in given:
            rows['sum_embeds'] = self.take(given['sum_embeds'], 0)
        if 'condition' in given:
            condition = given['condition']  # (b, n, d), or (b, d)
            per_token = condition if condition.ndim == 3 else condition[:, None].expand(-1, self.shape[1], -1)
            rows['condition'] = self.take(per_token, 0)
        if 'self_attn_kv_mask' in given:
            rows['self_attn_kv_mask'] = self.take(given['self_attn_kv_mask'], True)
        if self.has_holes:
            rows['mask'] = self.take(given['mask'], True)
        return rows if self.segment_ids is None else {**rows, 'segment_ids': self.segment_ids}

    def outputs(self) -> Outputs:
        """Where the targets of the batch are predicted."""
        source, tokens = self.source.flatten(), self.shape[0] * self.shape[1]
        place = source.new_full((tokens + 1,), len(source))  # the last one takes what is no token
        here = torch.arange(len(source), device=source.device)
        place = place.scatter(0, torch.where(source < 0, tokens, source), here)
        return Outputs(place[:-1].view(self.shape)[:, :-1])


def refuse_unpad(net: Any, x: Tensor, given: dict[str, Any]) -> None:
    """Raise ValueError for a network or an argument that has no place for the tokens, whatever the batch holds."""
    facts = trusted(net)
    if facts.varlen and facts.absolute:
        raise ValueError(
            'unpad=True: attn_flash_pack_seq beside an absolute embedding, which has no place for a row of all tokens'
        )
    for name, value in given.items():
        if name not in OF_THE_BATCH and holds_tensors(value):
            raise ValueError(f'unpad=True: {name} cannot be given, it does not travel with the tokens')
    for name, t in per_token(given):
        if t.shape[:2] != x.shape:
            b, n = x.shape
            raise ValueError(f'unpad=True: {name} must have shape ({b}, {n}, ...) like x, got {tuple(t.shape)}')


def per_token(given: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What the network reads of each token, (b, n, ...), by name."""
    for name in PER_TOKEN:
        if isinstance(given.get(name), dict):
            yield from given[name].items()
        elif name in given and not (name == 'condition' and given[name].ndim == 2):  # (b, d), of each row
            yield name, given[name]


def holds_tensors(value: Any) -> bool:
    """Whether there is a tensor in a tree of lists, tuples and dicts."""
    if isinstance(value, dict):
        return any(map(holds_tensors, value.values()))
    return any(map(holds_tensors, value)) if isinstance(value, (list, tuple)) else isinstance(value, Tensor)


def plan_rows(x: Tensor, given: dict[str, Any], *, one_row: bool) -> Plan | None:
    """Plan the rows of a batch; None where it goes as it came. Copies 3 · b numbers to the host.

    One row is planned even where nothing is real: of all the padding, in which nothing counts.
    """
    telling = {name: given[name] for name in TELLING if name in given}
    tracing = torch.compiler.is_compiling() or functorch_active()
    if tracing or not all(map(has_values, (x, *telling.values()))):
        return None
    b, n = x.shape
    real = real_positions(x, **telling)
    i = torch.arange(n, device=x.device)
    first = torch.where(real, i, n).amin(dim=1)
    last = torch.where(real, i, -1).amax(dim=1)
    counts = real.sum(dim=1)
    spans = [
        (row * n + begin, end - begin + 1, count)
        for row, (begin, end, count) in enumerate(torch.stack([first, last, counts], dim=1).tolist())
        if count
    ]
    if not spans and one_row:
        spans = [(row * n, n, n) for row in range(b)]
    if not spans:
        return None
    starts, lengths, sums = zip(*spans, strict=True)
    longest, tokens = max(lengths), sum(lengths)
    if tokens == b * n and not one_row:
        return None

    layout = best_fit_decreasing(lengths, tokens if one_row else longest)
    packs = one_row or pays(layout, len(lengths))
    layout = layout if packs else one_to_a_row(lengths, longest)
    index = token_index(layout)  # (r, m), 0 = none
    spans_of = zip(starts, lengths, strict=True)
    tokens_of = [torch.arange(start, start + length, device=CPU) for start, length in spans_of]
    source = torch.cat([torch.tensor([-1], device=CPU), *tokens_of])[index]
    segment_ids = sequence_numbers(lengths)[index].to(x.device) if packs else None
    return Plan(source.to(x.device), (b, n), segment_ids, has_holes=sum(sums) < tokens)


def pays(packed: Layout, sequences: int) -> bool:
    """Whether packed rows are quicker than one sequence a row, both as wide as the longest.

    Packed rows need a mask, (b, 1, m, m), where causal attention needs none: a row costs up to 1 + m / 512 times as
    much.
    """
    rows, m = packed.shape
    return rows * (1 + m / MASK_FREE_WIDTH) < sequences
