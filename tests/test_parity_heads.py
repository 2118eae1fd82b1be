"""Frozen parts, hooks of tensors, evaluation, bf16: still what upstream's wrapper gives."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import x_transformers
from networks import assert_same, decoder, gradients
from torch import Tensor, nn
from x_transformers import TransformerWrapper

import xtloss

DIM, VOCAB = 16, 11
X = torch.arange(36).reshape(3, 12) * 7 % VOCAB
LENS = torch.tensor([12, 7, 1])


CHANGES: dict[str, Callable[[TransformerWrapper], object]] = {
    'frozen head': lambda net: net.to_logits.requires_grad_(False),
    'frozen trunk': lambda net: [p.requires_grad_(p is net.to_logits.weight) for p in net.parameters()],
    'tensor hook': lambda net: net.to_logits.weight.register_hook(lambda grad: grad * 3),
}


@pytest.mark.parametrize('change', CHANGES)
def test_frozen_parts_and_hooks_of_tensors(change: str, fused: str | bool) -> None:
    ours, theirs = xtloss.AutoregressiveWrapper(decoder(), fused=fused), x_transformers.AutoregressiveWrapper(decoder())
    for wrapper in (ours, theirs):
        torch.manual_seed(1)
        CHANGES[change](wrapper.net)
    assert_same(ours, theirs, {'x': X, 'lens': LENS})


def test_evaluation_without_gradients(fused: str | bool) -> None:
    net = decoder(layers_attn_dropout=0.5)
    ours, theirs = (
        xtloss.AutoregressiveWrapper(net, fused=fused).eval(),
        x_transformers.AutoregressiveWrapper(net).eval(),
    )
    with torch.no_grad():
        got, want = ours(X, lens=LENS), theirs(X, lens=LENS)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert not got.requires_grad


@pytest.mark.parametrize('network', [{}, {'tie_embedding': True}, {'to_logits': lambda: nn.Linear(DIM, VOCAB)}])
def test_bf16_autocast_is_no_further_from_float64(network: dict[str, Any], fused: str | bool) -> None:
    def result(wrapper: type[nn.Module], seed: int, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        made = {k: v() if k == 'to_logits' else v for k, v in network.items()}
        wrapped = wrapper(decoder(**made, layers_depth=2, seed=seed).to(dtype), **options)
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=dtype == torch.float32):
            loss = wrapped(torch.randint(0, VOCAB, (8, 24), generator=torch.Generator().manual_seed(seed)))
        if wrapper is xtloss.AutoregressiveWrapper:
            assert loss.dtype == torch.float32
        return {'loss': loss.detach()} | gradients(loss, wrapped)

    ours, theirs = Counter(), Counter()  # squared errors over many networks: a single rounding is a matter of luck
    for seed in range(24):
        truth = result(x_transformers.AutoregressiveWrapper, seed, torch.float64)
        for errors, options in (
            (ours, {'wrapper': xtloss.AutoregressiveWrapper, 'fused': fused}),
            (theirs, {'wrapper': x_transformers.AutoregressiveWrapper}),
        ):
            got = result(seed=seed, dtype=torch.float32, **options)
            errors.update({name: (got[name] - t).square().sum().item() for name, t in truth.items()})

    for name in theirs:  # a gradient sums many roundings, the loss of each network is one number
        assert ours[name] ** 0.5 <= (1.25 if name == 'loss' else 1.1) * theirs[name] ** 0.5, name
