/* losses.c - floor 4: the options of losses in models: positions, probabilities, weights; against PyTorch's values, and
   against what they mean. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include "../parity/golden.h"

enum { SIDE = 4, CHANNELS = 3, PIXELS = SIDE * SIDE * CHANNELS, CLASSES = 5, MOST = 8 };

static int add_loss(mpt_model *net, int id, mpt_loss_kind kind, const mpt_loss_desc *desc) {
    switch (kind) {
    case MPT_LOSS_SQUARED_ERROR: return mpt_mse(net, id, desc);
    case MPT_LOSS_BCE_WITH_LOGITS: return mpt_bce_with_logits(net, id, desc);
    case MPT_LOSS_HUBER: return mpt_huber(net, id, desc);
    default: return mpt_softmax_cross_entropy(net, id, desc);
    }
}

/* ==== PYTORCH ==== the golden files of floor 2, by a model whose one layer is the identity */

typedef struct torch_case {
    const golden *g;
    mpt_loss_kind kind;
    mpt_loss_desc desc;
    int N, H, W, C;
    float *x, *target, *weights; /* weights of samples; NULL: none */
    int32_t *label;              /* NULL: targets are floats */
    float *options;              /* class_weights or pos_weight */
} torch_case;

static float *golden_floats(const golden *g, const char *name) {
    const golden_line *line = golden_find(g, "", "input", name);
    float *x;
    size_t i;
    if (!line) return NULL;
    x = (float *)test_memory(line->count * sizeof *x);
    for (i = 0; i < line->count; i++) x[i] = (float)line->value[i];
    return x;
}

static int golden_int(const golden *g, const char *name, int otherwise) {
    const golden_line *line = golden_find(g, "", "number", name);
    return line ? (int)line->number : otherwise;
}

static torch_case torch_new(const golden *g, mpt_loss_kind kind) {
    const golden_line *smoothing = golden_find(g, "", "number", "label_smoothing");
    const golden_line *delta = golden_find(g, "", "number", "delta");
    torch_case t;
    int i, rows;
    memset(&t, 0, sizeof t);
    t.g = g, t.kind = kind;
    t.N = golden_int(g, "N", 0), t.C = golden_int(g, "C", 0);
    t.H = golden_int(g, "H", 1), t.W = golden_int(g, "W", 1);
    t.x = golden_floats(g, "x"), t.target = golden_floats(g, "target"), t.weights = golden_floats(g, "sample_weights");
    t.desc.per_position = t.H > 1, t.desc.weighted = t.weights != NULL;
    if (delta) t.desc.delta = (float)delta->number;
    if (smoothing) t.desc.label_smoothing = (float)smoothing->number;
    t.options = golden_floats(g, kind == MPT_LOSS_CROSS_ENTROPY ? "class_weights" : "pos_weight");
    if (kind == MPT_LOSS_CROSS_ENTROPY) t.desc.class_weights = t.options;
    else t.desc.pos_weight = t.options;
    t.desc.probabilities = golden_int(g, "probabilities", 0);
    if (kind != MPT_LOSS_CROSS_ENTROPY || t.desc.probabilities) return t;
    t.desc.ignore = 1, t.desc.ignore_index = golden_int(g, "ignore_index", 0);
    rows = t.N * t.H * t.W;
    t.label = (int32_t *)test_memory((size_t)rows * sizeof *t.label);
    for (i = 0; i < rows; i++) t.label[i] = (int32_t)t.target[i];
    return t;
}

static void torch_free(torch_case *t) {
    free(t->x), free(t->target), free(t->weights), free(t->label), free(t->options);
}

static mpt_model *identity(mpt_context *ctx, const torch_case *t, int batch, int *layer) {
    const size_t count = (size_t)(t->C * t->C);
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F32));
    mpt_linear_desc linear = MPT_ZERO;
    mpt_conv2d_desc conv = MPT_ZERO;
    mpt_train_desc train = MPT_ZERO;
    float *w = (float *)test_memory(count * sizeof *w);
    int h = mpt_input(net, t->H, t->W, t->C), i;
    linear.no_bias = conv.no_bias = 1;
    h = t->H > 1 ? mpt_conv2d(net, h, t->C, 1, &conv) : mpt_linear(net, h, t->C, &linear);
    *layer = mpt_keep(net, h);
    add_loss(net, h, t->kind, &t->desc);
    train.batch = batch;
    train.optimizer = mpt_sgd(0.1, 0);
    CHECK_OK(ctx, mpt_model_build(net, &train));
    for (i = 0; i < t->C; i++) w[i * t->C + i] = 1;
    CHECK_OK(ctx, mpt_params_set(mpt_model_params(net), 1, w));
    free(w);
    return net;
}

