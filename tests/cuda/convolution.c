/* convolution.c - convolutions as one kernel, see own_convolutions in mpt_cuda.cuh: every pass against the reference,
   on odd and prime sizes, strides, paddings, dilations, and channels on both sides of each limit; inf beside the
   padding; a net trained that way, as a graph and call by call, and the way of cuBLAS. The runner's counters tell
   whether a product of cuBLAS was made. Where device or build are too old for the kernel, none may be left out. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* RTLD_DEFAULT; nvcc defines it already */
#endif
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include "../operation.h"
#include <dlfcn.h>

typedef unsigned long long (*counter_function)(const char *name);

static counter_function counter; /* NULL: nobody counts */
static int refused;              /* the log was told that there is no such kernel */

static void hear(mpt_log_level level, const char *text, void *user) {
    (void)level, (void)user;
    if (strstr(text, "own_convolutions")) refused = 1;
}

/* On a stream that all contexts share, so that they may share arrays */
static mpt_context *open_own(int own, int no_graph) {
    static cudaStream_t stream;
    mpt_cuda_desc desc = MPT_ZERO;
    if (!stream) cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    desc.context.log = hear;
    desc.stream = stream;
    desc.own_convolutions = own;
    desc.no_graph = no_graph;
    return mpt_cuda_open(&desc);
}

static unsigned long long products(void) {
    if (!counter) return 0;
    cudaDeviceSynchronize();
    return counter("cublas_gemms");
}

/* own: a bit for each pass that is one kernel */
static void test_shape(mpt_context *ctx, const mpt_conv2d_shape *shape, mpt_dtype type, mpt_dtype result, int own) {
    mpt_conv2d_op op = MPT_ZERO;
    int pass, with;
    op.shape = *shape;
    for (pass = MPT_FORWARD; pass <= MPT_BACKWARD_WEIGHT; pass++) {
        test_op t;
        op.pass = (mpt_pass)pass;
        op.act = pass == MPT_FORWARD ? MPT_RELU : MPT_IDENTITY;
        op.x = test_wanted(pass == MPT_BACKWARD_DATA ? result : type);
        op.w = test_wanted(pass == MPT_BACKWARD_WEIGHT ? result : type);
        op.y = test_wanted(pass == MPT_FORWARD ? result : type);
        op.bias = test_wanted(pass == MPT_BACKWARD_WEIGHT ? MPT_F32 : result);
        t = test_op_new(ctx, TEST_CONV2D, &op);
        for (with = 0; with < 2; with++) {
            const unsigned long long before = products();
            t.op.conv2d.bias.data = with ? NULL : t.tensor[3].array.data;
            t.op.conv2d.beta = with ? 0.5f : 0;
            CHECK_OP(&t);
            if (counter && (products() == before) != (!refused && own >> pass & 1)) {
                CHECK(!"a product of cuBLAS where none was expected, or none");
                test_op_print(&t);
            }
        }
        test_op_free(&t);
    }
}

enum { NONE = 0, ALL = 7, NO_DATA = 5 };

