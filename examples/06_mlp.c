/* 06_mlp.c - what does an MLP gain and lose from 16 bits?

       cc -O2 examples/06_mlp.c -o mlp -lm && ./mlp

   You will see the four levels side by side on the digits, each with 5 seeds: O0 all fp32; O1 autocast (fp32 weights,
   16-bit products); O2 16-bit weights with fp32 masters; O3 all 16-bit, without masters and loss scale. O1 and O2 are
   as good as fp32. Activations take half the bytes from O1 on. Weights do not: with masters there are two copies, and
   Adam's moments stay fp32; so 16 bits save memory where most of it is activations (07). The speed is that of one
   thread of your CPU, which may have no 16-bit products; for a GPU see 10. Takes about 15 s.                        */

#define MPT_IMPLEMENTATION
#include "../mpt.h"
#include "course.h"
#include <time.h>

enum { LARGEST_BATCH = 1024, STEPS = 1000, SEEDS = 5 };

typedef struct way {
    const char *name;
    mpt_level level;
    mpt_dtype type;
} way;

static const way ways[] = {{"O0 fp32", MPT_O0, MPT_F32},  {"O1 bf16", MPT_O1, MPT_BF16}, {"O1 fp16", MPT_O1, MPT_F16},
                           {"O2 bf16", MPT_O2, MPT_BF16}, {"O2 fp16", MPT_O2, MPT_F16},  {"O3 bf16", MPT_O3, MPT_BF16},
                           {"O3 fp16", MPT_O3, MPT_F16}};
enum { WAYS = sizeof ways / sizeof *ways };

typedef struct result {
    double mean, low, high; /* test accuracy over the seeds */
    double rate;            /* training samples a second */
    float scale;            /* of the last seed */
    mpt_memory memory;
} result;

static double train(const course *c, mpt_context *ctx, const course_digits *d, const way *w, uint64_t seed, result *r) {
    static float x[(size_t)LARGEST_BATCH * PIXELS];
    static int32_t y[LARGEST_BATCH];
    const int batch = (int)c->number;
    mpt_train_desc desc = MPT_ZERO;
    mpt_metrics test;
    clock_t start;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(w->level, w->type));
    int h = mpt_input(net, SIDE, SIDE, 1);
    h = mpt_relu(net, mpt_linear(net, h, 128, NULL));
    h = mpt_relu(net, mpt_linear(net, h, 64, NULL));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
    desc.batch = batch;
    desc.seed = seed;
    desc.optimizer = mpt_adam(3e-3);
    course_need(c, mpt_model_build(net, &desc) == MPT_OK, mpt_why(ctx));
    start = clock();
    for (uint64_t step = 0; step < STEPS; step++) {
        course_batch(d, seed, step, batch, x, y);
        course_need(c, mpt_train_step(net, x, y) == MPT_OK, mpt_why(ctx));
    }
    r->rate += (double)STEPS * c->number * (double)CLOCKS_PER_SEC / (double)(clock() - start + 1) / (double)SEEDS;
    course_need(c, mpt_evaluate(net, d->x[TRAINING], d->y + TRAINING, TEST, &test) == MPT_OK, mpt_why(ctx));
    r->scale = mpt_loss_scale(net);
    r->memory = mpt_model_memory(net);
    mpt_model_free(net);
    return test.accuracy;
}

static size_t bytes(const mpt_memory *m) {
    return m->weights + m->masters + m->gradients + m->moments + m->activations;
}

static void print_row(const course *c, const way *w, const result *r) {
    const mpt_memory *m = &r->memory;
    printf("%-8s%8.2f %% (%.1f-%.1f)%8.0f%10zu%9zu%11zu%9zu%13zu%9zu\n", w->name, 100 * r->mean, 100 * r->low,
           100 * r->high, (double)r->scale, m->weights, m->masters, m->gradients, m->moments, m->activations, bytes(m));
    course_data(c, "\"%s\" %.3f %.3f %.3f %zu %zu %zu %zu %zu %.0f\n", w->name, 100 * r->mean, 100 * r->low,
                100 * r->high, m->weights, m->masters, m->gradients, m->moments, m->activations, r->rate);
}

int main(int argc, char **argv) {
    static result results[WAYS];
    course c = course_begin(argc, argv, "06_mlp", "batch", 64);
    mpt_context_desc one = MPT_ZERO;
    one.threads = 1; /* so that clock() tells the time */
    mpt_context *ctx = mpt_open(&one);
    course_need(&c, ctx != NULL, "no memory");
    course_need(&c, c.number >= 1 && c.number <= (double)LARGEST_BATCH, "--batch is from 1 to 1024");
    course_digits *d = course_digits_read(&c);
    printf("%-8s%23s%8s%47s\n%-8s%23s%8s%10s%9s%11s%9s%13s%9s\n", "", "test digits right,", "loss", "bytes of", "",
           "5 seeds", "scale", "weights", "masters", "gradients", "moments", "activations", "all");
    course_data(&c, "# way, accuracy: mean, lowest, highest; bytes of weights, masters, gradients, moments, "
                    "activations; samples/s\n");
    for (int w = 0; w < WAYS; w++) {
        result *r = &results[w];
        r->low = 1;
        for (uint64_t seed = 1; seed <= SEEDS; seed++) {
            const double a = train(&c, ctx, d, &ways[w], seed, r);
            r->mean += a / (double)SEEDS;
            r->low = a < r->low ? a : r->low;
            r->high = a > r->high ? a : r->high;
        }
        print_row(&c, &ways[w], r);
    }
    printf("\nSpeed with one thread (%s):", mpt_isa_name(ctx));
    for (int w = 0; w < WAYS; w++) printf("%s %s %.0f", w ? "," : "", ways[w].name, results[w].rate);
    puts(" samples/s");
    for (int w = 1; w < WAYS; w++) {
        const mpt_memory *m = &results[w].memory, *fp32 = &results[0].memory;
        if (ways[w].level == MPT_O3) continue; /* without promise */
        /* two tests of 359 digits, 95 % of them right, differ by 1.6 points (one deviation); means of 5 by 0.7 */
        course_claim(&c, fabs(results[w].mean - results[0].mean) < 0.015, "O1 and O2 are as good as fp32");
        course_claim(&c, 100 * m->activations <= 55 * fp32->activations, "activations take half");
        course_claim(&c, m->weights + m->masters > fp32->weights, "weights do not");
    }
    course_claim(&c, results[2].scale >= 1024 && results[1].scale == 1, "fp16 has a scale, bf16 needs none");
    free(d);
    mpt_close(ctx);
    return course_end(&c);
}
