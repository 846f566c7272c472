/* readers.h - what examples/train.c reads: folders of images as bytes, in the three forms that data sets come in.

       images.idx3-ubyte, labels.idx1-ubyte        one set; every fifth sample is for testing (the digits in data/)
       train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte
           MNIST, Fashion-MNIST and their successors; each file may be packed by gzip (.gz), which needs
           -DMPT_TRAINER_ZLIB and -lz
       data_batch_1.bin to data_batch_5.bin, test_batch.bin        CIFAR-10, "binary version"

   What parses a file is a function of its bytes in memory: it returns 1, or 0 and says why in a text of WHY bytes. The
   rest ends the program with one line on stderr if it fails. Needs POSIX.                                            */

#ifndef READERS_H
#define READERS_H

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef MPT_TRAINER_ZLIB
#include <zlib.h>
#endif

enum { BAD_RUN = 1, BAD_USE = 2, INTERRUPTED = 130 }; /* exit statuses */
enum { CLASSES = 10, WHY = 160 };

/* Samples of one byte a value, (count, height, width, channels), and their labels, 0..CLASSES-1. */
typedef struct image_set {
    size_t count;
    unsigned char *x;
    unsigned char *y;
} image_set;

typedef struct image_data {
    size_t height;
    size_t width;
    size_t channels;
    image_set train;
    image_set test;
    float value[256]; /* what the net is given for each byte */
    int small;        /* the digits: nets of their own */
} image_data;

/* ---- Messages and memory ---- */

/* Wipes the progress line where one may stand. */
static void wipe_line(void) {
    if (isatty(STDOUT_FILENO)) printf("\r\033[K");
    fflush(stdout);
}

#ifdef __GNUC__
static void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));
static int refuse(char *why, const char *format, ...) __attribute__((format(printf, 2, 3)));
#endif

/* One line on stderr. */
static void complain(const char *format, ...) {
    va_list arguments;
    wipe_line();
    fputs("train: ", stderr);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
}

/* One line on stderr, and the end. */
#define FAIL(status, ...) (complain(__VA_ARGS__), exit(status))

/* Writes the reason of a parser and returns 0. */
static int refuse(char *why, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(why, WHY, format, arguments);
    va_end(arguments);
    return 0;
}

/* Zeros, to be freed. */
static void *allocate(size_t count, size_t size) {
    void *p = calloc(count, size);
    if (!p) FAIL(BAD_RUN, "out of memory: %zu elements of %zu bytes", count, size);
    return p;
}

/* Three texts as one, to be freed: join(folder, "/", name). */
static char *join(const char *a, const char *b, const char *c) {
    const size_t room = strlen(a) + strlen(b) + strlen(c) + 1;
    char *text = (char *)allocate(room, 1);
    snprintf(text, room, "%s%s%s", a, b, c);
    return text;
}

/* ---- Files ---- */

typedef struct file_bytes {
    char *path;
    unsigned char *bytes;
    size_t size;
} file_bytes;

static void file_free(file_bytes *file) {
    free(file->path);
    free(file->bytes);
}

static int file_exists(const char *folder, const char *name) {
    char *path = join(folder, "/", name);
    struct stat info;
    const int exists = stat(path, &info) == 0;
    free(path);
    return exists;
}

static file_bytes file_read(const char *folder, const char *name) {
    file_bytes file = {NULL, NULL, 0};
    struct stat info;
    FILE *stream;
    file.path = join(folder, "/", name);
    if (stat(file.path, &info) != 0) FAIL(BAD_USE, "%s: %s", file.path, strerror(errno));
    if (!S_ISREG(info.st_mode)) FAIL(BAD_USE, "%s: not a file", file.path);
    stream = fopen(file.path, "rb");
    if (!stream) FAIL(BAD_USE, "%s: %s", file.path, strerror(errno));
    file.size = (size_t)info.st_size;
    file.bytes = (unsigned char *)allocate(file.size + 1, 1); /* + 1: never 0 */
    if (fread(file.bytes, 1, file.size, stream) != file.size) FAIL(BAD_USE, "%s: cannot be read", file.path);
    fclose(stream);
    return file;
}

/* ---- gzip ---- */

#ifdef MPT_TRAINER_ZLIB
/* Unpacks one member to *out at *used. Stops at its end (Z_STREAM_END), at an error, or at 2^30 bytes or without memory
   (Z_OK), so that a small file cannot fill the memory. *room is what *out has. */
