/* 09_what_if.c - how few bits would do, and where?

       cc -O2 examples/09_what_if.c -o what_if -lm && ./what_if

   No hardware is needed to find out: the net stays in fp32, and a lens rounds the operands or the sums of its products
   to another format, in all layers or in one. You will see how an autoencoder learns digits that way; its loss is
   sensitive to every bit. TF32, bf16 and fp16 change nothing. e4m3 costs 2 %, but only with a loss scale: without one
   its gradients vanish and the net hardly learns. The coarser e5m2 costs more, most in the last layer. 16-bit sums go
   unnoticed, because sums this short (32 to 64 products) stay small: see 04 for long ones. 8-bit sums hurt, but less
   if 16 products are added in fp32 first. Takes about 30 s.                                                         */

#define MPT_IMPLEMENTATION
#include "../mpt.h"
#define LENS_IMPLEMENTATION
#include "lens.h"
#include "course.h"

enum { BATCH = 32, STEPS = 250, SEEDS = 3, EVERY = 10 };
enum { FORWARD = 1 << MPT_FORWARD, BACKWARD = 1 << MPT_BACKWARD_DATA | 1 << MPT_BACKWARD_WEIGHT };

typedef struct choice {
    const char *name;
    int layer; /* 0: all */
    int log2_scale;
    lens_format forward, backward; /* what products read */
    lens_format sum;               /* what they add up in, so many in fp32 first */
    size_t chunk;
} choice;

static const choice choices[] = {
    {"fp32", 0, 0, LENS_F32, LENS_F32, LENS_F32, 0},
    {"TF32", 0, 0, LENS_TF32, LENS_TF32, LENS_F32, 0},
    {"bf16", 0, 0, LENS_BF16, LENS_BF16, LENS_F32, 0},
    {"fp16", 0, 0, LENS_F16, LENS_F16, LENS_F32, 0},
    {"e4m3, back e5m2", 0, 10, LENS_E4M3, LENS_E5M2, LENS_F32, 0},
    {"e4m3", 0, 10, LENS_E4M3, LENS_E4M3, LENS_F32, 0},
    {"e4m3, S = 1", 0, 0, LENS_E4M3, LENS_E4M3, LENS_F32, 0},
    {"e5m2", 0, 10, LENS_E5M2, LENS_E5M2, LENS_F32, 0},
    {"e5m2, layer 1", 1, 10, LENS_E5M2, LENS_E5M2, LENS_F32, 0},
    {"e5m2, layer 2", 2, 10, LENS_E5M2, LENS_E5M2, LENS_F32, 0},
    {"e5m2, layer 3", 3, 10, LENS_E5M2, LENS_E5M2, LENS_F32, 0},
    {"sums fp16", 0, 0, LENS_F32, LENS_F32, LENS_F16, 0},
    {"sums bf16", 0, 0, LENS_F32, LENS_F32, LENS_BF16, 0},
    {"sums e5m2", 0, 0, LENS_F32, LENS_F32, LENS_E5M2, 0},
    {"sums e5m2 by 16", 0, 0, LENS_F32, LENS_F32, LENS_E5M2, 16},
};
enum {
    FP32,
    TF32,
    BF16,
    FP16,
    HYBRID,
    E4M3,
    E4M3_BARE,
    E5M2,
    LAYER_1,
    LAYER_2,
    LAYER_3,
    SUMS_FP16,
    SUMS_BF16,
    SUMS_E5M2
};
enum { CHOICES = sizeof choices / sizeof *choices };

static void simulate(const course *c, lens_view *lens, int node, unsigned passes, const choice *w, lens_format format) {
    lens_what_if what = MPT_ZERO;
    what.operands.format = format;
    if (c->number > 0) what.operands.round = MPT_ROUND_STOCHASTIC;
    what.sum.format = w->sum;
    what.chunk = w->chunk;
    course_need(c, lens_simulate(lens, node, passes, &what) == MPT_OK, "the lens cannot simulate this");
}

