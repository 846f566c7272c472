/* numbers.c - floors 0 and 1: casts, rounding, random numbers, scans, histograms.

   Casts to 16 and 8 bits are compared with formats.h for a sample of one in TEST_STRIDE fp32 patterns and for every
   pattern beside a rounding boundary; -DTEST_STRIDE=1 compares all 2^32. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#define LENS_IMPLEMENTATION
#include "../../examples/lens.h"
#include "../check.h"
#include "../formats.h"

#ifndef TEST_STRIDE
#define TEST_STRIDE 256
#endif

/* How many patterns a 16- or 8-bit type has; of fp32 the largest one. */
static uint32_t patterns(mpt_dtype type) {
    return type == MPT_F32 ? 0xffffffffu : (uint32_t)1 << (8 * mpt_dtype_size(type));
}

/* ==== WIDENING ==== */

/* What mpt_widen promises, by bits: a comparison of floats would miss signs of zero, and NaN. */
static int widens(uint32_t bits, mpt_dtype type) {
    const reference_format f = reference_format_of(type);
    const uint32_t wide = test_bits(mpt_widen(bits, type)), sign = bits & f.sign ? 0x80000000u : 0;
    if ((wide & 0x80000000u) != sign) return 0;
    switch (reference_kind_of(bits, type)) {
    case REFERENCE_INF: return wide == (sign | 0x7f800000u);
    case REFERENCE_NAN:
        if (type == MPT_E4M3) return (wide & 0x7fc00000u) == 0x7fc00000u;
        return wide == (sign | 0x7fc00000u | (bits & ((f.sign - 1) ^ f.inf)) << (24 - f.significant));
    default:
        return reference_kind_of(wide, MPT_F32) == REFERENCE_FINITE &&
               fabs(reference_widen(wide, MPT_F32) - reference_widen(bits, type)) <= 0;
    }
}

static int comes_back(uint32_t bits, mpt_dtype type) {
    const reference_format f = reference_format_of(type);
    uint32_t expected = bits;
    if (reference_kind_of(bits, type) == REFERENCE_NAN && type != MPT_E4M3)
        expected |= (uint32_t)1 << (f.significant - 2); /* quiet */
    return mpt_narrow(mpt_widen(bits, type), type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0) == expected &&
           mpt_narrow(mpt_widen(bits, type), type, MPT_ROUND_ZERO, MPT_OVERFLOW_INF, 0) == expected;
}

static void test_widening(mpt_dtype type) {
    uint32_t bits, wrong = 0, lost = 0;
    for (bits = 0; bits < patterns(type); bits++) {
        wrong += !widens(bits, type);
        lost += !comes_back(bits, type);
    }
    CHECK_EQUAL(wrong, 0);
    CHECK_EQUAL(lost, 0);
}

/* ==== NARROWING ==== */

static uint32_t test_mismatches(uint32_t x, mpt_dtype type) {
    static const mpt_round rounds[2] = {MPT_ROUND_NEAREST, MPT_ROUND_ZERO};
    static const mpt_overflow overflows[2] = {MPT_OVERFLOW_INF, MPT_OVERFLOW_SATURATE};
    uint32_t wrong = 0;
    int i;
    for (i = 0; i < 4; i++) {
        const uint32_t is = mpt_narrow(test_float(x), type, rounds[i % 2], overflows[i / 2], 0);
        const uint32_t expected = reference_narrow(x, type, rounds[i % 2], overflows[i / 2]);
        if (is != expected && wrong++ == 0) {
            printf("%s(0x%08lx), rounding %d, overflow %d: is 0x%lx, expected 0x%lx\n", mpt_dtype_name(type),
                   (unsigned long)x, i % 2, i / 2, (unsigned long)is, (unsigned long)expected);
        }
    }
    return wrong;
}

