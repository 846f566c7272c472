/* surroundings.c - what a program around mpt may give, share and run out of: a stream and a cuBLAS handle of its own,
   several contexts on one device and on two, no device, too old a driver, no memory. The calls by which mpt_cuda.cuh
   takes and gives back come by here, on a GPU as on the runner: so any of them can fail, and what is not given back is
   seen. */
#include "../../mpt.h"
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "../check.h"

/* ==== DRIVER ==== */

enum { BLOCKS = 512, DEVICES = 16 };

typedef struct driver_block {
    void *at;
    size_t bytes; /* of device memory; 0: pinned */
} driver_block;

typedef struct driver_state {
    cudaError_t absent;         /* what every call says, there being no device */
    cudaError_t last;           /* what cudaGetLastError says of failures made here */
    long calls, fail_at;        /* of those that need memory, from 1; 0: none fails */
    size_t memory, taken;       /* of the device, in bytes; memory 0: as much as there is */
    driver_block block[BLOCKS]; /* at NULL: free */
    long objects;               /* streams, events, graphs and handles that live */
    size_t refused, left;       /* bytes of the last allocation on the device that failed; what was free then */
    int active[DEVICES];        /* there is a context on this device */
    int unrecorded, recorded;   /* recordings that are still to fail, that were made */
} driver_state;

static driver_state driver;

static cudaError_t driver_error(cudaError_t e) {
    driver.last = e;
    return e;
}

static cudaError_t driver_last(void) {
    const cudaError_t e = driver.last;
    driver.last = cudaSuccess;
    return e != cudaSuccess ? e : cudaGetLastError();
}

/* Does this call, which needs memory, fail? */
static int driver_fails(void) { return ++driver.calls == driver.fail_at; }

static driver_block *driver_find(const void *at) {
    int i;
    for (i = 0; i < BLOCKS; i++)
        if (driver.block[i].at == at) return &driver.block[i];
    printf("a block that mpt_cuda.cuh does not have, or over %d of them\n", BLOCKS);
    exit(1);
}

static cudaError_t driver_kept(cudaError_t e, void **p, size_t bytes) {
    driver_block *block = e == cudaSuccess ? driver_find(NULL) : NULL;
    if (!block) return e;
    block->at = *p, block->bytes = bytes;
    driver.taken += bytes;
    return e;
}

static cudaError_t driver_mem_info(size_t *available, size_t *total) {
    const cudaError_t e = cudaMemGetInfo(available, total);
    if (driver.memory) *available = driver.memory - driver.taken, *total = driver.memory;
    return e;
}

static cudaError_t driver_malloc(void **p, size_t bytes) {
    size_t total;
    *p = NULL;
    if (driver_fails() || (driver.memory && bytes > driver.memory - driver.taken)) {
        driver.refused = bytes;
        driver_mem_info(&driver.left, &total);
        return driver_error(cudaErrorMemoryAllocation);
    }
    return driver_kept(cudaMalloc(p, bytes), p, bytes);
}

static cudaError_t driver_host_alloc(void **p, size_t bytes, unsigned flags) {
    *p = NULL;
    if (driver_fails()) return driver_error(cudaErrorMemoryAllocation);
    return driver_kept(cudaHostAlloc(p, bytes, flags), p, 0);
}

static void driver_drop(void *p) {
    driver_block *block = p ? driver_find(p) : NULL;
    if (!block) return;
    driver.taken -= block->bytes;
    block->at = NULL;
}

static cudaError_t driver_free(void *p) {
    driver_drop(p);
    return cudaFree(p);
}

static cudaError_t driver_free_host(void *p) {
    driver_drop(p);
    return cudaFreeHost(p);
}

static cudaError_t driver_stream(cudaStream_t *stream, unsigned flags) {
    if (driver_fails()) return driver_error(cudaErrorMemoryAllocation);
    driver.objects++;
    return cudaStreamCreateWithFlags(stream, flags);
}

static cudaError_t driver_event(cudaEvent_t *event, unsigned flags) {
    if (driver_fails()) return driver_error(cudaErrorMemoryAllocation);
    driver.objects++;
    return cudaEventCreateWithFlags(event, flags);
}

