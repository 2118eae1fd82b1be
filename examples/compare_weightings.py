"""Choose a weighting by experiment: train the same model under each of several, from several seeds, and compare.

    python examples/compare_weightings.py --task mixed --data enwik8            # short answers among long texts
    python examples/compare_weightings.py --task lines --seeds 0 1 --steps 200  # a quick look

For each seed, every weighting starts from the same weights and sees the same batches in the same order. A run is one
of train_enwik8.py, in runs/NAME-WEIGHTING-SEED/: a finished one is not run again, an interrupted one goes on, and
other processes may train other seeds of the same name. The report, table, picture and results.json, goes to runs/NAME/.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import command_line  # noqa: F401  before any package: it says which one is missing
import torch
import train_enwik8
import tyro
from command_line import UsageError, flag, judge, one_line_errors, writable_folder
from enwik8.comparison import Comparison, draw, report
from enwik8.config import CHANGEABLE, PRESETS, Weighting, resolve
from enwik8.config import Config as RunConfig
from enwik8.config_file import load_config
from enwik8.mixed import Answer, guesses
from enwik8.report import METRICS, Row, last_report
from enwik8.sequences import split_text
from enwik8.text import find_text, read_text
from rich.console import Console
from tqdm import tqdm

VALIDATIONS = 8  # of a run, and as many checkpoints

# what a run of each task has otherwise than the preset; where pages are cut at 256 bytes, all of them are as long
TASKS: dict[str, dict[str, Any]] = {
    'lines': {'steps': 1500},
    'pages': {'steps': 300, 'seq_len': 1024, 'batch_size': 8},
    'mixed': {'steps': 1000},
}


@dataclass(frozen=True)
class Config:
    """Train the same model under several weightings, from several seeds, and say what differs by more than chance."""

    task: Literal['lines', 'pages', 'mixed'] = 'lines'
    """'lines' and 'pages' of a text, as long as they are; 'mixed': long lines, and titles of which the language is to
    be named, one to one (enwik8 has such titles, the built-in text has none)."""
    weightings: tuple[Weighting, ...] = ('token', 'square', 'sequence')
    """The others are compared to the first."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int | None = None
    """Optimizer steps of a run. None: what the task takes for a few minutes on a core."""
    data: str = 'auto'
    """As in train_enwik8.py."""
    max_bytes: int | None = None
    """Read no more of the text than this."""
    held_out: int = 1024
    """Validate on at most so many sequences."""
    seq_len: int | None = None
    """The most positions the network sees."""
    batch_size: int | None = None
    """Sequences in a step."""
    dim: int | None = None
    depth: int | None = None
    heads: int | None = None
    learning_rate: float | None = None
    threads: int | None = 1
    """Of the CPU: runs side by side, in processes of one thread, finish sooner than one after the other."""
    name: str | None = None
    """The report goes to runs/NAME, the runs to runs/NAME-WEIGHTING-SEED. None: compare-TASK."""


# the runs


