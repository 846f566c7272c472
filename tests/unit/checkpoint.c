/* checkpoint.c - floor 5: files of weights and training states: resumed runs, layouts, faults of disk and memory, every
   truncation and damage of a small file, hostile headers.

   Most files live in memory here, on a disk whose every call can be made to fail. Private names: the table of the
   disk's calls, and the sum of a checkpoint, which is put right after a change. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"

/* ==== A DISK IN MEMORY ==== */

enum { SLOTS = 6 };

typedef struct slot {
    char name[32]; /* "": free */
    unsigned char *bytes;
    size_t size;
} slot;

static struct {
    slot slots[SLOTS];
    slot *file; /* the open one */
    size_t at;
    long calls, fail_at; /* call number, from 1, that fails; 0: none */
    int flushed;
    uint64_t claimed; /* bytes that files have beyond those that can be read */
} ram;

static int ram_fails(void) { return ++ram.calls == ram.fail_at; }

static slot *ram_find(const char *name) {
    int i;
    for (i = 0; i < SLOTS; i++)
        if (strcmp(ram.slots[i].name, name) == 0) return &ram.slots[i];
    return NULL;
}

static void ram_drop(slot *s) {
    if (!s) return;
    free(s->bytes);
    memset(s, 0, sizeof *s);
}

static void *ram_open(const char *path, int writing) {
    if (ram_fails()) return NULL;
    CHECK(!ram.file);
    ram.file = ram_find(path);
    ram.at = 0;
    ram.flushed = 0;
    if (!writing) return ram.file;
    ram_drop(ram.file);
    ram.file = ram_find("");
    snprintf(ram.file->name, sizeof ram.file->name, "%s", path);
    return ram.file;
}

static int ram_size(void *file, uint64_t *bytes) {
    *bytes = ((slot *)file)->size + ram.claimed;
    return !ram_fails();
}

static int ram_read(void *file, void *to, size_t bytes) {
    slot *s = (slot *)file;
    if (ram_fails() || bytes > s->size - ram.at) return 0;
    if (bytes) memcpy(to, s->bytes + ram.at, bytes);
    ram.at += bytes;
    return 1;
}

/* A full disk takes half of it. */
static int ram_write(void *file, const void *from, size_t bytes) {
    slot *s = (slot *)file;
    const int fails = ram_fails();
    const size_t taken = fails ? bytes / 2 : bytes;
    s->bytes = (unsigned char *)realloc(s->bytes, s->size + taken + 1);
    if (!s->bytes) exit(1);
    memcpy(s->bytes + s->size, from, taken);
    s->size += taken;
    return !fails;
}

static int ram_close(void *file, int flush) {
    CHECK(file == ram.file);
    ram.file = NULL;
    ram.flushed = flush;
    return !ram_fails();
}

static int ram_rename(const char *from, const char *to) {
    if (ram_fails()) return 0;
    CHECK(ram.flushed);
    ram_drop(ram_find(to));
    snprintf(ram_find(from)->name, sizeof ram.slots->name, "%s", to);
    return 1;
}

static int ram_remove(const char *path) {
    ram_drop(ram_find(path));
    return 1;
}

static const mpt__disk ram_disk = {ram_open, ram_size, ram_read, ram_write, ram_close, ram_rename, ram_remove};

static void ram_put(const char *name, const void *bytes, size_t size) {
    slot *s;
    ram_drop(ram_find(name));
    s = ram_find("");
    snprintf(s->name, sizeof s->name, "%s", name);
    s->bytes = (unsigned char *)test_memory(size + 1);
    s->size = size;
    if (size) memcpy(s->bytes, bytes, size);
}

static void ram_clear(void) {
    int i;
    for (i = 0; i < SLOTS; i++) ram_drop(&ram.slots[i]);
    ram.fail_at = 0;
}

static mpt_result save(mpt_model *net, const char *path) {
    return mpt__path_run("checkpoint_save", mpt__save_file, net, path, 1, MPT_F32, NULL, &ram_disk);
}
static mpt_result load(mpt_model *net, const char *path) {
    return mpt__path_run("checkpoint_load", mpt__load_file, net, path, 1, MPT_F32, NULL, &ram_disk);
}
static mpt_result save_weights(mpt_model *net, const char *path, mpt_dtype type) {
    return mpt__path_run("weights_save", mpt__save_file, net, path, 0, type, NULL, &ram_disk);
}
static mpt_result load_weights(mpt_model *net, const char *path) {
    return mpt__path_run("weights_load", mpt__load_file, net, path, 0, MPT_F32, NULL, &ram_disk);
}

/* Is the model, to the last bit, what the file "kept" says? */
static int as_kept(mpt_context *ctx, mpt_model *net) {
    const slot *kept = ram_find("kept");
    slot *now;
    int same;
    CHECK_OK(ctx, save(net, "now"));
    now = ram_find("now");
    same = now->size == kept->size && memcmp(now->bytes, kept->bytes, kept->size) == 0;
    ram_drop(now);
    return same;
}

/* ==== MODELS ==== */

enum { BATCH = 6, FEATURES = 4 * 4 * 2, CLASSES = 3 };

static int mlp(mpt_model *net) {
    int h = mpt_input(net, 4, 4, 2);
    h = mpt_relu(net, mpt_linear(net, h, 9, NULL));
    return mpt_linear(net, h, CLASSES, NULL);
}

/* Batch norm of images and of a flattened one, dropout, groups, values side by side. */
static int cnn(mpt_model *net) {
    mpt_conv2d_desc grouped = MPT_ZERO;
    int h = mpt_input(net, 4, 4, 2), a, b;
    grouped.groups = 2;
    grouped.no_bias = 1;
    h = mpt_relu(net, mpt_batch_norm(net, test_same(net, h, 4, 3), NULL));
    h = mpt_conv2d(net, mpt_dropout(net, h, 0.3f), 6, 2, &grouped);
    a = mpt_batch_norm(net, mpt_flatten(net, h), NULL);
    b = mpt_flatten(net, mpt_max_pool2d(net, h, 2, NULL));
    h = mpt_linear(net, mpt_gelu(net, mpt_concat(net, a, b)), 7, NULL);
    return mpt_linear(net, mpt_dropout(net, mpt_layer_norm(net, h, NULL), 0.2f), CLASSES, NULL);
}

/* Almost nothing: a linear layer of two weights and a bias. */
static int tiny(mpt_model *net) { return mpt_linear(net, mpt_input(net, 1, 1, 2), 1, NULL); }

static mpt_train_desc training(void) {
    mpt_train_desc train = MPT_ZERO;
    train.batch = BATCH;
    train.optimizer = mpt_adamw(3e-3);
    train.optimizer.amsgrad = 1;
    train.optimizer.meter = 1;
    train.optimizer.schedule.kind = MPT_SCHEDULE_COSINE;
    train.optimizer.schedule.warmup = 2;
    train.optimizer.schedule.steps = 20;
    train.clip_norm = 0.5;
    train.seed = 7;
    return train;
}

static mpt_model *build(mpt_context *ctx, int (*layers)(mpt_model *), mpt_policy policy, const mpt_train_desc *train) {
    mpt_model *net = mpt_model_new(ctx, policy);
    const int h = layers(net);
    if (layers == tiny) mpt_mse(net, h, NULL);
    else mpt_softmax_cross_entropy(net, h, NULL);
    CHECK_OK(ctx, mpt_model_build(net, train));
    return net;
}

/* One step on the samples of that number, in parts; spoilt: with a gradient that is inf. */
static void step(mpt_context *ctx, mpt_model *net, uint64_t number, int spoilt) {
    const float inf = test_float(0x7f800000u);
    float x[BATCH * FEATURES];
    int32_t y[BATCH];
    size_t i;
    test_floats(x, BATCH * FEATURES, -1, 1, number);
    for (i = 0; i < BATCH; i++) y[i] = (int32_t)(mpt_hash(number, 1, 2, i) % CLASSES);
    if (!spoilt) {
        CHECK_OK(ctx, mpt_train_step(net, x, y));
        return;
    }
    CHECK_OK(ctx, mpt_forward(net, x, y, BATCH));
    CHECK_OK(ctx, mpt_backward(net));
    CHECK_ERROR(ctx, save(net, "never"), MPT_ERROR_ORDER, "mpt_step");
    CHECK_OK(ctx, mpt_upload(ctx, mpt_params_grad(mpt_model_params(net), 2), &inf, sizeof inf));
    CHECK_OK(ctx, mpt_unscale(mpt_model_optimizer(net)));
    CHECK_ERROR(ctx, load(net, "never"), MPT_ERROR_ORDER, "mpt_step");
    CHECK_OK(ctx, mpt_step(mpt_model_optimizer(net)));
    CHECK_ERROR(ctx, save_weights(net, "never", MPT_F32), MPT_ERROR_ORDER, "mpt_scaler_update");
    CHECK_OK(ctx, mpt_scaler_update(mpt_model_scaler(net)));
}

/* ==== RESUMING ==== */

