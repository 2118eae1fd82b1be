"""What was measured of a network is kept beside it, while its structure stays: eager, compiled, adapted, sharded."""

import gc
import warnings
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sharding import fsdp2
from test_segment_leak import (
    DIM,
    IDS,
    INF,
    REFUSED,
    Attention,
    By,
    Change,
    FeedForward,
    LoRA,
    X,
    attention,
    blocks,
    checkpoint,
    linears,
    loss,
    network,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from xtloss import AutoregressiveWrapper, segment_leak
from xtloss.wrappers import segment_leak as keeping

mixes = partial(pytest.raises, ValueError, match='move each other')


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The names of the arguments of each measurement."""
    calls: list[tuple[str, ...]] = []
    measure = keeping.measure

    def counted(net: nn.Module, arguments: dict[str, Any]) -> Any:
        calls.append(tuple(sorted(arguments)))
        return measure(net, arguments)

    monkeypatch.setattr(keeping, 'measure', counted)
    return calls


class Rolled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, x.roll(1, 1))


CHANGES: dict[str, Change] = {
    'module': REFUSED['back 1'],
    'module of the same class': lambda net: setattr(net, 'post_emb_norm', By(lambda x: x.roll(1, 1))),
    'class': lambda net: setattr(net.to_logits, '__class__', Rolled),
    'hook': REFUSED['hook'],
    'pre-hook': lambda net: net.to_logits.register_forward_pre_hook(lambda m, args: args[0].roll(1, 1)),
    'hook of all modules': lambda net: register_module_forward_hook(
        lambda m, args, out: out.roll(1, 1) if m is net.to_logits else None
    ),
    'pre-hook of all modules': lambda net: register_module_forward_pre_hook(
        lambda m, args: args[0].roll(1, 1) if m is net.to_logits else None
    ),
    'forward': lambda net: setattr(net.to_logits, 'forward', partial(Rolled.forward, net.to_logits)),
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES.keys())
def test_another_structure_is_measured_anew(change: Change, measured: list[Any]) -> None:
    """Accepted before, refused after, twice; measured once each. A hook is forgotten when it is removed."""
    net = network()
    net.post_emb_norm = By(lambda x: x)
    for _ in range(2):
        assert loss(net).isfinite()
        net.eval()
    hook = change(net)
    with hook if isinstance(hook, RemovableHandle) else nullcontext():
        for _ in range(2):
            with mixes():
                loss(net)
    assert measured == [()] * 2
    if isinstance(hook, RemovableHandle):
        assert loss(net).isfinite()


def test_an_attribute_is_the_callers_affair(measured: list[Any]) -> None:
    """The number that `segment_leak` finds replaces the old one."""
    net = network()
    loss(net)
    attention(net).attend.selective = True
    loss(net)
    assert segment_leak(net) > 1e-2
    with mixes():
        loss(net)
    attention(net).attend.selective = False
    segment_leak(net)
    loss(net)
    assert len(measured) == 3


def test_other_arguments_are_measured_anew(measured: list[Any]) -> None:
    """By their names: neither masks decide, nor NaN and inf. None of what was found outlives the structure."""
    net, mask, embeds = network(), X > 3, torch.randn(2, 10, DIM)
    embeds[0, 7:] = torch.tensor([torch.nan, torch.inf, -torch.inf])[:, None]
    loss(net, mask=mask & False, sum_embeds=embeds)
    loss(net, mask=mask, sum_embeds=embeds * 2)
    loss(net, mask=~mask, sum_embeds=None)
    assert measured == [('sum_embeds',), ()]
    REFUSED['hook'](net)
    for call in ({'sum_embeds': embeds}, {}):
        with mixes():
            loss(net, **call)
    assert measured == [('sum_embeds',), ()] * 2


def test_what_is_kept_keeps_nothing_alive() -> None:
    net = network()
    net.forward = partial(net.forward)
    loss(net)
    dead = weakref.ref(net), weakref.ref(net.to_logits)
    del net
    gc.collect()
    assert [ref() for ref in dead] == [None, None]


def test_measured_inside_a_checkpoint() -> None:
    """Which would else look for the measurement's tensors when it computes anew."""
    for training in (True, False):
        wrapper = AutoregressiveWrapper(network().train(training))
        found = torch.utils.checkpoint.checkpoint(wrapper, X, segment_ids=IDS, use_reentrant=False)
        found.backward()
        torch.testing.assert_close(found, wrapper(X, segment_ids=IDS))


def test_trust(measured: list[Any]) -> None:
    net = network(layers_shift_tokens=1)
    assert AutoregressiveWrapper(net, trust_segments=True)(X, segment_ids=IDS).isfinite()
    assert measured == []


def test_without_values_it_is_refused_and_nothing_is_kept() -> None:
    net = network()
    values = net.state_dict()
    net.to('meta')
    with pytest.raises(ValueError, match='segment_ids: it could not be measured'):
        loss(net)
    net.load_state_dict(values, assign=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert segment_leak(net) == INF
    assert loss(net).isfinite()


def test_out_of_memory_is_no_finding() -> None:
    def hook(*_: Any) -> None:
        raise torch.OutOfMemoryError

    net = network()
    with net.register_forward_pre_hook(hook), pytest.raises(torch.OutOfMemoryError):
        loss(net)
    assert loss(net).isfinite()


# torch.compile


@pytest.mark.slow
@pytest.mark.usefixtures('whole_graphs')
def test_compiled(measured: list[Any]) -> None:
    """Measured once while it is traced, and anew where the network is another; refused as in eager mode."""
    wrapper, counter = AutoregressiveWrapper(network()), CompileCounterWithBackend('eager')
    compiled = torch.compile(wrapper, backend=counter, fullgraph=True)
    for _ in range(3):
        compiled(X, segment_ids=IDS)
    assert (measured, counter.frame_count) == ([()], 1)
    wrapper.net.to_logits = LoRA(wrapper.net.to_logits)
    torch.testing.assert_close(compiled(X, segment_ids=IDS), wrapper.eval()(X, segment_ids=IDS))
    assert measured == [()] * 2

    wrapper.net = network(layers_shift_tokens=1)
    with mixes():
        torch.compile(wrapper, backend='eager')(X, segment_ids=IDS)

    wrapper.net = network(layers_cross_attend=True)  # a traced call has no tensors: measured before
    compiled = torch.compile(wrapper, backend='eager')
    call = {'x': X, 'segment_ids': IDS, 'context': torch.randn(2, 3, DIM)}
    with pytest.raises(ValueError, match='could not be measured'):
        compiled(**call)
    segment_leak(wrapper.net, context=call['context'])
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(**call), wrapper(**call))
    assert measured[-1] == ('context',)


# libraries


@pytest.mark.parametrize('options', [{'use_dora': True}, {'lora_dropout': 0.1}], ids='-'.join)
def test_peft(options: dict[str, Any]) -> None:
    """Adapters in the place of linear layers and embeddings, around the network; the loss is the bare one's."""
    peft = pytest.importorskip('peft')
    net = network()
    bare = loss(net).item()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        adapted = peft.get_peft_model(net, peft.LoraConfig(target_modules=['to_q', 'to_logits', 'emb'], **options))
    assert loss(adapted.eval()).item() == pytest.approx(bare, rel=1e-5)
    assert loss(adapted.train()).isfinite()


def sharded(rank: int, world: int, store: str) -> None:
    """In one process of a group."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=world)
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    fully_shard = fsdp2(world)
    fsdp1 = partial(
        FullyShardedDataParallel,
        auto_wrap_policy=ModuleWrapPolicy([Attention, FeedForward]),
        device_id=torch.device('cpu'),
        sharding_strategy=ShardingStrategy.FULL_SHARD,
    )

    def by_parameter(net: Any) -> nn.Module:
        for module in net.modules():
            if isinstance(module, Attention | FeedForward):
                fully_shard(module)
        return fully_shard(net)

    want = loss(network()).item()
    for shard in (
        fsdp1, partial(fsdp1, use_orig_params=True), by_parameter,
        lambda n: checkpoint(fsdp1(n)), lambda n: checkpoint(by_parameter(n)), blocks(DistributedDataParallel),
    ):  # fmt: skip
        for adapt in (lambda net: net, linears(LoRA)):
            net = adapt(network())
            segment_leak(net)
            net = shard(net).eval()
            for _ in range(2):
                found = loss(net)
                assert found.item() == pytest.approx(want, rel=1e-5), (shard, adapt)
                found.backward()
            assert segment_leak(net) < 1e-5
        with pytest.raises(ValueError, match='call segment_leak before'):
            loss(shard(network()))
        mixing = network()
        REFUSED['back 1'](mixing)
        segment_leak(mixing)
        with mixes():
            loss(shard(mixing))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize('world', [1, 2])
def test_sharded_networks(world: int, tmp_path: Path) -> None:
    """The loss of the bare network, which was measured before; what was not, or mixes, is refused."""
    torch.multiprocessing.spawn(sharded, (world, str(tmp_path / 'store')), nprocs=world)
