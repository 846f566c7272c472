#!/bin/sh
# Compiles mpt.h in every way that it promises: strict flags, standards, C++, several files, static, without threads;
# looks for writable globals and for names and macros that leak. Run from the repository's root.
# Environment: CC, CXX, BUILD.

CC=${CC:-cc} CXX=${CXX:-c++} BUILD=${BUILD:-build}
dir=$BUILD/tests/compile
warn="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wcast-align -Wundef -Wframe-larger-than=1024"
warn="$warn -Werror"
passed=0 failed=0 skipped=0
mkdir -p "$dir" || exit 1

# check NAME COMMAND...: the command succeeds; else its output is shown.
check() {
    name=$1
    shift
    if "$@" >"$dir/log" 2>&1; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf '%s: failed: %s\n' "$0" "$name"
        head -n 20 "$dir/log"
    fi
}

skip() {
    skipped=$((skipped + 1))
    printf 'skipped: %s\n' "$1"
}

has() { command -v "$1" >/dev/null 2>&1; }

# cxx_check NAME ARGUMENTS...: the C++ compiler succeeds; skipped where there is none.
cxx_check() {
    name=$1
    shift
    if has "$CXX"; then check "$name" "$CXX" "$@"; else skip "$name: $CXX is not installed"; fi
}

# nothing FILE: it is empty; shows it if not.
nothing() {
    cat "$1"
    test ! -s "$1"
}

# The compilers given and the usual ones, but one that is installed under two names only once.
compilers() {
    for name in "$@"; do
        printf '%s %s\n' "$name" "$(readlink -f "$(command -v "$name")")"
    done | awk 'NF < 2 || !seen[$2]++ { if (!named[$1]++) print $1 }'
}

# ---- sources ----

cat >"$dir/implementation.c" <<'END'
#define MPT_IMPLEMENTATION
#include "mpt.h"
END
cat >"$dir/twice.c" <<'END'
#include "mpt.h"
#define MPT_IMPLEMENTATION
#include "mpt.h"
#include "mpt.h"
#include "program.h"
int main(void) { return program(); }
END
cat >"$dir/program.h" <<'END'
static int program(void) {
    const float x[2] = {1, -1}, target = 1;
    mpt_context_desc desc = MPT_ZERO;
    mpt_train_desc train = MPT_ZERO;
    mpt_context *ctx;
    mpt_model *net;
    mpt_result r;
    desc.threads = 2;
    ctx = mpt_open(&desc);
    net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_BF16));
    mpt_mse(net, mpt_relu(net, mpt_linear(net, mpt_input(net, 1, 1, 2), 1, NULL)), NULL);
    train.batch = 1;
    r = mpt_model_build(net, &train);
    if (r == MPT_OK) r = mpt_train_step(net, x, &target);
    r = r == MPT_OK && mpt_steps_applied(net) == 1 && mpt_version() == MPT_VERSION ? MPT_OK : MPT_ERROR_VALUE;
    mpt_model_free(net);
    mpt_close(ctx);
    return (int)r;
}
END
cat >"$dir/user.c" <<'END'
#include "mpt.h"
#include "program.h"
int main(void) { return program(); }
END
cat >"$dir/static_one.c" <<'END'
#define MPT_STATIC
#define MPT_IMPLEMENTATION
#include "mpt.h"
#include "program.h"
int other(void);
int main(void) { return program() + other(); }
END
cat >"$dir/static_two.c" <<'END'
#define MPT_STATIC
#define MPT_IMPLEMENTATION
#include "mpt.h"
#include "program.h"
int other(void);
int other(void) { return program(); }
END

# ---- strict flags: code for one standard, the frames with it; syntax and types for the others ----

for compiler in $(compilers "$CC" gcc clang); do
    has "$compiler" || { skip "$compiler is not installed"; continue; }
    for std in c99 c11 c17; do
        what=-fsyntax-only
        [ $std = c99 ] && what="-O2 -c -o $dir/strict.o"
        check "$compiler -std=$std" "$compiler" -std=$std $warn -Wstrict-prototypes $what -I. "$dir/implementation.c"
        check "$compiler -std=$std, declarations" "$compiler" -std=$std $warn -Wstrict-prototypes -fsyntax-only -I. \
            "$dir/user.c"
    done
