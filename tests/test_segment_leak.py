"""segment_leak sees every known leak and none where there is none; and networks that the caller vouches for."""

import copy
import random
from typing import Any

import pytest
import torch
from networks import judged_arguments
from test_around import ACCEPTED, REFUSED, network
from test_segments import BREAKS, IDS, MOVES, UNPROVEN, build, label, needed
from torch import nn

from xtloss import segment_leak
from xtloss.packing.known_networks import APART


@pytest.mark.parametrize('options', [o for o in APART if 'attn_flash_pack_seq' not in o], ids=label)
def test_rounding_where_sequences_keep_apart(options: dict[str, Any]) -> None:
    """Every network of the list, with what it needs."""
    net = build(options)
    assert segment_leak(net, **needed(net)) < 1e-4


@pytest.mark.parametrize(('name', 'options'), MOVES + BREAKS + UNPROVEN, ids=lambda v: v if isinstance(v, str) else '')
def test_known_leaks(name: str, options: dict[str, Any]) -> None:
    """All counterexamples; inf where masks or positions do not fit."""
    net = build(options)
    found = segment_leak(net, **needed(net))
    assert found > 1e-2
    if (name, options) in BREAKS and name != 'scaled_sinu_pos_emb':
        assert found == float('inf')


def test_what_is_around() -> None:
    """The same that is accepted is below, the same that is refused above; a network of 64 tokens looks back 63."""
    for name, change in ACCEPTED.items():
        net = network()
        change(net)
        assert segment_leak(net) < (1e-4 if name != 'bfloat16 inside' else 0.5), name
    for name, (_, change) in REFUSED.items():
        if name not in ('back 100', 'capacity', 'in training'):
            net = network()
            change(net)
            assert segment_leak(net) > 1e-4, name


def test_the_network_stays_as_it_is() -> None:
    """Weights, buffers, modes, gradients and random streams; in half precision and in training too."""
    net = network().bfloat16().train()
    nn.utils.parametrizations.spectral_norm(net.to_logits)
    before = copy.deepcopy(net.state_dict())
    streams = torch.get_rng_state(), random.getstate()
    first = segment_leak(net)
    assert first < 1e-4
    assert segment_leak(net) == first
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert all(torch.equal(t, before[name]) and t.dtype == before[name].dtype for name, t in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_trust() -> None:
    """No verdict where the caller vouches for the network; what never fits is refused all the same."""
    net = build({'shift_tokens': 1})
    assert judged_arguments(net, IDS, {'look_around': 3}, trust=True).keys() == {'look_around', 'attn_mask', 'pos'}
    for name in ('prepend_embeds', 'mems', 'cache', 'pos', 'flash_pack_seq_kwargs'):
        with pytest.raises(ValueError, match=f'segment_ids: {name} is not known'):
            judged_arguments(net, IDS, {name: torch.ones(1)}, trust=True)
    assert judged_arguments(nn.Linear(2, 2), IDS, {}, trust=True).keys() == {'attn_mask'}


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_ids_of_every_integer_dtype(dtype: torch.dtype) -> None:
    net = build({'rotary_pos_emb': True, 'embed_num_tokens': {'kind': 3}})
    ids = {'kind': torch.randint(0, 3, IDS.shape)}
    want = segment_leak(net, embed_ids=ids)
    assert want < 1e-4
    assert segment_leak(net, embed_ids={'kind': ids['kind'].to(dtype)}) == want
