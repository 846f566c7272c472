#!/bin/sh
# Usage: [RUNNER="valgrind -q"] tests/run.sh PROGRAM...
# Runs every test program, even after a failure. Each ends with a line `NAME: N passed, N failed[, N skipped]` and exits
# non-zero if any failed; one that does not, or dies, counts as one more failure. The last line is the sum.
passed=0 failed=0 skipped=0
n='\([0-9]*\)'
log=${BUILD:-build}/tests/log
mkdir -p "$(dirname "$log")"
for program; do
    ${RUNNER:-} "$program" >"$log" 2>&1 </dev/null
    status=$?
    cat "$log"
    counts=$(sed -n "\$s/^\(.*: \)\{0,1\}$n passed, $n failed\(, $n skipped\)\{0,1\}\$/\2 \3 \5/p" "$log")
    set -- ${counts:-0 0}
    if [ -z "$counts" ] || { [ "$status" -ne 0 ] && [ "$2" -eq 0 ]; }; then
        echo "$program: exit status $status, closing line ${counts:-missing}"
        failed=$((failed + 1))
    fi
    passed=$((passed + $1)) failed=$((failed + $2)) skipped=$((skipped + ${3:-0}))
done
[ "$skipped" -eq 0 ] && tail= || tail=", $skipped skipped"
echo "$passed passed, $failed failed$tail"
[ "$failed" -eq 0 ]
