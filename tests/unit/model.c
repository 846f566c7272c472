/* model.c - floor 4: whole models against a double forward pass, training, evaluation, memory, builder errors. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include "../reference.h"

/* ==== A MODEL TWICE ==== described once, built in the library, and evaluated in double here */

typedef struct item {
    char kind; /* i input, l linear, c conv2d, r relu, m max pool, a average pool, g global average, f flatten, + add;
                  L leaky relu, T tanh, S sigmoid, G gelu, H gelu by tanh, U silu */
    int a, b;  /* inputs: indices into the items; of an input H, W */
    int units; /* outputs, filters, channels */
    int kernel, stride, padding; /* padding -1: the default of conv2d */
} item;

enum { MOST_ITEMS = 16 };

static const item mlp[] = {{'i', 1, 1, 7, 0, 0, 0},  {'l', 0, 0, 13, 0, 0, 0}, {'r', 1, 0, 0, 0, 0, 0},
                           {'l', 2, 0, 11, 0, 0, 0}, {'r', 3, 0, 0, 0, 0, 0},  {'l', 4, 0, 5, 0, 0, 0},
                           {0, 0, 0, 0, 0, 0, 0}};
/* Every layer; a value used twice, a value added to itself, a ReLU that follows a sum and one that follows a pool. */
static const item cnn[] = {{'i', 9, 8, 2, 0, 0, 0},  {'c', 0, 0, 4, 3, 1, -1}, {'r', 1, 0, 0, 0, 0, 0},
                           {'c', 2, 0, 4, 3, 1, -1}, {'+', 3, 2, 0, 0, 0, 0},  {'r', 4, 0, 0, 0, 0, 0},
                           {'m', 5, 0, 0, 2, 2, 0},  {'c', 6, 0, 6, 3, 2, 1},  {'a', 7, 0, 0, 2, 1, 1},
                           {'r', 8, 0, 0, 0, 0, 0},  {'+', 9, 9, 0, 0, 0, 0},  {'f', 10, 0, 0, 0, 0, 0},
                           {'l', 11, 0, 5, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 0}};
/* Without ReLU and max pooling: rounding to 16 bits cannot switch a unit. */
static const item smooth[] = {{'i', 6, 6, 3, 0, 0, 0},  {'c', 0, 0, 5, 3, 1, -1}, {'c', 1, 0, 5, 1, 1, -1},
                              {'+', 1, 2, 0, 0, 0, 0},  {'c', 3, 0, 8, 2, 2, 0},  {'g', 4, 0, 0, 0, 0, 0},
                              {'l', 5, 0, 5, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 0}};

/* The other activations: some a product can compute in passing, some keep their input; one input is used twice. */
static const item curved[] = {{'i', 6, 6, 3, 0, 0, 0}, {'c', 0, 0, 4, 3, 1, -1}, {'G', 1, 0, 0, 0, 0, 0},
                              {'T', 1, 0, 0, 0, 0, 0}, {'+', 2, 3, 0, 0, 0, 0},  {'L', 4, 0, 0, 0, 0, 0},
                              {'c', 5, 0, 6, 2, 2, 0}, {'U', 6, 0, 0, 0, 0, 0},  {'l', 7, 0, 9, 0, 0, 0},
                              {'S', 8, 0, 0, 0, 0, 0}, {'l', 9, 0, 8, 0, 0, 0},  {'H', 10, 0, 0, 0, 0, 0},
                              {'l', 11, 0, 5, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 0}};

static int add_item(mpt_model *net, const item *it, const int *id) {
    mpt_conv2d_desc conv = MPT_ZERO;
    mpt_pool2d_desc pool = MPT_ZERO;
    const int a = it->kind == 'i' ? 0 : id[it->a];
    conv.stride = pool.stride = it->stride;
    conv.padding = it->padding > 0 ? it->padding : 0;
    conv.no_padding = it->padding == 0;
    pool.padding = it->padding;
    switch (it->kind) {
    case 'i': return mpt_input(net, it->a, it->b, it->units);
    case 'l': return mpt_linear(net, a, it->units, NULL);
    case 'c': return mpt_conv2d(net, a, it->units, it->kernel, &conv);
    case 'r': return mpt_relu(net, a);
    case 'L': return mpt_leaky_relu(net, a);
    case 'T': return mpt_tanh(net, a);
    case 'S': return mpt_sigmoid(net, a);
    case 'G': return mpt_gelu(net, a);
    case 'H': return mpt_gelu_tanh(net, a);
    case 'U': return mpt_silu(net, a);
    case 'm': return mpt_max_pool2d(net, a, it->kernel, &pool);
    case 'a': return mpt_avg_pool2d(net, a, it->kernel, &pool);
    case 'g': return mpt_global_avg_pool2d(net, a);
    case 'f': return mpt_flatten(net, a);
    default: return mpt_add(net, a, id[it->b]);
    }
}

static mpt_model *build(mpt_context *ctx, mpt_policy policy, const item *items, int squared,
                        const mpt_train_desc *train) {
    mpt_model *net = mpt_model_new(ctx, policy);
    int id[MOST_ITEMS], i;
    for (i = 0; items[i].kind; i++) {
        id[i] = add_item(net, &items[i], id);
        CHECK(id[i] == i + 1);
    }
    CHECK((squared ? mpt_mse(net, id[i - 1]) : mpt_softmax_cross_entropy(net, id[i - 1], NULL)) == i + 1);
    if (!CHECK_OK(ctx, mpt_model_build(net, train))) exit(test_finish("model"));
    return net;
}

/* ==== DATA ==== */

enum { CLASSES = 5, MOST_SAMPLES = 64 };

typedef struct samples {
    float *x, *target;
    int32_t *label;
    size_t features;
} samples;

static samples samples_new(const item *items, size_t n, uint64_t seed) {
    samples s;
    size_t i;
    s.features = (size_t)(items[0].a * items[0].b * items[0].units);
    s.x = (float *)test_memory(n * s.features * sizeof *s.x);
    s.target = (float *)test_memory(n * CLASSES * sizeof *s.target);
    s.label = (int32_t *)test_memory(n * sizeof *s.label);
    test_floats(s.x, n * s.features, -1, 1, seed);
    test_floats(s.target, n * CLASSES, -1, 1, seed + 1);
    for (i = 0; i < n; i++) s.label[i] = (int32_t)(mpt_hash(seed, 2, 0, i) % CLASSES);
    return s;
}

static void samples_free(samples *s) {
    free(s->x), free(s->target), free(s->label);
}

static const void *target_of(const samples *s, int squared) {
    return squared ? (const void *)s->target : (const void *)s->label;
}

/* ==== THE SAME MODEL IN DOUBLE ==== */

typedef struct net64 {
    const item *items;
    int squared;
    const samples *s;
    size_t n; /* samples */
    size_t H[MOST_ITEMS], W[MOST_ITEMS], C[MOST_ITEMS];
    double *value[MOST_ITEMS];
    double *weight[MOST_ITEMS], *bias[MOST_ITEMS];
    double *tensor[2 * MOST_ITEMS]; /* the same by the ids of mpt_params */
    double *target, *row_loss;
    int last; /* item */
    double roundings; /* operations on the longest way from a weight to the loss and back to its gradient */
} net64;

