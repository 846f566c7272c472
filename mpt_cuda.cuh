/* mpt_cuda.cuh - the CUDA backend of mpt.h: the same training on Tensor Cores.            version 0.2.0, MIT licence

   One .cu file holds the implementation. It may hold that of mpt.h as well,

       #define MPT_IMPLEMENTATION
       #include "mpt.h"
       #include "mpt_cuda.cuh"

   or only this one, when a C file of your program defines MPT_IMPLEMENTATION:

       #define MPT_CUDA_IMPLEMENTATION
       #include "mpt_cuda.cuh"

   Every other file, also plain C, just includes this header, which includes mpt.h. Link with cuBLAS:

       nvcc -O2 -arch=all-major program.cu -o program -lcublas -lcublasLt

   and from a C project through a static library:

       libmpt_cuda.a: mpt_cuda.cu
               nvcc -O2 -arch=all-major -c $< -o mpt_cuda.o && ar rcs $@ mpt_cuda.o
       program: program.c libmpt_cuda.a
               cc -O2 $^ -o $@ -L/usr/local/cuda/lib64 -Wl,-rpath,/usr/local/cuda/lib64 \
                   -lcublas -lcublasLt -lcudart -lstdc++ -lm -pthread

   CONTENTS   search for "==== NAME"
     MANUAL            what differs from the CPU, requirements, errors, memory, order of work
     API               mpt_cuda_desc, mpt_cuda_open
     - stop here if you only want the API -
     DEVICE            state of a context, errors, memory, uploads, scratch
     PACKS             eight elements of any type at a time, the loop over them, the last block of a launch
     ELEMENTWISE       cast, activation and its gradient, sum of two arrays, dropout, what comes after a product
     COLUMNS           sums over the rows of a matrix: bias gradients, and parts of what follows
     PRODUCTS          gemm by cuBLAS, epilogues; convolution as gather and gemm, as one kernel, depthwise
     NORMALISATION     statistics, forward, backward, running statistics
     REDUCTIONS        scan, histogram, losses
     POOLING           max and average, forward and backward; pixels that stand for several
     RANKS             what a step has from other ranks
     OPTIMIZER         check, update with clipping, loss scale
     STEPS             training steps recorded once and launched as a graph
     TABLE             the backend, opening and closing

   ==== MANUAL ====

   1. Use. Call mpt_cuda_open(NULL) instead of mpt_open(NULL); everything else is the API of mpt.h. The arrays that
   floors 1 and 2 take, including labels and targets, must be in device memory: mpt_alloc, mpt_upload, mpt_download. A
   model takes host arrays as on the CPU, or inputs in device memory (mpt_input_desc).

   2. Requirements. CUDA 11.8 or later and a GPU of compute capability 7.5 or later. -arch=all-major builds for all of
   them and adds PTX, which newer devices compile themselves; -arch=native builds only for this machine's GPU, in a
   fraction of the time. A device for which there is only PTX takes seconds at the first start. Without -O2 nvcc
   compiles the host code at -O0. Do not pass --use_fast_math, which flushes subnormals; a context that opens in such a
   build logs this. mpt reads no environment variables, but CUDA does: CUDA_VISIBLE_DEVICES and others.

   3. Order of work. All calls put their work on one stream and return; only calls that return something to the host
   (download, scan, histogram, states, loss, metrics) wait for it. Uploads copy your array into pinned memory before
   they return. Put your own work on the arrays on the same stream, which you give in mpt_cuda_desc. The device that is
   current before a call is current after it, if the program has used it; otherwise the context's device stays current,
   because switching back to an unused device would create a context there.

   4. Numbers. Products accumulate in fp32 (reduced-precision split-K is disabled) and round once; fp32 products are
   fp32, or TF32 if asked for. Casts, scans, dropout, scaler and optimizers give the CPU's bits; the rest differs in the
   order of sums. All reductions have a fixed order that depends only on the shape: the same bits every time on the same
   device. Operations made only of correctly rounded arithmetic give the same bits on all devices: casts, scans,
   histograms, sums of arrays, ReLU, dropout, pools, scaler and optimizers. Products do not, nor does anything that the
   compiler may contract or that uses CUDA's exp, log, tanh or erf: other activations, norms, losses.

   5. Memory. Arrays come from cudaMalloc, not from desc.context.alloc, which serves the host side. Temporaries of
   convolutions share a block that grows in the first step, up to desc.workspace (and beyond it only if a single row, or
   with a stride the gradient of one image, needs more). A second block has the fp32 sums of products, and up to 32 MiB
   of parts of weight gradients with own_convolutions. A third one has operands of different types as fp32, and is as
   large as they are. After the first step nothing is allocated.

   6. Errors. An error of CUDA or cuBLAS becomes MPT_ERROR_NO_MEMORY or MPT_ERROR_DEVICE, with the call, file, line and
   the driver's text in mpt_why. Because work is asynchronous, a later call may report it; MPT_ERROR_DIVERGED may also
   come up to four steps late.

   7. Training steps. The second mpt_train_step of a model records its work as a CUDA graph; later steps are one launch,
   and an upload of the batch that overlaps with the step before. Learning rates, group settings, scale and weights may
   be set between steps. With ranks the sum over them is part of the graph if mpt_ranks.on_stream allows it;
   examples/nccl.cuh is such a sum. A range of the gradients (see bucket_bytes there) is summed on the context's stream
   while the backward pass goes on in a second one. */

#ifndef MPT_CUDA_H
#define MPT_CUDA_H

#include "mpt.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ==== API ==== */

typedef struct mpt_cuda_desc {
    mpt_context_desc context; /* allocator of the host side, log; threads is not used */
    int device;               /* number of the device, from 0 */
    void *stream;             /* a cudaStream_t of that device; NULL: the context creates one. Use
                                 cudaStreamNonBlocking: work on the default stream breaks the recording of other
                                 streams */
    void *cublas;             /* a cublasHandle_t of that device; NULL: the context creates one. Only the context may
                                 use it until mpt_close, which restores stream, math mode, pointer mode and workspace */
    size_t workspace;         /* most bytes of a block of temporaries, see manual 5; 0: 64 MiB or half of the device's
                                 L2 cache, whichever is less, but at least 8 MiB */
    int tf32;                 /* 1: fp32 products may round their operands to TF32 (10 bits of fraction) */
    int no_graph;             /* 1: training steps are not recorded: every kernel is launched separately */
    int own_convolutions;     /* 1: 16-bit convolutions without groups whose C and K are multiples of 8 in 16..128 run
                                 as one kernel of this file, instead of gathering a matrix that cuBLAS multiplies.
                                 Exceptions: 1x1 kernels with stride 1, and gradients of x with a larger stride. Needs
                                 compute capability 8.0 and code for it, otherwise logs this and uses cuBLAS.
                                 tests/cuda/probe.cu measures which is faster on a card */
} mpt_cuda_desc;

/* Opens a context on a GPU. desc may be NULL (all defaults); it is copied. Returns NULL if there is no device, the
   driver is too old, the build has no code for the device, there is too little memory, or desc is wrong;
   desc->context.log gets the reason. Close it with mpt_close. */
MPT_DEF mpt_context *mpt_cuda_open(const mpt_cuda_desc *desc);

#ifdef __cplusplus
} /* extern "C" */
#endif

/* ---------------------------- stop here if you only want the API ---------------------------- */

#endif /* MPT_CUDA_H */

#if (defined(MPT_IMPLEMENTATION) || defined(MPT_CUDA_IMPLEMENTATION)) && defined(__CUDACC__) && \
    !defined(MPT__CUDA_IMPLEMENTED)
#define MPT__CUDA_IMPLEMENTED

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <limits.h>
#include <stdlib.h>

#if CUDART_VERSION < 11080
#error "mpt_cuda.cuh needs CUDA 11.8 or later"
#endif

/* ==== DEVICE ==== */

enum {
    MPTC__THREADS = 256,      /* in a block */
    MPTC__WARP = 32,
    MPTC__WARPS = MPTC__THREADS / MPTC__WARP,
    MPTC__BLOCKS_EACH = 8,    /* blocks that fill a multiprocessor: 2048 threads */
    MPTC__MIRRORS = 16,       /* scalers whose state is mirrored on the host */
    MPTC__SLOTS = 2,          /* buffers that uploads use in turn */
    MPTC__GRAPHS = 8,         /* models whose steps are kept recorded */
    MPTC__TRIES = 3           /* attempts to record a model's step */
};

static const size_t mptc__align = 256;                    /* of the parts of the scratch block */
static const size_t mptc__staging_most = (size_t)64 << 20; /* longer uploads are made in pieces */

typedef struct mptc__slot { /* a buffer for uploads; or a feed, from which recorded steps read their batches */
    char *host;         /* pinned */
    char *device;       /* of a feed */
    size_t bytes;
    cudaEvent_t copied; /* recorded after the copy from host... */
    cudaEvent_t used;   /* ...and after the step */
} mptc__slot;

typedef struct mptc__graph { /* the steps of one model */
    mpt_update_op key;                 /* see begin in mpt_backend; state NULL: this place is free */
    size_t fed;                        /* bytes that a step is fed; 0: none has run yet */
    int resident;                      /* some of them are in device memory */
    cudaGraphExec_t exec[MPTC__SLOTS]; /* one that reads each feed; NULL: not recorded yet */
    int failures;                      /* failed recordings; after MPTC__TRIES the steps are launched call by call */
    uint64_t used;
} mptc__graph;

typedef enum mptc__mode { MPTC__DIRECT = 0, MPTC__RECORD, MPTC__REPLAY } mptc__mode;

typedef struct mptc__step { /* the current step, from begin to end */
    int open;
    mptc__mode mode; /* launches are made, recorded, or skipped because the graph has them */
    mptc__graph *graph;
    const void *staging;
    int turn, reads; /* feed of this step; feed that the calls read, the other one if they are only recorded */
    size_t fed;      /* bytes so far */
    int resident;    /* inputs are in device memory */
    int again;       /* nothing was done: all calls must be made once more... */
    int failed;      /* ...and launched, because recording them failed */
} mptc__step;

typedef struct mptc__sums { /* db(C) = sums over the rows of dy(rows,C) + beta db: the gradient of a bias */
    size_t rows, C;
    mpt_array dy, db;
    float beta;
} mptc__sums;

/* Work that is held back because the next call may be able to do it along with its own:

     work                    held as    taken by                                which then
     clearing few bytes      clear      an elementwise operation                clears them as well
     an upload in a step     to         its reader, a cast or a loss            reads the feed: no copy
     bias of logits          finish     their loss                              adds it while reading them
     gradient of a bias      bias       the product for the weights' gradient   computes it in its epilogue
     gradient of a pool      pool       the gradient of the ReLU before it      is applied before dx is stored
     product of few terms    few        the gradient of the ReLU before it      is applied before dx is stored
     gradient of a ReLU      slope      the pool before it                      applies it while reading dy
     running statistics      running    the gradient of the same norm           averages them with its sums
     update                  update     the scaler's update                     is done by its last block

   Any other call does held work first, in mptc__enter. */
typedef struct mptc__held {
    void *clear;     /* NULL: none is held */
    size_t cleared;  /* bytes there, a multiple of 4 */
    void *fed, *to;  /* a copy from fed to to; to NULL: none is held */
    size_t bytes;    /* of the copy */
    int finish;      /* 1: the bias of `product` is held */
    int bias;        /* 1: `sums` are held */
    int pool;        /* 1: `pooling` is held */
    int few;         /* 1: `product`, of few terms, is held */
    int slope;       /* 1: `sloped` is held */
    int running;     /* 1: `averages` are held */
    int update;      /* 1: the update of `step` is held */
    mpt_gemm_op product;
    mptc__sums sums;
    mpt_pool2d_op pooling;
    mpt_array pooled; /* y of a ReLU whose slope multiplies the dy of `pooling`; data NULL: none */
    mpt_map_op sloped;
    mpt_norm_op averages;
    mpt_update_op step;
} mptc__held;

enum { MPTC__PLAN_KEY = 15, MPTC__PLANS = 256 };

typedef struct mptc__plan { /* what cuBLASLt's heuristic said about a product with an epilogue */
    int key[MPTC__PLAN_KEY];
    int fuses;
    int apart; /* 1: it fuses, but separate column sums are faster */
    cublasLtMatmulAlgo_t algo;
} mptc__plan;

typedef struct mptc__block { /* device memory that grows on demand */
    char *at;
    size_t bytes;
} mptc__block;

typedef struct mptc__device {
    mpt_cuda_desc desc; /* defaults filled in */
    int processors;
    int own; /* 1: own_convolutions, and the device can run them */
    int (*context_state)(int device, unsigned *flags, int *active); /* of the driver: cuDevicePrimaryCtxGetState */
    cudaStream_t stream; /* of the calls: the context's, or `beside` while the context's sums gradients of all ranks */
    cudaStream_t beside, home; /* home: the context's stream while calls use `beside`; else NULL */
    cudaEvent_t turned;        /* makes one of the two wait for the other */
    cublasHandle_t cublas;
    cudaStream_t user_stream; /* settings of the user's handle, to be restored */
    cublasMath_t user_math;
    cublasPointerMode_t user_mode;
    mptc__block products;     /* workspace of cuBLAS and cuBLASLt: calls of one stream share it */
    mptc__block scratch;      /* temporaries of the current operation */
    mptc__block casts;        /* its operands in fp32 */
    mptc__block sums;         /* its products in fp32 */
    mptc__block rates;        /* mpt__rates of the tensors of an optimizer... */
    const void *rated;        /* ...with this state, unchanged since; NULL: not valid */
    char *zeros;              /* device, all 0 between launches: the meter of mptc__update_k, then the... */
    unsigned *tickets;        /* ...tickets of mptc__last_block, MPTC__SUM_BLOCKS of them */
    mptc__slot slots[MPTC__SLOTS];
    unsigned uploads;
    int32_t *stuck;           /* pinned: MPTC__MIRRORS copies of mpt_scaler_state.stuck */
    const mpt_scaler_state *mirrored[MPTC__MIRRORS];
    cudaStream_t feeder; /* copies feeds while steps run */
    cudaEvent_t arrived; /* recorded before a step: inputs in device memory are complete */
    mptc__slot feeds[MPTC__SLOTS];
    mptc__graph graphs[MPTC__GRAPHS];
    mptc__step step;
    mptc__held held;
    mptc__plan plans[MPTC__PLANS];
    uint64_t steps;
    int turn; /* the feed of the last step */
} mptc__device;

static mptc__device *mptc__of(const mpt_context *ctx) { return (mptc__device *)mpt_context_device(ctx); }

static size_t mptc__min(size_t a, size_t b) { return a < b ? a : b; }
static size_t mptc__divide_up(size_t a, size_t b) { return a / b + (a % b != 0); }
static size_t mptc__round_up(size_t a, size_t b) { return mptc__divide_up(a, b) * b; }

/* -- Errors -- */

/* Fails with the name of `call`, the line in this file, and the driver's text. */
static mpt_result mptc__failed(mpt_context *ctx, int memory, const char *call, int line, const char *text) {
    char name[64];
    size_t n = 0;
    for (; call[n] && call[n] != '(' && n + 1 < sizeof name; n++) name[n] = call[n];
    name[n] = 0;
    cudaGetLastError(); /* clears it: it is reported here */
    return mpt_fail(ctx, memory ? MPT_ERROR_NO_MEMORY : MPT_ERROR_DEVICE, "cuda: %s: %s (mpt_cuda.cuh:%d)", name, text,
                    line);
}

/* Each returns from the calling function when a call did not succeed. */
#define MPTC__TRY(call)                                        \
    do {                                                       \
        const mpt_result mptc__r = (call);                     \
        if (mptc__r != MPT_OK) return mptc__r;                 \
    } while (0)

static mpt_result mptc__cuda_result(mpt_context *ctx, cudaError_t e, const char *call, int line) {
    if (e == cudaSuccess) return MPT_OK;
    return mptc__failed(ctx, e == cudaErrorMemoryAllocation, call, line, cudaGetErrorString(e));
}
static mpt_result mptc__cublas_result(mpt_context *ctx, cublasStatus_t s, const char *call, int line) {
    if (s == CUBLAS_STATUS_SUCCESS) return MPT_OK;
    return mptc__failed(ctx, s == CUBLAS_STATUS_ALLOC_FAILED, call, line, cublasGetStatusString(s));
}

#define MPTC__CUDA(call) MPTC__TRY(mptc__cuda_result(ctx, (call), #call, __LINE__))
#define MPTC__CUBLAS(call) MPTC__TRY(mptc__cublas_result(ctx, (call), #call, __LINE__))

/* Launches a kernel on the context's stream, unless the graph has it already. */
template <typename... parameters, typename... arguments>
static mpt_result mptc__launch(mpt_context *ctx, const char *what, int line, void (*kernel)(parameters...), dim3 blocks,
                               dim3 threads, arguments... values) {
    const mptc__device *device = mptc__of(ctx);
    if (device->step.mode == MPTC__REPLAY) return MPT_OK;
    kernel<<<blocks, threads, 0, device->stream>>>(values...);
    return mptc__cuda_result(ctx, cudaGetLastError(), what, line);
}

#define MPTC__LAUNCH(kernel, blocks, threads, ...) \
    mptc__launch(ctx, "launch of " #kernel, __LINE__, kernel, blocks, threads, __VA_ARGS__)

/* The same with as many blocks as `work` threads need */
#define MPTC__SPREAD(kernel, work, ...) MPTC__LAUNCH(kernel, mptc__blocks(ctx, work), MPTC__THREADS, __VA_ARGS__)

/* Reports an error that was left by the caller as the caller's. "Not ready", the answer to a query, is no error. */
static mpt_result mptc__no_error(mpt_context *ctx) {
    const cudaError_t e = cudaGetLastError();
    if (e == cudaSuccess || e == cudaErrorNotReady) return MPT_OK;
    return mpt_fail(ctx, MPT_ERROR_DEVICE, "cuda: an error from before this call: %s", cudaGetErrorString(e));
}

/* Logs what makes this context slower or less exact than it could be, and why; no call fails. */
static void mptc__say(mpt_context *ctx, const char *what, const char *why) {
    const mpt_context_desc *host = &mptc__of(ctx)->desc.context;
    char text[256];
    size_t n = 0;
    for (; *what && n + 1 < sizeof text; what++) text[n++] = *what;
    for (; *why && n + 1 < sizeof text; why++) text[n++] = *why;
    text[n] = 0;
    if (host->log) host->log(MPT_LOG_INFO, text, host->user);
}

static mpt_result mptc__held_do(mpt_context *ctx);

/* Every operation starts with this. */
static mpt_result mptc__enter(mpt_context *ctx) {
    mptc__of(ctx)->rated = NULL;
    MPTC__TRY(mptc__no_error(ctx));
    return mptc__held_do(ctx);
}

/* For a call that does not read uploaded data: a held upload stays held. */
static mpt_result mptc__enter_beside(mpt_context *ctx) {
    mptc__held *held = &mptc__of(ctx)->held;
    void *to = held->to;
    held->to = NULL;
    const mpt_result r = mptc__enter(ctx);
    held->to = to;
    return r;
}

/* -- Memory -- */

/* Device memory, or pinned host memory; not cleared. NULL and a reason if it fails. */
static void *mptc__malloc(mpt_context *ctx, size_t bytes, int pinned) {
    void *p = NULL;
    size_t available = 0, total = 0;
    cudaError_t e = cudaErrorMemoryAllocation;
    if (bytes > (size_t)-1 / 2) p = NULL; /* CUDA would round it up to 0 */
    else if (pinned) e = cudaHostAlloc(&p, bytes, cudaHostAllocDefault);
    else e = cudaMalloc(&p, bytes);
    if (e == cudaSuccess) return p;
    cudaGetLastError(); /* clears it: it is reported here */
    if (e != cudaErrorMemoryAllocation) {
        mptc__failed(ctx, 0, "allocation", __LINE__, cudaGetErrorString(e));
    } else if (pinned) {
        mpt_fail(ctx, MPT_ERROR_NO_MEMORY, "cuda: out of memory: %zu bytes of pinned memory asked for", bytes);
    } else {
        cudaMemGetInfo(&available, &total);
        mpt_fail(ctx, MPT_ERROR_NO_MEMORY, "cuda: out of memory: %zu bytes asked for, %zu of %zu free on device %d",
                 bytes, available, total, mptc__of(ctx)->desc.device);
    }
    return NULL;
}

static mpt_result mptc__clear(mpt_context *ctx, void *p, size_t bytes) {
    if (mptc__of(ctx)->step.mode == MPTC__REPLAY) return MPT_OK;
    MPTC__CUDA(cudaMemsetAsync(p, 0, bytes, mptc__of(ctx)->stream));
    return MPT_OK;
}

static mpt_result mptc__zero(mpt_context *ctx, void *p, size_t bytes) {
    mptc__device *device = mptc__of(ctx);
    MPTC__TRY(mptc__enter_beside(ctx));
    if (!device->step.open || bytes % 4 || bytes > MPTC__THREADS * 4) return mptc__clear(ctx, p, bytes);
    device->held.clear = p; /* sums of losses; the batch is converted next */
    device->held.cleared = bytes;
    return MPT_OK;
}

static void *mptc__alloc(mpt_context *ctx, size_t bytes) {
    void *p = mptc__enter(ctx) == MPT_OK ? mptc__malloc(ctx, bytes, 0) : NULL;
    if (p && mptc__zero(ctx, p, bytes) != MPT_OK) {
        cudaFree(p);
        p = NULL;
    }
    return p;
}

static void mptc__graph_drop(mptc__graph *graph) {
    for (int i = 0; i < MPTC__SLOTS; graph->exec[i++] = NULL)
        if (graph->exec[i]) cudaGraphExecDestroy(graph->exec[i]);
}

/* Called before memory is freed that recorded steps use. */
static void mptc__graphs_drop(mptc__device *device) {
    for (int i = 0; i < MPTC__GRAPHS; i++) mptc__graph_drop(&device->graphs[i]);
}

static void mptc__release(mpt_context *ctx, void *p) {
    mptc__device *device = mptc__of(ctx);
    if (mptc__enter(ctx) == MPT_OK) cudaStreamSynchronize(device->stream);
    for (int i = 0; i < MPTC__MIRRORS; i++)
        if (device->mirrored[i] == p) device->mirrored[i] = NULL;
    for (int i = 0; i < MPTC__GRAPHS; i++) {
        if (device->graphs[i].key.state != p) continue; /* the state lives as long as the model */
        mptc__graph_drop(&device->graphs[i]);
        memset(&device->graphs[i], 0, sizeof device->graphs[i]);
    }
    cudaFree(p);
}

static mpt_result mptc__download(mpt_context *ctx, void *host, const void *from, size_t bytes) {
    MPTC__TRY(mptc__enter(ctx));
    MPTC__CUDA(cudaMemcpyAsync(host, from, bytes, cudaMemcpyDeviceToHost, mptc__of(ctx)->stream));
    MPTC__CUDA(cudaStreamSynchronize(mptc__of(ctx)->stream));
    return MPT_OK;
}

static mpt_result mptc__copy(mpt_context *ctx, void *to, const void *from, size_t bytes) {
    MPTC__TRY(mptc__enter_beside(ctx));
    if (mptc__of(ctx)->step.mode == MPTC__REPLAY) return MPT_OK;
    MPTC__CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, mptc__of(ctx)->stream));
    return MPT_OK;
}

/* Makes both slots at least this large. */
static mpt_result mptc__slots_grow(mpt_context *ctx, mptc__slot *slots, size_t bytes) {
    mptc__device *device = mptc__of(ctx);
    const size_t wanted = mptc__round_up(bytes, 65536);
    if (bytes <= slots[0].bytes && bytes <= slots[1].bytes) return MPT_OK;
    MPTC__CUDA(cudaStreamSynchronize(device->feeder));
    MPTC__CUDA(cudaStreamSynchronize(device->stream));
    mptc__graphs_drop(device);
    for (int i = 0; i < MPTC__SLOTS; i++) {
        mptc__slot *slot = &slots[i];
        cudaFreeHost(slot->host);
        cudaFree(slot->device);
        slot->bytes = 0;
        slot->host = slot->device = NULL;
        slot->host = (char *)mptc__malloc(ctx, wanted, 1);
        if (slots == device->feeds) slot->device = (char *)mptc__malloc(ctx, wanted, 0);
        if (!slot->host || (slots == device->feeds && !slot->device)) return MPT_ERROR_NO_MEMORY;
        slot->bytes = wanted;
    }
    return MPT_OK;
}

/* Waits until the host may overwrite what the copy before this event read; two uploads later this is nearly always so.
   The caller may be recording a stream of its own, where a query is allowed only in relaxed mode. */
static mpt_result mptc__await(mpt_context *ctx, cudaEvent_t copied) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    MPTC__CUDA(cudaThreadExchangeStreamCaptureMode(&mode));
    cudaError_t e = cudaEventQuery(copied);
    if (e == cudaErrorNotReady) {
        cudaGetLastError();
        e = cudaEventSynchronize(copied);
    }
    cudaThreadExchangeStreamCaptureMode(&mode);
    return mptc__cuda_result(ctx, e, "cudaEventSynchronize", __LINE__);
}

static mpt_result mptc__feed_take(mpt_context *ctx, mpt_feed_op *op);

/* Copies to pinned memory. Floats that are to be checked are checked page by page, while they are in the cache;
   op->first becomes the index of the first bad one. */
static void mptc__stage(char *to, const char *from, size_t bytes, mpt_feed_op *op) {
    const size_t page = 4096;
    if (!op->floats) {
        memcpy(to, from, bytes);
        return;
    }
    for (size_t i = 0; i < bytes && op->first == op->floats; i += page) {
        const size_t some = mptc__min(bytes - i, page), n = some / sizeof(float);
        memcpy(to + i, from + i, some);
        const float *x = (const float *)(from + i);
        const size_t bad = mpt__first_bad(x, n);
        if (bad < n) op->first = (size_t)(x - (const float *)op->x) + bad;
    }
}

/* Uploads through pinned memory, because an asynchronous copy from pageable memory would wait for the stream. In a
   step, held work does not depend on uploads and stays held. */
static mpt_result mptc__feed(mpt_context *ctx, mpt_feed_op *op) {
    mptc__device *device = mptc__of(ctx);
    const char *from = (const char *)op->x;
    char *at = (char *)op->staging;
    size_t bytes = op->in_device ? 0 : op->bytes;
    device->rated = NULL;
    op->at = op->in_device ? op->x : op->staging;
    op->first = op->floats;
    MPTC__TRY(device->step.open ? mptc__no_error(ctx) : mptc__enter(ctx));
    if (device->step.mode != MPTC__DIRECT) return mptc__feed_take(ctx, op);
    device->step.fed += mptc__round_up(op->bytes, mptc__align);
    device->step.resident |= op->in_device;
    MPTC__TRY(mptc__slots_grow(ctx, device->slots, mptc__min(bytes, mptc__staging_most)));
    while (bytes) {
        mptc__slot *slot = &device->slots[device->uploads++ % MPTC__SLOTS];
        const size_t some = mptc__min(bytes, mptc__staging_most);
        MPTC__TRY(mptc__await(ctx, slot->copied));
        mptc__stage(slot->host, from, some, op);
        if (op->first < op->floats) return MPT_OK;
        MPTC__CUDA(cudaMemcpyAsync(at, slot->host, some, cudaMemcpyHostToDevice, device->stream));
        MPTC__CUDA(cudaEventRecord(slot->copied, device->stream));
        from += some;
        at += some;
        bytes -= some;
    }
    return MPT_OK;
}

static mpt_result mptc__upload(mpt_context *ctx, void *to, const void *host, size_t bytes) {
    mpt_feed_op op = MPT_ZERO;
    op.x = host;
    op.bytes = bytes;
    op.staging = to;
    return mptc__feed(ctx, &op);
}

/* Where to read data that was uploaded to `to` only for this call: in the feed, if it is still there */
static void *mptc__fed(mpt_context *ctx, void *to) {
    mptc__held *held = &mptc__of(ctx)->held;
    if (!to || held->to != to) return to;
    held->to = NULL;
    return held->fed;
}

/* Makes the block at least this large; its content is lost. */
static mpt_result mptc__grow(mpt_context *ctx, mptc__block *block, size_t bytes) {
    mptc__device *device = mptc__of(ctx);
    const size_t wanted = mptc__round_up(bytes, 65536);
    if (bytes <= block->bytes) return MPT_OK;
    MPTC__CUDA(cudaStreamSynchronize(device->stream));
    mptc__graphs_drop(device);
    cudaFree(block->at);
    block->bytes = 0;
    block->at = (char *)mptc__malloc(ctx, wanted, 0);
    if (!block->at) return MPT_ERROR_NO_MEMORY;
    block->bytes = wanted;
    return MPT_OK;
}

/* The next part of the scratch block; advances `at`. */
static void *mptc__carve(char **at, size_t bytes) {
    char *part = *at;
    *at += mptc__round_up(bytes, mptc__align);
    return part;
}

static mpt_result mptc__need_positions(mpt_context *ctx, const char *what, size_t count) {
    if (count <= INT_MAX) return MPT_OK;
    return mpt_fail(ctx, MPT_ERROR_SHAPE, "cuda: %s: %zu positions, must be under 2^31", what, count);
}

/* Blocks for the work of `work` threads: at most as many as fill the device; threads then stride over the rest. */
static unsigned mptc__blocks(const mpt_context *ctx, size_t work) {
    const size_t most = (size_t)mptc__of(ctx)->processors * MPTC__BLOCKS_EACH;
    return (unsigned)mptc__min(work ? mptc__divide_up(work, MPTC__THREADS) : 1, most);
}

/* ==== PACKS ====

   Elementwise kernels process packs of eight elements: 16 bytes of a 16-bit type or twice 16 bytes of fp32, moved by
   128-bit loads and stores if the address allows. A kernel branches on the type of each array, the same way in all
   threads. Arithmetic is fp32. */

enum {
    MPTC__PACK = 8,
    MPTC__WORDS = MPTC__PACK / 2 /* of 32 bits, of a pack of a 16-bit type */
};

#define MPTC__EACH(e) _Pragma("unroll") for (unsigned e = 0; e < MPTC__PACK; e++) /* element of a pack */

/* The hardware's casts; for NaNs, whose payload they would lose, the rule of mpt.h. */
static __device__ __forceinline__ float mptc__widen(uint32_t bits, mpt_dtype type) {
    if (type == MPT_F32) return mpt__float(bits);
    if (type == MPT_F16 && (bits & 0x7fffu) <= 0x7c00u) return __half2float(__ushort_as_half((unsigned short)bits));
    return mpt_widen(bits, type);
}

