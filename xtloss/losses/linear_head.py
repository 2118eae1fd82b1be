"""When the network's head is a plain linear map, the network is asked for embeddings, and head and loss become one.

Dims: d width, v vocabulary.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as all_modules
from x_transformers.x_transformers import TokenEmbedding, TransformerWrapper

from xtloss.tracing import constant

# what may be handed to the network's forward: none of it changes what the head reads, does, or is read for
PLAIN_ARGUMENTS = frozenset(
    'mask prepend_embeds prepend_mask pos embed_ids sum_embeds transform_token_embeds transform_block_inputs '
    'mems mem_masks recycle_steps attn_z_loss_weight seq_start_pos token_emb_kwargs '
    'context context_mask attn_mask self_attn_kv_mask rotary_pos_emb polar_pos_emb context_pos attn_bias '
    'self_attn_additional_kv additional_kv_mask detach_additional_kv route_additional_kv_to_top condition in_attn_cond '
    'layers_execute_order repeat_blocks self_attn_kv_residuals cross_attn_kv_residuals flash_pack_seq_kwargs '
    'flash_pack_seq_context_kwargs causal'.split()
)
CALLS = ('forward', '__call__', '_call_impl', '_wrapped_call_impl')  # what runs when a module is called
HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


class LinearHead(NamedTuple):
    """logits = scale · embed @ weightᵀ + bias."""

    weight: Tensor  # (v, d)
    bias: Tensor | None  # (v,)
    scale: float

    def scaled(self, embed: Tensor) -> Tensor:
        """Scale · embed, as precise as the products will be: it is narrower than logits."""
        return embed if self.scale == 1 else embed.to(torch.promote_types(embed.dtype, self.weight.dtype)) * self.scale


def linear_head(net: Any) -> LinearHead:
    """Return the head of a network for which `why_not_linear` has no objection."""
    if isinstance(net.to_logits, nn.Linear):
        return LinearHead(net.to_logits.weight, net.to_logits.bias, 1.0)
    return LinearHead(net.token_emb.emb.weight, None, getattr(net, 'tie_embedding_scale', 1.0))


def why_not_arguments(arguments: list[str]) -> str | None:
    """Return which argument of the network's forward may stand between embeddings and loss; None if none does."""
    for name in arguments:
        if name not in PLAIN_ARGUMENTS:
            return f'{name} is given to the network'
    return None


def why_not_linear(net: Any, arguments: list[str]) -> str | None:
    """Return why head and loss cannot be one, given the names of what goes to the network's forward; None if they can.

    A whitelist: exactly x-transformers' TransformerWrapper, with exactly an nn.Linear or its own tied embedding for a
    head, as they are (no hooks, of their own or for all modules, no parametrizations, subclasses, tensor subclasses, or
    replaced forwards, of the module or of its class), and no option that does something between the embeddings and the
    logits, or to the logits.
    """
    return why_not_arguments(arguments) or _why_not_plain_network(net)


@constant
def _why_not_plain_network(net: Any) -> str | None:
    if type(net) is not TransformerWrapper:
        return f'the network is a {type(net).__name__}, not a TransformerWrapper'
    if is_touched(net):
        return 'the network has hooks or another forward'

    options = {
        'looped': net.looped,
        'mixture_of_softmax': net.to_mixture is not None or net.output_is_log_prob,
        'sigsoftmax_logits': net.sigsoftmax_logits,
        'num_output_heads': net.has_multiple_heads,
        'return_only_embed': net.to_logits is None,
        'use_cls_token': net.cls_token is not None,
        'average_pool_embed': net.average_pool_embed,
        'attn_pool': net.attn_pool is not None,
        'squeeze_out_last_dim': net.squeeze_out_last_dim,
    }
    for name, is_on in options.items():
        if is_on:
            return f'the network was built with {name}'

    head = net.to_logits
    if type(head) is nn.Linear:
        if is_touched(head):
            return 'the head has hooks or another forward'
    elif tied_network(net) is net:
        if type(net.token_emb) is not TokenEmbedding or type(net.token_emb.emb) is not nn.Embedding:
            return 'the tied embedding is not a plain nn.Embedding'
    else:
        return f'the head is a {type(head).__name__}, neither nn.Linear nor the embedding tied to this very network'

    for weight in linear_head(net)[:2]:
        if weight is not None and type(weight) not in (nn.Parameter, Tensor, FakeTensor):
            return f"the head's weight is a {type(weight).__name__}"
    return None


def is_touched(module: nn.Module) -> bool:
    """Whether something else than the class as it was written runs when the module is called."""
    return (
        any(getattr(module, hooks) for hooks in HOOKS)
        or any(not _is_observer(hook) for hooks in HOOKS for hook in getattr(all_modules, f'_global{hooks}').values())
        or any(name in vars(module) for name in CALLS)
        or not _is_torchs(nn.Module.__call__)
        or not _is_as_written(type(module))
    )


def _is_observer(hook: Any) -> bool:
    """Whether a hook for all modules is one of torch's own, as of FlopCounterMode, which change nothing."""
    return str(getattr(hook, '__module__', None)).startswith('torch.')


def _is_torchs(function: Any) -> bool:
    """Whether its code is torch's, as that of the tracers that patch it, which change nothing."""
    code = getattr(function, '__code__', None)
    return code is not None and code.co_filename.startswith(str(Path(torch.__file__).parent))


def _is_as_written(cls: type) -> bool:
    """Whether forward comes from the file of the class that has it, whoever replaced it, and when.

    What nn.Module itself does around forward may be a tracer's.
    """
    owner = next(c for c in cls.__mro__ if 'forward' in vars(c))
    forward = vars(owner)['forward']
    written = type(forward) is FunctionType and forward.__code__.co_filename == sys.modules[owner.__module__].__file__
    return written and all(getattr(cls, name) is getattr(nn.Module, name) for name in CALLS[1:])


def tied_network(net: Any) -> Any:
    """Return the network whose embedding the head of `net` reads; None where the head is tied to none.

    `tie_embedding` makes the head a lambda of TransformerWrapper.__init__. After copy.deepcopy of the network alone it
    still reads the original's embedding.
    """
    head = vars(net).get('to_logits')
    if type(head) is not FunctionType or head.__closure__ is None:
        return None
    is_tied = head.__code__ in inspect.unwrap(TransformerWrapper.__init__).__code__.co_consts
    return head.__closure__[0].cell_contents if is_tied else None
