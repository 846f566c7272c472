/* feeds.c - inputs as they come: bytes with scale and shift by channel, arrays in device memory, floats that are not
   finite. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"

enum { BATCH = 6, SIDE = 7, CHANNELS = 3, PIXELS = SIDE * SIDE * CHANNELS, OUTPUTS = 4, SAMPLES = 2 * BATCH };

static const float scales[CHANNELS] = {1.0f / 51, 0.031f, -0.007f}, shifts[CHANNELS] = {-2.1f, 0.3f, 1e-3f};

typedef struct problem { /* bytes, and the floats that they stand for */
    uint8_t bytes[SAMPLES * PIXELS];
    float x[SAMPLES * PIXELS];
    int32_t label[SAMPLES];
} problem;

/* The product is rounded before the sum: two statements, and a volatile, which no compiler contracts. */
static float value_of(uint8_t byte, float scale, float shift) {
    const volatile float product = (float)byte * scale;
    return product + shift;
}

static problem problem_new(const mpt_input_desc *in) {
    problem p;
    int i;
    for (i = 0; i < SAMPLES * PIXELS; i++) {
        const int c = i % CHANNELS;
        p.bytes[i] = (uint8_t)mpt_hash(1, 0, 0, (uint64_t)i);
        p.x[i] = value_of(p.bytes[i], in->scale ? in->scale[c] : 1.0f / 255, in->shift ? in->shift[c] : 0);
    }
    for (i = 0; i < SAMPLES; i++) p.label[i] = (int32_t)(mpt_hash(3, 0, 0, (uint64_t)i) % OUTPUTS);
    return p;
}

/* A net whose first layer is a product, or a norm, which has the input in fp32. */
static mpt_model *build(mpt_context *ctx, mpt_policy policy, const mpt_input_desc *in, int norm_first, int accumulate) {
    mpt_conv2d_desc conv = MPT_ZERO;
    mpt_train_desc train = MPT_ZERO;
    mpt_model *net = mpt_model_new(ctx, policy);
    int h = mpt_input_with(net, SIDE, SIDE, CHANNELS, in);
    conv.padding = 1;
    if (norm_first) h = mpt_batch_norm(net, h, NULL);
    h = mpt_relu(net, mpt_conv2d(net, h, 5, 3, &conv));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, OUTPUTS, NULL), NULL);
    train.batch = BATCH;
    train.accumulate = accumulate;
    train.optimizer = mpt_sgd(0.05, 0.9);
    train.seed = 7;
    CHECK_OK(ctx, mpt_model_build(net, &train));
    return net;
}

/* The inputs as the descriptor has them: x is host memory, or *device, which they are uploaded to. */
static const void *given(mpt_context *ctx, const mpt_input_desc *in, const problem *p, int first, void *device) {
    const void *x = in->bytes ? (const void *)(p->bytes + first * PIXELS) : (const void *)(p->x + first * PIXELS);
    if (!in->in_device) return x;
    CHECK_OK(ctx, mpt_upload(ctx, device, x, (size_t)(SAMPLES - first) * PIXELS * (in->bytes ? 1 : sizeof(float))));
    return device;
}

/* All calls that take x do with it what they do with the floats, bit by bit. The device array is written anew for each
   step, as soon as the one before it has been asked for. */