static int gzip_inflate(z_stream *z, unsigned char **out, size_t *used, size_t *room) {
    const size_t most = (size_t)1 << 30, piece = (size_t)1 << 20;
    int status = Z_OK;
    while (status == Z_OK && *used < most) {
        if (*room - *used < piece) {
            unsigned char *larger = (unsigned char *)realloc(*out, 2 * *room + piece);
            if (!larger) break;
            *out = larger;
            *room = 2 * *room + piece;
        }
        z->next_out = *out + *used;
        z->avail_out = (uInt)piece;
        status = inflate(z, Z_NO_FLUSH);
        *used += piece - z->avail_out;
    }
    return status;
}

static int gzip_begins(const unsigned char *bytes, size_t size) {
    return size >= 2 && bytes[0] == 0x1f && bytes[1] == 0x8b;
}

/* What a gzip file unpacks to, to be freed: one member or several, one after the other (RFC 1952, 2.2), and zeros behind
   the last, which tapes and block devices leave there. */
static int gzip_unpack(const unsigned char *bytes, size_t size, unsigned char **out, size_t *out_size, char *why) {
    unsigned char *unpacked = NULL;
    size_t used = 0, room = 0;
    int status = Z_STREAM_END;
    int members = 0;
    z_stream z;
    memset(&z, 0, sizeof z);
    z.next_in = (Bytef *)bytes; /* never written */
    z.avail_in = (uInt)size;
    if (z.avail_in != size) return refuse(why, "%zu bytes are too many for zlib", size);
    if (inflateInit2(&z, 15 + 16) != Z_OK) return refuse(why, "no memory to unpack it"); /* + 16: gzip */
    while (status == Z_STREAM_END && (members == 0 || gzip_begins(z.next_in, z.avail_in))) {
        inflateReset(&z);
        status = gzip_inflate(&z, &unpacked, &used, &room);
        members++;
    }
    inflateEnd(&z);
    if (status == Z_STREAM_END) {
        for (; z.avail_in > 0 && *z.next_in == 0; z.avail_in--) z.next_in++;
    }
    if (status == Z_STREAM_END && z.avail_in == 0) {
        *out = unpacked;
        *out_size = used;
        return 1;
    }
    free(unpacked);
    if (status == Z_STREAM_END) return refuse(why, "%u bytes behind the data that are not zeros", z.avail_in);
    if (status == Z_BUF_ERROR) return refuse(why, "truncated: its %zu bytes unpack to %zu, then end", size, used);
    if (status == Z_OK) return refuse(why, "unpacks to more than %zu bytes, too many or no memory left", used);
    return refuse(why, "gzip: %s", z.msg ? z.msg : zError(status));
}

static void file_unpack(file_bytes *file) {
    unsigned char *unpacked = NULL;
    size_t size = 0;
    char why[WHY];
    if (!gzip_unpack(file->bytes, file->size, &unpacked, &size, why)) FAIL(BAD_USE, "%s: %s", file->path, why);
    free(file->bytes);
    file->bytes = unpacked;
    file->size = size;
}
#else
static void file_unpack(file_bytes *file) {
    FAIL(BAD_USE, "%s: this build has no zlib; unpack it with gunzip -k", file->path);
}
#endif

/* A file, or what its .gz unpacks to. */
static file_bytes file_read_packed(const char *folder, const char *name) {
    char *packed = join(name, ".gz", "");
    const int plain = file_exists(folder, name) || !file_exists(folder, packed);
    file_bytes file = file_read(folder, plain ? name : packed);
    if (!plain) file_unpack(&file);
    free(packed);
    return file;
}

/* ---- IDX ---- */

