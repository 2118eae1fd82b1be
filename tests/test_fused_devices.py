"""Where there are no values: meta and fake tensors plan the path that really runs. Counters of FLOPs see it too."""

from typing import Any

import pytest
import torch
from fused_problem import Operations
from networks import decoder
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
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


@pytest.mark.parametrize('fused', [True, 'auto', False])
@pytest.mark.parametrize('network', NETWORKS)
@pytest.mark.parametrize('masked', [False, True])
def test_meta(network: dict[str, Any], fused: str | bool, masked: bool) -> None:
    wrapper = AutoregressiveWrapper(decoder(**network).to('meta'), fused=fused)
    with torch.device('meta'):
        x = torch.zeros(3, 9, dtype=torch.long)
        step(
            wrapper, x, **({'lens': torch.zeros(3, dtype=torch.long), 'loss_weight': torch.zeros(3)} if masked else {})
        )


@pytest.mark.parametrize('inside', [True, False])
@pytest.mark.parametrize('network', NETWORKS)
def test_fake_tensors_take_the_path_that_runs(network: dict[str, Any], inside: bool) -> None:
    """Whether the network is built under the mode, of fake parameters, or before, of real ones."""
    wrapper = AutoregressiveWrapper(decoder(num_tokens=509, **network), fused=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        if inside:
            layers = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, verbose=False)
            wrapper.net = TransformerWrapper(num_tokens=509, max_seq_len=32, attn_layers=layers, **network)
        step(wrapper, torch.zeros(3, 9, dtype=torch.long), lens=torch.zeros(3, dtype=torch.long))
        with Operations(509) as seen:
            AutoregressiveWrapper(wrapper.net, fused='auto')(torch.zeros(3, 9, dtype=torch.long)).backward()
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


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('device', ['cpu', 'meta'])
@pytest.mark.parametrize('needed', [(True, True), (True, False), (False, True), (False, False)])
def test_flops_of_all_three_products(needed: tuple[bool, bool], device: str, dtype: torch.dtype) -> None:
    n, d, v = 37, 16, 65
    embed, weight = (
        torch.zeros(*shape, dtype=dtype, device=device, requires_grad=flag)
        for shape, flag in zip(((n, d), (v, d)), needed, strict=True)
    )
    target, token_weight = torch.zeros(n, dtype=torch.long, device=device), torch.ones(n, device=device)
    with FlopCounterMode(display=False) as counter:
        loss, _ = linear_cross_entropy(embed, weight, target, token_weight, chunk_size=16)
        if any(needed):
            loss.backward()
    assert counter.get_total_flops() == 2 * n * d * v * (1 + sum(needed))


@pytest.mark.parametrize('network', NETWORKS)
def test_flops_of_a_wrapper(network: dict[str, Any]) -> None:
    """A counter watches every module, by hooks, and sees what runs without it: one row a counted target."""
    wrapper, x = AutoregressiveWrapper(decoder(num_tokens=509, **network), fused=True), torch.randint(0, 11, (3, 9))

    def flops(**call: Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            wrapper(x, **call).backward()
        return counter.get_total_flops()

    width = 16 if not network.get('tie_embedding') else wrapper.net.token_emb.emb.weight.shape[1]
    fewer = flops(loss_mask=torch.arange(9).expand(3, 9) % 2 == 0)
    assert flops() - fewer == 2 * 12 * width * 509 * 3
    assert AutoregressiveWrapper(wrapper.net, fused='auto')(x).item() == pytest.approx(wrapper(x).item())


def test_flops_of_the_operation_in_a_graph() -> None:
    from xtloss.losses.linear_cross_entropy import compiled_loss_and_grads

    tensors = torch.zeros(5, 4), torch.zeros(7, 4), None, torch.zeros(5).long(), torch.ones(5)
    with FlopCounterMode(display=False) as counter:
        compiled_loss_and_grads(*tensors, 2, torch.float32, [True, False, False])
    assert counter.get_total_flops() == 2 * 5 * 4 * 7 * 2
