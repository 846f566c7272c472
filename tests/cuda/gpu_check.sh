#!/usr/bin/env bash
# The first hour on a card in under ten minutes: bash tests/cuda/gpu_check.sh OUT
# Builds for this machine's GPU and runs every check that needs one, each stage with a limit and a log of its own in the
# folder OUT; OUT/summary, printed at the end, has a line a stage. Without a GPU the same stages run on the runner whose
# sources are in CUDACPU, with tiny sizes; those that need a tool that is not there are skipped by name.
# PYTHON: one with PyTorch.
set -u
out=${1:?usage: tests/cuda/gpu_check.sh OUT}
cd "$(dirname "$0")/../.." || exit 1
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
: >"$out/summary"
PYTHON=${PYTHON:-python3}
cuda=${CUDA_HOME:-/usr/local/cuda}
export BUILD=${BUILD:-build}
build=$BUILD/cuda
failed=0

if nvidia-smi -L 2>/dev/null | grep -q GPU; then
    gpu=1 tiny='' target=-arch=native libraries="-lcublas -lcublasLt" jobs=$(nproc)
else
    gpu='' tiny=--tiny target="-gencode arch=compute_80,code=compute_80 -cudart none" jobs=1
    libraries="$build/runner.o -L$PWD/$build/runner -lcudacpu -Xlinker -rpath -Xlinker $PWD/$build/runner"
fi

slow=1
[ -n "$gpu" ] || slow=10 # the runner

note() { # STAGE RESULT SECONDS TEXT
    printf '%-12s %-7s %4d s  %s\n' "$1" "$2" "$3" "$4" | tee -a "$out/summary"
    [ "$2" != FAILED ] || failed=$((failed + 1))
}

# stage NAME LIMIT COMMAND...: its last line is what the summary says of it. All stages together end in time.
stage() {
    local name=$1 limit=$2 began=$SECONDS left=$((565 * slow - SECONDS)) status result=passed
    shift 2
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 1 ]; then
        note "$name" FAILED 0 "no time left"
        return
    fi
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null
    status=$?
    [ $status -eq 0 ] || result=FAILED
    [ $status -ne 124 ] || echo "stopped after $limit s" >>"$out/$name.log"
    note "$name" $result $((SECONDS - began)) "$(tail -n 1 "$out/$name.log" | cut -c 1-90)"
}

skip() { note "$1" skipped 0 "$2"; }
has() { command -v "$1" >/dev/null; }

compile() { # PROGRAM SOURCE FLAGS...
    local program=$1 source=$2
    shift 2
    # shellcheck disable=SC2086
    nvcc -x cu -O2 -std=c++17 -lineinfo $target -I. "$@" -c "$source" -o "$build/$program.o" &&
        nvcc $target "$build/$program.o" -o "$build/$program" $libraries
}

builds() {
    local status=0 pids=''
    mkdir -p "$build"
    [ -n "$gpu" ] || sh tests/cuda/run.sh tests/cuda/counters.c || return 1 # builds the runner, too
    if [ "$jobs" -eq 1 ]; then
        compile probe tests/cuda/probe.cu && compile bench tests/bench/bench_cuda.c &&
            compile train examples/train.c -DMPT_TRAINER_CUDA
        return
    fi
    compile probe tests/cuda/probe.cu & pids="$pids $!"
    compile bench tests/bench/bench_cuda.c & pids="$pids $!"
    compile train examples/train.c -DMPT_TRAINER_CUDA & pids="$pids $!"
    for pid in $pids; do wait "$pid" || status=1; done
    return $status
}

suites() {
    if [ -n "$gpu" ]; then JOBS=$jobs sh tests/cuda/run.sh; else sh tests/cuda/run.sh tests/cuda/{counters,graph}.c; fi
}

sanitizer() { compute-sanitizer --tool "$1" --error-exitcode 1 "$build/bench" --tiny; }
eviction() { compute-sanitizer --tool memcheck --error-exitcode 1 "$build/probe" --tiny evict; }
probe() { # STAGE: its rows, one a line; the last says how many failed
    # shellcheck disable=SC2086
    "$build/probe" $tiny "$1" | tee "$out/probe.$1.csv"
    return "${PIPESTATUS[0]}"
}
benches() {
    # shellcheck disable=SC2086
    "$build/bench" $tiny --csv "$out/bench.csv" && awk -F, '
        $1 == "product" && $2 ~ /square [48]/ { n++; sum += $6 }
        END { if (n) printf "square products at %.3f of the best by cuBLAS\n", sum / n }' "$out/bench.csv"
}
# shellcheck disable=SC2086
peers() { "$PYTHON" tests/cuda/peers_cuda.py $tiny "$out/probe.steps.csv"; }
nodes() {
    ncu --graph-profiling node --clock-control none --launch-skip 20 --launch-count 200 \
        --metrics gpu__time_duration.sum,lts__t_sector_hit_rate.pct,smsp__inst_executed.sum \
        --csv "$build/bench" --tiny
}
library() {
    local began ended
    sh tests/cuda/library.sh || return 1
    [ -n "$gpu" ] || return 0
    for i in cold warm; do
        began=$(date +%s%N)
        [ $i = warm ] || export CUDA_CACHE_DISABLE=1
        "$build/library/program" || return 1
        ended=$(date +%s%N)
        unset CUDA_CACHE_DISABLE
        echo "$i start and training $(((ended - began) / 1000000)) ms"
    done
}
# Twice, with the same columns but for the speed
trainer() {
    local epochs=3
    [ -n "$gpu" ] || epochs=1
    for i in 1 2; do
        "$build/train" --device cuda --model mlp --epochs $epochs --csv "$out/train.$i.csv" || return 1
        sed 's/,[^,]*$//' "$out/train.$i.csv" >"$out/train.$i.columns" # without samples_per_s
    done
    cmp "$out/train.1.columns" "$out/train.2.columns" && echo "two runs, equal columns"
}

export -f builds suites sanitizer eviction probe benches peers nodes library trainer compile
export gpu tiny target libraries jobs out build PYTHON
run() { # NAME LIMIT FUNCTION ARGUMENT...
    local name=$1 limit=$2
    shift 2
    stage "$name" "$limit" bash -c '"$@"' "$name" "$@"
}

if ! has nvcc || { [ -z "$gpu" ] && [ -z "${CUDACPU:-}" ]; }; then
    skip everything "needs nvcc, and a GPU or CUDACPU"
    exit 0
fi
run builds $((120 * slow)) builds
run suites $((150 * slow)) suites
if [ -n "$gpu" ] && has compute-sanitizer; then
    for tool in memcheck racecheck initcheck synccheck; do run $tool 45 sanitizer $tool; done
    run eviction 30 eviction
else
    for name in memcheck racecheck initcheck synccheck eviction; do skip $name "needs a GPU and compute-sanitizer"; done
fi
for name in plans kernels convolutions host errors capture bits evict steps; do run "$name" $((40 * slow)) probe $name; done
run bench $((60 * slow)) benches
if "$PYTHON" -c 'import torch' 2>/dev/null; then run peers $((90 * slow)) peers; else skip peers "needs PyTorch"; fi
if [ -n "$gpu" ] && has ncu; then run nodes 40 nodes; else skip nodes "needs a GPU and ncu"; fi
if [ -e "$cuda/lib64/libcublas.so" ]; then run library $((60 * slow)) library; else skip library "needs $cuda"; fi
run trainer $((40 * slow)) trainer
echo "gpu_check: $failed stages failed, $SECONDS s" | tee -a "$out/summary"
[ "$failed" -eq 0 ]
