/* open.c - a model's open ends: losses of one's own, several heads, values and gradients of nodes. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"

enum { BATCH = 6, SIDE = 5, CHANNELS = 2, PIXELS = SIDE * SIDE * CHANNELS, OUTPUTS = 3 };

typedef struct problem { /* inputs and targets of some batches */
    float x[4 * BATCH * PIXELS], target[4 * BATCH * OUTPUTS];
    int32_t label[4 * BATCH];
} problem;

static problem problem_new(void) {
    problem p;
    int i;
    test_floats(p.x, 4 * BATCH * PIXELS, -1, 1, 1);
    test_floats(p.target, 4 * BATCH * OUTPUTS, -1, 1, 2);
    for (i = 0; i < 4 * BATCH; i++) p.label[i] = (int32_t)(mpt_hash(3, 0, 0, (uint64_t)i) % OUTPUTS);
    return p;
}

/* Convolution, batch norm, tanh, pooling, linear: smooth, so that differences tell its gradient. */
static int body(mpt_model *net) {
    int h = mpt_input(net, SIDE, SIDE, CHANNELS);
    h = mpt_tanh(net, test_same(net, h, 4, 3));
    h = mpt_group_norm(net, h, 2, NULL);
    h = mpt_avg_pool2d(net, h, 2, NULL);
    return mpt_linear(net, h, OUTPUTS, NULL);
}

static mpt_train_desc training(int accumulate) {
    mpt_train_desc train = MPT_ZERO;
    train.batch = BATCH;
    train.accumulate = accumulate;
    train.optimizer = mpt_sgd(0.1, 0.9);
    train.seed = 7;
    return train;
}

static void finish_step(mpt_context *ctx, mpt_model *net) {
    CHECK_OK(ctx, mpt_unscale(mpt_model_optimizer(net)));
    CHECK_OK(ctx, mpt_step(mpt_model_optimizer(net)));
    CHECK_OK(ctx, mpt_scaler_update(mpt_model_scaler(net)));
}

/* Forward, gradient of the mean squared error by hand, backward. Returns that error. */
static double own_pass(mpt_context *ctx, mpt_model *net, int head, const float *x, const float *target) {
    float y[BATCH * OUTPUTS], grad[BATCH * OUTPUTS];
    double loss = 0;
    int i;
    CHECK_OK(ctx, mpt_forward(net, x, NULL, BATCH));
    CHECK_OK(ctx, mpt_node_value(net, head, y));
    for (i = 0; i < BATCH * OUTPUTS; i++) {
        const double d = (double)y[i] - (double)target[i];
        loss += d * d / (BATCH * OUTPUTS);
        grad[i] = (float)(2 * d / (BATCH * OUTPUTS));
    }
    CHECK_OK(ctx, mpt_output_grad(net, head, grad));
    CHECK_OK(ctx, mpt_backward(net));
    return loss;
}

/* A model whose loss is computed by hand takes the steps of one that has it as a node. Each gradient at the logits is
   rounded once more on the way, so a weight that has moved by d in all may be off by the type's epsilon times d for
   each of the steps, which a momentum of 0.9 repeats ten times. */
static void test_own_loss(mpt_context *ctx, mpt_policy policy, int accumulate) {
    enum { STEPS = 5 };
    const problem p = problem_new();
    const mpt_train_desc train = training(accumulate);
    mpt_model *own = mpt_model_new(ctx, policy), *node = mpt_model_new(ctx, policy);
    const int head = body(own);
    const double unit = policy.compute == MPT_F32   ? 1.0 / (1 << 23)
                        : policy.compute == MPT_F16 ? 1.0 / 1024
                                                    : 1.0 / 128;
    size_t count, i;
    float *start, *a, *b;
    double moved = 0, off = 0;
    int step, pass;
    mpt_mse(node, body(node), NULL);
    CHECK_OK(ctx, mpt_model_build(own, &train));
    CHECK_OK(ctx, mpt_model_build(node, &train));
    start = test_params(ctx, own, &count);
    for (step = 0; step < STEPS; step++) {
        double loss = 0;
        for (pass = 0; pass < accumulate; pass++)
            loss +=
                own_pass(ctx, own, head, p.x + pass * BATCH * PIXELS, p.target + pass * BATCH * OUTPUTS) / accumulate;
        finish_step(ctx, own);
        CHECK_OK(ctx, mpt_train_step(node, p.x, p.target));
        CHECK_NEAR(loss, mpt_loss(node), 64 * unit * (1 + loss));
    }
    CHECK_EQUAL((double)mpt_steps_applied(own), STEPS);
    a = test_params(ctx, own, &count);
    b = test_params(ctx, node, &count);
    for (i = 0; i < count; i++) {
        moved = fmax(moved, fabs((double)a[i] - (double)start[i]));
        off = fmax(off, fabs((double)a[i] - (double)b[i]));
    }
    CHECK(moved > 0.01);
    CHECK_NEAR(off, 0, moved * unit * 10 * (double)STEPS);
    free(start);
    free(a);
    free(b);
    mpt_model_free(own);
    mpt_model_free(node);
}

