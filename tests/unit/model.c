/* model.c - floor 4: whole models against the same models on a reference context, whose gradients are held against
   central differences; training, evaluation, memory, builder errors. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"

static mpt_context *reference; /* the reference context */

/* ==== NETS ==== */

/* The size of its input, and what comes behind it. */
typedef struct arch {
    int H, W, C;
    int (*layers)(mpt_model *net, int h);
    int in_fp32; /* 1: input and first layers are, until the net pops the policy */
} arch;

static const float drop_share = 0.4f;

/* A convolution without bias: a norm comes behind it. */
static int bare_conv(mpt_model *net, int h, int filters, int kernel, int groups) {
    mpt_conv2d_desc d = MPT_ZERO;
    d.same = 1;
    d.no_bias = 1;
    d.groups = groups;
    return mpt_conv2d(net, h, filters, kernel, &d);
}

static int grouped_conv(mpt_model *net, int h, int filters, int kernel, int groups) {
    mpt_conv2d_desc d = MPT_ZERO;
    d.same = 1;
    d.groups = groups;
    return mpt_conv2d(net, h, filters, kernel, &d);
}

/* Half the size: a window of 2 x 2 without padding */
static int halving_conv(mpt_model *net, int h, int filters, int groups, int no_bias) {
    mpt_conv2d_desc d = MPT_ZERO;
    d.stride = 2;
    d.groups = groups;
    d.no_bias = no_bias;
    return mpt_conv2d(net, h, filters, 2, &d);
}

static int mlp_layers(mpt_model *net, int h) {
    h = mpt_relu(net, mpt_linear(net, h, 13, NULL));
    h = mpt_relu(net, mpt_linear(net, h, 11, NULL));
    return mpt_linear(net, h, 5, NULL);
}
static const arch mlp[] = {{1, 1, 7, mlp_layers, 0}};

/* A value used twice, a value added to itself, a ReLU that follows a sum and one that follows a pool. */
static int cnn_layers(mpt_model *net, int h) {
    mpt_conv2d_desc stride = MPT_ZERO;
    mpt_pool2d_desc pool = MPT_ZERO;
    int a;
    a = mpt_relu(net, test_same(net, h, 4, 3));
    h = test_same(net, a, 4, 3);
    h = mpt_relu(net, mpt_add(net, h, a));
    h = mpt_max_pool2d(net, h, 2, NULL);
    stride.stride = 2;
    stride.padding = 1;
    h = mpt_conv2d(net, h, 6, 3, &stride);
    pool.stride = 1;
    pool.padding = 1;
    h = mpt_relu(net, mpt_avg_pool2d(net, h, 2, &pool));
    h = mpt_flatten(net, mpt_add(net, h, h));
    return mpt_linear(net, h, 5, NULL);
}
static const arch cnn[] = {{9, 8, 2, cnn_layers, 0}};

/* Without ReLU and max pooling: rounding to 16 bits cannot switch a unit. */
static int smooth_tail(mpt_model *net, int h, int a) {
    h = halving_conv(net, mpt_add(net, h, a), 8, 0, 0);
    return mpt_linear(net, mpt_global_avg_pool2d(net, h), 5, NULL);
}
static int smooth_layers(mpt_model *net, int h) {
    h = test_same(net, h, 5, 3);
    return smooth_tail(net, h, mpt_conv2d(net, h, 5, 1, NULL));
}
static const arch smooth[] = {{6, 6, 3, smooth_layers, 0}};

/* The other activations: some a product can compute in passing, some keep their input; one input is used twice. */
static int curved_layers(mpt_model *net, int h) {
    int a;
    h = test_same(net, h, 4, 3);
    a = mpt_gelu(net, h);
    h = mpt_tanh(net, h);
    h = mpt_leaky_relu(net, mpt_add(net, a, h), 0);
    h = mpt_silu(net, halving_conv(net, h, 6, 0, 0));
    h = mpt_sigmoid(net, mpt_linear(net, h, 9, NULL));
    h = mpt_gelu_tanh(net, mpt_linear(net, h, 8, NULL));
    return mpt_linear(net, h, 5, NULL);
}
static const arch curved[] = {{6, 6, 3, curved_layers, 0}};

/* Kernels, windows, strides and padding that differ down and across, even kernels that keep the size, means of what the
   image holds, global pooling of both kinds. */
static int axes_layers(mpt_model *net, int h) {
    mpt_conv2d_desc thin = MPT_ZERO, same = MPT_ZERO;
    mpt_pool2d_desc pool = MPT_ZERO;
    thin.kernel_w = 2;
    thin.stride_w = 2;
    thin.padding = 2;
    thin.padding_w = -1;
    thin.dilation = 2;
    thin.dilation_w = 1;
    h = mpt_tanh(net, mpt_conv2d(net, h, 4, 3, &thin));
    same.kernel_w = 4;
    same.same = 1;
    h = mpt_conv2d(net, h, 6, 2, &same);
    pool.window_w = 2;
    pool.stride = 2;
    pool.stride_w = 1;
    pool.padding = 1;
    pool.exclude_padding = 1;
    h = mpt_avg_pool2d(net, h, 3, &pool);
    h = mpt_concat(net, mpt_global_max_pool2d(net, h), mpt_global_avg_pool2d(net, h));
    return mpt_linear(net, h, 5, NULL);
}
static const arch axes[] = {{9, 8, 3, axes_layers, 0}};

/* Norms with a ReLU behind them, with another activation, with none and two readers; convolutions in groups and
   depthwise; values side by side, one of them used elsewhere, too. */
static int normed_layers(mpt_model *net, int h) {
    int a, b;
    a = mpt_relu(net, mpt_batch_norm(net, bare_conv(net, h, 8, 3, 0), NULL));
    h = mpt_silu(net, mpt_group_norm(net, grouped_conv(net, a, 8, 3, 8), 2, NULL));
    b = mpt_batch_norm(net, halving_conv(net, mpt_concat(net, a, h), 8, 2, 1), NULL);
    h = mpt_layer_norm(net, test_same(net, b, 8, 3), NULL);
    h = mpt_relu(net, mpt_add(net, b, h));
    return mpt_linear(net, mpt_global_avg_pool2d(net, h), 5, NULL);
}
static const arch normed[] = {{6, 6, 3, normed_layers, 0}};
static const int batch_norms[] = {3, 10}; /* nodes of normed */

/* The same without a kink. */
static int even_head(mpt_model *net, int h) {
    return mpt_tanh(net, mpt_batch_norm(net, bare_conv(net, h, 8, 3, 0), NULL));
}
static int even_middle(mpt_model *net, int a) {
    const int h = mpt_tanh(net, mpt_group_norm(net, grouped_conv(net, a, 8, 3, 2), 2, NULL));
    return halving_conv(net, mpt_concat(net, a, h), 8, 0, 0);
}
static int even_tail(mpt_model *net, int h) {
    return mpt_linear(net, mpt_tanh(net, mpt_layer_norm(net, h, NULL)), 5, NULL);
}
static int even_layers(mpt_model *net, int h) { return even_tail(net, even_middle(net, even_head(net, h))); }
static const arch even[] = {{6, 6, 3, even_layers, 0}};

/* Sums whose gradient is also that of an input: of the first, of the second because the first is read later, of a sum,
   of one with a ReLU behind it; and one both of whose inputs are read later. */
static int sums_layers(mpt_model *net, int h) {
    int a, b, c;
    a = mpt_relu(net, mpt_batch_norm(net, bare_conv(net, h, 4, 3, 0), NULL));
    h = mpt_relu(net, mpt_batch_norm(net, bare_conv(net, a, 4, 3, 0), NULL));
    b = mpt_add(net, a, h);
    h = mpt_tanh(net, mpt_conv2d(net, b, 4, 1, NULL));
    b = mpt_relu(net, mpt_add(net, b, h));
    h = mpt_add(net, mpt_add(net, mpt_conv2d(net, b, 4, 1, NULL), a), b);
    c = mpt_add(net, b, a);
    h = mpt_add(net, mpt_add(net, mpt_add(net, c, h), b), a);
    return mpt_linear(net, mpt_global_avg_pool2d(net, h), 5, NULL);
}
static const arch sums[] = {{5, 5, 4, sums_layers, 0}};

/* Values that a norm reads, and another layer, too: the norm adds to a gradient that is there. */
static int shared_layers(mpt_model *net, int h) {
    int a;
    h = test_same(net, h, 6, 3);
    a = mpt_tanh(net, mpt_layer_norm(net, h, NULL));
    h = mpt_add(net, h, a);
    a = mpt_group_norm(net, h, 2, NULL);
    h = mpt_add(net, a, h);
    a = mpt_relu(net, mpt_batch_norm(net, h, NULL));
    return mpt_linear(net, mpt_global_avg_pool2d(net, mpt_concat(net, h, a)), 5, NULL);
}
static const arch shared[] = {{4, 5, 3, shared_layers, 0}};

