/* parity.c - the same calls on the CPU and on CUDA, side by side: casts, scans, elementwise operations, pooling, scaler
   and optimizers give the same bits; sums in another order stay within the bound of check.h on either side. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"

static mpt_context *sides[2]; /* CPU, CUDA */

/* ==== PAIRS ==== an array on each side with the same bytes */

typedef struct pair {
    mpt_array array[2];
    size_t bytes;
} pair;

static size_t pair_count(const pair *p) { return p->bytes / mpt_dtype_size(p->array[0].type); }

static pair pair_new(mpt_dtype type, size_t count) {
    pair p;
    int side;
    p.bytes = count * mpt_dtype_size(type);
    for (side = 0; side < 2; side++) p.array[side] = mpt_typed_array(mpt_alloc(sides[side], p.bytes), type);
    return p;
}

/* `count` elements of the pair become host's, as bytes */
static void pair_put(pair *p, const void *host) {
    int side;
    for (side = 0; side < 2; side++)
        CHECK_OK(sides[side], mpt_upload(sides[side], p->array[side].data, host, p->bytes));
}

/* Finite values of many sizes; `strange`: every pattern there is, inf and NaN as well. */
static pair pair_random(mpt_dtype type, size_t count, uint64_t seed, int strange) {
    pair p = pair_new(type, count);
    const size_t size = mpt_dtype_size(type);
    unsigned char *host = (unsigned char *)test_memory(p.bytes);
    size_t i;
    for (i = 0; i < count; i++) {
        const double value = test_uniform(-1, 1, seed, 2 * i) * ldexp(1, -(int)(mpt_hash(seed, 0, 0, 2 * i + 1) % 12));
        const uint32_t bits = strange ? mpt_hash(seed, 1, 0, i)
                                      : mpt_narrow((float)value, type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0);
        test_store(host + i * size, bits, type);
    }
    pair_put(&p, host);
    free(host);
    return p;
}

static void pair_free(pair *p) {
    int side;
    for (side = 0; side < 2; side++) mpt_free(sides[side], p->array[side].data);
}

/* bytes of device memory on the sides hold the same */
static int same_bytes(const void *cpu, const void *cuda, size_t bytes) {
    unsigned char *host = (unsigned char *)test_memory(2 * bytes);
    int same;
    CHECK_OK(sides[0], mpt_download(sides[0], host, cpu, bytes));
    CHECK_OK(sides[1], mpt_download(sides[1], host + bytes, cuda, bytes));
    same = memcmp(host, host + bytes, bytes) == 0;
    free(host);
    return same;
}

static int pair_same(const pair *p) { return same_bytes(p->array[0].data, p->array[1].data, p->bytes); }

static double *pair_values(const pair *p, int side) {
    const mpt_dtype type = p->array[0].type;
    const size_t count = pair_count(p), size = mpt_dtype_size(type);
    unsigned char *host = (unsigned char *)test_memory(p->bytes);
    double *value = test_doubles(count);
    size_t i;
    CHECK_OK(sides[side], mpt_download(sides[side], host, p->array[side].data, p->bytes));
    for (i = 0; i < count; i++) value[i] = (double)mpt_widen(test_load(host + i * size, type), type);
    free(host);
    return value;
}

/* Element i of the sides is within twice the bound of a sum of `terms` products of factors of magnitude at most 1. */
static void pair_near(const pair *p, double terms, const char *what) {
    double *cpu = pair_values(p, 0), *cuda = pair_values(p, 1);
    const size_t count = pair_count(p);
    size_t i = 0;
    while (i < count && test_near(cuda[i], cpu[i], 2 * test_bound(terms, terms, cpu[i], p->array[0].type))) i++;
    if (!test_count(i == count, __FILE__, __LINE__, what))
        printf(": [%lu] is %g, on the CPU %g\n", (unsigned long)i, cuda[i], cpu[i]);
    free(cpu);
    free(cuda);
}

/* ==== ARRAYS ==== */

