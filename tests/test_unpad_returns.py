"""What `unpad=True` returns, and whom it refuses, does not depend on what the batch holds."""

from typing import Any

import pytest
import torch
from networks import decoder

from xtloss import AutoregressiveWrapper

N = 24
X = torch.randint(1, 11, (4, N), generator=torch.Generator().manual_seed(0))
LENS = {
    'packed': [24, 3, 2, 4],
    'cut': [9, 8, 9, 7],
    'as it came': [24, 24, 24, 24],
    'an empty row': [24, 0, 3, 1],
    'nothing real': [0, 0, 0, 0],
}


@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)], ids=['eager', 'compiled'])
@pytest.mark.parametrize('name', LENS)
def test_outputs_lie_where_the_batch_had_them(name: str, compiled: bool) -> None:
    lens = torch.tensor(LENS[name])
    real = (torch.arange(N) < lens[:, None])[:, :-1]
    model = AutoregressiveWrapper(decoder(num_tokens=11, max_seq_len=N).double(), unpad=True)
    run = torch.compile(model, backend='eager') if compiled else model
    loss, (logits, cache), breakdown = run(X, lens=lens, return_outputs=True, return_breakdown=True)
    model.unpad = False
    want, (all_logits, _), parts = model(X, lens=lens, return_outputs=True, return_breakdown=True)
    assert cache is None
    assert logits.shape == (4, N - 1, 11)
    torch.testing.assert_close(logits, torch.where(real[..., None], all_logits, 0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(breakdown.token_loss, parts.token_loss, rtol=1e-5, atol=1e-6)
    assert torch.equal(breakdown.weight, parts.weight)


def test_holes_of_a_mask_are_not_real() -> None:
    mask = torch.arange(N) < torch.tensor([[9], [8], [7], [9]])
    mask[0, 3:5] = False
    model = AutoregressiveWrapper(decoder(num_tokens=11, max_seq_len=N), unpad=True)
    _, (logits, cache) = model(X, mask=mask, return_outputs=True)
    assert cache is None
    assert torch.equal(logits.any(dim=-1), mask[:, :-1])


SHORT: list[dict[str, Any]] = [{'layers_attn_sparse_topk': 8}, {'layers_attn_sparse_topk': 2}]


@pytest.mark.parametrize('lens', [[24, 3, 2, 4], [9, 8, 9, 7], [24, 24, 24, 24], [0, 0, 0, 0], [7, 5, 7, 7]], ids=str)
@pytest.mark.parametrize('options', SHORT, ids=str)
def test_a_network_that_cannot_take_short_rows_is_refused_whatever_the_batch_holds(
    options: dict[str, Any], lens: list[int]
) -> None:
    model = AutoregressiveWrapper(decoder(num_tokens=11, max_seq_len=N, **options), unpad=True)
    with pytest.raises(ValueError, match=r'^unpad=True: .*short'):
        model(X, lens=torch.tensor(lens))
    assert model(X).isfinite()  # which asks for no other rows