done
for compiler in $(compilers "$CXX" g++ clang++); do
    has "$compiler" || { skip "$compiler is not installed"; continue; }
    for std in c++11 c++17 c++20; do
        what=-fsyntax-only
        [ $std = c++11 ] && what="-O2 -c -o $dir/strict.o"
        check "$compiler -std=$std" "$compiler" -x c++ -std=$std $warn $what -I. "$dir/implementation.c"
        check "$compiler -std=$std, declarations" "$compiler" -x c++ -std=$std $warn -fsyntax-only -I. "$dir/user.c"
    done
done

# ---- a user's stricter flags: no declaration of the system repeated, C++ without old casts in what is inline ----

printf '#define MPT_IMPLEMENTATION\n#define LENS_IMPLEMENTATION\n#include "examples/lens.h"\n' >"$dir/lens.c"
printf '#include "mpt.h"\n#include "examples/lens.h"\n' >"$dir/inline.cpp"
for compiler in $(compilers "$CC" gcc clang); do
    has "$compiler" || continue
    for define in -DNONE -D_GNU_SOURCE -D_POSIX_C_SOURCE=200809L; do
        check "$compiler, redundant declarations, $define" "$compiler" -std=c99 $define $warn -Wno-frame-larger-than \
            -Wredundant-decls -fsyntax-only -I. "$dir/lens.c"
    done
done
for compiler in $(compilers "$CXX" g++ clang++); do
    has "$compiler" || continue
    casts=-Wold-style-cast
    "$compiler" --version | grep -q clang || casts="$casts -Wuseless-cast"
    check "$compiler, casts" "$compiler" -std=c++11 $warn $casts -fsyntax-only -I. "$dir/inline.cpp"
    check "$compiler, lens.h" "$compiler" -x c++ -std=c++11 $warn -Wno-frame-larger-than -fsyntax-only -I. "$dir/lens.c"
done

# ---- the course: C99 and C++11 ----

for source in examples/[01][0-9]_*.c; do
    check "$source" "$CC" -std=c99 $warn -Wno-frame-larger-than -Wstrict-prototypes -fsyntax-only "$source"
    cxx_check "$source as C++" -x c++ -std=c++11 $warn -Wno-frame-larger-than -fsyntax-only "$source"
    check "$source: under 150 lines" test "$(wc -l <"$source")" -lt 150
done

# ---- programs: one include too many, several files, static, on the command line, no threads, C++ and C ----

# program NAME COMPILER ARGUMENTS...: builds it with the strict flags, but unoptimised frames may be large, and runs it.
program() {
    title=$1 compiler=$2
    shift 2
    has "$compiler" || { skip "$title: $compiler is not installed"; return; }
    check "$title: build" "$compiler" -O0 $warn -Wno-frame-larger-than -I. "$@" -o "$dir/program" -lm -pthread
    check "$title: run" "$dir/program"
    rm -f "$dir/program"
}

program "included three times" "$CC" -std=c99 "$dir/twice.c"
program "after complex.h, whose I is a macro" "$CC" -std=c99 -include complex.h "$dir/twice.c"
check "the implementation alone" "$CC" -std=c99 -O0 -I. -c "$dir/implementation.c" -o "$dir/implementation.o"
program "two files" "$CC" -std=c99 "$dir/user.c" "$dir/implementation.o"
program "C++ user of a C implementation" "$CXX" -std=c++11 -x c++ "$dir/user.c" -x none "$dir/implementation.o"
program "C++ implementation" "$CXX" -std=c++11 -x c++ "$dir/twice.c" -x none
program "MPT_STATIC in two files" "$CC" -std=c99 "$dir/static_one.c" "$dir/static_two.c"
program "-DMPT_IMPLEMENTATION" "$CC" -std=c99 -DMPT_IMPLEMENTATION -include ./mpt.h "$dir/user.c"
program "MPT_NO_THREADS" "$CC" -std=c99 -DMPT_NO_THREADS "$dir/twice.c"

# ---- messages: arguments that are not what the format says do not compile ----

printf '#include "mpt.h"\nint main(void) { return (int)mpt_fail(0, MPT_OK, "%%s %%zu", "x", (size_t)1); }\n' >"$dir/right.c"
printf '#include "mpt.h"\nint main(void) { return (int)mpt_fail(0, MPT_OK, "%%s %%zu", "x", 1.0); }\n' >"$dir/wrong.c"
check "a right format" "$CC" -std=c99 -Wformat -Werror -fsyntax-only -I. "$dir/right.c"
check "a wrong format is told" sh -c '! "$@" 2>/dev/null' sh "$CC" -std=c99 -Wformat -Werror -fsyntax-only -I. "$dir/wrong.c"

