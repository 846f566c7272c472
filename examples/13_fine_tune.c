/* 13_fine_tune.c - what is a trained net worth when the next task has few samples?

       cc -O2 examples/13_fine_tune.c -o fine_tune -lm && ./fine_tune

   A CNN learns the digits in fp16. Its weights are loaded by name into a net for digits of another scanner, which
   places them a pixel further right; only 5 of each have a label. That net has its own head: the program prints what
   was loaded and what was not. The body is frozen, the head learns. You will see: it gets more digits right than a net
   that learns everything from the same samples, with less than half of the bytes that training adds. At the end, a net
   that only predicts loads the result.    Takes about 2 s.                                                          */

#define MPT_IMPLEMENTATION
#include "../mpt.h"
#include "course.h"

enum { BATCH = 25, SEEDS = 5, BODY_STEPS = 1000, STEPS = 200 };

typedef struct kind {
    const char *head; /* its name */
    int frozen;       /* 1: the body is */
    int inference;    /* 1: for predictions alone */
} kind;

static mpt_model *new_net(const course *c, mpt_context *ctx, kind k, uint64_t seed) {
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    mpt_train_desc train = MPT_ZERO;
    mpt_conv2d_desc conv = MPT_ZERO;
    mpt_linear_desc head = MPT_ZERO;
    int h = mpt_input(net, SIDE, SIDE, 1);
    conv.padding = 1;
    conv.tuning.frozen = k.frozen;
    head.name = k.head;
    h = mpt_max_pool2d(net, mpt_relu(net, mpt_conv2d(net, h, 16, 3, &conv)), 2, NULL);
    h = mpt_max_pool2d(net, mpt_relu(net, mpt_conv2d(net, h, 32, 3, &conv)), 2, NULL);
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, &head), NULL);
    train.batch = BATCH;
    train.seed = seed;
    train.optimizer = mpt_adam(3e-3);
    train.inference = k.inference;
    course_need(c, mpt_model_build(net, &train) == MPT_OK, mpt_why(ctx));
    return net;
}

/* Steps on batches drawn from the first n of `from`, a list of samples. */
static void learn(const course *c, mpt_model *net, const course_digits *d, const int *from, int n, int steps,
                  uint64_t seed) {
    static float x[(int)BATCH * (int)PIXELS];
    static int32_t y[BATCH];
    for (int step = 0; step < steps; step++) {
        for (int i = 0; i < BATCH; i++) {
            const int k = from[(int)(mpt_uniform(seed, (uint64_t)step, 0, (uint64_t)i) * (float)n)];
            memcpy(x + i * PIXELS, d->x[k], sizeof d->x[k]);
            y[i] = d->y[k];
        }
        course_need(c, mpt_train_step(net, x, y) == MPT_OK, mpt_why(mpt_model_context(net)));
    }
}

static double right(const course *c, mpt_model *net, const course_digits *d) {
    mpt_metrics m;
    course_need(c, mpt_evaluate(net, d->x[TRAINING], d->y + TRAINING, TEST, &m) == MPT_OK,
                mpt_why(mpt_model_context(net)));
    return m.accuracy;
}

/* mpt_weights_save writes the same to a path. To be freed. */
static void *save(const course *c, mpt_model *net, size_t *size) {
    void *file = NULL;
    if (mpt_weights_save_memory(net, NULL, 0, size, MPT_F32) == MPT_OK) file = malloc(*size);
    course_need(c, file && mpt_weights_save_memory(net, file, *size, size, MPT_F32) == MPT_OK, "weights not saved");
    return file;
}

/* All of them but workspace and bookkeeping. *training: those that only training needs. */
static size_t bytes(mpt_model *net, size_t *training) {
    const mpt_memory m = mpt_model_memory(net);
    *training = m.masters + m.gradients + m.moments;
    return *training + m.weights + m.activations;
}

static void tell(const char *name, mpt_load_outcome outcome, void *told) {
    static const char *const texts[] = {"loaded", "not in the file: stays as it is", "does not fit", "left over"};
    printf("  %-16s%s\n", name, texts[outcome]);
    ((int *)told)[outcome]++;
}

