"""The one equation, once more and slowly: the reference that the tests hold xtloss to.

    loss = Σ w[b,i] · ℓ[b,i] / Z        over the b × (n-1) targets of a batch of token ids x, shape (b, n)

Plain Python loops over float64 numbers. Nothing is taken from the package under test, nothing is vectorised.
Target i of a row stands in column i - 1 of every table here, as in the package.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

Table = list[list[float]]  # b rows of n - 1 columns


class Expected(NamedTuple):
    """What the equation gives. `weight` is w with `loss_weight`, `plain_weight` is counted · L^(-p) without it."""

    loss: float
    counted: list[list[bool]]
    weight: Table
    plain_weight: Table
    normalizer: float
    token_loss: Table

    @property
    def shares(self) -> Table:
        """w / Z of each target."""
        return [[w / self.normalizer if self.normalizer else 0.0 for w in row] for row in self.weight]


def counted_targets(
    x: Tensor,
    *,
    ignore_index: int = -100,
    lens: Tensor | None = None,
    mask: Tensor | None = None,
    loss_mask: Tensor | None = None,
    seq_start_pos: Tensor | None = None,
    segment_ids: Tensor | None = None,
    prepend_len: int = 0,
) -> list[list[bool]]:
    """Which targets count, b × (n - 1). `prepend_len` embeddings before the row shift `seq_start_pos`."""
    b, n = x.shape
    table = []
    for row in range(b):
        flags = []
        for i in range(1, n):
            ok = x[row, i].item() != ignore_index
            if lens is not None:
                ok = ok and i < lens[row].item()
            if mask is not None:
                ok = ok and mask[row, i].item() and mask[row, i - 1].item()
            if loss_mask is not None:
                ok = ok and loss_mask[row, i].item()
            if seq_start_pos is not None:
                ok = ok and i + prepend_len > seq_start_pos[row].item()
            if segment_ids is not None:
                here, before = segment_ids[row, i].item(), segment_ids[row, i - 1].item()
                ok = ok and here == before and here != 0
            flags.append(bool(ok))
        table.append(flags)
    return table


def sequences(x: Tensor, segment_ids: Tensor | None = None) -> list[list[tuple[int, int]]]:
    """The (row, column) of each sequence's targets: the rows, or each contiguous run of one non-zero id."""
    b, n = x.shape
    if segment_ids is None:
        return [[(row, i - 1) for i in range(1, n)] for row in range(b)]

    found = []
    for row in range(b):
        run: list[tuple[int, int]] = []
        for i in range(1, n):
            here, before = segment_ids[row, i].item(), segment_ids[row, i - 1].item()
            if here != before:
                found.append(run)
                run = []
            elif here != 0:
                run.append((row, i - 1))
        found.append(run)
    return found


def weights(
    counted: list[list[bool]],
    groups: list[list[tuple[int, int]]],
    weighting: str | float,
    loss_weight: Tensor | None = None,
) -> tuple[Table, Table, float]:
    """The table of w, the same without `loss_weight`, and Z."""
    power = {'token': 0.0, 'sequence': 1.0, 'square': 0.5, 'padded': 0.0, 'sequence_sum': 0.0}.get(weighting, weighting)
    plain = [[0.0] * len(row) for row in counted]
    lengths = []
    for group in groups:
        length = sum(1 for row, column in group if counted[row][column])
        lengths.append(length)
        for row, column in group:
            if counted[row][column]:
                plain[row][column] = length ** -float(power)

    full = [list(row) for row in plain]
    for row, flags in enumerate(counted):
        for column, flag in enumerate(flags):
            if flag and loss_weight is not None:
                factor = loss_weight[row] if loss_weight.ndim == 1 else loss_weight[row, column + 1]
                full[row][column] = plain[row][column] * factor.item()

    if weighting in ('sequence', 'sequence_sum'):
        normalizer = float(sum(1 for length in lengths if length > 0))
    elif weighting == 'padded':
        normalizer = float(sum(len(row) for row in counted))
    else:
        normalizer = math.fsum(w for row in plain for w in row)
    return full, plain, normalizer


def nll(logits: list[float], target: int) -> float:
    """-log softmax(logits)[target], in nats."""
    top = max(logits)
    return top + math.log(math.fsum(math.exp(l - top) for l in logits)) - logits[target]


