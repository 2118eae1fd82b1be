"""Which targets count, and what they weigh: cases worked by hand, then the loop oracle over random batches."""

import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
from batches import RULES, WEIGHTS, random_batch, subsets
from hypothesis import given
from hypothesis import strategies as st
from networks import WEIGHTINGS, Stub, Unreachable, assert_same_gradients, decoder, gradients
from oracle import counted_targets, differentiable, expected, sequences
from torch import Tensor

from xtloss import AutoregressiveWrapper, LossBreakdown
from xtloss.weighting.targets import count_targets

VOCAB = 5

# two rows of three targets, the second with two masked: the shares of its four counted tokens
F = Fraction
BY_HAND = {
    'token': (F(1, 4), F(1, 4)),
    'sequence': (F(1, 6), F(1, 2)),
    'padded': (F(1, 6), F(1, 6)),
    'sequence_sum': (F(1, 2), F(1, 2)),
    'square': (3**-0.5 / (3**0.5 + 1), 1 / (3**0.5 + 1)),
    0.0: (F(1, 4), F(1, 4)),
    0.25: (3**-0.25 / (3**0.75 + 1), 1 / (3**0.75 + 1)),
    0.5: (3**-0.5 / (3**0.5 + 1), 1 / (3**0.5 + 1)),
    1.0: (F(1, 6), F(1, 2)),
}
X = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
ROW = torch.tensor([True, True, False, False])
MASKED = {
    'ignore_index': {'x': torch.tensor([[0, 1, 2, 3], [4, 3, -100, -100]])},
    'lens': {'x': X, 'lens': torch.tensor([4, 2])},
    'mask': {'x': X, 'mask': torch.stack([torch.ones(4).bool(), ROW])},
    'loss_mask': {'x': X, 'loss_mask': torch.stack([torch.ones(4).bool(), ~ROW.roll(1)])},
    'seq_start_pos': {'x': X, 'seq_start_pos': torch.tensor([0, 2])},
}
FIRST = {'loss_mask': 2, 'seq_start_pos': 2}  # the column of the second row's one counted target, 0 where not told


