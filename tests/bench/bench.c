/* bench.c - how fast, and how near to what this machine can do.

   The first line says what the CPU supports and which path mpt takes; then comes one row a case:

       name key=value ... value= unit= peak= ratio=

   value is the median of REPEATS runs. peak, in the same unit, is the median of a yardstick run in turn with it on the
   same threads: memcpy of as many bytes, a loop that only reads, a loop of multiply-adds (of pairs of bf16 where the
   CPU has them and the operands are bf16). ratio is how much of the yardstick's speed is reached; 1 is all of it. The
   rows of a profile come first: each operation of a training step of the four nets and its share. Takes a few minutes;
   other load on the machine spoils it. Private names: mpt__parallel, so that a yardstick runs on the context's threads.
   */
#define _POSIX_C_SOURCE 199309L
#define MPT_IMPLEMENTATION
#define LENS_IMPLEMENTATION
#include "bench.h"
#include "../../examples/lens.h"

enum { MANY = 10000000, FEW = 16384, LOOPS = 100000 }; /* elements in main memory, in cache; under a millisecond */

#if defined(__x86_64__) && defined(__GNUC__)
#define BENCH_X86
#include <immintrin.h>
#endif

/* Ends a row. amount: what one call does, in the unit times seconds; rates rise with speed. */
static void print_rate(timing t, double amount, double yardstick_amount, const char *unit) {
    printf(" value=%.4g unit=%s", amount / t.value, unit);
    if (t.peak > 0)
        printf(" peak=%.4g ratio=%.3f\n", yardstick_amount / t.peak, amount / t.value * t.peak / yardstick_amount);
    else printf(" peak=none ratio=none\n");
    fflush(stdout);
}

/* ==== YARDSTICKS ==== */

typedef struct yardstick {
    mpt_context *ctx;
    unsigned char *from, *to;
    size_t bytes; /* of each */
    float (*arithmetic)(size_t loops);
    double operations; /* in LOOPS of its loops on each thread */
    int threads;
    float sink[64];
} yardstick;

static void share(const yardstick *y, size_t part, size_t *begin, size_t *bytes) {
    const size_t each = y->bytes / (size_t)y->threads / 64 * 64;
    *begin = part * each;
    *bytes = part + 1 == (size_t)y->threads ? y->bytes - *begin : each;
}

static void copy_task(void *arg, size_t part, size_t end, int worker) {
    const yardstick *y = (const yardstick *)arg;
    size_t begin, bytes;
    (void)worker;
    for (; part < end; part++) {
        share(y, part, &begin, &bytes);
        memcpy(y->to + begin, y->from + begin, bytes);
    }
}

#ifdef BENCH_X86
__attribute__((target("avx2"))) static uint32_t read_avx2(const unsigned char *p, size_t bytes) {
    __m256i sum[4];
    uint32_t out[8];
    size_t i;
    for (i = 0; i < 4; i++) sum[i] = _mm256_setzero_si256();
    for (; bytes >= 128; bytes -= 128, p += 128)
#pragma GCC unroll 4
        for (i = 0; i < 4; i++)
            sum[i] = _mm256_add_epi32(sum[i], _mm256_loadu_si256((const __m256i *)(const void *)(p + 32 * i)));
    sum[0] = _mm256_add_epi32(_mm256_add_epi32(sum[0], sum[1]), _mm256_add_epi32(sum[2], sum[3]));
    _mm256_storeu_si256((__m256i *)(void *)out, sum[0]);
    return out[0] ^ out[3];
}

/* Loops of twelve sums, enough to hide the latency of two multiply-adds a cycle. They begin unequal, or were one. */
#define ARITHMETIC(name, isa, vector, operand, one, set, add, store)                                         \
    __attribute__((target(isa))) static float name(size_t loops) {                                           \
        const operand unit = one;                                                                            \
        vector sum[12];                                                                                      \
        float out[16], total = 0;                                                                            \
        int i;                                                                                               \
        for (i = 0; i < 12; i++) sum[i] = set((float)i);                                                     \
        for (; loops; loops--) _Pragma("GCC unroll 12") for (i = 0; i < 12; i++) sum[i] = add(sum[i], unit); \
        for (i = 0; i < 12; i++) {                                                                           \
            store(out, sum[i]);                                                                              \
            total += out[0];                                                                                 \
        }                                                                                                    \
        return total;                                                                                        \
    }
