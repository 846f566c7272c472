/* training.c - floor 3: loss scaler, parameter block, optimizers, the step protocol. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"

static const uint32_t inf_bits = 0x7f800000u, nan_bits = 0x7fc00000u;

/* ==== SCALER RULE ==== */

static const char events[] = "..x....xxx.......x.x"; /* x: an overflow */

/* log2 of the scale after each event, from 2^10, interval 3, smallest 1. */
static void check_trace(const char *name, mpt_scaler_desc desc, const int *expected) {
    mpt_scaler_state s;
    size_t i, wrong = 0;
    desc.init_scale = 1024;
    desc.growth_interval = 3;
    s = mpt_scaler_start(&desc);
    for (i = 0; events[i]; i++) {
        mpt_scaler_rule(&s, events[i] == 'x');
        wrong += (double)s.scale < ldexp(1, expected[i]) || (double)s.scale > ldexp(1, expected[i]);
    }
    if (!CHECK_EQUAL(wrong, 0)) printf("    in %s\n", name);
    CHECK_EQUAL(s.updates, 20);
    CHECK_EQUAL(s.overflows, 6);
}

static void test_scaler_traces(void) {
    static const int torch[] = {10, 10, 9, 9, 9, 10, 10, 9, 8, 7, 7, 7, 8, 8, 8, 9, 9, 8, 8, 7};
    static const int apex[] = {10, 10, 10, 10, 10, 11, 11, 11, 10, 9, 9, 9, 10, 10, 10, 11, 11, 11, 11, 11};
    static const int megatron[] = {10, 10, 10, 10, 10, 11, 11, 11, 10, 9, 9, 9, 10, 10, 10, 11, 11, 11, 11, 10};
    static const int deepspeed[] = {10, 10, 10, 10, 10, 10, 11, 11, 10, 9, 9, 9, 9, 10, 10, 10, 11, 11, 11, 10};
    static const int consecutive[] = {10, 10, 10, 10, 10, 10, 11, 11, 10, 9, 9, 9, 9, 10, 10, 10, 11, 11, 11, 11};
    mpt_scaler_desc d = MPT_ZERO;
    check_trace("ours", d, torch);
    d.no_min = 1;
    check_trace("torch", d, torch);
    d.hysteresis = 2, d.refill_when_clean = 1;
    check_trace("apex kernel", d, apex);
    d.no_min = 0, d.refill_when_clean = 0, d.unguarded = 1;
    check_trace("megatron", d, megatron);
    d.late_growth = 1;
    check_trace("deepspeed", d, deepspeed);
    d.refill_when_clean = 1;
    check_trace("deepspeed consecutive", d, consecutive);
}

static mpt_scaler_state after(const mpt_scaler_desc *desc, int found, int updates) {
    mpt_scaler_state s = mpt_scaler_start(desc);
    while (updates-- > 0) mpt_scaler_rule(&s, found);
    return s;
}

static void test_scaler_limits(void) {
    mpt_scaler_desc d = MPT_ZERO;
    d.growth_interval = 1;
    CHECK_EQUAL(after(&d, 1, 16).scale, 1);
    CHECK_EQUAL(after(&d, 1, 40).scale, 1);
    CHECK_EQUAL(after(&d, 1, 40).stuck, 24); /* overflows at 1 */
    CHECK_EQUAL(after(&d, 0, 8).scale, 16777216);
    CHECK_EQUAL(after(&d, 0, 40).scale, 16777216);
    d.min_scale = 3, d.max_scale = 100000; /* reached exactly, though no power of two */
    CHECK_EQUAL(after(&d, 1, 40).scale, 3);
    CHECK_EQUAL(after(&d, 0, 40).scale, 100000);
    d.no_min = 1;
    CHECK_EQUAL(after(&d, 1, 20).scale, 0.0625);
    CHECK_EQUAL(after(&d, 1, 500).scale, ldexp(1, -126)); /* not 0, from which nothing comes back */
    CHECK_EQUAL(after(&d, 1, 500).stuck, 500 - 142);
    d.no_max = 1; /* the guard: growth to inf is refused */
    CHECK_EQUAL(after(&d, 0, 500).scale, ldexp(1, 127));
    d.unguarded = 1;
    CHECK(test_bits(after(&d, 0, 500).scale) == inf_bits);
    CHECK(after(&d, 0, 112).stuck >= d.patience && after(&d, 0, 111).stuck == 0);
}

/* Static and off: the scale stays whatever happens. */
static void test_scaler_modes(void) {
    mpt_scaler_desc d = MPT_ZERO;
    d.growth_interval = 1;
    d.init_scale = 128;
    d.mode = MPT_SCALER_STATIC;
    CHECK_EQUAL(after(&d, 0, 5).scale, 128);
    CHECK_EQUAL(after(&d, 1, 5).scale, 128);
    CHECK_EQUAL(after(&d, 1, 5).overflows, 5);
    d.mode = MPT_SCALER_OFF;
    CHECK_EQUAL(after(&d, 0, 5).scale, 1);
    CHECK_EQUAL(after(&d, 1, 5).scale, 1);
}

static void test_scaler_defaults(void) {
    mpt_scaler_desc d = mpt_scaler_defaults(NULL);
    CHECK(d.mode == MPT_SCALER_DYNAMIC);
    CHECK_EQUAL(d.init_scale, 65536);
    CHECK_EQUAL(d.growth_factor, 2);
    CHECK_EQUAL(d.backoff_factor, 0.5);
    CHECK_EQUAL(d.min_scale, 1);
    CHECK_EQUAL(d.max_scale, 16777216);
    CHECK_EQUAL(d.growth_interval, 2000);
    CHECK_EQUAL(d.hysteresis, 1);
    CHECK_EQUAL(d.patience, 10);
    d.growth_factor = 4, d.growth_interval = 7;
    d = mpt_scaler_defaults(&d);
    CHECK_EQUAL(d.growth_factor, 4);
    CHECK_EQUAL(d.growth_interval, 7);
    CHECK_EQUAL(mpt_scaler_start(NULL).scale, 65536);
    CHECK_EQUAL(mpt_scaler_start(NULL).version, MPT_SCALER_STATE_VERSION);
}

/* ==== SCALER OBJECT ==== */

static void check_bad_scaler(mpt_context *ctx, const mpt_scaler_desc *desc, const char *word) {
    mpt_scaler *scaler = mpt_scaler_new(ctx, desc);
    if (!CHECK(scaler == NULL)) printf("    with a bad %s\n", word);
    test_check_reason(ctx, word, __FILE__, __LINE__);
    mpt_scaler_free(scaler);
}

static void test_scaler_errors(mpt_context *ctx) {
    const mpt_scaler_desc zero = MPT_ZERO;
    const float inf = test_float(inf_bits), nan = test_float(nan_bits);
    mpt_scaler_desc d = zero;
    CHECK(mpt_scaler_new(NULL, NULL) == NULL);
    d = zero, d.mode = (mpt_scaler_mode)test_number(9), check_bad_scaler(ctx, &d, "mode");
    d = zero, d.init_scale = -1, check_bad_scaler(ctx, &d, "scale");
    d = zero, d.init_scale = inf, check_bad_scaler(ctx, &d, "scale");
    d = zero, d.init_scale = nan, check_bad_scaler(ctx, &d, "scale");
    d = zero, d.init_scale = 33554432, check_bad_scaler(ctx, &d, "max_scale");
    d = zero, d.init_scale = 0.5f, check_bad_scaler(ctx, &d, "min_scale");
    d = zero, d.min_scale = -2, check_bad_scaler(ctx, &d, "min_scale");
    d = zero, d.max_scale = nan, check_bad_scaler(ctx, &d, "max_scale");
    d = zero, d.min_scale = 1048576, d.max_scale = 2, check_bad_scaler(ctx, &d, "max_scale");
    d = zero, d.growth_factor = 0.5, check_bad_scaler(ctx, &d, "growth_factor");
    d = zero, d.growth_factor = (double)nan, check_bad_scaler(ctx, &d, "growth_factor");
    d = zero, d.backoff_factor = 1.5, check_bad_scaler(ctx, &d, "backoff_factor");
    d = zero, d.backoff_factor = -0.5, check_bad_scaler(ctx, &d, "backoff_factor");
    d = zero, d.growth_interval = -1, check_bad_scaler(ctx, &d, "growth_interval");
    d = zero, d.hysteresis = -1, check_bad_scaler(ctx, &d, "hysteresis");
    d = zero, d.patience = -1, check_bad_scaler(ctx, &d, "patience");
}

static void test_scaler_state(mpt_context *ctx) {
    mpt_scaler *scaler = mpt_scaler_new(ctx, NULL);
    mpt_scaler_state s, copy;
    CHECK_OK(ctx, mpt_scaler_get_state(scaler, &s));
    CHECK_EQUAL(s.scale, 65536);
    CHECK_EQUAL(s.version, MPT_SCALER_STATE_VERSION);
    mpt_scaler_rule(&s, 1);
    mpt_scaler_rule(&s, 0);
    CHECK_OK(ctx, mpt_scaler_set_state(scaler, &s));
    CHECK_OK(ctx, mpt_scaler_get_state(scaler, &copy));
    CHECK(memcmp(&s, &copy, sizeof s) == 0);
    CHECK_EQUAL(mpt_scaler_scale(scaler), 32768);
    copy.version++;
    CHECK_ERROR(ctx, mpt_scaler_set_state(scaler, &copy), MPT_ERROR_UNSUPPORTED, "version");
    copy = s, copy.scale = test_float(nan_bits);
    CHECK_ERROR(ctx, mpt_scaler_set_state(scaler, &copy), MPT_ERROR_ARGUMENT, "scale");
    CHECK_ERROR(ctx, mpt_scaler_set_state(scaler, NULL), MPT_ERROR_ARGUMENT, "state");
    CHECK_ERROR(ctx, mpt_scaler_get_state(scaler, NULL), MPT_ERROR_ARGUMENT, "NULL");
    CHECK_ERROR(ctx, mpt_scaler_set_scale(scaler, 0), MPT_ERROR_ARGUMENT, "0");
    CHECK_ERROR(ctx, mpt_scaler_set_scale(scaler, -4), MPT_ERROR_ARGUMENT, "4");
    CHECK_ERROR(ctx, mpt_scaler_set_scale(scaler, test_float(inf_bits)), MPT_ERROR_ARGUMENT, "inf");
    CHECK_ERROR(ctx, mpt_scaler_set_scale(scaler, test_float(nan_bits)), MPT_ERROR_ARGUMENT, "nan");
    CHECK_OK(ctx, mpt_scaler_get_state(scaler, &copy));
    CHECK(memcmp(&s, &copy, sizeof s) == 0); /* none of them changed it */
    CHECK_OK(ctx, mpt_scaler_set_scale(scaler, 512));
    CHECK_OK(ctx, mpt_scaler_get_state(scaler, &copy));
    CHECK_EQUAL(copy.scale, 512);
    CHECK_EQUAL(copy.growth_tracker, 0);
    CHECK(mpt_scaler_set_scale(NULL, 1) == MPT_ERROR_ARGUMENT && mpt_scaler_update(NULL) == MPT_ERROR_ARGUMENT);
    mpt_scaler_free(scaler);
    mpt_scaler_free(NULL);
}

