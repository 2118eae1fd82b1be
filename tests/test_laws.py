"""What holds of every call: random ones of the three wrappers, float64, values and gradients.

The calls and networks are those of `fuzz`. They know no positions and have no dropout, so that a sequence may be moved.
2,000 examples of each law: ``XTLOSS_EXAMPLES=2000 pytest tests/test_laws.py``.
"""

import math
import random
from typing import Any

import fuzz
import fuzz_calls
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import assert_same_gradients, value_and_gradients
from oracle import counted_targets
from torch import Tensor, nn
from torch.nn.functional import pad

Call = dict[str, Any]
KINDS = st.sampled_from(['ar', 'xl', 'continuous'])
SEEDS = st.integers(0, 2**32)
WEIGHTINGS = st.one_of(st.sampled_from(fuzz_calls.WEIGHTINGS), st.floats(0, 1))
FUSED = st.sampled_from(['auto', True, False])
FACTORS = st.one_of(st.just(0.0), st.floats(-4, -1e-3), st.floats(1e-3, 4))
SHARED = [w for w in fuzz_calls.WEIGHTINGS if w not in ('padded', 'sequence_sum')]  # those whose shares sum to one


def random_call(kind: str, seed: int, *without: str) -> Call:
    """A call of `fuzz` that is not refused, with none of the arguments of these names, and no normalizer."""
    torch.manual_seed(seed % 2**32)
    call = fuzz_calls.random_arguments(random.Random(seed), kind)
    refused = {'ar': {'seq_start_pos'} if 'segment_ids' in call else set(), 'xl': {'segment_ids', 'seq_start_pos'}}
    known = {'x', 'loss_weight', *fuzz.COUNTING} - {*without, *refused.get(kind, {'segment_ids'})}
    return {name: value for name, value in call.items() if name in known}


def wrapper_of(kind: str, weighting: Any, fused: Any) -> nn.Module:
    fusing = {} if kind == 'continuous' else {'fused': fused}
    return fuzz.OURS[kind](fuzz.network(kind), loss_weighting=weighting, **fusing)


def rows(call: Call, which: Any) -> Call:
    """The call with these rows only, in this order."""

    def wide(t: Tensor) -> Tensor:  # old torches cannot index unsigned integers
        return t if t.is_floating_point() else t.long()

    return {name: wide(value)[which].to(value.dtype) for name, value in call.items()}


def counted(call: Call) -> Tensor:
    """(b, n-1), by the oracle."""
    x = call['x'].long() if call['x'].ndim == 2 else torch.zeros(call['x'].shape[:2])
    table = counted_targets(x, **{name: call[name] for name in fuzz.COUNTING if name in call})
    return torch.tensor(table, dtype=torch.bool).reshape(x.shape[0], x.shape[1] - 1)


def assert_same(wrapper: nn.Module, *calls: Call, want: tuple[float, dict[str, Tensor]], times: float = 1) -> None:
    """The loss, or its sum over the calls, is that of `want` `times` so much, and so are the gradients."""
    got, grads = value_and_gradients(wrapper, *calls)
    assert got == pytest.approx(want[0] * times, rel=1e-9, abs=1e-9)
    assert_same_gradients(grads, {name: g * times for name, g in want[1].items()}, 1e-8, floor=1e-3)


@given(seed=SEEDS)
def test_the_oracle_agrees(seed: int) -> None:
    fuzz.try_one(seed)


@given(kind=KINDS, seed=SEEDS, weighting=WEIGHTINGS, fused=FUSED)
def test_order_does_not_matter(kind: str, seed: int, weighting: Any, fused: Any) -> None:
    wrapper, call = wrapper_of(kind, weighting, fused), random_call(kind, seed)
    want = value_and_gradients(wrapper, call)
    assert_same(wrapper, rows(call, torch.randperm(len(call['x']))), want=want)


@given(kind=KINDS, seed=SEEDS, weighting=WEIGHTINGS, fused=FUSED)
def test_micro_batches_are_the_batch(kind: str, seed: int, weighting: Any, fused: Any) -> None:
    wrapper, call = wrapper_of(kind, weighting, fused), random_call(kind, seed)
    want, cut = value_and_gradients(wrapper, call), random.Random(seed).randint(0, len(call['x']))
    assert_same(wrapper, rows(call, slice(cut)), rows(call, slice(cut, None)), want=want)


@given(kind=KINDS, seed=SEEDS, weighting=WEIGHTINGS, fused=FUSED, left=st.booleans())
def test_padding_changes_nothing(kind: str, seed: int, weighting: Any, fused: Any, left: bool) -> None:
    """Three more columns, a whole segment of XL's, of whatever content, that `mask` says are padding."""
    if weighting == 'padded':
        weighting = 'token'
    call = random_call(kind, seed)
    b, n = call['x'].shape[:2]
    by_hand = call | {'mask': call.get('mask', torch.ones(b, n, dtype=torch.bool))}
    if left and 'lens' in by_hand:
        by_hand['mask'] = by_hand['mask'] & (torch.arange(n) < by_hand.pop('lens').long()[:, None])
    wider = {}
    for name, value in by_hand.items():
        sides = (3, 0) if left else (0, 3)
        per_token = value.ndim > 1
        features = (0, 0) * (value.ndim - 2)
        wide = value.long() if name in ('x', 'segment_ids') and kind != 'continuous' else value
        wider[name] = pad(wide, (*features, *sides)) if per_token else value
    if left and 'seq_start_pos' in call:
        wider['seq_start_pos'] = call['seq_start_pos'].long() + 3
    wrapper = wrapper_of(kind, weighting, fused)
    assert_same(wrapper, wider, want=value_and_gradients(wrapper, call))


