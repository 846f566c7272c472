/* operation.h - an operation in many contexts: arrays for its struct, and every result held against the plain loops of
   a reference context.

   Include it after mpt.h and check.h; call test_op_open first. A test fills the operation's struct with shape, options
   and test_wanted(type) for each array, and then
       test_op t = test_op_new(ctx, TEST_GEMM, &op);   random numbers for the arrays, NaN between their rows
       CHECK_OP(&t);                                   runs it everywhere, checks whatever it writes
       test_op_free(&t);
   Between two checks t.op is a struct like another, which the test may change to another pass or factor; its arrays are
   TEST_TENSOR(&t, gemm.a) and so on. */
#ifndef OPERATION_H
#define OPERATION_H

#include <stddef.h>

typedef enum test_op_kind {
    TEST_GEMM,
    TEST_CONV2D,
    TEST_POOL2D,
    TEST_MAP,
    TEST_COLUMNS,
    TEST_NORM,
    TEST_BROADCAST
} test_op_kind;

typedef union test_op_struct {
    mpt_gemm_op gemm;
    mpt_conv2d_op conv2d;
    mpt_pool2d_op pool2d;
    mpt_map_op map;
    mpt_columns_op columns;
    mpt_norm_op norm;
    mpt_broadcast_op broadcast;
} test_op_struct;

enum { TEST_SLOTS = 10 };

/* One of the struct's arrays. */
typedef struct test_slot {
    size_t offset;  /* in the struct */
    int pointer;    /* 1: not an mpt_array, but a pointer to elements of this type; an index goes as patterns of F16 */
    mpt_dtype type; /* of the pointer */
    size_t rows, columns, stride, count; /* stride: distance of rows; count: elements, all rows and what follows them */
    double low, high;                    /* of its random numbers */
    int output;                          /* this pass writes it */
    int kept;                            /* and its old content counts */
    double terms; /* of the sum that an output is, see test_bound; below 0: the result is exact */
} test_slot;

typedef struct test_op {
    mpt_context *ctx; /* has the arrays */
    test_op_kind kind;
    test_op_struct op;
    test_tensor tensor[TEST_SLOTS]; /* without a value where the struct has NULL */
    const uint64_t *step;           /* of a dropout, host memory: what mask.step points to on the device */
    double terms;                   /* in place of what the sums have; 0: that */
} test_op;

/* ==== WHERE ==== */

enum { TEST_PLACES = 32 };

static struct {
    mpt_context *ctx;
    int same; /* it gives the bits of the one before */
} test_places[TEST_PLACES];
static int test_place_count;
static mpt_context *test_plain; /* the reference */

static inline void test_op_open(void) {
    mpt_context_desc desc = MPT_ZERO;
    desc.reference = 1;
    test_plain = mpt_open(&desc);
}

/* Operations run there, too, from now on. */
static inline void test_op_place(mpt_context *ctx, int same) {
    if (test_place_count == TEST_PLACES) exit(test_finish("operation.h: too many contexts"));
    test_places[test_place_count].ctx = ctx;
    test_places[test_place_count++].same = same;
}

static inline void test_op_close(void) {
    mpt_close(test_plain);
    test_place_count = 0;
}

static inline mpt_result test_op_call(mpt_context *ctx, test_op_kind kind, const test_op_struct *op) {
    switch (kind) {
    case TEST_GEMM: return mpt_op_gemm(ctx, &op->gemm);
    case TEST_CONV2D: return mpt_op_conv2d(ctx, &op->conv2d);
    case TEST_POOL2D: return mpt_op_pool2d(ctx, &op->pool2d);
    case TEST_MAP: return mpt_op_map(ctx, &op->map);
    case TEST_COLUMNS: return mpt_op_columns(ctx, &op->columns);
    case TEST_NORM: return mpt_op_norm(ctx, &op->norm);
    case TEST_BROADCAST: return mpt_op_broadcast(ctx, &op->broadcast);
    }
    return MPT_ERROR_ARGUMENT;
}

/* ==== ARRAYS OF A STRUCT ==== */

static char test_mark;

/* In a struct: an array of this type, which test_op_new makes. */
static inline mpt_array test_wanted(mpt_dtype type) { return mpt_typed_array(&test_mark, type); }

