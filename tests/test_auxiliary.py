"""The extra losses of looped networks and of the continuous head follow the weighting, without `loss_weight`.

Attention's follows nothing: it is one number for the batch.
"""

import pytest
import torch
from batches import random_batch
from networks import WEIGHTINGS, assert_same_gradients, decoder, gradients
from oracle import auxiliary, differentiable, expected, looped_token_loss

from xtloss import AutoregressiveWrapper


@pytest.mark.parametrize('weighting', WEIGHTINGS)
@pytest.mark.parametrize('loops', [1, 2, 3])
@pytest.mark.parametrize('prepended', [0, 2])
def test_looped(weighting: str | float, loops: int, prepended: int) -> None:
    """With a single loop, or prepended embeddings, upstream gives NaN or raises: here the equation holds there too."""
    net = decoder(looped=True, max_looped_steps=loops, layers_pre_and_post_norm=True, dtype=torch.float64)
    slope, threshold, coefficient = 5.0, 0.1, 0.7
    gate = {'looped_loss_slope': slope, 'looped_loss_threshold_exit': threshold}
    call = random_batch(5, 3, 7, {'ignore', 'lens', 'loss_weight'})
    before = torch.randn(3, prepended, 16, dtype=torch.float64) if prepended else None

    wrapper = AutoregressiveWrapper(net, loss_weighting=weighting, looped_exit_loss_weight=coefficient, **gate)
    loss, parts = wrapper(**call, prepend_embeds=before, return_breakdown=True)

    read = call['x'].masked_fill((call['x'] == -100) | (torch.arange(7) >= call['lens'][:, None]), 0)
    _, cache = net(read, prepend_embeds=before, looped_pred_all_logits=True, return_intermediates=True)
    loop_logits = torch.stack(cache.all_pred_logits, dim=1)[:, :, prepended:]
    exit_logits = torch.stack(cache.exit_logits, dim=1)[:, :, prepended:, 0]
    costs, decisions = looped_token_loss(loop_logits, exit_logits, call['x'], slope, threshold)
    want = expected(loop_logits[:, -1], weighting=weighting, token_loss=costs, **call)
    exit_loss = coefficient * auxiliary(want, decisions)

    assert loss.item() == pytest.approx(want.loss + exit_loss, rel=1e-9)
    assert parts.auxiliary.item() == pytest.approx(exit_loss, rel=1e-9, abs=1e-12)
    wanted = torch.tensor(want.token_loss, dtype=torch.float64)
    torch.testing.assert_close(parts.token_loss, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('weighting', WEIGHTINGS)
@pytest.mark.parametrize('prepended', [0, 2])
def test_next_embedding_loss(weighting: str | float, prepended: int) -> None:
    """With prepended embeddings upstream raises: here each target is compared with its own token's embedding."""
    net = decoder(add_continuous_pred_head=True, dtype=torch.float64)
    call = random_batch(6, 3, 7, {'ignore', 'lens', 'row_weight'})
    before = torch.randn(3, prepended, 16, dtype=torch.float64) if prepended else None

    wrapper = AutoregressiveWrapper(net, loss_weighting=weighting, next_embed_loss_weight=0.3)
    loss, parts = wrapper(**call, prepend_embeds=before, return_breakdown=True)

    read = call['x'].masked_fill((call['x'] == -100) | (torch.arange(7) >= call['lens'][:, None]), 0)
    logits, (predicted, embedded) = net(read, prepend_embeds=before, return_next_embed_pred=True)
    logits, predicted, embedded = (t[:, prepended:] for t in (logits, predicted, embedded))
    distances = [
        [
            sum(abs(p - e) for p, e in zip(predicted[b, i].tolist(), embedded[b, i + 1].tolist(), strict=True)) / 16
            for i in range(6)
        ]
        for b in range(3)
    ]
    want = expected(logits, weighting=weighting, **call)
    extra = 0.3 * auxiliary(want, distances)
    assert loss.item() == pytest.approx(want.loss + extra, rel=1e-9)
    assert parts.auxiliary.item() == pytest.approx(extra, rel=1e-9)


@pytest.mark.parametrize('weighting', WEIGHTINGS)
@pytest.mark.parametrize('normalizer', [None, 2.5])
@pytest.mark.parametrize('counts', [True, False])
def test_attention_z_loss(weighting: str | float, normalizer: float | None, counts: bool) -> None:
    """The square of logsumexp, as upstream, times Z / normalizer; no weight touches it, nor that nothing counts."""
    net = decoder(layers_depth=2, layers_attn_qk_norm=True, dtype=torch.float64)
    call = random_batch(5, 3, 7, {'ignore', 'lens', 'loss_mask', 'loss_weight'})
    call['loss_mask'] &= torch.tensor(counts)
    wrapper = AutoregressiveWrapper(net, add_attn_z_loss=True, loss_weighting=weighting)
    loss, parts = wrapper(**call, normalizer=normalizer, attn_z_loss_weight=0.01, return_breakdown=True)

    read = call['x'].masked_fill((call['x'] == -100) | (torch.arange(7) >= call['lens'][:, None]), 0)
    logits, cache = net(read, return_intermediates=True)
    height = sum(layer.pre_softmax_attn.logsumexp(dim=-1) for layer in cache.attn_intermediates)  # (b, h, n)
    extra = 0.01 * (height**2).sum() / (3 * 7)
    want = expected(logits, weighting=weighting, normalizer=normalizer, **call)
    assert any(map(any, want.counted)) == counts
    own = expected(logits, weighting=weighting, **call).normalizer
    extra = extra * (1 if normalizer is None else own / normalizer)
    assert loss.item() == pytest.approx(want.loss + extra.item(), rel=1e-9)
    assert parts.auxiliary.item() == pytest.approx(extra.item(), rel=1e-9)
    wanted = gradients(differentiable(logits, call['x'], want) + extra, net)
    assert_same_gradients(gradients(loss, net), wanted, 1e-9, floor=1e-5)
