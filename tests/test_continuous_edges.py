"""What strangers met at the edges of the continuous wrapper: narrow networks, no rows, hidden keys, odd arguments."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Unreachable, assert_same_gradients, frames, gradients
from networks import continuous_network as network
from test_continuous import LENS, REAL, B, N, padded_left
from torch import Tensor, nn

from xtloss import ContinuousAutoregressiveWrapper

NAN = float('nan')
NETWORKS: dict[str, dict[str, Any]] = {
    'rotary': {'layers_rotary_pos_emb': True, 'use_abs_pos_emb': False, 'layers_depth': 2},
    'no positions': {'use_abs_pos_emb': False},
    'flash': {'layers_attn_flash': True, 'use_abs_pos_emb': False},
    'memory tokens': {'num_memory_tokens': 2, 'use_abs_pos_emb': False},
    'gaussian': {'probabilistic': True, 'use_abs_pos_emb': False},
    'alibi': {'layers_alibi_pos_bias': True, 'use_abs_pos_emb': False},
    'shifted frames': {'layers_shift_tokens': 1, 'use_abs_pos_emb': False},
}
PADDING = ('lens', 'mask', 'lens and mask', 'left mask', 'left start', 'left mask and start')


def padded(x: Tensor, kind: str) -> dict[str, Any]:
    """The batch of three rows, its padding 0, and what says where it is."""
    x = x.masked_fill(~REAL[..., None], 0)
    start = {'seq_start_pos': N - LENS}
    return {
        'lens': {'x': x, 'lens': LENS},
        'mask': {'x': x, 'mask': REAL},
        'lens and mask': {'x': x, 'lens': LENS, 'mask': REAL},
        'left mask': {'x': padded_left(x), 'mask': padded_left(REAL)},
        'left start': {'x': padded_left(x), **start},
        'left mask and start': {'x': padded_left(x), 'mask': padded_left(REAL), **start},
    }[kind]


def key_mask(visible: Tensor, options: dict[str, Any]) -> Tensor:
    """(n-1,) bool for each row, with the memory tokens that come first, which x-transformers wants told too."""
    return F.pad(visible, (options.get('num_memory_tokens', 0), 0), value=True).expand(B, -1)


def alone(wrapper: nn.Module, x: Tensor) -> Tensor:
    """The mean over all targets, each row in a batch of its own, without padding."""
    count = (LENS - 1).sum().item()
    parts = [wrapper(x[i : i + 1, :length], normalizer=count) for i, length in enumerate(LENS.tolist())]
    return torch.stack(parts).sum()


@pytest.mark.parametrize('kind', PADDING)
@pytest.mark.parametrize('options', NETWORKS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_narrow_networks(dtype: torch.dtype, options: str, kind: str) -> None:
    wrapper = ContinuousAutoregressiveWrapper(network(dtype=dtype, **NETWORKS[options]))
    want = alone(wrapper, frames(dtype=dtype))
    got = wrapper(**padded(frames(dtype=dtype), kind))
    got.backward()
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=2e-2)
    assert all(p.grad.isfinite().all() for p in wrapper.parameters() if p.grad is not None)


@pytest.mark.parametrize('kind', PADDING)
@pytest.mark.parametrize('options', NETWORKS)
def test_padding_that_sees_no_key(options: str, kind: str) -> None:
    """x-transformers' softmax in float32 of a float64 row without keys is NaN backward."""
    wrapper = ContinuousAutoregressiveWrapper(network(dtype=torch.float64, **NETWORKS[options]))
    want = alone(wrapper, frames(dtype=torch.float64))
    got = wrapper(**padded(frames(dtype=torch.float64), kind))
    rounding = 1e-5 if 'flash' not in options else 1e-9  # that softmax rounds to float32
    assert got.item() == pytest.approx(want.item(), rel=rounding)
    assert_same_gradients(gradients(got, wrapper), gradients(want, wrapper), rounding * 10, floor=1e-3)


def test_holes_are_finite() -> None:
    for options in NETWORKS.values():
        wrapper = ContinuousAutoregressiveWrapper(network(dtype=torch.float64, **options))
        mask = torch.ones(B, N, dtype=torch.bool)
        mask[:, 0], mask[1, :4], mask[2, 3] = False, False, False
        loss = wrapper(frames(dtype=torch.float64), mask=mask)
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in gradients(loss, wrapper).values())


def masks_seen(net: nn.Module, **call: Any) -> set[str]:
    """Which masks a network is called with."""
    seen: list[dict[str, Any]] = []
    handle = net.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    ContinuousAutoregressiveWrapper(net)(**call)
    handle.remove()
    names = ('mask', 'lens', 'self_attn_kv_mask', 'attn_mask')
    return {name for name in names if seen[0].get(name) is not None}


def test_lens_of_a_causal_network_needs_no_mask() -> None:
    for options in NETWORKS.values():
        assert not masks_seen(network(**options), x=frames(), lens=LENS)
        assert masks_seen(network(**options), **padded(frames(), 'left mask'))


