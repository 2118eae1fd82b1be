"""What is measured of a network: what mixes sequences is above the limit, what does not is rounding, and stays."""

import copy
import random
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import decoder
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from x_transformers import Encoder, TransformerWrapper
from x_transformers.x_transformers import Attention, FeedForward

from xtloss import AutoregressiveWrapper, segment_leak

Change = Callable[[Any], Any]  # of a network, in place

IDS = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3], [4, 4, 4, 4, 4, 4, 5, 5, 0, 0]])
X = torch.arange(20).view(2, 10) * 7 % 11
DIM = 16
INF = float('inf')


def network(**options: Any) -> Any:
    torch.manual_seed(0)  # for what is put into it
    return decoder(**{'layers_depth': 2, 'max_seq_len': 64} | options)


def loss(net: nn.Module, **call: Any) -> Tensor:
    return AutoregressiveWrapper(net)(X, segment_ids=IDS, **call)


def attention(net: Any) -> Any:
    return net.attn_layers.layers[0][1]


def swap(kinds: Any, make: Callable[[Any], nn.Module]) -> Change:
    """A change that puts another module in the place of each of these classes."""

    def change(net: nn.Module) -> nn.Module:
        for path, module in list(net.named_modules()):
            if isinstance(module, kinds):
                parent, _, name = path.rpartition('.')
                setattr(net.get_submodule(parent), name, make(module))
        return net

    return change


linears, blocks = partial(swap, nn.Linear), partial(swap, (Attention, FeedForward))
checkpoint = blocks(checkpoint_wrapper)


