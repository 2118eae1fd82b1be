"""What the table of wrong things, `test_bad_table.py`, is beside: good input, and no bare assert."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import decoder

import xtloss
from xtloss import AutoregressiveWrapper

B, N = 4, 128
X = torch.zeros(B, N, dtype=torch.long)
FLAGS = torch.ones(B, N, dtype=torch.bool)
ROWS = torch.ones(B, dtype=torch.long)


@pytest.mark.parametrize('fused', ['auto', False])
def test_good_input_of_every_dtype_is_taken(fused: str | bool) -> None:
    """The twin of the table: what it refuses is refused for the reason it names."""
    wrapper = AutoregressiveWrapper(decoder(max_seq_len=N), fused=fused)
    for name in 'uint8 uint16 uint32 uint64 int8 int16 int32 int64'.split():
        integer = getattr(torch, name)
        rows = {'lens': (ROWS * 5).to(integer), 'seq_start_pos': ROWS.to(integer)}
        for floating in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            for weight in (torch.ones(B, dtype=floating), torch.ones(B, N, dtype=floating)):
                z = torch.tensor(2.0, dtype=floating)
                loss = wrapper(X.to(integer), **rows, mask=FLAGS, loss_mask=FLAGS, loss_weight=weight, normalizer=z)
                assert loss.isfinite()
        assert wrapper(X.to(integer), segment_ids=(X + 1).to(integer), normalizer=ROWS[0].to(integer)).isfinite()
    for number in (1, np.int64(1), np.float16(1), np.float64(1)):
        assert wrapper(X, normalizer=number).isfinite()


def test_no_assert_in_the_package() -> None:
    files = list(Path(xtloss.__file__).parent.glob('**/*.py'))
    assert files
    for path in files:
        found = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        assert not found, f'{path.name}: bare assert in lines {found}, gone under python -O'


SCRIPT = """
import torch, x_transformers as xt, xtloss
layers = xt.Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, verbose=False)
wrapper = xtloss.AutoregressiveWrapper(xt.TransformerWrapper(num_tokens=11, max_seq_len=8, attn_layers=layers))
x = torch.ones(2, 8).long()
print(bool(wrapper(x, lens=torch.tensor([8, 3])).isfinite()))
for bad in (dict(lens=torch.ones(2)), dict(mask=torch.ones(2, 7).bool()), dict(normalizer=-1.0)):
    try:
        wrapper(x, **bad)
    except (TypeError, ValueError) as error:
        print(type(error).__name__, error)
try:
    xtloss.AutoregressiveWrapper(wrapper.net, loss_weighting='tokens')
except ValueError as error:
    print(error)
"""


def test_python_minus_o_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    exec(SCRIPT, {})
    want = capsys.readouterr().out
    got = subprocess.run(
        [sys.executable, '-O', '-W', 'ignore', '-c', SCRIPT], capture_output=True, text=True, check=True
    )
    assert got.stdout == want
    assert len(want.splitlines()) == 5