/* Two heads that share a body: the gradient is that of the sum of their losses, and every head needs one. */
static void test_heads(mpt_context *ctx) {
    const problem p = problem_new();
    const mpt_train_desc train = training(1);
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16)),
              *one = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
    float ones[BATCH * OUTPUTS], zeros[BATCH * OUTPUTS], *both, *single;
    int in, shared, a, b, i, head;
    size_t count, all;
    for (i = 0; i < BATCH * OUTPUTS; i++) {
        ones[i] = 1;
        zeros[i] = 0;
    }
    in = mpt_input(net, 1, 1, PIXELS);
    shared = mpt_tanh(net, mpt_linear(net, in, 8, NULL));
    a = mpt_linear(net, shared, OUTPUTS, NULL);
    b = mpt_linear(net, shared, 2, NULL);
    CHECK_OK(ctx, mpt_model_build(net, &train));
    head = mpt_linear(one, mpt_tanh(one, mpt_linear(one, mpt_input(one, 1, 1, PIXELS), 8, NULL)), OUTPUTS, NULL);
    CHECK_OK(ctx, mpt_model_build(one, &train));
    CHECK_EQUAL((double)mpt_model_outputs(net), 2); /* the last head */
    CHECK_OK(ctx, mpt_forward(net, p.x, NULL, BATCH));
    CHECK_OK(ctx, mpt_output_grad(net, a, ones));
    CHECK_ERROR(ctx, mpt_backward(net), MPT_ERROR_ORDER, "linear3");
    CHECK_OK(ctx, mpt_output_grad(net, b, zeros));
    CHECK_OK(ctx, mpt_backward(net));
    CHECK_OK(ctx, mpt_forward(one, p.x, NULL, BATCH));
    CHECK_OK(ctx, mpt_output_grad(one, head, ones));
    CHECK_OK(ctx, mpt_backward(one));
    all = mpt_params_count(mpt_model_params(net), 1);
    both = (float *)test_memory(all * sizeof *both);
    single = (float *)test_memory(all * sizeof *single);
    count = mpt_params_count(mpt_model_params(one), 1);
    CHECK(count == all);
    CHECK_OK(ctx, mpt_download(ctx, both, mpt_params_grad(mpt_model_params(net), 1), all * sizeof *both));
    CHECK_OK(ctx, mpt_download(ctx, single, mpt_params_grad(mpt_model_params(one), 1), all * sizeof *single));
    CHECK(memcmp(both, single, all * sizeof *both) == 0); /* a gradient of 0 at the other head adds nothing */
    free(both);
    free(single);
    mpt_model_free(net);
    mpt_model_free(one);
}

/* dloss/dinput and dloss/dvalue of a node between, against central differences of the loss: its third derivative is of
   the order of 1, and it is known to 2^-22. */
static void test_gradients(mpt_context *ctx) {
    const problem p = problem_new();
    const mpt_train_desc train = training(1);
    const double h = 1.0 / 64, bound = h * h + ldexp(1, -22) / h;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
    float grad[BATCH * PIXELS], logits[BATCH * OUTPUTS], x[BATCH * PIXELS];
    double sum = 0;
    const int head = body(net);
    int i, c;
    CHECK_EQUAL(mpt_keep(net, 1), 1);
    CHECK_EQUAL(mpt_keep(net, head), head);
    mpt_softmax_cross_entropy(net, head, NULL);
    CHECK_OK(ctx, mpt_model_build(net, &train));
    CHECK_ERROR(ctx, mpt_node_value(net, 1, x), MPT_ERROR_ORDER, "forward");
    CHECK_OK(ctx, mpt_forward(net, p.x, p.label, BATCH));
    CHECK_ERROR(ctx, mpt_node_grad(net, 1, grad), MPT_ERROR_ORDER, "backward");
    CHECK_OK(ctx, mpt_backward(net));
    CHECK_OK(ctx, mpt_node_value(net, 1, x));
    CHECK(memcmp(x, p.x, sizeof x) == 0);
    CHECK_OK(ctx, mpt_node_grad(net, 1, grad));
    CHECK_OK(ctx, mpt_node_grad(net, head, logits));
    for (i = 0; i < BATCH; i++) /* softmax - label: sums to 0 */
        for (c = 0, sum = 0; c < OUTPUTS; c++) {
            sum += (double)logits[i * OUTPUTS + c];
            CHECK(c + 1 < OUTPUTS || fabs(sum) < 8 * ldexp(1, -23));
            CHECK((logits[i * OUTPUTS + c] < 0) == (p.label[i] == c));
        }
    CHECK_OK(ctx, mpt_zero_grad(net));
    for (i = 0; i < BATCH * PIXELS; i += 7) {
        mpt_metrics up, down;
        x[i] = p.x[i] + (float)h;
        CHECK_OK(ctx, mpt_evaluate(net, x, p.label, BATCH, &up));
        x[i] = p.x[i] - (float)h;
        CHECK_OK(ctx, mpt_evaluate(net, x, p.label, BATCH, &down));
        x[i] = p.x[i];
        CHECK_NEAR((double)grad[i], (up.loss - down.loss) / (2 * h), bound);
    }
    mpt_model_free(net);
}

/* What keep costs is memory alone: in fp32, where no value between is rounded, the steps are the same by the bit. */
static void test_keep_changes_nothing(mpt_context *ctx) {
    const mpt_policy policy = mpt_policy_preset(MPT_O0, MPT_F16);
    const problem p = problem_new();
    const mpt_train_desc train = training(1);
    mpt_model *net[2];
    float *w[2], value[BATCH * SIDE * SIDE * 4];
    size_t count = 0;
    int i, step, id;
    for (i = 0; i < 2; i++) {
        int h = mpt_input((net[i] = mpt_model_new(ctx, policy)), SIDE, SIDE, CHANNELS), a;
        a = mpt_relu(net[i], mpt_batch_norm(net[i], test_same(net[i], h, 4, 3), NULL));
        h = mpt_batch_norm(net[i], test_same(net[i], a, 4, 3), NULL);
        h = mpt_max_pool2d(net[i], mpt_relu(net[i], mpt_add(net[i], a, h)), 2, NULL);
        h = mpt_linear(net[i], mpt_flatten(net[i], h), OUTPUTS, NULL);
        for (id = 1; i && id <= h; id++) CHECK_EQUAL(mpt_keep(net[i], id), id);
        mpt_softmax_cross_entropy(net[i], h, NULL);
        CHECK_OK(ctx, mpt_model_build(net[i], &train));
        for (step = 0; step < 4; step++) {
            CHECK_OK(ctx, mpt_forward(net[i], p.x, p.label, BATCH));
            CHECK_OK(ctx, mpt_backward(net[i]));
            if (i) CHECK_OK(ctx, mpt_node_value(net[i], 4, value));
            if (i) CHECK_OK(ctx, mpt_node_grad(net[i], 4, value));
            finish_step(ctx, net[i]);
        }
        w[i] = test_params(ctx, net[i], &count);
    }
    CHECK(memcmp(w[0], w[1], count * sizeof *w[0]) == 0);
    for (i = 0; i < 2; i++) {
        free(w[i]);
        mpt_model_free(net[i]);
    }
}

