/* digits.c - trains an MLP and a small CNN on 1,797 real handwritten digits in fp32, bf16 and fp16, side by side.

       cc -O2 examples/digits.c -o digits -lm && ./digits --help

   Every fifth digit is for testing. After the table it asks whether fp16 needs its loss scale here, and answers with a
   run without one and with the sizes of the gradients.                                                              */

#define _POSIX_C_SOURCE 200809L
#define MPT_IMPLEMENTATION
#ifdef MPT_TRAINER_CUDA
#include "../mpt_cuda.cuh"
#else
#include "../mpt.h"
#endif
#include "../mpt_tools.h"

#define TRAINER_NAME "digits"
#define TRAINER_ABOUT "Trains small nets on handwritten digits of 8x8 pixels in fp32, bf16 and fp16."
#define TRAINER_DATA "examples/data/digits"
#define TRAINER_MODELS "mlp|cnn|all"
#define TRAINER_BATCH 32
#define TRAINER_WITHIN 1.5 /* five of the 359 test digits */
#include "trainer.h"

#include <math.h>

enum { SIDE = 8, PIXELS = SIDE * SIDE, INK = 16, CLASSES = 10 }; /* pixels are 0..INK */

static void mlp_layers(mpt_model *net, int h) {
    h = mpt_relu(net, mpt_linear(net, h, 128, NULL));
    h = mpt_relu(net, mpt_linear(net, h, 64, NULL));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
}

static void cnn_layers(mpt_model *net, int h) {
    h = mpt_relu(net, mpt_conv2d(net, h, 16, 3, NULL));
    h = mpt_max_pool2d(net, h, 2, NULL);
    h = mpt_relu(net, mpt_conv2d(net, h, 32, 3, NULL));
    h = mpt_max_pool2d(net, h, 2, NULL);
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
}

enum { MLP, CNN, MODELS };
static const trainer_model models[MODELS] = {{"mlp", mlp_layers, 30, 0.008}, {"cnn", cnn_layers, 8, 0.01}};

/* Every fifth digit tests, the others train. */
static trainer_data load(const char *folder) {
    uint32_t shape[3];
    const trainer_file images = trainer_file_read(folder, "images.idx3-ubyte");
    const trainer_file labels = trainer_file_read(folder, "labels.idx1-ubyte");
    trainer_set all = trainer_idx_set(images, labels, CLASSES, shape);
    trainer_data data = MPT_ZERO;
    if (shape[1] != SIDE || shape[2] != SIDE || all.count < 5)
        TRAINER_FAIL(TRAINER_BAD_USE, "%s: %zu images of %" PRIu32 "x%" PRIu32 ", want 5 or more of 8x8", folder,
                     all.count, shape[1], shape[2]);
    for (size_t p = 0; p < all.count * PIXELS; p++)
        if (all.x[p] > INK)
            TRAINER_FAIL(TRAINER_BAD_USE, "%s: pixel %zu of image %zu is %d, want 0 to %d", folder, p % PIXELS,
                         p / PIXELS, all.x[p], INK);
    for (int p = 0; p <= INK; p++) data.value[p] = (float)p / (float)INK;
    data.height = data.width = SIDE;
    data.channels = 1;
    data.train.x = (unsigned char *)trainer_alloc(all.count, PIXELS);
    data.train.y = (unsigned char *)trainer_alloc(all.count, 1);
    data.test.x = (unsigned char *)trainer_alloc(all.count, PIXELS);
    data.test.y = (unsigned char *)trainer_alloc(all.count, 1);
    for (size_t i = 0; i < all.count; i++) {
        trainer_set *set = i % 5 == 4 ? &data.test : &data.train;
        memcpy(set->x + set->count * PIXELS, all.x + i * PIXELS, PIXELS);
        set->y[set->count++] = all.y[i];
    }
    free(all.x);
    free(all.y);
    return data;
}

/* ---- Does fp16 need its loss scale here? ---- */

/* How many values have 2^low <= |x| < 2^high. */
static uint64_t count_between(const mpt_histogram *h, int low, int high) {
    uint64_t count = 0;
    for (int e = low; e < high; e++) count += h->exponent[e + 127];
    return count;
}

