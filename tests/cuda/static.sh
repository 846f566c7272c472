#!/bin/sh
# What the compiler made of the kernels. The elementwise ones load and store 128 bits at a time (their PTX says so); no
# kernel spills on any architecture; none takes over 64 registers but those whose comment says why; a turn of the
# gather's loop, which is 16 bytes, takes at most 72 instructions, a ReLU of eight 16-bit elements under 100, a step of
# the convolution kernel, which has 32 products of matrices, at most 256 (all skipped where cuobjdump is missing).
# Usage: [NVCC=nvcc] [ARCHS="75 80"] tests/cuda/static.sh
NVCC=${NVCC:-nvcc}
build=${BUILD:-build}/cuda
passed=0 failed=0 skipped=0
wide="map_k finish_k norm_map_k update_k pool_forward_k pool_backward_k depthwise_k gather_k few_k"
# see their comments
over="scan_k columns_k norm_map_k norm_backward_k update_k depthwise_k pool_forward_k pool_backward_k loss_k
    broadcast_sums_k rates_k implicit_k"

check() { # MESSAGE COMMAND...
    message=$1
    shift
    if "$@"; then passed=$((passed + 1)); else
        failed=$((failed + 1))
        echo "static: $message"
    fi
}

command -v "$NVCC" >/dev/null || { echo "0 passed, 0 failed, 1 skipped"; exit 0; }
mkdir -p "$build" || exit 1
cat >"$build/all.cu" <<'END'
#define MPT_IMPLEMENTATION
#include "mpt.h"
#include "mpt_cuda.cuh"

/* What the loop of mptc__map_k does, where types and activation are known */
template <mpt_dtype type> __global__ void relu(mpt_array x, mpt_array y, size_t n) {
    float v[MPTC__PACK];
    x.type = y.type = type;
    for (size_t i = mptc__thread() * MPTC__PACK; i < n; i += mptc__stride() * MPTC__PACK) {
        mptc__load(x, i, MPTC__PACK, v);
#pragma unroll
        for (int e = 0; e < MPTC__PACK; e++) v[e] = mptc__activate(MPT_RELU, v[e]);
        mptc__store(y, i, MPTC__PACK, v);
    }
}
template __global__ void relu<MPT_F16>(mpt_array x, mpt_array y, size_t n);
template __global__ void relu<MPT_BF16>(mpt_array x, mpt_array y, size_t n);
END
for n in 75 80; do # before 8.0 one kernel is empty
    "$NVCC" -O2 -std=c++17 -I. -arch=compute_$n -ptx "$build/all.cu" -o "$build/all-$n.ptx" || exit 1
done

# 1 where the kernel named mptc__$1, or a copy of its template, has such an instruction; all copies must
has() {
    awk -v name="mptc__$1" -v what="$2" '
        /\.entry/ { in_it = index($0, name) > 0; seen += in_it; found = 0 }
        in_it && $0 ~ what && !found { found = 1; good++ }
        END { exit !(seen > 0 && good == seen) }' "$build/all-75.ptx"
}
for kernel in $wide; do
    check "$kernel has no 128-bit load from global memory" has "$kernel" 'ld\.global(\.nc)?(\.L[^ ]*)?\.v4\.[bfu]32'
    check "$kernel has no 128-bit store to global memory" has "$kernel" 'st\.global(\.wb)?\.v4\.[bfu]32'
done

