/* mpt_tools.h - see why: tables, instruments and checkpoints for mpt.h.                version 0.1.0, MIT licence

   Floor 5, optional. Include it after mpt.h, and in the one source file that defines MPT_IMPLEMENTATION as well:

       #define MPT_IMPLEMENTATION
       #include "mpt.h"
       #include "mpt_tools.h"

   It stands on the public functions of mpt.h, so that everything here works on every device, and costs nothing where
   it is not used.

   CONTENTS   search for "==== NAME"
     CONFIGURATION     every macro that may be defined before the include
     TABLES            the plan of a model, its bytes by role, which products Tensor Cores take
     PRESETS           loss scalers as other systems have them
     INSTRUMENTS       a lens before a device: exponent histograms, what-if precision, the first bad operation
     CHECKPOINTS       safetensors files: weights as PyTorch names them, and whole training states
     - stop here if you only want the API -
     TABLE PARTS
     PRESET PARTS
     INSTRUMENT PARTS
     CHECKPOINT PARTS                                                                                                 */

#ifndef MPT_TOOLS_H
#define MPT_TOOLS_H

#include "mpt.h"

/* ==== CONFIGURATION ====

   The macros of mpt.h hold here as well. Only where MPT_IMPLEMENTATION is defined:
     MPT_NO_STDIO        no files: saving and loading return MPT_ERROR_UNSUPPORTED; nothing else needs stdio.h        */

#ifdef __cplusplus
extern "C" {
#endif

/* ==== TABLES ====

   Text for people. `write` is given one line at a time, with its end; no number in it depends on the locale. */

/* The plan: a line for each node under a header: name, shape, types and why, kernel, fused into, parameters, bytes,
   multiply-adds. */
MPT_DEF mpt_result mpt_model_print(const mpt_model *net, void (*write)(const char *line, void *user), void *user);

/* ==== PRESETS ====

   Loss scalers as other systems have them. */

/* The settings of other systems, quirks included. Ours is an all-zero mpt_scaler_desc. */
typedef enum mpt_scaler_system {
    MPT_SCALER_TORCH = 0, /* torch.amp.GradScaler: no smallest scale */
    MPT_SCALER_APEX,      /* apex.amp: at most 2^24 */
    MPT_SCALER_JMP,       /* jmp.DynamicLossScale: starts at 2^15, at least 1 */
    MPT_SCALER_KERAS,     /* keras LossScaleOptimizer: starts at 2^15, no bounds */
    MPT_SCALER_DEEPSPEED, /* interval 1000, hysteresis 2, late growth; its run ends at the smallest scale: patience 1 */
    MPT_SCALER_MEGATRON   /* DynamicGradScaler: starts at 2^32, interval 1000, hysteresis 2 */
} mpt_scaler_system;

MPT_DEF mpt_scaler_desc mpt_scaler_preset(mpt_scaler_system system);

/* ==== INSTRUMENTS ==== */

typedef struct mpt_fit {
    double flushed, subnormal, overflowed; /* shares of the nonzero finite values; 0 if there are none */
} mpt_fit;

/* What would become of the values of *h in `type` if all were multiplied by 2^log2_scale first: share that rounds to
   zero, that lands in the subnormals, that overflows. By exponent only, so values at a bin's edge count with their
   bin. */
MPT_DEF mpt_fit mpt_histogram_fit(const mpt_histogram *h, mpt_dtype type, int log2_scale);

/* ==== CHECKPOINTS ====

   safetensors files: the length of a JSON header, the header, which gives each tensor a name, type, shape and place,
   then the data; little-endian on every machine (huggingface.co/docs/safetensors).

   Names and layouts are PyTorch's: node name + .weight, .bias, .running_mean, .running_var; linear [outputs][inputs],
   with the inputs in C, H, W order where it reads an image; convolution [K][C / groups][R][S]. So a torch.nn.Module
   whose layers have the names of the nodes takes a file of weights by load_state_dict, strictly, and its state_dict
   loads here.

   Saving writes to path + ".tmp", flushes that to the disk where the system has a way to, and renames it to path: if
   anything fails it is removed, and an older file stays. Loading reads and checks everything before it changes the
   model, so that a file is loaded whole or not at all. The model is a built one, between steps: MPT_ERROR_ORDER after
   mpt_backward until mpt_step and mpt_scaler_update.

   MPT_ERROR_FILE: cannot be opened, read or written; or damaged: lengths, places, grammar, names, a checkpoint's sum.
   Of a sound file: MPT_ERROR_TYPE, MPT_ERROR_SHAPE: a tensor has another type or shape than the model, is missing, or
   is not the model's; MPT_ERROR_VALUE: a setting differs; MPT_ERROR_UNSUPPORTED: a type or version that is unknown
   here, or a build with MPT_NO_STDIO. MPT_ERROR_VALUE when saving: two tensors of one name, or a name that is not plain
   ASCII. */

/* The weights alone, as type F32, F16 or BF16, nearest even; running statistics as F32. */
MPT_DEF mpt_result mpt_weights_save(mpt_model *net, const char *path, mpt_dtype type);
/* From any of the three types, or from a checkpoint. Moments, scaler and counters stay as they are. num_batches_tracked
   is passed over. */
MPT_DEF mpt_result mpt_weights_load(mpt_model *net, const char *path);

/* The whole training state: weights as the policy keeps them (masters; or 16 bits and what goes with them), moments,
   running statistics, counters, journal and lr of the optimizer, lr_factor and weight_decay of its groups, the scaler.
   A run that goes on from here on the same kind of device, with any number of threads, has the same bits as one that
   never stopped. */
MPT_DEF mpt_result mpt_checkpoint_save(mpt_model *net, const char *path);
/* Into a model built with the same nodes, policy, batch, accumulate, clip_norm, seed and optimizer: what is not
   restored must be the same. */
MPT_DEF mpt_result mpt_checkpoint_load(mpt_model *net, const char *path);

#ifdef __cplusplus
} /* extern "C" */
#endif

/* ---------------------------- stop here if you only want the API ---------------------------- */

#endif /* MPT_TOOLS_H */

#if defined(MPT_IMPLEMENTATION) && !defined(MPT__TOOLS_IMPLEMENTED)
#define MPT__TOOLS_IMPLEMENTED

/* ==== TABLE PARTS ==== */

/* Text, then blanks up to column `end` of the line. */
static void mpt__put_cell(mpt__text *t, const char *line, int end, const char *format, ...) {
    char cell[64];
    va_list args;
    va_start(args, format);
    mpt__format_list(cell, sizeof cell, format, args);
    va_end(args);
    mpt__put_string(t, cell);
    do mpt__put_char(t, ' ');
    while (t->at < line + end && t->at < t->end);
}

static void mpt__print_node(const mpt_model *net, int id, char *line, size_t size) {
    mpt_node_info n;
    mpt__text t;
    t.at = line, t.end = line + size - 1;
    if (mpt_model_node(net, id, &n) != MPT_OK) return;
    mpt__put_cell(&t, line, 4, "%d", id);
    mpt__put_cell(&t, line, 20, "%s", n.name);
    mpt__put_cell(&t, line, 34, "%dx%dx%d", n.H, n.W, n.C);
    mpt__put_cell(&t, line, 40, "%s", mpt_dtype_name(n.type));
    mpt__put_cell(&t, line, 46, "%s", n.weight_type == MPT_DTYPE_COUNT ? "-" : mpt_dtype_name(n.weight_type));
    mpt__put_cell(&t, line, 65, "%s", n.kernel);
    mpt__put_cell(&t, line, 82, "%s", n.fused_into ? mpt__node_of(net, n.fused_into)->name : "-");
    mpt__put_cell(&t, line, 93, "%z", n.parameters);
    mpt__put_cell(&t, line, 104, "%z", n.bytes);
    mpt__put_cell(&t, line, 117, "%z", n.multiply_adds);
    mpt__put_cell(&t, line, 0, "%s", n.reason);
    t.at[-1] = '\n';
}

