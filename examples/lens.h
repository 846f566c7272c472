/* lens.h - see why: histograms, what-if precision, explained steps and tables for mpt.h.                   MIT licence

   The instruments of the course. Include it after mpt.h, and in one source file define its implementation as well:

       #define LENS_IMPLEMENTATION
       #include "lens.h"

   It uses only the public API of mpt.h and its BACKEND section, so it also shows how to write such a tool. It works on
   every device unless a function says otherwise, and costs nothing while it is not used.

   CONTENTS   search for "==== NAME"
     TABLES            lost updates, skipped steps, which products Tensor Cores take
     PRESETS           the loss scalers of other systems
     HISTOGRAMS        what would a type, or a loss scale, do to these values?
     GRADIENTS         is backward the derivative of forward?
     THE LENS          wraps a device: histograms of a net, what-if precision, the first bad operation
     - stop here if you only want the API -
     BASICS            memory, bits, tables
     TABLE PARTS
     PRESET PARTS
     HISTOGRAM PARTS
     GRADIENT PARTS
     PRECISIONS        rounding to any format
     PASSING THROUGH   outputs: counted, rounded, delivered
     PLAIN PRODUCTS    sums that are rounded after each addition
     OPERATIONS        the lens's own table
     LENS PARTS                                                                                                       */

#ifndef LENS_H
#define LENS_H

#ifndef MPT_H
#include "../mpt.h"
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ==== TABLES ====

   Printed like those of mpt_model_print and mpt_memory_print. */

/* Steps attempted, applied and skipped; norm of the last gradient; and with optimizer.meter the updates of the last
   step that 16-bit weights would lose: a name and a value per line. */
MPT_DEF mpt_result lens_optimizer_print(mpt_model *net, mpt_style style, mpt_write write, void *user);
/* The journal of skipped steps, oldest first: number of the attempt, scale, first tensor, how many inf and NaN, and the
   mpt_skip_reason. */
MPT_DEF mpt_result lens_skips_print(mpt_model *net, mpt_style style, mpt_write write, void *user);

/* A matrix product that a node computes in a pass over a whole batch, in BLAS's terms and row-major: c(m,n) =
   op(a)(m,k) op(b)(k,n). A convolution is one product per group, as in mpt_cuda.cuh: forward (output pixels x filters,
   over taps and channels), dX (input pixels x channels, over taps and filters), dW (filters x taps and channels, over
   output pixels). */
typedef struct lens_product {
    mpt_pass pass;
    int trans_a, trans_b;
    size_t m, n, k, lda, ldb, ldc;
    mpt_dtype a, b, c;    /* types of the operands and the result; F32 operands are read as TF32 */
    size_t count;         /* products: the groups of a convolution */
    size_t multiply_adds; /* of all of them */
    const char *broken;   /* which of m, n, k break the rule below, as "n k"; "": none */
} lens_product;

/* The product of node 1.. in a pass; *out is all zero if the node computes none in it. This only reads the plan and
   uses no device. Tensor Cores compute a product at full speed if all rows that are contiguous in memory, and the
   distances between them, are multiples of 16 bytes: 8 elements of 16 bits, 4 of TF32. (cuBLAS documentation, "Tensor
   Core Usage"; newer versions also run other products on them, padded and slower.) */
MPT_DEF mpt_result lens_model_product(const mpt_model *net, int node, mpt_pass pass, lens_product *out);
/* The same for all nodes and passes, and last the share of multiply-adds that are eligible. */
MPT_DEF mpt_result lens_products_print(const mpt_model *net, mpt_style style, mpt_write write, void *user);

/* ==== PRESETS ==== */

/* Loss scalers with the rules and settings of other systems. mpt's own is an all-zero mpt_scaler_desc. */
typedef enum lens_scaler_system {
    LENS_SCALER_TORCH = 0, /* torch.amp.GradScaler: no smallest scale */
    LENS_SCALER_APEX,      /* apex.amp: at most 2^24 */
    LENS_SCALER_JMP,       /* jmp.DynamicLossScale: starts at 2^15, at least 1 */
    LENS_SCALER_KERAS,     /* keras LossScaleOptimizer: starts at 2^15, no bounds */
    LENS_SCALER_DEEPSPEED, /* interval 1000, hysteresis 2, late growth; patience 1: it ends a run at the smallest */
    LENS_SCALER_MEGATRON   /* DynamicGradScaler: starts at 2^32, interval 1000, hysteresis 2 */
} lens_scaler_system;

MPT_DEF mpt_scaler_desc lens_scaler_preset(lens_scaler_system system);

/* ==== HISTOGRAMS ==== from mpt_histogram_add, or from a lens */

typedef struct lens_fit {
    double flushed, subnormal, overflowed; /* shares of the nonzero finite values; 0 if there are none */
} lens_fit;

/* What would happen to the values of *h in `type` if all were multiplied by 2^log2_scale first: the share that rounds
   to zero, becomes subnormal, or overflows. It knows only exponents, so all values of a bin count alike. */
MPT_DEF lens_fit lens_histogram_fit(const mpt_histogram *h, mpt_dtype type, int log2_scale);

enum { LENS_HEADROOM = 2 }; /* the headroom of the tables here: a later batch may have gradients 4 times as large */

/* log2 of the loss scale that suits gradients like those of *h (with S = 1) in `type`: of all scales in 0..24 (the
   scaler's range) that leave every value a factor 2^headroom below overflow, the one that flushes or makes subnormal
   the smallest share; of equals the smallest. 0 if there is none, for example for an empty histogram. */
MPT_DEF int lens_histogram_scale(const mpt_histogram *h, mpt_dtype type, int headroom);

/* The bars, one line per exponent: log2, count, share. */
MPT_DEF mpt_result lens_histogram_print(const mpt_histogram *h, mpt_style style, mpt_write write, void *user);
/* A line for each scale 2^first .. 2^last: what is flushed, subnormal and overflowed in fp16, bf16, e4m3, e5m2. */
MPT_DEF mpt_result lens_sweep_print(const mpt_histogram *h, int first, int last, mpt_style style, mpt_write write,
                                    void *user);

/* ==== GRADIENTS ==== */

enum { LENS_CHECKED = 64 };         /* most elements that are checked in a tensor, spread over all of it */
#define LENS_GRADIENT_BOUND 0.03125 /* a relative error up to this may come from the differences */

/* Checks the gradients of your own layer: compares the parameter gradients of n <= batch samples with differences of
   their mean loss, as training computes it (with dropout and batch statistics). For fp32 models that end in a loss.
   Prints a line for each tensor that trains: elements, how many are checked, the largest derivative, the element (from
   0) with the largest error, its gradient and difference, and the relative error: that error divided by the largest
   derivative. *worst, which may be NULL, is the largest relative error of all tensors: above LENS_GRADIENT_BOUND the
   gradient, or the layer's value, is wrong.

   The step is h = 2^-9. The loss is accurate to about 2^-23 (1 + loss), so its central difference to noise = 2^-23
   (1 + loss) / h = 2^-14 (1 + loss); curvature adds h^2 / 6 times the third derivative, which is less. If a step
   crosses the kink of a ReLU or a maximum on one side, the difference on the other side is still right, to h / 2 times
   the second derivative; if it crosses kinks on both, a quarter of the step may not. The nearest of these counts.
   noise / LENS_GRADIENT_BOUND is added to the largest derivative, for tensors whose gradient is 0, such as a bias
   before a batch norm. Errors of less than 3 % pass.

   The samples must weigh 1 each: no ignored labels, no class weights. The weights are restored, also after an error.
   Passes since the last step are discarded, as by mpt_zero_grad. MPT_ERROR_TYPE if a node is not fp32; otherwise the
   errors of mpt_forward. */
MPT_DEF mpt_result lens_gradients(mpt_model *net, const void *x, const void *target, size_t samples, mpt_style style,
                                  mpt_write write, void *user, double *worst);

/* ==== THE LENS ====

   A lens wraps a context's table of operations and watches, or changes, what passes through. Open and close it between
   any two calls: nothing is rebuilt, and without a lens nothing is slower. It works for everything that runs on the
   context, on every device, and allocates memory when it first needs it. */

typedef struct lens_view lens_view;

/* An open lens does nothing until one of the calls below. Returns NULL if out of memory. */
MPT_DEF lens_view *lens_open(mpt_context *ctx);
/* Removes it; call this before the context is closed. Lenses close in reverse order: MPT_ERROR_ORDER while a later one
   is open. NULL is allowed. */
MPT_DEF mpt_result lens_close(lens_view *lens);

/* -- What passes through: exponent histograms -- */

typedef enum lens_role {
    LENS_WEIGHT = 0,          /* of a linear, convolution or norm (gamma), from the masters where there are some */
    LENS_ACTIVATION,          /* the node's value, after a fused activation; node 1: the input */
    LENS_ACTIVATION_GRADIENT, /* of that value */
    LENS_WEIGHT_GRADIENT,
    LENS_ROLE_COUNT
} lens_role;

/* Counts the values of all nodes of a built model, from zero, in every pass from now on (also of evaluations), until it
   is called again; net NULL: no more. No other model may run on the context meanwhile.
   Values are counted in fp32 before they are rounded to 16 bits: the operation writes to memory of the lens, which is
   then rounded to the destination. On the CPU this leaves all bits of a training run unchanged; on CUDA cuBLAS may use
   another kernel for an fp32 result, with sums in another order. The inputs of an operation have been rounded, so for
   gradients far from the loss an fp32 model, or one whose scale is right, shows more.
   Gradients are counted without the loss scale (shifted by its log2, rounded to an integer; the 1/n of accumulate stays
   in them), once per pass, when all parts have been added. A node without its own memory (fused activation, flatten;
   for its gradient an input of a "sum, dy shared") may have no counts: they are at the node that it shares memory
   with. */
MPT_DEF mpt_result lens_watch(lens_view *lens, mpt_model *net);
/* *out = the counts of node 1.. in a role; node 0: of all nodes. Weights are the present ones. */
MPT_DEF mpt_result lens_histogram(lens_view *lens, int node, lens_role role, mpt_histogram *out);
/* A line for each node, role and format, and for the sum of the nodes: counts, lowest and highest exponent, what is
   flushed, subnormal and overflowed in fp16, bf16, e4m3 and e5m2 at S = 1 and at S = 2^log2_scale, and for gradients
   log2 of the suggested scale. */
MPT_DEF mpt_result lens_print(lens_view *lens, int log2_scale, mpt_style style, mpt_write write, void *user);

/* -- What if: another precision, simulated -- CPU contexts */

typedef enum lens_format { /* those of mpt_dtype, with the same numbers */
                           LENS_F32 = 0,
                           LENS_F16,
                           LENS_BF16,
                           LENS_E4M3,
                           LENS_E5M2,
                           LENS_TF32, /* 8 bits of exponent, 10 of fraction: what Tensor Cores read from fp32 */
                           LENS_FORMAT_COUNT
} lens_format;

MPT_DEF const char *lens_format_name(lens_format format); /* "f32", "f16", ... "tf32" */

/* All zero: fp32, unchanged. */
typedef struct lens_precision {
    lens_format format;
    mpt_round round;
    mpt_overflow overflow;
    int flush; /* 1: subnormals of the format become 0 */
} lens_precision;

/* x rounded to the format; `random` as in mpt_narrow. */
MPT_DEF float lens_precision_round(const lens_precision *p, float x, uint32_t random);

/* All zero: nothing changes, not a bit. */
typedef struct lens_what_if {
    lens_precision operands; /* of products: both, and a bias, are rounded before, in a copy */
    lens_precision sum;      /* of products: rounded to fp32, then to this, after each addition */
    size_t chunk;            /* this many products are added in fp32 before they are added to the sum; 0: 1 */
    lens_precision output;   /* of everything that the node writes in the pass, after bias and activation */
    uint64_t seed;           /* of stochastic rounding: draws depend on it, a count of the lens, and the element */
} lens_what_if;

/* From now on the operations of a node (0: all, and those outside of models) in the passes of a mask of 1 << mpt_pass
   (0: all three) are simulated like this; of several calls the last that fits counts. what NULL: nothing is simulated
   any more. Build the model in O0. An mpt_op_gemm outside of a model counts as forward. With a sum.format other than
   F32, or a chunk, the product is computed by a plain loop on the caller's thread, in order of k (convolution: taps,
   then channels; dX: taps, those of a row of the kernel from the last, then filters; dW: images and pixels; padding as
   zeros), about a hundred times slower; otherwise by the engine. The input is not rounded, but operands are. Stochastic
   rounding differs between calls and is the same in every run. MPT_ERROR_UNSUPPORTED on a device. */
MPT_DEF mpt_result lens_simulate(lens_view *lens, int node, unsigned passes, const lens_what_if *what);

/* -- Why was this step skipped? -- */

