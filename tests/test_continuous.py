"""ContinuousAutoregressiveWrapper: upstream's loss where that is right, the equation where it is wrong."""

import random
from functools import partial
from typing import Any

import networks
import pytest
import torch
import torch.nn.functional as F
from batches import RULES, WEIGHTS, random_batch, subsets
from hypothesis import given
from hypothesis import strategies as st
from modes import assert_equation
from networks import WEIGHTINGS, assert_same_gradients, frames, gradients
from networks import continuous_network as network
from oracle_continuous import differentiable_frames, expected_frames
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from x_transformers import ContinuousAutoregressiveWrapper as Upstream

from xtloss import ContinuousAutoregressiveWrapper

B, N, D = 3, 8, 5
NAN = float('nan')
KINDS: dict[str, dict[str, Any]] = {'squared': {}, 'absolute': {'use_l1_loss': True}, 'gaussian': {}}
LENS = torch.tensor([8, 3, 5])
REAL = torch.arange(N) < LENS[:, None]


class Stub(networks.Stub):
    """Its answer is the tensor alone, (b, n, d), or of mean and variance, (2, b, n, d)."""

    def __init__(self, out: Tensor) -> None:
        super().__init__(out)
        self.probabilistic = out.ndim == 4

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(x, **kwargs)[0]


LOSSES: dict[str, Any] = {
    'smooth': partial(F.smooth_l1_loss, reduction='none'),
    'a number a frame': lambda pred, target: 1 - F.cosine_similarity(pred, target, dim=-1),
    'one number': nn.MSELoss(),
    'a number a row': lambda pred, target: (pred - target).square().mean(dim=(1, 2)),
}
PARITY: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    'squared': ({}, ()),
    'absolute': ({}, (None, True)),
    'gaussian': ({'probabilistic': True}, ()),
    **{name: ({}, (loss_fn,)) for name, loss_fn in LOSSES.items()},
    'weigh sequences': ({}, (None, False, True)),
    'memory tokens': ({'num_memory_tokens': 2}, ()),
    'rotary, flash': ({'layers_rotary_pos_emb': True, 'layers_attn_flash': True, 'use_abs_pos_emb': False}, ()),
}


