"""XLAutoregressiveWrapper: one equation over the whole row, however it is cut into segments."""

import inspect
import random
from importlib.metadata import version
from typing import Any

import pytest
import torch
from batches import WEIGHTS, random_batch, subsets
from hypothesis import given
from hypothesis import strategies as st
from modes import assert_equation, carried
from networks import EXACT, WEIGHTINGS, ScaledLinear, Unreachable, assert_same_gradients, decoder, gradients
from oracle import differentiable, expected
from torch import Tensor, nn
from x_transformers import TransformerWrapper
from x_transformers import XLAutoregressiveWrapper as Upstream

from xtloss import XLAutoregressiveWrapper

B, N, S, VOCAB = 4, 14, 5, 11  # segments of 5, 5 and 3 inputs
OF_UPSTREAM = inspect.signature(Upstream).parameters
TRAINS = 'ttt_module_paths' in OF_UPSTREAM  # from 2.21 on
RELEASE = tuple(map(int, version('x-transformers').split('.')[:2]))
needs_ttt = pytest.mark.skipif(not TRAINS, reason='this x-transformers has no test-time training')
TTT: dict[str, Any] = {'tbptt_steps': 2, 'ttt_module_paths': ('attn_layers.layers.1.1',)}


def network(*, max_seq_len: int = S, max_mem_len: int = 8, **options: Any) -> TransformerWrapper:
    options = {'layers_rotary_pos_emb': True, 'use_abs_pos_emb': False} | options
    return decoder(num_tokens=VOCAB, max_seq_len=max_seq_len, max_mem_len=max_mem_len, **options)


def ids(b: int = B, n: int = N) -> Tensor:
    return torch.randint(0, VOCAB, (b, n), generator=torch.Generator().manual_seed(0))


def made(cls: type[nn.Module], net: nn.Module, **options: Any) -> nn.Module:
    """A wrapper of either class; what it draws at random is the same."""
    torch.manual_seed(1)
    return cls(net, **options)


NETWORKS: dict[str, dict[str, Any]] = {
    'plain': {},
    'no memory': {'max_mem_len': 0},
    'two layers': {'layers_depth': 2},
    'absolute': {'use_abs_pos_emb': True, 'layers_rotary_pos_emb': False},
    'flash': {'layers_attn_flash': True},
    'memory tokens': {'num_memory_tokens': 2},
    'memories down': {'layers_depth': 2, 'shift_mem_down': 1},
    'mixture of softmax': {'mixture_of_softmax': True},
    'tied': {'tie_embedding': True},
}
OPTIONS: dict[str, dict[str, Any]] = {'plain': {}}
if TRAINS:
    OPTIONS |= {'longer gradients': {'tbptt_steps': 2}}
if 'episodic_mem_len' in OF_UPSTREAM:  # from 2.23 on
    OPTIONS |= {'episodic': {'episodic_mem_len': 3}}


@pytest.mark.parametrize('options', OPTIONS)
@pytest.mark.parametrize('name', NETWORKS)
def test_equals_upstream_where_every_target_counts(name: str, options: str) -> None:
    """In float64: where a row has one input, attention's weights are 1, and what float32 leaves of 0 is rounding."""
    theirs, ours = (
        made(cls, network(dtype=torch.float64, **NETWORKS[name]), **OPTIONS[options])
        for cls in (Upstream, XLAutoregressiveWrapper)
    )
    for x in (ids(), ids(n=S + 1), ids(n=3), ids(1, 2)):
        want, got = theirs(x), ours(x)
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
        assert_same_gradients(gradients(got, ours), gradients(want, theirs), 1e-5, floor=1e-3)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


LEARNING: dict[str, dict[str, Any]] = {
    'plain': {},
    'muon': {'ttt_use_muon': True},
    'next latent': {'ttt_next_latent_loss': True},
    'low rank': {'ttt_low_rank_paths': (('attn_layers.layers.0.1.to_out', 4),)},
    'every three': {'tbptt_steps': 3},
}
LEARNING = {name: options for name, options in LEARNING.items() if options.keys() <= OF_UPSTREAM.keys()}


