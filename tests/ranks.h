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
    int local;     /* see mpt_ranks */
    size_t bucket; /* not 0: bucket_bytes of a sum on the stream */
    int shard, optimizer, meter, frozen;
    double ema, clip_value;
    int last;                      /* steps are first .. last - 1; 0: STEPS */
    int first;                     /* not 0: it goes on from... */
    const struct rank *checkpoint; /* ...what this one saved */
    /* what it comes to */
    mpt_result built, step[STEPS];
    char why[256];
    float *weights;
    size_t count;
    double loss;
    float scale;
    uint64_t applied, skipped;
    mpt_optimizer_state state;
    float running[2 * CHANNELS];     /* net 2 */
    unsigned char *file;             /* a checkpoint, for nets from 3 on... */
    size_t file_bytes, file_weights; /* ...and behind it, if it is rank 0, weights, from here on */
    float output[BATCH * CLASSES];
    mpt_memory memory;
    size_t held; /* bytes, as the allocator counts them; 0: it does not */
} rank;

/* -- What the engine does -- */

static void engine_begin(engine *e, int ranks);
static void engine_end(engine *e);
static mpt_context *rank_open(rank *me);
static void rank_close(rank *me, mpt_context *ctx);
static mpt_result rank_join(rank *me, mpt_context *ctx, mpt_ranks *out);
static void rank_leave(rank *me);
static size_t rank_held(const rank *me);

/* -- A rank -- */

/* Large enough to be dealt out in runs of 4096: net 3 has three of them, net 4 nine, in which a layer in fp32 spans
   four. */
static int large_layers(mpt_model *net, int kind, int frozen) {
    int h = mpt_input(net, SIDE, SIDE, CHANNELS);
    mpt_conv2d_desc conv = MPT_ZERO;
    if (kind == 3) {
        h = mpt_dropout(net, mpt_gelu(net, mpt_linear(net, h, 130, NULL)), 0.25f);
        return mpt_linear(net, h, CLASSES, NULL);
    }
    conv.same = 1;
    conv.tuning.frozen = frozen;
    h = mpt_relu(net, mpt_batch_norm(net, mpt_conv2d(net, h, 16, 3, &conv), NULL));
    conv.tuning.frozen = 0;
    conv.tuning.lr_factor = 0.5;
    h = mpt_relu(net, mpt_batch_norm(net, mpt_conv2d(net, h, 64, 3, &conv), NULL));
    h = mpt_dropout(net, mpt_max_pool2d(net, h, 2, NULL), 0.1f);
    CHECK(mpt_policy_push(net, mpt_policy_preset(MPT_O0, MPT_F16)) == MPT_OK);
    h = mpt_relu(net, mpt_linear(net, h, 40, NULL));
    CHECK(mpt_policy_pop(net) == MPT_OK);
    return mpt_linear(net, h, CLASSES, NULL);
}

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

static mpt_optimizer_desc optimizer_of(const rank *me) {
    mpt_optimizer_desc desc = mpt_adam(0.01);
    if (me->optimizer == 1) {
        desc = mpt_sgd(0.05, 0.9);
        desc.nesterov = 1;
        desc.weight_decay = 0.01;
    }
    if (me->optimizer == 2) {
        desc = mpt_adamw(0.01);
        desc.amsgrad = 1;
    }
    desc.meter = me->meter;
    return desc;
}

