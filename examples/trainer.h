/* trainer.h - what the example trainers share: options, IDX files, the training loop, progress, table and CSV.

   It knows nothing of a data set or a net. A trainer defines the four macros below, includes mpt.h and then this file,
   reads its data into a trainer_data, and lists its nets as trainer_model:

       TRAINER_NAME     "digits"                     starts every message
       TRAINER_ABOUT    "Trains ... on ..."          first line of --help
       TRAINER_DATA     "examples/data/digits"       default of --data
       TRAINER_MODELS   "mlp|cnn|all"                names of the models in the order of their list, then all

   Exit status: 0 done; 1 a run failed (out of memory, diverged); 2 wrong options, bad files, output not written.
   Every failure is one line on stderr. Needs POSIX.                                                                  */

#ifndef TRAINER_H
#define TRAINER_H

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { TRAINER_BAD_RUN = 1, TRAINER_BAD_USE = 2 };

/* ---- Messages ---- */

/* Wipes the progress line where one may stand. */
static void trainer_wipe(void) {
    if (isatty(STDOUT_FILENO)) printf("\r%79s\r", "");
    fflush(stdout);
}

#ifdef __GNUC__
static void trainer_complain(const char *format, ...) __attribute__((format(printf, 1, 2)));
#endif
static void trainer_complain(const char *format, ...) {
    va_list arguments;
    trainer_wipe();
    fputs(TRAINER_NAME ": ", stderr);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
}

/* One line on stderr, and the end. */
#define TRAINER_FAIL(status, ...) (trainer_complain(__VA_ARGS__), exit(status))

static void *trainer_alloc(size_t count, size_t size) {
    void *p = calloc(count, size);
    if (!p) TRAINER_FAIL(TRAINER_BAD_RUN, "out of memory: %zu elements of %zu bytes", count, size);
    return p;
}

/* ---- Options ---- */

static const mpt_dtype TRAINER_TYPES[] = {MPT_F32, MPT_BF16, MPT_F16}; /* the choices of --type */

typedef struct trainer_model {
    const char *name;
    void (*layers)(mpt_model *net); /* adds input, layers and loss */
    int epochs;                     /* defaults of --epochs and --lr */
    double lr;
} trainer_model;

typedef struct trainer_options {
    const char *data, *csv; /* csv NULL: none */
    int model, level, type; /* index in the trainer's models, mpt_level, index in TRAINER_TYPES; -1: all */
    int epochs;             /* 0: the model's */
    double lr;              /* 0: the model's */
    int batch, threads, cuda;
    uint64_t seed;
} trainer_options;

static void trainer_help(const trainer_model *models, int count) {
    printf("Usage: " TRAINER_NAME " [option value]...\n" TRAINER_ABOUT "\n\n"
           "  --data DIR                  folder of the data; default " TRAINER_DATA "\n"
           "  --model " TRAINER_MODELS "\n"
           "  --policy O0|O1|O2|O3|all    O0 fp32; O1 autocast; O2 16-bit weights with fp32 masters; O3 all 16-bit\n"
           "  --type f32|bf16|f16|all     f32 goes with O0, bf16 and f16 with O1 to O3\n"
           "  --epochs N                  passes over the training data; default the model's, below\n"
           "  --batch N                   samples in one step; default 32\n"
           "  --lr X                      learning rate of Adam at the start, falls to 0; default the model's, below\n"
           "  --seed N                    of initial weights and shuffling; default 1\n"
           "  --threads N                 at most 64; 0, the default: one per processor\n"
           "  --device cpu|cuda           default cpu\n"
           "  --csv FILE                  writes one row per run\n"
           "  --help\n\n"
           "Where all can be chosen it is the default.\n");
    for (int i = 0; i < count; i++)
        printf("Model %s: %d epochs, lr %g.\n", models[i].name, models[i].epochs, models[i].lr);
}

/* Index of `text` in choices such as "cpu|cuda"; -1 for "all". */
static int trainer_choice(const char *option, const char *text, const char *choices) {
    size_t length = strlen(text);
    int index = 0;
    for (const char *c = choices; length && *c; index++) {
        size_t n = strcspn(c, "|");
        if (n == length && memcmp(c, text, n) == 0) return strcmp(text, "all") == 0 ? -1 : index;
        c += n + (c[n] == '|');
    }
    TRAINER_FAIL(TRAINER_BAD_USE, "%s '%s': want %s", option, text, choices);
    return -1; /* not reached */
}

