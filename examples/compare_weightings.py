"""Choose a weighting by experiment: train the same model under each of several, from several seeds, and compare.

    python examples/compare_weightings.py --task mixed --data enwik8            # short answers among long texts
    python examples/compare_weightings.py --task lines --seeds 0 1 --steps 200  # a quick look
    python examples/compare_weightings.py --task sums --learning-rate 1e-3 --learning-rates 5e-4 1e-3 2e-3
    python examples/compare_weightings.py --task mixed --batch-size 8 --until-flat 0.02 --warmup-steps 100

For each seed, every weighting starts from the same weights and sees the same batches in the same order. A run is one
of train_enwik8.py, in runs/NAME-WEIGHTING-SEED/, or in runs/NAME-WEIGHTING-RATE-SEED/ where it has a learning rate of
its own: a finished one is not run again, an interrupted one goes on, and other processes may train other seeds or
weightings of the same name. The report, tables, pictures and results.json, goes to runs/NAME/.

On one core a step took 0.26 s of lines, 0.41 s of mixed, 1.1 s of pages and 0.13 s of sums: a run takes 3 to 7
minutes by default, the 15 runs of three weightings and five seeds 1 to 2 hours. With --batch-size 8 a run of 3,000
steps took 5 minutes of lines and 6 to 9 of mixed. --learning-rates adds a run for each weighting, rate and tuning seed
(24 of three weightings, four rates and two seeds), and a run for each seed at each own rate that is not the shared one.
The report says what it took.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import command_line  # noqa: F401  before any package: it says which one is missing
import torch
import train_enwik8
import tyro
from command_line import UsageError, flag, judge, one_line_errors, writable_folder
from enwik8.comparison import Comparison, report
from enwik8.config import PRESETS, Weighting, resolve
from enwik8.config import Config as RunConfig
from enwik8.experiment import how_long, over_questions, train_all
from enwik8.mixed import Answer, guesses
from enwik8.pictures import draw, draw_rates
from enwik8.sequences import Split, source_of, split_text
from enwik8.text import read_text
from enwik8.tuning import Tuning, table_of_rates
from rich.console import Console

VALIDATIONS = 8  # of a run at least, and as many checkpoints
STEPS_PER_VALIDATION = 125  # of a long one
STEPS_UNTIL_FLAT, VALIDATIONS_UNTIL_FLAT = 3000, 24
EXTENSIONS = 4  # rates beyond the grid that a weighting tries where its best is at the edge

# what a run of each task has otherwise than the preset; where pages are cut at 256 bytes, all of them are as long
TASKS: dict[str, dict[str, Any]] = {
    'lines': {'steps': 1500},
    'pages': {'steps': 300, 'seq_len': 1024, 'batch_size': 8},
    'mixed': {'steps': 1000},
    'sums': {'steps': 1500},
}


@dataclass(frozen=True)
class Config:
    """Train the same model under several weightings, from several seeds, and say what differs by more than chance."""

    task: Literal['lines', 'pages', 'mixed', 'sums'] = 'lines'
    """'lines' and 'pages' of a text, as long as they are; 'mixed': long lines, and titles of which the language is to
    be named, one to one (enwik8 has such titles, the built-in text has none); 'sums' of two numbers of 1 to 12 digits,
    of which the answer is to be learned, made without a text."""
    weightings: tuple[Weighting, ...] = ('token', 'square', 'sequence')
    """The others are compared to the first."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int | None = None
    """Optimizer steps of a run, at most. None: what the task takes for minutes on a core; 3,000 with --until-flat."""
    until_flat: float | None = None
    """End a run where bits per byte fall by less than this for every 100 steps, over the second half of its reports:
    0.02, say. Its learning rate stays up until then; --decay takes a last fifth of the steps."""
    warmup_steps: int = 0
    """The learning rate rises over so many steps."""
    decay: Literal['none', 'cosine', 'linear'] = 'none'
    """How the learning rate falls to zero by the last step."""
    data: str = 'auto'
    """As in train_enwik8.py."""
    max_bytes: int | None = None
    """Read no more of the text than this."""
    held_out: int = 1024
    """Validate on at most so many sequences, and on all answers beside them."""
    seq_len: int | None = None
    """The most positions the network sees."""
    batch_size: int | None = None
    """Sequences in a step."""
    dim: int | None = None
    depth: int | None = None
    heads: int | None = None
    learning_rate: float | None = None
    """Of all weightings. None: 2e-3."""
    learning_rates: tuple[float, ...] | None = None
    """Find the best of these for each weighting, and compare the weightings at their own rates too. Where the best is
    at the edge, the grid goes on by factors of 2, four times at most."""
    tuning_seeds: tuple[int, ...] = (100, 101)
    """The seeds on which rates are chosen."""
    threads: int | None = 1
    """Of the CPU: runs side by side, in processes of one thread, finish sooner than one after the other."""
    name: str | None = None
    """The report goes to runs/NAME, the runs to runs/NAME-…. None: compare-TASK."""


def judged(config: Config) -> Config:
    """Return the options with what was left out. Raises `UsageError` where they are no good, the text included."""
    config = replace(config, name=config.name if config.name is not None else f'compare-{config.task}')
    judge(config)
    for seed in config.seeds:
        judge(RunConfig(seed=seed, name=f'{config.name}-sequence_sum-{seed}'))
    for option in ('seeds', 'weightings', 'learning_rates', 'tuning_seeds'):
        values = getattr(config, option) or ()
        if len(set(values)) < len(values):
            raise UsageError(f'{flag(option)} must differ from one another, got {" ".join(map(str, values))}')
    if config.learning_rates and set(config.seeds) & set(config.tuning_seeds):
        raise UsageError('--tuning-seeds must be others than --seeds: those compare what was chosen on these')
    return replace(config, data=source_of(config.data, config.task))


