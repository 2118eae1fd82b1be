"""The weighting table: cases worked by hand, then the loop oracle over random shapes, masks and weightings."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from batches import RULES, WEIGHTS, random_batch, subsets
from hypothesis import given
from hypothesis import strategies as st
from networks import WEIGHTINGS, Stub, Unreachable, assert_same_gradients, decoder, gradients
from oracle import differentiable, expected
from torch import Tensor

from xtloss import AutoregressiveWrapper, LossBreakdown

MASKS = (*RULES[:4], *WEIGHTS)
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


def test_the_default_is_token_and_the_flag_is_sequence() -> None:
    call = MASKED['lens']
    for options, name in (({}, 'token'), ({'equal_loss_weight_batch': True}, 'sequence')):
        for got, want in zip(shares(call, **options), shares(call, loss_weighting=name), strict=True):
            assert torch.equal(got, want)
    same = AutoregressiveWrapper(decoder(), equal_loss_weight_batch=True, loss_weighting='sequence')
    assert torch.isfinite(same(X))


@pytest.mark.parametrize('other', ['token', 'square', 'padded', 'sequence_sum', 0.0, 0.5])
def test_the_flag_beside_another_weighting(other: str | float) -> None:
    message = "equal_loss_weight_batch=True stands for loss_weighting='sequence', got "
    with pytest.raises(ValueError, match=f'^{message}{other!r} too$'):
        AutoregressiveWrapper(decoder(), equal_loss_weight_batch=True, loss_weighting=other)


@st.composite
def cases(draw: Callable[..., Any]) -> dict[str, Any]:
    """A batch of any small shape under any masks, and a weighting."""
    using = draw(subsets(MASKS))
    b, n = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    batch = random_batch(draw(st.integers(0, 10**6)), b, n, using, vocab=VOCAB)
    weighting = draw(st.one_of(st.sampled_from(WEIGHTINGS), st.floats(0, 1)))
    return {'batch': batch, 'weighting': weighting}


@given(case=cases())
def test_the_oracle_agrees_on_any_logits(case: dict[str, Any]) -> None:
    batch, weighting = case['batch'], case['weighting']
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
    z = asked.loss_normalizer(**batch)
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
    for seed, using in enumerate((set(), {'ignore', 'lens'}, {'mask', 'row_weight'}, {*MASKS} - {'row_weight'})):
        batch = {k: v.to(device) for k, v in random_batch(seed, 3, 7, using, vocab=VOCAB).items()}
        read = batch['x'].masked_fill(~batch.get('mask', torch.tensor(True)), 0)
        read = read.masked_fill(
            torch.arange(7, device=device) >= batch.get('lens', torch.full((3,), 7, device=device))[:, None], 0
        )
        logits = net(read.masked_fill(read == -100, 0), mask=batch.get('mask'))
        want = expected(logits.detach(), weighting=weighting, **batch)

        loss, parts = wrapper(**batch, return_breakdown=True)
        assert loss.item() == pytest.approx(want.loss, rel=tolerance, abs=tolerance)
        again = (parts.token_loss * parts.weight).sum() / parts.normalizer + parts.auxiliary
        assert again.item() == pytest.approx(loss.item(), rel=max(tolerance / 10, 1e-12), abs=tolerance)
        assert not any(t.requires_grad for t in parts)
        assert_same_gradients(gradients(loss, net), gradients(differentiable(logits, batch['x'], want), net), tolerance)


@pytest.mark.parametrize('weighting', WEIGHTINGS)
@pytest.mark.parametrize('fused', ['auto', False])
def test_a_given_normalizer_replaces_z(weighting: str | float, fused: str | bool) -> None:
    wrapper = AutoregressiveWrapper(decoder(dtype=torch.float64), loss_weighting=weighting, fused=fused)
    call = random_batch(1, 3, 8, {'lens', 'loss_weight'})
    own, parts = wrapper(**call, return_breakdown=True)
    for given_z in (1.0, 7.5, torch.tensor(7.5), torch.tensor(7.5, dtype=torch.float64)):
        loss, replaced = wrapper(**call, normalizer=given_z, return_breakdown=True)
        assert loss.item() == pytest.approx((own * parts.normalizer / float(given_z)).item(), rel=1e-9)
        assert replaced.normalizer.item() == float(given_z)
        assert torch.equal(replaced.weight, parts.weight)

    nothing = wrapper(**call, normalizer=torch.tensor(0.0))
    assert nothing.item() == 0
    assert not any(grad.any() for grad in gradients(nothing, wrapper).values())


@pytest.mark.parametrize('network', [{}, {'tie_embedding': True}, {'emb_dim': 8, 'num_memory_tokens': 2}])
@pytest.mark.parametrize('weighting', WEIGHTINGS)
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


SHOWN: list[tuple[dict[str, Any], str]] = [
    ({'equal_loss_weight_batch': True}, 'sequence'),
    ({'loss_weighting': 0.3}, '0.3'),
    ({}, 'token'),
]


@pytest.mark.parametrize(('options', 'shown'), SHOWN)
def test_the_weighting_is_shown(options: dict[str, Any], shown: str) -> None:
    assert f'loss_weighting={shown}' in repr(AutoregressiveWrapper(decoder(), **options)).replace("'", '')


@pytest.mark.parametrize('masks', [{'lens'}, {'mask', 'loss_mask'}, {'ignore'}])
@pytest.mark.parametrize('weighting', WEIGHTINGS)
def test_loss_normalizer_is_the_breakdowns(weighting: str | float, masks: set[str]) -> None:
    wrapper = AutoregressiveWrapper(decoder(dtype=torch.float64), loss_weighting=weighting)
    call = random_batch(2, 4, 9, masks) | {'seq_start_pos': torch.tensor([0, 1, 3, 0])}
    _, parts = wrapper(**call, return_breakdown=True)
    z = AutoregressiveWrapper(Unreachable(), loss_weighting=weighting).loss_normalizer(**call, context=torch.ones(1))
    assert z.item() == pytest.approx(parts.normalizer.item(), rel=1e-6)
    assert wrapper.loss_normalizer(**call).item() == pytest.approx(parts.normalizer.item(), rel=1e-12)


@pytest.mark.parametrize('weighting', WEIGHTINGS)
def test_the_returns(weighting: str | float) -> None:
    wrapper = AutoregressiveWrapper(decoder(), loss_weighting=weighting)
    x = torch.randint(0, 11, (2, 6))
    loss = wrapper(x)
    assert loss.ndim == 0
    same, (logits, cache) = wrapper(x, return_outputs=True)
    both, (logits_again, _), parts = wrapper(x, return_outputs=True, return_breakdown=True)
    assert logits.shape == logits_again.shape == (2, 5, 11)
    assert hasattr(cache, 'attn_intermediates')
    assert parts.token_loss.shape == parts.weight.shape == (2, 5)
    assert parts.normalizer.shape == parts.auxiliary.shape == ()
    torch.testing.assert_close(same, loss)
    torch.testing.assert_close(both, loss)


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


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('weighting', ['token', 'sequence', 0.3])
def test_gradcheck_of_the_head(weighting: str | float, fused: bool) -> None:
    wrapper = AutoregressiveWrapper(
        decoder(num_tokens=4, dim=6, dtype=torch.float64), fused=fused, loss_weighting=weighting
    )
    call = random_batch(3, 2, 4, {'lens', 'loss_weight'}, vocab=4) | {'normalizer': torch.tensor(2.0)}

    def loss(head: Tensor) -> Tensor:
        return torch.func.functional_call(wrapper, {'net.to_logits.weight': head}, kwargs=dict(call))

    assert torch.autograd.gradcheck(loss, wrapper.net.to_logits.weight.detach().clone().requires_grad_())


@pytest.mark.parametrize('log_prob', [False, True])
def test_gradcheck_of_the_logits(log_prob: bool) -> None:
    call = random_batch(4, 3, 5, {'lens', 'loss_mask', 'row_weight'}, vocab=VOCAB)

    def loss(logits: Tensor) -> Tensor:
        logits = logits.log_softmax(-1) if log_prob else logits
        return AutoregressiveWrapper(Stub(logits, output_is_log_prob=log_prob), equal_loss_weight_batch=True)(**call)

    assert torch.autograd.gradcheck(loss, torch.randn(3, 5, VOCAB, dtype=torch.float64, requires_grad=True))
