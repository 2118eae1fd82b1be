"""How far sequences that share a row move each other in a network: a measurement of the whole of it.

Dims: b rows, n positions, f features of an output.
"""

import math
import random
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from x_transformers.x_transformers import TransformerWrapper

from xtloss.arguments import add_row, map_tensors, widened
from xtloss.wrappers.masks import segment_arguments, takes_lengths

ENDS = (0, 3, 4, 6, 11, 21, 41, 81, 161, 256)  # where the sequences of a row end: no row is wider


class Leak(NamedTuple):
    """What a measurement found."""

    size: float  # how far sequences move each other, over the standard deviation of the outputs; inf: it could not run
    takes_short_rows: bool  # whether the network takes rows of every length, down to one token


def measure(net: nn.Module, arguments: Mapping[str, Any]) -> Leak:
    """Measure how far sequences that share a row move each other, with the first row of each argument in every row."""
    modes, buffers = [(module, module.training) for module in net.modules()], dict(net.named_buffers())
    device = next((p.device for p in net.parameters()), torch.device('cpu'))
    try:
        with (
            device,
            torch.inference_mode(False),
            torch.autocast(device.type, enabled=False),
            torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),  # or a checkpoint around counts these
            torch.compiler.set_stance('force_eager'),  # or compiled blocks are compiled anew for these shapes
        ):
            return compare(net, arguments, device)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever the network raises
        pass
    finally:
        for module, training in modes:
            module.training = training
        for name in [name for name, _ in net.named_buffers() if name not in buffers]:  # made by a forward, in float32
            owner, _, attribute = name.rpartition('.')
            setattr(net.get_submodule(owner), attribute, None)
    return Leak(math.inf, takes_short_rows=False)  # here too where autocast swallows the error, as it does in a tracer


def compare(net: nn.Module, arguments: Mapping[str, Any], device: torch.device) -> Leak:
    """Compare outputs that must be equal when every other sequence becomes another, or the rest, or the last tokens.

    In training mode too, with gradients on, as a module may mix in one of them alone. In evaluation each sequence is
    compared with itself in a row of its own as well. There products of another size round otherwise, in TF32 by more
    than a leak that counts: what weights with another last digit change as much is rounding.
    """
    inner: Any = next((m for m in net.modules() if isinstance(m, TransformerWrapper)), net)
    if getattr(inner, 'recycling', False):
        arguments = {'recycle_steps': 2, **arguments}  # evaluation needs a number
    in_one_row = takes_lengths(net)
    b, n = 1 if in_one_row else 2, min(width(arguments) or getattr(inner, 'max_seq_len', 0) or ENDS[-1], ENDS[-1])
    v, draw = getattr(inner, 'num_tokens', 2), torch.Generator().manual_seed(0)
    x = torch.randint(v, (b, n), generator=draw, device='cpu').to(device)
    other = (x + torch.randint(1, max(v, 2), (b, n), generator=draw, device='cpu').to(device)) % v
    spans = [(0, slice(start, min(stop, n))) for start, stop in pairwise(ENDS) if start < n]
    spans += [(1, slice(n - span.stop, n - span.start)) for _, span in spans] * (b - 1)  # from the right
    runs, last = torch.zeros(b, n, dtype=torch.long), torch.zeros(b, n, dtype=torch.bool)
    for k, (row, span) in enumerate(spans):
        runs[row, span], last[row, span.stop - 1] = k, True

    first = {name: map_tensors(partial(of_first_row, name, slice(n)), value) for name, value in arguments.items()}
    every = {name: map_tensors(lambda t: t.expand(b, *t.shape[1:]) if t.ndim else t, t) for name, t in first.items()}
    every, weights = segment_arguments(net, runs, every), shaken(net)
    moved, alone = [], []
    for training in (True, False):
        net.train(training)
        with torch.set_grad_enabled(training):
            shared = outputs(net, weights, x, every)
            for changed in (runs % 2 == 0, runs % 2 == 1, last):
                after = outputs(net, weights, torch.where(changed, other, x), every)
                moved.append(torch.where(changed[..., None], 0, after - shared).abs().max() / shared.std())
    with torch.no_grad():
        nudged = outputs(net, {name: t * (1 + 2**-21) for name, t in weights.items()}, x, every)
        rounding = (4 * (nudged - shared).abs().max() / shared.std()).clamp(max=0.1)
        for row, span in spans:
            given = {name: map_tensors(partial(of_first_row, name, span), value) for name, value in first.items()}
            given = segment_arguments(net, runs[:, span], given) if in_one_row else given
            with suppress(Exception):  # the row may be too short for the network
                found = outputs(net, weights, x[row, span][None], given)[0]
                alone.append((found - shared[row, span]).abs().max() / shared.std())
    apart = torch.stack(alone)
    apart = torch.where(apart <= rounding, apart.clamp(max=1e-4), apart)
    size = torch.stack([*moved, apart.max()]).max().item()
    return Leak(math.inf if math.isnan(size) else size, takes_short_rows=len(alone) == len(spans))