static cudaError_t driver_capture_end(cudaStream_t stream, cudaGraph_t *graph) {
    const cudaError_t e = cudaStreamEndCapture(stream, graph);
    driver.objects += *graph != NULL;
    return e;
}

static cudaError_t driver_instantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) {
    if (driver_fails()) return driver_error(cudaErrorMemoryAllocation);
    if (driver.unrecorded && driver.unrecorded--) return driver_error(cudaErrorStreamCaptureInvalidated);
    driver.objects++;
    driver.recorded++;
    return cudaGraphInstantiateWithFlags(exec, graph, flags);
}

static cublasStatus_t driver_cublas(cublasHandle_t *handle) {
    if (driver_fails()) return CUBLAS_STATUS_ALLOC_FAILED;
    driver.objects++;
    return cublasCreate(handle);
}

static cudaError_t driver_set_device(int device) {
    if (driver.absent) return driver_error(driver.absent);
    if (device >= 0 && device < DEVICES) driver.active[device] = 1;
    return cudaSetDevice(device);
}

static int driver_context_state(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = driver.active[device];
    return 0;
}

static cudaError_t driver_entry(const char *symbol, void **entry) {
    int (*const state)(int, unsigned *, int *) = driver_context_state;
    CHECK(strcmp(symbol, "cuDevicePrimaryCtxGetState") == 0);
    memcpy(entry, &state, sizeof state);
    return cudaSuccess;
}

/* Nothing was kept, and no error is left for the next call. */
static int driver_clean(void) {
    int i, held = 0;
    for (i = 0; i < BLOCKS; i++) held += driver.block[i].at != NULL;
    return !held && !driver.taken && !driver.objects && driver_last() == cudaSuccess;
}

#undef cublasCreate
#undef cublasDestroy
#define cudaGetDevice(device) (driver.absent ? driver_error(driver.absent) : cudaGetDevice(device))
#define cudaSetDevice(device) driver_set_device(device)
#define cudaGetDriverEntryPoint(symbol, entry, flags) driver_entry(symbol, entry)
#define cudaGetDriverEntryPointByVersion(symbol, entry, version, flags, found) \
    ((void)(found), driver_entry(symbol, entry))
#define cudaGetDeviceCount(count) (driver.absent ? driver_error(driver.absent) : cudaGetDeviceCount(count))
#define cudaGetLastError() driver_last()
#define cudaMalloc(p, bytes) driver_malloc((void **)(p), bytes)
#define cudaFree(p) driver_free(p)
#define cudaHostAlloc(p, bytes, flags) driver_host_alloc((void **)(p), bytes, flags)
#define cudaFreeHost(p) driver_free_host(p)
#define cudaMemGetInfo(available, total) driver_mem_info(available, total)
#define cudaStreamCreateWithFlags(stream, flags) driver_stream(stream, flags)
#define cudaStreamDestroy(stream) (driver.objects--, cudaStreamDestroy(stream))
#define cudaEventCreateWithFlags(event, flags) driver_event(event, flags)
#define cudaEventDestroy(event) (driver.objects--, cudaEventDestroy(event))
#define cudaStreamEndCapture(stream, graph) driver_capture_end(stream, graph)
#define cudaGraphDestroy(graph) (driver.objects--, cudaGraphDestroy(graph))
#define cudaGraphInstantiateWithFlags(exec, graph, flags) driver_instantiate(exec, graph, flags)
#define cudaGraphExecDestroy(exec) (driver.objects--, cudaGraphExecDestroy(exec))
#define cublasCreate(handle) driver_cublas(handle)
#define cublasDestroy(handle) (driver.objects--, cublasDestroy_v2(handle))

#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../../mpt_cuda.cuh"

/* ==== A TRAINING ==== whose calls may fail once each for want of memory, and are made again then */

enum { BATCH = 4, ACCUMULATE = 2, SIDE = 6, CHANNELS = 2, CLASSES = 3, STEPS = 5, MOST = 2048, TEXT = 512 };

typedef struct outcome {
    float weights[MOST];
    double loss[STEPS];
    float scale;
    int64_t skipped;
} outcome;

