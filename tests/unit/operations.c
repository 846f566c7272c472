/* operations.c - floor 2: every operation, forward and backward, against the plain loops of a reference context.

   Each runs on every instruction set of this machine, on 1, 2 and 4 threads; the bits must be the same for any number
   of threads. What holds the reference itself to account: PyTorch's values (parity/operations.c runs on it, too), cases
   worked out by hand, and its gradients against central differences of its forward passes. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include "../operation.h"

/* An engine is the default one or an instruction set. */
enum { DEFAULT, PLAIN, ENGINES = PLAIN + MPT_ISA_COUNT - MPT_ISA_PLAIN, THREADS = 3 };

static mpt_context *contexts[ENGINES][THREADS]; /* on 1, 4 and 2 threads; NULL: not on this machine, or not needed */
static mpt_context *context;                    /* the first of them; all tensors live in it */

static void open_all(void) {
    static const int threads[THREADS] = {1, 4, 2};
    int engine, i;
    test_op_open();
    for (engine = 0; engine < ENGINES; engine++)
        for (i = 0; i < (engine == DEFAULT ? THREADS : 2); i++) {
            mpt_context_desc desc = MPT_ZERO;
            desc.threads = threads[i];
            desc.isa = engine >= PLAIN ? (mpt_isa)(MPT_ISA_PLAIN + engine - PLAIN) : MPT_ISA_BEST;
            contexts[engine][i] = test_open(&desc);
            if (contexts[engine][i]) test_op_place(contexts[engine][i], i > 0);
        }
    context = contexts[DEFAULT][0];
}

static void close_all(void) {
    int engine, i;
    for (engine = 0; engine < ENGINES; engine++)
        for (i = 0; i < THREADS; i++) mpt_close(contexts[engine][i]);
    test_op_close();
}

static float nan_value(void) { return test_float(0x7fc00000u); }

/* `good` is a struct of mpt_op_NAME that would do: with one member spoilt the call fails with this code, and the reason
   has this word. */
