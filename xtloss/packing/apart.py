"""Which networks keep the sequences of a row apart, when they are handed what `segment_arguments` makes."""

from __future__ import annotations

import inspect
from functools import cache, partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from x_transformers.attend import Attend
from x_transformers.x_transformers import (
    AbsolutePositionalEmbedding,
    Attention,
    AttentionLayers,
    Decoder,
    DynamicPositionBias,
    FeedForward,
    RelativePositionBias,
    TransformerWrapper,
)

from xtloss.tracing import constant

# options of x-transformers under which no sequence moves another: tests/test_segments.py proves each of these networks
# fmt: off
APART: tuple[dict[str, Any], ...] = (
    {}, {'attn_flash': True, 'attn_flash_pack_seq': True, 'rotary_pos_emb': True},
    *({option: True} for option in """
        rotary_pos_emb attn_flash use_rmsnorm ff_glu attn_qk_norm tie_embedding rotary_xpos alibi_pos_bias rel_pos_bias
        polar_pos_emb attn_data_dependent_alibi attn_use_rel_proj_pos_bias attn_use_cope use_simple_rmsnorm
        use_scalenorm use_dynamic_tanh use_derf use_adaptive_layernorm use_adaptive_rmsnorm use_adaptive_layerscale
        use_layerscale sandwich_norm pre_and_post_norm softclamp_output residual_attn gate_residual scale_residual
        depth_scale_residual zero_init_branch_output unet_skips integrate_layers reinject_input add_value_residual
        only_attn macaron weight_tie_layers cross_attend attn_onnxable attn_qk_rmsnorm attn_k_rmsnorm
        attn_value_rmsnorm attn_pre_talking_heads attn_post_talking_heads attn_pre_scale_post_talking_heads
        attn_head_scale attn_on_attn attn_gate_values attn_gate_value_heads attn_output_gate attn_hard
        attn_l2_distance attn_sigmoid attn_gumbel_softmax attn_cog_signed attn_one_kv_head attn_add_zero_kv
        attn_head_learned_sink attn_softclamp_logits attn_laser ff_swish ff_relu_squared ff_solu ff_post_act_ln
        ff_no_bias post_emb_norm l2norm_embed recycling mixture_of_softmax sigsoftmax_logits ff_deep_embed
        add_continuous_pred_head input_not_include_cache
    """.split()),
    {'use_abs_pos_emb': False}, {'max_seq_len': 0}, {'rotary_pos_emb': True, 'disable_abs_pos_emb': False},
    {'rotary_pos_emb': True, 'rotary_interpolation_factor': 2.0}, {'rotary_pos_emb': True, 'rotate_num_heads': 1},
    {'alibi_pos_bias': True, 'alibi_num_heads': 1}, {'alibi_pos_bias': True, 'use_abs_pos_emb': False},
    {'dynamic_pos_bias': True, 'use_abs_pos_emb': False, 'dynamic_pos_bias_norm': True},
    {'dynamic_pos_bias': True, 'use_abs_pos_emb': False, 'dynamic_pos_bias_log_distance': True},
    {'attn_data_dependent_alibi': True, 'attn_data_dependent_alibi_per_row': True},
    {'attn_use_cope': True, 'attn_cope_talking_heads': True}, {'attn_max_attend_past': 1}, {'attn_max_attend_past': 2},
    {'pre_norm': False}, {'pre_norm_has_final_norm': False}, {'norm_add_unit_offset': False},
    {'use_layerscale': True, 'norm_add_unit_offset': False}, {'use_rmsnorm': True, 'norm_add_unit_offset': False},
    {'use_scalenorm': True, 'norm_add_unit_offset': False}, {'use_dynamic_tanh': True, 'norm_add_unit_offset': False},
    {'use_derf': True, 'norm_add_unit_offset': False}, {'gate_residual': True, 'scale_residual': True},
    {'use_adaptive_layernorm': True, 'adaptive_condition_mlp': True},
    {'scale_residual': 0.5}, {'scale_residual_constant': 0.5}, {'depth_scale_residual': 0.5},
    {'num_residual_streams': 2}, {'num_residual_streams': 2, 'qkv_receive_diff_residuals': True},
    {'num_residual_streams': 2, 'gated_multi_residual': True, 'residual_fn_kwargs': {'read_gate_rank': 4}},
    {'attn_aggregated_residuals': True, 'dim': 80},
    {'integrate_layers': True, 'layer_integrate_use_softmax': False},
    {'reinject_input': True, 'learned_reinject_input_gate': True},
    {'add_value_residual': True, 'learned_value_residual_mix': False},
    {'depth': 1}, {'depth': 1, 'cross_attend': True}, {'depth': 4, 'par_ratio': 2}, {'sandwich_coef': 1},
    {'custom_layers': ('a', 'f', 'f', 'a')}, {'layers_execute_order': (0, 1, 0, 1, 2, 3)}, {'layer_dropout': 0.2},
    {'heads': 1, 'attn_dim_head': 16}, {'heads': 4, 'attn_kv_heads': 2}, {'attn_value_dim_head': 4},
    {'attn_sparse_topk': 1}, {'attn_sparse_topk': 2},
    {'attn_sparse_topk': 2, 'attn_sparse_topk_straight_through': True},
    {'attn_gumbel_softmax': True, 'attn_gumbel_softmax_hard': False, 'attn_gumbel_softmax_temp': 2.0},
    {'attn_qk_norm': True, 'attn_qk_norm_groups': 2}, {'attn_qk_norm': True, 'attn_qk_norm_dim_scale': True},
    {'attn_gate_values': True, 'attn_swiglu_values': True}, {'attn_gate_values': True, 'attn_gate_values_rank': 4},
    {'attn_gate_values': True, 'attn_gate_values_headwise': True},
    {'attn_output_gate': True, 'attn_output_gate_headwise': True},
    {'attn_output_gate': True, 'attn_output_gate_rank': 4, 'attn_low_rank_silu_gates': False},
    {'attn_use_latent_q': True, 'attn_dim_latent_q': 8}, {'attn_use_latent_kv': True, 'attn_dim_latent_kv': 8},
    {'attn_use_latent_kv': True, 'attn_dim_latent_kv': 8, 'attn_latent_rope_subheads': 1, 'rotary_pos_emb': True},
    {'cross_attend': True, 'only_cross': True}, {'cross_attend': True, 'cross_residual_attn': True},
    {'cross_attend': True, 'cross_attn_dim_context': 12}, {'cross_attend': True, 'cross_attn_tokens_dropout': 0.2},
    {'ff_glu': True, 'ff_glu_mult_bias': True}, {'ff_glu': True, 'ff_glu_softclamp': True},
    {'ff_glu': True, 'ff_swish': True, 'ff_glu_softclamp': True}, {'ff_softclamp_value': 2.0},
    {'ff_custom_activation': nn.ReLU()}, {'ff_custom_activation': nn.Tanh()},
    {'emb_dropout': 0.2}, {'attn_dropout': 0.2, 'ff_dropout': 0.2},
    {'attn_sublayer_dropout': 0.2, 'ff_sublayer_dropout': 0.2},
    {'emb_dim': 8}, {'emb_frac_gradient': 0.1}, {'embed_num_tokens': {'kind': 3}},
    {'max_mem_len': 4, 'shift_mem_down': 1}, {'looped': True, 'pre_and_post_norm': True},
)
# fmt: on


