"""What all wrappers share: options with defaults, the check of a call, which targets count, and an honest signature."""

import inspect
from collections.abc import Callable, Mapping
from functools import reduce, singledispatch
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from xtloss.arguments import (
    ARGUMENTS,
    COUNTING,
    OF_LOSS,
    OF_NETWORK,
    add_row,
    check,
    check_kind,
    having,
    map_tensors,
    refuse_given,
    refuse_unknown,
    widened,
)
from xtloss.weighting.targets import Targets, count_targets
from xtloss.weighting.weights import Weighting, batch_normalizer, resolve_weighting
from xtloss.wrappers.head import is_untouched, tie_heads, why_not_fused
from xtloss.wrappers.masks import has_known_attention, prepended_length
from xtloss.wrappers.rollout import count_rollout
from xtloss.wrappers.segment_leak import why_not_apart

F = TypeVar('F', bound=Callable[..., Any])

NOTES = {'mask': ': the last position of x is a target, of which a mask of the inputs x[:, :-1] cannot tell'}
IDS, OF_LAYERS = having('ids'), ('mems', 'mem_masks')
# what Python alone can find out about a wrapper; torch.compile takes the answer for a constant
FINDINGS: dict[str, Callable[[Any], Any]] = {
    'why_not_fused': lambda wrapper: why_not_fused(wrapper.net),
    'why_not_apart': lambda wrapper: why_not_apart(wrapper.net, None, short_rows=False),
    'why_not_unpadded': lambda wrapper: why_not_apart(wrapper.net, None, short_rows=True),
    'loss_fn is upstream': lambda wrapper: is_untouched(wrapper.loss_fn),
}


