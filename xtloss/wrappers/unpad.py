"""No compute goes into padding: the real tokens of a batch, in fewer or shorter rows.

Dims: b batch, n positions, d width; r rows, m positions in a row.
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from xtloss.arguments import has_values, having, map_tensors
from xtloss.packing.layout import best_fit_decreasing, one_to_a_row, sequence_numbers, token_index
from xtloss.weighting.targets import real_positions
from xtloss.wrappers.masks import takes_lengths, takes_positions

TELLING = ('lens', 'mask', 'seq_start_pos')  # the arguments that say which tokens are real
TRAVELS = having('travels')
FOLLOWED = having('unpads')
MASK_FREE_WIDTH = 512  # shared rows need a mask of all pairs, with which a row of this width costs twice as much


class Plan(NamedTuple):
    """Where the tokens go."""

    source: Tensor  # (r, m) int64: which of the b · n tokens lies where; -1: none
    shape: tuple[int, int]  # (b, n)
    segment_ids: Tensor | None  # (r, m) int64; None: one sequence a row, on its left
    has_holes: bool  # whether `mask` hides tokens between real ones

    def take(self, t: Tensor, fill: Any) -> Tensor:
        """(b, n, ...) -> (r, m, ...): each token's, and `fill` where there is none."""
        taken = rearrange(t, 'b n ... -> (b n) ...')[self.source.clamp(min=0)]
        is_token = (self.source >= 0).view(*self.source.shape, *[1] * (t.ndim - 2))
        return torch.where(is_token, taken, fill)

    def take_read(self, t: Tensor) -> Tensor:
        """Take what the network reads at each token: of (b, n, ...), of (1, n), or of each row (b, d)."""
        b, n = self.shape
        of_rows = t.ndim == 2 and t.is_floating_point()
        per_token = repeat(t, 'b d -> b n d', n=n) if of_rows else t.expand(b, *t.shape[1:])
        return self.take(per_token, t.dtype == torch.bool)

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return what the wrapper's forward was given, for these rows: right padding needs no mask."""
        rows = {name: value for name, value in given.items() if name not in (*TELLING, *TRAVELS)}
        rows.update({name: map_tensors(self.take_read, value) for name, value in given.items() if name in TRAVELS})
        if self.has_holes:
            rows['mask'] = self.take_read(given['mask'])
        return rows if self.segment_ids is None else {**rows, 'segment_ids': self.segment_ids}

    def places(self) -> Tensor:
        """Return (b, n-1), where the targets of the batch are predicted: see `Outputs`."""
        source, tokens = self.source.flatten(), self.shape[0] * self.shape[1]
        place = source.new_full((tokens + 1,), len(source))  # the last one takes what is no token
        place[source] = torch.arange(len(source), device=source.device)  # -1 is the last one
        return rearrange(place[:-1], '(b n) -> b n', b=self.shape[0])[:, :-1]


def unpads(wrapper: Any, given: dict[str, Any]) -> bool:
    """Tell whether a call tells of padding that no compute need go into."""
    return wrapper.unpad and 'segment_ids' not in given and any(name in given for name in TELLING)


def refuse_unpad(net: Any, x: Tensor, given: dict[str, Any]) -> None:
    """Raise ValueError for an argument, or a network, that cannot follow the tokens, whatever the batch holds."""
    if takes_lengths(net) and takes_positions(net):
        raise ValueError('unpad=True: a row of all tokens may be longer than the absolute embedding of this network')
    for name, value in given.items():
        tensors: list[Tensor] = []
        map_tensors(tensors.append, value)
        if tensors and name not in FOLLOWED:
            raise ValueError(f'unpad=True: {name} cannot be given, it does not travel with the tokens')
        for t in tensors if name in TRAVELS else []:
            of_rows = name == 'condition' and t.ndim == 2  # (b, d)
            of_all = t.shape == (1, x.shape[1])
            if t.shape[:2] != x.shape and not of_rows and not of_all:
                b, n = x.shape
                raise ValueError(f'unpad=True: {name} must have shape ({b}, {n}, ...) like x, got {tuple(t.shape)}')


def plan_rows(x: Tensor, given: dict[str, Any], *, one_row: bool) -> Plan | None:
    """Plan the rows of a batch; None where it goes as it came, `one_row` never. Copies 3 · b numbers to the host."""
    telling = {name: given[name] for name in TELLING if name in given}
    if torch.compiler.is_compiling() or not all(map(has_values, (x, *telling.values()))):
        return None
    b, n = x.shape
    real = real_positions(x, **telling)
    i = torch.arange(n, device=x.device)
    first = torch.where(real, i, n).amin(dim=1)
    last = torch.where(real, i, -1).amax(dim=1)
    counts = real.sum(dim=1)
    try:
        numbers = torch.stack([first, last, counts], dim=1).tolist()
    except RuntimeError:  # under torch.func.vmap a tensor has no numbers to read
        return None
    spans = [(row * n + begin, end - begin + 1, count) for row, (begin, end, count) in enumerate(numbers) if count]
    if not spans and one_row:  # of padding, in which nothing counts
        spans = [(row * n, n, n) for row in range(b)]
    if not spans:
        return None
    _, lengths, sums = zip(*spans, strict=True)
    longest, tokens = max(lengths), sum(lengths)
    if tokens == b * n and not one_row:
        return None
    layout = best_fit_decreasing(lengths, tokens if one_row else longest)
    packs = one_row or layout.shape[0] * (1 + longest / MASK_FREE_WIDTH) < len(lengths)
    layout = layout if packs else one_to_a_row(lengths, longest)
    index = token_index(layout)  # (r, m), 0 = none
    tokens_of = [torch.arange(start, start + length, device='cpu') for start, length, _ in spans]
    source = torch.cat([torch.tensor([-1], device='cpu'), *tokens_of])[index]
    segment_ids = sequence_numbers(lengths)[index].to(x.device) if packs else None
    return Plan(source.to(x.device), (b, n), segment_ids, has_holes=sum(sums) < tokens)
