"""XLAutoregressiveWrapper of x-transformers, with every weighting of its loss, over rows, not over their segments.

Dims: b batch, n positions, m positions of a memory, d width.
"""

import sys
from typing import Any, Literal

from torch import Tensor, nn
from x_transformers.xl_autoregressive_wrapper import XLAutoregressiveWrapper as Upstream

from xtloss.arguments import keywords, refuse_given
from xtloss.wrappers.base import LossWrapper, check_call, checked, on_rows, set_options, shows_upstream
from xtloss.wrappers.xl_loss import loss_and_breakdown

REFUSED = {
    'seq_start_pos': 'the network would count it from the start of every segment; mask is cut with the segments',
    'prepend_embeds': 'every segment would get them',
    'segment_ids': 'only AutoregressiveWrapper keeps sequences that share a row apart',
}


class XLAutoregressiveWrapper(LossWrapper, Upstream):  # type: ignore[misc]
    """Upstream's wrapper, for rows longer than the network, with the equation and options of `AutoregressiveWrapper`.

    ℓ is the cross-entropy of token ``x[b,i]`` in nats, predicted by the network from its segment of the row and the
    memories of those before. L and Z are of whole rows: segments decide what the network sees, and nothing about the
    weights. Where every target counts the loss equals upstream's. It differs where some do not: upstream averages each
    segment by itself, and counts a row that is empty there as a loss of 0.

    Memories, truncated backpropagation and test-time training are upstream's. The inner loss of the latter counts as
    upstream's, by ``ignore_index``, which padding under ``lens`` and ``mask`` is for it; it reads logits, so that head
    and loss are not one.

        >>> model = XLAutoregressiveWrapper(net, loss_weighting='sequence')
        >>> x, lens = torch.randint(0, 16, (2, 21)), torch.tensor([21, 9])  # longer than net.max_seq_len
        >>> loss, breakdown = model(x, lens=lens, return_breakdown=True)
        >>> breakdown.token_loss.shape  # of whole rows
        torch.Size([2, 20])

    """

    fused: bool | str = 'auto'

    @shows_upstream(Upstream.__init__)
    def __init__(
        self,
        net: nn.Module,
        *args: Any,
        equal_loss_weight_batch: bool = False,
        loss_weighting: str | float | None = None,
        fused: bool | Literal['auto'] = 'auto',
        **kwargs: Any,
    ) -> None:
        super().__init__(net, *args, **kwargs)
        set_options(self, equal_loss_weight_batch=equal_loss_weight_batch, loss_weighting=loss_weighting, fused=fused)

    @shows_upstream(Upstream.forward)
    def forward(
        self,
        x: Tensor,
        mems: list[Tensor] | None = None,
        dropout_mems: bool = False,
        ttt_recurrent_steps: int = 1,
        *,
        lens: Tensor | None = None,
        mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
        loss_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        return_breakdown: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the loss of a batch of token ids, as `AutoregressiveWrapper.forward` does.

        Args:
            x, lens, mask, loss_mask, loss_weight, normalizer, return_breakdown: as there; ``mask`` is of memories too.
            mems: memories of what came before the rows, (b, m, d) a layer. Where some of that is padding, ``mem_masks``
                has (b, m) bool for each layer, all alike.
            dropout_mems: let every segment forget those before.
            ttt_recurrent_steps: passes over a segment, each after an update by test-time training.
            **kwargs: the network's, as upstream. ``embed_ids``, ``sum_embeds`` and ``condition`` of each token are cut
                with the segments; each segment gets all of the others. A ``condition`` of each token needs
                ``dropout_mems``: x-transformers takes it to be of the memories too.

        Returns:
            ``loss`` or ``(loss, breakdown)``.

        Raises:
            TypeError, ValueError: as there; ``seq_start_pos``, ``prepend_embeds`` and ``segment_ids``;
                ``self_attn_kv_mask`` beside ``mask``.

        """
        x, given = check_rows(self, x, {
            'mems': mems, 'dropout_mems': dropout_mems, 'ttt_recurrent_steps': ttt_recurrent_steps,
            'lens': lens, 'mask': mask, 'loss_mask': loss_mask, 'loss_weight': loss_weight,
            'normalizer': normalizer, 'return_breakdown': return_breakdown, **kwargs,
        })  # fmt: skip
        loss, breakdown = on_rows(loss_and_breakdown, self, x, given)
        return (loss, breakdown) if return_breakdown else loss


NAMES = keywords(XLAutoregressiveWrapper.forward)


@checked.register
def check_rows(wrapper: XLAutoregressiveWrapper, x: Tensor, given: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Check all that a wrapper was given, by name; return it as `check_call` does."""
    # a mask of the keys is for those of each segment, and may be as short
    x, given = check_call(wrapper, x, given, NAMES, unread=sys.maxsize, refused=REFUSED)
    steps = given.get('ttt_recurrent_steps', 1)
    if steps > 1 and not getattr(wrapper, 'has_ttt', False):
        raise ValueError(f'ttt_recurrent_steps must be 1 without test-time training, got {steps}')
    if 'mask' in given:
        refuse_given(given, {'self_attn_kv_mask': 'mask says which keys are real'})
    return x, given
