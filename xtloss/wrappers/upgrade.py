"""Turn the wrappers inside an existing model into ours, in place."""

import warnings
from types import SimpleNamespace
from typing import Any, TypeVar

import x_transformers
from torch import nn

from xtloss.wrappers.autoregressive import AutoregressiveWrapper
from xtloss.wrappers.base import check_options, set_options
from xtloss.wrappers.continuous import ContinuousAutoregressiveWrapper
from xtloss.wrappers.xl import XLAutoregressiveWrapper

M = TypeVar('M', bound=nn.Module)

UPGRADES: dict[type[nn.Module], type[nn.Module]] = {
    x_transformers.AutoregressiveWrapper: AutoregressiveWrapper,
    x_transformers.ContinuousAutoregressiveWrapper: ContinuousAutoregressiveWrapper,
    x_transformers.XLAutoregressiveWrapper: XLAutoregressiveWrapper,
}
WEIGHTING = {'equal_loss_weight_batch': False, 'loss_weighting': None}
OPTIONS = (*WEIGHTING, 'fused', 'unpad', 'trust_segments')


def upgrade_(module: M, **options: Any) -> M:
    """Turn every wrapper of x-transformers in a module, itself included, into ours. In place; returns the module.

    Only class and options change (and a tied head, which then follows copies): parameters, buffers, state_dict, hooks,
    device, dtype and training flag stay, so an optimizer goes on, and checkpoints of before and after fit both.

        >>> model = upgrade_(model, equal_loss_weight_batch=True)  # of an XTransformer, say
        >>> type(model.decoder)
        <class 'xtloss.wrappers.autoregressive.AutoregressiveWrapper'>

    A parent whose ``forward`` takes no ``normalizer`` (or ``loss_weight``, ...) is driven through its parts:
    ``model.decoder(tgt, context=..., context_mask=..., normalizer=Z)``. A second call changes the options that are
    given; ``equal_loss_weight_batch`` and ``loss_weighting`` are one choice, and giving either makes it anew.

    - Exact classes of x-transformers only: a subclass may rely on the loss it inherits, and is named by a UserWarning.
    - Before ``fully_shard``, which makes what it shards a subclass, and before accelerate's ``prepare`` with mixed
      precision or ``wrapper.forward = torch.compile(wrapper.forward)``, whose forward would go on: ValueError.

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
    planned: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
    left_alone: list[str] = []
    for path, wrapper in module.named_modules():
        name = f'{path or "the module itself"} ({type(wrapper).__name__})'
        ours = UPGRADES.get(type(wrapper), type(wrapper))
        if ours in UPGRADES.values():
            planned.append((wrapper, ours, new_options(name, wrapper, ours, options)))
        elif isinstance(wrapper, tuple(UPGRADES)):
            left_alone.append(name)

    subclasses = f'subclasses are left alone: {", ".join(left_alone)}' if left_alone else ''
    if not planned:
        found = type(module).__name__ + (subclasses and f'; {subclasses}')
        raise ValueError(f'module must hold a wrapper of x-transformers, got {found}')
    for wrapper, ours, chosen in planned:
        wrapper.__class__ = ours
        set_options(wrapper, **chosen)
    if subclasses:
        warnings.warn(subclasses, UserWarning, stacklevel=2)
    return module


def new_options(name: str, wrapper: nn.Module, ours: type[nn.Module], options: dict[str, Any]) -> dict[str, Any]:
    """Return all options of a wrapper, those it has and those given; or raise as its constructor would."""
    has = [option for option in OPTIONS if hasattr(ours, option)]
    for option in options:
        if option not in has:
            raise ValueError(f'{option} is no option of {name}: it has {", ".join(has)}')
    if type(wrapper) is not ours and 'forward' in vars(wrapper):
        raise ValueError(f'{name} has a forward of its own, which would go on as it is: upgrade it before')

    chosen = {option: getattr(wrapper, option, getattr(ours, option)) for option in has}
    if options.keys() & WEIGHTING.keys():
        chosen |= WEIGHTING
    chosen |= options
    check_options(SimpleNamespace(**chosen))
    return chosen
