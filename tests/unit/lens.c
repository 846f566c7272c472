/* lens.c - examples/lens.h: what a lens counts, changes and leaves alone; tables; explained steps.

   Runs on every instruction set and, built for it, on CUDA; what is simulated is CPU only. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#define LENS_IMPLEMENTATION
#include "../../examples/lens.h"
#include "../check.h"

#ifdef MPT_TEST_CUDA
enum { ON_CPU = 0 };
#else
enum { ON_CPU = 1 };
#endif

/* ==== NETS ==== */

enum { BATCH = 5, MICRO = 2, SAMPLES = BATCH * MICRO, SIDE = 6, CHANNELS = 3, CLASSES = 5, FEATURES = SIDE * SIDE * 3 };

typedef struct data {
    float x[SAMPLES * FEATURES];
    int32_t label[SAMPLES];
} data;

static data data_new(uint64_t seed) {
    data d;
    size_t i;
    test_floats(d.x, SAMPLES * FEATURES, -1, 1, seed);
    for (i = 0; i < SAMPLES; i++) d.label[i] = (int32_t)(mpt_hash(seed, 1, 0, i) % CLASSES);
    return d;
}

/* Every kind of layer, and a value that is read twice, three times over. */
static mpt_model *net_new(mpt_context *ctx, mpt_policy policy, mpt_scaler_mode mode, int accumulate) {
    mpt_model *net = mpt_model_new(ctx, policy);
    mpt_train_desc train = MPT_ZERO;
    mpt_conv2d_desc grouped = MPT_ZERO;
    int h = mpt_input(net, SIDE, SIDE, CHANNELS), skip;
    grouped.groups = 3, grouped.same = 1, grouped.no_bias = 1;
    h = skip = mpt_relu(net, mpt_batch_norm(net, test_same(net, h, 6, 3), NULL));
    h = mpt_gelu(net, mpt_conv2d(net, h, 6, 3, &grouped));
    h = mpt_add(net, mpt_layer_norm(net, h, NULL), skip);
    h = mpt_concat(net, mpt_max_pool2d(net, h, 2, NULL), mpt_avg_pool2d(net, skip, 2, NULL));
    h = mpt_dropout(net, mpt_relu(net, mpt_conv2d(net, h, 7, 1, NULL)), 0.25f);
    h = mpt_multiply(net, mpt_leaky_relu(net, h, 0.2f), mpt_global_avg_pool2d(net, h));
    h = mpt_upsample(net, mpt_concat(net, mpt_slice(net, h, 2, 4), mpt_slice(net, h, 1, 3)), 2);
    h = mpt_tanh(net, mpt_linear(net, mpt_flatten(net, h), 9, NULL));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
    train.batch = BATCH;
    train.accumulate = accumulate;
    train.clip_norm = 1;
    train.scaler.mode = mode;
    train.optimizer = mpt_adam(1e-2);
    train.optimizer.meter = 1;
    if (!CHECK_OK(ctx, mpt_model_build(net, &train))) exit(1);
    return net;
}

/* Everything that training has changed, as bytes. Free it. */
typedef struct snapshot {
    size_t bytes;
    unsigned char *at;
} snapshot;

static void snapshot_add(snapshot *s, mpt_context *ctx, const void *device, size_t bytes) {
    if (!device || !bytes) return;
    s->at = (unsigned char *)realloc(s->at, s->bytes + bytes);
    if (!s->at) exit(1);
    CHECK_OK(ctx, mpt_download(ctx, s->at + s->bytes, device, bytes));
    s->bytes += bytes;
}

static snapshot snapshot_of(mpt_context *ctx, mpt_model *net) {
    mpt_params *params = mpt_model_params(net);
    const mpt_array copy = mpt_params_weight(params, 0);
    const size_t n = mpt_params_count(params, 0);
    snapshot s = {0, NULL};
    double loss = mpt_loss(net);
    int i;
    snapshot_add(&s, ctx, mpt_params_master(params, 0), n * sizeof(float));
    snapshot_add(&s, ctx, copy.data, n * mpt_dtype_size(copy.type));
    for (i = 1; i <= 3; i++) snapshot_add(&s, ctx, mpt_optimizer_moment(mpt_model_optimizer(net), i, 0), 4 * n);
    for (i = 1; i <= mpt_model_nodes(net); i++)
        if (mpt_model_running(net, i)) snapshot_add(&s, ctx, mpt_model_running(net, i), 2 * 6 * sizeof(float));
    s.at = (unsigned char *)realloc(s.at, s.bytes + sizeof(mpt_optimizer_state) + sizeof(mpt_scaler_state) + 8);
    if (!s.at) exit(1);
    memset(s.at + s.bytes, 0, sizeof(mpt_optimizer_state) + sizeof(mpt_scaler_state) + 8);
    CHECK_OK(ctx, mpt_optimizer_get_state(mpt_model_optimizer(net), (mpt_optimizer_state *)(void *)(s.at + s.bytes)));
    s.bytes += sizeof(mpt_optimizer_state);
    CHECK_OK(ctx, mpt_scaler_get_state(mpt_model_scaler(net), (mpt_scaler_state *)(void *)(s.at + s.bytes)));
    s.bytes += sizeof(mpt_scaler_state);
    memcpy(s.at + s.bytes, &loss, sizeof loss);
    s.bytes += sizeof loss;
    return s;
}

/* Frees both. */
static int snapshot_same(snapshot a, snapshot b) {
    const int same = a.bytes == b.bytes && memcmp(a.at, b.at, a.bytes) == 0;
    free(a.at), free(b.at);
    return same;
}

static void train_steps(mpt_context *ctx, mpt_model *net, int steps) {
    int i;
    for (i = 0; i < steps; i++) {
        const data d = data_new((uint64_t)i);
        CHECK_OK(ctx, mpt_train_step(net, d.x, d.label));
    }
}

static mpt_policy policy_of(int i) { return mpt_policy_preset((mpt_level)(i / 2), i % 2 ? MPT_BF16 : MPT_F16); }

enum { POLICIES = 8 };

/* ==== A LENS CHANGES NOTHING ==== */

typedef enum lens_use { USE_NONE = 0, USE_OPEN, USE_WATCH, USE_TWO, USE_F32, USE_EXPLAIN, USES } lens_use;

static snapshot trained_with(mpt_context *ctx, mpt_policy policy, lens_use use) {
    mpt_model *net = net_new(ctx, policy, MPT_SCALER_DEFAULT, MICRO);
    lens_view *lens = use == USE_NONE ? NULL : lens_open(ctx), *second = NULL;
    const data d = data_new(77);
    lens_what_if nothing = MPT_ZERO;
    lens_explanation why;
    snapshot s;
    int i;
    CHECK(use == USE_NONE || lens);
    train_steps(ctx, net, 1);
    if (use == USE_WATCH || use == USE_TWO) CHECK_OK(ctx, lens_watch(lens, net));
    if (use == USE_TWO) {
        second = lens_open(ctx);
        CHECK_OK(ctx, lens_watch(second, net));
    }
    if (use == USE_F32 && ON_CPU) CHECK_OK(ctx, lens_simulate(lens, 0, 0, &nothing));
    for (i = 0; i < 3; i++) {
        const data next = data_new((uint64_t)i);
        if (use == USE_EXPLAIN) CHECK_OK(ctx, lens_explain(net, d.x, d.label, (size_t)(BATCH - i), 8, &why));
        CHECK_OK(ctx, mpt_train_step(net, next.x, next.label));
    }
    CHECK_OK(ctx, lens_close(second));
    CHECK_OK(ctx, lens_close(lens));
    train_steps(ctx, net, 1);
    s = snapshot_of(ctx, net);
    mpt_model_free(net);
    return s;
}

/* On CUDA one policy, and only what promises the same bits there. */
static void test_nothing_changes(mpt_context *ctx, int policies) {
    int i, use;
    for (i = 0; i < policies; i++)
        for (use = USE_OPEN; use < USES; use++) {
            const mpt_policy policy = policy_of(ON_CPU ? i : 4);
            if (!ON_CPU && use != USE_OPEN && use != USE_EXPLAIN) continue;
            if (!CHECK(snapshot_same(trained_with(ctx, policy, USE_NONE), trained_with(ctx, policy, (lens_use)use))))
                printf("    policy %d, use %d\n", i, use);
        }
}

/* ==== HISTOGRAMS ==== */

static uint64_t histogram_total(const mpt_histogram *h) {
    uint64_t sum = h->zero + h->inf + h->nan;
    int e;
    for (e = 0; e < 256; e++) sum += h->exponent[e];
    return sum;
}

static mpt_histogram histogram_of(mpt_context *ctx, lens_view *lens, int node, lens_role role) {
    mpt_histogram h;
    memset(&h, 0xff, sizeof h);
    CHECK_OK(ctx, lens_histogram(lens, node, role, &h));
    return h;
}

/* y = a x per feature, then (y - t)^2: all powers of two, so that every exponent is known. */
enum { WIDTH = 4 };