static const void *torch_target(const torch_case *t) {
    return t->label ? (const void *)t->label : (const void *)t->target;
}

/* What the mean is divided by, and how many rows count */
static double total_weight(const torch_case *t, int *counted) {
    const int positions = t->H * t->W;
    double sum = 0;
    int i;
    *counted = 0;
    for (i = 0; i < t->N * positions; i++) {
        double own = t->weights ? (double)t->weights[i / positions] : 1;
        if (t->label && t->label[i] == t->desc.ignore_index) continue;
        if (t->label && t->options) own *= (double)t->options[t->label[i]];
        sum += own;
        ++*counted;
    }
    return sum;
}

/* Both results are off by at most 1.001 (terms + 5) u magnitude: see make_golden_ops.py; four roundings on top. */
static double off(const torch_case *t, const char *name, size_t i, double value) {
    const golden_line *bound = golden_need(t->g, "", "bound", name);
    return 2 * 1.001 * (bound->number + 5) * test_unit(MPT_F32) * bound->value[i] +
           8 * test_unit(MPT_F32) * fabs(value);
}

/* mpt_evaluate in batches, and a forward and backward pass of all samples */
static void test_torch(mpt_context *ctx, const char *name, mpt_loss_kind kind) {
    golden g = golden_read(name);
    torch_case t = torch_new(&g, kind);
    const golden_line *y = golden_need(&g, "f32", "output", "y"), *dx = golden_need(&g, "f32", "output", "dx");
    const size_t n = (size_t)(t.N * t.H * t.W * t.C);
    const int batches[] = {t.N, 2};
    float *grad = (float *)test_memory(n * sizeof *grad);
    int i, layer, counted;
    const double total = total_weight(&t, &counted), unit = t.N * t.H * t.W;
    for (i = 0; i < 2; i++) {
        mpt_model *net = identity(ctx, &t, batches[i], &layer);
        mpt_metrics m = MPT_ZERO;
        if (t.weights) CHECK_OK(ctx, mpt_sample_weights(net, t.weights));
        CHECK_OK(ctx, mpt_evaluate(net, t.x, torch_target(&t), (size_t)t.N, &m));
        CHECK_NEAR(m.loss, y->value[0], off(&t, "y", 0, y->value[0]));
        CHECK_EQUAL((double)m.samples, counted);
        if (i == 0) {
            size_t e;
            if (t.weights) CHECK_OK(ctx, mpt_sample_weights(net, t.weights));
            CHECK_OK(ctx, mpt_forward(net, t.x, torch_target(&t), (size_t)t.N));
            CHECK_NEAR(mpt_loss(net), y->value[0], off(&t, "y", 0, y->value[0]));
            CHECK_OK(ctx, mpt_backward(net));
            CHECK_OK(ctx, mpt_node_grad(net, layer, grad));
            for (e = 0; e < n; e++)
                CHECK_NEAR((double)grad[e] * unit / total, dx->value[e], off(&t, "dx", e, dx->value[e]));
        }
        mpt_model_free(net);
    }
    free(grad);
    torch_free(&t);
    golden_free(&g);
}

/* ==== WHAT THEY MEAN ==== */

typedef struct batch { /* of up to MOST samples */
    float x[MOST * PIXELS], target[MOST * PIXELS * CLASSES], weight[MOST];
    int32_t label[MOST * SIDE * SIDE];
} batch;

static batch *batch_new(uint64_t seed) {
    batch *b = (batch *)test_memory(sizeof *b);
    size_t i;
    test_floats(b->x, sizeof b->x / sizeof *b->x, -1, 1, seed);
    test_floats(b->target, sizeof b->target / sizeof *b->target, 0, 1, seed + 1);
    test_floats(b->weight, MOST, 0.25, 3, seed + 2);
    for (i = 0; i < sizeof b->label / sizeof *b->label; i++) b->label[i] = (int32_t)(mpt_hash(seed, 3, 0, i) % CLASSES);
    return b;
}