/* rows x columns, rows `stride` apart; 0: without a gap */
static inline test_slot test_input(size_t offset, size_t rows, size_t columns, size_t stride) {
    test_slot s;
    memset(&s, 0, sizeof s);
    s.offset = offset;
    s.rows = rows;
    s.columns = columns;
    s.stride = stride ? stride : columns;
    s.count = rows && columns ? (rows - 1) * s.stride + columns : 0;
    s.low = -1;
    s.high = 1;
    return s;
}

static inline test_slot test_output(size_t offset, size_t rows, size_t columns, size_t stride, int kept, double terms) {
    test_slot s = test_input(offset, rows, columns, stride);
    s.output = 1;
    s.kept = kept;
    s.terms = terms;
    return s;
}

static inline test_slot test_vector(int output, size_t offset, size_t count, int kept, double terms) {
    return output ? test_output(offset, 1, count, 0, kept, terms) : test_input(offset, 1, count, 0);
}

static inline int test_gemm_slots(const mpt_gemm_op *op, test_slot *s) {
    const size_t m = op->m, n = op->n, k = op->k;
    const int kept = op->beta != 0;
    s[0] = test_input(offsetof(mpt_gemm_op, a), op->trans_a ? k : m, op->trans_a ? m : k, op->lda);
    s[1] = test_input(offsetof(mpt_gemm_op, b), op->trans_b ? n : k, op->trans_b ? k : n, op->ldb);
    s[2] = test_output(offsetof(mpt_gemm_op, c), m, n, op->ldc, kept, (double)k + 1);
    s[3] = test_vector(0, offsetof(mpt_gemm_op, bias), n, 0, 0);
    s[4] = test_vector(1, offsetof(mpt_gemm_op, a_sums), m, kept, (double)k);
    return 5;
}

static inline int test_conv2d_slots(const mpt_conv2d_op *op, test_slot *s) {
    const mpt_conv2d_shape *z = &op->shape;
    const size_t groups = z->groups ? z->groups : 1, taps = z->R * z->S;
    const int forward = op->pass == MPT_FORWARD, weight = op->pass == MPT_BACKWARD_WEIGHT, kept = op->beta != 0;
    size_t P, Q, rows;
    CHECK_OK(NULL, mpt_conv2d_output(NULL, z, &P, &Q));
    rows = z->N * P * Q;
    s[0] = test_vector(op->pass == MPT_BACKWARD_DATA, offsetof(mpt_conv2d_op, x), z->N * z->H * z->W * z->C, kept,
                       (double)(taps * z->K / groups));
    s[1] = test_vector(weight, offsetof(mpt_conv2d_op, w), z->K * taps * z->C / groups, kept, (double)rows);
    s[2] = test_vector(forward, offsetof(mpt_conv2d_op, y), rows * z->K, kept, (double)(taps * z->C / groups + 1));
    s[3] = test_vector(weight, offsetof(mpt_conv2d_op, bias), z->K, kept, (double)rows);
    return 4;
}

static inline int test_pool2d_slots(const mpt_pool2d_op *op, test_slot *s) {
    const mpt_pool2d_shape *z = &op->shape;
    const int forward = op->pass == MPT_FORWARD, max = op->kind == MPT_POOL_MAX;
    const double window = (double)(z->R * z->S);
    size_t P, Q, rows;
    CHECK_OK(NULL, mpt_pool2d_output(NULL, z, &P, &Q));
    rows = z->N * P * Q;
    s[0] = test_vector(!forward, offsetof(mpt_pool2d_op, x), z->N * z->H * z->W * z->C, op->beta != 0, window);
    s[1] = test_vector(forward, offsetof(mpt_pool2d_op, y), rows * z->C, 0, max ? -1 : window);
    if (!max) return 2;
    s[2] = test_vector(forward, offsetof(mpt_pool2d_op, index), rows * z->C, 0, -1);
    s[2].pointer = 1;
    s[2].type = MPT_F16;
    return 3;
}

static inline int test_map_slots(const mpt_map_op *op, test_slot *s) {
    const int adds = op->map == MPT_MAP_ACTIVATION_GRADIENT || op->map == MPT_MAP_DROPOUT;
    s[0] = test_vector(0, offsetof(mpt_map_op, a), op->n, 0, 0);
    s[1] = test_vector(0, offsetof(mpt_map_op, b), op->n, 0, 0);
    s[2] = test_vector(1, offsetof(mpt_map_op, out), op->n, adds && op->beta != 0, 1);
    return 3;
}

