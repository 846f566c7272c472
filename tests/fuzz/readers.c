/* readers.c - fuzzes examples/readers.h: what they accept has the size that it says.

   Bytes: 0 IDX images, 1 IDX labels, 2 CIFAR-10, 3 gzip; then the file. */
#define main train_main
#include "../../examples/train.c"
#undef main
#include "fuzz.h"

static void read_idx(const uint8_t *file, size_t size, int dims) {
    uint32_t shape[3] = {1, 1, 1};
    const unsigned char *bytes = NULL;
    char why[WHY] = "";
    if (idx_parse(file, size, dims, shape, &bytes, why))
        CHECK(bytes > file && bytes + (size_t)shape[0] * shape[1] * shape[2] == file + size);
    else CHECK(*why);
}

static void read_cifar(const uint8_t *file, size_t size) {
    image_set set = MPT_ZERO;
    char why[WHY] = "";
    size_t i;
    if (cifar_parse(file, size, &set, why)) {
        CHECK(set.count * CIFAR_RECORD == size);
        for (i = 0; i < set.count; i++) CHECK(set.y[i] == file[i * CIFAR_RECORD] && set.y[i] < CLASSES);
    } else {
        CHECK(*why && set.count == 0);
    }
    free(set.x), free(set.y);
}

static void read_gzip(const uint8_t *file, size_t size) {
#ifdef MPT_TRAINER_ZLIB
    unsigned char *out = NULL;
    size_t n = 0;
    char why[WHY] = "";
    if (gzip_unpack(file, size, &out, &n, why)) free(out);
    else CHECK(*why);
#else
    (void)file, (void)size;
#endif
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const int kind = size ? data[0] % 4 : 0;
    uint8_t *file = (uint8_t *)test_memory(size); /* exactly as large as the file, for the sanitizer */
    const size_t n = size ? size - 1 : 0;
    if (n) memcpy(file, data + 1, n);
    file = (uint8_t *)realloc(file, n ? n : 1);
    if (kind <= 1) read_idx(file, n, kind ? 1 : 3);
    if (kind == 2) read_cifar(file, n);
    if (kind == 3) read_gzip(file, n);
    free(file);
    return fuzz_end();
}