/* per_position: an image of logits; else a row of them */
static mpt_model *small_net(mpt_context *ctx, mpt_policy policy, mpt_loss_kind kind, const mpt_loss_desc *desc,
                            int rows, int accumulate) {
    mpt_model *net = mpt_model_new(ctx, policy);
    mpt_train_desc train = MPT_ZERO;
    int h = mpt_tanh(net, test_same(net, mpt_input(net, SIDE, SIDE, CHANNELS), 4, 3));
    h = desc->per_position ? mpt_conv2d(net, h, CLASSES, 1, NULL) : mpt_linear(net, h, CLASSES, NULL);
    add_loss(net, h, kind, desc);
    train.batch = rows, train.accumulate = accumulate, train.seed = 5;
    train.optimizer = mpt_sgd(0.1, 0.9);
    train.scaler.init_scale = 1024;
    CHECK_OK(ctx, mpt_model_build(net, &train));
    return net;
}

/* Weights that have moved by up to d in a few steps are at most `errors` roundings of d apart. */
static void check_params_near(mpt_context *ctx, mpt_model *a, mpt_model *b, mpt_model *start, double errors) {
    size_t count, i;
    float *p = test_params(ctx, a, &count), *q = test_params(ctx, b, &count), *s = test_params(ctx, start, &count);
    double moved = 0, apart = 0, largest = 0;
    for (i = 0; i < count; i++) {
        moved = fmax(moved, fabs((double)p[i] - (double)s[i]));
        apart = fmax(apart, fabs((double)p[i] - (double)q[i]));
        largest = fmax(largest, fabs((double)p[i]));
    }
    CHECK(moved > 0.001);
    CHECK_NEAR(apart, 0, errors * (moved + largest) * test_unit(MPT_F32));
    free(p), free(q), free(s);
}

/* Sums over a few hundred terms, in another order. */
static const double reordered = 256;

/* A sample of weight 2 is that sample twice, and one of weight 0 is not there. */
static void test_meaning(mpt_context *ctx, mpt_loss_kind kind, int per_position) {
    static const float weights[4] = {2, 1, 0, 1};
    static const int from[4] = {0, 0, 1, 3};
    mpt_loss_desc desc = MPT_ZERO, plain = MPT_ZERO;
    batch *b = batch_new(1), *copies = batch_new(1);
    mpt_model *weighted, *copied, *start;
    const int labels = per_position ? SIDE * SIDE : 1;
    mpt_metrics m, n;
    int i;
    desc.per_position = plain.per_position = per_position;
    desc.weighted = 1;
    for (i = 0; i < 4; i++) {
        memcpy(copies->x + i * PIXELS, b->x + from[i] * PIXELS, PIXELS * sizeof *b->x);
        memcpy(copies->label + i * labels, b->label + from[i] * labels, (size_t)labels * sizeof *b->label);
        memcpy(copies->target + i * CLASSES, b->target + from[i] * CLASSES, CLASSES * sizeof *b->target);
    }
    weighted = small_net(ctx, mpt_policy_preset(MPT_O0, MPT_F32), kind, &desc, 4, 1);
    copied = small_net(ctx, mpt_policy_preset(MPT_O0, MPT_F32), kind, &plain, 4, 1);
    start = small_net(ctx, mpt_policy_preset(MPT_O0, MPT_F32), kind, &plain, 4, 1);
    for (i = 0; i < 3; i++) {
        const int classes = kind == MPT_LOSS_CROSS_ENTROPY;
        const void *target = classes ? (const void *)b->label : b->target;
        const void *other = classes ? (const void *)copies->label : copies->target;
        CHECK_OK(ctx, mpt_sample_weights(weighted, weights));
        CHECK_OK(ctx, mpt_train_step(weighted, b->x, target));
        CHECK_OK(ctx, mpt_train_step(copied, copies->x, other));
        CHECK_NEAR(mpt_loss(weighted), mpt_loss(copied), reordered * test_unit(MPT_F32) * mpt_loss(copied));
        CHECK_OK(ctx, mpt_sample_weights(weighted, weights));
        CHECK_OK(ctx, mpt_evaluate(weighted, b->x, target, 4, &m));
        CHECK_OK(ctx, mpt_evaluate(copied, copies->x, other, 4, &n));
        CHECK_NEAR(m.loss, n.loss, reordered * test_unit(MPT_F32) * n.loss);
        CHECK_EQUAL((double)m.samples, 4 * labels);
    }
    check_params_near(ctx, weighted, copied, start, reordered);
    mpt_model_free(weighted), mpt_model_free(copied), mpt_model_free(start);
    free(b), free(copies);
}