static mpt_model *powers_net(mpt_context *ctx, int accumulate, const float *weight) {
    const mpt_policy policy = mpt_policy_preset(MPT_O2, MPT_F16);
    mpt_model *net = mpt_model_new(ctx, policy);
    mpt_train_desc train = MPT_ZERO;
    mpt_linear_desc linear = MPT_ZERO;
    linear.no_bias = 1;
    mpt_mse(net, mpt_linear(net, mpt_linear(net, mpt_input(net, 1, 1, WIDTH), WIDTH, &linear), WIDTH, &linear), NULL);
    train.batch = 2, train.accumulate = accumulate;
    train.scaler.mode = MPT_SCALER_STATIC, train.scaler.init_scale = 1024.0f;
    train.optimizer = mpt_sgd(0, 0);
    CHECK_OK(ctx, mpt_model_build(net, &train));
    CHECK_OK(ctx, mpt_params_set(mpt_model_params(net), 1, weight));
    CHECK_OK(ctx, mpt_params_set(mpt_model_params(net), 2, weight));
    return net;
}

/* Weights 2^-14 on the diagonal and inputs 1: values 2^-14 and 2^-28; fp16 flushes the last, which is counted all the
   same, and so are gradients that fp16 would flush without the scale. */
static void test_counting_values(mpt_context *ctx, int accumulate) {
    const uint64_t values = (uint64_t)(2 * WIDTH * accumulate);
    float weight[WIDTH * WIDTH] = {0}, x[4 * WIDTH], target[4 * WIDTH];
    lens_view *lens = lens_open(ctx);
    mpt_histogram h;
    mpt_model *net;
    int i, step;
    for (i = 0; i < WIDTH; i++) weight[i * WIDTH + i] = 1.0f / 16384.0f;
    for (i = 0; i < 4 * WIDTH; i++) x[i] = 1, target[i] = 2;
    net = powers_net(ctx, accumulate, weight);
    CHECK_OK(ctx, lens_watch(lens, net));
    for (step = 1; step <= 3; step++) {
        const uint64_t n = values * (uint64_t)step;
        CHECK_OK(ctx, mpt_train_step(net, x, target));
        h = histogram_of(ctx, lens, 1, LENS_ACTIVATION);
        CHECK(h.exponent[127] == n && histogram_total(&h) == n);
        h = histogram_of(ctx, lens, 2, LENS_ACTIVATION);
        CHECK(h.exponent[127 - 14] == n && histogram_total(&h) == n);
        h = histogram_of(ctx, lens, 3, LENS_ACTIVATION);
        CHECK(h.exponent[127 - 28] == n && histogram_total(&h) == n);
        /* d mean / dy = 2 (y - 2) / 8 / accumulate = -1/2 / accumulate, a little less, in 2^-2 / accumulate .. */
        h = histogram_of(ctx, lens, 3, LENS_ACTIVATION_GRADIENT);
        CHECK(h.exponent[127 - 1 - (accumulate > 1)] + h.exponent[127 - 2 - (accumulate > 1)] == n);
        CHECK(histogram_total(&h) == n);
        h = histogram_of(ctx, lens, 2, LENS_ACTIVATION_GRADIENT);
        CHECK(h.exponent[127 - 15 - (accumulate > 1)] + h.exponent[127 - 16 - (accumulate > 1)] == n);
        /* once a pass: dw = sum over 2 samples of x dy / accumulate, x = 1 */
        h = histogram_of(ctx, lens, 2, LENS_WEIGHT_GRADIENT);
        CHECK_EQUAL(histogram_total(&h), WIDTH * WIDTH * step * accumulate);
        CHECK_EQUAL(h.exponent[127 - 14 - (accumulate > 1)] + h.exponent[127 - 15 - (accumulate > 1)],
                    WIDTH * WIDTH * step * accumulate);
        h = histogram_of(ctx, lens, 0, LENS_WEIGHT_GRADIENT);
        CHECK_EQUAL(histogram_total(&h), 2 * WIDTH * WIDTH * step * accumulate);
    }
    h = histogram_of(ctx, lens, 2, LENS_WEIGHT);
    CHECK(h.exponent[127 - 14] == WIDTH && h.zero == WIDTH * (WIDTH - 1));
    h = histogram_of(ctx, lens, 0, LENS_WEIGHT);
    CHECK_EQUAL(histogram_total(&h), 2 * WIDTH * WIDTH);
    h = histogram_of(ctx, lens, 4, LENS_ACTIVATION);
    CHECK_EQUAL(histogram_total(&h), 0);
    CHECK_OK(ctx, lens_watch(lens, net)); /* from zero again */
    h = histogram_of(ctx, lens, 0, LENS_ACTIVATION);
    CHECK_EQUAL(histogram_total(&h), 0);
    CHECK_OK(ctx, lens_close(lens));
    mpt_model_free(net);
}

/* Does a sum whose gradient is that of an input, too, read this node? */
static int in_shared_sum(mpt_context *ctx, mpt_model *net, int id) {
    int reader, shared = 0;
    for (reader = id + 1; reader <= mpt_model_nodes(net); reader++) {
        mpt_node_info n;
        CHECK_OK(ctx, mpt_model_node(net, reader, &n));
        shared |= (n.in[0] == id || n.in[1] == id) && strcmp(n.kernel, "sum, dy shared") == 0;
    }
    return shared;
}

/* Each node's values once a pass, gradients once a pass however many parts they have, and no others. */
static void test_counts_of_all(mpt_context *ctx, int policy) {
    mpt_model *net = net_new(ctx, policy_of(policy), MPT_SCALER_DEFAULT, MICRO);
    lens_view *lens = lens_open(ctx);
    uint64_t all[LENS_ROLE_COUNT] = {0};
    int id, role;
    CHECK_OK(ctx, lens_watch(lens, net));
    train_steps(ctx, net, 2);
    for (id = 1; id <= mpt_model_nodes(net); id++) {
        mpt_node_info n;
        const mpt_histogram value = histogram_of(ctx, lens, id, LENS_ACTIVATION);
        const mpt_histogram grad = histogram_of(ctx, lens, id, LENS_ACTIVATION_GRADIENT);
        const mpt_histogram weight = histogram_of(ctx, lens, id, LENS_WEIGHT_GRADIENT);
        uint64_t passes, tensor = 0;
        CHECK_OK(ctx, mpt_model_node(net, id, &n));
        if (n.weight) tensor = mpt_params_count(mpt_model_params(net), n.weight);
        passes = (uint64_t)(n.H * n.W * n.C * SAMPLES * 2);
        if (n.fused_into || strcmp(n.kernel, "shared memory") == 0 || id == mpt_model_nodes(net)) passes = 0;
        CHECK_EQUAL(histogram_total(&value), passes);
        if (grad.zero + grad.inf + grad.nan < histogram_total(&grad))
            CHECK_EQUAL(histogram_total(&grad), n.H * n.W * n.C * SAMPLES * 2);
        CHECK_EQUAL(histogram_total(&weight), MICRO * 2 * tensor);
        if (n.weight && !in_shared_sum(ctx, net, id)) CHECK(histogram_total(&grad) > 0);
        all[LENS_ACTIVATION] += histogram_total(&value), all[LENS_ACTIVATION_GRADIENT] += histogram_total(&grad);
        all[LENS_WEIGHT] += tensor, all[LENS_WEIGHT_GRADIENT] += histogram_total(&weight);
    }
    for (role = 0; role < LENS_ROLE_COUNT; role++) {
        const mpt_histogram sum = histogram_of(ctx, lens, 0, (lens_role)role);
        CHECK(histogram_total(&sum) == all[role] && all[role] > 0);
    }
    CHECK_OK(ctx, lens_close(lens));
    mpt_model_free(net);
}

/* Of two lenses each sees what one alone would, also of what the first takes apart. */
static void test_two_watch(mpt_context *ctx, int policy) {
    mpt_model *net = net_new(ctx, policy_of(policy), MPT_SCALER_DEFAULT, MICRO);
    lens_view *lens = lens_open(ctx), *second = lens_open(ctx);
    int id, role, differ = 0;
    CHECK_OK(ctx, lens_watch(lens, net));
    CHECK_OK(ctx, lens_watch(second, net));
    train_steps(ctx, net, 2);
    for (id = 0; id <= mpt_model_nodes(net); id++)
        for (role = 0; role < LENS_ROLE_COUNT; role++) {
            const mpt_histogram a = histogram_of(ctx, lens, id, (lens_role)role);
            const mpt_histogram b = histogram_of(ctx, second, id, (lens_role)role);
            differ += memcmp(&a, &b, sizeof a) != 0;
        }
    CHECK_EQUAL(differ, 0);
    CHECK_OK(ctx, lens_close(second));
    CHECK_OK(ctx, lens_close(lens));
    mpt_model_free(net);
}

/* The scale that does best, found by trying all on the values themselves. */
static void test_advice(void) {
    static const mpt_dtype types[] = {MPT_F16, MPT_BF16, MPT_E4M3, MPT_E5M2};
    uint64_t seed;
    for (seed = 0; seed < 40; seed++) {
        const mpt_dtype type = types[seed % 4];
        mpt_histogram h;
        int i, s, best = 0, values = 200, high = -1000;
        double least = 1e30;
        memset(&h, 0, sizeof h);
        for (i = 0; i < values; i++) {
            const int e = (int)test_uniform(-45 + (double)(seed % 13), -8 + (double)(seed % 5) * 3, seed, (size_t)i);
            h.exponent[127 + e]++;
            high = e > high ? e : high;
        }
        for (s = 0; s <= 24; s++) {
            double lost = 0;
            for (i = -60; i < 20; i++) {
                const float x = (float)ldexp(1.5, i + s); /* inside the bin */
                const float y = mpt_widen(mpt_narrow(x, type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0), type);
                const double normal = type == MPT_BF16   ? ldexp(1, -126)
                                      : type == MPT_E4M3 ? ldexp(1, -6)
                                                         : ldexp(1, -14);
                if ((double)y < normal) lost += (double)h.exponent[127 + i];
            }
            if (high + s + 2 > (type == MPT_E4M3 ? 8 : type == MPT_BF16 ? 127 : 15)) break;
            if (lost < least) least = lost, best = s;
        }
        CHECK_EQUAL(lens_histogram_scale(&h, type, 2), best);
    }
}

