/* counters.c - what a training step asks of CUDA, told by the runner's counters over steps 3 to 12: kernels, cuBLAS
   calls, clears and copies where each is launched by itself, which are the nodes of the graph, and one graph launch
   where steps are recorded; in both no
   synchronisation, no allocation, no question to cuBLASLt's heuristics, no product without a workspace, no bytes to the
   device but the batch. Skipped where nobody counts. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* RTLD_DEFAULT; nvcc defines it already */
#endif
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include <dlfcn.h>

typedef unsigned long long (*counter_function)(const char *name);

enum { BATCH = 64, SIDE = 28, CLASSES = 10, FIRST = 3, LAST = 12 };

/* Kernels are counted as they run, in a graph or not; all else as it is asked for. */
static const char *const names[] = {"kernel_launches", "cublas_calls",   "cublas_gemms", "memcpy_h2d_bytes",
                                    "memset",          "memcpy_d2h",     "memcpy_d2d",
                                    "graph_launches",  "sync_device",     "sync_stream",
                                    "sync_event",      "sync_memcpy",    "sync_memset",  "sync_free",
                                    "mallocs",         "malloc_async",   "frees",        "host_allocs",
                                    "lt_heuristics",   "lt_no_workspace"};
enum {
    KERNELS = 0,
    PRODUCTS,
    GEMMS,
    UPLOADED,
    CLEARED,
    DOWN,
    MOVED,
    GRAPHS,
    FORBIDDEN, /* from here on */
    COUNTERS = sizeof names / sizeof *names
};

static void mlp(mpt_model *net) {
    int h = mpt_input(net, 1, 1, SIDE * SIDE);
    h = mpt_relu(net, mpt_linear(net, h, 512, NULL));
    h = mpt_relu(net, mpt_linear(net, h, 512, NULL));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
}

static void lenet(mpt_model *net) {
    int h = mpt_input(net, SIDE, SIDE, 1);
    h = mpt_max_pool2d(net, mpt_relu(net, mpt_conv2d(net, h, 6, 5, NULL)), 2, NULL);
    h = mpt_max_pool2d(net, mpt_relu(net, mpt_conv2d(net, h, 16, 5, NULL)), 2, NULL);
    h = mpt_relu(net, mpt_linear(net, h, 120, NULL));
    h = mpt_relu(net, mpt_linear(net, h, 84, NULL));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
}

static int block(mpt_model *net, int in, int filters, int stride) {
    mpt_conv2d_desc first = MPT_ZERO, plain = MPT_ZERO;
    int h, skip = in;
    first.stride = stride, first.no_bias = plain.no_bias = 1;
    h = mpt_relu(net, mpt_batch_norm(net, mpt_conv2d(net, in, filters, 3, &first), NULL));
    h = mpt_batch_norm(net, mpt_conv2d(net, h, filters, 3, &plain), NULL);
    if (stride > 1) skip = mpt_batch_norm(net, mpt_conv2d(net, in, filters, 1, &first), NULL);
    return mpt_relu(net, mpt_add(net, h, skip));
}

/* On as many inputs as the others: 14 x 14 x 4 */
static void resnet(mpt_model *net) {
    mpt_conv2d_desc plain = MPT_ZERO;
    int h;
    plain.no_bias = 1;
    h = mpt_conv2d(net, mpt_input(net, SIDE / 2, SIDE / 2, 4), 16, 3, &plain);
    h = mpt_relu(net, mpt_batch_norm(net, h, NULL));
    h = block(net, block(net, block(net, h, 16, 1), 32, 2), 64, 2);
    mpt_softmax_cross_entropy(net, mpt_linear(net, mpt_global_avg_pool2d(net, h), CLASSES, NULL), NULL);
}

static mpt_model *build(mpt_context *ctx, void (*layers)(mpt_model *net)) {
    mpt_train_desc train = MPT_ZERO;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    layers(net);
    train.batch = BATCH;
    train.clip_norm = 1;
    CHECK_OK(ctx, mpt_model_build(net, &train));
    return net;
}

/* What steps FIRST to LAST ask for */
static void count_steps(const char *what, int no_graph, void (*layers)(mpt_model *net), counter_function counter,
                        unsigned long long *count, unsigned long long *refused) {
    static float x[BATCH * SIDE * SIDE];
    mpt_cuda_desc desc = MPT_ZERO;
    mpt_context *ctx;
    mpt_model *net;
    int32_t label[BATCH];
    int step, i;
    desc.no_graph = no_graph;
    ctx = mpt_cuda_open(&desc);
    net = build(ctx, layers);
    test_floats(x, BATCH * SIDE * SIDE, 0, 1, 1);
    for (i = 0; i < BATCH; i++) label[i] = i % CLASSES;
    *refused = counter("lt_refused");
    for (step = 1; step <= LAST; step++) {
        for (i = 0; i < COUNTERS && step == FIRST; i++) count[i] = counter(names[i]);
        CHECK_OK(ctx, mpt_train_step(net, x, label));
    }
    for (i = 0; i < COUNTERS; i++) count[i] = counter(names[i]) - count[i];
    *refused = counter("lt_refused") - *refused;
    for (i = FORBIDDEN; i < COUNTERS; i++)
        if (!CHECK_EQUAL(count[i], 0)) printf("    %s, %s\n", what, names[i]);
    mpt_model_free(net);
    mpt_close(ctx);
}

static void test_counters(counter_function counter, const char *what, unsigned long long most,
                          void (*layers)(mpt_model *net)) {
    const unsigned long long steps = LAST - FIRST + 1, batch = BATCH * (SIDE * SIDE * sizeof(float) + sizeof(int32_t));
    unsigned long long one[COUNTERS], graph[COUNTERS], refused, nodes;
    count_steps(what, 1, layers, counter, one, &refused);
    count_steps(what, 0, layers, counter, graph, &refused);
    nodes = one[KERNELS] + one[PRODUCTS] + one[CLEARED] + one[DOWN] + one[MOVED];
    printf("%s, by itself: %g kernels, %g cuBLAS calls, %g clears and %g copies a step\n", what,
           (double)one[KERNELS] / (double)steps, (double)one[PRODUCTS] / (double)steps,
           (double)one[CLEARED] / (double)steps, (double)(one[DOWN] + one[MOVED]) / (double)steps);
    printf("%s, as a graph: %g nodes, %g graph launches and %g cuBLAS calls a step\n", what,
           (double)nodes / (double)steps, (double)graph[GRAPHS] / (double)steps,
           (double)graph[PRODUCTS] / (double)steps);
    CHECK(refused || nodes <= most * steps); /* where cuBLASLt has all epilogues */
    CHECK(one[GRAPHS] == 0);
    CHECK_EQUAL(one[UPLOADED], batch * steps);
    CHECK_EQUAL(graph[UPLOADED], batch * steps);
    CHECK_EQUAL(graph[GRAPHS], steps);
    CHECK(graph[PRODUCTS] == 0 && graph[CLEARED] == 0);
    CHECK(graph[KERNELS] == one[KERNELS] && graph[GEMMS] == one[GEMMS]); /* all of them in the graph */
}

int main(void) {
    counter_function counter;
    void *found = dlsym(RTLD_DEFAULT, "cudacpu_counter");
    memcpy(&counter, &found, sizeof counter);
    if (counter) {
        test_counters(counter, "MLP 784-512-512-10", 13, mlp);
        test_counters(counter, "LeNet", 30, lenet);
        test_counters(counter, "ResNet", 127, resnet);
    } else {
        test_counts.skipped++;
    }
    return test_finish("cuda/counters");
}