typedef struct training {
    mpt_cuda_desc desc;
    uint64_t seed;
    mpt_context *ctx;
    mpt_model *net;
    test_counter host;
    char text[TEXT]; /* the last error that the log was told */
    char last[TEXT]; /* the last recording that failed, and... */
    int said;        /* ...how many did, as the log was told */
    int step, failures;
    outcome out;
} training;

static int home; /* the device that is current for the caller */

static int at_home(void) {
    int device = -1;
    return cudaGetDevice(&device) == cudaSuccess && device == home;
}

static void keep_text(mpt_log_level level, const char *text, void *user) {
    training *t = (training *)((char *)user - offsetof(training, host));
    if (level == MPT_LOG_ERROR) {
        snprintf(t->text, TEXT, "%s", text);
    } else {
        CHECK(!strstr(text, "fast_math")); /* this build's arithmetic is IEEE's */
    }
    if (level != MPT_LOG_ERROR && strstr(text, "recorded")) {
        snprintf(t->last, TEXT, "%s", text);
        t->said++;
    }
}

/* Of this user's device, stream and handle */
static training *training_new(uint64_t seed, const mpt_cuda_desc *desc) {
    training *t = (training *)test_memory(sizeof *t);
    if (desc) t->desc = *desc;
    t->desc.context = test_counting(&t->host, 0);
    t->desc.context.log = keep_text;
    t->seed = seed;
    return t;
}

/* The text says what was asked for and, of device memory, what there is. */
static int says_memory(const char *text) {
    unsigned long asked = 0, left = 0, total = 0;
    const char *numbers = strstr(text, "out of memory: ");
    if (!numbers || strstr(text, "pinned")) return strstr(text, "memory") != NULL || strstr(text, "alloc") != NULL;
    if (sscanf(numbers, "out of memory: %lu bytes asked for, %lu of %lu free", &asked, &left, &total) != 3) return 0;
    return asked == driver.refused && left == driver.left && (!driver.memory || total == driver.memory);
}

/* Did it go well? If not, it was for want of memory, and is told so. */
static int went_well(training *t, mpt_result r) {
    CHECK(at_home());
    if (r == MPT_OK) return 1;
    t->failures++;
    if (!CHECK(r == MPT_ERROR_NO_MEMORY && says_memory(t->text))) printf("    %s\n", t->text);
    return 0;
}

static int training_open(training *t) {
    t->ctx = mpt_cuda_open(&t->desc);
    return went_well(t, t->ctx ? MPT_OK : MPT_ERROR_NO_MEMORY);
}

static int training_build(training *t) {
    mpt_train_desc train = MPT_ZERO;
    int h;
    if (!t->net) {
        t->net = mpt_model_new(t->ctx, mpt_policy_preset(MPT_O2, t->seed % 2 ? MPT_F16 : MPT_BF16));
        h = mpt_input(t->net, SIDE, SIDE, CHANNELS);
        h = mpt_relu(t->net, mpt_batch_norm(t->net, test_same(t->net, h, 4 + (int)t->seed, 3), NULL));
        h = mpt_dropout(t->net, mpt_linear(t->net, mpt_max_pool2d(t->net, h, 2, NULL), 8, NULL), 0.2f);
        mpt_softmax_cross_entropy(t->net, mpt_linear(t->net, mpt_gelu(t->net, h), CLASSES, NULL), NULL);
        CHECK(at_home());
    }
    train.batch = BATCH, train.accumulate = ACCUMULATE, train.clip_norm = 1, train.seed = t->seed;
    train.scaler.init_scale = 2097152; /* the first steps are skipped in fp16 */
    return went_well(t, mpt_model_build(t->net, &train));
}

static int training_step(training *t) {
    float x[ACCUMULATE * BATCH * SIDE * SIDE * CHANNELS];
    int32_t label[ACCUMULATE * BATCH];
    const uint64_t name = 100 * t->seed + (uint64_t)t->step;
    int i;
    test_floats(x, sizeof x / sizeof *x, -1, 1, name);
    for (i = 0; i < ACCUMULATE * BATCH; i++) label[i] = (int32_t)(mpt_hash(name, 0, 0, (uint64_t)i) % CLASSES);
    if (!went_well(t, mpt_train_step(t->net, x, label))) return 0;
    t->out.loss[t->step++] = mpt_loss(t->net);
    return 1;
}

