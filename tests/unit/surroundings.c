/* surroundings.c - what a program around mpt may do without a change in results, and what mpt leaves as it was: other
   contexts at work in other threads, errno, the floating-point environment, flushed subnormals, a table of functions
   that stands before the backend's and looks on.

   matrix.sh has the rest: no symbol that prints, exits or reads a locale, no malloc in a step. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include <errno.h>
#include <fenv.h>
#ifndef MPT_NO_THREADS
#include <pthread.h>
#endif
#if defined(__SSE2__) && defined(__GNUC__) && !defined(MPT_TEST_CUDA)
#include <xmmintrin.h>
#define CONTROL_WORD
#endif

/* ==== A TRAINING ==== its outcome is all that steps change, and the losses */

enum { BATCH = 16, SIDE = 8, CLASSES = 4, STEPS = 12, MOST = 8192 };

typedef struct outcome {
    float weights[MOST];
    double loss[STEPS];
    float scale;
    int64_t applied, skipped, failed;
} outcome;

enum { PRODUCTS = 10 * STEPS }; /* at most: a step has 5, and a device may ask for all calls of one once more */

/* Where the products of a training ran, in order, by a table that stands before the backend's */
typedef struct watch {
    mpt_backend before;
    mpt_place products[PRODUCTS];
    int count;
} watch;

static mpt_result watch_product(mpt_context *ctx, mpt_result result) {
    watch *w = (watch *)mpt_context_backend(ctx)->user;
    if (w->count < PRODUCTS) w->products[w->count] = mpt_context_place(ctx);
    w->count++;
    return result;
}

static mpt_result watched_gemm(mpt_context *ctx, const mpt_gemm_op *op) {
    const watch *w = (const watch *)mpt_context_backend(ctx)->user;
    return watch_product(ctx, w->before.gemm(ctx, op));
}

static mpt_result watched_conv2d(mpt_context *ctx, const mpt_conv2d_op *op) {
    const watch *w = (const watch *)mpt_context_backend(ctx)->user;
    return watch_product(ctx, w->before.conv2d(ctx, op));
}

static void stand_before(mpt_context *ctx, watch *w) {
    mpt_backend *table = mpt_context_backend(ctx);
    w->before = *table;
    table->user = w;
    table->gemm = watched_gemm, table->conv2d = watched_conv2d;
}

enum { CONV = 2, GELU = 7, LINEAR = 8 }; /* nodes */

static int layers(mpt_model *net) {
    int h = mpt_input(net, SIDE, SIDE, 3);
    h = mpt_relu(net, mpt_batch_norm(net, test_same(net, h, 24, 3), NULL));
    h = mpt_dropout(net, mpt_max_pool2d(net, h, 2, NULL), 0.2f);
    return mpt_softmax_cross_entropy(net, mpt_linear(net, mpt_gelu(net, h), CLASSES, NULL), NULL);
}

/* From a scale so large that the first steps are skipped. */
static void train(uint64_t seed, int threads, watch *watched, outcome *out) {
    mpt_context *ctx = test_open_threads(threads);
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    mpt_train_desc desc = MPT_ZERO;
    float x[BATCH * SIDE * SIDE * 3];
    int32_t label[BATCH];
    int i, step;
    memset(out, 0, sizeof *out);
    layers(net);
    if (watched) stand_before(ctx, watched);
    desc.batch = BATCH, desc.clip_norm = 1, desc.seed = seed, desc.scaler.init_scale = 16777216;
    out->failed += mpt_model_build(net, &desc) != MPT_OK || mpt_params_count(mpt_model_params(net), 0) > MOST;
    for (step = 0; step < STEPS && !out->failed; step++) {
        test_floats(x, sizeof x / sizeof *x, -1, 1, seed + (uint64_t)step);
        for (i = 0; i < BATCH; i++) label[i] = (int32_t)(mpt_hash(seed, (uint64_t)step, 0, (uint64_t)i) % CLASSES);
        out->failed += mpt_train_step(net, x, label) != MPT_OK;
        out->loss[step] = mpt_loss(net);
    }
    if (!out->failed) out->failed += mpt_params_get(mpt_model_params(net), 0, out->weights) != MPT_OK;
    out->scale = mpt_loss_scale(net);
    out->applied = (int64_t)mpt_steps_applied(net), out->skipped = (int64_t)mpt_steps_skipped(net);
    mpt_model_free(net);
    mpt_close(ctx);
}

static outcome *trained(uint64_t seed, int threads, watch *watched) {
    outcome *out = (outcome *)test_memory(sizeof *out);
    train(seed, threads, watched, out);
    CHECK(!out->failed && out->applied > 0 && out->skipped > 0);
    return out;
}

