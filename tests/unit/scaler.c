/* scaler.c - the loss scaler, model-checked: its rule over every string of 20 events against the rules of the systems
   that it stands for, and the step protocol over random calls against a small model. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#define LENS_IMPLEMENTATION
#include "../../examples/lens.h"
#include "../check.h"

/* ==== OTHER SYSTEMS ==== their rules, each in its own words, on the exponent of a scale 2^e */

typedef struct machine {
    int scale, counter, hysteresis, iteration, last_overflow, stuck;
} machine;

typedef struct setting {
    const char *name;
    void (*rule)(const struct setting *s, machine *m, int found);
    mpt_scaler_desc desc; /* defaults filled in */
    int low, high;        /* exponents of the smallest and largest scale */
    int up, down;         /* exponents of the factors */
} setting;

static int least(int a, int b) { return a < b ? a : b; }
static int most(int a, int b) { return a > b ? a : b; }

/* torch, apex.amp, jmp, Keras; and ours */
static void count_steps(const setting *s, machine *m, int found) {
    if (found) {
        m->scale = most(m->scale - s->down, s->low);
        m->counter = 0;
    } else if (++m->counter == s->desc.growth_interval) {
        if (m->scale + s->up <= 127) m->scale = least(m->scale + s->up, s->high);
        m->counter = 0;
    }
}

/* Apex's kernel forgives until `hysteresis` overflows have come in a row. */
static void apex_kernel(const setting *s, machine *m, int found) {
    if (found && --m->hysteresis > 0) {
        m->counter = 0;
        return;
    }
    count_steps(s, m, found);
    if (!found) m->hysteresis = s->desc.hysteresis;
}

static void megatron(const setting *s, machine *m, int found) {
    if (found) {
        m->counter = 0;
        if (--m->hysteresis <= 0) m->scale = most(m->scale - s->down, s->low);
    } else if (++m->counter == s->desc.growth_interval) {
        m->counter = 0;
        m->hysteresis = s->desc.hysteresis;
        m->scale = least(m->scale + s->up, s->high);
    }
}

/* DeepSpeed counts iterations, not clean steps; refill_when_clean is its consecutive_hysteresis. */
static void deepspeed(const setting *s, machine *m, int found) {
    const int stable = m->iteration - m->last_overflow - 1;
    if (found) {
        if (m->hysteresis == 1) m->scale = most(m->scale - s->down, s->low);
        else m->hysteresis--;
        m->last_overflow = m->iteration;
    } else {
        const int grows = stable > 0 && stable % s->desc.growth_interval == 0;
        if (grows || s->desc.refill_when_clean) m->hysteresis = s->desc.hysteresis;
        if (grows) m->scale = least(m->scale + s->up, s->high);
    }
    m->iteration++;
}

enum { NEVER = 1000 }; /* an exponent out of reach */

static setting setting_of(const char *name, mpt_scaler_desc desc, void (*rule)(const setting *, machine *, int)) {
    setting s;
    s.name = name;
    s.rule = rule;
    s.desc = mpt_scaler_defaults(&desc);
    s.low = s.desc.no_min ? -NEVER : ilogb((double)s.desc.min_scale);
    s.high = s.desc.no_max ? NEVER : ilogb((double)s.desc.max_scale);
    s.up = ilogb(s.desc.growth_factor);
    s.down = -ilogb(s.desc.backoff_factor);
    return s;
}

/* ==== EVERY STRING OF EVENTS ==== */

enum { DEPTH = 20 };

typedef struct walk {
    const setting *s;
    int start; /* exponent of the first scale */
    long nodes, wrong;
} walk;

/* A string of events (bit 0 the first, 1 an overflow) that breaks a promise. */
static void report(walk *w, const char *promise, uint32_t events, int length) {
    int i;
    if (w->wrong++) return;
    printf("%s from 2^%d, interval %d: %s after ", w->s->name, w->start, (int)w->s->desc.growth_interval, promise);
    for (i = 0; i < length; i++) putchar(events >> i & 1 ? 'x' : '.');
    putchar('\n');
}

/* Clean steps alone bring the scale back to where it began: `interval` for each factor lost, and one more where growth
   comes late. */
static int recovers(const walk *w, mpt_scaler_state state) {
    const int drop = w->start - ilogb((double)state.scale), late = state.desc.late_growth;
    int steps = (drop + w->s->up - 1) / w->s->up * state.desc.growth_interval + late;
    if (drop <= 0) return 1;
    while (steps-- > 0) mpt_scaler_rule(&state, 0);
    return ilogb((double)state.scale) >= w->start;
}