/* The content of an array. smallest and largest: magnitudes of finite values other than 0; both 0 if there are none. */
typedef struct lens_range {
    uint64_t count, zero, inf, nan;
    double smallest, largest;
} lens_range;

/* The first operation of a pass whose output was not finite. */
typedef struct lens_explanation {
    int found;             /* 0: all outputs were finite, and the rest is 0 */
    const char *operation; /* "product", "convolution", "loss", ... */
    int node;              /* the node that it belongs to */
    mpt_pass pass;
    int output;         /* node whose value or gradient it wrote */
    mpt_dtype type;     /* of that value or gradient */
    float scale;        /* loss scale of the replay */
    lens_range result;  /* what it wrote: inf and nan as stored, the rest in fp32 before rounding */
    lens_range read[2]; /* what it read: value and weight, or gradient and the other operand; count 0: none */
    char text[320];     /* all of this in a sentence */
} lens_explanation;

/* Replays forward and backward of at most `batch` samples, like mpt_replay, at a loss scale (0: that of the last
   skipped step, or the present one if there was none) and names the first operation that wrote inf or NaN. After a
   skipped step with the same samples this is the reason for the skip, because that changed only the scale and the
   counters. */
MPT_DEF mpt_result lens_explain(mpt_model *net, const void *x, const void *target, size_t samples, float scale,
                                lens_explanation *out);

#ifdef __cplusplus
} /* extern "C" */
#endif

/* ---------------------------- stop here if you only want the API ---------------------------- */

#endif /* LENS_H */

#if defined(LENS_IMPLEMENTATION) && !defined(LENS__IMPLEMENTED)
#define LENS__IMPLEMENTED

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ==== BASICS ==== */

/* Returns from the calling function if a call fails. */
#define LENS__TRY(call)                        \
    do {                                       \
        const mpt_result lens__r = (call);     \
        if (lens__r != MPT_OK) return lens__r; \
    } while (0)

/* Zeroed host memory of the context's allocator. */
static void *lens__alloc(mpt_context *ctx, size_t bytes) {
    const mpt_context_desc desc = mpt_context_get_desc(ctx);
    void *p = desc.alloc ? desc.alloc(bytes, desc.user) : malloc(bytes);
    if (p) memset(p, 0, bytes);
    else mpt_fail(ctx, MPT_ERROR_NO_MEMORY, "out of memory: the allocator refused %zu bytes", bytes);
    return p;
}

static void lens__free(mpt_context *ctx, void *p, size_t bytes) {
    const mpt_context_desc desc = mpt_context_get_desc(ctx);
    if (!p) return;
    if (desc.release) desc.release(p, bytes, desc.user);
    else free(p);
}

static size_t lens__min(size_t a, size_t b) { return a < b ? a : b; }

static uint32_t lens__bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static float lens__float(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* x, kept from contraction into a fused multiply-add and from reassociation in builds that allow them. */
static float lens__kept(float x) {
#if defined(__FAST_MATH__) || defined(__FP_FAST_FMAF)
    volatile float kept = x;
    return kept;
#else
    return x;
#endif
}

typedef struct lens__layout { /* of a format's bits */
    int exponent, fraction;
    uint32_t largest; /* bits of the largest finite value */
} lens__layout;

static lens__layout lens__layout_of(mpt_dtype type) {
    static const lens__layout layouts[MPT_DTYPE_COUNT] = {
        {8, 23, 0x7f7fffffu}, {5, 10, 0x7bffu}, {8, 7, 0x7f7fu}, {4, 3, 0x7eu}, {5, 2, 0x7bu}};
    return layouts[type];
}

/* -- Tables: a line at a time -- */

typedef struct lens__column {
    const char *name;
    int end; /* where the next one starts in a line of text; 0: the last */
} lens__column;

enum { LENS__LINE = 256, LENS__CELL = 128 };

typedef struct lens__table {
    mpt_style style;
    mpt_write write;
    void *user;
    const lens__column *columns;
    int column;    /* of the next cell */
    size_t length; /* of the line so far; room for the end is always left */
    char line[LENS__LINE];
} lens__table;

static void lens__put(lens__table *t, char c) {
    if (t->length < LENS__LINE - 2) t->line[t->length++] = c;
}

/* CSV: in quotes if necessary */
static void lens__put_csv(lens__table *t, const char *text) {
    const int quoted = strpbrk(text, ",\"\n") != NULL;
    if (quoted) lens__put(t, '"');
    for (; *text; text++) {
        if (*text == '"') lens__put(t, '"');
        lens__put(t, *text);
    }
    if (quoted) lens__put(t, '"');
}

/* The next cell of a line: in text followed by blanks up to its column's end. */
static void lens__cell(lens__table *t, const char *text) {
    const size_t end = (size_t)t->columns[t->column].end;
    if (t->style == MPT_CSV) {
        if (t->column) lens__put(t, ',');
        lens__put_csv(t, text);
    } else {
        for (; *text; text++) lens__put(t, *text);
        if (end) lens__put(t, ' ');
        while (t->length < end && t->length < LENS__LINE - 2) lens__put(t, ' ');
    }
    t->column++;
}

static void lens__int_cell(lens__table *t, int number) {
    char text[LENS__CELL];
    snprintf(text, sizeof text, "%d", number);
    lens__cell(t, text);
}

static void lens__count_cell(lens__table *t, uint64_t count) {
    char text[LENS__CELL];
    snprintf(text, sizeof text, "%" PRIu64, count);
    lens__cell(t, text);
}

/* Six digits, with a point in every locale. */
static const char *lens__number(char *out, size_t size, double number) {
    char *comma;
    snprintf(out, size, "%g", number);
    comma = strchr(out, ',');
    if (comma) *comma = '.';
    return out;
}

/* Whole numbers with all their digits. */
static void lens__number_cell(lens__table *t, double number) {
    const uint64_t whole = number >= 1 && number < 4e9 ? (uint64_t)number : 0;
    char text[LENS__CELL];
    if (whole && !(number > (double)whole)) lens__count_cell(t, whole);
    else lens__cell(t, lens__number(text, sizeof text, number));
}

static void lens__row_end(lens__table *t) {
    t->line[t->length++] = '\n';
    t->line[t->length] = 0;
    t->write(t->line, t->user);
    t->length = 0;
    t->column = 0;
}

/* The header. Columns end with the one whose end is 0. */
static void lens__table_start(lens__table *t, const lens__column *columns, mpt_style style, mpt_write write,
                              void *user) {
    int i = 0;
    t->style = style;
    t->write = write;
    t->user = user;
    t->columns = columns;
    t->column = 0;
    t->length = 0;
    do lens__cell(t, columns[i].name);
    while (columns[i++].end);
    lens__row_end(t);
}

static mpt_result lens__need_write(mpt_context *ctx, const char *call, mpt_style style, mpt_write write) {
    if (!write) return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "%s: write is NULL", call);
    if (style == MPT_TEXT || style == MPT_CSV) return MPT_OK;
    return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "%s: unknown style %d", call, (int)style);
}

static double lens__percent(double part, double whole) { return whole > 0 ? 100 * part / whole : 0; }

/* ==== TABLE PARTS ==== */

/* The state of a model's optimizer */
static mpt_result lens__need_state(mpt_model *net, const char *call, mpt_style style, mpt_write write,
                                   mpt_optimizer_state *out) {
    mpt_context *ctx = mpt_model_context(net);
    if (!ctx) return MPT_ERROR_ARGUMENT;
    LENS__TRY(lens__need_write(ctx, call, style, write));
    if (!mpt_model_optimizer(net)) return mpt_fail(ctx, MPT_ERROR_ORDER, "%s: the model is not built", call);
    return mpt_optimizer_get_state(mpt_model_optimizer(net), out);
}

static void lens__print_number(lens__table *t, const char *name, double number) {
    lens__cell(t, name);
    lens__number_cell(t, number);
    lens__row_end(t);
}

MPT_DEF mpt_result lens_optimizer_print(mpt_model *net, mpt_style style, mpt_write write, void *user) {
    static const lens__column columns[] = {{"what", 16}, {"value", 0}};
    mpt_optimizer_state s;
    lens__table t;
    LENS__TRY(lens__need_state(net, "lens_optimizer_print", style, write, &s));
    lens__table_start(&t, columns, style, write, user);
    lens__print_number(&t, "attempted", (double)s.attempted);
    lens__print_number(&t, "applied", (double)s.applied);
    lens__print_number(&t, "skipped", (double)s.skipped);
    lens__print_number(&t, "gradient norm", s.grad_norm);
    if (!mpt_optimizer_get_desc(mpt_model_optimizer(net)).meter) return MPT_OK;
    lens__print_number(&t, "moved", (double)s.moved);
    lens__print_number(&t, "lost", (double)s.lost);
    lens__print_number(&t, "lost share", lens__percent((double)s.lost, (double)s.moved));
    return MPT_OK;
}

static void lens__print_skip(lens__table *t, const mpt_params *params, const mpt_skip *skip) {
    static const char *const reasons[] = {"none", "gradient", "empty", "statistics", "moment"};
    const char *tensor = skip->reason == MPT_SKIP_GRADIENT ? "the norm" : "none";
    if (skip->tensor) tensor = mpt_params_name(params, skip->tensor);
    lens__count_cell(t, skip->step);
    lens__number_cell(t, (double)skip->scale);
    lens__cell(t, tensor);
    lens__count_cell(t, skip->inf);
    lens__count_cell(t, skip->nan);
    lens__cell(t, reasons[skip->reason]);
    lens__row_end(t);
}

MPT_DEF mpt_result lens_skips_print(mpt_model *net, mpt_style style, mpt_write write, void *user) {
    static const lens__column columns[] = {{"step", 10}, {"scale", 20}, {"first tensor", 40},
                                           {"inf", 50},  {"nan", 60},   {"reason", 0}};
    mpt_optimizer_state s;
    lens__table t;
    uint64_t i;
    LENS__TRY(lens__need_state(net, "lens_skips_print", style, write, &s));
    lens__table_start(&t, columns, style, write, user);
    for (i = s.skipped > MPT_JOURNAL ? s.skipped - MPT_JOURNAL : 0; i < s.skipped; i++)
        lens__print_skip(&t, mpt_model_params(net), &s.journal[i % MPT_JOURNAL]);
    return MPT_OK;
}

/* -- Products for Tensor Cores -- */

static void lens__linear_product(lens_product *p, size_t N, size_t D, size_t O) {
    p->trans_a = p->pass == MPT_BACKWARD_WEIGHT;
    p->trans_b = p->pass == MPT_FORWARD;
    p->m = N;
    p->n = D;
    p->k = O;
    if (p->trans_a) {
        p->m = O;
        p->k = N;
    }
    if (p->trans_b) {
        p->n = O;
        p->k = D;
    }
    p->lda = p->trans_b ? D : O;
    p->ldb = D;
    p->ldc = p->n;
}

/* Whether each output reads only the pixel in its own place */
static int lens__is_product(const mpt_conv2d_shape *z) {
    return z->R * z->S == 1 && z->stride_h * z->stride_w == 1 && !z->padding_h && !z->padding_w;
}

/* As mpt_cuda.cuh computes it: except for a 1x1 kernel, one operand is gathered into rows of taps, padded to 16 bytes.
   N images in, P x Q pixels out. */
