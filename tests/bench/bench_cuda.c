/* bench_cuda.c - how fast the CUDA backend is, and how near to what the card can do.

   Usage: bench_cuda [--tiny] [--csv FILE]

   A table, and the same as CSV: group,case,type,value,unit,ratio. Products: TFLOP/s, ratio to the best square product
   by cuBLAS in the same type. Kernels: GB/s of the bytes that they must move (see README.md here), ratio to a copy from
   device to device. Steps: microseconds of a training step launched one kernel after the other and as a graph, and
   samples/s; ratio is how much longer it takes without a graph. Times are the shortest of REPEATS between two events.
   --tiny shrinks all sizes, so that it runs anywhere as a test; its numbers mean nothing. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../../mpt_cuda.cuh"
#include "../cuda/nets.h"
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <stdio.h>

enum { REPEATS = 7 };

typedef struct bench {
    mpt_context *ctx;
    cublasHandle_t cublas; /* of the context of the products */
    int tf32;              /* its choice */
    cudaStream_t stream;
    cudaEvent_t from, to;
    FILE *csv;
    int tiny, failures;
} bench;

static void ok(bench *b, mpt_result result) {
    if (result == MPT_OK) return;
    printf("failed: %s\n", mpt_why(b->ctx));
    b->failures++;
}

static void row(bench *b, const char *group, const char *what, const char *type, double value, const char *unit,
                double ratio) {
    if (!(value > 0) || !(ratio > 0)) b->failures++;
    printf("%-8s %-28s %-5s %12.3f %-10s %6.3f\n", group, what, type, value, unit, ratio);
    if (b->csv) fprintf(b->csv, "%s,%s,%s,%.6g,%s,%.6g\n", group, what, type, value, unit, ratio);
}

typedef struct job {
    bench *b;
    size_t n;
    mpt_dtype type;
    mpt_array x, y, z;
    float *stats;
    uint16_t *index;
    mpt_optimizer *opt;
    mpt_scaler *scaler;
    mpt_model *net;
    const float *batch;
    const int32_t *label;
    int count;
} job;

typedef void (*work)(job *j);

/* Seconds of one run: the shortest of REPEATS, after a run that warms up */
static double seconds_of(work run, job *j, int times) {
    bench *b = j->b;
    double best = 0;
    int repeat, i;
    for (i = 0; i < j->count; i++) run(j);
    for (repeat = 0; repeat < (b->tiny ? 1 : REPEATS); repeat++) {
        float ms = 0;
        cudaEventRecord(b->from, b->stream);
        for (i = 0; i < times; i++) run(j);
        cudaEventRecord(b->to, b->stream);
        cudaEventSynchronize(b->to);
        cudaEventElapsedTime(&ms, b->from, b->to);
        if (ms <= 0) ms = 1e-6f;
        if (repeat == 0 || ms < best) best = ms;
    }
    return best * 1e-3 / times;
}

static int times_of(const bench *b) { return b->tiny ? 1 : 20; }

static mpt_array array_new(bench *b, mpt_dtype type, size_t count) {
    float *host = (float *)malloc(count * sizeof *host), *device = (float *)mpt_alloc(b->ctx, count * sizeof *host);
    const mpt_array out = mpt_typed_array(mpt_alloc(b->ctx, count * mpt_dtype_size(type)), type);
    size_t i;
    for (i = 0; i < count; i++) host[i] = mpt_uniform(1, 0, 0, i) - 0.5f;
    ok(b, mpt_upload(b->ctx, device, host, count * sizeof *host));
    ok(b, mpt_cast(b->ctx, count, mpt_f32_array(device), out, NULL));
    mpt_free(b->ctx, device);
    free(host);
    return out;
}

/* ==== PRODUCTS ==== */

/* z(n,n) = x(n,n) y(n,n)^T */
static mpt_gemm_op square_op(const job *j) {
    mpt_gemm_op op = MPT_ZERO;
    op.trans_b = 1;
    op.m = op.n = op.k = j->n;
    op.a = j->x;
    op.b = j->y;
    op.c = j->z;
    return op;
}