def before_head(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda net: setattr(net, 'to_logits', nn.Sequential(By(change), net.to_logits))


# token by token


class LoRA(nn.Linear):
    """A linear layer with an addition of low rank, which is zero at first."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.load_state_dict(base.state_dict())
        self.down = nn.Parameter(torch.randn(2, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.dropout(x, 0.1, self.training) @ self.down.t() @ self.up.t()


def int8(net: Any) -> None:
    """A head whose weight is 8 bits wide."""
    linear = net.to_logits
    linear.weight = nn.Parameter((linear.weight.detach() * 400).round().to(torch.int8), requires_grad=False)
    linear.forward = lambda x: F.linear(x, linear.weight.to(x) / 400)


class Around(nn.Module):
    """A wrapper of the user's own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


ACCEPTED: dict[str, Change] = {
    'compiled blocks': blocks(partial(torch.compile, backend='eager')),
    'lora, checkpoint': lambda net: checkpoint(linears(LoRA)(net)),
    'int8 weights': int8,
    'weight_norm': linears(nn.utils.parametrizations.weight_norm),
    'spectral_norm': linears(nn.utils.parametrizations.spectral_norm),
    'wrapper of the embeddings': lambda net: (
        setattr(net, 'pos_emb', Around(net.pos_emb)), setattr(net.token_emb, 'emb', Around(net.token_emb.emb))
    ),
}  # fmt: skip


@pytest.mark.filterwarnings('ignore:The .grad attribute')  # of dynamo
@pytest.mark.parametrize('change', ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_works_token_by_token_passes(change: Change) -> None:
    """The loss is that of its sequences one by one; weights, buffers and modes are as they were."""
    net = network()
    change(net)
    net.eval()
    before = copy.deepcopy(net.state_dict())
    assert segment_leak(net) < 1e-5
    assert segment_leak(torch.compile(net, backend='eager')) < 1e-5
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert not any(module.training for module in net.modules())

    runs = [(0, 0, 4), (0, 4, 7), (0, 7, 10), (1, 0, 6), (1, 6, 8)]
    alone = [AutoregressiveWrapper(net)(X[row : row + 1, i:j]) * (j - i - 1) for row, i, j in runs]
    torch.testing.assert_close(loss(net), sum(alone) / 13, rtol=1e-5, atol=0)
    net.train()
    assert loss(net).isfinite()


# what mixes positions


class By(nn.Module):
    """Something of the whole row."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


class Norm(nn.BatchNorm1d):
    """BatchNorm over features that come last, which mixes in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def back(k: int, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    return lambda x: scale * F.pad(x, (0, 0, k, 0))[:, : x.shape[1]]


def adds_back(k: int, scale: float = 1.0) -> Callable[[Any], None]:
    return before_head(lambda x: x + back(k, scale)(x))


def closed_gates(*shape: int) -> Change:
    """A change that adds the token before, behind gates that are all closed at first."""

    def change(net: Any) -> None:
        net.to_logits.gates = nn.Parameter(torch.zeros(shape))
        net.to_logits.register_forward_pre_hook(lambda m, args: args[0] + m.gates.prod(dim=0) * back(1)(args[0]))

    return change


REFUSED: dict[str, Change] = {
    **{f'back {k}': adds_back(k) for k in (1, 16, 40, 50)},
    'a little': adds_back(1, scale=1e-2),
    'ahead': before_head(lambda x: x + F.pad(x, (0, 0, 0, 2))[:, 2:]),
    'half the width': before_head(lambda x: x + x.roll(x.shape[1] // 2, 1)),
    'row norm': before_head(lambda x: x / x.norm(dim=1, keepdim=True)),
    'other rows': before_head(lambda x: x - x.mean(dim=0)),
    'by the width': before_head(lambda x: x / x.shape[1]),
    'by the place': before_head(lambda x: x + torch.arange(x.shape[1])[:, None].sin()),
    'random': before_head(lambda x: x + torch.rand_like(x)),
    'where gradients flow': before_head(lambda x: x + back(1)(x) if torch.is_grad_enabled() else x),
    'where gradients reach': before_head(lambda x: x + back(1)(x) if x.requires_grad else x),
    'the first row, in training': before_head(lambda x: x + x[0, 0] if x.requires_grad else x),
    'the last row, in training': before_head(lambda x: x + x[-1, 0] if x.requires_grad else x),
    'in training': before_head(Norm(DIM)),
    'a closed gate': closed_gates(1),
    'two closed gates of each feature': closed_gates(2, DIM),
    'one scale of int8 activations': before_head(lambda x: (x / x.abs().amax() * 127).round() * x.abs().amax() / 127),
    'capacity, for the first that choose an expert': before_head(
        lambda x: x * (1 + ((x[..., :1] > 0).cumsum(dim=1) <= 12))
    ),
    'the last id': lambda net: net.token_emb.emb.register_forward_hook(
        lambda m, args, out: out + out.mean(dim=1, keepdim=True) * (args[0] == 10).any()
    ),
    'hook': lambda net: net.to_logits.register_forward_hook(lambda m, a, o: o.roll(1, dims=1)),
}


@pytest.mark.parametrize('change', REFUSED.values(), ids=REFUSED.keys())
def test_what_mixes_positions_is_refused(change: Change) -> None:
    net = network()
    change(net)
    assert 1e-2 < segment_leak(net) < INF
    with pytest.raises(ValueError, match=r'^segment_ids: sequences that share a row move each other in this network'):
        loss(net.eval())


class Narrow(nn.Linear):
    """A linear layer whose factors have so few digits, bfloat16 or TF32, and which adds up otherwise in other rows."""

    def __init__(self, base: nn.Linear, *, digits: int) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.load_state_dict(base.state_dict())
        self.digits = digits

    def forward(self, x: Tensor) -> Tensor:
        x = x * (1 + x.shape[1] % 3 * 2**-22)
        half = 1 << (22 - self.digits)
        narrow = [
            ((t.detach().contiguous().view(torch.int32) + half) & -2 * half).view(torch.float32)
            for t in (x, self.weight)
        ]
        return F.linear(*narrow, self.bias)


@pytest.mark.slow
@pytest.mark.parametrize('digits', [7, 10])
def test_rounding_of_narrow_products_is_no_leak(digits: int) -> None:
    """Though it is larger than one: a sequence alone is rounded otherwise. What mixes a little is seen all the same."""
    deep = {'layers_depth': 8, 'dim': 64}
    net = network(**deep, max_seq_len=256)
    linears(partial(Narrow, digits=digits))(net)
    with torch.no_grad():
        long = net(torch.arange(200)[None] % 11)
        assert (net(torch.arange(7)[None]) - long[:, :7]).abs().max() / long.std() > 1e-4  # as a rule 1e-5
    assert segment_leak(net) < 1e-3
    adds_back(1, scale=1e-2)(net)
    assert segment_leak(net) > 1e-2
    for change, amount in (
        (lambda net: None, 3e-3),
        (lambda net: net.to_logits.weight.data.mul_(100), 3e-3),
        (linears(partial(Narrow, digits=1)), 0.2),
    ):
        net = network(**deep)
        change(net)
        before_head(lambda x, amount=amount: x + amount * torch.arange(x.shape[1])[:, None].sin())(net)
        assert segment_leak(net) > 1e-3


def of_a_root(net: Any) -> None:
    """A scale that may not be negative."""
    net.to_logits.scale = nn.Parameter(torch.full((DIM,), 1e-3))
    net.to_logits.register_forward_pre_hook(lambda m, args: args[0] * m.scale.sqrt())


LOOPED = {'looped': True, 'layers_pre_and_post_norm': True, 'layers_depth': 1}
BETWEEN: dict[str, tuple[dict[str, Any], Change, float, float]] = {  # the least and the most that is measured
    'looks back further than most': ({'max_seq_len': 512}, adds_back(100), 0.1, 10),
    'nothing but nan': ({}, before_head(lambda x: x * torch.nan), INF, INF),
    'scales keep their sign': ({}, of_a_root, 0, 1e-4),
    'recycled as often as is drawn': ({'recycling': True}, lambda net: None, 0, 1e-4),
    'looped': (LOOPED, lambda net: None, 0, 1e-3),
    'exit gates, of which there are outputs too': (
        LOOPED,
        lambda net: net.exit_gate.register_forward_pre_hook(lambda m, args: args[0] + back(1)(args[0])),
        0.1,
        10,
    ),
}


@pytest.mark.parametrize('name', BETWEEN)
def test_how_much_is_measured(name: str) -> None:
    options, change, least, most = BETWEEN[name]
    net = network(**options)
    change(net)
    assert least <= segment_leak(net) <= most


def test_networks_of_other_kinds() -> None:
    layers = Encoder(dim=8, depth=1, heads=2, attn_dim_head=4)
    for net in (TransformerWrapper(num_tokens=4, max_seq_len=4, attn_layers=layers), nn.Linear(2, 2)):
        assert segment_leak(net) > 0.1


# ambient modes


@contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


MODES: dict[str, Callable[[], Any]] = {
    'autocast': lambda: torch.autocast('cpu', torch.bfloat16),
    'no_grad': torch.no_grad,
    'inference_mode': torch.inference_mode,
    'device': lambda: torch.device('meta'),
    'float64': lambda: default_dtype(torch.float64),
    'float16': lambda: default_dtype(torch.float16),
}


@pytest.mark.parametrize('mode', MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_no_mode_decides(mode: Callable[[], Any], dtype: torch.dtype) -> None:
    good, bad = network(layers_alibi_pos_bias=True).to(dtype), network().to(dtype)
    REFUSED['where gradients reach'](bad)
    want = segment_leak(good), segment_leak(bad)
    assert want[0] < 1e-5
    with mode():
        assert segment_leak(good) == pytest.approx(want[0], rel=0.5, abs=0)
        assert segment_leak(bad) == pytest.approx(want[1], rel=0.1)
    assert loss(good).isfinite()


def test_the_network_stays_as_it_is() -> None:
    """In half precision and in training, random streams too; what a forward registers is not left behind in float32."""
    net = network(layers_alibi_pos_bias=True, layers_layer_dropout=0.5, layers_attn_dropout=0.5).bfloat16().train()
    nn.utils.parametrizations.spectral_norm(net.to_logits)
    net.attn_layers.layers[1][1].eval()
    net.post_emb_norm = Norm(DIM).bfloat16()
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    streams = torch.get_rng_state(), random.getstate()
    first = segment_leak(net)
    assert segment_leak(net) == first < INF
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert all(torch.equal(t, before[name]) and t.dtype == before[name].dtype for name, t in net.state_dict().items())
    assert {t.dtype for t in net.buffers() if t.is_floating_point()} == {torch.bfloat16}
    assert [module.training for module in net.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


# arguments of the network


class Scaled(TransformerWrapper):
    def forward(self, x: Tensor, *, scale: Tensor, **kwargs: Any) -> Any:
        logits, hiddens = super().forward(x, **kwargs)
        return logits * scale, hiddens


def test_arguments() -> None:
    """Of each row and each token, of a batch of any size; ids of every integer dtype; masks of every shape; numbers."""
    net = network(embed_num_tokens={'kind': 3}, layers_cross_attend=True, layers_use_adaptive_layernorm=True)
    assert segment_leak(net) == INF
    for b in (0, 1, 5):
        for dtype in (torch.uint8, torch.int32, torch.uint64):
            given = {'context': torch.randn(b, 3, DIM), 'condition': torch.randn(b, DIM)}
            given['embed_ids'] = {'kind': torch.zeros(b, 12, dtype=dtype)}
            assert segment_leak(net, **given) < 1e-5
    mask = torch.ones(12, 12, dtype=torch.bool)
    for attn_mask in (mask, mask.expand(2, 12, 12), mask.expand(3, 1, 12, 12)):
        assert segment_leak(network(layers_rotary_pos_emb=True), attn_mask=attn_mask) < 1e-5
        assert segment_leak(network(layers_shift_tokens=1), attn_mask=attn_mask) > 1e-2
    net, read = network(max_seq_len=1024), []
    net.register_forward_pre_hook(lambda m, args: read.append(args[0].shape[1]))
    assert segment_leak(net, sum_embeds=torch.randn(1, 600, DIM)) < 1e-5
    assert max(read) == 256
    net = network()
    net.__class__ = Scaled
    for outer in (net, Around(net)):  # which says nothing of its arguments, and may get any
        assert segment_leak(outer, scale=torch.tensor(2.0)) < 1e-5
