"""How far sequences that share a row move each other in a network: a measurement of the whole of it.

Dims: b rows, n positions, f features of an output.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from x_transformers.x_transformers import TransformerWrapper

from xtloss.tensors import map_tensors, widened
from xtloss.wrappers.masks import segment_arguments, takes_lengths

WIDEST = 256


class Leak(NamedTuple):
    """What a measurement found."""

    size: float
    """How far sequences move each other, over the standard deviation of the outputs; inf where it could not run."""
    takes_short_rows: bool
    """Whether the network takes rows of every length, down to one token."""


def measure(net: nn.Module, arguments: Mapping[str, Any]) -> Leak:
    """Measure how far sequences that share a row move each other; the network and all random streams stay as they were.

    `arguments` are those of the network, for any batch: the first row of each tensor goes to every row.
    """
    modes, buffers = [(module, module.training) for module in net.modules()], dict(net.named_buffers())
    devices = {p.device for p in net.parameters()} or {torch.device('cpu')}
    device = next(iter(devices))
    try:
        with (
            device,
            torch.inference_mode(False),
            torch.autocast(device.type, enabled=False),
            torch.compiler.set_stance('force_eager'),  # else compiled blocks are compiled anew for these shapes
        ):
            return compare(net, arguments, device, partial(network_outputs, net, shaken(net), buffers, devices))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever the network raises
        return Leak(math.inf, takes_short_rows=False)
    finally:
        for module, training in modes:
            module.training = training
        for name in [name for name, _ in net.named_buffers() if name not in buffers]:  # made by a forward, in float32
            owner, _, attribute = name.rpartition('.')
            setattr(net.get_submodule(owner), attribute, None)


def compare(net: nn.Module, arguments: Mapping[str, Any], device: torch.device, outputs: Callable[..., Tensor]) -> Leak:
    """Compare outputs that must be equal.

    Every other sequence becomes another, then the rest, then the last token of each, and what these may not move is
    looked at: in evaluation, and in training mode with gradients on, as a module may mix in one of them alone. In
    evaluation each sequence is compared with itself in a row of its own, too.
    """
    inner: Any = next((m for m in net.modules() if isinstance(m, TransformerWrapper)), net)
    if getattr(inner, 'recycling', False):
        arguments = {'recycle_steps': 2, **arguments}  # evaluation needs a number
    in_one_row = takes_lengths(net)
    b, n = 1 if in_one_row else 2, width(arguments) or min(getattr(inner, 'max_seq_len', 0) or WIDEST, WIDEST)
    v, draw = getattr(inner, 'num_tokens', 2), torch.Generator(device).manual_seed(0)
    x = torch.randint(v, (b, n), generator=draw)
    other = (x + torch.randint(1, max(v, 2), (b, n), generator=draw)) % v
    spans = [(row, span) for row in range(b) for span in sequence_spans(n, backwards=row == 1)]
    runs, last = torch.zeros(b, n, dtype=torch.long), torch.zeros(b, n, dtype=torch.bool)
    for k, (row, span) in enumerate(spans):
        runs[row, span], last[row, span.stop - 1] = k, True

    every = {name: map_tensors(partial(spread, name, b), value) for name, value in arguments.items()}
    moved: list[Tensor] = []
    alone: list[Tensor] = []
    for training in (False, True):
        net.train(training)
        with torch.set_grad_enabled(training):
            shared = outputs(x, segment_arguments(net, runs, every))
            for changed in (runs % 2 == 0, runs % 2 == 1, last):
                after = outputs(torch.where(changed, other, x), segment_arguments(net, runs, every))
                moved.append(torch.where(changed[..., None], 0, after - shared).abs().max() / shared.std())
            for row, span in [] if training else spans:
                given = {name: map_tensors(partial(cut, name, span), value) for name, value in every.items()}
                if in_one_row:
                    given = segment_arguments(net, runs[:1, span] * 0, given)
                with suppress(Exception):  # the row may be too short for the network
                    found = outputs(x[row, span][None], given)[0]
                    alone.append((found - shared[row, span]).abs().max() / shared.std())
    size = torch.stack([*moved, torch.stack(alone).max()]).max().item()
    return Leak(math.inf if math.isnan(size) else size, takes_short_rows=len(alone) == len(spans))


def network_outputs(
    net: nn.Module,
    weights: dict[str, Tensor],
    buffers: dict[str, Tensor],
    devices: Iterable[torch.device],
    x: Tensor,  # (b, n)
    given: dict[str, Any],
) -> Tensor:
    """Return all that a network predicts from each token, (b, n, f) float32, with other weights.

    It always begins with the same random numbers and buffers, whatever it does with them.
    """
    given = {'return_intermediates': True, 'looped_pred_all_logits': True, **given}
    copies = {name: as_float32(t) for name, t in buffers.items()}
    with kept_random_streams(devices):
        logits, hiddens = functional_call(net, weights | copies, (x,), given)
    loops = [getattr(hiddens, name, None) or [] for name in ('all_pred_logits', 'exit_logits')]
    found = [logits, *loops[0], *loops[1]]
    if getattr(hiddens, 'attn_pooled_tokens', None) is not None or any(t.shape[:2] != x.shape for t in found):
        raise ValueError('there are outputs that belong to no token')
    return torch.cat([t.detach().float().reshape(*x.shape, -1) for t in found], dim=-1)


# weights and random numbers


def as_float32(t: Tensor) -> Tensor:
    """Return a copy without a graph, float32 where it is floating point."""
    t = t.detach().clone()
    return t.float() if t.is_floating_point() else t


def shaken(net: nn.Module) -> dict[str, Tensor]:
    """Return float32 copies of a network's weights, shaken by 1/√fan-in: where they are zero, nothing would be seen.

    Weights of other classes, quantized ones say, stay as they are.
    """
    draws: dict[torch.device, torch.Generator] = {}
    weights = {}
    for name, p in net.named_parameters():
        if type(p) in (Tensor, nn.Parameter):
            new = as_float32(p)
            if new.is_floating_point():
                draw = draws.setdefault(p.device, torch.Generator(p.device).manual_seed(0))
                fan_in = p.shape[1:].numel() if p.ndim > 1 else p.numel()
                noise = torch.randn(p.shape, generator=draw, device=p.device, dtype=torch.float32)
                noise = noise if p.ndim > 1 else noise.abs().copysign(new)  # scales keep their sign
                new += noise / max(fan_in, 1) ** 0.5
            weights[name] = new.requires_grad_(p.requires_grad)
    return weights


@contextmanager
def kept_random_streams(devices: Iterable[torch.device]) -> Iterator[None]:
    """Put the random streams of Python, of the CPU and of other devices back as they were."""
    others = [device for device in devices if device.type not in ('cpu', 'meta')]
    state = random.getstate()
    try:
        with torch.random.fork_rng(others, device_type=others[0].type if others else 'cuda'):
            yield
    finally:
        random.setstate(state)


# rows


def sequence_spans(n: int, *, backwards: bool) -> list[slice]:
    """Cut n positions into sequences of 3, 1, 2, 5, 10, 20, ... tokens, from the left or from the right."""
    ends = [0, 3, 4, 6]
    while ends[-1] < n:
        ends.append(ends[-1] + 5 * 2 ** (len(ends) - 4))
    ends = sorted({min(end, n) for end in ends})
    return [slice(n - stop, n - start) if backwards else slice(start, stop) for start, stop in pairwise(ends)]


def is_per_token(name: str, t: Tensor) -> bool:
    """Tell whether an argument is one of each token, (b, n, ...), and not of each row, (b, ...)."""
    of_rows = name.startswith('context') or (name in ('condition', 'in_attn_cond') and t.ndim == 2)
    return t.ndim > 1 and not of_rows


def width(arguments: Mapping[str, Any]) -> int:
    """Return how many tokens wide the arguments are; 0 where there is none of each token."""
    for name, value in arguments.items():
        for t in value.values() if isinstance(value, Mapping) else [value]:
            if isinstance(t, Tensor) and is_per_token(name, t):
                return t.shape[-1] if name == 'attn_mask' else t.shape[1]
    return 0


def spread(name: str, b: int, t: Tensor) -> Tensor:
    """Return an argument with its first row in each of b rows.

    What it holds at padding must not decide: masks hide nothing, and what is not finite is 0.
    """
    t = torch.ones_like(t) if t.dtype == torch.bool else widened(as_float32(t))
    t = torch.nan_to_num(t, posinf=0, neginf=0) if t.is_floating_point() else t
    if t.ndim == 0 or (name == 'attn_mask' and t.ndim < 4):
        return t
    first = t[:1] if len(t) else t.new_zeros(1, *t.shape[1:])
    return first.expand(b, *t.shape[1:])


def cut(name: str, span: slice, t: Tensor) -> Tensor:
    """Return the part of an argument that is for some tokens of one row; all rows are alike."""
    if name == 'attn_mask':
        return (t[:1] if t.ndim == 4 else t)[..., span, span]
    t = t[:1] if t.ndim else t
    return t[:, span] if is_per_token(name, t) else t
