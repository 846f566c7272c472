/* model.c - fuzzes the building of models: any layers with any numbers, then one step on any values, with an allocation
   that fails here and there. Whatever is refused has a reason, changes nothing and leaves nothing behind.

   Bytes: type, level, allocation that fails, layers with their numbers till a loss, training, inputs. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "fuzz.h"

enum { LAYERS = 12, BATCH = 3, MOST_INPUTS = 4096, MOST_BYTES = 1 << 24 };

static void *limited_alloc(size_t bytes, void *user) {
    return bytes > MOST_BYTES ? NULL : test_counter_alloc(bytes, user);
}

/* Small, and now and then impossible. */
static int number(fuzz_bytes *b, int most) {
    static const int odd[] = {0, -1, 2147483647, -2147483647, 65536, 46341, 1 << 30, 4096};
    const uint32_t x = fuzz_take(b, 256);
    return x >= 248 ? odd[x - 248] : (int)(x % (uint32_t)most) + 1;
}

static int convolution(fuzz_bytes *b, mpt_model *net, int h) {
    mpt_conv2d_desc d = MPT_ZERO;
    const int filters = number(b, 12), kernel = number(b, 5);
    d.stride = number(b, 3) - 1, d.padding = number(b, 3) - 1, d.same = (int)fuzz_take(b, 2);
    d.dilation = number(b, 3) - 1, d.groups = number(b, 4) - 1, d.no_bias = (int)fuzz_take(b, 2);
    d.init = (mpt_init)fuzz_take(b, MPT_INIT_COUNT + 1);
    d.kernel_w = number(b, 6) - 1, d.stride_w = number(b, 3) - 1, d.dilation_w = number(b, 3) - 1;
    d.padding_w = (int)fuzz_take(b, 5) - 1;
    return mpt_conv2d(net, h, filters, kernel, &d);
}

static int pool(fuzz_bytes *b, mpt_model *net, int h, int largest) {
    mpt_pool2d_desc d = MPT_ZERO;
    const int window = number(b, 4);
    d.stride = number(b, 4) - 1, d.padding = number(b, 3) - 1, d.exclude_padding = (int)fuzz_take(b, 2);
    d.window_w = number(b, 5) - 1, d.stride_w = number(b, 4) - 1, d.padding_w = (int)fuzz_take(b, 5) - 1;
    return largest ? mpt_max_pool2d(net, h, window, &d) : mpt_avg_pool2d(net, h, window, &d);
}

static mpt_policy take_policy(fuzz_bytes *b) {
    mpt_policy p = mpt_policy_preset((mpt_level)fuzz_take(b, 5), (mpt_dtype)fuzz_take(b, 6));
    if (fuzz_take(b, 4) == 0) p.master = (mpt_master)fuzz_take(b, 6);
    return p;
}

/* One more layer on node h, or beside the node `other`. */
static int layer(fuzz_bytes *b, mpt_model *net, int h, int other) {
    static int (*const plain[])(mpt_model *, int) = {mpt_relu, mpt_global_max_pool2d, mpt_tanh, mpt_sigmoid,
                                                     mpt_gelu, mpt_gelu_tanh,         mpt_silu, mpt_flatten};
    switch (fuzz_take(b, 20)) {
    case 0: return mpt_linear(net, h, number(b, 12), NULL);
    case 1: return convolution(b, net, h);
    case 2: return pool(b, net, h, 1);
    case 3: return pool(b, net, h, 0);
    case 4: return mpt_global_avg_pool2d(net, h);
    case 5: return mpt_batch_norm(net, h, NULL);
    case 6: return mpt_layer_norm(net, h, NULL);
    case 7: return mpt_group_norm(net, h, number(b, 4), NULL);
    case 8: return mpt_dropout(net, h, (float)fuzz_take(b, 12) / 10 - 0.05f);
    case 9: return mpt_add(net, h, other);
    case 10: return mpt_concat(net, h, other);
    case 11: mpt_policy_push(net, take_policy(b)); return h;
    case 12: mpt_policy_pop(net); return h;
    case 13: return other;
    case 14: return mpt_leaky_relu(net, h, (float)fuzz_take(b, 4) / 10 - 0.1f);
    case 15: return mpt_slice(net, h, number(b, 6) - 1, number(b, 6));
    case 16: return mpt_reshape(net, h, number(b, 9), number(b, 9), number(b, 9));
    case 17: return mpt_multiply(net, h, other);
    case 18: return mpt_upsample(net, h, number(b, 3));
    default: return plain[fuzz_take(b, 8)](net, h);
    }
}

/* Returns whether targets are classes. */
static int graph(fuzz_bytes *b, mpt_model *net) {
    static int (*const others[])(mpt_model *, int, const mpt_loss_desc *) = {mpt_mse, mpt_bce_with_logits, mpt_l1,
                                                                             mpt_huber};
    int ids[LAYERS + 1], count = 0, loss;
    mpt_loss_desc desc = MPT_ZERO;
    const int layers = (int)fuzz_take(b, LAYERS), H = number(b, 9), W = number(b, 9), C = number(b, 6);
    ids[count++] = mpt_input(net, H, W, C);
    while (count <= layers) {
        const int other = ids[fuzz_take(b, (uint32_t)count)];
        ids[count] = layer(b, net, ids[count - 1], other);
        count++;
    }
    loss = (int)fuzz_take(b, 8);
    desc.per_position = fuzz_take(b, 3) == 0;
    desc.weighted = fuzz_take(b, 3) == 0;
    desc.probabilities = loss >= 4 && fuzz_take(b, 3) == 0;
    if (loss < 4) others[loss](net, ids[count - 1], &desc);
    else if (loss < 7) mpt_softmax_cross_entropy(net, ids[count - 1], &desc);
    return loss >= 4 && !desc.probabilities;
}

