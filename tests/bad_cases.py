"""The table of `test_bad_input.py`: every argument of every public callable, and what is wrong for it."""

from collections.abc import Callable
from typing import Any

import torch
import wrong_things as wrong
from bad_cases_helpers import Case, helper_cases
from networks import Unreachable, decoder
from torch import nn
from wrong_things import NOTHING_LIKE_IT, Wrong, of_type, tensors
from x_transformers import AutoregressiveWrapper as UpstreamWrapper
from x_transformers import Decoder

from xtloss import (
    AutoregressiveWrapper,
    ContinuousAutoregressiveWrapper,
    XLAutoregressiveWrapper,
    segment_leak,
    upgrade_,
)

B, N, D = 4, 8, 3
LAYERS = Decoder(dim=16, depth=1, heads=2, verbose=False)
ROWS = torch.ones(B).long()
IDS, FLAGS, WEIGHTS = torch.ones(B, N).long(), torch.ones(B, N).bool(), torch.ones(B, N)
FRAMES, EMBEDS = torch.ones(B, N, D), torch.ones(B, 5, 16)


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
    'mask': like_x(FLAGS, 'bool', *OF_TOKENS),
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
    return of_type('a list of tensors', *no_lists, *wrong.NUMBERS, good) + [
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


def cases() -> dict[str, Case]:
    found = {}
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


CASES = {**cases(), **helper_cases()}
