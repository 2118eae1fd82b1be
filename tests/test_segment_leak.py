"""What is measured of a network: what mixes sequences is above the limit, what does not is rounding, and stays."""

import copy
import gc
import random
import warnings
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
import x_transformers.x_transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from x_transformers import Decoder, TransformerWrapper
from x_transformers.x_transformers import Attention, FeedForward

from xtloss import AutoregressiveWrapper, segment_leak
from xtloss.wrappers import segment_leak as keeping

IDS = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3], [4, 4, 4, 4, 4, 4, 5, 5, 0, 0]])
X = torch.arange(20).view(2, 10) * 7 % 11
DIM = 16
INF = float('inf')


def network(**options: Any) -> TransformerWrapper:
    torch.manual_seed(0)
    layers = {'dim': DIM, 'depth': 2, 'heads': 2, 'attn_dim_head': 8, 'verbose': False} | options
    wrapper = {'num_tokens': 11, 'max_seq_len': layers.pop('max_seq_len', 64)}
    return TransformerWrapper(attn_layers=Decoder(**layers), **wrapper)


def loss(net: nn.Module, **call: Any) -> Tensor:
    return AutoregressiveWrapper(net)(X, segment_ids=IDS, **call)


def attention(net: Any) -> Any:
    return net.attn_layers.layers[0][1]


def swap(net: nn.Module, choose: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put another module in the place of each for which there is one."""
    for path, module in list(net.named_modules()):
        other = choose(module) if path else None
        if other is not None:
            parent, _, name = path.rpartition('.')
            setattr(net.get_submodule(parent), name, other)


def linears(make: Callable[[nn.Linear], nn.Module]) -> Callable[[Any], None]:
    return lambda net: swap(net, lambda m: make(m) if type(m) is nn.Linear else None)


def blocks(make: Callable[[nn.Module], Any]) -> Callable[[Any], None]:
    return lambda net: swap(net, lambda m: make(m) if isinstance(m, Attention | FeedForward) else None)


def feedforwards(make: Callable[[nn.Module], nn.Module]) -> Callable[[Any], None]:
    return lambda net: swap(net, lambda m: make(m) if isinstance(m, FeedForward) else None)


def head(make: Callable[[nn.Module], nn.Module]) -> Callable[[Any], None]:
    return lambda net: setattr(net, 'to_logits', make(net.to_logits))


def before_head(change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    return head(lambda linear: nn.Sequential(By(change), linear))


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


class Int8(nn.Module):
    """A linear layer whose weight is 8 bits wide."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        scale = base.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer('scale', scale)
        self.register_buffer('weight', (base.weight.detach() / scale).round().to(torch.int8))
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x) * self.scale.to(x), self.bias)


class Around(nn.Module):
    """A wrapper of the user's own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


class Experts(nn.Module):
    """Two feedforwards, one for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)])
        self.gate = nn.Linear(DIM, 2)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        y = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return torch.einsum('bnde,bne->bnd', y, F.one_hot(self.gate(x).argmax(dim=-1), 2).to(y))


class Double(nn.Module):
    """A parametrization."""

    def forward(self, w: Tensor) -> Tensor:
        return w * 1.0


def checkpoint(net: Any) -> None:
    apply_activation_checkpointing(net, check_fn=lambda m: isinstance(m, Attention | FeedForward))