static const size_t lengths[] = {0, 1, 7, 8, 31, 33, 4095, 4097, 70001, 300000};
enum { LENGTHS = sizeof lengths / sizeof *lengths };

static void test_cast(mpt_dtype from, mpt_dtype to) {
    const size_t n = 4099;
    pair x = pair_random(from, n, 1, 1), y = pair_new(to, n);
    mpt_rounding rounding = MPT_ZERO;
    int i, side;
    rounding.seed = 3, rounding.step = 4, rounding.tensor = 5;
    for (i = 0; i < 6; i++) {
        rounding.round = (mpt_round)(i % 3);
        rounding.overflow = (mpt_overflow)(i / 3);
        for (side = 0; side < 2; side++)
            CHECK_OK(sides[side], mpt_cast(sides[side], n, x.array[side], y.array[side], &rounding));
        CHECK(pair_same(&y) || from == to); /* a signalling NaN may stay one */
    }
    pair_free(&x), pair_free(&y);
}

static void test_scan(mpt_dtype type, size_t n, int strange) {
    pair x = pair_random(type, n ? n : 1, 2, strange);
    mpt_histogram h[2];
    mpt_scan scan[2];
    int side;
    memset(h, 0, sizeof h);
    for (side = 0; side < 2; side++) {
        CHECK_OK(sides[side], mpt_scan_array(sides[side], n, x.array[side], &scan[side]));
        CHECK_OK(sides[side], mpt_histogram_add(sides[side], n, x.array[side], &h[side]));
        CHECK_OK(sides[side], mpt_histogram_add(sides[side], n, x.array[side], &h[side]));
    }
    CHECK(memcmp(&scan[0], &scan[1], sizeof scan[0]) == 0);
    CHECK(memcmp(&h[0], &h[1], sizeof h[0]) == 0);
    for (side = 0; side < 2; side++)
        CHECK_OK(sides[side], mpt_scale_array(sides[side], n, 3.0f, x.array[side], &scan[side]));
    CHECK(memcmp(&scan[0], &scan[1], sizeof scan[0]) == 0);
    CHECK(strange || pair_same(&x)); /* NaN times 3 may have any payload */
    pair_free(&x);
}

static void test_arrays(void) {
    int from, to, i;
    for (from = 0; from < MPT_DTYPE_COUNT; from++)
        for (to = 0; to < MPT_DTYPE_COUNT; to++) test_cast((mpt_dtype)from, (mpt_dtype)to);
    for (from = 0; from < MPT_DTYPE_COUNT; from++)
        for (i = 0; i < LENGTHS; i++) test_scan((mpt_dtype)from, lengths[i], i % 2);
}

/* ==== OPERATIONS ==== */

static void test_maps(mpt_dtype type, mpt_dtype out) {
    const size_t n = 1037;
    pair a = pair_random(type, n, 3, 0), b = pair_random(out, n, 4, 0), y = pair_random(out, n, 5, 0);
    int side;
    for (side = 0; side < 2; side++) {
        mpt_context *ctx = sides[side];
        CHECK_OK(ctx, mpt_add_arrays(ctx, n, a.array[side], 0.3f, b.array[side], MPT_RELU, y.array[side]));
        CHECK_OK(ctx, mpt_activation_backward(ctx, MPT_RELU, n, y.array[side], a.array[side], 0.7f, b.array[side]));
        CHECK_OK(ctx, mpt_activation_forward(ctx, MPT_RELU, n, a.array[side], y.array[side]));
    }
    CHECK(pair_same(&b) && pair_same(&y));
    pair_free(&a), pair_free(&b), pair_free(&y);
}

