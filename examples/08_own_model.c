/* 08_own_model.c - how do you train in fp16 when the model is your own?

       cc -O2 examples/08_own_model.c -o own_model -lm && ./own_model

   A softmax regression on the digits, with its forward and backward pass written out over arrays of mpt_f16; mpt.h
   provides the number type, the parameter block, the optimizer and the loss scaler. You will see: the scale starts far
   too large, so the first gradients overflow; each time the step is skipped and the scale halved, until they fit. Then
   the loss falls, now and then a larger scale is tried, and about 95 % of the test digits are right.                */

#define MPT_IMPLEMENTATION
#include "../mpt.h"
#include "course.h"

enum { BATCH = 32, EPOCHS = 20, BATCHES = TRAINING / BATCH };

static mpt_f16 images[DIGITS][PIXELS];

/* p = softmax(w x + b): products of 16-bit numbers, sums in fp32. Returns the likeliest class. */
static int forward(const mpt_f16 *w, const mpt_f16 *b, const mpt_f16 *x, float *p) {
    int best = 0;
    float sum = 0;
    for (int k = 0; k < CLASSES; k++) {
        p[k] = mpt_f32_from_f16(b[k]);
        for (int i = 0; i < PIXELS; i++) p[k] += mpt_f32_from_f16(w[k * PIXELS + i]) * mpt_f32_from_f16(x[i]);
        if (p[k] > p[best]) best = k;
    }
    const float largest = p[best]; /* exp of what is left is at most 1 and cannot overflow */
    for (int k = 0; k < CLASSES; k++) sum += p[k] = expf(p[k] - largest);
    for (int k = 0; k < CLASSES; k++) p[k] /= sum;
    return best;
}

/* Adds the gradient of -log p[label], times `factor`. It passes through fp16, as in a deeper net it would from layer to
   layer: without the loss scale in `factor` its small values vanish there, with too large a scale it becomes inf. */
static void backward(const mpt_f16 *x, const float *p, int label, float factor, float *dw, float *db) {
    for (int k = 0; k < CLASSES; k++) {
        const mpt_f16 half = mpt_f16_from_f32((p[k] - (k == label ? 1.0f : 0.0f)) * factor);
        const float d = mpt_f32_from_f16(half);
        for (int i = 0; i < PIXELS; i++) dw[k * PIXELS + i] += d * mpt_f32_from_f16(x[i]);
        db[k] += d;
    }
}

int main(int argc, char **argv) {
    course c = course_begin(argc, argv, "08_own_model", "scale", 0);
    mpt_context *ctx = mpt_open(NULL);
    const mpt_optimizer_desc adam = mpt_adam(0.01);
    mpt_params_desc half = MPT_ZERO;
    mpt_scaler_desc scale = MPT_ZERO;
    mpt_optimizer_state state;
    float p[CLASSES];
    double accuracy = 0, loss = 0;
    course_need(&c, ctx != NULL, "no memory");
    course_digits *d = course_digits_read(&c);
    mpt_cast(ctx, DIGITS * PIXELS, mpt_f32_array(d->x[0]), mpt_f16_array(images[0]), NULL);
    half.type = MPT_F16;         /* fp16 copies for the products; fp32 masters, which is the default */
    scale.init_scale = 16777216; /* 2^24, to see it overflow; the default is 2^16 */
    scale.growth_interval = 200; /* tries twice the scale after so many good steps; the default is 2000 */
    if (c.exercise) {            /* --scale 1: none; --scale 1024: always that one */
        course_need(&c, c.number >= 1, "--scale is at least 1");
        scale.mode = MPT_SCALER_STATIC;
        scale.init_scale = (float)c.number;
    }

    mpt_params *params = mpt_params_new(ctx, &half);
    const int weight = mpt_params_add(params, "weight", CLASSES * PIXELS, MPT_GROUP_WEIGHT);
    const int bias = mpt_params_add(params, "bias", CLASSES, MPT_GROUP_BIAS); /* both begin as zeros: fine here */
    course_need(&c, mpt_params_build(params) == MPT_OK, mpt_why(ctx));
    mpt_scaler *scaler = mpt_scaler_new(ctx, &scale);
    mpt_optimizer *opt = mpt_optimizer_new(params, scaler, &adam);
    course_need(&c, opt != NULL, mpt_why(ctx));
    const mpt_f16 *w = (const mpt_f16 *)mpt_params_weight(params, weight).data; /* rounded anew by every step */
    const mpt_f16 *b = (const mpt_f16 *)mpt_params_weight(params, bias).data;

    puts("epoch    loss     scale  skipped  test accuracy");
    course_data(&c, "# epoch, loss, log2 of the scale, skipped steps, test accuracy in percent\n");
    for (int epoch = 1; epoch <= EPOCHS; epoch++) {
        int right = 0;
        loss = 0;
        for (int first = 0; first + BATCH <= TRAINING; first += BATCH) {
            mpt_params_zero_grad(params);
            for (int n = first; n < first + BATCH; n++) {
                forward(w, b, images[n], p);
                loss -= log((double)p[d->y[n]] + 1e-30);
                backward(images[n], p, d->y[n], mpt_scaler_scale(scaler) / (float)BATCH,
                         mpt_params_grad(params, weight), mpt_params_grad(params, bias));
            }
            course_need(&c, mpt_step(opt) == MPT_OK, mpt_why(ctx)); /* divides by the scale; skips inf and NaN */
            course_need(&c, mpt_scaler_update(scaler) == MPT_OK, mpt_why(ctx));
        }
        for (int n = TRAINING; n < DIGITS; n++) right += forward(w, b, images[n], p) == d->y[n];
        accuracy = (double)right / (double)TEST;
        loss /= (double)(BATCHES * BATCH);
        course_need(&c, mpt_optimizer_get_state(opt, &state) == MPT_OK, mpt_why(ctx));
        printf("%5d%8.4f%10.0f%9d%13.2f %%\n", epoch, loss, (double)mpt_scaler_scale(scaler), (int)state.skipped,
               100 * accuracy);
        course_data(&c, "%d %.5f %.0f %d %.3f\n", epoch, loss, log2((double)mpt_scaler_scale(scaler)),
                    (int)state.skipped, 100 * accuracy);
    }
    course_claim(&c, accuracy > 0.93, "the digits are learnt");
    course_claim(&c, state.journal[0].step == 1 && state.skipped >= 4, "2^24 overflows at once and is halved");
    course_claim(&c, state.skipped + state.applied == (uint64_t)(EPOCHS * BATCHES), "no step is lost count of");
    mpt_optimizer_free(opt);
    mpt_scaler_free(scaler);
    mpt_params_free(params);
    free(d);
    mpt_close(ctx);
    return course_end(&c);
}