static void training_start(training *t) {
    CHECK(training_open(t) || training_open(t));
    CHECK(training_build(t) || training_build(t));
}

static void training_go_on(training *t) { CHECK(training_step(t) || training_step(t)); }

static void training_end(training *t) {
    CHECK(mpt_params_count(mpt_model_params(t->net), 0) <= MOST);
    went_well(t, mpt_params_get(mpt_model_params(t->net), 0, t->out.weights));
    t->out.scale = mpt_loss_scale(t->net);
    t->out.skipped = (int64_t)mpt_steps_skipped(t->net);
    mpt_model_free(t->net);
    mpt_close(t->ctx);
    CHECK(at_home() && test_counter_clean(&t->host));
}

static training *trained(uint64_t seed, const mpt_cuda_desc *desc) {
    training *t = training_new(seed, desc);
    int step;
    training_start(t);
    for (step = 0; step < STEPS; step++) training_go_on(t);
    training_end(t);
    return t;
}

/* Frees the second. */
static int same(const training *a, training *b) {
    const int equal = memcmp(&a->out, &b->out, sizeof a->out) == 0;
    free(b);
    return equal;
}

/* ==== MEMORY ==== */

/* Every call that needs memory fails once: the program is told, nothing is lost, and it trains to the same bits. A step
   that cannot be recorded is none that fails: it is launched call by call. */
static void test_failing_calls(const training *expected) {
    long fail_at = 0, quiet = 0;
    do {
        training *t;
        driver.calls = 0, driver.fail_at = ++fail_at;
        t = trained(expected->seed, NULL);
        CHECK(t->failures <= 1);
        quiet += !t->failures;
        if (!CHECK(driver_clean()) | !CHECK(same(expected, t))) printf("    call %ld that needs memory\n", fail_at);
    } while (driver.calls >= fail_at);
    driver.fail_at = 0;
    CHECK(fail_at > 30);
    CHECK_EQUAL(quiet, 7); /* two feeds, of two blocks each, and two graphs; and the last run, where nothing failed */
}

/* A device that is too small, for opening, for the model, for its steps; and then is not */
static void test_small_device(const training *expected) {
    int enough = 0;
    for (driver.memory = 4096; !enough; driver.memory += driver.memory / 4) {
        training *t = training_new(expected->seed, NULL);
        if (!CHECK(driver.memory < (size_t)1 << 30)) break;
        enough = training_open(t) && training_build(t);
        while (enough && t->step < STEPS) enough = training_step(t);
        if (t->ctx) training_end(t);
        CHECK(driver_clean() && (enough || t->failures == 1));
        if (enough) CHECK(same(expected, t));
        else free(t);
    }
    driver.memory = 0;
}

/* More than any device has; then the context goes on. */
static void test_huge_array(void) {
    training *t = training_new(1, NULL);
    const size_t bytes[] = {(size_t)1 << 40, (size_t)-1, (size_t)-1 / 2 + 1, (size_t)-256};
    size_t i;
    training_start(t);
    for (i = 0; i < sizeof bytes / sizeof *bytes; i++) {
        char number[32];
        snprintf(number, sizeof number, "%lu", (unsigned long)bytes[i]);
        CHECK(mpt_alloc(t->ctx, bytes[i]) == NULL);
        CHECK(test_has_word(mpt_why(t->ctx), number) && test_has_word(mpt_why(t->ctx), "free"));
        training_go_on(t);
    }
    training_end(t);
    CHECK(driver_clean());
    free(t);
}

/* The sums of a bias's gradient wait for the product of the weights': where that product fails for want of memory, no
   later call makes them. */
