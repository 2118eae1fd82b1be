"""upgrade_: the wrappers inside a model become ours, and nothing else about the model changes."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import x_transformers
from networks import assert_same_gradients, continuous_network, decoder, gradients
from oracle import expected
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
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


def continuous(**options: Any) -> nn.Module:
    return x_transformers.ContinuousAutoregressiveWrapper(continuous_network(), **options)


class Model(nn.Module):
    """Anybody's model that builds the wrapper itself, and passes nothing on."""

    def __init__(self, wrapper: nn.Module | None = None) -> None:
        super().__init__()
        self.trainer = wrapper or x_transformers.AutoregressiveWrapper(decoder(num_tokens=VOCAB))

    def forward(self, x: Tensor) -> Tensor:
        return self.trainer(x)


class Subclass(x_transformers.AutoregressiveWrapper):
    """A user's own."""


def test_each_wrapper_becomes_ours() -> None:
    for name in ('AutoregressiveWrapper', 'XLAutoregressiveWrapper'):
        wrapper = getattr(x_transformers, name)(decoder(num_tokens=VOCAB), pad_value=3)
        want = wrapper(ids()).item()
        assert upgrade_(wrapper, loss_weighting='square') is wrapper
        assert type(wrapper) is getattr(xtloss, name)
        assert (wrapper.loss_weighting, wrapper.equal_loss_weight_batch, wrapper.pad_value) == ('square', False, 3)
        assert wrapper(ids()).item() == pytest.approx(want, rel=1e-5)
    wrapper = continuous(equal_loss_weight_batch=True)
    assert upgrade_(wrapper) is wrapper
    assert type(wrapper) is xtloss.ContinuousAutoregressiveWrapper
    assert wrapper.equal_loss_weight_batch is True
    assert upgrade_(wrapper, loss_weighting='square').equal_loss_weight_batch is False


def test_an_upgraded_wrapper_is_a_constructed_one() -> None:
    """Not one attribute is missing or another."""
    options = {'equal_loss_weight_batch': True}
    rows = {'fused': False, 'unpad': True, 'trust_segments': True}
    for name, given in {'AutoregressiveWrapper': rows, 'XLAutoregressiveWrapper': {}}.items():
        upgraded = upgrade_(getattr(x_transformers, name)(decoder()), **options, **given)
        built = getattr(xtloss, name)(decoder(), **options, **given)
        plain = {k: v for k, v in vars(built).items() if not k.startswith('_')}
        assert plain == {k: v for k, v in vars(upgraded).items() if not k.startswith('_')}


def test_xtransformer_weighs_its_targets() -> None:
    model, src, tgt = xtransformer(), ids(), ragged()
    before = model(src, tgt).item()
    encoded = model.encoder(src, return_embeddings=True)
    logits = model.decoder.net(tgt.masked_fill(tgt == PAD, 0), context=encoded)
    assert upgrade_(model, equal_loss_weight_batch=True) is model
    want = expected(logits, tgt, weighting='sequence')
    assert model(src, tgt).item() == pytest.approx(want.loss, rel=1e-5)
    assert before == pytest.approx(expected(logits, tgt).loss, rel=1e-5)
    assert abs(before - want.loss) > 1e-3

    z = model.decoder.loss_normalizer(tgt)  # the parent passes nothing on: its parts are driven
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
    model = nn.ModuleDict({'lm': Model(), 'frames': continuous()}).double().eval()
    model.register_buffer('steps', torch.tensor(3))
    calls: list[str] = []
    model['lm'].trainer.register_forward_hook(lambda *_: calls.append('forward'))
    model['lm'].trainer.register_forward_pre_hook(lambda *_: calls.append('pre'))
    model['lm'].trainer.net.to_logits.requires_grad_(False)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    flags = {name: t.requires_grad for name, t in tensors.items()}
    wrappers = dict(model.named_modules())
    state = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    upgrade_(model, equal_loss_weight_batch=True)
    assert {name: id(m) for name, m in model.named_modules()} == {name: id(m) for name, m in wrappers.items()}
    now = dict(model.named_parameters()) | dict(model.named_buffers())
    assert now.keys() == tensors.keys()
    assert all(now[name] is t and t.requires_grad == flags[name] for name, t in tensors.items())
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert not any(m.training for m in model.modules())
    assert list(state) == list(model.state_dict())

    loss = model['lm'](ids())
    assert calls == ['pre', 'forward']
    loss.backward()
    optimizer.step()
    assert any(not torch.equal(t, state[name]) for name, t in model.state_dict().items())
    fresh = nn.ModuleDict({'lm': Model(), 'frames': continuous()}).double()
    fresh.register_buffer('steps', torch.tensor(0))
    fresh.load_state_dict(model.state_dict())  # a checkpoint of ours fits upstream's
    model.load_state_dict(state)  # and the other way round


