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
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train_enwik8
from enwik8 import report as enwik8_report
from enwik8 import sequences as enwik8_sequences
from enwik8 import text as enwik8_text
from enwik8.config import PRESETS, Config, resolve
from enwik8.text import DataError, find_text, read_text
from torch import nn

ARTICLE = '<page>\n  <title>{0}</title>\n  <text>Of {0} it is said:\n\n{1}\n* {0} too\n</text>\n</page>\n'
TEXT = ''.join(ARTICLE.format(f'number {i}', 'so ' * (i * 7 % 60)) for i in range(200)).encode()
MODEL = '--preset tiny --dim 32 --depth 1 --heads 2'.split()
TINY = [*MODEL, *'--seq-len 32 --batch-size 4 --steps 3 --held-out 8 --generate-length 4'.split()]


@pytest.fixture(autouse=True)
def no_network(folder, monkeypatch):
    """The text cannot be downloaded."""
    monkeypatch.setattr(enwik8_text, 'URL', 'http://127.0.0.1:9/enwik8.zip')  # nothing listens there


def zipped(text: bytes, name: str = 'enwik8') -> bytes:
    """Return a zip of one file."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, text)
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


@pytest.mark.parametrize('name', ['text.gz', 'text.zip'])
@pytest.mark.parametrize(
    'damage',
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[: len(data) // 2] + bytes(8) + data[len(data) // 2 + 8 :],
        lambda data: b'no archive at all',
        lambda data: b'',
    ],
    ids=['last byte missing', 'half missing', 'overwritten', 'other format', 'empty'],
)
@pytest.mark.parametrize('max_bytes', [None, 10])
def test_damaged_archives_are_refused(folder, name, damage, max_bytes):
    (folder / name).write_bytes(damage(ENCODERS[name](TEXT)))
    with pytest.raises(DataError, match=rf'^{re.escape(name)} is (truncated or corrupt: .+|empty)$'):
        read_text(name, max_bytes)


def test_the_builtin_text_has_every_topic():
    from pydoc_data.topics import topics

    text = read_text('builtin').decode()
    assert len(text) > 100_000
    assert text.count('<page>\n') >= len(topics)
    assert all(topic.strip() in text for topic in topics.values())
    assert read_text('builtin', max_bytes=7) == text[:7].encode()


# where it is looked for


@pytest.mark.parametrize('name', ['enwik8', 'enwik8.gz', 'enwik8.zip'])
def test_auto_takes_the_file_that_is_there(folder, name):
    (folder / 'data').mkdir()
    (folder / 'data' / name).touch()
    assert find_text('auto') == str(Path('data', name))


def test_without_a_network_the_builtin_text_is_announced_in_one_line(folder, capsys):
    assert find_text('auto') == 'builtin'
    out = capsys.readouterr().out
    assert out.count('\n') == 1
    assert 'no network' in out
    assert files(folder) == []


def serve(monkeypatch, path: Path, content: bytes, sha256: str) -> None:
    """Let the download come from a local file."""
    path.write_bytes(content)
    monkeypatch.setattr(enwik8_text, 'URL', path.as_uri())
    monkeypatch.setattr(enwik8_text, 'SHA256', sha256)


def test_download(folder, monkeypatch, tmp_path_factory):
    served = zipped(TEXT)
    serve(monkeypatch, tmp_path_factory.mktemp('server') / 'enwik8.zip', served, hashlib.sha256(TEXT).hexdigest())
    source = find_text('auto')
    assert files(folder) == ['data', 'data/enwik8.zip']
    assert Path(source).read_bytes() == served
    assert read_text(source) == TEXT


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (zipped(TEXT)[:-5], 'is truncated or corrupt'),
        (b'<html>please log in</html>', 'is truncated or corrupt'),
        (b'', 'is truncated or corrupt'),
        (zipped(TEXT + b'!'), 'does not have the checksum of enwik8'),
    ],
)
def test_a_bad_download_leaves_nothing_behind(folder, monkeypatch, tmp_path_factory, capsys, content, message):
    path = tmp_path_factory.mktemp('server') / 'enwik8.zip'
    serve(monkeypatch, path, content, hashlib.sha256(TEXT).hexdigest())
    with pytest.raises(SystemExit) as stop:
        train_enwik8.main(TINY)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert files(folder) == []


# sequences


def split(kind: str, text: bytes = TEXT, max_len: int = 33, max_held_out: int = 1000) -> enwik8_sequences.Split:
    """Split with defaults for the tests."""
    return enwik8_sequences.split_text(text, kind, max_len, max_held_out)


@pytest.mark.parametrize('kind', ['lines', 'pages', 'windows'])
@pytest.mark.parametrize('max_len', [30, 100, 400])
def test_the_held_out_sequences_share_no_line_with_training(kind, max_len):
    train, held_out = split(kind, max_len=max_len)
    assert train
    assert held_out
    assert all(0 < len(sequence) <= max_len for sequence in [*train, *held_out])
    if kind == 'windows':  # a crop starts and ends inside lines
        seen = set(train.text.split(b'\n'))
        lines = {line for window in held_out for line in window.split(b'\n')[1:-1]}
    else:
        seen = {line for sequence in train for line in sequence.split(b'\n')}
        lines = {line for sequence in held_out for line in sequence.split(b'\n')}
    assert lines.isdisjoint(seen)
    assert lines


def test_lines_are_the_distinct_non_blank_lines():
    text = b'one\n\ntwo\n   \none\n\tlonger than it may be\nlonger\ntwo\nb\n' + b'\n'.join(b'%d' % i for i in range(40))
    train, held_out = split('lines', text, max_len=6)
    expected = {b'one', b'two', b'\tlonge', b'longer', b'b', *(b'%d' % i for i in range(40))}
    assert sorted([*train, *held_out]) == sorted(expected)  # each once
    assert len(held_out) == len(expected) // 20


def test_pages_are_the_pages():
    train, held_out = split('pages', max_len=10_000)
    assert len(train) == 190
    assert len(held_out) == 10
    assert all(page.startswith(b'<page>\n') and page.endswith(b'</page>') and page in TEXT for page in train)
    assert all(page.startswith(b'  <title>') for page in held_out)


def test_windows_are_all_crops_of_one_length():
    train, held_out = split('windows')
    assert train.text == TEXT[: len(train.text)]
    assert train.text.endswith(b'\n')
    assert 0.9 < len(train.text) / len(TEXT) < 0.96
    assert {len(train[i]) for i in range(len(train))} == {33}
    assert train[5] == TEXT[5:38]
    assert {len(window) for window in held_out} == {33}
    with pytest.raises(IndexError):
        train[len(train)]


@pytest.mark.parametrize('kind', ['lines', 'pages', 'windows'])
def test_the_number_held_out_is_capped(kind):
    whole, capped = split(kind), split(kind, max_held_out=3)
    assert capped.held_out == whole.held_out[:3]
    assert list(capped.train) == list(whole.train)


@pytest.mark.parametrize('kind', ['lines', 'pages', 'windows'])
@pytest.mark.parametrize('text', [b'a', b'one line', b'\n\n\n', b'a\nb\nc\n', b'<page>only one</page>'])
def test_too_little_text_is_refused(kind, text):
    with pytest.raises(DataError, match=f'^too little text: {len(text)} bytes hold no {kind} to (train on|hold out)'):
        split(kind, text)


def test_padded_batches():
    batch = enwik8_sequences.to_batch([b'abc', b'\xff', b'de'])
    assert batch['x'].tolist() == [[97, 98, 99], [255, 0, 0], [100, 101, 0]]
    assert batch['lens'].tolist() == [3, 1, 2]
    assert batch['x'].dtype == batch['lens'].dtype == torch.int64


def test_packed_batches():
    batch = enwik8_sequences.to_batch([b'abc', b'\xff', b'de'], 'packed', row_len=4)
    assert batch['x'].tolist() == [[97, 98, 99, 255], [100, 101, 0, 0]]
    assert batch['segment_ids'].tolist() == [[1, 1, 1, 2], [3, 3, 0, 0]]


def test_batch_of_no_sequences():
    assert enwik8_sequences.to_batch([])['x'].shape[0] == 0
    assert enwik8_sequences.to_batch([], 'packed', row_len=4)['x'].shape[0] == 0


def test_draws_follow_the_generator():
    def drawn(seed: int) -> list[bytes]:
        return enwik8_sequences.draw(split('lines').train, 20, torch.Generator().manual_seed(seed))

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(drawn(0))) > 10


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
    rows = enwik8_report.report(enwik8_report.costs(FixedLoss(), batches))
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


def test_table_and_comparison(folder, capsys):
    rows = enwik8_report.report([enwik8_report.SequenceCost(n, n - 1, 2.0 * n) for n in (2, 5, 40)])
    text = enwik8_report.table(rows).splitlines()
    assert text[-1].split() == ['all', '3', '44', '2.136', '2.850']
    assert len({len(line) for line in text}) == 1  # aligned
    for name in ('a', 'b'):
        (folder / name).mkdir()
        records = [{'step': 1, 'train_loss': 1.0}, {'bits_per_byte': []}]
        records.append({'bits_per_byte': [row._asdict() for row in rows]})
        (folder / name / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, records)))
    enwik8_report.main((folder / 'a', folder / 'b'), folder / 'both.png')
    assert capsys.readouterr().out.count(text[-1]) == 2
    assert (folder / 'both.png').read_bytes().startswith(b'\x89PNG')


# the options


def test_presets_fill_in_what_is_left_out():
    tiny, base = (resolve(Config(depth=5), torch.device(device)) for device in ('cpu', 'cuda'))
    assert (tiny.preset, tiny.dim, tiny.depth, tiny.orthog_values) == ('tiny', 128, 5, False)
    assert (base.preset, base.dim, base.depth, base.heads, base.seq_len) == ('base', 512, 5, 8, 1024)
    assert (base.batch_size, base.grad_accum, base.learning_rate) == (4, 4, 1e-4)
    assert resolve(Config(preset='base'), torch.device('cpu')).depth == 6
    assert PRESETS['tiny'].keys() == PRESETS['base'].keys()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--data', 'missing.gz'], 'cannot read missing.gz: No such file or directory'),
        (['--data', 'bad.gz'], 'bad.gz is truncated or corrupt: '),
        (['--data', 'builtin', '--equal-loss-weight-batch', '--loss-weighting', 'token'], 'equal_loss_weight_batch'),
    ],
)
def test_what_is_no_good_is_one_line_and_exit_2(folder, capsys, options, message):
    (folder / 'bad.gz').write_bytes(gzip.compress(TEXT)[:-3])
    with pytest.raises(SystemExit) as stop:
        train_enwik8.main([*TINY, *options])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1
    assert err.startswith('train_enwik8.py: ')
    assert message in err
    assert files(folder) == ['bad.gz']


# the whole


def run(*options: str) -> tuple[list[dict], Path]:
    """Train for three steps; return the metrics and the run's folder."""
    train_enwik8.main([*TINY, '--name', 'run', *options])
    folder = Path('runs', 'run')
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()], folder


