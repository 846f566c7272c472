/* weights.c - the ways to update 16-bit weights: fp32 masters, none, split, Kahan, stochastic rounding; and the meter
   of lost updates.

   What an optimizer makes of a weight is proven elsewhere (training.c, parity). Here a block with fp32 masters is the
   oracle: given the same weights and gradients it says the new fp32 values, and each mode rounds them by its rule. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include "../formats.h"

typedef struct mode {
    const char *name;
    mpt_master master;
    mpt_dtype type;
} mode;

static const mode modes[] = {
    {"fp32 block", MPT_MASTER_F32, MPT_F32},
    {"bf16, fp32 masters", MPT_MASTER_F32, MPT_BF16},
    {"fp16, fp32 masters", MPT_MASTER_F32, MPT_F16},
    {"bf16, none", MPT_MASTER_NONE, MPT_BF16},
    {"fp16, none", MPT_MASTER_NONE, MPT_F16},
    {"bf16, split", MPT_MASTER_SPLIT, MPT_BF16},
    {"bf16, Kahan", MPT_MASTER_KAHAN, MPT_BF16},
    {"fp16, Kahan", MPT_MASTER_KAHAN, MPT_F16},
    {"bf16, stochastic", MPT_MASTER_STOCHASTIC, MPT_BF16},
    {"fp16, stochastic", MPT_MASTER_STOCHASTIC, MPT_F16},
};
enum { FP32_BLOCK = 0, BF16_MASTERS = 1, BF16_SPLIT = 5, MODES = sizeof modes / sizeof *modes, SEED = 77 };

enum { OPTIMIZERS = 4, VARIANTS = 8 }; /* one of each kind; and with their options */

static mpt_optimizer_desc optimizer(int i) {
    mpt_optimizer_desc d = mpt_sgd(0.01, i % 4 == 0 ? 0 : 0.9);
    if (i % 4 == 2) d = mpt_adam(1e-3);
    if (i % 4 == 3) d = mpt_adamw(1e-3);
    if (i == 1) d.weight_decay = 0.1;
    if (i == 3) d.amsgrad = 1;
    if (i == 4) d.momentum = 0.5, d.dampening = 0.25, d.maximize = 1;
    if (i == 5) d.nesterov = 1, d.weight_decay = 0.1;
    if (i == 6) d.weight_decay = 0.1, d.maximize = 1;
    if (i == 7) d.beta1 = 0.3, d.eps = 1e-3; /* lerp weight above a half */
    d.meter = 1;
    return d;
}

/* ==== ONE BLOCK ==== with a scaler of its own */

typedef struct subject {
    test_block block;
    mpt_scaler *scaler;
} subject;

static subject subject_new(mpt_context *ctx, const mode *m, const mpt_optimizer_desc *d, size_t weights,
                           size_t biases) {
    mpt_params_desc params = MPT_ZERO;
    mpt_scaler_desc scaler = MPT_ZERO;
    subject s;
    params.type = m->type, params.master = m->master, params.seed = SEED;
    scaler.init_scale = 1024;
    s.scaler = mpt_scaler_new(ctx, &scaler);
    s.block = test_block_new(ctx, &params, weights, biases, s.scaler, d);
    return s;
}

static void subject_free(subject *s) {
    test_block_free(&s->block);
    mpt_scaler_free(s->scaler);
}

static void set_values(subject *s, const float *values) {
    CHECK_OK(s->block.ctx, mpt_params_set(s->block.params, 0, values));
}
static void get_values(subject *s, float *values) {
    CHECK_OK(s->block.ctx, mpt_params_get(s->block.params, 0, values));
}

static void set_gradients(subject *s, const float *g) {
    CHECK_OK(s->block.ctx,
             mpt_upload(s->block.ctx, mpt_params_grad(s->block.params, 0), g, s->block.total * sizeof *g));
}

static void step(subject *s) {
    CHECK_OK(s->block.ctx, mpt_unscale(s->block.opt));
    CHECK_OK(s->block.ctx, mpt_clip_norm(s->block.opt, 1000));
    CHECK_OK(s->block.ctx, mpt_step(s->block.opt));
    CHECK_OK(s->block.ctx, mpt_scaler_update(s->scaler));
}

