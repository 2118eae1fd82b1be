"""The edges of the contract: nothing to count, numbers that must not spread, padding that must not be seen."""

import math
from typing import Any

import pytest
import torch
from batches import random_batch
from networks import WEIGHTINGS, Stub, assert_same_gradients, decoder, gradients
from oracle import differentiable, expected
from torch import Tensor, nn

from xtloss import AutoregressiveWrapper

LOOPED = {'looped': True, 'layers_pre_and_post_norm': True}
NETWORKS: dict[str, dict[str, Any]] = {
    'plain': {},
    'tied': {'tie_embedding': True},
    'flash': {'layers_attn_flash': True},
    'mixture of softmax': {'mixture_of_softmax': True},
    'continuous head': {'add_continuous_pred_head': True},
    'looped': LOOPED,
}
NAN = float('nan')
LONG = torch.arange(24).reshape(3, 8) % 11
NOTHING: dict[str, dict[str, Any]] = {
    'one token': {'x': LONG[:, :1]},
    'no rows': {'x': LONG[:0]},
    'no rows of one token': {'x': LONG[:0, :1]},
    'all ignored': {'x': torch.full((3, 8), -100)},
    'no length': {'x': LONG, 'lens': torch.zeros(3).long()},
    'length one': {'x': LONG, 'lens': torch.ones(3).long()},
    'no row, lens': {'x': LONG[:0], 'lens': torch.zeros(0).long()},
    'all masked': {'x': LONG, 'mask': torch.zeros(3, 8).bool()},
    'alternating mask': {'x': LONG, 'mask': (torch.arange(8) % 2 == 0).expand(3, 8)},
    'no loss': {'x': LONG, 'loss_mask': torch.zeros(3, 8).bool(), 'loss_weight': torch.full((3, 8), NAN)},
    'late start': {'x': LONG, 'seq_start_pos': torch.full((3,), 7)},
}


@pytest.mark.parametrize('nothing', NOTHING)
@pytest.mark.parametrize('network', NETWORKS)
def test_nothing_counted(network: str, nothing: str, fused: str | bool) -> None:
    """The loss is 0 and still reaches every parameter that a usual batch reaches, with gradients of 0."""
    wrapper = AutoregressiveWrapper(decoder(**NETWORKS[network]), fused=fused)
    usual = gradients(wrapper(LONG), wrapper).keys()
    for weighting in ('token', 'sequence', 'padded'):
        wrapper = AutoregressiveWrapper(wrapper.net, fused=fused, loss_weighting=weighting)
        for given in ({}, {'normalizer': 3.0}):
            loss, parts = wrapper(**NOTHING[nothing], **given, return_breakdown=True)
            assert loss.item() == 0
            assert not parts.token_loss.any()
            assert not parts.weight.any()
            wrapper.zero_grad()
            loss.backward()
            for name, p in wrapper.named_parameters():
                assert name not in usual or not p.grad.any(), name
        padded_z = 0 if weighting != 'padded' else NOTHING[nothing]['x'][:, 1:].numel()
        assert wrapper.loss_normalizer(**NOTHING[nothing]).item() == padded_z


@pytest.mark.parametrize('weighting', WEIGHTINGS)
@pytest.mark.parametrize('bad', [NAN, math.inf, -math.inf])
@pytest.mark.parametrize('log_prob', [False, True])
def test_bad_logits_and_weights_stay_where_they_do_not_count(
    weighting: str | float, bad: float, log_prob: bool
) -> None:
    call = random_batch(1, 4, 8, {'ignore', 'lens', 'mask', 'loss_mask', 'loss_weight'}, vocab=5)
    logits = torch.randn(4, 8, 5, dtype=torch.float64).log_softmax(-1)
    counted = torch.tensor(expected(logits, **call).counted)
    unused = ~nn.functional.pad(counted, (0, 1))  # where a position predicts nothing that counts
    logits = logits.masked_fill(unused[..., None], bad).requires_grad_()
    call['loss_weight'][~nn.functional.pad(counted, (1, 0))] = bad
    want = expected(logits.detach(), weighting=weighting, log_probs=log_prob, **call)

    wrapper = AutoregressiveWrapper(Stub(logits, output_is_log_prob=log_prob), loss_weighting=weighting)
    loss, parts = wrapper(**call, return_breakdown=True)
    assert loss.item() == pytest.approx(want.loss, rel=1e-9)
    assert all(t.isfinite().all() for t in parts)
    (grad,) = torch.autograd.grad(loss, logits)
    (grad_want,) = torch.autograd.grad(differentiable(logits, call['x'], want, log_probs=log_prob), logits)
    assert not grad[unused].any()
    torch.testing.assert_close(grad, grad_want, rtol=1e-9, atol=1e-12)