static size_t size64(const net64 *net, int i) { return net->H[i] * net->W[i] * net->C[i]; }

static mpt_conv2d_shape conv64(const net64 *net, int i) {
    const item *it = &net->items[i];
    mpt_conv2d_shape s = MPT_ZERO;
    s.N = net->n, s.K = net->C[i];
    if (it->kind == 'l') {
        s.H = s.W = s.R = s.S = 1;
        s.C = size64(net, it->a);
        return s;
    }
    s.H = net->H[it->a], s.W = net->W[it->a], s.C = net->C[it->a];
    s.R = s.S = (size_t)it->kernel;
    s.stride = (size_t)it->stride;
    s.padding = (size_t)(it->padding < 0 ? (it->kernel - 1) / 2 : it->padding);
    return s;
}

static mpt_pool2d_shape pool64(const net64 *net, int i) {
    const item *it = &net->items[i];
    mpt_pool2d_shape s = MPT_ZERO;
    s.N = net->n, s.H = net->H[it->a], s.W = net->W[it->a], s.C = net->C[it->a];
    s.R = it->kind == 'g' ? s.H : (size_t)it->kernel;
    s.S = it->kind == 'g' ? s.W : (size_t)it->kernel;
    s.stride = (size_t)it->stride, s.padding = (size_t)it->padding;
    return s;
}

static void shape64(net64 *net, int i) {
    const item *it = &net->items[i];
    size_t out_h = 1, out_w = 1;
    if (it->kind == 'i') {
        net->H[i] = (size_t)it->a, net->W[i] = (size_t)it->b, net->C[i] = (size_t)it->units;
        return;
    }
    net->H[i] = net->H[it->a], net->W[i] = net->W[it->a], net->C[i] = net->C[it->a];
    if (it->kind == 'c') {
        const mpt_conv2d_shape s = conv64(net, i);
        out_h = (s.H + 2 * s.padding - s.R) / s.stride + 1, out_w = (s.W + 2 * s.padding - s.S) / s.stride + 1;
    }
    if (it->kind == 'm' || it->kind == 'a') {
        const mpt_pool2d_shape s = pool64(net, i);
        out_h = (s.H + 2 * s.padding - s.R) / s.stride + 1, out_w = (s.W + 2 * s.padding - s.S) / s.stride + 1;
    }
    if (it->kind == 'f') net->C[i] = size64(net, it->a);
    if (it->kind == 'l' || it->kind == 'c') net->C[i] = (size_t)it->units;
    if (strchr("lfgcma", it->kind)) net->H[i] = out_h, net->W[i] = out_w;
}

static double *doubles_of(mpt_model *model, int tensor) {
    mpt_params *params = mpt_model_params(model);
    const size_t n = mpt_params_count(params, tensor);
    float *x = (float *)test_memory(n * sizeof *x);
    double *v = test_doubles(n);
    size_t i;
    CHECK(mpt_params_get(params, tensor, x) == MPT_OK);
    for (i = 0; i < n; i++) v[i] = (double)x[i];
    free(x);
    return v;
}

/* Takes the weights that the model has now, its tensors being weight, bias, weight, bias... */
static net64 net64_new(mpt_model *model, const item *items, int squared, const samples *s, size_t n) {
    net64 net;
    size_t i, outputs;
    int id = 0;
    memset(&net, 0, sizeof net);
    net.items = items, net.squared = squared, net.s = s, net.n = n;
    for (net.last = 0; items[net.last].kind; net.last++) {
        const int k = net.last;
        shape64(&net, k);
        net.value[k] = test_doubles(n * size64(&net, k));
        if (!strchr("lc", items[k].kind)) continue;
        net.tensor[id + 1] = net.weight[k] = doubles_of(model, id + 1);
        net.tensor[id + 2] = net.bias[k] = doubles_of(model, id + 2);
        id += 2;
    }
    net.last--;
    for (i = 0; i < n * size64(&net, 0); i++) net.value[0][i] = (double)s->x[i];
    outputs = size64(&net, net.last);
    net.target = test_doubles(n * outputs), net.row_loss = test_doubles(n);
    for (i = 0; i < n * outputs; i++) net.target[i] = (double)s->target[i];
    return net;
}

static void net64_free(net64 *net) {
    int i;
    for (i = 0; i < MOST_ITEMS; i++) free(net->value[i]), free(net->weight[i]), free(net->bias[i]);
    free(net->target), free(net->row_loss);
}

static double activation64(char kind, double x) {
    switch (kind) {
    case 'r': return x < 0 ? 0 : x;
    case 'L': return x < 0 ? 0.01 * x : x;
    case 'T': return tanh(x);
    case 'S': return 1 / (1 + exp(-x));
    case 'G': return x * 0.5 * (1 + erf(x / sqrt(2.0)));
    case 'H': return x * 0.5 * (1 + tanh(sqrt(2 / acos(-1.0)) * (x + 0.044715 * x * x * x)));
    case 'U': return x / (1 + exp(-x));
    default: return x;
    }
}

static void forward64_item(net64 *net, int i) {
    const item *it = &net->items[i];
    double *x = net->value[it->a], *y = net->value[i];
    const size_t count = net->n * size64(net, i);
    size_t j;
    if (it->kind == 'l' || it->kind == 'c') {
        const mpt_conv2d_shape s = conv64(net, i);
        for (j = 0; j < count; j++) y[j] = net->bias[i][j % net->C[i]];
        reference_conv2d(MPT_FORWARD, &s, net->H[i], net->W[i], x, net->weight[i], y);
    } else if (strchr("mag", it->kind)) {
        const mpt_pool2d_shape s = pool64(net, i);
        long *place = (long *)test_memory(count * sizeof *place);
        reference_pool2d(it->kind == 'm' ? MPT_POOL_MAX : MPT_POOL_AVERAGE, &s, net->H[i], net->W[i], x, y, place);
        free(place);
    } else {
        for (j = 0; j < count; j++) y[j] = activation64(it->kind, x[j]);
        for (j = 0; j < count && it->kind == '+'; j++) y[j] += net->value[it->b][j];
    }
}

/* The mean loss. */
static double loss64(void *user) {
    net64 *net = (net64 *)user;
    const size_t outputs = size64(net, net->last);
    double sum = 0;
    size_t row;
    int i;
    for (i = 1; i <= net->last; i++) forward64_item(net, i);
    for (row = 0; row < net->n; row++) {
        const double *x = net->value[net->last] + row * outputs;
        net->row_loss[row] = net->squared ? reference_squared_error(x, net->target + row * outputs, outputs)
                                          : reference_cross_entropy(x, outputs, (size_t)net->s->label[row]);
        sum += net->row_loss[row];
    }
    return sum / (double)net->n;
}

/* Operations that a value passes, one rounding each: at every layer the terms of its sum forward and backward, at the
   loss those of the classes, and at the weight those of its own gradient's sum. */
static double roundings(const net64 *net) {
    double count = 4 * CLASSES + 10, largest = 0;
    int i;
    for (i = 1; i <= net->last; i++) {
        if (strchr("lc", net->items[i].kind)) {
            const mpt_conv2d_shape s = conv64(net, i);
            const double rows = (double)(net->n * net->H[i] * net->W[i]);
            count += (double)(s.R * s.S * (s.C + s.K)) + 10;
            if (rows > largest) largest = rows;
        } else if (strchr("ag", net->items[i].kind)) {
            const mpt_pool2d_shape s = pool64(net, i);
            count += 2 * (double)(s.R * s.S) + 4;
        } else count += 4;
    }
    return count + largest;
}

