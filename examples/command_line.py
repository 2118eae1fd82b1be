"""What the command lines of the examples have in common: options are judged first, and what is wrong is one line.

They exit with 2 where something is wrong, and with 130 where Ctrl-C stopped them. Each script imports this module
before any package, because it says which packages are missing, and keeps other packages' warnings from the screen.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

try:
    import fcntl
except ImportError:  # Windows: two runs of one name are not told apart
    fcntl = None  # type: ignore[assignment]

PACKAGES = ('torch', 'x_transformers', 'xtloss', 'accelerate', 'matplotlib', 'rich', 'tqdm', 'tyro')
if missing := [package for package in PACKAGES if find_spec(package) is None]:
    script, advice = Path(sys.argv[0]).name, 'pip install -e ".[examples]" brings what the examples need'
    print(f'{script}: not installed: {", ".join(missing)}; {advice}', file=sys.stderr)
    raise SystemExit(2)
warnings.filterwarnings('ignore', '`torch.jit.script` is ')  # x-transformers calls it when imported

LONGEST_NAME = 200  # bytes; most file systems take 255
TOO_LARGE = 2**63  # for a seed, and for any tensor
MAY_BE_ZERO = ('seed', 'seeds', 'tuning_seeds', 'noise', 'warmup_steps', 'uncounted', 'seconds')
ANY_NUMBER = ('loss_weighting',)  # the wrapper judges it


class UsageError(Exception):
    """An option, a file or a run is no good; the message is one line that says why."""

    status = 2  # with which the process ends


@contextmanager
def one_line_errors(script: str) -> Iterator[None]:
    """End the process with one line, no traceback, where what a person gave, or the disk, is no good."""
    try:
        yield
    except (UsageError, OSError) as error:
        where = f'{error.filename}: ' if isinstance(error, OSError) and error.filename else ''
        why = error.strerror or error if isinstance(error, OSError) else error
        print(f'{script}: {where}{why}', file=sys.stderr)
        raise SystemExit(getattr(error, 'status', 2)) from None
    except KeyboardInterrupt:
        print(f'\n{script}: interrupted', file=sys.stderr)
        raise SystemExit(130) from None


def say(line: str) -> None:
    """Print a line above the bars, at once: a file that the output goes to has it too."""
    from tqdm import tqdm

    tqdm.write(line)
    sys.stdout.flush()


def flag(field: str) -> str:
    """Return the option that sets a field."""
    return '--' + field.replace('_', '-')


def judge(config: Any) -> None:
    """Check what can be judged option by option: the numbers, and the name of the run.

    Integers are at least 1, floats above 0, `MAY_BE_ZERO` 0 too, all of them finite; a list holds at least one.

    Raises `UsageError`.
    """
    for field, value in asdict(config).items():
        if value == ():
            raise UsageError(f'{flag(field)} wants at least one value')
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) in (int, float) and field not in ANY_NUMBER:  # a bool is no number here
                judge_number(field, number)
    if getattr(config, 'name', None) is not None:
        check_name(config.name)


def judge_number(field: str, number: float) -> None:
    """Check one number, nan and inf included. Raises `UsageError`."""
    rule = 'at least 0' if field in MAY_BE_ZERO else 'at least 1' if type(number) is int else 'above 0'
    is_enough = number >= 0 if field in MAY_BE_ZERO else number > 0
    if not is_enough or number >= TOO_LARGE:
        raise UsageError(f'{flag(field)} must be {rule}{" and below 2^63" if is_enough else ""}, got {number}')


def check_name(name: str) -> None:
    """Check that a name is that of one folder inside runs/. Raises `UsageError`."""
    if name in ('', '.', '..') or '/' in name or '\\' in name or not name.isprintable():
        raise UsageError(f'--name must be the name of one folder in runs/, got {name[:60]!r}')
    if len(name.encode()) > LONGEST_NAME:
        raise UsageError(f'--name must be at most {LONGEST_NAME} bytes long, got {len(name.encode())}')


def writable_folder(folder: Path) -> Path:
    """Make a folder, and see that files can be written there. Raises `UsageError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b'x')
    except OSError as error:
        raise UsageError(f'cannot write to {folder}: {error.strerror}') from error
    return folder


def open_log(path: Path) -> TextIO:
    """Open the log of a run, and keep it for this process: a second run of one name would break it.

    Raises `UsageError` where another process has it.
    """
    log = open(path, 'a')  # noqa: SIM115  the caller closes it
    if fcntl is not None:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            log.close()
            raise UsageError(f'{path.parent} is being written by another run: choose another --name') from error
    return log
