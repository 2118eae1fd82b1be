"""Experiments that show whether one sequence of a row moves another: on a whole network, or on one module of it.

Dims: b batch, n positions, f features.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ALONE = RLock()  # held by an experiment, which changes modules, and what is global, for a while: one at a time
SHARDING = ('torch.distributed', 'torch.nn.parallel', 'torch._dynamo', 'torch._functorch')


def written_in(code: Any, places: tuple[str, ...]) -> bool:
    """Whether a class, or all of the functions that a call of it goes through, were written in these modules."""
    own = getattr(code if isinstance(code, type) else type(code), '__module__', '')
    module = str(getattr(code, '__globals__', {}).get('__name__', own))  # decorators copy __module__
    within = next((v for k in ('__func__', 'func', '__wrapped__') if (v := getattr(code, k, None)) is not None), None)
    if within is None:
        return module.startswith(places)
    return module.startswith(('builtins', 'functools', 'torch', *places)) and written_in(within, places)


def wrapped(module: nn.Module) -> nn.Module | None:
    """Return the block inside one of torch's own wrappers (checkpoint, compile, FSDP, DDP): they move no token."""
    cls = next(cls for cls in type(module).__mro__ if 'forward' in vars(cls))
    return next(module.children(), None) if cls.__module__.startswith(SHARDING) else None


def bare(module: Any) -> Any:
    """Return what is inside all of torch's own wrappers."""
    while isinstance(module, nn.Module) and (block := wrapped(module)) is not None:
        module = block
    return module


PLAIN = {name: vars(nn.Module)[name] for name in ('__call__', '__getattr__')}  # export patches them


class Constant(TorchDispatchMode):
    """Draws nothing at random: every draw is the same number, so dropout scales and a permutation is none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at every operation."""
        name = func.overloadpacket.__name__
        if 'dropout' in name and torch.Tag.nondeterministic_seeded in func.tags:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        out = func(*args, **(kwargs or {}))
        if re.match('rand|bernoulli|uniform|normal|log_normal|exponential|geometric|cauchy|multinomial|poisson', name):
            out.fill_(0.5)
        return out


@contextmanager
def neutral() -> Iterator[None]:
    """Leave every ambient mode, and bring it back together with the random streams."""
    dtype, python = torch.get_default_dtype(), random.getstate()
    strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    patched = {name: vars(nn.Module)[name] for name in PLAIN}
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with ExitStack() as modes:
        for mode in (
            temporarily_clear_interpreter_stack(), _disable_current_modes(), torch.inference_mode(False),
            torch.no_grad(), torch.autocast('cpu', enabled=False), torch.autocast('cuda', enabled=False),
            torch.device('cpu'), torch.random.fork_rng(devices), warnings.catch_warnings(),
        ):  # fmt: skip
            modes.enter_context(mode)
        try:
            warnings.simplefilter('ignore')
            for name, method in PLAIN.items():
                setattr(nn.Module, name, method)
            torch.set_default_dtype(torch.float32)
            torch.use_deterministic_algorithms(False)
            yield
        finally:
            for name, method in patched.items():
                setattr(nn.Module, name, method)
            torch.set_default_dtype(dtype)
            torch.use_deterministic_algorithms(strict, warn_only=warn)
            random.setstate(python)


def whole_shapes(net: nn.Module) -> dict[tuple[int, str], torch.Size]:
    """Return the shapes of the parameters that FSDP1 has cut and flattened, by module and name."""
    flat = [getattr(getattr(module, '_handle', None), 'flat_param', None) for module in net.modules()]
    return {
        (id(module), name): shape
        for p in flat if p is not None
        for (name, module, *_), shape in zip(p._param_infos, p._shapes, strict=True)
    }  # fmt: skip


