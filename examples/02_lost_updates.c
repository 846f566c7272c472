/* 02_lost_updates.c - why does a 16-bit weight stop moving, and what helps?

       cc -O2 examples/02_lost_updates.c -o lost_updates -lm && ./lost_updates

   You will see: 1 + 2^-11 is 1 in fp16, so a weight of 1 that should grow by that much per step does not move. An
   fp32 master, a compensation (Kahan), or the 16 bits below a bf16 (split) each keep what rounding cuts off;
   stochastic rounding loses it only some of the time, and is right on average. Then a net learns digits in small
   steps: with masters as well as in fp32, without them less well, and worst in bf16. Takes about 15 s.              */

#define MPT_IMPLEMENTATION
#include "../mpt.h"
#include "course.h"

enum { WEIGHTS = 1024, UPDATES = 1024, BATCH = 32, STEPS = 3000, SEEDS = 3 };

typedef struct way {
    const char *name;
    mpt_master master;
    mpt_dtype type;
    int bytes; /* a weight, the copy included */
} way;

enum { FP32, F16_NONE, BF16_NONE, F16_MASTERS, BF16_MASTERS, F16_KAHAN, BF16_KAHAN, BF16_SPLIT, F16_STOCHASTIC };
static const way ways[] = {
    {"fp32", MPT_MASTER_F32, MPT_F32, 4},
    {"fp16, nothing else", MPT_MASTER_NONE, MPT_F16, 2},
    {"bf16, nothing else", MPT_MASTER_NONE, MPT_BF16, 2},
    {"fp16 + fp32 masters", MPT_MASTER_F32, MPT_F16, 6},
    {"bf16 + fp32 masters", MPT_MASTER_F32, MPT_BF16, 6},
    {"fp16 + Kahan", MPT_MASTER_KAHAN, MPT_F16, 4},
    {"bf16 + Kahan", MPT_MASTER_KAHAN, MPT_BF16, 4},
    {"bf16 + split", MPT_MASTER_SPLIT, MPT_BF16, 4},
    {"fp16, stochastic", MPT_MASTER_STOCHASTIC, MPT_F16, 2},
    {"bf16, stochastic", MPT_MASTER_STOCHASTIC, MPT_BF16, 2},
};
enum { WAYS = sizeof ways / sizeof *ways };

/* 1024 weights of 1, each to grow by 2^-11 in each of 1024 steps: to 1.5. Mean and deviation of what the products would
   read. The path of weight 0 goes to the figure. */
static void climb(course *c, mpt_context *ctx, const way *w, double *mean, double *deviation) {
    static float ones[WEIGHTS], values[WEIGHTS];
    const mpt_optimizer_desc sgd = mpt_sgd(ldexp(1, -11), 0);
    mpt_params_desc desc = MPT_ZERO;
    mpt_scaler_desc off = MPT_ZERO;
    desc.type = w->type;
    desc.master = w->master;
    off.mode = MPT_SCALER_OFF;
    mpt_params *params = mpt_params_new(ctx, &desc);
    const int id = mpt_params_add(params, "w", WEIGHTS, MPT_GROUP_WEIGHT);
    for (int i = 0; i < WEIGHTS; i++) ones[i] = 1;
    course_need(c, mpt_params_build(params) == MPT_OK && mpt_params_set(params, id, ones) == MPT_OK, mpt_why(ctx));
    mpt_scaler *scaler = mpt_scaler_new(ctx, &off);
    mpt_optimizer *opt = mpt_optimizer_new(params, scaler, &sgd);
    course_need(c, opt != NULL, mpt_why(ctx));
    course_data(c, "# %s: step, weight\n", w->name);
    for (int step = 1; step <= UPDATES; step++) {
        for (int i = 0; i < WEIGHTS; i++) mpt_params_grad(params, id)[i] = -1;
        course_need(c, mpt_step(opt) == MPT_OK && mpt_scaler_update(scaler) == MPT_OK, mpt_why(ctx));
        mpt_cast(ctx, WEIGHTS, mpt_params_weight(params, id), mpt_f32_array(values), NULL);
        if (step % 8 == 0) course_data(c, "%d %.6f\n", step, (double)values[0]);
    }
    course_data(c, "\n\n");
    *mean = *deviation = 0;
    for (int i = 0; i < WEIGHTS; i++) *mean += (double)values[i] / (double)WEIGHTS;
    for (int i = 0; i < WEIGHTS; i++)
        *deviation += ((double)values[i] - *mean) * ((double)values[i] - *mean) / (double)WEIGHTS;
    *deviation = sqrt(*deviation);
    mpt_optimizer_free(opt);
    mpt_scaler_free(scaler);
    mpt_params_free(params);
}

