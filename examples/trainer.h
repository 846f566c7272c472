/* trainer.h - what the example trainers share: options, IDX files, the training loop, progress, checkpoints, table and
   CSV.

   It knows nothing of a data set or a net. A trainer defines the six macros below, includes mpt.h and then this file,
   reads its data into a trainer_data, and lists its nets as trainer_model:

       TRAINER_NAME     "digits"                     starts every message
       TRAINER_ABOUT    "Trains ... on ..."          first line of --help
       TRAINER_DATA     "examples/data/digits"       default of --data
       TRAINER_MODELS   "mlp|cnn|all"                names of the models in the order of their list, then all
       TRAINER_BATCH    32                           default of --batch
       TRAINER_WITHIN   0.3                          points that 16 bits may lie from fp32, means over the seeds

   Exit status: 0 done; 1 a run failed (out of memory, diverged); 2 wrong options, bad files, output not written;
   130 ended by Ctrl-C. Every failure is one line on stderr. Needs POSIX.                                             */

#ifndef TRAINER_H
#define TRAINER_H

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "../mpt_tools.h"

enum { TRAINER_BAD_RUN = 1, TRAINER_BAD_USE = 2, TRAINER_INTERRUPTED = 130 };

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

/* Three texts as one, to be freed: trainer_join(folder, "/", name). */
static char *trainer_join(const char *a, const char *b, const char *c) {
    const size_t room = strlen(a) + strlen(b) + strlen(c) + 1;
    char *text = (char *)trainer_alloc(room, 1);
    snprintf(text, room, "%s%s%s", a, b, c);
    return text;
}

/* ---- Options ---- */

static const mpt_dtype TRAINER_TYPES[] = {MPT_F32, MPT_BF16, MPT_F16}; /* the choices of --type */

typedef struct trainer_model {
    const char *name;
    void (*layers)(mpt_model *net, int input); /* adds layers and loss */
    int epochs;                                /* defaults of --epochs and --lr */
    double lr;
} trainer_model;

typedef struct trainer_options {
    const char *data, *csv, *save, *resume; /* all but data NULL: none */
    int model, level, type; /* index in the trainer's models, mpt_level, index in TRAINER_TYPES; -1: all */
    int epochs;             /* 0: the model's */
    double lr;              /* 0: the model's */
    int batch, seeds, shift, flip, threads, cuda;
    uint64_t seed;
} trainer_options;

static void trainer_help(const trainer_model *models, int count) {
    printf(
        "Usage: " TRAINER_NAME " [option value]...\n" TRAINER_ABOUT "\n\n"
        "  --data DIR                  folder of the data; default " TRAINER_DATA "\n"
        "  --model " TRAINER_MODELS "\n"
        "  --policy O0|O1|O2|O3|all    O0 fp32; O1 autocast; O2 16-bit weights with fp32 masters; O3 all 16-bit\n"
        "  --type f32|bf16|f16|all     f32 goes with O0, bf16 and f16 with O1 to O3\n"
        "  --epochs N                  passes over the training data; default the model's, below\n"
        "  --batch N                   samples in one step; default %d\n"
        "  --lr X                      largest learning rate of Adam; default the model's, below\n"
        "  --seed N                    of initial weights, shuffling and augmentation; default 1\n"
        "  --seeds N                   runs each with N seeds, from --seed on, and compares the means; default 1\n"
        "  --shift N                   moves training images by up to N pixels at random; default 0\n"
        "  --flip no|yes               mirrors half of the training images, left to right; default no\n"
        "  --threads N                 at most 64; 0, the default: one per processor\n"
        "  --device cpu|cuda           default cpu\n"
        "  --csv FILE                  writes one row per run\n"
        "  --save FILE                 writes a checkpoint of the one run selected, at its end or after Ctrl-C\n"
        "  --resume FILE               goes on from such a checkpoint, where the run with these options has stopped\n"
        "  --help\n\n"
        "Where all can be chosen it is the default.\n",
        TRAINER_BATCH);
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
    else if (strcmp(is, "save") == 0) o->save = text;
    else if (strcmp(is, "resume") == 0) o->resume = text;
    else if (strcmp(is, "model") == 0) o->model = trainer_choice(name, text, TRAINER_MODELS);
    else if (strcmp(is, "policy") == 0) o->level = trainer_choice(name, text, "O0|O1|O2|O3|all");
    else if (strcmp(is, "type") == 0) o->type = trainer_choice(name, text, "f32|bf16|f16|all");
    else if (strcmp(is, "device") == 0) o->cuda = trainer_choice(name, text, "cpu|cuda");
    else if (strcmp(is, "flip") == 0) o->flip = trainer_choice(name, text, "no|yes");
    else if (strcmp(is, "epochs") == 0) o->epochs = (int)trainer_integer(name, text, 1, 1000000);
    else if (strcmp(is, "batch") == 0) o->batch = (int)trainer_integer(name, text, 1, 1000000);
    else if (strcmp(is, "threads") == 0) o->threads = (int)trainer_integer(name, text, 0, 64);
    else if (strcmp(is, "shift") == 0) o->shift = (int)trainer_integer(name, text, 0, 64);
    else if (strcmp(is, "seeds") == 0) o->seeds = (int)trainer_integer(name, text, 1, 1000);
    else if (strcmp(is, "seed") == 0) o->seed = trainer_integer(name, text, 0, UINT64_MAX);
    else if (strcmp(is, "lr") == 0) o->lr = trainer_rate(name, text);
    else return 0;
    return 1;
}

