/* 11_own_loss.c - can a net learn in fp16 from a loss that you write yourself?

       cc -O2 examples/11_own_loss.c -o own_loss -lm && ./own_loss

   REINFORCE (Williams 1992): a pole stands on a cart, the net pushes the cart left or right, and each step earns 1, up
   to 500. There is no label; the loss is -advantage * log p(push), its gradient at the logits advantage * (p - push),
   and mpt_output_grad takes that. You will see: returns climb from 20 to 500 in fp32 and in fp16, and 100 fresh games
   after training last at least 475 steps on average, with every one of 5 seeds.    Takes about 8 s.               */

#define MPT_IMPLEMENTATION
#include "../mpt.h"
#include "course.h"

enum { STATE = 4, PUSHES = 2, STEPS = 500, GAMES = 16, FRESH = 100, ITERATIONS = 80, SEEDS = 5 };

/* A step of Gym's CartPole-v1: cart of 1 kg, pole of 0.1 kg and 1 m, 10 N, 0.02 s, Euler's method. s: place and speed
   of the cart, angle and angular speed of the pole. Returns 0 if the cart is off its track or the pole over 12 deg. */
static int push_cart(float *s, int right) {
    const double mass = 1.1, pole = 0.1, half = 0.5, force = right ? 10 : -10, tau = 0.02;
    const double spin = (double)s[3], sine = sin((double)s[2]), cosine = cos((double)s[2]);
    const double pull = (force + pole * half * spin * spin * sine) / mass;
    const double turn = (9.8 * sine - cosine * pull) / (half * (4.0 / 3 - pole * cosine * cosine / mass));
    const double speed_up = pull - pole * half * turn * cosine / mass;
    s[0] += (float)(tau * (double)s[1]);
    s[1] += (float)(tau * speed_up);
    s[2] += (float)(tau * spin);
    s[3] += (float)(tau * turn);
    return fabs((double)s[0]) <= 2.4 && fabs((double)s[2]) <= 12 * 3.14159265358979 / 180;
}

/* All steps of some games, in the order in which they were played. */
typedef struct record {
    int rows, length[FRESH]; /* rows in all; steps of each game */
    float state[FRESH * STEPS][STATE], logits[FRESH * STEPS][PUSHES];
    int game[FRESH * STEPS], time[FRESH * STEPS], push[FRESH * STEPS];
} record;

/* Of a push to the right. */
static double chance(const float *logits) { return 1 / (1 + exp((double)logits[0] - (double)logits[1])); }

/* Plays games side by side: one mpt_predict for all that are still on. Returns the mean number of steps. */
static double play(const course *c, mpt_model *net, uint64_t seed, uint64_t round, int games, record *r) {
    static float s[FRESH][STATE];
    static int on[FRESH]; /* 1: the pole stands */
    r->rows = 0;
    for (int g = 0; g < games; g++) {
        r->length[g] = 0;
        on[g] = 1;
        for (int i = 0; i < STATE; i++)
            s[g][i] = 0.1f * mpt_uniform(seed, round, STEPS, (uint64_t)(g * STATE + i)) - 0.05f;
    }
    for (int t = 0; t < STEPS; t++) {
        const int first = r->rows;
        for (int g = 0; g < games; g++) {
            if (!on[g]) continue;
            memcpy(r->state[r->rows], s[g], sizeof s[g]);
            r->game[r->rows] = g;
            r->time[r->rows++] = t;
            r->length[g]++;
        }
        const size_t n = (size_t)(r->rows - first);
        course_need(c, !n || mpt_predict(net, r->state[first], n, r->logits[first]) == MPT_OK, "cannot predict");
        for (int row = first; row < r->rows; row++) {
            const int g = r->game[row];
            r->push[row] = (double)mpt_uniform(seed, round, (uint64_t)t, (uint64_t)g) < chance(r->logits[row]);
            on[g] = push_cart(s[g], r->push[row]);
        }
    }
    return (double)r->rows / games;
}

/* advantage[row] = what the game earned from there on, less the mean of all games at that time (the baseline), in units
   of its deviation. A game that is over earns 0. */
