"""What the network reads: ids that are legal everywhere, and which keys of its attention are real.

Dims: b batch, n positions, d features, k keys.
"""

from __future__ import annotations

from functools import reduce
from operator import and_

import torch
import torch.nn.functional as F
from torch import Tensor


def legal_ids(
    x: Tensor,  # (b, n)
    *,
    ignore_index: int,
    pad_value: int,
    real: Tensor,  # (b, n) bool
) -> Tensor:
    """x with `pad_value` for ignored tokens and padding, whose ids may be anything."""
    return x.masked_fill((x == ignore_index) | ~real, pad_value)


def random_key_mask(real: Tensor, mask_prob: float) -> Tensor:
    """(b, n) bool, False at a random `mask_prob` of the keys of each row, never at the first, or the first real one.

    Liu et al., FCM: Forgetful Causal Masking, 2022, https://arxiv.org/abs/2210.13432. Draws the random numbers upstream
    draws.
    """
    n = real.shape[1]
    noise = torch.randn(real.shape, device=real.device)
    noise[:, 0] = -torch.finfo(noise.dtype).max
    hidden = noise.topk(min(int(n * mask_prob), n - 1), dim=-1).indices
    is_first = real & (real.cumsum(dim=1) == 1)
    return torch.ones_like(real).scatter(1, hidden, False) | is_first


def join_keys(masks: list[Tensor | None]) -> Tensor | None:
    """(b, k) bool, the keys that all of these masks show; each ends where the row ends. None if there is none."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    k = max([mask.shape[1] for mask in given])
    padded = [mask if mask.shape[1] == k else F.pad(mask, (k - mask.shape[1], 0), value=True) for mask in given]
    return reduce(and_, padded)