def test_a_copy_of_an_upgraded_model_works() -> None:
    model = upgrade_(Model(), equal_loss_weight_batch=True)
    twin = copy.deepcopy(model)
    assert type(twin.trainer) is xtloss.AutoregressiveWrapper
    assert twin(ragged()).item() == model(ragged()).item()


def test_a_shared_wrapper_is_upgraded_once() -> None:
    shared = x_transformers.AutoregressiveWrapper(decoder(num_tokens=VOCAB))
    model = nn.ModuleDict({'one': Model(shared), 'other': Model(shared)})
    upgrade_(model, loss_weighting=0.5)
    assert model['one'].trainer is model['other'].trainer is shared
    assert shared.loss_weighting == 0.5


def test_a_second_call_changes_options() -> None:
    model = upgrade_(Model(), equal_loss_weight_batch=True, fused=False)
    want = {weighting: expected(model.trainer.net(ragged().clamp(min=0)), ragged(), weighting=weighting).loss
            for weighting in ('token', 'sequence', 'square')}  # fmt: skip
    assert model(ragged()).item() == pytest.approx(want['sequence'], rel=1e-5)
    assert upgrade_(model, loss_weighting='square') is model
    assert model(ragged()).item() == pytest.approx(want['square'], rel=1e-5)
    assert model.trainer.fused is False
    upgrade_(model, equal_loss_weight_batch=True)
    assert model(ragged()).item() == pytest.approx(want['sequence'], rel=1e-5)
    upgrade_(model)
    assert model(ragged()).item() == pytest.approx(want['sequence'], rel=1e-5)
    upgrade_(model, equal_loss_weight_batch=False, fused='auto')
    assert model(ragged()).item() == pytest.approx(want['token'], rel=1e-5)
    assert model.trainer.fused == 'auto'


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


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({'fused': False}, r'fused is no option of frames \(ContinuousAutoregressiveWrapper\): it has .*'),
    ({'ignore_index': 0}, r'ignore_index is no option of lm.trainer \(AutoregressiveWrapper\): it has .*'),
    ({'equal_loss_weight_batch': True, 'loss_weighting': 'token'}, 'equal_loss_weight_batch=True stands.*'),
]


