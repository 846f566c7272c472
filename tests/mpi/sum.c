/* sum.c - examples/mpi.h from within, for tests/train/mpi.sh: sum | shards | bytes | shard_bytes | label |
   error | killed, and for people `time`. Run by mpirun. What rank 0 finds it prints; exit status 1 where a check fails
   on any rank. */
#define _POSIX_C_SOURCE 200809L
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../../examples/mpi.h"
#include <signal.h>
#include <stdio.h>

enum { STEPS = 4, BATCH = 4, FEATURES = 64, HIDDEN = 250, CLASSES = 10 };

/* ---- What is sent: MPI has a second name for each of its calls, for those who count ---- */

static size_t sent, calls;

int MPI_Sendrecv(const void *out, int count, MPI_Datatype type, int to, int tag, void *in, int room,
                 MPI_Datatype in_type, int from, int in_tag, MPI_Comm comm, MPI_Status *status) {
    int bytes = 0;
    MPI_Type_size(type, &bytes);
    sent += (size_t)count * (size_t)bytes;
    calls++;
    return PMPI_Sendrecv(out, count, type, to, tag, in, room, in_type, from, in_tag, comm, status);
}

/* ---- The checks ---- */

typedef struct rank {
    mpi_adapter mpi;
    mpt_ranks ranks;
    mpt_context *ctx;
    int failed;
} rank;

static void check(rank *me, int good, const char *what) {
    if (good) return;
    me->failed++;
    printf("sum.c: rank %d of %d: %s: %s\n", me->ranks.rank, me->ranks.ranks, what, mpt_why(me->ctx));
}

static float drawn(int r, size_t i) { return (float)mpt_hash(1, 2, (uint64_t)r, i) * 1e-9f - 2; }

static float tree(int first, int count, size_t i) {
    int left = 1;
    if (count == 1) return drawn(first, i);
    while (2 * left < count) left *= 2;
    return tree(first, left, i) + tree(first + left, count - left, i);
}

/* Fewer floats than ranks, as many, parts of unlike sizes, several pieces. */
static void check_sum(rank *me) {
    const size_t most = 2 * MPI_RANKS_FLOATS + 3;
    const size_t counts[] = {1, 2, 3, 4, 5, 7, 64, 1009, MPI_RANKS_FLOATS - 1, MPI_RANKS_FLOATS, most};
    float *x = (float *)malloc((most + 1) * sizeof *x);
    size_t c, i, wrong;
    if (!x) exit(1);
    for (c = 0; c < sizeof counts / sizeof *counts; c++) {
        const size_t n = counts[c];
        for (i = 0; i <= n; i++) x[i] = drawn(me->ranks.rank, i);
        check(me, me->ranks.sum(me->ranks.user, x, n) == MPT_OK, "sum");
        for (i = wrong = 0; i < n; i++) wrong += x[i] != tree(0, me->ranks.ranks, i);
        check(me, wrong == 0, "the sum is another than the tree's");
        check(me, x[n] == drawn(me->ranks.rank, n), "written beyond the array");
    }
    free(x);
}

/* Ranks that own nothing, little, and several pieces */
static void check_shards(rank *me) {
    const size_t ranks = (size_t)me->ranks.ranks, unit = MPI_RANKS_FLOATS / ranks / 2 + 1, n = unit * ranks * ranks;
    size_t *begin = (size_t *)malloc((ranks + 1) * sizeof *begin), i, r, wrong = 0;
    float *x = (float *)malloc((n + 1) * sizeof *x);
    double *y = (double *)malloc((n + 1) * sizeof *y);
    if (!begin || !x || !y) exit(1);
    for (r = 0; r <= ranks; r++) begin[r] = unit * r * r;
    if (ranks > 1) begin[1] = 0;
    for (i = 0; i <= n; i++) x[i] = drawn(me->ranks.rank, i);
    check(me, me->ranks.reduce_scatter(me->ranks.user, x, begin) == MPT_OK, "reduce_scatter");
    for (i = begin[me->ranks.rank]; i < begin[me->ranks.rank + 1]; i++) wrong += x[i] != tree(0, me->ranks.ranks, i);
    for (i = 0; i <= n; i++)
        y[i] = i == n || (i >= begin[me->ranks.rank] && i < begin[me->ranks.rank + 1]) ? (double)i : -1;
    check(me, me->ranks.all_gather(me->ranks.user, y, begin, sizeof *y) == MPT_OK, "all_gather");
    for (i = 0; i < n; i++) wrong += y[i] < (double)i || y[i] > (double)i;
    check(me, wrong == 0, "what a rank owns is another than it should be");
    check(me, x[n] == drawn(me->ranks.rank, n) && (size_t)y[n] == n, "written beyond the array");
    free(begin);
    free(x);
    free(y);
}

