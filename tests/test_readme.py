"""The Python blocks of README and guide, run in the order in which a reader meets them, each seeing the names before.

And what these pages and the gallery point to is there.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / 'examples'
README, GALLERY, CHOOSING = ROOT / 'README.md', EXAMPLES / 'README.md', EXAMPLES / 'choosing.md'
RECIPES = EXAMPLES / 'recipes.md'
BLOCK = re.compile(r'(?P<reason><!-- not run: .+? -->\s*)?^```python\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL)


def python_blocks(text: str) -> list[tuple[int, str]]:
    """The line and code of every ```python block, but for those right after a `<!-- not run: reason -->`."""
    return [
        (text.count('\n', 0, found.start('code')), found['code'])
        for found in BLOCK.finditer(text)
        if found['reason'] is None
    ]


@pytest.mark.parametrize('page', [README, CHOOSING, RECIPES], ids=['README', 'choosing', 'recipes'])
def test_blocks_run_in_order(page: Path) -> None:
    blocks = python_blocks(page.read_text())
    assert blocks, f'{page.name} has no ```python block'
    names: dict[str, object] = {'__name__': 'readme'}
    for line, code in blocks:
        exec(
            compile('\n' * line + code, str(page), 'exec'), names
        )  # the blank lines make tracebacks name the page's lines


def test_what_is_a_block() -> None:
    text = (
        'a\n```python\nx = 1\n```\n```bash\ny\n```\n'
        '<!-- not run: needs two GPUs -->\n```python\nz\n```\n\n```python\nw = 2\n```\n'
    )
    assert python_blocks(text) == [(2, 'x = 1\n'), (13, 'w = 2\n')]


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
