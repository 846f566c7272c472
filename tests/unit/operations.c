/* operations.c - floor 2: every operation, forward and backward, against the double loops of reference.h.

   Each runs on every instruction set of this machine, on 1, 2 and 4 threads; the bits must be the same for any number
   of threads. The gradients of the reference itself are checked against central differences. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include "../reference.h"
#include "../positional.h"

/* An engine is the default one or an instruction set. */
enum { DEFAULT, PLAIN, ENGINES = PLAIN + MPT_ISA_COUNT - MPT_ISA_PLAIN, THREADS = 3 };

static mpt_context *contexts[ENGINES][THREADS]; /* on 1, 4 and 2 threads; NULL: not on this machine, or not needed */
static mpt_context *context;                    /* the first of them; all tensors live in it */

static void open_all(void) {
    static const int threads[THREADS] = {1, 4, 2};
    int engine, i;
    for (engine = 0; engine < ENGINES; engine++)
        for (i = 0; i < (engine == DEFAULT ? THREADS : 2); i++) {
            mpt_context_desc desc = MPT_ZERO;
            desc.threads = threads[i];
            desc.isa = engine >= PLAIN ? (mpt_isa)(MPT_ISA_PLAIN + engine - PLAIN) : MPT_ISA_BEST;
            contexts[engine][i] = test_open(&desc);
        }
    context = contexts[DEFAULT][0];
}

static void close_all(void) {
    int engine, i;
    for (engine = 0; engine < ENGINES; engine++)
        for (i = 0; i < THREADS; i++) mpt_close(contexts[engine][i]);
}

static double *absolutes(const double *x, size_t n) {
    double *a = test_doubles(n);
    size_t i;
    for (i = 0; i < n; i++) a[i] = fabs(x[i]);
    return a;
}

/* ==== RUNNING ==== */

typedef mpt_result (*op_call)(mpt_context *ctx, const void *args, const test_tensor *t);

/* Runs an operation that writes *out in every context, always from the content that *out has now. The results must be
   near the expected ones, and the same bits for any number of threads. Leaves the old content in *out. */
static void check_op(const char *what, op_call call, const void *args, const test_tensor *t, test_tensor *out,
                     const double *expected, const double *tolerance) {
    const size_t bytes = test_tensor_bytes(out);
    unsigned char *old = (unsigned char *)test_memory(3 * bytes), *first = old + bytes, *result = first + bytes;
    int engine, i, ok = 1;
    CHECK_OK(context, mpt_download(context, old, out->array.data, bytes));
    for (engine = 0; engine < ENGINES; engine++)
        for (i = 0; i < THREADS && contexts[engine][i]; i++) {
            CHECK_OK(context, mpt_upload(context, out->array.data, old, bytes));
            ok &= CHECK_OK(contexts[engine][i], call(contexts[engine][i], args, t));
            CHECK_OK(context, mpt_download(context, i ? result : first, out->array.data, bytes));
            if (i) {
                ok &= CHECK(memcmp(first, result, bytes) == 0);
            } else {
                test_tensor_download(out);
                ok &= CHECK_ALL(out->value, out->count, expected, tolerance);
            }
        }
    if (!ok) printf("    in %s\n", what);
    CHECK_OK(context, mpt_upload(context, out->array.data, old, bytes));
    test_tensor_download(out);
    free(old);
}

static float nan_value(void) { return test_float(0x7fc00000u); }

/* ==== GEMM ==== */

typedef struct product {
    int trans_a, trans_b;
    size_t m, n, k, extra; /* extra: how much leading dimensions exceed the rows */
    float alpha, beta;
} product;

enum { A, B, C };

static size_t columns_a(const product *p) { return (p->trans_a ? p->m : p->k) + p->extra; }
static size_t columns_b(const product *p) { return (p->trans_b ? p->k : p->n) + p->extra; }
static size_t columns_c(const product *p) { return p->n + p->extra; }

static mpt_result call_gemm(mpt_context *ctx, const void *args, const test_tensor *t) {
    const product *p = (const product *)args;
    return mpt_gemm(ctx, p->trans_a, p->trans_b, p->m, p->n, p->k, p->alpha, t[A].array, columns_a(p), t[B].array,
                    columns_b(p), p->beta, t[C].array, columns_c(p));
}

/* NaN in columns [begin, end), so that reading them shows. */
static void poison_columns(test_tensor *t, size_t begin, size_t end, size_t columns) {
    size_t i;
    for (i = 0; i < t->count; i++)
        if (i % columns >= begin && i % columns < end) t->value[i] = (double)nan_value();
    test_tensor_upload(t);
}

static void expect_product(const product *p, const test_tensor *t, double *expected, double *tolerance) {
    const size_t lda = columns_a(p), ldb = columns_b(p), ldc = columns_c(p);
    const double alpha = (double)p->alpha;
    size_t i, j, l;
    for (i = 0; i < p->m * ldc; i++) expected[i] = t[C].value[i], tolerance[i] = 0; /* beyond the matrix: unchanged */
    for (i = 0; i < p->m; i++)
        for (j = 0; j < p->n; j++) {
            const double old = p->beta != 0 ? (double)p->beta * t[C].value[i * ldc + j] : 0;
            double sum = 0, magnitude = 0;
            for (l = 0; l < p->k; l++) {
                const double a = t[A].value[p->trans_a ? l * lda + i : i * lda + l];
                const double b = t[B].value[p->trans_b ? j * ldb + l : l * ldb + j];
                sum += a * b;
                magnitude += fabs(a * b);
            }
            expected[i * ldc + j] = alpha * sum + old;
            tolerance[i * ldc + j] =
                test_bound((double)p->k, fabs(alpha) * magnitude + fabs(old), expected[i * ldc + j], t[C].array.type);
        }
}

static void test_gemm(const product *p, mpt_dtype type_a, mpt_dtype type_b, mpt_dtype type_c) {
    double *expected = test_doubles(p->m * columns_c(p)), *tolerance = test_doubles(p->m * columns_c(p));
    test_tensor t[3];
    char what[128];
    t[A] = test_tensor_random(context, type_a, (p->trans_a ? p->k : p->m) * columns_a(p), 1);
    t[B] = test_tensor_random(context, type_b, (p->trans_b ? p->n : p->k) * columns_b(p), 2);
    t[C] = test_tensor_random(context, type_c, p->m * columns_c(p), 3);
    poison_columns(&t[A], columns_a(p) - p->extra, columns_a(p), columns_a(p));
    poison_columns(&t[B], columns_b(p) - p->extra, columns_b(p), columns_b(p));
    if (!(p->beta != 0)) poison_columns(&t[C], 0, p->n, columns_c(p));
    expect_product(p, t, expected, tolerance);
    snprintf(what, sizeof what, "gemm %d%d %lux%lux%lu of %s %s %s", p->trans_a, p->trans_b, (unsigned long)p->m,
             (unsigned long)p->n, (unsigned long)p->k, mpt_dtype_name(type_a), mpt_dtype_name(type_b),
             mpt_dtype_name(type_c));
    check_op(what, call_gemm, p, t, &t[C], expected, tolerance);
    free(expected), free(tolerance);
    test_tensor_free(&t[A]), test_tensor_free(&t[B]), test_tensor_free(&t[C]);
}

static void test_gemms(void) {
    static const size_t shapes[][3] = {{1, 1, 1},      {3, 5, 7},      {2, 3, 1},     {1, 33, 5},      {29, 1, 31},
                                       {17, 31, 13},   {64, 64, 64},   {5, 4, 300},   {129, 127, 257}, {200, 10, 784},
                                       {601, 263, 17}, {140, 601, 19}, {193, 5, 521}, {31, 199, 397},  {97, 64, 513},
                                       {193, 65, 512}, {193, 66, 513}, {7, 33, 1536}, {9, 35, 1541},   {577, 3, 4},
                                       {3, 257, 6},    {624, 32, 1544}};
    static const float factors[][2] = {{1, 0}, {-1.5f, 1}, {0.75f, -0.5f}, {1, 1}};
    size_t i;
    int trans, mix;
    product p;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (trans = 0; trans < 4; trans++) {
            p.trans_a = trans & 1, p.trans_b = trans >> 1;
            p.m = shapes[i][0], p.n = shapes[i][1], p.k = shapes[i][2];
            p.extra = (i + (size_t)trans) % 2 * 3;
            p.alpha = factors[((size_t)trans + i) % 4][0], p.beta = factors[((size_t)trans + i) % 4][1];
            test_gemm(&p, MPT_F32, MPT_F32, MPT_F32);
            test_gemm(&p, MPT_F16, MPT_F16, i % 2 ? MPT_F32 : MPT_F16);
            test_gemm(&p, MPT_BF16, MPT_BF16, i % 2 ? MPT_BF16 : MPT_F32);
        }
    for (mix = 0; mix < 27; mix++)
        for (trans = 0; trans < 4; trans++) {
            p.trans_a = trans & 1, p.trans_b = trans >> 1;
            p.m = 17, p.n = 31, p.k = 13, p.extra = 2, p.alpha = -1.5f, p.beta = 0.5f;
            test_gemm(&p, (mpt_dtype)(mix % 3), (mpt_dtype)(mix / 3 % 3), (mpt_dtype)(mix / 9));
        }
}

/* k = 0: c = beta c. alpha = 0 likewise. m or n = 0: nothing, whatever the pointers. */
static void test_gemm_empty(void) {
    test_tensor c = test_tensor_random(context, MPT_F32, 6, 4);
    const mpt_array null = mpt_f32_array(NULL);
    const double before = c.value[5];
    CHECK_OK(context, mpt_gemm(context, 0, 0, 2, 3, 0, 1, c.array, 1, c.array, 3, 0.5f, c.array, 3));
    test_tensor_download(&c);
    CHECK_NEAR(c.value[5], before / 2, 0);
    CHECK_OK(context, mpt_gemm(context, 0, 0, 0, 3, 5, 1, null, 5, null, 3, 0, null, 3));
    CHECK_OK(context, mpt_gemm(context, 0, 0, 2, 0, 5, 1, null, 5, null, 1, 0, null, 1));
    CHECK_OK(context, mpt_gemm(context, 0, 0, 2, 3, 0, 1, c.array, 1, c.array, 3, 0, c.array, 3));
    test_tensor_download(&c);
    CHECK_EQUAL(c.value[5], 0);
    test_tensor_free(&c);
}

/* ==== LINEAR AND CONVOLUTION ====

   A linear layer is the 1x1 convolution of 1x1 images; the tests are the same. */

typedef struct layer {
    int linear;
    mpt_conv2d_shape s;
    size_t P, Q;
    int biased;
    mpt_activation act;
    float beta;
} layer;

enum { X, W, BIAS, Y };

static mpt_result call_forward(mpt_context *ctx, const void *args, const test_tensor *t) {
    const layer *l = (const layer *)args;
    const mpt_array bias = l->biased ? t[BIAS].array : mpt_f32_array(NULL);
    if (l->linear)
        return mpt_linear_forward(ctx, l->s.N, l->s.C, l->s.K, t[X].array, t[W].array, bias, l->act, t[Y].array);
    return mpt_conv2d_forward(ctx, &l->s, t[X].array, t[W].array, bias, l->act, t[Y].array);
}

static mpt_result call_backward_data(mpt_context *ctx, const void *args, const test_tensor *t) {
    const layer *l = (const layer *)args;
    if (l->linear)
        return mpt_linear_backward_data(ctx, l->s.N, l->s.C, l->s.K, t[Y].array, t[W].array, l->beta, t[X].array);
    return mpt_conv2d_backward_data(ctx, &l->s, t[Y].array, t[W].array, l->beta, t[X].array);
}

static mpt_result call_backward_weight(mpt_context *ctx, const void *args, const test_tensor *t) {
    const layer *l = (const layer *)args;
    if (l->linear)
        return mpt_linear_backward_weight(ctx, l->s.N, l->s.C, l->s.K, t[Y].array, t[X].array, l->beta, t[W].array);
    return mpt_conv2d_backward_weight(ctx, &l->s, t[Y].array, t[X].array, l->beta, t[W].array);
}

static mpt_result call_backward_bias(mpt_context *ctx, const void *args, const test_tensor *t) {
    const layer *l = (const layer *)args;
    return mpt_bias_backward(ctx, l->s.N * l->P * l->Q, l->s.K, t[Y].array, l->beta, t[BIAS].array);
}

static const op_call layer_calls[] = {call_forward, call_backward_data, call_backward_weight, call_backward_bias};
static const char *const layer_names[] = {"forward", "backward_data", "backward_weight", "backward_bias"};
enum { BACKWARD_BIAS = MPT_BACKWARD_WEIGHT + 1 };

static size_t outputs(const layer *l) { return l->s.N * l->P * l->Q * l->s.K; }

/* The sums that a pass makes, added to out; x, w, b, y are the values or their magnitudes. */
static void layer_sums(const layer *l, int pass, double *x, double *w, double *b, double *y) {
    size_t i;
    if (pass != BACKWARD_BIAS) reference_conv2d((mpt_pass)pass, &l->s, l->P, l->Q, x, w, y);
    for (i = 0; i < outputs(l); i++) {
        if (pass == MPT_FORWARD && l->biased) y[i] += b[i % l->s.K];
        if (pass == BACKWARD_BIAS) b[i % l->s.K] += y[i];
    }
}

/* Most products that one element of the pass adds up. */
static double layer_terms(const layer *l, int pass) {
    const mpt_conv2d_shape *s = &l->s;
    if (pass == MPT_FORWARD) return (double)(s->R * s->S * s->C / s->groups + 1);
    if (pass == MPT_BACKWARD_DATA) return (double)(s->R * s->S * s->K / s->groups);
    return (double)(s->N * l->P * l->Q);
}

static void test_layer_pass(const layer *l, int pass, test_tensor *t) {
    static const int written[] = {Y, X, W, BIAS};
    test_tensor *out = &t[written[pass]];
    double *expected = test_doubles(out->count), *magnitude = test_doubles(out->count), *values[4], *sizes[4];
    const int keeps = pass != MPT_FORWARD && l->beta != 0;
    size_t i;
    int j;
    char what[128];
    for (j = 0; j < 4; j++) values[j] = t[j].value, sizes[j] = absolutes(t[j].value, t[j].count);
    for (i = 0; keeps && i < out->count; i++) {
        expected[i] = (double)l->beta * out->value[i];
        magnitude[i] = fabs(expected[i]);
    }
    values[written[pass]] = expected;
    free(sizes[written[pass]]), sizes[written[pass]] = magnitude;
    layer_sums(l, pass, values[X], values[W], values[BIAS], values[Y]);
    layer_sums(l, pass, sizes[X], sizes[W], sizes[BIAS], sizes[Y]);
    for (i = 0; i < out->count; i++) {
        if (pass == MPT_FORWARD && l->act == MPT_RELU && expected[i] < 0) expected[i] = 0;
        magnitude[i] = test_bound(layer_terms(l, pass), magnitude[i], expected[i], out->array.type);
    }
    snprintf(what, sizeof what, "%s %s of %s %s %s, N %lu H %lu W %lu C %lu K %lu R %lu S %lu groups %lu",
             l->linear ? "linear" : "conv2d", layer_names[pass], mpt_dtype_name(t[X].array.type),
             mpt_dtype_name(t[W].array.type), mpt_dtype_name(t[Y].array.type), (unsigned long)l->s.N,
             (unsigned long)l->s.H, (unsigned long)l->s.W, (unsigned long)l->s.C, (unsigned long)l->s.K,
             (unsigned long)l->s.R, (unsigned long)l->s.S, (unsigned long)l->s.groups);
    if (!keeps) test_tensor_poison(out);
    check_op(what, layer_calls[pass], l, t, out, expected, magnitude);
    if (!keeps) test_tensor_fill(out, -1, 1, 77);
    free(expected);
    for (j = 0; j < 4; j++) free(sizes[j]); /* magnitude is one of them */
}

static void test_layer(layer l, mpt_dtype type_x, mpt_dtype type_w, mpt_dtype type_y) {
    test_tensor t[4];
    int pass, j;
    if (l.linear) l.P = l.Q = 1;
    else CHECK_OK(context, mpt_conv2d_output(context, &l.s, &l.P, &l.Q));
    t[X] = test_tensor_random(context, type_x, l.s.N * l.s.H * l.s.W * l.s.C, 1);
    t[W] = test_tensor_random(context, type_w, l.s.K * l.s.R * l.s.S * l.s.C / l.s.groups, 2);
    t[BIAS] = test_tensor_random(context, type_w, l.s.K, 3);
    t[Y] = test_tensor_random(context, type_y, outputs(&l), 4);
    for (pass = MPT_FORWARD; pass <= BACKWARD_BIAS; pass++) {
        test_layer_pass(&l, pass, t);
        l.biased = !l.biased, l.act = l.act ? MPT_IDENTITY : MPT_RELU, l.beta = l.beta != 0 ? 0 : -0.75f;
        test_layer_pass(&l, pass, t);
    }
    for (j = 0; j < 4; j++) test_tensor_free(&t[j]);
}

static layer make_layer(int linear, const size_t *s) {
    layer l = MPT_ZERO;
    l.linear = linear, l.biased = 1;
    l.s.N = s[0], l.s.H = s[1], l.s.W = s[2], l.s.C = s[3], l.s.K = s[4], l.s.R = s[5], l.s.S = s[6];
    l.s.stride = s[7], l.s.padding = s[8], l.s.dilation = s[9], l.s.groups = s[10];
    return l;
}