/* Everything that training reads, straight from the model: parameters, moments, statistics, counters, predictions. */
static int same_models(mpt_context *ctx, mpt_model *a, mpt_context *other, mpt_model *b) {
    const size_t count = mpt_params_count(mpt_model_params(a), 0), bytes = count * sizeof(float);
    float *x = (float *)test_memory(bytes), *y = (float *)test_memory(bytes), in[FEATURES], p[CLASSES], q[CLASSES];
    mpt_optimizer_state *s = (mpt_optimizer_state *)test_memory(2 * sizeof *s);
    mpt_scaler_state u, v;
    mpt_node_info info;
    int same = 1, i;
    CHECK_OK(ctx, mpt_params_get(mpt_model_params(a), 0, x));
    CHECK_OK(other, mpt_params_get(mpt_model_params(b), 0, y));
    same &= memcmp(x, y, bytes) == 0;
    for (i = 1; i <= 3; i++) {
        CHECK_OK(ctx, mpt_download(ctx, x, mpt_optimizer_moment(mpt_model_optimizer(a), i, 0), bytes));
        CHECK_OK(other, mpt_download(other, y, mpt_optimizer_moment(mpt_model_optimizer(b), i, 0), bytes));
        same &= memcmp(x, y, bytes) == 0;
    }
    for (i = 1; i <= mpt_model_nodes(a); i++) {
        CHECK_OK(ctx, mpt_model_node(a, i, &info));
        if (!mpt_model_running(a, i)) continue;
        CHECK_OK(ctx, mpt_download(ctx, x, mpt_model_running(a, i), 2 * (size_t)info.C * sizeof *x));
        CHECK_OK(other, mpt_download(other, y, mpt_model_running(b, i), 2 * (size_t)info.C * sizeof *y));
        same &= memcmp(x, y, 2 * (size_t)info.C * sizeof *x) == 0;
    }
    CHECK_OK(ctx, mpt_optimizer_get_state(mpt_model_optimizer(a), &s[0]));
    CHECK_OK(other, mpt_optimizer_get_state(mpt_model_optimizer(b), &s[1]));
    CHECK_OK(ctx, mpt_scaler_get_state(mpt_model_scaler(a), &u));
    CHECK_OK(other, mpt_scaler_get_state(mpt_model_scaler(b), &v));
    same &= memcmp(&s[0], &s[1], sizeof *s) == 0 && memcmp(&u, &v, sizeof u) == 0;
    test_floats(in, FEATURES, -1, 1, 99);
    CHECK_OK(ctx, mpt_predict(a, in, 1, p));
    CHECK_OK(other, mpt_predict(b, in, 1, q));
    same &= memcmp(p, q, sizeof p) == 0;
    free(x), free(y), free(s);
    return same;
}

/* A run of ten steps, two of them skipped, beside one that stops after five and goes on in another context. */
static void test_resume(int (*layers)(mpt_model *), mpt_policy policy) {
    const mpt_train_desc train = training();
    mpt_context *ctx = test_open_threads(1), *other = test_open_threads(3);
    mpt_model *net = build(ctx, layers, policy, &train), *again = build(other, layers, policy, &train);
    uint64_t i;
    int same;
    CHECK_OK(ctx, mpt_optimizer_group(mpt_model_optimizer(net), MPT_GROUP_BIAS, 2, 0));
    for (i = 1; i <= 5; i++) step(ctx, net, i, i == 3);
    CHECK_OK(ctx, mpt_optimizer_set_lr(mpt_model_optimizer(net), 2e-3));
    CHECK_OK(ctx, save(net, "kept"));
    CHECK(as_kept(ctx, net));
    for (i = 20; i <= 24; i++) step(other, again, i, i == 21);
    CHECK(!same_models(ctx, net, other, again));
    CHECK_OK(other, load(again, "kept"));
    CHECK(same_models(ctx, net, other, again));
    CHECK(as_kept(other, again));
    CHECK_NEAR(mpt_optimizer_get_desc(mpt_model_optimizer(again)).lr, 2e-3, 0);
    CHECK_EQUAL(mpt_steps_applied(again), 4);
    CHECK_EQUAL(mpt_steps_skipped(again), 1);
    for (i = 6; i <= 10; i++) {
        step(ctx, net, i, i == 7);
        step(other, again, i, i == 7);
        CHECK(test_bits((float)mpt_loss(net)) == test_bits((float)mpt_loss(again)));
    }
    same = CHECK(same_models(ctx, net, other, again));
    CHECK_OK(ctx, save(net, "kept"));
    same &= CHECK(as_kept(other, again));
    if (!same) printf("    policy %d %d %d %d\n", policy.param, policy.compute, policy.output, policy.master);
    mpt_model_free(net), mpt_model_free(again);
    mpt_close(ctx), mpt_close(other);
    ram_clear();
}

static void test_resumes(int (*layers)(mpt_model *)) {
    int level, type, master;
    for (type = MPT_F16; type <= MPT_BF16; type++) {
        for (level = MPT_O0; level <= MPT_O3; level++)
            test_resume(layers, mpt_policy_preset((mpt_level)level, (mpt_dtype)type));
        for (master = MPT_MASTER_SPLIT; master <= MPT_MASTER_STOCHASTIC; master++) {
            mpt_policy policy = mpt_policy_preset(MPT_O2, (mpt_dtype)type);
            policy.master = (mpt_master)master;
            if (master != MPT_MASTER_SPLIT || type == MPT_BF16) test_resume(layers, policy);
        }
    }
}

/* A checkpoint forgets a forward pass, as it forgets the model that made it. */
static void test_forgotten_pass(mpt_context *ctx) {
    const mpt_train_desc train = training();
    mpt_model *net = build(ctx, mlp, mpt_policy_preset(MPT_O0, MPT_F32), &train);
    float x[BATCH * FEATURES];
    int32_t y[BATCH] = {0, 1, 2, 0, 1, 2};
    test_floats(x, BATCH * FEATURES, -1, 1, 1);
    CHECK_OK(ctx, save(net, "kept"));
    CHECK_OK(ctx, mpt_forward(net, x, y, BATCH));
    CHECK_OK(ctx, load(net, "kept"));
    CHECK_ERROR(ctx, mpt_backward(net), MPT_ERROR_ORDER, "forward");
    step(ctx, net, 1, 0);
    mpt_model_free(net);
    ram_clear();
}

/* ==== WEIGHTS ==== */

/* Into another policy and seed: the same numbers, rounded as types say; moments and counters stay. */
static void test_weights(mpt_context *ctx, mpt_dtype type, mpt_policy policy) {
    mpt_train_desc train = training();
    mpt_model *net = build(ctx, cnn, mpt_policy_preset(MPT_O0, MPT_F32), &train), *other;
    size_t count = mpt_params_count(mpt_model_params(net), 0), i;
    float *x = (float *)test_memory(count * sizeof *x), *y = (float *)test_memory(count * sizeof *y);
    const int exact = policy.master == MPT_MASTER_F32;
    const double unit = (type == MPT_F32 ? 0 : test_unit(type)) + (exact ? 0 : test_unit(policy.param));
    double *want = test_doubles(count), *have = test_doubles(count), *tolerance = test_doubles(count);
    train.seed = 8;
    other = build(ctx, cnn, policy, &train);
    for (i = 1; i <= 3; i++) step(ctx, net, i, 0);
    step(ctx, other, 9, 0);
    CHECK_OK(ctx, save_weights(net, "weights", type));
    CHECK_OK(ctx, load_weights(other, "weights"));
    CHECK_EQUAL(mpt_steps_applied(other), 1);
    CHECK_OK(ctx, mpt_params_get(mpt_model_params(net), 0, x));
    CHECK_OK(ctx, mpt_params_get(mpt_model_params(other), 0, y));
    for (i = 0; i < count; i++) {
        want[i] = (double)x[i], have[i] = (double)y[i];
        tolerance[i] = unit > 0 ? 1.01 * unit * fabs(want[i]) + ldexp(1, -25) : 0; /* fp16's smallest gap */
    }
    CHECK_ALL(have, count, want, tolerance);
    for (i = 1; i <= (size_t)mpt_model_nodes(net); i++) {
        mpt_node_info info;
        CHECK_OK(ctx, mpt_model_node(net, (int)i, &info));
        if (!mpt_model_running(net, (int)i)) continue;
        CHECK_OK(ctx, mpt_download(ctx, x, mpt_model_running(net, (int)i), 2 * (size_t)info.C * sizeof *x));
        CHECK_OK(ctx, mpt_download(ctx, y, mpt_model_running(other, (int)i), 2 * (size_t)info.C * sizeof *y));
        CHECK(memcmp(x, y, 2 * (size_t)info.C * sizeof *x) == 0);
    }
    mpt_model_free(net), mpt_model_free(other);
    free(x), free(y), free(want), free(have), free(tolerance);
    ram_clear();
}

static void test_all_weights(mpt_context *ctx) {
    mpt_policy policy = mpt_policy_preset(MPT_O2, MPT_BF16);
    int type, master;
    for (type = MPT_F32; type <= MPT_BF16; type++) {
        test_weights(ctx, (mpt_dtype)type, mpt_policy_preset(MPT_O0, MPT_F32));
        test_weights(ctx, (mpt_dtype)type, mpt_policy_preset(MPT_O1, MPT_F16));
        for (master = MPT_MASTER_F32; master <= MPT_MASTER_STOCHASTIC; master++) {
            policy.master = (mpt_master)master;
            test_weights(ctx, (mpt_dtype)type, policy);
        }
    }
}

/* A checkpoint is a file of weights, too. */
static void test_weights_of_checkpoint(mpt_context *ctx) {
    const mpt_train_desc train = training();
    mpt_model *net = build(ctx, cnn, mpt_policy_preset(MPT_O2, MPT_BF16), &train);
    mpt_model *other = build(ctx, cnn, mpt_policy_preset(MPT_O1, MPT_BF16), &train);
    const size_t count = mpt_params_count(mpt_model_params(net), 0);
    float *x = (float *)test_memory(count * sizeof *x), *y = (float *)test_memory(count * sizeof *y);
    step(ctx, net, 1, 0);
    CHECK_OK(ctx, save(net, "kept"));
    CHECK_OK(ctx, load_weights(other, "kept"));
    CHECK_OK(ctx, mpt_params_get(mpt_model_params(net), 0, x));
    CHECK_OK(ctx, mpt_params_get(mpt_model_params(other), 0, y));
    CHECK(memcmp(x, y, count * sizeof *x) == 0);
    CHECK_ERROR(ctx, load(other, "kept"), MPT_ERROR_VALUE, "param");
    mpt_model_free(net), mpt_model_free(other);
    free(x), free(y);
    ram_clear();
}

/* ==== BYTES ==== */