/* Gradients times 1024, which is the scale before the first skipped step; every fifth time with an inf. */
static void make_gradients(float *g, size_t n, int i) {
    test_floats(g, n, -1024, 1024, 1000 + (uint64_t)i);
    if (i % 5 == 2) g[n / 3] = test_float(0x7f800000u);
}

/* ==== EACH MODE ROUNDS BY ITS RULE ==== */

/* What a mode keeps of the new fp32 value: the copy, and the value that mpt_params_get tells. r: random bits. */
static uint32_t kept(const mode *m, float value, uint32_t r, float *back) {
    const uint32_t nearest = reference_narrow(test_bits(value), m->type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF);
    const uint32_t drawn = mpt_narrow(value, m->type, MPT_ROUND_STOCHASTIC, MPT_OVERFLOW_INF, r);
    const double rest = (double)value - (double)mpt_widen(nearest, m->type); /* exact */
    *back = value;
    if (m->type == MPT_F32) return test_bits(value);
    switch (m->master) {
    case MPT_MASTER_SPLIT: return (test_bits(value) + 0x8000u) >> 16; /* ties away from zero */
    case MPT_MASTER_NONE: *back = mpt_widen(nearest, m->type); return nearest;
    case MPT_MASTER_STOCHASTIC: *back = mpt_widen(drawn, m->type); return drawn;
    case MPT_MASTER_KAHAN: /* the rest is kept in 16 bits, unless the copy has overflowed */
        *back = mpt_widen(nearest, m->type);
        if (reference_kind_of(nearest, m->type) != REFERENCE_FINITE) return nearest;
        *back = (float)((double)mpt_widen(nearest, m->type) +
                        (double)mpt_widen(
                            reference_narrow(test_bits((float)rest), m->type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF),
                            m->type));
        return nearest;
    default: return nearest;
    }
}

/* The meter by hand: would 16 bits see this update? An fp32 block asks bf16. */
static int lost(const mode *m, float before, float after) {
    const mpt_dtype type = m->type == MPT_F32 ? MPT_BF16 : m->type;
    return reference_narrow(test_bits(before), type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF) ==
           reference_narrow(test_bits(after), type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF);
}

typedef struct arrays { /* on the host, as long as the flat arrays */
    float *before, *after, *got, *g, *g_after;
    unsigned char *copy;
} arrays;

static arrays arrays_new(size_t n) {
    arrays a;
    a.before = (float *)test_memory(6 * n * sizeof(float));
    a.after = a.before + n, a.got = a.after + n, a.g = a.got + n, a.g_after = a.g + n;
    a.copy = (unsigned char *)(a.g_after + n);
    return a;
}

/* After an applied step: a.before the old values, a.after what the oracle made of them. */
static void check_rule(const mode *m, subject *s, uint64_t applied, arrays *a) {
    const test_block *b = &s->block;
    const size_t size = mpt_dtype_size(m->type);
    const mpt_optimizer_state state = test_block_state(b);
    size_t i, wrong = 0, moved = 0, unseen = 0;
    int t;
    get_values(s, a->got);
    CHECK_OK(b->ctx, mpt_download(b->ctx, a->copy, mpt_params_weight(b->params, 0).data, b->total * size));
    for (t = 1; t <= 2; t++) {
        const size_t begin = (size_t)(mpt_params_grad(b->params, t) - mpt_params_grad(b->params, 0));
        for (i = 0; i < mpt_params_count(b->params, t); i++) {
            const size_t at = begin + i;
            float back;
            const uint32_t copy = kept(m, a->after[at], mpt_hash(SEED, applied, (uint64_t)t, i), &back);
            wrong += test_load(a->copy + at * size, m->type) != copy || test_bits(a->got[at]) != test_bits(back);
            if (a->after[at] < a->before[at] || a->after[at] > a->before[at]) {
                moved++;
                unseen += (size_t)lost(m, a->before[at], a->after[at]);
            }
        }
    }
    CHECK_EQUAL(wrong, 0);
    CHECK_EQUAL(state.moved, moved);
    CHECK_EQUAL(state.lost, unseen);
    CHECK(moved > 0);
}