/* N H W C K R S stride padding dilation groups: few, as many as channels (depthwise), with several filters each */
static const size_t conv_shapes[][11] = {
    {1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1},        {2, 5, 7, 3, 4, 3, 3, 1, 1, 1, 1},
    {1, 8, 8, 1, 16, 3, 3, 1, 1, 1, 1},       {2, 9, 6, 5, 7, 3, 2, 2, 1, 1, 1},
    {1, 7, 7, 2, 3, 1, 1, 1, 0, 1, 1},        {2, 6, 5, 4, 5, 1, 1, 2, 0, 1, 1},
    {1, 11, 9, 3, 2, 3, 3, 1, 2, 2, 1},       {1, 10, 10, 2, 3, 5, 5, 3, 2, 1, 1},
    {3, 4, 4, 17, 19, 3, 3, 1, 1, 1, 1},      {1, 3, 3, 2, 2, 3, 3, 1, 0, 1, 1},
    {1, 2, 2, 3, 2, 3, 3, 1, 1, 1, 1},        {1, 12, 5, 3, 4, 7, 1, 1, 3, 1, 1},
    {1, 5, 5, 2, 3, 3, 3, 0, 1, 0, 1},        {2, 13, 11, 3, 9, 4, 3, 2, 3, 3, 1},
    {1, 1, 17, 5, 3, 1, 5, 2, 0, 2, 1},       {2, 6, 5, 4, 6, 3, 3, 1, 1, 1, 2},
    {1, 7, 9, 9, 15, 3, 2, 2, 1, 1, 3},       {2, 5, 4, 7, 7, 1, 1, 1, 0, 1, 7},
    {1, 8, 8, 5, 10, 3, 3, 1, 1, 1, 5},       {1, 6, 6, 8, 4, 3, 3, 1, 1, 1, 4},
    {1, 11, 11, 3, 3, 5, 5, 2, 2, 2, 3},      {2, 9, 7, 37, 37, 3, 3, 1, 1, 1, 37},
    {1, 21, 21, 34, 34, 17, 17, 3, 0, 1, 34}, {1, 2, 2, 2, 2, 3, 3, 1, 1, 1, 2},
    {2, 1, 1, 2, 3, 3, 3, 1, 1, 1, 1},        {1, 1, 2, 3, 2, 5, 5, 1, 2, 1, 1},
    {2, 13, 11, 66, 44, 3, 3, 1, 1, 1, 11},   {4, 14, 14, 100, 100, 3, 3, 2, 1, 1, 100},
    {4, 14, 14, 16, 32, 3, 3, 1, 1, 1, 1},    {1, 9, 7, 3, 211, 3, 3, 1, 1, 1, 1},
    {1, 5, 7, 67, 5, 3, 3, 1, 1, 1, 1},
};
enum { CONV_SHAPES = sizeof conv_shapes / sizeof *conv_shapes, LARGE_SHAPES = 5, GROUPED = 15, DEPTHWISE = 20 };

/* N I O of linear layers */
static const size_t linear_shapes[][3] = {{1, 1, 1},   {3, 5, 7},     {31, 17, 13},
                                          {1, 64, 10}, {65, 129, 33}, {32, 784, 10}};
enum { LINEAR_SHAPES = sizeof linear_shapes / sizeof *linear_shapes, SHAPES = CONV_SHAPES + LINEAR_SHAPES };

static void test_layers(void) {
    int i, mix;
    for (i = 0; i < SHAPES; i++) {
        size_t s[11] = {0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1};
        layer l;
        if (i < CONV_SHAPES) l = make_layer(0, conv_shapes[i]);
        else {
            s[0] = linear_shapes[i - CONV_SHAPES][0], s[3] = linear_shapes[i - CONV_SHAPES][1];
            s[4] = linear_shapes[i - CONV_SHAPES][2];
            l = make_layer(1, s);
        }
        test_layer(l, MPT_F32, MPT_F32, MPT_F32);
        test_layer(l, MPT_F16, MPT_F16, i % 2 ? MPT_F16 : MPT_F32);
        test_layer(l, MPT_BF16, MPT_BF16, i % 2 ? MPT_F32 : MPT_BF16);
    }
    for (mix = 0; mix < 3 * 27; mix++) {
        static const int shapes[] = {1, GROUPED, DEPTHWISE};
        const layer l = make_layer(0, conv_shapes[shapes[mix / 27]]);
        test_layer(l, (mpt_dtype)(mix % 3), (mpt_dtype)(mix / 3 % 3), (mpt_dtype)(mix / 9 % 3));
    }
}

/* The CPU engine's limits, a shape on either side of each: outputs of a band, of a line and of many images; words of a
   halo by channels, columns or taps; words of a part; taps and channels of a block of dw; filters of a block. */
static const size_t limit_shapes[][11] = {
    {1, 3, 578, 2, 3, 3, 3, 1, 0, 1, 1},       {1, 3, 579, 2, 3, 3, 3, 1, 0, 1, 1},     /* 576 outputs in a line, 577 */
    {1, 1, 1203, 1, 2, 1, 4, 1, 1, 1, 1},                                               /* 1202 */
    {36, 4, 4, 3, 5, 3, 3, 1, 1, 1, 1},        {37, 4, 4, 3, 5, 3, 3, 1, 1, 1, 1},      /* 36 images in a band */
    {3, 7, 7, 3, 5, 3, 3, 1, 1, 1, 1},         {1, 25, 23, 5, 3, 3, 3, 1, 1, 1, 1},     /* all lines, some */
    {1, 34, 48, 34, 3, 3, 3, 1, 0, 16, 1},     {1, 34, 48, 36, 3, 3, 3, 1, 0, 16, 1},   /* a halo's channels */
    {1, 34, 600, 2, 2, 3, 3, 1, 0, 16, 1},     {1, 33, 600, 4, 2, 3, 3, 1, 0, 16, 1},   /* columns */
    {1, 202, 217, 1, 2, 3, 3, 1, 0, 100, 1},   {1, 242, 257, 1, 2, 3, 3, 1, 0, 120, 1}, /* tap rows */
    {1, 1, 60020, 1, 2, 1, 2, 1, 0, 60000, 1},                                          /* taps of a row */
    {1, 4, 4, 170, 5, 3, 3, 1, 1, 1, 1},       {1, 4, 4, 171, 5, 3, 3, 1, 1, 1, 1},     /* 1536 words of a part */
    {1, 3, 4, 512, 40, 3, 3, 1, 1, 1, 1},      {1, 4, 3, 7, 512, 3, 3, 1, 1, 1, 1}, /* far more, forward and backward */
    {1, 40, 41, 1, 2, 39, 39, 1, 0, 1, 1},     {1, 41, 42, 1, 2, 40, 40, 1, 0, 1, 1}, /* taps alone */
    {1, 27, 26, 2, 2, 24, 24, 1, 0, 1, 1},     {1, 27, 26, 2, 2, 25, 25, 1, 0, 1, 1}, /* 576 taps of dw */
    {2, 5, 5, 64, 7, 3, 3, 1, 1, 1, 1},        {2, 5, 5, 65, 7, 3, 3, 1, 1, 1, 1},    /* and with channels */
    {1, 5, 5, 3, 256, 3, 3, 1, 1, 1, 1},       {1, 5, 5, 3, 257, 3, 3, 2, 1, 1, 1},   /* filters */
    {1, 41, 41, 39, 39, 3, 3, 1, 0, 20, 39},   {1, 44, 43, 3, 3, 3, 3, 1, 0, 21, 3},  /* a depthwise halo */
    {1, 40, 40, 3, 3, 39, 39, 1, 0, 1, 3},     {1, 42, 41, 3, 3, 40, 40, 1, 0, 1, 3}, /* depthwise taps */
    {1, 1, 70001, 1, 2, 1, 3, 35000, 0, 1, 1}, {1, 2, 2, 3, 2, 3, 3, 7, 9, 2, 1},     /* a stride beyond all */
};

static void test_layer_limits(void) {
    size_t i;
    for (i = 0; i < sizeof limit_shapes / sizeof *limit_shapes; i++) {
        const layer l = make_layer(0, limit_shapes[i]);
        test_layer(l, MPT_F32, MPT_F32, MPT_F32);
        test_layer(l, MPT_BF16, MPT_BF16, MPT_BF16);
        if (i % 3 == 0) test_layer(l, MPT_F16, MPT_F16, MPT_F16);
    }
}

/* dw where the image has an inf in its last column, which only the last tap of a kernel row reads: the other taps stay
   finite, also where an odd number of outputs is multiplied in pairs. */
static void check_beside_inf(size_t width, size_t S, size_t stride) {
    mpt_conv2d_shape s = MPT_ZERO;
    test_tensor x, dy, dw;
    size_t P, Q, i;
    int engine;
    s.N = 2, s.H = 3, s.W = width, s.C = 3, s.K = 5, s.R = 1, s.S = S, s.stride = stride;
    CHECK_OK(context, mpt_conv2d_output(context, &s, &P, &Q));
    CHECK_EQUAL((Q - 1) * stride + S, width);
    x = test_tensor_random(context, MPT_BF16, s.N * s.H * width * s.C, 1);
    dy = test_tensor_random(context, MPT_BF16, s.N * P * Q * s.K, 2);
    dw = test_tensor_random(context, MPT_F32, s.K * S * s.C, 3);
    for (i = 0; i < x.count; i++)
        if (i / s.C % width == width - 1) x.value[i] = (double)test_float(0x7f800000u);
    test_tensor_upload(&x);
    for (engine = 0; engine < ENGINES; engine++) {
        if (!contexts[engine][0]) continue;
        CHECK_OK(context, mpt_conv2d_backward_weight(contexts[engine][0], &s, dy.array, x.array, 0, dw.array));
        test_tensor_download(&dw);
        for (i = 0; i < dw.count; i++) CHECK(test_is_finite(dw.value[i]) == (i / s.C % S != S - 1));
    }
    test_tensor_free(&x), test_tensor_free(&dy), test_tensor_free(&dw);
}

static void test_beside_inf(void) {
    size_t Q, S, stride;
    for (Q = 1; Q < 8; Q++)
        for (S = 1; S < 5; S++)
            for (stride = 1; stride < 3; stride++) check_beside_inf((Q - 1) * stride + S, S, stride);
    check_beside_inf(603, 3, 1);
}

/* Sums over many outputs: those of a bias are double and rounded once, those of a depthwise filter fp32 over eight
   outputs, and double over these. All values are above 0, so that nothing hides. */
static void test_long_sums(void) {
    static const size_t shape[11] = {1, 224, 224, 3, 3, 3, 3, 1, 1, 1, 3};
    const double u = test_unit(MPT_F32);
    const size_t rows = 1000003;
    layer l = make_layer(0, shape), bias = MPT_ZERO;
    test_tensor t[4];
    double *expected = test_doubles(27), *tolerance = test_doubles(27);
    size_t i;
    l.P = l.Q = 224;
    t[X] = test_tensor_random(context, MPT_F32, 224 * 224 * 3, 1), test_tensor_fill(&t[X], 0.5, 1.5, 1);
    t[Y] = test_tensor_random(context, MPT_F32, 224 * 224 * 3, 2), test_tensor_fill(&t[Y], 0.5, 1.5, 2);
    t[W] = test_tensor_random(context, MPT_F32, 27, 3);
    reference_conv2d(MPT_BACKWARD_WEIGHT, &l.s, 224, 224, t[X].value, expected, t[Y].value);
    for (i = 0; i < 27; i++) tolerance[i] = 9 * u * expected[i];
    check_op("depthwise dw of a large image", call_backward_weight, &l, t, &t[W], expected, tolerance);
    test_tensor_free(&t[X]), test_tensor_free(&t[Y]), test_tensor_free(&t[W]);
    bias.linear = 1, bias.s.N = rows, bias.s.K = 3, bias.P = bias.Q = 1;
    t[Y] = test_tensor_random(context, MPT_F32, rows * 3, 2), test_tensor_fill(&t[Y], 1e4 - 1, 1e4 + 1, 2);
    t[BIAS] = test_tensor_random(context, MPT_F32, 3, 3);
    memset(expected, 0, 3 * sizeof *expected);
    for (i = 0; i < t[Y].count; i++) expected[i % 3] += t[Y].value[i];
    for (i = 0; i < 3; i++) tolerance[i] = (u + (double)rows * ldexp(1, -53)) * expected[i];
    check_op("bias of a million rows", call_backward_bias, &bias, t, &t[BIAS], expected, tolerance);
    test_tensor_free(&t[Y]), test_tensor_free(&t[BIAS]);
    free(expected), free(tolerance);
}

/* The reference itself: its gradients are the slopes of sum(dy * y). That is linear in each variable, so a step of 1
   has no truncation error; 1e-11 covers the rounding of some thousand products in double. */
typedef struct objective {
    const layer *l;
    double *v[4], *y;
} objective;

static double layer_objective(void *user) {
    const objective *o = (const objective *)user;
    const size_t n = outputs(o->l);
    double sum = 0;
    size_t i;
    memset(o->y, 0, n * sizeof *o->y);
    layer_sums(o->l, MPT_FORWARD, o->v[X], o->v[W], o->v[BIAS], o->y);
    for (i = 0; i < n; i++) sum += o->y[i] * o->v[Y][i];
    return sum;
}

static void test_reference_layer(layer l) {
    size_t counts[4], i;
    objective o;
    int j;
    l.act = MPT_IDENTITY;
    CHECK_OK(context, mpt_conv2d_output(context, &l.s, &l.P, &l.Q));
    counts[X] = l.s.N * l.s.H * l.s.W * l.s.C, counts[BIAS] = l.s.K;
    counts[W] = l.s.K * l.s.R * l.s.S * l.s.C / l.s.groups;
    counts[Y] = outputs(&l);
    o.l = &l, o.y = test_doubles(counts[Y]);
    for (j = 0; j < 4; j++) {
        o.v[j] = test_doubles(counts[j]);
        for (i = 0; i < counts[j]; i++) o.v[j][i] = test_uniform(-1, 1, (uint64_t)j, i);
    }
    for (j = X; j <= BIAS; j++) {
        double *gradient = test_doubles(counts[j]), *kept = o.v[j];
        o.v[j] = gradient;
        layer_sums(&l, j + 1, o.v[X], o.v[W], o.v[BIAS], o.v[Y]);
        o.v[j] = kept;
        for (i = 0; i < counts[j]; i += 1 + counts[j] / 23)
            CHECK_NEAR(gradient[i], reference_slope(layer_objective, &o, &o.v[j][i], 1), 1e-11);
        free(gradient);
    }
    for (j = 0; j < 4; j++) free(o.v[j]);
    free(o.y);
}

static void test_conv2d_output(void) {
    mpt_conv2d_shape s = make_layer(0, conv_shapes[13]).s;
    size_t P = 7, Q = 7;
    CHECK_OK(context, mpt_conv2d_output(context, &s, &P, &Q));
    CHECK_EQUAL(P, (13 + 6 - 3 * 3 - 1) / 2 + 1);
    CHECK_EQUAL(Q, (11 + 6 - 3 * 2 - 1) / 2 + 1);
    s.H = 2, s.padding = 1, s.dilation = 2, s.R = 3; /* 5 high on 4 */
    CHECK_ERROR(context, mpt_conv2d_output(context, &s, &P, &Q), MPT_ERROR_SHAPE, "kernel");
    CHECK(P == 0 && Q == 0);
    CHECK(mpt_conv2d_output(NULL, &s, &P, &Q) == MPT_ERROR_SHAPE);
    CHECK(mpt_conv2d_output(context, NULL, &P, &Q) == MPT_ERROR_ARGUMENT);
    CHECK(mpt_conv2d_output(context, &s, NULL, &Q) == MPT_ERROR_ARGUMENT);
}

/* ==== POOLING ==== */

typedef struct pooling {
    mpt_pool_kind kind;
    mpt_pool2d_shape s;
    size_t P, Q;
    uint16_t *index; /* device */
    float beta;
} pooling;

static mpt_result call_pool_forward(mpt_context *ctx, const void *args, const test_tensor *t) {
    const pooling *p = (const pooling *)args;
    return mpt_pool2d_forward(ctx, p->kind, &p->s, t[0].array, t[1].array, p->index);
}

static mpt_result call_pool_backward(mpt_context *ctx, const void *args, const test_tensor *t) {
    const pooling *p = (const pooling *)args;
    return mpt_pool2d_backward(ctx, p->kind, &p->s, t[1].array, p->index, p->beta, t[0].array);
}

typedef struct pool_gradient {
    const pooling *p;
    const long *place;
    const double *dy;
    double *dx, *magnitude, area;
} pool_gradient;

static void pool_gradient_visit(void *user, size_t in, size_t out, size_t place) {
    pool_gradient *g = (pool_gradient *)user;
    double share = g->p->kind == MPT_POOL_AVERAGE ? 1 / g->area : 0;
    if (g->p->kind == MPT_POOL_MAX && g->place[out] == (long)place) share = 1;
    g->dx[in] += share * g->dy[out];
    g->magnitude[in] += fabs(share * g->dy[out]);
}

static void check_index(const pooling *p, const long *place, size_t n) {
    uint16_t *index = (uint16_t *)test_memory(n * sizeof *index);
    size_t i, wrong = 0;
    CHECK_OK(context, mpt_download(context, index, p->index, n * sizeof *index));
    for (i = 0; i < n; i++) wrong += (long)index[i] != place[i];
    CHECK_EQUAL(wrong, 0);
    free(index);
}

static void test_pool_forward(const pooling *p, test_tensor *t, long *place) {
    const double area = (double)(p->s.R * p->s.S);
    double *expected = test_doubles(t[1].count), *tolerance = test_doubles(t[1].count);
    double *sizes = absolutes(t[0].value, t[0].count);
    size_t i;
    if (p->kind == MPT_POOL_AVERAGE) reference_pool2d(p->kind, &p->s, p->P, p->Q, sizes, tolerance, place);
    reference_pool2d(p->kind, &p->s, p->P, p->Q, t[0].value, expected, place);
    for (i = 0; i < t[1].count && p->kind == MPT_POOL_AVERAGE; i++)
        tolerance[i] = test_bound(area, tolerance[i], expected[i], t[1].array.type);
    test_tensor_poison(&t[1]);
    check_op("pool forward", call_pool_forward, p, t, &t[1], expected, tolerance); /* max: exact */
    if (p->kind == MPT_POOL_MAX) check_index(p, place, t[1].count);
    free(expected), free(tolerance), free(sizes);
}

