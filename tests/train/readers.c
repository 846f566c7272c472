/* readers.c - what examples/readers.h makes of the bytes of a file, and what it hands to a net.

   Files lie in blocks of exactly their size, so that a sanitizer sees a reader that looks behind the end. */
#define main train_main
#include "../../examples/train.c"
#undef main
#include "../check.h"

/* A block with the first n of these bytes. */
static unsigned char *block(const unsigned char *bytes, size_t n) {
    unsigned char *copy = (unsigned char *)malloc(n ? n : 1);
    if (!copy) exit(1);
    memcpy(copy, bytes, n);
    return copy;
}

/* ==== IDX ==== */

/* 2 images of 3x4, or 24 labels. */
static size_t make_idx(int dims, unsigned char *bytes) {
    static const unsigned char images[] = {0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4};
    static const unsigned char labels[] = {0, 0, 8, 1, 0, 0, 0, 24};
    const size_t header = dims == 3 ? sizeof images : sizeof labels;
    memcpy(bytes, dims == 3 ? images : labels, header);
    for (size_t i = 0; i < 24; i++) bytes[header + i] = (unsigned char)i;
    return header + 24;
}

static int parse_idx(const unsigned char *bytes, size_t n, int dims, char *why) {
    unsigned char *file = block(bytes, n);
    const unsigned char *data = NULL;
    uint32_t shape[3] = {1, 1, 1};
    int good;
    *why = 0;
    good = idx_parse(file, n, dims, shape, &data, why);
    if (good) CHECK(data == file + 4 + 4 * dims && data + shape[0] * shape[1] * shape[2] == file + n && data[1] == 1);
    free(file);
    return good;
}

/* Any byte of the header changed to anything, any length: what is accepted has all the elements it speaks of. */
static void test_idx(int dims) {
    unsigned char bytes[64] = {0};
    char why[WHY];
    const size_t n = make_idx(dims, bytes), header = n - 24;
    CHECK(parse_idx(bytes, n, dims, why));
    CHECK(!parse_idx(bytes, n, 4 - dims, why) && strstr(why, dims == 3 ? "0x00000803" : "0x00000801"));
    for (size_t size = 0; size <= n + 1; size++) {
        if (size == n) continue;
        CHECK(!parse_idx(bytes, size, dims, why) && strstr(why, size < n ? "truncated" : "1 bytes too many"));
    }
    for (size_t i = 0; i < header; i++) {
        const unsigned char kept = bytes[i];
        for (int b = 0; b < 256; b++) {
            bytes[i] = (unsigned char)b;
            CHECK(parse_idx(bytes, n, dims, why) == (b == kept) && (b == kept || *why));
        }
        bytes[i] = kept;
    }
}

/* ==== CIFAR-10 ==== */

/* The label, or the byte of a pixel and channel of a record. */
static unsigned char cifar_label(size_t record) { return (unsigned char)(mpt_hash(1, record, 0, 0) % 10); }

static unsigned char cifar_byte(size_t record, size_t h, size_t w, size_t c) {
    return (unsigned char)mpt_hash(2, record, h * 32 + w, c);
}

static void make_cifar(size_t records, unsigned char *bytes) {
    for (size_t i = 0; i < records; i++) {
        *bytes++ = cifar_label(i);
        for (size_t c = 0; c < 3; c++)
            for (size_t p = 0; p < 1024; p++) *bytes++ = cifar_byte(i, p / 32, p % 32, c);
    }
}

static int parse_cifar(const unsigned char *bytes, size_t n, image_set *set, char *why) {
    unsigned char *file = block(bytes, n);
    const int good = cifar_parse(file, n, set, why);
    free(file);
    return good;
}