static void test_same_bits(mpt_context *ctx, mpt_policy policy, const mpt_input_desc *in, int norm_first,
                           int accumulate) {
    const problem p = problem_new(in);
    mpt_model *net = build(ctx, policy, in, norm_first, accumulate);
    mpt_model *plain = build(ctx, policy, NULL, norm_first, accumulate);
    void *device = mpt_alloc(ctx, sizeof p.x);
    float out[SAMPLES * OUTPUTS], expected[SAMPLES * OUTPUTS];
    mpt_metrics m, n;
    int step, first, last = SAMPLES - accumulate * BATCH;
    for (step = 0; step < 5; step++) {
        first = step % (last + 1);
        CHECK_OK(ctx, mpt_train_step(net, given(ctx, in, &p, first, device), p.label + first));
        CHECK_OK(ctx, mpt_train_step(plain, p.x + first * PIXELS, p.label + first));
    }
    CHECK_EQUAL(mpt_loss(net), mpt_loss(plain));
    CHECK_OK(ctx, mpt_train_samples(net, given(ctx, in, &p, 0, device), p.label, 5));
    CHECK_OK(ctx, mpt_train_samples(plain, p.x, p.label, 5));
    CHECK(test_same_weights(ctx, net, plain));
    CHECK_OK(ctx, mpt_forward(net, given(ctx, in, &p, 0, device), p.label, BATCH));
    CHECK_OK(ctx, mpt_forward(plain, p.x, p.label, BATCH));
    CHECK_EQUAL(mpt_loss(net), mpt_loss(plain));
    CHECK_OK(ctx, mpt_zero_grad(net));
    CHECK_OK(ctx, mpt_replay(net, given(ctx, in, &p, 0, device), p.label, BATCH, 16));
    CHECK_OK(ctx, mpt_evaluate(net, given(ctx, in, &p, 0, device), p.label, SAMPLES, &m));
    CHECK_OK(ctx, mpt_zero_grad(plain));
    CHECK_OK(ctx, mpt_evaluate(plain, p.x, p.label, SAMPLES, &n));
    CHECK(memcmp(&m, &n, sizeof m) == 0);
    CHECK_OK(ctx, mpt_predict(net, given(ctx, in, &p, 0, device), SAMPLES - 1, out));
    CHECK_OK(ctx, mpt_predict(plain, p.x, SAMPLES - 1, expected));
    CHECK(memcmp(out, expected, (SAMPLES - 1) * OUTPUTS * sizeof *out) == 0);
    mpt_free(ctx, device);
    mpt_model_free(net);
    mpt_model_free(plain);
}

/* A batch of bytes takes a byte an element on its way, and scale and shift two floats a channel. */
static void test_bytes_of_bytes(mpt_context *ctx) {
    mpt_input_desc in = MPT_ZERO;
    mpt_model *net, *plain;
    mpt_memory m, n;
    in.bytes = 1;
    net = build(ctx, mpt_policy_preset(MPT_O2, MPT_F16), &in, 0, 1);
    plain = build(ctx, mpt_policy_preset(MPT_O2, MPT_F16), NULL, 0, 1);
    m = mpt_model_memory(net);
    n = mpt_model_memory(plain);
    CHECK_EQUAL(m.activations, n.activations);
    CHECK_EQUAL((double)(n.workspace - m.workspace),
                (double)(BATCH * (PIXELS - (PIXELS + 3) / 4) * 4) - 2 * CHANNELS * sizeof(float));
    mpt_model_free(net);
    mpt_model_free(plain);
}

/* A float that is not finite is told by sample and element, and changes nothing: not the loss, a forward pass that
   waits for its backward pass, the weights, nor what later steps are. */