/* Norms, dropout, groups and values side by side at once. */
static int mixed_head(mpt_model *net, int h) { return mpt_batch_norm(net, bare_conv(net, h, 8, 3, 2), NULL); }
static int mixed_middle(mpt_model *net, int h) {
    const int a = mpt_relu(net, h);
    h = mpt_group_norm(net, grouped_conv(net, mpt_dropout(net, a, drop_share), 8, 3, 8), 4, NULL);
    return mpt_concat(net, h, a);
}
static int mixed_tail(mpt_model *net, int h) {
    h = mpt_relu(net, mpt_layer_norm(net, h, NULL));
    h = mpt_dropout(net, mpt_linear(net, h, 12, NULL), drop_share);
    return mpt_linear(net, h, 5, NULL);
}
static int mixed_layers(mpt_model *net, int h) { return mixed_tail(net, mixed_middle(net, mixed_head(net, h))); }
static const arch mixed[] = {{6, 6, 4, mixed_layers, 0}};

/* A model large enough to be split between threads. */
static int wide_layers(mpt_model *net, int h) {
    h = mpt_max_pool2d(net, mpt_relu(net, test_same(net, h, 16, 3)), 2, NULL);
    h = mpt_relu(net, mpt_add(net, test_same(net, h, 16, 3), h));
    h = mpt_relu(net, mpt_linear(net, h, 96, NULL));
    return mpt_linear(net, h, 5, NULL);
}
static const arch wide[] = {{16, 16, 8, wide_layers, 0}};

/* The same of the norms and their neighbours. */
static int broad_layers(mpt_model *net, int h) {
    const int a = mpt_relu(net, mpt_batch_norm(net, bare_conv(net, h, 16, 3, 0), NULL));
    h = mpt_group_norm(net, grouped_conv(net, a, 16, 3, 16), 4, NULL);
    h = mpt_dropout(net, mpt_concat(net, a, h), drop_share);
    h = mpt_relu(net, mpt_layer_norm(net, halving_conv(net, h, 16, 2, 0), NULL));
    return mpt_linear(net, h, 5, NULL);
}
static const arch broad[] = {{16, 16, 8, broad_layers, 0}};

/* A batch norm of one pixel */
static int flat_layers(mpt_model *net, int h) {
    return mpt_linear(net, mpt_batch_norm(net, mpt_linear(net, h, 6, NULL), NULL), 5, NULL);
}
static const arch flat[] = {{1, 1, 4, flat_layers, 0}};

/* More outputs than features */
static int narrow_layers(mpt_model *net, int h) {
    return mpt_linear(net, mpt_relu(net, mpt_linear(net, h, 9, NULL)), 5, NULL);
}
static const arch narrow[] = {{1, 1, 2, narrow_layers, 0}};

static int toy_layers(mpt_model *net, int h) {
    return mpt_linear(net, mpt_relu(net, mpt_linear(net, h, 24, NULL)), 5, NULL);
}
static int normed_toy_layers(mpt_model *net, int h) {
    return mpt_linear(net, mpt_relu(net, mpt_batch_norm(net, mpt_linear(net, h, 24, NULL), NULL)), 5, NULL);
}
static const arch toy[] = {{1, 1, 2, toy_layers, 0}}, normed_toy[] = {{1, 1, 2, normed_toy_layers, 0}};

/* -- With some layers in fp32 -- */

static void push_fp32(mpt_model *net) { CHECK(mpt_policy_push(net, mpt_policy_preset(MPT_O0, MPT_F32)) == MPT_OK); }

static int pop(mpt_model *net, int h) {
    CHECK(mpt_policy_pop(net) == MPT_OK);
    return h;
}

static int smooth_in_part_layers(mpt_model *net, int h) { /* both 3x3 and 1x1 */
    h = test_same(net, h, 5, 3);
    return smooth_tail(net, h, pop(net, mpt_conv2d(net, h, 5, 1, NULL)));
}
static const arch smooth_in_part[] = {{6, 6, 3, smooth_in_part_layers, 1}};

static int even_in_part_layers(mpt_model *net, int h) { /* the middle */
    h = even_head(net, h);
    push_fp32(net);
    return even_tail(net, pop(net, even_middle(net, h)));
}
static const arch even_in_part[] = {{6, 6, 3, even_in_part_layers, 0}};

static int mixed_in_part_layers(mpt_model *net, int h) { /* the middle */
    h = mixed_head(net, h);
    push_fp32(net);
    return mixed_tail(net, pop(net, mixed_middle(net, h)));
}
static const arch mixed_in_part[] = {{6, 6, 4, mixed_in_part_layers, 0}};

static int mixed_in_fp32_layers(mpt_model *net, int h) { return pop(net, mixed_layers(net, h)); }
static const arch mixed_in_fp32[] = {{6, 6, 4, mixed_in_fp32_layers, 1}};

static int add_loss(mpt_model *net, int id, mpt_loss_kind loss, const mpt_loss_desc *desc) {
    switch (loss) {
    case MPT_LOSS_SQUARED_ERROR: return mpt_mse(net, id, desc);
    case MPT_LOSS_BCE_WITH_LOGITS: return mpt_bce_with_logits(net, id, desc);
    case MPT_LOSS_ABSOLUTE_ERROR: return mpt_l1(net, id, desc);
    case MPT_LOSS_HUBER: return mpt_huber(net, id, desc);
    default: return mpt_softmax_cross_entropy(net, id, desc);
    }
}

/* What a model is made of. */
typedef struct recipe {
    const arch *kind;
    mpt_loss_kind loss;
    const mpt_loss_desc *desc;
} recipe;

static mpt_model *build_recipe(mpt_context *ctx, mpt_policy policy, const recipe *r, const mpt_train_desc *train) {
    mpt_model *net = mpt_model_new(ctx, policy);
    int h;
    if (r->kind->in_fp32) push_fp32(net);
    h = mpt_input(net, r->kind->H, r->kind->W, r->kind->C);
    add_loss(net, r->kind->layers(net, h), r->loss, r->desc);
    if (!CHECK_OK(ctx, mpt_model_build(net, train))) exit(test_finish("model"));
    return net;
}

static mpt_model *build(mpt_context *ctx, mpt_policy policy, const arch *kind, mpt_loss_kind loss,
                        const mpt_train_desc *train) {
    recipe r = MPT_ZERO;
    r.kind = kind;
    r.loss = loss;
    return build_recipe(ctx, policy, &r, train);
}

static mpt_policy policy_of(int i) { /* 0: O0, then O1..O3 in fp16 and bf16 */
    return mpt_policy_preset(i ? (mpt_level)((i + 1) / 2) : MPT_O0, i % 2 ? MPT_F16 : MPT_BF16);
}
enum { POLICIES = 7 };

/* ==== DATA ==== */

enum { CLASSES = 5, MOST_TENSORS = 32 };

typedef struct samples {
    float *x, *target;
    int32_t *label;
    size_t features;
} samples;

static samples samples_new(const arch *kind, size_t n, uint64_t seed) {
    samples s;
    size_t i;
    s.features = (size_t)(kind->H * kind->W * kind->C);
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
    later.x += first * s->features;
    later.target += first * CLASSES;
    later.label += first;
    return later;
}

static void samples_free(samples *s) {
    free(s->x);
    free(s->target);
    free(s->label);
}

static const void *target_of(const samples *s, mpt_loss_kind loss) {
    return loss == MPT_LOSS_CROSS_ENTROPY ? (const void *)s->label : (const void *)s->target;
}

/* ==== THE SAME MODEL ON THE REFERENCE ==== */

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

static mpt_node_info info_of(mpt_context *ctx, const mpt_model *net, int node) {
    mpt_node_info info;
    memset(&info, 0, sizeof info);
    CHECK_OK(ctx, mpt_model_node(net, node, &info));
    return info;
}

/* In fp32, with the weights and statistics that the model has now. */
static mpt_model *twin_new(mpt_context *ctx, mpt_model *model, const recipe *r, const mpt_train_desc *train) {
    mpt_model *twin = build_recipe(reference, mpt_policy_preset(MPT_O0, MPT_F32), r, train);
    const size_t n = mpt_params_count(mpt_model_params(model), 0);
    float *host = (float *)test_memory(n * sizeof *host);
    mpt_node_info info;
    int id;
    CHECK_OK(ctx, mpt_params_get(mpt_model_params(model), 0, host));
    CHECK_OK(reference, mpt_params_set(mpt_model_params(twin), 0, host));
    for (id = 1; mpt_model_node(model, id, &info) == MPT_OK; id++) {
        if (!mpt_model_running(model, id)) continue;
        CHECK_OK(ctx, mpt_download(ctx, host, mpt_model_running(model, id), 2 * (size_t)info.C * sizeof *host));
        CHECK_OK(reference, mpt_model_set_running(twin, id, host));
    }
    free(host);
    return twin;
}

/* Operations that a value passes, one rounding each: at every layer the terms of its sum forward and backward, at a
   norm those of its statistics and 20 more each way, at the loss those of the classes, and at the weight those of its
   own gradient's sum. */
