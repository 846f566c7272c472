/* probe.cu - what only a card can tell, in stages: probe [--tiny] STAGE...

   plans     which products cuBLASLt fuses; its time with no workspace and with the context's; BGRADB against a
             product and column sums: was the faster way taken?
   kernels   microseconds of the check of 0.67 M gradients; GB/s that a gather writes, by slice
   convolutions  each pass by cuBLAS and as one kernel, see own_convolutions: microseconds, and how many times as fast
   host      microseconds that 1,000 steps take the host and the device
   errors    steps beside an event that is not done
   capture   steps 1 to 4 while another thread allocates: are they recorded?
   bits      weights after 300 steps: as a graph, call by call, as a graph again
   evict     more models than graphs, in turns
   steps     microseconds of a training step of the nets of peers_cuda.py, which reads these rows: fp16 O2,
             Adam, clipping; the median of 5 windows of 50 steps

   A row each: stage,case,value,unit,verdict; the verdict is pass, FAIL, or - where the value stands beside others.
   --tiny shrinks all sizes so that it runs anywhere; its times mean nothing and are not judged. */
#define MPT_IMPLEMENTATION
#include "mpt.h"
#include "mpt_cuda.cuh"
#include "tests/cuda/nets.h"
#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdio.h>
#include <thread>
#include <vector>

static int tiny, failures;

static void row(const char *stage, const char *what, double value, const char *unit, int judged, int ok) {
    const int failed = judged && !ok;
    failures += failed;
    printf("%s,%s,%.4g,%s,%s\n", stage, what, value, unit, !judged ? "-" : failed ? "FAIL" : "pass");
    fflush(stdout);
}

static void need(const char *stage, mpt_context *ctx, mpt_result r) {
    if (r == MPT_OK) return;
    row(stage, mpt_why(ctx), 0, "-", 1, 0);
}

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/* Seconds of one call, by events, over `times` calls after one that warms up */
template <typename work> static double seconds_of(mptc__device *device, int times, work run) {
    cudaEvent_t from, to;
    float ms = 0;
    cudaEventCreate(&from);
    cudaEventCreate(&to);
    run();
    cudaEventRecord(from, device->stream);
    for (int i = 0; i < times; i++) run();
    cudaEventRecord(to, device->stream);
    cudaEventSynchronize(to);
    cudaEventElapsedTime(&ms, from, to);
    cudaEventDestroy(from);
    cudaEventDestroy(to);
    return 1e-3 * ms / times;
}

static int times() { return tiny ? 2 : 200; }

/* ==== PLANS ==== */

typedef struct shape {
    const char *name;
    int weights; /* 1: dw(m,n) = dy(k,m)^T x(k,n), with the bias gradient; 0: y(m,n) = x(m,k) w(n,k)^T + b, ReLU */
    size_t m, n, k;
} shape;

static void plan(mpt_context *ctx, const shape *z) {
    mptc__device *device = mptc__of(ctx);
    const size_t divide = tiny ? 32 : 1, m = z->m / divide, n = z->n / divide, k = z->k / divide;
    const size_t workspace = device->products.bytes;
    mpt_gemm_op op = MPT_ZERO;
    mptc__fusion f;
    char what[96];
    op.trans_a = z->weights;
    op.trans_b = !z->weights;
    op.m = m, op.n = n, op.k = k;
    op.lda = z->weights ? m : k;
    op.ldb = z->weights ? n : k;
    op.ldc = n;
    op.alpha = 1;
    op.a = mpt_typed_array(mpt_alloc(ctx, m * k * 2), MPT_F16);
    op.b = mpt_typed_array(mpt_alloc(ctx, n * k * 2), MPT_F16);
    op.c = mpt_typed_array(mpt_alloc(ctx, m * n * 4), z->weights ? MPT_F32 : MPT_F16);
    const mpt_array vector = mpt_typed_array(mpt_alloc(ctx, (m + n) * 4), op.c.type);
    if (!z->weights) op.bias = vector, op.act = MPT_RELU;
    const int more = z->weights ? CUBLASLT_EPILOGUE_BGRADB : 0;
    double with = 0;
    for (int off = 1; off >= 0; off--) {
        device->products.bytes = off ? 0 : workspace;
        memset(device->plans, 0, sizeof device->plans);
        const int fused = mptc__fuses(ctx, &op, mptc__epilogue(&op, more), vector.data, &f);
        snprintf(what, sizeof what, "%s: fused, workspace %d MiB", z->name, (int)(device->products.bytes >> 20));
        row("plans", what, fused, "yes or no", !tiny && !off, fused);
        if (!fused) continue;
        with = seconds_of(device, times(), [&] { need("plans", ctx, mptc__fusion_run(ctx, &op, vector.data, &f)); });
        row("plans", what, 1e6 * with, "us", 0, 1);
    }
    if (z->weights) {
        const mptc__sums sums = {k, m, op.a, vector, 0};
        const double apart = seconds_of(device, times(), [&] {
            need("plans", ctx, mptc__multiply(ctx, &op, op.c, op.ldc, 0));
            need("plans", ctx, mptc__sums_run(ctx, &sums));
        });
        snprintf(what, sizeof what, "%s: product and sums apart", z->name);
        row("plans", what, 1e6 * apart, "us", 0, 1);
        const int one = with > 0 && !f.plan.apart;
        const double least = with > 0 ? std::min(with, apart) : apart;
        snprintf(what, sizeof what, "%s: %s is taken, times the faster", z->name, one ? "the epilogue" : "apart");
        row("plans", what, (one ? with : apart) / least, "-", !tiny, (one ? with : apart) <= 1.1 * least);
    }
    mpt_free(ctx, op.a.data);
    mpt_free(ctx, op.b.data);
    mpt_free(ctx, op.c.data);
    mpt_free(ctx, vector.data);
}

