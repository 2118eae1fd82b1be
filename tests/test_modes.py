"""The modes that people train in: each gives the loss and the gradients of the bare wrapper, whatever its kind."""

import inspect
import warnings
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import x_transformers
from modes import KINDS, B, N, alone, alone_losses, batch, net, ours, wrap
from networks import assert_same_gradients, gradients
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.func import functional_call
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from x_transformers.x_transformers import Attention, FeedForward

kinds = pytest.mark.parametrize('kind', KINDS)
either = pytest.mark.parametrize('fused', ['auto', False])


# narrow numbers


@kinds
@either
@pytest.mark.parametrize('how', ['autocast', 'bfloat16'])
def test_narrow_is_no_further_from_float64_than_upstreams(kind: str, fused: bool | str, how: str) -> None:
    """Padded or packed rows beside the same sequences one by one; squared errors, added up over batches."""
    dtype = torch.float32 if how == 'autocast' else torch.bfloat16
    errors, exact = {'ours': Counter(), 'theirs': Counter()}, net(kind)
    options = {} if kind == 'continuous' else {'fused': fused}
    for seed in range(8):
        truth = alone(kind, exact, batch(kind, seed=seed))
        want, call, narrow = gradients(truth, exact), batch(kind, dtype, seed), net(kind, dtype)
        for name in errors:
            with torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'):
                loss = wrap(kind, narrow, **options)(**call) if name == 'ours' else alone(kind, narrow, call)
            errors[name]['loss'] += (loss.item() - truth.item()) ** 2
            for parameter, grad in gradients(loss, narrow).items():
                errors[name]['gradients'] += (grad - want[parameter]).square().sum().item()
            assert name == 'theirs' or loss.dtype == torch.float32
    for what, allowed in (('loss', 1.5), ('gradients', 1.1)):
        assert errors['ours'][what] ** 0.5 <= allowed * errors['theirs'][what] ** 0.5, what


# modules and functions around it


def blocks_(module: nn.Module) -> nn.Module:
    apply_activation_checkpointing(module, check_fn=lambda m: isinstance(m, Attention | FeedForward))
    return module


def around(wrapper: nn.Module, call: dict[str, Tensor], reentrant: bool) -> Tensor:
    anchor = torch.zeros((), requires_grad=True)  # where it runs without gradients first, something must want one
    return checkpoint(lambda _: wrapper(**call), anchor, use_reentrant=reentrant)


CHECKPOINTED: dict[str, Callable[[nn.Module, dict[str, Tensor]], Tensor]] = {
    'wrapper': lambda wrapper, call: around(wrapper, call, False),
    'wrapper, reentrant': lambda wrapper, call: around(wrapper, call, True),
    'blocks': lambda wrapper, call: blocks_(wrapper)(**call),
    'blocks in a wrapper': lambda wrapper, call: around(blocks_(wrapper), call, False),
}


@kinds
@either
@pytest.mark.parametrize('how', CHECKPOINTED)
@pytest.mark.parametrize('dropout', [0.0, 0.3])
def test_activation_checkpointing(kind: str, fused: bool | str, how: str, dropout: float) -> None:
    """The second forward draws what the first did."""
    options = {'layers_attn_dropout': dropout, 'layers_ff_dropout': dropout}
    wrapper, plain, call = ours(kind, fused=fused, **options), ours(kind, fused=fused, **options), batch(kind)
    torch.manual_seed(1)
    want = plain(**call)
    torch.manual_seed(1)
    got = CHECKPOINTED[how](wrapper, call)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    got.backward()
    want.backward()
    found = {name.replace('_checkpoint_wrapped_module.', ''): p.grad for name, p in wrapper.named_parameters()}
    assert_same_gradients(found, {name: p.grad for name, p in plain.named_parameters()}, 1e-9)


@pytest.mark.parametrize('kind', ['plain', 'packed', 'unpadded'])
@pytest.mark.parametrize(
    'targets', [['to_q', 'to_v'], ['to_q', 'to_v', 'to_logits']], ids=['attention', 'and the head']
)
def test_gradients_of_adapters(kind: str, targets: list[str]) -> None:
    """W + s·BA in one matrix has a gradient G; then that of A is s·BᵀG, and that of B is s·GAᵀ."""
    peft = pytest.importorskip('peft')
    adapted, merged, call = net(kind), net(kind), batch(kind)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        config = peft.LoraConfig(target_modules=targets, r=2, lora_alpha=3)
        peft.inject_adapter_in_model(config, adapted)
    pairs, scale = {}, 3 / 2
    for path, module in adapted.named_modules():
        if hasattr(module, 'lora_A'):
            pairs[path] = a, b = [m['default'].double().weight for m in (module.lora_A, module.lora_B)]
            nn.init.normal_(b, std=0.1)
            with torch.no_grad():
                merged.get_submodule(path).weight += scale * b @ a
    assert {path.rpartition('.')[2] for path in pairs} == set(targets)

    got, want = wrap(kind, adapted)(**call), wrap(kind, merged)(**call)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    got.backward()
    whole = gradients(want, merged)
    for path, (a, b) in pairs.items():
        gradient = whole[f'{path}.weight']
        found, exact = {'A': a.grad, 'B': b.grad}, {'A': scale * b.T @ gradient, 'B': scale * gradient @ a.T}
        assert_same_gradients(found, {name: g.detach() for name, g in exact.items()}, 1e-9)