/* A step is defined by its samples: 1 x 8 is 4 x 2 and, to the bit, its parts; those of the last of an epoch, too. The
   steps have other weights each, one of them none at all. On CUDA mpt_train_step is recorded and the parts are not. */
static void test_splits(mpt_context *ctx, mpt_policy policy, int per_position) {
    mpt_loss_desc desc = MPT_ZERO;
    mpt_model *once, *four, *parts, *start;
    const int labels = per_position ? SIDE * SIDE : 1;
    int step, pass;
    desc.per_position = per_position, desc.weighted = 1;
    once = small_net(ctx, policy, MPT_LOSS_CROSS_ENTROPY, &desc, 8, 1);
    four = small_net(ctx, policy, MPT_LOSS_CROSS_ENTROPY, &desc, 2, 4);
    parts = small_net(ctx, policy, MPT_LOSS_CROSS_ENTROPY, &desc, 2, 4);
    start = small_net(ctx, policy, MPT_LOSS_CROSS_ENTROPY, &desc, 2, 4);
    for (step = 0; step < 7; step++) {
        batch *b = batch_new((uint64_t)step);
        const int samples = step == 5 ? 5 : 8, given = step != 3;
        if (given) CHECK_OK(ctx, mpt_sample_weights(once, b->weight));
        if (given) CHECK_OK(ctx, mpt_sample_weights(four, b->weight));
        CHECK_OK(ctx, mpt_train_samples(once, b->x, b->label, (size_t)samples));
        CHECK_OK(ctx, mpt_train_samples(four, b->x, b->label, (size_t)samples));
        for (pass = 0; 2 * pass < samples; pass++) {
            const int rows = samples - 2 * pass < 2 ? 1 : 2;
            if (given) CHECK_OK(ctx, mpt_sample_weights(parts, b->weight + 2 * pass));
            CHECK_OK(ctx, mpt_forward(parts, b->x + 2 * pass * PIXELS, b->label + 2 * pass * labels, (size_t)rows));
            CHECK_OK(ctx, mpt_backward(parts));
        }
        CHECK_OK(ctx, mpt_unscale(mpt_model_optimizer(parts)));
        CHECK_OK(ctx, mpt_step(mpt_model_optimizer(parts)));
        CHECK_OK(ctx, mpt_scaler_update(mpt_model_scaler(parts)));
        CHECK(test_same_weights(ctx, four, parts));
        CHECK_EQUAL(mpt_loss(four), mpt_loss(parts));
        free(b);
    }
    CHECK_EQUAL((double)mpt_steps_applied(four), 7);
    if (policy.compute == MPT_F32) check_params_near(ctx, once, four, start, 7 * 10 * reordered);
    mpt_model_free(once), mpt_model_free(four), mpt_model_free(parts), mpt_model_free(start);
}

