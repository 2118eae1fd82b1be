"""What a frame costs, by loops over float64 numbers: the reference for the continuous wrapper, beside `oracle`.

Takes nothing from the package under test.
"""

import math

import torch
from oracle import Expected, Table, expected
from torch import Tensor


def frame_costs(out: Tensor, x: Tensor, kind: str) -> Table:
    """Mean over features of what each element of frames 1 … n-1 costs: 'squared', 'absolute' or 'gaussian' (nats).

    x (b, n, d); out (b, n-1, d), for 'gaussian' a mean and a variance of it, (2, b, n-1, d).
    """
    b, n, d = x.shape
    table = []
    for row in range(b):
        line = []
        for column in range(n - 1):
            total = 0.0
            for feature in range(d):
                truth = x[row, column + 1, feature].item()
                if kind == 'gaussian':
                    mean, variance = (out[part, row, column, feature].item() for part in (0, 1))
                    total += 0.5 * (math.log(variance) + (truth - mean) ** 2 / variance)
                else:
                    off = out[row, column, feature].item() - truth
                    total += abs(off) if kind == 'absolute' else off * off
            line.append(total / d)
        table.append(line)
    return table


def expected_frames(out: Tensor, x: Tensor, kind: str, **options: object) -> Expected:
    """The whole equation, for frames."""
    ids = torch.zeros(x.shape[:2], dtype=torch.long)  # no frame is ignored
    return expected(ids, ids, token_loss=frame_costs(out, x, kind), **options)


def differentiable_frames(out: Tensor, x: Tensor, want: Expected, kind: str) -> Tensor:
    """The same loss as a tensor with a graph back to `out`: one frame at a time, each with its share from `want`."""
    terms = [torch.zeros((), dtype=torch.float64)]
    for row, shares in enumerate(want.shares):
        for column, share in enumerate(shares):
            if want.counted[row][column]:
                truth = x[row, column + 1]
                if kind == 'gaussian':
                    mean, variance = out[0, row, column], out[1, row, column]
                    costs = 0.5 * (variance.log() + (truth - mean) ** 2 / variance)
                else:
                    off = out[row, column] - truth
                    costs = off.abs() if kind == 'absolute' else off * off
                terms.append(share * costs.sum() / len(truth))
    return torch.stack(terms).sum()
