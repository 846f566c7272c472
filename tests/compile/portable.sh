#!/bin/sh
# Builds every test and example for one target after another, with one set of options each, and runs the tests, foreign
# ones under an emulator: `make portable`. matrix.sh beside it looks at warnings, symbols and macros, in seconds; this
# takes minutes. What is not installed is skipped by name. Run from the repository's root.
# Environment: CELLS, shell patterns of the cells to run ("s390x* gcc-O0"; default all), BUILD.
#
# One object holds the implementation and the programs link it, so that mpt.h is compiled once a cell, not twenty times.

BUILD=${BUILD:-build}
dir=$BUILD/tests/portable
warn="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wcast-align -Wundef -Werror"
define="-DTEST_STRIDE=65536" # loops over all numbers take one in so many
all_examples=$(ls examples/*.c) all_tests=$(ls tests/unit/*.c tests/parity/*.c tests/train/*.c)
examples=$all_examples tests=$all_tests
header=mpt.h
passed=0 failed=0 skipped=0
mkdir -p "$dir" || exit 1

has() { command -v "$1" >/dev/null 2>&1; }

skip() {
    skipped=$((skipped + 1))
    printf '%-16s skipped: %s\n' "$name" "$1"
}

wanted() { # wanted NAME: does CELLS ask for it?
    [ -z "${CELLS:-}" ] && return 0
    for pattern in $CELLS; do
        # shellcheck disable=SC2254
        case $1 in $pattern) return 0 ;; esac
    done
    return 1
}

count() { # count STATUS WHAT: one check more; of a failing one the log is shown
    if [ "$1" -eq 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf '%s: failed: %s\n' "$name" "$2"
        tail -n 20 "$dir/log"
    fi
}

build() { # build SOURCE OUT OPTIONS...
    source=$1 out=$2
    shift 2
    with="$shared" and=$object
    grep -q -e mpt__ -e 'ctx->' "$source" && with= and= # private names need an implementation beside them
    # shellcheck disable=SC2086
    $compiler $options $with $warn $define $language -I. "$@" "$source" -x none $and $link -o "$out" >"$dir/log" 2>&1
    count $? "build $source"
}

# cell NAME RUNNER LEFT_OUT COMPILER OPTIONS...: RUNNER "" runs programs as they are, "none" does not run them. Those
# that LEFT_OUT names, too slow there, are only built.
cell() {
    name=$1 runner=$2 slow=$3 compiler=$4
    shift 4
    options=$* language="-x c" before=$failed start=$(date +%s) link= shared= object=
    wanted "$name" || return
    has "$compiler" || { skip "$compiler is not installed"; return; }
    if [ -n "$runner" ] && [ "$runner" != none ] && ! has "${runner%% *}"; then
        skip "$runner is not installed: built, not run"
        runner=none
    fi
    case $compiler in *++*) language="-x c++" ;; esac
    # shellcheck disable=SC2086
    if ! echo 'int main(void) { return 0; }' | $compiler $options $language - -o "$dir/program" >"$dir/log" 2>&1; then
        skip "$compiler $options links no program: its C library is not installed"
        return
    fi
    case $options in
    *MPT_STATIC*) link="-lm -pthread" ;; # a copy in each program
    *)
        printf '#define MPT_IMPLEMENTATION\n#include "%s"\n' "$header" >"$dir/mpt.c"
        rm -f "$dir/mpt.o"
        build "$dir/mpt.c" "$dir/mpt.o" -c
        shared=-DMPT__IMPLEMENTED object=$dir/mpt.o link="-lm -pthread"
        ;;
    esac
    for example in $examples; do build "$example" "$dir/program"; done
    for test in $tests; do
        rm -f "$dir/program"*
        build "$test" "$dir/program"
        [ "$runner" = none ] && continue
        case " $slow " in *" $(echo "$test" | sed 's,^tests/,,; s,\.c$,,') "*) continue ;; esac
        began=$(date +%s)
        # shellcheck disable=SC2086
        timeout 900 $runner "$dir/program"* >"$dir/log" 2>&1 </dev/null
        count $? "run $test"
        [ -n "${TIMES:-}" ] && printf '%-16s %4d s  %s\n' "$name" $(($(date +%s) - began)) "$test"
    done
    [ $failed -eq $before ] && result= || result=", FAILED"
    printf '%-16s %4d s%s\n' "$name" $(($(date +%s) - start)) "$result"
}

# ---- this processor: every level of optimisation, every standard, every switch, with either compiler ----

for c in gcc clang; do
    [ $c = gcc ] && cxx=g++ || cxx=clang++
    cell $c-O0 "" "" $c -O0 -std=c99
    cell $c-O2 "" "" $c -O2 -std=c11
    cell $c-O3 "" "" $c -O3 -std=c17
    cell $c-Os-no-simd "" "" $c -Os -std=c99 -DMPT_NO_SIMD
    cell $c-no-threads "" "" $c -O1 -std=c99 -DMPT_NO_THREADS
    cell $c-small "" "" $c -O2 -std=c99 -DMPT_SMALL
    cell $c-static "" "" $c -O0 -std=c99 -DMPT_STATIC
    cell $cxx-O0-11 "" "" $cxx -O0 -std=c++11
    cell $cxx-O2-17 "" "" $cxx -O2 -std=c++17
    cell $cxx-O3-20 "" "" $cxx -O3 -std=c++20
done

# ---- AVX-512 on any CPU with AVX2: a copy of mpt.h that takes avx512.h's functions for the compiler's ----

name=avx512-simde
if ! grep -qw avx2 /proc/cpuinfo 2>/dev/null; then
    wanted $name && skip "no AVX2"
elif ! echo '#include <simde/x86/avx512.h>' | gcc -E -x c - >/dev/null 2>&1; then
    wanted $name && skip "no libsimde-dev"
else
    header=mpt512.h
    sed -e 's/,avx512f,avx512bw,avx512dq,avx512vl\(,avx512bf16\)*//' \
        -e 's/(b & avx512) == avx512 && (states & 0xe6) == 0xe6/avx512 != 0/' \
        -e 's/__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1)/__get_cpuid_count(7, 1, \&a, \&b, \&c, \&d) || 1/' \
        -e 's/ && b != genu;/ \&\& genu;/' \
        mpt.h >"$dir/mpt512.h"
    examples= tests="tests/unit/operations.c tests/unit/casts.c"
    cell $name "" "" gcc -O2 -std=c99 -Wno-psabi -mavx2 -mfma -mf16c -I tests/compile -include avx512.h -I "$dir"
    header=mpt.h examples=$all_examples tests=$all_tests
    wanted $name && { grep -q 'instruction sets: .*avx512' "$dir/log"; count $? "casts.c with AVX-512"; }
