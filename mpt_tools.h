/* mpt_tools.h - see why: tables, instruments and checkpoints for mpt.h.                version 0.1.0, MIT licence

   Floor 5, optional. Include it after mpt.h, and in the one source file that defines MPT_IMPLEMENTATION as well:

       #define MPT_IMPLEMENTATION
       #include "mpt.h"
       #include "mpt_tools.h"

   It needs nothing but mpt.h, works on every device unless a function says otherwise, and costs nothing where it is not
   used.

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

   -- What a build made -- */

/* What the build made of a node. Texts are constant, the name is the model's. */
typedef struct mpt_node_info {
    const char *name, *kernel, *reason; /* how it is computed; why its value has its type */
    int in[2];                          /* nodes that it reads; 0: none */
    int weight, bias;                   /* tensors of mpt_model_params; 0: none */
    int window, groups;                 /* convolution: R = S, and its groups; else 0 */
    int H, W, C;                        /* of a sample */
    mpt_dtype type, grad_type;          /* of its value and of the gradient of it */
    mpt_dtype weight_type;              /* its product reads weights of this type; MPT_DTYPE_COUNT: it has none */
    int fused_into;                     /* node that computes it in passing; 0: itself */
    size_t parameters;                  /* elements */
    size_t bytes;                       /* of its own buffers in the activation block, for a whole batch */
    size_t multiply_adds;               /* of the products, forward, one sample */
} mpt_node_info;

/* node 1.. of a built model */
MPT_DEF mpt_result mpt_model_node(const mpt_model *net, int node, mpt_node_info *out);

/* Bytes by role. On the CPU the sum is exactly what the model holds from the allocator; on a device the arrays are its
   own memory. */
typedef struct mpt_memory {
    size_t weights;     /* what the forward pass reads: fp32 weights, 16-bit weights; O1: both */
    size_t masters;     /* fp32 masters of 16-bit weights; or the low bits or compensation instead */
    size_t gradients;   /* of the parameters */
    size_t moments;     /* of the optimizer */
    size_t activations; /* values kept for backward, and their gradients, after reuse */
    size_t workspace;   /* staging of inputs and targets, sums, running statistics, state */
    size_t bookkeeping; /* the graph itself, names, tables; always host memory */
} mpt_memory;

MPT_DEF mpt_memory mpt_model_memory(const mpt_model *net);

/* -- Printers --

   For people, as aligned text, or for programs, as CSV: a line of names, then the rows. `write` is given one line at a
   time, with its end; no number in it depends on the locale. Shares are in percent. All wait for the device. */

typedef enum mpt_style { MPT_TEXT = 0, MPT_CSV } mpt_style;
typedef void (*mpt_write)(const char *line, void *user);

/* The plan: a line for each node under a header: name, shape, types and why, kernel, fused into, parameters, bytes,
   multiply-adds. */
MPT_DEF mpt_result mpt_model_print(const mpt_model *net, void (*write)(const char *line, void *user), void *user);
/* mpt_model_memory, a line for each role: bytes, share of all, bytes a parameter. */
MPT_DEF mpt_result mpt_memory_print(const mpt_model *net, mpt_style style, mpt_write write, void *user);
/* Steps attempted, applied and skipped; norm of the last gradient; and with desc.meter the updates of the last step
   that 16-bit weights would lose: a name and a value a line. */
MPT_DEF mpt_result mpt_optimizer_print(mpt_optimizer *opt, mpt_style style, mpt_write write, void *user);
/* The journal of skipped steps, oldest first: number of the attempt, scale, first tensor, how many inf and NaN, and the
   mpt_skip_reason. */
MPT_DEF mpt_result mpt_skips_print(mpt_optimizer *opt, mpt_style style, mpt_write write, void *user);

/* A matrix product that a node makes in a pass over a whole batch, as BLAS is given it, row-major: c(m,n) = op(a)(m,k)
   op(b)(k,n). A convolution makes one for each group, as mpt_cuda.cuh does: forward (output pixels x filters, over taps
   and channels), dX (input pixels x channels, over taps and filters), dW (filters x taps and channels, over output
   pixels). */
typedef struct mpt_product {
    mpt_pass pass;
    int trans_a, trans_b;
    size_t m, n, k, lda, ldb, ldc;
    mpt_dtype a, b, c;    /* types of the operands and the result; F32 operands are read as TF32 */
    size_t count;         /* products: the groups of a convolution */
    size_t multiply_adds; /* of all of them */
    const char *broken;   /* which of m, n, k break the rule below, as "n k"; "": none */
} mpt_product;

/* The product of node 1.. in a pass; *out is all zero if the node makes none in it. Arithmetic on the plan: no device
   is asked. Tensor Cores take a product at full speed when all rows that are contiguous in memory, and their distances,
   are multiples of 16 bytes: 8 elements of 16 bits, 4 of TF32. (cuBLAS documentation, "Tensor Core Usage"; in newer
   versions others run on them, too, padded and slower.) */
MPT_DEF mpt_result mpt_model_product(const mpt_model *net, int node, mpt_pass pass, mpt_product *out);
/* The same for all nodes and passes, and last the share of multiply-adds that are eligible. */
MPT_DEF mpt_result mpt_products_print(const mpt_model *net, mpt_style style, mpt_write write, void *user);

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

/* ==== INSTRUMENTS ====

   -- Histograms: what would a type, or a loss scale, do to these values? -- */

typedef struct mpt_fit {
    double flushed, subnormal, overflowed; /* shares of the nonzero finite values; 0 if there are none */
} mpt_fit;

/* What would become of the values of *h in `type` if all were multiplied by 2^log2_scale first: share that rounds to
   zero, that lands in the subnormals, that overflows. By exponent only, so values at a bin's edge count with their
   bin. */
MPT_DEF mpt_fit mpt_histogram_fit(const mpt_histogram *h, mpt_dtype type, int log2_scale);

enum { MPT_SCALE_HEADROOM = 2 }; /* what the tables here advise with: a later batch may be 4 times as large */

/* log2 of the loss scale that suits gradients like those of *h (of S = 1) in `type`: of all in 0..24 (the scaler's
   range) that leave every value 2^headroom times below overflow, the one that flushes or makes subnormal the smallest
   share; of equals the smallest. 0 if there is none, as for an empty histogram. */
MPT_DEF int mpt_histogram_scale(const mpt_histogram *h, mpt_dtype type, int headroom);

/* The bars, a line an exponent: log2, count, share. */
MPT_DEF mpt_result mpt_histogram_print(const mpt_histogram *h, mpt_style style, mpt_write write, void *user);
/* A line for each scale 2^first .. 2^last: what is flushed, subnormal and overflowed of fp16, bf16, e4m3, e5m2. */
MPT_DEF mpt_result mpt_sweep_print(const mpt_histogram *h, int first, int last, mpt_style style, mpt_write write,
                                   void *user);

/* -- The lens --

   A lens stands before a context's table of operations and looks at, or changes, what passes through. Open and close it
   between any two calls: nothing is rebuilt, and without one nothing is slower. It works for whatever runs on the
   context, on every device, and allocates where it first needs room. */

typedef struct mpt_lens mpt_lens;

/* An open lens does nothing until it is told to. NULL: out of memory. */
MPT_DEF mpt_lens *mpt_lens_open(mpt_context *ctx);
/* Takes it away, before the context is closed. Lenses close in reverse order: MPT_ERROR_ORDER while a later one is
   open. NULL is allowed. */
MPT_DEF mpt_result mpt_lens_close(mpt_lens *lens);

/* -- What passes through: exponent histograms -- */

typedef enum mpt_role {
    MPT_ROLE_WEIGHT = 0,          /* of a linear, convolution or norm (gamma), from the masters where there are some */
    MPT_ROLE_ACTIVATION,          /* the node's value: what it hands on, after a fused activation; node 1: the input */
    MPT_ROLE_ACTIVATION_GRADIENT, /* of that value */
    MPT_ROLE_WEIGHT_GRADIENT,
    MPT_ROLE_COUNT
} mpt_role;

/* Counts the values of all nodes of a built model, from zero, in every pass from now on (an evaluation's, too), until
   called again; net NULL: no more. No other model may run on the context meanwhile.
   Values are counted in fp32 before they are rounded to 16 bits: the operation writes to memory of the lens, which is
   then rounded to where it belongs. On the CPU that leaves every bit of a training run as it was; on CUDA cuBLAS may
   take another kernel for an fp32 result, with sums in another order. What an operation reads has been rounded: of
   gradients far from the loss an fp32 model, or one whose scale is right, tells more.
   Gradients are counted without the loss scale (shifted by log2 of it, rounded to an integer; accumulate's 1/n stays in
   them), and once a pass, when all parts have been added; those of weights once a step. A node without memory of its
   own (fused activation, flatten; for its gradient an input of a "sum, dy shared") may have none: the node that it
   shares with has them. */
MPT_DEF mpt_result mpt_lens_watch(mpt_lens *lens, mpt_model *net);
/* *out = what node 1.. has shown in a role; node 0: all nodes. Weights are those of now. */
MPT_DEF mpt_result mpt_lens_histogram(mpt_lens *lens, int node, mpt_role role, mpt_histogram *out);
/* A line for each node, role and format, and for the sum of the nodes: counts, lowest and highest exponent, what is
   flushed, subnormal and overflowed in fp16, bf16, e4m3 and e5m2 at S = 1 and at S = 2^log2_scale, and for gradients
   log2 of the advised scale. */
MPT_DEF mpt_result mpt_lens_print(mpt_lens *lens, int log2_scale, mpt_style style, mpt_write write, void *user);

/* -- What if: another precision, simulated -- CPU contexts */

typedef enum mpt_format { /* those that mpt_dtype has, by the same numbers */
                          MPT_FORMAT_F32 = 0,
                          MPT_FORMAT_F16,
                          MPT_FORMAT_BF16,
                          MPT_FORMAT_E4M3,
                          MPT_FORMAT_E5M2,
                          MPT_FORMAT_TF32, /* 8 bits of exponent, 10 of fraction: what Tensor Cores read of fp32 */
                          MPT_FORMAT_COUNT
} mpt_format;

MPT_DEF const char *mpt_format_name(mpt_format format); /* "f32", "f16", ... "tf32" */

/* All zero: fp32 as it is. */
typedef struct mpt_precision {
    mpt_format format;
    mpt_round round;
    mpt_overflow overflow;
    int flush; /* 1: subnormals of the format become 0 */
} mpt_precision;

/* x as the format holds it; `random` as in mpt_narrow. */
MPT_DEF float mpt_precision_round(const mpt_precision *p, float x, uint32_t random);

/* All zero: nothing is changed, not by a bit. */
typedef struct mpt_what_if {
    mpt_precision operands; /* of products: both, and a bias, are rounded before it, in a copy */
    mpt_precision sum;      /* of products: rounded after each addition, to which it and fp32's rounding apply */
    size_t chunk;           /* so many products are added in fp32 before they join the sum; 0: 1 */
    mpt_precision output;   /* of whatever the node writes in the pass, after bias and activation */
    uint64_t seed;          /* of stochastic rounding: draws are named by it, a count of the lens, and the element */
} mpt_what_if;

/* From now on operations of a node (0: all, and those outside of models) in the passes of a mask of 1 << mpt_pass (0:
   all three) run as told; of several calls the last that fits holds. what NULL: nothing is simulated any more. Build
   the model in O0. A mpt_gemm outside of a model counts as forward. With sum.format other than F32, or a chunk, the
   product is made by a plain loop, in order of k (convolution: taps, then channels; dX: taps, those of a row of the
   kernel from the last, then filters; dW: images and pixels; padding as zeros), some hundred times slower; else by the
   engine. The input is not rounded, but operands are. Stochastic rounding differs between calls and is the same in
   every run.
   MPT_ERROR_UNSUPPORTED on a device. */
MPT_DEF mpt_result mpt_lens_simulate(mpt_lens *lens, int node, unsigned passes, const mpt_what_if *what);

/* -- Why was this step skipped? -- */

/* What is in an array. Magnitudes of finite values other than 0; both 0 if there are none. */
typedef struct mpt_range {
    uint64_t count, zero, inf, nan;
    double smallest, largest;
} mpt_range;

/* The first operation of a pass whose output was not finite. */
typedef struct mpt_explanation {
    int found;             /* 0: all were finite, and the rest is 0 */
    const char *operation; /* "product", "convolution", "loss", ... */
    int node;              /* that did it */
    mpt_pass pass;
    int output;        /* node whose value or gradient it wrote */
    mpt_dtype type;    /* of that */
    float scale;       /* loss scale of the replay */
    mpt_range result;  /* what it wrote: inf and nan as stored, the rest as it was in fp32 before it was rounded */
    mpt_range read[2]; /* what it read: value and weight, or gradient and the other operand; count 0: none */
    char text[256];    /* all of this in a sentence */
} mpt_explanation;

/* Replays forward and backward of n <= batch samples, as mpt_forward takes them, at a loss scale (0: that of the last
   skipped step, or the present one if none was) and names the first operation that wrote inf or NaN. After a skipped
   step with the same samples that is the reason, for a skipped step changes nothing but the scale and the counters.
   Between steps only (MPT_ERROR_ORDER inside one). Nothing is left behind but the gradients, which the next step
   overwrites. */
MPT_DEF mpt_result mpt_explain(mpt_model *net, const float *x, const void *target, int n, float scale,
                               mpt_explanation *out);

/* ==== CHECKPOINTS ====

   safetensors files: the length of a JSON header, the header, which gives each tensor a name, type, shape and place,
   then the data; little-endian on every machine (huggingface.co/docs/safetensors).

   Names and layouts are PyTorch's: node name + .weight, .bias, .running_mean, .running_var; linear [outputs][inputs],
   with the inputs in C, H, W order where it reads an image; convolution [K][C / groups][R][S]. So a torch.nn.Module
   whose layers have the names of the nodes takes a file of weights by load_state_dict, strictly, and its state_dict
   loads here.

   Saving writes to path + a number of this writer + ".tmp", flushes that to the disk where the system has a way to, and
   renames it to path: if anything fails it is removed, and an older file stays. Writers of one file at a time do not
   mix: it is one's or the other's. A symbolic link stays one, and on POSIX the file keeps its permissions.

   Loading reads and checks everything before it changes the model, so that a file is loaded whole or not at all; what
   does not fit the model is told from the header, before any data is read. Taken and refused is what the safetensors
   library takes and refuses, but for a name with a 0 in it, which is refused. The model is a built one, between steps:
   MPT_ERROR_ORDER after mpt_backward until mpt_step and mpt_scaler_update.

   MPT_ERROR_FILE: cannot be opened, read or written; or damaged: lengths, places, grammar, names, a checkpoint's sum.
   Of a sound file: MPT_ERROR_TYPE, MPT_ERROR_SHAPE: a tensor has another type or shape than the model, is missing, or
   is not the model's; MPT_ERROR_VALUE: a setting differs, or a running statistic is inf or NaN, or a variance negative;
   MPT_ERROR_UNSUPPORTED: a type or version that is unknown here, or a build with MPT_NO_STDIO. */