static void test_pool(mpt_pool kind, mpt_dtype type) {
    const mpt_pool2d_shape s = {3, 9, 7, 13, 3, 2, 2, 1};
    const size_t inputs = 3 * 9 * 7 * 13;
    size_t P = 0, Q = 0, outputs;
    pair x = pair_random(type, inputs, 6, 0), y, dy, index;
    int side;
    CHECK_OK(NULL, mpt_pool2d_output(NULL, &s, &P, &Q));
    outputs = 3 * P * Q * 13;
    y = pair_new(type, outputs), dy = pair_random(type, outputs, 7, 0), index = pair_new(MPT_F16, outputs);
    for (side = 0; side < 2; side++) {
        uint16_t *at = (uint16_t *)index.array[side].data;
        CHECK_OK(sides[side], mpt_pool2d_forward(sides[side], kind, &s, x.array[side], y.array[side], at));
        CHECK_OK(sides[side], mpt_pool2d_backward(sides[side], kind, &s, dy.array[side], at, 0.5f, x.array[side]));
    }
    CHECK(pair_same(&x) && pair_same(&y) && pair_same(&index));
    pair_free(&x), pair_free(&y), pair_free(&dy), pair_free(&index);
}

/* With bias and without, as they take different ways to a 16-bit y. */
static void test_conv2d_forward(const mpt_conv2d_shape *s, pair *x, pair *w, pair *y) {
    pair b = pair_random(MPT_F32, s->K, 10, 0);
    mpt_array none = MPT_ZERO;
    int side, bias;
    for (bias = 0; bias < 2; bias++) {
        for (side = 0; side < 2; side++)
            CHECK_OK(sides[side], mpt_conv2d_forward(sides[side], s, x->array[side], w->array[side],
                                                     bias ? b.array[side] : none, MPT_RELU, y->array[side]));
        pair_near(y, (double)(s->R * s->S * s->C + 1), "conv2d forward");
    }
    pair_free(&b);
}

/* The gradients of a convolution and of its bias, with beta 0.5. */
static void test_conv2d_backward(const mpt_conv2d_shape *s, pair *x, pair *w, pair *dy) {
    const size_t rows = pair_count(dy) / s->K;
    pair dw = pair_random(MPT_F32, pair_count(w), 11, 0), db = pair_random(MPT_F32, s->K, 12, 0);
    int side;
    for (side = 0; side < 2; side++) {
        mpt_context *ctx = sides[side];
        CHECK_OK(ctx, mpt_conv2d_backward_weight(ctx, s, dy->array[side], x->array[side], 0.5f, dw.array[side]));
        CHECK_OK(ctx, mpt_conv2d_backward_data(ctx, s, dy->array[side], w->array[side], 0.5f, x->array[side]));
        CHECK_OK(ctx, mpt_bias_backward(ctx, rows, s->K, dy->array[side], 0.5f, db.array[side]));
    }
    pair_near(&dw, (double)(rows + 1), "conv2d weight gradient");
    pair_near(x, (double)(s->R * s->S * s->K + 1), "conv2d data gradient");
    pair_near(&db, (double)(rows + 1), "conv2d bias gradient");
    pair_free(&dw), pair_free(&db);
}

static void test_conv2d(const mpt_conv2d_shape *s, mpt_dtype type) {
    pair x = pair_random(type, s->N * s->H * s->W * s->C, 8, 0), w = pair_random(type, s->K * s->R * s->S * s->C, 9, 0);
    pair y, dy;
    size_t P = 0, Q = 0;
    CHECK_OK(NULL, mpt_conv2d_output(NULL, s, &P, &Q));
    y = pair_new(type, s->N * P * Q * s->K), dy = pair_random(type, s->N * P * Q * s->K, 13, 0);
    test_conv2d_forward(s, &x, &w, &y);
    test_conv2d_backward(s, &x, &w, &dy);
    pair_free(&x), pair_free(&w), pair_free(&y), pair_free(&dy);
}

