/* casts.c - the casts between fp32 and the 16- and 8-bit types, without a gap: all 2^32 floats narrowed to nearest and
   toward zero, to inf and saturating, and all patterns widened, by the scalar functions and by mpt_cast on every
   instruction set of this CPU. Two threads share the work; it takes some minutes.

   The expected results come from formats.h, which thinks in doubles. Where the compiler has a half type of its own,
   it must agree on fp16. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include "../formats.h"
#include <pthread.h>

#if defined(__FLT16_MANT_DIG__) && !defined(__cplusplus) && (defined(__x86_64__) || defined(__aarch64__))
#define COMPILER_HALF
__extension__ typedef _Float16 compiler_half;
#ifdef __x86_64__ /* without the instruction a conversion takes so long that the test would take twice the time */
#define WITH_HALF __attribute__((target("f16c")))
#define HAS_HALF __builtin_cpu_supports("avx2")
#else
#define WITH_HALF
#define HAS_HALF 1
#endif
#endif

enum { BLOCK = 65536, BLOCKS = 65536, WORKERS = 2 };

typedef struct job { /* one way to round; the workers share the blocks */
    mpt_dtype type;
    mpt_round round;
    mpt_overflow overflow;
    const reference_stairs *stairs;
} job;

typedef struct worker {
    const job *work;
    int index;
    mpt_context *paths[MPT_ISA_COUNT];
    float *x;
    unsigned char *expected, *got;
    uint64_t blocks, scalar_wrong, bulk_wrong[MPT_ISA_COUNT], compiler_wrong; /* counted in blocks */
} worker;

/* ==== EXPECTED ==== */

/* The BLOCK floats from pattern `first` on lie on few steps, unless they are NaN. */
static void expect(const job *work, uint32_t first, unsigned char *out) {
    const uint32_t sign = first & 0x80000000u ? reference_format_of(work->type).sign : 0, from = first & 0x7fffffffu;
    const int bytes = mpt_dtype_size(work->type) == 1;
    uint16_t *words = (uint16_t *)(void *)out;
    uint32_t step = 0, high = work->stairs->steps, i = 0;
    while (high - step > 1) { /* the step of `from` lies in step .. high - 1 */
        const uint32_t middle = (step + high) / 2;
        if (work->stairs->edge[middle] <= from) step = middle;
        else high = middle;
    }
    for (; i < BLOCK && from + i <= 0x7f800000u; step++) {
        const uint32_t bits = sign | reference_step_pattern(work->stairs, step, work->overflow);
        const uint32_t left = work->stairs->edge[step + 1] - from, end = left < BLOCK ? left : (uint32_t)BLOCK;
        if (bytes) memset(out + i, (int)bits, end - i), i = end;
        else
            while (i < end) words[i++] = (uint16_t)bits;
    }
    for (; i < BLOCK; i++) {
        const uint32_t bits = reference_narrow(first + i, work->type, work->round, work->overflow);
        if (bytes) out[i] = (unsigned char)bits;
        else words[i] = (uint16_t)bits;
    }
}

/* How many results of the compiler's half type differ? It may have its own mind on NaN. */
#ifdef COMPILER_HALF
WITH_HALF static uint32_t compiler_differs(const job *work, const float *x, const unsigned char *expected) {
    uint32_t i, wrong = 0;
    if (work->type != MPT_F16 || work->round != MPT_ROUND_NEAREST || work->overflow != MPT_OVERFLOW_INF || !HAS_HALF)
        return 0;
    for (i = 0; i < BLOCK && (test_bits(x[i]) & 0x7fffffffu) <= 0x7f800000u; i++) {
        const compiler_half half = (compiler_half)x[i];
        wrong += memcmp(&half, expected + 2 * i, 2) != 0;
    }
    return wrong;
}
#else
static uint32_t compiler_differs(const job *work, const float *x, const unsigned char *expected) {
    (void)work, (void)x, (void)expected;
    return 0;
}
#endif

/* ==== NARROWING ==== */

/* One loop for each way to round, so that the compiler knows it. */
static void narrow_scalar(const job *work, const float *x, unsigned char *out) {
    uint16_t *words = (uint16_t *)(void *)out;
    size_t i;
#define NARROW(TYPE, ROUND, OVERFLOW, to, word)                                   \
    if (work->type == TYPE && work->round == ROUND && work->overflow == OVERFLOW) \
        for (i = 0; i < BLOCK; i++) to[i] = (word)mpt_narrow(x[i], TYPE, ROUND, OVERFLOW, 0);
#define NARROW_TYPE(TYPE, to, word)                                  \
    NARROW(TYPE, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, to, word)      \
    NARROW(TYPE, MPT_ROUND_NEAREST, MPT_OVERFLOW_SATURATE, to, word) \
    NARROW(TYPE, MPT_ROUND_ZERO, MPT_OVERFLOW_INF, to, word)         \
    NARROW(TYPE, MPT_ROUND_ZERO, MPT_OVERFLOW_SATURATE, to, word)
    NARROW_TYPE(MPT_F16, words, uint16_t)
    NARROW_TYPE(MPT_BF16, words, uint16_t)
    NARROW_TYPE(MPT_E4M3, out, unsigned char)
    NARROW_TYPE(MPT_E5M2, out, unsigned char)
#undef NARROW_TYPE
#undef NARROW
}

