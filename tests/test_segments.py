"""Sequences in one row do not see each other: what the network is handed, and each option that heeds it."""

import inspect
import sys
from functools import partial
from importlib.metadata import version
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import x_transformers.attend
from networks import HostCopies, assert_same_gradients, gradients
from test_nothing_counted import assert_nothing
from torch import Tensor, nn
from x_transformers import Decoder, TransformerWrapper
from x_transformers.attend import Attend
from x_transformers.x_transformers import Attention, AttentionLayers, FeedForward

from xtloss import AutoregressiveWrapper, segment_leak
from xtloss.wrappers.masks import segment_arguments

# an id that returns is another sequence; padding before, behind, none
IDS = torch.tensor([[0, 0, 7, 7, 7, 7, 3, 3, 7, 7, 2, 2], [4, 4, 4, 4, 4, 4, 4, 9, 9, 0, 0, 0]])
VOCABULARY, WIDTH = 13, 16
VARLEN = {'attn_flash': True, 'attn_flash_pack_seq': True, 'rotary_pos_emb': True}

# options of x-transformers under which no sequence of a row moves another
# fmt: off
APART: list[dict[str, Any]] = [
    {},
    *({option: True} for option in """
        rotary_pos_emb attn_flash use_rmsnorm ff_glu attn_qk_norm tie_embedding rotary_xpos alibi_pos_bias rel_pos_bias
        polar_pos_emb attn_data_dependent_alibi attn_use_rel_proj_pos_bias attn_use_cope use_simple_rmsnorm
        use_scalenorm use_dynamic_tanh use_derf use_adaptive_layernorm use_adaptive_rmsnorm use_adaptive_layerscale
        use_layerscale sandwich_norm pre_and_post_norm softclamp_output residual_attn gate_residual scale_residual
        depth_scale_residual zero_init_branch_output unet_skips integrate_layers reinject_input add_value_residual
        only_attn macaron weight_tie_layers cross_attend attn_onnxable attn_qk_rmsnorm attn_k_rmsnorm
        attn_value_rmsnorm attn_pre_talking_heads attn_post_talking_heads attn_pre_scale_post_talking_heads
        attn_head_scale attn_on_attn attn_gate_values attn_gate_value_heads attn_output_gate attn_hard
        attn_l2_distance attn_sigmoid attn_cog_signed attn_one_kv_head attn_add_zero_kv
        attn_head_learned_sink attn_softclamp_logits attn_laser ff_swish ff_relu_squared ff_solu ff_post_act_ln
        ff_no_bias post_emb_norm l2norm_embed recycling mixture_of_softmax sigsoftmax_logits ff_deep_embed
        add_continuous_pred_head input_not_include_cache
    """.split()),
    {'use_abs_pos_emb': False}, {'max_seq_len': 0}, {'rotary_pos_emb': True, 'disable_abs_pos_emb': False},
    {'dynamic_pos_bias': True, 'use_abs_pos_emb': False, 'dynamic_pos_bias_norm': True},
    {'attn_use_cope': True, 'attn_cope_talking_heads': True}, {'attn_max_attend_past': 1}, {'attn_max_attend_past': 2},
    {'pre_norm': False}, {'pre_norm_has_final_norm': False}, {'norm_add_unit_offset': False},
    {'use_adaptive_layernorm': True, 'adaptive_condition_mlp': True}, {'num_residual_streams': 2},
    {'num_residual_streams': 2, 'gated_multi_residual': True, 'residual_fn_kwargs': {'read_gate_rank': 4}},
    {'attn_aggregated_residuals': True, 'dim': 80}, {'reinject_input': True, 'learned_reinject_input_gate': True},
    {'depth': 1, 'cross_attend': True}, {'depth': 4, 'par_ratio': 2}, {'sandwich_coef': 1},
    {'custom_layers': ('a', 'f', 'f', 'a')}, {'layers_execute_order': (0, 1, 0, 1, 2, 3)}, {'layer_dropout': 0.2},
    {'heads': 1, 'attn_dim_head': 16}, {'heads': 4, 'attn_kv_heads': 2}, {'attn_value_dim_head': 4},
    {'attn_sparse_topk': 2, 'attn_sparse_topk_straight_through': True},
    {'attn_qk_norm': True, 'attn_qk_norm_groups': 2}, {'attn_gate_values': True, 'attn_swiglu_values': True},
    {'attn_use_latent_q': True, 'attn_dim_latent_q': 8},
    {'attn_use_latent_kv': True, 'attn_dim_latent_kv': 8, 'attn_latent_rope_subheads': 1, 'rotary_pos_emb': True},
    {'cross_attend': True, 'only_cross': True}, {'cross_attend': True, 'cross_attn_dim_context': 12},
    {'ff_glu': True, 'ff_glu_mult_bias': True}, {'ff_custom_activation': nn.Tanh()},
    {'emb_dropout': 0.2}, {'attn_dropout': 0.2, 'ff_dropout': 0.2}, {'emb_dim': 8}, {'embed_num_tokens': {'kind': 3}},
    {'max_mem_len': 4, 'shift_mem_down': 1}, {'looped': True, 'pre_and_post_norm': True},
]