static trainer_options trainer_parse(int argc, char **argv, const trainer_model *models, int count) {
    trainer_options o = MPT_ZERO;
    o.data = TRAINER_DATA;
    o.model = o.level = o.type = -1;
    o.batch = TRAINER_BATCH;
    o.seed = 1;
    o.seeds = 1;
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

/* Samples of a byte a value, (count, height, width, channels), and their labels. */
typedef struct trainer_set {
    size_t count;
    unsigned char *x, *y;
} trainer_set;

typedef struct trainer_data {
    size_t height, width, channels;
    trainer_set train, test;
    float value[256]; /* what the net is given for each byte */
} trainer_data;

static size_t trainer_sample(const trainer_data *data) { return data->height * data->width * data->channels; }

static void trainer_data_free(trainer_data *data) {
    free(data->train.x);
    free(data->train.y);
    free(data->test.x);
    free(data->test.y);
}

/* ---- Files ----

   What parses a file is a function of its bytes in memory that returns 0 and says why for one that it refuses. */

enum { TRAINER_WHY = 160 }; /* room for a reason */

typedef struct trainer_file {
    char *path;
    unsigned char *bytes;
    size_t size;
} trainer_file;

static void trainer_file_free(trainer_file *file) {
    free(file->path);
    free(file->bytes);
}

static trainer_file trainer_file_read(const char *folder, const char *name) {
    trainer_file file = MPT_ZERO;
    struct stat info;
    FILE *stream;
    file.path = trainer_join(folder, "/", name);
    if (stat(file.path, &info) != 0) TRAINER_FAIL(TRAINER_BAD_USE, "%s: %s", file.path, strerror(errno));
    if (!S_ISREG(info.st_mode)) TRAINER_FAIL(TRAINER_BAD_USE, "%s: not a file", file.path);
    stream = fopen(file.path, "rb");
    if (!stream) TRAINER_FAIL(TRAINER_BAD_USE, "%s: %s", file.path, strerror(errno));
    file.size = (size_t)info.st_size;
    file.bytes = (unsigned char *)trainer_alloc(file.size + 1, 1); /* + 1: never 0 */
    if (fread(file.bytes, 1, file.size, stream) != file.size)
        TRAINER_FAIL(TRAINER_BAD_USE, "%s: cannot be read", file.path);
    fclose(stream);
    return file;
}

static int trainer_refuse(char *why, const char *format, ...)
#ifdef __GNUC__
    __attribute__((format(printf, 2, 3)))
#endif
    ;
static int trainer_refuse(char *why, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(why, TRAINER_WHY, format, arguments);
    va_end(arguments);
    return 0;
}

static uint32_t trainer_big_endian(const unsigned char *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

/* An IDX file of unsigned bytes, as MNIST's are: its `dims` sizes, and *data, its elements, of which it has exactly as
   many as the sizes say. No product here can wrap: each is compared with the bytes at hand first. */
static int trainer_idx_parse(const unsigned char *bytes, size_t size, int dims, uint32_t *shape,
                             const unsigned char **data, char *why) {
    const uint32_t magic = 0x800u + (uint32_t)dims;
    const size_t header = 4 + 4 * (size_t)dims;
    size_t elements = 1, follow;
    if (size < header) return trainer_refuse(why, "truncated: %zu bytes, the header alone has %zu", size, header);
    if (trainer_big_endian(bytes) != magic)
        return trainer_refuse(why, "starts with 0x%08" PRIx32 ", want 0x%08" PRIx32 " (IDX, %s)",
                              trainer_big_endian(bytes), magic, dims == 3 ? "images" : "labels");
    follow = size - header;
    for (int i = 0; i < dims; i++) {
        shape[i] = trainer_big_endian(bytes + 4 + 4 * i);
        if (shape[i] == 0) return trainer_refuse(why, "size %d of %d in the header is 0", i + 1, dims);
        if (shape[i] > follow / elements)
            return trainer_refuse(why,
                                  "truncated: size %d of %d in the header is %" PRIu32 ", but only %zu bytes follow",
                                  i + 1, dims, shape[i], follow);
        elements *= shape[i];
    }
    if (elements < follow) return trainer_refuse(why, "%zu bytes too many behind the data", follow - elements);
    *data = bytes + header;
    return 1;
}

static int trainer_labels_check(const unsigned char *labels, size_t count, int classes, char *why) {
    for (size_t i = 0; i < count; i++)
        if (labels[i] >= classes)
            return trainer_refuse(why, "label %zu is %d, want 0 to %d", i, labels[i], classes - 1);
    return 1;
}

/* A set from its two IDX files, which are freed. Every label is under `classes`. shape: count, height, width. */
static trainer_set trainer_idx_set(trainer_file images, trainer_file labels, int classes, uint32_t shape[3]) {
    const unsigned char *x = NULL, *y = NULL;
    char why[TRAINER_WHY];
    trainer_set set;
    uint32_t count = 0;
    size_t pixels;
    if (!trainer_idx_parse(images.bytes, images.size, 3, shape, &x, why))
        TRAINER_FAIL(TRAINER_BAD_USE, "%s: %s", images.path, why);
    if (!trainer_idx_parse(labels.bytes, labels.size, 1, &count, &y, why))
        TRAINER_FAIL(TRAINER_BAD_USE, "%s: %s", labels.path, why);
    if (count != shape[0])
        TRAINER_FAIL(TRAINER_BAD_USE, "%s: %" PRIu32 " labels, but %" PRIu32 " images in %s", labels.path, count,
                     shape[0], images.path);
    if (!trainer_labels_check(y, count, classes, why)) TRAINER_FAIL(TRAINER_BAD_USE, "%s: %s", labels.path, why);
    pixels = (size_t)shape[0] * shape[1] * shape[2];
    set.count = count;
    set.x = (unsigned char *)memcpy(trainer_alloc(pixels, 1), x, pixels);
    set.y = (unsigned char *)memcpy(trainer_alloc(count, 1), y, count);
    trainer_file_free(&images);
    trainer_file_free(&labels);
    return set;
}

/* ---- Runs ---- */

enum { TRAINER_RUNS = 7 }; /* of one model: O0 f32; O1, O2, O3 with bf16 and f16 */

typedef struct trainer_run {
    const trainer_model *model;
    mpt_level level;
    mpt_dtype type;
    uint64_t seed;
    mpt_scaler_mode scaler;   /* 0: the policy's */
    mpt_histogram *gradients; /* not NULL: the weight gradients of the last epoch are added */
    int epochs;
    const char *save, *resume; /* NULL: not */
    int number, of;            /* for the progress line */

    int diverged;     /* results, from here on */
    double accuracy;  /* after the last epoch */
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

static int trainer_selects(const trainer_options *o, int model, int level, int type) {
    if ((level == MPT_O0) != (TRAINER_TYPES[type] == MPT_F32)) return 0;
    return (o->model < 0 || o->model == model) && (o->level < 0 || o->level == level) &&
           (o->type < 0 || o->type == type);
}

/* The runs that the options select, to be freed; *selected says how many. The seeds of one policy stand together. */
static trainer_run *trainer_select(const trainer_options *o, const trainer_model *models, int count, int *selected) {
    const size_t most = (size_t)count * TRAINER_RUNS * (size_t)o->seeds;
    trainer_run *runs = (trainer_run *)trainer_alloc(most, sizeof *runs);
    int n = 0;
    for (int m = 0; m < count; m++)
        for (int level = MPT_O0; level <= MPT_O3; level++)
            for (int t = 0; t < 3; t++)
                for (int seed = 0; seed < o->seeds && trainer_selects(o, m, level, t); seed++, n++) {
                    runs[n].model = &models[m];
                    runs[n].level = (mpt_level)level;
                    runs[n].type = TRAINER_TYPES[t];
                    runs[n].seed = o->seed + (uint64_t)seed;
                    runs[n].epochs = o->epochs ? o->epochs : models[m].epochs;
                }
    if (n == 0) TRAINER_FAIL(TRAINER_BAD_USE, "--policy and --type: f32 goes with O0, bf16 and f16 with O1 to O3");
    if ((o->save || o->resume) && n > 1)
        TRAINER_FAIL(TRAINER_BAD_USE, "%s is for one run, and %d are selected: want --model, --policy and --type",
                     o->save ? "--save" : "--resume", n);
    for (int i = 0; i < n; i++) {
        runs[i].save = o->save;
        runs[i].resume = o->resume;
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

/* ---- Ctrl-C ---- */

static volatile sig_atomic_t trainer_interrupted;

static void trainer_interrupt(int number) {
    (void)number;
    trainer_interrupted = 1;
}

/* The first Ctrl-C ends the training after its step; a second one ends the program at once. */
static void trainer_catch(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = trainer_interrupt;
    action.sa_flags = (int)(SA_RESTART | SA_RESETHAND);
    sigaction(SIGINT, &action, NULL);
}

/* ---- Training ---- */

/* One run under way. */
typedef struct trainer_loop {
    const trainer_options *o;
    const trainer_data *data;
    trainer_run *run;
    mpt_context *ctx;
    mpt_model *net;
    int epoch;     /* from 1 */
    size_t first;  /* step of it that comes first: 0, or where a resumed run goes on */
    int tested;    /* run->accuracy is told */
    size_t *order; /* of the training samples in this epoch */
    float *x;      /* a batch */
    int32_t *y;
    double before, samples, seconds, shown; /* samples trained before resuming, and since, in how many seconds; when
                                               progress was last shown */
} trainer_loop;

static void trainer_fail_run(const trainer_loop *t) {
    TRAINER_FAIL(TRAINER_BAD_RUN, "%s %s %s: %s", t->run->model->name, trainer_level_name(t->run->level),
                 mpt_dtype_name(t->run->type), mpt_why(t->ctx));
}

/* Steps in one epoch: an incomplete last batch is left out. */
static size_t trainer_steps(const trainer_loop *t) { return t->data->train.count / (size_t)t->o->batch; }

/* Samples a second. */
static double trainer_speed(const trainer_loop *t) { return t->seconds > 0 ? t->samples / t->seconds : 0; }

/* One line that updates in place on a terminal; elsewhere a plain line after the first epoch and every tenth of a run.
   ETA is the run's. */
static void trainer_progress(trainer_loop *t, int epoch_done) {
    const trainer_run *run = t->run;
    const int terminal = isatty(STDOUT_FILENO);
    const double rate = trainer_speed(t), now = trainer_seconds();
    const double all = (double)run->epochs * (double)trainer_steps(t) * t->o->batch;
    const long eta = (long)((all - t->before - t->samples) / rate + 0.5);
    const int tenth = t->epoch == 1 || t->epoch * 10LL / run->epochs > (t->epoch - 1) * 10LL / run->epochs;
    char line[160], accuracy[16] = "-";
    if (terminal ? now - t->shown < 0.1 && !epoch_done : !epoch_done || !tenth) return;
    t->shown = now;
    if (t->tested) snprintf(accuracy, sizeof accuracy, "%.1f%%", 100 * run->accuracy);
    snprintf(line, sizeof line, "[%d/%d] %s %s %s epoch %d/%d ETA %ld:%02ld loss %.3f test %s scale %.0f %.0f/s",
             run->number, run->of, run->model->name, trainer_level_name(run->level), mpt_dtype_name(run->type),
             t->epoch, run->epochs, eta / 60, eta % 60, mpt_loss(t->net), accuracy, (double)mpt_loss_scale(t->net),
             rate);
    printf(terminal ? "\r%-79.79s" : "%s\n", line);
    fflush(stdout);
}

/* In the place of a tensor's id: numbers that no initial weight draws. */
enum { TRAINER_SHUFFLE = 1 << 20, TRAINER_AUGMENT };

/* A random order of 0..n-1, the same for the same seed and epoch (Fisher and Yates). */
static void trainer_shuffle(size_t *order, size_t n, uint64_t seed, int epoch) {
    for (size_t i = 0; i < n; i++) order[i] = i;
    for (size_t i = n - 1; i > 0; i--) {
        const uint64_t random = mpt_hash(seed, (uint64_t)epoch, TRAINER_SHUFFLE, i);
        const size_t j = (size_t)((random * (i + 1)) >> 32), kept = order[i];
        order[i] = order[j];
        order[j] = kept;
    }
}

/* One sample as floats, down pixels lower and right pixels further right, after mirroring it if flip; bytes of 0 move
   in from outside. */
static void trainer_fill(const trainer_data *data, const unsigned char *x, int flip, long down, long right,
                         float *out) {
    const long H = (long)data->height, W = (long)data->width, C = (long)data->channels;
    for (long h = 0; h < H; h++)
        for (long w = 0; w < W; w++) {
            const long from_h = h - down, from_w = flip ? W - 1 - (w - right) : w - right;
            const int inside = from_h >= 0 && from_h < H && from_w >= 0 && from_w < W;
            for (long c = 0; c < C; c++) *out++ = data->value[inside ? x[(from_h * W + from_w) * C + c] : 0];
        }
}

/* A training sample, changed at random as the options say; the same for the same seed, epoch and sample. */
static void trainer_augment(const trainer_loop *t, size_t sample, float *out) {
    const unsigned char *x = t->data->train.x + sample * trainer_sample(t->data);
    const uint64_t span = 2 * (uint64_t)t->o->shift + 1;
    uint64_t random[3];
    for (uint64_t i = 0; i < 3; i++)
        random[i] = mpt_hash(t->run->seed, (uint64_t)t->epoch, TRAINER_AUGMENT, 3 * sample + i);
    trainer_fill(t->data, x, t->o->flip && random[0] >> 31, (long)((random[1] * span) >> 32) - t->o->shift,
                 (long)((random[2] * span) >> 32) - t->o->shift, out);
}

/* Up from a tenth of the learning rate in the first fifth of the steps, then down to 0, so that the end is calm. */
static mpt_optimizer_desc trainer_optimizer(const trainer_loop *t) {
    mpt_optimizer_desc desc = mpt_adam(t->o->lr > 0 ? t->o->lr : t->run->model->lr);
    desc.schedule.kind = MPT_SCHEDULE_ONE_CYCLE_LINEAR;
    desc.schedule.steps = (uint64_t)t->run->epochs * trainer_steps(t);
    desc.schedule.start = 0.1;
    desc.schedule.peak = 0.2;
    return desc;
}

static mpt_model *trainer_build(const trainer_loop *t) {
    const trainer_data *data = t->data;
    mpt_train_desc train = MPT_ZERO;
    mpt_model *net = mpt_model_new(t->ctx, mpt_policy_preset(t->run->level, t->run->type));
    if (!net) trainer_fail_run(t);
    t->run->model->layers(net, mpt_input(net, (int)data->height, (int)data->width, (int)data->channels));
    train.batch = t->o->batch;
    train.optimizer = trainer_optimizer(t);
    train.scaler.mode = t->run->scaler;
    train.seed = t->run->seed;
    if (mpt_model_build(net, &train) != MPT_OK) trainer_fail_run(t);
    return net;
}

/* The gradients of the last step, which stay until the next. */
static mpt_result trainer_count_gradients(trainer_loop *t) {
    mpt_params *params = mpt_model_params(t->net);
    return mpt_histogram_add(t->ctx, mpt_params_count(params, 0), mpt_f32_array(mpt_params_grad(params, 0)),
                             t->run->gradients);
}

/* One pass over the training samples in a new order, or what is left of it. */
static mpt_result trainer_epoch(trainer_loop *t) {
    const size_t batch = (size_t)t->o->batch, sample = trainer_sample(t->data), steps = trainer_steps(t);
    const double before = t->seconds, start = trainer_seconds();
    mpt_result result = MPT_OK;
    trainer_shuffle(t->order, t->data->train.count, t->run->seed, t->epoch);
    for (size_t step = t->first; result == MPT_OK && step < steps && !trainer_interrupted; step++) {
        for (size_t i = 0; i < batch; i++) {
            const size_t from = t->order[step * batch + i];
            trainer_augment(t, from, t->x + i * sample);
            t->y[i] = t->data->train.y[from];
        }
        result = mpt_train_step(t->net, t->x, t->y);
        if (result == MPT_OK && t->run->gradients && t->epoch == t->run->epochs) result = trainer_count_gradients(t);
        t->samples += (double)batch;
        t->seconds = before + trainer_seconds() - start;
        trainer_progress(t, 0);
    }
    t->first = 0;
    return result;
}

/* How many of the test samples are right? In batches, so that Ctrl-C need not wait for all of them. */
static void trainer_test(trainer_loop *t) {
    const trainer_set *test = &t->data->test;
    const size_t batch = (size_t)t->o->batch, sample = trainer_sample(t->data);
    uint64_t correct = 0;
    for (size_t at = 0; at < test->count && !trainer_interrupted; at += batch) {
        const size_t n = test->count - at < batch ? test->count - at : batch;
        mpt_metrics metrics;
        for (size_t i = 0; i < n; i++) {
            trainer_fill(t->data, test->x + (at + i) * sample, 0, 0, 0, t->x + i * sample);
            t->y[i] = test->y[at + i];
        }
        if (mpt_evaluate(t->net, t->x, t->y, n, &metrics) != MPT_OK) trainer_fail_run(t);
        correct += metrics.correct;
    }
    if (trainer_interrupted) return;
    t->run->correct = correct;
    t->run->accuracy = (double)correct / (double)test->count;
    t->tested = 1;
}

/* ---- Checkpoints ---- */

/* Before the first run, so that a wrong name costs no training. */
static void trainer_save_check(const char *save) {
    char *path = trainer_join(save, ".tmp", "");
    FILE *file = fopen(path, "w");
    if (!file) TRAINER_FAIL(TRAINER_BAD_USE, "%s: %s", path, strerror(errno));
    fclose(file);
    remove(path);
    free(path);
}

static void trainer_save(const trainer_loop *t) {
    const mpt_result result = mpt_checkpoint_save(t->net, t->run->save);
    if (result == MPT_ERROR_FILE) TRAINER_FAIL(TRAINER_BAD_USE, "%s", mpt_why(t->ctx));
    if (result != MPT_OK) trainer_fail_run(t);
}

/* Order and changes of the samples are named by seed and epoch, so the steps done say where to go on. */
static void trainer_resume(trainer_loop *t) {
    const size_t steps = trainer_steps(t);
    uint64_t done;
    if (mpt_checkpoint_load(t->net, t->run->resume) != MPT_OK)
        TRAINER_FAIL(TRAINER_BAD_USE, "--resume: %s", mpt_why(t->ctx));
    done = mpt_steps_applied(t->net) + mpt_steps_skipped(t->net);
    if (done > steps * (uint64_t)t->run->epochs)
        TRAINER_FAIL(TRAINER_BAD_USE, "--resume: %s has done %" PRIu64 " steps, and %d epochs have %" PRIu64,
                     t->run->resume, done, t->run->epochs, steps * (uint64_t)t->run->epochs);
    t->epoch = (int)(done / steps);
    t->first = (size_t)(done % steps);
    t->before = (double)done * t->o->batch;
}

/* ---- A run ---- */

static trainer_loop trainer_begin(mpt_context *ctx, const trainer_options *o, const trainer_data *data,
                                  trainer_run *run) {
    trainer_loop t = MPT_ZERO;
    t.ctx = ctx;
    t.o = o;
    t.data = data;
    t.run = run;
    t.order = (size_t *)trainer_alloc(data->train.count, sizeof *t.order);
    t.x = (float *)trainer_alloc((size_t)o->batch * trainer_sample(data), sizeof *t.x);
    t.y = (int32_t *)trainer_alloc((size_t)o->batch, sizeof *t.y);
    t.net = trainer_build(&t);
    if (run->resume) trainer_resume(&t);
    return t;
}

static void trainer_end(trainer_loop *t) {
    mpt_model_free(t->net);
    free(t->order);
    free(t->x);
    free(t->y);
}

/* Trains one run, tests it after each epoch, saves it. One that diverges is told and marked, and tested as it is. */
static void trainer_train(mpt_context *ctx, const trainer_options *o, const trainer_data *data, trainer_run *run) {
    trainer_loop t = trainer_begin(ctx, o, data, run);
    mpt_result result = MPT_OK;
    if (t.epoch == run->epochs) trainer_test(&t); /* resumed at its end */
    while (t.epoch < run->epochs && result == MPT_OK && !trainer_interrupted) {
        t.epoch++;
        result = trainer_epoch(&t);
        trainer_test(&t);
        if (result == MPT_OK && !trainer_interrupted) trainer_progress(&t, 1);
    }
    run->rate = trainer_speed(&t);
    run->diverged = result == MPT_ERROR_DIVERGED;
    if (run->diverged)
        trainer_complain("%s %s %s: %s", run->model->name, trainer_level_name(run->level), mpt_dtype_name(run->type),
                         mpt_why(ctx));
    else if (result != MPT_OK) trainer_fail_run(&t);
    run->scale = mpt_loss_scale(t.net);
    run->skipped = mpt_steps_skipped(t.net);
    run->memory = mpt_model_memory(t.net);
    if (run->save) trainer_save(&t);
    if (trainer_interrupted)
        trainer_complain("%s %s %s: interrupted in epoch %d of %d, %s%s", run->model->name,
                         trainer_level_name(run->level), mpt_dtype_name(run->type), t.epoch, run->epochs,
                         run->save ? "saved to " : "not saved", run->save ? run->save : "");
    trainer_end(&t);
}

/* ---- Results ---- */

static void trainer_table(const trainer_run *runs, int count) {
    trainer_wipe();
    printf("\n%33s%10s%8s%49s%10s\n", "test", "loss", "skipped", "bytes of                     ", "training");
    printf("%-7s%-7s%-5s%5s%9s%10s%8s%9s%9s%10s%9s%12s%10s\n", "model", "policy", "type", "seed", "accuracy", "scale",
           "steps", "weights", "masters", "gradients", "moments", "activations", "samples/s");
    for (int i = 0; i < count; i++) {
        const trainer_run *r = &runs[i];
        const mpt_memory *m = &r->memory;
        printf("%-7s%-7s%-5s%5" PRIu64, r->model->name, trainer_level_name(r->level), mpt_dtype_name(r->type), r->seed);
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

static void trainer_csv_row(FILE *file, const trainer_run *r) {
    const mpt_memory *m = &r->memory;
    fprintf(file, "%s,%s,%s,%" PRIu64 ",%d,%.6f,%.9g,%" PRIu64 ",%zu,%zu,%zu,%zu,%zu,%.1f\n", r->model->name,
            trainer_level_name(r->level), mpt_dtype_name(r->type), r->seed, r->epochs, r->accuracy, (double)r->scale,
            r->skipped, m->weights, m->masters, m->gradients, m->moments, m->activations, r->rate);
}

/* The runs of one model and policy, one for each seed. */
typedef struct trainer_spread {
    double mean, low, high;
    int diverged;
} trainer_spread;

static trainer_spread trainer_spread_of(const trainer_run *runs, int seeds) {
    trainer_spread s = {0, 1, 0, 0};
    for (int i = 0; i < seeds; i++) {
        s.mean += runs[i].accuracy / seeds;
        if (runs[i].accuracy < s.low) s.low = runs[i].accuracy;
        if (runs[i].accuracy > s.high) s.high = runs[i].accuracy;
        s.diverged |= runs[i].diverged;
    }
    return s;
}

/* Mean and spread over the seeds, and whether 16 bits learn what fp32 learns. */
static void trainer_compare(const trainer_run *runs, int count, int seeds) {
    trainer_spread fp32 = MPT_ZERO;
    const trainer_model *model = NULL; /* whose fp32 that is */
    printf(
        "\nTest accuracy over %d seeds in %%, and is the mean within %g points of fp32's?\n%-7s%-7s%-5s%8s%8s%9s%12s\n",
        seeds, TRAINER_WITHIN, "model", "policy", "type", "mean", "lowest", "highest", "to fp32");
    for (int i = 0; i + seeds <= count; i += seeds) {
        const trainer_run *r = &runs[i];
        const trainer_spread s = trainer_spread_of(r, seeds);
        const double points = 100 * (s.mean - fp32.mean);
        const int good = !s.diverged && !fp32.diverged && points <= TRAINER_WITHIN && points >= -TRAINER_WITHIN;
        printf("%-7s%-7s%-5s%8.2f%8.2f%9.2f", r->model->name, trainer_level_name(r->level), mpt_dtype_name(r->type),
               100 * s.mean, 100 * s.low, 100 * s.high);
        if (model == r->model) printf("%+12.2f  %s", points, good ? "yes" : "NO");
        printf("%s\n", s.diverged ? "  diverged" : "");
        if (r->level != MPT_O0) continue;
        fp32 = s;
        model = r->model;
    }
}

/* All runs, the CSV file and the table. Returns the exit status. */
static int trainer_run_all(mpt_context *ctx, const trainer_options *o, const trainer_data *data, trainer_run *runs,
                           int count) {
    FILE *csv = NULL;
    int status = 0, done = 0;
    if ((size_t)o->batch > data->train.count)
        TRAINER_FAIL(TRAINER_BAD_USE, "--batch %d: there are %zu training samples", o->batch, data->train.count);
    if (o->csv) csv = trainer_csv_open(o->csv);
    if (o->save) trainer_save_check(o->save);
    trainer_catch();
    while (done < count) {
        trainer_train(ctx, o, data, &runs[done]);
        if (trainer_interrupted) break;
        if (runs[done].diverged) status = TRAINER_BAD_RUN;
        if (csv) {
            trainer_csv_row(csv, &runs[done]);
            trainer_csv_check(csv, o->csv, 0);
        }
        done++;
    }
    if (csv) trainer_csv_check(csv, o->csv, 1);
    if (done) trainer_table(runs, done);
    if (o->seeds > 1 && done >= o->seeds) trainer_compare(runs, done, o->seeds);
    return status;
}

/* The last call of main: has everything been written? Returns the exit status. */
static int trainer_finish(int status) {
    if (fflush(stdout) == 0 && !ferror(stdout)) return trainer_interrupted ? TRAINER_INTERRUPTED : status;
    trainer_complain("standard output: %s", strerror(errno));
    return TRAINER_BAD_USE;
}

#endif