static mpt_model *perceptron(rank *me, int shard) {
    mpt_model *net = mpt_model_new(me->ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    const int h = mpt_relu(net, mpt_linear(net, mpt_input(net, 1, 1, FEATURES), HIDDEN, NULL));
    mpt_train_desc train = MPT_ZERO;
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
    train.batch = BATCH;
    train.ranks = me->ranks;
    train.shard_optimizer = shard;
    check(me, mpt_model_build(net, &train) == MPT_OK, "build");
    return net;
}

static mpt_result step(rank *me, mpt_model *net, int label) {
    float x[BATCH * FEATURES];
    int32_t y[BATCH] = {0, 1, 2, 3};
    size_t i;
    for (i = 0; i < BATCH * FEATURES; i++) x[i] = drawn(me->ranks.rank, i);
    y[1] = label;
    return mpt_train_step(net, x, y);
}

/* A step sends the sum of the gradients, and what the ranks tell of their losses. */
static void check_bytes(rank *me) {
    mpt_model *net = perceptron(me, 0);
    const size_t ranks = (size_t)me->ranks.ranks, floats = mpt_params_count(mpt_model_params(net), 0);
    const size_t least = 2 * (ranks - 1) * floats * sizeof(float) / ranks;
    sent = calls = 0;
    check(me, step(me, net, 1) == MPT_OK, "step");
    if (me->ranks.rank == 0)
        printf("%zu ranks: a step sends %zu bytes in %zu calls, least %zu\n", ranks, sent, calls, least);
    /* parts are rounded up to whole floats; a rank tells 16 floats to each */
    check(me, sent >= least && sent <= least + 2 * ranks * (1 + 16) * sizeof(float), "a step sends more than it must");
    mpt_model_free(net);
}

/* With shards: the gradients once, the 16-bit weights once, and a sum of squares and counts of each run of 4096. */
static void check_shard_bytes(rank *me) {
    mpt_model *net = perceptron(me, 1);
    const size_t ranks = (size_t)me->ranks.ranks, floats = mpt_params_count(mpt_model_params(net), 0);
    const size_t least = (ranks - 1) * floats * (sizeof(float) + sizeof(uint16_t));
    const size_t most = least + (ranks - 1) * (floats / 4096 + 1) * sizeof(mpt_scan) + 2 * ranks * ranks * 17 * 4;
    unsigned long here, all = 0;
    sent = calls = 0;
    check(me, step(me, net, 1) == MPT_OK, "step");
    here = (unsigned long)sent;
    MPI_Allreduce(&here, &all, 1, MPI_UNSIGNED_LONG, MPI_SUM, MPI_COMM_WORLD);
    if (me->ranks.rank == 0)
        printf("%zu ranks with shards: a step sends %lu bytes, all ranks together; least %zu\n", ranks, all, least);
    check(me, all >= least && all <= most, "a step with shards sends more than it must");
    mpt_model_free(net);
}

/* Seconds of a sum, the least of many. */
static void print_times(rank *me) {
    const size_t counts[] = {1, 1000, 10000, 100000, 1000000};
    float *x = (float *)calloc(1000000, sizeof *x);
    size_t c;
    if (!x) exit(1);
    for (c = 0; c < sizeof counts / sizeof *counts; c++) {
        double least = 1;
        int repeat;
        for (repeat = 0; repeat < 100; repeat++) {
            double began;
            MPI_Barrier(MPI_COMM_WORLD);
            began = MPI_Wtime();
            check(me, me->ranks.sum(me->ranks.user, x, counts[c]) == MPT_OK, "sum");
            if (MPI_Wtime() - began < least) least = MPI_Wtime() - began;
        }
        if (me->ranks.rank == 0)
            printf("%d ranks: the sum of %7zu floats %8.1f us\n", me->ranks.ranks, counts[c], 1e6 * least);
    }
    free(x);
}

/* The rank with the bad label is told, all skip the step and go on alike. */
static void check_label(rank *me) {
    mpt_model *net = perceptron(me, 0);
    const int bad = me->ranks.rank == 1;
    float *weights = (float *)malloc(mpt_params_count(mpt_model_params(net), 0) * sizeof *weights);
    float low, high;
    int s;
    for (s = 0; s < STEPS; s++) {
        const mpt_result r = step(me, net, bad && s == 1 ? 99 : 1);
        check(me, r == (bad && s == 1 ? MPT_ERROR_VALUE : MPT_OK), "a step with a bad label on rank 1");
        if (r != MPT_OK) check(me, strstr(mpt_why(me->ctx), "label 99") != NULL, "the reason");
    }
    check(me, mpt_steps_applied(net) == STEPS - 1 && mpt_steps_skipped(net) == 1, "steps");
    if (!weights || mpt_params_get(mpt_model_params(net), 0, weights) != MPT_OK) exit(1);
    MPI_Allreduce(&weights[7], &low, 1, MPI_FLOAT, MPI_MIN, MPI_COMM_WORLD);
    MPI_Allreduce(&weights[7], &high, 1, MPI_FLOAT, MPI_MAX, MPI_COMM_WORLD);
    check(me, low == high, "ranks have different weights");
    free(weights);
    mpt_model_free(net);
}

/* MPI refuses the communicator: the step ends with MPI's words. */
static void check_error(rank *me) {
    mpt_model *net = perceptron(me, 0);
    MPI_Comm kept = me->mpi.comm;
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_set_errhandler(MPI_COMM_SELF, MPI_ERRORS_RETURN);
    me->mpi.comm = MPI_COMM_NULL;
    check(me, step(me, net, 1) == MPT_ERROR_DEVICE, "a step without a communicator");
    check(me, strstr(mpt_why(me->ctx), "failed: MPI_Sendrecv: ") && strstr(mpt_why(me->ctx), "communicator"), "why");
    if (me->ranks.rank == 0) printf("%s\n", mpt_why(me->ctx));
    me->mpi.comm = kept;
    mpt_model_free(net);
}

/* The last rank dies in the midst of training, for which the others wait. */
static void die(rank *me) {
    mpt_model *net = perceptron(me, 0);
    check(me, step(me, net, 1) == MPT_OK, "step");
    if (me->ranks.rank == me->ranks.ranks - 1) raise(SIGKILL);
    step(me, net, 1);
    printf("rank %d goes on without the dead one\n", me->ranks.rank);
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*run)(rank *me);
    } parts[] = {
        {"sum", check_sum},    {"shards", check_shards}, {"bytes", check_bytes}, {"shard_bytes", check_shard_bytes},
        {"time", print_times}, {"label", check_label},   {"error", check_error}, {"killed", die}};
    mpt_context_desc desc = MPT_ZERO;
    rank me = MPT_ZERO;
    size_t i;
    int level;
    desc.threads = 1;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
    me.ctx = mpt_open(&desc);
    if (!me.ctx || mpi_ranks(&me.mpi, me.ctx, MPI_COMM_WORLD, &me.ranks) != MPT_OK) return 1;
    for (i = 0; i < sizeof parts / sizeof *parts; i++)
        if (argc > 1 && strcmp(argv[1], parts[i].name) == 0) parts[i].run(&me);
    mpi_ranks_free(&me.mpi);
    mpt_close(me.ctx);
    MPI_Finalize();
    return me.failed > 0;
}