/* ==== PARAMETER BLOCK ==== */

static void test_params_layout(mpt_context *ctx, mpt_dtype type, mpt_master master) {
    mpt_params_desc desc = MPT_ZERO;
    float host[37], back[37];
    mpt_params *params;
    int w, b, i;
    desc.type = type, desc.master = master;
    params = mpt_params_new(ctx, &desc);
    w = mpt_params_add(params, "weight", 37, 0);
    b = mpt_params_add(params, "bias", 5, MPT_GROUP_BIAS);
    CHECK(w == 1 && b == 2 && mpt_params_tensors(params) == 2);
    CHECK(mpt_params_grad(params, 1) == NULL && mpt_params_count(params, 1) == 37);
    CHECK_OK(ctx, mpt_params_build(params));
    CHECK(strcmp(mpt_params_name(params, 1), "weight") == 0 && strcmp(mpt_params_name(params, 2), "bias") == 0);
    CHECK(strcmp(mpt_params_name(params, 0), "") == 0);
    CHECK_EQUAL(mpt_params_count(params, 2), 5);
    CHECK_EQUAL(mpt_params_count(params, 0), 48 + 16); /* padded to multiples of 16 */
    CHECK(mpt_params_grad(params, 2) == mpt_params_grad(params, 0) + 48);
    CHECK(mpt_params_weight(params, 1).type == type);
    CHECK((mpt_params_master(params, 1) != NULL) == (type == MPT_F32 || master == MPT_MASTER_F32));
    CHECK((mpt_params_weight(params, 1).data == mpt_params_master(params, 1)) == (type == MPT_F32));
    CHECK(mpt_params_grad(params, 3) == NULL && mpt_params_grad(params, -1) == NULL);
    CHECK_EQUAL(mpt_params_count(params, 3), 0);
    test_floats(host, 37, -1, 1, 1);
    CHECK_OK(ctx, mpt_params_set(params, 1, host));
    CHECK_OK(ctx, mpt_params_get(params, 1, back));
    for (i = 0; i < 37; i++) { /* the master keeps every bit, a 16-bit weight what its type holds */
        const mpt_dtype kept = mpt_params_master(params, 1) ? MPT_F32 : type;
        const uint32_t bits = mpt_narrow(host[i], kept, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0);
        CHECK_EQUAL(back[i], mpt_widen(bits, kept));
    }
    CHECK_OK(ctx, mpt_params_get(params, 2, back));
    for (i = 0; i < 5; i++) CHECK_EQUAL(back[i], 0);
    mpt_params_free(params);
}

static void test_params_errors(mpt_context *ctx) {
    const char *long_name = "a name of sixty-four characters, which is one more than allowed.";
    mpt_params_desc desc = MPT_ZERO;
    mpt_params *params;
    float x[4] = {0, 0, 0, 0};
    CHECK(mpt_params_new(NULL, NULL) == NULL);
    desc.type = MPT_E4M3;
    CHECK(mpt_params_new(ctx, &desc) == NULL);
    test_check_reason(ctx, "e4m3", __FILE__, __LINE__);
    desc.type = MPT_F16, desc.master = (mpt_master)test_number(5);
    CHECK(mpt_params_new(ctx, &desc) == NULL);
    test_check_reason(ctx, "master", __FILE__, __LINE__);
    params = mpt_params_new(ctx, NULL);
    CHECK_EQUAL(mpt_params_add(params, "large", (size_t)-1 / 20, 0), 1);
    CHECK_EQUAL(mpt_params_add(params, "larger", (size_t)-1 / 20, 0), 2); /* both, aligned, are too much */
    CHECK_ERROR(ctx, mpt_params_build(params), MPT_ERROR_SHAPE, "overflow");
    mpt_params_free(params);
    params = mpt_params_new(ctx, NULL);
    CHECK_ERROR(ctx, mpt_params_build(params), MPT_ERROR_ORDER, "tensor"); /* there is none */
    CHECK_ERROR(ctx, mpt_params_set(params, 1, x), MPT_ERROR_ORDER, "built");
    CHECK_EQUAL(mpt_params_add(params, "first", 4, MPT_GROUP_WEIGHT), 1);
    CHECK_OK(ctx, mpt_params_build(params));
    CHECK_ERROR(ctx, mpt_params_build(params), MPT_ERROR_ORDER, "built");
    CHECK_EQUAL(mpt_params_add(params, "late", 4, 0), 0);
    test_check_reason(ctx, "late", __FILE__, __LINE__);
    CHECK_ERROR(ctx, mpt_params_set(params, 2, x), MPT_ERROR_ARGUMENT, "2");
    CHECK_ERROR(ctx, mpt_params_get(params, -1, x), MPT_ERROR_ARGUMENT, "1");
    CHECK_ERROR(ctx, mpt_params_set(params, 1, NULL), MPT_ERROR_ARGUMENT, "host");
    CHECK_ERROR(ctx, mpt_params_init(params, 1, MPT_INIT_COUNT, 4, 4, 0), MPT_ERROR_ARGUMENT, "init");
    CHECK_ERROR(ctx, mpt_params_init(params, 1, MPT_INIT_DEFAULT, 0, 4, 0), MPT_ERROR_ARGUMENT, "fan_in");
    CHECK_ERROR(ctx, mpt_params_init(params, 7, MPT_INIT_DEFAULT, 4, 4, 0), MPT_ERROR_ARGUMENT, "7");
    CHECK(mpt_params_add(NULL, "x", 1, 0) == 0 && mpt_params_build(NULL) == MPT_ERROR_ARGUMENT);
    mpt_params_free(params);
    params = mpt_params_new(ctx, NULL);
    CHECK_EQUAL(mpt_params_add(params, "fine", 4, 0), 1);
    CHECK_EQUAL(mpt_params_add(params, "empty", 0, 0), 0);
    CHECK_EQUAL(mpt_params_add(params, long_name, 4, 0), 0);
    CHECK_EQUAL(mpt_params_add(params, NULL, 4, 0), 0);
    CHECK_EQUAL(mpt_params_add(params, "group", 4, 1u << 16), 0);
    CHECK_EQUAL(mpt_params_add(params, "huge", (size_t)-1 / 2, 0), 0);
    CHECK_ERROR(ctx, mpt_params_build(params), MPT_ERROR_SHAPE, "empty"); /* the first that failed */
    mpt_params_free(params);
    mpt_params_free(NULL);
}

/* ==== INITIAL WEIGHTS ==== */

/* Uniform in +-b: deviation of x is b / sqrt 3, of x^2 is b^2 sqrt(4 / 45). Normal with deviation d: of x^2 it is
   d^2 sqrt 2, and Box and Muller's values from 24-bit uniforms are at most d sqrt(2 ln 2^24) < 5.8 d. Returns the
   largest. */
static double check_moments(const float *x, int n, double deviation, double square_deviation, double bound) {
    double sum = 0, squares = 0, largest = 0;
    int i;
    for (i = 0; i < n; i++) {
        const double v = (double)x[i];
        sum += v;
        squares += v * v;
        if (fabs(v) > largest) largest = fabs(v);
    }
    CHECK_NEAR(sum / n, 0, 5 * deviation / sqrt(n));
    CHECK_NEAR(squares / n, deviation * deviation, 5 * square_deviation / sqrt(n));
    CHECK(largest <= bound * (1 + ldexp(1, -23)));
    return largest;
}

/* That 100000 uniform values all stay a thousandth below the bound has probability e^-100. */
static void check_uniform(const float *x, int n, double bound) {
    const double largest = check_moments(x, n, bound / sqrt(3), bound * bound * sqrt(4.0 / 45), bound);
    CHECK(largest >= bound * (1 - 100.0 / n));
}

static void test_init(mpt_context *ctx, mpt_init init, double bound, double deviation) {
    enum { COUNT = 100000 };
    float *first = (float *)test_memory(3 * COUNT * sizeof *first), *second = first + COUNT, *other = second + COUNT;
    mpt_params *params = mpt_params_new(ctx, NULL);
    mpt_params_add(params, "w", COUNT, MPT_GROUP_WEIGHT);
    mpt_params_add(params, "v", COUNT, MPT_GROUP_WEIGHT);
    mpt_params_add(params, "b", 100, MPT_GROUP_BIAS);
    CHECK_OK(ctx, mpt_params_build(params));
    CHECK_OK(ctx, mpt_params_init(params, 1, init, 200, 50, 9));
    CHECK_OK(ctx, mpt_params_get(params, 1, first));
    if (bound > 0) check_uniform(first, COUNT, bound);
    else check_moments(first, COUNT, deviation, deviation * deviation * sqrt(2), 5.8 * deviation);
    CHECK_OK(ctx, mpt_params_init(params, 1, init, 200, 50, 9)); /* named by seed, tensor, element: the same again */
    CHECK_OK(ctx, mpt_params_get(params, 1, second));
    CHECK(memcmp(first, second, COUNT * sizeof *first) == 0);
    CHECK_OK(ctx, mpt_params_init(params, 1, init, 200, 50, 10));
    CHECK_OK(ctx, mpt_params_get(params, 1, second));
    CHECK_OK(ctx, mpt_params_init(params, 2, init, 200, 50, 9));
    CHECK_OK(ctx, mpt_params_get(params, 2, other));
    CHECK((memcmp(first, second, COUNT * sizeof *first) == 0) == (init == MPT_INIT_ZERO));
    CHECK((memcmp(first, other, COUNT * sizeof *first) == 0) == (init == MPT_INIT_ZERO));
    CHECK_OK(ctx, mpt_params_init(params, 3, init, 200, 50, 9));
    CHECK_OK(ctx, mpt_params_get(params, 3, other));
    if (init == MPT_INIT_DEFAULT) check_uniform(other, 100, bound);
    else check_moments(other, 100, 0, 0, 0); /* bias 0 */
    mpt_params_free(params);
    free(first);
}

static void test_inits(mpt_context *ctx) {
    test_init(ctx, MPT_INIT_DEFAULT, 1 / sqrt(200), 0);
    test_init(ctx, MPT_INIT_KAIMING_UNIFORM, sqrt(6.0 / 200), 0);
    test_init(ctx, MPT_INIT_KAIMING_NORMAL, 0, sqrt(2.0 / 200));
    test_init(ctx, MPT_INIT_XAVIER_UNIFORM, sqrt(6.0 / 250), 0);
    test_init(ctx, MPT_INIT_XAVIER_NORMAL, 0, sqrt(2.0 / 250));
    test_init(ctx, MPT_INIT_ZERO, 0, 0);
}

