"""Arguments that a wrapper hands on to the network: integers of every dtype, masks of keys that fit, one device.

Dims: b batch, n positions, p prepended embeddings, d width.
"""

from typing import Any

import pytest
import torch
from networks import continuous_network, decoder, frames
from torch import Tensor, nn

from xtloss import AutoregressiveWrapper, ContinuousAutoregressiveWrapper, XLAutoregressiveWrapper

B, N, P, D = 3, 9, 2, 16
INTEGERS = [getattr(torch, f'{u}int{size}') for u in ('', 'u') for size in (8, 16, 32, 64)]
X = torch.randint(1, 11, (B, N), generator=torch.Generator().manual_seed(0))
REAL = torch.ones(B, N, dtype=torch.bool)


def wrapped(kind: str, **options: Any) -> tuple[nn.Module, Tensor]:
    if kind == 'continuous':
        return ContinuousAutoregressiveWrapper(continuous_network()), frames(B, N)
    ours = AutoregressiveWrapper if kind == 'ar' else XLAutoregressiveWrapper
    return ours(decoder(num_tokens=11, **options)), X


@pytest.mark.parametrize('dtype', INTEGERS)
@pytest.mark.parametrize('kind', ['ar', 'continuous'])
def test_positions_of_every_integer_dtype(kind: str, dtype: torch.dtype) -> None:
    model, x = wrapped(kind)
    pos = torch.arange(N if kind == 'ar' else N - 1).flip(0)
    assert torch.equal(model(x, pos=pos.to(dtype)), model(x, pos=pos))


@pytest.mark.parametrize('dtype', INTEGERS)
@pytest.mark.parametrize('kind', ['ar', 'xl'])
def test_other_ids_of_every_integer_dtype(kind: str, dtype: torch.dtype) -> None:
    model, x = wrapped(kind, embed_num_tokens={'kind': 4})
    assert torch.equal(model(x, embed_ids={'kind': (x % 4).to(dtype)}), model(x, embed_ids={'kind': x % 4}))


BAD_MASKS: list[tuple[str, Any, str]] = [
    ('self_attn_kv_mask', REAL[:, 1:], r'must have shape \(3, 9 or more\) .* got \(3, 8\)'),
    ('prepend_mask', REAL[:, :3], r'prepend_mask must have shape \(3, 2\) like x, got \(3, 3'),
    ('prepend_mask', REAL[:, :2, None], r'prepend_mask must have shape \(3, 2\)'),
]


@pytest.mark.parametrize(('name', 'value', 'message'), BAD_MASKS)
def test_masks_of_keys_beside_prepended_embeddings(name: str, value: Any, message: str) -> None:
    model, x = wrapped('ar')
    for call in (model, model.loss_normalizer):
        with pytest.raises(ValueError, match=message):
            call(x, prepend_embeds=torch.zeros(B, P, D), **{name: value})


@pytest.mark.parametrize('kind', ['ar', 'continuous', 'unpadded', 'xl'])
def test_one_mask_of_keys_for_all_rows(kind: str) -> None:
    """(1, n), which x-transformers broadcasts, is (b, n) of equal rows."""
    model, x = wrapped('ar' if kind == 'unpadded' else kind)
    keys = torch.ones(1, N - (kind == 'continuous'), dtype=torch.bool)
    keys[0, 3:5] = False
    if kind == 'xl':  # of the keys of each segment, and there is one
        keys = keys[:, 1:]
    call = {'lens': torch.tensor([9, 4, 6])} if kind == 'unpadded' else {}
    model.unpad = kind == 'unpadded'
    got, want = (model(x, self_attn_kv_mask=mask, **call) for mask in (keys, keys.expand(B, -1)))
    assert got.item() == want.item() != model(x, **call).item()


def test_unpad_follows_the_device_of_the_data() -> None:
    lens = torch.tensor([9, 4, 6])
    model = AutoregressiveWrapper(decoder(num_tokens=11), unpad=True)
    want = model(X, lens=lens)
    with torch.device('meta'):
        assert torch.equal(model(X, lens=lens), want)
