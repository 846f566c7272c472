/* 05_loss_scaler.c - who chooses the loss scale, and what does a wrong one cost?

       cc -O2 examples/05_loss_scaler.c -o loss_scaler -lm && ./loss_scaler

   You will see an MLP learn digits in fp16 while its scale starts far too large, at 2^28: gradients overflow, the
   step is skipped and the scale halved, until they fit. After 200 good steps twice the scale is tried; if that is too
   much, one step is lost and the scale goes back. So it stays as large as the gradients allow, at the cost of one
   step in 200 (by default in 2000). A skipped step changes no weight, which is checked bit by bit. The journal shows
   which tensor overflowed first.                                                                                    */

#define MPT_IMPLEMENTATION
#include "../mpt.h"
#include "course.h"

enum { BATCH = 32, STEPS = 3000, INTERVAL = 200, FIRST_LOG2 = 28 };

static mpt_model *build(const course *c, mpt_context *ctx) {
    mpt_train_desc train = MPT_ZERO;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    int h = mpt_relu(net, mpt_linear(net, mpt_input(net, SIDE, SIDE, 1), 64, NULL));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
    train.batch = BATCH;
    train.seed = 1;
    train.optimizer = mpt_adam(1e-3);
    train.scaler.init_scale = (float)ldexp(1, FIRST_LOG2); /* default: 2^16 */
    train.scaler.growth_interval = INTERVAL;               /* default: 2000; shorter to see more of it */
    train.scaler.no_max = 1;                               /* default: at most 2^24 */
    course_need(c, mpt_model_build(net, &train) == MPT_OK, mpt_why(ctx));
    return net;
}

/* All weights as one number that no change leaves as it is. */
static uint64_t fingerprint(mpt_model *net) {
    mpt_params *params = mpt_model_params(net);
    const float *w = mpt_params_master(params, 0);
    uint64_t sum = 0;
    for (size_t i = 0; i < mpt_params_count(params, 0); i++) {
        uint32_t bits;
        memcpy(&bits, &w[i], sizeof bits);
        sum = sum * 0x9e3779b97f4a7c15u + bits;
    }
    return sum;
}

typedef struct run {
    int skipped, grown, first_good, wrong; /* steps; wrong: those in which the scale did not follow its rule */
    double loss;                           /* mean over the last 100 steps */
} run;

/* A row for each change of the scale in the first steps; every step into the figure. */
static run train_digits(const course *c, mpt_context *ctx, mpt_model *net, const course_digits *d) {
    static float x[(size_t)BATCH * PIXELS];
    static int32_t y[BATCH];
    run r = MPT_ZERO;
    int clean = 0, told = 0;
    printf("%6s  %-28s%8s\n", "step", "", "scale");
    course_data(c, "# step, log2 of the scale, loss, 1 if skipped\n");
    for (int step = 1; step <= STEPS; step++) {
        const uint64_t weights = fingerprint(net), skipped = mpt_steps_skipped(net);
        const float before = mpt_loss_scale(net);
        course_batch(d, 1, (uint64_t)step, BATCH, x, y);
        course_need(c, mpt_train_step(net, x, y) == MPT_OK, mpt_why(ctx));
        const float after = mpt_loss_scale(net);
        const int skip = mpt_steps_skipped(net) != skipped;
        clean = skip ? 0 : clean + 1;
        if (skip) r.wrong += after != before / 2 || fingerprint(net) != weights;
        else r.wrong += after != (clean == INTERVAL ? 2 * before : before) || fingerprint(net) == weights;
        if (!skip && !r.first_good) r.first_good = step;
        if (after != before && told++ < 16)
            printf("%6d  %-28s%5s2^%.0f\n", step, skip ? "overflow: skipped, halved" : "200 good steps: doubled", "",
                   log2((double)after));
        r.skipped += skip;
        r.grown += clean == INTERVAL;
        if (clean == INTERVAL) clean = 0;
        if (step > STEPS - 100) r.loss += mpt_loss(net) / 100;
        course_data(c, "%d %.0f %.6f %d\n", step, log2((double)before), mpt_loss(net), skip);
    }
    return r;
}

/* The last of the skipped steps, as the optimizer wrote them down. */
static void print_journal(const course *c, mpt_model *net) {
    mpt_optimizer_state state;
    course_need(c, mpt_optimizer_get_state(mpt_model_optimizer(net), &state) == MPT_OK, "no state");
    puts("\nThe journal, last entries: attempt, scale, first tensor that was not finite, how many inf and NaN");
    for (uint64_t i = state.skipped > 4 ? state.skipped - 4 : 0; i < state.skipped; i++) {
        const mpt_skip *s = &state.journal[i % MPT_JOURNAL];
        printf("%6d  2^%-4.0f %-16s%5d inf %5d NaN\n", (int)s->step, log2((double)s->scale),
               mpt_params_name(mpt_model_params(net), s->tensor), (int)s->inf, (int)s->nan);
    }
}

int main(int argc, char **argv) {
    course c = course_begin(argc, argv, "05_loss_scaler", NULL, 0);
    mpt_context *ctx = mpt_open(NULL);
    course_need(&c, ctx != NULL, "no memory");
    course_digits *d = course_digits_read(&c);
    mpt_model *net = build(&c, ctx);
    mpt_metrics test;
    const run r = train_digits(&c, ctx, net, d);
    print_journal(&c, net);
    course_need(&c, mpt_evaluate(net, d->x[TRAINING], d->y + TRAINING, TEST, &test) == MPT_OK, mpt_why(ctx));
    printf("\n%d steps: %d skipped, of them %d before the first good one; %d times doubled; loss %.4f; %.2f %% of the "
           "test digits are right\n",
           STEPS, r.skipped, r.first_good - 1, r.grown, r.loss, 100 * test.accuracy);
    course_claim(&c, r.wrong == 0,
                 "each step halves, doubles or keeps the scale by the rule; skipped ones change nothing");
    course_claim(&c, r.first_good - 1 >= 3, "at 2^28 the first steps overflow");
    course_claim(&c, r.skipped - (r.first_good - 1) >= 1, "later a larger scale is tried, and some are too large");
    course_claim(&c, (r.skipped - (r.first_good - 1)) * INTERVAL <= STEPS, "at most one step of 200 is lost to that");
    course_claim(&c, test.accuracy > 0.93, "the digits are learnt all the same");
    mpt_model_free(net);
    free(d);
    mpt_close(ctx);
    return course_end(&c);
}