/* ==== GRADIENTS ==== */

/* Gradients of a tensor as the step will see them. */
static double *gradient_of(mpt_context *ctx, mpt_model *model, int tensor) {
    mpt_params *params = mpt_model_params(model);
    const size_t n = mpt_params_count(params, tensor);
    const double scale = (double)mpt_loss_scale(model);
    float *g = (float *)test_memory(n * sizeof *g);
    double *v = test_doubles(n);
    size_t i;
    CHECK_OK(ctx, mpt_download(ctx, g, mpt_params_grad(params, tensor), n * sizeof *g));
    for (i = 0; i < n; i++) v[i] = (double)g[i] / scale;
    free(g);
    return v;
}

static double largest_of(const double *v, size_t n) {
    double largest = 0;
    size_t i;
    for (i = 0; i < n; i++) largest = fabs(v[i]) > largest ? fabs(v[i]) : largest;
    return largest;
}

/* `error`: relative to the largest gradient of the tensor. A step of 2^-24 crosses next to no kink of a ReLU; it costs
   2^-53 * 2^24 of the loss and its sums in double, for which 1e-7 of the loss is ample. */
static void check_slopes(mpt_context *ctx, mpt_model *model, net64 *net, double error) {
    mpt_params *params = mpt_model_params(model);
    const double loss = loss64(net);
    int tensor;
    for (tensor = 1; tensor <= mpt_params_tensors(params); tensor++) {
        const size_t n = mpt_params_count(params, tensor);
        double *g = gradient_of(ctx, model, tensor);
        const double tolerance = error * largest_of(g, n) + 1e-7 * loss;
        size_t i;
        CHECK(largest_of(g, n) > 1e-4); /* or nothing would be tested */
        for (i = 0; i < n; i += 1 + n / 13)
            if (!CHECK_NEAR(g[i], reference_slope(loss64, net, &net->tensor[tensor][i], ldexp(1, -24)), tolerance))
                printf("    in %s[%lu]\n", mpt_params_name(params, tensor), (unsigned long)i);
        free(g);
    }
}

/* O0: fp32 roundings. Each changes a gradient by at most u of the sizes it is made of, taken to be the largest one. */
static void test_gradients(mpt_context *ctx, const item *items, int squared, size_t n) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(items, n, 3);
    mpt_model *model;
    net64 net;
    double error;
    train.batch = 9, train.seed = 5;
    model = build(ctx, mpt_policy_preset(MPT_O0, MPT_F32), items, squared, &train);
    net = net64_new(model, items, squared, &s, n);
    error = roundings(&net) * test_unit(MPT_F32);
    CHECK_OK(ctx, mpt_forward(model, s.x, target_of(&s, squared), (int)n));
    CHECK_NEAR(mpt_loss(model), loss64(&net), error * loss64(&net));
    CHECK_OK(ctx, mpt_backward(model));
    check_slopes(ctx, model, &net, error);
    net64_free(&net), samples_free(&s);
    mpt_model_free(model);
}

/* Mixed precision: 16-bit roundings of every activation, weight and gradient on the way, three a layer each way, each
   at most u of the largest. */
static void test_mixed_gradients(mpt_context *ctx, mpt_level level, mpt_dtype type, int squared) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(smooth, 8, 3);
    mpt_model *model;
    net64 net;
    train.batch = 8, train.seed = 6;
    model = build(ctx, mpt_policy_preset(level, type), smooth, squared, &train);
    net = net64_new(model, smooth, squared, &s, 8);
    CHECK_OK(ctx, mpt_forward(model, s.x, target_of(&s, squared), 8));
    CHECK_OK(ctx, mpt_backward(model));
    check_slopes(ctx, model, &net, 6 * (net.last + 1) * test_unit(type));
    net64_free(&net), samples_free(&s);
    mpt_model_free(model);
}

/* ==== STEPS ==== */

/* All that a step changes: masters or weights, and the optimizer's and the scaler's state. */
typedef struct training_state {
    float *weight;
    size_t count;
    mpt_optimizer_state optimizer;
    mpt_scaler_state scaler;
} training_state;

static training_state state_of(mpt_context *ctx, mpt_model *model) {
    mpt_params *params = mpt_model_params(model);
    training_state s;
    memset(&s, 0, sizeof s);
    s.count = mpt_params_count(params, 0);
    s.weight = (float *)test_memory(s.count * sizeof *s.weight);
    CHECK_OK(ctx, mpt_params_get(params, 0, s.weight));
    CHECK_OK(ctx, mpt_optimizer_get_state(mpt_model_optimizer(model), &s.optimizer));
    CHECK_OK(ctx, mpt_scaler_get_state(mpt_model_scaler(model), &s.scaler));
    return s;
}

/* Frees both. */
static int same(training_state a, training_state b) {
    const int equal = a.count == b.count && memcmp(a.weight, b.weight, a.count * sizeof *a.weight) == 0 &&
                      memcmp(&a.optimizer, &b.optimizer, sizeof a.optimizer) == 0 &&
                      memcmp(&a.scaler, &b.scaler, sizeof a.scaler) == 0;
    free(a.weight), free(b.weight);
    return equal;
}

static mpt_policy policy_of(int i) { /* 0: O0, then O1..O3 in fp16 and bf16 */
    return mpt_policy_preset(i ? (mpt_level)((i + 1) / 2) : MPT_O0, i % 2 ? MPT_F16 : MPT_BF16);
}
enum { POLICIES = 7 };

static void parts(mpt_context *ctx, mpt_model *model, const samples *s, int squared, const mpt_train_desc *train) {
    const size_t batch = (size_t)train->batch;
    int i;
    for (i = 0; i < train->accumulate; i++) {
        const size_t at = (size_t)i * batch;
        const void *target = squared ? (const void *)(s->target + at * CLASSES) : (const void *)(s->label + at);
        CHECK_OK(ctx, mpt_forward(model, s->x + at * s->features, target, train->batch));
        CHECK_OK(ctx, mpt_backward(model));
    }
    CHECK_OK(ctx, mpt_unscale(mpt_model_optimizer(model)));
    CHECK_OK(ctx, mpt_clip_norm(mpt_model_optimizer(model), train->clip_norm));
    CHECK_OK(ctx, mpt_step(mpt_model_optimizer(model)));
    CHECK_OK(ctx, mpt_scaler_update(mpt_model_scaler(model)));
}

