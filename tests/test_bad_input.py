"""Every error of the contract: its type, its message (argument, rule, what came), and that nothing ran before it."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import Unreachable, decoder
from torch import nn

import xtloss
from xtloss import AutoregressiveWrapper

B, N = 4, 128
X = torch.zeros(B, N, dtype=torch.long)
FLAGS = torch.ones(B, N, dtype=torch.bool)
ROWS = torch.ones(B, dtype=torch.long)

# argument, value, error, pattern of the whole message
TYPES: list[tuple[str, Any, str]] = [
    ('x', torch.zeros(B, N), r'x must be .*integer.*, got float32'),
    ('x', FLAGS, r'x must be .*integer.*, got bool'),
    ('x', [[1, 2]], r'x must be .*tensor.*, got list'),
    ('lens', ROWS.float(), r'lens must be .*integer.*, got float32'),
    ('lens', ROWS.bool(), r'lens must be .*integer.*, got bool'),
    ('lens', [3, 3, 3, 3], r'lens must be .*tensor.*, got list'),
    ('mask', FLAGS.float(), r'mask must be bool, got float32'),
    ('mask', FLAGS.long(), r'mask must be bool, got int64'),
    ('mask', True, r'mask must be .*bool.*, got bool'),
    ('loss_mask', FLAGS.float(), r'loss_mask must be bool, got float32'),
    ('loss_mask', FLAGS.to(torch.uint8), r'loss_mask must be bool, got uint8'),
    ('loss_mask', 'prompt', r'loss_mask must be .*tensor.*, got str'),
    ('seq_start_pos', ROWS.float(), r'seq_start_pos must be .*integer.*, got float32'),
    ('seq_start_pos', 3, r'seq_start_pos must be .*tensor.*, got int'),
    ('segment_ids', FLAGS, r'segment_ids must be .*integer.*, got bool'),
    ('segment_ids', FLAGS.float(), r'segment_ids must be .*integer.*, got float32'),
]
FORWARD_TYPES: list[tuple[str, Any, str]] = [
    ('loss_weight', ROWS, r'loss_weight must be .*float.*, got int64'),
    ('loss_weight', FLAGS, r'loss_weight must be .*float.*, got bool'),
    ('loss_weight', 2.0, r'loss_weight must be .*tensor.*, got float'),
    ('normalizer', '1', r'normalizer must be .*, got str'),
    ('normalizer', True, r'normalizer must be .*, got bool'),
    ('normalizer', [1.0], r'normalizer must be .*, got list'),
    ('normalizer', torch.tensor(True), r'normalizer must be .*, got bool'),
]
VALUES: list[tuple[str, Any, str]] = [
    ('x', X[0], r'x must have shape \(b, n\).*, got \(128,\)'),
    ('x', X[None], r'x must have shape \(b, n\).*, got \(1, 4, 128\)'),
    ('x', torch.tensor(3), r'x must have shape \(b, n\).*, got \(\)'),
    ('lens', ROWS[:3], r'lens must have shape \(4,\).*, got \(3,\)'),
    ('lens', ROWS[:, None], r'lens must have shape \(4,\).*, got \(4, 1\)'),
    ('mask', FLAGS[:, 1:], r'mask must have shape \(4, 128\) like x, got \(4, 127\)'),
    ('mask', FLAGS[:1], r'mask must have shape \(4, 128\) like x, got \(1, 128\)'),
    ('loss_mask', FLAGS[:, 1:], r'loss_mask must have shape \(4, 128\) like x, got \(4, 127\)'),
    ('loss_mask', FLAGS[0], r'loss_mask must have shape \(4, 128\) like x, got \(128,\)'),
    ('seq_start_pos', ROWS[:3], r'seq_start_pos must have shape \(4,\).*, got \(3,\)'),
    ('segment_ids', X[:, 1:], r'segment_ids must have shape \(4, 128\) like x, got \(4, 127\)'),
    ('lens', ROWS.to('meta'), r'lens must be on .*cpu.*, got .*meta.*'),
    ('mask', FLAGS.to('meta'), r'mask must be on .*cpu.*, got .*meta.*'),
    ('loss_mask', FLAGS.to('meta'), r'loss_mask must be on .*cpu.*, got .*meta.*'),
    ('seq_start_pos', ROWS.to('meta'), r'seq_start_pos must be on .*cpu.*, got .*meta.*'),
    ('segment_ids', X.to('meta'), r'segment_ids must be on .*cpu.*, got .*meta.*'),
]
FORWARD_VALUES: list[tuple[str, Any, str]] = [
    ('loss_weight', torch.ones(3), r'loss_weight must have shape .*\(4,\).*\(4, 128\).*, got \(3,\)'),
    ('loss_weight', torch.ones(B, N - 1), r'loss_weight must have shape .*\(4,\).*\(4, 128\).*, got \(4, 127\)'),
    ('loss_weight', torch.tensor(1.0), r'loss_weight must have shape .*\(4,\).*\(4, 128\).*, got \(\)'),
    ('loss_weight', torch.ones(B, N, device='meta'), r'loss_weight must be on .*cpu.*, got .*meta.*'),
    ('normalizer', 0.0, r'normalizer must be .*, got 0\.0'),
    ('normalizer', -1.5, r'normalizer must be .*, got -1\.5'),
    ('normalizer', float('nan'), r'normalizer must be .*, got nan'),
    ('normalizer', torch.ones(1), r'normalizer must .*, got .*\(1,\).*'),
    ('normalizer', torch.ones(2, 2), r'normalizer must .*, got .*\(2, 2\).*'),
]
IN_FORWARD = [(a, v, TypeError, m) for a, v, m in TYPES + FORWARD_TYPES] + [
    (a, v, ValueError, m) for a, v, m in VALUES + FORWARD_VALUES
]
IN_NORMALIZER = [(a, v, TypeError, m) for a, v, m in TYPES] + [(a, v, ValueError, m) for a, v, m in VALUES]


def names(rows: list[tuple[str, Any, type[Exception], str]]) -> list[str]:
    return [f'{argument}: {message.rpartition("got ")[2]}' for argument, _, _, message in rows]


@pytest.mark.parametrize(('argument', 'value', 'error', 'message'), IN_FORWARD, ids=names(IN_FORWARD))
def test_forward(argument: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f'^{message}$'):
        AutoregressiveWrapper(Unreachable())(**{'x': X, argument: value})


@pytest.mark.parametrize(('argument', 'value', 'error', 'message'), IN_NORMALIZER, ids=names(IN_NORMALIZER))
def test_loss_normalizer(argument: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f'^{message}$'):
        AutoregressiveWrapper(Unreachable()).loss_normalizer(**{'x': X, argument: value})


OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
    ('loss_weighting', 'tokens', ValueError, r"loss_weighting must be .*sequence_sum.*, got '?tokens'?"),
    ('loss_weighting', '', ValueError, r"loss_weighting must be .*, got ('')?"),
    ('loss_weighting', 1.5, ValueError, r'loss_weighting must be .*, got 1\.5'),
    ('loss_weighting', -0.1, ValueError, r'loss_weighting must be .*, got -0\.1'),
    ('loss_weighting', float('nan'), ValueError, r'loss_weighting must be .*, got nan'),
    ('loss_weighting', float('inf'), ValueError, r'loss_weighting must be .*, got inf'),
    ('loss_weighting', True, TypeError, r'loss_weighting must be .*, got bool'),
    ('loss_weighting', False, TypeError, r'loss_weighting must be .*, got bool'),
    ('loss_weighting', ['token'], TypeError, r'loss_weighting must be .*, got list'),
    ('loss_weighting', torch.tensor(0.5), TypeError, r'loss_weighting must be .*, got Tensor'),
    ('equal_loss_weight_batch', 'sequence', TypeError, r'equal_loss_weight_batch must be .*bool.*, got str'),
    ('equal_loss_weight_batch', 1, TypeError, r'equal_loss_weight_batch must be .*bool.*, got int'),
    ('fused', 'yes', ValueError, r"fused must be .*auto.*, got '?yes'?"),
    ('fused', None, TypeError, r'fused must be .*auto.*, got None(Type)?'),
    ('fused', 0.5, TypeError, r'fused must be .*auto.*, got float'),
]


@pytest.mark.parametrize(('option', 'value', 'error', 'message'), OPTIONS, ids=[f'{o}={v}' for o, v, *_ in OPTIONS])
def test_options(option: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f'^{message}$'):
        AutoregressiveWrapper(Unreachable(), **{option: value})


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'loss_mask': FLAGS[:, 1:].float()}, 'loss_mask must be bool'),
        ({'loss_mask': FLAGS[:, 1:].float().to('meta')}, 'loss_mask must be bool'),
        ({'x': torch.zeros(3)}, 'x must be .*integer'),
        ({'loss_mask': FLAGS[:, 1:], 'lens': ROWS.float()}, 'lens must be .*integer'),
        ({'lens': ROWS[:3], 'normalizer': '1'}, 'normalizer must be'),
        ({'normalizer': -1.0, 'loss_weight': ROWS}, 'loss_weight must be .*float'),
    ],
)
def test_types_are_checked_before_shapes_and_ranges(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        AutoregressiveWrapper(Unreachable())(**{'x': X} | arguments)


@pytest.mark.parametrize('fused', ['auto', False])
def test_good_input_of_every_dtype_is_taken(fused: str | bool) -> None:
    """The twin of the tests above: what they refuse is refused for the reason they name."""
    wrapper = AutoregressiveWrapper(decoder(max_seq_len=N), fused=fused)
    for name in 'uint8 uint16 uint32 uint64 int8 int16 int32 int64'.split():
        integer = getattr(torch, name)
        rows = {'lens': (ROWS * 5).to(integer), 'seq_start_pos': ROWS.to(integer)}
        for floating in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            for weight in (torch.ones(B, dtype=floating), torch.ones(B, N, dtype=floating)):
                z = torch.tensor(2.0, dtype=floating)
                loss = wrapper(X.to(integer), **rows, mask=FLAGS, loss_mask=FLAGS, loss_weight=weight, normalizer=z)
                assert loss.isfinite()
        assert wrapper(X.to(integer), segment_ids=(X + 1).to(integer), normalizer=ROWS[0].to(integer)).isfinite()
    for number in (1, np.int64(1), np.float16(1), np.float64(1)):
        assert wrapper(X, normalizer=number).isfinite()


def why_not(wrapper: AutoregressiveWrapper, pattern: str, **call: Any) -> None:
    with pytest.raises(ValueError, match=pattern):
        wrapper(X[:, :8], **call)


def test_fused_true_says_why_it_cannot() -> None:
    def wrapper(**options: Any) -> AutoregressiveWrapper:
        return AutoregressiveWrapper(decoder(**options), fused=True)

    why_not(wrapper(mixture_of_softmax=True), r'fused.*mixture_of_softmax')
    why_not(wrapper(sigsoftmax_logits=True), r'fused.*sigsoftmax')
    why_not(wrapper(looped=True, layers_pre_and_post_norm=True), r'fused.*loop')
    why_not(wrapper(to_logits=nn.Sequential(nn.Linear(16, 11))), r'fused.*(head|to_logits)')
    why_not(wrapper(), r'fused.*return_outputs', return_outputs=True)
    why_not(wrapper(), r'fused.*to_logits_kwargs', to_logits_kwargs={'unknown': 1})
    why_not(wrapper(), r'fused.*return_logit_entropies', return_logit_entropies=True)
    hooked = wrapper()
    hooked.net.to_logits.register_forward_hook(lambda *_: None)
    why_not(hooked, r'fused.*hook')
    assert wrapper()(X[:, :8]).isfinite()


def test_no_assert_in_the_package() -> None:
    files = list(Path(xtloss.__file__).parent.glob('**/*.py'))
    assert files
    for path in files:
        found = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        assert not found, f'{path.name}: bare assert in lines {found}, gone under python -O'


SCRIPT = """
import torch, x_transformers as xt, xtloss
layers = xt.Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, verbose=False)
wrapper = xtloss.AutoregressiveWrapper(xt.TransformerWrapper(num_tokens=11, max_seq_len=8, attn_layers=layers))
x = torch.ones(2, 8).long()
print(bool(wrapper(x, lens=torch.tensor([8, 3])).isfinite()))
for bad in (dict(lens=torch.ones(2)), dict(mask=torch.ones(2, 7).bool()), dict(normalizer=-1.0)):
    try:
        wrapper(x, **bad)
    except (TypeError, ValueError) as error:
        print(type(error).__name__, error)
try:
    xtloss.AutoregressiveWrapper(wrapper.net, loss_weighting='tokens')
except ValueError as error:
    print(error)
"""


def test_python_minus_o_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    exec(SCRIPT, {})
    want = capsys.readouterr().out
    got = subprocess.run(
        [sys.executable, '-O', '-W', 'ignore', '-c', SCRIPT], capture_output=True, text=True, check=True
    )
    assert got.stdout == want
    assert len(want.splitlines()) == 5
