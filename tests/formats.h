/* formats.h - what casts should give: the formats of numbers, and rounding to them in double arithmetic, as plainly as
   can be. Operations have their plain loops in mpt.h itself, see operation.h.

   Include it after mpt.h, whose enums it uses, and nothing else of it. */
#ifndef FORMATS_H
#define FORMATS_H

#include <math.h>
#include <string.h>

/* A format is its significant bits (hidden one included), its smallest normal exponent and bits */

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

#endif
