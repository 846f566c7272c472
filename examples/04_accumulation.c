/* 04_accumulation.c - why are products of 16-bit numbers summed in 32 bits?

       cc -O2 examples/04_accumulation.c -o accumulation -lm && ./accumulation

   You will see: dot products of two fp16 vectors of k numbers between 0 and 1, with the sum rounded after each addition
   to fp16, bf16 or fp32. The fp16 sum is fine at k = 16 and stops at 2048 however long the vectors are: half of the
   gap there is 1, more than what is added. With numbers of both signs the sum stays small and the error grows slowly:
   that is what most layers add, and why fp16 sums often go unnoticed. If blocks of 32 are summed in fp32 first, as on
   some chips, the sum stops 16 times later. mpt_op_gemm sums in fp32.                                               */

#define MPT_IMPLEMENTATION
#include "../mpt.h"
#include "course.h"

enum { LONGEST = 1 << 18, SAMPLES = 16, BLOCK = 32 };

/* How the sum of a dot product is kept; 0 products a block: each is added by itself. */
typedef struct sum_kind {
    const char *name;
    mpt_dtype type;
    size_t block;
} sum_kind;

enum { FP16, BF16, FP16_BLOCKS, FP32, KINDS };
static const sum_kind kinds[KINDS] = {
    {"fp16", MPT_F16, 1}, {"bf16", MPT_BF16, 1}, {"fp16, blocks", MPT_F16, BLOCK}, {"fp32", MPT_F32, 1}};

static float rounded(float x, mpt_dtype type) {
    return mpt_widen(mpt_narrow(x, type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0), type);
}

static float dot(const sum_kind *kind, const float *a, const float *b, size_t k) {
    float sum = 0;
    for (size_t i = 0; i < k; i += kind->block) {
        float block = 0;
        for (size_t j = i; j < i + kind->block && j < k; j++) block += a[j] * b[j];
        sum = rounded(sum + block, kind->type);
    }
    return sum;
}

static double exact(const float *a, const float *b, size_t k, double *sizes) {
    double sum = *sizes = 0;
    for (size_t i = 0; i < k; i++) {
        sum += (double)a[i] * (double)b[i];
        *sizes += fabs((double)a[i] * (double)b[i]);
    }
    return sum;
}

/* fp16 numbers in low..1, others for each sample. */
static void draw(float *x, size_t n, float low, uint64_t sample, uint64_t vector) {
    for (size_t i = 0; i < n; i++) x[i] = rounded(low + (1 - low) * mpt_uniform(1, sample, vector, i), MPT_F16);
}

/* One row of the table: relative to the sum of the sizes of what is added, the root mean square error over the samples;
   the mean of the fp16 sums and of the exact ones. */
static void measure(const course *c, mpt_context *ctx, size_t k, float low, double error[KINDS + 1], double mean[2]) {
    static float a[LONGEST], b[LONGEST];
    mpt_gemm_op product = MPT_ZERO; /* (1,k) times (k,1) */
    float result;
    product.trans_b = 1;
    product.m = product.n = 1;
    product.k = k;
    product.a = mpt_f32_array(a);
    product.b = mpt_f32_array(b);
    product.c = mpt_f32_array(&result);
    memset(error, 0, (KINDS + 1) * sizeof *error);
    mean[0] = mean[1] = 0;
    for (uint64_t sample = 0; sample < SAMPLES; sample++) {
        double sizes, right;
        draw(a, k, low, sample, 0);
        draw(b, k, low, sample, 1);
        right = exact(a, b, k, &sizes);
        for (int i = 0; i < KINDS; i++) {
            const double sum = (double)dot(&kinds[i], a, b, k), e = (sum - right) / sizes;
            error[i] += e * e / (double)SAMPLES;
            if (i == FP16) {
                mean[0] += sum / (double)SAMPLES;
                mean[1] += right / (double)SAMPLES;
            }
        }
        course_need(c, mpt_op_gemm(ctx, &product) == MPT_OK, mpt_why(ctx));
        error[KINDS] += ((double)result - right) / sizes * ((double)result - right) / sizes / (double)SAMPLES;
    }
    for (int i = 0; i <= KINDS; i++) error[i] = sqrt(error[i]);
}

int main(int argc, char **argv) {
    course c = course_begin(argc, argv, "04_accumulation", NULL, 0);
    mpt_context *ctx = mpt_open(NULL);
    double error[KINDS + 1], mean[2], small_k = 0;
    course_need(&c, ctx != NULL, "no memory");
    for (int both = 0; both < 2; both++) {
        printf("%sNumbers from %d to 1; error of the dot product relative to the sum of |products|\n%8s",
               both ? "\n" : "", both ? -1 : 0, "k");
        for (int i = 0; i < KINDS; i++) printf("%14s", kinds[i].name);
        printf("%14s%12s%12s\n", "mpt_op_gemm", "fp16 sum", "right");
        course_data(&c, "# numbers from %d to 1: k, error of fp16, bf16, fp16 in blocks, fp32, mpt_op_gemm\n", -both);
        for (size_t k = 16; k <= LONGEST; k *= 4) {
            measure(&c, ctx, k, both ? -1 : 0, error, mean);
            printf("%8zu", k);
            course_data(&c, "%zu", k);
            for (int i = 0; i <= KINDS; i++) {
                printf("%14.1e", error[i]);
                course_data(&c, " %.3e", error[i]);
            }
            printf("%12.2f%12.2f\n", mean[0], mean[1]);
            course_data(&c, "\n");
            /* the bound of every order of summation: (k - 1) roundings of half of fp32's gap */
            course_claim(&c, error[FP32] <= (double)k * ldexp(1, -24), "fp32 stays within k 2^-24");
            course_claim(&c, error[KINDS] <= (double)k * ldexp(1, -24), "mpt_op_gemm stays within k 2^-24");
            if (k == 16) small_k = error[FP16];
            if (!both && k >= 16384) course_claim(&c, mean[0] == 2048, "the fp16 sum stands still");
            if (!both && k == 16384) course_claim(&c, error[FP16_BLOCKS] < error[FP16] / 10, "blocks help");
            if (k == LONGEST && !both)
                course_claim(&c, error[FP16] > 0.96 && small_k < 1e-3, "nearly all of it is lost");
            if (k == LONGEST && both) course_claim(&c, error[FP16] < 0.02, "both signs: the error stays small");
        }
        course_data(&c, "\n\n");
    }
    mpt_close(ctx);
    return course_end(&c);
}
