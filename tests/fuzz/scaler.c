/* scaler.c - fuzzes the step protocol: calls in any order on 1 to 3 optimizers that share a scaler, against the
   model in tests/unit/scaler.c; and the scale's rule under any settings.

   Bytes: 0 to 2 the number of optimizers - 1, then what unit/scaler.c draws; or 3, then settings and overflows. */
#define main unit_main
#include "../unit/scaler.c"
#undef main
#include "fuzz.h"

static void fuzz_protocol(int count, fuzz_bytes *b) {
    stage *s = (stage *)test_memory(sizeof *s);
    s->ctx = test_open_threads(1);
    s->count = count;
    s->script = b->at, s->length = b->left;
    run_protocol(s);
    mpt_close(s->ctx);
    free(s);
}

static mpt_scaler_desc take_desc(fuzz_bytes *b) {
    static const double factors[] = {0, 1, 2, 0.5, 1.0001, 0.75, 1e30, 1e-30, -1};
    static const float scales[] = {0, 1, 4, 65536, 1e-30f, 1e30f, 3.4e38f, 1e-45f, -1, 0.7f};
    mpt_scaler_desc d = MPT_ZERO;
    d.mode = (mpt_scaler_mode)fuzz_take(b, 5);
    d.init_scale = scales[fuzz_take(b, 10)];
    d.growth_factor = factors[fuzz_take(b, 9)], d.backoff_factor = factors[fuzz_take(b, 9)];
    d.min_scale = scales[fuzz_take(b, 10)], d.max_scale = scales[fuzz_take(b, 10)];
    d.growth_interval = (int)fuzz_take(b, 5), d.hysteresis = (int)fuzz_take(b, 4), d.patience = (int)fuzz_take(b, 4);
    d.refill_when_clean = (int)fuzz_take(b, 2), d.late_growth = (int)fuzz_take(b, 2);
    d.unguarded = (int)fuzz_take(b, 2), d.no_min = (int)fuzz_take(b, 2), d.no_max = (int)fuzz_take(b, 2);
    return d;
}

/* Settings are refused with a reason, or the scale stays a number above 0 between its bounds. */
static void fuzz_rule(fuzz_bytes *b) {
    const mpt_scaler_desc desc = take_desc(b);
    mpt_context *ctx = test_open_threads(1);
    mpt_scaler *scaler = mpt_scaler_new(ctx, &desc);
    mpt_scaler_state s;
    if (!scaler) CHECK(*mpt_why(ctx));
    if (scaler) {
        uint64_t overflows = 0, updates = 0;
        CHECK_OK(ctx, mpt_scaler_get_state(scaler, &s));
        CHECK_OK(ctx, mpt_scaler_set_state(scaler, &s));
        for (; b->left && updates < 200; updates++) {
            const int found = (int)fuzz_take(b, 2);
            mpt_scaler_rule(&s, found);
            overflows += (uint64_t)found;
            CHECK(s.scale >= 0 && (s.desc.no_min || s.desc.unguarded || s.scale >= s.desc.min_scale));
            CHECK(s.desc.unguarded ||
                  (test_is_finite((double)s.scale) && (s.desc.no_max || s.scale <= s.desc.max_scale)));
            if (s.desc.mode != MPT_SCALER_DYNAMIC) CHECK(s.scale >= s.desc.init_scale && s.scale <= s.desc.init_scale);
        }
        CHECK(s.updates == updates && s.overflows == overflows);
    }
    mpt_scaler_free(scaler);
    mpt_close(ctx);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_bytes b = {data, size};
    const int count = 1 + (int)fuzz_take(&b, 4);
    if (count > MOST) fuzz_rule(&b);
    else if (b.left) fuzz_protocol(count, &b);
    return fuzz_end();
}
