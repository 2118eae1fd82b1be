"""The shares that explain_weighting.py prints are those of the wrapper, and of the equation by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import explain_weighting
import pytest
import torch
from x_transformers import Decoder, TransformerWrapper

from xtloss import AutoregressiveWrapper


@pytest.fixture(autouse=True)
def terminal(folder, monkeypatch):
    """One of the usual width, in an empty folder."""
    monkeypatch.setenv('COLUMNS', '80')


def shares(name: str = 'weighting') -> list[dict[str, float]]:
    """Return what a run wrote of each sequence."""
    with open(Path('runs', name, 'shares.csv'), newline='') as file:
        return [{column: float(value) for column, value in row.items()} for row in csv.DictReader(file)]


def assert_those_of_the_wrapper(**batch: torch.Tensor) -> None:
    """Check the shares of the rows that have a target against what the wrapper gives them."""
    net = TransformerWrapper(num_tokens=256, max_seq_len=64, attn_layers=Decoder(dim=16, depth=1, heads=2))
    for weighting in explain_weighting.POWERS:
        _, breakdown = AutoregressiveWrapper(net, loss_weighting=weighting)(**batch, return_breakdown=True)
        of_rows = (breakdown.weight / breakdown.normalizer).sum(dim=1)[(breakdown.weight > 0).any(dim=1)]
        assert [row[f'{weighting} sequence'] for row in shares()] == pytest.approx(of_rows.tolist())


def test_the_seed_example_by_hand(capsys):
    explain_weighting.main([])
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ['3', '1', '75', '63.4', '50', '50', '150'] in lines  # the sequence
    assert ['3', '1', '25', '21.1', '16.7', '16.7', '50'] in lines  # each of its tokens
    assert ['1', '1', '25', '36.6', '50', '16.7', '50'] in lines
    assert ['all', '2', '100', '100', '100', '66.7', '200'] in lines
    assert 'All sequences are within a factor of 3.0 (1 to 3 targets)' in ' '.join(out.split())
    assert Path('runs/weighting/shares.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('max_len', [None, 6])
def test_lines_have_the_shares_of_the_wrapper(folder, max_len):
    lines = [b'a line of bytes', b'ab', b'x', b'four', b'another line']  # one byte has no target
    (folder / 'text').write_bytes(b'\n\n'.join(lines) + b'\n   \n')
    explain_weighting.main(['--file', 'text', *(['--max-len', str(max_len)] if max_len else [])])
    lens = torch.tensor([len(line[:max_len]) for line in lines])
    x = torch.ones(len(lines), int(lens.max()), dtype=torch.long)
    assert_those_of_the_wrapper(x=x, lens=lens)


@pytest.mark.parametrize('max_len', [None, 7])
def test_answers_have_the_shares_of_the_wrapper(folder, max_len):
    pairs = [('a question', 'an answer'), ('2+2?', '4'), ('', 'no prompt'), ('nothing', ''), ('ids', [7, 8, 9])]
    records = [{'q': prompt, 'a': answer, 'note': 1} for prompt, answer in pairs]
    (folder / 'chats.jsonl').write_text('\n'.join(map(json.dumps, records)))
    options = '--file chats.jsonl --prompt q --answer a'.split() + (['--max-len', str(max_len)] if max_len else [])
    explain_weighting.main(options)
    whole = [(len(prompt), len(prompt) + len(answer)) for prompt, answer in pairs]
    lens = torch.tensor([end if max_len is None else min(end, max_len) for _, end in whole])
    loss_mask = torch.arange(int(lens.max())) >= torch.tensor([start for start, _ in whole])[:, None]
    x = torch.ones(loss_mask.shape, dtype=torch.long)
    assert_those_of_the_wrapper(x=x, lens=lens, loss_mask=loss_mask)


def test_many_lengths_come_in_ranges_that_sum_to_all(folder, capsys):
    explain_weighting.main(['--lens', *map(str, range(1, 101)), '--name', 'many'])
    out = capsys.readouterr().out
    ranges = [line.split()[:2] for line in out.split('Share of all sequences')[1].splitlines()[4:8]]
    assert ranges == [['1-3', '3'], ['4-15', '12'], ['16-63', '48'], ['64-100', '37']]
    for weighting, total in {'token': 1, 'square': 1, 'sequence': 1, 'padded': 0.505, 'sequence_sum': 50.5}.items():
        assert sum(row[f'{weighting} sequence'] for row in shares('many')) == pytest.approx(total)


def test_the_spread_in_a_sentence():
    of_most = explain_weighting.spread(torch.tensor([10] * 95 + [1000] * 5))
    assert '90% of your sequences are within a factor of 1.0 (10 to 10 targets): the choice hardly' in of_most
    of_two = explain_weighting.spread(torch.tensor([10, 900]))
    assert 'within a factor of 90.0 (10 to 900 targets): the choice matters.' in of_two
