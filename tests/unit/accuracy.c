/* accuracy.c - a bar beside parity: element rules over the whole range of fp32, and reductions of a million values and
   of values far from 0, against double. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"

static mpt_context *context;

#ifdef MPT_TEST_RUNNER /* which takes a microsecond for each instruction of each thread */
enum { MANY = 40000 };
#else
enum { MANY = 1000000 };
#endif

static float *upload(const float *host, size_t n) {
    float *p = (float *)mpt_alloc(context, n * sizeof *host);
    CHECK_OK(context, mpt_upload(context, p, host, n * sizeof *host));
    return p;
}

/* ==== ELEMENTS ==== */

static double logistic(double x) { return x < 0 ? exp(x) / (1 + exp(x)) : 1 / (1 + exp(-x)); }

/* y, dy/dx, and what each may be off by beyond 8 roundings of its own size: formulas that cancel near 0, or where GELU
   bends, lose units of what they add up. */
static double activation(mpt_activation act, double x, double *slope, double *loss_y, double *loss_slope) {
    const double u = 8 * test_unit(MPT_F32), s = logistic(x), arg = 0.7978845608028654 * (x + 0.044715 * x * x * x);
    const double bends = fabs(x) < 16 ? u * (1 + fabs(x)) : 0;
    *loss_y = *loss_slope = 0;
    switch (act) {
    case MPT_RELU: *slope = x > 0; return x > 0 ? x : 0;
    case MPT_LEAKY_RELU: *slope = x > 0 ? 1 : 0.01; return x > 0 ? x : 0.01 * x;
    case MPT_TANH:
        *slope = 1 - tanh(x) * tanh(x); /* told from y: 1 - y y */
        *loss_slope = u;
        return tanh(x);
    case MPT_SIGMOID:
        *slope = s * logistic(-x);
        *loss_slope = u * s; /* s (1 - s) */
        return s;
    case MPT_GELU:
        *loss_y = *loss_slope = bends;
        *slope = 0.5 * erfc(-x * 0.7071067811865476) + 0.3989422804014327 * x * exp(-0.5 * x * x);
        return 0.5 * x * erfc(-x * 0.7071067811865476);
    case MPT_GELU_TANH:
        *loss_y = bends, *loss_slope = bends * 16;
        *slope = 0.5 * (1 + tanh(arg));
        if (fabs(x) < 16)
            *slope += 0.5 * x * (1 - tanh(arg) * tanh(arg)) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x);
        return 0.5 * x * (1 + tanh(arg));
    case MPT_SILU:
        *slope = fabs(x) < 1000 ? s * (1 + x * logistic(-x)) : s;
        *loss_slope = fabs(x) < 1000 ? u * s * (1 + fabs(x) * logistic(-x)) : 0;
        if (fabs(x) < 1000) *loss_y = fabs(x) * test_tiny(MPT_F32); /* -Ofast flushes s */
        *loss_slope += *loss_y;
        return x * s;
    default: *slope = 1; return x;
    }
}

/* Ordinary inputs, large ones, and those whose square or cube fp32 does not hold; 40 of each, so that vectors of any
   width have them. */
static void test_activations(void) {
    static const double sizes[] = {0,    1e-30, 1e-3, 0.5, 1,    1.278, 3,    5,    5.7,  8,    20,    60,
                                   87.5, 89,    104,  1e3, 1e10, 5e18,  5e19, 1e20, 1e30, 3e38, 3.4e38};
    enum { EACH = 40, SIZES = sizeof sizes / sizeof *sizes, N = 2 * SIZES * EACH };
    static float x[N], y[N], dx[N], ones[N];
    const float *x_device, *ones_device;
    float *y_device, *dx_device;
    int act;
    size_t i;
    for (i = 0; i < N; i++) {
        x[i] = (float)(i / EACH % 2 ? -sizes[i / EACH / 2] : sizes[i / EACH / 2]);
        ones[i] = 1;
    }
    x_device = upload(x, N), ones_device = upload(ones, N), y_device = upload(y, N), dx_device = upload(dx, N);
    for (act = MPT_IDENTITY; act < MPT_ACTIVATION_COUNT; act++) {
        const mpt_activation kind = (mpt_activation)act;
        mpt_map_op op = MPT_ZERO;
        op.map = MPT_MAP_ACTIVATION;
        op.act = kind;
        op.n = N;
        op.a = mpt_f32_array(x_device);
        op.out = mpt_f32_array(y_device);
        CHECK_OK(context, mpt_op_map(context, &op));
        op.map = MPT_MAP_ACTIVATION_GRADIENT;
        op.a = mpt_f32_array(kind >= MPT_GELU ? x_device : y_device);
        op.b = mpt_f32_array(ones_device);
        op.out = mpt_f32_array(dx_device);
        CHECK_OK(context, mpt_op_map(context, &op));
        CHECK_OK(context, mpt_download(context, y, y_device, sizeof y));
        CHECK_OK(context, mpt_download(context, dx, dx_device, sizeof dx));
        for (i = 0; i < N; i++) {
            double slope, loss_y, loss_slope;
            const double u = 8 * test_unit(MPT_F32), tiny = 4 * test_tiny(MPT_F32);
            const double value = activation(kind, (double)x[i], &slope, &loss_y, &loss_slope);
            const int ok = CHECK_NEAR(y[i], value, u * fabs(value) + loss_y + tiny) +
                           CHECK_NEAR(dx[i], slope, u * fabs(slope) + loss_slope + tiny);
            if (ok < 2) printf("    activation %d of %g\n", act, (double)x[i]);
        }
    }
    mpt_free(context, mpt_f32_array(x_device).data), mpt_free(context, mpt_f32_array(ones_device).data);
    mpt_free(context, y_device), mpt_free(context, dx_device);
}