static void visit(walk *w, const mpt_scaler_state *state, const machine *m, uint32_t events, int length) {
    const uint32_t bits = test_bits(state->scale);
    const int scale = (int)(bits >> 23) - 127;
    int found;
    w->nodes++;
    if (bits & 0x7fffffu || scale < -126 || scale > 127) report(w, "the scale is no power of two", events, length);
    if (scale < w->s->low || scale > w->s->high) report(w, "the scale is out of bounds", events, length);
    if (scale != m->scale) report(w, "the scale is not the system's", events, length);
    if (state->stuck != m->stuck) report(w, "the overflows at the smallest scale are miscounted", events, length);
    if (state->updates != (uint64_t)length) report(w, "the updates are miscounted", events, length);
    if (length == DEPTH) {
        if (!recovers(w, *state)) report(w, "the scale does not recover", events, length);
        return;
    }
    for (found = 0; found <= 1; found++) {
        mpt_scaler_state next = *state;
        machine after = *m;
        after.stuck = found && m->scale == w->s->low ? m->stuck + 1 : 0;
        w->s->rule(w->s, &after, found);
        mpt_scaler_rule(&next, found);
        if (next.overflows != state->overflows + (uint64_t)found)
            report(w, "the overflows are miscounted", events, length);
        visit(w, &next, &after, events | (uint32_t)found << length, length + 1);
    }
}

static void check_walk(setting s, int start, int interval) {
    walk w = {NULL, 0, 0, 0};
    machine m = {0, 0, 0, 0, -1, 0};
    mpt_scaler_state first;
    s.desc.growth_interval = interval;
    s.desc.init_scale = (float)ldexp(1, start);
    w.s = &s, w.start = start;
    m.scale = start, m.hysteresis = s.desc.hysteresis;
    first = mpt_scaler_start(&s.desc);
    visit(&w, &first, &m, 0, 0);
    CHECK_EQUAL(w.nodes, (1 << (DEPTH + 1)) - 1);
    CHECK_EQUAL(w.wrong, 0);
}

/* Starts near the smallest and the largest scale, so that both are reached. */
static void check_setting(const setting *s) {
    const int low = s->desc.no_min ? -100 : s->low + 2,
              high = s->desc.no_max ? (s->desc.unguarded ? 100 : 125) : s->high - 2;
    check_walk(*s, low, 1);
    check_walk(*s, low, 3);
    check_walk(*s, high, 2);
}

static void test_rule(void) {
    mpt_scaler_desc ours = MPT_ZERO, d;
    setting s[11];
    size_t i;
    s[0] = setting_of("ours", ours, count_steps);
    s[1] = setting_of("torch", lens_scaler_preset(LENS_SCALER_TORCH), count_steps);
    s[2] = setting_of("apex", lens_scaler_preset(LENS_SCALER_APEX), count_steps);
    s[3] = setting_of("jmp", lens_scaler_preset(LENS_SCALER_JMP), count_steps);
    s[4] = setting_of("keras", lens_scaler_preset(LENS_SCALER_KERAS), count_steps);
    s[5] = setting_of("deepspeed", lens_scaler_preset(LENS_SCALER_DEEPSPEED), deepspeed);
    s[6] = setting_of("megatron", lens_scaler_preset(LENS_SCALER_MEGATRON), megatron);
    d = lens_scaler_preset(LENS_SCALER_TORCH), d.hysteresis = 3, d.refill_when_clean = 1;
    s[7] = setting_of("apex kernel", d, apex_kernel);
    d = lens_scaler_preset(LENS_SCALER_DEEPSPEED), d.refill_when_clean = 1;
    s[8] = setting_of("deepspeed consecutive", d, deepspeed);
    d = ours, d.growth_factor = 4, d.backoff_factor = 0.125, d.min_scale = 0.125f, d.max_scale = 512;
    s[9] = setting_of("ours by 4 and 1/8", d, count_steps);
    d.hysteresis = 2;
    s[10] = setting_of("megatron by 4 and 1/8", d, megatron);
    for (i = 0; i < sizeof s / sizeof *s; i++) check_setting(&s[i]);
}