/* mpt_train_step is its parts, bit for bit; in fp16 the first steps are skipped ones. */
static void test_parts(mpt_context *ctx, const item *items, mpt_policy policy, int squared) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(items, 12, 8);
    mpt_model *whole, *taken;
    int i;
    train.batch = 6, train.accumulate = 2, train.clip_norm = 0.3, train.seed = 2;
    train.scaler.init_scale = 16777216;
    whole = build(ctx, policy, items, squared, &train);
    taken = build(ctx, policy, items, squared, &train);
    CHECK(same(state_of(ctx, whole), state_of(ctx, taken)));
    for (i = 0; i < 6; i++) {
        CHECK_OK(ctx, mpt_train_step(whole, s.x, target_of(&s, squared)));
        parts(ctx, taken, &s, squared, &train);
        CHECK(same(state_of(ctx, whole), state_of(ctx, taken)));
        CHECK_EQUAL(mpt_loss(whole), mpt_loss(taken));
    }
    CHECK_EQUAL(mpt_steps_applied(whole) + mpt_steps_skipped(whole), 6);
    mpt_model_free(whole), mpt_model_free(taken);
    samples_free(&s);
}

/* 8 samples at once, or 4 and 4: the same sums in another order, so gradients differ by at most twice their error. */
static void test_accumulation(mpt_context *ctx, const item *items, int squared) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(items, 8, 4);
    mpt_model *once, *twice;
    net64 net;
    double error;
    int tensor;
    train.batch = 8, train.seed = 3, train.optimizer = mpt_sgd(0.1, 0);
    once = build(ctx, policy_of(0), items, squared, &train);
    train.batch = 4, train.accumulate = 2;
    twice = build(ctx, policy_of(0), items, squared, &train);
    net = net64_new(once, items, squared, &s, 8);
    error = 2 * roundings(&net) * test_unit(MPT_F32);
    CHECK_OK(ctx, mpt_train_step(once, s.x, target_of(&s, squared)));
    CHECK_OK(ctx, mpt_train_step(twice, s.x, target_of(&s, squared)));
    CHECK_NEAR(mpt_loss(twice), mpt_loss(once), error * mpt_loss(once));
    for (tensor = 1; tensor <= mpt_params_tensors(mpt_model_params(once)); tensor++) {
        const size_t n = mpt_params_count(mpt_model_params(once), tensor);
        double *g = gradient_of(ctx, once, tensor), *h = gradient_of(ctx, twice, tensor);
        double *p = doubles_of(once, tensor), *q = doubles_of(twice, tensor), *tolerance = test_doubles(2 * n);
        size_t i;
        for (i = 0; i < n; i++) {
            tolerance[i] = error * largest_of(g, n);
            tolerance[n + i] = 0.1 * tolerance[i] + 4 * test_unit(MPT_F32) * (fabs(p[i]) + 0.1 * fabs(g[i]));
        }
        CHECK_ALL(h, n, g, tolerance);
        CHECK_ALL(q, n, p, tolerance + n);
        free(g), free(h), free(p), free(q), free(tolerance);
    }
    net64_free(&net), samples_free(&s);
    mpt_model_free(once), mpt_model_free(twice);
}

/* A model large enough to be split between threads. */
static const item wide[] = {{'i', 16, 16, 8, 0, 0, 0}, {'c', 0, 0, 16, 3, 1, -1}, {'r', 1, 0, 0, 0, 0, 0},
                            {'m', 2, 0, 0, 2, 2, 0},   {'c', 3, 0, 16, 3, 1, -1}, {'+', 4, 3, 0, 0, 0, 0},
                            {'r', 5, 0, 0, 0, 0, 0},   {'l', 6, 0, 96, 0, 0, 0},  {'r', 7, 0, 0, 0, 0, 0},
                            {'l', 8, 0, 5, 0, 0, 0},   {0, 0, 0, 0, 0, 0, 0}};

static training_state trained(int threads, mpt_policy policy, const samples *s) {
    mpt_context *ctx = test_open_threads(threads);
    mpt_train_desc train = MPT_ZERO;
    training_state state;
    mpt_model *model;
    int i;
    train.batch = 16, train.clip_norm = 1;
    model = build(ctx, policy, wide, 0, &train);
    for (i = 0; i < 3; i++) CHECK_OK(ctx, mpt_train_step(model, s->x, s->label));
    state = state_of(ctx, model);
    mpt_model_free(model);
    mpt_close(ctx);
    return state;
}

static void test_threads(mpt_policy policy) {
    samples s = samples_new(wide, 16, 1);
    int threads;
    for (threads = 2; threads <= 4; threads *= 2) CHECK(same(trained(1, policy, &s), trained(threads, policy, &s)));
    samples_free(&s);
}

/* ==== EVALUATION ==== */

/* 11 samples in batches of 4, 4 and 3. */
static void test_evaluation(mpt_context *ctx, const item *items, int squared) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(items, 11, 6);
    float out[11 * CLASSES];
    double expected[11 * CLASSES], tolerance[11 * CLASSES], is[11 * CLASSES], error;
    mpt_metrics m = MPT_ZERO;
    mpt_model *model;
    net64 net;
    size_t i, j, correct = 0;
    train.batch = 4, train.seed = 12;
    model = build(ctx, policy_of(0), items, squared, &train);
    net = net64_new(model, items, squared, &s, 11);
    error = roundings(&net) * test_unit(MPT_F32);
    CHECK_EQUAL(mpt_model_outputs(model), CLASSES);
    CHECK_OK(ctx, mpt_evaluate(model, s.x, target_of(&s, squared), 11, &m));
    CHECK_NEAR(m.loss, loss64(&net), error * loss64(&net));
    for (i = 0; i < 11; i++) {
        const double *x = net.value[net.last] + i * CLASSES;
        size_t best = 0;
        for (j = 1; j < CLASSES; j++) best = x[j] > x[best] ? j : best;
        correct += best == (size_t)s.label[i];
    }
    CHECK_EQUAL(m.samples, 11);
    if (!squared) {
        CHECK_EQUAL(m.correct, correct);
        CHECK_NEAR(m.accuracy, (double)correct / 11, 1e-15);
    }
    CHECK_OK(ctx, mpt_predict(model, s.x, 11, out));
    for (i = 0; i < 11 * CLASSES; i++) {
        is[i] = (double)out[i], expected[i] = net.value[net.last][i];
        tolerance[i] = error * largest_of(net.value[net.last], 11 * CLASSES);
    }
    CHECK_ALL(is, 11 * CLASSES, expected, tolerance);
    CHECK_OK(ctx, mpt_evaluate(model, s.x, target_of(&s, squared), 1, &m));
    CHECK_NEAR(m.loss, net.row_loss[0], error * net.row_loss[0]);
    CHECK_ERROR(ctx, mpt_evaluate(model, s.x, target_of(&s, squared), 0, &m), MPT_ERROR_ARGUMENT, "samples");
    CHECK_ERROR(ctx, mpt_evaluate(model, NULL, target_of(&s, squared), 4, &m), MPT_ERROR_ARGUMENT, "x");
    CHECK_ERROR(ctx, mpt_evaluate(model, s.x, NULL, 4, &m), MPT_ERROR_ARGUMENT, "target");
    CHECK_ERROR(ctx, mpt_evaluate(model, s.x, target_of(&s, squared), 4, NULL), MPT_ERROR_ARGUMENT, "out");
    CHECK_ERROR(ctx, mpt_predict(model, NULL, 4, out), MPT_ERROR_ARGUMENT, "x");
    CHECK_ERROR(ctx, mpt_predict(model, s.x, 4, NULL), MPT_ERROR_ARGUMENT, "out");
    net64_free(&net), samples_free(&s);
    mpt_model_free(model);
}