/* An image of positions is as many samples of one pixel, for a net of 1x1 convolutions. */
static void test_positions(mpt_context *ctx, mpt_loss_kind kind) {
    static const float weights[CLASSES] = {0.5f, 2, 0.25f, 1, 1.5f};
    enum { N = 3, ROWS = N * SIDE * SIDE };
    mpt_loss_desc desc = MPT_ZERO;
    mpt_train_desc train = MPT_ZERO;
    mpt_model *net[3]; /* an image; pixels; as it was */
    batch *b = batch_new(4);
    const int entropy = kind == MPT_LOSS_CROSS_ENTROPY;
    const void *target = entropy ? (const void *)b->label : (const void *)b->target;
    mpt_metrics m[2];
    int i, step;
    if (entropy) desc.class_weights = weights, desc.ignore = 1, desc.ignore_index = 3;
    else desc.pos_weight = weights;
    train.optimizer = mpt_sgd(0.1, 0), train.seed = 9;
    for (i = 0; i < 3; i++) {
        const int side = i ? 1 : SIDE;
        int h;
        net[i] = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F32));
        desc.per_position = i == 0;
        train.batch = i ? ROWS : N;
        h = mpt_tanh(net[i], mpt_conv2d(net[i], mpt_input(net[i], side, side, CHANNELS), 6, 1, NULL));
        add_loss(net[i], mpt_conv2d(net[i], h, CLASSES, 1, NULL), kind, &desc);
        CHECK_OK(ctx, mpt_model_build(net[i], &train));
    }
    for (step = 0; step < 3; step++) {
        for (i = 0; i < 2; i++) {
            CHECK_OK(ctx, mpt_train_step(net[i], b->x, target));
            CHECK_OK(ctx, mpt_evaluate(net[i], b->x, target, i ? ROWS : N, &m[i]));
        }
        CHECK_NEAR(m[0].loss, m[1].loss, reordered * test_unit(MPT_F32) * m[1].loss);
        CHECK_NEAR(mpt_loss(net[0]), mpt_loss(net[1]), reordered * test_unit(MPT_F32) * mpt_loss(net[1]));
        CHECK(m[0].samples == m[1].samples && m[0].correct == m[1].correct && m[0].samples <= ROWS);
    }
    check_params_near(ctx, net[0], net[1], net[2], reordered);
    for (i = 0; i < 3; i++) mpt_model_free(net[i]);
    free(b);
}

/* Probabilities of 1 and 0 are labels, to the bit; else `correct` asks for the first of the largest. */
static void test_probabilities(mpt_context *ctx, mpt_policy policy) {
    mpt_loss_desc soft = MPT_ZERO, hard = MPT_ZERO;
    batch *b = batch_new(7);
    float logits[MOST * CLASSES];
    mpt_model *a, *c;
    mpt_metrics m, n;
    uint64_t correct = 0;
    int i, j, step;
    soft.probabilities = 1;
    a = small_net(ctx, policy, MPT_LOSS_CROSS_ENTROPY, &soft, MOST, 1);
    c = small_net(ctx, policy, MPT_LOSS_CROSS_ENTROPY, &hard, MOST, 1);
    memset(b->target, 0, sizeof b->target);
    for (i = 0; i < MOST; i++) b->target[i * CLASSES + b->label[i]] = 1;
    for (step = 0; step < 3; step++) {
        CHECK_OK(ctx, mpt_train_step(a, b->x, b->target));
        CHECK_OK(ctx, mpt_train_step(c, b->x, b->label));
        CHECK_EQUAL(mpt_loss(a), mpt_loss(c));
        CHECK(test_same_weights(ctx, a, c));
        CHECK_OK(ctx, mpt_evaluate(a, b->x, b->target, MOST, &m));
        CHECK_OK(ctx, mpt_evaluate(c, b->x, b->label, MOST, &n));
        CHECK(m.correct == n.correct && m.samples == n.samples);
        CHECK_EQUAL(m.loss, n.loss);
    }
    CHECK_OK(ctx, mpt_predict(a, b->x, MOST, logits));
    for (i = 0; i < MOST; i++) { /* two largest, alike: only the first is right */
        int best = 0;
        for (j = 1; j < CLASSES; j++) best = logits[i * CLASSES + j] > logits[i * CLASSES + best] ? j : best;
        for (j = 0; j < CLASSES; j++) b->target[i * CLASSES + j] = 0.25f;
        b->target[i * CLASSES + best] = b->target[i * CLASSES + (best + i % 3) % CLASSES] = 0.5f;
        correct += best <= (best + i % 3) % CLASSES;
    }
    CHECK_OK(ctx, mpt_evaluate(a, b->x, b->target, MOST, &m));
    CHECK(m.correct == correct && m.samples == MOST && correct > 0);
    mpt_model_free(a), mpt_model_free(c);
    free(b);
}

/* ==== WHAT IS REFUSED ==== */