@needs_ttt
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('steps', [1, 2])
@pytest.mark.parametrize('name', LEARNING)
def test_test_time_training_is_upstreams(name: str, steps: int, training: bool) -> None:
    theirs, ours = (
        made(cls, network(), **(TTT | LEARNING[name])).train(training) for cls in (Upstream, XLAutoregressiveWrapper)
    )
    want, got = theirs(ids(), ttt_recurrent_steps=steps), ours(ids(), ttt_recurrent_steps=steps)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    if training:
        assert_same_gradients(gradients(got, ours), gradients(want, theirs), 1e-5)
    want, got = theirs(ids(n=S)), ours(ids(n=S))  # nothing is learnt after the last segment
    assert_same_gradients(gradients(got, ours), gradients(want, theirs), 1e-5)
    want = theirs(ids())  # with gradients: without them upstream learns nothing of the first segment before 2.27
    with torch.no_grad():
        assert ours(ids()).item() == pytest.approx(want.item(), rel=1e-5)


@needs_ttt
def test_the_inner_loss_does_not_know_the_outer_one() -> None:
    wrapper = made(XLAutoregressiveWrapper, network(), **TTT)
    loss_mask, loss_weight = torch.rand(B, N) < 0.5, torch.randn(B, N)
    _, all_count = wrapper(ids(), return_breakdown=True)
    _, some = wrapper(ids(), loss_mask=loss_mask, loss_weight=loss_weight, return_breakdown=True)
    want = all_count.token_loss.where(loss_mask[:, 1:], 0)
    torch.testing.assert_close(some.token_loss, want, rtol=1e-5, atol=1e-6)


@needs_ttt
@pytest.mark.parametrize('padding', ['lens', 'mask'])
def test_padding_is_ignored_by_the_inner_loss(padding: str) -> None:
    """So that padding moves no real loss, though a segment is read again after the update."""
    real = torch.arange(N) < torch.tensor([[14], [7], [3], [9]])
    call = {'lens': real.sum(dim=1)} if padding == 'lens' else {'mask': real}
    wrapper = made(XLAutoregressiveWrapper, network(), **TTT)
    want = wrapper(ids().masked_fill(~real, -100), ttt_recurrent_steps=2)
    for junk in (0, 7, -1):
        got = wrapper(ids().masked_fill(~real, junk), ttt_recurrent_steps=2, **call)
        assert got.item() == pytest.approx(want.item(), rel=1e-5)


@given(seed=st.integers(0, 10**6), using=subsets(['ignore', 'lens', 'loss_mask', *WEIGHTS]))
def test_the_equation(seed: int, using: set[str]) -> None:
    """Segments change what the network sees, and nothing about the weights."""
    draw = random.Random(seed)
    b, n, segment = draw.randint(1, 4), draw.randint(2, 13), draw.randint(1, 6)
    memory, log_prob, normalizer = draw.random() < 0.5, draw.random() < 0.5, draw.choice([None, 2.5])
    weighting = draw.choice(WEIGHTINGS)
    net = network(max_seq_len=segment, mixture_of_softmax=log_prob, dtype=torch.float64, **EXACT)
    call = random_batch(seed, b, n, using, vocab=VOCAB)
    read = call['x'].masked_fill(call['x'] == -100, 0)
    logits = carried(net, read, segment, forget=not memory)
    want = expected(logits, weighting=weighting, normalizer=normalizer, log_probs=log_prob, **call)

    wrapper = XLAutoregressiveWrapper(net, loss_weighting=weighting)
    loss, parts = wrapper(**call, normalizer=normalizer, dropout_mems=not memory, return_breakdown=True)
    assert_equation((loss, parts), want)
    if normalizer is None:
        z = wrapper.loss_normalizer(**call.without('loss_weight'))
        assert z.item() == pytest.approx(want.normalizer, rel=1e-9)
    reference = differentiable(logits, call['x'], want, log_probs=log_prob)
    assert_same_gradients(gradients(loss, net), gradients(reference, net), 1e-9, floor=1e-5)


