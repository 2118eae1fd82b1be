"""Where there are no values: meta and fake tensors plan the path that really runs."""

from typing import Any

import pytest
import torch
from fused_problem import Operations
from networks import decoder
from torch import Tensor
from torch._subclasses import FakeTensorMode
from x_transformers import Decoder, TransformerWrapper

from xtloss import AutoregressiveWrapper, linear_cross_entropy

NETWORKS: list[dict[str, Any]] = [{}, {'tie_embedding': True}, {'emb_dim': 24, 'num_memory_tokens': 2}]


def step(wrapper: AutoregressiveWrapper, x: Tensor, **call: Tensor) -> None:
    loss, parts = wrapper(x, **call, return_breakdown=True)
    loss.backward()
    assert loss.shape == ()
    assert parts.token_loss.shape == parts.weight.shape == (3, 8)
    for p in wrapper.parameters():
        assert p.grad is None or p.grad.shape == p.shape


@pytest.mark.parametrize('where', ['meta', 'fake', 'fake network'])
@pytest.mark.parametrize('network', NETWORKS)
def test_without_values_the_path_is_the_one_that_runs(network: dict[str, Any], where: str) -> None:
    """On meta; in fake mode, whether the network is built under it, of fake parameters, or before, of real ones."""
    net = decoder(num_tokens=509, **network)
    on_meta = where == 'meta'
    with torch.device('meta') if on_meta else FakeTensorMode(allow_non_fake_inputs=True):
        if where != 'fake':
            layers = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, verbose=False)
            net = TransformerWrapper(num_tokens=509, max_seq_len=32, attn_layers=layers, **network)
        x, call = torch.zeros(3, 9, dtype=torch.long), {'lens': torch.zeros(3, dtype=torch.long)}
        step(AutoregressiveWrapper(net, fused=True), x, **call, loss_weight=torch.zeros(3))
        step(AutoregressiveWrapper(net, fused=False), x, **call)
        with Operations(509) as seen:
            AutoregressiveWrapper(net, fused='auto')(x).backward()
    assert seen.products == 3
    assert not any('log_softmax' in name or name == 'scatter' for name, _ in seen.seen)


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('network', NETWORKS)
def test_another_default_device(network: dict[str, Any], fused: bool) -> None:
    """What is made on the way lies where the data lies."""
    wrapper, x = AutoregressiveWrapper(decoder(**network), fused=fused), torch.randint(0, 11, (3, 9))
    call = {'lens': torch.tensor([9, 4, 6]), 'loss_weight': torch.rand(3), 'normalizer': torch.tensor(2.0)}
    want = wrapper(x, **call).item()
    with torch.device('meta'):
        step(wrapper, x, **call)
        assert wrapper(x, **call).item() == pytest.approx(want, rel=1e-6)


def test_autocast_on_meta() -> None:
    embed, weight = torch.zeros(5, 4, device='meta', requires_grad=True), torch.zeros(7, 4, device='meta')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss, _ = linear_cross_entropy(
            embed, weight, torch.zeros(5, device='meta').long(), torch.ones(5, device='meta')
        )
    loss.backward()
    assert loss.dtype == torch.float32