#define CHECK_SPOILT(name, member, value, code, word)                      \
    do {                                                                   \
        mpt_##name##_op spoilt = good;                                     \
        spoilt.member = value;                                             \
        CHECK_ERROR(context, mpt_op_##name(context, &spoilt), code, word); \
    } while (0)

static const mpt_array no_array = {NULL, MPT_F32};

/* ==== GEMM ==== */

/* What a linear layer adds to a product: bias and activation; for its gradient, sums of the columns of a. */
static mpt_gemm_op gemm_of(int trans, const size_t *shape, mpt_dtype a, mpt_dtype b, mpt_dtype c) {
    mpt_gemm_op op = MPT_ZERO;
    op.trans_a = trans & 1;
    op.trans_b = trans >> 1;
    op.m = shape[0];
    op.n = shape[1];
    op.k = shape[2];
    op.a = test_wanted(a);
    op.b = test_wanted(b);
    op.c = test_wanted(c);
    return op;
}

/* Rows that are `extra` elements longer than the matrix */
static void widen(mpt_gemm_op *op, size_t extra) {
    op->lda = (op->trans_a ? op->m : op->k) + extra;
    op->ldb = (op->trans_b ? op->k : op->n) + extra;
    op->ldc = op->n + extra;
}

static void test_gemms(void) {
    static const size_t shapes[][3] = {{1, 1, 1},      {3, 5, 7},      {2, 3, 1},     {1, 33, 5},      {29, 1, 31},
                                       {17, 31, 13},   {64, 64, 64},   {5, 4, 300},   {129, 127, 257}, {200, 10, 784},
                                       {601, 263, 17}, {140, 601, 19}, {193, 5, 521}, {31, 199, 397},  {97, 64, 513},
                                       {193, 65, 512}, {193, 66, 513}, {7, 33, 1536}, {9, 35, 1541},   {577, 3, 4},
                                       {3, 257, 6},    {624, 32, 1544}, {13, 250, 512}, {13, 250, 513}};
    static const size_t odd[3] = {17, 31, 13};
    static const float factors[][2] = {{1, 0}, {-1.5f, 1}, {0.75f, -0.5f}, {1, 1}};
    size_t i;
    int trans, mix;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (trans = 0; trans < 4; trans++)
            for (mix = 0; mix < 3; mix++) {
                const mpt_dtype type = (mpt_dtype)mix, out = (i + (size_t)mix) % 2 ? type : MPT_F32;
                mpt_gemm_op op = gemm_of(trans, shapes[i], type, type, out);
                widen(&op, (i + (size_t)trans) % 2 * 3);
                op.alpha = factors[((size_t)trans + i) % 4][0];
                op.beta = factors[((size_t)trans + i) % 4][1];
                CHECK_ONCE(context, TEST_GEMM, &op);
            }
    for (mix = 0; mix < 27; mix++)
        for (trans = 0; trans < 4; trans++) {
            mpt_gemm_op op = gemm_of(trans, odd, (mpt_dtype)(mix % 3), (mpt_dtype)(mix / 3 % 3), (mpt_dtype)(mix / 9));
            widen(&op, 2);
            op.alpha = -1.5f;
            op.beta = 0.5f;
            CHECK_ONCE(context, TEST_GEMM, &op);
        }
}

/* A right operand in fp32 is read in place within these limits, a shape on either side of each: 8 tiles of rows (4, 6 or
   8 of one), whole vectors of columns, and 1 MiB over the largest power of two that divides the bytes of a row. */
static void test_gemm_in_place(void) {
    static const struct {
        size_t shape[3], extra;
    } limits[] = {{{32, 32, 9}, 0},    {{33, 32, 9}, 0},     {{48, 16, 40}, 0},    {{49, 16, 40}, 0},
                  {{64, 112, 65}, 0},  {{65, 112, 65}, 0},   {{7, 31, 20}, 1},     {{7, 33, 20}, 31},
                  {{5, 8, 20}, 0},     {{5, 24, 20}, 0},     {{5, 264, 20}, 0},    {{3, 32, 256}, 992},
                  {{3, 32, 257}, 992}, {{11, 48, 512}, 464}, {{11, 48, 513}, 464}, {{2, 512, 1030}, 0}};
    size_t i;
    int trans;
    for (i = 0; i < sizeof limits / sizeof *limits; i++)
        for (trans = 0; trans < 2; trans++) {
            mpt_gemm_op op = gemm_of(trans, limits[i].shape, MPT_F32, MPT_F32, MPT_F32);
            widen(&op, limits[i].extra);
            op.beta = (float)(i % 2);
            CHECK_ONCE(context, TEST_GEMM, &op);
        }
}

/* A right operand that ends with its block of memory, so that sanitizers see a vector reach over the end */
static void test_gemm_end(void) {
    enum { M = 5, K = 20 };
    static const size_t columns[] = {1, 8, 15, 24, 33, 47};
    float a[M * K], c[M * 47];
    size_t i, e;
    int engine;
    for (e = 0; e < M * K; e++) a[e] = 1;
    for (i = 0; i < sizeof columns / sizeof *columns; i++) {
        const size_t n = columns[i], shape[3] = {M, n, K};
        float *b = (float *)malloc(K * n * sizeof *b);
        mpt_gemm_op op = gemm_of(0, shape, MPT_F32, MPT_F32, MPT_F32);
        for (e = 0; e < K * n; e++) b[e] = (float)(e % n);
        op.a.data = a;
        op.b.data = b;
        op.c.data = c;
        for (engine = 0; engine < ENGINES; engine++) {
            if (!contexts[engine][0]) continue;
            CHECK_OK(context, mpt_op_gemm(contexts[engine][0], &op));
            for (e = 0; e < M * n; e++) CHECK_EQUAL((size_t)c[e], K * (e % n));
        }
        free(b);
    }
}

/* N I O of linear layers: forward with bias and ReLU or without, and the gradients of input, weights and bias. */
static void check_linear(const size_t *shape, mpt_dtype x, mpt_dtype w, mpt_dtype y, int plain, float beta) {
    const size_t N = shape[0], I = shape[1], O = shape[2];
    const size_t forward[3] = {N, O, I}, data[3] = {N, I, O}, weight[3] = {O, I, N};
    mpt_gemm_op op = gemm_of(2, forward, x, w, y);
    if (!plain) op.bias = test_wanted(w);
    if (!plain) op.act = MPT_RELU;
    CHECK_ONCE(context, TEST_GEMM, &op);
    op = gemm_of(0, data, y, w, x);
    op.beta = beta;
    CHECK_ONCE(context, TEST_GEMM, &op);
    op = gemm_of(1, weight, y, x, w);
    op.a_sums = test_wanted(w);
    op.beta = beta;
    CHECK_ONCE(context, TEST_GEMM, &op);
}

static void test_linears(void) {
    static const size_t shapes[][3] = {{1, 1, 1}, {3, 5, 7}, {31, 17, 13}, {1, 64, 10}, {65, 129, 33}, {32, 784, 10}};
    size_t i;
    int mix, plain;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (plain = 0; plain < 2; plain++) {
            check_linear(shapes[i], MPT_F32, MPT_F32, MPT_F32, plain, plain ? 0 : -0.75f);
            check_linear(shapes[i], MPT_F16, MPT_F16, i % 2 ? MPT_F16 : MPT_F32, plain, plain ? -0.75f : 0);
            check_linear(shapes[i], MPT_BF16, MPT_BF16, i % 2 ? MPT_F32 : MPT_BF16, plain, plain ? 0 : -0.75f);
        }
    for (mix = 0; mix < 27; mix++)
        check_linear(shapes[2], (mpt_dtype)(mix % 3), (mpt_dtype)(mix / 3 % 3), (mpt_dtype)(mix / 9), mix % 2, 1);
}

/* The other activations, in passing. */
static void test_gemm_activations(void) {
    static const size_t shape[3] = {19, 37, 45};
    int act, type;
    for (act = MPT_LEAKY_RELU; act < MPT_ACTIVATION_COUNT; act++)
        for (type = MPT_F32; type <= MPT_BF16; type++) {
            mpt_gemm_op op = gemm_of(2, shape, (mpt_dtype)type, (mpt_dtype)type, (mpt_dtype)type);
            op.bias = test_wanted(MPT_F32);
            op.act = (mpt_activation)act;
            CHECK_ONCE(context, TEST_GEMM, &op);
        }
}

/* By hand: (1 2 3; 4 5 6) (1 2; 3 4; 5 6) = (22 28; 49 64), each factor as it is and transposed. */
static void check_gemm_by_hand(mpt_context *ctx, int trans) {
    static const float a[2][6] = {{1, 2, 3, 4, 5, 6}, {1, 4, 2, 5, 3, 6}};
    static const float b[2][6] = {{1, 2, 3, 4, 5, 6}, {1, 3, 5, 2, 4, 6}};
    static const float bias[2] = {1, -70}, old[4] = {10, 20, 30, 40}, expected[4] = {50, 0, 114, 78};
    static const size_t shape[3] = {2, 2, 3};
    mpt_gemm_op op = gemm_of(trans, shape, MPT_F32, MPT_F32, MPT_F32);
    float c[4];
    op.a = mpt_f32_array((float *)mpt_alloc(ctx, sizeof a[0]));
    op.b = mpt_f32_array((float *)mpt_alloc(ctx, sizeof b[0]));
    op.c = mpt_f32_array((float *)mpt_alloc(ctx, sizeof old));
    op.bias = mpt_f32_array((float *)mpt_alloc(ctx, sizeof bias));
    CHECK_OK(ctx, mpt_upload(ctx, op.a.data, a[op.trans_a], sizeof a[0]));
    CHECK_OK(ctx, mpt_upload(ctx, op.b.data, b[op.trans_b], sizeof b[0]));
    CHECK_OK(ctx, mpt_upload(ctx, op.c.data, old, sizeof old));
    CHECK_OK(ctx, mpt_upload(ctx, op.bias.data, bias, sizeof bias));
    op.alpha = 2;
    op.beta = 0.5f;
    op.act = MPT_RELU; /* 44 + 5 + 1, 56 + 10 - 70, 98 + 15 + 1, 128 + 20 - 70 */
    CHECK_OK(ctx, mpt_op_gemm(ctx, &op));
    CHECK_OK(ctx, mpt_download(ctx, c, op.c.data, sizeof c));
    CHECK(memcmp(c, expected, sizeof c) == 0);
    mpt_free(ctx, op.a.data);
    mpt_free(ctx, op.b.data);
    mpt_free(ctx, op.c.data);
    mpt_free(ctx, op.bias.data);
}

static void test_gemm_by_hand(void) {
    int trans;
    for (trans = 0; trans < 4; trans++) {
        check_gemm_by_hand(context, trans);
        check_gemm_by_hand(test_plain, trans);
    }
}

/* k = 0: c = beta c. m or n = 0: nothing, whatever the pointers. */
static void test_gemm_empty(void) {
    test_tensor c = test_tensor_random(context, MPT_F32, 6, 4);
    const double before = c.value[5];
    mpt_gemm_op op = MPT_ZERO;
    op.m = 2;
    op.n = 3;
    op.a = op.b = op.c = c.array;
    op.beta = 0.5f;
    CHECK_OK(context, mpt_op_gemm(context, &op));
    test_tensor_download(&c);
    CHECK_EQUAL(c.value[5], before / 2);
    op.beta = 0;
    CHECK_OK(context, mpt_op_gemm(context, &op));
    test_tensor_download(&c);
    CHECK_EQUAL(c.value[5], 0);
    op.a = op.b = op.c = no_array;
    op.k = 5;
    op.m = 0;
    CHECK_OK(context, mpt_op_gemm(context, &op));
    op.m = 2;
    op.n = 0;
    CHECK_OK(context, mpt_op_gemm(context, &op));
    test_tensor_free(&c);
}

static void test_gemm_errors(void) {
    static const size_t shape[3] = {2, 3, 4};
    test_tensor t = test_tensor_new(context, MPT_F32, 64);
    const mpt_array fp8 = mpt_typed_array(t.array.data, MPT_E4M3);
    const mpt_array unknown = mpt_typed_array(t.array.data, (mpt_dtype)test_number(77));
    const size_t huge = (size_t)-1 / 2;
    mpt_gemm_op good = gemm_of(0, shape, MPT_F32, MPT_F32, MPT_F32);
    good.a = good.b = good.c = good.bias = t.array;
    CHECK(mpt_op_gemm(NULL, &good) == MPT_ERROR_ARGUMENT);
    CHECK_ERROR(context, mpt_op_gemm(context, NULL), MPT_ERROR_ARGUMENT, "op");
    CHECK_OK(context, mpt_op_gemm(context, &good));
    CHECK_SPOILT(gemm, a.data, NULL, MPT_ERROR_ARGUMENT, "a");
    CHECK_SPOILT(gemm, b.data, NULL, MPT_ERROR_ARGUMENT, "b");
    CHECK_SPOILT(gemm, c.data, NULL, MPT_ERROR_ARGUMENT, "c");
    CHECK_SPOILT(gemm, act, MPT_ACTIVATION_COUNT, MPT_ERROR_ARGUMENT, "activation");
    CHECK_SPOILT(gemm, a, fp8, MPT_ERROR_TYPE, "a");
    CHECK_SPOILT(gemm, b, fp8, MPT_ERROR_TYPE, "b");
    CHECK_SPOILT(gemm, bias, fp8, MPT_ERROR_TYPE, "bias");
    CHECK_SPOILT(gemm, c, unknown, MPT_ERROR_TYPE, "c");
    CHECK_SPOILT(gemm, lda, 3, MPT_ERROR_SHAPE, "lda");
    CHECK_SPOILT(gemm, ldb, 2, MPT_ERROR_SHAPE, "ldb");
    CHECK_SPOILT(gemm, ldc, 2, MPT_ERROR_SHAPE, "ldc");
    CHECK_SPOILT(gemm, m, huge, MPT_ERROR_SHAPE, "overflow");
    CHECK_SPOILT(gemm, n, huge, MPT_ERROR_SHAPE, "overflow");
    CHECK_SPOILT(gemm, k, huge, MPT_ERROR_SHAPE, "overflow");
    CHECK_SPOILT(gemm, lda, huge, MPT_ERROR_SHAPE, "overflow");
    CHECK_SPOILT(gemm, a_sums, t.array, MPT_ERROR_SHAPE, "trans_a");
    good.trans_a = 1;
    CHECK_SPOILT(gemm, lda, 1, MPT_ERROR_SHAPE, "lda");
    good.a_sums = t.array;
    CHECK_OK(context, mpt_op_gemm(context, &good));
    CHECK_SPOILT(gemm, lda, 3, MPT_ERROR_SHAPE, "lda");
    CHECK_SPOILT(gemm, a_sums, fp8, MPT_ERROR_TYPE, "a_sums");
    good.trans_b = 1;
    CHECK_SPOILT(gemm, ldb, 3, MPT_ERROR_SHAPE, "ldb");
    test_tensor_free(&t);
}

/* ==== CONVOLUTION ==== */

static mpt_conv2d_op conv2d_of(const mpt_conv2d_shape *shape, mpt_dtype x, mpt_dtype w, mpt_dtype y) {
    mpt_conv2d_op op = MPT_ZERO;
    op.shape = *shape;
    op.x = test_wanted(x);
    op.w = test_wanted(w);
    op.y = test_wanted(y);
    op.bias = test_wanted(w);
    return op;
}

/* All passes, each with and without bias, ReLU and old content. */
static void check_conv2d(const mpt_conv2d_shape *shape, mpt_dtype x, mpt_dtype w, mpt_dtype y) {
    const mpt_conv2d_op op = conv2d_of(shape, x, w, y);
    test_op t = test_op_new(context, TEST_CONV2D, &op);
    const mpt_array bias = t.op.conv2d.bias;
    int pass, with;
    for (pass = MPT_FORWARD; pass <= MPT_BACKWARD_WEIGHT; pass++)
        for (with = 0; with < 2; with++) {
            t.op.conv2d.pass = (mpt_pass)pass;
            t.op.conv2d.beta = with == (pass != MPT_FORWARD) ? 0 : -0.75f;
            t.op.conv2d.bias = with ? bias : no_array;
            t.op.conv2d.act = with && pass == MPT_FORWARD ? MPT_RELU : MPT_IDENTITY;
            test_op_fill(&t);
            CHECK_OP(&t);
        }
    test_op_free(&t);
}

/* N H W C K R S, stride padding dilation down and across, groups, same. Groups: few, as many as channels (depthwise),
   with several filters each. Before the large ones some whose axes differ. */
static const mpt_conv2d_shape conv_shapes[] = {
    {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0},         {2, 5, 7, 3, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0},
    {1, 8, 8, 1, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0},        {2, 9, 6, 5, 7, 3, 2, 2, 2, 1, 1, 1, 1, 1, 0},
    {1, 7, 7, 2, 3, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0},         {2, 6, 5, 4, 5, 1, 1, 2, 2, 0, 0, 1, 1, 1, 0},
    {1, 11, 9, 3, 2, 3, 3, 1, 1, 2, 2, 2, 2, 1, 0},        {1, 10, 10, 2, 3, 5, 5, 3, 3, 2, 2, 1, 1, 1, 0},
    {3, 4, 4, 17, 19, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0},       {1, 3, 3, 2, 2, 3, 3, 1, 1, 0, 0, 1, 1, 1, 0},
    {1, 2, 2, 3, 2, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0},         {1, 12, 5, 3, 4, 7, 1, 1, 1, 3, 3, 1, 1, 1, 0},
    {1, 5, 5, 2, 3, 3, 3, 0, 0, 1, 1, 0, 0, 1, 0},         {2, 13, 11, 3, 9, 4, 3, 2, 2, 3, 3, 3, 3, 1, 0},
    {1, 1, 17, 5, 3, 1, 5, 2, 2, 0, 0, 2, 2, 1, 0},        {2, 6, 5, 4, 6, 3, 3, 1, 1, 1, 1, 1, 1, 2, 0},
    {1, 7, 9, 9, 15, 3, 2, 2, 2, 1, 1, 1, 1, 3, 0},        {2, 5, 4, 7, 7, 1, 1, 1, 1, 0, 0, 1, 1, 7, 0},
    {1, 8, 8, 5, 10, 3, 3, 1, 1, 1, 1, 1, 1, 5, 0},        {1, 6, 6, 8, 4, 3, 3, 1, 1, 1, 1, 1, 1, 4, 0},
    {1, 11, 11, 3, 3, 5, 5, 2, 2, 2, 2, 2, 2, 3, 0},       {2, 9, 7, 37, 37, 3, 3, 1, 1, 1, 1, 1, 1, 37, 0},
    {1, 21, 21, 34, 34, 17, 17, 3, 3, 0, 0, 1, 1, 34, 0},  {1, 2, 2, 2, 2, 3, 3, 1, 1, 1, 1, 1, 1, 2, 0},
    {2, 1, 1, 2, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0},         {1, 1, 2, 3, 2, 5, 5, 1, 1, 2, 2, 1, 1, 1, 0},
    {2, 9, 11, 3, 4, 1, 5, 1, 1, 0, 2, 1, 1, 1, 0},        {1, 11, 8, 2, 3, 3, 2, 2, 1, 1, 0, 1, 3, 1, 0},
    {2, 7, 13, 5, 7, 5, 1, 1, 3, 2, 0, 1, 2, 1, 0},        {1, 12, 9, 6, 4, 2, 3, 1, 2, 3, 1, 3, 1, 2, 0},
    {1, 9, 14, 19, 19, 3, 4, 2, 1, 0, 3, 1, 2, 19, 0},     {2, 6, 7, 3, 4, 2, 4, 1, 1, 0, 0, 1, 1, 1, 1},
    {1, 5, 9, 4, 6, 1, 2, 0, 0, 0, 0, 0, 0, 2, 1},         {1, 8, 5, 37, 37, 4, 2, 1, 1, 0, 0, 2, 3, 37, 1},
    {1, 2, 3, 5, 3, 6, 8, 1, 1, 0, 0, 1, 1, 1, 1},         {2, 13, 11, 66, 44, 3, 3, 1, 1, 1, 1, 1, 1, 11, 0},
    {4, 14, 14, 100, 100, 3, 3, 2, 2, 1, 1, 1, 1, 100, 0}, {4, 14, 14, 16, 32, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0},
    {1, 9, 7, 3, 211, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0},       {1, 5, 7, 67, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0},
};
enum { CONV_SHAPES = sizeof conv_shapes / sizeof *conv_shapes, LARGE_SHAPES = 5, GROUPED = 15, DEPTHWISE = 20 };

static void test_conv2ds(void) {
    static const int mixed[] = {1, GROUPED, DEPTHWISE};
    int i, mix;
    for (i = 0; i < CONV_SHAPES; i++) {
        check_conv2d(&conv_shapes[i], MPT_F32, MPT_F32, MPT_F32);
        check_conv2d(&conv_shapes[i], MPT_F16, MPT_F16, i % 2 ? MPT_F16 : MPT_F32);
        check_conv2d(&conv_shapes[i], MPT_BF16, MPT_BF16, i % 2 ? MPT_F32 : MPT_BF16);
    }
    for (mix = 0; mix < 3 * 27; mix++)
        check_conv2d(&conv_shapes[mixed[mix / 27]], (mpt_dtype)(mix % 3), (mpt_dtype)(mix / 3 % 3),
                     (mpt_dtype)(mix / 9 % 3));
}

/* The CPU engine's limits, a shape on either side of each: outputs of a band, of a line and of many images; words of a
   halo by channels, columns or taps; words of a part; taps and channels of a block of dw; filters of a block. */
static const mpt_conv2d_shape limit_shapes[] = {
    {1, 3, 578, 2, 3, 3, 3, 1, 1, 0, 0, 1, 1, 1, 0},
    {1, 3, 579, 2, 3, 3, 3, 1, 1, 0, 0, 1, 1, 1, 0},  /* 576 outputs in a line, 577 */
    {1, 1, 1203, 1, 2, 1, 4, 1, 1, 1, 1, 1, 1, 1, 0}, /* 1202 */
    {36, 4, 4, 3, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0},
    {37, 4, 4, 3, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0}, /* 36 images in a band */
    {3, 7, 7, 3, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0},
    {1, 25, 23, 5, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0}, /* all lines, some */
    {1, 34, 48, 34, 3, 3, 3, 1, 1, 0, 0, 16, 16, 1, 0},
    {1, 34, 48, 36, 3, 3, 3, 1, 1, 0, 0, 16, 16, 1, 0}, /* a halo's channels */
    {1, 34, 600, 2, 2, 3, 3, 1, 1, 0, 0, 16, 16, 1, 0},
    {1, 33, 600, 4, 2, 3, 3, 1, 1, 0, 0, 16, 16, 1, 0}, /* columns */
    {1, 202, 217, 1, 2, 3, 3, 1, 1, 0, 0, 100, 100, 1, 0},
    {1, 242, 257, 1, 2, 3, 3, 1, 1, 0, 0, 120, 120, 1, 0},     /* tap rows */
    {1, 1, 60020, 1, 2, 1, 2, 1, 1, 0, 0, 60000, 60000, 1, 0}, /* taps of a row */
    {1, 4, 4, 170, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0},
    {1, 4, 4, 171, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0}, /* 1536 words of a part */
    {1, 3, 4, 512, 40, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0},
    {1, 4, 3, 7, 512, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0}, /* far more, forward and backward */
    {1, 40, 41, 1, 2, 39, 39, 1, 1, 0, 0, 1, 1, 1, 0},
    {1, 41, 42, 1, 2, 40, 40, 1, 1, 0, 0, 1, 1, 1, 0}, /* taps alone */
    {1, 27, 26, 2, 2, 24, 24, 1, 1, 0, 0, 1, 1, 1, 0},
    {1, 27, 26, 2, 2, 25, 25, 1, 1, 0, 0, 1, 1, 1, 0}, /* 576 taps of dw */
    {2, 5, 5, 64, 7, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0},
    {2, 5, 5, 65, 7, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0}, /* and with channels */
    {1, 5, 5, 3, 256, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0},
    {1, 5, 5, 3, 257, 3, 3, 2, 2, 1, 1, 1, 1, 1, 0}, /* filters */
    {1, 41, 41, 39, 39, 3, 3, 1, 1, 0, 0, 20, 20, 39, 0},
    {1, 44, 43, 3, 3, 3, 3, 1, 1, 0, 0, 21, 21, 3, 0}, /* a depthwise halo */
    {1, 46, 46, 3, 3, 45, 45, 1, 1, 0, 0, 1, 1, 3, 0},
    {1, 48, 47, 3, 3, 46, 46, 1, 1, 0, 0, 1, 1, 3, 0}, /* depthwise taps */
    {1, 1, 70001, 1, 2, 1, 3, 35000, 35000, 0, 0, 1, 1, 1, 0},
    {1, 2, 2, 3, 2, 3, 3, 7, 7, 9, 9, 2, 2, 1, 0}, /* a stride beyond all */
    {2, 5, 6, 2, 32, 3, 3, 1, 1, 0, 0, 1, 1, 1, 0},
    {1, 3, 579, 2, 32, 3, 3, 1, 1, 0, 0, 1, 1, 1, 0}, /* rows of dy that follow each other, and not */
    {3, 133, 48, 16, 16, 1, 1, 2, 2, 0, 0, 1, 1, 1, 0}, /* on 4 threads one begins with a small band of dx */
};

static void test_conv2d_limits(void) {
    size_t i;
    for (i = 0; i < sizeof limit_shapes / sizeof *limit_shapes; i++) {
        check_conv2d(&limit_shapes[i], MPT_F32, MPT_F32, MPT_F32);
        check_conv2d(&limit_shapes[i], MPT_BF16, MPT_BF16, MPT_BF16);
        if (i % 3 == 0) check_conv2d(&limit_shapes[i], MPT_F16, MPT_F16, MPT_F16);
    }
}

/* dw where the image has an inf in its last column, which only the last tap of a kernel row reads: the other taps stay
   finite, also where an odd number of outputs is multiplied in pairs. */
static void check_beside_inf(size_t width, size_t S, size_t stride) {
    mpt_conv2d_shape s = {2, 3, 0, 3, 5, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    mpt_conv2d_op op;
    test_tensor x, dy, dw;
    size_t P, Q, i;
    int engine;
    s.W = width;
    s.S = S;
    s.stride_h = s.stride_w = stride;
    CHECK_OK(context, mpt_conv2d_output(context, &s, &P, &Q));
    CHECK_EQUAL((Q - 1) * stride + S, width);
    x = test_tensor_random(context, MPT_BF16, s.N * s.H * width * s.C, 1);
    dy = test_tensor_random(context, MPT_BF16, s.N * P * Q * s.K, 2);
    dw = test_tensor_random(context, MPT_F32, s.K * S * s.C, 3);
    for (i = 0; i < x.count; i++)
        if (i / s.C % width == width - 1) x.value[i] = (double)test_float(0x7f800000u);
    test_tensor_upload(&x);
    op = conv2d_of(&s, MPT_BF16, MPT_F32, MPT_BF16);
    op.pass = MPT_BACKWARD_WEIGHT;
    op.x = x.array;
    op.w = dw.array;
    op.y = dy.array;
    op.bias = no_array;
    for (engine = 0; engine < ENGINES; engine++) {
        if (!contexts[engine][0]) continue;
        CHECK_OK(context, mpt_op_conv2d(contexts[engine][0], &op));
        test_tensor_download(&dw);
        for (i = 0; i < dw.count; i++) CHECK(test_is_finite(dw.value[i]) == (i / s.C % S != S - 1));
    }
    test_tensor_free(&x);
    test_tensor_free(&dy);
    test_tensor_free(&dw);
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
    static const mpt_conv2d_shape shape = {1, 224, 224, 3, 3, 3, 3, 1, 1, 1, 1, 1, 1, 3, 0};
    static const size_t bias[3] = {3, 1, 1000003};
    mpt_conv2d_op op = conv2d_of(&shape, MPT_F32, MPT_F32, MPT_F32);
    mpt_gemm_op sums = gemm_of(1, bias, MPT_F32, MPT_F32, MPT_F32);
    test_op t;
    size_t i;
    op.pass = MPT_BACKWARD_WEIGHT;
    t = test_op_new(context, TEST_CONV2D, &op);
    test_tensor_fill(TEST_TENSOR(&t, conv2d.x), 0.5, 1.5, 1);
    test_tensor_fill(TEST_TENSOR(&t, conv2d.y), 0.5, 1.5, 2);
    t.terms = 3;
    CHECK_OP(&t);
    test_op_free(&t);
    sums.a_sums = test_wanted(MPT_F32);
    t = test_op_new(context, TEST_GEMM, &sums);
    test_tensor_fill(TEST_TENSOR(&t, gemm.a), 1e4 - 1, 1e4 + 1, 2);
    for (i = 0; i < t.tensor[1].count; i++) t.tensor[1].value[i] = i == 7; /* the product beside it has one term */
    test_tensor_upload(&t.tensor[1]);
    t.terms = 1;
    CHECK_OP(&t);
    test_op_free(&t);
}

static void test_conv2d_output(void) {
    mpt_conv2d_shape s = conv_shapes[13];
    size_t P = 7, Q = 7;
    CHECK_OK(context, mpt_conv2d_output(context, &s, &P, &Q));
    CHECK_EQUAL(P, (13 + 6 - 3 * 3 - 1) / 2 + 1);
    CHECK_EQUAL(Q, (11 + 6 - 3 * 2 - 1) / 2 + 1);
    s.H = 2;
    s.padding_h = 1;
    s.dilation_h = 2;
    s.R = 3; /* 5 high on 4 */
    CHECK_ERROR(context, mpt_conv2d_output(context, &s, &P, &Q), MPT_ERROR_SHAPE, "kernel");
    CHECK(P == 0 && Q == 0);
    CHECK(mpt_conv2d_output(NULL, &s, &P, &Q) == MPT_ERROR_SHAPE);
    s.padding_h = s.padding_w = 0;
    s.stride_h = s.stride_w = 1;
    s.same = 1;
    CHECK_OK(context, mpt_conv2d_output(context, &s, &P, &Q));
    CHECK(P == 2 && Q == 11);
    s.stride_w = 2;
    CHECK_ERROR(context, mpt_conv2d_output(context, &s, &P, &Q), MPT_ERROR_SHAPE, "same");
    s.stride_w = 1;
    s.padding_w = 1; /* 3 would be what it finds itself */
    CHECK_ERROR(context, mpt_conv2d_output(context, &s, &P, &Q), MPT_ERROR_SHAPE, "same");
    CHECK(mpt_conv2d_output(context, NULL, &P, &Q) == MPT_ERROR_ARGUMENT);
    CHECK(mpt_conv2d_output(context, &s, NULL, &Q) == MPT_ERROR_ARGUMENT);
}

static void test_conv2d_errors(void) {
    test_tensor t = test_tensor_new(context, MPT_F32, 64);
    const mpt_array fp8 = mpt_typed_array(t.array.data, MPT_E4M3);
    mpt_conv2d_op good = MPT_ZERO;
    int pass;
    good.shape = conv_shapes[9];
    good.x = good.w = good.y = good.bias = t.array;
    CHECK(mpt_op_conv2d(NULL, &good) == MPT_ERROR_ARGUMENT);
    CHECK_ERROR(context, mpt_op_conv2d(context, NULL), MPT_ERROR_ARGUMENT, "op");
    CHECK_SPOILT(conv2d, x.data, NULL, MPT_ERROR_ARGUMENT, "x");
    CHECK_SPOILT(conv2d, w.data, NULL, MPT_ERROR_ARGUMENT, "w");
    CHECK_SPOILT(conv2d, y.data, NULL, MPT_ERROR_ARGUMENT, "y");
    CHECK_SPOILT(conv2d, act, MPT_ACTIVATION_COUNT, MPT_ERROR_ARGUMENT, "activation");
    CHECK_SPOILT(conv2d, w, fp8, MPT_ERROR_TYPE, "w");
    CHECK_SPOILT(conv2d, bias, fp8, MPT_ERROR_TYPE, "bias");
    for (pass = MPT_FORWARD; pass <= MPT_BACKWARD_WEIGHT; pass++) {
        good.pass = (mpt_pass)pass;
        CHECK_OK(context, mpt_op_conv2d(context, &good));
        CHECK_SPOILT(conv2d, shape.R, 0, MPT_ERROR_SHAPE, "R");
        CHECK_SPOILT(conv2d, shape.R, 4, MPT_ERROR_SHAPE, "kernel");      /* larger than the input */
        CHECK_SPOILT(conv2d, shape.groups, 3, MPT_ERROR_SHAPE, "groups"); /* of 2 channels */
        CHECK_SPOILT(conv2d, shape.N, (size_t)-1 / 4, MPT_ERROR_SHAPE, "overflow");
        CHECK_SPOILT(conv2d, shape.padding_h, (size_t)-1 / 2, MPT_ERROR_SHAPE, "padding");
        CHECK_SPOILT(conv2d, shape.padding_w, (size_t)-1 / 2, MPT_ERROR_SHAPE, "padding");
        CHECK_SPOILT(conv2d, shape.dilation_h, (size_t)-1 / 2 + 1, MPT_ERROR_SHAPE, "dilation"); /* times 2: 0 */
        CHECK_SPOILT(conv2d, shape.dilation_w, (size_t)-1 / 2 + 1, MPT_ERROR_SHAPE, "dilation");
        CHECK_SPOILT(conv2d, shape.stride_h, (size_t)-1, MPT_ERROR_SHAPE, "stride");
        CHECK_SPOILT(conv2d, shape.stride_w, (size_t)-1, MPT_ERROR_SHAPE, "stride");
    }
    good.pass = MPT_BACKWARD_DATA;
    CHECK_SPOILT(conv2d, y.data, NULL, MPT_ERROR_ARGUMENT, "dy");
    CHECK_SPOILT(conv2d, x.data, NULL, MPT_ERROR_ARGUMENT, "dx");
    good.pass = MPT_BACKWARD_WEIGHT;
    CHECK_SPOILT(conv2d, x.data, NULL, MPT_ERROR_ARGUMENT, "x");
    CHECK_SPOILT(conv2d, w.data, NULL, MPT_ERROR_ARGUMENT, "dw");
    good.shape.groups = good.shape.C = 3; /* and 2 filters */
    CHECK_SPOILT(conv2d, beta, 1, MPT_ERROR_SHAPE, "groups");
    good.shape = conv_shapes[0]; /* a kernel that no dilation stretches */
    CHECK_SPOILT(conv2d, shape.dilation_h, (size_t)-1, MPT_ERROR_SHAPE, "dilation");
    test_tensor_free(&t);
}

/* ==== POOLING ==== */

static void check_pool2d(mpt_pool_kind kind, const mpt_pool2d_shape *shape, mpt_dtype type) {
    mpt_pool2d_op op = MPT_ZERO;
    test_op t;
    op.kind = kind;
    op.shape = *shape;
    op.x = op.y = test_wanted(type);
    t = test_op_new(context, TEST_POOL2D, &op);
    CHECK_OP(&t);
    t.op.pool2d.pass = MPT_BACKWARD_DATA; /* with the index of the pass above, and its y for dy */
    t.op.pool2d.beta = 0.5f;
    CHECK_OP(&t);
    t.op.pool2d.beta = 0;
    CHECK_OP(&t);
    test_op_free(&t);
}

static void test_pools(void) {
    static const mpt_pool2d_shape shapes[] = {
        {1, 4, 4, 1, 2, 2, 0, 0, 0, 0, 0},  {2, 7, 5, 3, 3, 2, 2, 2, 1, 1, 0},  {1, 6, 6, 5, 3, 3, 1, 1, 1, 1, 0},
        {2, 5, 4, 7, 5, 4, 0, 0, 0, 0, 0},  {1, 9, 9, 2, 2, 2, 3, 3, 0, 0, 0},  {1, 5, 5, 3, 1, 1, 1, 1, 0, 0, 0},
        {3, 7, 8, 2, 2, 3, 0, 0, 1, 1, 0},  {2, 5, 6, 45, 2, 3, 1, 1, 1, 1, 0}, {8, 32, 32, 17, 3, 3, 2, 2, 1, 1, 0},
        {2, 7, 9, 3, 1, 4, 2, 1, 0, 2, 0},  {1, 8, 5, 7, 3, 2, 1, 2, 1, 0, 1},  {2, 5, 6, 45, 2, 3, 1, 1, 1, 1, 1},
        {1, 9, 7, 19, 4, 5, 3, 2, 2, 1, 1}, {1, 6, 4, 2, 6, 4, 0, 0, 0, 0, 1}};
    size_t i;
    int type;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (type = MPT_F32; type <= MPT_BF16; type++) {
            check_pool2d(MPT_POOL_MAX, &shapes[i], (mpt_dtype)type);
            check_pool2d(MPT_POOL_AVERAGE, &shapes[i], (mpt_dtype)type);
        }
}

/* Max pooling over one window of two values. */
static void check_window(mpt_context *ctx, float first, float second, float expected, int place) {
    static const mpt_pool2d_shape shape = {1, 1, 2, 1, 1, 2, 0, 0, 0, 0, 0};
    test_tensor x = test_tensor_new(ctx, MPT_F16, 2), y = test_tensor_new(ctx, MPT_F16, 1);
    uint16_t index = 99;
    mpt_pool2d_op op = MPT_ZERO;
    x.value[0] = (double)first;
    x.value[1] = (double)second;
    test_tensor_upload(&x);
    op.shape = shape;
    op.x = x.array;
    op.y = y.array;
    op.index = (uint16_t *)mpt_alloc(ctx, sizeof index);
    CHECK_OK(ctx, mpt_op_pool2d(ctx, &op));
    CHECK_OK(ctx, mpt_download(ctx, &index, op.index, sizeof index));
    test_tensor_download(&y);
    CHECK_EQUAL(index, place);
    CHECK(test_bits((float)y.value[0]) == test_bits(expected));
    mpt_free(ctx, op.index);
    test_tensor_free(&x);
    test_tensor_free(&y);
}

static void test_pool_specials(mpt_context *ctx) {
    const float inf = test_float(0x7f800000u), nan = nan_value();
    check_window(ctx, 1, 2, 2, 1);
    check_window(ctx, 2, 2, 2, 0); /* the first of equals */
    check_window(ctx, -inf, -inf, -inf, 0);
    check_window(ctx, -inf, -1, -1, 1);
    check_window(ctx, nan, inf, nan, 0); /* NaN counts as largest, the first of them first */
    check_window(ctx, inf, nan, nan, 1);
    check_window(ctx, nan, nan, nan, 0);
}

/* The largest stride allowed: one output, from the first window, in all passes. */
static void test_huge_stride(mpt_context *ctx) {
    static const mpt_conv2d_shape shape = {1, 4, 4, 1, 1, 3, 3, 0x7fffffff, 0x7fffffff, 0, 0, 0, 0, 0, 0};
    static const mpt_pool2d_shape window = {1, 4, 4, 1, 3, 3, 0x7fffffff, 0x7fffffff, 0, 0, 0};
    const double bound = 4 * test_unit(MPT_F32);
    test_tensor x = test_tensor_random(ctx, MPT_F32, 16, 1), w = test_tensor_random(ctx, MPT_F32, 9, 2);
    test_tensor y = test_tensor_random(ctx, MPT_F32, 1, 3), out = test_tensor_new(ctx, MPT_F32, 16);
    mpt_conv2d_op conv = MPT_ZERO;
    mpt_pool2d_op pool = MPT_ZERO;
    double sum = 0;
    size_t P, Q, i;
    CHECK_OK(ctx, mpt_conv2d_output(ctx, &shape, &P, &Q));
    CHECK(P == 1 && Q == 1);
    conv.pass = MPT_BACKWARD_WEIGHT;
    conv.shape = shape;
    conv.x = x.array;
    conv.y = y.array;
    conv.w = out.array;
    CHECK_OK(ctx, mpt_op_conv2d(ctx, &conv));
    test_tensor_download(&out);
    for (i = 0; i < 9; i++) CHECK_NEAR(out.value[i], y.value[0] * x.value[i / 3 * 4 + i % 3], bound);
    conv.pass = MPT_BACKWARD_DATA;
    conv.x = out.array;
    conv.w = w.array;
    CHECK_OK(ctx, mpt_op_conv2d(ctx, &conv));
    test_tensor_download(&out);
    for (i = 0; i < 16; i++)
        CHECK_NEAR(out.value[i], i / 4 < 3 && i % 4 < 3 ? y.value[0] * w.value[i / 4 * 3 + i % 4] : 0, bound);
    pool.kind = MPT_POOL_AVERAGE;
    pool.shape = window;
    pool.x = x.array;
    pool.y = out.array;
    CHECK_OK(ctx, mpt_op_pool2d(ctx, &pool));
    test_tensor_download(&out);
    for (i = 0; i < 9; i++) sum += x.value[i / 3 * 4 + i % 3] / 9;
    CHECK_NEAR(out.value[0], sum, 4 * bound);
    test_tensor_free(&x);
    test_tensor_free(&w);
    test_tensor_free(&y);
    test_tensor_free(&out);
}

/* Shapes that mpt_pool2d_output refuses, and why. */
static void test_pool_shapes(void) {
    static const size_t most = (size_t)-1, half = (size_t)1 << (sizeof(size_t) * 4); /* half * half wraps to 0 */
    const mpt_pool2d_shape bad[] = {
        {1, 4, 4, 1, 2, 2, most, most, 0, 0, 0},
        {1, 1, 1, 1, 10001, 10001, 0, 0, 5000, 5000, 0},
        {1, 1, 1, 1, half, half, 0, 0, half / 2, half / 2, 0},
        {1, 4, 4, 1, 2, 2, 0, 0, 2, 2, 0},
        {1, 4, 4, 1, 5, 2, 0, 0, 0, 0, 0},
        {1, 4, 4, 1, 0, 2, 0, 0, 0, 0, 0},
        {1, 1, 1, 1, 0x7fffffff, 0x7fffffff, 0, 0, 0x3fffffff, 0x3fffffff, 0}}; /* 2^62 places, one no padding */
    static const char *const words[] = {"stride", "padding", "window", "padding", "window", "R", "window"};
    size_t P, Q, i;
    for (i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK_ERROR(context, mpt_pool2d_output(context, &bad[i], &P, &Q), MPT_ERROR_SHAPE, words[i]);
}

static void test_pool_errors(void) {
    test_tensor t = test_tensor_new(context, MPT_F32, 16);
    uint16_t *index = (uint16_t *)mpt_alloc(context, 4 * sizeof *index);
    mpt_pool2d_op good = MPT_ZERO;
    good.shape.N = good.shape.C = 1;
    good.shape.H = good.shape.W = 4;
    good.shape.R = good.shape.S = 2;
    good.x = good.y = t.array;
    good.index = index;
    CHECK_ERROR(context, mpt_op_pool2d(context, NULL), MPT_ERROR_ARGUMENT, "op");
    CHECK_OK(context, mpt_op_pool2d(context, &good));
    CHECK_SPOILT(pool2d, x.data, NULL, MPT_ERROR_ARGUMENT, "x");
    CHECK_SPOILT(pool2d, y.data, NULL, MPT_ERROR_ARGUMENT, "y");
    CHECK_SPOILT(pool2d, index, NULL, MPT_ERROR_ARGUMENT, "index");
    CHECK_SPOILT(pool2d, kind, (mpt_pool_kind)test_number(2), MPT_ERROR_ARGUMENT, "kind");
    CHECK_SPOILT(pool2d, shape.R, 0, MPT_ERROR_SHAPE, "R");
    CHECK_SPOILT(pool2d, shape.N, (size_t)-1 / 4, MPT_ERROR_SHAPE, "overflow");
    good.pass = MPT_BACKWARD_DATA;
    CHECK_SPOILT(pool2d, index, NULL, MPT_ERROR_ARGUMENT, "index");
    good.pass = MPT_FORWARD;
    good.shape.H = good.shape.W = good.shape.R = 257;
    CHECK_SPOILT(pool2d, shape.S, 257, MPT_ERROR_SHAPE, "window"); /* 66049 places do not fit into 16 bits */
    mpt_free(context, index);
    test_tensor_free(&t);
}

/* ==== ELEMENTWISE ==== */

static mpt_map_op map_of(mpt_map map, size_t n, mpt_activation act, float beta) {
    mpt_map_op op = MPT_ZERO;
    op.map = map;
    op.n = n;
    op.act = act;
    op.beta = beta;
    return op;
}

/* An activation, its gradient and a sum, where a third of the first values are 0. */
static void check_maps(size_t n, mpt_activation act, float beta, mpt_dtype a, mpt_dtype b, mpt_dtype out) {
    static const mpt_map maps[] = {MPT_MAP_ACTIVATION, MPT_MAP_ACTIVATION_GRADIENT, MPT_MAP_ADD};
    size_t i, j;
    for (i = 0; i < sizeof maps / sizeof *maps; i++) {
        mpt_map_op op = map_of(maps[i], n, act, beta);
        test_op t;
        if (act == MPT_LEAKY_RELU) op.negative_slope = beta != 0 ? 0.3f : 0;
        op.a = test_wanted(a);
        op.b = test_wanted(b);
        op.out = test_wanted(out);
        t = test_op_new(context, TEST_MAP, &op);
        for (j = 0; j < n; j += 3) t.tensor[0].value[j] = 0;
        test_tensor_upload(&t.tensor[0]);
        if (maps[i] == MPT_MAP_ADD && !(beta != 0)) test_tensor_poison(&t.tensor[1]); /* b is not read */
        CHECK_OP(&t);
        test_op_free(&t);
    }
}

static void test_elementwise(void) {
    static const size_t sizes[] = {0, 1, 7, 64, 65, 1001, 200003};
    size_t i;
    int mix, act;
    for (act = MPT_IDENTITY; act <= MPT_LEAKY_RELU; act++) {
        for (i = 0; i < sizeof sizes / sizeof *sizes && act <= MPT_RELU; i++) {
            check_maps(sizes[i], (mpt_activation)act, i % 2 ? 0 : -0.5f, MPT_F32, MPT_F32, MPT_F32);
            check_maps(sizes[i], (mpt_activation)act, i % 2 ? 0 : -0.5f, MPT_F16, MPT_F16, MPT_F16);
        }
        for (mix = 0; mix < 27; mix++)
            check_maps(333, (mpt_activation)act, mix % 2 ? 1.25f : 0, (mpt_dtype)(mix % 3), (mpt_dtype)(mix / 3 % 3),
                       (mpt_dtype)(mix / 9));
    }
}

/* By hand and in place. ReLU passes NaN on, so that no later check misses it; its gradient takes y. */
static void test_elementwise_by_hand(mpt_context *ctx) {
    static const double x[4] = {-1, 2, 0, 3}, gradient[4] = {-0.5, 3, 0, 4.5}; /* 0.5 x, and where x is above 0 x */
    test_tensor t = test_tensor_new(ctx, MPT_BF16, 4), dx = test_tensor_new(ctx, MPT_F32, 4);
    mpt_map_op op = map_of(MPT_MAP_ACTIVATION_GRADIENT, 4, MPT_RELU, 0.5f);
    memcpy(t.value, x, sizeof x);
    memcpy(dx.value, x, sizeof x);
    test_tensor_upload(&t);
    test_tensor_upload(&dx);
    op.a = op.b = t.array;
    op.out = dx.array;
    CHECK_OK(ctx, mpt_op_map(ctx, &op));
    test_tensor_download(&dx);
    CHECK(memcmp(dx.value, gradient, sizeof gradient) == 0);
    op = map_of(MPT_MAP_ACTIVATION, 4, MPT_RELU, 0);
    t.value[3] = (double)nan_value();
    test_tensor_upload(&t);
    op.a = op.out = t.array;
    CHECK_OK(ctx, mpt_op_map(ctx, &op));
    test_tensor_download(&t);
    CHECK_EQUAL(t.value[0], 0);
    CHECK_EQUAL(t.value[1], 2);
    CHECK((test_bits((float)t.value[3]) & 0x7fffffffu) > 0x7f800000u); /* NaN */
    op = map_of(MPT_MAP_ADD, 2, MPT_IDENTITY, 3);
    op.a = op.b = op.out = t.array;
    CHECK_OK(ctx, mpt_op_map(ctx, &op));
    test_tensor_download(&t);
    CHECK_EQUAL(t.value[1], 8);
    test_tensor_free(&t);
    test_tensor_free(&dx);
}

/* The gradient of a ReLU in one 16-bit type, in place, at every saved value: dy, or 0 where that is not over 0. */
static void check_relu_slopes(mpt_context *ctx, mpt_dtype type) {
    enum { COUNT = 65536 + 7 };
    const size_t bytes = COUNT * sizeof(uint16_t);
    uint16_t *saved = (uint16_t *)test_memory(bytes), *dy = (uint16_t *)test_memory(bytes);
    mpt_map_op op = map_of(MPT_MAP_ACTIVATION_GRADIENT, COUNT, MPT_RELU, 0);
    int i, wrong = 0;
    for (i = 0; i < COUNT; i++) {
        saved[i] = (uint16_t)i;
        dy[i] = (uint16_t)(1 + i % 30000); /* finite in both types */
    }
    op.a = mpt_typed_array(mpt_alloc(ctx, bytes), type);
    op.b = op.out = mpt_typed_array(mpt_alloc(ctx, bytes), type);
    CHECK_OK(ctx, mpt_upload(ctx, op.a.data, saved, bytes));
    CHECK_OK(ctx, mpt_upload(ctx, op.b.data, dy, bytes));
    CHECK_OK(ctx, mpt_op_map(ctx, &op));
    CHECK_OK(ctx, mpt_download(ctx, dy, op.out.data, bytes));
    for (i = 0; i < COUNT; i++) {
        const uint32_t u = test_bits(mpt_widen(saved[i], type)); /* NaN in -Ofast's sight, too */
        const int over = u != 0 && u - 0x80000000u > 0x7f800000u;
        wrong += dy[i] != (over ? 1 + i % 30000 : 0);
    }
    CHECK_EQUAL(wrong, 0);
    mpt_free(ctx, op.a.data);
    mpt_free(ctx, op.b.data);
    free(saved);
    free(dy);
}

static void test_relu_slopes(void) {
    int engine;
    for (engine = 0; engine < ENGINES; engine++) {
        if (!contexts[engine][0]) continue;
        check_relu_slopes(contexts[engine][0], MPT_F16);
        check_relu_slopes(contexts[engine][0], MPT_BF16);
    }
    check_relu_slopes(test_plain, MPT_F16); /* not bf16: under -Ofast plain arithmetic has no subnormal numbers */
}

static void test_elementwise_errors(void) {
    test_tensor t = test_tensor_new(context, MPT_F32, 64);
    const mpt_array fp8 = mpt_typed_array(t.array.data, MPT_E4M3);
    mpt_map_op good = map_of(MPT_MAP_ACTIVATION, 4, MPT_RELU, 0);
    int map;
    good.a = good.b = good.out = t.array;
    CHECK(mpt_op_map(NULL, &good) == MPT_ERROR_ARGUMENT);
    CHECK_ERROR(context, mpt_op_map(context, NULL), MPT_ERROR_ARGUMENT, "op");
    for (map = MPT_MAP_ACTIVATION; map <= MPT_MAP_DROPOUT; map++) {
        good.map = (mpt_map)map;
        good.beta = map == MPT_MAP_ADD ? 1 : 0;
        CHECK_OK(context, mpt_op_map(context, &good));
        CHECK_SPOILT(map, a.data, NULL, MPT_ERROR_ARGUMENT, "a");
        CHECK_SPOILT(map, out.data, NULL, MPT_ERROR_ARGUMENT, "out");
        CHECK_SPOILT(map, a, fp8, MPT_ERROR_TYPE, "a");
        CHECK_SPOILT(map, out, fp8, MPT_ERROR_TYPE, "out");
        CHECK_SPOILT(map, n, (size_t)-1 / 2, MPT_ERROR_SHAPE, "overflow");
        if (map == MPT_MAP_ACTIVATION || map == MPT_MAP_DROPOUT) continue;
        CHECK_SPOILT(map, b.data, NULL, MPT_ERROR_ARGUMENT, "b");
        CHECK_SPOILT(map, b, fp8, MPT_ERROR_TYPE, "b");
    }
    good.map = MPT_MAP_ACTIVATION;
    CHECK_SPOILT(map, act, MPT_ACTIVATION_COUNT, MPT_ERROR_ARGUMENT, "activation");
    CHECK_SPOILT(map, map, (mpt_map)test_number(99), MPT_ERROR_ARGUMENT, "map");
    CHECK_SPOILT(map, negative_slope, -1, MPT_ERROR_ARGUMENT, "negative_slope");
    test_tensor_free(&t);
}

/* ==== COLUMNS ==== */

/* What lies between the rows is not read in x, and not written in y. */
static void test_columns(void) {
    static const size_t shapes[][4] = {{1, 1, 1, 1},     {3, 5, 5, 7},       {7, 31, 64, 31},
                                       {101, 3, 17, 11}, {4099, 33, 67, 45}, {2, 1000, 1000, 2003}};
    size_t i;
    int mix;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (mix = 0; mix < 9; mix++) {
            mpt_columns_op op = MPT_ZERO;
            op.rows = shapes[i][0];
            op.C = shapes[i][1];
            op.x_stride = shapes[i][2];
            op.y_stride = shapes[i][3];
            op.x = test_wanted((mpt_dtype)(mix % 3));
            op.y = test_wanted((mpt_dtype)(mix / 3));
            op.beta = (i + (size_t)mix) % 2 ? -0.5f : 0;
            CHECK_ONCE(context, TEST_COLUMNS, &op);
        }
}

/* Shapes N, H, W, C, R, S: products of arrays and of channels, upsampling, windows that lines of threads share. */
static void test_broadcast(void) {
    static const size_t shapes[][6] = {
        {1, 1, 1, 1, 1, 1}, {3, 1, 1, 5, 1, 1},  {2, 7, 5, 19, 1, 1}, {3, 1, 1, 35, 7, 5},  {2, 1, 1, 8, 31, 33},
        {2, 3, 5, 3, 2, 2}, {1, 5, 2, 17, 3, 4}, {2, 2, 2, 9, 6, 7},  {1, 1, 1, 600, 4, 4}, {1, 13, 11, 64, 2, 3}};
    size_t i;
    int mix;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (mix = 0; mix < 9; mix++) {
            mpt_broadcast_op op = MPT_ZERO;
            mpt_broadcast_shape *z = &op.shape;
            z->N = shapes[i][0], z->H = shapes[i][1], z->W = shapes[i][2], z->C = shapes[i][3];
            z->R = shapes[i][4], z->S = shapes[i][5];
            op.pass = (i + (size_t)mix) % 2 ? MPT_BACKWARD_DATA : MPT_FORWARD;
            op.x = test_wanted((mpt_dtype)(mix % 3));
            op.y = test_wanted((mpt_dtype)(mix / 3));
            if ((i + (size_t)mix / 2) % 3) op.factor = test_wanted((mpt_dtype)((mix + (int)i) % 3));
            op.beta = (i + (size_t)mix / 2) % 2 ? -0.5f : 0;
            CHECK_ONCE(context, TEST_BROADCAST, &op);
            op.pass = op.pass ? MPT_FORWARD : MPT_BACKWARD_DATA;
            CHECK_ONCE(context, TEST_BROADCAST, &op);
        }
}

/* The sum of 2^12 numbers whose fp32 sums would lose the small ones is right to the last place. */
static void test_broadcast_sum(mpt_context *ctx) {
    enum { SIDE = 64 };
    test_tensor x = test_tensor_new(ctx, MPT_F32, 1), y = test_tensor_new(ctx, MPT_F32, SIDE * SIDE);
    mpt_broadcast_op op = MPT_ZERO;
    test_tensor_fill(&y, ldexp(1, -13), ldexp(1, -13), 1);
    y.value[0] = 4096;
    test_tensor_upload(&y);
    op.pass = MPT_BACKWARD_DATA;
    op.shape.N = op.shape.H = op.shape.W = op.shape.C = 1;
    op.shape.R = op.shape.S = SIDE;
    op.x = x.array;
    op.y = y.array;
    CHECK_OK(ctx, mpt_op_broadcast(ctx, &op));
    test_tensor_download(&x);
    CHECK_EQUAL(x.value[0], 4096.5);
    test_tensor_free(&x);
    test_tensor_free(&y);
}

static void test_broadcast_errors(void) {
    test_tensor t = test_tensor_new(context, MPT_F32, 64);
    const mpt_array fp8 = mpt_typed_array(t.array.data, MPT_E4M3);
    const size_t huge = (size_t)-1 / 2;
    mpt_broadcast_op good = MPT_ZERO, nothing;
    good.shape.N = good.shape.H = good.shape.W = good.shape.C = good.shape.R = good.shape.S = 2;
    good.x = good.y = good.factor = t.array;
    CHECK(mpt_op_broadcast(NULL, &good) == MPT_ERROR_ARGUMENT);
    CHECK_OK(context, mpt_op_broadcast(context, &good));
    CHECK_SPOILT(broadcast, pass, MPT_BACKWARD_WEIGHT, MPT_ERROR_ARGUMENT, "pass");
    CHECK_SPOILT(broadcast, x.data, NULL, MPT_ERROR_ARGUMENT, "x");
    CHECK_SPOILT(broadcast, y.data, NULL, MPT_ERROR_ARGUMENT, "y");
    CHECK_SPOILT(broadcast, x, fp8, MPT_ERROR_TYPE, "x");
    CHECK_SPOILT(broadcast, y, fp8, MPT_ERROR_TYPE, "y");
    CHECK_SPOILT(broadcast, factor, fp8, MPT_ERROR_TYPE, "factor");
    CHECK_SPOILT(broadcast, shape.R, 0, MPT_ERROR_SHAPE, "R");
    CHECK_SPOILT(broadcast, shape.S, 0, MPT_ERROR_SHAPE, "S");
    CHECK_SPOILT(broadcast, shape.H, huge, MPT_ERROR_SHAPE, "overflow");
    CHECK_SPOILT(broadcast, shape.N, huge, MPT_ERROR_SHAPE, "overflow");
    nothing = good;
    nothing.shape.N = 0;
    nothing.x.data = nothing.y.data = NULL;
    CHECK_OK(context, mpt_op_broadcast(context, &nothing));
    test_tensor_free(&t);
}

/* Two rows (1 2) and (3 NaN) of x, 3 apart, go to y, 4 apart, which has 10 everywhere. */
static void test_columns_by_hand(mpt_context *ctx) {
    static const double from[5] = {1, 2, 77, 3, 0}, to[6] = {6, 7, 10, 10, 8, 0};
    test_tensor x = test_tensor_new(ctx, MPT_F32, 5), y = test_tensor_new(ctx, MPT_BF16, 6);
    mpt_columns_op op = MPT_ZERO;
    memcpy(x.value, from, sizeof from);
    x.value[4] = (double)nan_value();
    test_tensor_upload(&x);
    test_tensor_fill(&y, 10, 10, 1);
    op.rows = op.C = 2;
    op.x = x.array;
    op.y = y.array;
    op.x_stride = 3;
    op.y_stride = 4;
    op.beta = 0.5f;
    CHECK_OK(ctx, mpt_op_columns(ctx, &op));
    test_tensor_download(&y);
    CHECK(memcmp(y.value, to, 5 * sizeof *to) == 0);
    CHECK(!test_is_finite(y.value[5]));
    test_tensor_free(&x);
    test_tensor_free(&y);
}

static void test_columns_errors(void) {
    test_tensor t = test_tensor_new(context, MPT_F32, 16);
    const mpt_array fp8 = mpt_typed_array(t.array.data, MPT_E4M3);
    const size_t huge = (size_t)-1 / 2;
    mpt_columns_op good = MPT_ZERO, nothing = MPT_ZERO;
    good.rows = 2;
    good.C = 3;
    good.x = good.y = t.array;
    CHECK(mpt_op_columns(NULL, &good) == MPT_ERROR_ARGUMENT);
    CHECK_OK(context, mpt_op_columns(context, &good));
    CHECK_SPOILT(columns, x.data, NULL, MPT_ERROR_ARGUMENT, "x");
    CHECK_SPOILT(columns, y.data, NULL, MPT_ERROR_ARGUMENT, "y");
    CHECK_SPOILT(columns, x, fp8, MPT_ERROR_TYPE, "x");
    CHECK_SPOILT(columns, y, fp8, MPT_ERROR_TYPE, "y");
    CHECK_SPOILT(columns, x_stride, 2, MPT_ERROR_SHAPE, "x_stride");
    CHECK_SPOILT(columns, y_stride, 2, MPT_ERROR_SHAPE, "y_stride");
    CHECK_SPOILT(columns, rows, huge, MPT_ERROR_SHAPE, "overflow");
    CHECK_SPOILT(columns, y_stride, huge, MPT_ERROR_SHAPE, "overflow");
    nothing.C = 3;
    CHECK_OK(context, mpt_op_columns(context, &nothing));
    nothing.rows = 2;
    nothing.C = 0;
    CHECK_OK(context, mpt_op_columns(context, &nothing));
    test_tensor_free(&t);
}

/* ==== DROPOUT ==== */

/* Which elements a mask keeps, by its description. */
static int is_kept(const mpt_mask *mask, uint64_t step, size_t i) {
    return (double)mpt_hash(mask->seed, step, mask->tensor, i) >= (double)mask->p * 4294967296.0;
}

/* Against the reference, and against the description, for the rule of the mask is one that all backends share. */
static void check_dropout(const mpt_mask *mask, const uint64_t *step, size_t n, float beta, mpt_dtype x, mpt_dtype y) {
    mpt_map_op op = map_of(MPT_MAP_DROPOUT, n, MPT_RELU, beta); /* which has no use for an activation */
    size_t i, wrong = 0;
    test_op t;
    op.mask = *mask;
    op.a = test_wanted(x);
    op.out = test_wanted(y);
    t = test_op_new(context, TEST_MAP, &op);
    t.step = step;
    CHECK_OP(&t);
    for (i = 0; i < n && !(beta != 0); i++) {
        const double expected = is_kept(mask, step ? *step : 0, i) ? t.tensor[0].value[i] / (1 - (double)mask->p) : 0;
        wrong += !test_near(t.tensor[2].value[i], expected, test_bound(1, fabs(expected), expected, y));
    }
    CHECK_EQUAL(wrong, 0);
    test_op_free(&t);
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
            mpt_mask mask = MPT_ZERO;
            mask.p = shares[(i + (size_t)mix) % 5];
            mask.seed = 3 + i;
            mask.tensor = (uint64_t)mix;
            mask.step = mix % 4 ? device : NULL;
            check_dropout(&mask, mask.step ? &step : NULL, sizes[i], mix % 2 ? 0 : -0.5f, (mpt_dtype)(mix % 3),
                          (mpt_dtype)(mix / 3));
        }
    mpt_free(context, device);
}

/* Which of n ones a mask keeps; in place. */
static test_tensor kept_by(const mpt_mask *mask, size_t n) {
    test_tensor t = test_tensor_new(context, MPT_F32, n);
    mpt_map_op op = map_of(MPT_MAP_DROPOUT, n, MPT_IDENTITY, 0);
    test_tensor_fill(&t, 1, 1, 0);
    op.mask = *mask;
    op.a = op.out = t.array;
    CHECK_OK(context, mpt_op_map(context, &op));
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
        mpt_mask mask = MPT_ZERO, seed, tensor, later;
        test_tensor t;
        double kept = 0;
        mask.p = shares[i];
        mask.seed = 11;
        mask.tensor = 5;
        t = kept_by(&mask, (size_t)n);
        for (j = 0; j < t.count; j++) kept += t.value[j] > 0;
        CHECK_NEAR(kept, n * (1 - p), 5 * sqrt(n * p * (1 - p)));
        seed = tensor = later = mask;
        seed.seed = 12;
        tensor.tensor = 6;
        later.step = step;
        check_independent(&t, &seed, p);
        check_independent(&t, &tensor, p);
        check_independent(&t, &later, p);
        test_tensor_free(&t);
    }
    mpt_free(context, step);
}

static void test_dropout_errors(void) {
    test_tensor t = test_tensor_new(context, MPT_F32, 64);
    mpt_map_op good = map_of(MPT_MAP_DROPOUT, 64, MPT_IDENTITY, 0);
    size_t i;
    good.a = good.out = t.array;
    CHECK_SPOILT(map, mask.p, 1, MPT_ERROR_ARGUMENT, "p");
    CHECK_SPOILT(map, mask.p, -0.25f, MPT_ERROR_ARGUMENT, "p");
    CHECK_SPOILT(map, mask.p, 1.5f, MPT_ERROR_ARGUMENT, "p");
    CHECK_SPOILT(map, mask.p, nan_value(), MPT_ERROR_ARGUMENT, "p");
    good.mask.p = 0.5f; /* NaN that is kept stays NaN */
    test_tensor_poison(&t);
    CHECK_OK(context, mpt_op_map(context, &good));
    test_tensor_download(&t);
    for (i = 0; i < 64; i++)
        if (is_kept(&good.mask, 0, i)) CHECK(!test_is_finite(t.value[i]));
    test_tensor_free(&t);
}

/* ==== NORMALISATION ==== */

/* N pixels C groups: batch, layer, group and instance norm. Odd, prime, one value only, more than is done at once. */
static const mpt_norm_shape norm_shapes[] = {
    {1, 60, 4, 4, 0},  {1, 2, 1, 1, 0},   {1, 7, 37, 37, 0},   {1, 257, 130, 130, 0}, {1, 4099, 3, 3, 0},
    {7, 1, 33, 1, 0},  {3, 1, 1, 1, 0},   {101, 1, 257, 1, 0}, {1000, 1, 64, 1, 0},   {1, 5, 2003, 2003, 0},
    {3, 35, 12, 4, 0}, {2, 49, 66, 2, 0}, {1, 16, 8, 1, 0},    {3, 25, 5, 5, 0},      {2, 1, 2003, 1, 0},
    {2, 121, 7, 7, 0}, {2, 30, 6, 3, 0},  {4, 256, 96, 8, 0},
};
enum { ONE_VALUE = 6 };

static size_t norm_sets(const mpt_norm_shape *s) { return s->N * s->groups; }
static size_t norm_count(const mpt_norm_shape *s) { return s->pixels * (s->C / s->groups); }

/* Which statistic of stats(N groups) the element i of x(N,pixels,C) belongs to. */
static size_t norm_set(const mpt_norm_shape *s, size_t i) {
    return i / (s->pixels * s->C) * s->groups + i % s->C / (s->C / s->groups);
}

static test_op norm_of(const mpt_norm_shape *shape, mpt_dtype x, mpt_dtype y, mpt_dtype p) {
    mpt_norm_op op = MPT_ZERO;
    op.shape = *shape;
    op.x = op.dx = test_wanted(x);
    op.y = op.saved = test_wanted(y);
    op.gamma = op.beta = op.dgamma = op.dbeta = test_wanted(p);
    return test_op_new(context, TEST_NORM, &op);
}

/* y in place of x is the same as elsewhere, bit for bit. */
static void check_norm_in_place(test_op *t) {
    const test_tensor *y = TEST_TENSOR(t, norm.y);
    test_tensor x = test_tensor_new(context, y->array.type, y->count);
    mpt_norm_op op = t->op.norm;
    memcpy(x.value, TEST_TENSOR(t, norm.x)->value, x.count * sizeof *x.value);
    test_tensor_upload(&x);
    op.x = x.array;
    CHECK_OK(context, mpt_op_norm(context, &op));
    op.y = x.array;
    CHECK_OK(context, mpt_op_norm(context, &op));
    test_tensor_download(TEST_TENSOR(t, norm.y));
    test_tensor_download(&x);
    CHECK(memcmp(x.value, y->value, x.count * sizeof *x.value) == 0);
    test_tensor_free(&x);
}

/* Without dx the other two are the same; statistics are only read. */
static void check_norm_optional(test_op *t) {
    test_tensor *dgamma = TEST_TENSOR(t, norm.dgamma), *dbeta = TEST_TENSOR(t, norm.dbeta);
    test_tensor *stats = TEST_TENSOR(t, norm.stats);
    const size_t bytes = t->op.norm.shape.C * sizeof(double), read = 2 * norm_sets(&t->op.norm.shape);
    double *with = test_doubles(2 * t->op.norm.shape.C + read);
    mpt_norm_op op = t->op.norm;
    op.dx.data = NULL;
    op.scale = 0;
    CHECK_OK(context, mpt_op_norm(context, &op));
    test_tensor_download(dgamma);
    test_tensor_download(dbeta);
    memcpy(with, dgamma->value, bytes);
    memcpy(with + t->op.norm.shape.C, dbeta->value, bytes);
    memcpy(with + 2 * t->op.norm.shape.C, stats->value, read * sizeof *with);
    test_tensor_poison(dgamma);
    test_tensor_poison(dbeta);
    op.dx = t->op.norm.dx;
    CHECK_OK(context, mpt_op_norm(context, &op));
    test_tensor_download(dgamma);
    test_tensor_download(dbeta);
    test_tensor_download(stats);
    CHECK(memcmp(with, dgamma->value, bytes) == 0);
    CHECK(memcmp(with + t->op.norm.shape.C, dbeta->value, bytes) == 0);
    CHECK(memcmp(with + 2 * t->op.norm.shape.C, stats->value, read * sizeof *with) == 0);
    free(with);
}

/* Both ways to treat the old gradients: mixed is one of them, and the other way round. */
static void check_norm_backward(test_op *t, int mix) {
    mpt_norm_op *op = &t->op.norm;
    int i;
    op->pass = MPT_NORM_BACKWARD;
    op->act = MPT_IDENTITY;
    for (i = 0; i < 2; i++) {
        op->scale = (mix + i) % 2 ? 0 : -0.75f;
        op->scale_x = (mix / 2 + i) % 2 ? 0 : 0.5f;
        test_tensor_fill(TEST_TENSOR(t, norm.y), -1, 1, 4); /* dy */
        test_tensor_fill(TEST_TENSOR(t, norm.dx), -1, 1, 5);
        test_tensor_fill(TEST_TENSOR(t, norm.dgamma), -1, 1, 6);
        test_tensor_fill(TEST_TENSOR(t, norm.dbeta), -1, 1, 7);
        CHECK_OP(t);
    }
    check_norm_optional(t);
}

/* The rule of running statistics is one that all backends share, so it is also written here. */
static void check_norm_running(test_op *t) {
    const mpt_norm_shape *s = &t->op.norm.shape;
    const test_tensor *stats = TEST_TENSOR(t, norm.stats), *running = TEST_TENSOR(t, norm.running);
    const size_t sets = norm_sets(s);
    const double count = (double)norm_count(s), momentum = (double)0.1f;
    double *expected = test_doubles(2 * sets), *tolerance = test_doubles(2 * sets);
    size_t i;
    t->op.norm.pass = MPT_NORM_RUNNING;
    t->op.norm.momentum = 0.1f;
    for (i = 0; i < 2 * sets; i++) {
        const double old = (1 - momentum) * running->value[i];
        const double batch = momentum * stats->value[i] * (i < sets ? 1 : count / (count - 1));
        expected[i] = old + batch;
        tolerance[i] = test_bound(2, fabs(old) + fabs(batch), expected[i], MPT_F32);
    }
    CHECK_OP(t);
    CHECK_ALL(running->value, 2 * sets, expected, tolerance);
    free(expected);
    free(tolerance);
}

/* With the statistics of x, and with others that are constants. */
static void check_norm(const mpt_norm_shape *shape, mpt_dtype x, mpt_dtype y, mpt_dtype p, int mix) {
    test_op t = norm_of(shape, x, y, p);
    mpt_norm_op *op = &t.op.norm;
    CHECK_OP(&t);
    for (op->frozen = 0; op->frozen < 2; op->frozen++) {
        op->pass = MPT_NORM_FORWARD;
        op->act = op->frozen ? MPT_TANH : mix % 2 ? MPT_RELU : MPT_IDENTITY;
        if (op->frozen) test_tensor_fill(TEST_TENSOR(&t, norm.stats), 0.5, 1.5, 9);
        CHECK_OP(&t);
        if (!op->frozen) check_norm_in_place(&t);
        check_norm_backward(&t, mix);
    }
    if (norm_count(shape) > 1) check_norm_running(&t);
    test_op_free(&t);
}

static void test_norms(void) {
    size_t i;
    int mix;
    for (i = 0; i < sizeof norm_shapes / sizeof *norm_shapes; i++)
        for (mix = 0; mix < 9; mix++) {
            mpt_norm_shape s = norm_shapes[i];
            if (mix % 4 && s.N * s.pixels * s.C * s.C > 2000000) continue; /* each type once is enough */
            s.eps = mix % 2 ? 0 : 0.001f;
            check_norm(&s, (mpt_dtype)(mix % 3), (mpt_dtype)(mix / 3), (mpt_dtype)((i + (size_t)mix) % 3), mix);
        }
}

/* A mean that is 100000 deviations: sums of squares in fp32 would leave nothing of the variance. */
static void test_norm_cancellation(void) {
    static const mpt_norm_shape shapes[] = {{1, 997, 3, 3, 0}, {2, 1, 1009, 1, 0}, {2, 61, 12, 2, 0}};
    size_t i;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        test_op t = norm_of(&shapes[i], MPT_F32, MPT_F32, MPT_F32);
        test_tensor_fill(TEST_TENSOR(&t, norm.x), 1000 - 0.02, 1000 + 0.02, 3);
        CHECK_OP(&t);
        test_op_free(&t);
    }
}

