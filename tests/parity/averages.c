/* averages.c - moving averages of weights: against torch.optim.swa_utils.AveragedModel, whose values
   make_golden_nets.py has written (run from the top of the repository); of every kind of weights; in evaluation, in
   files and beside frozen layers. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include "golden.h"

enum { BATCH = 4, SIDE = 4, CHANNELS = 2, PIXELS = SIDE * SIDE * CHANNELS, CLASSES = 3, STEPS = 5 };

/* A file of weights in memory */
typedef struct saved {
    void *bytes;
    size_t size;
} saved;

static saved save_weights(mpt_context *ctx, mpt_model *net) {
    saved s;
    CHECK_OK(ctx, mpt_weights_save_memory(net, NULL, 0, &s.size, MPT_F32));
    s.bytes = test_memory(s.size);
    CHECK_OK(ctx, mpt_weights_save_memory(net, s.bytes, s.size, &s.size, MPT_F32));
    return s;
}

static saved save_checkpoint(mpt_context *ctx, mpt_model *net) {
    saved s;
    CHECK_OK(ctx, mpt_checkpoint_save_memory(net, NULL, 0, &s.size));
    s.bytes = test_memory(s.size);
    CHECK_OK(ctx, mpt_checkpoint_save_memory(net, s.bytes, s.size, &s.size));
    return s;
}

/* The averages: what a model of fp32 weights, `reader`, loads from a file of them. Free it. */
static float *averages_of(mpt_context *ctx, mpt_model *net, mpt_model *reader) {
    const size_t count = mpt_params_count(mpt_model_params(reader), 0);
    float *values = (float *)test_memory(count * sizeof *values);
    saved s;
    CHECK_OK(ctx, mpt_use_average(net, 1));
    s = save_weights(ctx, net);
    CHECK_OK(ctx, mpt_use_average(net, 0));
    CHECK_OK(ctx, mpt_weights_load_memory(reader, s.bytes, s.size, NULL));
    CHECK_OK(ctx, mpt_params_get(mpt_model_params(reader), 0, values));
    free(s.bytes);
    return values;
}

/* ==== PYTORCH ==== */

static mpt_model *one_layer(mpt_context *ctx, const golden *g, double decay) {
    mpt_train_desc train = MPT_ZERO;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
    const int input = mpt_input(net, 1, 1, (int)golden_number(g, "inputs"));
    mpt_linear(net, input, (int)golden_number(g, "outputs"), NULL);
    train.batch = 1;
    train.optimizer = mpt_sgd(golden_number(g, "lr"), 0);
    train.ema_decay = decay;
    CHECK_OK(ctx, mpt_model_build(net, &train));
    return net;
}

/* A step with gradients that are given, or with one that is not finite. Weight and bias are tensors 1 and 2. */
static void given_step(mpt_context *ctx, mpt_model *net, const float *grad, size_t weights, int skipped) {
    mpt_params *params = mpt_model_params(net);
    const float x[8] = {0}, zero[8] = {0}, inf = test_float(0x7f800000u);
    CHECK_OK(ctx, mpt_forward(net, x, NULL, 1));
    CHECK_OK(ctx, mpt_output_grad(net, 2, zero));
    CHECK_OK(ctx, mpt_backward(net));
    CHECK_OK(ctx, mpt_upload(ctx, mpt_params_grad(params, 1), grad, weights * sizeof *grad));
    CHECK_OK(ctx,
             mpt_upload(ctx, mpt_params_grad(params, 2), grad + weights, mpt_params_count(params, 2) * sizeof *grad));
    if (skipped) CHECK_OK(ctx, mpt_upload(ctx, mpt_params_grad(params, 2), &inf, sizeof inf));
    CHECK_OK(ctx, mpt_step(mpt_model_optimizer(net)));
    CHECK_OK(ctx, mpt_scaler_update(mpt_model_scaler(net)));
}

/* The first applied step copies, a skipped one changes nothing. Both sides round two operations a step, of values under
   2; PyTorch may fuse them. */
