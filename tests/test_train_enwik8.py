"""The example that trains on real text: its data, its report, and the whole of it for three steps."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch
import train_enwik8
from command_line import UsageError
from enwik8 import report as enwik8_report
from enwik8 import sequences as enwik8_sequences
from enwik8 import text as enwik8_text
from enwik8.config import PRESETS, Config, resolve
from enwik8.report import SequenceCost, report
from enwik8.text import DataError, find_text, read_text
from torch import nn

ARTICLE = '<page>\n  <title>{0}</title>\n  <text>Of {0} it is said:\n\n{1}\n* {0} too\n</text>\n</page>\n'
TEXT = ''.join(ARTICLE.format(f'number {i}', 'so ' * (i * 7 % 60)) for i in range(200)).encode()
MODEL = '--preset tiny --dim 32 --depth 1 --heads 2'.split()
TINY = [*MODEL, *'--seq-len 32 --batch-size 4 --steps 3 --held-out 8 --generate-length 4'.split()]
KINDS = ['lines', 'pages', 'windows']


@pytest.fixture(autouse=True)
def no_network(folder, monkeypatch):
    """The text cannot be downloaded."""
    monkeypatch.setattr(enwik8_text, 'URL', 'http://127.0.0.1:9/enwik8.zip')  # nothing listens there


def zipped(text: bytes) -> bytes:
    """Return a zip of one file."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('enwik8', text)
    return content.getvalue()