def test_a_mean_of_the_means_of_segments_is_another() -> None:
    """Upstream averages each segment by itself: all its targets, from 2.28 on its rows, one that has ended as 0."""
    x = ids().clamp(min=1).masked_fill(torch.arange(N) >= torch.tensor([[14], [7], [3], [9]]), 0)
    net = network()
    want = expected(carried(net, x, S), x, ignore_index=0, weighting='sequence')

    by_segment = 0.0
    for start, end in ((0, 5), (5, 10), (10, 13)):
        rows = [
            [cost for cost, flag in zip(costs[start:end], flags[start:end], strict=True) if flag]
            for costs, flags in zip(want.token_loss, want.counted, strict=True)
        ]
        pooled = sum(map(sum, rows)) / sum(map(len, rows))
        by_row = sum(sum(row) / len(row) for row in rows if row) / B
        by_segment += (end - start) / 13 * (by_row if RELEASE >= (2, 28) else pooled)

    theirs = Upstream(net, ignore_index=0)(x).item()
    ours = XLAutoregressiveWrapper(net, ignore_index=0, equal_loss_weight_batch=True)(x).item()
    assert theirs == pytest.approx(by_segment, rel=1e-4)
    assert ours == pytest.approx(want.loss, rel=1e-5)
    assert abs(ours - theirs) > 0.1


@pytest.mark.parametrize('longer', [False, True], ids=['', 'longer gradients'])
@pytest.mark.parametrize('name', NETWORKS)
def test_padding_is_not_remembered(name: str, longer: bool) -> None:
    """What a masked position holds moves no loss and no gradient, in its segment or from a later one."""
    if longer and not TRAINS:
        pytest.skip('this x-transformers cuts every segment off')
    starts = torch.tensor([0, 2, 7, 12])
    mask = torch.arange(N) >= starts[:, None]
    mask[0, 4] = False
    net = network(**NETWORKS[name])
    found = []
    for pad_value in (1, 9):  # what the network reads at a masked position
        wrapper = XLAutoregressiveWrapper(net, pad_value=pad_value, **({'tbptt_steps': 3} if longer else {}))
        loss = wrapper(ids(), mask=mask)
        grads = gradients(loss, net)
        grads.pop('token_emb.emb.weight')  # its rows of pad_value are what is changed
        found.append((loss.item(), grads))
    (one, grads), (other, other_grads) = found
    assert one == pytest.approx(other, rel=1e-5)
    assert_same_gradients(grads, other_grads, 1e-4)
    all_real = wrapper(ids(), mask=torch.ones(B, N).bool())
    assert all_real.item() == pytest.approx(wrapper(ids()).item(), rel=1e-5)


def test_memories_and_their_masks_can_be_handed_in() -> None:
    """A row read in two calls, its memories carried by hand, costs what it costs in one."""
    net, mask = network(), torch.arange(N) >= torch.tensor([[0], [2], [4], [7]])
    _, whole = XLAutoregressiveWrapper(net)(ids(), mask=mask, return_breakdown=True)
    _, mems = net(ids()[:, :S].masked_fill(~mask[:, :S], 0), mask=mask[:, :S], return_mems=True)
    wrapper, rest = XLAutoregressiveWrapper(net), {'x': ids()[:, S:], 'mems': mems, 'mask': mask[:, S:]}

    def costs(**call: Any) -> Tensor:
        return wrapper(**call, return_breakdown=True)[1].token_loss

    told = costs(**rest, mem_masks=[mask[:, :S]] * len(mems))
    torch.testing.assert_close(told, whole.token_loss[:, S:], rtol=1e-5, atol=1e-6)
    untold, all_real = costs(**rest), costs(**rest, mem_masks=[torch.ones(B, S).bool()] * len(mems))
    torch.testing.assert_close(untold, all_real, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(untold[1], told[1], rtol=1e-3)
    tuples = {'mems': tuple(mems), 'mem_masks': (mask[:, :S],) * len(mems)}
    torch.testing.assert_close(costs(**{**rest, **tuples}), told)
    unmasked = {'x': ids()[:, S:], 'mems': mems, 'mem_masks': [mask[:, :S]] * len(mems)}
    torch.testing.assert_close(costs(**unmasked)[:3], told[:3], rtol=1e-5, atol=1e-6)  # the last row has padding after


OF_TOKENS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'embed_ids': ({'embed_num_tokens': {'kind': 3}}, {'embed_ids': {'kind': torch.arange(B * N).view(B, N) % 3}}),
    'sum_embeds': ({}, {'sum_embeds': nn.Parameter(torch.arange(B * N * 16).sin().view(B, N, 16).double())}),
    'condition': (
        {'layers_use_adaptive_layernorm': True, 'layers_dim_condition': 5},
        {'condition': nn.Parameter(torch.arange(B * N * 5).sin().view(B, N, 5).double())},
    ),
}


