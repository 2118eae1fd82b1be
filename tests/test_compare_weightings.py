"""The comparison of weightings: its statistics by hand, its task of titles, and the whole of it for three steps."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compare_weightings
import pytest
import torch
import train_enwik8
import tyro
from command_line import UsageError
from enwik8 import experiment
from enwik8.comparison import OVER_TOKENS, Comparison
from enwik8.config import Config as RunConfig
from enwik8.config import of_run
from enwik8.config_file import load_config
from enwik8.experiment import right_answers
from enwik8.mixed import END, Answer, OneToOne, guesses
from enwik8.over_seeds import difference, difference_over_groups, slope, spread, t_quantile
from enwik8.pictures import draw, draw_rates
from enwik8.report import Report, Row, SequenceCost, costs, report, reports_of
from enwik8.sampling import Diverged
from enwik8.schedule import fall, rate
from enwik8.sequences import split_text, to_batch
from enwik8.sums import split_sums
from enwik8.tuning import Tuning, aims
from matplotlib.figure import Figure

LANGUAGES = ('de', 'fr', 'es')
TITLES = [f'[[{LANGUAGES[i % 3]}:Titel {i // 2}]]' for i in range(60)]  # two languages have each title
PROSE = [f'{i} is a number of which ' + 'much ' * 30 for i in range(60)]
TEXT = '\n'.join([*TITLES, *PROSE, '[[simple:Long code]]', 'x' * 150 + '[[de:In prose]]', 'short']).encode()
TINY = '--data text --steps 3 --seeds 0 1 --dim 16 --depth 1 --heads 2 --seq-len 64 --batch-size 6'.split()


@pytest.fixture(autouse=True)
def text(folder):
    """What there is to train on."""
    (folder / 'text').write_bytes(TEXT)


def compare(options: str, name: str = 'compare-lines') -> dict[str, Any]:
    """Compare weightings with tiny networks; return what is in results.json."""
    compare_weightings.main([*TINY, *options.split()])
    return json.loads(Path('runs', name, 'results.json').read_text())


def metrics(run: str) -> list[dict[str, Any]]:
    """Return what a run wrote of its steps."""
    return [json.loads(line) for line in Path('runs', run, 'metrics.jsonl').read_text().splitlines()]


# the statistics


def test_statistics_by_hand():
    assert spread([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))
    found = difference([2.0, 4.0, 9.0], [1.0, 2.0, 6.0])  # 1, 2, 3: deviation 1, t 4.302653, half 4.302653 / √3
    assert found == (2.0, pytest.approx(2 - 2.484138), pytest.approx(2 + 2.484138))
    assert not found.is_distinct
    assert difference([2.0, 3.1, 7.0], [1.0, 2.0, 6.0]).is_distinct
    assert not difference([1.0, 2.0], [1.0, 2.0]).is_distinct
    assert difference([2.0], [1.0]) == (1.0, None, None)
    assert spread([2.0]) == (2.0, None)
    assert slope([(0, 5.0), (1, 4.0), (2, 1.0)]) == -2.0
    assert slope([(1, 4.0)]) is None


@pytest.mark.parametrize(('freedom', 'quantile'), [(1, 12.7062), (4, 2.7764), (11, 2.2010), (20, 2.0860), (60, 2.0003)])
def test_quantiles_are_those_of_the_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=2e-4)


# the task of titles


def test_no_title_is_on_both_sides():
    split = split_text(TEXT, 'mixed', 257, 1024)
    answers, prose = split.train.kinds
    held_out = [sequence for sequence in split.held_out if isinstance(sequence, Answer)]
    assert len(answers) + len(held_out) == 60
    assert {answer.split(END)[0] for answer in answers}.isdisjoint(answer.split(END)[0] for answer in held_out)
    assert len(held_out) == 12  # one title in five, each in two languages
    held_out_prose = [sequence for sequence in split.held_out if not isinstance(sequence, Answer)]
    assert len(held_out_prose) == 3
    assert {*prose, *held_out_prose} == {line.strip().encode() for line in PROSE}
    assert set(prose).isdisjoint(held_out_prose)
    few = split_text(TEXT, 'mixed', 257, 1).held_out
    assert sum(isinstance(sequence, Answer) for sequence in few) == 12  # all of them beside what is capped
    assert len(few) == 13


def test_the_code_alone_is_learned():
    answer, line = Answer('Köln'.encode() + END + b'de'), b'prose\0 of a kind'
    batch = to_batch([answer, line])
    assert bytes(batch['x'][0][batch['loss_mask'][0]].tolist()) == b'de'
    assert batch['loss_mask'][1].tolist() == [True] * len(line)
    assert 'loss_mask' not in to_batch([line])
    packed = to_batch([answer, line], 'packed', 32)
    assert bytes(packed['x'][packed['loss_mask']].tolist()) == line + b'de'


def test_kinds_are_drawn_one_to_one():
    both = OneToOne([b'a', b'b'], [b'1', b'2', b'3'])
    assert sorted(both) == [b'1'] * 2 + [b'2'] * 2 + [b'3'] * 2 + [b'a'] * 3 + [b'b'] * 3
    with pytest.raises(IndexError):
        both[12]


def test_those_who_cannot_read():
    held_out = [Answer(text) for text in (b'A\0de', b'A\0fr', b'B\0fr', b'C\0es')]
    assert guesses(held_out, [Answer(b'X\0de'), Answer(b'Y\0de'), Answer(b'Z\0fr')]) == (0.25, 0.75)


@pytest.mark.parametrize(
    ('costs', 'rows'),
    [
        (
            [SequenceCost(9, 2, 4.0, True), SequenceCost(9, 2, 8.0), SequenceCost(5, 4, 8.0)],
            [('answers', 2, 3.0, 0.5), ('prose', 1, 2.0, None), ('all', 3, 2.5, None)],
        ),
        (
            [SequenceCost(8, 4, 8.0, True), SequenceCost(63, 26, 26.0), SequenceCost(58, 24, 12.0, True)],
            [('4 to 9', 1, 2.0, 1.0), ('22 to 27', 2, 38 / 50, 0.5), ('all', 3, 46 / 54, 2 / 3)],
        ),
        ([SequenceCost(5, 4, 8.0)], [('2 to 7', 1, 2.0, None), ('all', 1, 2.0, None)]),
    ],
    ids=['answers apart from prose', 'answers alone by their length', 'prose alone'],
)
def test_reports_of_answers_and_prose_by_hand(costs, rows):
    assert [(row.lengths, row.sequences, row.over_tokens, row.right) for row in report(costs, 257)] == rows


def test_right_is_what_greedy_decoding_says():
    """The network says the byte after the one it reads: of b'cd', c is right after b, not after a."""

    class Wrapper(torch.nn.Module):
        def forward(self, x, lens, loss_mask, return_outputs, return_breakdown):
            logits = torch.nn.functional.one_hot((x[:, :-1] + 1) % 256, 256).float() * 9
            weight = loss_mask[:, 1:].float()
            return 0.0, (logits, None), SimpleNamespace(weight=weight, token_loss=weight)

    answers = [Answer(b'Q' + END + code) for code in (b'\1\2', b'\1\3', b'\2\3')]
    assert [cost.is_right for cost in costs(Wrapper(), [to_batch(answers)])] == [True, False, False]


# the whole


@pytest.mark.slow
def test_every_weighting_starts_alike_and_sees_the_same(monkeypatch):
    """Of one seed the first weights and every batch are equal; of two they are not."""
    weights, batches = [], []
    build, draw = train_enwik8.build_model, train_enwik8.draw

    def build_noted(config):
        model = build(config)
        weights.append(torch.cat([w.flatten() for w in model.parameters()]).detach().clone())
        return model

    monkeypatch.setattr(train_enwik8, 'build_model', build_noted)
    monkeypatch.setattr(train_enwik8, 'draw', lambda *args: batches.append(draw(*args)) or batches[-1])
    options = compare_weightings.judged(tyro.cli(compare_weightings.Config, args=[*TINY, '--task', 'mixed']))
    for weighting, seed in (('token', 0), ('sequence', 0), ('token', 1)):
        train_enwik8.train(compare_weightings.run_config(options, weighting, seed), on_step=lambda step: None)
    token, sequence, other = (batches[first : first + 3] for first in (0, 3, 6))
    assert token == sequence != other
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize('task', ['lines', 'mixed'])
def test_the_whole_of_it(task, capsys, monkeypatch):
    options, name = f'--task {task} --weightings token sequence', f'compare-{task}'
    results = compare(options, name)
    out = capsys.readouterr().out
    runs = [line.partition(':')[0] for line in out.splitlines() if ' to go' in line]
    assert runs == [f'{name}-{weighting}-{seed}' for weighting in ('token', 'sequence') for seed in (0, 1)]
    assert 'sequence - token' in out
    assert (Path('runs', name) / 'comparison.png').read_bytes().startswith(b'\x89PNG')
    assert results['steps'] == {'token': [3, 3], 'sequence': [3, 3]}
    assert len(results['reports']) == 2 * 2 * 3
    measured = results['measured']['all: over tokens']
    assert all(len(measured[weighting]) == 2 for weighting in ('token', 'sequence'))
    gap = (sum(measured['sequence']) - sum(measured['token'])) / 2
    assert results['difference']['all: over tokens']['sequence']['mean'] == pytest.approx(gap)
    assert ('answers that are right, %' in results['measured']) == (task == 'mixed')

    monkeypatch.setattr(train_enwik8, 'train', pytest.fail)  # nothing is trained again
    assert compare(options, name) == results
    assert capsys.readouterr().out == ''.join(line for line in out.splitlines(True) if ' to go' not in line)
    compare(f'{options} --seeds 1', name)
    assert 'of one seed, nothing can be told from noise' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compare(f'{options} --steps 4', name)
    assert f'runs/{name}-token-0 was trained with --steps 3, not 4' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ('options', 'interrupted', 'end'),
    [('--steps 16', 7, 16), ('--steps 32 --until-flat 1e6 --decay linear', 13, 15)],  # before its end; in its decay
)
def test_an_interrupted_run_goes_on(monkeypatch, options, interrupted, end):
    """It ends as one that nobody interrupted."""
    options = f'{options} --weightings token --seeds 0 --name'
    whole = compare(f'{options} whole', 'whole')
    train, taken = train_enwik8.train, []

    def stop(step):
        taken.append(step)
        if taken.count(interrupted) == 1 and step == interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_enwik8, 'train', lambda config, on_step: train(config, on_step=stop))
    with pytest.raises(SystemExit) as stopped:
        compare(f'{options} cut')
    assert stopped.value.code == 130
    assert compare(f'{options} cut', 'cut')['reports'] == whole['reports']
    assert taken == [*range(1, interrupted + 1), *range(interrupted, end + 1)]  # from the checkpoint just before
    for name in ('train_loss', 'learning_rate'):
        of_whole, of_cut = ([record.get(name) for record in metrics(f'{run}-token-0')] for run in ('whole', 'cut'))
        assert of_cut == of_whole


# learning rates, flatness, sums


def tuning(weighting: str, **bits: float) -> Tuning:
    """Return what some rates measured, by the mean over tokens."""
    return Tuning(weighting, {float(rate[1:]): {OVER_TOKENS: value} for rate, value in bits.items()})


def rows(over_tokens: float, over_sequences: float = 0.0, over_square: float = 0.0, right: float | None = None):
    """Return a report of one group, all of it."""
    return [Row('all', 1, 2, over_tokens, over_sequences, right, over_square)]


def test_what_a_rate_is_chosen_by():
    """The mean that the weighting optimises, over bytes beside it; where there are answers, their bits."""
    found = rows(1.0, 2.0, 3.0)
    assert list(aims('token', found).values()) == [1.0]
    assert list(aims('sequence', found).values()) == [2.0, 1.0]
    assert list(aims('square', found).values()) == [3.0, 1.0]
    both = [Row('answers', 1, 2, 5.0, 5.0, 0.5), Row('prose', 1, 2, 4.0, 4.0), *found]
    assert aims('sequence', both) == {'answers': 5.0, 'prose': 4.0}
    [*_, row] = report([SequenceCost(5, 4, 8.0), SequenceCost(17, 16, 8.0)])
    assert row.over_square == pytest.approx((8 / 4**0.5 + 8 / 16**0.5) / (4**0.5 + 16**0.5))
    assert aims('sequence', rows(1.0, 2.0, 3.0, right=0.25)) == {'answers': 1.0, 'answers that are right, %': 25.0}


def test_the_grid_goes_on_at_its_edge():
    assert tuning('token', _1=3.0, _2=2.0, _4=2.5).beyond() is None
    assert tuning('token', _1=1.0, _2=2.0).beyond() == 0.5
    assert tuning('token', _1=3.0, _2=2.0).beyond() == 4.0
    diverged = Tuning('token', {1.0: {OVER_TOKENS: 3.0}, 2.0: {OVER_TOKENS: 2.0}, 4.0: {}})
    assert (diverged.rate, diverged.beyond()) == (2.0, None)
    reports = {2.0: [[Report(1, rows(1.0), 0.0)], []], 1.0: [[Report(1, rows(v), 0.0)] for v in (1.0, 4.0)]}
    assert Tuning.of_reports('token', reports).measured == {1.0: {OVER_TOKENS: 2.5}, 2.0: {}}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, instead of their files."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, *args, **kwargs: figures.append(figure))
    return figures


def test_every_chosen_rate_has_a_ring(drawn):
    """Those of two weightings that chose the same rate too, each on its own line; a diverged rate has no point."""
    token, sequence = tuning('token', _1=3.0, _2=2.0, _4=2.5), tuning('sequence', _1=4.0, _2=3.0)
    token.measured[8.0] = {}
    draw_rates([token, sequence], Path('rates.png'))
    for axes in drawn[0].axes:
        rings = [line.get_xydata().tolist() for line in axes.lines if line.get_fillstyle() == 'none']
        assert rings == [[[2.0, 2.0]], [[2.0, 3.0]]]


def test_a_picture_of_percentages_ends_where_they_do(drawn):
    """Of two seeds, with nothing and with everything right, the deviation reaches from -21 to 121."""
    of_seed = [[Row('4 to 9', 1, 2, 1.0, 1.0, right), *rows(1.0, right=right)] for right in (0.0, 1.0)]
    curves = {(w, seed): [(3, of_seed[seed])] for w in ('token', 'sequence') for seed in (0, 1)}
    draw(Comparison('sums', 'all 1', ('token', 'sequence'), (0, 1), curves, {}), Path('comparison.png'))
    assert [axes.get_ylim() for axes in drawn[0].axes] == [(-2, 102)] * 2


def test_own_rates_and_the_shared_one(monkeypatch, capsys):
    """Each weighting's best rate is where its loss is least: |log2(rate / best)|, told without a training."""
    best = {'token': 2e-3, 'sequence': 16e-3}  # that of the others, and two factors beyond the grid
    trained = []

    def train(run, on_step):
        trained.append((run.loss_weighting, run.learning_rate, run.seed))
        if run.learning_rate > 0.03:
            raise Diverged('the loss is not finite')
        distance = abs(math.log2(run.learning_rate / best[run.loss_weighting])) + run.seed / 1000
        folder = Path('runs', run.name)
        folder.mkdir(parents=True)
        (folder / 'config.json').write_text(json.dumps(of_run(run)))
        record = {'step': 3, 'bits_per_byte': [row._asdict() for row in rows(1 + distance, 1 + distance, 1.0)]}
        (folder / 'metrics.jsonl').write_text(json.dumps(record | {'seconds': 1.5}) + '\n')

    monkeypatch.setattr(train_enwik8, 'train', train)
    options = '--weightings token sequence --learning-rates 1e-3 2e-3 4e-3'
    results = compare(options)
    assert 'diverged' in capsys.readouterr().out
    assert [rate for weighting, rate, seed in trained if weighting == 'sequence' and seed == 100] == [
        1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3
    ]  # fmt: skip
    assert {seed for _, rate, seed in trained if rate == 1e-3} == {100, 101}
    assert [run for run in trained if run[2] < 2] == [  # at own rates, then at the shared one what is not there
        ('token', 2e-3, 0), ('token', 2e-3, 1), *(('sequence', rate, seed) for rate in (16e-3, 2e-3) for seed in (0, 1))
    ]  # fmt: skip
    token, sequence = results['tuning']
    assert token['measured']['0.002'][OVER_TOKENS] == pytest.approx(1.1005)  # of the seeds 100 and 101
    assert (sequence['weighting'], sequence['measured']['0.032']) == ('sequence', {})
    assert results['at_own_rates']['measured'][OVER_TOKENS]['sequence'] == [1.0, 1.001]
    assert results['measured'][OVER_TOKENS]['sequence'] == pytest.approx([4.0, 4.001])
    trained.clear()
    compare(options)
    assert {rate for _, rate, _ in trained} == {32e-3}  # what diverged left nothing to keep


