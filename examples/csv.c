/* csv.c - from a CSV file to predictions: arrays -> shuffle -> epochs -> validation -> save -> load -> predict.

       cc -O2 examples/csv.c -o csv -lm -pthread && ./csv examples/data/iris/iris.csv iris.safetensors

   The file: a line of names, then rows of numbers; the last column is the class, from 0. A fifth of the rows tests. */
#define MPT_IMPLEMENTATION
#include "../mpt.h"
#include <stdio.h>
#include <stdlib.h>

enum { COLUMNS = 4, CLASSES = 3, ROWS = 1000, BATCH = 16, EPOCHS = 40, SEED = 1 };
static float x[ROWS][COLUMNS];
static int32_t y[ROWS];

static void need(int ok, const char *why) {
    if (!ok) fprintf(stderr, "csv: %s\n", why);
    if (!ok) exit(1);
}

static size_t read_rows(const char *path) {
    FILE *file = fopen(path, "r");
    size_t n = 0;
    need(file && fscanf(file, "%*[^\n]") == 0, "the file cannot be read");
    while (n < ROWS && fscanf(file, "%f,%f,%f,%f,%d", x[n], x[n] + 1, x[n] + 2, x[n] + 3, &y[n]) == COLUMNS + 1) n++;
    need(n >= 2 * BATCH && feof(file), "want 32 to 999 rows of 4 numbers and a class");
    fclose(file);
    return n;
}

/* Brings the first n rows into a random order that depends on the epoch (Fisher and Yates). */
static void shuffle(size_t n, uint64_t epoch) {
    for (size_t i = n; i-- > 1;) {
        const size_t j = (size_t)(mpt_uniform(SEED, epoch, 0, i) * (float)(i + 1));
        const int32_t label = y[i];
        y[i] = y[j];
        y[j] = label;
        for (int c = 0; c < COLUMNS; c++) {
            const float number = x[i][c];
            x[i][c] = x[j][c];
            x[j][c] = number;
        }
    }
}

static mpt_model *make_net(mpt_context *ctx) {
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    mpt_train_desc train = MPT_ZERO;
    int h = mpt_batch_norm(net, mpt_input(net, 1, 1, COLUMNS), NULL); /* columns may have any unit and size */
    h = mpt_relu(net, mpt_linear(net, h, 16, NULL));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
    train.batch = BATCH;
    train.optimizer = mpt_adam(0.01);
    need(mpt_model_build(net, &train) == MPT_OK, mpt_why(ctx));
    return net;
}

int main(int argc, char **argv) {
    mpt_context *ctx = mpt_open(NULL);
    mpt_metrics m;
    float logits[CLASSES];
    need(argc == 3 && ctx, "usage: csv TABLE.csv WEIGHTS.safetensors");
    const size_t rows = read_rows(argv[1]), n = rows - rows / 5; /* the rows after n validate */
    shuffle(rows, 0);
    mpt_model *net = make_net(ctx);
    for (uint64_t epoch = 1; epoch <= EPOCHS; epoch++) {
        shuffle(n, epoch);
        for (size_t i = 0; i + BATCH <= n; i += BATCH) need(mpt_train_step(net, x[i], &y[i]) == MPT_OK, mpt_why(ctx));
        need(mpt_evaluate(net, x[n], &y[n], rows - n, &m) == MPT_OK, mpt_why(ctx));
        if (epoch % 10 == 0) printf("epoch %d: %d of %d right\n", (int)epoch, (int)m.correct, (int)m.samples);
    }
    need(mpt_weights_save(net, argv[2], MPT_F32) == MPT_OK, mpt_why(ctx));
    mpt_model_free(net);
    net = make_net(ctx); /* as another program would */
    need(mpt_weights_load(net, argv[2], NULL) == MPT_OK, mpt_why(ctx));
    need(mpt_predict(net, x[n], 1, logits) == MPT_OK, mpt_why(ctx));
    printf("logits %.2f %.2f %.2f, class %d\n", logits[0], logits[1], logits[2], (int)y[n]);
    mpt_model_free(net);
    mpt_close(ctx);
}
