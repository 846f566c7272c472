/* 03_vanishing_gradients.c - which gradients vanish in fp16, and what does a loss scale save?

       cc -O2 examples/03_vanishing_gradients.c -o vanishing -lm && ./vanishing

   Two nets learn in fp32 while a lens counts their gradients by exponent: an MLP that reads digits, and a deep
   autoencoder with sigmoids, whose loss is a mean over 512 x 64 pixels. You will see how many gradients fp16 would
   round to zero or keep with only a few bits (subnormal), that a power of two moves the whole histogram, and which
   one the lens suggests. Then both learn in fp16 with fixed loss scales from 2^-16 to 2^24. The MLP learns with any
   scale in a wide window, also with 1: it needs none. The autoencoder does: with S = 1 it learns worse than in fp32,
   from 2^8 on as well. A mean over 2^8 times as many pixels moves gradients 8 to the left. Takes about 30 s.        */

#define MPT_IMPLEMENTATION
#include "../mpt.h"
#define LENS_IMPLEMENTATION
#include "lens.h"
#include "course.h"

enum { LARGEST_BATCH = 512, SEEDS = 3, FROM = -16, TO = 24, EVERY = 4, SCALES = (TO - FROM) / EVERY + 1 };

enum { MLP, AUTOENCODER, NETS };
static const char *const names[NETS] = {"MLP", "autoencoder"};
static const int batches[NETS] = {32, 512}, steps[NETS] = {600, 400};

static mpt_model *build(const course *c, mpt_context *ctx, int which, mpt_policy policy, int log2_scale,
                        uint64_t seed) {
    static const int widths[] = {32, 16, 8, 16, 32};
    mpt_model *net = mpt_model_new(ctx, policy);
    mpt_train_desc train = MPT_ZERO;
    int h = mpt_input(net, SIDE, SIDE, 1);
    if (which == MLP) {
        h = mpt_relu(net, mpt_linear(net, h, 64, NULL));
        h = mpt_relu(net, mpt_linear(net, h, 32, NULL));
        mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
    } else {
        for (int i = 0; i < 5; i++) h = mpt_sigmoid(net, mpt_linear(net, h, widths[i], NULL));
        mpt_mse(net, mpt_linear(net, h, PIXELS, NULL), NULL);
    }
    train.batch = batches[which];
    train.seed = seed;
    train.optimizer = mpt_adam(which == MLP ? 1e-3 : 1e-2);
    train.scaler.mode = MPT_SCALER_STATIC;
    train.scaler.init_scale = train.scaler.min_scale = (float)ldexp(1, log2_scale);
    train.scaler.patience = 1 << 30; /* steps that overflow are skipped without end */
    course_need(c, mpt_model_build(net, &train) == MPT_OK, mpt_why(ctx));
    return net;
}

/* Trains it; loss is the mean over the last 50 steps. A lens looks on from the half of the training to its end. */
static double learn(const course *c, mpt_context *ctx, const course_digits *d, int which, mpt_model *net, uint64_t seed,
                    lens_view *lens) {
    static float x[(size_t)LARGEST_BATCH * PIXELS];
    static int32_t y[LARGEST_BATCH];
    double loss = 0;
    for (int step = 0; step < steps[which]; step++) {
        if (lens && step == steps[which] / 2) course_need(c, lens_watch(lens, net) == MPT_OK, mpt_why(ctx));
        course_batch(d, seed, (uint64_t)step, batches[which], x, y);
        course_need(c, mpt_train_step(net, x, which == MLP ? (const void *)y : x) == MPT_OK, mpt_why(ctx));
        if (step >= steps[which] - 50) loss += mpt_loss(net) / 50;
    }
    return loss;
}

/* The histograms of a net's gradients in fp32: a row, and a block for the figure. Returns the share of gradients of
   activations that fp16 does not hold with all its bits at S = 1. */
