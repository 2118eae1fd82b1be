"""What people met at the edges: narrow networks, no rows, hidden keys, copies, normalizers that are no number."""

import copy
import itertools
import random
import warnings
from typing import Any

import pytest
import torch
import x_transformers
from networks import ROTARY, assert_same_gradients, continuous_network, decoder, frames, gradients
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from xtloss import AutoregressiveWrapper, ContinuousAutoregressiveWrapper, XLAutoregressiveWrapper, upgrade_

B, N, S, VOCAB = 3, 9, 5, 11
NAN = float('nan')
LENS = torch.tensor([9, 4, 6])
I = torch.arange(N)
RIGHT, LEFT = LENS[:, None] > I, N - LENS[:, None] <= I
WRAPPERS = {'plain': AutoregressiveWrapper, 'xl': XLAutoregressiveWrapper}


def ids() -> Tensor:
    return torch.randint(1, VOCAB, (B, N), generator=torch.Generator().manual_seed(3))


def wrapped(kind: str, dtype: torch.dtype = torch.float32, *, options: dict[str, Any] | None = None, **net: Any) -> Any:
    memory = {'max_mem_len': S, 'max_seq_len': S} if kind == 'xl' else {}
    return WRAPPERS[kind](decoder(num_tokens=VOCAB, dtype=dtype, **{**memory, **net}), **(options or {}))


def rows_alone(wrapper: Any, x: Tensor, real: Tensor) -> Tensor:
    """The loss of a mean over tokens, each row without its padding."""
    losses = [wrapper(x[row : row + 1, real[row]], normalizer=1.0) for row in range(B)]
    return sum(losses) / (real.sum() - B)


# narrow networks

PADDINGS: dict[str, tuple[Tensor, dict[str, Tensor]]] = {
    'lens': (RIGHT, {'lens': LENS}),
    'mask': (RIGHT, {'mask': RIGHT}),
    'left mask': (LEFT, {'mask': LEFT}),
    'lens and mask': (RIGHT, {'lens': LENS, 'mask': RIGHT}),
}
ONLY_PLAIN: dict[str, tuple[Tensor, dict[str, Tensor]]] = {
    'segment_ids': (RIGHT, {'segment_ids': RIGHT.long()}),
    'segment_ids and mask': (RIGHT, {'segment_ids': RIGHT.long(), 'mask': RIGHT}),
    'seq_start_pos': (LEFT, {'seq_start_pos': N - LENS}),
    'left mask and self_attn_kv_mask': (LEFT, {'mask': LEFT, 'self_attn_kv_mask': torch.ones(B, N).bool()}),
}
NARROW = {
    'rotary': ROTARY,
    'flash': {**ROTARY, 'layers_attn_flash': True},
    'shifted tokens': {**ROTARY, 'layers_shift_tokens': 1},
    'memory tokens': {**ROTARY, 'num_memory_tokens': 2},
    'memory keys': {**ROTARY, 'layers_attn_num_mem_kv': 2},
}


TAKEN = [  # the others are refused
    (kind, network, padding)
    for kind, network, padding in itertools.product(WRAPPERS, NARROW, PADDINGS | ONLY_PLAIN)
    if padding in PADDINGS or (kind == 'plain' and ('segment_ids' not in padding or network in ('rotary', 'flash')))
]


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(('kind', 'network', 'padding'), TAKEN)
def test_narrow_networks_take_every_mask(kind: str, network: str, padding: str, dtype: torch.dtype) -> None:
    (real, call), x = (PADDINGS | ONLY_PLAIN)[padding], ids()
    if kind == 'xl':  # padding on the left moves the segments' bounds: one segment
        x, real, call = x[:, :S], real[:, :S], {k: v[:, :S] if v.ndim > 1 else v.clamp(max=S) for k, v in call.items()}
        if not real.any(dim=1).all():
            real = real | (torch.arange(S) >= S - 2)
            call['mask'] = real
    want = rows_alone(wrapped(kind, **NARROW[network]), x, real)
    narrow = wrapped(kind, dtype, **NARROW[network])
    loss = narrow(x, **call)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=0.03)
    assert all(p.grad.isfinite().all() for p in narrow.parameters() if p.grad is not None)


def test_lens_of_a_causal_network_reaches_no_attention() -> None:
    for kind in WRAPPERS:
        seen: list[dict[str, Any]] = []
        wrapper = wrapped(kind, **ROTARY)
        wrapper.net.attn_layers.register_forward_pre_hook(lambda _, __, call: seen.append(call), with_kwargs=True)  # noqa: B023
        wrapper(ids(), lens=LENS)
        assert all(call.get(name) is None for call in seen for name in ('mask', 'attn_mask', 'self_attn_kv_mask'))