#define ADD_AVX2(sum, x) _mm256_fmadd_ps(x, x, sum)
#define ADD_AVX512(sum, x) _mm512_fmadd_ps(x, x, sum)
#define ADD_BF16(sum, x) _mm512_dpbf16_ps(sum, x, x)
ARITHMETIC(arithmetic_avx2, "avx2,fma", __m256, __m256, _mm256_set1_ps(1e-3f), _mm256_set1_ps, ADD_AVX2,
           _mm256_storeu_ps)
ARITHMETIC(arithmetic_avx512, "avx512f", __m512, __m512, _mm512_set1_ps(1e-3f), _mm512_set1_ps, ADD_AVX512,
           _mm512_storeu_ps)
ARITHMETIC(arithmetic_bf16, "avx512f,avx512bw,avx512bf16", __m512, __m512bh, (__m512bh)_mm512_set1_epi16(0x3a83),
           _mm512_set1_ps, ADD_BF16, _mm512_storeu_ps)
#endif

static uint32_t read_all(const unsigned char *p, size_t bytes) {
    uint64_t sum[8] = {0}, x[8];
    int i;
#ifdef BENCH_X86
    if (__builtin_cpu_supports("avx2")) return read_avx2(p, bytes);
#endif
    for (; bytes >= sizeof x; bytes -= sizeof x, p += sizeof x) {
        memcpy(x, p, sizeof x);
        for (i = 0; i < 8; i++) sum[i] += x[i];
    }
    for (i = 1; i < 8; i++) sum[0] ^= sum[i];
    return (uint32_t)sum[0];
}

static void read_task(void *arg, size_t part, size_t end, int worker) {
    yardstick *y = (yardstick *)arg;
    size_t begin, bytes;
    (void)worker;
    for (; part < end; part++) {
        share(y, part, &begin, &bytes);
        y->sink[part] += (float)read_all(y->from + begin, bytes);
    }
}

static void arithmetic_task(void *arg, size_t part, size_t end, int worker) {
    yardstick *y = (yardstick *)arg;
    (void)worker;
    for (; part < end; part++) y->sink[part] += y->arithmetic(LOOPS);
}

static void on_threads(yardstick *y, mpt__task task) {
    mpt__parallel(y->ctx, (size_t)y->threads, (size_t)1 << 30, task, y);
}

static void run_copy(void *arg) { on_threads((yardstick *)arg, copy_task); }
static void run_read(void *arg) { on_threads((yardstick *)arg, read_task); }

static void run_arithmetic(void *arg) { on_threads((yardstick *)arg, arithmetic_task); }

/* What is small stays on one thread, here and in mpt. `to` lies half a page off `from`: at some distances modulo a page
   memcpy is many times slower, which would be no yardstick. */
static yardstick yardstick_new(mpt_context *ctx, size_t bytes, int small) {
    const size_t page = 4096, room = (bytes / page + 1) * page + page / 2;
    yardstick y = MPT_ZERO;
    y.ctx = ctx;
    y.threads = small ? 1 : mpt_thread_count(ctx);
    y.bytes = bytes;
    y.from = (unsigned char *)need(mpt_alloc(ctx, 2 * room));
    y.to = y.from + room;
    memset(y.from, 1, 2 * room);
    return y;
}

static void yardstick_free(yardstick *y) { mpt_free(y->ctx, y->from); }

/* The most operations that operands of a type allow here: two a lane of a vector, four with pairs of bf16 where the
   engine multiplies them. */
static yardstick arithmetic_new(mpt_context *ctx, mpt_dtype type) {
    yardstick y = yardstick_new(ctx, 0, 0);
    double lanes = 0;
    (void)type;
#ifdef BENCH_X86
    if (type == MPT_BF16 && ctx->simd.tile[1][0]) y.arithmetic = arithmetic_bf16, lanes = 32;
    else if (__builtin_cpu_supports("avx512f")) y.arithmetic = arithmetic_avx512, lanes = 16;
    else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) y.arithmetic = arithmetic_avx2, lanes = 8;
