"""Random calls of the three wrappers, some of them spoilt, for `tests/fuzz.py`."""

import random
from typing import Any, NamedTuple

import torch
import wrong_things as wrong
from torch import Tensor

V, D, WIDTH, SEGMENT, DTYPE = 11, 3, 16, 3, torch.float64
INTEGERS = wrong.KINDS['integer']
WEIGHTINGS = ['token', 'sequence', 'square', 'padded', 'sequence_sum', 0.25]
TELLING = ('lens', 'mask', 'seq_start_pos')
OPTIONS = {
    'loss_weighting': wrong.WEIGHTING,
    'equal_loss_weight_batch': wrong.FLAG,
    'fused': wrong.FUSED,
    'unpad': wrong.FLAG,
    'trust_segments': wrong.FLAG,
}
NUMBERS = {
    'normalizer': wrong.NORMALIZER,
    'rollout_steps': wrong.COUNT,
    **dict.fromkeys(('return_breakdown', 'return_outputs', 'dropout_mems'), wrong.FLAG),
}
KIND_OF = {'mask': 'bool', 'loss_mask': 'bool', 'loss_weight': 'floating point', 'prepend_embeds': 'floating point'}


class Call(NamedTuple):
    """What is called how. `bad`: the arguments or options that are spoilt, and what each must raise."""

    kind: str  # of wrapper: 'ar', 'xl' or 'continuous'
    options: dict[str, Any]
    arguments: dict[str, Any]
    bad: dict[str, type[Exception]]
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

    def integer(t: Tensor) -> Tensor:
        return t.to(draw.choice(INTEGERS))

    call: dict[str, Any] = {'x': torch.randn(b, n, D, dtype=DTYPE)}
    if kind != 'continuous':
        x = torch.randint(0, V, (b, n))
        call['x'] = x.masked_fill(torch.rand(b, n) < 0.2, -100) if draw.random() < 0.3 else integer(x)
    if kind == 'continuous' and b and draw.random() < 0.25:
        call['rollout_steps'] = draw.choice([1, 2, 3])
    made = {
        'lens': (0.3, lambda: integer(torch.randint(0, n + 1, (b,)))),
        'mask': (0.3, lambda: random_mask(draw, b, n, right=call.get('rollout_steps', 1) > 1)),
        'loss_mask': (0.3, lambda: torch.rand(b, n) < 0.7),
        'loss_weight': (0.3, lambda: torch.randn((b, n) if draw.random() < 0.5 else (b,), dtype=DTYPE)),
        'seq_start_pos': (0.3 if kind == 'ar' else 0.1, lambda: integer(torch.randint(0, n + 1, (b,)))),
        'segment_ids': (
            0.3 if kind == 'ar' else 0.02,
            lambda: integer((torch.rand(b, n) < 0.4).cumsum(-1) * (torch.rand(b, n) < 0.9)),
        ),
        'normalizer': (0.3, lambda: draw.choice([1.5, 3, torch.tensor(0.0), torch.tensor(2, dtype=torch.uint16)])),
        'return_breakdown': (0.3, lambda: True),
        'return_outputs': (0.1 if kind == 'ar' else 0, lambda: True),
        'prepend_embeds': (
            0.15 if kind == 'ar' else 0.02,
            lambda: torch.randn(b, draw.randint(0, 3), WIDTH, dtype=DTYPE),
        ),
        'dropout_mems': (0.2 if kind == 'xl' else 0, lambda: True),
    }
    return call | {name: make() for name, (often, make) in made.items() if draw.random() < often}


def random_mask(draw: random.Random, b: int, n: int, *, right: bool) -> Tensor:
    """(b, n) bool: padding on the right, on the left, or holes."""
    real = torch.arange(n) < torch.randint(0, n + 1, (b, 1))
    return real if right else draw.choice([real, real.flip(1), torch.rand(b, n) < 0.7])


def spoil(draw: random.Random, name: str, value: Any) -> tuple[Any, type[Exception]]:
    """Return a wrong value for an argument, or for an option, and the error that it must raise."""
    if name in OPTIONS or name in NUMBERS:
        row = draw.choice((OPTIONS | NUMBERS)[name])
        return row.value, row.error
    kind = 'floating point' if name == 'x' and value.is_floating_point() else KIND_OF.get(name, 'integer')
    legal = wrong.KINDS[kind]
    things = [(draw.choice(wrong.NOTHING_LIKE_IT + wrong.NUMBERS + wrong.FLAGS), TypeError)]
    things += [(value.to(draw.choice([dtype for dtype in wrong.ALL_DTYPES if dtype not in legal])), TypeError)]
    things += [(value.to(legal[0]).to_sparse(), TypeError), (value[None, None], ValueError)]
    if name != 'x':  # which the others must be like
        longer = torch.cat([value.new_zeros(1, *value.shape[1:]), value])
        things += [(longer, ValueError), (value.to('meta'), ValueError)]
    return draw.choice(things)


def random_call(draw: random.Random) -> Call:
    torch.manual_seed(draw.getrandbits(32))
    kind = draw.choice(['ar', 'xl', 'continuous'])
    arguments, prefix = random_arguments(draw, kind), None
    if kind == 'xl' and len(arguments['x']) and draw.random() < 0.2:
        prefix = torch.randint(0, V, (len(arguments['x']), draw.randint(1, SEGMENT)))
    call = Call(kind, random_options(draw, kind), arguments, {}, prefix)
    if draw.random() < 0.2:
        of_options = draw.random() < 0.2
        where = call.options if of_options else call.arguments
        names = [name for name in where if name in OPTIONS or not of_options]
        for name in draw.sample(names, min(len(names), draw.choice([1, 1, 2]))):
            where[name], call.bad[name] = spoil(draw, name, where[name])
    return call


def refused(call: Call) -> set[str]:
    """The arguments, or options, for which a call must be refused, though each by itself is right."""
    given, options = call.arguments.keys(), call.options
    if call.kind == 'ar':
        unproved = {'prepend_embeds'} if options['trust_segments'] else {'prepend_embeds', 'seq_start_pos'}
        beside = given & unproved if 'segment_ids' in given else set()
        unpads = options['unpad'] and 'segment_ids' not in given and given & set(TELLING)
        beside |= given & {'prepend_embeds'} if unpads else set()
        return beside | (given & {'return_outputs'} if options['fused'] is True else set())
    never = {'segment_ids', 'prepend_embeds'}
    if call.kind == 'xl':
        return given & {*never, 'seq_start_pos'}
    return given & (never | {'loss_mask', 'seq_start_pos'} if call.steps > 1 else never)