static void narrow_block(worker *w, uint32_t first) {
    const job *work = w->work;
    const size_t bytes = BLOCK * mpt_dtype_size(work->type);
    mpt_rounding rounding = MPT_ZERO;
    uint32_t i;
    int isa;
    rounding.round = work->round, rounding.overflow = work->overflow;
    for (i = 0; i < BLOCK; i++) {
        const uint32_t bits = first + i;
        memcpy(&w->x[i], &bits, sizeof bits);
    }
    expect(work, first, w->expected);
    w->compiler_wrong += compiler_differs(work, w->x, w->expected) != 0;
    narrow_scalar(work, w->x, w->got);
    w->scalar_wrong += memcmp(w->got, w->expected, bytes) != 0;
    for (isa = 1; isa < MPT_ISA_COUNT; isa++) {
        if (!w->paths[isa]) continue;
        memset(w->got, 0xa5, bytes);
        if (mpt_cast(w->paths[isa], BLOCK, mpt_f32_array(w->x), mpt_typed_array(w->got, work->type), &rounding) !=
                MPT_OK ||
            memcmp(w->got, w->expected, bytes) != 0)
            w->bulk_wrong[isa]++;
    }
    w->blocks++;
}

static void *narrow_share(void *arg) {
    worker *w = (worker *)arg;
    uint32_t block;
    w->blocks = w->scalar_wrong = w->compiler_wrong = 0;
    memset(w->bulk_wrong, 0, sizeof w->bulk_wrong);
    for (block = (uint32_t)w->index; block < BLOCKS; block += WORKERS) narrow_block(w, block * BLOCK);
    return NULL;
}

static void narrow_all(worker *workers, const job *work) {
    pthread_t thread;
    int i, isa;
    for (i = 0; i < WORKERS; i++) workers[i].work = work;
    if (!CHECK(pthread_create(&thread, NULL, narrow_share, &workers[1]) == 0)) return;
    narrow_share(&workers[0]);
    pthread_join(thread, NULL);
    CHECK_EQUAL(workers[0].blocks + workers[1].blocks, BLOCKS);
    CHECK_EQUAL(workers[0].compiler_wrong + workers[1].compiler_wrong, 0);
    CHECK_EQUAL(workers[0].scalar_wrong + workers[1].scalar_wrong, 0);
    for (isa = 1; isa < MPT_ISA_COUNT; isa++)
        if (workers[0].paths[isa]) CHECK_EQUAL(workers[0].bulk_wrong[isa] + workers[1].bulk_wrong[isa], 0);
    printf("all fp32 to %s, %s, %s\n", mpt_dtype_name(work->type),
           work->round == MPT_ROUND_ZERO ? "toward zero" : "nearest",
           work->overflow == MPT_OVERFLOW_INF ? "inf" : "saturating");
    fflush(stdout);
}

/* ==== WIDENING ==== */

static void widen_all(worker *w, mpt_dtype type) {
    const size_t count = (size_t)1 << 8 * mpt_dtype_size(type), bytes = count * sizeof(float);
    uint32_t i, scalar_wrong = 0;
    int isa;
    for (i = 0; i < count; i++) {
        const uint32_t wide = reference_widen_pattern(i, type);
        memcpy(w->expected + 4 * i, &wide, 4);
        test_store(w->got + i * mpt_dtype_size(type), i, type);
        scalar_wrong += test_bits(mpt_widen(i, type)) != wide;
    }
    CHECK_EQUAL(scalar_wrong, 0);
    for (isa = 1; isa < MPT_ISA_COUNT; isa++) {
        if (!w->paths[isa]) continue;
        CHECK_OK(w->paths[isa],
                 mpt_cast(w->paths[isa], count, mpt_typed_array(w->got, type), mpt_f32_array(w->x), NULL));
        CHECK(memcmp(w->x, w->expected, bytes) == 0);
    }
}

int main(void) {
    reference_stairs *stairs = (reference_stairs *)test_memory(sizeof *stairs);
    worker workers[WORKERS];
    job work;
    int i, isa, type, round, overflow;
    memset(workers, 0, sizeof workers);
    for (i = 0; i < WORKERS; i++) {
        workers[i].index = i;
        workers[i].x = (float *)test_memory(BLOCK * sizeof(float));
        workers[i].expected = (unsigned char *)test_memory(BLOCK * sizeof(float));
        workers[i].got = (unsigned char *)test_memory(BLOCK * sizeof(float));
        for (isa = 1; isa < MPT_ISA_COUNT; isa++) workers[i].paths[isa] = test_open_isa((mpt_isa)isa, 1);
    }
    work.stairs = stairs;
    for (type = MPT_F16; type < MPT_DTYPE_COUNT; type++) {
        widen_all(&workers[0], work.type = (mpt_dtype)type);
        for (round = MPT_ROUND_NEAREST; round <= MPT_ROUND_ZERO; round++) {
            reference_build_stairs(stairs, work.type, work.round = (mpt_round)round);
            for (overflow = MPT_OVERFLOW_INF; overflow <= MPT_OVERFLOW_SATURATE; overflow++) {
                work.overflow = (mpt_overflow)overflow;
                narrow_all(workers, &work);
            }
        }
    }
    for (i = 0; i < WORKERS; i++) {
        for (isa = 1; isa < MPT_ISA_COUNT; isa++) mpt_close(workers[i].paths[isa]);
        free(workers[i].x), free(workers[i].expected), free(workers[i].got);
    }
    free(stairs);
    return test_finish("long casts");
}
