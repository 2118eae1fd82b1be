"""Keys that are hidden, by whatever argument: nobody sees them, and who sees no key at all sees itself.

Most in float64, where x-transformers fills what is hidden with -inf's like, and a row of them is NaN.
"""

from typing import Any

import pytest
import torch
from batches import INTEGERS
from modes import LENS, B, N, batch
from networks import ROTARY, Stub, assert_same_gradients, continuous_network, decoder, gradients
from torch import Tensor, nn

from xtloss import AutoregressiveWrapper, ContinuousAutoregressiveWrapper, XLAutoregressiveWrapper

S = 5  # inputs of a segment of XL
I = torch.arange(N)
RIGHT, LEFT = LENS[:, None] > I, N - LENS[:, None] <= I
START = {'seq_start_pos': N - LENS}
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


def wrapped(kind: str, options: dict[str, Any], dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    if kind == 'continuous':
        return ContinuousAutoregressiveWrapper(continuous_network(dtype=dtype, **options), **more)
    if kind == 'xl':
        options = {'max_mem_len': S, 'max_seq_len': S} | options
        return XLAutoregressiveWrapper(decoder(dtype=dtype, **options), **more)
    return AutoregressiveWrapper(decoder(dtype=dtype, **options), **more)


def rows_alone(wrapper: Any, x: Tensor, real: Tensor) -> Tensor:
    """The loss of a mean over tokens, each row without its padding."""
    losses = [wrapper(x[row : row + 1, real[row]], normalizer=1.0) for row in range(len(x))]
    return sum(losses) / (real.sum() - len(x))


def assert_same(wrapper: nn.Module, got: Tensor, want: Tensor) -> None:
    """To what is left of float64 where x-transformers takes attention's softmax in float32."""
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    assert_same_gradients(gradients(got, wrapper), gradients(want, wrapper), 1e-5, floor=1e-3)


HIDDEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'left mask': ({'mask': LEFT}, {}),
    'a hole at the start': ({'mask': (I > 2).expand(B, N)}, {}),
    'late start': (START, {}),
    'start and mask': ({**START, 'mask': LEFT}, {}),
    'first key hidden': ({'self_attn_kv_mask': (I > 0).expand(B, N)}, {}),
    'all keys hidden': ({'self_attn_kv_mask': (I < 0).expand(B, N)}, {}),
    'start and hidden keys': ({**START, 'self_attn_kv_mask': (I != 5).expand(B, N)}, {}),
    'mask and hidden keys': ({'mask': RIGHT, 'self_attn_kv_mask': (I > 1).expand(B, N)}, {}),
    'lens and hidden keys': ({'lens': LENS, 'self_attn_kv_mask': (I != 0).expand(B, N)}, {}),
}
OF_TOKENS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'random and hidden keys': ({'self_attn_kv_mask': (I == 2).expand(B, N)}, {'mask_prob': 0.5}),
    'random keys and a left mask': ({'mask': LEFT}, {'mask_prob': 0.5}),
    'segments with a hole': ({'segment_ids': torch.ones(B, N).long(), 'mask': (I != 0).expand(B, N)}, {}),
}
CASES = [('plain', network, hidden) for network in NETWORKS for hidden in HIDDEN | OF_TOKENS]
CASES += [('continuous', network, hidden) for network in NETWORKS | OF_FRAMES for hidden in HIDDEN]


@pytest.mark.parametrize(('kind', 'name', 'hidden'), CASES)
def test_no_loss_moves_with_a_later_token_and_all_is_finite(kind: str, name: str, hidden: str) -> None:
    """A query that sees no key would attend to every key alike, also to the future."""
    (call, options), net = (HIDDEN | OF_TOKENS)[hidden], (NETWORKS | OF_FRAMES)[name]
    if kind == 'continuous' and 'self_attn_kv_mask' in call:  # of what is read, and memory tokens before it
        keys = call['self_attn_kv_mask'][:, :-1]
        memories = torch.ones(B, net.get('num_memory_tokens', 0), dtype=torch.bool)
        call = {**call, 'self_attn_kv_mask': torch.cat([memories, keys], dim=1)}
    wrapper, seen = wrapped(kind, net, **options), []
    for last in (1, 2):
        torch.manual_seed(0)
        x = X[kind].clone()
        x[:, -1] = last
        loss, parts = wrapper(x, **call, return_breakdown=True)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in wrapper.parameters() if p.grad is not None)
        seen.append(parts.token_loss[:, :-1])
    torch.testing.assert_close(*seen, rtol=1e-9, atol=1e-12)


