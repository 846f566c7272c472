/* ranks.c - several ranks make the same step as one, to the bit: threads of one process stand for the ranks. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#ifndef MPT_NO_THREADS
#include <pthread.h>

enum { MOST = 4, BATCH = 4, SIDE = 6, CHANNELS = 2, PIXELS = SIDE * SIDE * CHANNELS, CLASSES = 3, STEPS = 4 };

/* -- The engine: every rank brings its array, the last to come adds them up -- */

typedef struct engine {
    pthread_mutex_t lock;
    pthread_cond_t turn;
    int ranks, came, left, broken;
    float *x[MOST];
} engine;

typedef struct seat { /* a rank's place in it */
    engine *e;
    int rank;
} seat;

static float tree(float *const *x, int first, int count, size_t i) {
    int left = 1;
    if (count == 1) return x[first][i];
    while (2 * left < count) left *= 2;
    return tree(x, first, left, i) + tree(x, first + left, count - left, i);
}

static mpt_result add_all(void *user, float *x, size_t n) {
    seat *s = (seat *)user;
    engine *e = s->e;
    size_t i;
    int r;
    pthread_mutex_lock(&e->lock);
    while (e->left) pthread_cond_wait(&e->turn, &e->lock); /* those before are still leaving */
    e->x[s->rank] = x;
    if (++e->came == e->ranks) {
        for (i = 0; i < n; i++) {
            const float sum = tree(e->x, 0, e->ranks, i);
            for (r = 0; r < e->ranks; r++) e->x[r][i] = sum;
        }
        e->came = 0;
        e->left = e->ranks;
        pthread_cond_broadcast(&e->turn);
    } else {
        while (!e->left) pthread_cond_wait(&e->turn, &e->lock);
    }
    if (--e->left == 0) pthread_cond_broadcast(&e->turn);
    r = e->broken;
    pthread_mutex_unlock(&e->lock);
    return r ? MPT_ERROR_DEVICE : MPT_OK;
}

/* -- A rank -- */

typedef struct problem {
    float x[STEPS * MOST * BATCH * PIXELS];
    int32_t label[STEPS * MOST * BATCH];
} problem;

typedef struct rank {
    seat at;
    int ranks, accumulate, net; /* net 0: perceptron, 1: convolutions */
    mpt_policy policy;
    uint64_t seed;
    int bad; /* step in which this rank has a bad label; -1: none */
    const problem *p;
    /* what it comes to */
    mpt_result built, step[STEPS];
    char why[256];
    float *weights;
    size_t count;
    double loss;
    uint64_t applied, skipped;
    mpt_optimizer_state state;
} rank;

static int layers(mpt_model *net, int kind) {
    int h = mpt_input(net, SIDE, SIDE, CHANNELS);
    if (kind == 0) {
        h = mpt_dropout(net, mpt_gelu(net, mpt_linear(net, h, 37, NULL)), 0.25f);
        return mpt_linear(net, h, CLASSES, NULL);
    }
    h = mpt_relu(net, mpt_batch_norm(net, test_same(net, h, 8, 3), NULL));
    h = mpt_dropout(net, mpt_max_pool2d(net, h, 2, NULL), 0.1f);
    h = mpt_add(net, h, mpt_relu(net, test_same(net, h, 8, 3)));
    return mpt_linear(net, mpt_global_avg_pool2d(net, h), CLASSES, NULL);
}

static void *live(void *user) {
    static const float class_weights[CLASSES] = {1, 0.3f, 2.7f};
    rank *me = (rank *)user;
    const size_t mine = (size_t)me->accumulate * BATCH, all = (size_t)me->ranks * mine;
    mpt_context_desc desc = MPT_ZERO;
    mpt_train_desc train = MPT_ZERO;
    mpt_loss_desc loss = MPT_ZERO;
    mpt_context *ctx;
    mpt_model *net;
    int step;
    desc.threads = 1;
    ctx = mpt_open(&desc);
    net = mpt_model_new(ctx, me->policy);
    loss.class_weights = class_weights;
    loss.ignore = 1;
    loss.ignore_index = -100;
    mpt_softmax_cross_entropy(net, layers(net, me->net), &loss);
    train.batch = BATCH;
    train.accumulate = me->accumulate;
    train.optimizer = mpt_adam(0.01);
    train.clip_norm = 1;
    train.seed = me->seed;
    train.ranks.rank = me->at.rank;
    train.ranks.ranks = me->ranks;
    train.ranks.sum = add_all;
    train.ranks.user = &me->at;
    me->built = mpt_model_build(net, &train);
    for (step = 0; step < STEPS && me->built == MPT_OK; step++) {
        const size_t first = (size_t)step * all + (size_t)me->at.rank * mine;
        int32_t label[MOST * BATCH];
        memcpy(label, me->p->label + first, mine * sizeof *label);
        if (step == me->bad) label[1] = 99;
        me->step[step] = mpt_train_step(net, me->p->x + first * PIXELS, label);
        if (step == me->bad) snprintf(me->why, sizeof me->why, "%s", mpt_why(ctx));
    }
    if (me->built == MPT_OK) {
        me->count = mpt_params_count(mpt_model_params(net), 0);
        me->weights = (float *)malloc(me->count * sizeof *me->weights);
        if (me->weights) mpt_params_get(mpt_model_params(net), 0, me->weights);
        me->loss = mpt_loss(net);
        me->applied = mpt_steps_applied(net);
        me->skipped = mpt_steps_skipped(net);
        mpt_optimizer_get_state(mpt_model_optimizer(net), &me->state);
    } else {
        snprintf(me->why, sizeof me->why, "%s", mpt_why(ctx));
    }
    mpt_model_free(net);
    mpt_close(ctx);
    return NULL;
}