@pytest.mark.parametrize(('options', 'message'), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_what_is_refused_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = nn.ModuleDict({'lm': Model(), 'frames': continuous()})
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    with pytest.raises(ValueError, match=f'^{message}$'):
        upgrade_(model, **options)
    assert [(type(m), dict(vars(m))) for m in model.modules()] == before


def test_nothing_to_upgrade() -> None:
    with pytest.raises(ValueError, match=r'^module must hold a wrapper of x-transformers, got Linear$'):
        upgrade_(nn.Linear(2, 2))


def test_a_forward_of_its_own_would_go_on() -> None:
    model = nn.ModuleDict({'first': Model(), 'second': Model()})
    trainer = model['second'].trainer
    trainer.forward = trainer.forward  # what torch.compile(trainer.forward) and accelerate leave
    with pytest.raises(ValueError, match=r'^second.trainer \(AutoregressiveWrapper\) has a forward of its own'):
        upgrade_(model, equal_loss_weight_batch=True)
    assert type(model['first'].trainer) is x_transformers.AutoregressiveWrapper
    del trainer.forward
    upgrade_(model, equal_loss_weight_batch=True)
    trainer.forward = trainer.forward  # ours by now
    upgrade_(model, loss_weighting='square')
    assert trainer.loss_weighting == 'square'


@pytest.mark.slow
@pytest.mark.parametrize('how', ['parent', 'wrapper', 'in place'])
def test_a_compiled_model_compiles_anew(how: str) -> None:
    torch._dynamo.reset()
    model = Model()
    token, sequence = (
        expected(model.trainer.net(ragged().clamp(min=0)), ragged(), weighting=weighting).loss
        for weighting in ('token', 'sequence')
    )
    if how == 'parent':
        run = torch.compile(model, backend='eager')
    elif how == 'wrapper':
        run = model.trainer = torch.compile(model.trainer, backend='eager')
    else:
        model.compile(backend='eager')
        run = model
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # what torch says while it compiles x-transformers
        assert run(ragged()).item() == pytest.approx(token, rel=1e-5)
        upgrade_(run, equal_loss_weight_batch=True)
        assert run(ragged()).item() == pytest.approx(sequence, rel=1e-5)
        upgrade_(model, loss_weighting='token')
        assert run(ragged()).item() == pytest.approx(token, rel=1e-5)
    torch._dynamo.reset()


@pytest.mark.usefixtures('process_group')
def test_inside_distributed_data_parallel() -> None:
    model = DistributedDataParallel(x_transformers.AutoregressiveWrapper(decoder(num_tokens=VOCAB)))
    model(ids()).backward()
    upgrade_(model, equal_loss_weight_batch=True)
    model.zero_grad()
    loss = model(ragged(), normalizer=torch.tensor(2.0))
    loss.backward()
    alone = xtloss.AutoregressiveWrapper(decoder(num_tokens=VOCAB), equal_loss_weight_batch=True)
    want = alone(ragged(), normalizer=2.0)
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    got = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
    assert_same_gradients(got, gradients(want, alone), 1e-5)


@pytest.mark.usefixtures('process_group')
def test_what_is_sharded_is_a_subclass() -> None:
    """FSDP2 gives what it shards a class of its own."""
    fsdp = pytest.importorskip('torch.distributed.fsdp')
    if not hasattr(fsdp, 'fully_shard'):
        pytest.skip('this torch has no fully_shard')
    mesh = dist.init_device_mesh('cpu', (1,))
    wrapper = x_transformers.AutoregressiveWrapper(decoder(num_tokens=VOCAB))
    fsdp.fully_shard(wrapper, mesh=mesh)
    with pytest.raises(ValueError, match=r'subclasses are left alone: the module itself \(FSDP'):
        upgrade_(wrapper)
    upgraded = upgrade_(x_transformers.AutoregressiveWrapper(decoder(num_tokens=VOCAB)), loss_weighting='square')
    fsdp.fully_shard(upgraded, mesh=mesh)
    assert isinstance(upgraded, xtloss.AutoregressiveWrapper)


def test_xtransformers_readme() -> None:
    """The way x-transformers' README uses XTransformer, in small."""
    model = upgrade_(xtransformer(tie_token_emb=True))
    src, tgt = ids(1, 12), ids(1, 10)
    model(src, tgt, mask=torch.ones_like(src).bool()).backward()
    model(src, tgt, mask=torch.ones_like(src).bool(), src_prepend_embeds=torch.randn(1, 3, 16)).backward()
    assert model.generate(src, tgt[:, :1], 6).shape == (1, 6)