PADDED = [(kind, name) for kind in ('plain', 'xl', 'continuous') for name in NETWORKS]
PADDED += [('continuous', name) for name in OF_FRAMES]


@pytest.mark.parametrize('told', [False, True], ids=['', 'all keys told'])
@pytest.mark.parametrize('by', ['mask', 'seq_start_pos'])
@pytest.mark.parametrize(('kind', 'name'), PADDED)
def test_left_padding_is_the_rows_alone(kind: str, name: str, by: str, told: bool) -> None:
    """Beside a mask of keys too, for which the network would drop `mask`."""
    if (by == 'mask' and name == 'absolute') or (kind == 'xl' and (told or by != 'mask')):
        return  # whose positions only a start shifts; refused
    x, real = (IDS[:, :S], LEFT[:, -S:]) if kind == 'xl' else (X[kind], LEFT)  # XL: in the first segment
    options = (NETWORKS | OF_FRAMES)[name]
    call = {'mask': real} if by == 'mask' else START
    if told:
        keys = options.get('num_memory_tokens', 0) + N - (kind == 'continuous')
        call = {**call, 'self_attn_kv_mask': torch.ones(B, keys).bool()}
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


def test_mask_reaches_the_network() -> None:
    stub = Stub(torch.zeros(B, N, 11))
    AutoregressiveWrapper(stub)(IDS, mask=RIGHT)
    assert torch.equal(stub.seen[0][1]['mask'], RIGHT)


# where the network would drop the mask

DROPPING: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    'alone': ({}, {}, {}),
    'mask_prob': ({}, {'mask_prob': 0.25}, {}),
    'seq_start_pos': ({}, {}, {'seq_start_pos': torch.zeros(B).long()}),
    'self_attn_kv_mask': ({}, {}, {'self_attn_kv_mask': torch.ones(B, N).bool()}),
    'mask_prob and seq_start_pos': ({}, {'mask_prob': 0.25}, {'seq_start_pos': torch.zeros(B).long()}),
    'prepend_embeds': ({}, {}, {'seq_start_pos': torch.zeros(B).long(), 'prepend_embeds': torch.ones(B, 2, 16)}),
    'memory tokens': ({'num_memory_tokens': 2}, {}, {'seq_start_pos': torch.zeros(B).long()}),
    'flash': ({'layers_attn_flash': True}, {}, {'seq_start_pos': torch.zeros(B).long()}),
    'looped': ({'looped': True, 'layers_pre_and_post_norm': True}, {}, {'seq_start_pos': torch.zeros(B).long()}),
}


