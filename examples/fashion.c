/* fashion.c - trains an MLP, a CNN and a small ResNet on Fashion-MNIST or CIFAR-10 in fp32, bf16 and fp16.

       cc -O2 -DMPT_TRAINER_ZLIB examples/fashion.c -o fashion -lm -lz && ./fashion --help

   The images are not here: Fashion-MNIST is Debian's package dataset-fashion-mnist (60,000 images of clothes to train,
   10,000 to test, 28x28 grey pixels, 10 classes). --data takes any folder with

       train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte
           as MNIST and its successors come, or each packed by gzip (.gz): without -DMPT_TRAINER_ZLIB and -lz unpack
           them first
       data_batch_1.bin to data_batch_5.bin, test_batch.bin
           CIFAR-10, "binary version"                                                                               */

#define _POSIX_C_SOURCE 200809L
#define MPT_IMPLEMENTATION
#ifdef MPT_TRAINER_CUDA
#include "../mpt_cuda.cuh"
#else
#include "../mpt.h"
#endif

#define TRAINER_NAME "fashion"
#define TRAINER_ABOUT "Trains an MLP, a CNN and a ResNet on Fashion-MNIST or CIFAR-10 in fp32, bf16 and fp16."
#define TRAINER_DATA "/usr/share/datasets/fashion-mnist"
#define TRAINER_MODELS "mlp|cnn|resnet|all"
#define TRAINER_BATCH 64
#define TRAINER_WITHIN 0.3
#include "trainer.h"

#include <math.h>
#ifdef MPT_TRAINER_ZLIB
#include <zlib.h>
#endif

enum { CLASSES = 10 };

/* ---- Nets ---- */

static void mlp_layers(mpt_model *net, int h) {
    h = mpt_relu(net, mpt_linear(net, h, 256, NULL));
    h = mpt_relu(net, mpt_linear(net, h, 128, NULL));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
}

static void cnn_layers(mpt_model *net, int h) {
    h = mpt_relu(net, mpt_conv2d(net, h, 16, 3, NULL));
    h = mpt_max_pool2d(net, h, 2, NULL);
    h = mpt_relu(net, mpt_conv2d(net, h, 32, 3, NULL));
    h = mpt_max_pool2d(net, h, 2, NULL);
    h = mpt_relu(net, mpt_conv2d(net, h, 64, 3, NULL));
    h = mpt_relu(net, mpt_linear(net, h, 128, NULL));
    h = mpt_dropout(net, h, 0.25f);
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
}

/* Convolution and batch norm, whose beta is the bias. */
static int conv_norm(mpt_model *net, int h, int filters, int kernel, int stride) {
    mpt_conv2d_desc desc = MPT_ZERO;
    desc.stride = stride;
    desc.no_bias = 1;
    desc.init = MPT_INIT_KAIMING_NORMAL;
    return mpt_batch_norm(net, mpt_conv2d(net, h, filters, kernel, &desc), NULL);
}

/* Two 3x3 convolutions beside a shortcut: the value itself, or where the shape changes its 1x1 projection. */
static int residual(mpt_model *net, int h, int filters, int stride) {
    const int shortcut = stride == 1 ? h : conv_norm(net, h, filters, 1, stride);
    h = mpt_relu(net, conv_norm(net, h, filters, 3, stride));
    return mpt_relu(net, mpt_add(net, conv_norm(net, h, filters, 3, 1), shortcut));
}

static void resnet_layers(mpt_model *net, int h) {
    h = mpt_relu(net, conv_norm(net, h, 24, 3, 1));
    h = mpt_max_pool2d(net, h, 2, NULL);
    h = residual(net, h, 24, 1);
    h = residual(net, h, 48, 2);
    h = residual(net, h, 96, 2);
    mpt_softmax_cross_entropy(net, mpt_linear(net, mpt_global_avg_pool2d(net, h), CLASSES, NULL), NULL);
}

enum { MODELS = 3 };
static const trainer_model models[MODELS] = {
    {"mlp", mlp_layers, 6, 0.002}, {"cnn", cnn_layers, 5, 0.002}, {"resnet", resnet_layers, 5, 0.005}};

/* ---- Files ---- */

static int is_there(const char *folder, const char *name) {
    char *path = trainer_join(folder, "/", name);
    struct stat info;
    const int there = stat(path, &info) == 0;
    free(path);
    return there;
}

