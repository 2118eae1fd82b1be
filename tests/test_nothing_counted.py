"""Nothing to count: a loss of 0 that still reaches every parameter, with gradients of 0, whatever is given."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from modes import LENS, B, N, batch, wrap
from modes import net as network
from networks import EXACT, ROTARY, Stub, gradients
from torch import Tensor, nn

import xtloss

K = 3  # steps of a rollout
REAL = torch.arange(N) < LENS[:, None]
EVERY = ('plain', 'not fused', 'unpadded', 'xl', 'continuous', 'rollout')
UNROLLED, OF_IDS, OF_ROWS, FRAMES = EVERY[:-1], EVERY[:4], EVERY[:3], EVERY[4:]
PADDED = ('plain', 'not fused', 'xl', 'continuous')
# of which kinds, and options of the network
NETWORKS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    'rotary, flash': (EVERY, {}),
    'absolute': (EVERY, {'layers_rotary_pos_emb': False, 'use_abs_pos_emb': True, **EXACT}),
    'memory tokens': ((*PADDED, 'rollout'), {'num_memory_tokens': 2}),
    'dropout': (EVERY, {'layers_attn_dropout': 0.3, 'layers_ff_dropout': 0.3, 'emb_dropout': 0.3}),
    'tied': (OF_IDS, {'tie_embedding': True}),
    'mixture of softmax': (OF_IDS, {'mixture_of_softmax': True}),
    'recycling': (OF_IDS, {'recycling': True, 'train_max_recycle_steps': 3}),
    'continuous head': (OF_ROWS, {'add_continuous_pred_head': True}),
    'looped': (OF_ROWS, {'looped': True, 'layers_pre_and_post_norm': True}),
    'gaussian': (FRAMES, {'probabilistic': True}),
}


def wrapped(kind: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A wrapper, and a usual call of it."""
    of = {'not fused': 'plain', 'rollout': 'continuous'}.get(kind, kind)
    model = wrap(of, network(of, torch.float32, **options), **({'fused': False} if kind == 'not fused' else {}))
    return model, {'x': batch(of, torch.float32)['x']} | ({'rollout_steps': K} if kind == 'rollout' else {})


def assert_nothing(model: nn.Module, usual: dict[str, Any], call: dict[str, Any], width: int, z: float = 0.0) -> None:
    """The loss of a call is 0, with a gradient of 0 for each parameter that a usual one reaches."""
    reached = gradients(model(**usual), model).keys()
    model.zero_grad()
    loss, parts = model(**call, return_breakdown=True)
    assert loss.item() == 0
    assert parts.token_loss.shape == parts.weight.shape == (len(call['x']), width)
    assert not parts.token_loss.any()
    assert not parts.weight.any()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert reached <= grads.keys()
    assert not any(grad.any() for grad in grads.values())
    assert model.loss_normalizer(**{k: v for k, v in call.items() if k != 'loss_weight'}).item() == z


NONE, NANS = torch.zeros(B, N).bool(), torch.full((B, N), math.nan)
NOTHING: dict[str, tuple[tuple[str, ...], Callable[[Tensor], dict[str, Any]]]] = {  # of which kinds, and the call
    'one token': (EVERY, lambda x: {'x': x[:, :1]}),
    'no rows': (EVERY, lambda x: {'x': x[:0]}),
    'no rows of one token': (EVERY, lambda x: {'x': x[:0, :1]}),
    'no length': (EVERY, lambda x: {'x': x, 'lens': torch.zeros(B).long()}),
    'length one': (EVERY, lambda x: {'x': x, 'lens': torch.ones(B).long()}),
    'all masked': (EVERY, lambda x: {'x': x, 'mask': NONE}),
    'alternating mask': (UNROLLED, lambda x: {'x': x, 'mask': (torch.arange(N) % 2 == 0).expand(B, N)}),
    'no loss': (UNROLLED, lambda x: {'x': x, 'loss_mask': NONE, 'loss_weight': NANS}),
    'all ignored': (OF_IDS, lambda x: {'x': torch.full_like(x, -100)}),
    'late start': (
        (*OF_ROWS, 'continuous'),
        lambda x: {'x': x, 'seq_start_pos': torch.full((B,), N - 1)},
    ),
    'k frames': (('rollout',), lambda x: {'x': x[:, :K]}),
    'short rows': (('rollout',), lambda x: {'x': x * math.nan, 'lens': torch.full((B,), K), 'loss_weight': NANS}),
    'no rows, a normalizer of all ranks': (('rollout',), lambda x: {'x': x[:0], 'normalizer': torch.tensor(7.0)}),
}