#endif
    y.operations = 2 * lanes * 12 * LOOPS * y.threads;
    return y;
}

/* ==== CASES ==== */

typedef struct arrays {
    mpt_context *ctx;
    mpt_array a, b;
    size_t n;
} arrays;

static void run_cast(void *arg) {
    const arrays *c = (const arrays *)arg;
    ok(c->ctx, mpt_cast(c->ctx, c->n, c->a, c->b, NULL));
}

static void bench_cast(mpt_context *ctx, mpt_dtype from, mpt_dtype to, size_t n) {
    const size_t moved = n * (mpt_dtype_size(from) + mpt_dtype_size(to));
    yardstick y = yardstick_new(ctx, moved / 2, n == FEW);
    arrays c;
    timing t;
    c.ctx = ctx, c.a = filled(ctx, from, n), c.b = filled(ctx, to, n), c.n = n;
    t = measure(run_cast, &c, run_copy, &y);
    printf("cast from=%s to=%s n=%lu threads=%d elements_per_ns=%.3g", mpt_dtype_name(from), mpt_dtype_name(to),
           (unsigned long)n, mpt_thread_count(ctx), (double)n / t.value * 1e-9);
    print_rate(t, (double)moved * 1e-9, (double)moved * 1e-9, "GB/s");
    mpt_free(ctx, c.a.data), mpt_free(ctx, c.b.data);
    yardstick_free(&y);
}

static void run_scan(void *arg) {
    const arrays *c = (const arrays *)arg;
    mpt_scan scan;
    ok(c->ctx, mpt_scan_array(c->ctx, c->n, c->a, &scan));
}

static void bench_scan(mpt_context *ctx, mpt_dtype type, size_t n) {
    const size_t bytes = n * mpt_dtype_size(type);
    yardstick y = yardstick_new(ctx, bytes, n == FEW);
    arrays c;
    timing t;
    c.ctx = ctx, c.a = filled(ctx, type, n), c.n = n;
    t = measure(run_scan, &c, run_read, &y);
    printf("scan type=%s n=%lu threads=%d", mpt_dtype_name(type), (unsigned long)n, mpt_thread_count(ctx));
    print_rate(t, (double)bytes * 1e-9, (double)bytes * 1e-9, "GB/s");
    mpt_free(ctx, c.a.data);
    yardstick_free(&y);
}

typedef struct training {
    mpt_optimizer *opt;
    mpt_scaler *scaler;
    mpt_context *ctx;
} training;

static void run_step(void *arg) {
    const training *t = (const training *)arg;
    ok(t->ctx, mpt_step(t->opt));
    ok(t->ctx, mpt_scaler_update(t->scaler));
}

/* Bytes of one parameter: the check reads its gradient; then gradient, master and moments are read, all but the first
   written, and the copy. */
static void bench_step(mpt_context *ctx, const char *name, const mpt_optimizer_desc *desc, int moments,
                       mpt_dtype type) {
    const size_t copy = type == MPT_F32 ? 0 : mpt_dtype_size(type);
    const size_t moved = (4 + 4 + 2 * 4 + (size_t)moments * 2 * 4 + copy) * MANY;
    yardstick y = yardstick_new(ctx, moved / 2, 0);
    mpt_params_desc params_desc = MPT_ZERO;
    mpt_params *params;
    training s;
    timing t;
    size_t i;
    params_desc.type = type;
    params = (mpt_params *)need(mpt_params_new(ctx, &params_desc));
    mpt_params_add(params, "all", MANY, 0);
    ok(ctx, mpt_params_build(params));
    s.ctx = ctx;
    s.scaler = (mpt_scaler *)need(mpt_scaler_new(ctx, NULL));
    s.opt = (mpt_optimizer *)need(mpt_optimizer_new(params, s.scaler, desc));
    for (i = 0; i < MANY; i++) mpt_params_grad(params, 1)[i] = mpt_uniform(1, 0, 0, i) - 0.5f;
    t = measure(run_step, &s, run_copy, &y);
    printf("step optimizer=%s type=%s n=%d threads=%d value=%.4g unit=ns/parameter peak=%.4g ratio=%.3f\n", name,
           mpt_dtype_name(type), MANY, mpt_thread_count(ctx), t.value * 1e9 / MANY, t.peak * 1e9 / MANY,
           t.peak / t.value);
    fflush(stdout);
    mpt_optimizer_free(s.opt);
    mpt_scaler_free(s.scaler);
    mpt_params_free(params);
    yardstick_free(&y);
}

