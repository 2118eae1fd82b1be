"""Turn the wrappers inside an existing model into ours, in place."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, TypeVar

import x_transformers
from torch import nn

from xtloss.wrappers.autoregressive import AutoregressiveWrapper
from xtloss.wrappers.base import LossWrapper, check_options, set_options
from xtloss.wrappers.continuous import ContinuousAutoregressiveWrapper
from xtloss.wrappers.xl import XLAutoregressiveWrapper

M = TypeVar('M', bound=nn.Module)


class Upgrade(NamedTuple):
    """A class, what it becomes, and the options it gains, with their defaults."""

    upstream: type[nn.Module]
    ours: type[LossWrapper]
    options: dict[str, Any]


WEIGHTING = {'equal_loss_weight_batch': False, 'loss_weighting': None}
FUSED = {'fused': 'auto'}
ROWS = {'unpad': False, 'trust_segments': False}
UPGRADES = (
    Upgrade(x_transformers.AutoregressiveWrapper, AutoregressiveWrapper, WEIGHTING | FUSED | ROWS),
    Upgrade(x_transformers.ContinuousAutoregressiveWrapper, ContinuousAutoregressiveWrapper, WEIGHTING),
    Upgrade(x_transformers.XLAutoregressiveWrapper, XLAutoregressiveWrapper, WEIGHTING | FUSED),
)


def upgrade_(module: M, **options: Any) -> M:
    """Turn every wrapper of x-transformers in a module, itself included, into ours. In place; returns the module.

    Only class and options change: parameters, buffers, state_dict, hooks, device, dtype and training flag stay, so an
    optimizer goes on, and checkpoints of before and after fit both.

        >>> model = upgrade_(model, equal_loss_weight_batch=True)  # of an XTransformer, say
        >>> type(model.decoder)
        <class 'xtloss.wrappers.autoregressive.AutoregressiveWrapper'>

    A parent whose ``forward`` takes no ``normalizer`` (or ``loss_weight``, ...) is driven through its parts:
    ``model.decoder(tgt, context=..., context_mask=..., normalizer=Z)``.

    A second call changes options: those that are given. ``equal_loss_weight_batch`` and ``loss_weighting`` are one
    choice, and giving either makes it anew.

    - Exact classes of x-transformers only. A subclass may rely on the loss it inherits: it is left alone, and a
      UserWarning names it.
    - Inside ``DistributedDataParallel`` and ``torch.compile`` it works: the former calls whatever class its module is
      of, the latter compiles anew, as the class is one of its guards.
    - A wrapper with a ``forward`` of its own, which ``wrapper.forward = torch.compile(wrapper.forward)`` leaves, and
      accelerate's ``prepare`` with mixed precision, would go on with the loss it had: ValueError. Upgrade it before.
    - FSDP2's ``fully_shard`` makes what it shards a subclass, which is left alone. Upgrade it before.

    Args:
        module: the model.
        **options: ``equal_loss_weight_batch``, ``loss_weighting``; ``fused`` where there are heads; ``unpad`` and
            ``trust_segments`` where all are `AutoregressiveWrapper`.

    Raises:
        TypeError: no module, or an option of the wrong type.
        ValueError: nothing to upgrade, an option that one of the wrappers does not have, a value that its constructor
            refuses, or a wrapper with a ``forward`` of its own. Nothing has changed then.

    """
    if not isinstance(module, nn.Module):
        raise TypeError(f'module must be a torch.nn.Module, got {type(module).__name__}')
    planned: list[tuple[Any, Upgrade, dict[str, Any]]] = []
    left_alone: list[str] = []
    for path, wrapper in module.named_modules():
        name = f'{path or "the module itself"} ({type(wrapper).__name__})'
        upgrade = next((upgrade for upgrade in UPGRADES if type(wrapper) in (upgrade.upstream, upgrade.ours)), None)
        if upgrade is not None:
            planned.append((wrapper, upgrade, new_options(name, wrapper, upgrade, options)))
        elif isinstance(wrapper, tuple(upgrade.upstream for upgrade in UPGRADES)):
            left_alone.append(name)

    subclasses = f'subclasses are left alone: {", ".join(left_alone)}' if left_alone else ''
    if not planned:
        raise ValueError(
            f'module must hold a wrapper of x-transformers, got {type(module).__name__}'
            + (subclasses and f'; {subclasses}')
        )
    for wrapper, upgrade, chosen in planned:
        wrapper.__class__ = upgrade.ours
        set_options(wrapper, **chosen)
    if subclasses:
        warnings.warn(subclasses, UserWarning, stacklevel=2)
    return module


def new_options(name: str, wrapper: nn.Module, upgrade: Upgrade, options: dict[str, Any]) -> dict[str, Any]:
    """Return all options of a wrapper, those it has and those given; or raise as its constructor would."""
    for option in options.keys() - upgrade.options.keys():
        raise ValueError(f'{option} is no option of {name}: it has {", ".join(upgrade.options)}')
    if type(wrapper) is upgrade.upstream and 'forward' in vars(wrapper):
        raise ValueError(f'{name} has a forward of its own, which would go on as it is: upgrade it before')

    current = {option: getattr(wrapper, option, default) for option, default in upgrade.options.items()}
    if options.keys() & WEIGHTING.keys():
        current |= WEIGHTING
    chosen = current | options

    bare = upgrade.ours.__new__(upgrade.ours)  # options and nothing else, to be checked as the constructor does
    vars(bare).update(chosen)
    check_options(bare)
    return chosen
