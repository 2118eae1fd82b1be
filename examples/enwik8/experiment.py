"""The runs of an experiment: train what is not there yet, and say what they took and whose answers are right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
import train_enwik8
from command_line import UsageError, flag, say
from enwik8.checkpoints import load_weights
from enwik8.config import CHANGEABLE, Config, resolve
from enwik8.config_file import load_config
from enwik8.mixed import END, Answer
from enwik8.model import build_model
from enwik8.over_seeds import Difference, difference_over_groups
from enwik8.report import Report, costs, reports_of
from enwik8.sampling import Diverged
from enwik8.schedule import fall
from enwik8.sequences import to_batch
from tqdm import tqdm

Runs = Mapping[tuple[str, int], Config]  # by weighting and seed


def folder_of(run: Config) -> Path:
    """Return where a run leaves its results."""
    return Path('runs', str(run.name))


def is_finished(run: Config) -> bool:
    """Whether a run is there, to its last step. Raises `UsageError` where another one of its name is there."""
    folder = folder_of(run)
    if not (folder / 'config.json').exists():
        return False
    before = load_config(folder / 'config.json')
    for field in fields(Config):
        was, now = getattr(before, field.name), getattr(run, field.name)
        if was != now and (field.name not in CHANGEABLE or field.name == 'steps'):
            option = flag(field.name)
            raise UsageError(f'{folder} was trained with {option} {was}, not {now}: choose another --name')
    try:
        reports = reports_of(folder)
    except (UsageError, FileNotFoundError):  # interrupted before the first report
        return False
    return reports[-1].step == fall(run, [(report.step, report.rows[-1].over_tokens) for report in reports])[1]


def train_all(runs: Iterable[Config], may_diverge: bool = False) -> dict[str, list[Report]]:
    """Train what is not finished, under one bar; return the reports of runs by their names, none of what diverged."""
    runs = list(runs)
    waiting = [run for run in runs if not is_finished(run)]
    diverged = set()
    with tqdm(total=sum(run.steps or 0 for run in waiting), unit='step', disable=None if waiting else True) as bar:
        for count, run in enumerate(waiting, start=1):
            bar.set_description(str(run.name))
            before = bar.n
            try:
                train_enwik8.train(run, on_step=lambda step, before=before: bar.update(before + step - bar.n))
                reports = reports_of(folder_of(run))
                bits = f'{reports[-1].rows[-1].over_tokens:.3f} bits per byte over tokens'
                say(f'{run.name}: {bits}; {how_long([reports])}; {len(waiting) - count} to go')
            except Diverged as error:
                if not may_diverge:
                    raise
                diverged.add(run.name)
                say(f'{run.name}: {error}')
            bar.update(before + (run.steps or 0) - bar.n)
    return {str(run.name): [] if run.name in diverged else reports_of(folder_of(run)) for run in runs}


def how_long(runs: Iterable[Sequence[Report]]) -> str:
    """Say how many steps some runs took, and how long those took, by the clock of the runs."""
    runs = list(runs)
    steps, seconds = sum(run[-1].step for run in runs), sum(report.seconds for run in runs for report in run)
    whole = f'{seconds:.0f} s' if seconds < 600 else f'{seconds / 60:.0f} min' if seconds < 36_000 else ''
    return f'{steps:,} steps in {whole or f"{seconds / 3600:.1f} h"}, {seconds / steps:.3f} s each with validations'


@torch.no_grad()
def right_answers(run: Config, answers: Sequence[bytes]) -> list[bool]:
    """Return which answers the model of a finished run gives right."""
    model = build_model(resolve(run, torch.device('cpu')))
    load_weights(model, folder_of(run))
    model.eval()
    batches = (to_batch(answers[start : start + 64]) for start in range(0, len(answers), 64))
    return [cost.is_right for cost in costs(model, batches)]


def over_questions(runs: Runs, held_out: Sequence[bytes], weighting: str, base: str) -> tuple[int, Difference]:
    """Return how many questions are held out, and what a weighting changed of the answers that are right, in percent.

    Paired by seed, with an interval over the questions, each with all of its answers: a title may have several.
    """
    answers = [sequence for sequence in held_out if isinstance(sequence, Answer)]
    changes: dict[bytes, list[float]] = {}
    for seed in sorted({seed for _, seed in runs}):
        ours, theirs = (right_answers(runs[name, seed], answers) for name in (weighting, base))
        for answer, right, was_right in zip(answers, ours, theirs, strict=True):
            changes.setdefault(answer.partition(END)[0], []).append(100.0 * (right - was_right))
    return len(changes), difference_over_groups(changes.values())
