/* operations.c - floor 2, forward and backward, against PyTorch in fp32 and in bf16.

   The values are PyTorch's own, written by make_golden_ops.py, which says what the modes f32, autocast and policy mean;
   run from the top of the repository. Every array has the type that PyTorch has it in.

   Tolerances. With u = 2^-24, both PyTorch's result and ours lie within s = 1.001 (terms + 5) u magnitude of the exact
   one before they are rounded to their type (see test_bound; terms and magnitude are the golden file's), so they are
   2 s apart at most. Rounding to a type of unit U moves ours by U |ours| and PyTorch's by U |theirs|, or, where its
   kernel rounds the terms `rounds` times on the way, by rounds U magnitude. A result without a magnitude has nothing to
   round but itself: the bits are the same. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include "golden.h"

/* ==== ONE RUN ==== of an operation in a mode; the arrays it used */

enum { TENSORS = 12 };

typedef struct run {
    mpt_context *ctx;
    const golden *g;
    const char *mode;
    int option; /* of the operation, from the table */
    test_tensor tensor[TENSORS];
    const golden_line *line[TENSORS]; /* that the tensor comes from, or is to be compared with */
    int tensors;
    void *scratch; /* labels or places */
} run;

static size_t size(const run *r, const char *name) { return (size_t)golden_number(r->g, name); }

static mpt_array add_tensor(run *r, mpt_dtype type, const golden_line *line) {
    test_tensor *t = &r->tensor[r->tensors];
    if (r->tensors == TENSORS) golden_damaged(r->g, "more arrays than the test has room for");
    *t = test_tensor_new(r->ctx, type, line->count);
    r->line[r->tensors++] = line;
    return t->array;
}

/* An input of the golden file, rounded as the mode says. */
static mpt_array input(run *r, const char *name) {
    const golden_line *line = golden_need(r->g, "", "input", name), *cast = golden_find(r->g, r->mode, "cast", name);
    const mpt_array array = add_tensor(r, cast ? cast->type : MPT_F32, line);
    test_tensor *t = &r->tensor[r->tensors - 1];
    memcpy(t->value, line->value, t->count * sizeof *t->value);
    test_tensor_upload(t);
    return array;
}

/* Where the operation shall write a result: NaN, which it must not read. */
static mpt_array output(run *r, const char *name) {
    const golden_line *line = golden_need(r->g, r->mode, "output", name);
    const mpt_array array = add_tensor(r, line->type, line);
    test_tensor_poison(&r->tensor[r->tensors - 1]);
    return array;
}

static void *scratch(run *r, size_t bytes) {
    r->scratch = mpt_alloc(r->ctx, bytes);
    CHECK(r->scratch != NULL);
    return r->scratch;
}

static int32_t *labels(run *r) {
    const golden_line *line = golden_need(r->g, "", "input", "target");
    int32_t *host = (int32_t *)test_memory(line->count * sizeof *host);
    int32_t *device = (int32_t *)scratch(r, line->count * sizeof *host);
    size_t i;
    for (i = 0; i < line->count; i++) host[i] = (int32_t)line->value[i];
    CHECK_OK(r->ctx, mpt_upload(r->ctx, device, host, line->count * sizeof *host));
    free(host);
    return device;
}

/* ==== COMPARING ==== */

static double rounding(mpt_dtype type, double value) { return test_unit(type) * fabs(value); }

static void check_result(const run *r, test_tensor *t, const golden_line *theirs) {
    const golden_line *bound = golden_need(r->g, "", "bound", theirs->name);
    double *tolerance = test_doubles(t->count);
    size_t i;
    test_tensor_download(t);
    for (i = 0; i < t->count && bound->count; i++) {
        const double sum = 1.001 * (bound->number + 5) * test_unit(MPT_F32) * bound->value[i];
        tolerance[i] = 2 * sum + rounding(t->array.type, t->value[i]);
        if (theirs->number > 1) tolerance[i] += theirs->number * rounding(MPT_BF16, bound->value[i]);
        else tolerance[i] += rounding(theirs->type, theirs->value[i]);
    }
    if (!CHECK_ALL(t->value, t->count, theirs->value, tolerance))
        printf("    %s of %s in mode %s\n", theirs->name, r->g->name, r->mode);
    free(tolerance);
}