/* The gradient below is the slope of sum(dy * y): of average pooling, which is linear, for any step; of max pooling for
   a step too small to change which element is the largest, 2^-30, which costs 2^-23 of the objective's size. */
typedef struct pool_objective {
    const pooling *p;
    const test_tensor *t;
    double *y;
    long *place;
} pool_objective;

static double pool_value(void *user) {
    const pool_objective *o = (const pool_objective *)user;
    double sum = 0;
    size_t i;
    reference_pool2d(o->p->kind, &o->p->s, o->p->P, o->p->Q, o->t[0].value, o->y, o->place);
    for (i = 0; i < o->t[1].count; i++) sum += o->y[i] * o->t[1].value[i];
    return sum;
}

static void test_reference_pool(const pooling *p, const test_tensor *t, const double *dx) {
    pool_objective o;
    double sizes = 0;
    size_t i;
    o.p = p, o.t = t, o.y = test_doubles(t[1].count), o.place = (long *)test_memory(t[1].count * sizeof *o.place);
    for (i = 0; i < t[1].count; i++) sizes += fabs(t[1].value[i]);
    for (i = 0; i < t[0].count; i += 1 + t[0].count / 11)
        CHECK_NEAR(dx[i], reference_slope(pool_value, &o, &t[0].value[i], ldexp(1, -30)), ldexp(sizes, -23));
    free(o.y), free(o.place);
}

static void test_pool_backward(const pooling *p, test_tensor *t, const long *place) {
    const double windows = (double)(p->s.R * p->s.S); /* that an element lies in, at most */
    pool_gradient g;
    size_t i;
    test_tensor_fill(&t[1], -1, 1, 9);
    g.p = p, g.place = place, g.dy = t[1].value, g.area = windows;
    g.dx = test_doubles(t[0].count), g.magnitude = test_doubles(t[0].count);
    for (i = 0; i < t[0].count && p->beta != 0; i++) {
        g.dx[i] = (double)p->beta * t[0].value[i];
        g.magnitude[i] = fabs(g.dx[i]);
    }
    reference_windows(&p->s, p->P, p->Q, pool_gradient_visit, &g);
    if (!(p->beta != 0) && t[0].array.type == MPT_F32) test_reference_pool(p, t, g.dx); /* fp32: no two are equal */
    for (i = 0; i < t[0].count; i++) g.magnitude[i] = test_bound(windows, g.magnitude[i], g.dx[i], t[0].array.type);
    if (!(p->beta != 0)) test_tensor_poison(&t[0]);
    check_op("pool backward", call_pool_backward, p, t, &t[0], g.dx, g.magnitude);
    free(g.dx), free(g.magnitude);
}

static void test_pool(pooling p, mpt_dtype type) {
    test_tensor t[2];
    long *place;
    CHECK_OK(context, mpt_pool2d_output(context, &p.s, &p.P, &p.Q));
    t[0] = test_tensor_random(context, type, p.s.N * p.s.H * p.s.W * p.s.C, 5);
    t[1] = test_tensor_random(context, type, p.s.N * p.P * p.Q * p.s.C, 6);
    place = (long *)test_memory(t[1].count * sizeof *place);
    p.index = (uint16_t *)mpt_alloc(context, t[1].count * sizeof *p.index);
    test_pool_forward(&p, t, place);
    p.beta = 0.5f;
    test_pool_backward(&p, t, place);
    p.beta = 0;
    test_pool_backward(&p, t, place);
    mpt_free(context, p.index);
    free(place);
    test_tensor_free(&t[0]), test_tensor_free(&t[1]);
}

static void test_pools(void) {
    static const size_t shapes[][8] = {
        {1, 4, 4, 1, 2, 2, 0, 0}, {2, 7, 5, 3, 3, 2, 2, 1},  {1, 6, 6, 5, 3, 3, 1, 1},
        {2, 5, 4, 7, 5, 4, 0, 0}, {1, 9, 9, 2, 2, 2, 3, 0},  {1, 5, 5, 3, 1, 1, 1, 0},
        {3, 7, 8, 2, 2, 3, 0, 1}, {2, 5, 6, 45, 2, 3, 1, 1}, {8, 32, 32, 17, 3, 3, 2, 1}};
    size_t i;
    int type, kind;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (type = MPT_F32; type <= MPT_BF16; type++)
            for (kind = MPT_POOL_MAX; kind <= MPT_POOL_AVERAGE; kind++) {
                const size_t *s = shapes[i];
                pooling p = MPT_ZERO;
                p.kind = (mpt_pool_kind)kind;
                p.s.N = s[0], p.s.H = s[1], p.s.W = s[2], p.s.C = s[3], p.s.R = s[4], p.s.S = s[5];
                p.s.stride = s[6], p.s.padding = s[7];
                test_pool(p, (mpt_dtype)type);
            }
}

/* Max pooling over one window of two values. */
static void check_window(float first, float second, float expected, int place) {
    mpt_pool2d_shape s = MPT_ZERO;
    test_tensor x = test_tensor_new(context, MPT_F16, 2), y = test_tensor_new(context, MPT_F16, 1);
    uint16_t *device = (uint16_t *)mpt_alloc(context, sizeof *device), index = 99;
    s.N = s.C = s.H = s.R = 1, s.W = s.S = 2;
    x.value[0] = (double)first, x.value[1] = (double)second;
    test_tensor_upload(&x);
    CHECK_OK(context, mpt_pool2d_forward(context, MPT_POOL_MAX, &s, x.array, y.array, device));
    CHECK_OK(context, mpt_download(context, &index, device, sizeof index));
    test_tensor_download(&y);
    CHECK_EQUAL(index, place);
    CHECK(test_bits((float)y.value[0]) == test_bits(expected));
    mpt_free(context, device);
    test_tensor_free(&x), test_tensor_free(&y);
}

static void test_pool_specials(void) {
    const float inf = test_float(0x7f800000u), nan = nan_value();
    check_window(1, 2, 2, 1);
    check_window(2, 2, 2, 0); /* the first of equals */
    check_window(-inf, -inf, -inf, 0);
    check_window(-inf, -1, -1, 1);
    check_window(nan, inf, nan, 0); /* NaN counts as largest, the first of them first */
    check_window(inf, nan, nan, 1);
    check_window(nan, nan, nan, 0);
}

/* The largest stride allowed: one output, from the first window, in all three passes. */
/* Of a row with a NaN none is the largest: it does not count as right. */
static void test_nan_row(void) {
    test_tensor x = test_tensor_new(context, MPT_F32, 6);
    const int32_t labels[2] = {2, 2};
    int32_t *device = (int32_t *)mpt_alloc(context, sizeof labels);
    mpt_loss_sum *sum = (mpt_loss_sum *)mpt_alloc(context, sizeof *sum), out = MPT_ZERO;
    const mpt_array none = MPT_ZERO;
    size_t i;
    for (i = 0; i < 6; i++) x.value[i] = i % 3 == 2 ? 5 : 1;
    x.value[1] = (double)nan_value();
    test_tensor_upload(&x);
    CHECK_OK(context, mpt_upload(context, device, labels, sizeof labels));
    CHECK_OK(context, mpt_cross_entropy(context, NULL, 2, 3, x.array, device, 1, NULL, none, sum));
    CHECK_OK(context, mpt_download(context, &out, sum, sizeof out));
    CHECK_EQUAL(out.rows, 2);
    CHECK_EQUAL(out.correct, 1);
    mpt_free(context, device), mpt_free(context, sum);
    test_tensor_free(&x);
}

static void test_huge_stride(void) {
    mpt_conv2d_shape s = MPT_ZERO;
    mpt_pool2d_shape p = MPT_ZERO;
    test_tensor x = test_tensor_random(context, MPT_F32, 16, 1), w = test_tensor_random(context, MPT_F32, 9, 2);
    test_tensor y = test_tensor_random(context, MPT_F32, 1, 3), out = test_tensor_new(context, MPT_F32, 16);
    double sum = 0;
    size_t P, Q, i;
    s.N = s.C = s.K = 1, s.H = s.W = 4, s.R = s.S = 3, s.stride = 0x7fffffff;
    CHECK_OK(context, mpt_conv2d_output(context, &s, &P, &Q));
    CHECK(P == 1 && Q == 1);
    CHECK_OK(context, mpt_conv2d_backward_weight(context, &s, y.array, x.array, 0, out.array));
    test_tensor_download(&out);
    for (i = 0; i < 9; i++) CHECK_NEAR(out.value[i], y.value[0] * x.value[i / 3 * 4 + i % 3], 4 * test_unit(MPT_F32));
    CHECK_OK(context, mpt_conv2d_backward_data(context, &s, y.array, w.array, 0, out.array));
    test_tensor_download(&out);
    for (i = 0; i < 16; i++)
        CHECK_NEAR(out.value[i], i / 4 < 3 && i % 4 < 3 ? y.value[0] * w.value[i / 4 * 3 + i % 4] : 0,
                   4 * test_unit(MPT_F32));
    p.N = p.C = 1, p.H = p.W = 4, p.R = p.S = 3, p.stride = 0x7fffffff;
    CHECK_OK(context, mpt_pool2d_forward(context, MPT_POOL_AVERAGE, &p, x.array, out.array, NULL));
    test_tensor_download(&out);
    for (i = 0; i < 9; i++) sum += x.value[i / 3 * 4 + i % 3] / 9;
    CHECK_NEAR(out.value[0], sum, 16 * test_unit(MPT_F32));
    test_tensor_free(&x), test_tensor_free(&w), test_tensor_free(&y), test_tensor_free(&out);
}

static void test_pool_errors(void) {
    mpt_pool2d_shape s = MPT_ZERO;
    size_t P, Q;
    test_tensor x = test_tensor_new(context, MPT_F32, 16), y = test_tensor_new(context, MPT_F16, 16);
    uint16_t index[4] = {0, 0, 0, 0};
    s.N = s.C = 1, s.H = s.W = 4, s.R = s.S = 2;
    CHECK_ERROR(context, mpt_pool2d_forward(context, MPT_POOL_MAX, &s, mpt_f32_array(NULL), x.array, index),
                MPT_ERROR_ARGUMENT, "x");
    CHECK_ERROR(context, mpt_pool2d_forward(context, MPT_POOL_MAX, &s, x.array, mpt_f32_array(NULL), index),
                MPT_ERROR_ARGUMENT, "y");
    CHECK_ERROR(context, mpt_pool2d_forward(context, MPT_POOL_MAX, &s, x.array, x.array, NULL), MPT_ERROR_ARGUMENT,
                "index");
    CHECK_ERROR(context, mpt_pool2d_backward(context, MPT_POOL_MAX, &s, x.array, NULL, 0, x.array), MPT_ERROR_ARGUMENT,
                "index");
    CHECK_ERROR(context, mpt_pool2d_forward(context, (mpt_pool_kind)test_number(2), &s, x.array, x.array, index),
                MPT_ERROR_ARGUMENT, "kind");
    CHECK(mpt_pool2d_forward(context, MPT_POOL_MAX, NULL, x.array, x.array, index) == MPT_ERROR_ARGUMENT);
    s.stride = (size_t)-1;
    CHECK_ERROR(context, mpt_pool2d_output(context, &s, &P, &Q), MPT_ERROR_SHAPE, "stride");
    s.stride = 0, s.H = s.W = 1, s.R = s.S = 0x7fffffff, s.padding = 0x3fffffff; /* 2^62 places, all but one padding */
    CHECK(mpt_pool2d_forward(context, MPT_POOL_AVERAGE, &s, x.array, x.array, NULL) == MPT_ERROR_SHAPE);
    s.R = s.S = 10001, s.padding = 5000;
    CHECK_ERROR(context, mpt_pool2d_forward(context, MPT_POOL_AVERAGE, &s, x.array, x.array, NULL), MPT_ERROR_SHAPE,
                "padding");
    s.R = s.S = (size_t)1 << (sizeof(size_t) * 4), s.padding = s.R / 2; /* whose product wraps */
    CHECK(mpt_pool2d_output(context, &s, &P, &Q) == MPT_ERROR_SHAPE);
    s.H = s.W = 4, s.R = s.S = 2;
    s.padding = 2;
    CHECK_ERROR(context, mpt_pool2d_output(context, &s, &P, &Q), MPT_ERROR_SHAPE, "padding");
    s.padding = 0, s.R = 5;
    CHECK_ERROR(context, mpt_pool2d_output(context, &s, &P, &Q), MPT_ERROR_SHAPE, "window");
    s.R = 0;
    CHECK_ERROR(context, mpt_pool2d_output(context, &s, &P, &Q), MPT_ERROR_SHAPE, "R");
    s.R = s.S = 2, s.N = (size_t)-1 / 4;
    CHECK(mpt_pool2d_forward(context, MPT_POOL_MAX, &s, x.array, x.array, index) == MPT_ERROR_SHAPE);
    s.N = 1, s.C = 1, s.H = 257, s.W = 257, s.R = 257, s.S = 257; /* 66049 places do not fit into 16 bits */
    CHECK(mpt_pool2d_forward(context, MPT_POOL_MAX, &s, x.array, x.array, index) == MPT_ERROR_SHAPE);
    test_tensor_free(&x), test_tensor_free(&y);
}

/* ==== ELEMENTWISE ==== */

typedef struct elementwise {
    size_t n;
    mpt_activation act;
    float beta;
} elementwise;

static mpt_result call_activation(mpt_context *ctx, const void *args, const test_tensor *t) {
    const elementwise *e = (const elementwise *)args;
    return mpt_activation_forward(ctx, e->act, e->n, t[0].array, t[2].array);
}

static mpt_result call_activation_backward(mpt_context *ctx, const void *args, const test_tensor *t) {
    const elementwise *e = (const elementwise *)args;
    return mpt_activation_backward(ctx, e->act, e->n, t[0].array, t[1].array, e->beta, t[2].array);
}

static mpt_result call_add(mpt_context *ctx, const void *args, const test_tensor *t) {
    const elementwise *e = (const elementwise *)args;
    return mpt_add_arrays(ctx, e->n, t[0].array, e->beta, t[1].array, e->act, t[2].array);
}

/* The three calls on one set of types; one product and one sum each, whose slopes are 1, beta and act'. */
static void test_elements(elementwise e, mpt_dtype type_a, mpt_dtype type_b, mpt_dtype type_out) {
    double *expected = test_doubles(e.n), *tolerance = test_doubles(e.n);
    test_tensor t[3];
    size_t i;
    t[0] = test_tensor_random(context, type_a, e.n, 1);
    t[1] = test_tensor_random(context, type_b, e.n, 2);
    t[2] = test_tensor_random(context, type_out, e.n, 3);
    for (i = 0; i < e.n; i += 3) t[0].value[i] = 0;
    test_tensor_upload(&t[0]);
    for (i = 0; i < e.n; i++) {
        const double slope = e.act == MPT_RELU && !(t[0].value[i] > 0) ? 0 : 1;
        expected[i] = slope * t[1].value[i] + (e.beta != 0 ? (double)e.beta * t[2].value[i] : 0);
        tolerance[i] =
            test_bound(1, fabs(slope * t[1].value[i]) + fabs((double)e.beta * t[2].value[i]), expected[i], type_out);
    }
    if (!(e.beta != 0)) test_tensor_poison(&t[2]);
    check_op("activation backward", call_activation_backward, &e, t, &t[2], expected, tolerance);
    for (i = 0; i < e.n; i++) {
        expected[i] = e.act == MPT_RELU && t[0].value[i] < 0 ? 0 : t[0].value[i];
        tolerance[i] = test_bound(0, 0, expected[i], type_out);
    }
    test_tensor_poison(&t[2]);
    check_op("activation", call_activation, &e, t, &t[2], expected, tolerance);
    if (!(e.beta != 0)) test_tensor_poison(&t[1]); /* a factor of 0 means that b is not read */
    for (i = 0; i < e.n; i++) {
        const double scaled = e.beta != 0 ? (double)e.beta * t[1].value[i] : 0, sum = t[0].value[i] + scaled;
        expected[i] = e.act == MPT_RELU && sum < 0 ? 0 : sum;
        tolerance[i] = test_bound(1, fabs(t[0].value[i]) + fabs(scaled), expected[i], type_out);
    }
    check_op("add", call_add, &e, t, &t[2], expected, tolerance);
    free(expected), free(tolerance);
    test_tensor_free(&t[0]), test_tensor_free(&t[1]), test_tensor_free(&t[2]);
}

static void test_elementwise(void) {
    static const size_t sizes[] = {0, 1, 7, 64, 65, 1001, 200003};
    elementwise e;
    size_t i;
    int mix, act;
    for (act = MPT_IDENTITY; act <= MPT_RELU; act++) {
        e.act = (mpt_activation)act;
        for (i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            e.n = sizes[i], e.beta = i % 2 ? 0 : -0.5f;
            test_elements(e, MPT_F32, MPT_F32, MPT_F32);
            test_elements(e, MPT_F16, MPT_F16, MPT_F16);
        }
        for (mix = 0; mix < 27; mix++) {
            e.n = 333, e.beta = mix % 2 ? 1.25f : 0;
            test_elements(e, (mpt_dtype)(mix % 3), (mpt_dtype)(mix / 3 % 3), (mpt_dtype)(mix / 9));
        }
    }
}

