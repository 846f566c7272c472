/* digits.c - trains for a few seconds on examples/data/digits, from the repository's root, in fp32, bf16 and fp16.

   Shows that mixed precision learns what fp32 learns, that a dynamic loss scale finds its way from anywhere, and, on
   gradients too small for fp16, why there is a loss scale. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"

enum { PIXELS = 64, CLASSES = 10, BATCH = 32 };

/* ==== DATA ==== */

typedef struct digits { /* pixels in 0..1 */
    float *x;
    int32_t *label;
    size_t count;
} digits;

static const char *const image_path = "examples/data/digits/images.idx3-ubyte";
static const char *const label_path = "examples/data/digits/labels.idx1-ubyte";

/* The bytes after an IDX header of `dimensions` big-endian sizes, of which the first is *count. NULL: no such file. */
static unsigned char *read_idx(const char *path, size_t dimensions, size_t each, size_t *count) {
    unsigned char header[16] = {0}, *bytes = NULL;
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    if (fread(header, 1, 4 + 4 * dimensions, file) == 4 + 4 * dimensions && header[3] == dimensions) {
        *count = (size_t)header[4] << 24 | (size_t)header[5] << 16 | (size_t)header[6] << 8 | header[7];
        bytes = (unsigned char *)test_memory(*count * each);
        CHECK(fread(bytes, each, *count, file) == *count);
    }
    fclose(file);
    return bytes;
}

/* Those with index mod 5 = 4 if `test`, else the others. */
static digits part(const unsigned char *images, const unsigned char *labels, size_t count, int test) {
    digits d = MPT_ZERO;
    size_t i, j;
    d.x = (float *)test_memory(count * PIXELS * sizeof *d.x);
    d.label = (int32_t *)test_memory(count * sizeof *d.label);
    for (i = 0; i < count; i++) {
        if ((i % 5 == 4) != test) continue;
        for (j = 0; j < PIXELS; j++) d.x[d.count * PIXELS + j] = (float)images[i * PIXELS + j] / 16;
        d.label[d.count++] = labels[i];
    }
    return d;
}

static void free_digits(digits *d) { free(d->x), free(d->label); }

/* ==== TRAINING ==== */

static mpt_model *build(mpt_context *ctx, int cnn, mpt_policy policy, const mpt_train_desc *train) {
    mpt_model *net = mpt_model_new(ctx, policy);
    int h = mpt_input(net, 8, 8, 1);
    if (cnn) {
        h = mpt_relu(net, test_same(net, h, 8, 3));
        h = mpt_max_pool2d(net, h, 2, NULL);
        h = mpt_relu(net, test_same(net, h, 16, 3));
    } else {
        h = mpt_relu(net, mpt_linear(net, h, 64, NULL));
    }
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
    if (!CHECK_OK(ctx, mpt_model_build(net, train))) exit(test_finish("digits"));
    return net;
}

/* Steps over the data in an order that changes with every epoch. */
static void run_epoch(mpt_context *ctx, mpt_model *net, const digits *d, uint64_t epoch) {
    float x[BATCH * PIXELS];
    int32_t label[BATCH];
    size_t i, j;
    for (i = 0; i + BATCH <= d->count; i += BATCH) {
        for (j = 0; j < BATCH; j++) {
            const size_t k = mpt_hash(1, epoch, 0, i + j) % d->count;
            memcpy(x + j * PIXELS, d->x + k * PIXELS, PIXELS * sizeof *x);
            label[j] = d->label[k];
        }
        CHECK_OK(ctx, mpt_train_step(net, x, label));
    }
}

static mpt_metrics evaluate(mpt_context *ctx, mpt_model *net, const digits *d) {
    mpt_metrics m = MPT_ZERO;
    CHECK_OK(ctx, mpt_evaluate(net, d->x, d->label, d->count, &m));
    return m;
}

/* A few epochs: the loss on the training digits falls to a third, and over 90 % of unseen digits are right. Guessing
   gives 10 %. Returns the accuracy. */
static double learn(mpt_context *ctx, const char *name, int cnn, mpt_policy policy, const mpt_train_desc *train,
                    const digits *seen, const digits *unseen) {
    mpt_model *net = build(ctx, cnn, policy, train);
    const double before = evaluate(ctx, net, seen).loss;
    mpt_metrics after;
    uint64_t epoch;
    for (epoch = 0; epoch < 8; epoch++) run_epoch(ctx, net, seen, epoch);
    CHECK(evaluate(ctx, net, seen).loss < before / 3);
    after = evaluate(ctx, net, unseen);
    CHECK(after.accuracy > 0.9);
    printf("%-4s %-22s accuracy %.4f, scale %g, skipped %d\n", cnn ? "cnn" : "mlp", name, after.accuracy,
           (double)mpt_loss_scale(net), (int)mpt_steps_skipped(net));
    mpt_model_free(net);
    return after.accuracy;
}

/* 359 unseen digits: two runs that are equally good differ by up to 3 deviations of their difference, each at most
   sqrt(0.05 * 0.95 / 359) = 1.2 % at 95 % accuracy: 5 %. */
static void test_policies(mpt_context *ctx, int cnn, const digits *seen, const digits *unseen) {
    static const char *const names[2][2] = {{"O1 fp16", "O1 bf16"}, {"O2 fp16", "O2 bf16"}};
    mpt_train_desc train = MPT_ZERO;
    double fp32;
    int level, type;
    train.batch = BATCH, train.optimizer = mpt_adam(2e-3), train.seed = 1;
    fp32 = learn(ctx, "O0", cnn, mpt_policy_preset(MPT_O0, MPT_F32), &train, seen, unseen);
    for (level = 0; level < 2; level++)
        for (type = 0; type < 2; type++) {
            const mpt_policy policy = mpt_policy_preset(level ? MPT_O2 : MPT_O1, type ? MPT_BF16 : MPT_F16);
            CHECK_NEAR(learn(ctx, names[level][type], cnn, policy, &train, seen, unseen), fp32, 0.05);
        }
}