/* A step of TEST_STRIDE + 1 where the stride is even visits low bits of every kind. */
static void test_narrowing_sample(mpt_dtype type) {
    const uint64_t step = TEST_STRIDE | 1, count = ((uint64_t)1 << 32) / TEST_STRIDE;
    uint64_t i, wrong = 0;
    for (i = 0; i < count && wrong < 20; i++) wrong += test_mismatches((uint32_t)(i * step), type);
    CHECK_EQUAL(wrong, 0);
}

/* Every value of the format and every middle between two of them, each with its fp32 neighbours. */
static void test_narrowing_boundaries(mpt_dtype type) {
    const reference_format f = reference_format_of(type);
    uint32_t bits, wrong = 0;
    for (bits = 0; bits <= f.largest && wrong < 20; bits++) {
        const double a = reference_widen(bits, type);
        const double gap = bits < f.largest ? reference_widen(bits + 1, type) - a : a - reference_widen(bits - 1, type);
        const uint32_t below = reference_round(a, MPT_F32, MPT_ROUND_ZERO, MPT_OVERFLOW_INF);
        const uint32_t middle = reference_round(a + gap / 2, MPT_F32, MPT_ROUND_ZERO, MPT_OVERFLOW_INF);
        int d;
        for (d = -1; d <= 1; d++) {
            wrong += test_mismatches(below + (uint32_t)d, type); /* 0 - 1 is a NaN: welcome */
            wrong += test_mismatches((middle + (uint32_t)d) ^ 0x80000000u, type);
        }
    }
    CHECK_EQUAL(wrong, 0);
}

static void test_named_casts(void) {
    uint32_t i, wrong = 0;
    for (i = 0; i < 65536; i++) {
        const uint32_t bits = i << 16 | (i * 40503u & 0xffffu);
        const float x = test_float(bits);
        wrong += mpt_f16_from_f32(x).bits != reference_narrow(bits, MPT_F16, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF);
        wrong += mpt_bf16_from_f32(x).bits != reference_narrow(bits, MPT_BF16, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF);
        wrong += mpt_e4m3_from_f32(x).bits != reference_narrow(bits, MPT_E4M3, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF);
        wrong += mpt_e5m2_from_f32(x).bits != reference_narrow(bits, MPT_E5M2, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF);
    }
    for (i = 0; i < 65536; i++) {
        const mpt_f16 h = {(uint16_t)i};
        const mpt_bf16 b = {(uint16_t)i};
        const mpt_e4m3 e = {(uint8_t)i};
        const mpt_e5m2 m = {(uint8_t)i};
        wrong += test_bits(mpt_f32_from_f16(h)) != test_bits(mpt_widen(i, MPT_F16));
        wrong += test_bits(mpt_f32_from_bf16(b)) != test_bits(mpt_widen(i, MPT_BF16));
        wrong += test_bits(mpt_f32_from_e4m3(e)) != test_bits(mpt_widen(i & 255, MPT_E4M3));
        wrong += test_bits(mpt_f32_from_e5m2(m)) != test_bits(mpt_widen(i & 255, MPT_E5M2));
    }
    CHECK_EQUAL(wrong, 0);
}

/* A second opinion on fp16: the compiler's own type, where it has one. Its NaN payloads are not compared. */
#if defined(__FLT16_MANT_DIG__) && defined(__SSE2__) && !defined(__cplusplus)
__extension__ typedef _Float16 compiler_half;

static void test_compiler_half(void) {
    const uint64_t step = TEST_STRIDE | 1, count = ((uint64_t)1 << 32) / TEST_STRIDE;
    uint64_t i, wrong = 0;
    for (i = 0; i < count; i++) {
        const uint32_t x = (uint32_t)(i * step);
        const compiler_half half = (compiler_half)test_float(x);
        uint16_t bits;
        memcpy(&bits, &half, sizeof bits);
        if (reference_kind_of(x, MPT_F32) == REFERENCE_NAN) continue;
        wrong += bits != mpt_f16_from_f32(test_float(x)).bits;
    }
    CHECK_EQUAL(wrong, 0);
}
#else
static void test_compiler_half(void) {
    printf("the compiler has no half type to compare with\n");
    test_counts.skipped++;
}
#endif