# by masks and positions alone one sequence moves another, or is another where it lies elsewhere in the row
MOVES: list[dict[str, Any]] = [
    *({option: True} for option in """
        scaled_sinu_pos_emb attn_selective attn_orthog_projected_values attn_orthog_projected_values_per_head
        orthog_residual mv_split_residual attn_gumbel_softmax
    """.split()),  # the last of which is random in evaluation
    {'attn_hybrid_module': nn.GRU(WIDTH, WIDTH, batch_first=True), 'attn_hybrid_fold_axial_dim': 1},
    {'shift_tokens': 1}, {'polar_pos_emb': True, 'disable_abs_pos_emb': False},
    {'attn_use_cope': True, 'rotary_pos_emb': True}, {'attn_l2_distance': True, 'rotary_xpos': True},
    {'cross_attend': True, 'cross_attn_inverted_attention': True},
    {'cross_attend': True, 'attn_max_attend_past': 2}, {'cross_attend': True, 'attn_use_rel_proj_pos_bias': True},
    {'attn_custom_attn_fn': lambda sim: sim.softmax(dim=-2)}, {'ff_custom_activation': nn.Softmax(dim=-2)},
]
# masks of (b, 1, n, n) do not fit, positions of (b, n) are not taken, or outputs belong to no token
BREAKS: list[dict[str, Any]] = [
    {'num_memory_tokens': 2}, {'attn_num_mem_kv': 2}, {'use_cls_token': True}, {'average_pool_embed': True},
    {'rel_pos_bias': True, 'disable_abs_pos_emb': False}, {'dynamic_pos_bias': True}, {'attn_pool': True},
    {'cross_attend': True, 'attn_data_dependent_alibi': True}, {'num_output_heads': 2},
    {'to_logits': nn.Conv1d(1, 1, 3)}, {'token_emb': nn.EmbeddingBag(VOCABULARY, WIDTH)},
]
# fmt: on


def lacking(options: dict[str, Any]) -> list[str]:
    """The options that this release of x-transformers does not know."""
    known = set(inspect.signature(TransformerWrapper).parameters)
    prefixes = {'': AttentionLayers, 'attn_': Attention, 'cross_attn_': Attention, 'ff_': FeedForward}
    for prefix, module in prefixes.items():
        known |= {prefix + name for name in inspect.signature(module).parameters}
    return [name for name in options if name not in known]


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


def runs(ids: Tensor) -> list[list[tuple[int, int]]]:
    """Where the runs of equal ids of each row start and stop."""
    rows = []
    for row in ids.tolist():
        starts = [i for i in range(len(row)) if i == 0 or row[i] != row[i - 1]]
        rows.append(list(zip(starts, [*starts[1:], len(row)], strict=True)))
    return rows


def by_run(ids: Tensor) -> Tensor:
    """(b, n) int64: how far each position is from where its run starts."""
    rows = [[i - start for start, stop in spans for i in range(start, stop)] for spans in runs(ids)]
    return torch.tensor(rows, dtype=torch.int64).view(ids.shape)


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


