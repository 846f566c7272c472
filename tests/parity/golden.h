/* golden.h - reads the golden files op_*.txt and net_*.txt, whose lines make_golden_ops.py describes.

   Include it after mpt.h and check.h. */
#ifndef GOLDEN_H
#define GOLDEN_H

#include <inttypes.h>

enum { GOLDEN_WORD = 24 };

/* A line: a word, a name and values. */
typedef struct golden_line {
    char mode[GOLDEN_WORD], word[GOLDEN_WORD], name[GOLDEN_WORD]; /* mode: "" above the first */
    double number;  /* of a number; TERMS of a bound; ROUNDS of an output */
    mpt_dtype type; /* of a cast or an output */
    size_t count;
    double *value;
} golden_line;

typedef struct golden {
    const char *name; /* of the file */
    golden_line *lines;
    size_t count;
} golden;

static inline void golden_damaged(const golden *g, const char *what) {
    printf("golden file %s: %s\n", g->name, what);
    exit(1);
}

static inline mpt_dtype golden_read_type(const golden *g, FILE *file) {
    char word[GOLDEN_WORD] = "";
    if (fscanf(file, "%23s", word) != 1 || (strcmp(word, "f32") != 0 && strcmp(word, "bf16") != 0))
        golden_damaged(g, "a type is missing");
    return word[0] == 'f' ? MPT_F32 : MPT_BF16;
}

static inline void golden_read_values(const golden *g, FILE *file, golden_line *line, mpt_dtype type) {
    uint32_t bits = 0;
    size_t i;
    unsigned long count = 0;
    if (fscanf(file, "%lu", &count) != 1) golden_damaged(g, "a count is missing");
    line->count = count;
    line->value = test_doubles(line->count);
    for (i = 0; i < line->count; i++) {
        if (fscanf(file, "%8" SCNx32, &bits) != 1) golden_damaged(g, "a value is missing");
        line->value[i] = (double)mpt_widen(bits, type);
    }
}

/* What follows the word and the name. */
static inline void golden_read_rest(const golden *g, FILE *file, golden_line *line) {
    const int input = strcmp(line->word, "input") == 0, bound = strcmp(line->word, "bound") == 0;
    const int output = strcmp(line->word, "output") == 0, number = bound || output || strcmp(line->word, "number") == 0;
    if (output || strcmp(line->word, "cast") == 0) line->type = golden_read_type(g, file);
    if (number && fscanf(file, "%lf", &line->number) != 1) golden_damaged(g, "a number is missing");
    if (input || bound || output) golden_read_values(g, file, line, bound ? MPT_BF16 : output ? line->type : MPT_F32);
}

static inline golden golden_read(const char *name) {
    char path[128], mode[GOLDEN_WORD] = "";
    golden_line line;
    golden g;
    FILE *file;
    g.name = name, g.lines = NULL, g.count = 0;
    snprintf(path, sizeof path, "tests/parity/golden/%s.txt", name);
    file = fopen(path, "r");
    if (!file || fscanf(file, "#%*[^\n]") != 0) golden_damaged(&g, "it cannot be read");
    for (memset(&line, 0, sizeof line); fscanf(file, "%23s %23s", line.word, line.name) == 2; g.count++) {
        if (strcmp(line.word, "mode") == 0) memcpy(mode, line.name, sizeof mode);
        memcpy(line.mode, mode, sizeof mode);
        golden_read_rest(&g, file, &line);
        g.lines = (golden_line *)realloc(g.lines, (g.count + 1) * sizeof line);
        if (!g.lines) golden_damaged(&g, "out of memory");
        g.lines[g.count] = line;
        memset(&line, 0, sizeof line);
    }
    fclose(file);
    return g;
}

static inline void golden_free(golden *g) {
    size_t i;
    for (i = 0; i < g->count; i++) free(g->lines[i].value);
    free(g->lines);
}

/* NULL: there is no such line. */
static inline const golden_line *golden_find(const golden *g, const char *mode, const char *word, const char *name) {
    size_t i;
    for (i = 0; i < g->count; i++) {
        const golden_line *line = &g->lines[i];
        if (strcmp(line->mode, mode) == 0 && strcmp(line->word, word) == 0 && strcmp(line->name, name) == 0)
            return line;
    }
    return NULL;
}

static inline const golden_line *golden_need(const golden *g, const char *mode, const char *word, const char *name) {
    const golden_line *line = golden_find(g, mode, word, name);
    if (!line) golden_damaged(g, name);
    return line;
}

static inline double golden_number(const golden *g, const char *name) {
    return golden_need(g, "", "number", name)->number;
}

#endif
