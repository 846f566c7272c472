/* ranks.c - several ranks make the same step as one, to the bit; see ranks.h. The engine: every rank brings its array,
   the last to come adds them up. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#ifndef MPT_NO_THREADS
#include <pthread.h>

typedef struct engine {
    pthread_mutex_t lock;
    pthread_cond_t turn;
    int ranks, came, left, broken;
    float *x[4];
} engine;

typedef struct seat { /* a rank's place in it */
    engine *e;
    int rank;
} seat;

#include "../ranks.h"

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

static void engine_begin(engine *e, int ranks) {
    memset(e, 0, sizeof *e);
    e->ranks = ranks;
    pthread_mutex_init(&e->lock, NULL);
    pthread_cond_init(&e->turn, NULL);
}

static void engine_end(engine *e) {
    pthread_mutex_destroy(&e->lock);
    pthread_cond_destroy(&e->turn);
}

static mpt_context *rank_open(rank *me) {
    mpt_context_desc desc = MPT_ZERO;
    (void)me;
    desc.threads = 1;
    return mpt_open(&desc);
}

static void rank_close(rank *me, mpt_context *ctx) {
    (void)me;
    mpt_close(ctx);
}

static mpt_result rank_join(rank *me, mpt_context *ctx, mpt_ranks *out) {
    (void)ctx;
    me->at.rank = out->rank = me->number;
    out->ranks = me->ranks;
    out->sum = add_all;
    out->user = &me->at;
    return MPT_OK;
}

static void rank_leave(rank *me) { (void)me; }

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
    RUN_TEST(test_bad_label(3));
    RUN_TEST(test_large_input(3));
    RUN_TEST(test_running(3, 0));
    RUN_TEST(test_running(3, 1));
    RUN_TEST(test_other_models());
    RUN_TEST(test_rank_errors());
    return test_finish("ranks");
}
#else
int main(void) { return test_finish("ranks"); }
#endif
