/* memory.c - contexts and memory: every allocation made to fail in turn, nothing leaked, descriptor errors.

   The allocator writes a pattern into what it hands out, so nothing can count on zeros, and guards the end. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"

typedef struct host { /* desc.user: what the callbacks of a context see */
    test_counter counter;
    char reason[256]; /* the last that the log got */
    int reasons, opened;
} host;

static void keep_reason(mpt_log_level level, const char *text, void *user) {
    host *h = (host *)user;
    if (level == MPT_LOG_INFO) {
        h->opened++;
        return;
    }
    CHECK(level == MPT_LOG_ERROR);
    snprintf(h->reason, sizeof h->reason, "%s", text);
    h->reasons++;
}

static mpt_context_desc host_desc(host *h, int threads) {
    mpt_context_desc desc = test_counting(&h->counter, threads);
    h->reason[0] = 0, h->reasons = h->opened = 0;
    desc.log = keep_reason;
    return desc;
}

/* ==== LIVES ==== each makes what a program would make, uses it and frees it; MPT_OK, or the first failure

   A call that returns a pointer or an id counts as MPT_ERROR_NO_MEMORY when it returns NULL or 0. */

#define NEED(condition) \
    if (r == MPT_OK && !(condition)) r = MPT_ERROR_NO_MEMORY
#define RUN(call) \
    if (r == MPT_OK) r = (call)

static mpt_result live_arrays(mpt_context *ctx) {
    mpt_result r = MPT_OK;
    float *a = (float *)mpt_alloc(ctx, 64 * 64 * sizeof *a), *b = NULL;
    uint16_t *half = NULL;
    mpt_gemm_op gemm = MPT_ZERO;
    mpt_histogram *h = (mpt_histogram *)test_memory(sizeof *h);
    mpt_scan scan;
    NEED(a);
    NEED((b = (float *)mpt_alloc(ctx, 64 * 64 * sizeof *b)) != NULL);
    NEED((half = (uint16_t *)mpt_alloc(ctx, 64 * 64 * sizeof *half)) != NULL);
    RUN(mpt_cast(ctx, 4096, mpt_f32_array(a), mpt_typed_array(half, MPT_F16), NULL));
    gemm.trans_b = 1;
    gemm.m = gemm.n = gemm.k = 64;
    gemm.a = mpt_f32_array(a);
    gemm.b = mpt_typed_array(half, MPT_F16);
    gemm.c = mpt_f32_array(b);
    RUN(mpt_op_gemm(ctx, &gemm));
    RUN(mpt_scan_array(ctx, 4096, mpt_f32_array(b), &scan));
    RUN(mpt_histogram_add(ctx, 4096, mpt_f32_array(b), h));
    mpt_free(ctx, a), mpt_free(ctx, b), mpt_free(ctx, half);
    free(h);
    return r;
}

static mpt_result live_operations(mpt_context *ctx) {
    static const mpt_conv2d_shape conv_shape = {2, 12, 12, 8, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0};
    static const mpt_pool2d_shape pool_shape = {2, 12, 12, 8, 2, 2, 0, 0, 0, 0, 0};
    mpt_conv2d_op conv = MPT_ZERO;
    mpt_pool2d_op pool = MPT_ZERO;
    mpt_result r = MPT_OK;
    int pass;
    conv.shape = conv_shape;
    conv.x = mpt_f32_array((float *)mpt_alloc(ctx, 2 * 12 * 12 * 8 * sizeof(float)));
    conv.w = mpt_f32_array((float *)mpt_alloc(ctx, 8 * 8 * 9 * sizeof(float)));
    conv.y = mpt_f32_array((float *)mpt_alloc(ctx, 2 * 12 * 12 * 8 * sizeof(float)));
    NEED(conv.x.data && conv.w.data && conv.y.data);
    for (pass = MPT_FORWARD; pass <= MPT_BACKWARD_WEIGHT; pass++) {
        conv.pass = (mpt_pass)pass;
        conv.act = pass == MPT_FORWARD ? MPT_RELU : MPT_IDENTITY;
        conv.beta = pass == MPT_BACKWARD_WEIGHT ? 1 : 0;
        RUN(mpt_op_conv2d(ctx, &conv));
    }
    pool.kind = MPT_POOL_AVERAGE;
    pool.shape = pool_shape;
    pool.x = conv.x;
    pool.y = conv.y;
    RUN(mpt_op_pool2d(ctx, &pool));
    mpt_free(ctx, conv.x.data);
    mpt_free(ctx, conv.w.data);
    mpt_free(ctx, conv.y.data);
    return r;
}