static inline int test_columns_slots(const mpt_columns_op *op, test_slot *s) {
    s[0] = test_input(offsetof(mpt_columns_op, x), op->rows, op->C, op->x_stride);
    s[1] = test_output(offsetof(mpt_columns_op, y), op->rows, op->C, op->y_stride, op->beta != 0, 1);
    return 2;
}

static inline int test_broadcast_slots(const mpt_broadcast_op *op, test_slot *s) {
    const mpt_broadcast_shape *z = &op->shape;
    const size_t x = z->N * z->H * z->W * z->C, window = z->R * z->S;
    const int forward = op->pass == MPT_FORWARD, kept = op->beta != 0;
    s[0] = test_vector(!forward, offsetof(mpt_broadcast_op, x), x, kept, (double)window + 1);
    s[1] = test_vector(forward, offsetof(mpt_broadcast_op, y), x * window, kept, 2);
    s[2] = test_vector(0, offsetof(mpt_broadcast_op, factor), x * window, 0, 0);
    return 3;
}

/* Statistics are not of x unless a test takes them: means and variances of 0.5 to 1.5. */
static inline int test_norm_slots(const mpt_norm_op *op, test_slot *s) {
    const mpt_norm_shape *z = &op->shape;
    const size_t n = z->N * z->pixels * z->C, sets = z->N * z->groups;
    const double rows = (double)(z->N * z->pixels), each = (double)(z->pixels * (z->C / z->groups));
    const int backward = op->pass == MPT_NORM_BACKWARD;
    s[0] = test_vector(0, offsetof(mpt_norm_op, x), n, 0, 0);
    s[1] = test_vector(op->pass == MPT_NORM_STATS, offsetof(mpt_norm_op, stats), 2 * sets, 0, 0);
    s[1].pointer = 1;
    s[1].count = 4 * sets;
    s[1].low = 0.5;
    s[1].high = 1.5;
    s[2] = test_vector(0, offsetof(mpt_norm_op, gamma), z->C, 0, 0);
    s[3] = test_vector(0, offsetof(mpt_norm_op, beta), z->C, 0, 0);
    s[4] = test_vector(op->pass == MPT_NORM_FORWARD, offsetof(mpt_norm_op, y), n, 0, 3);
    s[5] = test_vector(0, offsetof(mpt_norm_op, saved), n, 0, 0);
    s[6] = test_vector(backward, offsetof(mpt_norm_op, dx), n, op->scale_x != 0, op->frozen ? 4 : each + 11);
    s[7] = test_vector(backward, offsetof(mpt_norm_op, dgamma), z->C, op->scale != 0, rows + 4);
    s[8] = test_vector(backward, offsetof(mpt_norm_op, dbeta), z->C, op->scale != 0, rows);
    s[9] = test_vector(op->pass == MPT_NORM_RUNNING, offsetof(mpt_norm_op, running), 2 * sets, 1, 2);
    s[9].pointer = 1;
    return 10;
}

static inline int test_op_slots(const test_op *t, test_slot *s) {
    switch (t->kind) {
    case TEST_GEMM: return test_gemm_slots(&t->op.gemm, s);
    case TEST_CONV2D: return test_conv2d_slots(&t->op.conv2d, s);
    case TEST_POOL2D: return test_pool2d_slots(&t->op.pool2d, s);
    case TEST_MAP: return test_map_slots(&t->op.map, s);
    case TEST_COLUMNS: return test_columns_slots(&t->op.columns, s);
    case TEST_BROADCAST: return test_broadcast_slots(&t->op.broadcast, s);
    case TEST_NORM: return test_norm_slots(&t->op.norm, s);
    }
    return 0;
}

/* What the struct has at a slot. */
static inline mpt_array test_slot_get(const test_op_struct *op, const test_slot *s) {
    mpt_array a = MPT_ZERO;
    a.type = s->type;
    memcpy(&a, (const char *)op + s->offset, s->pointer ? sizeof a.data : sizeof a);
    return a;
}

static inline void test_slot_put(test_op_struct *op, const test_slot *s, mpt_array a) {
    memcpy((char *)op + s->offset, &a, s->pointer ? sizeof a.data : sizeof a);
}