/* Elements where PyTorch has them: of a linear layer on an image, of a convolution in groups. */
static void test_layout(mpt_context *ctx) {
    const mpt_train_desc train = training();
    mpt_model *net = build(ctx, mlp, mpt_policy_preset(MPT_O0, MPT_F32), &train);
    float w[9 * FEATURES];
    size_t i, k, c, header, wrong = 0;
    const slot *file;
    for (i = 0; i < 9 * FEATURES; i++) w[i] = (float)i;
    CHECK_OK(ctx, mpt_params_set(mpt_model_params(net), 1, w));
    CHECK_OK(ctx, save_weights(net, "weights", MPT_F32));
    file = ram_find("weights");
    header = (size_t)file->bytes[0] | (size_t)file->bytes[1] << 8;
    CHECK(header % 8 == 0);
    CHECK(memcmp(file->bytes + 2, "\0\0\0\0\0\0", 6) == 0);
    CHECK(strstr((const char *)file->bytes + 8, "\"linear1.weight\":{\"dtype\":\"F32\",\"shape\":[9,32],\"data_offsets"
                                                "\":[0,1152]}") != NULL);
    for (k = 0; k < 9; k++)
        for (c = 0; c < 2; c++)
            for (i = 0; i < 16; i++) { /* file [k][c][pixel] */
                const unsigned char *at = file->bytes + 8 + header + 4 * (k * FEATURES + c * 16 + i);
                const uint32_t bits =
                    (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
                wrong += bits != test_bits(w[k * FEATURES + i * 2 + c]);
            }
    CHECK_EQUAL(wrong, 0);
    mpt_model_free(net);
    ram_clear();
}

/* Names that a file cannot have. */
static void test_names(mpt_context *ctx) {
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F32));
    mpt_linear_desc a = MPT_ZERO, b = MPT_ZERO;
    a.name = "with blanks, {brackets} and 31 c", b.name = "mpt"; /* one too long: 32 */
    CHECK(mpt_linear(net, mpt_input(net, 1, 1, 2), 2, &a) == 0);
    mpt_model_free(net);
    net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F32));
    a.name = "with blanks, {brackets}: ~!";
    mpt_mse(net, mpt_linear(net, mpt_linear(net, mpt_input(net, 1, 1, 2), 2, &a), 1, &b), NULL);
    CHECK_OK(ctx, mpt_model_build(net, NULL));
    CHECK_OK(ctx, save(net, "net"));
    CHECK_OK(ctx, load(net, "net"));
    CHECK_OK(ctx, load_weights(net, "net"));
    mpt_model_free(net);
    ram_clear();
}

/* ==== WHAT PYTORCH WOULD COMPUTE ==== */

/* On a flattened image of 2 x 3 pixels and 4 channels: something that PyTorch has another order for */
static mpt_model *flat_net(mpt_context *ctx, int which) {
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F32));
    mpt_conv2d_desc d = MPT_ZERO;
    int f = mpt_flatten(net, mpt_input(net, 2, 3, 4)), h = f;
    d.groups = 2;
    if (which == 0) h = mpt_linear(net, f, 5, NULL);
    if (which == 1) h = mpt_conv2d(net, f, 5, 1, NULL);
    if (which == 2) h = mpt_linear(net, mpt_avg_pool2d(net, f, 1, NULL), 5, NULL);
    if (which == 3) h = mpt_linear(net, mpt_add(net, f, mpt_relu(net, f)), 5, NULL);
    if (which == 4) h = mpt_linear(net, mpt_group_norm(net, f, 1, NULL), 5, NULL);
    if (which == 5) h = mpt_linear(net, mpt_concat(net, f, mpt_linear(net, f, 24, NULL)), 5, NULL);
    if (which == 6) h = mpt_add(net, f, mpt_linear(net, f, 24, NULL));
    if (which == 7) h = mpt_group_norm(net, f, 2, NULL);
    if (which == 8) h = mpt_conv2d(net, f, 4, 1, &d);
    if (which == 9) h = mpt_add(net, mpt_concat(net, f, f), mpt_linear(net, f, 48, NULL));
    mpt_mse(net, h, NULL);
    CHECK_OK(ctx, mpt_model_build(net, NULL));
    return net;
}

/* Which floats a file has for the layer's first row, as indices of the model's own order */
static void first_row(mpt_context *ctx, mpt_model *net, int tensor, float *row) {
    const size_t count = mpt_params_count(mpt_model_params(net), tensor);
    float *w = (float *)test_memory(count * sizeof *w);
    const slot *file;
    size_t i, header, at;
    int t;
    for (t = 1; t <= mpt_params_tensors(mpt_model_params(net)); t++) {
        const size_t n = mpt_params_count(mpt_model_params(net), t);
        float *v = (float *)test_memory(n * sizeof *v);
        for (i = 0; i < n; i++) v[i] = t == tensor ? (float)i : -1.0f;
        CHECK_OK(ctx, mpt_params_set(mpt_model_params(net), t, v));
        free(v);
    }
    CHECK_OK(ctx, save_weights(net, "weights", MPT_F32));
    file = ram_find("weights");
    header = 8 + ((size_t)file->bytes[0] | (size_t)file->bytes[1] << 8);
    for (at = header; test_float((uint32_t)mpt__get_bytes(file->bytes + at, 4)) < 0; at += 4) {}
    for (i = 0; i < 24; i++) row[i] = test_float((uint32_t)mpt__get_bytes(file->bytes + at + 4 * i, 4));
    free(w);
}

static void test_orders(mpt_context *ctx) {
    static const char *const refused[] = {"add1", "group_norm1", "conv1", "add1"};
    float row[24];
    int which, i;
    for (which = 0; which < 6; which++) { /* element c, h, w of the file is h, w, c of the model */
        mpt_model *net = flat_net(ctx, which);
        first_row(ctx, net, which == 4 ? 3 : which == 5 ? 3 : 1, row);
        for (i = 0; i < 24; i++) CHECK_EQUAL(row[i], i % 6 * 4 + i / 6);
        CHECK_OK(ctx, load_weights(net, "weights"));
        mpt_model_free(net);
    }
    for (which = 6; which < 10; which++) {
        mpt_model *net = flat_net(ctx, which);
        ram_clear();
        CHECK_ERROR(ctx, save_weights(net, "weights", MPT_F32), MPT_ERROR_UNSUPPORTED, refused[which - 6]);
        CHECK(!ram_find("weights") && !ram_find("weights.tmp"));
        CHECK_OK(ctx, save(net, "net")); /* is for mpt */
        CHECK_OK(ctx, load(net, "net"));
        CHECK_ERROR(ctx, load_weights(net, "net"), MPT_ERROR_UNSUPPORTED, refused[which - 6]);
        mpt_model_free(net);
    }
    ram_clear();
}

/* A value that the file's type does not hold is told, and no file is written. */
static void test_too_large(mpt_context *ctx) {
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F32));
    const float w[2] = {1, 1e5f}, inf[2] = {1, test_float(0x7f800000u)};
    mpt_mse(net, mpt_linear(net, mpt_input(net, 1, 1, 2), 1, NULL), NULL);
    CHECK_OK(ctx, mpt_model_build(net, NULL));
    CHECK_OK(ctx, mpt_params_set(mpt_model_params(net), 1, w));
    CHECK_ERROR(ctx, save_weights(net, "net", MPT_F16), MPT_ERROR_VALUE, "linear1.weight");
    CHECK(!ram_find("net") && !ram_find("net.tmp"));
    CHECK_OK(ctx, save_weights(net, "net", MPT_BF16));
    CHECK_OK(ctx, mpt_params_set(mpt_model_params(net), 1, inf));
    CHECK_OK(ctx, save_weights(net, "net", MPT_F16)); /* inf it was before */
    mpt_model_free(net);
    ram_clear();
}

/* ==== FAULTS ==== */

/* Every call of the disk fails in turn, then every allocation: the old file stays, nothing else does; the model stays.
 */
static void test_faults(test_counter *counter, mpt_context *ctx, mpt_model *net, int full) {
    static const char old[] = "an older file";
    long n;
    int memory, ok;
    for (memory = 0; memory < 2; memory++) {
        for (n = 1, ok = 0; !ok; n++) {
            long *fail_at = memory ? &counter->fail_at : &ram.fail_at;
            mpt_result r;
            ram_put("net", old, sizeof old);
            *fail_at = n + (memory ? counter->calls : 0);
            ram.calls = 0;
            r = full ? save(net, "net") : save_weights(net, "net", MPT_F16);
            *fail_at = 0;
            ok = r == MPT_OK;
            if (!ok) {
                CHECK(r == (memory ? MPT_ERROR_NO_MEMORY : MPT_ERROR_FILE));
                CHECK(ram_find("net")->size == sizeof old && !memcmp(ram_find("net")->bytes, old, sizeof old));
            }
            CHECK(!ram_find("net.tmp") && !ram.file);
        }
        CHECK(n > 5);
        for (n = 1, ok = 0; !ok; n++) {
            long *fail_at = memory ? &counter->fail_at : &ram.fail_at;
            mpt_result r;
            step(ctx, net, (uint64_t)n, 0);
            CHECK_OK(ctx, save(net, "kept"));
            *fail_at = n + (memory ? counter->calls : 0);
            ram.calls = 0;
            r = full ? load(net, "net") : load_weights(net, "net");
            *fail_at = 0;
            ok = r == MPT_OK || (!memory && ram.calls < n);
            if (r != MPT_OK) CHECK(r == (memory ? MPT_ERROR_NO_MEMORY : MPT_ERROR_FILE));
            if (r != MPT_OK) CHECK(as_kept(ctx, net));
            CHECK(!ram.file);
        }
        CHECK(n > 4);
    }
}

static void test_all_faults(void) {
    const mpt_train_desc train = training();
    test_counter counter;
    mpt_context_desc desc = test_counting(&counter, 1);
    mpt_context *ctx = test_open(&desc);
    mpt_policy policy = mpt_policy_preset(MPT_O2, MPT_BF16);
    int full;
    for (full = 0; full < 2; full++) {
        mpt_model *net;
        policy.master = full ? MPT_MASTER_KAHAN : MPT_MASTER_F32;
        net = build(ctx, cnn, policy, &train);
        test_faults(&counter, ctx, net, full);
        mpt_model_free(net);
        ram_clear();
    }
    mpt_close(ctx);
    CHECK(test_counter_clean(&counter));
}

/* ==== DAMAGE ==== */

/* The file "net" is tried: it is refused for a reason and the model stays, or the model is what the file "saved"
   has. */