/* From a scale at which every gradient overflows: the steps are skipped until it fits. 2^40 / 32 samples must come down
   to under fp16's 65504 / (largest gradient of a logit, about 1 / 32): 2^21 or so, at least 15 halvings. */
static void test_huge_scale(mpt_context *ctx, const digits *seen, const digits *unseen) {
    const mpt_policy policy = mpt_policy_preset(MPT_O2, MPT_F16);
    mpt_train_desc train = MPT_ZERO;
    mpt_model *net;
    train.batch = BATCH, train.optimizer = mpt_adam(2e-3), train.seed = 1;
    train.scaler.init_scale = (float)ldexp(1, 40);
    train.scaler.max_scale = (float)ldexp(1, 40);
    learn(ctx, "O2 fp16 from 2^40", 0, policy, &train, seen, unseen);
    net = build(ctx, 0, policy, &train);
    run_epoch(ctx, net, seen, 0);
    CHECK(mpt_steps_skipped(net) >= 15 && mpt_steps_applied(net) > 0);
    CHECK(mpt_loss_scale(net) < (float)ldexp(1, 26));
    mpt_model_free(net);
}

/* ==== WHY THERE IS A LOSS SCALE ==== */

/* Squared error against targets of 1e-6 from a layer that starts at zero: the gradient of an output is at most
   2 * 1e-6 / (10 outputs * 32 samples), 6e-9, and fp16 rounds all under 3e-8 to zero. Inputs are small, so that the
   weights, about 1e-4, are not. */
static double tiny_targets(mpt_context *ctx, mpt_level level, mpt_dtype type, mpt_scaler_mode mode, const digits *seen,
                           int *moved) {
    mpt_linear_desc zero = MPT_ZERO;
    mpt_train_desc train = MPT_ZERO;
    mpt_metrics first = MPT_ZERO, last = MPT_ZERO;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(level, type));
    float *target = (float *)test_memory(seen->count * CLASSES * sizeof *target), *weight;
    float *x = (float *)test_memory(seen->count * PIXELS * sizeof *x);
    size_t i, count, at = 0;
    int step;
    for (i = 0; i < seen->count; i++) target[i * CLASSES + (size_t)seen->label[i]] = 1e-6f;
    for (i = 0; i < seen->count * PIXELS; i++) x[i] = seen->x[i] / 256;
    zero.init = MPT_INIT_ZERO, zero.no_bias = 1;
    mpt_mse(net, mpt_linear(net, mpt_input(net, 8, 8, 1), CLASSES, &zero), NULL);
    train.batch = BATCH, train.optimizer = mpt_sgd(20000, 0.9), train.scaler.mode = mode;
    train.scaler.init_scale = 16777216;
    CHECK_OK(ctx, mpt_model_build(net, &train));
    CHECK_OK(ctx, mpt_evaluate(net, x, target, seen->count, &first));
    for (step = 0; step < 400; step++) {
        CHECK_OK(ctx, mpt_train_step(net, x + at * PIXELS, target + at * CLASSES));
        at = (at + BATCH) % (seen->count - BATCH);
    }
    CHECK_OK(ctx, mpt_evaluate(net, x, target, seen->count, &last));
    count = mpt_params_count(mpt_model_params(net), 0);
    weight = (float *)test_memory(count * sizeof *weight);
    CHECK_OK(ctx, mpt_params_get(mpt_model_params(net), 0, weight));
    for (*moved = 0, i = 0; i < count; i++) *moved |= test_bits(weight[i]) << 1 != 0;
    free(weight), free(target), free(x);
    mpt_model_free(net);
    return last.loss / first.loss;
}

static void test_why_scale(mpt_context *ctx, const digits *seen) {
    int moved;
    double fp32, fp16;
    fp32 = tiny_targets(ctx, MPT_O0, MPT_F32, MPT_SCALER_OFF, seen, &moved);
    CHECK(moved && fp32 < 0.6);
    CHECK_NEAR(tiny_targets(ctx, MPT_O2, MPT_F16, MPT_SCALER_OFF, seen, &moved), 1, 0);
    CHECK(!moved); /* not one weight, in 400 steps */
    fp16 = tiny_targets(ctx, MPT_O2, MPT_F16, MPT_SCALER_DYNAMIC, seen, &moved);
    CHECK(moved && fp16 < 0.6);
    printf("tiny gradients: loss falls to %.2f in fp32, 1 in fp16, %.2f in fp16 with a loss scale\n", fp32, fp16);
}

int main(int argc, char **argv) {
    mpt_context *ctx = test_open(NULL);
    size_t images = 0, labels = 0;
    test_begin(argc, argv);
    unsigned char *image = read_idx(image_path, 3, PIXELS, &images), *label = read_idx(label_path, 1, 1, &labels);
    if (image && label && CHECK_EQUAL(images, labels)) {
        digits seen = part(image, label, images, 0), unseen = part(image, label, images, 1);
        RUN_TEST(test_policies(ctx, 0, &seen, &unseen));
        RUN_TEST(test_policies(ctx, 1, &seen, &unseen));
        RUN_TEST(test_huge_scale(ctx, &seen, &unseen));
        RUN_TEST(test_why_scale(ctx, &seen));
        free_digits(&seen), free_digits(&unseen);
    } else {
        printf("skipped: cannot read %s and %s\n", image_path, label_path);
        test_counts.skipped++;
    }
    free(image), free(label);
    mpt_close(ctx);
    return test_finish("digits");
}
