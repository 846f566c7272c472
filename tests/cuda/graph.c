/* graph.c - training steps as a recorded graph and as single launches, side by side: the same bits after each, whatever
   else happens between the steps; and where a step cannot be recorded it runs all the same. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"

enum { BATCH = 6, ACCUMULATE = 2, SIDE = 6, CHANNELS = 2, CLASSES = 3, FEATURES = SIDE * SIDE * CHANNELS };

typedef struct side {
    mpt_context *ctx;
    mpt_model *net;
} side;

typedef struct pair { /* graph, single launches */
    side s[2];
} pair;

/* stream: of the recorded side; NULL: its own */
static pair open_pair(void *stream) {
    pair p;
    int i;
    for (i = 0; i < 2; i++) {
        mpt_cuda_desc desc = MPT_ZERO;
        desc.stream = i ? NULL : stream;
        desc.no_graph = i;
        p.s[i].ctx = mpt_cuda_open(&desc);
        p.s[i].net = NULL;
        CHECK(p.s[i].ctx != NULL);
    }
    return p;
}

static void close_pair(pair *p) {
    int i;
    for (i = 0; i < 2; i++) {
        mpt_model_free(p->s[i].net);
        mpt_close(p->s[i].ctx);
    }
}

/* Dropout, whose masks are named by the step; a loss on floats */
static void mlp_layers(mpt_model *net) {
    int h = mpt_input(net, SIDE, SIDE, CHANNELS);
    h = mpt_dropout(net, mpt_relu(net, mpt_linear(net, h, 24, NULL)), 0.3f);
    mpt_mse(net, mpt_linear(net, h, CLASSES, NULL), NULL);
}

/* Running statistics, a skip connection, a classifier */
static void cnn_layers(mpt_model *net) {
    int h = mpt_input(net, SIDE, SIDE, CHANNELS), skip;
    skip = h = mpt_relu(net, mpt_batch_norm(net, test_same(net, h, 8, 3), NULL));
    h = mpt_relu(net, mpt_add(net, test_same(net, h, 8, 3), skip));
    h = mpt_gelu(net, mpt_linear(net, mpt_max_pool2d(net, h, 2, NULL), 16, NULL));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
}

static void build_pair(pair *p, mpt_policy policy, void (*layers)(mpt_model *net), int accumulate) {
    mpt_train_desc train = MPT_ZERO;
    int i;
    train.batch = BATCH, train.accumulate = accumulate, train.clip_norm = 0.5;
    train.scaler.growth_interval = 3; /* overflows, and with them skipped steps, come soon in fp16 */
    train.scaler.init_scale = 4194304;
    train.optimizer = mpt_adamw(1e-2);
    train.optimizer.schedule.warmup = 5;
    for (i = 0; i < 2; i++) {
        mpt_model_free(p->s[i].net);
        p->s[i].net = mpt_model_new(p->s[i].ctx, policy);
        layers(p->s[i].net);
        CHECK_OK(p->s[i].ctx, mpt_model_build(p->s[i].net, &train));
    }
}

typedef struct data {
    float x[ACCUMULATE * BATCH * FEATURES], aim[ACCUMULATE * BATCH * CLASSES];
    int32_t label[ACCUMULATE * BATCH];
    const void *target;
} data;

static void fill(data *d, void (*layers)(mpt_model *net), int step) {
    int i;
    test_floats(d->x, sizeof d->x / sizeof *d->x, -2, 2, (uint64_t)step);
    test_floats(d->aim, sizeof d->aim / sizeof *d->aim, -1, 1, (uint64_t)step);
    for (i = 0; i < ACCUMULATE * BATCH; i++) d->label[i] = (i + step) % CLASSES;
    d->target = layers == mlp_layers ? (const void *)d->aim : (const void *)d->label;
}

/* Weights, counters, scale and loss of both sides */
static void check_same(pair *p, int step, const char *what) {
    const size_t count = mpt_params_count(mpt_model_params(p->s[0].net), 0);
    float *host = (float *)test_memory(2 * count * sizeof *host);
    mpt_optimizer_state *state = (mpt_optimizer_state *)test_memory(2 * sizeof *state);
    mpt_scaler_state scaler[2];
    double loss[2];
    int i, same;
    for (i = 0; i < 2; i++) {
        mpt_model *net = p->s[i].net;
        CHECK_OK(p->s[i].ctx, mpt_params_get(mpt_model_params(net), 0, host + (size_t)i * count));
        CHECK_OK(p->s[i].ctx, mpt_optimizer_get_state(mpt_model_optimizer(net), &state[i]));
        CHECK_OK(p->s[i].ctx, mpt_scaler_get_state(mpt_model_scaler(net), &scaler[i]));
        loss[i] = mpt_loss(net);
    }
    same = memcmp(host, host + count, count * sizeof *host) == 0 && memcmp(&state[0], &state[1], sizeof *state) == 0 &&
           memcmp(&scaler[0], &scaler[1], sizeof *scaler) == 0 && memcmp(&loss[0], &loss[1], sizeof *loss) == 0;
    if (!test_count(same, __FILE__, __LINE__, what)) printf(": step %d, losses %g and %g\n", step, loss[0], loss[1]);
    free(host);
    free(state);
}

