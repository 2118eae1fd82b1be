"""A verdict is decided by the network alone: by no mode around it, nothing gone, nothing without values."""

import contextlib
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from networks import judged_arguments
from test_around import IDS, Conv, Gated, LoRA, X, attention, head, linears, loss, network
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from xtloss.packing.known_networks import traits_of_example


@pytest.fixture(autouse=True)
def first_call() -> None:
    """As in a new process."""
    traits_of_example.cache_clear()


@contextlib.contextmanager
def changed(set_: Callable[[Any], None], value: Any, back: Any) -> Any:
    set_(value)
    try:
        yield
    finally:
        set_(back)


MODES: dict[str, Callable[[], Any]] = {
    'autocast': lambda: torch.autocast('cpu', torch.bfloat16),
    'no_grad': torch.no_grad,
    'inference_mode': torch.inference_mode,
    'default dtype': lambda: changed(torch.set_default_dtype, torch.float64, torch.float32),
    'half': lambda: changed(torch.set_default_dtype, torch.float16, torch.float32),
    'default device': lambda: torch.device('meta'),
    'deterministic': lambda: changed(torch.use_deterministic_algorithms, True, False),
    'fake': lambda: FakeTensorMode(allow_non_fake_inputs=True),
    'counted': lambda: FlopCounterMode(display=False),
}


@pytest.mark.parametrize('mode', MODES.values(), ids=MODES.keys())
def test_no_mode_decides(mode: Callable[[], Any]) -> None:
    """LoRA is accepted, a leak refused, in the mode and after it."""
    good, bad = network(), network()
    linears(LoRA)(good)
    head(Gated)(bad)
    ids = IDS.clone()
    dtype, generator = torch.get_default_dtype(), torch.get_rng_state()
    with mode():
        judged_arguments(good, ids, {})
        with pytest.raises(ValueError, match='to_logits Gated'):
            judged_arguments(bad, ids, {})
    assert torch.get_default_dtype() == dtype
    assert torch.equal(torch.get_rng_state(), generator)
    assert loss(good).isfinite()
    with pytest.raises(ValueError, match='to_logits Gated'):
        loss(bad)


def vmapped(net: nn.Module) -> None:
    torch.vmap(lambda _: loss(net))(torch.zeros(2))


def with_grad(net: nn.Module) -> None:
    parameters = dict(net.named_parameters())
    torch.func.grad(lambda p: torch.func.functional_call(net, p, (X,), judged_arguments(net, IDS, {})).sum())(
        parameters
    )