static double learn(const course *c, mpt_context *ctx, const course_digits *d, const choice *w, uint64_t seed) {
    static float x[(size_t)BATCH * PIXELS];
    static int32_t y[BATCH];
    mpt_train_desc train = MPT_ZERO;
    double window = 0, loss = 0;
    int layer[4] = {0};
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F32));
    layer[1] = mpt_linear(net, mpt_input(net, SIDE, SIDE, 1), 64, NULL);
    layer[2] = mpt_linear(net, mpt_tanh(net, layer[1]), 16, NULL);
    layer[3] = mpt_linear(net, mpt_tanh(net, layer[2]), PIXELS, NULL);
    mpt_mse(net, layer[3], NULL);
    train.batch = BATCH;
    train.seed = seed;
    train.optimizer = mpt_adam(3e-3);
    train.scaler.mode = MPT_SCALER_STATIC;
    train.scaler.init_scale = (float)ldexp(1, w->log2_scale);
    course_need(c, mpt_model_build(net, &train) == MPT_OK, mpt_why(ctx));
    lens_view *lens = lens_open(ctx);
    course_need(c, lens != NULL, mpt_why(ctx));
    simulate(c, lens, layer[w->layer], FORWARD, w, w->forward);
    simulate(c, lens, layer[w->layer], BACKWARD, w, w->backward);
    for (int step = 0; step < STEPS; step++) {
        course_batch(d, seed, (uint64_t)step, BATCH, x, y);
        course_need(c, mpt_train_step(net, x, x) == MPT_OK, mpt_why(ctx));
        window += mpt_loss(net) / (double)EVERY;
        if (step >= STEPS - 50) loss += mpt_loss(net) / 50;
        if (step % EVERY < EVERY - 1) continue;
        if (seed == 1) course_data(c, "%d %.5f\n", step + 1, window);
        window = 0;
    }
    lens_close(lens);
    mpt_model_free(net);
    return loss;
}

int main(int argc, char **argv) {
    course c = course_begin(argc, argv, "09_what_if", "stochastic", 0);
    mpt_context_desc one = MPT_ZERO;
    one.threads = 1; /* more do not pay for nets this small */
    mpt_context *ctx = mpt_open(&one);
    course_need(&c, ctx != NULL, "no memory");
    course_digits *d = course_digits_read(&c);
    double mean[CHOICES] = {0};
    printf("%-18s%6s%20s%12s\n", "what if", "S", "loss in 3 seeds", "to fp32");
    for (int i = 0; i < CHOICES; i++) {
        double low = 1, high = 0;
        course_data(&c, "# %s: step, loss\n", choices[i].name);
        for (uint64_t seed = 1; seed <= SEEDS; seed++) {
            const double loss = learn(&c, ctx, d, &choices[i], seed);
            mean[i] += loss / (double)SEEDS;
            low = loss < low ? loss : low;
            high = loss > high ? loss : high;
        }
        course_data(&c, "\n\n");
        printf("%-18s  2^%-2d%9.4f (%.4f-%.4f)%8.2fx\n", choices[i].name, choices[i].log2_scale, mean[i], low, high,
               mean[i] / mean[0]);
        fflush(stdout);
    }
    for (int i = TF32; i <= FP16; i++)
        course_claim(&c, fabs(mean[i] / mean[FP32] - 1) < 0.03, "10 and 7 bits of fraction change nothing");
    course_claim(&c, mean[HYBRID] < 1.1 * mean[FP32] && mean[E4M3] < 1.1 * mean[FP32],
                 "e4m3 with a scale costs little");
    course_claim(&c, mean[E4M3_BARE] > 2 * mean[FP32], "e4m3 without a scale does not learn");
    course_claim(&c, mean[E5M2] > mean[HYBRID] && mean[E5M2] > mean[FP32], "e5m2 costs more");
    course_claim(&c, mean[LAYER_3] > mean[LAYER_1] && mean[LAYER_3] > mean[LAYER_2], "the last layer minds most");
    course_claim(&c, fabs(mean[SUMS_FP16] / mean[FP32] - 1) < 0.03, "short sums may be kept in fp16");
    course_claim(&c, mean[SUMS_E5M2] > 1.2 * mean[FP32], "sums in e5m2 hurt");
    course_claim(&c, mean[SUMS_E5M2 + 1] < mean[SUMS_E5M2], "adding 16 products in fp32 first helps");
    free(d);
    mpt_close(ctx);
    return course_end(&c);
}
