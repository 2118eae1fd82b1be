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


def remember(memories: Memories, mask: Tensor | None, intermediates: Any) -> Memories:
    """Return the memories that a segment with this mask, (b, s), left, given those it had.

    The network returns the ends of what its layers have attended to: their memories and their input, `hiddens`.
    """
    mems = intermediates.mems
    if mask is None and memories.masks is None:
        return Memories(mems)

    masks = []
    for layer, mem in enumerate(mems):
        b, h, _ = intermediates.hiddens[layer].shape
        seen = mem.new_ones(b, h, dtype=torch.bool)
        if mask is not None:
            seen = F.pad(mask, (h - mask.shape[1], 0), value=True)
        if memories.masks is not None:
            seen = torch.cat((memories.masks[layer], seen), dim=1)
        elif memories.mems is not None:
            seen = F.pad(seen, (memories.mems[layer].shape[1], 0), value=True)
        masks.append(seen[:, seen.shape[1] - mem.shape[1] :])
    return Memories(mems, masks)