int main(int argc, char **argv) {
    course c = course_begin(argc, argv, "13_fine_tune", "samples", 5);
    static const char *const names[] = {"from nothing", "head alone"};
    const kind kinds[] = {{"new_head", 0, 0}, {"new_head", 1, 0}, {"new_head", 0, 1}, {"head", 0, 0}};
    int list[DIGITS], told[4] = {0, 0, 0, 0};
    double mean[2] = {0, 0}, last = 0;
    size_t all[3], training[3], size;
    mpt_context *ctx = mpt_open(NULL);
    course_need(&c, ctx != NULL, "no memory");
    course_digits *plain = course_digits_read(&c), *shifted = course_digits_read(&c);
    for (int i = 0; i < DIGITS * PIXELS; i++)
        shifted->x[i / PIXELS][i % PIXELS] = i % SIDE ? plain->x[i / PIXELS][i % PIXELS - 1] : 0;
    for (int i = 0; i < TRAINING; i++) list[i] = i;
    mpt_model *net = new_net(&c, ctx, kinds[3], 1);
    learn(&c, net, plain, list, TRAINING, BODY_STEPS, 1);
    printf("first scanner: %.2f %% right; the same net on the second: %.2f %%\n", 100 * right(&c, net, plain),
           100 * right(&c, net, shifted));
    void *file = save(&c, net, &size), *tuned = NULL;
    mpt_model_free(net);
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        int n = 0, has[CLASSES] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
        for (int i = (int)seed * 200; i < TRAINING; i++) /* other samples for each seed */
            if (has[shifted->y[i]]++ < (int)c.number) list[n++] = i;
        course_need(&c, n > 0, "--samples is at least 1");
        for (int w = 0; w < 2; w++) {
            mpt_load_desc load = MPT_ZERO;
            load.partly = 1;
            load.tell = seed == 1 ? tell : NULL;
            load.user = told;
            net = new_net(&c, ctx, kinds[w], seed);
            if (w) course_need(&c, mpt_weights_load_memory(net, file, size, &load) == MPT_OK, mpt_why(ctx));
            learn(&c, net, shifted, list, n, STEPS, seed);
            last = right(&c, net, shifted);
            mean[w] += last / (double)SEEDS;
            all[w] = bytes(net, &training[w]);
            if (w && seed == SEEDS) tuned = save(&c, net, &size);
            mpt_model_free(net);
        }
    }
    net = new_net(&c, ctx, kinds[2], 1);
    course_need(&c, mpt_weights_load_memory(net, tuned, size, NULL) == MPT_OK, mpt_why(ctx));
    all[2] = bytes(net, &training[2]);
    course_claim(&c, fabs(right(&c, net, shifted) - last) < 0.5 / (double)TEST, "the inference net predicts the same");
    mpt_model_free(net);
    printf("%-14s%18s%18s%10s\n", "", "right, 5 seeds", "for training", "all bytes");
    for (int w = 0; w < 2; w++) {
        printf("%-14s%16.2f %%%18zu%10zu\n", names[w], 100 * mean[w], training[w], all[w]);
        course_data(&c, "\"%s\" %.3f\n", names[w], 100 * mean[w]);
    }
    printf("%-14s%16.2f %%%18zu%10zu\n", "its inference", 100 * last, training[2], all[2]);
    course_claim(&c, told[MPT_LOADED] == 4 && told[MPT_LOAD_MISSING] == 2 && told[MPT_LOAD_LEFT_OVER] == 2,
                 "the body is loaded, the head is not");
    course_claim(&c, mean[1] > mean[0] + 0.03, "a trained body is worth more than 3 % of the digits");
    course_claim(&c, training[1] * 2 < training[0] && training[2] == 0, "frozen layers have nothing for training");
    course_claim(&c, all[2] * 2 < all[0], "inference takes less than half of the bytes");
    free(file);
    free(tuned);
    free(plain);
    free(shifted);
    mpt_close(ctx);
    return course_end(&c);
}