/* ==== STOCHASTIC ROUNDING ==== */

static void test_stochastic_exact(mpt_dtype type) {
    const reference_format f = reference_format_of(type);
    uint32_t bits, i, wrong = 0;
    for (bits = 0; bits < patterns(type); bits++) {
        uint32_t expected = bits;
        if (reference_kind_of(bits, type) == REFERENCE_NAN && type != MPT_E4M3)
            expected |= (uint32_t)1 << (f.significant - 2);
        for (i = 0; i < 4; i++) {
            const uint32_t random = i == 0 ? 0 : i == 1 ? 0xffffffffu : mpt_hash(1, 0, i, bits);
            const float x = mpt_widen(bits, type);
            wrong += mpt_narrow(x, type, MPT_ROUND_STOCHASTIC, MPT_OVERFLOW_INF, random) != expected;
        }
    }
    CHECK_EQUAL(wrong, 0);
}

/* x lies a share of the gap above `below`: of n draws about n share go up, with deviation sqrt(n share (1 - share)). */
static void check_unbiased(mpt_dtype type, uint32_t below, double share, uint64_t seed) {
    const double a = reference_widen(below, type), b = reference_widen(below + 1, type);
    const uint32_t x = reference_round(a + share * (b - a), MPT_F32, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF);
    const double exact = (reference_widen(x, MPT_F32) - a) / (b - a); /* share after the rounding to fp32 */
    const int n = 65536;
    int i, up = 0, elsewhere = 0;
    for (i = 0; i < n; i++) {
        const uint32_t y =
            mpt_narrow(test_float(x), type, MPT_ROUND_STOCHASTIC, MPT_OVERFLOW_INF, mpt_hash(seed, 0, 0, (uint64_t)i));
        up += y == below + 1;
        elsewhere += y != below && y != below + 1;
    }
    CHECK_EQUAL(elsewhere, 0);
    CHECK_NEAR(up, n * exact, 5 * sqrt(n * exact * (1 - exact)));
}

static void test_stochastic_unbiased(mpt_dtype type) {
    static const double shares[] = {0.5, 0.25, 0.9, 0.01, 0.6180339887};
    const reference_format f = reference_format_of(type);
    const uint32_t one = reference_round(1, type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF);
    size_t i;
    for (i = 0; i < sizeof shares / sizeof *shares; i++) {
        check_unbiased(type, one, shares[i], 10 + i);
        check_unbiased(type, one - 1, shares[i], 20 + i);       /* the gap changes at 1 */
        check_unbiased(type, f.largest - 1, shares[i], 30 + i); /* last gap before overflow */
        check_unbiased(type, 1, shares[i], 40 + i);             /* subnormal */
        check_unbiased(type, 0, shares[i], 50 + i);             /* between zero and the smallest */
    }
}

/* ==== RANDOM NUMBERS ==== */

/* Initial weights are named by these values: they never change. */
static void test_hash_values(void) {
    CHECK_EQUAL(mpt_hash(0, 0, 0, 0), 0x1957a760u);
    CHECK_EQUAL(mpt_hash(1, 2, 3, 4), 0xa8b355d9u);
    CHECK_EQUAL(mpt_hash(0xffffffffffffffffu, 1, 0, 0x123456789abcdefu), 0x959ac2b6u);
}

static uint32_t hash_with(int argument, uint64_t value) {
    return mpt_hash(argument == 0 ? value : 7, argument == 1 ? value : 7, argument == 2 ? value : 7,
                    argument == 3 ? value : 7);
}

/* Counting in any argument sets every bit half of the time, within 5 deviations of sqrt(n) / 2, and flips it half of
   the time from one count to the next. */
