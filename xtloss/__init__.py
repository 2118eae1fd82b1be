"""The loss for people who train with x-transformers: every weighting by one equation, fused, however it is batched."""

from xtloss.autoregressive import AutoregressiveWrapper
from xtloss.collating import collate
from xtloss.continuous import ContinuousAutoregressiveWrapper
from xtloss.distributed import global_normalizer
from xtloss.fused import linear_cross_entropy
from xtloss.packing import pack, unpack
from xtloss.upgrade import upgrade_
from xtloss.weighting import LossBreakdown
from xtloss.xl import XLAutoregressiveWrapper

__all__ = [
    'AutoregressiveWrapper',
    'ContinuousAutoregressiveWrapper',
    'LossBreakdown',
    'XLAutoregressiveWrapper',
    'collate',
    'global_normalizer',
    'linear_cross_entropy',
    'pack',
    'unpack',
    'upgrade_',
]
