"""The examples of the continuous wrapper and of `upgrade_`: data, measures, and the whole of each for a few steps."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train_continuous
import train_copy
from torch import Generator, Tensor

TINY = '--dim 16 --depth 1 --heads 2 --batch-size 4 --held-out 8 --name tiny'.split()


@pytest.fixture(autouse=True)
def run(folder: Path) -> Path:
    """Where a run of that name lies."""
    return folder / 'runs' / 'tiny'


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