/* Share of the updates that the meter calls lost. */
static double test_rule(mpt_context *ctx, const mode *m, const mpt_optimizer_desc *d) {
    subject s = subject_new(ctx, m, d, 983, 17), oracle = subject_new(ctx, &modes[FP32_BLOCK], d, 983, 17);
    const size_t n = s.block.total;
    arrays a = arrays_new(n);
    uint64_t applied = 0;
    double moved = 0, unseen = 0;
    int i;
    test_floats(a.before, n, -1, 1, 3);
    set_values(&s, a.before);
    for (i = 0; i < 25; i++) {
        float *kept_before;
        get_values(&s, a.before);
        set_values(&oracle, a.before);
        make_gradients(a.g, n, i);
        set_gradients(&s, a.g), set_gradients(&oracle, a.g);
        kept_before = test_block_download(&s.block);
        step(&s), step(&oracle);
        CHECK(test_block_same(&s.block, kept_before, test_block_download(&s.block), 1) == (i % 5 == 2));
        CHECK_OK(ctx, mpt_download(ctx, a.g_after, mpt_params_grad(s.block.params, 0), n * sizeof(float)));
        CHECK(memcmp(a.g, a.g_after, n * sizeof(float)) == 0); /* a step only reads them */
        if (i % 5 == 2) continue;
        get_values(&oracle, a.after);
        check_rule(m, &s, applied++, &a);
        moved += (double)test_block_state(&s.block).moved, unseen += (double)test_block_state(&s.block).lost;
    }
    CHECK_EQUAL(test_block_state(&s.block).applied, 20);
    CHECK_EQUAL(test_block_state(&s.block).skipped, 5);
    subject_free(&s), subject_free(&oracle);
    free(a.before);
    return unseen / moved;
}

/* ==== SPLIT IS EXACT ==== left to themselves, split weights stay those of fp32 masters */

static void test_split(mpt_context *ctx, const mpt_optimizer_desc *d) {
    subject split = subject_new(ctx, &modes[BF16_SPLIT], d, 983, 17);
    subject whole = subject_new(ctx, &modes[BF16_MASTERS], d, 983, 17);
    const size_t n = split.block.total;
    arrays a = arrays_new(n);
    int i;
    test_floats(a.before, n, -1, 1, 4);
    set_values(&split, a.before), set_values(&whole, a.before);
    for (i = 0; i < 50; i++) {
        make_gradients(a.g, n, i);
        set_gradients(&split, a.g), set_gradients(&whole, a.g);
        step(&split), step(&whole);
        get_values(&split, a.got), get_values(&whole, a.after);
        CHECK(memcmp(a.got, a.after, n * sizeof(float)) == 0);
    }
    CHECK_EQUAL(test_block_state(&split.block).applied, 40);
    CHECK(memcmp(a.got, a.before, n * sizeof(float)) != 0);
    subject_free(&split), subject_free(&whole);
    free(a.before);
}

/* ==== VALUES OF EVERY KIND ==== written by mpt_params_set, read by mpt_params_get */

static void test_values(mpt_context *ctx, const mode *m) {
    static const uint32_t kinds[] = {0,           0x80000000u, 0x3f800000u, 0xbf808000u, 0x3f807fffu, 0x3f818000u,
                                     0x00800000u, 0x33800000u, 0x477fe000u, 0x7f7f7fffu, 0x7f800000u, 0xff800000u,
                                     0x7fc00000u, 0xffc00000u, 0x7fffffffu, 0xffffffffu, 0x7fff8000u, 0x7f800001u};
    enum { KINDS = sizeof kinds / sizeof *kinds };
    const mpt_optimizer_desc d = optimizer(0);
    const size_t size = mpt_dtype_size(m->type);
    subject s = subject_new(ctx, m, &d, KINDS, 1);
    float values[KINDS], back[KINDS];
    unsigned char copy[KINDS * 4];
    size_t i;
    for (i = 0; i < KINDS; i++) values[i] = test_float(kinds[i]);
    CHECK_OK(ctx, mpt_params_set(s.block.params, 1, values));
    CHECK_OK(ctx, mpt_params_get(s.block.params, 1, back));
    CHECK_OK(ctx, mpt_download(ctx, copy, mpt_params_weight(s.block.params, 1).data, KINDS * size));
    for (i = 0; i < KINDS; i++) {
        const reference_kind kind = reference_kind_of(kinds[i], MPT_F32);
        const uint32_t bits = test_load(copy + i * size, m->type);
        mode rule = *m;
        float expected = values[i];
        int ok;
        if (m->master == MPT_MASTER_STOCHASTIC) rule.master = MPT_MASTER_NONE; /* not drawn: there is no step yet */
        if (kind == REFERENCE_FINITE)
            ok = kept(&rule, values[i], 0, &expected) == bits && test_bits(back[i]) == test_bits(expected);
        else if (kind == REFERENCE_INF) ok = test_bits(back[i]) == kinds[i] && reference_kind_of(bits, m->type) == kind;
        else ok = reference_kind_of(test_bits(back[i]), MPT_F32) == kind && reference_kind_of(bits, m->type) == kind;
        if (!CHECK(ok))
            printf("    %s: 0x%08lx comes back as 0x%08lx, its copy is 0x%04lx\n", m->name, (unsigned long)kinds[i],
                   (unsigned long)test_bits(back[i]), (unsigned long)bits);
    }
    subject_free(&s);
}

