"""What a tensor is seen through: torch.func, batched and forward-mode derivatives, devices without values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad


def functorch_active() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) is being applied."""
    return bool(torch._C._are_functorch_transforms_active())


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform is being applied, or one of the tensors is batched, or has a forward-mode derivative.

    The last two can begin at the backward pass: ``is_grads_batched``, ``jacobian(vectorize=True)``, ``dual_level``.
    """
    if torch.compiler.is_compiling():
        return False
    return functorch_active() or any(_is_batched(t) or _is_dual(t) for t in tensors if t is not None)


def _is_batched(t: Tensor) -> bool:
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t))


def _is_dual(t: Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None


def has_values(t: Tensor) -> bool:
    """Whether there is something to read: not on the meta device, nor where shapes alone are traced."""
    return not t.is_meta and not is_fake(t)
