#!/bin/sh
# The ways into a project that README shows (CMake, Meson, Zig, WebAssembly, Python), each with the words of README, where
# the tool is installed: a program of a few lines is built in a folder of its own and trains. (Zig's first run compiles a C
# library for each target, for minutes; it keeps them.) Run from the repository's root.
# Environment: CC, BUILD.
root=$PWD
folder=${BUILD:-build}/tests/vendoring
passed=0 failed=0 skipped=0
rm -rf "$folder"

check() { # check STATUS WHAT
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "vendoring.sh: $2"; fi
}

has() { command -v "$1" >/dev/null 2>&1 && "$1" --version >/dev/null 2>&1; }

# begin NAME: a project with program.c, mpt.c and mpt.h in the folder NAME; goes there.
begin() {
    mkdir -p "$root/$folder/$1" && cd "$root/$folder/$1" || exit 1
    cp "$root/mpt.h" .
    printf '#define MPT_IMPLEMENTATION\n#include "mpt.h"\n' >mpt.c
    cat >program.c <<'END'
#include "mpt.h"
#include <stdio.h>
int main(void) {
    const float x[] = {0, 0, 0, 1, 1, 0, 1, 1};
    const int32_t y[] = {0, 1, 1, 0};
    mpt_model *net = mpt_model_new(mpt_open(NULL), mpt_policy_preset(MPT_O2, MPT_BF16));
    mpt_train_desc train = MPT_ZERO;
    int h = mpt_relu(net, mpt_linear(net, mpt_input(net, 1, 1, 2), 16, NULL)), step;
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, 2, NULL), NULL);
    train.batch = 4;
    if (mpt_model_build(net, &train) != MPT_OK) return 1;
    for (step = 0; step < 3000; step++) mpt_train_step(net, x, y);
    printf("loss %.4f\n", mpt_loss(net));
    return 0;
}
END
}

# block LANGUAGE: README's first block of that language.
block() { awk -v fence="^\`\`\`$1\$" '$0 ~ fence { on = 1; next } /^```/ { if (on) exit } on' "$root/README.md"; }

# trains NAME COMMAND...: what it prints ends with a loss of almost nothing.
trains() {
    name=$1
    shift
    "$@" >log 2>&1
    [ "$(tail -n 1 log | sed -n 's/^loss 0\.0[0-9]*$/yes/p')" = yes ]
    check $? "$name: $(tail -n 5 log)"
}

skip() {
    skipped=$((skipped + 1))
    echo "skipped: $1 is not installed"
}

if has cmake; then
    begin cmake
    { printf 'cmake_minimum_required(VERSION 3.14)\nproject(program C)\n' && block cmake; } >CMakeLists.txt
    { cmake -S . -B out -DFETCHCONTENT_SOURCE_DIR_MPT="$root" -DCMAKE_BUILD_TYPE=Release && rm mpt.h &&
        cmake --build out; } >build.log 2>&1
    check $? "CMake: $(tail -n 5 build.log)"
    trains CMake out/program
else
    skip cmake
fi

if has meson && has ninja; then
    begin meson
    mkdir mpt && mv mpt.h mpt
    block meson >meson.build
    { meson setup out --buildtype=release && meson compile -C out; } >build.log 2>&1
    check $? "Meson: $(tail -n 5 build.log)"
    trains Meson out/program
else
    skip meson
fi

zig=
if command -v zig >/dev/null; then zig=zig; elif python3 -m ziglang version >/dev/null 2>&1; then zig="python3 -m ziglang"; fi
if [ -n "$zig" ]; then
    begin zig
    cat >program.zig <<'END'
const mpt = @import("mpt.zig");
extern fn printf(format: [*:0]const u8, ...) c_int;
pub fn main() void {
    const x = [_]f32{ 0, 0, 0, 1, 1, 0, 1, 1 };
    const y = [_]i32{ 0, 1, 1, 0 };
    const net = mpt.mpt_model_new(mpt.mpt_open(null), mpt.mpt_policy_preset(mpt.MPT_O2, mpt.MPT_F16));
    const h = mpt.mpt_relu(net, mpt.mpt_linear(net, mpt.mpt_input(net, 1, 1, 2), 16, null));
    _ = mpt.mpt_softmax_cross_entropy(net, mpt.mpt_linear(net, h, 2, null), null);
    var train = @import("std").mem.zeroes(mpt.mpt_train_desc);
    train.batch = 4;
    if (mpt.mpt_model_build(net, &train) != 0) return;
    for (0..3000) |_| _ = mpt.mpt_train_step(net, &x, &y);
    _ = printf("loss %.4f\n", mpt.mpt_loss(net));
}
END
    cat >run.mjs <<'END'
import { readFile } from 'node:fs/promises';
import { WASI } from 'node:wasi';
const wasi = new WASI({ version: 'preview1', args: ['program'] });
const program = await WebAssembly.compile(await readFile(process.argv[2]));
wasi.start(await WebAssembly.instantiate(program, wasi.getImportObject()));
END
    block sh | sed "s/^zig /$zig /" >lines
    sed -n 1,2p lines | sh >build.log 2>&1
    check $? "Zig: $(tail -n 5 build.log)"
    trains Zig ./program
    sed -n 3p lines | sh >build.log 2>&1
    check $? "WebAssembly: $(tail -n 5 build.log)"
    if has node; then trains WebAssembly sh -c "$(sed -n 4p lines)"; else skip node; fi
else
    skip zig
fi

if python3 -c 'import cffi, setuptools' 2>/dev/null; then
    begin python
    block python >program.py
    trains Python python3 program.py
    [ "$(grep -c . program.py)" -le 20 ]
    check $? "README's program for Python has $(grep -c . program.py) lines"
else
    skip "cffi for Python"
fi

printf 'vendoring.sh: %d passed, %d failed' $passed $failed
[ $skipped -gt 0 ] && printf ', %d skipped' $skipped
printf '\n'
[ $failed -eq 0 ]