/* The slope of a ReLU behind the norm, taken in passing, is that of the reference, and gives the bits that it gives by
   itself. gamma is also so small that many y are stored as 0. */
static void check_norm_slope(const mpt_norm_shape *shape, mpt_dtype type, float gamma) {
    test_op t = norm_of(shape, type, type, MPT_F32);
    mpt_norm_op *op = &t.op.norm;
    test_tensor *outs[3], *dy = TEST_TENSOR(&t, norm.y), *saved = TEST_TENSOR(&t, norm.saved);
    int engine, thread, j;
    outs[0] = TEST_TENSOR(&t, norm.dx);
    outs[1] = TEST_TENSOR(&t, norm.dgamma);
    outs[2] = TEST_TENSOR(&t, norm.dbeta);
    test_tensor_fill(TEST_TENSOR(&t, norm.gamma), -(double)gamma, (double)gamma, 2);
    test_tensor_fill(TEST_TENSOR(&t, norm.beta), -(double)gamma / 8, (double)gamma / 8, 3);
    CHECK_OK(context, mpt_op_norm(context, op));
    for (engine = 0; engine < ENGINES; engine++)
        for (thread = 0; thread < THREADS && contexts[engine][thread]; thread++) {
            mpt_context *ctx = contexts[engine][thread];
            mpt_map_op slope = map_of(MPT_MAP_ACTIVATION_GRADIENT, dy->count, MPT_RELU, 0);
            double *passing[3];
            op->pass = MPT_NORM_FORWARD;
            op->act = MPT_RELU;
            op->y = saved->array;
            CHECK_OK(ctx, mpt_op_norm(ctx, op));
            op->pass = MPT_NORM_BACKWARD;
            op->y = dy->array;
            test_tensor_fill(dy, -1, 1, 4);
            CHECK_OK(ctx, mpt_op_norm(ctx, op));
            for (j = 0; j < 3; j++) {
                test_tensor_download(outs[j]);
                passing[j] = test_doubles(outs[j]->count);
                memcpy(passing[j], outs[j]->value, outs[j]->count * sizeof(double));
            }
            test_tensor_fill(dy, -1, 1, 4);
            slope.a = saved->array;
            slope.b = slope.out = dy->array;
            CHECK_OK(ctx, mpt_op_map(ctx, &slope));
            op->act = MPT_IDENTITY;
            CHECK_OK(ctx, mpt_op_norm(ctx, op));
            for (j = 0; j < 3; j++) {
                test_tensor_download(outs[j]);
                if (!CHECK(memcmp(passing[j], outs[j]->value, outs[j]->count * sizeof(double)) == 0))
                    printf("    in the slope of %s, result %d, C %lu\n", mpt_dtype_name(type), j,
                           (unsigned long)shape->C);
                free(passing[j]);
            }
        }
    op->act = MPT_RELU;
    test_tensor_download(saved);
    test_tensor_fill(dy, -1, 1, 4);
    test_tensor_download(TEST_TENSOR(&t, norm.stats));
    CHECK_OP(&t);
    test_op_free(&t);
}

