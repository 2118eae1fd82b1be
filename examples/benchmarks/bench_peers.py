"""What bench_loss.py compares, and how each is measured: time in interleaved rounds, memory in a process of its own.

Dims: N tokens = b rows of n, d width, V vocabulary.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script, its own folder alone is searched
import command_line  # noqa: F401  before any package: it says which one is missing
import torch
import torch.nn.functional as F
import x_transformers
from command_line import say
from measuring import synchronize
from torch import Tensor, nn
from tqdm import tqdm
from x_transformers import Decoder, TransformerWrapper

from xtloss import AutoregressiveWrapper, XLAutoregressiveWrapper, linear_cross_entropy

IGNORED = -100


class Shape(NamedTuple):
    """The size of a problem, and where it is solved."""

    tokens: int
    dim: int
    vocab: int
    uncounted: float = 0.0  # the part of the targets that does not count
    rows: int = 8
    depth: int = 4  # of the network, in whole training steps
    device: str = 'cpu'
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        uncounted = f', {self.uncounted:.0%} uncounted' if self.uncounted else ''
        return f'N={self.tokens}, d={self.dim}, V={self.vocab}{uncounted}'


class Problem(NamedTuple):
    """A head and what it is given."""

    embed: Tensor  # (N, d)
    head: Tensor  # (V, d)
    target: Tensor  # (N,), IGNORED where it does not count
    rows: int


@cache
def problem(shape: Shape) -> Problem:
    """Draw the problem of a shape; the same one for all its peers."""
    torch.manual_seed(0)
    like: Any = {'device': shape.device, 'dtype': shape.dtype}
    embed = torch.randn(shape.tokens, shape.dim, **like)
    head = torch.randn(shape.vocab, shape.dim, **like) * shape.dim**-0.5
    target = torch.randint(0, shape.vocab, (shape.tokens,), device=shape.device)
    target[torch.randperm(shape.tokens, device=shape.device)[: round(shape.uncounted * shape.tokens)]] = IGNORED
    return Problem(embed.requires_grad_(), head.requires_grad_(), target, shape.rows)


# head and loss


def products(p: Problem) -> None:
    """Compute the logits, d logits → dX and d logits → dW: the least a head can cost."""
    with torch.no_grad():
        logits = p.embed @ p.head.t()  # (N, V)
        _ = logits @ p.head, logits.t() @ p.embed  # (N, d), (V, d)


def products_by_columns(p: Problem) -> None:
    """Compute the same for chunks of 512 tokens whose logits lie by columns: the fastest layout known on a CPU."""
    with torch.no_grad():
        store = torch.empty(p.head.shape[0], 512, dtype=p.head.dtype, device=p.head.device).t()  # (r, V)
        d_head = torch.zeros_like(p.head)
        d_embed = torch.empty_like(p.embed)
        for x, d_x in zip(p.embed.split(512), d_embed.split(512), strict=True):
            z = torch.mm(x, p.head.t(), out=store[: len(x)])
            torch.mm(z, p.head, out=d_x)
            torch.addmm(d_head, z.t(), x, out=d_head)


class Head(nn.Module):
    """A network that is nothing but its head: what it embeds is given, whatever it reads."""

    max_seq_len = 1 << 20
    add_continuous_pred_head = looped = output_is_log_prob = can_cache_kv = False

    def __init__(self, embed: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.embed, self.weight = embed, weight

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, None]:
        return F.linear(self.embed.view(*x.shape, -1), self.weight), None


def upstream(p: Problem) -> Tensor:
    """x-transformers' wrapper, which slices off the last position and calls its cross-entropy on (b, V, n)."""
    return x_transformers.AutoregressiveWrapper(Head(p.embed, p.head))(p.target.view(p.rows, -1))


def cross_entropy_bvn(p: Problem) -> Tensor:
    logits = F.linear(p.embed.view(p.rows, -1, p.embed.shape[1]), p.head)  # (b, n, V)
    return F.cross_entropy(logits.transpose(1, 2), p.target.view(p.rows, -1), ignore_index=IGNORED)


def cross_entropy_flat(p: Problem) -> Tensor:
    return F.cross_entropy(F.linear(p.embed, p.head), p.target, ignore_index=IGNORED)


