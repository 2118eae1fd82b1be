"""Random calls of the three wrappers, for `tests/fuzz.py`."""

import random
from typing import Any, NamedTuple

import torch
from batches import random_batch
from torch import Tensor

V, D, WIDTH, SEGMENT, DTYPE = 11, 3, 16, 3, torch.float64
WEIGHTINGS = ['token', 'sequence', 'square', 'padded', 'sequence_sum', 0.25]
TELLING = ('lens', 'mask', 'seq_start_pos')


class Call(NamedTuple):
    """What is called how."""

    kind: str  # of wrapper: 'ar', 'xl' or 'continuous'
    options: dict[str, Any]
    arguments: dict[str, Any]
    prefix: Tensor | None = None  # (b, m), of which 'xl' has memories

    @property
    def weighting(self) -> Any:
        """What the oracle knows it as."""
        return 'sequence' if self.options['equal_loss_weight_batch'] else self.options['loss_weighting']

    @property
    def steps(self) -> int:
        """How many a rollout has."""
        return self.arguments.get('rollout_steps', 1)


def random_options(draw: random.Random, kind: str) -> dict[str, Any]:
    """Of a wrapper, as its constructor takes them."""
    equal = draw.random() < 0.1
    options = {'loss_weighting': None if equal else draw.choice(WEIGHTINGS), 'equal_loss_weight_batch': equal}
    if kind == 'continuous':
        return {**options, 'use_l1_loss': draw.random() < 0.3}
    options['fused'] = draw.choice(['auto', True, False])
    if kind == 'ar':
        options |= {'unpad': draw.random() < 0.4, 'trust_segments': draw.random() < 0.3}
    return options


def random_arguments(draw: random.Random, kind: str) -> dict[str, Any]:
    """x and a random choice of everything that goes with it."""
    b, n = draw.choice([0, 1, 1, 2, 3]), draw.randint(1, 8)

    def often(p: float) -> bool:
        return draw.random() < p

    rolls = kind == 'continuous' and b > 0 and often(0.25)
    masks = ['right mask'] if rolls else ['right mask', 'left mask', 'mask']
    chances = {
        'ignore': 0.0 if kind == 'continuous' else 0.2,
        'lens': 0.3,
        draw.choice(masks): 0.3,
        'loss_mask': 0.3,
        draw.choice(['loss_weight', 'row_weight']): 0.3,
        'seq_start_pos': 0.3 if kind == 'ar' else 0.1,
        'segment_ids': 0.3 if kind == 'ar' else 0.02,
    }
    using = {name for name, p in chances.items() if often(p)}
    features = D if kind == 'continuous' else None
    call = random_batch(draw.getrandbits(32), b, n, using, vocab=V, features=features, every_dtype=True)
    if rolls:
        call['rollout_steps'] = draw.choice([1, 2, 3])
    if often(0.3):
        call['normalizer'] = draw.choice([1.5, 3, torch.tensor(0.0), torch.tensor(2, dtype=torch.uint16)])
    if often(0.15 if kind == 'ar' else 0.02):
        call['prepend_embeds'] = torch.randn(b, draw.randint(0, 3), WIDTH, dtype=DTYPE)
    given = {'return_breakdown': 0.3, 'return_outputs': 0.1 * (kind == 'ar'), 'dropout_mems': 0.2 * (kind == 'xl')}
    return call | {name: True for name, p in given.items() if often(p)}


def random_call(draw: random.Random) -> Call:
    torch.manual_seed(draw.getrandbits(32))
    kind = draw.choice(['ar', 'xl', 'continuous'])
    arguments, prefix = random_arguments(draw, kind), None
    if kind == 'xl' and len(arguments['x']) and draw.random() < 0.2:
        prefix = torch.randint(0, V, (len(arguments['x']), draw.randint(1, SEGMENT)))
    return Call(kind, random_options(draw, kind), arguments, prefix)


def refused(call: Call) -> set[str]:
    """The arguments, or options, for which a call must be refused, though each by itself is right."""
    given, options = call.arguments.keys(), call.options
    if call.kind == 'ar':
        unproved = {'prepend_embeds'}
        beside = given & unproved if 'segment_ids' in given else set()
        unpads = options['unpad'] and 'segment_ids' not in given and given & set(TELLING)
        beside |= given & {'prepend_embeds'} if unpads else set()
        return beside | (given & {'return_outputs'} if options['fused'] is True else set())
    never = {'segment_ids', 'prepend_embeds'}
    if call.kind == 'xl':
        return given & {*never, 'seq_start_pos'}
    return given & (never | {'loss_mask', 'seq_start_pos'} if call.steps > 1 else never)
