/* resnet18.c - fine-tuning: a state_dict with torchvision's names loads into the net of examples/resnet18.h, predicts
   PyTorch's logits, and with the stem and three stages frozen takes PyTorch's steps. make_golden_resnet.py has written
   them, and says how both sides draw weights and samples; run from the top of the repository. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../../examples/resnet18.h"
#include "../check.h"
#include "golden.h"
#include "curve.h"

enum { TENSORS = 128, SHOWN = 2 /* samples whose logits are compared */ };

typedef struct sizes {
    uint64_t seed;
    size_t batch, pixels, classes;
    int side;
    resnet18_desc net;
} sizes;

static sizes sizes_of(const golden *g) {
    sizes s;
    s.seed = (uint64_t)golden_number(g, "seed");
    s.batch = (size_t)golden_number(g, "batch");
    s.side = (int)golden_number(g, "side");
    s.pixels = (size_t)s.side * (size_t)s.side * 3;
    s.net.width = (int)golden_number(g, "width");
    s.net.classes = (int)golden_number(g, "classes");
    s.net.frozen = (int)golden_number(g, "frozen");
    s.classes = (size_t)s.net.classes;
    return s;
}

/* ==== THE STATE_DICT ==== */

typedef struct tensor {
    char name[64];
    size_t dims, shape[4], count, fan_in; /* dims 0: num_batches_tracked */
} tensor;

typedef struct state_dict {
    tensor tensors[TENSORS];
    size_t count;
} state_dict;

static void add_tensor(state_dict *d, const char *layer, const char *suffix, size_t dims, size_t K, size_t C,
                       size_t kernel) {
    tensor *t = &d->tensors[d->count++];
    snprintf(t->name, sizeof t->name, "%s.%s", layer, suffix);
    t->dims = dims;
    t->shape[0] = K;
    t->shape[1] = C;
    t->shape[2] = t->shape[3] = kernel;
    t->fan_in = C * kernel * kernel;
    t->count = dims ? K : 1;
    if (dims > 1) t->count *= t->fan_in;
}

static void add_conv_norm(state_dict *d, const char *place, const char *conv, const char *norm, size_t K, size_t C,
                          size_t kernel) {
    static const char *const suffixes[] = {"weight", "bias", "running_mean", "running_var"};
    char layer[32];
    int i;
    snprintf(layer, sizeof layer, "%s%s", place, conv);
    add_tensor(d, layer, "weight", 4, K, C, kernel);
    snprintf(layer, sizeof layer, "%s%s", place, norm);
    for (i = 0; i < 4; i++) add_tensor(d, layer, suffixes[i], 1, K, 1, 1);
    add_tensor(d, layer, "num_batches_tracked", 0, 1, 1, 1);
}

static state_dict *state_dict_new(const sizes *s) {
    state_dict *d = (state_dict *)test_memory(sizeof *d);
    size_t C = (size_t)s->net.width;
    int stage, block;
    d->count = 0;
    add_conv_norm(d, "", "conv1", "bn1", C, 3, 7);
    for (stage = 1; stage <= 4; stage++)
        for (block = 0; block < 2; block++) {
            const size_t K = (size_t)s->net.width << (stage - 1);
            char place[16];
            snprintf(place, sizeof place, "layer%d.%d.", stage, block);
            add_conv_norm(d, place, "conv1", "bn1", K, C, 3);
            add_conv_norm(d, place, "conv2", "bn2", K, K, 3);
            if (C != K) add_conv_norm(d, place, "downsample.0", "downsample.1", K, C, 1);
            C = K;
        }
    add_tensor(d, "fc", "weight", 2, s->classes, C, 1);
    add_tensor(d, "fc", "bias", 1, s->classes, 1, 1);
    return d;
}

/* Element i of tensor number t, as PyTorch stores it */
static float drawn(const sizes *s, const tensor *t, size_t number, size_t i) {
    const double u = (double)mpt_uniform(s->seed, 0, number, i);
    const int norm = t->dims == 1 && (strstr(t->name, ".weight") || strstr(t->name, "running_var"));
    if (t->dims > 1) return (float)((2 * u - 1) * sqrt(6 / (double)t->fan_in));
    return (float)(norm ? u + 0.5 : (2 * u - 1) / 10);
}

/* Text goes behind *at. */
static void say(char **at, const char *format, const char *name, size_t a, size_t b) {
    *at += snprintf(*at, 128, format, name, (unsigned long)a, (unsigned long)b);
}

