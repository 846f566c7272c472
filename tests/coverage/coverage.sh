#!/bin/sh
# Lines of mpt.h that the unit and parity tests run, counted by gcov: `make coverage`. At least 97 % of those compiled
# for this CPU; the others are listed, with the reason where reasons.txt knows one. Run from the repository's root.
build=${BUILD:-build}/coverage
least=97
command -v gcov >/dev/null || { echo "coverage.sh: no gcov: 0 passed, 0 failed, 1 skipped" && exit 0; }
rm -rf "$build"
mkdir -p "$build"
flags="-std=c99 -O0 -w --coverage -fprofile-update=atomic -DTEST_STRIDE=65536 -I."
printf '#define MPT_IMPLEMENTATION\n#include "mpt.h"\n' >"$build/mpt.c"
# shellcheck disable=SC2086
gcc $flags -c "$build/mpt.c" -o "$build/mpt.o" || exit 1
failed=0
for test in tests/unit/*.c tests/parity/*.c; do
    program=$build/$(echo "$test" | tr / - | sed 's/\.c$//')
    implemented=-DMPT__IMPLEMENTED object=$build/mpt.o
    grep -q -e mpt__ -e 'ctx->' "$test" && implemented= object= # private names need an implementation beside them
    # shellcheck disable=SC2086
    gcc $flags $implemented -c "$test" -o "$program.o" &&
        gcc --coverage "$program.o" $object -o "$program" -lm -pthread &&
        "$program" >"$program.log" 2>&1 </dev/null || { failed=$((failed + 1)) && tail -n 5 "$program.log"; }
done
# Every object that mpt.h is in has counts of it: a line is run if one of them says so.
for notes in "$build"/*.gcno; do gcov -t "$notes" 2>/dev/null; done | awk '
    /^ *-: *0:Source:/ { sub(/.*Source:/, ""); here = $0 ~ /(^|\/)mpt\.h$/ }
    here && match($0, /^ *[^:]*: *[0-9]*:/) {
        split($0, part, ":")
        line = part[2] + 0
        if (line && part[1] !~ /-/) { known[line] = 1; if (part[1] ~ /[0-9]/ && part[1] !~ /#|=/) run[line] = 1 }
    }
    END { for (line in known) print line, line in run ? 1 : 0 }' | sort -n >"$build/lines"
grep -qw avx512f /proc/cpuinfo 2>/dev/null && wide=1 || wide=0
awk -v least=$least -v wide=$wide -v failed=$failed '
    FILENAME ~ /reasons/ {
        if (split($0, part, "\t") == 2) { pattern[++reasons] = part[1]; reason[reasons] = part[2] }
        next
    }
    FILENAME ~ /mpt\.h$/ {
        text[FNR] = $0
        if ($0 ~ /_avx512[(,]/ && $0 !~ /;$/) other = 1
        foreign[FNR] = other && !wide
        if ($0 == "}") other = 0
        next
    }
    foreign[$1] { left_out++; next }
    { lines++; run += $2 }
    !$2 {
        why = "NO REASON KNOWN"
        for (i = 1; i <= reasons; i++) if (index(text[$1], pattern[i])) why = reason[i]
        printf "mpt.h:%d: %s    -- %s\n", $1, text[$1], why
    }
    END {
        printf "%d of %d lines run: %.2f %%; %d for AVX-512 left out, which this CPU lacks (see make portable)\n", run,
            lines, 100 * run / lines, left_out
        bad = 100 * run < least * lines || failed > 0
        printf "coverage.sh: %d passed, %d failed\n", !bad, bad
        exit bad
    }' tests/coverage/reasons.txt mpt.h "$build/lines"
