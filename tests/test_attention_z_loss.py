"""The attention z-loss of a step: one, however many micro-batches and ranks the step has."""

from typing import Any

import pytest
import torch
from networks import assert_same_gradients, decoder, gradients
from torch import Tensor

from xtloss import AutoregressiveWrapper

X = torch.randint(1, 11, (8, 9), generator=torch.Generator().manual_seed(0))
LENS = torch.tensor([9, 9, 9, 9, 2, 3, 9, 4])
weightings = pytest.mark.parametrize('weighting', ['token', 'sequence', 'square', 'padded', 'sequence_sum', 0.3])


def wrapper(weighting: Any, **options: Any) -> AutoregressiveWrapper:
    net = decoder(num_tokens=11, attn_z_loss_weight=0.5).double()
    return AutoregressiveWrapper(net, add_attn_z_loss=True, loss_weighting=weighting, **options)


def z_loss(model: AutoregressiveWrapper, rows: slice) -> Tensor:
    """Of the network alone, as upstream reads it."""
    ids = torch.where(torch.arange(9) < LENS[rows, None], X[rows], 0)
    return model.net(ids, return_intermediates=True, return_attn_z_loss=True)[1].attn_z_loss


@weightings
@pytest.mark.parametrize('parts', [1, 2, 4, 8])
def test_micro_batches_add_up_to_one_z_loss(weighting: Any, parts: int) -> None:
    """Each part has its share, own Z over the normalizer: the mean of the z-losses, weighted by Z."""
    model, size = wrapper(weighting), 8 // parts
    slices = [slice(k * size, (k + 1) * size) for k in range(parts)]
    own = [model.loss_normalizer(X[rows], lens=LENS[rows]) for rows in slices]
    z = sum(own)
    losses = [model(X[rows], lens=LENS[rows], normalizer=z, return_breakdown=True) for rows in slices]
    with_z_loss = sum(loss for loss, _ in losses)
    model.add_attn_z_loss = False
    without = sum(model(X[rows], lens=LENS[rows], normalizer=z) for rows in slices)
    want = sum(part.item() / z.item() * z_loss(model, rows) for part, rows in zip(own, slices, strict=True))
    assert (with_z_loss - without).item() == pytest.approx(want.item(), rel=1e-6)
    assert sum(breakdown.auxiliary for _, breakdown in losses).item() == pytest.approx(want.item(), rel=1e-6)
    got = gradients(with_z_loss, model)
    assert_same_gradients(got, gradients(without + want, model), 1e-6)


@pytest.mark.parametrize(('ranks', 'accumulation'), [(2, 1), (1, 4), (2, 2)])
def test_trainers_that_average_or_divide(ranks: int, accumulation: int) -> None:
    """DDP takes the mean over ranks; accelerate and Lightning divide each loss by the number of micro-batches."""
    model = wrapper('token')
    size = 8 // (ranks * accumulation)
    slices = [slice(k * size, (k + 1) * size) for k in range(ranks * accumulation)]
    z = sum(model.loss_normalizer(X[rows], lens=LENS[rows]) for rows in slices)
    handed = z / ranks / accumulation
    got = sum(model(X[rows], lens=LENS[rows], normalizer=handed) / accumulation for rows in slices) / ranks
    want = sum(model(X[rows], lens=LENS[rows], normalizer=z) for rows in slices)
    assert got.item() == pytest.approx(want.item(), rel=1e-9)
    assert_same_gradients(gradients(got, model), gradients(want, model), 1e-9)


def test_without_a_normalizer_it_is_upstreams() -> None:
    model = wrapper('sequence')
    loss = model(X, lens=LENS)
    model.add_attn_z_loss = False
    assert (loss - model(X, lens=LENS)).item() == pytest.approx(z_loss(model, slice(None)).item(), rel=1e-9)


def test_where_nothing_counts() -> None:
    """The share is 1 where the step counts nothing either, 0 where it does, and rows of none have no z-loss."""
    model, nothing = wrapper('token'), torch.zeros(8, dtype=torch.long)
    whole = model.net(torch.zeros_like(X), return_intermediates=True, return_attn_z_loss=True)[1].attn_z_loss.item()
    assert model(X, lens=nothing).item() == pytest.approx(whole, rel=1e-9)
    assert model(X, lens=nothing, normalizer=torch.tensor(0.0)).item() == pytest.approx(whole, rel=1e-9)
    assert model(X, lens=nothing, normalizer=3.0).item() == 0
    assert model(X, lens=LENS, normalizer=torch.tensor(0.0)).item() == 0
    assert model(X[:0], normalizer=3.0).item() == model(X[:0]).item() == 0
    assert model(X, lens=LENS, normalizer=torch.tensor(float('nan'))).isnan()
