"""Runs of equal ids in a row: their numbers, masks and positions.

Dims: b batch, n positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def run_numbers(segment_ids: Tensor) -> Tensor:
    """(b, n) integer -> (b, n) int64: which run of equal ids of its row each position lies in, from 0."""
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    return F.pad(starts.cumsum(dim=-1), (1, 0))


def positions_in_run(run: Tensor) -> Tensor:
    """(b, n) run numbers -> (b, n) int64: how far each position is from the start of its run."""
    position = torch.arange(run.shape[1], device=run.device).expand_as(run)
    starts = F.pad(run.diff(dim=-1) > 0, (1, 0))
    return position - torch.where(starts, position, 0).cummax(dim=-1).values


def causal_mask(run: Tensor) -> Tensor:
    """(b, n) run numbers -> (b, 1, n, n) bool: True where a position sees another, an earlier one of its own run."""
    return (run[:, :, None] == run[:, None, :]).tril()[:, None]