def files(folder: Path) -> list[str]:
    """Return every file and folder below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*'))


ENCODERS = {'text': bytes, 'text.gz': gzip.compress, 'text.zip': zipped, 'text.GZ': gzip.compress}


# the text


@pytest.mark.parametrize('name', ENCODERS)
def test_reads_raw_gz_and_zip(folder, name):
    (folder / name).write_bytes(ENCODERS[name](TEXT))
    assert read_text(name) == TEXT
    assert read_text(name, max_bytes=100) == TEXT[:100]
    (folder / name).write_bytes(ENCODERS[name](b''))
    with pytest.raises(DataError, match=f'^{re.escape(name)} is empty$'):
        read_text(name)


@pytest.mark.parametrize('name', ['text.gz', 'text.zip'])
@pytest.mark.parametrize('damage', ['last byte missing', 'overwritten', 'other format'])
@pytest.mark.parametrize('max_bytes', [None, 10])
def test_damaged_archives_are_refused(folder, name, damage, max_bytes):
    data = ENCODERS[name](TEXT)
    middle = len(data) // 2
    damaged = {'last byte missing': data[:-1], 'overwritten': data[:middle] + bytes(8) + data[middle + 8 :]}
    (folder / name).write_bytes(damaged.get(damage, b'no archive at all'))
    with pytest.raises(DataError, match=rf'^{re.escape(name)} is truncated or corrupt: .'):
        read_text(name, max_bytes)


def test_the_builtin_text_has_every_topic():
    text = read_text('builtin').decode()
    assert text.count('<page>\n') >= len(topics)
    assert all(topic.strip() in text for topic in topics.values())
    assert read_text('builtin', max_bytes=7) == text[:7].encode()


@pytest.mark.parametrize('name', ['enwik8', 'enwik8.gz', 'enwik8.zip'])
def test_auto_takes_the_file_that_is_there(folder, name):
    (folder / 'data').mkdir()
    (folder / 'data' / name).touch()
    assert find_text('auto') == str(Path('data', name))
    assert [find_text(named) for named in ('builtin', 'some/file.gz')] == ['builtin', 'some/file.gz']


def test_without_a_network_the_builtin_text_is_announced_in_one_line(folder, monkeypatch, capsys):
    assert find_text('auto') == 'builtin'
    out = capsys.readouterr().out
    assert out.count('\n') == 1
    assert 'no network' in out
    assert files(folder) == []

    answered = threading.Event()  # a name server that does not answer does not hold up
    monkeypatch.setattr(enwik8_text, 'TIMEOUT', 0.01)
    monkeypatch.setattr(enwik8_text, 'urlopen', lambda url, timeout: answered.wait(30))
    assert find_text('auto') == 'builtin'
    assert 'timed out' in capsys.readouterr().out
    answered.set()


@pytest.mark.parametrize(
    ('served', 'message'),
    [
        (zipped(TEXT), None),
        (zipped(TEXT)[:-5], 'is truncated or corrupt'),
        (b'<html>please log in</html>', 'is truncated or corrupt'),
        (zipped(TEXT + b'!'), 'does not have the checksum of enwik8'),
    ],
)
def test_a_download_is_whole_or_leaves_nothing_behind(folder, monkeypatch, tmp_path_factory, served, message):
    path = tmp_path_factory.mktemp('server') / 'enwik8.zip'
    path.write_bytes(served)
    monkeypatch.setattr(enwik8_text, 'URL', path.as_uri())
    monkeypatch.setattr(enwik8_text, 'SHA256', hashlib.sha256(TEXT).hexdigest())
    if message is None:
        assert read_text(find_text('auto')) == TEXT
        assert files(folder) == ['data', 'data/enwik8.zip']
    else:
        with pytest.raises(DataError, match=message):
            find_text('auto')
        assert files(folder) == []


# sequences


def split(kind: str, text: bytes = TEXT, max_len: int = 33, max_held_out: int = 1000) -> enwik8_sequences.Split:
    """Split with defaults for the tests."""
    return enwik8_sequences.split_text(text, kind, max_len, max_held_out)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('max_len', [30, 100, 400])
def test_the_held_out_sequences_share_no_line_with_training(kind, max_len):
    train, held_out = split(kind, max_len=max_len)
    assert train
    assert all(0 < len(sequence) <= max_len for sequence in [*train, *held_out])
    if kind == 'windows':  # a crop starts and ends inside lines
        seen = set(train.text.split(b'\n'))
        lines = {line for window in held_out for line in window.split(b'\n')[1:-1]}
    else:
        seen = {line for sequence in train for line in sequence.split(b'\n')}
        lines = {line for sequence in held_out for line in sequence.split(b'\n')}
    assert lines
    assert lines.isdisjoint(seen)
    capped = split(kind, max_len=max_len, max_held_out=3)
    assert capped.held_out == held_out[:3]
    assert list(capped.train) == list(train)


def test_lines_are_the_distinct_non_blank_lines():
    text = b'one\n\ntwo\n   \none\n\tlonger than it may be\nlonger\ntwo\nb\n' + b'\n'.join(b'%d' % i for i in range(40))
    train, held_out = split('lines', text, max_len=6)
    expected = {b'one', b'two', b'\tlonge', b'longer', b'b', *(b'%d' % i for i in range(40))}
    assert sorted([*train, *held_out]) == sorted(expected)  # each once
    assert len(held_out) == len(expected) // 20


def test_pages_are_the_pages():
    train, held_out = split('pages', max_len=10_000)
    assert (len(train), len(held_out)) == (190, 10)
    assert all(page.startswith(b'<page>\n') and page.endswith(b'</page>') and page in TEXT for page in train)
    assert all(page.startswith(b'  <title>') for page in held_out)


def test_windows_are_all_crops_of_one_length():
    train, held_out = split('windows')
    assert train.text == TEXT[: len(train.text)]
    assert train.text.endswith(b'\n')
    assert 0.9 < len(train.text) / len(TEXT) < 0.96
    assert train[5] == TEXT[5:38]
    assert {len(window) for window in [*train, *held_out]} == {33}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('text', [b'\n\n\n', b'a\nb\nc\n', b'<page>only one</page>'])
def test_too_little_text_is_refused(kind, text):
    with pytest.raises(DataError, match=f'^too little text: {len(text)} bytes hold no {kind} to (train on|hold out)'):
        split(kind, text)


def test_padded_and_packed_batches():
    padded = enwik8_sequences.to_batch([b'abc', b'\xff', b'de'])
    assert padded['x'].tolist() == [[97, 98, 99], [255, 0, 0], [100, 101, 0]]
    assert padded['lens'].tolist() == [3, 1, 2]
    assert padded['x'].dtype == padded['lens'].dtype == torch.int64
    packed = enwik8_sequences.to_batch([b'abc', b'\xff', b'de'], 'packed', row_len=4)
    assert packed['x'].tolist() == [[97, 98, 99, 255], [100, 101, 0, 0]]
    assert packed['segment_ids'].tolist() == [[1, 1, 1, 2], [3, 3, 0, 0]]
    for layout in ('padded', 'packed'):
        assert enwik8_sequences.to_batch([], layout, row_len=4)['x'].shape[0] == 0


# the report


class FixedLoss(nn.Module):
    """Stands for a model: the loss of a target is its token's id, in nats."""

    def forward(self, x, *, lens, return_outputs, return_breakdown):
        """Return a loss and the parts of its breakdown that are read."""
        counted = torch.arange(1, x.shape[1]) < lens[:, None]
        token_loss = torch.where(counted, x[:, 1:].float(), 0.0)
        return token_loss.sum(), SimpleNamespace(token_loss=token_loss, weight=counted * 0.25)


