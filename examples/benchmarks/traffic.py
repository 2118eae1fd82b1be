"""Bytes that head and loss move beside their matrix products, for each logit: counted, with no clock and no GPU.

An operation reads each of its operands once and writes each of its results once, and so does a compiled kernel, as
Inductor counts it. Products are apart, and with them all that is as wide as the embeddings: what they read, and the
gradients that they are summed into.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xtloss.losses import chunked

compiled = chunked.compiled

PRODUCTS = {'mm', 'addmm', 'addmm_', 'bmm', 'baddbmm', 'addmv_', 'mv'}
NOTHING = {'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', 'detach', 'set_'}


class Traffic(TorchDispatchMode):
    """Adds up the bytes of every operation; of the functions that are compiled, those that Inductor counts."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.bytes = dim, 0.0
        self.per_logit: dict[Callable[..., Any], float] = {}  # of each compiled function

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in PRODUCTS | NOTHING and not func.is_view and name != '_unsafe_view':
            self.bytes += sum(self.size(t) for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
        return out

    def size(self, t: Tensor) -> int:
        """Bytes of a tensor; 0 of what belongs to the products."""
        return 0 if self.dim in t.shape else min(t.nbytes, t.untyped_storage().nbytes())

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Compile a function of xtloss, run and count it."""
        before = metrics.num_bytes_accessed
        self.__exit__(None, None, None)  # nothing is compiled under a mode
        try:
            out = compiled(function)(*args)
        finally:
            self.__enter__()
        if metrics.num_bytes_accessed > before:  # it was compiled
            self.per_logit[function] = (metrics.num_bytes_accessed - before) / args[0].numel()
        self.bytes += self.per_logit[function] * args[0].numel()
        return out


@contextmanager
def counting(dim: int, *, force_accelerated: bool) -> Iterator[Traffic]:
    """Count what runs inside; on a CPU too, the path that accelerators take can be forced."""
    traffic = Traffic(dim)
    log = logging.getLogger('torch._inductor.compile_fx.__inductor_metrics')  # where it is off, Inductor counts nothing
    kept = chunked.compiled, chunked.is_accelerated, log.level, log.propagate
    compiled.cache_clear()
    torch._dynamo.reset()
    try:
        log.setLevel(logging.INFO)
        log.propagate = False
        chunked.compiled = lambda function: partial(traffic.run, function)
        if force_accelerated:
            chunked.is_accelerated = lambda embed: True
        with warnings.catch_warnings(), inductor_config.patch(force_disable_caches=True), traffic:
            warnings.simplefilter('ignore')  # that caches are off
            yield traffic
    finally:
        chunked.compiled, chunked.is_accelerated, level, log.propagate = kept
        log.setLevel(level)
        compiled.cache_clear()
        torch._dynamo.reset()


def bytes_per_logit(
    step: Callable[[], Tensor | None], *, logits: int, dim: int, force_accelerated: bool = False
) -> float:
    """Of a forward and backward pass."""
    with counting(dim, force_accelerated=force_accelerated) as traffic:
        loss = step()
        if loss is not None:
            loss.backward()
    return traffic.bytes / logits


def table(peers: Mapping[str, tuple[Callable[[torch.dtype], Tensor | None], bool]], *, logits: int, dim: int) -> str:
    """Return every peer, and whether the accelerators' path is forced, as a markdown table; - where nothing is seen."""
    dtypes = torch.float32, torch.bfloat16
    lines = ['| bytes per logit, matrix products apart | float32 | bfloat16 |', '|---|---:|---:|']
    for name, (peer, forced) in peers.items():
        counts = [
            bytes_per_logit(partial(peer, dtype), logits=logits, dim=dim, force_accelerated=forced) for dtype in dtypes
        ]
        lines.append(f'| {name} | {" | ".join(f"{count:.1f}" if count > 0.05 else "-" for count in counts)} |')
    return '\n'.join(lines)