/* ==== A SMALL TRAINER ==== params with two tensors, weight and bias, a scaler and an optimizer */

typedef struct trainer {
    mpt_context *ctx;
    mpt_params *params;
    mpt_scaler *scaler;
    mpt_optimizer *opt;
    size_t count[3], total; /* of tensors 1 and 2, and of the flat arrays */
} trainer;

static trainer trainer_new(mpt_context *ctx, mpt_dtype type, mpt_master master, const mpt_optimizer_desc *desc,
                           const mpt_scaler_desc *scaler, size_t weights, size_t biases) {
    mpt_params_desc params = MPT_ZERO;
    trainer t;
    params.type = type, params.master = master;
    t.ctx = ctx;
    t.count[0] = 0, t.count[1] = weights, t.count[2] = biases;
    t.params = mpt_params_new(ctx, &params);
    mpt_params_add(t.params, "weight", weights, MPT_GROUP_WEIGHT);
    mpt_params_add(t.params, "bias", biases, MPT_GROUP_BIAS);
    CHECK_OK(ctx, mpt_params_build(t.params));
    t.total = mpt_params_count(t.params, 0);
    t.scaler = mpt_scaler_new(ctx, scaler);
    t.opt = mpt_optimizer_new(t.params, t.scaler, desc);
    if (!CHECK(t.opt != NULL)) exit(test_finish("training"));
    return t;
}

static void trainer_free(trainer *t) {
    mpt_optimizer_free(t->opt);
    mpt_scaler_free(t->scaler);
    mpt_params_free(t->params);
}

/* Random weights in both tensors; random gradients, times `scale`, in both. */
static void set_weights(trainer *t, uint64_t seed) {
    int i;
    for (i = 1; i <= 2; i++) {
        float *x = (float *)test_memory(t->count[i] * sizeof *x);
        test_floats(x, t->count[i], -1, 1, seed + (uint64_t)i);
        CHECK_OK(t->ctx, mpt_params_set(t->params, i, x));
        free(x);
    }
}

static void set_gradients(trainer *t, double scale, uint64_t seed) {
    int i;
    for (i = 1; i <= 2; i++) {
        float *g = (float *)test_memory(t->count[i] * sizeof *g);
        test_floats(g, t->count[i], -scale, scale, seed + (uint64_t)i);
        CHECK_OK(t->ctx, mpt_upload(t->ctx, mpt_params_grad(t->params, i), g, t->count[i] * sizeof *g));
        free(g);
    }
}

static void set_gradient(trainer *t, int tensor, size_t i, float value) {
    CHECK_OK(t->ctx, mpt_upload(t->ctx, mpt_params_grad(t->params, tensor) + i, &value, sizeof value));
}

static mpt_optimizer_state state_of(trainer *t) {
    mpt_optimizer_state s;
    memset(&s, 0, sizeof s);
    CHECK_OK(t->ctx, mpt_optimizer_get_state(t->opt, &s));
    return s;
}

/* Everything that an applied step changes: masters, copies, moments. */
typedef struct snapshot {
    unsigned char *bytes;
    size_t size;
} snapshot;

static size_t snapshot_part(trainer *t, unsigned char *to, const void *from, size_t bytes) {
    if (!from) return 0;
    CHECK_OK(t->ctx, mpt_download(t->ctx, to, from, bytes));
    return bytes;
}

static snapshot take(trainer *t) {
    const mpt_array copy = mpt_params_weight(t->params, 0);
    snapshot s;
    s.bytes = (unsigned char *)test_memory(4 * t->total * sizeof(float));
    s.size = snapshot_part(t, s.bytes, mpt_params_master(t->params, 0), t->total * sizeof(float));
    s.size += snapshot_part(t, s.bytes + s.size, copy.data, t->total * mpt_dtype_size(copy.type));
    s.size += snapshot_part(t, s.bytes + s.size, mpt_optimizer_moment(t->opt, 1, 0), t->total * sizeof(float));
    s.size += snapshot_part(t, s.bytes + s.size, mpt_optimizer_moment(t->opt, 2, 0), t->total * sizeof(float));
    return s;
}

/* Are both the same? Frees both. */
static int same(snapshot a, snapshot b) {
    const int equal = a.size == b.size && memcmp(a.bytes, b.bytes, a.size) == 0;
    free(a.bytes), free(b.bytes);
    return equal;
}

static void step(trainer *t) {
    CHECK_OK(t->ctx, mpt_step(t->opt));
    CHECK_OK(t->ctx, mpt_scaler_update(t->scaler));
}

/* ==== OPTIMIZERS: GOLDEN STEPS ==== p = 1, gradient = 0.5 p, lr 0.1, weight_decay 0.01 */

static const uint32_t one_bits = 0x3f800000u;

/* An fp32 in [0.5, 1) has ulp 2^-24; 2 ulp a step. The gradient is exact, also when scaled. */
static void check_golden(mpt_context *ctx, const mpt_optimizer_desc *desc, mpt_scaler_mode mode, int skip_first,
                         const double *expected) {
    mpt_scaler_desc scaler = MPT_ZERO;
    trainer t;
    float p = test_float(one_bits);
    int i;
    scaler.mode = mode;
    t = trainer_new(ctx, MPT_F32, MPT_MASTER_F32, desc, &scaler, 1, 1);
    CHECK_OK(ctx, mpt_params_set(t.params, 1, &p));
    if (skip_first) { /* then the step after it is still the first one */
        set_gradient(&t, 1, 0, test_float(inf_bits));
        step(&t);
    }
    for (i = 0; i < 3; i++) {
        set_gradient(&t, 1, 0, 0.5f * p * mpt_scaler_scale(t.scaler));
        step(&t);
        CHECK_OK(ctx, mpt_params_get(t.params, 1, &p));
        CHECK_NEAR(p, expected[i], 2 * (i + 1) * ldexp(1, -24));
    }
    CHECK_EQUAL(state_of(&t).applied, 3);
    CHECK_EQUAL(state_of(&t).skipped, skip_first);
    trainer_free(&t);
}

static void test_golden(mpt_context *ctx) {
    static const double golden[4][3] = {{.949, .8595409, .73957478269},
                                        {.9031, .77427961, .624765854791},
                                        {.9000000019607843, .8004122316733858, .7015862774989581},
                                        {.899000002, .7985190302292928, .698911187830615}};
    mpt_optimizer_desc d[4];
    int i;
    d[0] = mpt_sgd(0.1, 0.9), d[0].dampening = 0.1;
    d[1] = mpt_sgd(0.1, 0.9), d[1].nesterov = 1;
    d[2] = mpt_adam(0.1);
    d[3] = mpt_adamw(0.1);
    for (i = 0; i < 4; i++) {
        d[i].weight_decay = 0.01;
        check_golden(ctx, &d[i], MPT_SCALER_OFF, 0, golden[i]);
        check_golden(ctx, &d[i], MPT_SCALER_DYNAMIC, 0, golden[i]);
        check_golden(ctx, &d[i], MPT_SCALER_DYNAMIC, 1, golden[i]);
    }
}

/* ==== OPTIMIZERS: ONE STEP IN DOUBLE ==== */

typedef struct element { /* before or after a step, and how far fp32 may be off */
    double p, m, v;
    double p_error, m_error, v_error;
} element;

typedef struct rule { /* of one step for one tensor */
    const mpt_optimizer_desc *d;
    double lr, weight_decay, gradient_factor; /* of the stored gradient: clip / scale */
    int applied;                              /* steps before this one */
} rule;

/* PyTorch's formulas in double from the fp32 values before the step. u is the unit roundoff; constants of the step are
   rounded to fp32 (u each) and every operation rounds once. G bounds the sizes that make up the gradient: the unscaled,
   clipped gradient is good to 5 u, decay * p to 2 u, their sum to u more, so g is good to 6 u G. */
static element sgd_step(const rule *r, element e, double gradient) {
    const double u = ldexp(1, -24), mu = r->d->momentum, undamped = 1 - r->d->dampening;
    const double decayed = r->weight_decay * e.p, G = fabs(gradient) + fabs(decayed), g = gradient + decayed;
    const int first = r->applied == 0;
    element out = e;
    double direction = g, size = G; /* what lr multiplies, and the sizes that make it up: good to 12 u size */
    if (mu > 0) {
        out.m = first ? g : mu * e.m + undamped * g;
        size = first ? G : fabs(mu * e.m) + fabs(undamped) * G;
        out.m_error = 9 * u * size; /* 6 u of g, two products, a sum */
        direction = r->d->nesterov ? g + mu * out.m : out.m;
        size = r->d->nesterov ? G + mu * size : size;
    }
    out.p = e.p - r->lr * direction;
    out.p_error = u * fabs(out.p) + 15 * u * r->lr * size;
    return out;
}

/* m: (1 - beta1) (g - m) is good to 6 u G and 3 u of |g| + |m|, the sum to u more. v: g^2 to 12 u G^2 and 4 u more.
   The quotient inherits the error of m, half the relative error of v, and 8 u of its own operations. */
static element adam_step(const rule *r, element e, double gradient) {
    const mpt_optimizer_desc *d = r->d;
    const double u = ldexp(1, -24), decayed = d->kind == MPT_ADAM ? r->weight_decay * e.p : 0;
    const double G = fabs(gradient) + fabs(decayed), g = gradient + decayed, t = r->applied + 1;
    const double kept = d->kind == MPT_ADAMW ? e.p * (1 - r->lr * r->weight_decay) : e.p;
    const double root = sqrt(1 - pow(d->beta2, t)), rate = r->lr / (1 - pow(d->beta1, t));
    element out;
    double denominator, update;
    out.m = e.m + (1 - d->beta1) * (g - e.m);
    out.v = d->beta2 * e.v + (1 - d->beta2) * g * g;
    out.m_error = u * fabs(out.m) + 10 * u * (1 - d->beta1) * (G + fabs(e.m));
    out.v_error = 3 * u * d->beta2 * e.v + 17 * u * (1 - d->beta2) * G * G;
    denominator = sqrt(out.v) / root + d->eps;
    update = rate * out.m / denominator;
    out.p = kept - update;
    out.p_error = u * fabs(out.p) + 3 * u * fabs(kept) + rate * out.m_error / denominator +
                  fabs(update) * (8 * u + (out.v > 0 ? out.v_error / (2 * out.v) : 0));
    return out;
}

static void download_floats(mpt_context *ctx, float *to, const float *from, size_t n) {
    if (from) CHECK_OK(ctx, mpt_download(ctx, to, from, n * sizeof *to));
}