/* More tensors than a first table would hold. */
static mpt_result add_tensors(mpt_params *params) {
    mpt_result r = MPT_OK;
    int i;
    for (i = 1; i <= 40; i++) {
        char name[32];
        snprintf(name, sizeof name, "tensor %d", i);
        NEED(mpt_params_add(params, name, 10, 0) == i);
    }
    return r;
}

static mpt_result live_training(mpt_context *ctx, mpt_master master) {
    float x[10] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
    mpt_params_desc desc = MPT_ZERO;
    mpt_params *params = NULL;
    mpt_scaler *scaler = NULL;
    mpt_optimizer *opt = NULL;
    mpt_result r = MPT_OK;
    desc.type = MPT_F16, desc.master = master;
    NEED((params = mpt_params_new(ctx, &desc)) != NULL);
    RUN(add_tensors(params));
    RUN(mpt_params_build(params));
    RUN(mpt_params_init(params, 1, MPT_INIT_KAIMING_NORMAL, 10, 10, 1));
    RUN(mpt_params_set(params, 2, x));
    RUN(mpt_params_get(params, 1, x));
    NEED((scaler = mpt_scaler_new(ctx, NULL)) != NULL);
    NEED((opt = mpt_optimizer_new(params, scaler, NULL)) != NULL);
    RUN(mpt_optimizer_group(opt, MPT_GROUP_BIAS, 1, 0));
    RUN(mpt_unscale(opt));
    RUN(mpt_clip_norm(opt, 1));
    RUN(mpt_step(opt));
    RUN(mpt_scaler_update(scaler));
    mpt_optimizer_free(opt);
    mpt_scaler_free(scaler);
    mpt_params_free(params);
    return r;
}

static int add_layers(mpt_model *net) {
    int skip, h = mpt_relu(net, test_same(net, mpt_input(net, 6, 6, 3), 8, 3));
    int i;
    for (i = 0; i < 6; i++) {
        skip = h;
        h = mpt_relu(net, mpt_add(net, skip, test_same(net, h, 8, 3)));
    }
    h = mpt_max_pool2d(net, h, 2, NULL);
    return mpt_softmax_cross_entropy(net, mpt_linear(net, mpt_flatten(net, h), 4, NULL), NULL);
}

/* A build that fails leaves nothing allocated; the reason of a layer call that failed is the build's. */
static mpt_result build(const host *h, mpt_model *net, const mpt_train_desc *train, int last) {
    const size_t before = h->counter.bytes;
    const mpt_result r = mpt_model_build(net, train);
    CHECK(last || r == MPT_ERROR_NO_MEMORY);
    CHECK(r == MPT_OK || h->counter.bytes == before);
    return r;
}

static mpt_result live_model(mpt_context *ctx, const host *h, mpt_level level) {
    mpt_train_desc train = MPT_ZERO;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(level, MPT_F16));
    float x[4 * 108], out[4 * 4];
    int32_t label[4] = {0, 1, 2, 3};
    mpt_result r = MPT_OK;
    mpt_metrics m;
    test_floats(x, 4 * 108, -1, 1, 1);
    train.batch = 2, train.accumulate = 2, train.clip_norm = 1;
    NEED(net);
    if (net) r = build(h, net, &train, add_layers(net));
    RUN(mpt_train_step(net, x, label));
    RUN(mpt_evaluate(net, x, label, 4, &m));
    RUN(mpt_predict(net, x, 4, out));
    mpt_model_free(net);
    return r;
}

/* Inputs as bytes, averages; then prediction alone, with batch norms folded into what is loaded. */
static mpt_result live_open(mpt_context *ctx, const host *h) {
    enum { BYTES = 16384 };
    mpt_train_desc train = MPT_ZERO;
    mpt_input_desc in = MPT_ZERO;
    uint8_t x[2 * 12] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
    float out[2 * 3];
    const int32_t label[2] = {0, 2};
    void *file = test_memory(BYTES);
    mpt_result r = MPT_OK;
    size_t size = 0;
    int i;
    in.bytes = 1;
    train.batch = 2;
    for (i = 0; i < 2; i++) {
        mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_BF16));
        train.ema_decay = i ? 0 : 0.5;
        train.inference = train.fold = i;
        if (net) {
            int last = mpt_batch_norm(net, mpt_linear(net, mpt_input_with(net, 2, 2, 3, &in), 8, NULL), NULL);
            last = mpt_softmax_cross_entropy(net, mpt_linear(net, mpt_relu(net, last), 3, NULL), NULL);
            if (r == MPT_OK) r = build(h, net, &train, last);
        }
        NEED(net);
        if (i) {
            RUN(mpt_weights_load_memory(net, file, size, NULL));
        } else {
            RUN(mpt_train_step(net, x, label));
            RUN(mpt_use_average(net, 1));
            RUN(mpt_weights_save_memory(net, file, BYTES, &size, MPT_F32));
        }
        RUN(mpt_predict(net, x, 2, out));
        mpt_model_free(net);
    }
    free(file);
    return r;
}

