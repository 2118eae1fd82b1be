"""Under fp16 autocast nothing is less precise than upstream; `test_modes.py` has bf16."""

from collections import Counter
from typing import Any

import pytest
import torch
import x_transformers
from networks import decoder, gradients
from x_transformers import TransformerWrapper

from xtloss import AutoregressiveWrapper


def autocast_errors(network: dict[str, Any], scale: float, sharpness: float) -> dict[str, Counter[str]]:
    """Errors of upstream's wrapper and of ours under fp16 autocast, added up over a few seeds.

    Squared distances from float64 of the loss, of all gradients, and of the head's; how many gradients are lost to 0,
    and how many are not finite. The loss is multiplied by `scale` before the backward pass, the gradients divided by it
    after. The head is multiplied by `sharpness`, which makes most words improbable.
    """
    v, b, n = 1500, 3, 30
    wrappers = {
        'upstream': x_transformers.AutoregressiveWrapper,
        'ours': lambda net: AutoregressiveWrapper(net, fused=True),
    }
    found = {name: Counter() for name in wrappers}
    for seed in range(4):

        def make(dtype: torch.dtype, seed: int = seed) -> TransformerWrapper:
            net = decoder(num_tokens=v, dim=32, seed=seed, dtype=dtype, **network)
            head = net.token_emb.emb if network else net.to_logits
            head.weight.data.mul_(sharpness)
            return net

        x = torch.randint(0, v, (b, n))
        loss = x_transformers.AutoregressiveWrapper(exact := make(torch.float64))(x)
        want_loss, want = loss.item(), gradients(loss, exact)
        for name, cls in wrappers.items():
            wrapper = cls(make(torch.float32))
            with torch.autocast('cpu', dtype=torch.float16):
                loss = wrapper(x)
            found[name]['loss'] += (loss.item() - want_loss) ** 2
            for parameter, grad in gradients(loss * scale, wrapper.net).items():
                off, exactly = grad.double() / scale - want[parameter], want[parameter]
                found[name]['infinite'] += (~grad.isfinite()).sum().item()
                found[name]['lost'] += ((grad == 0) & (exactly != 0)).sum().item()
                found[name]['gradient'] += off.square().sum().item()
                if parameter in ('to_logits.weight', 'token_emb.emb.weight'):
                    found[name]['head'] += off.square().sum().item()
    return found


@pytest.mark.parametrize('network', [{}, {'tie_embedding': True}])
@pytest.mark.parametrize('sharpness', [1.0, 10.0])
def test_fp16_autocast_with_a_scaled_loss_keeps_what_upstream_keeps(network: dict[str, Any], sharpness: float) -> None:
    """Upstream 2.31 makes the loss in fp16, which a scale of 65536 takes to infinity: it is given half of that."""
    errors = autocast_errors(network, 65536.0, sharpness)
    assert errors['ours']['infinite'] == 0
    if errors['upstream']['infinite']:
        errors['upstream'] = autocast_errors(network, 32768.0, sharpness)['upstream']
    assert errors['upstream']['infinite'] == 0
    for what in ('loss', 'gradient', 'head'):
        assert errors['ours'][what] ** 0.5 <= 1.05 * errors['upstream'][what] ** 0.5, what
    assert errors['ours']['lost'] <= errors['upstream']['lost']
