"""Sequences spread over data-parallel processes give the gradient of one process that has them all."""

import os
from contextlib import nullcontext
from functools import cache
from itertools import product
from typing import Any

import modes
import pytest
import torch
import torch.distributed as dist
from modes import KINDS, ours
from networks import assert_same_gradients, decoder
from sharding import TORCH, found_by_processes, fsdp2, sums_over_means
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from xtloss import AutoregressiveWrapper, global_normalizer, segment_leak
from xtloss.weighting.weights import communication_device

WEIGHTINGS = ['token', 'sequence', 'square']
WAYS = {'auto': {}, 'fused': {'fused': True}, 'logits': {'fused': False}, 'unpad': {'unpad': True}}
STEPS = [('ddp', weighting, way) for weighting in WEIGHTINGS for way in WAYS if way != 'auto']
STEPS += [('fsdp2', weighting, 'fused') for weighting in WEIGHTINGS]
STEPS += [('fsdp2 of the network', 'sequence', 'auto'), ('accelerate', 'sequence', 'auto')]

# of each process, the sequences in its two micro-batches: uneven shares; sequence 5, of which nothing counts, alone; no
# sequences at all
SHARES = {2: [[[0, 1], [2, 3, 4]], [[5], []]], 4: [[[0, 1], [2]], [[3], [4]], [[5], []], [[], []]]}

SHARDED = [kind for kind in KINDS if kind != 'xl' or TORCH >= (2, 7)]  # older: a block runs once in a forward
POLICIES: dict[str, dict[str, Any]] = {'as it comes': {}, 'inputs stay': {'cast_forward_inputs': False}}


@cache
def whole_batch():
    generator = torch.Generator().manual_seed(1)
    x, lens = torch.randint(0, 11, (6, 12), generator=generator), torch.tensor([12, 3, 7, 2, 9, 5])
    loss_mask = torch.rand(x.shape, generator=generator) < 0.8
    loss_mask[3:5, 1] = True
    loss_mask[5] = False
    return {'x': x, 'lens': lens, 'loss_mask': loss_mask}


def rows_of_batch(rows):
    return {name: value[rows] for name, value in whole_batch().items()}


def make_wrapper(loss_weighting, **options):
    return AutoregressiveWrapper(decoder(layers_depth=2), loss_weighting=loss_weighting, **options)


def gradients(wrapper, factor=1):
    return {
        name: (p.grad.full_tensor() / factor if hasattr(p, 'full_tensor') else p.grad).clone()
        for name, p in wrapper.named_parameters()
    }


def assert_same_step(found, wrapper, batch, tolerance, floor=0.0):
    """The gradients and the loss are those of one process that has the whole batch."""
    loss = wrapper(**batch)
    loss.backward()
    torch.testing.assert_close(found[1], loss.detach(), rtol=tolerance, atol=0)
    assert_same_gradients(found[0], gradients(wrapper), tolerance, floor)


# what each process runs


TOTALS = {
    'single': lambda rank: torch.tensor(3.0 * rank),
    'integer': lambda rank: torch.tensor(3 * rank),
    'half': lambda rank: torch.tensor(3.0 * rank, dtype=torch.bfloat16),
    'double': lambda rank: torch.tensor(0.1 + rank, dtype=torch.float64, requires_grad=True),
    'number': lambda rank: 0.1 + rank,
    'number beside tensors': lambda rank: 0 if rank == 1 else torch.tensor(3.0),
    'zero': lambda rank: torch.tensor(0.0),
}


def normalizers(rank):
    totals = {name: total(rank) for name, total in TOTALS.items()}
    results = {name: global_normalizer(total) for name, total in totals.items()}
    assert totals['double'].item() == 0.1 + rank  # untouched
    first = dist.new_group([0])
    if rank == 0:
        assert global_normalizer(7, group=first) == 7
    else:
        with pytest.raises(TypeError, match='group must be a process group that this rank belongs to, got'):
            global_normalizer(7, group=first)
    return results


def step(model, wrapper, micro_batches, factor=1):
    """The gradients and the loss of one step, as the docs have it."""
    normalizer = global_normalizer(sum(wrapper.loss_normalizer(**batch) for batch in micro_batches))
    reported = torch.zeros(())
    for k, batch in enumerate(micro_batches):
        is_last = k == len(micro_batches) - 1
        with nullcontext() if is_last else model.no_sync():
            loss = model(**batch, normalizer=normalizer)
            loss.backward()
        reported = reported + loss.detach()
    dist.all_reduce(reported)
    return gradients(wrapper, factor), reported / dist.get_world_size()


