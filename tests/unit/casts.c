/* casts.c - bulk casts, scans and histograms: the same bits on every instruction set of this CPU and any number of
   threads.

   Narrowing is compared with formats.h: one in TEST_STRIDE fp32 patterns, and both sides of every place where the
   result changes (tests/long takes all of them). numbers.c proves the scalar functions; where bits are compared with
   theirs, that stands for a proof. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include "../formats.h"

#ifndef TEST_STRIDE
#define TEST_STRIDE 256 /* a power of two up to 65536 */
#endif

enum { COUNTS = 3 /* of threads: 1, 2, 4 */, CONTEXTS = MPT_ISA_COUNT * COUNTS };

static mpt_context *contexts[CONTEXTS]; /* plain C with 1, 2, 4 threads, then the others */
static int context_count;

static void open_contexts(void) {
    int isa, i;
    for (isa = MPT_ISA_PLAIN; isa < MPT_ISA_COUNT; isa++)
        for (i = 0; i < COUNTS; i++) {
            mpt_context *ctx = test_open_isa((mpt_isa)isa, 1 << i);
            if (ctx) contexts[context_count++] = ctx;
        }
    CHECK(context_count >= COUNTS && context_count % COUNTS == 0);
    for (i = 0; i < context_count; i += COUNTS)
        printf("%s%s", i ? ", " : "instruction sets: ", mpt_isa_name(contexts[i]));
    printf("\n");
}

static mpt_rounding rounding_of(mpt_round round, mpt_overflow overflow) {
    mpt_rounding r = MPT_ZERO;
    r.round = round, r.overflow = overflow;
    r.seed = 5, r.step = 6, r.tensor = 7;
    return r;
}

/* ==== MEMORY ==== elements in device memory at an offset, guarded on both sides, and the same bytes on the host */

typedef struct buffer {
    unsigned char *host, *device;
    size_t bytes, begin; /* the first element starts at `begin` */
    mpt_dtype type;
} buffer;

static buffer buffer_new(mpt_dtype type, size_t count, size_t lead) {
    buffer b;
    b.type = type;
    b.begin = lead * mpt_dtype_size(type);
    b.bytes = b.begin + count * mpt_dtype_size(type) + TEST_GUARD;
    b.host = (unsigned char *)test_memory(b.bytes);
    b.device = (unsigned char *)mpt_alloc(contexts[0], b.bytes);
    if (!CHECK(b.device != NULL)) exit(1);
    memset(b.host, 0xa5, b.bytes);
    return b;
}

static void buffer_free(buffer *b) {
    mpt_free(contexts[0], b->device);
    free(b->host);
}

static mpt_array buffer_array(const buffer *b) { return mpt_typed_array(b->device + b->begin, b->type); }
static void buffer_put(buffer *b, size_t i, uint32_t bits) {
    test_store(b->host + b->begin + i * mpt_dtype_size(b->type), bits, b->type);
}
static uint32_t buffer_get(const buffer *b, size_t i) {
    return test_load(b->host + b->begin + i * mpt_dtype_size(b->type), b->type);
}

static void buffer_upload(buffer *b) { CHECK_OK(contexts[0], mpt_upload(contexts[0], b->device, b->host, b->bytes)); }
static void buffer_download(buffer *b) {
    CHECK_OK(contexts[0], mpt_download(contexts[0], b->host, b->device, b->bytes));
}

/* Writes nothing but the guards' value to the device. */
static void buffer_wipe(buffer *b) {
    memset(b->host, 0xa5, b->bytes);
    buffer_upload(b);
}

/* Are the bytes on the device those on the host of the other, guards included? */
static int buffer_is(buffer *b, const buffer *expected) {
    buffer_download(b);
    return b->bytes == expected->bytes && memcmp(b->host, expected->host, b->bytes) == 0;
}

