"""What is around the network's own code: accepted where tokens keep to themselves, refused where they do not."""

import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from x_transformers import Decoder, TransformerWrapper
from x_transformers.x_transformers import Attention, FeedForward, LayerNorm

from xtloss import AutoregressiveWrapper

IDS = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3], [4, 4, 4, 4, 4, 4, 5, 5, 0, 0]])
X = torch.arange(20).view(2, 10) * 7 % 11
DIM = 16


def network(**options: Any) -> TransformerWrapper:
    torch.manual_seed(0)
    layers = {'dim': DIM, 'depth': 2, 'heads': 2, 'attn_dim_head': 8, 'verbose': False} | options
    return TransformerWrapper(num_tokens=11, max_seq_len=64, attn_layers=Decoder(**layers))


def loss(net: nn.Module, **options: Any) -> Tensor:
    return AutoregressiveWrapper(net, **options)(X, segment_ids=IDS)


def attention(net: Any) -> Any:
    return net.attn_layers.layers[0][1]


def swap(net: nn.Module, choose: Callable[[str, nn.Module], nn.Module | None]) -> None:
    """Put another module in the place of each for which there is one."""
    for path, module in list(net.named_modules()):
        other = choose(path, module) if path else None
        if other is not None:
            parent, _, name = path.rpartition('.')
            setattr(net.get_submodule(parent), name, other)


# token by token: each of these leaves the loss as it was, or as it is without packing


class LoRA(nn.Linear):
    """A linear layer with an addition of low rank, which is zero at first."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.load_state_dict(base.state_dict())
        self.down = nn.Parameter(torch.randn(2, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, 2))
        self.rate = 0.1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.dropout(x, self.rate, self.training) @ self.down.t() @ self.up.t()


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


class HalfInside(nn.Module):
    """A linear layer that computes in bfloat16."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.base.bias is None else self.base.bias.bfloat16()
        return F.linear(x.bfloat16(), self.base.weight.bfloat16(), bias).to(x)