/* NaN in the rows, or in the gaps between them. */
static inline void test_slot_poison(const test_slot *s, test_tensor *t, int gaps) {
    size_t i;
    for (i = 0; s->stride && i < s->rows * s->stride && i < s->count; i++)
        if ((i % s->stride >= s->columns) == gaps) t->value[i] = (double)test_float(0x7fc00000u);
    test_tensor_upload(t);
}

/* New random numbers in all arrays. */
static inline void test_op_fill(test_op *t) {
    test_slot s[TEST_SLOTS];
    const int count = test_op_slots(t, s);
    int i;
    for (i = 0; i < count; i++) {
        if (!t->tensor[i].value) continue;
        test_tensor_fill(&t->tensor[i], s[i].low, s[i].high, (uint64_t)i + 1);
        if (!s[i].output && s[i].stride > s[i].columns) test_slot_poison(&s[i], &t->tensor[i], 1);
    }
}

/* op: the struct of this kind */
static inline test_op test_op_new(mpt_context *ctx, test_op_kind kind, const void *op) {
    static const size_t sizes[] = {sizeof(mpt_gemm_op),     sizeof(mpt_conv2d_op),  sizeof(mpt_pool2d_op),
                                   sizeof(mpt_map_op),      sizeof(mpt_columns_op), sizeof(mpt_norm_op),
                                   sizeof(mpt_broadcast_op)};
    test_slot s[TEST_SLOTS];
    test_op t;
    int i, count;
    memset(&t, 0, sizeof t);
    t.ctx = ctx;
    t.kind = kind;
    memcpy(&t.op, op, sizes[kind]);
    count = test_op_slots(&t, s);
    for (i = 0; i < count; i++) {
        const mpt_array wanted = test_slot_get(&t.op, &s[i]);
        if (!s[i].pointer && !wanted.data) continue;
        t.tensor[i] = test_tensor_new(ctx, wanted.type, s[i].count);
        test_slot_put(&t.op, &s[i], t.tensor[i].array);
    }
    test_op_fill(&t);
    return t;
}

static inline void test_op_free(test_op *t) {
    int i;
    for (i = 0; i < TEST_SLOTS; i++)
        if (t->tensor[i].value) test_tensor_free(&t->tensor[i]);
}

static inline test_tensor *test_op_tensor(test_op *t, size_t offset) {
    test_slot s[TEST_SLOTS];
    const int count = test_op_slots(t, s);
    int i;
    for (i = 0; i < count; i++)
        if (s[i].offset == offset && t->tensor[i].value) return &t->tensor[i];
    exit(test_finish("operation.h: no such array"));
}

#define TEST_TENSOR(t, member) test_op_tensor(t, offsetof(test_op_struct, member))

/* ==== WHAT IS EXPECTED ==== */

/* The sum of the magnitudes that a result is added up from is the same operation on magnitudes. */
static inline void test_op_absolute(test_op_kind kind, test_op_struct *op) {
    switch (kind) {
    case TEST_GEMM:
        op->gemm.alpha = (float)fabs((double)op->gemm.alpha);
        op->gemm.beta = (float)fabs((double)op->gemm.beta);
        op->gemm.act = MPT_IDENTITY;
        break;
    case TEST_CONV2D:
        op->conv2d.beta = (float)fabs((double)op->conv2d.beta);
        op->conv2d.act = MPT_IDENTITY;
        break;
    case TEST_POOL2D: op->pool2d.beta = (float)fabs((double)op->pool2d.beta); break;
    case TEST_MAP:
        op->map.beta = (float)fabs((double)op->map.beta);
        op->map.act = MPT_IDENTITY;
        break;
    case TEST_COLUMNS: op->columns.beta = (float)fabs((double)op->columns.beta); break;
    case TEST_BROADCAST: op->broadcast.beta = (float)fabs((double)op->broadcast.beta); break;
    case TEST_NORM:
        op->norm.scale = (float)fabs((double)op->norm.scale);
        op->norm.scale_x = (float)fabs((double)op->norm.scale_x);
        op->norm.act = MPT_IDENTITY;
        break;
    }
}

/* On the reference, in fp32, which holds every number of every type; absolute: of magnitudes. out[i]: what slot i holds
   afterwards. The mean of a norm is taken off, so its magnitude is below 0; `constant`: as if statistics were. */