static double roundings(mpt_context *ctx, const mpt_model *model, size_t n) {
    double count = 4 * CLASSES + 20, largest = 0;
    mpt_node_info info;
    int id;
    for (id = 2; mpt_model_node(model, id, &info) == MPT_OK; id++) {
        const mpt_node_info from = info_of(ctx, model, info.in[0]);
        const double pixels = (double)(info.H * info.W), before = (double)(from.H * from.W), C = (double)info.C;
        if (info.conv.R) count += (double)(info.conv.R * info.conv.S) * (double)(from.C + info.C) + 10;
        else if (info.multiply_adds) count += before * from.C + C + 10;
        else if (info.weight) count += 2 * fmax((double)n * pixels, pixels * C) + 40; /* a norm */
        else if (before > pixels) count += 2 * before + 4;                            /* a pool, at most all of it */
        else count += 4;
        if (info.multiply_adds) largest = fmax(largest, (double)n * pixels);
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

/* Both models have made a backward pass of the same samples. error: relative to the largest gradient of the tensor. */
static void check_gradients(mpt_context *ctx, mpt_model *model, mpt_model *twin, double error) {
    mpt_params *params = mpt_model_params(model);
    int tensor;
    for (tensor = 1; tensor <= mpt_params_tensors(params); tensor++) {
        const size_t n = mpt_params_count(params, tensor);
        double *g = gradient_of(ctx, model, tensor), *expected = gradient_of(reference, twin, tensor);
        double *tolerance = test_doubles(n);
        size_t i;
        for (i = 0; i < n; i++) tolerance[i] = error * largest_of(expected, n);
        CHECK(largest_of(expected, n) > 1e-4); /* or nothing would be tested */
        if (!CHECK_ALL(g, n, expected, tolerance)) printf("    in %s\n", mpt_params_name(params, tensor));
        free(g);
        free(expected);
        free(tolerance);
    }
}

/* O0: fp32 roundings. Each changes a gradient by at most u of the sizes it is made of, taken to be the largest one; the
   reference makes no more of them. */
static void test_gradients(mpt_context *ctx, const recipe *r, size_t n) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(r->kind, n, 3);
    mpt_model *model, *twin;
    double error;
    train.batch = 9;
    train.seed = 5;
    model = build_recipe(ctx, mpt_policy_preset(MPT_O0, MPT_F32), r, &train);
    twin = twin_new(ctx, model, r, &train);
    error = 2 * roundings(ctx, model, n) * test_unit(MPT_F32);
    CHECK_OK(ctx, mpt_forward(model, s.x, target_of(&s, r->loss), n));
    CHECK_OK(reference, mpt_forward(twin, s.x, target_of(&s, r->loss), (size_t)n));
    CHECK_NEAR(mpt_loss(model), mpt_loss(twin), error * mpt_loss(twin));
    CHECK_OK(ctx, mpt_backward(model));
    CHECK_OK(reference, mpt_backward(twin));
    check_gradients(ctx, model, twin, error);
    samples_free(&s);
    mpt_model_free(model);
    mpt_model_free(twin);
}

/* Mixed precision: 16-bit roundings of every activation, weight and gradient on the way, three a layer each way, each
   at most u of the largest. */
static void test_mixed_gradients(mpt_context *ctx, mpt_policy policy, const recipe *r) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(r->kind, 8, 3);
    mpt_model *model, *twin;
    mpt_node_info info;
    int nodes = 0;
    train.batch = 8;
    train.seed = 6;
    model = build_recipe(ctx, policy, r, &train);
    twin = twin_new(ctx, model, r, &train);
    CHECK_OK(ctx, mpt_forward(model, s.x, target_of(&s, r->loss), 8));
    CHECK_OK(reference, mpt_forward(twin, s.x, target_of(&s, r->loss), 8));
    CHECK_OK(ctx, mpt_backward(model));
    CHECK_OK(reference, mpt_backward(twin));
    while (mpt_model_node(model, nodes + 1, &info) == MPT_OK) nodes++;
    check_gradients(ctx, model, twin, 6 * (nodes - 1) * test_unit(policy.compute));
    samples_free(&s);
    mpt_model_free(model);
    mpt_model_free(twin);
}

static void test_all_mixed_gradients(mpt_context *ctx) {
    static const recipe recipes[] = {
        {smooth, MPT_LOSS_CROSS_ENTROPY, NULL},       {smooth, MPT_LOSS_SQUARED_ERROR, NULL},
        {even, MPT_LOSS_CROSS_ENTROPY, NULL},         {even, MPT_LOSS_BCE_WITH_LOGITS, NULL},
        {even_in_part, MPT_LOSS_CROSS_ENTROPY, NULL}, {smooth_in_part, MPT_LOSS_CROSS_ENTROPY, NULL}};
    size_t i;
    int j;
    for (i = 0; i < sizeof recipes / sizeof *recipes; i++)
        for (j = 1; j < 5; j++)
            test_mixed_gradients(ctx, mpt_policy_preset(j % 2 ? MPT_O1 : MPT_O2, j < 3 ? MPT_F16 : MPT_BF16),
                                 &recipes[i]);
}

/* -- Training -- */

/* Steps of the same model, in the same types, on both. A step of one side errs by the share d of its gradient g: d is 2
   sqrt(n) roundings, as n independent ones add up (Higham and Mary 2019): of fp32 for each term on the way, of 16 bits
   for each of three arrays a node and way. So after some steps of SGD the weights lie at most lr times the sum of d |g|
   apart, and that far times |g| the losses, besides d of their own. fp32 weights round at every step. */
static void test_trained(mpt_context *ctx, mpt_policy policy, const arch *kind) {
    enum { STEPS = 12 };
    const recipe r = {kind, MPT_LOSS_CROSS_ENTROPY, NULL};
    const double lr = 0.05, u = test_unit(MPT_F32);
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(kind, 8 * STEPS, 3);
    mpt_optimizer_state state;
    mpt_model *model, *twin;
    mpt_node_info info;
    double *w, *expected, *tolerance, n, d, drift = 0;
    size_t i, count;
    int step, nodes = 0, ok = 1;
    train.batch = 8;
    train.seed = 4;
    train.optimizer = mpt_sgd(lr, 0);
    train.scaler.init_scale = 256;
    model = build_recipe(ctx, policy, &r, &train);
    twin = build_recipe(reference, policy, &r, &train);
    while (mpt_model_node(model, nodes + 1, &info) == MPT_OK) nodes++;
    n = policy.compute == MPT_F32 ? roundings(ctx, model, 8) : 6 * (double)nodes;
    d = 2 * sqrt(n) * test_unit(policy.compute);
    for (step = 0; step < STEPS; step++) {
        const samples some = samples_from(&s, 8 * (size_t)step);
        CHECK_OK(ctx, mpt_train_step(model, some.x, some.label));
        CHECK_OK(reference, mpt_train_step(twin, some.x, some.label));
        CHECK_OK(reference, mpt_optimizer_get_state(mpt_model_optimizer(twin), &state));
        ok &= CHECK_NEAR(mpt_loss(model), mpt_loss(twin), d * (1 + mpt_loss(twin)) + drift * state.grad_norm);
        drift += lr * d * state.grad_norm;
    }
    CHECK_EQUAL(mpt_steps_applied(model), STEPS);
    CHECK_EQUAL(mpt_steps_applied(twin), STEPS);
    count = mpt_params_count(mpt_model_params(model), 0);
    w = doubles_of(model, 0);
    expected = doubles_of(twin, 0);
    tolerance = test_doubles(count);
    for (i = 0; i < count; i++) tolerance[i] = drift + STEPS * 4 * u * fabs(expected[i]);
    ok &= CHECK_ALL(w, count, expected, tolerance);
    CHECK(drift < 0.2); /* or nothing would be tested */
    if (!ok) printf("    in %s, drift %g\n", mpt_dtype_name(policy.compute), drift);
    free(w);
    free(expected);
    free(tolerance);
    samples_free(&s);
    mpt_model_free(model);
    mpt_model_free(twin);
}

/* fp32, then autocast and 16-bit weights, in fp16 and bf16, on every instruction set of this machine */
static void test_all_trained(void) {
    static const arch *const kinds[] = {mlp, cnn, smooth, curved, axes, normed, even, sums, mixed, shared};
    size_t i;
    int isa, j;
    for (isa = MPT_ISA_PLAIN; isa < MPT_ISA_COUNT; isa++) {
        mpt_context *ctx = test_open_isa((mpt_isa)isa, 2);
        for (i = 0; ctx && i < sizeof kinds / sizeof *kinds; i++)
            for (j = 0; j < 5; j++) test_trained(ctx, policy_of(j), kinds[i]);
        mpt_close(ctx);
    }
}

/* -- The reference's gradients are slopes -- */