/* Evaluating between steps changes nothing; in every policy, also where there are more outputs than features. */
static void test_evaluation_is_neutral(mpt_context *ctx, mpt_policy policy) {
    static const item narrow[] = {{'i', 1, 1, 2, 0, 0, 0}, {'l', 0, 0, 9, 0, 0, 0}, {'r', 1, 0, 0, 0, 0, 0},
                                  {'l', 2, 0, 5, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 0}};
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(narrow, 20, 9);
    float out[20 * CLASSES];
    mpt_metrics m;
    mpt_model *plain, *watched;
    int i;
    train.batch = 6;
    plain = build(ctx, policy, narrow, 0, &train), watched = build(ctx, policy, narrow, 0, &train);
    for (i = 0; i < 4; i++) {
        CHECK_OK(ctx, mpt_train_step(plain, s.x, s.label));
        CHECK_OK(ctx, mpt_train_step(watched, s.x, s.label));
        CHECK_OK(ctx, mpt_evaluate(watched, s.x, s.label, 20, &m));
        CHECK_OK(ctx, mpt_predict(watched, s.x, 20, out));
        CHECK_EQUAL(mpt_loss(watched), mpt_loss(plain));
    }
    CHECK(same(state_of(ctx, plain), state_of(ctx, watched)));
    mpt_model_free(plain), mpt_model_free(watched);
    samples_free(&s);
}

/* ==== BAD DATA ==== */

static void check_refused(mpt_context *ctx, mpt_model *model, const float *x, const void *target, const char *word) {
    mpt_metrics m;
    const training_state before = state_of(ctx, model), kept = state_of(ctx, model);
    CHECK_ERROR(ctx, mpt_train_step(model, x, target), MPT_ERROR_VALUE, word);
    CHECK_ERROR(ctx, mpt_forward(model, x, target, 4), MPT_ERROR_VALUE, word);
    CHECK_ERROR(ctx, mpt_evaluate(model, x, target, 4, &m), MPT_ERROR_VALUE, word);
    CHECK(same(before, state_of(ctx, model)));
    free(kept.weight);
}

static void with_float(mpt_context *ctx, mpt_model *model, samples *s, int squared, float *place, uint32_t bits,
                       const char *word) {
    const float kept = *place;
    *place = test_float(bits);
    check_refused(ctx, model, s->x, target_of(s, squared), word);
    *place = kept;
}

/* Refused data leave everything as it was: the next step is the one of a model that never saw them. */
static void test_bad_data(mpt_context *ctx, mpt_policy policy, int squared) {
    static const int32_t bad[] = {-1, CLASSES, 2147483647, -2147483647};
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(mlp, 4, 2);
    mpt_model *model, *other;
    int i;
    train.batch = 4;
    model = build(ctx, policy, mlp, squared, &train), other = build(ctx, policy, mlp, squared, &train);
    CHECK_OK(ctx, mpt_train_step(model, s.x, target_of(&s, squared)));
    CHECK_OK(ctx, mpt_train_step(other, s.x, target_of(&s, squared)));
    with_float(ctx, model, &s, squared, &s.x[3 * s.features + 6], 0x7f800000u, "inf");
    with_float(ctx, model, &s, squared, &s.x[3 * s.features + 6], 0x7fc00000u, "nan");
    with_float(ctx, model, &s, squared, &s.x[0], 0xffc00000u, "sample");
    if (squared) {
        with_float(ctx, model, &s, 1, &s.target[4 * CLASSES - 1], 0x7fc00000u, "target");
        with_float(ctx, model, &s, 1, &s.target[0], 0xff800000u, "inf");
    }
    for (i = 0; i < 4 && !squared; i++) {
        const int32_t kept = s.label[3];
        s.label[3] = bad[i];
        check_refused(ctx, model, s.x, s.label, "label");
        s.label[3] = kept;
    }
    CHECK_OK(ctx, mpt_train_step(model, s.x, target_of(&s, squared)));
    CHECK_OK(ctx, mpt_train_step(other, s.x, target_of(&s, squared)));
    CHECK(same(state_of(ctx, model), state_of(ctx, other)));
    mpt_model_free(model), mpt_model_free(other);
    samples_free(&s);
}

/* Weights that overflow fp16: skipped steps down to the smallest scale, then an error that names a tensor. */
static void test_divergence(mpt_context *ctx) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(mlp, 4, 2);
    float huge[7 * 13];
    mpt_model *model;
    int i;
    train.batch = 4, train.scaler.init_scale = 4, train.scaler.patience = 3;
    model = build(ctx, mpt_policy_preset(MPT_O2, MPT_F16), mlp, 0, &train);
    for (i = 0; i < 7 * 13; i++) huge[i] = 1e30f;
    CHECK_OK(ctx, mpt_params_set(mpt_model_params(model), 1, huge));
    for (i = 0; i < 4; i++) CHECK_OK(ctx, mpt_train_step(model, s.x, s.label)); /* at 4, 2, 1, 1 */
    CHECK_ERROR(ctx, mpt_train_step(model, s.x, s.label), MPT_ERROR_DIVERGED, "linear1");
    CHECK_EQUAL(mpt_steps_skipped(model), 5);
    CHECK_EQUAL(mpt_steps_applied(model), 0);
    CHECK_EQUAL(mpt_loss_scale(model), 1);
    mpt_model_free(model);
    samples_free(&s);
}

static void test_order(mpt_context *ctx) {
    samples s = samples_new(mlp, 32, 2);
    mpt_model *model = mpt_model_new(ctx, policy_of(0));
    mpt_metrics m;
    CHECK_ERROR(ctx, mpt_train_step(model, s.x, s.label), MPT_ERROR_ORDER, "built");
    CHECK_ERROR(ctx, mpt_forward(model, s.x, s.label, 1), MPT_ERROR_ORDER, "built");
    CHECK_ERROR(ctx, mpt_backward(model), MPT_ERROR_ORDER, "built");
    CHECK_ERROR(ctx, mpt_evaluate(model, s.x, s.label, 1, &m), MPT_ERROR_ORDER, "built");
    CHECK_ERROR(ctx, mpt_predict(model, s.x, 1, s.target), MPT_ERROR_ORDER, "built");
    mpt_model_free(model);
    model = build(ctx, policy_of(0), mlp, 0, NULL); /* batch 32 */
    CHECK_ERROR(ctx, mpt_backward(model), MPT_ERROR_ORDER, "forward");
    CHECK_ERROR(ctx, mpt_forward(model, s.x, s.label, 0), MPT_ERROR_ARGUMENT, "n");
    CHECK_ERROR(ctx, mpt_forward(model, s.x, s.label, 33), MPT_ERROR_ARGUMENT, "n");
    CHECK_ERROR(ctx, mpt_forward(model, NULL, s.label, 1), MPT_ERROR_ARGUMENT, "x");
    CHECK_ERROR(ctx, mpt_forward(model, s.x, NULL, 1), MPT_ERROR_ARGUMENT, "target");
    CHECK_OK(ctx, mpt_forward(model, s.x, s.label, 32));
    CHECK_OK(ctx, mpt_backward(model));
    CHECK_ERROR(ctx, mpt_backward(model), MPT_ERROR_ORDER, "forward");
    CHECK_OK(ctx, mpt_forward(model, s.x, s.label, 32));
    CHECK_OK(ctx, mpt_evaluate(model, s.x, s.label, 1, &m));
    CHECK_ERROR(ctx, mpt_backward(model), MPT_ERROR_ORDER, "forward"); /* evaluation took its activations */
    CHECK_ERROR(ctx, mpt_model_build(model, NULL), MPT_ERROR_ORDER, "built");
    CHECK_EQUAL(mpt_relu(model, 1), 0);
    test_check_reason(ctx, "built", __FILE__, __LINE__);
    CHECK_OK(ctx, mpt_train_step(model, s.x, s.label));
    CHECK(mpt_train_step(NULL, s.x, s.label) == MPT_ERROR_ARGUMENT);
    CHECK(mpt_model_build(NULL, NULL) == MPT_ERROR_ARGUMENT);
    CHECK(mpt_input(NULL, 1, 1, 1) == 0 && mpt_model_new(NULL, policy_of(0)) == NULL);
    mpt_model_free(model);
    mpt_model_free(NULL);
    samples_free(&s);
}

