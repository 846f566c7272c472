/* ranks.h - several ranks make the same step as one, to the bit: threads of one process stand for the ranks, which an
   engine joins that the file which includes this has. */
#ifndef MPT_TEST_RANKS_H
#define MPT_TEST_RANKS_H
#include <float.h>
#include <math.h>
#include <pthread.h>

enum { MOST = 4, BATCH = 4, SIDE = 6, CHANNELS = 2, PIXELS = SIDE * SIDE * CHANNELS, CLASSES = 3, STEPS = 4 };

typedef struct problem {
    float x[STEPS * MOST * BATCH * PIXELS];
    int32_t label[STEPS * MOST * BATCH];
    float weight[STEPS * MOST * BATCH]; /* of samples: for the perceptron */
} problem;

typedef struct rank {
    seat at;                            /* in the engine */
    int number, ranks, accumulate, net; /* net 0: perceptron, 1: convolutions, 2: batch norm of the input */
    mpt_policy policy;
    uint64_t seed;
    int other; /* what this rank builds otherwise: see live */
    int bad;   /* step in which this rank has a bad label; -1: none */
    int large; /* step in which it has an input that is an inf in 16 bits; -1: none */
    const problem *p;
    int local; /* see mpt_ranks */
    /* what it comes to */
    mpt_result built, step[STEPS];
    char why[256];
    float *weights;
    size_t count;
    double loss;
    float scale;
    uint64_t applied, skipped;
    mpt_optimizer_state state;
    float running[2 * CHANNELS]; /* net 2 */
} rank;

/* -- What the engine does -- */

static void engine_begin(engine *e, int ranks);
static void engine_end(engine *e);
static mpt_context *rank_open(rank *me);
static void rank_close(rank *me, mpt_context *ctx);
static mpt_result rank_join(rank *me, mpt_context *ctx, mpt_ranks *out);
static void rank_leave(rank *me);

/* -- A rank -- */

static int layers(mpt_model *net, int kind) {
    int h = mpt_input(net, SIDE, SIDE, CHANNELS);
    if (kind == 0) {
        h = mpt_dropout(net, mpt_gelu(net, mpt_linear(net, h, 37, NULL)), 0.25f);
        return mpt_linear(net, h, CLASSES, NULL);
    }
    if (kind == 2) return mpt_linear(net, mpt_batch_norm(net, h, NULL), CLASSES, NULL);
    h = mpt_relu(net, mpt_batch_norm(net, test_same(net, h, 8, 3), NULL));
    h = mpt_dropout(net, mpt_max_pool2d(net, h, 2, NULL), 0.1f);
    h = mpt_add(net, h, mpt_relu(net, test_same(net, h, 8, 3)));
    return mpt_linear(net, mpt_global_avg_pool2d(net, h), CLASSES, NULL);
}

static void *live(void *user) {
    static const float class_weights[CLASSES] = {1, 0.3f, 2.7f};
    rank *me = (rank *)user;
    const size_t mine = (size_t)me->accumulate * BATCH, all = (size_t)me->ranks * mine;
    mpt_train_desc train = MPT_ZERO;
    mpt_loss_desc loss = MPT_ZERO;
    mpt_context *ctx;
    mpt_model *net;
    int step;
    ctx = rank_open(me);
    net = mpt_model_new(ctx, me->policy);
    loss.class_weights = class_weights;
    loss.ignore = 1;
    loss.ignore_index = -100;
    loss.weighted = me->net == 0;
    if (me->other == 4) loss.label_smoothing = 0.1f;
    mpt_softmax_cross_entropy(net, layers(net, me->net), &loss);
    train.batch = BATCH;
    train.accumulate = me->accumulate;
    train.optimizer = mpt_adam(0.01);
    train.clip_norm = 1;
    train.seed = me->seed;
    if (me->other == 1) train.seed = 12;
    if (me->other == 2) train.ema_decay = 0.9;
    if (me->other == 3) train.scaler.growth_interval = 7;
    if (me->ranks > 1) CHECK_OK(ctx, rank_join(me, ctx, &train.ranks));
    train.ranks.local_statistics = me->local;
    me->built = mpt_model_build(net, &train);
    for (step = 0; step < STEPS && me->built == MPT_OK; step++) {
        const size_t first = (size_t)step * all + (size_t)me->number * mine;
        int32_t label[MOST * BATCH];
        float x[MOST * BATCH * PIXELS];
        memcpy(label, me->p->label + first, mine * sizeof *label);
        memcpy(x, me->p->x + first * PIXELS, mine * PIXELS * sizeof *x);
        if (step == me->bad) label[1] = 99;
        if (loss.weighted) mpt_sample_weights(net, me->p->weight + first);
        if (step == me->large) x[PIXELS + 1] = 3e38f;
        me->step[step] = mpt_train_step(net, x, label);
        if (step == me->bad) snprintf(me->why, sizeof me->why, "%s", mpt_why(ctx));
    }
    if (me->built == MPT_OK) {
        me->count = mpt_params_count(mpt_model_params(net), 0);
        me->weights = (float *)malloc(me->count * sizeof *me->weights);
        if (me->weights) mpt_params_get(mpt_model_params(net), 0, me->weights);
        me->loss = mpt_loss(net);
        if (me->net == 2) CHECK_OK(ctx, mpt_download(ctx, me->running, mpt_model_running(net, 2), sizeof me->running));
        me->scale = mpt_loss_scale(net);
        me->applied = mpt_steps_applied(net);
        me->skipped = mpt_steps_skipped(net);
        mpt_optimizer_get_state(mpt_model_optimizer(net), &me->state);
    } else {
        snprintf(me->why, sizeof me->why, "%s", mpt_why(ctx));
    }
    mpt_model_free(net);
    if (me->ranks > 1) rank_leave(me);
    rank_close(me, ctx);
    return NULL;
}