/* Patterns of every kind at random, so that neighbours are of different kinds. */
static uint32_t any_pattern(mpt_dtype type, size_t i) {
    const reference_format f = reference_format_of(type);
    const uint32_t hidden = (uint32_t)1 << (f.significant - 1), h = mpt_hash(17, 0, (uint64_t)type, i);
    const uint32_t sign = h >> 31 ? f.sign : 0, low = h & (hidden - 1);
    switch (h >> 27 & 15) {
    case 0: return sign | f.inf;
    case 1: return sign | f.inf | low; /* NaN with a payload, quiet or signalling */
    case 2: return sign;
    case 3: return sign | low; /* subnormal */
    case 4: return sign | (f.largest - (h & 3));
    case 5: return sign | (hidden + (h & 3)); /* about the smallest normal */
    case 6: return h & (f.sign | (f.sign - 1));
    default: /* 2^-24 to 2^16 where the type has that many exponents */
        if (f.lowest > -126) return h & (f.sign | (f.sign - 1));
        return sign | (103 + (h >> 8) % 41) * hidden | low;
    }
}

static buffer buffer_any(mpt_dtype type, size_t count, size_t lead) {
    buffer b = buffer_new(type, count, lead);
    size_t i;
    for (i = 0; i < count; i++) buffer_put(&b, i, any_pattern(type, i + lead));
    buffer_upload(&b);
    return b;
}

/* ==== NARROWING AGAINST THE REFERENCE ==== */

/* Casts src on every instruction set; every result is what `expected` holds on the host. */
static void check_narrow(const buffer *src, buffer *dst, const buffer *expected, size_t n,
                         const mpt_rounding *rounding) {
    int i;
    for (i = 0; i < context_count; i += COUNTS) {
        buffer_wipe(dst);
        CHECK_OK(contexts[i], mpt_cast(contexts[i], n, buffer_array(src), buffer_array(dst), rounding));
        if (!CHECK(buffer_is(dst, expected)))
            printf("    to %s on %s, rounding %d, overflow %d\n", mpt_dtype_name(dst->type), mpt_isa_name(contexts[i]),
                   (int)rounding->round, (int)rounding->overflow);
    }
}

/* The last fp32 before and the first one on every step of the staircase, with both signs, inf and NaN at its end. */
static void test_edges(mpt_dtype type, mpt_round round, mpt_overflow overflow) {
    const mpt_rounding rounding = rounding_of(round, overflow);
    reference_stairs *stairs = (reference_stairs *)test_memory(sizeof *stairs);
    buffer src, dst, expected;
    uint32_t y, n, wrong = 0;
    reference_build_stairs(stairs, type, round);
    n = 4 * stairs->steps;
    src = buffer_new(MPT_F32, n, 1), dst = buffer_new(type, n, 1), expected = buffer_new(type, n, 1);
    for (y = 1; y <= stairs->steps; y++) {
        uint32_t k;
        for (k = 0; k < 4; k++) {
            const uint32_t magnitude = stairs->edge[y] - k % 2, x = magnitude | (k / 2) << 31, i = 4 * (y - 1) + k;
            const uint32_t bits = reference_narrow(x, type, round, overflow);
            buffer_put(&src, i, x);
            buffer_put(&expected, i, bits);
            if (magnitude > 0x7f800000u) continue;
            wrong += (bits & (reference_format_of(type).sign - 1)) !=
                     reference_step_pattern(stairs, reference_step(stairs, magnitude, y - k % 2), overflow);
        }
    }
    CHECK_EQUAL(wrong, 0); /* the two references agree */
    buffer_upload(&src);
    check_narrow(&src, &dst, &expected, n, &rounding);
    buffer_free(&src), buffer_free(&dst), buffer_free(&expected);
    free(stairs);
}

enum { BLOCK = 65536, LANES = 8 };

typedef struct sample { /* how one type rounds one way, and where on the staircase each lane stands */
    reference_stairs stairs;
    uint32_t step[LANES];
} sample;

/* Sample number i of 2^32 / TEST_STRIDE: neighbours differ in sign and in their upper exponent bits. */
static uint32_t sample_pattern(uint32_t i) {
    return (i % LANES) << 29 | (i / LANES) * TEST_STRIDE | (mpt_hash(1, 0, 0, i) & (TEST_STRIDE - 1));
}