def accelerated_step(rank, world, micro_batches):
    """Likewise; the loss is divided by the number of micro-batches, and by accelerate once more."""
    from accelerate import Accelerator

    environment = {'OMP_NUM_THREADS': 1, 'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': world}
    environment['LOCAL_WORLD_SIZE'] = world
    os.environ |= {name: str(value) for name, value in environment.items()}  # so it takes the group there is
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == world
    model = accelerator.prepare(make_wrapper('sequence'))
    wrapper, reported = accelerator.unwrap_model(model), torch.zeros(())
    normalizer = accelerator.reduce(sum(wrapper.loss_normalizer(**batch) for batch in micro_batches), 'mean')
    for batch in micro_batches:
        with accelerator.accumulate(model):
            loss = model(**batch, normalizer=normalizer / accelerator.gradient_accumulation_steps)
            accelerator.backward(loss)
        reported += loss.detach() / accelerator.gradient_accumulation_steps
    return gradients(wrapper), accelerator.reduce(reported, 'mean')


def sharded(wrapper, shard, of_wrapper=None, **policy):
    """Each block by itself, then the whole, whose policy may have more options."""
    for _, block, _ in wrapper.net.attn_layers.layers:
        shard(block, mp_policy=MixedPrecisionPolicy(**policy))
    return shard(wrapper, mp_policy=MixedPrecisionPolicy(**policy, **(of_wrapper or {})))


def steps(rank, world):
    """The normalizers, and every step of `STEPS`."""
    micro_batches, results = [rows_of_batch(rows) for rows in SHARES[world][rank]], {'normalizers': normalizers(rank)}
    shard, factor = fsdp2(world), sums_over_means()
    for how, weighting, way in STEPS:
        wrapper = make_wrapper(weighting, **WAYS[way])
        if how == 'ddp':
            found = step(DistributedDataParallel(wrapper), wrapper, micro_batches)
        elif how == 'accelerate':
            found = accelerated_step(rank, world, micro_batches)
        elif how == 'fsdp2':
            found = step(sharded(wrapper, shard), wrapper, micro_batches[:1], factor)
        else:
            shard(wrapper.net)
            found = step(wrapper, wrapper, micro_batches[:1], factor)
            wrapper.fused = True
            with pytest.raises(ValueError, match=r'FSDP|DTensor'):
                wrapper(**micro_batches[0])
        results[how, weighting, way] = found
    return results


def share(kind, rank, number, dtype=torch.float64):
    """Of each step two rows for the first rank, and one for the second: one of which nothing counts, the first time."""
    call = modes.batch(kind, dtype, seed=number)
    if number == 0 and 'lens' in call:
        call['lens'] = torch.tensor([9, 4, 1])
    elif number == 0:
        call['segment_ids'] = call['segment_ids'] * torch.tensor([[1], [1], [0]])
    rows = {0: slice(2), 1: slice(2, None), 'all': slice(None)}[rank]
    return {name: value[rows] for name, value in call.items()}


