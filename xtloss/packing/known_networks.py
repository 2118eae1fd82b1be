"""The networks of x-transformers that are proven to keep the sequences of a row apart, and what is not like them.

The list is kept because it names what it refuses, costs no forward, and holds where weights are sharded or have no
values; what it cannot know, because it is not x-transformers' own, is asked (`xtloss.packing.verdict`).
"""

from __future__ import annotations

import ast
import inspect
import sys
from contextlib import suppress
from functools import cache, partial
from typing import Any, NamedTuple

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

from xtloss.packing.experiment import bare, neutral

LIBRARIES = ('x_transformers', 'torch.nn.modules', 'einops', 'torch_einops_utils')  # what those networks are made of

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


def why_not_together(net: Any, layers: Any) -> str | None:
    """Return which options of a network are apart each, but not together; None if there are none."""
    rotary, rel_pos = bare(layers.rotary_pos_emb), bare(layers.rel_pos)
    absolute = isinstance(bare(net.pos_emb), AbsolutePositionalEmbedding)  # whose positions go to other encodings too
    attentions = [module for module in net.modules() if isinstance(module, Attention)]
    attends = [attention.attend for attention in attentions]
    across = [attention for attention in attentions if not attention.causal]  # their keys have no place in the row
    clashes = {
        'polar_pos_emb beside an absolute embedding': absolute and layers.polar_pos_emb is not None,
        'rel_pos_bias beside an absolute embedding': absolute and isinstance(rel_pos, RelativePositionBias),
        'dynamic_pos_bias beside an absolute embedding': absolute and isinstance(rel_pos, DynamicPositionBias),
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


def uses_varlen(attend: Attend) -> bool:
    """Whether it calls `flash_attn_varlen_func`."""
    return bool(attend.flash and attend.flash_pack_seq)


class Trait(NamedTuple):
    """What may set one network apart from another: the class of a module, or the value of one of its attributes."""

    owner: type
    attribute: str = ''
    value: str = ''


@cache
def traits_of_example(index: int) -> frozenset[Trait]:
    """Return the traits of a network in `APART`; raises if this x-transformers, or this machine, cannot build it."""
    sizes = {'num_tokens': 8, 'max_seq_len': 8, 'dim': 16, 'depth': 2, 'heads': 2, 'attn_dim_head': 8}
    arguments: dict[str, Any] = sizes | {'verbose': False} | APART[index]
    of_wrapper = arguments.keys() & inspect.signature(TransformerWrapper).parameters
    wrapper = {name: arguments.pop(name) for name in of_wrapper}
    with neutral(), torch.device('meta'):  # which draws no random numbers
        net = TransformerWrapper(attn_layers=Decoder(**arguments), **wrapper)
    return frozenset(trait for module in net.modules() for trait in traits(module))


def strange(modules: list[nn.Module]) -> dict[Trait, nn.Module]:
    """Return the traits of modules that none in `APART` has, but for attributes that no code reads."""
    found = {trait: module for module in modules for trait in traits(module)}
    known: set[tuple[type, str]] = set()
    for index in range(len(APART)):
        with suppress(AssertionError, ImportError, RuntimeError, TypeError):
            example = traits_of_example(index)
            known |= {trait[:2] for trait in example}
            found = {trait: module for trait, module in found.items() if trait not in example}
        if not found:
            break
    return {
        trait: module
        for trait, module in found.items()
        if trait[:2] in known or trait.attribute in {'', *attributes_read(trait.owner.__module__)}
    }


@cache
def attributes_read(module: str) -> frozenset[str]:
    """Return the names of all attributes that the code of a Python module, or of x-transformers, reads."""
    names: set[str] = set()
    for code in {module, Attention.__module__, Attend.__module__}:
        for node in ast.walk(ast.parse(inspect.getsource(sys.modules[code]))):
            names |= {node.attr} if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) else set()
            names |= {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()
    return frozenset(names)


def owner_of(module: nn.Module) -> type:
    """Return the library's class that a module is, the one with its forward: sharding and users make subclasses."""
    return next(c for c in type(module).__mro__ if 'forward' in vars(c) and c.__module__.startswith(LIBRARIES))


def is_upstream(module: nn.Module) -> bool:
    """Whether it is one of x-transformers' modules, if only by its base."""
    return owner_of(module).__module__.startswith('x_transformers')


def traits(module: nn.Module) -> list[Trait]:
    """Return the traits of a module. Weights and sizes are none."""
    owner = owner_of(module)
    children = {} if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) else module._modules
    attributes = {**vars(module), **module._parameters, **children}
    return [Trait(owner)] + [
        Trait(owner, attribute, description)
        for attribute, value in attributes.items()
        if not attribute.startswith('_') and attribute not in ('training', 'forward')
        for description in describe(value)
    ]


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