static void try_damaged(mpt_context *ctx, mpt_model *net, long *seen) {
    const mpt_result r = load(net, "net");
    const slot *saved = ram_find("saved"), *kept = ram_find("kept");
    seen[r]++;
    if (r == MPT_OK) {
        CHECK_OK(ctx, save(net, "net"));
        CHECK(ram_find("net")->size == saved->size && !memcmp(ram_find("net")->bytes, saved->bytes, saved->size));
        ram_put("net", kept->bytes, kept->size);
        CHECK_OK(ctx, load(net, "net"));
    } else if (!as_kept(ctx, net)) CHECK(0 && "a refused file has changed the model");
}

/* A small checkpoint cut off at every byte, and with every byte changed; the model has trained on and must not notice.
 */
static void test_damage(mpt_context *ctx) {
    static const unsigned char flips[] = {0x01, 0x80, 0xff, 0x22};
    mpt_train_desc train = training();
    mpt_model *net;
    long seen[MPT_RESULT_COUNT];
    const float x[4] = {1, 2, 3, 4}, y[2] = {1, -1};
    size_t size, i, f;
    train.batch = 2;
    memset(seen, 0, sizeof seen);
    net = build(ctx, tiny, mpt_policy_preset(MPT_O2, MPT_F16), &train);
    CHECK_OK(ctx, mpt_train_step(net, x, y));
    CHECK_OK(ctx, save(net, "saved"));
    CHECK_OK(ctx, mpt_train_step(net, x, y));
    CHECK_OK(ctx, save(net, "kept"));
    size = ram_find("saved")->size;
    for (i = 0; i < size; i++) {
        ram_put("net", ram_find("saved")->bytes, i);
        try_damaged(ctx, net, seen);
    }
    CHECK_EQUAL(seen[MPT_ERROR_FILE], size);
    for (i = 0; i < size; i++)
        for (f = 0; f < sizeof flips; f++) {
            ram_put("net", ram_find("saved")->bytes, size);
            ram_find("net")->bytes[i] ^= flips[f];
            try_damaged(ctx, net, seen);
        }
    CHECK(seen[MPT_OK] > 0 && seen[MPT_OK] < 64); /* in the text of the metadata and between tokens */
    CHECK(seen[MPT_ERROR_SHAPE] && seen[MPT_ERROR_UNSUPPORTED]);
    CHECK_EQUAL(seen[MPT_ERROR_NO_MEMORY] + seen[MPT_ERROR_ARGUMENT] + seen[MPT_ERROR_ORDER], 0);
    mpt_model_free(net);
    ram_clear();
}

typedef struct hostile {
    const char *header;
    size_t data; /* bytes */
    mpt_result result;
    const char *word; /* in the reason */
} hostile;

#define W "\"linear1.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[0,8]}"
#define B "\"linear1.bias\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]}"
#define X(dtype, shape, from, to) \
    "\"x\":{\"dtype\":\"" dtype "\",\"shape\":[" shape "],\"data_offsets\":[" from "," to "]}"

static const hostile headers[] = {
    /* what is right */
    {"{" W "," B "}", 12, MPT_OK, ""},
    {"{" B "," W "}   ", 12, MPT_OK, ""},
    {"{ \"__metadata__\" : { \"a\" : \"\\\"\\\\\\u00e4{[\" , \"b\":\"\"} ,\t" W ",\r\n" B "\n}", 12, MPT_OK, ""},
    {"{" W "," B ",\"__metadata__\":{}}", 12, MPT_OK, ""},
    {"{\"linear1.weight\":{\"data_offsets\":[0,8],\"shape\":[1,2],\"dtype\":\"F32\"}," B "}", 12, MPT_OK, ""},
    {"{" W "," B ",\"n.num_batches_tracked\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[12,20]}}", 20, MPT_OK,
     ""},
    {"{" W "," B ",\"mpt.x\":{\"dtype\":\"BOOL\",\"shape\":[0,9],\"data_offsets\":[12,12]}}", 12, MPT_OK, ""},
    {" \t\r\n{" W "," B "}", 12, MPT_OK, ""},
    {"{\"\\u006cinear1.w\\u0065ight\":{\"d\\u0074ype\":\"\\u00463\\u0032\",\"shape\":[1,2],\"data_offsets\":[0,8]}," B
     ",\"__metadata__\":null}",
     12, MPT_OK, ""},
    {"{\"linear1.weight\":{\"note\":[{},[],{\"a\":[-1.5e+3,{\"b\":null}],\"c\":\"\\\"}\"},true],\"dtype\":\"F32\","
     "\"x\":0,"
     "\"shape\":[1,2],\"data_offsets\":[0,8],\"y\":false}," B "}",
     12, MPT_OK, ""},
    {"{\"__metadata__\":{\"gr\xc3\xb6\xc3\x9f\":\"\\ud83d\\ude00\xf0\x9f\x98\x80\\/\"}," W "," B "}", 12, MPT_OK, ""},
    /* text */
    {"{\"\xff\":{}," W "," B "}", 12, MPT_ERROR_FILE, "UTF"},
    {"{\"__metadata__\":{\"a\":\"\xc0\xaf\"}," W "," B "}", 12, MPT_ERROR_FILE, "UTF"},
    {"{\"__metadata__\":{\"a\":\"\xed\xa0\x80\"}," W "," B "}", 12, MPT_ERROR_FILE, "UTF"},
    {"{\"__metadata__\":{\"a\":\"\xf4\x90\x80\x80\"}," W "," B "}", 12, MPT_ERROR_FILE, "UTF"},
    {"{\"__metadata__\":{\"a\":\"\xe2\x82\"}," W "," B "}", 12, MPT_ERROR_FILE, "UTF"},
    {"{\"__metadata__\":{\"a\":\"\\ud800\"}," W "," B "}", 12, MPT_ERROR_FILE, "surrogates"},
    {"{\"__metadata__\":{\"a\":\"\\ud800\\u0041\"}," W "," B "}", 12, MPT_ERROR_FILE, "surrogates"},
    {"{\"__metadata__\":{\"a\":\"\\udc00\"}," W "," B "}", 12, MPT_ERROR_FILE, "surrogates"},
    {"{\"__metadata__\":{\"a\":\"\\u12g4\"}," W "," B "}", 12, MPT_ERROR_FILE, "escape"},
    {"{\"__metadata__\":{\"a\":\"\\x\"}," W "," B "}", 12, MPT_ERROR_FILE, "escape"},
    {"{\"linear1.weight\\u0000\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[0,8]}," B "}", 12, MPT_ERROR_FILE,
     "escape"},
    /* values that mean nothing */
    {"{\"x\":{\"n\":01}}", 0, MPT_ERROR_FILE, "want"},
    {"{\"x\":{\"n\":1.}}", 0, MPT_ERROR_FILE, "want"},
    {"{\"x\":{\"n\":nul}}", 0, MPT_ERROR_FILE, "want"},
    {"{\"x\":{\"n\":[1,]}}", 0, MPT_ERROR_FILE, "want"},
    {"{\"x\":{\"n\":[1}}}", 0, MPT_ERROR_FILE, "want"},
    {"{\"x\":{\"n\":{\"a\" 1}}}", 0, MPT_ERROR_FILE, "want"},
    {"{\"x\":{\"n\":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", 0, MPT_ERROR_FILE, "64"},
    /* grammar */
    {"", 0, MPT_ERROR_FILE, "want"},
    {"[" W "," B "]", 12, MPT_ERROR_FILE, "want"},
    {"{" W "," B, 12, MPT_ERROR_FILE, "want"},
    {"{" W "," B ",}", 12, MPT_ERROR_FILE, "want"},
    {"{" W B "}", 12, MPT_ERROR_FILE, "want"},
    {"{" W "," B "}}", 12, MPT_ERROR_FILE, "end"},
    {"{" W "," B "} x", 12, MPT_ERROR_FILE, "end"},
    {"{\"linear1.weight\":[[[[[[[[]]]]]]]]," B "}", 12, MPT_ERROR_FILE, "want"},
    {"{\"linear1.weight\":{\"a\":{\"b\":{\"c\":{}}}}," B "}", 12, MPT_ERROR_FILE, "without"},
    {"{\"linear1.weight\":{}," B "}", 12, MPT_ERROR_FILE, "want"},
    {"{\"linear1.weight\":null," B "}", 12, MPT_ERROR_FILE, "want"},
    {"{\"a\\", 0, MPT_ERROR_FILE, "escape"},
    {"{\"a\\\"", 0, MPT_ERROR_FILE, "control"},
    {"{\"a\tb\":1}", 0, MPT_ERROR_FILE, "control"},
    {"{\"__metadata__\":{\"a\":1}," W "," B "}", 12, MPT_ERROR_FILE, "want"},
    {"{\"__metadata__\":{},\"__metadata__\":{}," W "," B "}", 12, MPT_ERROR_FILE, "twice"},
    /* members of a tensor */
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, MPT_ERROR_FILE, "without"},
    {"{\"x\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", 8, MPT_ERROR_FILE, "without"},
    {"{\"x\":{\"shape\":[2],\"data_offsets\":[0,8]}}", 8, MPT_ERROR_FILE, "without"},
    {"{\"x\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, MPT_ERROR_FILE, "twice"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"shape\":[2],\"data_offsets\":[0,8]}}", 8, MPT_ERROR_FILE, "twice"},
    {"{\"x\":{\"dtype\":\"F32\",\"strides\":[2],\"data_offsets\":[0,8]}}", 8, MPT_ERROR_FILE, "without"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0]}}", 8, MPT_ERROR_FILE, "places"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,8]}}", 8, MPT_ERROR_FILE, "many"},
    {"{" X("F33", "2", "0", "8") "}", 8, MPT_ERROR_UNSUPPORTED, "F33"},
    {"{" X("", "2", "0", "8") "}", 8, MPT_ERROR_UNSUPPORTED, "x"},
    {"{" X("F32", "1,1,1,1,1,1,1,1,2", "0", "8") "}", 8, MPT_ERROR_FILE, "many"},
    /* numbers */
    {"{" X("F32", "-2", "0", "8") "}", 8, MPT_ERROR_FILE, "whole"},
    {"{" X("F32", "02", "0", "8") "}", 8, MPT_ERROR_FILE, "whole"},
    {"{" X("F32", "2.0", "0", "8") "}", 8, MPT_ERROR_FILE, "want"},
    {"{" X("F32", "2e0", "0", "8") "}", 8, MPT_ERROR_FILE, "want"},
    {"{" X("F32", "\"2\"", "0", "8") "}", 8, MPT_ERROR_FILE, "whole"},
    {"{" X("F32", "2,", "0", "8") "}", 8, MPT_ERROR_FILE, "whole"},
    {"{" X("F32", "18446744073709551616", "0", "8") "}", 8, MPT_ERROR_FILE, "64"},
    {"{" X("F32", "99999999999999999999999", "0", "8") "}", 8, MPT_ERROR_FILE, "64"},
    /* sizes and places */
    {"{" X("F32", "3", "0", "8") "}", 8, MPT_ERROR_FILE, "12"},
    {"{" X("F32", "2", "8", "0") "}", 8, MPT_ERROR_FILE, "8"},
    {"{" X("F32", "2", "1", "9") "}", 9, MPT_ERROR_FILE, "starts"},
    {"{" X("F32", "2", "0", "8") "}", 9, MPT_ERROR_FILE, "follow"},
    {"{" X("F32", "2", "0", "8") "}", 7, MPT_ERROR_FILE, "follow"},
    {"{" X("F32", "4611686018427387904", "0", "0") "}", 0, MPT_ERROR_FILE, "overflows"},
    {"{" X("F32", "4294967296,4294967296", "0", "0") "}", 0, MPT_ERROR_FILE, "overflows"},
    {"{" X("F32", "18446744073709551615,0", "0", "0") "}", 0, MPT_ERROR_SHAPE, "missing"},
    {"{" X("U8", "18446744073709551615", "1", "0") "}", 0, MPT_ERROR_FILE, "lies"},
    {"{" X("U8", "8", "18446744073709551608", "0") "}", 8, MPT_ERROR_FILE, "lies"},
    {"{" W ",\"linear1.bias\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8, MPT_ERROR_FILE, "starts"},
    {"{" W ",\"linear1.bias\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[12,16]}}", 16, MPT_ERROR_FILE,
     "starts"},
    {"{}", 4, MPT_ERROR_FILE, "4"},
    /* names */
    {"{" W "," B ",\"linear1.bias\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[12,16]}}", 16, MPT_ERROR_FILE,
     "two"},
    {"{" W "," B ",\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[12,16]}}", 16, MPT_ERROR_SHAPE, "x"},
    {"{" W "}", 8, MPT_ERROR_SHAPE, "missing"},
    {"{}", 0, MPT_ERROR_SHAPE, "missing"},
    {"{\"linear1.weight\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}," B "}", 12, MPT_ERROR_SHAPE,
     "weight"},
    {"{\"linear1.weight\":{\"dtype\":\"F32\",\"shape\":[2,1],\"data_offsets\":[0,8]}," B "}", 12, MPT_ERROR_SHAPE,
     "weight"},
    {"{\"linear1.weight\":{\"dtype\":\"F32\",\"shape\":[1,2,1],\"data_offsets\":[0,8]}," B "}", 12, MPT_ERROR_SHAPE,
     "weight"},
    {"{\"linear1.weight\":{\"dtype\":\"I32\",\"shape\":[1,2],\"data_offsets\":[0,8]}," B "}", 12, MPT_ERROR_TYPE,
     "I32"},
};
#undef W
#undef B
#undef X