static void test_norm_slopes(void) {
    static const mpt_norm_shape shapes[] = {
        {1, 257, 130, 130, 0}, {1, 61, 64, 64, 0}, {5, 1, 37, 1, 0}, {3, 35, 12, 4, 0}};
    static const float gammas[] = {1, 1e-7f, 1e-39f};
    size_t i, g;
    int type;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (g = 0; g < sizeof gammas / sizeof *gammas; g++)
            for (type = MPT_F32; type <= MPT_BF16; type++) check_norm_slope(&shapes[i], (mpt_dtype)type, gammas[g]);
}

/* A constant set, however large, is normalised to 0 exactly; few values far from 0 as exactly as fp32 can. */
static void check_norm_far(mpt_context *ctx) {
    static const double far[4] = {40000, 40001, 40002, 40003};
    const double inverse = 1 / sqrt(1.25 + 1e-5);
    test_tensor x = test_tensor_new(ctx, MPT_F32, 8), stats = test_tensor_new(ctx, MPT_F32, 8);
    test_tensor gamma = test_tensor_new(ctx, MPT_F32, 2), beta = test_tensor_new(ctx, MPT_F32, 2);
    mpt_norm_op op = MPT_ZERO;
    size_t i, wrong = 0;
    for (i = 0; i < 8; i++) x.value[i] = i % 2 ? 1e6 : far[i / 2]; /* channel 0: far; 1: constant */
    test_tensor_upload(&x);
    test_tensor_fill(&gamma, 1, 1, 0);
    op.shape.N = 1;
    op.shape.pixels = 4;
    op.shape.C = op.shape.groups = 2;
    op.x = op.y = x.array;
    op.stats = (float *)stats.array.data;
    op.gamma = gamma.array;
    op.beta = beta.array;
    CHECK_OK(ctx, mpt_op_norm(ctx, &op));
    op.pass = MPT_NORM_FORWARD;
    CHECK_OK(ctx, mpt_op_norm(ctx, &op));
    test_tensor_download(&x);
    for (i = 0; i < 8; i++) {
        const double exact = (far[i / 2] - 40001.5) * inverse;
        wrong += i % 2 ? x.value[i] != 0 : !test_near(x.value[i], exact, 1e-6 * fabs(exact));
    }
    CHECK_EQUAL(wrong, 0);
    test_tensor_free(&x);
    test_tensor_free(&stats);
    test_tensor_free(&gamma);
    test_tensor_free(&beta);
}

