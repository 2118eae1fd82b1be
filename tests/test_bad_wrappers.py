"""Every error of the contract in all three wrappers: forward and loss_normalizer alike."""

from typing import Any

import numpy as np
import pytest
import torch
from networks import decoder
from test_bad_input import FLAGS, IN_FORWARD, ROWS, B, N, X
from torch import nn
from x_transformers import ContinuousTransformerWrapper, Decoder

from xtloss import AutoregressiveWrapper, ContinuousAutoregressiveWrapper, XLAutoregressiveWrapper


def wrappers() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Each of the three and a batch it takes, by name."""
    layers = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, verbose=False)
    frames = ContinuousTransformerWrapper(dim_in=3, dim_out=3, max_seq_len=N, attn_layers=layers)
    return {
        'ar': (AutoregressiveWrapper(decoder(max_seq_len=N)), X),
        'continuous': (ContinuousAutoregressiveWrapper(frames), torch.zeros(B, N, 3)),
        'xl': (XLAutoregressiveWrapper(decoder(max_seq_len=64, max_mem_len=64)), X),
    }


EMBEDS = torch.zeros(B, 5, 16)
SHARED: list[tuple[str, Any, type[Exception], str]] = [
    *((argument, value, error, message) for argument, value, error, message in IN_FORWARD if argument != 'x'),
    ('normalizer', 1j, TypeError, r'normalizer must be .*, got complex'),
    ('normalizer', np.float32('inf'), ValueError, r'normalizer must be > 0 and finite.*, got inf'),
    ('normalizer', 10**400, ValueError, r'normalizer must be > 0 and finite.*, got 1000.*'),
    ('mask', FLAGS.to_sparse(), TypeError, r'mask must be a dense tensor, got a sparse_coo one'),
    ('return_breakdown', ROWS, TypeError, r'return_breakdown must be bool, got Tensor'),
    ('return_breakdown', None, TypeError, r'return_breakdown must be bool, got NoneType'),
]
OF_ONE = [
    ('ar', 'return_outputs', ROWS, TypeError, r'return_outputs must be bool, got Tensor'),
    ('ar', 'return_outputs', 1, TypeError, r'return_outputs must be bool, got int'),
    ('ar', 'prepend_embeds', [[1.0]], TypeError, r'prepend_embeds must be floating point, a tensor, got list'),
    ('ar', 'prepend_embeds', EMBEDS.long(), TypeError, r'prepend_embeds must be floating point, got int64'),
    ('ar', 'prepend_embeds', EMBEDS[0], ValueError, r'prepend_embeds must have shape \(4, p, 16\), got \(5, 16\)'),
    ('ar', 'prepend_embeds', EMBEDS[:1], ValueError, r'prepend_embeds must have shape .*, got \(1, 5, 16\)'),
    ('ar', 'prepend_embeds', EMBEDS[..., 1:], ValueError, r'prepend_embeds must have shape .*, got \(4, 5, 15\)'),
    ('ar', 'prepend_embeds', EMBEDS.to('meta'), ValueError, r'prepend_embeds must be on cpu like x, got meta'),
    ('continuous', 'rollout_steps', 2.0, TypeError, r'rollout_steps must be int, got float'),
    ('continuous', 'rollout_steps', ROWS, TypeError, r'rollout_steps must be int, got Tensor'),
    ('continuous', 'rollout_steps', np.int64(0), ValueError, r'rollout_steps must be >= 1, got 0'),
    ('xl', 'ttt_recurrent_steps', np.bool_(1), TypeError, r'ttt_recurrent_steps must be int, got bool'),
    ('xl', 'ttt_recurrent_steps', 10**30, ValueError, r'ttt_recurrent_steps must be .*, got 1000.*'),
]
IN_WRAPPERS = [
    (wrapper, *row)
    for wrapper in ('ar', 'continuous', 'xl')
    for row in SHARED
    if wrapper == 'ar' or (row[0] != 'segment_ids' and (wrapper, row[0]) != ('xl', 'seq_start_pos'))
] + OF_ONE


@pytest.mark.parametrize(('wrapper', 'argument', 'value', 'error', 'message'), IN_WRAPPERS)
def test_wrappers(wrapper: str, argument: str, value: Any, error: type[Exception], message: str) -> None:
    module, x = wrappers()[wrapper]
    with pytest.raises(error, match=f'^{message}'):
        module(x, **{argument: value})


IN_NORMALIZERS = [
    ('lenss', ROWS, TypeError, r"loss_normalizer.* unexpected keyword argument 'lenss'.*lens"),
    ('loss_masks', FLAGS, TypeError, r"loss_normalizer.* unexpected keyword argument 'loss_masks'.*loss_mask"),
    ('loss_weight', ROWS, TypeError, r'loss_weight must be floating point, got int64'),
    ('loss_weight', torch.ones(3), ValueError, r'loss_weight must have shape .*, got \(3,\)'),
    ('normalizer', -1.0, ValueError, r'normalizer must be > 0.*, got -1.0'),
    ('return_breakdown', ROWS, TypeError, r'return_breakdown must be bool, got Tensor'),
]


@pytest.mark.parametrize('wrapper', ['ar', 'continuous', 'xl'])
@pytest.mark.parametrize(('argument', 'value', 'error', 'message'), IN_NORMALIZERS)
def test_loss_normalizers_raise_what_forward_raises(
    wrapper: str, argument: str, value: Any, error: type[Exception], message: str
) -> None:
    module, x = wrappers()[wrapper]
    with pytest.raises(error, match=f'^{message}'):
        module.loss_normalizer(x, **{argument: value})


def test_loss_normalizer_refuses_fused_beside_outputs_as_forward_does() -> None:
    module = AutoregressiveWrapper(decoder(max_seq_len=N), fused=True)
    for function in (module, module.loss_normalizer):
        with pytest.raises(ValueError, match=r'fused.*return_outputs'):
            function(X, return_outputs=True)


@pytest.mark.parametrize('wrapper', ['ar', 'continuous', 'xl'])
def test_lens_as_the_second_argument(wrapper: str) -> None:
    """It lands elsewhere; with one row it would be taken for True."""
    module, x = wrappers()[wrapper]
    with pytest.raises((TypeError, ValueError), match=r'^(return_outputs|rollout_steps|mems) must be .*, got'):
        module(x[:1], ROWS[:1])


def test_fused_is_looked_at_whenever_it_is_used() -> None:
    module = AutoregressiveWrapper(decoder(max_seq_len=N))
    for fused, error in ((0, TypeError), (None, TypeError), ('yes', ValueError)):
        module.fused = fused
        with pytest.raises(error, match=r'^fused must be'):
            module(X)
    module.fused = np.bool_(False)
    assert module(X).isfinite()


@pytest.mark.parametrize('ours', [AutoregressiveWrapper, XLAutoregressiveWrapper])
@pytest.mark.parametrize('call', [{}, {'lens': ROWS}, {'return_breakdown': True}])
def test_networks_of_several_heads(ours: type[nn.Module], call: dict[str, Any]) -> None:
    """They return a tuple, of which no single loss can be made."""
    model = ours(decoder(max_seq_len=N, num_output_heads=3))
    for function in (model, model.loss_normalizer):
        with pytest.raises(ValueError, match=r'^net must have one head to make logits, got num_output_heads=3$'):
            function(X, **call)


@pytest.mark.parametrize('wrapper', ['ar', 'continuous', 'xl'])
@pytest.mark.parametrize('name', ['mems', 'mem_masks'])
def test_memories_are_lists(wrapper: str, name: str) -> None:
    module, x = wrappers()[wrapper]
    for value in (torch.zeros(3, 2, 16), 3):
        with pytest.raises(TypeError, match=rf'^{name} must be a list of tensors, got (Tensor|int)'):
            module(x, **{name: value})
