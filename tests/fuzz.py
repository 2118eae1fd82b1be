"""Random calls of the three wrappers against the oracle: `tests/soak.py` makes them by the hundred thousand.

The networks are in float64, with flash attention, as the other softmax of x-transformers is float32 always. They know
no positions, so that the logits of a token can be had from the bare network, which is handed nothing but the earlier
tokens that it may see, without a mask. The equation over these logits is `oracle.expected`. A call gives its value
within 1e-9, or, where its arguments do not go together, raises ValueError naming one of them. What is wrong by itself
is in `bad_cases.py`.
"""

import random
import re
from functools import cache
from typing import Any

import torch
from fuzz_calls import DTYPE, SEGMENT, WIDTH, Call, D, V, random_call, refused
from networks import assert_same_gradients, continuous_network, decoder, gradients
from oracle import Expected, differentiable, expected
from oracle_continuous import differentiable_frames, expected_frames
from oracle_rollout import expected_rollout, rolled_out
from torch import Tensor, nn

from xtloss import AutoregressiveWrapper, ContinuousAutoregressiveWrapper, XLAutoregressiveWrapper

OURS = {'ar': AutoregressiveWrapper, 'xl': XLAutoregressiveWrapper, 'continuous': ContinuousAutoregressiveWrapper}
COUNTING = ('lens', 'mask', 'loss_mask', 'seq_start_pos', 'segment_ids')


@cache
def network(kind: str) -> nn.Module:
    if kind == 'continuous':
        return continuous_network(features=D, use_abs_pos_emb=False, layers_attn_flash=True, dtype=DTYPE)
    short = {'max_seq_len': SEGMENT, 'max_mem_len': 32} if kind == 'xl' else {}
    return decoder(num_tokens=V, use_abs_pos_emb=False, layers_attn_flash=True, dtype=DTYPE, **short)


@cache
def whole(kind: str) -> nn.Module:
    """The network with the same parameters, long enough for a row."""
    return network('ar' if kind == 'xl' else kind)


def alone(kind: str, call: dict[str, Any], prefix: Tensor | None = None) -> Tensor:
    """What the bare network says of each token, (b, n, v or d), from those before that it may see, and nothing else."""
    x = call['x'] if kind == 'continuous' else call['x'].long()
    x = torch.where(x == -100, 0, x)
    b, n = x.shape[:2]
    before = call.get('prepend_embeds', torch.zeros(b, 0, WIDTH, dtype=DTYPE))
    p = before.shape[1]
    out = torch.zeros(b, n, D if kind == 'continuous' else V, dtype=DTYPE)
    for row in range(b):
        runs: dict[Any, list[int]] = {}
        number, start = 0, call['seq_start_pos'][row].item() if 'seq_start_pos' in call else 0
        for i in range(n):
            if i and 'segment_ids' in call:
                number += call['segment_ids'][row, i].item() != call['segment_ids'][row, i - 1].item()
            if 'dropout_mems' in call:
                number = i // SEGMENT
            hidden = 'mask' in call and not call['mask'][row, i].item()
            if not hidden and p + i >= start:
                runs.setdefault(number, []).append(i)
        for places in runs.values():
            seen = {'prepend_embeds': before[row, start:][None]} if start < p else {}
            ids = x[row, places]
            if prefix is not None and 'dropout_mems' not in call:
                ids = torch.cat([prefix[row], ids])
            out[row, places] = whole(kind)(ids[None], **seen)[0, -len(places) :]
    return out


