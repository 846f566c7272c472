/* 10_gpu.c - does the same program train on a GPU, and what does it gain?

       nvcc -O2 -x cu examples/10_gpu.c -o gpu -lcublas -lcublasLt && ./gpu      with a GPU
       cc -O2 examples/10_gpu.c -o gpu -lm && ./gpu                              without: the CPU's half of the table

   The file is C. Only the call that opens the device differs; mpt_cuda.cuh says how to link a C compiler's object
   with a library built by nvcc. You will see an MLP 784-1024-1024-10 on noise, in fp32, bf16 and fp16, on the CPU
   and, if there is one, on the GPU: the loss is the same except for the order of sums, and the loss scale and the
   number of skipped steps are equal. On a GPU with Tensor Cores 16 bits should be well ahead of fp32 at this size,
   but not for a net ten times smaller, where launching takes longer than multiplying. Measure it: this has not been
   measured on a GPU here.                                                                                           */

#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#define MPT_IMPLEMENTATION
#ifdef __CUDACC__
#include "../mpt_cuda.cuh"
#else
#include "../mpt.h"
#endif
#include "course.h"
#include <time.h>

enum { BATCH = 128, INPUTS = 784, STEPS = 10 };

typedef struct way {
    const char *name;
    mpt_level level;
    mpt_dtype type;
} way;

static const way ways[] = {{"O0 fp32", MPT_O0, MPT_F32}, {"O1 bf16", MPT_O1, MPT_BF16}, {"O2 fp16", MPT_O2, MPT_F16}};
enum { WAYS = sizeof ways / sizeof *ways };

typedef struct result {
    double loss[STEPS], rate; /* samples a second */
    float scale;
    uint64_t skipped;
} result;

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* NULL: no GPU, or built without nvcc. */
static mpt_context *open_gpu(void) {
#ifdef __CUDACC__
    return mpt_cuda_open(NULL);
#else
    return NULL;
#endif
}

static result train(const course *c, mpt_context *ctx, const way *w) {
    static float x[BATCH * INPUTS];
    static int32_t y[BATCH];
    result r = MPT_ZERO;
    mpt_train_desc desc = MPT_ZERO;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(w->level, w->type));
    int h = mpt_input(net, 1, 1, INPUTS);
    h = mpt_relu(net, mpt_linear(net, h, 1024, NULL));
    h = mpt_relu(net, mpt_linear(net, h, 1024, NULL));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
    desc.batch = BATCH;
    desc.seed = 1;
    desc.optimizer = mpt_sgd(0.05, 0.9);
    course_need(c, mpt_model_build(net, &desc) == MPT_OK, mpt_why(ctx));
    for (uint64_t i = 0; i < BATCH * INPUTS; i++) x[i] = mpt_uniform(1, 0, 0, i);
    for (int i = 0; i < BATCH; i++) y[i] = i % CLASSES;
    for (int step = 0; step < STEPS; step++) {
        course_need(c, mpt_train_step(net, x, y) == MPT_OK, mpt_why(ctx));
        r.loss[step] = mpt_loss(net); /* waits for the device */
    }
    const double start = seconds();
    for (int step = 0; step < STEPS; step++) course_need(c, mpt_train_step(net, x, y) == MPT_OK, mpt_why(ctx));
    r.scale = mpt_loss_scale(net); /* waits as well */
    r.rate = BATCH * STEPS / (seconds() - start);
    r.skipped = mpt_steps_skipped(net);
    mpt_model_free(net);
    return r;
}

static void print_row(const course *c, mpt_context *ctx, const way *w, const result *r) {
    printf("%-6s%-9s%12.5f%13.5f%10.0f%9d%13.0f\n", mpt_device_name(ctx), w->name, r->loss[0], r->loss[STEPS - 1],
           (double)r->scale, (int)r->skipped, r->rate);
    course_data(c, "\"%s %s\" %.0f\n", mpt_device_name(ctx), w->name, r->rate);
}

/* Sums of up to 1024 products in another order; each of the steps goes on from weights that differ so. */
static int close_to(const result *a, const result *b, double eps) {
    for (int i = 0; i < STEPS; i++)
        if (!(fabs(a->loss[i] - b->loss[i]) <= 32 * eps * (i + 1) * fabs(b->loss[i]))) return 0;
    return 1;
}

int main(int argc, char **argv) {
    course c = course_begin(argc, argv, "10_gpu", NULL, 0);
    static result cpu[WAYS], gpu[WAYS];
    static const double eps[WAYS] = {5.96e-8, 0.00391, 0.000488};
    mpt_context *host = mpt_open(NULL), *device = open_gpu();
    course_need(&c, host != NULL, "no memory");
    printf("%-6s%-9s%12s%13s%10s%9s%13s\n", "", "", "first loss", "10th loss", "scale", "skipped", "samples/s");
    course_data(&c, "# device and way, samples/s\n");
    for (int w = 0; w < WAYS; w++) {
        cpu[w] = train(&c, host, &ways[w]);
        print_row(&c, host, &ways[w], &cpu[w]);
        course_claim(&c, cpu[w].loss[STEPS - 1] < cpu[w].loss[0], "the loss falls");
        course_claim(&c, close_to(&cpu[w], &cpu[0], w ? eps[w] : 0), "16 bits follow fp32");
    }
    for (int w = 0; device && w < WAYS; w++) {
        gpu[w] = train(&c, device, &ways[w]);
        print_row(&c, device, &ways[w], &gpu[w]);
        course_claim(&c, close_to(&gpu[w], &cpu[w], eps[w]), "the GPU's loss is the CPU's");
        course_claim(&c, gpu[w].scale == cpu[w].scale && gpu[w].skipped == cpu[w].skipped, "the scaler does the same");
    }
    if (!device)
        puts("\nNo GPU, or built without nvcc (the build line is in the first comment): that was the CPU alone.");
    mpt_close(device);
    mpt_close(host);
    return course_end(&c);
}
