/* 01_half_numbers.c - which numbers are there in 16 bits?

       cc -O2 examples/01_half_numbers.c -o half_numbers -lm && ./half_numbers

   You will see: what each format spends its bits on; that fp16 ends at 65504 and bf16 counts only to 256; what
   ordinary numbers become in each; that rounding makes the order of a sum matter; and, in the figure, the gap from
   each number to the next: rounding can cost half a gap.                                                            */

#define MPT_IMPLEMENTATION
#include "../mpt.h"
#include "course.h"

enum { FORMATS = 5 };
static const mpt_dtype formats[FORMATS] = {MPT_F32, MPT_F16, MPT_BF16, MPT_E5M2, MPT_E4M3};

/* x as the format holds it, ties to even. */
static float rounded(float x, mpt_dtype type) {
    return mpt_widen(mpt_narrow(x, type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0), type);
}

/* The next larger number of the format: its bits, read as an integer, are one more. x is one of its numbers, and not
   negative. */
static float next(float x, mpt_dtype type) {
    return mpt_widen(mpt_narrow(x, type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0) + 1, type);
}

/* The number before inf; in e4m3, which has none, before NaN. */
static float largest(mpt_dtype type) {
    return mpt_widen(mpt_narrow(INFINITY, type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0) - 1, type);
}

/* 1, 2, 3, ... up to the first whole number that is not there. */
static double counts_to(mpt_dtype type) {
    double n = 1;
    while (n < 1 << 25 && (double)rounded((float)(n + 1), type) == n + 1) n++;
    return n;
}

/* The smallest number whose relative distance to its neighbour is that of 1: below it precision falls off. */
static double smallest_normal(mpt_dtype type) {
    double x = 1;
    while (x / 2 > 0 && (double)next((float)(x / 2), type) == x / 2 * (double)next(1, type)) x /= 2;
    return x;
}

static void print_formats(course *c) {
    static const double ends[FORMATS] = {3.4028234663852886e38, 65504, 3.3895313892515355e38, 57344, 448};
    static const double counts[FORMATS] = {16777216, 2048, 256, 8, 16};
    printf("%-6s%12s%16s%19s%13s%12s\n", "", "largest", "smallest normal", "smallest above 0", "gap after 1",
           "counts to");
    for (int f = 0; f < FORMATS; f++) {
        const mpt_dtype type = formats[f];
        printf("%-6s%12.5g%16.3g%19.3g%13.3g%12.0f\n", mpt_dtype_name(type), (double)largest(type),
               smallest_normal(type), (double)next(0, type), (double)next(1, type) - 1, counts_to(type));
        course_claim(c, (double)largest(type) == ends[f], "the largest numbers are those of the formats");
        course_claim(c, counts_to(type) == counts[f], "a format with p bits counts to 2^p");
    }
}

static void print_examples(course *c) {
    static const float x[] = {0.1f, 1.0009765f, 1.0004883f, 2049, 65519, 65520, 1e-5f, 6e-8f, 2.9e-8f, -1e-30f};
    printf("\n%-14s", "becomes");
    for (int f = 1; f < FORMATS; f++) printf("%14s", mpt_dtype_name(formats[f]));
    for (size_t i = 0; i < sizeof x / sizeof *x; i++) {
        printf("\n%-14.8g", (double)x[i]);
        for (int f = 1; f < FORMATS; f++) printf("%14.7g", (double)rounded(x[i], formats[f]));
    }
    puts("");
    course_claim(c, rounded(1.0004883f, MPT_F16) == 1, "1 + 2^-11 is 1 in fp16");
    course_claim(c, rounded(65519, MPT_F16) == 65504 && isinf(rounded(65520, MPT_F16)), "fp16 overflows from 65520");
    course_claim(c, rounded(2.9e-8f, MPT_F16) == 0, "fp16 flushes 2.9e-8 to zero");
    course_claim(c, rounded(2.9e-8f, MPT_BF16) > 0 && rounded(2049, MPT_BF16) == 2048, "bf16 is wide and coarse");
}

/* A sum that is rounded after each addition, as fp16 hardware without wide accumulators would. */
static float plus(float a, float b) { return rounded(a + b, MPT_F16); }

static void print_specials(course *c) {
    const float inf = rounded(70000, MPT_F16), nan = rounded(inf - inf, MPT_F16), tiny = next(0, MPT_F16);
    printf("\nIn fp16: (2048 + 1) + 1 = %g, 2048 + (1 + 1) = %g\n", (double)plus(plus(2048, 1), 1),
           (double)plus(2048, plus(1, 1)));
    printf("         70000 = %g, 70000 - 70000 = %s, NaN == NaN is %s, the smallest number / 2 = %g\n", (double)inf,
           nan != nan ? "NaN" : "a number", nan == nan ? "true" : "false", (double)rounded(tiny / 2, MPT_F16));
    course_claim(c, plus(plus(2048, 1), 1) == 2048 && plus(2048, plus(1, 1)) == 2050, "the order of a sum matters");
    course_claim(c, isinf(inf) && nan != nan, "overflow is inf, and inf - inf is NaN");
    course_claim(c, rounded(tiny / 2, MPT_F16) == 0, "half the smallest number rounds to 0");
}

/* How 63,488 finite numbers of fp16 lie on the line: half of them between -1 and 1. */
static void print_crowd(course *c) {
    int finite = 0, below_one = 0, subnormal = 0;
    for (uint32_t bits = 0; bits < 65536; bits++) {
        const double x = (double)mpt_widen(bits, MPT_F16);
        if (!(fabs(x) <= 65504)) continue;
        finite++;
        below_one += fabs(x) < 1;
        subnormal += fabs(x) < ldexp(1, -14);
    }
    printf("\nOf the %d finite numbers of fp16 %.1f %% lie between -1 and 1, %.1f %% are subnormal or 0.\n", finite,
           100.0 * below_one / finite, 100.0 * subnormal / finite);
    course_claim(c, finite == 63488 && below_one == 2 * 15 * 1024 && subnormal == 2 * 1024, "the crowd of fp16");
}

/* The figure: one block a format, number and gap to the next; and the 8-bit numbers from 0 to 2 themselves. */
static void write_gaps(const course *c) {
    for (int f = 0; f < FORMATS; f++) {
        course_data(c, "# %s: number, gap\n", mpt_dtype_name(formats[f]));
        for (int e = -30; e <= 20; e++) {
            const float x = rounded((float)ldexp(1, e), formats[f]), gap = next(x, formats[f]) - x;
            if (x < largest(formats[f])) course_data(c, "%g %g\n", ldexp(1, e), (double)gap);
        }
        course_data(c, "\n\n");
    }
}

int main(int argc, char **argv) {
    course c = course_begin(argc, argv, "01_half_numbers", NULL, 0);
    print_formats(&c);
    print_examples(&c);
    print_specials(&c);
    print_crowd(&c);
    write_gaps(&c);
    return course_end(&c);
}