/* Factors and bounds that are no powers of two: the scale stays within the bounds. */
static void visit_bounds(mpt_scaler_state state, int length, long *wrong) {
    int found;
    *wrong += !(state.scale >= state.desc.min_scale && state.scale <= state.desc.max_scale);
    for (found = 0; found <= 1 && length < DEPTH; found++) {
        mpt_scaler_state next = state;
        mpt_scaler_rule(&next, found);
        visit_bounds(next, length + 1, wrong);
    }
}

static void test_bounds(void) {
    mpt_scaler_desc d = MPT_ZERO;
    long wrong = 0;
    d.init_scale = 100, d.min_scale = 3, d.max_scale = 1000, d.growth_factor = 1.7, d.backoff_factor = 0.3;
    d.growth_interval = 1;
    visit_bounds(mpt_scaler_start(&d), 0, &wrong);
    CHECK_EQUAL(wrong, 0);
}

/* ==== PRESETS ==== */

static void check_preset(lens_scaler_system system, int init, int interval, int hysteresis, double low, double high) {
    const mpt_scaler_desc d = lens_scaler_preset(system);
    CHECK(d.mode == MPT_SCALER_DYNAMIC);
    CHECK_EQUAL(d.init_scale, ldexp(1, init));
    CHECK_EQUAL(d.growth_factor, 2);
    CHECK_EQUAL(d.backoff_factor, 0.5);
    CHECK_EQUAL(d.growth_interval, interval);
    CHECK_EQUAL(d.hysteresis, hysteresis);
    CHECK(low > 0 ? !d.no_min && d.min_scale <= low && d.min_scale >= low : d.no_min);
    CHECK(high > 0 ? !d.no_max && d.max_scale <= high && d.max_scale >= high : d.no_max);
}

/* log2 of the scale after each event, x an overflow, as hexadecimal digits; from 2^10, interval 3. */
static void check_row(const char *name, mpt_scaler_desc desc, const char *row) {
    static const char events[] = "..x....xxx.......x.x", digits[] = "0123456789ab";
    mpt_scaler_state s;
    int i, wrong = 0;
    desc.init_scale = 1024, desc.growth_interval = 3;
    s = mpt_scaler_start(&desc);
    for (i = 0; events[i]; i++) {
        mpt_scaler_rule(&s, events[i] == 'x');
        wrong += test_bits(s.scale) != test_bits((float)ldexp(1, (int)(strchr(digits, row[i]) - digits)));
    }
    if (!CHECK_EQUAL(wrong, 0)) printf("    in %s\n", name);
}

static void test_presets(void) {
    static const char simple[] = "aa999aa9877788899887";
    mpt_scaler_desc ours = MPT_ZERO, d;
    check_preset(LENS_SCALER_TORCH, 16, 2000, 1, 0, 0);
    check_preset(LENS_SCALER_APEX, 16, 2000, 1, 0, 16777216);
    check_preset(LENS_SCALER_JMP, 15, 2000, 1, 1, 0);
    check_preset(LENS_SCALER_KERAS, 15, 2000, 1, 0, 0);
    check_preset(LENS_SCALER_DEEPSPEED, 16, 1000, 2, 1, 0);
    check_preset(LENS_SCALER_MEGATRON, 32, 1000, 2, 1, 0);
    check_row("ours", ours, simple);
    check_row("torch", lens_scaler_preset(LENS_SCALER_TORCH), simple);
    check_row("apex", lens_scaler_preset(LENS_SCALER_APEX), simple);
    check_row("jmp", lens_scaler_preset(LENS_SCALER_JMP), simple);
    check_row("keras", lens_scaler_preset(LENS_SCALER_KERAS), simple);
    check_row("megatron", lens_scaler_preset(LENS_SCALER_MEGATRON), "aaaaabbba999aaabbbba");
    check_row("deepspeed", lens_scaler_preset(LENS_SCALER_DEEPSPEED), "aaaaaabba9999aaabbba");
    d = lens_scaler_preset(LENS_SCALER_DEEPSPEED), d.refill_when_clean = 1;
    check_row("deepspeed consecutive", d, "aaaaaabba9999aaabbbb");
    d = lens_scaler_preset(LENS_SCALER_TORCH), d.hysteresis = 2, d.refill_when_clean = 1;
    check_row("apex kernel", d, "aaaaabbba999aaabbbbb");
}

/* ==== THE STEP PROTOCOL ==== random calls on 1 to 3 optimizers that share a scaler, and what a small model says */

