/* course.h - what the programs of the course share: two options, claims that are checked, and the digits.

   Every program takes --out DIR and then writes the numbers of its figure to DIR/NAME.dat, as gnuplot reads them:
   columns, and two empty lines between one block and the next. What its text promises is a claim: one that does not
   hold is printed, and the program returns 1. A program with an exercise takes a number for it, as --lr 3e-3: what the
   lesson claims of its own number is then not checked, for the exercise is there to see it change.                   */

#ifndef COURSE_H
#define COURSE_H

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct course {
    const char *name;
    const char *program; /* argv[0] */
    FILE *data;          /* NULL: without --out */
    double number;       /* of the exercise's option, or the lesson's own */
    int exercise;        /* 1: the option was given */
    int claims, failed;
} course;

/* One line on stderr, and the end, if something is missing without which nothing can be shown. */
static inline void course_need(const course *c, int ok, const char *why) {
    if (ok) return;
    fprintf(stderr, "%s: %s\n", c->name, why);
    exit(2);
}

/* option: the name of the exercise's number, as "lr", and `number` the lesson's own; NULL: no exercise changes one. */
static inline course course_begin(int argc, char **argv, const char *name, const char *option, double number) {
    course c = {name, argv[0], NULL, number, 0, 0, 0};
    char path[1024];
    for (int i = 1; i < argc; i += 2) {
        const char *is = strncmp(argv[i], "--", 2) == 0 ? argv[i] + 2 : "";
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        char *end = NULL;
        if (strcmp(is, "out") == 0 && *value) {
            course_need(&c, snprintf(path, sizeof path, "%s/%s.dat", value, name) < (int)sizeof path,
                        "--out is too long");
            c.data = fopen(path, "w");
            course_need(&c, c.data != NULL, path);
            continue;
        }
        snprintf(path, sizeof path, "options are --out DIR%s%s%s", option ? " and --" : "", option ? option : "",
                 option ? " NUMBER" : "");
        course_need(&c, option && strcmp(is, option) == 0, path);
        c.number = strtod(value, &end);
        c.exercise = 1;
        course_need(&c, *value && !*end && c.number >= 0, path);
    }
    return c;
}

/* Writes to the file of the figure, if there is one. */
#ifdef __MINGW_PRINTF_FORMAT /* Windows has two printfs, and only one of them knows %zu */
static inline void course_data(const course *c, const char *format, ...)
    __attribute__((format(__MINGW_PRINTF_FORMAT, 2, 3)));
#elif defined(__GNUC__)
static inline void course_data(const course *c, const char *format, ...) __attribute__((format(printf, 2, 3)));
#endif
static inline void course_data(const course *c, const char *format, ...) {
    va_list arguments;
    if (!c->data) return;
    va_start(arguments, format);
    vfprintf(c->data, format, arguments);
    va_end(arguments);
}

static inline void course_claim(course *c, int holds, const char *claim) {
    if (c->exercise) return;
    c->claims++;
    if (holds) return;
    c->failed++;
    printf("DOES NOT HOLD: %s\n", claim);
}

/* Returns the exit status. */
static inline int course_end(course *c) {
    course_need(c, !c->data || (!ferror(c->data) && fclose(c->data) == 0), "the file in --out could not be written");
    if (c->exercise) printf("\nan exercise with %g: the lesson's claims are not checked\n", c->number);
    else printf("\n%d claims checked, %d do not hold\n", c->claims, c->failed);
    return c->failed > 0;
}

/* ---- The digits: 1,797 handwritten ones, of which every fifth is for testing ---- */

enum { DIGITS = 1797, TEST = DIGITS / 5, TRAINING = DIGITS - TEST, SIDE = 8, PIXELS = SIDE * SIDE, CLASSES = 10 };

typedef struct course_digits { /* first those to train on, then those to test with */
    float x[DIGITS][PIXELS];   /* 0..1 */
    int32_t y[DIGITS];
} course_digits;

/* The bytes behind the header of an IDX file of the digits: found from where we are, or from a folder above the program,
   which lies in one of the repository. */
static inline void course_idx(const course *c, const char *file_name, long header, unsigned char *out, size_t count) {
    const char *slash = strrchr(c->program, '/');
    const int folder = slash ? (int)(slash - c->program) + 1 : 0;
    char path[1024];
    FILE *file = NULL;
    for (int up = 0; up < 5 && !file; up++) {
        const char *above = "../../../../" + 3 * (4 - up);
        snprintf(path, sizeof path, "%.*s%sexamples/data/digits/%s", up ? folder : 0, c->program, above, file_name);
        file = fopen(path, "rb");
    }
    course_need(c, file && fseek(file, header, SEEK_SET) == 0 && fread(out, 1, count, file) == count, path);
    fclose(file);
}

/* To be freed. */
static inline course_digits *course_digits_read(const course *c) {
    course_digits *d = (course_digits *)malloc(sizeof *d);
    unsigned char *bytes = (unsigned char *)malloc(DIGITS * PIXELS + DIGITS), *labels = bytes + DIGITS * PIXELS;
    course_need(c, d && bytes, "no memory");
    course_idx(c, "images.idx3-ubyte", 16, bytes, DIGITS * PIXELS);
    course_idx(c, "labels.idx1-ubyte", 8, labels, DIGITS);
    for (int i = 0; i < DIGITS; i++) {
        const int to = i % 5 == 4 ? TRAINING + i / 5 : i - i / 5;
        for (int p = 0; p < PIXELS; p++) d->x[to][p] = (float)bytes[i * PIXELS + p] / 16;
        d->y[to] = labels[i];
    }
    free(bytes);
    return d;
}

/* n training digits drawn at random; the same ones for the same seed and step. */
static inline void course_batch(const course_digits *d, uint64_t seed, uint64_t step, int n, float *x, int32_t *y) {
    for (int i = 0; i < n; i++) {
        const int from = (int)(mpt_uniform(seed, step, 0, (uint64_t)i) * (float)TRAINING);
        memcpy(x + i * PIXELS, d->x[from], sizeof d->x[from]);
        y[i] = d->y[from];
    }
}

#endif
