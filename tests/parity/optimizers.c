/* optimizers.c - SGD, Adam, AdamW, clipping and the loss scaler against PyTorch.

   The values are PyTorch's own, written by make_golden.py; run from the top of the repository. Every case makes 20
   attempts with given gradients, NaN in the 1st, inf in the 3rd and 9th, and runs twice: each attempt from PyTorch's
   parameters and moments, so that a step stands alone, and on from our own, so that nothing may build up.

   Tolerances. SGD and all moments: none, every operation is PyTorch's with its rounding. Adam's parameters: PyTorch's
   square root on the CPU is MKL's, which may be the neighbour of the correctly rounded one. That moves the update by a
   few of its last places; 2 ulp of the largest number in the last sum, p - update, are allowed. Where a case was made
   with a correctly rounded root, there is no tolerance either. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include <inttypes.h>

enum { TENSORS = 3, ELEMENTS = 41, ATTEMPTS = 20, MOMENTS = 3 };

static const size_t sizes[TENSORS] = {7, 33, 1};
static const unsigned groups[TENSORS] = {MPT_GROUP_WEIGHT, MPT_GROUP_BIAS, MPT_GROUP_NORM};

/* ==== GOLDEN FILES ==== */

typedef struct input { /* of one attempt, and what the scaler makes of it */
    float scale, norm, scale_after;
    int found, tracker;
    float grad[ELEMENTS]; /* scaled */
} input;

typedef struct inputs {
    mpt_scaler_desc scaler;
    float param[ELEMENTS];
    input attempt[ATTEMPTS];
} inputs;

typedef struct outcome { /* of one attempt */
    int applied;
    double lr, clip;
    float param[ELEMENTS], moment[MOMENTS][ELEMENTS];
} outcome;

typedef struct golden {
    const char *name;
    mpt_optimizer_desc desc;
    int moments, exact; /* exact: no square root of MKL's in it */
    int one_cycle;      /* lr follows the schedule, and is not set */
    double clip_norm, clip_value, group_lr_factor, group_weight_decay;
    outcome attempt[ATTEMPTS];
} golden;

static FILE *open_golden(const char *name) {
    char path[128];
    FILE *file;
    snprintf(path, sizeof path, "tests/parity/golden/%s.txt", name);
    file = fopen(path, "r");
    if (!file || fscanf(file, "#%*[^\n]") != 0) {
        printf("%s: cannot be read\n", path);
        exit(1);
    }
    return file;
}

/* The next word, which must be this one. */
static void read_key(FILE *file, const char *key) {
    char word[32] = "";
    if (fscanf(file, "%31s", word) != 1 || strcmp(word, key) != 0) {
        printf("golden file: \"%s\" where \"%s\" belongs\n", word, key);
        exit(1);
    }
}

static double read_number(FILE *file, const char *key) {
    double value = 0;
    read_key(file, key);
    CHECK(fscanf(file, "%lf", &value) == 1);
    return value;
}

static int read_int(FILE *file, const char *key) { return (int)read_number(file, key); }

static void read_floats(FILE *file, const char *key, float *out, size_t count) {
    uint32_t bits = 0;
    size_t i, read = 0;
    read_key(file, key);
    for (i = 0; i < count; i++) {
        read += fscanf(file, "%8" SCNx32, &bits) == 1;
        out[i] = test_float(bits);
    }
    CHECK_EQUAL(read, count);
}

static float read_float(FILE *file, const char *key) {
    float x;
    read_floats(file, key, &x, 1);
    return x;
}

/* GradScaler's four numbers. It knows neither a smallest nor a largest scale. */
static mpt_scaler_desc read_scaler(FILE *file) {
    mpt_scaler_desc d = MPT_ZERO;
    d.init_scale = (float)read_number(file, "init_scale");
    d.growth_factor = (float)read_number(file, "growth_factor");
    d.backoff_factor = (float)read_number(file, "backoff_factor");
    d.growth_interval = read_int(file, "growth_interval");
    d.mode = MPT_SCALER_DYNAMIC;
    d.max_scale = test_float(0x7f7fffffu);
    d.no_min = 1;
    return d;
}