/* ==== PRECISIONS ==== */

static const int fraction_bits[] = {23, 10, 7, 3, 2, 10}, lowest_exponent[] = {-126, -14, -126, -6, -14, -126};
static const double largest_value[] = {3.4028234663852886e38, 65504, 3.3895313892515355e38, 448, 57344,
                                       3.4011621342146535e38};

/* Rounding in double, from the definition: x in units of the last place, floor, and the rest decides. */
static double rounded(const lens_precision *p, double x, uint32_t random) {
    const int f = (int)p->format, fraction = fraction_bits[f], shift = 23 - fraction;
    double size = fabs(x), unit, units, rest;
    int exponent;
    if (!(x > 0) && !(x < 0)) return x;
    frexp(size, &exponent);
    exponent = exponent - 1 < lowest_exponent[f] ? lowest_exponent[f] : exponent - 1;
    unit = ldexp(1, exponent - fraction);
    units = floor(size / unit), rest = size / unit - units;
    if (p->round == MPT_ROUND_NEAREST) units += rest > 0.5 || (rest >= 0.5 && fmod(units, 2) > 0);
    if (p->round == MPT_ROUND_STOCHASTIC && shift) units += (double)(random >> (32 - shift)) < rest * ldexp(1, shift);
    size = units * unit;
    if (size > largest_value[f])
        size = p->round == MPT_ROUND_ZERO || p->overflow == MPT_OVERFLOW_SATURATE ? largest_value[f] : HUGE_VAL;
    if (p->flush && size < ldexp(1, lowest_exponent[f])) size = 0;
    return x < 0 ? -size : size;
}

static lens_precision precision_of(lens_format format, mpt_round round) {
    lens_precision p = MPT_ZERO;
    p.format = format, p.round = round;
    return p;
}

static void check_precision(const lens_precision *p) {
    size_t i, wrong = 0;
    for (i = 0; i < 20000; i++) {
        uint32_t bits = mpt_hash(9, (uint64_t)p->format, 0, i), random = mpt_hash(10, 0, 0, i);
        float x, y;
        double expected;
        if (i % 4 == 0) bits = (bits & 0x87ffffffu) | 0x38000000u; /* near 1: where formats have their values */
        if (i % 16 == 1) bits &= 0xffffe000u;
        if (i % 16 == 5) bits = (bits & 0xff800000u) | (bits & 0x1000u) | (bits & 0x7fe000u); /* ties of TF32 */
        x = test_float(bits), y = lens_precision_round(p, x, random);
        if ((bits & 0x7f800000u) == 0x7f800000u) continue;
#ifdef __FAST_MATH__
        if ((bits & 0x7f800000u) == 0) continue; /* the reference would take it for 0 */
#endif
        /* stochastic below the smallest normal draws from more bits than the fraction lacks */
        if (p->round == MPT_ROUND_STOCHASTIC && fabs((double)x) < ldexp(1, lowest_exponent[p->format])) continue;
        expected = rounded(p, (double)x, random);
        if (p->format == LENS_E4M3 && !test_is_finite(expected)) wrong += (test_bits(y) & 0x7fffffffu) <= 0x7f800000u;
        else wrong += test_bits(y) != test_bits((float)expected);
    }
    if (!CHECK_EQUAL(wrong, 0))
        printf("    %s, round %d, overflow %d, flush %d\n", lens_format_name(p->format), p->round, p->overflow,
               p->flush);
}

static void test_precisions(void) {
    int format, round, overflow, flush;
    lens_precision p = MPT_ZERO;
    for (format = 0; format < LENS_FORMAT_COUNT; format++)
        for (round = 0; round < 3; round++)
            for (overflow = 0; overflow < 2; overflow++)
                for (flush = 0; flush < 2; flush++) {
                    p.format = (lens_format)format, p.round = (mpt_round)round;
                    p.overflow = (mpt_overflow)overflow, p.flush = flush;
                    check_precision(&p);
                }
    p = precision_of(LENS_TF32, MPT_ROUND_NEAREST);
    CHECK_EQUAL(test_bits(lens_precision_round(&p, test_float(0xff800000u), 0)), 0xff800000u);
    CHECK((test_bits(lens_precision_round(&p, test_float(0x7f800001u), 0)) & 0x7fffffffu) > 0x7f800000u);
    p.overflow = MPT_OVERFLOW_SATURATE;
    CHECK_EQUAL(test_bits(lens_precision_round(&p, test_float(0x7f800000u), 0)), 0x7f7fe000u);
    for (format = 0; format < (int)MPT_DTYPE_COUNT; format++)
        CHECK(strcmp(lens_format_name((lens_format)format), mpt_dtype_name((mpt_dtype)format)) == 0);
    CHECK(strcmp(lens_format_name(LENS_TF32), "tf32") == 0);
}

/* ==== WHAT IF ==== */

typedef struct sum_state { /* a sum as lens_what_if tells it; every product is one call, padding's too */
    const lens_what_if *what;
    float sum, part;
    size_t count, element;
    uint64_t draw;
} sum_state;

static void sum_close(sum_state *s) {
    const uint32_t random = mpt_hash(s->what->seed, s->draw, s->element + 1, s->count - 1);
    volatile float total = s->sum + s->part;
    s->sum = lens_precision_round(&s->what->sum, total, random);
    s->part = 0;
}

static void sum_product(sum_state *s, float a, float b, int last) {
    volatile float product = a * b, part = s->part + product;
    s->part = part;
    s->count++;
    if (last || s->count % (s->what->chunk ? s->what->chunk : 1) == 0) sum_close(s);
}

/* Draws of a product in the order of the lens: one for each rounded operand, one for the sums, one for the output. */
static float operand(const lens_what_if *what, const float *x, size_t i, uint64_t draw) {
    return lens_precision_round(&what->operands, x[i], mpt_hash(what->seed, draw, 0, i));
}

static int changes(const lens_precision *p) { return p->format != LENS_F32 || p->flush; }

typedef struct draws {
    uint64_t left, right, sum, output, next;
} draws;

static draws draws_from(const lens_what_if *what, uint64_t next) {
    draws d;
    d.left = d.right = next;
    if (changes(&what->operands)) d.right = next + 1, next += 2;
    d.sum = next++;
    d.output = next;
    d.next = next + (changes(&what->output) ? 1 : 0);
    return d;
}

static float finished(const lens_what_if *what, float alpha, float sum, float beta, float old, float bias,
                      mpt_activation act, uint64_t draw, size_t i) {
    volatile float y = alpha * sum, scaled = beta * old;
    if (beta != 0) y = y + scaled;
    y = y + bias;
    if (act == MPT_RELU) y = y > 0 ? y : 0;
    return changes(&what->output) ? lens_precision_round(&what->output, y, mpt_hash(what->seed, draw, 0, i)) : y;
}

/* A linear layer with relu, or a gemm with alpha and beta, on odd sizes with gaps between rows. */
static void check_gemm(mpt_context *ctx, lens_view *lens, const lens_what_if *what, int trans_a, int trans_b,
                       uint64_t *next) {
    enum { M = 7, N = 37, K = 45, LD = 51 };
    const draws d = draws_from(what, *next);
    test_tensor a = test_tensor_random(ctx, MPT_F32, LD * LD, 1), b = test_tensor_random(ctx, MPT_F32, LD * LD, 2);
    test_tensor c = test_tensor_random(ctx, MPT_F32, M * LD, 3);
    const float *x = (const float *)a.array.data, *y = (const float *)b.array.data;
    float *old = (float *)test_memory(M * LD * sizeof *old);
    mpt_gemm_op op = MPT_ZERO;
    size_t i, j, l, wrong = 0;
    memcpy(old, c.array.data, M * LD * sizeof *old);
    op.trans_a = trans_a;
    op.trans_b = trans_b;
    op.m = M;
    op.n = N;
    op.k = K;
    op.a = a.array;
    op.b = b.array;
    op.c = c.array;
    op.lda = op.ldb = op.ldc = LD;
    op.alpha = 1.5f;
    op.beta = 0.5f;
    CHECK_OK(ctx, mpt_op_gemm(ctx, &op));
    for (i = 0; i < M; i++)
        for (j = 0; j < LD; j++) {
            float expected = old[i * LD + j];
            sum_state s;
            memset(&s, 0, sizeof s);
            s.what = what, s.element = i * N + j, s.draw = d.sum;
            for (l = 0; l < K && j < N; l++) {
                const float *at_a = x + (trans_a ? l * LD + i : i * LD + l),
                            *at_b = y + (trans_b ? j * LD + l : l * LD + j);
                sum_product(&s,
                            lens_precision_round(&what->operands, *at_a,
                                                 mpt_hash(what->seed, d.left, 0, trans_a ? l * M + i : i * K + l)),
                            lens_precision_round(&what->operands, *at_b,
                                                 mpt_hash(what->seed, d.right, 0, trans_b ? j * K + l : l * N + j)),
                            l + 1 == K);
            }
            if (j < N) expected = finished(what, 1.5f, s.sum, 0.5f, expected, 0, MPT_IDENTITY, d.output, i * N + j);
            wrong += test_bits(((const float *)c.array.data)[i * LD + j]) != test_bits(expected);
        }
    if (!CHECK_EQUAL(wrong, 0)) printf("    trans %d %d\n", trans_a, trans_b);
    *next = d.next;
    free(old);
    (void)lens;
    test_tensor_free(&a), test_tensor_free(&b), test_tensor_free(&c);
}