/* The loss of the reference model where element i of a tensor, which has the values w, is moved by `step`. */
static double loss_beside(mpt_model *twin, const samples *s, mpt_loss_kind loss, int n, int tensor, float *w, size_t i,
                          double step) {
    const float kept = w[i];
    w[i] = (float)((double)kept + step);
    CHECK_OK(reference, mpt_params_set(mpt_model_params(twin), tensor, w));
    w[i] = kept;
    CHECK_OK(reference, mpt_forward(twin, s->x, target_of(s, loss), (size_t)n));
    return mpt_loss(twin);
}

/* Central differences with steps h and 2 h. What curvature and kinks take the first off by shows in what lies between
   the two, and between the slopes to either side, so that much is allowed for; and the rounding of the values to fp32,
   4 u of the loss in the root mean square, / h. Where that comes to more than a fifth of the tensor's largest gradient,
   at a kink, an element tells nothing; most do not stand there. */
static void check_tensor_slopes(mpt_model *twin, const samples *s, mpt_loss_kind loss, int n, int tensor,
                                const double *gradient) {
    static const double h = 1.0 / 512;
    mpt_params *params = mpt_model_params(twin);
    const size_t count = mpt_params_count(params, tensor);
    const double largest = largest_of(gradient, count);
    float *w = (float *)test_memory(count * sizeof *w);
    size_t i, told = 0, asked = 0;
    CHECK_OK(reference, mpt_params_get(params, tensor, w));
    for (i = 0; i < count; i += 1 + count / 13, asked++) {
        const double here = loss_beside(twin, s, loss, n, tensor, w, i, 0);
        const double above = loss_beside(twin, s, loss, n, tensor, w, i, h);
        const double below = loss_beside(twin, s, loss, n, tensor, w, i, -h);
        const double far_above = loss_beside(twin, s, loss, n, tensor, w, i, 2 * h);
        const double far_below = loss_beside(twin, s, loss, n, tensor, w, i, -2 * h);
        const double slope = (above - below) / (2 * h), far_slope = (far_above - far_below) / (4 * h);
        const double tolerance =
            fabs(far_slope - slope) + fabs(above - 2 * here + below) / h + 4 * test_unit(MPT_F32) * fmax(here, 1) / h;
        if (tolerance > 0.2 * largest) continue;
        told++;
        if (!CHECK_NEAR(gradient[i], slope, tolerance))
            printf("    in %s[%lu]\n", mpt_params_name(params, tensor), (unsigned long)i);
    }
    CHECK_OK(reference, mpt_params_set(params, tensor, w));
    if (!CHECK(2 * told >= asked))
        printf("    in %s, %d of %d, %g\n", mpt_params_name(params, tensor), (int)told, (int)asked, largest);
    free(w);
}

/* The weights of these samples: a gradient is of the sum of their losses / batch, a loss that sum / the weights. */
static double weight_of(const recipe *r, const samples *s, int n) {
    double weight = 0;
    int row;
    if (r->loss != MPT_LOSS_CROSS_ENTROPY || !r->desc) return n;
    for (row = 0; row < n; row++) {
        if (r->desc->ignore && s->label[row] == r->desc->ignore_index) continue;
        weight += r->desc->class_weights ? (double)r->desc->class_weights[s->label[row]] : 1;
    }
    return weight;
}

static void test_slopes(const recipe *r, int n) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(r->kind, (size_t)n, 3);
    double *gradient[MOST_TENSORS];
    mpt_model *twin;
    size_t i;
    int tensor, tensors;
    train.batch = n;
    train.seed = 5;
    twin = build_recipe(reference, mpt_policy_preset(MPT_O0, MPT_F32), r, &train);
    tensors = mpt_params_tensors(mpt_model_params(twin));
    CHECK_OK(reference, mpt_forward(twin, s.x, target_of(&s, r->loss), (size_t)n));
    CHECK_OK(reference, mpt_backward(twin));
    for (tensor = 1; tensor <= tensors; tensor++) {
        const size_t count = mpt_params_count(mpt_model_params(twin), tensor);
        gradient[tensor] = gradient_of(reference, twin, tensor);
        for (i = 0; i < count; i++) gradient[tensor][i] *= n / weight_of(r, &s, n);
    }
    CHECK_OK(reference, mpt_zero_grad(twin)); /* the first pass of the step again: a dropout has the same mask */
    for (tensor = 1; tensor <= tensors; tensor++) {
        check_tensor_slopes(twin, &s, r->loss, n, tensor, gradient[tensor]);
        free(gradient[tensor]);
    }
    samples_free(&s);
    mpt_model_free(twin);
}

static void test_all_slopes(void) {
    static const arch *const kinds[] = {mlp, cnn, smooth, curved, axes, normed, even, sums, mixed, shared};
    static const float weights[CLASSES] = {0.5f, 2, 0.25f, 1, 1.5f};
    mpt_loss_desc pos = MPT_ZERO, wide_huber = MPT_ZERO;
    recipe r = MPT_ZERO;
    int i, loss;
    for (i = 0; i < (int)(sizeof kinds / sizeof *kinds); i++) {
        r.kind = kinds[i];
        test_slopes(&r, 8);
    }
    r.kind = mlp;
    for (loss = MPT_LOSS_SQUARED_ERROR; loss < MPT_LOSS_GRADIENT; loss++) {
        r.loss = (mpt_loss_kind)loss;
        test_slopes(&r, 9);
    }
    pos.pos_weight = weights, r.loss = MPT_LOSS_BCE_WITH_LOGITS, r.desc = &pos;
    test_slopes(&r, 9);
    wide_huber.delta = 1.5f, r.loss = MPT_LOSS_HUBER, r.desc = &wide_huber;
    test_slopes(&r, 9);
}

/* Weights of classes, smoothing and rows that do not count. The weights are the build's own copy from then on. The mean
   over all samples, not of the batches' means, from the predictions. */
static double weighted_loss(const float *out, const samples *s, int n, const mpt_loss_desc *desc) {
    double sum = 0, weights = 0;
    int row, j;
    for (row = 0; row < n; row++) {
        const float *x = out + row * CLASSES;
        const double smooth_share = (double)desc->label_smoothing / (double)CLASSES;
        double total = 0;
        if (s->label[row] == desc->ignore_index) continue;
        for (j = 0; j < CLASSES; j++) total += exp((double)x[j]);
        for (j = 0; j < CLASSES; j++) {
            const double t = smooth_share + (j == s->label[row] ? 1 - (double)desc->label_smoothing : 0);
            sum += (double)desc->class_weights[j] * t * (log(total) - (double)x[j]);
        }
        weights += (double)desc->class_weights[s->label[row]];
    }
    return sum / weights;
}

static void test_class_weights(mpt_context *ctx) {
    static const float kept[CLASSES] = {0.5f, 2, 0.25f, 1, 1.5f};
    float weights[CLASSES], out[11 * CLASSES];
    mpt_loss_desc desc = MPT_ZERO;
    mpt_train_desc train = MPT_ZERO;
    recipe r = {mlp, MPT_LOSS_CROSS_ENTROPY, NULL};
    samples s = samples_new(mlp, 11, 3);
    mpt_metrics m;
    mpt_model *model, *twin;
    double error, expected;
    memcpy(weights, kept, sizeof weights);
    desc.class_weights = weights;
    desc.label_smoothing = 0.1f;
    desc.ignore = 1;
    desc.ignore_index = -100;
    r.desc = &desc;
    s.label[2] = s.label[7] = -100;
    train.batch = 4;
    train.seed = 5;
    model = build_recipe(ctx, policy_of(0), &r, &train);
    twin = twin_new(ctx, model, &r, &train);
    memset(weights, 0xff, sizeof weights);
    desc.class_weights = kept;
    error = 2 * roundings(ctx, model, 11) * test_unit(MPT_F32);
    CHECK_OK(ctx, mpt_predict(model, s.x, 11, out));
    CHECK_OK(ctx, mpt_evaluate(model, s.x, s.label, 11, &m));
    expected = weighted_loss(out, &s, 11, &desc);
    CHECK_NEAR(m.loss, expected, error * expected);
    CHECK_EQUAL(m.samples, 9);
    CHECK_OK(ctx, mpt_forward(model, s.x, s.label, 4));
    CHECK_OK(reference, mpt_forward(twin, s.x, s.label, 4));
    expected = weighted_loss(out, &s, 4, &desc);
    CHECK_NEAR(mpt_loss(model), expected, error * expected);
    CHECK_OK(ctx, mpt_backward(model));
    CHECK_OK(reference, mpt_backward(twin));
    check_gradients(ctx, model, twin, error);
    s.label[1] = -1;
    CHECK_ERROR(ctx, mpt_train_step(model, s.x, s.label), MPT_ERROR_VALUE, "label");
    test_slopes(&r, 4);
    samples_free(&s);
    mpt_model_free(model);
    mpt_model_free(twin);
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
        CHECK_OK(ctx, mpt_forward(model, some.x, target_of(&some, loss), (size_t)train->batch));
        CHECK_OK(ctx, mpt_backward(model));
    }
    CHECK_OK(ctx, mpt_unscale(mpt_model_optimizer(model)));
    CHECK_OK(ctx, mpt_clip_norm(mpt_model_optimizer(model), train->clip_norm));
    if (train->clip_value > 0) CHECK_OK(ctx, mpt_clip_value(mpt_model_optimizer(model), train->clip_value));
    CHECK_OK(ctx, mpt_step(mpt_model_optimizer(model)));
    CHECK_OK(ctx, mpt_scaler_update(mpt_model_scaler(model)));
}

