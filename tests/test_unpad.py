"""`unpad=True`: the loss of the rows alone, whatever the padding, and all that is returned where the batch had it."""

from typing import Any

import pytest
import torch
from networks import NETWORKS, ROTARY, WEIGHTINGS, HostCopies, assert_same_gradients, decoder, gradients
from torch import Tensor

from xtloss import AutoregressiveWrapper, segment_leak

B, N, VOCAB, WIDTH = 6, 11, 11, 16
STARTS = torch.tensor([0, 4, 2, 7, 9, 5])
ENDS = torch.tensor([11, 4, 7, 8, 11, 11])  # the second row is empty, the fourth has one token
I = torch.arange(N)
INSIDE = (STARTS[:, None] <= I) & (ENDS[:, None] > I)
HOLES = INSIDE & ~((I == 4)[None] & (torch.arange(B) % 2 == 0)[:, None])  # row 0 and 2 get one
FROM_LEFT = (ENDS - STARTS)[:, None] > I

EXACT = {'layers_attn_qk_norm': True, 'dtype': torch.float64}
UNPADDED = NETWORKS | {'recycling': ROTARY | {'recycling': True}}
PADDINGS: dict[str, tuple[Tensor, dict[str, Tensor]]] = {  # what is real, and how it is told
    'right, by lens': (FROM_LEFT, {'lens': ENDS - STARTS}),
    'right, by mask': (FROM_LEFT, {'mask': FROM_LEFT}),
    'both sides, by mask': (INSIDE, {'mask': INSIDE}),
    'left, by seq_start_pos': (STARTS[:, None] <= I, {'seq_start_pos': STARTS}),
    'both sides, by lens and seq_start_pos': (INSIDE, {'lens': ENDS, 'seq_start_pos': STARTS}),
    'a mask with holes': (HOLES, {'mask': HOLES}),
    'nothing is real': (torch.zeros(B, N).bool(), {'lens': torch.zeros(B).long()}),
    'no padding': (torch.ones(B, N).bool(), {'lens': torch.full((B,), N)}),
}


def ids(seed: int = 0) -> Tensor:
    x = torch.randint(0, VOCAB, (B, N), generator=torch.Generator().manual_seed(seed))
    x[0, 3] = x[5, 8] = -100
    return x


def per_token(seed: int = 1) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        'loss_mask': torch.rand(B, N, generator=draw) < 0.8,
        'loss_weight': torch.randn(B, N, generator=draw, dtype=torch.float64),
    }


def of_row(value: Any, row: int, span: slice) -> Any:
    """The part of an argument that belongs to a row, and where it is of tokens, to these."""
    if isinstance(value, dict):
        return {key: of_row(t, row, span) for key, t in value.items()}
    return value[row : row + 1] if value.shape[:2] != (B, N) else value[row : row + 1, span]


def alone(wrapper: AutoregressiveWrapper, x: Tensor, real: Tensor, numbers: dict[str, Any], **arguments: Any) -> Any:
    """Each row by itself, from its first real token to its last; the sum over one Z; and what each row returned."""
    z, parts = wrapper.loss_normalizer(x, mask=real, loss_mask=arguments.get('loss_mask')), {}
    total = torch.zeros((), dtype=torch.float64)
    for row in range(B):
        here = real[row].nonzero().flatten().tolist()
        if here:
            span = slice(here[0], here[-1] + 1)
            call = {name: of_row(value, row, span) for name, value in arguments.items()} | numbers
            hidden = real[row : row + 1, span]
            call |= {} if hidden.all() else {'mask': hidden}
            wanted = {'normalizer': z, 'return_outputs': True, 'return_breakdown': True}
            loss, (logits, _), breakdown = wrapper(x[row : row + 1, span], **call, **wanted)
            total, parts[row, span.start] = total + loss, (logits, breakdown)
    return total, parts


@pytest.fixture(params=[True, False], ids=['packed', 'one to a row'])
def packs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr('xtloss.wrappers.unpad.MASK_FREE_WIDTH', 1e9 if request.param else 1e-9)
    return bool(request.param)


CASES = [(network, padding, w) for network in ('absolute', 'flash') for padding in PADDINGS for w in WEIGHTINGS]
CASES += [(network, 'both sides, by mask', 'square') for network in UNPADDED]


