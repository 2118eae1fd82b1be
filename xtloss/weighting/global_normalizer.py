"""One normalizer for all data-parallel ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from xtloss.arguments import check, is_number
from xtloss.tensors import loss_dtype


def global_normalizer(total: Tensor | float, group: dist.ProcessGroup | None = None) -> Tensor:
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
    if isinstance(total, Tensor) or not is_number(total) or total != 0:  # a rank with nothing to count brings 0
        check({'total': 'number'}, {'total': total})
    grouped = dist.is_available() and dist.is_initialized()
    device = communication_device(group) if grouped else torch.device('cpu')
    home, dtype = device, torch.float64
    if isinstance(total, Tensor):
        total, home, dtype = total.detach(), total.device, loss_dtype(total.dtype)
    if not grouped:
        return torch.as_tensor(total, dtype=dtype, device=home)
    # in one dtype and on one type of device, as a rank without micro-batches brings the number 0, not a tensor
    summed = torch.as_tensor(total, dtype=torch.float64, device=device).clone()
    dist.all_reduce(summed, group=group)
    return (summed / dist.get_world_size(group)).to(home, dtype)


def communication_device(group: dist.ProcessGroup | None) -> torch.device:
    """Return the device all ranks reduce on: CUDA where there is NCCL, else the CPU, else the one the group knows."""
    backends = dict(pair.split(':') for pair in dist.get_backend_config(group).split(','))  # cpu:gloo,cuda:nccl
    if backends.get('cuda') == 'nccl' and torch.cuda.is_available():
        return torch.device('cuda')
    return torch.device('cpu' if 'cpu' in backends else next(iter(backends)))