def torch_chunked(p: Problem, **options: Any) -> Tensor:
    chunked = nn.LinearCrossEntropyOptions(**options)
    return F.linear_cross_entropy(p.embed, p.head, p.target, ignore_index=IGNORED, options=chunked)


def liger(p: Problem) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(p.embed, p.head, p.target, ignore_index=IGNORED)


def cut(p: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

    return cut_cross_entropy(p.embed, p.head, p.target, ignore_index=IGNORED)


def xtloss(p: Problem) -> Tensor:
    """linear_cross_entropy, of the counted rows alone where some do not count, as the wrapper calls it."""
    embed, target = p.embed, p.target
    counted = target != IGNORED
    if not counted.all():
        index = counted.nonzero().squeeze(1)
        embed, target = embed.index_select(0, index), target[index]
    loss, _ = linear_cross_entropy(embed, p.head, target, torch.ones_like(target, dtype=torch.float32))
    return loss / len(target)


# whole training steps


@cache
def network(shape: Shape, segments: int = 1) -> TransformerWrapper:
    """Build the network of a shape; the same one for both wrappers. It reads a row in so many segments."""
    torch.manual_seed(0)
    heads = max(1, shape.dim // 64)
    layers = Decoder(
        dim=shape.dim,
        depth=shape.depth,
        heads=heads,
        attn_dim_head=shape.dim // heads,
        rotary_pos_emb=True,
        attn_flash=True,
        verbose=False,
    )
    n = shape.tokens // shape.rows // segments
    net = TransformerWrapper(num_tokens=shape.vocab, max_seq_len=n, max_mem_len=n, attn_layers=layers)
    return net.to(shape.device, shape.dtype)


def whole_step(model: nn.Module, shape: Shape) -> Callable[[], Tensor]:
    """Return the forward pass of a wrapper; the rows are of different lengths where some targets do not count."""
    n, counted = shape.tokens // shape.rows, 1 - shape.uncounted
    x = torch.randint(0, shape.vocab, (shape.rows, n), device=shape.device)
    spread = torch.linspace(-0.75, 0.75, shape.rows, device=shape.device) * min(counted, shape.uncounted)
    told = {'lens': ((counted + spread) * n).round().long()} if shape.uncounted else {}
    return lambda: model(x, **told)


# the peers by name

PRODUCTS, BY_COLUMNS, UPSTREAM, OURS = 'three matrix products', 'three products by columns', 'x-transformers', 'xtloss'
STEP_UPSTREAM, STEP_OURS = 'x-transformers, whole step', 'xtloss, whole step'
XL_UPSTREAM, XL_OURS = 'x-transformers, whole XL step', 'xtloss, whole XL step'  # in two segments
CHUNKED = ('F.linear_cross_entropy, its own chunks', 'F.linear_cross_entropy, chunks of 512')
HEADS: dict[str, Callable[[Problem], Tensor | None]] = {
    PRODUCTS: products,
    BY_COLUMNS: products_by_columns,
    UPSTREAM: upstream,
    'F.cross_entropy, (b, vocab, n)': cross_entropy_bvn,
    'F.cross_entropy, flat': cross_entropy_flat,
}
if hasattr(F, 'linear_cross_entropy'):  # torch 2.13
    HEADS |= {CHUNKED[0]: torch_chunked, CHUNKED[1]: lambda p: torch_chunked(p, batch_chunk_size=512)}
if torch.cuda.is_available():
    modules = {'liger_kernel': ('liger-kernel', liger), 'cut_cross_entropy': ('cut-cross-entropy', cut)}
    HEADS |= {name: function for module, (name, function) in modules.items() if find_spec(module)}
HEADS[OURS] = xtloss

WHOLE: dict[str, tuple[type[nn.Module], int]] = {  # and in how many segments it reads a row
    STEP_UPSTREAM: (x_transformers.AutoregressiveWrapper, 1),
    STEP_OURS: (AutoregressiveWrapper, 1),
    XL_UPSTREAM: (x_transformers.XLAutoregressiveWrapper, 2),
    XL_OURS: (XLAutoregressiveWrapper, 2),
}


def make_step(peer: str, shape: Shape) -> Callable[[], None]:
    """Return one forward and backward pass, ready to run, which leaves no gradients behind."""
    if peer in WHOLE:
        wrapper, segments = WHOLE[peer]
        model = wrapper(network(shape, segments))
        leaves, forward = list(model.parameters()), whole_step(model, shape)
    else:
        p = problem(shape)
        leaves, forward = [p.embed, p.head], lambda: HEADS[peer](p)

    def step() -> None:
        loss = forward()
        if loss is not None:
            loss.backward()
        for leaf in leaves:
            leaf.grad = None

    return step


# how they are measured

Run = tuple[str, Shape]  # a peer and what it is given


class Times(NamedTuple):
    """Seconds of each run, round by round."""

    seconds: dict[Run, list[float]]

    def ms(self, run: Run) -> float:
        """Return the median in milliseconds."""
        return 1000 * median(self.seconds[run])

    def ratio(self, run: Run, other: Run) -> float:
        """Return the median over rounds of the ratio within a round, which slow drifts of the machine leave alone."""
        return median(a / b for a, b in zip(self.seconds[run], self.seconds[other], strict=True))


def tiny(shape: Shape) -> Shape:
    """Return a shape that runs the same code in no time: for warming up."""
    return shape._replace(tokens=8 * shape.rows, dim=64, vocab=128)


def measure_times(runs: Iterable[Run], *, rounds: int, seconds: float, title: str = 'time') -> Times:
    """Time every run once a round, for so many rounds at least and for so many seconds at least."""
    runs = list(dict.fromkeys(runs))
    for peer, shape in runs:
        make_step(peer, tiny(shape))()

    steps = {run: make_step(*run) for run in runs}
    taken: dict[Run, list[float]] = {run: [] for run in runs}
    start, done = time.perf_counter(), 0
    try:
        with tqdm(desc=title, unit=' rounds', leave=False, disable=None) as bar:
            while done < rounds or time.perf_counter() - start < seconds:
                for run, step in steps.items():
                    synchronize()
                    began = time.perf_counter()
                    step()
                    synchronize()
                    taken[run].append(time.perf_counter() - began)
                done += 1
                bar.update()
    finally:  # Ctrl-C too leaves what was measured so far
        medians = {run: 1000 * median(found) for run, found in taken.items() if found}
        say_line(f'{title}, {done} rounds in {time.perf_counter() - start:.0f} s', medians, 'ms')
    return Times(taken)


def say_line(title: str, measured: dict[Run, float], unit: str) -> None:
    """Print what was measured of each run."""
    if measured:
        shapes = {shape for _, shape in measured}
        names = {(peer, shape): peer if len(shapes) == 1 else f'{peer} at {shape}' for peer, shape in measured}
        say(f'{title}: ' + '; '.join(f'{names[run]} {value:,.1f} {unit}' for run, value in measured.items()))


def measure_memory(runs: Iterable[Run], *, threads: int) -> dict[Run, int]:
    """Return the bytes that each run needs at its peak beyond its inputs, in a new process each."""
    runs = list(dict.fromkeys(runs))
    memory: dict[Run, int] = {}
    try:
        for run in tqdm(runs, desc='memory', leave=False, disable=None):
            memory[run] = _memory_of(run, threads)
    finally:  # Ctrl-C too leaves what was measured so far
        say_line('extra peak memory', {run: size / 2**20 for run, size in memory.items()}, 'MiB')
    return memory


def _memory_of(run: Run, threads: int) -> int:
    peer, shape = run
    arguments = json.dumps([peer, shape._replace(dtype=str(shape.dtype).removeprefix('torch.')), threads])
    command = [sys.executable, str(Path(__file__)), arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f'{peer} at {shape} failed in a process of its own:\n{done.stderr}')
    return int(done.stdout.split()[-1])


def peak_memory(peer: str, shape: Shape) -> int:
    """Run one step in this process; bytes at the peak beyond what was there once inputs and libraries were loaded."""
    make_step(peer, tiny(shape))()
    step = make_step(peer, shape)
    if shape.device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = resident('VmRSS')
    step()
    return resident('VmHWM') - before


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the peak; ru_maxrss would begin with that of the parent process."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f'no {field} in /proc/self/status: peak memory is measured on Linux only')


if __name__ == '__main__':
    if len(sys.argv) != 2:
        print('bench_peers.py: run bench_loss.py, of which this is a part', file=sys.stderr)
        sys.exit(2)
    name, fields, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    *sizes, dtype = fields
    print(peak_memory(name, Shape(*sizes, dtype=getattr(torch, dtype))))
