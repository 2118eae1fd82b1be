"""Gaussian negative log-likelihood, without the look at the variance that neither meta tensors nor tracers allow."""

import torch
from torch import Tensor

MIN_VARIANCE = 1e-6


def gaussian_nll(predicted: Tensor, target: Tensor) -> Tensor:
    """`F.gaussian_nll_loss` of each element, (...), in nats: ½ · (log variance + (mean - target)² / variance).

    `predicted` is a mean and a variance, (2, ...). That is taken as 1e-6 at least; where it is negative, NaN comes out.
    """
    mean, variance = predicted
    least = variance.detach().clamp(min=MIN_VARIANCE).masked_fill(variance < 0, torch.nan)
    variance = least + (variance - variance.detach())  # its gradient goes on, as in torch
    return 0.5 * (variance.log() + (mean - target) ** 2 / variance)
