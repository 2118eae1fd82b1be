"""FSDP2 on the CPU, as every torch has it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

TORCH = tuple(map(int, torch.__version__.split('.')[:2]))


def fsdp2(world: int) -> Callable[..., Any]:
    """Return `fully_shard` over all processes.

    With what an older torch has right on GPUs alone: streams that record events, and backward after it gathers again.
    """
    if not hasattr(torch.cpu.Stream, 'record_event'):
        torch.cpu.Stream.record_event = torch.cpu.Stream.wait_event = lambda *_: None
    options = {'reshard_after_forward': False} if TORCH < (2, 7) else {}
    return partial(fully_shard, mesh=init_device_mesh('cpu', (world,)), **options)