static uint64_t trainer_integer(const char *option, const char *text, uint64_t low, uint64_t high) {
    char *end = NULL;
    unsigned long long value;
    errno = 0;
    value = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno || value < low || value > high)
        TRAINER_FAIL(TRAINER_BAD_USE, "%s '%s': want a whole number from %" PRIu64 " to %" PRIu64, option, text, low,
                     high);
    return value;
}

static double trainer_rate(const char *option, const char *text) {
    char *end = NULL;
    double value;
    errno = 0;
    value = strtod(text, &end);
    if (!strchr(".0123456789", *text) || end == text || *end || errno || !(value > 0))
        TRAINER_FAIL(TRAINER_BAD_USE, "%s '%s': want a number above 0", option, text);
    return value;
}

static int trainer_option(trainer_options *o, const char *name, const char *text) {
    const char *is = name + 2; /* after the dashes */
    if (strcmp(is, "data") == 0) o->data = text;
    else if (strcmp(is, "csv") == 0) o->csv = text;
    else if (strcmp(is, "model") == 0) o->model = trainer_choice(name, text, TRAINER_MODELS);
    else if (strcmp(is, "policy") == 0) o->level = trainer_choice(name, text, "O0|O1|O2|O3|all");
    else if (strcmp(is, "type") == 0) o->type = trainer_choice(name, text, "f32|bf16|f16|all");
    else if (strcmp(is, "device") == 0) o->cuda = trainer_choice(name, text, "cpu|cuda");
    else if (strcmp(is, "epochs") == 0) o->epochs = (int)trainer_integer(name, text, 1, 1000000);
    else if (strcmp(is, "batch") == 0) o->batch = (int)trainer_integer(name, text, 1, 1000000);
    else if (strcmp(is, "threads") == 0) o->threads = (int)trainer_integer(name, text, 0, 64);
    else if (strcmp(is, "seed") == 0) o->seed = trainer_integer(name, text, 0, UINT64_MAX);
    else if (strcmp(is, "lr") == 0) o->lr = trainer_rate(name, text);
    else return 0;
    return 1;
}

static trainer_options trainer_parse(int argc, char **argv, const trainer_model *models, int count) {
    trainer_options o = MPT_ZERO;
    o.data = TRAINER_DATA;
    o.model = o.level = o.type = -1;
    o.batch = 32;
    o.seed = 1;
    for (int i = 1; i < argc; i += 2) {
        if (strcmp(argv[i], "--help") == 0) {
            trainer_help(models, count);
            exit(0);
        }
        if (strncmp(argv[i], "--", 2) != 0) TRAINER_FAIL(TRAINER_BAD_USE, "'%s' is no option; see --help", argv[i]);
        if (!trainer_option(&o, argv[i], i + 1 < argc ? argv[i + 1] : ""))
            TRAINER_FAIL(TRAINER_BAD_USE, "unknown option '%s'; see --help", argv[i]);
        if (i + 1 == argc || !*argv[i + 1]) TRAINER_FAIL(TRAINER_BAD_USE, "%s wants a value; see --help", argv[i]);
    }
    return o;
}

/* ---- Data ---- */

typedef struct trainer_data {
    size_t sample; /* floats in one sample */
    size_t train_count, test_count;
    float *train_x, *test_x; /* samples in the order of their labels */
    int32_t *train_y, *test_y;
} trainer_data;

static void trainer_data_free(trainer_data *data) {
    free(data->train_x);
    free(data->test_x);
    free(data->train_y);
    free(data->test_y);
}

/* Images and labels as the IDX format of MNIST stores them. */
typedef struct trainer_idx {
    size_t count, height, width;
    unsigned char *images, *labels; /* (count, height, width) and (count) */
} trainer_idx;

