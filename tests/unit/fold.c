/* fold.c - batch norms folded into the weights before them, for prediction. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"

enum { BATCH = 5, SIDE = 6, CHANNELS = 4, PIXELS = SIDE * SIDE * CHANNELS, OUTPUTS = 3, FOLDED = 4 };

typedef struct problem {
    float x[2 * BATCH * PIXELS];
    int32_t label[2 * BATCH];
} problem;

static problem problem_new(void) {
    problem p;
    int i;
    test_floats(p.x, 2 * BATCH * PIXELS, -1, 1, 1);
    for (i = 0; i < 2 * BATCH; i++) p.label[i] = (int32_t)(mpt_hash(3, 0, 0, (uint64_t)i) % OUTPUTS);
    return p;
}

/* Four norms that can be folded: behind convolutions without and with a bias, one of them grouped, and behind a linear
   layer; and one that cannot, for a sum reads the convolution as well. */
static void body(mpt_model *net) {
    mpt_conv2d_desc conv = MPT_ZERO, grouped = MPT_ZERO;
    mpt_linear_desc linear = MPT_ZERO;
    int h = mpt_input(net, SIDE, SIDE, CHANNELS), skip;
    conv.padding = grouped.padding = 1;
    conv.no_bias = linear.no_bias = 1;
    grouped.groups = 2;
    h = mpt_relu(net, mpt_batch_norm(net, mpt_conv2d(net, h, 6, 3, &conv), NULL));
    skip = h;
    h = mpt_batch_norm(net, mpt_conv2d(net, h, 6, 3, &grouped), NULL);
    h = mpt_relu(net, mpt_add(net, h, skip));
    skip = mpt_conv2d(net, h, 6, 3, &conv);
    h = mpt_add(net, mpt_batch_norm(net, skip, NULL), skip);
    h = mpt_gelu(net, mpt_batch_norm(net, mpt_conv2d(net, h, 4, 3, &grouped), NULL));
    h = mpt_tanh(net, mpt_batch_norm(net, mpt_linear(net, h, 7, &linear), NULL));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, OUTPUTS, NULL), NULL);
}

static mpt_train_desc inference(int fold) {
    mpt_train_desc train = MPT_ZERO;
    train.batch = BATCH;
    train.seed = 7;
    train.inference = 1;
    train.fold = fold;
    return train;
}

/* A file of weights that has been trained for a few steps, so that nothing in it is 0 or 1 */
static void *trained(mpt_context *ctx, const problem *p, size_t *size) {
    mpt_train_desc train = MPT_ZERO;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
    void *file;
    int i;
    train.batch = BATCH;
    train.optimizer = mpt_sgd(0.1, 0.9);
    body(net);
    CHECK_OK(ctx, mpt_model_build(net, &train));
    for (i = 0; i < 6; i++) CHECK_OK(ctx, mpt_train_step(net, p->x + i % 2 * BATCH * PIXELS, p->label + i % 2 * BATCH));
    CHECK_OK(ctx, mpt_weights_save_memory(net, NULL, 0, size, MPT_F32));
    file = test_memory(*size);
    CHECK_OK(ctx, mpt_weights_save_memory(net, file, *size, size, MPT_F32));
    mpt_model_free(net);
    return file;
}

/* How many nodes the report says are computed so */
static int told(mpt_context *ctx, const mpt_model *net, const char *kernel) {
    mpt_node_info info;
    int id, count = 0;
    for (id = 1; id <= mpt_model_nodes(net); id++) {
        CHECK_OK(ctx, mpt_model_node(net, id, &info));
        if (strcmp(info.kernel, kernel)) continue;
        count++;
        if (!strcmp(kernel, "folded")) CHECK_EQUAL(info.fused_into, info.in[0]);
    }
    return count;
}

/* Build, load, predict: before loading, the norms are computed in place, with the same bits as apart. After it each of
   the five layers rounds its weights once more, and its value at another place. What a norm makes has a variance of 1,
   so the 54 terms of a sum are of 1 / sqrt(54), and their magnitudes add to under 8. The report has the bytes that the
   model holds. */