# ---- without stdio.h: files in memory alone ----

cat >"$dir/no_stdio.c" <<'END'
#define MPT_IMPLEMENTATION
#include "mpt.h"
static const float x[] = {0, 0, 0, 1, 1, 0, 1, 1};
static const int32_t y[] = {0, 1, 1, 0};
static mpt_model *net_new(mpt_context *ctx, uint64_t seed) {
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_BF16));
    mpt_train_desc train = MPT_ZERO;
    mpt_softmax_cross_entropy(net, mpt_linear(net, mpt_input(net, 1, 1, 2), 2, NULL), NULL);
    train.batch = 4;
    train.seed = seed;
    return mpt_model_build(net, &train) == MPT_OK ? net : NULL;
}
int main(void) {
    mpt_context *ctx = mpt_open(NULL);
    mpt_model *net = net_new(ctx, 1), *other = net_new(ctx, 2);
    float a[8], b[8];
    size_t size = 0;
    void *bytes;
    if (!net || !other || mpt_train_step(net, x, y) != MPT_OK) return 1;
    if (mpt_weights_save_memory(net, NULL, 0, &size, MPT_F32) != MPT_OK) return 2;
    bytes = malloc(size);
    if (!bytes || mpt_weights_save_memory(net, bytes, size, &size, MPT_F32) != MPT_OK) return 3;
    if (mpt_weights_load_memory(other, bytes, size, NULL) != MPT_OK) return 4;
    if (mpt_predict(net, x, 4, a) != MPT_OK || mpt_predict(other, x, 4, b) != MPT_OK) return 5;
    if (memcmp(a, b, sizeof a) != 0) return 6;
    if (mpt_weights_save(net, "weights", MPT_F32) != MPT_ERROR_UNSUPPORTED || !*mpt_why(ctx)) return 7;
    if (mpt_checkpoint_load(net, "weights") != MPT_ERROR_UNSUPPORTED) return 8;
    free(bytes);
    mpt_model_free(net);
    mpt_model_free(other);
    mpt_close(ctx);
    return 0;
}
END
program "MPT_NO_STDIO: files in memory" "$CC" -std=c99 -DMPT_NO_STDIO "$dir/no_stdio.c"
"$CC" -std=c99 -DMPT_NO_STDIO -I. -E "$dir/no_stdio.c" >"$dir/no_stdio.i"
check "MPT_NO_STDIO: it is preprocessed" grep -q mpt_weights_save_memory "$dir/no_stdio.i"
grep -nwE 'FILE|stdio[.]h|fopen|fwrite' "$dir/no_stdio.i" >"$dir/stdio"
check "MPT_NO_STDIO: no FILE and no stdio.h" nothing "$dir/stdio"

# ---- memory: none from malloc in a step, on any thread ----

cat >"$dir/step.c" <<'END'
#include "mpt.h"
#include <stddef.h>
void *__real_malloc(size_t bytes);
void *__wrap_malloc(size_t bytes);
static int calls;
void *__wrap_malloc(size_t bytes) {
    calls++;
    return __real_malloc(bytes);
}
static const float x[64 * 1024], target[64 * 8];
int main(void) {
    mpt_context_desc desc = MPT_ZERO;
    mpt_train_desc train = MPT_ZERO;
    mpt_context *ctx;
    mpt_model *net;
    int before, step, h;
    desc.threads = 2;
    ctx = mpt_open(&desc);
    net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    h = mpt_batch_norm(net, mpt_conv2d(net, mpt_input(net, 16, 16, 4), 32, 3, NULL), NULL);
    mpt_mse(net, mpt_linear(net, mpt_max_pool2d(net, mpt_relu(net, h), 2, NULL), 8, NULL), NULL);
    train.batch = 64, train.clip_norm = 1;
    if (mpt_model_build(net, &train) != MPT_OK) return 1;
    before = calls;
    for (step = 0; step < 3; step++)
        if (mpt_train_step(net, x, target) != MPT_OK) return 1;
    h = before == 0 || calls != before; /* some were counted, none in a step */
    mpt_model_free(net);
    mpt_close(ctx);
    return h;
}
END
program "no malloc in a step" "$CC" -std=c99 -Wl,--wrap=malloc "$dir/step.c" "$dir/implementation.o"

# ---- symbols: none writable, all named mpt_ ----