typedef struct convolution {
    mpt_conv2d_shape z;
    size_t P, Q, C, K; /* C and K of a group */
    const float *x, *w, *y;
    draws d;
    const lens_what_if *what;
} convolution;

/* The row that output p reads through tap r, and the column that q reads through s; -1 in the padding. */
static long row_of(const convolution *c, size_t p, size_t r) {
    const long at = (long)(p * c->z.stride_h + r * c->z.dilation_h) - (long)c->z.padding_h;
    return at < 0 || at >= (long)c->z.H ? -1 : at;
}

static long column_of(const convolution *c, size_t q, size_t s) {
    const long at = (long)(q * c->z.stride_w + s * c->z.dilation_w) - (long)c->z.padding_w;
    return at < 0 || at >= (long)c->z.W ? -1 : at;
}

static float conv_product_x(const convolution *c, size_t n, long h, long v, size_t channel, int left) {
    const size_t i = ((n * c->z.H + (size_t)h) * c->z.W + (size_t)v) * c->z.C + channel;
    return h < 0 || v < 0 ? 0 : operand(c->what, c->x, i, left ? c->d.left : c->d.right);
}

static float conv_product_y(const convolution *c, size_t n, size_t p, size_t q, size_t filter) {
    return operand(c->what, c->y, ((n * c->P + p) * c->Q + q) * c->z.K + filter, c->d.left);
}

static float conv_product_w(const convolution *c, size_t k, size_t r, size_t s, size_t channel) {
    return operand(c->what, c->w, ((k * c->z.R + r) * c->z.S + s) * c->C + channel, c->d.right);
}

static float conv_forward_sum(const convolution *c, size_t n, size_t p, size_t q, size_t k, sum_state *s) {
    const size_t group = k / c->K, length = c->z.R * c->z.S * c->C;
    size_t l;
    for (l = 0; l < length; l++) {
        const size_t r = l / c->C / c->z.S, t = l / c->C % c->z.S, ch = l % c->C;
        sum_product(s, conv_product_x(c, n, row_of(c, p, r), column_of(c, q, t), group * c->C + ch, 1),
                    conv_product_w(c, k, r, t, ch), l + 1 == length);
    }
    return s->sum;
}

/* Taps of a row of the kernel from the last to the first, as the engine goes. */
static float conv_data_sum(const convolution *c, size_t n, size_t h, size_t v, size_t channel, sum_state *s) {
    const size_t group = channel / c->C, length = c->z.R * c->z.S * c->K;
    size_t l, p, q;
    for (l = 0; l < length; l++) {
        const size_t r = l / c->K / c->z.S, t = c->z.S - 1 - l / c->K % c->z.S, k = group * c->K + l % c->K;
        float dy = 0;
        for (p = 0; p < c->P; p++)
            for (q = 0; q < c->Q; q++)
                if (row_of(c, p, r) == (long)h && column_of(c, q, t) == (long)v) dy = conv_product_y(c, n, p, q, k);
        sum_product(s, dy, conv_product_w(c, k, r, t, channel % c->C), l + 1 == length);
    }
    return s->sum;
}

static float conv_weight_sum(const convolution *c, size_t k, size_t r, size_t t, size_t ch, sum_state *s) {
    const size_t length = c->z.N * c->P * c->Q;
    size_t l;
    for (l = 0; l < length; l++) {
        const size_t n = l / c->Q / c->P, p = l / c->Q % c->P, q = l % c->Q;
        sum_product(s, conv_product_y(c, n, p, q, k),
                    conv_product_x(c, n, row_of(c, p, r), column_of(c, q, t), k / c->K * c->C + ch, 0),
                    l + 1 == length);
    }
    return s->sum;
}

/* Element i of what a pass writes. Sums of a group are numbered within it, rows of its own result. */
static float conv_element(const convolution *c, mpt_pass pass, size_t i, sum_state *s) {
    const mpt_conv2d_shape *z = &c->z;
    if (pass == MPT_FORWARD) {
        s->element = i / z->K * c->K + i % z->K % c->K, s->draw = c->d.sum + i % z->K / c->K;
        return conv_forward_sum(c, i / z->K / c->Q / c->P, i / z->K / c->Q % c->P, i / z->K % c->Q, i % z->K, s);
    }
    if (pass == MPT_BACKWARD_DATA) {
        s->element = i / z->C * c->C + i % z->C % c->C, s->draw = c->d.sum + i % z->C / c->C;
        return conv_data_sum(c, i / z->C / z->W / z->H, i / z->C / z->W % z->H, i / z->C % z->W, i % z->C, s);
    }
    s->element = i % (c->K * z->R * z->S * c->C), s->draw = c->d.sum + i / (c->K * z->R * z->S * c->C);
    return conv_weight_sum(c, i / c->C / z->S / z->R, i / c->C / z->S % z->R, i / c->C % z->S, i % c->C, s);
}

static void check_conv(mpt_context *ctx, const lens_what_if *what, const mpt_conv2d_shape *shape, mpt_pass pass,
                       uint64_t *next) {
    convolution c;
    test_tensor x, w, y, bias;
    mpt_conv2d_op op = MPT_ZERO;
    size_t i, count, wrong = 0;
    float *old;
    const float *out;
    memset(&c, 0, sizeof c);
    c.z = *shape, c.what = what;
    CHECK_OK(ctx, mpt_conv2d_output(ctx, shape, &c.P, &c.Q));
    c.C = shape->C / shape->groups, c.K = shape->K / shape->groups;
    x = test_tensor_random(ctx, MPT_F32, shape->N * shape->H * shape->W * shape->C, 4);
    w = test_tensor_random(ctx, MPT_F32, shape->K * shape->R * shape->S * c.C, 5);
    y = test_tensor_random(ctx, MPT_F32, shape->N * c.P * c.Q * shape->K, 6);
    bias = test_tensor_random(ctx, MPT_F32, shape->K, 7);
    c.x = (const float *)x.array.data, c.w = (const float *)w.array.data, c.y = (const float *)y.array.data;
    c.d = draws_from(what, *next);
    c.d.output += shape->groups - 1, c.d.next += shape->groups - 1;
    out = pass == MPT_FORWARD ? c.y : pass == MPT_BACKWARD_DATA ? c.x : c.w;
    count = pass == MPT_FORWARD ? y.count : pass == MPT_BACKWARD_DATA ? x.count : w.count;
    old = (float *)test_memory(count * sizeof *old);
    memcpy(old, out, count * sizeof *old);
    op.pass = pass;
    op.shape = *shape;
    op.x = x.array;
    op.w = w.array;
    op.y = y.array;
    if (pass == MPT_FORWARD) op.bias = bias.array;
    if (pass == MPT_FORWARD) op.act = MPT_RELU;
    if (pass == MPT_BACKWARD_DATA) op.beta = 0.5f;
    CHECK_OK(ctx, mpt_op_conv2d(ctx, &op));
    for (i = 0; i < count; i++) {
        const int forward = pass == MPT_FORWARD;
        sum_state s;
        float sum;
        memset(&s, 0, sizeof s);
        s.what = what;
        sum = conv_element(&c, pass, i, &s);
        sum = finished(what, 1, sum, pass == MPT_BACKWARD_DATA ? 0.5f : 0, old[i],
                       forward ? ((const float *)bias.array.data)[i % shape->K] : 0, forward ? MPT_RELU : MPT_IDENTITY,
                       c.d.output, i);
        wrong += test_bits(out[i]) != test_bits(sum) && (out[i] > 0 || out[i] < 0 || sum > 0 || sum < 0);
    }
    if (!CHECK_EQUAL(wrong, 0)) printf("    pass %d of %lu groups\n", pass, (unsigned long)shape->groups);
    *next = c.d.next;
    free(old);
    test_tensor_free(&x), test_tensor_free(&w), test_tensor_free(&y), test_tensor_free(&bias);
}

static const mpt_conv2d_shape shapes[] = {{2, 7, 5, 3, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0},
                                          {1, 9, 8, 6, 9, 3, 2, 2, 2, 1, 1, 2, 2, 3, 0},
                                          {2, 5, 5, 5, 5, 3, 3, 2, 2, 1, 1, 1, 1, 5, 0},
                                          {3, 4, 3, 5, 7, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0}};

