"""A query that sees no key sees itself, whichever argument hides the keys: the caller's `attn_mask` too.

Float64, where x-transformers fills what is hidden with -inf's like, and a row of them is NaN.
"""

from typing import Any

import pytest
import torch
from networks import assert_same_gradients, continuous_network, decoder, frames, gradients
from torch import Tensor

from xtloss import AutoregressiveWrapper, ContinuousAutoregressiveWrapper, XLAutoregressiveWrapper

B, N = 3, 8
LENS = torch.tensor([8, 5, 2])
REAL = torch.arange(N) < LENS[:, None]
NETWORKS: dict[str, dict[str, Any]] = {
    'absolute': {},
    'rotary': {'layers_rotary_pos_emb': True},
    'flash': {'layers_attn_flash': True},
    'alibi': {'layers_alibi_pos_bias': True, 'use_abs_pos_emb': False},
    'window': {'layers_attn_max_attend_past': 2},
}
PADDING: dict[str, dict[str, Tensor]] = {
    'lens': {'lens': LENS},
    'loss_mask': {'loss_mask': REAL},
    'mask': {'mask': REAL},
    'key mask': {'loss_mask': REAL, 'self_attn_kv_mask': REAL},
    'segment_ids': {'segment_ids': REAL.long()},
    'start': {'loss_mask': REAL, 'seq_start_pos': torch.zeros(B, dtype=torch.long)},
}


def made(kind: str, network: dict[str, Any]) -> tuple[Any, Tensor]:
    if kind == 'continuous':
        return ContinuousAutoregressiveWrapper(continuous_network(**network).double()), frames(B, N).double()
    ours = AutoregressiveWrapper if kind == 'ar' else XLAutoregressiveWrapper
    net = decoder(num_tokens=11, max_seq_len=16, **network).double()
    return ours(net), torch.randint(1, 11, (B, N), generator=torch.Generator().manual_seed(0))


def blind_at_padding(n: int) -> Tensor:
    """(b, 1, n, n): a query of padding sees nothing, and nothing sees padding."""
    real = REAL[:, :n]
    return (real[:, :, None] & real[:, None, :])[:, None]


TAKES = {'ar': list(PADDING), 'continuous': ['lens', 'loss_mask', 'mask'], 'xl': ['lens', 'loss_mask', 'mask']}


@pytest.mark.parametrize(('kind', 'padding'), [(kind, padding) for kind, taken in TAKES.items() for padding in taken])
@pytest.mark.parametrize('network', NETWORKS)
def test_gradients_are_those_without_the_mask(kind: str, network: str, padding: str) -> None:
    """What is hidden from padding alone moves no target that counts."""
    call = PADDING[padding]
    model, x = made(kind, NETWORKS[network])
    n = N if kind == 'ar' else N - 1
    loss = model(x, attn_mask=blind_at_padding(n), **call)
    want = model(x, **call)
    assert loss.item() == pytest.approx(want.item(), rel=1e-9)
    assert_same_gradients(gradients(loss, model), gradients(want, model), 1e-9)


@pytest.mark.parametrize('network', NETWORKS)
@pytest.mark.parametrize('kind', ['ar', 'continuous', 'xl'])
def test_a_mask_that_hides_everything(kind: str, network: str) -> None:
    model, x = made(kind, NETWORKS[network])
    n = N if kind == 'ar' else N - 1
    loss = model(x, attn_mask=torch.zeros(n, n, dtype=torch.bool))
    itself = model(x, attn_mask=torch.eye(n, dtype=torch.bool))
    assert loss.item() == itself.item()
    got = gradients(loss, model)
    assert all(g.isfinite().all() for g in got.values())
    assert_same_gradients(got, gradients(itself, model), 1e-12)