@contextmanager
def stand_ins(module: nn.Module, net: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Give a module other weights for a while: shaken by 1/√fan-in, whole where they are sharded; buffers are copies.

    So nothing that it does stays, nothing that is zero hides, and nothing of the weights but their shapes is needed.
    Tensors of other classes (quantized) stay. What shards and compiles is left out; what the user has hooked in is not.
    """
    shapes, draw = whole_shapes(net), torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {}

    def stand_in(owner: nn.Module, name: str, t: Any, *, shake: bool) -> Any:
        if id(t) in memo or not isinstance(t, Tensor):
            return memo.get(id(t), t)
        shape = shapes.get((id(owner), name), t.shape)
        cut = hasattr(t, 'placements') or (id(owner), name) in shapes
        if not cut and type(t) not in (Tensor, nn.Parameter):
            return t
        new = (torch.ones if len(shape) < 2 else torch.zeros)(shape, device=t.device) if cut else t.detach().clone()
        if t.is_floating_point():
            new = new.to(dtype)
            if shake or cut:
                fan_in = shape[1:].numel() if len(shape) > 1 else shape.numel()
                noise = torch.randn(shape, generator=draw).to(new) / max(fan_in, 1) ** 0.5
                new += noise if len(shape) > 1 else noise.abs().copysign(new)  # scales keep their sign
        memo[id(t)] = nn.Parameter(new, requires_grad=False) if isinstance(t, nn.Parameter) else new
        return memo[id(t)]

    before = [(m, dict(vars(m))) for m in module.modules()]
    try:
        for m, saved in before:
            new = {name: stand_in(m, name, t, shake=False) for name, t in saved.items()}
            for kind in ('_parameters', '_buffers'):
                new[kind] = {k: stand_in(m, k, t, shake=kind == '_parameters') for k, t in saved[kind].items()}
            for kind in ('_forward_hooks', '_forward_pre_hooks'):
                hooks = saved[kind].items()
                new[kind] = type(saved[kind])((k, hook) for k, hook in hooks if not written_in(hook, SHARDING))
            if inner := wrapped(m):
                new['forward'] = inner
            vars(m).update(new, _compiled_call_impl=None)
        yield
    finally:
        for m, saved in before:
            vars(m).clear()
            vars(m).update(saved)


def run_slices(b: int, n: int) -> list[list[slice]]:
    """Cut each of b rows of n positions into runs of 3, 1, 2, 5, 10, 20 ..., backwards in every other row."""
    lengths = [3, 1, 2]
    while sum(lengths) < n:
        lengths.append(5 * 2 ** (len(lengths) - 3))
    starts = [min(sum(lengths[:k]), n) for k in range(len(lengths) + 1)]
    spans = [(start, stop) for start, stop in pairwise(starts) if start < stop]
    back = [(n - stop, n - start) for start, stop in reversed(spans)]
    return [[slice(*span) for span in (back if row % 2 else spans)] for row in range(b)]


def leak(compute: Callable[[Tensor, Tensor, Any], Tensor], x: Tensor, other: Tensor) -> Tensor:
    """Measure how far sequences that share rows move each other. No host sync.

    Returns (2,), over the standard deviation of the outputs: how far these move where another sequence, or a later
    token of the same, becomes another, and where the sequence is alone in a row of its own length.

    `compute` maps tokens (b, n, …), run numbers (b, n), and where in x they come from (rows, columns), to outputs
    (b, n, …).
    """
    b, n = x.shape[:2]
    spans = run_slices(b, n)
    ids, last = torch.zeros(b, n, dtype=torch.long), torch.zeros(b, n, dtype=torch.bool)
    for row, here in enumerate(spans):
        for k, span in enumerate(here):
            ids[row, span], last[row, span.stop - 1] = k, True
    ids, last = ids.to(x.device), last.to(x.device)
    everywhere = (slice(None), slice(None))

    def run(*arguments: Any) -> Tensor:
        random.seed(0)
        with Constant():
            return compute(*arguments)

    packed = run(x, ids, everywhere)  # (b, n, …)
    seen = []
    for change in ((ids + torch.arange(b, device=x.device)[:, None]) % 2 == 1, last):
        changed = run(torch.where(like(change, x), other, x), ids, everywhere)
        seen.append(torch.where(like(change, packed), 0, changed - packed).abs().max())
    moved = []
    for row, here in enumerate(spans):
        for span in here:
            rows = slice(row, row + 1)
            with suppress(Exception):  # rows may be too short for it
                alone = run(x[rows, span], ids[rows, span] * 0, (rows, span))
                moved.append((alone - packed[rows, span]).abs().max())
    if not moved:
        raise NoPlaceError('no sequence can be alone in a row')
    scale = packed.std().clamp(min=1e-30)
    worst = torch.stack([torch.stack(seen).max(), torch.stack(moved).max()])
    return torch.nan_to_num(worst / scale, nan=float('inf'))


def like(mask: Tensor, x: Tensor) -> Tensor:
    """(b, n) -> (b, n, 1, …), with as many dims as x."""
    return mask.view(*mask.shape, *[1] * (x.ndim - 2))


class NoPlaceError(ValueError):
    """An output has no place for each token."""


def outputs(found: Any, b: int, n: int) -> Tensor:
    """Return all of a module's output that has a place for each token, (b, n, f) float32."""
    queue, parts = [found], []
    while queue:
        part = queue.pop(0)
        if isinstance(part, tuple | list):
            queue += part
        elif isinstance(part, Tensor) and part.shape[:2] == (b, n):
            parts.append(part.reshape(b, n, -1).float())
    if not parts:
        raise NoPlaceError(f'no output of shape ({b}, {n}, …)')
    return torch.cat(parts, dim=-1)