@pytest.mark.parametrize('kind', ['lines', 'pages', 'windows'])
def test_three_steps(folder, capsys, kind):
    (folder / 'text.gz').write_bytes(gzip.compress(TEXT))
    records, run_folder = run('--data', 'text.gz', '--sequences', kind, '--validate-every', '2', '--grad-accum', '2')
    assert sorted(path.name for path in run_folder.iterdir()) == [
        'checkpoint-3', 'config.json', 'loss_by_length.png', 'metrics.jsonl'
    ]  # fmt: skip
    assert (run_folder / 'loss_by_length.png').read_bytes().startswith(b'\x89PNG')
    assert [record['step'] for record in records if 'train_loss' in record] == [1, 2, 3]
    assert [record['step'] for record in records if 'bits_per_byte' in record] == [2, 3]
    config = json.loads((run_folder / 'config.json').read_text())
    assert config['data'] == 'text.gz'
    assert Config(**config) == resolve(Config(**config), torch.device('cpu'))

    out = capsys.readouterr().out
    assert 'preset tiny' in out
    assert out.count(' >>> ') == 3
    rows = [enwik8_report.Row(**row) for row in records[-1]['bits_per_byte']]
    assert enwik8_report.table(rows) in out
    assert 4 < rows[-1].over_tokens < 10  # 8 bits before training


