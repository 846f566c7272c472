/* nccl.cuh - the calls of mpt_ranks over NCCL: GPUs of one machine or of many train one model together. Each rank has
   one GPU and is a process or a thread.

       cuda.stream = stream;                 the context's stream is yours; cuda.device is this rank's
       ctx = mpt_cuda_open(&cuda);
       if (rank == 0) ncclGetUniqueId(&id);  then send it to the other ranks, for example by MPI_Bcast
       if (nccl_ranks(&nccl, ctx, &cuda, id, rank, ranks, &train.ranks) != MPT_OK) puts(mpt_why(ctx));
       ...                                   build, train, free the model
       nccl_ranks_free(&nccl);

   Include it after mpt_cuda.cuh, compile with nvcc, link with -lnccl; NCCL 2.9 or later. All work is put on the
   context's stream, so that it is part of a recorded step. ncclAllReduce sums two ranks. With more ranks it would add
   in an order of its own; then each rank owns a part of the array, receives what the others have there, adds it in the
   order that mpt_ranks prescribes, and sends its sums to all. A rank sends 2 (R - 1) / R of the array's bytes, the
   least for such a sum. Set NCCL_GRAPH_REGISTER=0 before the start: a rank that has to skip a step joins the others'
   graphs with separate calls, which can hang if NCCL registers the buffers of graphs. */

#ifndef MPT_NCCL_CUH
#define MPT_NCCL_CUH
#include <nccl.h>
#if NCCL_VERSION_CODE < 20900
#error "nccl.cuh needs NCCL 2.9 or later"
#endif

enum {
    NCCL_RANKS_ROOM = 1 << 22,
    NCCL_RANKS_FEW = 16,  /* a sum that takes at most this part of the room is one exchange instead of two */
    NCCL_RANKS_MOST = 512 /* ranks: the square root of that part of the room, so that a float each always fits */
};

typedef struct nccl_adapter {
    mpt_context *ctx; /* stores the reason of a failed call; like the stream, it is not owned */
    cudaStream_t stream;
    ncclComm_t comm;
    int rank, ranks;
    size_t room;  /* floats that are summed at a time */
    float *parts; /* device (room): a piece of this rank's part, as each rank has it */
    size_t begin[NCCL_RANKS_MOST + 1]; /* the parts of a sum, see mpt_ranks */
} nccl_adapter;

static mpt_result nccl_ranks_check(const nccl_adapter *a, const char *call, ncclResult_t error) {
    if (error == ncclSuccess) return MPT_OK;
#if NCCL_VERSION_CODE >= 21300
    return mpt_fail(a->ctx, MPT_ERROR_DEVICE, "%s: %s: %s", call, ncclGetErrorString(error), ncclGetLastError(a->comm));
#else
    return mpt_fail(a->ctx, MPT_ERROR_DEVICE, "%s: %s", call, ncclGetErrorString(error));
#endif
}

/* x(n) = the sums over the ranks of parts(ranks,n), which it overwrites */
static __global__ void nccl_ranks_add(float *parts, int ranks, size_t n, float *x) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        for (int width = 1; width < ranks; width *= 2)
            for (int r = 0; r + width < ranks; r += 2 * width) parts[r * n + i] += parts[(r + width) * n + i];
        x[i] = parts[i];
    }
}

/* The same on the context's stream */
static mpt_result nccl_ranks_added(const nccl_adapter *a, float *x, size_t n) {
    const size_t blocks = (n + 255) / 256;
    nccl_ranks_add<<<(unsigned)(blocks < 1024 ? blocks : 1024), 256, 0, a->stream>>>(a->parts, a->ranks, n, x);
    const cudaError_t e = cudaGetLastError();
    return e == cudaSuccess ? MPT_OK : mpt_fail(a->ctx, MPT_ERROR_DEVICE, "nccl_ranks_add: %s", cudaGetErrorString(e));
}

/* For few floats: every rank receives those of all and adds them. */
static mpt_result nccl_ranks_sum_few(const nccl_adapter *a, float *x, size_t n) {
    const mpt_result r =
        nccl_ranks_check(a, "ncclAllGather", ncclAllGather(x, a->parts, n, ncclFloat32, a->comm, a->stream));
    return r == MPT_OK ? nccl_ranks_added(a, x, n) : r;
}

/* At most `most` elements of rank r's part after its first `at`: returns how many; *from is the first one's index. */
static size_t nccl_ranks_some(const size_t *begin, int r, size_t at, size_t most, size_t *from) {
    const size_t owned = begin[r + 1] - begin[r], passed = at < owned ? at : owned;
    *from = begin[r] + passed;
    return owned - passed < most ? owned - passed : most;
}

/* Adds up as many elements of each rank's part as there is room for, from element `at` of the part on. */
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
    else if (a->comm) ncclCommAbort(a->comm); /* does not wait for other ranks */
    a->comm = NULL;
    cudaFree(a->parts);
    a->parts = NULL;
}

/* Fills *out for a model of ctx, which was opened with *desc. Every rank must call it; it waits for all of them. Makes
   desc->device the current device. *a must not move while the model exists; then free it with nccl_ranks_free. After an
   error there is nothing to free. */
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