static void test_sample_block(sample *s, mpt_round round, mpt_overflow overflow, const buffer *src, buffer *expected,
                              buffer *dst) {
    const mpt_dtype type = s->stairs.type;
    const mpt_rounding rounding = rounding_of(round, overflow);
    const uint32_t sign = reference_format_of(type).sign;
    uint32_t i;
    for (i = 0; i < BLOCK; i++) {
        const uint32_t x = buffer_get(src, i), magnitude = x & 0x7fffffffu;
        uint32_t *step = &s->step[i % LANES];
        if (magnitude > 0x7f800000u) {
            buffer_put(expected, i, reference_narrow(x, type, round, overflow));
        } else {
            *step = reference_step(&s->stairs, magnitude, *step);
            buffer_put(expected, i, reference_step_pattern(&s->stairs, *step, overflow) | (x >> 31 ? sign : 0));
        }
    }
    check_narrow(src, dst, expected, BLOCK, &rounding);
}

static void test_sample(mpt_dtype type) {
    sample *s = (sample *)test_memory(2 * sizeof *s);
    buffer src = buffer_new(MPT_F32, BLOCK, 0), dst = buffer_new(type, BLOCK, 0), expected = buffer_new(type, BLOCK, 0);
    uint32_t block, i;
    int mode;
    for (mode = 0; mode < 2; mode++) reference_build_stairs(&s[mode].stairs, type, (mpt_round)mode);
    for (block = 0; block < 0xffffffffu / TEST_STRIDE / BLOCK + 1; block++) {
        for (i = 0; i < BLOCK; i++) buffer_put(&src, i, sample_pattern(block * BLOCK + i));
        buffer_upload(&src);
        for (mode = 0; mode < 4; mode++)
            test_sample_block(&s[mode % 2], (mpt_round)(mode % 2), (mpt_overflow)(mode / 2), &src, &expected, &dst);
    }
    buffer_free(&src), buffer_free(&dst), buffer_free(&expected);
    free(s);
}

/* ==== EVERY PAIR OF TYPES ==== */

/* What mpt_cast promises for element i, by the scalar functions. */
static uint32_t cast_pattern(uint32_t bits, mpt_dtype from, mpt_dtype to, const mpt_rounding *r, size_t i) {
    return mpt_narrow(mpt_widen(bits, from), to, r->round, r->overflow, mpt_hash(r->seed, r->step, r->tensor, i));
}

/* A signalling NaN may keep its bits where both types are the same; then on all paths. */
static void check_pair(mpt_dtype from, mpt_dtype to, size_t n, size_t lead, const mpt_rounding *rounding) {
    buffer src = buffer_any(from, n, lead), dst = buffer_new(to, n, 3 - lead), expected = buffer_new(to, n, 3 - lead);
    size_t k, differ = 0;
    int i;
    for (k = 0; k < n; k++) buffer_put(&expected, k, cast_pattern(buffer_get(&src, k), from, to, rounding, k));
    for (i = 0; i < context_count; i += COUNTS) {
        buffer_wipe(&dst);
        if (mpt_cast(contexts[i], n, buffer_array(&src), buffer_array(&dst), rounding) != MPT_OK) differ++;
        buffer_download(&dst);
        for (k = 0; k < n && from == to && i == 0; k++)
            if (reference_kind_of(buffer_get(&src, k), from) == REFERENCE_NAN &&
                buffer_get(&dst, k) == buffer_get(&src, k))
                buffer_put(&expected, k, buffer_get(&src, k));
        differ += !buffer_is(&dst, &expected);
    }
    if (!CHECK_EQUAL(differ, 0))
        printf("    %s to %s, %lu elements from %lu, rounding %d, overflow %d\n", mpt_dtype_name(from),
               mpt_dtype_name(to), (unsigned long)n, (unsigned long)lead, (int)rounding->round,
               (int)rounding->overflow);
    buffer_free(&src), buffer_free(&dst), buffer_free(&expected);
}

/* All sizes about the width of any vector, or a few if numbers are sampled thinly, too; all offsets from its alignment
   that are left. */