#ifdef MPT_TRAINER_ZLIB
/* Unpacks till the end, an error or 2^30 bytes, so that a small file cannot fill the memory. Z_OK: not at the end. */
static int gzip_inflate(z_stream *z, unsigned char **out, size_t *used) {
    const size_t most = (size_t)1 << 30, piece = (size_t)1 << 20;
    size_t room = 0;
    int status = Z_OK;
    while (status == Z_OK && *used < most) {
        if (room - *used < piece) {
            unsigned char *larger = (unsigned char *)realloc(*out, 2 * room + piece);
            if (!larger) break;
            *out = larger;
            room = 2 * room + piece;
        }
        z->next_out = *out + *used;
        z->avail_out = (uInt)piece;
        status = inflate(z, Z_NO_FLUSH);
        *used += piece - z->avail_out;
    }
    return status;
}

/* What a gzip file unpacks to, to be freed. */
static int gzip_unpack(const unsigned char *bytes, size_t size, unsigned char **out, size_t *out_size, char *why) {
    unsigned char *unpacked = NULL;
    size_t used = 0;
    int status;
    z_stream z;
    memset(&z, 0, sizeof z);
    z.next_in = (Bytef *)bytes; /* never written */
    z.avail_in = (uInt)size;
    if (z.avail_in != size) return trainer_refuse(why, "%zu bytes are too many for zlib", size);
    if (inflateInit2(&z, 15 + 16) != Z_OK) return trainer_refuse(why, "no memory to unpack it"); /* + 16: gzip */
    status = gzip_inflate(&z, &unpacked, &used);
    inflateEnd(&z);
    if (status == Z_STREAM_END && z.avail_in == 0) {
        *out = unpacked;
        *out_size = used;
        return 1;
    }
    free(unpacked);
    if (status == Z_STREAM_END) return trainer_refuse(why, "%u bytes too many behind the data", z.avail_in);
    if (status == Z_BUF_ERROR)
        return trainer_refuse(why, "truncated: its %zu bytes unpack to %zu, then end", size, used);
    if (status == Z_OK) return trainer_refuse(why, "unpacks to more than %zu bytes, too many or no memory left", used);
    return trainer_refuse(why, "gzip: %s", z.msg ? z.msg : zError(status));
}

static void unpack(trainer_file *file) {
    unsigned char *unpacked = NULL;
    size_t size = 0;
    char why[TRAINER_WHY];
    if (!gzip_unpack(file->bytes, file->size, &unpacked, &size, why))
        TRAINER_FAIL(TRAINER_BAD_USE, "%s: %s", file->path, why);
    free(file->bytes);
    file->bytes = unpacked;
    file->size = size;
}
#else
static void unpack(trainer_file *file) {
    TRAINER_FAIL(TRAINER_BAD_USE, "%s: this build has no zlib; unpack it with gunzip -k", file->path);
}
#endif

/* A file, or what its .gz unpacks to. */
static trainer_file read_packed(const char *folder, const char *name) {
    char *packed = trainer_join(name, ".gz", "");
    const int plain = is_there(folder, name) || !is_there(folder, packed);
    trainer_file file = trainer_file_read(folder, plain ? name : packed);
    if (!plain) unpack(&file);
    free(packed);
    return file;
}

/* ---- Fashion-MNIST and what else comes as IDX ---- */

static trainer_set read_set(const char *folder, const char *images, const char *labels, uint32_t shape[3]) {
    const trainer_file x = read_packed(folder, images), y = read_packed(folder, labels);
    return trainer_idx_set(x, y, CLASSES, shape);
}