/* Compares every result that PyTorch has; frees the arrays. */
static void finish(run *r) {
    size_t l;
    int i;
    for (l = 0; l < r->g->count; l++) {
        const golden_line *theirs = &r->g->lines[l];
        if (strcmp(theirs->mode, r->mode) != 0 || strcmp(theirs->word, "output") != 0) continue;
        for (i = 0; i < r->tensors && r->line[i] != theirs; i++) {}
        if (CHECK(i < r->tensors)) check_result(r, &r->tensor[i], theirs);
    }
    for (i = 0; i < r->tensors; i++) test_tensor_free(&r->tensor[i]);
    mpt_free(r->ctx, r->scratch);
    free(r);
}

/* ==== OPERATIONS ==== */

static void run_linear(run *r) {
    const size_t N = size(r, "N"), I = size(r, "I"), O = size(r, "O");
    const mpt_array x = input(r, "x"), w = input(r, "w"), b = input(r, "b"), dy = input(r, "dy");
    mpt_gemm_op forward = MPT_ZERO, data = MPT_ZERO, weight = MPT_ZERO;
    forward.trans_b = 1;
    forward.m = N;
    forward.n = O;
    forward.k = I;
    forward.a = x;
    forward.b = w;
    forward.c = output(r, "y");
    forward.bias = b;
    CHECK_OK(r->ctx, mpt_op_gemm(r->ctx, &forward));
    data.m = N;
    data.n = I;
    data.k = O;
    data.a = dy;
    data.b = w;
    data.c = output(r, "dx");
    CHECK_OK(r->ctx, mpt_op_gemm(r->ctx, &data));
    weight.trans_a = 1;
    weight.m = O;
    weight.n = I;
    weight.k = N;
    weight.a = dy;
    weight.b = x;
    weight.c = output(r, "dw");
    weight.a_sums = output(r, "db");
    CHECK_OK(r->ctx, mpt_op_gemm(r->ctx, &weight));
}

static void run_conv2d(run *r) {
    const mpt_array x = input(r, "x"), w = input(r, "w"), dy = input(r, "dy");
    mpt_conv2d_op op = MPT_ZERO;
    op.shape.N = size(r, "N");
    op.shape.H = size(r, "H");
    op.shape.W = size(r, "W");
    op.shape.C = size(r, "C");
    op.shape.K = size(r, "K");
    op.shape.R = size(r, "R");
    op.shape.S = size(r, "S");
    op.shape.stride_h = size(r, "stride_h");
    op.shape.stride_w = size(r, "stride_w");
    op.shape.padding_h = size(r, "padding_h");
    op.shape.padding_w = size(r, "padding_w");
    op.shape.dilation_h = size(r, "dilation_h");
    op.shape.dilation_w = size(r, "dilation_w");
    op.shape.same = (int)size(r, "same");
    op.shape.groups = size(r, "groups");
    op.x = x;
    op.w = w;
    op.y = output(r, "y");
    op.bias = input(r, "b");
    CHECK_OK(r->ctx, mpt_op_conv2d(r->ctx, &op));
    op.pass = MPT_BACKWARD_DATA;
    op.x = output(r, "dx");
    op.y = dy;
    CHECK_OK(r->ctx, mpt_op_conv2d(r->ctx, &op));
    op.pass = MPT_BACKWARD_WEIGHT;
    op.x = x;
    op.w = output(r, "dw");
    op.bias = output(r, "db");
    CHECK_OK(r->ctx, mpt_op_conv2d(r->ctx, &op));
}