static void test_open_errors(mpt_context *ctx) {
    const problem p = problem_new();
    const mpt_train_desc train = training(1);
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_BF16));
    float grad[BATCH * OUTPUTS] = {0};
    mpt_metrics m;
    const int head = body(net);
    CHECK_ERROR(ctx, mpt_node_value(net, head, grad), MPT_ERROR_ORDER, "built");
    CHECK_OK(ctx, mpt_model_build(net, &train));
    CHECK_ERROR(ctx, mpt_train_step(net, p.x, p.target), MPT_ERROR_ORDER, "loss");
    CHECK_ERROR(ctx, mpt_evaluate(net, p.x, p.target, BATCH, &m), MPT_ERROR_ORDER, "loss");
    CHECK_ERROR(ctx, mpt_forward(net, p.x, p.target, BATCH), MPT_ERROR_ARGUMENT, "target");
    CHECK_ERROR(ctx, mpt_output_grad(net, head, grad), MPT_ERROR_ORDER, "forward");
    CHECK_OK(ctx, mpt_forward(net, p.x, NULL, BATCH));
    CHECK_ERROR(ctx, mpt_backward(net), MPT_ERROR_ORDER, "mpt_output_grad");
    CHECK_ERROR(ctx, mpt_output_grad(net, head - 1, grad), MPT_ERROR_ARGUMENT, "head");
    CHECK_ERROR(ctx, mpt_output_grad(net, head, NULL), MPT_ERROR_ARGUMENT, "NULL");
    CHECK_ERROR(ctx, mpt_node_value(net, 2, grad), MPT_ERROR_ORDER, "kept");
    CHECK_ERROR(ctx, mpt_node_value(net, 99, grad), MPT_ERROR_ARGUMENT, "99");
    grad[4] = test_float(0x7f800000u);
    CHECK_ERROR(ctx, mpt_output_grad(net, head, grad), MPT_ERROR_VALUE, "sample 1, element 1");
    grad[4] = 0;
    CHECK_OK(ctx, mpt_output_grad(net, head, grad));
    CHECK_OK(ctx, mpt_backward(net));
    finish_step(ctx, net);
    CHECK_EQUAL((double)mpt_steps_applied(net), 1);
    CHECK_OK(ctx, mpt_predict(net, p.x, 3, grad));
    CHECK_EQUAL(mpt_keep(net, 1), 0);
    CHECK(mpt_keep(NULL, 1) == 0);
    mpt_model_free(net);
}

/* -- Freezing, rates by layer, inference -- */

enum { LAYERS = 4 };

/* Four layers with batch norms, of which the first `frozen` are frozen. Returns the logits. */
static int tower(mpt_model *net, int frozen, const mpt_tuning *top) {
    mpt_conv2d_desc conv = MPT_ZERO;
    mpt_norm_desc norm = MPT_ZERO;
    mpt_linear_desc linear = MPT_ZERO;
    int h = mpt_input(net, SIDE, SIDE, CHANNELS), i;
    conv.same = 1;
    for (i = 0; i < LAYERS - 1; i++) {
        conv.tuning.frozen = norm.tuning.frozen = i < frozen;
        h = mpt_conv2d(net, h, 6, 3, &conv);
        h = mpt_relu(net, i == 1 ? mpt_group_norm(net, h, 2, &norm) : h);
    }
    linear.tuning.frozen = frozen == LAYERS;
    if (top) linear.tuning = *top;
    return mpt_linear(net, h, OUTPUTS, &linear);
}

/* Frozen layers keep their bits, and those above take the steps that they take over layers whose rate is 0. */
static void test_frozen(mpt_context *ctx, mpt_policy policy, int frozen) {
    const problem p = problem_new();
    const mpt_train_desc train = training(1);
    mpt_model *net = mpt_model_new(ctx, policy), *slow = mpt_model_new(ctx, policy);
    mpt_params *a, *b;
    mpt_memory m, whole;
    size_t elements = 0;
    int t, step;
    mpt_softmax_cross_entropy(net, tower(net, frozen, NULL), NULL);
    mpt_softmax_cross_entropy(slow, tower(slow, 0, NULL), NULL);
    CHECK_OK(ctx, mpt_model_build(net, &train));
    CHECK_OK(ctx, mpt_model_build(slow, &train));
    a = mpt_model_params(net);
    b = mpt_model_params(slow);
    for (t = 1; t <= mpt_params_tensors(a); t++) {
        const int there = mpt_params_find(b, mpt_params_name(a, t));
        float *w = (float *)test_memory(mpt_params_count(a, t) * sizeof *w);
        CHECK(there > 0);
        CHECK_OK(ctx, mpt_params_get(a, t, w)); /* initial weights are named by their tensor, whose id differs */
        CHECK_OK(ctx, mpt_params_set(b, there, w));
        if (!mpt_params_grad(a, t)) CHECK_OK(ctx, mpt_optimizer_tensor(mpt_model_optimizer(slow), there, 0, 0));
        else elements += (mpt_params_count(a, t) + 15) / 16 * 16;
        free(w);
    }
    for (step = 0; step < 6; step++) {
        CHECK_OK(ctx, mpt_train_step(net, p.x + step % 4 * BATCH * PIXELS, p.label + step % 4 * BATCH));
        CHECK_OK(ctx, mpt_train_step(slow, p.x + step % 4 * BATCH * PIXELS, p.label + step % 4 * BATCH));
    }
    for (t = 1; t <= mpt_params_tensors(a); t++) {
        const size_t count = mpt_params_count(a, t);
        float *w = (float *)test_memory(count * sizeof *w), *v = (float *)test_memory(count * sizeof *v);
        CHECK_OK(ctx, mpt_params_get(a, t, w));
        CHECK_OK(ctx, mpt_params_get(b, mpt_params_find(b, mpt_params_name(a, t)), v));
        CHECK(memcmp(w, v, count * sizeof *w) == 0);
        free(w);
        free(v);
    }
    m = mpt_model_memory(net);
    whole = mpt_model_memory(slow);
    CHECK_EQUAL((double)m.gradients, (double)elements * 4);
    CHECK_EQUAL((double)m.moments, (double)elements * 4);
    CHECK(frozen ? m.activations < whole.activations
                 : m.activations == whole.activations); /* no gradients below the lowest layer that trains */
    mpt_model_free(net);
    mpt_model_free(slow);
}

