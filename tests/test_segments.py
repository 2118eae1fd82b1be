"""Sequences in one row do not see each other: by changing one and watching the others, and by running each alone."""

import inspect
import random
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import x_transformers.attend
from networks import HostCopies, assert_same_gradients, gradients, judged_arguments
from torch import Tensor, nn
from x_transformers import Decoder, Encoder, TransformerWrapper
from x_transformers.attend import Attend
from x_transformers.x_transformers import AbsolutePositionalEmbedding, Attention, AttentionLayers, FeedForward

from xtloss import AutoregressiveWrapper
from xtloss.packing.known_networks import APART, traits_of_example
from xtloss.packing.segments import APART_ARGUMENTS

# an id that returns is another sequence; padding before, behind, none
IDS = torch.tensor([[0, 0, 7, 7, 7, 7, 3, 3, 7, 7, 2, 2], [4, 4, 4, 4, 4, 4, 4, 9, 9, 0, 0, 0]])
VOCABULARY, WIDTH = 13, 16

VARLEN = {'attn_flash': True, 'attn_flash_pack_seq': True, 'rotary_pos_emb': True}

MOVES = [  # by masks and positions alone: one sequence moves another, or is another where it lies elsewhere in the row
    ('shift_tokens', {'shift_tokens': 1}),
    ('attn_selective', {'attn_selective': True}),
    ('attn_orthog_projected_values', {'attn_orthog_projected_values': True}),
    ('attn_orthog_projected_values_per_head', {'attn_orthog_projected_values_per_head': True}),
    ('orthog_residual', {'orthog_residual': True}),
    ('mv_split_residual', {'mv_split_residual': True}),
    (
        'attn_hybrid_module',
        {'attn_hybrid_module': nn.GRU(WIDTH, WIDTH, batch_first=True), 'attn_hybrid_fold_axial_dim': 1},
    ),
    ('attn_inverted_attention', {'cross_attend': True, 'cross_attn_inverted_attention': True}),
    ('polar_pos_emb beside an absolute', {'polar_pos_emb': True, 'disable_abs_pos_emb': False}),
    ('attn_use_cope beside rotary_pos_emb', {'attn_use_cope': True, 'rotary_pos_emb': True}),
    ('attn_l2_distance beside rotary_xpos', {'attn_l2_distance': True, 'rotary_xpos': True}),
    ('attn_max_attend_past beside cross_attend', {'cross_attend': True, 'attn_max_attend_past': 2}),
    ('attn_use_rel_proj_pos_bias beside cross_attend', {'cross_attend': True, 'attn_use_rel_proj_pos_bias': True}),
]
BREAKS = [  # masks of (b, 1, n, n) do not fit, or positions of (b, n) are not taken
    ('num_memory_tokens', {'num_memory_tokens': 2}),
    ('attn_num_mem_kv', {'attn_num_mem_kv': 2}),
    ('use_cls_token', {'use_cls_token': True}),
    ('scaled_sinu_pos_emb', {'scaled_sinu_pos_emb': True}),
    ('rel_pos_bias beside an absolute', {'rel_pos_bias': True, 'disable_abs_pos_emb': False}),
    ('dynamic_pos_bias beside an absolute', {'dynamic_pos_bias': True}),
    ('.*data_dependent_alibi', {'cross_attend': True, 'attn_data_dependent_alibi': True}),
]
UNPROVEN = [
    ('average_pool_embed', {'average_pool_embed': True}),
    ('attn_pool', {'attn_pool': True}),
    ('attn_custom_attn_fn', {'attn_custom_attn_fn': lambda sim: sim.softmax(dim=-2)}),
    ('has_multiple_heads', {'num_output_heads': 2}),
    ('Softmax dim', {'ff_custom_activation': nn.Softmax(dim=-2)}),
    ('to_logits Conv1d', {'to_logits': nn.Conv1d(1, 1, 3)}),
    ('token_emb', {'token_emb': nn.EmbeddingBag(VOCABULARY, WIDTH)}),
]


def label(options: dict[str, Any]) -> str:
    """The options as a test's name."""
    return '-'.join(k if v is True else f'{k}={v}' for k, v in options.items()).replace(' ', '') or 'default'