/* mpt_train_step is its parts, bit for bit; in fp16 the first steps are skipped ones. */
static void test_parts(mpt_context *ctx, const arch *kind, mpt_policy policy, mpt_loss_kind loss) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(kind, 12, 8);
    mpt_model *whole, *taken;
    int i;
    train.batch = 6, train.accumulate = 2, train.clip_norm = 0.3, train.clip_value = 0.01, train.seed = 2;
    train.scaler.init_scale = 16777216;
    whole = build(ctx, policy, kind, loss, &train);
    taken = build(ctx, policy, kind, loss, &train);
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
static void test_accumulation(mpt_context *ctx, const arch *kind, mpt_loss_kind loss) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(kind, 8, 4);
    mpt_model *once, *twice;
    double error;
    int tensor;
    train.batch = 8, train.seed = 3, train.optimizer = mpt_sgd(0.1, 0);
    once = build(ctx, policy_of(0), kind, loss, &train);
    train.batch = 4, train.accumulate = 2;
    twice = build(ctx, policy_of(0), kind, loss, &train);
    error = 2 * roundings(ctx, once, 8) * test_unit(MPT_F32);
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
    samples_free(&s);
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
        CHECK_OK(ctx, mpt_forward(model, some.x, target_of(&some, loss), (size_t)*rows));
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
    samples s = samples_new(r->kind, 8, 4);
    mpt_optimizer_state a, b;
    mpt_model *once, *split;
    double error;
    int tensor;
    s.label[1] = s.label[4] = s.label[5] = r->desc && r->desc->ignore ? r->desc->ignore_index : s.label[1];
    train.batch = 8, train.seed = 3, train.optimizer = mpt_sgd(0.1, 0), train.scaler.init_scale = 1024;
    once = build_recipe(ctx, policy, r, &train);
    train.batch = batch, train.accumulate = accumulate;
    split = build_recipe(ctx, policy, r, &train);
    error = 2 * roundings(ctx, once, 8) * test_unit(policy.compute);
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
    samples_free(&s);
    mpt_model_free(once), mpt_model_free(split);
}

