/* model.c - floor 4: whole models against a double forward pass, training, evaluation, memory, builder errors. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include "../reference.h"

/* ==== A MODEL TWICE ==== described once, built in the library, and evaluated in double here */

typedef struct item {
    char kind; /* i input, l linear, c conv2d, k conv2d without bias, r relu, m max pool, a average pool, g global
                  average, f flatten, + add, | concat, N batch norm, Y layer norm, P group norm, D dropout;
                  L leaky relu, T tanh, S sigmoid, G gelu, H gelu by tanh, U silu */
    int a, b;  /* inputs: indices into the items; of an input H, W; of a convolution b is its groups, 0: 1 */
    int units; /* outputs, filters, channels; groups of a norm */
    int kernel, stride, padding; /* padding -1: the default of conv2d */
} item;

enum { MOST_ITEMS = 24 };

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
static const item smooth[] = {{'i', 6, 6, 3, 0, 0, 0}, {'c', 0, 0, 5, 3, 1, -1}, {'c', 1, 0, 5, 1, 1, -1},
                              {'+', 1, 2, 0, 0, 0, 0}, {'c', 3, 0, 8, 2, 2, 0},  {'g', 4, 0, 0, 0, 0, 0},
                              {'l', 5, 0, 5, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 0}};

/* The other activations: some a product can compute in passing, some keep their input; one input is used twice. */
static const item curved[] = {{'i', 6, 6, 3, 0, 0, 0},  {'c', 0, 0, 4, 3, 1, -1}, {'G', 1, 0, 0, 0, 0, 0},
                              {'T', 1, 0, 0, 0, 0, 0},  {'+', 2, 3, 0, 0, 0, 0},  {'L', 4, 0, 0, 0, 0, 0},
                              {'c', 5, 0, 6, 2, 2, 0},  {'U', 6, 0, 0, 0, 0, 0},  {'l', 7, 0, 9, 0, 0, 0},
                              {'S', 8, 0, 0, 0, 0, 0},  {'l', 9, 0, 8, 0, 0, 0},  {'H', 10, 0, 0, 0, 0, 0},
                              {'l', 11, 0, 5, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 0}};

/* Norms with a ReLU behind them, with another activation, with none and two readers; convolutions in groups and
   depthwise; values side by side, one of them used elsewhere, too. */
static const item normed[] = {{'i', 6, 6, 3, 0, 0, 0},  {'k', 0, 0, 8, 3, 1, -1}, {'N', 1, 0, 0, 0, 0, 0},
                              {'r', 2, 0, 0, 0, 0, 0},  {'c', 3, 8, 8, 3, 1, -1}, {'P', 4, 0, 2, 0, 0, 0},
                              {'U', 5, 0, 0, 0, 0, 0},  {'|', 3, 6, 0, 0, 0, 0},  {'k', 7, 2, 8, 2, 2, 0},
                              {'N', 8, 0, 0, 0, 0, 0},  {'c', 9, 0, 8, 3, 1, -1}, {'Y', 10, 0, 0, 0, 0, 0},
                              {'+', 9, 11, 0, 0, 0, 0}, {'r', 12, 0, 0, 0, 0, 0}, {'g', 13, 0, 0, 0, 0, 0},
                              {'l', 14, 0, 5, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 0}};
static const int batch_norms[] = {2, 9}; /* of normed */

/* The same without a kink. */
static const item even[] = {{'i', 6, 6, 3, 0, 0, 0}, {'k', 0, 0, 8, 3, 1, -1}, {'N', 1, 0, 0, 0, 0, 0},
                            {'T', 2, 0, 0, 0, 0, 0}, {'c', 3, 2, 8, 3, 1, -1}, {'P', 4, 0, 2, 0, 0, 0},
                            {'T', 5, 0, 0, 0, 0, 0}, {'|', 3, 6, 0, 0, 0, 0},  {'c', 7, 0, 8, 2, 2, 0},
                            {'Y', 8, 0, 0, 0, 0, 0}, {'T', 9, 0, 0, 0, 0, 0},  {'l', 10, 0, 5, 0, 0, 0},
                            {0, 0, 0, 0, 0, 0, 0}};

/* Sums whose gradient is also that of an input: of the first, of the second because the first is read later, of a sum,
   of one with a ReLU behind it; and one both of whose inputs are read later. */
static const item sums[] = {
    {'i', 5, 5, 4, 0, 0, 0},   {'k', 0, 0, 4, 3, 1, -1},  {'N', 1, 0, 0, 0, 0, 0},   {'r', 2, 0, 0, 0, 0, 0},
    {'k', 3, 0, 4, 3, 1, -1},  {'N', 4, 0, 0, 0, 0, 0},   {'r', 5, 0, 0, 0, 0, 0},   {'+', 3, 6, 0, 0, 0, 0},
    {'c', 7, 0, 4, 1, 1, -1},  {'T', 8, 0, 0, 0, 0, 0},   {'+', 7, 9, 0, 0, 0, 0},   {'r', 10, 0, 0, 0, 0, 0},
    {'c', 11, 0, 4, 1, 1, 0},  {'+', 12, 3, 0, 0, 0, 0},  {'+', 13, 11, 0, 0, 0, 0}, {'+', 11, 3, 0, 0, 0, 0},
    {'+', 15, 14, 0, 0, 0, 0}, {'+', 16, 11, 0, 0, 0, 0}, {'+', 17, 3, 0, 0, 0, 0},  {'g', 18, 0, 0, 0, 0, 0},
    {'l', 19, 0, 5, 0, 0, 0},  {0, 0, 0, 0, 0, 0, 0}};

/* All new kinds at once, dropout among them. */
static const item mixed[] = {{'i', 6, 6, 4, 0, 0, 0},  {'k', 0, 2, 8, 3, 1, -1}, {'N', 1, 0, 0, 0, 0, 0},
                             {'r', 2, 0, 0, 0, 0, 0},  {'D', 3, 0, 0, 0, 0, 0},  {'c', 4, 8, 8, 3, 1, -1},
                             {'P', 5, 0, 4, 0, 0, 0},  {'|', 6, 3, 0, 0, 0, 0},  {'Y', 7, 0, 0, 0, 0, 0},
                             {'r', 8, 0, 0, 0, 0, 0},  {'l', 9, 0, 12, 0, 0, 0}, {'D', 10, 0, 0, 0, 0, 0},
                             {'l', 11, 0, 5, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 0}};

static const float drop_share = 0.4f;

static int add_item(mpt_model *net, const item *it, const int *id) {
    mpt_conv2d_desc conv = MPT_ZERO;
    mpt_pool2d_desc pool = MPT_ZERO;
    const int a = it->kind == 'i' ? 0 : id[it->a];
    conv.stride = pool.stride = it->stride;
    conv.padding = it->padding > 0 ? it->padding : 0;
    conv.no_padding = it->padding == 0;
    conv.no_bias = it->kind == 'k';
    conv.groups = it->b;
    pool.padding = it->padding;
    switch (it->kind) {
    case 'i': return mpt_input(net, it->a, it->b, it->units);
    case 'l': return mpt_linear(net, a, it->units, NULL);
    case 'c':
    case 'k': return mpt_conv2d(net, a, it->units, it->kernel, &conv);
    case 'N': return mpt_batch_norm(net, a, NULL);
    case 'Y': return mpt_layer_norm(net, a, NULL);
    case 'P': return mpt_group_norm(net, a, it->units, NULL);
    case 'D': return mpt_dropout(net, a, drop_share);
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
    case '|': return mpt_concat(net, a, id[it->b]);
    default: return mpt_add(net, a, id[it->b]);
    }
}

static int add_loss(mpt_model *net, int id, mpt_loss_kind loss, const mpt_cross_entropy_desc *desc) {
    switch (loss) {
    case MPT_LOSS_SQUARED_ERROR: return mpt_mse(net, id);
    case MPT_LOSS_BCE_WITH_LOGITS: return mpt_bce_with_logits(net, id);
    case MPT_LOSS_ABSOLUTE_ERROR: return mpt_l1(net, id);
    case MPT_LOSS_HUBER: return mpt_huber(net, id);
    default: return mpt_softmax_cross_entropy(net, id, desc);
    }
}

/* What a model is made of. */
typedef struct recipe {
    const item *items;
    mpt_loss_kind loss;
    const mpt_cross_entropy_desc *desc;
    int first, last; /* items that are made with O0; last 0: none */
} recipe;

static mpt_model *build_recipe(mpt_context *ctx, mpt_policy policy, const recipe *r, const mpt_train_desc *train) {
    mpt_model *net = mpt_model_new(ctx, policy);
    int id[MOST_ITEMS], i;
    for (i = 0; r->items[i].kind; i++) {
        if (r->last && i == r->first) CHECK_OK(ctx, mpt_policy_push(net, mpt_policy_preset(MPT_O0, MPT_F32)));
        id[i] = add_item(net, &r->items[i], id);
        CHECK(id[i] == i + 1);
        if (r->last && i == r->last) CHECK_OK(ctx, mpt_policy_pop(net));
    }
    CHECK(add_loss(net, id[i - 1], r->loss, r->desc) == i + 1);
    if (!CHECK_OK(ctx, mpt_model_build(net, train))) exit(test_finish("model"));
    return net;
}

static mpt_model *build(mpt_context *ctx, mpt_policy policy, const item *items, mpt_loss_kind loss,
                        const mpt_train_desc *train) {
    recipe r = MPT_ZERO;
    r.items = items, r.loss = loss;
    return build_recipe(ctx, policy, &r, train);
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
    test_floats(s.target, n * CLASSES, 0, 1, seed + 1);
    for (i = 0; i < n; i++) s.label[i] = (int32_t)(mpt_hash(seed, 2, 0, i) % CLASSES);
    return s;
}

/* Those from the first on; not to be freed. */
static samples samples_from(const samples *s, size_t first) {
    samples later = *s;
    later.x += first * s->features, later.target += first * CLASSES, later.label += first;
    return later;
}

static void samples_free(samples *s) { free(s->x), free(s->target), free(s->label); }

static const void *target_of(const samples *s, mpt_loss_kind loss) {
    return loss == MPT_LOSS_CROSS_ENTROPY ? (const void *)s->label : (const void *)s->target;
}

/* ==== THE SAME MODEL IN DOUBLE ==== */

typedef struct net64 {
    const item *items;
    mpt_loss_kind loss;
    mpt_cross_entropy_desc desc; /* class_weights: host memory */
    const samples *s;
    size_t n; /* samples */
    size_t H[MOST_ITEMS], W[MOST_ITEMS], C[MOST_ITEMS];
    double *value[MOST_ITEMS];
    double *weight[MOST_ITEMS], *bias[MOST_ITEMS];   /* gamma, beta */
    double *stats[MOST_ITEMS], *running[MOST_ITEMS]; /* of norms; of batch norms */
    double *tensor[2 * MOST_ITEMS];                  /* weights and biases by the ids of mpt_params */
    double *mask;                                    /* of a dropout; NULL: it keeps all */
    double *target, *row_loss;
    int evaluation; /* batch norms take the running statistics */
    int last;       /* item */
} net64;

static size_t size64(const net64 *net, int i) { return net->H[i] * net->W[i] * net->C[i]; }

static int is_convolution(char kind) { return kind == 'c' || kind == 'k'; }
static int is_norm(char kind) { return kind == 'N' || kind == 'Y' || kind == 'P'; }