/* The weights alone, as type F32, F16 or BF16, nearest even; running statistics as F32. MPT_ERROR_VALUE, naming tensor,
   element and value, if the type does not hold one. MPT_ERROR_UNSUPPORTED, here and in mpt_weights_load, naming the
   layer, for a model that PyTorch would compute otherwise with the same weights: where a flattened image, which it has
   in C, H, W order, is added to what is in another order, or its channels fall into groups. */
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
   restored must be the same, to every member of every layer's descriptor. */
MPT_DEF mpt_result mpt_checkpoint_load(mpt_model *net, const char *path);

#ifdef __cplusplus
} /* extern "C" */
#endif

/* ---------------------------- stop here if you only want the API ---------------------------- */

#endif /* MPT_TOOLS_H */

#if defined(MPT_IMPLEMENTATION) && !defined(MPT__TOOLS_IMPLEMENTED)
#define MPT__TOOLS_IMPLEMENTED

/* ==== TABLE PARTS ==== */

static const char *mpt__kernel_name(const mpt_model *net, const mpt__node *node) {
    switch (node->kind) {
    case MPT__INPUT: return "cast";
    case MPT__LINEAR: return "product";
    case MPT__CONV2D:
        return node->conv.groups == 1                                              ? "convolution"
               : node->conv.groups == node->conv.C && node->conv.C == node->conv.K ? "depthwise"
                                                                                   : "grouped";
    case MPT__POOL: return "pooling";
    case MPT__FLATTEN: return "shared memory";
    case MPT__CONCAT: return "copy";
    case MPT__NORM: return mpt__slope_in_norm(node) ? "norm with slope" : "normalisation";
    case MPT__ADD: return mpt__shared_side(net, (int)(node - net->nodes) + 1) < 0 ? "elementwise" : "sum, dy shared";
    case MPT__LOSS: return "loss and gradient";
    default: return node->fused ? "epilogue" : "elementwise";
    }
}

MPT_DEF mpt_result mpt_model_node(const mpt_model *net, int id, mpt_node_info *out) {
    const mpt__node *node;
    int i;
    MPT__TRY(mpt__need_built(net, "model_node"));
    if (id < 1 || id > net->count || !out)
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "model_node: node %d is not in 1..%d, or out is NULL", id,
                        net->count);
    node = mpt__node_of(net, id);
    memset(out, 0, sizeof *out);
    out->name = node->name;
    out->kernel = mpt__kernel_name(net, node);
    out->reason = node->kind == MPT__LOSS ? "losses are fp32" : node->reason;
    out->in[0] = node->in[0];
    out->in[1] = node->in[1];
    out->weight = node->weight;
    out->bias = node->bias;
    out->window = (int)node->conv.R;
    out->groups = (int)node->conv.groups;
    out->H = node->H;
    out->W = node->W;
    out->C = node->C;
    out->type = node->kind == MPT__LOSS ? MPT_F32 : node->type;
    out->grad_type = node->grad_type;
    out->weight_type = mpt__has_weights(node) ? node->policy.compute : MPT_DTYPE_COUNT;
    out->fused_into = node->fused ? node->in[0] : 0;
    out->parameters = mpt_params_count(net->params, node->weight ? node->weight : -1) +
                      mpt_params_count(net->params, node->bias ? node->bias : -1);
    if (mpt__has_weights(node))
        out->multiply_adds =
            mpt_params_count(net->params, node->weight) * (size_t)(node->kind == MPT__LINEAR ? 1 : node->H * node->W);
    for (i = 0; i < MPT__BUFFERS && node->kind != MPT__LOSS; i++) {
        const int own[MPT__BUFFERS] = {node->value, node->grad, node->index, node->stats, node->cast};
        const mpt__node *in = node->in[0] ? mpt__node_of(net, node->in[0]) : NULL;
        if (own[i] && !(in && (own[i] == in->value || own[i] == in->grad)))
            out->bytes += net->buffers[own[i] - 1].bytes;
    }
    return MPT_OK;
}

MPT_DEF mpt_memory mpt_model_memory(const mpt_model *net) {
    const size_t host = MPT__OVERHEAD;
    mpt_memory m = MPT_ZERO;
    const mpt_params *p;
    size_t blocks, moments = 0;
    int i;
    if (!net) return m;
    m.bookkeeping = sizeof *net + host;
    if (net->capacity) m.bookkeeping += (size_t)net->capacity * sizeof *net->nodes + host;
    if (!net->built) return m;
    p = net->params;
    for (i = 0; i < 3; i++) moments += net->opt->op.moment[i] != NULL;
    m.gradients = p->elements * 4;
    m.moments = p->elements * 4 * moments;
    m.weights = p->elements * (!p->copy.data ? 4 : net->policy.param == MPT_F32 ? 6 : 2);
    if (net->policy.param != MPT_F32) m.masters = p->elements * (p->master ? 4 : p->low ? 2 : 0);
    m.activations = net->block_bytes;
    m.workspace = net->staging_bytes + net->target_bytes + MPT__SUMS * sizeof *net->sums + sizeof *net->scaler->state +
                  sizeof *net->opt->op.state + (size_t)p->count * sizeof(mpt_slice) +
                  2 * net->statistics * sizeof(float);
    if (net->class_weights) m.workspace += mpt_model_outputs(net) * sizeof(float);
    blocks = 7 + moments + (net->staging ? 1 : 0) + (net->class_weights ? 1 : 0) + (net->statistics ? 2 : 0) +
             (p->copy.data ? 1 : 0) + (p->master ? 1 : 0) + (p->low ? 1 : 0);
    m.bookkeeping += blocks * net->ctx->backend.overhead + 6 * host + sizeof *net->scaler + sizeof *p +
                     sizeof *net->opt + (size_t)p->capacity * sizeof *p->tensors +
                     (size_t)p->count * sizeof(mpt_slice) + (size_t)net->count * MPT__BUFFERS * sizeof *net->buffers;
    return m;
}

typedef struct mpt__column {
    const char *name;
    int end; /* where the next one starts in a line of text; 0: the last */
} mpt__column;

typedef struct mpt__table { /* a line at a time */
    mpt_style style;
    mpt_write write;
    void *user;
    const mpt__column *columns;
    int at; /* column of the next cell */
    mpt__text text;
    char line[256];
} mpt__table;

/* CSV: in quotes where it must be. */
static void mpt__put_csv(mpt__text *t, const char *cell) {
    const int quoted = strpbrk(cell, ",\"\n") != NULL;
    if (quoted) mpt__put_char(t, '"');
    for (; *cell; cell++) {
        if (*cell == '"') mpt__put_char(t, '"');
        mpt__put_char(t, *cell);
    }
    if (quoted) mpt__put_char(t, '"');
}

/* The next cell of a line: in text followed by blanks up to its column's end. */
static void mpt__cell(mpt__table *t, const char *format, ...) {
    const int end = t->columns[t->at].end;
    char cell[128];
    va_list args;
    va_start(args, format);
    mpt__format_list(cell, sizeof cell, format, args);
    va_end(args);
    if (t->style == MPT_CSV && t->at) mpt__put_char(&t->text, ',');
    t->at++;
    if (t->style == MPT_CSV) {
        mpt__put_csv(&t->text, cell);
        return;
    }
    mpt__put_string(&t->text, cell);
    if (!end) return;
    do mpt__put_char(&t->text, ' ');
    while (t->text.at < t->line + end && t->text.at < t->text.end);
}

static void mpt__row_end(mpt__table *t) {
    mpt__put_char(&t->text, '\n');
    t->text.at[-1] = '\n'; /* of a line that was cut, too */
    t->write(t->line, t->user);
    t->text.at = t->line;
    t->at = 0;
}

/* The header. Columns end with the one whose end is 0. */
static void mpt__table_start(mpt__table *t, const mpt__column *columns, mpt_style style, mpt_write write, void *user) {
    int i = 0;
    t->style = style;
    t->write = write;
    t->user = user;
    t->columns = columns;
    t->at = 0;
    t->text.at = t->line;
    t->text.end = t->line + sizeof t->line - 1;
    do mpt__cell(t, "%s", columns[i].name);
    while (columns[i++].end);
    mpt__row_end(t);
}

static mpt_result mpt__need_write(mpt_context *ctx, const char *call, mpt_style style, mpt_write write) {
    if (!write) return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "%s: write is NULL", call);
    if (style == MPT_TEXT || style == MPT_CSV) return MPT_OK;
    return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "%s: unknown style %d", call, (int)style);
}

/* Whole numbers with all their digits, others with six. */
static void mpt__number_cell(mpt__table *t, double number) {
    const size_t whole = number >= 1 && number < 4e9 ? (size_t)number : 0;
    if (whole && !(number > (double)whole)) mpt__cell(t, "%z", whole);
    else mpt__cell(t, "%g", number);
}

static double mpt__percent(double part, double whole) { return whole > 0 ? 100 * part / whole : 0; }

static void mpt__print_node(const mpt_model *net, int id, mpt__table *t) {
    mpt_node_info n;
    if (mpt_model_node(net, id, &n) != MPT_OK) return;
    mpt__cell(t, "%d", id);
    mpt__cell(t, "%s", n.name);
    mpt__cell(t, "%dx%dx%d", n.H, n.W, n.C);
    mpt__cell(t, "%s", mpt_dtype_name(n.type));
    mpt__cell(t, "%s", n.weight_type == MPT_DTYPE_COUNT ? "-" : mpt_dtype_name(n.weight_type));
    mpt__cell(t, "%s", n.kernel);
    mpt__cell(t, "%s", n.fused_into ? mpt__node_of(net, n.fused_into)->name : "-");
    mpt__cell(t, "%z", n.parameters);
    mpt__cell(t, "%z", n.bytes);
    mpt__cell(t, "%z", n.multiply_adds);
    mpt__cell(t, "%s", n.reason);
    mpt__row_end(t);
}

MPT_DEF mpt_result mpt_model_print(const mpt_model *net, void (*write)(const char *line, void *user), void *user) {
    static const mpt__column columns[] = {
        {"", 4},        {"node", 20},           {"shape", 34},      {"type", 40},
        {"reads", 46},  {"kernel", 65},         {"fused into", 82}, {"parameters", 93},
        {"bytes", 104}, {"multiply-adds", 117}, {"why the type", 0}};
    mpt__table t;
    int id;
    MPT__TRY(mpt__need_built(net, "model_print"));
    MPT__TRY(mpt__need_write(net->ctx, "model_print", MPT_TEXT, write));
    mpt__table_start(&t, columns, MPT_TEXT, write, user);
    for (id = 1; id <= net->count; id++) mpt__print_node(net, id, &t);
    return MPT_OK;
}

MPT_DEF mpt_result mpt_memory_print(const mpt_model *net, mpt_style style, mpt_write write, void *user) {
    static const mpt__column columns[] = {{"role", 14}, {"bytes", 26}, {"share", 36}, {"a parameter", 0}};
    static const char *const names[] = {"weights",     "masters",   "gradients",   "moments",
                                        "activations", "workspace", "bookkeeping", "all"};
    size_t bytes[8] = {0}, parameters = 0;
    mpt__table t;
    mpt_memory m;
    int i;
    MPT__TRY(mpt__need_built(net, "memory_print"));
    MPT__TRY(mpt__need_write(net->ctx, "memory_print", style, write));
    m = mpt_model_memory(net);
    bytes[0] = m.weights;
    bytes[1] = m.masters;
    bytes[2] = m.gradients;
    bytes[3] = m.moments;
    bytes[4] = m.activations;
    bytes[5] = m.workspace;
    bytes[6] = m.bookkeeping;
    for (i = 0; i < 7; i++) bytes[7] += bytes[i];
    for (i = 1; i <= mpt_params_tensors(net->params); i++) parameters += mpt_params_count(net->params, i);
    mpt__table_start(&t, columns, style, write, user);
    for (i = 0; i < 8; i++) {
        mpt__cell(&t, "%s", names[i]);
        mpt__cell(&t, "%z", bytes[i]);
        mpt__cell(&t, "%g", mpt__percent((double)bytes[i], (double)bytes[7]));
        mpt__cell(&t, "%g", parameters ? (double)bytes[i] / (double)parameters : 0.0);
        mpt__row_end(&t);
    }
    return MPT_OK;
}

static mpt_result mpt__need_state(mpt_optimizer *opt, const char *call, mpt_style style, mpt_write write) {
    if (!opt) return MPT_ERROR_ARGUMENT;
    MPT__TRY(mpt__need_write(opt->ctx, call, style, write));
    return mpt_optimizer_get_state(opt, &opt->mirror);
}

static void mpt__print_number(mpt__table *t, const char *name, double number) {
    mpt__cell(t, "%s", name);
    mpt__number_cell(t, number);
    mpt__row_end(t);
}

MPT_DEF mpt_result mpt_optimizer_print(mpt_optimizer *opt, mpt_style style, mpt_write write, void *user) {
    static const mpt__column columns[] = {{"what", 16}, {"value", 0}};
    const mpt_optimizer_state *s;
    mpt__table t;
    MPT__TRY(mpt__need_state(opt, "optimizer_print", style, write));
    s = &opt->mirror;
    mpt__table_start(&t, columns, style, write, user);
    mpt__print_number(&t, "attempted", (double)s->attempted);
    mpt__print_number(&t, "applied", (double)s->applied);
    mpt__print_number(&t, "skipped", (double)s->skipped);
    mpt__print_number(&t, "gradient norm", s->grad_norm);
    if (!opt->op.desc.meter) return MPT_OK;
    mpt__print_number(&t, "moved", (double)s->moved);
    mpt__print_number(&t, "lost", (double)s->lost);
    mpt__print_number(&t, "lost share", mpt__percent((double)s->lost, (double)s->moved));
    return MPT_OK;
}

MPT_DEF mpt_result mpt_skips_print(mpt_optimizer *opt, mpt_style style, mpt_write write, void *user) {
    static const char *const reasons[] = {"none", "gradient", "empty", "statistics", "moment"};
    static const mpt__column columns[] = {{"step", 10}, {"scale", 20}, {"first tensor", 40},
                                          {"inf", 50},  {"nan", 60},   {"reason", 0}};
    const mpt_optimizer_state *s;
    mpt__table t;
    uint64_t i;
    MPT__TRY(mpt__need_state(opt, "skips_print", style, write));
    s = &opt->mirror;
    mpt__table_start(&t, columns, style, write, user);
    for (i = s->skipped > MPT_JOURNAL ? s->skipped - MPT_JOURNAL : 0; i < s->skipped; i++) {
        const mpt_skip *skip = &s->journal[i % MPT_JOURNAL];
        mpt__cell(&t, "%z", (size_t)skip->step);
        mpt__number_cell(&t, (double)skip->scale);
        mpt__cell(&t, "%s",
                  skip->tensor                        ? mpt_params_name(opt->params, skip->tensor)
                  : skip->reason == MPT_SKIP_GRADIENT ? "the norm"
                                                      : "none");
        mpt__cell(&t, "%z", (size_t)skip->inf);
        mpt__cell(&t, "%z", (size_t)skip->nan);
        mpt__cell(&t, "%s", reasons[skip->reason]);
        mpt__row_end(&t);
    }
    return MPT_OK;
}