static void put_header(const char *header, uint64_t length, size_t data) {
    const size_t text = strlen(header);
    unsigned char *bytes = (unsigned char *)test_memory(8 + text + data);
    int i;
    for (i = 0; i < 8; i++) bytes[i] = (unsigned char)(length >> 8 * i);
    memcpy(bytes + 8, header, text);
    ram_put("net", bytes, 8 + text + data);
    free(bytes);
}

enum { MANY = 3001 };

/* Many tensors whose places are in no order; then one of them in another's place. */
static void test_many(mpt_context *ctx, mpt_model *net) {
    char *text = (char *)test_memory(MANY * 80), *at = text;
    unsigned long i;
    for (i = 0; i < MANY; i++) {
        const unsigned long place = i * 1931 % MANY;
        at += sprintf(at, "%c\"mpt.%lu\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[%lu,%lu]}", i ? ',' : '{', i,
                      place, place + 1);
    }
    *at = '}';
    put_header(text, strlen(text), MANY);
    CHECK_ERROR(ctx, load_weights(net, "net"), MPT_ERROR_SHAPE, "missing");
    memcpy(strstr(text, "[1931,1932]"), "[1930,1931]", 11);
    put_header(text, strlen(text), MANY);
    CHECK_ERROR(ctx, load_weights(net, "net"), MPT_ERROR_FILE, "1930");
    free(text);
}

static void test_hostile(mpt_context *ctx) {
    static const uint64_t lengths[] = {3, 100000001, 0x7fffffffffffffffu, 0xffffffffffffffffu};
    const mpt_train_desc train = training();
    mpt_model *net = build(ctx, tiny, mpt_policy_preset(MPT_O0, MPT_F32), &train);
    size_t i;
    CHECK_OK(ctx, save(net, "kept"));
    for (i = 0; i < sizeof headers / sizeof *headers; i++) {
        const hostile *h = &headers[i];
        put_header(h->header, strlen(h->header), h->data);
        if (h->result == MPT_OK) CHECK_OK(ctx, load_weights(net, "net"));
        else if (!CHECK_ERROR(ctx, load_weights(net, "net"), h->result, h->word)) printf("    %s\n", h->header);
        if (h->result == MPT_OK) CHECK_OK(ctx, load(net, "kept"));
        CHECK(as_kept(ctx, net));
    }
    for (i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        put_header("{}", lengths[i], 0);
        CHECK_ERROR(ctx, load_weights(net, "net"), MPT_ERROR_FILE, "header");
    }
    ram.claimed = 1000000000;
    put_header("{}", 100000001, 0);
    CHECK_ERROR(ctx, load_weights(net, "net"), MPT_ERROR_FILE, "most");
    ram.claimed = 0;
    test_many(ctx, net);
    CHECK(as_kept(ctx, net));
    mpt_model_free(net);
    ram_clear();
}

/* Files of other kinds are called by their name. */
static void test_kinds(mpt_context *ctx) {
    static const char *const kinds[][2] = {{"PK\003\004archive/data.pkl", "zip"},
                                           {"\x80\002}q\001(X\004", "pickle"},
                                           {"version https://git-lfs.github.com/spec/v1\noid sha256:", "git"},
                                           {"<!DOCTYPE html><html>", "web"},
                                           {"<html><head>404", "web"},
                                           {"\x1f\x8b\010\010....", "gzip"}};
    const mpt_train_desc train = training();
    mpt_model *net = build(ctx, tiny, mpt_policy_preset(MPT_O0, MPT_F32), &train);
    size_t i;
    for (i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        ram_put("net", kinds[i][0], strlen(kinds[i][0]));
        CHECK_ERROR(ctx, load_weights(net, "net"), MPT_ERROR_FILE, kinds[i][1]);
    }
    mpt_model_free(net);
    ram_clear();
}

/* ==== SETTINGS ==== */

enum { SETTINGS = 24 };

/* Changes one setting; returns the word that the refusal has. */
static const char *change(mpt_train_desc *t, mpt_policy *p, int i) {
    mpt_optimizer_desc *o = &t->optimizer;
    switch (i) {
    case 0: t->seed = 8; return "seed";
    case 1: t->batch = 7; return "batch";
    case 2: t->accumulate = 2; return "accumulate";
    case 3: t->clip_norm = 0; return "clip_norm";
    case 4: o->meter = 0; return "meter";
    case 5: o->maximize = 1; return "maximize";
    case 6: o->beta1 = 0.8; return "beta1";
    case 7: o->beta2 = 0.8; return "beta2";
    case 8: o->eps = 1e-7; return "eps";
    case 9: o->schedule.steps = 21; return "steps";
    case 10: o->schedule.kind = MPT_SCHEDULE_CONSTANT; return "kind";
    case 11: o->schedule.low = 0.1; return "low";
    case 12: o->schedule.warmup = 3; return "warmup";
    case 13: o->schedule.warmup_start = 0.1; return "warmup_start";
    case 14: o->kind = MPT_ADAM; return "optimizer";
    case 15: o->momentum = 0.1; return "momentum";
    case 16: p->compute = p->param = MPT_BF16; return "param";
    case 17: p->param = MPT_F32; return "param";
    case 18: p->output = MPT_F16; return "linear2";
    case 19: t->clip_value = 1; return "clip_value";
    case 20: o->schedule.no_cycle_momentum = 1; return "no_cycle_momentum";
    case 21: o->schedule.base_momentum = 0.5; return "base_momentum";
    case 22: o->schedule.max_momentum = 0.5; return "max_momentum";
    default: p->master = MPT_MASTER_NONE; return "masters";
    }
}

static void test_settings(mpt_context *ctx) {
    const mpt_train_desc train = training();
    const mpt_policy policy = mpt_policy_preset(MPT_O2, MPT_F16);
    mpt_model *net = build(ctx, mlp, policy, &train), *other;
    int i;
    step(ctx, net, 1, 0);
    CHECK_OK(ctx, save(net, "kept"));
    for (i = 0; i < SETTINGS; i++) {
        mpt_train_desc t = train;
        mpt_policy p = policy;
        const char *word = change(&t, &p, i);
        other = build(ctx, mlp, p, &t);
        CHECK_ERROR(ctx, load(other, "kept"), i == 23 ? MPT_ERROR_TYPE : MPT_ERROR_VALUE, i == 23 ? "F16" : word);
        CHECK_EQUAL(mpt_steps_applied(other), 0);
        mpt_model_free(other);
    }
    other = build(ctx, cnn, policy, &train);
    CHECK_ERROR(ctx, load(other, "kept"), MPT_ERROR_SHAPE, "settings");
    mpt_model_free(other), mpt_model_free(net);
    ram_clear();
}