def modes_of(rank, world):
    """Of each kind of wrapper three steps under DDP with a static graph, and one under each policy of FSDP2."""
    results = {}
    for kind in KINDS:
        wrapper = ours(kind)
        model = DistributedDataParallel(wrapper, find_unused_parameters=False, static_graph=True)
        for number in range(3):
            results[kind, number] = step(model, wrapper, [share(kind, rank, number)])
            model.zero_grad()

    shard, factor = fsdp2(world), sums_over_means()
    for kind, (policy, options) in product(SHARDED, POLICIES.items()):
        wrapper, call = ours(kind, torch.float32), share(kind, rank, 1, torch.bfloat16)
        if kind in ('packed', 'unpadded'):
            segment_leak(wrapper.net)  # while its weights are whole
        sharded(wrapper, shard, options, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        loss, breakdown = wrapper(**call, normalizer=torch.tensor(1001.0), return_breakdown=True)
        loss.backward()
        results[kind, policy] = breakdown.normalizer, loss.detach(), gradients(wrapper, factor)
    return results


# what one process finds


@pytest.fixture(scope='module', params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    """What each of 2, then 4, processes found."""
    return found_by_processes(steps, request.param, tmp_path_factory.mktemp('ranks'))


@pytest.fixture(scope='module')
def ranks_of_modes(tmp_path_factory):
    """What each of 2 processes found."""
    return found_by_processes(modes_of, 2, tmp_path_factory.mktemp('ranks'))


@pytest.mark.parametrize(('how', 'weighting', 'way'), STEPS)
def test_a_step_is_that_of_one_process(ranks, how, weighting, way):
    shares = [micro_batches[:1] if 'fsdp2' in how else micro_batches for micro_batches in SHARES[len(ranks)]]
    whole = rows_of_batch([row for micro_batches in shares for rows in micro_batches for row in rows])
    for results in ranks:
        assert_same_step(results[how, weighting, way], make_wrapper(weighting), whole, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_ddp_with_a_static_graph(ranks_of_modes, kind):
    """Every step uses every parameter, also where a rank has nothing to count."""
    for number in range(3):
        for results in ranks_of_modes:
            assert_same_step(results[kind, number], ours(kind), share(kind, 'all', number), 1e-9, floor=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('kind', SHARDED)
def test_fsdp2_in_bfloat16(ranks_of_modes, kind, policy):
    """The loss is float32, the gradients those of a bfloat16 network; FSDP2 makes its inputs bfloat16, Z too."""
    narrow = ours(kind, torch.float32)
    for p in narrow.parameters():  # and no buffer
        p.data = p.data.bfloat16()
    narrow(**share(kind, 'all', 1, torch.bfloat16), normalizer=torch.tensor(2002.0)).backward()
    wanted = {name: g.float() for name, g in gradients(narrow).items()}
    for rank, results in enumerate(ranks_of_modes):
        z, loss, found = results[kind, policy]
        assert loss.dtype == torch.float32
        assert z == (1001 if policy == 'inputs stay' else 1000)
        alone = narrow(**share(kind, rank, 1, torch.bfloat16), normalizer=z)
        torch.testing.assert_close(loss, alone.detach(), rtol=1e-2, atol=0)
        assert_same_gradients(found, wanted, 0.1, floor=0.1)


@pytest.mark.parametrize('name', TOTALS)
def test_global_normalizer_is_the_mean_over_ranks(ranks, name):
    totals = [TOTALS[name](rank) for rank in range(len(ranks))]
    mean = sum(total.item() if isinstance(total, Tensor) else total for total in totals) / len(ranks)
    for total, results in zip(totals, ranks, strict=True):
        found = results['normalizers'][name]
        assert found.shape == ()
        assert found.dtype == torch.promote_types(getattr(total, 'dtype', torch.float64), torch.float32)
        assert not found.requires_grad
        assert found.item() == pytest.approx(mean, rel=1e-15)


# without a process group


@pytest.mark.parametrize(
    ('backends', 'has_gpu', 'device'),
    [
        ('cpu:gloo,cuda:nccl', True, 'cuda'),
        ('cpu:gloo,cuda:nccl', False, 'cpu'),
        ('cuda:nccl', True, 'cuda'),
        ('cpu:gloo,cuda:gloo', True, 'cpu'),
        ('xpu:xccl', False, 'xpu'),
    ],
)
def test_ranks_reduce_on_a_device_that_all_have(monkeypatch, backends, has_gpu, device):
    monkeypatch.setattr(dist, 'get_backend_config', lambda group: backends)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: has_gpu)
    assert communication_device(None).type == device


@pytest.mark.parametrize('total', [0, 3, 0.1, 2**24 + 1, torch.tensor(2.5), torch.tensor(0.1, dtype=torch.float64)])
def test_without_a_group_it_is_a_tensor_of_the_total(total):
    """And a normalizer, which makes no loss wider."""
    assert not dist.is_initialized()
    found = global_normalizer(total)
    assert found.shape == ()
    assert found.dtype == getattr(total, 'dtype', torch.float64)
    assert found.item() == (total.item() if isinstance(total, Tensor) else total)
    assert not global_normalizer(found.clone().requires_grad_()).requires_grad
    loss, whole = (make_wrapper('token')(**whole_batch(), normalizer=z) for z in (found, 1.0))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(whole.item() / found.item() if found else 0, rel=1e-6)