/* Frees the second. */
static int same(const outcome *a, outcome *b) {
    const int equal = memcmp(a, b, sizeof *a) == 0;
    free(b);
    return equal;
}

/* ==== THREADS ==== contexts train at once as they do one after the other */

#if !defined(MPT_NO_THREADS) && !defined(MPT_TEST_RUNNER)
enum { AT_ONCE = 3 };

typedef struct job {
    pthread_t thread;
    uint64_t seed;
    int threads;
    outcome *out;
} job;

static void *run_job(void *arg) {
    job *j = (job *)arg;
    train(j->seed, j->threads, NULL, j->out);
    return NULL;
}

static void test_at_once(void) {
    job jobs[AT_ONCE];
    int i, round;
    for (round = 0; round < 2; round++) {
        for (i = 0; i < AT_ONCE; i++) {
            jobs[i].seed = (uint64_t)i, jobs[i].threads = 1 + (i + round) % 2;
            jobs[i].out = (outcome *)test_memory(sizeof(outcome));
            CHECK(pthread_create(&jobs[i].thread, NULL, run_job, &jobs[i]) == 0);
        }
        for (i = 0; i < AT_ONCE; i++) CHECK(pthread_join(jobs[i].thread, NULL) == 0);
        for (i = 0; i < AT_ONCE; i++) {
            outcome *alone = trained(jobs[i].seed, 1, NULL);
            CHECK(same(alone, jobs[i].out));
            free(alone);
        }
    }
}
#endif

/* ==== ERRNO AND ENVIRONMENT ==== */

static unsigned control_word(void) {
#ifdef CONTROL_WORD
    return _mm_getcsr() & ~0x3fu; /* without the flags */
#else
    return 0;
#endif
}

static void test_environment(void) {
    const int rounding = fegetround();
    const unsigned control = control_word();
    outcome *first = trained(1, 2, NULL);
    CHECK_EQUAL(fegetround(), rounding);
    CHECK_EQUAL(control_word(), control);
    errno = ERANGE;
    CHECK(same(first, trained(1, 2, NULL)));
    errno = EINTR;
    CHECK(mpt_upload(NULL, NULL, NULL, 1) == MPT_ERROR_ARGUMENT);
    CHECK_EQUAL(errno, EINTR);
    free(first);
}

/* ==== MODES OF THE CALLER ==== set after a context was opened, its threads follow: the same bits on one and on four */

/* c = a a^T of 512 x 512 floats */
static mpt_gemm_op square(const float *a, const float *c) {
    mpt_gemm_op op = MPT_ZERO;
    op.trans_b = 1;
    op.m = op.n = op.k = 512;
    op.a = op.b = mpt_f32_array(a);
    op.c = mpt_f32_array(c);
    return op;
}

#if defined(CONTROL_WORD) && !defined(MPT_NO_THREADS)
enum { LONG = 1 << 18 };

static float *product(mpt_context *ctx, unsigned control) {
    const unsigned before = _mm_getcsr();
    float *x = (float *)mpt_alloc(ctx, LONG * sizeof *x), *y = (float *)test_memory(LONG * sizeof *y);
    const mpt_gemm_op gemm = square(x, y);
    mpt_map_op add = MPT_ZERO;
    int i;
    for (i = 0; i < LONG; i++) x[i] = (float)test_uniform(-1, 1, 3, (size_t)i) * (i % 2 ? 1e-38f : 1);
    add.map = MPT_MAP_ADD;
    add.n = LONG;
    add.a = add.b = add.out = gemm.a;
    add.beta = 0.1f;
    _mm_setcsr(control);
    for (i = 0; i < 3; i++) CHECK_OK(ctx, mpt_op_map(ctx, &add)); /* x = (x + 0.1 x) 1.1 1.1, some of it subnormal */
    CHECK_OK(ctx, mpt_op_gemm(ctx, &gemm));
    _mm_setcsr(before);
    mpt_free(ctx, x);
    return y;
}

static void test_modes(void) {
    static const unsigned modes[] = {0, 0x6000u, 0x4000u, 0x8040u}; /* nearest, to zero, up, subnormals flushed */
    mpt_context *one = test_open_threads(1), *four = test_open_threads(4);
    float *kept = NULL;
    int i;
    for (i = 0; i < 4; i++) {
        float *x = product(one, 0x1f80u | modes[i]), *y = product(four, 0x1f80u | modes[i]);
        CHECK(memcmp(x, y, 512 * 512 * sizeof *x) == 0);
        if (kept) CHECK(memcmp(x, kept, 512 * 512 * sizeof *x) != 0); /* each mode tells */
        free(kept), free(y);
        kept = x;
    }
    free(kept);
    mpt_close(one), mpt_close(four);
}
#else
static void test_modes(void) { test_counts.skipped++; }
#endif

