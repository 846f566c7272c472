#!/bin/sh
# The trainer over NCCL, on the runner: two, three and four ranks, which are processes with a GPU each, write the
# checkpoint of one with as much --accumulate; another seed on one of two ends both with the reason.
# Usage: CUDACPU=FOLDER tests/cuda/nccl.sh, after run.sh, which builds the runner and the objects of both headers
nvcc=${NVCC:-nvcc}
build=${BUILD:-build}/cuda
runner=$PWD/$build/runner
if [ -z "${CUDACPU:-}" ] || ! command -v mpirun >/dev/null || ! command -v mpicxx >/dev/null ||
    ! echo '#include <nccl.h>' | "$nvcc" -x cu -E - >/dev/null 2>&1; then
    echo "nccl.sh: 0 passed, 0 failed, 1 skipped"
    exit
fi
t=$(mktemp -d)
trap 'rm -rf "$t"' EXIT
passed=0 failed=0

check() { # check STATUS WHAT
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "nccl.sh: $2"; fi
}

train=$build/train_nccl
"$nvcc" -ccbin mpicxx -x cu -O2 -std=c++17 -Xcompiler -Wall,-Wextra -gencode arch=compute_75,code=compute_75 \
    -DMPT_TRAINER_CUDA -DMPT_TRAINER_MPI -DMPT_TRAINER_NCCL -DMPT__IMPLEMENTED -DMPT__CUDA_IMPLEMENTED \
    -include cuda_runtime.h -I. -c examples/train.c -o "$train.o" &&
    "$nvcc" -ccbin mpicxx -cudart none "$train.o" "$build/cpu.o" "$build/cuda.o" "$build/runner.o" -o "$train" \
        -L"$runner" -lcudacpu -lnccl -Xlinker -rpath -Xlinker "$runner"
check $? "the trainer does not compile"

# A stream of the runner goes on only while its process calls CUDA. So rank 0 must not wait for one while rank 1 waits for
# MPI, as it would for the loss that it shows on a terminal, which Open MPI makes of standard output.
export CUDACPU_DEVICES=4 t
ranks() { # ranks NP OPTION...
    np=$1
    shift
    # shellcheck disable=SC2016,SC2086
    timeout 300 mpirun $mpi -np "$np" sh -c 'exec "$0" "$@" >>"$t/out"' "$train" --nccl "$@" 2>"$t/err"
}
mpi=
if mpirun --version | grep -q 'Open MPI'; then mpi="--oversubscribe --allow-run-as-root"; fi
options="--model cnn --policy O2 --type f16 --epochs 1 --batch 32"
for np in 2 3 4; do
    "$train" --device cuda $options --accumulate $np --save "$t/alone" >"$t/out" 2>"$t/err" # split into words
    check $? "one rank: $(cat "$t/err")"
    : >"$t/out"
    rm -f "$t/csv"
    ranks $np $options --save "$t/ranks" --csv "$t/csv"
    check $? "$np ranks: $(cat "$t/err")"
    cmp "$t/alone" "$t/ranks"
    check $? "the checkpoint of $np ranks is another than that of one"
    [ "$(wc -l <"$t/csv")" -eq 2 ] && [ "$(grep -c '^cnn  *O2' "$t/out")" -eq 1 ]
    check $? "$np ranks: not one table and one CSV file: $(cat "$t/out" "$t/csv")"
    rm -f "$t/alone" "$t/ranks"
done
timeout 300 mpirun $mpi -np 1 "$train" --nccl $options : -np 1 "$train" --nccl $options --seed 2 >"$t/out" 2>"$t/err"
[ $? -ne 0 ] && grep -q 'rank 1 has another model, seed or setting than rank 0' "$t/err"
check $? "another seed on rank 1: $(cat "$t/err")"

echo "nccl.sh: $passed passed, $failed failed"
[ "$failed" -eq 0 ]