class Verdict(NamedTuple):
    """Whether a network keeps sequences apart, and by what."""

    reason: str | None  # the option that is not known to, if there is one
    varlen: bool  # by flash-attn's variable-length function, else by masks


_verdicts: WeakKeyDictionary[nn.Module, tuple[int, Verdict]] = WeakKeyDictionary()


@constant
def verdict(net: nn.Module) -> Verdict:
    """Judge a network, anew whenever an attribute of one of its modules has been set to something else."""
    state = hash(tuple(id(value) for module in net.modules() for value in (type(module), *vars(module).values())))
    if net not in _verdicts or _verdicts[net][0] != state:
        varlen = any(uses_varlen(module) for module in net.modules() if isinstance(module, Attend))
        _verdicts[net] = state, Verdict(why_not_option(net) or why_not_together(net), varlen)
    return _verdicts[net][1]


def uses_varlen(attend: Attend) -> bool:
    """Whether it calls `flash_attn_varlen_func`."""
    return bool(attend.flash and attend.flash_pack_seq)


def why_not_option(net: nn.Module) -> str | None:
    """Return the option of a network that is not known to keep sequences apart; None if there is none.

    A whitelist: every trait of the network must be one of a network in `APART`, built here and now. So what a later
    release of x-transformers adds is refused as soon as it is switched on, and so are modules that are not its own.
    """
    if not isinstance(net, TransformerWrapper):
        return f'a {type(net).__name__} instead of a TransformerWrapper'

    strange = traits(net)
    for index in range(len(APART)):
        strange = {trait: path for trait, path in strange.items() if trait not in traits_of_example(index)}
        if not strange:
            return None

    for trait in strange:
        if option := option_of(trait):
            return option
    trait, path = next(iter(strange.items()))
    return ' '.join(filter(None, [path or 'the network', trait.owner.__qualname__, trait.attribute]))