static void test_hash_balance(int argument) {
    const int n = 65536;
    int ones[32] = {0}, changes[32] = {0}, i, b;
    for (i = 0; i < n; i++) {
        const uint32_t h = hash_with(argument, (uint64_t)i), next = hash_with(argument, (uint64_t)i + 1);
        for (b = 0; b < 32; b++) {
            ones[b] += (int)(h >> b & 1);
            changes[b] += (int)((h ^ next) >> b & 1);
        }
    }
    for (b = 0; b < 32; b++) {
        CHECK_NEAR(ones[b], n / 2, 5 * sqrt(n) / 2);
        CHECK_NEAR(changes[b], n / 2, 5 * sqrt(n) / 2);
    }
}

/* Any input bit, flipped, flips any output bit half of the time. */
static void test_hash_avalanche(int argument) {
    const int n = 4096;
    int bit, i, b;
    for (bit = 0; bit < 64; bit++) {
        int flips[32] = {0}, unfair = 0;
        for (i = 0; i < n; i++) {
            const uint64_t value = (uint64_t)i * 0x2545f4914f6cdd1du;
            const uint32_t change = hash_with(argument, value) ^ hash_with(argument, value ^ (uint64_t)1 << bit);
            for (b = 0; b < 32; b++) flips[b] += (int)(change >> b & 1);
        }
        for (b = 0; b < 32; b++) unfair += abs(flips[b] - n / 2) > 5 * sqrt(n) / 2;
        CHECK_EQUAL(unfair, 0);
    }
}

/* Mean 1/2 and variance 1/12; the variance of (x - 1/2)^2 is 1/180. */
static void test_uniform_moments(void) {
    const int n = 100000;
    double sum = 0, squares = 0;
    int i, outside = 0, finer = 0;
    for (i = 0; i < n; i++) {
        const double x = (double)mpt_uniform(3, 1, 4, (uint64_t)i), scaled = x * 16777216;
        outside += !(x >= 0 && x < 1);
        finer += scaled - floor(scaled) > 0;
        sum += x;
        squares += (x - 0.5) * (x - 0.5);
    }
    CHECK_EQUAL(outside, 0);
    CHECK_EQUAL(finer, 0);
    CHECK_NEAR(sum / n, 0.5, 5 * sqrt(1.0 / 12 / n));
    CHECK_NEAR(squares / n, 1.0 / 12, 5 * sqrt(1.0 / 180 / n));
}

/* ==== BULK CASTS ==== */

static mpt_context *contexts[3]; /* plain C; 2 and 4 threads with this machine's best instruction set */

/* Patterns of every kind: for 8 bits all of them again and again, else spread over the whole range. */
static uint32_t any_pattern(mpt_dtype type, size_t i) {
    if (mpt_dtype_size(type) == 1) return (uint32_t)(i * 7 & 255);
    return mpt_hash(99, 0, type, i) % patterns(type);
}

typedef struct raw { /* n elements of a type in device memory, `lead` elements after its start, bytes on the host too */
    unsigned char *host, *device;
    size_t lead, n, bytes;
    mpt_dtype type;
} raw;

static raw raw_new(mpt_dtype type, size_t n, size_t lead) {
    raw r;
    size_t i, size = mpt_dtype_size(type);
    r.type = type, r.n = n, r.lead = lead;
    r.bytes = (lead + n) * size + TEST_GUARD;
    r.host = (unsigned char *)test_memory(r.bytes);
    memset(r.host, 0xa5, r.bytes);
    for (i = 0; i < n; i++) test_store(r.host + (lead + i) * size, any_pattern(type, i), type);
    r.device = (unsigned char *)mpt_alloc(contexts[0], r.bytes);
    CHECK_OK(contexts[0], mpt_upload(contexts[0], r.device, r.host, r.bytes));
    return r;
}

static mpt_array raw_array(const raw *r) {
    return mpt_typed_array(r->device + r->lead * mpt_dtype_size(r->type), r->type);
}

static uint32_t raw_get(const raw *r, size_t i) {
    return test_load(r->host + (r->lead + i) * mpt_dtype_size(r->type), r->type);
}

static void raw_free(raw *r) {
    mpt_free(contexts[0], r->device);
    free(r->host);
}