MPT_DEF mpt_result mpt_model_print(const mpt_model *net, void (*write)(const char *line, void *user), void *user) {
    char line[160];
    int id;
    MPT__TRY(mpt__need_built(net, "model_print"));
    if (!write) return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "model_print: write is NULL");
    write("    node            shape         type  reads kernel             fused into       parameters bytes      "
          "multiply-adds why the type\n",
          user);
    for (id = 1; id <= net->count; id++) {
        mpt__print_node(net, id, line, sizeof line);
        write(line, user);
    }
    return MPT_OK;
}

/* ==== PRESET PARTS ==== */

MPT_DEF mpt_scaler_desc mpt_scaler_preset(mpt_scaler_system system) {
    const int large = system == MPT_SCALER_DEEPSPEED || system == MPT_SCALER_MEGATRON;
    mpt_scaler_desc d = MPT_ZERO;
    if (system == MPT_SCALER_JMP || system == MPT_SCALER_KERAS) d.init_scale = 32768.0f;
    if (system == MPT_SCALER_MEGATRON) d.init_scale = 4294967296.0f;
    d.growth_interval = large ? 1000 : 2000;
    d.hysteresis = large ? 2 : 1;
    d.unguarded = large || system == MPT_SCALER_KERAS;
    d.no_min = system == MPT_SCALER_TORCH || system == MPT_SCALER_APEX || system == MPT_SCALER_KERAS;
    d.no_max = system != MPT_SCALER_APEX;
    d.late_growth = system == MPT_SCALER_DEEPSPEED;
    d.patience = system == MPT_SCALER_DEEPSPEED;
    return mpt_scaler_defaults(&d);
}

/* ==== INSTRUMENT PARTS ==== */

MPT_DEF mpt_fit mpt_histogram_fit(const mpt_histogram *h, mpt_dtype type, int log2_scale) {
    const mpt__format f = mpt__format_of(type);
    const int bias = (1 << (f.exponent - 1)) - 1;
    const int normal = 1 - bias, smallest = normal - f.fraction; /* exponents of the smallest normal and subnormal */
    const int largest = (int)(f.largest >> f.fraction) - bias;   /* exponent of the largest value */
    uint64_t total = 0, flushed = 0, subnormal = 0, overflowed = 0;
    mpt_fit fit = MPT_ZERO;
    int e;
    for (e = 0; e < 255; e++) {
        const int exponent = e - 127 + log2_scale;
        const uint64_t count = h->exponent[e];
        total += count;
        if (exponent < smallest - 1) flushed += count; /* under half the smallest subnormal, which rounds up to it */
        else if (exponent < normal) subnormal += count;
        else if (exponent > largest) overflowed += count;
    }
    if (total) {
        fit.flushed = (double)flushed / (double)total;
        fit.subnormal = (double)subnormal / (double)total;
        fit.overflowed = (double)overflowed / (double)total;
    }
    return fit;
}

/* ==== CHECKPOINT PARTS ====

   -- The disk -- a table, so that tests can make each of these fail. Files are FILE *; 0: failed. */

typedef struct mpt__disk {
    void *(*open)(const char *path, int writing);
    int (*size)(void *file, uint64_t *bytes); /* of a file that was just opened */
    int (*read)(void *file, void *to, size_t bytes);
    int (*write)(void *file, const void *from, size_t bytes);
    int (*close)(void *file, int flush); /* flush: it was written, bring it to the disk; closes it in any case */
    int (*rename)(const char *from, const char *to);
    int (*remove)(const char *path);
} mpt__disk;

#ifdef MPT_NO_STDIO
static const mpt__disk mpt__stdio = MPT_ZERO;
#else

#include <stdio.h>

#if defined(_WIN32)
#include <io.h>
__declspec(dllimport) int __stdcall MoveFileExA(const char *from, const char *to, unsigned long flags);
static int mpt__sync(FILE *file) { return _commit(_fileno(file)) == 0; }
static int mpt__rename(const char *from, const char *to) { return MoveFileExA(from, to, 1 | 8); } /* replace, flush */
#else
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#ifndef __cplusplus
int(fileno)(FILE *); /* -std=c99 hides them */
int(fsync)(int);
#endif
static int mpt__sync(FILE *file) { return fsync(fileno(file)) == 0; }
#else
static int mpt__sync(FILE *file) { return file != NULL; }
#endif
static int mpt__rename(const char *from, const char *to) { return rename(from, to) == 0; }
#endif

static void *mpt__open(const char *path, int writing) { return fopen(path, writing ? "wb" : "rb"); }
static int mpt__size(void *file, uint64_t *bytes) {
    long end;
    if (fseek((FILE *)file, 0, SEEK_END) != 0 || (end = ftell((FILE *)file)) < 0) return 0;
    *bytes = (uint64_t)end;
    return fseek((FILE *)file, 0, SEEK_SET) == 0;
}
static int mpt__read(void *file, void *to, size_t bytes) { return fread(to, 1, bytes, (FILE *)file) == bytes; }
static int mpt__write(void *file, const void *from, size_t bytes) {
    return fwrite(from, 1, bytes, (FILE *)file) == bytes;
}
static int mpt__close(void *file, int flush) {
    const int flushed = !flush || (fflush((FILE *)file) == 0 && mpt__sync((FILE *)file));
    return fclose((FILE *)file) == 0 && flushed;
}
static int mpt__remove(const char *path) { return remove(path) == 0; }
static const mpt__disk mpt__stdio = {mpt__open, mpt__size, mpt__read, mpt__write, mpt__close, mpt__rename, mpt__remove};
#endif

/* -- Bytes -- */

static void mpt__put_bytes(unsigned char *at, uint64_t value, size_t bytes) {
    for (; bytes--; value >>= 8) *at++ = (unsigned char)value;
}

static uint64_t mpt__get_bytes(const unsigned char *at, size_t bytes) {
    uint64_t value = 0;
    while (bytes--) value = value << 8 | at[bytes];
    return value;
}

/* Element i of an array of 16- or 32-bit elements, as this machine has them. */
static uint32_t mpt__get_element(const void *array, size_t i, size_t size) {
    return size == 2 ? ((const uint16_t *)array)[i] : ((const uint32_t *)array)[i];
}

static void mpt__put_element(void *array, size_t i, size_t size, uint32_t bits) {
    if (size == 2) ((uint16_t *)array)[i] = (uint16_t)bits;
    else ((uint32_t *)array)[i] = bits;
}

/* FNV-1a, of the bytes one after the other. */
static uint64_t mpt__sum_bytes(uint64_t sum, const unsigned char *bytes, size_t count) {
    while (count--) sum = (sum ^ *bytes++) * 0x100000001b3u;
    return sum;
}

/* -- A file on its way in or out -- */

typedef struct mpt__file_type {
    const char *name;
    size_t size;
} mpt__file_type;

/* Elements that a file may have; the first ones are mpt_dtype. */
enum { MPT__U8 = MPT_DTYPE_COUNT, MPT__U16, MPT__I64, MPT__FILE_TYPES = 16, MPT__DIMS = 8, MPT__HEADER = 100000000 };
static const mpt__file_type mpt__file_types[MPT__FILE_TYPES] = {
    {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"U8", 1},  {"U16", 2}, {"I64", 8},
    {"F64", 8}, {"I8", 1},  {"I16", 2},  {"I32", 4},     {"U32", 4},     {"U64", 8}, {"C64", 8}, {"BOOL", 1}};

typedef struct mpt__entry { /* a tensor of a file that is read, as its header has it */
    const char *name;
    int type, dims, used;
    uint64_t shape[MPT__DIMS], begin, end;
} mpt__entry;

typedef enum mpt__part_kind {
    MPT__STATE = 0, /* counters and settings: 64-bit words, see mpt__walk */
    MPT__RAW,       /* elements as the device has them */
    MPT__RUNNING,   /* half of a batch norm's statistics */
    MPT__VALUES,    /* a tensor of parameters as the numbers that mpt_params_get tells */
    MPT__SUM        /* of all bytes before it */
} mpt__part_kind;