/* What a user may do between two steps */
static void between(side *s, const data *d, int step) {
    mpt_optimizer *opt = mpt_model_optimizer(s->net);
    mpt_metrics metrics;
    float *big;
    if (step == 3) CHECK_OK(s->ctx, mpt_optimizer_set_lr(opt, 3e-3));
    if (step == 5) CHECK_OK(s->ctx, mpt_optimizer_group(opt, MPT_GROUP_BIAS, 2, 0));
    if (step == 6) CHECK_OK(s->ctx, mpt_scaler_set_scale(mpt_model_scaler(s->net), 1024));
    if (step == 7) CHECK_OK(s->ctx, mpt_evaluate(s->net, d->x, d->target, BATCH + 1, &metrics));
    if (step == 8) { /* a backward pass that no step follows */
        CHECK_OK(s->ctx, mpt_forward(s->net, d->x, d->target, BATCH - 1));
        CHECK_OK(s->ctx, mpt_backward(s->net));
    }
    if (step == 9) { /* the scratch block moves */
        mpt_gemm_op op = MPT_ZERO;
        big = (float *)mpt_alloc(s->ctx, 40002 * sizeof *big);
        op.trans_a = 1;
        op.m = op.n = 1;
        op.k = 40000;
        op.a = op.b = mpt_f32_array(big);
        op.c = mpt_f32_array(big + 40000);
        op.a_sums = mpt_f32_array(big + 40001);
        CHECK_OK(s->ctx, mpt_op_gemm(s->ctx, &op));
        mpt_free(s->ctx, big);
    }
    if (step == 10) CHECK_ERROR(s->ctx, mpt_train_step(s->net, d->x, NULL), MPT_ERROR_ARGUMENT, "target");
    if (step == 11) { /* a step in parts */
        CHECK_OK(s->ctx, mpt_forward(s->net, d->x, d->target, BATCH));
        CHECK_OK(s->ctx, mpt_backward(s->net));
        CHECK_OK(s->ctx, mpt_step(opt));
        CHECK_OK(s->ctx, mpt_scaler_update(mpt_model_scaler(s->net)));
    }
}

static void run(pair *p, void (*layers)(mpt_model *net), int steps, const char *what) {
    static data d;
    int step, i;
    for (step = 1; step <= steps; step++) {
        fill(&d, layers, step);
        for (i = 0; i < 2; i++) {
            CHECK_OK(p->s[i].ctx, mpt_train_step(p->s[i].net, d.x, d.target));
            between(&p->s[i], &d, step);
        }
        check_same(p, step, what);
    }
}

static void test_policy(mpt_policy policy, void (*layers)(mpt_model *net), int accumulate, const char *what) {
    pair p = open_pair(NULL);
    build_pair(&p, policy, layers, accumulate);
    run(&p, layers, 14, what);
    build_pair(&p, policy, layers, accumulate); /* likely at the same addresses */
    run(&p, layers, 3, what);
    close_pair(&p);
}

/* Two models take turns on one context. */
static void test_turns(void) {
    pair p = open_pair(NULL), q;
    static data d;
    int step, i;
    build_pair(&p, mpt_policy_preset(MPT_O2, MPT_BF16), cnn_layers, 1);
    q = p, q.s[0].net = q.s[1].net = NULL;
    build_pair(&q, mpt_policy_preset(MPT_O2, MPT_F16), mlp_layers, 2);
    for (step = 1; step <= 6; step++)
        for (i = 0; i < 2; i++) {
            fill(&d, cnn_layers, step);
            CHECK_OK(p.s[i].ctx, mpt_train_step(p.s[i].net, d.x, d.target));
            fill(&d, mlp_layers, step);
            CHECK_OK(q.s[i].ctx, mpt_train_step(q.s[i].net, d.x, d.target));
        }
    check_same(&p, step, "first of two");
    check_same(&q, step, "second of two");
    for (i = 0; i < 2; i++) mpt_model_free(q.s[i].net);
    close_pair(&p);
}

