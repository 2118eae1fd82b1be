"""Every argument of every public callable, times every kind of wrong thing: the exact error, before anything runs.

Arguments are found by their signatures: a new one without its rows in `bad_cases.py` is a failure.
"""

import inspect
from typing import Any

import pytest
from bad_cases import CASES, Case
from wrong_things import Wrong

import xtloss

UNKNOWN = {'kwargs', 'network_kwargs', 'options'}  # whose rows are names that nobody knows
ARGUMENTS = [(name, argument) for name, case in CASES.items() for argument in case.rows]


def why_wrong(case: Case, argument: str, row: Wrong, **others: Any) -> str | None:
    """What a call does instead of raising what it must; a note may follow the message."""
    want = row.message.format(argument)
    try:
        case.call(**{**case.good, **others, argument: row.value})
    except Exception as error:
        got, note = str(error)[: len(want)], str(error)[len(want) :]
        if type(error) is row.error and got == want and note[:1] in ('', ',', ':'):
            return None
        raised = repr(error)
    else:
        raised = 'nothing'
    return f'{argument} of {type(row.value).__name__}: {raised} instead of {row.error.__name__}: {want}'


@pytest.mark.parametrize(('name', 'argument'), ARGUMENTS)
def test_every_wrong_thing(name: str, argument: str) -> None:
    case = CASES[name]
    found = [why_wrong(case, argument, row) for row in case.rows[argument]]
    assert not any(found), '\n'.join(filter(None, found))


@pytest.mark.parametrize('name', CASES)
def test_types_come_before_values(name: str) -> None:
    """Whatever the order of the arguments: one of a wrong type beside one of a wrong value."""
    case, found = CASES[name], []
    named = {argument: rows for argument, rows in case.rows.items() if argument not in UNKNOWN}
    firsts = {(argument, row.error): row for argument, rows in named.items() for row in reversed(rows)}
    for (argument, error), row in firsts.items():
        others = {other: bad.value for (other, kind), bad in firsts.items() if kind is ValueError and other != argument}
        if error is TypeError:
            found += [why_wrong(case, argument, row, **{other: value}) for other, value in others.items()]
    assert not any(found), '\n'.join(filter(None, found))


def test_no_argument_is_without_rows() -> None:
    public = {name for name in xtloss.__all__ if name != 'LossBreakdown'}
    assert public == {name.partition('.')[0] for name in CASES}
    for name, case in CASES.items():
        parameters = inspect.signature(case.signature).parameters
        exempt = {'self'} | {key for key, p in parameters.items() if p.kind is p.VAR_POSITIONAL}
        if name.endswith(('.forward', '.loss_normalizer')):  # the network's
            exempt |= {key for key, p in parameters.items() if p.kind is p.VAR_KEYWORD}
        assert parameters.keys() - exempt <= case.rows.keys(), name
        assert all(case.rows.values()), name