@given(seed=SEEDS, weighting=WEIGHTINGS, fused=FUSED)
def test_unpadding_changes_nothing(seed: int, weighting: Any, fused: Any) -> None:
    wrapper, call = wrapper_of('ar', weighting, fused), random_call('ar', seed)
    want, (_, breakdown) = value_and_gradients(wrapper, call), wrapper(**call, return_breakdown=True)
    wrapper.unpad = True
    assert_same(wrapper, call, want=want)
    for got, wanted in zip(wrapper(**call, return_breakdown=True)[1], breakdown, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@given(kind=KINDS, seed=SEEDS, weighting=st.one_of(st.sampled_from(SHARED), st.floats(0, 1)))
def test_shares_sum_to_one(kind: str, seed: int, weighting: Any) -> None:
    call = random_call(kind, seed, 'loss_weight')
    breakdown = wrapper_of(kind, weighting, 'auto')(**call, return_breakdown=True)[1]
    assert ((breakdown.weight != 0) == counted(call)).all()
    total = (breakdown.weight / breakdown.normalizer).sum().item() if counted(call).any() else 1
    assert total == pytest.approx(1, abs=1e-6 if breakdown.weight.dtype == torch.float32 else 1e-12)


@given(kind=KINDS, seed=SEEDS, weighting=WEIGHTINGS, fused=FUSED, times=FACTORS)
def test_loss_weight_scales_the_loss(kind: str, seed: int, weighting: Any, fused: Any, times: float) -> None:
    wrapper, call = wrapper_of(kind, weighting, fused), random_call(kind, seed)
    weight = call.setdefault('loss_weight', torch.ones(len(call['x']), dtype=fuzz_calls.DTYPE))
    want = value_and_gradients(wrapper, call)
    assert_same(wrapper, call | {'loss_weight': weight * times}, want=want, times=times)


@given(kind=KINDS, seed=SEEDS, weighting=WEIGHTINGS, fused=FUSED, junk=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_does_not_count_does_not_matter(kind: str, seed: int, weighting: Any, fused: Any, junk: float) -> None:
    """Broken weights where nothing counts; broken frames, and ids that do not exist, where there is padding."""
    wrapper, call = wrapper_of(kind, weighting, fused), random_call(kind, seed)
    b, n = call['x'].shape[:2]
    weight = call.get('loss_weight', torch.ones(b, n, dtype=fuzz_calls.DTYPE))
    call['loss_weight'] = weight if weight.ndim == 2 else weight[:, None].repeat(1, n)
    want = value_and_gradients(wrapper, call)

    padding = torch.zeros(b, n, dtype=torch.bool)
    places = torch.arange(n)
    if 'lens' in call:
        padding |= places >= call['lens'].long()[:, None]
    if 'mask' in call:
        padding |= ~call['mask']
    if 'seq_start_pos' in call:
        padding |= places < call['seq_start_pos'].long()[:, None]
    if 'segment_ids' in call:
        padding |= call['segment_ids'].long() == 0
    if kind == 'continuous':
        broken = call['x'].masked_fill(padding[..., None], junk)
    else:
        ids = torch.tensor([-1, 10**12, -(2**63), 2**63 - 1, fuzz_calls.V])[torch.randint(0, 5, (b, n))]
        broken = torch.where(padding, ids, call['x'].long())
    uncounted = pad(~counted(call), (1, 0), value=True)
    assert_same(
        wrapper, call | {'x': broken, 'loss_weight': call['loss_weight'].masked_fill(uncounted, junk)}, want=want
    )


@given(kind=KINDS, seed=SEEDS, fused=FUSED)
def test_sequence_is_the_mean_over_rows_of_the_mean_over_a_row(kind: str, seed: int, fused: Any) -> None:
    call = random_call(kind, seed, 'segment_ids')
    row_loss = wrapper_of(kind, 'token', fused)
    losses = [
        row_loss(**rows(call, slice(row, row + 1))).item() for row in counted(call).any(1).nonzero()[:, 0].tolist()
    ]
    mean = math.fsum(losses) / max(len(losses), 1)
    assert wrapper_of(kind, 'sequence', fused)(**call).item() == pytest.approx(mean, rel=1e-9, abs=1e-9)


@given(kind=KINDS, seed=SEEDS, fused=FUSED, p=st.floats(0, 1), q=st.floats(0, 1))
def test_an_exponent_is_continuous(kind: str, seed: int, fused: Any, p: float, q: float) -> None:
    """|d loss / dp| ≤ 2 ln(L) max|ℓ · loss_weight|, L the targets of the longest sequence, and w goes with L^(-p)."""
    call = random_call(kind, seed)
    loss, other = (wrapper_of(kind, power, fused)(**call).item() for power in (p, q))
    parts, by_row, by_power = (
        wrapper_of(kind, weighting, fused)(**call, return_breakdown=True)[1] for weighting in ('token', 'sequence', p)
    )
    of_length = (by_row.weight / parts.weight).where(parts.weight != 0, 1)  # 1 / L
    torch.testing.assert_close(by_power.weight, parts.weight * of_length**p, rtol=1e-9, atol=1e-12)
    largest = max((parts.weight * parts.token_loss).abs().flatten().tolist(), default=0.0)
    assert abs(loss - other) <= 2 * math.log(call['x'].shape[1]) * largest * abs(p - q) + 1e-9


@given(kind=KINDS, seed=SEEDS, fused=FUSED, end=st.sampled_from([(0.0, 'token'), (0.5, 'square'), (1.0, 'sequence')]))
def test_an_exponent_begins_and_ends_with_a_name(kind: str, seed: int, fused: Any, end: tuple[float, str]) -> None:
    call = random_call(kind, seed)
    want = value_and_gradients(wrapper_of(kind, end[1], fused), call)
    assert_same(wrapper_of(kind, end[0], fused), call, want=want)