static void plans() {
    static const shape shapes[] = {
        {"MLP 512 forward", 0, 64, 512, 768},          {"MLP 512 dW", 1, 512, 768, 64},
        {"wide MLP forward", 0, 4096, 4096, 4096},     {"wide MLP dW", 1, 4096, 4096, 4096},
        {"conv 64 3x3 forward", 0, 16384, 64, 576},    {"conv 64 3x3 dW", 1, 64, 576, 16384},
        {"conv 256 3x3 forward", 0, 8192, 256, 2304},  {"conv 256 3x3 dW", 1, 256, 2304, 8192}};
    mpt_context *ctx = mpt_cuda_open(NULL);
    for (const shape &z : shapes) plan(ctx, &z);
    mpt_close(ctx);
}

/* ==== KERNELS ==== */

static void kernels() {
    mpt_context *ctx = mpt_cuda_open(NULL);
    mptc__device *device = mptc__of(ctx);
    const size_t n = tiny ? 20000 : 670000;
    float *grad = (float *)mpt_alloc(ctx, n * sizeof *grad);
    const double scan = seconds_of(
        device, times(), [&] { need("kernels", ctx, mptc__scan_run(ctx, n, 1, mpt_f32_array(grad), NULL)); });
    row("kernels", "scan of 0.67 M", 1e6 * scan, "us", !tiny, scan <= 4e-6);
    mpt_free(ctx, grad);
    mpt_conv2d_op op = MPT_ZERO;
    op.shape.N = tiny ? 2 : 128;
    op.shape.H = op.shape.W = op.P = op.Q = tiny ? 8 : 32;
    op.shape.C = op.shape.K = 64;
    op.shape.R = op.shape.S = 3;
    op.shape.stride_h = op.shape.stride_w = op.shape.dilation_h = op.shape.dilation_w = op.shape.groups = 1;
    op.shape.padding_h = op.shape.padding_w = 1;
    op.pass = MPT_FORWARD;
    const size_t rows = op.shape.N * op.P * op.Q, ld = 576;
    op.x = mpt_typed_array(mpt_alloc(ctx, rows * 64 * 2), MPT_F16);
    void *matrix = mpt_alloc(ctx, rows * ld * 2);
    for (size_t slice = (size_t)4 << 20; slice <= (size_t)64 << 20; slice *= 2) {
        char what[64];
        const size_t some = mptc__min(slice / (ld * 2), rows);
        const double seconds = seconds_of(device, times(), [&] {
            need("kernels", ctx, mptc__gather_rows(ctx, &op, op.x, 0, some, ld, matrix));
        });
        snprintf(what, sizeof what, "gather of %d MiB", (int)(slice >> 20));
        row("kernels", what, 1e-9 * (double)(some * ld * 2) / seconds, "GB/s", !tiny && slice >= (size_t)32 << 20,
            (double)(some * ld * 2) / seconds >= 2.5e12);
    }
    mpt_free(ctx, op.x.data);
    mpt_free(ctx, matrix);
    mpt_close(ctx);
}