static mpt_conv2d_shape conv64(const net64 *net, int i) {
    const item *it = &net->items[i];
    mpt_conv2d_shape s = MPT_ZERO;
    s.N = net->n, s.K = net->C[i], s.groups = 1;
    if (it->kind == 'l') {
        s.H = s.W = s.R = s.S = 1;
        s.C = size64(net, it->a);
        return s;
    }
    s.H = net->H[it->a], s.W = net->W[it->a], s.C = net->C[it->a];
    s.R = s.S = (size_t)it->kernel;
    s.stride = (size_t)it->stride;
    s.padding = (size_t)(it->padding < 0 ? (it->kernel - 1) / 2 : it->padding);
    if (it->b) s.groups = (size_t)it->b;
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

static mpt_norm_shape norm64(const net64 *net, int i) {
    const size_t pixels = net->H[i] * net->W[i];
    const char kind = net->items[i].kind;
    mpt_norm_shape s = MPT_ZERO;
    s.C = net->C[i];
    s.N = kind == 'N' ? 1 : kind == 'Y' ? net->n * pixels : net->n;
    s.pixels = kind == 'N' ? net->n * pixels : kind == 'Y' ? 1 : pixels;
    s.groups = kind == 'N' ? s.C : kind == 'Y' ? 1 : (size_t)net->items[i].units;
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
    if (is_convolution(it->kind)) {
        const mpt_conv2d_shape s = conv64(net, i);
        out_h = (s.H + 2 * s.padding - s.R) / s.stride + 1, out_w = (s.W + 2 * s.padding - s.S) / s.stride + 1;
    }
    if (it->kind == 'm' || it->kind == 'a') {
        const mpt_pool2d_shape s = pool64(net, i);
        out_h = (s.H + 2 * s.padding - s.R) / s.stride + 1, out_w = (s.W + 2 * s.padding - s.S) / s.stride + 1;
    }
    if (it->kind == 'f') net->C[i] = size64(net, it->a);
    if (it->kind == '|') net->C[i] += net->C[it->b];
    if (strchr("lck", it->kind)) net->C[i] = (size_t)it->units;
    if (strchr("lfgckma", it->kind)) net->H[i] = out_h, net->W[i] = out_w;
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

/* Running mean and variance (2,C) of a batch norm. */
static double *running_of(mpt_context *ctx, mpt_model *model, int node, size_t C) {
    float *x = (float *)test_memory(2 * C * sizeof *x);
    double *v = test_doubles(2 * C);
    size_t i;
    CHECK_OK(ctx, mpt_download(ctx, x, mpt_model_running(model, node), 2 * C * sizeof *x));
    for (i = 0; i < 2 * C; i++) v[i] = (double)x[i];
    free(x);
    return v;
}

/* Takes the weights and statistics that the model has now, its tensors being those of the items in their order. */
static net64 net64_new(mpt_context *ctx, mpt_model *model, const item *items, mpt_loss_kind loss, const samples *s,
                       size_t n) {
    net64 net;
    size_t i, outputs;
    int id = 0;
    memset(&net, 0, sizeof net);
    net.items = items, net.loss = loss, net.s = s, net.n = n;
    for (net.last = 0; items[net.last].kind; net.last++) {
        const int k = net.last;
        const char kind = items[k].kind;
        shape64(&net, k);
        net.value[k] = test_doubles(n * size64(&net, k));
        if (is_norm(kind)) net.stats[k] = test_doubles(2 * n * size64(&net, k));
        if (kind == 'N') net.running[k] = running_of(ctx, model, k + 1, net.C[k]);
        if (!is_norm(kind) && !is_convolution(kind) && kind != 'l') continue;
        id++, net.tensor[id] = net.weight[k] = doubles_of(model, id);
        if (kind != 'k') id++, net.tensor[id] = net.bias[k] = doubles_of(model, id);
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
    for (i = 0; i < MOST_ITEMS; i++) {
        free(net->value[i]), free(net->weight[i]), free(net->bias[i]);
        free(net->stats[i]), free(net->running[i]);
    }
    free(net->target), free(net->row_loss), free(net->mask);
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

static void norm64_item(net64 *net, int i) {
    const mpt_norm_shape s = norm64(net, i);
    const double *x = net->value[net->items[i].a];
    if (net->items[i].kind == 'N' && net->evaluation) memcpy(net->stats[i], net->running[i], 2 * s.C * sizeof(double));
    else reference_norm_stats(&s, x, net->stats[i]);
    reference_norm(&s, x, net->stats[i], net->weight[i], net->bias[i], net->value[i]);
}

static void concat64_item(net64 *net, int i) {
    const size_t first = net->C[net->items[i].a], second = net->C[net->items[i].b], C = first + second;
    size_t j;
    for (j = 0; j < net->n * size64(net, i); j++) {
        const size_t c = j % C;
        net->value[i][j] = c < first ? net->value[net->items[i].a][j / C * first + c]
                                     : net->value[net->items[i].b][j / C * second + c - first];
    }
}

static void forward64_item(net64 *net, int i) {
    const item *it = &net->items[i];
    double *x = net->value[it->a], *y = net->value[i];
    const size_t count = net->n * size64(net, i);
    size_t j;
    if (is_convolution(it->kind) || it->kind == 'l') {
        const mpt_conv2d_shape s = conv64(net, i);
        for (j = 0; j < count; j++) y[j] = net->bias[i] ? net->bias[i][j % net->C[i]] : 0;
        reference_conv2d(MPT_FORWARD, &s, net->H[i], net->W[i], x, net->weight[i], y);
    } else if (strchr("mag", it->kind)) {
        const mpt_pool2d_shape s = pool64(net, i);
        long *place = (long *)test_memory(count * sizeof *place);
        reference_pool2d(it->kind == 'm' ? MPT_POOL_MAX : MPT_POOL_AVERAGE, &s, net->H[i], net->W[i], x, y, place);
        free(place);
    } else if (is_norm(it->kind)) {
        norm64_item(net, i);
    } else if (it->kind == '|') {
        concat64_item(net, i);
    } else {
        for (j = 0; j < count; j++) y[j] = activation64(it->kind, x[j]);
        for (j = 0; j < count && it->kind == '+'; j++) y[j] += net->value[it->b][j];
        for (j = 0; j < count && it->kind == 'D' && net->mask; j++) y[j] *= net->mask[j];
    }
}

/* Loss of a row as it counts in the mean, and its weight there. */
static double row_loss64(const net64 *net, size_t row, double *weight) {
    const size_t outputs = size64(net, net->last);
    const double *x = net->value[net->last] + row * outputs;
    const int32_t label = net->s->label[row];
    double weights[CLASSES];
    size_t c;
    *weight = 1;
    if (net->loss != MPT_LOSS_CROSS_ENTROPY)
        return reference_row_loss(net->loss, x, net->target + row * outputs, outputs);
    *weight = 0;
    if (net->desc.ignore && label == net->desc.ignore_index) return 0;
    for (c = 0; c < CLASSES; c++) weights[c] = net->desc.class_weights ? (double)net->desc.class_weights[c] : 1;
    *weight = weights[label];
    return reference_cross_entropy(x, outputs, (size_t)label, (double)net->desc.label_smoothing, weights);
}

/* The mean loss. */
static double loss64(void *user) {
    net64 *net = (net64 *)user;
    double sum = 0, weights = 0, weight;
    size_t row;
    int i;
    for (i = 1; i <= net->last; i++) forward64_item(net, i);
    for (row = 0; row < net->n; row++) {
        net->row_loss[row] = row_loss64(net, row, &weight);
        sum += net->row_loss[row];
        weights += weight;
    }
    return sum / weights;
}

/* Operations that a value passes, one rounding each: at every layer the terms of its sum forward and backward, at a
   norm those of its statistics and 20 more each way, at the loss those of the classes, and at the weight those of its
   own gradient's sum. */
static double roundings(const net64 *net) {
    double count = 4 * CLASSES + 20, largest = 0;
    int i;
    for (i = 1; i <= net->last; i++) {
        const char kind = net->items[i].kind;
        if (is_convolution(kind) || kind == 'l') {
            const mpt_conv2d_shape s = conv64(net, i);
            const double rows = (double)(net->n * net->H[i] * net->W[i]);
            count += (double)(s.R * s.S * (s.C + s.K)) + 10;
            if (rows > largest) largest = rows;
        } else if (kind == 'a' || kind == 'g') {
            const mpt_pool2d_shape s = pool64(net, i);
            count += 2 * (double)(s.R * s.S) + 4;
        } else if (is_norm(kind)) {
            const mpt_norm_shape s = norm64(net, i);
            count += 2 * reference_norm_count(&s) + 40;
        } else count += 4;
    }
    return count + largest;
}

static mpt_policy policy_of(int i) { /* 0: O0, then O1..O3 in fp16 and bf16 */
    return mpt_policy_preset(i ? (mpt_level)((i + 1) / 2) : MPT_O0, i % 2 ? MPT_F16 : MPT_BF16);
}
enum { POLICIES = 7 };

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
static void test_gradients(mpt_context *ctx, const item *items, mpt_loss_kind loss, size_t n) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(items, n, 3);
    mpt_model *model;
    net64 net;
    double error;
    train.batch = 9, train.seed = 5;
    model = build(ctx, mpt_policy_preset(MPT_O0, MPT_F32), items, loss, &train);
    net = net64_new(ctx, model, items, loss, &s, n);
    error = roundings(&net) * test_unit(MPT_F32);
    CHECK_OK(ctx, mpt_forward(model, s.x, target_of(&s, loss), (int)n));
    CHECK_NEAR(mpt_loss(model), loss64(&net), error * loss64(&net));
    CHECK_OK(ctx, mpt_backward(model));
    check_slopes(ctx, model, &net, error);
    net64_free(&net), samples_free(&s);
    mpt_model_free(model);
}

/* Mixed precision: 16-bit roundings of every activation, weight and gradient on the way, three a layer each way, each
   at most u of the largest. */
static void test_mixed_gradients(mpt_context *ctx, mpt_policy policy, const recipe *r) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(r->items, 8, 3);
    mpt_model *model;
    net64 net;
    train.batch = 8, train.seed = 6;
    model = build_recipe(ctx, policy, r, &train);
    net = net64_new(ctx, model, r->items, r->loss, &s, 8);
    CHECK_OK(ctx, mpt_forward(model, s.x, target_of(&s, r->loss), 8));
    CHECK_OK(ctx, mpt_backward(model));
    check_slopes(ctx, model, &net, 6 * (net.last + 1) * test_unit(policy.compute));
    net64_free(&net), samples_free(&s);
    mpt_model_free(model);
}

static void test_all_mixed_gradients(mpt_context *ctx) {
    static const recipe recipes[] = {
        {smooth, MPT_LOSS_CROSS_ENTROPY, NULL, 0, 0}, {smooth, MPT_LOSS_SQUARED_ERROR, NULL, 0, 0},
        {even, MPT_LOSS_CROSS_ENTROPY, NULL, 0, 0},   {even, MPT_LOSS_BCE_WITH_LOGITS, NULL, 0, 0},
        {even, MPT_LOSS_CROSS_ENTROPY, NULL, 4, 8}, /* the middle in fp32 */
        {smooth, MPT_LOSS_CROSS_ENTROPY, NULL, 0, 2}};
    size_t i;
    int j;
    for (i = 0; i < sizeof recipes / sizeof *recipes; i++)
        for (j = 1; j < 5; j++)
            test_mixed_gradients(ctx, mpt_policy_preset(j % 2 ? MPT_O1 : MPT_O2, j < 3 ? MPT_F16 : MPT_BF16),
                                 &recipes[i]);
}

/* Weights of classes, smoothing and rows that do not count. The weights are the build's own copy from then on. */
static void test_class_weights(mpt_context *ctx) {
    static const float kept[CLASSES] = {0.5f, 2, 0.25f, 1, 1.5f};
    float weights[CLASSES];
    mpt_cross_entropy_desc desc = MPT_ZERO;
    mpt_train_desc train = MPT_ZERO;
    recipe r = {mlp, MPT_LOSS_CROSS_ENTROPY, NULL, 0, 0};
    samples s = samples_new(mlp, 11, 3);
    mpt_metrics m;
    mpt_model *model;
    net64 net;
    double error;
    memcpy(weights, kept, sizeof weights);
    desc.class_weights = weights, desc.label_smoothing = 0.1f, desc.ignore = 1, desc.ignore_index = -100;
    r.desc = &desc, s.label[2] = s.label[7] = -100;
    train.batch = 4, train.seed = 5;
    model = build_recipe(ctx, policy_of(0), &r, &train);
    memset(weights, 0xff, sizeof weights);
    desc.class_weights = kept;
    net = net64_new(ctx, model, mlp, MPT_LOSS_CROSS_ENTROPY, &s, 11);
    net.desc = desc;
    error = roundings(&net) * test_unit(MPT_F32);
    CHECK_OK(ctx, mpt_evaluate(model, s.x, s.label, 11, &m)); /* the mean over all, not of the batches' means */
    CHECK_NEAR(m.loss, loss64(&net), error * loss64(&net));
    CHECK_EQUAL(m.samples, 9);
    net.n = 4;
    CHECK_OK(ctx, mpt_forward(model, s.x, s.label, 4));
    CHECK_NEAR(mpt_loss(model), loss64(&net), error * loss64(&net));
    CHECK_OK(ctx, mpt_backward(model));
    check_slopes(ctx, model, &net, error);
    s.label[1] = -1;
    CHECK_ERROR(ctx, mpt_train_step(model, s.x, s.label), MPT_ERROR_VALUE, "label");
    net64_free(&net), samples_free(&s);
    mpt_model_free(model);
}

/* ==== STEPS ==== */

/* All that a step changes: masters or weights, running statistics, and the optimizer's and the scaler's state. */
typedef struct training_state {
    float *weight; /* and the statistics behind them */
    size_t count;
    mpt_optimizer_state optimizer;
    mpt_scaler_state scaler;
} training_state;

static training_state state_of(mpt_context *ctx, mpt_model *model) {
    mpt_params *params = mpt_model_params(model);
    const size_t weights = mpt_params_count(params, 0);
    training_state s;
    mpt_node_info info;
    int id;
    memset(&s, 0, sizeof s);
    s.count = weights;
    for (id = 1; mpt_model_node(model, id, &info) == MPT_OK; id++)
        if (mpt_model_running(model, id)) s.count += 2 * (size_t)info.C;
    s.weight = (float *)test_memory(s.count * sizeof *s.weight);
    CHECK_OK(ctx, mpt_params_get(params, 0, s.weight));
    s.count = weights;
    for (id = 1; mpt_model_node(model, id, &info) == MPT_OK; id++) {
        const size_t floats = 2 * (size_t)info.C;
        if (!mpt_model_running(model, id)) continue;
        CHECK_OK(ctx, mpt_download(ctx, s.weight + s.count, mpt_model_running(model, id), floats * sizeof *s.weight));
        s.count += floats;
    }
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

static void parts(mpt_context *ctx, mpt_model *model, const samples *s, mpt_loss_kind loss,
                  const mpt_train_desc *train) {
    int i;
    for (i = 0; i < train->accumulate; i++) {
        const samples some = samples_from(s, (size_t)i * (size_t)train->batch);
        CHECK_OK(ctx, mpt_forward(model, some.x, target_of(&some, loss), train->batch));
        CHECK_OK(ctx, mpt_backward(model));
    }
    CHECK_OK(ctx, mpt_unscale(mpt_model_optimizer(model)));
    CHECK_OK(ctx, mpt_clip_norm(mpt_model_optimizer(model), train->clip_norm));
    CHECK_OK(ctx, mpt_step(mpt_model_optimizer(model)));
    CHECK_OK(ctx, mpt_scaler_update(mpt_model_scaler(model)));
}

/* mpt_train_step is its parts, bit for bit; in fp16 the first steps are skipped ones. */
static void test_parts(mpt_context *ctx, const item *items, mpt_policy policy, mpt_loss_kind loss) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(items, 12, 8);
    mpt_model *whole, *taken;
    int i;
    train.batch = 6, train.accumulate = 2, train.clip_norm = 0.3, train.seed = 2;
    train.scaler.init_scale = 16777216;
    whole = build(ctx, policy, items, loss, &train);
    taken = build(ctx, policy, items, loss, &train);
    CHECK(same(state_of(ctx, whole), state_of(ctx, taken)));
    for (i = 0; i < 6; i++) {
        CHECK_OK(ctx, mpt_train_step(whole, s.x, target_of(&s, loss)));
        parts(ctx, taken, &s, loss, &train);
        CHECK(same(state_of(ctx, whole), state_of(ctx, taken)));
        CHECK_EQUAL(mpt_loss(whole), mpt_loss(taken));
    }
    CHECK_EQUAL(mpt_steps_applied(whole) + mpt_steps_skipped(whole), 6);
    mpt_model_free(whole), mpt_model_free(taken);
    samples_free(&s);
}

/* 8 samples at once, or 4 and 4: the same sums in another order, so gradients differ by at most twice their error. */
static void test_accumulation(mpt_context *ctx, const item *items, mpt_loss_kind loss) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(items, 8, 4);
    mpt_model *once, *twice;
    net64 net;
    double error;
    int tensor;
    train.batch = 8, train.seed = 3, train.optimizer = mpt_sgd(0.1, 0);
    once = build(ctx, policy_of(0), items, loss, &train);
    train.batch = 4, train.accumulate = 2;
    twice = build(ctx, policy_of(0), items, loss, &train);
    net = net64_new(ctx, once, items, loss, &s, 8);
    error = 2 * roundings(&net) * test_unit(MPT_F32);
    CHECK_OK(ctx, mpt_train_step(once, s.x, target_of(&s, loss)));
    CHECK_OK(ctx, mpt_train_step(twice, s.x, target_of(&s, loss)));
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

/* One step on 8 samples by passes over `rows` of them; 0 ends the list, and `rows` alone is mpt_train_step. */
static void step_by(mpt_context *ctx, mpt_model *model, const samples *s, mpt_loss_kind loss, const int *rows) {
    size_t done = 0;
    if (!rows) {
        CHECK_OK(ctx, mpt_train_step(model, s->x, target_of(s, loss)));
        return;
    }
    for (; *rows; done += (size_t)*rows++) {
        const samples some = samples_from(s, done);
        CHECK_OK(ctx, mpt_forward(model, some.x, target_of(&some, loss), *rows));
        CHECK_OK(ctx, mpt_backward(model));
    }
    CHECK_OK(ctx, mpt_unscale(mpt_model_optimizer(model)));
    CHECK_OK(ctx, mpt_step(mpt_model_optimizer(model)));
    CHECK_OK(ctx, mpt_scaler_update(mpt_model_scaler(model)));
}

/* A step is defined by its samples: however 8 of them are dealt out to passes, and whatever they weigh, it is the step
   of the whole batch. The same sums in another order, so weights differ by at most twice the error of a gradient. */
static void test_samples(mpt_context *ctx, mpt_policy policy, const recipe *r, int batch, int accumulate,
                         const int *rows) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(r->items, 8, 4);
    mpt_optimizer_state a, b;
    mpt_model *once, *split;
    net64 net;
    double error;
    int tensor;
    s.label[1] = s.label[4] = s.label[5] = r->desc && r->desc->ignore ? r->desc->ignore_index : s.label[1];
    train.batch = 8, train.seed = 3, train.optimizer = mpt_sgd(0.1, 0), train.scaler.init_scale = 1024;
    once = build_recipe(ctx, policy, r, &train);
    train.batch = batch, train.accumulate = accumulate;
    split = build_recipe(ctx, policy, r, &train);
    net = net64_new(ctx, once, r->items, r->loss, &s, 8);
    error = 2 * roundings(&net) * test_unit(policy.compute);
    step_by(ctx, once, &s, r->loss, NULL);
    step_by(ctx, split, &s, r->loss, rows);
    CHECK_NEAR(mpt_loss(split), mpt_loss(once), error * mpt_loss(once));
    CHECK_OK(ctx, mpt_optimizer_get_state(mpt_model_optimizer(once), &a));
    CHECK_OK(ctx, mpt_optimizer_get_state(mpt_model_optimizer(split), &b));
    CHECK(a.applied == 1 && b.applied == 1);
    CHECK_NEAR(b.grad_norm, a.grad_norm, error * a.grad_norm);
    for (tensor = 1; tensor <= mpt_params_tensors(mpt_model_params(once)); tensor++) {
        const size_t n = mpt_params_count(mpt_model_params(once), tensor);
        double *g = gradient_of(ctx, once, tensor);
        double *p = doubles_of(once, tensor), *q = doubles_of(split, tensor), *tolerance = test_doubles(n);
        size_t i;
        for (i = 0; i < n; i++)
            tolerance[i] = 0.1 * error * largest_of(g, n) + 4 * test_unit(MPT_F32) * (fabs(p[i]) + 0.1 * fabs(g[i]));
        CHECK_ALL(q, n, p, tolerance);
        free(g), free(p), free(q), free(tolerance);
    }
    net64_free(&net), samples_free(&s);
    mpt_model_free(once), mpt_model_free(split);
}

static void test_all_samples(mpt_context *ctx) {
    static const float weights[CLASSES] = {0.5f, 2, 0.25f, 1, 1.5f};
    static const int uneven[] = {5, 2, 1, 0}, more[] = {1, 1, 3, 3, 0}, whole[] = {8, 0};
    mpt_cross_entropy_desc descs[3];
    recipe r = {mlp, MPT_LOSS_CROSS_ENTROPY, NULL, 0, 0};
    int i, loss;
    memset(descs, 0, sizeof descs);
    descs[0].ignore = descs[2].ignore = 1, descs[0].ignore_index = descs[2].ignore_index = -100;
    descs[1].class_weights = descs[2].class_weights = weights;
    descs[2].label_smoothing = 0.1f;
    for (i = 0; i < MPT_LOSS_GRADIENT + 3; i++) {
        loss = i < MPT_LOSS_GRADIENT ? i : (int)MPT_LOSS_CROSS_ENTROPY;
        r.loss = (mpt_loss_kind)loss;
        r.desc = i < MPT_LOSS_GRADIENT ? NULL : &descs[i - MPT_LOSS_GRADIENT];
        test_samples(ctx, policy_of(0), &r, 4, 2, NULL);
        test_samples(ctx, policy_of(0), &r, 2, 4, NULL);
        test_samples(ctx, policy_of(0), &r, 1, 8, NULL); /* the second pass weighs nothing where labels are ignored */
        test_samples(ctx, policy_of(0), &r, 5, 3, uneven);
        test_samples(ctx, policy_of(0), &r, 3, 1, more);
        test_samples(ctx, policy_of(0), &r, 32, 1, whole);
        test_samples(ctx, mpt_policy_preset(MPT_O1, MPT_F16), &r, 2, 4, NULL);
    }
}

/* A sample that is ignored adds nothing, wherever it stands: the step of {0,-100},{1,2} is that of {0,1,2}. */
static void test_ignored(mpt_context *ctx) {
    mpt_cross_entropy_desc desc = MPT_ZERO;
    mpt_train_desc train = MPT_ZERO;
    recipe r = {mlp, MPT_LOSS_CROSS_ENTROPY, NULL, 0, 0};
    samples s = samples_new(mlp, 4, 4), kept = samples_new(mlp, 4, 4);
    const size_t features = 7;
    mpt_model *all, *three;
    double *p, *q, error;
    net64 net;
    size_t i, n;
    desc.ignore = 1, desc.ignore_index = -100;
    r.desc = &desc;
    s.label[0] = kept.label[0] = 0, s.label[1] = -100, s.label[2] = kept.label[1] = 1, s.label[3] = kept.label[2] = 2;
    memcpy(kept.x + features, s.x + 2 * features, 2 * features * sizeof *s.x);
    train.batch = 2, train.accumulate = 2, train.seed = 3, train.optimizer = mpt_sgd(1, 0);
    all = build_recipe(ctx, policy_of(0), &r, &train);
    train.batch = 3, train.accumulate = 1;
    three = build_recipe(ctx, policy_of(0), &r, &train);
    CHECK_OK(ctx, mpt_train_step(all, s.x, s.label));
    CHECK_OK(ctx, mpt_train_step(three, kept.x, kept.label));
    net = net64_new(ctx, three, mlp, MPT_LOSS_CROSS_ENTROPY, &kept, 3);
    error = 2 * roundings(&net) * test_unit(MPT_F32); /* of sizes about 1 */
    CHECK_NEAR(mpt_loss(all), mpt_loss(three), error * mpt_loss(three));
    n = mpt_params_count(mpt_model_params(all), 0);
    p = doubles_of(all, 0), q = doubles_of(three, 0);
    for (i = 0; i < n; i++) CHECK_NEAR(p[i], q[i], error);
    free(p), free(q);
    net64_free(&net);
    mpt_model_free(all), mpt_model_free(three);
    samples_free(&s), samples_free(&kept);
}

/* A step without any weight changes nothing but the counters and the journal: not the weights (which decay and old
   moments would move), the statistics, nor the scale and its trackers. */
static void test_empty_step(mpt_context *ctx, mpt_policy policy) {
    static const float none[CLASSES] = {1, 1, 0, 1, 1};
    mpt_cross_entropy_desc desc = MPT_ZERO;
    mpt_train_desc train = MPT_ZERO;
    recipe r = {mixed, MPT_LOSS_CROSS_ENTROPY, NULL, 0, 0};
    samples s = samples_new(mixed, 4, 4);
    training_state before, after;
    mpt_model *model;
    int i, round;
    desc.ignore = 1, desc.ignore_index = -100, desc.class_weights = none;
    r.desc = &desc;
    train.batch = 4, train.optimizer = mpt_adamw(0.1), train.scaler.growth_interval = 3;
    train.scaler.init_scale = 1024;
    model = build_recipe(ctx, policy, &r, &train);
    for (i = 0; i < 2; i++) CHECK_OK(ctx, mpt_train_step(model, s.x, s.label));
    CHECK_EQUAL(mpt_steps_applied(model), 2);
    for (round = 0; round < 12; round++) { /* over the patience */
        for (i = 0; i < 4; i++) s.label[i] = round % 2 ? 2 : -100;
        before = state_of(ctx, model);
        CHECK_OK(ctx, mpt_train_step(model, s.x, s.label));
        CHECK_EQUAL(mpt_loss(model), 0);
        after = state_of(ctx, model);
        CHECK_EQUAL(after.optimizer.skipped, round + 1);
        CHECK_EQUAL(after.optimizer.applied, 2);
        CHECK_EQUAL(after.optimizer.found, MPT_SKIP_EMPTY);
        CHECK_EQUAL(after.optimizer.journal[round].reason, MPT_SKIP_EMPTY);
        CHECK_EQUAL(after.optimizer.journal[round].tensor, 0);
        CHECK(memcmp(&before.scaler, &after.scaler, sizeof before.scaler) == 0);
        memset(&before.optimizer, 0, sizeof before.optimizer), memset(&after.optimizer, 0, sizeof after.optimizer);
        CHECK(same(before, after));
    }
    for (i = 0; i < 4; i++) s.label[i] = 1;
    CHECK_OK(ctx, mpt_train_step(model, s.x, s.label));
    CHECK_EQUAL(mpt_steps_applied(model), 3);
    mpt_model_free(model);
    samples_free(&s);
}

/* A forward pass that no backward pass follows has no part in the step, nor in what the step is divided by. */
static void test_abandoned_weight(mpt_context *ctx) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(mlp, 8, 4);
    mpt_model *plain, *model;
    train.batch = 4, train.seed = 3, train.optimizer = mpt_sgd(0.1, 0.9);
    plain = build(ctx, policy_of(0), mlp, MPT_LOSS_CROSS_ENTROPY, &train);
    model = build(ctx, policy_of(0), mlp, MPT_LOSS_CROSS_ENTROPY, &train);
    CHECK_OK(ctx, mpt_train_step(plain, s.x, s.label));
    CHECK_OK(ctx, mpt_forward(model, s.x, s.label, 4));
    CHECK_OK(ctx, mpt_backward(model));
    CHECK_OK(ctx, mpt_forward(model, s.x, s.label, 3));
    CHECK_OK(ctx, mpt_unscale(mpt_model_optimizer(model)));
    CHECK_OK(ctx, mpt_step(mpt_model_optimizer(model)));
    CHECK_OK(ctx, mpt_scaler_update(mpt_model_scaler(model)));
    CHECK(same(state_of(ctx, plain), state_of(ctx, model)));
    CHECK_OK(ctx, mpt_train_step(plain, s.x, s.label));
    CHECK_OK(ctx, mpt_train_step(model, s.x, s.label));
    CHECK(same(state_of(ctx, plain), state_of(ctx, model)));
    mpt_model_free(plain), mpt_model_free(model);
    samples_free(&s);
}