/* All ranks of shards do this together; what each of them has then is the same as without shards. */
static void save(rank *me, mpt_context *ctx, mpt_model *net) {
    const int sharded = me->shard && me->ranks > 1;
    mpt_params *params = mpt_model_params(net);
    unsigned char few[1];
    size_t weights = 0, counted;
    CHECK_OK(ctx, mpt_checkpoint_save_memory(net, NULL, 0, &me->file_bytes));
    CHECK_OK(ctx, mpt_weights_save_memory(net, NULL, 0, &weights, MPT_F32));
    me->file = (unsigned char *)test_memory(me->file_bytes + weights);
    me->file_weights = me->file_bytes;
    /* put back as it was */
    if (me->policy.master == MPT_MASTER_F32) CHECK_OK(ctx, mpt_params_set(params, 0, me->weights));
    if (me->ema > 0) CHECK_OK(ctx, mpt_use_average(net, 1));
    CHECK_OK(ctx, mpt_predict(net, me->p->x, BATCH, me->output));
    if (sharded && me->number == 1) /* the others go on */
        CHECK_ERROR(ctx, mpt_checkpoint_save_memory(net, few, 1, &counted), MPT_ERROR_ARGUMENT, "capacity");
    else CHECK_OK(ctx, mpt_checkpoint_save_memory(net, me->file, me->file_bytes, &me->file_bytes));
    CHECK_OK(ctx, mpt_checkpoint_save_memory(net, me->file, me->file_bytes, &me->file_bytes));
    if (sharded && me->number) CHECK_OK(ctx, mpt_weights_save(net, NULL, MPT_F32));
    else CHECK_OK(ctx, mpt_weights_save_memory(net, me->file + me->file_bytes, weights, &counted, MPT_F32));
    if (!sharded || !me->number) me->file_bytes += weights;
    if (!sharded || mpt_params_weight(params, 0).type == MPT_F32 || me->policy.master != MPT_MASTER_F32) return;
    CHECK_OK(ctx, mpt_forward(net, me->p->x, me->p->label, BATCH));
    CHECK_OK(ctx, mpt_backward(net));
    CHECK_ERROR(ctx, mpt_params_get(params, 0, me->weights), MPT_ERROR_ORDER, "gradients would be overwritten");
}

/* Pointers to what a rank has a part of are not handed out. */
static void look(const rank *me, mpt_model *net) {
    mpt_params *params = mpt_model_params(net);
    const int parted = me->policy.master == MPT_MASTER_F32 && mpt_params_weight(params, 0).type != MPT_F32;
    if (!me->shard || me->ranks < 2) return;
    CHECK((mpt_params_master(params, 1) == NULL) == (parted || me->policy.master != MPT_MASTER_F32));
    CHECK(mpt_params_low(params, 1) == NULL);
    CHECK(mpt_optimizer_moment(mpt_model_optimizer(net), 1, 1) == NULL);
    if (me->net == 4 && me->frozen && parted) CHECK(mpt_params_master(params, mpt_params_tensors(params)) != NULL);
}

static size_t all_bytes(mpt_memory m) {
    return m.weights + m.masters + m.gradients + m.moments + m.activations + m.workspace + m.bookkeeping;
}

