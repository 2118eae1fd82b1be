"""Random calls of the three wrappers against the oracle; by hand, ``python tests/fuzz.py --calls 41000``.

The networks are in float64, with flash attention, as the other softmax of x-transformers is float32 always. They know
no positions, so that the logits of a token can be had from the bare network, which is handed nothing but the earlier
tokens that it may see, without a mask. The equation over these logits is `oracle.expected`. A call gives its value
within 1e-9, or raises TypeError or ValueError naming an argument.
"""

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from networks import decoder
from oracle import expected
from oracle_continuous import expected_frames
from torch import Tensor, nn
from x_transformers import ContinuousTransformerWrapper, Decoder

from xtloss import AutoregressiveWrapper, ContinuousAutoregressiveWrapper, XLAutoregressiveWrapper

V, D, DTYPE = 11, 3, torch.float64
INTEGERS = [getattr(torch, f'{u}int{size}') for u in ('', 'u') for size in (8, 16, 32, 64)]
WEIGHTINGS = ['token', 'sequence', 'square', 'padded', 'sequence_sum', 0.25]
COUNTING = ('lens', 'mask', 'loss_mask', 'seq_start_pos', 'segment_ids')
REFUSED = {'ar': {'seq_start_pos', 'segment_ids'}, 'xl': {'seq_start_pos'}, 'continuous': set()}  # ar: side by side


@cache
def network(kind: str) -> nn.Module:
    if kind == 'continuous':
        layers = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, attn_flash=True, verbose=False)
        torch.manual_seed(0)
        return ContinuousTransformerWrapper(
            dim_in=D, dim_out=D, max_seq_len=32, use_abs_pos_emb=False, attn_layers=layers
        ).to(DTYPE)
    short = {'max_seq_len': 3, 'max_mem_len': 32} if kind == 'xl' else {}
    return decoder(num_tokens=V, use_abs_pos_emb=False, layers_attn_flash=True, dtype=DTYPE, **short)


def wrapper(kind: str, weighting: Any, fused: Any) -> nn.Module:
    if kind == 'ar':
        return AutoregressiveWrapper(network(kind), loss_weighting=weighting, fused=fused)
    ours = XLAutoregressiveWrapper if kind == 'xl' else ContinuousAutoregressiveWrapper
    return ours(network(kind), loss_weighting=weighting)


def random_call(draw: random.Random, kind: str) -> dict[str, Any]:
    """x and a random choice of everything that goes with it."""
    torch.manual_seed(draw.getrandbits(32))
    b, n = draw.choice([0, 1, 1, 2, 3]), draw.randint(1, 8)

    def integer(t: Tensor) -> Tensor:
        return t.to(draw.choice(INTEGERS))

    call: dict[str, Any] = {'x': torch.randn(b, n, D, dtype=DTYPE)}
    if kind != 'continuous':
        x = torch.randint(0, V, (b, n))
        call['x'] = x.masked_fill(torch.rand(b, n) < 0.2, -100) if draw.random() < 0.3 else integer(x)
    made = {
        'lens': lambda: integer(torch.randint(0, n + 1, (b,))),
        'mask': lambda: random_mask(draw, b, n),
        'loss_mask': lambda: torch.rand(b, n) < 0.7,
        'loss_weight': lambda: torch.randn((b, n) if draw.random() < 0.5 else (b,), dtype=DTYPE),
        'seq_start_pos': lambda: integer(torch.randint(0, n + 1, (b,))),
        'segment_ids': lambda: integer((torch.rand(b, n) < 0.4).cumsum(-1) * (torch.rand(b, n) < 0.9)),
        'normalizer': lambda: draw.choice([1.5, 3, torch.tensor(0.0), torch.tensor(2, dtype=torch.uint16)]),
    }
    for name, make in made.items():
        if draw.random() < 0.3 and not (kind != 'ar' and name == 'segment_ids'):
            call[name] = make()
    return call


def random_mask(draw: random.Random, b: int, n: int) -> Tensor:
    """(b, n) bool: padding on the right, on the left, or holes."""
    real = torch.arange(n) < torch.randint(0, n + 1, (b, 1))
    return draw.choice([real, real.flip(1), torch.rand(b, n) < 0.7])


