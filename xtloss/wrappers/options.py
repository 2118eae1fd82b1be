"""What all wrappers share: the options that choose a weighting, and the dtype that losses are made in."""

from __future__ import annotations

import torch
from torch import nn

from xtloss.losses.cross_entropy import loss_dtype
from xtloss.weighting.weights import Weighting, resolve_weighting


class WeightingOptions(nn.Module):
    """A wrapper with `equal_loss_weight_batch` and `loss_weighting`, plain attributes that may be set at any time."""

    equal_loss_weight_batch: bool
    loss_weighting: str | float | None

    @property
    def weighting(self) -> Weighting:
        """The weighting that the options stand for; TypeError or ValueError where they stand for none."""
        return resolve_weighting(self.loss_weighting, self.equal_loss_weight_batch)

    def check_loss_options(self) -> None:
        """Raise TypeError or ValueError unless the options are legal."""
        _ = self.weighting

    @property
    def loss_dtype(self) -> torch.dtype:
        """float32, or wider where the parameters are."""
        dtypes = (p.dtype for p in self.parameters() if p.is_floating_point())
        return loss_dtype(next(dtypes, torch.float32))

    def extra_repr(self) -> str:
        """Show the weighting beside the network."""
        default = 'sequence' if self.equal_loss_weight_batch else 'token'
        return f'loss_weighting={default if self.loss_weighting is None else self.loss_weighting!r}'