/* ==== BUILDER ERRORS ==== */

/* Starts a model with an 8x6x3 input and gives its id. */
static mpt_model *begin(mpt_context *ctx, int *in) {
    mpt_model *net = mpt_model_new(ctx, policy_of(0));
    *in = mpt_input(net, 8, 6, 3);
    return net;
}

/* The id is 0, passes through, and the build reports the first reason. */
static void check_layer(mpt_context *ctx, mpt_model *net, int id, mpt_result code, const char *word, int line) {
    int ok = test_check(id == 0, __FILE__, line, "a layer with a bad argument");
    int other = mpt_linear(net, 1, -7, NULL); /* fails as well, later */
    id = mpt_softmax_cross_entropy(net, mpt_relu(net, id), NULL);
    ok &= CHECK(id == 0 && other == 0);
    ok &= test_check_result(ctx, mpt_model_build(net, NULL), code, __FILE__, line, "mpt_model_build");
    ok &= test_check_reason(ctx, word, __FILE__, line);
    if (!ok) printf("    in line %d\n", line);
    mpt_model_free(net);
}

#define CHECK_LAYER(call, code, word) \
    (net = begin(ctx, &in), check_layer(ctx, net, call, code, word, __LINE__))

static void test_layer_errors(mpt_context *ctx) {
    const char *long_name = "thirty-two characters: too long.";
    mpt_linear_desc linear = MPT_ZERO;
    mpt_model *net;
    int in;
    CHECK_LAYER(mpt_input(net, 2, 2, 2), MPT_ERROR_ORDER, "input");
    CHECK_LAYER(mpt_linear(net, 9, 4, NULL), MPT_ERROR_ARGUMENT, "9");
    CHECK_LAYER(mpt_linear(net, -1, 4, NULL), MPT_ERROR_ARGUMENT, "linear");
    CHECK_LAYER(mpt_linear(net, in, 0, NULL), MPT_ERROR_ARGUMENT, "linear1");
    CHECK_LAYER(mpt_linear(net, in, -3, NULL), MPT_ERROR_ARGUMENT, "outputs");
    CHECK_LAYER(mpt_linear(net, mpt_linear(net, in, 4, NULL), 0, NULL), MPT_ERROR_ARGUMENT, "linear2");
    linear.name = "", CHECK_LAYER(mpt_linear(net, in, 4, &linear), MPT_ERROR_ARGUMENT, "name");
    linear.name = long_name, CHECK_LAYER(mpt_linear(net, in, 4, &linear), MPT_ERROR_ARGUMENT, "name");
    linear.name = "head", linear.init = MPT_INIT_COUNT;
    CHECK_LAYER(mpt_linear(net, in, 4, &linear), MPT_ERROR_ARGUMENT, "head");
    CHECK_LAYER(mpt_relu(net, 5), MPT_ERROR_ARGUMENT, "5");
    CHECK_LAYER(mpt_flatten(net, -2), MPT_ERROR_ARGUMENT, "2");
    CHECK_LAYER(mpt_add(net, in, 7), MPT_ERROR_ARGUMENT, "7");
    CHECK_LAYER(mpt_add(net, in, mpt_linear(net, in, 4, NULL)), MPT_ERROR_SHAPE, "8x6x3");
    CHECK_LAYER(mpt_relu(net, mpt_mse(net, in)), MPT_ERROR_ORDER, "loss");
    CHECK_LAYER(mpt_mse(net, mpt_mse(net, in)), MPT_ERROR_ORDER, "loss");
    net = mpt_model_new(ctx, policy_of(0));
    check_layer(ctx, net, mpt_input(net, 0, 1, 1), MPT_ERROR_SHAPE, "input", __LINE__);
    net = mpt_model_new(ctx, policy_of(0));
    check_layer(ctx, net, mpt_input(net, 1, -1, 1), MPT_ERROR_SHAPE, "input", __LINE__);
    net = mpt_model_new(ctx, policy_of(0));
    check_layer(ctx, net, mpt_input(net, 65536, 65536, 4), MPT_ERROR_SHAPE, "65536", __LINE__);
    net = mpt_model_new(ctx, policy_of(0));
    check_layer(ctx, net, mpt_linear(net, 1, 4, NULL), MPT_ERROR_ARGUMENT, "1", __LINE__); /* no input yet */
}

static void test_window_errors(mpt_context *ctx) {
    const mpt_conv2d_desc zero = MPT_ZERO;
    mpt_conv2d_desc d = MPT_ZERO;
    mpt_pool2d_desc p = MPT_ZERO;
    mpt_model *net;
    int in;
    CHECK_LAYER(mpt_conv2d(net, in, 0, 3, NULL), MPT_ERROR_ARGUMENT, "filters");
    CHECK_LAYER(mpt_conv2d(net, in, 4, 0, NULL), MPT_ERROR_ARGUMENT, "kernel");
    CHECK_LAYER(mpt_conv2d(net, in, 4, -3, NULL), MPT_ERROR_ARGUMENT, "conv1");
    d = zero, d.stride = -1, CHECK_LAYER(mpt_conv2d(net, in, 4, 3, &d), MPT_ERROR_ARGUMENT, "stride");
    d = zero, d.padding = -1, CHECK_LAYER(mpt_conv2d(net, in, 4, 3, &d), MPT_ERROR_ARGUMENT, "padding");
    d = zero, d.dilation = -1, CHECK_LAYER(mpt_conv2d(net, in, 4, 3, &d), MPT_ERROR_ARGUMENT, "dilation");
    d = zero, d.init = (mpt_init)test_number(-1);
    CHECK_LAYER(mpt_conv2d(net, in, 4, 3, &d), MPT_ERROR_ARGUMENT, "init");
    d = zero, d.padding = 1, d.no_padding = 1;
    CHECK_LAYER(mpt_conv2d(net, in, 4, 3, &d), MPT_ERROR_ARGUMENT, "no_padding");
    d = zero, d.no_padding = 1, d.name = "c2";
    CHECK_LAYER(mpt_conv2d(net, in, 4, 7, &d), MPT_ERROR_SHAPE, "c2"); /* 7x7 on 8x6 */
    d.dilation = 3, CHECK_LAYER(mpt_conv2d(net, in, 4, 3, &d), MPT_ERROR_SHAPE, "c2");
    d.dilation = 2147483647, CHECK_LAYER(mpt_conv2d(net, in, 4, 3, &d), MPT_ERROR_SHAPE, "c2");
    d = zero, d.padding = 2147483647, CHECK_LAYER(mpt_conv2d(net, in, 4, 3, &d), MPT_ERROR_SHAPE, "conv1");
    CHECK_LAYER(mpt_conv2d(net, in, 2147483647, 3, NULL), MPT_ERROR_SHAPE, "conv1");
    CHECK_LAYER(mpt_max_pool2d(net, in, 0, NULL), MPT_ERROR_ARGUMENT, "window");
    CHECK_LAYER(mpt_max_pool2d(net, in, -1, NULL), MPT_ERROR_ARGUMENT, "window");
    CHECK_LAYER(mpt_avg_pool2d(net, in, -1, NULL), MPT_ERROR_ARGUMENT, "avg_pool1");
    CHECK_LAYER(mpt_max_pool2d(net, in, 9, NULL), MPT_ERROR_SHAPE, "max_pool1");
    p.stride = -1, CHECK_LAYER(mpt_avg_pool2d(net, in, 2, &p), MPT_ERROR_ARGUMENT, "stride");
    p.stride = 0, p.padding = 2, CHECK_LAYER(mpt_avg_pool2d(net, in, 2, &p), MPT_ERROR_SHAPE, "padding");
    p.padding = -1, CHECK_LAYER(mpt_avg_pool2d(net, in, 2, &p), MPT_ERROR_ARGUMENT, "padding");
    CHECK_LAYER(mpt_global_avg_pool2d(net, 3), MPT_ERROR_ARGUMENT, "3");
}