static void run_pool2d(run *r) {
    mpt_pool2d_op op = MPT_ZERO;
    op.kind = (mpt_pool_kind)r->option;
    op.shape.N = size(r, "N");
    op.shape.H = size(r, "H");
    op.shape.W = size(r, "W");
    op.shape.C = size(r, "C");
    op.shape.R = size(r, "R");
    op.shape.S = size(r, "S");
    op.shape.stride_h = size(r, "stride_h");
    op.shape.stride_w = size(r, "stride_w");
    op.shape.padding_h = size(r, "padding_h");
    op.shape.padding_w = size(r, "padding_w");
    op.shape.exclude_padding = (int)size(r, "exclude_padding");
    op.x = input(r, "x");
    op.y = output(r, "y");
    op.index = (uint16_t *)scratch(r, golden_need(r->g, "", "input", "dy")->count * sizeof *op.index);
    CHECK_OK(r->ctx, mpt_op_pool2d(r->ctx, &op));
    op.pass = MPT_BACKWARD_DATA;
    op.x = output(r, "dx");
    op.y = input(r, "dy");
    CHECK_OK(r->ctx, mpt_op_pool2d(r->ctx, &op));
}

/* The gradient goes to both sides as it is. */
static void run_add(run *r) {
    const mpt_array dy = input(r, "dy");
    mpt_map_op op = MPT_ZERO;
    op.map = MPT_MAP_ADD;
    op.n = size(r, "n");
    op.a = input(r, "a");
    op.b = input(r, "b");
    op.beta = 1;
    op.out = output(r, "y");
    CHECK_OK(r->ctx, mpt_op_map(r->ctx, &op));
    op.a = dy;
    op.beta = 0;
    op.b = op.out = output(r, "da");
    CHECK_OK(r->ctx, mpt_op_map(r->ctx, &op));
    op.b = op.out = output(r, "db");
    CHECK_OK(r->ctx, mpt_op_map(r->ctx, &op));
}

static mpt_broadcast_shape broadcast_shape(const run *r) {
    mpt_broadcast_shape s = MPT_ZERO;
    s.N = size(r, "N"), s.H = size(r, "H"), s.W = size(r, "W"), s.C = size(r, "C");
    s.R = size(r, "R"), s.S = size(r, "S");
    return s;
}

static void run_multiply(run *r) {
    const mpt_array a = input(r, "a"), b = input(r, "b"), dy = input(r, "dy");
    mpt_broadcast_op op = MPT_ZERO;
    op.shape = broadcast_shape(r);
    op.x = b;
    op.factor = a;
    op.y = output(r, "y");
    CHECK_OK(r->ctx, mpt_op_broadcast(r->ctx, &op));
    op.factor = dy;
    op.y = output(r, "da");
    CHECK_OK(r->ctx, mpt_op_broadcast(r->ctx, &op));
    op.pass = MPT_BACKWARD_DATA;
    op.factor = a;
    op.y = dy;
    op.x = output(r, "db");
    CHECK_OK(r->ctx, mpt_op_broadcast(r->ctx, &op));
}

static void run_upsample(run *r) {
    mpt_broadcast_op op = MPT_ZERO;
    op.shape = broadcast_shape(r);
    op.x = input(r, "x");
    op.y = output(r, "y");
    CHECK_OK(r->ctx, mpt_op_broadcast(r->ctx, &op));
    op.pass = MPT_BACKWARD_DATA;
    op.y = input(r, "dy");
    op.x = output(r, "dx");
    CHECK_OK(r->ctx, mpt_op_broadcast(r->ctx, &op));
}

