/* newcomer.c - programs that somebody writes from the manual alone, each a function that returns 1 if it worked. */
#define MPT_IMPLEMENTATION
#include "mpt.h"
#include <stdio.h>
#include <stdlib.h>

enum { SAMPLES = 32, FEATURES = 4, CLASSES = 2, BATCH = 8 };

typedef struct table { /* class 1: the first feature is above the second */
    float x[SAMPLES * FEATURES];
    int32_t y[SAMPLES];
} table;

static table table_new(void) {
    table t;
    for (size_t i = 0; i < SAMPLES * FEATURES; i++) t.x[i] = 2 * mpt_uniform(1, 0, 0, i) - 1;
    for (size_t i = 0; i < SAMPLES; i++) t.y[i] = t.x[i * FEATURES] > t.x[i * FEATURES + 1];
    return t;
}

static int layers(mpt_model *net) {
    int h = mpt_relu(net, mpt_linear(net, mpt_input(net, 1, 1, FEATURES), 16, NULL));
    return mpt_linear(net, h, CLASSES, NULL);
}

static mpt_model *classifier(mpt_context *ctx, int accumulate, int inference) {
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_BF16));
    mpt_train_desc train = MPT_ZERO;
    mpt_softmax_cross_entropy(net, layers(net), NULL);
    train.batch = BATCH;
    train.accumulate = accumulate;
    train.optimizer = mpt_adam(0.02);
    train.inference = inference;
    if (mpt_model_build(net, &train) != MPT_OK) puts(mpt_why(ctx));
    return net;
}

static double trained(mpt_model *net, const table *t, int epochs, size_t step) {
    mpt_metrics m;
    for (int epoch = 0; epoch < epochs; epoch++)
        for (size_t i = 0; i < SAMPLES; i += step) mpt_train_step(net, t->x + i * FEATURES, t->y + i);
    return mpt_evaluate(net, t->x, t->y, SAMPLES, &m) == MPT_OK ? m.accuracy : 0;
}

static int own_data(mpt_context *ctx) {
    const table t = table_new();
    mpt_model *net = classifier(ctx, 1, 0);
    const double accuracy = trained(net, &t, 60, BATCH);
    mpt_model_free(net);
    return accuracy > 0.95;
}

static int accumulating(mpt_context *ctx) {
    const table t = table_new();
    mpt_model *net = classifier(ctx, 4, 0); /* 4 passes of 8 make a step */
    const double accuracy = trained(net, &t, 120, SAMPLES);
    mpt_model_free(net);
    return accuracy > 0.95;
}

static int saving(mpt_context *ctx) {
    const table t = table_new();
    mpt_model *net = classifier(ctx, 1, 0), *again = classifier(ctx, 1, 0);
    float a[CLASSES], b[CLASSES];
    size_t size = 0;
    void *file;
    trained(net, &t, 3, BATCH);
    mpt_checkpoint_save_memory(net, NULL, 0, &size);
    file = malloc(size);
    mpt_checkpoint_save_memory(net, file, size, &size);
    mpt_checkpoint_load_memory(again, file, size);
    free(file);
    mpt_predict(net, t.x, 1, a);
    mpt_predict(again, t.x, 1, b);
    mpt_model_free(net);
    mpt_model_free(again);
    return a[0] == b[0] && a[1] == b[1];
}

static int inference_only(mpt_context *ctx) {
    const table t = table_new();
    mpt_model *net = classifier(ctx, 1, 0), *lean = classifier(ctx, 1, 1);
    float a[CLASSES], b[CLASSES];
    size_t size = 0;
    void *file;
    trained(net, &t, 3, BATCH);
    mpt_weights_save_memory(net, NULL, 0, &size, MPT_BF16);
    file = malloc(size);
    mpt_weights_save_memory(net, file, size, &size, MPT_BF16);
    mpt_weights_load_memory(lean, file, size, NULL);
    free(file);
    mpt_predict(net, t.x, 1, a);
    mpt_predict(lean, t.x, 1, b);
    mpt_model_free(net);
    mpt_model_free(lean);
    return a[0] == b[0] && a[1] == b[1];
}