static void test_targets(mpt_context *ctx) {
    mpt_loss_desc soft = MPT_ZERO, image = MPT_ZERO;
    batch *b = batch_new(2);
    const uint32_t bad[] = {0x7fc00000u, 0x7f800000u, 0xbdcccccdu, 3}; /* NaN, inf, -0.1, the integer 3 */
    mpt_metrics m;
    mpt_model *net;
    size_t count, i;
    float *before, *after;
    soft.probabilities = 1;
    net = small_net(ctx, mpt_policy_preset(MPT_O0, MPT_F32), MPT_LOSS_CROSS_ENTROPY, &soft, 2, 1);
    before = test_params(ctx, net, &count);
    b->target[3] = 1.0000002f; /* of mixing two labels of one class */
    CHECK_OK(ctx, mpt_evaluate(net, b->x, b->target, 2, &m));
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        b->target[CLASSES + 3] = test_float(bad[i]);
        CHECK_ERROR(ctx, mpt_train_step(net, b->x, b->target), MPT_ERROR_VALUE, "target 3 of sample 1");
        CHECK_ERROR(ctx, mpt_evaluate(net, b->x, b->target, 2, &m), MPT_ERROR_VALUE, "cross_entropy1");
    }
    after = test_params(ctx, net, &count);
    CHECK(memcmp(before, after, count * sizeof *before) == 0);
    CHECK_EQUAL((double)(mpt_steps_applied(net) + mpt_steps_skipped(net)), 0);
    mpt_model_free(net);
    image.per_position = 1;
    net = small_net(ctx, mpt_policy_preset(MPT_O0, MPT_F32), MPT_LOSS_CROSS_ENTROPY, &image, 2, 1);
    b->label[SIDE * SIDE + 6] = CLASSES;
    CHECK_ERROR(ctx, mpt_train_step(net, b->x, b->label), MPT_ERROR_VALUE, "label 5 of sample 1, position 6");
    CHECK_EQUAL((double)mpt_model_outputs(net), SIDE * SIDE * CLASSES);
    mpt_model_free(net);
    free(before), free(after), free(b);
}

static void test_weights(mpt_context *ctx) {
    const uint32_t bad[] = {0x7fc00000u, 0x7f800000u, 0xbf800000u};
    mpt_loss_desc desc = MPT_ZERO;
    batch *b = batch_new(3);
    const int32_t kept = b->label[1];
    mpt_metrics with, without, m;
    mpt_model *net = small_net(ctx, mpt_policy_preset(MPT_O0, MPT_F32), MPT_LOSS_CROSS_ENTROPY, &desc, 4, 1);
    size_t i;
    CHECK_ERROR(ctx, mpt_sample_weights(net, b->weight), MPT_ERROR_ORDER, "weighted");
    mpt_model_free(net);
    net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F32));
    CHECK_ERROR(ctx, mpt_sample_weights(net, b->weight), MPT_ERROR_ORDER, "built");
    CHECK(mpt_sample_weights(NULL, b->weight) == MPT_ERROR_ARGUMENT);
    mpt_model_free(net);
    desc.weighted = 1;
    net = small_net(ctx, mpt_policy_preset(MPT_O0, MPT_F32), MPT_LOSS_CROSS_ENTROPY, &desc, 4, 1);
    CHECK_OK(ctx, mpt_evaluate(net, b->x, b->label, 7, &without));
    CHECK_OK(ctx, mpt_sample_weights(net, b->weight));
    CHECK_OK(ctx, mpt_evaluate(net, b->x, b->label, 7, &with));
    CHECK(fabs(with.loss - without.loss) > 1e-3 * without.loss);
    CHECK_OK(ctx, mpt_evaluate(net, b->x, b->label, 7, &m)); /* they are used up */
    CHECK_EQUAL(m.loss, without.loss);
    CHECK_OK(ctx, mpt_sample_weights(net, b->weight));
    CHECK_OK(ctx, mpt_sample_weights(net, NULL));
    CHECK_OK(ctx, mpt_evaluate(net, b->x, b->label, 7, &m));
    CHECK_EQUAL(m.loss, without.loss);
    CHECK_OK(ctx, mpt_sample_weights(net, b->weight)); /* by a call that fails, too */
    b->label[1] = CLASSES;
    CHECK_ERROR(ctx, mpt_train_step(net, b->x, b->label), MPT_ERROR_VALUE, "label 5");
    b->label[1] = kept;
    CHECK_OK(ctx, mpt_evaluate(net, b->x, b->label, 7, &m));
    CHECK_EQUAL(m.loss, without.loss);
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        b->weight[2] = test_float(bad[i]);
        CHECK_OK(ctx, mpt_sample_weights(net, b->weight));
        CHECK_ERROR(ctx, mpt_train_step(net, b->x, b->label), MPT_ERROR_VALUE, "the weight of sample 2");
        CHECK_OK(ctx, mpt_sample_weights(net, b->weight));
        CHECK_ERROR(ctx, mpt_forward(net, b->x, b->label, 4), MPT_ERROR_VALUE, "cross_entropy1");
        CHECK_OK(ctx, mpt_sample_weights(net, b->weight));
        CHECK_ERROR(ctx, mpt_evaluate(net, b->x, b->label, 7, &m), MPT_ERROR_VALUE, "the weight of sample 2");
    }
    CHECK_EQUAL((double)(mpt_steps_applied(net) + mpt_steps_skipped(net)), 0);
    mpt_model_free(net);
    free(b);
}