/* What a cast promises for element i, by the scalar functions proven above. */
static uint32_t cast_pattern(uint32_t bits, mpt_dtype from, mpt_dtype to, const mpt_rounding *rounding, size_t i) {
    const mpt_rounding plain = MPT_ZERO;
    const mpt_rounding *r = rounding ? rounding : &plain;
    return mpt_narrow(mpt_widen(bits, from), to, r->round, r->overflow, mpt_hash(r->seed, r->step, r->tensor, i));
}

/* The bytes around the elements stay, and the elements are as promised. Where the source is a signalling NaN the result
   may be quiet or not if both types are the same. */
static void check_cast(const raw *src, const raw *dst, const mpt_rounding *rounding) {
    const size_t size = mpt_dtype_size(dst->type), begin = dst->lead * size, end = begin + dst->n * size;
    unsigned char *after = (unsigned char *)test_memory(dst->bytes);
    size_t i, wrong = 0, touched = 0;
    CHECK_OK(contexts[0], mpt_download(contexts[0], after, dst->device, dst->bytes));
    for (i = 0; i < dst->bytes; i++) touched += (i < begin || i >= end) && after[i] != 0xa5;
    for (i = 0; i < dst->n; i++) {
        const uint32_t is = test_load(after + begin + i * size, dst->type), from = raw_get(src, i);
        const int same_nan = src->type == dst->type && reference_kind_of(from, src->type) == REFERENCE_NAN;
        wrong += is != cast_pattern(from, src->type, dst->type, rounding, i) && !(same_nan && is == from);
    }
    CHECK_EQUAL(touched, 0);
    if (!CHECK_EQUAL(wrong, 0)) printf("    in %s to %s\n", mpt_dtype_name(src->type), mpt_dtype_name(dst->type));
    free(after);
}

static void test_cast_pair(mpt_context *ctx, mpt_dtype from, mpt_dtype to, size_t n, const mpt_rounding *rounding) {
    raw src = raw_new(from, n, n % 3), dst = raw_new(to, n, n % 5);
    CHECK_OK(ctx, mpt_cast(ctx, n, raw_array(&src), raw_array(&dst), rounding));
    check_cast(&src, &dst, rounding);
    raw_free(&src);
    raw_free(&dst);
}

static void test_cast_in_place(mpt_dtype type, mpt_dtype to, size_t n) {
    raw src = raw_new(type, n, 1), dst = src;
    dst.type = to;
    CHECK_OK(contexts[2], mpt_cast(contexts[2], n, raw_array(&src), raw_array(&dst), NULL));
    check_cast(&src, &dst, NULL);
    raw_free(&src);
}

static void test_casts(void) {
    static const size_t sizes[] = {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1001};
    mpt_rounding rounding = MPT_ZERO;
    int from, to;
    size_t i;
    rounding.seed = 5, rounding.step = 6, rounding.tensor = 7;
    for (from = 0; from < MPT_DTYPE_COUNT; from++)
        for (to = 0; to < MPT_DTYPE_COUNT; to++) {
            for (i = 0; i < sizeof sizes / sizeof *sizes; i++) {
                test_cast_pair(contexts[0], (mpt_dtype)from, (mpt_dtype)to, sizes[i], NULL);
                test_cast_pair(contexts[1], (mpt_dtype)from, (mpt_dtype)to, sizes[i], NULL);
            }
            for (i = 0; i < 6; i++) { /* every rounding with every overflow, long enough to be split between threads */
                rounding.round = (mpt_round)(i % 3);
                rounding.overflow = (mpt_overflow)(i / 3);
                test_cast_pair(contexts[i % 3], (mpt_dtype)from, (mpt_dtype)to, 150001, &rounding);
            }
        }
    test_cast_in_place(MPT_F32, MPT_F32, 1001);
    test_cast_in_place(MPT_F16, MPT_BF16, 150001);
    test_cast_in_place(MPT_BF16, MPT_F16, 1001);
    test_cast_in_place(MPT_E5M2, MPT_E4M3, 150001);
}