static int fine_tuning(mpt_context *ctx) { /* another classifier on a frozen layer */
    const table t = table_new();
    mpt_model *net = classifier(ctx, 1, 0), *tuned = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_BF16));
    mpt_linear_desc frozen = MPT_ZERO, head = MPT_ZERO;
    mpt_load_desc load = MPT_ZERO;
    double accuracy;
    size_t size = 0;
    void *file;
    trained(net, &t, 60, BATCH);
    mpt_weights_save_memory(net, NULL, 0, &size, MPT_F32);
    file = malloc(size);
    mpt_weights_save_memory(net, file, size, &size, MPT_F32);
    frozen.tuning.frozen = 1;
    head.name = "head";
    int h = mpt_relu(tuned, mpt_linear(tuned, mpt_input(tuned, 1, 1, FEATURES), 16, &frozen));
    mpt_softmax_cross_entropy(tuned, mpt_linear(tuned, h, CLASSES, &head), NULL);
    mpt_train_desc train = MPT_ZERO;
    train.batch = BATCH;
    train.optimizer = mpt_adam(0.02);
    mpt_model_build(tuned, &train);
    load.partly = 1;
    mpt_weights_load_memory(tuned, file, size, &load);
    free(file);
    accuracy = trained(tuned, &t, 60, BATCH);
    mpt_model_free(net);
    mpt_model_free(tuned);
    return accuracy > 0.95;
}

static int own_loss(mpt_context *ctx) { /* regression of the difference of two features, by squared error */
    const table t = table_new();
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
    const int head = mpt_linear(net, mpt_input(net, 1, 1, FEATURES), 1, NULL);
    mpt_train_desc train = MPT_ZERO;
    double loss = 0;
    train.batch = SAMPLES;
    train.optimizer = mpt_sgd(0.3, 0);
    mpt_model_build(net, &train);
    for (int step = 0; step < 100; step++) {
        float y[SAMPLES], grad[SAMPLES];
        mpt_forward(net, t.x, NULL, SAMPLES);
        mpt_node_value(net, head, y);
        loss = 0;
        for (int i = 0; i < SAMPLES; i++) {
            const float error = y[i] - (t.x[i * FEATURES] - t.x[i * FEATURES + 1]);
            grad[i] = 2 * error / SAMPLES;
            loss += (double)error * (double)error / SAMPLES;
        }
        mpt_output_grad(net, head, grad);
        mpt_backward(net);
        mpt_step(mpt_model_optimizer(net)); /* unscales by itself */
        mpt_scaler_update(mpt_model_scaler(net));
    }
    mpt_model_free(net);
    return loss < 1e-4;
}

static int two_heads(mpt_context *ctx) {
    const table t = table_new();
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O1, MPT_F16));
    const int shared = mpt_relu(net, mpt_linear(net, mpt_input(net, 1, 1, FEATURES), 8, NULL));
    const int a = mpt_linear(net, shared, 1, NULL), b = mpt_linear(net, shared, 3, NULL);
    float grad[BATCH * 3] = {0}, y[BATCH * 3];
    mpt_train_desc train = MPT_ZERO;
    train.batch = BATCH;
    mpt_model_build(net, &train);
    mpt_forward(net, t.x, NULL, BATCH);
    grad[0] = 1;
    const int worked = mpt_node_value(net, b, y) == MPT_OK && mpt_output_grad(net, a, grad) == MPT_OK &&
                       mpt_output_grad(net, b, grad) == MPT_OK && mpt_backward(net) == MPT_OK;
    mpt_model_free(net);
    return worked;
}

static int two_inputs(mpt_context *ctx) { /* the class is told by the second input alone */
    const table t = table_new();
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_BF16));
    const int both = mpt_input(net, 1, 1, 3 * 3 * 1 + FEATURES);
    const int image = mpt_reshape(net, mpt_slice(net, both, 0, 9), 3, 3, 1);
    const int features = mpt_relu(net, mpt_linear(net, mpt_slice(net, both, 9, FEATURES), 16, NULL));
    const int seen = mpt_linear(net, mpt_conv2d(net, image, 2, 3, NULL), 4, NULL);
    float x[SAMPLES * (9 + FEATURES)];
    mpt_train_desc train = MPT_ZERO;
    mpt_metrics m = MPT_ZERO;
    mpt_softmax_cross_entropy(net, mpt_linear(net, mpt_concat(net, seen, features), CLASSES, NULL), NULL);
    train.batch = SAMPLES;
    train.optimizer = mpt_adam(0.02);
    mpt_model_build(net, &train);
    for (size_t i = 0; i < SAMPLES; i++) {
        for (size_t j = 0; j < 9; j++) x[i * (9 + FEATURES) + j] = mpt_uniform(2, 0, i, j);
        for (size_t j = 0; j < FEATURES; j++) x[i * (9 + FEATURES) + 9 + j] = t.x[i * FEATURES + j];
    }
    for (int step = 0; step < 120; step++) mpt_train_step(net, x, t.y);
    mpt_evaluate(net, x, t.y, SAMPLES, &m);
    mpt_model_free(net);
    return m.accuracy > 0.95;
}