typedef struct mpt__part { /* a tensor of a file, as the model has it */
    char name[80];
    mpt__part_kind kind;
    int id;         /* which state; node of a running statistic; tensor of values */
    int type, dims; /* in the file */
    uint64_t shape[4];
    size_t count;            /* of all elements */
    size_t columns, inner;   /* of a row; filters: channels inside, which PyTorch has outside */
    int reads;               /* node whose value the columns go with; 0: in the model's order */
    void *device;            /* RAW, RUNNING */
    const mpt__entry *entry; /* loading: where it comes from... */
    char *staging;           /* ...and what it becomes, ready to be uploaded */
} mpt__part;

typedef struct mpt__state { /* what is no array */
    mpt_optimizer_state optimizer;
    mpt_scaler_state scaler;
    double lr;
    mpt_slice *slices; /* of each tensor; behind this struct */
} mpt__state;

typedef struct mpt__job {
    mpt_model *net;
    mpt_context *ctx;
    const char *call, *path;
    const mpt__disk *disk;
    void *file;
    int full; /* a checkpoint, else weights of this type */
    int type;
    mpt__part *parts;
    int count;
    mpt__state *state;
    char *header, *at; /* reading: the header, and how far it is read */
    mpt__entry *entries;
    int entry_count, entry_capacity;
    unsigned char *data; /* of the file; writing: of one part */
    size_t data_bytes;
    char *staging;
} mpt__job;

static mpt_result mpt__job_fail(const mpt__job *job, mpt_result result, const char *format, ...) {
    char text[192];
    va_list args;
    va_start(args, format);
    mpt__format_list(text, sizeof text, format, args);
    va_end(args);
    return mpt_fail(job->ctx, result, "%s: %s, '%s'", job->call, text, job->path);
}

static size_t mpt__part_bytes(const mpt__part *part) { return part->count * mpt__file_types[part->type].size; }

/* -- Which tensors a model has -- */

/* Where PyTorch, which flattens images in C, H, W order, has element i of a node's value. */
static size_t mpt__torch_index(const mpt_model *net, int id, size_t i) {
    size_t before = 0;
    for (;;) {
        const mpt__node *node = mpt__node_of(net, id);
        const size_t pixels = (size_t)node->H * (size_t)node->W, C = (size_t)node->C;
        if (pixels > 1) return before + i % C * pixels + i / C;
        switch (node->kind) {
        case MPT__FLATTEN:
        case MPT__ACTIVATION:
        case MPT__DROPOUT:
        case MPT__NORM:
        case MPT__ADD: id = node->in[0]; break;
        case MPT__CONCAT: {
            const size_t first = (size_t)mpt__node_of(net, node->in[0])->C;
            id = node->in[i >= first];
            if (i >= first) before += first, i -= first;
            break;
        }
        default: return before + i;
        }
    }
}

/* Where element i of the model's order stands in the file. */
static size_t mpt__part_index(const mpt_model *net, const mpt__part *part, size_t i) {
    const size_t column = i % part->columns, row = i - column;
    if (part->inner) return row + column % part->inner * (part->columns / part->inner) + column / part->inner;
    return row + (part->reads ? mpt__torch_index(net, part->reads, column) : column);
}

/* Adds a tensor of one dimension. */
static mpt__part *mpt__part_add(mpt__job *job, const char *prefix, const char *name, const char *suffix,
                                mpt__part_kind kind, int type, size_t count) {
    mpt__part *part = &job->parts[job->count++];
    mpt__print(part->name, sizeof part->name, "%s%s%s", prefix, name, suffix);
    part->kind = kind;
    part->type = type;
    part->dims = 1;
    part->count = part->columns = part->shape[0] = count;
    return part;
}

/* A tensor of a node with PyTorch's shape; elements: of tensor 0, on the device. */
static void mpt__list_tensor(mpt__job *job, const char *prefix, const mpt__node *node, int tensor, mpt__part_kind kind,
                             int type, void *elements) {
    const mpt_params *params = job->net->params;
    const size_t at = mpt__params_offset(params, tensor) * mpt__file_types[type].size;
    mpt__part *part =
        mpt__part_add(job, prefix, mpt_params_name(params, tensor), "", kind, type, mpt_params_count(params, tensor));
    part->id = tensor;
    part->device = elements ? (char *)elements + at : NULL;
    if (node->kind == MPT__NORM && node->H * node->W == 1) part->reads = node->in[0];
    if (tensor == node->bias || node->kind == MPT__NORM) return;
    part->dims = node->kind == MPT__CONV2D ? 4 : 2;
    part->shape[0] = (size_t)node->C;
    part->shape[1] = part->columns = part->count / part->shape[0];
    if (node->kind == MPT__LINEAR) part->reads = node->in[0];
    else {
        part->shape[1] = part->inner = node->conv.C / node->conv.groups;
        part->shape[2] = node->conv.R, part->shape[3] = node->conv.S;
    }
}

static void mpt__list_tensors(mpt__job *job, const char *prefix, mpt__part_kind kind, int type, void *elements) {
    int id;
    for (id = 1; id <= job->net->count; id++) {
        const mpt__node *node = mpt__node_of(job->net, id);
        if (node->weight) mpt__list_tensor(job, prefix, node, node->weight, kind, type, elements);
        if (node->bias) mpt__list_tensor(job, prefix, node, node->bias, kind, type, elements);
    }
}

static void mpt__list_running(mpt__job *job) {
    static const char *const suffixes[] = {".running_mean", ".running_var"};
    int id, half;
    for (id = 1; id <= job->net->count; id++) {
        const mpt__node *node = mpt__node_of(job->net, id);
        const size_t C = (size_t)node->C;
        for (half = 0; half < 2 && mpt_model_running(job->net, id); half++) {
            mpt__part *part = mpt__part_add(job, "", node->name, suffixes[half], MPT__RUNNING, MPT_F32, C);
            part->id = id;
            part->device = job->net->running + node->running + (half ? C : 0);
            if (node->H * node->W == 1) part->reads = node->in[0];
        }
    }
}

enum { MPT__SETTINGS = 0, MPT__OPTIMIZER, MPT__SCALER, MPT__STATES, MPT__SETTINGS_VERSION = 1 };
static size_t mpt__state_words(const mpt__job *job, int which);

/* A name that needs no escape in JSON, and is like no other. */
static mpt_result mpt__list_check(const mpt__job *job) {
    int i, j;
    for (i = 0; i < job->count; i++) {
        const char *name = job->parts[i].name, *c;
        for (c = name; *c; c++)
            if (*c < 32 || *c > 126 || *c == '"' || *c == '\\')
                return mpt__job_fail(job, MPT_ERROR_VALUE, "the name '%s' is not plain ASCII without \" and \\", name);
        for (j = 0; j < i; j++)
            if (strcmp(name, job->parts[j].name) == 0)
                return mpt__job_fail(job, MPT_ERROR_VALUE, "two tensors are named '%s'", name);
    }
    return MPT_OK;
}

/* All tensors, those of wide elements first: then PyTorch finds each at a multiple of its element's size. */
static mpt_result mpt__list(mpt__job *job) {
    static const char *const states[] = {"mpt.settings", "mpt.optimizer", "mpt.scaler"};
    static const char *const moments[] = {"mpt.moment1.", "mpt.moment2.", "mpt.moment3."};
    mpt_params *params = job->net->params;
    const int masters = params->master != NULL;
    const size_t most = MPT__STATES + 1 + 2 * (size_t)job->net->count + 5 * (size_t)params->count;
    int i;
    job->parts = (mpt__part *)mpt__host_alloc(job->ctx, most * sizeof *job->parts);
    if (!job->parts) return MPT_ERROR_NO_MEMORY;
    for (i = 0; i < MPT__STATES && job->full; i++)
        mpt__part_add(job, states[i], "", "", MPT__STATE, MPT__I64, mpt__state_words(job, i))->id = i;
    for (i = 1; i <= 3 && job->full; i++) {
        float *moment = mpt_optimizer_moment(job->net->opt, i, 0);
        if (moment) mpt__list_tensors(job, moments[i - 1], MPT__RAW, MPT_F32, moment);
    }
    mpt__list_running(job);
    if (job->full && !masters) mpt__list_tensors(job, "", MPT__RAW, (int)params->copy.type, params->copy.data);
    else mpt__list_tensors(job, "", MPT__VALUES, job->full ? (int)MPT_F32 : job->type, NULL);
    if (job->full && params->low)
        mpt__list_tensors(job, "mpt.low.", MPT__RAW,
                          params->desc.master == MPT_MASTER_SPLIT ? MPT__U16 : (int)params->copy.type, params->low);
    if (job->full) mpt__part_add(job, "mpt.sum", "", "", MPT__SUM, MPT__U8, 8);
    return mpt__list_check(job);
}

