/* nodes.c - kinds of nodes without parameters: slices and other shapes, and what models of several inputs are made of.
   Gradients are held against central differences. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"

enum {
    BATCH = 4,
    HEADS = 2,
    WIDEST = 512,
    SIDE = 4,
    COLOURS = 3,
    IMAGE = SIDE * SIDE * COLOURS,
    VECTOR = 5,
    ALL = IMAGE + VECTOR
};

/* -- A gradient checker -- the loss is the mean over the samples of sum r y + y^2 / 4 over the heads' elements y */

typedef struct graph {
    mpt_context *ctx;
    mpt_model *net;
    int head[HEADS]; /* 0: none */
    size_t features;
    float h; /* of the differences */
    float x[BATCH * WIDEST];
} graph;

static double head_factor(int head, size_t i) { return test_uniform(-1, 1, 91, (size_t)head * 4096 + i); }

static size_t elements_of(const mpt_model *net, int id) {
    mpt_node_info info;
    CHECK_OK(NULL, mpt_model_node(net, id, &info));
    return (size_t)info.H * (size_t)info.W * (size_t)info.C;
}

/* The loss of g->x; grad: hands its gradient over, too. */
static double graph_loss(graph *g, int grad) {
    double loss = 0;
    int k;
    CHECK_OK(g->ctx, mpt_forward(g->net, g->x, NULL, BATCH));
    for (k = 0; k < HEADS && g->head[k]; k++) {
        const size_t count = BATCH * elements_of(g->net, g->head[k]);
        float *y = (float *)test_memory(count * sizeof *y);
        size_t i;
        CHECK_OK(g->ctx, mpt_node_value(g->net, g->head[k], y));
        for (i = 0; i < count; i++) {
            const double v = (double)y[i], r = head_factor(g->head[k], i);
            loss += (r * v + v * v / 4) / (double)BATCH;
            y[i] = (float)((r + v / 2) / (double)BATCH);
        }
        if (grad) CHECK_OK(g->ctx, mpt_output_grad(g->net, g->head[k], y));
        free(y);
    }
    return loss;
}

/* The derivative by *at, where `set` says that it has changed. Extrapolated, its error is of the order of h^4. */
static double difference(graph *g, float *at, const float *tensor, int id) {
    const float start = *at;
    double slope[2];
    int fine;
    for (fine = 0; fine < 2; fine++) {
        const float h = fine ? g->h / 2 : g->h;
        double loss[2];
        int side;
        for (side = 0; side < 2; side++) {
            *at = side ? start - h : start + h;
            if (id) CHECK_OK(g->ctx, mpt_params_set(mpt_model_params(g->net), id, tensor));
            loss[side] = graph_loss(g, 0);
        }
        slope[fine] = (loss[0] - loss[1]) / (2 * (double)h);
    }
    *at = start;
    if (id) CHECK_OK(g->ctx, mpt_params_set(mpt_model_params(g->net), id, tensor));
    return (4 * slope[1] - slope[0]) / 3;
}

/* Builds the model in fp32 and checks some derivatives by the input and by each tensor. The losses are of the order of
   4, and known to 2^-22 of that; their fifth derivatives are of the order of 1, but behind a norm of few values. */
static void check_gradients(graph *g) {
    const double h = (double)g->h, bound = h * h * h * h + ldexp(4, -22) * 2 / h;
    mpt_train_desc train = MPT_ZERO;
    float *grads[16], *dx;
    size_t count = 0, i;
    int id, tensors;
    train.batch = BATCH;
    train.optimizer = mpt_sgd(0.1, 0);
    train.seed = 3;
    CHECK_EQUAL(mpt_keep(g->net, 1), 1);
    if (!CHECK_OK(g->ctx, mpt_model_build(g->net, &train))) return;
    g->features = elements_of(g->net, 1);
    test_floats(g->x, BATCH * g->features, -1, 1, 17);
    graph_loss(g, 1);
    CHECK_OK(g->ctx, mpt_backward(g->net));
    dx = (float *)test_memory(BATCH * g->features * sizeof *dx);
    CHECK_OK(g->ctx, mpt_node_grad(g->net, 1, dx));
    tensors = mpt_params_tensors(mpt_model_params(g->net));
    for (id = 1; id <= tensors; id++) {
        count = mpt_params_count(mpt_model_params(g->net), id);
        grads[id - 1] = (float *)test_memory(count * sizeof(float));
        CHECK_OK(g->ctx, mpt_download(g->ctx, grads[id - 1], mpt_params_grad(mpt_model_params(g->net), id),
                                      count * sizeof(float)));
    }
    CHECK_OK(g->ctx, mpt_zero_grad(g->net));
    for (i = 0; i < BATCH * g->features; i += 1 + g->features / 13)
        CHECK_NEAR((double)dx[i], difference(g, &g->x[i], NULL, 0), bound);
    for (id = 1; id <= tensors; id++) {
        float *w;
        count = mpt_params_count(mpt_model_params(g->net), id);
        w = (float *)test_memory(count * sizeof *w);
        CHECK_OK(g->ctx, mpt_params_get(mpt_model_params(g->net), id, w));
        for (i = 0; i < count; i += 1 + count / 5)
            CHECK_NEAR((double)grads[id - 1][i], difference(g, &w[i], w, id), bound);
        free(w);
        free(grads[id - 1]);
    }
    free(dx);
}