/* A model large enough to be split between threads. */
static const item wide[] = {{'i', 16, 16, 8, 0, 0, 0}, {'c', 0, 0, 16, 3, 1, -1}, {'r', 1, 0, 0, 0, 0, 0},
                            {'m', 2, 0, 0, 2, 2, 0},   {'c', 3, 0, 16, 3, 1, -1}, {'+', 4, 3, 0, 0, 0, 0},
                            {'r', 5, 0, 0, 0, 0, 0},   {'l', 6, 0, 96, 0, 0, 0},  {'r', 7, 0, 0, 0, 0, 0},
                            {'l', 8, 0, 5, 0, 0, 0},   {0, 0, 0, 0, 0, 0, 0}};

/* The same of the new kinds. */
static const item broad[] = {{'i', 16, 16, 8, 0, 0, 0}, {'k', 0, 0, 16, 3, 1, -1},  {'N', 1, 0, 0, 0, 0, 0},
                             {'r', 2, 0, 0, 0, 0, 0},   {'c', 3, 16, 16, 3, 1, -1}, {'P', 4, 0, 4, 0, 0, 0},
                             {'|', 3, 5, 0, 0, 0, 0},   {'D', 6, 0, 0, 0, 0, 0},    {'c', 7, 2, 16, 2, 2, 0},
                             {'Y', 8, 0, 0, 0, 0, 0},   {'r', 9, 0, 0, 0, 0, 0},    {'l', 10, 0, 5, 0, 0, 0},
                             {0, 0, 0, 0, 0, 0, 0}};

static training_state trained(int threads, mpt_policy policy, const item *items, const samples *s) {
    mpt_context *ctx = test_open_threads(threads);
    mpt_train_desc train = MPT_ZERO;
    training_state state;
    mpt_model *model;
    int i;
    train.batch = 16, train.clip_norm = 1;
    model = build(ctx, policy, items, MPT_LOSS_CROSS_ENTROPY, &train);
    for (i = 0; i < 3; i++) CHECK_OK(ctx, mpt_train_step(model, s->x, s->label));
    state = state_of(ctx, model);
    mpt_model_free(model);
    mpt_close(ctx);
    return state;
}

static void test_threads(mpt_policy policy, const item *items) {
    samples s = samples_new(items, 16, 1);
    int threads;
    for (threads = 2; threads <= 4; threads *= 2)
        CHECK(same(trained(1, policy, items, &s), trained(threads, policy, items, &s)));
    samples_free(&s);
}

/* ==== RUNNING STATISTICS ==== */

/* Training has added the statistics of these samples to running[0] and [1], those of the batch norms of `normed`. */
static void add_batch(net64 *net, const samples *s, size_t n, double *const *running) {
    size_t i;
    for (i = 0; i < n * size64(net, 0); i++) net->value[0][i] = (double)s->x[i];
    net->n = n, net->s = s;
    loss64(net);
    for (i = 0; i < 2; i++) {
        const mpt_norm_shape shape = norm64(net, batch_norms[i]);
        reference_norm_running(&shape, (double)0.1f, net->stats[batch_norms[i]], running[i]);
    }
}

