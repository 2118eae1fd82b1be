"""The modes that need a compiler or other processes: torch.compile, DDP with a static graph, FSDP2 in bfloat16."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from modes import KINDS, batch, ours
from networks import assert_same_gradients, gradients
from sharding import TORCH, fsdp2
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from xtloss import global_normalizer, segment_leak

WORLD = 2
SHARDED = [kind for kind in KINDS if kind != 'xl' or TORCH >= (2, 7)]  # older: a block runs once in a forward
POLICIES: dict[str, dict[str, Any]] = {'as it comes': {}, 'inputs stay': {'cast_forward_inputs': False}}


@pytest.mark.parametrize('kind', ['plain', 'xl', 'continuous'])
def test_compiled(kind: str) -> None:
    """As users do, with whatever breaks x-transformers' own code makes."""
    torch._dynamo.reset()
    wrapper, call = ours(kind, torch.float32), batch(kind, torch.float32)
    got, want = torch.compile(wrapper, backend='aot_eager')(**call), wrapper(**call)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(got, wrapper), gradients(want, wrapper), 1e-5, floor=1e-3)
    torch._dynamo.reset()


def share(kind: str, rank: int, step: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Of each step two rows for the first rank, and one for the second: one of which nothing counts, the first time."""
    call = batch(kind, dtype, seed=step)
    if step == 0 and 'lens' in call:
        call['lens'] = torch.tensor([9, 4, 1])
    elif step == 0:
        call['segment_ids'] = call['segment_ids'] * torch.tensor([[1], [1], [0]])
    return {name: value[2:] if rank else value[:2] for name, value in call.items()}


def normalizer_of(wrapper: Any, call: dict[str, Tensor]) -> Tensor:
    return global_normalizer(wrapper.loss_normalizer(**call))


def static_graphs(rank: int) -> dict[str, Any]:
    """Three steps of each kind; the gradients of each, and the losses."""
    results = {}
    for kind in KINDS:
        wrapper, found = ours(kind), []
        model = DistributedDataParallel(wrapper, find_unused_parameters=False, static_graph=True)
        for step in range(3):
            call = share(kind, rank, step)
            loss = model(**call, normalizer=normalizer_of(wrapper, call))
            loss.backward()
            found.append({name: p.grad.clone() for name, p in wrapper.named_parameters()} | {'loss': loss.detach()})
            model.zero_grad()
        results[kind] = found
    return results


def in_bfloat16(rank: int) -> dict[str, Any]:
    """One step of each kind under each policy: the normalizer, the loss, and the gradients."""
    shard, results = fsdp2(WORLD), {}
    total = torch.zeros(1)
    dist.reduce_scatter_tensor(total, torch.ones(WORLD), op=dist.ReduceOp.AVG)  # an older torch sums, though asked not
    for kind in SHARDED:
        for policy, options in POLICIES.items():
            wrapper, call = ours(kind, torch.float32), share(kind, rank, 1, torch.bfloat16)
            if kind in ('packed', 'unpadded'):
                segment_leak(wrapper.net)  # while its weights are whole
            mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            for _, block, _ in wrapper.net.attn_layers.layers:
                shard(block, mp_policy=mixed)
            mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, **options)
            shard(wrapper, mp_policy=mixed)
            loss, breakdown = wrapper(**call, normalizer=torch.tensor(1001.0), return_breakdown=True)
            loss.backward()
            grads = {name: p.grad.full_tensor() / total for name, p in wrapper.named_parameters()}
            results[kind, policy] = {'Z': breakdown.normalizer, 'loss': loss.detach(), 'grads': grads}
    return results


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store, patience = f'file://{folder}/rendezvous', timedelta(seconds=120)
    dist.init_process_group('gloo', init_method=store, rank=rank, world_size=WORLD, timeout=patience)
    torch.save({'static': static_graphs(rank), 'bfloat16': in_bfloat16(rank)}, f'{folder}/{rank}.pt')
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder: Path = tmp_path_factory.mktemp('ranks')
    mp.get_context('forkserver').set_forkserver_preload(['torch.distributed.fsdp', 'x_transformers'])
    mp.start_processes(run, (str(folder),), nprocs=WORLD, start_method='forkserver')
    return [torch.load(folder / f'{rank}.pt') for rank in range(WORLD)]


def step_of_one(wrapper: nn.Module, kind: str, step: int, dtype: torch.dtype, **call: Any) -> tuple[Tensor, Any]:
    """Loss and gradients of one process that has the shares of all."""
    shares = [share(kind, rank, step, dtype) for rank in range(WORLD)]
    loss = wrapper(**{name: torch.cat([part[name] for part in shares]) for name in shares[0]}, **call)
    return loss.detach(), gradients(loss, wrapper)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_ddp_with_a_static_graph(ranks: list[dict[str, Any]], kind: str) -> None:
    """Every step uses every parameter, also where a rank has nothing to count."""
    for step in range(3):
        loss, wanted = step_of_one(ours(kind), kind, step, torch.float64)
        found = [results['static'][kind][step] for results in ranks]
        torch.testing.assert_close(sum(f['loss'] for f in found) / WORLD, loss, rtol=1e-9, atol=0)
        for grads in found:
            assert_same_gradients({name: g for name, g in grads.items() if name != 'loss'}, wanted, 1e-9, floor=1e-3)
    assert ranks[1]['static'][kind][0]['loss'] == 0


@pytest.mark.slow
@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('kind', SHARDED)
def test_fsdp2_in_bfloat16(ranks: list[dict[str, Any]], kind: str, policy: str) -> None:
    """The loss is float32, the gradients those of a bfloat16 network; FSDP2 makes its inputs bfloat16, Z too."""
    narrow = ours(kind, torch.float32)
    for p in narrow.parameters():  # and no buffer
        p.data = p.data.bfloat16()
    _, wanted = step_of_one(narrow, kind, 1, torch.bfloat16, normalizer=torch.tensor(1001.0 * WORLD))
    for rank, results in enumerate(ranks):
        found = results['bfloat16'][kind, policy]
        assert found['loss'].dtype == torch.float32
        assert found['Z'] == (1001 if policy == 'inputs stay' else 1000)
        alone = narrow(**share(kind, rank, 1, torch.bfloat16), normalizer=found['Z'])
        torch.testing.assert_close(found['loss'], alone.detach(), rtol=1e-2, atol=0)
        assert_same_gradients(found['grads'], {name: g.float() for name, g in wanted.items()}, 0.1, floor=0.1)