/* ==== FORK ==== a child has no workers: it computes the same without them, and closes */

#if defined(__unix__) && !defined(MPT_TEST_CUDA)
#include <sys/wait.h>
#include <unistd.h>

static void test_fork(void) {
    mpt_context *ctx = test_open_threads(4);
    float *x = (float *)mpt_alloc(ctx, 512 * 512 * sizeof *x), *y = (float *)test_memory(512 * 512 * sizeof *y);
    mpt_gemm_op op = square(x, y);
    int status = -1;
    pid_t child;
    test_floats(x, 512 * 512, -1, 1, 3);
    CHECK_OK(ctx, mpt_op_gemm(ctx, &op));
    fflush(stdout);
    child = fork();
    if (!child) {
        float *z = (float *)test_memory(512 * 512 * sizeof *z);
        int same_bits;
        op.c = mpt_f32_array(z);
        same_bits = mpt_op_gemm(ctx, &op) == MPT_OK;
        same_bits &= memcmp(y, z, 512 * 512 * sizeof *z) == 0;
        free(z), free(y);
        mpt_free(ctx, x);
        mpt_close(ctx);
        _exit(same_bits ? 7 : 1);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7);
    memset(y, 0, 512 * 512 * sizeof *y);
    CHECK_OK(ctx, mpt_op_gemm(ctx, &op)); /* the parent goes on */
    mpt_free(ctx, x);
    free(y);
    mpt_close(ctx);
}
#else
static void test_fork(void) { test_counts.skipped++; }
#endif

/* ==== PROCESSORS ==== threads 0: as many as the process may run on */

#if defined(__linux__) && !defined(MPT_NO_THREADS) && !defined(MPT_TEST_CUDA)
int test_getaffinity(int process, size_t bytes, void *mask) __asm__("sched_getaffinity"); /* hidden by -std=c99 */
int test_setaffinity(int process, size_t bytes, const void *mask) __asm__("sched_setaffinity");

static void test_affinity(void) {
    unsigned char all[512] = {0}, one[512] = {0};
    mpt_context *ctx;
    size_t i;
    CHECK(test_getaffinity(0, sizeof all, all) == 0);
    for (i = 0; i < sizeof all && !all[i]; i++) {}
    one[i] = (unsigned char)(all[i] & -all[i]); /* the first */
    CHECK(test_setaffinity(0, sizeof one, one) == 0);
    ctx = mpt_open(NULL);
    CHECK_EQUAL(mpt_thread_count(ctx), 1);
    mpt_close(ctx);
    CHECK(test_setaffinity(0, sizeof all, all) == 0);
}
#else
static void test_affinity(void) { test_counts.skipped++; }
#endif

/* What follows a mpt_open that failed: the context is NULL. */
static void test_no_context(void) {
    CHECK_EQUAL(mpt_thread_count(NULL), 0);
    CHECK(strcmp(mpt_isa_name(NULL), "none") == 0 && strcmp(mpt_device_name(NULL), "none") == 0);
    CHECK(mpt_context_device(NULL) == NULL && mpt_context_backend(NULL) == NULL);
    CHECK_EQUAL(mpt_context_place(NULL).node, 0);
    CHECK(*mpt_why(NULL) && mpt_alloc(NULL, 8) == NULL &&
          mpt_model_new(NULL, mpt_policy_preset(MPT_O0, MPT_F32)) == NULL);
    mpt_free(NULL, NULL), mpt_close(NULL);
}

/* ==== FLUSHED SUBNORMALS ==== casts, scans and the scale's rule are integers: the processor's flags do not matter */

#ifdef CONTROL_WORD
enum { VALUES = 4096 };

typedef struct findings {
    unsigned char cast[MPT_DTYPE_COUNT][MPT_DTYPE_COUNT][4 * VALUES];
    mpt_scan scan[MPT_DTYPE_COUNT];
    mpt_histogram histogram[MPT_DTYPE_COUNT];
    uint32_t scales[100];
} findings;

/* Many of them subnormal in their type. */
static void fill(unsigned char *bytes, mpt_dtype type) {
    static const int exponent_bits[MPT_DTYPE_COUNT] = {8, 5, 8, 4, 5};
    const size_t size = mpt_dtype_size(type);
    const int fraction = (int)(8 * size) - 1 - exponent_bits[type];
    size_t i;
    for (i = 0; i < VALUES; i++) {
        uint32_t u = mpt_hash(4, 0, (uint64_t)type, i);
        if (i % 2) u &= (uint32_t)1 << (8 * size - 1) | (((uint32_t)1 << fraction) - 1);
        test_store(bytes + i * size, u, type);
    }
}