static void test_cast_errors(void) {
    mpt_context *ctx = contexts[0];
    test_tensor t = test_tensor_new(ctx, MPT_F32, 4);
    mpt_rounding bad = MPT_ZERO;
    mpt_array unknown = mpt_typed_array(t.array.data, (mpt_dtype)test_number(99)), null = mpt_f32_array(NULL);
    CHECK(mpt_cast(NULL, 4, t.array, t.array, NULL) == MPT_ERROR_ARGUMENT);
    CHECK_ERROR(ctx, mpt_cast(ctx, 4, null, t.array, NULL), MPT_ERROR_ARGUMENT, "src");
    CHECK_ERROR(ctx, mpt_cast(ctx, 4, t.array, null, NULL), MPT_ERROR_ARGUMENT, "dst");
    CHECK_ERROR(ctx, mpt_cast(ctx, 4, unknown, t.array, NULL), MPT_ERROR_TYPE, "src");
    CHECK_ERROR(ctx, mpt_cast(ctx, 4, t.array, unknown, NULL), MPT_ERROR_TYPE, "dst");
    CHECK_ERROR(ctx, mpt_cast(ctx, (size_t)-1 / 2, t.array, t.array, NULL), MPT_ERROR_SHAPE, "overflow");
    bad.round = (mpt_round)test_number(3);
    CHECK_ERROR(ctx, mpt_cast(ctx, 4, t.array, t.array, &bad), MPT_ERROR_ARGUMENT, "rounding");
    bad.round = MPT_ROUND_NEAREST;
    bad.overflow = (mpt_overflow)test_number(2);
    CHECK_ERROR(ctx, mpt_cast(ctx, 4, t.array, t.array, &bad), MPT_ERROR_ARGUMENT, "rounding");
    test_tensor_free(&t);
}

/* ==== SCAN ==== */

static mpt_scan scan_by_hand(const raw *r) {
    mpt_scan s = MPT_ZERO;
    size_t i;
    s.first = r->n;
    for (i = 0; i < r->n; i++) {
        const uint32_t bits = raw_get(r, i);
        const reference_kind kind = reference_kind_of(bits, r->type);
        s.inf += kind == REFERENCE_INF;
        s.nan += kind == REFERENCE_NAN;
        if (kind == REFERENCE_FINITE) s.sum_squares += reference_widen(bits, r->type) * reference_widen(bits, r->type);
        else if (s.first == r->n) s.first = i;
    }
    return s;
}

/* A square of an fp32 is exact in double up to one rounding; n of them, all positive, added in any order, are within
   (n + 1) 2^-53 of their sum, and so is the sum made here. 1e-70: squares of subnormals, which -Ofast may drop. */
static void check_scan(const raw *r) {
    const mpt_scan expected = scan_by_hand(r);
    mpt_scan got[3];
    int i;
    for (i = 0; i < 3; i++) {
        memset(&got[i], 0xa5, sizeof got[i]);
        CHECK_OK(contexts[i], mpt_scan_array(contexts[i], r->n, raw_array(r), &got[i]));
        CHECK(memcmp(&got[i], &got[0], sizeof got[0]) == 0);
    }
    CHECK_EQUAL(got[0].inf, expected.inf);
    CHECK_EQUAL(got[0].nan, expected.nan);
    CHECK_EQUAL(got[0].first, expected.first);
    CHECK_NEAR(got[0].sum_squares, expected.sum_squares,
               2 * (double)(r->n + 1) * ldexp(1, -53) * expected.sum_squares + 1e-70);
}

static void raw_set(raw *r, size_t i, uint32_t bits) {
    test_store(r->host + (r->lead + i) * mpt_dtype_size(r->type), bits, r->type);
    CHECK_OK(contexts[0], mpt_upload(contexts[0], r->device, r->host, r->bytes));
}