static void *live(void *user) {
    static const float class_weights[CLASSES] = {1, 0.3f, 2.7f};
    rank *me = (rank *)user;
    const size_t mine = (size_t)me->accumulate * BATCH, all = (size_t)me->ranks * mine;
    mpt_train_desc train = MPT_ZERO;
    mpt_loss_desc loss = MPT_ZERO;
    mpt_context *ctx;
    mpt_model *net;
    size_t before;
    int step, last = me->last ? me->last : STEPS;
    ctx = rank_open(me);
    before = rank_held(me);
    net = mpt_model_new(ctx, me->policy);
    loss.class_weights = class_weights;
    loss.ignore = 1;
    loss.ignore_index = -100;
    loss.weighted = me->net == 0;
    if (me->other == 4) loss.label_smoothing = 0.1f;
    if (me->net < 3) mpt_softmax_cross_entropy(net, layers(net, me->net), &loss);
    else mpt_softmax_cross_entropy(net, large_layers(net, me->net, me->frozen), &loss);
    train.batch = BATCH;
    train.accumulate = me->accumulate;
    train.optimizer = optimizer_of(me);
    train.shard_optimizer = me->shard;
    train.ema_decay = me->ema;
    train.clip_value = me->clip_value;
    train.clip_norm = 1;
    train.seed = me->seed;
    if (me->other == 1) train.seed = 12;
    if (me->other == 2) train.ema_decay = 0.9;
    if (me->other == 5) train.shard_optimizer = 1;
    if (me->other == 3) train.scaler.growth_interval = 7;
    if (me->ranks > 1) CHECK_OK(ctx, rank_join(me, ctx, &train.ranks));
    train.ranks.local_statistics = me->local;
    if (me->bucket) train.ranks.on_stream = 1;
    train.ranks.bucket_bytes = me->bucket;
    if (me->other == 6) train.ranks.bucket_bytes = 8;
    if (me->other == 7) train.ranks.all_gather = NULL;
    me->built = mpt_model_build(net, &train);
    me->memory = mpt_model_memory(net);
    me->held = rank_held(me) - before;
    if (me->built == MPT_OK) look(me, net);
    if (me->first) CHECK_OK(ctx, mpt_checkpoint_load_memory(net, me->checkpoint->file, me->checkpoint->file_weights));
    for (step = me->first; step < last && me->built == MPT_OK; step++) {
        const size_t first = (size_t)step * all + (size_t)me->number * mine;
        int32_t label[MOST * BATCH];
        float x[MOST * BATCH * PIXELS];
        memcpy(label, me->p->label + first, mine * sizeof *label);
        memcpy(x, me->p->x + first * PIXELS, mine * PIXELS * sizeof *x);
        if (step == me->bad) label[1] = 99;
        if (loss.weighted) mpt_sample_weights(net, me->p->weight + first);
        if (step == me->large) x[PIXELS + 1] = 3e38f;
        me->step[step] = mpt_train_step(net, x, label);
        if (me->step[step] != MPT_OK) snprintf(me->why, sizeof me->why, "%s", mpt_why(ctx));
    }
    if (me->built == MPT_OK) {
        me->weights = test_params(ctx, net, &me->count);
        me->loss = mpt_loss(net);
        if (me->net == 2) CHECK_OK(ctx, mpt_download(ctx, me->running, mpt_model_running(net, 2), sizeof me->running));
        me->scale = mpt_loss_scale(net);
        me->applied = mpt_steps_applied(net);
        me->skipped = mpt_steps_skipped(net);
        mpt_optimizer_get_state(mpt_model_optimizer(net), &me->state);
        if (me->net >= 3) save(me, ctx, net);
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
    for (r = 0; r < ranks; r++) {
        free(of[r].weights);
        free(of[r].file);
    }
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
static void test_same_bits(int net, mpt_policy policy, int passes, size_t bucket) {
    problem *p = problem_new();
    rank like = like_of(net, policy, p);
    rank one[MOST], some[MOST];
    int ranks, r, step;
    like.bucket = bucket;
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
static void test_bad_label(int ranks, int shard, size_t bucket) {
    problem *p = problem_new();
    rank like = like_of(shard ? 4 : 1, mpt_policy_preset(MPT_O2, MPT_F16), p);
    rank some[MOST];
    int r;
    reset(some, MOST);
    like.shard = shard;
    like.bucket = bucket;
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
static void test_large_input(int ranks, int shard) {
    problem *p = problem_new();
    rank like = like_of(shard ? 4 : 1, mpt_policy_preset(MPT_O2, MPT_F16), p);
    rank some[MOST];
    int r;
    reset(some, MOST);
    like.shard = shard;
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
    for (other = 1; other < 7; other++) {
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

/* Each rank of shards has what each has without them: weights, file, output. large: of the last rank; see rank */
static void same_as_whole(rank *like, int ranks, int accumulate, int large) {
    rank whole[MOST], some[MOST];
    int r, step;
    reset(whole, MOST);
    reset(some, MOST);
    whole[ranks - 1].large = some[ranks - 1].large = large;
    like->shard = 0;
    run(whole, like, ranks, accumulate);
    like->shard = 1;
    run(some, like, ranks, accumulate);
    for (r = 0; r < ranks; r++) {
        const size_t bytes = some[r].file_bytes;
        CHECK(some[r].built == MPT_OK && some[r].applied == (large < 0 ? STEPS : STEPS - 1));
        for (step = 0; step < STEPS; step++) CHECK(some[r].step[step] == MPT_OK);
        CHECK(some[r].count == whole[0].count);
        CHECK(memcmp(some[r].weights, whole[0].weights, whole[0].count * sizeof(float)) == 0);
        CHECK(bytes >= some[r].file_weights && bytes <= whole[0].file_bytes);
        CHECK(r || bytes == whole[0].file_bytes);
        if (!CHECK(memcmp(some[r].file, whole[0].file, bytes) == 0))
            printf("    rank %d of %d, net %d, type %s, master %d\n", r, ranks, like->net,
                   mpt_dtype_name(like->policy.compute), (int)like->policy.master);
        CHECK(memcmp(some[r].output, whole[0].output, sizeof whole[0].output) == 0);
        CHECK(some[r].held == 0 || some[r].held == all_bytes(some[r].memory));
        if (like->meter) CHECK(some[r].state.moved && some[r].state.moved == whole[r].state.moved);
    }
    clear_ranks(whole, MOST);
    clear_ranks(some, MOST);
}

static mpt_policy policy_with(mpt_dtype type, mpt_master master) {
    mpt_policy policy = mpt_policy_preset(MPT_O2, type);
    policy.master = master;
    return policy;
}

/* Nets, types, masters, optimizers and clip limits: each of them, or every second, ... */
static void test_shards(int ranks, int every) {
    problem *p = problem_new();
    const mpt_policy policies[] = {mpt_policy_preset(MPT_O0, MPT_F16),          mpt_policy_preset(MPT_O2, MPT_F16),
                                   mpt_policy_preset(MPT_O2, MPT_BF16),         mpt_policy_preset(MPT_O1, MPT_BF16),
                                   policy_with(MPT_BF16, MPT_MASTER_SPLIT),     policy_with(MPT_F16, MPT_MASTER_KAHAN),
                                   policy_with(MPT_BF16, MPT_MASTER_STOCHASTIC)};
    const int count = (int)(sizeof policies / sizeof *policies);
    int i;
    for (i = 0; i < count + 4; i += every) {
        rank like = like_of(i < count ? 3 : 4, policies[i % count], p);
        like.optimizer = (i + ranks) % 3;
        like.ema = i % 2 ? 0.8 : 0;
        like.meter = i == 1 || i == 4 || i == 7 || i == 8;
        like.clip_value = i % 3 ? 0 : 0.01;
        like.frozen = i % 2 == 0;
        same_as_whole(&like, ranks, ranks == 2 ? 1 + i % 2 : 1, i == 1 || i == 8 ? 2 : -1);
    }
    free(p);
}

/* A rank without a call that shards need says so; the others learn that it is not there. */
static void test_shard_calls(void) {
    problem *p = problem_new();
    rank like = like_of(3, mpt_policy_preset(MPT_O0, MPT_F16), p);
    rank some[MOST];
    like.shard = 1;
    reset(some, MOST);
    some[1].other = 7;
    run(some, &like, 2, 1);
    CHECK(some[1].built == MPT_ERROR_ARGUMENT && strstr(some[1].why, "all_gather"));
    CHECK(some[0].built == MPT_ERROR_DEVICE && strstr(some[0].why, "rank 1 could not build"));
    clear_ranks(some, MOST);
    free(p);
}

/* Moments, masters and averages are dealt out in runs of 4096; the rest is as it is without shards. */
static void test_shard_bytes(void) {
    enum { RANKS = 3 };
    problem *p = problem_new();
    rank like = like_of(4, mpt_policy_preset(MPT_O2, MPT_BF16), p);
    rank whole[MOST], some[MOST];
    size_t masters = 0, moments = 0;
    int r;
    reset(whole, MOST);
    reset(some, MOST);
    run(whole, &like, RANKS, 1);
    like.shard = 1;
    run(some, &like, RANKS, 1);
    for (r = 0; r < RANKS; r++) {
        const mpt_memory m = some[r].memory, w = whole[r].memory;
        CHECK_EQUAL(m.gradients, w.gradients);
        CHECK_EQUAL(m.activations, w.activations);
        CHECK_EQUAL(m.moments, 2 * m.masters); /* Adam's */
        CHECK_EQUAL(m.masters, r < RANKS - 1 ? 3 * 4096 * 4 : w.masters - masters);
        CHECK(m.weights > w.weights && m.weights < w.weights + w.masters); /* fp32 values that are read */
        masters += m.masters;
        moments += m.moments;
    }
    CHECK_EQUAL(masters, whole[0].memory.masters);
    CHECK_EQUAL(moments, whole[0].memory.moments);
    clear_ranks(whole, MOST);
    clear_ranks(some, MOST);
    free(p);
}

/* Two ranks of shards save; four of them, one, and two without shards go on, as if nobody had stopped. */
static void test_shard_resume(void) {
    problem *p = problem_new();
    rank like = like_of(3, mpt_policy_preset(MPT_O2, MPT_F16), p);
    rank half[MOST], some[MOST], whole[MOST];
    int way;
    like.ema = 0.8;
    like.optimizer = 2;
    reset(half, MOST);
    reset(some, MOST);
    reset(whole, MOST);
    run(whole, &like, 1, 4);
    like.shard = 1;
    like.last = 2;
    run(half, &like, 2, 2);
    like.first = 2;
    like.last = STEPS;
    like.checkpoint = &half[1];
    for (way = 0; way < 3; way++) {
        like.shard = way < 2;
        run(some, &like, way ? way : 4, way ? 4 / way : 1);
        CHECK_EQUAL(some[0].file_bytes, whole[0].file_bytes);
        CHECK(memcmp(some[0].file, whole[0].file, whole[0].file_bytes) == 0);
        clear_ranks(some, MOST);
    }
    clear_ranks(half, MOST);
    clear_ranks(whole, MOST);
    free(p);
}

#endif