def spoilt(draw: random.Random, call: dict[str, Any]) -> str:
    """Spoil one argument of the call, its dtype or its shape, and return its name."""
    name = draw.choice(list(call))
    value = call[name]
    if not isinstance(value, Tensor) or draw.random() < 0.5:
        call[name] = value.to(torch.complex64) if isinstance(value, Tensor) else [value]
    else:
        call[name] = value[None, None]
    return name


def alone(kind: str, call: dict[str, Any]) -> Tensor:
    """What the bare network says of each token, (b, n, v or d), from those before that it may see, and nothing else."""
    x = call['x'] if kind == 'continuous' else call['x'].long()
    x = torch.where(x == -100, 0, x)
    b, n = x.shape[:2]
    out = torch.zeros(b, n, D if kind == 'continuous' else V, dtype=DTYPE)
    for row in range(b):
        runs: dict[Any, list[int]] = {}
        number = 0
        for i in range(n):
            if i and 'segment_ids' in call:
                number += call['segment_ids'][row, i].item() != call['segment_ids'][row, i - 1].item()
            hidden = 'mask' in call and not call['mask'][row, i].item()
            if not hidden and i >= (call['seq_start_pos'][row].item() if 'seq_start_pos' in call else 0):
                runs.setdefault(number, []).append(i)
        for places in runs.values():
            out[row, places] = whole(kind)(x[row, places][None])[0]
    return out


@cache
def whole(kind: str) -> nn.Module:
    """The network with the same parameters, long enough for a row."""
    if kind != 'xl':
        return network(kind)
    return decoder(num_tokens=V, use_abs_pos_emb=False, layers_attn_flash=True, dtype=DTYPE)


@torch.no_grad()
def try_one(seed: int) -> str:
    """Make a call and hold it to the oracle; return what it was, or raise AssertionError."""
    draw = random.Random(seed)
    kind = draw.choice(['ar', 'xl', 'continuous'])
    weighting, fused = draw.choice(WEIGHTINGS), draw.choice(['auto', True, False])
    call = random_call(draw, kind)
    module = wrapper(kind, weighting, fused)

    bad = spoilt(draw, call) if draw.random() < 0.1 else None
    may_refuse = bad is not None or (REFUSED[kind] and REFUSED[kind] <= call.keys())
    what = f'seed {seed}: {kind}, {weighting}, fused={fused}, {call}'
    try:
        loss = module(**call)
    except (TypeError, ValueError) as error:
        named = any(name in str(error) for name in ([bad] if bad else call))
        if may_refuse and named:
            return 'refused'
        raise AssertionError(what) from error
    except Exception as error:
        raise AssertionError(what) from error
    if may_refuse:
        raise AssertionError(f'not refused, {bad}: {what}')

    z = call.get('normalizer')
    options = {
        'weighting': weighting,
        'loss_weight': call.get('loss_weight'),
        'normalizer': None if z is None else float(z),
    }
    options |= {name: call[name] for name in COUNTING if name in call}
    x, out = call['x'], alone(kind, call)
    want = (
        expected_frames(out[:, :-1], x, 'squared', **options) if kind == 'continuous' else expected(out, x, **options)
    )
    if not abs(loss.item() - want.loss) <= 1e-9 * max(1, abs(want.loss)):
        raise AssertionError(f'{loss.item()} instead of {want.loss}: {what}')
    if 'normalizer' not in call:
        total = module.loss_normalizer(**{name: value for name, value in call.items() if name != 'loss_weight'})
        if not abs(total.item() - want.normalizer) <= 1e-9 * max(1, want.normalizer):
            raise AssertionError(f'Z is {total.item()} instead of {want.normalizer}: {what}')
    return 'right'


def outcomes(seeds: Iterator[int] | range) -> Counter[str]:
    """How many calls were right, and how many refused."""
    return Counter(map(try_one, seeds))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--calls', type=int, default=41_000)
    parser.add_argument('--start', type=int, default=0, help='the first seed')
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(dict(outcomes(range(args.start, args.start + args.calls))))