/* They start at 0 and 1; each micro-batch of an applied step counts, and evaluation takes them for its own. */
/* Statistics that no batch can have are refused, and the old ones stay. */
static void test_running_judge(mpt_context *ctx, mpt_model *model, int id) {
    static const uint32_t bad[] = {0x7fc00000u, 0x7f800000u, 0xbf800000u}; /* NaN, inf, -1 */
    const training_state before = state_of(ctx, model);
    float host[16];
    int i, half;
    for (i = 0; i < 3; i++)
        for (half = 0; half < 2; half++) {
            int j;
            if (i == 2 && !half) continue; /* a mean of -1 */
            for (j = 0; j < 16; j++) host[j] = 0.5f;
            host[half ? 9 : 1] = test_float(bad[i]);
            CHECK_ERROR(ctx, mpt_model_set_running(model, id, host), MPT_ERROR_VALUE, half ? "variance" : "mean");
        }
    CHECK(same(before, state_of(ctx, model)));
}

static void test_running(mpt_context *ctx) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(normed, 10, 4), later = samples_from(&s, 5);
    mpt_metrics m, again;
    mpt_model *model;
    double *running[2], error;
    net64 net;
    int i;
    train.batch = 5, train.accumulate = 2, train.seed = 9;
    model = build(ctx, policy_of(0), normed, MPT_LOSS_CROSS_ENTROPY, &train);
    net = net64_new(ctx, model, normed, MPT_LOSS_CROSS_ENTROPY, &s, 5);
    error = roundings(&net) * test_unit(MPT_F32);
    for (i = 0; i < 2; i++) {
        const size_t C = net.C[batch_norms[i]];
        size_t c;
        running[i] = running_of(ctx, model, batch_norms[i] + 1, C);
        for (c = 0; c < 2 * C; c++) CHECK_EQUAL(running[i][c], c >= C);
    }
    CHECK_OK(ctx, mpt_train_step(model, s.x, s.label));
    add_batch(&net, &s, 5, running), add_batch(&net, &later, 5, running);
    net64_free(&net);
    net = net64_new(ctx, model, normed, MPT_LOSS_CROSS_ENTROPY, &s, 10);
    net.evaluation = 1;
    for (i = 0; i < 2; i++) {
        const size_t n = 2 * net.C[batch_norms[i]];
        double *tolerance = test_doubles(n);
        size_t c;
        for (c = 0; c < n; c++) tolerance[c] = error * largest_of(running[i], n);
        CHECK_ALL(net.running[batch_norms[i]], n, running[i], tolerance);
        free(running[i]), free(tolerance);
    }
    CHECK_OK(ctx, mpt_evaluate(model, s.x, s.label, 10, &m));
    CHECK_NEAR(m.loss, loss64(&net), error * loss64(&net));
    CHECK_OK(ctx, mpt_forward(model, s.x, s.label, 5));
    CHECK_OK(ctx, mpt_backward(model)); /* until its step, evaluation knows nothing of it */
    CHECK_OK(ctx, mpt_evaluate(model, s.x, s.label, 10, &again));
    CHECK_EQUAL(again.loss, m.loss);
    CHECK_ERROR(ctx, mpt_model_set_running(model, 1, s.x), MPT_ERROR_ARGUMENT, "1"); /* the input */
    CHECK_ERROR(ctx, mpt_model_set_running(model, 0, s.x), MPT_ERROR_ARGUMENT, "0");
    CHECK_ERROR(ctx, mpt_model_set_running(model, 99, s.x), MPT_ERROR_ARGUMENT, "99");
    CHECK_ERROR(ctx, mpt_model_set_running(model, batch_norms[0] + 1, NULL), MPT_ERROR_ARGUMENT, "host");
    test_running_judge(ctx, model, batch_norms[0] + 1);
    net64_free(&net), samples_free(&s);
    mpt_model_free(model);
}

/* A skipped step leaves them as they were, bit for bit. */
static void test_running_skips(mpt_context *ctx, mpt_policy policy) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(normed, 10, 4);
    mpt_model *model;
    int i;
    train.batch = 5, train.accumulate = 2, train.scaler.init_scale = 16777216;
    model = build(ctx, policy, normed, MPT_LOSS_CROSS_ENTROPY, &train);
    for (i = 0; i < 16; i++) {
        const uint64_t applied = mpt_steps_applied(model);
        double *before = running_of(ctx, model, batch_norms[0] + 1, 8), *after;
        CHECK_OK(ctx, mpt_train_step(model, s.x, s.label));
        after = running_of(ctx, model, batch_norms[0] + 1, 8);
        CHECK((memcmp(before, after, 16 * sizeof *before) != 0) == (mpt_steps_applied(model) > applied));
        free(before), free(after);
    }
    CHECK(mpt_steps_applied(model) > 0 && mpt_steps_skipped(model) > 0); /* or nothing was tested */
    mpt_model_free(model);
    samples_free(&s);
}

/* Weights that overflow make the statistics NaN; they do not outlive the step. */
/* A batch whose variance fp32 cannot hold: the step is skipped, whatever the scale, the statistics stay what they were,
   and where nothing else comes it is told. Then ordinary batches train again. */
static void test_running_infinite(mpt_context *ctx, mpt_policy policy) {
    mpt_train_desc train = MPT_ZERO;
    training_state before, after;
    float x[4], ordinary[4] = {1, 2, 3, 4};
    int32_t label[4] = {0, 1, 0, 1};
    mpt_model *model = mpt_model_new(ctx, policy);
    int i, id;
    id = mpt_batch_norm(model, mpt_input(model, 1, 1, 1), NULL);
    mpt_softmax_cross_entropy(model, mpt_linear(model, id, 2, NULL), NULL);
    train.batch = 4, train.scaler.patience = 3;
    CHECK_OK(ctx, mpt_model_build(model, &train));
    for (i = 0; i < 4; i++) x[i] = (float)(i + 1) * 1e20f;
    before = state_of(ctx, model);
    for (i = 1; i <= 4; i++) {
        if (i < 3) CHECK_OK(ctx, mpt_train_step(model, x, label));
        else CHECK_ERROR(ctx, mpt_train_step(model, x, label), MPT_ERROR_DIVERGED, "statistic");
    }
    after = state_of(ctx, model);
    CHECK_EQUAL(after.optimizer.applied, 0);
    CHECK_EQUAL(after.optimizer.skipped, 4);
    CHECK_EQUAL(after.optimizer.journal[3].reason, MPT_SKIP_STATISTICS);
    CHECK_EQUAL(after.scaler.scale, before.scaler.scale);
    CHECK(memcmp(before.weight, after.weight, before.count * sizeof *before.weight) == 0);
    CHECK_OK(ctx, mpt_train_step(model, ordinary, label));
    CHECK_EQUAL(mpt_steps_applied(model), 1);
    CHECK(same(before, state_of(ctx, model)) == 0);
    free(after.weight);
    mpt_model_free(model);
}

static void test_running_overflow(mpt_context *ctx) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(normed, 5, 4);
    float huge[8 * 9 * 3], *weights = (float *)test_memory(sizeof huge);
    mpt_model *model, *other;
    training_state before, after;
    int i;
    train.batch = 5;
    model = build(ctx, mpt_policy_preset(MPT_O2, MPT_F16), normed, MPT_LOSS_CROSS_ENTROPY, &train);
    other = build(ctx, mpt_policy_preset(MPT_O2, MPT_F16), normed, MPT_LOSS_CROSS_ENTROPY, &train);
    CHECK_OK(ctx, mpt_params_get(mpt_model_params(model), 1, weights));
    for (i = 0; i < 8 * 9 * 3; i++) huge[i] = 1e30f;
    CHECK_OK(ctx, mpt_params_set(mpt_model_params(model), 1, huge));
    before = state_of(ctx, model);
    CHECK_OK(ctx, mpt_train_step(model, s.x, s.label));
    CHECK_EQUAL(mpt_steps_skipped(model), 1);
    after = state_of(ctx, model);
    CHECK(memcmp(before.weight, after.weight, before.count * sizeof *before.weight) == 0);
    free(before.weight), free(after.weight);
    CHECK_OK(ctx, mpt_params_set(mpt_model_params(model), 1, weights));
    CHECK_OK(ctx, mpt_train_step(model, s.x, s.label));
    CHECK_OK(ctx, mpt_train_step(other, s.x, s.label));
    CHECK_EQUAL(mpt_steps_applied(model), 1);
    for (i = 0; i < 2; i++) {
        double *is = running_of(ctx, model, batch_norms[i] + 1, 8), *be = running_of(ctx, other, batch_norms[i] + 1, 8);
        CHECK(memcmp(is, be, 16 * sizeof *is) == 0);
        free(is), free(be);
    }
    mpt_model_free(model), mpt_model_free(other);
    samples_free(&s);
    free(weights);
}

static void finish_step(mpt_context *ctx, mpt_model *model) {
    CHECK_OK(ctx, mpt_unscale(mpt_model_optimizer(model)));
    CHECK_OK(ctx, mpt_step(mpt_model_optimizer(model)));
    CHECK_OK(ctx, mpt_scaler_update(mpt_model_scaler(model)));
}

/* A step from letters, each with the next 5 samples: F a forward pass and its backward pass, f a forward pass alone, e
   an evaluation, which a forward pass alone refuses, z mpt_zero_grad, . nothing; s, at the end, a whole training step. */
static void play(mpt_context *ctx, mpt_model *model, const samples *s, const char *passes) {
    size_t i;
    for (i = 0; passes[i]; i++) {
        const samples some = samples_from(s, 5 * i);
        mpt_metrics m;
        const int waits = i && passes[i - 1] == 'f';
        if (passes[i] == 'e' && waits)
            CHECK_ERROR(ctx, mpt_evaluate(model, some.x, some.label, 5, &m), MPT_ERROR_ORDER, "waits");
        if (passes[i] == 'e' && !waits) CHECK_OK(ctx, mpt_evaluate(model, some.x, some.label, 5, &m));
        if (passes[i] == 'z') CHECK_OK(ctx, mpt_zero_grad(model));
        if (passes[i] == 's') CHECK_OK(ctx, mpt_train_step(model, some.x, some.label));
        if (passes[i] == 'F' || passes[i] == 'f') CHECK_OK(ctx, mpt_forward(model, some.x, some.label, 5));
        if (passes[i] == 'F') CHECK_OK(ctx, mpt_backward(model));
    }
    if (passes[i - 1] != 's') finish_step(ctx, model);
}

/* Forward passes that no backward pass followed, evaluations, and gradients that a whole step overwrites leave no trace
   in what the next step makes. */
static void test_abandoned(mpt_context *ctx, mpt_policy policy, const char *passes, const char *plain) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(normed, 40, 4);
    mpt_model *model, *other;
    int i, ok = 1;
    train.batch = 5;
    model = build(ctx, policy, normed, MPT_LOSS_CROSS_ENTROPY, &train);
    other = build(ctx, policy, normed, MPT_LOSS_CROSS_ENTROPY, &train);
    for (i = 0; i < 2; i++) {
        const samples shifted = samples_from(&s, 3 * (size_t)i);
        play(ctx, model, &shifted, passes), play(ctx, other, &shifted, plain);
        ok &= CHECK(same(state_of(ctx, model), state_of(ctx, other)));
        ok &= CHECK_EQUAL(mpt_loss(model), mpt_loss(other));
    }
    if (!ok) printf("    in %s\n", passes);
    mpt_model_free(model), mpt_model_free(other);
    samples_free(&s);
}

static void test_all_abandoned(mpt_context *ctx) {
    static const char *const passes[][2] = {{"fs", ".s"},     {"fes", "..s"},  {"fF", ".F"},   {"Fs", ".s"},
                                            {"FFs", "..s"},   {"FeF", "F.F"},  {"FfF", "F.F"}, {"ffFfeF", "..F..F"},
                                            {"FFf", "FF."},   {"Fe", "F."},    {"FzF", "..F"}, {"FFzF", "...F"},
                                            {"fzeF", "...F"}, {"FfzF", "...F"}};
    size_t i;
    for (i = 0; i < sizeof passes / sizeof *passes; i++)
        test_abandoned(ctx, policy_of(i % 2 ? 4 : 0), passes[i][0], passes[i][1]);
}

/* One value a channel has no variance: an error that names the node, at the build or, of fewer samples, at the pass. */
static void test_single_value(mpt_context *ctx) {
    static const item flat[] = {{'i', 1, 1, 4, 0, 0, 0},
                                {'l', 0, 0, 6, 0, 0, 0},
                                {'N', 1, 0, 0, 0, 0, 0},
                                {'l', 2, 0, 5, 0, 0, 0},
                                {0, 0, 0, 0, 0, 0, 0}};
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(flat, 4, 4);
    mpt_model *net = mpt_model_new(ctx, policy_of(0));
    training_state before;
    mpt_metrics m;
    mpt_mse(net, mpt_batch_norm(net, mpt_linear(net, mpt_input(net, 1, 1, 4), 6, NULL), NULL));
    train.batch = 1;
    CHECK_ERROR(ctx, mpt_model_build(net, &train), MPT_ERROR_SHAPE, "batch_norm1");
    mpt_model_free(net);
    train.batch = 4;
    net = build(ctx, policy_of(0), flat, MPT_LOSS_CROSS_ENTROPY, &train);
    before = state_of(ctx, net);
    CHECK_ERROR(ctx, mpt_forward(net, s.x, s.label, 1), MPT_ERROR_SHAPE, "batch_norm1");
    CHECK(same(before, state_of(ctx, net)));
    CHECK_OK(ctx, mpt_evaluate(net, s.x, s.label, 1, &m));
    CHECK_OK(ctx, mpt_forward(net, s.x, s.label, 2));
    CHECK_OK(ctx, mpt_backward(net));
    mpt_model_free(net);
    samples_free(&s);
}

/* ==== DROPOUT ==== */

/* Sample i has one feature, the i-th, so that the gradient of the first layer's weights tells of each sample and output
   alone: it is 0 where that is dropped, and nowhere else. */
enum { ONE_HOT = 7, WIDTH = 64, OUTPUTS = ONE_HOT * CLASSES };
static const item dropped[] = {{'i', 1, 1, ONE_HOT, 0, 0, 0},
                               {'l', 0, 0, WIDTH, 0, 0, 0},
                               {'D', 1, 0, 0, 0, 0, 0},
                               {'l', 2, 0, 5, 0, 0, 0},
                               {0, 0, 0, 0, 0, 0, 0}};