class Whole(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.net(x, **judged_arguments(self.net, ids, {}))


def exported(net: nn.Module) -> None:
    torch.export.export(Whole(net), (X, IDS), strict=False)


def compiled(net: nn.Module) -> None:
    torch.compile(Whole(net), backend='eager')(X, IDS)


@pytest.mark.parametrize('transform', [vmapped, with_grad, exported, compiled])
@pytest.mark.filterwarnings('ignore')
def test_the_first_call_of_a_process_may_be_transformed(transform: Callable[[Any], None]) -> None:
    """What it could not see is seen later, of the same network and of others."""
    net, lora, leaky = network(), network(), network()
    linears(LoRA)(lora)
    for first in (net, lora, leaky):
        with contextlib.suppress(Exception):  # some transforms x-transformers does not take
            transform(first)
    leaky.to_logits = Conv(leaky.to_logits, 1)
    assert loss(net).item() == pytest.approx(loss(lora.eval()).item(), rel=1e-5)
    assert loss(network()) == loss(net)
    with contextlib.suppress(Exception):
        transform(leaky)
    with pytest.raises(ValueError, match='to_logits Conv'):
        loss(leaky)


@pytest.mark.parametrize('device', ['meta', 'fake'])
def test_without_values_nothing_is_refused_and_nothing_kept(device: str) -> None:
    """Neither what would be accepted, nor what would not; but options are known without."""
    for change, leaks in ((linears(LoRA), False), (head(partial(Conv, back=1)), True)):
        net = network()
        change(net)
        values = net.state_dict()
        if device == 'meta':
            net.to('meta')
            judged_arguments(net, IDS, {})
            net.load_state_dict(values, assign=True)
        else:
            real = dict(net.named_parameters())
            with FakeTensorMode(allow_non_fake_inputs=True) as fake:
                torch.func.functional_call(
                    Whole(net), {f'net.{k}': fake.from_tensor(p) for k, p in real.items()}, (X, IDS)
                )
        if leaks:
            with pytest.raises(ValueError, match='to_logits Conv'):
                loss(net)
        else:
            assert loss(net).isfinite()
    with torch.device('meta'), pytest.raises(ValueError, match='shift_tokens'):
        judged_arguments(network(shift_tokens=1), IDS, {})


def leaky(sim: Tensor, dim: int = -1) -> Tensor:
    return sim.softmax(dim=-2)


def test_ids_of_freed_objects_decide_nothing() -> None:
    """An object made where one was freed is another."""
    net = network()
    attend = attention(net).attend
    for _ in range(50):
        attend.attn_fn = None
        with contextlib.suppress(ValueError):
            judged_arguments(net, IDS, {})
        attend.attn_fn = partial(leaky)
        with pytest.raises(ValueError, match='attn_custom_attn_fn'):
            judged_arguments(net, IDS, {})


def test_what_is_freed_is_not_what_is_none() -> None:
    """An attribute that dies, and None in its place."""
    net = network()
    net.to_logits = Changes(net.to_logits)
    net.to_logits.change = lambda x: x.roll(1, 1)
    with pytest.raises(ValueError, match='to_logits Changes'):
        loss(net)
    net.to_logits.change = None
    assert loss(net).isfinite()


CHANGES: dict[str, Callable[[Any], Any]] = {
    'module': head(partial(Conv, back=1)),
    'class': lambda net: setattr(net.to_logits, '__class__', Rolled),
    'hook': lambda net: net.to_logits.register_forward_hook(lambda m, a, out: out.roll(1, 1)),
    'attribute': lambda net: setattr(net.attn_layers.layers[1][1].ff[0], 'change', lambda x: x.roll(1, 1)),
    'parameter': lambda net: setattr(net.to_logits, 'weight', nn.Parameter(Shifted(net.to_logits.weight.detach()))),
    'forward': lambda net: setattr(net.to_logits, 'forward', partial(Rolled.forward, net.to_logits)),
    'option': lambda net: setattr(attention(net).attend, 'selective', True),
    'list': lambda net: net.attn_layers.layers[1][1].ff[0].table.append(1),
}  # fmt: skip


class Rolled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, x.roll(1, 1))


class Shifted(Tensor):
    """A weight that is multiplied otherwise."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return func(args[0].roll(1, 1), args[1].as_subclass(Tensor), *args[2:])
        return super().__torch_function__(func, types, args, kwargs)


class Changes(nn.Module):
    """Does what its attributes say."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.change, self.table = inner, lambda x: x, []

    def forward(self, x: Tensor) -> Tensor:
        x = x.roll(1, 1) if self.table else x
        return self.inner(x if self.change is None else self.change(x))


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES.keys())
def test_a_replaced_object_is_judged_anew(change: Callable[[Any], Any]) -> None:
    """Accepted before, refused after, twice."""
    net = network()
    feedforward = net.attn_layers.layers[1][1]
    feedforward.ff[0] = Changes(feedforward.ff[0])
    assert loss(net).isfinite()
    change(net)
    for _ in range(2):
        with pytest.raises(ValueError, match='is not known to keep'):
            loss(net)


def test_a_patched_class_is_judged_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all networks, and only as long as it is."""
    net, forward = network(), type(attention(network())).forward
    assert loss(net).isfinite()
    with monkeypatch.context() as patch:
        patch.setattr(type(attention(net)), 'forward', lambda self, x, **kwargs: forward(self, x.roll(1, 1), **kwargs))
        with pytest.raises(ValueError, match=r'layers\.0\.1 Attention'):
            loss(net)
    assert loss(net).isfinite()


def test_a_verdict_keeps_nothing_alive() -> None:
    """Neither the network nor what was exchanged."""
    net = network()
    linears(LoRA)(net)
    loss(net)
    dead = weakref.ref(net), weakref.ref(net.to_logits)
    del net
    gc.collect()
    assert [ref() for ref in dead] == [None, None]
