"""The source of the package: imports go one way (weighting, losses, packing, wrappers), and nothing asserts."""

import ast
from pathlib import Path

import pytest

import xtloss

ROOMS = ['weighting', 'losses', 'packing', 'wrappers']
PACKAGE = Path(xtloss.__file__).parent
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob('*.py') if path.parent != PACKAGE)


def imported_rooms(source: str) -> set[str]:
    """The parts of the package that a file imports from, whatever form the import has."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'relative imports hide the direction'
            modules = [f'{node.module}.{alias.name}' for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        rooms |= {module.split('.')[1] for module in modules if module.startswith('xtloss.')}
    return rooms


def test_every_file_is_in_a_room() -> None:
    assert {path.parts[0] for path in FILES} == set(ROOMS)
    assert {path.name for path in PACKAGE.glob('*.py')} == {'__init__.py', 'arguments.py'}


@pytest.mark.parametrize('path', FILES, ids=str)
def test_a_room_imports_from_itself_and_those_before(path: Path) -> None:
    allowed = {'arguments', *ROOMS[: ROOMS.index(path.parts[0]) + 1]}
    assert imported_rooms((PACKAGE / path).read_text()) <= allowed


@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('*.py')), ids=lambda path: path.stem)
def test_python_minus_o_changes_nothing(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f'a bare assert in line {node.lineno}'
        assert getattr(node, 'id', None) != '__debug__'