/* Two of the same value. */
static const item twice_dropped[] = {
    {'i', 1, 1, ONE_HOT, 0, 0, 0}, {'l', 0, 0, WIDTH, 0, 0, 0}, {'D', 1, 0, 0, 0, 0, 0}, {'D', 1, 0, 0, 0, 0, 0},
    {'|', 2, 3, 0, 0, 0, 0},       {'l', 4, 0, 5, 0, 0, 0},     {0, 0, 0, 0, 0, 0, 0}};

static samples one_hot(void) {
    samples s = samples_new(dropped, ONE_HOT, 3);
    size_t i;
    for (i = 0; i < ONE_HOT * ONE_HOT; i++) s.x[i] = i % (ONE_HOT + 1) == 0;
    return s;
}

/* What a dropout multiplies by, of (sample, output). before: gradients that this micro-batch has been added to. */
static double *mask_of(mpt_context *ctx, mpt_model *model, const double *before) {
    double *g = gradient_of(ctx, model, 1), *mask = test_doubles(ONE_HOT * WIDTH);
    size_t i, o;
    for (i = 0; i < ONE_HOT; i++)
        for (o = 0; o < WIDTH; o++) {
            const double slope = g[o * ONE_HOT + i] - (before ? before[o * ONE_HOT + i] : 0);
            mask[i * WIDTH + o] = fabs(slope) > 0 ? 1 / (1 - (double)drop_share) : 0;
        }
    free(g);
    return mask;
}

/* Frees both. */
static int same_mask(double *a, double *b) {
    const int equal = memcmp(a, b, ONE_HOT * WIDTH * sizeof *a) == 0;
    free(a), free(b);
    return equal;
}

static double *next_mask(mpt_context *ctx, mpt_model *model, const samples *s, const double *before) {
    CHECK_OK(ctx, mpt_forward(model, s->x, s->label, ONE_HOT));
    CHECK_OK(ctx, mpt_backward(model));
    return mask_of(ctx, model, before);
}

/* Shares of dropped values to 5 standard deviations. */
static void check_share(const double *mask, double p) {
    const double n = ONE_HOT * WIDTH;
    double zeros = 0;
    size_t i;
    for (i = 0; i < ONE_HOT * WIDTH; i++) zeros += !(mask[i] > 0);
    CHECK_NEAR(zeros, n * p, 5 * sqrt(n * p * (1 - p)));
}

/* Forward and backward have the same mask: with it, loss and slopes are those of the net in double. Without it, those
   of an evaluation. */
static void test_dropout(mpt_context *ctx) {
    mpt_train_desc train = MPT_ZERO;
    samples s = one_hot();
    double error, expected[OUTPUTS], is[OUTPUTS], tolerance[OUTPUTS];
    float out[OUTPUTS];
    mpt_model *model;
    net64 net;
    size_t i;
    train.batch = ONE_HOT;
    model = build(ctx, policy_of(0), dropped, MPT_LOSS_CROSS_ENTROPY, &train);
    net = net64_new(ctx, model, dropped, MPT_LOSS_CROSS_ENTROPY, &s, ONE_HOT);
    error = roundings(&net) * test_unit(MPT_F32);
    loss64(&net);
    CHECK_OK(ctx, mpt_predict(model, s.x, ONE_HOT, out));
    for (i = 0; i < OUTPUTS; i++) {
        expected[i] = net.value[net.last][i], is[i] = (double)out[i];
        tolerance[i] = error * largest_of(net.value[net.last], OUTPUTS);
    }
    CHECK_ALL(is, OUTPUTS, expected, tolerance);
    net.mask = next_mask(ctx, model, &s, NULL);
    check_share(net.mask, (double)drop_share);
    CHECK_NEAR(mpt_loss(model), loss64(&net), error * loss64(&net));
    check_slopes(ctx, model, &net, error);
    net64_free(&net), samples_free(&s);
    mpt_model_free(model);
}

/* Seed, step, micro-batch and node name a mask; a forward pass that is repeated has the same one. */
static void test_dropout_names(mpt_context *ctx) {
    mpt_train_desc train = MPT_ZERO;
    samples s = one_hot();
    double *first, *mask, *gradient;
    mpt_model *model, *other, *reseeded;
    train.batch = ONE_HOT, train.seed = 4;
    model = build(ctx, policy_of(0), dropped, MPT_LOSS_CROSS_ENTROPY, &train);
    other = build(ctx, policy_of(0), dropped, MPT_LOSS_CROSS_ENTROPY, &train);
    first = next_mask(ctx, model, &s, NULL);
    CHECK_OK(ctx, mpt_forward(other, s.x, s.label, 3));
    CHECK(same_mask(first, next_mask(ctx, other, &s, NULL)));
    train.seed = 5;
    reseeded = build(ctx, policy_of(0), dropped, MPT_LOSS_CROSS_ENTROPY, &train);
    CHECK(!same_mask(mask_of(ctx, model, NULL), next_mask(ctx, reseeded, &s, NULL)));
    first = mask_of(ctx, model, NULL), gradient = gradient_of(ctx, model, 1);
    mask = next_mask(ctx, model, &s, gradient); /* the second micro-batch */
    check_share(mask, (double)drop_share);
    CHECK(!same_mask(first, mask));
    first = mask_of(ctx, other, NULL);
    finish_step(ctx, other);
    mask = next_mask(ctx, other, &s, NULL); /* after a step */
    check_share(mask, (double)drop_share);
    CHECK(!same_mask(first, mask));
    mpt_model_free(model), mpt_model_free(other), mpt_model_free(reseeded);
    model = build(ctx, policy_of(0), twice_dropped, MPT_LOSS_CROSS_ENTROPY, &train);
    mask = next_mask(ctx, model, &s, NULL);
    check_share(mask, (double)drop_share * (double)drop_share); /* both nodes drop it */
    mpt_model_free(model);
    free(mask), free(gradient);
    samples_free(&s);
}

/* ==== EVALUATION ==== */

/* 11 samples in batches of 4, 4 and 3; batch norms take their running statistics, dropout nothing. */
static void test_evaluation(mpt_context *ctx, const item *items, mpt_loss_kind loss) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(items, 11, 6);
    float out[11 * CLASSES];
    double expected[11 * CLASSES], tolerance[11 * CLASSES], is[11 * CLASSES], error;
    mpt_metrics m = MPT_ZERO;
    mpt_model *model;
    net64 net;
    size_t i, j, correct = 0;
    train.batch = 4, train.seed = 12;
    model = build(ctx, policy_of(0), items, loss, &train);
    net = net64_new(ctx, model, items, loss, &s, 11);
    net.evaluation = 1;
    error = roundings(&net) * test_unit(MPT_F32);
    CHECK_EQUAL(mpt_model_outputs(model), CLASSES);
    CHECK_OK(ctx, mpt_evaluate(model, s.x, target_of(&s, loss), 11, &m));
    CHECK_NEAR(m.loss, loss64(&net), error * loss64(&net));
    for (i = 0; i < 11; i++) {
        const double *x = net.value[net.last] + i * CLASSES;
        size_t best = 0;
        for (j = 1; j < CLASSES; j++) best = x[j] > x[best] ? j : best;
        correct += best == (size_t)s.label[i];
    }
    CHECK_EQUAL(m.samples, 11);
    if (loss == MPT_LOSS_CROSS_ENTROPY) {
        CHECK_EQUAL(m.correct, correct);
        CHECK_NEAR(m.accuracy, (double)correct / 11, 1e-15);
    }
    CHECK_OK(ctx, mpt_predict(model, s.x, 11, out));
    for (i = 0; i < 11 * CLASSES; i++) {
        is[i] = (double)out[i], expected[i] = net.value[net.last][i];
        tolerance[i] = error * largest_of(net.value[net.last], 11 * CLASSES);
    }
    CHECK_ALL(is, 11 * CLASSES, expected, tolerance);
    CHECK_OK(ctx, mpt_evaluate(model, s.x, target_of(&s, loss), 1, &m));
    CHECK_NEAR(m.loss, net.row_loss[0], error * net.row_loss[0]);
    CHECK_ERROR(ctx, mpt_evaluate(model, s.x, target_of(&s, loss), 0, &m), MPT_ERROR_ARGUMENT, "samples");
    CHECK_ERROR(ctx, mpt_evaluate(model, NULL, target_of(&s, loss), 4, &m), MPT_ERROR_ARGUMENT, "x");
    CHECK_ERROR(ctx, mpt_evaluate(model, s.x, NULL, 4, &m), MPT_ERROR_ARGUMENT, "target");
    CHECK_ERROR(ctx, mpt_evaluate(model, s.x, target_of(&s, loss), 4, NULL), MPT_ERROR_ARGUMENT, "out");
    CHECK_ERROR(ctx, mpt_predict(model, NULL, 4, out), MPT_ERROR_ARGUMENT, "x");
    CHECK_ERROR(ctx, mpt_predict(model, s.x, 4, NULL), MPT_ERROR_ARGUMENT, "out");
    net64_free(&net), samples_free(&s);
    mpt_model_free(model);
}

/* Evaluating between steps changes nothing; in every policy, also where there are more outputs than features. */
static const item narrow[] = {{'i', 1, 1, 2, 0, 0, 0},
                              {'l', 0, 0, 9, 0, 0, 0},
                              {'r', 1, 0, 0, 0, 0, 0},
                              {'l', 2, 0, 5, 0, 0, 0},
                              {0, 0, 0, 0, 0, 0, 0}};

static void test_evaluation_is_neutral(mpt_context *ctx, mpt_policy policy, const item *items) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(items, 20, 9);
    float out[20 * CLASSES];
    mpt_metrics m;
    mpt_model *plain, *watched;
    int i;
    train.batch = 6;
    plain = build(ctx, policy, items, MPT_LOSS_CROSS_ENTROPY, &train),
    watched = build(ctx, policy, items, MPT_LOSS_CROSS_ENTROPY, &train);
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

static void with_float(mpt_context *ctx, mpt_model *model, samples *s, mpt_loss_kind loss, float *place, uint32_t bits,
                       const char *word) {
    const float kept = *place;
    *place = test_float(bits);
    check_refused(ctx, model, s->x, target_of(s, loss), word);
    *place = kept;
}

/* Refused data leave everything as it was: the next step is the one of a model that never saw them. */
static void test_bad_data(mpt_context *ctx, mpt_policy policy, mpt_loss_kind loss) {
    static const int32_t bad[] = {-1, CLASSES, 2147483647, -2147483647};
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(mlp, 4, 2);
    mpt_model *model, *other;
    int i;
    train.batch = 4;
    model = build(ctx, policy, mlp, loss, &train), other = build(ctx, policy, mlp, loss, &train);
    CHECK_OK(ctx, mpt_train_step(model, s.x, target_of(&s, loss)));
    CHECK_OK(ctx, mpt_train_step(other, s.x, target_of(&s, loss)));
    with_float(ctx, model, &s, loss, &s.x[3 * s.features + 6], 0x7f800000u, "inf");
    with_float(ctx, model, &s, loss, &s.x[3 * s.features + 6], 0x7fc00000u, "nan");
    with_float(ctx, model, &s, loss, &s.x[0], 0xffc00000u, "sample");
    if (loss != MPT_LOSS_CROSS_ENTROPY) {
        with_float(ctx, model, &s, loss, &s.target[4 * CLASSES - 1], 0x7fc00000u, "target");
        with_float(ctx, model, &s, loss, &s.target[0], 0xff800000u, "inf");
    }
    for (i = 0; i < 4 && loss == MPT_LOSS_CROSS_ENTROPY; i++) {
        const int32_t kept = s.label[3];
        s.label[3] = bad[i];
        check_refused(ctx, model, s.x, s.label, "label");
        s.label[3] = kept;
    }
    CHECK_OK(ctx, mpt_train_step(model, s.x, target_of(&s, loss)));
    CHECK_OK(ctx, mpt_train_step(other, s.x, target_of(&s, loss)));
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
    model = build(ctx, mpt_policy_preset(MPT_O2, MPT_F16), mlp, MPT_LOSS_CROSS_ENTROPY, &train);
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

/* A step that cannot be made touches nothing: not the running statistics that the passes before it have gathered, nor
   their gradients, losses and number. */
static void test_failed_step(mpt_context *ctx) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(normed, 8, 4);
    mpt_model *plain, *model;
    mpt_params *params = mpt_params_new(ctx, NULL);
    mpt_optimizer *other;
    training_state before;
    float zeros[8] = {0};
    mpt_params_add(params, "w", 8, 0);
    CHECK_OK(ctx, mpt_params_build(params));
    train.batch = 4, train.accumulate = 2, train.seed = 3;
    plain = build(ctx, policy_of(0), normed, MPT_LOSS_CROSS_ENTROPY, &train);
    model = build(ctx, policy_of(0), normed, MPT_LOSS_CROSS_ENTROPY, &train);
    CHECK_OK(ctx, mpt_train_step(plain, s.x, s.label));
    CHECK_OK(ctx, mpt_forward(model, s.x, s.label, 4));
    CHECK_OK(ctx, mpt_backward(model));
    CHECK_OK(ctx, mpt_forward(model, samples_from(&s, 4).x, samples_from(&s, 4).label, 4));
    CHECK_OK(ctx, mpt_backward(model));
    CHECK_OK(ctx, mpt_unscale(mpt_model_optimizer(model)));
    CHECK_ERROR(ctx, mpt_train_step(model, s.x, s.label), MPT_ERROR_ORDER, "train_step");
    CHECK_OK(ctx, mpt_step(mpt_model_optimizer(model)));
    CHECK_ERROR(ctx, mpt_train_step(model, s.x, s.label), MPT_ERROR_ORDER, "mpt_scaler_update");
    CHECK_OK(ctx, mpt_scaler_update(mpt_model_scaler(model)));
    CHECK(same(state_of(ctx, plain), state_of(ctx, model)));
    CHECK_EQUAL(mpt_loss(model), mpt_loss(plain));
    other = mpt_optimizer_new(params, mpt_model_scaler(model), NULL);
    CHECK_OK(ctx, mpt_upload(ctx, mpt_params_grad(params, 1), zeros, sizeof zeros));
    CHECK_OK(ctx, mpt_unscale(other));
    before = state_of(ctx, model);
    CHECK_ERROR(ctx, mpt_train_step(model, s.x, s.label), MPT_ERROR_ORDER, "another");
    CHECK(same(before, state_of(ctx, model)));
    CHECK_OK(ctx, mpt_step(other)); /* now the update takes both */
    CHECK_OK(ctx, mpt_train_step(model, s.x, s.label));
    CHECK_EQUAL(mpt_steps_applied(model), 2);
    mpt_optimizer_free(other);
    mpt_params_free(params);
    mpt_model_free(plain), mpt_model_free(model);
    samples_free(&s);
}