NO_ROWS: dict[str, dict[str, Any]] = {
    'nothing': {},
    'lens': {'lens': LENS},
    'mask': {'mask': REAL},
    'left mask': {'mask': REAL.flip(1)},
    'loss_mask': {'loss_mask': REAL},
    'loss_weight': {'loss_weight': torch.ones(B, N)},
    'row weight': {'loss_weight': torch.ones(B), 'lens': LENS},
    'seq_start_pos': {'seq_start_pos': N - LENS},
    'start and mask': {'seq_start_pos': N - LENS, 'mask': REAL.flip(1)},
    'key mask': {'self_attn_kv_mask': None},
    'key mask and lens': {'self_attn_kv_mask': None, 'lens': LENS},
    'sum_embeds': {'sum_embeds': torch.ones(B, N - 1, 16), 'mask': REAL},
    'mems': {'mems': [torch.ones(B, 3, 16)] * 2},
    'rollout': {'rollout_steps': 2},
    'rollout and mask': {'rollout_steps': 2, 'mask': REAL},
}
NO_ROW_NETWORKS: dict[str, dict[str, Any]] = NETWORKS | {
    'absolute': {},
    'dropout': {'layers_attn_dropout': 0.3, 'layers_ff_dropout': 0.3, 'emb_dropout': 0.3},
    'memory keys': {'layers_attn_num_mem_kv': 2},
    'relative bias': {'layers_rel_pos_bias': True},
    'dynamic bias': {'layers_dynamic_pos_bias': True},
}


def without_rows(call: dict[str, Any]) -> dict[str, Any]:
    cut = {name: value[:0] if isinstance(value, Tensor) else value for name, value in call.items()}
    return cut | ({'mems': [m[:0] for m in call['mems']]} if 'mems' in call else {})


@pytest.mark.parametrize('call', NO_ROWS)
@pytest.mark.parametrize('options', NO_ROW_NETWORKS)
def test_no_rows(options: str, call: str) -> None:
    arguments = NO_ROWS[call]
    if 'self_attn_kv_mask' in arguments:
        arguments = arguments | {'self_attn_kv_mask': key_mask(torch.arange(N - 1) < 5, NO_ROW_NETWORKS[options])}
    for weighting in ('token', 'sequence', 'padded'):
        wrapper = ContinuousAutoregressiveWrapper(network(**NO_ROW_NETWORKS[options]), loss_weighting=weighting)
        usual = gradients(wrapper(frames(), **arguments), wrapper).keys()
        state = torch.get_rng_state()
        loss, parts = wrapper(frames()[:0], **without_rows(arguments), return_breakdown=True)
        assert torch.equal(torch.get_rng_state(), state)
        assert loss.item() == 0
        assert parts.token_loss.shape == parts.weight.shape == (0, 2 if 'rollout' in call else N - 1)
        assert parts.normalizer.item() == 0
        loss.backward()
        grads = {name: p.grad for name, p in wrapper.named_parameters() if p.grad is not None}
        assert grads.keys() == usual
        assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize(
    ('options', 'argument', 'width'),
    [
        ({'layers_cross_attend': True}, 'context', (6, 16)),
        ({'layers_use_adaptive_layernorm': True, 'layers_dim_condition': 4}, 'condition', (4,)),
        ({'layers_use_adaptive_layernorm': True, 'layers_dim_condition': 4}, 'condition', (N - 1, 4)),
    ],
)
@pytest.mark.parametrize('padding', [{}, {'mask': REAL}])
def test_no_rows_of_what_the_network_reads_besides(
    options: dict[str, Any], argument: str, width: tuple[int, ...], padding: dict[str, Tensor]
) -> None:
    wrapper = ContinuousAutoregressiveWrapper(network(**options))
    usual = gradients(wrapper(frames(), **padding, **{argument: torch.randn(B, *width)}), wrapper).keys()
    extra = torch.randn(0, *width, requires_grad=True)
    loss = wrapper(frames()[:0], **without_rows(padding), **{argument: extra})
    loss.backward()
    assert loss.item() == 0
    assert {name for name, p in wrapper.named_parameters() if p.grad is not None} == usual
    assert extra.grad.shape == extra.shape


def test_no_rows_and_a_loss_that_reduces() -> None:
    for rollout_steps in (1, 2):
        wrapper = ContinuousAutoregressiveWrapper(network(num_memory_tokens=2), nn.MSELoss())
        loss = wrapper(frames()[:0], rollout_steps)
        loss.backward()
        assert loss.item() == 0
        assert any(p.grad is not None for p in wrapper.parameters())
        assert not any(p.grad.any() for p in wrapper.parameters() if p.grad is not None)


KEYS = torch.arange(N - 1)
KEY_MASKS: dict[str, tuple[Tensor | None, dict[str, Any]]] = {
    'the first key hidden': (KEYS > 0, {}),
    'all keys hidden': (KEYS < 0, {}),
    'two keys hidden, and a mask': (KEYS > 1, {'mask': REAL}),
    'a hidden key, and lens': (KEYS != 0, {'lens': LENS}),
    'a hidden key, and a start': (KEYS != 3, {'seq_start_pos': torch.tensor([3, 3, 0])}),
    'a hole at the start': (None, {'mask': torch.arange(N).expand(B, -1) > 2}),
    'a late start': (None, {'seq_start_pos': torch.tensor([0, 5, 3])}),
}