/* The factors of a descriptor are those of mpt_optimizer_tensor. */
static void test_rates(mpt_context *ctx) {
    const problem p = problem_new();
    mpt_train_desc train = training(1);
    mpt_tuning tuning = MPT_ZERO;
    mpt_model *net[3];
    float *w[3];
    size_t count = 0;
    int i, step;
    train.optimizer.weight_decay = 0.01;
    tuning.lr_factor = 0.25;
    tuning.weight_decay_factor = -1;
    for (i = 0; i < 3; i++) { /* by descriptor, by call, not at all */
        net[i] = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
        mpt_softmax_cross_entropy(net[i], tower(net[i], 0, i ? NULL : &tuning), NULL);
        CHECK_OK(ctx, mpt_model_build(net[i], &train));
        if (i == 1) {
            mpt_params *params = mpt_model_params(net[i]);
            mpt_optimizer *opt = mpt_model_optimizer(net[i]);
            CHECK_OK(ctx, mpt_optimizer_tensor(opt, mpt_params_find(params, "linear1.weight"), 0.25, 0));
            CHECK_OK(ctx, mpt_optimizer_tensor(opt, mpt_params_find(params, "linear1.bias"), 0.25, 0));
            CHECK_ERROR(ctx, mpt_optimizer_tensor(opt, 0, 1, 0), MPT_ERROR_ARGUMENT, "tensor");
            CHECK_ERROR(ctx, mpt_optimizer_tensor(opt, 1, -1, 0), MPT_ERROR_ARGUMENT, "lr_factor");
            CHECK_EQUAL(mpt_params_find(params, "linear1"), 0);
            CHECK_EQUAL(mpt_params_find(NULL, "x") + mpt_params_find(params, NULL), 0);
        }
        for (step = 0; step < 3; step++) CHECK_OK(ctx, mpt_train_step(net[i], p.x, p.label));
        w[i] = test_params(ctx, net[i], &count);
    }
    CHECK(memcmp(w[0], w[1], count * sizeof *w[0]) == 0);
    CHECK(memcmp(w[0], w[2], count * sizeof *w[0]) != 0);
    for (i = 0; i < 3; i++) {
        free(w[i]);
        mpt_model_free(net[i]);
    }
}

/* A frozen batch norm normalises by its running statistics and leaves them alone; dx = dy gamma / deviation. */
static void test_frozen_batch_norm(mpt_context *ctx) {
    const problem p = problem_new();
    const mpt_train_desc train = training(1);
    const float statistics[2 * CHANNELS] = {0.25f, -0.5f, 4, 0.25f};
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
    mpt_norm_desc norm = MPT_ZERO;
    float value[BATCH * PIXELS], dy[BATCH * PIXELS], dx[BATCH * PIXELS], after[2 * CHANNELS];
    int in, h, i;
    norm.tuning.frozen = 1;
    in = mpt_keep(net, mpt_input(net, SIDE, SIDE, CHANNELS));
    h = mpt_keep(net, mpt_batch_norm(net, in, &norm));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, OUTPUTS, NULL), NULL);
    CHECK_OK(ctx, mpt_model_build(net, &train));
    CHECK_OK(ctx, mpt_model_set_running(net, h, statistics));
    CHECK_OK(ctx, mpt_forward(net, p.x, p.label, BATCH));
    CHECK_OK(ctx, mpt_backward(net));
    CHECK_OK(ctx, mpt_node_value(net, h, value));
    CHECK_OK(ctx, mpt_node_grad(net, h, dy));
    CHECK_OK(ctx, mpt_node_grad(net, in, dx));
    for (i = 0; i < BATCH * PIXELS; i++) {
        const int c = i % CHANNELS;
        const double deviation = sqrt((double)statistics[CHANNELS + c] + 1e-5);
        const double y = ((double)p.x[i] - (double)statistics[c]) / deviation;
        CHECK_NEAR((double)value[i], y, test_bound(4, fabs(y), y, MPT_F32));
        CHECK_NEAR((double)dx[i], (double)dy[i] / deviation,
                   test_bound(4, fabs((double)dx[i]), (double)dx[i], MPT_F32));
    }
    finish_step(ctx, net);
    CHECK_OK(ctx, mpt_download(ctx, after, mpt_model_running(net, h), sizeof after));
    CHECK(memcmp(after, statistics, sizeof after) == 0);
    mpt_model_free(net);
}