/* Sums that are rounded as they grow, against a loop over every product. */
static void test_plain_sums(mpt_context *ctx) {
    int i, j;
    for (i = 0; i < 12; i++) {
        lens_view *lens = lens_open(ctx);
        lens_what_if what = MPT_ZERO;
        uint64_t next = 0;
        what.operands = precision_of((lens_format)((i * 7) % LENS_FORMAT_COUNT), (mpt_round)(i % 3));
        what.sum = precision_of((lens_format)((i + 1) % LENS_FORMAT_COUNT), (mpt_round)(i / 3 % 3));
        what.output = precision_of((lens_format)((i * 5 + 2) % LENS_FORMAT_COUNT), (mpt_round)(i / 2 % 3));
        what.chunk = (size_t)(i % 4 * 3 + (what.sum.format == LENS_F32));
        what.sum.flush = i % 2, what.seed = (uint64_t)i;
        what.operands.overflow = what.sum.overflow = what.output.overflow = MPT_OVERFLOW_SATURATE;
        CHECK_OK(ctx, lens_simulate(lens, 0, 0, &what));
        for (j = 0; j < 4; j++) check_gemm(ctx, lens, &what, j & 1, j >> 1, &next);
        for (j = 0; j < 12; j++) check_conv(ctx, &what, &shapes[j % 4], (mpt_pass)(j / 4), &next);
        CHECK_OK(ctx, lens_close(lens));
    }
}

/* x rounded on the host, in place. */
static void round_tensor(test_tensor *t, const lens_precision *p) {
    float *x = (float *)t->array.data;
    size_t i;
    for (i = 0; i < t->count; i++) x[i] = lens_precision_round(p, x[i], 0);
}

/* Where the engine adds, the same bits as the engine gives for operands rounded beforehand, its result then rounded. */
static void test_engine_sums(mpt_context *ctx) {
    enum { N = 13, I = 301, O = 35 };
    int i;
    for (i = 0; i < 2 * LENS_FORMAT_COUNT; i++) {
        const lens_precision p = precision_of((lens_format)(i % LENS_FORMAT_COUNT),
                                              i / LENS_FORMAT_COUNT ? MPT_ROUND_ZERO : MPT_ROUND_NEAREST);
        test_tensor x = test_tensor_random(ctx, MPT_F32, N * I, 1), w = test_tensor_random(ctx, MPT_F32, O * I, 2);
        test_tensor b = test_tensor_random(ctx, MPT_F32, O, 3), y = test_tensor_new(ctx, MPT_F32, N * O);
        test_tensor z = test_tensor_new(ctx, MPT_F32, N * O);
        lens_view *lens = lens_open(ctx);
        lens_what_if what = MPT_ZERO;
        mpt_gemm_op op = MPT_ZERO;
        op.trans_b = 1;
        op.m = N;
        op.n = O;
        op.k = I;
        op.a = x.array;
        op.b = w.array;
        op.c = y.array;
        op.bias = b.array;
        op.act = MPT_GELU;
        what.operands = what.output = p;
        CHECK_OK(ctx, lens_simulate(lens, 0, 1u << MPT_FORWARD, &what));
        CHECK_OK(ctx, mpt_op_gemm(ctx, &op));
        CHECK_OK(ctx, lens_simulate(lens, 0, 0, NULL));
        round_tensor(&x, &p), round_tensor(&w, &p);
        op.c = z.array;
        CHECK_OK(ctx, mpt_op_gemm(ctx, &op));
        CHECK((memcmp(y.array.data, z.array.data, N * O * sizeof(float)) == 0) == (p.format == LENS_F32));
        round_tensor(&z, &p);
        CHECK(memcmp(y.array.data, z.array.data, N * O * sizeof(float)) == 0);
        CHECK_OK(ctx, lens_close(lens));
        test_tensor_free(&x), test_tensor_free(&w), test_tensor_free(&b), test_tensor_free(&y), test_tensor_free(&z);
    }
}

/* An fp32 net whose operands and outputs are simulated in fp16 trains as the autocast net does, to the bit: the
   instrument and the real thing are the same. */
static snapshot simulated_or_real(mpt_context *ctx, mpt_dtype type, int simulated) {
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(simulated ? MPT_O0 : MPT_O1, type));
    mpt_train_desc train = MPT_ZERO;
    lens_view *lens = lens_open(ctx);
    lens_what_if what = MPT_ZERO, last;
    mpt_conv2d_desc conv = MPT_ZERO;
    mpt_linear_desc linear = MPT_ZERO;
    snapshot s = {0, NULL};
    int h = mpt_input(net, SIDE, SIDE, CHANNELS), i, id;
    conv.no_bias = linear.no_bias = conv.same = 1; /* autocast rounds it */
    h = mpt_max_pool2d(net, mpt_relu(net, mpt_conv2d(net, h, 6, 3, &conv)), 2, NULL);
    h = mpt_relu(net, mpt_linear(net, mpt_flatten(net, h), 9, &linear));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, &linear), NULL);
    train.batch = BATCH;
    train.scaler.mode = MPT_SCALER_STATIC, train.scaler.init_scale = 256.0f;
    train.optimizer = mpt_adam(1e-2);
    CHECK_OK(ctx, mpt_model_build(net, &train));
    what.operands.format = what.output.format = type == MPT_F16 ? LENS_F16 : LENS_BF16;
    last = what, last.output.format = LENS_F32; /* weight gradients, and the logits, are fp32 */
    for (id = 0; id <= mpt_model_nodes(net) && simulated; id++) {
        CHECK_OK(ctx, lens_simulate(lens, id, 1u << MPT_FORWARD, id == mpt_model_nodes(net) - 1 ? &last : &what));
        CHECK_OK(ctx, lens_simulate(lens, id, 1u << MPT_BACKWARD_DATA, &what));
        CHECK_OK(ctx, lens_simulate(lens, id, 1u << MPT_BACKWARD_WEIGHT, &last));
    }
    for (i = 0; i < 4; i++) {
        const data d = data_new((uint64_t)i);
        CHECK_OK(ctx, mpt_train_step(net, d.x, d.label));
    }
    snapshot_add(&s, ctx, mpt_params_master(mpt_model_params(net), 0), 4 * mpt_params_count(mpt_model_params(net), 0));
    CHECK_OK(ctx, lens_close(lens));
    mpt_model_free(net);
    return s;
}

/* Does a product of bf16 add in the order of one of the same numbers in fp32? Not where the CPU multiplies pairs. */
static int adds_as_f32(mpt_context *ctx) {
    enum { SIZE = 64 };
    test_tensor half = test_tensor_random(ctx, MPT_BF16, SIZE * SIZE, 1),
                full = test_tensor_new(ctx, MPT_F32, SIZE * SIZE);
    test_tensor a = test_tensor_new(ctx, MPT_F32, SIZE * SIZE), b = test_tensor_new(ctx, MPT_F32, SIZE * SIZE);
    mpt_gemm_op op = MPT_ZERO;
    int same;
    CHECK_OK(ctx, mpt_cast(ctx, SIZE * SIZE, half.array, full.array, NULL));
    op.m = op.n = op.k = SIZE;
    op.a = op.b = half.array;
    op.c = a.array;
    CHECK_OK(ctx, mpt_op_gemm(ctx, &op));
    op.a = op.b = full.array;
    op.c = b.array;
    CHECK_OK(ctx, mpt_op_gemm(ctx, &op));
    same = memcmp(a.array.data, b.array.data, SIZE * SIZE * sizeof(float)) == 0;
    test_tensor_free(&half), test_tensor_free(&full), test_tensor_free(&a), test_tensor_free(&b);
    return same;
}

static void test_simulated_training(mpt_context *ctx) {
    CHECK(snapshot_same(simulated_or_real(ctx, MPT_F16, 1), simulated_or_real(ctx, MPT_F16, 0)));
    if (adds_as_f32(ctx))
        CHECK(snapshot_same(simulated_or_real(ctx, MPT_BF16, 1), simulated_or_real(ctx, MPT_BF16, 0)));
    CHECK(!snapshot_same(simulated_or_real(ctx, MPT_BF16, 1), simulated_or_real(ctx, MPT_F16, 1)));
}

/* ==== EXPLAINING ==== */

/* linear, relu, linear, mse; everything 1 but what the test sets */
static mpt_model *plain_net(mpt_context *ctx, float first, float second) {
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    mpt_train_desc train = MPT_ZERO;
    mpt_linear_desc linear = MPT_ZERO;
    float weight[WIDTH * WIDTH];
    int i, h;
    linear.no_bias = 1;
    h = mpt_relu(net, mpt_linear(net, mpt_input(net, 1, 1, WIDTH), WIDTH, &linear));
    mpt_mse(net, mpt_linear(net, h, WIDTH, &linear), NULL);
    train.batch = 2;
    train.optimizer = mpt_sgd(0.001, 0);
    CHECK_OK(ctx, mpt_model_build(net, &train));
    for (i = 0; i < WIDTH * WIDTH; i++) weight[i] = first;
    CHECK_OK(ctx, mpt_params_set(mpt_model_params(net), 1, weight));
    for (i = 0; i < WIDTH * WIDTH; i++) weight[i] = second;
    CHECK_OK(ctx, mpt_params_set(mpt_model_params(net), 2, weight));
    return net;
}