/* The histogram as bars of two exponents each, down to the smallest number that fp16 holds with the scale. */
static void print_bars(const mpt_histogram *h, int log2_scale) {
    static const char bar[] = "########################################";
    const int normal = -14, subnormal = -24, low = (subnormal - log2_scale) / 2 * 2 - 2, high = 128;
    const double all = (double)count_between(h, -127, high) + 1e-9; /* no division by 0 */
    uint64_t longest = 1;
    for (int e = low; e < high; e += 2)
        if (count_between(h, e, e + 2) > longest) longest = count_between(h, e, e + 2);
    for (int e = high - 2; e >= low; e -= 2) {
        const uint64_t count = count_between(h, e, e + 2);
        if (count_between(h, e, high) == 0) continue;
        printf("  2^%-4d%7.2f %%  %.*s", e, 100 * (double)count / all, (int)(40 * count / longest), bar);
        if (e == normal) printf("  smallest normal number of fp16");
        if (e == subnormal) printf("  smallest subnormal number of fp16");
        if (log2_scale && (e | 1) == ((normal - log2_scale) | 1)) printf("  smallest normal, scaled");
        if (log2_scale && (e | 1) == ((subnormal - log2_scale) | 1)) printf("  smallest subnormal, scaled");
        putchar('\n');
    }
    printf("  below %7.2f %%\n", 100 * (double)count_between(h, -127, low) / all);
}

static void print_verdict(const trainer_run *scaled, const trainer_run *bare, double flushed, size_t tested) {
    const double p = scaled->accuracy;
    const double noise = sqrt(2 * p * (1 - p) * (double)tested); /* deviation of a difference of two tests */
    printf("Of %zu test digits %" PRIu64 " are right with the scale, %" PRIu64
           " without; such a difference has a standard\n"
           "deviation of %.1f.\n",
           tested, scaled->correct, bare->correct, noise);
    if (bare->diverged || (double)scaled->correct - (double)bare->correct > 2 * noise)
        puts("So fp16 without loss scaling is worse here.");
    else
        printf("So fp16 without loss scaling is not measurably worse at this size: the %.1f %% that vanish are the\n"
               "smallest gradients, and the larger ones still train the net.\n",
               100 * flushed);
}

static int compare_scaling(mpt_context *ctx, const trainer_options *o, const trainer_data *data) {
    trainer_run runs[3], *plain = &runs[0], *scaled = &runs[1], *bare = &runs[2];
    mpt_histogram *h = (mpt_histogram *)trainer_alloc(1, sizeof *h);
    mpt_fit without, with;
    int log2_scale;
    memset(runs, 0, sizeof runs);
    for (int i = 0; i < 3; i++) {
        runs[i].model = &models[MLP];
        runs[i].level = i == 0 ? MPT_O0 : MPT_O2;
        runs[i].type = i == 0 ? MPT_F32 : MPT_F16;
        runs[i].seed = o->seed;
        runs[i].epochs = o->epochs ? o->epochs : models[MLP].epochs;
        runs[i].number = i + 1;
        runs[i].of = 3;
    }
    plain->gradients = h;
    bare->scaler = MPT_SCALER_OFF;
    printf("\nDoes fp16 need its loss scale here?\n");
    for (int i = 0; i < 3 && !trainer_interrupted; i++) trainer_train(ctx, o, data, &runs[i]);
    trainer_wipe();
    if (trainer_interrupted) {
        free(h);
        return 0;
    }
    log2_scale = (int)lround(log2((double)scaled->scale));
    without = mpt_histogram_fit(h, MPT_F16, 0);
    with = mpt_histogram_fit(h, MPT_F16, log2_scale);
    printf("mlp O2 f16: test accuracy %.2f %% with the scale, %.2f %% without.\n"
           "Gradients of the weights in the last epoch of fp32 training by size, the zeros left out:\n",
           100 * scaled->accuracy, 100 * bare->accuracy);
    print_bars(h, log2_scale);
    printf("fp16 would round %.2f %% of them to zero and make %.2f %% subnormal; times 2^%d, the scale in use,\n"
           "%.2f %% and %.2f %%, and %.2f %% overflow. (mpt sums gradients of weights in fp32; what passes through\n"
           "fp16 on the way are the gradients of activations.)\n",
           100 * without.flushed, 100 * without.subnormal, log2_scale, 100 * with.flushed, 100 * with.subnormal,
           100 * with.overflowed);
    print_verdict(scaled, bare, without.flushed, data->test.count);
    free(h);
    return plain->diverged || scaled->diverged || bare->diverged ? TRAINER_BAD_RUN : 0;
}

int main(int argc, char **argv) {
    const trainer_options o = trainer_parse(argc, argv, models, MODELS);
    int count, status, half = 0;
    trainer_run *runs = trainer_select(&o, models, MODELS, &count);
    mpt_context *ctx = trainer_open(&o);
    trainer_data data = load(o.data);
    status = trainer_run_all(ctx, &o, &data, runs, count);
    for (int i = 0; i < count; i++) half |= runs[i].type == MPT_F16;
    if (half && !trainer_interrupted) status |= compare_scaling(ctx, &o, &data);
    free(runs);
    trainer_data_free(&data);
    mpt_close(ctx);
    return trainer_finish(status);
}
