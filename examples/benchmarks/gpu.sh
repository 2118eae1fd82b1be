#!/usr/bin/env bash
# All that a GPU can tell, in about ten minutes, from a checkout with `pip install -e ".[test]"`, a CUDA build of torch and
# a text of a few megabytes, enwik8 say. What it prints belongs into examples/README.md, with the card's name.
#
#   examples/benchmarks/gpu.sh PATH
set -uo pipefail
text=$(realpath "${1:?usage: gpu.sh PATH of a text}")
cd "$(dirname "$0")/../.."
python -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)' || exit 2
pip install --quiet liger-kernel cut-cross-entropy || echo 'without liger-kernel and cut-cross-entropy'

failed=0
step() { printf '\n== %s\n' "$*" && timeout 300 "$@" || { failed=1 && echo "== failed: $*"; }; }
step pytest tests/test_weighting.py tests/test_fused*.py tests/test_accelerated.py tests/test_memory.py # on every device
step python examples/benchmarks/bench_loss.py --device cuda --suite --seconds 5
step python examples/benchmarks/bench_loss.py --device cuda --dtype bfloat16 --tokens 16384 --vocab 128256 --dim 2048 --seconds 5
step python examples/benchmarks/bench_packing.py --device cuda --data "$text"
step python examples/benchmarks/bench_packing.py --device cuda --data "$text" --lines 32 --vocab 32768
step python examples/benchmarks/bench_unpad.py --device cuda
exit $failed
