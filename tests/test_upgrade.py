"""upgrade_: the wrappers inside a model become ours, and nothing else about the model changes."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import x_transformers
from networks import continuous_network, decoder, frames
from oracle import expected
from sharding import fsdp2
from torch import Tensor, nn
from x_transformers import XTransformer
from x_transformers.gpt_vae import GPTVAE

import xtloss
from xtloss import upgrade_

VOCAB, PAD = 11, -100


def ids(b: int = 3, n: int = 9) -> Tensor:
    return torch.randint(1, VOCAB, (b, n), generator=torch.Generator().manual_seed(0))


def ragged(pad: int = PAD) -> Tensor:
    return ids().masked_fill(torch.arange(9) >= torch.tensor([[9], [4], [6]]), pad)


def xtransformer(**options: Any) -> XTransformer:
    torch.manual_seed(0)
    common = {'num_tokens': VOCAB, 'depth': 1, 'heads': 2, 'max_seq_len': 16, 'verbose': False}
    return XTransformer(dim=16, **{f'{part}_{k}': v for part in ('enc', 'dec') for k, v in common.items()}, **options)


class Model(nn.Module):
    """Anybody's model that builds the wrapper itself, and passes nothing on."""

    def __init__(self, wrapper: nn.Module | None = None) -> None:
        super().__init__()
        self.trainer = wrapper or x_transformers.AutoregressiveWrapper(decoder(num_tokens=VOCAB))

    def forward(self, x: Tensor) -> Tensor:
        return self.trainer(x)


class Subclass(x_transformers.AutoregressiveWrapper):
    """A user's own."""


def model_of_two() -> nn.ModuleDict:
    return nn.ModuleDict({
        'lm': Model(), 'frames': x_transformers.ContinuousAutoregressiveWrapper(continuous_network()),
    })  # fmt: skip


def weighted(model: Any, weighting: str) -> Any:
    """The loss of the ragged batch."""
    logits = model.trainer.net(ragged().clamp(min=0))
    return pytest.approx(expected(logits, ragged(), weighting=weighting).loss, rel=1e-5)


WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what it was built with, and what it is upgraded with
    'AutoregressiveWrapper': ({'pad_value': 3}, {'fused': False, 'unpad': True, 'trust_segments': True}),
    'XLAutoregressiveWrapper': ({'pad_value': 3}, {'fused': False}),
    'ContinuousAutoregressiveWrapper': ({'equal_loss_weight_batch': True}, {}),
}


@pytest.mark.parametrize('kind', WRAPPERS)
def test_an_upgraded_wrapper_is_a_constructed_one(kind: str) -> None:
    """Not one attribute is missing or another; without options it goes on as it was."""
    network, x = (continuous_network, frames()) if kind.startswith('Continuous') else (decoder, ids())
    before, options = WRAPPERS[kind]
    wrapper = getattr(x_transformers, kind)(network(), **before)
    want = wrapper(x).item()
    square = options | {'loss_weighting': 'square'}
    for given, as_built in (({}, before), (square, before | {'equal_loss_weight_batch': False} | square)):
        assert upgrade_(wrapper, **given) is wrapper
        built = getattr(xtloss, kind)(network(), **as_built)
        assert type(wrapper) is type(built)
        plain, other = ({k: v for k, v in vars(w).items() if not k.startswith('_')} for w in (built, wrapper))
        assert plain == other
        assert given or wrapper(x).item() == pytest.approx(want, rel=1e-5)


def test_xtransformer_weighs_its_targets() -> None:
    """Used as in x-transformers' README; the parent passes nothing on, so its parts are driven."""
    model, src, tgt = xtransformer(tie_token_emb=True), ids(), ragged()
    before = model(src, tgt).item()
    encoded = model.encoder(src, return_embeddings=True)
    logits = model.decoder.net(tgt.masked_fill(tgt == PAD, 0), context=encoded)
    assert upgrade_(model, equal_loss_weight_batch=True) is model
    want = expected(logits, tgt, weighting='sequence')
    assert model(src, tgt).item() == pytest.approx(want.loss, rel=1e-5)
    assert before == pytest.approx(expected(logits, tgt).loss, rel=1e-5)
    assert abs(before - want.loss) > 1e-3

    z = model.decoder.loss_normalizer(tgt)
    parts = [model.decoder(tgt[i : i + 1], context=encoded[i : i + 1], normalizer=z) for i in range(3)]
    assert sum(parts).item() == pytest.approx(want.loss, rel=1e-5)


def test_gptvae_with_a_pad_id() -> None:
    torch.manual_seed(0)
    sizes = {'num_tokens': VOCAB, 'dim': 16, 'depth': 1, 'enc_depth': 1, 'max_seq_len': 16, 'heads': 2}
    model = GPTVAE(**sizes, attn_dim_head=8, pad_id=0, verbose=False)
    x = ragged(pad=0)
    seen: list[Tensor] = []

    def losses() -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        return model(x, return_all_losses=True)[1]

    before = losses()
    calls: list[dict[str, Any]] = []
    model.decoder.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    model.ar_wrapped_decoder.register_forward_pre_hook(lambda _, __, call: calls.append(call), with_kwargs=True)
    upgrade_(model, equal_loss_weight_batch=True)
    after = losses()
    logits, call = seen[-1], calls[-1]
    counting = {'ignore_index': 0, 'seq_start_pos': call['seq_start_pos'], 'prepend_len': 1}
    want = expected(logits[:, 1:], x, weighting='sequence', **counting)
    assert after[0].item() == pytest.approx(want.loss, rel=1e-5)
    assert before[0].item() == pytest.approx(expected(logits[:, 1:], x, **counting).loss, rel=1e-5)
    assert after[1].item() == before[1].item()