class Around(nn.Module):
    """A wrapper of the user's own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
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


def linears(make: Callable[[nn.Linear], nn.Module]) -> Callable[[Any], None]:
    return lambda net: swap(net, lambda path, m: make(m) if type(m) is nn.Linear else None)


def blocks(make: Callable[[nn.Module], Any]) -> Callable[[Any], None]:
    return lambda net: swap(net, lambda path, m: make(m) if isinstance(m, Attention | FeedForward) else None)


def checkpoint(net: Any) -> None:
    apply_activation_checkpointing(net, check_fn=lambda m: isinstance(m, Attention | FeedForward))


def notes(net: Any) -> None:
    for module in net.modules():
        module.my_note, module.my_index, module.my_table = 'x', 3, {'of': [object()]}


def old_norm(norm: Callable[[nn.Module], Any]) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            linears(norm)(net)

    return change


def frozen_forward(net: Any) -> None:
    forward = attention(net).forward
    attention(net).forward = lambda *args, **kwargs: forward(*args, **kwargs)


ACCEPTED: dict[str, Callable[[Any], Any]] = {
    'activation checkpoint': checkpoint,
    'compiled blocks': blocks(partial(torch.compile, backend='eager')),
    'compiled in place': lambda net: attention(net).compile(backend='eager'),
    'lora': linears(LoRA),
    'lora, checkpoint': lambda net: (linears(LoRA)(net), checkpoint(net)),
    'int8 weights': linears(Int8),
    'bfloat16 inside': linears(HalfInside),
    'weight_norm': linears(nn.utils.parametrizations.weight_norm),
    'spectral_norm': linears(nn.utils.parametrizations.spectral_norm),
    'old weight_norm': old_norm(getattr(nn.utils, 'weight_norm')),  # noqa: B009
    'old spectral_norm': old_norm(nn.utils.spectral_norm),
    'parametrized': linears(lambda m: parametrize.register_parametrization(m, 'weight', Double())),
    'parametrized attention': lambda net: parametrize.register_parametrization(net.token_emb.emb, 'weight', Double()),
    'wrappers of blocks': blocks(Around),
    'wrapper of the head': lambda net: setattr(net, 'to_logits', Around(net.to_logits)),
    'wrapper of the embedding': lambda net: setattr(net.token_emb, 'emb', Around(net.token_emb.emb)),
    'mixture of experts': lambda net: swap(net, lambda p, m: Experts() if isinstance(m, FeedForward) else None),
    'another activation': lambda net: swap(net, lambda p, m: nn.GELU('tanh') if isinstance(m, nn.GELU) else None),
    'another norm': lambda net: swap(net, lambda p, m: nn.LayerNorm(DIM) if isinstance(m, LayerNorm) else None),
    'attributes': notes,
    'hook': lambda net: net.to_logits.register_forward_hook(lambda m, args, out: out * 1.0),
    'hook of attention': lambda net: attention(net).register_forward_hook(lambda m, args, out: (out[0] * 1.0, out[1])),
    'hook of layers': lambda net: net.attn_layers.register_forward_pre_hook(lambda m, args: None),
    'hook of all': lambda net: net.register_forward_hook(lambda m, args, out: None),
    'hook of scores': lambda net: attention(net).attend.register_forward_hook(lambda m, args, out: None),
    'keyword hook': lambda net: attention(net).register_forward_pre_hook(lambda m, a, k: (a, k), with_kwargs=True),
    'backward hook': lambda net: net.to_logits.register_full_backward_hook(lambda m, i, o: None),
    'forward': frozen_forward,
}  # fmt: skip


@pytest.mark.filterwarnings('ignore:The .grad attribute')  # of dynamo
@pytest.mark.parametrize('change', ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_is_around_is_accepted(change: Callable[[Any], Any]) -> None:
    """The loss is that of the bare network, and of its sequences one by one; the network is as it was."""
    net = network()
    bare = loss(net).item()
    change(net)
    net.eval()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    streams = torch.get_rng_state(), random.getstate()
    packed = loss(net)
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())

    runs = [(0, 0, 4), (0, 4, 7), (0, 7, 10), (1, 0, 6), (1, 6, 8)]
    alone = [AutoregressiveWrapper(net)(X[row : row + 1, i:j]) * (j - i - 1) for row, i, j in runs]
    torch.testing.assert_close(
        packed, sum(alone) / 13, rtol=1e-5 if change is not ACCEPTED['bfloat16 inside'] else 1e-2, atol=0
    )
    changes = ('mixture', 'another norm', 'another activation', 'spectral', 'int8', 'bfloat16')
    if not any(name in key for name in changes for key, value in ACCEPTED.items() if value is change):
        assert packed.item() == pytest.approx(bare, rel=1e-5)
    net.train()
    assert loss(net).isfinite()


# what mixes positions


class Conv(nn.Module):
    """Adds the token that is so and so far back."""

    def __init__(self, inner: nn.Module, back: int, scale: float = 1.0) -> None:
        super().__init__()
        self.inner, self.back, self.scale = inner, back, scale

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        x = x + self.scale * F.pad(x, (0, 0, self.back, 0))[:, : x.shape[1]]
        return self.inner(x, **kwargs)


class Gated(Conv):
    """The same behind a gate that is closed at first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner, 1)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        return self.inner(x + self.gate * F.pad(x, (0, 0, 1, 0))[:, : x.shape[1]], **kwargs)


class Dynamic(nn.Linear):
    """One scale of activations for the whole tensor."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.detach().abs().amax() / 127
        return super().forward((x / scale).round() * scale)


class Capacity(nn.Module):
    """The first tokens of those that choose an expert have a place there, the others none."""

    def __init__(self, inner: nn.Module, places: int) -> None:
        super().__init__()
        self.inner, self.places = inner, places

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        chosen = x[..., :1] > 0
        return self.inner(x) * (chosen & (chosen.cumsum(dim=1) <= self.places))


class By(nn.Module):
    """Something of the whole row."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


def scores(module: nn.Module, args: Any, out: Any) -> Any:
    return torch.roll(out[0], 1, dims=2), out[1]