static inline void test_op_reference(const test_op *t, int absolute, int constant, double *const *out) {
    test_slot s[TEST_SLOTS];
    const int count = test_op_slots(t, s);
    test_op_struct op = t->op;
    test_tensor copy[TEST_SLOTS];
    size_t j;
    int i;
    for (i = 0; i < count; i++) {
        const int index = s[i].pointer && s[i].type == MPT_F16;
        if (!t->tensor[i].value) continue;
        copy[i] = test_tensor_new(test_plain, index ? MPT_F16 : MPT_F32, s[i].count);
        for (j = 0; j < s[i].count; j++) copy[i].value[j] = t->tensor[i].value[j];
        for (j = 0; j < s[i].count && absolute && !index; j++) copy[i].value[j] = fabs(copy[i].value[j]);
        if (absolute && t->kind == TEST_NORM && t->op.norm.pass != MPT_NORM_RUNNING && i == 1)
            for (j = 0; j < s[i].columns / 2; j++) copy[i].value[j] = -copy[i].value[j];
        test_tensor_upload(&copy[i]);
        if (test_slot_get(&op, &s[i]).data) test_slot_put(&op, &s[i], copy[i].array);
    }
    if (absolute) test_op_absolute(t->kind, &op);
    if (t->kind == TEST_NORM && constant) op.norm.frozen = 1;
    if (t->kind == TEST_MAP && t->step) op.map.mask.step = t->step;
    CHECK_OK(test_plain, test_op_call(test_plain, t->kind, &op));
    for (i = 0; i < count; i++) {
        if (!t->tensor[i].value) continue;
        test_tensor_download(&copy[i]);
        if (out[i]) memcpy(out[i], copy[i].value, s[i].count * sizeof(double));
        test_tensor_free(&copy[i]);
    }
}

/* Sums of a mean and a variance are double and rounded once; that of the squares may be E x^2 - (E x)^2, which passes
   2 count + 10 roundings of the size of E x^2. On a GPU 16-bit values are added in fp32 over eight first, relative to
   the first of them: see mptc__moments_join. There |x - first| is on average at most 9 E |x|. */
static inline void test_stats_tolerance(const test_op *t, const double *expected, double *tolerance) {
    const mpt_norm_shape *z = &t->op.norm.shape;
    const int gpu = strcmp(mpt_device_name(t->ctx), "cuda") == 0;
    const double few = gpu && t->op.norm.x.type != MPT_F32 ? test_unit(MPT_F32) : 0;
    const size_t sets = z->N * z->groups;
    const double roundings = 2 * (double)(z->pixels * (z->C / z->groups)) + 10;
    size_t i;
    for (i = 0; i < 2 * sets; i++) {
        const size_t set = i % sets;
        const double square = expected[sets + set] + expected[set] * expected[set]; /* E x^2 */
        tolerance[i] = 2 * test_unit(MPT_F32) * fabs(expected[i]) + test_tiny(MPT_F32);
        tolerance[i] += roundings * ldexp(i < sets ? sqrt(square) : square, -53);
        tolerance[i] += few * (i < sets ? 7 * 9 * sqrt(square) : 300 * expected[i]);
    }
}

/* 1.001 (terms + 5) roundings of fp32 of the magnitudes, one more for the reference's own, and one of the type. Behind
   an activation other than ReLU, whose slopes are at most 1.13, 16 for its own; see accuracy.c. */
static inline double test_op_tolerance(double terms, double magnitude, double exact, mpt_dtype type,
                                       mpt_activation act) {
    if (terms < 0) return 0;
    if (act <= MPT_RELU) return test_bound(terms + 1, magnitude, exact, type);
    return 1.13 * test_bound(terms + 1, magnitude, exact, type) + 16 * test_unit(MPT_F32) * (1 + fabs(exact));
}

static inline mpt_activation test_op_act(const test_op *t) {
    if (t->kind == TEST_GEMM) return t->op.gemm.act;
    if (t->kind == TEST_CONV2D) return t->op.conv2d.act;
    if (t->kind == TEST_MAP) return t->op.map.act;
    return t->kind == TEST_NORM && t->op.norm.pass == MPT_NORM_FORWARD ? t->op.norm.act : MPT_IDENTITY;
}

