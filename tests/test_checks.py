"""The checks by themselves: what is a number, a flag, a keyword, an embedding, and that types are looked at first."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from xtloss.checks import check_batch, check_known, is_flag, is_integer, is_number, keywords, widened

X = torch.zeros(2, 3, dtype=torch.long)
EMBEDS = torch.zeros(2, 5, 4)


@pytest.mark.parametrize(
    ('value', 'flag', 'integer', 'number'),
    [
        (True, True, False, False),
        (np.bool_(False), True, False, False),
        (3, False, True, True),
        (np.int8(3), False, True, True),
        (np.uint64(3), False, True, True),
        (0.5, False, False, True),
        (np.float16(0.5), False, False, True),
        (np.longdouble(0.5), False, False, True),
        (Fraction(1, 2), False, False, True),
        (1j, False, False, False),
        (np.complex64(1), False, False, False),
        ('1', False, False, False),
        (None, False, False, False),
        (torch.tensor(1), False, False, False),
        (torch.tensor(True), False, False, False),
        (np.ones(2, dtype=bool), False, False, False),
    ],
)
def test_what_is_a_flag_an_integer_and_a_number(value: Any, flag: bool, integer: bool, number: bool) -> None:
    assert (is_flag(value), is_integer(value), is_number(value)) == (flag, integer, number)


@pytest.mark.parametrize(
    ('call', 'error', 'message'),
    [
        ({'flags': {'return_outputs': torch.ones(2)}}, TypeError, 'return_outputs must be bool, got Tensor'),
        ({'flags': {'return_breakdown': None}}, TypeError, 'return_breakdown must be bool, got NoneType'),
        ({'flags': {'return_breakdown': 1}}, TypeError, 'return_breakdown must be bool, got int'),
        ({'counts': {'rollout_steps': 2.0}}, TypeError, 'rollout_steps must be int, got float'),
        ({'counts': {'rollout_steps': np.bool_(1)}}, TypeError, 'rollout_steps must be int, got bool'),
        ({'counts': {'rollout_steps': np.int64(0)}}, ValueError, 'rollout_steps must be >= 1, got 0'),
        ({'counts': {'steps': 10**30}}, ValueError, r'steps must be >= 1 and less than 2\^63, got 1000000.*'),
        ({'prepend_embeds': [[[1.0]]]}, TypeError, 'prepend_embeds must be floating point, a tensor, got list'),
        ({'prepend_embeds': EMBEDS.long()}, TypeError, 'prepend_embeds must be floating point, got int64'),
        ({'prepend_embeds': EMBEDS[0]}, ValueError, r'prepend_embeds must have shape \(2, p, d\), got \(5, 4\)'),
        ({'prepend_embeds': EMBEDS[:1]}, ValueError, r'prepend_embeds must have shape \(2, p, d\), got \(1, 5, 4\)'),
        (
            {'prepend_embeds': EMBEDS, 'width': 3},
            ValueError,
            r'prepend_embeds must have shape \(2, p, 3\), got \(2, 5, 4\)',
        ),
        ({'prepend_embeds': EMBEDS.to('meta')}, ValueError, 'prepend_embeds must be on cpu like x, got meta'),
        ({'prepend_embeds': EMBEDS[0], 'normalizer': '1'}, TypeError, 'normalizer must be a number .*, got str'),
        ({'mask': torch.ones(2, 3).bool().to_sparse()}, TypeError, 'mask must be a dense tensor, got a sparse_coo one'),
        ({'normalizer': 1j}, TypeError, 'normalizer must be a number or a 0-dim tensor, got complex'),
        ({'normalizer': np.bool_(1)}, TypeError, 'normalizer must be a number or a 0-dim tensor, got bool'),
        ({'normalizer': torch.tensor(1j)}, TypeError, 'normalizer must be floating point or integer, got complex64'),
        ({'normalizer': np.float16('inf')}, ValueError, 'normalizer must be > 0 and finite in float32, got inf'),
        ({'normalizer': 1e-50}, ValueError, 'normalizer must be > 0 and finite in float32, got 1e-50'),
        ({'normalizer': 10**400}, ValueError, 'normalizer must be > 0 and finite in float32, got 10000.*'),
    ],
)
def test_check_batch(call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f'^{message}$'):
        check_batch(X, **call)


def test_check_batch_takes_what_is_legal() -> None:
    integers = (torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32)
    for normalizer in (
        1, 2.5, np.float16(3), np.int64(4), Fraction(1, 2), torch.tensor(7e4).half(), torch.tensor(float('nan')),
        *(torch.tensor(3).to(dtype) for dtype in integers),
    ):  # fmt: skip
        check_batch(X, normalizer=normalizer, prepend_embeds=EMBEDS, width=4, flags={'flag': np.bool_(1)})
    for dtype in integers:
        check_batch(X.to(dtype), lens=X[:, 0].to(dtype), segment_ids=X.to(dtype), counts={'steps': np.uint8(1)})


def test_widened_integers_neither_wrap_nor_change() -> None:
    given = {'lens': torch.tensor([65535], dtype=torch.uint16), 'mask': torch.tensor([True]), 'start': None}
    wide = widened(given)
    assert (wide['lens'] - 65536).tolist() == [-1]
    assert wide['lens'].dtype == torch.int64
    assert wide['mask'] is given['mask']
    assert wide['start'] is None


def test_unknown_keywords() -> None:
    def forward(self: Any, x: Any, *args: Any, lens: Any = None, **kwargs: Any) -> None: ...

    known = keywords(forward, lambda mask: None)
    assert known == {'x', 'lens', 'mask'}
    check_known('loss_normalizer', ['lens', 'mask'], known)
    with pytest.raises(TypeError, match=r"^loss_normalizer got an unexpected keyword argument 'lenss', is it lens\?$"):
        check_known('loss_normalizer', ['lens', 'lenss'], known)
    with pytest.raises(TypeError, match=r"^forward got an unexpected keyword argument 'q'$"):
        check_known('forward', ['q'], known)


def test_float_normalizers_are_traced() -> None:
    def divided(x: torch.Tensor, normalizer: float) -> torch.Tensor:
        check_batch(x, normalizer=normalizer, flags={'flag': True}, counts={'steps': 2})
        return x.sum() / normalizer

    compiled = torch.compile(divided, fullgraph=True, backend='eager')
    for normalizer in (1.5, 2.5, 3.5, 7, 8, 9):
        assert compiled(X + 1, normalizer).item() == pytest.approx(6 / normalizer)