/* A device that asks for the calls again and again, or that fails at once and then asks. */
static int begun, ended;
static mpt_result begin_well(mpt_context *ctx, const mpt_update_op *op, const void *staging) {
    (void)ctx, (void)op, (void)staging;
    begun++;
    return MPT_OK;
}
static mpt_result begin_lost(mpt_context *ctx, const mpt_update_op *op, const void *staging) {
    (void)op, (void)staging;
    begun++;
    return mpt_fail(ctx, MPT_ERROR_DEVICE, "the device is lost");
}
static mpt_result end_again(mpt_context *ctx, mpt_result result, int *again) {
    (void)ctx;
    *again = 1;
    ended++;
    return result;
}

static void test_again(void) {
    mpt_context *ctx = mpt_open(NULL);
    mpt_backend *table = mpt_context_backend(ctx);
    samples s = samples_new(mlp, 32, 2);
    mpt_model *model = build(ctx, policy_of(0), mlp, MPT_LOSS_CROSS_ENTROPY, NULL);
    table->end = end_again;
    table->begin = begin_lost;
    CHECK_ERROR(ctx, mpt_train_step(model, s.x, s.label), MPT_ERROR_DEVICE, "lost");
    CHECK(begun >= 1 && begun <= 3 && ended == begun);
    CHECK_EQUAL(mpt_steps_applied(model), 0);
    begun = ended = 0;
    table->begin = begin_well;
    CHECK_OK(ctx, mpt_train_step(model, s.x, s.label));
    CHECK(begun <= 3 && ended == begun);
    CHECK(mpt_steps_applied(model) >= 1); /* this device did make the calls, each time */
    mpt_model_free(model);
    samples_free(&s);
    mpt_close(ctx);
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
    model = build(ctx, policy_of(0), mlp, MPT_LOSS_CROSS_ENTROPY, NULL); /* batch 32 */
    CHECK_ERROR(ctx, mpt_backward(model), MPT_ERROR_ORDER, "forward");
    CHECK_ERROR(ctx, mpt_forward(model, s.x, s.label, 0), MPT_ERROR_ARGUMENT, "n");
    CHECK_ERROR(ctx, mpt_forward(model, s.x, s.label, 33), MPT_ERROR_ARGUMENT, "n");
    CHECK_ERROR(ctx, mpt_forward(model, NULL, s.label, 1), MPT_ERROR_ARGUMENT, "x");
    CHECK_ERROR(ctx, mpt_forward(model, s.x, NULL, 1), MPT_ERROR_ARGUMENT, "target");
    CHECK_OK(ctx, mpt_forward(model, s.x, s.label, 32));
    CHECK_OK(ctx, mpt_backward(model));
    CHECK_ERROR(ctx, mpt_backward(model), MPT_ERROR_ORDER, "forward");
    CHECK_OK(ctx, mpt_unscale(mpt_model_optimizer(model)));
    CHECK_OK(ctx, mpt_forward(model, s.x, s.label, 32));
    CHECK_ERROR(ctx, mpt_backward(model), MPT_ERROR_ORDER, "unscaled");
    CHECK_OK(ctx, mpt_step(mpt_model_optimizer(model)));
    CHECK_OK(ctx, mpt_scaler_update(mpt_model_scaler(model)));
    CHECK_OK(ctx, mpt_forward(model, s.x, s.label, 32));
    CHECK_ERROR(ctx, mpt_evaluate(model, s.x, s.label, 1, &m), MPT_ERROR_ORDER, "waits");
    CHECK_ERROR(ctx, mpt_predict(model, s.x, 1, s.target), MPT_ERROR_ORDER, "waits");
    CHECK_OK(ctx, mpt_backward(model)); /* its activations are still there */
    CHECK_OK(ctx, mpt_unscale(mpt_model_optimizer(model)));
    CHECK_ERROR(ctx, mpt_zero_grad(model), MPT_ERROR_ORDER, "unscaled");
    CHECK_OK(ctx, mpt_step(mpt_model_optimizer(model)));
    CHECK_OK(ctx, mpt_scaler_update(mpt_model_scaler(model)));
    CHECK_OK(ctx, mpt_forward(model, s.x, s.label, 32));
    CHECK_OK(ctx, mpt_zero_grad(model));
    CHECK_OK(ctx, mpt_evaluate(model, s.x, s.label, 1, &m));
    CHECK_ERROR(ctx, mpt_backward(model), MPT_ERROR_ORDER, "forward"); /* it is forgotten */
    CHECK_OK(ctx, mpt_forward(model, s.x, s.label, 32));
    CHECK_OK(ctx, mpt_backward(model));
    CHECK_OK(ctx, mpt_forward(model, s.x, s.label, 32));
    finish_step(ctx, model); /* without that last pass */
    CHECK_ERROR(ctx, mpt_backward(model), MPT_ERROR_ORDER, "forward");
    CHECK(mpt_zero_grad(NULL) == MPT_ERROR_ARGUMENT);
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

#define CHECK_LAYER(call, code, word) (net = begin(ctx, &in), check_layer(ctx, net, call, code, word, __LINE__))

/* Names that no file could hold are refused when the layer is made; those made up keep clear of those given. */
static void test_layer_names(mpt_context *ctx) {
    static const char *const bad[] = {"gr\xc3\xb6\xc3\x9f", "a\"b", "a\\b", "a\nb", "mpt.sum", "taken", ""};
    mpt_linear_desc d = MPT_ZERO;
    mpt_norm_desc n = MPT_ZERO;
    mpt_node_info info;
    mpt_model *net;
    size_t i;
    int h;
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        net = mpt_model_new(ctx, policy_of(0));
        d.name = "taken";
        h = mpt_linear(net, mpt_input(net, 1, 1, 4), 4, &d);
        n.name = bad[i];
        CHECK(h && mpt_layer_norm(net, h, &n) == 0);
        test_check_reason(ctx, "layer_norm", __FILE__, __LINE__);
        CHECK_ERROR(ctx, mpt_model_build(net, NULL), MPT_ERROR_ARGUMENT, "layer_norm");
        mpt_model_free(net);
    }
    net = mpt_model_new(ctx, policy_of(0));
    d.name = "linear2";
    h = mpt_linear(net, mpt_linear(net, mpt_input(net, 1, 1, 4), 4, &d), 4, NULL); /* which would be linear2 */
    mpt_mse(net, h);
    CHECK_OK(ctx, mpt_model_build(net, NULL));
    CHECK_OK(ctx, mpt_model_node(net, h, &info));
    CHECK(strcmp(info.name, "linear3") == 0);
    mpt_model_free(net);
}

/* A norm that reads the input sees it in fp32: features around 1000 differ by less than bf16 has there. The loss of O1
   is that of fp32 but for the roundings of normalised values, about 1, of which the logit has three. */
static void test_exact_input(mpt_context *ctx, mpt_policy policy, int fed) {
    double loss[2];
    int i, id;
    for (i = 0; i < 2; i++) {
        mpt_model *net = mpt_model_new(ctx, i ? policy : policy_of(0));
        mpt_train_desc train = MPT_ZERO;
        samples s = samples_new(mlp, 8, 5);
        size_t j;
        train.batch = 8, train.seed = 3;
        id = mpt_input(net, 1, 1, 7);
        if (fed)
            id = mpt_concat(net, mpt_batch_norm(net, id, NULL), mpt_linear(net, id, 2, NULL)); /* both kinds read it */
        else id = mpt_batch_norm(net, mpt_flatten(net, id), NULL);
        mpt_softmax_cross_entropy(net, mpt_linear(net, id, CLASSES, NULL), NULL);
        CHECK_OK(ctx, mpt_model_build(net, &train));
        for (j = 0; j < 56; j++) s.x[j] = (fed ? 8 : 1000) + s.x[j];
        CHECK_OK(ctx, mpt_forward(net, s.x, s.label, 8));
        loss[i] = mpt_loss(net);
        mpt_model_free(net);
        samples_free(&s);
    }
    CHECK_NEAR(loss[1], loss[0], (fed ? 8 : 1) * 6 * test_unit(policy.compute) * 2);
}

/* O1 reads biases as torch.autocast does: rounded. */
static void test_rounded_bias(mpt_context *ctx) {
    const float zero[2] = {0, 0}, bias[2] = {1 + 1.0f / 512, -3 - 1.0f / 128};
    float out[2] = {0, 0};
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O1, MPT_BF16));
    mpt_mse(net, mpt_linear(net, mpt_input(net, 1, 1, 2), 2, NULL));
    CHECK_OK(ctx, mpt_model_build(net, NULL));
    CHECK_OK(ctx, mpt_params_set(mpt_model_params(net), 2, bias));
    CHECK_OK(ctx, mpt_predict(net, zero, 1, out));
    CHECK_EQUAL(out[0], mpt_f32_from_bf16(mpt_bf16_from_f32(bias[0])));
    CHECK_EQUAL(out[1], mpt_f32_from_bf16(mpt_bf16_from_f32(bias[1])));
    CHECK_EQUAL(out[0], 1);
    mpt_model_free(net);
}

/* Integers where floats are wanted, and shares outside of 0..1. */
static void test_odd_targets(mpt_context *ctx, mpt_loss_kind loss) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(mlp, 4, 5);
    const float outside[] = {2, -1, 5, -0.001f};
    mpt_model *model;
    size_t i;
    train.batch = 4;
    model = build(ctx, policy_of(0), mlp, loss, &train);
    if (loss != MPT_LOSS_CROSS_ENTROPY) {
        int32_t labels[4 * CLASSES] = {0};
        labels[7] = 1;
        CHECK_ERROR(ctx, mpt_train_step(model, s.x, labels), MPT_ERROR_VALUE, "integer");
        test_check_reason(ctx, "2", __FILE__, __LINE__);
    }
    for (i = 0; i < 4 && loss == MPT_LOSS_BCE_WITH_LOGITS; i++) {
        const float kept = s.target[CLASSES + i];
        s.target[CLASSES + i] = outside[i];
        CHECK_ERROR(ctx, mpt_train_step(model, s.x, s.target), MPT_ERROR_VALUE, "1");
        test_check_reason(ctx, "sample", __FILE__, __LINE__);
        s.target[CLASSES + i] = kept;
    }
    CHECK_OK(ctx, mpt_train_step(model, s.x, target_of(&s, loss)));
    CHECK(!*mpt_why(ctx));
    mpt_model_free(model);
    samples_free(&s);
}

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
    CHECK_LAYER(mpt_concat(net, in, 7), MPT_ERROR_ARGUMENT, "7");
    CHECK_LAYER(mpt_concat(net, in, mpt_linear(net, in, 4, NULL)), MPT_ERROR_SHAPE, "8x6x3");
    CHECK_LAYER(mpt_concat(net, mpt_linear(net, in, 2147483647, NULL), 2), MPT_ERROR_SHAPE, "concat1");
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

static void test_norm_errors(mpt_context *ctx) {
    const mpt_norm_desc zero = MPT_ZERO;
    const float nan = test_float(0x7fc00000u);
    mpt_norm_desc d = MPT_ZERO;
    mpt_model *net;
    int in;
    CHECK_LAYER(mpt_batch_norm(net, 4, NULL), MPT_ERROR_ARGUMENT, "4");
    CHECK_LAYER(mpt_layer_norm(net, -1, NULL), MPT_ERROR_ARGUMENT, "layer_norm");
    CHECK_LAYER(mpt_group_norm(net, in, 0, NULL), MPT_ERROR_SHAPE, "group_norm1");
    CHECK_LAYER(mpt_group_norm(net, in, -1, NULL), MPT_ERROR_SHAPE, "groups");
    CHECK_LAYER(mpt_group_norm(net, in, 2, NULL), MPT_ERROR_SHAPE, "groups"); /* of 3 channels */
    d.eps = -1e-5f, CHECK_LAYER(mpt_batch_norm(net, in, &d), MPT_ERROR_ARGUMENT, "eps");
    d.eps = nan, CHECK_LAYER(mpt_layer_norm(net, in, &d), MPT_ERROR_ARGUMENT, "layer_norm1");
    d = zero, d.momentum = 1.5f, CHECK_LAYER(mpt_batch_norm(net, in, &d), MPT_ERROR_ARGUMENT, "momentum");
    d.momentum = nan, CHECK_LAYER(mpt_batch_norm(net, in, &d), MPT_ERROR_ARGUMENT, "momentum");
    d = zero, d.name = "", CHECK_LAYER(mpt_group_norm(net, in, 3, &d), MPT_ERROR_ARGUMENT, "name");
    d.name = "n1", d.eps = nan, CHECK_LAYER(mpt_group_norm(net, in, 3, &d), MPT_ERROR_ARGUMENT, "n1");
    CHECK_LAYER(mpt_dropout(net, in, 1), MPT_ERROR_ARGUMENT, "dropout1");
    CHECK_LAYER(mpt_dropout(net, in, -0.5f), MPT_ERROR_ARGUMENT, "p");
    CHECK_LAYER(mpt_dropout(net, in, nan), MPT_ERROR_ARGUMENT, "p");
    CHECK_LAYER(mpt_dropout(net, 2, 0.5f), MPT_ERROR_ARGUMENT, "2");
}