static void run_activation(run *r) {
    const mpt_array x = input(r, "x"), y = output(r, "y");
    mpt_map_op op = MPT_ZERO;
    op.map = MPT_MAP_ACTIVATION;
    op.act = (mpt_activation)r->option;
    if (op.act == MPT_LEAKY_RELU) op.negative_slope = (float)golden_number(r->g, "slope");
    op.n = size(r, "n");
    op.a = x;
    op.out = y;
    CHECK_OK(r->ctx, mpt_op_map(r->ctx, &op));
    op.map = MPT_MAP_ACTIVATION_GRADIENT;
    op.a = op.act >= MPT_GELU ? x : y;
    op.b = input(r, "dy");
    op.out = output(r, "dx");
    CHECK_OK(r->ctx, mpt_op_map(r->ctx, &op));
}

typedef enum norm_kind { BATCH_NORM_TRAIN, BATCH_NORM_EVAL, LAYER_NORM, GROUP_NORM } norm_kind;

/* How a norm takes its statistics from x(N,H,W,C), a layer norm from x(N,C). */
static mpt_norm_shape norm_shape(const run *r) {
    const size_t C = size(r, "C"), rows = golden_need(r->g, "", "input", "x")->count / C;
    mpt_norm_shape s = MPT_ZERO;
    s.C = C, s.eps = (float)golden_number(r->g, "eps");
    s.N = r->option == LAYER_NORM ? rows : r->option == GROUP_NORM ? size(r, "N") : 1;
    s.pixels = rows / s.N;
    s.groups = r->option == LAYER_NORM ? 1 : r->option == GROUP_NORM ? size(r, "groups") : C;
    return s;
}

/* Copies n floats from place to place in device memory. */
static void copy(run *r, float *to, const void *from, size_t n) {
    CHECK_OK(r->ctx, mpt_cast(r->ctx, n, mpt_typed_array(from, MPT_F32), mpt_f32_array(to), NULL));
}

/* The running statistics (2,C) of batch norm, which PyTorch keeps in two arrays, after this batch. */
static void run_running(run *r, const mpt_norm_op *norm, mpt_array mean, mpt_array var) {
    const size_t C = norm->shape.C;
    mpt_norm_op op = *norm;
    op.pass = MPT_NORM_RUNNING;
    op.momentum = (float)golden_number(r->g, "momentum");
    op.running = (float *)mpt_alloc(r->ctx, 2 * C * sizeof *op.running);
    copy(r, op.running, mean.data, C);
    copy(r, op.running + C, var.data, C);
    CHECK_OK(r->ctx, mpt_op_norm(r->ctx, &op));
    copy(r, (float *)output(r, "mean_after").data, op.running, C);
    copy(r, (float *)output(r, "var_after").data, op.running + C, C);
    mpt_free(r->ctx, op.running);
}

static void run_norm(run *r) {
    const int batch = r->option <= BATCH_NORM_EVAL;
    const mpt_array none = MPT_ZERO, mean = batch ? input(r, "running_mean") : none;
    const mpt_array var = batch ? input(r, "running_var") : none;
    mpt_norm_op op = MPT_ZERO;
    op.shape = norm_shape(r);
    op.x = input(r, "x");
    op.gamma = input(r, "gamma");
    op.beta = input(r, "beta");
    op.y = output(r, "y");
    op.stats = (float *)scratch(r, 4 * op.shape.N * op.shape.groups * sizeof *op.stats);
    op.frozen = r->option == BATCH_NORM_EVAL;
    if (op.frozen) {
        copy(r, op.stats, mean.data, op.shape.C);
        copy(r, op.stats + op.shape.C, var.data, op.shape.C);
    } else CHECK_OK(r->ctx, mpt_op_norm(r->ctx, &op));
    if (r->option == BATCH_NORM_TRAIN) run_running(r, &op, mean, var);
    op.pass = MPT_NORM_FORWARD;
    CHECK_OK(r->ctx, mpt_op_norm(r->ctx, &op));
    op.pass = MPT_NORM_BACKWARD;
    op.y = input(r, "dy");
    op.dx = output(r, "dx");
    op.dgamma = output(r, "dgamma");
    op.dbeta = output(r, "dbeta");
    CHECK_OK(r->ctx, mpt_op_norm(r->ctx, &op));
}

