/* mpi.h - the calls of mpt_ranks over MPI: processes on one machine or on many train one model together.

       mpi_adapter mpi;
       MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);   mpt has threads; one of them calls MPI
       if (mpi_ranks(&mpi, ctx, MPI_COMM_WORLD, &train.ranks) != MPT_OK) puts(mpt_why(ctx));
       ...                                                           build, train, free the model
       mpi_ranks_free(&mpi);
       MPI_Finalize();

   Include it after mpt.h. The context must be one of the CPU, whose arrays are in host memory. In a sum over R ranks
   each rank owns an R-th of the array. It receives what the others have there, adds it in the order that mpt_ranks
   prescribes, and sends its sums to all. All messages are MPI_Sendrecv, so the bits do not depend on the MPI that is
   installed. A rank sends 2 (R - 1) / R of the array's bytes, the least for a sum that every rank receives. Keep this
   file out of the include path, where <mpi.h> would find it. C99 or C++11. */

#ifndef MPT_MPI_H
#define MPT_MPI_H
#define OMPI_SKIP_MPICXX 1  /* the C++ bindings, which MPI 3 removed */
#define MPICH_SKIP_MPICXX 1 /* the same */
#include <mpi.h>
#ifndef MPI_VERSION
#error "<mpi.h> is this file and not MPI's: take its folder out of the include path"
#endif
#include <stdlib.h>
#include <string.h>

enum { MPI_RANKS_FLOATS = 1 << 20 }; /* of all ranks together, that a rank adds up at a time; at least one of each */

typedef struct mpi_adapter {
    mpt_context *ctx; /* stores the reason of a failed call; not owned */
    MPI_Comm comm;    /* a duplicate, which returns errors and keeps these messages apart from the program's own */
    int rank, ranks;
    size_t *begin; /* (ranks + 1): the parts of a sum, see mpt_ranks */
    float *parts;  /* (MPI_RANKS_FLOATS), behind `begin`: a piece of this rank's part, as each rank has it */
} mpi_adapter;

static mpt_result mpi_ranks_check(mpt_context *ctx, const char *call, int error) {
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    if (error == MPI_SUCCESS) return MPT_OK;
    MPI_Error_string(error, text, &length);
    return mpt_fail(ctx, MPT_ERROR_DEVICE, "%s: %s", call, text);
}

/* At most `most` elements of rank r's part after its first `at`: returns how many; *from is the first one's index. */
static int mpi_ranks_some(const size_t *begin, int r, size_t at, size_t most, size_t *from) {
    const size_t end = begin[r + 1], left = end - begin[r] < at ? 0 : end - begin[r] - at;
    *from = end - left;
    return (int)(left < most ? left : most);
}

/* x(n) = the sums over the ranks of parts(ranks,most) */
static void mpi_ranks_add(const mpi_adapter *a, size_t most, float *x, size_t n) {
    const size_t ranks = (size_t)a->ranks;
    size_t width, r, i;
    memcpy(a->parts + (size_t)a->rank * most, x, n * sizeof *x);
    for (width = 1; width < ranks; width *= 2)
        for (r = 0; r + width < ranks; r += 2 * width)
            for (i = 0; i < n; i++) a->parts[r * most + i] += a->parts[(r + width) * most + i];
    memcpy(x, a->parts, n * sizeof *x);
}

/* Every rank exchanges pieces of x with every other. add 0: it sends its own part, so that all ranks have the whole x
   in the end. add 1: it sends each rank that rank's part, and adds up its own. Elements have `size` bytes. */
static mpt_result mpi_ranks_exchange(const mpi_adapter *a, char *x, const size_t *begin, size_t size, int add) {
    const size_t most = MPI_RANKS_FLOATS / (size_t)a->ranks;
    size_t at, mine, out, in, longest = 0;
    int r, away, error = MPI_SUCCESS;
    for (r = 0; r < a->ranks; r++) longest = begin[r + 1] - begin[r] > longest ? begin[r + 1] - begin[r] : longest;
    for (at = 0; at < longest && error == MPI_SUCCESS; at += most) {
        const int owned = mpi_ranks_some(begin, a->rank, at, most, &mine);
        for (away = 1; away < a->ranks && error == MPI_SUCCESS; away++) {
            const int to = (a->rank + away) % a->ranks, from = (a->rank + a->ranks - away) % a->ranks;
            const int given = mpi_ranks_some(begin, add ? to : a->rank, at, most, &out);
            const int taken = mpi_ranks_some(begin, add ? a->rank : from, at, most, &in);
            char *place = add ? (char *)(a->parts + (size_t)from * most) : x + in * size;
            error = MPI_Sendrecv(x + out * size, given * (int)size, MPI_BYTE, to, 0, place, taken * (int)size, MPI_BYTE,
                                 from, 0, a->comm, MPI_STATUS_IGNORE);
        }
        if (add && error == MPI_SUCCESS) mpi_ranks_add(a, most, (float *)(void *)x + mine, (size_t)owned);
    }
    return mpi_ranks_check(a->ctx, "MPI_Sendrecv", error);
}

static mpt_result mpi_ranks_reduce_scatter(void *user, float *x, const size_t *begin) {
    return mpi_ranks_exchange((const mpi_adapter *)user, (char *)x, begin, sizeof *x, 1);
}

static mpt_result mpi_ranks_all_gather(void *user, void *x, const size_t *begin, size_t size) {
    return mpi_ranks_exchange((const mpi_adapter *)user, (char *)x, begin, size, 0);
}

static mpt_result mpi_ranks_sum(void *user, float *x, size_t n) {
    const mpi_adapter *a = (const mpi_adapter *)user;
    const size_t ranks = (size_t)a->ranks;
    mpt_result result;
    size_t r;
    for (r = 0; r <= ranks; r++) a->begin[r] = n / ranks * r + n % ranks * r / ranks;
    result = mpi_ranks_reduce_scatter(user, x, a->begin);
    return result == MPT_OK ? mpi_ranks_all_gather(user, x, a->begin, sizeof *x) : result;
}

static void mpi_ranks_free(mpi_adapter *a) {
    MPI_Comm_free(&a->comm);
    free(a->begin);
}

/* Fills *out for a model of ctx. Every rank of comm must call it. *a must not move while the model exists; then free it
   with mpi_ranks_free. After an error there is nothing to free. */
static mpt_result mpi_ranks(mpi_adapter *a, mpt_context *ctx, MPI_Comm comm, mpt_ranks *out) {
    const int error = MPI_Comm_dup(comm, &a->comm);
    if (error != MPI_SUCCESS) return mpi_ranks_check(ctx, "MPI_Comm_dup", error);
    MPI_Comm_set_errhandler(a->comm, MPI_ERRORS_RETURN);
    MPI_Comm_rank(a->comm, &a->rank);
    MPI_Comm_size(a->comm, &a->ranks);
    a->ctx = ctx;
    a->begin = (size_t *)malloc(((size_t)a->ranks + 1) * sizeof *a->begin + MPI_RANKS_FLOATS * sizeof *a->parts);
    if (!a->begin) {
        mpi_ranks_free(a);
        return mpt_fail(ctx, MPT_ERROR_NO_MEMORY, "mpi_ranks: no memory");
    }
    a->parts = (float *)(void *)(a->begin + a->ranks + 1);
    out->rank = a->rank;
    out->ranks = a->ranks;
    out->sum = mpi_ranks_sum;
    out->reduce_scatter = mpi_ranks_reduce_scatter;
    out->all_gather = mpi_ranks_all_gather;
    out->user = a;
    return MPT_OK;
}

#endif
