"""The comparison of weightings: its statistics by hand, its task of titles, and the whole of it for three steps."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import compare_weightings
import pytest
import torch
import train_enwik8
from command_line import UsageError
from enwik8 import experiment
from enwik8.comparison import OVER_TOKENS
from enwik8.config import Config as RunConfig
from enwik8.config import of_run
from enwik8.config_file import load_config
from enwik8.experiment import right_answers
from enwik8.mixed import END, Answer, OneToOne, guesses
from enwik8.over_seeds import difference, difference_over_groups, slope, spread, t_quantile
from enwik8.report import Report, Row, SequenceCost, report, reports_of
from enwik8.sampling import Diverged
from enwik8.schedule import fall, rate
from enwik8.sequences import split_text, to_batch
from enwik8.sums import split_sums
from enwik8.tuning import Tuning, aims

LANGUAGES = ('de', 'fr', 'es')
TITLES = [f'[[{LANGUAGES[i % 3]}:Titel {i // 2}]]' for i in range(60)]  # two languages have each title
PROSE = [f'{i} is a number of which ' + 'much ' * 30 for i in range(60)]
TEXT = '\n'.join([*TITLES, *PROSE, '[[simple:Long code]]', 'x' * 150 + '[[de:In prose]]', 'short']).encode()
TINY = '--data text --steps 3 --seeds 0 1 --dim 16 --depth 1 --heads 2 --seq-len 64 --batch-size 6'.split()


@pytest.fixture(autouse=True)
def text(folder):
    """What there is to train on."""
    (folder / 'text').write_bytes(TEXT)


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


def test_the_code_alone_is_learned():
    answer, line = Answer('Köln'.encode() + END + b'de'), b'prose\0 of a kind'
    batch = to_batch([answer, line])
    assert batch['loss_mask'][0].nonzero().flatten().tolist() == [6, 7]
    assert bytes(batch['x'][0][batch['loss_mask'][0]].tolist()) == b'de'
    assert batch['loss_mask'][1].tolist() == [True] * len(line)
    assert 'loss_mask' not in to_batch([line])
    packed = to_batch([answer, line], 'packed', 32)
    assert packed['loss_mask'].sum() == 2 + len(line)
    assert packed['loss_mask'].shape == packed['x'].shape


def test_kinds_are_drawn_one_to_one():
    both = OneToOne([b'a', b'b'], [b'1', b'2', b'3'])
    assert sorted(both) == [b'1'] * 2 + [b'2'] * 2 + [b'3'] * 2 + [b'a'] * 3 + [b'b'] * 3
    with pytest.raises(IndexError):
        both[12]


def test_those_who_cannot_read():
    held_out = [Answer(text) for text in (b'A\0de', b'A\0fr', b'B\0fr', b'C\0es')]
    assert guesses(held_out, [Answer(b'X\0de'), Answer(b'Y\0de'), Answer(b'Z\0fr')]) == (0.25, 0.75)


def test_answers_are_reported_apart():
    found = [SequenceCost(9, 2, 4.0, True), SequenceCost(9, 2, 8.0), SequenceCost(5, 4, 8.0)]
    rows = report(found, 257)
    assert [(row.lengths, row.over_tokens, row.right) for row in rows] == [
        ('answers', 3.0, 0.5),
        ('prose', 2.0, None),
        ('all', 2.5, None),
    ]
    assert [row.right for row in report(found[2:], 257)] == [None, None]


def test_right_is_what_greedy_decoding_says():
    """The network says the byte after the one it reads: of b'cd', c is right after b, not after a."""

    class Next(torch.nn.Module):
        max_seq_len = 64

        def forward(self, x, **kwargs):
            return torch.nn.functional.one_hot((x + 1) % 256, 256).float() * 9

    from enwik8.report import costs

    class Wrapper(torch.nn.Module):
        def forward(self, x, lens, loss_mask, return_outputs, return_breakdown):
            from types import SimpleNamespace

            assert return_outputs
            assert return_breakdown
            weight = loss_mask[:, 1:].float()
            return 0.0, (Next()(x[:, :-1]), None), SimpleNamespace(weight=weight, token_loss=weight)

    answers = [Answer(b'Q' + END + code) for code in (b'\1\2', b'\1\3', b'\2\3')]
    assert [cost.is_right for cost in costs(Wrapper(), [to_batch(answers)])] == [True, False, False]


# the whole


@pytest.mark.slow
def test_every_weighting_starts_alike_and_sees_the_same():
    """Of one seed the first token losses and every batch are equal; of two they are not."""
    seen: dict[tuple[str, int], list] = {}
    options = compare_weightings.judged(compare_weightings.Config(
        task='mixed', data='text', steps=3, dim=16, depth=1, heads=2, seq_len=64, batch_size=6
    ))  # fmt: skip

    def note(model, args, kwargs):
        key = (model.loss_weighting, run.seed)
        with torch.no_grad():
            found = type(model).forward(model, **{**kwargs, 'return_breakdown': True})[-1].token_loss
        seen.setdefault(key, []).append((kwargs['x'], found))

    build = train_enwik8.build_model

    def build_noted(config):
        model = build(config)
        model.register_forward_pre_hook(note, with_kwargs=True)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_enwik8, 'build_model', build_noted)
        for weighting, seed in (('token', 0), ('sequence', 0), ('token', 1)):
            run = compare_weightings.run_config(options, weighting, seed)
            train_enwik8.train(replace(run, validate_every=99, checkpoint_every=None), on_step=lambda step: None)
    token, sequence, other = (seen[key][:3] for key in (('token', 0), ('sequence', 0), ('token', 1)))
    assert len(token) == 3
    assert all(torch.equal(ours[0], theirs[0]) for ours, theirs in zip(token, sequence, strict=True))
    assert torch.equal(token[0][1], sequence[0][1])
    assert not torch.equal(token[2][1], sequence[2][1])  # they were trained otherwise
    assert not (token[0][0].shape == other[0][0].shape and torch.equal(token[0][0], other[0][0]))


@pytest.mark.parametrize('task', ['lines', 'mixed'])
def test_the_whole_of_it(task, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '160')
    compare_weightings.main([*TINY, '--task', task, '--weightings', 'token', 'sequence'])
    out = capsys.readouterr().out
    runs = [line.partition(':')[0] for line in out.splitlines() if ' to go' in line]
    assert runs == [f'compare-{task}-{weighting}-{seed}' for weighting in ('token', 'sequence') for seed in (0, 1)]
    assert "'sequence' against 'token': " in out
    assert 'sequence - token' in out
    assert ('over 6 held-out questions (bootstrap' in out) == (task == 'mixed')
    assert compare_weightings.run_config(compare_weightings.Config(name='a'), 'token', 0).resume
    folder = Path('runs', f'compare-{task}')
    assert (folder / 'comparison.png').read_bytes().startswith(b'\x89PNG')
    results = json.loads((folder / 'results.json').read_text())
    assert results['steps'] == {'token': [3, 3], 'sequence': [3, 3]}
    assert len(results['reports']) == 2 * 2 * 3
    measured = results['measured']['all: over tokens']
    assert all(len(measured[weighting]) == 2 for weighting in ('token', 'sequence'))
    gap = (sum(measured['sequence']) - sum(measured['token'])) / 2
    assert results['difference']['all: over tokens']['sequence']['mean'] == pytest.approx(gap)
    assert ('answers that are right, %' in results['measured']) == (task == 'mixed')

    def never(config, on_step):
        raise AssertionError(f'{config.name} is trained again')

    monkeypatch.setattr(train_enwik8, 'train', never)
    compare_weightings.main([*TINY, '--task', task, '--weightings', 'token', 'sequence'])
    assert capsys.readouterr().out == ''.join(line for line in out.splitlines(True) if ' to go' not in line)
    compare_weightings.main([*TINY, '--task', task, '--seeds', '1', '--weightings', 'token', 'sequence'])
    out = capsys.readouterr().out
    assert 'of one seed, nothing can be told from noise' in out
    assert f'{task}, 3 steps, 1 seed, learning rates: all 0.002;' in out
    with pytest.raises(SystemExit):
        compare_weightings.main([*TINY, '--task', task, '--steps', '4', '--weightings', 'token'])
    assert f'runs/compare-{task}-token-0 was trained with --steps 3, not 4: choose another' in capsys.readouterr().err


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
    assert aims('sequence', rows(1.0, 2.0, 3.0, right=0.25)) == {'answers': 1.0, 'answers that are right, %': 25.0}


def test_the_mean_that_square_optimises():
    """Of 4 and of 16 targets with 8 bits each: (8/√4 + 8/√16) / (√4 + √16)."""
    [*_, row] = report([SequenceCost(5, 4, 8.0), SequenceCost(17, 16, 8.0)])
    assert row.over_square == pytest.approx((8 / 2 + 8 / 4) / (2 + 4))


def test_the_grid_goes_on_at_its_edge():
    assert tuning('token', _1=3.0, _2=2.0, _4=2.5).beyond() is None
    assert tuning('token', _1=1.0, _2=2.0).beyond() == 0.5
    assert tuning('token', _1=3.0, _2=2.0).beyond() == 4.0
    diverged = Tuning('token', {1.0: {OVER_TOKENS: 3.0}, 2.0: {OVER_TOKENS: 2.0}, 4.0: {}})
    assert (diverged.rate, diverged.beyond()) == (2.0, None)
    assert 'edge of the grid' in tuning('token', _1=3.0, _2=2.0).sentence()
    assert 'edge of the grid' not in diverged.sentence()
    reports = {2.0: [[Report(1, rows(1.0), 0.0)], []], 1.0: [[Report(1, rows(v), 0.0)] for v in (1.0, 4.0)]}
    assert Tuning.of_reports('token', reports).measured == {1.0: {OVER_TOKENS: 2.5}, 2.0: {}}


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
    monkeypatch.setenv('COLUMNS', '160')
    command = [*TINY, '--weightings', 'token', 'sequence', '--learning-rates', '1e-3', '2e-3', '4e-3']
    compare_weightings.main(command)
    out = capsys.readouterr().out
    assert [rate for weighting, rate, seed in trained if weighting == 'sequence' and seed == 100] == [
        1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3
    ]  # fmt: skip
    assert {seed for _, rate, seed in trained if rate == 1e-3} == {100, 101}
    assert [run for run in trained if run[2] < 2] == [  # at own rates, then at the shared one what is not there
        ('token', 2e-3, 0), ('token', 2e-3, 1), *(('sequence', rate, seed) for rate in (16e-3, 2e-3) for seed in (0, 1))
    ]  # fmt: skip
    assert "'token' trains at 0.002, the best by 'all: over tokens'." in out
    assert "'sequence' trains at 0.016, the best by 'all: over sequences'" in out
    assert 'learning rates: token 0.002, sequence 0.016;' in out
    assert 'learning rates: all 0.002;' in out
    assert 'diverged' in out
    assert '6 steps in 6 s' not in out
    assert '12 steps in 6 s, 0.500 s each' in out
    folder = Path('runs', 'compare-lines')
    assert {path.name for path in folder.iterdir()} == {
        'comparison.png', 'comparison_at_own_rates.png', 'rates.png', 'results.json'
    }  # fmt: skip
    results = json.loads((folder / 'results.json').read_text())
    assert results['at_own_rates']['measured'][OVER_TOKENS]['sequence'] == [1.0, 1.001]
    assert results['measured'][OVER_TOKENS]['sequence'] == pytest.approx([4.0, 4.001])
    trained.clear()
    compare_weightings.main(command)
    assert {rate for _, rate, _ in trained} == {32e-3}  # what diverged left nothing to keep


def test_a_diverged_run_of_the_report_is_an_error(capsys):
    with pytest.raises(SystemExit):
        compare_weightings.main([*TINY, '--learning-rate', '1e18', '--steps', '9'])
    assert 'the loss is not finite at step' in capsys.readouterr().err


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
def test_a_run_until_flat_ends_early_and_goes_on_where_it_was(decay, capsys):
    """With a threshold that everything is below, at the first report at which enough lie in the second half."""
    options = ['--steps', '30', '--until-flat', '1e6', '--decay', decay, '--weightings', 'token', '--seeds', '0']
    compare_weightings.main([*TINY, *options])
    end = {'none': 12, 'linear': 15}[decay]  # four reports, at 6 to 12; the decay takes a quarter of 12 steps
    results = json.loads(Path('runs/compare-lines/results.json').read_text())
    assert results['steps'] == {'token': [end]}
    lines = Path('runs/compare-lines-token-0/metrics.jsonl').read_text().splitlines()
    rates = [record['learning_rate'] / 2e-3 for record in map(json.loads, lines) if 'learning_rate' in record]
    assert rates == pytest.approx([1.0] * 12 + ([1.0, 2 / 3, 1 / 3] if decay == 'linear' else []))
    capsys.readouterr()
    compare_weightings.main([*TINY, *options])
    assert ' to go' not in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_until_flat_that_is_stopped_ends_alike():
    config = RunConfig(
        data='text', preset='tiny', dim=16, depth=1, heads=2, seq_len=64, batch_size=6, steps=40, until_flat=1e6,
        decay='linear', validate_every=2, checkpoint_every=1, name='whole',
    )  # fmt: skip
    train_enwik8.train(config, on_step=lambda step: None)

    def stop(step: int) -> None:
        if step == 14:  # in its decay
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_enwik8.train(replace(config, name='cut'), on_step=stop)
    train_enwik8.train(replace(config, name='cut', resume=True), on_step=lambda step: None)
    train_enwik8.train(replace(config, name='cut', resume=True), on_step=pytest.fail)  # it is at its end
    whole, cut = (
        [json.loads(line) for line in Path('runs', name, 'metrics.jsonl').read_text().splitlines()]
        for name in ('whole', 'cut')
    )
    assert [r.get('train_loss') for r in whole] == [r.get('train_loss') for r in cut]
    assert [r.get('learning_rate') for r in whole] == [r.get('learning_rate') for r in cut]


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
    options = '--task mixed --weightings token --seeds 0 --steps 40 --learning-rate 0.03'
    compare_weightings.main([*TINY, *options.split()])
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


def test_all_answers_are_held_out_beside_the_others():
    few = split_text(TEXT, 'mixed', 257, 1).held_out
    assert sum(isinstance(sequence, Answer) for sequence in few) == 12
    assert len(few) == 13


def test_sums_are_right_and_on_one_side():
    split = split_sums(b'', 257)
    trained = [split[0][index] for index in range(2400)]
    assert trained[:50] == [split[0][index] for index in range(50)]
    lengths = Counter()
    for sequence in (*trained, *split[1]):
        question, _, answer = sequence.partition(END)
        d = len(question) // 3
        letters = b'abcdefghijklm'
        assert (question[::3], answer[::2]) == (letters[:d], letters[: d + 1])
        a, b = (int(question[start::3][::-1]) for start in (1, 2))
        assert int(answer[1::2][::-1]) == a + b
        lengths[d, sequence in split[1]] += 1
    assert [lengths[d, False] for d in range(1, 13)] == [200] * 12
    assert all(lengths[d, True] >= 95 for d in range(3, 13))
    assert set(trained).isdisjoint(split[1])
    with pytest.raises(UsageError, match=r'^--seq-len must be at least 62 for sums, got 61$'):
        split_sums(b'', 62)
    assert max(map(len, split_sums(b'', 63)[1])) == 63


def test_answers_alone_are_reported_by_their_length():
    found = [SequenceCost(8, 4, 4.0, True), SequenceCost(63, 26, 26.0), SequenceCost(58, 24, 12.0, True)]
    assert [(row.lengths, row.sequences, row.right) for row in report(found, 257)] == [
        ('4 to 9', 1, 1.0),
        ('22 to 27', 2, 0.5),
        ('all', 3, 2 / 3),
    ]


def test_sums_as_a_task(monkeypatch, capsys):
    """Without a text and without a network; few are held out, for the sake of time."""
    monkeypatch.setattr('enwik8.sums.HELD_OUT_PER_LENGTH', 2)
    monkeypatch.setattr('enwik8.text.connect', pytest.fail)
    monkeypatch.setenv('COLUMNS', '160')
    compare_weightings.main(['--task', 'sums', *TINY[2:], '--weightings', 'token', 'sequence'])
    out = capsys.readouterr().out
    results = json.loads(Path('runs/compare-sums/results.json').read_text())
    assert '22 to 27 bytes: right, %' in results['measured']
    assert next(iter(results['measured'])) == 'answers that are right, %'
    assert 20 <= results['answers'] <= 24
    assert f'{results["answers"]} answers are held out' in out


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('--learning-rates 1e-3 0', '--learning-rates must be above 0, got 0.0'),
        ('--learning-rates 1e-3 1e-3', '--learning-rates must differ from one another, got 0.001 0.001'),
        ('--learning-rates 1e-3 --tuning-seeds 1 2', '--tuning-seeds must be others than --seeds'),
        ('--until-flat 0', '--until-flat must be above 0, got 0.0'),
        ('--seeds -1', '--seeds must be at least 0, got -1'),
        ('--seeds 1 1', '--seeds must differ from one another, got 1 1'),
        ('--weightings token token', '--weightings must differ from one another'),
        ('--data nowhere', 'cannot read nowhere: No such file'),
        ('--data builtin --task mixed', 'too few lines like [[de:Titel]]'),
    ],
)
def test_what_is_no_good_is_one_line(capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        compare_weightings.main([*TINY, *options.split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(Path('.').rglob('*.jsonl'))