/* PyTorch's y is the mean. */
static void run_loss(run *r) {
    const mpt_array y = output(r, "y");
    mpt_loss_sum host = MPT_ZERO;
    mpt_loss_op op = MPT_ZERO;
    float mean;
    op.kind = (mpt_loss_kind)r->option;
    op.N = size(r, "N");
    op.C = size(r, "C");
    if (golden_find(r->g, "", "number", "H")) op.positions = size(r, "H") * size(r, "W");
    op.x = input(r, "x");
    op.dx = output(r, "dx");
    op.sum = (mpt_loss_sum *)mpt_alloc(r->ctx, sizeof *op.sum);
    CHECK_OK(r->ctx, mpt_upload(r->ctx, op.sum, &host, sizeof host));
    op.desc.probabilities = golden_find(r->g, "", "number", "probabilities") != NULL;
    if (op.kind == MPT_LOSS_CROSS_ENTROPY) {
        op.desc.label_smoothing = (float)golden_number(r->g, "label_smoothing");
        op.desc.ignore = !op.desc.probabilities;
        op.desc.ignore_index = (int32_t)golden_number(r->g, "ignore_index");
        if (golden_find(r->g, "", "input", "class_weights"))
            op.desc.class_weights = (const float *)input(r, "class_weights").data;
    }
    if (op.desc.ignore) op.target = labels(r);
    else op.target = input(r, "target").data;
    if (golden_find(r->g, "", "input", "sample_weights"))
        op.sample_weights = (const float *)input(r, "sample_weights").data;
    if (golden_find(r->g, "", "input", "pos_weight")) op.desc.pos_weight = (const float *)input(r, "pos_weight").data;
    if (golden_find(r->g, "", "number", "delta")) op.desc.delta = (float)golden_number(r->g, "delta");
    CHECK_OK(r->ctx, mpt_op_loss(r->ctx, &op));
    CHECK_OK(r->ctx, mpt_download(r->ctx, &host, op.sum, sizeof host));
    mean = (float)(host.loss / host.weight);
    CHECK_OK(r->ctx, mpt_upload(r->ctx, y.data, &mean, sizeof mean));
    mpt_free(r->ctx, op.sum);
}

/* ==== THE TABLE ==== */

typedef struct operation {
    const char *golden; /* file */
    void (*run)(run *r);
    int option;
} operation;

