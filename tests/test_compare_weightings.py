"""The comparison of weightings: its statistics by hand, its task of titles, and the whole of it for three steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import compare_weightings
import pytest
import torch
import train_enwik8
from enwik8.mixed import END, Answer, OneToOne, guesses, split_mixed
from enwik8.over_seeds import difference, slope, spread, t_quantile
from enwik8.report import SequenceCost, report
from enwik8.sequences import split_text, to_batch
from enwik8.text import DataError

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


def test_a_text_without_titles_is_refused(capsys):
    with pytest.raises(DataError, match=r'^too few lines like \[\[de:Titel\]\]'):
        split_mixed(b'\n'.join(line.encode() for line in PROSE), 257)
    with pytest.raises(DataError, match=r'^too little prose for mixed'):
        split_mixed(b'\n'.join(line.encode() for line in TITLES), 257)


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
    assert "'sequence' against 'token': " in out
    assert 'sequence - token' in out
    folder = Path('runs', f'compare-{task}')
    assert (folder / 'comparison.png').read_bytes().startswith(b'\x89PNG')
    results = json.loads((folder / 'results.json').read_text())
    assert results['steps'] == 3
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
    assert capsys.readouterr().out == out
    compare_weightings.main([*TINY, '--task', task, '--seeds', '1', '--weightings', 'token', 'sequence'])
    assert 'of one seed, nothing can be told from noise' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compare_weightings.main([*TINY, '--task', task, '--steps', '4', '--weightings', 'token'])
    assert f'runs/compare-{task}-token-0 was trained with --steps 3, not 4: choose another' in capsys.readouterr().err


def test_an_interrupted_run_goes_on(monkeypatch, capsys):
    """It ends as one that nobody interrupted."""
    whole = [*TINY, '--weightings', 'token', '--steps', '16', '--seeds', '0']
    compare_weightings.main([*whole, '--name', 'whole'])
    train = train_enwik8.train

    def interrupted(config, on_step):
        def stop(step):
            if step == 7:
                raise KeyboardInterrupt

        train(config, on_step=stop)

    monkeypatch.setattr(train_enwik8, 'train', interrupted)
    with pytest.raises(SystemExit) as stop:
        compare_weightings.main([*whole, '--name', 'cut'])
    assert stop.value.code == 130
    taken = []
    monkeypatch.setattr(train_enwik8, 'train', lambda config, on_step: train(config, on_step=taken.append))
    compare_weightings.main([*whole, '--name', 'cut'])
    assert taken == list(range(7, 17))  # a checkpoint after each two steps
    found = [json.loads(Path('runs', name, 'results.json').read_text())['reports'] for name in ('whole', 'cut')]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
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
