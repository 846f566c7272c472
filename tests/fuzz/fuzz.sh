#!/bin/sh
# Usage: tests/fuzz/fuzz.sh SECONDS [NAME...]   Runs every fuzzer, or those named, for so long each, from its committed
# corpus and what earlier runs added under $BUILD/fuzz. Needs clang with libFuzzer; without it they are skipped.
build=${BUILD:-build}/fuzz
time=${1:-60}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- $(ls tests/fuzz/*.c | sed 's,.*/,,; s,\.c$,,')
passed=0 failed=0
mkdir -p "$build"
flags="-std=c11 -g -O1 -fno-omit-frame-pointer -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all"
echo 'int LLVMFuzzerTestOneInput(const char *d, unsigned long n); int LLVMFuzzerTestOneInput(const char *d, unsigned long n)
{ return (int)(n && 0 * d[0]); }' >"$build/probe.c"
# shellcheck disable=SC2086
if ! clang $flags "$build/probe.c" -o "$build/probe" >/dev/null 2>&1; then
    echo "fuzz.sh: no clang with libFuzzer: 0 passed, 0 failed, $# skipped"
    exit 0
fi
zlib=
echo '#include <zlib.h>' | clang -E -x c - >/dev/null 2>&1 && zlib="-DMPT_TRAINER_ZLIB -lz"
for name; do
    mkdir -p "$build/$name"
    # shellcheck disable=SC2086
    if clang $flags -w -I. "tests/fuzz/$name.c" -o "$build/$name.fuzzer" $zlib -lm -pthread &&
        "$build/$name.fuzzer" "$build/$name" "tests/fuzz/corpus/$name" -max_total_time="$time" -max_len=4096 -timeout=30 \
            -rss_limit_mb=3000 -artifact_prefix="$build/$name-" -print_final_stats=1 >"$build/$name.log" 2>&1; then
        passed=$((passed + 1))
        echo "$name: $(sed -n 's/^stat::number_of_executed_units: *//p' "$build/$name.log") inputs," \
            "$(grep -o 'cov: [0-9]*' "$build/$name.log" | tail -n 1)"
    else
        failed=$((failed + 1))
        echo "$name: failed"
        tail -n 40 "$build/$name.log"
    fi
done
echo "fuzz.sh: $passed passed, $failed failed"
[ $failed -eq 0 ]