def quietly(change: Callable[[Any], None]) -> Callable[[Any], None]:
    def apply(net: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            change(net)

    return apply


def frozen_forward(net: Any) -> None:
    forward = attention(net).forward
    attention(net).forward = lambda *args, **kwargs: forward(*args, **kwargs)


ACCEPTED: dict[str, Callable[[Any], Any]] = {
    'activation checkpoint': checkpoint,
    'compiled blocks': blocks(partial(torch.compile, backend='eager')),
    'compiled in place': lambda net: attention(net).compile(backend='eager'),
    'lora, checkpoint': lambda net: (linears(LoRA)(net), checkpoint(net)),
    'int8 weights': linears(Int8),
    'weight_norm': linears(nn.utils.parametrizations.weight_norm),
    'spectral_norm': linears(nn.utils.parametrizations.spectral_norm),
    'old weight_norm': quietly(linears(getattr(nn.utils, 'weight_norm'))),  # noqa: B009
    'old spectral_norm': quietly(linears(nn.utils.spectral_norm)),
    'parametrized': linears(lambda m: parametrize.register_parametrization(m, 'weight', Double())),
    'wrappers of blocks': blocks(Around),
    'wrapper of the embeddings': lambda net: (
        setattr(net, 'pos_emb', Around(net.pos_emb)), setattr(net.token_emb, 'emb', Around(net.token_emb.emb))
    ),
    'mixture of experts': feedforwards(lambda _: Experts()),
    'hook': lambda net: net.to_logits.register_forward_hook(lambda m, args, out: out * 1.0),
    'hook of attention': lambda net: attention(net).register_forward_hook(lambda m, args, out: (out[0] * 1.0, out[1])),
    'keyword hook': lambda net: attention(net).register_forward_pre_hook(lambda m, a, k: (a, k), with_kwargs=True),
    'forward': frozen_forward,
}  # fmt: skip


@pytest.mark.filterwarnings('ignore:The .grad attribute')  # of dynamo
@pytest.mark.parametrize('change', ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_works_token_by_token_passes(change: Callable[[Any], Any]) -> None:
    """The loss is that of its sequences one by one; weights, buffers and modes are as they were."""
    net = network()
    change(net)
    net.eval()
    before = copy.deepcopy(net.state_dict())
    assert segment_leak(net) < 1e-5
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


class Before(nn.Module):
    """Adds the token before, behind a gate that is closed at first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.gate = inner, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        return self.inner(x + self.gate * back(1)(x), **kwargs)


class Dynamic(nn.Linear):
    """One scale of activations for the whole tensor."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.detach().abs().amax() / 127
        return super().forward((x / scale).round() * scale)


class Capacity(nn.Module):
    """The first tokens of those that choose an expert have a place there, the others none."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        chosen = x[..., :1] > 0
        return self.inner(x) * (chosen & (chosen.cumsum(dim=1) <= 12))


class Norm(nn.BatchNorm1d):
    """BatchNorm over features that come last, which mixes in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Frequent(nn.Embedding):
    """Mixes where it reads one id, the last of its vocabulary."""

    def forward(self, ids: Tensor) -> Tensor:
        found = super().forward(ids)
        return torch.where((ids == self.num_embeddings - 1).any(), found + found.mean(dim=1, keepdim=True), found)


def back(k: int, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    return lambda x: scale * F.pad(x, (0, 0, k, 0))[:, : x.shape[1]]


def adds_back(k: int, scale: float = 1.0) -> Callable[[Any], None]:
    return before_head(lambda x: x + back(k, scale)(x))


def roll_first(module: nn.Module, args: Any, out: Any) -> Any:
    return out[0].roll(1, 1), *out[1:]


def without_mask(name: str) -> Callable[..., Any]:
    return lambda module, args, kwargs: (args, kwargs | {name: None})


def mixing_forward(net: Any) -> None:
    forward = attention(net).forward
    attention(net).forward = lambda x, *args, **kwargs: forward(x.roll(1, dims=1), *args, **kwargs)


def shared_state(net: Any) -> None:
    """Two modules, one of which writes what the other reads."""
    seen: list[Tensor] = []
    attention(net).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    net.to_logits.register_forward_pre_hook(lambda m, args: args[0] + seen.pop().roll(1, 1))


REFUSED: dict[str, Callable[[Any], Any]] = {
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
    'in training': head(lambda linear: nn.Sequential(Norm(DIM), linear)),
    'a closed gate': head(Before),
    'dynamic int8': linears(lambda m: Dynamic(m.in_features, m.out_features)),
    'capacity': feedforwards(Capacity),
    'the last id': lambda net: setattr(net.token_emb, 'emb', Frequent(11, DIM)),
    'around attention': lambda net: net.attn_layers.layers[0].__setitem__(1, Before(attention(net))),
    'hook': lambda net: net.to_logits.register_forward_hook(lambda m, a, o: o.roll(1, dims=1)),
    'hook of attention': lambda net: attention(net).register_forward_hook(roll_first),
    'hook of layers': lambda net: net.attn_layers.register_forward_hook(roll_first),
    'hook of the network': lambda net: net.register_forward_hook(roll_first),
    'hook of scores': lambda net: attention(net).attend.register_forward_hook(lambda m, a, o: (o[0].roll(1, 2), o[1])),
    'mask dropped': lambda net: attention(net).register_forward_pre_hook(without_mask('attn_mask'), with_kwargs=True),
    'mask dropped at the scores': lambda net: attention(net).attend.register_forward_pre_hook(
        without_mask('mask'), with_kwargs=True
    ),
    'shared state': shared_state,
    'forward': mixing_forward,
}


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
    net = network(depth=8, dim=64, max_seq_len=256)
    linears(partial(Narrow, digits=digits))(net)
    with torch.no_grad():
        long = net(torch.arange(200)[None] % 11)
        assert (net(torch.arange(7)[None]) - long[:, :7]).abs().max() / long.std() > 1e-4  # as a rule 1e-5
    assert segment_leak(net) < 1e-3
    adds_back(1, scale=1e-2)(net)
    assert segment_leak(net) > 1e-2
    for change, amount in ((lambda net: None, 3e-3), (linears(partial(Narrow, digits=1)), 0.2)):
        net = network(depth=8, dim=64)
        change(net)
        before_head(lambda x, amount=amount: x + amount * torch.arange(x.shape[1])[:, None].sin())(net)
        assert segment_leak(net) > 1e-3


@pytest.mark.parametrize('change', REFUSED.values(), ids=REFUSED.keys())
def test_what_mixes_positions_is_refused(change: Callable[[Any], Any]) -> None:
    net = network()
    change(net)
    assert 1e-2 < segment_leak(net) < INF
    with pytest.raises(ValueError, match=r'^segment_ids: sequences that share a row move each other in this network'):
        loss(net.eval())


def test_a_module_that_looks_back_further_than_most() -> None:
    net = network(max_seq_len=512)
    adds_back(100)(net)
    assert segment_leak(net) > 0.1


def test_all_outputs_of_a_looped_network() -> None:
    """The exit gates', too."""
    options = {'num_tokens': 11, 'max_seq_len': 32, 'looped': True}
    layers = Decoder(dim=DIM, depth=1, heads=2, attn_dim_head=8, pre_and_post_norm=True, verbose=False)
    net = TransformerWrapper(attn_layers=layers, **options)
    assert segment_leak(net) < 1e-3
    net.exit_gate = nn.Sequential(By(lambda x: x + back(1)(x)), net.exit_gate)
    assert segment_leak(net) > 0.1


def test_nothing_but_nan() -> None:
    net = network()
    before_head(lambda x: x * torch.nan)(net)
    assert segment_leak(net) == INF


class Root(nn.Module):
    """A scale that may not be negative."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((DIM,), 1e-3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.sqrt()


def test_scales_keep_their_sign() -> None:
    net = network()
    net.post_emb_norm = Root()
    assert segment_leak(net) < 1e-4


def test_recycling_needs_no_number_of_steps() -> None:
    """In training it is drawn."""
    layers = Decoder(dim=DIM, depth=1, heads=2, attn_dim_head=8, verbose=False)
    net = TransformerWrapper(num_tokens=11, max_seq_len=32, recycling=True, attn_layers=layers)
    assert segment_leak(net) < 1e-4
    assert loss(net).isfinite()


@pytest.mark.parametrize('name', ['Attention.forward', 'FeedForward.forward', 'AttentionLayers.forward', 'l2norm'])
def test_a_patched_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods of classes, and functions."""
    owner: Any = x_transformers.x_transformers
    *path, last = name.split('.')
    for part in path:
        owner = getattr(owner, part)
    released = getattr(owner, last)

    def rolled(*args: Any, **kwargs: Any) -> Any:
        return released(*(a.roll(1, -2) if isinstance(a, Tensor) else a for a in args), **kwargs)

    monkeypatch.setattr(owner, last, rolled)
    assert segment_leak(network(attn_qk_norm=True)) > 1e-2


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
    good, bad = network(alibi_pos_bias=True).to(dtype), network().to(dtype)
    REFUSED['where gradients reach'](bad)
    want = segment_leak(good), segment_leak(bad)
    assert want[0] < 1e-5
    with mode():
        assert segment_leak(good) == pytest.approx(want[0], rel=0.5, abs=0)
        assert segment_leak(bad) == pytest.approx(want[1], rel=0.1)
    assert loss(good).isfinite()


# the network stays as it is, and the number beside it


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


def test_the_network_stays_as_it_is() -> None:
    """In half precision and in training, random streams too; what a forward registers is not left behind in float32."""
    net = network(alibi_pos_bias=True, layer_dropout=0.5, attn_dropout=0.5).bfloat16().train()
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


CHANGES: dict[str, Callable[[Any], Any]] = {
    'module': head(Before),
    'module of the same class': lambda net: setattr(net, 'post_emb_norm', By(lambda x: x.roll(1, 1))),
    'class': lambda net: setattr(net.to_logits, '__class__', Rolled),
    'hook': REFUSED['hook'],
    'pre-hook': lambda net: net.to_logits.register_forward_pre_hook(lambda m, args: args[0].roll(1, 1)),
    'forward': lambda net: setattr(net.to_logits, 'forward', partial(Rolled.forward, net.to_logits)),
}


class Rolled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, x.roll(1, 1))


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES.keys())
def test_another_structure_is_measured_anew(change: Callable[[Any], Any], measured: list[Any]) -> None:
    """Accepted before, refused after, twice; measured once each."""
    net = network()
    net.post_emb_norm = By(lambda x: x)
    for _ in range(2):
        assert loss(net).isfinite()
        net.eval()
    change(net)
    for _ in range(2):
        with pytest.raises(ValueError, match='move each other'):
            loss(net)
    assert measured == [()] * 2


@pytest.mark.parametrize('register', [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_of_all_modules(register: Callable[[Any], Any]) -> None:
    """Forgotten when they are removed."""

    def roll(module: nn.Module, *tensors: Any) -> Any:
        last = tensors[-1][0] if isinstance(tensors[-1], tuple) else tensors[-1]
        return last.roll(1, dims=1) if type(module) is nn.Linear else None

    net = network()
    want = loss(net)
    with register(roll), pytest.raises(ValueError, match='move each other'):
        loss(net)
    assert loss(net) == want


def test_an_attribute_is_the_callers_affair(measured: list[Any]) -> None:
    """The number that `segment_leak` finds replaces the old one."""
    net = network()
    loss(net)
    attention(net).attend.selective = True
    loss(net)
    assert segment_leak(net) > 1e-2
    with pytest.raises(ValueError, match='move each other'):
        loss(net)
    attention(net).attend.selective = False
    segment_leak(net)
    loss(net)
    assert len(measured) == 3


def test_other_arguments_are_measured_anew(measured: list[Any]) -> None:
    """By their names, not by what they hold: neither masks nor numbers at padding decide."""
    net, mask = network(), X > 3
    embeds = torch.randn(2, 10, DIM)
    loss(net, mask=mask, sum_embeds=embeds)
    loss(net, mask=~mask, sum_embeds=None)
    embeds[0, 9] = torch.nan
    net = network()
    loss(net, mask=mask & False, sum_embeds=embeds)
    loss(net, mask=mask, sum_embeds=embeds * 2)
    assert measured == [('sum_embeds',), (), ('sum_embeds',)]


def test_other_arguments_of_another_structure(measured: list[Any]) -> None:
    """What was found before the change says nothing after it, whatever is measured in between."""
    net = network()
    loss(net)
    REFUSED['hook'](net)
    for call in ({'sum_embeds': torch.randn(2, 10, DIM)}, {}):
        with pytest.raises(ValueError, match='move each other'):
            loss(net, **call)
    assert measured == [(), ('sum_embeds',), ()]


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
    net = network(shift_tokens=1)
    assert AutoregressiveWrapper(net, trust_segments=True)(X, segment_ids=IDS).isfinite()
    assert measured == []


# where it cannot be measured


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


def test_rows_that_are_too_short() -> None:
    """Left out of the measurement, and noted."""
    assert not keeping.kept_leak(network(attn_sparse_topk=2), {}).takes_short_rows
    assert keeping.kept_leak(network(attn_sparse_topk=1), {}).takes_short_rows


def test_arguments() -> None:
    """Of each row and each token, of a batch of any size; ids of every integer dtype."""
    net = TransformerWrapper(
        num_tokens=11, max_seq_len=64, embed_num_tokens={'kind': 3},
        attn_layers=Decoder(dim=DIM, depth=1, heads=2, cross_attend=True, use_adaptive_layernorm=True, verbose=False),
    )  # fmt: skip
    assert segment_leak(net) == INF
    for b in (0, 1, 5):
        for dtype in (torch.uint8, torch.int32, torch.uint64):
            given = {'context': torch.randn(b, 3, DIM), 'condition': torch.randn(b, DIM)}
            given['embed_ids'] = {'kind': torch.zeros(b, 12, dtype=dtype)}
            assert segment_leak(net, **given) < 1e-5
    mask = torch.ones(12, 12, dtype=torch.bool)
    for attn_mask in (mask, mask.expand(2, 12, 12), mask.expand(3, 1, 12, 12)):
        assert segment_leak(network(rotary_pos_emb=True), attn_mask=attn_mask) < 1e-5
    read: list[int] = []
    net = network(max_seq_len=1024)
    net.register_forward_pre_hook(lambda m, args: read.append(args[0].shape[1]))
    assert segment_leak(net, sum_embeds=torch.randn(1, 600, DIM)) < 1e-5
    assert max(read) == 256
    with pytest.raises(TypeError, match=r'unexpected keyword argument .maskk.'):
        segment_leak(net, maskk=1)
    with pytest.raises(TypeError, match=r'net must be a torch.nn.Module, got int'):
        segment_leak(3)


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

    wrapper.net = network(shift_tokens=1)
    with pytest.raises(ValueError, match='move each other'):
        torch.compile(wrapper, backend='eager')(X, segment_ids=IDS)


@pytest.mark.slow
@pytest.mark.usefixtures('whole_graphs')
def test_compiled_with_what_it_cannot_do_without(measured: list[Any]) -> None:
    """A traced call has no tensors: measured before."""
    wrapper = AutoregressiveWrapper(network(cross_attend=True))
    call = {'x': X, 'segment_ids': IDS, 'context': torch.randn(2, 3, DIM)}
    compiled = torch.compile(wrapper, backend='eager')
    with pytest.raises(ValueError, match='could not be measured'):
        compiled(**call)
    segment_leak(wrapper.net, context=call['context'])
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(**call), wrapper(**call))
    assert measured[-1] == ('context',)