/* A model for inference predicts what the trained one does, from its file, in the bytes that the report names. */
static void test_inference(mpt_level level, mpt_dtype type) {
    test_counter counter;
    const mpt_context_desc desc = test_counting(&counter, 1);
    mpt_context *ctx = test_open(&desc);
    const problem p = problem_new();
    mpt_train_desc train = training(1), inference = training(1);
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(level, type)), *lean;
    float a[BATCH * OUTPUTS], b[BATCH * OUTPUTS];
    const int host = strcmp(mpt_device_name(ctx), "cpu") == 0;
    size_t size = 0, before;
    mpt_memory m, full;
    mpt_metrics metrics;
    void *file;
    int i;
    inference.inference = 1;
    mpt_softmax_cross_entropy(net, tower(net, 0, NULL), NULL);
    CHECK_OK(ctx, mpt_model_build(net, &train));
    for (i = 0; i < 3; i++) CHECK_OK(ctx, mpt_train_step(net, p.x, p.label));
    CHECK_OK(ctx, mpt_weights_save_memory(net, NULL, 0, &size, MPT_F32));
    file = test_memory(size);
    CHECK_OK(ctx, mpt_weights_save_memory(net, file, size, &size, MPT_F32));
    before = counter.bytes;
    lean = mpt_model_new(ctx, mpt_policy_preset(level, type));
    mpt_softmax_cross_entropy(lean, tower(lean, 0, NULL), NULL);
    CHECK_OK(ctx, mpt_model_build(lean, &inference));
    CHECK_OK(ctx, mpt_weights_load_memory(lean, file, size, NULL));
    CHECK_OK(ctx, mpt_predict(net, p.x, BATCH, a));
    CHECK_OK(ctx, mpt_predict(lean, p.x, BATCH, b));
    for (i = 0; i < BATCH * OUTPUTS; i++) /* gamma and beta are rounded once */
        CHECK_NEAR((double)b[i], (double)a[i], level == MPT_O2 ? 8 * test_unit(type) * (1 + fabs((double)a[i])) : 0);
    CHECK_OK(ctx, mpt_evaluate(lean, p.x, p.label, BATCH, &metrics));
    m = mpt_model_memory(lean);
    full = mpt_model_memory(net);
    CHECK_EQUAL((double)(m.masters + m.gradients + m.moments), 0);
    CHECK_EQUAL((double)m.weights, (double)full.weights);
    CHECK(m.activations * 2 < full.activations);
    if (host)
        CHECK_EQUAL((double)(m.weights + m.activations + m.workspace + m.bookkeeping),
                    (double)(counter.bytes - before));
    CHECK_ERROR(ctx, mpt_train_step(lean, p.x, p.label), MPT_ERROR_ORDER, "inference");
    CHECK_ERROR(ctx, mpt_forward(lean, p.x, p.label, BATCH), MPT_ERROR_ORDER, "inference");
    CHECK_ERROR(ctx, mpt_unscale(mpt_model_optimizer(lean)), MPT_ERROR_ORDER, "frozen");
    CHECK_ERROR(ctx, mpt_checkpoint_save_memory(lean, NULL, 0, &size), MPT_ERROR_ORDER, "inference");
    free(file);
    mpt_model_free(net);
    mpt_model_free(lean);
    mpt_close(ctx);
    CHECK(test_counter_clean(&counter));
}

/* Frozen tensors start from the same values: weights by their fan, biases by theirs. */
static void test_frozen_start(mpt_context *ctx) {
    const mpt_train_desc train = training(1);
    mpt_model *net[2];
    float *w[2];
    size_t count = 0;
    int i;
    for (i = 0; i < 2; i++) {
        net[i] = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
        mpt_mse(net[i], tower(net[i], i * LAYERS, NULL), NULL);
        CHECK_OK(ctx, mpt_model_build(net[i], &train));
        w[i] = test_params(ctx, net[i], &count);
    }
    CHECK(memcmp(w[0], w[1], count * sizeof *w[0]) == 0);
    for (i = 0; i < 2; i++) {
        free(w[i]);
        mpt_model_free(net[i]);
    }
}

static void test_frozen_errors(mpt_context *ctx) {
    const problem p = problem_new();
    mpt_params *params = mpt_params_new(ctx, NULL);
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
    size_t size = 0;
    void *file;
    CHECK_EQUAL(mpt_params_add(params, "a", 3, MPT_GROUP_FROZEN | MPT_GROUP_WEIGHT), 1);
    CHECK_EQUAL(mpt_params_add(params, "b", 3, MPT_GROUP_WEIGHT), 0);
    test_check_reason(ctx, "frozen", __FILE__, __LINE__);
    mpt_params_free(params);
    mpt_softmax_cross_entropy(net, tower(net, LAYERS, NULL), NULL);
    CHECK_OK(ctx, mpt_model_build(net, NULL));
    CHECK_ERROR(ctx, mpt_train_step(net, p.x, p.label), MPT_ERROR_ORDER, "frozen");
    CHECK_OK(ctx, mpt_checkpoint_save_memory(net, NULL, 0, &size)); /* it has no moments, and goes both ways */
    file = test_memory(size);
    CHECK_OK(ctx, mpt_checkpoint_save_memory(net, file, size, &size));
    CHECK_OK(ctx, mpt_checkpoint_load_memory(net, file, size));
    free(file);
    mpt_model_free(net);
}

/* -- A layer of one's own: PReLU (He et al. 2015), y = x, or a x below 0, with one a for each channel -- */

typedef struct prelu {
    size_t C;
    int fails;               /* 1: forward returns an error */
    int forwards, backwards; /* calls */
} prelu;

static float read_value(mpt_array a, size_t i) {
    if (a.type == MPT_F32) return ((const float *)a.data)[i];
    return mpt_widen(((const uint16_t *)a.data)[i], a.type);
}

static void write_value(mpt_array a, size_t i, float x) {
    if (a.type == MPT_F32) ((float *)a.data)[i] = x;
    else ((uint16_t *)a.data)[i] = (uint16_t)mpt_narrow(x, a.type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0);
}