static void test_pair(mpt_dtype from, mpt_dtype to) {
    const size_t stride = TEST_STRIDE > 256 ? 9 : 1;
    size_t n, lead;
    int mode;
    for (mode = 0; mode < 6; mode++) {
        const mpt_rounding rounding = rounding_of((mpt_round)(mode % 3), (mpt_overflow)(mode / 3));
        for (n = 0; n <= 70; n += stride)
            for (lead = 0; lead <= 3; lead++) check_pair(from, to, n, lead, &rounding);
    }
}

static void test_in_place(mpt_dtype from, mpt_dtype to) {
    enum { N = 1001 };
    const mpt_rounding rounding = rounding_of(MPT_ROUND_NEAREST, MPT_OVERFLOW_INF);
    buffer src = buffer_any(from, N, 1), dst = buffer_new(to, N, 1), place;
    int i;
    CHECK_OK(contexts[0], mpt_cast(contexts[0], N, buffer_array(&src), buffer_array(&dst), &rounding));
    buffer_download(&dst);
    for (i = 0; i < context_count; i++) {
        buffer_upload(&src);
        place = src, place.type = to;
        CHECK_OK(contexts[i], mpt_cast(contexts[i], N, buffer_array(&src), buffer_array(&place), &rounding));
        place.host = (unsigned char *)test_memory(place.bytes);
        CHECK_OK(contexts[0], mpt_download(contexts[0], place.host, place.device, place.bytes));
        CHECK(memcmp(place.host + place.begin, dst.host + dst.begin, N * mpt_dtype_size(to)) == 0);
        free(place.host);
    }
    buffer_free(&src), buffer_free(&dst);
}

/* Arrays long enough for all threads: the bits of plain C on one thread. */
static void test_threads(mpt_dtype from, mpt_dtype to, mpt_round round) {
    enum { N = 300007 };
    const mpt_rounding rounding = rounding_of(round, MPT_OVERFLOW_INF);
    buffer src = buffer_any(from, N, 1), dst = buffer_new(to, N, 2), expected = buffer_new(to, N, 2);
    int i;
    for (i = 0; i < context_count; i++) {
        buffer_wipe(&dst);
        CHECK_OK(contexts[i], mpt_cast(contexts[i], N, buffer_array(&src), buffer_array(&dst), &rounding));
        if (i == 0) {
            buffer_download(&dst);
            memcpy(expected.host, dst.host, dst.bytes);
        }
        CHECK(buffer_is(&dst, &expected));
    }
    buffer_free(&src), buffer_free(&dst), buffer_free(&expected);
}

static void test_pairs(void) {
    int from, to, round;
    for (from = 0; from < MPT_DTYPE_COUNT; from++)
        for (to = 0; to < MPT_DTYPE_COUNT; to++) {
            test_pair((mpt_dtype)from, (mpt_dtype)to);
            for (round = MPT_ROUND_NEAREST; round <= MPT_ROUND_STOCHASTIC; round++)
                test_threads((mpt_dtype)from, (mpt_dtype)to, (mpt_round)round);
            if (mpt_dtype_size((mpt_dtype)from) == mpt_dtype_size((mpt_dtype)to))
                test_in_place((mpt_dtype)from, (mpt_dtype)to);
        }
}

/* ==== STOCHASTIC ROUNDING ==== */

/* n equal values, a share of the gap above `below`: about n share of them go up, with deviation
   sqrt(n share (1 - share)). */
static void check_unbiased(mpt_context *ctx, mpt_dtype type, uint32_t below, double share) {
    enum { N = 65536 };
    const double a = reference_widen(below, type), b = reference_widen(below + 1, type);
    const uint32_t x = reference_round(a + share * (b - a), MPT_F32, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF);
    const double exact = (reference_widen(x, MPT_F32) - a) / (b - a); /* share after the rounding to fp32 */
    const mpt_rounding rounding = rounding_of(MPT_ROUND_STOCHASTIC, MPT_OVERFLOW_INF);
    buffer src = buffer_new(MPT_F32, N, 0), dst = buffer_new(type, N, 0);
    size_t i, up = 0, elsewhere = 0;
    for (i = 0; i < N; i++) buffer_put(&src, i, x);
    buffer_upload(&src);
    CHECK_OK(ctx, mpt_cast(ctx, N, buffer_array(&src), buffer_array(&dst), &rounding));
    buffer_download(&dst);
    for (i = 0; i < N; i++) {
        up += buffer_get(&dst, i) == below + 1;
        elsewhere += buffer_get(&dst, i) != below && buffer_get(&dst, i) != below + 1;
    }
    CHECK_EQUAL(elsewhere, 0);
    CHECK_NEAR(up, (double)N * exact, 5 * sqrt((double)N * exact * (1 - exact)));
    buffer_free(&src), buffer_free(&dst);
}

