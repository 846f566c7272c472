/* mpt_tools.h - see why: tables and instruments for mpt.h.                             version 0.1.0, MIT licence

   Optional. Include it after mpt.h, and in the one source file that defines MPT_IMPLEMENTATION as well:

       #define MPT_IMPLEMENTATION
       #include "mpt.h"
       #include "mpt_tools.h"

   It needs nothing but mpt.h, works on every device unless a function says otherwise, and costs nothing where it is not
   used.

   CONTENTS   search for "==== NAME"
     TABLES            lost updates, skipped steps, which products Tensor Cores take
     PRESETS           loss scalers as other systems have them
     INSTRUMENTS       a lens before a device: exponent histograms, what-if precision, the first bad operation
     - stop here if you only want the API -
     TABLE PARTS
     PRESET PARTS
     INSTRUMENT PARTS                                                                                                 */

#ifndef MPT_TOOLS_H
#define MPT_TOOLS_H

#include "mpt.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ==== TABLES ==== */

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

#ifdef __cplusplus
} /* extern "C" */
#endif

/* ---------------------------- stop here if you only want the API ---------------------------- */

#endif /* MPT_TOOLS_H */

#if defined(MPT_IMPLEMENTATION) && !defined(MPT__TOOLS_IMPLEMENTED)
#define MPT__TOOLS_IMPLEMENTED

/* ==== TABLE PARTS ==== */

/* Whole numbers with all their digits, others with six. */
static void mpt__number_cell(mpt__table *t, double number) {
    const size_t whole = number >= 1 && number < 4e9 ? (size_t)number : 0;
    if (whole && !(number > (double)whole)) mpt__cell(t, "%z", whole);
    else mpt__cell(t, "%g", number);
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
    return lens->base.columns(lens->ctx, &columns);
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

/* db(C) = sums over the rows of dy(rows,C) + beta db: what a product makes in passing is made apart here, beside the
   product of dy with its own first column, which nobody reads, so that the lens sees both. */
static mpt_result mpt__lens_bias(mpt_lens *lens, size_t rows, size_t C, mpt_array dy, float beta, mpt_array db) {
    mpt__output o = mpt__output_of(lens, "bias gradient", MPT_BACKWARD_WEIGHT, 1, C, C, beta);
    mpt_gemm_op op = MPT_ZERO;
    mpt_result r = MPT_OK;
    if (!db.data) return MPT_OK;
    o.role = MPT_ROLE_COUNT;
    mpt__output_reads(&o, dy, rows * C, dy, 0);
    MPT__TRY(mpt__lens_scratch(lens, MPT__OUTPUT + 1, C, &op.c));
    MPT__TRY(mpt__divert(lens, &o, &db, NULL));
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
    op.a_sums = db;
    MPT__THROUGH(lens, r, gemm, &op);
    return r == MPT_OK ? mpt__deliver(lens, &o, db) : r;
}

static mpt_result mpt__lens_gemm(mpt_context *ctx, const mpt_gemm_op *op) {
    mpt_lens *lens = mpt__lens_of(ctx);
    const mpt_pass pass = ctx->place.node ? ctx->place.pass : MPT_FORWARD;
    const mpt_what_if *what = mpt__lens_rule(lens, pass);
    const size_t a_rows = op->trans_a ? op->k : op->m, b_rows = op->trans_b ? op->n : op->k;
    mpt__output o = mpt__output_of(lens, "product", pass, op->m, op->n, op->ldc, op->beta);
    mpt_gemm_op run = *op;
    mpt_result r = MPT_OK;
    MPT__TRY(mpt__lens_bias(lens, op->k, op->m, op->a, op->beta, op->a_sums));
    run.a_sums.data = NULL;
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
    if (op->pass == MPT_BACKWARD_WEIGHT) {
        MPT__TRY(mpt__lens_bias(lens, z->N * op->P * op->Q, z->K, op->y, op->beta, op->bias));
        run.bias.data = NULL;
    }
    mpt__output_reads(&o, *array[left], count[left], *array[right], count[right]);
    MPT__TRY(mpt__divert(lens, &o, array[written], NULL));
    MPT__TRY(mpt__operand(lens, what, MPT__LEFT, 1, count[left], array[left], &count[left]));
    MPT__TRY(mpt__operand(lens, what, MPT__RIGHT, 1, count[right], array[right], &count[right]));
    if (mpt__sum_changes(what)) mpt__plain_conv2d(lens, what, &run);
    else MPT__THROUGH(lens, r, conv2d, &run);
    return r == MPT_OK ? mpt__deliver(lens, &o, *array[written]) : r;
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

static mpt_result mpt__lens_columns(mpt_context *ctx, const mpt_columns_op *op) {
    mpt_lens *lens = mpt__lens_of(ctx);
    mpt__output o = mpt__output_of(lens, "copy", ctx->place.pass, op->rows, op->C, op->y_stride, op->beta);
    mpt_columns_op run = *op;
    mpt_result r;
    MPT__TRY(mpt__divert(lens, &o, &run.y, &run.y_stride));
    MPT__THROUGH(lens, r, columns, &run);
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
    b->columns = mpt__lens_columns;
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
    r = mpt_replay(net, x, target, n, out->scale);
    mpt_lens_close(lens);
    return r;
}

MPT_DEF mpt_result mpt_explain(mpt_model *net, const float *x, const void *target, int n, float scale,
                               mpt_explanation *out) {
    const mpt_optimizer_state *s;
    MPT__TRY(mpt__need_built(net, "explain"));
    if (!out) return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "explain: out is NULL");
    memset(out, 0, sizeof *out);
    MPT__TRY(mpt_optimizer_get_state(net->opt, &net->opt->mirror));
    s = &net->opt->mirror;
    out->scale = mpt__bits(scale) << 1 ? scale
                 : s->skipped          ? s->journal[(s->skipped - 1) % MPT_JOURNAL].scale
                                       : mpt_scaler_scale(net->scaler);
    MPT__TRY(mpt__replay(net, x, target, n, out));
    mpt__explain_text(net, out);
    return MPT_OK;
}

#endif /* MPT_IMPLEMENTATION */

/* The licence is that of mpt.h: see its end. */
