"""No command line of the examples ends in a traceback: one line, exit 2, and before anything is computed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import bench_loss
import bench_packing
import five_layouts
import pytest
import train_continuous
import train_copy
import train_enwik8
from command_line import UsageError, check_name, judge, one_line_errors, open_log, writable_folder
from enwik8 import report

EXAMPLES = Path(__file__).parents[1] / 'examples'
TINY = (
    '--data builtin --dim 32 --depth 1 --heads 2 --seq-len 32 --batch-size 4 --held-out 8 --generate-length 4'.split()
)
ROW = report.Row('2 to 7', 1, 2, 3.0, 3.0)

pytestmark = pytest.mark.usefixtures('folder')


def refusal(capsys, main, *args) -> str:
    """Return the one line with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        main(*args)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.replace('\r', '\n').splitlines()
    assert not any('Traceback' in line for line in lines)
    return lines[-1]


# what all share


@dataclass
class Options:
    """Some of each kind."""

    steps: int = 1
    seed: int = 0
    learning_rate: float = 0.1
    noise: float = 0.0
    lines: tuple[int, ...] = (1, 2)
    loss_weighting: float | None = 0.0
    flag: bool = False
    name: str | None = None


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'steps': 0}, '--steps must be at least 1, got 0'),
        ({'seed': -1}, '--seed must be at least 0, got -1'),
        ({'seed': 2**63}, f'--seed must be at least 0 and below 2^63, got {2**63}'),
        ({'learning_rate': float('nan')}, '--learning-rate must be above 0, got nan'),
        ({'learning_rate': float('inf')}, '--learning-rate must be above 0 and below 2^63, got inf'),
        ({'learning_rate': 0.0}, '--learning-rate must be above 0, got 0.0'),
        ({'noise': -0.1}, '--noise must be at least 0, got -0.1'),
        ({'lines': (3, 0)}, '--lines must be at least 1, got 0'),
        ({'lines': ()}, '--lines wants at least one value'),
        ({'name': '..'}, "--name must be the name of one folder in runs/, got '..'"),
    ],
)
def test_numbers_and_names_are_judged(options, message):
    judge(Options())
    with pytest.raises(UsageError) as error:
        judge(Options(**options))
    assert str(error.value) == message


@pytest.mark.parametrize('name', ['', '.', '..', 'a/b', '/a', 'a\\b', 'a\nb', 'é' * 101])
def test_a_name_is_that_of_one_folder(name):
    with pytest.raises(UsageError, match=r'^--name must be '):
        check_name(name)
    check_name('...')
    check_name('$x^2$ {é}')


def test_a_folder_that_cannot_be_written(folder, capsys):
    (folder / 'runs').touch()
    with pytest.raises(UsageError, match=r'^cannot write to runs.a: '):
        writable_folder(Path('runs', 'a'))
    assert 'cannot write to runs/' in refusal(capsys, train_enwik8.main, [*TINY, '--steps', '1'])


def test_ctrl_c_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop, one_line_errors('a.py'):
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capsys.readouterr().err == '\na.py: interrupted\n'


def test_a_log_has_one_writer(folder, capsys):
    pytest.importorskip('fcntl')
    with open_log(writable_folder(folder / 'runs' / 'a') / report.METRICS) as log:
        print('mine', file=log, flush=True)
        line = refusal(capsys, train_enwik8.main, [*TINY, '--steps', '1', '--name', 'a'])
        assert line == 'train_enwik8.py: runs/a is being written by another run: choose another --name'
        assert Path('runs/a', report.METRICS).read_text() == 'mine\n'
    open_log(Path('runs/a', report.METRICS)).close()  # it is free again


# each script


@pytest.mark.parametrize(
    ('main', 'options', 'message'),
    [
        (train_enwik8.main, '--name ..', "--name must be the name of one folder in runs/, got '..'"),
        (train_enwik8.main, '--steps -1', '--steps must be at least 1, got -1'),
        (train_enwik8.main, '--loss-weighting nan', 'loss_weighting must be in [0, 1]'),
        (train_continuous.main, '--steps 0', '--steps must be at least 1, got 0'),
        (train_continuous.main, '--heads 3', '--dim must be a multiple of --heads, got 64 and 3'),
        (train_continuous.main, '--loss-weighting 2', 'loss_weighting must be in [0, 1]'),
        (train_copy.main, '--measure-after 0', '--measure-after must be at least 1, got 0'),
        (train_copy.main, '--heads 3', '--dim must be a multiple of --heads, got 64 and 3'),
        (five_layouts.main, '--sequences 7', '--sequences must be at least 8, got 7'),
        (five_layouts.main, '--seed -1', '--seed must be at least 0, got -1'),
        (five_layouts.main, '--max-len 1', '--max-len must be at least 2, got 1'),
        (five_layouts.main, '--loss-weighting 1.5', 'loss_weighting must be in [0, 1]'),
        (bench_loss.main, '--uncounted 1', '--uncounted must be in [0, 1), got 1.0'),
        (bench_loss.main, '--uncounted -0.1', '--uncounted must be at least 0, got -0.1'),
        (bench_loss.main, '--vocab 0', '--vocab must be at least 1, got 0'),
        (bench_loss.main, '--seconds nan', '--seconds must be at least 0, got nan'),
        (bench_loss.main, '--tokens 1', '--tokens must be at least 2: one predicts nothing, got 1'),
        (bench_packing.main, '--max-len 0', '--max-len must be at least 1, got 0'),
        (bench_packing.main, '--vocab 255', '--vocab must be at least 256: there are so many bytes, got 255'),
    ],
)
def test_what_is_no_good_is_one_line(folder, capsys, monkeypatch, main, options, message):
    script = Path(sys.modules[main.__module__].__file__).name
    line = refusal(capsys, main, options.split())
    assert line.startswith(f'{script}: ')
    assert message in line
    assert [path.name for path in folder.rglob('*') if path.is_file()] == []


