"""Heads that are more than a linear layer, and bf16: still what upstream's wrapper gives."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import x_transformers
from networks import ScaledLinear, assert_same, assert_same_gradients, decoder, gradients
from torch import Tensor, nn
from x_transformers import Decoder, TransformerWrapper

import xtloss

DIM, VOCAB = 16, 11
X = torch.arange(36).reshape(3, 12) * 7 % VOCAB
LENS = torch.tensor([12, 7, 1])


@pytest.fixture(params=['auto', False], ids=['auto', 'not fused'])
def fused(request: pytest.FixtureRequest) -> str | bool:
    return request.param


def test_deep_copies_read_what_upstreams_read(fused: str | bool) -> None:
    """But for a tied network, whose copy upstream lets read the original's embedding: tests/test_edges.py."""
    made = [cls(decoder()) for cls in (xtloss.AutoregressiveWrapper, x_transformers.AutoregressiveWrapper)]
    ours, theirs = (nn.ModuleList([wrapper, copy.deepcopy(wrapper)]) for wrapper in made)
    for pair in (ours, theirs):
        with torch.no_grad():
            pair[0].net.token_emb.emb.weight.mul_(2)
    got, want = ours[1](X), theirs[1](X)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert_same_gradients(gradients(got, ours), gradients(want, theirs), 1e-5)


def double(_: nn.Module, __: Any, output: Any) -> Any:
    """A forward hook that doubles the logits, alone or beside the cache."""
    return (output[0] * 2, output[1]) if isinstance(output, tuple) else output * 2


HEADS: dict[str, Callable[[TransformerWrapper], object]] = {
    'hook on the head': lambda net: net.to_logits.register_forward_hook(double),
    'pre-hook on the head': lambda net: net.to_logits.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
    'backward hook on the head': lambda net: net.to_logits.register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,)),
    'hook on the network': lambda net: net.register_forward_hook(double),
    'parametrization': lambda net: nn.utils.parametrizations.weight_norm(net.to_logits),
    'frozen head': lambda net: net.to_logits.requires_grad_(False),
    'frozen trunk': lambda net: [p.requires_grad_(p is net.to_logits.weight) for p in net.parameters()],
    'patched forward': lambda net: setattr(net.to_logits, 'forward', lambda x: x @ net.to_logits.weight.t() * 3),
    'replaced head': lambda net: setattr(net, 'to_logits', ScaledLinear(DIM, VOCAB)),
    'tensor hook': lambda net: net.to_logits.weight.register_hook(lambda grad: grad * 3),
}


@pytest.mark.parametrize('head', HEADS)
def test_a_head_that_is_more_than_linear(head: str, fused: str | bool) -> None:
    ours, theirs = xtloss.AutoregressiveWrapper(decoder(), fused=fused), x_transformers.AutoregressiveWrapper(decoder())
    for wrapper in (ours, theirs):
        torch.manual_seed(1)
        HEADS[head](wrapper.net)
    assert_same(ours, theirs, {'x': X, 'lens': LENS})


def test_a_subclassed_network(fused: str | bool) -> None:
    class Halved(TransformerWrapper):
        def forward(self, x: Tensor, **kwargs: Any) -> Any:
            logits, cache = super().forward(x, **kwargs)
            return logits / 2, cache

    def net() -> TransformerWrapper:
        torch.manual_seed(2)
        layers = Decoder(dim=DIM, depth=1, heads=2, attn_dim_head=8, verbose=False)
        return Halved(num_tokens=VOCAB, max_seq_len=32, attn_layers=layers)

    ours, theirs = xtloss.AutoregressiveWrapper(net(), fused=fused), x_transformers.AutoregressiveWrapper(net())
    assert_same(ours, theirs, {'x': X})


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
