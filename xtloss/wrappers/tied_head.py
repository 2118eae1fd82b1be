"""The head of a network with `tie_embedding`: a lambda of x-transformers that reads the embedding of one network.

`copy.deepcopy` copies functions by reference, so the head of a copy reads the embedding of the original.
"""

from __future__ import annotations

import warnings
from types import CellType, FunctionType
from typing import Any

from torch import nn
from x_transformers.x_transformers import TransformerWrapper


def reads_another_network(net: Any) -> bool:
    """Whether the head of `net` is tied, but to the embedding of another network."""
    head = vars(net).get('to_logits')
    return (
        type(head) is FunctionType
        and head.__module__ == TransformerWrapper.__module__
        and head.__qualname__ == f'{TransformerWrapper.__init__.__qualname__}.<locals>.<lambda>'
        and head.__code__.co_freevars == ('self',)
        and head.__closure__ is not None
        and head.__closure__[0].cell_contents is not net
    )


def rebind_tied_heads(module: nn.Module) -> None:
    """Give each copied network in a module a head of its own, where it has that of the original."""
    for net in module.modules():
        if reads_another_network(net):
            head: Any = net.to_logits
            own: Any = FunctionType(head.__code__, head.__globals__, head.__name__, head.__defaults__, (CellType(net),))
            own.__qualname__ = head.__qualname__
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
