/* nccl.c - ranks over NCCL, each with a GPU of its own, make the same step as one, to the bit: as threads, see ranks.h,
   and as processes, which are this program again. And what such a step asks of CUDA, told by the runner's counters.
   Skipped where there are not enough GPUs. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* RTLD_DEFAULT; nvcc defines it already */
#endif
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include "../../examples/nccl.cuh"
#include <dlfcn.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* ==== ENGINE ==== */

typedef struct engine {
    ncclUniqueId id;
} engine;

typedef struct seat {
    engine *e;
    cudaStream_t stream;
    mpt_cuda_desc desc;
    nccl_adapter nccl;
} seat;

#include "../ranks.h"

static void engine_begin(engine *e, int ranks) {
    if (ranks > 1) CHECK(ncclGetUniqueId(&e->id) == ncclSuccess);
}

static void engine_end(engine *e) { (void)e; }

static mpt_context *rank_open(rank *me) {
    seat *at = &me->at;
    CHECK(cudaSetDevice(me->number) == cudaSuccess);
    CHECK(cudaStreamCreateWithFlags(&at->stream, cudaStreamNonBlocking) == cudaSuccess);
    at->desc.device = me->number;
    at->desc.stream = at->stream;
    return mpt_cuda_open(&at->desc);
}

static void rank_close(rank *me, mpt_context *ctx) {
    mpt_close(ctx);
    CHECK(cudaStreamDestroy(me->at.stream) == cudaSuccess);
}

static mpt_result rank_join(rank *me, mpt_context *ctx, mpt_ranks *out) {
    seat *at = &me->at;
    return nccl_ranks(&at->nccl, ctx, &at->desc, at->e->id, me->number, me->ranks, out);
}

static void rank_leave(rank *me) { nccl_ranks_free(&me->at.nccl); }

static size_t rank_held(const rank *me) {
    (void)me;
    return 0;
}

/* ==== PROCESSES ==== */

enum { HEX = 2 * sizeof(ncclUniqueId) + 1, TEXT = 64 };

static void hex_of(const ncclUniqueId *id, char *hex) {
    size_t i;
    for (i = 0; i < sizeof *id; i++) snprintf(hex + 2 * i, 3, "%02x", (unsigned)((const unsigned char *)id)[i]);
}

static void hex_read(const char *hex, ncclUniqueId *id) {
    size_t i;
    unsigned byte = 0;
    for (i = 0; i < sizeof *id && sscanf(hex + 2 * i, "%2x", &byte) == 1; i++)
        ((unsigned char *)id)[i] = (unsigned char)byte;
}

/* This program again as each of the ranks; did all end well, but for rank `killed`, which was? */
static int run_processes(const char *program, const char *part, int ranks, int killed) {
    static const char *const digit[] = {"0", "1", "2", "3"};
    ncclUniqueId id;
    char hex[HEX];
    pid_t child[MOST];
    int r, well = 1;
    CHECK(ncclGetUniqueId(&id) == ncclSuccess);
    hex_of(&id, hex);
    fflush(stdout);
    for (r = 0; r < ranks; r++) {
        child[r] = fork();
        if (child[r] == 0) {
            execl(program, program, part, digit[r], hex, digit[ranks], (char *)NULL);
            _exit(127);
        }
    }
    for (r = 0; r < ranks; r++) {
        int status = 1;
        well &= waitpid(child[r], &status, 0) == child[r];
        well &= r == killed ? WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL : status == 0;
    }
    return well;
}

/* This rank's part of a training of two, which it compares with one of its own. */
static void train_part(engine *e, int number) {
    problem *p = problem_new();
    const rank like = like_of(1, mpt_policy_preset(MPT_O2, MPT_F16), p);
    rank me = like, one = like;
    me.at.e = e;
    me.number = number;
    me.ranks = 2, me.accumulate = 1;
    me.bucket = 4;
    one.ranks = 1, one.accumulate = 2;
    live(&me);
    live(&one);
    CHECK(me.built == MPT_OK && me.step[STEPS - 1] == MPT_OK && me.applied == STEPS);
    CHECK(me.count == one.count && memcmp(me.weights, one.weights, me.count * sizeof *me.weights) == 0);
    free(me.weights);
    free(one.weights);
    free(p);
}

/* ==== COUNTERS ==== */

typedef unsigned long long (*counter_function)(const char *name);