@pytest.mark.slow
def test_the_seed_alone_sets_the_batches(monkeypatch):
    """Same sequences under every weighting; another seed, other sequences."""
    drawn: list[list[bytes]] = []
    draw = enwik8_sequences.draw
    monkeypatch.setattr(train_enwik8, 'draw', lambda *args: drawn.append(draw(*args)) or drawn[-1])
    losses = [
        [record['train_loss'] for record in run('--data', 'builtin', *options.split())[0] if 'train_loss' in record]
        for options in ('', '', '--equal-loss-weight-batch', '--loss-weighting 0.5', '--seed 1')
    ]
    runs = [drawn[start : start + 3] for start in range(0, 15, 3)]
    assert runs[0] == runs[1] == runs[2] == runs[3] != runs[4]
    assert losses[0] == losses[1]
    assert all(losses[0] != other for other in losses[2:])


def test_a_step_is_the_same_in_one_micro_batch_or_four(monkeypatch):
    """The normalizer is that of the step, not of the micro-batch: sequences of very different lengths."""
    sequences = [b'ab', b'a longer sequence of bytes', b'abcdefg', b'x' * 30]
    monkeypatch.setattr(train_enwik8, 'draw', lambda *args: sequences)
    common = ('--data', 'builtin', '--loss-weighting', '0.7')
    whole, _ = run(*common, '--batch-size', '4', '--grad-accum', '1')
    split, _ = run(*common, '--batch-size', '1', '--grad-accum', '4')
    for one, other in zip(whole, split, strict=True):
        assert one.keys() == other.keys()
        if 'train_loss' in one:
            assert one['train_loss'] == pytest.approx(other['train_loss'], rel=1e-5)
    assert whole[-1]['bits_per_byte'][-1]['over_tokens'] == pytest.approx(
        split[-1]['bits_per_byte'][-1]['over_tokens'], rel=1e-5
    )