static double look(course *c, mpt_context *ctx, const course_digits *d, int which) {
    static const lens_role roles[] = {LENS_ACTIVATION_GRADIENT, LENS_WEIGHT_GRADIENT};
    lens_view *lens = lens_open(ctx);
    mpt_model *net = build(c, ctx, which, mpt_policy_preset(MPT_O0, MPT_F32), 0, 1);
    double first = 0;
    course_need(c, lens != NULL, mpt_why(ctx));
    learn(c, ctx, d, which, net, 1, lens);
    for (int r = 0; r < 2; r++) {
        mpt_histogram h;
        course_need(c, lens_histogram(lens, 0, roles[r], &h) == MPT_OK, mpt_why(ctx));
        const int advised = lens_histogram_scale(&h, MPT_F16, LENS_HEADROOM);
        const lens_fit bare = lens_histogram_fit(&h, MPT_F16, 0), saved = lens_histogram_fit(&h, MPT_F16, advised);
        double count = 0;
        for (int e = 0; e < 256; e++) count += (double)h.exponent[e];
        printf("%-12s%-13s%9.1f %%%12.1f %%%12.1f %%%9s2^%-6d%8.2f %%%12.2f %%\n", names[which],
               r ? "weights" : "activations", 100 * (double)h.zero / (count + (double)h.zero), 100 * bare.flushed,
               100 * bare.subnormal, "", advised, 100 * saved.flushed, 100 * saved.subnormal);
        course_data(c, "# %s, gradients of %s: exponent, percent of the values other than 0\n", names[which],
                    r ? "weights" : "activations");
        for (int e = -60; e < 10; e++) course_data(c, "%d %.4f\n", e, 100 * (double)h.exponent[e + 127] / count);
        course_data(c, "\n\n");
        course_claim(c, saved.flushed <= bare.flushed && saved.overflowed == 0,
                     "the advised scale saves, none overflows");
        if (r == 0) {
            first = bare.flushed + bare.subnormal;
            course_claim(c, saved.flushed < 0.05, "the advised scale saves all but a few gradients");
        }
    }
    mpt_model_free(net);
    lens_close(lens);
    return first;
}

/* Mean of the final loss over the seeds. */
static double mean_loss(const course *c, mpt_context *ctx, const course_digits *d, int which, mpt_policy policy,
                        int log2_scale) {
    double mean = 0;
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        mpt_model *net = build(c, ctx, which, policy, log2_scale, seed);
        mean += learn(c, ctx, d, which, net, seed, NULL) / (double)SEEDS;
        mpt_model_free(net);
    }
    return mean;
}

int main(int argc, char **argv) {
    course c = course_begin(argc, argv, "03_vanishing_gradients", NULL, 0);
    mpt_context_desc one = MPT_ZERO;
    one.threads = 1; /* more do not pay for nets this small */
    mpt_context *ctx = mpt_open(&one);
    course_need(&c, ctx != NULL, "no memory");
    course_digits *d = course_digits_read(&c);
    double coarse[NETS], fp32[NETS], loss[NETS][SCALES];
    printf("%-12s%-13s%11s%28s%33s\n%-12s%-13s%11s%14s%14s%11s%18s%14s\n", "gradients", "of", "zero", "fp16, S = 1",
           "fp16, advised scale", "", "", "in fp32", "flushed", "subnormal", "S", "flushed", "subnormal");
    for (int i = 0; i < NETS; i++) coarse[i] = look(&c, ctx, d, i);
    printf("\nLoss at the end, mean of %d seeds\n%12s%12s%14s\n%12s", SEEDS, "", names[0], names[1], "fp32");
    for (int i = 0; i < NETS; i++) fp32[i] = mean_loss(&c, ctx, d, i, mpt_policy_preset(MPT_O0, MPT_F32), 0);
    printf("%12.4f%14.5f\n", fp32[0], fp32[1]);
    course_data(&c, "# log2 of S, loss of the MLP and of the autoencoder in fp16, each divided by fp32's\n");
    for (int s = 0; s < SCALES; s++) {
        const int log2_scale = FROM + s * EVERY;
        for (int i = 0; i < NETS; i++)
            loss[i][s] = mean_loss(&c, ctx, d, i, mpt_policy_preset(MPT_O2, MPT_F16), log2_scale);
        printf("%7s 2^%-3d%12.4f%14.5f\n", "fp16", log2_scale, loss[0][s], loss[1][s]);
        course_data(&c, "%d %.4f %.4f\n", log2_scale, loss[0][s] / fp32[0], loss[1][s] / fp32[1]);
    }
    const int at_one = -FROM / EVERY, large = at_one + 8 / EVERY;
    course_claim(&c, coarse[AUTOENCODER] > 0.9 && coarse[MLP] < 0.6, "at S = 1 nearly all of them lose bits");
    course_claim(&c, fabs(loss[MLP][at_one] / fp32[MLP] - 1) < 0.1, "the MLP needs no scale");
    course_claim(&c, loss[AUTOENCODER][at_one] > 1.2 * fp32[AUTOENCODER], "the autoencoder needs one");
    course_claim(&c, fabs(loss[AUTOENCODER][large] / fp32[AUTOENCODER] - 1) < 0.1, "with 2^8 it learns as in fp32");
    course_claim(&c, loss[MLP][0] > 1.2 * fp32[MLP] && loss[MLP][SCALES - 1] > 1.2 * fp32[MLP], "the window has ends");
    free(d);
    mpt_close(ctx);
    return course_end(&c);
}