@kinds
def test_forward_mode_and_batched_derivatives(kind: str) -> None:
    """As the plain gradient has them, where nothing is fused; torch's flash attention has no forward mode."""
    wrapper, call = ours(kind, fused=False, layers_attn_flash=False, layers_attn_qk_norm=True), batch(kind)
    wanted = gradients(wrapper(**call), wrapper)
    tangents = {name: torch.randn_like(grad) for name, grad in wanted.items()}
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(p, tangents[name]) for name, p in wrapper.named_parameters()}
        got = forward_ad.unpack_dual(functional_call(wrapper, dual, (), call)).tangent
    torch.testing.assert_close(got, sum((wanted[name] * tangents[name]).sum() for name in wanted), rtol=1e-9, atol=0)

    params = dict(wrapper.named_parameters())
    assert_same_gradients(torch.func.grad(lambda p: functional_call(wrapper, p, (), call))(params), wanted, 1e-9)

    loss, seeds = wrapper(**call), torch.tensor([1.0, -2.5], dtype=torch.float64)
    batched = torch.autograd.grad(loss, list(wrapper.parameters()), seeds, is_grads_batched=True)
    for row, seed in enumerate(seeds):
        found = {name: grad[row] for name, grad in zip(wanted, batched, strict=True)}
        assert_same_gradients(found, {name: seed * grad for name, grad in wanted.items()}, 1e-9, floor=1e-3)


@kinds
@either
@pytest.mark.parametrize('of', ['a row', 'a token', pytest.param('a token, compiled', marks=pytest.mark.slow)])
def test_a_loss_weight_gets_its_gradient(kind: str, fused: bool | str, of: str) -> None:
    """ℓ · L^-p / Z of each target by its sequence alone, whatever the weights are; a row's is the sum of its own."""
    torch._dynamo.reset()
    wrapper, call = ours(kind, fused=fused), batch(kind)
    wrapper.loss_weighting = 0.3
    run = torch.compile(wrapper, backend='eager') if 'compiled' in of else wrapper
    weight = torch.randn((B,) if of == 'a row' else (B, N), dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(run(**call, loss_weight=weight), weight)
    torch._dynamo.reset()

    want, total = torch.zeros(B, N, dtype=torch.float64), 0.0
    for row, here, losses in alone_losses(kind, wrapper.net, call):
        want[row, here] = losses * len(losses) ** -0.3
        total += len(losses) ** 0.7
    want = want / total
    torch.testing.assert_close(grad, want.sum(dim=1) if of == 'a row' else want, rtol=1e-9, atol=1e-12)


# where there are no values, a compiler, or no luck


@pytest.mark.parametrize('kind', ['plain', 'xl', 'continuous'])
def test_compiled(kind: str) -> None:
    """As users do, with whatever breaks x-transformers' own code makes."""
    torch._dynamo.reset()
    wrapper, call = ours(kind, torch.float32), batch(kind, torch.float32)
    got, want = torch.compile(wrapper, backend='aot_eager')(**call), wrapper(**call)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(got, wrapper), gradients(want, wrapper), 1e-5, floor=1e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize('kind', [*KINDS, 'continuous, rolled out'])
@either
@pytest.mark.parametrize('where', ['meta', 'fake'])
def test_without_values(kind: str, fused: bool | str, where: str) -> None:
    if 'entirely_masked.any()' in inspect.getsource(x_transformers.attend) and kind in ('packed', 'xl'):
        pytest.skip('this x-transformers reads its masks')
    absolute = {'layers_rotary_pos_emb': False, 'use_abs_pos_emb': True}  # x-transformers' rotary wants a real device
    wrapper, call = ours(kind.removesuffix(', rolled out'), fused=fused, **absolute), batch(kind.split(',')[0])
    call = {**call, 'rollout_steps': 3} if 'rolled' in kind else call
    shapes = [tuple(part.shape) for part in wrapper(**call, return_breakdown=True)[1]]
    if where == 'meta':
        wrapper, call = wrapper.to('meta'), tree_map(lambda t: t.to('meta') if isinstance(t, Tensor) else t, call)
        loss, breakdown = wrapper(**call, return_breakdown=True)
        loss.backward()
    else:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            call = tree_map(lambda t: mode.from_tensor(t) if isinstance(t, Tensor) else t, call)
            loss, breakdown = wrapper(**call, return_breakdown=True)
            loss.backward()
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    assert [tuple(part.shape) for part in breakdown] == shapes
    assert all(p.grad.shape == p.shape for p in wrapper.parameters())


@kinds
@either
def test_deterministic_algorithms(kind: str, fused: bool | str) -> None:
    """Nothing that it runs is refused, and twice the same is the same to the last bit."""
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            wrapper = ours(kind, torch.float32, fused)
            loss = wrapper(**batch(kind, torch.float32))
            runs.append({'loss': loss.detach(), **gradients(loss, wrapper)})
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