if has nm; then
    # Without -fno-pic, tables of constant pointers are relocated at the start, and look writable to nm.
    "$CC" -std=c99 -O2 -fno-pic -I. -c "$dir/implementation.c" -o "$dir/symbols.o" 2>/dev/null
    nm "$dir/symbols.o" >"$dir/all"
    check "nm lists the implementation" grep -q ' T _*mpt_open$' "$dir/all"
    grep ' [bBdDC] ' "$dir/all" >"$dir/writable"
    check "no writable globals" nothing "$dir/writable"
    nm -g --defined-only "$dir/symbols.o" | awk '{print $NF}' | grep -v '^_*mpt_[a-z0-9]' >"$dir/leaked"
    check "only mpt_ names are exported" nothing "$dir/leaked"
    nm -g --defined-only "$dir/symbols.o" | awk '{print $NF}' | grep '^_*mpt__' >"$dir/private"
    check "no private name is exported" nothing "$dir/private"
    # sprintf and strtod would read the locale; files are opened, read and written where one asks for it
    "$CC" -std=c99 -O2 -DMPT_NO_STDIO -I. -c "$dir/implementation.c" -o "$dir/no_stdio.o" 2>/dev/null
    nm -u "$dir/no_stdio.o" | awk '{print $NF}' |
        grep -E 'print|put[cs]|write|open$|read$|exit|abort|errno|scanf|strto|locale|getenv|time|rand|signal$|^fe' |
        grep -v '^pthread_' >"$dir/calls"
    check "nothing is called that prints, exits, reads errno, the locale, clock or environment" nothing "$dir/calls"
else
    skip "nm is not installed"
fi

# ---- macros: what the header defines, minus what the system headers it includes define by themselves ----

# leaked_macros FILE: those of a file that includes mpt.h. -H lists headers by depth; mpt.h is at one dot.
leaked_macros() {
    "$CC" -std=c99 -I. -fsyntax-only -H "$1" 2>&1 | sed -n 's/^\.\. \(.*\)/#include "\1"/p' >"$dir/system.c"
    "$CC" -std=c99 -dM -E "$dir/system.c" | awk '{print $2}' | sed 's/(.*//' | sort -u >"$dir/system.macros"
    "$CC" -std=c99 -I. -dM -E "$1" | awk '{print $2}' | sed 's/(.*//' | sort -u >"$dir/all.macros"
    comm -13 "$dir/system.macros" "$dir/all.macros"
}

printf '#include "mpt.h"\n' >"$dir/declarations.c"
for part in declarations implementation; do
    leaked_macros "$dir/$part.c" >"$dir/defined"
    check "$part: macros are seen" grep -q '^MPT_VERSION$' "$dir/defined"
    grep -v '^MPT_' "$dir/defined" >"$dir/leaked"
    check "$part: only MPT_ macros are defined" nothing "$dir/leaked"
done

# ---- private names: mpt.h's and mpt_cuda.cuh's alone, but for files that say "private names" and why ----

find README.md Makefile examples tests -type f ! -name '*.txt' -exec grep -l 'mpt__' {} + >"$dir/users"
check "private names: some tests use them" grep -q tests/unit/checkpoint.c "$dir/users"
xargs grep -iL 'private names' <"$dir/users" >"$dir/silent"
check "private names: whoever uses them says why" nothing "$dir/silent"
grep -h examples/ "$dir/users" >"$dir/examples"
check "private names: no example uses them" nothing "$dir/examples"

# ---- tests/bench/peers.cpp with each of its libraries that is installed ----

for peer in OPENBLAS:openblas_config.h ONEDNN:dnnl.hpp; do
    if echo "#include <${peer#*:}>" | "$CXX" -E -x c++ - >/dev/null 2>&1; then
        check "peers.cpp, $peer" "$CXX" -std=c++11 -fsyntax-only -I. "-DBENCH_${peer%:*}" tests/bench/peers.cpp
    else
        skip "peers.cpp: ${peer#*:} is not installed"
    fi
done

# ---- line length ----

for file in mpt.h mpt_cuda.cuh examples/lens.h; do
    [ -f $file ] || continue
    awk 'length > 120 { print FILENAME ":" FNR ": " length " columns" }' $file >"$dir/long"
    check "$file: at most 120 columns" nothing "$dir/long"
done

printf 'compile: %d passed, %d failed' $passed $failed
[ $skipped -gt 0 ] && printf ', %d skipped' $skipped
printf '\n'
[ $failed -eq 0 ]
