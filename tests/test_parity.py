"""The parity grid: with default options loss, outputs and every gradient are those of x-transformers' own wrapper."""

import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
import x_transformers
from networks import assert_same, decoder, run
from torch import Tensor, nn
from x_transformers import TransformerWrapper

import xtloss

B, N, VOCAB, DIM = 3, 12, 11, 16
INSTALLED = version('x-transformers')
X = torch.randint(0, VOCAB, (B, N), generator=torch.Generator().manual_seed(0))
LENS = torch.tensor([12, 7, 1])


def ignored(ignore_index: int = -100) -> Tensor:
    holes = torch.rand(B, N, generator=torch.Generator().manual_seed(1)) < 0.3
    return X.masked_fill(holes, ignore_index)


def embeds(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


# name: options of the network, of the wrapper, of the call (where x is not given, it is `X`)
NETWORKS: dict[str, dict[str, Any]] = {
    'no positions': {'use_abs_pos_emb': False},
    'scaled sinusoidal': {'scaled_sinu_pos_emb': True},
    'rotary': {'layers_rotary_pos_emb': True},
    'xpos': {'layers_rotary_xpos': True},
    'alibi': {'layers_alibi_pos_bias': True},
    'data dependent alibi': {'layers_attn_data_dependent_alibi': True},
    't5 bias': {'layers_rel_pos_bias': True},
    'dynamic bias': {'layers_dynamic_pos_bias': True},
    'polar': {'layers_polar_pos_emb': True},
    'cope': {'layers_attn_use_cope': True, 'layers_attn_cope_max_pos': 8},
    'flash': {'layers_attn_flash': True},
    'mixture of softmax': {'mixture_of_softmax': True},
    'sigsoftmax': {'sigsoftmax_logits': True},
    'continuous head': {'add_continuous_pred_head': True},
    'tied': {'tie_embedding': True},
    'tied, own scale': {'tie_embedding': True, 'tie_embedding_scale': 0.5},
    'tied, l2norm': {'tie_embedding': True, 'l2norm_embed': True},
    'memory tokens': {'num_memory_tokens': 2},
    'interspersed memory': {'num_memory_tokens': 2, 'memory_tokens_interspersed_every': 4},
    'l2norm': {'l2norm_embed': True},
    'emb_dim': {'emb_dim': 8},
    'recycling': {'recycling': True},
    'squeeze': {'squeeze_out_last_dim': True},
    'attention pool': {'attn_pool': True},
    'deep embed': {'ff_deep_embed': True},
    'post_emb_norm': {'post_emb_norm': True, 'emb_frac_gradient': 0.1},
    'dropout': {'emb_dropout': 0.2, 'layers_attn_dropout': 0.1, 'layers_ff_dropout': 0.1, 'layers_depth': 2},
    'layer dropout': {'layers_layer_dropout': 0.3, 'layers_depth': 3},
    'shift tokens': {'layers_shift_tokens': 1},
    'value residual': {'layers_add_value_residual': True, 'layers_depth': 2, 'layers_ff_glu': True},
    'looped': {'looped': True, 'layers_pre_and_post_norm': True},
    'linear head': {'to_logits': lambda: nn.Linear(DIM, VOCAB)},
}
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    'lens': ({}, {}, {'lens': LENS}),
    'ignored and lens': ({}, {}, {'x': ignored(), 'lens': LENS}),
    'pad_value': ({}, {'pad_value': 3}, {'x': ignored(), 'lens': LENS}),
    'pad is a real id': ({}, {'ignore_index': 0, 'pad_value': 0}, {'x': ignored(0)}),
    'pad is a real id, lens': ({}, {'ignore_index': 4, 'pad_value': 4}, {'lens': LENS}),
    'prepend_embeds': ({}, {}, {'prepend_embeds': embeds(B, 3, DIM), 'lens': LENS}),
    'prepend_mask': ({}, {}, {'prepend_embeds': embeds(B, 2, DIM), 'prepend_mask': torch.ones(B, 2).bool()}),
    'mask_prob': ({}, {'mask_prob': 0.3}, {'lens': LENS}),
    'mask_prob, all keys but one': ({}, {'mask_prob': 0.99}, {}),
    'z-loss': ({}, {'add_attn_z_loss': True}, {}),
    'z-loss, weight': ({}, {'add_attn_z_loss': True}, {'attn_z_loss_weight': 0.1, 'lens': LENS}),
    'cross attention': (
        {'layers_cross_attend': True},
        {},
        {'context': embeds(B, 4, DIM), 'context_mask': torch.arange(4) < torch.tensor([[4], [2], [1]]), 'lens': LENS},
    ),
    'attn_mask': ({}, {}, {'attn_mask': torch.rand(N, N, generator=torch.Generator().manual_seed(3)) < 0.8}),
    'kv mask': ({}, {}, {'self_attn_kv_mask': (torch.arange(N) != 2).expand(B, N)}),
    'pos': ({}, {}, {'pos': torch.arange(N) + 3}),
    'sum_embeds': ({}, {}, {'sum_embeds': embeds(B, N, DIM)}),
    'embed_ids': ({'embed_num_tokens': {'kind': 4}}, {}, {'embed_ids': {'kind': torch.arange(N).expand(B, N) % 4}}),
    'mems': ({'max_mem_len': 4}, {}, {'mems': [embeds(B, 4, DIM)] * 2, 'return_mems': True}),
    'entropies': ({}, {}, {'return_logit_entropies': True}),
    'one row of two tokens': ({}, {}, {'x': torch.tensor([[1, 2]])}),
    'looped, masked': (NETWORKS['looped'], {'looped_exit_loss_weight': 0.5}, {'x': ignored(), 'lens': LENS}),
    'looped, slope': (NETWORKS['looped'], {'looped_loss_slope': 5, 'looped_loss_threshold_exit': 0.1}, {}),
    'looped, two loops': (NETWORKS['looped'] | {'max_looped_steps': 2}, {}, {'lens': LENS}),
    'looped, tied, z-loss': (NETWORKS['looped'] | {'tie_embedding': True}, {'add_attn_z_loss': True}, {}),
    'continuous, masked': (NETWORKS['continuous head'], {'next_embed_loss_weight': 0.7}, {'x': ignored()}),
    'continuous, z-loss': (NETWORKS['continuous head'] | {'tie_embedding': True}, {'add_attn_z_loss': True}, {}),
    'mixture, masked': (NETWORKS['mixture of softmax'] | {'num_memory_tokens': 2}, {'pad_value': 1}, {'x': ignored()}),
    'tied, masked': ({'tie_embedding': True, 'num_memory_tokens': 1}, {'mask_prob': 0.0}, {'x': ignored()}),
    'rotary, mask_prob': ({'layers_rotary_pos_emb': True}, {'mask_prob': 0.5}, {'x': ignored()}),
    'recycling, lens': ({'recycling': True, 'tie_embedding': True}, {}, {'lens': LENS}),
    'dropout, lens': (NETWORKS['dropout'], {}, {'lens': LENS}),
    'emb_dim, l2norm': ({'emb_dim': 8, 'l2norm_embed': True}, {}, {'x': ignored()}),
}
GRID = CALLS | {name: (options, {}, {}) for name, options in NETWORKS.items()}
VANISHING = {'dynamic bias'}  # its gradients are what is left of terms that cancel: rounding, some of them


