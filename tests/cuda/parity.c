/* parity.c - the same calls on the CPU and on CUDA, side by side: casts, scans, elementwise operations, dropout, pools,
   scaler and optimizers give the same bits; sums in another order stay within the bound of check.h on either side. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include "../operation.h"

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

/* Uniform in -1 .. 1; finite values of many sizes; or every pattern there is, inf and NaN as well */
typedef enum values { UNIFORM, SIZES, PATTERNS } values;

static pair pair_random(mpt_dtype type, size_t count, uint64_t seed, values kind) {
    pair p = pair_new(type, count);
    const size_t size = mpt_dtype_size(type);
    unsigned char *host = (unsigned char *)test_memory(p.bytes);
    size_t i;
    for (i = 0; i < count; i++) {
        const int shrink = kind == UNIFORM ? 0 : (int)(mpt_hash(seed, 0, 0, 2 * i + 1) % 12);
        const double value = ldexp(test_uniform(-1, 1, seed, 2 * i), -shrink);
        const uint32_t bits = kind == PATTERNS ? mpt_hash(seed, 1, 0, i)
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

/* Element i of the sides is within twice the bound of a sum of `terms` products, of this magnitude together. */
static void pair_near(const pair *p, double terms, double magnitude, const char *what) {
    double *cpu = pair_values(p, 0), *cuda = pair_values(p, 1);
    const size_t count = pair_count(p);
    size_t i = 0;
    while (i < count && test_near(cuda[i], cpu[i], 2 * test_bound(terms, magnitude, cpu[i], p->array[0].type))) i++;
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
    pair x = pair_random(from, n, 1, PATTERNS), y = pair_new(to, n);
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
    pair x = pair_random(type, n ? n : 1, 2, strange ? PATTERNS : SIZES);
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

/* ==== OPERATIONS ==== each side against the reference, and the sides against one another */

typedef struct twins {
    test_op side[2];
} twins;

/* Numbers of many sizes, the same on both sides */
static twins twins_new(test_op_kind kind, const void *op) {
    twins t;
    size_t j;
    int side, i;
    for (side = 0; side < 2; side++) {
        t.side[side] = test_op_new(sides[side], kind, op);
        for (i = 0; i < TEST_SLOTS && kind != TEST_NORM; i++) {
            test_tensor *x = &t.side[side].tensor[i];
            if (!x->value) continue;
            for (j = 0; j < x->count; j++) {
                const int shrink = (int)(mpt_hash((uint64_t)i, 1, 0, j) % 12);
                x->value[j] = ldexp(x->value[j], -shrink);
            }
            test_tensor_upload(x);
        }
    }
    return t;
}

/* same: to the bit */
static void twins_check(twins *t, int same) {
    int side, i;
    for (side = 0; side < 2; side++) {
        test_place_count = 0;
        test_op_place(sides[side], 0);
        CHECK_OP(&t->side[side]);
    }
    for (i = 0; i < TEST_SLOTS && same; i++) {
        const test_tensor *x = &t->side[0].tensor[i];
        if (!x->value) continue;
        if (!CHECK(memcmp(x->value, t->side[1].tensor[i].value, x->count * sizeof *x->value) == 0))
            test_op_print(&t->side[1]);
    }
}

static void twins_free(twins *t) {
    test_op_free(&t->side[0]);
    test_op_free(&t->side[1]);
}

static void test_maps(mpt_dtype type, mpt_dtype out) {
    static const mpt_map maps[] = {MPT_MAP_ADD, MPT_MAP_ACTIVATION_GRADIENT, MPT_MAP_ACTIVATION};
    size_t i;
    for (i = 0; i < sizeof maps / sizeof *maps; i++) {
        mpt_map_op op = MPT_ZERO;
        twins t;
        op.map = maps[i];
        op.n = 1037;
        op.act = MPT_RELU;
        op.beta = 0.3f;
        op.a = test_wanted(type);
        op.b = op.out = test_wanted(out);
        t = twins_new(TEST_MAP, &op);
        twins_check(&t, 1);
        twins_free(&t);
    }
}

/* To another array, added to what is there, by a mask with and without a step. */
static void test_dropout(mpt_dtype type, mpt_dtype out) {
    static const uint64_t number = 12345678901u;
    pair step = pair_new(MPT_F32, 2);
    mpt_map_op op = MPT_ZERO;
    twins t;
    int side;
    pair_put(&step, &number);
    op.map = MPT_MAP_DROPOUT;
    op.n = 1037;
    op.beta = 0.5f;
    op.mask.p = 0.3f;
    op.mask.seed = 7;
    op.mask.tensor = 8;
    op.a = test_wanted(type);
    op.out = test_wanted(out);
    t = twins_new(TEST_MAP, &op);
    twins_check(&t, 1);
    for (side = 0; side < 2; side++) {
        t.side[side].op.map.beta = 0;
        t.side[side].op.map.mask.step = (const uint64_t *)step.array[side].data;
        t.side[side].step = &number;
    }
    twins_check(&t, 1);
    twins_free(&t);
    pair_free(&step);
}

/* Rows that 16-byte packs fit into, and others */
static void test_copy_columns(mpt_dtype type, mpt_dtype out) {
    static const size_t shapes[][4] = {{50, 24, 32, 40}, {33, 13, 13, 29}, {7, 1, 3, 2}, {2000, 8, 8, 16}};
    size_t i;
    int side;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const size_t rows = shapes[i][0], C = shapes[i][1], from = shapes[i][2], to = shapes[i][3];
        pair x = pair_random(type, rows * from, 16, SIZES), y = pair_random(out, rows * to, 17, SIZES);
        for (side = 0; side < 2; side++) {
            mpt_columns_op op = MPT_ZERO;
            op.rows = rows;
            op.C = C;
            op.x = x.array[side];
            op.y = y.array[side];
            op.x_stride = from;
            op.y_stride = to;
            op.beta = 0.3f;
            CHECK_OK(sides[side], mpt_op_columns(sides[side], &op));
            op.y.data = (char *)y.array[side].data + mpt_dtype_size(out) * (to - C);
            op.beta = 0;
            CHECK_OK(sides[side], mpt_op_columns(sides[side], &op));
        }
        CHECK(pair_same(&y));
        pair_free(&x), pair_free(&y);
    }
}

/* Averages divide a double sum on the CPU: as near as that. */
static void test_pool(mpt_pool_kind kind, const mpt_pool2d_shape *shape, mpt_dtype type) {
    mpt_pool2d_op op = MPT_ZERO;
    twins t;
    int side;
    op.kind = kind;
    op.shape = *shape;
    op.x = op.y = test_wanted(type);
    t = twins_new(TEST_POOL2D, &op);
    twins_check(&t, 1);
    for (side = 0; side < 2; side++) {
        t.side[side].op.pool2d.pass = MPT_BACKWARD_DATA;
        t.side[side].op.pool2d.beta = 0.5f;
    }
    twins_check(&t, 1);
    twins_free(&t);
}

/* With bias and without, as they take different ways to a 16-bit y; the gradient of a bias may be added up by the
   product that reads dy, in slices and on top of what is there. */
static void test_conv2d(const mpt_conv2d_shape *shape, mpt_dtype type, mpt_dtype weights) {
    mpt_conv2d_op op = MPT_ZERO;
    int pass, with, side;
    op.shape = *shape;
    op.x = op.y = test_wanted(type);
    for (pass = MPT_FORWARD; pass <= MPT_BACKWARD_WEIGHT; pass++) {
        twins t;
        op.pass = (mpt_pass)pass;
        op.act = pass == MPT_FORWARD ? MPT_RELU : MPT_IDENTITY;
        op.w = op.bias = test_wanted(pass == MPT_BACKWARD_WEIGHT ? MPT_F32 : weights);
        if (pass == MPT_FORWARD) op.bias = test_wanted(MPT_F32);
        t = twins_new(TEST_CONV2D, &op);
        for (with = 0; with < 4; with++) {
            for (side = 0; side < 2; side++) {
                t.side[side].op.conv2d.bias.data = with % 2 ? t.side[side].tensor[3].array.data : NULL;
                t.side[side].op.conv2d.beta = with / 2 ? 0.5f : 0;
            }
            twins_check(&t, 0);
        }
        twins_free(&t);
    }
}

/* -- Normalisation -- */

static void norm_pass(twins *t, mpt_norm_pass pass, int frozen, float scale) {
    int side;
    for (side = 0; side < 2; side++) {
        mpt_norm_op *op = &t->side[side].op.norm;
        op->pass = pass;
        op->act = pass == MPT_NORM_FORWARD ? MPT_RELU : MPT_IDENTITY;
        op->frozen = frozen;
        op->scale = scale;
        op->scale_x = scale > 0 ? 0.5f : 0;
        op->momentum = 0.3f;
    }
    twins_check(t, 0);
}

/* Each pass; the gradients with statistics that are constants and that are not, with dx and without. */
static void test_norm_passes(const mpt_norm_shape *s, mpt_dtype type, mpt_dtype scale) {
    mpt_norm_op op = MPT_ZERO;
    twins t;
    int mode, side;
    op.shape = *s;
    op.x = op.y = op.dx = test_wanted(type);
    op.gamma = op.beta = test_wanted(scale);
    op.dgamma = op.dbeta = test_wanted(MPT_F32);
    t = twins_new(TEST_NORM, &op);
    norm_pass(&t, MPT_NORM_STATS, 0, 0);
    norm_pass(&t, MPT_NORM_FORWARD, 0, 0);
    norm_pass(&t, MPT_NORM_RUNNING, 0, 0);
    for (mode = 0; mode < 4; mode++) {
        for (side = 0; side < 2; side++) {
            test_tensor_fill(TEST_TENSOR(&t.side[side], norm.y), -1, 1, 26); /* dy */
            t.side[side].op.norm.dx.data = mode % 2 ? t.side[side].tensor[6].array.data : NULL;
        }
        norm_pass(&t, MPT_NORM_BACKWARD, mode / 2, 0.7f);
    }
    twins_free(&t);
}

/* The slope of a ReLU in passing, or applied to dy before: the same bits, with y of all sizes about the smallest. */
static void test_norm_slope(const mpt_norm_shape *s, mpt_dtype type) {
    mpt_context *ctx = sides[1];
    const size_t n = s->N * s->pixels * s->C, each = mpt_dtype_size(type), sets = s->N * s->groups;
    const double smallest = type == MPT_F32 ? 1 : ldexp(1, type == MPT_F16 ? -24 : -133);
    pair x = pair_random(type, n, 51, SIZES), dy = pair_random(type, n, 52, UNIFORM), y = pair_new(type, n);
    pair dx = pair_new(type, n), sums = pair_new(MPT_F32, 2 * s->C), stats = pair_new(MPT_F32, 4 * sets);
    pair scales = pair_new(MPT_F32, 2 * s->C);
    unsigned char *first = (unsigned char *)test_memory(n * each + 8 * s->C);
    unsigned char *second = (unsigned char *)test_memory(n * each + 8 * s->C);
    float *host = (float *)test_memory(2 * s->C * sizeof *host);
    mpt_norm_op op = MPT_ZERO;
    mpt_map_op slope = MPT_ZERO;
    size_t i;
    int passing;
    for (i = 0; i < 2 * s->C; i++) host[i] = (float)(smallest * test_uniform(-2, 2, 53, i));
    pair_put(&scales, host);
    op.shape = *s;
    op.x = x.array[1];
    op.stats = (float *)stats.array[1].data;
    op.gamma = scales.array[1];
    op.beta = mpt_f32_array((float *)scales.array[1].data + s->C);
    op.act = MPT_RELU;
    op.pass = MPT_NORM_STATS;
    CHECK_OK(ctx, mpt_op_norm(ctx, &op));
    op.pass = MPT_NORM_FORWARD;
    op.y = y.array[1];
    CHECK_OK(ctx, mpt_op_norm(ctx, &op));
    op.pass = MPT_NORM_BACKWARD;
    op.saved = op.y;
    op.y = dy.array[1];
    op.dx = dx.array[1];
    op.dbeta = sums.array[1];
    op.dgamma = mpt_f32_array((float *)sums.array[1].data + s->C);
    slope.map = MPT_MAP_ACTIVATION_GRADIENT;
    slope.act = MPT_RELU;
    slope.n = n;
    slope.a = y.array[1];
    slope.b = slope.out = dy.array[1];
    for (passing = 1; passing >= 0; passing--) {
        unsigned char *to = passing ? first : second;
        if (!passing) CHECK_OK(ctx, mpt_op_map(ctx, &slope));
        op.act = passing ? MPT_RELU : MPT_IDENTITY;
        CHECK_OK(ctx, mpt_op_norm(ctx, &op));
        CHECK_OK(ctx, mpt_download(ctx, to, dx.array[1].data, n * each));
        CHECK_OK(ctx, mpt_download(ctx, to + n * each, sums.array[1].data, 8 * s->C));
    }
    CHECK(memcmp(first, second, n * each + 8 * s->C) == 0);
    free(first), free(second), free(host);
    pair_free(&x), pair_free(&dy), pair_free(&y), pair_free(&dx), pair_free(&sums), pair_free(&stats);
    pair_free(&scales);
}

static void test_norm(mpt_dtype type) {
    static const mpt_norm_shape shapes[] = {
        {1, 9000, 24, 24, 0}, {1, 5, 13, 13, 0},  {1, 70, 72, 72, 0},                     /* batch norm */
        {37, 1, 50, 1, 0},    {300, 1, 64, 1, 0}, {5, 1, 2100, 1, 0},                     /* layer norm */
        {40, 49, 64, 8, 0},   {3, 100, 12, 3, 0}, {2, 1500, 40, 1, 0}, {3, 90, 60, 2, 0}, /* group norm */
        {5, 60, 12, 12, 0},                                                               /* instance norm */
    };
    size_t i;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        test_norm_passes(&shapes[i], type, i % 2 ? type : MPT_F32);
        test_norm_slope(&shapes[i], type);
    }
}

/* -- Losses -- */

typedef struct losses { /* what a loss call reads and writes */
    size_t N, C;
    pair x, dx, sum, scale, target;
} losses;

static losses losses_new(mpt_dtype type, size_t N, size_t C, const void *target, size_t target_bytes) {
    const float scale = 8;
    losses l;
    l.N = N, l.C = C;
    l.x = pair_random(type, N * C, 31, UNIFORM), l.dx = pair_random(type, N * C, 32, UNIFORM);
    l.sum = pair_new(MPT_F32, sizeof(mpt_loss_sum) / 4), l.scale = pair_new(MPT_F32, 1);
    l.target = pair_new(MPT_F32, target_bytes / 4);
    pair_put(&l.scale, &scale);
    pair_put(&l.target, target);
    return l;
}

static mpt_loss_op losses_op(const losses *l, mpt_loss_kind kind, int side) {
    mpt_loss_op op = MPT_ZERO;
    op.kind = kind;
    op.N = l->N;
    op.C = l->C;
    op.x = l->x.array[side];
    op.target = l->target.array[side].data;
    op.grad_scale = 2;
    op.loss_scale = (const float *)l->scale.array[side].data;
    op.dx = l->dx.array[side];
    op.sum = (mpt_loss_sum *)l->sum.array[side].data;
    return op;
}

static void losses_free(losses *l) {
    pair_free(&l->x), pair_free(&l->dx), pair_free(&l->sum), pair_free(&l->scale), pair_free(&l->target);
}

/* magnitude: of what a row's loss and the slope of an element are summed from, at most */
static void check_losses(losses *l, double magnitude, double slope, const char *what) {
    const double terms = (double)l->C + 8; /* elementary functions within 4 ulp */
    mpt_loss_sum sum[2];
    int side;
    for (side = 0; side < 2; side++)
        CHECK_OK(sides[side], mpt_download(sides[side], &sum[side], l->sum.array[side].data, sizeof *sum));
    CHECK_NEAR(sum[1].loss, sum[0].loss, 2 * (double)l->N * test_bound(terms, magnitude, magnitude, MPT_F32));
    CHECK_NEAR(sum[1].weight, sum[0].weight, 1e-12 * sum[0].weight);
    CHECK(sum[1].rows == sum[0].rows && sum[1].correct == sum[0].correct);
    pair_near(&l->dx, terms, slope, what);
}

/* desc->class_weights: on the host */
static void test_cross_entropy(mpt_dtype type, size_t N, size_t C, mpt_loss_desc desc) {
    const float *weights = desc.class_weights;
    int32_t *label = (int32_t *)test_memory(N * sizeof *label);
    pair w = pair_new(MPT_F32, C);
    double mean = 0;
    losses l;
    size_t i;
    int side;
    for (i = 0; i < N; i++) label[i] = (int32_t)(mpt_hash(33, 0, 0, i) % C);
    for (i = 0; i < N && weights; i++) mean += (double)weights[label[i]] / (double)N;
    l = losses_new(type, N, C, label, N * sizeof *label);
    if (weights) pair_put(&w, weights);
    for (side = 0; side < 2; side++) {
        mpt_loss_op op = losses_op(&l, MPT_LOSS_CROSS_ENTROPY, side);
        op.desc = desc;
        if (weights) op.desc.class_weights = (const float *)w.array[side].data;
        CHECK_OK(sides[side], mpt_op_loss(sides[side], &op));
        op.N = N / 2;
        op.loss_scale = NULL;
        op.dx.data = NULL;
        CHECK_OK(sides[side], mpt_op_loss(sides[side], &op));
    }
    check_losses(&l, 3 * (2 + log((double)C)), 3 * 3 * 16 / ((double)N * (weights ? mean : 1)), "cross entropy");
    losses_free(&l);
    pair_free(&w);
    free(label);
}

/* options: delta, or weights of positives up to 2 */
static void test_elementwise_loss(mpt_loss_kind kind, mpt_dtype type, size_t N, size_t C, int options) {
    float *target = (float *)test_memory(N * C * sizeof *target), *weights = (float *)test_memory(C * sizeof *weights);
    pair w = pair_new(MPT_F32, C);
    losses l;
    int side;
    test_floats(target, N * C, -1, 1, 34);
    test_floats(weights, C, 0, 2, 35);
    pair_put(&w, weights);
    l = losses_new(type, N, C, target, N * C * sizeof *target);
    for (side = 0; side < 2; side++) {
        mpt_loss_op op = losses_op(&l, kind, side);
        if (options && kind == MPT_LOSS_HUBER) op.desc.delta = 0.75f;
        if (options && kind == MPT_LOSS_BCE_WITH_LOGITS) op.desc.pos_weight = (const float *)w.array[side].data;
        CHECK_OK(sides[side], mpt_op_loss(sides[side], &op));
    }
    check_losses(&l, options ? 8 : 4, (options ? 8 : 4) * 16 / (double)(N * C), "elementwise loss");
    losses_free(&l);
    pair_free(&w);
    free(target);
    free(weights);
}

/* Positions as rows, probabilities (soft), and weights of samples, which are up to 3 and here 1.5 on the mean */
static void test_loss_options(mpt_loss_kind kind, mpt_dtype type, size_t N, size_t positions, size_t C, int soft) {
    const size_t rows = N * positions;
    const int labels = kind == MPT_LOSS_CROSS_ENTROPY && !soft;
    float *target = (float *)test_memory(rows * C * sizeof *target),
          *weights = (float *)test_memory(N * sizeof *weights);
    int32_t *label = (int32_t *)test_memory(rows * sizeof *label);
    pair w = pair_new(MPT_F32, N);
    losses l;
    size_t i;
    int side;
    test_floats(target, rows * C, 0, 1, 34);
    test_floats(weights, N, 0, 3, 36);
    for (i = 0; i < rows; i++) label[i] = (int32_t)(mpt_hash(37, 0, 0, i) % C);
    pair_put(&w, weights);
    if (labels) l = losses_new(type, rows, C, label, rows * sizeof *label);
    else l = losses_new(type, rows, C, target, rows * C * sizeof *target);
    for (side = 0; side < 2; side++) {
        mpt_loss_op op = losses_op(&l, kind, side);
        op.N = N;
        op.positions = positions;
        op.desc.probabilities = soft;
        op.desc.ignore = labels;
        op.sample_weights = (const float *)w.array[side].data;
        CHECK_OK(sides[side], mpt_op_loss(sides[side], &op));
        op.unit = (double)rows;
        CHECK_OK(sides[side], mpt_op_loss(sides[side], &op));
    }
    check_losses(&l, 3 * (soft ? (double)C : 1) * (2 + log((double)C)), 3 * (soft ? (double)C : 4) * 16 / (double)rows,
                 "loss with options");
    losses_free(&l);
    pair_free(&w);
    free(target), free(weights), free(label);
}

/* A row without a class is NaN and leaves the others alone; where all are ignored the gradient is 0. */
static void test_labels(void) {
    static const int32_t label[4] = {1, -1, 2, 3};
    losses l = losses_new(MPT_F32, 4, 3, label, sizeof label);
    mpt_loss_sum sum[2];
    double *dx;
    size_t i;
    int side;
    for (side = 0; side < 2; side++) {
        mpt_context *ctx = sides[side];
        mpt_loss_op op = losses_op(&l, MPT_LOSS_CROSS_ENTROPY, side);
        op.desc.ignore = 1;
        op.desc.ignore_index = 3;
        CHECK_OK(ctx, mpt_op_loss(ctx, &op));
        CHECK_OK(ctx, mpt_download(ctx, &sum[side], l.sum.array[side].data, sizeof *sum));
        dx = pair_values(&l.dx, side);
        for (i = 0; i < 12; i++) CHECK(test_is_finite(dx[i]) == (i / 3 != 1) && (i / 3 != 3 || dx[i] == 0));
        free(dx);
        op.N = 1;
        op.target = (const int32_t *)op.target + 3;
        CHECK_OK(ctx, mpt_op_loss(ctx, &op));
        dx = pair_values(&l.dx, side);
        for (i = 0; i < 3; i++) CHECK_EQUAL(dx[i], 0);
        free(dx);
        CHECK(!test_is_finite(sum[side].loss));
        CHECK_EQUAL(sum[side].weight, 3);
        CHECK_EQUAL(sum[side].rows, 3);
    }
    CHECK(sum[0].correct == sum[1].correct);
    losses_free(&l);
}

static void test_losses(mpt_dtype type) {
    float weights[40];
    mpt_loss_desc desc = MPT_ZERO;
    int kind;
    test_floats(weights, 40, 0, 3, 35);
    test_cross_entropy(type, 65, 10, desc);
    desc.ignore = 1, desc.ignore_index = 4;
    test_cross_entropy(type, 9000, 7, desc); /* several blocks for the weights */
    desc.class_weights = weights, desc.label_smoothing = 0.2f;
    test_cross_entropy(type, 300, 40, desc);
    desc.ignore = 0;
    test_cross_entropy(type, 33, 5, desc);
    for (kind = MPT_LOSS_SQUARED_ERROR; kind < MPT_LOSS_GRADIENT; kind++) {
        test_elementwise_loss((mpt_loss_kind)kind, type, 50, 37, 0);
        test_elementwise_loss((mpt_loss_kind)kind, type, 300, 1, 0);
    }
    test_elementwise_loss(MPT_LOSS_BCE_WITH_LOGITS, type, 50, 37, 1);
    test_elementwise_loss(MPT_LOSS_HUBER, type, 50, 37, 1);
    test_loss_options(MPT_LOSS_CROSS_ENTROPY, type, 40, 1, 10, 0);
    test_loss_options(MPT_LOSS_CROSS_ENTROPY, type, 3, 1501, 3, 0);
    test_loss_options(MPT_LOSS_CROSS_ENTROPY, type, 3, 37, 40, 1);
    test_loss_options(MPT_LOSS_BCE_WITH_LOGITS, type, 5, 33, 2, 0);
}

static void test_operations(void) {
    static const mpt_conv2d_shape shapes[] = {{2, 9, 8, 16, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0},
                                              {3, 11, 7, 5, 6, 3, 2, 2, 2, 1, 1, 2, 2, 1, 0},
                                              {2, 6, 6, 8, 16, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0},
                                              {40, 8, 8, 3, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0},
                                              {2, 9, 8, 16, 8, 3, 3, 1, 1, 1, 1, 1, 1, 2, 0},
                                              {3, 7, 7, 6, 9, 3, 3, 2, 2, 1, 1, 1, 1, 3, 0}, /* groups */
                                              {2, 6, 6, 16, 32, 1, 1, 1, 1, 0, 0, 1, 1, 4, 0},
                                              {2, 7, 7, 4, 8, 3, 3, 1, 1, 1, 1, 1, 1, 4, 0},
                                              {12, 14, 14, 16, 16, 3, 3, 1, 1, 1, 1, 1, 1, 16, 0},
                                              {2, 9, 11, 13, 13, 3, 2, 2, 2, 1, 1, 1, 1, 13, 0}, /* depthwise */
                                              {1, 12, 12, 72, 72, 5, 5, 1, 1, 2, 2, 2, 2, 72, 0},
                                              {50, 7, 7, 2, 2, 1, 1, 1, 1, 0, 0, 1, 1, 2, 0},
                                              {2, 9, 7, 16, 8, 3, 2, 1, 2, 2, 0, 2, 1, 1, 0}, /* other axes */
                                              {3, 8, 9, 5, 6, 2, 3, 2, 1, 0, 1, 1, 2, 1, 0},
                                              {2, 7, 6, 16, 16, 2, 4, 1, 1, 0, 0, 1, 3, 16, 1},
                                              {2, 6, 9, 8, 8, 4, 2, 1, 1, 0, 0, 2, 1, 1, 1}};
    static const mpt_pool2d_shape windows[] = {
        {3, 9, 7, 13, 3, 2, 2, 2, 1, 1, 0}, {2, 6, 8, 13, 2, 3, 1, 3, 1, 0, 1}, {1, 5, 7, 16, 3, 4, 2, 1, 1, 2, 1}};
    size_t i;
    int type, out;
    test_labels();
    for (type = MPT_F32; type <= MPT_BF16; type++) {
        for (out = MPT_F32; out <= MPT_BF16; out++) {
            test_maps((mpt_dtype)type, (mpt_dtype)out);
            test_dropout((mpt_dtype)type, (mpt_dtype)out);
            test_copy_columns((mpt_dtype)type, (mpt_dtype)out);
        }
        for (i = 0; i < sizeof windows / sizeof *windows; i++) {
            test_pool(MPT_POOL_MAX, &windows[i], (mpt_dtype)type);
            test_pool(MPT_POOL_AVERAGE, &windows[i], (mpt_dtype)type);
        }
        for (i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            test_conv2d(&shapes[i], (mpt_dtype)type, (mpt_dtype)type);
            if (i % 2) test_conv2d(&shapes[i], (mpt_dtype)type, MPT_BF16);
        }
        test_norm((mpt_dtype)type);
        test_losses((mpt_dtype)type);
    }
}

/* ==== OPTIMIZERS ==== */

enum { TENSORS = 5, STEPS = 6, COMMITS = 700 };
static const size_t counts[TENSORS] = {3000, 1, 17, 64, 5003};

typedef struct trainer {
    mpt_params *params;
    mpt_scaler *scaler;
    mpt_optimizer *opt;
    float *pending, *committed; /* (COMMITS) */
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
    t.pending = (float *)mpt_alloc(ctx, 2 * COMMITS * sizeof *t.pending);
    t.committed = t.pending + COMMITS;
    CHECK_OK(ctx, mpt_optimizer_commit(t.opt, COMMITS, t.pending, t.committed));
    return t;
}

static void trainer_free(mpt_context *ctx, trainer *t) {
    mpt_free(ctx, t->pending);
    mpt_optimizer_free(t->opt);
    mpt_scaler_free(t->scaler);
    mpt_params_free(t->params);
}

/* Gradients of step number `step`, 65536 times too large; the fourth step has an inf and a NaN. What is to be committed
   is new in each step. */
static void trainer_step(mpt_context *ctx, trainer *t, int step) {
    float grad[5003];
    int i;
    for (i = 0; i < TENSORS; i++) {
        test_floats(grad, counts[i], -4000, 5000, (uint64_t)(step * TENSORS + i));
        if (step == 3 && i == 2) grad[5] = test_float(0x7f800000u);
        if (step == 3 && i == 4) grad[7] = test_float(0x7fc00000u);
        CHECK_OK(ctx, mpt_upload(ctx, mpt_params_grad(t->params, i + 1), grad, counts[i] * sizeof *grad));
    }
    test_floats(grad, COMMITS, -1, 1, (uint64_t)step);
    CHECK_OK(ctx, mpt_upload(ctx, t->pending, grad, COMMITS * sizeof *grad));
    CHECK_OK(ctx, mpt_unscale(t->opt));
    if (step % 2) CHECK_OK(ctx, mpt_clip_norm(t->opt, 1.5));
    if (step == 4) CHECK_OK(ctx, mpt_clip_value(t->opt, 0.01));
    if (step == 5) CHECK_OK(ctx, mpt_optimizer_set_lr(t->opt, 0.03)); /* the check has worked out rates already */
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
    same &= same_bytes(t[0].pending, t[1].pending, 2 * COMMITS * sizeof *host);
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
    for (side = 0; side < 2; side++) trainer_free(sides[side], &t[side]);
}

static void test_optimizers(void) {
    static const mpt_params_desc blocks[] = {{MPT_F32, MPT_MASTER_F32, 0},         {MPT_F16, MPT_MASTER_F32, 0},
                                             {MPT_BF16, MPT_MASTER_F32, 0},        {MPT_F16, MPT_MASTER_NONE, 0},
                                             {MPT_BF16, MPT_MASTER_SPLIT, 0},      {MPT_F16, MPT_MASTER_KAHAN, 0},
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
    test_op_open();
    CHECK(strcmp(mpt_device_name(sides[1]), "cuda") == 0);
    test_arrays();
    test_operations();
    test_optimizers();
    test_op_close();
    mpt_close(sides[0]);
    mpt_close(sides[1]);
    return test_finish("cuda/parity");
}