/* A step of two ranks is one graph launch: no synchronisation, no allocation, no call of NCCL. (Where the host is two
   steps ahead it waits for an event, as without ranks.) Returns the bytes that the first step sums, call by call: slots
   and statistics in a call each, the gradients in one for each of `ranges`. ranges 0: not looked at, with shards. */
static unsigned long long count_steps(mpt_context *ctx, const mpt_train_desc *train, int ranges,
                                      counter_function counter) {
    static const char *const names[] = {"graph_launches", "nccl_calls",  "memcpy_d2h", "sync_device",
                                        "sync_stream",    "sync_memcpy", "mallocs",    "host_allocs"};
    enum { COUNTERS = sizeof names / sizeof *names, FIRST = 4, LAST = 8 };
    static float x[BATCH * PIXELS];
    const int32_t label[BATCH] = {0, 1, 2, 0};
    unsigned long long before[COUNTERS] = {0}, calls, bytes;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    int step, i;
    mpt_softmax_cross_entropy(net, layers(net, 1), NULL);
    CHECK_OK(ctx, mpt_model_build(net, train));
    test_floats(x, BATCH * PIXELS, 0, 1, (uint64_t)train->ranks.rank);
    calls = counter("nccl_calls");
    bytes = counter("nccl_bytes");
    CHECK_OK(ctx, mpt_train_step(net, x, label));
    calls = counter("nccl_calls") - calls;
    bytes = counter("nccl_bytes") - bytes;
    if (ranges) CHECK_EQUAL((double)calls, ranges + 2);
    for (step = 2; step <= LAST; step++) {
        for (i = 0; i < COUNTERS && step == FIRST; i++) before[i] = counter(names[i]);
        CHECK_OK(ctx, mpt_train_step(net, x, label));
    }
    for (i = 0; i < COUNTERS; i++)
        if (!CHECK_EQUAL((double)(counter(names[i]) - before[i]), i ? 0 : LAST - FIRST + 1))
            printf("    %s\n", names[i]);
    if (!train->ranks.rank)
        printf("cuda/nccl: %d ranges: %llu calls, %llu bytes in the first step, 1 launch in a later one\n", ranges,
               calls, bytes);
    mpt_model_free(net);
    return bytes;
}

static void count_part(engine *e, int number, counter_function counter) {
    mpt_train_desc train = MPT_ZERO;
    unsigned long long whole;
    mpt_context *ctx;
    rank me;
    memset(&me, 0, sizeof me);
    me.at.e = e;
    me.number = number;
    me.ranks = 2;
    ctx = rank_open(&me);
    CHECK_OK(ctx, rank_join(&me, ctx, &train.ranks));
    train.batch = BATCH;
    whole = count_steps(ctx, &train, 1, counter);
    train.ranks.bucket_bytes = 4;
    CHECK_EQUAL((double)count_steps(ctx, &train, 4, counter), (double)whole);
    train.shard_optimizer = 1;
    count_steps(ctx, &train, 0, counter);
    rank_leave(&me);
    rank_close(&me, ctx);
}

/* ==== EARLY ==== */

typedef struct early {
    rank me;
    pthread_barrier_t *seen;
} early;

/* Of no_graph, so that nothing but the order of the streams keeps what a step asks for from running. */
static void *early_part(void *user) {
    enum { STEP = 3, FEW = 8 };
    early *s = (early *)user;
    const int32_t label[BATCH] = {0, 1, 2, 0};
    const float *grad;
    float x[BATCH * PIXELS], host[FEW] = {0};
    mpt_train_desc train = MPT_ZERO;
    cudaStream_t other;
    mpt_context *ctx;
    mpt_model *net;
    time_t began;
    int step;
    s->me.at.desc.no_graph = 1;
    ctx = rank_open(&s->me);
    CHECK_OK(ctx, rank_join(&s->me, ctx, &train.ranks));
    CHECK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking) == cudaSuccess);
    net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    mpt_softmax_cross_entropy(net, layers(net, 1), NULL);
    train.batch = BATCH;
    train.ranks.bucket_bytes = 4;
    CHECK_OK(ctx, mpt_model_build(net, &train));
    test_floats(x, BATCH * PIXELS, 0, 1, (uint64_t)s->me.number);
    grad = mpt_params_grad(mpt_model_params(net), 1);
    for (step = 1; step <= STEP; step++) {
        const int last = step == STEP;
        CHECK_OK(ctx, mpt_params_zero_grad(mpt_model_params(net)));
        CHECK_OK(ctx, mpt_download(ctx, host, grad, sizeof host));
        if (last && s->me.number) pthread_barrier_wait(s->seen);
        CHECK_OK(ctx, mpt_train_step(net, x, label));
        if (!last || s->me.number) continue;
        began = time(NULL);
        while (host[0] == 0 && time(NULL) < began + 60) {
            if (cudaMemcpyAsync(host, grad, sizeof host, cudaMemcpyDeviceToHost, other) != cudaSuccess) break;
            if (cudaStreamSynchronize(other) != cudaSuccess) break;
        }
        CHECK(test_is_finite(host[0]) && host[0] != 0);
        pthread_barrier_wait(s->seen);
    }
    CHECK_EQUAL((double)mpt_steps_applied(net), STEP);
    CHECK(cudaStreamDestroy(other) == cudaSuccess);
    mpt_model_free(net);
    rank_leave(&s->me);
    rank_close(&s->me, ctx);
    return NULL;
}