/* In place, and NaN: ReLU passes it on, so that no later check misses it. */
static void test_elementwise_specials(void) {
    test_tensor t = test_tensor_new(context, MPT_BF16, 3);
    t.value[0] = -1, t.value[1] = 2, t.value[2] = (double)nan_value();
    test_tensor_upload(&t);
    CHECK_OK(context, mpt_activation_forward(context, MPT_RELU, 3, t.array, t.array));
    test_tensor_download(&t);
    CHECK(t.value[0] >= 0 && t.value[0] <= 0 && t.value[1] >= 2 && t.value[1] <= 2);
    CHECK(reference_kind_of(test_bits((float)t.value[2]), MPT_F32) == REFERENCE_NAN);
    CHECK_OK(context, mpt_add_arrays(context, 2, t.array, 3, t.array, MPT_IDENTITY, t.array));
    test_tensor_download(&t);
    CHECK_EQUAL(t.value[1], 8);
    test_tensor_free(&t);
}

static void test_elementwise_errors(void) {
    test_tensor t = test_tensor_new(context, MPT_F32, 4);
    const mpt_array null = mpt_f32_array(NULL), fp8 = mpt_typed_array(t.array.data, MPT_E4M3), x = t.array;
    const mpt_activation bad = MPT_ACTIVATION_COUNT;
    const size_t huge = (size_t)-1 / 2;
    CHECK(mpt_activation_forward(NULL, MPT_RELU, 4, x, x) == MPT_ERROR_ARGUMENT);
    CHECK_ERROR(context, mpt_activation_forward(context, MPT_RELU, 4, null, x), MPT_ERROR_ARGUMENT, "a");
    CHECK_ERROR(context, mpt_activation_forward(context, MPT_RELU, 4, x, null), MPT_ERROR_ARGUMENT, "out");
    CHECK_ERROR(context, mpt_activation_forward(context, bad, 4, x, x), MPT_ERROR_ARGUMENT, "activation");
    CHECK_ERROR(context, mpt_activation_forward(context, MPT_RELU, 4, fp8, x), MPT_ERROR_TYPE, "a");
    CHECK_ERROR(context, mpt_activation_forward(context, MPT_RELU, 4, x, fp8), MPT_ERROR_TYPE, "out");
    CHECK_ERROR(context, mpt_activation_forward(context, MPT_RELU, huge, x, x), MPT_ERROR_SHAPE, "overflow");
    CHECK_ERROR(context, mpt_activation_backward(context, MPT_RELU, 4, null, x, 0, x), MPT_ERROR_ARGUMENT, "a");
    CHECK_ERROR(context, mpt_activation_backward(context, MPT_RELU, 4, x, null, 0, x), MPT_ERROR_ARGUMENT, "b");
    CHECK_ERROR(context, mpt_activation_backward(context, MPT_RELU, 4, x, x, 0, null), MPT_ERROR_ARGUMENT, "out");
    CHECK_ERROR(context, mpt_activation_backward(context, MPT_RELU, 4, x, fp8, 0, x), MPT_ERROR_TYPE, "b");
    CHECK_ERROR(context, mpt_add_arrays(context, 4, null, 1, x, MPT_IDENTITY, x), MPT_ERROR_ARGUMENT, "a");
    CHECK_ERROR(context, mpt_add_arrays(context, 4, x, 1, null, MPT_IDENTITY, x), MPT_ERROR_ARGUMENT, "b");
    CHECK_ERROR(context, mpt_add_arrays(context, 4, x, 1, x, MPT_IDENTITY, null), MPT_ERROR_ARGUMENT, "out");
    CHECK_ERROR(context, mpt_add_arrays(context, 4, x, 1, fp8, MPT_IDENTITY, x), MPT_ERROR_TYPE, "b");
    CHECK_ERROR(context, mpt_add_arrays(context, huge, x, 1, x, MPT_IDENTITY, x), MPT_ERROR_SHAPE, "overflow");
    test_tensor_free(&t);
}

/* ==== COLUMNS ==== */

typedef struct columns {
    size_t rows, C, x_stride, y_stride;
    float beta;
} columns;

static mpt_result call_copy_columns(mpt_context *ctx, const void *args, const test_tensor *t) {
    const columns *c = (const columns *)args;
    return mpt_copy_columns(ctx, c->rows, c->C, t[0].array, c->x_stride, c->beta, t[1].array, c->y_stride);
}

/* What lies between the rows is not read in x, and not written in y. */
static void test_copy_columns(const columns *c, mpt_dtype type_x, mpt_dtype type_y) {
    const size_t count = (c->rows - 1) * c->y_stride + c->C;
    double *expected = test_doubles(count), *tolerance = test_doubles(count);
    test_tensor t[2];
    size_t i;
    t[0] = test_tensor_random(context, type_x, (c->rows - 1) * c->x_stride + c->C, 1);
    t[1] = test_tensor_random(context, type_y, count, 2);
    poison_columns(&t[0], c->C, c->x_stride, c->x_stride);
    if (!(c->beta != 0)) poison_columns(&t[1], 0, c->C, c->y_stride);
    for (i = 0; i < count; i++) {
        const size_t row = i / c->y_stride, column = i % c->y_stride;
        double x, old;
        expected[i] = t[1].value[i];
        if (column >= c->C) continue;
        x = t[0].value[row * c->x_stride + column];
        old = c->beta != 0 ? (double)c->beta * t[1].value[i] : 0;
        expected[i] = x + old;
        tolerance[i] = test_bound(1, c->beta != 0 ? fabs(x) + fabs(old) : 0, expected[i], type_y);
    }
    check_op("copy columns", call_copy_columns, c, t, &t[1], expected, tolerance);
    free(expected), free(tolerance);
    test_tensor_free(&t[0]), test_tensor_free(&t[1]);
}

static void test_columns(void) {
    static const size_t shapes[][4] = {{1, 1, 1, 1},     {3, 5, 5, 7},       {7, 31, 64, 31},
                                       {101, 3, 17, 11}, {4099, 33, 67, 45}, {2, 1000, 1000, 2003}};
    size_t i;
    int mix;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (mix = 0; mix < 9; mix++) {
            columns c;
            c.rows = shapes[i][0], c.C = shapes[i][1], c.x_stride = shapes[i][2], c.y_stride = shapes[i][3];
            c.beta = (i + (size_t)mix) % 2 ? -0.5f : 0;
            test_copy_columns(&c, (mpt_dtype)(mix % 3), (mpt_dtype)(mix / 3));
        }
}

static void test_columns_errors(void) {
    test_tensor t = test_tensor_random(context, MPT_F32, 16, 1), y = test_tensor_new(context, MPT_BF16, 16);
    const mpt_array null = mpt_f32_array(NULL), fp8 = mpt_typed_array(t.array.data, MPT_E4M3), x = t.array;
    const size_t huge = (size_t)-1 / 2;
    t.value[3] = (double)nan_value();
    test_tensor_upload(&t);
    CHECK_OK(context, mpt_copy_columns(context, 2, 4, x, 8, 0, y.array, 8));
    test_tensor_download(&y);
    CHECK(!test_is_finite(y.value[3]));
    CHECK_EQUAL(y.value[4], 0);
    CHECK(mpt_copy_columns(NULL, 2, 3, x, 3, 0, x, 3) == MPT_ERROR_ARGUMENT);
    CHECK_ERROR(context, mpt_copy_columns(context, 2, 3, null, 3, 0, x, 3), MPT_ERROR_ARGUMENT, "x");
    CHECK_ERROR(context, mpt_copy_columns(context, 2, 3, x, 3, 0, null, 3), MPT_ERROR_ARGUMENT, "y");
    CHECK_ERROR(context, mpt_copy_columns(context, 2, 3, fp8, 3, 0, x, 3), MPT_ERROR_TYPE, "x");
    CHECK_ERROR(context, mpt_copy_columns(context, 2, 3, x, 3, 0, fp8, 3), MPT_ERROR_TYPE, "y");
    CHECK_ERROR(context, mpt_copy_columns(context, 2, 3, x, 2, 0, x, 3), MPT_ERROR_SHAPE, "x_stride");
    CHECK_ERROR(context, mpt_copy_columns(context, 2, 3, x, 3, 0, x, 2), MPT_ERROR_SHAPE, "y_stride");
    CHECK_ERROR(context, mpt_copy_columns(context, huge, 3, x, 3, 0, x, 3), MPT_ERROR_SHAPE, "overflow");
    CHECK_ERROR(context, mpt_copy_columns(context, 2, 3, x, 3, 0, x, huge), MPT_ERROR_SHAPE, "overflow");
    CHECK_OK(context, mpt_copy_columns(context, 0, 3, null, 3, 0, null, 3));
    CHECK_OK(context, mpt_copy_columns(context, 2, 0, null, 3, 0, null, 3));
    test_tensor_free(&t), test_tensor_free(&y);
}

/* ==== DROPOUT ==== */

typedef struct dropout {
    size_t n;
    mpt_mask mask;
    float beta;
} dropout;

static mpt_result call_dropout(mpt_context *ctx, const void *args, const test_tensor *t) {
    const dropout *d = (const dropout *)args;
    return mpt_dropout_array(ctx, d->n, &d->mask, t[0].array, d->beta, t[1].array);
}

/* The mask is what its description says: mpt_hash tells of every element whether it is dropped. step: the value behind
   d->mask.step. */
static void test_dropout(const dropout *d, uint64_t step, mpt_dtype type_x, mpt_dtype type_y) {
    double *expected = test_doubles(d->n), *tolerance = test_doubles(d->n);
    test_tensor t[2];
    size_t i;
    t[0] = test_tensor_random(context, type_x, d->n, 1);
    t[1] = test_tensor_random(context, type_y, d->n, 2);
    if (!(d->beta != 0)) test_tensor_poison(&t[1]);
    for (i = 0; i < d->n; i++) {
        const double factor = reference_dropout((double)d->mask.p, mpt_hash(d->mask.seed, step, d->mask.tensor, i));
        const double x = factor * t[0].value[i], old = d->beta != 0 ? (double)d->beta * t[1].value[i] : 0;
        expected[i] = x + old;
        tolerance[i] = test_bound(1, fabs(x) + fabs(old), expected[i], type_y);
    }
    check_op("dropout", call_dropout, d, t, &t[1], expected, tolerance);
    free(expected), free(tolerance);
    test_tensor_free(&t[0]), test_tensor_free(&t[1]);
}