/* All ranks of a model at once; `of` has what they are told, all alike. */
static void run(rank *of, const rank *like, int ranks, int accumulate) {
    engine e;
    pthread_t thread[MOST];
    int r;
    engine_begin(&e, ranks);
    for (r = 0; r < ranks; r++) {
        const int bad = of[r].bad, large = of[r].large;
        const int other = of[r].other;
        of[r] = *like;
        of[r].bad = bad;
        of[r].large = large;
        of[r].other = other;
        of[r].at.e = &e;
        of[r].number = r;
        of[r].ranks = ranks;
        of[r].accumulate = accumulate;
        CHECK(pthread_create(&thread[r], NULL, live, &of[r]) == 0);
    }
    for (r = 0; r < ranks; r++) pthread_join(thread[r], NULL);
    engine_end(&e);
}

static void reset(rank *of, int ranks) {
    int r;
    for (r = 0; r < ranks; r++) {
        memset(&of[r], 0, sizeof of[r]);
        of[r].bad = of[r].large = -1;
    }
}

static void clear_ranks(rank *of, int ranks) {
    int r;
    for (r = 0; r < ranks; r++) free(of[r].weights);
    reset(of, ranks);
}

static problem *problem_new(void) {
    problem *p = (problem *)test_memory(sizeof *p);
    size_t i;
    test_floats(p->x, sizeof p->x / sizeof *p->x, -1, 1, 1);
    test_floats(p->weight, sizeof p->weight / sizeof *p->weight, 0, 2, 3);
    for (i = 0; i < sizeof p->label / sizeof *p->label; i++) {
        p->label[i] = (int32_t)(mpt_hash(2, 0, 0, i) % (CLASSES + 1));
        if (p->label[i] == CLASSES) p->label[i] = -100;
    }
    return p;
}

/* What all ranks of a test are told alike. */
static rank like_of(int net, mpt_policy policy, const problem *p) {
    rank like;
    memset(&like, 0, sizeof like);
    like.net = net;
    like.policy = policy;
    like.seed = 11;
    like.bad = like.large = -1;
    like.p = p;
    return like;
}

/* -- Tests -- */

/* 1 x 4, 2 x 2 and 4 x 1, and 1 x 3 and 3 x 1: the same weights on every rank. */
static void test_same_bits(int net, mpt_policy policy, int passes) {
    problem *p = problem_new();
    const rank like = like_of(net, policy, p);
    rank one[MOST], some[MOST];
    int ranks, r, step;
    reset(one, MOST);
    reset(some, MOST);
    run(one, &like, 1, passes);
    CHECK(one[0].built == MPT_OK);
    CHECK_EQUAL((double)one[0].applied, STEPS);
    for (ranks = 2; ranks <= passes; ranks++) {
        if (passes % ranks || (passes / ranks & (passes / ranks - 1))) continue; /* subtrees are powers of two */
        run(some, &like, ranks, passes / ranks);
        for (r = 0; r < ranks; r++) {
            CHECK(some[r].built == MPT_OK);
            for (step = 0; step < STEPS; step++) CHECK(some[r].step[step] == MPT_OK);
            CHECK(some[r].count == one[0].count);
            if (!CHECK(memcmp(some[r].weights, one[0].weights, one[0].count * sizeof(float)) == 0))
                printf("    rank %d of %d, net %d\n", r, ranks, net);
            CHECK_NEAR(some[r].loss, one[0].loss, 1e-12 * one[0].loss);
            CHECK_EQUAL(some[r].state.grad_norm, one[0].state.grad_norm);
        }
        clear_ranks(some, MOST);
    }
    clear_ranks(one, MOST);
    free(p);
}

