"""Bad input: the error of every argument times every kind of wrong thing, before the network runs.

Arguments are found by their signatures: a new one without its rows in `bad_cases.py` is a failure.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import x_transformers
from bad_cases import CASES, PADDED_WITH, B, Case, N
from networks import Stub, continuous_network, decoder
from torch import nn
from wrong_things import Wrong

import xtloss
from xtloss import AutoregressiveWrapper, ContinuousAutoregressiveWrapper, XLAutoregressiveWrapper, collate, pack

OF_UPSTREAM = {'use_l1_loss', 'loss_fn'}  # which are not looked at
X, ROWS = torch.ones(B, N).long(), torch.ones(B).long()


def why_wrong(case: Case, argument: str, row: Wrong) -> str | None:
    """What a call does instead of raising what it must; a note may follow the message."""
    want = row.message.replace('{}', argument)
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


@pytest.mark.parametrize(('sequence', 'row'), PADDED_WITH)
@pytest.mark.parametrize('function', [pack, collate])
def test_sequences_are_padded_with_what_they_can_hold(function: Any, sequence: torch.Tensor, row: Wrong) -> None:
    good = {'sequences' if function is pack else 'examples': [sequence], 'max_len': 4}
    assert why_wrong(Case(function, good, {}, function), 'pad_value', row) is None


def test_no_sequences_are_padded_with_a_number() -> None:
    for call in (lambda: pack([], 4, None), lambda: collate([], pad_value=0.5)):
        with pytest.raises(TypeError):
            call()


@pytest.mark.parametrize('kind', ['ar', 'continuous', 'xl'])
def test_misplaced_misspelt_and_contradictory(kind: str) -> None:
    """`lens` as the second argument would, with one row, be taken for True."""
    made: dict[str, tuple[Any, Any, torch.Tensor]] = {
        'ar': (AutoregressiveWrapper, decoder(), X),
        'continuous': (ContinuousAutoregressiveWrapper, continuous_network(), torch.zeros(B, N, 5)),
        'xl': (XLAutoregressiveWrapper, decoder(max_mem_len=8), X),
    }
    ours, net, x = made[kind]
    with pytest.raises((TypeError, ValueError), match=r'^(return_outputs|rollout_steps|mems) must be .*, got'):
        ours(net)(x[:1], ROWS[:1])
    with pytest.raises(TypeError, match=r"^loss_normalizer.* unexpected keyword argument 'lenss'"):
        ours(net).loss_normalizer(x, lenss=ROWS)
    for other in ('token', 'square', 'padded', 'sequence_sum', 0.0, 0.5):
        with pytest.raises(ValueError, match=f'^equal_loss_weight_batch=True .* got {other!r} too$'):
            ours(net, equal_loss_weight_batch=True, loss_weighting=other)
    ours(net, equal_loss_weight_batch=True, loss_weighting='sequence')


def test_options_are_looked_at_whenever_they_are_used() -> None:
    model = AutoregressiveWrapper(decoder())
    good: dict[str, Any] = {'fused': 'auto', 'loss_weighting': None}
    spoilt = (('fused', 0, TypeError), ('fused', 'yes', ValueError), ('loss_weighting', 2, ValueError))
    for name, value, error in spoilt:
        setattr(model, name, value)
        with pytest.raises(error, match=f'^{name} must be'):
            model(X)
        setattr(model, name, good[name])
    assert model(X).isfinite()


HEADS = r'(network|net) must (return|have)'
OTHER = r'^the network must return .*, got'
REFUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (lambda: AutoregressiveWrapper(decoder(), fused=True), {'return_outputs': True}, r'fused.*return_outputs'),
    # several heads return a tuple, of which no single loss can be made
    (lambda: AutoregressiveWrapper(decoder(num_output_heads=3)), {}, HEADS),
    (lambda: AutoregressiveWrapper(decoder(num_output_heads=3)), {'return_breakdown': True}, HEADS),
    (lambda: XLAutoregressiveWrapper(decoder(num_output_heads=3)), {'lens': ROWS}, HEADS),
    (lambda: AutoregressiveWrapper(Stub(torch.zeros(B, N - 1, 11))), {}, OTHER),
    (lambda: AutoregressiveWrapper(Stub(torch.zeros(B - 1, N, 11))), {}, OTHER),
    (lambda: AutoregressiveWrapper(Stub(torch.zeros(B, N))), {}, OTHER),
]


@pytest.mark.parametrize(('make', 'call', 'message'), REFUSED)
def test_networks_of_which_no_loss_can_be_made(make: Callable[[], nn.Module], call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(X, **call)