static void test_dropouts(void) {
    static const size_t sizes[] = {0, 1, 7, 65, 1001, 200003};
    static const float shares[] = {0, 0.1f, 0.5f, 0.9375f, 0.99f};
    const uint64_t step = 7;
    uint64_t *device = (uint64_t *)mpt_alloc(context, sizeof *device);
    size_t i;
    int mix;
    CHECK_OK(context, mpt_upload(context, device, &step, sizeof step));
    for (i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (mix = 0; mix < 9; mix++) {
            dropout d = MPT_ZERO;
            d.n = sizes[i], d.beta = mix % 2 ? 0 : -0.5f;
            d.mask.p = shares[(i + (size_t)mix) % 5], d.mask.seed = 3 + i, d.mask.tensor = (uint64_t)mix;
            d.mask.step = mix % 4 ? device : NULL;
            test_dropout(&d, mix % 4 ? step : 0, (mpt_dtype)(mix % 3), (mpt_dtype)(mix / 3));
        }
    mpt_free(context, device);
}

/* Which of n ones a mask keeps; in place. */
static test_tensor kept_by(const mpt_mask *mask, size_t n) {
    test_tensor t = test_tensor_new(context, MPT_F32, n);
    test_tensor_fill(&t, 1, 1, 0);
    CHECK_OK(context, mpt_dropout_array(context, n, mask, t.array, 0, t.array));
    test_tensor_download(&t);
    return t;
}

/* How many elements of two masks of different names differ: as of independent ones, to 5 standard deviations. */
static void check_independent(const test_tensor *a, const mpt_mask *other, double p) {
    test_tensor b = kept_by(other, a->count);
    const double n = (double)a->count, share = 2 * p * (1 - p);
    double different = 0;
    size_t i;
    for (i = 0; i < a->count; i++) different += (a->value[i] > 0) != (b.value[i] > 0);
    CHECK_NEAR(different, n * share, 5 * sqrt(n * share * (1 - share)));
    test_tensor_free(&b);
}

static void test_dropout_shares(void) {
    static const float shares[] = {0.01f, 0.25f, 0.5f, 0.9f};
    const uint64_t one = 1;
    uint64_t *step = (uint64_t *)mpt_alloc(context, sizeof *step);
    size_t i, j;
    CHECK_OK(context, mpt_upload(context, step, &one, sizeof one));
    for (i = 0; i < sizeof shares / sizeof *shares; i++) {
        const double p = (double)shares[i], n = 300007;
        mpt_mask mask = MPT_ZERO, other;
        test_tensor t;
        double kept = 0;
        mask.p = shares[i], mask.seed = 11, mask.tensor = 5;
        t = kept_by(&mask, (size_t)n);
        for (j = 0; j < t.count; j++) kept += t.value[j] > 0;
        CHECK_NEAR(kept, n * (1 - p), 5 * sqrt(n * p * (1 - p)));
        other = mask, other.seed = 12, check_independent(&t, &other, p);
        other = mask, other.tensor = 6, check_independent(&t, &other, p);
        other = mask, other.step = step, check_independent(&t, &other, p);
        test_tensor_free(&t);
    }
    mpt_free(context, step);
}

static void test_dropout_errors(void) {
    test_tensor t = test_tensor_new(context, MPT_F32, 64);
    const mpt_array null = mpt_f32_array(NULL), fp8 = mpt_typed_array(t.array.data, MPT_E4M3), x = t.array;
    static const float bad[] = {1, -0.25f, 1.5f};
    mpt_mask mask = MPT_ZERO;
    size_t i;
    CHECK(mpt_dropout_array(NULL, 4, &mask, x, 0, x) == MPT_ERROR_ARGUMENT);
    CHECK_ERROR(context, mpt_dropout_array(context, 4, NULL, x, 0, x), MPT_ERROR_ARGUMENT, "op");
    CHECK_ERROR(context, mpt_dropout_array(context, 4, &mask, null, 0, x), MPT_ERROR_ARGUMENT, "a");
    CHECK_ERROR(context, mpt_dropout_array(context, 4, &mask, x, 0, null), MPT_ERROR_ARGUMENT, "out");
    CHECK_ERROR(context, mpt_dropout_array(context, 4, &mask, fp8, 0, x), MPT_ERROR_TYPE, "a");
    CHECK_ERROR(context, mpt_dropout_array(context, 4, &mask, x, 0, fp8), MPT_ERROR_TYPE, "out");
    CHECK_ERROR(context, mpt_dropout_array(context, (size_t)-1 / 2, &mask, x, 0, x), MPT_ERROR_SHAPE, "overflow");
    for (i = 0; i < 3; i++) {
        mask.p = bad[i];
        CHECK_ERROR(context, mpt_dropout_array(context, 4, &mask, x, 0, x), MPT_ERROR_ARGUMENT, "p");
    }
    mask.p = nan_value();
    CHECK_ERROR(context, mpt_dropout_array(context, 4, &mask, x, 0, x), MPT_ERROR_ARGUMENT, "p");
    mask.p = 0.5f; /* NaN that is kept stays NaN */
    test_tensor_poison(&t);
    CHECK_OK(context, mpt_dropout_array(context, 64, &mask, x, 0, x));
    test_tensor_download(&t);
    for (i = 0; i < 64; i++)
        if (reference_dropout(0.5, mpt_hash(0, 0, 0, i)) > 0) CHECK(!test_is_finite(t.value[i]));
    test_tensor_free(&t);
}

/* ==== NORMALISATION ==== */

typedef struct norm_case {
    mpt_norm_shape s;
    mpt_activation act;
    int frozen;
    float scale_x, scale, momentum;
} norm_case;

enum { INPUT, GAMMA, SHIFT, OUTPUT, SLOPE, DX, DGAMMA, DSHIFT, STATS, RUNNING, NORM_TENSORS }; /* SLOPE: dy */

static size_t norm_sets(const norm_case *n) { return n->s.N * n->s.groups; }

static float *floats_of(const test_tensor *t) { return (float *)t->array.data; }

static mpt_result call_norm_stats(mpt_context *ctx, const void *args, const test_tensor *t) {
    const norm_case *n = (const norm_case *)args;
    return mpt_norm_stats(ctx, &n->s, t[INPUT].array, floats_of(&t[STATS]));
}

static mpt_result call_norm_forward(mpt_context *ctx, const void *args, const test_tensor *t) {
    const norm_case *n = (const norm_case *)args;
    return mpt_norm_forward(ctx, &n->s, t[INPUT].array, floats_of(&t[STATS]), t[GAMMA].array, t[SHIFT].array, n->act,
                            t[OUTPUT].array);
}

static mpt_result call_norm_backward(mpt_context *ctx, const void *args, const test_tensor *t) {
    const norm_case *n = (const norm_case *)args;
    return mpt_norm_backward(ctx, &n->s, t[INPUT].array, floats_of(&t[STATS]), n->frozen, t[GAMMA].array,
                             t[SLOPE].array, n->scale_x, t[DX].array, n->scale, t[DGAMMA].array, t[DSHIFT].array);
}

static mpt_result call_norm_running(mpt_context *ctx, const void *args, const test_tensor *t) {
    const norm_case *n = (const norm_case *)args;
    return mpt_norm_running(ctx, &n->s, n->momentum, floats_of(&t[STATS]), floats_of(&t[RUNNING]));
}

static void norm_tensors(const norm_case *n, mpt_dtype type_x, mpt_dtype type_y, mpt_dtype type_p, test_tensor *t) {
    const size_t count = n->s.N * n->s.pixels * n->s.C, channels = n->s.C, sets = norm_sets(n);
    t[INPUT] = test_tensor_random(context, type_x, count, 1);
    t[GAMMA] = test_tensor_random(context, type_p, channels, 2);
    t[SHIFT] = test_tensor_random(context, type_p, channels, 3);
    t[OUTPUT] = test_tensor_new(context, type_y, count);
    t[SLOPE] = test_tensor_random(context, type_y, count, 4);
    t[DX] = test_tensor_random(context, type_x, count, 5);
    t[DGAMMA] = test_tensor_random(context, type_p, channels, 6);
    t[DSHIFT] = test_tensor_random(context, type_p, channels, 7);
    t[STATS] = test_tensor_new(context, MPT_F32, 4 * sets);
    t[RUNNING] = test_tensor_random(context, MPT_F32, 2 * sets, 8);
}

/* The sums are double and rounded once; that of the squares may be E x^2 - (E x)^2, which passes 2 count + 10 roundings
   of the size of E x^2. On a GPU 16-bit values are added in fp32 over eight first, relative to the first of them: see
   mptc__moments_join. There |x - first| is on average at most 9 E |x|. */
static void check_norm_stats(const norm_case *n, test_tensor *t) {
    const size_t sets = norm_sets(n);
    const double count = reference_norm_count(&n->s), d = ldexp(1, -53);
    double *expected = test_doubles(2 * sets), *tolerance = test_doubles(2 * sets);
    double *square = test_doubles(t[INPUT].count), *squares = test_doubles(sets);
    const int gpu = strcmp(mpt_device_name(context), "cuda") == 0;
    const double few = gpu && t[INPUT].array.type != MPT_F32 ? test_unit(MPT_F32) : 0;
    test_tensor rows = t[STATS];
    size_t i;
    for (i = 0; i < t[INPUT].count; i++) square[i] = t[INPUT].value[i] * t[INPUT].value[i];
    reference_norm_means(&n->s, square, squares);
    reference_norm_stats(&n->s, t[INPUT].value, expected);
    for (i = 0; i < 2 * sets; i++)
        tolerance[i] = test_unit(MPT_F32) * fabs(expected[i]) + test_tiny(MPT_F32) +
                       (2 * count + 10) * d * (i < sets ? sqrt(squares[i]) : squares[i - sets]) +
                       few * (i < sets ? 7 * 9 * sqrt(squares[i]) : 300 * expected[i]);
    test_tensor_poison(&t[STATS]);
    rows.count = 2 * sets; /* the others may stay NaN */
    check_op("norm stats", call_norm_stats, n, t, &rows, expected, tolerance);
    CHECK_OK(context, call_norm_stats(context, n, t));
    test_tensor_download(&t[STATS]);
    free(expected), free(tolerance), free(square), free(squares);
}

/* Deviation, root and inverse, two products and two sums; tanh itself is taken to be good to 8 ulp. */
static void check_norm_forward(const norm_case *n, test_tensor *t) {
    double *expected = test_doubles(t[OUTPUT].count), *tolerance = test_doubles(t[OUTPUT].count);
    size_t i;
    reference_norm(&n->s, t[INPUT].value, t[STATS].value, t[GAMMA].value, t[SHIFT].value, expected);
    for (i = 0; i < t[OUTPUT].count; i++) {
        const size_t g = reference_norm_group(&n->s, i), c = i % n->s.C;
        const double normal =
            (fabs(t[INPUT].value[i]) + fabs(t[STATS].value[g])) * reference_norm_inverse(&n->s, t[STATS].value, g);
        if (n->act == MPT_RELU && expected[i] < 0) expected[i] = 0;
        if (n->act == MPT_TANH) expected[i] = tanh(expected[i]);
        tolerance[i] = test_bound(3, normal * fabs(t[GAMMA].value[c]) + fabs(t[SHIFT].value[c]), expected[i],
                                  t[OUTPUT].array.type);
        if (n->act == MPT_TANH) tolerance[i] += 16 * test_unit(MPT_F32);
    }
    test_tensor_poison(&t[OUTPUT]);
    check_op("norm forward", call_norm_forward, n, t, &t[OUTPUT], expected, tolerance);
    free(expected), free(tolerance);
}

/* The old content that a gradient keeps, and its size. */
static void start_gradient(const test_tensor *t, float scale, double *expected, double *magnitude) {
    size_t i;
    for (i = 0; i < t->count; i++) {
        expected[i] = scale != 0 ? (double)scale * t->value[i] : 0;
        magnitude[i] = fabs(expected[i]);
    }
}

/* Checks what the backward pass leaves in one of its results. */
static void check_gradient(const char *what, const norm_case *n, test_tensor *t, test_tensor *out, float scale,
                           const double *expected, double *magnitude, double terms) {
    size_t i;
    for (i = 0; i < out->count; i++) magnitude[i] = test_bound(terms, magnitude[i], expected[i], out->array.type);
    if (scale != 0) test_tensor_upload(out); /* the other checks have added to it */
    else test_tensor_poison(out);
    check_op(what, call_norm_backward, n, t, out, expected, magnitude);
}

static void check_norm_parameters(const norm_case *n, test_tensor *t) {
    const size_t channels = n->s.C;
    const double rows = (double)(n->s.N * n->s.pixels);
    double *gamma = test_doubles(channels), *shift = test_doubles(channels), *gamma_size = test_doubles(channels);
    double *shift_size = test_doubles(channels);
    size_t i;
    start_gradient(&t[DGAMMA], n->scale, gamma, gamma_size);
    start_gradient(&t[DSHIFT], n->scale, shift, shift_size);
    reference_norm_parameters(&n->s, t[INPUT].value, t[STATS].value, t[SLOPE].value, gamma, shift);
    for (i = 0; i < t[INPUT].count; i++) {
        const size_t g = reference_norm_group(&n->s, i);
        gamma_size[i % channels] += fabs(t[SLOPE].value[i]) * (fabs(t[INPUT].value[i]) + fabs(t[STATS].value[g])) *
                                    reference_norm_inverse(&n->s, t[STATS].value, g);
        shift_size[i % channels] += fabs(t[SLOPE].value[i]);
    }
    check_gradient("norm dgamma", n, t, &t[DGAMMA], n->scale, gamma, gamma_size, rows + 4);
    check_gradient("norm dbeta", n, t, &t[DSHIFT], n->scale, shift, shift_size, rows);
    free(gamma), free(shift), free(gamma_size), free(shift_size);
}

/* Errors to first order, in units of the largest number of roundings that a term passes: its own, the sum over the
   group, and 11 more. */
static void check_norm_dx(const norm_case *n, test_tensor *t) {
    const size_t count = t[INPUT].count, sets = norm_sets(n);
    double *expected = test_doubles(count), *magnitude = test_doubles(count);
    double *scratch = test_doubles(2 * count + 2 * sets), *slope_size = scratch, *product_size = slope_size + count;
    double *m1 = product_size + count, *m2 = m1 + sets;
    size_t i;
    start_gradient(&t[DX], n->scale_x, expected, magnitude);
    if (n->frozen) reference_norm_frozen(&n->s, t[STATS].value, t[GAMMA].value, t[SLOPE].value, expected);
    else
        reference_norm_backward(&n->s, t[INPUT].value, t[STATS].value, t[GAMMA].value, t[SLOPE].value, expected,
                                scratch);
    for (i = 0; i < count; i++) {
        const size_t g = reference_norm_group(&n->s, i);
        slope_size[i] = fabs(t[SLOPE].value[i] * t[GAMMA].value[i % n->s.C]);
        product_size[i] = slope_size[i] * (fabs(t[INPUT].value[i]) + fabs(t[STATS].value[g])) *
                          reference_norm_inverse(&n->s, t[STATS].value, g);
    }
    reference_norm_means(&n->s, slope_size, m1);
    reference_norm_means(&n->s, product_size, m2);
    for (i = 0; i < count; i++) {
        const size_t g = reference_norm_group(&n->s, i);
        const double inverse = reference_norm_inverse(&n->s, t[STATS].value, g);
        const double normal = (fabs(t[INPUT].value[i]) + fabs(t[STATS].value[g])) * inverse;
        magnitude[i] += (slope_size[i] + (n->frozen ? 0 : m1[g] + normal * m2[g])) * inverse;
    }
    check_gradient("norm dx", n, t, &t[DX], n->scale_x, expected, magnitude,
                   n->frozen ? 4 : reference_norm_count(&n->s) + 11);
    free(expected), free(magnitude), free(scratch);
}

/* Without dx the other two are the same; statistics are only read. */
static void check_norm_optional(const norm_case *n, test_tensor *t) {
    const size_t bytes = n->s.C * sizeof(double);
    double *with = test_doubles(2 * n->s.C);
    norm_case fresh = *n;
    test_tensor dx = t[DX], stats = t[STATS];
    fresh.scale = 0;
    CHECK_OK(context, call_norm_backward(context, &fresh, t));
    test_tensor_download(&t[DGAMMA]), test_tensor_download(&t[DSHIFT]);
    memcpy(with, t[DGAMMA].value, bytes), memcpy(with + n->s.C, t[DSHIFT].value, bytes);
    test_tensor_poison(&t[DGAMMA]), test_tensor_poison(&t[DSHIFT]);
    t[DX].array.data = NULL;
    CHECK_OK(context, call_norm_backward(context, &fresh, t));
    t[DX] = dx;
    test_tensor_download(&t[DGAMMA]), test_tensor_download(&t[DSHIFT]);
    CHECK(memcmp(t[DGAMMA].value, with, bytes) == 0);
    CHECK(memcmp(t[DSHIFT].value, with + n->s.C, bytes) == 0);
    stats.value = test_doubles(stats.count);
    test_tensor_download(&stats);
    CHECK(memcmp(stats.value, t[STATS].value, 2 * norm_sets(n) * sizeof(double)) == 0);
    free(stats.value), free(with);
}

static void check_norm_backward(norm_case n, test_tensor *t) {
    int i;
    for (i = 0; i < 2; i++) {
        check_norm_parameters(&n, t);
        check_norm_dx(&n, t);
        test_tensor_fill(&t[DX], -1, 1, 5), test_tensor_fill(&t[DGAMMA], -1, 1, 6),
            test_tensor_fill(&t[DSHIFT], -1, 1, 7);
        n.scale = n.scale != 0 ? 0 : -0.75f, n.scale_x = n.scale_x != 0 ? 0 : 0.5f;
    }
    check_norm_optional(&n, t);
}

static void check_norm_running(const norm_case *n, test_tensor *t) {
    const size_t sets = norm_sets(n);
    double *expected = test_doubles(2 * sets), *size = test_doubles(2 * sets);
    size_t i;
    memcpy(expected, t[RUNNING].value, 2 * sets * sizeof *expected);
    for (i = 0; i < 2 * sets; i++) size[i] = fabs(t[RUNNING].value[i]);
    reference_norm_running(&n->s, (double)n->momentum, t[STATS].value, expected);
    for (i = 0; i < 2 * sets; i++)
        size[i] = test_bound(2, size[i] + fabs(expected[i]), expected[i], MPT_F32); /* of the sum's two parts */
    check_op("norm running", call_norm_running, n, t, &t[RUNNING], expected, size);
    free(expected), free(size);
}

/* y in place of x is the same as elsewhere, bit for bit. */
static void check_norm_in_place(const norm_case *n, test_tensor *t) {
    test_tensor x = test_tensor_new(context, t[OUTPUT].array.type, t[INPUT].count), kept = t[INPUT];
    memcpy(x.value, t[INPUT].value, x.count * sizeof *x.value);
    test_tensor_upload(&x);
    t[INPUT] = x;
    CHECK_OK(context, call_norm_forward(context, n, t));
    test_tensor_download(&t[OUTPUT]);
    CHECK_OK(context, mpt_norm_forward(context, &n->s, x.array, floats_of(&t[STATS]), t[GAMMA].array, t[SHIFT].array,
                                       n->act, x.array));
    t[INPUT] = kept;
    test_tensor_download(&x);
    CHECK(memcmp(x.value, t[OUTPUT].value, x.count * sizeof *x.value) == 0);
    test_tensor_free(&x);
}

static void test_norm(norm_case n, mpt_dtype type_x, mpt_dtype type_y, mpt_dtype type_p) {
    test_tensor t[NORM_TENSORS];
    size_t i;
    norm_tensors(&n, type_x, type_y, type_p, t);
    check_norm_stats(&n, t);
    check_norm_forward(&n, t);
    check_norm_in_place(&n, t);
    check_norm_backward(n, t);
    if (reference_norm_count(&n.s) > 1) check_norm_running(&n, t);
    for (i = 0; i < 2 * norm_sets(&n); i++) t[STATS].value[i] = test_uniform(0.5, 1.5, 9, i); /* those of no batch */
    test_tensor_upload(&t[STATS]);
    n.frozen = 1, n.act = n.act ? MPT_IDENTITY : MPT_TANH;
    check_norm_forward(&n, t);
    check_norm_backward(n, t);
    for (i = 0; i < NORM_TENSORS; i++) test_tensor_free(&t[i]);
}

/* N pixels C groups: batch, layer, group and instance norm. Odd, prime, one value only, more than is done at once. */
static const size_t norm_shapes[][4] = {
    {1, 60, 4, 4},  {1, 2, 1, 1},   {1, 7, 37, 37},   {1, 257, 130, 130}, {1, 4099, 3, 3}, {1, 5, 2003, 2003},
    {7, 1, 33, 1},  {3, 1, 1, 1},   {101, 1, 257, 1}, {1000, 1, 64, 1},   {2, 1, 2003, 1}, {2, 30, 6, 3},
    {3, 35, 12, 4}, {2, 49, 66, 2}, {1, 16, 8, 1},    {3, 25, 5, 5},      {2, 121, 7, 7},  {4, 256, 96, 8},
};

static norm_case make_norm(const size_t *s) {
    norm_case n = MPT_ZERO;
    n.s.N = s[0], n.s.pixels = s[1], n.s.C = s[2], n.s.groups = s[3];
    n.momentum = 0.1f;
    return n;
}

static void test_norms(void) {
    size_t i;
    int mix;
    for (i = 0; i < sizeof norm_shapes / sizeof *norm_shapes; i++)
        for (mix = 0; mix < 9; mix++) {
            norm_case n = make_norm(norm_shapes[i]);
            if (mix && n.s.N * n.s.pixels * n.s.C > 20000 && mix != 4 && mix != 8) continue; /* one type is enough */
            n.s.eps = mix % 2 ? 0 : 0.001f;
            n.act = mix % 2 ? MPT_RELU : MPT_IDENTITY;
            n.scale = mix % 2 ? 0 : 1, n.scale_x = mix % 3 ? 0 : 1;
            test_norm(n, (mpt_dtype)(mix % 3), (mpt_dtype)(mix / 3), (mpt_dtype)((i + (size_t)mix) % 3));
        }
}

/* A mean that is 100000 deviations: sums of squares in fp32 would leave nothing of the variance. */
static void test_norm_cancellation(void) {
    static const size_t shapes[][4] = {{1, 997, 3, 3}, {2, 1, 1009, 1}, {2, 61, 12, 2}};
    size_t i;
    for (i = 0; i < 3; i++) {
        const norm_case n = make_norm(shapes[i]);
        test_tensor t[NORM_TENSORS];
        size_t j;
        norm_tensors(&n, MPT_F32, MPT_F32, MPT_F32, t);
        test_tensor_fill(&t[INPUT], 1000 - 0.02, 1000 + 0.02, 3);
        check_norm_stats(&n, t);
        for (j = 0; j < NORM_TENSORS; j++) test_tensor_free(&t[j]);
    }
}

/* The slope of a ReLU behind the norm, taken in passing, gives the bits that it gives by itself. gamma is also so small
   that many y are stored as 0. */
static void check_norm_slope(norm_case n, mpt_dtype type, double gamma, test_tensor *t) {
    test_tensor *outs[3] = {&t[DX], &t[DGAMMA], &t[DSHIFT]};
    unsigned char *alone[3], *passing[3];
    mpt_context *ctx;
    mpt_norm_op op = MPT_ZERO;
    size_t i;
    int engine, thread, j;
    for (i = 0; i < n.s.C; i++) t[GAMMA].value[i] *= gamma, t[SHIFT].value[i] *= gamma / 8;
    test_tensor_upload(&t[GAMMA]), test_tensor_upload(&t[SHIFT]);
    for (j = 0; j < 3; j++) {
        alone[j] = (unsigned char *)test_memory(2 * test_tensor_bytes(outs[j]));
        passing[j] = alone[j] + test_tensor_bytes(outs[j]);
    }
    n.act = MPT_RELU, n.scale = 0, n.scale_x = 0;
    for (engine = 0; engine < ENGINES; engine++)
        for (thread = 0; thread < THREADS && contexts[engine][thread]; thread++) {
            ctx = contexts[engine][thread];
            CHECK_OK(ctx, call_norm_stats(ctx, &n, t));
            CHECK_OK(ctx, call_norm_forward(ctx, &n, t));
            op.pass = MPT_NORM_BACKWARD, op.shape = n.s, op.shape.eps = 1e-5f;
            op.x = t[INPUT].array, op.y = t[SLOPE].array, op.saved = t[OUTPUT].array;
            op.gamma = t[GAMMA].array, op.beta = t[SHIFT].array;
            op.dx = t[DX].array, op.dgamma = t[DGAMMA].array, op.dbeta = t[DSHIFT].array;
            op.stats = floats_of(&t[STATS]), op.act = MPT_RELU;
            test_tensor_upload(&t[SLOPE]);
            CHECK_OK(ctx, mpt_context_backend(ctx)->norm(ctx, &op));
            for (j = 0; j < 3; j++)
                CHECK_OK(ctx, mpt_download(ctx, passing[j], outs[j]->array.data, test_tensor_bytes(outs[j])));
            test_tensor_upload(&t[SLOPE]);
            CHECK_OK(ctx, mpt_activation_backward(ctx, MPT_RELU, t[SLOPE].count, t[OUTPUT].array, t[SLOPE].array, 0,
                                                  t[SLOPE].array));
            CHECK_OK(ctx, call_norm_backward(ctx, &n, t));
            for (j = 0; j < 3; j++) {
                CHECK_OK(ctx, mpt_download(ctx, alone[j], outs[j]->array.data, test_tensor_bytes(outs[j])));
                if (!CHECK(memcmp(alone[j], passing[j], test_tensor_bytes(outs[j])) == 0))
                    printf("    in the slope of %s, result %d, C %lu\n", mpt_dtype_name(type), j, (unsigned long)n.s.C);
            }
        }
    for (j = 0; j < 3; j++) free(alone[j]);
}

static void test_norm_slopes(void) {
    static const size_t shapes[][4] = {{1, 257, 130, 130}, {1, 61, 64, 64}, {5, 1, 37, 1}, {3, 35, 12, 4}};
    static const double gammas[] = {1, 1e-7, 1e-39};
    size_t i, g;
    int type, j;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (g = 0; g < sizeof gammas / sizeof *gammas; g++)
            for (type = MPT_F32; type <= MPT_BF16; type++) {
                const norm_case n = make_norm(shapes[i]);
                test_tensor t[NORM_TENSORS];
                norm_tensors(&n, (mpt_dtype)type, (mpt_dtype)type, MPT_F32, t);
                check_norm_slope(n, (mpt_dtype)type, gammas[g], t);
                for (j = 0; j < NORM_TENSORS; j++) test_tensor_free(&t[j]);
            }
}

/* A constant set, however large, is normalised to 0 exactly; few values far from 0 as exactly as fp32 can. */
static void test_norm_far(void) {
    static const float far[4] = {40000, 40001, 40002, 40003};
    const double inverse = 1 / sqrt(1.25 + 1e-5);
    norm_case n = MPT_ZERO;
    test_tensor t[NORM_TENSORS];
    size_t i, wrong = 0;
    int engine;
    n.s.N = 1, n.s.pixels = 4, n.s.C = 2, n.s.groups = 2; /* channel 0: far; 1: constant */
    norm_tensors(&n, MPT_F32, MPT_F32, MPT_F32, t);
    for (i = 0; i < 8; i++) t[INPUT].value[i] = i % 2 ? 1e6 : (double)far[i / 2];
    for (i = 0; i < 2; i++) t[GAMMA].value[i] = 1, t[SHIFT].value[i] = 0;
    test_tensor_upload(&t[INPUT]), test_tensor_upload(&t[GAMMA]), test_tensor_upload(&t[SHIFT]);
    for (engine = 0; engine < ENGINES; engine++) {
        if (!contexts[engine][0]) continue;
        CHECK_OK(context, call_norm_stats(contexts[engine][0], &n, t));
        CHECK_OK(context, call_norm_forward(contexts[engine][0], &n, t));
        test_tensor_download(&t[OUTPUT]);
        for (i = 0; i < 8; i++) {
            const double exact = ((double)far[i / 2] - 40001.5) * inverse;
            wrong += i % 2 ? t[OUTPUT].value[i] != 0 : !test_near(t[OUTPUT].value[i], exact, 1e-6 * fabs(exact));
        }
    }
    CHECK_EQUAL(wrong, 0);
    for (i = 0; i < NORM_TENSORS; i++) test_tensor_free(&t[i]);
}

/* Gradients of a million rows whose x is far from 0. x - mean is exact but for the rounding of the difference; xhat
   passes 3 more, its product with dy and the sum in double none, and the result one. */
static void test_norm_long(void) {
    norm_case n = MPT_ZERO;
    test_tensor t[NORM_TENSORS];
    double gamma[2] = {0}, shift[2] = {0}, gamma_bound[2], shift_bound[2], size[2] = {0};
    size_t i;
    n.s.N = 1, n.s.pixels = 1000003, n.s.C = n.s.groups = 2;
    norm_tensors(&n, MPT_F32, MPT_F32, MPT_F32, t);
    test_tensor_fill(&t[INPUT], 1e4 - 1.7, 1e4 + 1.7, 3);
    CHECK_OK(context, call_norm_stats(context, &n, t));
    test_tensor_download(&t[STATS]);
    for (i = 0; i < t[INPUT].count; i++) {
        const size_t c = i % 2;
        const double dy = t[SLOPE].value[i];
        const double normal = (t[INPUT].value[i] - t[STATS].value[c]) * reference_norm_inverse(&n.s, t[STATS].value, c);
        gamma[c] += dy * normal, shift[c] += dy;
        size[c] += fabs(dy * normal);
    }
    for (i = 0; i < 2; i++) {
        gamma_bound[i] = test_unit(MPT_F32) * (6 * size[i] + fabs(gamma[i]));
        shift_bound[i] = test_unit(MPT_F32) * fabs(shift[i]) + 1e6 * 1e6 * ldexp(1, -53);
    }
    check_op("norm dgamma of a million", call_norm_backward, &n, t, &t[DGAMMA], gamma, gamma_bound);
    check_op("norm dbeta of a million", call_norm_backward, &n, t, &t[DSHIFT], shift, shift_bound);
    for (i = 0; i < NORM_TENSORS; i++) test_tensor_free(&t[i]);
}

/* The reference itself: its gradients are the slopes of sum(dy y). With v = x - mean and a = dy gamma that is a
   constant and <a, v> sqrt(count) / |v|, where |v|^2 is count / inverse^2 and eps only makes it smoother. Its third
   derivative is at most 36 |a| inverse^3 / count, so a step h is off by less than 6 h^2 |a| inverse^3; the rounding of
   a double sum of so many terms comes to (count + 20) 2^-53 / h of the terms' sizes. h = 2^-17. */
typedef struct norm_objective {
    const norm_case *n;
    double *x, *gamma, *shift, *dy, *y, *stats;
    size_t count;
} norm_objective;

static double norm_value(void *user) {
    const norm_objective *o = (const norm_objective *)user;
    double sum = 0;
    size_t i;
    if (!o->n->frozen) reference_norm_stats(&o->n->s, o->x, o->stats);
    reference_norm(&o->n->s, o->x, o->stats, o->gamma, o->shift, o->y);
    for (i = 0; i < o->count; i++) sum += o->y[i] * o->dy[i];
    return sum;
}

static void check_slope(norm_objective *o, const char *what, double *variable, size_t n, const double *gradient) {
    const mpt_norm_shape *s = &o->n->s;
    double sizes = 0, steepest = 1, tolerance;
    size_t i;
    for (i = 0; i < s->N * s->groups; i++) {
        const double inverse = reference_norm_inverse(s, o->stats, i);
        if (inverse > steepest) steepest = inverse;
    }
    for (i = 0; i < o->count; i++) sizes += fabs(o->dy[i]) * (2 * steepest + 1);
    tolerance = sizes * (ldexp(6, -34) * steepest * steepest + ldexp((double)o->count + 20, -36));
    for (i = 0; i < n; i += 1 + n / 17)
        if (!CHECK_NEAR(gradient[i], reference_slope(norm_value, o, &variable[i], ldexp(1, -17)), tolerance))
            printf("    in %s[%lu]\n", what, (unsigned long)i);
}

static void test_reference_norm(const size_t *shape, int frozen) {
    norm_case n = make_norm(shape);
    const size_t count = n.s.N * n.s.pixels * n.s.C, channels = n.s.C, sets = norm_sets(&n);
    double *all = test_doubles(6 * count + 6 * channels + 4 * sets), *dx, *dgamma, *dshift, *scratch;
    norm_objective o;
    size_t i;
    for (i = 0; i < 3 * count + 4 * channels + 2 * sets; i++) all[i] = test_uniform(-1, 1, 3, i);
    n.frozen = frozen;
    o.n = &n, o.count = count;
    o.x = all, o.dy = o.x + count, o.y = o.dy + count, o.gamma = o.y + count, o.shift = o.gamma + channels;
    o.stats = o.shift + channels;
    dx = o.stats + 2 * sets, dgamma = dx + count, dshift = dgamma + channels, scratch = dshift + channels;
    memset(dx, 0, (count + 2 * channels) * sizeof *dx);
    for (i = 0; i < sets; i++) o.stats[sets + i] = fabs(o.stats[sets + i]) + 0.5;
    norm_value(&o);
    reference_norm_parameters(&n.s, o.x, o.stats, o.dy, dgamma, dshift);
    if (frozen) reference_norm_frozen(&n.s, o.stats, o.gamma, o.dy, dx);
    else reference_norm_backward(&n.s, o.x, o.stats, o.gamma, o.dy, dx, scratch);
    check_slope(&o, "dx", o.x, count, dx);
    check_slope(&o, "dgamma", o.gamma, channels, dgamma);
    check_slope(&o, "dbeta", o.shift, channels, dshift);
    free(all);
}

static void test_reference_norms(void) {
    static const size_t shapes[][4] = {{1, 12, 3, 3}, {5, 1, 11, 1}, {2, 9, 6, 2}, {3, 7, 4, 4}, {2, 6, 12, 3}};
    size_t i;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        test_reference_norm(shapes[i], 0);
        test_reference_norm(shapes[i], 1);
    }
}