static void test_cifar(void) {
    enum { RECORDS = 3, SIZE = RECORDS * 3073 };
    static unsigned char bytes[SIZE];
    char why[WHY] = "";
    image_set set = MPT_ZERO;
    size_t wrong = 0;
    make_cifar(RECORDS, bytes);
    CHECK(parse_cifar(bytes, SIZE, &set, why) && set.count == RECORDS);
    CHECK(parse_cifar(bytes + 3073, SIZE - 3073, &set, why) && set.count == 2 * RECORDS - 1); /* is added */
    for (size_t i = 0; i < set.count; i++) {
        const size_t record = i < RECORDS ? i : i - RECORDS + 1;
        wrong += set.y[i] != cifar_label(record);
        for (size_t h = 0; h < 32; h++)
            for (size_t w = 0; w < 32; w++)
                for (size_t c = 0; c < 3; c++)
                    wrong += set.x[((i * 32 + h) * 32 + w) * 3 + c] != cifar_byte(record, h, w, c);
    }
    CHECK_EQUAL(wrong, 0);
    for (size_t n = 0; n < SIZE; n += 61)
        if (n == 0 || n % 3073 != 0) CHECK(!parse_cifar(bytes, n, &set, why) && strstr(why, "truncated"));
    bytes[2 * 3073] = 10;
    CHECK(!parse_cifar(bytes, SIZE, &set, why) && strcmp(why, "label 2 is 10, want 0 to 9") == 0);
    CHECK_EQUAL(set.count, 2 * RECORDS - 1);
    free(set.x);
    free(set.y);
}

/* ==== GZIP ==== */

#ifdef MPT_TRAINER_ZLIB
static int unpacks_to(const unsigned char *bytes, size_t n, const unsigned char *want, size_t want_n, char *why) {
    unsigned char *file = block(bytes, n), *out = NULL;
    size_t size = 0;
    const int good = gzip_unpack(file, n, &out, &size, why);
    free(file);
    if (good) CHECK(size == want_n && memcmp(out, want, size) == 0);
    if (good) free(out);
    return good;
}

/* 3 MB, so that the output grows twice; every truncation in the small file, and every byte changed: the checksum
   leaves only the header's remarks (text, time, system) free. */
static void test_gzip(void) {
    const size_t sizes[] = {100, 3000000};
    for (int i = 0; i < 2; i++) {
        unsigned char *plain = (unsigned char *)test_memory(sizes[i]), *packed = (unsigned char *)test_memory(sizes[i]);
        char why[WHY] = "";
        size_t n;
        z_stream z;
        memset(&z, 0, sizeof z);
        for (size_t b = 0; b < sizes[i]; b++) plain[b] = (unsigned char)(mpt_hash(3, b, 0, 0) % 3);
        CHECK(deflateInit2(&z, 9, Z_DEFLATED, 15 + 16, 9, Z_DEFAULT_STRATEGY) == Z_OK);
        z.next_in = plain, z.avail_in = (uInt)sizes[i];
        z.next_out = packed, z.avail_out = (uInt)sizes[i];
        CHECK(deflate(&z, Z_FINISH) == Z_STREAM_END);
        n = z.total_out;
        deflateEnd(&z);
        CHECK(unpacks_to(packed, n, plain, sizes[i], why));
        CHECK(unpacks_to(packed, n + 1, plain, sizes[i], why)); /* a zero behind it */
        packed[n] = 1;
        CHECK(!unpacks_to(packed, n + 1, plain, sizes[i], why) && strstr(why, "1 bytes behind"));
        packed[n] = 0;
        for (size_t cut = 0; cut < n; cut += n / 50)
            CHECK(!unpacks_to(packed, cut, plain, sizes[i], why) && strstr(why, "truncated"));
        for (size_t at = 0; i == 0 && at < n; at++) {
            packed[at] ^= 1;
            CHECK(!unpacks_to(packed, n, plain, sizes[i], why) || (at >= 3 && at < 10));
            packed[at] ^= 1;
        }
        free(plain);
        free(packed);
    }
}
#endif

/* ==== WHAT THE NET IS GIVEN ==== */

/* 2x3 pixels of 2 channels. */
static void test_fill(void) {
    static const unsigned char x[] = {10, 11, 20, 21, 30, 31, 40, 41, 50, 51, 60, 61};
    static const struct {
        int flip;
        long down, right;
        float want[12];
    } cases[] = {{0, 0, 0, {10, 11, 20, 21, 30, 31, 40, 41, 50, 51, 60, 61}},
                 {1, 0, 0, {30, 31, 20, 21, 10, 11, 60, 61, 50, 51, 40, 41}},
                 {0, 1, 0, {0, 0, 0, 0, 0, 0, 10, 11, 20, 21, 30, 31}},
                 {0, -1, 1, {0, 0, 40, 41, 50, 51, 0, 0, 0, 0, 0, 0}},
                 {1, 0, 2, {0, 0, 0, 0, 30, 31, 0, 0, 0, 0, 60, 61}},
                 {1, 0, -1, {20, 21, 10, 11, 0, 0, 50, 51, 40, 41, 0, 0}},
                 {0, 2, 0, {0}},
                 {0, 0, -64, {0}}};
    image_data data = MPT_ZERO;
    data.height = 2, data.width = 3, data.channels = 2;
    for (int b = 0; b < 256; b++) data.value[b] = (float)b;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        float out[12];
        fill_sample(&data, x, cases[i].flip, cases[i].down, cases[i].right, out);
        CHECK(memcmp(out, cases[i].want, sizeof out) == 0);
    }
}

