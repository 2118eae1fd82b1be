"""Whether a network keeps the sequences of a row apart: measured once, and kept beside it."""

import math
from collections.abc import Mapping
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.nn.modules import module as all_modules
from x_transformers.x_transformers import TransformerWrapper

from xtloss.arguments import OF_NETWORK, keywords, refuse_unknown
from xtloss.wrappers.measurement import Leak, measure

LIMIT = 1e-3  # rounding was seen at 2e-4, in looped networks
NOT_MEASURED = Leak(math.inf, takes_short_rows=False)
PARALLEL = ('torch.distributed.fsdp', 'torch.nn.parallel')  # what FSDP and DDP put around modules, or make of them

# beside each network: its structure when it was measured, and what was found, by the names of the arguments
_kept: WeakKeyDictionary[nn.Module, tuple[list[Any], dict[tuple[str, ...], Leak]]] = WeakKeyDictionary()
_one_at_a_time = RLock()  # meanwhile the network holds other weights, which another thread would take for its own


def segment_leak(net: nn.Module, **network_kwargs: Any) -> float:
    """Measure whether sequences that `pack` puts into one row keep apart in this network, as `segment_ids` has them.

    The largest difference, over the standard deviation of the outputs, between a sequence in a shared row and the same
    sequence alone, and of the outputs that may not move when other sequences, or a later token, become others: these
    in training mode too, with gradients on. It runs in float32, on weights shaken by 1/√fan-in, so that what is
    initialised to zero cannot hide. Weights, buffers, modes and random streams are left as they were, but meanwhile no
    other thread may run the network. It costs about a training step on 2,048 tokens, and 4 bytes a parameter.

        >>> segment_leak(net) < 1e-3
        True

    The wrappers refuse packed and unpadded calls of a network from 1e-3 on. They measure once, and anew where a module,
    its class, a hook or a ``forward`` of an instance is another; where something else about the network changed, an
    attribute of a module say, call this again: the wrappers go by its result. Before sharding, too: sharded weights
    cannot be measured, and what was measured before still holds.

    What it cannot see: mixing for one id in thousands, in rows wider than 256 tokens, in larger batches, under
    autocast, after many calls, or in the backward alone.

    Args:
        net: a `TransformerWrapper`, or what is around one. The rows are as wide as it takes, 256 tokens at most.
        **network_kwargs: what its `forward` cannot do without, of a batch of any size, of which the first row is taken:
            `context` (b, m, d), `condition` (b, d) or (b, n, d), `embed_ids` {name: (b, n)}. The rows are as wide as
            arguments of each token are.

    Returns:
        Rounding where it keeps them apart, 1e-5 as a rule; inf where it cannot run on shared rows with these arguments,
        has several heads or pooled tokens, or weights without values.

    Raises:
        TypeError: `net` is no module, or its `forward` does not know an argument.

    """
    if not isinstance(net, nn.Module):
        raise TypeError(f'net must be a torch.nn.Module, got {type(net).__name__}')
    if isinstance(net, TransformerWrapper):
        refuse_unknown('segment_leak()', network_kwargs, OF_NETWORK + keywords(type(net).forward))
    return kept_leak(net, {k: v for k, v in network_kwargs.items() if v is not None}, anew=True).size


def why_not_apart(net: nn.Module, arguments: Mapping[str, Any] | None, *, short_rows: bool) -> str | None:
    """Return why sequences may not share rows, or go into rows as short as they are; None if they may.

    `arguments` are the network's. While a call is compiled it has none: None stands for those that were measured with.
    """
    leak = kept_leak(net, arguments)
    if leak.size < LIMIT:
        too_short = short_rows and not leak.takes_short_rows
        return 'this network cannot take rows as short as a sequence may be' if too_short else None
    found = (
        f'sequences that share a row move each other in this network, by {leak.size:.2g} standard deviations of its '
        f'outputs, of which {LIMIT:g} would be rounding. '
        if math.isfinite(leak.size)
        else 'it could not be measured whether this network keeps the sequences of a row apart: it does not run on '
        'shared rows with these arguments, or its weights are sharded (call segment_leak before) or have no values. '
    )
    ways = 'Change the network until segment_leak(net) is below, or take it on yourself with trust_segments=True'
    return f'{found}The options of the table in the README are the usual causes. {ways}'


def kept_leak(net: nn.Module, arguments: Mapping[str, Any] | None, *, anew: bool = False) -> Leak:
    """Return what was found for a network as it is now, with arguments of these names; measure where nothing was."""
    names = tuple(sorted(arguments or ()))
    with _one_at_a_time:
        before, found = _kept.get(net, ([], {}))
        found = found if before == structure(net) else {}
        leaks = list(found.values())
        parallel = any(type(module).__module__.startswith(PARALLEL) for module in net.modules())
        if parallel or any(hasattr(p, 'placements') for p in net.parameters()):  # sharded: measured before, or never
            arguments = None
            kept = [_kept[module] for module in net.modules() if module in _kept]
            leaks = [leak for _, found in kept for leak in found.values()] or [NOT_MEASURED]
        if arguments is None and leaks:  # the worst of all that was found
            return Leak(max(leak.size for leak in leaks), all(leak.takes_short_rows for leak in leaks))
        if not anew and names in found:
            return found[names]
        leak = measure(net, arguments or {})
        if not math.isinf(leak.size):  # else it may be measured another time, when the weights have values, say
            _kept[net] = structure(net), {**found, names: leak}
        return leak


def structure(net: nn.Module) -> list[Any]:
    """Return what a measurement holds for: each module, its class, its hooks, by number, and a `forward` of its own."""
    found: list[Any] = [tuple(all_modules._global_forward_hooks), tuple(all_modules._global_forward_pre_hooks)]
    for name, module in net.named_modules():
        hooks = tuple(module._forward_hooks), tuple(module._forward_pre_hooks)
        forward = ref(vars(module)['forward']) if 'forward' in vars(module) else None
        found.append((name, ref(module), ref(type(module)), *hooks, forward))
    return found