def run_config(config: Config, weighting: Weighting, seed: int) -> RunConfig:
    """Return the options of one run."""
    own = {field.name for field in fields(RunConfig)} & {field.name for field in fields(Config)} - {'name'}
    given = {name: value for name, value in asdict(config).items() if name in own and value is not None}
    options = PRESETS['tiny'] | TASKS[config.task] | given
    every = -(-options['steps'] // VALIDATIONS)  # rounded up: else one comes a few steps before the last
    options |= {'validate_every': every, 'checkpoint_every': every, 'sequences': config.task, 'layout': 'packed'}
    name = f'{config.name}-{weighting}-{seed}'
    return RunConfig(preset='tiny', loss_weighting=weighting, seed=seed, name=name, resume=True, **options)


def folder_of(run: RunConfig) -> Path:
    """Return where a run leaves its results."""
    return Path('runs', str(run.name))


def is_finished(run: RunConfig) -> bool:
    """Whether a run is there, to its last step. Raises `UsageError` where another one of its name is there."""
    folder = folder_of(run)
    if not (folder / 'config.json').exists():
        return False
    before = load_config(folder / 'config.json')
    for field in fields(RunConfig):
        was, now = getattr(before, field.name), getattr(run, field.name)
        if was != now and (field.name not in CHANGEABLE or field.name == 'steps'):
            option = flag(field.name)
            raise UsageError(f'{folder} was trained with {option} {was}, not {now}: choose another --name')
    try:
        return last_report(folder).step == run.steps
    except (UsageError, FileNotFoundError):  # interrupted before the first report
        return False


def train_all(runs: Sequence[RunConfig]) -> None:
    """Train what is not finished, under one bar."""
    finished = [is_finished(run) for run in runs]
    total = sum(run.steps or 0 for run in runs)
    done = sum(run.steps or 0 for run, is_done in zip(runs, finished, strict=True) if is_done)
    with tqdm(total=total, initial=done, unit='step', disable=all(finished)) as bar:
        for run, is_done in zip(runs, finished, strict=True):
            if not is_done:
                bar.set_description(f'{run.loss_weighting}, seed {run.seed}')

                def advance(step: int, before: int = done) -> None:
                    bar.update(before + step - bar.n)

                train_enwik8.train(run, on_step=advance)
                done += run.steps or 0


def curve_of(run: RunConfig) -> list[tuple[int, list[Row]]]:
    """Return the reports of a run, by step."""
    records = [json.loads(line) for line in (folder_of(run) / METRICS).read_text().splitlines()]
    return [
        (record['step'], [Row(**row) for row in record['bits_per_byte']])
        for record in records
        if 'bits_per_byte' in record
    ]


# the whole


def judged(config: Config) -> Config:
    """Return the options with what was left out. Raises `UsageError` where they are no good, the text included."""
    config = Config(**(asdict(config) | {'name': config.name if config.name is not None else f'compare-{config.task}'}))
    judge(config)
    for seed in config.seeds:
        judge(RunConfig(seed=seed, name=f'{config.name}-sequence_sum-{seed}'))
    for option in ('seeds', 'weightings'):
        values = getattr(config, option)
        if len(set(values)) < len(values):
            raise UsageError(f'--{option} must differ from one another, got {" ".join(map(str, values))}')
    return Config(**(asdict(config) | {'data': find_text(config.data)}))


def compare(config: Config) -> None:
    """Train, compare, and write."""
    config = judged(config)
    folder = writable_folder(Path('runs', str(config.name)))
    runs = {
        (weighting, seed): run_config(config, weighting, seed)
        for weighting in config.weightings
        for seed in config.seeds
    }
    one = next(iter(runs.values()))
    train_enwik8.build_model(resolve(one, torch.device('cpu')))  # whatever is wrong is said now
    split = split_text(read_text(config.data, config.max_bytes), config.task, one.seq_len + 1, config.held_out)
    train_all(list(runs.values()))

    comparison = Comparison(
        config.task,
        config.weightings,
        config.seeds,
        {(weighting, seed): curve_of(run) for (weighting, seed), run in runs.items()},
    )
    console = Console()
    report(comparison, console)
    answers = [sequence for sequence in split.held_out if isinstance(sequence, Answer)]
    notes = {}
    if answers:
        most, best = guesses(answers, split.train.kinds[0])
        notes = {'answers': len(answers), 'most_frequent_code': most, 'best_possible': best}
        console.print(
            f'{len(answers):,} answers are held out. Always naming the most frequent language: '
            f'{most:.1%} right; knowing every title: {best:.1%}, for some have several languages.'
        )
    results = {'config': asdict(config), 'run': asdict(one), **notes, **comparison.results()}
    (folder / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
    draw(comparison, folder / 'comparison.png')
    console.print(f'{folder}: results.json, comparison.png', highlight=False)


def main(args: Sequence[str] | None = None) -> None:
    """Compare as the command line says."""
    with one_line_errors(Path(__file__).name):
        compare(tyro.cli(Config, args=args))


if __name__ == '__main__':
    main()
