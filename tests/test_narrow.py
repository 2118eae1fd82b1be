"""Narrow numbers: bfloat16 and float16 networks under every mask, and arguments of every integer and float dtype."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from batches import INTEGERS
from modes import LENS, B, N, batch
from networks import ROTARY, continuous_network, decoder
from torch import Tensor

from xtloss import AutoregressiveWrapper, ContinuousAutoregressiveWrapper, XLAutoregressiveWrapper

S, K = 5, 3  # inputs of a segment of XL; steps of a rollout
HALVES = [torch.bfloat16, torch.float16]
I = torch.arange(N)
RIGHT, LEFT = LENS[:, None] > I, N - LENS[:, None] <= I
IDS = batch('plain')['x']
RELATIVE: dict[str, dict[str, Any]] = {
    'rotary': ROTARY,
    'flash': {**ROTARY, 'layers_attn_flash': True},
    'shifted tokens': {**ROTARY, 'layers_shift_tokens': 1},
    'memory tokens': {**ROTARY, 'num_memory_tokens': 2},
    'memory keys': {**ROTARY, 'layers_attn_num_mem_kv': 2},
}
OF_FRAMES: dict[str, dict[str, Any]] = {'gaussian': {**ROTARY, 'probabilistic': True}}
PADDINGS: dict[str, tuple[Tensor, dict[str, Tensor]]] = {
    'lens': (RIGHT, {'lens': LENS}),
    'mask': (RIGHT, {'mask': RIGHT}),
    'left mask': (LEFT, {'mask': LEFT}),
    'lens and mask': (RIGHT, {'lens': LENS, 'mask': RIGHT}),
}
STARTS: dict[str, tuple[Tensor, dict[str, Tensor]]] = {
    'seq_start_pos': (LEFT, {'seq_start_pos': N - LENS}),
    'left mask and start': (LEFT, {'mask': LEFT, 'seq_start_pos': N - LENS}),
    'left mask and key mask': (LEFT, {'mask': LEFT, 'self_attn_kv_mask': torch.ones(B, N).bool()}),
}
SEGMENTS: dict[str, tuple[Tensor, dict[str, Tensor]]] = {
    'segment_ids': (RIGHT, {'segment_ids': RIGHT.long()}),
    'segment_ids and mask': (RIGHT, {'segment_ids': RIGHT.long(), 'mask': RIGHT}),
}
TAKEN = [('plain', net, padding) for net, padding in itertools.product(RELATIVE, PADDINGS | STARTS)]
TAKEN += [('plain', net, padding) for net, padding in itertools.product(('rotary', 'flash'), SEGMENTS)]
TAKEN += [('xl', net, padding) for net, padding in itertools.product(RELATIVE, PADDINGS)]
TAKEN += [('continuous', net, padding) for net, padding in itertools.product(RELATIVE | OF_FRAMES, PADDINGS | STARTS)]
TAKEN = [case for case in TAKEN if case[0] != 'continuous' or case[2] != 'left mask and key mask']
# shifted tokens under a mask are float32 in x-transformers, which raises then
TAKEN = [case for case in TAKEN if case[1] != 'shifted tokens' or case[2] == 'lens']


def wrapped(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    if kind == 'continuous':
        return ContinuousAutoregressiveWrapper(continuous_network(dtype=dtype, **options))
    if kind == 'xl':
        return XLAutoregressiveWrapper(decoder(dtype=dtype, max_mem_len=S, max_seq_len=S, **options))
    return AutoregressiveWrapper(decoder(dtype=dtype, **options))


def x_of(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return batch('continuous', dtype)['x'] if kind == 'continuous' else IDS


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize(('kind', 'name', 'padding'), TAKEN)
def test_narrow_networks_take_every_mask(kind: str, name: str, padding: str, dtype: torch.dtype) -> None:
    """Where -1e38, say, is no number; the loss is that of the rows alone in float32."""
    real, call = (PADDINGS | STARTS | SEGMENTS)[padding]
    cut = slice(S if kind == 'xl' and padding == 'left mask' else None)  # it moves the segments' bounds: one segment
    call = {name: t[:, cut] if t.ndim > 1 else t for name, t in call.items()}
    if cut.stop:
        real = call['mask'] = real[:, -S:]
    wide, narrow = wrapped(kind, **(RELATIVE | OF_FRAMES)[name]), wrapped(kind, dtype, **(RELATIVE | OF_FRAMES)[name])
    x = x_of(kind)[:, cut]
    alone = [wide(x[row : row + 1, real[row]], normalizer=1.0) for row in range(B)]
    loss = narrow(x_of(kind, dtype)[:, cut], **call)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((sum(alone) / (real.sum() - B)).item(), rel=0.03)
    assert all(p.grad.isfinite().all() for p in narrow.parameters() if p.grad is not None)


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('probabilistic', [False, True])
def test_narrow_rollouts(dtype: torch.dtype, probabilistic: bool) -> None:
    """Also under autocast."""
    narrow, wide = (wrapped('continuous', of, probabilistic=probabilistic) for of in (dtype, torch.float32))
    losses = []
    for model, x in ((wide, x_of('continuous')), (narrow, x_of('continuous', dtype)), (wide, x_of('continuous'))):
        torch.manual_seed(7)
        with torch.autocast('cpu', torch.bfloat16, enabled=len(losses) == 2):
            losses.append(model(x, K, mask=RIGHT))
    losses[1].backward()
    assert all(loss.dtype == torch.float32 for loss in losses)
    for loss in losses[1:]:
        assert loss.item() == pytest.approx(losses[0].item(), rel=0.05)
    assert all(p.grad.isfinite().all() for p in narrow.parameters() if p.grad is not None)


@pytest.mark.parametrize('dtype', INTEGERS)
@pytest.mark.parametrize('kind', ['plain', 'not fused', 'unpad', 'xl', 'continuous'])
def test_every_integer_is_one(kind: str, dtype: torch.dtype) -> None:
    """Ids and places of every dtype give the loss that int64 gives, to the last bit."""
    model = wrapped(kind, use_abs_pos_emb=False)
    if kind in ('not fused', 'unpad'):
        model.fused, model.unpad = kind != 'not fused', kind == 'unpad'
    x, places = x_of(kind), [{'lens': LENS}, {'seq_start_pos': N - LENS}, {'segment_ids': RIGHT.long() * 7}]
    calls = {'xl': places[:1], 'continuous': [*places[:2], {'lens': LENS, 'rollout_steps': K}]}.get(kind, places)
    for call in calls:
        losses = []
        for of in (torch.int64, dtype):
            torch.manual_seed(0)
            given = {name: t.to(of) if isinstance(t, Tensor) else t for name, t in call.items()}
            losses.append(model(x if x.is_floating_point() else x.to(of), **given).item())
        assert losses[0] == losses[1]


def test_a_byte_that_is_ignore_index_by_its_bits_counts() -> None:
    """As uint8, -100 is 156; and what is less than the prepended embeddings does not wrap around."""
    model, x = AutoregressiveWrapper(decoder(num_tokens=256)), torch.tensor([[7, 156, 156, 30, 156]])
    assert model(x.to(torch.uint8)).item() == model(x).item()
    assert model.loss_normalizer(x.to(torch.uint8)).item() == 4
    early, before = torch.zeros(B, dtype=torch.uint8), torch.randn(B, 2, 16)
    model = wrapped('plain')
    losses = [model(IDS, prepend_embeds=before, seq_start_pos=start).item() for start in (early, early.long())]
    assert losses[0] == losses[1]


def test_numbers_of_numpy_are_numbers() -> None:
    for kind in ('plain', 'xl', 'continuous'):
        model, x = wrapped(kind), x_of(kind)
        want = model(x, normalizer=2.0).item()
        for number in (2, np.float16(2), np.float32(2), np.int64(2), *(torch.tensor(2).to(of) for of in INTEGERS)):
            assert model(x, normalizer=number).item() == want
        model.loss_weighting = np.float64(0.5)
        assert model(x).isfinite()
    torch.manual_seed(0)
    want = model(x, 2).item()
    torch.manual_seed(0)
    assert model(x, np.int64(2)).item() == want


@pytest.mark.parametrize('fused', ['auto', False])
def test_weights_and_normalizers_of_every_float(fused: str | bool) -> None:
    model = wrapped('plain')
    model.fused = fused
    want = model(IDS, normalizer=2.0).item()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for weight in (torch.ones(B, dtype=dtype), torch.ones(B, N, dtype=dtype)):
            loss = model(IDS, loss_weight=weight, normalizer=torch.tensor(2.0, dtype=dtype))
            assert loss.item() == pytest.approx(want, rel=1e-6)