/* A NaN in x or dy is one in all of its group that depends on it, and nowhere else. */
static void test_norm_specials(void) {
    static const size_t shapes[][4] = {{1, 10, 6, 6}, {5, 1, 6, 1}, {2, 5, 6, 3}};
    size_t i, j, wrong = 0;
    for (i = 0; i < 3; i++) {
        norm_case n = make_norm(shapes[i]);
        const size_t bad = 20, channels = n.s.C;
        test_tensor t[NORM_TENSORS];
        norm_tensors(&n, MPT_F16, MPT_F16, MPT_F32, t);
        CHECK_OK(context, call_norm_stats(context, &n, t));
        t[SLOPE].value[bad] = (double)nan_value(), test_tensor_upload(&t[SLOPE]);
        CHECK_OK(context, call_norm_backward(context, &n, t));
        for (j = DX; j <= DSHIFT; j++) test_tensor_download(&t[j]);
        for (j = 0; j < t[DX].count; j++)
            wrong +=
                test_is_finite(t[DX].value[j]) == (reference_norm_group(&n.s, j) == reference_norm_group(&n.s, bad));
        for (j = 0; j < channels; j++)
            wrong += test_is_finite(t[DGAMMA].value[j]) == (j == bad % channels) ||
                     test_is_finite(t[DSHIFT].value[j]) == (j == bad % channels);
        t[INPUT].value[bad] = (double)nan_value(), test_tensor_upload(&t[INPUT]);
        n.act = MPT_RELU;
        CHECK_OK(context, call_norm_stats(context, &n, t));
        CHECK_OK(context, call_norm_forward(context, &n, t));
        test_tensor_download(&t[OUTPUT]);
        for (j = 0; j < t[OUTPUT].count; j++)
            wrong += test_is_finite(t[OUTPUT].value[j]) ==
                     (reference_norm_group(&n.s, j) == reference_norm_group(&n.s, bad));
        for (j = 0; j < NORM_TENSORS; j++) test_tensor_free(&t[j]);
    }
    CHECK_EQUAL(wrong, 0);
}

static void test_norm_shape_errors(void) {
    static const size_t bad[][4] = {{0, 4, 6, 3}, {2, 0, 6, 3}, {2, 4, 0, 3}, {2, 4, 6, 0}, {2, 4, 6, 4}, {2, 4, 6, 7}};
    test_tensor t = test_tensor_random(context, MPT_F32, 64, 1);
    const mpt_array x = t.array;
    float *f = floats_of(&t);
    mpt_context *c = context;
    norm_case n;
    size_t i;
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        n = make_norm(bad[i]);
        CHECK_ERROR(c, mpt_norm_stats(c, &n.s, x, f), MPT_ERROR_SHAPE, "groups");
        CHECK_ERROR(c, mpt_norm_forward(c, &n.s, x, f, x, x, MPT_RELU, x), MPT_ERROR_SHAPE, "groups");
        CHECK_ERROR(c, mpt_norm_backward(c, &n.s, x, f, 0, x, x, 0, x, 0, x, x), MPT_ERROR_SHAPE, "groups");
        CHECK_ERROR(c, mpt_norm_running(c, &n.s, 0.1f, f, f), MPT_ERROR_SHAPE, "groups");
    }
    n = make_norm(norm_shapes[0]);
    n.s.N = (size_t)-1 / 2;
    CHECK_ERROR(c, mpt_norm_stats(c, &n.s, x, f), MPT_ERROR_SHAPE, "overflow");
    n = make_norm(norm_shapes[7]);
    CHECK_ERROR(c, mpt_norm_running(c, &n.s, 0.1f, f, f), MPT_ERROR_SHAPE, "variance"); /* of one value */
    n = make_norm(norm_shapes[0]);
    n.s.eps = -1e-5f;
    CHECK_ERROR(c, mpt_norm_stats(c, &n.s, x, f), MPT_ERROR_ARGUMENT, "eps");
    n.s.eps = nan_value();
    CHECK_ERROR(c, mpt_norm_forward(c, &n.s, x, f, x, x, MPT_RELU, x), MPT_ERROR_ARGUMENT, "eps");
    test_tensor_free(&t);
}

static void test_norm_errors(void) {
    test_tensor t = test_tensor_random(context, MPT_F32, 240, 1);
    const mpt_array null = mpt_f32_array(NULL), fp8 = mpt_typed_array(t.array.data, MPT_E4M3), x = t.array;
    const norm_case n = make_norm(norm_shapes[0]);
    const mpt_norm_shape *s = &n.s;
    float *f = floats_of(&t);
    mpt_context *c = context;
    CHECK(mpt_norm_stats(NULL, s, x, f) == MPT_ERROR_ARGUMENT);
    CHECK_ERROR(c, mpt_norm_stats(c, NULL, x, f), MPT_ERROR_ARGUMENT, "op");
    CHECK_ERROR(c, mpt_norm_stats(c, s, null, f), MPT_ERROR_ARGUMENT, "x");
    CHECK_ERROR(c, mpt_norm_stats(c, s, x, NULL), MPT_ERROR_ARGUMENT, "stats");
    CHECK_ERROR(c, mpt_norm_stats(c, s, fp8, f), MPT_ERROR_TYPE, "x");
    CHECK_ERROR(c, mpt_norm_forward(c, s, null, f, x, x, MPT_RELU, x), MPT_ERROR_ARGUMENT, "x");
    CHECK_ERROR(c, mpt_norm_forward(c, s, x, NULL, x, x, MPT_RELU, x), MPT_ERROR_ARGUMENT, "stats");
    CHECK_ERROR(c, mpt_norm_forward(c, s, x, f, null, x, MPT_RELU, x), MPT_ERROR_ARGUMENT, "gamma");
    CHECK_ERROR(c, mpt_norm_forward(c, s, x, f, x, null, MPT_RELU, x), MPT_ERROR_ARGUMENT, "beta");
    CHECK_ERROR(c, mpt_norm_forward(c, s, x, f, x, x, MPT_RELU, null), MPT_ERROR_ARGUMENT, "y");
    CHECK_ERROR(c, mpt_norm_forward(c, s, x, f, x, x, MPT_ACTIVATION_COUNT, x), MPT_ERROR_ARGUMENT, "activation");
    CHECK_ERROR(c, mpt_norm_forward(c, s, x, f, fp8, x, MPT_RELU, x), MPT_ERROR_TYPE, "gamma");
    CHECK_ERROR(c, mpt_norm_backward(c, s, null, f, 0, x, x, 0, x, 0, x, x), MPT_ERROR_ARGUMENT, "x");
    CHECK_ERROR(c, mpt_norm_backward(c, s, x, NULL, 0, x, x, 0, x, 0, x, x), MPT_ERROR_ARGUMENT, "stats");
    CHECK_ERROR(c, mpt_norm_backward(c, s, x, f, 0, null, x, 0, x, 0, x, x), MPT_ERROR_ARGUMENT, "gamma");
    CHECK_ERROR(c, mpt_norm_backward(c, s, x, f, 0, x, null, 0, x, 0, x, x), MPT_ERROR_ARGUMENT, "dy");
    CHECK_ERROR(c, mpt_norm_backward(c, s, x, f, 0, x, x, 0, x, 0, null, x), MPT_ERROR_ARGUMENT, "dgamma");
    CHECK_ERROR(c, mpt_norm_backward(c, s, x, f, 0, x, x, 0, x, 0, x, null), MPT_ERROR_ARGUMENT, "dbeta");
    CHECK_ERROR(c, mpt_norm_backward(c, s, x, f, 0, x, x, 0, fp8, 0, x, x), MPT_ERROR_TYPE, "dx");
    CHECK_ERROR(c, mpt_norm_running(c, s, 0.1f, NULL, f), MPT_ERROR_ARGUMENT, "stats");
    CHECK_ERROR(c, mpt_norm_running(c, s, 0.1f, f, NULL), MPT_ERROR_ARGUMENT, "running");
    CHECK_ERROR(c, mpt_norm_running(c, s, 1.25f, f, f), MPT_ERROR_ARGUMENT, "momentum");
    CHECK_ERROR(c, mpt_norm_running(c, s, nan_value(), f, f), MPT_ERROR_ARGUMENT, "momentum");
    test_tensor_free(&t);
}

/* ==== LOSSES ==== */

typedef struct loss_case {
    mpt_loss_kind kind;
    size_t N, C;
    double width; /* logits lie in +-width */
    mpt_dtype type_x, type_dx;
    float grad_scale, loss_scale;
    float smoothing; /* this and the rest: of cross-entropy */
    int weighted, ignore;
    int32_t ignore_index; /* if it is no class, every third row has it */
} loss_case;

