/* nets.c - floor 4: whole nets trained for 20 steps, against PyTorch in fp32 and in bf16.

   The losses are PyTorch's own, written by make_golden_nets.py, which says how both sides draw the same weights and
   samples, and what the modes are; run from the top of the repository. O0 is held to the mode f32; O1 to `policy`,
   which rounds what O1 rounds, and to `autocast`, which rounds more: logits, gradients of weights. curve.h says how far
   the losses may lie apart. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include "golden.h"
#include "curve.h"

enum { SEED = 1, CLASSES = 10, TENSORS = 20, CELL = 4 };

/* ==== NETS ==== */

static int dense(mpt_model *net, int h, int outputs) { return mpt_relu(net, mpt_linear(net, h, outputs, NULL)); }

static int filters(mpt_model *net, int h, int count) { return mpt_relu(net, test_same(net, h, count, 3)); }

static int mlp(mpt_model *net, int h) {
    h = dense(net, h, 512);
    h = dense(net, h, 512);
    return mpt_linear(net, h, CLASSES, NULL);
}

static int lenet(mpt_model *net, int h) {
    h = mpt_max_pool2d(net, filters(net, h, 32), 2, NULL);
    h = mpt_max_pool2d(net, filters(net, h, 64), 2, NULL);
    h = dense(net, h, 128);
    return mpt_linear(net, h, CLASSES, NULL);
}

/* Batch norm behind it, so no bias. */
static int conv_norm(mpt_model *net, int h, int count, int kernel, int stride) {
    mpt_conv2d_desc desc = MPT_ZERO;
    desc.stride = stride;
    desc.padding = kernel / 2;
    desc.no_bias = 1;
    return mpt_batch_norm(net, mpt_conv2d(net, h, count, kernel, &desc), NULL);
}

static int block(mpt_model *net, int x, int count, int stride) {
    int h = mpt_relu(net, conv_norm(net, x, count, 3, stride));
    h = conv_norm(net, h, count, 3, 1);
    return mpt_relu(net, mpt_add(net, h, stride > 1 ? conv_norm(net, x, count, 1, stride) : x));
}

static int resnet(mpt_model *net, int h) {
    h = mpt_relu(net, conv_norm(net, h, 16, 3, 1));
    h = block(net, h, 16, 1);
    h = block(net, h, 32, 2);
    return mpt_linear(net, mpt_global_avg_pool2d(net, h), CLASSES, NULL);
}

/* Squeeze-and-excite behind a norm without gamma and beta, and beside it a slice of what goes down and up again */
static int excite(mpt_model *net, int h) {
    mpt_conv2d_desc conv = MPT_ZERO;
    mpt_norm_desc plain = MPT_ZERO;
    int s;
    conv.padding = 1;
    conv.no_bias = 1;
    plain.no_affine = 1;
    h = mpt_batch_norm(net, mpt_conv2d(net, h, 16, 3, &conv), &plain);
    h = mpt_leaky_relu(net, h, 0.2f);
    s = mpt_sigmoid(net, mpt_linear(net, mpt_global_avg_pool2d(net, h), 16, NULL));
    h = mpt_multiply(net, h, s);
    s = mpt_slice(net, mpt_upsample(net, mpt_max_pool2d(net, h, 2, NULL), 2), 4, 5);
    return mpt_linear(net, mpt_global_avg_pool2d(net, mpt_concat(net, h, s)), CLASSES, NULL);
}

typedef struct network {
    const char *golden; /* file */
    int (*layers)(mpt_model *net, int input);
    roundings forward, backward;
    size_t fan_in[TENSORS]; /* of each tensor; 0: it starts as the library has it */
} network;

/* Forward, the terms are the fan-ins; backward, outputs and patches of the layers above the first, and then its samples
   or pixels. Pooling rounds nothing. PyTorch's convolution for CPUs without bf16 rounds gradients once for each tap (9)
   and each sample (32). */
static const network networks[] = {
    {"net_mlp",
     mlp,
     {784 + 512 + 512, 3 + 2, 3 + 2 + 3 + 1},
     {10 + 512 + 64, 3, 3 + 1},
     {784, 784, 512, 512, 512, 512}},
    {"net_lenet",
     lenet,
     {9 + 288 + 3136 + 128, 4 + 3, 4 + 3 + 4 + 1},
     {10 + 128 + 9 * 64 + 32 * 28 * 28, 4, 4 + 9 + 32 + 1},
     {9, 9, 288, 288, 3136, 3136, 128, 128}},
    /* Statistics are sums over 4096 or 1024 pixels, one of them forward and two backward. Kept are what convolutions,
       norms and sums compute, 5 + 5 + 2 on the way, the pooled values, 7 copies; 2 gradients have two parts. */
    {"net_resnet",
     resnet,
     {27 + 144 + 144 + 144 + 288 + 3 * 4096 + 2 * 1024 + 64 + 32, 7 + 12 + 1, 7 + 12 + 1 + 1 + 1},
     {10 + 288 + 288 + 144 + 144 + 6 * 4096 + 4 * 1024 + 4096, 12 + 2 + 2, 12 + 2 + 2 + 4 * 9 + 16 + 1},
     {27, 0, 0, 144, 0, 0, 144, 0, 0, 144, 0, 0, 288, 0, 0, 16, 0, 0, 32, 32}},
    /* Means are sums over 256 pixels. Kept are the input, what convolution, norm, leaky ReLU, sigmoid and product
       compute, two pooled values, 5 copies; `autocast` also rounds before the sigmoid. 3 gradients have two parts. */
    {"net_excite",
     excite,
     {27 + 4096 + 256 + 16 + 256 + 21, 1 + 5 + 2 + 5, 1 + 5 + 2 + 5 + 1 + 1},
     {10 + 16 + 2 * 256 + 2 * 4096 + 4096, 7 + 3, 7 + 3 + 1 + 9 + 16 + 1},
     {27, 16, 16, 21, 21}},
};

