"""Whether a network keeps the sequences of a row apart: what is x-transformers' own is compared, the rest is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as every_module
from x_transformers.attend import Attend
from x_transformers.x_transformers import AbsolutePositionalEmbedding, AttentionLayers, TransformerWrapper

from xtloss.packing.asking import OUTER, ask
from xtloss.packing.experiment import ALONE, SHARDING, bare, neutral, wrapped, written_in
from xtloss.packing.known_networks import (
    LIBRARIES,
    is_upstream,
    option_of,
    owner_of,
    strange,
    uses_varlen,
    why_not_together,
)
from xtloss.tracing import constant

AROUND = (*SHARDING, 'torch.nn.utils', 'torch.utils', 'torch.fx')  # whose hooks and subclasses move no token
HOOK = ' with a hook'


class Verdict(NamedTuple):
    """Whether a network keeps sequences apart, and by what."""

    reason: str | None  # the option or module that is not known to, if there is one
    varlen: bool  # by flash-attn's variable-length function, else by masks
    absolute: bool  # its embedding takes positions


# what every module has, and no verdict depends on
SAME = vars(nn.Module()).keys() - {'_parameters', '_buffers', '_modules', '_forward_hooks', '_forward_pre_hooks'}
_verdicts: WeakKeyDictionary[nn.Module, tuple[list[Callable[[], Any]], Verdict]] = WeakKeyDictionary()


@constant
def trusted(net: nn.Module) -> Verdict:
    """Return the verdict on a network that is not judged."""
    inner = inner_network(net)
    varlen = any(uses_varlen(module) for module in net.modules() if isinstance(module, Attend))
    return Verdict(None, varlen, isinstance(bare(getattr(inner or net, 'pos_emb', None)), AbsolutePositionalEmbedding))


@constant
def verdict(net: nn.Module) -> Verdict:
    """Judge a network, anew whenever one of the objects that it consists of is another."""
    with ALONE:  # else another thread would take what an experiment puts there for what the network consists of
        state = parts(net)
        kept, judged = _verdicts.get(net, ([], None))
        if judged is None or len(kept) != len(state) or any(old() is not new for old, new in zip(kept, state)):  # noqa: B905
            judged = judge(net)
            if all(is_concrete(part) for part in state if isinstance(part, Tensor)):
                _verdicts[net] = [hold(part) for part in state], judged
        return judged


def judge(net: nn.Module) -> Verdict:
    """Judge a network now."""
    inner = inner_network(net)
    with neutral():
        reason = f'a {type(net).__name__} instead of a TransformerWrapper' if inner is None else why_not(net, inner)
    return trusted(net)._replace(reason=reason)


def inner_network(net: nn.Module) -> TransformerWrapper | None:
    """Return the network of x-transformers inside whatever is around it."""
    return next((module for module in net.modules() if isinstance(module, TransformerWrapper)), None)


def parts(module: nn.Module) -> list[Any]:
    """Return every object on which the verdict of a module depends: classes, forwards, attributes, weights, hooks."""
    found = [*every_module._global_forward_hooks.values(), *every_module._global_forward_pre_hooks.values()]
    for m in module.modules():
        found += type(m), type(m).forward
        for name, value in vars(m).items():
            if name not in SAME:
                spread(value, found)
    return found


def spread(value: Any, found: list[Any], depth: int = 4) -> None:
    """Append what is inside a container, short ones only, which may change in place; anything else as it is."""
    if isinstance(value, dict | list | tuple) and len(value) < 1000 and depth:
        for part in value.values() if isinstance(value, dict) else value:
            spread(part, found, depth - 1)
    else:
        found.append(... if value is None else value)  # a dead reference is None


def hold(part: Any) -> Callable[[], Any]:
    """Return a function that returns a part while it lives. Only what takes no weak reference, numbers say, is kept."""
    try:
        return ref(part)
    except TypeError:
        return lambda: part


def is_concrete(t: Tensor) -> bool:
    """Whether a tensor is one that a verdict can be kept of: not meta, fake, nor a transform's."""
    wrapper = torch._C._functorch.is_functorch_wrapped_tensor(t) or torch._is_functional_tensor(t)
    return not (t.is_meta or wrapper or isinstance(t, FakeTensor))


