"""What does not count reaches neither loss nor gradient: NaN and inf, ids under padding. What counts stays visible."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from batches import random_batch
from modes import KINDS as MODES
from modes import LENS, B, N, batch, ours, wrap
from networks import (
    ROTARY,
    WEIGHTINGS,
    Stub,
    assert_same_gradients,
    continuous_network,
    decoder,
    frames,
    run,
    value_and_gradients,
)
from oracle import differentiable, expected
from torch import nn
from torch.nn.functional import pad

from xtloss import AutoregressiveWrapper, ContinuousAutoregressiveWrapper

NAN = math.nan
IDS = batch('plain')['x']
I = torch.arange(N)
RIGHT, LEFT = LENS[:, None] > I, N - LENS[:, None] <= I
HEADS: dict[str, tuple[dict[str, Any], list[str]]] = {  # options of the network, and what of it breaks
    'plain': ({}, ['to_logits']),
    'fused': ({}, ['attn_layers']),
    'xl': ({'max_mem_len': N}, ['to_logits']),
    'continuous head': ({'add_continuous_pred_head': True}, ['to_logits', 'to_next_embed_pred']),
    'looped': ({'looped': True, 'layers_pre_and_post_norm': True}, ['to_logits', 'exit_gate']),
}


@pytest.mark.parametrize('weighting', WEIGHTINGS)
@pytest.mark.parametrize('bad', [NAN, math.inf, -math.inf])
@pytest.mark.parametrize('log_prob', [False, True])
def test_bad_logits_and_weights(weighting: str | float, bad: float, log_prob: bool) -> None:
    call = random_batch(1, 4, 8, {'ignore', 'lens', 'mask', 'loss_mask', 'loss_weight'}, vocab=5)
    logits = torch.randn(4, 8, 5, dtype=torch.float64).log_softmax(-1)
    counted = torch.tensor(expected(logits, **call).counted)
    unused = ~pad(counted, (0, 1))  # where a position predicts nothing that counts
    logits = logits.masked_fill(unused[..., None], bad).requires_grad_()
    call['loss_weight'][~pad(counted, (1, 0))] = bad
    want = expected(logits.detach(), weighting=weighting, log_probs=log_prob, **call)

    wrapper = AutoregressiveWrapper(Stub(logits, output_is_log_prob=log_prob), loss_weighting=weighting)
    loss, parts = wrapper(**call, return_breakdown=True)
    assert loss.item() == pytest.approx(want.loss, rel=1e-9)
    assert all(t.isfinite().all() for t in parts)
    (grad,) = torch.autograd.grad(loss, logits)
    (grad_want,) = torch.autograd.grad(differentiable(logits, call['x'], want, log_probs=log_prob), logits)
    assert not grad[unused].any()
    torch.testing.assert_close(grad, grad_want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name', HEADS)
@pytest.mark.parametrize(('bad', 'junk'), [(NAN, -1), (math.inf, 10**6)])
def test_what_the_network_gives_where_nothing_counts(name: str, bad: float, junk: int) -> None:
    """Whatever its heads give there; of embeddings, whatever the layers give; and whatever ids are padding."""
    (options, broken), kind, found = HEADS[name], 'xl' if name == 'xl' else 'plain', []
    holes = (LENS[:, None] - 1 <= I)[:, : -1 if kind == 'xl' else None, None]  # XL's network reads one token less

    def spoil(module: nn.Module, args: Any, out: Any) -> Any:
        return (out[0].masked_fill(holes, bad), *out[1:]) if isinstance(out, tuple) else out.masked_fill(holes, bad)

    for breaks in (False, True):
        torch.manual_seed(2)
        net = decoder(to_logits=nn.Linear(16, 11), **options)
        wrapper = wrap(kind, net, equal_loss_weight_batch=True)
        parameters = dict(wrapper.named_parameters())
        for path in broken if breaks else []:
            net.get_submodule(path).register_forward_hook(spoil)
        loss = wrapper(IDS.masked_fill(~RIGHT, junk if breaks else 0), lens=LENS)
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        found.append((loss.item(), {k: g for k, g in zip(parameters, grads, strict=True) if g is not None}))
    (clean_loss, clean), (loss, grads) = found
    assert loss == pytest.approx(clean_loss, rel=1e-5)
    assert_same_gradients(grads, clean, 1e-4 if name == 'looped' else 1e-5)


# frames


@pytest.mark.parametrize('padding', ['lens', 'mask', 'left mask', 'seq_start_pos'])
@pytest.mark.parametrize(
    'options',
    [{}, {'probabilistic': True}, {'layers_attn_flash': True}, {'num_memory_tokens': 2}],
    ids=lambda options: '-'.join(options) or 'plain',
)
def test_nan_frames_under_padding(options: dict[str, Any], padding: str) -> None:
    """Nor do they reach the gradient of a loss with parameters."""
    x, real = frames(B, N), RIGHT if padding in ('lens', 'mask') else LEFT
    told: dict[str, Any] = {'lens': {'lens': LENS}, 'seq_start_pos': {'seq_start_pos': N - LENS}}
    call = told.get(padding, {'mask': real}) | {'loss_weight': torch.where(real, 0.5, NAN)}
    loss_fn = None if 'probabilistic' in options else nn.Bilinear(5, 5, 5)
    wrapper = ContinuousAutoregressiveWrapper(continuous_network(**options), loss_fn, equal_loss_weight_batch=True)
    want, want_grads = value_and_gradients(wrapper, {'x': x, **call})
    for junk in (NAN, torch.inf, 1e30):
        y = x.masked_fill(~real[..., None], junk).requires_grad_()
        got, grads = value_and_gradients(wrapper, {'x': y, **call})
        assert got == want
        assert_same_gradients(grads, want_grads, 1e-6)
    (grad,) = torch.autograd.grad(wrapper(y, **call), y)
    assert grad[real].isfinite().all()
    assert not grad[~real].any()


# what is handed in, and normalizers


@pytest.mark.parametrize('kind', MODES)
def test_nothing_handed_in_is_changed(kind: str) -> None:
    call = batch(kind) | {'mask': RIGHT, 'loss_mask': RIGHT, 'loss_weight': torch.rand(B, N, dtype=torch.float64)}
    call |= {'normalizer': torch.tensor(3.0)} | ({'seq_start_pos': torch.zeros(B).long()} if kind == 'plain' else {})
    before = copy.deepcopy(call)
    wrapper = ours(kind)
    wrapper(**call).backward()
    wrapper.loss_normalizer(**call)
    assert all(torch.equal(value, before[name]) for name, value in call.items())


BROKEN = {
    'overflow in half': torch.tensor(70000.0).half(),
    'nan': torch.tensor(NAN),
    'negative': torch.tensor(-1.0),
    'negative infinity': torch.tensor(-torch.inf),
    'only float64 tells it from 0': torch.tensor(-1e-60, dtype=torch.float64),
}


@pytest.mark.parametrize('kind', [*MODES, 'not fused', 'rollout'])
def test_a_normalizer_is_a_divisor(kind: str) -> None:
    """A broken one is seen, also where nothing counts; 0 gives 0, though attached; none gets a gradient."""
    of = {'not fused': 'plain', 'rollout': 'continuous'}.get(kind, kind)
    model, call = ours(of, fused=False if kind == 'not fused' else 'auto'), batch(of)
    call |= {'rollout_steps': 3} if kind == 'rollout' else {}
    nothing = {'lens': 0 * LENS} if 'lens' in call else {'segment_ids': 0 * call['segment_ids']}
    for broken, beside in itertools.product(BROKEN.values(), ({}, nothing)):
        loss = model(**call | beside, normalizer=broken)
        assert loss.isnan()
        loss.backward()
        assert beside or any(p.grad.isnan().any() for p in model.parameters() if p.grad is not None)
        model.zero_grad()
    loss = model(**call, normalizer=torch.tensor(0.0))
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)

    want = run(model, call | {'normalizer': 1.0})
    for z in (torch.tensor(1e-60, dtype=torch.float64), torch.tensor(2.5, requires_grad=True)):
        loss, parts = run(model, call | {'normalizer': z, 'return_breakdown': True})
        torch.testing.assert_close(loss, (want / z.double()).to(loss.dtype), rtol=1e-6, atol=0)
        loss.backward()
        assert z.grad is None
        assert not any(t.requires_grad for t in parts)


def test_what_is_broken_where_it_counts_is_seen(fused: str | bool) -> None:
    net = decoder(**ROTARY)
    net.token_emb.emb.weight.data[IDS[0, 2]] = NAN
    assert AutoregressiveWrapper(net, fused=fused)(IDS, lens=LENS).isnan()