static void test_waiting_sums(void) {
    enum { ROWS = 40, C = 16, N = 24, TAPS = 9 };
    const float kept = 7;
    mpt_context *ctx = mpt_cuda_open(NULL);
    float *dy = (float *)mpt_alloc(ctx, ROWS * C * sizeof(float));
    uint16_t *x = (uint16_t *)mpt_alloc(ctx, ROWS * N * sizeof(uint16_t));
    float *dw = (float *)mpt_alloc(ctx, C * N * TAPS * sizeof(float)), *db = (float *)mpt_alloc(ctx, C * sizeof(float));
    int convolution;
    for (convolution = 0; convolution < 2; convolution++) {
        mpt_gemm_op gemm = MPT_ZERO;
        mpt_conv2d_op conv = MPT_ZERO;
        float found = 0;
        gemm.trans_a = 1;
        gemm.m = gemm.lda = C, gemm.n = gemm.ldb = gemm.ldc = N, gemm.k = ROWS;
        gemm.a = mpt_f32_array(dy), gemm.b = mpt_f16_array((mpt_f16 *)x);
        gemm.c = mpt_f32_array(dw), gemm.a_sums = mpt_f32_array(db);
        conv.pass = MPT_BACKWARD_WEIGHT;
        conv.shape.N = 1, conv.shape.H = 5, conv.shape.W = 8;
        conv.shape.C = N, conv.shape.K = C, conv.shape.R = conv.shape.S = 3;
        conv.shape.padding_h = conv.shape.padding_w = 1;
        conv.x = gemm.b, conv.y = gemm.a, conv.w = gemm.c, conv.bias = gemm.a_sums;
        CHECK_OK(ctx, mpt_upload(ctx, db, &kept, sizeof kept));
        driver.calls = 0, driver.fail_at = 1;
        CHECK((convolution ? mpt_op_conv2d(ctx, &conv) : mpt_op_gemm(ctx, &gemm)) == MPT_ERROR_NO_MEMORY);
        driver.fail_at = 0;
        CHECK_OK(ctx, mpt_download(ctx, &found, db, sizeof found));
        CHECK_EQUAL(found, kept);
        CHECK_OK(ctx, convolution ? mpt_op_conv2d(ctx, &conv) : mpt_op_gemm(ctx, &gemm));
        CHECK_OK(ctx, mpt_download(ctx, &found, db, sizeof found));
        CHECK_EQUAL(found, 0);
    }
    mpt_free(ctx, dy);
    mpt_free(ctx, x);
    mpt_free(ctx, dw);
    mpt_free(ctx, db);
    mpt_close(ctx);
    CHECK(driver_clean());
}

/* ==== ERRORS OF OTHERS ==== */

/* "Not ready", which the caller's query was told, fails no call of ours; an error does, once, and is told as theirs. */
static void test_left_errors(void) {
    training *t = training_new(1, NULL);
    int step;
    training_start(t);
    for (step = 0; step < STEPS; step++) {
        driver.last = cudaErrorNotReady;
        training_go_on(t);
    }
    driver.last = cudaErrorInvalidValue;
    CHECK(mpt_alloc(t->ctx, 4) == NULL && test_has_word(mpt_why(t->ctx), "before"));
    training_end(t);
    free(t);
}

/* Recording fails once, twice, three times, and is tried again until then; the steps train to the same bits, and the
   log is told each time. */
static void test_recordings(const training *expected) {
    int fails;
    for (fails = 0; fails <= 4; fails++) {
        training *t;
        driver.recorded = 0, driver.unrecorded = fails;
        t = trained(expected->seed, NULL);
        CHECK_EQUAL(driver.recorded, fails < 3 ? 2 : 0);
        CHECK_EQUAL(driver.unrecorded, fails < 3 ? 0 : fails - 3);
        CHECK_EQUAL(t->said, fails < 3 ? fails : 3);
        CHECK(!fails || strstr(t->last, cudaGetErrorString(cudaErrorStreamCaptureInvalidated)));
        CHECK((strstr(t->last, "no longer") != NULL) == (fails >= 3));
        CHECK(driver_clean() && same(expected, t));
    }
    driver.unrecorded = 0;
}

/* ==== NO DEVICE ==== */

