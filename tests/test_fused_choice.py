"""Where the wrapper fuses head and loss, and where it takes the logits path."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import x_transformers
from networks import ScaledLinear, Stub, assert_same_gradients, decoder, gradients
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from x_transformers import Decoder, TransformerWrapper

from xtloss import AutoregressiveWrapper, linear_cross_entropy
from xtloss.wrappers.head import why_not_fused


@pytest.fixture
def fusings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The shapes of embed, one for each time that the wrapper fused head and loss."""
    seen = []

    def spy(embed: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        seen.append(tuple(embed.shape))
        return linear_cross_entropy(embed, *args, **kwargs)

    monkeypatch.setattr('xtloss.wrappers.rows.linear_cross_entropy', spy)
    return seen


class OwnNetwork(TransformerWrapper):
    """A subclass, which may do anything in its forward."""

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        logits, cache = super().forward(x, **kwargs)
        return logits / 2, cache


class Scaled(nn.Embedding):
    """An embedding by name only: the head would read its weights unscaled."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 2


def own_network() -> TransformerWrapper:
    layers = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, verbose=False)
    return OwnNetwork(num_tokens=11, max_seq_len=32, attn_layers=layers)


def with_head(head: Callable[[], nn.Module]) -> Callable[[], TransformerWrapper]:
    return lambda: decoder(to_logits=head())


def after(change: Callable[[TransformerWrapper], Any], **network: Any) -> Callable[[], TransformerWrapper]:
    """A network that was changed after it was built."""

    def make() -> TransformerWrapper:
        net = decoder(**network)
        change(net)
        return net

    return make


def doubled(_: nn.Module, __: Any, output: Any) -> Any:
    return (output[0] * 2, output[1]) if isinstance(output, tuple) else output * 2


X = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(1))
PREPENDED = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(2))

# networks and calls that are fused
PLAIN: dict[str, tuple[Callable[[], TransformerWrapper], dict[str, Any]]] = {
    'plain': (decoder, {}),
    'lens': (decoder, {'lens': torch.tensor([9, 1, 4])}),
    'bias': (with_head(lambda: nn.Linear(16, 11)), {}),
    'more words than tokens': (lambda: decoder(logits_dim=13), {}),
    'tied': (lambda: decoder(tie_embedding=True), {}),
    'tied, own scale': (lambda: decoder(tie_embedding=True, tie_embedding_scale=0.5), {}),
    'tied, l2norm': (lambda: decoder(tie_embedding=True, l2norm_embed=True), {}),
    'scale set later': (
        after(lambda net: setattr(net, 'tie_embedding_scale', 3.0), tie_embedding_scale=1.0, tie_embedding=True),
        {},
    ),
    'memory tokens': (lambda: decoder(num_memory_tokens=2), {}),
    'wider embeddings': (lambda: decoder(emb_dim=24), {}),
    'prepend_embeds': (decoder, {'prepend_embeds': PREPENDED, 'lens': torch.tensor([9, 2, 4])}),
    'hooks on the layers': (after(lambda net: net.attn_layers.register_forward_hook(doubled)), {}),
    'head replaced by a linear one': (after(lambda net: setattr(net, 'to_logits', nn.Linear(16, 11))), {}),
    'arguments that are None': (decoder, {'to_logits_kwargs': None, 'return_logit_entropies': None, 'pos': None}),
}

HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    'hook': lambda module: module.register_forward_hook(doubled),
    'pre-hook': lambda module: module.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
    'backward hook': lambda module: module.register_full_backward_hook(lambda m, given, out: (given[0] * 2,)),
    'backward pre-hook': lambda module: module.register_full_backward_pre_hook(lambda m, out: (out[0] * 2,)),
}

# networks that are not fused, and what a ValueError says
LOGITS: dict[str, tuple[Callable[[], TransformerWrapper], str]] = {
    'deep head': (with_head(lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 11))), 'head is a Sequential'),
    'LoRA': (with_head(lambda: ScaledLinear(16, 11)), 'head is a ScaledLinear'),
    'function': (lambda: decoder(to_logits=lambda x: x[..., :11]), 'head is a function'),
    'other forward of the head': (
        after(lambda net: setattr(net.to_logits, 'forward', lambda x: x[..., :11])),
        'head has .*another forward',
    ),
    'hook on the network': (after(lambda net: net.register_forward_hook(doubled)), 'network has hooks'),
    'pre-hook on the network': (
        after(lambda net: net.register_forward_pre_hook(lambda _, args: (args[0].flip(0),))),
        'network has hooks',
    ),
    'weight_norm': (after(lambda net: parametrizations.weight_norm(net.to_logits)), 'Parametrized'),
    'spectral_norm': (after(lambda net: spectral_norm(net.to_logits)), 'head has hooks'),
    'pruned': (after(lambda net: prune.l1_unstructured(net.to_logits, 'weight', 5)), 'head has hooks'),
    'mixture of softmax': (lambda: decoder(mixture_of_softmax=True), 'to_mixture'),
    'sigsoftmax': (lambda: decoder(sigsoftmax_logits=True), 'sigsoftmax_logits'),
    'looped': (lambda: decoder(looped=True, layers_pre_and_post_norm=True), 'looped'),
    'attn_pool': (lambda: decoder(attn_pool=True), 'attn_pool'),
    'squeeze_out_last_dim': (lambda: decoder(squeeze_out_last_dim=True), 'squeeze_out_last_dim'),
    'an embedding of ones own': (
        after(lambda net: setattr(net.token_emb, 'emb', Scaled(11, 16)), tie_embedding=True),
        'tied embedding is not a plain nn.Embedding',
    ),
    'subclassed network': (own_network, 'network is a OwnNetwork'),
    **{
        f'{name} on the head': (after(lambda net, hook=hook: hook(net.to_logits)), 'head has hooks')
        for name, hook in HOOKS.items()
    },
}

# the same, but x-transformers' own loss cannot be had of them
NO_LOSS: dict[str, tuple[Callable[[], TransformerWrapper], str]] = {
    'use_cls_token': (lambda: decoder(use_cls_token=True), 'cls_token'),
    'average_pool_embed': (lambda: decoder(average_pool_embed=True), 'average_pool_embed'),
    'return_only_embed': (lambda: decoder(return_only_embed=True), 'NoneType'),
    'not x-transformers': (lambda: Stub(torch.zeros(3, 9, 11)), 'network is a Stub'),
}

# arguments of calls that are not fused: those that leave a loss as upstream's, those that do not in every release
WITH_LOSS: dict[str, Any] = {'return_outputs': True, 'return_logit_entropies': True, 'to_logits_kwargs': {}}
WITHOUT_LOSS = ['return_logits_and_embeddings', 'excise_prepend_embeds', 'return_embeddings', 'head_temperature']
TAKE_LOGITS = {name: (make, {}, reason) for name, (make, reason) in LOGITS.items()}
TAKE_LOGITS |= {name: (decoder, {name: value}, name) for name, value in WITH_LOSS.items()}
ARE_REFUSED = {name: (make, {}, reason) for name, (make, reason) in NO_LOSS.items()}
ARE_REFUSED |= {name: (decoder, {name: True}, name) for name in WITHOUT_LOSS}


def built(make: Callable[[], TransformerWrapper]) -> TransformerWrapper:
    """The network, from a seed; skipped where this release of x-transformers lacks an option."""
    torch.manual_seed(3)
    try:
        return make()
    except TypeError as error:
        if 'unexpected keyword argument' not in str(error):
            raise
        pytest.skip(f'x-transformers has no such option: {error}')


def loss_of(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def assert_like_upstream(make: Callable[[], TransformerWrapper], call: dict[str, Any], fused: str | bool) -> None:
    """Loss and gradients are upstream's, whatever the decision was."""
    ours, theirs = AutoregressiveWrapper(built(make), fused=fused), x_transformers.AutoregressiveWrapper(built(make))
    losses = []
    for wrapper in (ours, theirs):
        torch.manual_seed(5)
        losses.append(loss_of(wrapper(X, **call)))
    tolerance = 1e-4 if ours.net.looped else 1e-5
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=tolerance)
    assert_same_gradients(gradients(losses[0], ours), gradients(losses[1], theirs), tolerance)