@pytest.mark.parametrize(
    ('options', 'step'),
    [('--steps 3', 2), ('--steps 3 --validate-every 1', 1), ('--steps 1', 1), ('--steps 2 --generate-every 1', 1)],
)
def test_a_loss_that_is_not_finite_is_one_line(capsys, options, step):
    line = refusal(capsys, train_enwik8.main, [*TINY, '--learning-rate', '1e18', *options.split()])
    assert line == f'train_enwik8.py: the loss is not finite at step {step}: --learning-rate may be too large'


SCRIPTS = sorted(path for path in EXAMPLES.rglob('*.py') if 'import tyro' in path.read_text())
ENVIRONMENT = {**os.environ, 'PYTHONPATH': str(EXAMPLES.parent)}


@pytest.mark.slow
def test_scripts_run_from_any_folder(folder):
    """As a stranger calls them, by a path, with nothing else to find their parts by; none begins with a warning."""
    assert len(SCRIPTS) >= 7
    for script in SCRIPTS:
        command = [sys.executable, script, '--help']
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert 'usage: ' in done.stdout, script
        assert done.stderr == '', script
        assert done.returncode == 0, script


@pytest.mark.parametrize('script', [*SCRIPTS, EXAMPLES / 'benchmarks' / 'bench_peers.py'], ids=lambda path: path.stem)
def test_a_missing_package_is_one_line(folder, script):
    code = (
        'import runpy, sys\n'
        'sys.modules.update(dict.fromkeys(sys.argv[2:]))\n'  # nothing finds what is None there
        'sys.argv = sys.argv[1:2]\n'
        'sys.path.insert(0, sys.argv[0].rpartition("/")[0])\n'
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, '-c', code, str(script), 'tyro', 'matplotlib', 'accelerate', 'rich', 'tqdm']
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    advice = 'pip install -e ".[examples]" brings what the examples need'
    assert done.stderr == f'{script.name}: not installed: accelerate, matplotlib, rich, tqdm, tyro; {advice}\n'
    assert done.returncode == 2
    assert done.stdout == ''


def test_the_deprecation_of_torch_jit_script_is_not_shown():
    """x-transformers decorates with it when it is imported, and a new torch says so in a FutureWarning."""
    code = (
        'import warnings\n'
        'import command_line\n'
        "warnings.warn('`torch.jit.script` is deprecated. Please switch', FutureWarning)\n"
        "warnings.warn('`torch.jit.script` is not supported in Python 3.14+', FutureWarning)\n"
        "warnings.warn('another', FutureWarning)"
    )
    environment = {**ENVIRONMENT, 'PYTHONPATH': os.pathsep.join((str(EXAMPLES.parent), str(EXAMPLES)))}
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True)
    assert 'torch.jit.script' not in done.stderr
    assert 'another' in done.stderr


# the report of runs


def write_run(folder: Path, *steps: int, end: str = '') -> Path:
    """Write a run with a report after each of some steps."""
    folder.mkdir(parents=True)
    records = [
        {'step': step, 'bits_per_byte': [(ROW._replace(lengths=name))._asdict() for name in ('2 to 7', 'all')]}
        for step in steps
    ]
    (folder / report.METRICS).write_text(''.join(json.dumps(record) + '\n' for record in records) + end)
    return folder


def test_unfinished_cut_and_same_named_runs_are_all_there(folder, capsys):
    runs = (write_run(folder / 'a' / 'run', 100, 200), write_run(folder / 'b' / 'run', 100, end='{"step": 101, "tr'))
    report.main(runs, folder / 'new' / 'both.png')
    out = capsys.readouterr().out
    assert f'\n{runs[0]}, step 200\n' in out
    assert f'\n{runs[1]}, step 100\n' in out
    assert (folder / 'new' / 'both.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
    'metrics', ['', '{"step": 1, "train_loss": 2.0}\n', '{"bits_per_byte": [{"other": 1}]}\n', 'no JSON\n', '3\n']
)
def test_a_run_without_a_report_is_refused(folder, metrics):
    write_run(folder / 'run', end=metrics)
    with pytest.raises(UsageError, match='holds no report: the run stopped before its first validation'):
        report.main((folder / 'run',), folder / 'a.png')
    assert not (folder / 'a.png').exists()


def test_the_last_bucket_ends_where_sequences_were_cut():
    costs = [report.SequenceCost(length, length - 1, 8.0) for length in (5, 130, 257)]
    assert [row.lengths for row in report.report(costs, longest=257)] == ['2 to 7', '128 to 257', 'all']
    assert [row.lengths for row in report.report(costs[1:], longest=512)] == ['128 to 511', 'all']
