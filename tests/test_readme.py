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
