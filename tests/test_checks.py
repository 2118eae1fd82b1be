"""The checks by themselves: what is a number, a flag, a keyword. Their errors: `test_bad_table.py`."""

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


def test_embeddings_of_any_width() -> None:
    """Of a network that does not tell how wide it is."""
    with pytest.raises(ValueError, match=r'^prepend_embeds must have shape \(2, p, d\), got \(5, 4\)$'):
        check_batch(X, prepend_embeds=EMBEDS[0])


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