/* All ranks of a model at once; `of` has what they are told, all alike. */
static void run(rank *of, const rank *like, int ranks, int accumulate) {
    engine e;
    pthread_t thread[MOST];
    int r;
    memset(&e, 0, sizeof e);
    e.ranks = ranks;
    pthread_mutex_init(&e.lock, NULL);
    pthread_cond_init(&e.turn, NULL);
    for (r = 0; r < ranks; r++) {
        const int bad = of[r].bad;
        const uint64_t seed = of[r].seed;
        of[r] = *like;
        of[r].bad = bad;
        if (seed) of[r].seed = seed;
        of[r].at.e = &e;
        of[r].at.rank = r;
        of[r].ranks = ranks;
        of[r].accumulate = accumulate;
        CHECK(pthread_create(&thread[r], NULL, live, &of[r]) == 0);
    }
    for (r = 0; r < ranks; r++) pthread_join(thread[r], NULL);
    pthread_mutex_destroy(&e.lock);
    pthread_cond_destroy(&e.turn);
}

static void reset(rank *of, int ranks) {
    int r;
    for (r = 0; r < ranks; r++) {
        memset(&of[r], 0, sizeof of[r]);
        of[r].bad = -1;
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
    like.bad = -1;
    like.p = p;
    return like;
}

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
static void test_bad_label(void) {
    problem *p = problem_new();
    const rank like = like_of(1, mpt_policy_preset(MPT_O2, MPT_F16), p);
    rank some[MOST];
    int r;
    reset(some, MOST);
    some[1].bad = 2;
    run(some, &like, 3, 1);
    for (r = 0; r < 3; r++) {
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

/* Ranks that are not alike find out when they build. */
static void test_other_models(void) {
    problem *p = problem_new();
    const rank like = like_of(0, mpt_policy_preset(MPT_O0, MPT_F16), p);
    rank some[MOST];
    int r;
    reset(some, MOST);
    some[2].seed = 12;
    run(some, &like, 3, 1);
    for (r = 0; r < 3; r++) {
        CHECK(some[r].built == MPT_ERROR_ARGUMENT);
        CHECK(strstr(some[r].why, "rank 2") != NULL);
    }
    clear_ranks(some, MOST);
    free(p);
}

static void test_rank_errors(void) {
    mpt_context *ctx = test_open(NULL);
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
    mpt_train_desc train = MPT_ZERO;
    seat s = {NULL, 0};
    mpt_softmax_cross_entropy(net, layers(net, 0), NULL);
    train.ranks.ranks = 2;
    CHECK_ERROR(ctx, mpt_model_build(net, &train), MPT_ERROR_ARGUMENT, "sum");
    train.ranks.sum = add_all;
    train.ranks.user = &s;
    train.ranks.rank = 2;
    CHECK_ERROR(ctx, mpt_model_build(net, &train), MPT_ERROR_ARGUMENT, "rank");
    train.ranks.ranks = -1;
    CHECK_ERROR(ctx, mpt_model_build(net, &train), MPT_ERROR_ARGUMENT, "rank");
    mpt_model_free(net);
    mpt_close(ctx);
}

int main(int argc, char **argv) {
    int net, passes;
    test_begin(argc, argv);
    for (net = 0; net < 2; net++)
        for (passes = 3; passes <= 4; passes++) {
            RUN_TEST(test_same_bits(net, mpt_policy_preset(MPT_O0, MPT_F16), passes));
            RUN_TEST(test_same_bits(net, mpt_policy_preset(MPT_O2, MPT_F16), passes));
            RUN_TEST(test_same_bits(net, mpt_policy_preset(MPT_O2, MPT_BF16), passes));
            RUN_TEST(test_same_bits(net, mpt_policy_preset(MPT_O1, MPT_BF16), passes));
        }
    RUN_TEST(test_bad_label());
    RUN_TEST(test_other_models());
    RUN_TEST(test_rank_errors());
    return test_finish("ranks");
}
#else
int main(void) { return test_finish("ranks"); }
#endif