/* -- Counters and settings -- one list of members each, walked to count the words, to write them and to read them */

typedef struct mpt__walk {
    unsigned char *at; /* the next 8 bytes; NULL: only counted */
    int reading;
    size_t words;
    const char *node, *differs; /* the first member that reading has changed, "" or the node before it... */
    double theirs, ours;        /* ...what the file has, and what was there */
    const char *unfit;          /* a member that cannot hold what the file has */
} mpt__walk;

static uint64_t mpt__walk_word(mpt__walk *w, uint64_t ours) {
    uint64_t theirs = ours;
    w->words++;
    if (!w->at) return ours;
    if (w->reading) theirs = mpt__get_bytes(w->at, 8);
    else mpt__put_bytes(w->at, ours, 8);
    w->at += 8;
    return theirs;
}

static void mpt__walk_differs(mpt__walk *w, const char *name, double theirs, double ours) {
    if (w->differs) return;
    w->differs = name;
    w->theirs = theirs, w->ours = ours;
}

static uint64_t mpt__walk_uint64_t(mpt__walk *w, const char *name, uint64_t ours) {
    const uint64_t theirs = mpt__walk_word(w, ours);
    if (theirs != ours) mpt__walk_differs(w, name, (double)theirs, (double)ours);
    return theirs;
}

static int mpt__walk_int(mpt__walk *w, const char *name, int ours) {
    const int64_t theirs = (int64_t)mpt__walk_word(w, (uint64_t)(int64_t)ours);
    if (theirs != ours) mpt__walk_differs(w, name, (double)theirs, ours);
    if (theirs != (int)theirs) w->unfit = name;
    return (int)theirs;
}

static double mpt__walk_double(mpt__walk *w, const char *name, double ours) {
    double theirs;
    uint64_t bits, kept;
    memcpy(&kept, &ours, sizeof kept);
    bits = mpt__walk_word(w, kept);
    memcpy(&theirs, &bits, sizeof theirs);
    if (bits != kept) mpt__walk_differs(w, name, theirs, ours);
    return theirs;
}

static float mpt__walk_float(mpt__walk *w, const char *name, float ours) {
    return mpt__float((uint32_t)mpt__walk_int(w, name, (int)mpt__bits(ours)));
}

/* X(type of the member, what it is walked as, member of s) */
/* clang-format off */
#define MPT__SCALER_MEMBERS(X) \
    X(uint32_t, int, version) X(float, float, scale) X(int32_t, int, growth_tracker) X(int32_t, int, hysteresis_left) \
    X(int32_t, int, stuck) X(uint64_t, uint64_t, updates) X(uint64_t, uint64_t, overflows) \
    X(mpt_scaler_mode, int, desc.mode) X(float, float, desc.init_scale) X(double, double, desc.growth_factor) \
    X(double, double, desc.backoff_factor) X(float, float, desc.min_scale) X(float, float, desc.max_scale) \
    X(int, int, desc.growth_interval) X(int, int, desc.hysteresis) X(int, int, desc.patience) \
    X(int, int, desc.refill_when_clean) X(int, int, desc.late_growth) X(int, int, desc.unguarded) \
    X(int, int, desc.no_min) X(int, int, desc.no_max)
#define MPT__OPTIMIZER_MEMBERS(X) \
    X(uint32_t, int, version) X(int32_t, int, found) X(uint64_t, uint64_t, attempted) X(uint64_t, uint64_t, applied) \
    X(uint64_t, uint64_t, skipped) X(double, double, beta1_power) X(double, double, beta2_power) \
    X(double, double, grad_norm) X(double, double, inv_scale) X(double, double, clip) X(double, double, clip_value) \
    X(uint64_t, uint64_t, moved) X(uint64_t, uint64_t, lost) X(double, double, scan.sum_squares) \
    X(uint64_t, uint64_t, scan.inf) X(uint64_t, uint64_t, scan.nan) X(uint64_t, uint64_t, scan.first)
#define MPT__SKIP_MEMBERS(X) \
    X(uint64_t, uint64_t, step) X(float, float, scale) X(int32_t, int, tensor) X(uint64_t, uint64_t, inf) \
    X(uint64_t, uint64_t, nan)
#define MPT__TRAIN_MEMBERS(X) \
    X(int, int, batch) X(int, int, accumulate) X(double, double, clip_norm) X(uint64_t, uint64_t, seed) \
    X(mpt_optimizer_kind, int, optimizer.kind) X(int, int, optimizer.nesterov) X(int, int, optimizer.amsgrad) \
    X(int, int, optimizer.maximize) X(int, int, optimizer.meter) X(double, double, optimizer.momentum) \
    X(double, double, optimizer.dampening) X(double, double, optimizer.beta1) X(double, double, optimizer.beta2) \
    X(double, double, optimizer.eps) X(mpt_schedule_kind, int, optimizer.schedule.kind) \
    X(uint64_t, uint64_t, optimizer.schedule.warmup) X(double, double, optimizer.schedule.warmup_start) \
    X(uint64_t, uint64_t, optimizer.schedule.steps) X(double, double, optimizer.schedule.low) \
    X(double, double, optimizer.schedule.start) X(double, double, optimizer.schedule.peak)
#define MPT__NODE_MEMBERS(X) \
    X(mpt__node_kind, int, kind) X(int, int, H) X(int, int, W) X(mpt_activation, int, act) X(float, float, p) \
    X(float, float, norm_shape.eps) X(float, float, momentum) X(mpt_dtype, int, policy.param) \
    X(mpt_dtype, int, policy.compute) X(mpt_dtype, int, type) X(mpt_dtype, int, grad_type)
/* clang-format on */
#define MPT__X(type, walk, member) s->member = (type)mpt__walk_##walk(w, #member, (walk)s->member);

static void mpt__walk_scaler(mpt__walk *w, mpt_scaler_state *s) { MPT__SCALER_MEMBERS(MPT__X) }
static void mpt__walk_counters(mpt__walk *w, mpt_optimizer_state *s) { MPT__OPTIMIZER_MEMBERS(MPT__X) }
static void mpt__walk_skip(mpt__walk *w, mpt_skip *s) { MPT__SKIP_MEMBERS(MPT__X) }
static void mpt__walk_train(mpt__walk *w, mpt_train_desc *s) { MPT__TRAIN_MEMBERS(MPT__X) }
static void mpt__walk_node(mpt__walk *w, mpt__node *s) { MPT__NODE_MEMBERS(MPT__X) }
#undef MPT__X

/* What is not restored, but must be the same: walked in copies. */
static void mpt__walk_settings(mpt__walk *w, const mpt_model *net) {
    mpt_train_desc train = mpt_model_train(net);
    int id;
    train.optimizer = mpt_optimizer_get_desc(net->opt);
    mpt__walk_int(w, "version", MPT__SETTINGS_VERSION);
    mpt__walk_train(w, &train);
    mpt__walk_int(w, "kind of masters", (int)net->params->desc.master);
    for (id = 1; id <= net->count; id++) {
        mpt__node node = *mpt__node_of(net, id);
        if (!w->differs) w->node = mpt__node_of(net, id)->name;
        mpt__walk_node(w, &node);
    }
}

