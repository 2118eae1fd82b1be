"""Random calls of the three wrappers, right by the oracle or refused by name, and no growth in memory.

By hand, ``python tests/soak.py --calls 500000``; a short form of it is in `tests/test_laws.py`.
"""

import argparse
import gc
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import fuzz
import torch
from torch import Tensor

WARM_UP = 3_000  # calls, for what is made once: networks, verdicts, arenas of the allocator
MEBIBYTES, TENSORS = 32.0, 5  # what may come to be after that; an allocator may well take 8 MiB once more


def outcomes(seeds: Iterable[int]) -> Counter[str]:
    """How many calls were right, and how many refused."""
    return Counter(fuzz.try_one(seed) for seed in seeds)


def resident() -> float:
    """MiB of memory that this process has; where nobody tells, the most it ever had."""
    statm = Path('/proc/self/statm')
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)


def held() -> tuple[float, int]:
    """Memory, and how many tensors are alive."""
    gc.collect()
    return resident(), sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def growth(before: tuple[float, int], after: tuple[float, int]) -> str | None:
    """What grew, and by how much; None where nothing did."""
    memory, tensors = after[0] - before[0], after[1] - before[1]
    if memory <= MEBIBYTES and tensors <= TENSORS:
        return None
    return f'{memory:.1f} MiB and {tensors} tensors more than after the warm-up'


def main() -> None:
    """Soak, print where it is now and then, and exit with 1 where something is wrong or grew."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--calls', type=int, default=500_000)
    parser.add_argument('--start', type=int, default=0, help='the first seed')
    args = parser.parse_args()
    torch.set_num_threads(1)

    found: Counter[str] = Counter()
    states = []
    with tqdm(range(args.start, args.start + args.calls), mininterval=30, smoothing=0) as bar:
        for call, seed in enumerate(bar, 1):
            try:
                found += outcomes([seed])
            except AssertionError as error:
                found['wrong'] += 1
                bar.write(str(error), file=sys.stderr)
            if call in (WARM_UP, args.calls) or call % 10_000 == 0:
                states.append(held())
                memory, tensors = states[-1]
                state = f'{call} calls: {dict(found)}, {memory:.1f} MiB, {tensors} tensors'
                bar.write(state, file=sys.stderr)
    grown = growth(states[0], states[-1])
    print('nothing grew' if grown is None else grown)
    if found['wrong'] or grown:
        raise SystemExit(1)


if __name__ == '__main__':
    main()
