"""The rows of `bad_cases.py` for the functions of tensors and of sequences."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import wrong_things as wrong
from wrong_things import NOTHING_LIKE_IT, Wrong, of_type, tensors

from xtloss import collate, global_normalizer, linear_cross_entropy, pack, unpack

SEQUENCES = [torch.arange(2), torch.arange(3)]
IDS, WEIGHTS = torch.ones(4, 8).long(), torch.ones(4, 8)


class Case(NamedTuple):
    """A callable, a legal call of it by name, the rows of each argument, and where its signature stands."""

    call: Callable[..., Any]
    good: dict[str, Any]
    rows: dict[str, list[Wrong]]
    signature: Any


def helper_cases() -> dict[str, Case]:
    found = {}
    embed, head, targets, weights = torch.ones(4, 3), torch.ones(5, 3), torch.ones(4).long(), torch.ones(4)
    of_embed = [(3,), (5,), (1,), (1, 4), (4, 1), ()]
    found['linear_cross_entropy'] = Case(
        linear_cross_entropy,
        {'embed': embed, 'weight': head, 'target': targets, 'token_weight': weights},
        {
            'embed': tensors(embed, 'floating point', '(N, d)', (3,), (), (1, 4, 3), like=None, optional=False),
            'weight': [
                *tensors(
                    head, 'floating point', '(vocab, 3) like embed', (5, 2), (5,), (), (1, 5, 3), (3, 5),
                    like='embed', optional=False,
                ),
            ],
            'target': tensors(targets, 'integer', '(4,) like embed', *of_embed, like='embed', optional=False),
            'token_weight': tensors(
                weights, 'floating point', '(4,) like embed', *of_embed, like='embed', optional=False
            ),
            'bias': tensors(head[:, 0], 'floating point', '(5,) like embed', (4,), (1, 5), (), (1,), like='embed'),
            'chunk_size': wrong.CHUNK_SIZE,
        },
        linear_cross_entropy,
    )  # fmt: skip
    found['pack'] = Case(
        pack,
        {'sequences': SEQUENCES, 'max_len': 4},
        {
            'sequences': [
                Wrong([torch.ones(2, 2)], ValueError, '{}[0] must be 1-D, of 1 to 4 tokens, got shape (2, 2)'),
            ],
            'max_len': wrong.MAX_LEN,
            'pad_value': wrong.PAD_VALUE,
        },
        pack,
    )
    found['unpack'] = Case(
        unpack,
        {'values': WEIGHTS, 'segment_ids': IDS},
        {
            'values': [
                *of_type('a tensor', *NOTHING_LIKE_IT, *wrong.NUMBERS),
                Wrong(WEIGHTS.to_sparse(), TypeError, '{} must be a dense tensor, got a sparse_coo one'),
                *(
                    Wrong(torch.ones(shape), ValueError, f'{{}} must have shape (4, 8, ...), got {shape}')
                    for shape in ((4, 7), (4, 9), (1, 8), (8,), (4,), (), (8, 4), (0, 8))
                ),
            ],
            'segment_ids': tensors(IDS, 'integer', '(b, n)', (8,), (), (4, 8, 1), like=None),
        },
        unpack,
    )
    found['collate'] = Case(
        collate,
        {'examples': SEQUENCES},
        {
            'examples': [
                Wrong([{'y': [1]}], ValueError, "{}[0] must have the keys ['x', 'y'], got ['y']"),
            ],
            'layout': [
                *(
                    Wrong(value, TypeError, '{} must be one of padded, packed')
                    for value in (*NOTHING_LIKE_IT, *wrong.NUMBERS, None)
                    if not isinstance(value, str)
                ),
                *(
                    Wrong(name, ValueError, f'{{}} must be one of padded, packed, got {name!r}')
                    for name in ('text', '', 'Packed')
                ),
            ],
            'max_len': wrong.MAX_LEN,
            'pad_value': wrong.PAD_VALUE,
        },
        collate,
    )
    found['global_normalizer'] = Case(
        global_normalizer,
        {'total': 1.0},
        {
            'total': wrong.TOTAL,
            'group': of_type('a process group that this rank belongs to', *NOTHING_LIKE_IT, *wrong.NUMBERS),
        },
        global_normalizer,
    )
    return found
