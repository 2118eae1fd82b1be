"""A small wrapper of every kind with a ragged batch for it, and what its sequences cost one by one, or in segments."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import x_transformers
from networks import continuous_network, decoder
from oracle import Expected
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import xtloss

B, N, VOCAB, FEATURES, SEGMENT = 3, 9, 11, 5, 5
LENS = torch.tensor([9, 4, 6])
SEGMENT_IDS = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 0], [3, 3, 3, 4, 4, 4, 4, 4, 4], [5, 5, 5, 5, 5, 5, 5, 5, 5]])
KINDS = {
    'plain': 'AutoregressiveWrapper',
    'packed': 'AutoregressiveWrapper',
    'unpadded': 'AutoregressiveWrapper',
    'xl': 'XLAutoregressiveWrapper',
    'continuous': 'ContinuousAutoregressiveWrapper',
}


def net(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """The same arguments give the same parameters. Flash: x-transformers' other softmax is float32 always."""
    options = {'layers_rotary_pos_emb': True, 'layers_attn_flash': True, 'use_abs_pos_emb': False, **options}
    if kind == 'continuous':
        return continuous_network(dtype=dtype, **options)
    short = {'max_seq_len': SEGMENT, 'max_mem_len': SEGMENT} if kind == 'xl' else {}
    return decoder(num_tokens=VOCAB, dtype=dtype, **short, **options)


def wrap(kind: str, network: nn.Module, **options: Any) -> Any:
    """Our wrapper around a network."""
    options = {**options, 'unpad': True} if kind == 'unpadded' else options
    return getattr(xtloss, KINDS[kind])(network, **options)


def ours(kind: str, dtype: torch.dtype = torch.float64, fused: bool | str = 'auto', **network: Any) -> Any:
    """Our wrapper around a network of its own."""
    return wrap(kind, net(kind, dtype, **network), **({} if kind == 'continuous' else {'fused': fused}))


def batch(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of forward: rows with `lens`, or packed ones."""
    draw = torch.Generator().manual_seed(seed)
    if kind == 'continuous':
        frames = torch.randn(B, N, FEATURES, generator=draw, dtype=torch.float64)
        return {'x': frames.to(dtype), 'lens': LENS}
    x = torch.randint(0, VOCAB, (B, N), generator=draw)
    return {'x': x, 'segment_ids': SEGMENT_IDS} if kind == 'packed' else {'x': x, 'lens': LENS}


def sequences(kind: str, call: dict[str, Tensor]) -> list[tuple[int, Tensor]]:
    """The row of each sequence, and where in it: (length,)."""
    ids = call['segment_ids'] if kind == 'packed' else (torch.arange(N) < call['lens'][:, None]).long()
    return [(row, (i == k).nonzero().flatten()) for row, i in enumerate(ids) for k in i.unique() if k]


def carried(net: nn.Module, x: Tensor, segment: int, *, forget: bool = False, **of_tokens: Any) -> Tensor:
    """Logits of the pieces of a row, each read with what is of its tokens and the memories of those before.

    No gradient flows into memories; with `forget` there are none.
    """
    mems, found, inputs = None, [], x.shape[1] - 1
    for start in range(0, inputs, segment):
        here = slice(start, min(start + segment, inputs))
        arguments = tree_map(lambda t: t[:, here], of_tokens)  # noqa: B023
        logits, mems = net(x[:, here], mems=None if forget else mems, return_mems=True, **arguments)
        found.append(logits)
    return torch.cat(found, dim=1)


def assert_equation(got: tuple[Tensor, Any], want: Expected) -> None:
    """Loss and breakdown in float64 are the oracle's."""
    loss, parts = got
    assert loss.item() == pytest.approx(want.loss, rel=1e-9, abs=1e-12)
    for name, atol in (('weight', 0), ('token_loss', 1e-12)):
        table = torch.tensor(getattr(want, name), dtype=torch.float64)
        torch.testing.assert_close(getattr(parts, name), table, rtol=1e-9, atol=atol)
    assert parts.normalizer.item() == pytest.approx(want.normalizer, rel=1e-9)


def alone(kind: str, network: nn.Module, call: dict[str, Tensor]) -> Tensor:
    """The mean over all counted targets by upstream's wrapper, a sequence at a time, nothing hidden."""
    theirs = getattr(x_transformers, KINDS[kind])(network)
    xs = [call['x'][row, here][None] for row, here in sequences(kind, call)]
    count = sum(x.shape[1] - 1 for x in xs)
    return torch.stack([theirs(x) * ((x.shape[1] - 1) / count) for x in xs]).sum()


def alone_losses(kind: str, network: nn.Module, call: dict[str, Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The row of each sequence, where its targets are, and what each costs by the network alone: (length - 1,)."""
    for row, here in sequences(kind, call):
        x = call['x'][row, here][None]
        if kind == 'continuous':
            losses = (network(x[:, :-1]) - x[:, 1:])[0].square().mean(dim=-1)
        else:
            logits = carried(network, x, SEGMENT) if kind == 'xl' else network(x[:, :-1])
            losses = F.cross_entropy(logits[0], x[0, 1:], reduction='none')
        yield row, here[1:], losses.detach()