class LossWrapper(nn.Module):
    """A wrapper with options that have defaults, also in a subclass that skips the constructors, or in old pickles."""

    net: Any
    equal_loss_weight_batch: bool = False
    loss_weighting: str | float | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build upstream's wrapper; or, as upstream's own base does for who skips it, a bare module."""
        if args and not isinstance(args[0], nn.Module):
            raise TypeError(f'net must be a torch.nn.Module, got {type(args[0]).__name__}')
        super().__init__(*args, **kwargs) if args or kwargs else nn.Module.__init__(self)

    @torch.compiler.assume_constant_result
    def _xtloss_finding(self, question: str) -> Any:
        return FINDINGS[question](self)

    def loss_normalizer(
        self,
        x: Tensor,
        *,
        lens: Tensor | None = None,
        mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
        seq_start_pos: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **network_kwargs: Any,
    ) -> Tensor:
        """Return Z of this batch, 0-dim, float32 or wider, without running the network.

        It takes what `forward` takes, and raises what that raises of its arguments. Sum it over the micro-batches of a
        step, hand the sum to `global_normalizer`, and that to `forward` as ``normalizer``, and the gradients add up to
        those of one batch.
        """
        x, given = checked(self, x, {
            'lens': lens, 'mask': mask, 'loss_mask': loss_mask, 'seq_start_pos': seq_start_pos,
            'segment_ids': segment_ids, **network_kwargs,
        })  # fmt: skip
        refuse_unknown('loss_normalizer()', given, OF_NETWORK + OF_LOSS)  # or Z would silently be another
        return batch_normalizer(counted_targets(self, x, given), weighting_of(self), loss_dtype_of(self))

    def extra_repr(self) -> str:
        """Show the weighting beside the network."""
        default = 'sequence' if self.equal_loss_weight_batch else 'token'
        return f'loss_weighting={default if self.loss_weighting is None else self.loss_weighting!r}'


def shows_upstream(upstream: Callable[..., Any]) -> Callable[[F], F]:
    """Have a function that hands ``**kwargs`` on show upstream's parameters, for whoever filters a config by them."""

    def decorate(function: F) -> F:
        theirs, ours = (inspect.signature(f).parameters for f in (upstream, function))
        shown = [
            p
            for p in {**theirs, **ours}.values()
            if p.name in theirs or p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        vars(function)['__signature__'] = inspect.Signature(sorted(shown, key=lambda p: p.kind))
        return function

    return decorate


def set_options(wrapper: Any, **options: Any) -> None:
    """Set the options of a wrapper that has its network; raise TypeError or ValueError unless they are legal."""
    for name, value in options.items():
        setattr(wrapper, name, value)
    check_options(wrapper)
    tie_heads(wrapper.net)


def check_options(wrapper: Any) -> None:
    """Raise TypeError or ValueError unless the options of a wrapper are legal."""
    weighting_of(wrapper)
    for name in ('unpad', 'trust_segments'):
        check_kind(name, getattr(wrapper, name, False), 'flag')
    fused = getattr(wrapper, 'fused', False)
    if not isinstance(fused, (bool, str)):
        raise TypeError(f"fused must be bool or 'auto', got {type(fused).__name__}")
    if isinstance(fused, str) and fused != 'auto':
        raise ValueError(f"fused must be True, False or 'auto', got {fused!r}")


def weighting_of(wrapper: Any) -> Weighting:
    """Return the weighting that the options stand for; TypeError or ValueError where they stand for none."""
    return resolve_weighting(wrapper.loss_weighting, wrapper.equal_loss_weight_batch)


def loss_dtype_of(wrapper: nn.Module) -> torch.dtype:
    """Return float32, or wider where a parameter is."""
    return reduce(torch.promote_types, {p.dtype for p in wrapper.parameters() if p.is_floating_point()}, torch.float32)


@singledispatch
def checked(wrapper: Any, x: Tensor, given: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Check all that a wrapper was given, by name, as its class registers it; return it as `check_call` does."""
    raise NotImplementedError


def check_call(
    wrapper: Any,
    x: Tensor,
    given: dict[str, Any],
    names: tuple[str, ...],
    *,
    x_rule: str = 'integer: b n',
    unread: int = 0,
    refused: Mapping[str, str] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Check all that a wrapper was given, by name; return it without what is None, and ids as int64, which never wrap.

    `names` are those that its forward takes; a mask of keys may leave out `unread` positions; `refused` has reasons.
    """
    check_options(wrapper)
    given = {name: value for name, value in given.items() if value is not None}
    refuse_given(given, refused or {})
    refuse_unknown('forward()', [name for name in given if name in OF_LOSS], names)

    rules = {'x': x_rule}
    for name, argument in ARGUMENTS.items():
        if argument.rule and (name != 'attn_mask' or has_known_attention(wrapper.net)):  # others may take other masks
            rules[name] = argument.rule
    n = check({'x': x_rule}, {'x': x})['n']
    if n == 0:
        raise ValueError(f'x must have n >= 1 positions, got {tuple(x.shape)}')
    width = {'width': wrapper.net.emb_dim} if hasattr(wrapper.net, 'emb_dim') else {}
    check(rules, {'x': x, **given}, NOTES, read=max(n - unread, 1), **width)

    for name in OF_LAYERS:
        layers = list(given.pop(name, []))  # a list, which the network copies
        if any(layer is not None for layer in layers):
            given[name] = layers
    return widened(x), {name: map_tensors(widened, t) if name in IDS else t for name, t in given.items()}


def counted_targets(wrapper: Any, x: Tensor, given: dict[str, Any]) -> Targets:
    """Count the targets of a batch by all that says which count, or the k frames of each row in a rollout."""
    if given.get('rollout_steps', 1) > 1:
        loss_mask, lens, mask = (given.get(name) for name in ('loss_mask', 'lens', 'mask'))
        return count_rollout(x, given['rollout_steps'], loss_mask, lens=lens, mask=mask)
    counting: dict[str, Any] = {name: given[name] for name in COUNTING if name in given}
    ignore_index = getattr(wrapper, 'ignore_index', None)  # frames have none
    return count_targets(x, ignore_index=ignore_index, prepended=prepended_length(given), **counting)


def on_rows(loss: Callable[..., Any], wrapper: Any, x: Tensor, given: dict[str, Any]) -> Any:
    """Return what ``loss(wrapper, x, given, has_rows=True)`` returns; of no rows too, though no network runs on them.

    One row in which nothing counts stands in for them, and is taken away again from all that is returned: a rank that
    got no rows must run the network all the same, or the others wait for it for ever.
    """
    if len(x) > 0:
        return loss(wrapper, x, given, has_rows=True)
    nothing = torch.zeros(1, x.shape[1], dtype=torch.bool, device=x.device)
    rows = {name: map_tensors(add_row, value) for name, value in given.items()}
    rows = {'normalizer': 0.0, **rows, 'loss_mask': nothing}
    returned = loss(wrapper, add_row(x), rows, has_rows=False)
    return map_tensors(lambda t: t[:0] if t.ndim > 0 and t.shape[0] == 1 else t, returned)