static size_t header_text(const state_dict *d, char *out) {
    size_t begin = 0, t, i;
    char *at = out;
    for (t = 0; t < d->count; t++) {
        const tensor *x = &d->tensors[t];
        const size_t end = begin + x->count * (x->dims ? sizeof(float) : 8);
        say(&at, t ? ",\"%s\":{" : "{\"%s\":{", x->name, 0, 0);
        say(&at, "\"dtype\":\"%s\",\"shape\":[", x->dims ? "F32" : "I64", 0, 0);
        for (i = 0; i < x->dims; i++) say(&at, i ? "%s,%lu" : "%s%lu", "", x->shape[i], 0);
        say(&at, "]%s,\"data_offsets\":[%lu,%lu]}", "", begin, end);
        begin = end;
    }
    say(&at, "%s}", "", 0, 0);
    return (size_t)(at - out);
}

/* The file that safetensors.torch.save_file writes of it. Free it. */
static unsigned char *file_of(const sizes *s, size_t *size) {
    state_dict *d = state_dict_new(s);
    char *header = (char *)test_memory(d->count * 160);
    const size_t length = header_text(d, header);
    unsigned char *file, *at;
    size_t t, i;
    for (*size = 8 + length, t = 0; t < d->count; t++) *size += d->tensors[t].count * (d->tensors[t].dims ? 4 : 8);
    file = (unsigned char *)test_memory(*size);
    for (i = 0; i < 8; i++) file[i] = (unsigned char)(length >> 8 * i & 255);
    memcpy(file + 8, header, length);
    at = file + 8 + length;
    for (t = 0; t < d->count; t++)
        for (i = 0; i < d->tensors[t].count; i++) {
            const uint64_t bits = d->tensors[t].dims ? test_bits(drawn(s, &d->tensors[t], t, i)) : 0;
            int byte;
            for (byte = 0; byte < (d->tensors[t].dims ? 4 : 8); byte++) *at++ = (unsigned char)(bits >> 8 * byte & 255);
        }
    free(header);
    free(d);
    return file;
}

static void draw_batch(const sizes *s, uint64_t step, float *x, int32_t *labels) {
    size_t i;
    for (i = 0; i < s->batch * s->pixels; i++) x[i] = 2 * mpt_uniform(s->seed, step, 1001, i) - 1;
    for (i = 0; i < s->batch; i++) labels[i] = (int32_t)(mpt_hash(s->seed, step, 1002, i) % s->classes);
}

/* ==== THE NET ==== */

static mpt_model *build(mpt_context *ctx, const sizes *s, mpt_policy policy, const mpt_train_desc *train,
                        const unsigned char *file, size_t size) {
    mpt_model *net = mpt_model_new(ctx, policy);
    mpt_softmax_cross_entropy(net, resnet18(net, mpt_input(net, s->side, s->side, 3), &s->net), NULL);
    CHECK_OK(ctx, mpt_model_build(net, train));
    CHECK_OK(ctx, mpt_weights_load_memory(net, file, size, NULL));
    return net;
}

/* The logits of a sample are off by `share` of their norm at most. */
static void check_logits(mpt_context *ctx, mpt_model *net, const sizes *s, const golden *g, double share) {
    const golden_line *line = golden_need(g, "f32", "output", "eval");
    float *x = (float *)test_memory(s->batch * s->pixels * sizeof *x);
    float *logits = (float *)test_memory(s->batch * s->classes * sizeof *logits);
    int32_t *labels = (int32_t *)test_memory(s->batch * sizeof *labels);
    size_t n, c;
    draw_batch(s, 0, x, labels);
    CHECK(line->count == SHOWN * s->classes);
    CHECK_OK(ctx, mpt_predict(net, x, s->batch, logits));
    for (n = 0; n < SHOWN; n++) {
        double squares = 0, off = 0;
        for (c = n * s->classes; c < (n + 1) * s->classes; c++) {
            const double d = (double)logits[c] - line->value[c];
            squares += line->value[c] * line->value[c];
            off += d * d;
        }
        CHECK_NEAR(sqrt(off), 0, share * sqrt(squares));
    }
    free(x);
    free(logits);
    free(labels);
}

/* Forward, the terms are the fan-ins of the longest way, and of statistics in the fourth stage sums over 32 pixels.
   Backward, outputs and patches of that stage, its statistics twice, and pixels. In 16 bits the arrays on the way are
   rounded: input, 17 copies of filters, 17 convolutions, 17 norms, 8 sums, pixels and the classifier's two. */