/* An MLP on the digits with Adam at a small lr: its test accuracy, and in *lost the share of updates that 16 bits alone
   would not see. */
static double learn(course *c, mpt_context *ctx, const course_digits *d, const way *w, uint64_t seed, double *lost) {
    static float x[(size_t)BATCH * PIXELS];
    static int32_t y[BATCH];
    mpt_policy policy = mpt_policy_preset(w->type == MPT_F32 ? MPT_O0 : MPT_O2, w->type);
    mpt_train_desc train = MPT_ZERO;
    mpt_optimizer_state state;
    mpt_metrics test;
    double moved = 1e-9;
    policy.master = w->master;
    mpt_model *net = mpt_model_new(ctx, policy);
    int h = mpt_relu(net, mpt_linear(net, mpt_input(net, SIDE, SIDE, 1), 64, NULL));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
    train.batch = BATCH;
    train.seed = seed;
    train.optimizer = mpt_adam(c->number);
    train.optimizer.meter = 1;
    course_need(c, mpt_model_build(net, &train) == MPT_OK, mpt_why(ctx));
    *lost = 0;
    for (uint64_t step = 0; step < STEPS; step++) {
        course_batch(d, seed, step, BATCH, x, y);
        course_need(c, mpt_train_step(net, x, y) == MPT_OK, mpt_why(ctx));
        if (step % 100) continue;
        course_need(c, mpt_optimizer_get_state(mpt_model_optimizer(net), &state) == MPT_OK, mpt_why(ctx));
        *lost += (double)state.lost;
        moved += (double)state.moved;
    }
    *lost /= moved;
    course_need(c, mpt_evaluate(net, d->x[TRAINING], d->y + TRAINING, TEST, &test) == MPT_OK, mpt_why(ctx));
    mpt_model_free(net);
    return test.accuracy;
}

int main(int argc, char **argv) {
    course c = course_begin(argc, argv, "02_lost_updates", "lr", 3e-5);
    mpt_context_desc one = MPT_ZERO;
    one.threads = 1; /* more do not pay for nets this small */
    mpt_context *ctx = mpt_open(&one);
    course_digits *d = course_digits_read(&c);
    double mean[WAYS], deviation[WAYS], accuracy[WAYS], low, high, lost;
    course_need(&c, ctx != NULL, "no memory");
    course_need(&c, c.number > 0, "--lr is above 0");
    printf("%30s%24s%29s%g:\n%-21s%9s%12s%12s%12s%22s\n", "bytes a", "1, after 1024 updates", "digits, Adam with lr ",
           c.number, "", "weight", "of 2^-11", "deviation", "lost", "right in 3 seeds");
    for (int w = 0; w < WAYS; w++) {
        climb(&c, ctx, &ways[w], &mean[w], &deviation[w]);
        accuracy[w] = high = 0;
        low = 1;
        for (uint64_t seed = 1; seed <= SEEDS; seed++) {
            const double a = learn(&c, ctx, d, &ways[w], seed, &lost);
            accuracy[w] += a / (double)SEEDS;
            low = a < low ? a : low;
            high = a > high ? a : high;
        }
        printf("%-21s%9d%12.4f%12.4f", ways[w].name, ways[w].bytes, mean[w], deviation[w]);
        w == FP32 ? printf("%12s", "") : printf("%10.0f %%", 100 * lost);
        printf("%8.1f %% (%.1f-%.1f)\n", 100 * accuracy[w], 100 * low, 100 * high);
    }
    course_data(&c, "# way, test accuracy in percent\n");
    for (int w = 0; w < WAYS; w++) course_data(&c, "\"%s\" %.2f\n", ways[w].name, 100 * accuracy[w]);
    for (int w = 0; w < WAYS; w++) {
        if (w == F16_NONE || w == BF16_NONE) course_claim(&c, mean[w] == 1, "16 bits alone never leave 1");
        else if (w < F16_STOCHASTIC) course_claim(&c, mean[w] == 1.5, "what rounding cuts off is kept");
        else course_claim(&c, fabs(mean[w] - 1.5) < 5 * deviation[w] / sqrt((double)WEIGHTS), "right on average");
        if (w != F16_NONE && w != BF16_NONE) /* one digit is 0.28 points */
            course_claim(&c, fabs(accuracy[w] - accuracy[FP32]) < 0.015, "with a remedy as good as fp32");
    }
    course_claim(&c, accuracy[BF16_NONE] < accuracy[FP32] - 0.1, "bf16 alone learns much less");
    course_claim(&c, accuracy[F16_NONE] < accuracy[F16_MASTERS], "fp16 alone learns less");
    free(d);
    mpt_close(ctx);
    return course_end(&c);
}
