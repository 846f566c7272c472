/* csv.c - your own table: a CSV file -> arrays -> shuffle -> epochs -> validation -> save -> load -> predict.

       cc -O2 examples/csv.c -o csv -lm -pthread && ./csv examples/data/iris/iris.csv iris.safetensors

   The file: a line of names, then rows of numbers; the last column is the class, from 0. A fifth of the rows validates. */
#define MPT_IMPLEMENTATION
#include "../mpt.h"
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

enum { COLUMNS = 4, CLASSES = 3, ROWS = 1000, BATCH = 16, EPOCHS = 40, SEED = 1 };
typedef struct table {
    size_t rows;
    float x[ROWS][COLUMNS];
    int32_t y[ROWS];
} table;

static void need(int ok, const char *why) {
    if (!ok) exit((fprintf(stderr, "csv: %s\n", why), 1));
}

static void read_rows(const char *path, table *train, table *test) {
    FILE *file = fopen(path, "r");
    need(file && fscanf(file, "%*[^\n]") == 0, "the file cannot be read");
    for (uint64_t row = 0; row < ROWS; row++) {
        table *t = mpt_hash(SEED, 0, 0, row) % 5 == 0 ? test : train;
        float *x = t->x[t->rows];
        if (fscanf(file, "%f,%f,%f,%f,%" SCNd32, x, x + 1, x + 2, x + 3, &t->y[t->rows]) != COLUMNS + 1) break;
        t->rows++;
    }
    need(train->rows >= BATCH && feof(file), "want 16 to 1000 rows of 4 numbers and a class");
    fclose(file);
}

/* A random order, the same for the same seed and epoch (Fisher and Yates). */
static void shuffle(table *t, uint64_t epoch) {
    for (size_t i = t->rows; i-- > 1;) {
        const size_t j = (size_t)(mpt_uniform(SEED, epoch, 0, i) * (float)(i + 1));
        const int32_t y = t->y[i];
        t->y[i] = t->y[j];
        t->y[j] = y;
        for (int c = 0; c < COLUMNS; c++) {
            const float x = t->x[i][c];
            t->x[i][c] = t->x[j][c];
            t->x[j][c] = x;
        }
    }
}

static mpt_model *make_net(mpt_context *ctx) {
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    mpt_train_desc train = MPT_ZERO;
    int h = mpt_batch_norm(net, mpt_input(net, 1, 1, COLUMNS), NULL); /* columns of any unit and size */
    h = mpt_relu(net, mpt_linear(net, h, 16, NULL));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
    train.batch = BATCH;
    train.seed = SEED;
    train.optimizer = mpt_adam(0.01);
    need(mpt_model_build(net, &train) == MPT_OK, mpt_why(ctx));
    return net;
}

int main(int argc, char **argv) {
    static table train, test;
    mpt_context *ctx = mpt_open(NULL);
    mpt_metrics m;
    float logits[CLASSES];
    need(argc == 3 && ctx != NULL, "usage: csv TABLE.csv WEIGHTS.safetensors");
    read_rows(argv[1], &train, &test);
    mpt_model *net = make_net(ctx);
    for (uint64_t epoch = 1; epoch <= EPOCHS; epoch++) {
        shuffle(&train, epoch);
        for (size_t at = 0; at + BATCH <= train.rows; at += BATCH)
            need(mpt_train_step(net, train.x[at], &train.y[at]) == MPT_OK, mpt_why(ctx));
        need(mpt_evaluate(net, test.x[0], test.y, test.rows, &m) == MPT_OK, mpt_why(ctx));
        if (epoch % 10 == 0) printf("epoch %d: %d of %d right\n", (int)epoch, (int)m.correct, (int)m.samples);
    }
    need(mpt_weights_save(net, argv[2], MPT_F32) == MPT_OK, mpt_why(ctx));
    mpt_model_free(net);
    net = make_net(ctx); /* another day, another program */
    need(mpt_weights_load(net, argv[2], NULL) == MPT_OK, mpt_why(ctx));
    need(mpt_predict(net, test.x[0], 1, logits) == MPT_OK, mpt_why(ctx));
    printf("logits %.2f %.2f %.2f, class %d\n", logits[0], logits[1], logits[2], (int)test.y[0]);
    mpt_model_free(net);
    mpt_close(ctx);
}