static void check_refused(const mpt_cuda_desc *desc, const char *what, const char *why) {
    training *t = training_new(1, desc);
    CHECK(mpt_cuda_open(&t->desc) == NULL);
    if (!CHECK(strstr(t->text, what) && strstr(t->text, why))) printf("    %s\n", t->text);
    CHECK(driver_clean() && test_counter_clean(&t->host));
    free(t);
}

static void test_no_device(int devices) {
    const cudaError_t absent[] = {cudaErrorNoDevice, cudaErrorInsufficientDriver, cudaErrorSystemDriverMismatch};
    const int number[] = {-1, devices, 1000};
    char text[32];
    int i;
    for (i = 0; i < 3; i++) {
        mpt_cuda_desc desc = MPT_ZERO;
        driver.absent = absent[i];
        check_refused(NULL, "cudaGetDeviceCount", cudaGetErrorString(absent[i]));
        driver.absent = cudaSuccess;
        desc.device = number[i];
        snprintf(text, sizeof text, "no device %d", number[i]);
        check_refused(&desc, text, "this machine has");
        CHECK(at_home());
    }
}

/* ==== HANDLE AND STREAM ==== */

static int has_settings(cublasHandle_t handle, cudaStream_t stream, int math, cublasPointerMode_t mode) {
    cudaStream_t its_stream = NULL;
    cublasMath_t its_math;
    cublasPointerMode_t its_mode;
    return cublasGetStream(handle, &its_stream) == CUBLAS_STATUS_SUCCESS && its_stream == stream &&
           cublasGetMathMode(handle, &its_math) == CUBLAS_STATUS_SUCCESS && (int)its_math == math &&
           cublasGetPointerMode(handle, &its_mode) == CUBLAS_STATUS_SUCCESS && its_mode == mode;
}

/* x = 3 x by the handle, whose scalar is on the device */
static int handle_works(cublasHandle_t handle, cudaStream_t stream) {
    const float start[2] = {3, 5};
    float end[2] = {0, 0}, *x = NULL;
    int ok = (cudaMalloc)((void **)&x, sizeof start) == cudaSuccess;
    ok &= cudaMemcpyAsync(x, start, sizeof start, cudaMemcpyHostToDevice, stream) == cudaSuccess;
    ok &= cublasSscal(handle, 1, x, x + 1, 1) == CUBLAS_STATUS_SUCCESS;
    ok &= cudaMemcpyAsync(end, x, sizeof end, cudaMemcpyDeviceToHost, stream) == cudaSuccess;
    ok &= cudaStreamSynchronize(stream) == cudaSuccess;
    ok &= (cudaFree)(x) == cudaSuccess;
    return ok && end[0] == 3 && end[1] == 15;
}

static void test_handle(const training *expected) {
    const int math = CUBLAS_PEDANTIC_MATH, ours = CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    mpt_cuda_desc desc = MPT_ZERO;
    cudaStream_t given, before;
    cublasHandle_t handle;
    training *t;
    int step;
    CHECK(cudaStreamCreate(&given) == cudaSuccess && cudaStreamCreate(&before) == cudaSuccess);
    CHECK(cublasCreate_v2(&handle) == CUBLAS_STATUS_SUCCESS);
    CHECK(cublasSetStream(handle, before) == CUBLAS_STATUS_SUCCESS);
    CHECK(cublasSetMathMode(handle, (cublasMath_t)math) == CUBLAS_STATUS_SUCCESS);
    CHECK(cublasSetPointerMode(handle, CUBLAS_POINTER_MODE_DEVICE) == CUBLAS_STATUS_SUCCESS);
    desc.stream = given, desc.cublas = handle;
    for (driver.fail_at = 1, driver.calls = 0;; driver.fail_at++, driver.calls = 0) { /* opening fails */
        t = training_new(expected->seed, &desc);
        if (training_open(t)) break;
        CHECK(driver_clean() && has_settings(handle, before, math, CUBLAS_POINTER_MODE_DEVICE));
        free(t);
    }
    CHECK(driver.fail_at > 5);
    driver.fail_at = 0;
    CHECK(training_build(t));
    for (step = 0; step < STEPS; step++) {
        CHECK(has_settings(handle, given, ours, CUBLAS_POINTER_MODE_HOST));
        training_go_on(t);
    }
    training_end(t);
    CHECK(driver_clean() && same(expected, t));
    CHECK(has_settings(handle, before, math, CUBLAS_POINTER_MODE_DEVICE));
    CHECK(handle_works(handle, before) && cudaStreamQuery(given) == cudaSuccess);
    CHECK(cublasDestroy_v2(handle) == CUBLAS_STATUS_SUCCESS);
    CHECK((cudaStreamDestroy)(given) == cudaSuccess && (cudaStreamDestroy)(before) == cudaSuccess);
}