static void test_fold(mpt_level level, mpt_dtype type) {
    test_counter counter;
    const mpt_context_desc desc = test_counting(&counter, 1);
    mpt_context *ctx = test_open(&desc);
    const problem p = problem_new();
    const mpt_train_desc apart = inference(0), fold = inference(1);
    const double unit = test_unit(level == MPT_O0 ? MPT_F32 : type);
    const int host = strcmp(mpt_device_name(ctx), "cpu") == 0;
    mpt_model *plain = mpt_model_new(ctx, mpt_policy_preset(level, type)), *net;
    float a[2 * BATCH * OUTPUTS], b[2 * BATCH * OUTPUTS], again[2 * BATCH * OUTPUTS];
    const size_t bytes = 2 * BATCH * OUTPUTS * sizeof(float);
    size_t size = 0, before, saved;
    void *file = trained(ctx, &p, &size);
    mpt_load_desc part = MPT_ZERO;
    mpt_memory m;
    int i;
    body(plain);
    CHECK_OK(ctx, mpt_model_build(plain, &apart));
    CHECK_OK(ctx, mpt_predict(plain, p.x, 2 * BATCH, a));
    before = counter.bytes;
    net = mpt_model_new(ctx, mpt_policy_preset(level, type));
    body(net);
    CHECK_OK(ctx, mpt_model_build(net, &fold));
    CHECK_OK(ctx, mpt_predict(net, p.x, 2 * BATCH, b));
    CHECK(memcmp(a, b, bytes) == 0);
    CHECK_EQUAL(told(ctx, net, "norm in place"), FOLDED);
    CHECK_EQUAL(told(ctx, net, "norm apart"), 1);
    CHECK_OK(ctx, mpt_weights_save_memory(net, NULL, 0, &saved, MPT_F32));
    CHECK_OK(ctx, mpt_weights_load_memory(plain, file, size, NULL));
    CHECK_OK(ctx, mpt_weights_load_memory(net, file, size, NULL));
    CHECK_OK(ctx, mpt_predict(plain, p.x, 2 * BATCH, a));
    CHECK_OK(ctx, mpt_predict(net, p.x, 2 * BATCH, b));
    for (i = 0; i < 2 * BATCH * OUTPUTS; i++) CHECK_NEAR((double)b[i], (double)a[i], 5 * 2 * unit * 8);
    CHECK_EQUAL(told(ctx, net, "folded"), FOLDED);
    CHECK_EQUAL(told(ctx, net, "norm apart"), 1);
    m = mpt_model_memory(net);
    CHECK(m.activations <= mpt_model_memory(plain).activations);
    CHECK_EQUAL((double)(m.masters + m.gradients + m.moments), 0);
    if (host)
        CHECK_EQUAL((double)(m.weights + m.activations + m.workspace + m.bookkeeping),
                    (double)(counter.bytes - before));
    CHECK_ERROR(ctx, mpt_weights_save_memory(net, NULL, 0, &saved, MPT_F32), MPT_ERROR_ORDER, "batch_norm1");
    part.partly = 1;
    CHECK_ERROR(ctx, mpt_weights_load_memory(net, file, size, &part), MPT_ERROR_ORDER, "batch_norm1");
    CHECK_ERROR(ctx, mpt_model_set_running(net, 3, a), MPT_ERROR_ORDER, "batch_norm1");
    CHECK_ERROR(ctx, mpt_weights_load_memory(net, file, size - 1, NULL), MPT_ERROR_FILE, "bytes");
    CHECK_OK(ctx, mpt_predict(net, p.x, 2 * BATCH, again));
    CHECK(memcmp(again, b, bytes) == 0); /* what fails changes nothing */
    CHECK_OK(ctx, mpt_weights_load_memory(net, file, size, NULL));
    CHECK_OK(ctx, mpt_predict(net, p.x, 2 * BATCH, again));
    CHECK(memcmp(again, b, bytes) == 0); /* and is not folded twice */
    free(file);
    mpt_model_free(plain);
    mpt_model_free(net);
    mpt_close(ctx);
    CHECK(test_counter_clean(&counter));
}

/* One layer, against its formula in double: two roundings of each weight, one of the input, of the bias and of the
   value, and the sum's own. */
