"""The examples in docstrings run, and every public name has one that needs it."""

import doctest
import importlib
import pkgutil
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from x_transformers import ContinuousTransformerWrapper, Decoder, TransformerWrapper, XTransformer

import xtloss

FLAGS = doctest.NORMALIZE_WHITESPACE
SIZES: dict[str, Any] = {'depth': 1, 'heads': 2, 'max_seq_len': 16}
EQUATIONS = {'LossBreakdown'}  # whose docstring is code already


def networks() -> dict[str, Any]:
    layers = partial(Decoder, dim=16, depth=1, heads=2, attn_dim_head=8, verbose=False)
    return {
        'XLAutoregressiveWrapper': TransformerWrapper(
            num_tokens=16, max_seq_len=8, max_mem_len=8, attn_layers=layers()
        ),
        'ContinuousAutoregressiveWrapper': ContinuousTransformerWrapper(
            dim_in=3, dim_out=3, max_seq_len=16, attn_layers=layers()
        ),
        'others': TransformerWrapper(num_tokens=16, max_seq_len=16, attn_layers=layers(rotary_pos_emb=True)),
    }


def modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(xtloss.__path__, 'xtloss.')
    return [xtloss, *(importlib.import_module(name) for _, name, _ in found)]


def examples() -> list[doctest.DocTest]:
    found = [test for module in modules() for test in doctest.DocTestFinder().find(module) if test.examples]
    return sorted({test.name: test for test in found}.values(), key=lambda test: test.name)


@pytest.mark.parametrize('test', examples(), ids=lambda test: test.name.rpartition('.')[2])
def test_examples_run(test: doctest.DocTest) -> None:
    """With what a reader has at hand: a network, a model, batches."""
    nets, name = networks(), test.name.rpartition('.')[2]
    model: Any = xtloss.AutoregressiveWrapper(nets['others'])
    if name == 'upgrade_':
        parts = {f'{side}_{option}': value for side in ('enc', 'dec') for option, value in SIZES.items()}
        model = XTransformer(dim=16, enc_num_tokens=16, dec_num_tokens=16, **parts)
    test.globs |= vars(xtloss) | {
        'torch': torch,
        'partial': partial,
        'DataLoader': DataLoader,
        'DistributedDataParallel': DistributedDataParallel,
        'net': nets.get(name, nets['others']),
        'model': model,
        'micro_batches': [xtloss.collate([[1, 2, 3], [4]]), xtloss.collate([[5, 6]])],
        'dataset': [[1, 2, 3], [4], [5, 6]],
    }
    said: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert not said, ''.join(said)


def test_every_public_name_has_one() -> None:
    having = {test.name.rpartition('.')[2] for test in examples()}
    assert set(xtloss.__all__) - EQUATIONS <= having
