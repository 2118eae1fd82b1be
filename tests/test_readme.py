"""The Python blocks of README and guides, run in the order in which a reader meets them, and those of docstrings.

And what these pages and the gallery point to is there, and every public name has an example.
"""

import doctest
import importlib
import pkgutil
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from x_transformers import ContinuousTransformerWrapper, Decoder, TransformerWrapper, XTransformer

import xtloss

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / 'examples'
README, GALLERY, CHOOSING = ROOT / 'README.md', EXAMPLES / 'README.md', EXAMPLES / 'choosing.md'
RECIPES = EXAMPLES / 'recipes.md'
BLOCK = re.compile(r'(?P<reason><!-- not run: .+? -->\s*)?^```python\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize('page', [README, CHOOSING, RECIPES], ids=['README', 'choosing', 'recipes'])
def test_blocks_run_in_order(page: Path) -> None:
    """All of them but for those right after a `<!-- not run: reason -->`."""
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    assert 0 < len(blocks) == text.count('```python')
    names: dict[str, object] = {'__name__': 'readme'}
    for block in blocks:
        if block['reason'] is None:
            line = text.count('\n', 0, block.start('code'))  # blank lines make tracebacks name those of the page
            exec(compile('\n' * line + block['code'], str(page), 'exec'), names)


def anchor(heading: str) -> str:
    """The anchor that a heading has on GitHub."""
    return re.sub(r'[^\w\- ]', '', heading.strip().lower()).replace(' ', '-')


@pytest.mark.parametrize('page', [README, GALLERY, CHOOSING], ids=['README', 'gallery', 'choosing'])
def test_links_and_commands_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r'\]\(([^)]+)\)', text) if not link.startswith('http')]
    scripts = re.findall(r'\bpython (\S+\.py)', text)
    assert links
    assert scripts
    for script in scripts:
        assert (ROOT / script).is_file(), script
    for path, _, heading in (link.partition('#') for link in links):
        target = page.parent / path if path else page
        assert target.exists(), path
        if heading:
            assert heading in {anchor(line.lstrip('#')) for line in target.read_text().splitlines() if line[:1] == '#'}


def test_every_script_and_figure_is_in_the_gallery() -> None:
    text = GALLERY.read_text()
    scripts = [path for path in GALLERY.parent.rglob('*.py') if 'import tyro' in path.read_text()]
    for path in (*scripts, *GALLERY.parent.glob('figures/*')):
        assert str(path.relative_to(GALLERY.parent)) in text, path


def docstrings() -> list[doctest.DocTest]:
    """The docstrings of the package that have examples."""
    found = pkgutil.walk_packages(xtloss.__path__, 'xtloss.')
    modules = [xtloss, *(importlib.import_module(name) for _, name, _ in found)]
    tests = [test for module in modules for test in doctest.DocTestFinder().find(module) if test.examples]
    return sorted({test.name: test for test in tests}.values(), key=lambda test: test.name)


def network_for(name: str) -> Any:
    """The network that the example of a name speaks of."""
    layers = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, rotary_pos_emb=True, verbose=False)
    if name == 'ContinuousAutoregressiveWrapper':
        return ContinuousTransformerWrapper(dim_in=3, dim_out=3, max_seq_len=16, attn_layers=layers)
    memories = {'max_seq_len': 8, 'max_mem_len': 8} if name == 'XLAutoregressiveWrapper' else {'max_seq_len': 16}
    return TransformerWrapper(num_tokens=16, attn_layers=layers, **memories)


@pytest.mark.parametrize('test', docstrings(), ids=lambda test: test.name.rpartition('.')[2])
def test_examples_of_docstrings_run(test: doctest.DocTest) -> None:
    """With what a reader has at hand: a network, a model, batches."""
    name = test.name.rpartition('.')[2]
    model: Any = xtloss.AutoregressiveWrapper(network_for('AutoregressiveWrapper'))
    if name == 'upgrade_':
        sizes = {'num_tokens': 16, 'depth': 1, 'heads': 2, 'max_seq_len': 16}
        parts = {f'{side}_{option}': value for side in ('enc', 'dec') for option, value in sizes.items()}
        model = XTransformer(dim=16, **parts)
    test.globs |= vars(xtloss) | {
        'torch': torch,
        'partial': partial,
        'DataLoader': DataLoader,
        'DistributedDataParallel': DistributedDataParallel,
        'net': network_for(name),
        'model': model,
        'micro_batches': [xtloss.collate([[1, 2, 3], [4]]), xtloss.collate([[5, 6]])],
        'dataset': [[1, 2, 3], [4], [5, 6]],
    }
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert not said, ''.join(said)


def test_every_public_name_has_an_example() -> None:
    having = {test.name.rpartition('.')[2] for test in docstrings()}
    assert set(xtloss.__all__) - {'LossBreakdown'} <= having  # whose docstring is code already
