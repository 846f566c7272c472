#!/bin/sh
# Every C block of README.md compiles without a warning, and those with a main run.
cc=${CC:-cc}
folder=${BUILD:-build}/tests/compile/readme
passed=0 failed=0
rm -rf "$folder"
mkdir -p "$folder"
awk -v folder="$folder" '
    /^```c$/ { file = folder "/" ++blocks ".c"; next }
    /^```/ { file = "" }
    file { print > file }' README.md

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
"$folder/1" | grep -q '^loss 0\.0'
check $? "the first program does not learn"

echo "readme.sh: $passed passed, $failed failed"
[ "$failed" -eq 0 ]
