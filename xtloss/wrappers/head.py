"""When the network's head is a plain linear map, the network is asked for embeddings, and head and loss become one.

Dims: d width, v vocabulary.
"""

from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as all_modules
from x_transformers.continuous import GaussianNLL
from x_transformers.x_transformers import TokenEmbedding, TransformerWrapper

from xtloss.arguments import OF_LOSS, having

HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
# what each of these classes does when it is called, before anybody can have replaced it
FORWARDS = {cls: cls.forward for cls in (TransformerWrapper, TokenEmbedding, GaussianNLL, nn.Linear, nn.Embedding)}
FUSING = having('fuses') + OF_LOSS
# attributes of a network that does something between the embeddings and the logits, or to the logits
BETWEEN = 'looped to_mixture output_is_log_prob sigsoftmax_logits has_multiple_heads cls_token attn_pool'.split()
BETWEEN += ['average_pool_embed', 'squeeze_out_last_dim']


class LinearHead(NamedTuple):
    """logits = scale · embed @ weightᵀ + bias."""

    weight: Tensor  # (v, d)
    bias: Tensor | None  # (v,)
    scale: float

    def scaled(self, embed: Tensor) -> Tensor:
        """Return scale · embed, as precise as the products will be: it is narrower than logits."""
        return embed if self.scale == 1 else embed.to(torch.promote_types(embed.dtype, self.weight.dtype)) * self.scale


class TiedHead:
    """The head of a network with `tie_embedding`: unlike x-transformers' lambda it is copied with its network."""

    def __init__(self, net: Any) -> None:
        self.net = net

    def __call__(self, embed: Tensor) -> Tensor:
        """Return logits, (..., v), of embeddings, (..., d)."""
        return (embed @ self.net.token_emb.emb.weight.t()) * self.scale

    @property
    def scale(self) -> float:
        """The factor of the logits, which x-transformers 2.20 does not have."""
        return getattr(self.net, 'tie_embedding_scale', 1.0)


def tie_heads(module: nn.Module) -> None:
    """Put a `TiedHead` in the place of x-transformers' lambda in every network inside a module."""
    for net in module.modules():
        head = vars(net).get('to_logits')
        if isinstance(head, FunctionType) and head.__qualname__ == 'TransformerWrapper.__init__.<locals>.<lambda>':
            net.to_logits = TiedHead(net)  # type: ignore[assignment]


def fused_head(wrapper: Any, given: dict[str, Any], why_not: str | None = None) -> LinearHead | None:
    """Return the head where head and loss are one in such a call, else None; ValueError where they must be one."""
    if wrapper.fused is False:
        return None
    others = [name for name in given if name not in FUSING]
    if given.get('return_outputs'):
        why_not = 'return_outputs asks for logits'
    elif others:
        why_not = f'{others[0]} is given to the network'
    why_not = why_not or wrapper._xtloss_finding('why_not_fused')
    if why_not is None:
        return linear_head(wrapper.net)
    if wrapper.fused is True:
        raise ValueError(f'fused=True, but head and loss cannot be one: {why_not}')
    return None


def linear_head(net: Any) -> LinearHead:
    """Return the head of a network for which `why_not_fused` has no objection."""
    if isinstance(net.to_logits, nn.Linear):
        return LinearHead(net.to_logits.weight, net.to_logits.bias, 1.0)
    return LinearHead(net.token_emb.emb.weight, None, net.to_logits.scale)


def why_not_fused(net: Any) -> str | None:
    """Return why head and loss of a network cannot be one; None if they can: an unaltered class, head and weights."""
    if type(net) is not TransformerWrapper:
        return f'the network is a {type(net).__name__}, not a TransformerWrapper'
    if not is_untouched(net):
        return 'the network has hooks or another forward'

    for name in BETWEEN:
        if getattr(net, name) is not None and getattr(net, name) is not False:
            return f'the network was built with {name}'

    head = net.to_logits
    if type(head) is nn.Linear:
        if not is_untouched(head):
            return 'the head has hooks or another forward'
    elif type(head) is not TiedHead or head.net is not net:
        return f'the head is a {type(head).__name__}, neither nn.Linear nor the embedding tied to this very network'
    elif type(net.token_emb) is not TokenEmbedding or type(net.token_emb.emb) is not nn.Embedding:
        return 'the tied embedding is not a plain nn.Embedding'

    for weight in linear_head(net)[:2]:
        if weight is not None and type(weight) not in (nn.Parameter, Tensor, FakeTensor):
            return f"the head's weight is a {type(weight).__name__}"
    return None


def is_untouched(module: Any) -> bool:
    """Tell whether a module of one of the classes in `FORWARDS` does what its class was written to do when called."""
    return (
        FORWARDS.get(type(module)) is type(module).forward
        and 'forward' not in vars(module)
        and not any(getattr(module, hooks) or getattr(all_modules, f'_global{hooks}') for hooks in HOOKS)
    )
