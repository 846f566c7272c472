/* nets.c - floor 4: whole nets trained for 20 steps, against PyTorch in fp32 and in bf16.

   The losses are PyTorch's own, written by make_golden_nets.py, which says how both sides draw the same weights and
   samples, and what the modes are; run from the top of the repository. O0 is held to the mode f32; O1 to `policy`,
   which rounds what O1 rounds, and to `autocast`, which rounds more: logits, gradients of weights.

   How far the losses of a step may lie apart, to first order. u is the unit roundoff, z the logits, g the gradient.

   Values. A net multiplies and rounds in stages, and a relative error of one stage passes the next about as it is.
   Errors of different roundings are independent, so n of them add up to sqrt(n) u (Higham and Mary 2019). In fp32 n
   counts the terms of all products on the way, in bf16 the arrays on the way that are kept in it. Both sides are off:
       relative error of the logits      e = 2 u sqrt(n of the forward pass)
       relative error of the gradient    d = 2 u sqrt(n of both passes)
   In the first step of `policy` both sides round the same numbers at the same places, and a stored value differs only
   where a boundary lies between two fp32 results, which are a distance f apart: a difference of 2 u with the chance
   f / 2u, of sqrt(2 u f) in the root mean square, which takes the place of 2 u. Later the weights lie apart, and with
   them the values, by up to 2 u.

   Loss. Its slope to a sample's logits is at most sqrt(2), so e makes it sqrt(2) e |z|. Every step before has moved the
   weights by lr / (1 - momentum) d |g| too far, in the end; steps, too, err independently, so the weights have drifted
   by the root of the sum of the squares of these, as long as a step does not drive two nets apart, and that makes
   |g of this step| times the drift: the bound grows as the root of the steps, and as the gradients. A value that
   crosses a kink of ReLU or max pooling has no other loss, and another gradient only for its share of it; e and d hold
   for shares, too. The loss itself is a mean of N rows, each of C exponentials: N + C + 13 roundings in fp32. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include "golden.h"

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

/* Roundings on the way through a net, by the mode that is compared with. */
typedef struct roundings {
    double terms; /* of products, one after the other */
    double
        policy; /* arrays kept in bf16: copies of weights and biases, values; in the backward pass gradients of values */
    double autocast; /* and logits; in the backward pass also what rounds a weight's gradient */
} roundings;

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

static double gradient_norm(mpt_context *ctx, mpt_model *net) {
    mpt_optimizer_state *state = (mpt_optimizer_state *)test_memory(sizeof *state);
    double norm;
    CHECK_OK(ctx, mpt_optimizer_get_state(mpt_model_optimizer(net), state));
    norm = state->grad_norm;
    free(state);
    return norm;
}

/* What came of it: the norm is that of the first step's gradient. */
typedef struct curve {
    size_t steps;
    double *loss, norm;
} curve;

static void train(mpt_context *ctx, const network *n, const golden *g, mpt_level level, curve *out) {
    batch b = batch_new(g);
    mpt_model *net = build(ctx, n, g, &b, level);
    size_t step;
    for (step = 0; step < out->steps; step++) {
        draw_batch(&b, step + 1);
        CHECK_OK(ctx, mpt_train_step(net, b.x, b.labels));
        out->loss[step] = mpt_loss(net);
        if (!step) out->norm = gradient_norm(ctx, net);
    }
    mpt_model_free(net);
    batch_free(&b);
}

/* ==== COMPARING ==== */

/* Root mean square of the relative errors of n roundings on both sides. */
static double relative_error(const char *mode, size_t step, double terms, double policy, double autocast) {
    const double u = test_unit(MPT_BF16), fp32 = 2 * test_unit(MPT_F32) * sqrt(terms);
    if (strcmp(mode, "f32") == 0) return fp32;
    if (strcmp(mode, "autocast") == 0) return 2 * u * sqrt(autocast);
    return (step ? 2 * u : sqrt(2 * u * fp32)) * sqrt(policy);
}

static void compare(const network *n, const golden *g, const char *mode, const curve *ours) {
    const golden_line *loss = golden_need(g, mode, "output", "loss"), *norm = golden_need(g, mode, "output", "norm");
    const golden_line *logits = golden_need(g, mode, "output", "logits");
    const roundings *f = &n->forward, *b = &n->backward;
    const double pace = golden_number(g, "lr") / (1 - golden_number(g, "momentum"));
    const double rows = golden_number(g, "batch") + (double)CLASSES + 13;
    double *tolerance = test_doubles(ours->steps), squares = 0; /* of the drift */
    int ok = 1;
    size_t t;
    for (t = 0; t < ours->steps; t++) {
        const double e = relative_error(mode, t, f->terms, f->policy, f->autocast);
        const double d = relative_error(mode, t, f->terms + b->terms, f->policy + b->policy, f->autocast + b->autocast);
        tolerance[t] = sqrt(2.0) * e * logits->value[t] + norm->value[t] * sqrt(squares);
        tolerance[t] += rows * test_unit(MPT_F32) * (loss->value[t] + logits->value[t]);
        squares += pace * d * norm->value[t] * pace * d * norm->value[t];
        if (!t) ok = CHECK_NEAR(ours->norm, norm->value[t], d * norm->value[t]);
    }
    ok &= CHECK_ALL(ours->loss, ours->steps, loss->value, tolerance);
    if (!ok) printf("    %s, mode %s\n", g->name, mode);
    free(tolerance);
}

static void test_network(mpt_context *ctx, const network *n) {
    golden g = golden_read(n->golden);
    curve c;
    c.steps = (size_t)golden_number(&g, "steps");
    c.loss = test_doubles(c.steps), c.norm = 0;
    train(ctx, n, &g, MPT_O0, &c);
    compare(n, &g, "f32", &c);
    train(ctx, n, &g, MPT_O1, &c);
    compare(n, &g, "policy", &c);
    compare(n, &g, "autocast", &c);
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
