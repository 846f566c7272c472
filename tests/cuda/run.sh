#!/bin/sh
# Usage: [CUDACPU=FOLDER] [NVCC=nvcc] tests/cuda/run.sh [TEST.c...]
# Builds the tests with nvcc and runs them with device = cuda: on a GPU if there is one, else on the runner whose
# sources are in CUDACPU. With neither it compiles and links for all architectures and says that nothing was run.
NVCC=${NVCC:-nvcc}
build=${BUILD:-build}/cuda
flags="-x cu -O2 -std=c++17 -Xcompiler -Wall,-Wextra -lineinfo -DMPT_TEST_CUDA -DMPT_TRAINER_CUDA -I."
mkdir -p "$build" || exit 1
[ $# -gt 0 ] || set -- tests/unit/*.c tests/parity/*.c tests/train/*.c tests/cuda/*.c tests/bench/bench_cuda.c

command -v "$NVCC" >/dev/null || { echo "no nvcc: nothing was compiled"; echo "0 passed, 0 failed, 1 skipped"; exit 0; }

if nvidia-smi -L 2>/dev/null | grep -q GPU; then
    target="-arch=native" libraries="-lcublas -lcublasLt"
elif [ -n "${CUDACPU:-}" ]; then
    runner=$PWD/$build/runner
    make -s -C "$CUDACPU" BUILD="$runner" >/dev/null || exit 1
    target="-gencode arch=compute_80,code=compute_80 -cudart none"
    libraries="-L$runner -lcudacpu -Xlinker -rpath -Xlinker $runner"
    flags="$flags -DMPT_TEST_RUNNER"
else
    target= libraries="-lcublas -lcublasLt"
    for n in 75 80 86 89 90 100 120; do
        "$NVCC" --list-gpu-code | grep -qx "sm_$n" || continue
        target="$target -gencode arch=compute_$n,code=sm_$n" newest=$n
    done
    target="$target -gencode arch=compute_$newest,code=compute_$newest --threads 2"
    set -- tests/cuda/parity.c
fi

programs=
for source; do
    program=$build/$(echo "$source" | tr / - | sed 's/\.c$//')
    # shellcheck disable=SC2086
    "$NVCC" $flags $target "$source" -o "$program" $libraries || { echo "$source does not compile"; exit 1; }
    programs="$programs $program"
done
if [ "$libraries" = "-lcublas -lcublasLt" ] && [ "$target" != "-arch=native" ]; then
    echo "no GPU and no CUDACPU: compiled and linked for all architectures, and nothing was run"
    echo "1 passed, 0 failed, 1 skipped"
    exit 0
fi
# shellcheck disable=SC2086
BUILD=$build sh tests/run.sh $programs