static void check_build(mpt_context *ctx, mpt_policy policy, const mpt_train_desc *train, mpt_result code,
                        const char *word, int line) {
    mpt_model *net = mpt_model_new(ctx, policy);
    mpt_mse(net, mpt_linear(net, mpt_input(net, 1, 1, 3), 2, NULL));
    test_check_result(ctx, mpt_model_build(net, train), code, __FILE__, line, "mpt_model_build");
    test_check_reason(ctx, word, __FILE__, line);
    CHECK(mpt_model_params(net) == NULL);
    CHECK_OK(ctx, mpt_model_build(net, NULL) == MPT_OK || code == MPT_ERROR_TYPE ? MPT_OK : MPT_ERROR_ARGUMENT);
    mpt_model_free(net);
}

static void test_build_errors(mpt_context *ctx) {
    const mpt_train_desc zero = MPT_ZERO;
    const mpt_policy o0 = policy_of(0);
    mpt_train_desc t = zero;
    mpt_policy p = o0;
    mpt_model *net;
    int in;
    t = zero, t.batch = -1, check_build(ctx, o0, &t, MPT_ERROR_ARGUMENT, "batch", __LINE__);
    t = zero, t.accumulate = -1, check_build(ctx, o0, &t, MPT_ERROR_ARGUMENT, "accumulate", __LINE__);
    t = zero, t.clip_norm = -1, check_build(ctx, o0, &t, MPT_ERROR_ARGUMENT, "clip_norm", __LINE__);
    t = zero, t.clip_norm = (double)test_float(0x7fc00000u);
    check_build(ctx, o0, &t, MPT_ERROR_ARGUMENT, "clip_norm", __LINE__);
    t = zero, t.optimizer = mpt_sgd(-1, 0), check_build(ctx, o0, &t, MPT_ERROR_ARGUMENT, "lr", __LINE__);
    t = zero, t.scaler.backoff_factor = 7, check_build(ctx, o0, &t, MPT_ERROR_ARGUMENT, "backoff_factor", __LINE__);
    check_build(ctx, mpt_policy_preset(MPT_O2, MPT_F32), NULL, MPT_ERROR_TYPE, "policy", __LINE__);
    check_build(ctx, mpt_policy_preset(MPT_O1, MPT_E4M3), NULL, MPT_ERROR_TYPE, "policy", __LINE__);
    check_build(ctx, mpt_policy_preset((mpt_level)test_number(4), MPT_F16), NULL, MPT_ERROR_TYPE, "policy", __LINE__);
    p.param = MPT_F16, p.compute = MPT_BF16, check_build(ctx, p, NULL, MPT_ERROR_TYPE, "policy", __LINE__);
    p = o0, p.master = MPT_MASTER_NONE, check_build(ctx, p, NULL, MPT_ERROR_TYPE, "policy", __LINE__);
    net = begin(ctx, &in);
    CHECK_ERROR(ctx, mpt_model_build(net, NULL), MPT_ERROR_ORDER, "loss");
    mpt_linear(net, in, 3, NULL), mpt_linear(net, in, 2, NULL);
    mpt_mse(net, 3);
    CHECK_ERROR(ctx, mpt_model_build(net, NULL), MPT_ERROR_ORDER, "linear1"); /* nothing reads it */
    mpt_model_free(net);
    net = begin(ctx, &in);
    mpt_mse(net, mpt_linear(net, in, 2, NULL)), mpt_mse(net, mpt_linear(net, in, 2, NULL));
    CHECK_ERROR(ctx, mpt_model_build(net, NULL), MPT_ERROR_ORDER, "loss"); /* two */
    mpt_model_free(net);
    net = mpt_model_new(ctx, o0);
    CHECK_ERROR(ctx, mpt_model_build(net, NULL), MPT_ERROR_ORDER, "loss"); /* nothing at all */
    mpt_model_free(net);
}

/* The policy's output type is the one of the node that the loss reads, whatever kind it is. Seen through a value that
   fp16 cannot hold: 1 + 2^-12. */
static void test_output_type(mpt_context *ctx) {
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    const float x = 1, weight = 1, bias = test_float(0x39800000u);
    float y = 0;
    mpt_mse(net, mpt_relu(net, mpt_linear(net, mpt_input(net, 1, 1, 1), 1, NULL)));
    CHECK_OK(ctx, mpt_model_build(net, NULL));
    CHECK_OK(ctx, mpt_params_set(mpt_model_params(net), 1, &weight));
    CHECK_OK(ctx, mpt_params_set(mpt_model_params(net), 2, &bias));
    CHECK_OK(ctx, mpt_predict(net, &x, 1, &y));
    CHECK_EQUAL(y, 1 + ldexp(1, -12));
    mpt_model_free(net);
}

/* The same seed gives the same weights in every policy (rounded where there are no masters), another seed others. */
static void test_seed(mpt_context *ctx) {
    mpt_train_desc train = MPT_ZERO;
    mpt_model *a, *b;
    int i;
    train.seed = 77;
    a = build(ctx, policy_of(0), cnn, 0, &train);
    for (i = 1; i < POLICIES; i++) {
        double *p, *q, *tolerance = test_doubles(6 * 36);
        size_t n = mpt_params_count(mpt_model_params(a), 5), j;
        b = build(ctx, policy_of(i), cnn, 0, &train);
        p = doubles_of(a, 5), q = doubles_of(b, 5);
        for (j = 0; j < n && policy_of(i).master == MPT_MASTER_NONE; j++)
            tolerance[j] = test_unit(policy_of(i).param) * fabs(p[j]) + test_tiny(policy_of(i).param);
        CHECK_ALL(q, n, p, tolerance);
        free(p), free(q), free(tolerance);
        mpt_model_free(b);
    }
    train.seed = 78;
    b = build(ctx, policy_of(0), cnn, 0, &train);
    CHECK(!same(state_of(ctx, a), state_of(ctx, b)));
    mpt_model_free(a), mpt_model_free(b);
}

