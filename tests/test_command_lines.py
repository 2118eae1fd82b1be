"""No command line of the examples ends in a traceback: one line, exit 2, and before anything is computed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import bench_loss
import bench_packing
import compare_weightings
import explain_weighting
import five_layouts
import pytest
import train_continuous
import train_copy
import train_enwik8
from command_line import one_line_errors, open_log, writable_folder
from enwik8.report import METRICS

EXAMPLES = Path(__file__).parents[1] / 'examples'
TINY = '--dim 16 --depth 1 --heads 2 --seq-len 16 --batch-size 2 --held-out 4'.split()

pytestmark = pytest.mark.usefixtures('folder')


def refusal(capsys, main, options: str) -> str:
    """Return the one line with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        main(options.split())
    assert stop.value.code == 2
    lines = capsys.readouterr().err.replace('\r', '\n').splitlines()
    assert not any('Traceback' in line for line in lines)
    assert lines[-1].startswith(Path(sys.modules[main.__module__].__file__).name + ': ')
    return lines[-1]


@pytest.mark.parametrize(
    ('main', 'options', 'message'),
    [
        (train_enwik8.main, '--name ..', '--name must be the name of one folder in runs/'),
        (train_enwik8.main, '--name a/b', '--name must be the name of one folder in runs/'),
        (train_enwik8.main, '--name ' + 'é' * 101, '--name must be at most 200 bytes long'),
        (train_enwik8.main, '--steps 0', '--steps must be at least 1, got 0'),
        (train_enwik8.main, '--seed -1', '--seed must be at least 0, got -1'),
        (train_enwik8.main, f'--seed {2**63}', '--seed must be at least 0 and below 2^63'),
        (train_enwik8.main, '--learning-rate nan', '--learning-rate must be above 0, got nan'),
        (train_enwik8.main, '--learning-rate inf', '--learning-rate must be above 0 and below 2^63'),
        (train_enwik8.main, '--loss-weighting nan', 'loss_weighting'),
        (train_enwik8.main, '--equal-loss-weight-batch --loss-weighting token', 'equal_loss_weight_batch'),
        (train_enwik8.main, '--preset tiny --heads 1', '--heads 1 goes with --dim 64'),
        (train_enwik8.main, '--data missing.gz', 'cannot read missing.gz'),
        (train_enwik8.main, '--generate-from runs/none --prompt a', 'cannot read runs/none/config.json'),
        (train_enwik8.main, '--prompt a', '--generate-from'),
        (train_continuous.main, '--heads 3', '--dim must be a multiple of --heads, got 64 and 3'),
        (train_continuous.main, '--noise -0.1', '--noise must be at least 0'),
        (train_copy.main, '--measure-after 0', '--measure-after must be at least 1'),
        (five_layouts.main, '--sequences 7', '--sequences must be at least 8'),
        (bench_loss.main, '--uncounted 1', '--uncounted must be in [0, 1)'),
        (bench_packing.main, '--vocab 255', '--vocab must be at least 256'),
        (compare_weightings.main, '--learning-rates 1e-3 0', '--learning-rates must be above 0'),
        (compare_weightings.main, '--learning-rates 1e-3 --tuning-seeds 1 2', '--tuning-seeds must be others'),
        (compare_weightings.main, '--seeds 1 1', '--seeds must differ from one another'),
        (compare_weightings.main, '--data builtin --task mixed', 'too few lines like [[de:Titel]]'),
        (explain_weighting.main, '--lens', '--lens wants at least one value'),
        (explain_weighting.main, '--file missing.txt', 'cannot read missing.txt'),
    ],
)
def test_options_that_are_no_good(folder, capsys, main, options, message):
    assert message in refusal(capsys, main, options)
    assert not [path for path in folder.rglob('*') if path.is_file()]