static void test_bad_floats(mpt_context *ctx, mpt_level level, int accumulate, int at) {
    const mpt_input_desc in = MPT_ZERO;
    problem p = problem_new(&in);
    const mpt_policy policy = mpt_policy_preset(level, MPT_BF16);
    mpt_model *net = build(ctx, policy, NULL, 0, accumulate), *good = build(ctx, policy, NULL, 0, accumulate);
    const float was = p.x[at];
    char text[48];
    float out[SAMPLES * OUTPUTS];
    mpt_metrics m;
    int step;
    snprintf(text, sizeof text, "sample %d, element %d", at / PIXELS, at % PIXELS);
    for (step = 0; step < 6; step++) { /* on a device: as it comes, recorded, recorded for the other feed, replayed */
        const double loss = mpt_loss(net);
        p.x[at] = test_float(step % 2 ? 0x7fc00000u : 0xff800000u);
        CHECK_ERROR(ctx, mpt_train_step(net, p.x, p.label), MPT_ERROR_VALUE, text);
        CHECK_ERROR(ctx, mpt_train_step(net, p.x, p.label), MPT_ERROR_VALUE, text);
        CHECK_EQUAL(mpt_loss(net), loss);
        CHECK_ERROR(ctx, mpt_evaluate(net, p.x, p.label, SAMPLES, &m), MPT_ERROR_VALUE, text);
        CHECK_ERROR(ctx, mpt_predict(net, p.x, SAMPLES, out), MPT_ERROR_VALUE, text);
        p.x[at] = was;
        CHECK_OK(ctx, mpt_train_step(net, p.x, p.label));
        CHECK_OK(ctx, mpt_train_step(good, p.x, p.label));
    }
    CHECK(test_same_weights(ctx, net, good));
    CHECK_EQUAL((double)mpt_steps_applied(net), 6);
    CHECK_OK(ctx, mpt_forward(net, p.x, p.label, BATCH));
    CHECK_OK(ctx, mpt_forward(good, p.x, p.label, BATCH));
    p.x[at] = test_float(0x7f800000u);
    if (at < BATCH * PIXELS) CHECK_ERROR(ctx, mpt_forward(net, p.x, p.label, BATCH), MPT_ERROR_VALUE, text);
    CHECK_OK(ctx, mpt_backward(net));
    CHECK_OK(ctx, mpt_backward(good));
    CHECK_OK(ctx, mpt_step(mpt_model_optimizer(net)));
    CHECK_OK(ctx, mpt_step(mpt_model_optimizer(good)));
    CHECK(test_same_weights(ctx, net, good));
    mpt_model_free(net);
    mpt_model_free(good);
}

/* In device memory nobody looks: the step is skipped. */
static void test_bad_in_device(mpt_context *ctx) {
    mpt_input_desc in = MPT_ZERO;
    problem p = problem_new(&in);
    mpt_model *net;
    void *device = mpt_alloc(ctx, sizeof p.x);
    int step;
    in.in_device = 1;
    net = build(ctx, mpt_policy_preset(MPT_O2, MPT_F16), &in, 0, 1);
    for (step = 0; step < 5; step++) {
        p.x[PIXELS] = step == 3 ? test_float(0x7fc00000u) : 0;
        CHECK_OK(ctx, mpt_train_step(net, given(ctx, &in, &p, 0, device), p.label));
    }
    CHECK_EQUAL((double)mpt_steps_applied(net), 4);
    CHECK_EQUAL((double)mpt_steps_skipped(net), 1);
    mpt_free(ctx, device);
    mpt_model_free(net);
}

/* The operation by itself, at lengths and channels that nothing divides, and not at a multiple of anything. */
static void test_operation(mpt_context *ctx, size_t n, size_t C, mpt_dtype type, size_t offset) {
    test_tensor out = test_tensor_new(ctx, type, n), channels = test_tensor_new(ctx, MPT_F32, 2 * C);
    uint8_t *bytes = (uint8_t *)test_memory(n + offset), *device = (uint8_t *)mpt_alloc(ctx, n + offset);
    mpt_map_op op = MPT_ZERO;
    size_t i, wrong = 0;
    test_tensor_fill(&channels, -2, 2, 5);
    for (i = 0; i < n + offset; i++) bytes[i] = (uint8_t)mpt_hash(6, 0, 0, i);
    CHECK_OK(ctx, mpt_upload(ctx, device, bytes, n + offset));
    op.map = MPT_MAP_BYTES;
    op.n = n;
    op.a.data = device + offset;
    op.out = out.array;
    op.C = C;
    op.channels = (const float *)channels.array.data;
    test_tensor_poison(&out);
    CHECK_OK(ctx, mpt_op_map(ctx, &op));
    test_tensor_download(&out);
    for (i = 0; i < n; i++) {
        const float scale = (float)channels.value[i % C], shift = (float)channels.value[C + i % C];
        const uint32_t bits =
            mpt_narrow(value_of(bytes[offset + i], scale, shift), type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0);
        wrong += out.value[i] < (double)mpt_widen(bits, type) || out.value[i] > (double)mpt_widen(bits, type);
    }
    CHECK_EQUAL(wrong, 0);
    op.C = 0;
    CHECK_ERROR(ctx, mpt_op_map(ctx, &op), MPT_ERROR_ARGUMENT, "C");
    op.C = C;
    op.channels = NULL;
    CHECK_ERROR(ctx, mpt_op_map(ctx, &op), MPT_ERROR_ARGUMENT, "channels");
    mpt_free(ctx, device);
    free(bytes);
    test_tensor_free(&out);
    test_tensor_free(&channels);
}