def packed_and_alone(net: TransformerWrapper, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The loss of packed rows, and of each sequence alone, over the same normalizer."""
    wrapper, x = AutoregressiveWrapper(net.eval()), torch.randint(0, VOCABULARY, IDS.shape)
    z = wrapper.loss_normalizer(x, segment_ids=IDS, **arguments)
    losses = [
        wrapper(x[row : row + 1, start:stop], normalizer=z, **alone(arguments, row, slice(start, stop)))
        for row, spans in enumerate(runs(IDS))
        for start, stop in spans
        if IDS[row, start] != 0
    ]
    return wrapper(x, segment_ids=IDS, **arguments), torch.stack(losses).sum()


# networks

B, N = IDS.shape
draw = torch.Generator().manual_seed(0)
KEYS = torch.rand(B, N, generator=draw) < 0.7
PAIRS = (torch.rand(B, 2, N, N, generator=draw) < 0.7) | torch.eye(N, dtype=torch.bool)
EMBEDS = torch.randn(B, N, WIDTH, generator=draw)

# hide all keys up to a position: its sequence's later ones, and other sequences, stay out of sight all the same
UNSEEING: list[dict[str, Any]] = [
    {'self_attn_kv_mask': by_run(IDS) > 1},
    {'attn_mask': (torch.arange(N) % 4 > 0).expand(N, N)},
]
ARGUMENTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *((options, given) for options in ({}, {'attn_flash': True}, {'attn_sigmoid': True}) for given in UNSEEING),
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
    ({'use_adaptive_rmsnorm': True}, {'condition': EMBEDS}),
    ({'looped': True, 'pre_and_post_norm': True}, {'looped_steps': 2}),
    ({}, {'attn_z_loss_weight': 0.5}),
]


CASES = [(options, {}) for options in APART] + ARGUMENTS


@pytest.mark.parametrize(('options', 'given'), CASES, ids='-'.join)
def test_options_that_keep_sequences_apart(options: dict[str, Any], given: dict[str, Any]) -> None:
    """What is measured is rounding, and the loss of packed rows is that of each sequence alone.

    With arguments of the network too: masks are joined, whatever their shape, the rest passes through.
    """
    net = build(options)
    arguments = needed(net) | given
    assert segment_leak(net, **arguments) < 1e-4
    tolerance = 1e-4 if 'looped' in options else 1e-5
    torch.testing.assert_close(*packed_and_alone(net, arguments), rtol=tolerance, atol=0)


@pytest.mark.parametrize('options', MOVES + BREAKS, ids='-'.join)
def test_options_that_do_not(options: dict[str, Any]) -> None:
    """They are refused; inf where masks, positions or outputs do not fit."""
    net = build(options)
    arguments = needed(net)
    assert segment_leak(net, **arguments) > 1e-2
    assert (segment_leak(net, **arguments) == float('inf')) == (options in BREAKS)
    if not getattr(net, 'has_multiple_heads', False):
        with pytest.raises(ValueError, match=r'^segment_ids: .* options of the table in the README'):
            AutoregressiveWrapper(net)(IDS, segment_ids=IDS, **arguments)


# what the network is handed


@pytest.mark.parametrize(
    'options', [{}, {'rotary_pos_emb': True}, {'rel_pos_bias': True}, {'use_abs_pos_emb': False}], ids='-'.join
)
@pytest.mark.parametrize(
    'ids', [IDS, IDS[:, :1], IDS[:1] * 0, IDS.flip(1)[:, ::2], IDS[:0]], ids=lambda t: str(tuple(t.shape))
)
def test_mask_and_positions(ids: Tensor, options: dict[str, Any]) -> None:
    """Entry by entry, for one position, nothing but padding, no row, without host sync; positions only if absolute."""
    net, arguments = build(options), {'mask': None, 'return_attn': True}
    attn_mask = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    for row, spans in enumerate(runs(ids)):
        for start, stop in spans:
            for i in range(start, stop):
                attn_mask[row, 0, i, start : i + 1] = True
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        with HostCopies() as copies:
            given = segment_arguments(net, ids.to(dtype), arguments)
        assert copies.count == 0
        assert torch.equal(given.pop('attn_mask'), attn_mask)
        if not options:
            torch.testing.assert_close(given.pop('pos'), by_run(ids), rtol=0, atol=0)
        assert given == arguments == {'mask': None, 'return_attn': True}  # nothing of the caller's is changed


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
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, and a GPU that is new enough."""
    released = Attend.flash_attn

    def attend(self: Any, q: Tensor, k: Tensor, v: Tensor, flash_pack_seq_kwargs: Any, **masks: Any) -> Any:
        if not self.flash_pack_seq:
            return released(self, q, k, v, **masks)
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


@pytest.mark.usefixtures('flash_attn')
def test_varlen_arguments() -> None:
    """By hand: one host sync in eager mode; compiled none, but empty sequences at the end."""
    net = build(VARLEN)
    with HostCopies() as copies:
        given = segment_arguments(net, IDS[:1], {})['flash_pack_seq_kwargs']
    assert copies.count == 1
    assert given.keys() == {'cu_seqlens_q', 'cu_seqlens_k', 'max_seqlen_q', 'max_seqlen_k'}
    assert given['cu_seqlens_q'].tolist() == given['cu_seqlens_k'].tolist() == [0, 2, 6, 8, 10, 12]
    assert given['max_seqlen_q'] == given['max_seqlen_k'] == N

    compiled = torch.compile(lambda ids: segment_arguments(net, ids, {}), fullgraph=True, backend='eager')
    assert compiled(IDS[:1])['flash_pack_seq_kwargs']['cu_seqlens_q'].tolist() == [0, 2, 6, 8, 10] + [12] * 8


@pytest.mark.usefixtures('flash_attn')
def test_varlen_attention_takes_one_row_and_no_masks() -> None:
    """As x-transformers, whose own checks are asserts; and what it would compute wrongly."""
    net, mask = build(VARLEN), torch.ones(1, N, dtype=torch.bool)
    with pytest.raises(
        ValueError, match='a network built with attn_flash_pack_seq takes segment_ids of one row, got 2'
    ):
        segment_arguments(net, IDS, {})
    for name in ('mask', 'self_attn_kv_mask', 'attn_mask', 'context'):
        assert segment_leak(net, **{name: mask}) == float('inf')
    assert segment_leak(build(VARLEN | {'attn_add_zero_kv': True})) > 1e-2
    net.attn_layers.layers[0][1].attend.flash_pack_seq = False
    assert segment_leak(net) > 1e-2
    assert segment_arguments(build(VARLEN | {'attn_flash': False}), IDS, {}).keys() == {'attn_mask'}
    absolute = AutoregressiveWrapper(build(VARLEN | {'disable_abs_pos_emb': False}), unpad=True)
    with pytest.raises(ValueError, match=r'^unpad=True: a row of all tokens may be longer than the absolute embedding'):
        absolute(IDS, lens=torch.tensor([3, 4]))


RAGGED = torch.arange(5) < torch.tensor([[5], [1], [4], [0]])
ONE_ROW: dict[str, tuple[Tensor, dict[str, Any]]] = {  # the sequences, by ids, and what is told of them
    'right': (RAGGED, {'lens': RAGGED.sum(dim=1)}),
    'left': (RAGGED.flip(1), {'seq_start_pos': 5 - RAGGED.sum(dim=1)}),
    'none': (torch.ones(4, 5), {'lens': torch.full((4,), 5)}),
    'all but a sequence': (RAGGED & (torch.arange(4) == 0)[:, None], {'lens': torch.tensor([5, 0, 0, 0])}),
    'packed': (IDS[:1], {'segment_ids': IDS[:1]}),
    'padding behind': (IDS[1:], {'segment_ids': IDS[1:]}),
}


CASES_OF_ONE_ROW = [(rows, options) for rows in ONE_ROW for options in ({}, {'heads': 4, 'attn_kv_heads': 2})]
CASES_OF_ONE_ROW += [('packed', {'disable_abs_pos_emb': False})]


@pytest.mark.usefixtures('flash_attn')
@pytest.mark.parametrize(('rows', 'options'), CASES_OF_ONE_ROW, ids=str)
def test_varlen_attention_of_one_row(rows: str, options: dict[str, Any]) -> None:
    """Packed, or made by `unpad` of all real tokens: its sequences cost what they cost alone, with masks."""
    net, masked = build(VARLEN | options).double(), build({'rotary_pos_emb': True} | options).double()
    masked.load_state_dict(net.state_dict())
    for attend in masked.modules():
        if isinstance(attend, Attend):
            attend.attn_fn = partial(F.softmax, dim=-1)  # x-transformers takes it in float32, whatever the network
    (ids, told), read = ONE_ROW[rows], []
    net.attn_layers.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[:2]))
    wrapper = AutoregressiveWrapper(net, unpad=True, trust_segments=True)  # which reads no other rows
    x = torch.randint(0, VOCABULARY, ids.shape)
    loss = wrapper(x, **told)
    assert read == [(1, ids.numel() if 'segment_ids' in told else ids.sum())]

    parts = [x[row : row + 1, i:j] for row, spans in enumerate(runs(ids)) for i, j in spans if ids[row, i] != 0]
    costs = [F.cross_entropy(masked(t[:, :-1])[0], t[0, 1:], reduction='none') for t in parts if t.shape[1] > 1]
    want = torch.cat(costs).mean()
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=0)
    assert_same_gradients(gradients(loss, net), gradients(want, masked), 1e-9)
    assert segment_leak(net) < 1e-4


@pytest.mark.usefixtures('flash_attn')
@pytest.mark.parametrize(('name', 'rows'), [('lens', 4), ('lens', 0), ('segment_ids', 0)])
def test_varlen_attention_of_nothing(name: str, rows: int) -> None:
    """Nothing is real, no row, and no packed one."""
    wrapper, usual = AutoregressiveWrapper(build(VARLEN), unpad=name == 'lens'), torch.ones(1, 5).long()
    told = torch.zeros(rows).long() if name == 'lens' else torch.zeros(rows, 5).long()
    assert_nothing(wrapper, {'x': usual, 'segment_ids': usual}, {'x': usual.expand(rows, 5), name: told}, 4)
