/* nccl.cuh - the calls of mpt_ranks over NCCL: GPUs of one machine or of many train one model together, a rank each, as
   processes or as threads.

       cuda.stream = stream;                 the context's stream is yours; cuda.device is this rank's
       ctx = mpt_cuda_open(&cuda);
       if (rank == 0) ncclGetUniqueId(&id);  and to the other ranks, as by MPI_Bcast
       if (nccl_ranks(&nccl, ctx, &cuda, id, rank, ranks, &train.ranks) != MPT_OK) puts(mpt_why(ctx));
       ...                                   build, train, free the model
       nccl_ranks_free(&nccl);

   Include it after mpt_cuda.cuh, compile with nvcc, link with -lnccl; NCCL 2.9 or later. All is put on the context's
   stream, so that it is part of a recorded step. Two ranks are summed by ncclAllReduce. That adds more of them in an
   order of its own, so there each rank owns a part of the array, gets the others' parts of it, adds them in the order
   that mpt_ranks names, and hands its sums to all: a rank sends 2 (R - 1) / R of the array's bytes, the least for such
   a sum. Set NCCL_GRAPH_REGISTER=0 before the start: a rank that has to skip a step joins the others'
   graphs by calls of its own, and may not be waited for when NCCL registers what graphs use.                         */

#ifndef MPT_NCCL_CUH
#define MPT_NCCL_CUH
#include <nccl.h>
#if NCCL_VERSION_CODE < 20900
#error "nccl.cuh needs NCCL 2.9 or later"
#endif

enum {
    NCCL_RANKS_ROOM = 1 << 22,
    NCCL_RANKS_FEW = 16,  /* this part of the room, of all ranks together, is not worth two exchanges */
    NCCL_RANKS_MOST = 512 /* ranks: its square is that part */
};

typedef struct nccl_adapter {
    mpt_context *ctx; /* is told the reason of a failed call; not owned, nor is the stream */
    cudaStream_t stream;
    ncclComm_t comm;
    int rank, ranks;
    size_t room;  /* floats that are summed at a time */
    float *parts; /* device (room), what this rank adds up, as each rank has it */
    size_t begin[NCCL_RANKS_MOST + 1]; /* of a sum: see mpt_ranks */
} nccl_adapter;

static mpt_result nccl_ranks_check(const nccl_adapter *a, const char *call, ncclResult_t error) {
    if (error == ncclSuccess) return MPT_OK;
#if NCCL_VERSION_CODE >= 21300
    return mpt_fail(a->ctx, MPT_ERROR_DEVICE, "%s: %s: %s", call, ncclGetErrorString(error), ncclGetLastError(a->comm));
#else
    return mpt_fail(a->ctx, MPT_ERROR_DEVICE, "%s: %s", call, ncclGetErrorString(error));
#endif
}

/* x(n) = the sums of parts(ranks,n), which are lost */
static __global__ void nccl_ranks_add(float *parts, int ranks, size_t n, float *x) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        for (int width = 1; width < ranks; width *= 2)
            for (int r = 0; r + width < ranks; r += 2 * width) parts[r * n + i] += parts[(r + width) * n + i];
        x[i] = parts[i];
    }
}

/* x(n) from what all ranks have brought to parts(ranks,n) */
static mpt_result nccl_ranks_added(const nccl_adapter *a, float *x, size_t n) {
    const size_t blocks = (n + 255) / 256;
    nccl_ranks_add<<<(unsigned)(blocks < 1024 ? blocks : 1024), 256, 0, a->stream>>>(a->parts, a->ranks, n, x);
    const cudaError_t e = cudaGetLastError();
    return e == cudaSuccess ? MPT_OK : mpt_fail(a->ctx, MPT_ERROR_DEVICE, "nccl_ranks_add: %s", cudaGetErrorString(e));
}

/* Few floats: every rank adds those of all. */
static mpt_result nccl_ranks_sum_few(const nccl_adapter *a, float *x, size_t n) {
    const mpt_result r =
        nccl_ranks_check(a, "ncclAllGather", ncclAllGather(x, a->parts, n, ncclFloat32, a->comm, a->stream));
    return r == MPT_OK ? nccl_ranks_added(a, x, n) : r;
}

/* What rank r owns, but for its first `at` elements: at most `most`, from *from on */
static size_t nccl_ranks_some(const size_t *begin, int r, size_t at, size_t most, size_t *from) {
    const size_t owned = begin[r + 1] - begin[r], passed = at < owned ? at : owned;
    *from = begin[r] + passed;
    return owned - passed < most ? owned - passed : most;
}

/* Element `at` and those behind it of what each rank owns: as many as there is room for */
static mpt_result nccl_ranks_scatter_some(const nccl_adapter *a, float *x, const size_t *begin, size_t at) {
    const size_t most = a->room / (size_t)a->ranks;
    size_t mine, from;
    const size_t owned = nccl_ranks_some(begin, a->rank, at, most, &mine);
    ncclResult_t error = ncclGroupStart();
    for (int r = 0; r < a->ranks && error == ncclSuccess; r++) {
        const size_t n = nccl_ranks_some(begin, r, at, most, &from);
        if (n) error = ncclSend(x + from, n, ncclFloat32, r, a->comm, a->stream);
        if (owned && error == ncclSuccess)
            error = ncclRecv(a->parts + (size_t)r * owned, owned, ncclFloat32, r, a->comm, a->stream);
    }
    const ncclResult_t ended = ncclGroupEnd();
    const mpt_result r = nccl_ranks_check(a, "ncclSend, ncclRecv", error != ncclSuccess ? error : ended);
    return r == MPT_OK && owned ? nccl_ranks_added(a, x + mine, owned) : r;
}