static findings *look(mpt_isa isa) {
    findings *f = (findings *)test_memory(sizeof *f);
    mpt_context *ctx = test_open_isa(isa, 1);
    unsigned char source[4 * VALUES];
    mpt_scaler_desc desc = MPT_ZERO;
    mpt_scaler_state s;
    int from, to, i;
    for (from = 0; ctx && from < MPT_DTYPE_COUNT; from++) {
        fill(source, (mpt_dtype)from);
        for (to = 0; to < MPT_DTYPE_COUNT; to++)
            CHECK_OK(ctx, mpt_cast(ctx, VALUES, mpt_typed_array(source, (mpt_dtype)from),
                                   mpt_typed_array(f->cast[from][to], (mpt_dtype)to), NULL));
        CHECK_OK(ctx, mpt_scan_array(ctx, VALUES, mpt_typed_array(source, (mpt_dtype)from), &f->scan[from]));
        f->scan[from].sum_squares = 0; /* is arithmetic */
        CHECK_OK(ctx, mpt_histogram_add(ctx, VALUES, mpt_typed_array(source, (mpt_dtype)from), &f->histogram[from]));
    }
    desc.growth_interval = 1, desc.init_scale = 1;
    s = mpt_scaler_start(&desc);
    for (i = 0; i < 100; i++) {
        mpt_scaler_rule(&s, i % 3 == 0);
        f->scales[i] = test_bits(s.scale);
    }
    mpt_close(ctx);
    return f;
}

static void test_flushed(void) {
    volatile float tiny = 1e-40f;
    int isa;
    for (isa = MPT_ISA_PLAIN; isa < MPT_ISA_COUNT; isa++) {
        const unsigned control = _mm_getcsr();
        findings *kept = look((mpt_isa)isa), *flushed;
        _mm_setcsr(control | 0x8040u); /* flush to zero, denormals are zero */
        CHECK_EQUAL(test_bits(tiny * 1.5f), 0);
        flushed = look((mpt_isa)isa);
        _mm_setcsr(control);
        CHECK(memcmp(kept, flushed, sizeof *kept) == 0);
        free(kept), free(flushed);
    }
}
#else
static void test_flushed(void) { test_counts.skipped++; } /* no such flags known here */
#endif

/* ==== A TABLE BEFORE THE BACKEND'S ==== is told which layer, pass and output each call is for */

static void test_watched(void) {
    static const mpt_place step[] = {{CONV, MPT_FORWARD, CONV},
                                     {LINEAR, MPT_FORWARD, LINEAR},
                                     {LINEAR, MPT_BACKWARD_WEIGHT, LINEAR},
                                     {LINEAR, MPT_BACKWARD_DATA, GELU},
                                     {CONV, MPT_BACKWARD_WEIGHT, CONV}};
    watch w = MPT_ZERO;
    outcome *alone = trained(3, 2, NULL);
    int i;
    CHECK(same(alone, trained(3, 2, &w)));
    CHECK(w.count >= 5 * STEPS && w.count <= PRODUCTS && w.count % 5 == 0);
    for (i = 0; i < w.count && i < PRODUCTS; i++) {
        CHECK_EQUAL(w.products[i].node, step[i % 5].node);
        CHECK_EQUAL(w.products[i].pass, step[i % 5].pass);
        CHECK_EQUAL(w.products[i].output, step[i % 5].output);
    }
    free(alone);
}

/* What a container's cpu.max grants: by mpt's private names, for no call tells what was read there. */
static void test_quota(void) {
#ifndef MPT_NO_THREADS
    CHECK_EQUAL(mpt__quota_of("max 100000\n"), 0);
    CHECK_EQUAL(mpt__quota_of("200000 100000\n"), 2);
    CHECK_EQUAL(mpt__quota_of("150000 100000\n"), 2);
    CHECK_EQUAL(mpt__quota_of("50000 100000\n"), 1);
    CHECK_EQUAL(mpt__quota_of(""), 0);
    CHECK_EQUAL(mpt__quota_of("100000"), 0);
    CHECK_EQUAL(mpt__quota_of("-1 100000"), 0);
    CHECK(mpt__quota_of("99999999999999999999 1") > 0);
#endif
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    RUN_TEST(test_quota());
#if defined(MPT_TEST_RUNNER) /* which, unlike CUDA, lets no thread allocate while another captures a step */
    test_counts.skipped++;
#elif !defined(MPT_NO_THREADS)
    RUN_TEST(test_at_once());
#endif
    RUN_TEST(test_environment());
    RUN_TEST(test_flushed());
    RUN_TEST(test_modes());
    RUN_TEST(test_fork());
    RUN_TEST(test_no_context());
    RUN_TEST(test_affinity());
    RUN_TEST(test_watched());
    return test_finish("surroundings");
}