static void test_explain(mpt_context *ctx) {
    const float x[2 * WIDTH] = {1, 1, 1, 1, 1, 1, 1, 1}, target[2 * WIDTH] = {0};
    mpt_model *net = plain_net(ctx, 16384.0f, 1);
    lens_explanation why;
    CHECK_OK(ctx, lens_explain(net, x, target, 2, 1, &why)); /* 4 * 16384 = 65536 */
    CHECK(why.found && why.node == 2 && why.output == 2 && why.pass == MPT_FORWARD && why.type == MPT_F16);
    CHECK(strcmp(why.operation, "product") == 0);
    CHECK(why.result.count == 2 * WIDTH && why.result.inf == 2 * WIDTH && why.result.nan == 0);
    CHECK(why.result.largest == 65536.0 && why.result.smallest == 65536.0);
    CHECK(why.read[0].largest == 1.0 && why.read[1].largest == 16384.0 && why.read[1].count == WIDTH * WIDTH);
    CHECK(test_has_word(why.text, "linear1") && test_has_word(why.text, "65536") && test_has_word(why.text, "8"));
    mpt_model_free(net);

    net = plain_net(ctx, 1, 8); /* y = 128, dlogits = 2 y / 8 = 32 S; hidden gradient 4 * 8 * 32 S = 1024 S */
    CHECK_OK(ctx, lens_explain(net, x, target, 2, 1, &why));
    CHECK(!why.found && why.result.count == 0 && test_has_word(why.text, "finite"));
    CHECK_OK(ctx, lens_explain(net, x, target, 2, 64, &why));
    CHECK(why.found && why.node == 4 && why.output == 3 && why.pass == MPT_BACKWARD_DATA);
    CHECK(why.result.largest == 65536.0 && why.read[0].largest == 2048.0 && why.read[1].largest == 8.0);
    CHECK(why.scale >= 64.0f && why.scale <= 64.0f);
    CHECK_EQUAL(mpt_loss_scale(net), 65536);

    CHECK_OK(ctx, mpt_train_step(net, x, target)); /* skipped, at 65536 */
    CHECK_EQUAL(mpt_steps_skipped(net), 1);
    CHECK_EQUAL(mpt_loss_scale(net), 32768);
    CHECK_OK(ctx, lens_explain(net, x, target, 2, 0, &why));
    CHECK(why.found && why.scale >= 65536.0f && why.scale <= 65536.0f);
    CHECK(why.node == 5 || why.node == 4); /* the loss writes 32 S in fp32 or fp16 */
    CHECK_EQUAL(mpt_loss_scale(net), 32768);
    CHECK_EQUAL(mpt_steps_skipped(net), 1);
    CHECK_ERROR(ctx, lens_explain(net, x, target, 2, 1, NULL), MPT_ERROR_ARGUMENT, "out");
    CHECK_ERROR(ctx, lens_explain(net, x, target, 2, -1, &why), MPT_ERROR_ARGUMENT, "finite");
    CHECK_ERROR(ctx, lens_explain(net, x, target, 3, 1, &why), MPT_ERROR_ARGUMENT, "samples");
    CHECK_EQUAL(mpt_loss_scale(net), 32768); /* put back after an error, too */
    CHECK_OK(ctx, mpt_forward(net, x, target, 2));
    CHECK_OK(ctx, mpt_backward(net));
    CHECK_ERROR(ctx, lens_explain(net, x, target, 2, 1, &why), MPT_ERROR_ORDER, "step");
    CHECK_OK(ctx, mpt_unscale(mpt_model_optimizer(net)));
    CHECK_ERROR(ctx, lens_explain(net, x, target, 2, 1, &why), MPT_ERROR_ORDER, "step");
    mpt_model_free(net);
}

/* ==== TABLES ==== */

enum { ROWS = 400, ROW = 256 };

typedef struct table {
    int rows, columns;
    char row[ROWS][ROW];
} table;

static void keep_row(const char *line, void *user) {
    table *t = (table *)user;
    const size_t length = strlen(line);
    CHECK(length < ROW && length && line[length - 1] == '\n' && strchr(line, '\n') == line + length - 1);
    if (CHECK(t->rows < ROWS)) memcpy(t->row[t->rows++], line, length + 1);
}

static table *table_new(void) { return (table *)test_memory(sizeof(table)); }

/* Cell of a CSV row; cells have no quotes here. */
static const char *cell(const table *t, int row, const char *column) {
    static char text[ROW];
    const char *name = t->row[0], *at = t->row[row];
    size_t i;
    for (;; name = strchr(name, ',') + 1, at = strchr(at, ',') + 1) {
        for (i = 0; name[i] == column[i] && column[i]; i++) {}
        if (!column[i] && (name[i] == ',' || name[i] == '\n')) break;
        if (!strchr(name, ',') || !strchr(at, ',')) return "no such column";
    }
    for (i = 0; at[i] != ',' && at[i] != '\n'; i++) text[i] = at[i];
    text[i] = 0;
    return text;
}

static double number(const table *t, int row, const char *column) { return atof(cell(t, row, column)); }

/* Row that has these words in its first columns, or 0. */
static int row_with(const table *t, const char *first, const char *second) {
    char start[ROW];
    int i;
    snprintf(start, sizeof start, "%s,%s", first, second);
    for (i = 1; i < t->rows; i++)
        if (strncmp(t->row[i], start, strlen(start)) == 0 && strchr(",\n", t->row[i][strlen(start)])) return i;
    return 0;
}

static void test_memory_table(mpt_context *ctx, mpt_model *net) {
    const mpt_memory m = mpt_model_memory(net);
    const double all =
        (double)(m.weights + m.masters + m.gradients + m.moments + m.activations + m.workspace + m.bookkeeping);
    table *t = table_new();
    CHECK_OK(ctx, mpt_memory_print(net, MPT_CSV, keep_row, t));
    CHECK_EQUAL(t->rows, 9);
    CHECK_EQUAL(number(t, 1, "bytes"), m.weights);
    CHECK_EQUAL(number(t, 5, "bytes"), m.activations);
    CHECK_EQUAL(number(t, 8, "bytes"), all);
    CHECK_NEAR(number(t, 4, "share"), 100 * (double)m.moments / all, 1e-4);
    CHECK(strcmp(cell(t, 4, "role"), "moments") == 0);
    t->rows = 0;
    CHECK_OK(ctx, mpt_memory_print(net, MPT_TEXT, keep_row, t));
    CHECK(t->rows == 9 && test_has_word(t->row[4], "moments") && !strchr(t->row[4], ','));
    free(t);
}

static void test_optimizer_tables(mpt_context *ctx, mpt_model *net) {
    const test_block block = {ctx, NULL, mpt_model_optimizer(net), 0};
    const mpt_optimizer_state s = test_block_state(&block);
    table *t = table_new();
    uint64_t i;
    CHECK(s.moved > 0 && s.skipped > 0);
    CHECK_OK(ctx, lens_optimizer_print(net, MPT_CSV, keep_row, t));
    CHECK_EQUAL(t->rows, 8);
    CHECK_EQUAL(number(t, 2, "value"), s.applied);
    CHECK_EQUAL(number(t, 3, "value"), s.skipped);
    CHECK_EQUAL(number(t, 5, "value"), s.moved);
    CHECK_EQUAL(number(t, 6, "value"), s.lost);
    CHECK_NEAR(number(t, 7, "value"), 100 * (double)s.lost / (double)s.moved, 1e-3);
    t->rows = 0;
    CHECK_OK(ctx, lens_skips_print(net, MPT_CSV, keep_row, t));
    CHECK_EQUAL(t->rows, 1 + (int)s.skipped);
    for (i = 0; i < s.skipped; i++) {
        const int row = 1 + (int)i;
        CHECK_EQUAL(number(t, row, "step"), s.journal[i].step);
        CHECK_EQUAL(number(t, row, "scale"), s.journal[i].scale);
        CHECK(strcmp(cell(t, row, "first tensor"), mpt_params_name(mpt_model_params(net), s.journal[i].tensor)) == 0);
        CHECK_EQUAL(number(t, row, "inf"), s.journal[i].inf);
    }
    free(t);
}

/* The sum over a histogram's bins, from the definition of the formats. */
static void test_histogram_tables(mpt_context *ctx, mpt_model *net) {
    lens_view *lens = lens_open(ctx);
    mpt_histogram h;
    table *t = table_new();
    lens_fit fit;
    double sum = 0;
    int row, i;
    CHECK_OK(ctx, lens_watch(lens, net));
    train_steps(ctx, net, 1);
    h = histogram_of(ctx, lens, 0, LENS_ACTIVATION_GRADIENT);
    CHECK_OK(ctx, lens_print(lens, 12, MPT_CSV, keep_row, t));
    row = row_with(t, "0", "all,activation gradient");
    if (CHECK(row > 0)) {
        fit = lens_histogram_fit(&h, MPT_F16, 0);
        CHECK_EQUAL(number(t, row, "values"), histogram_total(&h));
        CHECK_EQUAL(number(t, row, "zero"), h.zero);
        CHECK(strcmp(cell(t, row, "type"), "f16") == 0);
        CHECK_NEAR(number(t, row, "flushed"), 100 * fit.flushed, 1e-3);
        CHECK_NEAR(number(t, row, "subnormal"), 100 * fit.subnormal, 1e-3);
        fit = lens_histogram_fit(&h, MPT_F16, 12);
        CHECK_NEAR(number(t, row, "flushed S"), 100 * fit.flushed, 1e-3);
        CHECK_EQUAL(number(t, row, "advised"), lens_histogram_scale(&h, MPT_F16, LENS_HEADROOM));
        CHECK(h.exponent[127 + (int)number(t, row, "high")] && h.exponent[127 + (int)number(t, row, "low")]);
        CHECK_EQUAL(row_with(t, "0", "all,weight gradient"), row + 4);
    }
    CHECK(strcmp(cell(t, row_with(t, "2", "conv1,activation"), "advised"), "-") == 0);
    t->rows = 0;
    CHECK_OK(ctx, lens_histogram_print(&h, MPT_CSV, keep_row, t));
    for (i = 1; i < t->rows; i++) {
        CHECK_EQUAL(number(t, i, "count"), h.exponent[127 + (int)number(t, i, "log2")]);
        sum += number(t, i, "count");
    }
    CHECK_EQUAL(sum, histogram_total(&h) - h.zero - h.inf - h.nan);
    t->rows = 0;
    CHECK_OK(ctx, lens_sweep_print(&h, -3, 20, MPT_CSV, keep_row, t));
    CHECK_EQUAL(t->rows, 25);
    for (i = 1; i < t->rows; i++) {
        CHECK_EQUAL(number(t, i, "log2 S"), i - 4);
        CHECK_NEAR(number(t, i, "f16 flushed"), 100 * lens_histogram_fit(&h, MPT_F16, i - 4).flushed, 1e-3);
        CHECK_NEAR(number(t, i, "e5m2 overflowed"), 100 * lens_histogram_fit(&h, MPT_E5M2, i - 4).overflowed, 1e-3);
    }
    t->rows = 0;
    CHECK_OK(ctx, lens_print(lens, 12, MPT_TEXT, keep_row, t));
    CHECK(t->rows > 20);
    CHECK_OK(ctx, lens_close(lens));
    free(t);
}

