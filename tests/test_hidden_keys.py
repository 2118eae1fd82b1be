"""Keys that are hidden, by whatever argument: nobody sees them, and who sees no key at all sees itself.

Most in float64, where x-transformers fills what is hidden with -inf's like, and a row of them is NaN.
"""

from typing import Any

import pytest
import torch
from batches import INTEGERS
from modes import LENS, B, N, batch, wrap
from networks import ROTARY, Stub, assert_same_gradients, continuous_network, decoder, gradients
from torch import Tensor, nn

from xtloss import AutoregressiveWrapper

S = 5  # inputs of a segment of XL
I = torch.arange(N)
RIGHT, LEFT = LENS[:, None] > I, N - LENS[:, None] <= I
START, AT_FIRST = {'seq_start_pos': N - LENS}, {'seq_start_pos': torch.zeros(B).long()}
IDS = batch('plain')['x']
X = {'plain': IDS, 'continuous': batch('continuous')['x']}
NETWORKS: dict[str, dict[str, Any]] = {
    'absolute': {'layers_depth': 2},
    'rotary': ROTARY,
    'flash': {**ROTARY, 'layers_attn_flash': True},
    'alibi': {'layers_alibi_pos_bias': True, 'use_abs_pos_emb': False},
    'a window': {**ROTARY, 'layers_attn_max_attend_past': 1},
    'normed queries': {**ROTARY, 'layers_attn_qk_norm': True},
}
OF_FRAMES: dict[str, dict[str, Any]] = {
    'memory tokens': {'num_memory_tokens': 2, 'use_abs_pos_emb': False},
    'gaussian': {'probabilistic': True, 'use_abs_pos_emb': False},
}
OF_TOKENS: dict[str, dict[str, Any]] = {
    'memory tokens': {**ROTARY, 'num_memory_tokens': 2},
    'looped': {**ROTARY, 'looped': True, 'layers_pre_and_post_norm': True},
}