/* expected[i], tolerance[i] of every output i. dx of a norm is v - m1 - m2 normal, with constant statistics v, so the
   sum of magnitudes is twice the latter less the former. */
static inline void test_op_expect(const test_op *t, double *const *expected, double *const *tolerance) {
    test_slot s[TEST_SLOTS];
    const int count = test_op_slots(t, s);
    double *constant[TEST_SLOTS] = {NULL};
    size_t j;
    int i;
    test_op_reference(t, 0, 0, expected);
    test_op_reference(t, 1, 0, tolerance);
    if (t->kind == TEST_NORM && t->op.norm.pass == MPT_NORM_BACKWARD && !t->op.norm.frozen && tolerance[6]) {
        constant[6] = test_doubles(s[6].count);
        test_op_reference(t, 1, 1, constant);
        for (j = 0; j < s[6].count; j++) tolerance[6][j] = 2 * constant[6][j] - tolerance[6][j];
        free(constant[6]);
    }
    for (i = 0; i < count; i++) {
        const double terms = t->terms > 0 && s[i].terms >= 0 ? t->terms : s[i].terms;
        if (!expected[i]) continue;
        for (j = 0; j < s[i].rows * s[i].stride && j < s[i].count; j++) {
            const int inside = j % s[i].stride < s[i].columns;
            tolerance[i][j] = inside ? test_op_tolerance(terms, tolerance[i][j], expected[i][j],
                                                         t->tensor[i].array.type, test_op_act(t))
                                     : 0;
        }
        if (t->kind == TEST_NORM && t->op.norm.pass == MPT_NORM_STATS)
            test_stats_tolerance(t, expected[i], tolerance[i]);
    }
}

/* ==== CHECKING ==== */

static inline void test_op_print(const test_op *t) {
    static const char *const names[] = {"gemm", "conv2d", "pool2d", "map", "columns", "norm", "broadcast"};
    const mpt_conv2d_shape *c = &t->op.conv2d.shape;
    const mpt_norm_shape *n = &t->op.norm.shape;
    int i;
    printf("    on %s, in %s of", mpt_device_name(t->ctx), names[t->kind]);
    for (i = 0; i < TEST_SLOTS; i++) printf(" %s", t->tensor[i].value ? mpt_dtype_name(t->tensor[i].array.type) : "-");
    if (t->kind == TEST_GEMM)
        printf(", trans %d %d, %lux%lux%lu", t->op.gemm.trans_a, t->op.gemm.trans_b, (unsigned long)t->op.gemm.m,
               (unsigned long)t->op.gemm.n, (unsigned long)t->op.gemm.k);
    if (t->kind == TEST_CONV2D)
        printf(", pass %d, N %lu H %lu W %lu C %lu K %lu R %lu S %lu", (int)t->op.conv2d.pass, (unsigned long)c->N,
               (unsigned long)c->H, (unsigned long)c->W, (unsigned long)c->C, (unsigned long)c->K, (unsigned long)c->R,
               (unsigned long)c->S);
    if (t->kind == TEST_POOL2D) printf(", kind %d, pass %d", (int)t->op.pool2d.kind, (int)t->op.pool2d.pass);
    if (t->kind == TEST_MAP) printf(", map %d, n %lu", (int)t->op.map.map, (unsigned long)t->op.map.n);
    if (t->kind == TEST_NORM)
        printf(", pass %d, N %lu pixels %lu C %lu groups %lu", (int)t->op.norm.pass, (unsigned long)n->N,
               (unsigned long)n->pixels, (unsigned long)n->C, (unsigned long)n->groups);
    printf("\n");
}

/* Elements of an output that are its rows and the gaps between them. */
static inline size_t test_slot_checked(const test_slot *s) {
    return s->rows && s->columns ? (s->rows - 1) * s->stride + s->columns : 0;
}

/* What a pass does not write stays as it was, but for two of a norm's gradient: dy, which a slope may be put into in
   place, and what lies behind the statistics. */