/* One step of a tensor in fp32 against the same step in double. Without masters the result is rounded once more. */
static void check_step(trainer *t, int tensor, const rule *r) {
    const size_t n = t->count[tensor];
    const mpt_array weight = mpt_params_weight(t->params, tensor);
    const float *moment1 = mpt_optimizer_moment(t->opt, 1, tensor), *moment2 = mpt_optimizer_moment(t->opt, 2, tensor);
    const int copied = weight.type != MPT_F32, master = mpt_params_master(t->params, tensor) != NULL;
    float *before = (float *)test_memory(7 * n * sizeof *before), *m = before + n, *v = m + n, *g = v + n;
    float *p = g + n, *m2 = p + n, *v2 = m2 + n;
    uint16_t *copy = (uint16_t *)test_memory(n * sizeof(float));
    size_t i, wrong = 0, rounded_wrong = 0;
    CHECK_OK(t->ctx, mpt_params_get(t->params, tensor, before));
    download_floats(t->ctx, g, mpt_params_grad(t->params, tensor), n);
    download_floats(t->ctx, m, moment1, n);
    download_floats(t->ctx, v, moment2, n);
    CHECK_OK(t->ctx, mpt_step(t->opt));
    CHECK_OK(t->ctx, mpt_params_get(t->params, tensor, p));
    download_floats(t->ctx, m2, moment1, n);
    download_floats(t->ctx, v2, moment2, n);
    CHECK_OK(t->ctx, mpt_download(t->ctx, copy, weight.data, n * mpt_dtype_size(weight.type)));
    for (i = 0; i < n; i++) {
        element e = {0, 0, 0, 0, 0, 0};
        e.p = (double)before[i], e.m = (double)m[i], e.v = (double)v[i];
        e = r->d->kind == MPT_SGD ? sgd_step(r, e, (double)g[i] * r->gradient_factor)
                                  : adam_step(r, e, (double)g[i] * r->gradient_factor);
        if (!master) e.p_error += test_unit(weight.type) * (fabs(e.p) + e.p_error) + test_tiny(weight.type);
        wrong += !test_near((double)p[i], e.p, e.p_error);
        wrong += moment1 && !test_near((double)m2[i], e.m, e.m_error);
        wrong += moment2 && !test_near((double)v2[i], e.v, e.v_error);
        if (copied) rounded_wrong += copy[i] != mpt_narrow(p[i], weight.type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0);
    }
    CHECK_EQUAL(wrong, 0);
    CHECK_EQUAL(rounded_wrong, 0);
    free(before), free(copy);
}

static mpt_optimizer_desc variant(int i) {
    mpt_optimizer_desc d = i < 5 ? mpt_sgd(0.05, i ? 0.9 : 0) : i < 8 ? mpt_adam(0.01) : mpt_adamw(0.01);
    if (i == 1) d.weight_decay = 0.1, d.momentum = 0;
    if (i == 3) d.dampening = 0.3, d.weight_decay = 0.1;
    if (i == 4) d.nesterov = 1, d.weight_decay = 0.1;
    if (i == 6) d.weight_decay = 0.1;
    if (i == 7) d.beta1 = 0.3, d.beta2 = 0.99, d.eps = 1e-3; /* lerp weight above a half */
    if (i == 9) d.weight_decay = 0.2, d.beta1 = 0.8;
    return d;
}
enum { VARIANTS = 10 };

/* 20 steps on 1000 elements, with a scale that is no power of two, clipping and skipped steps between. */
static void test_twenty_steps(mpt_context *ctx, const mpt_optimizer_desc *d, mpt_dtype type, mpt_master master) {
    mpt_scaler_desc scaler = MPT_ZERO;
    trainer t;
    rule r;
    int i;
    scaler.mode = MPT_SCALER_STATIC, scaler.init_scale = 3000;
    t = trainer_new(ctx, type, master, d, &scaler, 983, 17);
    set_weights(&t, 1);
    r.d = d, r.lr = d->lr, r.weight_decay = d->weight_decay, r.applied = 0;
    for (i = 0; i < 20; i++) {
        double clip = 1;
        set_gradients(&t, 3000 * ldexp(1, -(i % 4)), (uint64_t)(10 * i));
        if (i == 0 || i == 7 || i == 8) { /* these are skipped */
            set_gradient(&t, 1 + i % 2, 3, test_float(i == 7 ? nan_bits : inf_bits));
            step(&t);
            continue;
        }
        CHECK_OK(ctx, mpt_unscale(t.opt));
        if (i % 3 == 0) {
            CHECK_OK(ctx, mpt_clip_norm(t.opt, 2));
            clip = state_of(&t).clip;
            CHECK(clip < 1);
        }
        r.gradient_factor = clip / 3000;
        check_step(&t, 1 + i % 2, &r);
        CHECK_OK(ctx, mpt_scaler_update(t.scaler));
        r.applied++;
    }
    CHECK_EQUAL(state_of(&t).applied, 17);
    CHECK_EQUAL(state_of(&t).skipped, 3);
    trainer_free(&t);
}

static void test_formulas(mpt_context *ctx) {
    int i;
    for (i = 0; i < VARIANTS; i++) {
        const mpt_optimizer_desc d = variant(i);
        test_twenty_steps(ctx, &d, MPT_F32, MPT_MASTER_F32);
        test_twenty_steps(ctx, &d, MPT_F16, MPT_MASTER_F32);
        test_twenty_steps(ctx, &d, MPT_BF16, MPT_MASTER_F32);
        test_twenty_steps(ctx, &d, MPT_F16, MPT_MASTER_NONE);
        test_twenty_steps(ctx, &d, MPT_BF16, MPT_MASTER_NONE);
    }
}

/* Bias with half the rate and no decay; weights as before. */
static void test_groups(mpt_context *ctx, const mpt_optimizer_desc *d) {
    mpt_scaler_desc off = MPT_ZERO;
    trainer t;
    rule r;
    int i;
    off.mode = MPT_SCALER_OFF;
    t = trainer_new(ctx, MPT_F16, MPT_MASTER_F32, d, &off, 100, 30);
    set_weights(&t, 5);
    CHECK_OK(ctx, mpt_optimizer_group(t.opt, MPT_GROUP_BIAS | MPT_GROUP_NORM, 0.5, 0));
    CHECK_OK(ctx, mpt_optimizer_set_lr(t.opt, 0.25));
    r.d = d, r.gradient_factor = 1;
    for (i = 0; i < 4; i++) {
        const int tensor = 1 + i % 2;
        r.lr = tensor == 2 ? 0.125 : 0.25, r.weight_decay = tensor == 2 ? 0 : d->weight_decay, r.applied = i;
        set_gradients(&t, 1, (uint64_t)i);
        check_step(&t, tensor, &r);
        CHECK_OK(ctx, mpt_scaler_update(t.scaler));
    }
    CHECK_ERROR(ctx, mpt_optimizer_group(t.opt, MPT_GROUP_BIAS, -1, 0), MPT_ERROR_ARGUMENT, "lr_factor");
    CHECK_ERROR(ctx, mpt_optimizer_group(t.opt, MPT_GROUP_BIAS, 1, (double)test_float(nan_bits)), MPT_ERROR_ARGUMENT,
                "weight_decay");
    CHECK_ERROR(ctx, mpt_optimizer_set_lr(t.opt, -0.1), MPT_ERROR_ARGUMENT, "optimizer_set_lr");
    CHECK_ERROR(ctx, mpt_optimizer_set_lr(t.opt, (double)test_float(inf_bits)), MPT_ERROR_ARGUMENT, "inf");
    trainer_free(&t);
}

static void check_bad_optimizer(trainer *t, const mpt_optimizer_desc *desc, const char *word) {
    CHECK(mpt_optimizer_new(t->params, t->scaler, desc) == NULL);
    test_check_reason(t->ctx, word, __FILE__, __LINE__);
}

static void check_bad_schedules(trainer *t) {
    mpt_optimizer_desc d = mpt_sgd(0.1, 0), bad;
    d.schedule.steps = 10, d.schedule.peak = 0.3;
    bad = d, bad.schedule.kind = (mpt_schedule_kind)test_number(5), check_bad_optimizer(t, &bad, "kind");
    bad = d, bad.schedule.warmup_start = -1, check_bad_optimizer(t, &bad, "warmup_start");
    bad = d, bad.schedule.low = (double)test_float(inf_bits), check_bad_optimizer(t, &bad, "low");
    bad = d, bad.schedule.start = (double)test_float(nan_bits), check_bad_optimizer(t, &bad, "start");
    d.schedule.kind = MPT_SCHEDULE_COSINE, bad = d, bad.schedule.steps = 0, check_bad_optimizer(t, &bad, "steps");
    d.schedule.kind = MPT_SCHEDULE_ONE_CYCLE;
    bad = d, bad.schedule.peak = 0.1, check_bad_optimizer(t, &bad, "peak"); /* is the first step */
    bad = d, bad.schedule.peak = 1, check_bad_optimizer(t, &bad, "peak");
    bad = d, bad.schedule.base_momentum = -0.1, check_bad_optimizer(t, &bad, "base_momentum");
    bad = d, bad.schedule.max_momentum = 1, check_bad_optimizer(t, &bad, "max_momentum");
}

/* Gradients to 0; what follows a step must have both arrays. */
static void test_zero_grad(mpt_context *ctx) {
    trainer t = trainer_new(ctx, MPT_BF16, MPT_MASTER_F32, NULL, NULL, 40, 4);
    const size_t n = mpt_params_count(t.params, 0);
    float *g = (float *)test_memory(n * sizeof *g), sum = 0;
    size_t i;
    test_floats(g, n, 1, 2, 3);
    CHECK_OK(ctx, mpt_upload(ctx, mpt_params_grad(t.params, 0), g, n * sizeof *g));
    CHECK_OK(ctx, mpt_params_zero_grad(t.params));
    CHECK_OK(ctx, mpt_download(ctx, g, mpt_params_grad(t.params, 0), n * sizeof *g));
    for (i = 0; i < n; i++) sum += g[i];
    CHECK_EQUAL(sum, 0);
    CHECK(mpt_params_zero_grad(NULL) == MPT_ERROR_ARGUMENT);
    CHECK_ERROR(ctx, mpt_optimizer_commit(t.opt, 1, NULL, g), MPT_ERROR_ARGUMENT, "pending");
    CHECK_ERROR(ctx, mpt_optimizer_commit(t.opt, 1, g, NULL), MPT_ERROR_ARGUMENT, "committed");
    CHECK(mpt_optimizer_commit(NULL, 0, NULL, NULL) == MPT_ERROR_ARGUMENT);
    free(g);
    trainer_free(&t);
}

