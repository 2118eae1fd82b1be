"""rollout_steps > 1: the frames a network predicts from its own predictions enter the equation, row by row."""

from functools import partial
from typing import Any

import networks
import pytest
import torch
import torch.nn.functional as F
from batches import WEIGHTS, random_batch, subsets
from hypothesis import given
from hypothesis import strategies as st
from networks import EXACT, WEIGHTINGS, Unreachable, assert_same_gradients, gradients
from networks import continuous_network as network
from oracle_rollout import expected_rollout, rolled_out
from test_continuous import KINDS, Stub, cosine, smooth
from torch import Tensor, nn

from xtloss import ContinuousAutoregressiveWrapper

B, N, D, K = 4, 9, 5, 3
NAN = float('nan')
LENS = torch.tensor([9, 3, 4, 7])  # the second row is too short for three steps, the third can start at one place only
REAL = torch.arange(N) < LENS[:, None]
frames = partial(networks.frames, b=B, n=N, dtype=torch.float64)


def seeded(wrapper: nn.Module, x: Tensor, steps: int = K, **call: Any) -> Any:
    torch.manual_seed(7)
    return wrapper(x, steps, **call)


class Times(nn.Module):
    """A network that multiplies a frame by its one parameter. It keeps what it was called with."""

    max_seq_len, can_cache_kv, probabilistic = 64, False, False

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.seen: list[tuple[Tensor, dict[str, Any]]] = []

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        self.seen.append((x.detach(), kwargs))
        return x * self.factor


def test_three_steps_by_hand() -> None:
    """One frame is read, 1; predicted are a, a², a³, where 3, 3, 10 come: errors -1, 1, -2 at a = 2."""
    net = Times()
    x = torch.tensor([1.0, 3, 3, 10]).reshape(1, 4, 1)
    loss, parts = ContinuousAutoregressiveWrapper(net)(x, 3, return_breakdown=True)
    loss.backward()
    assert parts.token_loss.tolist() == [[1, 1, 4]]
    assert parts.normalizer.item() == 3
    assert loss.item() == 2
    # Σ 2 (aˢ - x) s aˢ⁻¹ / 3: what is fed back has a gradient, else it would be Σ 2 (aˢ - x) aˢ⁻¹ / 3
    assert net.factor.grad.item() == pytest.approx((-2 * 1 + 2 * 2 * 2 - 4 * 3 * 4) / 3)
    assert [read.flatten().tolist() for read, _ in net.seen] == [[1], [1, 2], [1, 2, 4]]
    assert not any(arguments for _, arguments in net.seen)


def test_shares_by_hand() -> None:
    """Two rows of two frames predicted, errors 1 2 · 3 4, and a row too short: shares ¼, ½ · ½ over 2 rows, ⅙."""
    x = torch.tensor([[9.0, 1, 2], [9, 3, 4], [9, 5, 6]])[..., None].expand(3, 3, 2)
    call = {'lens': torch.tensor([3, 3, 2]), 'rollout_steps': 2}
    wants = {'token': 10 / 4, 'sequence': (1.5 + 3.5) / 2, 'padded': 10 / 6, 'sequence_sum': 5, 'square': 10 / 4}
    for weighting, want in wants.items():
        wrapper = ContinuousAutoregressiveWrapper(Times(0.0), use_l1_loss=True, loss_weighting=weighting)
        assert wrapper(x, **call).item() == pytest.approx(want, rel=1e-6)
        z = wrapper.loss_normalizer(x, **call)
        want_z = {'sequence': 2, 'padded': 6, 'sequence_sum': 2, 'square': 4 / 2**0.5}.get(weighting, 4)
        assert z.item() == pytest.approx(want_z, rel=1e-6)


NETWORKS: dict[str, dict[str, Any]] = {
    'absolute': EXACT,
    'rotary': EXACT | {'layers_rotary_pos_emb': True, 'use_abs_pos_emb': False},
    'no positions, flash': {'layers_attn_flash': True, 'use_abs_pos_emb': False},
    'sinusoidal, memory tokens': EXACT | {'scaled_sinu_pos_emb': True, 'num_memory_tokens': 2},
    'alibi, shifted tokens': EXACT | {'layers_alibi_pos_bias': True, 'layers_shift_tokens': 1, 'layers_depth': 2},
    'relative bias, memory keys': EXACT | {'layers_rel_pos_bias': True, 'layers_attn_num_mem_kv': 2},
}