/* ==== SEVERAL CONTEXTS ==== */

enum { CONTEXTS = 3 };

/* They train in turns as each does alone, and the caller's device stays current throughout. */
static void test_contexts(int devices) {
    training *alone[CONTEXTS], *t[CONTEXTS];
    int i, step;
    for (i = 0; i < CONTEXTS; i++) {
        mpt_cuda_desc desc = MPT_ZERO;
        desc.device = i % devices;
        desc.no_graph = i == 2;
        alone[i] = trained((uint64_t)i + 1, &desc);
        t[i] = training_new((uint64_t)i + 1, &desc);
    }
    for (i = 0; i < CONTEXTS; i++) training_start(t[i]);
    for (step = 0; step < STEPS; step++)
        for (i = 0; i < CONTEXTS; i++) training_go_on(t[i]);
    for (i = 0; i < CONTEXTS; i++) training_end(t[i]); /* the others are still open */
    for (i = 0; i < CONTEXTS; i++) {
        CHECK(same(alone[i], t[i]) && alone[i]->out.loss[STEPS - 1] > 0);
        free(alone[i]);
    }
    CHECK(driver_clean());
}

/* A context on the second device of a program that has used none makes no context on the first one. */
static int test_second_device(void) {
    void *found = dlsym(RTLD_DEFAULT, "cudacpu_counter");
    unsigned long long (*counter)(const char *name);
    mpt_cuda_desc desc = MPT_ZERO;
    memcpy(&counter, &found, sizeof counter);
    desc.device = 1, home = 1; /* current from the first call on */
    free(trained(1, &desc));
    CHECK(!driver.active[0] && driver.active[1]);
    if (counter) CHECK_EQUAL(counter("contexts_created"), 1);
    return test_counts.failed != 0;
}

/* This program again, in another world */
static int passes(const char *program, const char *environment, const char *mode) {
    char command[TEXT];
    snprintf(command, sizeof command, "%s '%s' %s", environment, program, mode);
    return system(command) == 0;
}

int main(int count, char **arguments) {
    training *expected;
    int devices = 0;
    if (count > 1 && strcmp(arguments[1], "second-device") == 0) return test_second_device();
    if (count > 1) {
        check_refused(NULL, "cudaGetDeviceCount", cudaGetErrorString(cudaErrorNoDevice));
        return test_counts.failed != 0;
    }
    setenv("CUDACPU_DEVICES", "2", 0); /* of the runner; a GPU knows nothing of it */
    CHECK(cudaGetDeviceCount(&devices) == cudaSuccess);
    CHECK(passes(arguments[0], "CUDA_VISIBLE_DEVICES= CUDACPU_NO_DEVICE=1", "no-device"));
    if (devices > 1) CHECK(passes(arguments[0], "", "second-device"));
    CHECK(cudaSetDevice(home) == cudaSuccess);
    expected = trained(1, NULL);
    CHECK(driver_clean() && expected->failures == 0);
    CHECK(expected->out.skipped > 0 && expected->out.skipped < STEPS); /* some change weights, others do not */
    test_no_device(devices);
    test_handle(expected);
    test_huge_array();
    test_waiting_sums();
    test_left_errors();
    test_recordings(expected);
    test_small_device(expected);
    test_failing_calls(expected);
    test_contexts(1);
    if (devices > 1) {
        home = 1;
        CHECK(cudaSetDevice(home) == cudaSuccess);
        test_contexts(2);
        CHECK(same(expected, trained(1, NULL)));
    } else {
        test_counts.skipped++;
    }
    free(expected);
    return test_finish("cuda/surroundings");
}
