/* mpi.h - the sum of mpt_ranks over MPI: processes on one machine or on many train one model together.

       mpi_adapter mpi;
       MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);   mpt has threads; one of them calls MPI
       if (mpi_ranks(&mpi, ctx, MPI_COMM_WORLD, &train.ranks) != MPT_OK) puts(mpt_why(ctx));
       ...                                                           build, train, free the model
       mpi_ranks_free(&mpi);
       MPI_Finalize();

   Include it after mpt.h. The context is one of the CPU: arrays are in host memory. In a sum over R ranks each owns an
   R-th of the array, gets the others' parts of it by MPI_Sendrecv, adds them in the order that mpt_ranks names, and
   hands its sum to all by MPI_Allgather. So the bits do not depend on the MPI that is installed; and a rank sends
   2 (R - 1) / R of the array's bytes, the least for a sum that every rank gets. Keep this file out of the include path,
   where <mpi.h> would find it. C99 or C++11.                                                                         */

#ifndef MPT_MPI_H
#define MPT_MPI_H
#define OMPI_SKIP_MPICXX 1  /* C++ bindings, which MPI 3 has no longer */
#define MPICH_SKIP_MPICXX 1 /* the same */
#include <mpi.h>
#ifndef MPI_VERSION
#error "<mpi.h> is this file and not MPI's: take its folder out of the include path"
#endif
#include <stdlib.h>
#include <string.h>

enum { MPI_RANKS_FLOATS = 1 << 20 }; /* of the array, summed at a time; not fewer than ranks */

typedef struct mpi_adapter {
    mpt_context *ctx; /* is told the reason of a failed call; not owned */
    MPI_Comm comm;    /* a duplicate: errors are returned, and no message of others is taken for one of the sum */
    int rank, ranks;
    float *parts; /* MPI_RANKS_FLOATS: the part that this rank owns as each rank has it; then the sums of all parts */
} mpi_adapter;

static mpt_result mpi_ranks_check(mpt_context *ctx, const char *call, int error) {
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    if (error == MPI_SUCCESS) return MPT_OK;
    MPI_Error_string(error, text, &length);
    return mpt_fail(ctx, MPT_ERROR_DEVICE, "%s: %s", call, text);
}

/* One piece: x(n), n <= MPI_RANKS_FLOATS. The last parts may be shorter, or empty. */
static mpt_result mpi_ranks_sum_piece(const mpi_adapter *a, float *x, int n) {
    const int ranks = a->ranks, most = (n - 1) / ranks + 1; /* floats in a part */
    const int first = a->rank * most < n ? a->rank * most : n;
    const int owned = n - first < most ? n - first : most;
    int away, width, r, i, error = MPI_SUCCESS;
    memcpy(a->parts + a->rank * most, x + first, (size_t)owned * sizeof *x);
    for (away = 1; away < ranks && error == MPI_SUCCESS; away++) {
        const int to = (a->rank + away) % ranks, from = (a->rank + ranks - away) % ranks;
        const int begin = to * most < n ? to * most : n;
        const int count = n - begin < most ? n - begin : most;
        error = MPI_Sendrecv(x + begin, count, MPI_FLOAT, to, 0, a->parts + from * most, owned, MPI_FLOAT, from, 0,
                             a->comm, MPI_STATUS_IGNORE);
    }
    if (error != MPI_SUCCESS) return mpi_ranks_check(a->ctx, "MPI_Sendrecv", error);
    for (width = 1; width < ranks; width *= 2)
        for (r = 0; r + width < ranks; r += 2 * width)
            for (i = 0; i < owned; i++) a->parts[r * most + i] += a->parts[(r + width) * most + i];
    memmove(a->parts + a->rank * most, a->parts, (size_t)owned * sizeof *x);
    error = MPI_Allgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, a->parts, most, MPI_FLOAT, a->comm);
    memcpy(x, a->parts, (size_t)n * sizeof *x);
    return mpi_ranks_check(a->ctx, "MPI_Allgather", error);
}

static mpt_result mpi_ranks_sum(void *user, float *x, size_t n) {
    const mpi_adapter *a = (const mpi_adapter *)user;
    const size_t piece = (size_t)(MPI_RANKS_FLOATS / a->ranks) * (size_t)a->ranks;
    size_t at;
    for (at = 0; at < n; at += piece) {
        const mpt_result r = mpi_ranks_sum_piece(a, x + at, (int)(n - at < piece ? n - at : piece));
        if (r != MPT_OK) return r;
    }
    return MPT_OK;
}

static void mpi_ranks_free(mpi_adapter *a) {
    if (a->comm != MPI_COMM_NULL) MPI_Comm_free(&a->comm);
    free(a->parts);
    a->parts = NULL;
}

/* Fills *out for a model of ctx; every rank of comm calls it. *a must stay where it is until the model is freed, and is
   freed then; after an error there is nothing to free. */
static mpt_result mpi_ranks(mpi_adapter *a, mpt_context *ctx, MPI_Comm comm, mpt_ranks *out) {
    int error;
    a->ctx = ctx;
    a->comm = MPI_COMM_NULL;
    a->parts = (float *)calloc(MPI_RANKS_FLOATS, sizeof *a->parts);
    if (!a->parts) return mpt_fail(ctx, MPT_ERROR_NO_MEMORY, "mpi_ranks: no memory");
    error = MPI_Comm_dup(comm, &a->comm);
    if (error == MPI_SUCCESS) error = MPI_Comm_set_errhandler(a->comm, MPI_ERRORS_RETURN);
    if (error == MPI_SUCCESS) error = MPI_Comm_rank(a->comm, &a->rank);
    if (error == MPI_SUCCESS) error = MPI_Comm_size(a->comm, &a->ranks);
    if (error != MPI_SUCCESS) {
        mpi_ranks_free(a);
        return mpi_ranks_check(ctx, "mpi_ranks", error);
    }
    out->rank = a->rank;
    out->ranks = a->ranks;
    out->sum = mpi_ranks_sum;
    out->user = a;
    return MPT_OK;
}

#endif
