"""What a frame costs, one element at a time: the reference for the continuous wrapper, beside `oracle`.

Takes nothing from the package under test.
"""

import torch
from oracle import Expected, expected
from torch import Tensor


def frame_cost(out: Tensor, x: Tensor, row: int, column: int, kind: str) -> Tensor:
    """Mean over features of what frame `column + 1` costs: 'squared', 'absolute' or 'gaussian' (nats); float64.

    x (b, n, d); out (b, n-1, d), for 'gaussian' a mean and a variance of it, (2, b, n-1, d).
    """
    total, truths = torch.zeros((), dtype=torch.float64), x[row, column + 1].double()
    for feature, truth in enumerate(truths):
        if kind == 'gaussian':
            mean, variance = (part[row, column, feature].double() for part in out)
            total = total + 0.5 * (variance.log() + (truth - mean) ** 2 / variance)
        else:
            off = out[row, column, feature].double() - truth
            total = total + (off.abs() if kind == 'absolute' else off * off)
    return total / len(truths)


def expected_frames(out: Tensor, x: Tensor, kind: str, **options: object) -> Expected:
    """The whole equation, for frames."""
    b, n, _ = x.shape
    out, x = out.detach(), x.detach()
    costs = [[frame_cost(out, x, row, column, kind).item() for column in range(n - 1)] for row in range(b)]
    ids = torch.zeros(b, n, dtype=torch.long)  # no frame is ignored
    return expected(ids, ids, token_loss=costs, **options)


def differentiable_frames(out: Tensor, x: Tensor, want: Expected, kind: str) -> Tensor:
    """The same loss as a tensor with a graph back to `out`: one frame at a time, each with its share from `want`."""
    terms = [torch.zeros((), dtype=torch.float64)]
    for row, shares in enumerate(want.shares):
        for column, share in enumerate(shares):
            if want.counted[row][column]:
                terms.append(share * frame_cost(out, x, row, column, kind))
    return torch.stack(terms).sum()