/* Every member of every layer's descriptor, changed in turn: a checkpoint of the one is none of the other. */
static mpt_model *described(mpt_context *ctx, int change, const char **word) {
    static const float weights[3] = {1, 2, 3}, others[3] = {1, 2, 4};
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F32));
    mpt_conv2d_desc conv = MPT_ZERO;
    mpt_pool2d_desc pool = MPT_ZERO;
    mpt_norm_desc norm = MPT_ZERO, batch = MPT_ZERO; /* norm has a name, to be of either kind */
    mpt_linear_desc linear = MPT_ZERO;
    mpt_loss_desc loss = MPT_ZERO;
    mpt_train_desc train = MPT_ZERO;
    int h = mpt_input(net, 9, 9, 4), g, groups = 2, average = 0, kind = 0, share = 0;
    int (*elementwise)(mpt_model * net, int in, const mpt_loss_desc *desc) = NULL;
    float p = 0.25f;
    train.batch = 4;
    conv.padding = 1;
    loss.class_weights = weights, norm.name = "norm";
    *word = "";
    switch (change) {
    case 0: break;
    case 1: conv.stride = 2, conv.padding = 5, *word = "stride"; break; /* of the same size */
    case 2: conv.dilation = 2, *word = "dilation"; break;
    case 3: conv.padding = 2, conv.dilation = 2, *word = "padding"; break;
    case 4: conv.init = MPT_INIT_ZERO, *word = "init"; break;
    case 5: groups = 4, *word = "groups"; break;
    case 6: norm.eps = 1e-3f, *word = "eps"; break;
    case 7: batch.momentum = 0.5f, *word = "momentum"; break;
    case 8: average = 1, *word = "pool_kind"; break;
    case 9: pool.stride = 1, *word = "stride"; break;
    case 10: pool.padding = 1, *word = "padding"; break;
    case 11: p = 0.5f, *word = "p"; break;
    case 12: linear.init = MPT_INIT_KAIMING_NORMAL, *word = "init"; break;
    case 13: loss.label_smoothing = 0.1f, *word = "label_smoothing"; break;
    case 14: loss.class_weights = others, *word = "class_weights"; break;
    case 15: loss.class_weights = NULL, *word = "class_weights"; break;
    case 16: loss.ignore = 1, *word = "ignore"; break;
    case 17: loss.ignore_index = 7, *word = "ignore_index"; break;
    case 18: kind = 1, *word = "norm.norm"; break;
    case 19: share = 1, *word = "in[1]"; break;
    case 20: conv.padding = 0, *word = "padding"; break;
    case 21: conv.no_bias = 1, *word = "mpt.optimizer"; break;
    case 22: linear.no_bias = 1, *word = "mpt.optimizer"; break;
    case 23: elementwise = mpt_mse, *word = "loss"; break;
    case 24: elementwise = mpt_huber, *word = "loss"; break;
    case 25: conv.kernel_w = 1, *word = "conv1.weight"; break;
    case 26: conv.stride_w = 2, conv.padding_w = 5, *word = "stride_w"; break;
    case 27: conv.dilation_w = 2, *word = "dilation_w"; break;
    case 28: conv.padding_w = -1, *word = "padding_w"; break;
    case 29: pool.window_w = 1, *word = "pool.S"; break;
    case 30: pool.stride_w = 1, *word = "stride_w"; break;
    case 31: pool.padding_w = 1, *word = "padding_w"; break;
    case 32: pool.exclude_padding = 1, *word = "exclude_padding"; break;
    case 33: conv.padding = 0, conv.same = 1, conv.dilation = 2, *word = "padding"; break;
    case 34: norm.no_affine = 1, *word = "mpt.optimizer"; break;
    default: mpt_model_free(net); return NULL;
    }
    g = mpt_conv2d(net, h, 4, 3, &conv);
    h = kind ? mpt_layer_norm(net, g, &norm) : mpt_group_norm(net, g, groups, &norm);
    h = mpt_add(net, h, share ? h : g);
    h = mpt_global_avg_pool2d(net, average ? mpt_avg_pool2d(net, h, 2, &pool) : mpt_max_pool2d(net, h, 2, &pool));
    h = mpt_dropout(net, mpt_batch_norm(net, h, &batch), p);
    h = mpt_linear(net, h, 3, &linear);
    if (elementwise) elementwise(net, h, NULL);
    else mpt_softmax_cross_entropy(net, h, &loss);
    CHECK_OK(ctx, mpt_model_build(net, &train));
    return net;
}

static void test_descriptors(mpt_context *ctx) {
    const char *word;
    mpt_model *net = described(ctx, 0, &word), *other;
    int change;
    CHECK_OK(ctx, save(net, "kept"));
    CHECK_OK(ctx, load(net, "kept"));
    for (change = 1; (other = described(ctx, change, &word)) != NULL; change++) {
        const int fewer = change == 21 || change == 22 || change == 25 || change == 34; /* elements */
        const mpt_result r = load(other, "kept");
        if (!CHECK(r == (fewer ? MPT_ERROR_SHAPE : MPT_ERROR_VALUE)) || !strstr(mpt_why(ctx), word))
            printf("    change %d: '%s' without '%s'\n", change, mpt_why(ctx), word);
        CHECK(strstr(mpt_why(ctx), word) != NULL);
        mpt_model_free(other);
    }
    CHECK(change == 35);
    mpt_model_free(net);
    ram_clear();
}

/* The same of options that not every loss has. */
static mpt_model *with_loss(mpt_context *ctx, int (*loss)(mpt_model *, int, const mpt_loss_desc *),
                            const mpt_loss_desc *desc) {
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F32));
    loss(net, mpt_linear(net, mpt_input(net, 1, 1, 2), 3, NULL), desc);
    CHECK_OK(ctx, mpt_model_build(net, NULL));
    return net;
}

static void check_option(mpt_context *ctx, int (*loss)(mpt_model *, int, const mpt_loss_desc *),
                         const mpt_loss_desc *desc, const char *word) {
    mpt_model *plain = with_loss(ctx, loss, NULL), *other = with_loss(ctx, loss, desc);
    CHECK_OK(ctx, save(plain, "kept"));
    CHECK_OK(ctx, load(plain, "kept"));
    CHECK_ERROR(ctx, load(other, "kept"), MPT_ERROR_VALUE, word);
    mpt_model_free(plain), mpt_model_free(other);
    ram_clear();
}

static void test_loss_options(mpt_context *ctx) {
    static const float weights[3] = {1, 2, 3};
    const mpt_loss_desc zero = MPT_ZERO;
    mpt_loss_desc d = MPT_ZERO;
    d.delta = 2, check_option(ctx, mpt_huber, &d, "delta");
    d = zero, d.pos_weight = weights, check_option(ctx, mpt_bce_with_logits, &d, "pos_weight");
    d = zero, d.probabilities = 1, check_option(ctx, mpt_softmax_cross_entropy, &d, "probabilities");
    d = zero, d.per_position = 1, check_option(ctx, mpt_softmax_cross_entropy, &d, "per_position");
    d = zero, d.weighted = 1, check_option(ctx, mpt_mse, &d, "weighted");
}

/* The layers' descriptors as test_descriptors knows them: with one more member they have another size, and that member
   must be compared, and changed above. */
static void test_known_members(void) {
    typedef struct { /* see unit/feeds */
        int a;
        const float *b, *c;
        int d; /* in_device: a checkpoint does not ask where inputs lie */
    } input;
    typedef struct {
        const char *name;
        int a, b, c, d, e, f, g, h, i, j;
        mpt_init init;
        mpt_tuning tuning; /* frozen: fewer moments; factors: restored with the optimizer's slices */
    } conv;
    typedef struct {
        const char *name;
        float a, b;
        int c;
        mpt_tuning tuning;
    } norm;
    typedef struct {
        int a, b, c, d, e, f;
    } pool;
    typedef struct {
        const char *name;
        int a;
        mpt_init init;
        mpt_tuning tuning;
    } linear;
    typedef struct {
        float a;
        const float *b;
        int c;
        int32_t d;
        int e;
        const float *f;
        float g;
        int h, i;
    } loss;
    typedef struct {
        int a, b;
        mpt_optimizer_desc c;
        mpt_scaler_desc d;
        double e, i;
        uint64_t f;
        double j;    /* ema_decay: may be another */
        int g, k;    /* inference, fold: has no checkpoint */
        mpt_ranks h; /* a checkpoint goes on with any number of ranks... */
        int l;       /* ...and with or without shard_optimizer */
    } train;
    typedef struct {
        mpt_optimizer_kind a;
        int b, c, d, e;
        double f, g, h, i, j, k, l;
        mpt_schedule m;
    } optimizer;
    typedef struct {
        mpt_schedule_kind a;
        uint64_t b;
        double c;
        uint64_t d;
        double e, f, g;
        int h;
        double i, j;
    } schedule;
    typedef struct {
        mpt_scaler_mode a;
        float b;
        double c, d;
        float e, f;
        int g, h, i, j, k, l, m, n;
    } scaler;
    CHECK_EQUAL(sizeof(mpt_input_desc), sizeof(input));
    CHECK_EQUAL(sizeof(mpt_conv2d_desc), sizeof(conv));
    CHECK_EQUAL(sizeof(mpt_norm_desc), sizeof(norm));
    CHECK_EQUAL(sizeof(mpt_pool2d_desc), sizeof(pool));
    CHECK_EQUAL(sizeof(mpt_linear_desc), sizeof(linear));
    CHECK_EQUAL(sizeof(mpt_loss_desc), sizeof(loss));
    CHECK_EQUAL(sizeof(mpt_train_desc), sizeof(train));
    CHECK_EQUAL(sizeof(mpt_optimizer_desc), sizeof(optimizer));
    CHECK_EQUAL(sizeof(mpt_schedule), sizeof(schedule));
    CHECK_EQUAL(sizeof(mpt_scaler_desc), sizeof(scaler));
}