static void test_operations(void) {
    static const mpt_conv2d_shape shapes[] = {{2, 9, 8, 16, 8, 3, 3, 1, 1, 1}, {3, 11, 7, 5, 6, 3, 2, 2, 1, 2},
                                              {2, 6, 6, 8, 16, 1, 1, 1, 0, 1}, {40, 8, 8, 3, 4, 3, 3, 1, 1, 1}};
    size_t i;
    int type, out;
    for (type = MPT_F32; type <= MPT_BF16; type++) {
        for (out = MPT_F32; out <= MPT_BF16; out++) test_maps((mpt_dtype)type, (mpt_dtype)out);
        test_pool(MPT_POOL_MAX, (mpt_dtype)type);
        test_pool(MPT_POOL_AVERAGE, (mpt_dtype)type);
        for (i = 0; i < sizeof shapes / sizeof *shapes; i++) test_conv2d(&shapes[i], (mpt_dtype)type);
    }
}

/* ==== OPTIMIZERS ==== */

enum { TENSORS = 5, STEPS = 6 };
static const size_t counts[TENSORS] = {3000, 1, 17, 64, 5003};

typedef struct trainer {
    mpt_params *params;
    mpt_scaler *scaler;
    mpt_optimizer *opt;
} trainer;

static trainer trainer_new(mpt_context *ctx, const mpt_params_desc *block, const mpt_optimizer_desc *desc) {
    static const char *const names[TENSORS] = {"a", "b", "c", "d", "e"};
    mpt_scaler_desc scaler = MPT_ZERO;
    float start[5003];
    trainer t;
    int i;
    scaler.growth_interval = 2;
    t.params = mpt_params_new(ctx, block);
    for (i = 0; i < TENSORS; i++)
        mpt_params_add(t.params, names[i], counts[i], i % 2 ? MPT_GROUP_BIAS : MPT_GROUP_WEIGHT);
    CHECK_OK(ctx, mpt_params_build(t.params));
    for (i = 0; i < TENSORS; i++) {
        test_floats(start, counts[i], -1, 1, (uint64_t)i);
        CHECK_OK(ctx, mpt_params_set(t.params, i + 1, start));
    }
    t.scaler = mpt_scaler_new(ctx, &scaler);
    t.opt = mpt_optimizer_new(t.params, t.scaler, desc);
    CHECK_OK(ctx, mpt_optimizer_group(t.opt, MPT_GROUP_BIAS, 2, 0));
    return t;
}

static void trainer_free(trainer *t) {
    mpt_optimizer_free(t->opt);
    mpt_scaler_free(t->scaler);
    mpt_params_free(t->params);
}

/* Gradients of step number `step`, 65536 times too large; the fourth step has an inf and a NaN. */
static void trainer_step(mpt_context *ctx, trainer *t, int step) {
    float grad[5003];
    int i;
    for (i = 0; i < TENSORS; i++) {
        test_floats(grad, counts[i], -4000, 5000, (uint64_t)(step * TENSORS + i));
        if (step == 3 && i == 2) grad[5] = test_float(0x7f800000u);
        if (step == 3 && i == 4) grad[7] = test_float(0x7fc00000u);
        CHECK_OK(ctx, mpt_upload(ctx, mpt_params_grad(t->params, i + 1), grad, counts[i] * sizeof *grad));
    }
    CHECK_OK(ctx, mpt_unscale(t->opt));
    if (step % 2) CHECK_OK(ctx, mpt_clip_norm(t->opt, 1.5));
    if (step == 4) CHECK_OK(ctx, mpt_clip_value(t->opt, 0.01));
    CHECK_OK(ctx, mpt_step(t->opt));
    CHECK_OK(ctx, mpt_scaler_update(t->scaler));
}

/* An array that either both sides have or neither */
static int same_arrays(const void *cpu, const void *cuda, size_t bytes) {
    return cpu && cuda ? same_bytes(cpu, cuda, bytes) : !cpu && !cuda;
}