/* work / yardstick, or without one where none is known for this CPU */
static timing against_arithmetic(work run, void *arg, yardstick *y) {
    return measure(run, arg, y->arithmetic ? run_arithmetic : NULL, y);
}

static void product_row(product *p) {
    yardstick y = arithmetic_new(p->ctx, p->op.a.type);
    const timing t = against_arithmetic(run_product, p, &y);
    print_product(p);
    print_rate(t, 1e-9 * product_operations(p), 1e-9 * y.operations, "GFLOP/s");
    yardstick_free(&y);
}

static void convolution_row(convolution *c) {
    yardstick y = arithmetic_new(c->ctx, c->op.x.type);
    const timing t = against_arithmetic(run_convolution, c, &y);
    print_convolution(c);
    print_rate(t, 1e-9 * convolution_operations(c), 1e-9 * y.operations, "GFLOP/s");
    yardstick_free(&y);
}

/* The same product in plain C is the yardstick. */
static void bench_plain(mpt_context *ctx, size_t size) {
    mpt_context_desc desc = MPT_ZERO;
    product p = MPT_ZERO, plain;
    timing t;
    desc.threads = mpt_thread_count(ctx);
    desc.isa = MPT_ISA_PLAIN;
    p.ctx = ctx;
    p.op.m = p.op.n = p.op.k = size;
    p.op.a = filled(ctx, MPT_F32, size * size);
    p.op.b = filled(ctx, MPT_F32, size * size);
    p.op.c = filled(ctx, MPT_F32, size * size);
    plain = p;
    plain.ctx = (mpt_context *)need(mpt_open(&desc));
    t = measure(run_product, &p, run_product, &plain);
    printf("plain n=%lu threads=%d", (unsigned long)size, desc.threads);
    print_rate(t, 1e-9 * product_operations(&p), 1e-9 * product_operations(&p), "GFLOP/s");
    product_free(&p);
    mpt_close(plain.ctx);
}

/* ==== NETS ==== the four that peers.py trains as well */

typedef struct net_kind {
    const char *name;
    int H, W, C, batch;
    int (*layers)(mpt_model *net, int h);
} net_kind;

static int mlp(mpt_model *net, int h) {
    h = mpt_relu(net, mpt_linear(net, h, 512, NULL));
    h = mpt_relu(net, mpt_linear(net, h, 512, NULL));
    return mpt_linear(net, h, 10, NULL);
}

static int lenet(mpt_model *net, int h) {
    mpt_conv2d_desc same = MPT_ZERO;
    same.same = 1;
    h = mpt_max_pool2d(net, mpt_relu(net, mpt_conv2d(net, h, 32, 3, &same)), 2, NULL);
    h = mpt_max_pool2d(net, mpt_relu(net, mpt_conv2d(net, h, 64, 3, &same)), 2, NULL);
    h = mpt_relu(net, mpt_linear(net, h, 128, NULL));
    return mpt_linear(net, h, 10, NULL);
}

static int conv_norm_relu(mpt_model *net, int h, int filters) {
    mpt_conv2d_desc d = MPT_ZERO;
    d.no_bias = 1;
    d.same = 1;
    return mpt_relu(net, mpt_batch_norm(net, mpt_conv2d(net, h, filters, 3, &d), NULL));
}

static int block(mpt_model *net, int h) {
    const int a = conv_norm_relu(net, h, 64);
    h = mpt_max_pool2d(net, mpt_add(net, a, conv_norm_relu(net, a, 64)), 2, NULL);
    return mpt_linear(net, mpt_global_avg_pool2d(net, conv_norm_relu(net, h, 128)), 10, NULL);
}