/* Where all samples weigh 0 the step changes nothing. */
static void test_empty(mpt_context *ctx, mpt_policy policy) {
    static const float none[4] = {0, 0, 0, 0};
    mpt_loss_desc desc = MPT_ZERO;
    batch *b = batch_new(3);
    mpt_optimizer_state state;
    mpt_metrics m;
    mpt_model *net, *other;
    int step;
    desc.weighted = 1;
    net = small_net(ctx, policy, MPT_LOSS_SQUARED_ERROR, &desc, 4, 1);
    other = small_net(ctx, policy, MPT_LOSS_SQUARED_ERROR, &desc, 4, 1);
    for (step = 0; step < 4; step++) {
        CHECK_OK(ctx, mpt_sample_weights(net, b->weight));
        CHECK_OK(ctx, mpt_train_step(net, b->x, b->target));
        CHECK_OK(ctx, mpt_sample_weights(other, b->weight));
        CHECK_OK(ctx, mpt_train_step(other, b->x, b->target));
        CHECK_OK(ctx, mpt_sample_weights(net, none));
        CHECK_OK(ctx, mpt_train_step(net, b->x, b->target));
        CHECK_OK(ctx, mpt_optimizer_get_state(mpt_model_optimizer(net), &state));
        CHECK_EQUAL(state.found, MPT_SKIP_EMPTY);
        CHECK_EQUAL(mpt_loss(net), 0);
        CHECK(test_same_weights(ctx, net, other));
    }
    CHECK_OK(ctx, mpt_sample_weights(net, none));
    CHECK_OK(ctx, mpt_evaluate(net, b->x, b->target, 4, &m));
    CHECK_EQUAL(m.loss, 0);
    mpt_model_free(net), mpt_model_free(other);
    free(b);
}

/* A step allocates nothing, and the ledger has the weights: 4 bytes a sample of the batch. */
static void test_memory_of(void) {
    mpt_loss_desc desc = MPT_ZERO;
    batch *b = batch_new(3);
    test_counter counter;
    mpt_context_desc counting = test_counting(&counter, 1);
    mpt_context *ctx = test_open(&counting);
    mpt_model *net, *plain;
    mpt_metrics m;
    long calls;
    int step;
    desc.per_position = 1;
    plain = small_net(ctx, mpt_policy_preset(MPT_O0, MPT_F32), MPT_LOSS_CROSS_ENTROPY, &desc, 4, 1);
    desc.weighted = 1;
    net = small_net(ctx, mpt_policy_preset(MPT_O0, MPT_F32), MPT_LOSS_CROSS_ENTROPY, &desc, 4, 1);
    CHECK_EQUAL((double)mpt_model_memory(net).workspace, (double)mpt_model_memory(plain).workspace + 16);
    for (step = 0; step < 4; step++) {
        calls = counter.calls;
        CHECK_OK(ctx, mpt_sample_weights(net, b->weight));
        CHECK_OK(ctx, mpt_train_step(net, b->x, b->label));
        CHECK_OK(ctx, mpt_sample_weights(net, b->weight));
        CHECK_OK(ctx, mpt_evaluate(net, b->x, b->label, 5, &m));
        CHECK(counter.calls == calls || step == 0);
    }
    mpt_model_free(net), mpt_model_free(plain);
    mpt_close(ctx);
    CHECK(test_counter_clean(&counter));
    free(b);
}