def test_bits_per_byte_by_hand():
    batches = [
        {'x': torch.tensor([[9, 1, 2, 0], [9, 9, 9, 9]]), 'lens': torch.tensor([3, 1])},  # 3 nats on 2 targets; none
        {'x': torch.tensor([[7, *[4] * 9]]), 'lens': torch.tensor([10])},  # 36 nats on 9 targets
    ]
    rows = report(enwik8_report.costs(FixedLoss(), batches))
    bit = math.log(2)
    expected = [
        ('2 to 7', 1, 2, 1.5 / bit, 1.5 / bit),
        ('8 to 31', 1, 9, 4 / bit, 4 / bit),
        ('all', 2, 11, 39 / 11 / bit, (1.5 + 4) / 2 / bit),
    ]
    for row, want in zip(rows, expected, strict=True):
        assert row[:3] == want[:3]
        assert row[3:5] == pytest.approx(want[3:], rel=1e-6)
        assert row.right is None


def write_run(run: Path, *steps: int, end: str = '') -> Path:
    """Write a run with a report after each of some steps."""
    run.mkdir(parents=True)
    rows = [row._asdict() for row in report([SequenceCost(n, n - 1, 2.0 * n) for n in (2, 5, 40)])]
    records = [json.dumps({'step': step, 'bits_per_byte': rows}) + '\n' for step in steps]
    (run / enwik8_report.METRICS).write_text(''.join(records) + end)
    return run