static void mpt__walk_optimizer(mpt__walk *w, mpt__state *state, int tensors) {
    int i;
    mpt__walk_counters(w, &state->optimizer);
    for (i = 0; i < MPT_JOURNAL; i++) mpt__walk_skip(w, &state->optimizer.journal[i]);
    state->lr = mpt__walk_double(w, "lr", state->lr);
    for (i = 0; i < tensors; i++) {
        state->slices[i].lr_factor = mpt__walk_double(w, "lr_factor", state->slices[i].lr_factor);
        state->slices[i].weight_decay = mpt__walk_double(w, "weight_decay", state->slices[i].weight_decay);
    }
}

static mpt__walk mpt__walk_state(const mpt__job *job, int which, unsigned char *at, int reading) {
    mpt__walk w = MPT_ZERO;
    w.at = at;
    w.reading = reading;
    w.node = "";
    if (which == MPT__SETTINGS) mpt__walk_settings(&w, job->net);
    if (which == MPT__OPTIMIZER) mpt__walk_optimizer(&w, job->state, job->net->params->count);
    if (which == MPT__SCALER) mpt__walk_scaler(&w, &job->state->scaler);
    return w;
}

static size_t mpt__state_words(const mpt__job *job, int which) { return mpt__walk_state(job, which, NULL, 0).words; }

/* Room for the state, with what the model has. */
static mpt_result mpt__state_new(mpt__job *job) {
    const mpt_optimizer *opt = job->net->opt;
    const size_t table = (size_t)job->net->params->count * sizeof(mpt_slice);
    mpt__state *state = (mpt__state *)mpt__host_alloc(job->ctx, sizeof *state + table);
    if (!state) return MPT_ERROR_NO_MEMORY;
    job->state = state;
    state->slices = (mpt_slice *)(state + 1);
    state->lr = mpt_optimizer_get_desc(opt).lr;
    memcpy(state->slices, opt->slices, table);
    MPT__TRY(mpt_optimizer_get_state(job->net->opt, &state->optimizer));
    return mpt_scaler_get_state(job->net->scaler, &state->scaler);
}

/* -- Saving -- */

static void mpt__put_shape(mpt__text *t, int dims, const uint64_t *shape) {
    int d;
    mpt__put_char(t, '[');
    for (d = 0; d < dims; d++) {
        if (d) mpt__put_char(t, ',');
        mpt__put_unsigned(t, shape[d]);
    }
    mpt__put_char(t, ']');
}

/* {"__metadata__":{"format":"pt"},"fc.weight":{"dtype":"F32","shape":[3,2],"data_offsets":[0,24]}}, blanks to a multiple
   of 8 */