def lacking(options: dict[str, Any]) -> list[str]:
    """The options that this release of x-transformers does not know."""
    known = set()
    for prefix, module in {
        '': AttentionLayers,
        'attn_': Attention,
        'cross_attn_': Attention,
        'ff_': FeedForward,
    }.items():
        known |= {prefix + name for name in inspect.signature(module).parameters}
    return [name for name in options if name not in known | set(inspect.signature(TransformerWrapper).parameters)]


def build(options: dict[str, Any]) -> TransformerWrapper:
    """A network whose parameters are all at random, as after training: many start at zero, where a leak could hide."""
    if lacking(options):
        pytest.skip(f'x-transformers {version("x-transformers")} has no {", ".join(lacking(options))}')
    layers = {'dim': WIDTH, 'depth': 2, 'heads': 2, 'attn_dim_head': 8, 'verbose': False} | options
    of_wrapper = layers.keys() & inspect.signature(TransformerWrapper).parameters
    wrapper = {'num_tokens': VOCABULARY, 'max_seq_len': 32} | {name: layers.pop(name) for name in of_wrapper}
    net = TransformerWrapper(attn_layers=Decoder(**layers), **wrapper)
    for p in net.parameters():
        nn.init.normal_(p, std=0.25) if p.ndim > 1 or not p.any() else p.data.add_(torch.randn_like(p), alpha=0.25)
    return net


def needed(net: TransformerWrapper) -> dict[str, Any]:
    """What this network's forward cannot do without."""
    b, n = IDS.shape
    layers, arguments = net.attn_layers, {}
    if layers.cross_attend:
        width = next(m for m in layers.modules() if isinstance(m, Attention) and not m.causal).to_k.in_features
        arguments |= {'context': torch.randn(b, 5, width), 'context_mask': torch.rand(b, 5) < 0.7}
        arguments['context_mask'][:, 0] = True
    if layers.need_condition:
        arguments['condition'] = torch.randn(b, WIDTH)
    if net.recycling:
        arguments['recycle_steps'] = 2
    if net.embeds is not None:
        arguments['embed_ids'] = {'kind': torch.randint(0, 3, (b, n))}
    return arguments


