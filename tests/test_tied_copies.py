"""A copied wrapper of a tied network reads its own embedding; a network that was copied by itself does not."""

import copy
from typing import Any

import pytest
import torch
from modes import batch, ours
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Parent(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


COPIES: dict[str, Any] = {
    'deepcopy': copy.deepcopy,
    'inside a parent': lambda model: copy.deepcopy(Parent(model)).model,
    'AveragedModel': lambda model: AveragedModel(model).module,
    'copy of a copy': lambda model: copy.deepcopy(copy.deepcopy(model)),
}


@pytest.mark.parametrize('how', COPIES)
@pytest.mark.parametrize('fused', ['auto', False])
@pytest.mark.parametrize('kind', ['plain', 'xl'])
def test_a_copy_of_a_tied_network_reads_its_own_embedding(kind: str, fused: str | bool, how: str) -> None:
    model, call = ours(kind, fused=fused, tie_embedding=True), batch(kind)
    keys, before = model.state_dict().keys(), model(**call).item()
    copied = COPIES[how](model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    assert copied(**call).item() == before
    assert copied.state_dict().keys() == keys
    copied(**call).backward()
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        copied.net.token_emb.emb.weight.mul_(2)
    assert copied(**call).item() != before