/* Finite values between -1 and 1, then one inf or NaN at places where loops begin and end. */
static void test_scan_places(mpt_dtype type, size_t n) {
    const reference_format f = reference_format_of(type);
    const size_t places[] = {n - 1, n / 2, n / 3, 64, 1, 0};
    raw r = raw_new(type, n, 3);
    size_t i;
    for (i = 0; i < n; i++) {
        const double x = test_uniform(0, 1, 12, i);
        test_store(r.host + (r.lead + i) * mpt_dtype_size(type),
                   reference_round(x, type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF) | (i % 2 ? f.sign : 0), type);
    }
    raw_set(&r, 0, 0);
    check_scan(&r);
    for (i = 0; i < sizeof places / sizeof *places; i++) { /* from the last to the first, inf and NaN in turn */
        raw_set(&r, places[i], i % 2 ? f.sign | f.inf : (f.sign - 1));
        check_scan(&r);
    }
    raw_free(&r);
}

static void test_scans(void) {
    mpt_scan scan;
    int type;
    for (type = 0; type < MPT_DTYPE_COUNT; type++) {
        raw r = raw_new((mpt_dtype)type, 300007, 1); /* patterns of every kind */
        if (type != MPT_F32) check_scan(&r);
        raw_free(&r);
        test_scan_places((mpt_dtype)type, 200003);
        test_scan_places((mpt_dtype)type, 97);
    }
    CHECK_OK(contexts[0], mpt_scan_array(contexts[0], 0, mpt_f32_array(NULL), &scan));
    CHECK_EQUAL(scan.first, 0);
    CHECK_EQUAL(scan.sum_squares, 0);
    CHECK_ERROR(contexts[0], mpt_scan_array(contexts[0], 3, mpt_f32_array(NULL), &scan), MPT_ERROR_ARGUMENT, "x");
    CHECK_ERROR(contexts[0], mpt_scan_array(contexts[0], 3, mpt_f32_array((float *)&scan), NULL), MPT_ERROR_ARGUMENT,
                "out");
}

/* ==== HISTOGRAM ==== */

/* floor(log2 |x|) + 127 by frexp; 0 for everything under 2^-126. */
static int exponent_bin(double x) {
    int e;
    frexp(x, &e);
    return e - 1 < -126 ? 0 : e - 1 + 127;
}

static void test_histogram_counts(mpt_dtype type) {
    const size_t n = 100003;
    raw r = raw_new(type, n, 1);
    mpt_histogram expected, got[3];
    size_t i;
    memset(&expected, 0, sizeof expected);
    for (i = 0; i < n; i++) {
        const uint32_t bits = i % 10 ? raw_get(&r, i) : 0;
        const reference_kind kind = reference_kind_of(bits, type);
        test_store(r.host + (r.lead + i) * mpt_dtype_size(type), bits, type);
        if (kind == REFERENCE_INF) expected.inf += 2;
        else if (kind == REFERENCE_NAN) expected.nan += 2;
        else if (!(bits & (reference_format_of(type).sign - 1))) expected.zero += 2;
        else expected.exponent[exponent_bin(reference_widen(bits, type))] += 2;
    }
    raw_set(&r, 0, 0);
    for (i = 0; i < 3; i++) { /* adds: twice the array, twice the counts */
        memset(&got[i], 0, sizeof got[i]);
        CHECK_OK(contexts[i], mpt_histogram_add(contexts[i], n, raw_array(&r), &got[i]));
        CHECK_OK(contexts[i], mpt_histogram_add(contexts[i], n, raw_array(&r), &got[i]));
        CHECK(memcmp(&got[i], &expected, sizeof expected) == 0);
    }
    raw_free(&r);
}

/* A value of 1.25 * 2^e is no tie and not near the top of its bin, so rounding it says what happens to its bin. */
static lens_fit fit_by_hand(const mpt_histogram *h, mpt_dtype type, int shift) {
    const reference_format f = reference_format_of(type);
    lens_fit fit = MPT_ZERO;
    double total = 0;
    int e;
    for (e = 1; e < 255; e++) {
        const uint32_t bits = reference_round(ldexp(1.25, e - 127 + shift), type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF);
        const double count = (double)h->exponent[e];
        total += count;
        if (bits == 0) fit.flushed += count;
        else if (bits < (uint32_t)1 << (f.significant - 1)) fit.subnormal += count;
        else if (bits > f.largest) fit.overflowed += count;
    }
    if (total > 0) fit.flushed /= total, fit.subnormal /= total, fit.overflowed /= total;
    return fit;
}