typedef struct loss_data { /* device memory, but for label */
    test_tensor x, dx, target, weights;
    int32_t *labels, *label;
    float *scale;
    mpt_loss_sum *sum;
} loss_data;

static loss_data loss_new(const loss_case *c) {
    loss_data d;
    size_t i;
    d.x = test_tensor_new(context, c->type_x, c->N * c->C);
    test_tensor_fill(&d.x, -c->width, c->width, 1);
    d.dx = test_tensor_new(context, c->type_dx, c->N * c->C);
    d.target = test_tensor_new(context, MPT_F32, c->N * c->C);
    test_tensor_fill(&d.target, c->kind == MPT_LOSS_BCE_WITH_LOGITS ? 0 : -1, 1, 2);
    d.weights = test_tensor_new(context, MPT_F32, c->C);
    test_tensor_fill(&d.weights, 0.25, 2, 4);
    d.label = (int32_t *)test_memory(c->N * sizeof *d.label);
    for (i = 0; i < c->N; i++) {
        d.label[i] = (int32_t)(mpt_hash(3, 0, 0, i) % c->C);
        if (c->ignore && c->ignore_index < 0 && i % 3 == 1) d.label[i] = c->ignore_index;
    }
    d.labels = (int32_t *)mpt_alloc(context, c->N * sizeof *d.labels);
    d.scale = (float *)mpt_alloc(context, sizeof *d.scale);
    d.sum = (mpt_loss_sum *)mpt_alloc(context, sizeof *d.sum);
    CHECK_OK(context, mpt_upload(context, d.labels, d.label, c->N * sizeof *d.labels));
    CHECK_OK(context, mpt_upload(context, d.scale, &c->loss_scale, sizeof c->loss_scale));
    return d;
}

static void loss_free(loss_data *d) {
    test_tensor_free(&d->x), test_tensor_free(&d->dx), test_tensor_free(&d->target), test_tensor_free(&d->weights);
    mpt_free(context, d->labels), mpt_free(context, d->scale), mpt_free(context, d->sum);
    free(d->label);
}

/* Adds to a sum that already holds 10 rows. loss_scale 0 stands for a NULL pointer. */
static mpt_loss_sum call_loss(mpt_context *ctx, const loss_case *c, const loss_data *d, mpt_array dx) {
    const float *scale = c->loss_scale != 0 ? d->scale : NULL;
    mpt_cross_entropy_desc desc = MPT_ZERO;
    mpt_loss_sum sum;
    const int plain = !c->weighted && !c->ignore && !(c->smoothing > 0);
    memset(&sum, 0, sizeof sum);
    sum.loss = 1, sum.weight = 20, sum.rows = 10, sum.correct = 5;
    desc.label_smoothing = c->smoothing;
    desc.class_weights = c->weighted ? floats_of(&d->weights) : NULL;
    desc.ignore = c->ignore, desc.ignore_index = c->ignore_index;
    CHECK_OK(context, mpt_upload(context, d->sum, &sum, sizeof sum));
    if (c->kind != MPT_LOSS_CROSS_ENTROPY) {
        CHECK_OK(ctx, mpt_elementwise_loss(ctx, c->kind, c->N, c->C, d->x.array, floats_of(&d->target), c->grad_scale,
                                           scale, dx, d->sum));
    } else {
        CHECK_OK(ctx, mpt_cross_entropy(ctx, plain ? NULL : &desc, c->N, c->C, d->x.array, d->labels, c->grad_scale,
                                        scale, dx, d->sum));
    }
    CHECK_OK(context, mpt_download(context, &sum, d->sum, sizeof sum));
    return sum;
}

static int is_ignored(const loss_case *c, const loss_data *d, size_t row) {
    return c->ignore && d->label[row] == c->ignore_index;
}

/* What a row weighs in the mean. */
static double row_weight(const loss_case *c, const loss_data *d, size_t row) {
    if (is_ignored(c, d, row)) return 0;
    return c->weighted ? d->weights.value[d->label[row]] : 1;
}

/* Loss of a row, its slopes, and how far fp32 arithmetic may take both off. u is the unit roundoff; expf, logf and
   log1pf are taken to be good to 2 ulp = 4 u.

   With d = x - max, the loss is sum_j t_j (L + |d_j|), L the logarithm of a sum of C exponentials of which one is 1. d
   has error u |d|, so exp d has relative error (|d| + 4) u; as e^d |d| < 0.4 the sum has relative error under (2 C + 4)
   u, which is L's absolute error, with 4 u of itself. A t_j passes 4 roundings; `terms` of them are not 0. The loss,
   all terms of which are positive, passes terms + 10 roundings on top. A probability has relative error (2 C + 9 + |d|)
   u, and times the sum of t terms + 5 more; a slope that of t, and its own. */
static double cross_entropy_row(const loss_case *c, const loss_data *d, size_t row, double *slope, double *slope_error,
                                double *error) {
    const double u = test_unit(MPT_F32), classes = (double)c->C, *x = d->x.value + row * c->C, s = (double)c->smoothing;
    const double *weights = c->weighted ? d->weights.value : NULL, terms = s > 0 ? classes : 1;
    const size_t label = (size_t)d->label[row];
    const double loss = reference_cross_entropy(x, c->C, label, s, weights);
    double largest, total = 0;
    size_t j;
    reference_log_sum(x, c->C, &largest);
    for (j = 0; j < c->C; j++) total += reference_target(c->C, label, s, weights, j);
    for (j = 0; j < c->C; j++) {
        const double t = reference_target(c->C, label, s, weights, j);
        slope[j] = reference_cross_entropy_slope(x, c->C, label, s, weights, j);
        slope_error[j] = u * ((slope[j] + t) * (2 * classes + 14 + terms + largest - x[j]) + 4 * t + fabs(slope[j]));
        slope_error[j] += total * test_tiny(MPT_F32);
    }
    *error = u * (total * (2 * classes + 4) + (terms + 10) * loss);
    return loss;
}

/* An element passes 3 roundings of its own size, that of BCE, max(x, 0) - x t + log(1 + exp(-|x|)), 3 of |x| (1 + |t|)
   and 10 of the logarithm; the row C additions and a product. Slopes: 1 rounding, of BCE 6 of the sigmoid and 1. */
static double elementwise_row(const loss_case *c, const loss_data *d, size_t row, double *slope, double *slope_error,
                              double *error) {
    const double u = test_unit(MPT_F32), classes = (double)c->C;
    const double *x = d->x.value + row * c->C, *t = d->target.value + row * c->C;
    const double loss = reference_row_loss(c->kind, x, t, c->C);
    double own = 3 * loss;
    size_t j;
    for (j = 0; j < c->C; j++) {
        slope[j] = reference_loss_slope(c->kind, x[j], t[j]) / classes;
        slope_error[j] = u * fabs(slope[j]);
        if (c->kind != MPT_LOSS_BCE_WITH_LOGITS) continue;
        slope_error[j] += 6 * u * (slope[j] + t[j] / classes);
        own += (3 * fabs(x[j]) * (1 + t[j]) + 10 * log(1 + exp(-fabs(x[j])))) / classes;
    }
    *error = u * (own + (classes + 2) * loss);
    return loss;
}

/* Sum of the losses, and what each dx shall be: slope * scale / weight, 5 roundings. Returns how far it may be off. */
static double expect_loss(const loss_case *c, const loss_data *d, double *dx, double *tolerance, mpt_loss_sum *sum) {
    const double scale = (double)c->grad_scale * (c->loss_scale != 0 ? (double)c->loss_scale : 1);
    double bound = 0, factor;
    size_t row, i;
    memset(sum, 0, sizeof *sum);
    for (row = 0; row < c->N; row++) {
        double *slope = dx + row * c->C, *slope_error = tolerance + row * c->C, error = 0;
        if (is_ignored(c, d, row)) continue;
        sum->loss += (c->kind == MPT_LOSS_CROSS_ENTROPY ? cross_entropy_row : elementwise_row)(c, d, row, slope,
                                                                                               slope_error, &error);
        sum->weight += row_weight(c, d, row);
        sum->rows++;
        bound += error;
    }
    factor = sum->weight > 0 ? scale / sum->weight : 0;
    for (i = 0; i < c->N * c->C; i++) {
        if (is_ignored(c, d, i / c->C)) continue; /* both are 0 */
        dx[i] *= factor;
        tolerance[i] = fabs(factor) * tolerance[i] + 5 * test_unit(MPT_F32) * fabs(dx[i]);
        tolerance[i] += test_unit(c->type_dx) * (fabs(dx[i]) + tolerance[i]) + test_tiny(c->type_dx);
    }
    return bound + 1e-12 * sum->loss;
}

static size_t first_largest(const double *x, size_t n) {
    size_t best = 0, j;
    for (j = 1; j < n; j++) best = x[j] > x[best] ? j : best;
    return best;
}

static void test_loss(const loss_case *c) {
    loss_data d = loss_new(c);
    const size_t bytes = test_tensor_bytes(&d.dx);
    double *expected = test_doubles(d.dx.count), *tolerance = test_doubles(d.dx.count), bound;
    unsigned char *first = (unsigned char *)test_memory(2 * bytes), *again = first + bytes;
    mpt_loss_sum sums[THREADS], plain, sum;
    size_t row, correct = 0;
    int i, ok = 1;
    bound = expect_loss(c, &d, expected, tolerance, &sum);
    for (row = 0; row < c->N; row++)
        correct += !is_ignored(c, &d, row) && first_largest(d.x.value + row * c->C, c->C) == (size_t)d.label[row];
    for (i = 0; i < THREADS; i++) {
        test_tensor_poison(&d.dx);
        sums[i] = call_loss(contexts[DEFAULT][i], c, &d, d.dx.array);
        CHECK_OK(context, mpt_download(context, i ? again : first, d.dx.array.data, bytes));
        if (i) ok &= CHECK(memcmp(first, again, bytes) == 0);
        ok &= CHECK(memcmp(&sums[i], &sums[0], sizeof *sums) == 0);
    }
    test_tensor_download(&d.dx);
    ok &= CHECK_ALL(d.dx.value, d.dx.count, expected, tolerance);
    ok &= CHECK_NEAR(sums[0].loss, 1 + sum.loss, bound);
    ok &= CHECK_NEAR(sums[0].weight, 20 + sum.weight, 1e-12 * sum.weight);
    ok &= CHECK_EQUAL(sums[0].rows, 10 + sum.rows);
    ok &= CHECK_EQUAL(sums[0].correct, 5 + (c->kind == MPT_LOSS_CROSS_ENTROPY ? correct : 0));
    plain = call_loss(context, c, &d, mpt_f32_array(NULL)); /* dx is optional */
    ok &= CHECK(memcmp(&plain, &sums[0], sizeof plain) == 0);
    if (!ok)
        printf("    in loss %d of N %lu C %lu, width %g, smoothing %g, weighted %d, ignore %d\n", (int)c->kind,
               (unsigned long)c->N, (unsigned long)c->C, c->width, (double)c->smoothing, c->weighted, c->ignore);
    free(expected), free(tolerance), free(first);
    loss_free(&d);
}

static void test_losses(void) {
    static const size_t shapes[][2] = {{1, 1}, {1, 2}, {7, 10}, {33, 3}, {5, 1000}, {20011, 10}};
    static const double widths[] = {1, 30, 10000}; /* exp(10000) overflows if the largest is not taken out */
    size_t i;
    int mix, kind;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (mix = 0; mix < 9; mix++) {
            loss_case c = MPT_ZERO;
            if (shapes[i][0] > 10000 && mix % 4) continue; /* each type once is enough */
            c.N = shapes[i][0], c.C = shapes[i][1], c.width = widths[mix % 3];
            c.type_x = (mpt_dtype)(mix % 3), c.type_dx = (mpt_dtype)(mix / 3);
            c.grad_scale = mix % 4 ? 1 : 0.25f, c.loss_scale = mix % 2 ? 1024.0f : 0;
            test_loss(&c);
            c.smoothing = mix % 2 ? 0.1f : 0, c.weighted = mix % 3 != 1, c.ignore = mix != 2;
            c.ignore_index = mix % 2 ? -100 : 1;
            test_loss(&c);
            c.smoothing = 0, c.weighted = c.ignore = 0;
            for (kind = MPT_LOSS_SQUARED_ERROR; kind < MPT_LOSS_KIND_COUNT; kind++) {
                c.kind = (mpt_loss_kind)kind;
                c.width = kind == MPT_LOSS_BCE_WITH_LOGITS ? widths[mix % 3] : 2;
                test_loss(&c);
            }
        }
}

/* The slopes of the reference: step 2^-13, third derivatives at most 2 (softmax and sigmoid, weighted) or 0, so the
   truncation error is at most h^2 / 3 < 6e-9; rounding, 2^-53 |loss| C / h, is far below. No value is near a kink. */
typedef struct loss_objective {
    const loss_case *c;
    double *x, *target, *weights;
    size_t label;
} loss_objective;

static double loss_value(void *user) {
    const loss_objective *o = (const loss_objective *)user;
    if (o->c->kind != MPT_LOSS_CROSS_ENTROPY) return reference_row_loss(o->c->kind, o->x, o->target, o->c->C);
    return reference_cross_entropy(o->x, o->c->C, o->label, (double)o->c->smoothing, o->weights);
}

static void test_reference_losses(void) {
    int kind;
    for (kind = -1; kind < MPT_LOSS_KIND_COUNT; kind++) {
        double slope[10], slope_error[10], error;
        loss_case c = MPT_ZERO;
        loss_objective o;
        loss_data d;
        size_t j;
        c.N = 1, c.C = 10, c.width = 3;
        c.kind = kind > 0 ? (mpt_loss_kind)kind : MPT_LOSS_CROSS_ENTROPY;
        if (kind < 0) c.weighted = 1, c.smoothing = 0.25f;
        d = loss_new(&c);
        (c.kind == MPT_LOSS_CROSS_ENTROPY ? cross_entropy_row : elementwise_row)(&c, &d, 0, slope, slope_error, &error);
        o.c = &c, o.x = d.x.value, o.target = d.target.value, o.label = (size_t)d.label[0];
        o.weights = c.weighted ? d.weights.value : NULL;
        for (j = 0; j < c.C; j++) {
            const double distance = fabs(o.x[j] - o.target[j]);
            CHECK(kind <= MPT_LOSS_BCE_WITH_LOGITS || (distance > 0.001 && fabs(distance - 1) > 0.001));
            CHECK_NEAR(slope[j], reference_slope(loss_value, &o, &o.x[j], ldexp(1, -13)), 6e-9);
        }
        loss_free(&d);
    }
}

/* A label outside 0..C-1 makes its row NaN and no other, unless it is the one to be ignored. */
static void test_bad_labels(void) {
    static const int32_t bad[] = {-1, 4, 2147483647, -2147483647};
    loss_case c = MPT_ZERO;
    size_t i, j;
    c.N = 3, c.C = 4, c.width = 1, c.grad_scale = 1;
    for (i = 0; i < 12; i++) {
        loss_data d;
        mpt_loss_sum sum;
        const int ignored = i >= 8;
        c.weighted = i >= 4, c.ignore = ignored, c.ignore_index = bad[i % 4];
        d = loss_new(&c);
        d.label[0] = d.label[2] = 1, d.label[1] = bad[i % 4];
        CHECK_OK(context, mpt_upload(context, d.labels, d.label, 3 * sizeof *bad));
        test_tensor_poison(&d.dx);
        sum = call_loss(context, &c, &d, d.dx.array);
        test_tensor_download(&d.dx);
        CHECK(test_is_finite(sum.loss) == ignored);
        CHECK_EQUAL(sum.rows, ignored ? 12 : 13);
        for (j = 0; j < 12; j++) CHECK(test_is_finite(d.dx.value[j]) == (ignored || j / 4 != 1));
        loss_free(&d);
    }
}

/* Nothing counts: the sum stays as it was, and there is no gradient. */
static void test_all_ignored(void) {
    loss_case c = MPT_ZERO;
    int weighted;
    c.N = 5, c.C = 3, c.width = 1, c.grad_scale = 1, c.loss_scale = 65536, c.ignore = 1, c.ignore_index = -100;
    for (weighted = 0; weighted < 2; weighted++) {
        loss_data d;
        mpt_loss_sum sum;
        size_t i;
        c.weighted = weighted;
        d = loss_new(&c);
        for (i = 0; i < c.N; i++) d.label[i] = -100;
        CHECK_OK(context, mpt_upload(context, d.labels, d.label, c.N * sizeof *d.label));
        test_tensor_poison(&d.dx);
        sum = call_loss(context, &c, &d, d.dx.array);
        test_tensor_download(&d.dx);
        CHECK(sum.rows == 10 && sum.correct == 5);
        CHECK_EQUAL(sum.loss, 1);
        CHECK_EQUAL(sum.weight, 20);
        for (i = 0; i < d.dx.count; i++) CHECK_EQUAL(d.dx.value[i], 0);
        loss_free(&d);
    }
}

/* Where x is what it should be, elementwise losses are flat: L1's slope is 0 between -1 and 1, as PyTorch's. */
static void test_loss_at_target(void) {
    int kind;
    size_t i;
    for (kind = MPT_LOSS_SQUARED_ERROR; kind < MPT_LOSS_KIND_COUNT; kind++) {
        loss_case c = MPT_ZERO;
        loss_data d;
        if (kind == MPT_LOSS_BCE_WITH_LOGITS) continue; /* x is no probability */
        c.kind = (mpt_loss_kind)kind, c.N = 3, c.C = 4, c.width = 1, c.grad_scale = 1;
        d = loss_new(&c);
        for (i = 0; i < 12; i++) d.x.value[i] = d.target.value[i];
        test_tensor_upload(&d.x);
        CHECK_EQUAL(call_loss(context, &c, &d, d.dx.array).loss, 1); /* what was there before */
        test_tensor_download(&d.dx);
        for (i = 0; i < 12; i++) CHECK_EQUAL(d.dx.value[i], 0);
        loss_free(&d);
    }
}

