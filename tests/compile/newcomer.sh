#!/bin/sh
# Programs that a newcomer writes from the manual. Environment: BUILD, CC.
build=${BUILD:-build}/tests
mkdir -p "$build"
"${CC:-cc}" -std=c99 -Wall -Wextra -Werror -O1 -I. tests/compile/newcomer.c -o "$build/newcomer" -lm -pthread &&
    "$build/newcomer" && exit
echo "newcomer: 0 passed, 1 failed"
exit 1