static uint32_t big_endian(const unsigned char *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

/* An IDX file of unsigned bytes, as MNIST's are: its `dims` sizes, and *data, its elements, of which it has exactly as
   many as the sizes say. No product here can wrap: each is compared with the bytes at hand first. */
static int idx_parse(const unsigned char *bytes, size_t size, int dims, uint32_t *shape, const unsigned char **data,
                     char *why) {
    const uint32_t magic = 0x800u + (uint32_t)dims;
    const size_t header = 4 + 4 * (size_t)dims;
    size_t elements = 1, follow;
    if (size < header) return refuse(why, "truncated: %zu bytes, the header alone has %zu", size, header);
    if (big_endian(bytes) != magic)
        return refuse(why, "starts with 0x%08" PRIx32 ", want 0x%08" PRIx32 " (IDX, %s)", big_endian(bytes), magic,
                      dims == 3 ? "images" : "labels");
    follow = size - header;
    for (int i = 0; i < dims; i++) {
        shape[i] = big_endian(bytes + 4 + 4 * i);
        if (shape[i] == 0) return refuse(why, "size %d of %d in the header is 0", i + 1, dims);
        if (shape[i] > follow / elements)
            return refuse(why, "truncated: size %d of %d in the header is %" PRIu32 ", but only %zu bytes follow",
                          i + 1, dims, shape[i], follow);
        elements *= shape[i];
    }
    if (elements < follow) return refuse(why, "%zu bytes too many behind the data", follow - elements);
    *data = bytes + header;
    return 1;
}

static int labels_check(const unsigned char *labels, size_t count, char *why) {
    for (size_t i = 0; i < count; i++)
        if (labels[i] >= CLASSES) return refuse(why, "label %zu is %d, want 0 to %d", i, labels[i], CLASSES - 1);
    return 1;
}

/* A set from its two IDX files. shape: count, height, width. */
static image_set idx_set(const char *folder, const char *images_name, const char *labels_name, uint32_t shape[3]) {
    file_bytes images = file_read_packed(folder, images_name);
    file_bytes labels = file_read_packed(folder, labels_name);
    const unsigned char *x = NULL, *y = NULL;
    char why[WHY];
    image_set set;
    uint32_t count = 0;
    size_t pixels;
    if (!idx_parse(images.bytes, images.size, 3, shape, &x, why)) FAIL(BAD_USE, "%s: %s", images.path, why);
    if (!idx_parse(labels.bytes, labels.size, 1, &count, &y, why)) FAIL(BAD_USE, "%s: %s", labels.path, why);
    if (count != shape[0])
        FAIL(BAD_USE, "%s: %" PRIu32 " labels, but %" PRIu32 " images in %s", labels.path, count, shape[0],
             images.path);
    if (!labels_check(y, count, why)) FAIL(BAD_USE, "%s: %s", labels.path, why);
    pixels = (size_t)shape[0] * shape[1] * shape[2];
    set.count = count;
    set.x = (unsigned char *)memcpy(allocate(pixels, 1), x, pixels);
    set.y = (unsigned char *)memcpy(allocate(count, 1), y, count);
    file_free(&images);
    file_free(&labels);
    return set;
}

/* ---- The three forms ---- */

static size_t sample_bytes(const image_data *data) { return data->height * data->width * data->channels; }

static void image_data_free(image_data *data) {
    free(data->train.x);
    free(data->train.y);
    free(data->test.x);
    free(data->test.y);
}

/* Bytes become numbers with mean 0 and deviation 1 over the training set. */
static void normalise(image_data *data) {
    const size_t n = data->train.count * sample_bytes(data);
    uint64_t seen[256] = {0};
    double mean = 0, variance = 0;
    for (size_t i = 0; i < n; i++) seen[data->train.x[i]]++;
    for (int b = 0; b < 256; b++) mean += b * (double)seen[b] / (double)n;
    for (int b = 0; b < 256; b++) variance += (b - mean) * (b - mean) * (double)seen[b] / (double)n;
    for (int b = 0; b < 256; b++) data->value[b] = (float)((b - mean) / sqrt(variance > 0 ? variance : 1));
}

/* The digits: 8x8 pixels of 0 to 16, which become 0 to 1. Every fifth tests, the others train. */
static void digits_load(const char *folder, image_data *data) {
    enum { SIDE = 8, PIXELS = SIDE * SIDE, INK = 16 };
    uint32_t shape[3];
    image_set all = idx_set(folder, "images.idx3-ubyte", "labels.idx1-ubyte", shape);
    if (shape[1] != SIDE || shape[2] != SIDE || all.count < 5)
        FAIL(BAD_USE, "%s: %zu images of %" PRIu32 "x%" PRIu32 ", want 5 or more of 8x8", folder, all.count, shape[1],
             shape[2]);
    for (size_t p = 0; p < all.count * PIXELS; p++)
        if (all.x[p] > INK)
            FAIL(BAD_USE, "%s: pixel %zu of image %zu is %d, want 0 to %d", folder, p % PIXELS, p / PIXELS, all.x[p],
                 INK);
    for (int p = 0; p <= INK; p++) data->value[p] = (float)p / (float)INK;
    data->height = SIDE;
    data->width = SIDE;
    data->channels = 1;
    data->small = 1;
    for (int test = 0; test < 2; test++) {
        image_set *set = test ? &data->test : &data->train;
        set->x = (unsigned char *)allocate(all.count, PIXELS);
        set->y = (unsigned char *)allocate(all.count, 1);
    }
    for (size_t i = 0; i < all.count; i++) {
        image_set *set = i % 5 == 4 ? &data->test : &data->train;
        memcpy(set->x + set->count * PIXELS, all.x + i * PIXELS, PIXELS);
        set->y[set->count] = all.y[i];
        set->count++;
    }
    free(all.x);
    free(all.y);
}

static void mnist_load(const char *folder, image_data *data) {
    uint32_t train[3], test[3];
    data->train = idx_set(folder, "train-images-idx3-ubyte", "train-labels-idx1-ubyte", train);
    data->test = idx_set(folder, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", test);
    if (train[1] != test[1] || train[2] != test[2])
        FAIL(BAD_USE, "%s: images of %" PRIu32 "x%" PRIu32 " to train, but of %" PRIu32 "x%" PRIu32 " to test", folder,
             train[1], train[2], test[1], test[2]);
    if (train[1] < 4 || train[2] < 4 || train[1] > 256 || train[2] > 256)
        FAIL(BAD_USE, "%s: images of %" PRIu32 "x%" PRIu32 ", want 4x4 to 256x256", folder, train[1], train[2]);
    data->height = train[1];
    data->width = train[2];
    data->channels = 1;
    normalise(data);
}

enum { CIFAR_SIDE = 32, CIFAR_PLANE = CIFAR_SIDE * CIFAR_SIDE, CIFAR_CHANNELS = 3 };
enum { CIFAR_SAMPLE = CIFAR_PLANE * CIFAR_CHANNELS, CIFAR_RECORD = 1 + CIFAR_SAMPLE };

/* Adds the records of a batch file to a set: each a label, then a plane of 32x32 bytes for red, green and blue. */
static int cifar_parse(const unsigned char *bytes, size_t size, image_set *set, char *why) {
    const size_t count = size / CIFAR_RECORD, all = set->count + count;
    unsigned char *x, *y;
    if (size == 0 || size % CIFAR_RECORD != 0)
        return refuse(why, "truncated: %zu bytes, want a multiple of %d", size, CIFAR_RECORD);
    for (size_t i = 0; i < count; i++)
        if (!labels_check(bytes + i * CIFAR_RECORD, 1, why))
            return refuse(why, "label %zu is %d, want 0 to %d", i, bytes[i * CIFAR_RECORD], CLASSES - 1);
    x = (unsigned char *)realloc(set->x, all * CIFAR_SAMPLE);
    if (x) set->x = x;
    y = (unsigned char *)realloc(set->y, all);
    if (y) set->y = y;
    if (!x || !y) return refuse(why, "no memory for %zu images", all);
    for (size_t i = 0; i < count; i++) {
        const unsigned char *from = bytes + i * CIFAR_RECORD;
        unsigned char *to = set->x + (set->count + i) * CIFAR_SAMPLE;
        set->y[set->count + i] = from[0];
        for (size_t p = 0; p < CIFAR_PLANE; p++)
            for (size_t c = 0; c < CIFAR_CHANNELS; c++) *to++ = from[1 + c * CIFAR_PLANE + p];
    }
    set->count = all;
    return 1;
}

static void cifar_add(const char *folder, const char *name, image_set *set) {
    file_bytes file = file_read(folder, name);
    char why[WHY];
    if (!cifar_parse(file.bytes, file.size, set, why)) FAIL(BAD_USE, "%s: %s", file.path, why);
    file_free(&file);
}

static void cifar_load(const char *folder, image_data *data) {
    for (int i = 1; i <= 5; i++) {
        char name[32];
        snprintf(name, sizeof name, "data_batch_%d.bin", i);
        cifar_add(folder, name, &data->train);
    }
    cifar_add(folder, "test_batch.bin", &data->test);
    data->height = CIFAR_SIDE;
    data->width = CIFAR_SIDE;
    data->channels = CIFAR_CHANNELS;
    normalise(data);
}

/* What is in a folder, told by the names of its files. To be freed by image_data_free. */
static image_data image_data_load(const char *folder) {
    image_data data;
    memset(&data, 0, sizeof data);
    if (file_exists(folder, "images.idx3-ubyte")) digits_load(folder, &data);
    else if (file_exists(folder, "data_batch_1.bin")) cifar_load(folder, &data);
    else if (file_exists(folder, "train-images-idx3-ubyte") || file_exists(folder, "train-images-idx3-ubyte.gz"))
        mnist_load(folder, &data);
    else
        FAIL(BAD_USE,
             "%s: neither images.idx3-ubyte, nor train-images-idx3-ubyte, plain or .gz, nor data_batch_1.bin is there "
             "(Debian's package dataset-fashion-mnist has the second)",
             folder);
    return data;
}

#endif