static graph graph_new(mpt_context *ctx) {
    graph g = MPT_ZERO;
    g.ctx = ctx;
    g.h = 1.0f / 16;
    g.net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
    return g;
}

static void graph_free(graph *g) { mpt_model_free(g->net); }

/* -- Several inputs -- one input, an image and a vector behind each other, is taken apart */

/* Two heads on what an image and a vector are joined to. */
static void two_inputs(mpt_model *net, int *head) {
    const int both = mpt_input(net, 1, 1, ALL);
    int image = mpt_reshape(net, mpt_slice(net, both, 0, IMAGE), SIDE, SIDE, COLOURS);
    int vector = mpt_slice(net, both, IMAGE, VECTOR), h;
    image = mpt_global_avg_pool2d(net, mpt_tanh(net, test_same(net, image, 4, 3)));
    vector = mpt_tanh(net, mpt_linear(net, vector, 6, NULL));
    h = mpt_tanh(net, mpt_linear(net, mpt_concat(net, image, vector), 7, NULL));
    head[0] = mpt_linear(net, h, 3, NULL);
    head[1] = mpt_linear(net, h, 1, NULL);
}

static void test_two_inputs(mpt_context *ctx) {
    graph g = graph_new(ctx);
    two_inputs(g.net, g.head);
    check_gradients(&g);
    graph_free(&g);
}

/* Slices of a value that overlap, and leave a channel out, whose gradient is 0. The value is read by another, too. */
static void test_slices(mpt_context *ctx, int other) {
    graph g = graph_new(ctx);
    const int in = mpt_input(g.net, 3, 2, 4);
    const int h = mpt_keep(g.net, mpt_tanh(g.net, mpt_conv2d(g.net, in, 9, 1, NULL)));
    const int a = mpt_slice(g.net, h, 5, 3), b = mpt_slice(g.net, h, 3, 5), c = mpt_slice(g.net, h, 1, 3);
    float dh[BATCH * 6 * 9];
    size_t i;
    g.head[0] = mpt_tanh(g.net, mpt_concat(g.net, mpt_add(g.net, a, c), b));
    if (other) g.head[1] = mpt_linear(g.net, mpt_reshape(g.net, h, 2, 9, 3), 2, NULL);
    check_gradients(&g);
    graph_loss(&g, 1);
    CHECK_OK(ctx, mpt_backward(g.net));
    CHECK_OK(ctx, mpt_node_grad(g.net, h, dh));
    for (i = 0; i < BATCH * 6 * 9; i++) CHECK(other || (dh[i] == 0) == (i % 9 == 0 || i % 9 == 8));
    graph_free(&g);
}

/* A model that takes its image from a slice of its input is the model that reads the image, to the bit, and so are
   other shapes of an image of as many pixels. */
static void test_same_bits(mpt_context *ctx, mpt_policy policy, int inference) {
    mpt_model *net[2];
    float x[BATCH * IMAGE], wide[BATCH * ALL], y[2][BATCH * 3];
    mpt_train_desc train = MPT_ZERO;
    int32_t label[BATCH];
    int i, j, step;
    train.batch = BATCH;
    train.optimizer = mpt_adam(1e-2);
    train.inference = inference;
    test_floats(wide, BATCH * ALL, -1, 1, 5);
    for (i = 0; i < BATCH; i++) {
        memcpy(x + i * IMAGE, wide + i * ALL + 2, IMAGE * sizeof *x);
        label[i] = i % 3;
    }
    for (i = 0; i < 2; i++) {
        mpt_model *m = net[i] = mpt_model_new(ctx, policy);
        int h = i ? mpt_slice(m, mpt_input(m, 1, 1, ALL), 2, IMAGE) : mpt_input(m, SIDE, SIDE, COLOURS);
        if (i) h = mpt_reshape(m, h, SIDE, SIDE, COLOURS);
        h = mpt_max_pool2d(m, mpt_relu(m, test_same(m, h, 5, 3)), 2, NULL);
        if (i) h = mpt_reshape(m, mpt_reshape(m, h, 1, 4, 5), 2, 2, 5);
        h = mpt_linear(m, mpt_relu(m, mpt_batch_norm(m, test_same(m, h, 6, 3), NULL)), 3, NULL);
        mpt_softmax_cross_entropy(m, h, NULL);
        CHECK_OK(ctx, mpt_model_build(m, &train));
        for (step = 0; step < 3 && !inference; step++) CHECK_OK(ctx, mpt_train_step(m, i ? wide : x, label));
        CHECK_OK(ctx, mpt_predict(m, i ? wide : x, BATCH, y[i]));
    }
    CHECK(memcmp(y[0], y[1], sizeof y[0]) == 0);
    for (j = 0; j < BATCH * 3; j++) CHECK(test_is_finite((double)y[0][j]));
    for (i = 0; i < 2; i++) mpt_model_free(net[i]);
}