static mpt_result prelu_forward(const mpt_layer_pass *p) {
    prelu *me = (prelu *)p->user;
    size_t i;
    me->forwards++;
    if (me->fails) return mpt_fail(p->ctx, MPT_ERROR_VALUE, "prelu: told to fail");
    for (i = 0; i < p->N * PIXELS; i++) {
        const float x = read_value(p->x, i);
        write_value(p->y, i, x < 0 ? read_value(p->weight, i % me->C) * x : x);
    }
    return MPT_OK;
}

static mpt_result prelu_backward(const mpt_layer_pass *p) {
    prelu *me = (prelu *)p->user;
    size_t i, c;
    me->backwards++;
    for (c = 0; p->dweight && c < me->C; c++) {
        double sum = p->beta == 0 ? 0 : (double)p->beta * (double)p->dweight[c];
        for (i = c; i < p->N * PIXELS; i += me->C)
            if (read_value(p->x, i) < 0) sum += (double)read_value(p->x, i) * (double)read_value(p->dy, i);
        p->dweight[c] = (float)sum;
    }
    for (i = 0; p->dx.data && i < p->N * PIXELS; i++) {
        const float slope = read_value(p->x, i) < 0 ? read_value(p->weight, i % me->C) : 1;
        const float old = p->beta_x == 0 ? 0 : p->beta_x * read_value(p->dx, i);
        write_value(p->dx, i, slope * read_value(p->dy, i) + old);
    }
    return MPT_OK;
}

static const float slopes[CHANNELS] = {0.25f, 0.01f};

static mpt_layer_desc prelu_desc(prelu *me, int frozen) {
    mpt_layer_desc d = MPT_ZERO;
    memset(me, 0, sizeof *me);
    me->C = CHANNELS;
    d.weights = CHANNELS;
    d.start = slopes;
    d.forward = prelu_forward;
    d.backward = prelu_backward;
    d.user = me;
    d.tuning.frozen = frozen;
    return d;
}

/* With a slope of 0.01 for all, frozen, it is leaky ReLU, by the bit; and its gradient, by differences. */
static void test_own_layer(mpt_context *ctx, mpt_policy policy) {
    static const float same[CHANNELS] = {0.01f, 0.01f};
    const problem p = problem_new();
    const mpt_train_desc train = training(2);
    mpt_model *net[2];
    float *w[2], *v;
    size_t count = 0;
    prelu me;
    mpt_layer_desc d = prelu_desc(&me, 1);
    int i, h, step;
    if (strcmp(mpt_device_name(ctx), "cpu") != 0) return; /* its loops are the host's */
    d.start = same;
    for (i = 0; i < 2; i++) {
        net[i] = mpt_model_new(ctx, policy);
        h = test_same(net[i], mpt_input(net[i], SIDE, SIDE, CHANNELS), CHANNELS, 3);
        h = mpt_add(net[i], h, i ? mpt_layer(net[i], h, &d) : mpt_leaky_relu(net[i], h, 0));
        mpt_softmax_cross_entropy(net[i], mpt_linear(net[i], h, OUTPUTS, NULL), NULL);
        CHECK_OK(ctx, mpt_model_build(net[i], &train));
        for (step = 0; step < 3; step++) CHECK_OK(ctx, mpt_train_step(net[i], p.x, p.label));
        w[i] = test_params(ctx, net[i], &count);
        if (i) continue;
        v = w[0]; /* the other's has the slopes behind it */
        w[0] = (float *)test_memory(count * sizeof *v);
        memcpy(w[0], v, count * sizeof *v);
        free(v);
    }
    CHECK(memcmp(w[0], w[1], (count - 16) * sizeof *w[0]) == 0);
    CHECK_EQUAL(me.forwards, 6);
    CHECK_EQUAL(me.backwards, 6);
    for (i = 0; i < 2; i++) {
        free(w[i]);
        mpt_model_free(net[i]);
    }
}

/* Slopes that train: their gradient against central differences of the loss, and through a file. */
static void test_own_weights(mpt_context *ctx) {
    const problem p = problem_new();
    const mpt_train_desc train = training(1);
    const double h = 1.0 / 64;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
    prelu me;
    const mpt_layer_desc d = prelu_desc(&me, 0);
    float grad[CHANNELS], start[CHANNELS], slope[CHANNELS];
    mpt_params *params;
    size_t size = 0;
    void *file;
    int tensor, c;
    if (strcmp(mpt_device_name(ctx), "cpu") != 0) return;
    mpt_softmax_cross_entropy(
        net, mpt_linear(net, mpt_layer(net, mpt_input(net, SIDE, SIDE, CHANNELS), &d), OUTPUTS, NULL), NULL);
    CHECK_OK(ctx, mpt_model_build(net, &train));
    params = mpt_model_params(net);
    tensor = mpt_params_find(params, "layer1.weight");
    CHECK_OK(ctx, mpt_params_get(params, tensor, start));
    CHECK(memcmp(start, slopes, sizeof start) == 0);
    CHECK_OK(ctx, mpt_forward(net, p.x, p.label, BATCH));
    CHECK_OK(ctx, mpt_backward(net));
    CHECK_OK(ctx, mpt_download(ctx, grad, mpt_params_grad(params, tensor), sizeof grad));
    CHECK_OK(ctx, mpt_zero_grad(net));
    for (c = 0; c < CHANNELS; c++) {
        mpt_metrics up, down;
        memcpy(slope, start, sizeof slope);
        slope[c] = start[c] + (float)h;
        CHECK_OK(ctx, mpt_params_set(params, tensor, slope));
        CHECK_OK(ctx, mpt_evaluate(net, p.x, p.label, BATCH, &up));
        slope[c] = start[c] - (float)h;
        CHECK_OK(ctx, mpt_params_set(params, tensor, slope));
        CHECK_OK(ctx, mpt_evaluate(net, p.x, p.label, BATCH, &down));
        CHECK_NEAR((double)grad[c], (up.loss - down.loss) / (2 * h), h * h + ldexp(1, -22) / h);
    }
    CHECK_OK(ctx, mpt_params_set(params, tensor, start));
    CHECK_OK(ctx, mpt_checkpoint_save_memory(net, NULL, 0, &size));
    file = test_memory(size);
    CHECK_OK(ctx, mpt_checkpoint_save_memory(net, file, size, &size));
    CHECK_OK(ctx, mpt_train_step(net, p.x, p.label));
    CHECK_OK(ctx, mpt_params_get(params, tensor, slope));
    CHECK(memcmp(start, slope, sizeof start) != 0);
    CHECK_OK(ctx, mpt_checkpoint_load_memory(net, file, size));
    CHECK_OK(ctx, mpt_params_get(params, tensor, slope));
    CHECK(memcmp(start, slope, sizeof start) == 0);
    me.fails = 1;
    CHECK_ERROR(ctx, mpt_train_step(net, p.x, p.label), MPT_ERROR_VALUE, "prelu");
    me.fails = 0;
    CHECK_OK(ctx, mpt_train_step(net, p.x, p.label));
    free(file);
    mpt_model_free(net);
}