static mpt_train_desc take_train(fuzz_bytes *b) {
    mpt_train_desc t = MPT_ZERO;
    const uint32_t kind = fuzz_take(b, 4);
    t.batch = number(b, BATCH), t.accumulate = (int)fuzz_take(b, 3);
    if (kind) t.optimizer = kind == 1 ? mpt_sgd(0.1, 0.9) : kind == 2 ? mpt_adam(0.01) : mpt_adamw(0.01);
    t.optimizer.amsgrad = fuzz_take(b, 5) == 0, t.optimizer.nesterov = fuzz_take(b, 5) == 0;
    t.scaler.mode = (mpt_scaler_mode)fuzz_take(b, 5);
    t.clip_norm = fuzz_take(b, 3) == 0;
    return t;
}

static float value(fuzz_bytes *b) {
    const uint32_t x = fuzz_take(b, 256);
    if (x >= 250) return test_float(x == 250 ? 0x7f800000u : x == 251 ? 0x7fc00000u : x == 252 ? 0x7f7fffffu : 1u);
    return ((float)x - 125) / 64;
}

/* A step that is refused leaves the parameters as they are. */
static void step(fuzz_bytes *b, mpt_context *ctx, mpt_model *net, int classes) {
    const mpt_train_desc t = mpt_model_train_desc(net);
    const size_t samples = (size_t)t.batch * (size_t)t.accumulate;
    const size_t outputs = mpt_model_outputs(net), count = mpt_params_count(mpt_model_params(net), 0);
    mpt_node_info in;
    size_t inputs, i;
    mpt_result r;
    int refused;
    float *x, *target, *weights, *before, *after;
    CHECK_OK(ctx, mpt_model_node(net, 1, &in));
    inputs = (size_t)in.H * (size_t)in.W * (size_t)in.C;
    if (samples > MOST_INPUTS || inputs > MOST_INPUTS || outputs > MOST_INPUTS || count > MOST_INPUTS) return;
    x = (float *)test_memory(samples * inputs * sizeof *x);
    target = (float *)test_memory(samples * outputs * sizeof *target);
    before = (float *)test_memory(count * sizeof *before), after = (float *)test_memory(count * sizeof *after);
    for (i = 0; i < samples * inputs; i++) x[i] = value(b);
    for (i = 0; i < samples * outputs; i++) {
        const int32_t label = number(b, (int)(outputs < 100 ? outputs : 100)) - 1;
        if (!classes) target[i] = value(b);
        else memcpy(&target[i], &label, sizeof label);
    }
    if (count) CHECK_OK(ctx, mpt_params_get(mpt_model_params(net), 0, before));
    weights = (float *)test_memory(samples * sizeof *weights);
    for (i = 0; i < samples; i++) weights[i] = value(b) + 2;
    r = mpt_sample_weights(net, weights);
    CHECK(r == MPT_OK || r == MPT_ERROR_ORDER);
    r = mpt_train_step(net, x, target);
    CHECK(r == MPT_OK || *mpt_why(ctx));
    refused = r == MPT_ERROR_VALUE || r == MPT_ERROR_ORDER; /* which it is without a loss or weights */
    CHECK(r == MPT_OK || refused || r == MPT_ERROR_DIVERGED);
    if (count) CHECK_OK(ctx, mpt_params_get(mpt_model_params(net), 0, after));
    if (r != MPT_OK || mpt_steps_applied(net) == 0) CHECK(memcmp(before, after, count * sizeof *before) == 0);
    CHECK(mpt_steps_applied(net) + mpt_steps_skipped(net) == !refused);
    free(x), free(target), free(weights), free(before), free(after);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_bytes b = {data, size};
    test_counter counter;
    mpt_context_desc desc = test_counting(&counter, 1);
    const mpt_policy policy = take_policy(&b);
    mpt_context *ctx;
    mpt_model *net;
    mpt_train_desc train;
    size_t opened;
    int classes;
    desc.alloc = limited_alloc;
    ctx = test_open(&desc);
    opened = counter.bytes;
    if (fuzz_take(&b, 4) == 0) counter.fail_at = counter.calls + 1 + (long)fuzz_take(&b, 64);
    net = mpt_model_new(ctx, policy);
    if (net) {
        classes = graph(&b, net);
        train = take_train(&b);
        if (mpt_model_build(net, &train) == MPT_OK) step(&b, ctx, net, classes);
        else CHECK(*mpt_why(ctx));
    }
    mpt_model_free(net);
    CHECK(counter.bytes == opened);
    mpt_close(ctx);
    CHECK(test_counter_clean(&counter));
    return fuzz_end();
}