@pytest.mark.parametrize('name', OF_TOKENS)
def test_what_is_of_a_token_goes_where_its_segment_goes(name: str) -> None:
    """Each segment reads the part of its own tokens, and a part that learns gets its gradient."""
    options, call = OF_TOKENS[name]
    net, x = network(dtype=torch.float64, **EXACT, **options), ids()
    net.of_tokens = nn.ParameterDict({key: p for key, p in call.items() if isinstance(p, nn.Parameter)})
    forget = name == 'condition'  # which x-transformers takes to be of the memories too
    logits = carried(net, x, S, forget=forget, **call)
    want = expected(logits, x, weighting='sequence')
    wrapper = XLAutoregressiveWrapper(net, loss_weighting='sequence')
    loss, parts = wrapper(x, **call, dropout_mems=forget, return_breakdown=True)
    assert_equation((loss, parts), want)
    reference = gradients(differentiable(logits, x, want), net)
    assert name == 'embed_ids' or f'of_tokens.{name}' in reference
    assert_same_gradients(gradients(loss, net), reference, 1e-9, floor=1e-5)


def test_a_condition_of_rows_may_be_as_wide_as_they_are_long() -> None:
    """It is no condition of their tokens: each segment gets all of it."""
    net = network(layers_use_adaptive_layernorm=True, layers_dim_condition=N)
    condition = torch.randn(B, N)
    want = Upstream(net)(ids(), condition=condition)
    torch.testing.assert_close(XLAutoregressiveWrapper(net)(ids(), condition=condition), want)


UNFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {  # of network, wrapper and call
    'network': ({'mixture_of_softmax': True}, {}, {}, 'to_mixture'),
    'head': ({'to_logits': ScaledLinear(16, VOCAB)}, {}, {}, 'ScaledLinear'),
    'argument': ({}, {}, {'to_logits_kwargs': {}}, 'to_logits_kwargs'),
    **({'test-time training': ({}, TTT, {}, 'test-time training reads logits')} if TRAINS else {}),
}


@pytest.mark.parametrize('name', UNFUSED)
def test_fused_says_why_it_cannot_be(name: str) -> None:
    options, of_wrapper, call, reason = UNFUSED[name]
    always, auto, never = (
        made(XLAutoregressiveWrapper, network(**options), fused=fused, **of_wrapper) for fused in (True, 'auto', False)
    )
    with pytest.raises(ValueError, match=f'^fused=True, but head and loss cannot be one: .*{reason}'):
        always(ids(), **call)
    assert auto(ids(), **call).item() == never(ids(), **call).item()


def test_what_cannot_be_given() -> None:
    wrapper, flags = XLAutoregressiveWrapper(Unreachable()), torch.ones(B, N).bool()
    for call in (wrapper, wrapper.loss_normalizer):
        with pytest.raises(ValueError, match=r'^self_attn_kv_mask cannot be given here: '):
            call(ids(), mask=flags, self_attn_kv_mask=flags)
    with pytest.raises(ValueError, match='ttt_recurrent_steps must be 1 without test-time training, got 2'):
        wrapper(ids(), ttt_recurrent_steps=2)


def test_a_network_that_answers_for_more_than_it_read() -> None:
    net = network()
    net.register_forward_hook(lambda _, __, out: (out[0].repeat(1, 2, 1), out[1]))
    with pytest.raises(ValueError, match=r'the network must return \(4, 5, vocab\).*, got \(4, 10, 11\)'):
        XLAutoregressiveWrapper(net)(ids())
