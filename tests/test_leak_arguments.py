"""`segment_leak` beside arguments of the network: masks of every shape, numbers, names that nobody tells."""

from typing import Any

import torch
from networks import decoder
from torch import Tensor, nn
from x_transformers import Decoder, TransformerWrapper

from xtloss import segment_leak


def test_a_mask_of_ones_own() -> None:
    net = decoder(layers_rotary_pos_emb=True, layers_attn_flash=True)
    mask = torch.ones(12, 12, dtype=torch.bool)
    for attn_mask in (mask, mask.expand(2, 12, 12), mask.expand(3, 1, 12, 12)):
        assert segment_leak(net, attn_mask=attn_mask) < 1e-4


class Scaled(TransformerWrapper):
    def forward(self, x: Tensor, *, scale: Tensor, **kwargs: Any) -> Any:
        logits, hiddens = super().forward(x, **kwargs)
        return logits * scale, hiddens


def test_a_number_as_a_tensor() -> None:
    layers = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, rotary_pos_emb=True, verbose=False)
    scaled = Scaled(num_tokens=11, max_seq_len=32, attn_layers=layers)
    assert segment_leak(scaled, scale=torch.tensor(2.0)) < 1e-4


class Open(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = decoder(use_abs_pos_emb=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop('nonsense', None)
        return self.net(*args, **kwargs)


def test_a_network_that_says_nothing_of_its_arguments_may_get_any() -> None:
    assert segment_leak(Open(), nonsense=1) < 1e-4
