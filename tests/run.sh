#!/bin/sh
# Usage: [RUNNER="valgrind -q"] [JOBS=4] tests/run.sh PROGRAM...
# Runs every test program, JOBS of them at a time, even after a failure. Each ends with a line `NAME: N passed, N
# failed[, N skipped]` and exits non-zero if any failed; one that does not, or dies, counts as one more failure. The last
# line is the sum.
logs=${BUILD:-build}/tests/log
n='\([0-9]*\)'
rm -rf "$logs"
mkdir -p "$logs"

# What a program prints is shown when it ends, so that two do not mix.
export logs
printf '%s\n' "$@" | xargs -P "${JOBS:-1}" -I '{}' sh -c '
    log=$logs/$(echo "$1" | tr / .)
    began=$(date +%s)
    ${RUNNER:-} "$1" >"$log" 2>&1 </dev/null
    echo $? >"$log.status"
    echo $(($(date +%s) - began)) >"$log.seconds"
    cat "$log"' - '{}'

passed=0 failed=0 skipped=0
for program; do
    log=$logs/$(echo "$program" | tr / .)
    status=$(cat "$log.status" 2>/dev/null || echo missing)
    counts=$(sed -n "\$s/^\(.*: \)\{0,1\}$n passed, $n failed\(, $n skipped\)\{0,1\}\$/\2 \3 \5/p" "$log")
    set -- ${counts:-0 0}
    if [ -z "$counts" ] || { [ "$status" != 0 ] && [ "$2" -eq 0 ]; }; then
        echo "$program: exit status $status, closing line ${counts:-missing}"
        failed=$((failed + 1))
    fi
    [ "$2" -eq 0 ] || echo "$program: $2 failed, see $log"
    passed=$((passed + $1)) failed=$((failed + $2)) skipped=$((skipped + ${3:-0}))
done
[ "$skipped" -eq 0 ] && tail= || tail=", $skipped skipped"
echo "$passed passed, $failed failed$tail"
[ "$failed" -eq 0 ]