static void advantages(const record *r, int baseline, double *advantage) {
    static double earns[STEPS + 1], mean[STEPS]; /* earns[n]: what n steps earn, later ones less */
    double square = 0;
    for (int n = 1; n <= STEPS; n++) earns[n] = 1 + 0.99 * earns[n - 1];
    memset(mean, 0, sizeof mean);
    for (int i = 0; i < r->rows && baseline; i++)
        mean[r->time[i]] += earns[r->length[r->game[i]] - r->time[i]] / (double)GAMES;
    for (int i = 0; i < r->rows; i++) {
        advantage[i] = earns[r->length[r->game[i]] - r->time[i]] - mean[r->time[i]];
        square += advantage[i] * advantage[i] / r->rows;
    }
    for (int i = 0; i < r->rows; i++) advantage[i] /= sqrt(square) + 1; /* 1: where all do equally well, 0 */
}

/* Trains with a seed; curve[i] += the mean return of iteration i. Returns that of 100 fresh games. */
static double learn(const course *c, mpt_context *ctx, mpt_level level, uint64_t seed, record *r, double *curve) {
    static double advantage[GAMES * STEPS];
    static float grad[GAMES * STEPS][PUSHES];
    mpt_train_desc train = MPT_ZERO;
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(level, MPT_F16));
    const int hidden = mpt_tanh(net, mpt_linear(net, mpt_input(net, 1, 1, STATE), 32, NULL));
    const int head = mpt_linear(net, hidden, PUSHES, NULL); /* no loss behind it: that is ours */
    train.batch = GAMES * STEPS;
    train.seed = seed;
    train.optimizer = mpt_adam(0.02);
    train.optimizer.schedule.kind = MPT_SCHEDULE_COSINE;
    train.optimizer.schedule.steps = ITERATIONS;
    course_need(c, mpt_model_build(net, &train) == MPT_OK, mpt_why(ctx));
    for (uint64_t i = 0; i < ITERATIONS; i++) {
        curve[i] += play(c, net, seed, i, GAMES, r) / (double)SEEDS;
        advantages(r, c->number > 0, advantage);
        course_need(c, mpt_forward(net, r->state[0], NULL, (size_t)r->rows) == MPT_OK, mpt_why(ctx));
        course_need(c, mpt_node_value(net, head, r->logits[0]) == MPT_OK, mpt_why(ctx));
        for (int row = 0; row < r->rows; row++) {
            const double p = chance(r->logits[row]);
            grad[row][1] = (float)(advantage[row] * (p - r->push[row]) / r->rows); /* the mean over all steps */
            grad[row][0] = -grad[row][1];
        }
        course_need(c, mpt_output_grad(net, head, grad[0]) == MPT_OK, mpt_why(ctx)); /* mpt multiplies by its scale */
        course_need(c, mpt_backward(net) == MPT_OK, mpt_why(ctx));
        course_need(c, mpt_step(mpt_model_optimizer(net)) == MPT_OK, mpt_why(ctx)); /* or skips */
        course_need(c, mpt_scaler_update(mpt_model_scaler(net)) == MPT_OK, mpt_why(ctx));
    }
    const double fresh = play(c, net, seed, ITERATIONS, FRESH, r);
    mpt_model_free(net);
    return fresh;
}

int main(int argc, char **argv) {
    course c = course_begin(argc, argv, "11_own_loss", "baseline", 1);
    static double curve[2][ITERATIONS];
    double fresh[2][SEEDS];
    mpt_context *ctx = mpt_open(NULL);
    record *r = (record *)malloc(sizeof *r);
    course_need(&c, ctx && r, "no memory");
    for (int w = 0; w < 2; w++)
        for (uint64_t seed = 0; seed < SEEDS; seed++)
            fresh[w][seed] = learn(&c, ctx, w ? MPT_O2 : MPT_O0, seed + 1, r, curve[w]);
    puts("mean return of 5 seeds\niteration      fp32   O2 fp16");
    for (int i = 0; i < ITERATIONS; i++) {
        if (i % 10 == 0 || i == ITERATIONS - 1) printf("%9d%10.1f%10.1f\n", i + 1, curve[0][i], curve[1][i]);
        course_data(&c, "%d %.2f %.2f\n", i + 1, curve[0][i], curve[1][i]);
    }
    puts("100 fresh games, by seed");
    for (int w = 0; w < 2; w++) {
        printf("%-9s", w ? "O2 fp16" : "fp32");
        for (int seed = 0; seed < SEEDS; seed++) {
            printf("%10.1f", fresh[w][seed]);
            course_claim(&c, fresh[w][seed] >= 475 && curve[w][0] < 50, "100 fresh games last at least 475 steps");
        }
        putchar('\n');
    }
    free(r);
    mpt_close(ctx);
    return course_end(&c);
}