/* Every value of the type, in fp32, comes back as it was; NaN quiet, as from any cast. */
static void check_exact(mpt_context *ctx, mpt_dtype type) {
    const uint32_t n = (uint32_t)1 << 8 * mpt_dtype_size(type);
    const mpt_rounding stochastic = rounding_of(MPT_ROUND_STOCHASTIC, MPT_OVERFLOW_INF);
    buffer src = buffer_new(MPT_F32, n, 0), dst = buffer_new(type, n, 0), expected = buffer_new(type, n, 0);
    uint32_t i;
    for (i = 0; i < n; i++) {
        const uint32_t wide = reference_widen_pattern(i, type);
        buffer_put(&src, i, wide);
        buffer_put(&expected, i, reference_narrow(wide, type, MPT_ROUND_ZERO, MPT_OVERFLOW_INF));
    }
    buffer_upload(&src), buffer_wipe(&dst);
    CHECK_OK(ctx, mpt_cast(ctx, n, buffer_array(&src), buffer_array(&dst), &stochastic));
    CHECK(buffer_is(&dst, &expected));
    buffer_free(&src), buffer_free(&dst), buffer_free(&expected);
}

/* The same names give the same bits again, any other seed, step or tensor gives others. */
static void check_names(mpt_context *ctx, mpt_dtype type) {
    enum { N = 4096 };
    buffer src = buffer_new(MPT_F32, N, 0), dst = buffer_new(type, N, 0), first = buffer_new(type, N, 0);
    uint32_t i;
    for (i = 0; i < N; i++) buffer_put(&src, i, 0x3f9c71c7u); /* 1.2222, in no type */
    buffer_upload(&src);
    for (i = 0; i < 5; i++) {
        mpt_rounding r = rounding_of(MPT_ROUND_STOCHASTIC, MPT_OVERFLOW_INF);
        r.seed += i == 2, r.step += i == 3, r.tensor += i == 4;
        buffer_wipe(&dst);
        CHECK_OK(ctx, mpt_cast(ctx, N, buffer_array(&src), buffer_array(&dst), &r));
        if (i == 0) {
            buffer_download(&dst);
            memcpy(first.host, dst.host, dst.bytes);
        }
        CHECK(buffer_is(&dst, &first) == (i < 2));
    }
    buffer_free(&src), buffer_free(&dst), buffer_free(&first);
}

static void test_stochastic(mpt_dtype type) {
    static const double shares[] = {0.5, 0.25, 0.9, 0.01};
    const uint32_t one = reference_round(1, type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF);
    size_t s;
    int i;
    for (i = 0; i < context_count; i += COUNTS) {
        for (s = 0; s < sizeof shares / sizeof *shares; s++) {
            check_unbiased(contexts[i], type, one, shares[s]);
            check_unbiased(contexts[i], type, reference_format_of(type).largest - 1, shares[s]);
            check_unbiased(contexts[i], type, 0, shares[s]);
        }
        check_exact(contexts[i], type);
        check_names(contexts[i], type);
    }
}

/* ==== SCAN, SCALE, HISTOGRAM ==== */