def wrapped(kind: str, options: dict[str, Any], dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    options = {'max_mem_len': S, 'max_seq_len': S, **options} if kind == 'xl' else options
    return wrap(kind, (continuous_network if kind == 'continuous' else decoder)(dtype=dtype, **options), **more)


def of_kind(kind: str, call: dict[str, Any], options: dict[str, Any], before: int = 0) -> dict[str, Any]:
    """The call, its mask of keys one of all that is attended to: memories, and memory tokens, come before the row."""
    if 'self_attn_kv_mask' not in call or kind == 'xl':
        return call
    keys = call['self_attn_kv_mask'][:, : N - (kind == 'continuous')]
    ahead = torch.ones(B, before + options.get('num_memory_tokens', 0)).bool()
    return {**call, 'self_attn_kv_mask': torch.cat([ahead, keys], dim=1)}


def rows_alone(wrapper: Any, x: Tensor, real: Tensor) -> Tensor:
    """The loss of a mean over tokens, each row without its padding."""
    losses = [wrapper(x[row : row + 1, real[row]], normalizer=1.0) for row in range(len(x))]
    return sum(losses) / (real.sum() - len(x))


def assert_same(wrapper: nn.Module, got: Tensor, want: Tensor) -> None:
    """To what is left of float64 where x-transformers takes attention's softmax in float32."""
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    assert_same_gradients(gradients(got, wrapper), gradients(want, wrapper), 1e-5, floor=1e-3)


HIDDEN: dict[str, dict[str, Tensor]] = {
    'left mask': {'mask': LEFT},
    'a hole at the start': {'mask': (I > 2).expand(B, N)},
    'late start': START,
    'mask beside a start': {'mask': LEFT, **AT_FIRST},
    'first key': {'self_attn_kv_mask': (I > 0).expand(B, N)},
    'all keys': {'self_attn_kv_mask': (I < 0).expand(B, N)},
    'all keys but one': {'self_attn_kv_mask': (I == 2).expand(B, N)},
    'start and a key': {**START, 'self_attn_kv_mask': (I != 5).expand(B, N)},
    'mask and keys': {'mask': RIGHT, 'self_attn_kv_mask': (I > 1).expand(B, N)},
    'lens and a key': {'lens': LENS, 'self_attn_kv_mask': (I != 3).expand(B, N)},
    'all three': {'mask': LEFT, **AT_FIRST, 'self_attn_kv_mask': (I != 6).expand(B, N)},
}
# embeddings before the row, and how many keys are hidden at random
LOOKING = [('plain', name, 2 * both, 0.3 * both) for name in NETWORKS | OF_TOKENS for both in (0, 1)]
LOOKING += [('plain', 'rotary', 2, 0.0), ('plain', 'rotary', 0, 0.3)]
LOOKING += [('continuous', name, 0, 0.0) for name in NETWORKS | OF_FRAMES]


@pytest.mark.parametrize('hidden', HIDDEN)
@pytest.mark.parametrize(('kind', 'name', 'prepended', 'mask_prob'), LOOKING)
def test_nobody_sees_what_is_hidden_or_later(
    kind: str, name: str, prepended: int, mask_prob: float, hidden: str
) -> None:
    """Padding, whatever it is read as; a key, whose token moves its own two losses alone; the embedding before all.

    A query that sees no key would attend to every key alike, also to the future, or be NaN.
    """
    options, seen = (NETWORKS | (OF_TOKENS if kind == 'plain' else OF_FRAMES))[name], []
    wrapper, call, key = wrapped(kind, options), of_kind(kind, HIDDEN[hidden], options), N - 1
    if 'self_attn_kv_mask' in call:
        key = int(HIDDEN[hidden]['self_attn_kv_mask'][0].int().argmin())
    for junk in (1, 9):
        wrapper.pad_value, wrapper.mask_prob = junk, mask_prob
        x = X[kind].clone()
        x[:, [key, N - 1]] = junk
        if prepended:
            embeds = torch.ones(B, prepended, 1, dtype=torch.float64) * torch.arange(16).cos()
            embeds[:, 0] = (torch.arange(16) * junk).sin()  # not a multiple, of which norms make the same
            call = {**call, 'prepend_embeds': embeds, 'prepend_mask': (torch.arange(prepended) > 0).expand(B, -1)}
        torch.manual_seed(0)
        loss, parts = wrapper(x, **call, return_breakdown=True)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in wrapper.parameters() if p.grad is not None)
        seen.append(parts.token_loss[:, [i - 1 for i in range(1, N - 1) if i not in (key, key + 1)]])
    torch.testing.assert_close(*seen, rtol=1e-9, atol=1e-12)


PADDED = [
    (kind, name, by, told)
    for kind in ('plain', 'continuous', 'xl')
    for name in NETWORKS | (OF_FRAMES if kind == 'continuous' else {})
    for by in ('mask', 'seq_start_pos')
    for told in (False, True)
    if (by, name) != ('mask', 'absolute')  # whose positions only a start shifts
    and (kind != 'xl' or (by == 'mask' and not told))  # refused
]


@pytest.mark.parametrize(('kind', 'name', 'by', 'told'), PADDED)
def test_left_padding_is_the_rows_alone(kind: str, name: str, by: str, told: bool) -> None:
    """Beside a mask of keys too, for which the network would drop `mask`."""
    x, real = (IDS[:, :S], LEFT[:, -S:]) if kind == 'xl' else (X[kind], LEFT)  # XL: in the first segment
    options = (NETWORKS | OF_FRAMES)[name]
    call = {'mask': real} if by == 'mask' else START
    if told:
        call = of_kind(kind, {**call, 'self_attn_kv_mask': torch.ones(B, N).bool()}, options)
    wrapper = wrapped(kind, options)
    junk = x.masked_fill(~real, -1) if x.ndim == 2 else x.masked_fill(~real[..., None], torch.nan)
    assert_same(wrapper, wrapper(junk, **call), rows_alone(wrapper, x, real))