/* Where the one bright pixel of a 9x9 image goes: everywhere within --shift, on both sides, nowhere else. */
static void test_augment(void) {
    enum { SIDE = 9, SHIFT = 2, H = 4, W = 3, DRAWS = 4000 };
    static unsigned char x[SIDE * SIDE], y[1];
    options o = MPT_ZERO;
    image_data data = MPT_ZERO;
    run r = MPT_ZERO;
    loop t = MPT_ZERO;
    float out[SIDE * SIDE], again[SIDE * SIDE];
    int seen[SIDE][SIDE] = {{0}}, wrong = 0;
    data.height = data.width = SIDE, data.channels = 1, data.value[1] = 1;
    data.train.x = x, data.train.y = y, data.train.count = 1, x[H * SIDE + W] = 1;
    t.o = &o, t.data = &data, t.r = &r;
    augment_sample(&t, 0, out);
    CHECK(out[H * SIDE + W] > 0); /* neither asked for: as it is */
    o.shift = SHIFT, o.flip = 1, r.seed = 7;
    for (t.epoch = 1; t.epoch <= DRAWS; t.epoch++) {
        augment_sample(&t, 0, out);
        augment_sample(&t, 0, again);
        wrong += memcmp(out, again, sizeof out) != 0;
        for (int p = 0; p < SIDE * SIDE; p++) seen[p / SIDE][p % SIDE] += out[p] > 0;
    }
    CHECK_EQUAL(wrong, 0);
    for (int h = 0; h < SIDE; h++)
        for (int w = 0; w < SIDE; w++) {
            const int ways = abs(h - H) > SHIFT ? 0 : (abs(w - W) <= SHIFT) + (abs(w - (SIDE - 1 - W)) <= SHIFT);
            const double p = ways / 50.0; /* of 5x5 shifts and 2 sides */
            CHECK_NEAR(seen[h][w], (double)DRAWS * p, 5 * sqrt((double)DRAWS * p * (1 - p)));
        }
}

static void test_shuffle(void) {
    enum { N = 1000 };
    static size_t order[N], next[N], other[N];
    size_t places = 0, times[N] = {0};
    shuffle(order, N, 1, 1);
    shuffle(next, N, 1, 2);
    shuffle(other, N, 2, 1);
    for (size_t i = 0; i < N; i++) times[order[i]]++;
    for (size_t i = 0; i < N; i++) places += times[i] == 1;
    CHECK_EQUAL(places, N);
    CHECK(memcmp(order, next, sizeof order) != 0 && memcmp(order, other, sizeof order) != 0);
}

/* Of 256 values, each rounded by at most 2^-24 of itself; the mean of their sizes is at most their deviation, 1. */
static void test_normalise(void) {
    enum { N = 6000 };
    static unsigned char x[N];
    image_data data = MPT_ZERO;
    double sum = 0, squares = 0;
    data.height = N, data.width = data.channels = 1;
    data.train.x = x, data.train.count = 1;
    for (size_t i = 0; i < N; i++) x[i] = (unsigned char)(mpt_hash(4, i, 0, 0) % 200 * (i % 3 != 0));
    normalise(&data);
    for (size_t i = 0; i < N; i++) sum += (double)data.value[x[i]], squares += pow((double)data.value[x[i]], 2);
    CHECK_NEAR(sum / (double)N, 0, ldexp(1, -24));
    CHECK_NEAR(squares / (double)N, 1, ldexp(1, -23));
    memset(x, 5, sizeof x);
    normalise(&data);
    CHECK_EQUAL(data.value[5], 0); /* all alike: no deviation to divide by */
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    RUN_TEST(test_idx(3));
    RUN_TEST(test_idx(1));
    RUN_TEST(test_cifar());
#ifdef MPT_TRAINER_ZLIB
    RUN_TEST(test_gzip());
#endif
    RUN_TEST(test_fill());
    RUN_TEST(test_augment());
    RUN_TEST(test_shuffle());
    RUN_TEST(test_normalise());
    return test_finish("readers");
}