static void test_norm_far(void) {
    int engine;
    check_norm_far(test_plain);
    for (engine = 0; engine < ENGINES; engine++)
        if (contexts[engine][0]) check_norm_far(contexts[engine][0]);
}

/* Gradients of a million rows whose x is far from 0. x - mean is exact but for the rounding of the difference; xhat
   passes 3 more, its product with dy and the sum in double none, and the result one. Bounds are of the true terms, not
   of magnitudes with the mean in them, which would hide the gradient. */
static void test_norm_long(void) {
    static const mpt_norm_shape shape = {1, 1000003, 2, 2, 0};
    const double u = test_unit(MPT_F32);
    test_op t = norm_of(&shape, MPT_F32, MPT_F32, MPT_F32);
    test_tensor *x = TEST_TENSOR(&t, norm.x), *dy = TEST_TENSOR(&t, norm.y), *stats = TEST_TENSOR(&t, norm.stats);
    double sums[2][2] = {{0, 0}, {0, 0}}, bound[2][2], size[2] = {0, 0};
    size_t i;
    int engine, thread;
    test_tensor_fill(x, 1e4 - 1.7, 1e4 + 1.7, 3);
    CHECK_OK(context, mpt_op_norm(context, &t.op.norm));
    test_tensor_download(stats);
    for (i = 0; i < x->count; i++) {
        const size_t c = i % 2;
        const double normal = (x->value[i] - stats->value[c]) / sqrt(stats->value[2 + c] + 1e-5);
        sums[0][c] += dy->value[i] * normal;
        sums[1][c] += dy->value[i];
        size[c] += fabs(dy->value[i] * normal);
    }
    for (i = 0; i < 2; i++) {
        bound[0][i] = u * (6 * size[i] + fabs(sums[0][i]));
        bound[1][i] = u * fabs(sums[1][i]) + 1e6 * 1e6 * ldexp(1, -53);
    }
    t.op.norm.pass = MPT_NORM_BACKWARD;
    for (engine = 0; engine < ENGINES; engine++)
        for (thread = 0; thread < THREADS && contexts[engine][thread]; thread++) {
            CHECK_OK(context, mpt_op_norm(contexts[engine][thread], &t.op.norm));
            test_tensor_download(TEST_TENSOR(&t, norm.dgamma));
            test_tensor_download(TEST_TENSOR(&t, norm.dbeta));
            CHECK_ALL(TEST_TENSOR(&t, norm.dgamma)->value, 2, sums[0], bound[0]);
            CHECK_ALL(TEST_TENSOR(&t, norm.dbeta)->value, 2, sums[1], bound[1]);
        }
    test_op_free(&t);
}

