"""Bad input: the error of every argument times every kind of wrong thing, before the network runs.

Arguments are found by their signatures: a new one without its rows in `bad_cases.py` is a failure.
"""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import x_transformers
from bad_cases import CASES, B, Case, N
from networks import Stub, Unreachable, continuous_network, decoder
from torch import nn
from wrong_things import Wrong

import xtloss
from xtloss import AutoregressiveWrapper, ContinuousAutoregressiveWrapper, XLAutoregressiveWrapper

OF_UPSTREAM = {'use_l1_loss', 'loss_fn'}  # which are not looked at
X, ROWS = torch.ones(B, N).long(), torch.ones(B).long()


def why_wrong(case: Case, argument: str, row: Wrong) -> str | None:
    """What a call does instead of raising what it must; a note may follow the message."""
    want = row.message.format(argument)
    pattern = re.escape(want).replace('…', '.*')
    try:
        case.call(**{**case.good, argument: row.value})
    except Exception as error:
        if type(error) is row.error and re.match(pattern + '($|[,: ])', str(error)):
            return None
        raised = repr(error)
    else:
        raised = 'nothing'
    return f'{argument} of {type(row.value).__name__}: {raised} instead of {row.error.__name__}: {want}'


@pytest.mark.parametrize(('name', 'argument'), [(name, argument) for name in CASES for argument in CASES[name].rows])
def test_every_wrong_thing(name: str, argument: str) -> None:
    case = CASES[name]
    found = [why_wrong(case, argument, row) for row in case.rows[argument]]
    assert not any(found), '\n'.join(filter(None, found))


def test_no_argument_is_without_rows() -> None:
    public = {name for name in xtloss.__all__ if name != 'LossBreakdown'}
    assert public == {name.partition('.')[0] for name in CASES}
    for name, case in CASES.items():
        parameters = inspect.signature(case.signature).parameters
        exempt = {'self', *OF_UPSTREAM, *(key for key, p in parameters.items() if p.kind is p.VAR_POSITIONAL)}
        upstreams = getattr(x_transformers, name, None)  # its constructor's are its own
        exempt |= (
            set(inspect.signature(upstreams).parameters) - {'net', 'loss_fn', 'use_l1_loss'} if upstreams else set()
        )
        if name.endswith(('.forward', '.loss_normalizer')):  # the network's
            exempt |= {key for key, p in parameters.items() if p.kind is p.VAR_KEYWORD}
        assert parameters.keys() - exempt <= case.rows.keys(), name
        assert all(case.rows.values()), name


# what only a call of its own can show


def test_a_mask_of_the_inputs_is_told_why() -> None:
    with pytest.raises(ValueError, match=r'^mask must have shape \(4, 8\) like x, got \(4, 7\)\W.*inputs'):
        ContinuousAutoregressiveWrapper(Unreachable())(torch.zeros(B, N, 5), mask=torch.ones(B, N - 1).bool())


@pytest.mark.parametrize('options', [{}, {'loss_weighting': 'token'}, {'loss_weighting': 0.5}])
@pytest.mark.parametrize('kind', ['ar', 'continuous', 'xl'])
def test_misplaced_misspelt_and_contradictory(kind: str, options: dict[str, Any]) -> None:
    """`lens` as the second argument would, with one row, be taken for True."""
    made: dict[str, tuple[Any, Any, torch.Tensor]] = {
        'ar': (AutoregressiveWrapper, decoder(), X),
        'continuous': (ContinuousAutoregressiveWrapper, continuous_network(), torch.zeros(B, N, 5)),
        'xl': (XLAutoregressiveWrapper, decoder(max_mem_len=8), X),
    }
    ours, net, x = made[kind]
    with pytest.raises((TypeError, ValueError), match=r'^(return_outputs|rollout_steps|mems) must be .*, got'):
        ours(net, **options)(x[:1], ROWS[:1])
    with pytest.raises(TypeError, match=r"^loss_normalizer.* unexpected keyword argument 'lenss'"):
        ours(net, **options).loss_normalizer(x, lenss=ROWS)
    if options:
        with pytest.raises(ValueError, match=r'^equal_loss_weight_batch'):
            ours(net, equal_loss_weight_batch=True, **options)


def test_options_are_looked_at_whenever_they_are_used() -> None:
    model = AutoregressiveWrapper(decoder())
    good: dict[str, Any] = {'fused': 'auto', 'loss_weighting': None, 'unpad': False}
    spoilt = (('fused', 0, TypeError), ('fused', 'yes', ValueError), ('loss_weighting', 2, ValueError))
    for name, value, error in spoilt:
        setattr(model, name, value)
        with pytest.raises(error, match=f'^{name} must be'):
            model(X)
        setattr(model, name, good[name])
    assert model(X).isfinite()


def test_fused_beside_outputs() -> None:
    with pytest.raises(ValueError, match=r'fused.*return_outputs'):
        AutoregressiveWrapper(decoder(), fused=True)(X, return_outputs=True)


@pytest.mark.parametrize('ours', [AutoregressiveWrapper, XLAutoregressiveWrapper])
@pytest.mark.parametrize('call', [{}, {'lens': ROWS}, {'return_breakdown': True}])
def test_networks_of_several_heads(ours: type[nn.Module], call: dict[str, Any]) -> None:
    """They return a tuple, of which no single loss can be made."""
    with pytest.raises(ValueError, match=r'(network|net) must (return|have)'):
        ours(decoder(num_output_heads=3))(X, **call)


@pytest.mark.parametrize('shape', [(B, N - 1, 11), (B - 1, N, 11), (B, N)])
def test_a_network_that_returns_something_else(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r'^the network must return .*, got'):
        AutoregressiveWrapper(Stub(torch.zeros(shape)))(X)


# python -O


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
"""


@pytest.mark.slow
def test_python_minus_o_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    exec(SCRIPT, {})
    want = capsys.readouterr().out
    command = [sys.executable, '-O', '-W', 'ignore', '-c', SCRIPT]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == want
    assert len(want.splitlines()) == 4