static void product(job *j) {
    const mpt_gemm_op op = square_op(j);
    ok(j->b, mpt_op_gemm(j->b->ctx, &op));
}

/* As cuBLAS does it without us: the yardstick */
static void square(job *j) {
    const float one = 1, zero = 0;
    const cudaDataType type = j->type == MPT_F32 ? CUDA_R_32F : j->type == MPT_F16 ? CUDA_R_16F : CUDA_R_16BF;
    const int n = (int)j->n, tf32 = j->type == MPT_F32 && j->b->tf32;
    cublasGemmEx(j->b->cublas, CUBLAS_OP_T, CUBLAS_OP_N, n, n, n, &one, j->y.data, type, n, j->x.data, type, n, &zero,
                 j->z.data, type, n, tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}

/* The same with bias and ReLU: a layer whose epilogue is fused */
static void layer(job *j) {
    mpt_gemm_op op = square_op(j);
    op.bias = j->y;
    op.act = MPT_RELU;
    ok(j->b, mpt_op_gemm(j->b->ctx, &op));
}

static void bench_products(bench *b, mpt_dtype type, const char *name) {
    static const size_t small[3] = {16, 24, 32}, large[3] = {1024, 4096, 8192};
    const size_t *sizes = b->tiny ? small : large;
    double best = 0;
    job j = MPT_ZERO;
    char what[64];
    int i;
    j.b = b, j.type = type, j.count = 1;
    j.x = array_new(b, type, sizes[2] * sizes[2]), j.y = array_new(b, type, sizes[2] * sizes[2]);
    j.z = array_new(b, type, sizes[2] * sizes[2]);
    for (i = 0; i < 3; i++) {
        const double n = (double)(j.n = sizes[i]), speed = 2e-12 * n * n * n / seconds_of(square, &j, times_of(b));
        if (speed > best) best = speed;
    }
    row(b, "product", "best square by cuBLAS", name, best, "TFLOP/s", 1);
    for (i = 0; i < 6; i++) {
        const double n = (double)(j.n = sizes[i % 3]);
        const double speed = 2e-12 * n * n * n / seconds_of(i < 3 ? product : layer, &j, times_of(b));
        snprintf(what, sizeof what, "%s %d", i < 3 ? "square" : "with bias and ReLU", (int)j.n);
        row(b, "product", what, name, speed, "TFLOP/s", speed / best);
    }
    mpt_free(b->ctx, j.x.data), mpt_free(b->ctx, j.y.data), mpt_free(b->ctx, j.z.data);
}

/* ==== KERNELS ==== n elements; bytes an element must move at the least */

static void copy(job *j) { cudaMemcpyAsync(j->y.data, j->x.data, j->n * 4, cudaMemcpyDeviceToDevice, j->b->stream); }
static void cast_down(job *j) { ok(j->b, mpt_cast(j->b->ctx, j->n, j->x, j->z, NULL)); }
static void cast_up(job *j) { ok(j->b, mpt_cast(j->b->ctx, j->n, j->z, j->x, NULL)); }

/* y from z */
static mpt_map_op map_op(const job *j, mpt_map map, mpt_activation act) {
    mpt_map_op op = MPT_ZERO;
    op.map = map;
    op.act = act;
    op.n = j->n;
    op.a = j->z;
    op.b = op.out = j->y;
    return op;
}
static void activate(job *j) {
    const mpt_map_op op = map_op(j, MPT_MAP_ACTIVATION, MPT_GELU_TANH);
    ok(j->b, mpt_op_map(j->b->ctx, &op));
}
static void gradient(job *j) {
    const mpt_map_op op = map_op(j, MPT_MAP_ACTIVATION_GRADIENT, MPT_RELU);
    ok(j->b, mpt_op_map(j->b->ctx, &op));
}
static void sum(job *j) {
    mpt_map_op op = map_op(j, MPT_MAP_ADD, MPT_RELU);
    op.beta = 1;
    ok(j->b, mpt_op_map(j->b->ctx, &op));
}
static void dropout(job *j) {
    mpt_map_op op = map_op(j, MPT_MAP_DROPOUT, MPT_IDENTITY);
    op.mask.p = 0.3f;
    ok(j->b, mpt_op_map(j->b->ctx, &op));
}

/* Of 256 outputs; the product with one column is next to nothing beside the sums. */
static void bias(job *j) {
    mpt_gemm_op op = MPT_ZERO;
    op.trans_a = 1;
    op.m = 256;
    op.n = 1;
    op.k = j->n / 256;
    op.a = op.b = j->z;
    op.ldb = 256;
    op.c = mpt_f32_array(j->stats);
    op.a_sums = mpt_f32_array(j->stats + 512);
    ok(j->b, mpt_op_gemm(j->b->ctx, &op));
}

/* Batch norm of 64 channels: y from z */
static mpt_norm_op norm_op(const job *j, mpt_norm_pass pass) {
    mpt_norm_op op = MPT_ZERO;
    op.pass = pass;
    op.shape.N = 1;
    op.shape.pixels = j->n / 64;
    op.shape.C = op.shape.groups = 64;
    op.x = j->z;
    op.stats = j->stats;
    op.gamma = op.beta = mpt_f32_array(j->stats + 512);
    op.y = j->y;
    return op;
}
static void norm_stats(job *j) {
    const mpt_norm_op op = norm_op(j, MPT_NORM_STATS);
    ok(j->b, mpt_op_norm(j->b->ctx, &op));
}
static void norm_forward(job *j) {
    mpt_norm_op op = norm_op(j, MPT_NORM_FORWARD);
    op.act = MPT_RELU;
    ok(j->b, mpt_op_norm(j->b->ctx, &op));
}

/* Max pooling of 16 x 16 images of 64 channels: y from z, or z from y */
static mpt_pool2d_op pool_op(const job *j, mpt_pass pass) {
    const mpt_pool2d_shape shape = {j->n / (64 * 16 * 16), 16, 16, 64, 2, 2, 2, 2, 0, 0, 0};
    mpt_pool2d_op op = MPT_ZERO;
    op.pass = pass;
    op.shape = shape;
    op.x = j->z;
    op.y = j->y;
    op.index = j->index;
    return op;
}
static void pool_forward(job *j) {
    const mpt_pool2d_op op = pool_op(j, MPT_FORWARD);
    ok(j->b, mpt_op_pool2d(j->b->ctx, &op));
}
static void pool_backward(job *j) {
    const mpt_pool2d_op op = pool_op(j, MPT_BACKWARD_DATA);
    ok(j->b, mpt_op_pool2d(j->b->ctx, &op));
}
static void check(job *j) { /* the update that follows in a step is timed with it */
    ok(j->b, mpt_unscale(j->opt));
    ok(j->b, mpt_step(j->opt));
    ok(j->b, mpt_scaler_update(j->scaler));
}

static void bench_optimizer(bench *b, job *j, double copied, const mpt_params_desc *block,
                            const mpt_optimizer_desc *desc, const char *what, const char *type, double bytes) {
    mpt_params *params = mpt_params_new(b->ctx, block);
    double speed;
    mpt_params_add(params, "w", j->n, 0);
    ok(b, mpt_params_build(params));
    j->scaler = mpt_scaler_new(b->ctx, NULL);
    j->opt = mpt_optimizer_new(params, j->scaler, desc);
    speed = 1e-9 * bytes * (double)j->n / seconds_of(check, j, times_of(b));
    row(b, "kernel", what, type, speed, "GB/s", speed / copied);
    mpt_optimizer_free(j->opt);
    mpt_scaler_free(j->scaler);
    mpt_params_free(params);
}

static void bench_kernels(bench *b) {
    static const struct {
        const char *name;
        work run;
        double bytes;
    } kernels[] = {{"cast f32 to 16 bits", cast_down, 6},
                   {"cast 16 bits to f32", cast_up, 6},
                   {"GELU", activate, 4},
                   {"gradient of ReLU", gradient, 6},
                   {"sum and ReLU", sum, 6},
                   {"dropout", dropout, 4},
                   {"bias gradient", bias, 2},
                   {"statistics of batch norm", norm_stats, 2},
                   {"batch norm and ReLU", norm_forward, 4},
                   {"max pool", pool_forward, 3},
                   {"gradient of max pool", pool_backward, 3}};
    static const mpt_dtype types[2] = {MPT_F16, MPT_BF16};
    const mpt_params_desc f32 = {MPT_F32, MPT_MASTER_F32, 0}, half = {MPT_BF16, MPT_MASTER_F32, 0};
    const mpt_params_desc split = {MPT_BF16, MPT_MASTER_SPLIT, 0};
    const mpt_optimizer_desc adam = mpt_adam(1e-3), sgd = mpt_sgd(1e-3, 0.9);
    double copied;
    job j = MPT_ZERO;
    size_t i;
    int t;
    j.b = b, j.count = 1;
    j.n = b->tiny ? 16384 : (size_t)1 << 26; /* far over any cache */
    j.x = array_new(b, MPT_F32, j.n), j.y = array_new(b, MPT_F32, j.n);
    j.stats = (float *)array_new(b, MPT_F32, 1024).data;
    j.index = (uint16_t *)mpt_alloc(b->ctx, j.n * 2);
    copied = 8e-9 * (double)j.n / seconds_of(copy, &j, times_of(b));
    row(b, "kernel", "copy", "-", copied, "GB/s", 1);
    for (t = 0; t < 2; t++) {
        j.z = array_new(b, types[t], j.n);
        j.y.type = types[t];
        ok(b, mpt_cast(b->ctx, j.n, j.z, j.y, NULL));
        for (i = 0; i < sizeof kernels / sizeof *kernels; i++) {
            const double bytes = kernels[i].bytes * (double)j.n;
            const double speed = 1e-9 * bytes / seconds_of(kernels[i].run, &j, times_of(b));
            row(b, "kernel", kernels[i].name, mpt_dtype_name(types[t]), speed, "GB/s", speed / copied);
        }
        mpt_free(b->ctx, j.z.data);
    }
    bench_optimizer(b, &j, copied, &f32, &adam, "check and Adam", "f32", 32);
    bench_optimizer(b, &j, copied, &half, &adam, "check and Adam, copies", "bf16", 34);
    bench_optimizer(b, &j, copied, &split, &adam, "check and Adam, split", "bf16", 32);
    bench_optimizer(b, &j, copied, &f32, &sgd, "check and SGD", "f32", 24);
    mpt_free(b->ctx, j.x.data), mpt_free(b->ctx, j.y.data), mpt_free(b->ctx, j.stats), mpt_free(b->ctx, j.index);
}

/* ==== STEPS ==== */

static void step(job *j) { ok(j->b, mpt_train_step(j->net, j->batch, j->label)); }

static double step_seconds(bench *b, const mpt_cuda_desc *desc, mpt_policy policy, net_layers layers, int side,
                           int channels, int rows) {
    const size_t features = (size_t)side * (size_t)side * (size_t)channels;
    bench own = *b;
    mpt_train_desc train = MPT_ZERO;
    job j = MPT_ZERO;
    float *x = (float *)malloc((size_t)rows * features * sizeof *x);
    int32_t *label = (int32_t *)malloc((size_t)rows * sizeof *label);
    double seconds;
    size_t i;
    own.ctx = mpt_cuda_open(desc);
    for (i = 0; i < (size_t)rows * features; i++) x[i] = mpt_uniform(2, 0, 0, i);
    for (i = 0; i < (size_t)rows; i++) label[i] = (int32_t)(i % NET_CLASSES);
    train.batch = rows, train.clip_norm = 1;
    j.b = &own, j.batch = x, j.label = label, j.count = 3; /* the first steps record */
    j.net = mpt_model_new(own.ctx, policy);
    layers(j.net, side, channels);
    ok(&own, mpt_model_build(j.net, &train));
    seconds = seconds_of(step, &j, b->tiny ? 1 : 100);
    mpt_model_free(j.net);
    mpt_close(own.ctx);
    b->failures = own.failures;
    free(x), free(label);
    return seconds;
}

static void bench_steps(bench *b) {
    static const struct {
        const char *name;
        net_layers layers;
        int side, channels, tiny;
    } nets[] = {
        {"MLP 784-512-512-10", net_mlp, 28, 1, 4}, {"LeNet", net_lenet, 28, 1, 8}, {"ResNet", net_resnet, 32, 3, 8}};
    static const char *const types[] = {"f32", "tf32", "f16", "bf16"};
    const int rows = b->tiny ? 2 : 256;
    size_t n, t;
    for (n = 0; n < 3; n++)
        for (t = 0; t < 4; t++) {
            const mpt_policy policy = mpt_policy_preset(t < 2 ? MPT_O0 : MPT_O2, t == 3 ? MPT_BF16 : MPT_F16);
            const int side = b->tiny ? nets[n].tiny : nets[n].side;
            mpt_cuda_desc desc = MPT_ZERO;
            double single, graph;
            char what[64];
            desc.stream = b->stream, desc.tf32 = t == 1, desc.no_graph = 1;
            single = step_seconds(b, &desc, policy, nets[n].layers, side, nets[n].channels, rows);
            desc.no_graph = 0;
            graph = step_seconds(b, &desc, policy, nets[n].layers, side, nets[n].channels, rows);
            row(b, "step", nets[n].name, types[t], 1e6 * graph, "us", single / graph);
            snprintf(what, sizeof what, "%s, no graph", nets[n].name);
            row(b, "step", what, types[t], 1e6 * single, "us", 1);
            row(b, "step", nets[n].name, types[t], rows / graph, "samples/s", single / graph);
        }
}

/* The products in a type, in a context of their own: tf32 is a choice of the context */
static void bench_types(bench *b) {
    static const char *const names[] = {"f32", "tf32", "f16", "bf16"};
    static const mpt_dtype types[] = {MPT_F32, MPT_F32, MPT_F16, MPT_BF16};
    int t;
    for (t = 0; t < 4; t++) {
        mpt_cuda_desc desc = MPT_ZERO;
        desc.stream = b->stream, desc.tf32 = b->tf32 = t == 1;
        desc.cublas = b->cublas;
        b->ctx = mpt_cuda_open(&desc);
        bench_products(b, types[t], names[t]);
        if (t == 3) bench_kernels(b);
        mpt_close(b->ctx);
    }
}

int main(int argc, char **argv) {
    bench b = MPT_ZERO;
    int i;
#ifdef MPT_TEST_CUDA
    b.tiny = 1; /* tests/cuda/run.sh has built it */
#endif
    for (i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--tiny") == 0) b.tiny = 1;
        else if (strcmp(argv[i], "--csv") == 0 && i + 1 < argc) b.csv = fopen(argv[++i], "w");
        else return printf("usage: bench_cuda [--tiny] [--csv FILE]\n"), 1;
    }
    b.ctx = mpt_cuda_open(NULL);
    if (!b.ctx) return printf("no GPU that mpt can use\n"), 1;
    mpt_close(b.ctx);
    cudaStreamCreateWithFlags(&b.stream, cudaStreamNonBlocking);
    cublasCreate(&b.cublas);
    cudaEventCreate(&b.from), cudaEventCreate(&b.to);
    if (b.csv) fprintf(b.csv, "group,case,type,value,unit,ratio\n");
    printf("%-8s %-28s %-5s %12s %-10s %6s\n", "group", "case", "type", "value", "unit", "ratio");
    bench_types(&b);
    bench_steps(&b);
    if (b.csv && fclose(b.csv)) b.failures++;
    cudaEventDestroy(b.from), cudaEventDestroy(b.to);
    cublasDestroy(b.cublas);
    cudaStreamDestroy(b.stream);
    printf("bench_cuda: %d passed, %d failed\n", b.failures == 0, b.failures);
    return b.failures != 0;
}
