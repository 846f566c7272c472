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

/* ==== CHECKPOINTS ==== */

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

/* ==== CHECKPOINT PARTS ==== */

#endif /* MPT_IMPLEMENTATION */

/* The licence is that of mpt.h: see its end. */
