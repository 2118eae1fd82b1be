"""What a type checker, and so an editor, knows of a call: the loss, and what else was asked for."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xtloss import AutoregressiveWrapper, ContinuousAutoregressiveWrapper, XLAutoregressiveWrapper

ROOT = Path(__file__).parents[1]
SNIPPET = """
from typing import Any

from torch import Tensor, nn
from typing_extensions import assert_type

from xtloss import AutoregressiveWrapper, ContinuousAutoregressiveWrapper, LossBreakdown, XLAutoregressiveWrapper

Outputs = tuple[Tensor, Any]


def of_tokens(net: nn.Module, x: Tensor, flag: bool, tensors: dict[str, Tensor], anything: dict[str, Any]) -> None:
    wrapper = AutoregressiveWrapper(net, ignore_index=0, loss_weighting='square')
    wrapper(x).backward()
    loss, breakdown = wrapper(x, return_breakdown=True)
    assert_type(loss, Tensor)
    assert_type(breakdown, LossBreakdown)
    assert_type(breakdown.weight, Tensor)
    assert_type(wrapper(x, lens=x, normalizer=2.0, context=x), Tensor)
    assert_type(wrapper(x=x, return_outputs=False, return_breakdown=False), Tensor)
    assert_type(wrapper(x, False, None, x), Tensor)
    assert_type(wrapper(x, False, x, return_breakdown=True), tuple[Tensor, LossBreakdown])
    assert_type(wrapper(x, True), tuple[Tensor, Outputs])
    assert_type(wrapper(x, return_outputs=True, lens=x), tuple[Tensor, Outputs])
    assert_type(wrapper(x, True, x, x, return_breakdown=True), tuple[Tensor, Outputs, LossBreakdown])
    assert_type(wrapper(x, return_breakdown=True, return_outputs=True), tuple[Tensor, Outputs, LossBreakdown])
    assert_type(wrapper(x, return_breakdown=flag), Any)
    assert_type(wrapper(x, flag), Any)
    assert_type(wrapper(**tensors), Any)
    wrapper(**anything).backward()
    loss, breakdown = wrapper(**anything, return_breakdown=True)
    assert_type(wrapper.loss_normalizer(x), Tensor)


def of_rows(wrapper: XLAutoregressiveWrapper, x: Tensor, flag: bool, anything: dict[str, Any]) -> None:
    wrapper(x).backward()
    assert_type(wrapper(x, [x], True, 1, lens=x), Tensor)
    assert_type(wrapper(x, mems=[x], return_breakdown=False), Tensor)
    assert_type(wrapper(x, [x], return_breakdown=True), tuple[Tensor, LossBreakdown])
    assert_type(wrapper(x, return_breakdown=flag), Any)
    loss, breakdown = wrapper(**anything, return_breakdown=True)


def of_frames(wrapper: ContinuousAutoregressiveWrapper, x: Tensor, flag: bool, tensors: dict[str, Tensor]) -> None:
    wrapper(x).backward()
    assert_type(wrapper(x, 3, lens=x), Tensor)
    assert_type(wrapper(x, rollout_steps=3, return_breakdown=True), tuple[Tensor, LossBreakdown])
    assert_type(wrapper(x, return_breakdown=flag), Any)
    assert_type(wrapper(**tensors), Any)


def wrong(net: nn.Module, x: Tensor) -> None:
    loss, breakdown = AutoregressiveWrapper(net)(x, True, return_breakdown=True)  # type: ignore[misc]
    XLAutoregressiveWrapper(net)(x, return_breakdown=True).backward()  # type: ignore[attr-defined]
"""


def test_every_call_has_a_type(tmp_path: Path) -> None:
    """With mypy's cache of the package itself, where there is one."""
    pytest.importorskip('mypy')
    snippet = tmp_path / 'snippet.py'
    snippet.write_text(SNIPPET)
    options = ['--config-file', str(ROOT / 'pyproject.toml'), '--warn-unused-ignores', '--cache-dir', '.mypy_cache']
    checked = subprocess.run(
        [sys.executable, '-m', 'mypy', *options, str(snippet)],
        cwd=ROOT,
        env={**os.environ, 'MYPYPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_signatures_are_the_real_ones() -> None:
    of_tokens, of_rows, of_frames = (
        list(inspect.signature(wrapper.forward).parameters)
        for wrapper in (AutoregressiveWrapper, XLAutoregressiveWrapper, ContinuousAutoregressiveWrapper)
    )
    assert of_tokens[:5] == ['self', 'x', 'return_outputs', 'prepend_embeds', 'lens']
    assert of_rows[:5] == ['self', 'x', 'mems', 'dropout_mems', 'ttt_recurrent_steps']
    assert of_frames[:3] == ['self', 'x', 'rollout_steps']
    assert all(names[-2:] == ['return_breakdown', 'kwargs'] for names in (of_tokens, of_rows, of_frames))
