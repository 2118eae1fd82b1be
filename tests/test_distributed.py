"""Sequences spread over data-parallel processes give the gradient of one process that has them all."""

import os
from contextlib import nullcontext
from datetime import timedelta
from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from networks import assert_same_gradients, decoder
from sharding import fsdp2
from torch.nn.parallel import DistributedDataParallel

from xtloss import AutoregressiveWrapper
from xtloss.weighting.weights import global_normalizer

WEIGHTINGS = ['token', 'sequence', 'square']

# of each process, the sequences in its two micro-batches: uneven shares; sequence 5, of which nothing counts, alone; no
# sequences at all
SHARES = {2: [[[0, 1], [2, 3, 4]], [[5], []]], 4: [[[0, 1], [2]], [[3], [4]], [[5], []], [[], []]]}


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


# of the wrappers: the logits path, and padding that is left out as well
WAYS = {'fused': {}, 'logits': {'fused': False}, 'unpad': {'unpad': True}}


def make_wrapper(loss_weighting, **options):
    return AutoregressiveWrapper(decoder(layers_depth=2), loss_weighting=loss_weighting, **options)


def gradients(wrapper, factor=1):
    return {
        name: p.grad.full_tensor() / factor if hasattr(p, 'full_tensor') else p.grad
        for name, p in wrapper.named_parameters()
    }


# what each process runs


def normalizers(rank):
    tensor = torch.tensor(0.1 + rank, dtype=torch.float64, requires_grad=True)
    results = {
        'single': global_normalizer(torch.tensor(3.0 * rank)),
        'integer': global_normalizer(torch.tensor(3 * rank)),
        'half': global_normalizer(torch.tensor(3.0 * rank, dtype=torch.bfloat16)),
        'double': global_normalizer(tensor),
        'number': global_normalizer(0.1 + rank),
        'number beside tensors': global_normalizer(0 if rank == 1 else torch.tensor(3.0)),
        'zero': global_normalizer(torch.tensor(0.0)),
    }
    first = dist.new_group([0])
    if rank == 0:
        results['group'] = global_normalizer(7, group=first)
    else:
        with pytest.raises(TypeError, match='group must be a process group that this rank belongs to, got'):
            global_normalizer(7, group=first)
    return results | {'input': tensor.detach()}


def step(model, wrapper, micro_batches, factor=1):
    """The gradients and the loss of one step, as the docs have it."""
    normalizer = global_normalizer(sum(wrapper.loss_normalizer(**batch) for batch in micro_batches))
    reported = torch.zeros(())
    for k, batch in enumerate(micro_batches):
        is_last = k == len(micro_batches) - 1
        with nullcontext() if is_last else model.no_sync():
            loss = model(**batch, normalizer=normalizer)
            loss.backward()
        reported += loss.detach()
    dist.all_reduce(reported)
    return gradients(wrapper, factor), reported / dist.get_world_size()


def under_ddp(micro_batches):
    results = {}
    for loss_weighting in WEIGHTINGS:
        for way, options in WAYS.items():
            wrapper = make_wrapper(loss_weighting, **options)
            results[loss_weighting, way] = step(DistributedDataParallel(wrapper), wrapper, micro_batches)
    return results


def sums_over_means():
    """The ranks, where gloo sums though it is asked for a mean, as with an older torch; else 1."""
    found = torch.zeros(1)
    dist.reduce_scatter_tensor(found, torch.ones(dist.get_world_size()), op=dist.ReduceOp.AVG)
    return found.item()


def under_fsdp2(batch):
    shard = fsdp2(dist.get_world_size())
    factor = sums_over_means()
    results = {}
    for loss_weighting in WEIGHTINGS:
        wrapper = make_wrapper(loss_weighting, fused=True)
        for _, block, _ in wrapper.net.attn_layers.layers:
            shard(block)
        shard(wrapper)
        results[loss_weighting] = step(wrapper, wrapper, [batch], factor)

    sharded_inside = make_wrapper('sequence')
    shard(sharded_inside.net)
    results['net'] = step(sharded_inside, sharded_inside, [batch], factor)
    sharded_inside.fused = True
    with pytest.raises(ValueError, match=r'FSDP|DTensor'):
        sharded_inside(**batch)
    return results


def under_accelerate(rank, world_size, micro_batches):
    from accelerate import Accelerator

    environment = {'OMP_NUM_THREADS': 1, 'RANK': rank, 'LOCAL_RANK': rank}
    environment |= {'WORLD_SIZE': world_size, 'LOCAL_WORLD_SIZE': world_size}
    os.environ |= {name: str(value) for name, value in environment.items()}  # so it takes the group there is
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == world_size
    model = accelerator.prepare(make_wrapper('sequence'))
    wrapper = accelerator.unwrap_model(model)
    normalizer = accelerator.reduce(sum(wrapper.loss_normalizer(**batch) for batch in micro_batches), 'mean')
    for batch in micro_batches:
        with accelerator.accumulate(model):
            loss = model(**batch, normalizer=normalizer / accelerator.gradient_accumulation_steps)
            accelerator.backward(loss)
    return gradients(wrapper)