static size_t mpt__header_text(const mpt__job *job, char *out, size_t size) {
    size_t at = 0;
    mpt__text t;
    int i;
    t.at = out, t.end = out + size - 1;
    mpt__put_string(&t, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (i = 0; i < job->count; i++) {
        const mpt__part *part = &job->parts[i];
        mpt__put_string(&t, ",\"");
        mpt__put_string(&t, part->name);
        mpt__put_string(&t, "\":{\"dtype\":\"");
        mpt__put_string(&t, mpt__file_types[part->type].name);
        mpt__put_string(&t, "\",\"shape\":");
        mpt__put_shape(&t, part->dims, part->shape);
        mpt__put_string(&t, ",\"data_offsets\":[");
        mpt__put_unsigned(&t, at);
        mpt__put_char(&t, ',');
        mpt__put_unsigned(&t, at += mpt__part_bytes(part));
        mpt__put_string(&t, "]}");
    }
    mpt__put_char(&t, '}');
    while ((t.at - out) % 8) mpt__put_char(&t, ' ');
    return (size_t)(t.at - out);
}

static mpt_result mpt__need_written(const mpt__job *job, const void *bytes, size_t count) {
    if (job->disk->write(job->file, bytes, count)) return MPT_OK;
    return mpt__job_fail(job, MPT_ERROR_FILE, "%z bytes could not be written to the temporary file", count);
}

static mpt_result mpt__write_header(const mpt__job *job) {
    const size_t size = 64 + (size_t)job->count * 320;
    char *text = (char *)mpt__host_alloc(job->ctx, size);
    unsigned char length[8];
    mpt_result r = text ? MPT_OK : MPT_ERROR_NO_MEMORY;
    if (text) {
        const size_t bytes = mpt__header_text(job, text, size);
        mpt__put_bytes(length, bytes, sizeof length);
        r = mpt__need_written(job, length, sizeof length);
        if (r == MPT_OK) r = mpt__need_written(job, text, bytes);
    }
    mpt__host_free(job->ctx, text);
    return r;
}

/* Elements of the model in `raw` to bytes of the file in job->data. */
static void mpt__pack(const mpt__job *job, const mpt__part *part, const void *raw) {
    const size_t size = mpt__file_types[part->type].size, from = part->kind == MPT__VALUES ? sizeof(float) : size;
    size_t i;
    for (i = 0; i < part->count; i++) {
        uint32_t bits = mpt__get_element(raw, i, from);
        if (from != size)
            bits = mpt_narrow(mpt__float(bits), (mpt_dtype)part->type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0);
        mpt__put_bytes(job->data + mpt__part_index(job->net, part, i) * size, bits, size);
    }
}

static mpt_result mpt__write_part(mpt__job *job, const mpt__part *part, uint64_t *sum) {
    const size_t bytes = mpt__part_bytes(part);
    void *raw = job->staging;
    if (part->kind == MPT__STATE) mpt__walk_state(job, part->id, job->data, 0);
    else if (part->kind == MPT__SUM) mpt__put_bytes(job->data, *sum, bytes);
    else {
        if (part->kind == MPT__VALUES) MPT__TRY(mpt_params_get(job->net->params, part->id, (float *)raw));
        else MPT__TRY(mpt_download(job->ctx, raw, part->device, bytes));
        mpt__pack(job, part, raw);
    }
    *sum = mpt__sum_bytes(*sum, job->data, bytes);
    return mpt__need_written(job, job->data, bytes);
}

static mpt_result mpt__write_all(mpt__job *job) {
    size_t most = 0;
    uint64_t sum = 0;
    int i;
    for (i = 0; i < job->count; i++)
        if (job->parts[i].count > most) most = job->parts[i].count;
    job->data = (unsigned char *)mpt__host_alloc(job->ctx, most * 8);
    job->staging = (char *)mpt__host_alloc(job->ctx, most * sizeof(float));
    if (!job->data || !job->staging) return MPT_ERROR_NO_MEMORY;
    MPT__TRY(mpt__write_header(job));
    for (i = 0; i < job->count; i++) MPT__TRY(mpt__write_part(job, &job->parts[i], &sum));
    return MPT_OK;
}

/* The temporary file becomes the file, or goes. */
static mpt_result mpt__save_to(mpt__job *job, const char *temporary) {
    const mpt__disk *disk = job->disk;
    mpt_result r;
    int closed;
    job->file = disk->open(temporary, 1);
    if (!job->file) return mpt__job_fail(job, MPT_ERROR_FILE, "'%s' cannot be opened to be written", temporary);
    r = mpt__write_all(job);
    closed = disk->close(job->file, r == MPT_OK);
    if (r == MPT_OK && !closed) r = mpt__job_fail(job, MPT_ERROR_FILE, "'%s' cannot be brought to the disk", temporary);
    if (r == MPT_OK && !disk->rename(temporary, job->path))
        r = mpt__job_fail(job, MPT_ERROR_FILE, "'%s' cannot be renamed to it", temporary);
    if (r != MPT_OK) disk->remove(temporary);
    return r;
}

static mpt_result mpt__save_file(mpt__job *job) {
    const size_t length = strlen(job->path);
    char *temporary;
    mpt_result r;
    MPT__TRY(mpt__state_new(job));
    MPT__TRY(mpt__list(job));
    temporary = (char *)mpt__host_alloc(job->ctx, length + 5);
    if (!temporary) return MPT_ERROR_NO_MEMORY;
    memcpy(temporary, job->path, length);
    memcpy(temporary + length, ".tmp", 5);
    r = mpt__save_to(job, temporary);
    mpt__host_free(job->ctx, temporary);
    return r;
}

/* -- Reading a header -- JSON of this one form; a 0 takes the place of the quote that ends a
   string, and stands behind the header */

static mpt_result mpt__json_fail(const mpt__job *job, const char *what) {
    return mpt__job_fail(job, MPT_ERROR_FILE, "byte %z of the header: %s", (size_t)(job->at - job->header), what);
}

static int mpt__json_take(mpt__job *job, char c) {
    while (*job->at && strchr(" \t\r\n", *job->at)) job->at++;
    if (*job->at != c || !c) return 0;
    job->at++;
    return 1;
}

static mpt_result mpt__json_need(mpt__job *job, char c) {
    char what[] = "want '?'";
    what[6] = c;
    return mpt__json_take(job, c) ? MPT_OK : mpt__json_fail(job, what);
}

/* As it stands, escapes and all: no tensor of a model has a name that needs one. */
static mpt_result mpt__json_string(mpt__job *job, const char **out) {
    MPT__TRY(mpt__json_need(job, '"'));
    for (*out = job->at; *job->at != '"'; job->at++) {
        if (*job->at == '\\') job->at++;
        if ((unsigned char)*job->at < 32) return mpt__json_fail(job, "a string with a control code, or without an end");
    }
    *job->at++ = 0;
    return MPT_OK;
}

static mpt_result mpt__json_number(mpt__job *job, uint64_t *out) {
    const char *first;
    mpt__json_take(job, 0); /* blanks */
    first = job->at;
    for (*out = 0; *job->at >= '0' && *job->at <= '9'; job->at++) {
        const uint64_t digit = (uint64_t)(*job->at - '0');
        if (*out > ((uint64_t)-1 - digit) / 10) return mpt__json_fail(job, "a number of over 64 bits");
        *out = *out * 10 + digit;
    }
    if (job->at == first || (*first == '0' && job->at > first + 1)) return mpt__json_fail(job, "want a whole number");
    return MPT_OK;
}

static mpt_result mpt__json_numbers(mpt__job *job, uint64_t *out, int most, int *count) {
    *count = 0;
    MPT__TRY(mpt__json_need(job, '['));
    if (mpt__json_take(job, ']')) return MPT_OK;
    do {
        if (*count == most) return mpt__json_fail(job, "too many numbers");
        MPT__TRY(mpt__json_number(job, &out[(*count)++]));
    } while (mpt__json_take(job, ','));
    return mpt__json_need(job, ']');
}

/* Texts by name, which mean nothing here. */
static mpt_result mpt__json_metadata(mpt__job *job) {
    const char *text;
    MPT__TRY(mpt__json_need(job, '{'));
    if (mpt__json_take(job, '}')) return MPT_OK;
    do {
        MPT__TRY(mpt__json_string(job, &text));
        MPT__TRY(mpt__json_need(job, ':'));
        MPT__TRY(mpt__json_string(job, &text));
    } while (mpt__json_take(job, ','));
    return mpt__json_need(job, '}');
}

static mpt_result mpt__json_type(mpt__job *job, mpt__entry *entry) {
    const char *name;
    MPT__TRY(mpt__json_string(job, &name));
    for (entry->type = 0; entry->type < MPT__FILE_TYPES; entry->type++)
        if (strcmp(name, mpt__file_types[entry->type].name) == 0) return MPT_OK;
    return mpt__job_fail(job, MPT_ERROR_UNSUPPORTED, "'%s' has the unknown type '%s'", entry->name, name);
}

/* The three members in any order, each once. */
static mpt_result mpt__json_tensor(mpt__job *job, mpt__entry *entry) {
    static const char *const members[] = {"dtype", "shape", "data_offsets"};
    uint64_t places[2] = {0, 0};
    const char *key;
    int seen = 0, count = 0, member;
    MPT__TRY(mpt__json_need(job, '{'));
    do {
        MPT__TRY(mpt__json_string(job, &key));
        MPT__TRY(mpt__json_need(job, ':'));
        for (member = 0; member < 3 && strcmp(key, members[member]) != 0; member++) {}
        if (member == 3 || seen & 1 << member) return mpt__json_fail(job, "a member that is unknown, or there twice");
        seen |= 1 << member;
        if (member == 0) MPT__TRY(mpt__json_type(job, entry));
        if (member == 1) MPT__TRY(mpt__json_numbers(job, entry->shape, MPT__DIMS, &entry->dims));
        if (member == 2) MPT__TRY(mpt__json_numbers(job, places, 2, &count));
    } while (mpt__json_take(job, ','));
    MPT__TRY(mpt__json_need(job, '}'));
    if (seen != 7 || count != 2) return mpt__json_fail(job, "a tensor without type, shape or both its places");
    entry->begin = places[0], entry->end = places[1];
    return MPT_OK;
}

static mpt_result mpt__json_member(mpt__job *job, int *metadata) {
    mpt__entry *entry, *table;
    const char *name;
    MPT__TRY(mpt__json_string(job, &name));
    MPT__TRY(mpt__json_need(job, ':'));
    if (strcmp(name, "__metadata__") == 0) {
        if ((*metadata)++) return mpt__json_fail(job, "__metadata__ is there twice");
        return mpt__json_metadata(job);
    }
    table = (mpt__entry *)mpt__grow(job->ctx, job->entries, job->entry_count, &job->entry_capacity, sizeof *table);
    if (!table) return MPT_ERROR_NO_MEMORY;
    job->entries = table;
    entry = &table[job->entry_count++];
    memset(entry, 0, sizeof *entry);
    entry->name = name;
    return mpt__json_tensor(job, entry);
}

static mpt_result mpt__json_header(mpt__job *job, size_t bytes) {
    int metadata = 0;
    job->at = job->header;
    if (*job->at != '{') return mpt__json_fail(job, "want '{'");
    job->at++;
    if (!mpt__json_take(job, '}')) {
        do MPT__TRY(mpt__json_member(job, &metadata));
        while (mpt__json_take(job, ','));
        MPT__TRY(mpt__json_need(job, '}'));
    }
    mpt__json_take(job, 0);
    return job->at == job->header + bytes ? MPT_OK : mpt__json_fail(job, "want the end");
}

/* -- Reading a file -- */

static int mpt__lies_before(const mpt__entry *a, const mpt__entry *b) {
    return a->begin != b->begin ? a->begin < b->begin : a->end < b->end;
}

/* By place. Heapsort: in place, and no file can make it slow. */
static void mpt__sort(mpt__entry *entries, size_t count) {
    size_t start = count / 2, end = count, parent, child;
    mpt__entry kept;
    while (end > 1) {
        if (start) kept = entries[--start];
        else kept = entries[--end], entries[end] = entries[0];
        for (parent = start; (child = 2 * parent + 1) < end; parent = child) {
            if (child + 1 < end && mpt__lies_before(&entries[child], &entries[child + 1])) child++;
            if (!mpt__lies_before(&kept, &entries[child])) break;
            entries[parent] = entries[child];
        }
        entries[parent] = kept;
    }
}

/* As many bytes as type and shape say. */
static mpt_result mpt__check_entry(const mpt__job *job, const mpt__entry *entry) {
    uint64_t bytes = mpt__file_types[entry->type].size;
    int d, empty = 0;
    for (d = 0; d < entry->dims; d++) empty |= !entry->shape[d];
    for (d = 0; d < entry->dims && !empty; d++) {
        if (entry->shape[d] > (uint64_t)-1 / bytes)
            return mpt__job_fail(job, MPT_ERROR_FILE, "the size of '%s' overflows", entry->name);
        bytes *= entry->shape[d];
    }
    if (empty) bytes = 0;
    if (entry->end < entry->begin || entry->end - entry->begin != bytes)
        return mpt__job_fail(job, MPT_ERROR_FILE, "'%s' has %z bytes by its shape, but lies from %z to %z", entry->name,
                             (size_t)bytes, (size_t)entry->begin, (size_t)entry->end);
    return MPT_OK;
}

/* The tensors fill the data, one after the other. */
static mpt_result mpt__check_layout(mpt__job *job) {
    uint64_t at = 0;
    int i;
    mpt__sort(job->entries, (size_t)job->entry_count);
    for (i = 0; i < job->entry_count; i++) {
        const mpt__entry *entry = &job->entries[i];
        MPT__TRY(mpt__check_entry(job, entry));
        if (entry->begin != at)
            return mpt__job_fail(job, MPT_ERROR_FILE, "'%s' starts at %z, but the data before it ends at %z",
                                 entry->name, (size_t)entry->begin, (size_t)at);
        at = entry->end;
    }
    if (at == job->data_bytes) return MPT_OK;
    return mpt__job_fail(job, MPT_ERROR_FILE, "the tensors have %z bytes, but %z follow the header", (size_t)at,
                         job->data_bytes);
}

static mpt_result mpt__read_file(mpt__job *job) {
    const mpt__disk *disk = job->disk;
    unsigned char length[8];
    uint64_t size, header;
    if (!disk->size(job->file, &size) || size < sizeof length || !disk->read(job->file, length, sizeof length))
        return mpt__job_fail(job, MPT_ERROR_FILE, "cannot be read, or has under 8 bytes");
    header = mpt__get_bytes(length, sizeof length);
    size -= sizeof length;
    if (header > size || header > MPT__HEADER || size - header > (size_t)-1 / 2)
        return mpt__job_fail(job, MPT_ERROR_FILE, "a header of %z bytes (at most %d), and %z bytes follow",
                             (size_t)header, (int)MPT__HEADER, (size_t)size);
    job->header = (char *)mpt__host_alloc(job->ctx, (size_t)header + 1);
    if (!job->header) return MPT_ERROR_NO_MEMORY;
    if (!disk->read(job->file, job->header, (size_t)header))
        return mpt__job_fail(job, MPT_ERROR_FILE, "the header cannot be read");
    job->data_bytes = (size_t)(size - header);
    MPT__TRY(mpt__json_header(job, (size_t)header));
    MPT__TRY(mpt__check_layout(job));
    job->data = (unsigned char *)mpt__host_alloc(job->ctx, job->data_bytes);
    if (!job->data) return MPT_ERROR_NO_MEMORY;
    return disk->read(job->file, job->data, job->data_bytes)
               ? MPT_OK
               : mpt__job_fail(job, MPT_ERROR_FILE, "its %z bytes of data cannot be read", job->data_bytes);
}

/* -- Loading -- */

static const unsigned char *mpt__part_source(const mpt__job *job, const mpt__part *part) {
    return job->data + part->entry->begin;
}

/* Each state begins with its version. */
static mpt_result mpt__match_version(const mpt__job *job, const mpt__part *part) {
    static const unsigned versions[] = {MPT__SETTINGS_VERSION, MPT_OPTIMIZER_STATE_VERSION, MPT_SCALER_STATE_VERSION};
    const uint64_t version =
        part->entry->end - part->entry->begin < 8 ? 0 : mpt__get_bytes(mpt__part_source(job, part), 8);
    if (version == versions[part->id]) return MPT_OK;
    return mpt__job_fail(job, MPT_ERROR_UNSUPPORTED, "'%s' has version %z, this is version %d", part->name,
                         (size_t)version, (int)versions[part->id]);
}

static mpt_result mpt__match_shape(const mpt__job *job, const mpt__part *part) {
    const mpt__entry *entry = part->entry;
    char shapes[2][64];
    mpt__text t;
    if (entry->dims == part->dims && memcmp(entry->shape, part->shape, (size_t)part->dims * sizeof *part->shape) == 0)
        return MPT_OK;
    t.at = shapes[0], t.end = shapes[0] + sizeof shapes[0] - 1;
    mpt__put_shape(&t, entry->dims, entry->shape);
    t.at = shapes[1], t.end = shapes[1] + sizeof shapes[1] - 1;
    mpt__put_shape(&t, part->dims, part->shape);
    return mpt__job_fail(job, MPT_ERROR_SHAPE, "'%s' is %s, the model's is %s", part->name, shapes[0], shapes[1]);
}

/* The one tensor with the name of the part. */
static mpt_result mpt__match_name(const mpt__job *job, mpt__part *part) {
    int i;
    for (i = 0; i < job->entry_count; i++) {
        if (strcmp(job->entries[i].name, part->name) != 0) continue;
        if (part->entry) return mpt__job_fail(job, MPT_ERROR_FILE, "two tensors are named '%s'", part->name);
        part->entry = &job->entries[i];
        job->entries[i].used = 1;
    }
    return part->entry ? MPT_OK : mpt__job_fail(job, MPT_ERROR_SHAPE, "'%s' is missing", part->name);
}

/* With its type, or weights in any of the three, and its shape. */
static mpt_result mpt__match(const mpt__job *job, mpt__part *part) {
    MPT__TRY(mpt__match_name(job, part));
    if (part->entry->type != part->type && (job->full || part->entry->type > (int)MPT_BF16))
        return mpt__job_fail(job, MPT_ERROR_TYPE, "'%s' is %s, not %s", part->name,
                             mpt__file_types[part->entry->type].name, mpt__file_types[part->type].name);
    if (part->kind == MPT__STATE) MPT__TRY(mpt__match_version(job, part));
    return mpt__match_shape(job, part);
}

/* Weights may stand in a checkpoint, or beside what PyTorch's batch norm counts. */
static int mpt__may_stay(const mpt__job *job, const mpt__entry *entry) {
    static const char batches[] = ".num_batches_tracked";
    const size_t length = strlen(entry->name), end = sizeof batches - 1;
    if (entry->used) return 1;
    return !job->full &&
           (strncmp(entry->name, "mpt.", 4) == 0 || (length > end && strcmp(entry->name + length - end, batches) == 0));
}

static mpt_result mpt__match_all(mpt__job *job) {
    int i;
    for (i = 0; i < job->count; i++) MPT__TRY(mpt__match(job, &job->parts[i]));
    for (i = 0; i < job->entry_count; i++)
        if (!mpt__may_stay(job, &job->entries[i]))
            return mpt__job_fail(job, MPT_ERROR_SHAPE, "'%s' is not in the model", job->entries[i].name);
    return MPT_OK;
}

static mpt_result mpt__check_sum(const mpt__job *job) {
    const mpt__part *part = &job->parts[job->count - 1];
    const unsigned char *at = mpt__part_source(job, part);
    uint64_t sum = 0;
    int i;
    for (i = 0; i < job->count - 1; i++)
        sum = mpt__sum_bytes(sum, mpt__part_source(job, &job->parts[i]), mpt__part_bytes(&job->parts[i]));
    if (sum == mpt__get_bytes(at, 8)) return MPT_OK;
    return mpt__job_fail(job, MPT_ERROR_FILE, "the data is damaged: its sum is another");
}

/* The states as the file has them, and whether they may be. */
static mpt_result mpt__read_states(mpt__job *job) {
    const mpt_optimizer_state *o = &job->state->optimizer;
    int i, sound;
    for (i = 0; i < MPT__STATES; i++) {
        mpt__part *part = &job->parts[i];
        const mpt__walk w = mpt__walk_state(job, i, job->data + part->entry->begin, 1);
        if (w.unfit) return mpt__job_fail(job, MPT_ERROR_FILE, "%s of '%s' is no int", w.unfit, part->name);
        if (i == MPT__SETTINGS && w.differs)
            return mpt__job_fail(job, MPT_ERROR_VALUE, "%s%s%s is %g there and %g in the model", w.node,
                                 *w.node ? "." : "", w.differs, w.theirs, w.ours);
    }
    sound = mpt__not_negative(job->state->lr) && o->attempted == o->applied + o->skipped;
    for (i = 0; i < job->net->params->count; i++)
        sound &=
            mpt__not_negative(job->state->slices[i].lr_factor) && mpt__not_negative(job->state->slices[i].weight_decay);
    if (!sound)
        return mpt__job_fail(job, MPT_ERROR_FILE, "'mpt.optimizer' has %z attempts, %z applied, %z skipped, lr %g",
                             (size_t)o->attempted, (size_t)o->applied, (size_t)o->skipped, job->state->lr);
    if (mpt__scaler_state_check(job->ctx, &job->state->scaler) != MPT_OK)
        return mpt__job_fail(job, MPT_ERROR_FILE, "%s", mpt_why(job->ctx));
    return MPT_OK;
}

/* Bytes of the file to what will be uploaded: elements as they are, or numbers as the block keeps them. */
static void mpt__unpack(const mpt__job *job, const mpt__part *part) {
    const mpt_params *params = job->net->params;
    const mpt_master mode = params->desc.master == MPT_MASTER_STOCHASTIC ? MPT_MASTER_NONE : params->desc.master;
    const size_t size = mpt__file_types[part->entry->type].size;
    uint16_t *copy = (uint16_t *)(void *)part->staging;
    size_t i;
    for (i = 0; i < part->count; i++) {
        const unsigned char *at = mpt__part_source(job, part) + mpt__part_index(job->net, part, i) * size;
        uint32_t bits = (uint32_t)mpt__get_bytes(at, size);
        if (part->kind != MPT__RAW && size == 2) bits = mpt__bits(mpt_widen(bits, (mpt_dtype)part->entry->type));
        if (part->kind == MPT__VALUES && !params->master)
            mpt__weight_store(mode, params->desc.type, mpt__float(bits), 0, &copy[i], &copy[part->count + i]);
        else mpt__put_element(part->staging, i, part->kind == MPT__RAW ? size : sizeof(float), bits);
    }
}

/* All arrays as they will be uploaded, one after the other: so the halves of running statistics are side by side. */
static mpt_result mpt__stage(mpt__job *job) {
    size_t bytes = 0;
    int i;
    for (i = 0; i < job->count; i++) bytes += job->parts[i].kind ? job->parts[i].count * sizeof(float) : 0;
    job->staging = (char *)mpt__host_alloc(job->ctx, bytes);
    if (!job->staging) return MPT_ERROR_NO_MEMORY;
    for (i = 0, bytes = 0; i < job->count; i++) {
        mpt__part *part = &job->parts[i];
        if (part->kind == MPT__STATE || part->kind == MPT__SUM) continue;
        part->staging = job->staging + bytes;
        bytes += part->count * sizeof(float);
        mpt__unpack(job, part);
    }
    return MPT_OK;
}

static mpt_result mpt__upload_values(mpt_params *params, const mpt__part *part) {
    const mpt_array weight = mpt_params_weight(params, part->id);
    const size_t bytes = part->count * sizeof(uint16_t);
    float *master = mpt_params_master(params, part->id);
    uint16_t *low = mpt_params_low(params, part->id);
    if (master) {
        MPT__TRY(mpt_upload(params->ctx, master, part->staging, 2 * bytes));
        if (!params->copy.data) return MPT_OK;
        return mpt_cast(params->ctx, part->count, mpt_f32_array(master), weight, NULL);
    }
    MPT__TRY(mpt_upload(params->ctx, weight.data, part->staging, bytes));
    return low ? mpt_upload(params->ctx, low, part->staging + bytes, bytes) : MPT_OK;
}

static mpt_result mpt__upload_part(mpt__job *job, const mpt__part *part) {
    const int first = part->kind == MPT__RUNNING && part->device == mpt_model_running(job->net, part->id);
    if (part->kind == MPT__RAW) return mpt_upload(job->ctx, part->device, part->staging, mpt__part_bytes(part));
    if (part->kind == MPT__VALUES) return mpt__upload_values(job->net->params, part);
    if (!first) return MPT_OK; /* went with the other half */
    return mpt_model_set_running(job->net, part->id, (const float *)(const void *)part->staging);
}

/* From here on nothing fails but a device. */
static mpt_result mpt__upload_all(mpt__job *job) {
    mpt_optimizer *opt = job->net->opt;
    const mpt__state *state = job->state;
    const size_t table = (size_t)job->net->params->count * sizeof(mpt_slice);
    int i;
    job->net->forward_rows = job->net->micro = 0; /* no backward pass can follow */
    for (i = 0; i < job->count; i++) MPT__TRY(mpt__upload_part(job, &job->parts[i]));
    if (!job->full) return MPT_OK;
    memcpy(opt->slices, state->slices, table);
    MPT__TRY(mpt_upload(job->ctx, mpt_typed_array(opt->op.slices, MPT_F32).data, opt->slices, table));
    MPT__TRY(mpt_optimizer_set_lr(opt, state->lr));
    MPT__TRY(mpt_optimizer_set_state(opt, &state->optimizer));
    return mpt_scaler_set_state(job->net->scaler, &state->scaler);
}

static mpt_result mpt__load_file(mpt__job *job) {
    mpt_result r;
    job->file = job->disk->open(job->path, 0);
    if (!job->file) return mpt__job_fail(job, MPT_ERROR_FILE, "cannot be opened");
    r = mpt__read_file(job);
    job->disk->close(job->file, 0);
    MPT__TRY(r);
    MPT__TRY(mpt__state_new(job));
    MPT__TRY(mpt__list(job));
    MPT__TRY(mpt__match_all(job));
    if (job->full) {
        MPT__TRY(mpt__check_sum(job));
        MPT__TRY(mpt__read_states(job));
    }
    MPT__TRY(mpt__stage(job));
    return mpt__upload_all(job);
}

/* -- The four calls -- */

/* full: a checkpoint, else weights of this type */
static mpt_result mpt__job_run(const char *call, mpt_result (*run)(mpt__job *), mpt_model *net, const char *path,
                               int full, mpt_dtype type, const mpt__disk *disk) {
    mpt__job job = MPT_ZERO;
    mpt_result r;
    MPT__TRY(mpt__need_built(net, call));
    job.net = net, job.ctx = net->ctx, job.call = call, job.path = path, job.disk = disk;
    job.full = full, job.type = (int)type;
    if (!path || !*path) return mpt_fail(job.ctx, MPT_ERROR_ARGUMENT, "%s: path is NULL or empty", call);
    if ((unsigned)type > MPT_BF16)
        return mpt__job_fail(&job, MPT_ERROR_TYPE, "weights as type %s", mpt_dtype_name(type));
    if (net->opt->phase != MPT__READY || (net->micro && net->steps_at_backward == net->opt->steps))
        return mpt__job_fail(&job, MPT_ERROR_ORDER, "in the middle of a step; mpt_step and mpt_scaler_update end it");
    if (!disk->open) return mpt__job_fail(&job, MPT_ERROR_UNSUPPORTED, "this build has no files (MPT_NO_STDIO)");
    r = run(&job);
    mpt__host_free(job.ctx, job.parts);
    mpt__host_free(job.ctx, job.state);
    mpt__host_free(job.ctx, job.header);
    mpt__host_free(job.ctx, job.entries);
    mpt__host_free(job.ctx, job.data);
    mpt__host_free(job.ctx, job.staging);
    return r;
}

MPT_DEF mpt_result mpt_weights_save(mpt_model *net, const char *path, mpt_dtype type) {
    return mpt__job_run("weights_save", mpt__save_file, net, path, 0, type, &mpt__stdio);
}
MPT_DEF mpt_result mpt_weights_load(mpt_model *net, const char *path) {
    return mpt__job_run("weights_load", mpt__load_file, net, path, 0, MPT_F32, &mpt__stdio);
}
MPT_DEF mpt_result mpt_checkpoint_save(mpt_model *net, const char *path) {
    return mpt__job_run("checkpoint_save", mpt__save_file, net, path, 1, MPT_F32, &mpt__stdio);
}
MPT_DEF mpt_result mpt_checkpoint_load(mpt_model *net, const char *path) {
    return mpt__job_run("checkpoint_load", mpt__load_file, net, path, 1, MPT_F32, &mpt__stdio);
}

#endif /* MPT_IMPLEMENTATION */

/* The licence is that of mpt.h: see its end. */