/* -- Products for Tensor Cores -- */

static void mpt__linear_product(mpt_product *p, size_t N, size_t D, size_t O) {
    p->trans_a = p->pass == MPT_BACKWARD_WEIGHT;
    p->trans_b = p->pass == MPT_FORWARD;
    p->m = p->trans_a ? O : N;
    p->n = p->trans_b ? O : D;
    p->k = p->trans_a ? N : p->trans_b ? D : O;
    p->lda = p->trans_b ? D : O;
    p->ldb = D;
    p->ldc = p->n;
}

/* As mpt_cuda.cuh makes it: one operand gathered to rows of taps that are padded to 16 bytes, but for a 1x1 kernel. */
static void mpt__filters_product(mpt_product *p, const mpt_conv2d_shape *z, size_t P, size_t Q, size_t size) {
    const size_t taps = z->R * z->S, C = z->C / z->groups, K = z->K / z->groups;
    const int gathered = taps > 1 || z->stride > 1 || z->padding;
    mpt__linear_product(p, z->N * P * Q, taps * C, K);
    if (p->pass == MPT_BACKWARD_DATA) {
        p->m = z->N * z->H * z->W;
        p->n = C;
        p->k = taps * K;
        p->ldb = C;
    }
    if (p->pass == MPT_FORWARD) {
        p->lda = z->C;
        p->ldc = z->K;
    }
    if (p->pass == MPT_BACKWARD_DATA) {
        p->lda = z->K;
        p->ldc = z->C;
    }
    if (p->pass == MPT_BACKWARD_WEIGHT) {
        p->lda = z->K;
        p->ldb = z->C;
    }
    if (gathered && p->pass != MPT_BACKWARD_WEIGHT) p->lda = (p->k * size + 15) / 16 * 16 / size;
    if (gathered && p->pass == MPT_BACKWARD_WEIGHT) p->ldb = (p->n * size + 15) / 16 * 16 / size;
    p->count = z->groups;
}

/* The dimensions, of those along which rows lie, that are no multiple of 16 bytes. A leading dimension is such a
   dimension, times the groups, or padded. Operands of two types are both read as fp32. */
static const char *mpt__product_broken(const mpt_product *p) {
    static const char *const broken[] = {"", "m", "n", "m n", "k", "m k", "n k", "m n k"};
    const size_t size = p->a == p->b ? mpt_dtype_size(p->a) : 4, each = 16 / size;
    const size_t each_c = 16 / mpt_dtype_size(p->c);
    int bits = 0;
    if (p->trans_a && p->m % each) bits |= 1;
    if ((!p->trans_b && p->n % each) || p->n % each_c) bits |= 2;
    if ((!p->trans_a || p->trans_b) && p->k % each) bits |= 4;
    return broken[bits];
}

static void mpt__product_types(const mpt_model *net, const mpt__node *node, mpt_product *p) {
    const mpt__node *in = mpt__node_of(net, node->in[0]);
    const mpt_dtype reads = node->policy.compute;
    p->a = p->pass == MPT_FORWARD ? reads : node->grad_type;
    p->b = reads;
    p->c = p->pass == MPT_FORWARD ? node->type : p->pass == MPT_BACKWARD_DATA ? in->grad_type : MPT_F32;
}

MPT_DEF mpt_result mpt_model_product(const mpt_model *net, int id, mpt_pass pass, mpt_product *out) {
    const mpt__node *node, *in;
    mpt_conv2d_shape conv;
    MPT__TRY(mpt__need_built(net, "model_product"));
    if (id < 1 || id > net->count || (unsigned)pass > MPT_BACKWARD_WEIGHT || !out)
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT,
                        "model_product: node %d is not in 1..%d, pass %d is unknown, or out is NULL", id, net->count,
                        (int)pass);
    node = mpt__node_of(net, id);
    memset(out, 0, sizeof *out);
    if (!mpt__has_weights(node)) return MPT_OK;
    in = mpt__node_of(net, node->in[0]);
    if (pass == MPT_BACKWARD_DATA && !in->needs_gradient) return MPT_OK;
    out->pass = pass;
    out->count = 1;
    mpt__product_types(net, node, out);
    conv = node->conv;
    conv.N = (size_t)net->train.batch;
    if (node->kind == MPT__LINEAR) mpt__linear_product(out, conv.N, mpt__node_count(in), (size_t)node->C);
    else
        mpt__filters_product(out, &conv, (size_t)node->H, (size_t)node->W,
                             out->a == out->b ? mpt_dtype_size(out->a) : 4);
    out->multiply_adds = out->m * out->n * out->k * out->count;
    out->broken = mpt__product_broken(out);
    return MPT_OK;
}

static const char *const mpt__pass_names[] = {"forward", "dX", "dW"};

static const mpt__column mpt__product_columns[] = {
    {"node", 20},           {"pass", 28},      {"m", 37},       {"n", 45},   {"k", 54},
    {"types", 70},          {"lda", 78},       {"ldb", 86},     {"ldc", 94}, {"count", 100},
    {"multiply-adds", 114}, {"eligible", 123}, {"broken by", 0}};

static void mpt__print_product(mpt__table *t, const char *name, const mpt_product *p) {
    const char *a = p->a == MPT_F32 ? "tf32" : mpt_dtype_name(p->a);
    const char *b = p->b == MPT_F32 ? "tf32" : mpt_dtype_name(p->b);
    mpt__cell(t, "%s", name);
    mpt__cell(t, "%s", mpt__pass_names[p->pass]);
    mpt__cell(t, "%z", p->m);
    mpt__cell(t, "%z", p->n);
    mpt__cell(t, "%z", p->k);
    mpt__cell(t, "%s*%s>%s", a, b, mpt_dtype_name(p->c));
    mpt__cell(t, "%z", p->lda);
    mpt__cell(t, "%z", p->ldb);
    mpt__cell(t, "%z", p->ldc);
    mpt__cell(t, "%z", p->count);
    mpt__cell(t, "%z", p->multiply_adds);
    mpt__cell(t, "%s", *p->broken ? "no" : "yes");
    mpt__cell(t, "%s", p->broken);
    mpt__row_end(t);
}

