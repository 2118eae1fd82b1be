"""What all wrappers share: the options that choose a weighting, Z of a batch, and copies that stay whole."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from xtloss.checks import (
    ARGUMENTS,
    check_attn_mask,
    check_batch,
    check_dtype,
    check_key_masks,
    check_known,
    check_module,
    forward_keywords,
    is_flag,
    keywords,
    widened,
)
from xtloss.losses.linear_cross_entropy import refuse_transforms
from xtloss.losses.linear_head import why_not_arguments, why_not_linear
from xtloss.weighting.targets import Targets, count_targets
from xtloss.weighting.weights import Weighting, batch_normalizer, check_weighting_types, resolve_weighting
from xtloss.wrappers.attention_masks import is_known, memory_tokens, prepended_length
from xtloss.wrappers.memories import OF_LAYERS, check_memory_shapes, check_memory_types, memory_length
from xtloss.wrappers.rows import OF_THE_LOSS
from xtloss.wrappers.tied_head import rebind_tied_heads, warn_of_foreign_head

FLAGS = ('return_outputs', 'return_breakdown', 'dropout_mems')
KEY_MASKS = ('prepend_mask', 'self_attn_kv_mask')
COUNTING = ('lens', 'mask', 'loss_mask', 'seq_start_pos', 'segment_ids')
IDS = ('pos', 'embed_ids')  # of the network: int64, or it takes a position for an embedding


class LossWrapper(nn.Module):
    """A wrapper with `equal_loss_weight_batch` and `loss_weighting`, plain attributes that may be set at any time.

    A subclass says by `_checked` what it takes.
    """

    net: Any
    ignore_index: int | None = None  # frames have none
    equal_loss_weight_batch: bool
    loss_weighting: str | float | None
    fused: bool | str = False  # a wrapper without a head never fuses

    def __init__(self, net: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Build upstream's wrapper around a network."""
        check_module('net', net)
        super().__init__(net, *args, **kwargs)

    def set_loss_options(self, **options: Any) -> None:
        """Set the options, in the constructor; raise TypeError or ValueError unless they are legal."""
        for name, value in options.items():
            setattr(self, name, value)
        self.check_loss_options()
        warn_of_foreign_head(self.net)

    @property
    def weighting(self) -> Weighting:
        """The weighting that the options stand for; TypeError or ValueError where they stand for none."""
        return resolve_weighting(self.loss_weighting, self.equal_loss_weight_batch)

    def check_loss_options(self) -> None:
        """Raise TypeError or ValueError unless the options are legal; types are looked at first."""
        self._check_option_types()
        _ = self.weighting
        if isinstance(self.fused, str) and self.fused != 'auto':
            raise ValueError(f"fused must be True, False or 'auto', got {self.fused!r}")

    def _check_option_types(self) -> None:
        check_weighting_types(self.loss_weighting, self.equal_loss_weight_batch)
        if not is_flag(self.fused) and not isinstance(self.fused, str):
            raise TypeError(f"fused must be bool or 'auto', got {type(self.fused).__name__}")

    @property
    def loss_dtype(self) -> torch.dtype:
        """float32, or wider where a parameter is."""
        dtypes = {p.dtype for p in self.parameters() if p.is_floating_point()}
        return reduce(torch.promote_types, dtypes, torch.float32)

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

        Takes what `forward` takes, and raises what that raises of its arguments. Sum it over the micro-batches of a
        step, hand the sum to `global_normalizer`, and that to `forward` as ``normalizer``, and the gradients add up to
        those of one batch.
        """
        given = {
            'lens': lens,
            'mask': mask,
            'loss_mask': loss_mask,
            'seq_start_pos': seq_start_pos,
            'segment_ids': segment_ids,
            **network_kwargs,
        }
        self._refuse_unknown(network_kwargs)
        x, given = self._checked(x, given)
        return batch_normalizer(self._count(x, given), self.weighting, self.loss_dtype)

    def _checked(self, x: Tensor, given: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Check all that `forward` was given, by name; return it without what is None, integers as int64."""
        raise NotImplementedError

    def _count(self, x: Tensor, given: dict[str, Any]) -> Targets:
        counting: dict[str, Any] = {name: given[name] for name in COUNTING if name in given}
        return count_targets(x, ignore_index=self.ignore_index, prepended=prepended_length(given), **counting)

    def _check_batch(self, x: Tensor, given: dict[str, Any], **options: Any) -> tuple[Tensor, dict[str, Any]]:
        """Check x and what says which targets count; return them, integers as int64: narrow and unsigned ones wrap."""
        self.check_loss_options()
        flags: dict[str, Any] = {name: given[name] for name in FLAGS if name in given}
        given = {name: value for name, value in given.items() if value is not None}
        numbers: dict[str, Any] = {name: given[name] for name in ('normalizer', 'prepend_embeds') if name in given}
        counting = {name: value for name, value in given.items() if name in ARGUMENTS}
        masks = {name: given[name] for name in KEY_MASKS if name in given}
        ids = {name: given[name] for name in IDS if name in given}
        for name, mask in masks.items():
            check_dtype(name, mask, 'bool')
        check_memory_types(given)
        judges = 'segment_ids' in given or is_known(self.net)  # another network may take another attn_mask
        attn_mask = given.get('attn_mask') if judges else None
        if attn_mask is not None:
            check_dtype('attn_mask', attn_mask, 'bool')
        width = getattr(self.net, 'emb_dim', None)
        check_batch(x, flags=flags, width=width, **numbers, **counting, **options)
        if getattr(self.net, 'has_multiple_heads', False):
            raise ValueError(f'net must have one head to make logits, got num_output_heads={len(self.net.to_logits)}')
        check_memory_shapes(given, x)
        if attn_mask is not None:
            check_attn_mask(attn_mask, x)
        prepended = prepended_length(given)
        before = prepended + memory_length(given.get('mems'))
        check_key_masks(x, masks, prepended, *self.key_range(x.shape[1], before))
        for name in OF_LAYERS:
            layers = list(given.pop(name, []))  # which the network copies
            if any(layer is not None for layer in layers):
                given[name] = layers
        return x if x.is_floating_point() else x.long(), {**given, **widened({**counting, **ids})}

    def key_range(self, n: int, before: int) -> tuple[int, int | None]:
        """How many keys `self_attn_kv_mask` may tell of: those of the n positions read, and all that is before them."""
        return n, n + before + memory_tokens(self.net)

    def _may_fuse(self, given: dict[str, Any]) -> bool:
        """Whether head and loss may be one in a call with these arguments; ValueError where they must be."""
        return bool(self.fused) and self._judge_fused(self._why_not_fused(given))

    def _fuses(self, given: dict[str, Any]) -> bool:
        """Whether head and loss are one in a call; ValueError where they must be and cannot.

        Asked inside `forward` alone: elsewhere the weights of a sharded network are not whole.
        """
        fuses = self._may_fuse(given) and self._judge_fused(why_not_linear(self.net, []))
        if fuses:
            refuse_transforms()
        return fuses

    def _judge_fused(self, why_not: str | None) -> bool:
        if why_not is not None and self.fused != 'auto':
            raise ValueError(f'fused=True, but head and loss cannot be one: {why_not}')
        return why_not is None

    def _why_not_fused(self, given: dict[str, Any]) -> str | None:
        if given.get('return_outputs', False):
            return 'return_outputs asks for logits'
        return why_not_arguments([name for name in given if name not in OF_THE_LOSS])

    def _refuse_unknown(self, names: Iterable[str]) -> None:
        """Raise TypeError for an argument that neither `forward` nor the network's forward has."""
        of_network = forward_keywords(self.net, getattr(self.net, 'attn_layers', None))
        if of_network is not None:
            check_known('loss_normalizer()', names, keywords(type(self).forward) | of_network)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, whose tied head would go on reading the embedding of the original."""
        super().__setstate__(state)
        rebind_tied_heads(self)

    def extra_repr(self) -> str:
        """Show the weighting beside the network."""
        default = 'sequence' if self.equal_loss_weight_batch else 'token'
        return f'loss_weighting={default if self.loss_weighting is None else self.loss_weighting!r}'