class Holes(nn.Module):
    """Puts a number at some positions of what a module gives."""

    def __init__(self, holes: Tensor, value: float) -> None:
        super().__init__()
        self.holes, self.value = holes, value

    def forward(self, x: Tensor) -> Tensor:
        return x.masked_fill(self.holes[..., None], self.value)


@pytest.mark.parametrize('network', ['plain', 'continuous head', 'looped'])
@pytest.mark.parametrize('bad', [NAN, math.inf])
def test_a_head_that_gives_nan_where_nothing_counts(network: str, bad: float) -> None:
    lens = torch.tensor([8, 3, 5])
    holes = torch.arange(8) >= lens[:, None] - 1

    def run(value: float | None) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(2)
        head = nn.Linear(16, 11)
        net = decoder(**NETWORKS[network], to_logits=head)
        if value is not None:
            net.to_logits = nn.Sequential(head, Holes(holes, value))
            if net.add_continuous_pred_head:
                net.to_next_embed_pred.append(Holes(holes, value))
            if net.looped:
                net.exit_gate = nn.Sequential(net.exit_gate, Holes(holes, value))
        loss = AutoregressiveWrapper(net, equal_loss_weight_batch=True)(LONG, lens=lens)
        return loss, {
            k.replace('to_logits.0.', 'to_logits.').replace('exit_gate.0.', 'exit_gate.'): g
            for k, g in gradients(loss, net).items()
        }

    (loss, grads), (clean_loss, clean) = run(bad), run(None)
    assert loss.item() == pytest.approx(clean_loss.item(), rel=1e-5)
    assert_same_gradients(grads, clean, 1e-4 if network == 'looped' else 1e-5)


def test_nan_embeddings_where_nothing_counts_do_not_reach_a_fused_head() -> None:
    lens = torch.tensor([8, 3, 5])
    net = decoder()
    wrapper = AutoregressiveWrapper(net, fused=True)
    clean_loss = wrapper(LONG, lens=lens)
    clean = gradients(clean_loss, net)
    holes = Holes(torch.arange(8) >= lens[:, None] - 1, NAN)
    net.attn_layers.register_forward_hook(lambda _, __, out: (holes(out[0]), out[1]))
    loss = wrapper(LONG, lens=lens)
    assert loss.item() == pytest.approx(clean_loss.item(), rel=1e-6)
    assert_same_gradients(gradients(loss, net), clean, 1e-6)


@pytest.mark.parametrize('argument', ['lens', 'mask'])
@pytest.mark.parametrize('network', NETWORKS)
def test_ids_under_padding_may_be_anything(network: str, argument: str, fused: str | bool) -> None:
    mask = torch.arange(8) < torch.tensor([[8], [3], [5]])
    padding = {'mask': mask} if argument == 'mask' else {'lens': mask.sum(dim=1)}
    wrapper = AutoregressiveWrapper(decoder(**NETWORKS[network]), fused=fused, pad_value=4)
    want = wrapper(LONG.masked_fill(~mask, 4), **padding)
    for junk in (-1, 10**6, 7):
        got = wrapper(LONG.masked_fill(~mask, junk), **padding)
        assert got.item() == want.item()


def test_nothing_handed_in_is_changed(fused: str | bool) -> None:
    wrapper = AutoregressiveWrapper(decoder(), fused=fused, mask_prob=0.2)
    call = random_batch(3, 3, 8, {'ignore', 'lens', 'mask', 'loss_mask', 'loss_weight'})
    call |= {'normalizer': torch.tensor(3.0), 'seq_start_pos': torch.tensor([0, 1, 2])}
    before = {k: v.clone() for k, v in call.items()}
    wrapper(**call).backward()
    wrapper.loss_normalizer(**call)
    assert all(torch.equal(v, before[k]) for k, v in call.items())


def test_mask_reaches_the_network() -> None:
    mask = torch.arange(8) < torch.tensor([[8], [3], [5]])
    stub = Stub(torch.zeros(3, 8, 11))
    AutoregressiveWrapper(stub)(LONG, mask=mask)
    assert torch.equal(stub.seen[0][1]['mask'], mask)