def shares(call: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    """w / Z of each target as the breakdown tells it, and as the gradient of even logits shows it."""
    logits = torch.zeros(2, 4, VOCAB, dtype=torch.float64, requires_grad=True)
    loss, parts = AutoregressiveWrapper(Stub(logits), **options)(**call, return_breakdown=True)
    (grad,) = torch.autograd.grad(loss, logits)
    target = call['x'][:, 1:].clamp(min=0)
    felt = grad[:, :-1].gather(-1, target[..., None])[..., 0] / (1 / VOCAB - 1)
    return parts.weight / parts.normalizer, felt


@pytest.mark.parametrize('masked', MASKED)
@pytest.mark.parametrize('weighting', BY_HAND)
def test_shares_by_hand(weighting: str | float, masked: str) -> None:
    long, short = (float(share) for share in BY_HAND[weighting])
    want = torch.zeros(2, 3, dtype=torch.float64)
    want[0], want[1, FIRST.get(masked, 0)] = long, short
    for got in shares(MASKED[masked], loss_weighting=weighting):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


SAME: list[tuple[dict[str, Any], str]] = [
    ({}, 'token'),
    ({'equal_loss_weight_batch': True}, 'sequence'),
    ({'loss_weighting': 0.5}, 'square'),
]


@pytest.mark.parametrize(('options', 'name'), SAME)
def test_other_words_for_a_weighting(options: dict[str, Any], name: str) -> None:
    for got, want in zip(shares(MASKED['lens'], **options), shares(MASKED['lens'], loss_weighting=name), strict=True):
        assert torch.equal(got, want)
    shown = repr(AutoregressiveWrapper(decoder(), **options)).replace("'", '')
    assert f'loss_weighting={options.get("loss_weighting", name)}' in shown


@pytest.mark.parametrize(
    'using', [some for k in range(len(RULES) + 1) for some in itertools.combinations(RULES, k)], ids='-'.join
)
def test_the_oracle_counts_the_same_targets(using: tuple[str, ...]) -> None:
    shapes = [(0, 3), (2, 1), (4, 2), (4, 9)]
    for prepended, (b, n) in itertools.product(range(3), shapes):
        batch = random_batch(b + n + prepended, b, n, set(using))
        x, rules = batch.pop('x'), batch
        got = count_targets(x, **rules, **({'ignore_index': -100} if 'ignore' in using else {}), prepended=prepended)
        want = counted_targets(x, prepend_len=prepended, **rules)
        assert got.counted.tolist() == want
        runs = sequences(x, rules.get('segment_ids'))
        groups = [[place for place in run if want[place[0]][place[1]]] for run in runs]
        lengths = [length for row in got.lengths.tolist() for length in row if length]
        assert sorted(lengths) == sorted(filter(None, map(len, groups)))
        for group in groups:
            assert all(got.length[place].item() == len(group) for place in group)


@given(
    using=subsets((*RULES[:5], *WEIGHTS)),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9)),
    seed=st.integers(0, 10**6),
    weighting=st.one_of(st.sampled_from(WEIGHTINGS), st.floats(0, 1)),
)
def test_the_oracle_agrees_on_any_logits(
    using: set[str], shape: tuple[int, int], seed: int, weighting: str | float
) -> None:
    batch = random_batch(seed, *shape, using, vocab=VOCAB)
    logits = (3 * torch.randn(*batch['x'].shape, VOCAB, dtype=torch.float64)).requires_grad_()
    want = expected(logits.detach(), weighting=weighting, **batch)
    wrapper = AutoregressiveWrapper(Stub(logits), loss_weighting=weighting)

    loss, parts = wrapper(**batch, return_breakdown=True)
    assert loss.item() == pytest.approx(want.loss, rel=1e-9, abs=1e-9)
    assert isinstance(parts, LossBreakdown)
    for got, table in ((parts.token_loss, want.token_loss), (parts.weight, want.weight)):
        torch.testing.assert_close(
            got, torch.tensor(table, dtype=torch.float64).reshape(got.shape), rtol=1e-9, atol=1e-9
        )
    assert parts.normalizer.item() == pytest.approx(want.normalizer, rel=1e-9)
    assert parts.auxiliary.item() == 0

    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (grad_want,) = torch.autograd.grad(differentiable(logits, batch['x'], want), logits)
    torch.testing.assert_close(grad, grad_want, rtol=1e-9, atol=1e-9)

    asked = AutoregressiveWrapper(Unreachable(), loss_weighting=weighting)
    z = asked.loss_normalizer(**batch, context=torch.ones(1))
    assert z.ndim == 0
    assert z.is_floating_point()
    assert z.item() == pytest.approx(want.normalizer, rel=1e-6)


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize('fused', ['auto', False])
@pytest.mark.parametrize('weighting', WEIGHTINGS)
def test_the_oracle_agrees_through_a_network(
    weighting: str | float, fused: str | bool, dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    net = decoder(num_tokens=VOCAB, dtype=dtype).to(device)
    wrapper = AutoregressiveWrapper(net, loss_weighting=weighting, fused=fused)
    sets = set(), {'ignore', 'lens'}, {'mask', 'row_weight'}, {*RULES[:4], 'loss_weight'}
    for seed, using in enumerate(sets):
        batch = {k: v.to(device) for k, v in random_batch(seed, 3, 7, using, vocab=VOCAB).items()}
        logits = net(batch['x'].masked_fill(batch['x'] == -100, 0), mask=batch.get('mask'))
        want = expected(logits.detach(), weighting=weighting, **batch)

        loss, parts = wrapper(**batch, return_breakdown=True)
        assert loss.item() == pytest.approx(want.loss, rel=tolerance, abs=tolerance)
        again = (parts.token_loss * parts.weight).sum() / parts.normalizer + parts.auxiliary
        assert again.item() == pytest.approx(loss.item(), rel=max(tolerance / 10, 1e-12), abs=tolerance)
        assert not any(t.requires_grad for t in parts)
        assert_same_gradients(gradients(loss, net), gradients(differentiable(logits, batch['x'], want), net), tolerance)


@pytest.mark.parametrize('fused', ['auto', False])
@pytest.mark.parametrize(
    ('of', 'loss_dtype'),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_loss_is_float32_or_wider(of: torch.dtype, loss_dtype: torch.dtype, fused: str | bool) -> None:
    net = decoder(dtype=of)
    loss, parts = AutoregressiveWrapper(net, fused=fused)(X, loss_weight=torch.ones(2), return_breakdown=True)
    assert {loss.dtype, *(t.dtype for t in parts)} == {loss_dtype}
    assert all(grad.dtype == of for grad in gradients(loss, net).values())
