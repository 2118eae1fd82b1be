"""Processes that are a group on the CPU, and FSDP2 in them, as every torch has it."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

TORCH = tuple(map(int, torch.__version__.split('.')[:2]))


def found_by_processes(work: Callable[[int, int], Any], world: int, folder: Path) -> list[Any]:
    """Return what `work(rank, world)`, a function of a module, returns in each process of a group."""
    # imports once what each process would spend seconds on
    mp.get_context('forkserver').set_forkserver_preload(['accelerate', 'torch.distributed.fsdp', 'x_transformers'])
    mp.start_processes(run, (work, world, str(folder)), nprocs=world, start_method='forkserver')
    return [torch.load(folder / f'{rank}.pt') for rank in range(world)]


def run(rank: int, work: Callable[[int, int], Any], world: int, folder: str) -> None:
    """In each process."""
    torch.set_num_threads(1)
    store, patience = f'file://{folder}/rendezvous', timedelta(seconds=120)
    dist.init_process_group('gloo', init_method=store, rank=rank, world_size=world, timeout=patience)
    torch.save(work(rank, world), f'{folder}/{rank}.pt')
    dist.barrier()
    dist.destroy_process_group()


def sums_over_means() -> float:
    """The ranks, where gloo sums though it is asked for a mean, as with an older torch; else 1."""
    found = torch.zeros(1)
    dist.reduce_scatter_tensor(found, torch.ones(dist.get_world_size()), op=dist.ReduceOp.AVG)
    return found.item()


def fsdp2(world: int) -> Callable[..., Any]:
    """Return `fully_shard` over all processes.

    With what an older torch has right on GPUs alone: streams that record events, and backward after it gathers again.
    """
    if not hasattr(torch.cpu.Stream, 'record_event'):
        torch.cpu.Stream.record_event = torch.cpu.Stream.wait_event = lambda *_: None
    options = {'reshard_after_forward': False} if TORCH < (2, 7) else {}
    return partial(fully_shard, mesh=init_device_mesh('cpu', (world,)), **options)