def why_not(net: nn.Module, inner: TransformerWrapper) -> str | None:
    """Return which option or module is not known to keep sequences apart; None if there is none."""
    layers = next(module for module in inner.modules() if isinstance(module, AttentionLayers))
    blocks = zip(layers.layers, layers.layer_types, strict=True)
    places = dict(walk(net, {id(block) for (_, block, _), kind in blocks if kind != 'f'}))

    odd = strange([module for module, place in places.items() if is_upstream(module) or place.foreign is None])
    own = {trait: module for trait, module in odd.items() if is_upstream(module)}
    if own:
        trait, module = next(iter(own.items()))
        named = next(filter(None, map(option_of, own)), None)
        return named or f'{places[module].path} {trait.owner.__qualname__} {trait.attribute}'.strip()
    if reason := why_not_together(inner, layers):
        return reason

    asked = {m: place for m, place in places.items() if place.foreign is not None}
    asked |= {m: places[m]._replace(foreign=f' {t.attribute}'.rstrip()) for t, m in odd.items()}
    answers: dict[Any, Tensor | None] = {}
    leaks: dict[str, Tensor] = {}
    for module, place in asked.items():
        if all(map(is_concrete, [*module.parameters(), *module.buffers()])):
            name = f'{place.path or "the network"} {type(module).__name__}{place.foreign or ""}'
            key = (place.masked, *map(likeness, parts(module)))
            if key not in answers:
                answers[key] = ask(module, net, masked=place.masked, hooked=place.foreign == HOOK)
            if (found := answers[key]) is None:
                return name
            leaks[name] = found.cpu()
    measured = torch.stack(list(leaks.values())).tolist() if leaks else []
    for name, (seen, moved) in zip(leaks, measured, strict=True):
        if not (seen < 1e-4 and moved < 3e-2):  # half precision inside, in another shape, rounds otherwise
            return name
    return None


class Place(NamedTuple):
    """Where a module is in a network."""

    path: str
    foreign: str | None  # what about it is neither x-transformers' nor torch's own, '' for its class
    masked: bool  # whether it is handed the mask


def walk(net: nn.Module, takes_mask: set[int]) -> Iterator[tuple[nn.Module, Place]]:
    """Yield the modules through which tokens go, those inside of foreign ones too, and not torch's own wrappers."""

    def inside(module: nn.Module, path: str, masked: bool, foreign: bool) -> Iterator[tuple[nn.Module, Place]]:
        foreign = foreign and not isinstance(module, OUTER)
        masked = masked or id(module) in takes_mask or any(isinstance(m, AttentionLayers) for m in module.modules())
        block, why = wrapped(module), None if foreign else what_is_foreign(module)
        if block is not None and why is None:
            yield from inside(block, path, masked, foreign)
            return
        if is_upstream(module) or not foreign:
            yield module, Place(path, why, masked)
        for name, child in module.named_children():
            if name != 'parametrizations':  # of weights
                whole = foreign or (why is not None and not is_upstream(module))
                yield from inside(child, f'{path}.{name}'.strip('.'), False, whole)

    return inside(net, '', False, False)


def what_is_foreign(module: nn.Module) -> str | None:
    """Say what about a module is not x-transformers', nor torch's, own; '' for its class, None for nothing."""
    if type(module).forward is nn.Module.forward:  # a list, which is not called
        return None
    hooks = [every_module._global_forward_hooks, every_module._global_forward_pre_hooks]
    hooks += [module._forward_hooks, module._forward_pre_hooks]
    if not all(written_in(hook, AROUND) for known in hooks for hook in known.values()):
        return HOOK
    if wrapped(module) is not None:
        return None
    if 'forward' in vars(module):
        return ' with another forward'
    owner = owner_of(module)
    if owner is nn.Module or not written_in(vars(owner)['forward'], LIBRARIES):
        return ''
    for cls in type(module).__mro__[: type(module).__mro__.index(owner)]:
        overrides = {name for name in vars(cls) if name == '__call__' or not name.startswith('__')} & set(dir(owner))
        if overrides and not written_in(cls, AROUND):
            return ''
    special = len(getattr(module, 'normalized_shape', ' ')) > 1 or any(map(is_special, module._parameters.values()))
    return '' if special else None


def is_special(p: Tensor | None) -> bool:
    """Whether a parameter is of a class that may compute otherwise (quantized), and not merely sharded."""
    return p is not None and is_concrete(p) and type(p) not in (Tensor, nn.Parameter) and not hasattr(p, 'placements')


def likeness(part: Any) -> Any:
    """Return what two modules that answer alike have in common: all, but for which weights and children they have."""
    if isinstance(part, nn.Parameter):
        return type(part), part.shape, part.dtype
    if isinstance(part, nn.Module):
        return type(part)
    return part if isinstance(part, bool | int | float | str) else id(part)