MPT_DEF mpt_result mpt_products_print(const mpt_model *net, mpt_style style, mpt_write write, void *user) {
    size_t all = 0, eligible = 0;
    mpt__table t;
    mpt_product p;
    int id, pass;
    MPT__TRY(mpt__need_built(net, "products_print"));
    MPT__TRY(mpt__need_write(net->ctx, "products_print", style, write));
    mpt__table_start(&t, mpt__product_columns, style, write, user);
    for (id = 1; id <= net->count; id++) {
        for (pass = MPT_FORWARD; pass <= MPT_BACKWARD_WEIGHT; pass++) {
            MPT__TRY(mpt_model_product(net, id, (mpt_pass)pass, &p));
            if (!p.count) continue;
            mpt__print_product(&t, mpt__node_of(net, id)->name, &p);
            all += p.multiply_adds;
            eligible += *p.broken ? 0 : p.multiply_adds;
        }
    }
    mpt__cell(&t, "all");
    for (id = 1; id < 10; id++) mpt__cell(&t, "%s", "");
    mpt__cell(&t, "%z", all);
    mpt__cell(&t, "%g%s", mpt__percent((double)eligible, (double)all), style == MPT_CSV ? "" : " %");
    mpt__cell(&t, "%s", "");
    mpt__row_end(&t);
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

/* ==== INSTRUMENT PARTS ====

   -- Histograms -- */

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

MPT_DEF int mpt_histogram_scale(const mpt_histogram *h, mpt_dtype type, int headroom) {
    double least = 2;
    int s, best = 0;
    for (s = 0; s <= 24; s++) {
        const mpt_fit fit = mpt_histogram_fit(h, type, s);
        if (mpt_histogram_fit(h, type, s + headroom).overflowed > 0) break;
        if (fit.flushed + fit.subnormal < least) {
            least = fit.flushed + fit.subnormal;
            best = s;
        }
    }
    return best;
}

static uint64_t mpt__histogram_finite(const mpt_histogram *h) {
    uint64_t count = h->zero;
    int e;
    for (e = 0; e < 255; e++) count += h->exponent[e];
    return count;
}

/* Lowest and highest exponent that values other than 0 have. Returns 0 if there are none. */
static int mpt__histogram_ends(const mpt_histogram *h, int *low, int *high) {
    int e;
    *low = *high = 0;
    for (e = 254; e >= 0 && !h->exponent[e]; e--) {}
    if (e < 0) return 0;
    *high = e - 127;
    for (e = 0; !h->exponent[e]; e++) {}
    *low = e - 127;
    return 1;
}

MPT_DEF mpt_result mpt_histogram_print(const mpt_histogram *h, mpt_style style, mpt_write write, void *user) {
    static const mpt__column columns[] = {{"log2", 8}, {"count", 22}, {"share", 0}};
    const double total = h ? (double)(mpt__histogram_finite(h) + h->inf + h->nan) : 0;
    int e, low, high;
    mpt__table t;
    if (!h) return MPT_ERROR_ARGUMENT;
    MPT__TRY(mpt__need_write(NULL, "histogram_print", style, write));
    mpt__table_start(&t, columns, style, write, user);
    if (!mpt__histogram_ends(h, &low, &high)) return MPT_OK;
    for (e = low; e <= high; e++) {
        mpt__cell(&t, "%d", e);
        mpt__cell(&t, "%z", (size_t)h->exponent[e + 127]);
        mpt__cell(&t, "%g", mpt__percent((double)h->exponent[e + 127], total));
        mpt__row_end(&t);
    }
    return MPT_OK;
}

static const mpt_dtype mpt__narrow_types[] = {MPT_F16, MPT_BF16, MPT_E4M3, MPT_E5M2};

static void mpt__fit_cells(mpt__table *t, const mpt_histogram *h, mpt_dtype type, int log2_scale) {
    const mpt_fit fit = mpt_histogram_fit(h, type, log2_scale);
    mpt__cell(t, "%g", 100 * fit.flushed);
    mpt__cell(t, "%g", 100 * fit.subnormal);
    mpt__cell(t, "%g", 100 * fit.overflowed);
}

MPT_DEF mpt_result mpt_sweep_print(const mpt_histogram *h, int first, int last, mpt_style style, mpt_write write,
                                   void *user) {
    static const mpt__column columns[] = {
        {"log2 S", 8},           {"f16 flushed", 20},      {"f16 subnormal", 34},   {"f16 overflowed", 50},
        {"bf16 flushed", 63},    {"bf16 subnormal", 78},   {"bf16 overflowed", 94}, {"e4m3 flushed", 107},
        {"e4m3 subnormal", 122}, {"e4m3 overflowed", 138}, {"e5m2 flushed", 151},   {"e5m2 subnormal", 166},
        {"e5m2 overflowed", 0}};
    mpt__table t;
    int s, i;
    if (!h) return MPT_ERROR_ARGUMENT;
    MPT__TRY(mpt__need_write(NULL, "sweep_print", style, write));
    mpt__table_start(&t, columns, style, write, user);
    for (s = first; s <= last; s++) {
        mpt__cell(&t, "%d", s);
        for (i = 0; i < 4; i++) mpt__fit_cells(&t, h, mpt__narrow_types[i], s);
        mpt__row_end(&t);
    }
    return MPT_OK;
}

/* -- Precisions -- */

MPT_DEF const char *mpt_format_name(mpt_format format) {
    return format == MPT_FORMAT_TF32 ? "tf32" : mpt_dtype_name((mpt_dtype)format);
}

/* fp32 bits to those of the nearest fp32 values with `fraction` bits of fraction. A carry moves up into the exponent,
   and from the largest to inf. */
MPT__INLINE uint32_t mpt__shorten(uint32_t u, int fraction, mpt_round round, uint32_t random) {
    const int shift = 23 - fraction;
    const uint32_t unit = 1u << shift, rest = u & (unit - 1), below = u - rest;
    if (round == MPT_ROUND_ZERO) return below;
    if (round == MPT_ROUND_STOCHASTIC) return below + ((random >> (32 - shift)) < rest ? unit : 0);
    return below + (rest > unit / 2 || (rest == unit / 2 && (below & unit)) ? unit : 0);
}

static uint32_t mpt__round_tf32(const mpt_precision *p, uint32_t u, uint32_t random) {
    const uint32_t sign = u & 0x80000000u, inf = 0x7f800000u, largest = 0x7f7fe000u;
    if ((u & 0x7fffffffu) > inf) return (u | 0x400000u) & 0xffffe000u;
    u = (u & 0x7fffffffu) == inf ? inf : mpt__shorten(u & 0x7fffffffu, 10, p->round, random);
    return sign | (u == inf && p->overflow == MPT_OVERFLOW_SATURATE ? largest : u);
}

typedef struct mpt__rounder { /* a precision made ready */
    const mpt_precision *precision;
    mpt_dtype type;
    int fraction, lowest, top; /* fp32 exponent fields of the smallest normal and of the largest value */
} mpt__rounder;

static mpt__rounder mpt__rounder_of(const mpt_precision *p) {
    mpt__rounder r;
    mpt__format f;
    r.precision = p;
    r.type = p->format == MPT_FORMAT_TF32 ? MPT_F32 : (mpt_dtype)p->format;
    f = mpt__format_of(r.type);
    r.fraction = f.fraction;
    r.lowest = 129 - (1 << (f.exponent - 1));
    r.top = r.type == MPT_F32 ? r.lowest : (int)(f.largest >> f.fraction) + r.lowest - 1;
    return r;
}

/* Between the smallest normal and the largest power of two only the fraction gets shorter. */
MPT__INLINE float mpt__rounded(const mpt__rounder *r, float x, uint32_t random) {
    const mpt_precision *p = r->precision;
    uint32_t u = mpt__bits(x);
    const int exponent = (int)(u >> 23 & 255);
    if (p->format == MPT_FORMAT_TF32) u = mpt__round_tf32(p, u, random);
    else if (exponent >= r->lowest && exponent < r->top) u = mpt__shorten(u, r->fraction, p->round, random);
    else if (r->type != MPT_F32)
        u = mpt__bits(mpt_widen(mpt_narrow(x, r->type, p->round, p->overflow, random), r->type));
    if (p->flush && (int)(u >> 23 & 255) < r->lowest) u &= 0x80000000u;
    return mpt__float(u);
}

MPT_DEF float mpt_precision_round(const mpt_precision *p, float x, uint32_t random) {
    const mpt__rounder r = mpt__rounder_of(p);
    return mpt__rounded(&r, x, random);
}

static int mpt__precision_changes(const mpt_precision *p) { return p->format != MPT_FORMAT_F32 || p->flush; }

/* -- The lens -- */

/* Memory that it writes to instead: copies of two operands, up to three outputs, and one of them as it will be. */
enum { MPT__LEFT = 0, MPT__RIGHT, MPT__OUTPUT, MPT__STAGE = MPT__OUTPUT + 3, MPT__SCRATCHES };

typedef struct mpt__sight { /* of a node in a role */
    mpt_histogram total;
    mpt_histogram last; /* what the last write added to it: replaced when another adds to the same array */
} mpt__sight;

typedef struct mpt__rule {
    int node;
    unsigned passes;
    mpt_what_if what;
} mpt__rule;

struct mpt_lens {
    mpt_context *ctx;
    mpt_backend inner; /* the table that it stands before */
    mpt_backend base;  /* the one before which no lens stands: for its own casts and counts */
    mpt_array scratch[MPT__SCRATCHES];
    size_t bytes[MPT__SCRATCHES];
    mpt_model *net;      /* watched; NULL: none */
    mpt__sight *sights;  /* (nodes, roles) of it */
    int shift;           /* log2 of the loss scale of this pass */
    mpt_histogram fresh; /* of the array at hand */
    mpt__rule *rules;
    int rule_count, rule_capacity;
    uint64_t draws;           /* arrays and products that were rounded */
    mpt_explanation *explain; /* what a replay fills; NULL: none */
};

/* Calls the inner table, which finds its own user there. */
#define MPT__THROUGH(lens, result, operation, op)            \
    do {                                                     \
        (lens)->ctx->backend.user = (lens)->inner.user;      \
        (result) = (lens)->inner.operation((lens)->ctx, op); \
        (lens)->ctx->backend.user = (lens);                  \
    } while (0)

static mpt_lens *mpt__lens_of(const mpt_context *ctx) { return (mpt_lens *)ctx->backend.user; }

/* fp32 memory of `count` elements, kept until more are wanted. */
static mpt_result mpt__lens_scratch(mpt_lens *lens, int which, size_t count, mpt_array *out) {
    if (lens->bytes[which] < count * sizeof(float)) {
        if (lens->bytes[which]) lens->base.release(lens->ctx, lens->scratch[which].data);
        lens->bytes[which] = 0;
        lens->scratch[which] = mpt_f32_array((const float *)lens->base.alloc(lens->ctx, count * sizeof(float)));
        if (!lens->scratch[which].data) return MPT_ERROR_NO_MEMORY;
        lens->bytes[which] = count * sizeof(float);
    }
    *out = lens->scratch[which];
    return MPT_OK;
}

/* to(rows,C) = from(rows,C), rounded to nearest where types differ. */
static mpt_result mpt__lens_copy(mpt_lens *lens, size_t rows, size_t C, mpt_array from, size_t from_stride,
                                 mpt_array to, size_t to_stride) {
    mpt_columns_op columns = MPT_ZERO;
    mpt_map_op cast = MPT_ZERO;
    cast.map = MPT_MAP_CAST;
    cast.n = rows * C;
    cast.a = from;
    cast.out = to;
    columns.rows = rows;
    columns.C = C;
    columns.x = from;
    columns.x_stride = from_stride;
    columns.y = to;
    columns.y_stride = to_stride;
    if (from_stride == C && to_stride == C) return lens->base.map(lens->ctx, &cast);
    return lens->base.copy_columns(lens->ctx, &columns);
}

/* What is simulated of this operation; NULL: nothing. */
static const mpt_what_if *mpt__lens_rule(const mpt_lens *lens, mpt_pass pass) {
    const int node = lens->ctx->place.node;
    int i;
    for (i = lens->rule_count - 1; i >= 0; i--) {
        const mpt__rule *rule = &lens->rules[i];
        if ((!rule->node || rule->node == node) && rule->passes >> pass & 1) return &rule->what;
    }
    return NULL;
}

/* -- Outputs on their way through the lens -- */

typedef struct mpt__output { /* (rows,C), rows `stride` apart */
    const char *operation;
    mpt_array real;
    size_t rows, C, stride;
    float beta; /* of its old content */
    mpt_pass pass;
    mpt_role role; /* MPT_ROLE_COUNT: not counted */
    int node;      /* whose role it is */
    int slot;      /* 0..2 */
    int diverted;
    mpt_array read[2]; /* what it is made from */
    size_t counts[2];
} mpt__output;

static mpt__output mpt__output_of(const mpt_lens *lens, const char *operation, mpt_pass pass, size_t rows, size_t C,
                                  size_t stride, float beta) {
    mpt__output o = MPT_ZERO;
    o.operation = operation;
    o.rows = rows;
    o.C = C;
    o.stride = stride;
    o.beta = beta;
    o.pass = pass;
    o.node = pass == MPT_BACKWARD_WEIGHT ? lens->ctx->place.node : lens->ctx->place.output;
    o.role = pass == MPT_FORWARD         ? MPT_ROLE_ACTIVATION
             : pass == MPT_BACKWARD_DATA ? MPT_ROLE_ACTIVATION_GRADIENT
                                         : MPT_ROLE_WEIGHT_GRADIENT;
    return o;
}

static void mpt__output_reads(mpt__output *o, mpt_array a, size_t a_count, mpt_array b, size_t b_count) {
    o->read[0] = a;
    o->counts[0] = a_count;
    o->read[1] = b;
    o->counts[1] = b_count;
}

/* Sends *array, with its rows, to fp32 memory of the lens if something is to be seen or done there. */
static mpt_result mpt__divert(mpt_lens *lens, mpt__output *o, mpt_array *array, size_t *stride) {
    const int seen = lens->ctx->place.node && (lens->net || lens->explain);
    const int dense = array->type == MPT_F32 && o->stride == o->C;
    o->real = *array;
    o->diverted =
        array->data && o->rows && o->C && (lens->explain || !dense) && (seen || mpt__lens_rule(lens, o->pass));
    if (!o->diverted) return MPT_OK;
    MPT__TRY(mpt__lens_scratch(lens, MPT__OUTPUT + o->slot, o->rows * o->C, array));
    if (stride) *stride = o->C;
    return o->beta != 0 ? mpt__lens_copy(lens, o->rows, o->C, o->real, o->stride, *array, o->C) : MPT_OK;
}

static void mpt__histogram_join(mpt_histogram *h, const mpt_histogram *other, int subtract, int shift) {
    const uint64_t sign = subtract ? (uint64_t)0 - 1 : 1; /* modulo 2^64 */
    int e;
    h->zero += sign * other->zero;
    h->inf += sign * other->inf;
    h->nan += sign * other->nan;
    for (e = 0; e < 255; e++)
        h->exponent[e < shift ? 0 : e - shift > 254 ? 254 : e - shift] += sign * other->exponent[e];
}

static mpt_result mpt__lens_count(mpt_lens *lens, int node, mpt_role role, size_t n, mpt_array x, int adds) {
    mpt__sight *s;
    if (!lens->net || !node || node > lens->net->count || role == MPT_ROLE_COUNT) return MPT_OK;
    s = &lens->sights[(node - 1) * MPT_ROLE_COUNT + (int)role];
    memset(&lens->fresh, 0, sizeof lens->fresh);
    MPT__TRY(lens->base.histogram(lens->ctx, n, x, &lens->fresh));
    if (adds) mpt__histogram_join(&s->total, &s->last, 1, 0);
    memset(&s->last, 0, sizeof s->last);
    mpt__histogram_join(&s->last, &lens->fresh, 0, role == MPT_ROLE_ACTIVATION ? 0 : lens->shift);
    mpt__histogram_join(&s->total, &s->last, 0, 0);
    return MPT_OK;
}

typedef struct mpt__rounding_work {
    const mpt_precision *precision;
    float *x;
    uint64_t seed, draw;
} mpt__rounding_work;

static void mpt__rounding_task(void *arg, size_t begin, size_t end, int worker) {
    const mpt__rounding_work *w = (const mpt__rounding_work *)arg;
    const mpt__rounder rounder = mpt__rounder_of(w->precision);
    const int draws = w->precision->round == MPT_ROUND_STOCHASTIC;
    size_t i;
    (void)worker;
    for (i = begin; i < end; i++)
        w->x[i] = mpt__rounded(&rounder, w->x[i], draws ? mpt_hash(w->seed, w->draw, 0, i) : 0);
}

static void mpt__lens_round(mpt_lens *lens, const mpt_precision *precision, uint64_t seed, size_t n, void *x) {
    mpt__rounding_work w;
    w.precision = precision;
    w.x = (float *)x;
    w.seed = seed;
    w.draw = lens->draws++;
    mpt__parallel(lens->ctx, n, 8 * n, mpt__rounding_task, &w);
}

static mpt_result mpt__explain_output(mpt_lens *lens, const mpt__output *o, mpt_array array);

/* What was written is seen, rounded as simulated, and brought to where it belongs. */
static mpt_result mpt__deliver(mpt_lens *lens, const mpt__output *o, mpt_array array) {
    const mpt_what_if *what = mpt__lens_rule(lens, o->pass);
    const size_t n = o->rows * o->C;
    if (!array.data || !n) return MPT_OK;
    MPT__TRY(mpt__lens_count(lens, o->node, o->role, n, array, o->beta != 0));
    if (what && mpt__precision_changes(&what->output)) mpt__lens_round(lens, &what->output, what->seed, n, array.data);
    if (lens->explain && !lens->explain->found) MPT__TRY(mpt__explain_output(lens, o, array));
    return o->diverted ? mpt__lens_copy(lens, o->rows, o->C, array, o->C, o->real, o->stride) : MPT_OK;
}

/* -- Simulated products -- */

/* An operand as it would be read: rounded, in a dense copy. */
static mpt_result mpt__operand(mpt_lens *lens, const mpt_what_if *what, int which, size_t rows, size_t C, mpt_array *x,
                               size_t *stride) {
    mpt_array copy;
    if (!what || !rows || !C || !mpt__precision_changes(&what->operands)) return MPT_OK;
    MPT__TRY(mpt__lens_scratch(lens, which, rows * C, &copy));
    MPT__TRY(mpt__lens_copy(lens, rows, C, *x, *stride, copy, C));
    mpt__lens_round(lens, &what->operands, what->seed, rows * C, copy.data);
    *x = copy;
    *stride = C;
    return MPT_OK;
}

static int mpt__sum_changes(const mpt_what_if *what) {
    return what && (what->chunk || mpt__precision_changes(&what->sum));
}

typedef struct mpt__plain { /* the engine's product by a plain loop */
    mpt__product product;
    const mpt_conv2d_op *op; /* NULL: of matrices */
    size_t group;
    const mpt_what_if *what;
    uint64_t draw;
} mpt__plain;

/* Where tap (r,s) of row u of a convolution's image lies in x, or for the gradient of x in dy: its first channel of the
   group; -1 for zeros. dy's row is read forwards, so with the last tap first. */
static size_t mpt__plain_tap(const mpt__plain *w, size_t u, size_t r, size_t s) {
    const mpt_conv2d_op *op = w->op;
    const mpt_conv2d_shape *z = &op->shape;
    const int back = op->pass == MPT_BACKWARD_DATA;
    const size_t H = back ? op->P : z->H, W = back ? op->Q : z->W, C = back ? z->K : z->C;
    const size_t rows = back ? z->H : op->P, columns = back ? z->W : op->Q;
    size_t y = u / columns % rows, x = u % columns; /* what is left of the image wraps to a huge number */
    if (back) {
        y += z->padding - r * z->dilation;
        x += z->padding - (z->S - 1 - s) * z->dilation;
        y = y % z->stride ? H : y / z->stride;
        x = x % z->stride ? W : x / z->stride;
    } else {
        y = y * z->stride + r * z->dilation - z->padding;
        x = x * z->stride + s * z->dilation - z->padding;
    }
    if (y >= H || x >= W) return (size_t)-1;
    return ((u / columns / rows * H + y) * W + x) * C + w->group * (C / z->groups);
}

/* out(n) = elements v .. v+n of row u of an operand, which runs along the depth or not */
static void mpt__plain_line(const mpt__plain *w, int right, size_t u, size_t v, size_t n, float *out) {
    const mpt__product *p = &w->product;
    const mpt_conv2d_shape *z = w->op ? &w->op->shape : NULL;
    const int back = w->op && w->op->pass == MPT_BACKWARD_DATA;
    const int image = w->op && right == (w->op->pass == MPT_BACKWARD_WEIGHT);
    const mpt__matrix *m = right ? &p->b : &p->a;
    const size_t channels = z ? (back ? z->K : z->C) / z->groups : 0;
    size_t some, at;
    if (right && back) { /* u: tap, filter; v: channel */
        const size_t tap = u / channels;
        at = u % channels * m->stride + (tap / z->S * z->S + z->S - 1 - tap % z->S) * p->n + v;
        mpt__load(p->ctx, m->data, at, n, out);
    } else if (!image) mpt__load(p->ctx, m->data, u * m->stride + v, n, out);
    else
        for (; n; out += some, v += some, n -= some) {
            const size_t tap = v / channels, c = v % channels;
            some = mpt__min(n, channels - c);
            at = mpt__plain_tap(w, u, tap / z->S, tap % z->S);
            if (at == (size_t)-1) memset(out, 0, some * sizeof *out);
            else mpt__load(p->ctx, back ? w->op->y : w->op->x, at + c, some, out);
        }
}

/* Sums of row i and `columns` columns from j on. tile(RUN,RUN): a piece of the right operand, as it lies in memory. */
static void mpt__plain_block(const mpt__plain *w, const mpt__rounder *rounder, size_t i, size_t j, size_t columns,
                             float *tile, float *sums) {
    const mpt__product *p = &w->product;
    const size_t chunk = w->what->chunk ? w->what->chunk : 1;
    const size_t across = p->b.along ? MPT__RUN : 1, down = p->b.along ? 1 : MPT__RUN;
    const int draws = w->what->sum.round == MPT_ROUND_STOCHASTIC;
    float a[MPT__RUN], parts[MPT__RUN] = {0};
    size_t l, d, c, left = chunk;
    memset(sums, 0, MPT__RUN * sizeof *sums);
    for (l = 0; l < p->k; l += MPT__RUN) {
        const size_t some = mpt__min(p->k - l, MPT__RUN);
        if (p->a.along) mpt__plain_line(w, 0, i, l, some, a);
        for (d = 0; d < some && !p->a.along; d++) mpt__plain_line(w, 0, l + d, i, 1, a + d);
        for (c = 0; c < columns && p->b.along; c++) mpt__plain_line(w, 1, j + c, l, some, tile + c * MPT__RUN);
        for (d = 0; d < some && !p->b.along; d++) mpt__plain_line(w, 1, l + d, j, columns, tile + d * MPT__RUN);
        for (d = 0; d < some; d++) {
            for (c = 0; c < columns; c++) parts[c] = mpt__add(parts[c], mpt__mul(a[d], tile[c * across + d * down]));
            if (--left && l + d + 1 < p->k) continue;
            for (c = 0; c < columns; c++) {
                const uint32_t random = draws ? mpt_hash(w->what->seed, w->draw, i * p->n + j + c + 1, l + d) : 0;
                sums[c] = mpt__rounded(rounder, mpt__add(sums[c], parts[c]), random);
            }
            memset(parts, 0, sizeof parts);
            left = chunk;
        }
    }
}

static void mpt__plain_task(void *arg, size_t begin, size_t end, int worker) {
    const mpt__plain *w = (const mpt__plain *)arg;
    const mpt__rounder rounder = mpt__rounder_of(&w->what->sum);
    const mpt__desk desk = mpt__desk_of(w->product.ctx, worker);
    size_t i, j;
    for (i = begin; i < end; i++) {
        for (j = 0; j < w->product.n; j += MPT__RUN) {
            const size_t columns = mpt__min(w->product.n - j, MPT__RUN);
            mpt__plain_block(w, &rounder, i, j, columns, desk.panels, desk.sums);
            mpt__finish_rows(&w->product, i, 1, j, columns, desk.sums, MPT__RUN, &desk);
        }
    }
}

static void mpt__plain_run(mpt_lens *lens, mpt__plain *w) {
    const mpt__product *p = &w->product;
    w->draw = lens->draws++;
    mpt__parallel(lens->ctx, p->m, 8 * p->m * p->n * p->k, mpt__plain_task, w);
}

static void mpt__plain_gemm(mpt_lens *lens, const mpt_what_if *what, const mpt_gemm_op *op) {
    mpt__plain w = MPT_ZERO;
    w.product = mpt__gemm_product(lens->ctx, op);
    w.what = what;
    mpt__plain_run(lens, &w);
}

static void mpt__plain_conv2d(mpt_lens *lens, const mpt_what_if *what, const mpt_conv2d_op *op) {
    mpt__plain w = MPT_ZERO;
    w.op = op;
    w.what = what;
    for (w.group = 0; w.group < op->shape.groups; w.group++) {
        w.product = mpt__conv2d_product(lens->ctx, op, w.group);
        if (w.product.turned) mpt__turn(&w.product); /* dw, not its transpose */
        mpt__plain_run(lens, &w);
    }
}

/* -- The lens's own table -- */

static mpt_result mpt__lens_gemm(mpt_context *ctx, const mpt_gemm_op *op) {
    mpt_lens *lens = mpt__lens_of(ctx);
    const mpt_pass pass = ctx->place.node ? ctx->place.pass : MPT_FORWARD;
    const mpt_what_if *what = mpt__lens_rule(lens, pass);
    const size_t a_rows = op->trans_a ? op->k : op->m, b_rows = op->trans_b ? op->n : op->k;
    mpt__output o = mpt__output_of(lens, "product", pass, op->m, op->n, op->ldc, op->beta);
    mpt_gemm_op run = *op;
    mpt_result r = MPT_OK;
    mpt__output_reads(&o, op->a, op->m * op->k, op->b, op->k * op->n);
    MPT__TRY(mpt__divert(lens, &o, &run.c, &run.ldc));
    MPT__TRY(mpt__operand(lens, what, MPT__LEFT, a_rows, op->trans_a ? op->m : op->k, &run.a, &run.lda));
    MPT__TRY(mpt__operand(lens, what, MPT__RIGHT, b_rows, op->trans_b ? op->k : op->n, &run.b, &run.ldb));
    if (mpt__sum_changes(what)) mpt__plain_gemm(lens, what, &run);
    else MPT__THROUGH(lens, r, gemm, &run);
    return r == MPT_OK ? mpt__deliver(lens, &o, run.c) : r;
}

static mpt_result mpt__lens_conv2d(mpt_context *ctx, const mpt_conv2d_op *op) {
    mpt_lens *lens = mpt__lens_of(ctx);
    const mpt_conv2d_shape *z = &op->shape;
    const mpt_what_if *what = mpt__lens_rule(lens, op->pass);
    size_t count[3]; /* of x, w, y */
    const int written = op->pass == MPT_FORWARD ? 2 : op->pass == MPT_BACKWARD_DATA ? 0 : 1;
    const int left = written == 2 ? 0 : 2, right = written == 1 ? 0 : 1; /* value or gradient; the other operand */
    mpt__output o;
    mpt_conv2d_op run = *op;
    mpt_array *array[3];
    mpt_result r = MPT_OK;
    count[0] = z->N * z->H * z->W * z->C;
    array[0] = &run.x;
    count[1] = z->K * z->R * z->S * (z->C / z->groups);
    array[1] = &run.w;
    count[2] = z->N * op->P * op->Q * z->K;
    array[2] = &run.y;
    o = mpt__output_of(lens, "convolution", op->pass, 1, count[written], count[written], op->beta);
    mpt__output_reads(&o, *array[left], count[left], *array[right], count[right]);
    MPT__TRY(mpt__divert(lens, &o, array[written], NULL));
    MPT__TRY(mpt__operand(lens, what, MPT__LEFT, 1, count[left], array[left], &count[left]));
    MPT__TRY(mpt__operand(lens, what, MPT__RIGHT, 1, count[right], array[right], &count[right]));
    if (mpt__sum_changes(what)) mpt__plain_conv2d(lens, what, &run);
    else MPT__THROUGH(lens, r, conv2d, &run);
    return r == MPT_OK ? mpt__deliver(lens, &o, *array[written]) : r;
}

static mpt_result mpt__lens_column_sums(mpt_context *ctx, size_t rows, size_t C, mpt_array dy, float beta, mpt_array db,
                                        int product) {
    mpt_lens *lens = mpt__lens_of(ctx);
    mpt__output o = mpt__output_of(lens, "bias gradient", MPT_BACKWARD_WEIGHT, 1, C, C, beta);
    mpt_array to = db;
    mpt_result r;
    (void)product; /* that the device could do both at once: then the lens would see neither */
    o.role = MPT_ROLE_COUNT;
    mpt__output_reads(&o, dy, rows * C, dy, 0);
    MPT__TRY(mpt__divert(lens, &o, &to, NULL));
    ctx->backend.user = lens->inner.user;
    r = lens->inner.column_sums(ctx, rows, C, dy, beta, to, 0);
    ctx->backend.user = lens;
    return r == MPT_OK ? mpt__deliver(lens, &o, to) : r;
}

/* Casts are looked at for inf only, and as nothing but a cast to nearest can be told apart from its rounding. */
static mpt_result mpt__lens_map(mpt_context *ctx, const mpt_map_op *op) {
    static const char *const names[] = {"cast", "activation", "activation gradient", "addition", "dropout"};
    mpt_lens *lens = mpt__lens_of(ctx);
    const int keeps = op->map == MPT_MAP_ACTIVATION_GRADIENT || op->map == MPT_MAP_DROPOUT;
    const int two = op->map == MPT_MAP_ACTIVATION_GRADIENT || (op->map == MPT_MAP_ADD && op->beta != 0);
    const int cast = op->map == MPT_MAP_CAST;
    mpt__output o = mpt__output_of(lens, names[op->map], ctx->place.pass, 1, op->n, op->n, keeps ? op->beta : 0);
    mpt_map_op run = *op;
    mpt_result r;
    if (op->map == MPT_MAP_ADD && op->b.data == op->out.data) o.beta = op->beta;
    if (cast) o.role = MPT_ROLE_COUNT;
    mpt__output_reads(&o, op->a, op->n, op->b, two ? op->n : 0);
    if (cast && !(lens->explain && ctx->place.node)) {
        MPT__THROUGH(lens, r, map, op);
        return r;
    }
    MPT__TRY(mpt__divert(lens, &o, &run.out, NULL));
    MPT__THROUGH(lens, r, map, &run);
    return r == MPT_OK ? mpt__deliver(lens, &o, run.out) : r;
}

static mpt_result mpt__lens_copy_columns(mpt_context *ctx, const mpt_columns_op *op) {
    mpt_lens *lens = mpt__lens_of(ctx);
    mpt__output o = mpt__output_of(lens, "copy", ctx->place.pass, op->rows, op->C, op->y_stride, op->beta);
    mpt_columns_op run = *op;
    mpt_result r;
    MPT__TRY(mpt__divert(lens, &o, &run.y, &run.y_stride));
    MPT__THROUGH(lens, r, copy_columns, &run);
    return r == MPT_OK ? mpt__deliver(lens, &o, run.y) : r;
}

static mpt_result mpt__lens_pool2d(mpt_context *ctx, const mpt_pool2d_op *op) {
    mpt_lens *lens = mpt__lens_of(ctx);
    const mpt_pool2d_shape *z = &op->shape;
    const int forward = op->pass == MPT_FORWARD;
    const size_t x = z->N * z->H * z->W * z->C, y = z->N * op->P * op->Q * z->C, n = forward ? y : x;
    mpt__output o = mpt__output_of(lens, "pooling", op->pass, 1, n, n, op->beta);
    mpt_pool2d_op run = *op;
    mpt_result r;
    mpt__output_reads(&o, forward ? op->x : op->y, forward ? x : y, op->x, 0);
    MPT__TRY(mpt__divert(lens, &o, forward ? &run.y : &run.x, NULL));
    MPT__THROUGH(lens, r, pool2d, &run);
    return r == MPT_OK ? mpt__deliver(lens, &o, forward ? run.y : run.x) : r;
}

/* Backward writes three: dx, dgamma and dbeta. */
/* The slope of the activation behind a norm by itself, so that the gradient between the two is seen */
static mpt_result mpt__lens_norm_slope(mpt_lens *lens, mpt_norm_op *op) {
    mpt_context *ctx = lens->ctx;
    const mpt_place place = ctx->place;
    mpt_map_op slope = MPT_ZERO;
    mpt_result r;
    if (!op->act) return MPT_OK;
    slope.map = MPT_MAP_ACTIVATION_GRADIENT;
    slope.act = op->act;
    slope.n = op->shape.N * op->shape.pixels * op->shape.C;
    slope.a = op->saved;
    slope.b = slope.out = op->y;
    ctx->place.pass = MPT_BACKWARD_DATA;
    ctx->place.output = place.node;
    r = mpt__lens_map(ctx, &slope);
    ctx->place = place;
    op->act = MPT_IDENTITY;
    return r;
}

static mpt_result mpt__lens_norm_backward(mpt_lens *lens, const mpt_norm_op *op) {
    const size_t C = op->shape.C, n = op->shape.N * op->shape.pixels * C;
    mpt__output dx = mpt__output_of(lens, "normalisation", MPT_BACKWARD_DATA, 1, n, n, op->scale_x);
    mpt__output dgamma = mpt__output_of(lens, "normalisation", MPT_BACKWARD_WEIGHT, 1, C, C, op->scale);
    mpt__output dbeta = dgamma;
    mpt_norm_op run = *op;
    mpt_result r;
    dgamma.slot = 1;
    dbeta.slot = 2;
    dbeta.role = MPT_ROLE_COUNT;
    MPT__TRY(mpt__lens_norm_slope(lens, &run));
    mpt__output_reads(&dx, op->y, n, op->x, n);
    mpt__output_reads(&dgamma, op->y, n, op->x, n);
    mpt__output_reads(&dbeta, op->y, n, op->x, 0);
    MPT__TRY(mpt__divert(lens, &dx, &run.dx, NULL));
    MPT__TRY(mpt__divert(lens, &dgamma, &run.dgamma, NULL));
    MPT__TRY(mpt__divert(lens, &dbeta, &run.dbeta, NULL));
    MPT__THROUGH(lens, r, norm, &run);
    if (r == MPT_OK) r = mpt__deliver(lens, &dx, run.dx);
    if (r == MPT_OK) r = mpt__deliver(lens, &dgamma, run.dgamma);
    return r == MPT_OK ? mpt__deliver(lens, &dbeta, run.dbeta) : r;
}

static mpt_result mpt__lens_norm(mpt_context *ctx, const mpt_norm_op *op) {
    mpt_lens *lens = mpt__lens_of(ctx);
    const size_t n = op->shape.N * op->shape.pixels * op->shape.C;
    mpt__output o = mpt__output_of(lens, "normalisation", MPT_FORWARD, 1, n, n, 0);
    mpt_norm_op run = *op;
    mpt_result r;
    if (op->pass == MPT_NORM_BACKWARD) return mpt__lens_norm_backward(lens, op);
    if (op->pass != MPT_NORM_FORWARD) {
        MPT__THROUGH(lens, r, norm, op);
        return r;
    }
    mpt__output_reads(&o, op->x, n, op->gamma, op->shape.C);
    MPT__TRY(mpt__divert(lens, &o, &run.y, NULL));
    MPT__THROUGH(lens, r, norm, &run);
    return r == MPT_OK ? mpt__deliver(lens, &o, run.y) : r;
}

/* log2 of the loss scale, rounded to an integer. */
static mpt_result mpt__lens_loss_scale(mpt_lens *lens, const float *loss_scale) {
    float scale = 1;
    uint32_t u;
    if (loss_scale) MPT__TRY(lens->base.download(lens->ctx, &scale, loss_scale, sizeof scale));
    u = mpt__bits(scale);
    lens->shift = (int)(u >> 23 & 255) - 127 + ((u & 0x7fffffu) > 0x3504f3u);
    return MPT_OK;
}

static mpt_result mpt__lens_loss(mpt_context *ctx, const mpt_loss_op *op) {
    mpt_lens *lens = mpt__lens_of(ctx);
    mpt__output o = mpt__output_of(lens, "loss", MPT_BACKWARD_DATA, 1, op->N * op->C, op->N * op->C, 0);
    mpt_loss_op run = *op;
    mpt_result r;
    mpt__output_reads(&o, op->x, op->N * op->C, op->x, 0);
    if (lens->net) MPT__TRY(mpt__lens_loss_scale(lens, op->loss_scale));
    MPT__TRY(mpt__divert(lens, &o, &run.dx, NULL));
    MPT__THROUGH(lens, r, loss, &run);
    return r == MPT_OK ? mpt__deliver(lens, &o, run.dx) : r;
}

/* Within a forward pass the input is uploaded, in fp32. */
static mpt_result mpt__lens_upload(mpt_context *ctx, void *device, const void *host, size_t bytes) {
    mpt_lens *lens = mpt__lens_of(ctx);
    const mpt_array x = mpt_typed_array(device, MPT_F32);
    mpt_result r;
    ctx->backend.user = lens->inner.user;
    r = lens->inner.upload(ctx, device, host, bytes);
    ctx->backend.user = lens;
    if (r != MPT_OK || !ctx->place.node || ctx->place.pass != MPT_FORWARD) return r;
    return mpt__lens_count(lens, ctx->place.output, MPT_ROLE_ACTIVATION, bytes / sizeof(float), x, 0);
}

MPT_DEF mpt_lens *mpt_lens_open(mpt_context *ctx) {
    mpt_backend *b = ctx ? &ctx->backend : NULL;
    mpt_lens *lens = ctx ? (mpt_lens *)mpt__host_alloc(ctx, sizeof *lens) : NULL;
    if (!lens) return NULL;
    lens->ctx = ctx;
    lens->inner = *b;
    lens->base = b->gemm == mpt__lens_gemm ? mpt__lens_of(ctx)->base : *b;
    b->user = lens;
    b->upload = mpt__lens_upload;
    b->map = mpt__lens_map;
    b->gemm = mpt__lens_gemm;
    b->conv2d = mpt__lens_conv2d;
    b->column_sums = mpt__lens_column_sums;
    b->copy_columns = mpt__lens_copy_columns;
    b->pool2d = mpt__lens_pool2d;
    b->norm = mpt__lens_norm;
    b->loss = mpt__lens_loss;
    b->begin = NULL;
    b->end = NULL; /* a recorded step would not pass through */
    return lens;
}

MPT_DEF mpt_result mpt_lens_close(mpt_lens *lens) {
    mpt_context *ctx = lens ? lens->ctx : NULL;
    int i;
    if (!lens) return MPT_OK;
    if (ctx->backend.user != lens)
        return mpt_fail(ctx, MPT_ERROR_ORDER, "lens_close: close the lens that was opened after this one first");
    ctx->backend = lens->inner;
    for (i = 0; i < MPT__SCRATCHES; i++)
        if (lens->bytes[i]) lens->base.release(ctx, lens->scratch[i].data);
    mpt__host_free(ctx, lens->sights);
    mpt__host_free(ctx, lens->rules);
    mpt__host_free(ctx, lens);
    return MPT_OK;
}

/* -- Histograms of a model -- */

MPT_DEF mpt_result mpt_lens_watch(mpt_lens *lens, mpt_model *net) {
    mpt__sight *sights = NULL;
    if (!lens) return MPT_ERROR_ARGUMENT;
    if (net && (net->ctx != lens->ctx || !net->built))
        return mpt_fail(lens->ctx, MPT_ERROR_ARGUMENT, "lens_watch: the model is not built, or of another context");
    if (net) {
        sights = (mpt__sight *)mpt__host_alloc(lens->ctx, (size_t)net->count * MPT_ROLE_COUNT * sizeof *sights);
        if (!sights) return MPT_ERROR_NO_MEMORY;
    }
    mpt__host_free(lens->ctx, lens->sights);
    lens->sights = sights;
    lens->net = net;
    return MPT_OK;
}

static mpt_result mpt__weight_histogram(mpt_lens *lens, int tensor, mpt_histogram *out) {
    mpt_params *params = lens->net->params;
    const float *master = tensor ? mpt_params_master(params, tensor) : NULL;
    if (!tensor) return MPT_OK;
    return lens->base.histogram(lens->ctx, mpt_params_count(params, tensor),
                                master ? mpt_f32_array(master) : mpt_params_weight(params, tensor), out);
}

MPT_DEF mpt_result mpt_lens_histogram(mpt_lens *lens, int node, mpt_role role, mpt_histogram *out) {
    int id;
    if (!lens) return MPT_ERROR_ARGUMENT;
    if (!lens->net) return mpt_fail(lens->ctx, MPT_ERROR_ORDER, "lens_histogram: no model is watched");
    if (node < 0 || node > lens->net->count || (unsigned)role >= MPT_ROLE_COUNT || !out)
        return mpt_fail(lens->ctx, MPT_ERROR_ARGUMENT,
                        "lens_histogram: node %d is not in 0..%d, role %d is unknown, or out is NULL", node,
                        lens->net->count, (int)role);
    memset(out, 0, sizeof *out);
    for (id = node ? node : 1; id <= (node ? node : lens->net->count); id++) {
        const mpt__sight *s = &lens->sights[(id - 1) * MPT_ROLE_COUNT + (int)role];
        if (role == MPT_ROLE_WEIGHT) MPT__TRY(mpt__weight_histogram(lens, mpt__node_of(lens->net, id)->weight, out));
        else mpt__histogram_join(out, &s->total, 0, 0);
    }
    return MPT_OK;
}

static void mpt__print_sight(mpt__table *t, const mpt_histogram *h, int id, const char *name, mpt_role role,
                             mpt_dtype type, int log2_scale) {
    static const char *const roles[] = {"weight", "activation", "activation gradient", "weight gradient"};
    const int gradient = role == MPT_ROLE_ACTIVATION_GRADIENT || role == MPT_ROLE_WEIGHT_GRADIENT;
    int low, high;
    const int any = mpt__histogram_ends(h, &low, &high);
    mpt__cell(t, "%d", id);
    mpt__cell(t, "%s", name);
    mpt__cell(t, "%s", roles[role]);
    mpt__cell(t, "%z", (size_t)(mpt__histogram_finite(h) + h->inf + h->nan));
    mpt__cell(t, "%z", (size_t)h->zero);
    mpt__cell(t, "%z", (size_t)h->inf);
    mpt__cell(t, "%z", (size_t)h->nan);
    mpt__cell(t, any ? "%d" : "-", low);
    mpt__cell(t, any ? "%d" : "-", high);
    mpt__cell(t, "%s", mpt_dtype_name(type));
    mpt__fit_cells(t, h, type, 0);
    mpt__fit_cells(t, h, type, log2_scale);
    mpt__cell(t, gradient ? "%d" : "-", mpt_histogram_scale(h, type, MPT_SCALE_HEADROOM));
    mpt__row_end(t);
}

/* The nodes, then 0 for all; those that have shown nothing are left out. */
MPT_DEF mpt_result mpt_lens_print(mpt_lens *lens, int log2_scale, mpt_style style, mpt_write write, void *user) {
    static const mpt__column columns[] = {{"", 4},
                                          {"node", 20},
                                          {"role", 40},
                                          {"values", 51},
                                          {"zero", 61},
                                          {"inf", 67},
                                          {"nan", 73},
                                          {"low", 78},
                                          {"high", 83},
                                          {"type", 89},
                                          {"flushed", 98},
                                          {"subnormal", 109},
                                          {"overflowed", 120},
                                          {"flushed S", 130},
                                          {"subnormal S", 142},
                                          {"overflowed S", 155},
                                          {"advised", 0}};
    mpt_histogram *h;
    mpt__table t;
    int i, role, type;
    if (!lens) return MPT_ERROR_ARGUMENT;
    MPT__TRY(mpt__need_write(lens->ctx, "lens_print", style, write));
    if (!lens->net) return mpt_fail(lens->ctx, MPT_ERROR_ORDER, "lens_print: no model is watched");
    h = &lens->fresh;
    mpt__table_start(&t, columns, style, write, user);
    for (i = 1; i <= lens->net->count + 1; i++) {
        const int id = i > lens->net->count ? 0 : i;
        for (role = 0; role < MPT_ROLE_COUNT; role++) {
            MPT__TRY(mpt_lens_histogram(lens, id, (mpt_role)role, h));
            if (!(mpt__histogram_finite(h) + h->inf + h->nan)) continue;
            for (type = 0; type < 4; type++)
                mpt__print_sight(&t, h, id, id ? mpt__node_of(lens->net, id)->name : "all", (mpt_role)role,
                                 mpt__narrow_types[type], log2_scale);
        }
    }
    return MPT_OK;
}

/* -- What if -- */

static int mpt__precision_known(const mpt_precision *p) {
    return (unsigned)p->format < MPT_FORMAT_COUNT && (unsigned)p->round <= MPT_ROUND_STOCHASTIC &&
           (unsigned)p->overflow <= MPT_OVERFLOW_SATURATE;
}

MPT_DEF mpt_result mpt_lens_simulate(mpt_lens *lens, int node, unsigned passes, const mpt_what_if *what) {
    mpt__rule *rules;
    if (!lens) return MPT_ERROR_ARGUMENT;
    if (strcmp(lens->base.name, "cpu"))
        return mpt_fail(lens->ctx, MPT_ERROR_UNSUPPORTED, "lens_simulate: on '%s'; only on the CPU", lens->base.name);
    if (!what) {
        lens->rule_count = 0;
        return MPT_OK;
    }
    if (node < 0 || passes > 7 || !mpt__precision_known(&what->operands) || !mpt__precision_known(&what->sum) ||
        !mpt__precision_known(&what->output))
        return mpt_fail(lens->ctx, MPT_ERROR_ARGUMENT,
                        "lens_simulate: node %d or passes %d is out of range, or a precision is unknown", node,
                        (int)passes);
    rules = (mpt__rule *)mpt__grow(lens->ctx, lens->rules, lens->rule_count, &lens->rule_capacity, sizeof *rules);
    if (!rules) return MPT_ERROR_NO_MEMORY;
    lens->rules = rules;
    rules += lens->rule_count++;
    rules->node = node;
    rules->passes = passes ? passes : 7;
    rules->what = *what;
    return MPT_OK;
}

/* -- Explaining -- */

static void mpt__range_add(mpt_range *range, float x) {
    const double size = fabs((double)x);
    const uint32_t magnitude = mpt__bits(x) & 0x7fffffffu;
    range->count++;
    if (!magnitude) range->zero++;
    else if (magnitude > 0x7f800000u) range->nan++;
    else if (magnitude == 0x7f800000u) range->inf++;
    else {
        if (!(range->smallest > 0) || size < range->smallest) range->smallest = size;
        if (size > range->largest) range->largest = size;
    }
}

/* Downloaded a piece at a time: only the one operation that is named is looked at so. */
static mpt_result mpt__range_of(mpt_lens *lens, size_t n, mpt_array x, mpt_range *range) {
    const size_t size = mpt_dtype_size(x.type);
    unsigned char raw[512];
    size_t i, j;
    memset(range, 0, sizeof *range);
    for (i = 0; i < n; i += sizeof raw / size) {
        const size_t some = mpt__min(n - i, sizeof raw / size);
        MPT__TRY(lens->base.download(lens->ctx, raw, (const char *)x.data + i * size, some * size));
        for (j = 0; j < some; j++) {
            uint16_t half;
            float full;
            memcpy(&half, raw + j * size, sizeof half);
            if (size == 4) memcpy(&full, raw + j * size, sizeof full);
            else full = mpt_widen(half, x.type);
            mpt__range_add(range, full);
        }
    }
    return MPT_OK;
}

/* Is *o, which is still in fp32, finite in the type that it will have? If not it is the one that is sought. */
static mpt_result mpt__explain_output(mpt_lens *lens, const mpt__output *o, mpt_array array) {
    mpt_explanation *e = lens->explain;
    const size_t n = o->rows * o->C;
    mpt_array stage;
    mpt_scan scan;
    int i;
    MPT__TRY(mpt__lens_scratch(lens, MPT__STAGE, n, &stage));
    stage.type = o->real.type;
    MPT__TRY(mpt__lens_copy(lens, 1, n, array, n, stage, n));
    MPT__TRY(lens->base.scan(lens->ctx, n, 1, stage, &scan));
    if (!(scan.inf + scan.nan)) return MPT_OK;
    MPT__TRY(mpt__range_of(lens, n, array, &e->result));
    e->result.inf = scan.inf;
    e->result.nan = scan.nan;
    for (i = 0; i < 2; i++) MPT__TRY(mpt__range_of(lens, o->counts[i], o->read[i], &e->read[i]));
    e->operation = o->operation;
    e->node = lens->ctx->place.node;
    e->pass = o->pass;
    e->output = o->node;
    e->type = o->real.type;
    e->found = 1;
    return MPT_OK;
}

static void mpt__explain_text(const mpt_model *net, mpt_explanation *e) {
    static const char *const what[] = {"value", "gradient", "weight gradient"};
    if (!e->found) {
        mpt__print(e->text, sizeof e->text, "every value and gradient is finite at scale %g", (double)e->scale);
        return;
    }
    mpt__print(e->text, sizeof e->text,
               "'%s', %s of pass %s: the %s of '%s' has %z inf and %z nan of %z in %s; finite ones %g to %g before "
               "rounding, made from %g to %g; scale %g",
               mpt__node_of(net, e->node)->name, e->operation, mpt__pass_names[e->pass], what[e->pass],
               mpt__node_of(net, e->output)->name, (size_t)e->result.inf, (size_t)e->result.nan,
               (size_t)e->result.count, mpt_dtype_name(e->type), e->result.smallest, e->result.largest,
               e->read[0].smallest, e->read[0].largest, (double)e->scale);
}

static mpt_result mpt__replay(mpt_model *net, const float *x, const void *target, int n, mpt_explanation *out) {
    mpt_lens *lens = mpt_lens_open(net->ctx);
    mpt_result r = lens ? MPT_OK : MPT_ERROR_NO_MEMORY;
    if (r != MPT_OK) return r;
    lens->explain = out;
    r = mpt_forward(net, x, target, n);
    if (r == MPT_OK) r = mpt_backward(net);
    mpt_lens_close(lens);
    return r;
}

/* A forward pass that no step follows must not count: what it touches is put back. */
static mpt_result mpt__replay_kept(mpt_model *net, const float *x, const void *target, int n, mpt_explanation *out) {
    const int micro = net->micro, followed = net->followed, gathered = net->gathered;
    const uint64_t steps = net->steps_at_backward;
    mpt_scaler_state scaler;
    mpt_loss_sum sums[MPT__SUMS];
    char why[sizeof net->ctx->why];
    mpt_result r, kept;
    MPT__TRY(mpt_scaler_get_state(net->scaler, &scaler));
    MPT__TRY(mpt_download(net->ctx, sums, net->sums, sizeof sums));
    MPT__TRY(mpt_scaler_set_scale(net->scaler, out->scale));
    r = mpt__replay(net, x, target, n, out);
    memcpy(why, net->ctx->why, sizeof why);
    kept = mpt_scaler_set_state(net->scaler, &scaler);
    if (kept == MPT_OK) kept = mpt_upload(net->ctx, net->sums, sums, sizeof sums);
    if (kept == MPT_OK && net->statistics)
        kept = mpt_cast(net->ctx, net->statistics, mpt_f32_array(net->running), mpt_f32_array(net->pending), NULL);
    net->micro = micro;
    net->followed = followed;
    net->gathered = gathered;
    net->steps_at_backward = steps;
    net->forward_rows = 0;
    if (r != MPT_OK) memcpy(net->ctx->why, why, sizeof why); /* not that of what came after it */
    return r != MPT_OK ? r : kept;
}

MPT_DEF mpt_result mpt_explain(mpt_model *net, const float *x, const void *target, int n, float scale,
                               mpt_explanation *out) {
    const mpt_optimizer_state *s;
    MPT__TRY(mpt__need_built(net, "explain"));
    if (!out) return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "explain: out is NULL");
    if (net->opt->phase != MPT__READY || (net->micro && net->steps_at_backward == net->opt->steps))
        return mpt_fail(net->ctx, MPT_ERROR_ORDER, "explain: a step is under way, whose gradients it would overwrite");
    memset(out, 0, sizeof *out);
    MPT__TRY(mpt_optimizer_get_state(net->opt, &net->opt->mirror));
    s = &net->opt->mirror;
    out->scale = mpt__bits(scale) << 1 ? scale
                 : s->skipped          ? s->journal[(s->skipped - 1) % MPT_JOURNAL].scale
                                       : mpt_scaler_scale(net->scaler);
    MPT__TRY(mpt__replay_kept(net, x, target, n, out));
    mpt__explain_text(net, out);
    return MPT_OK;
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
#include <process.h>
#ifdef __cplusplus
extern "C"
#endif
    __declspec(dllimport) int __stdcall MoveFileExA(const char *from, const char *to, unsigned long flags);
static int mpt__sync(FILE *file) { return _commit(_fileno(file)) == 0; }
static int mpt__rename(const char *from, const char *to) { return MoveFileExA(from, to, 1 | 8); } /* replace, flush */
#else
#ifdef MPT__POSIX
#include <sys/stat.h>
MPT__SYSTEM(int, fileno, (FILE * file)) /* -std=c99 hides them */
MPT__SYSTEM(int, fsync, (int file))
MPT__SYSTEM(char *, realpath, (const char *path, char *out))
static int mpt__sync(FILE *file) { return mpt__sys_fsync(mpt__sys_fileno(file)) == 0; }
/* With the permissions of the file that it replaces */
static int mpt__rename(const char *from, const char *to) {
    struct stat old;
    if (stat(to, &old) == 0 && chmod(from, old.st_mode & 07777) != 0) return 0;
    return rename(from, to) == 0;
}
#else
static int mpt__sync(FILE *file) { return file != NULL; }
static int mpt__rename(const char *from, const char *to) { return rename(from, to) == 0; }
#endif
#endif

#ifdef MPT__POSIX
static void *mpt__open(const char *path, int writing) { return fopen(path, writing ? "wbx" : "rb"); } /* x: a new one */
#else
static void *mpt__open(const char *path, int writing) { return fopen(path, writing ? "wb" : "rb"); }
#endif
#ifdef _WIN32 /* whose long has 32 bits */
static int mpt__seek_end(FILE *file) { return _fseeki64(file, 0, SEEK_END) == 0; }
static int64_t mpt__tell(FILE *file) { return _ftelli64(file); }
#else /* where long has 32 bits, fopen opens no file over 2 GiB, unless off_t was made larger: then ftell fails */
static int mpt__seek_end(FILE *file) { return fseek(file, 0, SEEK_END) == 0; }
static int64_t mpt__tell(FILE *file) { return ftell(file); }
#endif
static int mpt__size(void *file, uint64_t *bytes) {
    const int64_t end = mpt__seek_end((FILE *)file) ? mpt__tell((FILE *)file) : -1;
    if (end < 0) return 0;
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
    int moment;     /* RAW: of the optimizer, 1..3; 0: none */
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
        case MPT__POOL:
            if (mpt__node_of(net, node->in[0])->H * mpt__node_of(net, node->in[0])->W > 1) return before + i;
            id = node->in[0];
            break;
        case MPT__CONCAT: {
            const size_t first = (size_t)mpt__node_of(net, node->in[0])->C;
            id = node->in[i >= first];
            if (i >= first) {
                before += first;
                i -= first;
            }
            break;
        }
        default: return before + i;
        }
    }
}

