"""Nothing to count: a loss of 0 that still reaches every parameter, with gradients of 0, whatever is given."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from modes import FEATURES, LENS, B, N, batch
from modes import net as network
from networks import EXACT, ROTARY, gradients
from torch import Tensor, nn

import xtloss

K = 3  # steps of a rollout
REAL = torch.arange(N) < LENS[:, None]
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # the wrapper; its options; what goes with each call
    'plain': ('AutoregressiveWrapper', {}, {}),
    'not fused': ('AutoregressiveWrapper', {'fused': False}, {}),
    'unpad': ('AutoregressiveWrapper', {'unpad': True}, {}),
    'xl': ('XLAutoregressiveWrapper', {}, {}),
    'continuous': ('ContinuousAutoregressiveWrapper', {}, {}),
    'rollout': ('ContinuousAutoregressiveWrapper', {}, {'rollout_steps': K}),
}
FRAMES = ('continuous', 'rollout')
ABSOLUTE = {'layers_rotary_pos_emb': False, 'use_abs_pos_emb': True}
NETWORKS: dict[str, dict[str, Any]] = {
    'rotary, flash': {},
    'absolute': {**ABSOLUTE, **EXACT},
    'memory tokens': {'num_memory_tokens': 2},
    'memory keys': {'layers_attn_num_mem_kv': 2, 'layers_attn_flash': False},
    'dropout': {'layers_attn_dropout': 0.3, 'layers_ff_dropout': 0.3, 'emb_dropout': 0.3},
    'relative bias': {'layers_rel_pos_bias': True, 'layers_rotary_pos_emb': False, 'layers_attn_flash': False},
    'dynamic bias': {'layers_dynamic_pos_bias': True, 'layers_rotary_pos_emb': False, 'layers_attn_flash': False},
    'alibi': {'layers_alibi_pos_bias': True, 'layers_rotary_pos_emb': False, 'layers_attn_flash': False},
    'shifted': {'layers_shift_tokens': 1},
}
OF_TOKENS: dict[str, dict[str, Any]] = {
    'tied': {'tie_embedding': True},
    'mixture of softmax': {'mixture_of_softmax': True},
    'recycling': {'recycling': True, 'train_max_recycle_steps': 3},
}
OF_ROWS: dict[str, dict[str, Any]] = {  # which XL has no place for
    'continuous head': {'add_continuous_pred_head': True},
    'looped': {'looped': True, 'layers_pre_and_post_norm': True},
    'streams': {'layers_num_residual_streams': 2, 'layers_depth': 2},
}
OF_FRAMES: dict[str, dict[str, Any]] = {'gaussian': {'probabilistic': True}}
LEAKING = ('memory tokens', 'memory keys', 'shifted')  # refused by unpad


def networks_of(kind: str) -> dict[str, dict[str, Any]]:
    if kind in FRAMES:
        return NETWORKS | OF_FRAMES
    nets = NETWORKS | OF_TOKENS | ({} if kind == 'xl' else OF_ROWS)
    return {name: options for name, options in nets.items() if kind != 'unpad' or name not in LEAKING}


def wrapped(kind: str, options: dict[str, Any], **more: Any) -> Any:
    name, own, _ = KINDS[kind]
    inner = network('continuous' if kind in FRAMES else 'xl' if kind == 'xl' else 'plain', torch.float32, **options)
    return getattr(xtloss, name)(inner, **own, **more)


def x_of(kind: str) -> Tensor:
    return batch('continuous' if kind in FRAMES else 'plain', torch.float32)['x']


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


EVERY = tuple(KINDS)
UNROLLED, OF_IDS, PADDED = EVERY[:-1], EVERY[:4], ('plain', 'not fused', 'xl', 'continuous')
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
        ('plain', 'not fused', 'unpad', 'continuous'),
        lambda x: {'x': x, 'seq_start_pos': torch.full((B,), N - 1)},
    ),
    'k frames': (('rollout',), lambda x: {'x': x[:, :K]}),
    'short rows': (('rollout',), lambda x: {'x': x * math.nan, 'lens': torch.full((B,), K), 'loss_weight': NANS}),
    'no rows, a normalizer of all ranks': (('rollout',), lambda x: {'x': x[:0], 'normalizer': torch.tensor(7.0)}),
}


@pytest.mark.parametrize(('kind', 'nothing'), [(kind, name) for name, (kinds, _) in NOTHING.items() for kind in kinds])
def test_nothing_counted(kind: str, nothing: str) -> None:
    """Of each kind of head, with every kind of Z."""
    options, x, with_each = networks_of(kind), x_of(kind), KINDS[kind][2]
    names = ['rotary, flash', 'tied', 'mixture of softmax', 'continuous head', 'looped', 'gaussian']
    call = {**with_each, **NOTHING[nothing][1](x)}
    width = K if kind == 'rollout' else call['x'].shape[1] - 1
    for name in filter(options.__contains__, names):
        model = wrapped(kind, options[name])
        for weighting in ('token', 'sequence', 'padded'):
            model.loss_weighting = weighting
            z = len(call['x']) * width if weighting == 'padded' else 0
            for given in ({}, {'normalizer': 3.0}):
                assert_nothing(model, {'x': x, **with_each}, given | call, width, z)


# of which kinds, options of the network, and what goes with its rows, of which none are then given
GIVEN: dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]] = {
    'lens': (PADDED, {}, {'lens': LENS}),
    'left mask': (PADDED, {}, {'mask': REAL.flip(1)}),
    'weights': (UNROLLED, {}, {'loss_mask': REAL, 'loss_weight': torch.rand(B)}),
    'mems': (PADDED, {}, {'mems': [torch.ones(B, 3, 16)] * 2}),
    'starts': (('plain', 'not fused', 'unpad', 'continuous'), {}, {'seq_start_pos': N - LENS, 'mask': REAL.flip(1)}),
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
NO_ROWS = [(kind, name, 'left mask') for kind in UNROLLED for name in networks_of(kind)]
NO_ROWS += [(kind, name, 'lens') for kind in KINDS for name in networks_of(kind)]
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
    model, with_each = wrapped(kind, networks_of(kind)[name] | options), KINDS[kind][2]
    none = {k: without_rows(v) for k, v in call.items()} | with_each
    assert_nothing(
        model, {'x': x_of(kind), **call, **with_each}, {'x': x_of(kind)[:0], **none}, K if kind == 'rollout' else N - 1
    )
    for k in {'prepend_embeds', 'context', 'condition', 'sum_embeds'} & none.keys():
        assert none[k].grad.shape == none[k].shape


@pytest.mark.parametrize('options', [{'add_attn_z_loss': True}, {'mask_prob': 0.3}])
def test_no_rows_whatever_the_options(options: dict[str, Any]) -> None:
    model, call = wrapped('plain', ABSOLUTE | {'layers_attn_flash': False}, **options), {'mask': REAL, 'lens': LENS}
    none = {k: without_rows(v) for k, v in call.items()}
    assert_nothing(model, {'x': x_of('plain'), **call}, {'x': x_of('plain')[:0], **none}, N - 1)


def test_outputs_of_no_rows_have_none() -> None:
    model = wrapped('plain', ROTARY)
    _, (logits, cache) = model(x_of('plain')[:0], mask=REAL[:0], return_outputs=True)
    assert logits.shape == (0, N - 1, 11)
    assert all(t.shape[0] == 0 for t in cache.hiddens)


@pytest.mark.parametrize('steps', [1, K])
def test_a_loss_that_reduces_has_nothing_to_reduce(steps: int) -> None:
    inner = network('continuous', torch.float32, num_memory_tokens=2)
    model = xtloss.ContinuousAutoregressiveWrapper(inner, lambda pred, target: (1 + pred - target).square().mean())
    for x in (x_of('continuous')[:0], x_of('continuous')[:, :1]):
        loss = model(x, steps)
        loss.backward()
        assert x.shape[2] == FEATURES
        assert loss.item() == 0
        assert any(p.grad is not None for p in model.parameters())
        assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