/* Rows around 128, columns around 64, terms around 32, and images and lines shorter than a step */
static void test_shapes(mpt_context *ctx) {
    static const struct {
        mpt_conv2d_shape shape;
        int own;
    } cases[] = {{{1, 13, 11, 16, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0}, ALL},
                 {{3, 7, 13, 24, 40, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0}, ALL},
                 {{2, 11, 7, 16, 72, 3, 2, 2, 2, 1, 1, 2, 2, 1, 0}, NO_DATA},
                 {{2, 5, 9, 72, 16, 5, 3, 1, 2, 2, 0, 1, 3, 1, 0}, NO_DATA},
                 {{17, 3, 3, 64, 64, 2, 2, 1, 1, 0, 0, 1, 1, 1, 0}, ALL},
                 {{5, 2, 1, 128, 128, 3, 3, 1, 1, 2, 1, 1, 1, 1, 0}, ALL},
                 {{2, 6, 5, 32, 48, 4, 2, 1, 1, 0, 0, 2, 1, 1, 1}, ALL},     /* same */
                 {{1, 9, 9, 16, 24, 1, 1, 3, 1, 0, 0, 1, 1, 1, 0}, NO_DATA}, /* reads every third line */
                 {{1, 4, 37, 40, 16, 1, 7, 1, 1, 0, 6, 1, 2, 1, 0}, ALL},
                 {{2, 6, 5, 24, 24, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0}, NONE}, /* a product */
                 {{1, 5, 5, 8, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0}, NONE},  /* channels */
                 {{1, 5, 5, 16, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0}, NONE},
                 {{1, 5, 5, 20, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0}, NONE},
                 {{1, 3, 3, 136, 16, 2, 2, 1, 1, 0, 0, 1, 1, 1, 0}, NONE},
                 {{1, 3, 3, 16, 136, 2, 2, 1, 1, 0, 0, 1, 1, 1, 0}, NONE},
                 {{1, 5, 5, 32, 32, 3, 3, 1, 1, 1, 1, 1, 1, 2, 0}, NONE}};                   /* groups */
    static const mpt_conv2d_shape large = {2, 37, 31, 16, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0}; /* dw in several parts */
    size_t i;
    int type;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        const mpt_dtype type = i % 2 ? MPT_BF16 : MPT_F16, result = i % 3 ? MPT_F32 : type;
        test_shape(ctx, &cases[i].shape, type, result, cases[i].own);
    }
    for (type = MPT_F16; type <= MPT_BF16; type++) test_shape(ctx, &large, (mpt_dtype)type, (mpt_dtype)type, ALL);
    test_shape(ctx, &cases[0].shape, MPT_F32, MPT_F32, NONE);
}

/* Filters of ones over pixels of channels that sum to 1, but for inf in x(0,0): y is inf where a tap reads that, and
   elsewhere the number of its taps within the image. Zeros of the padding, and of what fills a tile, change nothing. */
static void test_inf(mpt_context *ctx, mpt_dtype type) {
    enum { SIDE = 12, C = 16, COUNT = SIDE * SIDE * C };
    mpt_conv2d_op op = MPT_ZERO;
    test_tensor x = test_tensor_new(ctx, type, COUNT), y = test_tensor_new(ctx, type, COUNT);
    test_tensor w = test_tensor_new(ctx, type, 9 * C * C);
    size_t i;
    int h, v, wrong = 0;
    for (i = 0; i < COUNT; i++) x.value[i] = i < C ? HUGE_VAL : 0.0625;
    for (i = 0; i < w.count; i++) w.value[i] = 1;
    test_tensor_upload(&x);
    test_tensor_upload(&w);
    op.shape.N = 1;
    op.shape.H = op.shape.W = SIDE;
    op.shape.C = op.shape.K = C;
    op.shape.R = op.shape.S = 3;
    op.shape.padding_h = op.shape.padding_w = 1;
    op.x = x.array;
    op.w = w.array;
    op.y = y.array;
    CHECK_OK(ctx, mpt_op_conv2d(ctx, &op));
    test_tensor_download(&y);
    for (h = 0; h < SIDE; h++)
        for (v = 0; v < SIDE; v++) {
            const int down = 3 - (h == 0 || h == SIDE - 1), across = 3 - (v == 0 || v == SIDE - 1);
            const double expected = h < 2 && v < 2 ? HUGE_VAL : (double)(down * across);
            for (i = 0; i < C; i++) wrong += y.value[(size_t)(h * SIDE + v) * C + i] != expected;
        }
    CHECK_EQUAL(wrong, 0);
    test_tensor_free(&x);
    test_tensor_free(&y);
    test_tensor_free(&w);
}

/* ==== NET ==== */

enum { BATCH = 6, SIDE = 7, CHANNELS = 16, CLASSES = 5, STEPS = 3, LAYERS = 4 };
enum { OWN_PASSES = 7 }; /* three layers forward and for weights; no dx of the input, nor with the stride */