# no rows

NO_ROWS: dict[str, dict[str, Any]] = {
    'plain': {},
    'lens': {'lens': LENS},
    'mask': {'mask': RIGHT},
    'weights': {'loss_mask': RIGHT, 'loss_weight': torch.rand(B)},
    'sum_embeds': {'sum_embeds': torch.randn(B, N, 16)},
}
NO_ROWS_PLAIN: dict[str, dict[str, Any]] = {
    'segment_ids': {'segment_ids': RIGHT.long()},
    'prepend_embeds': {'prepend_embeds': torch.randn(B, 2, 16), 'prepend_mask': torch.ones(B, 2).bool()},
    'seq_start_pos': {'seq_start_pos': N - LENS},
    'kv mask': {'self_attn_kv_mask': RIGHT},
}
OPTIONS_OF_NETWORKS: dict[str, dict[str, Any]] = {
    'rotary': ROTARY,
    'memory tokens': {'num_memory_tokens': 2},
    'memory keys': {'layers_attn_num_mem_kv': 2},
    'tied': {'tie_embedding': True},
    'mixture': {'mixture_of_softmax': True},
    'dropout': {'layers_attn_dropout': 0.3, 'layers_ff_dropout': 0.3, 'emb_dropout': 0.3},
    'streams': {'layers_num_residual_streams': 2, 'layers_depth': 2},
    'recycling': {'recycling': True, 'train_max_recycle_steps': 3},
}
PLAIN_OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'z-loss': ({}, {'add_attn_z_loss': True}),
    'mask_prob': ({}, {'mask_prob': 0.3}),
    'continuous head': ({'add_continuous_pred_head': True}, {}),
    'looped': ({'looped': True, 'layers_pre_and_post_norm': True}, {}),
    'padded weighting': ({}, {'loss_weighting': 'padded'}),
    'unpad': (ROTARY, {'unpad': True}),
}


def assert_nothing(wrapper: Any, call: dict[str, Any]) -> None:
    """The loss of no rows: 0, with a gradient of 0 for each parameter that rows reach; nothing else has moved."""
    random.seed(1)
    torch.manual_seed(1)
    usual = copy.deepcopy(wrapper)
    reached = gradients(usual(ids(), **call), usual).keys()
    call = {k: v[:0] for k, v in call.items()}
    buffers = {name: buffer.clone() for name, buffer in wrapper.named_buffers()}
    random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), torch.get_rng_state()
    loss, parts = wrapper(ids()[:0], **call, return_breakdown=True)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in wrapper.named_buffers())
    assert loss.item() == 0
    assert parts.token_loss.shape == parts.weight.shape == (0, N - 1)
    assert parts.normalizer.item() == parts.auxiliary.item() == 0
    loss.backward()
    grads = {name: p.grad for name, p in wrapper.named_parameters() if p.grad is not None}
    assert grads.keys() == reached
    assert not any(grad.any() for grad in grads.values())
    assert wrapper.loss_normalizer(ids()[:0], **call).item() == 0


@pytest.mark.parametrize(
    ('kind', 'call'),
    [(kind, call) for kind in WRAPPERS for call in NO_ROWS | (NO_ROWS_PLAIN if kind == 'plain' else {})],
)
def test_no_rows_whatever_is_given(kind: str, call: str) -> None:
    """The XL wrapper refuses some of it."""
    assert_nothing(wrapped(kind, **ROTARY), (NO_ROWS | NO_ROWS_PLAIN)[call])


@pytest.mark.parametrize('network', OPTIONS_OF_NETWORKS)
@pytest.mark.parametrize('kind', WRAPPERS)
def test_no_rows_whatever_the_network(kind: str, network: str) -> None:
    if kind == 'xl' and network == 'streams':
        pytest.skip('x-transformers keeps no memories of several streams')
    assert_nothing(wrapped(kind, **OPTIONS_OF_NETWORKS[network]), {'mask': RIGHT})


@pytest.mark.parametrize('option', PLAIN_OPTIONS)
def test_no_rows_whatever_the_options(option: str) -> None:
    net, options = PLAIN_OPTIONS[option]
    assert_nothing(wrapped('plain', options=options, **net), {'mask': RIGHT, 'lens': LENS})