enum { LIVES = 7 };

static mpt_result live(mpt_context *ctx, const host *h, int kind) {
    switch (kind) {
    case 0: return live_arrays(ctx);
    case 1: return live_operations(ctx);
    case 2: return live_training(ctx, MPT_MASTER_F32);
    case 3: return live_training(ctx, MPT_MASTER_NONE);
    case 4: return live_model(ctx, h, MPT_O1);
    case 5: return live_open(ctx, h);
    default: return live_model(ctx, h, MPT_O3);
    }
}

/* Opens, lives and closes with allocation number `fail_at` refused. Whatever that hits reports it, gives everything
   back, and the context is as good as new. Returns whether any allocation was refused. */
static int live_with_failure(int kind, int threads, long fail_at) {
    host h;
    const mpt_context_desc desc = host_desc(&h, threads);
    mpt_context *ctx;
    size_t opened;
    mpt_result r;
    h.counter.fail_at = fail_at;
    ctx = test_open(&desc);
    opened = h.counter.bytes;
    CHECK_EQUAL(h.opened, ctx != NULL); /* told once, and only if it is */
    if (!ctx) {
        CHECK(h.counter.calls >= fail_at && test_has_word(h.reason, "memory"));
    } else {
        r = live(ctx, &h, kind);
        test_check_result(ctx, r, h.counter.calls >= fail_at ? MPT_ERROR_NO_MEMORY : MPT_OK, __FILE__, __LINE__,
                          "live");
        if (r != MPT_OK) CHECK(test_has_word(mpt_why(ctx), "memory") && strcmp(mpt_why(ctx), h.reason) == 0);
        CHECK_EQUAL(h.counter.bytes, opened);
        h.counter.fail_at = 0;
        if (r != MPT_OK) CHECK_OK(ctx, live(ctx, &h, kind));
        CHECK_EQUAL(h.counter.bytes, opened);
        mpt_close(ctx);
    }
    CHECK(test_counter_clean(&h.counter));
    return h.counter.calls >= fail_at;
}

static void test_failures(void) {
    int kind, threads;
    for (kind = 0; kind < LIVES; kind++)
        for (threads = 1; threads <= 2; threads++) {
            long fail_at = 1;
            while (live_with_failure(kind, threads, fail_at)) fail_at++;
            CHECK(fail_at > 2); /* the context and something in it, at least */
        }
}

/* ==== OPENING ==== */

static void check_bad_desc(mpt_context_desc desc, host *h, const char *word) {
    mpt_context *ctx;
    h->reasons = 0;
    ctx = test_open(&desc);
    CHECK(ctx == NULL);
    CHECK_EQUAL(h->reasons, 1);
    if (!CHECK(test_has_word(h->reason, word))) printf("    in \"%s\"\n", h->reason);
    desc.log = NULL; /* silent, and no crash */
    CHECK(test_open(&desc) == NULL);
}

static void test_open_errors(void) {
    host h;
    mpt_context_desc desc = host_desc(&h, 1), bad;
    bad = desc, bad.alloc = NULL, check_bad_desc(bad, &h, "alloc");
    bad = desc, bad.release = NULL, check_bad_desc(bad, &h, "release");
    bad = desc, bad.threads = -1, check_bad_desc(bad, &h, "threads");
    bad = desc, bad.threads = 65, check_bad_desc(bad, &h, "threads");
    CHECK(test_counter_clean(&h.counter));
}

