#!/bin/sh
# The short tests on the runner in each way in which a GPU may differ from its defaults: cuBLASLt without epilogues,
# with one that fills little of the device, with a large workspace, a second device, streams that run late, other
# architectures than its 80. The runner's README has the variables, tests/cuda/runner.cpp one more.
# Usage: CUDACPU=FOLDER tests/cuda/ways.sh [TEST.c...]
[ $# -gt 0 ] || set -- tests/cuda/counters.c tests/cuda/graph.c tests/parity/operations.c
passed=0 failed=0 skipped=0
n='\([0-9]*\)'
if [ -z "${CUDACPU:-}" ] || ! command -v "${NVCC:-nvcc}" >/dev/null; then
    echo "ways: 0 passed, 0 failed, 1 skipped"
    exit 0
fi
for way in CUDACPU_LT_REFUSE=all CUDACPU_LT_REFUSE=bias,relu CUDACPU_LT_REFUSE=bgrad MPT_TEST_WAVES=1 \
    CUDACPU_LT_WORKSPACE=4194304 CUDACPU_DEVICES=2 CUDACPU_LAZY=1 CUDACPU_SM=75 CUDACPU_SM=90; do
    echo "$way"
    more=
    [ "$way" != CUDACPU_SM=75 ] || more=tests/cuda/convolution.c # without the kernel
    # shellcheck disable=SC2086
    log=$(env "$way" sh tests/cuda/run.sh "$@" $more 2>&1)
    status=$?
    echo "$log"
    counts=$(echo "$log" | sed -n "\$s/^$n passed, $n failed\(, $n skipped\)\{0,1\}\$/\1 \2 \4/p")
    [ "$status" -eq 0 ] || echo "$way: exit status $status"
    read -r p f s <<END
${counts:-0 1 0}
END
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + ${s:-0}))
done
[ "$skipped" -eq 0 ] && tail= || tail=", $skipped skipped"
echo "ways: $passed passed, $failed failed$tail"
[ "$failed" -eq 0 ]
