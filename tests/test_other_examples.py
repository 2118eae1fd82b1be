"""The examples but for that of real text: data, measures and shares by hand, and the whole of each."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import explain_weighting
import pytest
import torch
import train_continuous
import train_copy
from torch import Generator, Tensor
from x_transformers import Decoder, TransformerWrapper

from xtloss import AutoregressiveWrapper

TINY = '--dim 16 --depth 1 --heads 2 --batch-size 4 --held-out 8 --name tiny'.split()


@pytest.fixture(autouse=True)
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a run of that name lies; its tables fit a terminal of the usual width."""
    monkeypatch.setenv('COLUMNS', '80')
    return folder / 'runs' / 'tiny'


# train_continuous.py and train_copy.py


def test_train_continuous(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_continuous.main([*TINY, '--steps', '2', '--equal-loss-weight-batch'])
    assert sorted(path.name for path in run.iterdir()) == ['config.json', 'metrics.json', 'prediction.png']
    measured = json.loads((run / 'metrics.json').read_text())
    assert measured.keys() == {'x-transformers', 'xtloss'}
    assert f'{measured["xtloss"]["at the end"]:.4f}' in capsys.readouterr().out


def test_recordings_end_in_padding() -> None:
    batch = train_continuous.record(5, 0.0, Generator().manual_seed(0))
    for x, length, truth in zip(*batch, strict=True):
        assert torch.equal(x[:length], truth[:length])
        assert not x[length:].any()
        assert (truth[length:, 0] - train_continuous.REST).abs().max() < 0.25


def test_errors_inside_and_at_the_end() -> None:
    """A network that predicts the truth but at the end, where it predicts padding."""
    batch = train_continuous.record(5, 0.0, Generator().manual_seed(0))

    def net(x: Tensor) -> Tensor:
        out = batch.truth[:, 1 : x.shape[1] + 1].clone()
        out[torch.arange(5), batch.lens - 1] = 0
        return out

    measured = train_continuous.measure(SimpleNamespace(net=net), batch)
    truth = batch.truth[torch.arange(5), batch.lens, 0]
    assert measured == {'inside': 0, 'at the end': pytest.approx(truth.square().mean().sqrt().item(), rel=1e-6)}


def test_train_copy(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_copy.main([*TINY, '--measure-after', '1', '2', '--weightings', 'token', 'square'])
    assert sorted(path.name for path in run.iterdir()) == ['accuracy_by_length.png', 'config.json', 'metrics.json']
    measured = json.loads((run / 'metrics.json').read_text())
    assert measured.keys() == {'1', '2'}
    assert measured['2'].keys() == {'token', 'square'}
    out = capsys.readouterr().out
    assert 'after 2 steps' in out
    assert f'{measured["2"]["square"][-1]["tokens"]:.1%}' in out


def test_accuracy_by_length() -> None:
    """Of lengths 1, 3 and 4 the second has one token wrong."""
    tgt = torch.tensor([[0, 5, -100, -100, -100], [0, 5, 6, 7, -100], [0, 5, 6, 7, 8]])
    batch = train_copy.Batch(tgt[:, 1:].clamp(min=0), tgt[:, 1:] >= 0, tgt)
    logits = torch.nn.functional.one_hot(tgt[:, 1:].clamp(min=0), 9).float()
    logits[1, 2] = logits[1, 1]
    model = SimpleNamespace(encoder=lambda *_, **__: None, decoder=lambda *_, **__: (None, (logits, None)))
    rows = train_copy.measure(model, batch)
    assert [(row.lengths, row.sequences) for row in rows] == [('1 to 2', 1), ('3 to 8', 2), ('all', 3)]
    assert [row.tokens for row in rows] == pytest.approx([1, 6 / 7, 7 / 8])
    assert [row.whole for row in rows] == pytest.approx([1, 1 / 2, 2 / 3])


# explain_weighting.py


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


def test_the_seed_example_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
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
def test_lines_have_the_shares_of_the_wrapper(folder: Path, max_len: int | None) -> None:
    lines = [b'a line of bytes', b'ab', b'x', b'four', b'another line']  # one byte has no target
    (folder / 'text').write_bytes(b'\n\n'.join(lines) + b'\n   \n')
    explain_weighting.main(['--file', 'text', *(['--max-len', str(max_len)] if max_len else [])])
    lens = torch.tensor([len(line[:max_len]) for line in lines])
    x = torch.ones(len(lines), int(lens.max()), dtype=torch.long)
    assert_those_of_the_wrapper(x=x, lens=lens)


@pytest.mark.parametrize('max_len', [None, 7])
def test_answers_have_the_shares_of_the_wrapper(folder: Path, max_len: int | None) -> None:
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


def test_many_lengths_come_in_ranges_that_sum_to_all(capsys: pytest.CaptureFixture[str]) -> None:
    explain_weighting.main(['--lens', *map(str, range(1, 101)), '--name', 'many'])
    out = capsys.readouterr().out
    ranges = [line.split()[:2] for line in out.split('Share of all sequences')[1].splitlines()[4:8]]
    assert ranges == [['1-3', '3'], ['4-15', '12'], ['16-63', '48'], ['64-100', '37']]
    for weighting, total in {'token': 1, 'square': 1, 'sequence': 1, 'padded': 0.505, 'sequence_sum': 50.5}.items():
        assert sum(row[f'{weighting} sequence'] for row in shares('many')) == pytest.approx(total)


def test_the_spread_in_a_sentence() -> None:
    of_most = explain_weighting.spread(torch.tensor([10] * 95 + [1000] * 5))
    assert '90% of your sequences are within a factor of 1.0 (10 to 10 targets): the choice hardly' in of_most
    of_two = explain_weighting.spread(torch.tensor([10, 900]))
    assert 'within a factor of 90.0 (10 to 900 targets): the choice matters.' in of_two