static inputs *read_inputs(void) {
    inputs *in = (inputs *)test_memory(sizeof *in);
    FILE *file = open_golden("inputs");
    int i;
    CHECK_EQUAL(read_int(file, "tensors"), TENSORS);
    CHECK_EQUAL(read_int(file, "elements"), ELEMENTS);
    CHECK_EQUAL(read_int(file, "attempts"), ATTEMPTS);
    in->scaler = read_scaler(file);
    read_floats(file, "param", in->param, ELEMENTS);
    for (i = 0; i < ATTEMPTS; i++) {
        input *a = &in->attempt[i];
        CHECK_EQUAL(read_int(file, "attempt"), i + 1);
        a->scale = read_float(file, "scale");
        a->found = read_int(file, "found");
        a->norm = read_float(file, "norm");
        a->scale_after = read_float(file, "scale_after");
        a->tracker = read_int(file, "tracker");
        read_floats(file, "grad", a->grad, ELEMENTS);
    }
    fclose(file);
    return in;
}

static mpt_optimizer_kind read_kind(FILE *file) {
    char word[8] = "";
    read_key(file, "kind");
    CHECK(fscanf(file, "%7s", word) == 1);
    return strcmp(word, "sgd") == 0 ? MPT_SGD : strcmp(word, "adam") == 0 ? MPT_ADAM : MPT_ADAMW;
}

/* torch.optim.lr_scheduler.OneCycleLR's defaults */
static mpt_schedule one_cycle(uint64_t steps) {
    mpt_schedule s = MPT_ZERO;
    s.kind = MPT_SCHEDULE_ONE_CYCLE;
    s.steps = steps;
    s.peak = 0.3;
    s.start = 1 / 25.0;
    s.low = 1 / 25.0 / 1e4;
    return s;
}

static void read_options(FILE *file, golden *g) {
    mpt_optimizer_desc *d = &g->desc;
    d->kind = read_kind(file);
    d->lr = read_number(file, "lr");
    d->momentum = read_number(file, "momentum");
    d->dampening = read_number(file, "dampening");
    d->nesterov = read_int(file, "nesterov");
    d->beta1 = read_number(file, "beta1");
    d->beta2 = read_number(file, "beta2");
    d->eps = read_number(file, "eps");
    d->weight_decay = read_number(file, "weight_decay");
    d->amsgrad = read_int(file, "amsgrad");
    d->maximize = read_int(file, "maximize");
    g->clip_norm = read_number(file, "clip_norm");
    g->clip_value = read_number(file, "clip_value");
    g->group_lr_factor = read_number(file, "group_lr_factor");
    g->group_weight_decay = read_number(file, "group_weight_decay");
    read_int(file, "warmup"); /* the attempts say their lr */
    g->exact = read_int(file, "exact_root") || d->kind == MPT_SGD;
    g->one_cycle = strstr(g->name, "one_cycle") != NULL;
    if (g->one_cycle) d->schedule = one_cycle((uint64_t)read_int(file, "one_cycle"));
    g->moments = d->kind != MPT_SGD ? 2 + d->amsgrad : d->momentum > 0;
}

static golden *read_case(const char *name) {
    static const char *const keys[2][MOMENTS] = {{"momentum_buffer", "", ""},
                                                 {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}};
    golden *g = (golden *)test_memory(sizeof *g);
    FILE *file = open_golden(name);
    int i, m;
    g->name = name;
    read_options(file, g);
    for (i = 0; i < ATTEMPTS; i++) {
        outcome *a = &g->attempt[i];
        CHECK_EQUAL(read_int(file, "attempt"), i + 1);
        a->applied = read_int(file, "applied");
        a->lr = read_number(file, "lr");
        a->clip = read_number(file, "clip");
        read_floats(file, "param", a->param, ELEMENTS);
        for (m = 0; m < g->moments; m++) read_floats(file, keys[g->desc.kind != MPT_SGD][m], a->moment[m], ELEMENTS);
    }
    fclose(file);
    return g;
}

/* ==== ONE RUN ==== */

typedef struct run {
    mpt_context *ctx;
    mpt_params *params;
    mpt_scaler *scaler;
    mpt_optimizer *opt;
    double tolerance[ELEMENTS]; /* of the parameters: what earlier steps may have added up to */
} run;

enum { PARAM = 0, MOMENT1, MOMENT2, MOMENT3, GRAD }; /* roles of flat arrays */

static float *device_array(const run *r, int role, int tensor) {
    if (role == PARAM) return mpt_params_master(r->params, tensor);
    if (role == GRAD) return mpt_params_grad(r->params, tensor);
    return mpt_optimizer_moment(r->opt, role, tensor);
}

static void put(const run *r, int role, const float *host) {
    int t;
    for (t = 0; t < TENSORS; host += sizes[t++])
        CHECK_OK(r->ctx, mpt_upload(r->ctx, device_array(r, role, t + 1), host, sizes[t] * sizeof *host));
}