static void lens__filters_product(lens_product *p, size_t N, const mpt_node_info *node) {
    const mpt_conv2d_shape *z = &node->conv;
    const size_t P = (size_t)node->H, Q = (size_t)node->W, taps = z->R * z->S;
    const size_t C = z->C / z->groups, K = z->K / z->groups;
    const size_t size = p->a == p->b ? mpt_dtype_size(p->a) : 4;
    const int gathered = !lens__is_product(z);
    lens__linear_product(p, N * P * Q, taps * C, K);
    if (p->pass == MPT_FORWARD) {
        p->lda = z->C;
        p->ldc = z->K;
    }
    if (p->pass == MPT_BACKWARD_DATA) {
        p->m = N * z->H * z->W;
        p->n = C;
        p->k = taps * K;
        p->lda = z->K;
        p->ldb = C;
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
static const char *lens__product_broken(const lens_product *p) {
    static const char *const broken[] = {"", "m", "n", "m n", "k", "m k", "n k", "m n k"};
    const size_t size = p->a == p->b ? mpt_dtype_size(p->a) : 4, each = 16 / size;
    const size_t each_c = 16 / mpt_dtype_size(p->c);
    int bits = 0;
    if (p->trans_a && p->m % each) bits |= 1;
    if ((!p->trans_b && p->n % each) || p->n % each_c) bits |= 2;
    if ((!p->trans_a || p->trans_b) && p->k % each) bits |= 4;
    return broken[bits];
}

static void lens__product_types(lens_product *p, const mpt_node_info *in, const mpt_node_info *node) {
    p->a = p->pass == MPT_FORWARD ? node->weight_type : node->grad_type;
    p->b = node->weight_type;
    p->c = MPT_F32;
    if (p->pass == MPT_FORWARD) p->c = node->type;
    if (p->pass == MPT_BACKWARD_DATA) p->c = in->grad_type;
}

MPT_DEF mpt_result lens_model_product(const mpt_model *net, int id, mpt_pass pass, lens_product *out) {
    mpt_node_info node, in;
    size_t batch;
    if (!out || (unsigned)pass > MPT_BACKWARD_WEIGHT)
        return mpt_fail(mpt_model_context(net), MPT_ERROR_ARGUMENT,
                        "lens_model_product: pass %d is unknown, or out is NULL", (int)pass);
    LENS__TRY(mpt_model_node(net, id, &node));
    memset(out, 0, sizeof *out);
    if (node.weight_type == MPT_DTYPE_COUNT) return MPT_OK;
    LENS__TRY(mpt_model_node(net, node.in[0], &in));
    if (pass == MPT_BACKWARD_DATA && !in.needs_gradient) return MPT_OK;
    out->pass = pass;
    out->count = 1;
    lens__product_types(out, &in, &node);
    batch = (size_t)mpt_model_train_desc(net).batch;
    if (node.conv.R) lens__filters_product(out, batch, &node);
    else lens__linear_product(out, batch, (size_t)in.H * (size_t)in.W * (size_t)in.C, (size_t)node.C);
    out->multiply_adds = out->m * out->n * out->k * out->count;
    out->broken = lens__product_broken(out);
    return MPT_OK;
}

static const char *const lens__pass_names[] = {"forward", "dX", "dW"};

static const char *lens__operand_name(mpt_dtype type) { return type == MPT_F32 ? "tf32" : mpt_dtype_name(type); }

static void lens__print_product(lens__table *t, const char *name, const lens_product *p) {
    char types[LENS__CELL];
    snprintf(types, sizeof types, "%s*%s>%s", lens__operand_name(p->a), lens__operand_name(p->b), mpt_dtype_name(p->c));
    lens__cell(t, name);
    lens__cell(t, lens__pass_names[p->pass]);
    lens__count_cell(t, p->m);
    lens__count_cell(t, p->n);
    lens__count_cell(t, p->k);
    lens__cell(t, types);
    lens__count_cell(t, p->lda);
    lens__count_cell(t, p->ldb);
    lens__count_cell(t, p->ldc);
    lens__count_cell(t, p->count);
    lens__count_cell(t, p->multiply_adds);
    lens__cell(t, *p->broken ? "no" : "yes");
    lens__cell(t, p->broken);
    lens__row_end(t);
}

static void lens__print_eligible(lens__table *t, size_t eligible, size_t all) {
    char share[LENS__CELL];
    int i;
    lens__number(share, sizeof share - 2, lens__percent((double)eligible, (double)all));
    if (t->style == MPT_TEXT) strcat(share, " %");
    lens__cell(t, "all");
    for (i = 1; i < 10; i++) lens__cell(t, "");
    lens__count_cell(t, all);
    lens__cell(t, share);
    lens__cell(t, "");
    lens__row_end(t);
}

MPT_DEF mpt_result lens_products_print(const mpt_model *net, mpt_style style, mpt_write write, void *user) {
    static const lens__column columns[] = {
        {"node", 20},           {"pass", 28},      {"m", 37},       {"n", 45},   {"k", 54},
        {"types", 70},          {"lda", 78},       {"ldb", 86},     {"ldc", 94}, {"count", 100},
        {"multiply-adds", 114}, {"eligible", 123}, {"broken by", 0}};
    size_t all = 0, eligible = 0;
    mpt_node_info node;
    lens_product p;
    lens__table t;
    int id, pass;
    LENS__TRY(mpt_model_node(net, 1, &node));
    LENS__TRY(lens__need_write(mpt_model_context(net), "lens_products_print", style, write));
    lens__table_start(&t, columns, style, write, user);
    for (id = 1; id <= mpt_model_nodes(net); id++) {
        LENS__TRY(mpt_model_node(net, id, &node));
        for (pass = MPT_FORWARD; pass <= MPT_BACKWARD_WEIGHT; pass++) {
            LENS__TRY(lens_model_product(net, id, (mpt_pass)pass, &p));
            if (!p.count) continue;
            lens__print_product(&t, node.name, &p);
            all += p.multiply_adds;
            eligible += *p.broken ? 0 : p.multiply_adds;
        }
    }
    lens__print_eligible(&t, eligible, all);
    return MPT_OK;
}

/* ==== PRESET PARTS ==== */

MPT_DEF mpt_scaler_desc lens_scaler_preset(lens_scaler_system system) {
    const int large = system == LENS_SCALER_DEEPSPEED || system == LENS_SCALER_MEGATRON;
    mpt_scaler_desc d = MPT_ZERO;
    if (system == LENS_SCALER_JMP || system == LENS_SCALER_KERAS) d.init_scale = 32768.0f;
    if (system == LENS_SCALER_MEGATRON) d.init_scale = 4294967296.0f;
    d.growth_interval = large ? 1000 : 2000;
    d.hysteresis = large ? 2 : 1;
    d.unguarded = large || system == LENS_SCALER_KERAS;
    d.no_min = system == LENS_SCALER_TORCH || system == LENS_SCALER_APEX || system == LENS_SCALER_KERAS;
    d.no_max = system != LENS_SCALER_APEX;
    d.late_growth = system == LENS_SCALER_DEEPSPEED;
    d.patience = system == LENS_SCALER_DEEPSPEED;
    return mpt_scaler_defaults(&d);
}

/* ==== HISTOGRAM PARTS ==== */

MPT_DEF lens_fit lens_histogram_fit(const mpt_histogram *h, mpt_dtype type, int log2_scale) {
    const lens__layout f = lens__layout_of(type);
    const int bias = (1 << (f.exponent - 1)) - 1;
    const int normal = 1 - bias, smallest = normal - f.fraction; /* exponents of the smallest normal and subnormal */
    const int largest = (int)(f.largest >> f.fraction) - bias;   /* exponent of the largest value */
    uint64_t total = 0, flushed = 0, subnormal = 0, overflowed = 0;
    lens_fit fit = MPT_ZERO;
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

MPT_DEF int lens_histogram_scale(const mpt_histogram *h, mpt_dtype type, int headroom) {
    double least = 2;
    int s, best = 0;
    for (s = 0; s <= 24; s++) {
        const lens_fit fit = lens_histogram_fit(h, type, s);
        if (lens_histogram_fit(h, type, s + headroom).overflowed > 0) break;
        if (fit.flushed + fit.subnormal < least) {
            least = fit.flushed + fit.subnormal;
            best = s;
        }
    }
    return best;
}

static uint64_t lens__histogram_total(const mpt_histogram *h) {
    uint64_t count = h->zero + h->inf + h->nan;
    int e;
    for (e = 0; e < 255; e++) count += h->exponent[e];
    return count;
}

/* Lowest and highest exponent that values other than 0 have. Returns 0 if there are none. */
static int lens__histogram_ends(const mpt_histogram *h, int *low, int *high) {
    int first = 0, last = 254;
    *low = 0;
    *high = 0;
    while (first < 255 && !h->exponent[first]) first++;
    if (first == 255) return 0;
    while (!h->exponent[last]) last--;
    *low = first - 127;
    *high = last - 127;
    return 1;
}

MPT_DEF mpt_result lens_histogram_print(const mpt_histogram *h, mpt_style style, mpt_write write, void *user) {
    static const lens__column columns[] = {{"log2", 8}, {"count", 22}, {"share", 0}};
    int e, low, high;
    lens__table t;
    if (!h) return MPT_ERROR_ARGUMENT;
    LENS__TRY(lens__need_write(NULL, "lens_histogram_print", style, write));
    lens__table_start(&t, columns, style, write, user);
    if (!lens__histogram_ends(h, &low, &high)) return MPT_OK;
    for (e = low; e <= high; e++) {
        const uint64_t count = h->exponent[e + 127];
        lens__int_cell(&t, e);
        lens__count_cell(&t, count);
        lens__number_cell(&t, lens__percent((double)count, (double)lens__histogram_total(h)));
        lens__row_end(&t);
    }
    return MPT_OK;
}

static const mpt_dtype lens__narrow_types[] = {MPT_F16, MPT_BF16, MPT_E4M3, MPT_E5M2};

static void lens__fit_cells(lens__table *t, const mpt_histogram *h, mpt_dtype type, int log2_scale) {
    const lens_fit fit = lens_histogram_fit(h, type, log2_scale);
    lens__number_cell(t, 100 * fit.flushed);
    lens__number_cell(t, 100 * fit.subnormal);
    lens__number_cell(t, 100 * fit.overflowed);
}

MPT_DEF mpt_result lens_sweep_print(const mpt_histogram *h, int first, int last, mpt_style style, mpt_write write,
                                    void *user) {
    static const lens__column columns[] = {
        {"log2 S", 8},           {"f16 flushed", 20},      {"f16 subnormal", 34},   {"f16 overflowed", 50},
        {"bf16 flushed", 63},    {"bf16 subnormal", 78},   {"bf16 overflowed", 94}, {"e4m3 flushed", 107},
        {"e4m3 subnormal", 122}, {"e4m3 overflowed", 138}, {"e5m2 flushed", 151},   {"e5m2 subnormal", 166},
        {"e5m2 overflowed", 0}};
    lens__table t;
    int s, i;
    if (!h) return MPT_ERROR_ARGUMENT;
    LENS__TRY(lens__need_write(NULL, "lens_sweep_print", style, write));
    lens__table_start(&t, columns, style, write, user);
    for (s = first; s <= last; s++) {
        lens__int_cell(&t, s);
        for (i = 0; i < 4; i++) lens__fit_cells(&t, h, lens__narrow_types[i], s);
        lens__row_end(&t);
    }
    return MPT_OK;
}

/* ==== GRADIENT PARTS ==== */

typedef struct lens__derivative { /* of one tensor */
    size_t count, checked, element;
    double largest, off, gradient, difference; /* off, gradient, difference: of `element` */
} lens__derivative;

typedef struct lens__samples {
    const void *x;
    const void *target;
    size_t n;
} lens__samples;

static mpt_result lens__loss_of(mpt_model *net, const lens__samples *s, double *loss) {
    LENS__TRY(mpt_forward(net, s->x, s->target, s->n));
    *loss = mpt_loss(net);
    return mpt_zero_grad(net);
}

/* The loss with one weight set to `to`. */
static mpt_result lens__loss_at(mpt_model *net, const lens__samples *s, int tensor, float *w, size_t element, float to,
                                double *loss) {
    const float from = w[element];
    mpt_result r;
    w[element] = to;
    r = mpt_params_set(mpt_model_params(net), tensor, w);
    w[element] = from;
    return r == MPT_OK ? lens__loss_of(net, s, loss) : r;
}

/* The differences of the loss to both sides, by h up and down. The one that is nearest to `gradient`, if it is nearer
   than *nearest, replaces that. */
static mpt_result lens__differences(mpt_model *net, const lens__samples *s, int tensor, float *w, size_t element,
                                    double loss, float h, double gradient, double *nearest) {
    const float up = w[element] + h, down = w[element] - h;
    double above, below, d[3];
    int i;
    LENS__TRY(lens__loss_at(net, s, tensor, w, element, up, &above));
    LENS__TRY(lens__loss_at(net, s, tensor, w, element, down, &below));
    d[0] = (above - below) / ((double)up - (double)down);
    d[1] = (above - loss) / ((double)up - (double)w[element]);
    d[2] = (loss - below) / ((double)w[element] - (double)down);
    for (i = 0; i < 3; i++)
        if (fabs(gradient - d[i]) < fabs(gradient - *nearest)) *nearest = d[i];
    return MPT_OK;
}

/* With the step and, if that is off by more than 2^-8, with a quarter of it */
static mpt_result lens__difference(mpt_model *net, const lens__samples *s, int tensor, float *w, size_t element,
                                   double loss, double gradient, double *difference) {
    *difference = HUGE_VAL;
    LENS__TRY(lens__differences(net, s, tensor, w, element, loss, 1.0f / 512, gradient, difference));
    if (fabs(gradient - *difference) <= fabs(gradient) / 256) return MPT_OK;
    return lens__differences(net, s, tensor, w, element, loss, 1.0f / 2048, gradient, difference);
}

/* w, grad: a tensor's weights and gradients; `unit`: what the gradients are multiplied by. */
static mpt_result lens__check_tensor(mpt_model *net, const lens__samples *s, int tensor, float *w, const float *grad,
                                     double unit, lens__derivative *out) {
    double loss, gradient, difference = 0;
    size_t i;
    memset(out, 0, sizeof *out);
    out->count = mpt_params_count(mpt_model_params(net), tensor);
    out->checked = lens__min(out->count, LENS_CHECKED);
    LENS__TRY(lens__loss_of(net, s, &loss));
    for (i = 0; i < out->checked; i++) {
        const size_t element = i * out->count / out->checked;
        gradient = (double)grad[element] / unit;
        LENS__TRY(lens__difference(net, s, tensor, w, element, loss, gradient, &difference));
        out->largest = fmax(out->largest, fmax(fabs(gradient), fabs(difference)));
        if (i && fabs(gradient - difference) <= out->off) continue;
        out->off = fabs(gradient - difference);
        out->element = element;
        out->gradient = gradient;
        out->difference = difference;
    }
    return MPT_OK;
}

/* Checks one tensor and restores its weights. */
static mpt_result lens__try_tensor(mpt_model *net, const lens__samples *s, int tensor, lens__derivative *out) {
    mpt_context *ctx = mpt_model_context(net);
    mpt_params *params = mpt_model_params(net);
    const size_t count = mpt_params_count(params, tensor), bytes = 2 * count * sizeof(float);
    const mpt_train_desc train = mpt_model_train_desc(net);
    const double passes = (double)train.accumulate * train.ranks.ranks;
    const double unit = (double)mpt_loss_scale(net) * (double)s->n / (passes * train.batch);
    float *w = (float *)lens__alloc(ctx, bytes);
    mpt_result r, back;
    if (!w) return MPT_ERROR_NO_MEMORY;
    r = mpt_params_get(params, tensor, w);
    if (r == MPT_OK) r = mpt_forward(net, s->x, s->target, s->n);
    if (r == MPT_OK) r = mpt_backward(net);
    if (r == MPT_OK) r = mpt_download(ctx, w + count, mpt_params_grad(params, tensor), count * sizeof *w);
    if (r == MPT_OK) r = mpt_zero_grad(net);
    if (r == MPT_OK) {
        r = lens__check_tensor(net, s, tensor, w, w + count, unit, out);
        back = mpt_params_set(params, tensor, w);
        if (r == MPT_OK) r = back;
    }
    lens__free(ctx, w, bytes);
    return r;
}

static void lens__print_derivative(lens__table *t, const char *name, const lens__derivative *d, double relative) {
    lens__cell(t, name);
    lens__count_cell(t, d->count);
    lens__count_cell(t, d->checked);
    lens__number_cell(t, d->largest);
    lens__count_cell(t, d->element);
    lens__number_cell(t, d->gradient);
    lens__number_cell(t, d->difference);
    lens__number_cell(t, relative);
    lens__row_end(t);
}

static mpt_result lens__need_f32(const mpt_model *net) {
    mpt_node_info node;
    int id;
    for (id = 1; id <= mpt_model_nodes(net); id++) {
        LENS__TRY(mpt_model_node(net, id, &node));
        if (node.type != MPT_F32 || (node.weight_type != MPT_DTYPE_COUNT && node.weight_type != MPT_F32))
            return mpt_fail(mpt_model_context(net), MPT_ERROR_TYPE,
                            "lens_gradients: '%s' is not fp32: build the model in O0", node.name);
    }
    return MPT_OK;
}

MPT_DEF mpt_result lens_gradients(mpt_model *net, const void *x, const void *target, size_t samples, mpt_style style,
                                  mpt_write write, void *user, double *worst) {
    static const lens__column columns[] = {{"tensor", 24},     {"elements", 34},     {"checked", 43},
                                           {"largest", 56},    {"element", 65},      {"gradient", 78},
                                           {"difference", 91}, {"relative error", 0}};
    mpt_context *ctx = mpt_model_context(net);
    const lens__samples s = {x, target, samples};
    double loss, noise, relative, all = 0;
    lens__derivative d;
    lens__table t;
    int tensor;
    if (!ctx) return MPT_ERROR_ARGUMENT;
    LENS__TRY(lens__need_write(ctx, "lens_gradients", style, write));
    if (!mpt_model_optimizer(net)) return mpt_fail(ctx, MPT_ERROR_ORDER, "lens_gradients: the model is not built");
    if (!target) return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "lens_gradients: target is NULL");
    LENS__TRY(lens__need_f32(net));
    LENS__TRY(lens__loss_of(net, &s, &loss));
    noise = 512 * (1 + fabs(loss)) / (1 << 23);
    lens__table_start(&t, columns, style, write, user);
    for (tensor = 1; tensor <= mpt_params_tensors(mpt_model_params(net)); tensor++) {
        if (!mpt_params_grad(mpt_model_params(net), tensor)) continue; /* frozen */
        LENS__TRY(lens__try_tensor(net, &s, tensor, &d));
        relative = d.off / (d.largest + noise / LENS_GRADIENT_BOUND);
        if (!(relative <= all)) all = relative;
        lens__print_derivative(&t, mpt_params_name(mpt_model_params(net), tensor), &d, relative);
    }
    if (worst) *worst = all;
    return MPT_OK;
}

/* ==== PRECISIONS ==== */

MPT_DEF const char *lens_format_name(lens_format format) {
    return format == LENS_TF32 ? "tf32" : mpt_dtype_name((mpt_dtype)format);
}

/* fp32 bits to those of the nearest fp32 values with `fraction` bits of fraction. A carry moves up into the exponent,
   and from the largest to inf. */
static inline uint32_t lens__shorten(uint32_t u, int fraction, mpt_round round, uint32_t random) {
    const int shift = 23 - fraction;
    const uint32_t unit = 1u << shift, rest = u & (unit - 1), below = u - rest;
    int up = 0;
    if (round == MPT_ROUND_NEAREST) up = rest > unit / 2 || (rest == unit / 2 && (below & unit));
    if (round == MPT_ROUND_STOCHASTIC) up = (random >> (32 - shift)) < rest;
    return up ? below + unit : below;
}

static uint32_t lens__round_tf32(const lens_precision *p, uint32_t u, uint32_t random) {
    const uint32_t sign = u & 0x80000000u, inf = 0x7f800000u, largest = 0x7f7fe000u;
    uint32_t magnitude = u & 0x7fffffffu;
    if (magnitude > inf) return (u | 0x400000u) & 0xffffe000u;
    if (magnitude < inf) magnitude = lens__shorten(magnitude, 10, p->round, random);
    if (magnitude == inf && p->overflow == MPT_OVERFLOW_SATURATE) magnitude = largest;
    return sign | magnitude;
}

typedef struct lens__rounder { /* a precision, prepared */
    lens_precision precision;
    mpt_dtype type;
    int fraction, lowest, top; /* fp32 exponent fields of the smallest normal and of the largest value */
} lens__rounder;

static lens__rounder lens__rounder_of(const lens_precision *p) {
    const mpt_dtype type = p->format == LENS_TF32 ? MPT_F32 : (mpt_dtype)p->format;
    const lens__layout f = lens__layout_of(type);
    lens__rounder r;
    r.precision = *p;
    r.type = type;
    r.fraction = f.fraction;
    r.lowest = 129 - (1 << (f.exponent - 1));
    r.top = type == MPT_F32 ? r.lowest : (int)(f.largest >> f.fraction) + r.lowest - 1;
    return r;
}

/* Between the smallest normal and the largest power of two only the fraction gets shorter. */
static inline float lens__rounded(const lens__rounder *r, float x, uint32_t random) {
    const lens_precision *p = &r->precision;
    uint32_t u = lens__bits(x);
    const int exponent = (int)(u >> 23 & 255);
    if (p->format == LENS_TF32) u = lens__round_tf32(p, u, random);
    else if (exponent >= r->lowest && exponent < r->top) u = lens__shorten(u, r->fraction, p->round, random);
    else if (r->type != MPT_F32)
        u = lens__bits(mpt_widen(mpt_narrow(x, r->type, p->round, p->overflow, random), r->type));
    if (p->flush && (int)(u >> 23 & 255) < r->lowest) u &= 0x80000000u;
    return lens__float(u);
}

MPT_DEF float lens_precision_round(const lens_precision *p, float x, uint32_t random) {
    const lens__rounder r = lens__rounder_of(p);
    return lens__rounded(&r, x, random);
}

static int lens__precision_changes(const lens_precision *p) { return p->format != LENS_F32 || p->flush; }

/* ==== PASSING THROUGH ==== */

/* Memory of the lens: copies of two operands, up to three outputs, one output in its final type, and what plain
   products need. */
enum {
    LENS__LEFT = 0,
    LENS__RIGHT,
    LENS__OUTPUT,
    LENS__STAGE = LENS__OUTPUT + 3,
    LENS__SUMS,
    LENS__PARTS,
    LENS__PATCH,
    LENS__TURNED,
    LENS__SCRATCHES
};

typedef struct lens__sight { /* of a node in a role */
    mpt_histogram total;
    mpt_histogram last; /* what the last write added to it; the next write to the same array replaces that */
} lens__sight;

typedef struct lens__rule {
    int node;
    unsigned passes;
    lens_what_if what;
} lens__rule;

struct lens_view {
    mpt_context *ctx;
    mpt_backend *table; /* the context's */
    mpt_backend inner;  /* the table that it wraps */
    mpt_backend base;   /* the table without any lens: for its own casts and counts */
    lens_view *below;   /* the lens that it wraps; NULL: none */
    mpt_array scratch[LENS__SCRATCHES];
    size_t bytes[LENS__SCRATCHES];
    mpt_model *net;          /* watched; NULL: none */
    int nodes;               /* of that model */
    lens__sight *sights;     /* (nodes, roles) of that model */
    int shift;               /* log2 of the loss scale of this pass */
    mpt_histogram fresh;     /* of the current array */
    mpt_histogram old, kept; /* see lens__part_begin */
    lens__rule *rules;
    int rule_count, rule_capacity;
    uint64_t draws;            /* arrays and products that were rounded */
    lens_explanation *explain; /* what a replay fills; NULL: none */
};

/* result = table.operation(...), with that table's own user in the context */
#define LENS__CALL(lens, result, from, call)     \
    do {                                         \
        void *lens__user = (lens)->table->user;  \
        (lens)->table->user = (lens)->from.user; \
        (result) = (lens)->from.call;            \
        (lens)->table->user = lens__user;        \
    } while (0)

static lens_view *lens__of(mpt_context *ctx) { return (lens_view *)mpt_context_backend(ctx)->user; }

static mpt_result lens__map(lens_view *lens, const mpt_map_op *op) {
    mpt_result r;
    LENS__CALL(lens, r, base, map(lens->ctx, op));
    return r;
}

/* fp32 memory of the device for `count` elements, kept until more are needed */
static mpt_result lens__scratch(lens_view *lens, int which, size_t count, mpt_array *out) {
    const size_t bytes = count * sizeof(float);
    if (lens->bytes[which] < bytes) {
        if (lens->bytes[which]) lens->base.release(lens->ctx, lens->scratch[which].data);
        lens->bytes[which] = 0;
        lens->scratch[which] = mpt_f32_array((const float *)lens->base.alloc(lens->ctx, bytes));
        if (!lens->scratch[which].data) return MPT_ERROR_NO_MEMORY;
        lens->bytes[which] = bytes;
    }
    *out = lens->scratch[which];
    return MPT_OK;
}

/* to(rows,C) = from(rows,C), rounded to nearest where types differ. */
static mpt_result lens__copy(lens_view *lens, size_t rows, size_t C, mpt_array from, size_t from_stride, mpt_array to,
                             size_t to_stride) {
    mpt_columns_op columns = MPT_ZERO;
    mpt_map_op cast = MPT_ZERO;
    mpt_result r;
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
    if (from_stride == C && to_stride == C) return lens__map(lens, &cast);
    LENS__CALL(lens, r, base, columns(lens->ctx, &columns));
    return r;
}

/* What is simulated for this operation; NULL: nothing */
static const lens_what_if *lens__rule_of(const lens_view *lens, mpt_pass pass) {
    const int node = mpt_context_place(lens->ctx).node;
    int i;
    for (i = lens->rule_count - 1; i >= 0; i--) {
        const lens__rule *rule = &lens->rules[i];
        if ((!rule->node || rule->node == node) && rule->passes >> pass & 1) return &rule->what;
    }
    return NULL;
}

/* Whether the lens watches or simulates a pass of this operation */
static int lens__looks(const lens_view *lens, mpt_pass pass) {
    const int seen = mpt_context_place(lens->ctx).node && (lens->net || lens->explain);
    return seen || lens__rule_of(lens, pass);
}

typedef struct lens__output { /* (rows,C), rows `stride` apart */
    const char *operation;
    mpt_array real;
    size_t rows, C, stride;
    float beta; /* of its old content */
    mpt_pass pass;
    lens_role role; /* LENS_ROLE_COUNT: not counted */
    int node;       /* whose role it is */
    int slot;       /* 0..2 */
    int diverted;
    mpt_array read[2]; /* what it is made from */
    size_t counts[2];
} lens__output;

static lens__output lens__output_of(const lens_view *lens, const char *operation, mpt_pass pass, size_t rows, size_t C,
                                    size_t stride, float beta) {
    static const lens_role roles[] = {LENS_ACTIVATION, LENS_ACTIVATION_GRADIENT, LENS_WEIGHT_GRADIENT};
    const mpt_place place = mpt_context_place(lens->ctx);
    lens__output o = MPT_ZERO;
    o.operation = operation;
    o.rows = rows;
    o.C = C;
    o.stride = stride;
    o.beta = beta;
    o.pass = pass;
    o.node = pass == MPT_BACKWARD_WEIGHT ? place.node : place.output;
    o.role = roles[pass];
    return o;
}

static void lens__output_reads(lens__output *o, mpt_array a, size_t a_count, mpt_array b, size_t b_count) {
    o->read[0] = a;
    o->counts[0] = a_count;
    o->read[1] = b;
    o->counts[1] = b_count;
}

/* If the lens looks, makes *array fp32 memory of the lens. */
static mpt_result lens__divert(lens_view *lens, lens__output *o, mpt_array *array, size_t *stride) {
    const int dense = array->type == MPT_F32 && o->stride == o->C;
    o->real = *array;
    o->diverted = array->data && o->rows && o->C && (lens->explain || !dense) && lens__looks(lens, o->pass);
    if (!o->diverted) return MPT_OK;
    LENS__TRY(lens__scratch(lens, LENS__OUTPUT + o->slot, o->rows * o->C, array));
    if (stride) *stride = o->C;
    if (!(o->beta > 0 || o->beta < 0)) return MPT_OK;
    return lens__copy(lens, o->rows, o->C, o->real, o->stride, *array, o->C);
}

static void lens__histogram_join(mpt_histogram *h, const mpt_histogram *other, int subtract, int shift) {
    const uint64_t sign = subtract ? (uint64_t)0 - 1 : 1; /* modulo 2^64 */
    int e;
    h->zero += sign * other->zero;
    h->inf += sign * other->inf;
    h->nan += sign * other->nan;
    for (e = 0; e < 255; e++) {
        int shifted = e - shift;
        if (shifted < 0) shifted = 0;
        if (shifted > 254) shifted = 254;
        h->exponent[shifted] += sign * other->exponent[e];
    }
}

static mpt_result lens__histogram_of(lens_view *lens, size_t n, mpt_array x, mpt_histogram *h) {
    mpt_result r;
    LENS__CALL(lens, r, base, histogram(lens->ctx, n, x, h));
    return r;
}

/* NULL: the lens does not look at it. */
static lens__sight *lens__sight_of(const lens_view *lens, int node, lens_role role) {
    if (!lens->net || !node || node > lens->nodes || role == LENS_ROLE_COUNT) return NULL;
    return &lens->sights[(node - 1) * LENS_ROLE_COUNT + (int)role];
}

static mpt_result lens__count(lens_view *lens, int node, lens_role role, size_t n, mpt_array x, int adds) {
    lens__sight *s = lens__sight_of(lens, node, role);
    if (!s) return MPT_OK;
    memset(&lens->fresh, 0, sizeof lens->fresh);
    LENS__TRY(lens__histogram_of(lens, n, x, &lens->fresh));
    if (adds) lens__histogram_join(&s->total, &s->last, 1, 0);
    memset(&s->last, 0, sizeof s->last);
    lens__histogram_join(&s->last, &lens->fresh, 0, role == LENS_ACTIVATION ? 0 : lens->shift);
    lens__histogram_join(&s->total, &s->last, 0, 0);
    return MPT_OK;
}

static void lens__round(lens_view *lens, const lens_precision *precision, uint64_t seed, size_t n, void *array) {
    const lens__rounder rounder = lens__rounder_of(precision);
    const int draws = precision->round == MPT_ROUND_STOCHASTIC;
    const uint64_t draw = lens->draws++;
    float *x = (float *)array;
    size_t i;
    for (i = 0; i < n; i++) x[i] = lens__rounded(&rounder, x[i], draws ? mpt_hash(seed, draw, 0, i) : 0);
}

static mpt_result lens__explain_output(lens_view *lens, const lens__output *o, mpt_array array);

/* Counts what was written, rounds it as simulated, and moves it to its place. */
static mpt_result lens__deliver(lens_view *lens, const lens__output *o, mpt_array array) {
    const lens_what_if *what = lens__rule_of(lens, o->pass);
    const size_t n = o->rows * o->C;
    if (!array.data || !n) return MPT_OK;
    LENS__TRY(lens__count(lens, o->node, o->role, n, array, o->beta > 0 || o->beta < 0));
    if (what && lens__precision_changes(&what->output)) lens__round(lens, &what->output, what->seed, n, array.data);
    if (lens->explain && !lens->explain->found) LENS__TRY(lens__explain_output(lens, o, array));
    if (!o->diverted) return MPT_OK;
    return lens__copy(lens, o->rows, o->C, array, o->C, o->real, o->stride);
}

static int lens__sum_changes(const lens_what_if *what) {
    return what && (what->chunk || lens__precision_changes(&what->sum));
}

/* An operand as it would be read: rounded, in a dense copy. Plain products take only fp32. */
static mpt_result lens__operand(lens_view *lens, const lens_what_if *what, int which, size_t rows, size_t C,
                                mpt_array *x, size_t *stride) {
    const int rounds = what && lens__precision_changes(&what->operands);
    const int widens = lens__sum_changes(what) && x->type != MPT_F32;
    mpt_array copy;
    if (!rows || !C || (!rounds && !widens)) return MPT_OK;
    LENS__TRY(lens__scratch(lens, which, rows * C, &copy));
    LENS__TRY(lens__copy(lens, rows, C, *x, *stride, copy, C));
    if (rounds) lens__round(lens, &what->operands, what->seed, rows * C, copy.data);
    *x = copy;
    *stride = C;
    return MPT_OK;
}

/* ==== PLAIN PRODUCTS ==== operands and result in fp32, rows of the result without gaps

   c(m,n) = sums of a(m,k) b(k,n) in order of k: the products of a chunk are added in fp32 (parts), then the chunk is
   added to the sums, which are rounded. */

typedef struct lens__plain {
    lens__rounder rounder;
    size_t chunk, n, k;
    uint64_t seed, draw;
    int draws;
} lens__plain;

static lens__plain lens__plain_of(const lens_what_if *what) {
    lens__plain w = MPT_ZERO;
    w.rounder = lens__rounder_of(&what->sum);
    w.chunk = what->chunk ? what->chunk : 1;
    w.seed = what->seed;
    w.draws = what->sum.round == MPT_ROUND_STOCHASTIC;
    return w;
}

/* Depth l of row i: parts(n) += a * b(n); at the end of a chunk sums(n) += parts(n). */
static void lens__add_depth(const lens__plain *w, size_t i, size_t l, float a, const float *b, float *parts,
                            float *sums) {
    const int joins = (l + 1) % w->chunk == 0 || l + 1 == w->k;
    size_t j;
    for (j = 0; j < w->n; j++) parts[j] = lens__kept(parts[j] + lens__kept(a * b[j]));
    if (!joins) return;
    for (j = 0; j < w->n; j++) {
        const uint32_t random = w->draws ? mpt_hash(w->seed, w->draw, i * w->n + j + 1, l) : 0;
        sums[j] = lens__rounded(&w->rounder, lens__kept(sums[j] + parts[j]), random);
        parts[j] = 0;
    }
}

/* out(n) = alpha sums(n) + beta out + bias(n) */
static void lens__finish_row(size_t n, float alpha, const float *sums, float beta, mpt_array bias, float *out) {
    const size_t size = mpt_dtype_size(bias.type);
    size_t j;
    for (j = 0; j < n; j++) {
        float y = lens__kept(alpha * sums[j]);
        if (beta > 0 || beta < 0) y = lens__kept(y + lens__kept(beta * out[j]));
        if (bias.data) {
            uint32_t bits = 0;
            uint16_t half = 0;
            if (size == 4) memcpy(&bits, (const char *)bias.data + j * 4, 4);
            else memcpy(&half, (const char *)bias.data + j * 2, 2);
            y += mpt_widen(size == 4 ? bits : half, bias.type);
        }
        out[j] = y;
    }
}

static mpt_result lens__activate(lens_view *lens, mpt_activation act, size_t n, mpt_array y) {
    mpt_map_op op = MPT_ZERO;
    if (act == MPT_IDENTITY) return MPT_OK;
    op.map = MPT_MAP_ACTIVATION;
    op.act = act;
    op.n = n;
    op.a = y;
    op.out = y;
    return lens__map(lens, &op);
}

/* Room for `rows` rows of sums and parts, zeroed. */
static mpt_result lens__plain_room(lens_view *lens, size_t rows, size_t n, float **parts, float **sums) {
    mpt_array room[2];
    LENS__TRY(lens__scratch(lens, LENS__PARTS, rows * n, &room[0]));
    LENS__TRY(lens__scratch(lens, LENS__SUMS, rows * n, &room[1]));
    *parts = (float *)room[0].data;
    *sums = (float *)room[1].data;
    memset(*parts, 0, rows * n * sizeof(float));
    memset(*sums, 0, rows * n * sizeof(float));
    return MPT_OK;
}

/* *out(columns,rows) = the transpose of x(rows,columns), whose rows are `stride` apart */
static mpt_result lens__turned(lens_view *lens, size_t rows, size_t columns, const float *x, size_t stride,
                               const float **out) {
    mpt_array room;
    float *to;
    size_t i, j;
    LENS__TRY(lens__scratch(lens, LENS__TURNED, rows * columns, &room));
    to = (float *)room.data;
    for (i = 0; i < rows; i++)
        for (j = 0; j < columns; j++) to[j * rows + i] = x[i * stride + j];
    *out = to;
    return MPT_OK;
}

static mpt_result lens__plain_gemm(lens_view *lens, const lens_what_if *what, const mpt_gemm_op *op) {
    lens__plain w = lens__plain_of(what);
    const float *a = (const float *)op->a.data, *b = (const float *)op->b.data;
    float *c = (float *)op->c.data, *parts, *sums;
    size_t ldb = op->ldb, i, l;
    if (!op->m || !op->n) return MPT_OK;
    w.n = op->n;
    w.k = op->k;
    w.draw = lens->draws++;
    if (op->trans_b && op->k) {
        LENS__TRY(lens__turned(lens, op->n, op->k, b, op->ldb, &b));
        ldb = op->n;
    }
    LENS__TRY(lens__plain_room(lens, 1, op->n, &parts, &sums));
    for (i = 0; i < op->m; i++) {
        memset(sums, 0, op->n * sizeof *sums);
        for (l = 0; l < op->k; l++) {
            const float left = op->trans_a ? a[l * op->lda + i] : a[i * op->lda + l];
            lens__add_depth(&w, i, l, left, b + l * ldb, parts, sums);
        }
        lens__finish_row(op->n, op->alpha, sums, op->beta, op->bias, c + i * op->ldc);
    }
    return lens__activate(lens, op->act, op->m * op->n, op->c);
}

/* -- Convolutions, a group at a time -- C channels and K filters of the group */

typedef struct lens__convolution {
    const mpt_conv2d_op *op;
    float *x, *w, *y; /* starting at the group's first channel or filter */
    size_t C, K;
} lens__convolution;

/* out(R,S,C) = what output pixel u reads of x */
static void lens__patch(const lens__convolution *v, size_t u, float *out) {
    const mpt_conv2d_shape *z = &v->op->shape;
    const size_t image = u / v->op->Q / v->op->P, p = u / v->op->Q % v->op->P, q = u % v->op->Q;
    size_t r, s;
    for (r = 0; r < z->R; r++)
        for (s = 0; s < z->S; s++) {
            const ptrdiff_t row = (ptrdiff_t)(p * z->stride_h + r * z->dilation_h) - (ptrdiff_t)z->padding_h;
            const ptrdiff_t column = (ptrdiff_t)(q * z->stride_w + s * z->dilation_w) - (ptrdiff_t)z->padding_w;
            const int inside = row >= 0 && row < (ptrdiff_t)z->H && column >= 0 && column < (ptrdiff_t)z->W;
            float *to = out + (r * z->S + s) * v->C;
            const size_t at = inside ? (image * z->H + (size_t)row) * z->W + (size_t)column : 0;
            if (inside) memcpy(to, v->x + at * z->C, v->C * sizeof *to);
            else memset(to, 0, v->C * sizeof *to);
        }
}

/* Which of the outputs, `stride` apart, has a tap `distance` after its first input; -1: none */
static ptrdiff_t lens__output_at(ptrdiff_t distance, size_t stride, size_t outputs) {
    const ptrdiff_t apart = (ptrdiff_t)stride;
    if (distance < 0 || distance % apart || distance / apart >= (ptrdiff_t)outputs) return -1;
    return distance / apart;
}

/* out(R,S,K) = the elements of dy that input pixel u contributed to, the last tap of a kernel row first */
static void lens__back_patch(const lens__convolution *v, size_t u, float *out) {
    const mpt_conv2d_shape *z = &v->op->shape;
    const size_t image = u / z->W / z->H, row = u / z->W % z->H, column = u % z->W;
    size_t r, t;
    for (r = 0; r < z->R; r++)
        for (t = 0; t < z->S; t++) {
            const ptrdiff_t down = (ptrdiff_t)(row + z->padding_h) - (ptrdiff_t)(r * z->dilation_h);
            const ptrdiff_t across = (ptrdiff_t)(column + z->padding_w) - (ptrdiff_t)((z->S - 1 - t) * z->dilation_w);
            const ptrdiff_t p = lens__output_at(down, z->stride_h, v->op->P);
            const ptrdiff_t q = lens__output_at(across, z->stride_w, v->op->Q);
            const int inside = p >= 0 && q >= 0;
            float *to = out + (r * z->S + t) * v->K;
            const size_t at = inside ? (image * v->op->P + (size_t)p) * v->op->Q + (size_t)q : 0;
            if (inside) memcpy(to, v->y + at * z->K, v->K * sizeof *to);
            else memset(to, 0, v->K * sizeof *to);
        }
}

/* y(NPQ,K) = patches(NPQ,RSC) w(K,RSC)^T */
static mpt_result lens__plain_forward(lens_view *lens, lens__plain *w, const lens__convolution *v, float *patch,
                                      mpt_array bias) {
    const mpt_conv2d_op *op = v->op;
    const mpt_conv2d_shape *z = &op->shape;
    const size_t pixels = z->N * op->P * op->Q;
    const float *b;
    float *parts, *sums;
    size_t i, l;
    w->n = v->K;
    w->k = z->R * z->S * v->C;
    LENS__TRY(lens__turned(lens, v->K, w->k, v->w, w->k, &b));
    LENS__TRY(lens__plain_room(lens, 1, w->n, &parts, &sums));
    for (i = 0; i < pixels; i++) {
        memset(sums, 0, w->n * sizeof *sums);
        lens__patch(v, i, patch);
        for (l = 0; l < w->k; l++) lens__add_depth(w, i, l, patch[l], b + l * w->n, parts, sums);
        lens__finish_row(w->n, 1, sums, op->beta, bias, v->y + i * z->K);
    }
    return MPT_OK;
}

/* dx(NHW,C) = patches of dy(NHW,RSK) times filters(RSK,C), with S reversed */
static mpt_result lens__plain_data(lens_view *lens, lens__plain *w, const lens__convolution *v, float *patch) {
    const mpt_conv2d_op *op = v->op;
    const mpt_conv2d_shape *z = &op->shape;
    const size_t pixels = z->N * z->H * z->W;
    const mpt_array none = MPT_ZERO;
    float *parts, *sums;
    size_t i, l;
    w->n = v->C;
    w->k = z->R * z->S * v->K;
    LENS__TRY(lens__plain_room(lens, 1, w->n, &parts, &sums));
    for (i = 0; i < pixels; i++) {
        memset(sums, 0, w->n * sizeof *sums);
        lens__back_patch(v, i, patch);
        for (l = 0; l < w->k; l++) {
            const size_t filter = l % v->K, r = l / v->K / z->S, s = z->S - 1 - l / v->K % z->S;
            const float *b = v->w + ((filter * z->R + r) * z->S + s) * v->C;
            lens__add_depth(w, i, l, patch[l], b, parts, sums);
        }
        lens__finish_row(w->n, 1, sums, op->beta, none, v->x + i * z->C);
    }
    return MPT_OK;
}

/* dw(K,RSC) = dy(NPQ,K)^T patches(NPQ,RSC) */
static mpt_result lens__plain_weight(lens_view *lens, lens__plain *w, const lens__convolution *v, float *patch) {
    const mpt_conv2d_op *op = v->op;
    const mpt_conv2d_shape *z = &op->shape;
    const mpt_array none = MPT_ZERO;
    float *parts, *sums;
    size_t i, l;
    w->n = z->R * z->S * v->C;
    w->k = z->N * op->P * op->Q;
    LENS__TRY(lens__plain_room(lens, v->K, w->n, &parts, &sums));
    for (l = 0; l < w->k; l++) {
        lens__patch(v, l, patch);
        for (i = 0; i < v->K; i++)
            lens__add_depth(w, i, l, v->y[l * z->K + i], patch, parts + i * w->n, sums + i * w->n);
    }
    for (i = 0; i < v->K; i++) lens__finish_row(w->n, 1, sums + i * w->n, op->beta, none, v->w + i * w->n);
    return MPT_OK;
}

static mpt_result lens__plain_conv2d(lens_view *lens, const lens_what_if *what, const mpt_conv2d_op *op) {
    const mpt_conv2d_shape *z = &op->shape;
    const size_t C = z->C / z->groups, K = z->K / z->groups, taps = z->R * z->S;
    const size_t size = mpt_dtype_size(op->bias.type);
    mpt_array patch;
    size_t group;
    LENS__TRY(lens__scratch(lens, LENS__PATCH, taps * (C > K ? C : K), &patch));
    for (group = 0; group < z->groups; group++) {
        lens__plain w = lens__plain_of(what);
        lens__convolution v;
        mpt_array bias = op->bias;
        if (bias.data) bias.data = (char *)bias.data + group * K * size;
        v.op = op;
        v.C = C;
        v.K = K;
        v.x = (float *)op->x.data + group * C;
        v.w = (float *)op->w.data + group * K * taps * C;
        v.y = (float *)op->y.data + group * K;
        w.draw = lens->draws++;
        if (op->pass == MPT_FORWARD) LENS__TRY(lens__plain_forward(lens, &w, &v, (float *)patch.data, bias));
        if (op->pass == MPT_BACKWARD_DATA) LENS__TRY(lens__plain_data(lens, &w, &v, (float *)patch.data));
        if (op->pass == MPT_BACKWARD_WEIGHT) LENS__TRY(lens__plain_weight(lens, &w, &v, (float *)patch.data));
    }
    if (op->pass != MPT_FORWARD) return MPT_OK;
    return lens__activate(lens, op->act, z->N * op->P * op->Q * z->K, op->y);
}

/* ==== OPERATIONS ==== */

/* How the lens and those below it execute a part of an operation: each watches it in turn, then the device executes it.
   `op` writes op->out, or sums the columns of dy. */

static mpt_result lens__map_apart(lens_view *lens, lens__output o, mpt_map_op op) {
    LENS__TRY(lens__divert(lens, &o, &op.out, NULL));
    if (lens->below) LENS__TRY(lens__map_apart(lens->below, o, op));
    else LENS__TRY(lens__map(lens, &op));
    return lens__deliver(lens, &o, op.out);
}

/* a_sums(C) of a(rows,C), along with a product by its own first column, whose result is not used */
static mpt_result lens__sums_apart(lens_view *lens, lens__output o, mpt_gemm_op op) {
    mpt_result r;
    LENS__TRY(lens__scratch(lens, LENS__PATCH, op.m, &op.c));
    LENS__TRY(lens__divert(lens, &o, &op.a_sums, NULL));
    if (lens->below) r = lens__sums_apart(lens->below, o, op);
    else LENS__CALL(lens, r, base, gemm(lens->ctx, &op));
    LENS__TRY(r);
    return lens__deliver(lens, &o, op.a_sums);
}

/* db(C) = sums over the rows of dy(rows,C) + beta db, which otherwise the product computes; *db is then none. Does
   nothing if the lens does not watch the product's pass, so an idle lens changes no bits. */
static mpt_result lens__bias_gradient(lens_view *lens, mpt_pass pass, size_t rows, size_t C, mpt_array dy, float beta,
                                      mpt_array *db) {
    lens__output o = lens__output_of(lens, "bias gradient", MPT_BACKWARD_WEIGHT, 1, C, C, beta);
    mpt_gemm_op op = MPT_ZERO;
    if (!db->data || !lens__looks(lens, pass)) return MPT_OK;
    o.role = LENS_ROLE_COUNT;
    lens__output_reads(&o, dy, rows * C, dy, 0);
    op.trans_a = 1;
    op.m = C;
    op.n = 1;
    op.k = rows;
    op.a = dy;
    op.b = dy;
    op.lda = C;
    op.ldb = C;
    op.ldc = 1;
    op.alpha = 1;
    op.beta = beta;
    op.a_sums = *db;
    db->data = NULL;
    return lens__sums_apart(lens, o, op);
}

static mpt_result lens__gemm(mpt_context *ctx, const mpt_gemm_op *op) {
    lens_view *lens = lens__of(ctx);
    const mpt_place place = mpt_context_place(ctx);
    const mpt_pass pass = place.node ? place.pass : MPT_FORWARD;
    const lens_what_if *what = lens__rule_of(lens, pass);
    size_t a_rows = op->m, a_columns = op->k, b_rows = op->k, b_columns = op->n;
    lens__output o = lens__output_of(lens, "product", pass, op->m, op->n, op->ldc, op->beta);
    mpt_gemm_op run = *op;
    mpt_result r;
    if (op->trans_a) {
        a_rows = op->k;
        a_columns = op->m;
    }
    if (op->trans_b) {
        b_rows = op->n;
        b_columns = op->k;
    }
    LENS__TRY(lens__bias_gradient(lens, pass, op->k, op->m, op->a, op->beta, &run.a_sums));
    lens__output_reads(&o, op->a, op->m * op->k, op->b, op->k * op->n);
    LENS__TRY(lens__divert(lens, &o, &run.c, &run.ldc));
    LENS__TRY(lens__operand(lens, what, LENS__LEFT, a_rows, a_columns, &run.a, &run.lda));
    LENS__TRY(lens__operand(lens, what, LENS__RIGHT, b_rows, b_columns, &run.b, &run.ldb));
    if (lens__sum_changes(what)) r = lens__plain_gemm(lens, what, &run);
    else LENS__CALL(lens, r, inner, gemm(ctx, &run));
    LENS__TRY(r);
    return lens__deliver(lens, &o, run.c);
}

static mpt_result lens__conv2d(mpt_context *ctx, const mpt_conv2d_op *op) {
    enum { X = 0, W, Y };
    static const int writes[] = {Y, X, W}, reads[] = {X, Y, Y}, with[] = {W, W, X}; /* by pass */
    lens_view *lens = lens__of(ctx);
    const mpt_conv2d_shape *z = &op->shape;
    const lens_what_if *what = lens__rule_of(lens, op->pass);
    const int written = writes[op->pass], left = reads[op->pass], right = with[op->pass];
    mpt_conv2d_op run = *op;
    mpt_array *array[3];
    size_t count[3];
    lens__output o;
    mpt_result r;
    array[X] = &run.x;
    array[W] = &run.w;
    array[Y] = &run.y;
    count[X] = z->N * z->H * z->W * z->C;
    count[W] = z->K * z->R * z->S * (z->C / z->groups);
    count[Y] = z->N * op->P * op->Q * z->K;
    o = lens__output_of(lens, "convolution", op->pass, 1, count[written], count[written], op->beta);
    if (op->pass == MPT_BACKWARD_WEIGHT)
        LENS__TRY(lens__bias_gradient(lens, op->pass, z->N * op->P * op->Q, z->K, op->y, op->beta, &run.bias));
    lens__output_reads(&o, *array[left], count[left], *array[right], count[right]);
    LENS__TRY(lens__divert(lens, &o, array[written], NULL));
    LENS__TRY(lens__operand(lens, what, LENS__LEFT, 1, count[left], array[left], &count[left]));
    LENS__TRY(lens__operand(lens, what, LENS__RIGHT, 1, count[right], array[right], &count[right]));
    if (lens__sum_changes(what)) r = lens__plain_conv2d(lens, what, &run);
    else LENS__CALL(lens, r, inner, conv2d(ctx, &run));
    LENS__TRY(r);
    return lens__deliver(lens, &o, *array[written]);
}

/* Casts are watched only for inf, and as they are: their result before rounding is their input. */
static mpt_result lens__table_map(mpt_context *ctx, const mpt_map_op *op) {
    static const char *const names[] = {"cast", "activation", "activation gradient", "addition", "dropout", "bytes"};
    lens_view *lens = lens__of(ctx);
    const mpt_place place = mpt_context_place(ctx);
    const int gradient = op->map == MPT_MAP_ACTIVATION_GRADIENT, add = op->map == MPT_MAP_ADD;
    const int adds = op->beta > 0 || op->beta < 0, in_place = add && op->b.data == op->out.data;
    const int cast = op->map == MPT_MAP_CAST, keeps = gradient || op->map == MPT_MAP_DROPOUT;
    lens__output o = lens__output_of(lens, names[op->map], place.pass, 1, op->n, op->n, keeps ? op->beta : 0);
    mpt_map_op run = *op;
    size_t reads_a = op->n, reads_b = 0;
    mpt_result r;
    if (in_place) o.beta = op->beta;
    if (cast) o.role = LENS_ROLE_COUNT;
    if (op->map == MPT_MAP_BYTES) reads_a = 0;
    if (gradient || (add && adds)) reads_b = op->n;
    lens__output_reads(&o, op->a, reads_a, op->b, reads_b);
    if (cast && place.output == 1 && place.pass == MPT_FORWARD) /* the input, in fp32 */
        LENS__TRY(lens__count(lens, 1, LENS_ACTIVATION, op->n, op->a, 0));
    if (cast && !(lens->explain && place.node)) {
        LENS__CALL(lens, r, inner, map(ctx, op));
        return r;
    }
    LENS__TRY(lens__divert(lens, &o, &run.out, NULL));
    if (in_place && adds) run.b = run.out; /* has the same content, which a lens below may watch */
    LENS__CALL(lens, r, inner, map(ctx, &run));
    LENS__TRY(r);
    return lens__deliver(lens, &o, run.out);
}

/* A slice adds to a part of a gradient. Keeps the counts of the whole in `kept`, and those of the part as it was in
   `old`. */
static mpt_result lens__part_begin(lens_view *lens, const lens__output *o, mpt_array y, lens__sight *s) {
    if (!(o->beta > 0 || o->beta < 0)) return MPT_OK;
    memset(&lens->fresh, 0, sizeof lens->fresh);
    LENS__TRY(lens__histogram_of(lens, o->rows * o->C, y, &lens->fresh));
    lens->kept = s->last;
    memset(&s->last, 0, sizeof s->last);
    lens__histogram_join(&s->last, &lens->fresh, 0, lens->shift);
    lens->old = s->last;
    return MPT_OK;
}

/* Makes the last counts those of the whole again. If the slice wrote first, the rest of the whole is 0. */
static void lens__part_end(lens_view *lens, const lens__output *o, lens__sight *s, uint64_t others) {
    if (o->beta > 0 || o->beta < 0) {
        lens__histogram_join(&s->last, &lens->kept, 0, 0);
        lens__histogram_join(&s->last, &lens->old, 1, 0);
    } else {
        s->last.zero += others;
        s->total.zero += others;
    }
}

static mpt_result lens__columns(mpt_context *ctx, const mpt_columns_op *op) {
    lens_view *lens = lens__of(ctx);
    const mpt_pass pass = mpt_context_place(ctx).pass;
    lens__output o = lens__output_of(lens, "copy", pass, op->rows, op->C, op->y_stride, op->beta);
    lens__sight *s = pass == MPT_BACKWARD_DATA ? lens__sight_of(lens, o.node, o.role) : NULL;
    mpt_columns_op run = *op;
    mpt_node_info whole = MPT_ZERO;
    mpt_result r;
    if (s) LENS__TRY(mpt_model_node(lens->net, o.node, &whole));
    if ((size_t)whole.C <= op->C) s = NULL;
    LENS__TRY(lens__divert(lens, &o, &run.y, &run.y_stride));
    if (s) LENS__TRY(lens__part_begin(lens, &o, run.y, s));
    LENS__CALL(lens, r, inner, columns(ctx, &run));
    if (r == MPT_OK) r = lens__deliver(lens, &o, run.y);
    if (s && r == MPT_OK) lens__part_end(lens, &o, s, op->rows * ((size_t)whole.C - op->C));
    return r;
}

static mpt_result lens__broadcast(mpt_context *ctx, const mpt_broadcast_op *op) {
    lens_view *lens = lens__of(ctx);
    const mpt_broadcast_shape *z = &op->shape;
    const int alone = !op->factor.data;
    const mpt_pass pass = mpt_context_place(ctx).pass; /* the gradient of a factor is a forward operation */
    const size_t x = z->N * z->H * z->W * z->C, y = x * z->R * z->S, factors = alone ? 0 : y;
    lens__output o = lens__output_of(lens, alone ? "upsampling" : "product", pass, 1, x, x, op->beta);
    mpt_broadcast_op run = *op;
    mpt_array *written = &run.x;
    mpt_result r;
    if (op->pass == MPT_FORWARD) {
        written = &run.y;
        o.C = o.stride = y;
        lens__output_reads(&o, op->x, x, op->factor, factors);
    } else lens__output_reads(&o, op->y, y, op->factor, factors);
    LENS__TRY(lens__divert(lens, &o, written, NULL));
    LENS__CALL(lens, r, inner, broadcast(ctx, &run));
    LENS__TRY(r);
    return lens__deliver(lens, &o, *written);
}

static mpt_result lens__pool2d(mpt_context *ctx, const mpt_pool2d_op *op) {
    lens_view *lens = lens__of(ctx);
    const mpt_pool2d_shape *z = &op->shape;
    const size_t x = z->N * z->H * z->W * z->C, y = z->N * op->P * op->Q * z->C;
    lens__output o = lens__output_of(lens, "pooling", op->pass, 1, x, x, op->beta);
    mpt_pool2d_op run = *op;
    mpt_array *written = &run.x;
    mpt_result r;
    if (op->pass == MPT_FORWARD) {
        written = &run.y;
        o.C = o.stride = y;
        lens__output_reads(&o, op->x, x, op->x, 0);
    } else lens__output_reads(&o, op->y, y, op->x, 0);
    LENS__TRY(lens__divert(lens, &o, written, NULL));
    LENS__CALL(lens, r, inner, pool2d(ctx, &run));
    LENS__TRY(r);
    return lens__deliver(lens, &o, *written);
}

/* Applies the slope of the activation after a norm separately, so that the gradient between the two can be watched. */
static mpt_result lens__norm_slope(lens_view *lens, mpt_norm_op *op) {
    const size_t n = op->shape.N * op->shape.pixels * op->shape.C;
    lens__output o = lens__output_of(lens, "activation gradient", MPT_BACKWARD_DATA, 1, n, n, 0);
    mpt_map_op slope = MPT_ZERO;
    if (op->act == MPT_IDENTITY || !(lens__looks(lens, MPT_BACKWARD_DATA) || lens__looks(lens, MPT_BACKWARD_WEIGHT)))
        return MPT_OK;
    o.node = mpt_context_place(lens->ctx).node;
    slope.map = MPT_MAP_ACTIVATION_GRADIENT;
    slope.act = op->act;
    slope.n = n;
    slope.a = op->saved;
    slope.b = op->y;
    slope.out = op->y;
    op->act = MPT_IDENTITY;
    lens__output_reads(&o, slope.a, n, slope.b, n);
    return lens__map_apart(lens, o, slope);
}

/* It has three outputs: dx, dgamma and dbeta. */
static mpt_result lens__norm_backward(lens_view *lens, const mpt_norm_op *op) {
    const size_t C = op->shape.C, n = op->shape.N * op->shape.pixels * C;
    lens__output dx = lens__output_of(lens, "normalisation", MPT_BACKWARD_DATA, 1, n, n, op->scale_x);
    lens__output dgamma = lens__output_of(lens, "normalisation", MPT_BACKWARD_WEIGHT, 1, C, C, op->scale);
    lens__output dbeta = dgamma;
    mpt_norm_op run = *op;
    mpt_result r;
    dgamma.slot = 1;
    dbeta.slot = 2;
    dbeta.role = LENS_ROLE_COUNT;
    LENS__TRY(lens__norm_slope(lens, &run));
    lens__output_reads(&dx, op->y, n, op->x, n);
    lens__output_reads(&dgamma, op->y, n, op->x, n);
    lens__output_reads(&dbeta, op->y, n, op->x, 0);
    LENS__TRY(lens__divert(lens, &dx, &run.dx, NULL));
    LENS__TRY(lens__divert(lens, &dgamma, &run.dgamma, NULL));
    LENS__TRY(lens__divert(lens, &dbeta, &run.dbeta, NULL));
    LENS__CALL(lens, r, inner, norm(lens->ctx, &run));
    if (r == MPT_OK) r = lens__deliver(lens, &dx, run.dx);
    if (r == MPT_OK) r = lens__deliver(lens, &dgamma, run.dgamma);
    LENS__TRY(r);
    return lens__deliver(lens, &dbeta, run.dbeta);
}

static mpt_result lens__norm(mpt_context *ctx, const mpt_norm_op *op) {
    lens_view *lens = lens__of(ctx);
    const size_t n = op->shape.N * op->shape.pixels * op->shape.C;
    lens__output o = lens__output_of(lens, "normalisation", MPT_FORWARD, 1, n, n, 0);
    mpt_norm_op run = *op;
    mpt_result r;
    if (op->pass == MPT_NORM_BACKWARD) return lens__norm_backward(lens, op);
    if (op->pass != MPT_NORM_FORWARD) {
        LENS__CALL(lens, r, inner, norm(ctx, op));
        return r;
    }
    lens__output_reads(&o, op->x, n, op->gamma, op->shape.C);
    LENS__TRY(lens__divert(lens, &o, &run.y, NULL));
    LENS__CALL(lens, r, inner, norm(ctx, &run));
    LENS__TRY(r);
    return lens__deliver(lens, &o, run.y);
}

/* log2 of the loss scale, rounded to an integer. */
static mpt_result lens__loss_scale(lens_view *lens, const float *loss_scale) {
    float scale = 1;
    mpt_result r = MPT_OK;
    uint32_t u;
    if (loss_scale) LENS__CALL(lens, r, base, download(lens->ctx, &scale, loss_scale, sizeof scale));
    u = lens__bits(scale);
    lens->shift = (int)(u >> 23 & 255) - 127 + ((u & 0x7fffffu) > 0x3504f3u);
    return r;
}

static mpt_result lens__loss(mpt_context *ctx, const mpt_loss_op *op) {
    lens_view *lens = lens__of(ctx);
    const size_t n = op->N * op->positions * op->C;
    lens__output o = lens__output_of(lens, "loss", MPT_BACKWARD_DATA, 1, n, n, 0);
    mpt_loss_op run = *op;
    mpt_result r;
    lens__output_reads(&o, op->x, n, op->x, 0);
    if (lens->net) LENS__TRY(lens__loss_scale(lens, op->loss_scale));
    LENS__TRY(lens__divert(lens, &o, &run.dx, NULL));
    LENS__CALL(lens, r, inner, loss(ctx, &run));
    LENS__TRY(r);
    return lens__deliver(lens, &o, run.dx);
}

/* An upload within a forward pass is the input, if it stays fp32. */
static mpt_result lens__upload(mpt_context *ctx, void *device, const void *host, size_t bytes) {
    lens_view *lens = lens__of(ctx);
    const mpt_place place = mpt_context_place(ctx);
    const mpt_array x = mpt_typed_array(device, MPT_F32);
    mpt_result r;
    LENS__CALL(lens, r, inner, upload(ctx, device, host, bytes));
    if (r != MPT_OK || !place.node || place.pass != MPT_FORWARD) return r;
    return lens__count(lens, place.output, LENS_ACTIVATION, bytes / sizeof(float), x, 0);
}

/* ==== LENS PARTS ==== */

MPT_DEF lens_view *lens_open(mpt_context *ctx) {
    mpt_backend *table = mpt_context_backend(ctx);
    lens_view *lens = ctx ? (lens_view *)lens__alloc(ctx, sizeof *lens) : NULL;
    if (!lens) return NULL;
    lens->ctx = ctx;
    lens->table = table;
    lens->inner = *table;
    if (table->gemm == lens__gemm) lens->below = lens__of(ctx);
    lens->base = lens->below ? lens->below->base : *table;
    table->user = lens;
    table->upload = lens__upload;
    table->map = lens__table_map;
    table->gemm = lens__gemm;
    table->conv2d = lens__conv2d;
    table->columns = lens__columns;
    table->broadcast = lens__broadcast;
    table->pool2d = lens__pool2d;
    table->norm = lens__norm;
    table->loss = lens__loss;
    table->begin = NULL;
    table->end = NULL; /* a recorded step would not pass through */
    return lens;
}

static size_t lens__sights_bytes(const lens_view *lens) {
    return (size_t)lens->nodes * LENS_ROLE_COUNT * sizeof *lens->sights;
}

MPT_DEF mpt_result lens_close(lens_view *lens) {
    mpt_context *ctx = lens ? lens->ctx : NULL;
    int i;
    if (!lens) return MPT_OK;
    if (lens->table->user != lens)
        return mpt_fail(ctx, MPT_ERROR_ORDER, "lens_close: close the lens that was opened after this one first");
    *lens->table = lens->inner;
    for (i = 0; i < LENS__SCRATCHES; i++)
        if (lens->bytes[i]) lens->base.release(ctx, lens->scratch[i].data);
    lens__free(ctx, lens->sights, lens__sights_bytes(lens));
    lens__free(ctx, lens->rules, (size_t)lens->rule_capacity * sizeof *lens->rules);
    lens__free(ctx, lens, sizeof *lens);
    return MPT_OK;
}

/* -- Histograms of a model -- */

MPT_DEF mpt_result lens_watch(lens_view *lens, mpt_model *net) {
    lens__sight *sights = NULL;
    mpt_node_info node;
    if (!lens) return MPT_ERROR_ARGUMENT;
    if (net && (mpt_model_context(net) != lens->ctx || mpt_model_node(net, 1, &node) != MPT_OK))
        return mpt_fail(lens->ctx, MPT_ERROR_ARGUMENT, "lens_watch: the model is not built, or of another context");
    if (net) {
        const size_t count = (size_t)mpt_model_nodes(net) * LENS_ROLE_COUNT;
        sights = (lens__sight *)lens__alloc(lens->ctx, count * sizeof *sights);
        if (!sights) return MPT_ERROR_NO_MEMORY;
    }
    lens__free(lens->ctx, lens->sights, lens__sights_bytes(lens));
    lens->sights = sights;
    lens->net = net;
    lens->nodes = net ? mpt_model_nodes(net) : 0;
    return MPT_OK;
}

static mpt_result lens__weight_histogram(lens_view *lens, int node, mpt_histogram *out) {
    mpt_params *params = mpt_model_params(lens->net);
    const float *master;
    mpt_array weight;
    mpt_node_info n;
    LENS__TRY(mpt_model_node(lens->net, node, &n));
    if (!n.weight) return MPT_OK;
    master = mpt_params_master(params, n.weight);
    weight = master ? mpt_f32_array(master) : mpt_params_weight(params, n.weight);
    return lens__histogram_of(lens, mpt_params_count(params, n.weight), weight, out);
}

MPT_DEF mpt_result lens_histogram(lens_view *lens, int node, lens_role role, mpt_histogram *out) {
    int id, last;
    if (!lens) return MPT_ERROR_ARGUMENT;
    if (!lens->net) return mpt_fail(lens->ctx, MPT_ERROR_ORDER, "lens_histogram: no model is watched");
    if (node < 0 || node > lens->nodes || (unsigned)role >= LENS_ROLE_COUNT || !out)
        return mpt_fail(lens->ctx, MPT_ERROR_ARGUMENT,
                        "lens_histogram: node %d is not in 0..%d, role %d is unknown, or out is NULL", node,
                        lens->nodes, (int)role);
    memset(out, 0, sizeof *out);
    last = node ? node : lens->nodes;
    for (id = node ? node : 1; id <= last; id++) {
        const lens__sight *s = &lens->sights[(id - 1) * LENS_ROLE_COUNT + (int)role];
        if (role == LENS_WEIGHT) LENS__TRY(lens__weight_histogram(lens, id, out));
        else lens__histogram_join(out, &s->total, 0, 0);
    }
    return MPT_OK;
}

static void lens__print_sight(lens__table *t, const mpt_histogram *h, int id, const char *name, lens_role role,
                              mpt_dtype type, int log2_scale) {
    static const char *const roles[] = {"weight", "activation", "activation gradient", "weight gradient"};
    const int gradient = role == LENS_ACTIVATION_GRADIENT || role == LENS_WEIGHT_GRADIENT;
    int low, high;
    const int any = lens__histogram_ends(h, &low, &high);
    lens__int_cell(t, id);
    lens__cell(t, name);
    lens__cell(t, roles[role]);
    lens__count_cell(t, lens__histogram_total(h));
    lens__count_cell(t, h->zero);
    lens__count_cell(t, h->inf);
    lens__count_cell(t, h->nan);
    if (any) {
        lens__int_cell(t, low);
        lens__int_cell(t, high);
    } else {
        lens__cell(t, "-");
        lens__cell(t, "-");
    }
    lens__cell(t, mpt_dtype_name(type));
    lens__fit_cells(t, h, type, 0);
    lens__fit_cells(t, h, type, log2_scale);
    if (gradient) lens__int_cell(t, lens_histogram_scale(h, type, LENS_HEADROOM));
    else lens__cell(t, "-");
    lens__row_end(t);
}

/* All roles of a node, or of all nodes for 0, except those without counts */
static mpt_result lens__print_node(lens_view *lens, int id, int log2_scale, lens__table *t) {
    mpt_histogram *h = &lens->fresh;
    mpt_node_info node;
    int role, type;
    node.name = "all";
    if (id) LENS__TRY(mpt_model_node(lens->net, id, &node));
    for (role = 0; role < LENS_ROLE_COUNT; role++) {
        LENS__TRY(lens_histogram(lens, id, (lens_role)role, h));
        if (!lens__histogram_total(h)) continue;
        for (type = 0; type < 4; type++)
            lens__print_sight(t, h, id, node.name, (lens_role)role, lens__narrow_types[type], log2_scale);
    }
    return MPT_OK;
}

MPT_DEF mpt_result lens_print(lens_view *lens, int log2_scale, mpt_style style, mpt_write write, void *user) {
    static const lens__column columns[] = {{"", 4},
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
    lens__table t;
    int id;
    if (!lens) return MPT_ERROR_ARGUMENT;
    LENS__TRY(lens__need_write(lens->ctx, "lens_print", style, write));
    if (!lens->net) return mpt_fail(lens->ctx, MPT_ERROR_ORDER, "lens_print: no model is watched");
    lens__table_start(&t, columns, style, write, user);
    for (id = 1; id <= lens->nodes; id++) LENS__TRY(lens__print_node(lens, id, log2_scale, &t));
    return lens__print_node(lens, 0, log2_scale, &t);
}

/* -- What if -- */

static int lens__precision_known(const lens_precision *p) {
    return (unsigned)p->format < LENS_FORMAT_COUNT && (unsigned)p->round <= MPT_ROUND_STOCHASTIC &&
           (unsigned)p->overflow <= MPT_OVERFLOW_SATURATE;
}

/* Makes room for one more rule. */
static mpt_result lens__grow_rules(lens_view *lens) {
    const size_t size = sizeof *lens->rules, used = (size_t)lens->rule_count * size;
    const int capacity = lens->rule_capacity ? 2 * lens->rule_capacity : 8;
    lens__rule *rules;
    if (lens->rule_count < lens->rule_capacity) return MPT_OK;
    rules = (lens__rule *)lens__alloc(lens->ctx, (size_t)capacity * size);
    if (!rules) return MPT_ERROR_NO_MEMORY;
    if (used) memcpy(rules, lens->rules, used);
    lens__free(lens->ctx, lens->rules, (size_t)lens->rule_capacity * size);
    lens->rules = rules;
    lens->rule_capacity = capacity;
    return MPT_OK;
}

MPT_DEF mpt_result lens_simulate(lens_view *lens, int node, unsigned passes, const lens_what_if *what) {
    lens__rule *rule;
    if (!lens) return MPT_ERROR_ARGUMENT;
    if (strcmp(lens->base.name, "cpu") != 0)
        return mpt_fail(lens->ctx, MPT_ERROR_UNSUPPORTED, "lens_simulate: on '%s'; only on the CPU", lens->base.name);
    if (!what) {
        lens->rule_count = 0;
        return MPT_OK;
    }
    if (node < 0 || passes > 7 || !lens__precision_known(&what->operands) || !lens__precision_known(&what->sum) ||
        !lens__precision_known(&what->output))
        return mpt_fail(lens->ctx, MPT_ERROR_ARGUMENT,
                        "lens_simulate: node %d or passes %d is out of range, or a precision is unknown", node,
                        (int)passes);
    LENS__TRY(lens__grow_rules(lens));
    rule = &lens->rules[lens->rule_count++];
    rule->node = node;
    rule->passes = passes ? passes : 7;
    rule->what = *what;
    return MPT_OK;
}

/* -- Explaining -- */

static void lens__range_add(lens_range *range, float x) {
    const double size = fabs((double)x);
    const uint32_t magnitude = lens__bits(x) & 0x7fffffffu;
    range->count++;
    if (!magnitude) range->zero++;
    else if (magnitude > 0x7f800000u) range->nan++;
    else if (magnitude == 0x7f800000u) range->inf++;
    else {
        if (!(range->smallest > 0) || size < range->smallest) range->smallest = size;
        if (size > range->largest) range->largest = size;
    }
}

/* Downloads it a piece at a time, which is slow, but only for the one operation that is named. */
static mpt_result lens__range_of(lens_view *lens, size_t n, mpt_array x, lens_range *range) {
    const size_t size = mpt_dtype_size(x.type);
    unsigned char raw[512];
    mpt_result r;
    size_t i, j;
    memset(range, 0, sizeof *range);
    for (i = 0; i < n; i += sizeof raw / size) {
        const size_t some = lens__min(n - i, sizeof raw / size);
        LENS__CALL(lens, r, base, download(lens->ctx, raw, (const char *)x.data + i * size, some * size));
        if (r != MPT_OK) return r;
        for (j = 0; j < some; j++) {
            uint32_t bits;
            uint16_t half;
            memcpy(&half, raw + j * size, sizeof half);
            bits = half;
            if (size == 4) memcpy(&bits, raw + j * size, sizeof bits);
            lens__range_add(range, mpt_widen(bits, x.type));
        }
    }
    return MPT_OK;
}

/* Whether *o, which is still in fp32, is finite in its final type. If not, this is the operation that was sought. */
static mpt_result lens__explain_output(lens_view *lens, const lens__output *o, mpt_array array) {
    lens_explanation *e = lens->explain;
    const size_t n = o->rows * o->C;
    mpt_array stage;
    mpt_scan scan;
    mpt_result r;
    int i;
    LENS__TRY(lens__scratch(lens, LENS__STAGE, n, &stage));
    stage.type = o->real.type;
    LENS__TRY(lens__copy(lens, 1, n, array, n, stage, n));
    LENS__CALL(lens, r, base, scan(lens->ctx, n, 1, stage, &scan));
    if (r != MPT_OK || !(scan.inf + scan.nan)) return r;
    LENS__TRY(lens__range_of(lens, n, array, &e->result));
    e->result.inf = scan.inf;
    e->result.nan = scan.nan;
    for (i = 0; i < 2; i++) LENS__TRY(lens__range_of(lens, o->counts[i], o->read[i], &e->read[i]));
    e->operation = o->operation;
    e->node = mpt_context_place(lens->ctx).node;
    e->pass = o->pass;
    e->output = o->node;
    e->type = o->real.type;
    e->found = 1;
    return MPT_OK;
}

static mpt_result lens__explain_text(const mpt_model *net, lens_explanation *e) {
    static const char *const what[] = {"value", "gradient", "weight gradient"};
    char number[5][32];
    mpt_node_info node, output;
    lens__number(number[0], sizeof number[0], (double)e->scale);
    if (!e->found) {
        snprintf(e->text, sizeof e->text, "every value and gradient is finite at scale %s", number[0]);
        return MPT_OK;
    }
    LENS__TRY(mpt_model_node(net, e->node, &node));
    LENS__TRY(mpt_model_node(net, e->output, &output));
    lens__number(number[1], sizeof number[1], e->result.smallest);
    lens__number(number[2], sizeof number[2], e->result.largest);
    lens__number(number[3], sizeof number[3], e->read[0].smallest);
    lens__number(number[4], sizeof number[4], e->read[0].largest);
    snprintf(e->text, sizeof e->text,
             "'%s', %s of pass %s: the %s of '%s' has %" PRIu64 " inf and %" PRIu64 " nan of %" PRIu64
             " in %s; finite ones %s to %s before rounding, made from %s to %s; scale %s",
             node.name, e->operation, lens__pass_names[e->pass], what[e->pass], output.name, e->result.inf,
             e->result.nan, e->result.count, mpt_dtype_name(e->type), number[1], number[2], number[3], number[4],
             number[0]);
    return MPT_OK;
}

MPT_DEF mpt_result lens_explain(mpt_model *net, const void *x, const void *target, size_t samples, float scale,
                                lens_explanation *out) {
    mpt_context *ctx = mpt_model_context(net);
    mpt_optimizer_state s;
    lens_view *lens;
    mpt_result r;
    if (!ctx || !out) return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "lens_explain: net or out is NULL");
    if (!mpt_model_optimizer(net)) return mpt_fail(ctx, MPT_ERROR_ORDER, "lens_explain: the model is not built");
    LENS__TRY(mpt_optimizer_get_state(mpt_model_optimizer(net), &s));
    memset(out, 0, sizeof *out);
    out->scale = scale;
    if (!(lens__bits(scale) << 1)) {
        out->scale = mpt_loss_scale(net);
        if (s.skipped) out->scale = s.journal[(s.skipped - 1) % MPT_JOURNAL].scale;
    }
    lens = lens_open(ctx);
    if (!lens) return MPT_ERROR_NO_MEMORY;
    lens->explain = out;
    r = mpt_replay(net, x, target, samples, out->scale);
    lens_close(lens);
    return r == MPT_OK ? lens__explain_text(net, out) : r;
}

#endif /* LENS_IMPLEMENTATION */

/* The licence is that of mpt.h: see its end. */