static uint32_t trainer_big_endian(const unsigned char *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

/* Elements the header promises; fails unless exactly that many bytes follow it, so that a false header costs no memory.
   No product here can wrap: each is compared with the size of the file first. */
static size_t trainer_idx_elements(const char *path, const uint32_t *shape, int dims, uint64_t follow) {
    uint64_t elements = 1;
    for (int i = 0; i < dims; i++) {
        if (shape[i] == 0) TRAINER_FAIL(TRAINER_BAD_USE, "%s: size %d of %d in the header is 0", path, i + 1, dims);
        if (shape[i] > follow / elements)
            TRAINER_FAIL(TRAINER_BAD_USE,
                         "%s: truncated: size %d of %d in the header is %" PRIu32 ", but only %" PRIu64 " bytes follow",
                         path, i + 1, dims, shape[i], follow);
        elements *= shape[i];
    }
    if (elements < follow)
        TRAINER_FAIL(TRAINER_BAD_USE, "%s: %" PRIu64 " bytes too many behind the data", path, follow - elements);
    return (size_t)elements;
}

/* One IDX file of unsigned bytes with `dims` sizes in its header. */
static unsigned char *trainer_idx_file(const char *path, int dims, uint32_t *shape) {
    const uint32_t magic = 0x800u + (uint32_t)dims;
    const size_t header = 4 + 4 * (size_t)dims;
    unsigned char head[16], *bytes;
    struct stat info;
    size_t elements;
    FILE *file;
    if (stat(path, &info) != 0) TRAINER_FAIL(TRAINER_BAD_USE, "%s: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode)) TRAINER_FAIL(TRAINER_BAD_USE, "%s: not a file", path);
    file = fopen(path, "rb");
    if (!file) TRAINER_FAIL(TRAINER_BAD_USE, "%s: %s", path, strerror(errno));
    if (info.st_size < (off_t)header || fread(head, 1, header, file) != header)
        TRAINER_FAIL(TRAINER_BAD_USE, "%s: truncated: the header alone has %zu bytes", path, header);
    if (trainer_big_endian(head) != magic)
        TRAINER_FAIL(TRAINER_BAD_USE, "%s: starts with 0x%08" PRIx32 ", want 0x%08" PRIx32 " (IDX, %s)", path,
                     trainer_big_endian(head), magic, dims == 3 ? "images" : "labels");
    for (int i = 0; i < dims; i++) shape[i] = trainer_big_endian(head + 4 + 4 * i);
    elements = trainer_idx_elements(path, shape, dims, (uint64_t)info.st_size - header);
    bytes = (unsigned char *)trainer_alloc(elements, 1);
    if (fread(bytes, 1, elements, file) != elements) TRAINER_FAIL(TRAINER_BAD_USE, "%s: cannot be read", path);
    fclose(file);
    return bytes;
}

/* Reads both files of a set; every label is under `classes`. */
static trainer_idx trainer_idx_read(const char *folder, const char *images, const char *labels, int classes) {
    const size_t room = strlen(folder) + strlen(images) + strlen(labels) + 2;
    char *path = (char *)trainer_alloc(room, 1);
    uint32_t shape[3], count;
    trainer_idx idx;
    snprintf(path, room, "%s/%s", folder, images);
    idx.images = trainer_idx_file(path, 3, shape);
    idx.count = shape[0];
    idx.height = shape[1];
    idx.width = shape[2];
    snprintf(path, room, "%s/%s", folder, labels);
    idx.labels = trainer_idx_file(path, 1, &count);
    if (count != idx.count)
        TRAINER_FAIL(TRAINER_BAD_USE, "%s: %" PRIu32 " labels, but %zu images in %s", path, count, idx.count, images);
    for (size_t i = 0; i < idx.count; i++)
        if (idx.labels[i] >= classes)
            TRAINER_FAIL(TRAINER_BAD_USE, "%s: label %zu is %d, want 0 to %d", path, i, idx.labels[i], classes - 1);
    free(path);
    return idx;
}

/* ---- Runs ---- */

enum { TRAINER_RUNS = 7 }; /* of one model: O0 f32; O1, O2, O3 with bf16 and f16 */

typedef struct trainer_run {
    const trainer_model *model;
    mpt_level level;
    mpt_dtype type;
    mpt_scaler_mode scaler;   /* 0: the policy's */
    mpt_histogram *gradients; /* not NULL: the weight gradients of the last epoch are added */
    int epochs;
    int number, of; /* for the progress line */

    int diverged; /* results, from here on */
    double accuracy;
    uint64_t correct; /* of the test samples */
    double rate;      /* training samples a second */
    float scale;
    uint64_t skipped;
    mpt_memory memory;
} trainer_run;

static const char *trainer_level_name(mpt_level level) {
    static const char *const names[] = {"O0", "O1", "O2", "O3"};
    return names[level];
}

/* The runs that the options select, to be freed; *selected says how many. */
static trainer_run *trainer_select(const trainer_options *o, const trainer_model *models, int count, int *selected) {
    trainer_run *runs = (trainer_run *)trainer_alloc((size_t)count * TRAINER_RUNS, sizeof *runs);
    int n = 0;
    for (int m = 0; m < count; m++)
        for (int level = MPT_O0; level <= MPT_O3; level++)
            for (int t = 0; t < 3; t++) {
                if ((level == MPT_O0) != (TRAINER_TYPES[t] == MPT_F32)) continue;
                if ((o->model >= 0 && o->model != m) || (o->level >= 0 && o->level != level)) continue;
                if (o->type >= 0 && o->type != t) continue;
                runs[n].model = &models[m];
                runs[n].level = (mpt_level)level;
                runs[n].type = TRAINER_TYPES[t];
                runs[n].epochs = o->epochs ? o->epochs : models[m].epochs;
                n++;
            }
    if (n == 0) TRAINER_FAIL(TRAINER_BAD_USE, "--policy and --type: f32 goes with O0, bf16 and f16 with O1 to O3");
    for (int i = 0; i < n; i++) {
        runs[i].number = i + 1;
        runs[i].of = n;
    }
    *selected = n;
    return runs;
}

static mpt_context *trainer_open(const trainer_options *o) {
    mpt_context_desc desc = MPT_ZERO;
    mpt_context *ctx;
    desc.threads = o->threads;
    if (o->cuda) {
#ifdef MPT_TRAINER_CUDA
        ctx = mpt_cuda_open(NULL);
        if (!ctx) TRAINER_FAIL(TRAINER_BAD_USE, "--device cuda: no usable CUDA device");
        return ctx;
#else
        TRAINER_FAIL(TRAINER_BAD_USE, "--device cuda: this build has no CUDA");
#endif
    }
    ctx = mpt_open(&desc);
    if (!ctx) TRAINER_FAIL(TRAINER_BAD_RUN, "no memory or no threads");
    return ctx;
}

static double trainer_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- Training ---- */

/* A random order of 0..n-1, the same for the same seed and epoch (Fisher and Yates). */
static void trainer_shuffle(size_t *order, size_t n, uint64_t seed, int epoch) {
    const uint64_t stream = 1 << 20; /* in the place of a tensor's id: numbers that no initial weight draws */
    for (size_t i = 0; i < n; i++) order[i] = i;
    for (size_t i = n - 1; i > 0; i--) {
        const uint64_t random = mpt_hash(seed, (uint64_t)epoch, stream, i);
        const size_t j = (size_t)((random * (i + 1)) >> 32), kept = order[i];
        order[i] = order[j];
        order[j] = kept;
    }
}

/* One run under way. */
typedef struct trainer_loop {
    const trainer_options *o;
    const trainer_data *data;
    trainer_run *run;
    mpt_context *ctx;
    mpt_model *net;
    size_t *order; /* of the training samples in this epoch */
    float *x;      /* the batch */
    int32_t *y;
    double samples, started, shown; /* samples trained; when training began, when progress was last shown */
} trainer_loop;

/* One line that updates in place on a terminal; elsewhere a plain line every tenth epoch and at the end of a run. */
static void trainer_progress(trainer_loop *t, int epoch, int epoch_done) {
    const trainer_run *run = t->run;
    const int terminal = isatty(STDOUT_FILENO);
    const double now = trainer_seconds();
    char line[128];
    if (terminal ? now - t->shown < 0.1 : !epoch_done || (epoch % 10 != 0 && epoch != run->epochs)) return;
    t->shown = now;
    snprintf(line, sizeof line, "[%2d/%d] %-6s %s %-4s  epoch %d/%d  loss %.4f  scale %.0f  %.0f samples/s",
             run->number, run->of, run->model->name, trainer_level_name(run->level), mpt_dtype_name(run->type), epoch,
             run->epochs, mpt_loss(t->net), (double)mpt_loss_scale(t->net), t->samples / (now - t->started));
    printf(terminal ? "\r%-79.79s" : "%s\n", line);
    fflush(stdout);
}

static void trainer_fail_run(const trainer_loop *t) {
    TRAINER_FAIL(TRAINER_BAD_RUN, "%s %s %s: %s", t->run->model->name, trainer_level_name(t->run->level),
                 mpt_dtype_name(t->run->type), mpt_why(t->ctx));
}

/* Falls in a straight line from --lr to almost 0 in the last epoch, so that the end of a run is calm. */
static double trainer_lr(const trainer_loop *t, int epoch) {
    const double start = t->o->lr > 0 ? t->o->lr : t->run->model->lr;
    return start * (double)(t->run->epochs - epoch + 1) / t->run->epochs;
}

static mpt_model *trainer_build(trainer_loop *t) {
    mpt_train_desc train = MPT_ZERO;
    mpt_model *net = mpt_model_new(t->ctx, mpt_policy_preset(t->run->level, t->run->type));
    if (!net) trainer_fail_run(t);
    t->run->model->layers(net);
    train.batch = t->o->batch;
    train.optimizer = mpt_adam(trainer_lr(t, 1));
    train.scaler.mode = t->run->scaler;
    train.seed = t->o->seed;
    if (mpt_model_build(net, &train) != MPT_OK) trainer_fail_run(t);
    return net;
}

/* The gradients of the last step, which stay until the next. */
static mpt_result trainer_count_gradients(trainer_loop *t) {
    mpt_params *params = mpt_model_params(t->net);
    return mpt_histogram_add(t->ctx, mpt_params_count(params, 0), mpt_f32_array(mpt_params_grad(params, 0)),
                             t->run->gradients);
}

/* One pass over the training samples in a new order; an incomplete last batch is left out. */
static mpt_result trainer_epoch(trainer_loop *t, int epoch) {
    const size_t batch = (size_t)t->o->batch, sample = t->data->sample, count = t->data->train_count;
    mpt_result result = mpt_optimizer_set_lr(mpt_model_optimizer(t->net), trainer_lr(t, epoch));
    trainer_shuffle(t->order, count, t->o->seed, epoch);
    for (size_t at = 0; result == MPT_OK && at + batch <= count; at += batch) {
        for (size_t i = 0; i < batch; i++) {
            const size_t from = t->order[at + i];
            memcpy(t->x + i * sample, t->data->train_x + from * sample, sample * sizeof(float));
            t->y[i] = t->data->train_y[from];
        }
        result = mpt_train_step(t->net, t->x, t->y);
        if (result == MPT_OK && t->run->gradients && epoch == t->run->epochs) result = trainer_count_gradients(t);
        t->samples += (double)batch;
        trainer_progress(t, epoch, at + 2 * batch > count);
    }
    return result;
}

/* Trains and tests one run. A run that diverges is told and marked, and tested as it stands. */
static void trainer_train(mpt_context *ctx, const trainer_options *o, const trainer_data *data, trainer_run *run) {
    trainer_loop t = MPT_ZERO;
    mpt_result result = MPT_OK;
    mpt_metrics metrics;
    t.ctx = ctx;
    t.o = o;
    t.data = data;
    t.run = run;
    t.order = (size_t *)trainer_alloc(data->train_count, sizeof *t.order);
    t.x = (float *)trainer_alloc((size_t)o->batch * data->sample, sizeof *t.x);
    t.y = (int32_t *)trainer_alloc((size_t)o->batch, sizeof *t.y);
    t.net = trainer_build(&t);
    t.started = trainer_seconds();
    for (int epoch = 1; epoch <= run->epochs && result == MPT_OK; epoch++) result = trainer_epoch(&t, epoch);
    run->rate = t.samples / (trainer_seconds() - t.started);
    run->diverged = result == MPT_ERROR_DIVERGED;
    if (run->diverged)
        trainer_complain("%s %s %s: %s", run->model->name, trainer_level_name(run->level), mpt_dtype_name(run->type),
                         mpt_why(ctx));
    else if (result != MPT_OK) trainer_fail_run(&t);
    run->scale = mpt_loss_scale(t.net);
    run->skipped = mpt_steps_skipped(t.net);
    run->memory = mpt_model_memory(t.net);
    if (mpt_evaluate(t.net, data->test_x, data->test_y, data->test_count, &metrics) != MPT_OK) trainer_fail_run(&t);
    run->accuracy = metrics.accuracy;
    run->correct = metrics.correct;
    mpt_model_free(t.net);
    free(t.order);
    free(t.x);
    free(t.y);
}

/* ---- Results ---- */

static void trainer_table(const trainer_run *runs, int count) {
    trainer_wipe();
    printf("\n%28s%10s%8s%49s%10s\n", "test", "loss", "skipped", "bytes of                     ", "training");
    printf("%-7s%-7s%-5s%9s%10s%8s%9s%9s%10s%9s%12s%10s\n", "model", "policy", "type", "accuracy", "scale", "steps",
           "weights", "masters", "gradients", "moments", "activations", "samples/s");
    for (int i = 0; i < count; i++) {
        const trainer_run *r = &runs[i];
        const mpt_memory *m = &r->memory;
        printf("%-7s%-7s%-5s", r->model->name, trainer_level_name(r->level), mpt_dtype_name(r->type));
        if (r->diverged) printf("%9s", "diverged");
        else printf("%7.2f %%", 100 * r->accuracy);
        printf("%10.0f%8" PRIu64 "%9zu%9zu%10zu%9zu%12zu%10.0f\n", (double)r->scale, r->skipped, m->weights, m->masters,
               m->gradients, m->moments, m->activations, r->rate);
    }
}

static void trainer_csv_check(FILE *file, const char *path, int close) {
    if (ferror(file) || (close ? fclose(file) : fflush(file)) != 0)
        TRAINER_FAIL(TRAINER_BAD_USE, "%s: %s", path, strerror(errno));
}

/* Opens the CSV file before the first run, so that a wrong name costs no training. */
static FILE *trainer_csv_open(const char *path) {
    FILE *file = fopen(path, "w");
    if (!file) TRAINER_FAIL(TRAINER_BAD_USE, "%s: %s", path, strerror(errno));
    fputs("model,policy,type,seed,epochs,test_accuracy,loss_scale,skipped_steps,weight_bytes,master_bytes,"
          "gradient_bytes,moment_bytes,activation_bytes,samples_per_s\n",
          file);
    trainer_csv_check(file, path, 0);
    return file;
}

static void trainer_csv_row(FILE *file, uint64_t seed, const trainer_run *r) {
    const mpt_memory *m = &r->memory;
    fprintf(file, "%s,%s,%s,%" PRIu64 ",%d,%.6f,%.9g,%" PRIu64 ",%zu,%zu,%zu,%zu,%zu,%.1f\n", r->model->name,
            trainer_level_name(r->level), mpt_dtype_name(r->type), seed, r->epochs, r->accuracy, (double)r->scale,
            r->skipped, m->weights, m->masters, m->gradients, m->moments, m->activations, r->rate);
}

/* All runs, the CSV file and the table. Returns the exit status. */
static int trainer_run_all(mpt_context *ctx, const trainer_options *o, const trainer_data *data, trainer_run *runs,
                           int count) {
    FILE *csv = NULL;
    int status = 0;
    if ((size_t)o->batch > data->train_count)
        TRAINER_FAIL(TRAINER_BAD_USE, "--batch %d: there are %zu training samples", o->batch, data->train_count);
    if (o->csv) csv = trainer_csv_open(o->csv);
    for (int i = 0; i < count; i++) {
        trainer_train(ctx, o, data, &runs[i]);
        if (runs[i].diverged) status = TRAINER_BAD_RUN;
        if (!csv) continue;
        trainer_csv_row(csv, o->seed, &runs[i]);
        trainer_csv_check(csv, o->csv, i + 1 == count);
    }
    trainer_table(runs, count);
    return status;
}

/* The last call of main: has everything been written? Returns the exit status. */
static int trainer_finish(int status) {
    if (fflush(stdout) == 0 && !ferror(stdout)) return status;
    trainer_complain("standard output: %s", strerror(errno));
    return TRAINER_BAD_USE;
}

#endif
