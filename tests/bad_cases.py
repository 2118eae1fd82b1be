"""The table of `test_bad_input.py`: every argument of every public callable, and what is wrong for it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import wrong_things as wrong
from networks import Unreachable, decoder
from torch import nn
from wrong_things import NO_NAMES, NOTHING_LIKE_IT, NUMBERS, Wrong, of_type, tensors
from x_transformers import AutoregressiveWrapper as UpstreamWrapper
from x_transformers import Decoder

from xtloss import (
    AutoregressiveWrapper,
    ContinuousAutoregressiveWrapper,
    XLAutoregressiveWrapper,
    collate,
    global_normalizer,
    linear_cross_entropy,
    pack,
    segment_leak,
    unpack,
    upgrade_,
)

B, N, D = 4, 8, 3
LAYERS = Decoder(dim=16, depth=1, heads=2, verbose=False)
ROWS = torch.ones(B).long()
IDS, FLAGS, WEIGHTS = torch.ones(B, N).long(), torch.ones(B, N).bool(), torch.ones(B, N)
FRAMES, EMBEDS = torch.ones(B, N, D), torch.ones(B, 5, 16)


class Case(NamedTuple):
    """A callable, a legal call of it by name, the rows of each argument, and where its signature stands."""

    call: Callable[..., Any]
    good: dict[str, Any]
    rows: dict[str, list[Wrong]]
    signature: Any


def network() -> nn.Module:
    """One that any wrapper takes, and that must not run."""
    net = Unreachable()
    net.emb_dim, net.attn_layers = 16, LAYERS
    return net


def like_x(good: torch.Tensor, kind: str, *shapes: tuple[int, ...]) -> list[Wrong]:
    return tensors(good, kind, f'{tuple(good.shape)} like x', *shapes)


def unknown(name: str) -> list[Wrong]:
    """What a `**kwargs` may hold: a name that nobody knows."""
    return [Wrong({name: 1}, TypeError, f"…got an unexpected keyword argument '{name}'")]


OF_ROWS = [(3,), (5,), (1,), (B, 1), (), (0,)]
OF_TOKENS = [(B, N - 1), (B, N + 1), (1, N), (N,), (B,), (B, N, 1), (), (N, B), (0, N)]
OF_KEYS = [(N,), (B,), (B, N, 1), (), (N, B), (0, N)]
COUNTING = {
    'lens': like_x(ROWS, 'integer', *OF_ROWS),
    'mask': [
        *like_x(FLAGS, 'bool', *OF_TOKENS),
        Wrong(FLAGS[:, 1:], ValueError, '{} must have shape (4, 8) like x, …inputs…'),  # a note says why
    ],
    'loss_mask': like_x(FLAGS, 'bool', *OF_TOKENS),
    'loss_weight': tensors(WEIGHTS, 'floating point', '(4,) or (4, 8) like x', *OF_TOKENS[:4], *OF_ROWS[:5]),
    'normalizer': wrong.NORMALIZER,
    'return_breakdown': wrong.GIVEN_FLAG,
}
STARTS, SEGMENTS = like_x(ROWS, 'integer', *OF_ROWS), like_x(IDS, 'integer', *OF_TOKENS)
X = tensors(IDS, 'integer', '(b, n)…', (N,), (), (B, N, 1), (1, B, N), like=None)
X += [Wrong(IDS[:, :0], ValueError, '{} must have …n >= 1…, got (4, 0)')]
FRAMES_OF_X = tensors(FRAMES, 'floating point', '(b, n, d)…', (B, N), (), (1, B, N, D), like=None)
FRAMES_OF_X += [Wrong(FRAMES[:, :0], ValueError, '{} must have …n >= 1…, got (4, 0, 3)')]
PREPENDED = {
    'prepend_embeds': tensors(
        EMBEDS, 'floating point', '(4, p, 16)…', (5, 16), (1, 5, 16), (B, 5, 15), (B, 1, 5, 16), (), (B,)
    ),
    'prepend_mask': tensors(torch.ones(B, 0).bool(), 'bool', '(4, …', (1, 0), (B,), ()),
}
ATTN_MASK = {'attn_mask': tensors(torch.ones(N, N).bool(), 'bool', '(i, k)…', (N,), (), (1, 1, 1, N, N))}
MEMORY, MEMORY_MASK = torch.ones(B, 5, 16), torch.ones(B, 5).bool()


def of_layers(good: torch.Tensor, kind: str, rule: str, *shapes: tuple[int, ...]) -> list[Wrong]:
    """For a list of a tensor, or None, for each layer."""
    no_lists = [value for value in NOTHING_LIKE_IT if not isinstance(value, (list, tuple))]
    return of_type('a list of tensors', *no_lists, *NUMBERS, good) + [
        Wrong([None, row.value], row.error, row.message.replace('{}', '{}[1]'))
        for row in tensors(good, kind, rule, *shapes)
    ]


MEMORIES = {
    'mems': [
        *of_layers(MEMORY, 'floating point', '(4, m, …', (B, 5), (3, 5, 16), (), (1, 5, 16), (B, 1, 5, 16)),
        Wrong([MEMORY, MEMORY[:, 1:]], ValueError, '{}[1] must have shape (4, 5, 16) like x, got (4, 4, 16)'),
    ],
    'mem_masks': of_layers(MEMORY_MASK, 'bool', '(4, m)…', (B,), (3, 5), (), (1, 5), (B, 5, 1)),
}


def refused(value: Any) -> list[Wrong]:
    """What is right by itself, and cannot be followed."""
    return [Wrong(value, ValueError, '{} …')]


OPTIONS = {'equal_loss_weight_batch': wrong.FLAG, 'loss_weighting': wrong.WEIGHTING}
OPTIONS_XL = {**OPTIONS, 'fused': wrong.FUSED}
OPTIONS_AR = {**OPTIONS_XL, 'unpad': wrong.FLAG, 'trust_segments': wrong.FLAG}
TWISTED = {'kwargs': unknown('lenss')}

# of each wrapper: its class, a batch, its options, and the arguments of its forward, the network's too
WRAPPERS: list[tuple[type[nn.Module], torch.Tensor, dict[str, list[Wrong]], dict[str, list[Wrong]]]] = [
    (
        AutoregressiveWrapper,
        IDS,
        {**OPTIONS_AR, **TWISTED},
        {
            'x': X,
            **COUNTING,
            **PREPENDED,
            **ATTN_MASK,
            **MEMORIES,
            'segment_ids': SEGMENTS,
            'seq_start_pos': STARTS,
            'return_outputs': wrong.GIVEN_FLAG,
            'self_attn_kv_mask': tensors(FLAGS, 'bool', '(4, 8…', (B, N - 1), *OF_KEYS),
        },
    ),
    (
        ContinuousAutoregressiveWrapper,
        FRAMES,
        OPTIONS,
        {
            'x': FRAMES_OF_X,
            **COUNTING,
            **ATTN_MASK,
            **MEMORIES,
            'rollout_steps': wrong.CHUNK_SIZE,
            'seq_start_pos': STARTS,
            'segment_ids': refused(IDS),
            'prepend_embeds': refused(EMBEDS),
            'self_attn_kv_mask': tensors(FLAGS[:, 1:], 'bool', '(4, 7…', (B, N - 2), *OF_KEYS),
        },
    ),
    (
        XLAutoregressiveWrapper,
        IDS,
        {**OPTIONS_XL, **TWISTED},
        {
            'x': X,
            **COUNTING,
            **ATTN_MASK,
            **MEMORIES,
            'dropout_mems': wrong.GIVEN_FLAG,
            'ttt_recurrent_steps': wrong.CHUNK_SIZE,
            'seq_start_pos': refused(ROWS),
            'segment_ids': refused(IDS),
            'prepend_embeds': refused(EMBEDS),
            'self_attn_kv_mask': tensors(FLAGS, 'bool', '(4, …', *OF_KEYS),
        },
    ),
]


def forward(ours: type[nn.Module]) -> Callable[..., Any]:
    return lambda **call: ours(network())(**call)


def loss_normalizer(ours: type[nn.Module]) -> Callable[..., Any]:
    return lambda **call: ours(network()).loss_normalizer(**call)


def constructor(ours: type[nn.Module]) -> Callable[..., Any]:
    return lambda kwargs=None, **call: ours(**call, **(kwargs or {}))


def upgraded(module: Any, **options: Any) -> None:
    """Upgrade, and see to it that a refusal changes nothing."""
    try:
        upgrade_(module, **options)
    finally:
        assert not isinstance(module, nn.Module) or type(module) is UpstreamWrapper


# of the functions of tensors

HEAD = {'embed': torch.ones(4, 3), 'weight': torch.ones(5, 3), 'target': ROWS, 'token_weight': torch.ones(4)}
OF_EMBED = {'like': 'embed', 'optional': False}
OF_HEAD = {
    'embed': tensors(HEAD['embed'], 'floating point', '(N, d)', (3,), (), (1, 4, 3), like=None, optional=False),
    'weight': tensors(
        HEAD['weight'], 'floating point', '(vocab, 3) like embed', (5, 2), (5,), (), (1, 5, 3), (3, 5), **OF_EMBED
    ),
    'target': tensors(ROWS, 'integer', '(4,) like embed', *OF_ROWS, (1, 4), **OF_EMBED),
    'token_weight': tensors(torch.ones(4), 'floating point', '(4,) like embed', *OF_ROWS, (1, 4), **OF_EMBED),
    'bias': tensors(torch.ones(5), 'floating point', '(5,) like embed', (4,), (1, 5), (), (1,), like='embed'),
    'chunk_size': wrong.CHUNK_SIZE,
}
OF_UNPACK = {
    'values': [
        *of_type('a tensor', *NOTHING_LIKE_IT, *NUMBERS, None),
        Wrong(WEIGHTS.to_sparse(), TypeError, '{} must be a dense tensor, got a sparse_coo one'),
        *(
            Wrong(torch.ones(shape), ValueError, f'{{}} must have shape (4, 8, ...), got {shape}')
            for shape in (*OF_TOKENS[:5], (), (8, 4), (0, 8))
        ),
    ],
    'segment_ids': tensors(IDS, 'integer', '(b, n)', (8,), (), (4, 8, 1), like=None, optional=False),
}

# and of sequences, where the error is of one of them, or of what it is laid out with

LONG, SHORT = torch.arange(5), torch.arange(2)
NO_ROW = '{}[1] must be 1-D, of 1 to 4 tokens, got shape '
OF_PACK = {
    'sequences': [
        Wrong([SHORT, LONG], ValueError, NO_ROW + '(5,)'),
        Wrong([[1], []], ValueError, NO_ROW + '(0,)'),  # not: an empty list is float32
        Wrong([SHORT, 3], ValueError, NO_ROW + '()'),
        Wrong([SHORT, torch.ones(2, 2)], ValueError, NO_ROW + '(2, 2)'),
        Wrong(b'bytes', ValueError, '{}[0] must be 1-D'),
        Wrong([[1, 2], [2.5]], TypeError, '{}[1] must be int64 like {}[0], got float32'),
        Wrong([SHORT, SHORT.bool()], TypeError, '{}[1] must be int64 like {}[0], got bool'),
        Wrong([np.ones(2), [1.0]], TypeError, '{}[1] must be float64 like {}[0], got float32'),
        Wrong([SHORT, SHORT.to('meta')], RuntimeError, '…'),  # torch's, as it is
        Wrong([b'bytes'], TypeError, 'new(): invalid data type'),  # torch's, as it is
    ],
    'max_len': [*wrong.MAX_LEN, Wrong(None, TypeError, '…'), Wrong(2**31, ValueError, '{} must be at most 2147483647')],
    'pad_value': wrong.PAD_VALUE,
}
PADDED_WITH = [  # torch takes all of these, and puts another number there
    (SHORT.byte(), Wrong(-1, ValueError, '{} must be in [0, 255] for uint8 sequences, got -1')),
    (SHORT.bool(), Wrong(-100, ValueError, '{} must be in [0, 1] for bool sequences, got -100')),
    (SHORT.bool(), Wrong(0.0, TypeError, '{} must be an integer for bool sequences, got 0.0')),
    (SHORT.to(torch.uint64), Wrong(-1, ValueError, '{} must be in [0, 18446744073709551615] for uint64')),
    (SHORT * 1.0, Wrong(1j, TypeError, '…')),
]
KEYS = "{}[%d] must have the keys ['x'], got"
OF_COLLATE = {
    'examples': [
        Wrong([SHORT, 3], ValueError, 'x[1] must be 1-D, of 1 to'),
        Wrong([[1, 2], []], ValueError, 'x[1] must be 1-D, of 1 to'),
        Wrong([{'x': SHORT, 'mask': LONG.bool()}], ValueError, 'mask[0] must have 2 tokens like x[0], got 5'),
        Wrong([{'x': SHORT, 'score': torch.ones(2, 3)}], ValueError, 'score[0] must be 1-D, of 1 to'),
        Wrong([{'x': SHORT, 'loss_weight': 2.0}], ValueError, 'loss_weight[0] must be 1-D, of 1 to'),
        # keys that would be lost without a word
        Wrong([{'y': [1]}], ValueError, "{}[0] must have the keys ['x', 'y'], got ['y']"),
        Wrong([{'x': SHORT}, {'x': SHORT, 'mask': SHORT.bool()}], ValueError, KEYS % 1),
        Wrong([SHORT, {'x': SHORT, 'mask': SHORT}], ValueError, KEYS % 1),
        Wrong([{'x': SHORT, 'lens': SHORT}], ValueError, KEYS % 0),
        Wrong([{'x': SHORT, 'segment_ids': SHORT}], ValueError, KEYS % 0),
        # floats that would be cut
        Wrong([[1, 2], [1, 2.5]], TypeError, 'x[1] must hold numbers of int64, got float32'),
        Wrong([{'x': [1], 'loss_mask': [0.5]}], TypeError, 'loss_mask[0] must hold numbers of bool, got float32'),
    ],
    'layout': [
        *(Wrong(value, TypeError, '{} must be one of padded, packed') for value in (*NO_NAMES, *NUMBERS, None)),
        *(Wrong(name, ValueError, f'{{}} must be one of padded, packed, got {name!r}') for name in ('', 'Packed')),
    ],
    'max_len': [*wrong.MAX_LEN, Wrong(1, ValueError, 'x[0] must be 1-D, of 1 to 1 tokens, got shape (2,)')],
    'pad_value': wrong.PAD_VALUE,
}
OF_NORMALIZER = {
    'total': wrong.TOTAL,
    'group': of_type('a process group that this rank belongs to', *NOTHING_LIKE_IT, *NUMBERS),
}


def cases() -> dict[str, Case]:
    found = {}
    functions: list[tuple[Callable[..., Any], dict[str, Any], dict[str, list[Wrong]]]] = [
        (linear_cross_entropy, HEAD, OF_HEAD),
        (unpack, {'values': WEIGHTS, 'segment_ids': IDS}, OF_UNPACK),
        (pack, {'sequences': [SHORT, SHORT], 'max_len': 4}, OF_PACK),
        (collate, {'examples': [SHORT, SHORT]}, OF_COLLATE),
        (global_normalizer, {'total': 1.0}, OF_NORMALIZER),
    ]
    for function, good, rows in functions:
        found[function.__name__] = Case(function, good, rows, function)
    for ours, x, options, arguments in WRAPPERS:
        name = ours.__name__
        found[name] = Case(constructor(ours), {'net': network()}, {'net': wrong.MODULE, **options}, ours)
        found[f'{name}.forward'] = Case(forward(ours), {'x': x}, arguments, ours.forward)
        # it takes what forward takes, and raises what forward raises
        found[f'{name}.loss_normalizer'] = Case(loss_normalizer(ours), {'x': x}, arguments, ours.loss_normalizer)
    found['segment_leak'] = Case(
        lambda network_kwargs=None, **call: segment_leak(**call, **(network_kwargs or {})),
        {'net': decoder()},
        {'net': wrong.MODULE, 'network_kwargs': [*unknown('lenss'), *unknown('maskk')]},
        segment_leak,
    )
    no_option = [Wrong(1, ValueError, '{} is no option of …')]
    of_upgrade = {'module': wrong.MODULE, **OPTIONS_AR, 'options': no_option}
    found['upgrade_'] = Case(upgraded, {'module': UpstreamWrapper(network())}, of_upgrade, upgrade_)
    return found


CASES = cases()