def outputs(net: nn.Module, weights: dict[str, Tensor], x: Tensor, given: dict[str, Any]) -> Tensor:
    """Return all that a network predicts from each token, (b, n, f), from the same buffers and random numbers on."""
    given = {'return_intermediates': True, 'looped_pred_all_logits': True, **given}
    tensors = weights | {name: as_float32(t) for name, t in net.named_buffers()}
    others = list({p.device for p in net.parameters() if p.device.type != 'cpu'})
    state = random.getstate()
    try:
        with torch.random.fork_rng(others, device_type=others[0].type if others else 'cuda'):
            logits, hiddens = functional_call(net, tensors, (x,), given)
    finally:
        random.setstate(state)
    loops = [getattr(hiddens, name, None) or [] for name in ('all_pred_logits', 'exit_logits')]
    found = [logits, *loops[0], *loops[1]]
    if getattr(hiddens, 'attn_pooled_tokens', None) is not None or any(t.shape[:2] != x.shape for t in found):
        raise ValueError('there are outputs that belong to no token')
    return torch.cat([t.detach().float().reshape(*x.shape, -1) for t in found], dim=-1)


def as_float32(t: Tensor) -> Tensor:
    """Return a copy without a graph, float32 where it is floating point."""
    t = t.detach().clone()
    return t.float() if t.is_floating_point() else t


def shaken(net: nn.Module) -> dict[str, Tensor]:
    """Return float32 copies of a network's weights, shaken by 1/√fan-in: where they are zero, nothing would be seen."""
    weights, draw = {}, torch.Generator().manual_seed(0)
    for name, p in net.named_parameters():
        if type(p) in (Tensor, nn.Parameter) and p.is_floating_point():  # others, quantized ones say, stay as they are
            fan_in = max(p.shape[1:].numel() if p.ndim > 1 else p.numel(), 1)
            noise = torch.randn(p.shape, generator=draw, dtype=torch.float32, device='cpu').to(p.device)
            weights[name] = new = as_float32(p)
            new += (noise if p.ndim > 1 else noise.abs().copysign(new)) / fan_in**0.5  # scales keep their sign
            new.requires_grad_(p.requires_grad)
    return weights


def is_per_token(name: str, t: Tensor) -> bool:
    """Tell whether an argument is one of each token, (b, n, ...), and not of each row, (b, ...)."""
    return t.ndim > 1 and not name.startswith('context') and (name not in ('condition', 'in_attn_cond') or t.ndim == 3)


def width(arguments: Mapping[str, Any]) -> int:
    """Return how many tokens wide the arguments are; 0 where there is none of each token."""
    for name, value in arguments.items():
        for t in value.values() if isinstance(value, dict) else [value]:
            if isinstance(t, Tensor) and is_per_token(name, t):
                return t.shape[-1] if name == 'attn_mask' else t.shape[1]
    return 0


def of_first_row(name: str, span: slice, t: Tensor) -> Tensor:
    """Return the part of an argument for some tokens of the first row; masks hide nothing, what is not finite is 0."""
    t = add_row(t)
    t = torch.ones_like(t) if t.dtype == torch.bool else widened(as_float32(t))
    t = torch.nan_to_num(t, posinf=0, neginf=0) if t.is_floating_point() else t
    if name == 'attn_mask':  # (n, n), (h, n, n) or (b, h, n, n) -> (1, h or 1, span, span)
        return t.reshape(-1, *(t.shape[-3:] if t.ndim > 2 else (1, *t.shape)))[:1, ..., span, span]
    t = t[:1] if t.ndim else t
    return t[:, span] if is_per_token(name, t) else t