static void test_cross_entropy_errors(mpt_context *ctx) {
    float weights[8 * 6 * 3];
    mpt_cross_entropy_desc d = MPT_ZERO;
    mpt_model *net;
    int in, i;
    d.label_smoothing = 1.5f;
    CHECK_LAYER(mpt_softmax_cross_entropy(net, in, &d), MPT_ERROR_ARGUMENT, "label_smoothing");
    d.label_smoothing = 0, d.class_weights = weights;
    for (i = 0; i < 8 * 6 * 3; i++) weights[i] = 1;
    weights[8 * 6 * 3 - 1] = -1;
    CHECK_LAYER(mpt_softmax_cross_entropy(net, in, &d), MPT_ERROR_ARGUMENT, "143");
    weights[8 * 6 * 3 - 1] = test_float(0x7fc00000u);
    CHECK_LAYER(mpt_softmax_cross_entropy(net, in, &d), MPT_ERROR_ARGUMENT, "cross_entropy1");
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
    d = zero, d.groups = -1, CHECK_LAYER(mpt_conv2d(net, in, 3, 3, &d), MPT_ERROR_ARGUMENT, "groups");
    d.groups = 2, CHECK_LAYER(mpt_conv2d(net, in, 4, 3, &d), MPT_ERROR_SHAPE, "conv1");  /* of 3 channels */
    d.groups = 3, CHECK_LAYER(mpt_conv2d(net, in, 4, 3, &d), MPT_ERROR_SHAPE, "groups"); /* and 4 filters */
    d = zero, d.padding = 2147483647, CHECK_LAYER(mpt_conv2d(net, in, 4, 3, &d), MPT_ERROR_SHAPE, "conv1");
    CHECK_LAYER(mpt_conv2d(net, in, 2147483647, 3, NULL), MPT_ERROR_SHAPE, "conv1");
    CHECK_LAYER(mpt_max_pool2d(net, in, 0, NULL), MPT_ERROR_ARGUMENT, "window");
    CHECK_LAYER(mpt_max_pool2d(net, in, -1, NULL), MPT_ERROR_ARGUMENT, "window");
    CHECK_LAYER(mpt_avg_pool2d(net, in, -1, NULL), MPT_ERROR_ARGUMENT, "avg_pool1");
    CHECK_LAYER(mpt_max_pool2d(net, in, 9, NULL), MPT_ERROR_SHAPE, "max_pool1");
    net = mpt_model_new(ctx, policy_of(0)); /* an index of 16 bits tells 256 x 256 elements of a window apart */
    check_layer(ctx, net, mpt_max_pool2d(net, mpt_input(net, 257, 257, 1), 257, NULL), MPT_ERROR_SHAPE, "65536",
                __LINE__);
    net = mpt_model_new(ctx, policy_of(0));
    CHECK(mpt_max_pool2d(net, mpt_input(net, 257, 257, 1), 256, NULL) != 0);
    CHECK(mpt_avg_pool2d(net, 1, 257, NULL) != 0);
    mpt_model_free(net);
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
    CHECK_ERROR(ctx, mpt_model_build(net, NULL), MPT_ERROR_ORDER, "no layer");
    mpt_linear(net, in, 3, NULL), mpt_linear(net, in, 2, NULL);
    mpt_mse(net, 3);
    CHECK_ERROR(ctx, mpt_model_build(net, NULL), MPT_ERROR_ORDER, "linear1"); /* nothing reads it */
    mpt_model_free(net);
    net = begin(ctx, &in);
    mpt_mse(net, mpt_linear(net, in, 2, NULL)), mpt_mse(net, mpt_linear(net, in, 2, NULL));
    CHECK_ERROR(ctx, mpt_model_build(net, NULL), MPT_ERROR_ORDER, "loss"); /* two */
    mpt_model_free(net);
    net = mpt_model_new(ctx, o0);
    CHECK_ERROR(ctx, mpt_model_build(net, NULL), MPT_ERROR_ORDER, "no layer"); /* nothing at all */
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
    a = build(ctx, policy_of(0), cnn, MPT_LOSS_CROSS_ENTROPY, &train);
    for (i = 1; i < POLICIES; i++) {
        double *p, *q, *tolerance = test_doubles(6 * 36);
        size_t n = mpt_params_count(mpt_model_params(a), 5), j;
        b = build(ctx, policy_of(i), cnn, MPT_LOSS_CROSS_ENTROPY, &train);
        p = doubles_of(a, 5), q = doubles_of(b, 5);
        for (j = 0; j < n && policy_of(i).master == MPT_MASTER_NONE; j++)
            tolerance[j] = test_unit(policy_of(i).param) * fabs(p[j]) + test_tiny(policy_of(i).param);
        CHECK_ALL(q, n, p, tolerance);
        free(p), free(q), free(tolerance);
        mpt_model_free(b);
    }
    train.seed = 78;
    b = build(ctx, policy_of(0), cnn, MPT_LOSS_CROSS_ENTROPY, &train);
    CHECK(!same(state_of(ctx, a), state_of(ctx, b)));
    mpt_model_free(a), mpt_model_free(b);
}

/* ==== POLICIES OF NODES ==== */

static mpt_node_info info_of(mpt_context *ctx, const mpt_model *net, int node) {
    mpt_node_info info;
    memset(&info, 0, sizeof info);
    CHECK_OK(ctx, mpt_model_node(net, node, &info));
    return info;
}

static void check_types(mpt_context *ctx, const mpt_model *net, int node, mpt_dtype type, mpt_dtype grad,
                        mpt_dtype weight) {
    const mpt_node_info info = info_of(ctx, net, node);
    int ok = CHECK_EQUAL(info.type, type);
    ok &= CHECK_EQUAL(info.grad_type, grad);
    ok &= CHECK_EQUAL(info.weight_type, weight);
    ok &= CHECK(info.reason && info.reason[0]);
    if (!ok) printf("    of %s\n", info.name);
}

/* A range in fp32 within a model of 16-bit types, and another within that. */
static void test_policy_range(mpt_context *ctx, mpt_level level, mpt_dtype half) {
    const mpt_dtype none = MPT_DTYPE_COUNT, f32 = MPT_F32;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(level, half));
    int h = mpt_conv2d(net, mpt_input(net, 6, 6, 3), 4, 3, NULL);
    CHECK_OK(ctx, mpt_policy_push(net, mpt_policy_preset(MPT_O0, f32)));
    h = mpt_conv2d(net, mpt_batch_norm(net, h, NULL), 4, 3, NULL);
    CHECK_OK(ctx, mpt_policy_push(net, mpt_policy_preset(level, half)));
    h = mpt_max_pool2d(net, h, 2, NULL);
    CHECK_OK(ctx, mpt_policy_pop(net));
    h = mpt_tanh(net, h);
    CHECK_OK(ctx, mpt_policy_pop(net));
    h = mpt_conv2d(net, h, 4, 3, NULL);
    mpt_mse(net, mpt_linear(net, h, 2, NULL));
    CHECK_OK(ctx, mpt_model_build(net, NULL));
    check_types(ctx, net, 1, half, half, none);
    check_types(ctx, net, 2, half, half, half);
    check_types(ctx, net, 3, f32, f32, none);
    check_types(ctx, net, 4, f32, f32, f32);
    check_types(ctx, net, 5, half, half, none);
    check_types(ctx, net, 6, f32, f32, none);
    check_types(ctx, net, 7, half, half, half);
    check_types(ctx, net, 8, f32, half, half); /* the logits */
    CHECK_EQUAL(info_of(ctx, net, 9).type, f32);
    mpt_model_free(net);
}

/* A model whose nodes are all pushed to fp32 is an O0 model, bit for bit. */
static void test_policy_everywhere(mpt_context *ctx) {
    const recipe r = {mixed, MPT_LOSS_CROSS_ENTROPY, NULL, 0, 12};
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(mixed, 6, 1);
    mpt_model *pushed, *plain;
    int i;
    train.batch = 6;
    pushed = build_recipe(ctx, mpt_policy_preset(MPT_O1, MPT_BF16), &r, &train);
    plain = build(ctx, policy_of(0), mixed, MPT_LOSS_CROSS_ENTROPY, &train);
    for (i = 0; i < 3; i++) {
        CHECK_OK(ctx, mpt_train_step(pushed, s.x, s.label));
        CHECK_OK(ctx, mpt_train_step(plain, s.x, s.label));
        CHECK_EQUAL(mpt_loss(pushed), mpt_loss(plain));
    }
    CHECK(same(state_of(ctx, pushed), state_of(ctx, plain)));
    mpt_model_free(pushed), mpt_model_free(plain);
    samples_free(&s);
}

/* The second layer, "odd", has a policy of its own that cannot be. */
static void check_pushed(mpt_context *ctx, mpt_policy policy, mpt_policy pushed, const char *word, int line) {
    mpt_model *net = mpt_model_new(ctx, policy);
    mpt_linear_desc odd = MPT_ZERO;
    int h = mpt_linear(net, mpt_input(net, 1, 1, 3), 4, NULL);
    odd.name = "odd";
    CHECK_OK(ctx, mpt_policy_push(net, pushed));
    h = mpt_linear(net, h, 4, &odd);
    CHECK_OK(ctx, mpt_policy_pop(net));
    mpt_mse(net, mpt_linear(net, h, 2, NULL));
    test_check_result(ctx, mpt_model_build(net, NULL), MPT_ERROR_TYPE, __FILE__, line, "mpt_model_build");
    test_check_reason(ctx, "odd", __FILE__, line);
    test_check_reason(ctx, word, __FILE__, line);
    mpt_model_free(net);
}

static void test_policy_errors(mpt_context *ctx) {
    const mpt_policy o0 = policy_of(0), half = mpt_policy_preset(MPT_O2, MPT_BF16);
    mpt_policy p = o0;
    mpt_model *net = mpt_model_new(ctx, half);
    int i;
    CHECK(mpt_policy_push(NULL, o0) == MPT_ERROR_ARGUMENT && mpt_policy_pop(NULL) == MPT_ERROR_ARGUMENT);
    CHECK_ERROR(ctx, mpt_policy_pop(net), MPT_ERROR_ORDER, "policy_pop");
    for (i = 0; i < 8; i++) CHECK_OK(ctx, mpt_policy_push(net, o0));
    CHECK_ERROR(ctx, mpt_policy_push(net, o0), MPT_ERROR_ORDER, "8");
    for (i = 0; i < 8; i++) CHECK_OK(ctx, mpt_policy_pop(net));
    CHECK_ERROR(ctx, mpt_policy_pop(net), MPT_ERROR_ORDER, "policy_pop");
    mpt_mse(net, mpt_linear(net, mpt_input(net, 1, 1, 3), 2, NULL));
    CHECK_OK(ctx, mpt_model_build(net, NULL));
    CHECK_ERROR(ctx, mpt_policy_push(net, o0), MPT_ERROR_ORDER, "built");
    mpt_model_free(net);
    check_pushed(ctx, half, mpt_policy_preset(MPT_O2, MPT_F16), "f16", __LINE__); /* two 16-bit types */
    check_pushed(ctx, half, mpt_policy_preset(MPT_O1, MPT_E4M3), "policy", __LINE__);
    check_pushed(ctx, mpt_policy_preset(MPT_O3, MPT_BF16), o0, "master", __LINE__); /* there are no fp32 masters */
    p.master = MPT_MASTER_NONE;
    check_pushed(ctx, mpt_policy_preset(MPT_O3, MPT_BF16), p, "master", __LINE__);
    p = half, p.master = MPT_MASTER_SPLIT;
    check_pushed(ctx, half, p, "master", __LINE__); /* two kinds of masters */
}

/* ==== THE PLAN ==== */

enum { LINE_SIZE = 200 };

typedef struct printed {
    int lines;
    char line[MOST_ITEMS + 4][LINE_SIZE];
} printed;

static void keep_line(const char *line, void *user) {
    printed *p = (printed *)user;
    CHECK(strlen(line) <= 160 && strlen(line) < LINE_SIZE);
    CHECK(strchr(line, '\n') == line + strlen(line) - 1);
    if (CHECK(p->lines < MOST_ITEMS + 4 && strlen(line) < LINE_SIZE))
        memcpy(p->line[p->lines++], line, strlen(line) + 1);
}

static int has_number(const char *line, size_t number) {
    char text[32];
    snprintf(text, sizeof text, "%lu", (unsigned long)number);
    return test_has_word(line, text);
}

/* The line of a node tells what mpt_model_node does. */
static void check_line(const mpt_node_info *info, int node, const char *line) {
    char shape[64];
    snprintf(shape, sizeof shape, "%dx%dx%d", info->H, info->W, info->C);
    CHECK(has_number(line, (size_t)node) && test_has_word(line, info->name) && test_has_word(line, shape));
    CHECK(test_has_word(line, mpt_dtype_name(info->type)) && strstr(line, info->kernel) != NULL);
    CHECK(has_number(line, info->parameters) && has_number(line, info->bytes) && has_number(line, info->multiply_adds));
}

static void check_plan(mpt_context *ctx, mpt_policy policy, const recipe *r) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(r->items, 1, 1);
    printed p;
    mpt_model *model;
    size_t bytes = 0, parameters = 0, expected = 0;
    net64 net;
    int i;
    train.batch = 6;
    model = build_recipe(ctx, policy, r, &train);
    net = net64_new(ctx, model, r->items, r->loss, &s, 1);
    memset(&p, 0, sizeof p);
    CHECK_OK(ctx, mpt_model_print(model, keep_line, &p));
    CHECK_EQUAL(p.lines, net.last + 3); /* a header, the nodes, the loss */
    for (i = 0; i <= net.last + 1; i++) {
        const mpt_node_info info = info_of(ctx, model, i + 1);
        check_line(&info, i + 1, p.line[i + 1]);
        bytes += info.bytes, parameters += info.parameters;
        CHECK(info.bytes <= mpt_model_memory(model).activations);
        if (i > net.last) continue;
        CHECK(info.H == (int)net.H[i] && info.W == (int)net.W[i] && info.C == (int)net.C[i]);
        CHECK(!info.fused_into || info.bytes == 0);
        CHECK(info.fused_into || r->items[i].kind == 'f' ||
              info.bytes >= (size_t)train.batch * size64(&net, i) * mpt_dtype_size(info.type));
        if (is_convolution(r->items[i].kind) || r->items[i].kind == 'l') {
            const mpt_conv2d_shape c = conv64(&net, i);
            CHECK_EQUAL(info.multiply_adds, c.K * c.R * c.S * c.C / c.groups * net.H[i] * net.W[i]);
        } else CHECK_EQUAL(info.multiply_adds, 0);
    }
    CHECK(bytes >= mpt_model_memory(model).activations);
    for (i = 1; i <= mpt_params_tensors(mpt_model_params(model)); i++)
        expected += mpt_params_count(mpt_model_params(model), i);
    CHECK_EQUAL(parameters, expected);
    net64_free(&net), samples_free(&s);
    mpt_model_free(model);
}