static const net_kind mlp64 = {"mlp", 1, 1, 784, 64, mlp}, mlp512 = {"mlp", 1, 1, 784, 512, mlp};
static const net_kind lenet64 = {"lenet", 28, 28, 1, 64, lenet}, block64 = {"block", 32, 32, 3, 64, block};

typedef struct trained {
    mpt_context *ctx;
    mpt_model *net;
    lens_view *lens; /* or NULL */
    float *x;
    int32_t *label;
} trained;

static void run_train(void *arg) {
    trained *s = (trained *)arg;
    ok(s->ctx, mpt_train_step(s->net, s->x, s->label));
}

static trained trained_new(int threads, const net_kind *kind, mpt_policy policy, mpt_optimizer_desc optimizer) {
    mpt_train_desc train = MPT_ZERO;
    trained s;
    int i;
    s.ctx = open_threads(threads);
    s.net = (mpt_model *)need(mpt_model_new(s.ctx, policy));
    s.lens = NULL;
    s.x = (float *)filled(s.ctx, MPT_F32, (size_t)kind->batch * (size_t)(kind->H * kind->W * kind->C)).data;
    s.label = (int32_t *)need(malloc((size_t)kind->batch * sizeof *s.label));
    for (i = 0; i < kind->batch; i++) s.label[i] = i % 10;
    mpt_softmax_cross_entropy(s.net, kind->layers(s.net, mpt_input(s.net, kind->H, kind->W, kind->C)), NULL);
    train.batch = kind->batch;
    train.optimizer = optimizer;
    ok(s.ctx, mpt_model_build(s.net, &train));
    return s;
}

static void trained_free(trained *s) {
    ok(s->ctx, lens_close(s->lens));
    mpt_model_free(s->net);
    mpt_free(s->ctx, s->x);
    free(s->label);
    mpt_close(s->ctx);
}

/* Multiply-adds of a step, forward and both gradients, as if the input had one, too. */
static double step_products(const trained *s, int batch) {
    double sum = 0;
    mpt_node_info info;
    int node;
    for (node = 1; node <= mpt_model_nodes(s->net); node++) {
        ok(s->ctx, mpt_model_node(s->net, node, &info));
        sum += (double)info.multiply_adds;
    }
    return 3 * sum * batch;
}

/* peak: what the multiply-adds alone allow */
static void bench_train(int threads, const net_kind *kind, mpt_level level, mpt_dtype type, const char *name,
                        mpt_optimizer_desc optimizer) {
    trained s = trained_new(threads, kind, mpt_policy_preset(level, type), optimizer);
    yardstick y = arithmetic_new(s.ctx, level ? type : MPT_F32);
    const timing t = against_arithmetic(run_train, &s, &y);
    printf("train net=%s batch=%d optimizer=%s level=O%d type=%s threads=%d", kind->name, kind->batch, name, (int)level,
           mpt_dtype_name(level ? type : MPT_F32), threads);
    print_rate(t, kind->batch, y.operations / (2 * step_products(&s, 1)), "samples/s");
    yardstick_free(&y);
    trained_free(&s);
}

static void *keep_busy(void *stop) {
    while (!*(volatile int *)stop) {}
    return NULL;
}

/* While another program keeps a core busy: all threads, beside a single one. */
static void bench_foreign(const net_kind *kind, int threads) {
    trained all = trained_new(threads, kind, mpt_policy_preset(MPT_O0, MPT_F32), mpt_sgd(1e-3, 0.9));
    trained one = trained_new(1, kind, mpt_policy_preset(MPT_O0, MPT_F32), mpt_sgd(1e-3, 0.9));
    volatile int stop = 0;
    pthread_t foreign;
    timing t;
    if (pthread_create(&foreign, NULL, keep_busy, (void *)&stop)) exit(1);
    t = measure(run_train, &all, run_train, &one);
    stop = 1;
    pthread_join(foreign, NULL);
    printf("foreign net=%s batch=%d threads=%d", kind->name, kind->batch, threads);
    print_rate(t, kind->batch, kind->batch, "samples/s");
    trained_free(&all), trained_free(&one);
}