static void load_idx(const char *folder, trainer_data *data) {
    uint32_t train[3], test[3];
    data->train = read_set(folder, "train-images-idx3-ubyte", "train-labels-idx1-ubyte", train);
    data->test = read_set(folder, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", test);
    if (train[1] != test[1] || train[2] != test[2])
        TRAINER_FAIL(TRAINER_BAD_USE,
                     "%s: images of %" PRIu32 "x%" PRIu32 " to train, but of %" PRIu32 "x%" PRIu32 " to test", folder,
                     train[1], train[2], test[1], test[2]);
    if (train[1] < 4 || train[2] < 4 || train[1] > 256 || train[2] > 256)
        TRAINER_FAIL(TRAINER_BAD_USE, "%s: images of %" PRIu32 "x%" PRIu32 ", want 4x4 to 256x256", folder, train[1],
                     train[2]);
    data->height = train[1];
    data->width = train[2];
    data->channels = 1;
}

/* ---- CIFAR-10 ---- */

enum { CIFAR_SIDE = 32, CIFAR_PLANE = CIFAR_SIDE * CIFAR_SIDE, CIFAR_CHANNELS = 3 };
enum { CIFAR_SAMPLE = CIFAR_PLANE * CIFAR_CHANNELS, CIFAR_RECORD = 1 + CIFAR_SAMPLE };

/* Adds the records of a batch file to a set: each a label, then a plane of 32x32 bytes for red, green and blue. */
static int cifar_parse(const unsigned char *bytes, size_t size, trainer_set *set, char *why) {
    const size_t count = size / CIFAR_RECORD, all = set->count + count;
    unsigned char *x, *y;
    if (size == 0 || size % CIFAR_RECORD != 0)
        return trainer_refuse(why, "truncated: %zu bytes, want a multiple of %d", size, CIFAR_RECORD);
    for (size_t i = 0; i < count; i++)
        if (!trainer_labels_check(bytes + i * CIFAR_RECORD, 1, CLASSES, why))
            return trainer_refuse(why, "label %zu is %d, want 0 to %d", i, bytes[i * CIFAR_RECORD], CLASSES - 1);
    x = (unsigned char *)realloc(set->x, all * CIFAR_SAMPLE);
    if (x) set->x = x;
    y = (unsigned char *)realloc(set->y, all);
    if (y) set->y = y;
    if (!x || !y) return trainer_refuse(why, "no memory for %zu images", all);
    for (size_t i = 0; i < count; i++, bytes += CIFAR_RECORD) {
        unsigned char *to = set->x + (set->count + i) * CIFAR_SAMPLE;
        set->y[set->count + i] = bytes[0];
        for (size_t p = 0; p < CIFAR_PLANE; p++)
            for (size_t c = 0; c < CIFAR_CHANNELS; c++) *to++ = bytes[1 + c * CIFAR_PLANE + p];
    }
    set->count = all;
    return 1;
}

static void cifar_add(const char *folder, const char *name, trainer_set *set) {
    trainer_file file = trainer_file_read(folder, name);
    char why[TRAINER_WHY];
    if (!cifar_parse(file.bytes, file.size, set, why)) TRAINER_FAIL(TRAINER_BAD_USE, "%s: %s", file.path, why);
    trainer_file_free(&file);
}

static void load_cifar(const char *folder, trainer_data *data) {
    for (int i = 1; i <= 5; i++) {
        char name[32];
        snprintf(name, sizeof name, "data_batch_%d.bin", i);
        cifar_add(folder, name, &data->train);
    }
    cifar_add(folder, "test_batch.bin", &data->test);
    data->height = data->width = CIFAR_SIDE;
    data->channels = CIFAR_CHANNELS;
}

/* ---- All ---- */

/* Bytes become numbers with mean 0 and deviation 1 over the training set. */
static void normalise(trainer_data *data) {
    const size_t n = data->train.count * trainer_sample(data);
    uint64_t seen[256] = {0};
    double mean = 0, variance = 0;
    for (size_t i = 0; i < n; i++) seen[data->train.x[i]]++;
    for (int b = 0; b < 256; b++) mean += b * (double)seen[b] / (double)n;
    for (int b = 0; b < 256; b++) variance += (b - mean) * (b - mean) * (double)seen[b] / (double)n;
    for (int b = 0; b < 256; b++) data->value[b] = (float)((b - mean) / sqrt(variance > 0 ? variance : 1));
}

static trainer_data load(const char *folder) {
    trainer_data data = MPT_ZERO;
    if (is_there(folder, "data_batch_1.bin")) load_cifar(folder, &data);
    else if (is_there(folder, "train-images-idx3-ubyte") || is_there(folder, "train-images-idx3-ubyte.gz"))
        load_idx(folder, &data);
    else
        TRAINER_FAIL(TRAINER_BAD_USE,
                     "%s: neither train-images-idx3-ubyte, plain or .gz, nor data_batch_1.bin is there (Debian's "
                     "package dataset-fashion-mnist has the former)",
                     folder);
    normalise(&data);
    return data;
}

int main(int argc, char **argv) {
    const trainer_options o = trainer_parse(argc, argv, models, MODELS);
    int count, status;
    trainer_run *runs = trainer_select(&o, models, MODELS, &count);
    mpt_context *ctx = trainer_open(&o);
    trainer_data data = load(o.data);
    status = trainer_run_all(ctx, &o, &data, runs, count);
    free(runs);
    trainer_data_free(&data);
    mpt_close(ctx);
    return trainer_finish(status);
}