def assert_upstreams(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Loss, gradients and the gradient of the frames are the same."""
    ours.x = theirs.x = nn.Parameter(x)
    want, got = theirs(theirs.x), ours(ours.x)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert_same_gradients(gradients(got, ours), gradients(want, theirs), 1e-5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize('case', PARITY)
def test_equals_upstream_where_nothing_is_masked(case: str) -> None:
    options, args = PARITY[case]
    theirs, ours = Upstream(network(**options), *args), ContinuousAutoregressiveWrapper(network(**options), *args)
    assert_upstreams(ours, theirs, frames())


@given(seed=st.integers(0, 10**6), using=subsets([*RULES[1:5], *WEIGHTS]))
def test_the_equation(seed: int, using: set[str]) -> None:
    draw = random.Random(seed)
    b, n, kind = draw.randint(1, 4), draw.randint(1, 7), draw.choice(sorted(KINDS))
    weighting, normalizer = draw.choice(WEIGHTINGS), draw.choice([None, 2.5])
    call = random_batch(seed, b, n, using, features=D)
    out = random_batch(seed + 1, b, max(n - 1, 1), set(), features=D)['x']
    out = torch.stack((out, out.sin().square() + 0.1)) if kind == 'gaussian' else out
    want = expected_frames(out, kind=kind, weighting=weighting, normalizer=normalizer, **call)
    out.requires_grad_()
    wrapper = ContinuousAutoregressiveWrapper(Stub(out), **KINDS[kind], loss_weighting=weighting)
    loss, parts = wrapper(**call, normalizer=normalizer, return_breakdown=True)

    assert_equation((loss, parts), want)
    assert parts.auxiliary.item() == 0
    if normalizer is None:
        z = wrapper.loss_normalizer(**call.without('loss_weight'))
        assert z.item() == pytest.approx(want.normalizer, rel=1e-6)
    (grad,) = torch.autograd.grad(loss, out)
    (grad_want,) = torch.autograd.grad(differentiable_frames(out, call['x'], want, kind) + 0 * out.sum(), out)
    torch.testing.assert_close(grad, grad_want, rtol=1e-9, atol=1e-12)


def test_four_frames_by_hand() -> None:
    """Errors 1, 2, 3 · 4 with shares ¼ ¼ ¼ · ¼ and ⅙ ⅙ ⅙ · ½ and ⅙ ⅙ ⅙ · ⅙."""
    out = torch.zeros(2, 3, 2)
    x = torch.tensor([[9.0, 1, 2, 3], [9.0, 4, 7, 7]])[..., None].expand(2, 4, 2)
    lens = torch.tensor([4, 2])
    for weighting, want in {'token': 10 / 4, 'sequence': 6 / 6 + 4 / 2, 'padded': 10 / 6, 'sequence_sum': 5}.items():
        wrapper = ContinuousAutoregressiveWrapper(Stub(out), use_l1_loss=True, loss_weighting=weighting)
        assert wrapper(x, lens=lens).item() == pytest.approx(want, rel=1e-6)


def test_where_upstream_is_another() -> None:
    """It trains the last real frame to predict the first of padding, and sums over features what it should average."""
    x, padded = frames(), frames()
    padded[1, 3] += 100  # the first frame of padding of a row of three
    theirs, ours = Upstream(network()), ContinuousAutoregressiveWrapper(network())
    assert theirs(x, lens=LENS).item() < 5
    assert theirs(padded, lens=LENS).item() > 500
    assert ours(padded, lens=LENS).item() == ours(x, lens=LENS).item()

    theirs, ours = (cls(network(), equal_loss_weight_batch=True) for cls in (Upstream, type(ours)))
    full = torch.ones(B, N, dtype=torch.bool)
    assert ours(x, mask=full).item() == pytest.approx(theirs(x).item(), rel=1e-5)
    assert theirs(x, mask=full).item() == pytest.approx(D * theirs(x).item(), rel=1e-5)


def test_nan_outputs_where_nothing_counts() -> None:
    x, out = frames(), torch.randn(2, B, N - 1, D).exp()
    loss_mask = torch.rand(B, N) < 0.6
    holes = out.masked_fill(~loss_mask[:, 1:, None], NAN)
    for given_out, kind in ((holes, 'gaussian'), (holes[0], 'squared')):
        given_out.requires_grad_()
        loss = ContinuousAutoregressiveWrapper(Stub(given_out))(x, loss_mask=loss_mask)
        want = expected_frames(given_out.nan_to_num(1), x, kind, loss_mask=loss_mask)
        assert loss.item() == pytest.approx(want.loss, rel=1e-5)
        (grad,) = torch.autograd.grad(loss, given_out)
        assert grad.isfinite().all()


def test_what_the_network_gets() -> None:
    """Inputs, 0 where they are padding, and what hides it; a row of one frame is read, as networks cannot read none."""
    stub, x = Stub(torch.zeros(B, N - 1, D)), frames()
    for call in ({'loss_mask': REAL}, {'lens': LENS}, {'mask': REAL, 'sum_embeds': None}):
        ContinuousAutoregressiveWrapper(stub)(x, **call)
        read, told = stub.seen[-1]
        padding = ~REAL[:, :-1, None] & ('loss_mask' not in call)
        assert torch.equal(read, x[:, :-1].masked_fill(padding, 0))
        assert list(told) == ([] if 'loss_mask' in call else ['mask'])
        assert all(torch.equal(mask, REAL[:, :-1]) for mask in told.values())
    ContinuousAutoregressiveWrapper(stub)(x[:, :1], lens=LENS)
    assert stub.seen[-1][0].shape == (B, 1, D)


WEIGHED: dict[str, Any] = {
    'lens': LENS,
    'mask': REAL,
    'loss_mask': REAL,
    'loss_weight': torch.ones(B),
    'seq_start_pos': torch.zeros(B).long(),
    'normalizer': 1.0,
    'return_breakdown': True,
    'loss_weighting': 'sequence_sum',  # an option
}


ROLLED = [by for by in WEIGHED if by not in ('loss_mask', 'seq_start_pos')]  # which a rollout refuses


@pytest.mark.parametrize(('steps', 'by'), [*((1, by) for by in WEIGHED), *((3, by) for by in ROLLED)])
def test_a_reduced_loss_cannot_be_weighted(steps: int, by: str) -> None:
    wrapper, call = ContinuousAutoregressiveWrapper(network(), nn.MSELoss()), {by: WEIGHED[by]}
    if by == 'loss_weighting':
        wrapper.loss_weighting = call.pop(by)
    k = N - 1 if steps == 1 else steps
    message = rf'loss_fn must return \(3, {k}, 5\) or \(3, {k}\) where there are masks or weights, got \(\)'
    with pytest.raises(ValueError, match=f'^{message}$'):
        wrapper(frames(), steps, **call)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_are_made_in_float32_or_wider(dtype: torch.dtype) -> None:
    x, out = frames(), torch.randn(2, B, N - 1, D).exp().to(dtype)
    for answer, kind in ((out, 'gaussian'), (out[0], 'squared')):
        wrapper = ContinuousAutoregressiveWrapper(Stub(answer))
        loss, parts = wrapper(x.to(dtype), lens=LENS, return_breakdown=True)
        assert {loss.dtype, *(part.dtype for part in parts)} == {torch.promote_types(dtype, torch.float32)}
        assert loss.item() == pytest.approx(expected_frames(answer, x.to(dtype), kind, lens=LENS).loss, rel=1e-5)
    assert ContinuousAutoregressiveWrapper(network().to(dtype)).loss_normalizer(x.to(dtype)).dtype == loss.dtype


# the loss of a probabilistic network, which looks at no values


def gaussian() -> ContinuousAutoregressiveWrapper:
    return ContinuousAutoregressiveWrapper(network(probabilistic=True))


@pytest.mark.parametrize('call', [{}, {'lens': LENS}])
def test_several_networks_at_once(call: dict[str, Any]) -> None:
    x, models = frames(), [gaussian(), gaussian()]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(1.1)
    parameters, buffers = stack_module_state(models)
    got = vmap(lambda p, b: functional_call(models[0], (p, b), (x,), call))(parameters, buffers)
    torch.testing.assert_close(got, torch.stack([model(x, **call) for model in models]))


@pytest.mark.slow
@pytest.mark.parametrize('steps', [1, 3])
def test_compiled_whole(whole_graphs: None, steps: int) -> None:
    model, losses = gaussian(), []
    for run in (torch.compile(model, fullgraph=True, backend='aot_eager'), model):
        torch.manual_seed(7)
        losses.append(run(frames(), steps, lens=LENS))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    assert_same_gradients(*(gradients(loss, model) for loss in losses), 1e-5)


def test_small_variances_and_what_is_none() -> None:
    """As torch: clamped for the value, not for the gradient; what torch refuses as negative is seen as NaN."""
    model, x = gaussian(), torch.randn(B, N, 5)
    for scale in (1.0, -20.0):
        with torch.no_grad():
            model.net.project_out.weight.fill_(scale / 16)
        assert_upstreams(model, Upstream(model.net), x)
    model.net.forward = lambda inputs, **_: torch.stack((inputs, -torch.ones_like(inputs)))
    assert model(x).isnan()


def test_a_hook_of_the_loss_is_heard() -> None:
    model, x = gaussian(), frames()
    want = 2 * model(x)
    model.loss_fn.register_forward_hook(lambda _, __, losses: 2 * losses)
    torch.testing.assert_close(model(x), want)