static void test_own_layer_errors(mpt_context *ctx) {
    prelu me;
    mpt_layer_desc d = prelu_desc(&me, 0);
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
    const int in = mpt_input(net, SIDE, SIDE, CHANNELS);
    CHECK_EQUAL(mpt_layer(net, 0, &d), 0);
    CHECK_EQUAL(mpt_layer(net, in, NULL), 0);
    CHECK_ERROR(ctx, mpt_model_build(net, NULL), MPT_ERROR_ARGUMENT, "layer1");
    mpt_model_free(net);
    net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
    d.H = 1;
    CHECK_EQUAL(mpt_layer(net, mpt_input(net, SIDE, SIDE, CHANNELS), &d), 0);
    CHECK_ERROR(ctx, mpt_model_build(net, NULL), MPT_ERROR_ARGUMENT, "W");
    mpt_model_free(net);
}

/* -- Fewer samples -- */

/* A step on some samples is that of the same passes by hand; the whole number is mpt_train_step. */
static void test_samples(mpt_context *ctx, mpt_policy policy, size_t samples) {
    const problem p = problem_new();
    const mpt_train_desc train = training(3);
    mpt_model *net[2];
    float *w[2];
    size_t count = 0, done, some;
    int i;
    for (i = 0; i < 2; i++) {
        net[i] = mpt_model_new(ctx, policy);
        mpt_softmax_cross_entropy(net[i], tower(net[i], 0, NULL), NULL);
        CHECK_OK(ctx, mpt_model_build(net[i], &train));
        CHECK_OK(ctx, mpt_train_step(net[i], p.x, p.label)); /* a device may record this one */
    }
    CHECK_OK(ctx, mpt_train_samples(net[0], p.x, p.label, samples));
    for (done = 0; done < samples; done += some) {
        some = samples - done;
        if (some > BATCH) some = BATCH;
        CHECK_OK(ctx, mpt_forward(net[1], p.x + done * PIXELS, p.label + done, some));
        CHECK_OK(ctx, mpt_backward(net[1]));
    }
    finish_step(ctx, net[1]);
    CHECK_EQUAL(mpt_loss(net[0]), mpt_loss(net[1]));
    for (i = 0; i < 2; i++) w[i] = test_params(ctx, net[i], &count);
    CHECK(memcmp(w[0], w[1], count * sizeof *w[0]) == 0);
    CHECK_ERROR(ctx, mpt_train_samples(net[0], p.x, p.label, 0), MPT_ERROR_ARGUMENT, "samples");
    CHECK_ERROR(ctx, mpt_train_samples(net[0], p.x, p.label, 3 * BATCH + 1), MPT_ERROR_ARGUMENT, "samples");
    CHECK(mpt_train_samples(NULL, p.x, p.label, 1) == MPT_ERROR_ARGUMENT);
    for (i = 0; i < 2; i++) {
        free(w[i]);
        mpt_model_free(net[i]);
    }
}

/* -- Loading by name -- */

typedef struct told { /* what mpt_load_desc.tell was called with */
    int count[4];
    char names[512];
} told;

static void keep_told(const char *name, mpt_load_outcome outcome, void *user) {
    told *t = (told *)user;
    t->count[outcome]++;
    if (outcome == MPT_LOADED) return;
    strncat(t->names, name, sizeof t->names - strlen(t->names) - 1);
    strncat(t->names, " ", sizeof t->names - strlen(t->names) - 1);
}

/* Convolution and batch norm of these names, and a classifier. */
static mpt_model *named_net(mpt_context *ctx, const char *conv, const char *norm, const char *fc, int outputs) {
    const mpt_train_desc train = training(1);
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_BF16));
    mpt_conv2d_desc c = MPT_ZERO;
    mpt_norm_desc n = MPT_ZERO;
    mpt_linear_desc l = MPT_ZERO;
    int h;
    c.name = conv;
    c.same = 1;
    n.name = norm;
    l.name = fc;
    h = mpt_conv2d(net, mpt_input(net, SIDE, SIDE, CHANNELS), 4, 3, &c);
    h = mpt_relu(net, mpt_batch_norm(net, h, &n));
    mpt_softmax_cross_entropy(net, mpt_linear(net, mpt_global_avg_pool2d(net, h), outputs, &l), NULL);
    CHECK_OK(ctx, mpt_model_build(net, &train));
    return net;
}