static void test_plans(mpt_context *ctx) {
    static const recipe recipes[] = {{mlp, MPT_LOSS_HUBER, NULL, 0, 0},
                                     {cnn, MPT_LOSS_CROSS_ENTROPY, NULL, 0, 0},
                                     {normed, MPT_LOSS_CROSS_ENTROPY, NULL, 0, 0},
                                     {mixed, MPT_LOSS_BCE_WITH_LOGITS, NULL, 0, 0},
                                     {mixed, MPT_LOSS_ABSOLUTE_ERROR, NULL, 3, 7}};
    int i;
    for (i = 0; i < 5 * POLICIES; i++)
        if (!recipes[i % 5].last || policy_of(i / 5).master == MPT_MASTER_F32)
            check_plan(ctx, policy_of(i / 5), &recipes[i % 5]);
}

/* Names of 31 characters, and numbers of 10 digits. */
static void test_wide_plan(mpt_context *ctx) {
    const char *name = "a_name_of_thirty_one_characters", *other = "b_name_of_thirty_one_characters";
    mpt_conv2d_desc conv = MPT_ZERO;
    mpt_norm_desc norm = MPT_ZERO;
    mpt_train_desc train = MPT_ZERO;
    printed p;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O1, MPT_BF16));
    int h = mpt_input(net, 101, 103, 100);
    conv.name = name, norm.name = other;
    h = mpt_conv2d(net, h, 100, 3, &conv);
    h = mpt_relu(net, mpt_batch_norm(net, h, &norm));
    mpt_mse(net, mpt_global_avg_pool2d(net, h));
    train.batch = 2;
    CHECK_OK(ctx, mpt_model_build(net, &train));
    memset(&p, 0, sizeof p);
    CHECK_OK(ctx, mpt_model_print(net, keep_line, &p));
    CHECK(test_has_word(p.line[2], name) && test_has_word(p.line[3], other));
    CHECK(has_number(p.line[2], (size_t)101 * 103 * 900 * 100));
    CHECK_EQUAL(info_of(ctx, net, 4).fused_into, 3);
    mpt_model_free(net);
}

static void test_plan_errors(mpt_context *ctx) {
    mpt_model *net = mpt_model_new(ctx, policy_of(0));
    mpt_node_info info;
    printed p;
    memset(&p, 0, sizeof p);
    mpt_mse(net, mpt_batch_norm(net, mpt_input(net, 1, 1, 3), NULL));
    CHECK_ERROR(ctx, mpt_model_node(net, 1, &info), MPT_ERROR_ORDER, "built");
    CHECK_ERROR(ctx, mpt_model_print(net, keep_line, &p), MPT_ERROR_ORDER, "built");
    CHECK(mpt_model_running(net, 2) == NULL);
    CHECK_OK(ctx, mpt_model_build(net, NULL));
    CHECK_ERROR(ctx, mpt_model_node(net, 0, &info), MPT_ERROR_ARGUMENT, "0");
    CHECK_ERROR(ctx, mpt_model_node(net, 4, &info), MPT_ERROR_ARGUMENT, "4");
    CHECK_ERROR(ctx, mpt_model_node(net, 1, NULL), MPT_ERROR_ARGUMENT, "out");
    CHECK_ERROR(ctx, mpt_model_print(net, NULL, &p), MPT_ERROR_ARGUMENT, "write");
    CHECK(mpt_model_node(NULL, 1, &info) == MPT_ERROR_ARGUMENT);
    CHECK(mpt_model_print(NULL, keep_line, &p) == MPT_ERROR_ARGUMENT);
    CHECK(mpt_model_running(NULL, 2) == NULL && mpt_model_running(net, 1) == NULL);
    CHECK(mpt_model_running(net, 0) == NULL && mpt_model_running(net, 4) == NULL);
    CHECK(mpt_model_running(net, 2) != NULL);
    CHECK_EQUAL(p.lines, 0);
    mpt_model_free(net);
}

/* ==== MEMORY ==== */

static size_t ledger(const mpt_model *model) {
    const mpt_memory m = mpt_model_memory(model);
    return m.weights + m.masters + m.gradients + m.moments + m.activations + m.workspace + m.bookkeeping;
}

/* The ledger is what the allocator gave; a step, an evaluation, a prediction take nothing more. */
static void test_memory_ledger(mpt_policy policy, const recipe *r, const mpt_optimizer_desc *optimizer) {
    test_counter counter;
    const mpt_context_desc desc = test_counting(&counter, 1);
    mpt_context *ctx = test_open(&desc);
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(r->items, 12, 1);
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
    model = build_recipe(ctx, policy, r, &train);
    if (host) CHECK_EQUAL(ledger(model), counter.bytes - before);
    calls = counter.calls;
    for (i = 0; i < 3; i++) {
        CHECK_OK(ctx, mpt_train_step(model, s.x, target_of(&s, r->loss)));
        CHECK_OK(ctx, mpt_evaluate(model, s.x, target_of(&s, r->loss), 12, &m));
        CHECK_OK(ctx, mpt_predict(model, s.x, 12, out));
        parts(ctx, model, &s, r->loss, &train);
    }
    CHECK_EQUAL(counter.calls, calls);
    if (host) CHECK_EQUAL(ledger(model), counter.bytes - before);
    mpt_model_free(model);
    mpt_close(ctx);
    CHECK(test_counter_clean(&counter));
    samples_free(&s);
}

static void test_ledgers(void) {
    static const float weights[CLASSES] = {1, 2, 1, 1, 1};
    const mpt_optimizer_desc optimizers[] = {mpt_sgd(0.1, 0), mpt_sgd(0.1, 0.9), mpt_adam(0.1)};
    mpt_cross_entropy_desc weighted = MPT_ZERO;
    recipe r[6];
    int i, j;
    memset(r, 0, sizeof r);
    weighted.class_weights = weights;
    r[0].items = mlp, r[0].loss = MPT_LOSS_SQUARED_ERROR;
    r[1].items = cnn;
    r[2].items = normed, r[2].desc = &weighted;
    r[3].items = mixed, r[3].loss = MPT_LOSS_HUBER;
    r[4].items = mixed, r[4].first = 3, r[4].last = 7;
    r[5].items = mixed, r[5].last = 12; /* all of it */
    for (i = 0; i < POLICIES; i++)
        for (j = 0; j < 6; j++)
            if (!r[j].last || policy_of(i).master == MPT_MASTER_F32)
                test_memory_ledger(policy_of(i), &r[j], &optimizers[(i + j) % 3]);
}

/* What mixed precision promises: activations take at most 0.55 of what they take in fp32. */
static void test_activation_memory(mpt_context *ctx) {
    static const item *const nets[] = {cnn, normed, broad};
    mpt_train_desc train = MPT_ZERO;
    int i, j;
    train.batch = 32;
    for (j = 0; j < 3; j++) {
        mpt_model *plain = build(ctx, policy_of(0), nets[j], MPT_LOSS_CROSS_ENTROPY, &train);
        for (i = 1; i < 5; i++) {
            mpt_model *model = build(ctx, policy_of(i), nets[j], MPT_LOSS_CROSS_ENTROPY, &train);
            CHECK((double)mpt_model_memory(model).activations <= 0.55 * (double)mpt_model_memory(plain).activations);
            mpt_model_free(model);
        }
        mpt_model_free(plain);
    }
}

/* Bytes a parameter takes by role, as the field counts them: 4, or 2 with 4 for a master; Adam 8. */
static void test_roles(mpt_context *ctx) {
    static const size_t weights[] = {4, 6, 6, 2, 2, 2, 2}, masters[] = {0, 0, 0, 4, 4, 0, 0};
    int i;
    for (i = 0; i < POLICIES; i++) {
        mpt_model *model = build(ctx, policy_of(i), mlp, MPT_LOSS_CROSS_ENTROPY, NULL);
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
static const item toy[] = {{'i', 1, 1, 2, 0, 0, 0},
                           {'l', 0, 0, 24, 0, 0, 0},
                           {'r', 1, 0, 0, 0, 0, 0},
                           {'l', 2, 0, 5, 0, 0, 0},
                           {0, 0, 0, 0, 0, 0, 0}};
static const item normed_toy[] = {{'i', 1, 1, 2, 0, 0, 0}, {'l', 0, 0, 24, 0, 0, 0}, {'N', 1, 0, 0, 0, 0, 0},
                                  {'r', 2, 0, 0, 0, 0, 0}, {'l', 3, 0, 5, 0, 0, 0},  {0, 0, 0, 0, 0, 0, 0}};

static void test_toy(mpt_context *ctx, mpt_policy policy, const item *items, mpt_loss_kind loss) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(items, 40, 2);
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
    model = build(ctx, policy, items, loss, &train);
    CHECK_OK(ctx, mpt_evaluate(model, s.x, target_of(&s, loss), 40, &first));
    for (i = 0; i < 150; i++) CHECK_OK(ctx, mpt_train_step(model, s.x, target_of(&s, loss)));
    CHECK_OK(ctx, mpt_evaluate(model, s.x, target_of(&s, loss), 40, &last));
    CHECK(last.loss < 0.2 * first.loss);
    if (loss == MPT_LOSS_CROSS_ENTROPY) CHECK_EQUAL(last.correct, 40);
    CHECK(mpt_steps_applied(model) >= 140);
    mpt_model_free(model);
    samples_free(&s);
}

static void test_all_gradients(mpt_context *ctx) {
    static const item *const nets[] = {mlp, cnn, smooth, curved, normed, even, sums};
    static const size_t samples_of[] = {9, 5, 4, 5, 5, 6, 6};
    int i, loss;
    for (loss = 0; loss < MPT_LOSS_GRADIENT; loss++)
        for (i = 0; i < 7; i++) test_gradients(ctx, nets[i], (mpt_loss_kind)loss, samples_of[i]);
    test_gradients(ctx, mlp, MPT_LOSS_CROSS_ENTROPY, 1);
    test_gradients(ctx, mlp, MPT_LOSS_SQUARED_ERROR, 1);
    test_gradients(ctx, cnn, MPT_LOSS_CROSS_ENTROPY, 9);
    test_gradients(ctx, normed, MPT_LOSS_CROSS_ENTROPY, 1);
    test_all_mixed_gradients(ctx);
    test_class_weights(ctx);
}

static void test_losses(mpt_context *ctx, mpt_loss_kind loss) {
    int i;
    test_accumulation(ctx, mlp, loss);
    test_accumulation(ctx, cnn, loss);
    test_evaluation(ctx, mlp, loss);
    test_evaluation(ctx, cnn, loss);
    test_evaluation(ctx, mixed, loss);
    for (i = 0; i < POLICIES; i++) {
        test_parts(ctx, i % 2 ? cnn : mlp, policy_of(i), loss);
        test_bad_data(ctx, policy_of(i), loss);
        if (loss <= MPT_LOSS_BCE_WITH_LOGITS) test_toy(ctx, policy_of(i), i % 2 ? toy : normed_toy, loss);
    }
}

int main(int argc, char **argv) {
    mpt_context *ctx = test_open_threads(1);
    int i;
    test_begin(argc, argv);
    RUN_TEST(test_all_gradients(ctx));
    for (i = 0; i < MPT_LOSS_GRADIENT; i++) RUN_TEST(test_losses(ctx, (mpt_loss_kind)i));
    for (i = 0; i < POLICIES; i++) {
        RUN_TEST(test_parts(ctx, mixed, policy_of(i), MPT_LOSS_CROSS_ENTROPY));
        RUN_TEST(test_toy(ctx, policy_of(i), i % 2 ? normed_toy : toy, MPT_LOSS_CROSS_ENTROPY));
        RUN_TEST(test_evaluation_is_neutral(ctx, policy_of(i), narrow));
        RUN_TEST(test_evaluation_is_neutral(ctx, policy_of(i), mixed));
        RUN_TEST(test_threads(policy_of(i), wide));
        RUN_TEST(test_threads(policy_of(i), broad));
    }
    RUN_TEST(test_all_samples(ctx));
    RUN_TEST(test_ignored(ctx));
    RUN_TEST(test_empty_step(ctx, policy_of(0)));
    RUN_TEST(test_empty_step(ctx, mpt_policy_preset(MPT_O2, MPT_F16)));
    RUN_TEST(test_abandoned_weight(ctx));
    RUN_TEST(test_running(ctx));
    RUN_TEST(test_running_skips(ctx, mpt_policy_preset(MPT_O1, MPT_F16)));
    RUN_TEST(test_running_skips(ctx, mpt_policy_preset(MPT_O2, MPT_F16)));
    RUN_TEST(test_running_overflow(ctx));
    RUN_TEST(test_running_infinite(ctx, policy_of(0)));
    RUN_TEST(test_running_infinite(ctx, mpt_policy_preset(MPT_O2, MPT_BF16)));
    RUN_TEST(test_all_abandoned(ctx));
    RUN_TEST(test_single_value(ctx));
    RUN_TEST(test_dropout(ctx));
    RUN_TEST(test_dropout_names(ctx));
    RUN_TEST(test_divergence(ctx));
    RUN_TEST(test_order(ctx));
    RUN_TEST(test_failed_step(ctx));
    RUN_TEST(test_again());
    RUN_TEST(test_layer_errors(ctx));
    RUN_TEST(test_layer_names(ctx));
    RUN_TEST(test_exact_input(ctx, mpt_policy_preset(MPT_O1, MPT_BF16), 0));
    RUN_TEST(test_exact_input(ctx, mpt_policy_preset(MPT_O2, MPT_BF16), 0));
    RUN_TEST(test_exact_input(ctx, mpt_policy_preset(MPT_O1, MPT_BF16), 1));
    RUN_TEST(test_rounded_bias(ctx));
    for (i = 0; i < MPT_LOSS_GRADIENT; i++) RUN_TEST(test_odd_targets(ctx, (mpt_loss_kind)i));
    RUN_TEST(test_norm_errors(ctx));
    RUN_TEST(test_cross_entropy_errors(ctx));
    RUN_TEST(test_window_errors(ctx));
    RUN_TEST(test_build_errors(ctx));
    RUN_TEST(test_output_type(ctx));
    RUN_TEST(test_seed(ctx));
    RUN_TEST(test_policy_range(ctx, MPT_O1, MPT_F16));
    RUN_TEST(test_policy_range(ctx, MPT_O2, MPT_BF16));
    RUN_TEST(test_policy_everywhere(ctx));
    RUN_TEST(test_policy_errors(ctx));
    RUN_TEST(test_plans(ctx));
    RUN_TEST(test_wide_plan(ctx));
    RUN_TEST(test_plan_errors(ctx));
    RUN_TEST(test_roles(ctx));
    RUN_TEST(test_activation_memory(ctx));
    mpt_close(ctx);
    RUN_TEST(test_ledgers());
    return test_finish("model");
}