/* ==== CONVOLUTIONS ==== */

static void convolution(mpt_context *ctx, const char *name, mpt_conv2d_op *op) {
    static const char *const passes[] = {"forward", "data", "weights"};
    const mpt_conv2d_shape *z = &op->shape;
    mptc__device *device = mptc__of(ctx);
    char what[96];
    op->P = (z->H - 1) / z->stride_h + 1; /* 3x3, padding 1 */
    op->Q = (z->W - 1) / z->stride_w + 1;
    const size_t x = z->N * z->H * z->W * z->C, w = z->K * 9 * z->C, y = z->N * op->P * op->Q * z->K;
    void *sixteen[3] = {mpt_alloc(ctx, x * 2), mpt_alloc(ctx, w * 2), mpt_alloc(ctx, y * 2)};
    void *dw = mpt_alloc(ctx, w * 4);
    op->x = mpt_typed_array(sixteen[0], MPT_F16);
    op->y = mpt_typed_array(sixteen[2], MPT_F16);
    for (int pass = MPT_FORWARD; pass <= MPT_BACKWARD_WEIGHT; pass++) {
        double seconds[2];
        op->pass = (mpt_pass)pass;
        op->w = pass == MPT_BACKWARD_WEIGHT ? mpt_f32_array((float *)dw) : mpt_typed_array(sixteen[1], MPT_F16);
        const mpt_gemm_op product = mptc__conv2d_product(op);
        if (!mptc__is_own(device, op, &product)) continue;
        for (int own = 0; own < 2; own++) {
            device->own = own;
            seconds[own] = seconds_of(device, times(), [&] { need("convolutions", ctx, mptc__conv2d(ctx, op)); });
            snprintf(what, sizeof what, "%s %s: %s", name, passes[pass], own ? "one kernel" : "cuBLAS");
            row("convolutions", what, 1e6 * seconds[own], "us", 0, 1);
        }
        snprintf(what, sizeof what, "%s %s: one kernel", name, passes[pass]);
        row("convolutions", what, seconds[0] / seconds[1], "times as fast", 0, 1);
    }
    for (void *p : sixteen) mpt_free(ctx, p);
    mpt_free(ctx, dw);
}

/* The 3x3 layers of the nets below */
static void convolutions() {
    static const struct {
        const char *name;
        size_t N, side, C, K, stride;
    } layers[] = {{"16 at 32x32 64", 64, 32, 16, 16, 1},      {"16-32 at 32x32 64", 64, 32, 16, 32, 2},
                  {"32 at 16x16 64", 64, 16, 32, 32, 1},      {"64 at 8x8 64", 64, 8, 64, 64, 1},
                  {"64 at 32x32 128", 128, 32, 64, 64, 1},    {"64-128 at 32x32 128", 128, 32, 64, 128, 2},
                  {"128 at 16x16 128", 128, 16, 128, 128, 1}};
    mpt_cuda_desc desc = MPT_ZERO;
    desc.own_convolutions = 1;
    mpt_context *ctx = mpt_cuda_open(&desc);
    if (!mptc__of(ctx)->own) row("convolutions", "not on this device", 0, "-", 0, 1);
    for (const auto &z : layers) {
        mpt_conv2d_op op = MPT_ZERO;
        if (!mptc__of(ctx)->own) break;
        op.shape.N = tiny ? 1 : z.N;
        op.shape.H = op.shape.W = tiny ? 4 : z.side;
        op.shape.C = z.C;
        op.shape.K = z.K;
        op.shape.R = op.shape.S = 3;
        op.shape.stride_h = op.shape.stride_w = z.stride;
        op.shape.padding_h = op.shape.padding_w = op.shape.dilation_h = op.shape.dilation_w = op.shape.groups = 1;
        convolution(ctx, z.name, &op);
    }
    mpt_close(ctx);
}

/* ==== STEPS ==== */

typedef struct trainee {
    mpt_context *ctx;
    mpt_model *net;
    std::vector<float> x;
    std::vector<int32_t> label;
} trainee;

