"""What a network remembers of earlier segments of a row, and which of that is padding.

Dims: b batch, s positions of a segment, h positions of a layer's input (s and memory tokens), m of a memory, d width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from xtloss.checks import check_device, check_dtype
from xtloss.wrappers.inputs import join_keys

OF_LAYERS = {'mems': 'floating point', 'mem_masks': 'bool'}  # arguments that are a tensor, or None, for each layer


class Memories(NamedTuple):
    """A memory for each attention layer, all of the same positions, and which of these are real."""

    mems: list[Tensor] | None = None  # (b, m, d) each
    mask: Tensor | None = None  # (b, m) bool; None: nothing in them is padding


def memory_length(mems: list[Tensor] | None) -> int:
    """How many positions of a memory, the same in all layers, are attended to before the row."""
    return 0 if not mems or mems[0] is None else mems[0].shape[1]


def seen_keys(memories: Memories, mask: Tensor | None, h: int) -> Tensor | None:
    """(b, m + h) bool: what is real of the memories and of a segment with this mask, (b, s); None: all of it."""
    m = memory_length(memories.mems)
    keys = join_keys([F.pad(memories.mask, (0, h), value=True) if memories.mask is not None and m else None, mask])
    return None if keys is None else F.pad(keys, (m + h - keys.shape[1], 0), value=True)


def remember(memories: Memories, mask: Tensor | None, intermediates: Any) -> Memories:
    """Return the memories that a segment with this mask, (b, s), left, given those it had.

    The network returns the ends of what its layers have attended to: their memories and their input, `hiddens`.
    """
    mems = intermediates.mems
    keys = seen_keys(memories, mask, intermediates.hiddens[0].shape[1]) if mems else None
    return Memories(mems, None if keys is None else keys[:, keys.shape[1] - mems[0].shape[1] :])


def check_memory_types(given: Mapping[str, Any]) -> None:
    """Raise TypeError unless the memories handed in, and their masks, are lists of such tensors, or of None."""
    for name, kind in OF_LAYERS.items():
        layers = given.get(name, [])
        if not isinstance(layers, (list, tuple)):
            raise TypeError(f'{name} must be a list of tensors, got {type(layers).__name__}')
        for k, layer in enumerate(layers):
            if layer is not None:
                check_dtype(f'{name}[{k}]', layer, kind)


def check_memory_shapes(given: Mapping[str, Any], x: Tensor) -> None:
    """Raise ValueError unless they are (b, m, d) and (b, m), of one m, beside x."""
    b, m = x.shape[0], None
    for name, rest in {'mems': ', d)', 'mem_masks': ') like mems'}.items():
        for k, layer in enumerate(given.get(name, [])):
            if layer is None:
                continue
            if layer.ndim != (3 if name == 'mems' else 2) or layer.shape[0] != b or m not in (None, layer.shape[1]):
                shape = f'({b}, {"m" if m is None else m}{rest}'
                raise ValueError(f'{name}[{k}] must have shape {shape}, got {tuple(layer.shape)}')
            check_device(f'{name}[{k}]', layer, x.device)
            m = layer.shape[1]