enum { MOST = 3, CALLS = 120, RUNS = 40 };
typedef enum phase { READY, UNSCALED, STEPPED, PHASES } phase;
typedef enum action { UNSCALE, CLIP_NORM, CLIP_VALUE, BAD_NORM, BAD_VALUE, STEP, UPDATE, ACTIONS } action;
static const char *const names[ACTIONS] = {"unscale",    "clip_norm", "clip_value",   "clip_norm",
                                           "clip_value", "step",      "scaler_update"};
static const char *const tensors[2] = {"weight", "bias"};

typedef struct actor { /* an optimizer and the model of it */
    test_block block;
    phase now;
    int bad, found; /* are there inf or NaN in the gradients now; were there when it looked */
    uint64_t applied, skipped;
} actor;

typedef struct stage {
    mpt_context *ctx;
    mpt_scaler *scaler;
    mpt_scaler_state expected; /* of the scaler */
    actor actors[MOST];
    int count;
    uint64_t seed, draws;
    const unsigned char *script; /* of a fuzzer: drawn first, and then the calls end */
    size_t length;
    long seen[PHASES][ACTIONS], results[MPT_RESULT_COUNT];
} stage;

static uint32_t draw(stage *s, uint32_t below) {
    if (s->draws < s->length) return s->script[s->draws++] % below;
    return mpt_hash(s->seed, 0, 0, s->draws++) % below;
}

/* New gradients; of the bad ones an element of the actor's own tensor is inf or NaN. */
static void set_gradients(stage *s, int k) {
    actor *a = &s->actors[k];
    const size_t n = a->block.total;
    float *g = (float *)test_memory(n * sizeof *g);
    a->bad = draw(s, 2) == 0;
    test_floats(g, n, -100, 100, s->seed + s->draws);
    if (a->bad)
        g[mpt_params_grad(a->block.params, 1 + k % 2) - mpt_params_grad(a->block.params, 0)] =
            test_float(draw(s, 2) ? 0x7f800000u : 0xffc00000u);
    CHECK_OK(s->ctx, mpt_upload(s->ctx, mpt_params_grad(a->block.params, 0), g, n * sizeof *g));
    free(g);
}

static mpt_result call(stage *s, int k, action act) {
    static const uint32_t bad[] = {0, 0xbf800000u, 0x7fc00000u, 0x7f800000u};
    const double limit = (double)test_float(bad[draw(s, 4)]);
    mpt_optimizer *opt = s->actors[k].block.opt;
    switch (act) {
    case UNSCALE: return mpt_unscale(opt);
    case CLIP_NORM: return mpt_clip_norm(opt, 0.5);
    case CLIP_VALUE: return mpt_clip_value(opt, 0.25);
    case BAD_NORM: return mpt_clip_norm(opt, limit);
    case BAD_VALUE: return mpt_clip_value(opt, limit);
    case STEP: return mpt_step(opt);
    default: return mpt_scaler_update(s->scaler);
    }
}

/* The code that a call must return; *word: what its reason must name. */
static mpt_result expected_result(stage *s, int k, action act, const char **word) {
    const phase now = s->actors[k].now;
    int i, stepped = 0, unscaled = 0, found = 0;
    *word = names[act];
    if (act == UNSCALE) return now == READY ? MPT_OK : MPT_ERROR_ORDER;
    if (act == STEP) return now != STEPPED ? MPT_OK : MPT_ERROR_ORDER;
    if (act != UPDATE) return now != UNSCALED ? MPT_ERROR_ORDER : act >= BAD_NORM ? MPT_ERROR_ARGUMENT : MPT_OK;
    for (i = s->count - 1; i >= 0; i--) {
        const actor *a = &s->actors[i];
        stepped += a->now == STEPPED, unscaled += a->now == UNSCALED;
        if (a->now == STEPPED && a->found) found = 1, *word = tensors[i % 2];
    }
    if (unscaled || !stepped) {
        *word = names[act];
        return MPT_ERROR_ORDER;
    }
    mpt_scaler_rule(&s->expected, found);
    return s->expected.stuck >= s->expected.desc.patience ? MPT_ERROR_DIVERGED : MPT_OK;
}

/* What a call that is carried out does to the model. */
static void act_on_model(stage *s, int k, action act) {
    actor *a = &s->actors[k];
    int i;
    if (act == UNSCALE || (act == STEP && a->now == READY)) a->found = a->bad, a->now = UNSCALED;
    if (act == STEP) {
        a->now = STEPPED;
        if (a->found) a->skipped++;
        else a->applied++;
    }
    for (i = 0; i < s->count && act == UPDATE; i++) s->actors[i].now = READY;
}