/* ctx NULL: of its own */
static trainee trainee_new(const mpt_cuda_desc *desc, mpt_context *ctx) {
    const int side = tiny ? 6 : 28, batch = tiny ? 4 : 64;
    mpt_train_desc train = MPT_ZERO;
    trainee t;
    t.ctx = ctx ? ctx : mpt_cuda_open(desc);
    t.net = mpt_model_new(t.ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    net_perceptron(t.net, side, 1, 2, tiny ? 16 : 512);
    train.batch = batch;
    train.clip_norm = 1;
    need("build", t.ctx, mpt_model_build(t.net, &train));
    t.x.resize((size_t)(batch * side * side));
    t.label.resize((size_t)batch);
    for (size_t i = 0; i < t.x.size(); i++) t.x[i] = mpt_uniform(1, 0, 0, i);
    for (size_t i = 0; i < t.label.size(); i++) t.label[i] = (int32_t)(i % 10);
    return t;
}

static mpt_result train(trainee *t) { return mpt_train_step(t->net, t->x.data(), t->label.data()); }

static void trainee_free(trainee *t, int close) {
    mpt_model_free(t->net);
    if (close) mpt_close(t->ctx);
}

static int recorded(const trainee *t) {
    int graphs = 0;
    for (const mptc__graph &g : mptc__of(t->ctx)->graphs) graphs += g.exec[0] && g.exec[1];
    return graphs;
}

static void host() {
    trainee t = trainee_new(NULL, NULL);
    const int steps = tiny ? 10 : 1000;
    cudaEvent_t from, to;
    float ms = 0;
    for (int i = 0; i < 5; i++) need("host", t.ctx, train(&t));
    cudaStream_t stream = mptc__of(t.ctx)->stream;
    cudaStreamSynchronize(stream);
    cudaEventCreate(&from);
    cudaEventCreate(&to);
    cudaEventRecord(from, stream);
    double calls = 0;
    for (int i = 0; i < steps; i++) { /* the queue empty, so that a call never waits for an earlier step */
        const double start = now();
        need("host", t.ctx, train(&t));
        calls += now() - start;
        if (i % 2) cudaStreamSynchronize(stream);
    }
    cudaStreamSynchronize(stream);
    cudaEventRecord(from, stream);
    for (int i = 0; i < steps; i++) need("host", t.ctx, train(&t));
    cudaEventRecord(to, stream);
    cudaEventSynchronize(to);
    cudaEventElapsedTime(&ms, from, to);
    row("host", "a step's calls", 1e6 * calls / steps, "us", 0, 1);
    row("host", "a step", 1e3 * ms / steps, "us", !tiny, 1e6 * calls / steps <= 1.05e3 * ms / steps);
    cudaEventDestroy(from);
    cudaEventDestroy(to);
    trainee_free(&t, 1);
}

static void errors() {
    trainee t = trainee_new(NULL, NULL);
    cudaStream_t other;
    cudaEvent_t event;
    void *block = NULL;
    int good = 0, unfinished = 0;
    const size_t bytes = (size_t)(tiny ? 1 : 256) << 20;
    cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking);
    cudaEventCreate(&event);
    cudaMalloc(&block, bytes);
    for (int i = 0; i < 6; i++) {
        for (int k = 0; k < 20; k++) cudaMemsetAsync(block, k, bytes, other);
        cudaEventRecord(event, other);
        unfinished += cudaEventQuery(event) == cudaErrorNotReady;
        good += train(&t) == MPT_OK;
    }
    row("errors", "steps beside an unfinished event", good, "of 6", 1, good == 6);
    row("errors", "queries that found it unfinished", unfinished, "of 6", !tiny, unfinished > 0);
    cudaStreamSynchronize(other);
    cudaFree(block);
    cudaEventDestroy(event);
    cudaStreamDestroy(other);
    trainee_free(&t, 1);
}

static void capture() {
    trainee t = trainee_new(NULL, NULL);
    std::atomic<int> stop(0);
    std::thread other([&] {
        while (!stop) {
            void *p = NULL;
            cudaMalloc(&p, 1 << 16);
            cudaFree(p);
        }
    });
    for (int i = 0; i < 4; i++) need("capture", t.ctx, train(&t));
    row("capture", "recorded beside a thread that allocates", recorded(&t), "graphs", 1, recorded(&t) == 1);
    stop = 1;
    other.join();
    trainee_free(&t, 1);
}

static std::vector<float> weights_after(int steps, int no_graph) {
    mpt_cuda_desc desc = MPT_ZERO;
    desc.no_graph = no_graph;
    trainee t = trainee_new(&desc, NULL);
    std::vector<float> weights(mpt_params_count(mpt_model_params(t.net), 0));
    for (int i = 0; i < steps; i++) {
        for (size_t k = 0; k < t.x.size(); k++) t.x[k] = mpt_uniform(2, (uint64_t)i, 0, k);
        need("bits", t.ctx, train(&t));
    }
    need("bits", t.ctx, mpt_params_get(mpt_model_params(t.net), 0, weights.data()));
    trainee_free(&t, 1);
    return weights;
}

