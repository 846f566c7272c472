/* counters.c - what a training step asks of CUDA, told by the runner's counters over steps 3 to 6: kernels, cuBLAS
   calls, clears and copies where each is launched by itself, which are the nodes of the graph, and one graph launch
   where steps are recorded; in both no synchronisation, no allocation, no question to cuBLASLt's heuristics, no product
   without a workspace, no bytes to the device but the batch. Skipped where nobody counts.

   With CUDACPU_LAZY=1 the runner's streams do nothing until somebody waits for them. Pinned memory is written again two
   uploads later, for which its copy must be done. On a device it is, and nobody waits; there it never is, so that each
   upload waits for one event, and for nothing else. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* RTLD_DEFAULT; nvcc defines it already */
#endif
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include "nets.h"
#include <dlfcn.h>

typedef unsigned long long (*counter_function)(const char *name);

enum { BATCH = 64, SIDE = 28, FIRST = 3, LAST = 6 };

/* Kernels and executed products are counted as they run, in a graph or not; all else as it is asked for. */
static const char *const names[] = {"kernel_launches", "cublas_gemms", "cublas_calls",  "memcpy_h2d_bytes",
                                    "memset",          "memcpy_d2h",   "memcpy_d2d",    "graph_launches",
                                    "sync_event",      "sync_device",  "sync_stream",   "sync_memcpy",
                                    "sync_memset",     "sync_free",    "mallocs",       "malloc_async",
                                    "frees",           "host_allocs",  "lt_heuristics", "lt_no_workspace"};
enum {
    KERNELS = 0,
    GEMMS,
    RUN, /* what is counted as it runs stands before */
    PRODUCTS = RUN,
    UPLOADED,
    CLEARED,
    DOWN,
    MOVED,
    GRAPHS,
    WAITS,
    FORBIDDEN, /* from here on */
    COUNTERS = sizeof names / sizeof *names
};

typedef struct net_case {
    const char *name;
    net_layers layers;
    int side, channels;      /* SIDE * SIDE inputs */
    unsigned long long most; /* nodes, where cuBLASLt has all epilogues and they are taken */
    size_t element;          /* bytes of one of an input */
} net_case;

/* net_mlp, of images as bytes */
static void net_bytes(mpt_model *net, int side, int channels) {
    mpt_input_desc in = MPT_ZERO;
    int h;
    in.bytes = 1;
    h = mpt_input_with(net, side, side, channels, &in);
    h = mpt_relu(net, mpt_linear(net, h, 512, NULL));
    net_classifier(net, mpt_relu(net, mpt_linear(net, h, 512, NULL)));
}

static mpt_model *build(mpt_context *ctx, const net_case *c) {
    mpt_train_desc train = MPT_ZERO;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    c->layers(net, c->side, c->channels);
    train.batch = BATCH;
    train.clip_norm = 1;
    CHECK_OK(ctx, mpt_model_build(net, &train));
    return net;
}

/* What has been asked for, and then what has run once nothing is left to run */
static void count_all(counter_function counter, unsigned long long *count) {
    int i;
    for (i = RUN; i < COUNTERS; i++) count[i] = counter(names[i]);
    cudaDeviceSynchronize();
    for (i = 0; i < RUN; i++) count[i] = counter(names[i]);
}

/* What steps FIRST to LAST ask for. Waits that count_all makes itself are not among them. */
static void count_steps(const net_case *c, int no_graph, counter_function counter, unsigned long long *count,
                        unsigned long long *refused) {
    static float x[BATCH * SIDE * SIDE];
    unsigned long long before[COUNTERS];
    mpt_cuda_desc desc = MPT_ZERO;
    mpt_context *ctx;
    mpt_model *net;
    int32_t label[BATCH];
    int step, i;
    desc.no_graph = no_graph;
    ctx = mpt_cuda_open(&desc);
    net = build(ctx, c);
    test_floats(x, BATCH * SIDE * SIDE, 0, 1, 1);
    for (i = 0; i < BATCH; i++) label[i] = i % NET_CLASSES;
    *refused = counter("lt_refused");
    for (step = 1; step <= LAST; step++) {
        if (step == FIRST) {
            count_all(counter, before);
            for (i = RUN; i < COUNTERS; i++) before[i] = counter(names[i]);
        }
        CHECK_OK(ctx, mpt_train_step(net, x, label));
    }
    count_all(counter, count);
    for (i = 0; i < COUNTERS; i++) count[i] -= before[i];
    *refused = counter("lt_refused") - *refused;
    for (i = FORBIDDEN; i < COUNTERS; i++)
        if (!CHECK_EQUAL(count[i], 0)) printf("    %s, %s\n", c->name, names[i]);
    mpt_model_free(net);
    mpt_close(ctx);
}

static void test_counters(const net_case *c, counter_function counter) {
    const unsigned long long steps = LAST - FIRST + 1, batch = BATCH * (SIDE * SIDE * c->element + sizeof(int32_t));
    const char *late = getenv("CUDACPU_LAZY");
    const int apart = getenv("MPT_TEST_WAVES") != NULL;              /* see runner.cpp */
    const unsigned long long waits = late && atoi(late) ? steps : 0; /* for one upload a step */
    unsigned long long one[COUNTERS], graph[COUNTERS], refused, nodes;
    count_steps(c, 1, counter, one, &refused);
    count_steps(c, 0, counter, graph, &refused);
    nodes = one[KERNELS] + one[PRODUCTS] + one[CLEARED] + one[DOWN] + one[MOVED];
    printf("%s, by itself: %g kernels, %g cuBLAS calls, %g clears and %g copies a step\n", c->name,
           (double)one[KERNELS] / (double)steps, (double)one[PRODUCTS] / (double)steps,
           (double)one[CLEARED] / (double)steps, (double)(one[DOWN] + one[MOVED]) / (double)steps);
    printf("%s, as a graph: %g nodes, %g graph launches and %g cuBLAS calls a step\n", c->name,
           (double)nodes / (double)steps, (double)graph[GRAPHS] / (double)steps,
           (double)graph[PRODUCTS] / (double)steps);
    if (apart) CHECK(nodes > c->most * steps); /* column sums are launches of their own */
    else CHECK(refused || nodes <= c->most * steps);
    CHECK(one[GRAPHS] == 0);
    CHECK(one[WAITS] <= 2 * waits && graph[WAITS] <= waits); /* images and labels; one feed for both */
    CHECK_EQUAL(one[UPLOADED], batch * steps);
    CHECK_EQUAL(graph[UPLOADED], batch * steps);
    CHECK_EQUAL(graph[GRAPHS], steps);
    CHECK(graph[PRODUCTS] == 0 && graph[CLEARED] == 0);
    CHECK(graph[KERNELS] == one[KERNELS] && graph[GEMMS] == one[GEMMS]); /* all of them in the graph */
}

int main(void) {
    static const net_case nets[] = {{"MLP 784-512-512-10", net_mlp, SIDE, 1, 13, sizeof(float)},
                                    {"MLP of bytes", net_bytes, SIDE, 1, 13, 1},
                                    {"LeNet", net_lenet, SIDE, 1, 29, sizeof(float)},
                                    {"ResNet", net_resnet, SIDE / 2, 4, 109, sizeof(float)}};
    counter_function counter;
    void *found = dlsym(RTLD_DEFAULT, "cudacpu_counter");
    size_t i;
    memcpy(&counter, &found, sizeof counter);
    for (i = 0; i < sizeof nets / sizeof *nets && counter; i++) test_counters(&nets[i], counter);
    if (!counter) test_counts.skipped++;
    return test_finish("cuda/counters");
}
