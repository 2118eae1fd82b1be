"""The head of a network with `tie_embedding`: a lambda of x-transformers that reads the embedding of one network.

`copy.deepcopy` copies functions by reference, so the head of a copy reads the embedding of the original.
"""

from __future__ import annotations

import warnings
from types import CellType, FunctionType
from typing import Any

from torch import nn

from xtloss.losses.linear_head import tied_network


def reads_another_network(net: nn.Module) -> bool:
    """Whether the head of `net` is tied, but to the embedding of another network."""
    tied = tied_network(net)
    return tied is not None and tied is not net


def rebind_tied_heads(module: nn.Module) -> None:
    """Give each copied network in a module a head of its own, where it has that of the original."""
    for net in module.modules():
        if reads_another_network(net):
            head: Any = net.to_logits
            own: Any = FunctionType(head.__code__, head.__globals__, head.__name__, head.__defaults__, (CellType(net),))
            own.__qualname__ = head.__qualname__  # before Python 3.11, the code does not know it
            net.to_logits = own


def warn_of_foreign_head(net: Any) -> None:
    """Warn once, where a wrapper gets a network that was copied without one."""
    if reads_another_network(net):
        warnings.warn(
            'net is a copy of a network with tie_embedding, and its head still reads the embedding of the original: '
            'copy the wrapper instead of the network, or build the network anew and load its state_dict',
            UserWarning,
            stacklevel=4,
        )