@pytest.mark.parametrize(
    ('main', 'options', 'content', 'message'),
    [
        (train_enwik8.main, '--data a.gz', '\x1f\x8b no more', 'a.gz is truncated or corrupt'),
        (train_enwik8.main, '--config a.yaml', 'stesp: 3', "a.yaml: there is no option 'stesp'"),
        (train_enwik8.main, '--config a.yaml', 'steps: three', "steps must be int or null, got 'three'"),
        (train_enwik8.main, '--config a.yaml', '- steps', 'a.yaml must hold options by name'),
        (train_enwik8.main, '--config a.yaml', 'steps: [', 'a.yaml: while parsing '),
        (explain_weighting.main, '--file a.jsonl', '\n\n', 'no sequence has a target'),
        (explain_weighting.main, '--file a.jsonl', '{"prompt": "a"}', 'a.jsonl, line 1: --answer answer'),
        (explain_weighting.main, '--file a.jsonl', '\n{"prompt": 3', 'a.jsonl, line 2: '),
        (explain_weighting.main, '--file a.jsonl', '{"prompt": "a", "answer": 4}', 'answer must be a string or a list'),
    ],
)
def test_files_that_are_no_good(folder, capsys, main, options, content, message):
    path = folder / options.split()[1]
    path.write_bytes(content.encode('latin1'))
    assert message in refusal(capsys, main, options)
    assert list(folder.iterdir()) == [path]


def test_a_folder_that_cannot_be_written(folder, capsys):
    (folder / 'runs').touch()
    assert 'cannot write to runs/' in refusal(capsys, train_enwik8.main, '--data builtin --preset tiny')


@pytest.mark.parametrize(
    ('error', 'status', 'line'),
    [(KeyboardInterrupt(), 130, '\na.py: interrupted\n'), (OSError(28, 'full', 'b'), 2, 'a.py: b: full\n')],
)
def test_what_comes_later_is_one_line_too(capsys, error, status, line):
    """Ctrl-C, or a disk that is full."""
    with pytest.raises(SystemExit) as stop, one_line_errors('a.py'):
        raise error
    assert stop.value.code == status
    assert capsys.readouterr().err == line


def test_a_log_has_one_writer(folder, capsys):
    pytest.importorskip('fcntl')
    with open_log(writable_folder(folder / 'runs' / 'a') / METRICS) as log:
        print('mine', file=log, flush=True)
        line = refusal(capsys, train_enwik8.main, '--data builtin --preset tiny --name a')
        assert 'runs/a is being written by another run' in line
        assert Path('runs/a', METRICS).read_text() == 'mine\n'
    open_log(Path('runs/a', METRICS)).close()  # it is free again


@pytest.mark.parametrize(
    ('main', 'options', 'step'),
    [
        (train_enwik8.main, '--steps 3', 2),
        (train_enwik8.main, '--steps 1', 1),  # met in the validation
        (compare_weightings.main, '--steps 9 --weightings token --seeds 0', 2),
    ],
)
def test_a_loss_that_is_not_finite(capsys, main, options, step):
    line = refusal(capsys, main, ' '.join([*TINY, '--data builtin --learning-rate 1e18', options]))
    assert f'the loss is not finite at step {step}' in line


SCRIPTS = sorted(path for path in EXAMPLES.rglob('*.py') if 'import tyro' in path.read_text())
ENVIRONMENT = {**os.environ, 'PYTHONPATH': str(EXAMPLES.parent)}


@pytest.mark.slow
@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.stem)
def test_scripts_run_from_any_folder(script):
    """As a stranger calls them, by a path, with nothing else to find their parts by; none begins with a warning."""
    command = [sys.executable, script, '--help']
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert 'usage: ' in done.stdout
    assert done.stderr == ''


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


@pytest.mark.parametrize('script', [*SCRIPTS, EXAMPLES / 'benchmarks' / 'bench_peers.py'], ids=lambda path: path.stem)
def test_a_missing_package_is_one_line(script):
    code = (
        'import runpy, sys\n'
        'sys.modules.update(dict.fromkeys(sys.argv[2:]))\n'  # nothing finds what is None there
        'sys.argv = sys.argv[1:2]\n'
        'sys.path.insert(0, sys.argv[0].rpartition("/")[0])\n'
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, '-c', code, str(script), 'tyro', 'matplotlib', 'accelerate']
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.stderr.startswith(f'{script.name}: not installed: accelerate, matplotlib, tyro; pip install')
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)