def why_not_together(net: Any) -> str | None:
    """Return which options of a network are apart each, but not together; None if there are none."""
    layers, rotary = net.attn_layers, net.attn_layers.rotary_pos_emb
    absolute = isinstance(net.pos_emb, AbsolutePositionalEmbedding)  # its positions go to every other encoding too
    attentions = [module for module in net.modules() if isinstance(module, Attention)]
    attends = [attention.attend for attention in attentions]
    across = [attention for attention in attentions if not attention.causal]  # their keys have no place in the row
    clashes = {
        'polar_pos_emb beside an absolute embedding': absolute and layers.polar_pos_emb is not None,
        'rel_pos_bias beside an absolute embedding': absolute and isinstance(layers.rel_pos, RelativePositionBias),
        'dynamic_pos_bias beside an absolute embedding': absolute and isinstance(layers.rel_pos, DynamicPositionBias),
        'attn_use_cope beside rotary_pos_emb': rotary is not None and any(m.cope is not None for m in attends),
        'attn_l2_distance beside rotary_xpos': (
            rotary is not None and rotary.scale is not None and any(m.l2_distance for m in attends)
        ),
        'attn_max_attend_past beside cross_attend': any(m.max_attend_past is not None for m in across),
        'attn_use_rel_proj_pos_bias beside cross_attend': any(
            getattr(m, 'rel_proj_pos_bias', None) is not None for m in across
        ),
        'attn_flash_pack_seq in some layers only': len({uses_varlen(m) for m in attends}) > 1,
        'attn_add_zero_kv beside attn_flash_pack_seq': any(uses_varlen(m) and m.add_zero_kv for m in attends),
    }
    return next((options for options, clash in clashes.items() if clash), None)


class Trait(NamedTuple):
    """What may set one network apart from another: the class of a module, or the value of one of its attributes."""

    owner: type
    attribute: str = ''
    value: str = ''


@cache
def traits_of_example(index: int) -> frozenset[Trait]:
    """Return the traits of a network in `APART`; none if this x-transformers, or this machine, cannot build it."""
    sizes = {'num_tokens': 8, 'max_seq_len': 8, 'dim': 16, 'depth': 2, 'heads': 2, 'attn_dim_head': 8}
    arguments: dict[str, Any] = sizes | {'verbose': False} | APART[index]
    of_wrapper = arguments.keys() & inspect.signature(TransformerWrapper).parameters
    wrapper = {name: arguments.pop(name) for name in of_wrapper}
    try:
        with torch.device('meta'):  # which draws no random numbers
            return frozenset(traits(TransformerWrapper(attn_layers=Decoder(**arguments), **wrapper)))
    except (AssertionError, ImportError, RuntimeError, TypeError):
        return frozenset()


def traits(net: nn.Module) -> dict[Trait, str]:
    """Return the traits of a network, with the path of the first module that has each. Weights and sizes are none."""
    found: dict[Trait, str] = {}
    for path, module in net.named_modules():
        owner = next(cls for cls in type(module).__mro__ if 'forward' in vars(cls))  # FSDP makes subclasses
        children = {} if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) else module._modules
        found.setdefault(Trait(owner), path)
        for attribute, value in {**vars(module), **module._parameters, **children}.items():
            if not attribute.startswith('_') and attribute != 'training':
                for description in describe(value):
                    found.setdefault(Trait(owner, attribute, description), path)
    return found


def describe(value: Any) -> list[str]:
    """Say what a value is, part by part. Numbers are alike, but for 0 and 1, which tend to mean off, and below 0."""
    if value is None or isinstance(value, bool | str):
        return [repr(value)]
    if isinstance(value, int | float):
        return ['a number' if value > 0 and value != 1 else f'{value:g}']
    if isinstance(value, tuple | list):
        return [part for element in value for part in describe(element)] or ['empty']
    if isinstance(value, dict):
        return [f'{key}: {part}' for key, element in value.items() for part in describe(element)] or ['empty']
    if isinstance(value, partial):
        return describe([value.func, value.args, value.keywords])
    if isinstance(value, Tensor | nn.Module):
        return ['a tensor' if isinstance(value, Tensor) else 'a module']
    named = value if hasattr(value, '__qualname__') else type(value)
    return [f'{named.__module__}.{named.__qualname__}']


# the options whose traits are called otherwise, and what an option is called before its class gets it
OPTIONS = {
    'ShiftTokens': 'shift_tokens',
    'MVSplitResidualUpdate': 'mv_split_residual',
    'OrthogonalResidualUpdate': 'orthog_residual',
    'ScaledSinusoidalEmbedding': 'scaled_sinu_pos_emb',
    'cls_token': 'use_cls_token',
    'attn_fn': 'attn_custom_attn_fn',
}
PREFIXES = {TransformerWrapper: '', AttentionLayers: '', Attention: 'attn_', Attend: 'attn_', FeedForward: 'ff_'}


def option_of(trait: Trait) -> str | None:
    """Return what x-transformers' constructors call the option that leaves this trait, where that is known."""
    name, prefix = trait.attribute or trait.owner.__name__, PREFIXES.get(trait.owner)
    if prefix is not None and name in inspect.signature(trait.owner).parameters:
        return prefix + name
    return OPTIONS.get(name)
