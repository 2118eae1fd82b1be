"""Parts of libraries around the network's own code: peft's adapters, FSDP's shards, quantized layers."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sharding import fsdp2
from test_segment_leak import LoRA, blocks, linears, loss, network
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from x_transformers.x_transformers import Attention, FeedForward

from xtloss import segment_leak


@pytest.mark.parametrize('targets', [['to_q', 'to_v'], ['to_q', 'to_logits', 'emb']])
@pytest.mark.parametrize(
    'options', [{}, {'use_dora': True}, {'lora_dropout': 0.1}], ids=lambda o: '-'.join(o) or 'lora'
)
@pytest.mark.parametrize('whole', [False, True])
def test_peft(targets: list[str], options: dict[str, Any], whole: bool) -> None:
    """Adapters in the place of linear layers and embeddings; also around the network; the loss is the bare one's."""
    peft = pytest.importorskip('peft')
    net = network()
    bare = loss(net).item()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        config = peft.LoraConfig(target_modules=targets, **options)
        adapted = peft.get_peft_model(net, config) if whole else peft.inject_adapter_in_model(config, net)
    assert any('lora_A' in name for name, _ in adapted.named_parameters())
    assert loss(adapted.eval()).item() == pytest.approx(bare, rel=1e-5)
    assert loss(adapted.train()).isfinite()


def test_dynamic_quantization() -> None:
    """Activations with one scale for the whole tensor couple sequences."""
    quantization = pytest.importorskip('torch.ao.quantization')
    if 'fbgemm' not in torch.backends.quantized.supported_engines:
        pytest.skip('no engine for quantized layers')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net = quantization.quantize_dynamic(network().eval(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match='move each other'):
        loss(net)


def sharded(rank: int, world: int, store: str) -> None:
    """In one process of a group."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=world)
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    fully_shard = fsdp2(world)

    def fsdp1(net: Any, **options: Any) -> nn.Module:
        wrap = {'device_id': torch.device('cpu'), 'sharding_strategy': ShardingStrategy.FULL_SHARD} | options
        return FullyShardedDataParallel(
            net, auto_wrap_policy=torch.distributed.fsdp.wrap.ModuleWrapPolicy([Attention, FeedForward]), **wrap
        )

    def by_parameter(net: Any) -> nn.Module:
        for module in net.modules():
            if isinstance(module, Attention | FeedForward):
                fully_shard(module)
        return fully_shard(net)

    def checkpointed(net: Any) -> nn.Module:
        apply_activation_checkpointing(net, check_fn=lambda m: isinstance(m, Attention | FeedForward))
        return net

    def ddp(net: Any) -> nn.Module:
        blocks(nn.parallel.DistributedDataParallel)(net)
        return net

    want = loss(network()).item()
    for shard in (
        fsdp1, lambda n: fsdp1(n, use_orig_params=True), by_parameter,
        lambda n: checkpointed(fsdp1(n)), lambda n: checkpointed(by_parameter(n)), ddp,
    ):  # fmt: skip
        for adapt in (lambda net: None, linears(LoRA)):
            net = network()
            adapt(net)
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
        linears(Rolled)(mixing)
        segment_leak(mixing)
        with pytest.raises(ValueError, match='move each other'):
            loss(shard(mixing))
    torch.distributed.destroy_process_group()


class Rolled(LoRA):
    """Reads the token before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.roll(1, 1))


@pytest.mark.slow
@pytest.mark.parametrize('world', [1, 2])
def test_sharded_networks(world: int, tmp_path: Path) -> None:
    """The loss of the bare network, which was measured before; what was not, or mixes, is refused."""
    torch.multiprocessing.spawn(sharded, (world, str(tmp_path / 'store')), nprocs=world)