/* ==== SMALL UPDATES ==== 1 + 512 times 2^-11 is 1.25; a bf16 changes by 2^-7 there, an fp16 by 2^-10 */

/* Mean of all weights after 512 steps. Ties, as 1 + 2^-11 in fp16, round to the even 1. */
static double climb(mpt_context *ctx, const mode *m, size_t n, double *share) {
    mpt_optimizer_desc d = mpt_sgd(1, 0);
    double mean = 0, moved = 0, unseen = 0;
    subject s;
    arrays a;
    size_t i;
    int k;
    d.meter = 1;
    s = subject_new(ctx, m, &d, n, 1);
    a = arrays_new(s.block.total);
    for (i = 0; i < s.block.total; i++) a.before[i] = 1, a.g[i] = -0.5f; /* 1024 times -2^-11 */
    set_values(&s, a.before), set_gradients(&s, a.g);
    for (k = 0; k < 512; k++) {
        mpt_optimizer_state state;
        CHECK_OK(ctx, mpt_step(s.block.opt));
        CHECK_OK(ctx, mpt_scaler_update(s.scaler));
        state = test_block_state(&s.block);
        moved += (double)state.moved, unseen += (double)state.lost;
    }
    get_values(&s, a.got);
    for (i = 0; i < n; i++) mean += (double)a.got[i] / (double)n;
    *share = unseen / moved;
    subject_free(&s);
    free(a.before);
    return mean;
}

/* A step goes up by a whole gap with probability p = 2^-11 / gap, so a weight's variance is 512 gap^2 p (1 - p). */
static void test_climb(mpt_context *ctx, const mode *m) {
    enum { N = 4096 };
    const double gap = m->type == MPT_BF16 ? ldexp(1, -7) : ldexp(1, -10), p = ldexp(1, -11) / gap;
    double share;
    const double mean = climb(ctx, m, N, &share);
    if (m->master == MPT_MASTER_STOCHASTIC) CHECK_NEAR(mean, 1.25, 5 * gap * sqrt(512 * p * (1 - p) / (double)N));
    else CHECK_NEAR(mean, m->master == MPT_MASTER_NONE ? 1 : 1.25, ldexp(1, -40)); /* of the sum */
    if (m->master == MPT_MASTER_NONE) CHECK_EQUAL(share, 1);
    else CHECK(share > 0 && (share < 1 || m->master == MPT_MASTER_STOCHASTIC));
    printf("%8.1f %%%12.4f\n", 100 * share, mean);
}

/* ==== THE SAME BITS ==== on every instruction set and any number of threads */

#ifdef TEST_STRIDE
enum { LARGE = 7001 }; /* slow machines, as numbers.c has it */
#else
enum { LARGE = 70001 }; /* shared by threads */
#endif

typedef struct outcome {
    float *all; /* test_block_download */
    mpt_optimizer_state state;
} outcome;

static outcome train(mpt_context *ctx, const mode *m, const mpt_optimizer_desc *d, test_block *block) {
    subject s = subject_new(ctx, m, d, LARGE, 1001);
    const size_t n = s.block.total;
    arrays a = arrays_new(n);
    outcome o;
    int i;
    test_floats(a.before, n, -1, 1, 5);
    set_values(&s, a.before);
    for (i = 0; i < 4; i++) { /* the third is skipped */
        make_gradients(a.g, n, i);
        set_gradients(&s, a.g);
        CHECK_OK(ctx, mpt_unscale(s.block.opt));
        CHECK_OK(ctx, mpt_clip_norm(s.block.opt, 10));
        CHECK_OK(ctx, mpt_clip_value(s.block.opt, 0.03));
        CHECK_OK(ctx, mpt_step(s.block.opt));
        CHECK_OK(ctx, mpt_scaler_update(s.scaler));
    }
    o.all = test_block_download(&s.block);
    o.state = test_block_state(&s.block);
    *block = s.block;
    subject_free(&s);
    free(a.before);
    return o;
}

