/* xor.c - a whole program for a chip with little memory: trains XOR and prints the most bytes that it held. Without an
   operating system it starts from the vector table below; printf goes through semihosting. */
#define MPT_IMPLEMENTATION
#include "mpt.h"
#include <stdio.h>

#ifdef __ARM_ARCH_7EM__
void _start(void); /* of the C library */
static void reset(void) {
    *(volatile uint32_t *)0xe000ed88u |= 0xfu << 20; /* the floating-point unit on */
    __asm__ volatile("dsb\n isb");
    _start();
}
extern void (*const vectors[])(void);
__attribute__((section(".vectors"))) void (*const vectors[])(void) = {(void (*)(void))0x00100000, reset}; /* stack */
#endif

static size_t held, peak;

static void *counted_alloc(size_t bytes, void *user) {
    (void)user;
    held += bytes;
    if (held > peak) peak = held;
    return malloc(bytes);
}

static void counted_release(void *p, size_t bytes, void *user) {
    (void)user;
    held -= bytes;
    free(p);
}

int main(void) {
    static const float x[8] = {0, 0, 0, 1, 1, 0, 1, 1};
    static const int32_t labels[4] = {0, 1, 1, 0};
    mpt_context_desc desc = MPT_ZERO;
    mpt_train_desc train = MPT_ZERO;
    mpt_metrics metrics = MPT_ZERO;
    mpt_result r;
    mpt_context *ctx;
    mpt_model *net;
    int step;
    desc.alloc = counted_alloc, desc.release = counted_release, desc.threads = 1;
    ctx = mpt_open(&desc);
    net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_BF16));
    mpt_softmax_cross_entropy(
        net, mpt_linear(net, mpt_tanh(net, mpt_linear(net, mpt_input(net, 1, 1, 2), 8, NULL)), 2, NULL), NULL);
    train.batch = 4, train.seed = 1, train.optimizer = mpt_adam(0.05);
    r = mpt_model_build(net, &train);
    for (step = 0; step < 200 && r == MPT_OK; step++) r = mpt_train_step(net, x, labels);
    if (r == MPT_OK) r = mpt_evaluate(net, x, labels, 4, &metrics);
    mpt_model_free(net);
    mpt_close(ctx);
    printf("xor: %d right of 4, result %d, RAM %lu bytes, %lu not given back\n", (int)metrics.correct, (int)r,
           (unsigned long)peak, (unsigned long)held);
    return r == MPT_OK && metrics.correct == 4 && !held ? 0 : 1;
}
