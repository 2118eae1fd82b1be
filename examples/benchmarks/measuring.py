"""What the benchmarks have in common: they say first where they measure, and wait for the device when they time."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from command_line import UsageError, judge, say
from torch import Tensor
from torch.nn import Module


def begin(config: Any) -> None:
    """Judge the options, set the threads, and say where this is measured. Raises `UsageError`."""
    judge(config)
    if config.device == 'cuda' and not torch.cuda.is_available():
        raise UsageError('--device cuda: no CUDA device here')
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    where = torch.cuda.get_device_name() if config.device == 'cuda' else f'threads: {torch.get_num_threads()}'
    packages = f'torch {torch.__version__}, x-transformers {version("x-transformers")}'
    say(f'{packages}, {platform.machine()} {config.device}, {where}, {getattr(config, "dtype", "float32")}')


def timed(net: Module, step: Callable[[], Tensor]) -> tuple[float, float]:
    """Run a forward and a backward; return the loss and the seconds."""
    net.zero_grad()
    synchronize()
    start = time.perf_counter()
    loss = step()
    loss.backward()
    synchronize()
    return loss.item(), time.perf_counter() - start


def synchronize() -> None:
    """Wait for the device, where it runs ahead of Python."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