def test_where_a_training_is_flat():
    """A line of 0.1 bits per 100 steps until step 400, then none: the second half is flat from step 800 on."""
    curve = [(step, 5.0 - min(step, 400) / 1000) for step in range(100, 2100, 100)]
    run = RunConfig(steps=2000, until_flat=0.02)
    assert fall(run, curve[:3]) == fall(run, ()) == (2000, 2000)
    flat = next(step for step, _ in curve if step >= 700 and fall(run, curve[: step // 100])[0] == step)
    assert 600 < flat <= 800
    assert fall(run, curve) == (flat, flat)
    decaying = replace(run, decay='linear', warmup_steps=100)
    assert fall(decaying, curve) == (flat, flat + flat // 4)
    assert fall(decaying, curve[:6]) == (1600, 2000)
    assert rate(50, decaying, curve) == pytest.approx(0.51)
    assert rate(flat, decaying, curve) == 1.0
    assert rate(flat + flat // 8, decaying, curve) == pytest.approx(0.5, abs=0.01)
    assert fall(replace(run, until_flat=None), curve) == (0, 2000)


@pytest.mark.parametrize('decay', ['none', 'linear'])
def test_a_run_until_flat_ends_early(decay, capsys):
    """With a threshold that everything is below, at the first report at which enough lie in the second half."""
    options = f'--steps 32 --until-flat 1e6 --decay {decay} --weightings token --seeds 0'
    end = {'none': 12, 'linear': 15}[decay]  # four reports, at 6 to 12; the decay takes a quarter of 12 steps
    assert compare(options)['steps'] == {'token': [end]}
    rates = [record['learning_rate'] / 2e-3 for record in metrics('compare-lines-token-0') if 'train_loss' in record]
    assert rates == pytest.approx([1.0] * 12 + ([1 - part / 3 for part in range(3)] if decay == 'linear' else []))
    capsys.readouterr()
    compare(options)
    assert ' to go' not in capsys.readouterr().out


def test_intervals_over_questions_by_hand():
    """Groups of one value: the bootstrap of a mean; a group is drawn with all that it has, or not at all."""
    values = [0.0, 1.0, 2.0, 3.0] * 25
    found = difference_over_groups([[value] for value in values])
    assert found.mean == 1.5
    half = 1.96 * 1.118 / 10
    assert found[1:] == pytest.approx((1.5 - half, 1.5 + half), abs=0.03)
    together = difference_over_groups([values[start : start + 4] for start in range(0, 100, 4)])
    assert together == pytest.approx((1.5, 1.5, 1.5))
    assert difference_over_groups([[0.0]] * 3) == (0.0, 0.0, 0.0)


def test_right_answers_are_those_of_the_last_report():
    compare('--task mixed --weightings token --seeds 0 --steps 40 --learning-rate 0.03', 'compare-mixed')
    run = load_config(Path('runs/compare-mixed-token-0/config.json'))
    answers = [s for s in split_text(TEXT, 'mixed', 65, 1024).held_out if isinstance(s, Answer)]
    right = right_answers(run, answers)
    assert len(right) == 12
    assert sum(right) / 12 == pytest.approx(reports_of(Path('runs/compare-mixed-token-0'))[-1].rows[0].right)
    assert 0 < sum(right) < 12


def test_what_changed_over_questions_by_hand(monkeypatch):
    """Title A has two answers: one became right under both seeds; B lost one under the second seed: 2 - 1 of 6."""
    held_out = [b'prose', *(Answer(text) for text in (b'A\0de', b'A\0fr', b'B\0de'))]
    right = {
        ('token', 0): [True, False, True], ('token', 1): [False, False, True],
        ('sequence', 0): [True, True, True], ('sequence', 1): [False, True, False],
    }  # fmt: skip
    monkeypatch.setattr(experiment, 'right_answers', lambda run, answers: right[run])
    questions, found = experiment.over_questions({key: key for key in right}, held_out, 'sequence', 'token')
    assert questions == 2
    assert found == (pytest.approx(100 / 6), -50.0, 50.0)


def test_sums_are_right_and_on_one_side():
    split, letters, lengths = split_sums(b'', 257), b'abcdefghijklm', Counter()
    trained = [split[0][index] for index in range(2400)]
    for sequence in (*trained, *split[1]):
        question, _, answer = sequence.partition(END)
        d = len(question) // 3
        assert (question[::3], answer[::2]) == (letters[:d], letters[: d + 1])
        a, b = (int(question[start::3][::-1]) for start in (1, 2))
        assert int(answer[1::2][::-1]) == a + b
        lengths[d, sequence in split[1]] += 1
    assert [lengths[d, False] for d in range(1, 13)] == [200] * 12
    assert all(lengths[d, True] >= 95 for d in range(3, 13))
    assert set(trained).isdisjoint(split[1])
    assert max(map(len, split_sums(b'', 63)[1])) == 63
    with pytest.raises(UsageError, match='--seq-len must be at least 62'):
        split_sums(b'', 62)


def test_sums_as_a_task(monkeypatch):
    """Without a text and without a network; few are held out, for the sake of time."""
    monkeypatch.setattr('enwik8.sums.HELD_OUT_PER_LENGTH', 2)
    monkeypatch.setattr('enwik8.text.connect', pytest.fail)
    results = compare('--task sums --data auto --weightings token sequence', 'compare-sums')
    assert next(iter(results['measured'])) == 'answers that are right, %'
    assert '22 to 27 bytes: right, %' in results['measured']
    assert 20 <= results['answers'] <= 24