@pytest.mark.parametrize('real', [RIGHT, LEFT], ids=['right', 'left'])
@pytest.mark.parametrize('dropping', DROPPING)
def test_padding_is_not_seen_where_the_network_would_drop_the_mask(
    dropping: str, real: Tensor, fused: str | bool
) -> None:
    network, options, call = DROPPING[dropping]
    net, seen = decoder(layers_rotary_pos_emb=True, layers_depth=2, **network), []
    for pad_value in (1, 9):  # what the network reads at a masked position
        wrapper = AutoregressiveWrapper(net, pad_value=pad_value, fused=fused, **options)
        losses = []
        for returning in ({}, {'return_outputs': True}):
            torch.manual_seed(4)
            out = wrapper(IDS, mask=real, **call, **returning)
            losses.append(out[0] if returning else out)
        seen.append((*losses, out[1][0][real[:, :-1]]))
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert seen[0][1].item() == pytest.approx(seen[0][0].item(), rel=1e-5)
    losses = []
    for mask in (None, torch.ones(B, N).bool()):
        torch.manual_seed(4)
        losses.append(wrapper(IDS, mask=mask, **call).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize('name', [*NETWORKS, *OF_FRAMES])
@pytest.mark.parametrize('padding', [{}, {'mask': RIGHT}, {'lens': LENS}, {'seq_start_pos': torch.tensor([0, 1, 2])}])
def test_no_hidden_key_moves_a_later_loss(name: str, padding: dict[str, Tensor]) -> None:
    """Key 3 is hidden from all, so frame 3 moves no loss but those of itself and of the frame after it."""
    options = (NETWORKS | OF_FRAMES)[name]
    wrapper, x = wrapped('continuous', options), X['continuous']
    y = x.clone()
    y[:, 3] += 3
    keys = torch.cat([torch.ones(options.get('num_memory_tokens', 0)).bool(), I[:-1] != 3]).expand(B, -1)
    call = {'self_attn_kv_mask': keys} | padding
    (_, want), (_, got) = (wrapper(frames_, return_breakdown=True, **call) for frames_ in (x, y))
    rest = [i - 1 for i in range(1, N) if i not in (3, 4)]
    torch.testing.assert_close(got.token_loss[:, rest], want.token_loss[:, rest], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    'beside',
    [{}, {'mask': RIGHT}, {'seq_start_pos': torch.zeros(B).long()}, {'self_attn_kv_mask': torch.ones(B, N).bool()}],
    ids='-'.join,
)
@pytest.mark.parametrize('mask_prob', [0.0, 0.3])
def test_hidden_embeddings_are_not_attended_to(beside: dict[str, Tensor], mask_prob: float) -> None:
    wrapper, losses = wrapped('plain', ROTARY, mask_prob=mask_prob), []
    for scale in (1.0, -3.0):
        before = torch.ones(B, 2, 16, dtype=torch.float64) * torch.tensor([[scale], [1.0]])
        torch.manual_seed(0)
        call = {'prepend_embeds': before, 'prepend_mask': torch.tensor([[False, True]]).expand(B, 2)}
        losses.append(wrapper(IDS, **call, **beside).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# memories

BESIDE_MEMORIES: dict[str, tuple[Tensor, dict[str, Any]]] = {
    'lens': (RIGHT, {'lens': LENS}),
    'mask': (RIGHT, {'mask': RIGHT}),
    'lens and mask': (RIGHT, {'lens': LENS, 'mask': RIGHT}),
    'all keys told': (RIGHT, {'lens': LENS, 'self_attn_kv_mask': torch.ones(B, 3 + N).bool()}),
}
REMEMBERING: dict[str, dict[str, Any]] = {
    'rotary': {},
    'flash': {'layers_attn_flash': True},
    'memory tokens': {'num_memory_tokens': 2},
    'memory keys': {'layers_attn_num_mem_kv': 2},
}


@pytest.mark.parametrize('hidden', [False, True])
@pytest.mark.parametrize('padding', BESIDE_MEMORIES)
@pytest.mark.parametrize('name', REMEMBERING)
@pytest.mark.parametrize('kind', ['plain', 'continuous'])
def test_memories_beside_masks(kind: str, name: str, padding: str, hidden: bool) -> None:
    (real, call), tokens = BESIDE_MEMORIES[padding], REMEMBERING[name].get('num_memory_tokens', 0)
    model, x = wrapped(kind, {**ROTARY, 'use_abs_pos_emb': False, 'max_mem_len': 8, **REMEMBERING[name]}), X[kind]
    if 'self_attn_kv_mask' in call:
        keys = 3 + tokens + N - (kind == 'continuous')
        call = {**call, 'self_attn_kv_mask': torch.ones(B, keys).bool()}
    mems, seen = [torch.randn(B, 3, 16, dtype=torch.float64) for _ in range(2)], torch.tensor([not hidden, True, True])
    if hidden:
        call = {**call, 'mem_masks': [seen.expand(B, 3)] * 2}
    alone = [
        model(x[row : row + 1, real[row]], mems=[mem[row : row + 1, seen] for mem in mems], normalizer=1.0)
        for row in range(B)
    ]
    assert model(x, mems=mems, **call).item() == pytest.approx((sum(alone) / (real.sum() - B)).item(), rel=1e-6)


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
    'start': {'loss_mask': RIGHT, 'seq_start_pos': torch.zeros(B).long()},
}
TOLD = [('plain', padding) for padding in PADDING]
TOLD += [(kind, padding) for kind in ('continuous', 'xl') for padding in ('lens', 'loss_mask', 'mask')]


@pytest.mark.parametrize(('kind', 'padding'), TOLD)
@pytest.mark.parametrize('name', NETWORKS)
def test_what_is_hidden_from_padding_alone_moves_nothing(kind: str, name: str, padding: str) -> None:
    """A query of padding sees nothing, and nothing sees padding."""
    model, x, n = wrapped(kind, NETWORKS[name] | LONG), X.get(kind, IDS), N - (kind != 'plain')
    real = RIGHT[:, :n]
    attn_mask = (real[:, :, None] & real[:, None, :])[:, None]
    loss, want = model(x, attn_mask=attn_mask, **PADDING[padding]), model(x, **PADDING[padding])
    assert loss.item() == pytest.approx(want.item(), rel=1e-9)
    assert_same_gradients(gradients(loss, model), gradients(want, model), 1e-9)


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('kind', ['plain', 'continuous', 'xl'])
def test_a_mask_that_hides_everything(kind: str, name: str) -> None:
    model, x, n = wrapped(kind, NETWORKS[name] | LONG), X.get(kind, IDS), N - (kind != 'plain')
    loss, itself = (model(x, attn_mask=mask) for mask in (torch.zeros(n, n).bool(), torch.eye(n).bool()))
    assert loss.item() == itself.item()
    got = gradients(loss, model)
    assert all(g.isfinite().all() for g in got.values())
    assert_same_gradients(got, gradients(itself, model), 1e-12)


# what else is handed on to the network


@pytest.mark.parametrize('dtype', INTEGERS)
@pytest.mark.parametrize(
    ('kind', 'name'), [('plain', 'pos'), ('continuous', 'pos'), ('plain', 'embed_ids'), ('xl', 'embed_ids')]
)
def test_ids_of_every_integer_dtype(kind: str, name: str, dtype: torch.dtype) -> None:
    if name == 'pos':
        wrapper, ids = wrapped(kind, {}), torch.arange(N - (kind == 'continuous')).flip(0)
        got, want = (wrapper(X[kind], pos=t) for t in (ids.to(dtype), ids))
    else:
        wrapper, ids = wrapped(kind, {'embed_num_tokens': {'kind': 4}}), IDS % 4
        got, want = (wrapper(IDS, embed_ids={'kind': t}) for t in (ids.to(dtype), ids))
    assert torch.equal(got, want)


BAD_MASKS: list[tuple[str, Tensor, str]] = [
    ('self_attn_kv_mask', RIGHT[:, 1:], r'must have shape \(3, 9 or more\) .* got \(3, 8\)'),
    ('prepend_mask', RIGHT[:, :3], r'prepend_mask must have shape \(3, 2\) like x, got \(3, 3'),
    ('prepend_mask', RIGHT[:, :2, None], r'prepend_mask must have shape \(3, 2\)'),
]


@pytest.mark.parametrize(('name', 'value', 'message'), BAD_MASKS)
def test_masks_of_keys_beside_prepended_embeddings(name: str, value: Tensor, message: str) -> None:
    model = wrapped('plain', {})
    for call in (model, model.loss_normalizer):
        with pytest.raises(ValueError, match=message):
            call(IDS, prepend_embeds=torch.zeros(B, 2, 16), **{name: value})


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