def run_config(config: Config, weighting: Weighting, seed: int, learning_rate: float | None = None) -> RunConfig:
    """Return the options of one run, at the learning rate of all or at one of its own."""
    own = {field.name for field in fields(RunConfig)} & {field.name for field in fields(Config)} - {'name'}
    given = {name: value for name, value in asdict(config).items() if name in own and value is not None}
    until_flat = {'steps': STEPS_UNTIL_FLAT} if config.until_flat is not None else {}
    options = PRESETS['tiny'] | TASKS[config.task] | until_flat | given
    least = VALIDATIONS_UNTIL_FLAT if until_flat else VALIDATIONS
    validations = max(least, options['steps'] // STEPS_PER_VALIDATION)
    every = -(-options['steps'] // validations)  # rounded up: else one comes a few steps before the last
    options |= {'validate_every': every, 'checkpoint_every': every, 'sequences': config.task, 'layout': 'packed'}
    rate = ''
    if learning_rate is not None and learning_rate != options['learning_rate']:
        options['learning_rate'], rate = learning_rate, f'{learning_rate:g}-'
    name = f'{config.name}-{weighting}-{rate}{seed}'
    return RunConfig(preset='tiny', loss_weighting=weighting, seed=seed, name=name, resume=True, **options)


def tune(config: Config, weighting: Weighting) -> Tuning:
    """Find the learning rate that is best for a weighting; go on where it is at the edge of the grid."""
    rates = list(config.learning_rates or ())
    for _ in range(EXTENSIONS + 1):
        runs = {rate: [run_config(config, weighting, seed, rate) for seed in config.tuning_seeds] for rate in rates}
        reports = train_all((run for of_rate in runs.values() for run in of_rate), may_diverge=True)
        found = {rate: [reports[str(run.name)] for run in of_rate] for rate, of_rate in runs.items()}
        tuning = Tuning.of_reports(weighting, found)
        beyond = tuning.beyond()
        if beyond is None:
            break
        rates.append(beyond)
    if not tuning.names:
        raise UsageError(f"under '{weighting}' the loss is finite at none of the learning rates down to {min(rates):g}")
    return tuning


def compare_at(config: Config, rates: dict[Weighting, float], split: Split, console: Console) -> Comparison:
    """Train every weighting at its learning rate, from every seed; print the report."""
    runs = {(w, seed): run_config(config, w, seed, rates[w]) for w in config.weightings for seed in config.seeds}
    reports = train_all(runs.values())
    is_shared = len(set(rates.values())) == 1
    said = 'all' if is_shared else ', '.join(f'{weighting} {rate:g}' for weighting, rate in rates.items())
    said_rates = f'learning rates: {said}' + (f' {rates[config.weightings[0]]:g}' if is_shared else '')
    curves = {key: [(r.step, r.rows) for r in reports[str(run.name)]] for key, run in runs.items()}
    over = {}
    if any(isinstance(sequence, Answer) for sequence in split.held_out):
        first, *others = config.weightings
        over = {weighting: over_questions(runs, split.held_out, weighting, first) for weighting in others}
    comparison = Comparison(config.task, said_rates, config.weightings, config.seeds, curves, over)
    report(comparison, console)
    console.print(f'All of it: {how_long(reports.values())}.', highlight=False)
    return comparison


def compare(config: Config) -> None:
    """Train, compare, and write."""
    config = judged(config)
    folder = writable_folder(Path('runs', str(config.name)))
    one = run_config(config, config.weightings[0], config.seeds[0])
    train_enwik8.build_model(resolve(one, torch.device('cpu')))  # whatever is wrong is said now
    split = split_text(read_text(config.data, config.max_bytes), config.task, one.seq_len + 1, config.held_out)
    shared: dict[Weighting, float] = dict.fromkeys(config.weightings, one.learning_rate)
    results = {'config': asdict(config), 'run': asdict(one)}
    console = Console()
    answers = [sequence for sequence in split.held_out if isinstance(sequence, Answer)]
    if answers:
        console.print(f'{len(answers):,} answers are held out.')
        results |= {'answers': len(answers)}
    if config.task == 'mixed':
        most, best = guesses(answers, split.train.kinds[0])
        results |= {'most_frequent_code': most, 'best_possible': best}
        console.print(
            f'Always naming the most frequent language: {most:.1%} right; knowing every title: {best:.1%}, '
            'for some have several languages.'
        )

    if config.learning_rates:
        tunings = [tune(config, weighting) for weighting in config.weightings]
        console.print(table_of_rates(tunings, config.tuning_seeds))
        for tuning in tunings:
            console.print(tuning.sentence(), highlight=False)
        draw_rates(tunings, folder / 'rates.png')
        own = {weighting: tuning.rate for weighting, tuning in zip(config.weightings, tunings, strict=True)}
        results['tuning'] = [{'weighting': tuning.weighting, 'measured': tuning.measured} for tuning in tunings]
        if own != shared:
            at_own = compare_at(config, own, split, console)
            results['at_own_rates'] = at_own.results()
            draw(at_own, folder / 'comparison_at_own_rates.png')
    comparison = compare_at(config, shared, split, console)
    draw(comparison, folder / 'comparison.png')
    (folder / 'results.json').write_text(json.dumps(results | comparison.results(), indent=1) + '\n')
    console.print(f'{folder}: {", ".join(sorted(path.name for path in folder.iterdir()))}', highlight=False)


def main(args: Sequence[str] | None = None) -> None:
    """Compare as the command line says."""
    with one_line_errors(Path(__file__).name):
        compare(tyro.cli(Config, args=args, description=__doc__))


if __name__ == '__main__':
    main()
