"""The network of bytes, and its loss."""

from __future__ import annotations

from command_line import UsageError
from enwik8.config import Config
from x_transformers import Decoder, TransformerWrapper

from xtloss import AutoregressiveWrapper


def build_model(config: Config) -> AutoregressiveWrapper:
    """Build the network and its loss. Raises `UsageError` for a weighting that is none."""
    net = TransformerWrapper(
        num_tokens=256,
        max_seq_len=config.seq_len,
        attn_layers=Decoder(
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            rotary_pos_emb=True,
            attn_flash=True,
            attn_orthog_projected_values=config.orthog_values,
            attn_orthog_projected_values_per_head=config.orthog_values,
            verbose=False,
        ),
    )
    try:
        return AutoregressiveWrapper(
            net,
            equal_loss_weight_batch=config.equal_loss_weight_batch,
            loss_weighting=config.loss_weighting,
            unpad=config.unpad,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