/* ==== MEMORY ==== */

static size_t ledger(const mpt_model *model) {
    const mpt_memory m = mpt_model_memory(model);
    return m.weights + m.masters + m.gradients + m.moments + m.activations + m.workspace + m.bookkeeping;
}

/* The ledger is what the allocator gave; a step, an evaluation, a prediction take nothing more. */
static void test_memory_ledger(mpt_policy policy, const item *items, int squared, const mpt_optimizer_desc *optimizer) {
    test_counter counter;
    const mpt_context_desc desc = test_counting(&counter, 1);
    mpt_context *ctx = test_open(&desc);
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(items, 12, 1);
    float out[12 * CLASSES];
    const int host = strcmp(mpt_device_name(ctx), "cpu") == 0; /* a device's arrays are not the allocator's */
    size_t before = counter.bytes;
    mpt_metrics m;
    mpt_model *model = mpt_model_new(ctx, policy);
    long calls;
    int i;
    if (host) CHECK_EQUAL(ledger(model), counter.bytes - before);
    mpt_model_free(model);
    CHECK_EQUAL(counter.bytes, before);
    train.batch = 4, train.accumulate = 3, train.clip_norm = 1, train.optimizer = *optimizer;
    model = build(ctx, policy, items, squared, &train);
    if (host) CHECK_EQUAL(ledger(model), counter.bytes - before);
    calls = counter.calls;
    for (i = 0; i < 3; i++) {
        CHECK_OK(ctx, mpt_train_step(model, s.x, target_of(&s, squared)));
        CHECK_OK(ctx, mpt_evaluate(model, s.x, target_of(&s, squared), 12, &m));
        CHECK_OK(ctx, mpt_predict(model, s.x, 12, out));
        parts(ctx, model, &s, squared, &train);
    }
    CHECK_EQUAL(counter.calls, calls);
    if (host) CHECK_EQUAL(ledger(model), counter.bytes - before);
    mpt_model_free(model);
    mpt_close(ctx);
    CHECK(test_counter_clean(&counter));
    samples_free(&s);
}

static void test_ledgers(void) {
    const mpt_optimizer_desc optimizers[] = {mpt_sgd(0.1, 0), mpt_sgd(0.1, 0.9), mpt_adam(0.1)};
    int i;
    for (i = 0; i < POLICIES; i++) {
        test_memory_ledger(policy_of(i), mlp, i % 2, &optimizers[i % 3]);
        test_memory_ledger(policy_of(i), cnn, 1 - i % 2, &optimizers[(i + 1) % 3]);
    }
}

/* Bytes a parameter takes by role, as the field counts them: 4, or 2 with 4 for a master; Adam 8. */
static void test_roles(mpt_context *ctx) {
    static const size_t weights[] = {4, 6, 6, 2, 2, 2, 2}, masters[] = {0, 0, 0, 4, 4, 0, 0};
    int i;
    for (i = 0; i < POLICIES; i++) {
        mpt_model *model = build(ctx, policy_of(i), mlp, 0, NULL);
        const size_t n = mpt_params_count(mpt_model_params(model), 0);
        const mpt_memory m = mpt_model_memory(model);
        CHECK_EQUAL(m.weights, weights[i] * n);
        CHECK_EQUAL(m.masters, masters[i] * n);
        CHECK_EQUAL(m.gradients, 4 * n);
        CHECK_EQUAL(m.moments, 8 * n);
        mpt_model_free(model);
    }
}

/* ==== TRAINING ==== */

/* Five points on a circle and noise around them: any policy learns them. */
static void test_toy(mpt_context *ctx, mpt_policy policy, int squared) {
    static const item toy[] = {{'i', 1, 1, 2, 0, 0, 0}, {'l', 0, 0, 24, 0, 0, 0}, {'r', 1, 0, 0, 0, 0, 0},
                               {'l', 2, 0, 5, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 0}};
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(toy, 40, 2);
    mpt_metrics first = MPT_ZERO, last = MPT_ZERO;
    mpt_model *model;
    int i;
    for (i = 0; i < 40; i++) {
        int j;
        s.label[i] = i % CLASSES;
        for (j = 0; j < CLASSES; j++) s.target[i * CLASSES + j] = j == i % CLASSES;
        s.x[2 * i] = 0.2f * s.x[2 * i] + (float)cos(1.2566 * (i % CLASSES));
        s.x[2 * i + 1] = 0.2f * s.x[2 * i + 1] + (float)sin(1.2566 * (i % CLASSES));
    }
    train.batch = 40, train.optimizer = mpt_adam(0.02);
    model = build(ctx, policy, toy, squared, &train);
    CHECK_OK(ctx, mpt_evaluate(model, s.x, target_of(&s, squared), 40, &first));
    for (i = 0; i < 150; i++) CHECK_OK(ctx, mpt_train_step(model, s.x, target_of(&s, squared)));
    CHECK_OK(ctx, mpt_evaluate(model, s.x, target_of(&s, squared), 40, &last));
    CHECK(last.loss < 0.2 * first.loss);
    if (!squared) CHECK_EQUAL(last.correct, 40);
    CHECK(mpt_steps_applied(model) >= 140);
    mpt_model_free(model);
    samples_free(&s);
}

int main(void) {
    mpt_context *ctx = test_open_threads(1);
    int i, squared;
    for (squared = 0; squared <= 1; squared++) {
        test_gradients(ctx, mlp, squared, 9);
        test_gradients(ctx, mlp, squared, 1);
        test_gradients(ctx, cnn, squared, 9);
        test_gradients(ctx, cnn, squared, 5);
        test_gradients(ctx, smooth, squared, 4);
        test_gradients(ctx, curved, squared, 5);
        for (i = 1; i < 5; i++)
            test_mixed_gradients(ctx, i % 2 ? MPT_O1 : MPT_O2, i < 3 ? MPT_F16 : MPT_BF16, squared);
        test_accumulation(ctx, mlp, squared);
        test_accumulation(ctx, cnn, squared);
        test_evaluation(ctx, mlp, squared);
        test_evaluation(ctx, cnn, squared);
        for (i = 0; i < POLICIES; i++) {
            test_parts(ctx, i % 2 ? cnn : mlp, policy_of(i), squared);
            test_bad_data(ctx, policy_of(i), squared);
            test_toy(ctx, policy_of(i), squared);
        }
    }
    for (i = 0; i < POLICIES; i++) {
        test_evaluation_is_neutral(ctx, policy_of(i));
        test_threads(policy_of(i));
    }
    test_divergence(ctx);
    test_order(ctx);
    test_layer_errors(ctx);
    test_window_errors(ctx);
    test_build_errors(ctx);
    test_output_type(ctx);
    test_seed(ctx);
    test_roles(ctx);
    mpt_close(ctx);
    test_ledgers();
    return test_finish("model");
}