/* The loss of one row of x(C). */
static mpt_loss_op loss_of(mpt_loss_kind kind, size_t C, const float *x, const void *target, mpt_loss_sum *sum) {
    mpt_loss_op op = MPT_ZERO;
    op.kind = kind;
    op.N = 1;
    op.C = C;
    op.x = mpt_f32_array(x);
    op.target = target;
    op.sum = sum;
    return op;
}

/* The slope of a sure and right answer is tiny, not 0: what a loss scale is for. 4 roundings and expf's 2 ulp. */
static void test_bce_slopes(void) {
    static const float logits[] = {0, 1e-6f, 0.5f, 3, 17, 20, 40, 60, 200};
    static const float scales[] = {1, 65536};
    mpt_loss_sum *sum = (mpt_loss_sum *)mpt_alloc(context, sizeof *sum);
    size_t i;
    int side;
    for (i = 0; i < 4 * sizeof logits / sizeof *logits; i++)
        for (side = 0; side < 2; side++) {
            const float x = i % 2 ? -logits[i / 4] : logits[i / 4], t = i / 2 % 2 ? 1.0f : 0.0f;
            const double slope = t > 0 ? -logistic(-(double)x) : logistic((double)x), scale = (double)scales[side];
            float *x_device = upload(&x, 1), *t_device = upload(&t, 1), *scale_device = upload(&scales[side], 1), dx;
            mpt_loss_op op = loss_of(MPT_LOSS_BCE_WITH_LOGITS, 1, x_device, t_device, sum);
            op.dx = op.x;
            op.loss_scale = scale_device;
            CHECK_OK(context, mpt_op_loss(context, &op));
            CHECK_OK(context, mpt_download(context, &dx, x_device, sizeof dx));
            CHECK_NEAR(dx, slope * scale, 8 * test_unit(MPT_F32) * fabs(slope) * scale + test_tiny(MPT_F32));
            mpt_free(context, x_device), mpt_free(context, t_device), mpt_free(context, scale_device);
        }
    mpt_free(context, sum);
}

/* ==== LONG SUMS ==== */

static double element(mpt_loss_kind kind, double x, double t) {
    const double d = x - t, size = fabs(d);
    switch (kind) {
    case MPT_LOSS_BCE_WITH_LOGITS: return (x > 0 ? x : 0) - x * t + log1p(exp(-fabs(x)));
    case MPT_LOSS_ABSOLUTE_ERROR: return size;
    case MPT_LOSS_HUBER: return size <= 1 ? 0.5 * d * d : size - 0.5;
    default: return d * d;
    }
}

/* The mean of a million equal and of a million random losses. An element passes 4 roundings and functions of 2 ulp;
   their sum, in double, next to none. */
static void test_losses(void) {
    float *x = (float *)test_memory(MANY * sizeof *x), *t = (float *)test_memory(MANY * sizeof *t);
    mpt_loss_sum *device = (mpt_loss_sum *)mpt_alloc(context, sizeof *device);
    int kind, equal;
    for (kind = MPT_LOSS_SQUARED_ERROR; kind < MPT_LOSS_GRADIENT; kind++)
        for (equal = 0; equal < 2; equal++) {
            mpt_loss_sum sum = MPT_ZERO;
            mpt_loss_op op;
            float *x_device, *t_device;
            double exact = 0;
            size_t i;
            test_floats(x, MANY, -2, 2, 1);
            test_floats(t, MANY, 0, 1, 2);
            for (i = 0; i < MANY && equal; i++) x[i] = 0.1f, t[i] = 0;
            for (i = 0; i < MANY; i++) exact += element((mpt_loss_kind)kind, (double)x[i], (double)t[i]) / (double)MANY;
            x_device = upload(x, MANY), t_device = upload(t, MANY);
            CHECK_OK(context, mpt_upload(context, device, &sum, sizeof sum));
            op = loss_of((mpt_loss_kind)kind, MANY, x_device, t_device, device);
            CHECK_OK(context, mpt_op_loss(context, &op));
            CHECK_OK(context, mpt_download(context, &sum, device, sizeof sum));
            CHECK_NEAR(sum.loss, exact, 8 * test_unit(MPT_F32) * exact);
            mpt_free(context, x_device), mpt_free(context, t_device);
        }
    mpt_free(context, device);
    free(x), free(t);
}