def test_outputs_of_no_rows_have_none() -> None:
    _, (logits, cache) = wrapped('plain', **ROTARY)(ids()[:0], mask=RIGHT[:0], return_outputs=True)
    assert logits.shape == (0, N - 1, VOCAB)
    assert all(t.shape[0] == 0 for t in cache.hiddens)


def test_no_rows_of_an_embedding_that_learns() -> None:
    before = torch.randn(0, 2, 16, requires_grad=True)
    wrapped('plain')(ids()[:0], prepend_embeds=before).backward()
    assert before.grad is not None
    assert before.grad.shape == (0, 2, 16)


class Moves(nn.Module):
    """Counts its calls in a buffer and draws a random number, as normalizations and noise do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('calls', torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + torch.randn(()) * random.random()


def test_no_rows_move_no_buffer() -> None:
    wrapper = wrapped('plain')
    wrapper.net.post_emb_norm = Moves()
    assert_nothing(wrapper, {})
    wrapper(ids())
    assert wrapper.net.post_emb_norm.calls == 1


# keys that are hidden

HIDDEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'left mask': ({'mask': LEFT}, {}),
    'a hole at the start': ({'mask': (I > 2).expand(B, N)}, {}),
    'first key hidden': ({'self_attn_kv_mask': (I > 0).expand(B, N)}, {}),
    'all keys hidden': ({'self_attn_kv_mask': (I < 0).expand(B, N)}, {}),
    'late start': ({'seq_start_pos': N - LENS}, {}),
    'start and mask': ({'seq_start_pos': N - LENS, 'mask': LEFT}, {}),
    'start and hidden keys': ({'seq_start_pos': N - LENS, 'self_attn_kv_mask': (I != 5).expand(B, N)}, {}),
    'random and hidden keys': ({'self_attn_kv_mask': (I == 2).expand(B, N)}, {'mask_prob': 0.5}),
    'random keys and a left mask': ({'mask': LEFT}, {'mask_prob': 0.5}),
    'segments with a hole': ({'segment_ids': torch.ones(B, N).long(), 'mask': (I != 0).expand(B, N)}, {}),
}
HIDING_NETWORKS = {
    'absolute': {'layers_depth': 2},
    'rotary': ROTARY,
    'flash': {**ROTARY, 'layers_attn_flash': True},
    'alibi beside absolute': {'layers_alibi_pos_bias': True, 'layers_depth': 2},
    'a window': {**ROTARY, 'layers_attn_max_attend_past': 1},
    'normed queries': {**ROTARY, 'layers_attn_qk_norm': True},
}


@pytest.mark.parametrize('hidden', HIDDEN)
@pytest.mark.parametrize('network', HIDING_NETWORKS)
def test_no_loss_moves_with_a_later_token_and_all_is_finite(network: str, hidden: str) -> None:
    call, options = HIDDEN[hidden]
    wrapper, x, seen = wrapped('plain', torch.float64, options=options, **HIDING_NETWORKS[network]), ids(), []
    for last in (1, 2):
        torch.manual_seed(0)
        x[:, -1] = last
        loss, parts = wrapper(x, **call, return_breakdown=True)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in wrapper.parameters() if p.grad is not None)
        seen.append(parts.token_loss[:, :-1])
    torch.testing.assert_close(*seen, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('network', HIDING_NETWORKS)
def test_left_padding_is_the_rows_alone_in_float64(network: str) -> None:
    by = {'seq_start_pos': N - LENS} if 'absolute' in network else {'mask': LEFT}
    wrapper, x = wrapped('plain', torch.float64, **HIDING_NETWORKS[network]), ids()
    got, want = wrapper(x.masked_fill(~LEFT, -1), **by), rows_alone(wrapper, x, LEFT)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    assert_same_gradients(gradients(got, wrapper), gradients(want, wrapper), 1e-5, floor=1e-3)


@pytest.mark.parametrize('network', ['rotary', 'flash', 'normed queries'])
def test_left_padding_of_the_first_segment(network: str) -> None:
    x, real = ids()[:, :S], LEFT[:, -S:].clone()
    wrapper = wrapped('xl', torch.float64, **HIDING_NETWORKS[network])
    got, want = wrapper(x.masked_fill(~real, -1), mask=real), rows_alone(wrapper, x, real)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    assert_same_gradients(gradients(got, wrapper), gradients(want, wrapper), 1e-5, floor=1e-3)


@pytest.mark.parametrize('beside', ['nothing', 'mask', 'seq_start_pos', 'self_attn_kv_mask', 'mask_prob'])
def test_hidden_embeddings_are_not_attended_to(beside: str) -> None:
    given: dict[str, dict[str, Any]] = {
        'mask': {'mask': RIGHT},
        'seq_start_pos': {'seq_start_pos': torch.zeros(B).long()},
        'self_attn_kv_mask': {'self_attn_kv_mask': torch.ones(B, N).bool()},
    }
    options = {'mask_prob': 0.3} if beside == 'mask_prob' else {}
    wrapper, losses = wrapped('plain', options=options, **ROTARY), []
    for scale in (1.0, -3.0):
        before = torch.ones(B, 2, 16) * torch.tensor([[scale], [1.0]])
        torch.manual_seed(0)
        call = {'prepend_embeds': before, 'prepend_mask': torch.tensor([[False, True]]).expand(B, 2)}
        losses.append(wrapper(ids(), **call, **given.get(beside, {})).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_ids_before_the_start_may_be_anything() -> None:
    for call, p in (({}, 0), ({'prepend_embeds': torch.randn(B, 2, 16)}, 2)):
        start = (N - LENS + p).to(torch.uint8)
        before = I + p < start[:, None]
        want = wrapped('plain')(ids(), seq_start_pos=start, **call)
        for junk in (-1, 10**6):
            got = wrapped('plain')(ids().masked_fill(before, junk), seq_start_pos=start, **call)
            assert got.item() == pytest.approx(want.item(), rel=1e-6)
    early = torch.zeros(B, dtype=torch.uint8)  # less than what is prepended: does not wrap
    call = {'prepend_embeds': torch.randn(B, 2, 16)}
    narrow, wide = (wrapped('plain')(ids(), seq_start_pos=s, **call) for s in (early, early.long()))
    assert narrow.item() == wide.item()


# memories beside masks

BESIDE_MEMORIES: dict[str, tuple[Tensor, dict[str, Any]]] = {
    **{name: padding for name, padding in PADDINGS.items() if name != 'left mask'},  # which puts memories farther away
    'all keys told': (RIGHT, {'lens': LENS, 'self_attn_kv_mask': torch.ones(B, 3 + N).bool()}),
}
REMEMBERING = {
    'rotary': {**ROTARY, 'use_abs_pos_emb': False},
    'flash': {**ROTARY, 'use_abs_pos_emb': False, 'layers_attn_flash': True},
    'memory tokens': {**ROTARY, 'use_abs_pos_emb': False, 'num_memory_tokens': 2},
    'memory keys': {**ROTARY, 'use_abs_pos_emb': False, 'layers_attn_num_mem_kv': 2},
}


@pytest.mark.parametrize('hidden', [False, True])
@pytest.mark.parametrize('padding', BESIDE_MEMORIES)
@pytest.mark.parametrize('network', REMEMBERING)
@pytest.mark.parametrize('kind', ['plain', 'continuous'])
def test_memories_beside_masks(kind: str, network: str, padding: str, hidden: bool) -> None:
    (real, call), tokens = BESIDE_MEMORIES[padding], REMEMBERING[network].get('num_memory_tokens', 0)
    if kind == 'plain':
        model, x = wrapped(kind, torch.float64, max_mem_len=8, **REMEMBERING[network]), ids()
    else:
        net = continuous_network(dtype=torch.float64, max_mem_len=8, **REMEMBERING[network])
        model, x = ContinuousAutoregressiveWrapper(net), frames(n=N, dtype=torch.float64)
    if 'self_attn_kv_mask' in call:
        keys = 3 + tokens + N - (kind == 'continuous')
        call = {**call, 'self_attn_kv_mask': torch.ones(B, keys).bool()}
    mems = [torch.randn(B, 3, 16, dtype=torch.float64) for _ in range(2)]
    seen = torch.tensor([not hidden, True, True])
    if hidden:
        call = {**call, 'mem_masks': [seen.expand(B, 3)] * 2}
    alone = [
        model(x[row : row + 1, real[row]], mems=[mem[row : row + 1, seen] for mem in mems], normalizer=1.0)
        for row in range(B)
    ]
    got = model(x, mems=mems, **call)
    assert got.item() == pytest.approx((sum(alone) / (real.sum() - B)).item(), rel=1e-6)


@pytest.mark.parametrize('kind', ['plain', 'xl', 'continuous'])
def test_memories_of_nothing(kind: str) -> None:
    """No memory in any layer, and masks of memories that there are not, are none."""
    model, x = continuous() if kind == 'continuous' else (wrapped(kind, torch.float64), ids())
    mask = torch.ones(x.shape[:2]).bool().index_fill(1, torch.tensor([0]), False)
    for call in ({}, {'mask': mask}):
        want = model(x, **call)
        hidden = torch.zeros(len(x), 3).bool()
        for mems, masks in ([None], None), ([], None), (None, [hidden]), ([None], [hidden]):
            torch.testing.assert_close(model(x, **call, mems=mems, mem_masks=masks), want)


# copies of a tied network


class Parent(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


COPIES: dict[str, Any] = {
    'deepcopy': copy.deepcopy,
    'inside a parent': lambda model: copy.deepcopy(Parent(model)).model,
    'AveragedModel': lambda model: AveragedModel(model).module,
    'copy of a copy': lambda model: copy.deepcopy(copy.deepcopy(model)),
}


@pytest.mark.parametrize('how', COPIES)
@pytest.mark.parametrize('fused', ['auto', False])
@pytest.mark.parametrize('kind', WRAPPERS)
def test_a_copy_of_a_tied_network_reads_its_own_embedding(kind: str, fused: str | bool, how: str) -> None:
    model = wrapped(kind, options={'fused': fused}, tie_embedding=True)
    keys, before = model.state_dict().keys(), model(ids()).item()
    copied = COPIES[how](model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    assert copied(ids()).item() == before
    assert copied.state_dict().keys() == keys
    copied(ids()).backward()
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        copied.net.token_emb.emb.weight.mul_(2)
    assert copied(ids()).item() != before


def test_a_copied_bare_network_is_warned_of_once() -> None:
    net = copy.deepcopy(decoder(num_tokens=VOCAB, tie_embedding=True))
    theirs = x_transformers.AutoregressiveWrapper(net)
    with pytest.warns(UserWarning, match='still reads the embedding of the original: copy the wrapper') as seen:
        AutoregressiveWrapper(net)
    assert [warning.filename for warning in seen] == [__file__]
    with pytest.warns(UserWarning, match='still reads the embedding of the original: copy the wrapper') as seen:
        upgrade_(theirs)
    assert [warning.filename for warning in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        AutoregressiveWrapper(decoder(num_tokens=VOCAB, tie_embedding=True))
        copy.deepcopy(AutoregressiveWrapper(decoder(num_tokens=VOCAB, tie_embedding=True)))


# normalizers that are no number


def continuous() -> tuple[Any, Tensor]:
    return ContinuousAutoregressiveWrapper(continuous_network()), frames()


BROKEN = {
    'overflow in half': torch.tensor(70000.0).half(),
    'nan': torch.tensor(NAN),
    'negative': torch.tensor(-1.0),
    'negative infinity': torch.tensor(-torch.inf),
}


@pytest.mark.parametrize('broken', BROKEN)
@pytest.mark.parametrize('kind', [*WRAPPERS, 'continuous'])
def test_a_broken_normalizer_is_seen(kind: str, broken: str) -> None:
    model, x = (
        (ContinuousAutoregressiveWrapper(continuous_network()), frames())
        if kind == 'continuous'
        else (wrapped(kind), ids())
    )
    nothing = torch.zeros(x.shape[:2]).bool()
    for call in ({}, {'loss_mask': nothing}):
        loss = model(x, normalizer=BROKEN[broken], **call)
        assert loss.isnan()
        loss.backward()
    assert any(p.grad.isnan().any() for p in model.parameters() if p.grad is not None)
    loss = model(x, normalizer=torch.tensor(0.0))
    model.zero_grad()
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize('kind', [*WRAPPERS, 'continuous'])
def test_a_normalizer_that_only_float64_tells_from_zero(kind: str) -> None:
    model, x = (
        (ContinuousAutoregressiveWrapper(continuous_network()), frames())
        if kind == 'continuous'
        else (wrapped(kind), ids())
    )
    loss = model(x, normalizer=torch.tensor(1e-60, dtype=torch.float64))
    assert loss.item() > 1e37  # float32 has little more
    loss.backward()
    assert any((p.grad != 0).any() for p in model.parameters() if p.grad is not None)
    assert model(x, normalizer=torch.tensor(-1e-60, dtype=torch.float64)).isnan()
    assert model(x, normalizer=torch.tensor(0.0, dtype=torch.float64)).item() == 0
    double = model.double()
    x = x.double() if kind == 'continuous' else x
    want = double(x, normalizer=torch.tensor(1.0)) / 1e-60
    torch.testing.assert_close(double(x, normalizer=torch.tensor(1e-60, dtype=torch.float64)), want)