/* Shares of integer counts: at most two roundings each, here and there. */
static void test_histogram_fits(void) {
    static const int shifts[] = {0, 1, -1, 10, -10, 16, -24, 60, -60, 130, -130, 300, -300};
    mpt_histogram h;
    size_t i;
    int type, e;
    memset(&h, 0, sizeof h);
    for (type = 0; type < MPT_DTYPE_COUNT; type++)
        CHECK_EQUAL(lens_histogram_fit(&h, (mpt_dtype)type, 0).flushed, 0); /* empty */
    for (e = 1; e < 255; e++) h.exponent[e] = mpt_hash(8, 0, 0, (uint64_t)e) % 1000;
    h.zero = 12345, h.inf = 67, h.nan = 89; /* shares of the nonzero finite values: these do not count */
    for (type = 0; type < MPT_DTYPE_COUNT; type++)
        for (i = 0; i < sizeof shifts / sizeof *shifts; i++) {
            const lens_fit expected = fit_by_hand(&h, (mpt_dtype)type, shifts[i]);
            const lens_fit is = lens_histogram_fit(&h, (mpt_dtype)type, shifts[i]);
            CHECK_NEAR(is.flushed, expected.flushed, 4 * ldexp(1, -53));
            CHECK_NEAR(is.subnormal, expected.subnormal, 4 * ldexp(1, -53));
            CHECK_NEAR(is.overflowed, expected.overflowed, 4 * ldexp(1, -53));
        }
    memset(&h, 0, sizeof h);
    h.exponent[0] = 5; /* fp32 subnormals */
    CHECK_EQUAL(lens_histogram_fit(&h, MPT_F32, 0).subnormal, 1);
    CHECK_EQUAL(lens_histogram_fit(&h, MPT_F16, 0).flushed, 1);
}

int main(int argc, char **argv) {
    int type, argument, i;
    test_begin(argc, argv);
    for (i = 0; i < 3; i++) {
        mpt_context_desc desc = MPT_ZERO;
        desc.threads = 1 << i;
        desc.isa = i ? MPT_ISA_BEST : MPT_ISA_PLAIN;
        contexts[i] = test_open(&desc);
    }
    for (type = MPT_F16; type < MPT_DTYPE_COUNT; type++) {
        RUN_TEST(test_widening((mpt_dtype)type));
        RUN_TEST(test_narrowing_sample((mpt_dtype)type));
        RUN_TEST(test_narrowing_boundaries((mpt_dtype)type));
        RUN_TEST(test_stochastic_exact((mpt_dtype)type));
        RUN_TEST(test_stochastic_unbiased((mpt_dtype)type));
        RUN_TEST(test_histogram_counts((mpt_dtype)type));
    }
    RUN_TEST(test_histogram_counts(MPT_F32));
    RUN_TEST(test_named_casts());
    CHECK(mpt_dtype_size(MPT_DTYPE_COUNT) == 0 && strstr(mpt_dtype_name(MPT_DTYPE_COUNT), "unknown"));
    RUN_TEST(test_compiler_half());
    RUN_TEST(test_hash_values());
    for (argument = 0; argument < 4; argument++) {
        RUN_TEST(test_hash_balance(argument));
        RUN_TEST(test_hash_avalanche(argument));
    }
    RUN_TEST(test_uniform_moments());
    RUN_TEST(test_casts());
    RUN_TEST(test_cast_errors());
    RUN_TEST(test_scans());
    RUN_TEST(test_histogram_fits());
    for (i = 0; i < 3; i++) mpt_close(contexts[i]);
    return test_finish("numbers");
}