def outputs(net: TransformerWrapper, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """All that the network predicts from each position, (b, n, f), always with the same random numbers."""
    torch.manual_seed(0)
    random.seed(0)
    head = net.add_continuous_pred_head
    found, hiddens = net(
        x, return_intermediates=True, looped_pred_all_logits=True, return_next_embed_pred=head, **arguments
    )
    logits, embeds = (found[0], [found[1][0]]) if head else (found, [])
    return torch.cat([logits, *embeds, *(hiddens.all_pred_logits or []), *(hiddens.exit_logits or [])], dim=-1)


def runs(ids: Tensor) -> list[list[tuple[int, int]]]:
    """Where the runs of equal ids of each row start and stop."""
    rows = []
    for row in ids.tolist():
        starts = [i for i in range(len(row)) if i == 0 or row[i] != row[i - 1]]
        rows.append(list(zip(starts, [*starts[1:], len(row)], strict=True)))
    return rows


def by_run(ids: Tensor) -> Tensor:
    """(b, n) int64: how far each position is from where its run starts."""
    return torch.tensor([[i - start for start, stop in spans for i in range(start, stop)] for spans in runs(ids)]).view(
        ids.shape
    )


def by_hand(net: TransformerWrapper, ids: Tensor) -> dict[str, Any]:
    """The masks and positions that keep a plain network's sequences apart, one entry at a time."""
    b, n = ids.shape
    attn_mask = torch.zeros(b, 1, n, n, dtype=torch.bool)
    for row, spans in enumerate(runs(ids)):
        for start, stop in spans:
            for i in range(start, stop):
                for j in range(start, i + 1):
                    attn_mask[row, 0, i, j] = True
    takes_pos = hasattr(net.pos_emb, 'scale')  # the embeddings that do have one
    return {'attn_mask': attn_mask} | ({'pos': by_run(ids)} if takes_pos else {})


def moved(net: TransformerWrapper, x: Tensor, arguments: dict[str, Any]) -> float:
    """How far changing a run moves any other, relative to the outputs' scale: the worst over all runs."""
    before = outputs(net, x, arguments).detach()
    worst = 0.0
    for k in range(max(map(len, runs(IDS)))):
        other, changed = torch.ones_like(IDS, dtype=torch.bool), x.clone()
        for row, spans in enumerate(runs(IDS)):
            if k < len(spans):
                here = slice(*spans[k])
                other[row, here], changed[row, here] = False, (x[row, here] + 1 + k) % VOCABULARY
        after = outputs(net, changed, arguments).detach()
        assert not torch.equal(after[~other], before[~other])  # the change is seen where it was made
        worst = max(worst, (after - before)[other].abs().max().item())
    return worst / before.abs().max().item()


def alone(arguments: dict[str, Any], row: int, here: slice) -> dict[str, Any]:
    """The part of the arguments that belongs to one run."""
    part = {}
    for name, value in arguments.items():
        if name == 'embed_ids':
            part[name] = {kind: ids[row : row + 1, here] for kind, ids in value.items()}
        elif name == 'attn_mask':
            part[name] = (value[row : row + 1] if value.ndim == 4 else value)[..., here, here]
        elif name in ('context', 'context_mask') or (name in ('condition', 'in_attn_cond') and value.ndim == 2):
            part[name] = value[row : row + 1]
        else:
            part[name] = value[row : row + 1, here] if isinstance(value, Tensor) else value
    return part


def off(net: TransformerWrapper, x: Tensor, arguments: dict[str, Any], packed: Tensor) -> float:
    """How far each run is from itself run alone with the arguments, relative to the outputs' scale: the worst."""
    worst = 0.0
    for row, spans in enumerate(runs(IDS)):
        for start, stop in spans:
            if IDS[row, start] != 0:
                here = slice(start, stop)
                separate = outputs(net, x[row : row + 1, here], alone(arguments, row, here))
                worst = max(worst, (separate[0] - packed[row, here]).abs().max().item())
    return worst / packed.abs().max().item()


def assert_apart(net: TransformerWrapper, arguments: dict[str, Any], *, same_alone: bool = True) -> None:
    """No run moves another, in training nor in evaluation; each is what it is alone; gradients are finite."""
    x = torch.randint(0, VOCABULARY, IDS.shape)
    given = judged_arguments(net, IDS, arguments)
    assert moved(net.train(), x, given) <= 1e-6
    assert moved(net.eval(), x, given) <= 1e-6

    packed = outputs(net, x, given)
    packed.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    if same_alone:
        with torch.no_grad():
            assert off(net, x, arguments, packed) <= 1e-5


# the whitelist


@pytest.mark.parametrize('options', [o for o in APART if 'attn_flash_pack_seq' not in o], ids=label)
def test_allowed_options_keep_sequences_apart(options: dict[str, Any]) -> None:
    """Each network of the whitelist, at this release."""
    net = build(options)
    assert_apart(net, needed(net), same_alone=not any('gumbel' in name for name in options))


def test_allowed_options_keep_sequences_apart_together() -> None:
    """Options that are allowed one by one are apart in any company in which they are allowed."""
    draw = random.Random(0)
    proven = 0
    for _ in range(32):
        options = {k: v for o in draw.sample(APART, 4) for k, v in o.items()}
        if lacking(options) or 'attn_flash_pack_seq' in options or 'looped' in options:  # loops blow rounding up
            continue
        try:
            net = build(options)
            arguments = needed(net)
            outputs(net, torch.randint(0, VOCABULARY, IDS.shape), arguments)
        except (
            AssertionError,
            AttributeError,
            RuntimeError,
            TypeError,
            UserWarning,
        ):  # x-transformers cannot do these together
            continue
        try:
            judged_arguments(net, IDS, arguments)
        except ValueError:
            continue
        assert_apart(net, arguments, same_alone=not any('gumbel' in name for name in options))
        proven += 1
    assert proven >= 10


@pytest.mark.parametrize(('name', 'options'), MOVES, ids=[name for name, _ in MOVES])
def test_leaks_are_refused(name: str, options: dict[str, Any]) -> None:
    """Options under which masks and positions are not enough are refused by name; the same checks see them leak."""
    net = build(options).eval()
    arguments = needed(net)
    with pytest.raises(ValueError, match=f'segment_ids: {name}.* is not known to keep the sequences of a row apart'):
        judged_arguments(net, IDS, arguments)

    x = torch.randint(0, VOCABULARY, IDS.shape)
    given = arguments | by_hand(net, IDS)
    with torch.no_grad():
        assert max(moved(net, x, given), off(net, x, arguments, outputs(net, x, given))) > 1e-3


@pytest.mark.parametrize(('name', 'options'), BREAKS, ids=[name for name, _ in BREAKS])
def test_misfits_are_refused(name: str, options: dict[str, Any]) -> None:
    """Options with which x-transformers itself would fail are refused by name."""
    net = build(options)
    arguments = needed(net)
    with pytest.raises(ValueError, match=f'segment_ids: {name}'):
        judged_arguments(net, IDS, arguments)
    with pytest.raises((RuntimeError, AssertionError)):
        outputs(net, torch.randint(0, VOCABULARY, IDS.shape), arguments | by_hand(net, IDS))


@pytest.mark.parametrize(('name', 'options'), UNPROVEN, ids=[name for name, _ in UNPROVEN])
def test_unproven_options_are_refused(name: str, options: dict[str, Any]) -> None:
    """What nobody has proven is refused, a module of the user's own too."""
    net = build(options)
    with pytest.raises(ValueError, match=f'segment_ids: .*{name}'):
        judged_arguments(net, IDS, {})


def test_later_options_are_refused(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """An option that a later release adds is allowed while it is off, and refused by name when it is on."""
    released = Attention.__init__

    def later(self: Attention, *args: Any, look_around: bool = False, **kwargs: Any) -> None:
        released(self, *args, **kwargs)
        self.look_around = look_around

    monkeypatch.setattr(Attention, '__init__', later)
    request.addfinalizer(traits_of_example.cache_clear)
    traits_of_example.cache_clear()
    assert judged_arguments(build({}), IDS, {})
    with pytest.raises(ValueError, match='segment_ids: attn_look_around'):
        judged_arguments(build({'attn_look_around': True}), IDS, {})


def test_other_networks_are_refused() -> None:
    """Encoders, subclasses and replaced forwards that do not heed the mask, and networks of other kinds."""

    class Mine(Attention):
        def forward(self, *args: Any, attn_mask: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    encoder = TransformerWrapper(
        num_tokens=4, max_seq_len=4, attn_layers=Encoder(dim=8, depth=1, heads=2, attn_dim_head=4)
    )
    subclassed, replaced = build({}), build({})
    subclassed.attn_layers.layers[0][1].__class__ = Mine
    forward = replaced.attn_layers.forward
    replaced.attn_layers.forward = lambda x, attn_mask, **kwargs: forward(x, **kwargs)
    for net, name in {encoder: 'causal', subclassed: 'Mine', replaced: 'forward', nn.Linear(2, 2): 'Linear'}.items():
        with pytest.raises(ValueError, match=f'segment_ids: .*{name}'):
            judged_arguments(net, IDS, {})


def test_subclasses_that_keep_the_forward_are_allowed() -> None:
    """Sharding gives modules a class of their own, which inherits everything; compilation wraps them."""
    net = build({})
    for module in list(net.modules()):
        module.__class__ = type(f'Sharded{type(module).__name__}', (type(module),), {})
    assert isinstance(net.pos_emb, AbsolutePositionalEmbedding)
    assert judged_arguments(net, IDS, {}).keys() == {'attn_mask', 'pos'}
    assert judged_arguments(torch.compile(net, backend='eager'), IDS, {}).keys() == {'attn_mask', 'pos'}


def test_a_changed_network_is_judged_anew() -> None:
    """Options set, and modules exchanged, after a first forward."""
    net = build({'rotary_pos_emb': True})
    assert judged_arguments(net, IDS, {})
    attend = net.attn_layers.layers[0][1].attend
    attend.selective = True
    with pytest.raises(ValueError, match='attn_selective'):
        judged_arguments(net, IDS, {})
    attend.selective = False
    assert judged_arguments(net.eval(), IDS, {})
    net.to_logits = nn.Sequential(nn.Linear(WIDTH, VOCABULARY), nn.Flatten())
    with pytest.raises(ValueError, match=r'to_logits\.1 Flatten'):
        judged_arguments(net, IDS, {})


# arguments of the network's forward

B, N = IDS.shape
draw = torch.Generator().manual_seed(0)
KEYS = torch.rand(B, N, generator=draw) < 0.7
PAIRS = (torch.rand(B, 2, N, N, generator=draw) < 0.7) | torch.eye(N, dtype=torch.bool)
EMBEDS = torch.randn(B, N, WIDTH, generator=draw)

ARGUMENTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {'mask': KEYS}),
    ({'rotary_pos_emb': True, 'attn_flash': True}, {'mask': KEYS}),
    ({}, {'self_attn_kv_mask': KEYS | (by_run(IDS) == 0)}),
    ({}, {'attn_mask': PAIRS[0, 0]}),
    ({}, {'attn_mask': PAIRS[0]}),
    ({}, {'attn_mask': PAIRS[:, :1]}),
    ({'attn_flash': True}, {'attn_mask': PAIRS}),
    ({}, {'sum_embeds': EMBEDS}),
    ({}, {'in_attn_cond': EMBEDS[:, 0]}),
    ({}, {'in_attn_cond': EMBEDS}),
    (
        {'use_adaptive_rmsnorm': True},
        {'condition': EMBEDS},
    ),
    ({'embed_num_tokens': {'kind': 3}}, {'embed_ids': {'kind': torch.arange(B * N).view(B, N) % 3}}),
    ({'cross_attend': True}, {'context': EMBEDS[:, :3], 'context_mask': torch.ones(B, 3, dtype=torch.bool)}),
    ({'recycling': True}, {'recycle_steps': 3}),
    ({'looped': True, 'pre_and_post_norm': True}, {'looped_steps': 2}),
    ({'looped': True, 'pre_and_post_norm': True}, {'max_looped_steps': 2}),
    ({}, {'layers_execute_order': (0, 1, 0, 1, 2, 3)}),
    ({}, {'repeat_blocks': (0, 2)}),
    ({}, {'attn_z_loss_weight': 0.5, 'return_attn_z_loss': True}),
]


def test_every_allowed_argument_is_proven() -> None:
    """None is on the list that is not below."""
    assert {
        name for _, arguments in ARGUMENTS for name in arguments if not name.startswith('return_')
    } == APART_ARGUMENTS


@pytest.mark.parametrize(('options', 'arguments'), ARGUMENTS, ids=lambda value: '-'.join(value) or 'default')
def test_allowed_arguments_keep_sequences_apart(options: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Masks are joined, whatever their shape; the rest passes through."""
    assert_apart(build(options), arguments)


@pytest.mark.parametrize('options', [{}, {'attn_flash': True}, {'attn_sigmoid': True}], ids=label)
@pytest.mark.parametrize('name', ['self_attn_kv_mask', 'attn_mask'])
def test_positions_that_see_nothing_see_nothing(options: dict[str, Any], name: str) -> None:
    """Where masks hide all keys up to a position, its sequence's later ones and other sequences stay out of sight too.

    Alone, x-transformers would let it attend to all that is later; unless by flash attention, it did so here as well.
    """
    arguments = {'self_attn_kv_mask': by_run(IDS) > 1, 'attn_mask': (torch.arange(N) % 4 > 0).expand(N, N)}
    assert_apart(build(options), {name: arguments[name]}, same_alone=False)


@pytest.mark.parametrize(
    'name',
    'prepend_embeds prepend_mask mems mem_masks pos cache seq_start_pos rotary_pos_emb polar_pos_emb context_pos '
    'attn_bias causal self_attn_additional_kv self_attn_kv_residuals transform_token_embeds transform_block_inputs '
    'token_emb_kwargs to_logits_kwargs flash_pack_seq_kwargs look_around'.split(),
)
def test_other_arguments_are_refused(name: str) -> None:
    """By name, unless they are None."""
    net = build({})
    assert judged_arguments(net, IDS, {name: None})
    with pytest.raises(ValueError, match=f'segment_ids: {name} is not known'):
        judged_arguments(net, IDS, {name: torch.ones(1)})


def test_masks_of_numbers_are_refused() -> None:
    """Before anything else."""
    with pytest.raises(TypeError, match='attn_mask must be bool, got float32'):
        judged_arguments(build({'shift_tokens': 1}), IDS, {'attn_mask': torch.ones(N, N)})


# what the network is handed


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize(
    'ids', [IDS, IDS[:, :1], IDS[:1] * 0, IDS.flip(1)[:, ::2], IDS[:0]], ids=lambda t: str(tuple(t.shape))
)
def test_mask_and_positions(ids: Tensor, dtype: torch.dtype) -> None:
    """Entry by entry, for one position, nothing but padding, no row; nothing of the caller's is changed."""
    net, arguments = build({}), {'mask': None, 'return_attn': True}
    given = judged_arguments(net, ids.to(dtype), arguments)
    want = by_hand(net, ids)
    assert given.keys() == {'mask', 'return_attn', 'attn_mask', 'pos'}
    assert torch.equal(given['attn_mask'], want['attn_mask'])
    assert given['attn_mask'].dtype == torch.bool
    assert torch.equal(given['pos'], want['pos'])
    assert given['pos'].dtype == torch.int64
    assert arguments == {'mask': None, 'return_attn': True}


@pytest.mark.parametrize(
    'options', [o for o in APART if o.keys() <= {'rotary_pos_emb', 'rel_pos_bias', 'use_abs_pos_emb'} and o]
)
def test_positions_only_where_the_embedding_is_absolute(options: dict[str, Any]) -> None:
    """Relative encodings are the same anywhere in a row."""
    arguments: dict[str, Any] = {}
    assert judged_arguments(build(options), IDS, arguments).keys() == {'attn_mask'}
    assert arguments == {}


def test_a_four_token_row() -> None:
    """Worked by hand: two sequences of two."""
    given = judged_arguments(build({}), torch.tensor([[5, 5, 6, 6]]), {'attn_mask': torch.ones(4, 4).tril().bool()})
    assert given['pos'].tolist() == [[0, 1, 0, 1]]
    assert given['attn_mask'].int().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]]


