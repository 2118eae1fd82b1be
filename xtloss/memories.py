"""What a network remembers of earlier segments of a row, and which of that is padding.

Dims: b batch, s positions of a segment, h positions of a layer's input (s and memory tokens), m of a memory, d width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Memories(NamedTuple):
    """One memory, and its mask, for each attention layer; None: none, or nothing in them is padding."""

    mems: list[Tensor] | None = None  # (b, m, d) each
    masks: list[Tensor] | None = None  # (b, m) bool each


def memory_arguments(memories: Memories, mask: Tensor | None) -> dict[str, Any]:
    """Return the arguments of the network's forward for a segment with this mask, (b, s).

    Without masks of their own all memories are attended to, whatever `mask` hid when they were made.
    """
    arguments: dict[str, Any] = {'mems': memories.mems}
    if mask is not None:
        arguments['mask'] = mask
    if memories.masks is not None:
        arguments['mem_masks'] = memories.masks
    return arguments


def remember(
    memories: Memories,
    mask: Tensor | None,  # (b, s)
    mems: list[Tensor],  # (b, m, d) each, made of the old ones and of
    hiddens: list[Tensor],  # (b, h, d) each
) -> Memories:
    """Return the memories that a segment with this mask left, given those it had."""
    if mask is None and memories.masks is None:
        return Memories(mems)

    def seen(layer: int, hidden: Tensor) -> Tensor:
        """Make the mask of all that this layer has attended to."""
        b, h, _ = hidden.shape
        here = (
            hidden.new_ones(b, h, dtype=torch.bool) if mask is None else F.pad(mask, (h - mask.shape[1], 0), value=True)
        )
        if memories.masks is not None:
            return torch.cat((memories.masks[layer], here), dim=1)
        return here if memories.mems is None else F.pad(here, (memories.mems[layer].shape[1], 0), value=True)

    masks = [seen(layer, hidden) for layer, hidden in enumerate(hiddens)]
    return Memories(mems, [mask[:, mask.shape[1] - mem.shape[1] :] for mask, mem in zip(masks, mems, strict=True)])