static void test_golden(mpt_context *ctx) {
    golden g = golden_read("ema");
    const uint64_t seed = (uint64_t)golden_number(&g, "seed");
    const size_t outputs = (size_t)golden_number(&g, "outputs"), inputs = (size_t)golden_number(&g, "inputs");
    const size_t weights = outputs * inputs, count = weights + outputs;
    const int steps = (int)golden_number(&g, "steps");
    mpt_model *net = one_layer(ctx, &g, golden_number(&g, "decay")), *reader = one_layer(ctx, &g, 0);
    float values[64];
    int step;
    size_t i;
    for (i = 0; i < count; i++) values[i] = 2 * mpt_uniform(seed, 0, 201, i) - 1;
    CHECK_OK(ctx, mpt_params_set(mpt_model_params(net), 1, values));
    CHECK_OK(ctx, mpt_params_set(mpt_model_params(net), 2, values + weights));
    for (step = 1; step <= steps; step++) {
        char name[16];
        const golden_line *line;
        float *average;
        snprintf(name, sizeof name, "step%d", step);
        line = golden_need(&g, "f32", "output", name);
        for (i = 0; i < count; i++) values[i] = 2 * mpt_uniform(seed, (uint64_t)step, 202, i) - 1;
        given_step(ctx, net, values, weights, 1);
        given_step(ctx, net, values, weights, 0);
        free(averages_of(ctx, net, reader));
        average = (float *)test_memory(count * sizeof *average);
        CHECK_OK(ctx, mpt_params_get(mpt_model_params(reader), 1, average));
        CHECK_OK(ctx, mpt_params_get(mpt_model_params(reader), 2, average + weights));
        for (i = 0; i < count; i++) CHECK_NEAR(average[i], line->value[i], 2 * 2 * (step - 1) * test_unit(MPT_F32) * 2);
        free(average);
    }
    CHECK_EQUAL((double)mpt_steps_skipped(net), steps);
    mpt_model_free(net);
    mpt_model_free(reader);
    golden_free(&g);
}

/* ==== NETS ==== */

typedef struct problem {
    float x[2 * BATCH * PIXELS];
    int32_t label[2 * BATCH];
} problem;

static problem problem_new(void) {
    problem p;
    int i;
    test_floats(p.x, 2 * BATCH * PIXELS, -1, 1, 1);
    for (i = 0; i < 2 * BATCH; i++) p.label[i] = (int32_t)(mpt_hash(3, 0, 0, (uint64_t)i) % CLASSES);
    return p;
}

static mpt_model *build(mpt_context *ctx, mpt_policy policy, double decay, int frozen) {
    mpt_conv2d_desc conv = MPT_ZERO;
    mpt_train_desc train = MPT_ZERO;
    mpt_model *net = mpt_model_new(ctx, policy);
    int h = mpt_input(net, SIDE, SIDE, CHANNELS);
    conv.padding = 1;
    conv.tuning.frozen = frozen;
    h = mpt_relu(net, mpt_batch_norm(net, mpt_conv2d(net, h, 5, 3, &conv), NULL));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
    train.batch = BATCH;
    train.optimizer = mpt_adam(0.01);
    train.seed = 5;
    train.ema_decay = decay;
    CHECK_OK(ctx, mpt_model_build(net, &train));
    return net;
}

static void step_once(mpt_context *ctx, mpt_model *net, const problem *p, int step) {
    CHECK_OK(ctx, mpt_train_step(net, p->x + step % 2 * BATCH * PIXELS, p->label + step % 2 * BATCH));
}

/* The rule, each operation rounded once */
static float moved(float average, float weight, double decay) {
    const float share = (float)(1 - decay);
    const volatile float way = weight - average;
    const volatile float part = share < 0.5f ? share * way : way * (1 - share);
    return share < 0.5f ? average + part : weight - part;
}

/* Averages are of the weights as they are kept, whatever they are kept in, by the rule, bit by bit; a prediction with
   them is that of a net that has them for weights, and the training is that of a net without them. */