static const operation operations[] = {
    {"op_linear", run_linear, 0},
    {"op_conv2d", run_conv2d, 0},
    {"op_conv2d_tall", run_conv2d, 0},
    {"op_conv2d_stride", run_conv2d, 0},
    {"op_conv2d_projection", run_conv2d, 0},
    {"op_conv2d_dilation", run_conv2d, 0},
    {"op_conv2d_groups", run_conv2d, 0},
    {"op_conv2d_depthwise", run_conv2d, 0},
    {"op_conv2d_axes", run_conv2d, 0},
    {"op_conv2d_same", run_conv2d, 0},
    {"op_max_pool", run_pool2d, MPT_POOL_MAX},
    {"op_max_pool_overlap", run_pool2d, MPT_POOL_MAX},
    {"op_max_pool_axes", run_pool2d, MPT_POOL_MAX},
    {"op_avg_pool_exclude", run_pool2d, MPT_POOL_AVERAGE},
    {"op_avg_pool", run_pool2d, MPT_POOL_AVERAGE},
    {"op_avg_pool_overlap", run_pool2d, MPT_POOL_AVERAGE},
    {"op_global_avg_pool", run_pool2d, MPT_POOL_AVERAGE},
    {"op_add", run_add, 0},
    {"op_relu", run_activation, MPT_RELU},
    {"op_leaky_relu", run_activation, MPT_LEAKY_RELU},
    {"op_tanh", run_activation, MPT_TANH},
    {"op_sigmoid", run_activation, MPT_SIGMOID},
    {"op_gelu_erf", run_activation, MPT_GELU},
    {"op_gelu_tanh", run_activation, MPT_GELU_TANH},
    {"op_silu", run_activation, MPT_SILU},
    {"op_batch_norm_train", run_norm, BATCH_NORM_TRAIN},
    {"op_batch_norm_eval", run_norm, BATCH_NORM_EVAL},
    {"op_layer_norm", run_norm, LAYER_NORM},
    {"op_group_norm", run_norm, GROUP_NORM},
    {"op_cross_entropy", run_loss, MPT_LOSS_CROSS_ENTROPY},
    {"op_cross_entropy_smoothing", run_loss, MPT_LOSS_CROSS_ENTROPY},
    {"op_cross_entropy_weights", run_loss, MPT_LOSS_CROSS_ENTROPY},
    {"op_cross_entropy_ignore", run_loss, MPT_LOSS_CROSS_ENTROPY},
    {"op_cross_entropy_all", run_loss, MPT_LOSS_CROSS_ENTROPY},
    {"op_mse", run_loss, MPT_LOSS_SQUARED_ERROR},
    {"op_bce_with_logits", run_loss, MPT_LOSS_BCE_WITH_LOGITS},
    {"op_l1", run_loss, MPT_LOSS_ABSOLUTE_ERROR},
    {"op_huber", run_loss, MPT_LOSS_HUBER},
    {"op_bce_pos_weight", run_loss, MPT_LOSS_BCE_WITH_LOGITS},
    {"op_huber_delta", run_loss, MPT_LOSS_HUBER},
    {"op_multiply", run_multiply, 0},
    {"op_multiply_channels", run_multiply, 0},
    {"op_upsample", run_upsample, 0},
    {"op_cross_entropy_soft", run_loss, MPT_LOSS_CROSS_ENTROPY},
    {"op_cross_entropy_soft_all", run_loss, MPT_LOSS_CROSS_ENTROPY},
    {"op_cross_entropy_soft_weighted", run_loss, MPT_LOSS_CROSS_ENTROPY},
    {"op_cross_entropy_soft_positions", run_loss, MPT_LOSS_CROSS_ENTROPY},
    {"op_cross_entropy_positions", run_loss, MPT_LOSS_CROSS_ENTROPY},
    {"op_cross_entropy_positions_weighted", run_loss, MPT_LOSS_CROSS_ENTROPY},
    {"op_cross_entropy_sample_weights", run_loss, MPT_LOSS_CROSS_ENTROPY},
    {"op_mse_sample_weights", run_loss, MPT_LOSS_SQUARED_ERROR},
    {"op_bce_sample_weights", run_loss, MPT_LOSS_BCE_WITH_LOGITS},
    {"op_huber_sample_weights", run_loss, MPT_LOSS_HUBER},
    {"op_leaky_relu_slope", run_activation, MPT_LEAKY_RELU},
};

static void test_operation(mpt_context *ctx, const operation *op) {
    golden g = golden_read(op->golden);
    size_t i;
    for (i = 0; i < g.count; i++) {
        run *r;
        if (strcmp(g.lines[i].word, "mode") != 0) continue;
        r = (run *)test_memory(sizeof *r);
        r->ctx = ctx, r->g = &g, r->mode = g.lines[i].mode, r->option = op->option;
        op->run(r);
        finish(r);
    }
    golden_free(&g);
}

int main(int argc, char **argv) {
    mpt_context *ctx = test_open(NULL);
    size_t i;
    test_begin(argc, argv);
    for (i = 0; i < sizeof operations / sizeof *operations; i++) RUN_TEST(test_operation(ctx, &operations[i]));
    mpt_close(ctx);
    return test_finish("parity/operations");
}