static void test_open_defaults(void) {
    mpt_context *ctx = test_open(NULL), *four = test_open_threads(4);
    CHECK(ctx && four && mpt_thread_count(ctx) >= 1);
#ifdef MPT_NO_THREADS
    CHECK_EQUAL(mpt_thread_count(four), 1);
#else
    CHECK_EQUAL(mpt_thread_count(four), 4);
#endif
    CHECK(strcmp(mpt_why(ctx), "") == 0);
    CHECK(mpt_device_name(ctx) != NULL && *mpt_device_name(ctx));
    CHECK_EQUAL(mpt_version(), MPT_VERSION);
    mpt_close(ctx), mpt_close(four);
    mpt_close(NULL);
}

static void test_texts(void) {
    int i, j;
    CHECK(strcmp(mpt_result_text(MPT_OK), "success") == 0);
    for (i = 0; i < MPT_RESULT_COUNT; i++)
        for (j = 0; j < i; j++) CHECK(strcmp(mpt_result_text((mpt_result)i), mpt_result_text((mpt_result)j)) != 0);
    CHECK(mpt_result_text((mpt_result)test_number(1000)) != NULL);
    CHECK(mpt_result_text((mpt_result)test_number(-1)) != NULL);
}

/* ==== DEVICE MEMORY ==== */

static void test_alloc(void) {
    host h;
    const mpt_context_desc desc = host_desc(&h, 1);
    mpt_context *ctx = test_open(&desc);
    unsigned char bytes[200], *p[20];
    size_t i, j, wrong = 0;
    for (i = 0; i < 20; i++) { /* 64-byte aligned, zeroed, apart from each other */
        p[i] = (unsigned char *)mpt_alloc(ctx, 10 * i + 1);
        CHECK(p[i] != NULL && (uintptr_t)p[i] % 64 == 0);
        CHECK_OK(ctx, mpt_download(ctx, bytes, p[i], 10 * i + 1));
        for (j = 0; j < 10 * i + 1; j++) wrong += bytes[j] != 0;
        memset(bytes, (int)i, sizeof bytes);
        CHECK_OK(ctx, mpt_upload(ctx, p[i], bytes, 10 * i + 1));
    }
    for (i = 0; i < 20; i++) {
        CHECK_OK(ctx, mpt_download(ctx, bytes, p[i], 10 * i + 1));
        for (j = 0; j < 10 * i + 1; j++) wrong += bytes[j] != i;
        mpt_free(ctx, p[i]);
    }
    CHECK_EQUAL(wrong, 0);
    CHECK(mpt_alloc(ctx, 0) == NULL);
    CHECK_EQUAL(h.reasons, 0); /* that was no failure */
    CHECK(mpt_alloc(ctx, (size_t)-1) == NULL && mpt_alloc(ctx, (size_t)-1 - 64) == NULL);
    test_check_reason(ctx, "memory", __FILE__, __LINE__);
    CHECK(mpt_alloc(NULL, 8) == NULL);
    mpt_free(ctx, NULL), mpt_free(NULL, NULL);
    CHECK_ERROR(ctx, mpt_upload(ctx, NULL, bytes, 4), MPT_ERROR_ARGUMENT, "upload");
    CHECK_ERROR(ctx, mpt_download(ctx, bytes, NULL, 4), MPT_ERROR_ARGUMENT, "download");
    CHECK(strcmp(h.reason, mpt_why(ctx)) == 0); /* the log gets every reason */
    CHECK(mpt_upload(NULL, bytes, bytes, 4) == MPT_ERROR_ARGUMENT);
    mpt_close(ctx);
    CHECK(test_counter_clean(&h.counter));
}

/* Two contexts share nothing: not the reason, not the memory. */
static void test_two_contexts(void) {
    host a, b;
    const mpt_context_desc desc_a = host_desc(&a, 2), desc_b = host_desc(&b, 1);
    mpt_context *first = test_open(&desc_a), *second = test_open(&desc_b);
    const size_t bytes = b.counter.bytes;
    CHECK_OK(first, live(first, &a, 4));
    CHECK(mpt_upload(first, NULL, NULL, 1) == MPT_ERROR_ARGUMENT);
    CHECK(strcmp(mpt_why(second), "") == 0 && b.reasons == 0 && b.counter.bytes == bytes);
    mpt_close(first);
    CHECK_OK(second, live(second, &b, 4));
    mpt_close(second);
    CHECK(test_counter_clean(&a.counter) && test_counter_clean(&b.counter));
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    RUN_TEST(test_open_defaults());
    RUN_TEST(test_open_errors());
    RUN_TEST(test_texts());
    RUN_TEST(test_alloc());
    RUN_TEST(test_two_contexts());
    RUN_TEST(test_failures());
    return test_finish("memory");
}