fi

# ---- other processors: 32 bits, big-endian, other vectors ----

# x87 rounds to 64 bits of fraction, then to 24: a root is not always PyTorch's to the bit, so optimizers.c is not run.
# Debian's gcc-multilib, which links asm/, cannot be installed beside cross compilers; gcc-12-multilib can.
asm="-idirafter /usr/include/x86_64-linux-gnu"
cell i686-sse "" "" gcc -m32 -O2 -std=c99 $asm -msse2 -mfpmath=sse
cell i686-x87 "" parity/optimizers gcc -m32 -O2 -std=c99 $asm -mfpmath=387
slow="parity/nets train/digits unit/model unit/operations unit/scaler"
cell aarch64 qemu-aarch64 "$slow" aarch64-linux-gnu-gcc -static -O2 -std=c99
cell armhf qemu-arm "$slow" arm-linux-gnueabihf-gcc -static -O2 -std=c99
cell riscv64 qemu-riscv64 "$slow" riscv64-linux-gnu-gcc -static -O2 -std=c99
cell s390x qemu-s390x "$slow unit/memory" s390x-linux-gnu-gcc -static -O2 -std=c99
cell s390x-c++ none "" s390x-linux-gnu-g++ -static -O2 -std=c++11

# ---- a chip without an operating system: XOR on a Cortex-M4, in the text and RAM that mpt.h tells ----