def run(rank, world_size, folder):
    torch.set_num_threads(1)
    store, patience = f'file://{folder}/rendezvous', timedelta(seconds=120)
    dist.init_process_group('gloo', init_method=store, rank=rank, world_size=world_size, timeout=patience)
    micro_batches = [rows_of_batch(rows) for rows in SHARES[world_size][rank]]
    results = {'normalizers': normalizers(rank), 'ddp': under_ddp(micro_batches)}
    results['accelerate'] = under_accelerate(rank, world_size, micro_batches)
    results['fsdp2'] = under_fsdp2(micro_batches[0])
    torch.save(results, f'{folder}/{rank}.pt')
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope='module', params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    """What each of 2, then 4, processes found."""
    folder = tmp_path_factory.mktemp('ranks')
    # imports once what six processes would each spend seconds on
    mp.get_context('forkserver').set_forkserver_preload(['accelerate', 'torch.distributed.fsdp', 'x_transformers'])
    mp.start_processes(run, (request.param, str(folder)), nprocs=request.param, start_method='forkserver')
    return [torch.load(folder / f'{rank}.pt') for rank in range(request.param)]


# what one process finds


def assert_same_step(found, loss_weighting, shares):
    wrapper = make_wrapper(loss_weighting)
    loss = wrapper(**rows_of_batch([row for rows in shares for row in rows]))
    loss.backward()
    assert loss > 0
    torch.testing.assert_close(found[1], loss.detach(), rtol=1e-5, atol=0)
    assert_same_gradients(found[0], gradients(wrapper), 1e-5)


def test_global_normalizer_is_the_mean_over_ranks(ranks):
    w = len(ranks)
    mean = (w - 1) / 2  # of the ranks
    expected = {
        'single': (3 * mean, torch.float32),
        'integer': (3 * mean, torch.float32),
        'half': (3 * mean, torch.float32),
        'double': (0.1 + mean, torch.float64),
        'number': (0.1 + mean, torch.float64),
        'zero': (0, torch.float32),
    }
    for rank, results in enumerate(ranks):
        found = results['normalizers']
        for name, (value, dtype) in expected.items():
            assert found[name].shape == ()
            assert found[name].dtype == dtype
            assert not found[name].requires_grad
            assert found[name].item() == pytest.approx(value, rel=1e-15), name
        assert found['number beside tensors'].item() == pytest.approx(3 * (w - 1) / w)
        assert found['input'].item() == 0.1 + rank  # untouched
    assert ranks[0]['normalizers']['group'].item() == 7


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('loss_weighting', WEIGHTINGS)
def test_ddp_gives_the_gradient_of_one_process(ranks, loss_weighting, way):
    shares = [rows for micro_batches in SHARES[len(ranks)] for rows in micro_batches]
    for results in ranks:
        assert_same_step(results['ddp'][loss_weighting, way], loss_weighting, shares)


@pytest.mark.parametrize('loss_weighting', WEIGHTINGS)
def test_fsdp2_gives_the_gradient_of_one_process(ranks, loss_weighting):
    shares = [micro_batches[0] for micro_batches in SHARES[len(ranks)]]
    for results in ranks:
        assert_same_step(results['fsdp2'][loss_weighting], loss_weighting, shares)


def test_fsdp2_around_the_network_takes_the_logits_path(ranks):
    shares = [micro_batches[0] for micro_batches in SHARES[len(ranks)]]
    assert_same_step(ranks[0]['fsdp2']['net'], 'sequence', shares)


def test_accelerate_divides_by_accumulation_steps(ranks):
    wrapper = make_wrapper('sequence')
    wrapper(**whole_batch()).backward()
    for results in ranks:
        assert_same_gradients(results['accelerate'], gradients(wrapper), 1e-5)


# without a process group


@pytest.mark.parametrize('total', [torch.tensor(2.5), torch.tensor(0.1, dtype=torch.float64)])
def test_without_a_group_the_tensor_is_returned(total):
    assert not dist.is_initialized()
    found = global_normalizer(total)
    assert found.dtype == total.dtype
    assert torch.equal(found, total)
    assert not global_normalizer(total.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize('total', [0, 3, 0.1, 2**24 + 1])
def test_without_a_group_a_number_becomes_a_tensor(total):
    found = global_normalizer(total)
    assert found.shape == ()
    assert found.dtype == torch.float64
    assert found.item() == total


def test_the_result_is_a_normalizer():
    wrapper, batch = make_wrapper('token'), whole_batch()
    expected = wrapper(**batch)
    for total in (wrapper.loss_normalizer(**batch), wrapper.loss_normalizer(**batch).item()):
        found = wrapper(**batch, normalizer=global_normalizer(total))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)
    assert wrapper(**batch, normalizer=global_normalizer(0)) == 0
