#!/bin/sh
# Usage: [CUDACPU=FOLDER] [NVCC=nvcc] [JOBS=2] [ALL=1] [LINEINFO=1] tests/cuda/run.sh [TEST.c...]
# Builds the tests with nvcc and runs them with device = cuda: on a GPU if there is one, else on the runner whose
# sources are in CUDACPU. With neither it compiles and links for all architectures and says that nothing was run. With
# no TEST.c a GPU runs all of them and the runner the short ones, or all with ALL=1. The runner's reports name lines of
# the source with LINEINFO=1, for which each program takes half a minute to start.
#
# Both headers are compiled once and linked to the tests, which only include them. A test with private names, mpt__, has
# the CPU's half to itself, one that stands before the CUDA calls the other. Ranks over NCCL are left out where it is not
# installed.
NVCC=${NVCC:-nvcc}
build=${BUILD:-build}/cuda
warnings="-Wall,-Wextra,-Werror"
defines="-DMPT_TEST_CUDA -DMPT_TRAINER_CUDA -I."
mkdir -p "$build" || exit 1

command -v "$NVCC" >/dev/null || { echo "no nvcc: nothing was compiled"; echo "0 passed, 0 failed, 1 skipped"; exit 0; }

libraries="-lcublas -lcublasLt"
if nvidia-smi -L 2>/dev/null | grep -q GPU; then
    target="-arch=native"
    LINEINFO=1
    ALL=1
elif [ -n "${CUDACPU:-}" ]; then
    runner=$PWD/$build/runner
    make -s -C "$CUDACPU" BUILD="$runner" CXXFLAGS=-O3 >/dev/null || exit 1 # -O3: it counts lines, byte by byte
    target="-gencode arch=compute_75,code=compute_75 -gencode arch=compute_80,code=compute_80 -cudart none"
    libraries="$build/runner.o -L$runner -lcudacpu -Xlinker -rpath -Xlinker $runner"
    defines="$defines -DMPT_TEST_RUNNER"
else
    printf '#include "mpt_cuda.cuh"\nint main(void) { return mpt_cuda_open(NULL) != NULL; }\n' >"$build/all.cu"
    # shellcheck disable=SC2086
    "$NVCC" -Werror all-warnings -O2 -std=c++17 -Xcompiler $warnings -arch=all-major -DMPT_IMPLEMENTATION -I. \
        --threads 2 "$build/all.cu" -o "$build/all" $libraries || exit 1
    echo "no GPU and no CUDACPU: compiled and linked for all architectures, and nothing was run"
    echo "1 passed, 0 failed, 1 skipped"
    exit 0
fi

# newer OUTPUT FILE...: is the output there, newer than all files, and made with these flags?
lines=${LINEINFO:+-lineinfo}
made="$target $lines $defines"
newer() {
    output=$1
    shift
    [ -e "$output" ] && [ -z "$(find "$@" -newer "$output")" ] && [ "$(cat "$build/made" 2>/dev/null)" = "$made" ]
}

# compile OUTPUT SOURCE FLAGS...: an object, by nvcc if the source is to be read as CUDA
compile() {
    object=$1 source=$2
    shift 2
    # shellcheck disable=SC2086
    "$NVCC" "$@" -Werror all-warnings -O2 -std=c++17 -Xcompiler $warnings $target $defines -c "$source" \
        -o "$object" && return
    echo "$source does not compile"
    rm -f "$object"
    return 1
}

if [ $# -eq 0 ]; then
    set -- tests/cuda/*.c tests/parity/operations.c tests/parity/optimizers.c tests/bench/bench_cuda.c
    [ -z "${ALL:-}" ] ||
        set -- tests/unit/*.c tests/parity/*.c tests/train/*.c tests/cuda/*.c tests/bench/bench_cuda.c
fi

headers="mpt.h mpt_cuda.cuh"
cpu=$build/cpu.o cuda=$build/cuda.o
if ! newer "$cuda" $headers; then
    printf '#include "mpt_cuda.cuh"\n' >"$build/cuda.cu"
    compile "$cuda" "$build/cuda.cu" -x cu $lines -DMPT_CUDA_IMPLEMENTATION &
    compiling=$!
fi
if ! newer "$cpu" $headers; then
    printf '#include "mpt.h"\n' >"$build/cpu.cpp"
    compile "$cpu" "$build/cpu.cpp" -x c++ -DMPT_IMPLEMENTATION || exit 1
fi
if [ -n "${runner:-}" ] && ! newer "$build/runner.o" tests/cuda/runner.cpp; then
    compile "$build/runner.o" tests/cuda/runner.cpp -x c++ || exit 1
fi
[ -z "${compiling:-}" ] || wait "$compiling" || exit 1

declared="-DMPT__IMPLEMENTED -include cuda_runtime.h"

# test_program PROGRAM SOURCE: compiles and links it
test_program() {
    more=
    if grep -q 'nccl.cuh' "$2"; then
        flags="-x cu $lines $declared -DMPT__CUDA_IMPLEMENTED" objects="$cpu $cuda" more=-lnccl
    elif grep -q 'define cuda' "$2"; then
        flags="-x cu $lines -DMPT__IMPLEMENTED" objects=$cpu
    elif grep -q 'mpt__' "$2"; then
        flags="-x c++ -include cuda_runtime.h" objects=$cuda
    else
        flags="-x c++ $declared" objects="$cpu $cuda"
    fi
    # shellcheck disable=SC2086
    compile "$1.o" "$2" $flags && "$NVCC" $target "$1.o" $objects -o "$1" $libraries $more
}

has_nccl() {
    printf '#include <nccl.h>\nint main(void) { return ncclGroupStart(); }\n' >"$build/nccl.cu"
    # shellcheck disable=SC2086
    "$NVCC" $target "$build/nccl.cu" -o "$build/nccl" $libraries -lnccl >/dev/null 2>&1
}

# JOBS of them at a time
programs='' started=0
for source; do
    if grep -q 'nccl.cuh' "$source" && ! has_nccl; then
        echo "no NCCL: without $source"
        continue
    fi
    program=$build/$(echo "$source" | tr / - | sed 's/\.c$//')
    programs="$programs $program"
    newer "$program" $headers "$source" tests/*.h tests/*/*.h examples/*.h examples/*.cuh examples/*.c && continue
    rm -f "$program"
    test_program "$program" "$source" &
    started=$((started + 1))
    [ $((started % ${JOBS:-1})) -ne 0 ] || wait
done
wait
for program in $programs; do [ -e "$program" ] || exit 1; done
echo "$made" >"$build/made"
# shellcheck disable=SC2086
BUILD=$build sh tests/run.sh $programs