static void bench_nets(int threads) {
    static const net_kind *const kinds[] = {&mlp64, &mlp512, &lenet64, &block64};
    const mpt_optimizer_desc sgd = mpt_sgd(1e-3, 0.9);
    size_t i;
    for (i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        bench_train(threads, kinds[i], MPT_O0, MPT_F32, "sgd_momentum", sgd);
        bench_train(threads, kinds[i], MPT_O2, MPT_BF16, "sgd_momentum", sgd);
        bench_train(threads, kinds[i], MPT_O2, MPT_F16, "sgd_momentum", sgd);
    }
    for (i = 0; i < 2; i++) bench_train(threads, kinds[i], MPT_O0, MPT_F32, "adam", mpt_adam(1e-4));
}

/* ==== PROFILE ==== the operations of a training step, by a table that stands before the backend's */

enum { OPERATIONS = 128, NAME = 96 };

typedef struct operation {
    char name[NAME];
    double seconds, operations; /* of all calls; of one */
    long calls;
} operation;

typedef struct profile {
    mpt_backend inner;
    int count;
    operation all[OPERATIONS];
} profile;

/* Of this thread, which does all the work: what other programs do to the machine matters less. */
static double busy_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static profile *profile_of(mpt_context *ctx) { return (profile *)mpt_context_backend(ctx)->user; }

static void profile_add(profile *p, const char *name, double took, double operations) {
    int i;
    for (i = 0; i < p->count && strcmp(p->all[i].name, name) != 0; i++) {}
    if (i == OPERATIONS) return;
    if (i == p->count) {
        p->count++;
        memset(&p->all[i], 0, sizeof p->all[i]);
        memcpy(p->all[i].name, name, NAME);
    }
    p->all[i].seconds += took;
    p->all[i].operations = operations;
    p->all[i].calls++;
}

/* The entry `name` of the table, called by way of the profile. WORK: its multiply-adds; FORMAT and what follows: a row's
   name. */
#define PROFILED(name, type, WORK, FORMAT, ...)                           \
    static mpt_result profiled_##name(mpt_context *ctx, const type *op) { \
        profile *p = profile_of(ctx);                                     \
        const double start = busy_seconds();                              \
        const mpt_result result = p->inner.name(ctx, op);                 \
        const double took = busy_seconds() - start;                       \
        char text[NAME];                                                  \
        snprintf(text, sizeof text, FORMAT, __VA_ARGS__);                 \
        profile_add(p, text, took, 2.0 * (WORK));                         \
        return result;                                                    \
    }

static const char *pass_name(mpt_pass pass) {
    static const char *const names[] = {"forward", "dX", "dW"};
    return names[pass];
}

static const char *norm_name(mpt_norm_pass pass) {
    static const char *const names[] = {"statistics", "forward", "backward", "running"};
    return names[pass];
}

static const char *map_name(mpt_map map) {
    static const char *const names[] = {"cast", "activation", "slope", "add", "dropout"};
    return names[map];
}

static double taps(const mpt_conv2d_shape *z) { return (double)(z->R * z->S * z->C / z->groups); }

PROFILED(gemm, mpt_gemm_op, (double)op->m *(double)op->n *(double)op->k, "gemm_%s_m%lu_n%lu_k%lu",
         op->trans_a   ? "dW"
         : op->trans_b ? "forward"
                       : "dX",
         (unsigned long)op->m, (unsigned long)op->n, (unsigned long)op->k)
PROFILED(conv2d, mpt_conv2d_op, (double)(op->shape.N * op->P * op->Q * op->shape.K) * taps(&op->shape),
         "conv_%s_%lux%lu_c%lu_k%lu", pass_name(op->pass), (unsigned long)op->P, (unsigned long)op->Q,
         (unsigned long)op->shape.C, (unsigned long)op->shape.K)
PROFILED(map, mpt_map_op, 0, "map_%s_n%lu_%s_to_%s", map_name(op->map), (unsigned long)op->n,
         mpt_dtype_name(op->a.type), mpt_dtype_name(op->out.type))
PROFILED(columns, mpt_columns_op, 0, "columns_rows%lu_c%lu", (unsigned long)op->rows, (unsigned long)op->C)
PROFILED(pool2d, mpt_pool2d_op, 0, "pool_%s_%s_%lux%lu_c%lu", op->kind == MPT_POOL_MAX ? "max" : "average",
         pass_name(op->pass), (unsigned long)op->P, (unsigned long)op->Q, (unsigned long)op->shape.C)