/* A NaN in x is one in the loss, and in the gradient of what it went into: its row's, or its own. */
static void test_loss_nan(void) {
    int kind;
    for (kind = 0; kind < MPT_LOSS_KIND_COUNT; kind++) {
        loss_case c = MPT_ZERO;
        loss_data d;
        mpt_loss_sum sum;
        size_t i, bad;
        c.kind = (mpt_loss_kind)kind, c.N = 3, c.C = 4, c.width = 1, c.grad_scale = 1;
        for (bad = 4; bad < 8; bad++) {
            d = loss_new(&c);
            d.x.value[bad] = (double)nan_value(), test_tensor_upload(&d.x);
            sum = call_loss(context, &c, &d, d.dx.array);
            test_tensor_download(&d.dx);
            CHECK(!test_is_finite(sum.loss));
            for (i = 0; i < 12; i++) CHECK(test_is_finite(d.dx.value[i]) == (kind ? i != bad : i / 4 != 1));
            loss_free(&d);
        }
    }
}

static void test_loss_errors(void) {
    const mpt_array null = mpt_f32_array(NULL);
    mpt_cross_entropy_desc desc = MPT_ZERO;
    mpt_context *ctx = context;
    loss_case c = MPT_ZERO;
    loss_data d;
    mpt_array x, fp8;
    const float *target;
    int kind;
    c.N = 2, c.C = 3, c.width = 1;
    d = loss_new(&c);
    x = d.x.array, fp8 = mpt_typed_array(d.x.array.data, MPT_E5M2), target = floats_of(&d.target);
    CHECK_ERROR(ctx, mpt_cross_entropy(ctx, NULL, 2, 3, null, d.labels, 1, NULL, x, d.sum), MPT_ERROR_ARGUMENT, "x");
    CHECK_ERROR(ctx, mpt_cross_entropy(ctx, NULL, 2, 3, x, NULL, 1, NULL, x, d.sum), MPT_ERROR_ARGUMENT, "target");
    CHECK_ERROR(ctx, mpt_cross_entropy(ctx, NULL, 2, 3, x, d.labels, 1, NULL, x, NULL), MPT_ERROR_ARGUMENT, "sum");
    CHECK_ERROR(ctx, mpt_cross_entropy(ctx, NULL, 2, 3, fp8, d.labels, 1, NULL, x, d.sum), MPT_ERROR_TYPE, "x");
    CHECK_ERROR(ctx, mpt_cross_entropy(ctx, NULL, 2, 3, x, d.labels, 1, NULL, fp8, d.sum), MPT_ERROR_TYPE, "dx");
    CHECK(mpt_cross_entropy(ctx, NULL, (size_t)-1 / 3, 4, x, d.labels, 1, NULL, x, d.sum) == MPT_ERROR_SHAPE);
    CHECK_OK(ctx, mpt_cross_entropy(ctx, NULL, 0, 3, x, d.labels, 1, NULL, x, d.sum));
    desc.label_smoothing = 1.5f;
    CHECK_ERROR(ctx, mpt_cross_entropy(ctx, &desc, 2, 3, x, d.labels, 1, NULL, x, d.sum), MPT_ERROR_ARGUMENT,
                "label_smoothing");
    for (kind = MPT_LOSS_SQUARED_ERROR; kind < MPT_LOSS_KIND_COUNT; kind++) {
        const mpt_loss_kind k = (mpt_loss_kind)kind;
        CHECK_ERROR(ctx, mpt_elementwise_loss(ctx, k, 2, 3, x, NULL, 1, NULL, x, d.sum), MPT_ERROR_ARGUMENT, "target");
        CHECK_ERROR(ctx, mpt_elementwise_loss(ctx, k, 2, 3, null, target, 1, NULL, x, d.sum), MPT_ERROR_ARGUMENT, "x");
        CHECK_ERROR(ctx, mpt_elementwise_loss(ctx, k, 2, 3, x, target, 1, NULL, x, NULL), MPT_ERROR_ARGUMENT, "sum");
        CHECK_ERROR(ctx, mpt_elementwise_loss(ctx, k, 2, 3, x, target, 1, NULL, fp8, d.sum), MPT_ERROR_TYPE, "dx");
        CHECK(mpt_elementwise_loss(ctx, k, (size_t)-1 / 3, 4, x, target, 1, NULL, x, d.sum) == MPT_ERROR_SHAPE);
    }
    CHECK_ERROR(ctx, mpt_elementwise_loss(ctx, MPT_LOSS_KIND_COUNT, 2, 3, x, target, 1, NULL, x, d.sum),
                MPT_ERROR_ARGUMENT, "kind");
    loss_free(&d);
}

/* ==== ERRORS OF PRODUCTS ==== */

static void test_gemm_errors(void) {
    test_tensor t = test_tensor_new(context, MPT_F32, 64);
    const mpt_array null = mpt_f32_array(NULL), fp8 = mpt_typed_array(t.array.data, MPT_E4M3), x = t.array;
    const mpt_array unknown = mpt_typed_array(t.array.data, (mpt_dtype)test_number(77));
    const size_t huge = (size_t)-1 / 2;
    CHECK(mpt_gemm(NULL, 0, 0, 2, 3, 4, 1, x, 4, x, 3, 0, x, 3) == MPT_ERROR_ARGUMENT);
    CHECK_ERROR(context, mpt_gemm(context, 0, 0, 2, 3, 4, 1, null, 4, x, 3, 0, x, 3), MPT_ERROR_ARGUMENT, "a");
    CHECK_ERROR(context, mpt_gemm(context, 0, 0, 2, 3, 4, 1, x, 4, null, 3, 0, x, 3), MPT_ERROR_ARGUMENT, "b");
    CHECK_ERROR(context, mpt_gemm(context, 0, 0, 2, 3, 4, 1, x, 4, x, 3, 0, null, 3), MPT_ERROR_ARGUMENT, "c");
    CHECK_ERROR(context, mpt_gemm(context, 0, 0, 2, 3, 4, 1, fp8, 4, x, 3, 0, x, 3), MPT_ERROR_TYPE, "a");
    CHECK_ERROR(context, mpt_gemm(context, 0, 0, 2, 3, 4, 1, x, 4, fp8, 3, 0, x, 3), MPT_ERROR_TYPE, "b");
    CHECK_ERROR(context, mpt_gemm(context, 0, 0, 2, 3, 4, 1, x, 4, x, 3, 0, unknown, 3), MPT_ERROR_TYPE, "c");
    CHECK_ERROR(context, mpt_gemm(context, 0, 0, 2, 3, 4, 1, x, 3, x, 3, 0, x, 3), MPT_ERROR_SHAPE, "lda");
    CHECK_ERROR(context, mpt_gemm(context, 1, 0, 2, 3, 4, 1, x, 1, x, 3, 0, x, 3), MPT_ERROR_SHAPE, "lda");
    CHECK_ERROR(context, mpt_gemm(context, 0, 0, 2, 3, 4, 1, x, 4, x, 2, 0, x, 3), MPT_ERROR_SHAPE, "ldb");
    CHECK_ERROR(context, mpt_gemm(context, 0, 1, 2, 3, 4, 1, x, 4, x, 3, 0, x, 3), MPT_ERROR_SHAPE, "ldb");
    CHECK_ERROR(context, mpt_gemm(context, 0, 0, 2, 3, 4, 1, x, 4, x, 3, 0, x, 2), MPT_ERROR_SHAPE, "ldc");
    CHECK(mpt_gemm(context, 0, 0, huge, 3, 4, 1, x, 4, x, 3, 0, x, 3) == MPT_ERROR_SHAPE);
    CHECK(mpt_gemm(context, 0, 0, 2, 3, 4, 1, x, huge, x, 3, 0, x, 3) == MPT_ERROR_SHAPE);
    CHECK(mpt_gemm(context, 0, 0, 2, 3, huge, 1, x, huge, x, 3, 0, x, 3) == MPT_ERROR_SHAPE);
    test_tensor_free(&t);
}

static void test_linear_errors(void) {
    test_tensor t = test_tensor_new(context, MPT_F32, 64);
    const mpt_array null = mpt_f32_array(NULL), fp8 = mpt_typed_array(t.array.data, MPT_E4M3), x = t.array;
    const size_t huge = (size_t)-1 / 2;
    mpt_context *c = context;
    CHECK_ERROR(c, mpt_linear_forward(c, 2, 3, 4, null, x, x, MPT_RELU, x), MPT_ERROR_ARGUMENT, "a");
    CHECK_ERROR(c, mpt_linear_forward(c, 2, 3, 4, x, null, x, MPT_RELU, x), MPT_ERROR_ARGUMENT, "b");
    CHECK_ERROR(c, mpt_linear_forward(c, 2, 3, 4, x, x, x, MPT_RELU, null), MPT_ERROR_ARGUMENT, "c");
    CHECK_ERROR(c, mpt_linear_forward(c, 2, 3, 4, x, x, x, MPT_ACTIVATION_COUNT, x), MPT_ERROR_ARGUMENT, "activation");
    CHECK_ERROR(c, mpt_linear_forward(c, 2, 3, 4, x, x, fp8, MPT_RELU, x), MPT_ERROR_TYPE, "bias");
    CHECK_ERROR(c, mpt_linear_forward(c, 2, 3, 4, fp8, x, x, MPT_RELU, x), MPT_ERROR_TYPE, "a");
    CHECK(mpt_linear_forward(c, huge, 3, 4, x, x, x, MPT_RELU, x) == MPT_ERROR_SHAPE);
    CHECK(mpt_linear_forward(c, 2, huge, huge, x, x, x, MPT_RELU, x) == MPT_ERROR_SHAPE);
    CHECK_ERROR(c, mpt_linear_backward_data(c, 2, 3, 4, null, x, 0, x), MPT_ERROR_ARGUMENT, "a");
    CHECK_ERROR(c, mpt_linear_backward_data(c, 2, 3, 4, x, null, 0, x), MPT_ERROR_ARGUMENT, "b");
    CHECK_ERROR(c, mpt_linear_backward_data(c, 2, 3, 4, x, x, 0, null), MPT_ERROR_ARGUMENT, "c");
    CHECK_ERROR(c, mpt_linear_backward_weight(c, 2, 3, 4, null, x, 0, x), MPT_ERROR_ARGUMENT, "a");
    CHECK_ERROR(c, mpt_linear_backward_weight(c, 2, 3, 4, x, null, 0, x), MPT_ERROR_ARGUMENT, "b");
    CHECK_ERROR(c, mpt_linear_backward_weight(c, 2, 3, 4, x, x, 0, fp8), MPT_ERROR_TYPE, "c");
    CHECK_ERROR(c, mpt_bias_backward(c, 2, 3, null, 0, x), MPT_ERROR_ARGUMENT, "a");
    CHECK_ERROR(c, mpt_bias_backward(c, 2, 3, fp8, 0, x), MPT_ERROR_TYPE, "a");
    CHECK(mpt_bias_backward(c, huge, 3, x, 0, x) == MPT_ERROR_SHAPE);
    CHECK_OK(c, mpt_bias_backward(c, 2, 0, x, 0, x)); /* nothing to do */
    test_tensor_free(&t);
}

static void test_conv2d_errors(void) {
    test_tensor t = test_tensor_new(context, MPT_F32, 64);
    const mpt_array null = mpt_f32_array(NULL), fp8 = mpt_typed_array(t.array.data, MPT_E4M3), x = t.array;
    mpt_conv2d_shape s = make_layer(0, conv_shapes[9]).s, large = s;
    mpt_context *c = context;
    CHECK_ERROR(c, mpt_conv2d_forward(c, &s, null, x, x, MPT_RELU, x), MPT_ERROR_ARGUMENT, "x");
    CHECK_ERROR(c, mpt_conv2d_forward(c, &s, x, null, x, MPT_RELU, x), MPT_ERROR_ARGUMENT, "w");
    CHECK_ERROR(c, mpt_conv2d_forward(c, &s, x, x, x, MPT_RELU, null), MPT_ERROR_ARGUMENT, "y");
    CHECK_ERROR(c, mpt_conv2d_forward(c, NULL, x, x, x, MPT_RELU, x), MPT_ERROR_ARGUMENT, "op");
    large.R = 0;
    CHECK_ERROR(c, mpt_conv2d_forward(c, &large, x, x, x, MPT_RELU, x), MPT_ERROR_SHAPE, "R");
    large = s;
    CHECK_ERROR(c, mpt_conv2d_forward(c, &s, x, x, x, MPT_ACTIVATION_COUNT, x), MPT_ERROR_ARGUMENT, "activation");
    CHECK_ERROR(c, mpt_conv2d_forward(c, &s, x, fp8, x, MPT_RELU, x), MPT_ERROR_TYPE, "w");
    CHECK_ERROR(c, mpt_conv2d_backward_data(c, &s, null, x, 0, x), MPT_ERROR_ARGUMENT, "dy");
    CHECK_ERROR(c, mpt_conv2d_backward_data(c, &s, x, x, 0, null), MPT_ERROR_ARGUMENT, "dx");
    CHECK_ERROR(c, mpt_conv2d_backward_weight(c, &s, x, null, 0, x), MPT_ERROR_ARGUMENT, "x");
    CHECK_ERROR(c, mpt_conv2d_backward_weight(c, &s, x, x, 0, null), MPT_ERROR_ARGUMENT, "dw");
    s.R = 4; /* larger than the input */
    CHECK_ERROR(c, mpt_conv2d_forward(c, &s, x, x, x, MPT_RELU, x), MPT_ERROR_SHAPE, "kernel");
    CHECK_ERROR(c, mpt_conv2d_backward_data(c, &s, x, x, 0, x), MPT_ERROR_SHAPE, "kernel");
    CHECK_ERROR(c, mpt_conv2d_backward_weight(c, &s, x, x, 0, x), MPT_ERROR_SHAPE, "kernel");
    s.R = 3, s.groups = 3; /* of 2 channels */
    CHECK_ERROR(c, mpt_conv2d_forward(c, &s, x, x, x, MPT_RELU, x), MPT_ERROR_SHAPE, "groups");
    CHECK_ERROR(c, mpt_conv2d_backward_data(c, &s, x, x, 0, x), MPT_ERROR_SHAPE, "groups");
    s.C = 3; /* and 2 filters */
    CHECK_ERROR(c, mpt_conv2d_backward_weight(c, &s, x, x, 0, x), MPT_ERROR_SHAPE, "groups");
    large.N = (size_t)-1 / 4;
    CHECK(mpt_conv2d_forward(c, &large, x, x, x, MPT_RELU, x) == MPT_ERROR_SHAPE);
    large.N = 1, large.padding = (size_t)-1 / 2;
    CHECK(mpt_conv2d_forward(c, &large, x, x, x, MPT_RELU, x) == MPT_ERROR_SHAPE);
    large.padding = 0, large.dilation = (size_t)-1 / 2 + 1; /* times R - 1 = 2 wraps to 0 */
    CHECK(mpt_conv2d_forward(c, &large, x, x, x, MPT_RELU, x) == MPT_ERROR_SHAPE);
    large.R = large.S = 1, large.dilation = (size_t)-1; /* of a kernel that it does not stretch */
    CHECK_ERROR(c, mpt_conv2d_forward(c, &large, x, x, x, MPT_RELU, x), MPT_ERROR_SHAPE, "dilation");
    large.dilation = 1, large.stride = (size_t)-1;
    CHECK_ERROR(c, mpt_conv2d_backward_weight(c, &large, x, x, 0, x), MPT_ERROR_SHAPE, "stride");
    test_tensor_free(&t);
}

int main(int argc, char **argv) {
    size_t i;
    test_begin(argc, argv);
    open_all();
    RUN_TEST(test_gemms());
    RUN_TEST(test_gemm_empty());
    RUN_TEST(test_gemm_errors());
    RUN_TEST(test_layers());
    RUN_TEST(test_layer_limits());
    RUN_TEST(test_beside_inf());
    RUN_TEST(test_long_sums());
    for (i = 0; i + LARGE_SHAPES < CONV_SHAPES; i++) RUN_TEST(test_reference_layer(make_layer(0, conv_shapes[i])));
    RUN_TEST(test_conv2d_output());
    RUN_TEST(test_linear_errors());
    RUN_TEST(test_conv2d_errors());
    RUN_TEST(test_pools());
    RUN_TEST(test_pool_specials());
    RUN_TEST(test_pool_errors());
    RUN_TEST(test_huge_stride());
    RUN_TEST(test_nan_row());
    RUN_TEST(test_elementwise());
    RUN_TEST(test_elementwise_specials());
    RUN_TEST(test_elementwise_errors());
    RUN_TEST(test_columns());
    RUN_TEST(test_columns_errors());
    RUN_TEST(test_dropouts());
    RUN_TEST(test_dropout_shares());
    RUN_TEST(test_dropout_errors());
    RUN_TEST(test_norms());
    RUN_TEST(test_norm_cancellation());
    RUN_TEST(test_norm_slopes());
    RUN_TEST(test_norm_far());
    RUN_TEST(test_norm_long());
    RUN_TEST(test_reference_norms());
    RUN_TEST(test_norm_specials());
    RUN_TEST(test_norm_shape_errors());
    RUN_TEST(test_norm_errors());
    RUN_TEST(test_losses());
    RUN_TEST(test_reference_losses());
    RUN_TEST(test_bad_labels());
    RUN_TEST(test_all_ignored());
    RUN_TEST(test_loss_at_target());
    RUN_TEST(test_loss_nan());
    RUN_TEST(test_loss_errors());
    close_all();
    return test_finish("operations");
}