static void test_errors(mpt_context *ctx) {
    const float infinite[1] = {test_float(0x7f800000u)}, huge[1] = {3e38f};
    mpt_input_desc in = MPT_ZERO, other = MPT_ZERO;
    mpt_model *net, *plain;
    size_t size, had;
    void *file;
    int i;
    for (i = 0; i < 4; i++) {
        net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F16));
        in.bytes = i > 0;
        in.scale = i == 2 ? huge : NULL;
        in.shift = i != 2 ? infinite : NULL;
        CHECK_EQUAL(mpt_input_with(net, 1, 1, 1, &in), 0);
        CHECK_ERROR(ctx, mpt_model_build(net, NULL), MPT_ERROR_ARGUMENT, i ? "channel" : "bytes");
        mpt_model_free(net);
    }
    in.bytes = other.bytes = 1; /* what a checkpoint does not restore is the same, or it is refused */
    in.scale = scales;
    in.shift = shifts;
    net = build(ctx, mpt_policy_preset(MPT_O2, MPT_BF16), &in, 0, 1);
    CHECK_OK(ctx, mpt_checkpoint_save_memory(net, NULL, 0, &size));
    file = test_memory(size);
    CHECK_OK(ctx, mpt_checkpoint_save_memory(net, file, size, &had));
    CHECK_OK(ctx, mpt_checkpoint_load_memory(net, file, size));
    plain = build(ctx, mpt_policy_preset(MPT_O2, MPT_BF16), &other, 0, 1);
    CHECK_ERROR(ctx, mpt_checkpoint_load_memory(plain, file, size), MPT_ERROR_VALUE, "scale");
    mpt_model_free(plain);
    plain = build(ctx, mpt_policy_preset(MPT_O2, MPT_BF16), NULL, 0, 1);
    CHECK_ERROR(ctx, mpt_checkpoint_load_memory(plain, file, size), MPT_ERROR_SHAPE, "settings");
    mpt_model_free(plain);
    mpt_model_free(net);
    free(file);
}

int main(int argc, char **argv) {
    static const size_t lengths[] = {1, 8, 63, 1000, 4099};
    mpt_context *ctx;
    mpt_input_desc in = MPT_ZERO;
    int level, i;
    test_begin(argc, argv);
    ctx = test_open(NULL);
    for (i = 0; i < 5; i++) {
        RUN_TEST(test_operation(ctx, lengths[i], 1, MPT_F16, 0));
        RUN_TEST(test_operation(ctx, lengths[i], 3, MPT_BF16, 0));
        RUN_TEST(test_operation(ctx, lengths[i], 17, MPT_F32, 5));
    }
    for (level = 0; level < 3; level++)
        for (i = 0; i < 6; i++) {
            const mpt_policy policy = mpt_policy_preset((mpt_level)level, i % 2 ? MPT_F16 : MPT_BF16);
            in.bytes = i != 5;
            in.in_device = i >= 3;
            in.scale = i > 0 && in.bytes ? scales : NULL;
            in.shift = in.scale ? shifts : NULL;
            RUN_TEST(test_same_bits(ctx, policy, &in, i == 2 || i == 4, 1 + i % 2));
        }
    RUN_TEST(test_bytes_of_bytes(ctx));
    for (level = 0; level < 3; level += 2) {
        RUN_TEST(test_bad_floats(ctx, (mpt_level)level, 1, 2 * PIXELS + 5));
        RUN_TEST(test_bad_floats(ctx, (mpt_level)level, 2, BATCH * PIXELS - 1));
        RUN_TEST(test_bad_floats(ctx, (mpt_level)level, 2, SAMPLES * PIXELS - 1));
    }
    RUN_TEST(test_bad_in_device(ctx));
    RUN_TEST(test_errors(ctx));
    mpt_close(ctx);
    return test_finish("feeds");
}