static void test_same_bits(const mode *m, const mpt_optimizer_desc *d) {
    outcome first = {NULL, MPT_ZERO};
    test_block block;
    int isa, threads;
    for (isa = MPT_ISA_PLAIN; isa < MPT_ISA_COUNT; isa++)
        for (threads = 1; threads <= 4; threads *= 2) {
            mpt_context *ctx = test_open_isa((mpt_isa)isa, threads);
            outcome o;
            if (!ctx) continue;
            o = train(ctx, m, d, &block);
            if (!first.all) {
                first = o;
            } else {
                if (!CHECK(memcmp(o.all, first.all, TEST_PARTS * block.total * sizeof *o.all) == 0))
                    printf("    %s, optimizer %d, %s, %d threads\n", m->name, (int)d->kind, mpt_isa_name(ctx), threads);
                CHECK(memcmp(&o.state, &first.state, sizeof o.state) == 0);
                free(o.all);
            }
            mpt_close(ctx);
        }
    free(first.all);
}

/* Stochastic weights depend on the seed, and on nothing else that is not given. */
static void test_seed(mpt_context *ctx, mpt_dtype type) {
    const mpt_optimizer_desc d = optimizer(2);
    float *out[3];
    size_t total = 0;
    int i;
    for (i = 0; i < 3; i++) {
        mpt_params_desc params = MPT_ZERO;
        mpt_scaler *scaler = mpt_scaler_new(ctx, NULL);
        test_block b;
        arrays a;
        params.type = type, params.master = MPT_MASTER_STOCHASTIC, params.seed = SEED + (uint64_t)(i == 2);
        b = test_block_new(ctx, &params, 1000, 10, scaler, &d);
        total = b.total;
        a = arrays_new(total);
        test_floats(a.before, total, -1, 1, 6), test_floats(a.g, total, -1, 1, 7);
        CHECK_OK(ctx, mpt_params_set(b.params, 0, a.before));
        CHECK_OK(ctx, mpt_upload(ctx, mpt_params_grad(b.params, 0), a.g, total * sizeof(float)));
        CHECK_OK(ctx, mpt_step(b.opt));
        CHECK_OK(ctx, mpt_params_get(b.params, 0, a.before));
        out[i] = a.before;
        test_block_free(&b);
        mpt_scaler_free(scaler);
    }
    CHECK(memcmp(out[0], out[1], total * sizeof(float)) == 0);
    CHECK(memcmp(out[0], out[2], total * sizeof(float)) != 0);
    for (i = 0; i < 3; i++) free(out[i]);
}

int main(int argc, char **argv) {
    mpt_context *ctx = test_open_threads(2);
    int m, i;
    test_begin(argc, argv);
    printf("share of the updates that rounding to 16 bits loses, and 1 + 512 times 2^-11 with its share\n"
           "%-18s%10s%10s%10s%10s%10s%12s\n",
           "", "SGD", "momentum", "Adam", "AdamW", "2^-11", "1.25 is");
    for (m = 0; m < MODES; m++) {
        RUN_TEST(test_values(ctx, &modes[m]));
        printf("%-18s", modes[m].name);
        for (i = 0; i < OPTIMIZERS; i++) {
            const mpt_optimizer_desc d = optimizer(i);
            printf("%8.1f %%", 100 * test_rule(ctx, &modes[m], &d));
            RUN_TEST(test_same_bits(&modes[m], &d));
        }
        RUN_TEST(test_climb(ctx, &modes[m]));
    }
    for (i = 0; i < VARIANTS; i++) {
        const mpt_optimizer_desc d = optimizer(i);
        RUN_TEST(test_split(ctx, &d));
        if (i >= OPTIMIZERS) RUN_TEST(test_same_bits(&modes[BF16_MASTERS], &d));
    }
    RUN_TEST(test_seed(ctx, MPT_BF16));
    RUN_TEST(test_seed(ctx, MPT_F16));
    mpt_close(ctx);
    return test_finish("weights");
}