/* Many positions fall into parts that threads share: the same bits on any number of them. */
static void test_threads(void) {
    enum { BIG = 96, BATCH = 8 };
    mpt_loss_desc desc = MPT_ZERO;
    float *x = (float *)test_memory(BATCH * BIG * BIG * sizeof *x);
    int32_t *label = (int32_t *)test_memory(BATCH * BIG * BIG * sizeof *label);
    float *params[3];
    double loss[3];
    size_t count = 0, i;
    int threads;
    test_floats(x, BATCH * BIG * BIG, -1, 1, 1);
    for (i = 0; i < BATCH * BIG * BIG; i++) label[i] = (int32_t)(mpt_hash(1, 2, 3, i) % CLASSES);
    desc.per_position = 1;
    for (threads = 1; threads <= 3; threads++) {
        mpt_context *ctx = test_open_threads(threads);
        mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F32));
        mpt_train_desc train = MPT_ZERO;
        train.batch = BATCH;
        mpt_softmax_cross_entropy(net, mpt_conv2d(net, mpt_input(net, BIG, BIG, 1), CLASSES, 1, NULL), &desc);
        CHECK_OK(ctx, mpt_model_build(net, &train));
        CHECK_OK(ctx, mpt_train_step(net, x, label));
        loss[threads - 1] = mpt_loss(net);
        params[threads - 1] = test_params(ctx, net, &count);
        mpt_model_free(net);
        mpt_close(ctx);
    }
    for (threads = 1; threads < 3; threads++) {
        CHECK_EQUAL(loss[threads], loss[0]);
        CHECK(memcmp(params[threads], params[0], count * sizeof **params) == 0);
    }
    for (threads = 0; threads < 3; threads++) free(params[threads]);
    free(x), free(label);
}

int main(int argc, char **argv) {
    mpt_context *ctx = test_open(NULL);
    const mpt_policy f32 = mpt_policy_preset(MPT_O0, MPT_F32), f16 = mpt_policy_preset(MPT_O2, MPT_F16);
    int image;
    test_begin(argc, argv);
    RUN_TEST(test_torch(ctx, "op_bce_pos_weight", MPT_LOSS_BCE_WITH_LOGITS));
    RUN_TEST(test_torch(ctx, "op_huber_delta", MPT_LOSS_HUBER));
    RUN_TEST(test_torch(ctx, "op_cross_entropy_soft", MPT_LOSS_CROSS_ENTROPY));
    RUN_TEST(test_torch(ctx, "op_cross_entropy_soft_all", MPT_LOSS_CROSS_ENTROPY));
    RUN_TEST(test_torch(ctx, "op_cross_entropy_soft_weighted", MPT_LOSS_CROSS_ENTROPY));
    RUN_TEST(test_torch(ctx, "op_cross_entropy_soft_positions", MPT_LOSS_CROSS_ENTROPY));
    RUN_TEST(test_torch(ctx, "op_cross_entropy_positions", MPT_LOSS_CROSS_ENTROPY));
    RUN_TEST(test_torch(ctx, "op_cross_entropy_positions_weighted", MPT_LOSS_CROSS_ENTROPY));
    RUN_TEST(test_torch(ctx, "op_cross_entropy_sample_weights", MPT_LOSS_CROSS_ENTROPY));
    RUN_TEST(test_torch(ctx, "op_mse_sample_weights", MPT_LOSS_SQUARED_ERROR));
    RUN_TEST(test_torch(ctx, "op_bce_sample_weights", MPT_LOSS_BCE_WITH_LOGITS));
    RUN_TEST(test_torch(ctx, "op_huber_sample_weights", MPT_LOSS_HUBER));
    for (image = 0; image < 2; image++) {
        RUN_TEST(test_meaning(ctx, MPT_LOSS_CROSS_ENTROPY, image));
        RUN_TEST(test_splits(ctx, f32, image));
        RUN_TEST(test_splits(ctx, f16, image));
    }
    RUN_TEST(test_meaning(ctx, MPT_LOSS_HUBER, 0));
    RUN_TEST(test_positions(ctx, MPT_LOSS_CROSS_ENTROPY));
    RUN_TEST(test_positions(ctx, MPT_LOSS_BCE_WITH_LOGITS));
    RUN_TEST(test_probabilities(ctx, f32));
    RUN_TEST(test_probabilities(ctx, f16));
    RUN_TEST(test_targets(ctx));
    RUN_TEST(test_weights(ctx));
    RUN_TEST(test_empty(ctx, f32));
    RUN_TEST(test_empty(ctx, f16));
    RUN_TEST(test_memory_of());
    RUN_TEST(test_threads());
    mpt_close(ctx);
    return test_finish("losses");
}
