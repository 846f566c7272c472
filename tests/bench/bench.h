/* bench.h - what bench.c and peers.cpp share: time, and the products and convolutions that both measure.

   The program defines MPT_IMPLEMENTATION and _POSIX_C_SOURCE 199309L, includes this, and says what to do with a case:
   product_row and convolution_row. C99 and C++11. */
#ifndef MPT_BENCH_H
#define MPT_BENCH_H
#include "../../mpt.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { REPEATS = 9 };

static void *need(void *p) {
    if (p) return p;
    printf("out of memory\n");
    exit(1);
}

static void ok(mpt_context *ctx, mpt_result result) {
    if (result == MPT_OK) return;
    printf("failed: %s\n", mpt_why(ctx));
    exit(1);
}

static mpt_context *open_threads(int threads) {
    mpt_context_desc desc = MPT_ZERO;
    desc.threads = threads;
    return (mpt_context *)need(mpt_open(&desc));
}

/* ==== TIME ==== */

typedef void (*work)(void *arg);

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double time_of(work run, void *arg, int times) {
    const double start = seconds();
    int i;
    for (i = 0; i < times; i++) run(arg);
    return (seconds() - start) / times;
}

/* How often to run it in one repetition: for 4 ms at the least. The quickest of three tries tells, so that a pause of
   this process does not. */
static int times_for(work run, void *arg) {
    int times, i;
    for (times = 1;; times *= 2) {
        double best = time_of(run, arg, times);
        for (i = 0; i < 2; i++) {
            const double t = time_of(run, arg, times);
            if (t < best) best = t;
        }
        if (best * times >= 4e-3) return times;
    }
}

static int compare(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x) {
    qsort(x, REPEATS, sizeof *x, compare);
    return x[REPEATS / 2];
}

typedef struct timing {
    double value, peak; /* seconds of one call; peak 0: there is no yardstick */
} timing;

/* OpenMP's threads look for more work some milliseconds before they sleep, on the cores that the next one needs. */
static inline void settle(void) {
    const struct timespec pause = {0, 10000000};
    nanosleep(&pause, NULL);
}

static inline timing measure(work run, void *arg, work yardstick, void *yardstick_arg) {
    const int times = times_for(run, arg), yardstick_times = yardstick ? times_for(yardstick, yardstick_arg) : 0;
    double value[REPEATS], peak[REPEATS] = {0};
    timing t;
    int i;
    for (i = 0; i < REPEATS; i++) {
        if (yardstick) peak[i] = time_of(yardstick, yardstick_arg, yardstick_times), settle();
        value[i] = time_of(run, arg, times);
    }
    t.value = median(value), t.peak = median(peak);
    return t;
}

/* ==== DATA ==== */

/* n elements of a type between -1 and 1. */
static mpt_array filled(mpt_context *ctx, mpt_dtype type, size_t n) {
    float *x = (float *)need(mpt_alloc(ctx, n * sizeof *x));
    const mpt_array a = mpt_typed_array(need(mpt_alloc(ctx, n * mpt_dtype_size(type))), type);
    size_t i;
    for (i = 0; i < n; i++) x[i] = 2 * mpt_uniform(1, 0, 0, i) - 1;
    ok(ctx, mpt_cast(ctx, n, mpt_f32_array(x), a, NULL));
    mpt_free(ctx, x);
    return a;
}

/* ==== PRODUCTS ==== of square matrices, of convolutions written as products, of the net 784-512-512-10 */

typedef struct product {
    mpt_context *ctx;
    const char *pass;
    mpt_gemm_op op;
} product;

static void product_row(product *p); /* the program's */

static inline void run_product(void *arg) {
    const product *p = (const product *)arg;
    ok(p->ctx, mpt_op_gemm(p->ctx, &p->op));
}

static inline double product_operations(const product *p) {
    return 2.0 * (double)p->op.m * (double)p->op.n * (double)p->op.k;
}

static inline void product_free(product *p) {
    mpt_free(p->ctx, p->op.a.data);
    mpt_free(p->ctx, p->op.b.data);
    mpt_free(p->ctx, p->op.c.data);
}

static void each_product(mpt_context *ctx, const char *pass, int trans_a, int trans_b, size_t m, size_t n, size_t k,
                         mpt_dtype type, mpt_dtype out) {
    product p = MPT_ZERO;
    p.ctx = ctx;
    p.pass = pass;
    p.op.trans_a = trans_a;
    p.op.trans_b = trans_b;
    p.op.m = m;
    p.op.n = n;
    p.op.k = k;
    p.op.a = filled(ctx, type, m * k);
    p.op.b = filled(ctx, type, k * n);
    p.op.c = filled(ctx, out, m * n);
    product_row(&p);
    fflush(stdout);
    product_free(&p);
}