def without_mask(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return args, kwargs | {'attn_mask': None}


@torch.no_grad()
def decorated(module: nn.Module, args: Any, out: Any) -> Any:
    return out.roll(1, dims=1)


def mixing_forward(net: Any) -> None:
    forward = attention(net).forward
    attention(net).forward = lambda x, *args, **kwargs: forward(x.roll(1, dims=1), *args, **kwargs)


def head(make: Callable[[nn.Module], nn.Module]) -> Callable[[Any], None]:
    return lambda net: setattr(net, 'to_logits', make(net.to_logits))


def feedforwards(make: Callable[[nn.Module], nn.Module]) -> Callable[[Any], None]:
    return lambda net: swap(net, lambda path, m: make(m) if isinstance(m, FeedForward) else None)


def roll_first(module: nn.Module, args: Any, out: Any) -> Any:
    return out[0].roll(1, 1), *out[1:]


def roll_input(module: nn.Module, args: Any) -> Any:
    return args[0].roll(1, 1), *args[1:]


REFUSED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    **{f'back {k}': ('to_logits Conv', head(partial(Conv, back=k))) for k in (1, 16, 40, 50, 100)},
    'a little': ('to_logits Conv', head(partial(Conv, back=1, scale=1e-2))),
    'ahead': ('to_logits.* By', head(lambda m: nn.Sequential(By(lambda x: x + F.pad(x, (0, 0, 0, 2))[:, 2:]), m))),
    'half the width': ('By', head(lambda m: nn.Sequential(By(lambda x: x + x.roll(x.shape[1] // 2, 1)), m))),
    'row norm': ('By', head(lambda m: nn.Sequential(By(lambda x: x / x.norm(dim=1, keepdim=True)), m))),
    'batch norm': ('By', head(lambda m: nn.Sequential(By(lambda x: x - x.mean(dim=0)), m))),
    'by the width': ('By', head(lambda m: nn.Sequential(By(lambda x: x / x.shape[1]), m))),
    'by the place': ('By', head(lambda m: nn.Sequential(By(lambda x: x + torch.arange(x.shape[1])[:, None].sin()), m))),
    'in training': ('Norm', head(lambda m: nn.Sequential(By(lambda x: x), Norm(), m))),
    'gate': ('to_logits Gated', head(Gated)),
    'dynamic int8': ('Dynamic', lambda net: linears(lambda m: Dynamic(m.in_features, m.out_features))(net)),
    'capacity': ('Capacity', feedforwards(partial(Capacity, places=12))),
    'around attention': ('Conv', lambda net: net.attn_layers.layers[0].__setitem__(1, Conv(attention(net), 1))),
    'recurrent': ('First', head(lambda m: nn.Sequential(First(), m))),
    'hook': ('to_logits.*hook', lambda net: net.to_logits.register_forward_hook(lambda m, a, o: o.roll(1, dims=1))),
    'decorated hook': ('to_logits.*hook', lambda net: net.to_logits.register_forward_hook(decorated)),
    'pre-hook': ('to_logits.*hook', lambda net: net.to_logits.register_forward_pre_hook(roll_input)),
    'hook of attention': ('hook', lambda net: attention(net).register_forward_hook(roll_first)),
    'hook of layers': ('hook', lambda net: net.attn_layers.register_forward_hook(roll_first)),
    'hook of all': ('hook', lambda net: net.register_forward_hook(roll_first)),
    'pre-hook of all': ('hook', lambda net: net.register_forward_pre_hook(roll_input)),
    'hook of scores': ('hook', lambda net: attention(net).attend.register_forward_hook(scores)),
    'mask dropped': ('hook', lambda net: attention(net).register_forward_pre_hook(without_mask, with_kwargs=True)),
    'mask dropped for all': (
        'hook',
        lambda net: net.attn_layers.register_forward_pre_hook(without_mask, with_kwargs=True),
    ),
    'forward': ('forward', mixing_forward),
}  # fmt: skip


class Norm(nn.BatchNorm1d):
    """BatchNorm over features that come last."""

    def __init__(self) -> None:
        super().__init__(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class First(nn.Module):
    """A recurrent network's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.GRU(DIM, DIM, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[0]


@pytest.mark.parametrize(('name', 'change'), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize('training', [False, True])
def test_what_mixes_positions_is_refused(name: str, change: Callable[[Any], Any], training: bool) -> None:
    """Whatever the mode; and the caller may take it on himself."""
    net = network().train(training)
    change(net)
    net.train(training)
    with pytest.raises(ValueError, match=f'segment_ids: .*{name}.* is not known to keep'):
        loss(net)


def test_global_hooks() -> None:
    """One that watches is accepted, one that mixes is not, and it is forgotten when it is removed."""
    net, seen = network(), []
    with nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m))):
        want = loss(net)
    assert Attention in seen

    def mix(module: nn.Module, args: Any, out: Any) -> Any:
        return out.roll(1, dims=1) if type(module) is nn.Linear else None

    with (
        nn.modules.module.register_module_forward_hook(mix),
        pytest.raises(ValueError, match=r'segment_ids: .* with a hook is not known'),
    ):
        loss(net)
    assert loss(net) == want