/* ==== WEIGHTS AND SAMPLES ==== as make_golden_nets.py draws them */

static void set_weights(mpt_context *ctx, mpt_params *params, const size_t *fan_in) {
    int t;
    for (t = 1; t <= mpt_params_tensors(params); t++) {
        const size_t count = mpt_params_count(params, t);
        float *values = (float *)test_memory(count * sizeof *values);
        size_t i;
        for (i = 0; i < count; i++)
            values[i] = (float)((2 * (double)mpt_uniform(SEED, 0, (uint64_t)t, i) - 1) / sqrt((double)fan_in[t - 1]));
        if (fan_in[t - 1]) CHECK_OK(ctx, mpt_params_set(params, t, values));
        free(values);
    }
}

typedef struct batch {
    size_t samples, H, W, C;
    float *x;
    int32_t *labels;
} batch;

static batch batch_new(const golden *g) {
    batch b;
    b.samples = (size_t)golden_number(g, "batch");
    b.H = (size_t)golden_number(g, "H"), b.W = (size_t)golden_number(g, "W"), b.C = (size_t)golden_number(g, "C");
    b.x = (float *)test_memory(b.samples * b.H * b.W * b.C * sizeof *b.x);
    b.labels = (int32_t *)test_memory(b.samples * sizeof *b.labels);
    return b;
}

static void batch_free(batch *b) { free(b->x), free(b->labels); }

static void draw_batch(batch *b, uint64_t step) {
    const size_t pixels = b->H * b->W * b->C;
    size_t s, i;
    for (s = 0; s < b->samples; s++) {
        const size_t label = mpt_hash(SEED, step, 101, s) % CLASSES;
        b->labels[s] = (int32_t)label;
        for (i = 0; i < pixels; i++) {
            const size_t h = i / (b->W * b->C), w = i / b->C % b->W, c = i % b->C;
            const size_t cell = ((label * (b->H / CELL) + h / CELL) * (b->W / CELL) + w / CELL) * b->C + c;
            const float picture = 2 * mpt_uniform(SEED, 0, 102, cell) - 1;
            b->x[s * pixels + i] = picture + (2 * mpt_uniform(SEED, step, 103, s * pixels + i) - 1);
        }
    }
}

/* ==== TRAINING ==== */

static mpt_model *build(mpt_context *ctx, const network *n, const golden *g, const batch *b, mpt_level level) {
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(level, MPT_BF16));
    mpt_train_desc desc = MPT_ZERO;
    const int input = mpt_input(net, (int)b->H, (int)b->W, (int)b->C);
    mpt_softmax_cross_entropy(net, n->layers(net, input), NULL);
    desc.batch = (int)b->samples;
    desc.optimizer = mpt_sgd(golden_number(g, "lr"), golden_number(g, "momentum"));
    CHECK_OK(ctx, mpt_model_build(net, &desc));
    CHECK_EQUAL(mpt_model_outputs(net), CLASSES);
    set_weights(ctx, mpt_model_params(net), n->fan_in);
    return net;
}

static void train(mpt_context *ctx, const network *n, const golden *g, mpt_level level, curve *out) {
    batch b = batch_new(g);
    mpt_model *net = build(ctx, n, g, &b, level);
    size_t step;
    for (step = 0; step < out->steps; step++) {
        draw_batch(&b, step + 1);
        CHECK_OK(ctx, mpt_train_step(net, b.x, b.labels));
        out->loss[step] = mpt_loss(net);
        if (!step) out->norm = curve_norm(ctx, net);
    }
    mpt_model_free(net);
    batch_free(&b);
}

static void test_network(mpt_context *ctx, const network *n) {
    golden g = golden_read(n->golden);
    curve c;
    c.steps = (size_t)golden_number(&g, "steps");
    c.loss = test_doubles(c.steps), c.norm = 0;
    train(ctx, n, &g, MPT_O0, &c);
    curve_compare(&g, "f32", &n->forward, &n->backward, CLASSES, &c);
    train(ctx, n, &g, MPT_O1, &c);
    curve_compare(&g, "policy", &n->forward, &n->backward, CLASSES, &c);
    curve_compare(&g, "autocast", &n->forward, &n->backward, CLASSES, &c);
    free(c.loss);
    golden_free(&g);
}

int main(int argc, char **argv) {
    mpt_context *ctx = test_open(NULL);
    size_t i;
    test_begin(argc, argv);
    for (i = 0; i < sizeof networks / sizeof *networks; i++) RUN_TEST(test_network(ctx, &networks[i]));
    mpt_close(ctx);
    return test_finish("parity/nets");
}