/* A NaN in x or dy is one in all of its group that depends on it, and nowhere else. */
static void test_norm_specials(mpt_context *ctx) {
    static const mpt_norm_shape shapes[] = {{1, 10, 6, 6, 0}, {5, 1, 6, 1, 0}, {2, 5, 6, 3, 0}};
    const size_t bad = 20;
    size_t i, j, wrong = 0;
    for (i = 0; i < 3; i++) {
        const mpt_norm_shape *s = &shapes[i];
        mpt_norm_op wanted = MPT_ZERO, *op;
        test_op t;
        wanted.shape = *s;
        wanted.x = wanted.y = wanted.dx = test_wanted(MPT_F16);
        wanted.gamma = wanted.beta = wanted.dgamma = wanted.dbeta = test_wanted(MPT_F32);
        t = test_op_new(ctx, TEST_NORM, &wanted);
        op = &t.op.norm;
        CHECK_OK(ctx, mpt_op_norm(ctx, op));
        TEST_TENSOR(&t, norm.y)->value[bad] = (double)nan_value();
        test_tensor_upload(TEST_TENSOR(&t, norm.y));
        op->pass = MPT_NORM_BACKWARD;
        CHECK_OK(ctx, mpt_op_norm(ctx, op));
        for (j = 0; j < TEST_SLOTS; j++)
            if (t.tensor[j].value) test_tensor_download(&t.tensor[j]);
        for (j = 0; j < s->N * s->pixels * s->C; j++)
            wrong += test_is_finite(TEST_TENSOR(&t, norm.dx)->value[j]) == (norm_set(s, j) == norm_set(s, bad));
        for (j = 0; j < s->C; j++) {
            wrong += test_is_finite(TEST_TENSOR(&t, norm.dgamma)->value[j]) == (j == bad % s->C);
            wrong += test_is_finite(TEST_TENSOR(&t, norm.dbeta)->value[j]) == (j == bad % s->C);
        }
        TEST_TENSOR(&t, norm.x)->value[bad] = (double)nan_value();
        test_tensor_upload(TEST_TENSOR(&t, norm.x));
        op->pass = MPT_NORM_STATS;
        CHECK_OK(ctx, mpt_op_norm(ctx, op));
        op->pass = MPT_NORM_FORWARD;
        op->act = MPT_RELU;
        CHECK_OK(ctx, mpt_op_norm(ctx, op));
        test_tensor_download(TEST_TENSOR(&t, norm.y));
        for (j = 0; j < s->N * s->pixels * s->C; j++)
            wrong += test_is_finite(TEST_TENSOR(&t, norm.y)->value[j]) == (norm_set(s, j) == norm_set(s, bad));
        test_op_free(&t);
    }
    CHECK_EQUAL(wrong, 0);
}

static mpt_norm_op norm_op_good(const test_tensor *t) {
    mpt_norm_op op = MPT_ZERO;
    op.shape = norm_shapes[0];
    op.x = op.gamma = op.beta = op.y = op.dgamma = op.dbeta = op.saved = t->array;
    op.stats = op.running = (float *)t->array.data;
    op.momentum = 0.1f;
    return op;
}

static void test_norm_shape_errors(void) {
    static const mpt_norm_shape bad[] = {{0, 4, 6, 3, 0}, {2, 0, 6, 3, 0}, {2, 4, 0, 3, 0},
                                         {2, 4, 6, 0, 0}, {2, 4, 6, 4, 0}, {2, 4, 6, 7, 0}};
    test_tensor t = test_tensor_random(context, MPT_F32, 240, 1);
    mpt_norm_op good = norm_op_good(&t);
    size_t i;
    int pass;
    for (pass = MPT_NORM_STATS; pass <= MPT_NORM_RUNNING; pass++) {
        good.pass = (mpt_norm_pass)pass;
        CHECK_OK(context, mpt_op_norm(context, &good));
        for (i = 0; i < sizeof bad / sizeof *bad; i++) CHECK_SPOILT(norm, shape, bad[i], MPT_ERROR_SHAPE, "groups");
        CHECK_SPOILT(norm, shape.N, (size_t)-1 / 2, MPT_ERROR_SHAPE, "overflow");
        CHECK_SPOILT(norm, shape.eps, -1e-5f, MPT_ERROR_ARGUMENT, "eps");
        CHECK_SPOILT(norm, shape.eps, nan_value(), MPT_ERROR_ARGUMENT, "eps");
    }
    CHECK_SPOILT(norm, shape, norm_shapes[ONE_VALUE], MPT_ERROR_SHAPE, "variance");
    test_tensor_free(&t);
}

static void test_norm_errors(void) {
    test_tensor t = test_tensor_random(context, MPT_F32, 240, 1);
    const mpt_array fp8 = mpt_typed_array(t.array.data, MPT_E4M3);
    mpt_norm_op good = norm_op_good(&t);
    int pass;
    CHECK(mpt_op_norm(NULL, &good) == MPT_ERROR_ARGUMENT);
    CHECK_ERROR(context, mpt_op_norm(context, NULL), MPT_ERROR_ARGUMENT, "op");
    CHECK_SPOILT(norm, pass, (mpt_norm_pass)test_number(9), MPT_ERROR_ARGUMENT, "pass");
    for (pass = MPT_NORM_STATS; pass <= MPT_NORM_RUNNING; pass++) {
        good.pass = (mpt_norm_pass)pass;
        CHECK_SPOILT(norm, stats, NULL, MPT_ERROR_ARGUMENT, "stats");
        if (pass == MPT_NORM_RUNNING) continue;
        CHECK_SPOILT(norm, x.data, NULL, MPT_ERROR_ARGUMENT, "x");
        CHECK_SPOILT(norm, x, fp8, MPT_ERROR_TYPE, "x");
        if (pass == MPT_NORM_STATS) continue;
        CHECK_SPOILT(norm, gamma, fp8, MPT_ERROR_TYPE, "gamma");
    }
    good.pass = MPT_NORM_FORWARD;
    CHECK_SPOILT(norm, beta, fp8, MPT_ERROR_TYPE, "beta");
    CHECK_SPOILT(norm, y.data, NULL, MPT_ERROR_ARGUMENT, "y");
    CHECK_SPOILT(norm, act, MPT_ACTIVATION_COUNT, MPT_ERROR_ARGUMENT, "activation");
    good.pass = MPT_NORM_BACKWARD;
    CHECK_SPOILT(norm, y.data, NULL, MPT_ERROR_ARGUMENT, "dy");
    CHECK_SPOILT(norm, dgamma.data, NULL, MPT_ERROR_ARGUMENT, "dgamma");
    CHECK_SPOILT(norm, dbeta.data, NULL, MPT_ERROR_ARGUMENT, "dbeta");
    CHECK_SPOILT(norm, dx, fp8, MPT_ERROR_TYPE, "dx");
    good.pass = MPT_NORM_RUNNING;
    CHECK_SPOILT(norm, running, NULL, MPT_ERROR_ARGUMENT, "running");
    CHECK_SPOILT(norm, momentum, 1.25f, MPT_ERROR_ARGUMENT, "momentum");
    CHECK_SPOILT(norm, momentum, nan_value(), MPT_ERROR_ARGUMENT, "momentum");
    test_tensor_free(&t);
}

/* ==== LOSSES ==== */

/* A loss is a row's sum, which no backend has a loop of its own for: these formulas are all that they are held against,
   beside PyTorch's values. */

static double log_of_sum(const double *x, size_t C, double *largest) {
    double sum = 0;
    size_t j;
    *largest = x[0];
    for (j = 1; j < C; j++) *largest = x[j] > *largest ? x[j] : *largest;
    for (j = 0; j < C; j++) sum += exp(x[j] - *largest);
    return log(sum);
}

/* Loss of one row of logits, whose target is t(C). */
static double row_cross_entropy(const double *x, size_t C, const double *t) {
    double largest, loss = 0;
    const double log_sum = log_of_sum(x, C, &largest);
    size_t j;
    for (j = 0; j < C; j++) loss += t[j] * (log_sum - (x[j] - largest));
    return loss;
}

/* Its slope at x[j]. */
static double cross_entropy_slope(const double *x, size_t C, const double *t, size_t j) {
    double largest, total = 0;
    const double log_sum = log_of_sum(x, C, &largest);
    size_t i;
    for (i = 0; i < C; i++) total += t[i];
    return total * exp(x[j] - largest - log_sum) - t[j];
}

/* One element of the other losses. w: pos_weight */
static double element_loss(const mpt_loss_op *op, double x, double t, double w) {
    const double d = fabs(x - t), delta = op->desc.delta > 0 ? (double)op->desc.delta : 1;
    if (op->kind == MPT_LOSS_BCE_WITH_LOGITS) {
        const double tail = log(1 + exp(-fabs(x)));
        return w * t * ((x < 0 ? -x : 0) + tail) + (1 - t) * ((x > 0 ? x : 0) + tail);
    }
    if (op->kind == MPT_LOSS_ABSOLUTE_ERROR) return d;
    if (op->kind == MPT_LOSS_HUBER) return d <= delta ? d * d / 2 : delta * (d - delta / 2);
    return d * d;
}

static double element_slope(const mpt_loss_op *op, double x, double t, double w) {
    const double d = x - t, sign = d > 0 ? 1 : d < 0 ? -1 : 0, delta = op->desc.delta > 0 ? (double)op->desc.delta : 1;
    if (op->kind == MPT_LOSS_BCE_WITH_LOGITS) return (1 - t) / (1 + exp(-x)) - w * t / (1 + exp(x));
    if (op->kind == MPT_LOSS_ABSOLUTE_ERROR) return sign;
    if (op->kind == MPT_LOSS_HUBER) return fabs(d) <= delta ? d : delta * sign;
    return 2 * d;
}

/* Loss of a row: the mean over its elements. */
static double row_loss(const mpt_loss_op *op, const double *x, const double *target, const double *weights) {
    double sum = 0;
    size_t j;
    for (j = 0; j < op->C; j++) sum += element_loss(op, x[j], target[j], weights ? weights[j] : 1);
    return sum / (double)op->C;
}

/* -- Cases -- */

typedef struct loss_case {
    mpt_loss_op op; /* kind, sizes, options, types of x and dx */
    double width;   /* logits lie in +-width */
    float scale;    /* *loss_scale; 0: the pointer is NULL */
    int weighted;   /* classes have weights; of binary cross-entropy: positives */
    int sampled;    /* samples have weights */
} loss_case;

/* The case's struct with arrays in device memory; what the host knows of them. Where the label to be ignored is no
   class, every third row has it. */
typedef struct loss_data {
    mpt_loss_op op;
    test_tensor x, dx, target, weights, samples;
    int32_t *label;
} loss_data;

static size_t rows_of(const mpt_loss_op *op) { return op->N * (op->positions ? op->positions : 1); }

static void *on_device(const void *host, size_t bytes) {
    void *device = mpt_alloc(context, bytes);
    CHECK_OK(context, mpt_upload(context, device, host, bytes));
    return device;
}

static void put_labels(loss_data *d) {
    void *labels = (void *)(uintptr_t)d->op.target;
    CHECK_OK(context, mpt_upload(context, labels, d->label, rows_of(&d->op) * sizeof *d->label));
}

static loss_data loss_new(const loss_case *c) {
    const size_t N = rows_of(&c->op), C = c->op.C;
    const int shares = c->op.kind == MPT_LOSS_BCE_WITH_LOGITS || c->op.desc.probabilities;
    const mpt_loss_sum zero = MPT_ZERO;
    loss_data d;
    size_t i;
    d.op = c->op;
    d.x = test_tensor_new(context, c->op.x.type, N * C);
    test_tensor_fill(&d.x, -c->width, c->width, 1);
    d.dx = test_tensor_new(context, c->op.dx.type, N * C);
    d.target = test_tensor_new(context, MPT_F32, N * C);
    test_tensor_fill(&d.target, shares ? 0 : -1, 1, 2);
    d.weights = test_tensor_new(context, MPT_F32, C);
    test_tensor_fill(&d.weights, 0.25, 2, 4);
    d.samples = test_tensor_new(context, MPT_F32, c->op.N);
    test_tensor_fill(&d.samples, 0, 3, 5);
    d.label = (int32_t *)test_memory(N * sizeof *d.label);
    for (i = 0; i < N; i++) {
        const mpt_loss_desc *e = &c->op.desc;
        d.label[i] = (int32_t)(mpt_hash(3, 0, 0, i) % C);
        if (e->ignore && e->ignore_index < 0 && i % 3 == 1) d.label[i] = e->ignore_index;
    }
    d.op.x = d.x.array;
    d.op.dx = d.dx.array;
    d.op.target = on_device(d.label, N * sizeof *d.label);
    d.op.loss_scale = (float *)on_device(&c->scale, sizeof c->scale);
    d.op.sum = (mpt_loss_sum *)on_device(&zero, sizeof zero);
    if (c->sampled) d.op.sample_weights = (const float *)d.samples.array.data;
    if (c->weighted && c->op.kind == MPT_LOSS_CROSS_ENTROPY)
        d.op.desc.class_weights = (const float *)d.weights.array.data;
    if (c->weighted && c->op.kind == MPT_LOSS_BCE_WITH_LOGITS)
        d.op.desc.pos_weight = (const float *)d.weights.array.data;
    return d;
}

static void loss_free(loss_data *d) {
    test_tensor_free(&d->x);
    test_tensor_free(&d->dx);
    test_tensor_free(&d->target);
    test_tensor_free(&d->weights);
    test_tensor_free(&d->samples);
    mpt_free(context, (void *)(uintptr_t)d->op.target);
    mpt_free(context, (void *)(uintptr_t)d->op.loss_scale);
    mpt_free(context, d->op.sum);
    free(d->label);
}

/* Adds to a sum that already holds 10 rows. */
static mpt_loss_sum call_loss(mpt_context *ctx, const loss_case *c, const loss_data *d, mpt_array dx) {
    mpt_loss_op op = d->op;
    mpt_loss_sum sum = MPT_ZERO;
    sum.loss = 1;
    sum.weight = 20;
    sum.rows = 10;
    sum.correct = 5;
    op.dx = dx;
    if (op.kind != MPT_LOSS_CROSS_ENTROPY || op.desc.probabilities) op.target = d->target.array.data;
    if (!(c->scale > 0)) op.loss_scale = NULL;
    CHECK_OK(context, mpt_upload(context, op.sum, &sum, sizeof sum));
    CHECK_OK(ctx, mpt_op_loss(ctx, &op));
    CHECK_OK(context, mpt_download(context, &sum, op.sum, sizeof sum));
    return sum;
}

static int is_ignored(const loss_case *c, const loss_data *d, size_t row) {
    return c->op.desc.ignore && d->label[row] == c->op.desc.ignore_index;
}

static double sample_weight(const loss_case *c, const loss_data *d, size_t row) {
    return c->sampled ? d->samples.value[row / (rows_of(&c->op) / c->op.N)] : 1;
}

/* What a row weighs in the mean. */
static double row_weight(const loss_case *c, const loss_data *d, size_t row) {
    const double own = sample_weight(c, d, row);
    if (is_ignored(c, d, row)) return 0;
    return d->op.desc.class_weights && !c->op.desc.probabilities ? own * d->weights.value[d->label[row]] : own;
}

/* The target t(C) of a row of cross-entropy */
static void row_target(const loss_case *c, const loss_data *d, size_t row, double *t) {
    const double smoothing = (double)c->op.desc.label_smoothing, classes = (double)c->op.C;
    size_t j;
    for (j = 0; j < c->op.C; j++) {
        t[j] = c->op.desc.probabilities ? d->target.value[row * c->op.C + j] : (double)(j == (size_t)d->label[row]);
        t[j] = t[j] * (1 - smoothing) + smoothing / classes;
        if (c->weighted) t[j] *= d->weights.value[j];
    }
}

/* Loss of a row, its slopes, and how far fp32 arithmetic may take both off. u is the unit roundoff; expf, logf and
   log1pf are taken to be good to 2 ulp = 4 u.

   With d = x - max, the loss is sum_j t_j (L + |d_j|), L the logarithm of a sum of C exponentials of which one is 1. d
   has error u |d|, so exp d has relative error (|d| + 4) u; as e^d |d| < 0.4 the sum has relative error under (2 C + 4)
   u, which is L's absolute error, with 4 u of itself. A t_j passes 5 roundings; `terms` of them are not 0. The loss,
   all terms of which are positive, passes terms + 10 roundings on top. A probability has relative error (2 C + 9 + |d|)
   u, and times the sum of t terms + 5 more; a slope that of t, and its own. */
