#!/bin/sh
# The rules of README.md, which the manual of mpt_cuda.cuh has as well, make a static library with which a
# plain C program links. The program, README's first but for its device, runs on a GPU if there is one, else on the
# runner whose sources are in CUDACPU.
# Usage: [CUDACPU=FOLDER] tests/cuda/library.sh
build=${BUILD:-build}/cuda
folder=$build/library
passed=0 failed=0 skipped=0

check() { # MESSAGE COMMAND...
    message=$1
    shift
    if "$@"; then passed=$((passed + 1)); else
        failed=$((failed + 1))
        echo "library: $message"
    fi
}

if ! command -v nvcc >/dev/null || [ ! -e /usr/local/cuda/lib64/libcublas.so ]; then # where the rule looks for it
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
rm -rf "$folder"
mkdir -p "$folder" || exit 1
cp mpt.h mpt_cuda.cuh "$folder"
printf '#define MPT_CUDA_IMPLEMENTATION\n#include "mpt_cuda.cuh"\n' >"$folder/mpt_cuda.cu"
awk '/^```c$/ { inside = 1; next } /^```/ && inside { exit } inside' README.md |
    sed 's/"mpt.h"/"mpt_cuda.cuh"/; s/mpt_open(/mpt_cuda_open(/' >"$folder/program.c"
awk '/^ *```make$/ { inside = 1; next } /^ *```/ { inside = 0 } inside { sub(/^  /, ""); print }' README.md \
    >"$folder/Makefile"
check "README.md has no rules of five lines" test "$(wc -l <"$folder/Makefile")" -eq 5
check "README.md's rules do not build for all devices" grep -q -e '-arch=all-major' "$folder/Makefile"
check "README.md's first program opens no context" grep -q 'mpt_cuda_open(NULL)' "$folder/program.c"
awk '/libmpt_cuda\.a:/ { inside = 1 } /CONTENTS/ { exit } inside && NF { $1 = $1; print }' mpt_cuda.cuh >"$folder/manual"
awk '{ $1 = $1; print }' "$folder/Makefile" | cmp -s - "$folder/manual"
check "the rule in the manual of mpt_cuda.cuh is another one" test $? -eq 0
# all devices take minutes: built for one here
if nvidia-smi -L 2>/dev/null | grep -q GPU; then arch=native; else arch=sm_80; fi
sed -i "s/-arch=all-major/-arch=$arch/" "$folder/Makefile"
check "the rule fails" make -s -C "$folder" program

libraries=/usr/local/cuda/lib64
if nvidia-smi -L 2>/dev/null | grep -q GPU; then
    run=1
elif [ -n "${CUDACPU:-}" ]; then
    run=1 libraries=$PWD/$build/runner
    make -s -C "$CUDACPU" BUILD="$libraries" >/dev/null || exit 1
else
    run='' skipped=1
fi
if [ -n "$run" ]; then
    LD_LIBRARY_PATH=$libraries "$folder/program" >"$folder/log"
    check "the program fails" test $? -eq 0
    check "the program does not learn: $(cat "$folder/log")" grep -q '^loss 0\.0' "$folder/log"
fi

# A build with --use_fast_math, of which no macro tells, says so when a context opens.
if [ -n "$run" ]; then
    cat >"$folder/fast.cu" <<'END'
#define MPT_IMPLEMENTATION
#include "mpt_cuda.cuh"
#include <stdio.h>
static void show(mpt_log_level, const char *text, void *) { puts(text); }
int main(void) {
    mpt_cuda_desc desc = MPT_ZERO;
    desc.context.log = show;
    mpt_close(mpt_cuda_open(&desc));
    return 0;
}
END
    check "a build with --use_fast_math fails" nvcc -O2 -arch=$arch -cudart shared --use_fast_math -I"$folder" \
        "$folder/fast.cu" -o "$folder/fast" -lcublas -lcublasLt
    LD_LIBRARY_PATH=$libraries "$folder/fast" >"$folder/log"
    check "--use_fast_math goes unnoticed" grep -q 'fast_math' "$folder/log"
fi

[ "$skipped" -eq 0 ] && tail= || tail=", $skipped skipped"
echo "library: $passed passed, $failed failed$tail"
[ "$failed" -eq 0 ]