def looped_token_loss(
    loop_logits: Tensor, exit_logits: Tensor, x: Tensor, slope: float, threshold: float
) -> tuple[Table, Table]:
    """What a token costs a looped network, and what the decision when to leave the loops costs there.

    `loop_logits` (b, loops, n, v), `exit_logits` (b, loops, n). A token costs the mean over loops of its cross-entropy
    times the probability to exit after that loop (never decided at the last, where every token exits). The exit loss
    is the mean over all loops but the last of the binary cross-entropy between the exit logit and
    sigmoid(slope · (cross-entropy after one loop more - cross-entropy now + threshold)).
    """
    b, loops, n, _ = loop_logits.shape

    def sigmoid(t: float) -> float:
        return 1 / (1 + math.exp(-t)) if t > -700 else 0.0

    costs, exits = [], []
    for row in range(b):
        costs.append([])
        exits.append([])
        for column in range(n - 1):
            target = max(int(x[row, column + 1].item()), 0)
            ce = [nll(loop_logits[row, l, column].double().tolist(), target) for l in range(loops)]
            gate = [sigmoid(exit_logits[row, l, column].item()) for l in range(loops)]

            staying, cost = 1.0, 0.0
            for l in range(loops):
                cost += ce[l] * staying * (gate[l] if l < loops - 1 else 1.0)
                staying *= 1 - gate[l]
            costs[row].append(cost / loops)

            decided = 0.0
            for l in range(loops - 1):
                want = sigmoid(slope * (ce[l + 1] - ce[l] + threshold))
                decided -= want * math.log(gate[l]) + (1 - want) * math.log(1 - gate[l])
            exits[row].append(decided / (loops - 1) if loops > 1 else 0.0)
    return costs, exits


def auxiliary(want: Expected, extras: Table) -> float:
    """Σ counted · L^(-p) · extra / Z: an extra loss of each target, weighted without `loss_weight`."""
    terms = [
        weight * extra
        for weights_, row in zip(want.plain_weight, extras, strict=True)
        for weight, extra in zip(weights_, row, strict=True)
        if weight
    ]
    return math.fsum(terms) / want.normalizer if want.normalizer else 0.0


def expected(
    logits: Tensor,
    x: Tensor,
    *,
    weighting: str | float = 'token',
    loss_weight: Tensor | None = None,
    normalizer: float | None = None,
    log_probs: bool = False,
    token_loss: Table | None = None,
    **counting: Any,
) -> Expected:
    """The whole equation by loops. `logits` is (b, n, v), or with `log_probs` already normalised.

    A `token_loss` table replaces cross-entropy, for losses of another kind. `counting` is for `counted_targets`.
    """
    counted = counted_targets(x, **counting)
    groups = sequences(x, counting.get('segment_ids'))
    weight, plain, own = weights(counted, groups, weighting, loss_weight)
    z = own if normalizer is None else float(normalizer)

    losses, total = [], []
    for row, flags in enumerate(counted):
        line = []
        for column, flag in enumerate(flags):
            cost = 0.0
            if flag and token_loss is not None:
                cost = token_loss[row][column]
            elif flag:
                scores, target = logits[row, column].double().tolist(), int(x[row, column + 1].item())
                cost = -scores[target] if log_probs else nll(scores, target)
            if flag:
                total.append(weight[row][column] * cost)
            line.append(cost)
        losses.append(line)

    loss = math.fsum(total) / z if z else 0.0
    return Expected(loss, counted, weight, plain, z, losses)


def differentiable(logits: Tensor, x: Tensor, want: Expected, *, log_probs: bool = False) -> Tensor:
    """The same loss as a tensor with a graph back to `logits`: one term at a time, each with its share from `want`."""
    terms = [logits.sum() * 0] if logits.isfinite().all() else []
    for row, shares in enumerate(want.shares):
        for column, share in enumerate(shares):
            if want.counted[row][column]:
                scores = logits[row, column]
                scores = scores if log_probs else torch.log_softmax(scores, dim=-1)
                terms.append(-share * scores[int(x[row, column + 1].item())])
    return torch.stack(terms).sum()
