#!/bin/sh
# Every C block of README.md and examples/README.md compiles without a warning, and those with a main run; so does the
# program of mpt.h's manual with the calls that its train step is made of. Every exported function is declared, and
# described, in the public part.
cc=${CC:-cc}
folder=${BUILD:-build}/tests/compile/readme
passed=0 failed=0
rm -rf "$folder"
mkdir -p "$folder"
awk -v folder="$folder" '
    /^```c$/ { file = folder "/" ++blocks ".c"; next }
    /^```/ { file = "" }
    file { print > file }' README.md examples/README.md

check() { # check STATUS WHAT
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "readme.sh: $2"; fi
}

for source in "$folder"/*.c; do
    program=${source%.c}
    if grep -q '^int main(' "$source"; then
        $cc -std=c99 -Wall -Wextra -Werror -O2 -I. "$source" -o "$program" -lm -pthread
        check $? "$source does not compile"
        "$program"
        check $? "$source fails"
    else
        $cc -std=c99 -Wall -Wextra -Werror -O2 -I. -c "$source" -o "$program.o"
        check $? "$source does not compile"
    fi
done
# what it prints is what README says, the loss within a tenth: its last digit may vary by processor
{ sed -n 's/.*it prints `\(loss [^`]*\)`.*/\1/p' README.md; "$folder/1"; } |
    awk '{ loss[NR] = $2; $2 = ""; rest[NR] = $0 }
        END { exit !(NR == 2 && rest[1] == rest[2] && loss[2] > 0.9 * loss[1] && loss[2] < 1.1 * loss[1]) }'
check $? "the first program prints '$("$folder/1")', README says something else"

# ---- the manual of mpt.h: its code stands seven spaces in, and what follows a statement after two spaces is prose ----

awk '/==== MANUAL ====/ { manual = 1 } /^#ifndef MPT_H/ { exit }
    manual && /^       [^ ]/ && /;|^ *for \(.*\)$/ { sub(/;  +.*$/, ";"); print }
    manual && /^           / && /;/ { sub(/;  +.*$/, ";"); print }' mpt.h >"$folder/manual.txt"
{
    printf '#define MPT_IMPLEMENTATION\n#include "mpt.h"\n#include <stdio.h>\n'
    printf 'static float images[32 * 64];\nstatic int32_t labels[32];\nint inputs(mpt_model *net);\n'
    printf 'int inputs(mpt_model *net) {\n'
    awk '/int both/, /mpt_concat/' "$folder/manual.txt"
    printf 'return h;\n}\nvoid weigh(mpt_model *net, int h, const float *weights, const int32_t *masks);\n'
    printf 'void weigh(mpt_model *net, int h, const float *weights, const int32_t *masks) {\n'
    awk '/mpt_loss_desc loss/, /masks/' "$folder/manual.txt"
    printf '}\nint main(void) {\n'
    awk '/mpt_context \*ctx/, /printf\(/' "$folder/manual.txt"
    echo 'mpt_optimizer *opt = mpt_model_optimizer(net);'
    echo 'mpt_scaler *scaler = mpt_model_scaler(net);'
    awk '/mpt_forward\(/, /mpt_scaler_update\(/' "$folder/manual.txt"
    echo 'if (mpt_steps_applied(net) < 1000) return 1;'
    awk '/mpt_model_free\(/, /mpt_close\(/' "$folder/manual.txt"
    echo '}'
} >"$folder/manual.c"
test "$(grep -c 'mpt_' "$folder/manual.c")" -ge 20
check $? "the manual's program was not found in mpt.h"
$cc -std=c99 -Wall -Wextra -Werror -O2 -I. "$folder/manual.c" -o "$folder/manual" -lm -pthread
check $? "the manual's program does not compile"
"$folder/manual" | grep -q '^loss 0'
check $? "the manual's program does not train"

# ---- the public part: a name for every exported function, words for every declaration ----

awk '/==== RULES ====/ && FNR > 100 { exit } { print }' mpt.h >"$folder/public.txt"
if command -v nm >/dev/null; then
    printf '#define MPT_IMPLEMENTATION\n#include "mpt.h"\n' >"$folder/implementation.c"
    $cc -std=c99 -O0 -I. -c "$folder/implementation.c" -o "$folder/implementation.o"
    nm -g --defined-only "$folder/implementation.o" | awk '{ sub(/^_*/, "", $NF); print $NF }' | while read -r name; do
        grep -q "^MPT_[A-Z]* .*[ *]$name(" "$folder/public.txt" || echo "$name"
    done >"$folder/undeclared"
    test ! -s "$folder/undeclared"
    check $? "not in the public part: $(tr '\n' ' ' <"$folder/undeclared")"
fi
awk '/\/\*|\*\// { told = 1 } /^$/ && before !~ /^}/ { told = 0 } { before = $0 }
    /^MPT_(DEF|HD) .*\(/ && !told { print FNR ": " $0 }' "$folder/public.txt" >"$folder/undescribed"
cat "$folder/undescribed"
test ! -s "$folder/undescribed"
check $? "declared without a word"

echo "readme.sh: $passed passed, $failed failed"
[ "$failed" -eq 0 ]