@pytest.mark.usefixtures('packs')
@pytest.mark.parametrize(('network', 'padding', 'weighting'), CASES)
def test_the_rows_alone(network: str, padding: str, weighting: str | float) -> None:
    """Loss and gradients, fused or not, and all that is returned."""
    (real, told), x, rows = PADDINGS[padding], ids(), per_token()
    net = decoder(num_tokens=VOCAB, **EXACT, **UNPADDED[network])
    wrapper = AutoregressiveWrapper(net, loss_weighting=weighting, fused=False).eval()
    numbers = {'recycle_steps': 2} if network == 'recycling' else {}
    want, parts = alone(wrapper, x, real, numbers, **rows)
    wanted = gradients(want, net) if want.requires_grad else {}
    wrapper.unpad, call = True, {'x': x.masked_fill(~real, 10**6), **told, **rows, **numbers}
    got, (logits, cache), breakdown = wrapper(**call, return_outputs=True, return_breakdown=True)
    assert cache is None
    assert logits.shape[:2] == breakdown.token_loss.shape == breakdown.weight.shape == (B, N - 1)
    for (row, start), (alone_logits, alone_breakdown) in parts.items():
        here = slice(start, start + alone_logits.shape[1])
        seen = real[row, here][:, None]
        torch.testing.assert_close(logits[row, here], torch.where(seen, alone_logits[0], 0), rtol=1e-9, atol=1e-9)
        for mine, its in zip(breakdown[:2], alone_breakdown[:2], strict=True):
            torch.testing.assert_close(mine[row, here], its[0], rtol=1e-9, atol=1e-9)
    assert not logits[~real[:, :-1]].any()
    wrapper.fused = 'auto'
    for one in (got, wrapper(**call)):
        assert one.item() == pytest.approx(want.item(), rel=1e-9, abs=1e-12)
        assert_same_gradients(gradients(one, net), wanted, 1e-9, floor=1e-4)


TRAVELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'embed_ids': ({'embed_num_tokens': {'kind': 3}}, {'embed_ids': {'kind': torch.randint(0, 3, (B, N))}}),
    'sum_embeds': ({}, {'sum_embeds': torch.randn(B, N, WIDTH, dtype=torch.float64)}),
    'condition of a token': (
        {'layers_use_adaptive_layernorm': True, 'layers_dim_condition': 5},
        {'condition': torch.randn(B, N, 5, dtype=torch.float64)},
    ),
    'condition of a row': (
        {'layers_use_adaptive_layernorm': True, 'layers_dim_condition': 5},
        {'condition': torch.randn(B, 5, dtype=torch.float64)},
    ),
    'self_attn_kv_mask': ({}, {'self_attn_kv_mask': torch.rand(B, N) < 0.7}),
    'loss_weight of a row': ({}, {'loss_weight': torch.randn(B)}),
}


@pytest.mark.usefixtures('packs')
@pytest.mark.parametrize('name', TRAVELS)
def test_what_is_of_a_token_travels_with_it(name: str) -> None:
    (options, call), (real, told), x = TRAVELS[name], PADDINGS['both sides, by mask'], ids()
    net = decoder(num_tokens=VOCAB, **EXACT, **ROTARY, **options)
    wrapper = AutoregressiveWrapper(net, loss_weighting='sequence')
    want, _ = alone(wrapper, x, real, {}, **call)
    wrapper.unpad = True
    got = wrapper(x, **told, **call)
    assert got.item() == pytest.approx(want.item(), rel=1e-9)
    assert_same_gradients(gradients(got, net), gradients(want, net), 1e-9, floor=1e-4)


@pytest.mark.usefixtures('packs')
def test_what_all_rows_share_travels_with_each() -> None:
    net = decoder(num_tokens=VOCAB, embed_num_tokens={'kind': 3}, **EXACT, **ROTARY)
    shared, lens = torch.arange(N)[None] % 3, ENDS - STARTS
    want, got = (
        AutoregressiveWrapper(net, unpad=unpad)(ids(), lens=lens, embed_ids={'kind': kinds})
        for unpad, kinds in ((False, shared.expand(B, N)), (True, shared))
    )
    assert got.item() == pytest.approx(want.item(), rel=1e-9)


def test_fewer_tokens_are_read() -> None:
    """The network reads as many positions as there are real ones, but for what rows cannot share."""
    net, read = decoder(num_tokens=VOCAB, max_seq_len=128, **ROTARY), []
    net.attn_layers.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[:2]))
    wrapper = AutoregressiveWrapper(net, unpad=True, trust_segments=True)  # a hook on all layers cannot be asked
    lens = torch.tensor([30, 2, 3, 20, 1, 4, 0, 0])
    wrapper(torch.randint(0, VOCAB, (8, 64)), lens=lens)
    wrapper(torch.randint(0, VOCAB, (8, 64)), lens=lens.clamp(min=29))
    wrapper(torch.randint(0, VOCAB, (8, 64)), seq_start_pos=64 - lens)
    # a mask costs more than a row saves, unless rows · (1 + width / 512) < sequences
    for lens in ([40, 3], [128, 128, 128, 64, 64], [128, 128, 128, 64, 64, 30, 30]):
        wrapper(torch.randint(0, VOCAB, (len(lens), 128)), lens=torch.tensor(lens))
    assert read == [(2, 30), (8, 30), (2, 30), (2, 40), (5, 128), (5, 128)]


