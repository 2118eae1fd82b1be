"""The loss for people who train with x-transformers: every weighting by one equation, fused, however it is batched."""

from xtloss.autoregressive import AutoregressiveWrapper
from xtloss.distributed import global_normalizer
from xtloss.fused import linear_cross_entropy
from xtloss.packing import collate, pack, unpack
from xtloss.weighting import LossBreakdown

__all__ = [
    'AutoregressiveWrapper',
    'LossBreakdown',
    'collate',
    'global_normalizer',
    'linear_cross_entropy',
    'pack',
    'unpack',
]
