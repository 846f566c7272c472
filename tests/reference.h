/* reference.h - what the library should compute, written again in double arithmetic, as plainly as can be.

   Include it after mpt.h, whose enums and shapes it uses, and nothing else of it. */
#ifndef REFERENCE_H
#define REFERENCE_H

#include <math.h>
#include <string.h>

/* ==== NUMBERS ==== a format is its significant bits (hidden one included), its smallest normal exponent and bits */

typedef struct reference_format {
    int significant, lowest;
    uint32_t sign, largest, inf; /* inf: of e4m3 its NaN */
} reference_format;

static inline reference_format reference_format_of(mpt_dtype type) {
    static const reference_format formats[MPT_DTYPE_COUNT] = {
        {24, -126, 0x80000000u, 0x7f7fffffu, 0x7f800000u}, /* MPT_F32 */
        {11, -14, 0x8000u, 0x7bffu, 0x7c00u},              /* MPT_F16 */
        {8, -126, 0x8000u, 0x7f7fu, 0x7f80u},              /* MPT_BF16 */
        {4, -6, 0x80u, 0x7eu, 0x7fu},                      /* MPT_E4M3 */
        {3, -14, 0x80u, 0x7bu, 0x7cu},                     /* MPT_E5M2 */
    };
    return formats[type];
}

typedef enum reference_kind { REFERENCE_FINITE, REFERENCE_INF, REFERENCE_NAN } reference_kind;

static inline reference_kind reference_kind_of(uint32_t bits, mpt_dtype type) {
    const reference_format f = reference_format_of(type);
    const uint32_t magnitude = bits & (f.sign - 1);
    if (magnitude <= f.largest) return REFERENCE_FINITE;
    return magnitude == f.inf && type != MPT_E4M3 ? REFERENCE_INF : REFERENCE_NAN;
}