@pytest.mark.parametrize('name', PLAIN)
def test_what_is_fused(name: str, fusings: list[tuple[Any, ...]]) -> None:
    make, call = PLAIN[name]
    call = {k: v for k, v in call.items() if k not in ('to_logits_kwargs', 'return_logit_entropies')}
    assert_like_upstream(make, call, fused=True)
    assert_like_upstream(make, call, fused='auto')
    AutoregressiveWrapper(built(make), fused='auto')(X, **PLAIN[name][1] | call)
    assert len(fusings) == 3


@pytest.mark.parametrize('name', TAKE_LOGITS)
def test_what_takes_the_logits_path(name: str, fusings: list[tuple[Any, ...]]) -> None:
    make, call, reason = TAKE_LOGITS[name]
    assert_like_upstream(make, call, fused='auto')
    assert not fusings
    with pytest.raises(ValueError, match=rf'^fused=True, but .*{reason}'):
        AutoregressiveWrapper(built(make), fused=True)(X, **call)


@pytest.mark.parametrize('name', ARE_REFUSED)
def test_what_is_not_fused_either(name: str) -> None:
    make, call, reason = ARE_REFUSED[name]
    net = built(make)
    with pytest.raises(ValueError, match=rf'^fused=True, but .*{reason}'):
        AutoregressiveWrapper(net, fused=True)(X, **call)