static void get(const run *r, int role, float *host) {
    int t;
    for (t = 0; t < TENSORS; host += sizes[t++])
        CHECK_OK(r->ctx, mpt_download(r->ctx, host, device_array(r, role, t + 1), sizes[t] * sizeof *host));
}

static run *run_open(const golden *g, const inputs *in) {
    run *r = (run *)test_memory(sizeof *r);
    int t;
    r->ctx = test_open_threads(1);
    r->params = mpt_params_new(r->ctx, NULL);
    for (t = 0; t < TENSORS; t++) CHECK_EQUAL(mpt_params_add(r->params, "tensor", sizes[t], groups[t]), t + 1);
    CHECK_OK(r->ctx, mpt_params_build(r->params));
    r->scaler = mpt_scaler_new(r->ctx, &in->scaler);
    r->opt = mpt_optimizer_new(r->params, r->scaler, &g->desc);
    CHECK_OK(r->ctx,
             mpt_optimizer_group(r->opt, MPT_GROUP_BIAS | MPT_GROUP_NORM, g->group_lr_factor, g->group_weight_decay));
    put(r, PARAM, in->param);
    return r;
}

static void run_close(run *r) {
    mpt_optimizer_free(r->opt);
    mpt_scaler_free(r->scaler);
    mpt_params_free(r->params);
    mpt_close(r->ctx);
    free(r);
}

/* Norm and clip factor of a step that will be applied; then PyTorch's own norm is put in, of which the factor is
   PyTorch's to the bit, so that the parameters need no tolerance for it. With u = 2^-24: PyTorch's norm is the root
   of a sum of at most 33 squares, in fp32 and in any order, and then the same over 3 tensors. A square passes at
   most 32 additions and its own rounding, half of which are left after the root, whose error is at most 2 u: 18.5 u,
   and (2 + 1) / 2 + 2 = 3.5 u for the second: 22 u. The factor adds the roundings of 1e-6, the sum, the reciprocal
   and the product: 26 u. */
static void check_clip(const run *r, const golden *g, const outcome *expected, const input *in) {
    const double u = test_unit(MPT_F32);
    mpt_optimizer_state *state = (mpt_optimizer_state *)test_memory(sizeof *state);
    CHECK_OK(r->ctx, mpt_optimizer_get_state(r->opt, state));
    CHECK_NEAR(state->grad_norm, in->norm, 22 * u * (double)in->norm);
    if (g->clip_norm > 0) {
        CHECK_NEAR(state->clip, expected->clip, 26 * u * expected->clip);
        state->grad_norm = (double)in->norm;
        CHECK_OK(r->ctx, mpt_optimizer_set_state(r->opt, state));
        CHECK_OK(r->ctx, mpt_optimizer_get_state(r->opt, state));
        CHECK_EQUAL(state->clip, expected->clip);
    }
    free(state);
}

static void check_counters(const run *r, const input *in, int attempts, int applied) {
    mpt_optimizer_state *state = (mpt_optimizer_state *)test_memory(sizeof *state);
    mpt_scaler_state scaler;
    CHECK_OK(r->ctx, mpt_optimizer_get_state(r->opt, state));
    CHECK_EQUAL(state->found, in->found);
    CHECK_EQUAL(state->attempted, attempts);
    CHECK_EQUAL(state->applied, applied);
    CHECK_EQUAL(state->skipped, attempts - applied);
    CHECK_OK(r->ctx, mpt_scaler_get_state(r->scaler, &scaler));
    CHECK_EQUAL(scaler.scale, in->scale_after);
    CHECK_EQUAL(scaler.growth_tracker, in->tracker);
    free(state);
}

static int same(float a, float b) { return test_bits(a) == test_bits(b) || !((test_bits(a) | test_bits(b)) << 1); }

static double ulp(double x) {
    int exponent;
    frexp(x, &exponent);
    return ldexp(1, exponent - 24);
}

static void check_moment(const run *r, const golden *g, int attempt, int m) {
    const float *expected = g->attempt[attempt].moment[m];
    float ours[ELEMENTS];
    int i;
    get(r, MOMENT1 + m, ours);
    for (i = 0; i < ELEMENTS && same(ours[i], expected[i]); i++) {}
    if (!test_count(i == ELEMENTS, __FILE__, __LINE__, g->name))
        printf(": attempt %d moment %d [%d] is %a, PyTorch %a\n", attempt + 1, m + 1, i, (double)ours[i],
               (double)expected[i]);
}