/* 2^e, as ldexp(1, e) but quick. */
static inline double reference_power(int e) {
    const uint64_t bits = (uint64_t)(e + 1023) << 52;
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Value of a finite pattern. */
static inline double reference_widen(uint32_t bits, mpt_dtype type) {
    const reference_format f = reference_format_of(type);
    const uint32_t hidden = (uint32_t)1 << (f.significant - 1);
    const uint32_t fraction = bits & (hidden - 1), field = (bits & (f.sign - 1)) / hidden;
    const int ulp = f.lowest - (f.significant - 1); /* exponent of the gap between subnormals */
    const double x = (field ? hidden + fraction : fraction) * reference_power(ulp + (field ? (int)field - 1 : 0));
    return bits & f.sign ? -x : x;
}

/* Pattern of a finite x >= 0: scaled until the gap between neighbours is 1, cut to a whole number, perhaps rounded up.
   The patterns of a format count its values, so the whole number and the exponent add up to the pattern. */
static inline uint32_t reference_round(double x, mpt_dtype type, mpt_round round, mpt_overflow overflow) {
    const reference_format f = reference_format_of(type);
    int exponent;
    double scaled;
    uint64_t pattern;
    if (!(x > 0)) return 0;
    frexp(x, &exponent);
    exponent = exponent - 1 < f.lowest ? f.lowest : exponent - 1; /* 2^exponent <= x where x is normal */
    scaled = x * reference_power(f.significant - 1 - exponent);
    pattern = (uint64_t)scaled;
    scaled -= (double)pattern;
    if (round == MPT_ROUND_NEAREST && (scaled > 0.5 || (scaled >= 0.5 && pattern % 2))) pattern++;
    pattern += (uint64_t)(exponent - f.lowest) << (f.significant - 1);
    if (pattern <= f.largest) return (uint32_t)pattern;
    return round == MPT_ROUND_ZERO || overflow == MPT_OVERFLOW_SATURATE ? f.largest : f.inf;
}

/* Pattern in `type` of the fp32 with these bits: all of mpt_narrow's contract but stochastic rounding. */
static inline uint32_t reference_narrow(uint32_t x, mpt_dtype type, mpt_round round, mpt_overflow overflow) {
    const reference_format f = reference_format_of(type);
    const uint32_t magnitude = x & 0x7fffffffu, sign = x & 0x80000000u ? f.sign : 0;
    switch (reference_kind_of(x, MPT_F32)) {
    case REFERENCE_NAN: /* the upper payload bits, made quiet */
        if (type == MPT_E4M3) return sign | f.inf;
        return sign | f.inf | (uint32_t)1 << (f.significant - 2) | (magnitude & 0x7fffffu) >> (24 - f.significant);
    case REFERENCE_INF: return sign | (overflow == MPT_OVERFLOW_SATURATE ? f.largest : f.inf);
    default: return sign | reference_round(reference_widen(magnitude, MPT_F32), type, round, overflow);
    }
}

/* Pattern of the fp32 that a pattern means: all of mpt_widen's contract. */
static inline uint32_t reference_widen_pattern(uint32_t bits, mpt_dtype type) {
    const reference_format f = reference_format_of(type);
    const uint32_t sign = bits & f.sign ? 0x80000000u : 0, magnitude = bits & (f.sign - 1);
    switch (reference_kind_of(bits, type)) {
    case REFERENCE_NAN:
        return sign | 0x7fc00000u | (type == MPT_E4M3 ? 0 : (magnitude ^ f.inf) << (24 - f.significant));
    case REFERENCE_INF: return sign | 0x7f800000u;
    default: return sign | reference_round(reference_widen(magnitude, type), MPT_F32, MPT_ROUND_ZERO, MPT_OVERFLOW_INF);
    }
}

/* -- Narrowing as a staircase, for billions of values: which fp32 magnitudes become which pattern -- */

enum { REFERENCE_STEPS = 0x7f82 }; /* of bf16: the patterns up to inf, and the end */

typedef struct reference_stairs {
    mpt_dtype type;
    uint32_t steps;                 /* patterns 0 .. largest, and the one above */
    uint32_t edge[REFERENCE_STEPS]; /* smallest magnitude on each step, as a pattern; after the last: smallest NaN */
} reference_stairs;

/* Where rounding to nearest changes lies half-way between neighbours, on the side of the even one. */
static inline void reference_build_stairs(reference_stairs *s, mpt_dtype type, mpt_round round) {
    const uint32_t largest = reference_format_of(type).largest;
    uint32_t y;
    s->type = type;
    s->steps = largest + 2;
    s->edge[0] = 0;
    for (y = 1; y <= largest + 1; y++) {
        const double below = reference_widen(y - 1, type);
        const double here = y <= largest ? reference_widen(y, type) : 2 * below - reference_widen(y - 2, type);
        const double edge = round == MPT_ROUND_NEAREST ? (below + here) / 2 : here;
        s->edge[y] = reference_round(edge, MPT_F32, MPT_ROUND_ZERO, MPT_OVERFLOW_INF);
        if (round == MPT_ROUND_NEAREST) s->edge[y] += y % 2;
    }
    if (round == MPT_ROUND_ZERO) s->edge[largest + 1] = 0x7f800000u; /* only inf itself overflows */
    s->edge[s->steps] = 0x7f800001u;
}

/* The step of a magnitude that is no NaN; quick if `guess`, any step, is near. */
static inline uint32_t reference_step(const reference_stairs *s, uint32_t magnitude, uint32_t guess) {
    while (magnitude < s->edge[guess]) guess--;
    while (magnitude >= s->edge[guess + 1]) guess++;
    return guess;
}

/* The pattern that a step stands for. */
static inline uint32_t reference_step_pattern(const reference_stairs *s, uint32_t step, mpt_overflow overflow) {
    const reference_format f = reference_format_of(s->type);
    if (step <= f.largest) return step;
    return overflow == MPT_OVERFLOW_SATURATE ? f.largest : f.inf;
}

/* ==== OPERATIONS ==== all arrays dense, NHWC, in double */

/* Adds the products of a convolution to the array that `pass` writes: y, x or w. A linear layer is the 1x1 case with
   H = W = 1. With absolute values for inputs this gives the magnitudes of error bounds, with ones the term counts. */
static inline void reference_conv2d(mpt_pass pass, const mpt_conv2d_shape *s, size_t P, size_t Q, double *x, double *w,
                                    double *y) {
    const size_t stride = s->stride ? s->stride : 1, dilation = s->dilation ? s->dilation : 1;
    const size_t groups = s->groups ? s->groups : 1, width = s->C / groups, filters = s->K / groups;
    size_t n, p, q, k, r, c, t;
    for (n = 0; n < s->N; n++)
        for (p = 0; p < P; p++)
            for (q = 0; q < Q; q++)
                for (r = 0; r < s->R; r++)
                    for (t = 0; t < s->S; t++) {
                        const size_t h = p * stride + r * dilation, v = q * stride + t * dilation;
                        if (h < s->padding || h - s->padding >= s->H || v < s->padding || v - s->padding >= s->W)
                            continue;
                        for (k = 0; k < s->K; k++) {
                            double *xi = x + ((n * s->H + h - s->padding) * s->W + v - s->padding) * s->C;
                            double *wi = w + ((k * s->R + r) * s->S + t) * width;
                            double *yi = y + ((n * P + p) * Q + q) * s->K + k;
                            xi += k / filters * width;
                            for (c = 0; c < width; c++) {
                                if (pass == MPT_FORWARD) *yi += xi[c] * wi[c];
                                else if (pass == MPT_BACKWARD_DATA) xi[c] += *yi * wi[c];
                                else wi[c] += *yi * xi[c];
                            }
                        }
                    }
}

/* Calls `visit` for every input element in every window, first window and first element first. */
typedef void (*reference_visit)(void *user, size_t in, size_t out, size_t place);

static inline void reference_windows(const mpt_pool2d_shape *s, size_t P, size_t Q, reference_visit visit, void *user) {
    const size_t down = s->stride ? s->stride : s->R, across = s->stride ? s->stride : s->S;
    size_t n, p, q, r, t, c;
    for (n = 0; n < s->N; n++)
        for (p = 0; p < P; p++)
            for (q = 0; q < Q; q++)
                for (c = 0; c < s->C; c++)
                    for (r = 0; r < s->R; r++)
                        for (t = 0; t < s->S; t++) {
                            const size_t h = p * down + r, w = q * across + t;
                            if (h < s->padding || h - s->padding >= s->H || w < s->padding || w - s->padding >= s->W)
                                continue;
                            visit(user, ((n * s->H + h - s->padding) * s->W + w - s->padding) * s->C + c,
                                  ((n * P + p) * Q + q) * s->C + c, r * s->S + t);
                        }
}

typedef struct reference_pooling {
    mpt_pool_kind kind;
    double *x, *y;
    long *place; /* of the largest in its window; -1 before the first. Max only */
    double area; /* of the window */
} reference_pooling;

static inline void reference_pool_visit(void *user, size_t in, size_t out, size_t place) {
    reference_pooling *pool = (reference_pooling *)user;
    const double x = pool->x[in];
    if (pool->kind == MPT_POOL_AVERAGE) pool->y[out] += x / pool->area;
    else if (pool->place[out] < 0 || x > pool->y[out]) {
        pool->y[out] = x;
        pool->place[out] = (long)place;
    }
}

/* y, and of max pooling the place r * S + s of the first largest. NaN is the caller's. */
static inline void reference_pool2d(mpt_pool_kind kind, const mpt_pool2d_shape *s, size_t P, size_t Q, double *x, double *y,
                                    long *place) {
    reference_pooling pool;
    size_t i;
    pool.kind = kind, pool.x = x, pool.y = y, pool.place = place, pool.area = (double)(s->R * s->S);
    for (i = 0; i < s->N * P * Q * s->C; i++) {
        y[i] = 0;
        if (place) place[i] = -1;
    }
    reference_windows(s, P, Q, reference_pool_visit, &pool);
}

/* -- Normalisations -- */

/* Values that a statistic is taken over. */
static inline double reference_norm_count(const mpt_norm_shape *s) { return (double)(s->pixels * (s->C / s->groups)); }

/* Which statistic of stats(N groups) the element i of x(N,pixels,C) belongs to. */
static inline size_t reference_norm_group(const mpt_norm_shape *s, size_t i) {
    return i / (s->pixels * s->C) * s->groups + i % s->C / (s->C / s->groups);
}

/* Means over the groups of an array. */
static inline void reference_norm_means(const mpt_norm_shape *s, const double *x, double *means) {
    size_t i;
    memset(means, 0, s->N * s->groups * sizeof *means);
    for (i = 0; i < s->N * s->pixels * s->C; i++) means[reference_norm_group(s, i)] += x[i] / reference_norm_count(s);
}

/* stats(2, N groups): means and variances. */
static inline void reference_norm_stats(const mpt_norm_shape *s, const double *x, double *stats) {
    double *variance = stats + s->N * s->groups;
    size_t i;
    reference_norm_means(s, x, stats);
    memset(variance, 0, s->N * s->groups * sizeof *variance);
    for (i = 0; i < s->N * s->pixels * s->C; i++) {
        const size_t g = reference_norm_group(s, i);
        variance[g] += (x[i] - stats[g]) * (x[i] - stats[g]) / reference_norm_count(s);
    }
}

/* 1 / sqrt(variance + eps) of group g. */
static inline double reference_norm_inverse(const mpt_norm_shape *s, const double *stats, size_t g) {
    return 1 / sqrt(stats[s->N * s->groups + g] + (s->eps > 0 ? (double)s->eps : 1e-5));
}

static inline void reference_norm(const mpt_norm_shape *s, const double *x, const double *stats, const double *gamma,
                                  const double *beta, double *y) {
    size_t i;
    for (i = 0; i < s->N * s->pixels * s->C; i++) {
        const size_t g = reference_norm_group(s, i);
        y[i] = (x[i] - stats[g]) * reference_norm_inverse(s, stats, g) * gamma[i % s->C] + beta[i % s->C];
    }
}

/* Adds to dgamma(C) and dbeta(C) what dy makes of them. */
static inline void reference_norm_parameters(const mpt_norm_shape *s, const double *x, const double *stats,
                                             const double *dy, double *dgamma, double *dbeta) {
    size_t i;
    for (i = 0; i < s->N * s->pixels * s->C; i++) {
        const size_t g = reference_norm_group(s, i);
        dgamma[i % s->C] += dy[i] * (x[i] - stats[g]) * reference_norm_inverse(s, stats, g);
        dbeta[i % s->C] += dy[i];
    }
}

/* Adds to dx what dy makes of it; stats are constants. */
static inline void reference_norm_frozen(const mpt_norm_shape *s, const double *stats, const double *gamma,
                                         const double *dy, double *dx) {
    size_t i;
    for (i = 0; i < s->N * s->pixels * s->C; i++)
        dx[i] += dy[i] * gamma[i % s->C] * reference_norm_inverse(s, stats, reference_norm_group(s, i));
}

/* The same where stats are those of x. With n the normalised x and g = dy gamma, whose means over a group are m1 of g
   and m2 of g n: dx = (g - m1 - n m2) / deviation. scratch: 2 (N pixels C) + 2 (N groups) numbers. */
static inline void reference_norm_backward(const mpt_norm_shape *s, const double *x, const double *stats,
                                           const double *gamma, const double *dy, double *dx, double *scratch) {
    const size_t count = s->N * s->pixels * s->C;
    double *slope = scratch, *product = slope + count, *m1 = product + count, *m2 = m1 + s->N * s->groups;
    size_t i;
    for (i = 0; i < count; i++) {
        const size_t g = reference_norm_group(s, i);
        slope[i] = dy[i] * gamma[i % s->C];
        product[i] = slope[i] * (x[i] - stats[g]) * reference_norm_inverse(s, stats, g);
    }
    reference_norm_means(s, slope, m1);
    reference_norm_means(s, product, m2);
    for (i = 0; i < count; i++) {
        const size_t g = reference_norm_group(s, i);
        const double inverse = reference_norm_inverse(s, stats, g);
        dx[i] += (slope[i] - m1[g] - (x[i] - stats[g]) * inverse * m2[g]) * inverse;
    }
}

/* New running(2, N groups) statistics. */
static inline void reference_norm_running(const mpt_norm_shape *s, double momentum, const double *stats,
                                          double *running) {
    const size_t groups = s->N * s->groups;
    const double count = reference_norm_count(s);
    size_t g;
    for (g = 0; g < 2 * groups; g++)
        running[g] = (1 - momentum) * running[g] + momentum * stats[g] * (g < groups ? 1 : count / (count - 1));
}

/* -- Dropout and losses -- */

/* What the element with this hash is multiplied by. */
static inline double reference_dropout(double p, uint32_t hash) {
    return (double)hash < p * 4294967296.0 ? 0 : 1 / (1 - p);
}

/* Weight of class j in the target of a row. weights(C); NULL: all 1. */
static inline double reference_target(size_t C, size_t label, double smoothing, const double *weights, size_t j) {
    const double t = (j == label ? 1 - smoothing : 0) + smoothing / (double)C;
    return weights ? weights[j] * t : t;
}

/* log(sum of exp x) - largest x */
static inline double reference_log_sum(const double *x, size_t C, double *largest) {
    double sum = 0;
    size_t j;
    *largest = x[0];
    for (j = 1; j < C; j++) *largest = x[j] > *largest ? x[j] : *largest;
    for (j = 0; j < C; j++) sum += exp(x[j] - *largest);
    return log(sum);
}

/* Loss of one row of logits. */
static inline double reference_cross_entropy(const double *x, size_t C, size_t label, double smoothing,
                                             const double *weights) {
    double largest, loss = 0;
    const double log_sum = reference_log_sum(x, C, &largest);
    size_t j;
    for (j = 0; j < C; j++) loss += reference_target(C, label, smoothing, weights, j) * (log_sum - (x[j] - largest));
    return loss;
}

/* Its slope at x[j]. */
static inline double reference_cross_entropy_slope(const double *x, size_t C, size_t label, double smoothing,
                                                   const double *weights, size_t j) {
    double largest, total = 0;
    const double log_sum = reference_log_sum(x, C, &largest);
    size_t i;
    for (i = 0; i < C; i++) total += reference_target(C, label, smoothing, weights, i);
    return total * exp(x[j] - largest - log_sum) - reference_target(C, label, smoothing, weights, j);
}

/* One element of the other losses. */
static inline double reference_loss(mpt_loss_kind kind, double x, double t) {
    const double d = fabs(x - t);
    if (kind == MPT_LOSS_BCE_WITH_LOGITS) return (x > 0 ? x : 0) - x * t + log(1 + exp(-fabs(x)));
    if (kind == MPT_LOSS_ABSOLUTE_ERROR) return d;
    if (kind == MPT_LOSS_HUBER) return d <= 1 ? d * d / 2 : d - 0.5;
    return d * d;
}

static inline double reference_loss_slope(mpt_loss_kind kind, double x, double t) {
    const double d = x - t, sign = d > 0 ? 1 : d < 0 ? -1 : 0;
    if (kind == MPT_LOSS_BCE_WITH_LOGITS) return 1 / (1 + exp(-x)) - t;
    if (kind == MPT_LOSS_ABSOLUTE_ERROR) return sign;
    if (kind == MPT_LOSS_HUBER) return fabs(d) <= 1 ? d : sign;
    return 2 * d;
}

/* Loss of a row: the mean over its elements. */
static inline double reference_row_loss(mpt_loss_kind kind, const double *x, const double *target, size_t C) {
    double sum = 0;
    size_t j;
    for (j = 0; j < C; j++) sum += reference_loss(kind, x[j], target[j]);
    return sum / (double)C;
}

/* Central difference of f at *variable. */
static inline double reference_slope(double (*f)(void *user), void *user, double *variable, double h) {
    const double keep = *variable;
    double above, below;
    *variable = keep + h;
    above = f(user);
    *variable = keep - h;
    below = f(user);
    *variable = keep;
    return (above - below) / (2 * h);
}

#endif