static void bits() {
    const int steps = tiny ? 6 : 300;
    const std::vector<float> graph = weights_after(steps, 0), direct = weights_after(steps, 1);
    const std::vector<float> again = weights_after(steps, 0);
    const size_t bytes = graph.size() * sizeof(float);
    row("bits", "graph and call by call", steps, "steps", 1, memcmp(graph.data(), direct.data(), bytes) == 0);
    row("bits", "graph twice", steps, "steps", 1, memcmp(graph.data(), again.data(), bytes) == 0);
}

static void evict() {
    mpt_context *ctx = mpt_cuda_open(NULL);
    std::vector<trainee> models;
    int good = 0;
    for (int i = 0; i < MPTC__GRAPHS + 2; i++) models.push_back(trainee_new(NULL, ctx));
    for (int round = 0; round < 4; round++)
        for (trainee &t : models) good += train(&t) == MPT_OK;
    row("evict", "steps of 10 models in turns", good, "of 40", 1, good == 4 * (MPTC__GRAPHS + 2));
    for (trainee &t : models) trainee_free(&t, 0);
    mpt_close(ctx);
}

/* ==== NETS ==== */

static void wide_mlp(mpt_model *net, int side, int channels) {
    net_perceptron(net, side, channels, 3, tiny ? 64 : 4096);
}

static void resnet18(mpt_model *net, int side, int channels) {
    net_residual(net, side, channels, tiny ? 8 : 64, 4, 2);
}

static void steps() {
    static const struct {
        const char *name;
        net_layers layers;
        int side, channels, batch;
    } nets[] = {{"MLP 64", net_mlp, 28, 1, 64},
                {"LeNet 64", net_lenet, 28, 1, 64},
                {"block ResNet 64", net_resnet, 32, 3, 64},
                {"ResNet-18 128", resnet18, 32, 3, 128},
                {"wide MLP 4096", wide_mlp, 28, 1, 4096}};
    for (const auto &z : nets) {
        mpt_train_desc train = MPT_ZERO;
        const int side = tiny ? 8 : z.side, windows = tiny ? 1 : 5, each = tiny ? 1 : 50;
        train.batch = tiny ? 2 : z.batch;
        train.clip_norm = 1;
        train.optimizer = mpt_adam(1e-3);
        mpt_context *ctx = mpt_cuda_open(NULL);
        mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
        z.layers(net, side, z.channels);
        need("steps", ctx, mpt_model_build(net, &train));
        std::vector<float> x((size_t)(train.batch * side * side * z.channels));
        std::vector<int32_t> label((size_t)train.batch);
        std::vector<double> window;
        for (size_t i = 0; i < x.size(); i++) x[i] = mpt_uniform(2, 0, 0, i);
        for (size_t i = 0; i < label.size(); i++) label[i] = (int32_t)(i % 10);
        for (int i = 0; i < 3; i++) need("steps", ctx, mpt_train_step(net, x.data(), label.data()));
        for (int i = 0; i < windows; i++)
            window.push_back(seconds_of(mptc__of(ctx), each, [&] {
                need("steps", ctx, mpt_train_step(net, x.data(), label.data()));
            }));
        std::sort(window.begin(), window.end());
        row("steps", z.name, 1e6 * window[window.size() / 2], "us", 0, 1);
        mpt_model_free(net);
        mpt_close(ctx);
    }
}

int main(int count, char **arguments) {
    static const struct {
        const char *name;
        void (*run)();
    } stages[] = {{"plans", plans},     {"kernels", kernels}, {"convolutions", convolutions},
                  {"host", host},       {"errors", errors},   {"capture", capture},
                  {"bits", bits},       {"evict", evict},     {"steps", steps}};
    int named = 0;
    for (int i = 1; i < count; i++) {
        if (strcmp(arguments[i], "--tiny") == 0) tiny = 1;
        else named = 1;
    }
    for (const auto &stage : stages) {
        int wanted = !named;
        for (int i = 1; i < count; i++) wanted |= strcmp(arguments[i], stage.name) == 0;
        if (wanted) stage.run();
    }
    printf("probe: %d failed\n", failures);
    return failures != 0;
}
