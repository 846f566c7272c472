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
    int ranks, came, left;
    void *x[4];
} engine;

typedef struct seat { /* a rank's place in it */
    engine *e;
    int rank, sums;
    int calls, fails; /* calls so far; number of the one that fails, from 1; 0: none */
    test_counter counter;
} seat;

#include "../ranks.h"

static float tree(void *const *x, int first, int count, size_t i) {
    int left = 1;
    if (count == 1) return ((const float *)x[first])[i];
    while (2 * left < count) left *= 2;
    return tree(x, first, left, i) + tree(x, first + left, count - left, i);
}

/* What the last to come does with the arrays of all */
typedef struct task {
    void (*run)(engine *e, const struct task *t);
    const size_t *begin;
    size_t size; /* elements, or bytes of one */
} task;

static mpt_result meet(seat *s, void *x, const task *t) {
    engine *e = s->e;
    pthread_mutex_lock(&e->lock);
    while (e->left) pthread_cond_wait(&e->turn, &e->lock); /* those before are still leaving */
    e->x[s->rank] = x;
    if (++e->came == e->ranks) {
        t->run(e, t);
        e->came = 0;
        e->left = e->ranks;
        pthread_cond_broadcast(&e->turn);
    } else {
        while (!e->left) pthread_cond_wait(&e->turn, &e->lock);
    }
    if (--e->left == 0) pthread_cond_broadcast(&e->turn);
    pthread_mutex_unlock(&e->lock);
    return ++s->calls == s->fails ? MPT_ERROR_DEVICE : MPT_OK;
}

static void add_arrays(engine *e, const task *t) {
    size_t i;
    int r;
    for (i = 0; i < t->size; i++) {
        const float sum = tree(e->x, 0, e->ranks, i);
        for (r = 0; r < e->ranks; r++) ((float *)e->x[r])[i] = sum;
    }
}

/* Nobody may rely on what a rank does not own. */
static void scatter_arrays(engine *e, const task *t) {
    size_t i;
    int r, owner;
    for (owner = 0; owner < e->ranks; owner++)
        for (i = t->begin[owner]; i < t->begin[owner + 1]; i++) {
            const float sum = tree(e->x, 0, e->ranks, i);
            for (r = 0; r < e->ranks; r++) ((float *)e->x[r])[i] = r == owner ? sum : test_float(0x7fc00000u);
        }
}

static void gather_arrays(engine *e, const task *t) {
    int r, owner;
    for (owner = 0; owner < e->ranks; owner++)
        for (r = 0; r < e->ranks; r++) {
            const size_t at = t->begin[owner] * t->size, bytes = t->begin[owner + 1] * t->size - at;
            if (r != owner) memcpy((char *)e->x[r] + at, (char *)e->x[owner] + at, bytes);
        }
}

static mpt_result add_all(void *user, float *x, size_t n) {
    task t = {add_arrays, NULL, 0};
    t.size = n;
    ((seat *)user)->sums++;
    return meet((seat *)user, x, &t);
}

static mpt_result scatter_all(void *user, float *x, const size_t *begin) {
    task t = {scatter_arrays, NULL, 0};
    t.begin = begin;
    return meet((seat *)user, x, &t);
}

static mpt_result gather_all(void *user, void *x, const size_t *begin, size_t size) {
    task t = {gather_arrays, NULL, 0};
    t.begin = begin;
    t.size = size;
    return meet((seat *)user, x, &t);
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
    const mpt_context_desc desc = test_counting(&me->at.counter, 1);
    return mpt_open(&desc);
}

static void rank_close(rank *me, mpt_context *ctx) {
    mpt_close(ctx);
    CHECK(test_counter_clean(&me->at.counter));
}

static size_t rank_held(const rank *me) { return me->at.counter.bytes; }