def build(name: str, wrapper: type[nn.Module], **extra: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The wrapper of that grid row around a network of its own, and the arguments of its call."""
    network, options, call = GRID[name]
    known = inspect.signature(TransformerWrapper.__init__).parameters
    layers = inspect.signature(x_transformers.x_transformers.AttentionLayers.__init__).parameters
    for key in network:
        own = key.removeprefix('layers_')
        if key not in known and own not in layers and not own.startswith(('attn_', 'ff_')):
            pytest.skip(f'x-transformers {INSTALLED} has no {own}')
    network = {k: v() if k == 'to_logits' else v for k, v in network.items()}
    torch.manual_seed(3)
    return wrapper(decoder(**network), **options, **extra), {'x': X} | call


@pytest.mark.parametrize('name', GRID)
def test_loss_gradients_and_outputs(name: str, fused: str | bool) -> None:
    ours, call = build(name, xtloss.AutoregressiveWrapper, fused=fused)
    theirs, _ = build(name, x_transformers.AutoregressiveWrapper)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    tolerance = 1e-4 if 'looped' in name else 1e-5
    assert_same(ours, theirs, call, tolerance, floor=1e-2 if name in VANISHING else 0.0)

    (loss, (logits, cache)), (want, (logits_theirs, cache_theirs)) = (
        run(wrapper, call | {'return_outputs': True}) for wrapper in (ours, theirs)
    )
    assert loss.item() == pytest.approx(want.item(), rel=tolerance)
    torch.testing.assert_close(logits, logits_theirs)
    assert type(cache) is type(cache_theirs)
    given, given_theirs = ({k for k, v in vars(c).items() if v is not None} for c in (cache, cache_theirs))
    assert given == given_theirs


CHANGES: dict[str, Callable[[TransformerWrapper], object]] = {
    'frozen head': lambda net: net.to_logits.requires_grad_(False),
    'frozen trunk': lambda net: [p.requires_grad_(p is net.to_logits.weight) for p in net.parameters()],
    'tensor hook': lambda net: net.to_logits.weight.register_hook(lambda grad: grad * 3),
    'evaluation': lambda net: net.eval(),
}


@pytest.mark.parametrize('change', CHANGES)
def test_of_a_network_that_is_changed(change: str, fused: str | bool) -> None:
    networks = [decoder(layers_attn_dropout=0.5 if change == 'evaluation' else 0.0) for _ in range(2)]
    for net in networks:
        CHANGES[change](net)
    ours = xtloss.AutoregressiveWrapper(networks[0], fused=fused)
    theirs = x_transformers.AutoregressiveWrapper(networks[1])
    assert_same(ours, theirs, {'x': X, 'lens': LENS})
    with torch.no_grad():
        loss = ours(X, lens=LENS)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(run(theirs, {'x': X, 'lens': LENS}).item(), rel=1e-5)


def test_positional_arguments(fused: str | bool) -> None:
    options = (-1, 2, 0.0, True, 0.3, 0.1, 5, 0.5)
    ours = xtloss.AutoregressiveWrapper(decoder(), *options, fused=fused)
    theirs = x_transformers.AutoregressiveWrapper(decoder(), *options)
    assert {k: v for k, v in vars(theirs).items() if k[0] != '_'}.items() <= vars(ours).items()
    assert isinstance(ours, x_transformers.AutoregressiveWrapper)
    for args in ((ignored(-1), False, None, LENS), (X, False, embeds(B, 2, DIM), LENS)):
        assert run(lambda a=args: ours(*a), {}).item() == pytest.approx(theirs(*args).item(), rel=1e-5)
    assert len(ours(X, True)) == 2


PROMPTS = X[:, :4]
SAMPLING: dict[str, Callable[[nn.Module], Any]] = {
    'from lengths': lambda w: w.generate(PROMPTS, 6, prompt_lens=torch.tensor([4, 2, 3]), eos_token=2),
    'beam_search': lambda w: w.beam_search(PROMPTS[:1], 5, beams=3),
    'stochastic beam_search': lambda w: w.beam_search(PROMPTS[:1], 5, stochastic=True, return_beams_and_scores=True),
}


@pytest.mark.parametrize('name', SAMPLING)
def test_sampling_is_inherited(name: str) -> None:
    outs = []
    for cls in (xtloss.AutoregressiveWrapper, x_transformers.AutoregressiveWrapper):
        wrapper = cls(decoder())
        torch.manual_seed(7)
        outs.append(SAMPLING[name](wrapper))
        assert wrapper.training
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)
