/* casts.c - fuzzes casts against formats.h: any numbers, any pair of types, every instruction set.

   Bytes: source type, destination type, rounding, elements to leave out at the start; then the elements. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "fuzz.h"
#include "../formats.h"

enum { MOST = 200 };

/* What the reference makes of one element. Stochastic rounding gives one of the two neighbours. */
static int is_right(uint32_t is, uint32_t from, mpt_dtype src, mpt_dtype dst, mpt_round round, mpt_overflow overflow) {
    const uint32_t wide = src == MPT_F32 ? from : reference_widen_pattern(from, src);
    const uint32_t nearest = reference_narrow(wide, dst, MPT_ROUND_NEAREST, overflow);
    const uint32_t below = reference_narrow(wide, dst, MPT_ROUND_ZERO, overflow);
    if (src == dst && reference_kind_of(from, src) == REFERENCE_NAN && is == from) return 1;
    if (dst == MPT_F32) return is == wide || (reference_kind_of(wide, MPT_F32) == REFERENCE_NAN && is == nearest);
    if (round == MPT_ROUND_NEAREST) return is == nearest;
    if (round == MPT_ROUND_ZERO) return is == below;
    return is == below || (is == below + 1 && reference_kind_of(wide, MPT_F32) == REFERENCE_FINITE) ||
           (is == nearest && reference_kind_of(is, dst) != REFERENCE_FINITE);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_bytes b = {data, size};
    const mpt_dtype src = (mpt_dtype)fuzz_take(&b, MPT_DTYPE_COUNT), dst = (mpt_dtype)fuzz_take(&b, MPT_DTYPE_COUNT);
    const uint32_t mode = fuzz_take(&b, 6), lead = fuzz_take(&b, 4);
    const size_t from = mpt_dtype_size(src), to = mpt_dtype_size(dst);
    unsigned char in[4 * (MOST + 4)] = {0}, out[4 * (MOST + 4)], first[4 * (MOST + 4)];
    mpt_rounding rounding = MPT_ZERO;
    size_t n, i;
    int isa;
    rounding.round = (mpt_round)(mode % 3), rounding.overflow = (mpt_overflow)(mode / 3);
    for (n = 0; n < MOST && b.left >= from; n++, b.at += from, b.left -= from)
        memcpy(in + (lead + n) * from, b.at, from);
    for (isa = MPT_ISA_PLAIN; isa < MPT_ISA_COUNT; isa++) {
        mpt_context *ctx = test_open_isa((mpt_isa)isa, 1);
        if (!ctx) continue;
        memset(out, 0xa5, sizeof out);
        CHECK_OK(ctx, mpt_cast(ctx, n, mpt_typed_array(in + lead * from, src), mpt_typed_array(out, dst), &rounding));
        for (i = 0; i < n; i++)
            CHECK(is_right(test_load(out + i * to, dst), test_load(in + (lead + i) * from, src), src, dst,
                           rounding.round, rounding.overflow));
        for (i = n * to; i < sizeof out; i++) CHECK(out[i] == 0xa5);
        if (isa == MPT_ISA_PLAIN) memcpy(first, out, sizeof out);
        CHECK(memcmp(first, out, sizeof out) == 0);
        mpt_close(ctx);
    }
    return fuzz_end();
}