PADDINGS = {
    'right': torch.arange(8) < torch.tensor([[8], [3], [5]]),
    'left': torch.arange(8) >= torch.tensor([[0], [5], [3]]),
}
DROPPING: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    'alone': ({}, {}, {}),
    'mask_prob': ({}, {'mask_prob': 0.25}, {}),
    'seq_start_pos': ({}, {}, {'seq_start_pos': torch.zeros(3).long()}),
    'self_attn_kv_mask': ({}, {}, {'self_attn_kv_mask': torch.ones(3, 8).bool()}),
    'mask_prob and seq_start_pos': ({}, {'mask_prob': 0.25}, {'seq_start_pos': torch.zeros(3).long()}),
    'prepend_embeds': ({}, {}, {'seq_start_pos': torch.zeros(3).long(), 'prepend_embeds': torch.ones(3, 2, 16)}),
    'memory tokens': ({'num_memory_tokens': 2}, {}, {'seq_start_pos': torch.zeros(3).long()}),
    'flash': ({'layers_attn_flash': True}, {}, {'seq_start_pos': torch.zeros(3).long()}),
    'looped': (LOOPED, {}, {'seq_start_pos': torch.zeros(3).long()}),
}


@pytest.mark.parametrize('padding', PADDINGS)
@pytest.mark.parametrize('dropping', DROPPING)
def test_padding_is_not_seen_where_the_network_would_drop_the_mask(
    dropping: str, padding: str, fused: str | bool
) -> None:
    network, options, call = DROPPING[dropping]
    net, mask = decoder(layers_rotary_pos_emb=True, layers_depth=2, **network), PADDINGS[padding]
    seen = []
    for pad_value in (1, 9):  # what the network reads at a masked position
        wrapper = AutoregressiveWrapper(net, pad_value=pad_value, fused=fused, **options)
        for returning in ({}, {'return_outputs': True}):
            torch.manual_seed(4)
            out = wrapper(LONG, mask=mask, **call, **returning)
        loss, (logits, _) = out
        torch.manual_seed(4)
        seen.append((loss, wrapper(LONG, mask=mask, **call), logits[mask[:, :-1]]))
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert seen[0][1].item() == pytest.approx(seen[0][0].item(), rel=1e-5)


@pytest.mark.parametrize('dropping', DROPPING)
def test_a_mask_that_masks_nothing_changes_nothing(dropping: str, fused: str | bool) -> None:
    network, options, call = DROPPING[dropping]
    wrapper = AutoregressiveWrapper(decoder(layers_depth=2, **network), fused=fused, **options)
    losses = []
    for mask in (None, torch.ones(3, 8).bool()):
        torch.manual_seed(4)
        losses.append(wrapper(LONG, mask=mask, **call).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_seq_start_pos_beside_prepended_embeddings_counts_from_the_first_of_them() -> None:
    """GPTVAE drops a prepended latent by `seq_start_pos = 1`: all targets of the row still count."""
    net = decoder(dtype=torch.float64)
    before = torch.randn(3, 2, 16, dtype=torch.float64)
    call = {'x': LONG, 'prepend_embeds': before, 'seq_start_pos': torch.tensor([0, 2, 5])}
    loss, parts = AutoregressiveWrapper(net, loss_weighting='sequence')(**call, return_breakdown=True)
    logits = net(LONG, prepend_embeds=before, seq_start_pos=call['seq_start_pos'])[:, 2:]
    want = expected(logits, LONG, weighting='sequence', seq_start_pos=call['seq_start_pos'], prepend_len=2)
    assert [sum(row) for row in want.counted] == [7, 7, 4]
    assert loss.item() == pytest.approx(want.loss, rel=1e-9)
    assert torch.equal(parts.weight > 0, torch.tensor(want.counted))
    z = AutoregressiveWrapper(net, loss_weighting='token').loss_normalizer(**call)
    assert z.item() == 18


def test_normalizers_get_no_gradient(fused: str | bool) -> None:
    normalizer = torch.tensor(5.0, requires_grad=True)
    wrapper = AutoregressiveWrapper(decoder(), fused=fused)
    loss, parts = wrapper(LONG, normalizer=normalizer, return_breakdown=True)
    loss.backward()
    assert normalizer.grad is None
    assert not any(t.requires_grad for t in parts)


@pytest.mark.parametrize('weighting', WEIGHTINGS)
@pytest.mark.parametrize('network', [{}, {'tie_embedding': True}, {'emb_dim': 8, 'num_memory_tokens': 2}])
def test_fused_or_not_is_one_loss(network: dict[str, Any], weighting: str | float) -> None:
    net = decoder(**network, dtype=torch.float64)
    call = random_batch(7, 4, 9, {'ignore', 'lens', 'mask', 'loss_mask', 'loss_weight'})
    call['prepend_embeds'] = torch.randn(4, 2, net.emb_dim, dtype=torch.float64)
    made = [AutoregressiveWrapper(net, fused=fused, loss_weighting=weighting) for fused in (True, False)]
    (fused, parts), (plain, plain_parts) = (wrapper(**call, return_breakdown=True) for wrapper in made)
    assert fused.item() == pytest.approx(plain.item(), rel=1e-9)
    for one, other in zip(parts, plain_parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert_same_gradients(gradients(fused, net), gradients(plain, net), 1e-9)