static void test_rule(mpt_context *ctx, mpt_policy policy, double decay, int frozen) {
    const problem p = problem_new();
    mpt_model *net = build(ctx, policy, decay, frozen), *plain = build(ctx, policy, 0, frozen);
    mpt_model *reader = build(ctx, mpt_policy_preset(MPT_O0, MPT_F16), 0, frozen);
    const size_t count = mpt_params_count(mpt_model_params(net), 0);
    float *expected = (float *)test_memory(count * sizeof *expected);
    float *w = (float *)test_memory(count * sizeof *w), *v = (float *)test_memory(count * sizeof *v), *average;
    float a[BATCH * CLASSES], b[BATCH * CLASSES], own[BATCH * CLASSES];
    saved s;
    mpt_metrics m, n;
    int step;
    size_t i;
    for (step = 0; step < STEPS; step++) {
        step_once(ctx, net, &p, step);
        step_once(ctx, plain, &p, step);
        CHECK_OK(ctx, mpt_params_get(mpt_model_params(net), 0, w));
        for (i = 0; i < count; i++) expected[i] = step ? moved(expected[i], w[i], decay) : w[i];
        average = averages_of(ctx, net, reader);
        CHECK(memcmp(average, expected, count * sizeof *average) == 0);
        free(average);
    }
    CHECK_OK(ctx, mpt_params_get(mpt_model_params(plain), 0, v));
    CHECK(memcmp(w, v, count * sizeof *w) == 0);
    CHECK_OK(ctx, mpt_predict(net, p.x, BATCH, own));
    CHECK_OK(ctx, mpt_use_average(net, 1));
    CHECK_OK(ctx, mpt_predict(net, p.x, BATCH, a));
    CHECK_OK(ctx, mpt_evaluate(net, p.x, p.label, BATCH, &m));
    s = save_weights(ctx, net);
    CHECK_OK(ctx, mpt_weights_load_memory(plain, s.bytes, s.size, NULL));
    if (policy.master == MPT_MASTER_F32) { /* else the other net rounds them for itself, as it likes */
        CHECK_OK(ctx, mpt_predict(plain, p.x, BATCH, b));
        CHECK_OK(ctx, mpt_evaluate(plain, p.x, p.label, BATCH, &n));
        CHECK(memcmp(a, b, sizeof a) == 0 && m.loss <= n.loss && m.loss >= n.loss);
    }
    CHECK(memcmp(a, own, sizeof a) != 0);
    step_once(ctx, net, &p, 0); /* which reads the weights */
    CHECK_OK(ctx, mpt_use_average(net, 0));
    CHECK_OK(ctx, mpt_predict(net, p.x, BATCH, b));
    CHECK(memcmp(b, a, sizeof a) != 0);
    free(s.bytes);
    free(w);
    free(v);
    free(expected);
    mpt_model_free(net);
    mpt_model_free(plain);
    mpt_model_free(reader);
}

/* A run that goes on from a checkpoint has the averages of one that never stopped. From one without them they begin
   anew; one with them is refused where there are none. */
static void test_resume(mpt_context *ctx) {
    const mpt_policy policy = mpt_policy_preset(MPT_O2, MPT_BF16), fp32 = mpt_policy_preset(MPT_O0, MPT_F16);
    const problem p = problem_new();
    mpt_model *net = build(ctx, policy, 0.9, 0), *other = build(ctx, policy, 0.9, 0), *none = build(ctx, policy, 0, 0);
    mpt_model *reader = build(ctx, fp32, 0, 0);
    const size_t bytes = mpt_params_count(mpt_model_params(reader), 0) * sizeof(float);
    float *a, *b, *w = (float *)test_memory(bytes);
    saved s = save_checkpoint(ctx, net); /* before the first step there are none to save */
    int step;
    CHECK_OK(ctx, mpt_checkpoint_load_memory(none, s.bytes, s.size));
    free(s.bytes);
    for (step = 0; step < 3; step++) step_once(ctx, net, &p, step);
    s = save_checkpoint(ctx, net);
    CHECK_ERROR(ctx, mpt_checkpoint_load_memory(none, s.bytes, s.size), MPT_ERROR_SHAPE, "average");
    CHECK_OK(ctx, mpt_checkpoint_load_memory(other, s.bytes, s.size));
    for (; step < 6; step++) step_once(ctx, net, &p, step), step_once(ctx, other, &p, step);
    a = averages_of(ctx, net, reader);
    b = averages_of(ctx, other, reader);
    CHECK(memcmp(a, b, bytes) == 0);
    free(a);
    free(b);
    free(s.bytes);
    for (step = 0; step < 2; step++) step_once(ctx, none, &p, step);
    s = save_checkpoint(ctx, none);
    CHECK_OK(ctx, mpt_checkpoint_load_memory(net, s.bytes, s.size));
    a = averages_of(ctx, net, reader); /* there are none yet: the weights */
    CHECK_OK(ctx, mpt_params_get(mpt_model_params(net), 0, w));
    CHECK(memcmp(a, w, bytes) == 0);
    free(a);
    step_once(ctx, net, &p, 0);
    a = averages_of(ctx, net, reader); /* a copy */
    CHECK_OK(ctx, mpt_params_get(mpt_model_params(net), 0, w));
    CHECK(memcmp(a, w, bytes) == 0);
    step_once(ctx, net, &p, 1);
    b = averages_of(ctx, net, reader);
    CHECK_OK(ctx, mpt_params_get(mpt_model_params(net), 0, w));
    CHECK(memcmp(b, w, bytes) != 0 && memcmp(a, b, bytes) != 0);
    free(a);
    free(b);
    free(w);
    free(s.bytes);
    mpt_model_free(net);
    mpt_model_free(other);
    mpt_model_free(none);
    mpt_model_free(reader);
}

