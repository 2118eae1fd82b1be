"""A run that is stopped, in whatever way, goes on and ends as one that was not; its options come from a file too."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train_enwik8
import tyro
from command_line import UsageError
from enwik8 import checkpoints, config, schedule, signals
from enwik8.config import Config
from enwik8.config_file import load_config
from safetensors.torch import load_file

ARGS = (
    '--data builtin --max-bytes 20000 --preset tiny --dim 16 --depth 1 --heads 2 --seq-len 16 --batch-size 2 '
    '--held-out 4 --steps 6 --validate-every 2 --generate-every 4 --generate-length 2 --name run'
).split()
TINY = tyro.cli(Config, args=ARGS)
RUN = Path('runs', 'run')

pytestmark = pytest.mark.usefixtures('folder')


def train(**options) -> None:
    """Train without a word."""
    train_enwik8.train(replace(TINY, **options), on_step=lambda _: None)


def state(run: Path) -> tuple[list[dict], dict[str, torch.Tensor], dict]:
    """Return all that a run ends with: its metrics but for the times, its weights, its place in every stream."""
    lines, times = (run / 'metrics.jsonl').read_text().splitlines(), ('tokens_per_second', 'seconds')
    metrics = [{name: v for name, v in json.loads(line).items() if name not in times} for line in lines]
    checkpoint = checkpoints.last_checkpoint(run)
    progress = torch.load(checkpoint / 'custom_checkpoint_0.pkl', weights_only=False)
    return metrics, load_file(checkpoint / 'model.safetensors'), progress


def assert_same(run: Path, other: Path) -> None:
    """Check that two runs ended alike, to the bit."""
    for found, expected in zip(state(run), state(other), strict=True):
        if isinstance(found, list):
            assert found == expected
        else:
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def names(run: Path = RUN) -> list[str]:
    """Return what lies in the folder of a run."""
    return sorted(path.name for path in run.iterdir())


# killed


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='processes do not fork here')
def test_a_killed_run_ends_as_one_that_was_not(folder):
    """At random moments; at each change of the disk, in the middle of a save too; by a second signal."""
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1]), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, str(Path(__file__).with_name('killer.py'))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    kills = int(done.stdout.partition('kills: ')[2].split()[0])
    assert kills >= 15  # a save alone changes the disk so often
    for name in ('random', 'operations'):
        assert_same(Path('runs', name), Path('runs', 'whole'))
        assert names(Path('runs', name)) == ['checkpoint-24', 'config.json', 'loss_by_length.png', 'metrics.jsonl']
    assert checkpoints.last_checkpoint(Path('runs', 'twice')) is None


# asked to stop


@pytest.mark.slow
@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on(monkeypatch, capsys, signum):
    train_enwik8.main([*ARGS, '--name', 'whole'])
    draw, handlers, drawn = train_enwik8.draw, [signal.getsignal(each) for each in signals.SIGNALS], []

    def interrupted(*args):
        drawn.append(0)
        if len(drawn) == 3:
            signal.raise_signal(signum)
        return draw(*args)

    monkeypatch.setattr(train_enwik8, 'draw', interrupted)
    with pytest.raises(SystemExit) as stop:
        train_enwik8.main(ARGS)
    assert stop.value.code == 128 + signum
    assert 'stopped after step 3: --resume goes on from runs/run' in capsys.readouterr().err.splitlines()[-1]
    assert [signal.getsignal(each) for each in signals.SIGNALS] == handlers
    assert names() == ['checkpoint-3', 'config.json', 'metrics.jsonl']
    train_enwik8.main([*ARGS, '--resume'])
    assert_same(RUN, Path('runs', 'whole'))


# going on


def test_resume_starts_afresh_where_there_is_nothing_and_ends_where_all_is_done(monkeypatch, capsys):
    train_enwik8.main([*ARGS, '--resume'])
    before, lies = state(RUN)[0], names()
    capsys.readouterr()
    monkeypatch.setattr(train_enwik8, 'draw', None)  # nothing is trained
    for name in ('checkpoint-4', 'checkpoint.part'):  # of a process that was killed when it had saved the last one
        shutil.copytree(RUN / 'checkpoint-6', RUN / name)
    train_enwik8.main([*ARGS, '--resume'])
    assert 'runs/run: 6 of 6 steps are taken' in capsys.readouterr().out.replace('\\', '/')
    assert state(RUN)[0] == before
    assert names() == lies


@pytest.mark.slow
def test_more_steps_and_a_run_over_an_earlier_one():
    train(steps=4)
    train(steps=6, resume=True, threads=1)
    train(steps=6, name='whole')
    assert_same(RUN, Path('runs', 'whole'))
    train(steps=2)
    assert names() == ['checkpoint-2', 'config.json', 'loss_by_length.png', 'metrics.jsonl']
    assert [record['step'] for record in state(RUN)[0]] == [1, 2, 2]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'seed': 1}, 'began with --seed 0, not 1: '),
        ({'loss_weighting': 'square'}, 'began with --loss-weighting None, not square: '),
        ({'decay': 'linear', 'steps': 4}, 'began with --steps 2, not 4: '),  # the end of a decay is fixed
    ],
)
def test_a_run_goes_on_with_its_own_options(options, message):
    own = {'steps': 2, 'decay': options.get('decay', 'none')}
    train(**own)
    before = (RUN / 'metrics.jsonl').read_bytes()
    with pytest.raises(UsageError, match=message + '--config runs/run/config.json has its options'):
        train(**own | options, resume=True)
    assert (RUN / 'metrics.jsonl').read_bytes() == before
    assert names() == ['checkpoint-2', 'config.json', 'loss_by_length.png', 'metrics.jsonl']


# a disk that takes no more


@pytest.mark.slow
@pytest.mark.parametrize(
    ('module', 'name', 'error'),
    [
        (os, 'fsync', OSError(errno.ENOSPC, 'No space left on device')),
        (torch, 'save', RuntimeError('writing failed\n.')),
    ],
)
def test_a_full_disk_leaves_the_checkpoint_before(monkeypatch, module, name, error):
    train(steps=2)

    def full(*args, **kwargs):
        raise error

    with pytest.raises(UsageError, match=r'^cannot write a checkpoint to runs.run: (No space|writing failed)[^\n]*$'):
        train_enwik8.train(
            replace(TINY, checkpoint_every=4, resume=True), on_step=lambda step: monkeypatch.setattr(module, name, full)
        )
    assert [name for name in names() if 'checkpoint' in name] == ['checkpoint-2']


# options from a file


def test_a_file_gives_options_and_the_command_line_comes_after(folder):
    train(loss_weighting='square', equal_loss_weight_batch=False)
    path = RUN / 'config.json'
    assert load_config(path) == config.resolve(replace(TINY, loss_weighting='square'), torch.device('cpu'))
    train_enwik8.main(['--config', str(path), '--steps', '3', '--name', 'other'])
    assert load_config(Path('runs', 'other', 'config.json')) == replace(load_config(path), steps=3, name='other')
    (folder / 'a.yaml').write_text('equal_loss_weight_batch: true\nlearning_rate: 1e-3\nloss_weighting: null\n')
    assert load_config(Path('a.yaml')) == Config(equal_loss_weight_batch=True, learning_rate=1e-3)


# learning rate, gradient, prompt


def test_the_learning_rate_by_hand():
    plain, warm = Config(steps=10), Config(steps=10, warmup_steps=4)
    assert [schedule.rate(step, plain) for step in range(10)] == [1.0] * 10
    assert [schedule.rate(step, warm) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    linear = [schedule.rate(step, replace(warm, decay='linear')) for step in range(4, 10)]
    assert linear == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    cosine = [schedule.rate(step, replace(warm, decay='cosine')) for step in range(4, 10)]
    assert cosine == pytest.approx([0.5 * (1 + math.cos(math.pi * part / 6)) for part in range(6)])


def test_the_learning_rate_is_that_of_the_schedule():
    train(warmup_steps=2, decay='linear', learning_rate=1e-3)
    rates = [record['learning_rate'] for record in state(RUN)[0] if 'learning_rate' in record]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_the_norm_of_the_gradient_is_that_before_it_is_clipped(monkeypatch):
    train(steps=1)
    monkeypatch.setattr(train_enwik8, 'MAX_GRAD_NORM', 1e-6)
    train(steps=1, name='clipped')
    norms = [state(Path('runs', name))[0][0]['grad_norm'] for name in ('run', 'clipped')]
    assert norms[0] == norms[1] > 0.1


def test_a_run_goes_on_from_a_prompt(capsys):
    train()
    capsys.readouterr()
    for prompt in ('T', 'a text that is longer than what the network sees'):
        train_enwik8.main(['--generate-from', str(RUN), '--prompt', prompt, '--generate-length', '5'])
        out = capsys.readouterr().out
        assert out.startswith(prompt)
        assert 1 <= len(out) - len(prompt) - 1 <= 5  # bytes that are no letter by themselves share a mark
    weights = load_file(checkpoints.last_checkpoint(RUN) / 'model.safetensors')
    model = train_enwik8.build_model(load_config(RUN / 'config.json'))
    assert checkpoints.load_weights(model, RUN) == 6
    assert all(torch.equal(weights[name], w) for name, w in model.state_dict().items() if name in weights)
