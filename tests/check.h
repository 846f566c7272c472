/* check.h - what every test program shares: checks that count, one way to open a context, arrays on its device.

   Include it after mpt.h. A context comes from test_open and arrays from test_tensor_new, so the same programs run on
   any device that mpt has. Finiteness is told by bits, so that the checks also hold under -ffast-math. */
#ifndef CHECK_H
#define CHECK_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ==== CHECKS ==== each counts as one; a failing one prints where, what and the values */

typedef struct test_tally {
    long passed, failed, skipped;
} test_tally;

static test_tally test_counts;
static const char *test_only = ""; /* run the tests whose call has this in it */
static const char *test_now = "";  /* the call of the test that runs */
static long test_runs;

/* The first call of main: `build/tests/unit/model NAME` runs the tests whose name contains NAME. */
static inline void test_begin(int argc, char **argv) {
    if (argc > 1) test_only = argv[1];
}

static inline int test_starts(const char *call) {
    if (!strstr(call, test_only)) return 0;
    test_now = call;
    test_runs++;
    return 1;
}

/* Runs a test of main's, such as RUN_TEST(test_linear(ctx)). */
#define RUN_TEST(call)                \
    do {                              \
        if (test_starts(#call)) call; \
    } while (0)

static inline int test_count(int ok, const char *file, int line, const char *text) {
    if (ok) test_counts.passed++;
    else {
        test_counts.failed++;
        printf("%s:%d: %s%sfailed: %s", file, line, test_now, *test_now ? ": " : "", text);
#ifdef TEST_FIRST /* for who only asks whether one fails: mutants.py */
        exit(1);
#endif
    }
    return ok;
}

static inline int test_is_finite(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits >> 52 & 0x7ff) != 0x7ff;
}

static inline int test_near(double value, double expected, double tolerance) {
    return test_is_finite(value) && test_is_finite(expected) && fabs(value - expected) <= tolerance;
}

static inline int test_check(int ok, const char *file, int line, const char *text) {
    if (!test_count(ok, file, line, text)) printf("\n");
    return ok;
}

static inline int test_check_near(double value, double expected, double tolerance, const char *file, int line,
                                  const char *text) {
    int ok = test_count(test_near(value, expected, tolerance), file, line, text);
    if (!ok) printf(" is %.17g, expected %.17g within %.3g\n", value, expected, tolerance);
    return ok;
}

static inline int test_check_result(const mpt_context *ctx, mpt_result result, mpt_result expected, const char *file,
                                    int line, const char *text) {
    int ok = test_count(result == expected, file, line, text);
    if (!ok) {
        printf(" is %d (%s), expected %d; reason: %s\n", (int)result, mpt_result_text(result), (int)expected,
               ctx ? mpt_why(ctx) : "");
    }
    return ok;
}

/* Does the text have the word, with no letter, digit or _ beside it? */
static inline int test_has_word(const char *text, const char *word) {
    const char *inside = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_";
    size_t length = strlen(word);
    const char *at;
    for (at = strstr(text, word); at; at = strstr(at + 1, word)) {
        int before = at > text && strchr(inside, at[-1]) != NULL;
        int after = at[length] && strchr(inside, at[length]) != NULL;
        if (!before && !after) return 1;
    }
    return 0;
}

static inline int test_check_reason(const mpt_context *ctx, const char *word, const char *file, int line) {
    int ok = test_count(test_has_word(mpt_why(ctx), word), file, line, "the reason");
    if (!ok) printf(" is \"%s\", without the word \"%s\"\n", mpt_why(ctx), word);
    return ok;
}

#define CHECK(condition) test_check((condition) ? 1 : 0, __FILE__, __LINE__, #condition)
#define CHECK_NEAR(value, expected, tolerance) \
    test_check_near((double)(value), (double)(expected), (double)(tolerance), __FILE__, __LINE__, #value)
#define CHECK_EQUAL(value, expected) CHECK_NEAR(value, expected, 0)
#define CHECK_OK(ctx, call) test_check_result(ctx, call, MPT_OK, __FILE__, __LINE__, #call)
/* The call fails with this code, and the reason has this word. */
#define CHECK_ERROR(ctx, call, code, word) \
    (test_check_result(ctx, call, code, __FILE__, __LINE__, #call), test_check_reason(ctx, word, __FILE__, __LINE__))

/* The closing line of a program and its exit status. */
static inline int test_finish(const char *name) {
    if (*test_only && !test_runs) {
        test_counts.failed++;
        printf("no test of %s has '%s' in its name\n", name, test_only);
    }
    printf("%s: %ld passed, %ld failed", name, test_counts.passed, test_counts.failed);
    if (test_counts.skipped) printf(", %ld skipped", test_counts.skipped);
    printf("\n");
    return test_counts.failed != 0;
}

/* For numbers that an enum does not have: unlike a constant, a compiler may not object to its cast. */
static inline int test_number(int number) { return number; }

/* ==== CONTEXTS, LAYERS AND MEMORY ==== */

#ifdef MPT_TEST_CUDA
#include "../mpt_cuda.cuh"

/* All contexts of a thread work on one stream, so that they may share arrays. A small workspace: large shapes go in
   slices. */
static inline mpt_context *test_open(const mpt_context_desc *desc) {
    static thread_local cudaStream_t stream;
    mpt_cuda_desc cuda = MPT_ZERO;
    if (!stream) cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (desc) cuda.context = *desc;
    cuda.stream = stream;
    cuda.workspace = 65536;
    return mpt_cuda_open(&cuda);
}
#else
/* TEST_REFERENCE=1 in the environment: on the plain loops of mpt.h's REFERENCE. */
static inline mpt_context *test_open(const mpt_context_desc *desc) {
    mpt_context_desc with = MPT_ZERO;
    if (!getenv("TEST_REFERENCE")) return mpt_open(desc);
    if (desc) with = *desc;
    with.reference = 1;
    return mpt_open(&with);
}
#endif

/* NULL: this CPU or build lacks the instruction set. */
static inline mpt_context *test_open_isa(mpt_isa isa, int threads) {
    mpt_context_desc desc = MPT_ZERO;
    desc.isa = isa;
    desc.threads = threads;
    return test_open(&desc);
}

static inline mpt_context *test_open_threads(int threads) {
    mpt_context_desc desc = MPT_ZERO;
    desc.threads = threads;
    return test_open(&desc);
}

/* A convolution that keeps the size of its input. */
static inline int test_same(mpt_model *net, int node, int filters, int kernel) {
    mpt_conv2d_desc desc = MPT_ZERO;
    desc.same = 1;
    return mpt_conv2d(net, node, filters, kernel, &desc);
}

/* Host memory; a test has no use for going on without it. */
static inline void *test_memory(size_t bytes) {
    void *p = calloc(bytes ? bytes : 1, 1);
    if (!p) {
        printf("out of memory for test data\n");
        exit(1);
    }
    return p;
}

/* All weights of a model. Free them. */
static inline float *test_params(mpt_context *ctx, mpt_model *net, size_t *count) {
    float *w;
    *count = mpt_params_count(mpt_model_params(net), 0);
    w = (float *)test_memory(*count * sizeof *w);
    CHECK_OK(ctx, mpt_params_get(mpt_model_params(net), 0, w));
    return w;
}

/* Have both models the same weights? */
static inline int test_same_weights(mpt_context *ctx, mpt_model *a, mpt_model *b) {
    size_t count, other;
    float *w = test_params(ctx, a, &count), *v = test_params(ctx, b, &other);
    const int same = count == other && memcmp(w, v, count * sizeof *w) == 0;
    free(w);
    free(v);
    return same;
}

static inline double *test_doubles(size_t count) { return (double *)test_memory(count * sizeof(double)); }

/* Allocator that counts, and that fails on demand. Give &counter as desc.user. */
typedef struct test_counter {
    size_t bytes, peak, blocks; /* held now, most ever held, blocks held now */
    long calls;                 /* of alloc, ever */
    long fail_at;               /* call number, from 1, that returns NULL; 0: none */
    int wrong_size;             /* release was told another size than alloc */
    int overrun;                /* a block was written past its end */
} test_counter;

enum {
    TEST_GUARD = 64, /* bytes after a block or array that nobody may write */
    TEST_HEADER = 64 /* in front of each block: its size; keeps malloc's alignment */
};

static inline void *test_counter_alloc(size_t bytes, void *user) {
    test_counter *counter = (test_counter *)user;
    unsigned char *block;
    if (++counter->calls == counter->fail_at) return NULL;
    block = (unsigned char *)malloc(TEST_HEADER + bytes + TEST_GUARD);
    if (!block) return NULL;
    memcpy(block, &bytes, sizeof bytes);
    memset(block + TEST_HEADER, 0xa5, bytes + TEST_GUARD); /* nobody may count on zeros */
    counter->bytes += bytes;
    counter->blocks++;
    if (counter->bytes > counter->peak) counter->peak = counter->bytes;
    return block + TEST_HEADER;
}

static inline void test_counter_release(void *p, size_t bytes, void *user) {
    test_counter *counter = (test_counter *)user;
    unsigned char *block = (unsigned char *)p - TEST_HEADER;
    size_t requested, i;
    if (!p) return;
    memcpy(&requested, block, sizeof requested);
    if (requested != bytes) counter->wrong_size = 1;
    for (i = 0; i < TEST_GUARD; i++) counter->overrun |= block[TEST_HEADER + requested + i] != 0xa5;
    counter->bytes -= requested;
    counter->blocks--;
    free(block);
}

/* Everything came back, as it was given. */
static inline int test_counter_clean(const test_counter *counter) {
    return !counter->bytes && !counter->blocks && !counter->wrong_size && !counter->overrun;
}

static inline mpt_context_desc test_counting(test_counter *counter, int threads) {
    mpt_context_desc desc = MPT_ZERO;
    memset(counter, 0, sizeof *counter);
    desc.alloc = test_counter_alloc;
    desc.release = test_counter_release;
    desc.user = counter;
    desc.threads = threads;
    return desc;
}

/* ==== NUMBERS ==== */

static inline uint32_t test_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float test_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Uniform in [low, high), named by seed and i. */
static inline double test_uniform(double low, double high, uint64_t seed, size_t i) {
    return low + (high - low) * (double)mpt_uniform(seed, 0, 0, i);
}

static inline void test_floats(float *out, size_t count, double low, double high, uint64_t seed) {
    size_t i;
    for (i = 0; i < count; i++) out[i] = (float)test_uniform(low, high, seed, i);
}

/* Unit roundoff: rounding to nearest moves a normal x by at most test_unit * |x|. */
static inline double test_unit(mpt_dtype type) {
    static const int significant[MPT_DTYPE_COUNT] = {24, 11, 8, 4, 3};
    return ldexp(1, -significant[type]);
}

/* Smallest positive value; in fp32 and bf16 the smallest normal, because -Ofast flushes what is below. */
static inline double test_tiny(mpt_dtype type) {
    static const int exponent[MPT_DTYPE_COUNT] = {-126, -24, -126, -9, -16};
    return ldexp(1, exponent[type]);
}

/* How far a result may lie from the exact one if it is a sum of `terms` products in fp32, in any order, then perhaps
   scaled, added to the old content and biased, and rounded once to `out`. magnitude: the same sum of absolute values.
   Each product passes at most terms - 1 additions, its own rounding and four more, so its relative error is at most
   (1 + u)^(terms + 4) - 1 <= (terms + 5) u while (terms + 5)^2 u < 1 (terms < 4000) and within 0.1 % up to 16000. */
static inline double test_bound(double terms, double magnitude, double exact, mpt_dtype out) {
    double sum = 1.001 * (terms + 5) * test_unit(MPT_F32) * magnitude;
    return sum + test_unit(out) * (fabs(exact) + sum) + test_tiny(out);
}

/* ==== TENSORS ==== */

/* Elements of a type in device memory, and the same values in double on the host. */
typedef struct test_tensor {
    mpt_context *ctx;
    mpt_array array;
    size_t count;
    double *value;
} test_tensor;

static inline size_t test_tensor_bytes(const test_tensor *t) { return t->count * mpt_dtype_size(t->array.type); }

static inline void test_store(void *to, uint32_t bits, mpt_dtype type) {
    uint8_t byte = (uint8_t)bits;
    uint16_t word = (uint16_t)bits;
    if (mpt_dtype_size(type) == 4) memcpy(to, &bits, 4);
    if (mpt_dtype_size(type) == 2) memcpy(to, &word, 2);
    if (mpt_dtype_size(type) == 1) memcpy(to, &byte, 1);
}

static inline uint32_t test_load(const void *from, mpt_dtype type) {
    uint32_t bits = 0;
    uint8_t byte = 0;
    uint16_t word = 0;
    if (mpt_dtype_size(type) == 4) memcpy(&bits, from, 4);
    if (mpt_dtype_size(type) == 2) memcpy(&word, from, 2), bits = word;
    if (mpt_dtype_size(type) == 1) memcpy(&byte, from, 1), bits = byte;
    return bits;
}

/* Rounds value[] to the type and writes it to the device. */
static inline void test_tensor_upload(test_tensor *t) {
    size_t i, size = mpt_dtype_size(t->array.type);
    unsigned char *raw = (unsigned char *)test_memory(t->count * size);
    for (i = 0; i < t->count; i++) {
        uint32_t bits = mpt_narrow((float)t->value[i], t->array.type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0);
        test_store(raw + i * size, bits, t->array.type);
        t->value[i] = (double)mpt_widen(bits, t->array.type);
    }
    CHECK_OK(t->ctx, mpt_upload(t->ctx, t->array.data, raw, t->count * size));
    free(raw);
}

static inline void test_tensor_download(test_tensor *t) {
    size_t i, size = mpt_dtype_size(t->array.type);
    unsigned char *raw = (unsigned char *)test_memory(t->count * size);
    CHECK_OK(t->ctx, mpt_download(t->ctx, raw, t->array.data, t->count * size));
    for (i = 0; i < t->count; i++) {
        t->value[i] = (double)mpt_widen(test_load(raw + i * size, t->array.type), t->array.type);
    }
    free(raw);
}

/* All zero. */
static inline test_tensor test_tensor_new(mpt_context *ctx, mpt_dtype type, size_t count) {
    unsigned char guard[TEST_GUARD];
    test_tensor t;
    t.ctx = ctx;
    t.count = count;
    t.value = test_doubles(count);
    t.array.type = type;
    t.array.data = mpt_alloc(ctx, test_tensor_bytes(&t) + TEST_GUARD);
    if (!t.array.data) {
        printf("out of device memory for test data\n");
        exit(1);
    }
    memset(guard, 0xa5, sizeof guard);
    CHECK_OK(ctx, mpt_upload(ctx, (unsigned char *)t.array.data + test_tensor_bytes(&t), guard, TEST_GUARD));
    return t;
}

static inline void test_tensor_fill(test_tensor *t, double low, double high, uint64_t seed) {
    size_t i;
    for (i = 0; i < t->count; i++) t->value[i] = test_uniform(low, high, seed, i);
    test_tensor_upload(t);
}

/* NaN everywhere: what an output holds that must not be read. */
static inline void test_tensor_poison(test_tensor *t) {
    size_t i;
    for (i = 0; i < t->count; i++) t->value[i] = (double)test_float(0x7fc00000u);
    test_tensor_upload(t);
}

static inline test_tensor test_tensor_random(mpt_context *ctx, mpt_dtype type, size_t count, uint64_t seed) {
    test_tensor t = test_tensor_new(ctx, type, count);
    test_tensor_fill(&t, -1, 1, seed);
    return t;
}

/* Frees it after a look at the guard. */
static inline void test_tensor_free(test_tensor *t) {
    unsigned char guard[TEST_GUARD];
    size_t i, written = 0;
    CHECK_OK(t->ctx, mpt_download(t->ctx, guard, (unsigned char *)t->array.data + test_tensor_bytes(t), TEST_GUARD));
    for (i = 0; i < TEST_GUARD; i++) written += guard[i] != 0xa5;
    CHECK_EQUAL(written, 0);
    mpt_free(t->ctx, t->array.data);
    free(t->value);
}

/* Every value within its tolerance of the expected one; counts as one check. */
static inline int test_check_all(const double *value, size_t count, const double *expected, const double *tolerance,
                                 const char *file, int line, const char *text) {
    size_t i;
    for (i = 0; i < count && test_near(value[i], expected[i], tolerance[i]); i++) {}
    if (!test_count(i == count, file, line, text)) {
        printf("[%lu] of %lu is %.9g, expected %.9g within %.3g\n", (unsigned long)i, (unsigned long)count, value[i],
               expected[i], tolerance[i]);
    }
    return i == count;
}

#define CHECK_ALL(value, count, expected, tolerance) \
    test_check_all(value, count, expected, tolerance, __FILE__, __LINE__, #value)

/* ==== TRAINING ==== a parameter block of two tensors, weight and bias, with an optimizer */

typedef struct test_block {
    mpt_context *ctx;
    mpt_params *params;
    mpt_optimizer *opt;
    size_t total; /* elements of the flat arrays */
} test_block;

static inline test_block test_block_new(mpt_context *ctx, const mpt_params_desc *desc, size_t weights, size_t biases,
                                        mpt_scaler *scaler, const mpt_optimizer_desc *optimizer) {
    test_block b;
    b.ctx = ctx;
    b.params = mpt_params_new(ctx, desc);
    mpt_params_add(b.params, "weight", weights, MPT_GROUP_WEIGHT);
    mpt_params_add(b.params, "bias", biases, MPT_GROUP_BIAS);
    CHECK_OK(ctx, mpt_params_build(b.params));
    b.opt = mpt_optimizer_new(b.params, scaler, optimizer);
    b.total = mpt_params_count(b.params, 0);
    if (!CHECK(b.opt != NULL)) exit(1);
    return b;
}

static inline void test_block_free(test_block *b) {
    mpt_optimizer_free(b->opt);
    mpt_params_free(b->params);
}

static inline mpt_optimizer_state test_block_state(const test_block *b) {
    mpt_optimizer_state s;
    memset(&s, 0, sizeof s);
    CHECK_OK(b->ctx, mpt_optimizer_get_state(b->opt, &s));
    return s;
}

/* Gradients (the first) and what an applied step changes: values, copies, moments. A part that is missing is zeros. */
enum { TEST_PARTS = 6 };

static inline float *test_block_download(const test_block *b) {
    const mpt_array copy = mpt_params_weight(b->params, 0);
    const void *part[TEST_PARTS];
    float *all = (float *)test_memory(TEST_PARTS * b->total * sizeof *all);
    int i;
    part[0] = mpt_params_grad(b->params, 0), part[1] = NULL, part[2] = copy.data;
    for (i = 1; i <= 3; i++) part[2 + i] = mpt_optimizer_moment(b->opt, i, 0);
    CHECK_OK(b->ctx, mpt_params_get(b->params, 0, all + b->total));
    for (i = 0; i < TEST_PARTS; i++) {
        if (!part[i]) continue;
        CHECK_OK(b->ctx, mpt_download(b->ctx, all + (size_t)i * b->total, part[i],
                                      b->total * (i == 2 ? mpt_dtype_size(copy.type) : sizeof *all)));
    }
    return all;
}

/* Are both downloads the same, the gradients included or not? Frees both. */
static inline int test_block_same(const test_block *b, float *x, float *y, int gradients) {
    const size_t first = gradients ? 0 : b->total;
    const int same = memcmp(x + first, y + first, (TEST_PARTS * b->total - first) * sizeof *x) == 0;
    free(x), free(y);
    return same;
}

#endif