/* States that no run has, in a file whose sum is right. */
static void test_states(mpt_context *ctx) {
    enum { STATES = 13 };
    static const char *const words[STATES] = {"version",        "version",         "attempts", "scale", "int",
                                              "growth_tracker", "hysteresis_left", "stuck",    "scale", "beta1_power",
                                              "moment",         "moment",          "reason"};
    /* what is put there instead, as 64-bit words; NaN as double and as float */
    static const uint64_t values[STATES] = {
        0,           0,           0, 0, 0, 0x7fffffff, (uint64_t)-5, (uint64_t)-1, 0x7fc00000u, 0x7ff8000000000000u,
        0x7fc00000u, 0xbf800000u, 77};
    const mpt_train_desc train = training();
    mpt_model *net = build(ctx, tiny, mpt_policy_preset(MPT_O0, MPT_F32), &train);
    mpt__job job = MPT_ZERO;
    size_t at[STATES], settings, optimizer, scaler, moments, header, i;
    job.net = net;
    CHECK_OK(ctx, save(net, "kept"));
    CHECK_OK(ctx, save(net, "saved"));
    job.ctx = ctx;
    CHECK_OK(ctx, mpt__state_new(&job));
    settings = 8 * mpt__state_words(&job, 0), optimizer = 8 * mpt__state_words(&job, 1);
    scaler = 8 * mpt__state_words(&job, 2), moments = 4 * (size_t)(2 + 1); /* of a weight and a bias */
    mpt__host_free(ctx, job.state);
    header = 8 + ((size_t)ram_find("kept")->bytes[0] | (size_t)ram_find("kept")->bytes[1] << 8);
    at[0] = header, at[1] = header + settings, at[2] = at[1] + 16; /* versions; attempted */
    at[3] = at[1] + optimizer + 11, at[4] = at[1] + 12;            /* exponent of the scale; upper half of found */
    at[5] = at[1] + optimizer + 16, at[6] = at[5] + 8, at[7] = at[6] + 8, at[8] = at[1] + optimizer + 8;
    at[9] = at[1] + 40, at[10] = at[1] + optimizer + scaler, at[11] = at[10] + moments;
    at[12] = at[1] + 8 * 18 + 8 * 5;
    for (i = 0; i < STATES; i++) {
        const mpt_result result = i < 2 ? MPT_ERROR_UNSUPPORTED : MPT_ERROR_FILE;
        const size_t size = ram_find("saved")->size;
        unsigned char *bytes;
        ram_put("net", ram_find("saved")->bytes, size);
        bytes = ram_find("net")->bytes;
        if (i < 5) bytes[at[i]] ^= i == 3 ? 0x80 : 0x7f; /* a scale of -1 */
        else mpt__put_bytes(bytes + at[i], values[i], i == 10 || i == 11 ? 4 : 8);
        mpt__put_bytes(bytes + size - 8, mpt__sum_bytes(0, bytes + header, size - header - 8), 8);
        CHECK_ERROR(ctx, load(net, "net"), result, words[i]);
        CHECK(as_kept(ctx, net));
    }
    mpt_model_free(net);
    ram_clear();
}

/* Running statistics that no batch has are refused from a file as they are from mpt_model_set_running. */
static void test_statistics(mpt_context *ctx) {
    static const uint32_t bad[] = {0x7fc00000u, 0xbf800000u}; /* NaN, -1 */
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F32));
    int i, h = mpt_batch_norm(net, mpt_input(net, 1, 1, 3), NULL);
    mpt_mse(net, mpt_linear(net, h, 1, NULL), NULL);
    CHECK_OK(ctx, mpt_model_build(net, NULL));
    CHECK_OK(ctx, save_weights(net, "kept", MPT_F32));
    for (i = 0; i < 2; i++) {
        const size_t size = ram_find("kept")->size;
        size_t header;
        unsigned char *bytes;
        ram_put("net", ram_find("kept")->bytes, size);
        bytes = ram_find("net")->bytes;
        header = 8 + ((size_t)bytes[0] | (size_t)bytes[1] << 8);
        mpt__put_bytes(bytes + header + 16, bad[i], 4); /* the second variance: the statistics come first */
        CHECK_ERROR(ctx, load_weights(net, "net"), MPT_ERROR_VALUE, "variance");
    }
    CHECK_OK(ctx, load_weights(net, "kept"));
    mpt_model_free(net);
    ram_clear();
}

/* A file that claims gigabytes asks for none of them: neither for a header that it does not have, nor for tensors that
   the model does not have. */
static void test_claims(void) {
    test_counter counter;
    const mpt_context_desc desc = test_counting(&counter, 1);
    mpt_context *ctx = test_open(&desc);
    const mpt_train_desc train = training();
    mpt_model *net = build(ctx, tiny, mpt_policy_preset(MPT_O0, MPT_F32), &train);
    static const char *const texts[] = {
        "{\"x\":{\"dtype\":\"F32\",\"shape\":[1073741824],\"data_offsets\":[0,4294967296]}}",
        "{\"mpt.x\":{\"dtype\":\"F32\",\"shape\":[1073741824],\"data_offsets\":[0,4294967296]}}", "x"};
    const uint64_t lengths[] = {strlen(texts[0]), strlen(texts[1]), 99999999};
    size_t i, before;
    for (i = 0; i < 3; i++) {
        put_header(texts[i], lengths[i], i < 2 ? 0 : 100000);
        ram.claimed = i < 2 ? 4294967296u : 100000000u;
        before = counter.peak = counter.bytes;
        CHECK_ERROR(ctx, load_weights(net, "net"), i < 2 ? MPT_ERROR_SHAPE : MPT_ERROR_FILE,
                    i < 2 ? "missing" : "want");
        CHECK(counter.peak - before < 65536);
    }
    ram.claimed = 0;
    mpt_model_free(net);
    mpt_close(ctx);
    CHECK(test_counter_clean(&counter));
    ram_clear();
}

/* ==== FILES IN MEMORY ==== */

/* Saved there; the caller frees it. full: a checkpoint, else weights of this type. */
static unsigned char *saved(mpt_context *ctx, mpt_model *net, int full, mpt_dtype type, size_t *size) {
    unsigned char *bytes;
    size_t again = 0;
    if (full) CHECK_OK(ctx, mpt_checkpoint_save_memory(net, NULL, 0, size));
    else CHECK_OK(ctx, mpt_weights_save_memory(net, NULL, 0, size, type));
    bytes = (unsigned char *)test_memory(*size + 1);
    bytes[*size] = 0xa5;
    if (full) CHECK_OK(ctx, mpt_checkpoint_save_memory(net, bytes, *size, &again));
    else CHECK_OK(ctx, mpt_weights_save_memory(net, bytes, *size, &again, type));
    CHECK(again == *size && bytes[*size] == 0xa5);
    return bytes;
}

static mpt_result loaded(mpt_model *net, int full, const void *bytes, size_t size) {
    return full ? mpt_checkpoint_load_memory(net, bytes, size) : mpt_weights_load_memory(net, bytes, size, NULL);
}

/* The bytes of a path, and all of what was kept, in every type. */
static void test_memory_as_path(mpt_context *ctx, mpt_policy policy) {
    const mpt_train_desc train = training();
    mpt_model *net = build(ctx, cnn, policy, &train), *other = build(ctx, cnn, policy, &train);
    int full, type;
    step(ctx, net, 1, 0);
    for (full = 0; full < 2; full++)
        for (type = MPT_F32; type <= (full ? MPT_F32 : MPT_BF16); type++) {
            size_t size;
            unsigned char *bytes = saved(ctx, net, full, (mpt_dtype)type, &size);
            const slot *s;
            CHECK_OK(ctx, full ? save(net, "path") : save_weights(net, "path", (mpt_dtype)type));
            s = ram_find("path");
            CHECK(s->size == size && memcmp(s->bytes, bytes, size) == 0);
            CHECK_OK(ctx, loaded(other, full, bytes, size));
            free(bytes);
        }
    CHECK(same_models(ctx, net, ctx, other));
    mpt_model_free(net), mpt_model_free(other);
    ram_clear();
}

/* Every beginning of a file, one byte more, and buffers that are too small. */
static void test_memory_sizes(mpt_context *ctx, int full) {
    const mpt_train_desc train = training();
    mpt_model *net = build(ctx, tiny, mpt_policy_preset(MPT_O2, MPT_F16), &train);
    size_t size, told = 1, i;
    unsigned char *bytes = saved(ctx, net, full, MPT_F32, &size), *room = (unsigned char *)test_memory(size);
    const char *call = full ? "checkpoint_load_memory" : "weights_load_memory";
    CHECK_OK(ctx, save(net, "kept"));
    for (i = 0; i <= size + 1; i++) {
        unsigned char *part = (unsigned char *)test_memory(i ? i : 1); /* of its own: reading past it would be seen */
        memcpy(part, bytes, i > size ? size : i);
        if (i != size) CHECK_ERROR(ctx, loaded(net, full, part, i), MPT_ERROR_FILE, call);
        else CHECK_OK(ctx, loaded(net, full, part, i));
        if (i % 64 == 0 || i >= size) CHECK(as_kept(ctx, net));
        free(part);
    }
    memset(room, 0xa5, size);
    for (i = 0; i < size; i++) {
        const mpt_result r = full ? mpt_checkpoint_save_memory(net, room, i, &told)
                                  : mpt_weights_save_memory(net, room, i, &told, MPT_F32);
        test_check_result(ctx, r, MPT_ERROR_ARGUMENT, __FILE__, __LINE__, "a buffer that is too small");
        CHECK_EQUAL(told, size);
    }
    test_check_reason(ctx, "capacity", __FILE__, __LINE__);
    for (i = 0; i < size && room[i] == 0xa5; i++) {}
    CHECK_EQUAL(i, size);
    CHECK_ERROR(ctx, loaded(net, full, NULL, size), MPT_ERROR_ARGUMENT, "bytes");
    free(bytes), free(room);
    mpt_model_free(net);
    ram_clear();
}

/* Every allocation fails in turn: a load changes nothing then. */
static void test_memory_faults(void) {
    test_counter counter;
    const mpt_context_desc desc = test_counting(&counter, 1);
    mpt_context *ctx = test_open(&desc);
    const mpt_train_desc train = training();
    mpt_model *net = build(ctx, cnn, mpt_policy_preset(MPT_O2, MPT_F16), &train);
    size_t size, told;
    unsigned char *bytes = saved(ctx, net, 1, MPT_F32, &size);
    mpt_result r;
    long n;
    step(ctx, net, 1, 0);
    CHECK_OK(ctx, save(net, "kept"));
    for (n = 1, r = MPT_ERROR_NO_MEMORY; r != MPT_OK; n++) {
        counter.fail_at = counter.calls + n;
        r = mpt_checkpoint_load_memory(net, bytes, size);
        counter.fail_at = 0;
        CHECK(r == MPT_OK || (r == MPT_ERROR_NO_MEMORY && as_kept(ctx, net)));
    }
    CHECK(n > 6);
    for (n = 1, r = MPT_ERROR_NO_MEMORY; r != MPT_OK; n++) {
        counter.fail_at = counter.calls + n;
        r = mpt_checkpoint_save_memory(net, bytes, size, &told);
        counter.fail_at = 0;
        CHECK(r == MPT_OK || r == MPT_ERROR_NO_MEMORY);
    }
    CHECK(n > 5);
    free(bytes);
    mpt_model_free(net);
    mpt_close(ctx);
    CHECK(test_counter_clean(&counter));
    ram_clear();
}