static void test_optimizer_errors(mpt_context *ctx) {
    const double nan = (double)test_float(nan_bits);
    trainer t = trainer_new(ctx, MPT_F32, MPT_MASTER_F32, NULL, NULL, 4, 4);
    mpt_params *unbuilt = mpt_params_new(ctx, NULL);
    mpt_optimizer *more[MPT_OPTIMIZERS];
    mpt_optimizer_desc d;
    int i;
    d = mpt_sgd(0.1, 0), d.kind = (mpt_optimizer_kind)test_number(17), check_bad_optimizer(&t, &d, "kind");
    d = mpt_sgd(-0.1, 0), check_bad_optimizer(&t, &d, "lr");
    d = mpt_sgd(nan, 0), check_bad_optimizer(&t, &d, "lr");
    d = mpt_sgd(0.1, -1), check_bad_optimizer(&t, &d, "momentum");
    d = mpt_sgd(0.1, 0), d.nesterov = 1, check_bad_optimizer(&t, &d, "nesterov");
    d = mpt_sgd(0.1, 0.9), d.nesterov = 1, d.dampening = 0.1, check_bad_optimizer(&t, &d, "nesterov");
    d = mpt_sgd(0.1, 0), d.weight_decay = -1, check_bad_optimizer(&t, &d, "weight_decay");
    d = mpt_adam(0.1), d.beta1 = 1, check_bad_optimizer(&t, &d, "beta1");
    d = mpt_adam(0.1), d.beta2 = -0.1, check_bad_optimizer(&t, &d, "beta2");
    d = mpt_adam(0.1), d.eps = -1, check_bad_optimizer(&t, &d, "eps");
    d = mpt_adam(0.1), d.eps = 1e-60, check_bad_optimizer(&t, &d, "eps"); /* 0 in fp32: 0 / 0 */
    check_bad_schedules(&t);
    CHECK(mpt_optimizer_new(NULL, t.scaler, NULL) == NULL);
    CHECK(mpt_optimizer_new(t.params, NULL, NULL) == NULL);
    CHECK(mpt_optimizer_new(unbuilt, t.scaler, NULL) == NULL);
    test_check_reason(ctx, "built", __FILE__, __LINE__);
    for (i = 1; i < MPT_OPTIMIZERS; i++) CHECK((more[i] = mpt_optimizer_new(t.params, t.scaler, NULL)) != NULL);
    check_bad_optimizer(&t, NULL, "16");
    for (i = 1; i < MPT_OPTIMIZERS; i++) mpt_optimizer_free(more[i]);
    CHECK(mpt_unscale(NULL) == MPT_ERROR_ARGUMENT && mpt_step(NULL) == MPT_ERROR_ARGUMENT);
    CHECK(mpt_clip_norm(NULL, 1) == MPT_ERROR_ARGUMENT && mpt_optimizer_set_lr(NULL, 1) == MPT_ERROR_ARGUMENT);
    mpt_optimizer_free(NULL);
    mpt_params_free(unbuilt);
    trainer_free(&t);
}

static void test_moments(mpt_context *ctx) {
    mpt_optimizer_desc d = mpt_sgd(0.1, 0);
    trainer t = trainer_new(ctx, MPT_F32, MPT_MASTER_F32, &d, NULL, 4, 4);
    CHECK(mpt_optimizer_moment(t.opt, 1, 1) == NULL);
    trainer_free(&t);
    d = mpt_sgd(0.1, 0.5);
    t = trainer_new(ctx, MPT_F32, MPT_MASTER_F32, &d, NULL, 4, 4);
    CHECK(mpt_optimizer_moment(t.opt, 1, 2) == mpt_optimizer_moment(t.opt, 1, 0) + 16);
    CHECK(mpt_optimizer_moment(t.opt, 2, 1) == NULL);
    trainer_free(&t);
    t = trainer_new(ctx, MPT_F32, MPT_MASTER_F32, NULL, NULL, 4, 4); /* Adam */
    CHECK(mpt_optimizer_moment(t.opt, 2, 1) != NULL && mpt_optimizer_moment(t.opt, 1, 1) != NULL);
    CHECK(mpt_optimizer_moment(t.opt, 3, 1) == NULL && mpt_optimizer_moment(t.opt, 0, 1) == NULL);
    CHECK(mpt_optimizer_moment(t.opt, 1, 3) == NULL && mpt_optimizer_moment(t.opt, 1, -1) == NULL);
    trainer_free(&t);
}

/* ==== DESCRIPTORS ==== all zero means defaults, and fields that are set count */

static void check_filled(mpt_context *ctx, const mpt_optimizer_desc *given, const mpt_optimizer_desc *meant) {
    trainer t = trainer_new(ctx, MPT_F32, MPT_MASTER_F32, given, NULL, 4, 4);
    const mpt_optimizer_desc d = mpt_optimizer_get_desc(t.opt);
    CHECK(d.kind == meant->kind && d.nesterov == meant->nesterov && d.amsgrad == meant->amsgrad);
    CHECK_EQUAL(d.lr, meant->lr);
    CHECK_EQUAL(d.momentum, meant->momentum);
    CHECK_EQUAL(d.beta1, meant->beta1);
    CHECK_EQUAL(d.beta2, meant->beta2);
    CHECK_EQUAL(d.eps, meant->eps);
    CHECK_EQUAL(d.weight_decay, meant->weight_decay);
    trainer_free(&t);
}

static void test_filled(mpt_context *ctx) {
    const mpt_optimizer_desc zero = MPT_ZERO;
    mpt_optimizer_desc d = zero, meant = mpt_adam(1e-3);
    mpt_scaler *scaler;
    mpt_params *params;
    check_filled(ctx, NULL, &meant);
    check_filled(ctx, &d, &meant);
    d.lr = meant.lr = 0.1; /* without kind */
    check_filled(ctx, &d, &meant);
    d.weight_decay = meant.weight_decay = 0.5, d.beta1 = meant.beta1 = 0.8, d.amsgrad = meant.amsgrad = 1;
    check_filled(ctx, &d, &meant);
    d = zero, d.kind = MPT_ADAM, d.lr = 1e-2, meant = mpt_adam(1e-2);
    check_filled(ctx, &d, &meant);
    d.eps = meant.eps = 1e-6, d.beta1 = meant.beta1 = 0,
    d.beta2 = meant.beta2 = 0; /* eps is set: these mean themselves */
    check_filled(ctx, &d, &meant);
    d = zero, d.kind = MPT_ADAMW, meant = mpt_adamw(1e-3);
    check_filled(ctx, &d, &meant);
    d = meant = mpt_adamw(0), d.weight_decay = meant.weight_decay = 0;
    check_filled(ctx, &d, &meant);
    d = meant = mpt_sgd(0, 0.9);
    check_filled(ctx, &d, &meant);
    d = zero, d.momentum = 0.9; /* of no optimizer that has it */
    params = mpt_params_new(ctx, NULL);
    scaler = mpt_scaler_new(ctx, NULL);
    mpt_params_add(params, "w", 4, 0);
    CHECK_OK(ctx, mpt_params_build(params));
    CHECK(mpt_optimizer_new(params, scaler, &d) == NULL);
    test_check_reason(ctx, "momentum", __FILE__, __LINE__);
    mpt_scaler_free(scaler), mpt_params_free(params);
}

/* ==== STATES FROM OUTSIDE ==== */

static void check_scaler_state(mpt_context *ctx, mpt_scaler *scaler, const mpt_scaler_state *bad, const char *word) {
    mpt_scaler_state before, after;
    CHECK_OK(ctx, mpt_scaler_get_state(scaler, &before));
    CHECK_ERROR(ctx, mpt_scaler_set_state(scaler, bad), MPT_ERROR_ARGUMENT, word);
    CHECK_OK(ctx, mpt_scaler_get_state(scaler, &after));
    CHECK(memcmp(&before, &after, sizeof before) == 0);
}

/* Each member in turn: what the rule cannot go on from is refused, and the state stays. */
static void test_scaler_judge(mpt_context *ctx) {
    mpt_scaler_desc desc = MPT_ZERO;
    mpt_scaler *scaler;
    mpt_scaler_state s, start;
    int i;
    desc.no_min = 1, desc.hysteresis = 2;
    scaler = mpt_scaler_new(ctx, &desc);
    CHECK_OK(ctx, mpt_scaler_get_state(scaler, &start));
    for (i = 0; i < 4; i++) {
        static const uint32_t scales[] = {0x7fc00000u, 0xc0400000u, 0, 0x7f800000u}; /* NaN, -3, 0, inf */
        s = start, s.scale = test_float(scales[i]), check_scaler_state(ctx, scaler, &s, "scale");
        s.desc.unguarded = 1, s.desc.no_max = 1, check_scaler_state(ctx, scaler, &s, "scale");
    }
    s = start, s.growth_tracker = 0x7fffffff, check_scaler_state(ctx, scaler, &s, "growth_tracker");
    s = start, s.growth_tracker = 2000, check_scaler_state(ctx, scaler, &s, "growth_tracker");
    s = start, s.growth_tracker = -2, check_scaler_state(ctx, scaler, &s, "growth_tracker");
    s = start, s.hysteresis_left = -5, check_scaler_state(ctx, scaler, &s, "hysteresis_left");
    s = start, s.hysteresis_left = 3, check_scaler_state(ctx, scaler, &s, "hysteresis_left");
    s = start, s.stuck = -1, check_scaler_state(ctx, scaler, &s, "stuck");
    s = start, s.overflows = 1, check_scaler_state(ctx, scaler, &s, "overflows");
    s = start, s.growth_tracker = 1999, s.hysteresis_left = 0;
    CHECK_OK(ctx, mpt_scaler_set_state(scaler, &s));
    s.stuck = 0x7fffffff; /* stays there */
    s.desc.mode = MPT_SCALER_STATIC;
    mpt_scaler_rule(&s, 1);
    CHECK_EQUAL(s.stuck, 0x7fffffff);
    mpt_scaler_free(scaler);
}

static void check_optimizer_state(trainer *t, const mpt_optimizer_state *bad, const char *word) {
    const mpt_optimizer_state before = state_of(t);
    mpt_optimizer_state after;
    CHECK_ERROR(t->ctx, mpt_optimizer_set_state(t->opt, bad), MPT_ERROR_ARGUMENT, word);
    after = state_of(t);
    CHECK(memcmp(&before, &after, sizeof before) == 0);
}

