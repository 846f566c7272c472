/* 07_cnn.c - does a convolutional net on real pictures save memory and learn as well?

       cc -O2 examples/07_cnn.c -o cnn -lm && ./cnn

   A CNN learns clothes from 3,000 pictures of Fashion-MNIST (Debian package dataset-fashion-mnist; unpacked by gzip),
   or digits if that is not installed: the first line says which. You will see fp32, bf16 and fp16 (O2), and all bf16
   without masters (O3), with 3 seeds each. Most of a CNN's memory is activations, and they take half: that is where
   mixed precision pays. Accuracy is the same. examples/train.c uses all 60,000.    Takes about 20 s.                */

#define _POSIX_C_SOURCE 200809L /* popen */
#define MPT_IMPLEMENTATION
#include "../mpt.h"
#include "course.h"

enum { BATCH = 64, SEEDS = 3, LARGEST = 28 * 28, FASHION_TRAINING = 3000, FASHION_TEST = 1000 };
#define FASHION "/usr/share/datasets/fashion-mnist/"

typedef struct pictures {
    int side, training, test, epochs; /* the first `training` are to train on */
    float *x;                         /* (training + test, side, side), 0..1 */
    int32_t *y;
} pictures;

/* The bytes behind the header of a packed IDX file; 0 if it is not there. */
static int unpack(const char *command, size_t header, unsigned char *out, size_t count) {
    FILE *file = popen(command, "r");
    const int good = file && fread(out, 1, header, file) == header && fread(out, 1, count, file) == count;
    if (file) pclose(file); /* its status says only that we did not read to the end */
    return good;
}

static pictures load(const course *c) {
    enum { ALL = FASHION_TRAINING + FASHION_TEST, BYTES = ALL * LARGEST };
    unsigned char *bytes = (unsigned char *)malloc(BYTES + ALL), *labels = bytes + BYTES;
    pictures p = {28, FASHION_TRAINING, FASHION_TEST, 3, NULL, NULL};
    p.x = (float *)malloc(sizeof(float) * BYTES);
    p.y = (int32_t *)malloc(sizeof(int32_t) * ALL);
    course_need(c, bytes && p.x && p.y, "no memory");
    if (unpack("gzip -dc " FASHION "train-images-idx3-ubyte.gz 2>/dev/null", 16, bytes, FASHION_TRAINING * LARGEST) &&
        unpack("gzip -dc " FASHION "train-labels-idx1-ubyte.gz 2>/dev/null", 8, labels, FASHION_TRAINING) &&
        unpack("gzip -dc " FASHION "t10k-images-idx3-ubyte.gz 2>/dev/null", 16, bytes + FASHION_TRAINING * LARGEST,
               FASHION_TEST * LARGEST) &&
        unpack("gzip -dc " FASHION "t10k-labels-idx1-ubyte.gz 2>/dev/null", 8, labels + FASHION_TRAINING,
               FASHION_TEST)) {
        for (int i = 0; i < BYTES; i++) p.x[i] = (float)bytes[i] / 255;
        for (int i = 0; i < ALL; i++) p.y[i] = labels[i];
    } else {
        course_digits *d = course_digits_read(c);
        p.side = SIDE;
        p.training = TRAINING;
        p.test = TEST;
        p.epochs = 20;
        memcpy(p.x, d->x, sizeof d->x);
        memcpy(p.y, d->y, sizeof d->y);
        free(d);
    }
    free(bytes);
    return p;
}

typedef struct way {
    const char *name;
    mpt_level level;
    mpt_dtype type;
} way;

static const way ways[] = {{"O0 fp32", MPT_O0, MPT_F32},
                           {"O2 bf16", MPT_O2, MPT_BF16},
                           {"O2 fp16", MPT_O2, MPT_F16},
                           {"O3 bf16", MPT_O3, MPT_BF16}};
enum { WAYS = sizeof ways / sizeof *ways };