/* Another optimizer on the model's scaler: its inf makes the scale back off, whether it steps or not. */
static void test_shared_scaler(void) {
    pair p = open_pair(NULL);
    mpt_params *params[2];
    mpt_optimizer *opt[2];
    static data d;
    int step, i;
    build_pair(&p, mpt_policy_preset(MPT_O2, MPT_F16), cnn_layers, 1);
    for (i = 0; i < 2; i++) {
        params[i] = mpt_params_new(p.s[i].ctx, NULL);
        mpt_params_add(params[i], "w", 5, 0);
        CHECK_OK(p.s[i].ctx, mpt_params_build(params[i]));
        opt[i] = NULL;
    }
    for (step = 1; step <= 8; step++) {
        fill(&d, cnn_layers, step);
        for (i = 0; i < 2; i++) {
            const float inf = test_float(0x7f800000u);
            if (step == 5) opt[i] = mpt_optimizer_new(params[i], mpt_model_scaler(p.s[i].net), NULL);
            if (step == 6)
                CHECK_OK(p.s[i].ctx, mpt_upload(p.s[i].ctx, mpt_params_grad(params[i], 1), &inf, sizeof inf));
            if (step == 6) CHECK_OK(p.s[i].ctx, mpt_step(opt[i]));
            CHECK_OK(p.s[i].ctx, mpt_train_step(p.s[i].net, d.x, d.target));
        }
        check_same(&p, step, "shared scaler");
    }
    for (i = 0; i < 2; i++) {
        mpt_optimizer_free(opt[i]);
        mpt_params_free(params[i]);
    }
    close_pair(&p);
}

/* Diverging is told while steps are recorded, too: at the step itself or, the device being late, at a later one. */
static void test_diverged(void) {
    mpt_context *ctx = mpt_cuda_open(NULL);
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    mpt_train_desc train = MPT_ZERO;
    static data d;
    mpt_result r = MPT_OK;
    int step;
    train.batch = BATCH, train.scaler.patience = 2, train.scaler.init_scale = 16777216,
    train.scaler.min_scale = 4194304;
    mlp_layers(net);
    CHECK_OK(ctx, mpt_model_build(net, &train));
    fill(&d, mlp_layers, 1);
    for (step = 0; step < BATCH * FEATURES; step++) d.x[step] *= 1e30f; /* inf in fp16 */
    for (step = 1; step <= 8 && r == MPT_OK; step++) r = mpt_train_step(net, d.x, d.target);
    CHECK(r == MPT_ERROR_DIVERGED && test_has_word(mpt_why(ctx), "linear1"));
    CHECK(step >= 5 && step <= 9); /* four steps may be on their way */
    CHECK_EQUAL(mpt_steps_skipped(net), step - 1);
    mpt_model_free(net);
    mpt_close(ctx);
}

/* A thread that records a stream of its own may upload to another one meanwhile. */
static void test_foreign_recording(void) {
    mpt_context *ctx = mpt_cuda_open(NULL);
    float host[64] = {0}, *x = (float *)mpt_alloc(ctx, sizeof host);
    cudaStream_t stream = NULL;
    cudaGraph_t graph = NULL;
    int i;
    CHECK_OK(ctx, mpt_upload(ctx, x, host, sizeof host));
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
    for (i = 0; i < 5; i++) CHECK_OK(ctx, mpt_upload(ctx, x, host, sizeof host));
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess && graph != NULL);
    CHECK(cudaGraphDestroy(graph) == cudaSuccess && cudaStreamDestroy(stream) == cudaSuccess);
    mpt_free(ctx, x);
    mpt_close(ctx);
}

int main(void) {
    pair p = open_pair(cudaStreamLegacy); /* nobody can record on it */
    build_pair(&p, mpt_policy_preset(MPT_O2, MPT_F16), mlp_layers, 2);
    run(&p, mlp_layers, 4, "default stream");
    close_pair(&p);
    test_policy(mpt_policy_preset(MPT_O0, MPT_F16), mlp_layers, 1, "f32 mlp");
    test_policy(mpt_policy_preset(MPT_O2, MPT_F16), mlp_layers, 2, "f16 mlp");
    test_policy(mpt_policy_preset(MPT_O1, MPT_F16), cnn_layers, 1, "f16 cnn, O1");
    test_policy(mpt_policy_preset(MPT_O2, MPT_BF16), cnn_layers, 2, "bf16 cnn");
    test_turns();
    test_shared_scaler();
    test_diverged();
    test_foreign_recording();
    return test_finish("cuda/graph");
}