/* The gradient of the first layer comes though the last layer's waits for the other rank, which has not begun. */
static void test_early(void) {
    pthread_barrier_t seen;
    pthread_t thread[2];
    early s[2];
    engine e;
    int r;
    engine_begin(&e, 2);
    memset(s, 0, sizeof s);
    CHECK(pthread_barrier_init(&seen, NULL, 2) == 0);
    for (r = 0; r < 2; r++) {
        s[r].me.at.e = &e;
        s[r].me.number = r;
        s[r].me.ranks = 2;
        s[r].seen = &seen;
        CHECK(pthread_create(&thread[r], NULL, early_part, &s[r]) == 0);
    }
    for (r = 0; r < 2; r++) pthread_join(thread[r], NULL);
    pthread_barrier_destroy(&seen);
}

/* ==== A KILLED RANK ==== */

/* Rank 1 is killed between two steps. The others are told so within a few more, and can free all that they have. */
static void killed_part(engine *e, int number, int ranks) {
    enum { KILLED = 3, MOST_STEPS = 8, LIMIT = 30 };
    const int32_t label[BATCH] = {0, 1, 2, 0};
    float x[BATCH * PIXELS];
    mpt_train_desc train = MPT_ZERO;
    mpt_result result = MPT_OK;
    mpt_context *ctx;
    mpt_model *net;
    time_t began = 0;
    rank me;
    int step;
    memset(&me, 0, sizeof me);
    me.at.e = e;
    me.number = number;
    me.ranks = ranks;
    ctx = rank_open(&me);
    CHECK_OK(ctx, rank_join(&me, ctx, &train.ranks));
    train.batch = BATCH;
    train.ranks.bucket_bytes = 4;
    train.shard_optimizer = ranks > 2;
    net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    mpt_softmax_cross_entropy(net, layers(net, 1), NULL);
    CHECK_OK(ctx, mpt_model_build(net, &train));
    test_floats(x, BATCH * PIXELS, 0, 1, (uint64_t)number);
    for (step = 1; step <= MOST_STEPS && result == MPT_OK; step++) {
        if (step == KILLED) began = time(NULL);
        if (step == KILLED && number == 1) raise(SIGKILL);
        result = mpt_train_step(net, x, label);
        CHECK(step >= KILLED || result == MPT_OK);
    }
    CHECK_EQUAL(result, MPT_ERROR_DEVICE);
    if (!CHECK(strstr(mpt_why(ctx), "remote process exited"))) /* NCCL's text */
        printf("    %s\n", mpt_why(ctx));
    mpt_model_free(net);
    rank_leave(&me);
    mpt_close(ctx);
    cudaStreamDestroy(me.at.stream);
    CHECK(time(NULL) - began < LIMIT);
}

/* ==== THE SUM ==== */

typedef struct summand {
    rank me;
    int wrong;
} summand;

static float drawn(int r, size_t i) { return (float)mpt_hash(1, 2, (uint64_t)r, i) * 1e-9f - 2; }

static float tree_of(int first, int count, size_t i) {
    int left = 1;
    if (count == 1) return drawn(first, i);
    while (2 * left < count) left *= 2;
    return tree_of(first, left, i) + tree_of(first + left, count - left, i);
}