static mpt_result rank_join(rank *me, mpt_context *ctx, mpt_ranks *out) {
    (void)ctx;
    me->at.rank = out->rank = me->number;
    out->ranks = me->ranks;
    out->sum = add_all;
    out->reduce_scatter = scatter_all;
    out->all_gather = gather_all;
    out->user = &me->at;
    return MPT_OK;
}

static void rank_leave(rank *me) { (void)me; }

/* The gradients of linear layer, convolution, norm and convolution, from the end: in a range each, in two, in one. A
   step also sums slots and statistics, the build slots. */
static void test_ranges(void) {
    static const size_t bytes[] = {4, 1024, (size_t)25 << 20};
    static const int ranges[] = {4, 2, 1};
    problem *p = problem_new();
    rank some[MOST];
    size_t i;
    for (i = 0; i < 3; i++) {
        rank like = like_of(1, mpt_policy_preset(MPT_O2, MPT_F16), p);
        like.bucket = bytes[i];
        reset(some, MOST);
        run(some, &like, 2, 2);
        CHECK_EQUAL(some[0].at.sums, 1 + STEPS * (ranges[i] + 2));
        clear_ranks(some, MOST);
    }
    free(p);
}

/* The engine fails on all ranks in a call of the first step: slots, gradients, statistics, with shards sums of squares.
   All skip that step. */
static void test_failed_call(int shard) {
    enum { RANKS = 3 };
    problem *p = problem_new();
    rank some[MOST];
    int fails, r;
    for (fails = 2; fails <= 4 + shard; fails++) {
        rank like = like_of(4, mpt_policy_preset(MPT_O2, MPT_BF16), p);
        like.shard = shard;
        like.at.fails = fails;
        reset(some, MOST);
        run(some, &like, RANKS, 1);
        for (r = 0; r < RANKS; r++) {
            CHECK(some[r].step[0] == MPT_ERROR_DEVICE && some[r].step[1] == MPT_OK);
            CHECK(strstr(some[r].why, "of 3: an exchange with all ranks failed") != NULL);
            CHECK(some[r].applied == STEPS - 1 && some[r].skipped == 1);
            CHECK(memcmp(some[r].weights, some[0].weights, some[0].count * sizeof(float)) == 0);
        }
        clear_ranks(some, MOST);
    }
    free(p);
}

static void test_rank_errors(void) {
    mpt_context *ctx = test_open(NULL);
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
    mpt_train_desc train = MPT_ZERO;
    seat s;
    memset(&s, 0, sizeof s);
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
            RUN_TEST(test_same_bits(net, mpt_policy_preset(MPT_O0, MPT_F16), passes, 0));
            RUN_TEST(test_same_bits(net, mpt_policy_preset(MPT_O2, MPT_F16), passes, 0));
            RUN_TEST(test_same_bits(net, mpt_policy_preset(MPT_O2, MPT_F16), passes, 4));
            RUN_TEST(test_same_bits(net, mpt_policy_preset(MPT_O2, MPT_BF16), passes, 0));
            RUN_TEST(test_same_bits(net, mpt_policy_preset(MPT_O1, MPT_BF16), passes, 0));
        }
    RUN_TEST(test_ranges());
    RUN_TEST(test_bad_label(3, 0, 0));
    RUN_TEST(test_bad_label(3, 1, 0));
    RUN_TEST(test_bad_label(3, 0, 4));
    RUN_TEST(test_large_input(3, 0));
    RUN_TEST(test_large_input(3, 1));
    for (passes = 2; passes <= 4; passes++) RUN_TEST(test_shards(passes, 1));
    RUN_TEST(test_shard_bytes());
    RUN_TEST(test_shard_calls());
    RUN_TEST(test_failed_call(0));
    RUN_TEST(test_failed_call(1));
    RUN_TEST(test_shard_resume());
    RUN_TEST(test_running(3, 0));
    RUN_TEST(test_running(3, 1));
    RUN_TEST(test_other_models());
    RUN_TEST(test_rank_errors());
    return test_finish("ranks");
}
#else
int main(void) { return test_finish("ranks"); }
#endif