static double cross_entropy_row(const loss_case *c, const loss_data *d, size_t row, double *slope, double *slope_error,
                                double *error) {
    const double u = test_unit(MPT_F32), classes = (double)c->op.C, *x = d->x.value + row * c->op.C;
    const double terms = c->op.desc.label_smoothing > 0 || c->op.desc.probabilities ? classes : 1;
    double largest, total = 0, loss, *t = test_doubles(c->op.C);
    size_t j;
    row_target(c, d, row, t);
    loss = row_cross_entropy(x, c->op.C, t);
    log_of_sum(x, c->op.C, &largest);
    for (j = 0; j < c->op.C; j++) total += t[j];
    for (j = 0; j < c->op.C; j++) {
        slope[j] = cross_entropy_slope(x, c->op.C, t, j);
        slope_error[j] = (slope[j] + t[j]) * (2 * classes + 14 + terms + largest - x[j]) + 5 * t[j] + fabs(slope[j]);
        slope_error[j] = u * slope_error[j] + total * test_tiny(MPT_F32);
    }
    *error = u * (total * (2 * classes + 4) + (terms + 10) * loss);
    free(t);
    return loss;
}

/* An element passes 3 roundings of its own size (Huber's 5), that of BCE, max(x, 0) - x t + log(1 + exp(-|x|)), 3 of
   |x| (1 + |t|) and 10 of the logarithm, both times a weight above 1; the row C additions and a product. Slopes: 1
   rounding (Huber's 2), of BCE 8 of each of its two terms and 1. */
static double elementwise_row(const loss_case *c, const loss_data *d, size_t row, double *slope, double *slope_error,
                              double *error) {
    const double u = test_unit(MPT_F32), classes = (double)c->op.C;
    const double *x = d->x.value + row * c->op.C, *t = d->target.value + row * c->op.C;
    const double *weights = c->weighted ? d->weights.value : NULL;
    const double loss = row_loss(&c->op, x, t, weights);
    double own = 5 * loss;
    size_t j;
    for (j = 0; j < c->op.C; j++) {
        const double w = weights ? weights[j] : 1;
        slope[j] = element_slope(&c->op, x[j], t[j], w) / classes;
        slope_error[j] = 2 * u * fabs(slope[j]);
        if (c->op.kind != MPT_LOSS_BCE_WITH_LOGITS) continue;
        slope_error[j] += 8 * u * (slope[j] + 2 * w * t[j] / (1 + exp(x[j])) / classes);
        own += fmax(1, w) * (3 * fabs(x[j]) * (1 + t[j]) + 10 * log(1 + exp(-fabs(x[j])))) / classes;
    }
    *error = u * (own + (classes + 2) * loss);
    return loss;
}

/* Sum of the losses, and what each dx shall be: slope * sample's weight * scale / weight, 6 roundings. Returns how far it may be off. */
static double expect_loss(const loss_case *c, const loss_data *d, double *dx, double *tolerance, mpt_loss_sum *sum) {
    const double scale = (double)c->op.grad_scale * (c->scale != 0 ? (double)c->scale : 1);
    double bound = 0, factor;
    size_t row, i;
    memset(sum, 0, sizeof *sum);
    for (row = 0; row < rows_of(&c->op); row++) {
        double *slope = dx + row * c->op.C, *slope_error = tolerance + row * c->op.C, error = 0, loss;
        const double own = sample_weight(c, d, row);
        if (is_ignored(c, d, row)) continue;
        loss = (c->op.kind == MPT_LOSS_CROSS_ENTROPY ? cross_entropy_row : elementwise_row)(c, d, row, slope,
                                                                                            slope_error, &error);
        sum->loss += own * loss;
        sum->weight += row_weight(c, d, row);
        sum->rows++;
        bound += own * error;
    }
    for (i = 0; i < rows_of(&c->op) * c->op.C; i++) {
        if (is_ignored(c, d, i / c->op.C)) continue; /* both are 0 */
        factor = sum->weight > 0 ? sample_weight(c, d, i / c->op.C) * scale / sum->weight : 0;
        dx[i] *= factor;
        tolerance[i] = fabs(factor) * tolerance[i] + 6 * test_unit(MPT_F32) * fabs(dx[i]);
        tolerance[i] += test_unit(c->op.dx.type) * (fabs(dx[i]) + tolerance[i]) + test_tiny(c->op.dx.type);
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
    for (row = 0; row < rows_of(&c->op); row++) {
        size_t aim = (size_t)d.label[row];
        if (c->op.desc.probabilities) aim = first_largest(d.target.value + row * c->op.C, c->op.C);
        correct += !is_ignored(c, &d, row) && first_largest(d.x.value + row * c->op.C, c->op.C) == aim;
    }
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
    ok &= CHECK_NEAR(sums[0].weight, 20 + sum.weight, (c->sampled ? test_unit(MPT_F32) : 1e-12) * sum.weight);
    ok &= CHECK_EQUAL(sums[0].rows, 10 + sum.rows);
    ok &= CHECK_EQUAL(sums[0].correct, 5 + (c->op.kind == MPT_LOSS_CROSS_ENTROPY ? correct : 0));
    plain = call_loss(context, c, &d, no_array); /* dx is optional */
    ok &= CHECK(memcmp(&plain, &sums[0], sizeof plain) == 0);
    if (!ok)
        printf(
            "    in loss %d of N %lu positions %lu C %lu, width %g, smoothing %g, weighted %d, sampled %d, ignore %d, "
            "probabilities %d\n",
            (int)c->op.kind, (unsigned long)c->op.N, (unsigned long)c->op.positions, (unsigned long)c->op.C, c->width,
            (double)c->op.desc.label_smoothing, c->weighted, c->sampled, c->op.desc.ignore, c->op.desc.probabilities);
    free(expected);
    free(tolerance);
    free(first);
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
            c.op.N = shapes[i][0];
            c.op.C = shapes[i][1];
            c.width = widths[mix % 3];
            c.op.x.type = (mpt_dtype)(mix % 3), c.op.dx.type = (mpt_dtype)(mix / 3);
            c.op.grad_scale = mix % 4 ? 1 : 0.25f, c.scale = mix % 2 ? 1024.0f : 0;
            test_loss(&c);
            c.op.desc.label_smoothing = mix % 2 ? 0.1f : 0, c.weighted = mix % 3 != 1, c.op.desc.ignore = mix != 2;
            c.op.desc.ignore_index = mix % 2 ? -100 : 1;
            test_loss(&c);
            c.op.desc.label_smoothing = 0;
            c.weighted = c.op.desc.ignore = 0;
            for (kind = MPT_LOSS_SQUARED_ERROR; kind < MPT_LOSS_GRADIENT; kind++) {
                c.op.kind = (mpt_loss_kind)kind;
                c.width = kind == MPT_LOSS_BCE_WITH_LOGITS ? widths[mix % 3] : 2;
                test_loss(&c);
                c.weighted = kind == MPT_LOSS_BCE_WITH_LOGITS;
                if (kind == MPT_LOSS_HUBER) c.op.desc.delta = mix % 2 ? 0.3f : 1.75f;
                if (c.weighted || c.op.desc.delta > 0) test_loss(&c);
                c.weighted = 0, c.op.desc.delta = 0;
            }
        }
}

/* Positions, probabilities, and weights of samples, of any loss; large ones fall into parts. */
static void test_loss_options(void) {
    static const size_t shapes[][3] = {{1, 1, 1}, {7, 1, 10}, {3, 35, 4}, {5, 6, 130}, {2, 12007, 3}};
    static const mpt_loss_kind kinds[] = {MPT_LOSS_CROSS_ENTROPY, MPT_LOSS_BCE_WITH_LOGITS, MPT_LOSS_SQUARED_ERROR,
                                          MPT_LOSS_HUBER};
    size_t i;
    int mix, kind;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (mix = 0; mix < 9; mix++) {
            loss_case c = MPT_ZERO;
            if (shapes[i][1] > 10000 && mix % 4) continue;
            c.op.N = shapes[i][0], c.op.positions = shapes[i][1], c.op.C = shapes[i][2];
            c.op.x.type = (mpt_dtype)(mix % 3), c.op.dx.type = (mpt_dtype)(mix / 3);
            c.op.grad_scale = 1, c.scale = mix % 2 ? 1024.0f : 0;
            c.sampled = mix % 4 != 3;
            for (kind = 0; kind < 4; kind++) {
                c.op.kind = kinds[kind];
                c.width = kind < 2 ? 10 : 2;
                c.weighted = kind < 2 && mix % 2;
                c.op.desc.delta = kind == 3 ? 0.75f : 0;
                c.op.desc.ignore = kind == 0 && mix > 4, c.op.desc.ignore_index = -100;
                test_loss(&c);
            }
            c.op.kind = MPT_LOSS_CROSS_ENTROPY;
            c.op.desc.ignore = 0, c.op.desc.delta = 0, c.weighted = mix % 3 == 1;
            c.op.desc.probabilities = 1, c.op.desc.label_smoothing = mix % 2 ? 0 : 0.1f;
            test_loss(&c);
        }
}

/* The slopes of the formulas: step 2^-13, third derivatives at most 2 (softmax and sigmoid, weighted) or 0, so the
   truncation error is at most h^2 / 3 < 6e-9; rounding, 2^-53 |loss| C / h, is far below. No value is near a kink. */
typedef struct loss_objective {
    const loss_case *c;
    double *x, *target, *weights;
    double t[10]; /* of cross-entropy */
} loss_objective;

static double loss_value(const loss_objective *o) {
    if (o->c->op.kind != MPT_LOSS_CROSS_ENTROPY) return row_loss(&o->c->op, o->x, o->target, o->weights);
    return row_cross_entropy(o->x, o->c->op.C, o->t);
}

static double loss_slope(const loss_objective *o, size_t j) {
    const double step = ldexp(1, -13), kept = o->x[j];
    double above, below;
    o->x[j] = kept + step;
    above = loss_value(o);
    o->x[j] = kept - step;
    below = loss_value(o);
    o->x[j] = kept;
    return (above - below) / (2 * step);
}

static void test_loss_formulas(void) {
    int kind;
    for (kind = -4; kind < MPT_LOSS_GRADIENT; kind++) { /* below 0: with options */
        static const mpt_loss_kind optional[] = {MPT_LOSS_CROSS_ENTROPY, MPT_LOSS_BCE_WITH_LOGITS, MPT_LOSS_HUBER,
                                                 MPT_LOSS_CROSS_ENTROPY};
        double slope[10], slope_error[10], error, kink;
        loss_case c = MPT_ZERO;
        loss_objective o;
        loss_data d;
        size_t j;
        c.op.N = 1;
        c.op.C = 10;
        c.width = 3;
        c.op.kind = kind >= 0 ? (mpt_loss_kind)kind : optional[-1 - kind];
        c.weighted = kind < 0 && c.op.kind != MPT_LOSS_HUBER;
        c.op.desc.probabilities = kind == -4;
        if (c.weighted && c.op.kind == MPT_LOSS_CROSS_ENTROPY) c.op.desc.label_smoothing = 0.25f;
        if (kind == -3) c.op.desc.delta = 1.5f;
        kink = kind == -3 ? 1.5 : 1;
        d = loss_new(&c);
        (c.op.kind == MPT_LOSS_CROSS_ENTROPY ? cross_entropy_row : elementwise_row)(&c, &d, 0, slope, slope_error,
                                                                                    &error);
        o.c = &c;
        o.x = d.x.value;
        o.target = d.target.value;
        row_target(&c, &d, 0, o.t);
        o.weights = c.weighted ? d.weights.value : NULL;
        for (j = 0; j < c.op.C; j++) {
            const double distance = fabs(o.x[j] - o.target[j]);
            CHECK(c.op.kind <= MPT_LOSS_BCE_WITH_LOGITS || (distance > 0.001 && fabs(distance - kink) > 0.001));
            CHECK_NEAR(slope[j], loss_slope(&o, j), 6e-9);
        }
        loss_free(&d);
    }
}