/* A net whose products are known. */
static void test_product_tables(mpt_context *ctx, mpt_level level) {
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(level, MPT_F16));
    mpt_train_desc train = MPT_ZERO;
    mpt_conv2d_desc conv = MPT_ZERO;
    const size_t each = level == MPT_O0 ? 4 : 8;
    table *t = table_new();
    lens_product p;
    double sum = 0, good = 0;
    int i, h = mpt_input(net, 8, 8, 3);
    conv.groups = 2;
    conv.same = 1;
    h = test_same(net, h, 16, 3);                       /* node 2 */
    h = mpt_conv2d(net, h, 24, 3, &conv);               /* node 3: groups of 8 > 12 */
    h = mpt_conv2d(net, h, 8, 1, NULL);                 /* node 4 */
    h = mpt_linear(net, mpt_flatten(net, h), 10, NULL); /* node 6 */
    mpt_softmax_cross_entropy(net, h, NULL);
    train.batch = 32;
    CHECK_OK(ctx, mpt_model_build(net, &train));
    CHECK_OK(ctx, lens_model_product(net, 2, MPT_FORWARD, &p));
    CHECK(p.m == 32 * 64 && p.n == 16 && p.k == 27 && p.ldb == 27 && p.ldc == 16 && p.count == 1);
    CHECK(p.lda == (each == 8 ? 32 : 28) && p.trans_b && strcmp(p.broken, "k") == 0);
    CHECK_OK(ctx, lens_model_product(net, 2, MPT_BACKWARD_DATA, &p));
    CHECK(p.count == 0 && p.multiply_adds == 0);
    CHECK_OK(ctx, lens_model_product(net, 2, MPT_BACKWARD_WEIGHT, &p));
    CHECK(p.m == 16 && p.n == 27 && p.k == 2048 && p.trans_a && p.c == MPT_F32 && strcmp(p.broken, "n") == 0);
    CHECK_OK(ctx, lens_model_product(net, 3, MPT_BACKWARD_DATA, &p));
    CHECK(p.m == 2048 && p.n == 8 && p.k == 9 * 12 && p.count == 2 && p.multiply_adds == (size_t)2048 * 8 * 108 * 2);
    CHECK(strcmp(p.broken, each == 8 ? "k" : "") == 0);
    CHECK_OK(ctx, lens_model_product(net, 4, MPT_FORWARD, &p));
    CHECK(p.m == 2048 && p.n == 8 && p.k == 24 && p.lda == 24 && !*p.broken);
    CHECK_OK(ctx, lens_model_product(net, 6, MPT_FORWARD, &p));
    CHECK(p.m == 32 && p.n == 10 && p.k == 512 && p.lda == 512 && p.ldb == 512 && p.ldc == 10);
    CHECK(p.c == MPT_F32 && strcmp(p.broken, "n") == 0);
    CHECK_OK(ctx, lens_model_product(net, 6, MPT_BACKWARD_DATA, &p));
    CHECK(p.m == 32 && p.n == 512 && p.k == 10 && strcmp(p.broken, "k") == 0);
    CHECK_OK(ctx, lens_model_product(net, 6, MPT_BACKWARD_WEIGHT, &p));
    CHECK(p.m == 10 && p.n == 512 && p.k == 32 && strcmp(p.broken, "m") == 0);
    CHECK_OK(ctx, lens_products_print(net, MPT_CSV, keep_row, t));
    CHECK_EQUAL(t->rows, 1 + 11 + 1);
    for (i = 1; i < t->rows - 1; i++) {
        const double work = number(t, i, "m") * number(t, i, "n") * number(t, i, "k") * number(t, i, "count");
        CHECK_EQUAL(number(t, i, "multiply-adds"), work);
        sum += work;
        if (strcmp(cell(t, i, "eligible"), "yes") == 0) good += work;
    }
    CHECK_EQUAL(number(t, i, "multiply-adds"), sum);
    CHECK_NEAR(number(t, i, "eligible"), 100 * good / sum, 1e-3);
    CHECK(good > 0 && good < sum);
    CHECK_ERROR(ctx, lens_model_product(net, 0, MPT_FORWARD, &p), MPT_ERROR_ARGUMENT, "0");
    CHECK_ERROR(ctx, lens_model_product(net, 2, (mpt_pass)test_number(3), &p), MPT_ERROR_ARGUMENT, "3");
    CHECK_ERROR(ctx, lens_model_product(net, 2, MPT_FORWARD, NULL), MPT_ERROR_ARGUMENT, "out");
    free(t);
    mpt_model_free(net);
}

static void test_tables(mpt_context *ctx) {
    mpt_model *net = net_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16), MPT_SCALER_DEFAULT, MICRO);
    CHECK_OK(ctx, mpt_scaler_set_scale(mpt_model_scaler(net), 16777216.0f)); /* so that some steps are skipped */
    train_steps(ctx, net, 14);
    test_memory_table(ctx, net);
    test_optimizer_tables(ctx, net);
    test_histogram_tables(ctx, net);
    mpt_model_free(net);
    test_product_tables(ctx, MPT_O0);
    test_product_tables(ctx, MPT_O2);
}

/* ==== GRADIENTS ==== */

/* y = x^2, whose derivative is 2 x; factor 1 is the mistake. */
static mpt_result square_forward(const mpt_layer_pass *p) {
    const float *x = (const float *)p->x.data;
    float *y = (float *)p->y.data;
    size_t i;
    for (i = 0; i < p->N * FEATURES; i++) y[i] = x[i] * x[i];
    return MPT_OK;
}

static mpt_result square_backward(const mpt_layer_pass *p) {
    const float factor = *(const float *)p->user;
    const float *x = (const float *)p->x.data, *dy = (const float *)p->dy.data;
    float *dx = (float *)p->dx.data;
    size_t i;
    for (i = 0; i < p->N * FEATURES; i++) dx[i] = factor * x[i] * dy[i] + (p->beta_x == 0 ? 0 : p->beta_x * dx[i]);
    return MPT_OK;
}

/* A convolution under the square, a linear layer above it. */
static double square_worst(mpt_context *ctx, float factor, table *t) {
    const data d = data_new(3);
    mpt_model *net = mpt_model_new(ctx, policy_of(0));
    mpt_layer_desc square = MPT_ZERO;
    double worst = -1;
    square.forward = square_forward;
    square.backward = square_backward;
    square.user = &factor;
    mpt_softmax_cross_entropy(
        net,
        mpt_linear(net, mpt_layer(net, test_same(net, mpt_input(net, SIDE, SIDE, CHANNELS), 3, 3), &square), CLASSES,
                   NULL),
        NULL);
    CHECK_OK(ctx, mpt_model_build(net, NULL));
    CHECK_OK(ctx, lens_gradients(net, d.x, d.label, BATCH, MPT_CSV, keep_row, t, &worst));
    mpt_model_free(net);
    return worst;
}