static mpt_result nccl_ranks_reduce_scatter(void *user, float *x, const size_t *begin) {
    const nccl_adapter *a = (const nccl_adapter *)user;
    mpt_result result = MPT_OK;
    size_t most = 0;
    for (int r = 0; r < a->ranks; r++)
        if (begin[r + 1] - begin[r] > most) most = begin[r + 1] - begin[r];
    for (size_t at = 0; at < most && result == MPT_OK; at += a->room / (size_t)a->ranks)
        result = nccl_ranks_scatter_some(a, x, begin, at);
    return result;
}

static mpt_result nccl_ranks_all_gather(void *user, void *x, const size_t *begin, size_t size) {
    const nccl_adapter *a = (const nccl_adapter *)user;
    ncclResult_t error = ncclGroupStart();
    for (int r = 0; r < a->ranks && error == ncclSuccess; r++) {
        char *row = (char *)x + begin[r] * size;
        const size_t bytes = (begin[r + 1] - begin[r]) * size;
        if (bytes) error = ncclBroadcast(row, row, bytes, ncclInt8, r, a->comm, a->stream);
    }
    const ncclResult_t ended = ncclGroupEnd();
    return nccl_ranks_check(a, "ncclBroadcast", error != ncclSuccess ? error : ended);
}

static mpt_result nccl_ranks_sum(void *user, float *x, size_t n) {
    nccl_adapter *a = (nccl_adapter *)user;
    const size_t ranks = (size_t)a->ranks;
    ncclResult_t error, told = ncclSuccess;
    error = ncclCommGetAsyncError(a->comm, &told);
    mpt_result r = nccl_ranks_check(a, "an earlier call", error != ncclSuccess ? error : told);
    if (ranks == 2 && n && r == MPT_OK)
        return nccl_ranks_check(a, "ncclAllReduce", ncclAllReduce(x, x, n, ncclFloat32, ncclSum, a->comm, a->stream));
    if (!n || r != MPT_OK) return r;
    if (n * ranks <= a->room / NCCL_RANKS_FEW) return nccl_ranks_sum_few(a, x, n);
    for (size_t i = 0; i <= ranks; i++) a->begin[i] = n / ranks * i + (i < n % ranks ? i : n % ranks);
    r = nccl_ranks_reduce_scatter(a, x, a->begin);
    return r == MPT_OK ? nccl_ranks_all_gather(a, x, a->begin, sizeof *x) : r;
}

static void nccl_ranks_free(nccl_adapter *a) {
    ncclResult_t told = ncclSuccess;
    if (a->comm && ncclCommGetAsyncError(a->comm, &told) == ncclSuccess && told == ncclSuccess)
        ncclCommDestroy(a->comm);
    else if (a->comm) ncclCommAbort(a->comm); /* it waits for nobody */
    a->comm = NULL;
    cudaFree(a->parts);
    a->parts = NULL;
}

/* Fills *out for a model of ctx, which was opened by *desc; every rank calls it, and each waits for all. desc->device
   is the current one from here on. *a must stay where it is until the model is freed, and is freed then; after an error
   there is nothing to free. */
static mpt_result nccl_ranks(nccl_adapter *a, mpt_context *ctx, const mpt_cuda_desc *desc, ncclUniqueId id, int rank,
                             int ranks, mpt_ranks *out) {
    const nccl_adapter adapter = {ctx, (cudaStream_t)desc->stream, NULL, rank, ranks, NCCL_RANKS_ROOM, NULL, {0}};
    *a = adapter;
    if (!desc->stream || ranks > NCCL_RANKS_MOST)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "nccl_ranks: %d ranks, at most %d, or desc->stream is NULL", ranks,
                        NCCL_RANKS_MOST);
    cudaError_t e = cudaSetDevice(desc->device);
    if (e == cudaSuccess) e = cudaMalloc((void **)&a->parts, a->room * sizeof(float));
    if (e != cudaSuccess) return mpt_fail(ctx, MPT_ERROR_NO_MEMORY, "nccl_ranks: %s", cudaGetErrorString(e));
    const mpt_result r = nccl_ranks_check(a, "ncclCommInitRank", ncclCommInitRank(&a->comm, ranks, id, rank));
    if (r != MPT_OK) {
        nccl_ranks_free(a);
        return r;
    }
    out->rank = rank;
    out->ranks = ranks;
    out->sum = nccl_ranks_sum;
    out->reduce_scatter = nccl_ranks_reduce_scatter;
    out->all_gather = nccl_ranks_all_gather;
    out->user = a;
    out->on_stream = 1;
    return MPT_OK;
}

#endif
