/* 14_distill.c - can a small net learn more from a larger one than from the labels?

       cc -O2 examples/14_distill.c -o distill -lm && ./distill

   Distillation (Hinton et al. 2015): a CNN that has learnt the digits is the teacher of a small MLP. The MLP ends in
   its logits, and this program computes the loss: the cross-entropy with the label, plus T^2 times the cross-entropy
   with the teacher's answer, both softened by a temperature T. Only 100 digits have labels; the teacher has seen all.
   You will see: in fp32 and in fp16 the MLP with a teacher gets more test digits right.    Takes about 5 s.         */

#define MPT_IMPLEMENTATION
#include "../mpt.h"
#include "course.h"

enum { BATCH = 32, SEEDS = 5, TEACHER_STEPS = 900, STEPS = 1000, LABELLED = 100 };

static mpt_train_desc training(uint64_t seed, uint64_t steps) {
    mpt_train_desc train = MPT_ZERO;
    train.batch = BATCH;
    train.seed = seed;
    train.optimizer = mpt_adam(3e-3);
    train.optimizer.schedule.kind = MPT_SCHEDULE_COSINE;
    train.optimizer.schedule.steps = steps;
    return train;
}

static mpt_model *new_teacher(const course *c, mpt_context *ctx, const course_digits *d) {
    static float x[(int)BATCH * (int)PIXELS];
    static int32_t y[BATCH];
    const mpt_train_desc train = training(1, TEACHER_STEPS);
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    mpt_conv2d_desc conv = MPT_ZERO;
    int h = mpt_input(net, SIDE, SIDE, 1);
    conv.padding = 1;
    h = mpt_max_pool2d(net, mpt_relu(net, mpt_conv2d(net, h, 32, 3, &conv)), 2, NULL);
    h = mpt_max_pool2d(net, mpt_relu(net, mpt_conv2d(net, h, 64, 3, &conv)), 2, NULL);
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
    course_need(c, mpt_model_build(net, &train) == MPT_OK, mpt_why(ctx));
    for (uint64_t step = 0; step < TEACHER_STEPS; step++) {
        course_batch(d, 1, step, BATCH, x, y);
        course_need(c, mpt_train_step(net, x, y) == MPT_OK, mpt_why(ctx));
    }
    return net;
}

/* p = softmax(logits / temperature) */
static void soften(const float *logits, double temperature, double *p) {
    double sum = 0, largest = (double)logits[0];
    for (int k = 1; k < CLASSES; k++) largest = fmax(largest, (double)logits[k]);
    for (int k = 0; k < CLASSES; k++) sum += p[k] = exp(((double)logits[k] - largest) / temperature);
    for (int k = 0; k < CLASSES; k++) p[k] /= sum;
}

/* The gradient at the MLP's logits of the mean loss of a batch. With the label it is p - label; T^2 times the
   cross-entropy with the teacher has T (p_T - teacher_T). Those without a label learn from the teacher alone. */
static void gradient(float (*logits)[CLASSES], float (*teacher)[CLASSES], const int32_t *y, double T,
                     float (*grad)[CLASSES]) {
    double p[CLASSES], soft[CLASSES], told[CLASSES];
    for (int i = 0; i < BATCH; i++) {
        soften(logits[i], 1, p);
        if (T > 0) soften(logits[i], T, soft);
        if (T > 0) soften(teacher[i], T, told);
        for (int k = 0; k < CLASSES; k++) {
            double g = y[i] < 0 ? 0 : p[k] - (k == y[i]);
            if (T > 0) g += T * (soft[k] - told[k]);
            grad[i][k] = (float)(g / (double)BATCH);
        }
    }
}

/* Of a model without a loss: mpt_predict gives its logits. */
static double right(const course *c, mpt_model *net, const course_digits *d) {
    static float logits[TEST][CLASSES];
    int good = 0;
    course_need(c, mpt_predict(net, d->x[TRAINING], TEST, logits[0]) == MPT_OK, mpt_why(mpt_model_context(net)));
    for (int i = 0; i < TEST; i++) {
        int best = 0;
        for (int k = 1; k < CLASSES; k++)
            if (logits[i][k] > logits[i][best]) best = k;
        good += best == d->y[TRAINING + i];
    }
    return (double)good / (double)TEST;
}