static inline void print_product(const product *p) {
    printf("gemm pass=%s type=%s out=%s m=%lu n=%lu k=%lu threads=%d", p->pass, mpt_dtype_name(p->op.a.type),
           mpt_dtype_name(p->op.c.type), (unsigned long)p->op.m, (unsigned long)p->op.n, (unsigned long)p->op.k,
           mpt_thread_count(p->ctx));
}

/* The three products of a linear layer, see mpt_gemm_op. */
static void each_linear(mpt_context *ctx, size_t N, size_t I, size_t O, mpt_dtype type, int first) {
    each_product(ctx, "forward", 0, 1, N, O, I, type, type);
    if (!first) each_product(ctx, "dX", 0, 0, N, I, O, type, type);
    each_product(ctx, "dW", 1, 0, O, I, N, type, MPT_F32);
}

/* ==== CONVOLUTIONS ==== 3x3, those of the nets LeNet and block */

typedef struct convolution { /* that keeps the size: x(N,H,W,C), w(K,3,3,C), y(N,H,W,K) */
    mpt_context *ctx;
    mpt_conv2d_op op;
} convolution;

static void convolution_row(convolution *c); /* the program's */

static inline void run_convolution(void *arg) {
    const convolution *c = (const convolution *)arg;
    ok(c->ctx, mpt_op_conv2d(c->ctx, &c->op));
}

/* Those in the padding count. */
static inline double convolution_operations(const convolution *c) {
    const mpt_conv2d_shape *z = &c->op.shape;
    return 2.0 * (double)(z->N * z->H * z->W) * (double)(z->K * z->R * z->S * z->C);
}

static inline void print_convolution(const convolution *c) {
    static const char *const passes[] = {"forward", "dX", "dW"};
    const mpt_conv2d_shape *z = &c->op.shape;
    printf("conv pass=%s type=%s h=%lu w=%lu c=%lu k=%lu threads=%d", passes[c->op.pass], mpt_dtype_name(c->op.x.type),
           (unsigned long)z->H, (unsigned long)z->W, (unsigned long)z->C, (unsigned long)z->K,
           mpt_thread_count(c->ctx));
}

/* Batch 64: forward and both gradients. */
static void each_convolution(mpt_context *ctx, size_t side, size_t C, size_t K, mpt_dtype type) {
    convolution c = MPT_ZERO;
    int pass;
    c.ctx = ctx;
    c.op.shape.N = 64;
    c.op.shape.H = c.op.shape.W = side;
    c.op.shape.C = C;
    c.op.shape.K = K;
    c.op.shape.R = c.op.shape.S = 3;
    c.op.shape.padding_h = c.op.shape.padding_w = 1;
    c.op.x = filled(ctx, type, 64 * side * side * C);
    c.op.y = filled(ctx, type, 64 * side * side * K);
    for (pass = 0; pass < 3; pass++) {
        if (pass == MPT_BACKWARD_DATA && C < 4) continue; /* of the input */
        c.op.pass = (mpt_pass)pass;
        c.op.w = filled(ctx, pass == MPT_BACKWARD_WEIGHT ? MPT_F32 : type, K * 9 * C);
        convolution_row(&c);
        fflush(stdout);
        mpt_free(ctx, c.op.w.data);
    }
    mpt_free(ctx, c.op.x.data);
    mpt_free(ctx, c.op.y.data);
}

static void bench_products(mpt_context *ctx, mpt_dtype type) {
    static const size_t patches[][3] = {{1024, 64, 576}, {196, 64, 288}, {256, 128, 576}}; /* of the convolutions */
    size_t size, batch, i;
    for (i = 0; i < 3; i++) each_product(ctx, "patches", 0, 1, patches[i][0], patches[i][1], patches[i][2], type, type);
    for (size = 256; size <= 2048; size *= 2) each_product(ctx, "square", 0, 0, size, size, size, type, type);
    for (batch = 64; batch <= 512; batch *= 8) {
        each_linear(ctx, batch, 784, 512, type, 1);
        each_linear(ctx, batch, 512, 512, type, 0);
        each_linear(ctx, batch, 512, 10, type, 0);
    }
    each_convolution(ctx, 28, 1, 32, type);
    each_convolution(ctx, 14, 32, 64, type);
    each_convolution(ctx, 32, 3, 64, type);
    each_convolution(ctx, 32, 64, 64, type);
    each_convolution(ctx, 16, 64, 128, type);
}

#endif
