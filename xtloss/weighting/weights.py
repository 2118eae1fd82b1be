"""A weighting is a choice of the weights w and the normalizer Z in loss = Σ w · ℓ / Z, and of nothing else.

Dims: b batch, n positions, s sequences a row can hold.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from xtloss.arguments import check, check_kind, is_number, loss_dtype, plain
from xtloss.weighting.targets import Targets, next_tokens


class Weighting(NamedTuple):
    """Weights w = L^-p on the L counted targets of a sequence; Z = Σ L^q over the sequences with L > 0."""

    p: float
    q: float | None  # None: Z is every position of the loss tensor


WEIGHTINGS = {
    'token': Weighting(p=0.0, q=1.0),
    'sequence': Weighting(p=1.0, q=0.0),
    'square': Weighting(p=0.5, q=0.5),
    'padded': Weighting(p=0.0, q=None),
    'sequence_sum': Weighting(p=0.0, q=0.0),
}


class LossBreakdown(NamedTuple):
    """What a loss is made of, detached: ``(token_loss * weight).sum() / normalizer + auxiliary`` is the loss.

    Nats; float32, or wider where the logits are wider. Where the normalizer is 0 the first term is 0.
    """

    token_loss: Tensor  # (b, n-1), ℓ: what each target costs, 0 where it is not counted
    weight: Tensor  # (b, n-1), w: loss_weight · counted · L^-p
    normalizer: Tensor  # 0-dim, Z
    auxiliary: Tensor  # 0-dim: exit loss, next-embedding loss, attention z-loss, times their coefficients


def resolve_weighting(loss_weighting: Any, equal_loss_weight_batch: Any) -> Weighting:
    """Return the weighting that a name, a power p in [0, 1] (w = L^-p, Z = Σ w), or the flag stands for."""
    check_kind('equal_loss_weight_batch', equal_loss_weight_batch, 'flag')
    if loss_weighting is None:
        return WEIGHTINGS['sequence' if equal_loss_weight_batch else 'token']

    if is_number(loss_weighting):
        if not 0 <= loss_weighting <= 1:
            raise ValueError(f'loss_weighting must be in [0, 1] where it is a number, got {loss_weighting}')
        weighting = Weighting(p=float(loss_weighting), q=1.0 - float(loss_weighting))
    elif not isinstance(loss_weighting, str):
        raise TypeError(f'loss_weighting must be a name or a number, got {type(loss_weighting).__name__}')
    elif loss_weighting in WEIGHTINGS:
        weighting = WEIGHTINGS[loss_weighting]
    else:
        names = ', '.join(WEIGHTINGS)
        raise ValueError(f'loss_weighting must be one of {names}, or a float in [0, 1], got {loss_weighting!r}')

    if equal_loss_weight_batch and weighting != WEIGHTINGS['sequence']:
        raise ValueError(
            f"equal_loss_weight_batch=True stands for loss_weighting='sequence', got {loss_weighting!r} too"
        )
    return weighting


class Weights(NamedTuple):
    """Weights and normalizer of one batch: constants, but for the gradient that a loss_weight of one's own may want."""

    by_length: Tensor  # (b, n-1), counted · L^-p: what auxiliary losses are weighted by
    weight: Tensor  # (b, n-1), w = loss_weight · counted · L^-p
    normalizer: Tensor  # (), Z, or what is in its place
    own: Tensor  # (), Z


def batch_weights(
    targets: Targets,
    weighting: Weighting,
    dtype: torch.dtype,
    loss_weight: Tensor | None = None,  # (b,) or (b, n)
    normalizer: Tensor | float | None = None,
) -> Weights:
    """Make the weights of a batch. What loss_weight says of targets that do not count, be it NaN, is not read."""
    by_length = torch.where(targets.counted, targets.length.clamp(min=1).to(dtype) ** -weighting.p, 0)

    weight = by_length
    if loss_weight is not None:
        loss_weight = loss_weight.to(dtype)
        loss_weight = loss_weight[:, None] if loss_weight.ndim == 1 else next_tokens(loss_weight)
        weight = torch.where(targets.counted, loss_weight * by_length, 0)

    own = batch_normalizer(targets, weighting, dtype)
    if isinstance(normalizer, Tensor) and normalizer.dtype == torch.float64:  # which a narrower dtype may round to 0
        normalizer = normalizer.sign() * normalizer.abs().clamp(min=torch.finfo(dtype).tiny)
    normalizer = own if normalizer is None else torch.as_tensor(normalizer, dtype=dtype, device=own.device).detach()
    return Weights(by_length, weight, normalizer, own)


def batch_normalizer(targets: Targets, weighting: Weighting, dtype: torch.dtype) -> Tensor:
    """Z of this batch, 0-dim: Σ L^q over the sequences with L > 0, which is Σ counted · L^-p where q = 1 - p."""
    lengths = targets.lengths
    if weighting.q is None:
        return torch.full((), targets.counted.numel(), dtype=dtype, device=lengths.device)
    return torch.where(lengths > 0, lengths.to(dtype) ** weighting.q, 0).sum()


def normalize(total: Tensor, normalizer: Tensor) -> Tensor:
    """total / Z where Z is finite and > 0; 0, still attached to the graph, where Z is 0; NaN otherwise."""
    nothing = normalizer == 0
    legal = torch.where((normalizer > 0) & (normalizer < torch.inf), normalizer, torch.nan)
    return torch.where(nothing, 0, total / torch.where(nothing, 1, legal))