name=cortex-m4
if wanted $name; then
    small="-DMPT_NO_THREADS -DMPT_NO_SIMD -DMPT_SMALL"
    arm="arm-none-eabi-gcc -mcpu=cortex-m4 -mthumb -mfloat-abi=hard -mfpu=fpv4-sp-d16 --specs=rdimon.specs"
    if ! has arm-none-eabi-gcc; then
        skip "arm-none-eabi-gcc is not installed"
    elif ! echo 'int main(void) { return 0; }' | $arm -x c - -o "$dir/xor.elf" >"$dir/log" 2>&1; then
        skip "arm-none-eabi-gcc links no program: newlib is not installed"
    else
        # shellcheck disable=SC2086
        $arm -std=c99 -Os $warn $small -I. -ffunction-sections -fdata-sections -Wl,--gc-sections -Wl,-u,vectors \
            -Wl,--section-start=.vectors=0 tests/compile/xor.c -o "$dir/xor.elf" -lm >"$dir/log" 2>&1
        count $? "build tests/compile/xor.c"
        if has qemu-system-arm; then
            timeout 300 qemu-system-arm -M mps2-an386 -nographic -semihosting-config enable=on,target=native \
                -kernel "$dir/xor.elf" >"$dir/log" 2>&1 </dev/null
            count $? "run tests/compile/xor.c"
            ram=$(sed -n 's/.*RAM \([0-9]*\) bytes.*/\1/p' "$dir/log")
            arm-none-eabi-size "$dir/xor.elf" | awk -v ram="${ram:-0}" 'NR == 2 { print $1, $2 + $3 + ram }' >"$dir/sizes"
            sed -n 's/.*-Os): text \([0-9]*\) KB.*/\1/p; s/.* RAM \([0-9]*\) KB, all.*/\1/p' mpt.h | xargs >>"$dir/sizes"
            awk 'NR == 1 { text = $1; ram = $2 }
                 function near(x, told) { return x < 1100 * told && x > 900 * told }
                 END { exit !(near(text, $1) && near(ram, $2)) }' "$dir/sizes"
            sized=$?
            cp "$dir/sizes" "$dir/log"
            count $sized "text and RAM, in bytes, against those in KB that mpt.h tells"
            [ $failed -eq 0 ] && printf '%-16s text %s B, RAM %s B\n' $name $(head -n 1 "$dir/sizes")
        else
            skip "qemu-system-arm is not installed: built, not run"
        fi
    fi
fi

# ---- zig cc, from PyPI's ziglang or as zig: macOS, Windows and others, compiled and not run ----

name=zig
if wanted $name; then
    zig=
    has zig && zig=zig
    [ -z "$zig" ] && python3 -c 'import ziglang' 2>/dev/null && zig="python3 -m ziglang"
    printf '#define MPT_IMPLEMENTATION\n#include "mpt.h"\n' >"$dir/zig.c"
    for target in x86_64-macos aarch64-macos x86_64-windows-gnu aarch64-windows-gnu x86_64-linux-gnu x86_64-linux-musl \
        aarch64-linux-musl arm-linux-musleabihf riscv64-linux-musl powerpc64le-linux-musl; do
        [ -n "$zig" ] || { skip "neither zig nor Python's ziglang is installed"; break; }
        # shellcheck disable=SC2086
        $zig cc -target $target -O2 -std=c99 $warn -I. -c "$dir/zig.c" -o "$dir/zig.o" >"$dir/log" 2>&1
        count $? "build for $target"
    done
    [ -n "$zig" ] && printf '%-16s compiled\n' $name
fi

# ---- MSVC, as far as clang can stand in for it: no GNU C, no pthread.h ----

name=msvc-like
if wanted $name; then
    printf '#define MPT_IMPLEMENTATION\n#include "mpt.h"\n' >"$dir/msvc.c"
    if has clang; then
        clang -fgnuc-version=0 -U__clang__ -D_MSC_VER=1930 -O2 -std=c99 -Wall -Wextra -Werror \
            -Wno-unused-parameter -I. -c "$dir/msvc.c" \
            -o "$dir/msvc.o" >"$dir/log" 2>&1
        count $? "build without GNU C"
        grep -q pthread_create "$dir/msvc.o"
        [ $? -eq 1 ]
        count $? "no pthread"
        printf '%-16s compiled\n' $name
    else
        skip "clang is not installed"
    fi
fi

# ---- Windows: but for the trainer, which needs POSIX ----

examples=$(grep -L readers.h examples/*.c)
tests=$(ls tests/unit/*.c tests/parity/*.c tests/train/digits.c)
has /usr/lib/wine/wine64 && wine=/usr/lib/wine/wine64 || wine=wine64 # Debian's wine64 has no command of its own
WINEDEBUG=-all WINEPREFIX=$(cd "$dir" && pwd)/wine
export WINEDEBUG WINEPREFIX
cell windows $wine "" x86_64-w64-mingw32-gcc -static -O2 -D__USE_MINGW_ANSI_STDIO=1 -std=c99
cell windows-c++ none "" x86_64-w64-mingw32-g++ -static -O2 -D__USE_MINGW_ANSI_STDIO=1 -std=c++11

printf 'portable.sh: %d passed, %d failed' $passed $failed
[ $skipped -gt 0 ] && printf ', %d skipped' $skipped
printf '\n'
[ $failed -eq 0 ]
