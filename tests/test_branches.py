"""Branches that no other test goes down: rare arguments, networks that are not x-transformers', errors of others."""

from typing import Any, NamedTuple

import pytest
import torch
from networks import Stub, decoder, gradients
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from x_transformers import Decoder, TransformerWrapper

from xtloss import AutoregressiveWrapper, segment_leak
from xtloss.losses.cross_entropy import composite_cross_entropy, cross_entropy
from xtloss.packing.experiment import NoPlaceError, bare, leak
from xtloss.wrappers.stand_in import add_row, drop_row

X = torch.randint(1, 11, (3, 9), generator=torch.Generator().manual_seed(0))
START = torch.tensor([0, 4, 2])


def test_errors_of_torch_that_are_not_about_the_target_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match='int64'):
        cross_entropy(torch.zeros(2, 3), torch.zeros(2), torch.ones(2, dtype=torch.bool))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_transforms_compute_in_float32_too(dtype: torch.dtype) -> None:
    logits, target, counted = torch.randn(5, 7).to(dtype), torch.arange(5), torch.ones(5, dtype=torch.bool)
    want = cross_entropy(logits.float(), target, counted)
    torch.testing.assert_close(composite_cross_entropy(logits, target, counted), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('shape', [(3, 8, 11), (2, 9, 11), (3, 9)])
def test_a_network_that_returns_something_else(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r'^the network must return \(3, 9 or more, vocab\), got'):
        AutoregressiveWrapper(Stub(torch.zeros(shape)))(X)


def test_an_embedding_that_is_not_plain_is_not_fused() -> None:
    class Embedding(nn.Embedding):
        pass

    net = decoder(tie_embedding=True)
    net.token_emb.emb.__class__ = Embedding
    with pytest.raises(ValueError, match=r'^fused=True, but .*the tied embedding is not a plain nn.Embedding'):
        AutoregressiveWrapper(net, fused=True)(X)


def test_what_is_inside_wrappers_of_torch() -> None:
    linear = nn.Linear(2, 2)
    assert bare(checkpoint_wrapper(checkpoint_wrapper(linear))) is linear
    assert bare(None) is None


@pytest.mark.parametrize(
    ('options', 'weighting'),
    [({'equal_loss_weight_batch': True}, 'sequence'), ({'loss_weighting': 0.3}, '0.3'), ({}, 'token')],
)
def test_the_weighting_is_shown(options: dict[str, Any], weighting: str) -> None:
    assert f'loss_weighting={weighting}' in repr(AutoregressiveWrapper(decoder(), **options)).replace("'", '')


class Pair(NamedTuple):
    ids: Tensor
    more: dict[str, Any]


def test_a_row_is_given_to_whatever_holds_tensors() -> None:
    none = Pair(
        torch.zeros(0, 2), {'mask': [torch.zeros(0, 2, dtype=torch.bool)], 'scale': 2.0, 'one': torch.tensor(1)}
    )
    some = add_row(none)
    assert isinstance(some, Pair)
    assert torch.equal(some.ids, torch.zeros(1, 2))
    assert some.more['mask'][0].all()
    assert (some.more['scale'], some.more['one'].item()) == (2.0, 1)
    again = drop_row(some)
    assert again.ids.shape == again.more['mask'][0].shape == (0, 2)
    assert again.more['one'].item() == 1


@pytest.mark.parametrize('name', ['sum_embeds', 'condition'])
def test_per_token_arguments_of_another_length_are_refused_by_unpad(name: str) -> None:
    wrapper = AutoregressiveWrapper(decoder(layers_rotary_pos_emb=True), unpad=True)
    with pytest.raises(
        ValueError, match=rf'^unpad=True: {name} must have shape \(3, 9, \.\.\.\) like x, got \(3, 5, 16\)'
    ):
        wrapper(X, lens=START + 2, **{name: torch.zeros(3, 5, 16)})


@pytest.mark.parametrize('relative', ['polar_pos_emb', 'rel_pos_bias', 'rotary_pos_emb'])
def test_starts_beside_absolute_and_relative_positions(relative: str) -> None:
    """Rows that start late have the loss of the rows alone, and what lies before moves nothing."""
    net = decoder(layers_disable_abs_pos_emb=False, **{f'layers_{relative}': True})
    wrapper = AutoregressiveWrapper(net)
    loss = wrapper(X, seq_start_pos=START)
    before = torch.arange(9) < START[:, None]
    torch.testing.assert_close(wrapper(torch.where(before, 10 - X, X), seq_start_pos=START), loss)
    assert len(gradients(loss, wrapper)) > 5
    alone = [wrapper(row[None, start:], normalizer=1.0) for row, start in zip(X, START.tolist(), strict=True)]
    torch.testing.assert_close(loss * (8 + 4 + 6), sum(alone), rtol=1e-5, atol=1e-5)


def test_leaks_beside_other_arguments() -> None:
    """A mask of one's own, of all rows or of each, and a number as a tensor."""
    net = decoder(layers_rotary_pos_emb=True, layers_attn_flash=True)
    mask = torch.ones(12, 12, dtype=torch.bool)
    for attn_mask in (mask, mask.expand(2, 12, 12), mask.expand(3, 1, 12, 12)):
        assert segment_leak(net, attn_mask=attn_mask) < 1e-4

    class Scaled(TransformerWrapper):
        def forward(self, x: Tensor, *, scale: Tensor, **kwargs: Any) -> Any:
            logits, hiddens = super().forward(x, **kwargs)
            return logits * scale, hiddens

    layers = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, rotary_pos_emb=True, verbose=False)
    scaled = Scaled(num_tokens=11, max_seq_len=32, attn_layers=layers)
    assert segment_leak(scaled, scale=torch.tensor(2.0)) < 1e-4


def test_a_network_that_says_nothing_of_its_arguments_may_get_any() -> None:
    class Open(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = decoder(use_abs_pos_emb=False)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            kwargs.pop('nonsense', None)
            return self.net(*args, **kwargs)

    assert segment_leak(Open(), nonsense=1) < 1e-4


def test_what_cannot_be_alone_has_no_place() -> None:
    def compute(x: Tensor, ids: Tensor, where: Any) -> Tensor:
        if x.shape[1] < 64:
            raise ValueError('too short')
        return x.float()[..., None]

    with pytest.raises(NoPlaceError, match='no sequence can be alone'):
        leak(compute, torch.zeros(2, 64), torch.ones(2, 64))
