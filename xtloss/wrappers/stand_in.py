"""A batch of no rows: one row in which nothing counts stands in for it, so that the loss is 0 and in the graph.

x-transformers cannot run on no rows, and a data-parallel rank that got none must run the network all the same, or the
others wait for it for ever.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xtloss.tensors import map_tensors


def on_rows(loss: Callable[..., Any], wrapper: Any, x: Tensor, given: dict[str, Any]) -> Any:
    """Return what ``loss(wrapper, x, given, has_rows=True)`` returns; of no rows too, though no network runs on them.

    Z is 0 there where no normalizer is given. The row that stands in is taken away again from all that is returned, by
    selection: what lies there does not matter.
    """
    if len(x) > 0:
        return loss(wrapper, x, given, has_rows=True)
    nothing = torch.zeros(1, x.shape[1], dtype=torch.bool, device=x.device)
    rows = {name: map_tensors(add_row, value) for name, value in given.items()}
    rows = {'normalizer': torch.zeros((), device=x.device), **rows, 'loss_mask': nothing}
    returned = loss(wrapper, add_row(x), rows, has_rows=False)
    return map_tensors(lambda t: t[:0] if t.ndim > 0 and t.shape[0] == 1 else t, returned)


def add_row(t: Tensor) -> Tensor:
    """Give a tensor of no rows one: zeros, or True where it is a mask."""
    if t.ndim == 0 or t.shape[0] > 0:
        return t
    return torch.cat([t, t.new_full((1, *t.shape[1:]), t.dtype == torch.bool)])  # in the graph of t