/* An error made in an earlier step stays in the parameter as it is, or shrinks with weight decay. What it does to later
   moments through weight decay is smaller by lr * weight_decay. */
static void check_param(run *r, const golden *g, int attempt, const float *before) {
    const float *expected = g->attempt[attempt].param;
    float ours[ELEMENTS];
    int i, ok = 1;
    get(r, PARAM, ours);
    for (i = 0; i < ELEMENTS && ok; i++) {
        const double largest = fmax(fabs((double)before[i]), fabs((double)expected[i]));
        if (!g->exact && g->attempt[attempt].applied) r->tolerance[i] += 2 * ulp(largest);
        ok = same(ours[i], expected[i]) || test_near((double)ours[i], (double)expected[i], r->tolerance[i]);
    }
    if (!test_count(ok, __FILE__, __LINE__, g->name))
        printf(": attempt %d parameter [%d] is %a, PyTorch %a\n", attempt + 1, i - 1, (double)ours[i - 1],
               (double)expected[i - 1]);
}

static void attempt_step(const run *r, const golden *g, const input *in, const outcome *expected) {
    put(r, GRAD, in->grad);
    CHECK_EQUAL(mpt_scaler_scale(r->scaler), in->scale);
    if (!g->one_cycle) CHECK_OK(r->ctx, mpt_optimizer_set_lr(r->opt, expected->lr));
    CHECK_OK(r->ctx, mpt_unscale(r->opt));
    if (g->clip_norm > 0) CHECK_OK(r->ctx, mpt_clip_norm(r->opt, g->clip_norm));
    if (g->clip_value > 0) CHECK_OK(r->ctx, mpt_clip_value(r->opt, g->clip_value));
    if (expected->applied) check_clip(r, g, expected, in);
    CHECK_OK(r->ctx, mpt_step(r->opt));
    CHECK_OK(r->ctx, mpt_scaler_update(r->scaler));
}

static void test_case(const golden *g, const inputs *in, int alone) {
    run *r = run_open(g, in);
    const float *before = in->param;
    int i, m, applied = 0;
    for (i = 0; i < ATTEMPTS; i++) {
        const outcome *expected = &g->attempt[i];
        attempt_step(r, g, &in->attempt[i], expected);
        applied += expected->applied;
        check_counters(r, &in->attempt[i], i + 1, applied);
        check_param(r, g, i, before);
        before = expected->param;
        if (!alone) continue;
        memset(r->tolerance, 0, sizeof r->tolerance);
        put(r, PARAM, before);
        for (m = 0; m < g->moments; m++) {
            check_moment(r, g, i, m);
            put(r, MOMENT1 + m, expected->moment[m]);
        }
    }
    run_close(r);
}

static void test_optimizers(void) {
    static const char *const names[] = {"sgd",
                                        "sgd_weight_decay",
                                        "sgd_one_cycle",
                                        "adam_one_cycle",
                                        "adamw_one_cycle",
                                        "sgd_momentum",
                                        "sgd_dampening",
                                        "sgd_nesterov",
                                        "sgd_maximize",
                                        "sgd_clip_norm",
                                        "sgd_clip_value",
                                        "sgd_groups",
                                        "adam",
                                        "adam_weight_decay",
                                        "adam_betas",
                                        "adam_amsgrad",
                                        "adam_exact_root",
                                        "adam_maximize",
                                        "adam_clip_norm",
                                        "adam_clip_value",
                                        "adamw",
                                        "adamw_exact_root",
                                        "adamw_amsgrad",
                                        "adamw_maximize",
                                        "adamw_clip_norm",
                                        "adamw_groups",
                                        "adamw_warmup"};
    inputs *in = read_inputs();
    size_t i;
    for (i = 0; i < sizeof names / sizeof *names; i++) {
        golden *g = read_case(names[i]);
        test_case(g, in, 1);
        test_case(g, in, 0);
        free(g);
    }
    free(in);
}

/* ==== SCALER ==== */

/* The pure rule over a long row of events: '.' a clean step, 'X' an overflow. */
static void test_scaler(const char *name) {
    FILE *file = open_golden(name);
    const mpt_scaler_desc desc = read_scaler(file);
    mpt_scaler_state state = mpt_scaler_start(&desc);
    int events = read_int(file, "events"), i, tracker, wrong = 0;
    char event = 0;
    float scale;
    for (i = 0; i < events; i++) {
        CHECK(fscanf(file, " %c", &event) == 1);
        mpt_scaler_rule(&state, event == 'X');
        scale = read_float(file, "scale");
        tracker = read_int(file, "tracker");
        wrong += !same(state.scale, scale) || state.growth_tracker != tracker;
    }
    CHECK_EQUAL(wrong, 0);
    fclose(file);
}