/* A million classes. Each exponential has relative error (|d| + 4) u with d = x - max >= -2, and so has their sum, all
   of whose terms are positive; its logarithm, 14, twice that as its absolute error. A slope passes a few more. */
static void test_classes(void) {
    const double u = test_unit(MPT_F32);
    const int32_t label = MANY / 3;
    float *x = (float *)test_memory(MANY * sizeof *x), *x_device;
    int32_t *label_device = (int32_t *)mpt_alloc(context, sizeof label);
    mpt_loss_sum *device = (mpt_loss_sum *)mpt_alloc(context, sizeof *device), sum = MPT_ZERO;
    mpt_loss_op op;
    double total = 0, exact;
    size_t i;
    test_floats(x, MANY, -1, 1, 3);
    for (i = 0; i < MANY; i++) total += exp((double)x[i]);
    exact = log(total) - (double)x[label];
    x_device = upload(x, MANY);
    CHECK_OK(context, mpt_upload(context, label_device, &label, sizeof label));
    op = loss_of(MPT_LOSS_CROSS_ENTROPY, MANY, x_device, label_device, device);
    op.dx = op.x;
    CHECK_OK(context, mpt_op_loss(context, &op));
    CHECK_OK(context, mpt_download(context, &sum, device, sizeof sum));
    CHECK_NEAR(sum.loss, exact, 6 * u + 2 * u * exact);
    {
        float *dx = (float *)test_memory(MANY * sizeof *dx);
        size_t wrong = 0;
        CHECK_OK(context, mpt_download(context, dx, x_device, MANY * sizeof *dx));
        for (i = 0; i < MANY; i++) {
            const double slope = exp((double)x[i]) / total - (i == (size_t)label ? 1 : 0);
            wrong += !test_near((double)dx[i], slope, 24 * u * fabs(slope));
        }
        CHECK_EQUAL(wrong, 0);
        free(dx);
    }
    mpt_free(context, x_device), mpt_free(context, label_device), mpt_free(context, device);
    free(x);
}

/* ==== NORMS AND POOLS ==== */

typedef struct norm_case { /* x = mean + deviation * (a number in -1..1), rounded to fp32 */
    size_t N, pixels, C, groups;
    double mean, deviation;
} norm_case;

/* Statistics to 4 roundings of fp32, as sums in double of differences lose nothing else; y from them: x - mean is exact
   but for the mean's rounding, then 4 more. */
static void test_norm(const norm_case *c) {
    const size_t n = c->N * c->pixels * c->C, sets = c->N * c->groups, each = c->C / c->groups;
    const double count = (double)(c->pixels * each), u = test_unit(MPT_F32);
    float *x = (float *)test_memory(n * sizeof *x), *y = (float *)test_memory(n * sizeof *y);
    float *ones = (float *)test_memory(c->C * sizeof *ones), *zeros = (float *)test_memory(c->C * sizeof *zeros);
    float *stats = (float *)test_memory(4 * sets * sizeof *stats);
    float *x_device, *y_device, *ones_device, *zeros_device, *stats_device;
    mpt_norm_op op = MPT_ZERO;
    size_t i, set;
    op.shape.N = c->N;
    op.shape.pixels = c->pixels;
    op.shape.C = c->C;
    op.shape.groups = c->groups;
    for (i = 0; i < c->C; i++) ones[i] = 1;
    for (i = 0; i < n; i++) x[i] = (float)(c->mean + c->deviation * test_uniform(-1, 1, 5, i));
    x_device = upload(x, n), y_device = upload(x, n), stats_device = upload(stats, 4 * sets);
    ones_device = upload(ones, c->C), zeros_device = upload(zeros, c->C);
    op.x = mpt_f32_array(x_device);
    op.stats = stats_device;
    CHECK_OK(context, mpt_op_norm(context, &op));
    op.pass = MPT_NORM_FORWARD;
    op.gamma = mpt_f32_array(ones_device);
    op.beta = mpt_f32_array(zeros_device);
    op.y = mpt_f32_array(y_device);
    CHECK_OK(context, mpt_op_norm(context, &op));
    CHECK_OK(context, mpt_download(context, stats, stats_device, 4 * sets * sizeof *stats));
    CHECK_OK(context, mpt_download(context, y, y_device, n * sizeof *y));
    for (set = 0; set < sets; set++) {
        double mean = 0, variance = 0, inverse;
        size_t p, e, wrong = 0;
#define AT(p, e) ((set / c->groups * c->pixels + (p)) * c->C + set % c->groups * each + (e))
        for (p = 0; p < c->pixels; p++)
            for (e = 0; e < each; e++) mean += (double)x[AT(p, e)] - c->mean;
        mean = c->mean + mean / count;
        for (p = 0; p < c->pixels; p++)
            for (e = 0; e < each; e++) variance += ((double)x[AT(p, e)] - mean) * ((double)x[AT(p, e)] - mean) / count;
        inverse = 1 / sqrt(variance + 1e-5);
        CHECK_NEAR(stats[set], mean, 2 * u * fabs(mean));
        CHECK_NEAR(stats[sets + set], variance, 4 * u * variance);
        for (p = 0; p < c->pixels; p++)
            for (e = 0; e < each; e++) {
                const double value = ((double)x[AT(p, e)] - mean) * inverse;
                wrong += !test_near((double)y[AT(p, e)], value, u * (2 * fabs(mean) * inverse + 12 * fabs(value)));
            }
        if (!CHECK_EQUAL(wrong, 0)) printf("    mean %g, deviation %g\n", c->mean, c->deviation);
#undef AT
    }
    mpt_free(context, x_device), mpt_free(context, y_device), mpt_free(context, stats_device);
    mpt_free(context, ones_device), mpt_free(context, zeros_device);
    free(x), free(y), free(ones), free(zeros), free(stats);
}