static int net_layer(mpt_model *net, int h, int filters, int stride, int no_bias) {
    mpt_conv2d_desc desc = MPT_ZERO;
    desc.stride = stride;
    desc.padding = 1;
    desc.no_bias = no_bias;
    return mpt_conv2d(net, h, filters, 3, &desc);
}

static mpt_model *net_new(mpt_context *ctx, mpt_dtype type) {
    mpt_train_desc train = MPT_ZERO;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, type));
    int h = mpt_input(net, SIDE, SIDE, CHANNELS);
    h = mpt_relu(net, net_layer(net, h, 24, 1, 0));
    h = mpt_relu(net, mpt_batch_norm(net, net_layer(net, h, 40, 2, 1), NULL));
    h = mpt_relu(net, net_layer(net, h, 16, 1, 0));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
    train.batch = BATCH;
    train.optimizer = mpt_sgd(0.25, 0);
    train.scaler.init_scale = 256;
    CHECK_OK(ctx, mpt_model_build(net, &train));
    return net;
}

static void net_train(mpt_context *ctx, mpt_model *net, int steps) {
    static float x[BATCH * SIDE * SIDE * CHANNELS];
    int32_t label[BATCH];
    int step, i;
    for (step = 0; step < steps; step++) {
        test_floats(x, sizeof x / sizeof *x, -1, 1, (uint64_t)step);
        for (i = 0; i < BATCH; i++) label[i] = (i + step) % CLASSES;
        CHECK_OK(ctx, mpt_train_step(net, x, label));
    }
    CHECK(mpt_steps_skipped(net) == 0);
}

/* A step of both ways is a gradient each. Forward and back, a layer rounds what it makes to the type once in either
   way; that they differ by a rounding in each of them, all to one side, is the most. */
static void test_net(mpt_dtype type) {
    mpt_context *ctx[3]; /* as a graph, call by call, by cuBLAS */
    mpt_model *net[3];
    float *before, *w[3];
    unsigned long long made[3];
    double apart = 0, all = 0;
    size_t count, i;
    int way;
    for (way = 0; way < 3; way++) {
        ctx[way] = open_own(way < 2, way == 1);
        net[way] = net_new(ctx[way], type);
    }
    before = test_params(ctx[0], net[0], &count);
    for (way = 0; way < 3; way++) {
        made[way] = products();
        net_train(ctx[way], net[way], 1);
        made[way] = products() - made[way];
        w[way] = test_params(ctx[way], net[way], &count);
    }
    for (i = 0; i < count; i++) {
        const double change = (double)w[2][i] - (double)before[i], other = (double)w[0][i] - (double)before[i];
        apart += (change - other) * (change - other);
        all += change * change;
    }
    if (counter) CHECK_EQUAL(made[2] - made[0], refused ? 0 : OWN_PASSES);
    CHECK(all > 0);
    CHECK_NEAR(sqrt(apart), 0, 2 * 2 * LAYERS * test_unit(type) * sqrt(all));
    for (way = 0; way < 2; way++) net_train(ctx[way], net[way], STEPS);
    CHECK(test_same_weights(ctx[0], net[0], net[1]));
    CHECK(mpt_loss(net[0]) == mpt_loss(net[1]));
    for (way = 0; way < 3; way++) {
        free(w[way]);
        mpt_model_free(net[way]);
        mpt_close(ctx[way]);
    }
    free(before);
}

int main(int argc, char **argv) {
    void *found = dlsym(RTLD_DEFAULT, "cudacpu_counter");
    mpt_context *own = open_own(1, 0);
    test_begin(argc, argv);
    memcpy(&counter, &found, sizeof counter);
    test_op_open();
    test_op_place(own, 0);
    RUN_TEST(test_shapes(own));
    RUN_TEST(test_inf(own, MPT_F16));
    RUN_TEST(test_inf(own, MPT_BF16));
    RUN_TEST(test_net(MPT_F16));
    RUN_TEST(test_net(MPT_BF16));
    test_op_close();
    mpt_close(own);
    if (refused) printf("without the kernel: this device or build is too old\n");
    return test_finish("cuda/convolution");
}