/* ==== SCHEDULES ==== */

enum { SCHEDULED = 50 };

/* The numbers of a line `key name ...` */
static void read_scheduled(FILE *file, const char *key, const char *name, double *number) {
    char word[32] = "";
    int step;
    read_key(file, key);
    CHECK(fscanf(file, "%31s", word) == 1 && strcmp(word, name) == 0);
    for (step = 0; step < SCHEDULED; step++) {
        number[step] = 0;
        CHECK(fscanf(file, "%lf", &number[step]) == 1);
    }
}

/* The momentum of 50 steps, bounded as lr is below */
static void test_momenta(FILE *file, const char *name, const mpt_schedule *schedule) {
    double momentum[SCHEDULED];
    uint64_t step;
    read_scheduled(file, "momentum", name, momentum);
    for (step = 0; step < SCHEDULED; step++)
        CHECK_NEAR(mpt_schedule_momentum(schedule, step, 0.9), momentum[step], ldexp(200, -53));
}

/* lr of 50 steps. PyTorch goes from step to step with at most 4 roundings in each, so its own error grows to 200 units
   of 2^-53; ours has a few. */
static void test_schedule(FILE *file, const char *name, const mpt_schedule *schedule) {
    double lr[SCHEDULED];
    uint64_t step;
    read_scheduled(file, "schedule", name, lr);
    for (step = 0; step < SCHEDULED; step++)
        CHECK_NEAR(0.1 * mpt_schedule_factor(schedule, step), lr[step], 0.1 * ldexp(200, -53));
}

static void test_schedules(void) {
    static const struct {
        const char *name;
        mpt_schedule schedule; /* kind, warmup, warmup_start, steps, low, start, peak, and of momentum */
    } cases[] = {
        {"constant", {MPT_SCHEDULE_CONSTANT, 0, 0, 0, 0, 0, 0, 0, 0, 0}},
        {"linear_warmup", {MPT_SCHEDULE_CONSTANT, 10, 0.1, 0, 0, 0, 0, 0, 0, 0}},
        {"cosine", {MPT_SCHEDULE_COSINE, 0, 0, 50, 0, 0, 0, 0, 0, 0}},
        {"cosine_min", {MPT_SCHEDULE_COSINE, 0, 0, 50, 0.1, 0, 0, 0, 0, 0}},
        {"step", {MPT_SCHEDULE_STEP, 0, 0, 10, 0.5, 0, 0, 0, 0, 0}},
        {"step_odd", {MPT_SCHEDULE_STEP, 0, 0, 7, 0.3, 0, 0, 0, 0, 0}},
        {"one_cycle", {MPT_SCHEDULE_ONE_CYCLE, 0, 0, 50, 1 / 25.0 / 1e4, 1 / 25.0, 0.3, 0, 0, 0}},
        {"one_cycle_linear", {MPT_SCHEDULE_ONE_CYCLE_LINEAR, 0, 0, 50, 1 / 10.0 / 100, 1 / 10.0, 0.25, 0, 0.7, 0.8}},
        {"warmup_cosine", {MPT_SCHEDULE_COSINE, 10, 0.1, 40, 0, 0, 0, 0, 0, 0}}};
    mpt_schedule still = cases[6].schedule;
    FILE *file = open_golden("schedules");
    size_t i;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) test_schedule(file, cases[i].name, &cases[i].schedule);
    for (i = 6; i < 8; i++) test_momenta(file, cases[i].name, &cases[i].schedule);
    CHECK_EQUAL(mpt_schedule_momentum(&still, 10, 0), 0);
    still.warmup = 10;
    CHECK_EQUAL(mpt_schedule_momentum(&still, 5, 0.9), 0.95);
    still.no_cycle_momentum = 1;
    CHECK_EQUAL(mpt_schedule_momentum(&still, 10, 0.9), 0.9);
    CHECK_EQUAL(mpt_schedule_momentum(&cases[2].schedule, 10, 0.9), 0.9);
    fclose(file);
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    RUN_TEST(test_optimizers());
    RUN_TEST(test_scaler("scaler_default"));
    RUN_TEST(test_scaler("scaler_odd_factors"));
    RUN_TEST(test_scaler("scaler_ceiling"));
    RUN_TEST(test_scaler("scaler_floor"));
    RUN_TEST(test_schedules());
    return test_finish("parity/optimizers");
}