/* Fewer floats than ranks, rows of all ranks and what is left over, several pieces */
static void *sum_part(void *user) {
    enum { ROOM = 4096, MOST_FLOATS = 2 * ROOM + 8 };
    const size_t counts[] = {1, 3, 1009, ROOM, MOST_FLOATS - 1};
    summand *s = (summand *)user;
    mpt_context *ctx = rank_open(&s->me);
    float host[MOST_FLOATS], *x = (float *)mpt_alloc(ctx, sizeof host);
    mpt_ranks ranks = MPT_ZERO;
    size_t c, i;
    CHECK_OK(ctx, rank_join(&s->me, ctx, &ranks));
    s->me.at.nccl.room = ROOM;
    for (c = 0; c < sizeof counts / sizeof *counts; c++) {
        for (i = 0; i <= counts[c]; i++) host[i] = drawn(s->me.number, i);
        CHECK_OK(ctx, mpt_upload(ctx, x, host, (counts[c] + 1) * sizeof *x));
        CHECK_OK(ctx, ranks.sum(ranks.user, x, counts[c]));
        CHECK_OK(ctx, mpt_download(ctx, host, x, (counts[c] + 1) * sizeof *x));
        for (i = 0; i < counts[c]; i++) s->wrong += host[i] != tree_of(0, s->me.ranks, i);
        s->wrong += host[counts[c]] != drawn(s->me.number, counts[c]);
    }
    mpt_free(ctx, x);
    rank_leave(&s->me);
    rank_close(&s->me, ctx);
    return NULL;
}

static void test_sum(int ranks) {
    summand s[MOST];
    pthread_t thread[MOST];
    engine e;
    int r;
    engine_begin(&e, ranks);
    memset(s, 0, sizeof s);
    for (r = 0; r < ranks; r++) {
        s[r].me.at.e = &e;
        s[r].me.number = r;
        s[r].me.ranks = ranks;
        CHECK(pthread_create(&thread[r], NULL, sum_part, &s[r]) == 0);
    }
    for (r = 0; r < ranks; r++) {
        pthread_join(thread[r], NULL);
        CHECK_EQUAL(s[r].wrong, 0);
    }
}

int main(int argc, char **argv) {
    void *found = dlsym(RTLD_DEFAULT, "cudacpu_counter");
    counter_function counter;
    int devices = 0, net;
    memcpy(&counter, &found, sizeof counter);
    setenv("CUDACPU_DEVICES", "4", 1);        /* of the runner; a GPU knows nothing of it */
    setenv("CUDACPU_NCCL_TIMEOUT", "120", 1); /* longer than test_early waits */
    setenv("NCCL_GRAPH_REGISTER", "0", 1);
    if (argc == 5) {
        engine e;
        hex_read(argv[3], &e.id);
        if (strcmp(argv[1], "train") == 0) train_part(&e, atoi(argv[2]));
        else if (strcmp(argv[1], "killed") == 0) killed_part(&e, atoi(argv[2]), atoi(argv[4]));
        else if (counter) count_part(&e, atoi(argv[2]), counter);
        return test_counts.failed != 0;
    }
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices < 2) {
        test_counts.skipped++;
        return test_finish("cuda/nccl");
    }
    CHECK(run_processes(argv[0], "train", 2, -1));
    CHECK(run_processes(argv[0], "count", 2, -1));
    setenv("CUDACPU_EXITCODE", "0", 1); /* the runner counts what it says of the killed rank as an error */
    CHECK(run_processes(argv[0], "killed", 2, 1));
    if (devices >= 3) CHECK(run_processes(argv[0], "killed", 3, 1));
    unsetenv("CUDACPU_EXITCODE");
    if (!getenv("CUDACPU_LAZY")) test_early(); /* there nothing runs unless it is waited for */
    for (net = 0; net < 2; net++) {
        test_same_bits(net, mpt_policy_preset(MPT_O0, MPT_F16), 2, 4);
        test_same_bits(net, mpt_policy_preset(MPT_O2, MPT_F16), devices < 4 ? 2 : 4, 0);
        test_same_bits(net, mpt_policy_preset(MPT_O2, MPT_F16), devices < 4 ? 2 : 4, 4);
        test_same_bits(net, mpt_policy_preset(MPT_O2, MPT_BF16), devices < 3 ? 2 : 3, 0);
    }
    test_bad_label(2, 0, 0);
    test_bad_label(2, 0, 4);
    test_large_input(2, 0);
    test_bad_label(2, 1, 0);
    test_large_input(2, 1);
    test_shards(2, 4);
    test_shard_calls();
    if (devices >= 3) test_shard_bytes();
    if (devices >= 4) test_shard_resume();
    if (devices >= 4) test_shards(4, 8);
    test_running(2, 0);
    test_running(2, 1);
    if (devices >= 3) test_other_models();
    if (devices >= 3) test_sum(3);
    if (devices >= 4) test_sum(4);
    return test_finish("cuda/nccl");
}
