/* own_model.c - how do you train in fp16 when the model is your own?

       cc -O2 examples/own_model.c -o own_model -lm && ./own_model

   A softmax regression on 1,797 handwritten digits of 8x8 pixels, its forward and backward pass written out over arrays
   of mpt_f16; mpt.h lends the number type, the parameter block, the optimizer and the loss scaler. You will see: the
   scale starts far too large, so the first gradients overflow; each time the step is skipped and the scale halved till
   they fit. Then the loss falls, now and then a larger scale is tried, and some 95 % of the test digits are right. */

#define MPT_IMPLEMENTATION
#include "../mpt.h"
#include <stdio.h>
#include <stdlib.h>

enum { DIGITS = 1797, TEST = DIGITS / 5, TRAINING = DIGITS - TEST, PIXELS = 64, CLASSES = 10, BATCH = 32, EPOCHS = 20 };

static mpt_f16 images[DIGITS][PIXELS]; /* 0..1 */
static unsigned char labels[DIGITS];   /* every fifth digit is for testing */

static void need(int ok, const char *why) {
    if (ok) return;
    fprintf(stderr, "own_model: %s\n", why);
    exit(1);
}

/* The bytes behind the header of an IDX file. */
static void read_idx(const char *path, long header, unsigned char *out, size_t count) {
    FILE *file = fopen(path, "rb");
    need(file && fseek(file, header, SEEK_SET) == 0 && fread(out, 1, count, file) == count, path);
    fclose(file);
}

static void read_digits(mpt_context *ctx) {
    static unsigned char bytes[DIGITS * PIXELS]; /* 0..16 */
    static float pixels[DIGITS * PIXELS];
    read_idx("examples/data/digits/images.idx3-ubyte", 16, bytes, sizeof bytes);
    read_idx("examples/data/digits/labels.idx1-ubyte", 8, labels, sizeof labels);
    for (size_t i = 0; i < DIGITS * PIXELS; i++) pixels[i] = (float)bytes[i] / 16;
    need(mpt_cast(ctx, DIGITS * PIXELS, mpt_f32_array(pixels), mpt_f16_array(images[0]), NULL) == MPT_OK, mpt_why(ctx));
}

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

int main(void) {
    mpt_context *ctx = mpt_open(NULL);
    const mpt_optimizer_desc adam = mpt_adam(0.01);
    mpt_params_desc half = MPT_ZERO;
    mpt_scaler_desc scale = MPT_ZERO;
    float p[CLASSES];
    double accuracy = 0;
    need(ctx != NULL, "no memory");
    read_digits(ctx);
    half.type = MPT_F16;         /* fp16 copies for the products; fp32 masters, which is the default */
    scale.init_scale = 16777216; /* 2^24, to see it overflow; the default is 2^16 */
    scale.growth_interval = 200; /* tries twice the scale after so many good steps; the default is 2000 */

    mpt_params *params = mpt_params_new(ctx, &half);
    const int weight = mpt_params_add(params, "weight", CLASSES * PIXELS, MPT_GROUP_WEIGHT);
    const int bias = mpt_params_add(params, "bias", CLASSES, MPT_GROUP_BIAS); /* both begin as zeros: fine here */
    need(mpt_params_build(params) == MPT_OK, mpt_why(ctx));
    mpt_scaler *scaler = mpt_scaler_new(ctx, &scale);
    mpt_optimizer *opt = mpt_optimizer_new(params, scaler, &adam);
    need(opt != NULL, mpt_why(ctx));
    const mpt_f16 *w = (const mpt_f16 *)mpt_params_weight(params, weight).data; /* rounded anew by every step */
    const mpt_f16 *b = (const mpt_f16 *)mpt_params_weight(params, bias).data;

    for (int epoch = 1; epoch <= EPOCHS; epoch++) {
        mpt_optimizer_state state;
        double loss = 0;
        size_t right = 0;
        for (size_t first = 0; first + BATCH <= TRAINING; first += BATCH) {
            mpt_params_zero_grad(params);
            for (size_t i = first; i < first + BATCH; i++) {
                const size_t n = i / 4 * 5 + i % 4; /* steps over the test digits */
                forward(w, b, images[n], p);
                loss -= log((double)p[labels[n]] + 1e-30);
                backward(images[n], p, labels[n], mpt_scaler_scale(scaler) / BATCH, mpt_params_grad(params, weight),
                         mpt_params_grad(params, bias));
            }
            need(mpt_step(opt) == MPT_OK, mpt_why(ctx)); /* divides by the scale; skips if a gradient is inf or NaN */
            need(mpt_scaler_update(scaler) == MPT_OK, mpt_why(ctx));
        }
        for (size_t n = 4; n < DIGITS; n += 5) right += forward(w, b, images[n], p) == labels[n];
        accuracy = (double)right / TEST;
        need(mpt_optimizer_get_state(opt, &state) == MPT_OK, mpt_why(ctx));
        loss /= TRAINING / BATCH * BATCH;
        printf("epoch %2d  loss %.4f  scale %-8.0f  skipped %2d  test accuracy %.2f %%\n", epoch, loss,
               (double)mpt_scaler_scale(scaler), (int)state.skipped, 100 * accuracy);
    }
    mpt_optimizer_free(opt);
    mpt_scaler_free(scaler);
    mpt_params_free(params);
    mpt_close(ctx);
    return accuracy < 0.93; /* 1: it has not learned */
}