static const roundings forward = {147 + 4 * 144 + 144 + 3 * 288 + 288 + 3 * 576 + 576 + 3 * 1152 + 128 + 4 * 32,
                                  1 + 3 * 17 + 8 + 1 + 2, 0};
static const roundings backward = {1000 + 3 * 1152 + 576 + 2 * 4 * 32 + 32, 0, 0};

static void test_predicts(mpt_context *ctx, const golden *g, const unsigned char *file, size_t size) {
    const sizes s = sizes_of(g);
    mpt_train_desc train = MPT_ZERO;
    int i;
    train.batch = (int)s.batch;
    train.inference = 1;
    for (i = 0; i < 6; i++) { /* types; batch norms folded or not, which rounds the filters twice */
        const mpt_policy policy = mpt_policy_preset(i % 3 ? MPT_O2 : MPT_O0, i % 3 == 1 ? MPT_F16 : MPT_BF16);
        const double rounded = forward.policy + (i < 3 ? 0 : 17);
        mpt_model *net;
        train.fold = i >= 3;
        net = build(ctx, &s, policy, &train, file, size);
        check_logits(ctx, net, &s, g,
                     2 * test_unit(MPT_F32) * sqrt(forward.terms) +
                         (i % 3 ? 2 * test_unit(policy.compute) * sqrt(rounded) : 0));
        mpt_model_free(net);
    }
}

/* In fp32: losses and the norm of the gradient as curve.h has it, and what is frozen stays. */
static void test_tunes(mpt_context *ctx, const golden *g, const unsigned char *file, size_t size) {
    const sizes s = sizes_of(g);
    mpt_train_desc train = MPT_ZERO;
    float *x = (float *)test_memory(s.batch * s.pixels * sizeof *x), *before, *after;
    int32_t *labels = (int32_t *)test_memory(s.batch * sizeof *labels);
    mpt_model *net;
    mpt_params *params;
    curve c;
    size_t step, count, trained;
    int t;
    train.batch = (int)s.batch;
    train.optimizer = mpt_sgd(golden_number(g, "lr"), golden_number(g, "momentum"));
    net = build(ctx, &s, mpt_policy_preset(MPT_O0, MPT_F16), &train, file, size);
    params = mpt_model_params(net);
    check_logits(ctx, net, &s, g, 2 * test_unit(MPT_F32) * sqrt(forward.terms));
    count = mpt_params_count(params, 0);
    before = (float *)test_memory(2 * count * sizeof *before);
    after = before + count;
    CHECK_OK(ctx, mpt_params_get(params, 0, before));
    c.steps = (size_t)golden_number(g, "steps");
    c.loss = test_doubles(c.steps);
    c.norm = 0;
    for (step = 0; step < c.steps; step++) {
        draw_batch(&s, step + 1, x, labels);
        CHECK_OK(ctx, mpt_train_step(net, x, labels));
        c.loss[step] = mpt_loss(net);
        if (!step) c.norm = curve_norm(ctx, net);
    }
    curve_compare(g, "f32", &forward, &backward, (int)s.classes, &c);
    CHECK_OK(ctx, mpt_params_get(params, 0, after));
    trained = mpt_model_memory(net).gradients / sizeof(float); /* frozen tensors come behind those that train */
    CHECK(trained > 0 && trained < count);
    CHECK(memcmp(before + trained, after + trained, (count - trained) * sizeof *before) == 0);
    for (t = 1; t <= mpt_params_tensors(params); t++) {
        const char *name = mpt_params_name(params, t);
        const int trains = strncmp(name, "layer4.", 7) == 0 || strncmp(name, "fc.", 3) == 0;
        CHECK((mpt_params_grad(params, t) != NULL) == trains);
    }
    free(c.loss);
    free(before);
    free(x);
    free(labels);
    mpt_model_free(net);
}

int main(int argc, char **argv) {
    mpt_context *ctx = test_open(NULL);
    golden g = golden_read("resnet18");
    const sizes s = sizes_of(&g);
    size_t size;
    unsigned char *file = file_of(&s, &size);
    test_begin(argc, argv);
    RUN_TEST(test_predicts(ctx, &g, file, size));
    RUN_TEST(test_tunes(ctx, &g, file, size));
    free(file);
    golden_free(&g);
    mpt_close(ctx);
    return test_finish("parity/resnet18");
}