/* 4 bytes of each weight that is trained, and 2 for products to read where they read 16 bits. */
static void test_bytes(mpt_level level, int frozen) {
    test_counter counter;
    const mpt_context_desc desc = test_counting(&counter, 1);
    mpt_context *ctx = test_open(&desc);
    const mpt_policy policy = mpt_policy_preset(level, MPT_F16);
    const size_t before = counter.bytes;
    mpt_model *net = build(ctx, policy, 0.99, frozen), *plain;
    const mpt_memory m = mpt_model_memory(net);
    const size_t held = counter.bytes - before;
    mpt_memory n;
    if (strcmp(mpt_device_name(ctx), "cpu") == 0)
        CHECK_EQUAL(
            (double)(m.weights + m.masters + m.gradients + m.moments + m.activations + m.workspace + m.bookkeeping),
            (double)held);
    plain = build(ctx, policy, 0, frozen);
    n = mpt_model_memory(plain);
    CHECK_EQUAL((double)(m.moments - n.moments), (double)m.gradients * (level == MPT_O0 ? 1 : 1.5));
    CHECK_EQUAL((double)m.weights, (double)n.weights);
    mpt_model_free(net);
    mpt_model_free(plain);
    mpt_close(ctx);
    CHECK(test_counter_clean(&counter));
}

static void test_errors(mpt_context *ctx) {
    static const double decays[] = {1, -0.1, 0.5};
    mpt_model *net = build(ctx, mpt_policy_preset(MPT_O2, MPT_BF16), 0, 0);
    mpt_train_desc train = MPT_ZERO;
    int i;
    CHECK_ERROR(ctx, mpt_use_average(net, 1), MPT_ERROR_ORDER, "ema_decay");
    mpt_model_free(net);
    for (i = 0; i < 3; i++) {
        net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
        mpt_linear(net, mpt_input(net, 1, 1, 2), 1, NULL);
        train.ema_decay = decays[i];
        train.inference = i == 2;
        CHECK_ERROR(ctx, mpt_use_average(net, 1), MPT_ERROR_ORDER, "built");
        CHECK_ERROR(ctx, mpt_model_build(net, &train), MPT_ERROR_ARGUMENT, "ema_decay");
        mpt_model_free(net);
    }
}

int main(int argc, char **argv) {
    mpt_context *ctx;
    int level, master;
    test_begin(argc, argv);
    ctx = test_open(NULL);
    RUN_TEST(test_golden(ctx));
    for (level = 0; level < 3; level++) {
        RUN_TEST(test_rule(ctx, mpt_policy_preset((mpt_level)level, MPT_BF16), 0.9, level == 1));
        RUN_TEST(test_bytes((mpt_level)level, level == 2));
    }
    for (master = MPT_MASTER_NONE; master <= MPT_MASTER_STOCHASTIC; master++) {
        mpt_policy policy = mpt_policy_preset(MPT_O2, MPT_BF16);
        policy.master = (mpt_master)master;
        RUN_TEST(test_rule(ctx, policy, 0.25, 0)); /* over the half lerp takes the other way */
    }
    RUN_TEST(test_resume(ctx));
    RUN_TEST(test_errors(ctx));
    mpt_close(ctx);
    return test_finish("parity/averages");
}