@pytest.mark.parametrize(('kind', 'nothing'), [(kind, name) for name, (kinds, _) in NOTHING.items() for kind in kinds])
def test_nothing_counted(kind: str, nothing: str) -> None:
    """Of each kind of head, with every kind of Z."""
    for name in ('rotary, flash', 'tied', 'mixture of softmax', 'continuous head', 'looped', 'gaussian'):
        kinds, options = NETWORKS[name]
        if kind not in kinds:
            continue
        model, usual = wrapped(kind, options)
        call = usual | NOTHING[nothing][1](usual['x'])
        width = K if kind == 'rollout' else call['x'].shape[1] - 1
        for weighting in ('token', 'sequence', 'padded'):
            model.loss_weighting = weighting
            z = len(call['x']) * width if weighting == 'padded' else 0
            for given in ({}, {'normalizer': 3.0}):
                assert_nothing(model, usual, given | call, width, z)


# of which kinds, options of the network, and what goes with its rows, of which none are then given
GIVEN: dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]] = {
    'lens': (PADDED, {}, {'lens': LENS}),
    'left mask': (PADDED, {}, {'mask': REAL.flip(1)}),
    'weights': (UNROLLED, {}, {'loss_mask': REAL, 'loss_weight': torch.rand(B)}),
    'mems': (PADDED, {}, {'mems': [torch.ones(B, 3, 16)] * 2}),
    'starts': ((*OF_ROWS, 'continuous'), {}, {'seq_start_pos': N - LENS, 'mask': REAL.flip(1)}),
    'key mask': (('plain', 'not fused', 'continuous'), {}, {'self_attn_kv_mask': REAL}),
    'segment_ids': (('plain',), {}, {'segment_ids': REAL.long()}),
    'prepend_embeds': (
        ('plain',),
        {},
        {'prepend_embeds': torch.randn(B, 2, 16), 'prepend_mask': torch.ones(B, 2).bool()},
    ),
    'sum_embeds': (PADDED, {}, {'sum_embeds': torch.randn(B, N, 16)}),
    'context': (PADDED, {'layers_cross_attend': True}, {'context': torch.randn(B, 6, 16)}),
    'condition': (
        PADDED,
        {'layers_use_adaptive_layernorm': True, 'layers_dim_condition': 4},
        {'condition': torch.randn(B, 4)},
    ),
}
NO_ROWS = [
    (kind, name, given)
    for given in ('lens', 'left mask')
    for name, (kinds, _) in NETWORKS.items()
    for kind in kinds
    if given == 'lens' or kind != 'rollout'
]
NO_ROWS += [(kind, 'rotary, flash', name) for name, (kinds, *_) in GIVEN.items() for kind in kinds]


def without_rows(value: Any) -> Any:
    if isinstance(value, list):
        return [without_rows(part) for part in value]
    return value[:0].clone().requires_grad_(value.is_floating_point()) if isinstance(value, Tensor) else value


@pytest.mark.parametrize(('kind', 'name', 'given'), list(dict.fromkeys(NO_ROWS)))
def test_no_rows(kind: str, name: str, given: str) -> None:
    _, options, call = GIVEN[given]
    if kind == 'continuous':  # whose inputs are one frame less
        call = {k: v[:, 1:] if k in ('sum_embeds', 'self_attn_kv_mask') else v for k, v in call.items()}
    model, usual = wrapped(kind, NETWORKS[name][1] | options)
    none = {k: without_rows(v) for k, v in (usual | call).items()}
    assert_nothing(model, usual | call, none, K if kind == 'rollout' else N - 1)
    for k in {'prepend_embeds', 'context', 'condition', 'sum_embeds'} & none.keys():
        assert none[k].grad.shape == none[k].shape


class Averages(Stub):
    """A network that is not of x-transformers: NaN where its mask hides a whole row."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(0))
        self.emb = nn.Embedding(11, 11)

    def forward(self, x: Tensor, *, mask: Tensor, **kwargs: Any) -> tuple[Tensor, SimpleNamespace]:
        mean = (self.emb(x) * mask[..., None]).sum(dim=1, keepdim=True) / mask.sum(dim=1)[:, None, None]
        return self.emb(x) + mean, SimpleNamespace()


def test_no_rows_of_a_mask_hide_nothing() -> None:
    model = xtloss.AutoregressiveWrapper(Averages())
    loss = model(torch.zeros(0, N, dtype=torch.long), mask=REAL[:0])
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in model.parameters())


def test_outputs_of_no_rows_have_none() -> None:
    model, usual = wrapped('plain', ROTARY)
    _, (logits, cache) = model(usual['x'][:0], mask=REAL[:0], return_outputs=True)
    assert logits.shape == (0, N - 1, 11)
    assert all(t.shape[0] == 0 for t in cache.hiddens)


@pytest.mark.parametrize('steps', [1, K])
def test_a_loss_that_reduces_has_nothing_to_reduce(steps: int) -> None:
    inner = network('continuous', torch.float32, num_memory_tokens=2)
    model = xtloss.ContinuousAutoregressiveWrapper(inner, lambda pred, target: (1 + pred - target).square().mean())
    x = batch('continuous', torch.float32)['x']
    for nothing in (x[:0], x[:, :1]):
        loss = model(nothing, steps)
        loss.backward()
        assert loss.item() == 0
        assert any(p.grad is not None for p in model.parameters())
        assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