/* Returns the test accuracy; seed 1 draws the figure. */
static double learn(const course *c, mpt_context *ctx, const pictures *p, const way *w, uint64_t seed, mpt_memory *m) {
    static float x[BATCH * LARGEST];
    static int32_t y[BATCH];
    const size_t pixels = (size_t)(p->side * p->side);
    const uint64_t steps = (uint64_t)(p->epochs * p->training / BATCH);
    const float *unseen = p->x + (size_t)p->training * pixels;
    mpt_train_desc train = MPT_ZERO;
    mpt_metrics test;
    double window = 0;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(w->level, w->type));
    mpt_conv2d_desc conv = MPT_ZERO;
    int h = mpt_input(net, p->side, p->side, 1);
    conv.padding = 1;
    h = mpt_max_pool2d(net, mpt_relu(net, mpt_conv2d(net, h, 16, 3, &conv)), 2, NULL);
    h = mpt_max_pool2d(net, mpt_relu(net, mpt_conv2d(net, h, 32, 3, &conv)), 2, NULL);
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
    train.batch = BATCH;
    train.seed = seed;
    train.optimizer = mpt_adam(3e-3);
    train.optimizer.schedule.kind = MPT_SCHEDULE_COSINE;
    train.optimizer.schedule.steps = steps;
    course_need(c, mpt_model_build(net, &train) == MPT_OK, mpt_why(ctx));
    for (uint64_t step = 0; step < steps; step++) {
        for (uint64_t i = 0; i < BATCH; i++) {
            const size_t from = (size_t)(mpt_uniform(seed, step, 0, i) * (float)p->training);
            memcpy(x + i * pixels, p->x + from * pixels, pixels * sizeof *x);
            y[i] = p->y[from];
        }
        course_need(c, mpt_train_step(net, x, y) == MPT_OK, mpt_why(ctx));
        window += mpt_loss(net) / 10;
        if (step % 10 < 9) continue;
        if (seed == 1) course_data(c, "%d %.4f\n", (int)step + 1, window);
        window = 0;
    }
    course_need(c, mpt_evaluate(net, unseen, p->y + p->training, (size_t)p->test, &test) == MPT_OK, mpt_why(ctx));
    *m = mpt_model_memory(net);
    mpt_model_free(net);
    return test.accuracy;
}

int main(int argc, char **argv) {
    course c = course_begin(argc, argv, "07_cnn", NULL, 0);
    mpt_context *ctx = mpt_open(NULL);
    double mean[WAYS] = {0};
    mpt_memory m[WAYS];
    course_need(&c, ctx != NULL, "no memory");
    pictures p = load(&c);
    printf("%s: %d pictures to train on, %d passes, %d to test\n",
           p.side == SIDE ? "Fashion-MNIST is not installed, so the digits" : "Fashion-MNIST", p.training, p.epochs,
           p.test);
    printf("\n%-8s%22s%13s%10s%9s%11s%9s%10s\n", "", "right in 3 seeds", "activations", "weights", "masters",
           "gradients", "moments", "all, KiB");
    for (int w = 0; w < WAYS; w++) {
        double low = 1, high = 0;
        course_data(&c, "# %s: step, loss\n", ways[w].name);
        for (uint64_t seed = 1; seed <= SEEDS; seed++) {
            const double a = learn(&c, ctx, &p, &ways[w], seed, &m[w]);
            mean[w] += a / (double)SEEDS;
            low = a < low ? a : low;
            high = a > high ? a : high;
        }
        course_data(&c, "\n\n");
        printf("%-8s%7.2f %% (%.2f-%.2f)%13zu%10zu%9zu%11zu%9zu%10zu\n", ways[w].name, 100 * mean[w], 100 * low,
               100 * high, m[w].activations, m[w].weights, m[w].masters, m[w].gradients, m[w].moments,
               (m[w].activations + m[w].weights + m[w].masters + m[w].gradients + m[w].moments) / 1024);
        fflush(stdout);
        /* two tests of n pictures, 85 % right, differ by the root of 2 0.85 0.15 / n (one deviation): within three */
        course_claim(&c, fabs(mean[w] - mean[0]) < 3 * sqrt(0.255 / p.test), "accuracy is that of fp32");
        course_claim(&c, w == 0 || 100 * m[w].activations <= 55 * m[0].activations, "activations take half");
    }
    course_claim(&c, mean[0] > (p.side == SIDE ? 0.95 : 0.75), "the CNN learns");
    free(p.x);
    free(p.y);
    mpt_close(ctx);
    return course_end(&c);
}
