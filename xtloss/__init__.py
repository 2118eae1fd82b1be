"""The loss for people who train with x-transformers: every weighting by one equation, fused, however it is batched."""

from xtloss.autoregressive import AutoregressiveWrapper
from xtloss.fused import linear_cross_entropy
from xtloss.weighting import LossBreakdown

__all__ = [
    'AutoregressiveWrapper',
    'LossBreakdown',
    'linear_cross_entropy',
]
