"""What every test starts from: one thread, a fixed seed, few and reproducible hypothesis examples."""

import os
import random
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import torch.distributed as dist
import x_transformers

torch.set_num_threads(1)  # the tensors here are tiny: a second thread costs more than it brings

hypothesis.settings.register_profile(
    'xtloss',
    deadline=None,
    derandomize=True,
    max_examples=int(os.environ.get('XTLOSS_EXAMPLES', 20)),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # examples are seeds: a smaller one says no more
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile('xtloss')


EXAMPLES = Path(__file__).parents[1] / 'examples'
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / 'benchmarks')]  # as the examples find their parts

# what a fault should be met in first, nearest to where it is
NEAREST = 'checks weighting packing fused_numbers fused auxiliary unpad laws'.split()
LEFT_OUT = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run a test that is asked for by its name here and now, in one process, though it be slow."""
    if any('::' in argument for argument in config.args):
        config.option.markexpr = '' if config.option.markexpr == 'not slow' else config.option.markexpr
        config.option.numprocesses = 0


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count the slow ones, which pytest-xdist's processes tell the one that reports."""
    config, slow = items[0].config, sum(item.get_closest_marker('slow') is not None for item in items)
    config.stash[LEFT_OUT] = slow
    if hasattr(config, 'workeroutput'):
        config.workeroutput['left_out'] = slow


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Be told; each process leaves out the same."""
    node.config.stash[LEFT_OUT] = getattr(node, 'workeroutput', {}).get('left_out', 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what was left out, and how it is run."""
    left_out = config.stash.get(LEFT_OUT, 0)
    if left_out and config.option.markexpr == 'not slow':
        terminalreporter.write_line(f'{left_out} slow cases were left out: pytest -m "" runs them too')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests of small things; the others keep their order."""
    place = {f'test_{name}': number for number, name in enumerate(NEAREST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(NEAREST)))


def _devices() -> list[str]:
    return ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same random numbers, whichever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=_devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device of this machine in turn."""
    return torch.device(request.param)


@pytest.fixture(params=['auto', False], ids=['auto', 'not fused'])
def fused(request: pytest.FixtureRequest) -> str | bool:
    """Where head and loss may be one, and where they are not."""
    return request.param


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dist.init_process_group('gloo', store=dist.FileStore(str(tmp_path / 'store'), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@cache
def _knows_next() -> bool:
    try:
        torch.compile(lambda x: (x, next(iter([]), None)), fullgraph=True, backend='eager')(torch.ones(()))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


def _next(iterator: Iterator[Any], *default: Any) -> Any:
    for value in iterator:
        return value
    if not default:
        raise StopIteration
    return default[0]


@pytest.fixture
def whole_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have torch.compile(fullgraph=True) take the network, so that a break is ours.

    x-transformers calls `next(iterator, None)`, at which an older torch breaks the graph.
    """
    torch._dynamo.reset()
    if not _knows_next():
        monkeypatch.setattr(x_transformers.x_transformers, 'next', _next, raising=False)
    yield
    torch._dynamo.reset()