static void check_trainers(trainer *t, const char *what) {
    const size_t count = mpt_params_count(t[0].params, 0);
    const mpt_array weight = mpt_params_weight(t[0].params, 0);
    mpt_optimizer_state *state = (mpt_optimizer_state *)test_memory(2 * sizeof *state);
    mpt_scaler_state scaler[2];
    float *host = (float *)test_memory(2 * count * sizeof *host);
    int side, m, same = 1;
    for (side = 0; side < 2; side++) {
        CHECK_OK(sides[side], mpt_optimizer_get_state(t[side].opt, &state[side]));
        CHECK_OK(sides[side], mpt_scaler_get_state(t[side].scaler, &scaler[side]));
        CHECK_OK(sides[side], mpt_params_get(t[side].params, 0, host + (size_t)side * count));
    }
    same &= memcmp(host, host + count, count * sizeof *host) == 0;
    same &= memcmp(&state[0], &state[1], sizeof state[0]) == 0;
    same &= memcmp(&scaler[0], &scaler[1], sizeof scaler[0]) == 0;
    same &= same_arrays(weight.data, mpt_params_weight(t[1].params, 0).data, count * mpt_dtype_size(weight.type));
    same &= same_arrays(mpt_params_master(t[0].params, 0), mpt_params_master(t[1].params, 0), count * sizeof *host);
    for (m = 1; m <= 3; m++)
        same &= same_arrays(mpt_optimizer_moment(t[0].opt, m, 0), mpt_optimizer_moment(t[1].opt, m, 0),
                            count * sizeof *host);
    if (!test_count(same, __FILE__, __LINE__, what)) printf(": CPU and CUDA differ\n");
    free(state);
    free(host);
}

static void test_optimizer(const mpt_params_desc *block, const mpt_optimizer_desc *desc, const char *what) {
    trainer t[2];
    int side, step;
    for (side = 0; side < 2; side++) t[side] = trainer_new(sides[side], block, desc);
    for (step = 0; step < STEPS; step++) {
        for (side = 0; side < 2; side++) trainer_step(sides[side], &t[side], step);
        check_trainers(t, what);
    }
    for (side = 0; side < 2; side++) trainer_free(&t[side]);
}

static void test_optimizers(void) {
    static const mpt_params_desc blocks[] = {{MPT_F32, MPT_MASTER_F32, 0}, {MPT_F16, MPT_MASTER_F32, 0},
                                             {MPT_BF16, MPT_MASTER_F32, 0}, {MPT_F16, MPT_MASTER_NONE, 0},
                                             {MPT_BF16, MPT_MASTER_SPLIT, 0}, {MPT_F16, MPT_MASTER_KAHAN, 0},
                                             {MPT_BF16, MPT_MASTER_STOCHASTIC, 77}};
    mpt_optimizer_desc kinds[5];
    size_t b, k;
    kinds[0] = mpt_sgd(0.1, 0);
    kinds[1] = mpt_sgd(0.1, 0.9), kinds[1].nesterov = 1, kinds[1].weight_decay = 0.01;
    kinds[2] = mpt_adam(1e-3), kinds[2].weight_decay = 0.01, kinds[2].meter = 1;
    kinds[3] = mpt_adamw(1e-3), kinds[3].amsgrad = 1, kinds[3].maximize = 1;
    kinds[4] = mpt_adamw(1e-3), kinds[4].schedule.kind = MPT_SCHEDULE_COSINE, kinds[4].schedule.steps = 4;
    kinds[4].schedule.warmup = 2, kinds[4].schedule.warmup_start = 0.1;
    for (b = 0; b < sizeof blocks / sizeof *blocks; b++)
        for (k = 0; k < 5; k++) {
            char what[64];
            snprintf(what, sizeof what, "block %lu, optimizer %lu", (unsigned long)b, (unsigned long)k);
            test_optimizer(&blocks[b], &kinds[k], what);
        }
}

int main(void) {
    sides[0] = mpt_open(NULL);
    sides[1] = test_open(NULL);
    if (!sides[0] || !sides[1]) return 1;
    CHECK(strcmp(mpt_device_name(sides[1]), "cuda") == 0);
    test_arrays();
    test_operations();
    test_optimizers();
    mpt_close(sides[0]);
    mpt_close(sides[1]);
    return test_finish("cuda/parity");
}