@pytest.mark.parametrize('call', KEY_MASKS)
@pytest.mark.parametrize('options', NETWORKS)
def test_no_loss_moves_with_a_later_frame(options: str, call: str) -> None:
    """A query that sees no key at all attends to every key alike, also to the future."""
    wrapper, x = ContinuousAutoregressiveWrapper(network(**NETWORKS[options])), frames()
    visible, arguments = KEY_MASKS[call]
    if visible is not None:
        arguments = arguments | {'self_attn_kv_mask': key_mask(visible, NETWORKS[options])}
    y = torch.cat((x[:, :5], 3 + x[:, 5:]), dim=1)
    (_, want), (_, got) = (wrapper(frames_, return_breakdown=True, **arguments) for frames_ in (x, y))
    torch.testing.assert_close(got.token_loss[:, :4], want.token_loss[:, :4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('options', [name for name in NETWORKS if name != 'shifted frames'])
@pytest.mark.parametrize('padding', [{}, {'mask': REAL}, {'lens': LENS}, {'seq_start_pos': torch.tensor([0, 1, 2])}])
def test_no_hidden_key_moves_a_later_loss(options: str, padding: dict[str, Tensor]) -> None:
    """Key 3 is hidden from all, so frame 3 moves no loss but those of itself and of the frame after it."""
    wrapper, x = ContinuousAutoregressiveWrapper(network(**NETWORKS[options])), frames()
    y = x.clone()
    y[:, 3] += 3
    call = {'self_attn_kv_mask': key_mask(KEYS != 3, NETWORKS[options])} | padding
    (_, want), (_, got) = (wrapper(frames_, return_breakdown=True, **call) for frames_ in (x, y))
    rest = [i - 1 for i in range(1, N) if i not in (3, 4)]
    torch.testing.assert_close(got.token_loss[:, rest], want.token_loss[:, rest], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('shape', [(B,), (B, N)])
@pytest.mark.parametrize('rollout_steps', [1, 2])
def test_learned_weights(shape: tuple[int, ...], rollout_steps: int) -> None:
    """The gradient of a weight is its target's loss over Z."""
    weight = torch.rand(shape, requires_grad=True)
    wrapper = ContinuousAutoregressiveWrapper(network())
    loss, parts = wrapper(frames(), rollout_steps, lens=LENS, loss_weight=weight, return_breakdown=True)
    (grad,) = torch.autograd.grad(loss, weight)
    want = parts.token_loss / parts.normalizer
    if len(shape) == 1:
        torch.testing.assert_close(grad, want.sum(dim=1))
    elif rollout_steps == 1:
        torch.testing.assert_close(grad[:, 1:], want)
    else:
        torch.testing.assert_close(grad.sum(dim=1), want.sum(dim=1))


@pytest.mark.parametrize('broken', [NAN, -1.0, torch.inf])
def test_a_broken_normalizer_is_seen(broken: float) -> None:
    wrapper = ContinuousAutoregressiveWrapper(network())
    for rollout_steps in (1, 2):
        assert wrapper(frames(), rollout_steps, normalizer=torch.tensor(broken)).isnan()
        assert wrapper(frames(), rollout_steps, lens=0 * LENS, normalizer=torch.tensor(broken)).isnan()


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_every_integer_is_one(dtype: torch.dtype) -> None:
    wrapper = ContinuousAutoregressiveWrapper(network(use_abs_pos_emb=False))
    for rollout_steps in (1, 2):
        torch.manual_seed(0)
        want = wrapper(frames(), rollout_steps, lens=LENS)
        torch.manual_seed(0)
        assert wrapper(frames(), rollout_steps, lens=LENS.to(dtype)).item() == want.item()
    want = wrapper(frames(), seq_start_pos=N - LENS)
    assert wrapper(frames(), seq_start_pos=(N - LENS).to(dtype)).item() == want.item()


def test_numbers_of_numpy_are_numbers() -> None:
    wrapper = ContinuousAutoregressiveWrapper(network())
    assert wrapper(frames(), normalizer=np.float32(2)).item() == wrapper(frames(), normalizer=2.0).item()
    assert wrapper(frames(), np.int64(1)).item() == wrapper(frames()).item()
    torch.manual_seed(0)
    want = wrapper(frames(), 2).item()
    torch.manual_seed(0)
    assert wrapper(frames(), np.int64(2)).item() == want
    wrapper.loss_weighting = np.float64(0.5)
    assert wrapper(frames()).item() > 0


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({'return_intermediates': True}, ValueError, 'return_intermediates .+'),
    ({'return_mems': True}, ValueError, 'return_mems .+'),
    ({'return_attn': True}, ValueError, 'return_attn .+'),
]


@pytest.mark.parametrize(('call', 'error', 'message'), BAD, ids=[next(iter(call)) for call, _, _ in BAD])
def test_bad_input(call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f'^{message}$'):
        ContinuousAutoregressiveWrapper(Unreachable())(**{'x': frames()} | call)