static int same_tensor(mpt_context *ctx, mpt_model *a, const char *name_a, mpt_model *b, const char *name_b) {
    const int ta = mpt_params_find(mpt_model_params(a), name_a), tb = mpt_params_find(mpt_model_params(b), name_b);
    const size_t count = mpt_params_count(mpt_model_params(a), ta);
    float *x = (float *)test_memory(count * sizeof *x), *y = (float *)test_memory(count * sizeof *y);
    int same;
    CHECK_OK(ctx, mpt_params_get(mpt_model_params(a), ta, x));
    CHECK_OK(ctx, mpt_params_get(mpt_model_params(b), tb, y));
    same = memcmp(x, y, count * sizeof *x) == 0;
    free(x);
    free(y);
    return same;
}

static void test_load_partly(mpt_context *ctx) {
    const problem p = problem_new();
    mpt_model *from = named_net(ctx, "net.conv", "net.norm", "net.fc", OUTPUTS);
    mpt_model *to = named_net(ctx, "conv", "norm2", "fc", OUTPUTS + 1);
    mpt_model *whole = named_net(ctx, "conv", "norm", "fc", OUTPUTS);
    mpt_load_desc load = MPT_ZERO;
    float before[8], after[8];
    told t;
    size_t size = 0;
    void *file;
    CHECK_OK(ctx, mpt_train_step(from, p.x, p.label));
    CHECK_OK(ctx, mpt_weights_save_memory(from, NULL, 0, &size, MPT_F32));
    file = test_memory(size);
    CHECK_OK(ctx, mpt_weights_save_memory(from, file, size, &size, MPT_F32));
    CHECK_ERROR(ctx, mpt_weights_load_memory(whole, file, size, NULL), MPT_ERROR_SHAPE, "missing");
    memset(&t, 0, sizeof t);
    load.prefix = "net.";
    load.tell = keep_told;
    load.user = &t;
    CHECK_OK(ctx, mpt_weights_load_memory(whole, file, size, &load));
    CHECK_EQUAL(t.count[MPT_LOADED], 8);
    CHECK(same_tensor(ctx, from, "net.fc.weight", whole, "fc.weight"));
    CHECK_ERROR(ctx, mpt_weights_load_memory(to, file, size, &load), MPT_ERROR_SHAPE, "missing");
    CHECK_OK(ctx, mpt_download(ctx, before, mpt_model_running(to, 3), sizeof before));
    memset(&t, 0, sizeof t);
    load.partly = 1;
    CHECK_OK(ctx, mpt_weights_load_memory(to, file, size, &load));
    CHECK_EQUAL(t.count[MPT_LOADED], 2); /* the convolution's */
    CHECK_EQUAL(t.count[MPT_LOAD_MISSING], 4);
    CHECK_EQUAL(t.count[MPT_LOAD_UNFIT], 2);
    CHECK_EQUAL(t.count[MPT_LOAD_LEFT_OVER], 6);
    CHECK(strstr(t.names, "norm2.running_var") && strstr(t.names, "fc.weight") && strstr(t.names, "net.norm.bias"));
    CHECK(same_tensor(ctx, from, "net.conv.weight", to, "conv.weight"));
    CHECK_OK(ctx, mpt_download(ctx, after, mpt_model_running(to, 3), sizeof after));
    CHECK(memcmp(before, after, sizeof before) == 0);
    CHECK_OK(ctx, mpt_train_step(to, p.x, p.label));
    load.prefix = "other."; /* nothing fits: the model stays as it is */
    CHECK_OK(ctx, mpt_weights_load_memory(whole, file, size, &load));
    CHECK(same_tensor(ctx, from, "net.fc.weight", whole, "fc.weight"));
    ((char *)file)[size - 1] ^= 1; /* damage is an error all the same: of the header's length */
    ((char *)file)[0] ^= 1;
    CHECK_ERROR(ctx, mpt_weights_load_memory(whole, file, size, &load), MPT_ERROR_FILE, "");
    free(file);
    mpt_model_free(from);
    mpt_model_free(to);
    mpt_model_free(whole);
}

int main(int argc, char **argv) {
    mpt_context *ctx;
    int level, accumulate;
    test_begin(argc, argv);
    ctx = test_open(NULL);
    for (level = 0; level < 3; level++)
        for (accumulate = 1; accumulate <= 3; accumulate += 2) {
            RUN_TEST(test_own_loss(ctx, mpt_policy_preset((mpt_level)level, MPT_F16), accumulate));
            RUN_TEST(test_own_loss(ctx, mpt_policy_preset((mpt_level)level, MPT_BF16), accumulate));
        }
    RUN_TEST(test_heads(ctx));
    RUN_TEST(test_gradients(ctx));
    RUN_TEST(test_keep_changes_nothing(ctx));
    RUN_TEST(test_open_errors(ctx));
    for (level = 0; level < LAYERS; level++) {
        RUN_TEST(test_frozen(ctx, mpt_policy_preset(MPT_O0, MPT_F16), level));
        RUN_TEST(test_frozen(ctx, mpt_policy_preset(MPT_O2, MPT_F16), level));
    }
    RUN_TEST(test_rates(ctx));
    RUN_TEST(test_frozen_batch_norm(ctx));
    RUN_TEST(test_frozen_start(ctx));
    RUN_TEST(test_frozen_errors(ctx));
    for (level = 0; level < 3; level++) {
        RUN_TEST(test_own_layer(ctx, mpt_policy_preset((mpt_level)level, MPT_F16)));
        RUN_TEST(test_samples(ctx, mpt_policy_preset((mpt_level)level, MPT_BF16), 1 + (size_t)level * 8));
    }
    RUN_TEST(test_own_weights(ctx));
    RUN_TEST(test_own_layer_errors(ctx));
    RUN_TEST(test_load_partly(ctx));
    for (level = 0; level < 3; level++) {
        RUN_TEST(test_inference((mpt_level)level, MPT_F16));
        RUN_TEST(test_inference((mpt_level)level, MPT_BF16));
    }
    mpt_close(ctx);
    return test_finish("open");
}