@pytest.mark.parametrize('relative', ['polar_pos_emb', 'rel_pos_bias', 'rotary_pos_emb', 'alibi_pos_bias'])
def test_starts_beside_absolute_and_relative_positions(relative: str) -> None:
    wrapper = wrapped('plain', {'layers_disable_abs_pos_emb': False, f'layers_{relative}': True}, torch.float32)
    assert_same(wrapper, wrapper(IDS.masked_fill(~LEFT, 10**6), **START), rows_alone(wrapper, IDS, LEFT))


@pytest.mark.parametrize('kind', ['plain', 'xl', 'continuous'])
def test_lens_of_a_causal_network_reaches_no_attention(kind: str) -> None:
    """Right padding needs no mask, which flash attention would pay for."""
    seen: list[dict[str, Any]] = []
    wrapper = wrapped(kind, ROTARY)
    wrapper.net.attn_layers.register_forward_pre_hook(lambda _, __, call: seen.append(call), with_kwargs=True)
    wrapper(X.get(kind, IDS), lens=LENS)
    assert all(call.get(name) is None for call in seen for name in ('mask', 'attn_mask', 'self_attn_kv_mask'))


def test_another_network_gets_the_mask_and_no_other() -> None:
    """It may know no other."""
    stub = Stub(torch.zeros(B, N, 11))
    AutoregressiveWrapper(stub)(IDS, mask=RIGHT)
    [(_, arguments)] = stub.seen
    assert torch.equal(arguments['mask'], RIGHT)
    assert 'self_attn_kv_mask' not in arguments


def test_tokens_are_shifted_by_the_mask() -> None:
    seen: list[Tensor] = []
    wrapper = wrapped('plain', {'layers_shift_tokens': 1})
    wrapper.net.attn_layers.register_forward_pre_hook(lambda _, __, call: seen.append(call['mask']), with_kwargs=True)
    wrapper(IDS, mask=RIGHT)
    assert torch.equal(seen[0], RIGHT)


# memories

BESIDE_MEMORIES: dict[str, dict[str, Any]] = {
    'lens': {'lens': LENS},
    'mask': {'mask': RIGHT},
    'lens and mask': {'lens': LENS, 'mask': RIGHT},
    'all keys told': {'lens': LENS, 'self_attn_kv_mask': torch.ones(B, N).bool()},
}
REMEMBERING: dict[str, dict[str, Any]] = {
    'rotary': {},
    'flash': {'layers_attn_flash': True},
    'memory tokens': {'num_memory_tokens': 2},
    'memory keys': {'layers_attn_num_mem_kv': 1},
}


@pytest.mark.parametrize('hidden', [False, True])
@pytest.mark.parametrize('padding', BESIDE_MEMORIES)
@pytest.mark.parametrize('name', REMEMBERING)
@pytest.mark.parametrize('kind', ['plain', 'continuous'])
def test_memories_beside_masks(kind: str, name: str, padding: str, hidden: bool) -> None:
    options = {**ROTARY, 'use_abs_pos_emb': False, 'max_mem_len': 8, **REMEMBERING[name]}
    model, x, call = wrapped(kind, options), X[kind], of_kind(kind, BESIDE_MEMORIES[padding], options, 3)
    mems, seen = [torch.randn(B, 3, 16, dtype=torch.float64) for _ in range(2)], torch.tensor([not hidden, True, True])
    if hidden:
        call = {**call, 'mem_masks': [seen.expand(B, 3)] * 2}
    alone = [
        model(x[row : row + 1, :length], mems=[mem[row : row + 1, seen] for mem in mems], normalizer=1.0)
        for row, length in enumerate(LENS)
    ]
    assert model(x, mems=mems, **call).item() == pytest.approx((sum(alone) / (LENS - 1).sum()).item(), rel=1e-6)


@pytest.mark.parametrize('kind', ['plain', 'xl', 'continuous'])
def test_memories_of_nothing(kind: str) -> None:
    """No memory in any layer, and masks of memories that there are not, are none."""
    model, x = wrapped(kind, {}), X.get(kind, IDS)
    for call in ({}, {'mask': (I != 0).expand(B, N)}):
        want, hidden = model(x, **call), torch.zeros(B, 3).bool()
        for mems, masks in ([None], None), ([], None), (None, [hidden]), ([None], [hidden]):
            torch.testing.assert_close(model(x, **call, mems=mems, mem_masks=masks), want)