/* Returns the accuracy of an MLP that has learnt from the labels, and with T above 0 from the teacher, too. */
static double learn(const course *c, mpt_context *ctx, mpt_level level, mpt_model *teacher, const course_digits *d,
                    double T, uint64_t seed) {
    static float x[BATCH][PIXELS], logits[BATCH][CLASSES], told[BATCH][CLASSES], grad[BATCH][CLASSES];
    int32_t y[BATCH];
    const mpt_train_desc train = training(seed, STEPS);
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(level, MPT_F16));
    const int hidden = mpt_relu(net, mpt_linear(net, mpt_input(net, 1, 1, PIXELS), 16, NULL));
    const int head = mpt_linear(net, hidden, CLASSES, NULL);
    course_need(c, mpt_model_build(net, &train) == MPT_OK, mpt_why(ctx));
    for (uint64_t step = 0; step < STEPS; step++) {
        const int seen = T > 0 ? (int)TRAINING : (int)LABELLED; /* what has no label is of use with a teacher alone */
        for (uint64_t i = 0; i < BATCH; i++) {
            const int k = (int)(mpt_uniform(seed, step, 0, i) * (float)seen);
            memcpy(x[i], d->x[k], sizeof x[i]);
            y[i] = k < LABELLED ? d->y[k] : -1;
        }
        if (T > 0) course_need(c, mpt_predict(teacher, x[0], BATCH, told[0]) == MPT_OK, mpt_why(ctx));
        course_need(c, mpt_forward(net, x[0], NULL, BATCH) == MPT_OK, mpt_why(ctx));
        course_need(c, mpt_node_value(net, head, logits[0]) == MPT_OK, mpt_why(ctx));
        gradient(logits, told, y, T, grad);
        course_need(c, mpt_output_grad(net, head, grad[0]) == MPT_OK, mpt_why(ctx));
        course_need(c, mpt_backward(net) == MPT_OK, mpt_why(ctx));
        course_need(c, mpt_step(mpt_model_optimizer(net)) == MPT_OK, mpt_why(ctx));
        course_need(c, mpt_scaler_update(mpt_model_scaler(net)) == MPT_OK, mpt_why(ctx));
    }
    const double accuracy = right(c, net, d);
    mpt_model_free(net);
    return accuracy;
}

int main(int argc, char **argv) {
    course c = course_begin(argc, argv, "14_distill", "temperature", 3);
    mpt_context *ctx = mpt_open(NULL);
    course_need(&c, ctx != NULL, "no memory");
    course_digits *d = course_digits_read(&c);
    mpt_model *teacher = new_teacher(&c, ctx, d);
    const double best = right(&c, teacher, d);
    course_need(&c, c.number > 0, "--temperature is above 0");
    printf("teacher, a CNN that has seen all labels: %.2f %% of the test digits right\n", 100 * best);
    printf("an MLP, 5 seeds   %d labels   and the teacher\n", LABELLED);
    for (int w = 0; w < 2; w++) {
        double mean[2] = {0, 0};
        for (uint64_t seed = 1; seed <= SEEDS; seed++)
            for (int listens = 0; listens < 2; listens++)
                mean[listens] +=
                    learn(&c, ctx, w ? MPT_O2 : MPT_O0, teacher, d, listens ? c.number : 0, seed) / (double)SEEDS;
        printf("%-16s%10.2f %%%16.2f %%\n", w ? "O2 fp16" : "fp32", 100 * mean[0], 100 * mean[1]);
        course_data(&c, "\"%s\" %.3f %.3f\n", w ? "O2 fp16" : "fp32", 100 * mean[0], 100 * mean[1]);
        course_claim(&c, mean[1] > mean[0] + 0.03, "the teacher is worth more than 3 % of the digits");
    }
    course_claim(&c, best > 0.96, "the teacher knows the digits");
    mpt_model_free(teacher);
    free(d);
    mpt_close(ctx);
    return course_end(&c);
}