def test_no_host_sync_and_no_random_numbers() -> None:
    """Not even the first time, when networks are built to compare with."""
    net, arguments = build({'use_derf': True}), {'attn_mask': torch.ones(N, N, dtype=torch.bool)}
    traits_of_example.cache_clear()
    state = torch.get_rng_state()
    with HostCopies() as copies:
        judged_arguments(net, IDS, arguments)
    assert copies.count == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('options', [{}, {'rotary_pos_emb': True, 'attn_flash': True}], ids=label)
def test_compiles_whole(options: dict[str, Any], whole_graphs: None) -> None:
    """No graph break in what is handed, nor in the network, where upstream's has none with a mask."""
    net = build({'depth': 1} | options).eval()
    x, mask = torch.randint(0, VOCABULARY, IDS.shape), torch.ones(N, N).tril().bool()

    def handed(ids: Tensor, mask: Tensor) -> dict[str, Any]:
        return judged_arguments(net, ids, {'attn_mask': mask})

    compiled = torch.compile(handed, fullgraph=True, backend='eager')(IDS, mask)
    for name, value in handed(IDS, mask).items():
        assert torch.equal(compiled[name], value)

    if 'entirely_masked.any()' in inspect.getsource(x_transformers.attend):
        pytest.skip(f'x-transformers {version("x-transformers")} reads its mask')
    whole = torch.compile(lambda x, ids: net(x, **judged_arguments(net, ids, {})), fullgraph=True, backend='eager')
    torch.testing.assert_close(whole(x, IDS), net(x, **judged_arguments(net, IDS, {})))


