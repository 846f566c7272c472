/* checkpoint.c - floor 5: PyTorch's files of weights here, and ours as PyTorch has read them.

   make_golden_checkpoint.py wrote the former, and read and kept the latter; run from the top of the repository. With
   the name of a folder the files that it reads are written there. */
#define MPT_IMPLEMENTATION
#include "../../mpt.h"
#include "../check.h"
#include "golden.h"

static const char torch_f32[] = "tests/parity/golden/checkpoint_torch.safetensors";
static const char torch_f16[] = "tests/parity/golden/checkpoint_torch_f16.safetensors";
static const char ours[] = "tests/parity/golden/checkpoint_mpt.safetensors";

/* The Net of make_golden_checkpoint.py. */
static mpt_model *build(mpt_context *ctx) {
    mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O0, MPT_F32));
    mpt_conv2d_desc grouped = MPT_ZERO;
    mpt_linear_desc head = MPT_ZERO;
    int h = mpt_input(net, 4, 4, 2), a, b;
    grouped.groups = 2;
    grouped.no_bias = 1;
    head.name = "head";
    h = mpt_relu(net, mpt_batch_norm(net, test_same(net, h, 4, 3), NULL));
    h = mpt_conv2d(net, h, 6, 2, &grouped);
    a = mpt_batch_norm(net, mpt_flatten(net, h), NULL);
    b = mpt_flatten(net, mpt_max_pool2d(net, h, 2, NULL));
    h = mpt_relu(net, mpt_linear(net, mpt_concat(net, a, b), 7, NULL));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, 3, &head), NULL);
    CHECK_OK(ctx, mpt_model_build(net, NULL));
    return net;
}

static void compare(mpt_context *ctx, mpt_model *net, const golden *g, const char *mode) {
    const golden_line *x = golden_need(g, "", "input", "x"), *y = golden_need(g, mode, "output", "y");
    const golden_line *bound = golden_need(g, mode, "bound", "y");
    const size_t outputs = mpt_model_outputs(net), samples = y->count / outputs;
    float *in = (float *)test_memory(x->count * sizeof *in), *out = (float *)test_memory(y->count * sizeof *out);
    double *value = test_doubles(y->count), *tolerance = test_doubles(y->count);
    size_t i;
    for (i = 0; i < x->count; i++) in[i] = (float)x->value[i];
    CHECK_OK(ctx, mpt_predict(net, in, samples, out));
    for (i = 0; i < y->count; i++) {
        value[i] = (double)out[i];
        tolerance[i] = 2 * test_bound(bound->number, bound->value[i], y->value[i], MPT_F32); /* both sides are off */
    }
    CHECK_ALL(value, y->count, y->value, tolerance);
    free(in), free(out), free(value), free(tolerance);
}

/* Both files from their first byte to their last. */
static int same_files(const char *a, const char *b) {
    FILE *f = fopen(a, "rb"), *g = fopen(b, "rb");
    int x = 0, y = 0;
    while (f && g && x == y && x != EOF) x = getc(f), y = getc(g);
    if (f) fclose(f);
    if (g) fclose(g);
    return f && g && x == y;
}

static void write_files(mpt_context *ctx, mpt_model *net, const char *folder) {
    static const char *const names[] = {"f32", "f16", "bf16"};
    char path[512];
    int type;
    for (type = MPT_F32; type <= MPT_BF16; type++) {
        snprintf(path, sizeof path, "%s/%s.safetensors", folder, names[type]);
        CHECK_OK(ctx, mpt_weights_save(net, path, (mpt_dtype)type));
    }
    snprintf(path, sizeof path, "%s/full.safetensors", folder);
    CHECK_OK(ctx, mpt_checkpoint_save(net, path));
}

int main(int argc, char **argv) {
    golden g = golden_read("checkpoint");
    mpt_context *ctx = test_open(NULL);
    mpt_model *net = build(ctx);
    char path[512];
    CHECK_OK(ctx, mpt_weights_load(net, torch_f16, NULL));
    compare(ctx, net, &g, "f16");
    CHECK_OK(ctx, mpt_weights_load(net, torch_f32, NULL));
    compare(ctx, net, &g, "f32");
    snprintf(path, sizeof path, "%s.safetensors", argc ? argv[0] : "checkpoint");
    CHECK_OK(ctx, mpt_weights_save(net, path, MPT_F32));
    if (argc < 2) CHECK(same_files(path, ours));
    if (argc > 1) write_files(ctx, net, argv[1]);
    CHECK(remove(path) == 0);
    mpt_model_free(net);
    mpt_close(ctx);
    golden_free(&g);
    return test_finish("parity/checkpoint");
}