def test_everything_else_survives() -> None:
    model = model_of_two().double().eval()
    model.register_buffer('steps', torch.tensor(3))
    calls: list[str] = []
    trainer = model['lm'].trainer
    trainer.register_forward_hook(lambda *_: calls.append('forward'))
    trainer.register_forward_pre_hook(lambda *_: calls.append('pre'))
    trainer.net.to_logits.requires_grad_(False)

    def parts() -> list[tuple[str, Any, Any]]:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        modules = [(name, id(m), m.training) for name, m in model.named_modules()]
        return modules + [(name, id(t), (t.requires_grad, t.dtype)) for name, t in tensors]

    before, keys = parts(), list(model.state_dict())
    upgrade_(model, equal_loss_weight_batch=True)
    assert parts() == before
    assert list(model.state_dict()) == keys
    model['lm'](ids())
    assert calls == ['pre', 'forward']


def test_a_second_call_changes_options() -> None:
    model, fused = Model(), None
    for options, weighting in (
        ({'equal_loss_weight_batch': True, 'fused': False}, 'sequence'),
        ({'loss_weighting': 'square'}, 'square'),
        ({'equal_loss_weight_batch': True}, 'sequence'),
        ({}, 'sequence'),
        ({'equal_loss_weight_batch': False, 'fused': 'auto'}, 'token'),
    ):
        assert upgrade_(model, **options) is model
        assert model(ragged()).item() == weighted(model, weighting)
        fused = options.get('fused', fused)
        assert model.trainer.fused == fused


def test_a_subclass_is_left_alone_and_reported() -> None:
    model = nn.ModuleDict({'plain': Model(), 'own': Model(Subclass(decoder()))})
    with pytest.warns(UserWarning, match=r'^subclasses are left alone: own\.trainer \(Subclass\)$'):
        upgrade_(model, equal_loss_weight_batch=True)
    assert type(model['own'].trainer) is Subclass
    assert type(model['plain'].trainer) is xtloss.AutoregressiveWrapper
    with pytest.raises(ValueError, match=r'got Model; subclasses are left alone: trainer \(Subclass\)'):
        upgrade_(model['own'])
    with pytest.raises(ValueError, match=r'subclasses are left alone: the module itself \(Subclass\)'):
        upgrade_(model['own'].trainer)


def with_its_own_forward() -> nn.ModuleDict:
    model = nn.ModuleDict({'first': Model(), 'second': Model()})
    trainer = model['second'].trainer
    trainer.forward = trainer.forward  # what torch.compile(trainer.forward) and accelerate leave
    return model


REFUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (model_of_two, {'fused': False}, r'fused is no option of frames \(ContinuousAutoregressiveWrapper\): it has .*'),
    (model_of_two, {'equal_loss_weight_batch': True, 'loss_weighting': 'token'}, 'equal_loss_weight_batch=True .*'),
    (lambda: nn.Linear(2, 2), {}, 'module must hold a wrapper of x-transformers, got Linear'),
    (with_its_own_forward, {}, r'second.trainer \(AutoregressiveWrapper\) has a forward of its own.*'),
]


@pytest.mark.parametrize(('make', 'options', 'message'), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_is_refused_changes_nothing(make: Callable[[], nn.Module], options: dict[str, Any], message: str) -> None:
    model = make()
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    with pytest.raises(ValueError, match=f'^{message}$'):
        upgrade_(model, **options)
    assert [(type(m), dict(vars(m))) for m in model.modules()] == before


def test_a_forward_of_ours_may_go_on() -> None:
    trainer = upgrade_(Model()).trainer
    trainer.forward = trainer.forward
    assert upgrade_(trainer, loss_weighting='square').loss_weighting == 'square'


@pytest.mark.slow
@pytest.mark.usefixtures('whole_graphs')
@pytest.mark.parametrize('how', ['parent', 'in place'])
def test_a_compiled_model_compiles_anew(how: str) -> None:
    model = Model()
    token, sequence = (weighted(model, weighting) for weighting in ('token', 'sequence'))
    run = torch.compile(model, backend='eager') if how == 'parent' else model
    if how == 'in place':
        model.compile(backend='eager')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # what torch says while it compiles x-transformers
        assert run(ragged()).item() == token
        upgrade_(run, equal_loss_weight_batch=True)
        assert run(ragged()).item() == sequence
        upgrade_(model, loss_weighting='token')
        assert run(ragged()).item() == token


@pytest.mark.usefixtures('process_group')
def test_what_is_sharded_is_a_subclass() -> None:
    """FSDP2 gives what it shards a class of its own."""
    wrapper = x_transformers.AutoregressiveWrapper(decoder(num_tokens=VOCAB))
    fsdp2(world=1)(wrapper)
    with pytest.raises(ValueError, match=r'subclasses are left alone: the module itself \(FSDP'):
        upgrade_(wrapper)