/* Has PyTorch the elements of two values, of one pixel each, in the same order? `other` 0: and in the model's. */
static int mpt__same_order(const mpt_model *net, int id, int other) {
    const size_t count = (size_t)mpt__node_of(net, id)->C;
    size_t i;
    for (i = 0; i < count; i++)
        if (mpt__torch_index(net, id, i) != (other ? mpt__torch_index(net, other, i) : i)) return 0;
    return 1;
}

/* Layers that compute something else on a flattened image than PyTorch, which has its elements in C, H, W order, so
   that no order of their weights makes up for it: sums with what is in another order, and groups of channels. */
static mpt_result mpt__check_orders(const mpt__job *job) {
    const mpt_model *net = job->net;
    int id;
    for (id = 2; id <= net->count; id++) {
        const mpt__node *node = mpt__node_of(net, id), *in = mpt__node_of(net, node->in[0]);
        const int groups = (node->kind == MPT__NORM && node->norm == MPT__NORM_GROUP && node->norm_shape.groups > 1) ||
                           (node->kind == MPT__CONV2D && node->conv.groups > 1);
        if (in->H * in->W > 1) continue;
        if ((node->kind == MPT__ADD && !mpt__same_order(net, node->in[0], node->in[1])) ||
            (groups && !mpt__same_order(net, node->in[0], 0)))
            return mpt__job_fail(job, MPT_ERROR_UNSUPPORTED,
                                 "'%s' reads a flattened image, which PyTorch has in C, H, W order: it would compute "
                                 "something else there",
                                 node->name);
    }
    return MPT_OK;
}