/* Counters and scale are the model's; of the flat arrays nothing changed but what an applied step changes. */
static void check_world(stage *s, float **before, int stepped) {
    mpt_scaler_state scaler;
    int i;
    CHECK_OK(s->ctx, mpt_scaler_get_state(s->scaler, &scaler));
    CHECK(memcmp(&scaler, &s->expected, sizeof scaler) == 0);
    for (i = 0; i < s->count; i++) {
        const actor *a = &s->actors[i];
        const mpt_optimizer_state state = test_block_state(&a->block);
        CHECK(state.found == a->found && state.applied == a->applied && state.skipped == a->skipped &&
              state.attempted == a->applied + a->skipped);
        CHECK(test_block_same(&a->block, before[i], test_block_download(&a->block), 1) == (i != stepped));
    }
}

static void check_call(stage *s) {
    const int k = (int)draw(s, (uint32_t)s->count);
    const action act = (action)draw(s, ACTIONS);
    const char *word;
    const mpt_result expected = expected_result(s, k, act, &word);
    mpt_optimizer_state states[MOST];
    float *before[MOST];
    int i;
    for (i = 0; i < s->count; i++) {
        before[i] = test_block_download(&s->actors[i].block);
        states[i] = test_block_state(&s->actors[i].block);
    }
    s->seen[s->actors[k].now][act]++, s->results[expected]++;
    if (expected == MPT_OK) CHECK_OK(s->ctx, call(s, k, act));
    else CHECK_ERROR(s->ctx, call(s, k, act), expected, word);
    if (expected == MPT_OK || expected == MPT_ERROR_DIVERGED) {
        act_on_model(s, k, act);
        check_world(s, before, act == STEP && !s->actors[k].found ? k : -1);
        return;
    }
    check_world(s, before, -1);
    for (i = 0; i < s->count; i++) {
        const mpt_optimizer_state now = test_block_state(&s->actors[i].block);
        CHECK(memcmp(&states[i], &now, sizeof now) == 0);
    }
}

static void run_protocol(stage *s) {
    const mpt_optimizer_desc descs[MOST] = {mpt_sgd(0.01, 0.9), mpt_adam(0.01), mpt_adamw(0.01)};
    mpt_scaler_desc scaler = MPT_ZERO;
    mpt_params_desc params = MPT_ZERO;
    int i;
    scaler.init_scale = 4, scaler.growth_interval = 2, scaler.patience = 2, scaler.max_scale = 16;
    params.type = MPT_BF16;
    s->draws = 0;
    s->expected = mpt_scaler_start(&scaler);
    s->scaler = mpt_scaler_new(s->ctx, &scaler);
    for (i = 0; i < s->count; i++) {
        actor *a = &s->actors[i];
        memset(a, 0, sizeof *a);
        params.master = (mpt_master)(i + 2); /* SPLIT, KAHAN, STOCHASTIC: any mode keeps the order */
        a->block = test_block_new(s->ctx, &params, 40, 7, s->scaler, &descs[i]);
        set_gradients(s, i);
    }
    for (i = 0; i < CALLS && !(s->script && s->draws >= s->length); i++) {
        if (i % 4 == 0) set_gradients(s, (int)draw(s, (uint32_t)s->count));
        check_call(s);
    }
    for (i = 0; i < s->count; i++) test_block_free(&s->actors[i].block);
    mpt_scaler_free(s->scaler);
}

static void test_protocol(void) {
    stage *s = (stage *)test_memory(sizeof *s);
    int i, j;
    s->ctx = test_open_threads(1);
    for (i = 0; i < RUNS; i++) {
        s->seed = (uint64_t)i;
        s->count = 1 + i % MOST;
        run_protocol(s);
    }
    for (i = 0; i < PHASES; i++) /* every call has come in every phase */
        for (j = 0; j < ACTIONS; j++) CHECK(s->seen[i][j] > 10);
    CHECK(s->results[MPT_OK] > 10 && s->results[MPT_ERROR_ORDER] > 10 && s->results[MPT_ERROR_ARGUMENT] > 10 &&
          s->results[MPT_ERROR_DIVERGED] > 10);
    mpt_close(s->ctx);
    free(s);
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    RUN_TEST(test_rule());
    RUN_TEST(test_bounds());
    RUN_TEST(test_presets());
    RUN_TEST(test_protocol());
    return test_finish("scaler");
}
