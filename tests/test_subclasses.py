"""People derive from the wrappers: what they need not do, which names are theirs, and what a signature tells them."""

import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import x_transformers
from networks import continuous_network, decoder, frames, gradients
from torch import Tensor, nn

import xtloss

KINDS = ['AutoregressiveWrapper', 'ContinuousAutoregressiveWrapper', 'XLAutoregressiveWrapper']
kinds = pytest.mark.parametrize('kind', KINDS)
OPTIONS = {'equal_loss_weight_batch', 'loss_weighting', 'fused', 'unpad', 'trust_segments'}


def network(kind: str, **options: Any) -> nn.Module:
    return continuous_network(**options) if kind.startswith('Continuous') else decoder(num_tokens=11, **options)


def batch(kind: str) -> Tensor:
    if kind.startswith('Continuous'):
        return frames(3, 9)
    return torch.randint(1, 11, (3, 40 if kind.startswith('XL') else 9), generator=torch.Generator().manual_seed(1))


def skipping(kind: str, library: Any, skip: Callable[[nn.Module], None]) -> nn.Module:
    """A wrapper whose class sets by itself what upstream's constructor sets, and has its network as a property."""
    base = getattr(library, kind)
    built = getattr(x_transformers, kind)(network(kind))

    class Own(base):  # type: ignore[misc, valid-type]
        def __init__(self, inner: nn.Module) -> None:
            skip(self) if skip is not None else super(base, self).__init__()
            self.inner = inner
            vars(self).update({name: value for name, value in vars(built).items() if not name.startswith('_')})
            self._modules.update({name: m for name, m in built._modules.items() if name != 'net'})

        @property
        def net(self) -> nn.Module:
            return self.inner

    return Own(built.net)


@kinds
@pytest.mark.parametrize('skip', [None, nn.Module.__init__], ids=['super of the base', 'nn.Module'])
def test_a_subclass_that_does_not_run_our_constructor(kind: str, skip: Any) -> None:
    ours, theirs = skipping(kind, xtloss, skip), skipping(kind, x_transformers, skip)
    x = batch(kind)
    loss = ours(x)
    assert loss.item() == pytest.approx(theirs(x).item(), rel=1e-5)
    assert "loss_weighting='token'" in repr(ours)
    assert len(gradients(loss, ours)) > 0
    ours.loss_weighting = 'sequence_sum'
    assert ours(x).item() == pytest.approx(loss.item() * (x.shape[1] - 1), rel=1e-5)
    assert ours.loss_normalizer(x).item() == 3


@kinds
def test_a_model_that_was_pickled_before_the_import_was_swapped(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's class, which derived from upstream's then, and derives from ours now."""
    old, swapped = (
        type('Own', (getattr(library, kind),), {'__module__': __name__}) for library in (x_transformers, xtloss)
    )
    monkeypatch.setitem(globals(), 'Own', old)
    model, x = old(network(kind, layers_attn_flash=False)), batch(kind)  # of flash attention pickle cannot take a part
    file, want = pickle.dumps(model), model(x)
    monkeypatch.setitem(globals(), 'Own', swapped)
    loaded = pickle.loads(file)
    assert type(loaded) is swapped
    assert loaded(x).item() == pytest.approx(want.item(), rel=1e-5)
    assert 'loss_weighting' in repr(loaded)


@kinds
def test_the_names_that_a_wrapper_defines(kind: str) -> None:
    """All others belong to whoever derives from it."""
    ours = getattr(xtloss, kind)
    theirs = getattr(x_transformers, kind)
    names = {name for cls in ours.__mro__ if cls.__module__.startswith('xtloss') for name in vars(cls)}
    methods = {name for name in names if not (name.startswith('__') and name.endswith('__'))}
    allowed = {'forward', 'loss_normalizer', 'extra_repr', '_xtloss_finding', *OPTIONS, '_abc_impl'}
    assert methods <= allowed
    assert not methods & set(dir(theirs)) - {'forward', 'extra_repr'}
    mine, its = (vars(library(network(kind))) for library in (ours, theirs))
    assert mine.keys() - its.keys() <= OPTIONS


@kinds
def test_generate_is_inherited(kind: str) -> None:
    start, found = batch(kind)[:, :4], []
    for library in (xtloss, x_transformers):
        torch.manual_seed(7)
        found.append(getattr(library, kind)(network(kind)).generate(start, 6))
    assert torch.equal(*found)


@kinds
def test_signatures_show_what_upstream_takes_and_what_we_do(kind: str) -> None:
    ours, theirs = getattr(xtloss, kind), getattr(x_transformers, kind)
    shown, upstreams = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    assert list(shown)[: len(upstreams)] == list(upstreams)
    assert all(shown[name].default == upstreams[name].default for name in upstreams)
    assert {'equal_loss_weight_batch', 'loss_weighting'} <= set(shown) <= {*upstreams, *OPTIONS}
    assert 'args' not in shown

    config = {'ignore_index': 0, 'pad_value': 3, 'lr': 1e-3, 'loss_weighting': 'square'}
    model = ours(network(kind), **{name: value for name, value in config.items() if name in shown})
    assert model.loss_weighting == 'square'
    assert kind.startswith('Continuous') or (model.ignore_index, model.pad_value) == (0, 3)

    shown, upstreams = inspect.signature(ours.forward).parameters, inspect.signature(theirs.forward).parameters
    assert [name for name in shown if name in upstreams] == list(upstreams)
    assert {'lens', 'mask', 'loss_mask', 'loss_weight', 'normalizer', 'return_breakdown'} <= set(shown)
    bound = inspect.signature(ours.forward).bind(None, batch(kind), lens=1, context=2)
    assert bound.arguments['lens'] == 1


FOREIGN: dict[str, Any] = {
    'rollout_steps': 3,
    'return_outputs': True,
    'dropout_mems': False,
    'ttt_recurrent_steps': 1,
    'lenss': torch.ones(3),
}


@kinds
def test_an_argument_of_another_wrapper_is_refused(kind: str) -> None:
    """As a typo is."""
    model, x = getattr(xtloss, kind)(network(kind)), batch(kind)
    for name in FOREIGN.keys() - inspect.signature(model.forward).parameters.keys():
        for call in (model, model.loss_normalizer):
            with pytest.raises(TypeError, match=f"got an unexpected keyword argument '{name}'"):
                call(x, **{name: FOREIGN[name]})
