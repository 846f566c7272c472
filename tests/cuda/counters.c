/* counters.c - what a training step asks of CUDA, told by the runner's counters over steps 3 to 12: launches and cuBLAS
   calls, and no synchronisation, no allocation, no bytes to the device but the batch. Skipped where nobody counts. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* RTLD_DEFAULT; nvcc defines it already */
#endif
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include <dlfcn.h>

typedef unsigned long long (*counter_function)(const char *name);

enum { BATCH = 64, SIDE = 28, CLASSES = 10, FIRST = 3, LAST = 12 };

static const char *const names[] = {"kernel_launches", "cublas_calls", "memcpy_h2d_bytes", "memset", "sync_device",
                                    "sync_stream", "sync_event", "sync_memcpy", "sync_memset", "sync_free", "mallocs",
                                    "malloc_async", "frees", "host_allocs"};
enum { LAUNCHES = 0, PRODUCTS, UPLOADED, CLEARED, FORBIDDEN, COUNTERS = sizeof names / sizeof *names };

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

static mpt_model *build(mpt_context *ctx, void (*layers)(mpt_model *net)) {
    mpt_train_desc train = MPT_ZERO;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    layers(net);
    train.batch = BATCH;
    train.clip_norm = 1;
    CHECK_OK(ctx, mpt_model_build(net, &train));
    return net;
}

static void test_counters(mpt_context *ctx, counter_function counter, const char *what,
                          void (*layers)(mpt_model *net)) {
    static float x[BATCH * SIDE * SIDE];
    const unsigned long long steps = LAST - FIRST + 1, batch = BATCH * (SIDE * SIDE * sizeof(float) + sizeof(int32_t));
    unsigned long long count[COUNTERS];
    mpt_model *net = build(ctx, layers);
    int32_t label[BATCH];
    int step, i;
    test_floats(x, BATCH * SIDE * SIDE, 0, 1, 1);
    for (i = 0; i < BATCH; i++) label[i] = i % CLASSES;
    for (step = 1; step <= LAST; step++) {
        for (i = 0; i < COUNTERS && step == FIRST; i++) count[i] = counter(names[i]);
        CHECK_OK(ctx, mpt_train_step(net, x, label));
    }
    for (i = 0; i < COUNTERS; i++) count[i] = counter(names[i]) - count[i];
    printf("%s: %g launches and %g cuBLAS calls a step, %g clears\n", what, (double)count[LAUNCHES] / (double)steps,
           (double)count[PRODUCTS] / (double)steps, (double)count[CLEARED] / (double)steps);
    CHECK_EQUAL(count[UPLOADED], batch * steps);
    for (i = FORBIDDEN; i < COUNTERS; i++)
        if (!CHECK_EQUAL(count[i], 0)) printf("    %s\n", names[i]);
    mpt_model_free(net);
}

int main(void) {
    mpt_context *ctx = mpt_cuda_open(NULL);
    counter_function counter;
    void *found = dlsym(RTLD_DEFAULT, "cudacpu_counter");
    memcpy(&counter, &found, sizeof counter);
    if (!ctx) return 1;
    if (counter) {
        test_counters(ctx, counter, "MLP 784-512-512-10", mlp);
        test_counters(ctx, counter, "LeNet", lenet);
    } else {
        test_counts.skipped++;
    }
    mpt_close(ctx);
    return test_finish("cuda/counters");
}
