/* weights_to_c.c - a safetensors file as a C array, for machines without files: mpt_weights_load_memory reads it.

       cc -O2 examples/weights_to_c.c -o weights_to_c && ./weights_to_c net.safetensors net.c net_weights

   The C file has one array of this name, as the file's bytes; where it is to lie is up to you:

       #include "net.c"
       mpt_weights_load_memory(net, net_weights, sizeof net_weights, NULL); */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LENGTH = 8 /* of the header, little-endian, before it */, COLUMNS = 24 };

static int failed(const char *path, const char *why) {
    fprintf(stderr, "weights_to_c: %s: %s\n", path, why);
    return 1;
}

/* The whole file, or NULL. Free it. */
static unsigned char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    unsigned char *bytes = NULL;
    long end = -1;
    if (file && fseek(file, 0, SEEK_END) == 0) end = ftell(file);
    if (end > 0 && fseek(file, 0, SEEK_SET) == 0) bytes = (unsigned char *)malloc((size_t)end);
    *size = bytes ? fread(bytes, 1, (size_t)end, file) : 0;
    if (file) fclose(file);
    if (bytes && *size == (size_t)end) return bytes;
    free(bytes);
    return NULL;
}

/* By its header alone: mpt looks at the rest when it loads. */
static int is_safetensors(const unsigned char *bytes, size_t size) {
    size_t header = 0;
    int i;
    if (size <= LENGTH) return 0;
    for (i = LENGTH - 1; i >= 0; i--) {
        if (header > size) return 0;
        header = header << 8 | bytes[i];
    }
    return header > 1 && header <= size - LENGTH && bytes[LENGTH] == '{';
}

static int is_identifier(const char *name) {
    size_t i;
    for (i = 0; name[i]; i++)
        if (!isalnum((unsigned char)name[i]) && name[i] != '_') return 0;
    return i > 0 && !isdigit((unsigned char)name[0]);
}

/* 0: it could not be written. */
static int write_array(const char *path, const char *name, const unsigned char *bytes, size_t size) {
    FILE *file = fopen(path, "w");
    size_t i;
    int good;
    if (!file) return 0;
    fprintf(file, "static const unsigned char %s[] = {", name);
    for (i = 0; i < size; i++) fprintf(file, "%s%d,", i % COLUMNS ? "" : "\n    ", bytes[i]);
    fprintf(file, "\n};\n");
    good = !ferror(file);
    return fclose(file) == 0 && good;
}

int main(int argc, char **argv) {
    unsigned char *bytes;
    size_t size;
    int good;
    if (argc != 4) return failed("usage", "weights_to_c IN.safetensors OUT.c NAME");
    if (!is_identifier(argv[3])) return failed(argv[3], "no name of an array");
    bytes = read_file(argv[1], &size);
    if (!bytes) return failed(argv[1], "cannot be read");
    good = is_safetensors(bytes, size);
    if (good && !write_array(argv[2], argv[3], bytes, size)) return failed(argv[2], "cannot be written");
    free(bytes);
    return good ? 0 : failed(argv[1], "no safetensors file");
}