@pytest.mark.parametrize('call', [{}, {'segment_ids': torch.ones(B, N).long()}])
def test_nothing_happens_without_padding_told(call: dict[str, Tensor]) -> None:
    wrapper = AutoregressiveWrapper(decoder(num_tokens=VOCAB, **ROTARY), unpad=True, trust_segments=True)
    _, (_, cache) = wrapper(ids(), **call, return_outputs=True)
    assert cache is not None


REFUSED: dict[str, Any] = {
    'attn_mask': torch.ones(N, N).bool(),
    'prepend_embeds': torch.zeros(B, 2, WIDTH),
    'mems': [torch.zeros(B, 2, WIDTH)],
    'pos': torch.arange(N),
    'in_attn_cond': torch.zeros(B, N, WIDTH),
    'context': torch.zeros(B, 2, WIDTH),
    'context_mask': torch.ones(B, 2).bool(),
    'attn_bias': torch.zeros(2, N, N),
    'flash_pack_seq_kwargs': {'cu_seqlens': [torch.arange(3)]},
    'sum_embeds': torch.zeros(B, N - 1, WIDTH),
    'condition': torch.zeros(B, N + 1, WIDTH),
    'self_attn_kv_residuals': [torch.zeros(B, N, 2, WIDTH)],
    'cache': decoder(num_tokens=VOCAB)(torch.zeros(B, 2).long(), return_intermediates=True)[1],
}


@pytest.mark.parametrize('trust', [False, True], ids=['', 'trusted'])
@pytest.mark.parametrize('lens', [ENDS, torch.full((B,), N), torch.zeros(B).long()], ids=['some', 'all', 'none'])
@pytest.mark.parametrize('name', REFUSED)
def test_what_does_not_travel_is_refused_whatever_the_batch_holds(name: str, lens: Tensor, trust: bool) -> None:
    """No promise about the network is one about its arguments."""
    wrapper = AutoregressiveWrapper(decoder(num_tokens=VOCAB, **ROTARY), unpad=True, trust_segments=trust)
    for method in (wrapper, wrapper.loss_normalizer):
        with pytest.raises(ValueError, match=f'^unpad=True: {name}'):
            method(ids(), lens=lens, **{name: REFUSED[name]})


APART = 'options of the table in the README'
REFUSING = [({'layers_shift_tokens': 1}, APART), ({'num_memory_tokens': 2}, APART)]
REFUSING += [({'layers_attn_num_mem_kv': 1}, APART), ({'layers_attn_sparse_topk': 8}, 'short')]
REFUSING += [({'layers_attn_sparse_topk': 2}, 'short')]


@pytest.mark.parametrize(('options', 'why'), REFUSING)
@pytest.mark.parametrize('lens', [ENDS, torch.full((B,), N), torch.zeros(B).long(), torch.tensor([7, 5, 7, 7, 7, 7])])
def test_networks_that_cannot_take_it_are_refused_whatever_the_batch_holds(
    options: dict[str, Any], why: str, lens: Tensor
) -> None:
    """They do not keep sequences apart, or cannot take short rows."""
    wrapper = AutoregressiveWrapper(decoder(num_tokens=VOCAB, **options), unpad=True)
    with pytest.raises(ValueError, match=f'^unpad=True: .*{why}'):
        wrapper(ids(), lens=lens)
    assert wrapper(ids()).isfinite()  # which asks for no other rows


@pytest.mark.slow
@pytest.mark.usefixtures('whole_graphs')
def test_a_padded_batch_as_it_came_where_nothing_can_be_read() -> None:
    wrapper = AutoregressiveWrapper(decoder(num_tokens=VOCAB, **ROTARY), unpad=True)
    call = {'lens': ENDS, 'return_outputs': True}
    want, (logits, _) = wrapper(ids(), **call)
    got, (compiled, cache) = torch.compile(wrapper, backend='eager', fullgraph=True)(ids(), **call)
    assert cache is None
    assert got.item() == pytest.approx(want.item())
    torch.testing.assert_close(compiled, logits, rtol=1e-5, atol=1e-6)


def test_how_often_values_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the layout and once for the rows that count; without `unpad` once. Older networks read their masks."""
    read: list[int] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, 'tolist', lambda t: read.append(t.numel()) or tolist(t))
    net = decoder(num_tokens=VOCAB, **ROTARY)
    segment_leak(net)  # measured before: else it is read once, at the first call
    for unpad, layouts in ((False, []), (True, [3 * B])):
        with HostCopies() as of_network:
            net(ids().clamp(0, VOCAB - 1), attn_mask=torch.ones(N, N).tril().bool() if unpad else None)
        read.clear()
        with HostCopies() as copies:
            AutoregressiveWrapper(net, unpad=unpad)(ids(), lens=ENDS)
        assert copies.count == of_network.count + 1
        assert read == layouts
