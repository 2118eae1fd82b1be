"""Lightning's ways to one normalizer, as `global_normalizer` documents them, in one process and in two.

The batches are those of the other data-parallel tests: uneven shares, some of which nothing counts, some of no rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_same_gradients
from test_distributed import SHARES, gradients, make_wrapper, rows_of_batch, whole_batch
from torch import Tensor
from torch.utils.data import DataLoader

lightning = pytest.importorskip('lightning', reason='needs the extra "trainers"')

WORLDS = {1: [SHARES[2][0] + SHARES[2][1]], 2: SHARES[2]}  # of each process, the rows of its micro-batches
worlds = pytest.mark.parametrize('world_size', [1, pytest.param(2, marks=pytest.mark.slow)])
QUIET = dict.fromkeys(('logger', 'enable_checkpointing', 'enable_progress_bar', 'enable_model_summary'), False)


def micro_batches(world_size: int, rank: int) -> list[dict[str, Tensor]]:
    return [rows_of_batch(rows) for rows in WORLDS[world_size][rank]]


def hardware(world_size: int) -> dict[str, Any]:
    return {'accelerator': 'cpu', 'devices': world_size, 'strategy': 'ddp_spawn' if world_size > 1 else 'auto'}


def step_of_fabric(fabric: Any, folder: str) -> None:
    """One step, its gradients left in `folder`."""
    torch.set_num_threads(1)
    batches = micro_batches(fabric.world_size, fabric.global_rank)
    wrapper = make_wrapper('sequence')
    model = fabric.setup(wrapper)
    normalizer = fabric.all_reduce(sum(wrapper.loss_normalizer(**batch) for batch in batches), reduce_op='mean')
    for k, batch in enumerate(batches):
        waits = fabric.world_size > 1 and k < len(batches) - 1
        with fabric.no_backward_sync(model, enabled=waits):
            fabric.backward(model(**batch, normalizer=normalizer))
    torch.save(gradients(wrapper), f'{folder}/{fabric.global_rank}.pt')


class Module(lightning.LightningModule):
    """The wrapper in a module, its gradients left in `folder` before the optimizer's step."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.wrapper, self.folder = make_wrapper('sequence'), folder

    def train_dataloader(self) -> DataLoader:
        return DataLoader(micro_batches(self.trainer.world_size, self.global_rank), batch_size=None)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Its part of the loss, with the normalizer of all micro-batches of all processes."""
        if index == 0:
            batches = micro_batches(self.trainer.world_size, self.global_rank)
            total = sum(self.wrapper.loss_normalizer(**batch) for batch in batches)
            self.normalizer = self.trainer.strategy.reduce(total, reduce_op='mean')
        return self.wrapper(**batch, normalizer=self.normalizer / self.trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        torch.save(gradients(self.wrapper), f'{self.folder}/{self.global_rank}.pt')

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def assert_the_gradient_of_one_batch(folder: Path, world_size: int) -> None:
    wrapper = make_wrapper('sequence')
    wrapper(**whole_batch()).backward()
    for rank in range(world_size):
        assert_same_gradients(torch.load(folder / f'{rank}.pt'), gradients(wrapper), 1e-5)


@worlds
def test_fabric_reduces_the_normalizer(tmp_path: Path, world_size: int) -> None:
    fabric = lightning.Fabric(**hardware(world_size))
    fabric.launch(step_of_fabric, str(tmp_path))
    assert_the_gradient_of_one_batch(tmp_path, world_size)


@worlds
def test_a_module_accumulates_gradients(tmp_path: Path, world_size: int) -> None:
    trainer = lightning.Trainer(
        **hardware(world_size),
        **QUIET,
        accumulate_grad_batches=len(WORLDS[world_size][0]),
        max_steps=1,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(str(tmp_path)))
    assert_the_gradient_of_one_batch(tmp_path, world_size)