static void test_optimizer_judge(mpt_context *ctx) {
    trainer t = trainer_new(ctx, MPT_F32, MPT_MASTER_F32, NULL, NULL, 10, 10);
    mpt_optimizer_state s, start;
    set_gradients(&t, 65536, 1);
    step(&t);
    start = state_of(&t);
    s = start, s.attempted = 5, check_optimizer_state(&t, &s, "attempts");
    s = start, s.skipped = (uint64_t)-1, s.applied = 2, check_optimizer_state(&t, &s, "attempts"); /* the sum wraps */
    s = start, s.beta1_power = (double)test_float(nan_bits), check_optimizer_state(&t, &s, "beta1_power");
    s = start, s.beta1_power = -0.5, check_optimizer_state(&t, &s, "beta1_power");
    s = start, s.beta2_power = 1.5, check_optimizer_state(&t, &s, "beta2_power");
    s = start, s.found = 7, check_optimizer_state(&t, &s, "found");
    s = start, s.scan.first = 3, check_optimizer_state(&t, &s, "tensor");
    s = start, s.journal[63].reason = 9, check_optimizer_state(&t, &s, "reason");
    s = start, s.journal[1].tensor = -1, check_optimizer_state(&t, &s, "tensor");
    s = start, s.inv_scale = (double)test_float(nan_bits), check_optimizer_state(&t, &s, "inv_scale");
    s = start, s.grad_norm = -1, check_optimizer_state(&t, &s, "grad_norm");
    CHECK_OK(ctx, mpt_optimizer_set_state(t.opt, &start));
    CHECK(!*mpt_why(ctx)); /* the reasons above are not taken for one of this call */
    step(&t);
    CHECK_EQUAL(state_of(&t).applied, 2);
    trainer_free(&t);
}

/* What lies between tensors in the flat array counts for nothing, be it NaN or large. */
static void test_padding(mpt_context *ctx) {
    static const uint32_t values[] = {0x7fc00000u, 0x7f800000u, 0x7f000000u};
    trainer t = trainer_new(ctx, MPT_F32, MPT_MASTER_F32, NULL, NULL, 5000, 37);
    const size_t offset = (size_t)(mpt_params_grad(t.params, 2) - mpt_params_grad(t.params, 0));
    float *all = (float *)test_memory(t.total * sizeof *all);
    mpt_optimizer_state clean, s;
    size_t i;
    int round;
    set_gradients(&t, 65536, 1);
    CHECK_OK(ctx, mpt_unscale(t.opt));
    clean = state_of(&t);
    step(&t);
    CHECK(offset > 5000 && t.total > offset + 37);
    CHECK_OK(ctx, mpt_download(ctx, all, mpt_params_grad(t.params, 0), t.total * sizeof *all));
    for (round = 0; round < 3; round++) {
        for (i = 0; i < t.total; i++)
            if ((i >= 5000 && i < offset) || i >= offset + 37) all[i] = test_float(values[round]);
        CHECK_OK(ctx, mpt_upload(ctx, mpt_params_grad(t.params, 0), all, t.total * sizeof *all));
        CHECK_OK(ctx, mpt_unscale(t.opt));
        s = state_of(&t);
        CHECK_EQUAL(s.found, 0);
        CHECK_EQUAL(s.scan.inf + s.scan.nan, 0);
        CHECK_EQUAL(s.grad_norm, clean.grad_norm);
        step(&t);
        CHECK_EQUAL(state_of(&t).applied, round + 2);
    }
    set_gradient(&t, 2, 36, test_float(nan_bits)); /* the last of a tensor counts */
    step(&t);
    CHECK_EQUAL(state_of(&t).skipped, 1);
    CHECK_EQUAL(state_of(&t).scan.first, 2);
    CHECK_EQUAL(state_of(&t).scan.nan, 1);
    free(all);
    trainer_free(&t);
}

/* ==== SKIPPED STEPS ==== */

/* Two clean steps, then one with inf and NaN in the given places, then a clean one. */
static void test_skip(mpt_context *ctx, const mpt_optimizer_desc *d, mpt_dtype type, mpt_master master) {
    trainer t = trainer_new(ctx, type, master, d, NULL, 300, 50);
    mpt_optimizer_state before, now;
    snapshot kept;
    int i;
    set_weights(&t, 1);
    for (i = 0; i < 2; i++) {
        set_gradients(&t, 65536, (uint64_t)i);
        step(&t);
    }
    before = state_of(&t);
    kept = take(&t);
    set_gradient(&t, 2, 49, test_float(nan_bits));
    set_gradient(&t, 2, 7, test_float(inf_bits | 0x80000000u));
    CHECK_OK(ctx, mpt_unscale(t.opt));
    now = state_of(&t);
    CHECK_EQUAL(now.found, 1);
    CHECK_EQUAL(now.scan.first, 2);
    CHECK_EQUAL(now.scan.inf, 1);
    CHECK_EQUAL(now.scan.nan, 1);
    CHECK_OK(ctx, mpt_clip_norm(t.opt, 1));
    step(&t);
    CHECK(same(kept, take(&t)));
    now = state_of(&t);
    CHECK_EQUAL(now.attempted, 3);
    CHECK_EQUAL(now.applied, 2);
    CHECK_EQUAL(now.skipped, 1);
    CHECK(memcmp(&now.beta1_power, &before.beta1_power, sizeof(double)) == 0);
    CHECK(memcmp(&now.beta2_power, &before.beta2_power, sizeof(double)) == 0);
    CHECK_EQUAL(now.journal[0].step, 3);
    CHECK_EQUAL(now.journal[0].scale, 65536);
    CHECK_EQUAL(now.journal[0].tensor, 2);
    CHECK_EQUAL(now.journal[0].inf, 1);
    CHECK_EQUAL(now.journal[0].nan, 1);
    CHECK_EQUAL(now.journal[0].reason, MPT_SKIP_GRADIENT);
    CHECK_EQUAL(mpt_scaler_scale(t.scaler), 32768);
    set_gradients(&t, 32768, 3);
    kept = take(&t);
    step(&t);
    CHECK(!same(kept, take(&t)));
    CHECK_EQUAL(state_of(&t).applied, 3);
    CHECK_EQUAL(state_of(&t).found, 0);
    trainer_free(&t);
}

static void test_skips(mpt_context *ctx) {
    int i;
    for (i = 0; i < VARIANTS; i++) {
        const mpt_optimizer_desc d = variant(i);
        test_skip(ctx, &d, MPT_F32, MPT_MASTER_F32);
        test_skip(ctx, &d, MPT_F16, MPT_MASTER_F32);
        test_skip(ctx, &d, MPT_BF16, MPT_MASTER_NONE);
    }
}

/* More skips than the journal holds: number i is in place i % 64. */
static void test_journal(mpt_context *ctx) {
    mpt_scaler_desc scaler = MPT_ZERO;
    mpt_optimizer_state s;
    trainer t;
    int i;
    scaler.no_min = 1; /* 100 halvings */
    t = trainer_new(ctx, MPT_F32, MPT_MASTER_F32, NULL, &scaler, 10, 10);
    for (i = 0; i < 100; i++) {
        set_gradients(&t, 1e-6, 1);
        set_gradient(&t, 1, 4, test_float(inf_bits));
        if (i % 2) set_gradient(&t, 1, 5, test_float(inf_bits));
        step(&t);
    }
    s = state_of(&t);
    CHECK_EQUAL(s.skipped, 100);
    CHECK_EQUAL(s.applied, 0);
    for (i = 100 - MPT_JOURNAL; i < 100; i++) {
        const mpt_skip *skip = &s.journal[i % MPT_JOURNAL];
        CHECK_EQUAL(skip->step, i + 1);
        CHECK_EQUAL(skip->scale, ldexp(1, 16 - i));
        CHECK_EQUAL(skip->tensor, 1);
        CHECK_EQUAL(skip->inf, 1 + i % 2);
        CHECK_EQUAL(skip->nan, 0);
    }
    trainer_free(&t);
}

/* Overflows without end at the smallest scale: an error that names the tensor, from the patience-th on, and the update
   is done all the same. A clean step begins anew. */
static void test_divergence(mpt_context *ctx, mpt_scaler_mode mode) {
    mpt_scaler_desc scaler = MPT_ZERO;
    trainer t;
    int i;
    scaler.mode = mode;
    scaler.init_scale = 4;
    scaler.patience = 3;
    t = trainer_new(ctx, MPT_BF16, MPT_MASTER_F32, NULL, &scaler, 10, 10);
    for (i = mode == MPT_SCALER_DYNAMIC ? -2 : 0; i < 5; i++) { /* 4, 2, then the smallest */
        set_gradient(&t, 2, 1, test_float(nan_bits));
        CHECK_OK(ctx, mpt_step(t.opt));
        if (i < 2) CHECK_OK(ctx, mpt_scaler_update(t.scaler));
        else CHECK_ERROR(ctx, mpt_scaler_update(t.scaler), MPT_ERROR_DIVERGED, "bias");
    }
    set_gradients(&t, 1, 1);
    step(&t);
    set_gradient(&t, 1, 1, test_float(nan_bits));
    step(&t);
    CHECK_EQUAL(state_of(&t).skipped, mode == MPT_SCALER_DYNAMIC ? 8 : 6);
    trainer_free(&t);
}

/* No scale from which nothing comes back, but by a system's own rule: then every update is an error until it is set. */
static void test_dead_scale(mpt_context *ctx) {
    mpt_scaler_desc scaler = MPT_ZERO;
    mpt_result r = MPT_OK;
    trainer t;
    int i;
    scaler.no_min = 1;
    t = trainer_new(ctx, MPT_F32, MPT_MASTER_F32, NULL, &scaler, 10, 10);
    for (i = 0; i < 200 && r == MPT_OK; i++) {
        set_gradient(&t, 2, 4, test_float(inf_bits));
        CHECK_OK(ctx, mpt_step(t.opt));
        r = mpt_scaler_update(t.scaler);
    }
    CHECK(r == MPT_ERROR_DIVERGED && i == 142 + 10); /* 142 halvings, and the patience */
    test_check_reason(ctx, "bias", __FILE__, __LINE__);
    set_gradients(&t, 0, 1);
    step(&t);
    CHECK_EQUAL(state_of(&t).applied, 1);
    trainer_free(&t);
    scaler.no_max = scaler.unguarded = 1, scaler.growth_interval = 1;
    t = trainer_new(ctx, MPT_F32, MPT_MASTER_F32, NULL, &scaler, 10, 10);
    for (i = 0, r = MPT_OK; i < 200 && r == MPT_OK; i++) {
        set_gradients(&t, 0, 1);
        CHECK_OK(ctx, mpt_step(t.opt));
        r = mpt_scaler_update(t.scaler);
    }
    CHECK(r == MPT_ERROR_DIVERGED && i == 112);
    test_check_reason(ctx, "inf", __FILE__, __LINE__);
    CHECK_OK(ctx, mpt_step(t.opt));
    CHECK_ERROR(ctx, mpt_scaler_update(t.scaler), MPT_ERROR_DIVERGED, "mpt_scaler_set_scale");
    CHECK_OK(ctx, mpt_scaler_set_scale(t.scaler, 1024));
    step(&t);
    trainer_free(&t);
}

/* lr times low once per step: by squaring, so that a run of any length costs no more. Each squaring doubles the
   relative error, so that the k-th power has at most 2 k roundings. */