# flash-attn's variable-length attention, by a stand-in of its function and without x-transformers' look at the device


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, causal: bool = False,
) -> Tensor:  # fmt: skip
    """What flash_attn_varlen_func computes, (n, h, d), one sequence at a time, and what it asks for."""
    assert causal
    assert dropout_p == 0.0
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q[0] == 0
    assert cu_seqlens_q[-1] == len(q)  # what no sequence covers would be left uninitialized
    out = torch.full_like(q, float('nan'))
    for start, stop in zip(cu_seqlens_q.tolist(), cu_seqlens_q[1:].tolist(), strict=False):
        assert 0 <= stop - start <= min(max_seqlen_q, max_seqlen_k)
        here = (t[start:stop].transpose(0, 1) for t in (q, k, v))
        out[start:stop] = F.scaled_dot_product_attention(*here, is_causal=True).transpose(0, 1)
    return out


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package, and a GPU that is new enough."""

    def attend(self: Any, q: Tensor, k: Tensor, v: Tensor, flash_pack_seq_kwargs: Any, **masks: Any) -> Any:
        assert not any(mask is not None for mask in masks.values())
        assert len(q) == 1
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        out = self.flash_attn_varlen_func(q, k, v, causal=self.causal, dropout_p=0.0, **flash_pack_seq_kwargs)
        return out.transpose(0, 1)[None], x_transformers.attend.Intermediates()

    package = ModuleType('flash_attn')
    package.flash_attn_varlen_func = varlen_attention
    monkeypatch.setitem(sys.modules, 'flash_attn', package)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: (8, 0))
    monkeypatch.setattr(x_transformers.attend.Attend, 'flash_attn', attend)
    traits_of_example.cache_clear()
    yield
    traits_of_example.cache_clear()


@pytest.mark.usefixtures('flash_attn')
@pytest.mark.parametrize('row', [0, 1])
@pytest.mark.parametrize('options', [{}, {'disable_abs_pos_emb': False}, {'heads': 4, 'attn_kv_heads': 2}], ids=label)
def test_varlen_attention_is_masked_attention(options: dict[str, Any], row: int) -> None:
    """The same network with masks gives the same outputs; padding is finite."""
    net, masked = build(VARLEN | options), build({'rotary_pos_emb': True} | options)
    masked.load_state_dict(net.state_dict())
    x, ids = torch.randint(0, VOCABULARY, (1, N)), IDS[row : row + 1]
    given = judged_arguments(net, ids, {})
    assert 'attn_mask' not in given
    torch.testing.assert_close(outputs(net, x, given), outputs(masked, x, judged_arguments(masked, ids, {})))


@pytest.mark.usefixtures('flash_attn')
def test_varlen_arguments() -> None:
    """By hand: one host sync in eager mode; compiled none, but empty sequences at the end."""
    net = build(VARLEN)
    with HostCopies() as copies:
        given = judged_arguments(net, IDS[:1], {})['flash_pack_seq_kwargs']
    assert copies.count == 1
    assert given.keys() == {'cu_seqlens_q', 'cu_seqlens_k', 'max_seqlen_q', 'max_seqlen_k'}
    assert given['cu_seqlens_q'].tolist() == given['cu_seqlens_k'].tolist() == [0, 2, 6, 8, 10, 12]
    assert given['max_seqlen_q'] == given['max_seqlen_k'] == N

    compiled = torch.compile(lambda ids: judged_arguments(net, ids, {}), fullgraph=True, backend='eager')
    assert compiled(IDS[:1])['flash_pack_seq_kwargs']['cu_seqlens_q'].tolist() == [0, 2, 6, 8, 10] + [12] * 8


@pytest.mark.usefixtures('flash_attn')
def test_varlen_attention_takes_one_row_and_no_masks() -> None:
    """As x-transformers, whose own checks are asserts; and what it would compute wrongly."""
    net, mask = build(VARLEN), torch.ones(1, N, dtype=torch.bool)
    with pytest.raises(ValueError, match='segment_ids: attn_flash_pack_seq on 2 rows instead of one'):
        judged_arguments(net, IDS, {})
    for name in ('mask', 'self_attn_kv_mask', 'attn_mask', 'context'):
        with pytest.raises(ValueError, match=f'segment_ids: {name} beside attn_flash_pack_seq'):
            judged_arguments(net, IDS[:1], {name: mask})
    with pytest.raises(ValueError, match='segment_ids: attn_add_zero_kv beside attn_flash_pack_seq'):
        judged_arguments(build(VARLEN | {'attn_add_zero_kv': True}), IDS[:1], {})
    net.attn_layers.layers[0][1].attend.flash_pack_seq = False
    with pytest.raises(ValueError, match='segment_ids: attn_flash_pack_seq in some layers only'):
        judged_arguments(net, IDS[:1], {})
    assert judged_arguments(build(VARLEN | {'attn_flash': False}), IDS, {}).keys() == {'attn_mask'}


RAGGED = torch.arange(5) < torch.tensor([[5], [1], [4], [0]])
PADDED = {
    'right': (RAGGED, {'lens': RAGGED.sum(dim=1)}),
    'left': (RAGGED.flip(1), {'seq_start_pos': 5 - RAGGED.sum(dim=1)}),
    'none': (torch.ones(4, 5).bool(), {'lens': torch.full((4,), 5)}),
    'all but a sequence': (RAGGED & (torch.arange(4) == 0)[:, None], {'lens': torch.tensor([5, 0, 0, 0])}),
}


@pytest.mark.usefixtures('flash_attn')
@pytest.mark.parametrize('padding', PADDED)
def test_varlen_attention_reads_a_padded_batch_as_one_row(padding: str) -> None:
    """With `unpad`: one row of all real tokens, at the loss of the rows alone."""
    net, masked = build(VARLEN).double(), build({'rotary_pos_emb': True}).double()
    masked.load_state_dict(net.state_dict())
    for attend in masked.modules():
        if isinstance(attend, Attend):
            attend.attn_fn = partial(F.softmax, dim=-1)  # x-transformers takes it in float32, whatever the network
    (real, told), x = PADDED[padding], torch.randint(0, VOCABULARY, (4, 5))
    read: list[torch.Size] = []
    net.attn_layers.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[:2]))
    wrapper = AutoregressiveWrapper(net, unpad=True, trust_segments=True)  # a hook on all layers cannot be asked
    loss = wrapper(x, **told)
    assert read == [(1, real.sum())]

    rows = [row[here][None] for row, here in zip(x, real, strict=True) if here.sum() > 1]
    costs = [F.cross_entropy(masked(row[:, :-1])[0], row[0, 1:], reduction='none') for row in rows]
    want = torch.cat(costs).mean()
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=0)
    assert_same_gradients(gradients(loss, net), gradients(want, masked), 1e-9)


@pytest.mark.usefixtures('flash_attn')
@pytest.mark.parametrize('lens', [1, 5])
def test_one_row_has_no_absolute_positions(lens: int) -> None:
    """It may be longer than the network's embedding, so that it is refused, however short it is."""
    wrapper = AutoregressiveWrapper(build(VARLEN | {'disable_abs_pos_emb': False}), unpad=True, trust_segments=True)
    call = {'x': torch.ones(2, 5).long(), 'lens': torch.full((2,), lens)}
    for method in (wrapper, wrapper.loss_normalizer):
        with pytest.raises(ValueError, match=r'^unpad=True: attn_flash_pack_seq beside an absolute embedding'):
            method(**call)


VARLEN_NOTHING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'nothing is real': ({'unpad': True}, {'x': torch.ones(4, 5).long(), 'lens': torch.zeros(4).long()}),
    'no rows': ({'unpad': True}, {'x': torch.ones(0, 5).long(), 'lens': torch.zeros(0).long()}),
    'no packed row': ({}, {'x': torch.ones(0, 5).long(), 'segment_ids': torch.ones(0, 5).long()}),
}


@pytest.mark.usefixtures('flash_attn')
@pytest.mark.parametrize('nothing', VARLEN_NOTHING)
def test_varlen_attention_of_nothing(nothing: str) -> None:
    """The loss is 0, with a gradient of 0 for each parameter that rows reach."""
    net, (options, call) = build(VARLEN), VARLEN_NOTHING[nothing]
    wrapper = AutoregressiveWrapper(net, **options)
    usual = gradients(wrapper(torch.ones(1, 5).long(), segment_ids=torch.ones(1, 5).long()), wrapper)
    loss = wrapper(**call)
    found = gradients(loss, wrapper)
    assert loss.item() == 0
    assert found.keys() == usual.keys()
    assert not any(grad.any() for grad in found.values())
