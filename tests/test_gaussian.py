"""The loss of a probabilistic network where there are no values to look at: meta, fake tensors, transforms, graphs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same_gradients, frames, gradients
from networks import continuous_network as network
from test_continuous import LENS, B, N
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, stack_module_state, vmap
from x_transformers import ContinuousAutoregressiveWrapper as Upstream

from xtloss import ContinuousAutoregressiveWrapper

CALLS: dict[str, dict[str, Any]] = {
    'plain': {},
    'lens': {'lens': LENS},
    'rollout': {'rollout_steps': 2, 'lens': LENS},
    'no rows': {'lens': LENS[:0]},
}


def wrapper() -> ContinuousAutoregressiveWrapper:
    return ContinuousAutoregressiveWrapper(network(probabilistic=True))


def batch(call: str) -> tuple[Tensor, dict[str, Any]]:
    x = frames(dtype=torch.float32)
    return (x[:0] if call == 'no rows' else x), CALLS[call]


@pytest.mark.parametrize('call', CALLS)
def test_meta(call: str) -> None:
    x, given = batch(call)
    given = {name: value.to('meta') if isinstance(value, Tensor) else value for name, value in given.items()}
    model = wrapper().to('meta')
    loss = model(x.to('meta'), **given)
    loss.backward()
    assert loss.is_meta
    assert loss.shape == ()


@pytest.mark.parametrize('call', CALLS)
def test_fake(call: str) -> None:
    x, given = batch(call)
    model = wrapper()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in given.items()}
        assert model(mode.from_tensor(x), **given).shape == ()


@pytest.mark.parametrize('call', ['plain', 'lens'])
def test_several_networks_at_once(call: str) -> None:
    x, given = batch(call)
    models = [wrapper(), wrapper()]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(1.1)
    parameters, buffers = stack_module_state(models)
    got = vmap(lambda p, b: functional_call(models[0], (p, b), (x,), given))(parameters, buffers)
    torch.testing.assert_close(got, torch.stack([model(x, **given) for model in models]))


@pytest.mark.slow
def test_compiled_whole(whole_graphs: None) -> None:
    x, given = batch('lens')
    got = torch.compile(wrapper(), fullgraph=True, backend='eager')(x, **given)
    torch.testing.assert_close(got, wrapper()(x, **given))


def test_small_variances_and_what_is_none() -> None:
    """As torch: clamped for the value, not for the gradient; what torch refuses as negative is seen as NaN."""
    model, x = wrapper(), torch.randn(B, N, 5)
    for scale in (1.0, -20.0):
        with torch.no_grad():
            model.net.project_out.weight.copy_(torch.full_like(model.net.project_out.weight, scale / 16))
        theirs = Upstream(model.net)
        got, want = model(x), theirs(x)
        torch.testing.assert_close(got, want)
        assert_same_gradients(gradients(got, model), gradients(want, theirs), 1e-5)
    model.net.forward = lambda inputs, **_: torch.stack((inputs, -torch.ones_like(inputs)))
    assert model(x).isnan()


def test_a_hook_of_the_loss_is_heard() -> None:
    model, x = wrapper(), frames(dtype=torch.float32)
    want = 2 * model(x)
    model.loss_fn.register_forward_hook(lambda _, __, losses: 2 * losses)
    torch.testing.assert_close(model(x), want)
    mean, variance = torch.randn(2, B, N, 5).abs()
    expected = F.gaussian_nll_loss(mean, x, variance, reduction='none')
    model.loss_fn._forward_hooks.clear()
    torch.testing.assert_close(model.loss_fn((mean, variance), x), expected)