/* A rank with a bad label returns its reason; all skip that step, and go on together. */
static void test_bad_label(int ranks) {
    problem *p = problem_new();
    const rank like = like_of(1, mpt_policy_preset(MPT_O2, MPT_F16), p);
    rank some[MOST];
    int r;
    reset(some, MOST);
    some[1].bad = 2;
    run(some, &like, ranks, 1);
    for (r = 0; r < ranks; r++) {
        CHECK(some[r].step[2] == (r == 1 ? MPT_ERROR_VALUE : MPT_OK));
        CHECK(some[r].step[3] == MPT_OK);
        CHECK_EQUAL((double)some[r].applied, STEPS - 1);
        CHECK_EQUAL((double)some[r].skipped, 1);
        CHECK(memcmp(some[r].weights, some[0].weights, some[0].count * sizeof(float)) == 0);
    }
    CHECK(strstr(some[1].why, "label 99") != NULL);
    clear_ranks(some, MOST);
    free(p);
}

/* A rank whose gradient is none makes all of them skip the step, with the same scale then. */
static void test_large_input(int ranks) {
    problem *p = problem_new();
    const rank like = like_of(1, mpt_policy_preset(MPT_O2, MPT_F16), p);
    rank some[MOST];
    int r;
    reset(some, MOST);
    some[ranks - 1].large = 2;
    run(some, &like, ranks, 1);
    for (r = 0; r < ranks; r++) {
        CHECK(some[r].step[2] == MPT_OK && some[r].step[3] == MPT_OK);
        CHECK_EQUAL((double)some[r].applied, STEPS - 1);
        CHECK_EQUAL((double)some[r].skipped, 1);
        CHECK_EQUAL(some[r].scale, some[0].scale);
        CHECK(memcmp(some[r].weights, some[0].weights, some[0].count * sizeof(float)) == 0);
    }
    clear_ranks(some, MOST);
    free(p);
}

/* Adds `share` of the mean and the unbiased variance of each channel in one rank's samples of a step. */
static void add_statistics(const problem *p, size_t batch, double share, double *running) {
    const float *x = p->x + batch * BATCH * PIXELS;
    const size_t count = BATCH * SIDE * SIDE;
    size_t c, i;
    for (c = 0; c < CHANNELS; c++) {
        double mean = 0, squares = 0;
        for (i = 0; i < count; i++) mean += (double)x[i * CHANNELS + c] / (double)count;
        for (i = 0; i < count; i++) squares += pow((double)x[i * CHANNELS + c] - mean, 2);
        running[c] += share * mean;
        running[CHANNELS + c] += share * squares / (double)(count - 1);
    }
}

/* Running statistics: where each rank's have moved, by 0.1 of the way to those of its samples; or the mean of that. */
static void test_running(int ranks, int local) {
    problem *p = problem_new();
    rank like = like_of(2, mpt_policy_preset(MPT_O0, MPT_F16), p), some[MOST];
    int r, step, from, i;
    like.local = local;
    reset(some, MOST);
    run(some, &like, ranks, 1);
    for (r = 0; r < ranks; r++) {
        double running[2 * CHANNELS] = {0};
        for (i = 0; i < CHANNELS; i++) running[CHANNELS + i] = 1;
        for (step = 0; step < STEPS; step++) {
            for (i = 0; i < 2 * CHANNELS; i++) running[i] *= 0.9;
            for (from = local ? r : 0; from < (local ? r + 1 : ranks); from++)
                add_statistics(p, (size_t)(step * ranks + from), local ? 0.1 : 0.1 / ranks, running);
        }
        for (i = 0; i < 2 * CHANNELS; i++) CHECK_NEAR(some[r].running[i], running[i], STEPS * 8 * FLT_EPSILON);
        CHECK(!r || local == (memcmp(some[r].running, some[0].running, sizeof some[r].running) != 0));
    }
    clear_ranks(some, MOST);
    free(p);
}

/* Ranks that are not alike find out when they build. */
static void test_other_models(void) {
    problem *p = problem_new();
    const rank like = like_of(0, mpt_policy_preset(MPT_O0, MPT_F16), p);
    rank some[MOST];
    int r, other;
    for (other = 1; other < 5; other++) {
        reset(some, MOST);
        some[2].other = other;
        run(some, &like, 3, 1);
        for (r = 0; r < 3; r++) {
            CHECK(some[r].built == MPT_ERROR_ARGUMENT);
            CHECK(strstr(some[r].why, "rank 2") != NULL);
        }
        clear_ranks(some, MOST);
    }
    free(p);
}

#endif
