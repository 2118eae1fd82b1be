"""Losses of looped networks: each target is predicted after every loop, and a gate learns when to stop.

Zhu et al., Scaling Latent Reasoning via Looped Language Models, 2025, https://arxiv.org/abs/2510.25741, as
x-transformers trains them. Dims: l loops, b batch, n positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def looped_losses(
    nll: Tensor,  # (l, b, n-1)
    exit_logits: Tensor,  # (l, b, n-1)
    *,
    slope: float,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the exit loss of each target, both (b, n-1), in nats, means over the loops.

    loss = nll · exit probability. The exit loss is the binary cross-entropy of each loop's gate, but the last's, to
    sigmoid(slope · (nll[loop + 1] - nll[loop] + threshold)): whether to stop because the next loop gains too little.
    A single loop has no exit loss.
    """
    exit_target = torch.sigmoid(slope * (nll[1:] - nll[:-1] + threshold)).detach()
    exit_loss = F.binary_cross_entropy_with_logits(exit_logits[:-1], exit_target, reduction='none')  # (l-1, b, n-1)

    loss = (nll * exit_probabilities(exit_logits.detach())).mean(dim=0)
    return loss, exit_loss.sum(dim=0) / max(1, len(exit_loss))


def exit_probabilities(exit_logits: Tensor) -> Tensor:
    """Of stopping right after each loop: the gate opens there and at none before; the last loop takes what is left."""
    certain = torch.zeros_like(exit_logits[:1])  # log 1
    stay = torch.cat([certain, F.logsigmoid(-exit_logits[:-1]).cumsum(dim=0)])  # up to each loop
    leave = torch.cat([F.logsigmoid(exit_logits[:-1]), certain])
    return (stay + leave).exp()