static void test_memory_errors(mpt_context *ctx) {
    const mpt_train_desc train = training();
    mpt_model *net = build(ctx, tiny, mpt_policy_preset(MPT_O0, MPT_F32), &train);
    mpt_model *none = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F32));
    unsigned char bytes[8] = {0}, *room;
    const float x[2] = {1, 2}, y = 1, large[2] = {1, 65520};
    size_t size;
    CHECK_ERROR(ctx, mpt_weights_save_memory(net, NULL, 0, NULL, MPT_F32), MPT_ERROR_ARGUMENT, "size");
    CHECK_ERROR(ctx, mpt_checkpoint_save_memory(net, bytes, 8, NULL), MPT_ERROR_ARGUMENT, "size");
    CHECK_ERROR(ctx, mpt_weights_save_memory(net, NULL, 0, &size, MPT_E5M2), MPT_ERROR_TYPE, "e5m2");
    CHECK_EQUAL(size, 0);
    CHECK_ERROR(ctx, mpt_checkpoint_save_memory(none, bytes, 8, &size), MPT_ERROR_ORDER, "built");
    CHECK_ERROR(ctx, mpt_weights_load_memory(none, bytes, 8, NULL), MPT_ERROR_ORDER, "built");
    CHECK(mpt_weights_load_memory(NULL, bytes, 8, NULL) == MPT_ERROR_ARGUMENT);
    CHECK_OK(ctx, mpt_forward(net, x, &y, 1));
    CHECK_OK(ctx, mpt_backward(net));
    CHECK_ERROR(ctx, mpt_checkpoint_save_memory(net, NULL, 0, &size), MPT_ERROR_ORDER, "mpt_step");
    CHECK_ERROR(ctx, mpt_weights_load_memory(net, bytes, 8, NULL), MPT_ERROR_ORDER, "mpt_step");
    mpt_model_free(net);
    net = build(ctx, tiny, mpt_policy_preset(MPT_O0, MPT_F32), &train);
    CHECK_OK(ctx, mpt_params_set(mpt_model_params(net), 1, large));
    CHECK_OK(ctx, mpt_weights_save_memory(net, NULL, 0, &size, MPT_F16));
    room = (unsigned char *)test_memory(size);
    CHECK_ERROR(ctx, mpt_weights_save_memory(net, room, size, &size, MPT_F16), MPT_ERROR_VALUE, "65520");
    free(room);
    mpt_model_free(net), mpt_model_free(none);
}

static void test_memory_files(mpt_context *ctx) {
    mpt_policy split = mpt_policy_preset(MPT_O2, MPT_BF16);
    split.master = MPT_MASTER_SPLIT;
    test_memory_as_path(ctx, mpt_policy_preset(MPT_O0, MPT_F32));
    test_memory_as_path(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
    test_memory_as_path(ctx, split);
    test_memory_sizes(ctx, 0);
    test_memory_sizes(ctx, 1);
    test_memory_faults();
    test_memory_errors(ctx);
}

/* ==== THE REAL DISK ==== */

static void test_files(mpt_context *ctx, const char *program) {
    const mpt_train_desc train = training();
    mpt_model *net = build(ctx, cnn, mpt_policy_preset(MPT_O2, MPT_F16), &train);
    mpt_model *other = build(ctx, cnn, mpt_policy_preset(MPT_O2, MPT_F16), &train),
              *none = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F32));
    char path[512], temporary[520];
    snprintf(path, sizeof path, "%s.safetensors", program);
    snprintf(temporary, sizeof temporary, "%s.tmp", path);
    step(ctx, net, 1, 0);
    CHECK_OK(ctx, mpt_weights_save(net, path, MPT_F16));
    CHECK_OK(ctx, mpt_weights_load(other, path, NULL));
    CHECK_OK(ctx, mpt_checkpoint_save(net, path));
    CHECK_OK(ctx, mpt_checkpoint_load(other, path));
    CHECK(same_models(ctx, net, ctx, other));
    CHECK(remove(path) == 0);
    CHECK(remove(temporary) != 0);
    CHECK_ERROR(ctx, mpt_checkpoint_load(net, path), MPT_ERROR_FILE, "opened");
#ifdef _WIN32 /* a folder */
    CHECK_ERROR(ctx, mpt_checkpoint_load(net, "tests"), MPT_ERROR_FILE, "opened");
#else
    CHECK_ERROR(ctx, mpt_checkpoint_load(net, "tests"), MPT_ERROR_FILE, "read");
#endif
    CHECK_ERROR(ctx, mpt_checkpoint_save(net, "tests"), MPT_ERROR_FILE, "renamed");
    CHECK(remove("tests.tmp") != 0);
    CHECK_ERROR(ctx, mpt_checkpoint_save(net, "no/such/folder"), MPT_ERROR_FILE, "opened");
    CHECK_ERROR(ctx, mpt_checkpoint_save(net, ""), MPT_ERROR_ARGUMENT, "path");
    CHECK_ERROR(ctx, mpt_weights_load(net, NULL, NULL), MPT_ERROR_ARGUMENT, "path");
    CHECK_ERROR(ctx, mpt_weights_save(net, path, MPT_E5M2), MPT_ERROR_TYPE, "e5m2");
    CHECK_ERROR(ctx, mpt_weights_save(net, path, (mpt_dtype)test_number(99)), MPT_ERROR_TYPE, "type");
    CHECK_ERROR(ctx, mpt_checkpoint_save(none, path), MPT_ERROR_ORDER, "built");
    CHECK(mpt_checkpoint_save(NULL, path) == MPT_ERROR_ARGUMENT);
    mpt_model_free(net), mpt_model_free(other), mpt_model_free(none);
}

#if defined(__unix__) && !defined(MPT_TEST_CUDA)
#include <sys/stat.h>
#include <sys/wait.h>
int mpt_test_symlink(const char *to, const char *path) __asm__("symlink"); /* which -std=c99 hides */
long mpt_test_readlink(const char *path, char *out, size_t bytes) __asm__("readlink");

/* Two processes save to one path while a third loads: each time it finds a whole file. A link stays a link, and the
   file behind it keeps its permissions. */
static void test_shared_files(mpt_context *ctx, const char *program) {
    const mpt_train_desc train = training();
    mpt_model *net = build(ctx, mlp, mpt_policy_preset(MPT_O2, MPT_F16), &train);
    char path[512], link[520], target[520] = {0};
    pid_t child[2];
    struct stat s;
    int i, j, status;
    snprintf(path, sizeof path, "%s.shared", program);
    snprintf(link, sizeof link, "%s.link", program);
    CHECK_OK(ctx, mpt_checkpoint_save(net, path));
    fflush(stdout);
    for (i = 0; i < 2; i++) {
        child[i] = fork();
        if (child[i]) continue;
        for (j = 0; j < 60; j++)
            if (mpt_checkpoint_save(net, path) != MPT_OK) _exit(1);
        _exit(0);
    }
    for (i = 0; i < 120; i++) CHECK_OK(ctx, mpt_checkpoint_load(net, path));
    for (i = 0; i < 2; i++) {
        CHECK(child[i] > 0 && waitpid(child[i], &status, 0) == child[i]);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    CHECK(chmod(path, 0640) == 0);
    remove(link);
    CHECK(mpt_test_symlink(strrchr(path, '/') ? strrchr(path, '/') + 1 : path, link) == 0);
    CHECK_OK(ctx, mpt_weights_save(net, link, MPT_F32));
    CHECK(mpt_test_readlink(link, target, sizeof target - 1) > 0);
    CHECK(stat(path, &s) == 0 && (s.st_mode & 0777) == 0640);
    CHECK_OK(ctx, mpt_weights_load(net, path, NULL)); /* what was saved through the link */
    CHECK_ERROR(ctx, mpt_checkpoint_load(net, path), MPT_ERROR_SHAPE, "missing");
    CHECK(remove(link) == 0 && remove(path) == 0);
    mpt_model_free(net);
}
#else
static void test_shared_files(mpt_context *ctx, const char *program) {
    (void)ctx, (void)program;
    test_counts.skipped++;
}
#endif

int main(int argc, char **argv) {
    mpt_context *ctx = test_open(NULL);
    test_begin(argc, argv);
    RUN_TEST(test_resumes(mlp));
    RUN_TEST(test_resumes(cnn));
    RUN_TEST(test_forgotten_pass(ctx));
    RUN_TEST(test_all_weights(ctx));
    RUN_TEST(test_weights_of_checkpoint(ctx));
    RUN_TEST(test_layout(ctx));
    RUN_TEST(test_names(ctx));
    RUN_TEST(test_orders(ctx));
    RUN_TEST(test_too_large(ctx));
    RUN_TEST(test_descriptors(ctx));
    RUN_TEST(test_loss_options(ctx));
    RUN_TEST(test_known_members());
    RUN_TEST(test_all_faults());
    RUN_TEST(test_damage(ctx));
    RUN_TEST(test_hostile(ctx));
    RUN_TEST(test_kinds(ctx));
    RUN_TEST(test_settings(ctx));
    RUN_TEST(test_states(ctx));
    RUN_TEST(test_statistics(ctx));
    RUN_TEST(test_claims());
    RUN_TEST(test_memory_files(ctx));
    RUN_TEST(test_files(ctx, argc ? argv[0] : "checkpoint"));
    RUN_TEST(test_shared_files(ctx, argc ? argv[0] : "checkpoint"));
    mpt_close(ctx);
    return test_finish("unit/checkpoint");
}