static void test_all_samples(mpt_context *ctx) {
    static const float weights[CLASSES] = {0.5f, 2, 0.25f, 1, 1.5f};
    static const mpt_loss_kind optional[] = {MPT_LOSS_CROSS_ENTROPY, MPT_LOSS_CROSS_ENTROPY, MPT_LOSS_CROSS_ENTROPY,
                                             MPT_LOSS_BCE_WITH_LOGITS, MPT_LOSS_HUBER};
    static const int uneven[] = {5, 2, 1, 0}, more[] = {1, 1, 3, 3, 0}, whole[] = {8, 0};
    mpt_loss_desc descs[5];
    recipe r = {mlp, MPT_LOSS_CROSS_ENTROPY, NULL};
    int i;
    memset(descs, 0, sizeof descs);
    descs[0].ignore = descs[2].ignore = 1, descs[0].ignore_index = descs[2].ignore_index = -100;
    descs[1].class_weights = descs[2].class_weights = weights;
    descs[2].label_smoothing = 0.1f;
    descs[3].pos_weight = weights;
    descs[4].delta = 0.5f;
    for (i = 0; i < MPT_LOSS_GRADIENT + 5; i++) {
        r.loss = i < MPT_LOSS_GRADIENT ? (mpt_loss_kind)i : optional[i - MPT_LOSS_GRADIENT];
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
    mpt_loss_desc desc = MPT_ZERO;
    mpt_train_desc train = MPT_ZERO;
    recipe r = {mlp, MPT_LOSS_CROSS_ENTROPY, NULL};
    samples s = samples_new(mlp, 4, 4), kept = samples_new(mlp, 4, 4);
    const size_t features = 7;
    mpt_model *all, *three;
    double *p, *q, error;
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
    error = 2 * roundings(ctx, three, 3) * test_unit(MPT_F32); /* of sizes about 1 */
    CHECK_NEAR(mpt_loss(all), mpt_loss(three), error * mpt_loss(three));
    n = mpt_params_count(mpt_model_params(all), 0);
    p = doubles_of(all, 0), q = doubles_of(three, 0);
    for (i = 0; i < n; i++) CHECK_NEAR(p[i], q[i], error);
    free(p), free(q);
    mpt_model_free(all), mpt_model_free(three);
    samples_free(&s), samples_free(&kept);
}

/* A step without any weight changes nothing but the counters and the journal: not the weights (which decay and old
   moments would move), the statistics, nor the scale and its trackers. */
static void test_empty_step(mpt_context *ctx, mpt_policy policy) {
    static const float none[CLASSES] = {1, 1, 0, 1, 1};
    mpt_loss_desc desc = MPT_ZERO;
    mpt_train_desc train = MPT_ZERO;
    recipe r = {mixed, MPT_LOSS_CROSS_ENTROPY, NULL};
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

static training_state trained(int threads, mpt_policy policy, const arch *kind, const samples *s) {
    mpt_context *ctx = test_open_threads(threads);
    mpt_train_desc train = MPT_ZERO;
    training_state state;
    mpt_model *model;
    int i;
    train.batch = 16, train.clip_norm = 1;
    model = build(ctx, policy, kind, MPT_LOSS_CROSS_ENTROPY, &train);
    for (i = 0; i < 3; i++) CHECK_OK(ctx, mpt_train_step(model, s->x, s->label));
    state = state_of(ctx, model);
    mpt_model_free(model);
    mpt_close(ctx);
    return state;
}

static void test_threads(mpt_policy policy, const arch *kind) {
    samples s = samples_new(kind, 16, 1);
    int threads;
    for (threads = 2; threads <= 4; threads *= 2)
        CHECK(same(trained(1, policy, kind, &s), trained(threads, policy, kind, &s)));
    samples_free(&s);
}

/* ==== RUNNING STATISTICS ==== */

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

/* Mean and variance of the batch, in the place of the running ones that it has made of 0 and 1 by the rule: 0.9 of the
   old and 0.1 of the batch's, variances by one less than the count. */
static void put_batch_statistics(mpt_context *ctx, mpt_model *model, int id, size_t n) {
    const mpt_node_info info = info_of(ctx, model, id);
    const size_t C = (size_t)info.C;
    const double count = (double)(n * (size_t)(info.H * info.W));
    double *running = running_of(ctx, model, id, C);
    float host[64];
    size_t c;
    for (c = 0; c < 2 * C; c++) {
        const double batch = (running[c] - (c < C ? 0 : 0.9)) / 0.1;
        host[c] = (float)(c < C ? batch : batch * (count - 1) / count);
    }
    CHECK_OK(ctx, mpt_model_set_running(model, id, host));
    free(running);
}

/* They start at 0 and 1, and a step's are those of its batch: with these, and the weights that the step had, an
   evaluation of the batch is its forward pass. 10 (1 + 9 / variance) roundings of the running ones on top. */
static void test_running_batch(mpt_context *ctx) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(normed, 5, 4);
    mpt_metrics m;
    mpt_model *model;
    double loss, *start, error;
    float *weights;
    size_t n;
    int i;
    train.batch = 5;
    train.seed = 9;
    model = build(ctx, policy_of(0), normed, MPT_LOSS_CROSS_ENTROPY, &train);
    error = (roundings(ctx, model, 5) + 1000) * test_unit(MPT_F32);
    for (i = 0; i < 2; i++) {
        size_t c;
        start = running_of(ctx, model, batch_norms[i], 8);
        for (c = 0; c < 16; c++) CHECK_EQUAL(start[c], c >= 8);
        free(start);
    }
    n = mpt_params_count(mpt_model_params(model), 0);
    weights = (float *)test_memory(n * sizeof *weights);
    CHECK_OK(ctx, mpt_params_get(mpt_model_params(model), 0, weights));
    CHECK_OK(ctx, mpt_train_step(model, s.x, s.label));
    loss = mpt_loss(model);
    CHECK_OK(ctx, mpt_params_set(mpt_model_params(model), 0, weights));
    for (i = 0; i < 2; i++) put_batch_statistics(ctx, model, batch_norms[i], 5);
    CHECK_OK(ctx, mpt_evaluate(model, s.x, s.label, 5, &m));
    CHECK_NEAR(m.loss, loss, error * loss);
    free(weights);
    samples_free(&s);
    mpt_model_free(model);
}

/* Each micro-batch of an applied step counts, as on the reference; evaluation takes the statistics for its own. */
static void test_running(mpt_context *ctx) {
    const recipe r = {normed, MPT_LOSS_CROSS_ENTROPY, NULL};
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(normed, 10, 4);
    mpt_metrics m, again;
    mpt_model *model, *twin;
    double error;
    int i;
    train.batch = 5;
    train.accumulate = 2;
    train.seed = 9;
    model = build_recipe(ctx, policy_of(0), &r, &train);
    twin = twin_new(ctx, model, &r, &train);
    error = 2 * roundings(ctx, model, 5) * test_unit(MPT_F32);
    CHECK_OK(ctx, mpt_train_step(model, s.x, s.label));
    CHECK_OK(reference, mpt_train_step(twin, s.x, s.label));
    for (i = 0; i < 2; i++) {
        double *is = running_of(ctx, model, batch_norms[i], 8), *be = running_of(reference, twin, batch_norms[i], 8);
        double tolerance[16];
        size_t c;
        for (c = 0; c < 16; c++) tolerance[c] = error * largest_of(be, 16);
        CHECK_ALL(is, 16, be, tolerance);
        free(is), free(be);
    }
    mpt_model_free(twin);
    twin = twin_new(ctx, model, &r, &train);
    CHECK_OK(ctx, mpt_evaluate(model, s.x, s.label, 10, &m));
    CHECK_OK(reference, mpt_evaluate(twin, s.x, s.label, 10, &again));
    CHECK_NEAR(m.loss, again.loss, error * again.loss);
    CHECK_OK(ctx, mpt_forward(model, s.x, s.label, 5));
    CHECK_OK(ctx, mpt_backward(model)); /* until its step, evaluation knows nothing of it */
    CHECK_OK(ctx, mpt_evaluate(model, s.x, s.label, 10, &again));
    CHECK_EQUAL(again.loss, m.loss);
    CHECK_ERROR(ctx, mpt_model_set_running(model, 1, s.x), MPT_ERROR_ARGUMENT, "1"); /* the input */
    CHECK_ERROR(ctx, mpt_model_set_running(model, 0, s.x), MPT_ERROR_ARGUMENT, "0");
    CHECK_ERROR(ctx, mpt_model_set_running(model, 99, s.x), MPT_ERROR_ARGUMENT, "99");
    CHECK_ERROR(ctx, mpt_model_set_running(model, batch_norms[0], NULL), MPT_ERROR_ARGUMENT, "host");
    test_running_judge(ctx, model, batch_norms[0]);
    samples_free(&s);
    mpt_model_free(model), mpt_model_free(twin);
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
        double *before = running_of(ctx, model, batch_norms[0], 8), *after;
        CHECK_OK(ctx, mpt_train_step(model, s.x, s.label));
        after = running_of(ctx, model, batch_norms[0], 8);
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
        double *is = running_of(ctx, model, batch_norms[i], 8), *be = running_of(ctx, other, batch_norms[i], 8);
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
   an evaluation, which a forward pass alone refuses, z mpt_zero_grad, . nothing; s, at the end, a whole training
   step. */
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
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(flat, 4, 4);
    mpt_model *net = mpt_model_new(ctx, policy_of(0));
    training_state before;
    mpt_metrics m;
    mpt_mse(net, mpt_batch_norm(net, mpt_linear(net, mpt_input(net, 1, 1, 4), 6, NULL), NULL), NULL);
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
static int dropped_layers(mpt_model *net, int h) {
    return mpt_linear(net, mpt_dropout(net, mpt_linear(net, h, WIDTH, NULL), drop_share), 5, NULL);
}
static int undropped_layers(mpt_model *net, int h) { return mpt_linear(net, mpt_linear(net, h, WIDTH, NULL), 5, NULL); }
static const arch dropped[] = {{1, 1, ONE_HOT, dropped_layers, 0}},
                  undropped[] = {{1, 1, ONE_HOT, undropped_layers, 0}};

/* Two of the same value. */
static int twice_dropped_layers(mpt_model *net, int h) {
    int a;
    h = mpt_linear(net, h, WIDTH, NULL);
    a = mpt_dropout(net, h, drop_share);
    h = mpt_dropout(net, h, drop_share);
    return mpt_linear(net, mpt_concat(net, a, h), 5, NULL);
}
static const arch twice_dropped[] = {{1, 1, ONE_HOT, twice_dropped_layers, 0}};

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

/* Forward and backward have the same mask: loss and gradients are those of the reference, whose gradients are slopes,
   see test_all_slopes. Predictions are those of a net without dropout. */
static void test_dropout(mpt_context *ctx) {
    const recipe r = {dropped, MPT_LOSS_CROSS_ENTROPY, NULL}, without = {undropped, MPT_LOSS_CROSS_ENTROPY, NULL};
    mpt_train_desc train = MPT_ZERO;
    samples s = one_hot();
    double error, *mask;
    float out[OUTPUTS], same_out[OUTPUTS];
    mpt_model *model, *twin, *other;
    train.batch = ONE_HOT;
    model = build_recipe(ctx, policy_of(0), &r, &train);
    twin = twin_new(ctx, model, &r, &train);
    other = build_recipe(ctx, policy_of(0), &without, &train); /* of the same seed */
    error = 2 * roundings(ctx, model, ONE_HOT) * test_unit(MPT_F32);
    CHECK_OK(ctx, mpt_predict(model, s.x, ONE_HOT, out));
    CHECK_OK(ctx, mpt_predict(other, s.x, ONE_HOT, same_out));
    CHECK(memcmp(out, same_out, sizeof out) == 0);
    mask = next_mask(ctx, model, &s, NULL);
    check_share(mask, (double)drop_share);
    CHECK(same_mask(mask, next_mask(reference, twin, &s, NULL)));
    CHECK_NEAR(mpt_loss(model), mpt_loss(twin), error * mpt_loss(twin));
    check_gradients(ctx, model, twin, error);
    samples_free(&s);
    mpt_model_free(model), mpt_model_free(twin), mpt_model_free(other);
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

/* 11 samples in batches of 4, 4 and 3; batch norms take their running statistics, dropout nothing. The mean over
   samples, each as it comes out alone, and as on the reference. */
static void test_evaluation(mpt_context *ctx, const arch *kind, mpt_loss_kind loss) {
    recipe r = MPT_ZERO;
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(kind, 11, 6);
    float out[11 * CLASSES], other[11 * CLASSES];
    double expected[11 * CLASSES], tolerance[11 * CLASSES], is[11 * CLASSES], error, sum = 0;
    mpt_metrics m = MPT_ZERO, twins = MPT_ZERO, one = MPT_ZERO;
    mpt_model *model, *twin;
    size_t i, j, correct = 0;
    r.kind = kind;
    r.loss = loss;
    train.batch = 4;
    train.seed = 12;
    model = build_recipe(ctx, policy_of(0), &r, &train);
    twin = twin_new(ctx, model, &r, &train);
    error = 2 * roundings(ctx, model, 11) * test_unit(MPT_F32);
    CHECK_EQUAL(mpt_model_outputs(model), CLASSES);
    CHECK_OK(ctx, mpt_evaluate(model, s.x, target_of(&s, loss), 11, &m));
    CHECK_OK(reference, mpt_evaluate(twin, s.x, target_of(&s, loss), 11, &twins));
    CHECK_NEAR(m.loss, twins.loss, error * twins.loss);
    CHECK_EQUAL(m.samples, 11);
    CHECK_OK(ctx, mpt_predict(model, s.x, 11, out));
    CHECK_OK(reference, mpt_predict(twin, s.x, 11, other));
    for (i = 0; i < 11 * CLASSES; i++) {
        is[i] = (double)out[i];
        expected[i] = (double)other[i];
    }
    for (i = 0; i < 11 * CLASSES; i++) tolerance[i] = error * largest_of(expected, 11 * CLASSES);
    CHECK_ALL(is, 11 * CLASSES, expected, tolerance);
    for (i = 0; i < 11; i++) {
        const samples alone = samples_from(&s, i);
        size_t best = 0;
        CHECK_OK(ctx, mpt_evaluate(model, alone.x, target_of(&alone, loss), 1, &one));
        sum += one.loss;
        for (j = 1; j < CLASSES; j++) best = is[i * CLASSES + j] > is[i * CLASSES + best] ? j : best;
        correct += best == (size_t)s.label[i];
    }
    CHECK_NEAR(m.loss, sum / 11, error * sum / 11);
    if (loss == MPT_LOSS_CROSS_ENTROPY) {
        CHECK_EQUAL(m.correct, correct);
        CHECK_NEAR(m.accuracy, (double)correct / 11, 1e-15);
    }
    CHECK_ERROR(ctx, mpt_evaluate(model, s.x, target_of(&s, loss), 0, &m), MPT_ERROR_ARGUMENT, "samples");
    CHECK_ERROR(ctx, mpt_evaluate(model, NULL, target_of(&s, loss), 4, &m), MPT_ERROR_ARGUMENT, "x");
    CHECK_ERROR(ctx, mpt_evaluate(model, s.x, NULL, 4, &m), MPT_ERROR_ARGUMENT, "target");
    CHECK_ERROR(ctx, mpt_evaluate(model, s.x, target_of(&s, loss), 4, NULL), MPT_ERROR_ARGUMENT, "out");
    CHECK_ERROR(ctx, mpt_predict(model, NULL, 4, out), MPT_ERROR_ARGUMENT, "x");
    CHECK_ERROR(ctx, mpt_predict(model, s.x, 4, NULL), MPT_ERROR_ARGUMENT, "out");
    samples_free(&s);
    mpt_model_free(model), mpt_model_free(twin);
}

/* Evaluating between steps changes nothing; in every policy, also where there are more outputs than features. */
static void test_evaluation_is_neutral(mpt_context *ctx, mpt_policy policy, const arch *kind) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(kind, 20, 9);
    float out[20 * CLASSES];
    mpt_metrics m;
    mpt_model *plain, *watched;
    int i;
    train.batch = 6;
    plain = build(ctx, policy, kind, MPT_LOSS_CROSS_ENTROPY, &train),
    watched = build(ctx, policy, kind, MPT_LOSS_CROSS_ENTROPY, &train);
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
    CHECK_ERROR(ctx, mpt_forward(model, s.x, s.label, 0), MPT_ERROR_ARGUMENT, "samples");
    CHECK_ERROR(ctx, mpt_forward(model, s.x, s.label, 33), MPT_ERROR_ARGUMENT, "samples");
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
    mpt_mse(net, h, NULL);
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
    mpt_mse(net, mpt_linear(net, mpt_input(net, 1, 1, 2), 2, NULL), NULL);
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
    CHECK_LAYER(mpt_relu(net, mpt_mse(net, in, NULL)), MPT_ERROR_ORDER, "loss");
    CHECK_LAYER(mpt_mse(net, mpt_mse(net, in, NULL), NULL), MPT_ERROR_ORDER, "loss");
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

static void test_loss_layer_errors(mpt_context *ctx) {
    enum { ALL = 8 * 6 * 3 };
    float weights[ALL];
    const mpt_loss_desc zero = MPT_ZERO;
    mpt_loss_desc d = MPT_ZERO;
    mpt_model *net;
    int in, i;
    d.label_smoothing = 1.5f;
    CHECK_LAYER(mpt_softmax_cross_entropy(net, in, &d), MPT_ERROR_ARGUMENT, "label_smoothing");
    d.label_smoothing = 0, d.class_weights = weights;
    for (i = 0; i < ALL; i++) weights[i] = 1;
    CHECK_LAYER(mpt_mse(net, in, &d), MPT_ERROR_ARGUMENT, "class_weights");
    weights[ALL - 1] = -1;
    CHECK_LAYER(mpt_softmax_cross_entropy(net, in, &d), MPT_ERROR_ARGUMENT, "143");
    weights[ALL - 1] = test_float(0x7fc00000u);
    CHECK_LAYER(mpt_softmax_cross_entropy(net, in, &d), MPT_ERROR_ARGUMENT, "cross_entropy1");
    d = zero, d.pos_weight = weights;
    CHECK_LAYER(mpt_bce_with_logits(net, in, &d), MPT_ERROR_ARGUMENT, "pos_weight");
    CHECK_LAYER(mpt_softmax_cross_entropy(net, in, &d), MPT_ERROR_ARGUMENT, "pos_weight");
    d = zero, d.delta = -1;
    CHECK_LAYER(mpt_huber(net, in, &d), MPT_ERROR_ARGUMENT, "delta");
    d.delta = 1;
    CHECK_LAYER(mpt_l1(net, in, &d), MPT_ERROR_ARGUMENT, "delta");
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
    d = zero, d.kernel_w = -1, CHECK_LAYER(mpt_conv2d(net, in, 4, 3, &d), MPT_ERROR_ARGUMENT, "kernel_w");
    d = zero, d.stride_w = -1, CHECK_LAYER(mpt_conv2d(net, in, 4, 3, &d), MPT_ERROR_ARGUMENT, "stride_w");
    d = zero, d.dilation_w = -1, CHECK_LAYER(mpt_conv2d(net, in, 4, 3, &d), MPT_ERROR_ARGUMENT, "dilation_w");
    d = zero, d.padding_w = -2, CHECK_LAYER(mpt_conv2d(net, in, 4, 3, &d), MPT_ERROR_ARGUMENT, "padding_w");
    d = zero, d.padding = 1, d.same = 1;
    CHECK_LAYER(mpt_conv2d(net, in, 4, 3, &d), MPT_ERROR_ARGUMENT, "same");
    d = zero, d.stride_w = 2, d.same = 1;
    CHECK_LAYER(mpt_conv2d(net, in, 4, 3, &d), MPT_ERROR_SHAPE, "same");
    d = zero, d.kernel_w = 7, CHECK_LAYER(mpt_conv2d(net, in, 4, 3, &d), MPT_ERROR_SHAPE, "3x7"); /* on 8x6 */
    d = zero, d.name = "c2";
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
    p.padding = 0, p.padding_w = -2, CHECK_LAYER(mpt_avg_pool2d(net, in, 2, &p), MPT_ERROR_ARGUMENT, "padding_w");
    p.padding_w = 2, CHECK_LAYER(mpt_avg_pool2d(net, in, 2, &p), MPT_ERROR_SHAPE, "padding 0x2");
    p.padding_w = 0, p.stride_w = -1, CHECK_LAYER(mpt_avg_pool2d(net, in, 2, &p), MPT_ERROR_ARGUMENT, "stride_w");
    p.stride_w = 0, p.window_w = -1, CHECK_LAYER(mpt_avg_pool2d(net, in, 2, &p), MPT_ERROR_ARGUMENT, "window_w");
    p.window_w = 7, CHECK_LAYER(mpt_avg_pool2d(net, in, 2, &p), MPT_ERROR_SHAPE, "2x7"); /* on 8x6 */
    CHECK_LAYER(mpt_global_avg_pool2d(net, 3), MPT_ERROR_ARGUMENT, "3");
}

static void check_build(mpt_context *ctx, mpt_policy policy, const mpt_train_desc *train, mpt_result code,
                        const char *word, int line) {
    mpt_model *net = mpt_model_new(ctx, policy);
    mpt_mse(net, mpt_linear(net, mpt_input(net, 1, 1, 3), 2, NULL), NULL);
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
    t = zero, t.clip_norm = 1e-60, check_build(ctx, o0, &t, MPT_ERROR_ARGUMENT, "clip_norm", __LINE__);
    t = zero, t.clip_value = -0.5, check_build(ctx, o0, &t, MPT_ERROR_ARGUMENT, "clip_value", __LINE__);
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
    mpt_mse(net, 3, NULL);
    CHECK_ERROR(ctx, mpt_model_build(net, NULL), MPT_ERROR_ORDER, "linear1"); /* nothing reads it */
    mpt_model_free(net);
    net = begin(ctx, &in);
    mpt_mse(net, mpt_linear(net, in, 2, NULL), NULL), mpt_mse(net, mpt_linear(net, in, 2, NULL), NULL);
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
    mpt_mse(net, mpt_relu(net, mpt_linear(net, mpt_input(net, 1, 1, 1), 1, NULL)), NULL);
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
    int h = test_same(net, mpt_input(net, 6, 6, 3), 4, 3);
    CHECK_OK(ctx, mpt_policy_push(net, mpt_policy_preset(MPT_O0, f32)));
    h = test_same(net, mpt_batch_norm(net, h, NULL), 4, 3);
    CHECK_OK(ctx, mpt_policy_push(net, mpt_policy_preset(level, half)));
    h = mpt_max_pool2d(net, h, 2, NULL);
    CHECK_OK(ctx, mpt_policy_pop(net));
    h = mpt_tanh(net, h);
    CHECK_OK(ctx, mpt_policy_pop(net));
    h = test_same(net, h, 4, 3);
    mpt_mse(net, mpt_linear(net, h, 2, NULL), NULL);
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
    const recipe r = {mixed_in_fp32, MPT_LOSS_CROSS_ENTROPY, NULL};
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(mixed, 6, 1);
    mpt_model *pushed, *other;
    int i;
    train.batch = 6;
    pushed = build_recipe(ctx, mpt_policy_preset(MPT_O1, MPT_BF16), &r, &train);
    other = build(ctx, policy_of(0), mixed, MPT_LOSS_CROSS_ENTROPY, &train);
    for (i = 0; i < 3; i++) {
        CHECK_OK(ctx, mpt_train_step(pushed, s.x, s.label));
        CHECK_OK(ctx, mpt_train_step(other, s.x, s.label));
        CHECK_EQUAL(mpt_loss(pushed), mpt_loss(other));
    }
    CHECK(same(state_of(ctx, pushed), state_of(ctx, other)));
    mpt_model_free(pushed), mpt_model_free(other);
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
    mpt_mse(net, mpt_linear(net, h, 2, NULL), NULL);
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
    mpt_mse(net, mpt_linear(net, mpt_input(net, 1, 1, 3), 2, NULL), NULL);
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

enum { MOST_LINES = 28, LINE_SIZE = 200 };

typedef struct printed {
    int lines;
    char line[MOST_LINES][LINE_SIZE];
} printed;

static void keep_line(const char *line, void *user) {
    printed *p = (printed *)user;
    CHECK(strlen(line) <= 160 && strlen(line) < LINE_SIZE);
    CHECK(strchr(line, '\n') == line + strlen(line) - 1);
    if (CHECK(p->lines < MOST_LINES && strlen(line) < LINE_SIZE)) memcpy(p->line[p->lines++], line, strlen(line) + 1);
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

/* H, W, C and multiply-adds of the nodes of a net, worked out by hand; 0: no more. */
typedef struct plan_node {
    int H, W, C;
    size_t multiply_adds;
} plan_node;

static const plan_node mlp_plan[] = {{1, 1, 7, 0},  {1, 1, 13, 13 * 7}, {1, 1, 13, 0}, {1, 1, 11, 11 * 13},
                                     {1, 1, 11, 0}, {1, 1, 5, 5 * 11},  {0, 0, 0, 0}};
static const plan_node cnn_plan[] = {{9, 8, 2, 0},      {9, 8, 4, 72 * 4 * 18},
                                     {9, 8, 4, 0},      {9, 8, 4, 72 * 4 * 36},
                                     {9, 8, 4, 0},      {9, 8, 4, 0},
                                     {4, 4, 4, 0},      {2, 2, 6, 4 * 6 * 36},
                                     {3, 3, 6, 0},      {3, 3, 6, 0},
                                     {3, 3, 6, 0},      {1, 1, 54, 0},
                                     {1, 1, 5, 5 * 54}, {0, 0, 0, 0}};
static const plan_node normed_plan[] = {{6, 6, 3, 0},
                                        {6, 6, 8, 36 * 8 * 27},
                                        {6, 6, 8, 0},
                                        {6, 6, 8, 0},
                                        {6, 6, 8, 36 * 8 * 9},
                                        {6, 6, 8, 0},
                                        {6, 6, 8, 0},
                                        {6, 6, 16, 0},
                                        {3, 3, 8, 9 * 8 * 4 * 8},
                                        {3, 3, 8, 0},
                                        {3, 3, 8, 9 * 8 * 72},
                                        {3, 3, 8, 0},
                                        {3, 3, 8, 0},
                                        {3, 3, 8, 0},
                                        {1, 1, 8, 0},
                                        {1, 1, 5, 5 * 8},
                                        {0, 0, 0, 0}};
static const plan_node mixed_plan[] = {
    {6, 6, 4, 0},          {6, 6, 8, 36 * 8 * 18}, {6, 6, 8, 0},  {6, 6, 8, 0},  {6, 6, 8, 0},
    {6, 6, 8, 36 * 8 * 9}, {6, 6, 8, 0},           {6, 6, 16, 0}, {6, 6, 16, 0}, {6, 6, 16, 0},
    {1, 1, 12, 12 * 576},  {1, 1, 12, 0},          {1, 1, 5, 60}, {0, 0, 0, 0}};

static void check_plan(mpt_context *ctx, mpt_policy policy, const recipe *r, const plan_node *plan) {
    mpt_train_desc train = MPT_ZERO;
    printed p;
    mpt_model *model;
    size_t bytes = 0, parameters = 0, expected = 0;
    int i, nodes = 0;
    while (plan[nodes].H) nodes++;
    train.batch = 6;
    model = build_recipe(ctx, policy, r, &train);
    memset(&p, 0, sizeof p);
    CHECK_OK(ctx, mpt_model_print(model, keep_line, &p));
    CHECK_EQUAL(p.lines, nodes + 2); /* a header, the nodes, the loss */
    for (i = 0; i <= nodes; i++) {
        const mpt_node_info info = info_of(ctx, model, i + 1);
        const size_t values = (size_t)(train.batch * plan[i].H * plan[i].W * plan[i].C);
        check_line(&info, i + 1, p.line[i + 1]);
        bytes += info.bytes;
        parameters += info.parameters;
        CHECK(info.bytes <= mpt_model_memory(model).activations);
        if (i == nodes) continue;
        CHECK(info.H == plan[i].H && info.W == plan[i].W && info.C == plan[i].C);
        CHECK(!info.fused_into || info.bytes == 0);
        CHECK(info.fused_into || strncmp(info.name, "flatten", 7) == 0 ||
              info.bytes >= values * mpt_dtype_size(info.type));
        CHECK_EQUAL(info.multiply_adds, plan[i].multiply_adds);
    }
    CHECK(bytes >= mpt_model_memory(model).activations);
    for (i = 1; i <= mpt_params_tensors(mpt_model_params(model)); i++)
        expected += mpt_params_count(mpt_model_params(model), i);
    CHECK_EQUAL(parameters, expected);
    mpt_model_free(model);
}

static void test_plans(mpt_context *ctx) {
    static const recipe recipes[] = {{mlp, MPT_LOSS_HUBER, NULL},
                                     {cnn, MPT_LOSS_CROSS_ENTROPY, NULL},
                                     {normed, MPT_LOSS_CROSS_ENTROPY, NULL},
                                     {mixed, MPT_LOSS_BCE_WITH_LOGITS, NULL},
                                     {mixed_in_part, MPT_LOSS_ABSOLUTE_ERROR, NULL}};
    static const plan_node *const plans[] = {mlp_plan, cnn_plan, normed_plan, mixed_plan, mixed_plan};
    int i;
    for (i = 0; i < 5 * POLICIES; i++)
        if (i % 5 < 4 || policy_of(i / 5).master == MPT_MASTER_F32)
            check_plan(ctx, policy_of(i / 5), &recipes[i % 5], plans[i % 5]);
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
    conv.name = name, conv.same = 1, norm.name = other;
    h = mpt_conv2d(net, h, 100, 3, &conv);
    h = mpt_relu(net, mpt_batch_norm(net, h, &norm));
    mpt_mse(net, mpt_global_avg_pool2d(net, h), NULL);
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
    mpt_mse(net, mpt_batch_norm(net, mpt_input(net, 1, 1, 3), NULL), NULL);
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
    samples s = samples_new(r->kind, 12, 1);
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
    mpt_loss_desc weighted = MPT_ZERO;
    recipe r[6];
    int i, j;
    memset(r, 0, sizeof r);
    weighted.class_weights = weights;
    r[0].kind = mlp;
    r[0].loss = MPT_LOSS_SQUARED_ERROR;
    r[1].kind = cnn;
    r[2].kind = normed;
    r[2].desc = &weighted;
    r[3].kind = mixed;
    r[3].loss = MPT_LOSS_HUBER;
    r[4].kind = mixed_in_part;
    r[5].kind = mixed_in_fp32;
    for (i = 0; i < POLICIES; i++)
        for (j = 0; j < 6; j++)
            if (j < 4 || policy_of(i).master == MPT_MASTER_F32)
                test_memory_ledger(policy_of(i), &r[j], &optimizers[(i + j) % 3]);
}

/* What mixed precision promises: activations take at most 0.55 of what they take in fp32. */
static void test_activation_memory(mpt_context *ctx) {
    static const arch *const nets[] = {cnn, normed, broad};
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
static void test_toy(mpt_context *ctx, mpt_policy policy, const arch *kind, mpt_loss_kind loss) {
    mpt_train_desc train = MPT_ZERO;
    samples s = samples_new(kind, 40, 2);
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
    model = build(ctx, policy, kind, loss, &train);
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
    static const arch *const kinds[] = {mlp, cnn, smooth, curved, axes, normed, even, sums, shared};
    static const size_t samples_of[] = {9, 5, 4, 5, 5, 6, 6, 7};
    static const recipe some[] = {{mlp, MPT_LOSS_CROSS_ENTROPY, NULL},
                                  {mlp, MPT_LOSS_SQUARED_ERROR, NULL},
                                  {normed, MPT_LOSS_CROSS_ENTROPY, NULL},
                                  {cnn, MPT_LOSS_CROSS_ENTROPY, NULL}};
    recipe r = MPT_ZERO;
    int i, loss;
    for (loss = 0; loss < MPT_LOSS_GRADIENT; loss++)
        for (i = 0; i < 8; i++) {
            r.kind = kinds[i];
            r.loss = (mpt_loss_kind)loss;
            test_gradients(ctx, &r, samples_of[i]);
        }
    for (i = 0; i < 3; i++) test_gradients(ctx, &some[i], 1);
    test_gradients(ctx, &some[3], 9);
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
    mpt_context_desc desc = MPT_ZERO;
    int i;
    test_begin(argc, argv);
    desc.reference = 1;
    reference = mpt_open(&desc);
    RUN_TEST(test_all_gradients(ctx));
    RUN_TEST(test_all_slopes());
    RUN_TEST(test_all_trained());
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
    RUN_TEST(test_running_batch(ctx));
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
    RUN_TEST(test_loss_layer_errors(ctx));
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
    mpt_close(reference);
    RUN_TEST(test_ledgers());
    return test_finish("model");
}
