"""Rollout: a network of frames reads the beginning of each row, then predicts k frames, each from those it predicted.

Dims: b batch, n positions, d features, k steps; the network's output may be a mean and a variance, (2, b, n, d).
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xtloss.arguments import OF_LOSS
from xtloss.weighting.targets import Targets, real_positions


def count_rollout(x: Tensor, steps: int, loss_mask: Tensor | None, **real: Any) -> Targets:
    """Count the k frames predicted, (b, k), in each row of more than k real frames; known before any is drawn."""
    counted = real_positions(x, **real).sum(dim=1, keepdim=True) > steps  # (b, 1)
    if loss_mask is not None:  # of the row that stands in for none
        counted = counted & loss_mask.any()
    lengths = steps * counted
    return Targets(counted.expand(-1, steps), lengths.expand(-1, steps), lengths)


def roll_out(
    net: nn.Module, x: Tensor, targets: Targets, given: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw the frames of x, (b, n, d), to predict, and predict them; `given` is what the wrapper's forward was given.

    ::

        c = 1 + floor(u · (length - k))    u = torch.rand(b), for every row, before anything else is drawn
        out[:, s] = net(x[:c], frame[0], ..., frame[s - 1])[-1]                          s = 0 … k-1, in each row
        frame[s] = out[:, s], or mean + √max(variance, 1e-5) · ε                 ε = torch.randn(b, 1, d) a step

    Every frame read lies where the row has it, so positions count from 0; what lies after it is 0, and must not matter,
    as in any causal network. Rows are padded right: one whose `mask` has a real frame after padding is read as NaN, as
    a mask's values cannot be checked without a stall, and a loss of NaN is seen.

    Returns the outputs that predict the k frames, (b, k, d) or (2, b, k, d), or those of one step, which broadcast to
    them, where no row is long enough; x and loss_weight of the last frame read and the k after it, (b, k+1, ...).
    """
    arguments = {name: value for name, value in given.items() if name not in OF_LOSS and name != 'mask'}
    real, loss_weight = real_positions(x, lens=given.get('lens'), mask=given.get('mask')), given.get('loss_weight')
    steps = targets.counted.shape[1]
    spare = (real.sum(dim=1) - steps).clamp(min=0)  # (b,)
    first = 1 + (torch.rand(len(x), device=x.device) * spare).floor().long()  # (b,), c: the first frame predicted

    resumes = (real[:, 1:] & ~real[:, :-1]).any(dim=1)
    x = x.masked_fill(resumes[:, None, None], torch.nan)
    if loss_weight is not None and loss_weight.ndim == 2:
        loss_weight = frames_from(loss_weight, first, steps)

    # a row that does not count reads zeros, also later: what it would predict from its own predictions may overflow
    n, rows = x.shape[1], torch.arange(len(x), device=x.device)[:, None]
    begin, counted = first[:, None], targets.counted[:, :1]  # (b, 1)
    i = torch.arange(max(1, n - steps), device=x.device)  # no row begins with more frames than these
    read = torch.where((counted & (i < begin))[..., None], x[:, : len(i)], 0)
    outs = []
    for step in range(steps if n > steps else 1):
        out = net(read, **arguments)[..., rows, begin + step - 1, :]  # (b, 1, d), or a mean and a variance of it
        outs.append(out)
        if out.ndim == 3:
            frame = out
        else:  # drawn by mean and deviation, so that gradients reach both
            frame = out[0] + out[1].clamp(min=1e-5).sqrt() * torch.randn(out[0].shape, device=out.device)
        if frame.shape[-1] != x.shape[-1]:  # which might be broadcast
            raise ValueError(f'net must predict the {x.shape[-1]} features that it reads, got {frame.shape[-1]}')
        frame = torch.where(counted[..., None], frame.to(x.dtype), 0)
        i = torch.arange(read.shape[1] + 1, device=x.device)
        read = torch.where((i == begin + step)[..., None], frame, F.pad(read, (0, 0, 0, 1)))
    return torch.cat(outs, dim=-2), frames_from(x, first, steps), loss_weight


def frames_from(t: Tensor, first: Tensor, steps: int) -> Tensor:
    """(b, n, ...) -> (b, k+1, ...): the frame before the first one predicted, and the k predicted, as in any row."""
    i = first[:, None] - 1 + torch.arange(steps + 1, device=t.device)  # (b, k+1)
    return t[torch.arange(len(t), device=t.device)[:, None], i.clamp(max=t.shape[1] - 1)]