static void test_one_layer(mpt_context *ctx, mpt_dtype type) {
    enum { INPUTS = 9, WIDTH = 4 };
    const mpt_train_desc fold = inference(1);
    mpt_linear_desc linear = MPT_ZERO;
    mpt_norm_desc norm = MPT_ZERO;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, type));
    float w[WIDTH * INPUTS], bias[WIDTH], gamma[WIDTH], beta[WIDTH], running[2 * WIDTH], x[INPUTS], y[WIDTH];
    mpt_params *params;
    size_t size;
    void *file;
    int c, i;
    linear.name = "fc";
    norm.name = "bn";
    norm.eps = 0.01f;
    i = mpt_keep(net, mpt_batch_norm(net, mpt_linear(net, mpt_input(net, 1, 1, INPUTS), WIDTH, &linear), &norm));
    mpt_linear(net, i, 1, NULL);
    CHECK_OK(ctx, mpt_model_build(net, &fold));
    params = mpt_model_params(net);
    test_floats(w, WIDTH * INPUTS, -1, 1, 11);
    test_floats(bias, WIDTH, -1, 1, 12);
    test_floats(gamma, WIDTH, -2, 2, 13);
    test_floats(beta, WIDTH, -1, 1, 14);
    test_floats(running, 2 * WIDTH, 0.1, 2, 15);
    test_floats(x, INPUTS, -1, 1, 16);
    CHECK_OK(ctx, mpt_params_set(params, mpt_params_find(params, "fc.weight"), w));
    CHECK_OK(ctx, mpt_params_set(params, mpt_params_find(params, "fc.bias"), bias));
    CHECK_OK(ctx, mpt_params_set(params, mpt_params_find(params, "bn.weight"), gamma));
    CHECK_OK(ctx, mpt_params_set(params, mpt_params_find(params, "bn.bias"), beta));
    CHECK_OK(ctx, mpt_model_set_running(net, 3, running));
    CHECK_OK(ctx, mpt_weights_save_memory(net, NULL, 0, &size, MPT_F32));
    file = test_memory(size);
    CHECK_OK(ctx, mpt_weights_save_memory(net, file, size, &size, MPT_F32));
    CHECK_OK(ctx, mpt_weights_load_memory(net, file, size, NULL));
    CHECK_EQUAL(told(ctx, net, "folded"), 1);
    CHECK_OK(ctx, mpt_predict(net, x, 1, y));
    CHECK_OK(ctx, mpt_node_value(net, 3, y));
    for (c = 0; c < WIDTH; c++) {
        const double factor = (double)gamma[c] / sqrt((double)running[WIDTH + c] + (double)norm.eps);
        const double shift = ((double)bias[c] - (double)running[c]) * factor;
        double exact = (double)beta[c] + shift, magnitude = fabs((double)beta[c]) + 2 * fabs(shift);
        for (i = 0; i < INPUTS; i++) {
            const double term = (double)w[c * INPUTS + i] * (double)x[i] * factor;
            exact += term;
            magnitude += fabs(term);
        }
        /* gamma and the factor that it makes are rounded, too */
        CHECK_NEAR((double)y[c], exact, 5 * test_unit(type) * (magnitude + fabs(shift)) + test_tiny(type));
    }
    free(file);
    mpt_model_free(net);
}

/* Where fp16 does not hold the folded weights, the norm stays; and the build refuses to fold what is to be trained. */
static void test_too_large(mpt_context *ctx) {
    const mpt_train_desc fold = inference(1);
    mpt_train_desc train = inference(1);
    mpt_norm_desc norm = MPT_ZERO;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    const float running[4] = {0, 0, 0, 0};
    float x[3] = {1e-3f, -1e-3f, 2e-3f}, before[2], after[2];
    size_t size;
    void *file;
    norm.eps = 1e-12f;
    mpt_linear(net, mpt_batch_norm(net, mpt_linear(net, mpt_input(net, 1, 1, 3), 2, NULL), &norm), 2, NULL);
    CHECK_OK(ctx, mpt_model_build(net, &fold));
    CHECK_OK(ctx, mpt_model_set_running(net, 3, running));
    CHECK_OK(ctx, mpt_predict(net, x, 1, before));
    CHECK_OK(ctx, mpt_weights_save_memory(net, NULL, 0, &size, MPT_F32));
    file = test_memory(size);
    CHECK_OK(ctx, mpt_weights_save_memory(net, file, size, &size, MPT_F32));
    CHECK_OK(ctx, mpt_weights_load_memory(net, file, size, NULL));
    CHECK_EQUAL(told(ctx, net, "norm in place"), 1);
    CHECK_OK(ctx, mpt_predict(net, x, 1, after));
    CHECK(memcmp(before, after, sizeof before) == 0);
    CHECK_OK(ctx, mpt_weights_save_memory(net, file, size, &size, MPT_F32));
    free(file);
    mpt_model_free(net);
    net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    mpt_batch_norm(net, mpt_linear(net, mpt_input(net, 1, 1, 3), 2, NULL), &norm);
    train.inference = 0;
    CHECK_ERROR(ctx, mpt_model_build(net, &train), MPT_ERROR_ARGUMENT, "fold");
    mpt_model_free(net);
}

int main(int argc, char **argv) {
    mpt_context *ctx;
    int level;
    test_begin(argc, argv);
    ctx = test_open(NULL);
    for (level = 0; level < 3; level++) {
        RUN_TEST(test_fold((mpt_level)level, MPT_F16));
        RUN_TEST(test_fold((mpt_level)level, MPT_BF16));
    }
    RUN_TEST(test_one_layer(ctx, MPT_F16));
    RUN_TEST(test_one_layer(ctx, MPT_BF16));
    RUN_TEST(test_too_large(ctx));
    mpt_close(ctx);
    return test_finish("fold");
}
