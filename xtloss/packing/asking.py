"""A module of somebody else's, or one with hooks, is asked whether it works token by token, or by the mask it is given.

Dims: b batch, n positions, d features, h heads, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from x_transformers.attend import Attend, Intermediates
from x_transformers.x_transformers import Attention, AttentionLayers, LayerIntermediates, TransformerWrapper

from xtloss.packing.experiment import NoPlaceError, leak, outputs, stand_ins
from xtloss.packing.runs import causal_mask, positions_in_run

OUTER = (TransformerWrapper, AttentionLayers)


def ask(module: nn.Module, net: nn.Module, *, masked: bool, hooked: bool) -> Tensor | None:
    """Return how far tokens move each other in a module, as `leak` does, (2,) float32; None if it takes none.

    It is tried on features of each width that it may take, then on ids, in evaluation and in training. Inside of it
    whole networks and stacks of layers are stood in for, and so is a module that is known, but for its hooks, where it
    takes other arguments than these.
    """
    outer = [m for m in module.modules() if isinstance(m, OUTER) and 'forward' not in vars(m)]
    own_dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    for stubs in [outer, [], [module]] if hooked else [outer, []]:
        for dtype in dict.fromkeys([torch.float32, own_dtype]):
            with stand_ins(module, net, dtype):
                for stub in stubs:
                    vars(stub)['forward'] = honest(stub)
                pools = False
                for tokens, other in inputs(module, net, dtype):
                    if pools and not tokens.is_floating_point():  # it took features, and is no embedding
                        break
                    for given in [('attn_mask', 'return_intermediates'), ('attn_mask',), ()] if masked else [()]:
                        try:
                            return answer(module, tokens, other, given, heads=module in stubs and not masked)
                        except NoPlaceError:
                            pools = True
                        except Exception:  # whatever a foreign module raises
                            continue
    return None


def inputs(module: nn.Module, net: nn.Module, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what a module may take, and others: features (2, n, d) of each width its weights have, or ids (2, n)."""
    draw, inner = torch.Generator().manual_seed(0), next(m for m in net.modules() if isinstance(m, TransformerWrapper))
    weights = [*module.parameters(), *module.buffers()]
    device = next((t.device for t in weights), next((t.device for t in net.parameters()), torch.device('cpu')))
    sizes = {size for t in weights for size in t.shape if size > 1}
    sizes |= {size for m in module.modules() for size in vars(m).values() if type(size) is int and 1 < size < 2**20}
    affordable = max(2**27 // max(sum(t.numel() for t in weights), 1), 256)
    n = min(max(inner.max_seq_len or 0, 128), 1024, affordable)
    if isinstance(module, TransformerWrapper) or inner in module.modules():
        n, widths, v = min(n, 2**24 // inner.num_tokens), [], inner.num_tokens
    else:
        dim = next(m.dim for m in inner.modules() if isinstance(m, AttentionLayers))
        widths, v = [dim, *sorted(sizes - {dim})], min([inner.num_tokens, *sizes])
    for d in widths:
        x, other = torch.randn(2, 2, min(n, 2**24 // d), d, generator=draw)
        yield x.to(device, dtype), 30 * other.to(device, dtype)
    ids = torch.randint(v, (2, n), generator=draw)
    yield ids.to(device), ((ids + torch.randint(1, v, (2, n), generator=draw)) % v).to(device)


def answer(module: nn.Module, x: Tensor, other: Tensor, given: tuple[str, ...], *, heads: bool) -> Tensor:
    """Run the experiment on a module with stand-ins, in evaluation and in training: (2,), the worst."""
    whole = any(isinstance(m, TransformerWrapper) for m in module.modules())

    def run(x: Tensor, ids: Tensor, _: Any) -> Tensor:
        arguments: dict[str, Any] = {'attn_mask': causal_mask(ids), 'return_intermediates': True}
        arguments = {name: arguments[name] for name in given} | (
            {'pos': positions_in_run(ids)} if whole and given else {}
        )
        found = [module(x, **arguments)]
        if heads:  # (b, h, n, d) is what it may be, too
            out = module(x[:, None], **arguments)
            found.append((out if isinstance(out, Tensor) else out[0]).squeeze(1))
        return outputs(found, *x.shape[:2])

    worst = []
    for training in (False, True):
        for m in module.modules():
            m.training = training
        worst.append(leak(run, x, other))
    return torch.stack(worst).amax(dim=0)


def honest(module: Any) -> Callable[..., Any]:
    """Return a forward in place of a module that is known: each token reads what its mask shows, and its position."""

    def forward(x: Tensor, *_: Any, attn_mask: Tensor | None = None, pos: Tensor | None = None, **__: Any) -> Any:
        if not x.is_floating_point():
            x = (x[..., None] * torch.arange(1, module.num_tokens + 1, device=x.device)).sin()  # (b, n, v)
        if isinstance(module, OUTER):
            n = x.shape[1]
            mask = torch.ones(1, 1, n, n, device=x.device).tril() if attn_mask is None else attn_mask
            x = x + mask[:, 0].to(x) @ x / mask[:, 0].to(x).sum(dim=-1, keepdim=True)
        if isinstance(module, TransformerWrapper):
            x = x + (torch.arange(n, device=x.device) if pos is None else pos)[..., None].cos()
        if isinstance(module, OUTER):
            return x, LayerIntermediates()
        return (x, Intermediates()) if isinstance(module, Attention | Attend) else x

    return forward