PROFILED(norm, mpt_norm_op, 0, "norm_%s_n%lu_pixels%lu_c%lu", norm_name(op->pass), (unsigned long)op->shape.N,
         (unsigned long)op->shape.pixels, (unsigned long)op->shape.C)
PROFILED(loss, mpt_loss_op, 0, "loss_n%lu_c%lu", (unsigned long)op->N, (unsigned long)op->C)
PROFILED(check, mpt_update_op, 0, "check_n%lu", (unsigned long)op->count)
PROFILED(update, mpt_update_op, 0, "update_n%lu", (unsigned long)op->count)

static mpt_result profiled_upload(mpt_context *ctx, void *device, const void *host, size_t bytes) {
    profile *p = profile_of(ctx);
    const double start = busy_seconds();
    const mpt_result result = p->inner.upload(ctx, device, host, bytes);
    profile_add(p, "upload", busy_seconds() - start, 0);
    return result;
}

static int slower(const void *a, const void *b) {
    const operation *x = (const operation *)a, *y = (const operation *)b;
    return (x->seconds < y->seconds) - (x->seconds > y->seconds);
}

/* A row an operation, the longest first, and one for what lies outside them. share: of the step's time */
static void bench_profile(const net_kind *kind, mpt_level level, mpt_dtype type) {
    trained s = trained_new(1, kind, mpt_policy_preset(level, type), mpt_sgd(1e-3, 0.9));
    mpt_backend *table = mpt_context_backend(s.ctx);
    profile p;
    double start, took, inside = 0;
    long steps = 0;
    int i;
    for (i = 0; i < 3; i++) run_train(&s);
    p.inner = *table;
    p.count = 0;
    table->user = &p;
    table->gemm = profiled_gemm;
    table->conv2d = profiled_conv2d;
    table->map = profiled_map;
    table->columns = profiled_columns;
    table->pool2d = profiled_pool2d;
    table->norm = profiled_norm;
    table->loss = profiled_loss;
    table->check = profiled_check;
    table->update = profiled_update;
    table->upload = profiled_upload;
    for (start = busy_seconds(); busy_seconds() - start < 1; steps++) run_train(&s);
    took = busy_seconds() - start;
    qsort(p.all, (size_t)p.count, sizeof *p.all, slower);
    for (i = 0; i < p.count; i++) {
        const operation *o = &p.all[i];
        const double each = o->seconds / (double)o->calls;
        inside += o->seconds;
        printf("profile net=%s batch=%d type=%s operation=%s calls=%g value=%.4g unit=us share=%.3f", kind->name,
               kind->batch, mpt_dtype_name(level ? type : MPT_F32), o->name, (double)o->calls / (double)steps,
               each * 1e6, o->seconds / took);
        if (o->operations > 0) printf(" gflops=%.1f", o->operations / each * 1e-9);
        printf("\n");
    }
    printf("profile net=%s batch=%d type=%s operation=rest value=%.4g unit=us share=%.3f\n", kind->name, kind->batch,
           mpt_dtype_name(level ? type : MPT_F32), (took - inside) / (double)steps * 1e6, 1 - inside / took);
    fflush(stdout);
    *table = p.inner;
    trained_free(&s);
}

static void bench_profiles(void) {
    static const net_kind *const kinds[] = {&mlp64, &mlp512, &lenet64, &block64};
    size_t i;
    for (i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        bench_profile(kinds[i], MPT_O0, MPT_F32);
        bench_profile(kinds[i], MPT_O2, MPT_BF16);
    }
}

/* ==== LENSES ==== */

