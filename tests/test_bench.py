"""The benchmarks run, compare like with like, and read peak memory and traffic rightly."""

import sys
from pathlib import Path
from typing import Any

import bench_loss as bench
import bench_packing
import bench_peers
import bench_unpad
import pytest
import torch
import traffic
from fused_problem import has_compiler

TINY: dict[str, Any] = {'tokens': 64, 'dim': 32, 'vocab': 100, 'depth': 1, 'rounds': 1, 'seconds': 0.0, 'threads': 1}
compiled = pytest.mark.skipif(not has_compiler(), reason='no compiler')


def test_peers_agree() -> None:
    """They give one loss and one gradient, but for the bare products, and for upstream, whose targets are shifted."""
    for uncounted in (0.0, 0.75):
        p = bench_peers.problem(bench.Shape(64, 32, 100, uncounted))
        peers = [bench.HEADS[name] for name in bench.HEADS.keys() - {bench.PRODUCTS, bench.BY_COLUMNS, bench.UPSTREAM}]
        assert len(peers) >= 3
        found = [(loss := peer(p), *torch.autograd.grad(loss, [p.embed, p.head])) for peer in peers]
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-7)
        later = p._replace(embed=p.embed[:-1], target=p.target[1:])  # upstream predicts the next token of a row
        usual = bench.HEADS[bench.UPSTREAM](p._replace(rows=1))
        assert usual.item() == pytest.approx(bench.HEADS[bench.OURS](later).item(), rel=1e-5)


def test_one_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.compare(bench.Config(**TINY, uncounted=0.5, memory=False, out=tmp_path))
    out = capsys.readouterr().out
    assert out.startswith(f'torch {torch.__version__}, x-transformers ')
    for peer in (*bench.HEADS, bench.STEP_UPSTREAM, bench.STEP_OURS):
        assert f'| {peer} |' in out
    assert (tmp_path / 'bench_loss.png').stat().st_size > 10_000


def test_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = bench.suite_shapes(bench.Shape(1, 1, 1))
    small = [s._replace(tokens=s.tokens // 64, dim=32, vocab=100 + i, depth=1) for i, s in enumerate(shapes)]
    monkeypatch.setattr(bench, 'measure_memory', lambda runs, threads: {run: 10**6 + run[1].tokens for run in runs})
    _, rows = bench.suite(bench.Config(**TINY), bench.SuiteShapes(*small))
    heads = [1.1, 1.12, 0.5] + ([0.75, None] if bench.CHUNKED[0] in bench.HEADS else [])
    assert [row.at_most for row in rows] == heads + heads + [0.1, 0.16, 0.3, 0.5, 0.3, 1.03, 0.5, 0.3, 2.1, 1.1]
    assert all(row.measured is not None and row.measured > 0 for row in rows)
    assert '| over |' in bench.suite_table(rows)


def test_medians_of_speeds_and_of_ratios_within_a_round_by_hand() -> None:
    rounds = [
        {'x-transformers': (2.0, 100.0 * i), 'padded': (2.0, 200.0 * i), 'unpad': (2.0, u), 'packed': (2.5, 50.0 * i)}
        for i, u in ((1, 400.0), (2, 100.0), (6, 2400.0))
    ]
    expected = ['8', '200', '400', '400', '100', '2.00x', '4.00x', '0.50x', '2.5e-01']
    assert bench_packing.row(8, rounds).split() == expected


@pytest.mark.slow
def test_traffic(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A table with every peer; F.cross_entropy reads and writes what its operations are known to."""
    if not has_compiler():
        peers = {name: peer for name, peer in bench.HEADS.items() if name != bench.OURS}
        monkeypatch.setattr(bench, 'HEADS', peers | {bench.OURS: lambda p: None})
    bench.compare(bench.Config(**TINY | {'vocab': 4096, 'tokens': 512}, traffic=True))
    rows = dict(line.strip('| ').split(' | ', 1) for line in capsys.readouterr().out.splitlines() if ' | ' in line)
    assert rows['F.cross_entropy, flat'] == '32.0 | 16.0'
    assert rows.keys() >= bench.HEADS.keys() - {bench.PRODUCTS, bench.BY_COLUMNS}
    assert f'{bench.OURS}, as on an accelerator' in rows


@pytest.mark.slow
@compiled
def test_the_accelerated_path_moves_few_bytes() -> None:
    """One read for maximum and sum, one read and one write for the gradient: 6 in bfloat16. No scatter, no chain."""
    p = bench_peers.problem(bench.Shape(512, 48, 4096, dtype=torch.bfloat16))
    ours = bench.HEADS[bench.OURS]
    for forced, low, high in ((True, 5.5, 8.0), (False, 30.0, 80.0)):
        count = traffic.bytes_per_logit(lambda: ours(p), logits=512 * 4096, dim=48, force_accelerated=forced)
        assert low <= count <= high


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='peak memory is measured on Linux only')
def test_memory_in_a_process_of_its_own() -> None:
    shape = bench.Shape(2048, 16, 8192)
    logits = 4 * shape.tokens * shape.vocab
    memory = bench.measure_memory([(bench.PRODUCTS, shape)], threads=1)
    assert logits <= memory[bench.PRODUCTS, shape] <= 1.5 * logits


def test_unpad_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each width, with flash and without; a ratio for each filling; of batches that are filled so far."""
    config = bench_unpad.Config(widths=(16,), fillings=(0.25, 1.0), positions=64, rounds=1)
    assert [bench_unpad.lengths(f, 16, config).tolist() for f in config.fillings] == [[1, 3, 5, 8], [16] * 4]
    seen = []
    monkeypatch.setattr(bench_unpad, 'timed', lambda net, step: (seen.append(step().item()), 1.0 + len(seen) % 2))
    bench_unpad.compare(config)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert printed == [['16', 'yes', '0.50', '0.50'], ['16', 'no', '0.50', '0.50']]
    assert seen[0::2] == pytest.approx(seen[1::2])  # the loss is the same