@pytest.mark.parametrize('layout', [['--layout', 'packed'], ['--unpad']])
def test_packed_rows_train_the_same(layout):
    padded, _ = run('--data', 'builtin', '--equal-loss-weight-batch')
    packed, _ = run('--data', 'builtin', '--equal-loss-weight-batch', *layout)
    for one, other in zip(padded, packed, strict=True):
        assert one.get('train_loss', 0.0) == pytest.approx(other.get('train_loss', 0.0), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('batch', ['--batch-size 6 --grad-accum 2', '--batch-size 1 --layout packed'])
def test_two_processes_train_like_one(folder, batch):
    """The same global batches; of a batch of one sequence, the second process gets none."""
    options = [*TINY, *batch.split(), *'--data builtin --steps 20 --held-out 4 --equal-loss-weight-batch'.split()]
    script = train_enwik8.__file__
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}

    def losses(name: str, processes: int) -> list[float]:
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
        done = subprocess.run(
            [*command, script, *options, '--name', name],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert f' x {processes}\n' in done.stdout
        lines = Path('runs', name, 'metrics.jsonl').read_text().splitlines()
        return [record['train_loss'] for record in map(json.loads, lines) if 'train_loss' in record]

    one, two = losses('one', 1), losses('two', 2)
    assert len(one) == 20
    assert two == pytest.approx(one, rel=1e-3)
