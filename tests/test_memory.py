"""How many tensors as large as the logits a loss keeps alive at once: two at most, and none where it is fused."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from networks import Stub, decoder
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xtloss import AutoregressiveWrapper, XLAutoregressiveWrapper, linear_cross_entropy

B, N, VOCAB = 2, 64, 4096
LOGITS = B * N * VOCAB


class LargeTensors(TorchDispatchMode):
    """Watches every tensor that an operation gives, forward and backward, and keeps count of those still alive.

    `peak` is the most elements that storages of at least `large` elements held at one time, `largest` the most elements
    that any one storage held.
    """

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large, self.peak, self.largest = large, 0, 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs, out)):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                elements = storage.nbytes() // t.element_size()
                self.largest = max(self.largest, elements)
                if elements >= self.large:
                    self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), elements))
        self.alive = {k: (ref, n) for k, (ref, n) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(n for _, n in self.alive.values()))
        return out


def watch(wrapper: nn.Module, x: Tensor, large: int, **call: Any) -> LargeTensors:
    """One step of training under watch."""
    with LargeTensors(large) as watched:
        wrapper(x, **call).backward()
    return watched


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('weighting', ['token', 'sequence', 0.3])
def test_two_tensors_of_logits_at_once(weighting: str | float, dtype: torch.dtype) -> None:
    net = decoder(num_tokens=VOCAB, max_seq_len=N, dtype=dtype)
    x = torch.randint(0, VOCAB, (B, N))
    for call in ({}, {'lens': torch.tensor([N, N // 2]), 'loss_weight': torch.ones(B, N)}):
        with LargeTensors(LOGITS // 2) as watched:
            loss, _ = AutoregressiveWrapper(net, loss_weighting=weighting)(x, return_outputs=True, **call)
            del _
            loss.backward()
        peak = watched.peak
        assert LOGITS <= peak <= 2 * LOGITS, f'{peak / LOGITS:.2f} times the logits'


@pytest.mark.parametrize('log_prob', [False, True])
def test_one_more_than_what_the_network_gives(log_prob: bool) -> None:
    """By the allocator's own record: under a dispatch mode, PyTorch's derivative of `gather` makes a copy more."""
    given = torch.randn(B, N, VOCAB).log_softmax(-1).requires_grad_()
    wrapper, x = AutoregressiveWrapper(Stub(given, output_is_log_prob=log_prob)), torch.randint(0, VOCAB, (B, N))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.autograd.grad(wrapper(x), given)

    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = list(accumulate(event.nbytes() for event in events if event.name() == '[memory]'))
    assert given.nbytes * 0.9 < max(held) < given.nbytes * 1.1, f'{max(held) / given.nbytes:.2f} times the logits'


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('masked', [False, True])
def test_the_fused_path_never_has_the_logits(tied: bool, masked: bool) -> None:
    b, n, vocab = 8, 256, 32768
    net = decoder(num_tokens=vocab, max_seq_len=n, dim=8, tie_embedding=tied)
    x = torch.randint(0, vocab, (b, n))
    call = {'lens': torch.tensor([n] * 7 + [n // 2])} if masked else {}
    watched = watch(AutoregressiveWrapper(net, fused=True), x, 1, **call)
    assert watched.largest <= b * n * vocab // 4, f'{watched.largest / (b * n * vocab):.2f} of the logits'


@pytest.mark.parametrize('tied', [False, True])
def test_the_watch_sees_logits_where_they_are_made(tied: bool) -> None:
    x = torch.randint(0, VOCAB, (B, N))
    net = decoder(num_tokens=VOCAB, max_seq_len=N, tie_embedding=tied)
    assert watch(AutoregressiveWrapper(net, fused=False), x, 1).largest >= LOGITS


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('bias', [False, True])
def test_the_chunk_bounds_what_linear_cross_entropy_holds(bias: bool, autocast: bool) -> None:
    tokens, vocab, dim, chunk = 512, 1024, 16, 32
    embed, head = torch.randn(tokens, dim, requires_grad=True), torch.randn(vocab, dim, requires_grad=True)
    target, token_weight = torch.randint(0, vocab, (tokens,)), torch.rand(tokens)
    offset = torch.zeros(vocab, requires_grad=True) if bias else None
    with LargeTensors(chunk * vocab // 2) as watched, torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        loss, _ = linear_cross_entropy(embed, head, target, token_weight, bias=offset, chunk_size=chunk)
        loss.backward()
    assert watched.largest <= chunk * vocab
    assert autocast or watched.peak <= 2 * chunk * vocab + 2 * vocab * dim


def test_the_fused_path_never_has_the_logits_of_a_segment() -> None:
    b, n, vocab = 8, 256, 32768
    net = decoder(num_tokens=vocab, max_seq_len=n // 2, max_mem_len=n // 2, dim=8)
    x, call = torch.randint(0, vocab, (b, n)), {'lens': torch.tensor([n] * 7 + [n // 4])}
    of_segment = b * (n // 2) * vocab
    watched = watch(XLAutoregressiveWrapper(net, fused=True), x, 1, **call)
    assert watched.largest <= of_segment // 2 + vocab, f'{watched.largest / of_segment:.2f} of the logits'
