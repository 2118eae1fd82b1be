"""rollout_steps > 1: the frames a network predicts from its own predictions enter the equation, row by row."""

import random
from functools import partial
from typing import Any

import networks
import pytest
import torch
from batches import WEIGHTS, random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from modes import assert_equation
from networks import EXACT, WEIGHTINGS, Unreachable, assert_same_gradients, gradients
from networks import continuous_network as network
from oracle_rollout import expected_rollout, rolled_out
from test_continuous import KINDS, LOSSES, Stub
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
    'context': EXACT | {'layers_cross_attend': True},
    'condition': EXACT | {'layers_use_adaptive_layernorm': True, 'layers_dim_condition': 4, 'layers_depth': 2},
}
OF_ROWS = {'context': (6, 16), 'condition': (4,)}  # what these networks read of each row


@pytest.mark.parametrize('name', NETWORKS)
@settings(max_examples=6)
@given(seed=st.integers(0, 10**6))
def test_the_equation(name: str, seed: int) -> None:
    """Values, and the gradients of parameters, of frames and of weights: ℓ · L^-p / Z of each frame predicted."""
    draw = random.Random(f'{name} {seed}')
    b, n, steps, kind = draw.randint(1, 4), draw.randint(1, 9), draw.randint(2, 4), draw.choice(sorted(KINDS))
    weighting, normalizer = draw.choice(WEIGHTINGS), draw.choice([None, 2.5])
    using = {argument for argument in ('lens', 'right mask', *WEIGHTS) if draw.random() < 0.5}
    call = random_batch(draw.getrandbits(32), b, n, using, features=D)
    x, weight, padding = nn.Parameter(call.pop('x')), call.get('loss_weight'), call.without('loss_weight')
    real = torch.ones(b, n, dtype=torch.bool) & padding.get('mask', torch.tensor(True))
    lengths = torch.minimum(real.sum(dim=1), padding.get('lens', torch.tensor(n))).tolist()
    of_rows = {name: torch.randn(b, *OF_ROWS[name], dtype=torch.float64)} if name in OF_ROWS else {}

    net = network(dtype=torch.float64, probabilistic=kind == 'gaussian', **NETWORKS[name])
    for p in net.parameters():  # where a condition would meet zeros
        nn.init.normal_(p, std=0.3) if not p.any() else None
    torch.manual_seed(seed)
    rolled, next_number = rolled_out(net, x, lengths, steps, weight, **of_rows), torch.rand(())
    want, want_loss = expected_rollout(rolled, kind, weighting=weighting, normalizer=normalizer)
    wrapper = ContinuousAutoregressiveWrapper(net, **KINDS[kind], loss_weighting=weighting)
    wrapper.x, felt = x, torch.zeros(b, n, dtype=torch.float64)  # by each weight
    for row, start in enumerate(rolled.starts):
        if start:
            costs = torch.tensor([want.plain_weight[row], want.token_loss[row]], dtype=torch.float64).prod(dim=0)
            felt[row, start : start + steps] = costs / want.normalizer

    wrapper.loss_weight = None if weight is None else nn.Parameter(weight)
    call = {'loss_weight': wrapper.loss_weight, 'normalizer': normalizer, **padding, **of_rows}
    torch.manual_seed(seed)
    loss, parts = wrapper(x, steps, return_breakdown=True, **call)
    if n > steps:  # what is drawn depends on shapes alone: data-parallel ranks stay in step
        assert torch.equal(torch.rand(()), next_number)
    assert_equation((loss, parts), want)
    if normalizer is None:
        z = wrapper.loss_normalizer(x, rollout_steps=steps, **padding)
        assert z.item() == pytest.approx(want.normalizer, rel=1e-6)
    wanted = gradients(want_loss + 0 * x.sum(), wrapper)
    if weight is not None:
        wanted['loss_weight'] = felt if weight.ndim == 2 else felt.sum(dim=1)
    assert_same_gradients(gradients(loss, wrapper), wanted, 1e-9, floor=1e-5)


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


@pytest.mark.parametrize('junk', [NAN, torch.inf, 1e30])
@pytest.mark.parametrize('options', [{}, {'probabilistic': True}, {'layers_attn_flash': True}])
def test_what_is_not_read_and_no_target_reaches_nothing(options: dict[str, Any], junk: float) -> None:
    """Padding, rows too short, and the frames after the last one predicted."""
    wrapper = ContinuousAutoregressiveWrapper(network(**options))
    x, weight = frames(dtype=torch.float32), torch.rand(B, N)
    torch.manual_seed(7)
    starts = torch.tensor(rolled_out(wrapper.net, x, LENS.tolist(), K).starts)[:, None]
    needed = (torch.arange(N) < starts + K) & (starts > 0)
    want = seeded(wrapper, x, lens=LENS, loss_weight=weight)
    y = x.masked_fill(~needed[..., None], junk).requires_grad_()
    got = seeded(wrapper, y, lens=LENS, loss_weight=weight.masked_fill(~needed, junk))
    assert not needed[1].any()
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    assert_same_gradients(gradients(got, wrapper), gradients(want, wrapper), 1e-6)
    (grad,) = torch.autograd.grad(seeded(wrapper, y, lens=LENS), y)
    assert grad.isfinite().all()
    assert not grad[~needed].any()
    assert seeded(wrapper, x.masked_fill(needed[..., None], NAN), lens=LENS).isnan()


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


@pytest.mark.parametrize('loss_fn', LOSSES.values(), ids=list(LOSSES))
def test_losses_of_ones_own(loss_fn: Any) -> None:
    net = network(dtype=torch.float64, **EXACT)
    torch.manual_seed(7)
    rolled = rolled_out(net, frames(), [N] * B, K)
    want = loss_fn(rolled.out, rolled.frames[:, 1:]).mean()
    got = seeded(ContinuousAutoregressiveWrapper(net, loss_fn), frames())
    assert got.item() == pytest.approx(want.item(), rel=1e-9)


PER_FRAME: dict[str, Any] = {
    'sum_embeds': torch.zeros(B, N, 16),
    'self_attn_kv_mask': REAL,
    'attn_mask': torch.ones(N, N).bool(),
    'attn_bias': torch.zeros(2, N, N),
    'pos': torch.arange(N),
    'in_attn_cond': torch.zeros(B, N, 16),
    'condition': torch.zeros(B, N, 4),
    'cache': object(),
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
    wrapper = ContinuousAutoregressiveWrapper(Stub(torch.zeros(B, N, width)), LOSSES['a number a frame'])
    with pytest.raises(ValueError, match=f'^net must predict the 5 features that it reads, got {width}$'):
        wrapper(frames(), K)
