"""A rollout, one row at a time and each row alone: the reference for ``rollout_steps``, beside `oracle_continuous`.

Takes nothing from the package under test. The network is run as it is, on rows without padding.
"""

import math
from typing import Any, NamedTuple

import torch
from oracle import Expected
from oracle_continuous import differentiable_frames, expected_frames
from torch import Tensor, nn


class Rollout(NamedTuple):
    """What k steps give, in rows that count; ones elsewhere."""

    starts: list[int]  # how many frames each row reads, 0 where it does not count
    out: Tensor  # (b, k, d) or (2, b, k, d)
    frames: Tensor  # (b, k+1, d), of which the last k are predicted
    loss_mask: Tensor  # (b, k+1) bool, whole rows
    loss_weight: Tensor | None  # (b,) or (b, k+1)


def rolled_out(
    net: nn.Module, x: Tensor, lengths: list[int], steps: int, loss_weight: Tensor | None = None, **row_arguments: Any
) -> Rollout:
    """Draw and predict. `lengths` are the numbers of real frames; `row_arguments` the network's, (b, ...)."""
    b, _, d = x.shape
    draws = torch.rand(b).tolist()
    noise = [torch.randn(b, 1, d) for _ in range(steps)] if net.probabilistic else []

    starts, outs = [0] * b, list(torch.ones(b, *[2] * net.probabilistic, steps, d, dtype=x.dtype))
    frames, weights = torch.ones(b, steps + 1, d, dtype=x.dtype), torch.ones(b, steps + 1, dtype=x.dtype)
    per_frame = loss_weight is not None and loss_weight.ndim == 2
    for row in range(b):
        if lengths[row] <= steps:
            continue
        start = starts[row] = 1 + math.floor(draws[row] * (lengths[row] - steps))
        read, answers = x[row : row + 1, :start], []
        for step in range(steps):
            answer = net(read, **{name: value[row : row + 1] for name, value in row_arguments.items()})[..., -1:, :]
            answers.append(answer)
            if net.probabilistic:
                deviation = torch.where(answer[1] > 1e-5, answer[1], 1e-5).sqrt()
                answer = answer[0] + deviation * noise[step][row]
            read = torch.cat((read, answer), dim=1)
        outs[row] = torch.cat(answers, dim=-2).squeeze(-3)
        frames[row] = x[row, start - 1 : start + steps]
        if per_frame:
            weights[row] = loss_weight[row, start - 1 : start + steps]

    counts = (torch.tensor(starts) > 0)[:, None].expand(b, steps + 1)
    return Rollout(starts, torch.stack(outs, dim=-3), frames, counts, weights if per_frame else loss_weight)


def expected_rollout(rolled: Rollout, kind: str, **options: Any) -> tuple[Expected, Tensor]:
    """The equation over the k frames, as numbers and as a tensor with a graph back to parameters and frames."""
    weight = None if rolled.loss_weight is None else rolled.loss_weight.detach()
    want = expected_frames(rolled.out, rolled.frames, kind, loss_mask=rolled.loss_mask, loss_weight=weight, **options)
    return want, differentiable_frames(rolled.out, rolled.frames, want, kind)