def wanted(call: Call, out: Tensor | None, seed: int) -> Expected:
    """What the oracle says."""
    arguments, x, z = call.arguments, call.arguments['x'], call.arguments.get('normalizer')
    given: dict[str, Any] = {'weighting': call.weighting, 'normalizer': None if z is None else float(z)}
    kind = 'absolute' if call.options.get('use_l1_loss') else 'squared'
    if call.steps > 1:
        real = torch.ones(x.shape[:2], dtype=torch.bool) & arguments.get('mask', torch.tensor(True))
        if 'lens' in arguments:
            real = real & (torch.arange(x.shape[1]) < arguments['lens'].long()[:, None])
        torch.manual_seed(seed)
        rolled = rolled_out(network(call.kind), x, real.sum(1).tolist(), call.steps, arguments.get('loss_weight'))
        return expected_rollout(rolled, kind, **given)[0]
    given |= {name: arguments[name] for name in COUNTING if name in arguments}
    given['loss_weight'] = arguments.get('loss_weight')
    if call.kind == 'continuous':
        return expected_frames(out[:, :-1], x, kind, **given)
    return expected(out, x, prepend_len=arguments.get('prepend_embeds', out[:, :0]).shape[1], **given)


def try_one(seed: int) -> str:
    """Make a call and hold it to the oracle; return what it was, or raise AssertionError."""
    draw = random.Random(seed)
    call = random_call(draw)
    with torch.set_grad_enabled(draw.random() < 0.2):
        try:
            return judge(call, seed)
        except Exception as error:
            raise AssertionError(f'seed {seed}: {error!r} of {call}') from error


def judge(call: Call, seed: int) -> str:
    arguments, must_refuse = call.arguments, refused(call)
    if call.prefix is not None:
        arguments = {**arguments, 'mems': network(call.kind)(call.prefix, return_mems=True)[1]}
    torch.manual_seed(seed)
    try:
        module = OURS[call.kind](network(call.kind), **call.options)
        result = module(**arguments)
    except ValueError as error:
        if any(re.search(rf'\b{name}\b', str(error)) for name in must_refuse):
            return 'refused'
        raise
    assert not must_refuse, f'not refused: {must_refuse}'

    differentiates = torch.is_grad_enabled()
    with torch.set_grad_enabled(differentiates and call.kind != 'xl'):  # which backpropagates through a segment
        out = alone(call.kind, arguments, call.prefix) if call.steps == 1 else None
    loss, *more = result if isinstance(result, tuple) else [result]
    want = wanted(call, None if out is None else out.detach(), seed)
    close('loss', loss, want.loss)
    if 'return_breakdown' in arguments:
        breakdown = more.pop()
        close('token_loss', breakdown.token_loss, want.token_loss)
        close('weight', breakdown.weight, want.weight)
        close('normalizer', breakdown.normalizer, want.normalizer)
        close('auxiliary', breakdown.auxiliary, 0.0)
    if 'return_outputs' in arguments:
        counted = torch.tensor(want.counted, dtype=torch.bool).view(out.shape[0], out.shape[1] - 1)
        close('logits', more.pop()[0][counted], out[:, :-1][counted].tolist())
    assert not more
    if 'normalizer' not in arguments:
        close('Z', module.loss_normalizer(**arguments), want.normalizer)
    if differentiates:
        judge_gradients(call, module, loss, out, want)
    return 'right'


def judge_gradients(call: Call, module: nn.Module, loss: Tensor, out: Tensor | None, want: Expected) -> None:
    """They are finite, and those of the oracle where the whole row is one graph."""
    got = gradients(loss, module.net)
    assert all(grad.isfinite().all() for grad in got.values())
    if call.kind == 'xl' or out is None or not out.requires_grad:
        return
    x = call.arguments['x']
    if call.kind == 'continuous':
        kind = 'absolute' if call.options['use_l1_loss'] else 'squared'
        slow = differentiable_frames(out[:, :-1], x, want, kind)
    else:
        slow = differentiable(out, x, want)
    assert_same_gradients(got, gradients(slow, module.net) if slow.requires_grad else {}, 1e-9, floor=1e-3)


def close(what: str, got: Tensor, want: Any) -> None:
    """Raise AssertionError unless it is the oracle's, to 1e-9."""
    want = torch.tensor(want, dtype=DTYPE)
    if want.numel() != got.numel() or not torch.allclose(got.detach(), want.view_as(got), rtol=1e-9, atol=1e-9):
        raise AssertionError(f'{what} is {got.tolist()} instead of {want.tolist()}')