/* Few rows and many, few sets and many, thin and wide ones; around 0, far from it, and constant. */
static void test_norms(void) {
    static const norm_case shapes[] = {{1, MANY / 8, 3, 3, 0, 1}, /* batch norm */
                                       {1, 777, 40, 40, 0, 1},    /* of more channels than fit a run */
                                       {1, 9, 5000, 5000, 0, 1},  /* and than fit a block of columns */
                                       {300, 1, 64, 1, 0, 1},     /* layer norm */
                                       {2, 1, MANY / 8, 1, 0, 1}, /* of one long row */
                                       {3, 49, 24, 4, 0, 1},      /* group norm */
                                       {300, 25, 16, 2, 0, 1}};
    static const double means[] = {0, 1e4, -4e4, 1e6}, deviations[] = {1, 1, 1.5, 0};
    size_t i, j;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (j = 0; j < sizeof means / sizeof *means; j++) {
            norm_case c = shapes[i];
            c.mean = means[j], c.deviation = deviations[j];
            test_norm(&c);
        }
}

/* The average of a large image of equal values is that value, of others their mean to 4 roundings. */
static void test_averages(void) {
    enum { SIDE = MANY > 100000 ? 1000 : 200, C = 2 };
    const size_t n = (size_t)SIDE * SIDE * C;
    float *x = (float *)test_memory(n * sizeof *x), *x_device, *y_device, y[C];
    mpt_pool2d_op op = MPT_ZERO;
    double mean = 0;
    size_t i;
    for (i = 0; i < n; i++) x[i] = i % C ? 0.1f : (float)test_uniform(0, 1, 6, i);
    for (i = 0; i < n; i += C) mean += (double)x[i] / (double)(n / C);
    op.kind = MPT_POOL_AVERAGE;
    op.shape.N = 1;
    op.shape.H = op.shape.W = op.shape.R = op.shape.S = SIDE;
    op.shape.C = C;
    x_device = upload(x, n), y_device = upload(x, C);
    op.x = mpt_f32_array(x_device);
    op.y = mpt_f32_array(y_device);
    CHECK_OK(context, mpt_op_pool2d(context, &op));
    CHECK_OK(context, mpt_download(context, y, y_device, sizeof y));
    CHECK_NEAR(y[0], mean, 4 * test_unit(MPT_F32) * mean);
    CHECK_NEAR(y[1], (double)0.1f, 4 * test_unit(MPT_F32) * 0.1);
    mpt_free(context, x_device), mpt_free(context, y_device);
    free(x);
}

static void test_all(void) {
    test_norms();
    test_averages();
    test_activations();
    test_bce_slopes();
    test_losses();
    test_classes();
}

int main(int argc, char **argv) {
    int isa;
    test_begin(argc, argv);
    for (isa = MPT_ISA_PLAIN; isa < MPT_ISA_COUNT; isa++) {
        context = test_open_isa((mpt_isa)isa, 2);
        if (context) RUN_TEST(test_all());
        mpt_close(context);
    }
    return test_finish("accuracy");
}