/* Steps of the MLP with a lens; the yardstick is the same step without one. what NULL: nothing is simulated. */
static void bench_lens(const char *use, int threads, mpt_level level, int watch, const lens_what_if *what) {
    const mpt_policy policy = mpt_policy_preset(level, MPT_F16);
    trained with = trained_new(threads, &mlp64, policy, mpt_adam(1e-3));
    trained without = trained_new(threads, &mlp64, policy, mpt_adam(1e-3));
    timing t;
    with.lens = (lens_view *)need(lens_open(with.ctx));
    if (watch) ok(with.ctx, lens_watch(with.lens, with.net));
    if (what) ok(with.ctx, lens_simulate(with.lens, 0, 0, what));
    t = measure(run_train, &with, run_train, &without);
    printf("lens use=%s level=O%d threads=%d value=%.4g unit=ms/step peak=%.4g ratio=%.3f\n", use, (int)level, threads,
           t.value * 1e3, t.peak * 1e3, t.peak / t.value);
    fflush(stdout);
    trained_free(&with), trained_free(&without);
}

static void bench_lenses(int threads) {
    lens_what_if operands = MPT_ZERO, sums = MPT_ZERO;
    operands.operands.format = sums.sum.format = LENS_F16;
    bench_lens("none", threads, MPT_O2, 0, NULL);
    bench_lens("histograms", threads, MPT_O2, 1, NULL);
    bench_lens("operands_f16", threads, MPT_O0, 0, &operands);
    bench_lens("sums_f16", threads, MPT_O0, 0, &sums);
}

/* ==== ALL OF THEM ==== */

static void print_machine(mpt_context *ctx) {
    const char *best = "";
    printf("cpu features=");
#ifdef BENCH_X86
#define FEATURE(name) \
    if (__builtin_cpu_supports(name)) printf("%s%s", best, name), best = ","
    FEATURE("avx2");
    FEATURE("fma");
    FEATURE("avx512f");
    FEATURE("avx512bw");
    FEATURE("avx512bf16");
#undef FEATURE
#endif
    printf("%s path=%s bf16=%s processors=%d\n", *best ? "" : "unknown", mpt_isa_name(ctx),
           ctx->simd.tile[1][0] ? "pairs" : "widened", mpt_thread_count(ctx));
}

static void bench_arrays(mpt_context *ctx) {
    static const size_t sizes[] = {MANY, FEW};
    int i, type;
    for (i = 0; i < 2; i++) {
        bench_cast(ctx, MPT_F32, MPT_F16, sizes[i]);
        bench_cast(ctx, MPT_F16, MPT_F32, sizes[i]);
        bench_cast(ctx, MPT_F32, MPT_BF16, sizes[i]);
        bench_cast(ctx, MPT_BF16, MPT_F32, sizes[i]);
        for (type = MPT_F32; type <= MPT_BF16; type++) bench_scan(ctx, (mpt_dtype)type, sizes[i]);
    }
}

static void bench_steps(mpt_context *ctx) {
    const mpt_optimizer_desc sgd = mpt_sgd(0.01, 0.9), adam = mpt_adam(1e-3);
    bench_step(ctx, "sgd_momentum", &sgd, 1, MPT_F32);
    bench_step(ctx, "sgd_momentum", &sgd, 1, MPT_BF16);
    bench_step(ctx, "adam", &adam, 2, MPT_F32);
    bench_step(ctx, "adam", &adam, 2, MPT_BF16);
}

/* `bench` prints all rows on 1 and 2 threads; `bench nets N` those of the nets on N, for peers.py; `bench profile` where
   the time of a net's step goes. */
int main(int argc, char **argv) {
    const int only = argc == 3 && !strcmp(argv[1], "nets") ? atoi(argv[2]) : 0;
    const int profile_only = argc == 2 && !strcmp(argv[1], "profile");
    mpt_context *ctx = open_threads(0);
    int threads, type;
    print_machine(ctx);
    mpt_close(ctx);
    if (only) bench_nets(only);
    if (!only) bench_profiles();
    for (threads = 1; threads <= 2 && !only && !profile_only; threads++) {
        ctx = open_threads(threads);
        bench_arrays(ctx);
        bench_steps(ctx);
        for (type = MPT_F32; type <= MPT_BF16; type++) bench_products(ctx, (mpt_dtype)type);
        bench_plain(ctx, 512);
        mpt_close(ctx);
        bench_nets(threads);
        bench_lenses(threads);
        if (threads > 1) bench_foreign(&mlp64, threads);
    }
    return 0;
}