def test_false_never_fuses(fusings: list[tuple[Any, ...]]) -> None:
    AutoregressiveWrapper(decoder(), fused=False)(X)
    assert not fusings


def test_a_hook_that_is_removed_is_forgotten(fusings: list[tuple[Any, ...]]) -> None:
    wrapper = AutoregressiveWrapper(decoder())
    handle = wrapper.net.to_logits.register_forward_hook(doubled)
    wrapper(X)
    assert not fusings
    handle.remove()
    wrapper(X)
    assert len(fusings) == 1


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """As a profiler would, with the name and the module of what it wraps."""

    @functools.wraps(function)
    def doubling(*args: Any, **kwargs: Any) -> Any:
        return doubled(args[0], args[1:], function(*args, **kwargs))

    return doubling


modules = nn.modules.module
FOR_ALL: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    'forward hook': lambda _: modules.register_module_forward_hook(doubled_heads),
    'forward hook with keywords, called always': lambda _: modules.register_module_forward_hook(
        lambda m, args, kwargs, out=None: doubled_heads(m, args, out), with_kwargs=True, always_call=True
    ),
    'forward pre-hook': lambda _: modules.register_module_forward_pre_hook(
        lambda m, args: (args[0] * 2,) if is_head(m) else None
    ),
    'backward hook': lambda _: modules.register_module_full_backward_hook(
        lambda m, given, _: (given[0] * 2,) if is_head(m) else None
    ),
    'backward pre-hook': lambda _: modules.register_module_full_backward_pre_hook(
        lambda m, given: (given[0] * 2,) if is_head(m) else None
    ),
    'forward of nn.Linear': lambda patch: patch.setattr(nn.Linear, 'forward', wrapped(nn.Linear.forward)),
    'forward of the network': lambda patch: patch.setattr(
        TransformerWrapper, 'forward', wrapped(TransformerWrapper.forward)
    ),
}


def doubled_heads(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 2 if is_head(module) else None


def is_head(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.out_features == 11


@pytest.mark.filterwarnings('ignore:Full backward hook is firing')  # at the embedding, which no gradient enters
@pytest.mark.parametrize('name', FOR_ALL)
def test_interception_of_all_modules(
    name: str, fusings: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with the patch or the handle, and then the head is fused again."""
    before = AutoregressiveWrapper(built(decoder))(X).item()
    handle = FOR_ALL[name](monkeypatch)
    try:
        assert_like_upstream(decoder, {}, fused='auto')
        assert len(fusings) == 1
        with pytest.raises(ValueError, match='hooks or another forward'):
            AutoregressiveWrapper(built(decoder), fused=True)(X)
        if 'backward' not in name:
            assert AutoregressiveWrapper(built(decoder))(X).item() != pytest.approx(before, rel=1e-3)
    finally:
        handle.remove() if handle is not None else monkeypatch.undo()
        modules._global_forward_hooks_with_kwargs.clear()  # which remove() forgets


@pytest.mark.parametrize('changed', ['original', 'copy'])
def test_a_copied_network_with_a_tied_head_reads_its_own_embedding(
    changed: str, fusings: list[tuple[Any, ...]]
) -> None:
    """x-transformers' head, a lambda, goes on reading that of the original."""
    original = decoder(tie_embedding=True)
    clone = copy.deepcopy(original)
    fresh = decoder(tie_embedding=True)
    with torch.no_grad():
        (original if changed == 'original' else clone).token_emb.emb.weight.mul_(2)
        fresh.token_emb.emb.weight.mul_(2 if changed == 'copy' else 1)
    for fused in (True, False):
        ours, theirs = AutoregressiveWrapper(clone, fused=fused), x_transformers.AutoregressiveWrapper(fresh)
        got, want = ours(X), theirs(X)
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
        assert_same_gradients(gradients(got, ours), gradients(want, theirs), 1e-5)
    assert len(fusings) == 1


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.usefixtures('process_group')
def test_a_sharded_weight_is_not_fused(tied: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    net = AutoregressiveWrapper(decoder(tie_embedding=tied)).net
    holder = net.token_emb.emb if tied else net.to_logits
    assert why_not_fused(net) is None
    holder.weight = nn.Parameter(distribute_tensor(holder.weight.detach(), init_device_mesh('cpu', (1,)), [Shard(0)]))
    assert 'DTensor' in why_not_fused(net)
    with pytest.raises(ValueError, match='DTensor'):
        AutoregressiveWrapper(net, fused=True)(X)
