"""A script of tests/test_checkpoints.py: train in children that are killed, each of which goes on from the one before.

It imports once and forks, which is quick, and trains nothing itself: torch's threads do not live through a fork.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / 'examples'))

import torch
import train_enwik8
from enwik8 import checkpoints
from enwik8.config import Config

CONFIG = Config(
    data='builtin', max_bytes=20_000, preset='tiny', dim=16, depth=1, heads=2, seq_len=16, batch_size=2, held_out=4,
    steps=24, validate_every=6, generate_every=9, generate_length=2, checkpoint_every=4, warmup_steps=3, decay='cosine',
)  # fmt: skip
GOES_ON = replace(CONFIG, resume=True)


def child(config: Config, name: str, before: Callable[[], None] = lambda: None) -> int:
    """Train in a child, and return its process id; its status is 0 where it reaches the end."""
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        before()
        train_enwik8.train(replace(config, name=name))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(pid: int) -> int:
    """Wait for a child; return its exit status, or the signal that ended it, below zero."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(count: int) -> Callable[[], None]:
    """Return what has a process kill itself at the start of the call of that number to what changes the disk."""
    left = count

    def counted(function: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    def patch() -> None:
        for module, name in (
            (os, 'fsync'), (os, 'rename'), (os, 'replace'), (os, 'unlink'), (os, 'rmdir'), (shutil, 'rmtree'),
            (torch, 'save'), (checkpoints, 'cut_back'), (train_enwik8.Accelerator, 'save_state'),
        ):  # fmt: skip
            setattr(module, name, counted(getattr(module, name)))

    return patch


def at_every_operation(name: str) -> None:
    """Kill at the first change of the disk, then at the second, and so on, until a child reaches the end."""
    count = 1
    while ended(child(GOES_ON, name, kill_at(count))) != 0:
        assert count < 100
        count += 1
    print('kills:', count - 1)


def at_random_moments(name: str, kills: int, seed: int) -> None:
    """Kill at random moments, of the start too, then let the last child reach the end."""
    began = time.perf_counter()
    assert ended(child(CONFIG, f'{name}-timed')) == 0
    whole = time.perf_counter() - began
    moments = random.Random(seed)
    for _ in range(kills):
        pid = child(GOES_ON, name)
        time.sleep(moments.uniform(0, 2 * whole / kills))
        os.kill(pid, signal.SIGKILL)
        ended(pid)
    assert ended(child(GOES_ON, name)) == 0


def a_second_signal(name: str) -> None:
    """Send two signals within a step, and see that the second one ends the process."""

    def twice() -> None:
        train_enwik8.draw = lambda *args: [signal.raise_signal(signal.SIGINT) for _ in range(2)]

    assert ended(child(CONFIG, name, twice)) == -signal.SIGINT


if __name__ == '__main__':
    assert ended(child(CONFIG, 'whole')) == 0
    at_random_moments('random', kills=3, seed=0)
    at_every_operation('operations')
    a_second_signal('twice')