def test_the_report_of_unfinished_cut_and_same_named_runs(folder, capsys):
    runs = (write_run(folder / 'a' / 'run', 100, 200), write_run(folder / 'b' / 'run', 100, end='{"step": 101, "tr'))
    enwik8_report.main(runs, folder / 'new' / 'both.png')
    out = capsys.readouterr().out
    assert f'\n{runs[0]}, step 200\n' in out
    assert f'\n{runs[1]}, step 100\n' in out
    assert [line.split() for line in out.splitlines()].count(['all', '3', '44', '2.136', '2.850']) == 2
    assert (folder / 'new' / 'both.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('end', ['', '{"step": 1}\n', '{"bits_per_byte": [{"other": 1}]}\n', '3'])
def test_a_run_without_a_report_is_refused(folder, end):
    with pytest.raises(UsageError, match='holds no report'):
        enwik8_report.main((write_run(folder / 'run', end=end),), folder / 'a.png')


# the options


def test_presets_fill_in_what_is_left_out():
    tiny, base = (resolve(Config(depth=5), torch.device(device)) for device in ('cpu', 'cuda'))
    assert (tiny.preset, tiny.dim, tiny.depth, tiny.orthog_values) == ('tiny', 128, 5, False)
    assert (base.preset, base.dim, base.depth, base.seq_len, base.grad_accum) == ('base', 512, 5, 1024, 4)
    assert PRESETS['tiny'].keys() == PRESETS['base'].keys()


# the whole


def run(options: str = '', name: str = 'run') -> list[dict]:
    """Train for three steps; return the metrics."""
    train_enwik8.main([*TINY, '--name', name, '--data', 'builtin', *options.split()])
    return metrics(name)


def metrics(name: str) -> list[dict]:
    """Return the metrics of a run."""
    return [json.loads(line) for line in Path('runs', name, 'metrics.jsonl').read_text().splitlines()]


def losses(records: Sequence[dict]) -> list[float]:
    """Return the loss of each step."""
    return [record['train_loss'] for record in records if 'train_loss' in record]


@pytest.mark.parametrize('kind', KINDS)
def test_three_steps(folder, capsys, kind):
    (folder / 'text.gz').write_bytes(gzip.compress(TEXT))
    records, run_folder = run(f'--data text.gz --sequences {kind} --validate-every 2 --grad-accum 2'), Path('runs/run')
    assert files(run_folder)[-3:] == ['config.json', 'loss_by_length.png', 'metrics.jsonl']
    assert (run_folder / 'loss_by_length.png').read_bytes().startswith(b'\x89PNG')
    assert [record['step'] for record in records if 'train_loss' in record] == [1, 2, 3]
    assert [record['step'] for record in records if 'bits_per_byte' in record] == [2, 3]
    config = json.loads((run_folder / 'config.json').read_text())
    assert config['data'] == 'text.gz'
    assert Config(**config) == resolve(Config(**config), torch.device('cpu'))
    out = capsys.readouterr().out
    rows = [enwik8_report.Row(**row) for row in records[-1]['bits_per_byte']]
    assert enwik8_report.table(rows) in out
    assert 4 < rows[-1].over_tokens < 10  # 8 bits before training


@pytest.mark.slow
def test_the_seed_alone_sets_the_batches(monkeypatch):
    """Same sequences under every weighting; another seed, other sequences."""
    drawn: list[list[bytes]] = []
    draw = enwik8_sequences.draw
    monkeypatch.setattr(train_enwik8, 'draw', lambda *args: drawn.append(draw(*args)) or drawn[-1])
    options = ('', '', '--equal-loss-weight-batch', '--loss-weighting 0.5', '--seed 1')
    found = [losses(run(each)) for each in options]
    runs = [drawn[start : start + 3] for start in range(0, 15, 3)]
    assert runs[0] == runs[1] == runs[2] == runs[3] != runs[4]
    assert found[0] == found[1]
    assert all(found[0] != other for other in found[2:])


def test_a_step_is_the_same_in_one_micro_batch_or_four(monkeypatch):
    """The normalizer is that of the step, not of the micro-batch: sequences of very different lengths."""
    sequences = [b'ab', b'a longer sequence of bytes', b'abcdefg', b'x' * 30]
    monkeypatch.setattr(train_enwik8, 'draw', lambda *args: sequences)
    whole = run('--loss-weighting 0.7 --batch-size 4 --grad-accum 1')
    parts = run('--loss-weighting 0.7 --batch-size 1 --grad-accum 4')
    assert len(losses(whole)) == 3
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    bits = [records[-1]['bits_per_byte'][-1]['over_tokens'] for records in (whole, parts)]
    assert bits[1] == pytest.approx(bits[0], rel=1e-5)


def test_every_layout_trains_the_same():
    padded, packed, unpad = (
        losses(run(f'--equal-loss-weight-batch {layout}')) for layout in ('', '--layout packed', '--unpad')
    )
    assert len(padded) == 3
    assert packed == pytest.approx(padded, rel=1e-5)
    assert unpad == pytest.approx(padded, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('batch', ['--batch-size 6 --grad-accum 2', '--batch-size 1 --layout packed'])
def test_two_processes_train_like_one(folder, batch):
    """The same global batches; of a batch of one sequence, the second process gets none."""
    options = [*TINY, *batch.split(), *'--data builtin --steps 20 --held-out 4 --equal-loss-weight-batch'.split()]

    def trained(name: str, processes: int) -> list[float]:
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
        command += [train_enwik8.__file__, *options, '--name', name]
        environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr
        assert f' x {processes}\n' in done.stdout
        return losses(metrics(name))

    one, two = trained('one', 1), trained('two', 2)
    assert len(one) == 20
    assert two == pytest.approx(one, rel=1e-3)