@given(
    seed=st.integers(0, 10**6),
    b=st.integers(1, 4),
    n=st.integers(1, 9),
    steps=st.integers(2, 4),
    options=st.sampled_from(sorted(NETWORKS)),
    kind=st.sampled_from(sorted(KINDS)),
    using=subsets(['lens', 'right mask', *WEIGHTS]),
    weighting=st.sampled_from(WEIGHTINGS),
    normalizer=st.sampled_from([None, 2.5]),
)
def test_the_equation(
    seed: int,
    b: int,
    n: int,
    steps: int,
    options: str,
    kind: str,
    using: set[str],
    weighting: str | float,
    normalizer: float | None,
) -> None:
    call = random_batch(seed, b, n, using, features=D)
    x, loss_weight, padding = call.pop('x').requires_grad_(), call.get('loss_weight'), call.without('loss_weight')
    real = torch.ones(b, n, dtype=torch.bool) & padding.get('mask', torch.tensor(True))
    lengths = torch.minimum(real.sum(dim=1), padding.get('lens', torch.tensor(n))).tolist()

    net = network(dtype=torch.float64, probabilistic=kind == 'gaussian', **NETWORKS[options])
    torch.manual_seed(seed)
    rolled = rolled_out(net, x, lengths, steps, loss_weight)
    want, want_loss = expected_rollout(rolled, kind, weighting=weighting, normalizer=normalizer)
    wrapper = ContinuousAutoregressiveWrapper(net, **KINDS[kind], loss_weighting=weighting)
    torch.manual_seed(seed)
    loss, parts = wrapper(x, steps, loss_weight=loss_weight, normalizer=normalizer, return_breakdown=True, **padding)

    assert loss.item() == pytest.approx(want.loss, rel=1e-9, abs=1e-12)
    for name in ('weight', 'token_loss'):
        table = torch.tensor(getattr(want, name), dtype=torch.float64).reshape(b, steps)
        torch.testing.assert_close(getattr(parts, name), table, rtol=1e-9, atol=1e-12)
    assert parts.normalizer.item() == pytest.approx(want.normalizer, rel=1e-9)
    if normalizer is None:
        z = wrapper.loss_normalizer(x, rollout_steps=steps, **padding)
        assert z.item() == pytest.approx(want.normalizer, rel=1e-6)

    named = dict(net.named_parameters()) | {'x': x}

    def grads(value: Tensor) -> dict[str, Tensor]:
        value = value + 0 * x.sum()
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        return {name: g for name, g in zip(named, found, strict=True) if g is not None}

    assert_same_gradients(grads(loss), grads(want_loss), 1e-9, floor=1e-5)


class Normal(Times):
    """A probabilistic network: the mean is the frame times the parameter, the variance its square times `spread`."""

    probabilistic = True

    def __init__(self, spread: float) -> None:
        super().__init__(0.7)
        self.spread = nn.Parameter(torch.tensor(spread))
        self.double()

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return torch.stack((super().forward(x, **kwargs), self.spread * x.square() + 1e-9))