/* The bits of plain C on one thread, whatever the path; what they should be numbers.c says. */
static void check_scan(mpt_dtype type, size_t n, size_t lead, int step) {
    buffer x = buffer_any(type, n, lead);
    mpt_histogram *h = (mpt_histogram *)test_memory(2 * sizeof *h);
    mpt_scan scan, first;
    size_t differ = 0;
    int i;
    for (i = 0; i < context_count; i += step) {
        memset(&scan, 0xa5, sizeof scan);
        CHECK_OK(contexts[i], mpt_scan_array(contexts[i], n, buffer_array(&x), &scan));
        memset(&h[1], 0, sizeof *h);
        CHECK_OK(contexts[i], mpt_histogram_add(contexts[i], n, buffer_array(&x), &h[1]));
        if (i == 0) first = scan, h[0] = h[1];
        differ += memcmp(&scan, &first, sizeof scan) != 0;
        differ += memcmp(&h[0], &h[1], sizeof *h) != 0;
    }
    if (!CHECK_EQUAL(differ, 0)) printf("    scan of %lu %s\n", (unsigned long)n, mpt_dtype_name(type));
    free(h);
    buffer_free(&x);
}

/* x times factor in fp32, rounded to nearest; a NaN stays one. */
static size_t scaled_wrong(const buffer *before, const buffer *after, size_t n, float factor) {
    size_t i, wrong = 0;
    for (i = 0; i < n; i++) {
        const float product = mpt_widen(buffer_get(before, i), before->type) * factor;
        const uint32_t is = buffer_get(after, i);
        if ((test_bits(product) & 0x7fffffffu) > 0x7f800000u)
            wrong += reference_kind_of(is, after->type) != REFERENCE_NAN;
        else wrong += is != reference_narrow(test_bits(product), after->type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF);
    }
    return wrong;
}

static void check_scale(mpt_dtype type, size_t n, size_t lead, float factor, int step) {
    buffer before = buffer_any(type, n, lead), x = buffer_any(type, n, lead), expected = buffer_new(type, n, lead);
    mpt_scan scan, first, again;
    size_t differ = 0;
    int i;
    for (i = 0; i < context_count; i += step) {
        memcpy(x.host, before.host, x.bytes);
        buffer_upload(&x);
        CHECK_OK(contexts[i], mpt_scale_array(contexts[i], n, factor, buffer_array(&x), &scan));
        if (i == 0) {
            buffer_download(&x);
            memcpy(expected.host, x.host, x.bytes);
            differ += scaled_wrong(&before, &x, n, factor);
            CHECK_OK(contexts[i], mpt_scan_array(contexts[i], n, buffer_array(&x), &again));
            first = scan;
            differ += memcmp(&scan, &again, sizeof scan) != 0; /* of what is there afterwards */
        }
        differ += memcmp(&scan, &first, sizeof scan) != 0;
        differ += !buffer_is(&x, &expected);
    }
    if (!CHECK_EQUAL(differ, 0))
        printf("    %lu %s times %g\n", (unsigned long)n, mpt_dtype_name(type), (double)factor);
    buffer_free(&before), buffer_free(&x), buffer_free(&expected);
}

static void test_scans(mpt_dtype type) {
    static const size_t sizes[] = {4095, 4096, 4097, 300007}; /* about a chunk; many, for all threads */
    static const float factors[] = {1.0f / 3, 1.0f / 65536, 65536, 0, -2};
    size_t n, i, f;
    for (n = 0; n <= 70; n++) {
        check_scan(type, n, n % 4, COUNTS);
        check_scale(type, n, n % 4, factors[n % 5], COUNTS);
    }
    for (i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        check_scan(type, sizes[i], i, 1);
        for (f = 0; f < 5; f++) check_scale(type, sizes[i], i, factors[f], 1);
    }
}

int main(int argc, char **argv) {
    int type, mode, i;
    test_begin(argc, argv);
    open_contexts();
    for (type = MPT_F16; type < MPT_DTYPE_COUNT; type++) {
        for (mode = 0; mode < 4; mode++)
            RUN_TEST(test_edges((mpt_dtype)type, (mpt_round)(mode % 2), (mpt_overflow)(mode / 2)));
        RUN_TEST(test_sample((mpt_dtype)type));
        RUN_TEST(test_stochastic((mpt_dtype)type));
    }
    RUN_TEST(test_pairs());
    for (type = MPT_F32; type < MPT_DTYPE_COUNT; type++) RUN_TEST(test_scans((mpt_dtype)type));
    for (i = 0; i < context_count; i++) mpt_close(contexts[i]);
    return test_finish("casts");
}
