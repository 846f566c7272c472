/* 12_own_layer.c - what does it take to train a layer that mpt.h does not have?

       cc -O2 examples/12_own_layer.c -o own_layer -lm && ./own_layer

   PReLU (He et al. 2015): y = x, or slope * x below 0, where each channel learns its slope. Two functions, forward and
   backward, in the types of the net. lens_gradients compares backward with differences of the loss, tensor by tensor;
   it accepts this one and catches one that forgets the slope. Then a CNN learns the digits with it in fp32, bf16 and
   fp16, and prints the slopes that it has found.    Takes about 2 s.                                                */

#define MPT_IMPLEMENTATION
#include "../mpt.h"
#define LENS_IMPLEMENTATION
#include "lens.h"
#include "course.h"

enum { BATCH = 32, CHANNELS = 8, EPOCHS = 10 };

/* ---- The layer ---- */

typedef struct prelu {
    size_t channels, elements; /* of a sample */
    int forgets;               /* 1: backward forgets the slope, which the checker is to find */
} prelu;

static float get(mpt_array a, size_t i) {
    if (a.type == MPT_F32) return ((const float *)a.data)[i];
    return mpt_widen(((const uint16_t *)a.data)[i], a.type);
}

static void put(mpt_array a, size_t i, float x) {
    if (a.type == MPT_F32) ((float *)a.data)[i] = x;
    else ((uint16_t *)a.data)[i] = (uint16_t)mpt_narrow(x, a.type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0);
}

static mpt_result prelu_forward(const mpt_layer_pass *p) {
    const prelu *me = (const prelu *)p->user;
    for (size_t i = 0; i < p->N * me->elements; i++) {
        const float x = get(p->x, i), slope = get(p->weight, i % me->channels);
        put(p->y, i, x < 0 ? slope * x : x);
    }
    return MPT_OK;
}

/* dx = dy, or slope * dy; a slope's gradient is the sum of x * dy where x is below 0. Both are added to what is there
   when other parts of the net, or of the step, came before. */
static mpt_result prelu_backward(const mpt_layer_pass *p) {
    const prelu *me = (const prelu *)p->user;
    for (size_t c = 0; p->dweight && c < me->channels; c++) {
        double sum = p->beta == 0 ? 0 : (double)(p->beta * p->dweight[c]);
        for (size_t i = c; i < p->N * me->elements; i += me->channels)
            if (get(p->x, i) < 0) sum += (double)get(p->x, i) * (double)get(p->dy, i);
        p->dweight[c] = (float)sum;
    }
    for (size_t i = 0; p->dx.data && i < p->N * me->elements; i++) {
        const int below = get(p->x, i) < 0 && !me->forgets;
        const float slope = below ? get(p->weight, i % me->channels) : 1;
        const float before = p->beta_x == 0 ? 0 : p->beta_x * get(p->dx, i);
        put(p->dx, i, before + slope * get(p->dy, i));
    }
    return MPT_OK;
}

/* In a net: `me` stays until the net is freed. */
static int prelu_layer(mpt_model *net, int node, prelu *me, size_t channels, size_t elements) {
    static const float quarter[CHANNELS] = {0.25f, 0.25f, 0.25f, 0.25f, 0.25f, 0.25f, 0.25f, 0.25f};
    mpt_layer_desc desc = MPT_ZERO;
    me->channels = channels;
    me->elements = elements;
    desc.name = "prelu";
    desc.weights = channels;
    desc.start = quarter;
    desc.forward = prelu_forward;
    desc.backward = prelu_backward;
    desc.user = me;
    return mpt_layer(net, node, &desc);
}

/* ---- The lesson ---- */

static mpt_model *new_net(const course *c, mpt_context *ctx, mpt_policy policy, prelu *me) {
    mpt_train_desc train = MPT_ZERO;
    mpt_model *net = mpt_model_new(ctx, policy);
    mpt_conv2d_desc conv = MPT_ZERO;
    int h = mpt_input(net, SIDE, SIDE, 1);
    conv.padding = 1;
    h = mpt_conv2d(net, h, CHANNELS, 3, &conv);
    h = mpt_avg_pool2d(net, prelu_layer(net, h, me, CHANNELS, (int)PIXELS * (int)CHANNELS), 2, NULL);
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
    train.batch = BATCH;
    train.optimizer = mpt_adam(1e-2);
    course_need(c, mpt_model_build(net, &train) == MPT_OK, mpt_why(ctx));
    return net;
}

static void print_line(const char *line, void *user) {
    (void)user;
    fputs(line, stdout);
}

int main(int argc, char **argv) {
    course c = course_begin(argc, argv, "12_own_layer", "forgets", 0);
    static const char *const names[] = {"fp32", "O2 bf16", "O2 fp16"};
    static float x[(int)BATCH * (int)PIXELS];
    static int32_t y[BATCH];
    mpt_context *ctx = mpt_open(NULL);
    prelu me = {0, 0, 0};
    course_need(&c, ctx != NULL, "no memory");
    course_digits *d = course_digits_read(&c);
    for (int wrong = 0; wrong < 2; wrong++) {
        double worst;
        me.forgets = wrong;
        mpt_model *net = new_net(&c, ctx, mpt_policy_preset(MPT_O0, MPT_F16), &me);
        printf("backward %s\n", wrong ? "that forgets the slope" : "as above");
        course_need(&c, lens_gradients(net, d->x[0], d->y, 8, MPT_TEXT, print_line, NULL, &worst) == MPT_OK,
                    mpt_why(ctx));
        printf("%s: worst %.4f, bound %.4f\n\n", worst > LENS_GRADIENT_BOUND ? "wrong" : "right", worst,
               LENS_GRADIENT_BOUND);
        course_claim(&c, (worst > LENS_GRADIENT_BOUND) == wrong, "the checker tells right from wrong");
        mpt_model_free(net);
    }
    me.forgets = c.number > 0;
    for (int w = 0; w < 3; w++) {
        float slopes[CHANNELS];
        mpt_metrics test;
        mpt_model *net = new_net(&c, ctx, mpt_policy_preset(w ? MPT_O2 : MPT_O0, w == 1 ? MPT_BF16 : MPT_F16), &me);
        mpt_params *params = mpt_model_params(net);
        for (uint64_t step = 0; step < (int)EPOCHS * (int)TRAINING / BATCH; step++) {
            course_batch(d, 1, step, BATCH, x, y);
            course_need(&c, mpt_train_step(net, x, y) == MPT_OK, mpt_why(ctx));
        }
        course_need(&c, mpt_evaluate(net, d->x[TRAINING], d->y + TRAINING, TEST, &test) == MPT_OK, mpt_why(ctx));
        course_need(&c, mpt_params_get(params, mpt_params_find(params, "prelu.weight"), slopes) == MPT_OK,
                    mpt_why(ctx));
        printf("%-8s%8.2f %% right; slopes", names[w], 100 * test.accuracy);
        course_data(&c, "\"%s\" %.3f\n", names[w], 100 * test.accuracy);
        for (int k = 0; k < CHANNELS; k++) printf(" %.2f", (double)slopes[k]);
        putchar('\n');
        course_claim(&c, test.accuracy > 0.93, "the digits are learnt");
        course_claim(&c, fabsf(slopes[0] - 0.25f) > 0.01f, "slopes have moved");
        mpt_model_free(net);
    }
    free(d);
    mpt_close(ctx);
    return course_end(&c);
}
