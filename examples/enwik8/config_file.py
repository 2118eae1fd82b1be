"""Options from a file: a run's config.json, or YAML written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from command_line import UsageError
from enwik8.config import FOR_ONE_CALL, Config


def load_config(path: Path) -> Config:
    """Return the options in a file, the others at their defaults. Raises `UsageError`."""
    hints = {name: hint for name, hint in get_type_hints(Config).items() if name not in FOR_ONE_CALL}
    options = read_mapping(path)
    if unknown := [str(name) for name in options if name not in hints]:
        raise UsageError(f'{path}: there is no option {unknown[0]!r}')
    return Config(**{name: fitted(value, hints[name], f'{path}: {name}') for name, value in options.items()})


def read_mapping(path: Path) -> dict[Any, Any]:
    """Read a file of JSON or YAML. Raises `UsageError`."""
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == '.json' else read_yaml(text)
    except OSError as error:
        raise UsageError(f'cannot read {path}: {error.strerror}') from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are
        raise UsageError(f'{path}: {" ".join(str(error).split())}') from error
    if not isinstance(found, dict):
        raise UsageError(f'{path} must hold options by name')
    return found


def read_yaml(text: str) -> Any:
    """Read YAML. Raises `ValueError`."""
    try:
        import yaml  # accelerate brings it
    except ImportError as error:
        raise ValueError('YAML wants its package: pip install pyyaml') from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def fitted(value: Any, hint: Any, where: str) -> Any:
    """Return a value that an option may have. YAML takes 1e-4 for a text. Raises `UsageError`."""
    if fits(value, hint):
        return value
    if isinstance(value, str) and fits(0.0, hint):
        try:
            return float(value)
        except ValueError:
            pass
    raise UsageError(f'{where} must be {described(hint)}, got {value!r}')


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; True is no number here, and 1 is a float."""
    if get_origin(hint) is Literal:
        return type(value) is str and value in get_args(hint)
    if options := get_args(hint):
        return any(fits(value, option) for option in options)
    return type(value) is hint or (hint is float and type(value) is int)


def described(hint: Any) -> str:
    """Name a type for a person."""
    if get_origin(hint) is Literal:
        return ' or '.join(map(repr, get_args(hint)))
    if options := get_args(hint):
        return ' or '.join(map(described, options))
    return 'null' if hint is NoneType else hint.__name__