/* Where element i of the model's order stands in the file. */
static size_t mpt__part_index(const mpt_model *net, const mpt__part *part, size_t i) {
    const size_t column = i % part->columns, row = i - column;
    if (part->inner) {
        const size_t channel = column % part->inner, tap = column / part->inner;
        const size_t there = part->reads ? mpt__torch_index(net, part->reads, channel) : channel;
        return row + there * (part->columns / part->inner) + tap;
    }
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
    part->shape[0] = part->count = part->columns = count;
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
    part->shape[1] = part->columns = part->count / (size_t)node->C;
    if (node->kind == MPT__LINEAR) part->reads = node->in[0];
    else {
        const mpt__node *in = mpt__node_of(job->net, node->in[0]);
        if (in->H * in->W == 1 && node->conv.groups == 1) part->reads = node->in[0];
        part->shape[1] = part->inner = node->conv.C / node->conv.groups;
        part->shape[2] = node->conv.R;
        part->shape[3] = node->conv.S;
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

enum { MPT__SETTINGS = 0, MPT__OPTIMIZER, MPT__SCALER, MPT__STATES, MPT__SETTINGS_VERSION = 2 };
enum { MPT__STATE_BYTES = 1 << 24 }; /* of a state whose version is still to be read, at most */
static size_t mpt__state_words(const mpt__job *job, int which);

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
        int first = job->count;
        if (moment) mpt__list_tensors(job, moments[i - 1], MPT__RAW, MPT_F32, moment);
        for (; first < job->count; first++) job->parts[first].moment = i;
    }
    mpt__list_running(job);
    if (job->full && !masters) mpt__list_tensors(job, "", MPT__RAW, (int)params->copy.type, params->copy.data);
    else mpt__list_tensors(job, "", MPT__VALUES, job->full ? (int)MPT_F32 : job->type, NULL);
    if (job->full && params->low)
        mpt__list_tensors(job, "mpt.low.", MPT__RAW,
                          params->desc.master == MPT_MASTER_SPLIT ? MPT__U16 : (int)params->copy.type, params->low);
    if (job->full) mpt__part_add(job, "mpt.sum", "", "", MPT__SUM, MPT__U8, 8);
    return job->full ? MPT_OK : mpt__check_orders(job);
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
    w->theirs = theirs;
    w->ours = ours;
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
    X(double, double, grad_norm) X(double, double, inv_scale) X(double, double, schedule) X(double, double, clip) \
    X(double, double, clip_value) \
    X(uint64_t, uint64_t, moved) X(uint64_t, uint64_t, lost) X(double, double, scan.sum_squares) \
    X(uint64_t, uint64_t, scan.inf) X(uint64_t, uint64_t, scan.nan) X(uint64_t, uint64_t, scan.first)
#define MPT__SKIP_MEMBERS(X) \
    X(uint64_t, uint64_t, step) X(float, float, scale) X(int32_t, int, tensor) X(uint64_t, uint64_t, inf) \
    X(uint64_t, uint64_t, nan) X(int32_t, int, reason)
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
    X(mpt__node_kind, int, kind) X(int, int, in[0]) X(int, int, in[1]) X(int, int, no_bias) \
    X(mpt_init, int, init) X(mpt_activation, int, act) X(float, float, p) \
    X(size_t, uint64_t, conv.R) X(size_t, uint64_t, conv.S) X(size_t, uint64_t, conv.stride) \
    X(size_t, uint64_t, conv.padding) X(size_t, uint64_t, conv.dilation) X(size_t, uint64_t, conv.groups) \
    X(mpt__norm_kind, int, norm) X(size_t, uint64_t, norm_shape.groups) X(float, float, norm_shape.eps) \
    X(float, float, momentum) X(mpt_pool, int, pool_kind) X(size_t, uint64_t, pool.R) X(size_t, uint64_t, pool.S) \
    X(size_t, uint64_t, pool.stride) X(size_t, uint64_t, pool.padding) X(mpt_loss_kind, int, loss) \
    X(float, float, cross_entropy.label_smoothing) X(int, int, cross_entropy.ignore) \
    X(int32_t, int, cross_entropy.ignore_index) X(mpt_dtype, int, policy.param) X(mpt_dtype, int, policy.compute) \
    X(mpt_dtype, int, type) X(mpt_dtype, int, grad_type) X(int, int, H) X(int, int, W) X(int, int, C)
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
    mpt__walk_uint64_t(w, "class_weights", net->weights_sum);
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

/* {"__metadata__":{"format":"pt"},"fc.weight":{"dtype":"F32","shape":[3,2],"data_offsets":[0,24]}}, and blanks to a
   multiple of 8 */
static size_t mpt__header_text(const mpt__job *job, char *out, size_t size) {
    size_t at = 0;
    mpt__text t;
    int i;
    t.at = out;
    t.end = out + size - 1;
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
static mpt_result mpt__pack(const mpt__job *job, const mpt__part *part, const void *raw) {
    const size_t size = mpt__file_types[part->type].size, from = part->kind == MPT__VALUES ? sizeof(float) : size;
    size_t i;
    for (i = 0; i < part->count; i++) {
        uint32_t bits = mpt__get_element(raw, i, from);
        const float value = mpt__float(bits);
        if (from != size) bits = mpt_narrow(value, (mpt_dtype)part->type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0);
        if (from != size && mpt__finite(value) && !mpt__finite(mpt_widen(bits, (mpt_dtype)part->type)))
            return mpt__job_fail(job, MPT_ERROR_VALUE, "element %z of '%s' is %g, which %s does not hold", i,
                                 part->name, (double)value, mpt__file_types[part->type].name);
        mpt__put_bytes(job->data + mpt__part_index(job->net, part, i) * size, bits, size);
    }
    return MPT_OK;
}

static mpt_result mpt__write_part(mpt__job *job, const mpt__part *part, uint64_t *sum) {
    const size_t bytes = mpt__part_bytes(part);
    void *raw = job->staging;
    if (part->kind == MPT__STATE) mpt__walk_state(job, part->id, job->data, 0);
    else if (part->kind == MPT__SUM) mpt__put_bytes(job->data, *sum, bytes);
    else {
        if (part->kind == MPT__VALUES) MPT__TRY(mpt_params_get(job->net->params, part->id, (float *)raw));
        else MPT__TRY(mpt_download(job->ctx, raw, part->device, bytes));
        MPT__TRY(mpt__pack(job, part, raw));
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

/* A number that no other writer of the same file has at the same time: of the process, and of this job on its stack. */
static uint32_t mpt__writer(const mpt__job *job) {
#if defined(_WIN32) && !defined(MPT_NO_STDIO)
    const uint64_t process = (uint64_t)_getpid();
#elif defined(MPT__POSIX)
    const uint64_t process = (uint64_t)getpid();
#else
    const uint64_t process = 0;
#endif
    return mpt_hash(process, (uint64_t)(uintptr_t)job, (uint64_t)(uintptr_t)job->net, 0);
}

/* The file that a symbolic link leads to, for the link is to stay one; NULL: it is none, or leads nowhere. */
static char *mpt__linked(const mpt__job *job, mpt_result *r) {
#if defined(MPT__POSIX) && !defined(MPT_NO_STDIO)
    enum { LONGEST = 4096 };
    char *target = job->disk == &mpt__stdio ? (char *)mpt__host_alloc(job->ctx, LONGEST + 1) : NULL;
    *r = target || job->disk != &mpt__stdio ? MPT_OK : MPT_ERROR_NO_MEMORY;
    if (!target || mpt__sys_realpath(job->path, target)) return target;
    mpt__host_free(job->ctx, target);
    return NULL;
#else
    (void)job;
    *r = MPT_OK;
    return NULL;
#endif
}

static mpt_result mpt__save_file(mpt__job *job) {
    const char *given = job->path;
    size_t size;
    char *temporary, *target;
    mpt_result r;
    MPT__TRY(mpt__state_new(job));
    MPT__TRY(mpt__list(job));
    target = mpt__linked(job, &r);
    MPT__TRY(r);
    if (target) job->path = target;
    size = strlen(job->path) + 16;
    temporary = (char *)mpt__host_alloc(job->ctx, size);
    if (temporary) mpt__print(temporary, size, "%s.%d.tmp", job->path, (int)(mpt__writer(job) >> 1));
    r = temporary ? mpt__save_to(job, temporary) : MPT_ERROR_NO_MEMORY;
    job->path = given;
    mpt__host_free(job->ctx, temporary);
    mpt__host_free(job->ctx, target);
    return r;
}

/* -- Reading a header -- JSON of this one form; a 0 takes the place of the quote that ends a string, and stands behind
   the header */

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

/* The four digits of a \u escape at job->at, or -1 */
static int mpt__json_unit(mpt__job *job) {
    int unit = 0, i;
    for (i = 0; i < 4; i++, job->at++) {
        const char c = *job->at;
        int digit = -1;
        if (c >= '0' && c <= '9') digit = c - '0';
        if (c >= 'a' && c <= 'f') digit = c - 'a' + 10;
        if (c >= 'A' && c <= 'F') digit = c - 'A' + 10;
        if (digit < 0) return -1;
        unit = unit * 16 + digit;
    }
    return unit;
}

/* A \u escape, or two that make a pair of surrogates, to UTF-8 at *out, which they never overtake */
static mpt_result mpt__json_unicode(mpt__job *job, char **out) {
    int unit = mpt__json_unit(job), low = 0;
    char *to = *out;
    if (unit >= 0xd800 && unit < 0xdc00 && job->at[0] == '\\' && job->at[1] == 'u') {
        job->at += 2;
        low = mpt__json_unit(job);
        if (low < 0xdc00 || low > 0xdfff) return mpt__json_fail(job, "half a pair of surrogates");
        unit = 0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00);
    }
    if (unit <= 0 || (unit >= 0xd800 && unit < 0xe000))
        return mpt__json_fail(job, "an escape that is no character, half a pair of surrogates, or 0");
    if (unit < 0x80) *to++ = (char)unit;
    else {
        if (unit < 0x800) *to++ = (char)(0xc0 | unit >> 6);
        else {
            if (unit < 0x10000) *to++ = (char)(0xe0 | unit >> 12);
            else {
                *to++ = (char)(0xf0 | unit >> 18);
                *to++ = (char)(0x80 | (unit >> 12 & 63));
            }
            *to++ = (char)(0x80 | (unit >> 6 & 63));
        }
        *to++ = (char)(0x80 | (unit & 63));
    }
    *out = to;
    return MPT_OK;
}

/* Its escapes become what they stand for, in place. */
static mpt_result mpt__json_string(mpt__job *job, const char **out) {
    static const char escapes[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    char *to;
    MPT__TRY(mpt__json_need(job, '"'));
    *out = to = job->at;
    while (*job->at != '"') {
        const char c = *job->at++;
        const char *escape;
        if ((unsigned char)c < 32) {
            job->at--;
            return mpt__json_fail(job, "a string with a control code, or without an end");
        }
        if (c != '\\') {
            *to++ = c;
            continue;
        }
        if (*job->at == 'u') {
            job->at++;
            MPT__TRY(mpt__json_unicode(job, &to));
            continue;
        }
        escape = *job->at ? strchr(escapes, *job->at) : NULL;
        if (!escape) return mpt__json_fail(job, "an unknown escape");
        *to++ = meant[escape - escapes];
        job->at++;
    }
    job->at++;
    *to = 0;
    return MPT_OK;
}

static int mpt__json_word(mpt__job *job, const char *word) {
    const size_t length = strlen(word);
    mpt__json_take(job, 0); /* blanks */
    if (strncmp(job->at, word, length) != 0) return 0;
    job->at += length;
    return 1;
}

/* -1.5e+3 and the like, of JSON's grammar */
static int mpt__json_real(mpt__job *job) {
    const char *first;
    int part;
    if (*job->at == '-') job->at++;
    for (part = 0; part < 3; part++) {
        if (part == 1 && *job->at != '.') continue;
        if (part == 2 && *job->at != 'e' && *job->at != 'E') continue;
        if (part) job->at++;
        if (part == 2 && (*job->at == '+' || *job->at == '-')) job->at++;
        first = job->at;
        while (*job->at >= '0' && *job->at <= '9') job->at++;
        if (job->at == first || (!part && *first == '0' && job->at > first + 1)) return 0;
    }
    return 1;
}

/* Any value, which means nothing here. Lists and objects in one another are a stack of bits, 64 deep: 1, an object */
static mpt_result mpt__json_value(mpt__job *job) {
    uint64_t objects = 0;
    int depth = 0;
    const char *text;
    for (;;) {
        const int opened = mpt__json_take(job, '{') ? 2 : mpt__json_take(job, '[');
        if (opened) {
            if (depth == 64) return mpt__json_fail(job, "over 64 lists and objects in one another");
            objects = objects << 1 | (uint64_t)(opened == 2);
            depth++;
            if (!mpt__json_take(job, opened == 2 ? '}' : ']')) {
                if (opened == 1) continue;
                MPT__TRY(mpt__json_string(job, &text));
                MPT__TRY(mpt__json_need(job, ':'));
                continue;
            }
            objects >>= 1;
            depth--;
        } else if (*job->at == '"') MPT__TRY(mpt__json_string(job, &text));
        else if (!mpt__json_word(job, "null") && !mpt__json_word(job, "true") && !mpt__json_word(job, "false") &&
                 !mpt__json_real(job))
            return mpt__json_fail(job, "want a value");
        while (depth && !mpt__json_take(job, ',')) {
            MPT__TRY(mpt__json_need(job, objects & 1 ? '}' : ']'));
            objects >>= 1;
            depth--;
        }
        if (!depth) return MPT_OK;
        if (!(objects & 1)) continue;
        MPT__TRY(mpt__json_string(job, &text));
        MPT__TRY(mpt__json_need(job, ':'));
    }
}

/* Is all of it UTF-8, as RFC 3629 has it: no longer than need be, no surrogates, nothing over 0x10ffff? */
static int mpt__is_utf8(const char *text, size_t bytes) {
    const unsigned char *at = (const unsigned char *)text, *end = at + bytes;
    while (at < end) {
        const unsigned char c = *at++;
        const int more = c < 0x80 ? 0 : c < 0xc2 ? -1 : c < 0xe0 ? 1 : c < 0xf0 ? 2 : c < 0xf5 ? 3 : -1;
        int i;
        if (more < 0 || end - at < more) return 0;
        if ((c == 0xe0 && *at < 0xa0) || (c == 0xed && *at > 0x9f)) return 0;
        if ((c == 0xf0 && *at < 0x90) || (c == 0xf4 && *at > 0x8f)) return 0;
        for (i = 0; i < more; i++)
            if ((*at++ & 0xc0) != 0x80) return 0;
    }
    return 1;
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
    if (mpt__json_word(job, "null")) return MPT_OK;
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

/* The three members in any order, each once; others are passed over. */
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
        if (member == 3) {
            MPT__TRY(mpt__json_value(job));
            continue;
        }
        if (seen & 1 << member) return mpt__json_fail(job, "a member that is there twice");
        seen |= 1 << member;
        if (member == 0) MPT__TRY(mpt__json_type(job, entry));
        if (member == 1) MPT__TRY(mpt__json_numbers(job, entry->shape, MPT__DIMS, &entry->dims));
        if (member == 2) MPT__TRY(mpt__json_numbers(job, places, 2, &count));
    } while (mpt__json_take(job, ','));
    MPT__TRY(mpt__json_need(job, '}'));
    if (seen != 7 || count != 2) return mpt__json_fail(job, "a tensor without type, shape or both its places");
    entry->begin = places[0];
    entry->end = places[1];
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
    if (!mpt__is_utf8(job->header, bytes)) return mpt__json_fail(job, "it is not UTF-8");
    MPT__TRY(mpt__json_need(job, '{'));
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
        else {
            kept = entries[--end];
            entries[end] = entries[0];
        }
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

/* A piece of the header at a time: a length that is made up asks for no more memory than the file has JSON. */
static mpt_result mpt__read_json(mpt__job *job, size_t bytes) {
    size_t have = 0, room = 0;
    while (have < bytes) {
        const size_t some = mpt__min(bytes - have, have ? have : 4096);
        char *bigger = (char *)mpt__host_alloc(job->ctx, have + some + 1);
        if (!bigger) return MPT_ERROR_NO_MEMORY;
        if (have) memcpy(bigger, job->header, have);
        mpt__host_free(job->ctx, job->header);
        job->header = bigger;
        room = have + some;
        if (!job->disk->read(job->file, job->header + have, some))
            return mpt__job_fail(job, MPT_ERROR_FILE, "the header cannot be read");
        have = room;
        job->at = job->header;
        if (!strchr(" \t\r\n{", *job->at) || !*job->at) return mpt__json_fail(job, "want '{'");
    }
    return mpt__json_header(job, bytes);
}

/* The header, and whether the tensors are where it says. */
static mpt_result mpt__read_header(mpt__job *job) {
    static const struct {
        const char *starts, *what;
    } others[] = {{"PK\3\4", "a zip file, as torch.save writes; safetensors.torch.save_file writes what is read here"},
                  {"\x80\2}q", "a pickle of an old torch.save; safetensors.torch.save_file writes what is read here"},
                  {"version ", "a git-lfs pointer, not the file; `git lfs pull` fetches it"},
                  {"<!DOCTYP", "a web page, not the file; a download went wrong"},
                  {"<!doctyp", "a web page, not the file; a download went wrong"},
                  {"<html", "a web page, not the file; a download went wrong"},
                  {"\x1f\x8b", "compressed; gzip -d unpacks it"}};
    const mpt__disk *disk = job->disk;
    unsigned char length[8];
    uint64_t size, header;
    int i;
    if (!disk->size(job->file, &size) || size < sizeof length || !disk->read(job->file, length, sizeof length))
        return mpt__job_fail(job, MPT_ERROR_FILE, "cannot be read, or has under 8 bytes");
    header = mpt__get_bytes(length, sizeof length);
    size -= sizeof length;
    for (i = 0; i < (int)(sizeof others / sizeof *others); i++)
        if (memcmp(length, others[i].starts, strlen(others[i].starts)) == 0)
            return mpt__job_fail(job, MPT_ERROR_FILE, "this is %s", others[i].what);
    if (header > size || header > MPT__HEADER || size - header > (size_t)-1 / 2)
        return mpt__job_fail(job, MPT_ERROR_FILE, "a header of %z bytes (at most %d), and %z bytes follow",
                             (size_t)header, (int)MPT__HEADER, (size_t)size);
    if (!header) return mpt__job_fail(job, MPT_ERROR_FILE, "the header has 0 bytes: want '{'");
    job->data_bytes = (size_t)(size - header);
    MPT__TRY(mpt__read_json(job, (size_t)header));
    return mpt__check_layout(job);
}

/* Reads `bytes` to `to`, or, where that is NULL, past them. */
static mpt_result mpt__read_some(mpt__job *job, unsigned char *to, uint64_t bytes) {
    unsigned char passed[512];
    while (bytes) {
        const size_t some = to || bytes < sizeof passed ? (size_t)bytes : sizeof passed;
        if (!job->disk->read(job->file, to ? to : passed, some))
            return mpt__job_fail(job, MPT_ERROR_FILE, "its %z bytes of data cannot be read", job->data_bytes);
        bytes -= some;
    }
    return MPT_OK;
}

/* The tensors that were matched, so no more than the model has, one after the other; places are of these from here
   on. */
static mpt_result mpt__read_data(mpt__job *job) {
    uint64_t bytes = 0;
    int i;
    for (i = 0; i < job->entry_count; i++)
        if (job->entries[i].used) bytes += job->entries[i].end - job->entries[i].begin;
    job->data = (unsigned char *)mpt__host_alloc(job->ctx, (size_t)bytes);
    if (!job->data) return MPT_ERROR_NO_MEMORY;
    for (i = 0, bytes = 0; i < job->entry_count; i++) {
        mpt__entry *entry = &job->entries[i];
        const uint64_t size = entry->end - entry->begin;
        MPT__TRY(mpt__read_some(job, entry->used ? job->data + bytes : NULL, size));
        if (!entry->used) continue;
        entry->begin = bytes;
        entry->end = bytes + size;
        bytes += size;
    }
    return MPT_OK;
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
    t.at = shapes[0];
    t.end = shapes[0] + sizeof shapes[0] - 1;
    mpt__put_shape(&t, entry->dims, entry->shape);
    t.at = shapes[1];
    t.end = shapes[1] + sizeof shapes[1] - 1;
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

/* With its type, or weights in any of the three. */
static mpt_result mpt__match(const mpt__job *job, mpt__part *part) {
    MPT__TRY(mpt__match_name(job, part));
    if (part->entry->type != part->type && (job->full || part->entry->type > (int)MPT_BF16))
        return mpt__job_fail(job, MPT_ERROR_TYPE, "'%s' is %s, not %s", part->name,
                             mpt__file_types[part->entry->type].name, mpt__file_types[part->type].name);
    return MPT_OK;
}

/* Is it a state of another shape? The version, which is in the data, tells more, unless there is too much of it. */
static int mpt__unlike(const mpt__part *part) {
    const mpt__entry *entry = part->entry;
    return part->kind == MPT__STATE && (entry->dims != 1 || entry->shape[0] != part->shape[0]) &&
           entry->end - entry->begin <= MPT__STATE_BYTES;
}

/* Once the data is there; the first that is unlike ends it. */
static mpt_result mpt__match_states(mpt__job *job) {
    int i;
    for (i = 0; i < MPT__STATES; i++) {
        MPT__TRY(mpt__match_version(job, &job->parts[i]));
        MPT__TRY(mpt__match_shape(job, &job->parts[i]));
    }
    return MPT_OK;
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
    for (i = 0; i < job->count; i++) {
        MPT__TRY(mpt__match(job, &job->parts[i]));
        if (mpt__unlike(&job->parts[i])) return MPT_OK; /* see mpt__match_states */
        MPT__TRY(mpt__match_shape(job, &job->parts[i]));
    }
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
    sound = mpt__not_negative(job->state->lr);
    for (i = 0; i < job->net->params->count; i++)
        sound &=
            mpt__not_negative(job->state->slices[i].lr_factor) && mpt__not_negative(job->state->slices[i].weight_decay);
    if (!sound)
        return mpt__job_fail(job, MPT_ERROR_FILE, "'mpt.optimizer' has lr %g, or an lr_factor or weight_decay below 0",
                             job->state->lr);
    if (mpt__optimizer_state_check(job->net->opt, o) != MPT_OK ||
        mpt__scaler_state_check(job->ctx, &job->state->scaler) != MPT_OK)
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

/* May the staged values of a part be? Running statistics are judged where the first half is. */
static mpt_result mpt__judge(const mpt__job *job, const mpt__part *part) {
    const int squares = part->moment >= 2 && job->net->opt->op.desc.kind != MPT_SGD;
    const float *values = (const float *)(const void *)part->staging;
    size_t i;
    if (part->kind == MPT__RUNNING && part->device == mpt_model_running(job->net, part->id))
        return mpt__running_check(job->ctx, job->call, mpt__node_of(job->net, part->id), values);
    for (i = 0; i < part->count && part->moment; i++)
        if (!mpt__finite(values[i]) || (squares && values[i] < 0))
            return mpt__job_fail(job, MPT_ERROR_FILE, "element %z of '%s' is %g, which no moment can be", i, part->name,
                                 (double)values[i]);
    return MPT_OK;
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
    for (i = 0; i < job->count; i++) MPT__TRY(mpt__judge(job, &job->parts[i]));
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
    r = mpt__read_header(job);
    if (r == MPT_OK) r = mpt__state_new(job);
    if (r == MPT_OK) r = mpt__list(job);
    if (r == MPT_OK) r = mpt__match_all(job);
    if (r == MPT_OK) r = mpt__read_data(job);
    job->disk->close(job->file, 0);
    MPT__TRY(r);
    if (job->full) {
        MPT__TRY(mpt__match_states(job));
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
    job.net = net;
    job.ctx = net->ctx;
    job.call = call;
    job.path = path;
    job.disk = disk;
    job.full = full;
    job.type = (int)type;
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
