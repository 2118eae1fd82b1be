"""Bad input that only real networks can tell, in all three wrappers: forward and loss_normalizer alike."""

from typing import Any

import numpy as np
import pytest
import torch
from networks import continuous_network, decoder
from test_bad_input import ROWS, B, N, X
from torch import nn

from xtloss import AutoregressiveWrapper, ContinuousAutoregressiveWrapper, XLAutoregressiveWrapper


def wrappers() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Each of the three and a batch it takes, by name."""
    return {
        'ar': (AutoregressiveWrapper(decoder(max_seq_len=N)), X),
        'continuous': (ContinuousAutoregressiveWrapper(continuous_network(max_seq_len=N)), torch.zeros(B, N, 5)),
        'xl': (XLAutoregressiveWrapper(decoder(max_seq_len=64, max_mem_len=64)), X),
    }


@pytest.mark.parametrize('wrapper', ['ar', 'continuous', 'xl'])
def test_loss_normalizers_know_no_other_names(wrapper: str) -> None:
    module, x = wrappers()[wrapper]
    with pytest.raises(TypeError, match=r"^loss_normalizer.* unexpected keyword argument 'lenss'.*lens"):
        module.loss_normalizer(x, lenss=ROWS)


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
