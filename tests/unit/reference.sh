#!/bin/sh
# Models and operations again, on the plain loops of mpt.h's REFERENCE: the checks that ENGINE passes hold for them, too.
build=${BUILD:-build}
for test in unit/model parity/operations; do
    TEST_REFERENCE=1 "$build/tests/$test" || echo "reference.sh: $test: exit status $?"
done | awk '
    / passed, .* failed/ { passed += $2; failed += $4; next }
    { print }
    /exit status/ { failed++ }
    END { print "reference.sh: " passed + 0 " passed, " failed + 0 " failed"; exit failed > 0 || passed == 0 }'
