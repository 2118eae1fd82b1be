"""The README's Python blocks, run in the order in which a reader meets them, each seeing the names of those before."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / 'README.md'
BLOCK = re.compile(r'(?P<reason><!-- not run: .+? -->\s*)?^```python\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL)


def python_blocks(text: str) -> list[tuple[int, str]]:
    """The line and code of every ```python block, but for those right after a `<!-- not run: reason -->`."""
    return [
        (text.count('\n', 0, found.start('code')), found['code'])
        for found in BLOCK.finditer(text)
        if found['reason'] is None
    ]


def test_blocks_run_in_order() -> None:
    blocks = python_blocks(README.read_text())
    assert blocks, 'README.md has no ```python block'
    names: dict[str, object] = {'__name__': 'readme'}
    for line, code in blocks:
        exec(
            compile('\n' * line + code, str(README), 'exec'), names
        )  # the blank lines make tracebacks name README lines


def test_what_is_a_block() -> None:
    text = (
        'a\n```python\nx = 1\n```\n```bash\ny\n```\n'
        '<!-- not run: needs two GPUs -->\n```python\nz\n```\n\n```python\nw = 2\n```\n'
    )
    assert python_blocks(text) == [(2, 'x = 1\n'), (13, 'w = 2\n')]