static void test_schedule_power(void) {
    mpt_schedule s = MPT_ZERO;
    double chain = 1;
    uint64_t k;
    s.kind = MPT_SCHEDULE_STEP, s.steps = 3, s.low = 0.9995;
    for (k = 0; k < 3000; k++, chain *= s.low)
        CHECK_NEAR(mpt_schedule_factor(&s, 3 * k + k % 3), chain, 4 * ldexp((double)(k + 1), -53) * chain);
    s.low = 1;
    CHECK_EQUAL(mpt_schedule_factor(&s, (uint64_t)-1), 1); /* 64 squarings, not 6e18 products */
    s.steps = 0;                                           /* no division by it */
    CHECK_EQUAL(mpt_schedule_factor(&s, 12345), 1);
    s.low = 0.5;
    CHECK_EQUAL(mpt_schedule_factor(&s, 3), 0.125);
}

/* A scale so small that 1 / scale is inf in fp32 must not make NaN of zeros. */
static void test_tiny_scale(mpt_context *ctx) {
    const volatile float tiny = test_float(0x00000001u); /* 2^-149 */
    mpt_scaler_desc scaler = MPT_ZERO;
    snapshot kept;
    trainer t;
    if (!(tiny > 0)) { /* -Ofast lets the CPU take it for 0; then no scale is that small */
        test_counts.skipped++;
        return;
    }
    scaler.no_min = 1;
    t = trainer_new(ctx, MPT_F32, MPT_MASTER_F32, NULL, &scaler, 10, 10);
    set_weights(&t, 1);
    CHECK_OK(ctx, mpt_scaler_set_scale(t.scaler, tiny));
    kept = take(&t);
    step(&t);
    CHECK(same(kept, take(&t)));
    CHECK_EQUAL(state_of(&t).skipped, 1);
    trainer_free(&t);
}

/* Finite gradients whose norm fp32 cannot hold would make the clip factor 0: skipped as well. */
static void test_huge_norm(mpt_context *ctx) {
    const mpt_optimizer_desc sgd = mpt_sgd(1e-3, 0);
    const float huge = 3e38f;
    trainer t;
    snapshot kept;
    mpt_scaler_desc off = MPT_ZERO;
    off.mode = MPT_SCALER_OFF;
    t = trainer_new(ctx, MPT_F32, MPT_MASTER_F32, &sgd, &off, 10, 10);
    set_weights(&t, 1);
    kept = take(&t);
    set_gradient(&t, 1, 0, huge), set_gradient(&t, 2, 9, huge);
    CHECK_OK(ctx, mpt_unscale(t.opt));
    CHECK_OK(ctx, mpt_clip_norm(t.opt, 1));
    step(&t);
    CHECK(same(kept, take(&t)));
    CHECK_EQUAL(state_of(&t).skipped, 1);
    set_gradient(&t, 1, 0, 0); /* one of them alone fits */
    step(&t);
    CHECK_EQUAL(state_of(&t).applied, 1);
    trainer_free(&t);
}

/* Gradients that would make a moment inf, for ever: the step is skipped; as the scale is not to blame it stays, and in
   the end it is told. Clipping saves the step. */
static void test_huge_moments(mpt_context *ctx, const mpt_optimizer_desc *d, float fits, float huge) {
    mpt_scaler_desc scaler = MPT_ZERO;
    mpt_optimizer_state s;
    snapshot kept;
    trainer t;
    float m = 0;
    int i, moment;
    scaler.init_scale = 1, scaler.patience = 3;
    t = trainer_new(ctx, MPT_F32, MPT_MASTER_F32, d, &scaler, 10, 10);
    set_weights(&t, 1);
    kept = take(&t);
    set_gradients(&t, 0, 1);
    set_gradient(&t, 2, 3, huge);
    for (i = 1; i <= 4; i++) {
        CHECK_OK(ctx, mpt_step(t.opt));
        if (i < 3) CHECK_OK(ctx, mpt_scaler_update(t.scaler));
        else CHECK_ERROR(ctx, mpt_scaler_update(t.scaler), MPT_ERROR_DIVERGED, "moment");
    }
    CHECK(same(kept, take(&t)));
    s = state_of(&t);
    CHECK_EQUAL(s.skipped, 4);
    CHECK_EQUAL(s.journal[0].reason, MPT_SKIP_MOMENT);
    CHECK_EQUAL(mpt_scaler_scale(t.scaler), 1);
    CHECK_OK(ctx, mpt_unscale(t.opt));
    CHECK_EQUAL(state_of(&t).found, MPT_SKIP_MOMENT);
    CHECK_OK(ctx, mpt_clip_norm(t.opt, 1));
    CHECK_EQUAL(state_of(&t).found, MPT_SKIP_NONE);
    step(&t);
    set_gradient(&t, 2, 3, fits);
    for (i = 0; i < 300; i++) step(&t); /* the moments reach their largest */
    CHECK_EQUAL(state_of(&t).applied, 301);
    for (moment = 1; moment <= 3 && mpt_optimizer_moment(t.opt, moment, 2); moment++) {
        CHECK_OK(ctx, mpt_download(ctx, &m, mpt_optimizer_moment(t.opt, moment, 2) + 3, sizeof m));
        CHECK(test_is_finite((double)m) && (m > 1 || m < -1));
    }
    trainer_free(&t);
}

/* Moments that shrink do not stay among the subnormals: 0, on every device. Zero gradients let them shrink. */
static void test_small_moments(mpt_context *ctx, const mpt_optimizer_desc *d) {
    trainer t = trainer_new(ctx, MPT_F32, MPT_MASTER_F32, d, NULL, 37, 10);
    float m[37];
    int i, j, moment;
    set_weights(&t, 1);
    set_gradients(&t, 1e-13, 1);
    step(&t);
    set_gradients(&t, 0, 1);
    for (i = 0; i < 1200; i++) {
        step(&t);
        if (i % 100) continue;
        for (moment = 1; moment <= 2 && mpt_optimizer_moment(t.opt, moment, 1); moment++) {
            CHECK_OK(ctx, mpt_download(ctx, m, mpt_optimizer_moment(t.opt, moment, 1), sizeof m));
            for (j = 0; j < 37; j++)
                CHECK((test_bits(m[j]) & 0x7f800000u) != 0 || (test_bits(m[j]) & 0x7fffffffu) == 0);
        }
    }
    CHECK_OK(ctx, mpt_download(ctx, m, mpt_optimizer_moment(t.opt, 1, 1), sizeof m));
    for (j = 0; j < 37; j++) CHECK_EQUAL(m[j], 0);
    trainer_free(&t);
}

static void test_moment_limits(mpt_context *ctx) {
    mpt_optimizer_desc d = mpt_adam(1e-3);
    test_huge_moments(ctx, &d, 9e18f, 1e22f);
    test_small_moments(ctx, &d);
    d.amsgrad = 1, d.weight_decay = 0;
    test_huge_moments(ctx, &d, 9e18f, 1e22f);
    d = mpt_adamw(1e-3);
    test_huge_moments(ctx, &d, 9e18f, 3e38f);
    d.beta1 = 0.4;
    test_small_moments(ctx, &d);
    d = mpt_sgd(1e-3, 0.9);
    test_huge_moments(ctx, &d, 2e36f, 1e38f);
    test_small_moments(ctx, &d);
    d.nesterov = 1;
    test_huge_moments(ctx, &d, 2e36f, 1e38f);
}

/* ==== CLIPPING ==== */

/* Gradients 3 and 4, times the scale: norm 5. The scale is a power of two and the sum of squares exact, so only the
   root and the factor round: norm, norm + 1e-6, its inverse, the product, all at most to fp32, in which PyTorch
   computes. */
static void test_clip(mpt_context *ctx) {
    trainer t = trainer_new(ctx, MPT_F32, MPT_MASTER_F32, NULL, NULL, 2, 1);
    const double nan = (double)test_float(nan_bits);
    mpt_optimizer_state s;
    set_gradient(&t, 1, 1, 3 * 65536.0f);
    set_gradient(&t, 2, 0, -4 * 65536.0f);
    CHECK_OK(ctx, mpt_unscale(t.opt));
    s = state_of(&t);
    CHECK_NEAR(s.grad_norm, 5, 5 * ldexp(1, -52));
    CHECK_EQUAL(s.clip, 1);
    CHECK_EQUAL(s.inv_scale, ldexp(1, -16));
    CHECK_NEAR(s.scan.sum_squares, ldexp(25, 32), 0);
    CHECK_ERROR(ctx, mpt_clip_norm(t.opt, -1), MPT_ERROR_ARGUMENT, "max_norm");
    CHECK_ERROR(ctx, mpt_clip_norm(t.opt, nan), MPT_ERROR_ARGUMENT, "max_norm");
    CHECK_OK(ctx, mpt_clip_norm(t.opt, 6)); /* not needed */
    CHECK_EQUAL(state_of(&t).clip, 1);
    step(&t);
    CHECK_OK(ctx, mpt_unscale(t.opt));
    CHECK_EQUAL(state_of(&t).clip, 1);
    CHECK_OK(ctx, mpt_clip_norm(t.opt, 0.5));
    CHECK_NEAR(state_of(&t).clip, 0.5 / (5 + 1e-6), 4 * ldexp(0.1, -24));
    step(&t);
    CHECK_OK(ctx, mpt_unscale(t.opt)); /* a new check begins with factor 1 */
    CHECK_EQUAL(state_of(&t).clip, 1);
    trainer_free(&t);
}

/* ==== ORDER ==== */

typedef enum action { UNSCALE, CLIP, STEP, UPDATE } action;

static mpt_result act(trainer *t, action a) {
    switch (a) {
    case UNSCALE: return mpt_unscale(t->opt);
    case CLIP: return mpt_clip_norm(t->opt, 1);
    case STEP: return mpt_step(t->opt);
    default: return mpt_scaler_update(t->scaler);
    }
}

/* After the calls in `done` (letters u c s d) exactly those in `allowed` may follow. The others return an error, with a
   reason that names the call, and change nothing. */
static void check_order(mpt_context *ctx, const char *done, const char *allowed) {
    static const char letters[] = "ucsd";
    static const char *const names[] = {"unscale", "clip_norm", "step", "scaler_update"};
    int next;
    for (next = UNSCALE; next <= UPDATE; next++) {
        trainer t = trainer_new(ctx, MPT_F16, MPT_MASTER_F32, NULL, NULL, 20, 20);
        const char *c;
        set_weights(&t, 1);
        set_gradients(&t, 65536, 2);
        for (c = done; *c; c++) CHECK_OK(ctx, act(&t, (action)(strchr(letters, *c) - letters)));
        if (strchr(allowed, letters[next])) {
            CHECK_OK(ctx, act(&t, (action)next));
        } else {
            const snapshot kept = take(&t);
            const mpt_optimizer_state before = state_of(&t);
            mpt_optimizer_state now;
            mpt_scaler_state scaler, later;
            CHECK_OK(ctx, mpt_scaler_get_state(t.scaler, &scaler));
            CHECK_ERROR(ctx, act(&t, (action)next), MPT_ERROR_ORDER, names[next]);
            CHECK_OK(ctx, mpt_scaler_get_state(t.scaler, &later));
            now = state_of(&t);
            CHECK(same(kept, take(&t)));
            CHECK(memcmp(&before, &now, sizeof now) == 0);
            CHECK(memcmp(&scaler, &later, sizeof later) == 0);
        }
        trainer_free(&t);
    }
}