for n in ${ARCHS:-75 80 86 89 90 100 120}; do
    "$NVCC" --list-gpu-code | grep -qx "sm_$n" || continue
    ptx=$build/all-80.ptx
    [ "$n" -ge 80 ] || ptx=$build/all-75.ptx
    ptxas -v -arch="sm_$n" "$ptx" -o /dev/null 2>"$build/ptxas-$n.log"
    check "ptxas fails on sm_$n" test $? -eq 0
    spills=$(grep -c 'bytes spill' "$build/ptxas-$n.log")
    clean=$(grep -c ' 0 bytes spill stores, 0 bytes spill loads' "$build/ptxas-$n.log")
    check "$((spills - clean)) kernels spill on sm_$n" test "$spills" -gt 0 -a "$spills" -eq "$clean"
    large=$(awk -v over="$over" '
        BEGIN { split(over, may, " ") }
        /Compiling entry function/ { name = $0 }
        /Used [0-9]+ registers/ {
            match($0, /Used [0-9]+/)
            if (substr($0, RSTART + 5, RLENGTH - 5) + 0 <= 64) next
            for (i in may) if (index(name, "mptc__" may[i])) next
            match(name, /mptc__[a-z_]*_k/)
            printf " %s", substr(name, RSTART, RLENGTH)
        }' "$build/ptxas-$n.log")
    check "over 64 registers on sm_$n without a reason:$large" test -z "$large"
done

# Instructions of the shortest loop of each copy of the gather: from the target of a branch back to the branch
if command -v cuobjdump >/dev/null; then
    ptxas -arch=sm_80 "$build/all-80.ptx" -o "$build/all.cubin"
    cuobjdump -sass "$build/all.cubin" >"$build/all.sass"
    turns=$(awk '
        function tell() { if (shortest) print shortest; shortest = 0 }
        /Function :/ { tell(); inside = /mptc__gather_kI/; n = 0 }
        inside && match($0, /\/\*[0-9a-f]+\*\/ +[^ ]/) {
            number[substr($0, RSTART + 2, 4)] = ++n
            if (!/BRA/ || !match($0, /0x[0-9a-f]+/)) next
            target = substr("0000" substr($0, RSTART + 2, RLENGTH - 2), RLENGTH - 1)
            if (target in number && number[target] < n && (!shortest || n - number[target] < shortest - 1))
                shortest = n - number[target] + 1
        }
        END { tell() }' "$build/all.sass")
    check "there are three gathers, not: $turns" test "$(echo "$turns" | wc -l)" -eq 3
    # Of a turn of relu<>: from the target of the branch back, along forward branches, which skip what is rare
    relus=$(awk '
        function tell(   i) {
            if (!head) return
            for (i = head; i <= last; steps++) i = i in to && to[i] > i ? to[i] : i + 1
            print steps
        }
        /Function :/ {
            tell()
            delete number
            delete to
            delete wait
            n = head = last = steps = 0
            inside = /4reluI/
        }
        inside && match($0, /\/\*[0-9a-f]+\*\/ +[^ ]/) {
            number[substr($0, RSTART + 2, 4)] = ++n
            if (!/BRA/ || !match($0, /0x[0-9a-f]+/)) next
            target = substr("0000" substr($0, RSTART + 2, RLENGTH - 2), RLENGTH - 1)
            if (!(target in number)) wait[n] = target
            if (!(target in number) || number[target] == n) next
            head = number[target]
            last = n
            for (i in wait) to[i] = number[wait[i]]
        }
        END { tell() }' "$build/all.sass")
    echo "static: instructions of a ReLU of eight elements:" $relus
    check "there are two ReLUs, not: $relus" test "$(echo "$relus" | wc -l)" -eq 2
    for relu in $relus; do check "a ReLU of eight elements takes $relu instructions" test "$relu" -lt 100; done
    # Of a step of the convolution: the loop that has its products
    steps=$(awk '
        function tell() { if (inside) print loop }
        /Function :/ {
            tell()
            inside = /mptc__implicit_k/
            n = loop = 0
        }
        inside && match($0, /\/\*[0-9a-f]+\*\/ +[^ ]/) {
            number[substr($0, RSTART + 2, 4)] = ++n
            if (n == 1) products = 0
            before[n] = products += /HMMA/
            if (!/BRA/ || !match($0, /0x[0-9a-f]+/)) next
            target = substr("0000" substr($0, RSTART + 2, RLENGTH - 2), RLENGTH - 1)
            if (!(target in number) || number[target] >= n) next
            if (products - before[number[target]] == 32) loop = n - number[target] + 1
        }
        END { tell() }' "$build/all.sass")
    echo "static: instructions of a step of the convolution:" $steps
    check "there are six convolutions, not: $steps" test "$(echo "$steps" | wc -l)" -eq 6
    for step in $steps; do
        check "a step of a convolution takes $step instructions" test "$step" -gt 32 -a "$step" -le 256
    done
    for turn in $turns; do check "a turn of a gather takes $turn instructions" test "$turn" -le 72; done
else
    skipped=1
fi
[ "$skipped" -eq 0 ] && tail= || tail=", $skipped skipped"
echo "static: $passed passed, $failed failed$tail"
[ "$failed" -eq 0 ]