static void test_slice_errors(mpt_context *ctx) {
    static const int wrong[][2] = {{-1, 2}, {0, 0}, {0, 5}, {4, 1}, {3, 2}, {2, 0x7fffffff}};
    mpt_model *net;
    size_t i;
    for (i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
        CHECK_EQUAL(mpt_slice(net, mpt_input(net, 3, 3, 4), wrong[i][0], wrong[i][1]), 0);
        CHECK_ERROR(ctx, mpt_model_build(net, NULL), MPT_ERROR_SHAPE, "slice1");
        mpt_model_free(net);
    }
    net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
    CHECK_EQUAL(mpt_reshape(net, mpt_input(net, 3, 3, 4), 6, 2, 4), 0);
    CHECK_ERROR(ctx, mpt_model_build(net, NULL), MPT_ERROR_SHAPE, "6x2x4");
    mpt_model_free(net);
    net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
    CHECK_EQUAL(mpt_reshape(net, mpt_input(net, 3, 3, 4), -6, -6, 1), 0);
    CHECK_ERROR(ctx, mpt_model_build(net, NULL), MPT_ERROR_ARGUMENT, "-6");
    mpt_model_free(net);
    net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
    CHECK_EQUAL(mpt_flatten(net, 7) + mpt_slice(net, 0, 0, 1) + mpt_reshape(net, 0, 1, 1, 1) + mpt_flatten(NULL, 1), 0);
    CHECK_ERROR(ctx, mpt_model_build(net, NULL), MPT_ERROR_ARGUMENT, "7");
    mpt_model_free(net);
}

/* Files of weights: where PyTorch would slice or shape a flattened image in another order they are refused. */
static void test_orders(mpt_context *ctx) {
    int kind;
    for (kind = 0; kind < 8; kind++) {
        mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
        int h = mpt_input(net, 1, 1, 2 * 2 * 6);
        size_t size = 0;
        if (kind < 4 || kind > 5) h = mpt_conv2d(net, mpt_reshape(net, h, 2, 2, 6), 6, 1, NULL);
        if (kind == 0) h = mpt_slice(net, h, 2, 3);                   /* channels of an image */
        if (kind == 1) h = mpt_reshape(net, h, 1, 4, 6);              /* as many channels */
        if (kind == 2) h = mpt_slice(net, mpt_flatten(net, h), 0, 6); /* in C, H, W order not these */
        if (kind == 3) h = mpt_reshape(net, h, 4, 3, 2);
        if (kind == 4) h = mpt_slice(net, mpt_linear(net, h, 9, NULL), 3, 4);
        if (kind == 5) h = mpt_slice(net, mpt_reshape(net, mpt_linear(net, h, 9, NULL), 3, 3, 1), 0, 1);
        if (kind == 6) h = mpt_multiply(net, mpt_flatten(net, h), mpt_linear(net, h, 24, NULL));
        if (kind == 7) h = mpt_multiply(net, mpt_flatten(net, h), mpt_tanh(net, mpt_flatten(net, h)));
        mpt_softmax_cross_entropy(net, mpt_linear(net, h, 2, NULL), NULL);
        CHECK_OK(ctx, mpt_model_build(net, NULL));
        if (kind == 6)
            CHECK_ERROR(ctx, mpt_weights_save_memory(net, NULL, 0, &size, MPT_F32), MPT_ERROR_UNSUPPORTED, "multiply1");
        else if (kind == 2 || kind == 3)
            CHECK_ERROR(ctx, mpt_weights_save_memory(net, NULL, 0, &size, MPT_F32), MPT_ERROR_UNSUPPORTED,
                        kind == 2 ? "slice1" : "reshape2");
        else CHECK_OK(ctx, mpt_weights_save_memory(net, NULL, 0, &size, MPT_F32));
        mpt_model_free(net);
    }
}

/* What a linear layer makes, if an image is made of it, has in files the order that PyTorch's image has: row t of its
   weights is channel t / pixels. A batch norm between goes with it. */
