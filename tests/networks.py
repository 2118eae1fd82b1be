"""Small networks and batches for the tests, each made from a seed of its own."""

import random
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from x_transformers import ContinuousTransformerWrapper, Decoder, TransformerWrapper

WEIGHTINGS = ('token', 'sequence', 'square', 'padded', 'sequence_sum', 0.3)
EXACT = {'layers_attn_qk_norm': True}  # else x-transformers takes attention's softmax in float32, whatever the network
ROTARY = {'layers_rotary_pos_emb': True, 'layers_depth': 2}
NETWORKS: dict[str, dict[str, Any]] = {  # each kind of positions, heads and attention
    'absolute': {'layers_depth': 2},
    'rotary': ROTARY,
    'tied': ROTARY | {'tie_embedding': True},
    'flash': ROTARY | {'layers_attn_flash': True},
    'alibi': {'layers_alibi_pos_bias': True, 'use_abs_pos_emb': False},
    'mixture of softmax': ROTARY | {'mixture_of_softmax': True},
    'continuous head': ROTARY | {'add_continuous_pred_head': True},
    'looped': ROTARY | {'looped': True, 'layers_pre_and_post_norm': True},
}


def of_layers(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the layers, whose names begin so, and those of the network."""
    layers = {'depth': 1, 'heads': 2, 'attn_dim_head': 8, 'verbose': False}
    layers |= {k.removeprefix('layers_'): v for k, v in options.items() if k.startswith('layers_')}
    return layers, {'max_seq_len': 32} | {k: v for k, v in options.items() if not k.startswith('layers_')}


def decoder(
    *, num_tokens: int = 11, dim: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> TransformerWrapper:
    """A decoder-only network of one layer. `options` go to `TransformerWrapper`, those with `layers_` to `Decoder`.

    The same arguments give the same parameters, so that two wrappers can each have a network of their own: a copied
    network with tied embeddings would read the weights of the original.
    """
    layers, options = of_layers(options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = TransformerWrapper(num_tokens=num_tokens, attn_layers=Decoder(dim=dim, **layers), **options)
        for p in net.parameters():  # x-transformers starts some parameters at zero, where a gradient could hide
            nn.init.normal_(p, std=0.1) if not p.any() else None
    return net.to(dtype)


def continuous_network(
    *, features: int = 5, dtype: torch.dtype = torch.float32, **options: Any
) -> ContinuousTransformerWrapper:
    """A network of frames, of one layer; the same arguments give the same parameters. `options` as for `decoder`."""
    layers, options = of_layers(options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = Decoder(dim=16, **layers)
        return ContinuousTransformerWrapper(dim_in=features, dim_out=features, attn_layers=layers, **options).to(dtype)


def frames(b: int = 3, n: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """A batch for it, (b, n, d)."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(b, n, 5, generator=draw, dtype=torch.float64).to(dtype)


class ScaledLinear(nn.Linear):
    """A linear layer by name only, as LoRA layers are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


class Stub(nn.Module):
    """A network whose answer is the tensor it was given, whatever it reads. It keeps what it was called with."""

    max_seq_len = 1024
    add_continuous_pred_head = False
    looped = False
    can_cache_kv = False
    probabilistic = False

    def __init__(self, logits: Tensor, *, output_is_log_prob: bool = False) -> None:
        """`logits` is what `forward` returns, (b, n, v)."""
        super().__init__()
        self.logits = logits
        self.output_is_log_prob = output_is_log_prob
        self.seen: list[tuple[Tensor, dict[str, Any]]] = []

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, SimpleNamespace]:
        """The logits and a cache, as an x-transformers network gives with `return_intermediates`."""
        self.seen.append((x, kwargs))
        return self.logits, SimpleNamespace()


class Unreachable(Stub):
    """A network that must not run."""

    def __init__(self) -> None:
        """It has one parameter, so that it knows a device and a dtype."""
        super().__init__(torch.zeros(1))
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, SimpleNamespace]:
        """Never."""
        raise AssertionError('the network ran')


class HostCopies(TorchDispatchMode):
    """Counts the tensors whose values are read, which a GPU would have to wait for."""

    def __init__(self) -> None:
        """None yet."""
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at every operation."""
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """The gradient of each parameter that the loss reaches."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


def value_and_gradients(wrapper: nn.Module, *calls: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Of one call, or of several as micro-batches over their common normalizer."""
    if len(calls) > 1:
        z = sum(wrapper.loss_normalizer(**call) for call in calls)
        calls = tuple(call | {'normalizer': z} for call in calls)
    loss = sum(wrapper(**call) for call in calls)
    return loss.item(), gradients(loss, wrapper)


def assert_same_gradients(
    got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, floor: float = 0.0
) -> None:
    """max|Δ| / max|g| of each parameter is within `tolerance`; a parameter that one side lacks has a gradient of 0.

    Where a parameter's whole gradient may vanish and leave rounding alone, `floor` puts a lower bound to its scale, as
    a part of the largest gradient of all parameters.
    """
    lower = floor * max((g.abs().max().item() for g in want.values()), default=0.0)
    for name in got.keys() | want.keys():
        a, g = got.get(name), want.get(name)
        a = torch.zeros_like(g) if a is None else a
        g = torch.zeros_like(a) if g is None else g
        scale, off = max(g.abs().max().item(), lower), (a - g).abs().max().item()
        assert off <= tolerance * scale, f'{name}: {off:.1e} off at a scale of {scale:.1e}'


def run(wrapper: nn.Module, call: dict[str, Any]) -> Any:
    """One forward, from the same state of every random number generator."""
    random.seed(5)
    torch.manual_seed(5)
    return wrapper(**call)


def assert_same(
    ours: nn.Module, theirs: nn.Module, call: dict[str, Any], tolerance: float = 1e-5, floor: float = 0.0
) -> None:
    """Both wrappers give the same loss, and gradients to the same parameters, to the contract's tolerance."""
    got, want = run(ours, call), run(theirs, call)
    assert abs(got.item() - want.item()) <= tolerance * abs(want.item())
    grads, wanted = gradients(got, ours), gradients(want, theirs)
    assert grads.keys() == wanted.keys()
    assert_same_gradients(grads, wanted, tolerance, floor)
