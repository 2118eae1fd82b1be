"""Ctrl-C and SIGTERM: the step is finished and saved first; a second one ends the process at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator
from command_line import UsageError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(UsageError):
    """A run was asked to stop, and is saved; the exit status is that of a process which the signal ended."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.status = 128 + signum


class Wish:
    """The signal that asked to stop, 0 where none did."""

    signum = 0

    def of_any(self, accelerator: Accelerator) -> int:
        """Return the signal that any process received: all stop after the same step."""
        if accelerator.num_processes == 1:
            return self.signum
        found = accelerator.gather(torch.tensor([self.signum], device=accelerator.device))
        return int(found.max().item())


@contextmanager
def noticed_signals() -> Iterator[Wish]:
    """Take note of the first signal and leave the next to the system. Only a main thread can: others note none."""
    wish = Wish()

    def note(signum: int, frame: FrameType | None) -> None:
        wish.signum = signum
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    before = {}
    try:
        for each in SIGNALS:
            before[each] = signal.signal(each, note)
    except ValueError:  # another thread
        pass
    try:
        yield wish
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
