/* fuzz.h - what every fuzzer shares: numbers out of the bytes that libFuzzer makes up, and an end with a trap when a
   check has failed. Include it after mpt.h. */
#ifndef FUZZ_H
#define FUZZ_H

#include "../check.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef struct fuzz_bytes {
    const uint8_t *at;
    size_t left;
} fuzz_bytes;

/* The next number below `below`, at most 65536; 0 when all bytes are taken. */
static inline uint32_t fuzz_take(fuzz_bytes *b, uint32_t below) {
    uint32_t x = 0;
    int i;
    for (i = 0; i < (below > 256 ? 2 : 1) && b->left; i++, b->left--) x = x << 8 | *b->at++;
    return below ? x % below : 0;
}

/* The next 32 bits. */
static inline uint32_t fuzz_word(fuzz_bytes *b) {
    const uint32_t high = fuzz_take(b, 65536);
    return high << 16 | fuzz_take(b, 65536);
}

/* Every check of check.h held. */
static inline int fuzz_end(void) {
    if (test_counts.failed) __builtin_trap();
    return 0;
}

#endif