static int several_optimizers(mpt_context *ctx) { /* two blocks of parameters that share one loss scale */
    mpt_params *params[2];
    mpt_optimizer *opt[2];
    mpt_scaler *scaler = mpt_scaler_new(ctx, NULL);
    const mpt_optimizer_desc descs[2] = {mpt_sgd(0.1, 0), mpt_adam(0.1)};
    float w = 1;
    for (int i = 0; i < 2; i++) {
        params[i] = mpt_params_new(ctx, NULL);
        mpt_params_add(params[i], "w", 1, MPT_GROUP_WEIGHT);
        mpt_params_build(params[i]);
        mpt_params_set(params[i], 1, &w);
        opt[i] = mpt_optimizer_new(params[i], scaler, &descs[i]);
        *mpt_params_grad(params[i], 1) = mpt_scaler_scale(scaler); /* d loss / dw = 1, times the scale */
    }
    for (int i = 0; i < 2; i++) mpt_step(opt[i]);
    mpt_scaler_update(scaler);
    int worked = 1;
    for (int i = 0; i < 2; i++) {
        mpt_params_get(params[i], 1, &w);
        worked &= w > 0.89f && w < 0.91f;
        mpt_optimizer_free(opt[i]);
        mpt_params_free(params[i]);
    }
    mpt_scaler_free(scaler);
    return worked;
}

static void *counted_alloc(size_t bytes, void *user) {
    *(size_t *)user += bytes;
    return malloc(bytes);
}

static void counted_release(void *p, size_t bytes, void *user) {
    *(size_t *)user -= bytes;
    free(p);
}

static int own_allocator(mpt_context *ctx) {
    size_t in_use = 0, most;
    mpt_context_desc desc = MPT_ZERO;
    (void)ctx;
    desc.alloc = counted_alloc;
    desc.release = counted_release;
    desc.user = &in_use;
    mpt_context *mine = mpt_open(&desc);
    mpt_model_free(classifier(mine, 1, 0));
    most = in_use;
    mpt_close(mine);
    return most > 0 && in_use == 0;
}

static int casts_only(mpt_context *ctx) {
    const float x[4] = {1, 0.1f, 65504, 1e-8f};
    mpt_f16 half[4];
    float back[4];
    mpt_cast(ctx, 4, mpt_f32_array(x), mpt_f16_array(half), NULL);
    mpt_cast(ctx, 4, mpt_f16_array(half), mpt_f32_array(back), NULL);
    return back[0] == 1 && back[2] == 65504 && back[3] == 0 && mpt_f32_from_f16(mpt_f16_from_f32(0.1f)) == back[1];
}

int main(void) {
    static const struct {
        const char *name;
        int (*run)(mpt_context *ctx);
    } programs[] = {{"own data", own_data},
                    {"two heads", two_heads},
                    {"two inputs", two_inputs},
                    {"own loss", own_loss},
                    {"inference only", inference_only},
                    {"saving", saving},
                    {"fine-tuning", fine_tuning},
                    {"accumulating", accumulating},
                    {"several optimizers", several_optimizers},
                    {"own allocator", own_allocator},
                    {"casts only", casts_only}};
    mpt_context *ctx = mpt_open(NULL);
    int passed = 0, failed = 0;
    for (size_t i = 0; i < sizeof programs / sizeof *programs; i++) {
        const int worked = programs[i].run(ctx);
        if (!worked) printf("newcomer: '%s' failed: %s\n", programs[i].name, mpt_why(ctx));
        passed += worked;
        failed += !worked;
    }
    mpt_close(ctx);
    printf("newcomer: %d passed, %d failed\n", passed, failed);
    return failed > 0;
}