static __device__ __forceinline__ uint32_t mptc__narrow(float x, mpt_dtype type) {
    const uint32_t u = mpt__bits(x);
    if ((u & 0x7fffffffu) <= 0x7f800000u) {
        if (type == MPT_F16) return __half_as_ushort(__float2half_rn(x));
        if (type == MPT_BF16) return (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
    }
    return mpt_narrow(x, type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0);
}

static __device__ __forceinline__ uint32_t mptc__get_bits(mpt_array a, size_t i) {
    if (a.type == MPT_F32) return ((const uint32_t *)a.data)[i];
    if (a.type <= MPT_BF16) return ((const uint16_t *)a.data)[i];
    return ((const uint8_t *)a.data)[i];
}

static __device__ __forceinline__ float mptc__get(mpt_array a, size_t i) {
    return mptc__widen(mptc__get_bits(a, i), a.type);
}

static __device__ __forceinline__ void mptc__put_bits(mpt_array a, size_t i, uint32_t bits) {
    if (a.type == MPT_F32) ((uint32_t *)a.data)[i] = bits;
    else if (a.type <= MPT_BF16) ((uint16_t *)a.data)[i] = (uint16_t)bits;
    else ((uint8_t *)a.data)[i] = (uint8_t)bits;
}

static __device__ __forceinline__ void mptc__put(mpt_array a, size_t i, float x) {
    mptc__put_bits(a, i, a.type == MPT_F32 ? mpt__bits(x) : mptc__narrow(x, a.type));
}

/* Can n elements from p be moved in 16-byte pieces? */
static __device__ __forceinline__ bool mptc__whole(const void *p, unsigned n) {
    return n == MPTC__PACK && (uintptr_t)p % 16 == 0;
}

/* words = p(n), two elements per word, then zeros */
static __device__ __forceinline__ void mptc__load_words(const uint16_t *p, unsigned n, uint32_t *words) {
    if (mptc__whole(p, n)) {
        const uint4 u = *(const uint4 *)p;
        words[0] = u.x;
        words[1] = u.y;
        words[2] = u.z;
        words[3] = u.w;
        return;
    }
#pragma unroll
    for (unsigned w = 0; w < MPTC__WORDS; w++) {
        const uint32_t low = 2 * w < n ? p[2 * w] : 0;
        const uint32_t high = 2 * w + 1 < n ? p[2 * w + 1] : 0;
        words[w] = low | high << 16;
    }
}

/* The compiler may split an assignment of four words; it does not split the intrinsic. */
static __device__ __forceinline__ void mptc__store_words(uint16_t *p, unsigned n, const uint32_t *words) {
    if (mptc__whole(p, n)) {
        __stwb((uint4 *)p, make_uint4(words[0], words[1], words[2], words[3]));
        return;
    }
    MPTC__EACH(e) if (e < n) p[e] = (uint16_t)(words[e / 2] >> e % 2 * 16);
}

/* bits(PACK) = p(n), then zeros */
static __device__ __forceinline__ void mptc__load_bits(const uint16_t *p, unsigned n, uint16_t *bits) {
    uint32_t words[MPTC__WORDS];
    mptc__load_words(p, n, words);
    MPTC__EACH(e) bits[e] = (uint16_t)(words[e / 2] >> e % 2 * 16);
}

/* p(n) = bits(n) */
static __device__ __forceinline__ void mptc__store_bits(uint16_t *p, unsigned n, const uint16_t *bits) {
    uint32_t words[MPTC__WORDS];
#pragma unroll
    for (unsigned w = 0; w < MPTC__WORDS; w++) words[w] = bits[2 * w] | (uint32_t)bits[2 * w + 1] << 16;
    mptc__store_words(p, n, words);
}

/* A single comparison tests both. */
static __device__ __forceinline__ bool mptc__any_nan(float a, float b) { return a != a || b != b; }

/* x(PACK) from a 16-bit type. Uses the hardware's casts unless there is a NaN, whose payload they would lose. */
static __device__ __forceinline__ void mptc__widen_words(const uint32_t *words, mpt_dtype type, float *x) {
    bool nan = false;
#pragma unroll
    for (unsigned w = 0; w < MPTC__WORDS; w++) {
        if (type == MPT_F16) {
            __half2 pair;
            memcpy(&pair, &words[w], sizeof pair);
            x[2 * w] = __low2float(pair);
            x[2 * w + 1] = __high2float(pair);
        } else {
            x[2 * w] = mpt__float(words[w] << 16);
            x[2 * w + 1] = mpt__float(words[w] & 0xffff0000u);
        }
        nan |= mptc__any_nan(x[2 * w], x[2 * w + 1]);
    }
    if (!nan) return;
    MPTC__EACH(e) {
        const uint32_t bits = words[e / 2] >> e % 2 * 16 & 0xffffu, fraction = type == MPT_F16 ? 0x3ffu : 0x7fu;
        if ((bits & 0x7fffu) > (0x7fffu ^ fraction))
            x[e] = mpt__float(bits >> 15 << 31 | 0x7fc00000u | (bits & fraction) << (type == MPT_F16 ? 13 : 16));
    }
}

/* words from x(PACK), rounded to nearest even; as above. */
static __device__ __forceinline__ void mptc__narrow_words(const float *x, mpt_dtype type, uint32_t *words) {
    bool nan = false;
#pragma unroll
    for (unsigned w = 0; w < MPTC__WORDS; w++) {
        const float low = x[2 * w], high = x[2 * w + 1];
        nan |= mptc__any_nan(low, high);
        if (type == MPT_F16) {
            const __half2 pair = __floats2half2_rn(low, high);
            memcpy(&words[w], &pair, sizeof pair);
        } else {
            const uint32_t a = mpt__bits(low), b = mpt__bits(high);
            words[w] = __byte_perm(a + 0x7fffu + (a >> 16 & 1u), b + 0x7fffu + (b >> 16 & 1u), 0x7632);
        }
    }
    if (!nan) return;
    MPTC__EACH(e) {
        const uint32_t u = mpt__bits(x[e]), sign = u >> 31 << 15, fraction = u & 0x7fffffu;
        const uint32_t bits = type == MPT_F16 ? 0x7e00u | fraction >> 13 : 0x7fc0u | fraction >> 16;
        if (!mpt__is_nan(x[e])) continue;
        words[e / 2] = (words[e / 2] & (e % 2 ? 0xffffu : 0xffff0000u)) | (sign | bits) << e % 2 * 16;
    }
}

/* x(PACK) = a[i .. i+n), then zeros */
static __device__ __forceinline__ void mptc__load(mpt_array a, size_t i, unsigned n, float *x) {
    if (a.type == MPT_F32 && mptc__whole((const float *)a.data + i, n)) {
        const float4 *p = (const float4 *)((const float *)a.data + i), low = p[0], high = p[1];
        x[0] = low.x;
        x[1] = low.y;
        x[2] = low.z;
        x[3] = low.w;
        x[4] = high.x;
        x[5] = high.y;
        x[6] = high.z;
        x[7] = high.w;
    } else if (a.type == MPT_F16 || a.type == MPT_BF16) {
        uint32_t words[MPTC__WORDS];
        mptc__load_words((const uint16_t *)a.data + i, n, words);
        if (a.type == MPT_F16) mptc__widen_words(words, MPT_F16, x);
        else mptc__widen_words(words, MPT_BF16, x);
    } else {
        MPTC__EACH(e) x[e] = e < n ? mptc__get(a, i + e) : 0.0f;
    }
}

/* a[i .. i+n) = x(n), rounded to nearest even */
static __device__ __forceinline__ void mptc__store(mpt_array a, size_t i, unsigned n, const float *x) {
    if (a.type == MPT_F32 && mptc__whole((const float *)a.data + i, n)) {
        float4 *p = (float4 *)((float *)a.data + i);
        __stwb(p, make_float4(x[0], x[1], x[2], x[3]));
        __stwb(p + 1, make_float4(x[4], x[5], x[6], x[7]));
    } else if (a.type == MPT_F16 || a.type == MPT_BF16) {
        uint32_t words[MPTC__WORDS];
        if (a.type == MPT_F16) mptc__narrow_words(x, MPT_F16, words);
        else mptc__narrow_words(x, MPT_BF16, words);
        mptc__store_words((uint16_t *)a.data + i, n, words);
    } else {
        MPTC__EACH(e) if (e < n) mptc__put(a, i + e, x[e]);
    }
}

/* To have several loads in flight: loads the bits of all packs first, then widens them. This does not keep the payload
   of a NaN, which would need a test of one pack before the next load. */
typedef struct mptc__bits {
    uint32_t word[MPTC__PACK];
} mptc__bits;

static __device__ __forceinline__ void mptc__load_pack(mpt_array a, size_t i, unsigned n, mptc__bits *bits) {
    const uint32_t *p = (const uint32_t *)a.data + i;
    if (a.type != MPT_F32) {
        mptc__load_words((const uint16_t *)a.data + i, n, bits->word);
    } else if (mptc__whole(p, n)) {
        const uint4 low = *(const uint4 *)p, high = *(const uint4 *)(p + MPTC__WORDS);
        memcpy(bits->word, &low, sizeof low);
        memcpy(bits->word + MPTC__WORDS, &high, sizeof high);
    } else {
        MPTC__EACH(e) bits->word[e] = e < n ? p[e] : 0;
    }
}

static __device__ __forceinline__ void mptc__widen_pack(const mptc__bits *bits, mpt_dtype type, float *x) {
    MPTC__EACH(e) {
        const uint32_t half = bits->word[e / 2] >> e % 2 * 16 & 0xffffu;
        if (type == MPT_F32) x[e] = mpt__float(bits->word[e]);
        else if (type == MPT_F16) x[e] = __half2float(__ushort_as_half((unsigned short)half));
        else x[e] = mpt__float(half << 16);
    }
}

/* Grid-stride loop: this thread's first index, and the distance between its indices. */
static __device__ __forceinline__ size_t mptc__thread() { return (size_t)blockIdx.x * blockDim.x + threadIdx.x; }
static __device__ __forceinline__ size_t mptc__stride() { return (size_t)gridDim.x * blockDim.x; }

static __device__ __forceinline__ unsigned mptc__left(size_t n, size_t i) {
    if (n - i < MPTC__PACK) return (unsigned)(n - i);
    return (unsigned)MPTC__PACK;
}

/* Division of x < 2^31 by a number that is the same for all threads: a multiplication and a shift. */
typedef struct mptc__divider {
    unsigned by, multiplier, shift;
} mptc__divider;

static mptc__divider mptc__divider_of(size_t by) {
    mptc__divider d = {(unsigned)by, 0, 31};
    while ((size_t)1 << (d.shift - 31) < by) d.shift++;
    d.multiplier = (unsigned)mptc__divide_up((size_t)1 << d.shift, by);
    return d;
}

static __device__ __forceinline__ unsigned mptc__divide(unsigned x, mptc__divider d) {
    return (unsigned)((uint64_t)x * d.multiplier >> d.shift);
}

/* True for all threads of the last of `blocks` blocks to get here, which sees everything that the others wrote before.
   So one launch can reduce in two stages: every block stores its part, and the last one adds the parts in order. All
   threads of these blocks must call it. *ticket is 0 between launches, which do not overlap because they are on one
   stream. */
static __device__ bool mptc__last_block(unsigned *ticket, unsigned blocks) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        last = atomicAdd(ticket, 1u) == blocks - 1;
        if (last) *ticket = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

/* ==== ELEMENTWISE ==== */

/* Bits of element i, whose value is x, in `type` with this rounding */
static __device__ uint32_t mptc__cast_bits(mpt_rounding r, mpt_dtype type, size_t i, float x) {
    const uint32_t random = r.round == MPT_ROUND_STOCHASTIC ? mpt_hash(r.seed, r.step, r.tensor, i) : 0;
    return mpt_narrow(x, type, r.round, r.overflow, random);
}

/* Like mpt__activate and mpt__activate_backward, but ReLU is one comparison, which is false for NaN: mpt.h tests the
   bits because of -ffast-math, which nvcc does not have. */
static __device__ __forceinline__ float mptc__relu_slope(float saved, float dy) { return saved <= 0 ? 0.0f : dy; }

static __device__ __forceinline__ float mptc__activate(mpt_activation act, float x) {
    if (act == MPT_RELU) return mptc__relu_slope(x, x);
    return mpt__activate(act, x);
}

static __device__ __forceinline__ float mptc__activate_backward(mpt_activation act, float saved, float dy) {
    if (act == MPT_RELU) return mptc__relu_slope(saved, dy);
    return mpt__activate_backward(act, saved, dy);
}

static __device__ __forceinline__ float mptc__map_activate(const mpt_map_op *op, float x) {
    if (op->act == MPT_RELU) return mptc__relu_slope(x, x);
    return mpt__map_activate(op, x);
}

static __device__ __forceinline__ float mptc__map_activate_backward(const mpt_map_op *op, float saved, float dy) {
    if (op->act == MPT_RELU) return mptc__relu_slope(saved, dy);
    return mpt__map_activate_backward(op, saved, dy);
}

/* out(n) from a(n), b(n): see mpt_map_op; and clear(words) = 0. A thread processes a pack at a time. The local copies
   of rounding and mask let the compiler compute the part of the hash that is the same for all elements only once. */
static __global__ void mptc__map_k(mpt_map_op op, uint32_t *clear, unsigned words) {
    const mpt_rounding rounding = op.rounding;
    const mpt_mask mask = op.mask;
    const bool plain = rounding.round == MPT_ROUND_NEAREST && rounding.overflow == MPT_OVERFLOW_INF;
    if (blockIdx.x == 0 && threadIdx.x < words) clear[threadIdx.x] = 0;
    for (size_t i = mptc__thread() * MPTC__PACK; i < op.n; i += mptc__stride() * MPTC__PACK) {
        const unsigned n = mptc__left(op.n, i);
        float a[MPTC__PACK], b[MPTC__PACK];
        mptc__load(op.a, i, n, a);
        if (op.map == MPT_MAP_CAST && !plain) {
            MPTC__EACH(e) if (e < n) mptc__put_bits(op.out, i + e, mptc__cast_bits(rounding, op.out.type, i + e, a[e]));
            continue;
        }
        if (op.map == MPT_MAP_ACTIVATION) {
            MPTC__EACH(e) a[e] = mptc__map_activate(&op, a[e]);
        } else if (op.map == MPT_MAP_ADD) {
            if (op.beta != 0) mptc__load(op.b, i, n, b);
            MPTC__EACH(e) {
                if (op.beta != 0) a[e] = mpt__add_rn(a[e], mpt__mul_rn(op.beta, b[e]));
                a[e] = mptc__map_activate(&op, a[e]);
            }
        } else if (op.map == MPT_MAP_ACTIVATION_GRADIENT) {
            mptc__load(op.b, i, n, b);
            MPTC__EACH(e) a[e] = mptc__map_activate_backward(&op, a[e], b[e]);
            if (op.beta != 0) mptc__load(op.out, i, n, b);
            MPTC__EACH(e) if (op.beta != 0) a[e] = mpt__add_rn(a[e], mpt__mul_rn(op.beta, b[e]));
        } else if (op.map == MPT_MAP_DROPOUT) {
            const uint64_t step = mask.step ? *mask.step : 0;
            if (op.beta != 0) mptc__load(op.out, i, n, b);
            MPTC__EACH(e) {
                a[e] = mpt__mul_rn(a[e], mpt__mask_factor(&mask, step, i + e));
                if (op.beta != 0) a[e] = mpt__add_rn(a[e], mpt__mul_rn(op.beta, b[e]));
            }
        }
        mptc__store(op.out, i, n, a);
    }
}

/* out(n) from bytes(n), where byte i belongs to channel i % C; and clear(words) = 0. */
static __global__ void mptc__bytes_k(mpt_map_op op, uint32_t *clear, unsigned words) {
    const uint8_t *bytes = (const uint8_t *)op.a.data;
    if (blockIdx.x == 0 && threadIdx.x < words) clear[threadIdx.x] = 0;
    for (size_t i = mptc__thread() * MPTC__PACK; i < op.n; i += mptc__stride() * MPTC__PACK) {
        const unsigned n = mptc__left(op.n, i);
        const bool whole = n == MPTC__PACK && (uintptr_t)(bytes + i) % MPTC__PACK == 0;
        uint8_t byte[MPTC__PACK];
        float x[MPTC__PACK];
        size_t c = i % op.C;
        if (whole) {
            const uint2 pack = *(const uint2 *)(bytes + i);
            memcpy(byte, &pack, sizeof byte);
        } else {
            MPTC__EACH(e) byte[e] = e < n ? bytes[i + e] : 0;
        }
        MPTC__EACH(e) {
            x[e] = mpt__of_byte((float)byte[e], op.channels, op.C, c);
            c = c + 1 == op.C ? 0 : c + 1;
        }
        mptc__store(op.out, i, n, x);
    }
}

static mpt_result mptc__map_run(mpt_context *ctx, const mpt_map_op *op, void *clear, size_t bytes) {
    const unsigned words = (unsigned)(bytes / sizeof(uint32_t));
    const size_t packs = mptc__divide_up(op->n, MPTC__PACK);
    if (op->map == MPT_MAP_BYTES) return MPTC__SPREAD(mptc__bytes_k, packs, *op, (uint32_t *)clear, words);
    return MPTC__SPREAD(mptc__map_k, packs, *op, (uint32_t *)clear, words);
}

/* Is it the gradient of a ReLU in place? */
static int mptc__is_slope(const mpt_map_op *op) {
    const int relu = op->map == MPT_MAP_ACTIVATION_GRADIENT && op->act == MPT_RELU && op->beta == 0;
    return relu && op->out.data == op->b.data && op->out.type == op->b.type;
}

static mpt_result mptc__slope_joins(mpt_context *ctx, const mpt_map_op *op, int *joins);

static mpt_result mptc__map(mpt_context *ctx, const mpt_map_op *user) {
    mptc__held *held = &mptc__of(ctx)->held;
    mpt_map_op op = *user;
    int joins = 0;
    MPTC__TRY(mptc__slope_joins(ctx, &op, &joins));
    if (joins) return MPT_OK;
    if (op.a.data == mptc__of(ctx)->step.staging) op.a.data = mptc__fed(ctx, op.a.data);
    void *clear = held->clear;
    const size_t cleared = clear ? held->cleared : 0;
    held->clear = NULL;
    MPTC__TRY(mptc__enter(ctx));
    if (!mptc__of(ctx)->step.open || clear || !mptc__is_slope(&op)) return mptc__map_run(ctx, &op, clear, cleared);
    held->slope = 1; /* the gradient of a pool may follow */
    held->sloped = op;
    return MPT_OK;
}

/* x(PACK) += beta out + bias: n elements, from `at` of out and `column` of bias on */
static __device__ __forceinline__ void mptc__add_rest(mpt_array out, size_t at, float beta, mpt_array bias,
                                                      size_t column, unsigned n, float *x) {
    float y[MPTC__PACK];
    if (beta != 0) {
        mptc__load(out, at, n, y);
        MPTC__EACH(e) x[e] = mpt__add_rn(x[e], mpt__mul_rn(beta, y[e]));
    }
    if (!bias.data) return;
    mptc__load(bias, column, n, y);
    MPTC__EACH(e) x[e] += y[e];
}

/* out(m,n) = act(x(m,n) + beta out + bias(n)); rows of x are ld apart, of out ldc. x may be out. */
static __global__ void __launch_bounds__(MPTC__THREADS, 4)
mptc__finish_k(size_t m, size_t n, mpt_array in, size_t ld, mpt_array out, size_t ldc, float beta, mpt_array bias,
               mpt_activation act) {
    const size_t packs = (n + MPTC__PACK - 1) / MPTC__PACK;
    for (size_t i = mptc__thread(); i < m * packs; i += mptc__stride()) {
        const size_t row = i / packs, column = i % packs * MPTC__PACK;
        const unsigned some = mptc__left(n, column);
        float x[MPTC__PACK];
        mptc__load(in, row * ld + column, some, x);
        mptc__add_rest(out, row * ldc + column, beta, bias, column, some, x);
        MPTC__EACH(e) x[e] = mptc__activate(act, x[e]);
        mptc__store(out, row * ldc + column, some, x);
    }
}

static mpt_result mptc__finish(mpt_context *ctx, const mpt_gemm_op *op, mpt_array x, size_t ld, float beta) {
    const size_t packs = op->m * mptc__divide_up(op->n, MPTC__PACK);
    return MPTC__SPREAD(mptc__finish_k, packs, op->m, op->n, x, ld, op->c, op->ldc, beta, op->bias, op->act);
}

static mpt_result mptc__columns_copy(mpt_context *ctx, const mpt_columns_op *op) {
    mpt_gemm_op to = MPT_ZERO;
    to.m = op->rows;
    to.n = op->C;
    to.c = op->y;
    to.ldc = op->y_stride;
    MPTC__TRY(mptc__enter(ctx));
    return mptc__finish(ctx, &to, op->x, op->x_stride, op->beta);
}

/* ==== COLUMNS ====

   Sums over the rows of matrices (rows,C), one matrix per sample. A block sums a tile of columns over a part of a
   sample's rows; the last block of a tile adds the parts and finishes its columns. `terms` defines what is added: SUMS
   of the planes at a time, summed in `real`; and what is done with a column's sums. Over 64 registers: a thread has the
   sums of eight columns and the loads of several rows in flight. */

enum {
    MPTC__SUM_ACROSS = 8,  /* most threads of a row of a tile, a pack each */
    MPTC__SUM_ROWS = 8,    /* fewest rows of a thread if the rows are split into parts */
    MPTC__SUM_PARTS = 128, /* most parts, because one block has to add them */
    MPTC__SUM_BLOCKS = 512 /* most blocks that the parts may add up to */
};

typedef struct mptc__columns {
    size_t samples, rows, C; /* rows of a sample */
    size_t planes;           /* sums to compute for a column */
    mpt_array out;           /* (C,planes) = sums + beta out */
    float beta;
    size_t tiles, chunks;    /* of columns, of planes */
    size_t slices, slice;    /* parts of a sample, rows of a part */
    double *parts;           /* (planes, samples slices, C) */
    unsigned *tickets;       /* one per tile and chunk; NULL: only the parts are wanted */
} mptc__columns;

/* out[i] = sum + beta out[i] */
static __device__ void mptc__sum_put(mpt_array out, size_t i, double sum, float beta) {
    if (!out.data) return;
    if (beta != 0) sum += (double)beta * (double)mptc__get(out, i);
    mptc__put(out, i, (float)sum);
}

/* Sum over groups of `lanes` neighbouring lanes of a warp, a power of two, in a fixed order; all lanes get it. */
template <typename real> static __device__ real mptc__warp_sum(real x, unsigned lanes = MPTC__WARP) {
    for (unsigned width = lanes / 2; width; width /= 2) x += __shfl_xor_sync(0xffffffffu, x, width);
    return x;
}

/* total[s] = sum of plane first + s over all parts, for the thread of each column of a tile. A whole block calls it;
   its stripes of threads share the parts. */
template <unsigned SUMS> static __device__ void mptc__columns_fold(const mptc__columns *w, unsigned column,
                                                                   unsigned first, double *total) {
    __shared__ double sums[MPTC__THREADS];
    const unsigned width = blockDim.x * MPTC__PACK, thread = threadIdx.y * blockDim.x + threadIdx.x;
    const unsigned parts = (unsigned)w->slices, c = column + thread % width;
#pragma unroll
    for (unsigned s = 0; s < SUMS; s++) {
        double sum = 0;
        if (c < w->C && first + s < w->planes) {
            const double *plane = w->parts + (size_t)(first + s) * parts * w->C + c;
#pragma unroll 8
            for (unsigned part = thread / width; part < parts; part += MPTC__THREADS / width)
                sum += __ldcg(plane + part * w->C);
        }
        sums[thread] = sum;
        __syncthreads();
        total[s] = 0;
        if (thread < width)
            for (unsigned i = thread; i < MPTC__THREADS; i += width) total[s] += sums[i];
        __syncthreads();
    }
}

template <typename terms> static __global__ void mptc__columns_k(mptc__columns w, terms t) {
    typedef typename terms::real real;
    __shared__ real sums[MPTC__WARPS][MPTC__SUM_ACROSS * MPTC__PACK];
    const unsigned across = blockDim.x, thread = threadIdx.y * across + threadIdx.x, lane = thread % MPTC__WARP;
    const unsigned tiles = (unsigned)w.tiles, chunks = (unsigned)w.chunks, part = blockIdx.x / tiles / chunks;
    const unsigned C = (unsigned)w.C, column = blockIdx.x % tiles * across * MPTC__PACK;
    const unsigned c = column + threadIdx.x * MPTC__PACK, first = blockIdx.x / tiles % chunks * terms::SUMS;
    const unsigned slices = (unsigned)w.slices, slice = (unsigned)w.slice, rows = (unsigned)w.rows;
    const unsigned within = part % slices * slice, begin = part / slices * rows + within;
    const unsigned end = begin + (rows - within < slice ? rows - within : slice);
    const bool mine = thread < across * MPTC__PACK && column + thread < C;
    const size_t all = w.samples * w.slices;
    real acc[terms::SUMS][MPTC__PACK] = {{0}};
    double total[terms::SUMS];
    if (c < C) t.add(begin + threadIdx.y, end, c, mptc__left(C, c), first, acc);
#pragma unroll
    for (unsigned s = 0; s < terms::SUMS; s++) {
        MPTC__EACH(e) {
            for (unsigned width = MPTC__WARP / 2; width >= across; width /= 2)
                acc[s][e] += __shfl_xor_sync(0xffffffffu, acc[s][e], width);
            if (lane < across) sums[thread / MPTC__WARP][lane * MPTC__PACK + e] = acc[s][e];
        }
        __syncthreads();
        total[s] = 0;
        if (mine)
            for (unsigned warp = 0; warp < MPTC__WARPS; warp++) total[s] += (double)sums[warp][thread];
        __syncthreads();
    }
    if (all > 1 || !w.tickets) {
#pragma unroll
        for (unsigned s = 0; s < terms::SUMS; s++)
            if (mine && first + s < w.planes) w.parts[((first + s) * all + part) * w.C + column + thread] = total[s];
        if (!w.tickets || !mptc__last_block(&w.tickets[blockIdx.x % (tiles * chunks)], slices)) return;
        mptc__columns_fold<terms::SUMS>(&w, column, first, total);
    }
    if (mine) t.finish(&w, column + thread, first, total);
}

/* Sum of a plane over parts part .. part+count of columns c .. c+width, times their weights if there are any. A whole
   warp calls it; all lanes get the result. */
static __device__ double mptc__fold(const mptc__columns *w, size_t plane, size_t part, size_t count, size_t c,
                                    size_t width, mpt_array weight) {
    const double *parts = w->parts + (plane * w->samples * w->slices + part) * w->C + c;
    double sum = 0;
    for (size_t i = threadIdx.x % MPTC__WARP; i < count * width; i += MPTC__WARP) {
        const double x = parts[i / width * w->C + i % width];
        sum += weight.data ? x * (double)mptc__get(weight, c + i % width) : x;
    }
    return mptc__warp_sum(sum);
}

/* Divides the work into blocks, depending only on the sizes. Parts are stored in the scratch block. With more than one
   sample they stay there; else the columns are finished. */
template <typename terms> static mpt_result mptc__columns_run(mpt_context *ctx, mptc__columns *w, const terms &t) {
    mptc__block *scratch = &mptc__of(ctx)->scratch;
    dim3 block(1, MPTC__THREADS);
    while (block.x < MPTC__SUM_ACROSS && block.x * MPTC__PACK < w->C) {
        block.x *= 2;
        block.y /= 2;
    }
    w->tiles = mptc__divide_up(w->C, block.x * MPTC__PACK);
    w->chunks = mptc__divide_up(w->planes, terms::SUMS);
    const size_t fit = MPTC__SUM_BLOCKS / (w->tiles * w->chunks * w->samples);
    const size_t most = mptc__min(fit ? fit : 1, MPTC__SUM_PARTS);
    const size_t slices = mptc__min(mptc__divide_up(w->rows, MPTC__SUM_ROWS * block.y), most);
    w->slice = slices ? mptc__divide_up(w->rows, slices) : 0;
    w->slices = slices ? mptc__divide_up(w->rows, w->slice) : 1;
    const size_t parts = w->samples * w->slices, blocks = w->tiles * w->chunks * parts;
    MPTC__TRY(mptc__need_positions(ctx, "column sums", w->C));
    MPTC__TRY(mptc__need_positions(ctx, "column sums", w->samples * w->rows));
    MPTC__TRY(mptc__need_positions(ctx, "column sums", blocks));
    if (parts > 1 || !w->tickets) MPTC__TRY(mptc__grow(ctx, scratch, w->planes * parts * w->C * sizeof *w->parts));
    w->parts = (double *)(void *)scratch->at;
    return MPTC__LAUNCH(mptc__columns_k<terms>, (unsigned)blocks, block, *w, t);
}

/* Stores the sums of column c unchanged. */
template <unsigned SUMS> static __device__ void mptc__columns_put(const mptc__columns *w, unsigned c, unsigned first,
                                                                  const double *total) {
#pragma unroll
    for (unsigned s = 0; s < SUMS; s++)
        if (first + s < w->planes) mptc__sum_put(w->out, c * w->planes + first + s, total[s], w->beta);
}

/* x(rows,C) itself. Eight rows are added in fp32 and then to the sum in fp64, which many devices compute at 1/64 of the
   rate: the error of a sum is at most 7 2^-24 of the sum of magnitudes, plus 2^-24 of itself for the last rounding. */
struct mptc__plain_terms {
    enum { SUMS = 1, ROWS = 8 };
    typedef double real;
    mpt_array x;
    size_t C;
    __device__ void add(unsigned row, unsigned end, unsigned c, unsigned n, unsigned, real (*acc)[MPTC__PACK]) const {
        while (row < end) {
            float v[MPTC__PACK], few[MPTC__PACK] = {0};
            mptc__bits bits[ROWS];
#pragma unroll
            for (unsigned r = 0; r < ROWS; r++)
                if (row + r * blockDim.y < end) mptc__load_pack(x, (size_t)(row + r * blockDim.y) * C + c, n, &bits[r]);
#pragma unroll
            for (unsigned r = 0; r < ROWS; r++) {
                if (row + r * blockDim.y >= end) continue;
                mptc__widen_pack(&bits[r], x.type, v);
                MPTC__EACH(e) few[e] += v[e];
            }
            row += ROWS * blockDim.y;
            MPTC__EACH(e) acc[0][e] += (double)few[e];
        }
    }
    __device__ void finish(const mptc__columns *w, unsigned column, unsigned first, const double *total) const {
        mptc__columns_put<SUMS>(w, column, first, total);
    }
};

static mpt_result mptc__sums_run(mpt_context *ctx, const mptc__sums *s) {
    mptc__columns w = MPT_ZERO;
    mptc__plain_terms terms;
    w.samples = w.planes = 1;
    w.rows = s->rows;
    w.C = terms.C = s->C;
    w.out = s->db;
    w.beta = s->beta;
    w.tickets = mptc__of(ctx)->tickets;
    terms.x = s->dy;
    return mptc__columns_run(ctx, &w, terms);
}

/* Holds the sums for the product of the weights' gradient, which the same operation computes next. */
static void mptc__sums_wait(mpt_context *ctx, size_t rows, size_t C, mpt_array dy, float beta, mpt_array db) {
    const mptc__sums sums = {rows, C, dy, db, beta};
    mptc__of(ctx)->held.bias = 1;
    mptc__of(ctx)->held.sums = sums;
}

/* Called at the end of that operation: computes the sums if no product did. If it failed, they are dropped. */
static mpt_result mptc__sums_end(mpt_context *ctx, mpt_result result) {
    int *bias = &mptc__of(ctx)->held.bias;
    if (*bias && result == MPT_OK) return mptc__held_do(ctx);
    *bias = 0;
    return result;
}

/* ==== PRODUCTS ====

   cuBLAS multiplies column-major matrices. A row-major matrix is its column-major transpose, so c = op(a) op(b) is
   computed as c^T = op(b)^T op(a)^T: the operands change places and nothing is moved. */

static cudaDataType mptc__data_type(mpt_dtype type) {
    if (type == MPT_F32) return CUDA_R_32F;
    if (type == MPT_F16) return CUDA_R_16F;
    return CUDA_R_16BF;
}

static cublasOperation_t mptc__operation(int transposed) {
    if (transposed) return CUBLAS_OP_T;
    return CUBLAS_OP_N;
}

static mpt_array mptc__at(mpt_array a, size_t i) {
    if (a.data) return mpt_typed_array((char *)a.data + i * mpt_dtype_size(a.type), a.type);
    return a;
}

/* cuBLAS writes fp32 or the operands' type, without bias. Everything else needs the sums in fp32 first, to round
   once. */
static int mptc__needs_sums(const mpt_gemm_op *op) {
    return op->c.type != MPT_F32 && (op->bias.data || op->c.type != op->a.type || op->act);
}

static mpt_result mptc__need_ints(mpt_context *ctx, const mpt_gemm_op *op) {
    if (op->m <= INT_MAX && op->n <= INT_MAX && op->k <= INT_MAX && op->lda <= INT_MAX && op->ldb <= INT_MAX &&
        op->ldc <= INT_MAX) return MPT_OK;
    return mpt_fail(ctx, MPT_ERROR_SHAPE,
                    "cuda: gemm: m %zu, n %zu, k %zu, lda %zu, ldb %zu, ldc %zu must be under 2^31", op->m, op->n,
                    op->k, op->lda, op->ldb, op->ldc);
}

static cublasComputeType_t mptc__compute(mpt_context *ctx, const mpt_gemm_op *op) {
    if (op->a.type == MPT_F32 && mptc__of(ctx)->desc.tf32) return CUBLAS_COMPUTE_32F_FAST_TF32;
    return CUBLAS_COMPUTE_32F;
}

/* c(m,n) = alpha op(a)(m,k) op(b)(k,n) + beta c by cuBLAS; a and b of one type, c of that or fp32 */
static mpt_result mptc__multiply(mpt_context *ctx, const mpt_gemm_op *op, mpt_array c, size_t ldc, float beta) {
    const cudaDataType type = mptc__data_type(op->a.type);
    const cublasOperation_t a_op = mptc__operation(op->trans_a), b_op = mptc__operation(op->trans_b);
    const int lda = op->lda ? (int)op->lda : 1;
    const int ldb = op->ldb ? (int)op->ldb : 1;
    MPTC__TRY(mptc__need_ints(ctx, op));
    if (mptc__of(ctx)->step.mode == MPTC__REPLAY) return MPT_OK;
    MPTC__CUBLAS(cublasGemmEx(mptc__of(ctx)->cublas, b_op, a_op, (int)op->n, (int)op->m, (int)op->k, &op->alpha,
                              op->b.data, type, ldb, op->a.data, type, lda, &beta, c.data, mptc__data_type(c.type),
                              (int)ldc, mptc__compute(ctx, op), CUBLAS_GEMM_DEFAULT));
    return MPT_OK;
}

/* -- Epilogues of cuBLASLt --

   It adds a bias and applies ReLU before the sums are rounded; or it sums the columns of dy, which gives the bias
   gradient, while it reads dy for the gradient of the weights. Its ReLU turns NaN into 0, but this hides no overflow:
   an inf in x makes the gradient of the weights inf or NaN, an inf in w that of x, and logits have no ReLU.

   Gradients of activations are not fused. dReLU reads a mask that the forward product writes: another buffer, 1/16 of
   the activations, made before rounding, which in fp16 turns some values into the 0 that has no gradient. GELU (only
   the tanh form) and dGELU skip the rounding of x and dy, and with it the overflow that the loss scale is adjusted
   by. */

typedef struct mptc__fusion { /* cuBLASLt's descriptors of a product: plain data, nothing is allocated */
    cublasLtMatmulDescOpaque_t desc;
    cublasLtMatrixLayoutOpaque_t a, b, c;
    mptc__plan plan;
} mptc__fusion;

/* The alignment of all rows: the largest power of two, up to 16, that divides the address and ld elements. */
static int mptc__row_align(mpt_array a, size_t ld) {
    const size_t bits = (uintptr_t)a.data | ld * mpt_dtype_size(a.type) | 16;
    return (int)(bits & (~bits + 1));
}

/* The epilogue for a product, plus `more`; 0 if cuBLASLt has none. */
static int mptc__epilogue(const mpt_gemm_op *op, int more) {
    const int types = op->a.type == op->b.type && (op->c.type == op->a.type || op->c.type == MPT_F32);
    const int bias = !op->bias.data || (op->bias.type == op->c.type && (uintptr_t)op->bias.data % 16 == 0);
    if (!types || !bias || !op->m || !op->n || !op->k || op->act > MPT_RELU) return 0;
    if (op->bias.data) more |= CUBLASLT_EPILOGUE_BIAS;
    if (op->act) more |= CUBLASLT_EPILOGUE_RELU;
    return more;
}

static cublasLtMatmulPreferenceOpaque_t mptc__preference(const mptc__device *device, const int *key) {
    const cublasLtMatmulPreferenceAttributes_t name[5] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK}; /* split-K adds in fp32, if at all */
    const uint32_t value[5] = {(uint32_t)key[0], (uint32_t)key[1], (uint32_t)key[2], (uint32_t)key[2],
                               CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE};
    const uint64_t workspace = device->products.bytes;
    cublasLtMatmulPreferenceOpaque_t p;
    cublasLtMatmulPreferenceInit(&p);
    for (int i = 0; i < 5; i++) cublasLtMatmulPreferenceSetAttribute(&p, name[i], &value[i], sizeof value[i]);
    cublasLtMatmulPreferenceSetAttribute(&p, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
    return p;
}

/* The plan with this key, or a place for it: a free one or, if the table is full, the one at the hash. */
static mptc__plan *mptc__plan_of(mptc__device *device, const int *key) {
    uint32_t hash = 0;
    for (int i = 0; i < MPTC__PLAN_KEY; i++) hash = (hash ^ (uint32_t)key[i]) * 0x9e3779b1u;
    for (uint32_t probe = 0; probe < MPTC__PLANS; probe++) {
        mptc__plan *plan = &device->plans[((hash >> 24) + probe) % MPTC__PLANS];
        const int unused = plan->key[0] == 0; /* an alignment is at least 1 */
        if (unused || memcmp(plan->key, key, sizeof plan->key) == 0) return plan;
    }
    return &device->plans[(hash >> 24) % MPTC__PLANS];
}

/* Finds the best algorithm for the product that *f describes. Returns 0 if there is none. */
static int mptc__heuristic(const mptc__device *device, const int *key, mptc__fusion *f,
                           cublasLtMatmulHeuristicResult_t *found) {
    cublasLtMatmulPreferenceOpaque_t preference = mptc__preference(device, key);
    int answers = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic((cublasLtHandle_t)device->cublas, &f->desc, &f->a, &f->b, &f->c, &f->c,
                                       &preference, 1, found, &answers);
    return status == CUBLAS_STATUS_SUCCESS && answers > 0 && found->state == CUBLAS_STATUS_SUCCESS;
}

/* Would the product alone fill the device much better than with the column sums as its epilogue? A narrow result of
   many terms needs split-K; without it, it takes many times as long as a separate pass over dy. The heuristic depends
   only on shape and device, unlike a measured time, so bits are reproducible. */
static int mptc__better_apart(const mptc__device *device, const int *key, int32_t epilogue, float waves,
                              mptc__fusion *f) {
    const int32_t plain = CUBLASLT_EPILOGUE_DEFAULT;
    cublasLtMatmulHeuristicResult_t alone;
    if (epilogue != CUBLASLT_EPILOGUE_BGRADB || waves >= 1) return 0;
    cublasLtMatmulDescSetAttribute(&f->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &plain, sizeof plain);
    const int found = mptc__heuristic(device, key, f, &alone);
    cublasLtMatmulDescSetAttribute(&f->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    return found && alone.wavesCount > 2 * waves;
}

/* A row-major matrix (rows, columns), or its transpose, as cuBLASLt sees it: stored by columns */
static void mptc__layout(cublasLtMatrixLayoutOpaque_t *layout, cudaDataType type, int transposed, size_t rows,
                         size_t columns, size_t ld) {
    if (transposed) cublasLtMatrixLayoutInit(layout, type, rows, columns, (int64_t)ld);
    else cublasLtMatrixLayoutInit(layout, type, columns, rows, (int64_t)ld);
}

/* Can cuBLASLt compute this product with that epilogue? Then *f is ready for mptc__fusion_run. Answers are kept by
   shape. vector: the bias, or where the column sums go; heuristics refuse such an epilogue without it. */
static int mptc__fuses(mpt_context *ctx, const mpt_gemm_op *op, int epilogue, const void *vector, mptc__fusion *f) {
    mptc__device *device = mptc__of(ctx);
    const cublasComputeType_t compute = mptc__compute(ctx, op);
    const cudaDataType type = mptc__data_type(op->a.type), c_type = mptc__data_type(op->c.type);
    const int32_t a_op = mptc__operation(op->trans_b), b_op = mptc__operation(op->trans_a);
    const int key[MPTC__PLAN_KEY] = {
        mptc__row_align(op->b, op->ldb), mptc__row_align(op->a, op->lda), mptc__row_align(op->c, op->ldc),
        (int)op->m, (int)op->n, (int)op->k, (int)op->lda, (int)op->ldb, (int)op->ldc, a_op, b_op, (int)type,
        (int)c_type, epilogue, op->beta != 0};
    if (!epilogue || mptc__need_ints(ctx, op) != MPT_OK) return 0;
    cublasLtMatmulDescInit(&f->desc, compute, CUDA_R_32F);
    cublasLtMatmulDescSetAttribute(&f->desc, CUBLASLT_MATMUL_DESC_TRANSA, &a_op, sizeof a_op);
    cublasLtMatmulDescSetAttribute(&f->desc, CUBLASLT_MATMUL_DESC_TRANSB, &b_op, sizeof b_op);
    cublasLtMatmulDescSetAttribute(&f->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    cublasLtMatmulDescSetAttribute(&f->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &vector, sizeof vector);
    mptc__layout(&f->a, type, op->trans_b, op->k, op->n, op->ldb);
    mptc__layout(&f->b, type, op->trans_a, op->m, op->k, op->lda);
    mptc__layout(&f->c, c_type, 0, op->m, op->n, op->ldc);
    mptc__plan *plan = mptc__plan_of(device, key);
    if (memcmp(plan->key, key, sizeof key)) {
        cublasLtMatmulHeuristicResult_t found;
        memcpy(plan->key, key, sizeof key);
        plan->fuses = mptc__heuristic(device, key, f, &found);
        plan->apart = plan->fuses && mptc__better_apart(device, key, epilogue, found.wavesCount, f);
        if (plan->fuses) plan->algo = found.algo;
    }
    f->plan = *plan;
    return plan->fuses;
}

/* vector: the bias, or where the sums go */
static mpt_result mptc__fusion_run(mpt_context *ctx, const mpt_gemm_op *op, void *vector, mptc__fusion *f) {
    const mptc__device *device = mptc__of(ctx);
    if (device->step.mode == MPTC__REPLAY) return MPT_OK;
    cublasLtMatmulDescSetAttribute(&f->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &vector, sizeof vector);
    MPTC__CUBLAS(cublasLtMatmul((cublasLtHandle_t)device->cublas, &f->desc, &op->alpha, op->b.data, &f->a, op->a.data,
                                &f->b, &op->beta, op->c.data, &f->c, op->c.data, &f->c, &f->plan.algo,
                                device->products.at, device->products.bytes, device->stream));
    return MPT_OK;
}

/* Are column sums held that this product can compute along with the gradient of weights, from the same dy? */
static int mptc__takes_sums(mpt_context *ctx, const mpt_gemm_op *op, mptc__fusion *f) {
    const mptc__sums *s = &mptc__of(ctx)->held.sums;
    return mptc__of(ctx)->held.bias && op->trans_a && op->a.data == s->dy.data && op->m == s->C && op->lda == s->C &&
           op->k <= s->rows && s->db.type == MPT_F32 && op->c.type == MPT_F32 && (uintptr_t)s->db.data % 16 == 0 &&
           mptc__fuses(ctx, op, mptc__epilogue(op, CUBLASLT_EPILOGUE_BGRADB), s->db.data, f) && !f->plan.apart;
}

/* Computes both, for its rows of dy; the sums of other slices stay held. Sums that are added to others go through a
   buffer. */
static mpt_result mptc__product_sums(mpt_context *ctx, const mpt_gemm_op *op, mptc__fusion *f) {
    mptc__device *device = mptc__of(ctx);
    mptc__sums *s = &device->held.sums;
    const float beta = s->beta;
    mpt_gemm_op to = MPT_ZERO;
    MPTC__TRY(mptc__grow(ctx, &device->sums, s->C * sizeof(float)));
    to.m = 1;
    to.n = to.ldc = s->C;
    to.c = s->db;
    s->dy = mptc__at(s->dy, op->k * s->C);
    s->rows -= op->k;
    s->beta = 1;
    device->held.bias = s->rows > 0;
    MPTC__TRY(mptc__fusion_run(ctx, op, beta != 0 ? (void *)device->sums.at : s->db.data, f));
    if (beta != 0) return mptc__finish(ctx, &to, mpt_typed_array(device->sums.at, MPT_F32), s->C, beta);
    return MPT_OK;
}

/* -- Products of few terms, such as the gradient of a classifier's input: dy(m,classes) w(classes,n) --

   Writing the result takes longer than the arithmetic, and rows of ten 16-bit elements do not have the alignment that
   Tensor Cores need. */

enum { MPTC__FEW = 16 };

static int mptc__has_few_terms(const mpt_gemm_op *op) {
    const int plain = !op->trans_a && !op->trans_b && !op->bias.data && !op->act;
    return plain && op->k && op->k <= MPTC__FEW && op->m * mptc__divide_up(op->n, MPTC__PACK) <= INT_MAX;
}

/* c(m,n) = alpha a(m,k) b(k,n) + beta c, multiplied by the slope of a ReLU if its y(m,n) is given. A thread computes a
   pack of columns of a row. */
static __global__ void __launch_bounds__(MPTC__THREADS, 4)
mptc__few_k(mpt_gemm_op op, mpt_array y, mptc__divider packs) {
    const unsigned count = (unsigned)op.m * packs.by;
    for (unsigned i = (unsigned)mptc__thread(); i < count; i += (unsigned)mptc__stride()) {
        const unsigned row = mptc__divide(i, packs), column = (i - row * packs.by) * MPTC__PACK;
        const unsigned n = mptc__left(op.n, column);
        float sum[MPTC__PACK] = {0}, b[MPTC__PACK];
        for (unsigned k = 0; k < op.k; k++) {
            const float a = mptc__get(op.a, row * op.lda + k);
            mptc__load(op.b, k * op.ldb + column, n, b);
            MPTC__EACH(e) sum[e] += a * b[e];
        }
        MPTC__EACH(e) sum[e] *= op.alpha;
        if (op.beta != 0) {
            mptc__load(op.c, row * op.ldc + column, n, b);
            MPTC__EACH(e) sum[e] += op.beta * b[e];
        }
        if (y.data) {
            mptc__load(y, row * op.ldc + column, n, b);
            MPTC__EACH(e) sum[e] = mptc__relu_slope(b[e], sum[e]);
        }
        mptc__store(op.c, row * op.ldc + column, n, sum);
    }
}

static mpt_result mptc__few_run(mpt_context *ctx, const mpt_gemm_op *op, mpt_array y) {
    const size_t packs = mptc__divide_up(op->n, MPTC__PACK);
    if (!op->m || !op->n) return MPT_OK;
    return MPTC__SPREAD(mptc__few_k, op->m * packs, *op, y, mptc__divider_of(packs));
}

/* A whole gemm, with the sums that are held */
static mpt_result mptc__product(mpt_context *ctx, const mpt_gemm_op *op) {
    mptc__device *device = mptc__of(ctx);
    mptc__held *held = &device->held;
    mptc__fusion f;
    if (mptc__has_few_terms(op)) return mptc__few_run(ctx, op, op->bias);
    if (mptc__takes_sums(ctx, op, &f)) return mptc__product_sums(ctx, op, &f);
    if (mptc__fuses(ctx, op, mptc__epilogue(op, 0), op->bias.data, &f))
        return mptc__fusion_run(ctx, op, op->bias.data, &f);
    if (mptc__needs_sums(op)) {
        MPTC__TRY(mptc__grow(ctx, &device->sums, op->m * op->n * sizeof(float)));
        const mpt_array sums = mpt_typed_array(device->sums.at, MPT_F32);
        MPTC__TRY(mptc__multiply(ctx, op, sums, op->n, 0));
        return mptc__finish(ctx, op, sums, op->n, op->beta);
    }
    MPTC__TRY(mptc__multiply(ctx, op, op->c, op->ldc, op->beta));
    if (!op->bias.data && !op->act) return MPT_OK;
    if (!device->step.open || op->act || op->ldc != op->n || held->finish)
        return mptc__finish(ctx, op, op->c, op->ldc, 0);
    held->finish = 1; /* a loss adds the bias to logits as it reads them */
    held->product = *op;
    return MPT_OK;
}

/* Elements that a matrix spans in memory. */
static size_t mptc__span(size_t rows, size_t columns, size_t ld) {
    if (rows && columns) return (rows - 1) * ld + columns;
    return 0;
}

/* Casts operands of different types to fp32. */
static mpt_result mptc__one_type(mpt_context *ctx, mpt_array *a, size_t a_count, mpt_array *b, size_t b_count) {
    mptc__block *casts = &mptc__of(ctx)->casts;
    mpt_map_op map = MPT_ZERO;
    if (a->type == b->type) return MPT_OK;
    MPTC__TRY(mptc__grow(ctx, casts, mptc__round_up(a_count * 4, mptc__align) + b_count * 4));
    char *at = casts->at;
    for (int i = 0; i < 2; i++) {
        mpt_array *x = i ? b : a;
        map.n = i ? b_count : a_count;
        map.a = *x;
        map.out = *x = mpt_f32_array((float *)mptc__carve(&at, map.n * 4));
        if (map.n) MPTC__TRY(mptc__map_run(ctx, &map, NULL, 0));
    }
    return MPT_OK;
}

/* Rows of the result to compute at a time, so that `each` bytes per row fit into the rest of the workspace */
static size_t mptc__slice_rows(const mptc__device *device, size_t rows, size_t each, size_t taken) {
    const size_t left = device->desc.workspace > taken ? device->desc.workspace - taken : 0;
    const size_t fit = each ? left / each : rows;
    return mptc__min(rows, fit ? fit : 1);
}

static mpt_result mptc__gemm_run(mpt_context *ctx, const mpt_gemm_op *user) {
    mptc__device *device = mptc__of(ctx);
    mpt_gemm_op op = *user;
    const size_t a_count = op.trans_a ? mptc__span(op.k, op.m, op.lda) : mptc__span(op.m, op.k, op.lda);
    const size_t b_count = op.trans_b ? mptc__span(op.n, op.k, op.ldb) : mptc__span(op.k, op.n, op.ldb);
    mptc__fusion f;
    MPTC__TRY(mptc__enter(ctx));
    if (op.a_sums.data) mptc__sums_wait(ctx, op.k, op.m, op.a, op.beta, op.a_sums);
    MPTC__TRY(mptc__one_type(ctx, &op.a, a_count, &op.b, b_count));
    if (mptc__has_few_terms(&op) && device->step.open && op.beta == 0 && op.ldc == op.n) {
        device->held.few = 1; /* the gradient of a ReLU may follow */
        device->held.product = op;
        return MPT_OK;
    }
    const int sums = mptc__needs_sums(&op) && !mptc__fuses(ctx, &op, mptc__epilogue(&op, 0), op.bias.data, &f);
    const size_t slice = mptc__slice_rows(device, op.m, sums ? op.n * sizeof(float) : 0, 0);
    const mpt_gemm_op all = op;
    for (size_t row = 0; row < all.m; row += slice) {
        op.m = mptc__min(slice, all.m - row);
        op.a = mptc__at(all.a, all.trans_a ? row : row * all.lda);
        op.c = mptc__at(all.c, row * all.ldc);
        MPTC__TRY(mptc__product(ctx, &op));
    }
    return MPT_OK;
}

static mpt_result mptc__gemm(mpt_context *ctx, const mpt_gemm_op *op) {
    return mptc__sums_end(ctx, mptc__gemm_run(ctx, op));
}

/* -- Convolution --

   Three products, with a matrix that holds, for each position, the channels that each tap reads, tap after tap:

     forward   y(outputs,K)  = patches(outputs, R S C) w(K, R S C)^T
     weights   dw(K, R S C)  = dy(outputs,K)^T patches(outputs, R S C)
     data      dx(inputs,C)  = spread(inputs, R S K) filters(R S K, C)

   patches is gathered from x, with zeros in the padding; spread from dy, at the output that reads the input by tap
   (r,s), with zeros if there is none; filters is w(K,R,S,C) with K moved inside. With a stride, most of spread would be
   zeros: instead dy w is computed in fp32, and each input adds up the elements that its taps contributed to. Both
   matrices are gathered into scratch in slices of rows that fit the workspace. A 1x1 kernel with stride 1 and no
   padding reads x or dy directly. Groups are a batch of such products, whose C and K channels are parts of rows of x
   and y that are `groups` times as long; a row of the gathered matrix holds the parts of all groups one after
   another. */

/* Rows (n, down, across) of a matrix are the positions of N images of down x across; see mptc__divider. */
typedef struct mptc__position {
    unsigned n, down, across;
} mptc__position;

typedef struct mptc__grid {
    mptc__divider image, line; /* positions of an image, of a line of it */
    unsigned down;
} mptc__grid;

static mptc__grid mptc__grid_of(size_t down, size_t across) {
    mptc__grid grid;
    grid.image = mptc__divider_of(down * across);
    grid.line = mptc__divider_of(across);
    grid.down = (unsigned)down;
    return grid;
}

static __device__ __forceinline__ mptc__position mptc__position_of(unsigned i, mptc__grid grid) {
    mptc__position p;
    p.n = mptc__divide(i, grid.image);
    i -= p.n * grid.image.by;
    p.down = mptc__divide(i, grid.line);
    p.across = i - p.down * grid.line.by;
    return p;
}

/* Adds `step`, the position of a number of rows from 0: carries instead of divisions. */
static __device__ __forceinline__ void mptc__advance(mptc__position *p, mptc__position step, mptc__grid grid) {
    p->across += step.across;
    p->down += step.down;
    p->n += step.n;
    if (p->across >= grid.line.by) {
        p->across -= grid.line.by;
        p->down++;
    }
    if (p->down >= grid.down) {
        p->down -= grid.down;
        p->n++;
    }
}

typedef struct mptc__gather {
    int spread;               /* 1: rows are inputs (n,h,w) and read dy; 0: rows are outputs (n,p,q) and read x */
    mptc__grid grid;          /* of the rows */
    int down, across;         /* of the images that are read */
    int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
    mptc__divider strides_h, strides_w;
    const void *from;
    void *to;
    unsigned first, rows;     /* of this slice */
    unsigned lines;           /* rows that all threads copy at a time */
    mptc__divider columns;    /* of the matrix, in units of the copy */
    mptc__divider group;      /* of a group's part of it, in units */
    mptc__divider channels;   /* of a tap, in units, or in elements if a unit holds several taps */
    mptc__divider S;
    unsigned stride_from, ld; /* between rows of `from` and `to`, in the same */
    unsigned patch;           /* elements of a row, if a unit holds several taps */
} mptc__gather;

static mptc__gather mptc__gather_of(const mpt_conv2d_op *op) {
    const mpt_conv2d_shape *z = &op->shape;
    mptc__gather g = MPT_ZERO;
    g.spread = op->pass == MPT_BACKWARD_DATA;
    g.grid = g.spread ? mptc__grid_of(z->H, z->W) : mptc__grid_of(op->P, op->Q);
    g.down = (int)(g.spread ? op->P : z->H);
    g.across = (int)(g.spread ? op->Q : z->W);
    g.stride_h = (int)mptc__min(z->stride_h, INT_MAX); /* no position is that far */
    g.stride_w = (int)mptc__min(z->stride_w, INT_MAX);
    g.strides_h = mptc__divider_of((size_t)g.stride_h);
    g.strides_w = mptc__divider_of((size_t)g.stride_w);
    g.padding_h = (int)z->padding_h;
    g.padding_w = (int)z->padding_w;
    g.dilation_h = (int)mptc__min(z->dilation_h, INT_MAX);
    g.dilation_w = (int)mptc__min(z->dilation_w, INT_MAX);
    g.S = mptc__divider_of(z->S);
    return g;
}

/* Number of the position that tap (r,s) of this row reads, or -1 for zeros */
static __device__ __forceinline__ int mptc__tap(const mptc__gather *g, mptc__position at, unsigned r, unsigned s) {
    const int down = (int)(r * (unsigned)g->dilation_h) - g->padding_h;
    const int across = (int)(s * (unsigned)g->dilation_w) - g->padding_w;
    int y, x;
    if (!g->spread) {
        y = (int)at.down * g->stride_h + down;
        x = (int)at.across * g->stride_w + across;
    } else {
        y = (int)at.down - down;
        x = (int)at.across - across;
        if (g->stride_h > 1 || g->stride_w > 1) {
            const int p = (int)mptc__divide((unsigned)y & INT_MAX, g->strides_h);
            const int q = (int)mptc__divide((unsigned)x & INT_MAX, g->strides_w);
            if (y < 0 || x < 0 || p * g->stride_h != y || q * g->stride_w != x) return -1;
            y = p;
            x = q;
        }
    }
    if ((unsigned)y >= (unsigned)g->down || (unsigned)x >= (unsigned)g->across) return -1;
    return ((int)at.n * g->down + y) * g->across + x;
}

/* Reads x; dy with stride 1; dy with zeros between its rows and columns */
typedef enum mptc__reads { MPTC__PATCHES = 0, MPTC__SPREAD_CLOSE, MPTC__SPREAD_WIDE } mptc__reads;

/* to(rows, ld) = what the taps of rows first.. read, in units of 16 bytes of channels. A thread keeps its tap and
   channels and copies every `lines`-th row. */
template <mptc__reads reads> static __global__ void mptc__gather_k(mptc__gather g) {
    g.spread = reads != MPTC__PATCHES;
    if (reads == MPTC__SPREAD_CLOSE) g.stride_h = g.stride_w = 1;
    const unsigned count = g.lines * g.columns.by;
    const mptc__position step = mptc__position_of(g.lines, g.grid);
    for (unsigned i = (unsigned)mptc__thread(); i < count; i += (unsigned)mptc__stride()) {
        unsigned row = mptc__divide(i, g.columns);
        const unsigned column = i - row * g.columns.by, group = mptc__divide(column, g.group);
        const unsigned within = column - group * g.group.by, tap = mptc__divide(within, g.channels);
        const unsigned r = mptc__divide(tap, g.S), s = tap - r * g.S.by;
        const uint4 *from = (const uint4 *)g.from + (group * g.channels.by + within - tap * g.channels.by);
        uint4 *to = (uint4 *)g.to + (size_t)row * g.ld + column;
        mptc__position at = mptc__position_of(g.first + row, g.grid);
        for (; row < g.rows; row += g.lines) {
            const int position = mptc__tap(&g, at, r, s);
            uint4 unit = make_uint4(0, 0, 0, 0);
            if (position >= 0) unit = from[(size_t)position * g.stride_from];
            *to = unit;
            to += (size_t)g.lines * g.ld;
            mptc__advance(&at, step, g.grid);
        }
    }
}

/* The same if the channels of a tap do not fill a unit: the 16 bytes that a thread writes hold several taps. */
template <typename element> static __global__ void mptc__gather_few_k(mptc__gather g) {
    enum { COUNT = 16 / sizeof(element) };
    const unsigned count = g.lines * g.columns.by;
    const mptc__position step = mptc__position_of(g.lines, g.grid);
    for (unsigned i = (unsigned)mptc__thread(); i < count; i += (unsigned)mptc__stride()) {
        unsigned row = mptc__divide(i, g.columns), r[COUNT], s[COUNT], c[COUNT];
        const unsigned column = i - row * g.columns.by, group = mptc__divide(column, g.group);
        element *to = (element *)g.to + (size_t)row * g.ld + column * COUNT;
        mptc__position at = mptc__position_of(g.first + row, g.grid);
#pragma unroll
        for (unsigned e = 0; e < COUNT; e++) {
            const unsigned k = (column - group * g.group.by) * COUNT + e, tap = mptc__divide(k, g.channels);
            r[e] = k < g.patch ? mptc__divide(tap, g.S) : 0x10000u; /* far outside: zeros */
            s[e] = tap - mptc__divide(tap, g.S) * g.S.by;
            c[e] = k - tap * g.channels.by + group * g.channels.by;
        }
        for (; row < g.rows; row += g.lines) {
            element unit[COUNT];
#pragma unroll
            for (unsigned e = 0; e < COUNT; e++) {
                const int position = r[e] < 0x10000u ? mptc__tap(&g, at, r[e], s[e]) : -1;
                unit[e] = position < 0 ? 0 : ((const element *)g.from)[(size_t)position * g.stride_from + c[e]];
            }
            if (sizeof(element) == 2) mptc__store_bits((uint16_t *)to, MPTC__PACK, (const uint16_t *)unit);
            else MPTC__EACH(e) if (e < COUNT) to[e] = unit[e % COUNT];
            to += (size_t)g.lines * g.ld;
            mptc__advance(&at, step, g.grid);
        }
    }
}

/* to(groups, taps, K, C) = from(groups, K, taps, C) */
static __global__ void mptc__filters_k(mpt_array from, mpt_array to, size_t groups, size_t K, size_t taps, size_t C) {
    for (size_t i = mptc__thread(); i < groups * K * taps * C; i += mptc__stride()) {
        const size_t c = i % C, k = i / C % K, tap = i / C / K % taps, group = i / C / K / taps;
        mptc__put(to, i, mptc__get(from, ((group * K + k) * taps + tap) * C + c));
    }
}

static mpt_result mptc__filters(mpt_context *ctx, size_t groups, size_t K, size_t taps, size_t C, mpt_array w,
                                void *to) {
    return MPTC__SPREAD(mptc__filters_k, groups * K * taps * C, w, mpt_typed_array(to, w.type), groups, K, taps, C);
}

/* Gathers rows first .. first+rows of the matrix into to(rows, ld elements). A group's part of a row is a multiple of
   16 bytes. */
static mpt_result mptc__gather_rows(mpt_context *ctx, const mpt_conv2d_op *op, mpt_array from, size_t first,
                                    size_t rows, size_t ld, void *to) {
    const size_t size = mpt_dtype_size(from.type), each = 16 / size, taps = op->shape.R * op->shape.S;
    const size_t channels = op->pass == MPT_BACKWARD_DATA ? op->shape.K : op->shape.C;
    const int whole = channels % each == 0 && (uintptr_t)from.data % 16 == 0;
    const size_t group = mptc__divide_up(taps * channels, each), columns = op->shape.groups * group;
    const size_t units = whole ? each : 1;
    mptc__gather g = mptc__gather_of(op);
    const unsigned blocks = mptc__blocks(ctx, rows * columns);
    const size_t lines = (size_t)blocks * MPTC__THREADS / columns;
    g.from = from.data;
    g.to = to;
    g.first = (unsigned)first;
    g.rows = (unsigned)rows;
    g.lines = (unsigned)mptc__min(lines ? lines : 1, rows);
    g.columns = mptc__divider_of(columns);
    g.group = mptc__divider_of(group);
    g.channels = mptc__divider_of(channels / units);
    g.stride_from = (unsigned)(channels * op->shape.groups / units);
    g.ld = (unsigned)(ld / units);
    g.patch = (unsigned)(taps * channels);
    if (whole && !g.spread) return MPTC__LAUNCH(mptc__gather_k<MPTC__PATCHES>, blocks, MPTC__THREADS, g);
    if (whole && g.stride_h == 1 && g.stride_w == 1)
        return MPTC__LAUNCH(mptc__gather_k<MPTC__SPREAD_CLOSE>, blocks, MPTC__THREADS, g);
    if (whole) return MPTC__LAUNCH(mptc__gather_k<MPTC__SPREAD_WIDE>, blocks, MPTC__THREADS, g);
    if (size == 4) return MPTC__LAUNCH(mptc__gather_few_k<uint32_t>, blocks, MPTC__THREADS, g);
    return MPTC__LAUNCH(mptc__gather_few_k<uint16_t>, blocks, MPTC__THREADS, g);
}

/* The product of one pass, for all rows at once: in forward and data, a stands for the gathered matrix; in weights, b
   does. The operands given here are x and dy themselves, which the product of a 1x1 kernel reads directly. */
static mpt_gemm_op mptc__conv2d_product(const mpt_conv2d_op *op) {
    const mpt_conv2d_shape *z = &op->shape;
    const size_t outputs = z->N * op->P * op->Q, patch = z->R * z->S * z->C;
    const size_t x_row = z->C * z->groups, y_row = z->K * z->groups;
    mpt_gemm_op g = MPT_ZERO;
    g.alpha = 1;
    g.beta = op->beta;
    g.act = op->act;
    if (op->pass == MPT_FORWARD) {
        g.trans_b = 1;
        g.bias = op->bias;
        g.m = outputs;
        g.n = z->K;
        g.k = patch;
        g.a = op->x;
        g.b = op->w;
        g.c = op->y;
        g.lda = x_row;
        g.ldb = patch;
        g.ldc = y_row;
    } else if (op->pass == MPT_BACKWARD_DATA) {
        g.m = z->N * z->H * z->W;
        g.n = z->C;
        g.k = z->R * z->S * z->K;
        g.a = op->y;
        g.b = op->w;
        g.c = op->x;
        g.lda = y_row;
        g.ldb = z->C;
        g.ldc = x_row;
    } else {
        g.trans_a = 1;
        g.m = z->K;
        g.n = patch;
        g.k = outputs;
        g.a = op->y;
        g.b = op->x;
        g.c = op->w;
        g.lda = y_row;
        g.ldb = x_row;
        g.ldc = patch;
        if (z->groups == 1) g.a_sums = op->bias;
    }
    return g;
}

/* Forward and data: computes each slice of rows of the result from its rows of the gathered matrix. */
static mpt_result mptc__conv2d_rows(mpt_context *ctx, const mpt_conv2d_op *op, const mpt_gemm_op *all, size_t slice,
                                    size_t ld, void *matrix) {
    mpt_gemm_op g = *all;
    g.a = mpt_typed_array(matrix, all->a.type);
    g.lda = ld;
    for (size_t row = 0; row < all->m; row += slice) {
        g.m = mptc__min(slice, all->m - row);
        g.c = mptc__at(all->c, row * g.ldc);
        MPTC__TRY(mptc__gather_rows(ctx, op, all->a, row, g.m, ld, matrix));
        MPTC__TRY(mptc__product(ctx, &g));
    }
    return MPT_OK;
}

/* Weights: adds up the slices in fp32, in dw itself or, if that has 16 bits, in scratch. */
static mpt_result mptc__conv2d_weights(mpt_context *ctx, const mpt_conv2d_op *op, const mpt_gemm_op *all, size_t slice,
                                       size_t ld, char *at) {
    mpt_gemm_op g = *all;
    float *sums = all->c.type == MPT_F32 ? NULL : (float *)mptc__carve(&at, all->m * all->n * sizeof(float));
    g.b = mpt_typed_array(at, all->b.type);
    g.ldb = ld;
    if (sums) {
        g.c = mpt_f32_array(sums);
        g.beta = 0;
    }
    for (size_t row = 0; row < all->k; row += slice, g.beta = 1) {
        g.k = mptc__min(slice, all->k - row);
        g.a = mptc__at(all->a, row * g.lda);
        MPTC__TRY(mptc__gather_rows(ctx, op, all->b, row, g.k, ld, at));
        MPTC__TRY(mptc__product(ctx, &g));
    }
    if (sums) return mptc__finish(ctx, all, mpt_f32_array(sums), all->n, all->beta);
    return MPT_OK;
}

/* dx(rows,C) = sums of those elements of columns(outputs, R S C) that belong to taps on these rows, + beta dx. A thread
   computes a pack of a row. */
static __global__ void __launch_bounds__(MPTC__THREADS, 4)
mptc__collect_k(mptc__gather g, const float *columns, mpt_array dx, float beta, unsigned R, unsigned C,
                mptc__divider packs) {
    const unsigned S = g.S.by, ld = R * S * C;
    const size_t count = (size_t)g.rows * packs.by;
    for (size_t i = mptc__thread(); i < count; i += mptc__stride()) {
        const unsigned row = mptc__divide((unsigned)i, packs), c = ((unsigned)i - row * packs.by) * MPTC__PACK;
        const unsigned n = mptc__left(C, c);
        const mptc__position at = mptc__position_of(row, g.grid);
        const size_t to = (size_t)row * C + c;
        float sum[MPTC__PACK] = {0}, x[MPTC__PACK];
        for (unsigned r = 0; r < R; r++)
            for (unsigned s = 0; s < S; s++) {
                const int position = mptc__tap(&g, at, r, s);
                if (position < 0) continue;
                mptc__load(mpt_f32_array(columns), (size_t)position * ld + (r * S + s) * C + c, n, x);
                MPTC__EACH(e) sum[e] += x[e];
            }
        if (beta != 0) {
            mptc__load(dx, to, n, x);
            MPTC__EACH(e) sum[e] += beta * x[e];
        }
        mptc__store(dx, to, n, sum);
    }
}

/* Data with a stride, some images at a time; all: the product, with operands of one type */
static mpt_result mptc__conv2d_columns(mpt_context *ctx, const mpt_conv2d_op *op, const mpt_gemm_op *all) {
    mptc__device *device = mptc__of(ctx);
    const mpt_conv2d_shape *z = &op->shape;
    const size_t outputs = op->P * op->Q, inputs = z->H * z->W, packs = mptc__divide_up(z->C, MPTC__PACK);
    mpt_gemm_op g = MPT_ZERO;
    g.alpha = 1;
    g.n = g.ldb = g.ldc = z->R * z->S * z->C;
    g.k = g.lda = z->K;
    g.b = all->b;
    const size_t slice = mptc__slice_rows(device, z->N, outputs * g.n * sizeof(float), 0);
    MPTC__TRY(mptc__grow(ctx, &device->scratch, slice * outputs * g.n * sizeof(float)));
    MPTC__TRY(mptc__need_positions(ctx, "conv2d: packs of a slice", slice * inputs * packs));
    g.c = mpt_typed_array(device->scratch.at, MPT_F32);
    for (size_t image = 0; image < z->N; image += slice) {
        const size_t images = mptc__min(slice, z->N - image);
        mptc__gather from = mptc__gather_of(op);
        g.m = images * outputs;
        g.a = mptc__at(all->a, image * outputs * z->K);
        from.rows = (unsigned)(images * inputs);
        MPTC__TRY(mptc__multiply(ctx, &g, g.c, g.ldc, 0));
        MPTC__TRY(MPTC__SPREAD(mptc__collect_k, from.rows * packs, from, (const float *)g.c.data,
                               mptc__at(all->c, image * inputs * z->C), op->beta, (unsigned)z->R, (unsigned)z->C,
                               mptc__divider_of(packs)));
    }
    return MPT_OK;
}

/* -- Convolution as one kernel, see own_convolutions --

   The products above without a gathered matrix in memory: its elements go from x or dy straight to shared memory. A
   block computes a tile of 128 x 64 sums, 32 terms at a time. `other` is the operand that is not gathered:

                 result                gathered               other
     forward     y(outputs,K)          (outputs, R S C) of x  w(K, R S C)
     data        dx(inputs,C)          (inputs, R S K) of dy  w(K,R,S,C), read as (R S K, C)
     weights     dw(K, R S C), as its  (R S C, outputs) of x  dy(outputs,K)
                 transpose (R S C, K)

           32 terms           64 columns
          +--+      32 terms +----+----+     Each of four warps computes 64 x 32 sums, 16 x 8 at a time (mma.sync
          |  |               +----+----+     m16n8k16). Meanwhile the terms of the next two steps are fetched (cp.async)
     128  |  |               +----+----+     in pieces of 16 bytes: eight channels of a tap, or zeros in the padding.
     rows |  |               | 0  | 1  |     In a step a thread fetches four pieces of the gathered matrix, all of the
          |  |               +----+----+     same tap and channels, and two pieces of the other matrix.
          +--+               | 2  | 3  |
        gathered             +----+----+

   In shared memory a tile has the rows that are contiguous in global memory: rows of terms if these are channels of a
   tap, else one row for each term, which ldmatrix transposes while it reads. The pieces of neighbouring rows are
   permuted (swizzled), so that eight pieces that are read or written together are in different banks.

   The order of sums does not depend on the device: a block adds its terms in fp32 in steps of 16, whose inner order is
   the hardware's. The terms of dw, positions, are cut into parts by shape alone; mptc__plain_terms adds the parts. */

enum {
    MPTC__TILE_ROWS = 128,
    MPTC__TILE_COLUMNS = 64,
    MPTC__TILE_TERMS = 32,
    MPTC__TILE_THREADS = 128,
    MPTC__STAGES = 3,                                    /* steps in shared memory at a time */
    MPTC__PIECES = MPTC__TILE_TERMS / MPTC__PACK,        /* in a row of terms, */
    MPTC__TALL = MPTC__TILE_ROWS / MPTC__PACK,           /* in a row of the gathered tile's transpose, */
    MPTC__WIDE = MPTC__TILE_COLUMNS / MPTC__PACK,        /* in a row of columns, */
    MPTC__GATHERED = MPTC__TILE_ROWS * MPTC__PIECES,     /* and in the gathered tile of a step */
    MPTC__FETCHES = MPTC__GATHERED / MPTC__TILE_THREADS, /* of which a thread fetches so many */
    MPTC__STAGE = MPTC__GATHERED + MPTC__TILE_COLUMNS * MPTC__PIECES,
    MPTC__PITCH = MPTC__TILE_COLUMNS + MPTC__PACK,       /* of the sums, which replace the stages at the end */
    MPTC__OWN_LEAST = 16,                                /* channels */
    MPTC__OWN_MOST = 128,
    MPTC__OWN_BLOCKS = 512,                              /* wanted for dw, */
    MPTC__OWN_TERMS = 256                                /* if each has at least so many terms */
};

typedef struct mptc__implicit {
    mptc__grid grid;                 /* of the positions: outputs; inputs for dx */
    mptc__position on;               /* distance between the positions that a thread fetches */
    unsigned down, across;           /* of the images that are gathered */
    unsigned stride_h, stride_w;     /* tap r of position p reads row stride p + first + step r of its image, modulo */
    unsigned first_h, first_w;       /* 2^32, so that a row above the image is also a row below it */
    unsigned step_h, step_w;
    mptc__divider channels;          /* pieces of a tap */
    mptc__divider S;
    unsigned R;
    const uint4 *gathered, *other;
    unsigned rows, columns, terms;   /* of the product */
    unsigned tiles_down, tiles_across;
    unsigned part;                   /* terms of a block */
    mpt_array out;                   /* y or dx; or the parts of dw(K, R S C) in fp32, one after another */
    mpt_array bias;
    mpt_activation act;
    float beta;
} mptc__implicit;

/* The place of a piece in a tile whose rows have four pieces, or a multiple of eight */
static __device__ __forceinline__ unsigned mptc__in_narrow(unsigned row, unsigned piece) {
    return row * MPTC__PIECES + (piece ^ (row / 2 % MPTC__PIECES));
}
static __device__ __forceinline__ unsigned mptc__in_wide(unsigned pieces, unsigned row, unsigned piece) {
    return row * pieces + (piece ^ row % 8);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

/* *to = *from, or zeros; done when mptc__fetched says so */
static __device__ __forceinline__ void mptc__fetch(uint4 *to, const uint4 *from, bool there) {
    const unsigned at = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(there ? 16 : 0) : "memory");
}

/* Ends the fetches of a step; waits until at most so many steps are still being fetched. */
static __device__ __forceinline__ void mptc__fetch_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int steps> static __device__ __forceinline__ void mptc__fetched() {
    asm volatile("cp.async.wait_group %0;" ::"n"(steps) : "memory");
}

/* Loads four matrices of 8 x 8. A lane gives a row's address and gets two neighbours of a row (transposed: a
   column). */
template <bool transposed> static __device__ __forceinline__ void mptc__load_matrices(const uint4 *row, uint32_t *to) {
    const unsigned at = (unsigned)__cvta_generic_to_shared(row);
    if (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}

/* d(16,8) += a(16,16) b(16,8) */
template <mpt_dtype type>
static __device__ __forceinline__ void mptc__mma(float *d, const uint32_t *a, const uint32_t *b) {
    if (type == MPT_F16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                     "{%0,%1,%2,%3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                     "{%0,%1,%2,%3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* What a thread fetches of the gathered matrix: eight channels, from c on, of tap (r,s). It keeps where tap (0,0) of
   its rows is or, for dw, whose terms are positions, the next position. */
typedef struct mptc__fetcher {
    unsigned down[MPTC__FETCHES], across[MPTC__FETCHES];
    unsigned piece[MPTC__FETCHES]; /* its number, counted over all images */
    mptc__position next;
    unsigned r, s, c;              /* c in pieces */
} mptc__fetcher;

/* The number of the first piece of pixel (down, across) of image n */
static __device__ __forceinline__ unsigned mptc__piece_of(const mptc__implicit *v, unsigned n, unsigned down,
                                                          unsigned across) {
    return ((n * v->down + down) * v->across + across) * v->channels.by;
}

template <mpt_pass pass> static __device__ __forceinline__ mptc__fetcher
mptc__fetcher_of(const mptc__implicit *v, unsigned row, unsigned term) {
    const unsigned k = pass == MPT_BACKWARD_WEIGHT ? row / MPTC__PACK + threadIdx.x % MPTC__TALL
                                                   : threadIdx.x % MPTC__PIECES;
    const unsigned tap = mptc__divide(k, v->channels);
    mptc__fetcher f = {};
    f.r = mptc__divide(tap, v->S);
    f.s = tap - f.r * v->S.by;
    f.c = k - tap * v->channels.by;
    f.next = mptc__position_of(term + threadIdx.x / MPTC__TALL, v->grid);
#pragma unroll
    for (unsigned i = 0; i < MPTC__FETCHES; i++) {
        const unsigned mine = row + threadIdx.x / MPTC__PIECES + i * (MPTC__TILE_THREADS / MPTC__PIECES);
        const mptc__position at = mptc__position_of(mine < v->rows ? mine : v->rows - 1, v->grid);
        f.down[i] = at.down * v->stride_h + v->first_h;
        f.across[i] = at.across * v->stride_w + v->first_w;
        f.piece[i] = mptc__piece_of(v, at.n, f.down[i], f.across[i]);
    }
    return f;
}

/* Fetches the gathered tile of the terms from `term` on; from `end` on they are zeros. */
template <mpt_pass pass> static __device__ __forceinline__ void
mptc__fetch_gathered(const mptc__implicit *v, mptc__fetcher *f, unsigned term, unsigned end, uint4 *tile) {
    const unsigned tap_h = f->r * v->step_h, tap_w = f->s * v->step_w;
    const unsigned apart = mptc__piece_of(v, 0, tap_h, tap_w) + f->c; /* from tap (0,0) */
#pragma unroll
    for (unsigned i = 0; i < MPTC__FETCHES; i++) {
        const unsigned line = threadIdx.x / MPTC__TALL + i * (MPTC__TILE_THREADS / MPTC__TALL);
        unsigned to = mptc__in_narrow(threadIdx.x / MPTC__PIECES, threadIdx.x % MPTC__PIECES);
        unsigned piece = f->piece[i] + apart;
        unsigned down = f->down[i] + tap_h, across = f->across[i] + tap_w;
        bool there = f->r < v->R;
        if (pass == MPT_BACKWARD_WEIGHT) {
            to = mptc__in_wide(MPTC__TALL, threadIdx.x / MPTC__TALL, threadIdx.x % MPTC__TALL);
            there &= term + line < end;
            down = f->next.down * v->stride_h + v->first_h + tap_h;
            across = f->next.across * v->stride_w + v->first_w + tap_w;
            piece = mptc__piece_of(v, f->next.n, down, across) + f->c;
            mptc__advance(&f->next, v->on, v->grid);
        }
        there &= down < v->down && across < v->across;
        mptc__fetch(tile + to + i * MPTC__TILE_THREADS, v->gathered + (there ? piece : 0), there);
    }
    if (pass != MPT_BACKWARD_WEIGHT) f->c += MPTC__PIECES;
    while (pass != MPT_BACKWARD_WEIGHT && f->c >= v->channels.by) {
        f->c -= v->channels.by;
        if (++f->s < v->S.by) continue;
        f->s = 0;
        f->r++;
    }
}

/* The same terms of the other matrix, columns `column` and following */
template <mpt_pass pass> static __device__ __forceinline__ void
mptc__fetch_other(const mptc__implicit *v, unsigned column, unsigned term, unsigned end, uint4 *tile) {
    const unsigned pieces = pass == MPT_FORWARD ? MPTC__PIECES : MPTC__WIDE, piece = threadIdx.x % pieces;
#pragma unroll
    for (unsigned i = 0; i < (MPTC__STAGE - MPTC__GATHERED) / MPTC__TILE_THREADS; i++) {
        const unsigned row = threadIdx.x / pieces + i * (MPTC__TILE_THREADS / pieces);
        unsigned k = term + row, n = column + piece * MPTC__PACK, line = k;
        unsigned to = mptc__in_wide(pieces, threadIdx.x / pieces, piece);
        if (pass == MPT_FORWARD) {
            k = term + piece * MPTC__PACK;
            n = column + row;
            to = mptc__in_narrow(threadIdx.x / pieces, piece);
        } else if (pass == MPT_BACKWARD_DATA) {
            const unsigned tap = mptc__divide(k / MPTC__PACK, v->channels);
            line = (k - tap * v->channels.by * MPTC__PACK) * v->R * v->S.by + tap; /* of w(K R S, C) */
        }
        const bool there = k < end && n < v->columns;
        const unsigned at = pass == MPT_FORWARD ? n * (v->terms / MPTC__PACK) + k / MPTC__PACK
                                                : line * (v->columns / MPTC__PACK) + n / MPTC__PACK;
        mptc__fetch(tile + to + i * MPTC__TILE_THREADS, v->other + (there ? at : 0), there);
    }
}

template <mpt_pass pass> static __device__ __forceinline__ void
mptc__fetch_step(const mptc__implicit *v, mptc__fetcher *f, unsigned column, unsigned term, unsigned end, uint4 *to) {
    mptc__fetch_gathered<pass>(v, f, term, end, to);
    mptc__fetch_other<pass>(v, column, term, end, to + MPTC__GATHERED);
    mptc__fetch_end();
}

/* sum(64,32) of this warp += its rows of the gathered tile times its columns of the other */
template <mpt_dtype type, mpt_pass pass> static __device__ __forceinline__ void
mptc__tile_multiply(const uint4 *gathered, const uint4 *other, unsigned row, unsigned column, float (*sum)[4][4]) {
    const bool tall = pass == MPT_BACKWARD_WEIGHT, wide = pass != MPT_FORWARD;
    const unsigned lane = threadIdx.x % MPTC__WARP, within = lane % 8, odd = lane / 8 % 2, upper = lane / 16;
#pragma unroll
    for (unsigned k = 0; k < MPTC__TILE_TERMS; k += 16) {
        uint32_t a[4][4], b[8];
#pragma unroll
        for (unsigned i = 0; i < 4; i++) { /* rows by `odd`, terms by `upper` */
            const unsigned at =
                tall ? mptc__in_wide(MPTC__TALL, 8 * upper + within, row / MPTC__PACK + 2 * i + odd) + k * MPTC__TALL
                     : mptc__in_narrow(row + 8 * odd + within, k / MPTC__PACK + upper) + 16 * i * MPTC__PIECES;
            mptc__load_matrices<tall>(gathered + at, a[i]);
        }
#pragma unroll
        for (unsigned j = 0; j < 4; j += 2) { /* columns by `upper`, terms by `odd` */
            const unsigned at =
                wide ? mptc__in_wide(MPTC__WIDE, 8 * odd + within, column / MPTC__PACK + j + upper) + k * MPTC__WIDE
                     : mptc__in_narrow(column + 8 * upper + within, k / MPTC__PACK + odd) + 8 * j * MPTC__PIECES;
            mptc__load_matrices<wide>(other + at, b + 2 * j);
        }
#pragma unroll
        for (unsigned i = 0; i < 4; i++)
#pragma unroll
            for (unsigned j = 0; j < 4; j++) mptc__mma<type>(sum[i][j], a[i], b + 2 * j);
    }
}

/* out(rows,columns) = act(sums + beta out + bias) */
static __device__ void mptc__tile_finish(const mptc__implicit *v, const float *tile, unsigned row, unsigned column) {
    for (unsigned i = threadIdx.x; i < MPTC__TILE_ROWS * MPTC__WIDE; i += MPTC__TILE_THREADS) {
        const unsigned m = i / MPTC__WIDE, n = i % MPTC__WIDE * MPTC__PACK;
        const size_t at = (size_t)(row + m) * v->columns + column + n;
        float x[MPTC__PACK];
        if (row + m >= v->rows || column + n >= v->columns) continue;
        MPTC__EACH(e) x[e] = tile[m * MPTC__PITCH + n + e];
        mptc__add_rest(v->out, at, v->beta, v->bias, column + n, MPTC__PACK, x);
        if (v->act) MPTC__EACH(e) x[e] = mptc__relu_slope(x[e], x[e]);
        mptc__store(v->out, at, MPTC__PACK, x);
    }
}

/* Stores a part of dw, the transpose of a tile: a thread writes eight rows of one column of the tile. */
static __device__ void mptc__tile_leave(const mptc__implicit *v, const float *tile, unsigned row, unsigned column,
                                        unsigned part) {
    for (unsigned i = threadIdx.x; i < MPTC__TALL * MPTC__TILE_COLUMNS; i += MPTC__TILE_THREADS) {
        const unsigned n = i % MPTC__TILE_COLUMNS, m = i / MPTC__TILE_COLUMNS * MPTC__PACK;
        float x[MPTC__PACK];
        if (row + m >= v->rows || column + n >= v->columns) continue;
        MPTC__EACH(e) x[e] = tile[(m + e) * MPTC__PITCH + n];
        mptc__store(v->out, ((size_t)part * v->columns + column + n) * v->rows + row + m, MPTC__PACK, x);
    }
}

#endif /* __CUDA_ARCH__ */

/* Over 64 registers, because a thread has 64 sums. Empty before compute capability 8.0, where it is never launched. */
template <mpt_dtype type, mpt_pass pass>
static __global__ void __launch_bounds__(MPTC__TILE_THREADS, 4) mptc__implicit_k(mptc__implicit v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    __shared__ uint4 stages[MPTC__STAGES * MPTC__STAGE];
    const unsigned across = blockIdx.x % v.tiles_across, down = blockIdx.x / v.tiles_across % v.tiles_down;
    const unsigned part = blockIdx.x / v.tiles_across / v.tiles_down, first = part * v.part;
    const unsigned end = first + (v.terms - first < v.part ? v.terms - first : v.part);
    const unsigned row = down * MPTC__TILE_ROWS, column = across * MPTC__TILE_COLUMNS;
    const unsigned warp = threadIdx.x / MPTC__WARP, lane = threadIdx.x % MPTC__WARP;
    const unsigned warp_row = warp / 2 * 64, warp_column = warp % 2 * 32;
    const unsigned steps = (end - first + MPTC__TILE_TERMS - 1) / MPTC__TILE_TERMS;
    mptc__fetcher f = mptc__fetcher_of<pass>(&v, row, first);
    float sum[4][4][4] = {};
#pragma unroll
    for (unsigned i = 0; i < MPTC__STAGES - 1; i++)
        mptc__fetch_step<pass>(&v, &f, column, first + i * MPTC__TILE_TERMS, end, stages + i * MPTC__STAGE);
    unsigned now = 0, next = MPTC__STAGES - 1; /* stages */
    for (unsigned step = 0; step < steps; step++) {
        const unsigned term = first + (step + MPTC__STAGES - 1) * MPTC__TILE_TERMS; /* zeros after the last */
        const uint4 *stage = stages + now * MPTC__STAGE;
        mptc__fetched<MPTC__STAGES - 2>();
        __syncthreads(); /* all threads have this step and have finished the one before, whose stage is filled next */
        mptc__fetch_step<pass>(&v, &f, column, term, end, stages + next * MPTC__STAGE);
        mptc__tile_multiply<type, pass>(stage, stage + MPTC__GATHERED, warp_row, warp_column, sum);
        next = now;
        now = now + 1 < MPTC__STAGES ? now + 1 : 0;
    }
    mptc__fetched<0>();
    __syncthreads();
    float *tile = (float *)stages; /* (TILE_ROWS, PITCH), in place of the stages */
#pragma unroll
    for (unsigned i = 0; i < 4; i++)
#pragma unroll
        for (unsigned j = 0; j < 4; j++)
#pragma unroll
            for (unsigned half = 0; half < 2; half++) {
                const unsigned m = warp_row + 16 * i + 8 * half + lane / 4, n = warp_column + 8 * j + lane % 4 * 2;
                *(float2 *)(tile + m * MPTC__PITCH + n) = make_float2(sum[i][j][2 * half], sum[i][j][2 * half + 1]);
            }
    __syncthreads();
    if (pass == MPT_BACKWARD_WEIGHT) mptc__tile_leave(&v, tile, row, column, part);
    else mptc__tile_finish(&v, tile, row, column);
#endif
}

template <mpt_dtype type> static mpt_result mptc__implicit_launch(mpt_context *ctx, mpt_pass pass, unsigned blocks,
                                                                  const mptc__implicit &v) {
    void (*kernel)(mptc__implicit) = mptc__implicit_k<type, MPT_FORWARD>;
    if (pass == MPT_BACKWARD_DATA) kernel = mptc__implicit_k<type, MPT_BACKWARD_DATA>;
    if (pass == MPT_BACKWARD_WEIGHT) kernel = mptc__implicit_k<type, MPT_BACKWARD_WEIGHT>;
    return mptc__launch(ctx, "launch of mptc__implicit_k", __LINE__, kernel, blocks, MPTC__TILE_THREADS, v);
}

/* Whether this kernel computes it. g: the product of the pass. With a stride, dx would gather mostly zeros. */
static int mptc__is_own(const mptc__device *device, const mpt_conv2d_op *op, const mpt_gemm_op *g) {
    const mpt_conv2d_shape *z = &op->shape;
    const int types = g->a.type == g->b.type && (g->a.type == MPT_F16 || g->a.type == MPT_BF16);
    const int whole = ((uintptr_t)g->a.data | (uintptr_t)g->b.data) % 16 == 0 && (z->C | z->K) % MPTC__PACK == 0;
    const size_t least = mptc__min(z->C, z->K), most = z->C + z->K - least, large = (size_t)INT_MAX * MPTC__PACK;
    if (!device->own || !types || !whole || g->act > MPT_RELU) return 0;
    if (least < MPTC__OWN_LEAST || most > MPTC__OWN_MOST) return 0;
    if (z->N * z->H * z->W * z->C > large || z->N * op->P * op->Q * z->K > large || z->R * z->S * z->C * z->K > large)
        return 0;
    return op->pass != MPT_BACKWARD_DATA || (z->stride_h == 1 && z->stride_w == 1);
}

/* What is gathered, and how */
static mptc__implicit mptc__implicit_of(const mpt_conv2d_op *op, const mpt_gemm_op *product) {
    const mptc__gather g = mptc__gather_of(op);
    const int for_weights = op->pass == MPT_BACKWARD_WEIGHT, for_data = op->pass == MPT_BACKWARD_DATA;
    const unsigned lines = MPTC__TILE_THREADS / MPTC__TALL, line = g.grid.line.by, image = g.grid.image.by;
    mptc__implicit v = MPT_ZERO;
    v.grid = g.grid;
    v.on.n = lines / image;
    v.on.down = lines % image / line;
    v.on.across = lines % line;
    v.down = (unsigned)g.down;
    v.across = (unsigned)g.across;
    v.stride_h = for_data ? 1 : (unsigned)g.stride_h;
    v.stride_w = for_data ? 1 : (unsigned)g.stride_w;
    v.first_h = (unsigned)(for_data ? g.padding_h : -g.padding_h);
    v.first_w = (unsigned)(for_data ? g.padding_w : -g.padding_w);
    v.step_h = (unsigned)(for_data ? -g.dilation_h : g.dilation_h);
    v.step_w = (unsigned)(for_data ? -g.dilation_w : g.dilation_w);
    v.channels = mptc__divider_of((for_data ? op->shape.K : op->shape.C) / MPTC__PACK);
    v.S = g.S;
    v.R = (unsigned)op->shape.R;
    v.gathered = (const uint4 *)(for_weights ? product->b.data : product->a.data);
    v.other = (const uint4 *)(for_weights ? product->a.data : product->b.data);
    v.rows = (unsigned)(for_weights ? product->n : product->m);
    v.columns = (unsigned)(for_weights ? product->m : product->n);
    v.terms = (unsigned)product->k;
    v.tiles_down = (unsigned)mptc__divide_up(v.rows, MPTC__TILE_ROWS);
    v.tiles_across = (unsigned)mptc__divide_up(v.columns, MPTC__TILE_COLUMNS);
    v.part = v.terms;
    v.out = product->c;
    v.bias = product->bias;
    v.act = product->act;
    v.beta = product->beta;
    return v;
}

static mpt_result mptc__implicit_run(mpt_context *ctx, const mpt_conv2d_op *op, const mpt_gemm_op *product) {
    mptc__device *device = mptc__of(ctx);
    mptc__implicit v = mptc__implicit_of(op, product);
    const size_t tiles = (size_t)v.tiles_down * v.tiles_across, all = (size_t)v.rows * v.columns;
    mptc__sums sums = {1, all, v.out, product->c, product->beta};
    if (op->pass == MPT_BACKWARD_WEIGHT) {
        const size_t most = mptc__divide_up(v.terms, MPTC__OWN_TERMS);
        const size_t parts = mptc__min(mptc__divide_up(MPTC__OWN_BLOCKS, tiles), most);
        v.part = (unsigned)mptc__round_up(mptc__divide_up(v.terms, parts), MPTC__TILE_TERMS);
        sums.rows = mptc__divide_up(v.terms, v.part);
        MPTC__TRY(mptc__grow(ctx, &device->sums, sums.rows * all * sizeof(float)));
        sums.dy = v.out = mpt_typed_array(device->sums.at, MPT_F32);
    }
    const unsigned blocks = (unsigned)(tiles * sums.rows);
    if (product->a.type == MPT_F16) MPTC__TRY(mptc__implicit_launch<MPT_F16>(ctx, op->pass, blocks, v));
    else MPTC__TRY(mptc__implicit_launch<MPT_BF16>(ctx, op->pass, blocks, v));
    if (op->pass != MPT_BACKWARD_WEIGHT) return MPT_OK;
    if (sums.rows > 1) return mptc__sums_run(ctx, &sums);
    return mptc__finish(ctx, product, v.out, product->n, product->beta);
}

static mpt_result mptc__conv2d_one(mpt_context *ctx, const mpt_conv2d_op *op) {
    mptc__device *device = mptc__of(ctx);
    const mpt_conv2d_shape *z = &op->shape;
    const size_t inputs = z->N * z->H * z->W, outputs = z->N * op->P * op->Q;
    const size_t taps = z->R * z->S, weights = z->K * taps * z->C;
    const int for_weights = op->pass == MPT_BACKWARD_WEIGHT, for_data = op->pass == MPT_BACKWARD_DATA;
    mpt_gemm_op g = mptc__conv2d_product(op);
    mptc__fusion f;
    if (!z->N) return g.m && g.n ? mptc__gemm(ctx, &g) : MPT_OK; /* gradients of weights are beta times the old ones */
    if (mpt__conv2d_is_product(z)) return mptc__gemm(ctx, &g); /* nothing to gather */

    /* the matrix is gathered from x or dy, whose type the other operand must share */
    size_t a_count = mptc__span(outputs, z->K, g.lda), b_count = weights;
    if (op->pass == MPT_FORWARD) a_count = mptc__span(inputs, z->C, g.lda);
    if (for_weights) b_count = mptc__span(inputs, z->C, g.ldb);
    if (g.a_sums.data) mptc__sums_wait(ctx, g.k, g.m, g.a, g.beta, g.a_sums);
    if (mptc__is_own(device, op, &g)) return mptc__implicit_run(ctx, op, &g);
    MPTC__TRY(mptc__one_type(ctx, &g.a, a_count, &g.b, b_count));
    if (for_data && (z->stride_h > 1 || z->stride_w > 1)) return mptc__conv2d_columns(ctx, op, &g);
    const size_t size = mpt_dtype_size(g.a.type), columns = for_weights ? g.n : g.k;
    const size_t ld = mptc__round_up(columns, 16 / size); /* Tensor Cores need rows aligned to 16 bytes */
    size_t others = 0;
    if (for_data) others = weights * size;
    if (for_weights && g.c.type != MPT_F32) others = weights * sizeof(float);
    const size_t fixed = mptc__round_up(others, mptc__align);
    size_t slice = mptc__slice_rows(device, for_weights ? outputs : g.m, ld * size, fixed);
    mpt_gemm_op part = g;
    /* scratch is aligned like NULL */
    part.a.data = NULL;
    part.lda = ld;
    part.m = slice;
    if (!for_weights && mptc__needs_sums(&g) && !mptc__fuses(ctx, &part, mptc__epilogue(&part, 0), g.bias.data, &f))
        slice = mptc__slice_rows(device, slice, g.n * sizeof(float), 0);
    MPTC__TRY(mptc__grow(ctx, &device->scratch, fixed + slice * ld * size));
    char *at = device->scratch.at;
    if (for_weights) return mptc__conv2d_weights(ctx, op, &g, slice, ld, at);
    if (for_data) {
        void *filters = mptc__carve(&at, weights * size);
        MPTC__TRY(mptc__filters(ctx, 1, z->K, taps, z->C, g.b, filters));
        g.b.data = filters;
    }
    return mptc__conv2d_rows(ctx, op, &g, slice, ld, at);
}

/* -- Groups: a batch of products -- */

/* c(m,n) = op(a) op(b) + beta c for each group; operands of groups are apart[] elements apart; see mptc__multiply. */
static mpt_result mptc__multiply_groups(mpt_context *ctx, const mpt_gemm_op *op, mpt_array c, size_t ldc, float beta,
                                        size_t groups, const size_t *apart) {
    const cudaDataType type = mptc__data_type(op->a.type);
    const cublasOperation_t a_op = mptc__operation(op->trans_a), b_op = mptc__operation(op->trans_b);
    MPTC__TRY(mptc__need_ints(ctx, op));
    if (mptc__of(ctx)->step.mode == MPTC__REPLAY) return MPT_OK;
    MPTC__CUBLAS(cublasGemmStridedBatchedEx(
        mptc__of(ctx)->cublas, b_op, a_op, (int)op->n, (int)op->m, (int)op->k, &op->alpha, op->b.data, type,
        (int)op->ldb, (long long)apart[1], op->a.data, type, (int)op->lda, (long long)apart[0], &beta, c.data,
        mptc__data_type(c.type), (int)ldc, (long long)apart[2], (int)groups, mptc__compute(ctx, op),
        CUBLAS_GEMM_DEFAULT));
    return MPT_OK;
}

typedef struct mptc__groups { /* a convolution with groups */
    const mpt_conv2d_op *op; /* C and K are those of one group */
    mpt_gemm_op product;     /* of one group, with all rows... */
    size_t apart[3];         /* ...and how far a, b and c of the next one are, in elements */
    int gathers;
    size_t slice, ld;        /* rows that are gathered at a time, elements of such a row */
    char *at;                /* scratch: for what else needs it, then for the gathered rows */
} mptc__groups;

/* Forward and data, see mptc__conv2d_rows: computes rows of all groups' results and finishes them together. */
static mpt_result mptc__groups_rows(mpt_context *ctx, const mptc__groups *w) {
    mptc__device *device = mptc__of(ctx);
    const mpt_gemm_op *all = &w->product;
    const size_t columns = all->n * w->op->shape.groups;
    const int sums = mptc__needs_sums(all);
    const size_t ldc = sums ? columns : all->ldc;
    const float beta = sums ? 0 : all->beta;
    mpt_gemm_op g = *all;
    if (w->gathers) {
        g.a.data = w->at;
        g.lda = w->ld;
    }
    if (sums) MPTC__TRY(mptc__grow(ctx, &device->sums, mptc__min(w->slice, all->m) * columns * sizeof(float)));
    for (size_t row = 0; row < all->m; row += w->slice) {
        mpt_array c = mptc__at(all->c, row * all->ldc);
        mpt_gemm_op to = *all;
        g.m = to.m = mptc__min(w->slice, all->m - row);
        to.n = columns;
        to.c = c;
        if (w->gathers) MPTC__TRY(mptc__gather_rows(ctx, w->op, all->a, row, g.m, w->ld, w->at));
        else g.a = mptc__at(all->a, row * all->lda);
        if (sums) c = mpt_typed_array(device->sums.at, MPT_F32);
        MPTC__TRY(mptc__multiply_groups(ctx, &g, c, ldc, beta, w->op->shape.groups, w->apart));
        if (sums) MPTC__TRY(mptc__finish(ctx, &to, c, columns, all->beta));
        else if (all->bias.data || all->act) MPTC__TRY(mptc__finish(ctx, &to, c, all->ldc, 0));
    }
    return MPT_OK;
}

/* See mptc__conv2d_weights. */
static mpt_result mptc__groups_weights(mpt_context *ctx, const mptc__groups *w) {
    const mpt_gemm_op *all = &w->product;
    const size_t groups = w->op->shape.groups;
    mpt_gemm_op g = *all, to = *all;
    char *at = w->at;
    to.m = all->m * groups;
    if (all->c.type != MPT_F32) {
        g.c = mpt_typed_array(mptc__carve(&at, to.m * all->n * sizeof(float)), MPT_F32);
        g.beta = 0;
    }
    if (w->gathers) {
        g.b.data = at;
        g.ldb = w->ld;
    }
    for (size_t row = 0; row < all->k; row += w->slice, g.beta = 1) {
        g.k = mptc__min(w->slice, all->k - row);
        g.a = mptc__at(all->a, row * all->lda);
        if (w->gathers) MPTC__TRY(mptc__gather_rows(ctx, w->op, all->b, row, g.k, w->ld, at));
        else g.b = mptc__at(all->b, row * all->ldb);
        MPTC__TRY(mptc__multiply_groups(ctx, &g, g.c, g.ldc, g.beta, groups, w->apart));
    }
    if (all->c.type == MPT_F32) return MPT_OK;
    return mptc__finish(ctx, &to, g.c, all->n, all->beta);
}

static mpt_result mptc__conv2d_groups(mpt_context *ctx, const mpt_conv2d_op *op) {
    mptc__device *device = mptc__of(ctx);
    const mpt_conv2d_shape *z = &op->shape;
    const size_t inputs = z->N * z->H * z->W, outputs = z->N * op->P * op->Q, groups = z->groups;
    const size_t taps = z->R * z->S, patch = taps * z->C, weights = groups * z->K * patch;
    const size_t x_count = inputs * z->C * groups, y_count = outputs * z->K * groups;
    const int for_weights = op->pass == MPT_BACKWARD_WEIGHT, for_data = op->pass == MPT_BACKWARD_DATA;
    mptc__groups w = MPT_ZERO;
    w.op = op;
    w.product = mptc__conv2d_product(op);
    mpt_gemm_op *g = &w.product;
    if (!z->N) {
        g->m *= for_weights ? groups : 1; /* gradients of weights are beta times the old ones */
        return g->m && g->n ? mptc__gemm(ctx, g) : MPT_OK;
    }
    const size_t a_count = op->pass == MPT_FORWARD ? x_count : y_count;
    const size_t b_count = for_weights ? x_count : weights;
    MPTC__TRY(mptc__one_type(ctx, &g->a, a_count, &g->b, b_count));
    const size_t size = mpt_dtype_size(g->a.type), columns = for_weights ? g->n : g->k;
    const size_t part = mptc__round_up(columns, 16 / size), rows = for_weights ? outputs : g->m;
    w.gathers = !mpt__conv2d_is_product(z);
    w.ld = groups * part;
    if (op->pass == MPT_FORWARD) { /* y from x and w */
        w.apart[0] = z->C;
        w.apart[1] = z->K * patch;
        w.apart[2] = z->K;
    } else if (for_data) { /* dx from dy and w */
        w.apart[0] = z->K;
        w.apart[1] = z->K * patch;
        w.apart[2] = z->C;
    } else { /* dw from dy and x */
        w.apart[0] = z->K;
        w.apart[1] = z->C;
        w.apart[2] = z->K * patch;
    }
    if (w.gathers) w.apart[for_weights] = part;
    const int spread = for_data && w.gathers;
    size_t others = 0;
    if (spread) others = weights * size;
    if (for_weights && g->c.type != MPT_F32) others = weights * sizeof(float);
    const size_t fixed = mptc__round_up(others, mptc__align);
    w.slice = w.gathers ? mptc__slice_rows(device, rows, w.ld * size, fixed) : rows;
    if (!for_weights && mptc__needs_sums(g))
        w.slice = mptc__slice_rows(device, w.slice, g->n * groups * sizeof(float), 0);
    MPTC__TRY(mptc__grow(ctx, &device->scratch, fixed + (w.gathers ? w.slice * w.ld * size : 0)));
    w.at = device->scratch.at;
    if (for_weights) return mptc__groups_weights(ctx, &w);
    if (spread) {
        void *filters = mptc__carve(&w.at, weights * size);
        MPTC__TRY(mptc__filters(ctx, groups, z->K, taps, z->C, g->b, filters));
        g->b.data = filters;
    }
    return mptc__groups_rows(ctx, &w);
}

/* -- Depthwise convolution: with one filter per channel there is no product -- */

/* Forward and data: y(rows,C) from the rows of x that the taps read, and w(taps,C). A thread computes a pack of a row.
   Over 64 registers: sums, inputs and weights of a pack, and the shape; with 64 it would spill. */
static __global__ void mptc__depthwise_k(mpt_conv2d_op op, mptc__gather g, size_t rows) {
    const unsigned R = (unsigned)op.shape.R, S = (unsigned)op.shape.S;
    const size_t C = op.shape.C, packs = (C + MPTC__PACK - 1) / MPTC__PACK;
    for (size_t i = mptc__thread(); i < rows * packs; i += mptc__stride()) {
        const size_t c = i % packs * MPTC__PACK, row = i / packs;
        const unsigned n = mptc__left(C, c);
        const mptc__position at = mptc__position_of((unsigned)row, g.grid);
        float sum[MPTC__PACK] = {0}, x[MPTC__PACK], w[MPTC__PACK];
        for (unsigned r = 0; r < R; r++)
            for (unsigned s = 0; s < S; s++) {
                const int position = mptc__tap(&g, at, r, s);
                if (position < 0) continue;
                mptc__load(op.x, (size_t)position * C + c, n, x);
                mptc__load(op.w, (r * S + s) * C + c, n, w);
                MPTC__EACH(e) sum[e] += x[e] * w[e];
            }
        if (op.beta != 0) mptc__load(op.y, row * C + c, n, x);
        if (op.bias.data) mptc__load(op.bias, c, n, w);
        MPTC__EACH(e) {
            if (op.beta != 0) sum[e] += op.beta * x[e];
            if (op.bias.data) sum[e] += w[e];
            sum[e] = mptc__activate(op.act, sum[e]);
        }
        mptc__store(op.y, row * C + c, n, sum);
    }
}

struct mptc__tap_terms { /* dy times the elements that taps tap.. read */
    enum { SUMS = 3 };
    typedef float real;
    mptc__gather g;
    mpt_array x, dy;
    unsigned C, taps;
    __device__ void add(unsigned row, unsigned end, unsigned c, unsigned n, unsigned tap,
                        real (*acc)[MPTC__PACK]) const {
        float u[MPTC__PACK], v[MPTC__PACK];
        for (; row < end; row += blockDim.y) {
            const mptc__position at = mptc__position_of(row, g.grid);
            mptc__load(dy, (size_t)row * C + c, n, u);
#pragma unroll
            for (unsigned s = 0; s < SUMS; s++) {
                const unsigned r = mptc__divide(tap + s, g.S);
                const int position = tap + s < taps ? mptc__tap(&g, at, r, tap + s - r * g.S.by) : -1;
                if (position < 0) continue;
                mptc__load(x, (size_t)position * C + c, n, v);
                MPTC__EACH(e) acc[s][e] += u[e] * v[e];
            }
        }
    }
    __device__ void finish(const mptc__columns *w, unsigned column, unsigned first, const double *total) const {
        mptc__columns_put<SUMS>(w, column, first, total);
    }
};

static mpt_result mptc__depthwise_weights(mpt_context *ctx, const mpt_conv2d_op *op) {
    const mpt_conv2d_shape *z = &op->shape;
    mptc__columns w = MPT_ZERO;
    mptc__tap_terms terms;
    terms.g = mptc__gather_of(op);
    terms.x = op->x;
    terms.dy = op->y;
    terms.C = (unsigned)z->C;
    terms.taps = (unsigned)(z->R * z->S);
    w.samples = 1;
    w.rows = z->N * op->P * op->Q;
    w.C = z->C;
    w.planes = z->R * z->S;
    w.out = op->w;
    w.beta = op->beta;
    w.tickets = mptc__of(ctx)->tickets;
    return mptc__columns_run(ctx, &w, terms);
}

static mpt_result mptc__depthwise(mpt_context *ctx, const mpt_conv2d_op *user) {
    mptc__device *device = mptc__of(ctx);
    const mpt_conv2d_shape *z = &user->shape;
    const size_t rows = z->N * (user->pass == MPT_FORWARD ? user->P * user->Q : z->H * z->W);
    mpt_conv2d_op op = *user;
    if (op.pass == MPT_BACKWARD_WEIGHT) return mptc__depthwise_weights(ctx, user);
    if (!rows) return MPT_OK;
    if (op.pass == MPT_BACKWARD_DATA) {
        op.x = user->y;
        op.y = user->x;
    }
    MPTC__TRY(mptc__grow(ctx, &device->scratch, z->R * z->S * z->C * mpt_dtype_size(op.w.type)));
    op.w.data = device->scratch.at;
    MPTC__TRY(mptc__filters(ctx, 1, z->C, z->R * z->S, 1, user->w, op.w.data));
    return MPTC__SPREAD(mptc__depthwise_k, rows * mptc__divide_up(z->C, MPTC__PACK), op, mptc__gather_of(user), rows);
}

static mpt_result mptc__conv2d(mpt_context *ctx, const mpt_conv2d_op *op) {
    const mpt_conv2d_shape *z = &op->shape;
    const size_t C = z->C / z->groups, K = z->K / z->groups;
    mpt_conv2d_op one = *op;
    MPTC__TRY(mptc__enter(ctx));
    MPTC__TRY(mptc__need_positions(ctx, "conv2d", z->N * z->H * z->W + 2 * (z->padding_h + z->padding_w)));
    MPTC__TRY(mptc__need_positions(ctx, "conv2d", z->N * op->P * op->Q * z->R * z->S));
    if (op->pass == MPT_BACKWARD_WEIGHT && op->bias.data && z->groups > 1) {
        const mptc__sums sums = {z->N * op->P * op->Q, z->K, op->y, op->bias, op->beta};
        MPTC__TRY(mptc__sums_run(ctx, &sums));
    }
    if (z->groups > 1 && C == 1 && K == 1) return mptc__depthwise(ctx, op);
    if (z->groups == 1) return mptc__sums_end(ctx, mptc__conv2d_one(ctx, op));
    one.shape.C = C;
    one.shape.K = K;
    return mptc__conv2d_groups(ctx, &one);
}

/* ==== NORMALISATION ====

   A set has one mean: a group of channels of a sample. If sets are few or thin, their sums come from sums over columns;
   if they have few pixels, or are many and wide, a team of threads sums each set. */

enum {
    MPTC__NORM_PIXELS = 8, /* few */
    MPTC__NORM_SETS = 256  /* many */
};

static int mptc__norm_by_sets(const mpt_norm_shape *z) {
    const int wide = z->C / z->groups >= MPTC__PACK, many = z->N * z->groups >= MPTC__NORM_SETS;
    return z->pixels <= MPTC__NORM_PIXELS || (wide && many);
}

/* Mean and 1 / sqrt(variance + eps) of n channels of a sample from c on; computes the root once per set. */
static __device__ void mptc__norm_load(const mpt_norm_op *op, size_t sample, size_t c, unsigned n, float *mean,
                                       float *inverse) {
    const size_t each = op->shape.C / op->shape.groups, sets = op->shape.N * op->shape.groups;
    size_t set = sample * op->shape.groups + c / each, left = each - c % each;
#pragma unroll
    for (unsigned e = 0; e < MPTC__PACK; e++, left--) {
        const bool next = left == 0 && e < n;
        if (next) {
            set++;
            left = each;
        }
        mean[e] = e == 0 || next ? op->stats[set] : mean[e - 1];
        inverse[e] = e == 0 || next ? mpt__norm_inverse(op->stats[sets + set], op->shape.eps) : inverse[e - 1];
    }
}

/* gamma or beta of n channels; `otherwise` for all of them if there is none */
static __device__ __forceinline__ void mptc__affine_load(mpt_array a, size_t c, unsigned n, float otherwise,
                                                         float *to) {
    MPTC__EACH(e) to[e] = otherwise;
    if (a.data) mptc__load(a, c, n, to);
}

/* Constants of the channels of a pack: y = (x - mean) scale + shift */
typedef struct mptc__normal {
    float mean[MPTC__PACK], inverse[MPTC__PACK], scale[MPTC__PACK], shift[MPTC__PACK];
} mptc__normal;

static __device__ __forceinline__ void mptc__normal_load(const mpt_norm_op *op, size_t sample, size_t c, unsigned n,
                                                         mptc__normal *to) {
    mptc__norm_load(op, sample, c, n, to->mean, to->inverse);
    mptc__affine_load(op->gamma, c, n, 1, to->scale);
    MPTC__EACH(e) to->scale[e] = __fmul_rn(to->scale[e], to->inverse[e]);
    mptc__affine_load(op->beta, c, n, 0, to->shift);
}

/* Rounds the same way in both passes, whatever the compiler would contract. */
static __device__ __forceinline__ float mptc__normal_of(float x, float mean, float scale, float shift) {
    return __fmaf_rn(__fsub_rn(x, mean), scale, shift);
}

/* dy times the slope of the ReLU after the norm. The slope is 0 where y is 0, which is where the unrounded y is at most
   `least`, half of the smallest number of y's type. Computing that again reads no memory, unlike reading y. */
static __device__ __forceinline__ float mptc__norm_least(mpt_dtype type) {
    if (type == MPT_F16) return mpt__float(0x33000000u);               /* 2^-25 */
    if (type == MPT_BF16) return mpt__float(0x00008000u) /* 2^-134 */;
    return 0;
}
static __device__ __forceinline__ float mptc__norm_slope(float normal, float least, float dy) {
    if (normal <= least) return 0.0f;
    return dy;
}

/* The first value of a set. Sums of x - shift and of its square lose no precision if the mean is far from 0. */
static __device__ __forceinline__ float mptc__norm_shift(const mpt_norm_op *op, size_t set) {
    const mpt_norm_shape *z = &op->shape;
    return mptc__get(op->x, set / z->groups * z->pixels * z->C + set % z->groups * (z->C / z->groups));
}

/* Stores, from the sums of a set, mean and variance of x, or the means that dx needs. */
static __device__ void mptc__norm_finish(const mpt_norm_op *op, size_t set, double a, double b) {
    const size_t sets = op->shape.N * op->shape.groups;
    const double count = (double)(op->shape.pixels * (op->shape.C / op->shape.groups));
    float *stats = op->stats + (op->pass == MPT_NORM_BACKWARD ? 2 * sets : 0) + set;
    a /= count;
    b /= count;
    if (op->pass == MPT_NORM_STATS) {
        b = b < a * a ? 0 : b - a * a;
        a += (double)mptc__norm_shift(op, set);
    }
    stats[0] = (float)a;
    stats[sets] = (float)b;
}

/* -- By columns -- */

/* *a += the sum of n values relative to the first value of the set, *b += the sum of their squares. The values are
   given as sums relative to the first of the n, which differs by `first` from that of the set.

   Eight 16-bit values are summed in fp32 at a time, because many devices compute fp64 at 1/64 of the rate. Their
   differences d are exact if they span at most 13 binades; the error of the sum of their squares is at most 8 2^-24 of
   it. Such a sum is at most 18 times the sum of (x - mean)^2 over the eight, as d^2 <= 2 (x - mean)^2 + 2 (first -
   mean)^2. The error of the sum of d, at most 7 2^-24 of the sum of |d|, counts 2 |first - mean| times, which is as
   much again: the error of a variance is at most 300 2^-24 of itself, if all roundings go one way. |d| over 2^62
   overflows. That is little compared to the rounding of 16-bit values. fp32 values are added one by one, for statistics
   that are right to 4 roundings. */
static __device__ __forceinline__ void mptc__moments_join(double *a, double *b, double first, unsigned n, float sum,
                                                          float square) {
    if (n == 1) {
        *a += first;
        *b += first * first;
        return;
    }
    const double relative = (double)sum, total = first * (double)n + relative;
    *a += total;
    *b += (double)square + first * (total + relative);
}

/* How many values are summed in fp32 first */
static __device__ __forceinline__ unsigned mptc__norm_few(mpt_dtype type) { return type == MPT_F32 ? 1 : MPTC__PACK; }

struct mptc__moment_terms { /* x - shift and its square */
    enum { SUMS = 2, LOADS = 4 };
    typedef double real;
    mpt_norm_op op;
    __device__ void add(unsigned row, unsigned end, unsigned c, unsigned n, unsigned, real (*acc)[MPTC__PACK]) const {
        const size_t each = op.shape.C / op.shape.groups, sample = row / op.shape.pixels;
        const unsigned most = mptc__norm_few(op.x.type), by = blockDim.y;
        float shift[MPTC__PACK] = {0}, v[MPTC__PACK], first[MPTC__PACK], sum[MPTC__PACK], square[MPTC__PACK];
        unsigned count = 0;
        if (row >= end) return;
        MPTC__EACH(e) if (e < n) shift[e] = mptc__norm_shift(&op, sample * op.shape.groups + (c + e) / each);
        for (; row < end; row += LOADS * by) {
            mptc__bits bits[LOADS];
#pragma unroll
            for (unsigned r = 0; r < LOADS; r++)
                if (row + r * by < end) mptc__load_pack(op.x, (size_t)(row + r * by) * op.shape.C + c, n, &bits[r]);
#pragma unroll
            for (unsigned r = 0; r < LOADS; r++) {
                if (row + r * by >= end) continue;
                mptc__widen_pack(&bits[r], op.x.type, v);
                MPTC__EACH(e) {
                    if (!count) {
                        first[e] = v[e];
                        sum[e] = square[e] = 0;
                    }
                    const float d = v[e] - first[e];
                    sum[e] += d;
                    square[e] += d * d;
                }
                if (++count < most) continue;
                join(acc, first, shift, count, sum, square);
                count = 0;
            }
        }
        if (count) join(acc, first, shift, count, sum, square);
    }
    static __device__ void join(real (*acc)[MPTC__PACK], const float *first, const float *shift, unsigned count,
                                const float *sum, const float *square) {
        MPTC__EACH(e) mptc__moments_join(&acc[0][e], &acc[1][e], (double)first[e] - (double)shift[e], count, sum[e],
                                         square[e]);
    }
    __device__ void finish(const mptc__columns *, unsigned column, unsigned, const double *total) const {
        mptc__norm_finish(&op, column, total[0], total[1]);
    }
};

/* dy, times the slope of a ReLU if there is one, and dy xhat. Eight values of any type are added in fp32 first: the
   error is at most 7 2^-24 of the sum of magnitudes, plus the rounding of each product. */
struct mptc__gradient_terms {
    enum { SUMS = 2, LOADS = 2 };
    typedef double real;
    mpt_norm_op op;
    mpt_norm_op running; /* statistics to be averaged as well; stats NULL: none */
    int means;           /* 1: each column is a set, and dx needs its means */
    __device__ void add(unsigned row, unsigned end, unsigned c, unsigned n, unsigned, real (*acc)[MPTC__PACK]) const {
        const unsigned by = blockDim.y;
        const float least = mptc__norm_least(op.saved.type);
        float x[MPTC__PACK], dy[MPTC__PACK], sum[MPTC__PACK] = {0}, product[MPTC__PACK] = {0};
        unsigned next = 0, count = 0;
        mptc__normal normal;
        for (; row < end; row += LOADS * by) {
            mptc__bits x_bits[LOADS], dy_bits[LOADS];
#pragma unroll
            for (unsigned r = 0; r < LOADS; r++) {
                if (row + r * by >= end) continue;
                const size_t at = (size_t)(row + r * by) * op.shape.C + c;
                mptc__load_pack(op.x, at, n, &x_bits[r]);
                mptc__load_pack(op.y, at, n, &dy_bits[r]);
            }
#pragma unroll
            for (unsigned r = 0; r < LOADS; r++) {
                if (row + r * by >= end) continue;
                if (row + r * by >= next) {
                    const unsigned pixels = (unsigned)op.shape.pixels, sample = (row + r * by) / pixels;
                    mptc__normal_load(&op, sample, c, n, &normal);
                    next = (sample + 1) * pixels;
                }
                mptc__widen_pack(&x_bits[r], op.x.type, x);
                mptc__widen_pack(&dy_bits[r], op.y.type, dy);
                MPTC__EACH(e) {
                    const float y = mptc__normal_of(x[e], normal.mean[e], normal.scale[e], normal.shift[e]);
                    const float xhat = (x[e] - normal.mean[e]) * normal.inverse[e];
                    if (op.act) dy[e] = mptc__norm_slope(y, least, dy[e]);
                    sum[e] += dy[e];
                    product[e] += dy[e] * xhat;
                }
                if (++count % MPTC__PACK == 0) join(acc, sum, product);
            }
        }
        join(acc, sum, product);
    }
    static __device__ void join(real (*acc)[MPTC__PACK], float *sum, float *product) {
        MPTC__EACH(e) {
            acc[0][e] += (double)sum[e];
            acc[1][e] += (double)product[e];
            sum[e] = product[e] = 0;
        }
    }
    __device__ void finish(const mptc__columns *w, unsigned column, unsigned, const double *total) const {
        const size_t sets = op.shape.N * op.shape.groups;
        mptc__sum_put(op.dbeta, column, total[0], op.scale);
        mptc__sum_put(op.dgamma, column, total[1], op.scale);
        if (means) {
            const double gamma = op.gamma.data ? (double)mptc__get(op.gamma, column) : 1;
            mptc__norm_finish(&op, column, gamma * total[0], gamma * total[1]);
        }
        if (!running.stats) return;
        mpt__norm_average(&running, op.shape.pixels, column);
        mpt__norm_average(&running, op.shape.pixels, sets + column);
    }
};

/* Adds up the parts of each set, and in the backward pass of each channel, with a warp for each. */
static __global__ void mptc__norm_fold_k(mpt_norm_op op, mptc__columns w, size_t sets) {
    const size_t each = w.C / op.shape.groups, outputs = sets + (op.pass == MPT_NORM_BACKWARD ? w.C : 0);
    const mpt_array none = MPT_ZERO;
    for (size_t i = mptc__thread() / MPTC__WARP; i < outputs; i += mptc__stride() / MPTC__WARP) {
        const bool set = i < sets;
        const size_t part = set ? i / op.shape.groups * w.slices : 0;
        const size_t count = set ? w.slices : w.samples * w.slices;
        const size_t c = set ? i % op.shape.groups * each : i - sets;
        const size_t width = set ? each : 1;
        const mpt_array weight = set && op.pass == MPT_NORM_BACKWARD ? op.gamma : none;
        const double a = mptc__fold(&w, 0, part, count, c, width, weight);
        const double b = mptc__fold(&w, 1, part, count, c, width, weight);
        if (threadIdx.x % MPTC__WARP) continue;
        if (set) {
            mptc__norm_finish(&op, i, a, b);
        } else {
            mptc__sum_put(op.dbeta, c, a, op.scale);
            mptc__sum_put(op.dgamma, c, b, op.scale);
        }
    }
}

/* Is each set a column, as in batch norm? */
static int mptc__norm_sets_are_columns(const mpt_norm_shape *z) { return z->N == 1 && z->groups == z->C; }

/* The sums of all columns, and of all sets unless `sets` is 0. If sets are sums of columns, these may be in several
   tiles, so they need another launch. Rows are divided the same way whether sets are wanted or not. */
template <typename terms>
static mpt_result mptc__norm_columns(mpt_context *ctx, const mpt_norm_op *op, size_t sets, const terms &t) {
    const mpt_norm_shape *z = &op->shape;
    const int together = mptc__norm_by_sets(z) || mptc__norm_sets_are_columns(z);
    mptc__columns w = MPT_ZERO;
    w.samples = together ? 1 : z->N;
    w.rows = together ? z->N * z->pixels : z->pixels;
    w.C = z->C;
    w.planes = terms::SUMS;
    if (together) w.tickets = mptc__of(ctx)->tickets;
    MPTC__TRY(mptc__columns_run(ctx, &w, t));
    if (together) return MPT_OK;
    return MPTC__SPREAD(mptc__norm_fold_k, (sets + z->C) * MPTC__WARP, *op, w, sets);
}

/* -- By sets: blockDim.x threads are a team, blockDim.y teams are a block -- */

/* Sum over a team, which all its threads get: pairwise in a warp, then the warps in order. A team of more than a warp
   is a whole block. All threads of the block must call it. */
static __device__ double mptc__team_sum(double x) {
    __shared__ double warps[MPTC__WARPS];
    x = mptc__warp_sum(x, blockDim.x < MPTC__WARP ? blockDim.x : MPTC__WARP);
    if (blockDim.x <= MPTC__WARP) return x;
    __syncthreads(); /* the previous sum may still be read */
    if (threadIdx.x % MPTC__WARP == 0) warps[threadIdx.x / MPTC__WARP] = x;
    __syncthreads();
    x = 0;
    for (unsigned warp = 0; warp < MPTC__WARPS; warp++) x += warps[warp];
    return x;
}

typedef struct mptc__run { /* of n channels of one pixel, from channel c on */
    size_t at, c;
    unsigned n;
} mptc__run;

/* Run number i of a set; an empty run after the last one */
static __device__ __forceinline__ mptc__run mptc__run_of(const mpt_norm_shape *z, size_t set, size_t i) {
    const size_t each = z->C / z->groups, packs = (each + MPTC__PACK - 1) / MPTC__PACK;
    const size_t pixel = i / packs, within = i % packs * MPTC__PACK;
    mptc__run run;
    run.c = set % z->groups * each + within;
    run.at = (set / z->groups * z->pixels + pixel) * z->C + run.c;
    run.n = set < z->N * z->groups && pixel < z->pixels ? mptc__left(each, within) : 0;
    return run;
}

static __global__ void mptc__norm_stats_k(mpt_norm_op op) {
    const size_t sets = op.shape.N * op.shape.groups;
    for (size_t first = (size_t)blockIdx.x * blockDim.y; first < sets; first += (size_t)gridDim.x * blockDim.y) {
        const size_t set = first + threadIdx.y;
        const double shift = set < sets ? (double)mptc__norm_shift(&op, set) : 0;
        double a = 0, b = 0;
        mptc__run run;
        for (size_t i = threadIdx.x; run = mptc__run_of(&op.shape, set, i), run.n; i += blockDim.x) {
            float x[MPTC__PACK];
            mptc__load(op.x, run.at, run.n, x);
            if (mptc__norm_few(op.x.type) == 1) {
                MPTC__EACH(e) if (e < run.n) mptc__moments_join(&a, &b, (double)x[e] - shift, 1, 0, 0);
                continue;
            }
            float sum = 0, square = 0;
            MPTC__EACH(e) {
                const float d = e < run.n ? x[e] - x[0] : 0;
                sum += d;
                square += d * d;
            }
            mptc__moments_join(&a, &b, (double)x[0] - shift, run.n, sum, square);
        }
        a = mptc__team_sum(a);
        b = mptc__team_sum(b);
        if (set < sets && threadIdx.x == 0) mptc__norm_finish(&op, set, a, b);
    }
}

/* x, dy (times the slope of a ReLU if there is one) and gamma of a run */
static __device__ __forceinline__ void mptc__norm_run_load(const mpt_norm_op *op, mptc__run run, float mean,
                                                           float inverse, float *x, float *dy, float *gamma) {
    const float least = mptc__norm_least(op->saved.type);
    float beta[MPTC__PACK];
    mptc__load(op->x, run.at, run.n, x);
    mptc__load(op->y, run.at, run.n, dy);
    mptc__affine_load(op->gamma, run.c, run.n, 1, gamma);
    if (!op->act) return;
    mptc__affine_load(op->beta, run.c, run.n, 0, beta);
    MPTC__EACH(e) {
        const float y = mptc__normal_of(x[e], mean, __fmul_rn(gamma[e], inverse), beta[e]);
        dy[e] = mptc__norm_slope(y, least, dy[e]);
    }
}

/* dx, and the sums that it needs: the second pass over a set finds it in the cache */
static __global__ void mptc__norm_backward_k(mpt_norm_op op) {
    const size_t sets = op.shape.N * op.shape.groups;
    const double count = (double)(op.shape.pixels * (op.shape.C / op.shape.groups));
    for (size_t first = (size_t)blockIdx.x * blockDim.y; first < sets; first += (size_t)gridDim.x * blockDim.y) {
        const size_t set = first + threadIdx.y;
        const float mean = set < sets ? op.stats[set] : 0;
        const float inverse = set < sets ? mpt__norm_inverse(op.stats[sets + set], op.shape.eps) : 0;
        float x[MPTC__PACK], dy[MPTC__PACK], gamma[MPTC__PACK];
        double a = 0, b = 0;
        mptc__run run;
        for (size_t i = threadIdx.x; run = mptc__run_of(&op.shape, set, i), run.n; i += blockDim.x) {
            float sum = 0, sum_xhat = 0; /* see mptc__gradient_terms */
            mptc__norm_run_load(&op, run, mean, inverse, x, dy, gamma);
            MPTC__EACH(e) {
                const float product = gamma[e] * dy[e];
                sum += product;
                sum_xhat += product * ((x[e] - mean) * inverse);
            }
            a += (double)sum;
            b += (double)sum_xhat;
        }
        const float mean_a = (float)(mptc__team_sum(a) / count), mean_b = (float)(mptc__team_sum(b) / count);
        for (size_t i = threadIdx.x; run = mptc__run_of(&op.shape, set, i), run.n; i += blockDim.x) {
            mptc__norm_run_load(&op, run, mean, inverse, x, dy, gamma);
            MPTC__EACH(e) x[e] = inverse * (gamma[e] * dy[e] - mean_a - (x[e] - mean) * inverse * mean_b);
            if (op.scale_x != 0) mptc__load(op.dx, run.at, run.n, dy);
            MPTC__EACH(e) if (op.scale_x != 0) x[e] += op.scale_x * dy[e];
            mptc__store(op.dx, run.at, run.n, x);
        }
    }
}

/* A team has as many threads as a set has packs, up to a warp; it is a block if a warp would need eight turns. */
static dim3 mptc__norm_team(const mpt_norm_shape *z) {
    const size_t packs = z->pixels * mptc__divide_up(z->C / z->groups, MPTC__PACK);
    unsigned team = 1;
    while (team < MPTC__WARP && team < packs) team *= 2;
    if (packs >= 8 * MPTC__WARP) team = MPTC__THREADS;
    return dim3(team, MPTC__THREADS / team);
}

/* -- Elementwise: y, or dx from the sums -- */

/* A thread computes a pack of channels of every `strands`-th pixel of a sample, and loads their constants once. dx
   needs up to six constants per channel, so it takes over 64 registers. */
template <bool forward> static __global__ void mptc__norm_map_k(mpt_norm_op op, size_t strands) {
    const mpt_norm_shape z = op.shape;
    const size_t packs = (z.C + MPTC__PACK - 1) / MPTC__PACK, each = z.C / z.groups, sets = z.N * z.groups;
    const float least = mptc__norm_least(op.saved.type);
    for (size_t i = mptc__thread(); i < z.N * strands * packs; i += mptc__stride()) {
        const size_t c = i % packs * MPTC__PACK, sample = i / packs / strands;
        const unsigned n = mptc__left(z.C, c);
        float slope[MPTC__PACK], level[MPTC__PACK], x[MPTC__PACK], v[MPTC__PACK];
        mptc__normal normal;
        mptc__normal_load(&op, sample, c, n, &normal);
        MPTC__EACH(e) {
            slope[e] = level[e] = 0;
            if (!forward && !op.frozen && e < n) {
                const float *means = op.stats + 2 * sets + sample * z.groups + (c + e) / each;
                slope[e] = -normal.inverse[e] * normal.inverse[e] * means[sets];
                level[e] = -normal.inverse[e] * means[0];
            }
        }
        for (size_t pixel = i / packs % strands; pixel < z.pixels; pixel += strands) {
            const size_t at = (sample * z.pixels + pixel) * z.C + c;
            mptc__load(op.x, at, n, x);
            if (forward) {
                MPTC__EACH(e) {
                    const float y = mptc__normal_of(x[e], normal.mean[e], normal.scale[e], normal.shift[e]);
                    v[e] = mptc__activate(op.act, y);
                }
                mptc__store(op.y, at, n, v);
                continue;
            }
            mptc__load(op.y, at, n, v);
            MPTC__EACH(e) {
                const float y = mptc__normal_of(x[e], normal.mean[e], normal.scale[e], normal.shift[e]);
                if (op.act) v[e] = mptc__norm_slope(y, least, v[e]);
                v[e] = v[e] * normal.scale[e] + ((x[e] - normal.mean[e]) * slope[e] + level[e]);
            }
            if (op.scale_x != 0) mptc__load(op.dx, at, n, x);
            MPTC__EACH(e) if (op.scale_x != 0) v[e] += op.scale_x * x[e];
            mptc__store(op.dx, at, n, v);
        }
    }
}

/* As many strands as fill the device */
static mpt_result mptc__norm_map(mpt_context *ctx, const mpt_norm_op *op) {
    const size_t lines = op->shape.N * mptc__divide_up(op->shape.C, MPTC__PACK);
    const size_t full = (size_t)mptc__of(ctx)->processors * MPTC__BLOCKS_EACH * MPTC__THREADS;
    const size_t strands = mptc__min(mptc__divide_up(full, lines), op->shape.pixels);
    if (op->pass == MPT_NORM_FORWARD) return MPTC__SPREAD(mptc__norm_map_k<true>, lines * strands, *op, strands);
    return MPTC__SPREAD(mptc__norm_map_k<false>, lines * strands, *op, strands);
}

static mpt_result mptc__norm_stats(mpt_context *ctx, const mpt_norm_op *op) {
    const size_t sets = op->shape.N * op->shape.groups;
    const dim3 team = mptc__norm_team(&op->shape);
    mptc__moment_terms terms;
    terms.op = *op;
    if (!mptc__norm_by_sets(&op->shape)) return mptc__norm_columns(ctx, op, sets, terms);
    return MPTC__LAUNCH(mptc__norm_stats_k, mptc__blocks(ctx, sets * team.x), team, *op);
}

/* dx comes last, because it may overwrite dy. running: statistics to be averaged as well, or NULL */
static mpt_result mptc__norm_backward(mpt_context *ctx, const mpt_norm_op *op, const mpt_norm_op *running) {
    const size_t sets = op->shape.N * op->shape.groups;
    const int through = op->dx.data && !op->frozen, by_sets = mptc__norm_by_sets(&op->shape);
    const dim3 team = mptc__norm_team(&op->shape);
    mptc__gradient_terms terms = MPT_ZERO;
    terms.op = *op;
    if (running) terms.running = *running;
    terms.means = through && !by_sets;
    MPTC__TRY(mptc__norm_columns(ctx, op, terms.means ? sets : 0, terms));
    if (!op->dx.data) return MPT_OK;
    if (!through || !by_sets) return mptc__norm_map(ctx, op);
    return MPTC__LAUNCH(mptc__norm_backward_k, mptc__blocks(ctx, sets * team.x), team, *op);
}

static __global__ void mptc__norm_running_k(mpt_norm_op op, size_t count) {
    for (size_t i = mptc__thread(); i < 2 * op.shape.N * op.shape.groups; i += mptc__stride())
        mpt__norm_average(&op, count, i);
}

static mpt_result mptc__norm_running(mpt_context *ctx, const mpt_norm_op *op) {
    const mpt_norm_shape *z = &op->shape;
    return MPTC__SPREAD(mptc__norm_running_k, 2 * z->N * z->groups, *op, z->pixels * (z->C / z->groups));
}

/* The gradient, and the running statistics of the same batch norm if they are held */
static mpt_result mptc__norm_gradient(mpt_context *ctx, const mpt_norm_op *op) {
    mptc__held *held = &mptc__of(ctx)->held;
    const mpt_norm_op running = held->averages;
    const int joins = held->running && running.stats == op->stats && mptc__norm_sets_are_columns(&op->shape);
    if (joins) held->running = 0;
    MPTC__TRY(mptc__enter(ctx));
    return mptc__norm_backward(ctx, op, joins ? &running : NULL);
}

static mpt_result mptc__norm(mpt_context *ctx, const mpt_norm_op *op) {
    mptc__device *device = mptc__of(ctx);
    mptc__held *held = &device->held;
    if (op->pass == MPT_NORM_BACKWARD) return mptc__norm_gradient(ctx, op);
    MPTC__TRY(mptc__enter(ctx));
    if (op->pass == MPT_NORM_STATS) return mptc__norm_stats(ctx, op);
    if (op->pass == MPT_NORM_FORWARD) return mptc__norm_map(ctx, op);
    if (!device->step.open) return mptc__norm_running(ctx, op);
    held->running = 1;
    held->averages = *op;
    return MPT_OK;
}

/* ==== REDUCTIONS ==== */

/* -- Scan: the CPU's order, a warp to a chunk -- */

enum {
    MPTC__CHUNK = 4096,
    MPTC__SCAN_BLOCKS = 64,
    MPTC__SCAN_THREADS = 64, /* of a launch block: small ones, so that a short array reaches many multiprocessors */
    MPTC__SCAN_LOADS = 16,   /* loads that a thread has in flight */
    MPTC__SCAN_PARTS = 8     /* chunks that a thread of the last block has in flight */
};

typedef struct mptc__scan_work {
    mpt_array x;
    float factor;         /* x is multiplied by it first, unless it is 1 */
    size_t n, chunks;
    size_t begin, end;    /* chunks that are scanned: all, or what this rank owns */
    int last;             /* 1: the parts of all chunks are added up */
    mpt_scan *parts;      /* (chunks) */
    mpt_scan *out;        /* of all */
    mpt_update_op update; /* state not NULL: this scan is its check */
    mpt__rates *rates;    /* the rates of its tensors, computed after the check */
    unsigned *ticket;
} mptc__scan_work;

/* A thread's share of a chunk: it adds the squares of elements lane, lane + 32, ... in this order. */
typedef struct mptc__scan_lane {
    unsigned inf, nan, first;
    double sum;
    int t;            /* in a check: the tensor that it is in... */
    size_t end, next; /* ...which ends here; where the next one starts */
} mptc__scan_lane;

/* Is element i in a tensor, rather than in the padding between them, which counts as 0? i must not decrease. */
static __device__ __forceinline__ bool mptc__scan_inside(const mpt_update_op *update, size_t n, size_t i,
                                                         mptc__scan_lane *lane) {
    for (; i >= lane->next && lane->t < update->tensors; lane->t++) {
        lane->end = update->slices[lane->t].offset + update->slices[lane->t].count;
        lane->next = lane->t + 1 < update->tensors ? update->slices[lane->t + 1].offset : n;
    }
    return i < lane->end;
}

/* Elements i + from + 32 j of x, j < SCAN_LOADS, which are scaled first. All loads are in flight before the first value
   is used; otherwise each addition would wait for memory. */
static __device__ __forceinline__ void mptc__scan_some(const mpt_update_op *update, float factor, mpt_array x, size_t i,
                                                       unsigned from, unsigned n, mptc__scan_lane *lane) {
    uint32_t bits[MPTC__SCAN_LOADS];
#pragma unroll
    for (unsigned j = 0; j < MPTC__SCAN_LOADS; j++) {
        const unsigned e = from + j * MPTC__WARP;
        bits[j] = e < n ? mptc__get_bits(x, i + e) : 0;
    }
#pragma unroll
    for (unsigned j = 0; j < MPTC__SCAN_LOADS; j++) {
        const unsigned e = from + j * MPTC__WARP;
        float v = mptc__widen(bits[j], x.type);
        if (e >= n || (update && !mptc__scan_inside(update, i + n, i + e, lane))) continue;
        if (factor != 1) {
            mptc__put(x, i + e, v * factor);
            v = mptc__get(x, i + e);
        }
        if (mpt__finite(v)) {
            lane->sum += (double)v * (double)v; /* exact products */
            continue;
        }
        if (lane->first == n) lane->first = e;
        if ((mpt__bits(v) & 0x7fffffffu) == 0x7f800000u) lane->inf++;
        else lane->nan++;
    }
}

/* One warp scans elements i .. i+n; the lanes are added pairwise at the end. */
static __device__ __forceinline__ void mptc__scan_chunk(const mpt_update_op *update, float factor, mpt_array x,
                                                        size_t i, unsigned n, mpt_scan *out) {
    const unsigned thread = threadIdx.x % MPTC__WARP, all = 0xffffffffu;
    mptc__scan_lane lane = {0, 0, n, 0, 0, 0, 0};
    if (update) lane.t = mpt__slice_at(update->slices, update->tensors, i);
    for (unsigned from = thread; from < n; from += MPTC__SCAN_LOADS * MPTC__WARP)
        mptc__scan_some(update, factor, x, i, from, n, &lane);
    for (unsigned width = MPTC__WARP / 2; width; width /= 2) {
        const unsigned other = __shfl_down_sync(all, lane.first, width);
        lane.sum += __shfl_down_sync(all, lane.sum, width);
        lane.inf += __shfl_down_sync(all, lane.inf, width);
        lane.nan += __shfl_down_sync(all, lane.nan, width);
        if (other < lane.first) lane.first = other;
    }
    if (thread) return;
    out->sum_squares = lane.sum;
    out->inf = lane.inf;
    out->nan = lane.nan;
    out->first = i + lane.first;
}

/* Adds chunks begin .. end in order, loading SCAN_PARTS of them at a time. */
static __device__ mpt_scan mptc__scan_parts(const mpt_scan *parts, size_t begin, size_t end, size_t n) {
    mpt_scan sum = MPT_ZERO;
    sum.first = n;
    for (; begin < end; begin += MPTC__SCAN_PARTS) {
        mpt_scan part[MPTC__SCAN_PARTS];
#pragma unroll
        for (unsigned j = 0; j < MPTC__SCAN_PARTS; j++) {
            const mpt_scan *from = &parts[begin + j < end ? begin + j : begin];
            part[j].sum_squares = __ldcg(&from->sum_squares);
            part[j].inf = __ldcg((const unsigned long long *)&from->inf);
            part[j].nan = __ldcg((const unsigned long long *)&from->nan);
            part[j].first = __ldcg((const unsigned long long *)&from->first);
        }
#pragma unroll
        for (unsigned j = 0; j < MPTC__SCAN_PARTS; j++)
            if (begin + j < end) mpt__scan_join(&sum, &part[j]);
    }
    return sum;
}

/* Computes the rates of all tensors for the update; a block calls it. The clip limits may not be known yet. */
static __device__ void mptc__rates_put(const mpt_update_op *op, mpt__rates *rates) {
    for (int t = (int)threadIdx.x; t < op->tensors; t += (int)blockDim.x)
        rates[t] = mpt__rates_of(op, &op->slices[t]);
}

/* Over 64 registers: formulas in double, of one block of threads */
static __global__ void mptc__rates_k(mpt_update_op op, mpt__rates *rates) { mptc__rates_put(&op, rates); }

/* A warp scans a chunk; the last block adds the chunks of each of at most 64 parts in order, then the parts. Over 64
   registers, for the parts that a thread of the last block has in flight. */
static __global__ void mptc__scan_k(mptc__scan_work w) {
    __shared__ mpt_scan parts[MPTC__SCAN_BLOCKS];
    __shared__ int unsound; /* pending values that are inf or NaN */
    const size_t each = (w.chunks + MPTC__SCAN_BLOCKS - 1) / MPTC__SCAN_BLOCKS;
    const unsigned used = each ? (unsigned)((w.chunks + each - 1) / each) : 1;
    for (size_t chunk = w.begin + mptc__thread() / MPTC__WARP; chunk < w.end; chunk += mptc__stride() / MPTC__WARP) {
        const size_t i = chunk * MPTC__CHUNK, left = w.n - i;
        const unsigned some = left < MPTC__CHUNK ? (unsigned)left : (unsigned)MPTC__CHUNK;
        if (w.update.state) mptc__scan_chunk(&w.update, 1, mpt_f32_array(w.update.grad), i, some, &w.parts[chunk]);
        else mptc__scan_chunk(NULL, w.factor, w.x, i, some, &w.parts[chunk]);
    }
    if (!w.last || !mptc__last_block(w.ticket, gridDim.x)) return;
    if (threadIdx.x == 0) unsound = 0;
    __syncthreads();
    if (w.update.state)
        for (size_t i = threadIdx.x; i < w.update.commits; i += blockDim.x)
            if (!mpt__finite(w.update.pending[i])) atomicAdd(&unsound, 1);
    if (threadIdx.x < used) {
        const size_t begin = threadIdx.x * each, end = begin + each < w.chunks ? begin + each : w.chunks;
        parts[threadIdx.x] = mptc__scan_parts(w.parts, begin, end, w.n);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (unsigned b = 1; b < used; b++) mpt__scan_join(&parts[0], &parts[b]);
        if (!w.update.state) *w.out = parts[0];
        else mpt__state_checked(&w.update, &parts[0], !unsound);
    }
    __syncthreads();
    if (w.update.state) mptc__rates_put(&w.update, w.rates);
}

static mpt_result mptc__scan_launch(mpt_context *ctx, const mptc__scan_work *w) {
    const size_t blocks = mptc__divide_up((w->end - w->begin) * MPTC__WARP, MPTC__SCAN_THREADS);
    const size_t processors = (size_t)mptc__of(ctx)->processors;
    const size_t most = processors * (MPTC__BLOCKS_EACH * MPTC__THREADS / MPTC__SCAN_THREADS);
    return MPTC__LAUNCH(mptc__scan_k, (unsigned)mptc__min(blocks ? blocks : 1, most), MPTC__SCAN_THREADS, *w);
}

/* Every rank scans the chunks that it owns; then all add up those of all. A recorded step has the exchange in it. */
static mpt_result mptc__scan_shards(mpt_context *ctx, mptc__scan_work w, const mpt_shard *shard) {
    const mpt_ranks *r = shard->ranks;
    w.parts = shard->parts;
    w.begin = shard->chunks[r->rank];
    w.end = shard->chunks[r->rank + 1];
    w.last = 0;
    MPTC__TRY(mptc__scan_launch(ctx, &w));
    if (mptc__of(ctx)->step.mode != MPTC__REPLAY)
        MPTC__TRY(mpt__all_gather(ctx, r, shard->parts, shard->chunks, sizeof *shard->parts));
    w.begin = w.end;
    w.last = 1;
    return mptc__scan_launch(ctx, &w);
}

/* update NULL: the result is at the start of the scratch block. */
static mpt_result mptc__scan_run(mpt_context *ctx, size_t n, float factor, mpt_array x, const mpt_update_op *update) {
    mptc__device *device = mptc__of(ctx);
    mptc__scan_work w = MPT_ZERO;
    MPTC__TRY(mptc__enter(ctx));
    w.x = x;
    w.factor = factor;
    w.n = n;
    w.chunks = w.end = mptc__divide_up(n, MPTC__CHUNK);
    w.last = 1;
    MPTC__TRY(mptc__grow(ctx, &device->scratch, (w.chunks + 1) * sizeof *w.parts));
    w.out = (mpt_scan *)(void *)device->scratch.at;
    w.parts = w.out + 1;
    if (update) {
        MPTC__TRY(mptc__grow(ctx, &device->rates, (size_t)update->tensors * sizeof *w.rates));
        w.update = *update;
        w.rates = (mpt__rates *)(void *)device->rates.at;
    }
    w.ticket = device->tickets;
    if (update && update->shard) return mptc__scan_shards(ctx, w, update->shard);
    return mptc__scan_launch(ctx, &w);
}

static mpt_result mptc__scan(mpt_context *ctx, size_t n, float factor, mpt_array x, mpt_scan *host) {
    MPTC__TRY(mptc__scan_run(ctx, n, factor, x, NULL));
    return mptc__download(ctx, host, mptc__of(ctx)->scratch.at, sizeof *host);
}

/* -- Histogram: integer counts, so atomics give the same result every time -- */

typedef unsigned long long mptc__count; /* as atomicAdd names 64 bits */

/* zero, inf, nan, exponent[256] */
enum { MPTC__BINS = sizeof(mpt_histogram) / sizeof(uint64_t), MPTC__BIN_EXPONENT = 3 };

static __device__ unsigned mptc__bin(float x) {
    const uint32_t magnitude = mpt__bits(x) & 0x7fffffffu;
    if (magnitude == 0) return 0;
    if (magnitude < 0x7f800000u) return MPTC__BIN_EXPONENT + (magnitude >> 23);
    if (magnitude == 0x7f800000u) return 1;
    return 2;
}

static __global__ void mptc__histogram_k(size_t n, mpt_array x, mptc__count *bins) {
    __shared__ unsigned counts[MPTC__BINS]; /* of this block */
    for (unsigned b = threadIdx.x; b < MPTC__BINS; b += blockDim.x) counts[b] = 0;
    __syncthreads();
    for (size_t i = mptc__thread() * MPTC__PACK; i < n; i += mptc__stride() * MPTC__PACK) {
        const unsigned some = mptc__left(n, i);
        float v[MPTC__PACK];
        mptc__load(x, i, some, v);
        MPTC__EACH(e) if (e < some) atomicAdd(&counts[mptc__bin(v[e])], 1u);
    }
    __syncthreads();
    for (unsigned b = threadIdx.x; b < MPTC__BINS; b += blockDim.x)
        if (counts[b]) atomicAdd(&bins[b], (mptc__count)counts[b]);
}

static mpt_result mptc__histogram(mpt_context *ctx, size_t n, mpt_array x, mpt_histogram *host) {
    mptc__device *device = mptc__of(ctx);
    mpt_histogram h;
    MPTC__TRY(mptc__enter(ctx));
    MPTC__TRY(mptc__grow(ctx, &device->scratch, sizeof h));
    MPTC__TRY(mptc__zero(ctx, device->scratch.at, sizeof h));
    MPTC__TRY(MPTC__SPREAD(mptc__histogram_k, mptc__divide_up(n, MPTC__PACK), n, x,
                           (mptc__count *)(void *)device->scratch.at));
    MPTC__TRY(mptc__download(ctx, &h, device->scratch.at, sizeof h));
    host->zero += h.zero;
    host->inf += h.inf;
    host->nan += h.nan;
    for (int e = 0; e < 256; e++) host->exponent[e] += h.exponent[e];
    return MPT_OK;
}

/* -- Losses: a warp for each row -- */

typedef struct mptc__row { /* the loss of a row, without its weight; or the sums of several */
    double loss, weight;
    unsigned counts, correct;
} mptc__row;

/* The largest of the lanes' values, and the first index that has it */
static __device__ unsigned mptc__warp_best(float *largest, unsigned best) {
    for (unsigned width = MPTC__WARP / 2; width; width /= 2) {
        const float x = __shfl_xor_sync(0xffffffffu, *largest, width);
        const unsigned c = __shfl_xor_sync(0xffffffffu, best, width);
        if (x > *largest || (x == *largest && c < best)) {
            *largest = x;
            best = c;
        }
    }
    return best;
}

/* See mpt__aim_class. */
static __device__ unsigned mptc__aim_class(const mpt_loss_op *op, const mpt__aim *aim) {
    if (!aim->probabilities) return (unsigned)aim->label;
    float largest = aim->probabilities[0];
    unsigned best = 0;
    for (unsigned c = threadIdx.x % MPTC__WARP; c < (unsigned)op->C; c += MPTC__WARP)
        if (aim->probabilities[c] > largest) {
            largest = aim->probabilities[c];
            best = c;
        }
    return mptc__warp_best(&largest, best);
}

/* x(C), dx(C) of this row; see mpt__cross_entropy_row */
static __device__ mptc__row mptc__cross_entropy_row(const mpt_loss_op *op, size_t row, float scale) {
    const unsigned lane = threadIdx.x % MPTC__WARP, C = (unsigned)op->C;
    const mpt__aim aim = mpt__aim_of(op, row);
    const size_t at = row * op->C;
    float largest = mptc__get(op->x, at);
    double sum = 0, aimed = 0, targets = 0; /* there may be a million classes */
    unsigned best = 0;
    mptc__row out = {0, 0, 0, 0};
    if (aim.ignored && op->dx.data)
        for (unsigned c = lane; c < C; c += MPTC__WARP) mptc__put(op->dx, at + c, 0);
    if (aim.ignored) return out;
    for (unsigned c = lane; c < C; c += MPTC__WARP) {
        const float x = mptc__get(op->x, at + c);
        if (x > largest) {
            largest = x;
            best = c;
        }
    }
    best = mptc__warp_best(&largest, best);
    for (unsigned c = lane; c < C; c += MPTC__WARP) {
        const float x = mptc__get(op->x, at + c) - largest, t = mpt__class_target(op, &aim, c);
        sum += (double)expf(x);
        if (t > 0) aimed += (double)(t * x); /* 0 * -inf would be NaN */
        targets += (double)t;
    }
    sum = mptc__warp_sum(sum);
    aimed = mptc__warp_sum(aimed);
    targets = op->desc.class_weights || aim.probabilities ? mptc__warp_sum(targets) : 1;
    if (op->dx.data)
        for (unsigned c = lane; c < C; c += MPTC__WARP) {
            const float softmax = expf(mptc__get(op->x, at + c) - largest) / (float)sum;
            const float dx = (softmax * (float)targets - mpt__class_target(op, &aim, c)) * scale;
            mptc__put(op->dx, at + c, aim.valid ? dx : mpt__float(0x7fc00000u));
        }
    out.loss = aim.valid ? targets * log(sum) - aimed : (double)mpt__float(0x7fc00000u);
    out.counts = 1;
    out.correct = aim.valid && best == mptc__aim_class(op, &aim);
    if (mpt__is_nan((float)sum)) out.correct = 0; /* with NaN no logit is the largest */
    return out;
}

/* x(C), target(C), dx(C) of this row; see mpt__elementwise_row */
static __device__ mptc__row mptc__elementwise_row(const mpt_loss_op *op, size_t row, float scale) {
    const float *target = (const float *)op->target + row * op->C;
    const float each = mpt__loss_share(op);
    double sum = 0;
    float slope;
    mptc__row out = {0, 0, 1, 0};
    for (size_t c = threadIdx.x % MPTC__WARP; c < op->C; c += MPTC__WARP) {
        sum += (double)mpt__loss_element(op, c, mptc__get(op->x, row * op->C + c), target[c], &slope);
        if (op->dx.data) mptc__put(op->dx, row * op->C + c, slope * (each * scale));
    }
    out.loss = mptc__warp_sum(sum) / (double)op->C;
    return out;
}

/* Sum of the weights of all rows: a block sums a chunk of labels; a thread of the last block adds every 256th chunk. */
static __global__ void mptc__loss_weight_k(mpt_loss_op op, size_t chunks, double *parts, double *weight,
                                           unsigned *ticket) {
    const size_t rows = op.N * op.positions;
    double sum = 0;
    for (size_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const size_t begin = chunk * MPTC__CHUNK, end = begin + MPTC__CHUNK < rows ? begin + MPTC__CHUNK : rows;
        double part = 0;
        for (size_t row = begin + threadIdx.x; row < end; row += MPTC__THREADS)
            part += (double)mpt__row_weight(&op, row);
        part = mptc__team_sum(part);
        if (threadIdx.x == 0) parts[chunk] = part;
    }
    if (!mptc__last_block(ticket, gridDim.x)) return;
    for (size_t chunk = threadIdx.x; chunk < chunks; chunk += MPTC__THREADS) sum += __ldcg(&parts[chunk]);
    sum = mptc__team_sum(sum);
    if (threadIdx.x == 0) *weight = sum;
}

/* x(N, positions, C) += bias(C), if there is one; then a warp sums `each` rows; then a thread of the last block adds
   every 256th of these sums. weight: of all rows; NULL: their number. Over 64 registers, for a warp's sums in double
   and those of its row; with 64 it would spill. */
static __global__ void __launch_bounds__(MPTC__THREADS, 3)
mptc__loss_k(mpt_loss_op op, mpt_array bias, const double *weight, size_t each, mptc__row *sums, unsigned *ticket) {
    const size_t rows = op.N * op.positions, count = (rows + each - 1) / each;
    const float scale = mpt__loss_factor(&op, weight ? *weight : (double)rows);
    double loss = 0, weights = 0, counts = 0, correct = 0; /* the counts are exact in double */
    for (size_t i = mptc__thread() / MPTC__WARP; i < count; i += mptc__stride() / MPTC__WARP) {
        mptc__row sum = {0, 0, 0, 0};
        for (size_t row = i * each; row < rows && row < (i + 1) * each; row++) {
            const float own = mpt__sample_weight(&op, row);
            if (bias.data)
                for (size_t c = threadIdx.x % MPTC__WARP; c < op.C; c += MPTC__WARP)
                    mptc__put(op.x, row * op.C + c, mptc__get(op.x, row * op.C + c) + mptc__get(bias, c));
            __syncwarp();
            const mptc__row r = op.kind == MPT_LOSS_CROSS_ENTROPY ? mptc__cross_entropy_row(&op, row, scale * own)
                                                                  : mptc__elementwise_row(&op, row, scale * own);
            sum.loss += r.loss * (double)own;
            sum.weight += (double)mpt__row_weight(&op, row);
            sum.counts += r.counts;
            sum.correct += r.correct;
        }
        if (threadIdx.x % MPTC__WARP == 0) sums[i] = sum;
    }
    if (!mptc__last_block(ticket, gridDim.x)) return;
    for (size_t i = threadIdx.x; i < count; i += MPTC__THREADS) {
        loss += __ldcg(&sums[i].loss);
        weights += __ldcg(&sums[i].weight);
        counts += __ldcg(&sums[i].counts);
        correct += __ldcg(&sums[i].correct);
    }
    loss = mptc__team_sum(loss);
    weights = mptc__team_sum(weights);
    counts = mptc__team_sum(counts);
    correct = mptc__team_sum(correct);
    if (threadIdx.x) return;
    op.sum->loss += loss;
    op.sum->weight += weights;
    op.sum->rows += (uint64_t)counts;
    op.sum->correct += (uint64_t)correct;
}

/* The bias of these logits, if it is held */
static mpt_array mptc__held_bias(mptc__device *device, const mpt_loss_op *op) {
    const mpt_gemm_op *g = &device->held.product;
    const mpt_array none = MPT_ZERO;
    if (!device->held.finish || g->c.data != op->x.data || g->m != op->N * op->positions || g->n != op->C) return none;
    device->held.finish = 0;
    return g->bias;
}

static mpt_result mptc__loss(mpt_context *ctx, const mpt_loss_op *user) {
    mptc__device *device = mptc__of(ctx);
    mpt_loss_op op = *user;
    const mpt_loss_desc *d = &op.desc;
    const int mean = op.dx.data && !(op.unit > 0); /* dx needs the weight of all rows */
    const int unequal = op.kind == MPT_LOSS_CROSS_ENTROPY && (d->class_weights || d->ignore);
    const int weighted = mean && (unequal || op.sample_weights);
    const size_t rows = op.N * op.positions, chunks = mptc__divide_up(rows, MPTC__CHUNK);
    const size_t each = op.positions > 1 ? MPTC__WARP : 1, count = mptc__divide_up(rows, each);
    if (!op.N) return MPT_OK;
    const mpt_array bias = mptc__held_bias(device, &op);
    op.target = mptc__fed(ctx, mpt_typed_array(op.target, MPT_F32).data);
    MPTC__TRY(mptc__enter(ctx));
    MPTC__TRY(mptc__need_positions(ctx, "loss: classes", op.C));
    MPTC__TRY(mptc__grow(ctx, &device->scratch, count * sizeof(mptc__row) + (chunks + 1) * sizeof(double)));
    mptc__row *sums = (mptc__row *)(void *)device->scratch.at;
    double *weight = weighted ? (double *)(void *)(sums + count) : NULL;
    if (weighted)
        MPTC__TRY(MPTC__SPREAD(mptc__loss_weight_k, chunks * MPTC__THREADS, op, chunks, weight + 1, weight,
                               device->tickets));
    return MPTC__SPREAD(mptc__loss_k, count * MPTC__WARP, op, bias, weight, each, sums, device->tickets);
}

/* ==== POOLING ==== every output gathers what it needs: a thread computes a pack of channels of one position */

/* y(N,P,Q,C), index(N,P,Q,C) from x(N,H,W,C). Over 64 registers, for a pack and its taps; with 64 it would spill. */
static __global__ void mptc__pool_forward_k(mpt_pool2d_op op, mptc__grid grid, mptc__divider by_packs) {
    const mpt_pool2d_shape z = op.shape;
    const unsigned H = (unsigned)z.H, W = (unsigned)z.W, R = (unsigned)z.R, S = (unsigned)z.S;
    const size_t count = z.N * op.P * op.Q * by_packs.by;
    for (size_t i = mptc__thread(); i < count; i += mptc__stride()) {
        const unsigned row = mptc__divide((unsigned)i, by_packs);
        const size_t c = (size_t)((unsigned)i - row * by_packs.by) * MPTC__PACK, out = row * z.C + c;
        const mptc__position at = mptc__position_of(row, grid);
        const unsigned some = mptc__left(z.C, c);
        double sum[MPTC__PACK] = {0}; /* the window may be a whole image */
        float best[MPTC__PACK] = {0}, x[MPTC__PACK];
        uint16_t place[MPTC__PACK] = {0};
        bool any = false;
        for (unsigned r = 0; r < R; r++)
            for (unsigned s = 0; s < S; s++) {
                const unsigned h = at.down * (unsigned)z.stride_h + r - (unsigned)z.padding_h;
                const unsigned w = at.across * (unsigned)z.stride_w + s - (unsigned)z.padding_w;
                if (h >= H || w >= W) continue; /* padding; below 0 wraps to a huge number */
                mptc__load(op.x, ((size_t)(at.n * H + h) * W + w) * z.C + c, some, x);
                MPTC__EACH(e) {
                    if (op.kind == MPT_POOL_AVERAGE) sum[e] += (double)x[e];
                    else if (!any || x[e] > best[e] || (mpt__is_nan(x[e]) && !mpt__is_nan(best[e]))) {
                        best[e] = x[e];
                        place[e] = (uint16_t)(r * S + s);
                    }
                }
                any = true;
            }
        const double divisor = (double)mpt__pool2d_divisor(&op.shape, at.down, at.across);
        MPTC__EACH(e) if (op.kind == MPT_POOL_AVERAGE) best[e] = (float)(sum[e] / divisor);
        if (op.kind == MPT_POOL_MAX) mptc__store_bits(op.index + out, some, place);
        mptc__store(op.y, out, some, best);
    }
}

/* dx(N,H,W,C) from dy(N,P,Q,C) and index(N,P,Q,C), + beta dx. dx and dy are multiplied by the slopes of ReLUs if their
   y(N,H,W,C) and y(N,P,Q,C) are given. Over 64 registers, for dy, y, indices and sums of a pack; with 64 it would
   spill. */
static __global__ void mptc__pool_backward_k(mpt_pool2d_op op, mpt_array relu, mpt_array relu_dy, mptc__grid grid,
                                             mptc__divider by_packs) {
    const mpt_pool2d_shape z = op.shape;
    const unsigned P = (unsigned)op.P, Q = (unsigned)op.Q, R = (unsigned)z.R, S = (unsigned)z.S;
    const unsigned down = (unsigned)z.stride_h, across = (unsigned)z.stride_w;
    const size_t count = z.N * z.H * z.W * by_packs.by;
    for (size_t i = mptc__thread(); i < count; i += mptc__stride()) {
        const unsigned row = mptc__divide((unsigned)i, by_packs);
        const size_t c = (size_t)((unsigned)i - row * by_packs.by) * MPTC__PACK, in = row * z.C + c;
        const mptc__position at = mptc__position_of(row, grid);
        const unsigned some = mptc__left(z.C, c);
        const unsigned y = at.down + (unsigned)z.padding_h, x = at.across + (unsigned)z.padding_w;
        float sum[MPTC__PACK] = {0}, dy[MPTC__PACK];
        uint16_t place[MPTC__PACK];
        if (op.beta != 0) mptc__load(op.x, in, some, sum);
        MPTC__EACH(e) sum[e] = op.beta != 0 ? op.beta * sum[e] : 0;
        for (unsigned r = y % down; r < R && r <= y; r += down)
            for (unsigned s = x % across; s < S && s <= x; s += across) { /* the output whose tap (r,s) is this input */
                const unsigned p = (y - r) / down, q = (x - s) / across;
                const size_t out = ((size_t)(at.n * P + p) * Q + q) * z.C + c;
                if (p >= P || q >= Q) continue;
                mptc__load(op.y, out, some, dy);
                if (relu_dy.data) {
                    float y[MPTC__PACK];
                    mptc__load(relu_dy, out, some, y);
                    MPTC__EACH(e) dy[e] = mptc__relu_slope(y[e], dy[e]);
                }
                if (op.kind == MPT_POOL_MAX) mptc__load_bits(op.index + out, some, place);
                const float divisor = (float)mpt__pool2d_divisor(&op.shape, p, q);
                MPTC__EACH(e) {
                    if (op.kind == MPT_POOL_AVERAGE) sum[e] += dy[e] / divisor;
                    else if (place[e] == r * S + s) sum[e] += dy[e];
                }
            }
        if (relu.data) {
            mptc__load(relu, in, some, dy);
            MPTC__EACH(e) sum[e] = mptc__relu_slope(dy[e], sum[e]);
        }
        mptc__store(op.x, in, some, sum);
    }
}

static mpt_result mptc__pool_backward(mpt_context *ctx, const mpt_pool2d_op *op, mpt_array relu, mpt_array relu_dy) {
    const mpt_pool2d_shape *z = &op->shape;
    const size_t packs = mptc__divide_up(z->C, MPTC__PACK);
    return MPTC__SPREAD(mptc__pool_backward_k, z->N * z->H * z->W * packs, *op, relu, relu_dy,
                        mptc__grid_of(z->H, z->W), mptc__divider_of(packs));
}

static mpt_result mptc__pool2d(mpt_context *ctx, const mpt_pool2d_op *user) {
    const mpt_pool2d_shape *z = &user->shape;
    const size_t inputs = z->N * z->H * z->W, outputs = z->N * user->P * user->Q;
    const size_t packs = mptc__divide_up(z->C, MPTC__PACK);
    const mpt_array none = MPT_ZERO;
    mptc__held *held = &mptc__of(ctx)->held;
    mpt_array relu_dy = MPT_ZERO;
    mpt_pool2d_op op = *user;
    if (!z->N) return MPT_OK;
    if (op.pass != MPT_FORWARD && held->slope && held->sloped.out.data == op.y.data &&
        held->sloped.n == outputs * z->C) {
        relu_dy = held->sloped.a;
        held->slope = 0;
    }
    MPTC__TRY(mptc__enter(ctx));
    MPTC__TRY(mptc__need_positions(ctx, "pool2d", inputs * packs)); /* of packs of channels */
    MPTC__TRY(mptc__need_positions(ctx, "pool2d", outputs * packs));
    MPTC__TRY(mptc__need_positions(ctx, "pool2d: window", z->R > z->S ? z->R : z->S));
    op.shape.stride_h = mptc__min(z->stride_h, INT_MAX); /* no position is that far */
    op.shape.stride_w = mptc__min(z->stride_w, INT_MAX);
    if (op.pass == MPT_FORWARD)
        return MPTC__SPREAD(mptc__pool_forward_k, outputs * packs, op, mptc__grid_of(op.P, op.Q),
                            mptc__divider_of(packs));
    if (!mptc__of(ctx)->step.open || op.beta != 0) return mptc__pool_backward(ctx, &op, none, relu_dy);
    held->pool = 1; /* the gradient of a ReLU may follow */
    held->pooling = op;
    held->pooled = relu_dy;
    return MPT_OK;
}

/* -- Small images and large ones, see mpt_broadcast_op -- */

/* y(N,H R,W S,C) from x(N,H,W,C) */
static __global__ void mptc__broadcast_k(mpt_broadcast_op op, mptc__grid grid, mptc__divider by_packs) {
    const mpt_broadcast_shape z = op.shape;
    const size_t count = z.N * z.H * z.R * z.W * z.S * by_packs.by;
    for (size_t i = mptc__thread(); i < count; i += mptc__stride()) {
        const unsigned row = mptc__divide((unsigned)i, by_packs);
        const size_t c = (size_t)((unsigned)i - row * by_packs.by) * MPTC__PACK, out = row * z.C + c;
        const mptc__position at = mptc__position_of(row, grid);
        const size_t h = at.down / (unsigned)z.R, w = at.across / (unsigned)z.S;
        const unsigned some = mptc__left(z.C, c);
        float x[MPTC__PACK], other[MPTC__PACK];
        mptc__load(op.x, ((at.n * z.H + h) * z.W + w) * z.C + c, some, x);
        if (op.factor.data) {
            mptc__load(op.factor, out, some, other);
            MPTC__EACH(e) x[e] = mpt__mul_rn(x[e], other[e]);
        }
        if (op.beta != 0) {
            mptc__load(op.y, out, some, other);
            MPTC__EACH(e) x[e] = mpt__add_rn(x[e], mpt__mul_rn(op.beta, other[e]));
        }
        mptc__store(op.y, out, some, x);
    }
}

/* dx(N,H,W,C) from dy(N,H R,W S,C): `lanes` neighbouring threads of a warp share the R S pixels of a pack. Over 64
   registers, for the sums of a pack in double, a pack of dy and one of the factor. */
static __global__ void mptc__broadcast_sums_k(mpt_broadcast_op op, mptc__grid grid, mptc__divider by_packs,
                                              unsigned lanes) {
    const mpt_broadcast_shape z = op.shape;
    const unsigned R = (unsigned)z.R, S = (unsigned)z.S, lane = threadIdx.x % lanes;
    const size_t count = z.N * z.H * z.W * by_packs.by;
    for (size_t i = mptc__thread() / lanes; i < count; i += mptc__stride() / lanes) {
        const unsigned row = mptc__divide((unsigned)i, by_packs);
        const size_t c = (size_t)((unsigned)i - row * by_packs.by) * MPTC__PACK, in = row * z.C + c;
        const mptc__position at = mptc__position_of(row, grid);
        const size_t first = ((at.n * z.H + at.down) * R * z.W + at.across) * S;
        const unsigned some = mptc__left(z.C, c);
        float dy[MPTC__PACK], factor[MPTC__PACK];
        double sum[MPTC__PACK] = {0};
        MPTC__EACH(e) factor[e] = 1;
        for (unsigned tap = lane; tap < R * S; tap += lanes) {
            const size_t from = (first + tap / S * (z.W * S) + tap % S) * z.C + c;
            mptc__load(op.y, from, some, dy);
            if (op.factor.data) mptc__load(op.factor, from, some, factor);
            MPTC__EACH(e) sum[e] += (double)dy[e] * (double)factor[e];
        }
        MPTC__EACH(e) sum[e] = mptc__warp_sum(sum[e], lanes);
        if (lane) continue;
        if (op.beta != 0) {
            mptc__load(op.x, in, some, dy);
            MPTC__EACH(e) sum[e] += (double)op.beta * (double)dy[e];
        }
        MPTC__EACH(e) dy[e] = (float)sum[e];
        mptc__store(op.x, in, some, dy);
    }
}

static mpt_result mptc__broadcast(mpt_context *ctx, const mpt_broadcast_op *op) {
    const mpt_broadcast_shape *z = &op->shape;
    const size_t packs = mptc__divide_up(z->C, MPTC__PACK), window = z->R * z->S;
    const size_t inputs = z->N * z->H * z->W * packs, outputs = inputs * window;
    const unsigned lanes = window < MPTC__WARP ? 1 : MPTC__WARP;
    MPTC__TRY(mptc__enter(ctx));
    MPTC__TRY(mptc__need_positions(ctx, "broadcast", outputs)); /* of packs of channels */
    if (op->pass == MPT_FORWARD)
        return MPTC__SPREAD(mptc__broadcast_k, outputs, *op, mptc__grid_of(z->H * z->R, z->W * z->S),
                            mptc__divider_of(packs));
    return MPTC__SPREAD(mptc__broadcast_sums_k, inputs * lanes, *op, mptc__grid_of(z->H, z->W),
                        mptc__divider_of(packs), lanes);
}

/* If this is the gradient of a ReLU in place, and the values there are held, computes both together. The bits are the
   same, because the gradient only replaces values by 0. */
static mpt_result mptc__slope_joins(mpt_context *ctx, const mpt_map_op *op, int *joins) {
    mptc__held *held = &mptc__of(ctx)->held;
    const mpt_pool2d_op pooling = held->pooling;
    const mpt_gemm_op product = held->product;
    const size_t pooled = pooling.shape.N * pooling.shape.H * pooling.shape.W * pooling.shape.C;
    const int slope = mptc__is_slope(op);
    const int pool = slope && held->pool && pooling.x.data == op->out.data && op->n == pooled;
    const int few = slope && held->few && product.c.data == op->out.data && op->n == product.m * product.n;
    *joins = pool || few;
    if (!*joins) return MPT_OK;
    held->pool = held->few = 0;
    MPTC__TRY(mptc__enter(ctx));
    if (pool) return mptc__pool_backward(ctx, &pooling, op->a, held->pooled);
    return mptc__few_run(ctx, &product, op->a);
}

/* ==== RANKS ==== */

/* slots(ranks,SLOT) = this rank's sums of losses in its own slot, zeros in the others */
static __global__ void mptc__tell_k(const mpt_loss_sum *sum, float *slots, int rank, int ranks) {
    uint64_t words[MPT__SLOT_WORDS];
    memcpy(words, sum, sizeof words);
    for (size_t i = mptc__thread(); i < (size_t)ranks * MPT__SLOT; i += mptc__stride())
        slots[i] = mpt__slot_put(words, rank, i);
}

/* sum = the sum over all ranks; pending(n) = the mean over all ranks */
static __global__ void mptc__hear_k(const float *slots, int ranks, mpt_loss_sum *sum, float *pending, size_t n) {
    const float share = 1.0f / (float)ranks;
    if (blockIdx.x == 0 && threadIdx.x < MPT__SLOT_WORDS)
        ((uint64_t *)sum)[threadIdx.x] = mpt__slot_total(slots, ranks, (int)threadIdx.x);
    for (size_t i = mptc__thread(); i < n; i += mptc__stride()) pending[i] = mpt__mul_rn(pending[i], share);
}

/* Later calls put their work on `stream`. */
static mpt_result mptc__turn_to(mpt_context *ctx, cudaStream_t stream) {
    mptc__device *device = mptc__of(ctx);
    device->stream = stream;
    MPTC__CUBLAS(cublasSetStream(device->cublas, stream));
    MPTC__CUBLAS(cublasSetWorkspace(device->cublas, device->products.at, device->products.bytes));
    return MPT_OK;
}

/* `stream` waits for the work of all calls so far. */
static mpt_result mptc__wait_for_calls(mpt_context *ctx, cudaStream_t stream) {
    mptc__device *device = mptc__of(ctx);
    MPTC__CUDA(cudaEventRecord(device->turned, device->stream));
    MPTC__CUDA(cudaStreamWaitEvent(stream, device->turned, 0));
    return MPT_OK;
}

/* Later calls use the context's stream again, which waits for the work on the other one. */
static mpt_result mptc__turn_home(mpt_context *ctx) {
    mptc__device *device = mptc__of(ctx);
    const cudaStream_t home = device->home;
    if (!home) return MPT_OK;
    device->home = NULL;
    const mpt_result waits = mptc__wait_for_calls(ctx, home);
    const mpt_result turned = mptc__turn_to(ctx, home);
    return waits == MPT_OK ? turned : waits;
}

/* Sums on the context's stream; later calls use the other one. */
static mpt_result mptc__ranks_early(mpt_context *ctx, const mpt_ranks_op *op) {
    mptc__device *device = mptc__of(ctx);
    const mpt_ranks *r = op->ranks;
    if (device->home) {
        MPTC__TRY(mptc__wait_for_calls(ctx, device->home));
    } else {
        MPTC__TRY(mptc__wait_for_calls(ctx, device->beside));
        device->home = device->stream;
        MPTC__TRY(mptc__turn_to(ctx, device->beside));
    }
    const mpt_result summed = r->sum(r->user, op->grad, op->count);
    if (summed != MPT_OK) mptc__turn_home(ctx);
    return summed;
}

/* A graph contains the sums; then an empty call lets the engine report its errors. */
static mpt_result mptc__ranks(mpt_context *ctx, const mpt_ranks_op *op) {
    const mpt_ranks *r = op->ranks;
    const size_t slots = (size_t)r->ranks * MPT__SLOT;
    const int replay = mptc__of(ctx)->step.mode == MPTC__REPLAY;
    MPTC__TRY(mptc__enter(ctx));
    if (op->early) return replay ? MPT_OK : mptc__ranks_early(ctx, op);
    if (replay) return r->sum(r->user, NULL, 0);
    MPTC__TRY(mptc__turn_home(ctx));
    MPTC__TRY(MPTC__SPREAD(mptc__tell_k, slots, op->sum, op->slots, r->rank, r->ranks));
    MPTC__TRY(r->sum(r->user, op->slots, slots));
    if (op->shard) MPTC__TRY(r->reduce_scatter(r->user, op->grad, op->shard->begin));
    else if (op->count) MPTC__TRY(r->sum(r->user, op->grad, op->count));
    if (op->statistics) MPTC__TRY(r->sum(r->user, op->pending, op->statistics));
    return MPTC__SPREAD(mptc__hear_k, op->statistics, op->slots, r->ranks, op->sum, op->pending, op->statistics);
}

/* ==== OPTIMIZER ==== the rules of mpt.h, one launch for all tensors */

static mpt_result mptc__check(mpt_context *ctx, const mpt_update_op *op) {
    MPTC__TRY(mptc__scan_run(ctx, op->count, 1, mpt_f32_array(op->grad), op));
    mptc__of(ctx)->rated = op->state;
    return MPT_OK;
}

enum {
    MPTC__TENSOR_ALIGN = 16,                           /* elements: tensors of a block start at multiples of it */
    MPTC__TILE = MPTC__THREADS * MPTC__PACK,           /* elements that a block updates at a time */
    MPTC__TILE_TENSORS = MPTC__TILE / MPTC__TENSOR_ALIGN /* at most in a tile */
};

/* p(PACK) = the fp32 values of n weights from element i */
static __device__ __forceinline__ void mptc__weights_load(const mpt_update_op *op, size_t i, unsigned n, float *p) {
    uint16_t copy[MPTC__PACK], low[MPTC__PACK] = {0};
    if (op->master) {
        mptc__load(mpt_f32_array(op->master), i - op->first, n, p);
        return;
    }
    mptc__load_bits((const uint16_t *)op->copy.data + i, n, copy);
    if (op->low) mptc__load_bits(op->low + (i - op->first), n, low);
    MPTC__EACH(e) p[e] = mpt__weight_load(op->mode, op->copy.type, copy[e], low[e]);
}

/* first: index of element i in its tensor, which selects its random number */
static __device__ __forceinline__ void mptc__weights_store(const mpt_update_op *op, size_t i, unsigned n,
                                                           const float *p, int tensor, size_t first) {
    uint16_t copy[MPTC__PACK], low[MPTC__PACK];
    if (op->master) {
        float *wide = op->slices[tensor].wide;
        mptc__store(mpt_f32_array(op->master), i - op->first, n, p);
        if (op->copy.data) mptc__store(op->copy, i, n, p);
        if (wide) mptc__store(mpt_f32_array(wide), first, n, p);
        return;
    }
    MPTC__EACH(e) {
        const uint32_t random = op->mode == MPT_MASTER_STOCHASTIC
                                    ? mpt_hash(op->seed, op->state->applied, (uint64_t)tensor + 1, first + e) : 0;
        mpt__weight_store(op->mode, op->copy.type, p[e], random, &copy[e], &low[e]);
    }
    mptc__store_bits((uint16_t *)op->copy.data + i, n, copy);
    if (op->low) mptc__store_bits(op->low + (i - op->first), n, low);
}

typedef struct mptc__meter { /* integers, so atomics give the same result every time */
    unsigned long long moved, lost;
} mptc__meter;

/* Updates n elements from i on, all in tensor t; `first` is the index of element i in it. */
static __device__ void mptc__update_pack(const mpt_update_op *op, const mpt__rates *rates, size_t i, unsigned n, int t,
                                         size_t first, mptc__meter *meter) {
    const mpt_dtype type = op->copy.data ? op->copy.type : MPT_BF16; /* for the meter */
    const size_t own = i - op->first;
    float before[MPTC__PACK], p[MPTC__PACK], g[MPTC__PACK];
    float m[MPTC__PACK] = {0}, v[MPTC__PACK] = {0}, largest[MPTC__PACK] = {0};
    mptc__weights_load(op, i, n, before);
    mptc__load(mpt_f32_array(op->grad), i, n, g);
    if (op->moment[0]) mptc__load(mpt_f32_array(op->moment[0]), own, n, m);
    if (op->moment[1]) mptc__load(mpt_f32_array(op->moment[1]), own, n, v);
    if (op->moment[2]) mptc__load(mpt_f32_array(op->moment[2]), own, n, largest);
    MPTC__EACH(e) p[e] = mpt__update_element(rates, before[e], g[e], &m[e], &v[e], &largest[e]);
    if (op->moment[0]) mptc__store(mpt_f32_array(op->moment[0]), own, n, m);
    if (op->moment[1]) mptc__store(mpt_f32_array(op->moment[1]), own, n, v);
    if (op->moment[2]) mptc__store(mpt_f32_array(op->moment[2]), own, n, largest);
    mptc__weights_store(op, i, n, p, t, first);
    if (!op->desc.meter) return;
    MPTC__EACH(e) {
        if (e >= n || p[e] == before[e]) continue;
        meter->moved++;
        meter->lost += mpt__update_lost(type, before[e], p[e]) != 0;
    }
}

/* A block updates tiles of the flat arrays. For each it loads the rates of the tensors in it, one thread per tensor;
   then each thread updates a pack. Then the pending values are committed. The last block counts the step, when no other
   block reads the state any more, and updates the scaler if one is given. Over 64 registers: a thread has up to six
   arrays of eight values in flight, which hides more latency than more threads would. */
static __global__ void mptc__update_k(mpt_update_op op, const mpt__rates *all, mpt_scaler_state *scaler,
                                      int32_t *stuck, mptc__meter *total, unsigned *ticket) {
    __shared__ mpt__rates rates[MPTC__TILE_TENSORS];
    const float clip = (float)mpt__clip_factor(op.state, op.max_norm);
    const size_t tiles = (op.own + MPTC__TILE - 1) / MPTC__TILE; /* a shard ends with one, or with the last tensor */
    const bool skip = mpt__step_found(&op) != 0;
    const int32_t *found = &op.state->found;
    mptc__meter meter = {0, 0};
    for (size_t tile = blockIdx.x; tile < tiles && !skip; tile += gridDim.x) {
        const size_t begin = op.first + tile * MPTC__TILE, i = begin + threadIdx.x * MPTC__PACK;
        const int first = mpt__slice_at(op.slices, op.tensors, begin), mine = first + (int)threadIdx.x;
        if (threadIdx.x < MPTC__TILE_TENSORS && mine < op.tensors && op.slices[mine].offset < begin + MPTC__TILE) {
            rates[threadIdx.x] = all[mine];
            rates[threadIdx.x].clip = clip;
            rates[threadIdx.x].clip_value = (float)op.max_value;
        }
        __syncthreads();
        const int t = mpt__slice_at(op.slices, op.tensors, i);
        const size_t start = op.slices[t].offset, end = start + op.slices[t].count; /* padding follows it */
        if (i < end) mptc__update_pack(&op, &rates[t - first], i, mptc__left(end, i), t, i - start, &meter);
        __syncthreads();
    }
    for (size_t i = mptc__thread(); i < op.commits; i += mptc__stride()) {
        if (skip) op.pending[i] = op.committed[i];
        else op.committed[i] = op.pending[i];
    }
    if (op.desc.meter) { /* one atomic per warp, because all go to one address */
        meter.moved = mptc__warp_sum(meter.moved);
        meter.lost = mptc__warp_sum(meter.lost);
        if (meter.moved && threadIdx.x % MPTC__WARP == 0) {
            atomicAdd(&total->moved, meter.moved);
            atomicAdd(&total->lost, meter.lost);
        }
    }
    if (!mptc__last_block(ticket, gridDim.x) || threadIdx.x) return;
    if (!skip) {
        op.state->moved = atomicExch(&total->moved, 0);
        op.state->lost = atomicExch(&total->lost, 0);
    }
    mpt__state_stepped(&op);
    if (!scaler) return;
    mpt__scaler_follow(scaler, &found, 1);
    if (stuck) *stuck = scaler->stuck;
}

/* The averages of all weights, padding included, after the update, which has counted the step */
static __global__ void mptc__average_k(mpt_update_op op) {
    if (op.state->found) return;
    for (size_t i = mptc__thread() * MPTC__PACK; i < op.own; i += mptc__stride() * MPTC__PACK) {
        const unsigned n = mptc__left(op.own, i);
        float p[MPTC__PACK], a[MPTC__PACK];
        mptc__weights_load(&op, op.first + i, n, p);
        mptc__load(mpt_f32_array(op.average), i, n, a);
        MPTC__EACH(e) a[e] = mpt__average(&op, a[e], p[e]);
        mptc__store(mpt_f32_array(op.average), i, n, a);
    }
}

/* What this rank's update has moved, for the others; heard: what all have */
static __global__ void mptc__meters_k(mpt_optimizer_state *state, uint64_t *meters, int rank, int ranks, int heard) {
    if (heard && !state->found) mpt__meters_add(state, meters, ranks);
    if (heard) return;
    meters[2 * rank] = state->moved;
    meters[2 * rank + 1] = state->lost;
}

/* The weights go to all ranks; a recorded step has that in it. */
static mpt_result mptc__update_share(mpt_context *ctx, const mpt_update_op *op) {
    const mpt_shard *s = op->shard;
    const mpt_ranks *r = s->ranks;
    if (op->desc.meter) MPTC__TRY(MPTC__LAUNCH(mptc__meters_k, 1, 1, op->state, s->meters, r->rank, r->ranks, 0));
    if (mptc__of(ctx)->step.mode != MPTC__REPLAY) MPTC__TRY(mpt__share_weights(ctx, op));
    if (!op->desc.meter) return MPT_OK;
    return MPTC__LAUNCH(mptc__meters_k, 1, 1, op->state, s->meters, r->rank, r->ranks, 1);
}

/* scaler: to be updated, if this is its only optimizer; NULL: mptc__scale follows. stuck: its mirror in pinned memory,
   or NULL */
static mpt_result mptc__update_run(mpt_context *ctx, const mpt_update_op *op, mpt_scaler_state *scaler,
                                   int32_t *stuck) {
    mptc__device *device = mptc__of(ctx);
    const size_t packs = mptc__divide_up(op->own, MPTC__PACK);
    MPTC__TRY(MPTC__SPREAD(mptc__update_k, packs, *op, (const mpt__rates *)(void *)device->rates.at, scaler, stuck,
                           (mptc__meter *)(void *)device->zeros, device->tickets));
    if (op->average) MPTC__TRY(MPTC__SPREAD(mptc__average_k, packs, *op));
    if (op->shard) return mptc__update_share(ctx, op);
    return MPT_OK;
}

static mpt_result mptc__update(mpt_context *ctx, const mpt_update_op *op) {
    mptc__device *device = mptc__of(ctx);
    mptc__held *held = &device->held;
    const int rated = device->rated == op->state;
    MPTC__TRY(mptc__enter(ctx));
    if (!rated) { /* after other calls: learning rates may have changed, or there was another check */
        MPTC__TRY(mptc__grow(ctx, &device->rates, (size_t)op->tensors * sizeof(mpt__rates)));
        MPTC__TRY(MPTC__LAUNCH(mptc__rates_k, 1, MPTC__THREADS, *op, (mpt__rates *)(void *)device->rates.at));
    }
    if (!device->step.open) return mptc__update_run(ctx, op, NULL, NULL);
    held->update = 1; /* the scaler's update comes next */
    held->step = *op;
    return MPT_OK;
}

typedef struct mptc__flags { /* found of each optimizer, in device memory */
    const int32_t *found[MPT_OPTIMIZERS];
    int count;
} mptc__flags;

static __global__ void mptc__scale_k(mpt_scaler_state *scaler, mptc__flags flags, int32_t *stuck) {
    mpt__scaler_follow(scaler, flags.found, flags.count);
    if (stuck) *stuck = scaler->stuck;
}

/* The index of this scaler's mirror, a free one if it has none yet, or -1. */
static int mptc__mirror(mptc__device *device, const mpt_scaler_state *scaler) {
    int place = -1;
    for (int i = 0; i < MPTC__MIRRORS; i++) {
        if (device->mirrored[i] == scaler) return i;
        if (!device->mirrored[i]) place = i;
    }
    if (place >= 0) {
        device->mirrored[place] = scaler;
        device->stuck[place] = 0;
    }
    return place;
}

static mpt_result mptc__scale_run(mpt_context *ctx, mpt_scaler_state *scaler, const int32_t *const *found, int count,
                                  int32_t *stuck) {
    mptc__device *device = mptc__of(ctx);
    mptc__flags flags = MPT_ZERO;
    if (device->held.update && count == 1 && found[0] == &device->held.step.state->found) {
        device->held.update = 0;
        return mptc__update_run(ctx, &device->held.step, scaler, stuck);
    }
    MPTC__TRY(mptc__enter(ctx));
    flags.count = count;
    for (int i = 0; i < count; i++) flags.found[i] = found[i];
    return MPTC__LAUNCH(mptc__scale_k, 1, 1, scaler, flags, stuck);
}

static mpt_result mptc__step_close(mpt_context *ctx);

/* *stuck comes from a copy in pinned memory that the kernel writes, so the host does not wait; it may be from an
   earlier update. A seventeenth scaler has no such copy and waits. */
static mpt_result mptc__scale(mpt_context *ctx, mpt_scaler_state *scaler, const int32_t *const *found, int count,
                              int32_t *stuck) {
    mptc__device *device = mptc__of(ctx);
    const int mirror = mptc__mirror(device, scaler);
    MPTC__TRY(mptc__scale_run(ctx, scaler, found, count, mirror < 0 ? NULL : &device->stuck[mirror]));
    MPTC__TRY(mptc__step_close(ctx));
    if (device->step.again) return MPT_OK;
    if (mirror < 0) return mptc__download(ctx, stuck, &scaler->stuck, sizeof *stuck);
    *stuck = *(volatile int32_t *)&device->stuck[mirror];
    return MPT_OK;
}

/* ==== STEPS ====

   The calls of a model's step are the same every time, except for the batch. The first step launches them one by one;
   the second records them as two graphs, one for each feed. From then on the calls launch nothing until scale, the last
   one, launches the graph whose feed received this step's uploads; these run on another stream while the step before
   still reads the other feed. Everything else that differs between steps is in device memory: scale, learning rates,
   counters. If recording fails, the step is launched call by call and the next one is recorded again, because the cause
   may have been another thread's call or a shortage of memory. After the third failure it is not tried again. */

/* Copies uploaded data from the feed to its destination. */
static mpt_result mptc__held_copy(mpt_context *ctx, void *to) {
    mptc__device *device = mptc__of(ctx);
    const mptc__held *held = &device->held;
    if (device->step.mode == MPTC__REPLAY) return MPT_OK;
    MPTC__CUDA(cudaMemcpyAsync(to, held->fed, held->bytes, cudaMemcpyDeviceToDevice, device->stream));
    return MPT_OK;
}

static mpt_result mptc__held_do(mpt_context *ctx) {
    mptc__device *device = mptc__of(ctx);
    mptc__held *held = &device->held;
    const int finish = held->finish, bias = held->bias, pool = held->pool, few = held->few, update = held->update;
    const int slope = held->slope, running = held->running;
    const mpt_array none = MPT_ZERO;
    void *to = held->to, *clear = held->clear;
    held->to = held->clear = NULL;
    held->finish = held->bias = held->pool = held->few = held->slope = held->running = held->update = 0;
    if (clear) MPTC__TRY(mptc__clear(ctx, clear, held->cleared));
    if (to) MPTC__TRY(mptc__held_copy(ctx, to));
    if (finish) MPTC__TRY(mptc__finish(ctx, &held->product, held->product.c, held->product.ldc, 0));
    if (bias) MPTC__TRY(mptc__sums_run(ctx, &held->sums));
    if (pool) MPTC__TRY(mptc__pool_backward(ctx, &held->pooling, none, held->pooled));
    if (few) MPTC__TRY(mptc__few_run(ctx, &held->product, none));
    if (slope) MPTC__TRY(mptc__map_run(ctx, &held->sloped, NULL, 0));
    if (running) MPTC__TRY(mptc__norm_running(ctx, &held->averages));
    if (update) return mptc__update_run(ctx, &held->step, NULL, NULL);
    return MPT_OK;
}

/* Uploads to the feed; the data stays there if the next call is its only reader. */
static mpt_result mptc__feed_take(mpt_context *ctx, mpt_feed_op *op) {
    mptc__device *device = mptc__of(ctx);
    mptc__step *step = &device->step;
    const mptc__slot *feed = &device->feeds[step->turn];
    const size_t at = step->fed;
    const void *from = op->in_device ? op->x : feed->host + at;
    step->fed += mptc__round_up(op->bytes, mptc__align);
    if (step->fed > feed->bytes)
        return mpt_fail(ctx, MPT_ERROR_DEVICE, "cuda: this step uploads over %zu bytes, more than before", feed->bytes);
    if (step->reads == step->turn) {
        if (!op->in_device) mptc__stage(feed->host + at, (const char *)op->x, op->bytes, op);
        if (op->first < op->floats) return MPT_OK;
        if (!at) MPTC__CUDA(cudaStreamWaitEvent(device->feeder, feed->used, 0));
        if (op->in_device) MPTC__CUDA(cudaStreamWaitEvent(device->feeder, device->arrived, 0));
        MPTC__CUDA(cudaMemcpyAsync(feed->device + at, from, op->bytes, cudaMemcpyDefault, device->feeder));
        MPTC__CUDA(cudaEventRecord(feed->copied, device->feeder));
    } else if (op->floats) {
        op->first = mpt__first_bad((const float *)op->x, op->floats);
    }
    op->at = op->staging;
    if (device->held.to) MPTC__TRY(mptc__held_copy(ctx, device->held.to));
    device->held.fed = device->feeds[step->reads].device + at;
    device->held.to = op->staging;
    device->held.bytes = op->bytes;
    return MPT_OK;
}

/* The place of these steps: their optimizer's, emptied if something changed; or else the least recently used one */
static mptc__graph *mptc__graph_of(mptc__device *device, const mpt_update_op *op) {
    mptc__graph *graph = &device->graphs[0];
    for (mptc__graph *g = graph; g < device->graphs + MPTC__GRAPHS && graph->key.state != op->state; g++)
        if (g->key.state == op->state || g->used < graph->used) graph = g;
    if (memcmp(&graph->key, op, sizeof *op)) {
        mptc__graph_drop(graph);
        memset(graph, 0, sizeof *graph);
        memcpy(&graph->key, op, sizeof *op);
    }
    graph->used = ++device->steps;
    return graph;
}

/* Starts a replay if there is a graph that reads this step's feed, else a recording. */
static mpt_result mptc__step_record(mpt_context *ctx, int again) {
    mptc__device *device = mptc__of(ctx);
    mptc__step *step = &device->step;
    MPTC__TRY(mptc__slots_grow(ctx, device->feeds, step->graph->fed));
    if (!again) device->turn = !device->turn;
    step->turn = device->turn;
    step->reads = step->graph->exec[!step->turn] ? step->turn : !step->turn;
    MPTC__TRY(mptc__await(ctx, device->feeds[step->turn].copied));
    if (step->graph->resident) MPTC__CUDA(cudaEventRecord(device->arrived, device->stream));
    if (!step->graph->exec[step->reads])
        MPTC__CUDA(cudaStreamBeginCapture(device->stream, cudaStreamCaptureModeThreadLocal));
    step->mode = step->graph->exec[step->reads] ? MPTC__REPLAY : MPTC__RECORD;
    return MPT_OK;
}

/* Logs that recording failed, and why. */
static void mptc__record_failed(mpt_context *ctx, const char *why) {
    mptc__graph *graph = mptc__of(ctx)->step.graph;
    const int last = ++graph->failures == MPTC__TRIES;
    mptc__say(ctx, last ? "cuda: training steps are no longer recorded, because it failed three times: "
                        : "cuda: a training step could not be recorded and is launched call by call: ", why);
    cudaGetLastError(); /* clears it: the step itself has not failed */
}

static mpt_result mptc__begin(mpt_context *ctx, const mpt_update_op *op, const void *staging) {
    mptc__device *device = mptc__of(ctx);
    mptc__step *step = &device->step;
    const int again = step->again, failed = step->failed;
    memset(step, 0, sizeof *step); /* first: a failure from here on must not ask for another try */
    MPTC__TRY(mptc__enter(ctx));
    step->open = 1;
    step->staging = staging;
    step->graph = mptc__graph_of(device, op);
    if (device->desc.no_graph || failed || step->graph->failures >= MPTC__TRIES || !step->graph->fed) return MPT_OK;
    if (mptc__step_record(ctx, again) != MPT_OK) mptc__record_failed(ctx, mpt_why(ctx));
    return MPT_OK;
}

/* Ends a recording. why: the reason if a call failed, else NULL */
static void mptc__record_end(mpt_context *ctx, const char *why) {
    mptc__device *device = mptc__of(ctx);
    mptc__step *step = &device->step;
    cudaGraphExec_t *exec = &step->graph->exec[step->reads];
    cudaGraph_t graph = NULL;
    cudaError_t e = cudaStreamEndCapture(device->stream, &graph);
    if (e == cudaSuccess && !why) e = cudaGraphInstantiateWithFlags(exec, graph, 0);
    if (graph) cudaGraphDestroy(graph);
    step->failed = e != cudaSuccess || why;
    step->again = step->failed || step->reads != step->turn;
    step->mode = MPTC__DIRECT;
    if (!step->failed) return;
    *exec = NULL;
    mptc__record_failed(ctx, why ? why : cudaGetErrorString(e));
}

/* Called after all calls of a step: launches its graph if it has one. */
static mpt_result mptc__step_close(mpt_context *ctx) {
    mptc__device *device = mptc__of(ctx);
    mptc__step *step = &device->step;
    const mptc__slot *feed = &device->feeds[step->turn];
    if (!step->open) return MPT_OK;
    const int direct = step->mode == MPTC__DIRECT;
    if (direct) {
        step->graph->fed = step->fed;
        step->graph->resident = step->resident;
    }
    if (step->mode == MPTC__RECORD) mptc__record_end(ctx, NULL);
    step->mode = MPTC__DIRECT;
    if (direct || step->again) return MPT_OK;
    MPTC__CUDA(cudaStreamWaitEvent(device->stream, feed->copied, 0));
    MPTC__CUDA(cudaGraphLaunch(step->graph->exec[step->turn], device->stream));
    MPTC__CUDA(cudaEventRecord(feed->used, device->stream));
    return MPT_OK;
}

/* Ends a recording that a bad input interrupted; the next step will be recorded. */
static void mptc__record_drop(mptc__device *device) {
    cudaGraph_t graph = NULL;
    if (cudaStreamEndCapture(device->stream, &graph) != cudaSuccess) cudaGetLastError();
    if (graph) cudaGraphDestroy(graph);
}

static mpt_result mptc__end(mpt_context *ctx, mpt_result result, int *again) {
    mptc__device *device = mptc__of(ctx);
    const int recording = device->step.mode == MPTC__RECORD;
    if (device->home) mptc__turn_home(ctx); /* something failed */
    if (recording && result == MPT_ERROR_VALUE) mptc__record_drop(device);
    else if (recording) mptc__record_end(ctx, mpt_why(ctx));
    memset(&device->held, 0, sizeof device->held);
    device->step.mode = MPTC__DIRECT;
    device->step.open = 0;
    *again = device->step.again;
    if (*again) return MPT_OK;
    return result;
}

/* ==== TABLE ==== */

/* Does this device have a context? cudaSetDevice would create one, which takes some hundred megabytes. */
static int mptc__has_context(mptc__device *device, int number) {
    unsigned flags = 0;
    int active = 1;
    if (!device->context_state) {
        void *entry = NULL;
#if CUDART_VERSION >= 12050
        cudaDriverEntryPointQueryResult found;
        cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &entry, 11000, cudaEnableDefault, &found);
#else
        cudaGetDriverEntryPoint("cuDevicePrimaryCtxGetState", &entry, cudaEnableDefault);
#endif
        memcpy(&device->context_state, &entry, sizeof entry);
    }
    return !device->context_state || device->context_state(number, &flags, &active) != 0 || active;
}

struct mptc__visit { /* makes the context's device current while it lives, then the caller's, if that is in use */
    int home;
    bool back;
    explicit mptc__visit(mptc__device *device) : home(0), back(false) {
        const int number = device->desc.device;
        if (cudaGetDevice(&home) == cudaSuccess && home == number) return;
        const int used = mptc__has_context(device, home);
        back = cudaSetDevice(number) == cudaSuccess && used;
        cudaGetLastError(); /* if it failed, the calls that follow fail as well and report it */
    }
    ~mptc__visit() {
        if (back) cudaSetDevice(home);
    }
};

/* MPTC__VISIT(call) is `call` on the context's device. */
template <typename type> struct mptc__visiting;
template <typename result, typename... types> struct mptc__visiting<result (*)(mpt_context *, types...)> {
    template <result (*call)(mpt_context *, types...)> static result run(mpt_context *ctx, types... arguments) {
        const mptc__visit visit(mptc__of(ctx));
        return call(ctx, arguments...);
    }
};
#define MPTC__VISIT(call) mptc__visiting<decltype(&call)>::run<call>

static void mptc__close(mpt_context *ctx) {
    mptc__device *device = mptc__of(ctx);
    const mpt_context_desc host = device->desc.context;
    mptc__turn_home(ctx);
    if (device->stream) cudaStreamSynchronize(device->stream);
    if (device->desc.cublas && device->cublas) { /* setting a stream also resets the workspace */
        cublasSetStream(device->cublas, device->user_stream);
        cublasSetMathMode(device->cublas, device->user_math);
        cublasSetPointerMode(device->cublas, device->user_mode);
    } else if (device->cublas) {
        cublasDestroy(device->cublas);
    }
    mptc__graphs_drop(device);
    if (device->feeder) cudaStreamSynchronize(device->feeder);
    for (int i = 0; i < 2 * MPTC__SLOTS; i++) {
        mptc__slot *slot = i < MPTC__SLOTS ? &device->slots[i] : &device->feeds[i - MPTC__SLOTS];
        if (slot->copied) cudaEventDestroy(slot->copied);
        if (slot->used) cudaEventDestroy(slot->used);
        cudaFreeHost(slot->host);
        cudaFree(slot->device);
    }
    if (device->feeder) cudaStreamDestroy(device->feeder);
    if (device->beside) cudaStreamDestroy(device->beside);
    if (device->turned) cudaEventDestroy(device->turned);
    if (device->arrived) cudaEventDestroy(device->arrived);
    cudaFreeHost(device->stuck);
    cudaFree(device->scratch.at);
    cudaFree(device->casts.at);
    cudaFree(device->sums.at);
    cudaFree(device->rates.at);
    cudaFree(device->products.at);
    cudaFree(device->zeros);
    if (device->stream && !device->desc.stream) cudaStreamDestroy(device->stream);
    if (host.release) host.release(device, sizeof *device, host.user);
    else free(device);
}

static mpt_backend mptc__backend(void) {
    mpt_backend table = MPT_ZERO;
    table.name = "cuda";
    table.close = MPTC__VISIT(mptc__close);
    table.alloc = MPTC__VISIT(mptc__alloc);
    table.release = MPTC__VISIT(mptc__release);
    table.upload = MPTC__VISIT(mptc__upload);
    table.feed = MPTC__VISIT(mptc__feed);
    table.download = MPTC__VISIT(mptc__download);
    table.copy = MPTC__VISIT(mptc__copy);
    table.zero = MPTC__VISIT(mptc__zero);
    table.scan = MPTC__VISIT(mptc__scan);
    table.histogram = MPTC__VISIT(mptc__histogram);
    table.map = MPTC__VISIT(mptc__map);
    table.gemm = MPTC__VISIT(mptc__gemm);
    table.conv2d = MPTC__VISIT(mptc__conv2d);
    table.columns = MPTC__VISIT(mptc__columns_copy);
    table.broadcast = MPTC__VISIT(mptc__broadcast);
    table.pool2d = MPTC__VISIT(mptc__pool2d);
    table.norm = MPTC__VISIT(mptc__norm);
    table.loss = MPTC__VISIT(mptc__loss);
    table.ranks = MPTC__VISIT(mptc__ranks);
    table.check = MPTC__VISIT(mptc__check);
    table.update = MPTC__VISIT(mptc__update);
    table.scale = MPTC__VISIT(mptc__scale);
    table.begin = MPTC__VISIT(mptc__begin);
    table.end = MPTC__VISIT(mptc__end);
    return table;
}

/* Checks that the device exists and that this build has code for it. */
static mpt_result mptc__open_device(mpt_context *ctx) {
    mptc__device *device = mptc__of(ctx);
    cudaFuncAttributes attributes;
    int devices = 0;
    MPTC__CUDA(cudaGetDeviceCount(&devices));
    if (device->desc.device < 0 || device->desc.device >= devices)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "cuda: there is no device %d; this machine has %d",
                        device->desc.device, devices);
    MPTC__CUDA(cudaDeviceGetAttribute(&device->processors, cudaDevAttrMultiProcessorCount, device->desc.device));
    if (!device->desc.workspace) { /* a gathered slice should still be in the cache when its product reads it */
        int cache = 0;
        MPTC__CUDA(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device->desc.device));
        device->desc.workspace = mptc__min((size_t)cache / 2, (size_t)64 << 20);
        if (device->desc.workspace < (size_t)8 << 20) device->desc.workspace = (size_t)8 << 20;
    }
    MPTC__CUDA(cudaFuncGetAttributes(&attributes, mptc__map_k));
    return MPT_OK;
}

/* *wrong = 1 if plain arithmetic is not IEEE's: -ftz flushes subnormals, -prec-div=false and -prec-sqrt=false round
   differently; --use_fast_math implies all three, and no macro shows it. *built: __CUDA_ARCH__ of the code that
   runs. */
static __global__ void mptc__arithmetic_k(float subnormal, float half, unsigned *wrong, unsigned *built) {
    unsigned bad = mpt__bits(subnormal * half) != mpt__bits(subnormal) / 2;
    for (unsigned i = 1; i < 64; i++) {
        const float x = half * (float)i;
        bad |= mpt__bits(x / 7.0f) != mpt__bits(__fdiv_rn(x, 7.0f));
        bad |= mpt__bits(sqrtf(x)) != mpt__bits(__fsqrt_rn(x));
    }
    *wrong = bad;
#ifdef __CUDA_ARCH__
    *built = __CUDA_ARCH__;
#endif
}

static mpt_result mptc__open_arithmetic(mpt_context *ctx) {
    mptc__device *device = mptc__of(ctx);
    unsigned found[2] = {0, 0};
    MPTC__TRY(MPTC__LAUNCH(mptc__arithmetic_k, 1, 1, mpt__float(2u), 0.5f, device->tickets, device->tickets + 1));
    MPTC__TRY(mptc__download(ctx, found, device->tickets, sizeof found));
    if (found[0])
        mptc__say(ctx, "cuda: built with --use_fast_math or -ftz=true: ", "results are not those of the manual");
    device->own = device->desc.own_convolutions && found[1] >= 800;
    if (device->desc.own_convolutions && !device->own)
        mptc__say(ctx, "cuda: own_convolutions: ", "this device or this build is older than compute capability 8.0");
    return mptc__zero(ctx, device->tickets, sizeof found);
}

static mpt_result mptc__open_stream(mpt_context *ctx) {
    mptc__device *device = mptc__of(ctx);
    device->stream = (cudaStream_t)device->desc.stream;
    if (!device->stream) MPTC__CUDA(cudaStreamCreateWithFlags(&device->stream, cudaStreamNonBlocking));
    MPTC__CUDA(cudaStreamCreateWithFlags(&device->feeder, cudaStreamNonBlocking));
    MPTC__CUDA(cudaStreamCreateWithFlags(&device->beside, cudaStreamNonBlocking));
    MPTC__CUDA(cudaEventCreateWithFlags(&device->turned, cudaEventDisableTiming));
    MPTC__CUDA(cudaEventCreateWithFlags(&device->arrived, cudaEventDisableTiming));
    for (int i = 0; i < MPTC__SLOTS; i++) {
        MPTC__CUDA(cudaEventCreateWithFlags(&device->slots[i].copied, cudaEventDisableTiming));
        MPTC__CUDA(cudaEventCreateWithFlags(&device->feeds[i].copied, cudaEventDisableTiming));
        MPTC__CUDA(cudaEventCreateWithFlags(&device->feeds[i].used, cudaEventDisableTiming));
    }
    device->stuck = (int32_t *)mptc__malloc(ctx, MPTC__MIRRORS * sizeof *device->stuck, 1);
    const size_t zeros = mptc__align + MPTC__SUM_BLOCKS * sizeof *device->tickets;
    device->zeros = (char *)mptc__malloc(ctx, zeros, 0);
    if (!device->stuck || !device->zeros) return MPT_ERROR_NO_MEMORY;
    device->tickets = (unsigned *)(void *)(device->zeros + mptc__align);
    return mptc__zero(ctx, device->zeros, zeros);
}

static mpt_result mptc__open_cublas(mpt_context *ctx) {
    mptc__device *device = mptc__of(ctx);
    const cublasMath_t math = (cublasMath_t)(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION);
    int major = 0;
    MPTC__CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device->desc.device));
    MPTC__TRY(mptc__grow(ctx, &device->products, (size_t)(major >= 9 ? 32 : 4) << 20)); /* as NVIDIA advises */
    if (device->desc.cublas) {
        const cublasHandle_t user = (cublasHandle_t)device->desc.cublas;
        MPTC__CUBLAS(cublasGetStream(user, &device->user_stream));
        MPTC__CUBLAS(cublasGetMathMode(user, &device->user_math));
        MPTC__CUBLAS(cublasGetPointerMode(user, &device->user_mode));
        device->cublas = user;
    } else {
        MPTC__CUBLAS(cublasCreate(&device->cublas));
    }
    MPTC__CUBLAS(cublasSetStream(device->cublas, device->stream));
    MPTC__CUBLAS(cublasSetWorkspace(device->cublas, device->products.at, device->products.bytes));
    MPTC__CUBLAS(cublasSetMathMode(device->cublas, math));
    MPTC__CUBLAS(cublasSetPointerMode(device->cublas, CUBLAS_POINTER_MODE_HOST));
    return MPT_OK;
}

MPT_DEF mpt_context *mpt_cuda_open(const mpt_cuda_desc *user) {
    mpt_cuda_desc desc = MPT_ZERO;
    mptc__device *device;
    mpt_context *ctx;
    if (user) desc = *user;
    device = (mptc__device *)(desc.context.alloc && desc.context.release
                                  ? desc.context.alloc(sizeof *device, desc.context.user) : malloc(sizeof *device));
    const mpt_backend table = mptc__backend();
    ctx = device ? mpt_open_backend(&desc.context, &table, device) : NULL;
    if (!ctx) {
        if (!device && desc.context.log) desc.context.log(MPT_LOG_ERROR, "cuda: out of memory", desc.context.user);
        if (device && desc.context.alloc && desc.context.release)
            desc.context.release(device, sizeof *device, desc.context.user);
        else free(device);
        return NULL;
    }
    memset(device, 0, sizeof *device);
    device->desc = desc;
    const mptc__visit visit(device);
    mpt_result opened = mptc__open_device(ctx);
    if (opened == MPT_OK) opened = mptc__open_stream(ctx);
    if (opened == MPT_OK) opened = mptc__open_arithmetic(ctx);
    if (opened == MPT_OK) opened = mptc__open_cublas(ctx);
    if (opened != MPT_OK) {
        mpt_close(ctx);
        return NULL;
    }
    if (desc.context.log) desc.context.log(MPT_LOG_INFO, "open: cuda", desc.context.user);
    return ctx;
}

/* The names below are the implementation's own. */
#undef MPTC__TRY
#undef MPTC__CUDA
#undef MPTC__CUBLAS
#undef MPTC__LAUNCH
#undef MPTC__SPREAD
#undef MPTC__EACH
#undef MPTC__VISIT

#endif /* implementation; the licence is that of mpt.h */