# a mask of one's own

LONG = {'max_seq_len': 32}  # XL: in one segment
PADDING: dict[str, dict[str, Tensor]] = {
    'lens': {'lens': LENS},
    'loss_mask': {'loss_mask': RIGHT},
    'mask': {'mask': RIGHT},
    'key mask': {'loss_mask': RIGHT, 'self_attn_kv_mask': RIGHT},
    'segment_ids': {'segment_ids': RIGHT.long()},
    'start': {'loss_mask': RIGHT, **AT_FIRST},
    'none': {},
}
TOLD = [('plain', padding) for padding in PADDING]
TOLD += [(kind, padding) for kind in ('continuous', 'xl') for padding in ('lens', 'loss_mask', 'mask', 'none')]


@pytest.mark.parametrize(('kind', 'padding'), TOLD)
@pytest.mark.parametrize('name', NETWORKS)
def test_a_mask_that_hides_everything_from_a_query(kind: str, name: str, padding: str) -> None:
    """It sees itself; and where it is of padding, that moves nothing."""
    model, x, n = wrapped(kind, NETWORKS[name] | LONG), X.get(kind, IDS), N - (kind != 'plain')
    real = RIGHT[:, :n] & (padding != 'none')
    hiding, itself = (real[:, :, None] & real[:, None, :])[:, None], torch.eye(n).bool() if padding == 'none' else None
    loss, want = (model(x, attn_mask=mask, **PADDING[padding]) for mask in (hiding, itself))
    assert loss.item() == pytest.approx(want.item(), rel=1e-9)
    assert_same_gradients(gradients(loss, model), gradients(want, model), 1e-9)


# what else is handed on to the network


@pytest.mark.parametrize(
    ('kind', 'name'), [('plain', 'pos'), ('continuous', 'pos'), ('plain', 'embed_ids'), ('xl', 'embed_ids')]
)
def test_ids_of_every_integer_dtype(kind: str, name: str) -> None:
    wrapper, x = wrapped(kind, {} if name == 'pos' else {'embed_num_tokens': {'kind': 4}}), X.get(kind, IDS)
    ids = torch.arange(N - (kind == 'continuous')).flip(0) if name == 'pos' else IDS % 4
    every = [ids.to(dtype) for dtype in INTEGERS]
    losses = {wrapper(x, **{name: t if name == 'pos' else {'kind': t}}).item() for t in every}
    assert len(losses) == 1


def test_a_mask_of_prepended_embeddings_is_as_wide_as_they_are() -> None:
    with pytest.raises(ValueError, match=r'^prepend_mask must have shape \(3, 2\) like x, got \(3, 3'):
        wrapped('plain', {})(IDS, prepend_embeds=torch.zeros(B, 2, 16), prepend_mask=RIGHT[:, :3])


@pytest.mark.parametrize('kind', ['plain', 'continuous', 'unpadded', 'xl'])
def test_one_mask_of_keys_for_all_rows(kind: str) -> None:
    """(1, n), which x-transformers broadcasts, is (b, n) of equal rows."""
    model, x = wrapped(kind, LONG), X.get(kind, IDS)
    keys = ((I < 3) | (I > 4))[None, kind in ('continuous', 'xl') :]  # XL: of the keys of each segment
    call = {'lens': LENS} if kind == 'unpadded' else {}
    model.unpad = kind == 'unpadded'
    got, want = (model(x, self_attn_kv_mask=mask, **call) for mask in (keys, keys.expand(B, -1)))
    assert got.item() == want.item() != model(x, **call).item()


def test_unpad_follows_the_device_of_the_data() -> None:
    model = wrapped('plain', {}, unpad=True)
    want = model(IDS, lens=LENS)
    with torch.device('meta'):
        assert torch.equal(model(IDS, lens=LENS), want)