static void test_gradients(mpt_context *ctx, int accumulate) {
    const data d = data_new(2);
    mpt_model *net = net_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16), MPT_SCALER_STATIC, accumulate);
    mpt_params *params = mpt_model_params(net);
    const size_t bytes = mpt_params_count(params, 0) * sizeof(float);
    float *before = (float *)test_memory(bytes), *after = (float *)test_memory(bytes);
    mpt_model *half;
    table *t = table_new();
    double worst = -1;
    int i, n;
    train_steps(ctx, net, 2);
    CHECK_OK(ctx, mpt_params_get(params, 0, before));
    for (n = 1; n <= BATCH; n += BATCH - 1) {
        t->rows = 0;
        CHECK_OK(ctx, lens_gradients(net, d.x, d.label, (size_t)n, MPT_CSV, keep_row, t, &worst));
        CHECK(worst > 0 && worst <= LENS_GRADIENT_BOUND);
        CHECK_EQUAL(t->rows, 1 + mpt_params_tensors(params));
        for (i = 1; i < t->rows; i++) {
            CHECK(strcmp(cell(t, i, "tensor"), mpt_params_name(params, i)) == 0);
            CHECK(number(t, i, "relative error") <= worst * (1 + 1e-5)); /* six digits */
        }
    }
    CHECK_OK(ctx, mpt_params_get(params, 0, after));
    CHECK(memcmp(before, after, bytes) == 0);
    train_steps(ctx, net, 1);
    CHECK_ERROR(ctx, lens_gradients(net, d.x, NULL, 1, MPT_CSV, keep_row, t, NULL), MPT_ERROR_ARGUMENT, "target");
    CHECK_ERROR(ctx, lens_gradients(net, d.x, d.label, 1, MPT_CSV, NULL, t, NULL), MPT_ERROR_ARGUMENT, "write");
    CHECK_ERROR(ctx, lens_gradients(net, d.x, d.label, 6, MPT_CSV, keep_row, t, NULL), MPT_ERROR_ARGUMENT, "6");
    CHECK(lens_gradients(NULL, d.x, d.label, 1, MPT_CSV, keep_row, t, NULL) == MPT_ERROR_ARGUMENT);
    half = net_new(ctx, mpt_policy_preset(MPT_O1, MPT_F16), MPT_SCALER_DEFAULT, 1);
    CHECK_ERROR(ctx, lens_gradients(half, d.x, d.label, 1, MPT_CSV, keep_row, t, NULL), MPT_ERROR_TYPE, "O0");
    if (ON_CPU) { /* the layer's loops are the host's */
        CHECK(square_worst(ctx, 2, t) <= LENS_GRADIENT_BOUND);
        t->rows = 0;
        CHECK(square_worst(ctx, 1, t) > 0.25);
        CHECK(number(t, 1, "relative error") > 0.25); /* the convolution's is wrong, that above is not */
        CHECK(number(t, 3, "relative error") <= LENS_GRADIENT_BOUND);
    }
    free(before);
    free(after);
    free(t);
    mpt_model_free(net);
    mpt_model_free(half);
}

/* ==== ERRORS ==== */

static void test_errors(mpt_context *ctx) {
    mpt_model *net = mpt_model_new(ctx, policy_of(0));
    lens_view *lens = lens_open(ctx), *later;
    lens_what_if what = MPT_ZERO;
    mpt_histogram h;
    table *t = table_new();
    mpt_mse(net, mpt_linear(net, mpt_input(net, 1, 1, 3), 2, NULL), NULL);
    memset(&h, 0, sizeof h);
    CHECK_ERROR(ctx, lens_watch(lens, net), MPT_ERROR_ARGUMENT, "built");
    CHECK_ERROR(ctx, mpt_memory_print(net, MPT_CSV, keep_row, t), MPT_ERROR_ORDER, "built");
    CHECK_ERROR(ctx, lens_products_print(net, MPT_CSV, keep_row, t), MPT_ERROR_ORDER, "built");
    CHECK_ERROR(ctx, lens_histogram(lens, 1, LENS_WEIGHT, &h), MPT_ERROR_ORDER, "watched");
    CHECK_ERROR(ctx, lens_print(lens, 0, MPT_CSV, keep_row, t), MPT_ERROR_ORDER, "watched");
    CHECK_OK(ctx, mpt_model_build(net, NULL));
    CHECK_OK(ctx, lens_watch(lens, net));
    CHECK_ERROR(ctx, lens_histogram(lens, 4, LENS_WEIGHT, &h), MPT_ERROR_ARGUMENT, "4");
    CHECK_ERROR(ctx, lens_histogram(lens, 1, (lens_role)test_number(9), &h), MPT_ERROR_ARGUMENT, "9");
    CHECK_ERROR(ctx, lens_histogram(lens, 1, LENS_WEIGHT, NULL), MPT_ERROR_ARGUMENT, "out");
    CHECK_ERROR(ctx, lens_print(lens, 0, MPT_CSV, NULL, t), MPT_ERROR_ARGUMENT, "write");
    CHECK_ERROR(ctx, lens_print(lens, 0, (mpt_style)test_number(2), keep_row, t), MPT_ERROR_ARGUMENT, "2");
    CHECK_ERROR(ctx, lens_skips_print(net, MPT_CSV, NULL, t), MPT_ERROR_ARGUMENT, "write");
    CHECK_ERROR(ctx, lens_optimizer_print(net, MPT_CSV, NULL, t), MPT_ERROR_ARGUMENT, "write");
    later = lens_open(ctx);
    CHECK_ERROR(ctx, lens_close(lens), MPT_ERROR_ORDER, "after");
    CHECK_OK(ctx, lens_close(later));
    if (ON_CPU) {
        CHECK_ERROR(ctx, lens_simulate(lens, -1, 0, &what), MPT_ERROR_ARGUMENT, "node");
        CHECK_ERROR(ctx, lens_simulate(lens, 0, 8, &what), MPT_ERROR_ARGUMENT, "8");
        what.sum.format = (lens_format)test_number(LENS_FORMAT_COUNT);
        CHECK_ERROR(ctx, lens_simulate(lens, 0, 0, &what), MPT_ERROR_ARGUMENT, "precision");
    } else CHECK_ERROR(ctx, lens_simulate(lens, 0, 0, &what), MPT_ERROR_UNSUPPORTED, "cuda");
    CHECK_OK(ctx, lens_close(lens));
    CHECK_OK(ctx, lens_close(NULL));
    CHECK(lens_open(NULL) == NULL && lens_watch(NULL, net) == MPT_ERROR_ARGUMENT);
    CHECK(lens_histogram(NULL, 0, LENS_WEIGHT, &h) == MPT_ERROR_ARGUMENT);
    CHECK(lens_histogram_print(NULL, MPT_CSV, keep_row, t) == MPT_ERROR_ARGUMENT);
    CHECK(lens_histogram_print(&h, MPT_CSV, NULL, t) == MPT_ERROR_ARGUMENT);
    CHECK(lens_sweep_print(NULL, 0, 1, MPT_CSV, keep_row, t) == MPT_ERROR_ARGUMENT);
    CHECK(lens_explain(NULL, NULL, NULL, 1, 1, NULL) == MPT_ERROR_ARGUMENT);
    CHECK_EQUAL(lens_histogram_scale(&h, MPT_F16, 0), 0);
    CHECK_EQUAL(t->rows, 0);
    free(t);
    mpt_model_free(net);
}

/* ==== MEMORY ==== */

#define RUN(call) \
    if (r == MPT_OK) r = (call)

/* A life with lenses; MPT_OK, or the first failure. */
static mpt_result live(mpt_context *ctx, mpt_model *net) {
    const data d = data_new(1);
    lens_view *lens = lens_open(ctx);
    lens_what_if what = MPT_ZERO;
    lens_explanation why;
    mpt_result r = lens ? MPT_OK : MPT_ERROR_NO_MEMORY;
    what.operands.format = LENS_BF16;
    RUN(lens_watch(lens, net));
    if (ON_CPU) RUN(lens_simulate(lens, 0, 0, &what));
    RUN(mpt_forward(net, d.x, d.label, BATCH));
    RUN(mpt_backward(net));
    RUN(mpt_unscale(mpt_model_optimizer(net)));
    RUN(mpt_step(mpt_model_optimizer(net)));
    RUN(mpt_scaler_update(mpt_model_scaler(net)));
    RUN(lens_explain(net, d.x, d.label, BATCH, 1, &why));
    CHECK(lens_close(lens) == MPT_OK);
    return r;
}

static void test_failures(void) {
    long fail_at;
    int refused = 1;
    for (fail_at = 1; refused; fail_at++) {
        test_counter counter;
        const mpt_context_desc desc = test_counting(&counter, 2);
        mpt_context *ctx = test_open(&desc);
        mpt_model *net = net_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16), MPT_SCALER_DEFAULT, 1);
        const size_t before = counter.bytes;
        mpt_result r;
        counter.calls = 0;
        counter.fail_at = fail_at;
        r = live(ctx, net);
        refused = counter.calls >= fail_at;
        test_check_result(ctx, r, refused ? MPT_ERROR_NO_MEMORY : MPT_OK, __FILE__, __LINE__, "live");
        if (refused) test_check_reason(ctx, "memory", __FILE__, __LINE__);
        CHECK_EQUAL(counter.bytes, before);
        counter.fail_at = 0;
        if (r != MPT_OK && ctx) train_steps(ctx, net, 1);
        mpt_model_free(net);
        mpt_close(ctx);
        CHECK(test_counter_clean(&counter));
    }
    CHECK(fail_at > 2); /* on CUDA only what the host keeps comes from this allocator */
}

static void test_context(mpt_context *ctx, int policies) {
    test_nothing_changes(ctx, policies);
    test_counting_values(ctx, 1), test_counting_values(ctx, 2);
    test_counts_of_all(ctx, 0), test_counts_of_all(ctx, 4);
    test_two_watch(ctx, 0), test_two_watch(ctx, 4);
    if (ON_CPU) {
        test_plain_sums(ctx);
        test_engine_sums(ctx);
        test_simulated_training(ctx);
    }
    test_explain(ctx);
    test_tables(ctx);
    test_gradients(ctx, 1), test_gradients(ctx, MICRO);
    test_errors(ctx);
    mpt_close(ctx);
}

int main(int argc, char **argv) {
    int isa;
    test_begin(argc, argv);
    RUN_TEST(test_advice());
    RUN_TEST(test_precisions());
    RUN_TEST(test_context(test_open_threads(3), ON_CPU ? POLICIES : 1));
    for (isa = MPT_ISA_PLAIN; isa < MPT_ISA_COUNT && ON_CPU; isa++) {
        mpt_context *ctx = test_open_isa((mpt_isa)isa, 1);
        if (ctx) RUN_TEST(test_context(ctx, 2));
    }
    RUN_TEST(test_failures());
    return test_finish("lens");
}