static void test_made_image(mpt_context *ctx) {
    enum { HIGH = 2, WIDE = 3, DEEP = 4, MADE = HIGH * WIDE * DEEP, READ = 5, N = 4 };
    float w[MADE * READ], b[MADE], x[N * READ], y[2][N * MADE];
    mpt_train_desc train = MPT_ZERO;
    size_t size = 0, length = 0, i;
    unsigned char *file = NULL;
    int kind;
    train.batch = N;
    test_floats(x, N * READ, -1, 1, 9);
    for (i = 0; i < MADE * READ; i++) w[i] = (float)i;
    for (i = 0; i < MADE; i++) b[i] = (float)i / 4;
    for (kind = 0; kind < 2; kind++) {
        mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
        int h = mpt_batch_norm(net, mpt_linear(net, mpt_input(net, 1, 1, READ), MADE, NULL), NULL);
        h = mpt_upsample(net, mpt_reshape(net, mpt_relu(net, h), HIGH, WIDE, DEEP), 2);
        mpt_avg_pool2d(net, mpt_conv2d(net, h, DEEP, 1, NULL), 2, NULL);
        train.seed = (uint64_t)kind;
        CHECK_OK(ctx, mpt_model_build(net, &train));
        if (!kind) {
            CHECK_OK(ctx, mpt_params_set(mpt_model_params(net), 1, w));
            CHECK_OK(ctx, mpt_params_set(mpt_model_params(net), 2, b));
            CHECK_OK(ctx, mpt_params_set(mpt_model_params(net), 3, b));
            CHECK_OK(ctx, mpt_weights_save_memory(net, NULL, 0, &size, MPT_F32));
            file = (unsigned char *)test_memory(size);
            CHECK_OK(ctx, mpt_weights_save_memory(net, file, size, &size, MPT_F32));
        } else CHECK_OK(ctx, mpt_weights_load_memory(net, file, size, NULL));
        CHECK_OK(ctx, mpt_predict(net, x, N, y[kind]));
        mpt_model_free(net);
    }
    CHECK(memcmp(y[0], y[1], sizeof y[0]) == 0);
    for (i = 8; i > 0; i--) length = length << 8 | file[i - 1];
    for (i = 0; i < MADE * (READ + 2); i++) { /* weight, bias, gamma, behind the statistics */
        const size_t row = i < MADE * READ ? i / READ : i % MADE,
                     ours = row % (HIGH * WIDE) * DEEP + row / (HIGH * WIDE);
        const float expected = i < MADE * READ ? w[ours * READ + i % READ] : b[ours];
        const unsigned char *at = file + 8 + length + 4 * (2 * MADE + i);
        CHECK(test_float((uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24) ==
              expected);
    }
    free(file);
}

/* A name is any node's, each one's own, and leads back to it. */
static void test_names(mpt_context *ctx) {
    static const char *const wrong[] = {"", "a name of 32 characters, one more", "mpt.x", "quote\"", "tab\t", "joined"};
    const mpt_train_desc none = MPT_ZERO;
    mpt_linear_desc linear = MPT_ZERO;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    mpt_node_info info;
    float x[4 * BATCH], y[4 * BATCH];
    int32_t label[BATCH] = {0};
    size_t i;
    int in, a, b, loss;
    in = mpt_name(net, mpt_input(net, 1, 1, 4), "pixels");
    a = mpt_relu(net, in);
    b = mpt_relu(net, in);
    CHECK_EQUAL(mpt_find(net, "relu2"), b);
    CHECK_EQUAL(mpt_name(net, a, "left"), a);
    CHECK_EQUAL(mpt_name(net, a, "left"), a);
    CHECK_EQUAL(mpt_find(net, "relu1"), 0);
    CHECK_EQUAL(mpt_find(net, "left"), a);
    mpt_keep(net, mpt_name(net, mpt_add(net, a, b), "joined"));
    linear.name = "relu1";
    b = mpt_name(net, mpt_linear(net, mpt_find(net, "joined"), 3, &linear), "fc");
    loss = mpt_name(net, mpt_softmax_cross_entropy(net, b, NULL), "loss");
    CHECK_EQUAL(mpt_find(net, "loss"), loss);
    CHECK_EQUAL(mpt_find(net, "nobody") + mpt_find(net, NULL) + mpt_find(NULL, "fc") + mpt_name(net, 0, "x"), 0);
    CHECK_OK(ctx, mpt_model_build(net, &none));
    CHECK_EQUAL(mpt_params_find(mpt_model_params(net), "fc.weight"), 1);
    CHECK_OK(ctx, mpt_model_node(net, a, &info));
    CHECK(strcmp(info.name, "left") == 0);
    test_floats(x, 4 * BATCH, -1, 1, 3);
    CHECK_OK(ctx, mpt_forward(net, x, label, BATCH));
    CHECK_OK(ctx, mpt_node_value(net, mpt_find(net, "joined"), y));
    for (i = 0; i < 4 * BATCH; i++) CHECK_NEAR((double)y[i], fmax((double)x[i], 0) * 2, 1.0 / 1024);
    CHECK_EQUAL(mpt_name(net, a, "later"), 0);
    mpt_model_free(net);
    for (i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
        in = mpt_name(net, mpt_input(net, 1, 1, 4), "joined");
        CHECK_EQUAL(mpt_name(net, mpt_tanh(net, in), wrong[i]), 0);
        CHECK_ERROR(ctx, mpt_model_build(net, NULL), MPT_ERROR_ARGUMENT, "name");
        mpt_model_free(net);
    }
    net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
    CHECK_EQUAL(mpt_name(net, mpt_input(net, 1, 1, 4), NULL) + mpt_name(net, 2, "x"), 0);
    mpt_model_free(net);
}

/* -- Products and upsampling -- */

/* A leaky ReLU of any slope, behind a convolution, which does not compute it in passing unless the slope is 0.01. */
static void test_leaky_slope(mpt_context *ctx, float slope) {
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
    const float factor = slope > 0 ? slope : 0.01f;
    const int in = mpt_keep(net, mpt_input(net, 2, 2, 6));
    const int h = mpt_leaky_relu(net, mpt_conv2d(net, in, 6, 1, NULL), slope);
    const int last = mpt_leaky_relu(net, in, slope), other = mpt_linear(net, h, 3, NULL);
    float x[BATCH * 24], y[BATCH * 24], dx[BATCH * 24];
    mpt_train_desc train = MPT_ZERO;
    mpt_node_info info;
    size_t i;
    train.batch = BATCH;
    test_floats(x, BATCH * 24, -1, 1, 5);
    CHECK_OK(ctx, mpt_model_build(net, &train));
    CHECK_OK(ctx, mpt_model_node(net, h, &info));
    CHECK_EQUAL(info.fused_into > 0, test_bits(factor) == test_bits(0.01f));
    CHECK_OK(ctx, mpt_forward(net, x, NULL, BATCH));
    CHECK_OK(ctx, mpt_node_value(net, last, y));
    for (i = 0; i < BATCH * 24; i++) CHECK(test_bits(y[i]) == test_bits(x[i] > 0 ? x[i] : factor * x[i]));
    memset(y, 0, sizeof y);
    CHECK_OK(ctx, mpt_output_grad(net, other, y));
    for (i = 0; i < BATCH * 24; i++) y[i] = (float)i;
    CHECK_OK(ctx, mpt_output_grad(net, last, y));
    CHECK_OK(ctx, mpt_backward(net));
    CHECK_OK(ctx, mpt_node_grad(net, in, dx));
    for (i = 0; i < BATCH * 24; i++) CHECK(dx[i] == (x[i] > 0 ? y[i] : factor * y[i]));
    mpt_model_free(net);
}

static void test_leaky_errors(mpt_context *ctx) {
    const float wrong[] = {-0.5f, test_float(0x7f800000u), test_float(0x7fc00000u)};
    size_t i;
    for (i = 0; i < 3; i++) {
        mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
        CHECK_EQUAL(mpt_leaky_relu(net, mpt_input(net, 2, 2, 6), wrong[i]), 0);
        CHECK_ERROR(ctx, mpt_model_build(net, NULL), MPT_ERROR_ARGUMENT, "negative_slope");
        mpt_model_free(net);
    }
}

/* A checkpoint of a model with another slope, slice or scale is refused, naming what differs. */
static void test_settings(mpt_context *ctx) {
    static const char *const words[] = {"", "negative_slope", "first", "upsample1"};
    size_t size = 0;
    void *file = NULL;
    int change;
    for (change = 0; change < 4; change++) {
        mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
        int h = mpt_conv2d(net, mpt_input(net, 2, 2, 4), 4, 1, NULL), a, b;
        a = mpt_leaky_relu(net, h, change == 1 ? 0.3f : 0.2f);
        b = mpt_slice(net, a, change == 2, 3);
        h = mpt_multiply(net, b, mpt_slice(net, h, 0, 3));
        h = mpt_global_avg_pool2d(net, mpt_upsample(net, h, change == 3 ? 3 : 2));
        mpt_softmax_cross_entropy(net, h, NULL);
        CHECK_OK(ctx, mpt_model_build(net, NULL));
        if (!change) {
            CHECK_OK(ctx, mpt_checkpoint_save_memory(net, NULL, 0, &size));
            file = test_memory(size);
            CHECK_OK(ctx, mpt_checkpoint_save_memory(net, file, size, &size));
            CHECK_OK(ctx, mpt_checkpoint_load_memory(net, file, size));
        } else CHECK_ERROR(ctx, mpt_checkpoint_load_memory(net, file, size), MPT_ERROR_VALUE, words[change]);
        mpt_model_free(net);
    }
    free(file);
}

/* Squeeze-and-excite, whose factors are of one pixel; or of all; or the value itself, squared. */
static void test_multiply(mpt_context *ctx, int kind) {
    graph g = graph_new(ctx);
    const int h = mpt_tanh(g.net, test_same(g.net, mpt_input(g.net, 5, 3, 4), 6, 3));
    int b = h;
    if (kind == 0) b = mpt_sigmoid(g.net, mpt_linear(g.net, mpt_global_avg_pool2d(g.net, h), 6, NULL));
    if (kind == 1) b = mpt_conv2d(g.net, h, 6, 1, NULL);
    g.head[0] = mpt_multiply(g.net, h, b);
    if (kind == 1) g.head[1] = mpt_multiply(g.net, b, mpt_tanh(g.net, b));
    check_gradients(&g);
    graph_free(&g);
}

/* A network that goes down and up again, with a skip. */
static void test_upsample(mpt_context *ctx, int scale) {
    graph g = graph_new(ctx);
    const int in = mpt_input(g.net, 2 * scale, scale, 3);
    int h = mpt_avg_pool2d(g.net, mpt_tanh(g.net, mpt_conv2d(g.net, in, 5, 1, NULL)), scale, NULL);
    h = mpt_upsample(g.net, mpt_tanh(g.net, h), scale);
    g.head[0] = mpt_conv2d(g.net, mpt_concat(g.net, in, h), 2, 1, NULL);
    check_gradients(&g);
    graph_free(&g);
}

/* The engine's steps are those of the plain loops, as near as the type's roundings: with E = 2^-11 or 2^-8 a value has
   passed fewer than 40 of them, each of which moves it by E of the largest, at most 4. */
static void test_half(mpt_context *ctx, mpt_context *reference, mpt_dtype type) {
    float x[BATCH * 48], y[2][BATCH * 3];
    const int32_t label[BATCH] = {0, 1, 2, 1};
    mpt_train_desc train = MPT_ZERO;
    int i, step;
    train.batch = BATCH;
    train.optimizer = mpt_sgd(0.05, 0.9);
    test_floats(x, BATCH * 48, -1, 1, 5);
    for (i = 0; i < 2; i++) {
        mpt_model *m = mpt_model_new(i ? reference : ctx, mpt_policy_preset(MPT_O2, type));
        int h = test_same(m, mpt_input(m, 4, 4, 3), 6, 3), a, b;
        h = mpt_relu(m, mpt_batch_norm(m, h, NULL));
        a = mpt_sigmoid(m, mpt_linear(m, mpt_global_avg_pool2d(m, h), 6, NULL));
        b = mpt_upsample(m, mpt_max_pool2d(m, h, 2, NULL), 2);
        h = mpt_multiply(m, mpt_multiply(m, h, a), mpt_leaky_relu(m, b, 0.25f));
        h = mpt_concat(m, mpt_slice(m, h, 0, 2), mpt_slice(m, h, 1, 5));
        mpt_softmax_cross_entropy(m, mpt_linear(m, mpt_reshape(m, h, 2, 8, 7), 3, NULL), NULL);
        CHECK_OK(ctx, mpt_model_build(m, &train));
        for (step = 0; step < 3; step++) CHECK_OK(ctx, mpt_train_step(m, x, label));
        CHECK_OK(ctx, mpt_predict(m, x, BATCH, y[i]));
        mpt_model_free(m);
    }
    for (i = 0; i < BATCH * 3; i++) CHECK_NEAR((double)y[0][i], (double)y[1][i], 40 * 4 * test_unit(type));
}

static void test_spread_errors(mpt_context *ctx) {
    static const char *const words[] = {"multiply1", "multiply1", "scale", "upsample1", "upsample1"};
    int kind;
    for (kind = 0; kind < 5; kind++) {
        mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
        const int in = mpt_input(net, 3, 3, 4);
        if (kind == 0) CHECK_EQUAL(mpt_multiply(net, mpt_global_avg_pool2d(net, in), in), 0);
        if (kind == 1) CHECK_EQUAL(mpt_multiply(net, in, mpt_linear(net, in, 3, NULL)), 0);
        if (kind == 2) CHECK_EQUAL(mpt_upsample(net, in, 0), 0);
        if (kind == 3) CHECK_EQUAL(mpt_upsample(net, in, 0x7fffffff), 0);
        if (kind == 4) CHECK_EQUAL(mpt_upsample(net, in, 100000), 0);
        CHECK_ERROR(ctx, mpt_model_build(net, NULL), kind == 2 ? MPT_ERROR_ARGUMENT : MPT_ERROR_SHAPE, words[kind]);
        mpt_model_free(net);
    }
}

/* -- Norms without gamma and beta -- */

/* The operation gives the bits of gamma 1 and beta 0, behind a ReLU, too. */
static void check_plain_norm(mpt_context *ctx, const mpt_norm_shape *shape, mpt_dtype type, int relu) {
    const size_t n = shape->N * shape->pixels * shape->C, sets = shape->N * shape->groups;
    test_tensor x = test_tensor_random(ctx, type, n, 1), dy = test_tensor_random(ctx, type, n, 2);
    test_tensor gamma = test_tensor_new(ctx, type, shape->C), beta = test_tensor_new(ctx, type, shape->C);
    test_tensor y[2], dx[2], stats = test_tensor_new(ctx, MPT_F32, 4 * sets);
    int i;
    test_tensor_fill(&gamma, 1, 1, 0);
    test_tensor_fill(&beta, 0, 0, 0);
    for (i = 0; i < 2; i++) {
        mpt_norm_op op = MPT_ZERO;
        y[i] = test_tensor_new(ctx, type, n);
        dx[i] = test_tensor_new(ctx, type, n);
        op.shape = *shape;
        op.x = x.array;
        op.stats = (float *)stats.array.data;
        CHECK_OK(ctx, mpt_op_norm(ctx, &op));
        if (i) op.gamma = gamma.array;
        if (i) op.beta = beta.array;
        op.pass = MPT_NORM_FORWARD;
        op.act = relu ? MPT_RELU : MPT_IDENTITY;
        op.y = y[i].array;
        CHECK_OK(ctx, mpt_op_norm(ctx, &op));
        op.pass = MPT_NORM_BACKWARD;
        op.saved = y[i].array;
        op.y = dy.array;
        op.dx = dx[i].array;
        CHECK_OK(ctx, mpt_op_norm(ctx, &op));
        test_tensor_upload(&dy); /* which a slope may have been multiplied into */
        test_tensor_download(&y[i]);
        test_tensor_download(&dx[i]);
    }
    CHECK(memcmp(y[0].value, y[1].value, n * sizeof *y[0].value) == 0);
    CHECK(memcmp(dx[0].value, dx[1].value, n * sizeof *dx[0].value) == 0);
    CHECK(test_is_finite(dx[0].value[n - 1]) && fabs(dx[0].value[n - 1]) + fabs(dx[0].value[0]) > 0);
    for (i = 0; i < 2; i++) {
        test_tensor_free(&y[i]);
        test_tensor_free(&dx[i]);
    }
    test_tensor_free(&x), test_tensor_free(&dy), test_tensor_free(&gamma), test_tensor_free(&beta);
    test_tensor_free(&stats);
}

static void test_plain_norm_op(mpt_context *ctx) {
    static const mpt_norm_shape shapes[] = {{1, 35, 19, 19, 0}, {13, 1, 37, 1, 0},  {3, 10, 12, 4, 0},
                                            {2, 7, 33, 3, 0},   {2, 400, 16, 2, 0}, {70, 3, 64, 4, 0}};
    size_t i;
    int type, relu;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (type = MPT_F32; type <= MPT_BF16; type++)
            for (relu = 0; relu < 2; relu++) check_plain_norm(ctx, &shapes[i], (mpt_dtype)type, relu);
}

static int plain_norm(mpt_model *net, int in, int kind, int no_affine) {
    mpt_norm_desc d = MPT_ZERO;
    d.no_affine = no_affine;
    if (kind == 0) return mpt_batch_norm(net, in, &d);
    return kind == 1 ? mpt_layer_norm(net, in, &d) : mpt_group_norm(net, in, 2, &d);
}

static void test_plain_norms(mpt_context *ctx, int kind) {
    graph g = graph_new(ctx);
    const int in = plain_norm(g.net, mpt_input(g.net, 3, 2, 4), kind, 1);
    g.h = 1.0f / 128;
    g.head[0] = mpt_tanh(g.net, plain_norm(g.net, test_same(g.net, in, 6, 3), kind, 1));
    check_gradients(&g);
    CHECK_EQUAL(mpt_params_tensors(mpt_model_params(g.net)), 2); /* of the convolution */
    graph_free(&g);
}

/* A batch norm that nothing trains below gathers the statistics that one with gamma and beta does. */
static void test_input_norm(mpt_context *ctx, mpt_policy policy, int relu) {
    float x[BATCH * 24], running[2][8], start[8] = {0, 0, 0, 0, 1, 1, 1, 1};
    const int32_t label[BATCH] = {0, 1, 2, 1};
    mpt_train_desc train = MPT_ZERO;
    int i, step;
    train.batch = BATCH;
    test_floats(x, BATCH * 24, -1, 2, 5);
    for (i = 0; i < 2; i++) {
        mpt_model *net = mpt_model_new(ctx, policy);
        const int norm = plain_norm(net, mpt_input(net, 3, 2, 4), 0, i);
        mpt_softmax_cross_entropy(net, mpt_linear(net, relu ? mpt_relu(net, norm) : norm, 3, NULL), NULL);
        CHECK_OK(ctx, mpt_model_build(net, &train));
        for (step = 0; step < 3; step++) CHECK_OK(ctx, mpt_train_step(net, x, label));
        CHECK_OK(ctx, mpt_download(ctx, running[i], mpt_model_running(net, norm), sizeof running[i]));
        mpt_model_free(net);
    }
    CHECK(memcmp(running[0], running[1], sizeof running[0]) == 0);
    for (i = 0; i < 8; i++) CHECK(fabs((double)running[0][i] - (double)start[i]) > 1e-3);
}

/* It is not folded, but predicts the same. */
static void test_plain_fold(mpt_context *ctx) {
    float x[BATCH * 24], running[12], y[2][BATCH * 6];
    mpt_train_desc train = MPT_ZERO;
    size_t size = 0;
    void *file = NULL;
    int i;
    train.batch = BATCH;
    test_floats(x, BATCH * 24, -1, 2, 5);
    test_floats(running, 12, 0.5, 2, 6);
    for (i = 0; i < 2; i++) {
        mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
        const int h = mpt_conv2d(net, mpt_input(net, 3, 2, 4), 6, 1, NULL), norm = plain_norm(net, h, 0, 1);
        mpt_global_avg_pool2d(net, mpt_relu(net, norm));
        train.inference = train.fold = i;
        CHECK_OK(ctx, mpt_model_build(net, &train));
        if (!i) {
            CHECK_OK(ctx, mpt_model_set_running(net, norm, running));
            CHECK_OK(ctx, mpt_weights_save_memory(net, NULL, 0, &size, MPT_F32));
            file = test_memory(size);
            CHECK_OK(ctx, mpt_weights_save_memory(net, file, size, &size, MPT_F32));
        } else CHECK_OK(ctx, mpt_weights_load_memory(net, file, size, NULL));
        CHECK_OK(ctx, mpt_predict(net, x, BATCH, y[i]));
        mpt_model_free(net);
    }
    CHECK(memcmp(y[0], y[1], sizeof y[0]) == 0);
    free(file);
}

int main(int argc, char **argv) {
    mpt_context_desc plain = MPT_ZERO;
    mpt_context *ctx, *reference;
    int level, kind;
    test_begin(argc, argv);
    ctx = test_open(NULL);
    plain.reference = 1;
    reference = mpt_open(&plain);
    RUN_TEST(test_two_inputs(ctx));
    RUN_TEST(test_slices(ctx, 0));
    RUN_TEST(test_slices(ctx, 1));
    for (level = 0; level < 3; level++) {
        RUN_TEST(test_same_bits(ctx, mpt_policy_preset((mpt_level)level, MPT_F16), 0));
        RUN_TEST(test_same_bits(ctx, mpt_policy_preset((mpt_level)level, MPT_BF16), 1));
    }
    RUN_TEST(test_slice_errors(ctx));
    RUN_TEST(test_orders(ctx));
    RUN_TEST(test_made_image(ctx));
    RUN_TEST(test_names(ctx));
    for (kind = 0; kind < 3; kind++) RUN_TEST(test_multiply(ctx, kind));
    for (kind = 1; kind <= 3; kind++) RUN_TEST(test_upsample(ctx, kind));
    RUN_TEST(test_half(ctx, reference, MPT_F16));
    RUN_TEST(test_half(ctx, reference, MPT_BF16));
    RUN_TEST(test_spread_errors(ctx));
    for (kind = 0; kind < 4; kind++) RUN_TEST(test_leaky_slope(ctx, (float)(kind * kind) * 0.01f)); /* 0, 0.01... */
    RUN_TEST(test_leaky_slope(ctx, 2));
    RUN_TEST(test_leaky_errors(ctx));
    RUN_TEST(test_settings(ctx));
    RUN_TEST(test_plain_norm_op(ctx));
    RUN_TEST(test_plain_norm_op(reference));
    for (kind = 0; kind < 3; kind++) RUN_TEST(test_plain_norms(ctx, kind));
    for (level = 0; level < 3; level++)
        RUN_TEST(test_input_norm(ctx, mpt_policy_preset((mpt_level)level, MPT_BF16), level % 2));
    RUN_TEST(test_plain_fold(ctx));
    mpt_close(ctx);
    mpt_close(reference);
    return test_finish("nodes");
}
