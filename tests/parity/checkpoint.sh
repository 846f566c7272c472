#!/bin/sh
# Does PyTorch load what is written here, strictly, and compute the same with it? Environment: BUILD, PYTHON.
program=${BUILD:-build}/tests/parity/checkpoint
python=${PYTHON:-python3}
"$python" -c 'import torch, numpy' 2>/dev/null || { echo "checkpoint.sh: 0 passed, 0 failed, 1 skipped"; exit 0; }
t=$(mktemp -d)
trap 'rm -rf "$t"' EXIT
if "$program" "$t" && "$python" tests/parity/make_golden_checkpoint.py "$t"; then
    echo "checkpoint.sh: 1 passed, 0 failed"
else
    echo "checkpoint.sh: 0 passed, 1 failed"
    exit 1
fi