@pytest.mark.parametrize('spread', [2.0, 1e-3, 0.0])
def test_a_probabilistic_network_reads_what_is_drawn(spread: float) -> None:
    """Drawn by mean and deviation, so that gradients reach both; a deviation is at least √1e-5."""
    net, x = Normal(spread), frames()
    torch.manual_seed(7)
    rolled = rolled_out(net, x, LENS.tolist(), K)
    costs = (rolled.out[0] - rolled.frames[:, 1:]).square() + rolled.out[1]
    wrapper = ContinuousAutoregressiveWrapper(net, lambda out, target: (out[0] - target).square() + out[1])
    want, got = costs[LENS > K].mean(), seeded(wrapper, x, lens=LENS)
    assert got.item() == pytest.approx(want.item(), rel=1e-9)
    params = list(net.parameters())
    for g, w in zip(torch.autograd.grad(got, params), torch.autograd.grad(want, params), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


def test_arguments_of_a_row_reach_the_network() -> None:
    context, condition = torch.randn(B, 6, 16, dtype=torch.float64), torch.randn(B, 4, dtype=torch.float64)
    crossing = network(dtype=torch.float64, layers_cross_attend=True, **EXACT)
    adaptive = network(
        dtype=torch.float64, layers_use_adaptive_layernorm=True, layers_dim_condition=4, layers_depth=2, **EXACT
    )
    for net, arguments in ((crossing, {'context': context}), (adaptive, {'condition': condition})):
        for p in net.parameters():  # some start at zero
            nn.init.normal_(p, std=0.3)
        torch.manual_seed(7)
        want, _ = expected_rollout(rolled_out(net, frames(), LENS.tolist(), K, **arguments), 'squared')
        assert seeded(ContinuousAutoregressiveWrapper(net), frames(), lens=LENS, **arguments).item() == pytest.approx(
            want.loss, rel=1e-9
        )


def test_every_start_is_as_likely() -> None:
    """Frame i is i, predicted is 0: the first error is where the prediction begins."""
    rows = 12_000
    lens = torch.tensor([9, 3, 4, 7]).repeat(rows // 4)
    x = torch.arange(9.0).reshape(1, 9, 1).expand(rows, 9, 1)
    wrapper = ContinuousAutoregressiveWrapper(Times(0.0), use_l1_loss=True)
    _, parts = wrapper(x, K, lens=lens, return_breakdown=True)
    first = parts.token_loss[:, 0].long()
    for length in (9, 4, 7):
        places = length - K  # 1 … length - k
        counts = first[lens == length].bincount(minlength=9).tolist()
        expected = rows / 4 / places
        assert sum(counts[1 : 1 + places]) == rows / 4
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts[1 : 1 + places])
    assert not first[lens == 3].any()


@pytest.mark.parametrize('call', [{}, {'lens': LENS}, {'mask': REAL}], ids=lambda call: next(iter(call), 'nothing'))
def test_what_is_drawn_depends_on_shapes_alone(call: dict[str, Any]) -> None:
    """One number a row, then the noise of each step: data-parallel ranks and steps stay in step."""
    seeded(ContinuousAutoregressiveWrapper(network(probabilistic=True)), frames(dtype=torch.float32), **call)
    got = torch.rand(3)
    torch.manual_seed(7)
    torch.rand(B)
    for _ in range(K):
        torch.randn(B, 1, D)
    assert torch.equal(got, torch.rand(3))


@pytest.mark.parametrize('weighting', WEIGHTINGS)
@pytest.mark.parametrize('probabilistic', [False, True])
def test_one_loss_however_it_is_padded(weighting: str | float, probabilistic: bool) -> None:
    net = network(dtype=torch.float64, probabilistic=probabilistic, **EXACT)
    wrapper = ContinuousAutoregressiveWrapper(net, loss_weighting=weighting)
    x, shares = frames(), torch.rand(B, N, dtype=torch.float64)
    want = seeded(wrapper, x, lens=LENS, loss_weight=shares)
    want_grads = gradients(want, wrapper)
    wider = {'x': F.pad(x, (0, 0, 0, 4), value=NAN), 'lens': LENS, 'loss_weight': F.pad(shares, (0, 4), value=NAN)}
    for call in ({'x': x, 'mask': REAL, 'loss_weight': shares}, wider):  # also 'padded', whose Z is b · k
        got = seeded(wrapper, **call)
        assert got.item() == pytest.approx(want.item(), rel=1e-9)
        assert_same_gradients(gradients(got, wrapper), want_grads, 1e-9, floor=1e-5)


@pytest.mark.parametrize('shape', [(B,), (B, N)])
def test_a_loss_weight_gets_its_gradient(shape: tuple[int, ...]) -> None:
    """ℓ / Z of each frame predicted."""
    weight = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    wrapper = ContinuousAutoregressiveWrapper(network(dtype=torch.float64))
    loss, parts = seeded(wrapper, frames(), lens=LENS, loss_weight=weight, return_breakdown=True)
    (grad,) = torch.autograd.grad(loss, weight)
    torch.manual_seed(7)
    starts, want = rolled_out(wrapper.net, frames(), LENS.tolist(), K).starts, torch.zeros(B, N, dtype=torch.float64)
    for row, start in enumerate(starts):
        if start:
            want[row, start : start + K] = parts.token_loss[row] / parts.normalizer
    torch.testing.assert_close(grad, want if len(shape) == 2 else want.sum(dim=1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('weighting', WEIGHTINGS)
def test_micro_batches_add_up(weighting: str | float) -> None:
    """Rows of k + 1 frames start at one place, so nothing depends on the draw."""
    wrapper = ContinuousAutoregressiveWrapper(network(dtype=torch.float64, **EXACT), loss_weighting=weighting)
    x, lens = frames(), torch.tensor([K + 1, K + 1, K, K + 1])
    want = wrapper(x, K, lens=lens)
    parts = [{'x': x[i : i + 2], 'lens': lens[i : i + 2], 'rollout_steps': K} for i in (0, 2)]
    z = sum(wrapper.loss_normalizer(**part) for part in parts)
    got = sum(wrapper(**part, normalizer=z) for part in parts)
    assert got.item() == pytest.approx(want.item(), rel=1e-9)
    assert_same_gradients(gradients(got, wrapper), gradients(want, wrapper), 1e-9)


@pytest.mark.parametrize('junk', [NAN, torch.inf, 1e30])
@pytest.mark.parametrize('options', [{}, {'probabilistic': True}, {'layers_attn_flash': True}])
def test_what_is_not_read_and_no_target_reaches_nothing(options: dict[str, Any], junk: float) -> None:
    """Padding, rows too short, and the frames after the last one predicted."""
    net = network(**options)
    wrapper = ContinuousAutoregressiveWrapper(net)
    x = frames(dtype=torch.float32)
    torch.manual_seed(7)
    starts = rolled_out(net, x, LENS.tolist(), K).starts
    needed = torch.arange(N) < torch.tensor([start + K if start else 0 for start in starts])[:, None]
    weight = torch.rand(B, N)
    want = seeded(wrapper, x, lens=LENS, loss_weight=weight)
    y = x.masked_fill(~needed[..., None], junk).requires_grad_()
    got = seeded(wrapper, y, lens=LENS, loss_weight=weight.masked_fill(~needed, junk))
    assert not needed[1].any()
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    assert_same_gradients(gradients(got, wrapper), gradients(want, wrapper), 1e-6)
    (grad,) = torch.autograd.grad(seeded(wrapper, y, lens=LENS), y)
    assert grad.isfinite().all()
    assert not grad[~needed].any()


class Growing(Times):
    """A network whose predictions overflow when they are fed back, also those from zeros."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(x + 1, **kwargs)


def test_predictions_of_a_row_too_short_are_not_fed_back() -> None:
    """They may overflow, and no gradient survives that, though it be multiplied by 0."""
    net = Growing(1e30)
    loss = ContinuousAutoregressiveWrapper(net)(torch.ones(B, N, D), 6, lens=torch.full((B,), 5))
    loss.backward()
    assert loss.item() == 0
    assert net.factor.grad.item() == 0


def test_what_is_broken_where_it_counts_is_seen() -> None:
    wrapper = ContinuousAutoregressiveWrapper(network())
    x = frames(dtype=torch.float32)
    x[0] = NAN
    assert wrapper(x, K, lens=LENS).isnan()


@pytest.mark.parametrize('probabilistic', [False, True])
def test_a_mask_of_padding_on_the_left_gives_nan(probabilistic: bool) -> None:
    wrapper = ContinuousAutoregressiveWrapper(network(probabilistic=probabilistic))
    x, holes = frames(dtype=torch.float32), REAL.clone()
    holes[0, 4] = False
    for mask in (REAL.flip(1), holes):
        loss, parts = seeded(wrapper, x, mask=mask, return_breakdown=True)
        broken = [row for row in range(B) if (mask[row, 1:] & ~mask[row, :-1]).any() and mask[row].sum() > K]
        assert loss.isnan()
        assert parts.token_loss.isnan().any(dim=1).nonzero().flatten().tolist() == broken
    short = (REAL & (LENS <= K)[:, None]).flip(1)
    loss = wrapper(x, K, mask=short)
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in wrapper.parameters() if p.grad is not None)


def test_more_steps_than_frames_or_positions() -> None:
    wrapper = ContinuousAutoregressiveWrapper(network())
    assert wrapper(frames(dtype=torch.float32), 1000).item() == 0
    x = frames(n=33, dtype=torch.float32)  # the network takes 32 positions
    assert wrapper(x, 32).item() > 0


@pytest.mark.parametrize('loss_fn', [smooth, cosine])
def test_losses_of_ones_own(loss_fn: Any) -> None:
    net = network(dtype=torch.float64, **EXACT)
    torch.manual_seed(7)
    rolled = rolled_out(net, frames(), LENS.tolist(), K)
    costs = loss_fn(rolled.out, rolled.frames[:, 1:])
    costs = costs.mean(dim=-1) if costs.ndim == 3 else costs
    got = seeded(ContinuousAutoregressiveWrapper(net, loss_fn), frames(), lens=LENS)
    assert got.item() == pytest.approx(costs[LENS > K].mean().item(), rel=1e-9)


def test_a_loss_that_reduces() -> None:
    net = network(dtype=torch.float64)
    ours, reduced = (ContinuousAutoregressiveWrapper(net, loss_fn) for loss_fn in (None, nn.MSELoss()))
    assert seeded(reduced, frames()).item() == pytest.approx(seeded(ours, frames()).item(), rel=1e-9)
    for call in ({'lens': LENS}, {'mask': REAL}, {'loss_weight': torch.ones(B)}, {'return_breakdown': True}):
        with pytest.raises(ValueError, match=r'^loss_fn must return \(4, 3, 5\) or \(4, 3\) where .*, got \(\)$'):
            reduced(frames(), K, **call)
    one = ContinuousAutoregressiveWrapper(net, lambda pred, target: (1 + pred - target).square().mean())
    for x in (frames(n=K), frames(n=1), frames()[:0]):
        loss = one(x, K)
        loss.backward()
        assert loss.item() == 0
        assert not any(p.grad.any() for p in net.parameters() if p.grad is not None)


PER_FRAME: dict[str, Any] = {
    'sum_embeds': torch.zeros(B, N, 16),
    'self_attn_kv_mask': REAL,
    'attn_mask': torch.ones(N, N).bool(),
    'attn_bias': torch.zeros(2, N, N),
    'pos': torch.arange(N),
    'in_attn_cond': torch.zeros(B, N, 16),
    'condition': torch.zeros(B, N, 4),
    'prepend_embeds': torch.zeros(B, 1, 16),
    'cache': object(),
    'segment_ids': REAL.long(),
    'loss_mask': REAL,
    'seq_start_pos': N - LENS,
}


@pytest.mark.parametrize('name', PER_FRAME)
def test_refused(name: str) -> None:
    wrapper = ContinuousAutoregressiveWrapper(Unreachable())
    for run in (wrapper, wrapper.loss_normalizer):
        with pytest.raises(ValueError, match=f'^{name} (cannot be given here: .+|must have shape .+, got .+)$'):
            run(frames(), rollout_steps=2, **{name: PER_FRAME[name]})


@pytest.mark.parametrize('width', [1, D + 1])
def test_other_features_than_those_it_reads(width: int) -> None:
    wrapper = ContinuousAutoregressiveWrapper(Stub(torch.zeros(B, N, width)), cosine)
    with pytest.raises(ValueError, match=f'^net must predict the 5 features that it reads, got {width}$'):
        wrapper(frames(), K)


@pytest.mark.slow
def test_compiled() -> None:
    wrapper = ContinuousAutoregressiveWrapper(Times())
    x = frames(dtype=torch.float32)
    want = seeded(wrapper, x, lens=LENS)
    want_grads = gradients(want, wrapper)
    got = seeded(torch.compile(wrapper, backend='aot_eager', fullgraph=True), x, lens=LENS)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    assert_same_gradients(gradients(got, wrapper), want_grads, 1e-6)


def test_a_stub_of_fixed_answers_is_read_where_the_row_ends() -> None:
    out = torch.arange(8.0).reshape(1, 8, 1)
    x = torch.zeros(1, 9, 1)
    wrapper = ContinuousAutoregressiveWrapper(Stub(out), use_l1_loss=True)
    torch.manual_seed(7)
    first = 1 + int(torch.rand(1).item() * (9 - K))
    _, parts = seeded(wrapper, x, return_breakdown=True)
    assert parts.token_loss.tolist() == [[first - 1.0, first, first + 1.0]]
