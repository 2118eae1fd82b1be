"""The loss for people who train with x-transformers: every weighting by one equation, fused, however it is batched."""

from xtloss.losses.linear_cross_entropy import linear_cross_entropy
from xtloss.packing.collating import collate
from xtloss.packing.layout import pack, unpack
from xtloss.weighting.weights import LossBreakdown, global_normalizer
from xtloss.wrappers.autoregressive import AutoregressiveWrapper
from xtloss.wrappers.continuous import ContinuousAutoregressiveWrapper
from xtloss.wrappers.segment_leak import segment_leak
from xtloss.wrappers.upgrade import upgrade_
from xtloss.wrappers.xl import XLAutoregressiveWrapper

__version__ = '0.1.0'

__all__ = [
    'AutoregressiveWrapper',
    'ContinuousAutoregressiveWrapper',
    'LossBreakdown',
    'XLAutoregressiveWrapper',
    'collate',
    'global_normalizer',
    'linear_cross_entropy',
    'pack',
    'segment_leak',
    'unpack',
    'upgrade_',
]
