#!/bin/sh
# Weights as a C array: what examples/weights_to_c.c makes of a file compiles without a warning, and predicts as the file
# does; and it says what is wrong. Environment: BUILD, CC.
out=${BUILD:-build}/tests/weights_to_c
passed=0 failed=0
rm -rf "$out"
mkdir -p "$out" || exit 1
compile="${CC:-cc} -std=c99 -Wall -Wextra -Wpedantic -Werror -I."
tool=$out/tool

check() { # check STATUS WHAT
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "weights_to_c.sh: $2"; fi
}

# refuses WORD ARGUMENTS...: the tool fails, says so by this word, and writes nothing.
refuses() {
    word=$1
    shift
    ! "$tool" "$@" 2>"$out/why" && grep -q "$word" "$out/why" && [ ! -e "$out/none.c" ]
    check $? "$word: $(cat "$out/why")"
}

printf '#define MPT_IMPLEMENTATION\n#include "mpt.h"\n' >"$out/mpt.c"
# shellcheck disable=SC2086
$compile -O0 -c "$out/mpt.c" -o "$out/mpt.o" && $compile examples/weights_to_c.c -o "$tool"
check $? "it does not compile"
# shellcheck disable=SC2086
$compile tests/compile/weights_to_c.c "$out/mpt.o" -o "$out/saves" -lm -pthread && "$out/saves" "$out/net.safetensors"
check $? "no file was saved"
"$tool" "$out/net.safetensors" "$out/net.c" net_weights
check $? "the tool failed"
# shellcheck disable=SC2086
$compile -I "$out" '-DWEIGHTS="net.c"' tests/compile/weights_to_c.c "$out/mpt.o" -o "$out/loads" -lm -pthread &&
    "$out/loads" "$out/net.safetensors"
check $? "the array is not the file"
refuses usage "$out/net.safetensors" "$out/none.c"
refuses name "$out/net.safetensors" "$out/none.c" 1st
refuses read "$out/missing" "$out/none.c" weights
refuses safetensors "$out/mpt.c" "$out/none.c" weights
refuses written "$out/net.safetensors" "$out/no/none.c" weights
echo "compile/weights_to_c: $passed passed, $failed failed"
[ "$failed" -eq 0 ]