/* A label outside 0..C-1 makes its row NaN and no other, unless it is the one to be ignored. */
static void test_bad_labels(void) {
    static const int32_t bad[] = {-1, 4, 2147483647, -2147483647};
    loss_case c = MPT_ZERO;
    size_t i, j;
    c.op.N = 3;
    c.op.C = 4;
    c.width = 1;
    c.op.grad_scale = 1;
    for (i = 0; i < 12; i++) {
        loss_data d;
        mpt_loss_sum sum;
        const int ignored = i >= 8;
        c.weighted = i >= 4;
        c.op.desc.ignore = ignored;
        c.op.desc.ignore_index = bad[i % 4];
        d = loss_new(&c);
        d.label[0] = d.label[2] = 1;
        d.label[1] = bad[i % 4];
        put_labels(&d);
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
    c.op.N = 5;
    c.op.C = 3;
    c.width = 1;
    c.op.grad_scale = 1;
    c.scale = 65536;
    c.op.desc.ignore = 1;
    c.op.desc.ignore_index = -100;
    for (weighted = 0; weighted < 2; weighted++) {
        loss_data d;
        mpt_loss_sum sum;
        size_t i;
        c.weighted = weighted;
        d = loss_new(&c);
        for (i = 0; i < c.op.N; i++) d.label[i] = -100;
        put_labels(&d);
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
    for (kind = MPT_LOSS_SQUARED_ERROR; kind < MPT_LOSS_GRADIENT; kind++) {
        loss_case c = MPT_ZERO;
        loss_data d;
        if (kind == MPT_LOSS_BCE_WITH_LOGITS) continue; /* x is no probability */
        c.op.kind = (mpt_loss_kind)kind, c.op.N = 3, c.op.C = 4, c.width = 1, c.op.grad_scale = 1;
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
    for (kind = 0; kind < MPT_LOSS_GRADIENT; kind++) {
        loss_case c = MPT_ZERO;
        loss_data d;
        mpt_loss_sum sum;
        size_t i, bad;
        c.op.kind = (mpt_loss_kind)kind, c.op.N = 3, c.op.C = 4, c.width = 1, c.op.grad_scale = 1;
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

/* Of a row with a NaN none is the largest: it does not count as right. */
static void test_nan_row(void) {
    loss_case c = MPT_ZERO;
    loss_data d;
    mpt_loss_sum sum;
    size_t i;
    c.op.N = 2;
    c.op.C = 3;
    d = loss_new(&c);
    for (i = 0; i < 6; i++) d.x.value[i] = i % 3 == 2 ? 5 : 1;
    d.x.value[1] = (double)nan_value();
    test_tensor_upload(&d.x);
    d.label[0] = d.label[1] = 2;
    put_labels(&d);
    sum = call_loss(context, &c, &d, no_array);
    CHECK_EQUAL(sum.rows, 10 + 2);
    CHECK_EQUAL(sum.correct, 5 + 1);
    loss_free(&d);
}

static void test_loss_errors(void) {
    test_tensor t = test_tensor_new(context, MPT_F32, 64);
    const mpt_array fp8 = mpt_typed_array(t.array.data, MPT_E5M2);
    mpt_loss_op good = MPT_ZERO;
    int kind;
    good.N = 2;
    good.C = 3;
    good.x = good.dx = t.array;
    good.target = (float *)t.array.data + 32;
    good.sum = (mpt_loss_sum *)t.array.data + 1;
    CHECK(mpt_op_loss(NULL, &good) == MPT_ERROR_ARGUMENT);
    CHECK_ERROR(context, mpt_op_loss(context, NULL), MPT_ERROR_ARGUMENT, "op");
    for (kind = MPT_LOSS_CROSS_ENTROPY; kind < MPT_LOSS_GRADIENT; kind++) {
        good.kind = (mpt_loss_kind)kind;
        CHECK_OK(context, mpt_op_loss(context, &good));
        CHECK_SPOILT(loss, x.data, NULL, MPT_ERROR_ARGUMENT, "x");
        CHECK_SPOILT(loss, target, NULL, MPT_ERROR_ARGUMENT, "target");
        CHECK_SPOILT(loss, sum, NULL, MPT_ERROR_ARGUMENT, "sum");
        CHECK_SPOILT(loss, x, fp8, MPT_ERROR_TYPE, "x");
        CHECK_SPOILT(loss, dx, fp8, MPT_ERROR_TYPE, "dx");
        CHECK_SPOILT(loss, N, (size_t)-1 / 3, MPT_ERROR_SHAPE, "overflow");
    }
    CHECK_SPOILT(loss, kind, MPT_LOSS_KIND_COUNT, MPT_ERROR_ARGUMENT, "kind");
    good.kind = MPT_LOSS_CROSS_ENTROPY;
    CHECK_SPOILT(loss, desc.label_smoothing, 1.5f, MPT_ERROR_ARGUMENT, "label_smoothing");
    CHECK_SPOILT(loss, desc.pos_weight, (const float *)t.array.data, MPT_ERROR_ARGUMENT, "pos_weight");
    CHECK_SPOILT(loss, desc.delta, 1, MPT_ERROR_ARGUMENT, "delta");
    CHECK_SPOILT(loss, positions, (size_t)-1 / 3, MPT_ERROR_SHAPE, "overflow");
    good.desc.ignore = 1;
    CHECK_SPOILT(loss, desc.probabilities, 1, MPT_ERROR_ARGUMENT, "probabilities");
    good.desc.ignore = 0;
    good.kind = MPT_LOSS_GRADIENT;
    CHECK_SPOILT(loss, sample_weights, (const float *)t.array.data, MPT_ERROR_ARGUMENT, "sample_weights");
    CHECK_SPOILT(loss, desc.probabilities, 1, MPT_ERROR_ARGUMENT, "probabilities");
    good.kind = MPT_LOSS_HUBER;
    CHECK_SPOILT(loss, desc.delta, -1, MPT_ERROR_ARGUMENT, "delta");
    CHECK_SPOILT(loss, desc.delta, nan_value(), MPT_ERROR_ARGUMENT, "delta");
    CHECK_SPOILT(loss, desc.label_smoothing, 0.5f, MPT_ERROR_ARGUMENT, "label_smoothing");
    CHECK_SPOILT(loss, desc.class_weights, (const float *)t.array.data, MPT_ERROR_ARGUMENT, "class_weights");
    CHECK_SPOILT(loss, desc.ignore, 1, MPT_ERROR_ARGUMENT, "ignore");
    good.kind = MPT_LOSS_CROSS_ENTROPY;
    good.N = 0;
    CHECK_OK(context, mpt_op_loss(context, &good));
    test_tensor_free(&t);
}

/* ==== THE REFERENCE ITSELF ==== its gradients are the slopes of sum(dy y), by central differences of its forward pass

   Of operations that are linear in each argument the slope has no truncation error. x, w and dy are small whole numbers
   there, so that fp32 rounds nothing, and both sides are the same to the bit. */

static void whole_numbers(test_tensor *t, uint64_t seed) {
    size_t i;
    for (i = 0; i < t->count; i++) t->value[i] = floor(test_uniform(-4, 5, seed, i));
    test_tensor_upload(t);
}

typedef struct objective {
    test_op *t;     /* of the forward pass, in the reference context */
    test_tensor *y; /* what it writes */
    const double *dy;
} objective;

static double objective_value(const objective *o) {
    double sum = 0;
    size_t i;
    if (o->t->kind == TEST_NORM && !o->t->op.norm.frozen) {
        o->t->op.norm.pass = MPT_NORM_STATS;
        CHECK_OK(test_plain, mpt_op_norm(test_plain, &o->t->op.norm));
        o->t->op.norm.pass = MPT_NORM_FORWARD;
    }
    CHECK_OK(test_plain, test_op_call(test_plain, o->t->kind, &o->t->op));
    test_tensor_download(o->y);
    for (i = 0; i < o->y->count; i++) sum += o->y->value[i] * o->dy[i];
    return sum;
}

/* gradient: of the objective with respect to x, which some two dozen elements of are moved by `step` to either side */
static void check_slopes(const objective *o, test_tensor *x, const test_tensor *gradient, double step,
                         double tolerance) {
    size_t i;
    for (i = 0; i < x->count; i += 1 + x->count / 23) {
        const double kept = x->value[i];
        double above, below;
        x->value[i] = kept + step;
        test_tensor_upload(x);
        above = objective_value(o);
        x->value[i] = kept - step;
        test_tensor_upload(x);
        below = objective_value(o);
        x->value[i] = kept;
        test_tensor_upload(x);
        CHECK_NEAR(gradient->value[i], (above - below) / (2 * step), tolerance);
    }
}

static void check_reference_conv2d(const mpt_conv2d_shape *shape) {
    const mpt_conv2d_op wanted = conv2d_of(shape, MPT_F32, MPT_F32, MPT_F32);
    test_op t = test_op_new(test_plain, TEST_CONV2D, &wanted), g = test_op_new(test_plain, TEST_CONV2D, &wanted);
    test_tensor *x = TEST_TENSOR(&t, conv2d.x), *w = TEST_TENSOR(&t, conv2d.w), *y = TEST_TENSOR(&t, conv2d.y);
    test_tensor *dy = TEST_TENSOR(&g, conv2d.y);
    mpt_conv2d_op op;
    objective o;
    int i;
    for (i = 0; i < 4; i++) whole_numbers(&t.tensor[i], (uint64_t)i);
    whole_numbers(dy, 9);
    o.t = &t;
    o.y = y;
    o.dy = dy->value;
    op = g.op.conv2d;
    op.pass = MPT_BACKWARD_DATA;
    op.w = w->array;
    CHECK_OK(test_plain, mpt_op_conv2d(test_plain, &op));
    op = g.op.conv2d;
    op.pass = MPT_BACKWARD_WEIGHT;
    op.x = x->array;
    CHECK_OK(test_plain, mpt_op_conv2d(test_plain, &op));
    for (i = 0; i < 4; i++) {
        if (&t.tensor[i] == y) continue;
        test_tensor_download(&g.tensor[i]);
        check_slopes(&o, &t.tensor[i], &g.tensor[i], 1, 0);
    }
    test_op_free(&t);
    test_op_free(&g);
}

/* A linear layer and its gradients, as mpt_gemm_op says. */
static void check_reference_linear(size_t N, size_t D, size_t O) {
    const size_t forward[3] = {N, O, D};
    mpt_gemm_op op = gemm_of(2, forward, MPT_F32, MPT_F32, MPT_F32);
    test_tensor dx = test_tensor_new(test_plain, MPT_F32, N * D), dw = test_tensor_new(test_plain, MPT_F32, O * D);
    test_tensor db = test_tensor_new(test_plain, MPT_F32, O), dy = test_tensor_new(test_plain, MPT_F32, N * O);
    objective o;
    test_op t;
    int i;
    op.bias = test_wanted(MPT_F32);
    t = test_op_new(test_plain, TEST_GEMM, &op);
    for (i = 0; i < 4; i++) whole_numbers(&t.tensor[i], (uint64_t)i);
    whole_numbers(&dy, 9);
    o.t = &t;
    o.y = TEST_TENSOR(&t, gemm.c);
    o.dy = dy.value;
    memset(&op, 0, sizeof op);
    op.m = N;
    op.n = D;
    op.k = O;
    op.a = dy.array;
    op.b = t.op.gemm.b;
    op.c = dx.array;
    CHECK_OK(test_plain, mpt_op_gemm(test_plain, &op));
    op.trans_a = 1;
    op.m = O;
    op.k = N;
    op.b = t.op.gemm.a;
    op.c = dw.array;
    op.a_sums = db.array;
    CHECK_OK(test_plain, mpt_op_gemm(test_plain, &op));
    test_tensor_download(&dx);
    test_tensor_download(&dw);
    test_tensor_download(&db);
    check_slopes(&o, TEST_TENSOR(&t, gemm.a), &dx, 1, 0);
    check_slopes(&o, TEST_TENSOR(&t, gemm.b), &dw, 1, 0);
    check_slopes(&o, TEST_TENSOR(&t, gemm.bias), &db, 1, 0);
    test_op_free(&t);
    test_tensor_free(&dx);
    test_tensor_free(&dw);
    test_tensor_free(&db);
    test_tensor_free(&dy);
}

/* x has no two equal numbers, multiples of the window's size, so that averages are whole and a step of a quarter of it
   changes no maximum's place. */
static void check_reference_pool2d(mpt_pool_kind kind, const mpt_pool2d_shape *shape) {
    const double window = (double)(shape->R * shape->S);
    mpt_pool2d_op op = MPT_ZERO;
    test_tensor *x, dy, dx;
    objective o;
    test_op t;
    size_t i;
    op.kind = kind;
    op.shape = *shape;
    op.x = op.y = test_wanted(MPT_F32);
    t = test_op_new(test_plain, TEST_POOL2D, &op);
    x = TEST_TENSOR(&t, pool2d.x);
    for (i = 0; i < x->count; i++) x->value[i] = window * (double)(i * 7919 % x->count); /* 7919 is prime */
    test_tensor_upload(x);
    o.t = &t;
    o.y = TEST_TENSOR(&t, pool2d.y);
    dy = test_tensor_new(test_plain, MPT_F32, o.y->count);
    dx = test_tensor_new(test_plain, MPT_F32, x->count);
    whole_numbers(&dy, 9);
    for (i = 0; i < dy.count; i++) dy.value[i] *= kind == MPT_POOL_MAX ? 1 : window;
    test_tensor_upload(&dy);
    o.dy = dy.value;
    CHECK_OK(test_plain, mpt_op_pool2d(test_plain, &t.op.pool2d)); /* the index */
    op = t.op.pool2d;
    op.pass = MPT_BACKWARD_DATA;
    op.x = dx.array;
    op.y = dy.array;
    CHECK_OK(test_plain, mpt_op_pool2d(test_plain, &op));
    test_tensor_download(&dx);
    check_slopes(&o, x, &dx, kind == MPT_POOL_MAX ? window / 4 : window, 0);
    test_op_free(&t);
    test_tensor_free(&dy);
    test_tensor_free(&dx);
}

/* With v = x - mean and a = dy gamma the objective is a constant and <a, v> sqrt(count) / |v|, where |v|^2 is
   count / inverse^2 and eps only makes it smoother. Its third derivative is at most 36 |a| inverse^3 / count, so a step
   h is off by less than 6 h^2 |a| inverse^3. Forward passes round statistics and y to fp32: 4 u of the sizes of y and
   of what the mean is taken from, / h. */
static void check_reference_norm(const mpt_norm_shape *shape, int frozen) {
    static const double h = 1.0 / 256;
    mpt_norm_op wanted = MPT_ZERO, op;
    double sizes = 0, steepest = 1, tolerance;
    const test_tensor *stats;
    test_tensor dy;
    objective o;
    test_op t;
    size_t i;
    wanted.shape = *shape;
    wanted.x = wanted.y = wanted.gamma = wanted.beta = wanted.dx = wanted.dgamma = wanted.dbeta = test_wanted(MPT_F32);
    wanted.pass = MPT_NORM_FORWARD;
    wanted.frozen = frozen;
    t = test_op_new(test_plain, TEST_NORM, &wanted);
    dy = test_tensor_random(test_plain, MPT_F32, t.tensor[0].count, 9);
    o.t = &t;
    o.y = TEST_TENSOR(&t, norm.y);
    o.dy = dy.value;
    objective_value(&o); /* the statistics */
    op = t.op.norm;
    op.pass = MPT_NORM_BACKWARD;
    op.y = dy.array;
    CHECK_OK(test_plain, mpt_op_norm(test_plain, &op));
    test_tensor_download(TEST_TENSOR(&t, norm.stats));
    test_tensor_download(TEST_TENSOR(&t, norm.dx));
    test_tensor_download(TEST_TENSOR(&t, norm.dgamma));
    test_tensor_download(TEST_TENSOR(&t, norm.dbeta));
    stats = TEST_TENSOR(&t, norm.stats);
    for (i = 0; i < norm_sets(shape); i++)
        steepest = fmax(steepest, 1 / sqrt(stats->value[norm_sets(shape) + i] + 1e-5));
    for (i = 0; i < dy.count; i++) sizes += fabs(dy.value[i]);
    tolerance = sizes * (6 * h * h * pow(steepest, 3) + 4 * test_unit(MPT_F32) * (3 * steepest + 1) / h);
    check_slopes(&o, TEST_TENSOR(&t, norm.x), TEST_TENSOR(&t, norm.dx), h, tolerance);
    check_slopes(&o, TEST_TENSOR(&t, norm.gamma), TEST_TENSOR(&t, norm.dgamma), h, tolerance);
    check_slopes(&o, TEST_TENSOR(&t, norm.beta), TEST_TENSOR(&t, norm.dbeta), h, tolerance);
    test_op_free(&t);
    test_tensor_free(&dy);
}

static void test_reference(void) {
    static const mpt_pool2d_shape excluding = {1, 5, 5, 3, 2, 2, 2, 1, 1, 1, 1}; /* 1, 2 or 4 pixels in a window */
    static const mpt_pool2d_shape windows[] = {{2, 7, 5, 3, 3, 2, 2, 2, 1, 1, 0},
                                               {1, 6, 6, 5, 3, 3, 1, 1, 1, 1, 0},
                                               {1, 9, 9, 2, 2, 2, 3, 3, 0, 0, 0},
                                               {3, 7, 8, 2, 2, 3, 0, 0, 1, 1, 0},
                                               {1, 7, 8, 3, 3, 2, 1, 3, 1, 0, 0}};
    static const mpt_norm_shape norms[] = {
        {1, 12, 3, 3, 0}, {5, 1, 11, 1, 0}, {2, 9, 6, 2, 0}, {3, 7, 4, 4, 0}, {2, 6, 12, 3, 0}};
    size_t i;
    for (i = 0; i + LARGE_SHAPES < CONV_SHAPES; i++) check_reference_conv2d(&conv_shapes[i]);
    check_reference_linear(3, 5, 7);
    check_reference_linear(31, 17, 13);
    check_reference_pool2d(MPT_POOL_AVERAGE, &excluding);
    for (i = 0; i < sizeof windows / sizeof *windows; i++) {
        check_reference_pool2d(MPT_POOL_MAX, &windows[i]);
        check_reference_pool2d(MPT_POOL_AVERAGE, &windows[i]);
    }
    for (i = 0; i < sizeof norms / sizeof *norms; i++) {
        check_reference_norm(&norms[i], 0);
        check_reference_norm(&norms[i], 1);
    }
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    open_all();
    RUN_TEST(test_gemms());
    RUN_TEST(test_gemm_in_place());
    RUN_TEST(test_gemm_end());
    RUN_TEST(test_linears());
    RUN_TEST(test_gemm_activations());
    RUN_TEST(test_gemm_by_hand());
    RUN_TEST(test_gemm_empty());
    RUN_TEST(test_gemm_errors());
    RUN_TEST(test_conv2ds());
    RUN_TEST(test_conv2d_limits());
    RUN_TEST(test_beside_inf());
    RUN_TEST(test_long_sums());
    RUN_TEST(test_conv2d_output());
    RUN_TEST(test_conv2d_errors());
    RUN_TEST(test_pools());
    RUN_TEST(test_pool_specials(context));
    RUN_TEST(test_pool_specials(test_plain));
    RUN_TEST(test_pool_shapes());
    RUN_TEST(test_pool_errors());
    RUN_TEST(test_huge_stride(context));
    RUN_TEST(test_huge_stride(test_plain));
    RUN_TEST(test_elementwise());
    RUN_TEST(test_elementwise_by_hand(context));
    RUN_TEST(test_elementwise_by_hand(test_plain));
    RUN_TEST(test_relu_slopes());
    RUN_TEST(test_elementwise_errors());
    RUN_TEST(test_columns());
    RUN_TEST(test_columns_by_hand(context));
    RUN_TEST(test_columns_by_hand(test_plain));
    RUN_TEST(test_columns_errors());
    RUN_TEST(test_broadcast());
    RUN_TEST(test_broadcast_sum(context));
    RUN_TEST(test_broadcast_sum(test_plain));
    RUN_TEST(test_broadcast_errors());
    RUN_TEST(test_dropouts());
    RUN_TEST(test_dropout_shares());
    RUN_TEST(test_dropout_errors());
    RUN_TEST(test_norms());
    RUN_TEST(test_norm_cancellation());
    RUN_TEST(test_norm_slopes());
    RUN_TEST(test_norm_far());
    RUN_TEST(test_norm_long());
    RUN_TEST(test_norm_specials(context));
    RUN_TEST(test_norm_specials(test_plain));
    RUN_TEST(test_norm_shape_errors());
    RUN_TEST(test_norm_errors());
    RUN_TEST(test_losses());
    RUN_TEST(test_loss_options());
    RUN_TEST(test_loss_formulas());
    RUN_TEST(test_bad_labels());
    RUN_TEST(test_all_ignored());
    RUN_TEST(test_loss_at_target());
    RUN_TEST(test_loss_nan());
    RUN_TEST(test_nan_row());
    RUN_TEST(test_loss_errors());
    RUN_TEST(test_reference());
    close_all();
    return test_finish("operations");
}