static inline int test_op_unchanged(const test_op *t, int slot, const unsigned char *old, const char *file, int line) {
    const test_tensor *x = &t->tensor[slot];
    const int backward = t->kind == TEST_NORM && t->op.norm.pass == MPT_NORM_BACKWARD;
    const size_t bytes = x->value ? test_tensor_bytes(x) / (backward && slot == 1 ? 2 : 1) : 0;
    unsigned char *bits = (unsigned char *)test_memory(bytes);
    int ok = 1;
    if (bytes && !(backward && slot == 4)) {
        CHECK_OK(t->ctx, mpt_download(t->ctx, bits, x->array.data, bytes));
        ok = test_check(memcmp(bits, old, bytes) == 0, file, line, "an array that is not written stays as it was");
    }
    free(bits);
    return ok;
}

/* Runs it in one place from the content `old`, and holds it against what is expected, or, where first[i] holds bits,
   against them. */
static inline int test_op_run(test_op *t, mpt_context *ctx, unsigned char *const *old, unsigned char *const *first,
                              int same, double *const *expected, double *const *tolerance, const char *file, int line) {
    test_slot s[TEST_SLOTS];
    const int count = test_op_slots(t, s);
    int i, ok = 1;
    for (i = 0; i < count; i++)
        if (old[i])
            CHECK_OK(t->ctx, mpt_upload(t->ctx, t->tensor[i].array.data, old[i], test_tensor_bytes(&t->tensor[i])));
    ok &= test_check_result(ctx, test_op_call(ctx, t->kind, &t->op), MPT_OK, file, line, "the operation");
    for (i = 0; i < count; i++) {
        const size_t checked = test_slot_checked(&s[i]), bytes = checked * mpt_dtype_size(t->tensor[i].array.type);
        unsigned char *bits;
        if (!expected[i]) {
            ok &= test_op_unchanged(t, i, old[i], file, line);
            continue;
        }
        bits = (unsigned char *)test_memory(bytes);
        CHECK_OK(t->ctx, mpt_download(t->ctx, bits, t->tensor[i].array.data, bytes));
        if (same) {
            ok &= test_check(memcmp(bits, first[i], bytes) == 0, file, line, "the same bits on other threads");
        } else {
            memcpy(first[i], bits, bytes);
            test_tensor_download(&t->tensor[i]);
            ok &= test_check_all(t->tensor[i].value, checked, expected[i], tolerance[i], file, line, "the result");
        }
        free(bits);
    }
    return ok;
}

/* Every output, everywhere; the results stay in the arrays. What an output holds before is read only where it is kept,
   else it is NaN. */
static inline void test_op_check(test_op *t, const char *file, int line) {
    test_slot s[TEST_SLOTS];
    const int count = test_op_slots(t, s);
    double *expected[TEST_SLOTS] = {NULL}, *tolerance[TEST_SLOTS] = {NULL};
    unsigned char *old[TEST_SLOTS] = {NULL}, *first[TEST_SLOTS] = {NULL};
    int i, ok = 1;
    for (i = 0; i < count; i++) {
        const size_t bytes = t->tensor[i].value ? test_tensor_bytes(&t->tensor[i]) : 0;
        if (!t->tensor[i].value) continue;
        if (s[i].output && !s[i].kept) test_slot_poison(&s[i], &t->tensor[i], 0);
        old[i] = (unsigned char *)test_memory(bytes);
        CHECK_OK(t->ctx, mpt_download(t->ctx, old[i], t->tensor[i].array.data, bytes));
        if (!s[i].output || !test_slot_get(&t->op, &s[i]).data) continue;
        first[i] = (unsigned char *)test_memory(bytes);
        expected[i] = test_doubles(s[i].count);
        tolerance[i] = test_doubles(s[i].count);
    }
    test_op_expect(t, expected, tolerance);
    for (i = 0; i < test_place_count; i++)
        ok &= test_op_run(t, test_places[i].ctx, old, first, test_places[i].same, expected, tolerance, file, line);
    if (!ok) test_op_print(t);
    for (i = 0; i < TEST_SLOTS; i++) {
        free(expected[i]);
        free(tolerance[i]);
        free(old[i]);
        free(first[i]);
    }
}

#define CHECK_OP(t) test_op_check(t, __FILE__, __LINE__)

/* The whole life of an operation that is checked once. */
static inline void test_op_once(mpt_context *ctx, test_op_kind kind, const void *op, const char *file, int line) {
    test_op t = test_op_new(ctx, kind, op);
    test_op_check(&t, file, line);
    test_op_free(&t);
}

#define CHECK_ONCE(ctx, kind, op) test_op_once(ctx, kind, op, __FILE__, __LINE__)

#endif