def breakdown_of(
    total: Tensor, token_loss: Tensor, weights: Weights, extra: Tensor | None = None, of_batch: Tensor | None = None
) -> tuple[Tensor, LossBreakdown]:
    """Return total / Z + auxiliary, 0-dim, of total = Σ w · ℓ and ℓ (b, n-1); and what it is made of.

    `extra`, (b, n-1), is an auxiliary loss of each target; `of_batch`, 0-dim, one that is weighed by Z / normalizer.
    """
    normalizer, own = weights.normalizer, weights.own
    loss = normalize(total, normalizer)
    auxiliary = torch.zeros_like(loss) if extra is None else normalize((weights.by_length * extra).sum(), normalizer)
    if of_batch is not None:
        share = torch.where((own == 0) & (normalizer == 0), 1, normalize(own, normalizer))
        auxiliary = auxiliary + of_batch * share
    parts = (t.detach() for t in (token_loss, weights.weight, normalizer, auxiliary))
    return loss + auxiliary, LossBreakdown(*parts)


def global_normalizer(total: Tensor | float, group: 'dist.ProcessGroup | None' = None) -> Tensor:
    """Return Σ over ranks of `total` / number of ranks: the normalizer that makes data-parallel training exact.

    With `total` the sum of ``loss_normalizer`` over a rank's micro-batches, and the result R passed to each of them as
    ``normalizer``, the gradient that DDP or FSDP averages over W ranks is that of the whole batch on one process:

        1/W · Σ_ranks Σ w·ℓ / R  =  Σ_ranks Σ w·ℓ / Σ_ranks Z,    as R = Σ_ranks Z / W

        >>> wrapper = model.module if isinstance(model, DistributedDataParallel) else model
        >>> Z = global_normalizer(sum(wrapper.loss_normalizer(**mb) for mb in micro_batches))
        >>> for mb in micro_batches:
        ...     model(**mb, normalizer=Z).backward()

    All ranks of the group must call it, those with nothing to count too (with 0), and run as many backward passes as
    the others, be it on a batch of no rows. Without a process group there is one rank. To report the loss, sum it over
    the micro-batches and average it over the ranks, as the gradient is.

    - DDP: as above; under ``no_sync`` for all micro-batches but the last, as usual.
    - FSDP2: as above. ``fully_shard`` the blocks and the wrapper itself, not its ``net``: a head that is gathered only
      inside ``net`` is a sharded DTensor to the wrapper, which then takes the path over the logits. A policy of mixed
      precision casts R too, which bfloat16 rounds to 3 digits: give the wrapper's ``cast_forward_inputs=False``.
    - accelerate: ``accelerator.unwrap_model(model)`` is the wrapper, and ``accelerator.reduce(Z, 'mean')`` gives the
      same number. As ``accelerator.backward`` divides the loss by ``accelerator.gradient_accumulation_steps``, pass
      ``normalizer=Z / accelerator.gradient_accumulation_steps``.
    - Lightning: ``fabric.all_reduce(Z, reduce_op='mean')``, or in a module ``self.trainer.strategy.reduce(Z,
      reduce_op='mean')``, gives the same number (and may write it into Z). As ``Trainer(accumulate_grad_batches=k)``
      divides the loss by k, pass ``normalizer=Z / k``.

    Args:
        total: 0-dim tensor, of any integer or floating point dtype; or a number, numpy's too, finite and >= 0.
        group: the ranks whose gradients are averaged, None for all; beside tensor parallelism, the data-parallel group.

    Returns:
        0-dim tensor, detached. Of a tensor: on its device, in its dtype, but float32 at least. Of a number: float64, on
        the device the group communicates on (the CPU without a group). Ranks may mix tensors and numbers.

    Raises:
        TypeError: `total` is no number, or `group` no process group (a rank that is not in the group gets none).
        ValueError: `total` has dims, is negative or not finite (numbers; a tensor is not read).

    """
    if group is not None and not isinstance(group, dist.ProcessGroup):  # torch would warn, and sum nothing
        raise TypeError(f'group must be a process group that this rank belongs to, got {type(group).__name__}')
    grouped = dist.is_available() and dist.is_initialized()
    device = communication_device(group) if grouped else torch.device('cpu')
    home, dtype = device, torch.float64
    if isinstance(total, Tensor):
        check({'total': 'number'}, {'total': total})
        total, home, dtype = total.detach(), total.device, loss_dtype(total.dtype)
    else:
        check_kind('total', 1 if is_number(total) else total, 'number')
        total = plain(total)
        if not 0 <= total <= torch.finfo(dtype).max:
            raise ValueError(f'total must be >= 0 and finite, got {total}')
        total = torch.tensor(total, dtype=dtype, device=device)
    if not grouped:
        return total.to(home, dtype)
    # in one dtype and on one type of device, as a rank without micro-batches brings the number 0, not a tensor
    summed = total.to(device, torch.float64, copy=True)
    dist.all_reduce(summed, group=group)
    return (summed / dist.get_world_size(group)).to(home, dtype)


def communication_device(group: 'dist.ProcessGroup | None') -> torch.device:
    """Return the device all ranks reduce on: CUDA where there is NCCL, else the CPU, else the one the group knows."""
    backends = dict(pair.split(':') for pair in dist.get_backend_config(group).split(','))  # cpu:gloo,cuda:nccl
    if backends.get('cuda') == 'nccl' and torch.cuda.is_available():
        return torch.device('cuda')
    return torch.device('cpu' if 'cpu' in backends else next(iter(backends)))