static void test_order(mpt_context *ctx) {
    check_order(ctx, "", "us");
    check_order(ctx, "u", "cs");
    check_order(ctx, "us", "d");
    check_order(ctx, "s", "d");
    check_order(ctx, "ucs", "d");
    check_order(ctx, "usd", "us");
    check_order(ctx, "sd", "us");
}

/* ==== SEVERAL OPTIMIZERS, ONE SCALER ==== */

static void test_several(mpt_context *ctx) {
    mpt_optimizer_desc sgd = mpt_sgd(0.1, 0.9);
    trainer a = trainer_new(ctx, MPT_F16, MPT_MASTER_F32, NULL, NULL, 40, 40), b = a;
    mpt_params *params = mpt_params_new(ctx, NULL);
    snapshot kept_a, kept_b;
    mpt_params_add(params, "only", 70, 0);
    mpt_params_add(params, "other", 7, 0);
    CHECK_OK(ctx, mpt_params_build(params));
    b.params = params, b.count[1] = 70, b.count[2] = 7, b.total = mpt_params_count(params, 0);
    b.opt = mpt_optimizer_new(params, a.scaler, &sgd);
    set_weights(&a, 1), set_weights(&b, 2);
    set_gradients(&a, 65536, 3), set_gradients(&b, 65536, 4);
    set_gradient(&b, 1, 69, test_float(inf_bits));
    kept_a = take(&a), kept_b = take(&b);
    CHECK_OK(ctx, mpt_unscale(a.opt));
    CHECK_OK(ctx, mpt_unscale(b.opt));
    CHECK_OK(ctx, mpt_step(a.opt));
    CHECK_ERROR(ctx, mpt_scaler_update(a.scaler), MPT_ERROR_ORDER, "unscaled"); /* b is in the middle of its step */
    CHECK_OK(ctx, mpt_step(b.opt));
    CHECK_OK(ctx, mpt_scaler_update(a.scaler));
    CHECK(!same(kept_a, take(&a))); /* each skips for itself */
    CHECK(same(kept_b, take(&b)));
    CHECK_EQUAL(mpt_scaler_scale(a.scaler), 32768); /* one back-off for both */
    kept_b = take(&b);
    set_gradient(&a, 1, 0, test_float(inf_bits));
    step(&a); /* one of them alone may step */
    CHECK(same(kept_b, take(&b)));
    CHECK_EQUAL(mpt_scaler_scale(a.scaler), 16384);
    CHECK_EQUAL(state_of(&b).attempted, 1);
    mpt_optimizer_free(b.opt);
    mpt_params_free(params);
    set_gradients(&a, 16384, 5);
    step(&a);
    CHECK_EQUAL(state_of(&a).applied, 2);
    trainer_free(&a);
}

/* ==== SAVE AND RESTORE ==== */

static void run_steps(trainer *t, int from, int to) {
    int i;
    for (i = from; i < to; i++) {
        set_gradients(t, (double)mpt_scaler_scale(t->scaler), (uint64_t)(100 * i));
        if (i % 4 == 3) set_gradient(t, 1, 2, test_float(inf_bits));
        step(t);
    }
}

static void copy_floats(trainer *from, trainer *to, const float *source, float *target) {
    float *x = (float *)test_memory(from->total * sizeof *x);
    CHECK_OK(from->ctx, mpt_download(from->ctx, x, source, from->total * sizeof *x));
    CHECK_OK(to->ctx, mpt_upload(to->ctx, target, x, from->total * sizeof *x));
    free(x);
}

/* Weights, moments and the two states, carried to a new trainer in the middle: it ends with the same bits. */
static void test_restore(mpt_context *ctx, const mpt_optimizer_desc *d) {
    trainer a = trainer_new(ctx, MPT_BF16, MPT_MASTER_F32, d, NULL, 60, 60);
    trainer b = trainer_new(ctx, MPT_BF16, MPT_MASTER_F32, d, NULL, 60, 60);
    mpt_optimizer_state s, s2;
    mpt_scaler_state scaler;
    float *x = (float *)test_memory(a.total * sizeof *x);
    int moment;
    set_weights(&a, 1);
    run_steps(&a, 0, 6);
    CHECK_OK(ctx, mpt_params_get(a.params, 0, x));
    CHECK_OK(ctx, mpt_params_set(b.params, 0, x));
    for (moment = 1; moment <= 2; moment++) {
        if (!mpt_optimizer_moment(a.opt, moment, 0)) continue;
        copy_floats(&a, &b, mpt_optimizer_moment(a.opt, moment, 0), mpt_optimizer_moment(b.opt, moment, 0));
    }
    s = state_of(&a);
    CHECK_OK(ctx, mpt_optimizer_set_state(b.opt, &s));
    CHECK_OK(ctx, mpt_scaler_get_state(a.scaler, &scaler));
    CHECK_OK(ctx, mpt_scaler_set_state(b.scaler, &scaler));
    run_steps(&a, 6, 12);
    run_steps(&b, 6, 12);
    CHECK(same(take(&a), take(&b)));
    s = state_of(&a), s2 = state_of(&b);
    CHECK(memcmp(&s, &s2, sizeof s) == 0);
    s2.version = 99;
    CHECK_ERROR(ctx, mpt_optimizer_set_state(b.opt, &s2), MPT_ERROR_UNSUPPORTED, "version");
    CHECK_ERROR(ctx, mpt_optimizer_set_state(b.opt, NULL), MPT_ERROR_ARGUMENT, "state");
    CHECK_ERROR(ctx, mpt_optimizer_get_state(b.opt, NULL), MPT_ERROR_ARGUMENT, "NULL");
    free(x);
    trainer_free(&a), trainer_free(&b);
}

/* ==== THREADS ==== */

static snapshot trained(int threads, const mpt_optimizer_desc *d, mpt_dtype type, mpt_optimizer_state *state) {
    mpt_context *ctx = test_open_threads(threads);
    trainer t = trainer_new(ctx, type, MPT_MASTER_F32, d, NULL, 300001, 1001);
    snapshot s;
    int i;
    set_weights(&t, 1);
    for (i = 0; i < 3; i++) {
        set_gradients(&t, 65536, (uint64_t)(10 * i));
        CHECK_OK(ctx, mpt_unscale(t.opt));
        CHECK_OK(ctx, mpt_clip_norm(t.opt, 10));
        step(&t);
    }
    s = take(&t);
    *state = state_of(&t);
    trainer_free(&t);
    mpt_close(ctx);
    return s;
}

static void test_threads(const mpt_optimizer_desc *d, mpt_dtype type) {
    mpt_optimizer_state one, many;
    int threads;
    for (threads = 2; threads <= 4; threads *= 2) {
        const snapshot first = trained(1, d, type, &one), other = trained(threads, d, type, &many);
        CHECK(same(first, other));
        CHECK(memcmp(&one, &many, sizeof one) == 0);
    }
}

/* The cosine is as good as libm's: half a unit of 1 in its own series, half in the sum, and libm's own. */
static void test_cosine(void) {
    const double pi = 3.14159265358979323846;
    mpt_schedule s = MPT_ZERO;
    uint64_t i;
    s.kind = MPT_SCHEDULE_COSINE, s.steps = 1000;
    for (i = 0; i <= 1000; i++)
        CHECK_NEAR(mpt_schedule_factor(&s, i), 0.5 + 0.5 * cos(pi * (double)i / 1000), ldexp(1.5, -52));
}

int main(int argc, char **argv) {
    mpt_context *ctx = test_open_threads(2);
    const mpt_optimizer_desc sgd = variant(4), adam = variant(6), adamw = variant(9);
    test_begin(argc, argv);
    RUN_TEST(test_cosine());
    RUN_TEST(test_scaler_traces());
    RUN_TEST(test_scaler_limits());
    RUN_TEST(test_scaler_modes());
    RUN_TEST(test_scaler_defaults());
    RUN_TEST(test_scaler_errors(ctx));
    RUN_TEST(test_scaler_state(ctx));
    RUN_TEST(test_params_layout(ctx, MPT_F32, MPT_MASTER_F32));
    RUN_TEST(test_params_layout(ctx, MPT_F32, MPT_MASTER_NONE));
    RUN_TEST(test_params_layout(ctx, MPT_F16, MPT_MASTER_F32));
    RUN_TEST(test_params_layout(ctx, MPT_BF16, MPT_MASTER_NONE));
    RUN_TEST(test_params_errors(ctx));
    RUN_TEST(test_inits(ctx));
    RUN_TEST(test_golden(ctx));
    RUN_TEST(test_formulas(ctx));
    RUN_TEST(test_groups(ctx, &sgd));
    RUN_TEST(test_groups(ctx, &adamw));
    RUN_TEST(test_optimizer_errors(ctx));
    RUN_TEST(test_zero_grad(ctx));
    RUN_TEST(test_moments(ctx));
    RUN_TEST(test_skips(ctx));
    RUN_TEST(test_journal(ctx));
    RUN_TEST(test_moment_limits(ctx));
    RUN_TEST(test_dead_scale(ctx));
    RUN_TEST(test_filled(ctx));
    RUN_TEST(test_scaler_judge(ctx));
    RUN_TEST(test_optimizer_judge(ctx));
    RUN_TEST(test_padding(ctx));
    RUN_TEST(test_schedule_power());
    RUN_TEST(test_divergence(ctx, MPT_SCALER_DYNAMIC));
    RUN_TEST(test_divergence(ctx, MPT_SCALER_STATIC));
    RUN_TEST(test_divergence(ctx, MPT_SCALER_OFF));
    RUN_TEST(test_tiny_scale(ctx));
    RUN_TEST(test_huge_norm(ctx));
    RUN_TEST(test_clip(ctx));
    RUN_TEST(test_order(ctx));
    RUN_TEST(test_several(ctx));
    RUN_TEST(test_restore(ctx, &sgd));
    RUN_TEST(test_restore(ctx, &adam));
    mpt_close(ctx);
    RUN_TEST(test_threads(&sgd, MPT_F16));
    RUN_TEST(test_threads(&adam, MPT_F32));
    RUN_TEST(test_threads(&adamw, MPT_BF16));
    return test_finish("training");
}
