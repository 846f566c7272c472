/* weights_to_c.c - a program that keeps its weights as a C array: what examples/weights_to_c.c wrote of the file that
   it saves itself. Without WEIGHTS it only saves; with -DWEIGHTS='"net.c"' it loads both and predicts with both. */
#include "../../mpt.h"
#include <stdio.h>
#include <string.h>
#ifdef WEIGHTS
#include WEIGHTS
#endif

enum { INPUTS = 11, OUTPUTS = 5, SAMPLES = 3 };

static mpt_model *build(mpt_context *ctx, uint64_t seed) {
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_BF16));
    mpt_train_desc train = MPT_ZERO;
    int h = mpt_relu(net, mpt_linear(net, mpt_input(net, 1, 1, INPUTS), 16, NULL));
    mpt_linear(net, h, OUTPUTS, NULL);
    train.batch = SAMPLES;
    train.inference = 1;
    train.seed = seed;
    return mpt_model_build(net, &train) == MPT_OK ? net : NULL;
}

int main(int argc, char **argv) {
    mpt_context *ctx = mpt_open(NULL);
    mpt_model *net = build(ctx, 1), *other = build(ctx, 2);
    float x[SAMPLES * INPUTS], a[SAMPLES * OUTPUTS], b[SAMPLES * OUTPUTS];
    int i, good = argc == 2 && net && other;
    for (i = 0; i < SAMPLES * INPUTS; i++) x[i] = mpt_uniform(3, 0, 0, (uint64_t)i);
    good = good && mpt_predict(net, x, SAMPLES, a) == MPT_OK && mpt_predict(other, x, SAMPLES, b) == MPT_OK;
    good = good && memcmp(a, b, sizeof a) != 0; /* before they are loaded */
#ifdef WEIGHTS
    good = good && mpt_weights_load(net, argv[1], NULL) == MPT_OK;
    good = good && mpt_weights_load_memory(other, net_weights, sizeof net_weights, NULL) == MPT_OK;
    good = good && mpt_predict(net, x, SAMPLES, a) == MPT_OK && mpt_predict(other, x, SAMPLES, b) == MPT_OK;
    good = good && memcmp(a, b, sizeof a) == 0;
#else
    good = good && mpt_weights_save(net, argv[1], MPT_BF16) == MPT_OK;
#endif
    if (!good) puts(mpt_why(ctx));
    mpt_model_free(net);
    mpt_model_free(other);
    mpt_close(ctx);
    return !good;
}
