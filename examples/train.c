/* train.c - trains an MLP, a CNN and a small ResNet on images in fp32, bf16 and fp16, and compares.

       cc -O2 examples/train.c -o train -lm -pthread && ./train --help

   Without options it trains an MLP and a CNN on the 1,797 handwritten digits in examples/data, in every policy and
   type. Then it tests whether fp16 needs its loss scale there, by a run without one and by the sizes of the gradients.
   --data takes folders of MNIST, Fashion-MNIST and CIFAR-10; see readers.h.

   Exit status: 0 done; 1 a run failed (out of memory, diverged); 2 wrong options, bad files, or output not written;
   130 ended by Ctrl-C. Every failure is one line on stderr. Needs POSIX.

   On several processors or machines, with MPI: `make build/examples/train_mpi`, then
   `mpirun -np 4 build/examples/train_mpi --mpi --threads 1`. On several GPUs: `make build/examples/train_nccl`, which
   also needs nvcc and NCCL, then `mpirun -np 4 build/examples/train_nccl --nccl`. Each rank trains on its share of
   every step; rank 0 prints and saves. A step has ranks x accumulate x batch samples: 4 ranks, 2 ranks with
   --accumulate 2 and one rank with --accumulate 4 give the same weights, bit for bit (but not the same running
   statistics of batch norm: see mpt_ranks). A run can resume from a checkpoint on another number of ranks if batch and
   ranks x accumulate stay the same; every rank reads the data and the checkpoint. With --shard
   each rank keeps only its part of the optimizer's arrays. SIGUSR1 ends such a run as Ctrl-C ends others: all ranks
   stop after the same step, and rank 0 saves. (mpirun passes SIGUSR1 on but acts on Ctrl-C itself.) */

#define _POSIX_C_SOURCE 200809L
#define MPT_IMPLEMENTATION
#ifdef MPT_TRAINER_CUDA
#include "../mpt_cuda.cuh"
#else
#include "../mpt.h"
#endif
#define LENS_IMPLEMENTATION
#include "lens.h"
#include "readers.h"
#ifdef MPT_TRAINER_MPI
#include "mpi.h"
#endif
#ifdef MPT_TRAINER_NCCL
#include "nccl.cuh"
#endif

#include <signal.h>
#include <sys/ioctl.h>
#include <time.h>

#define DIGITS "examples/data/digits"

/* ---- Nets ---- */

/* Two hidden layers of `wide` and half as many. */
static void mlp_layers(mpt_model *net, int h, int wide) {
    h = mpt_relu(net, mpt_linear(net, h, wide, NULL));
    h = mpt_relu(net, mpt_linear(net, h, wide / 2, NULL));
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
}

static void small_mlp(mpt_model *net, int h) { mlp_layers(net, h, 128); }
static void large_mlp(mpt_model *net, int h) { mlp_layers(net, h, 256); }

/* A 3x3 convolution that keeps the size */
static int conv_relu(mpt_model *net, int h, int filters) {
    mpt_conv2d_desc desc = MPT_ZERO;
    desc.padding = 1;
    return mpt_relu(net, mpt_conv2d(net, h, filters, 3, &desc));
}

static int conv_relu_pool(mpt_model *net, int h, int filters) {
    return mpt_max_pool2d(net, conv_relu(net, h, filters), 2, NULL);
}

static void small_cnn(mpt_model *net, int h) {
    h = conv_relu_pool(net, h, 16);
    h = conv_relu_pool(net, h, 32);
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
}

static void large_cnn(mpt_model *net, int h) {
    h = conv_relu_pool(net, h, 16);
    h = conv_relu_pool(net, h, 32);
    h = conv_relu(net, h, 64);
    h = mpt_relu(net, mpt_linear(net, h, 128, NULL));
    h = mpt_dropout(net, h, 0.25f);
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, CLASSES, NULL), NULL);
}

/* Convolution and batch norm, whose beta is the bias. */
static int conv_norm(mpt_model *net, int h, int filters, int kernel, int stride) {
    mpt_conv2d_desc desc = MPT_ZERO;
    desc.stride = stride;
    desc.padding = kernel / 2;
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

static void resnet(mpt_model *net, int h) {
    h = mpt_relu(net, conv_norm(net, h, 24, 3, 1));
    h = mpt_max_pool2d(net, h, 2, NULL);
    h = residual(net, h, 24, 1);
    h = residual(net, h, 48, 2);
    h = residual(net, h, 96, 2);
    mpt_softmax_cross_entropy(net, mpt_linear(net, mpt_global_avg_pool2d(net, h), CLASSES, NULL), NULL);
}

typedef struct recipe {
    const char *name;
    void (*layers)(mpt_model *net, int input); /* adds layers and loss; NULL: no such net for these images */
    int epochs;                                /* defaults of --epochs and --lr */
    double lr;
} recipe;

enum { MLP, CNN, RESNET, NETS };

typedef struct task {
    recipe nets[NETS];
    int batch;     /* default of --batch */
    double within; /* points that 16 bits may lie from fp32, means over the seeds */
} task;

/* Five of the 359 test digits are 1.5 points; the other data sets have 10,000 test images. */
static const task digits_task = {
    {{"mlp", small_mlp, 30, 0.008}, {"cnn", small_cnn, 8, 0.01}, {"resnet", NULL, 0, 0}}, 32, 1.5};
static const task images_task = {
    {{"mlp", large_mlp, 6, 0.002}, {"cnn", large_cnn, 5, 0.002}, {"resnet", resnet, 5, 0.005}}, 64, 0.3};

/* ---- Options ---- */

static const mpt_dtype TYPES[] = {MPT_F32, MPT_BF16, MPT_F16}; /* the choices of --type */
enum { ALL = -1 };

typedef struct options {
    const char *data, *csv, *save, *resume; /* NULL: none; data: the digits */
    int model, level, type;                 /* index in the task's nets, mpt_level, index in TYPES; or ALL */
    int epochs, batch;                      /* 0: the task's */
    double lr;                              /* 0: the net's */
    int seeds, shift, flip, threads, cuda, mpi, nccl, shard, accumulate;
    int helps_save; /* another rank saves, and needs this one's part */
    uint64_t seed;
    mpt_ranks ranks, processes; /* which sum the gradients; which sum what is in host memory, by MPI */
#ifdef MPT_TRAINER_CUDA
    mpt_cuda_desc gpu;
#endif
} options;

/* What a rank takes of a step, and the whole of it */
static size_t rank_samples(const options *o) { return (size_t)o->accumulate * (size_t)o->batch; }
static size_t step_samples(const options *o) { return (size_t)o->ranks.ranks * rank_samples(o); }

/* of char *, int, int, uint64_t, double, int; a FLAG has no value */
typedef enum option_kind { TEXT, CHOICE, INTEGER, SEED, RATE, FLAG } option_kind;

typedef struct option {
    const char *name, *values, *help; /* values of a CHOICE: those there are, in their order; "all" is ALL */
    option_kind kind;
    void *to;
    uint64_t low, high; /* of an INTEGER */
} option;

/* Index of a text in choices such as "cpu|cuda"; ALL for "all". */
static int parse_choice(const option *opt, const char *text) {
    const size_t length = strlen(text);
    int index = 0;
    for (const char *c = opt->values; length > 0 && *c; index++) {
        const size_t n = strcspn(c, "|");
        if (n == length && memcmp(c, text, n) == 0) return strcmp(text, "all") == 0 ? ALL : index;
        c += n + (c[n] == '|');
    }
    FAIL(BAD_USE, "%s '%s': want %s", opt->name, text, opt->values);
    return ALL; /* not reached */
}

static uint64_t parse_integer(const option *opt, const char *text) {
    char *end = NULL;
    unsigned long long value;
    errno = 0;
    value = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno || value < opt->low || value > opt->high)
        FAIL(BAD_USE, "%s '%s': want a whole number from %" PRIu64 " to %" PRIu64, opt->name, text, opt->low,
             opt->high);
    return value;
}

static double parse_rate(const option *opt, const char *text) {
    char *end = NULL;
    double value;
    errno = 0;
    value = strtod(text, &end);
    if (!strchr(".0123456789", *text) || end == text || *end || errno || !(value > 0))
        FAIL(BAD_USE, "%s '%s': want a number above 0", opt->name, text);
    return value;
}

static void option_set(const option *opt, const char *text) {
    switch (opt->kind) {
    case TEXT: *(const char **)opt->to = text; break;
    case CHOICE: *(int *)opt->to = parse_choice(opt, text); break;
    case INTEGER: *(int *)opt->to = (int)parse_integer(opt, text); break;
    case SEED: *(uint64_t *)opt->to = parse_integer(opt, text); break;
    case RATE: *(double *)opt->to = parse_rate(opt, text); break;
    case FLAG: *(int *)opt->to = 1; break;
    }
}

static void print_help(const option *table, size_t count) {
    puts("Usage: train [--option value]...\n"
         "Trains small nets on images in fp32, bf16 and fp16, side by side.\n");
    for (size_t i = 0; i < count; i++) {
        char name[40];
        snprintf(name, sizeof name, "%s %s", table[i].name, table[i].values);
        printf("  %-27s %s\n", name, table[i].help);
    }
    puts("  --help, -h\n\n"
         "Where all can be chosen it is the default. --option=value is the same as --option value.");
    for (int t = 0; t < 2; t++) {
        const task *work = t == 0 ? &digits_task : &images_task;
        printf("%s: batch %d", t == 0 ? "The digits" : "Other images", work->batch);
        for (int n = 0; n < NETS; n++)
            if (work->nets[n].layers)
                printf("; %s %d epochs, lr %g", work->nets[n].name, work->nets[n].epochs, work->nets[n].lr);
        puts(".");
    }
}

static options parse_options(int argc, char **argv) {
    options o = MPT_ZERO;
    const option table[] = {
        {"--data", "DIR", "folder of the images; default " DIGITS, TEXT, &o.data, 0, 0},
        {"--model", "mlp|cnn|resnet|all", "resnet: not for the digits", CHOICE, &o.model, 0, 0},
        {"--policy", "O0|O1|O2|O3|all", "O0 fp32; O1 autocast; O2 16-bit weights with fp32 masters; O3 all 16-bit",
         CHOICE, &o.level, 0, 0},
        {"--type", "f32|bf16|f16|all", "f32 goes with O0, bf16 and f16 with O1 to O3", CHOICE, &o.type, 0, 0},
        {"--epochs", "N", "passes over the training data; default the net's, below", INTEGER, &o.epochs, 1, 1000000},
        {"--batch", "N", "samples in one pass; default below", INTEGER, &o.batch, 1, 1000000},
        {"--accumulate", "N", "passes in one step; default 1", INTEGER, &o.accumulate, 1, 1000},
        {"--lr", "X", "largest learning rate of Adam; default the net's, below", RATE, &o.lr, 0, 0},
        {"--seed", "N", "of initial weights, shuffling and augmentation; default 1", SEED, &o.seed, 0, UINT64_MAX},
        {"--seeds", "N", "runs each with N seeds, from --seed on, and compares the means; default 1", INTEGER, &o.seeds,
         1, 1000},
        {"--shift", "N", "moves training images by up to N pixels at random; default 0", INTEGER, &o.shift, 0, 64},
        {"--flip", "no|yes", "mirrors half of the training images, left to right; default no", CHOICE, &o.flip, 0, 0},
        {"--threads", "N", "at most 64; 0, the default: one per processor", INTEGER, &o.threads, 0, 64},
        {"--device", "cpu|cuda", "default cpu", CHOICE, &o.cuda, 0, 0},
        {"--mpi", "", "this is one of several ranks, started by mpirun: a step has the passes of all", FLAG, &o.mpi, 0,
         0},
        {"--nccl", "", "the same, each rank on a GPU of its own", FLAG, &o.nccl, 0, 0},
        {"--shard", "", "of several ranks each keeps only a part of the optimizer's arrays", FLAG, &o.shard, 0, 0},
        {"--csv", "FILE", "writes one row per run", TEXT, &o.csv, 0, 0},
        {"--save", "FILE", "writes a checkpoint of the one run selected, at its end or after Ctrl-C", TEXT, &o.save, 0,
         0},
        {"--resume", "FILE", "goes on from such a checkpoint, where the run with these options has stopped", TEXT,
         &o.resume, 0, 0},
    };
    const size_t count = sizeof table / sizeof *table;
    o.model = o.level = o.type = ALL;
    o.seeds = o.accumulate = o.ranks.ranks = 1;
    o.seed = 1;
    for (int i = 1; i < argc; i++) {
        const size_t length = strcspn(argv[i], "=");
        const char *value = argv[i][length] ? argv[i] + length + 1 : NULL;
        size_t at = 0;
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            print_help(table, count);
            exit(0);
        }
        if (strncmp(argv[i], "--", 2) != 0) FAIL(BAD_USE, "'%s' is no option; see --help", argv[i]);
        while (at < count && (strlen(table[at].name) != length || strncmp(table[at].name, argv[i], length) != 0)) at++;
        if (at == count) FAIL(BAD_USE, "unknown option '%.*s'; see --help", (int)length, argv[i]);
        if (table[at].kind == FLAG) {
            if (value) FAIL(BAD_USE, "%s takes no value; see --help", table[at].name);
            value = "";
        }
        if (!value && i + 1 < argc) value = argv[++i];
        if (!value || (!*value && table[at].kind == TEXT))
            FAIL(BAD_USE, "%s wants a value; see --help", table[at].name);
        option_set(&table[at], value);
    }
    if (o.nccl) o.mpi = o.cuda = 1;
    return o;
}

/* The folder of the digits, to be freed: from where we are, or from a folder above this program, which lies in one of
   the repository. */
static char *find_digits(const char *program) {
    const char *slash = strrchr(program, '/');
    char *above = join(program, "", "");
    above[slash ? slash - program : 0] = 0;
    for (int up = 0; up < 4 && slash && !file_exists(DIGITS, "images.idx3-ubyte"); up++) {
        char *next = join(above, "/..", "");
        char *there = join(next, "/", DIGITS);
        free(above);
        above = next;
        if (file_exists(there, "images.idx3-ubyte")) {
            free(above);
            return there;
        }
        free(there);
    }
    free(above);
    return join(DIGITS, "", "");
}

/* ---- Runs ---- */

typedef struct run {
    const recipe *net;
    mpt_level level;
    mpt_dtype type;
    uint64_t seed;
    mpt_scaler_mode scaler;   /* 0: the policy's */
    mpt_histogram *gradients; /* not NULL: the weight gradients of the last epoch are added */
    int epochs;
    const char *save, *resume; /* NULL: not */
    int helps_save;            /* as in options */
    int number, of;            /* for the progress line */

    int diverged;     /* results, from here on */
    double accuracy;  /* after the last epoch */
    uint64_t correct; /* of the test samples */
    double rate;      /* training samples a second */
    float scale;
    uint64_t skipped;
    mpt_memory memory;
} run;

static const char *level_name(mpt_level level) {
    static const char *const names[] = {"O0", "O1", "O2", "O3"};
    return names[level];
}

static int selects(const options *o, const task *work, int net, int level, int type) {
    if (!work->nets[net].layers) return 0;
    if ((level == MPT_O0) != (TYPES[type] == MPT_F32)) return 0;
    return (o->model == ALL || o->model == net) && (o->level == ALL || o->level == level) &&
           (o->type == ALL || o->type == type);
}

/* The runs that the options select, to be freed; *selected says how many. The seeds of one policy stand together. */
static run *select_runs(const options *o, const task *work, int *selected) {
    enum { WAYS = 7 }; /* of one net: O0 f32; O1, O2, O3 with bf16 and f16 */
    run *runs = (run *)allocate((size_t)NETS * WAYS * (size_t)o->seeds, sizeof *runs);
    int n = 0;
    if (o->model != ALL && !work->nets[o->model].layers)
        FAIL(BAD_USE, "--model %s: not for images of 8x8 pixels, want mlp, cnn or all", work->nets[o->model].name);
    for (int net = 0; net < NETS; net++)
        for (int level = MPT_O0; level <= MPT_O3; level++)
            for (int type = 0; type < 3; type++) {
                if (!selects(o, work, net, level, type)) continue;
                for (int seed = 0; seed < o->seeds; seed++) {
                    runs[n].net = &work->nets[net];
                    runs[n].level = (mpt_level)level;
                    runs[n].type = TYPES[type];
                    runs[n].seed = o->seed + (uint64_t)seed;
                    runs[n].epochs = o->epochs ? o->epochs : work->nets[net].epochs;
                    n++;
                }
            }
    if (n == 0) FAIL(BAD_USE, "--policy and --type: f32 goes with O0, bf16 and f16 with O1 to O3");
    if ((o->save || o->resume) && n > 1)
        FAIL(BAD_USE, "%s is for one run, and %d are selected: want --model, --policy and --type",
             o->save ? "--save" : "--resume", n);
    for (int i = 0; i < n; i++) {
        runs[i].save = o->save;
        runs[i].helps_save = o->helps_save;
        runs[i].resume = o->resume;
        runs[i].number = i + 1;
        runs[i].of = n;
    }
    *selected = n;
    return runs;
}

static mpt_context *open_context(const options *o) {
    mpt_context_desc desc = MPT_ZERO;
    mpt_context *ctx;
    desc.threads = o->threads;
    if (o->cuda) {
#ifdef MPT_TRAINER_CUDA
        ctx = mpt_cuda_open(&o->gpu);
        if (!ctx) FAIL(BAD_USE, "--device cuda: no usable CUDA device");
        return ctx;
#else
        FAIL(BAD_USE, "--device cuda: this build has no CUDA");
#endif
    }
    ctx = mpt_open(&desc);
    if (!ctx) FAIL(BAD_RUN, "no memory or no threads");
    return ctx;
}

/* ---- Ranks ---- */

#ifdef MPT_TRAINER_MPI
static void start_mpi(void) {
    int threads;
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &threads) != MPI_SUCCESS || threads < MPI_THREAD_FUNNELED)
        FAIL(BAD_RUN, "--mpi: MPI_Init_thread fails, or this MPI knows no threads");
}

/* A rank that fails ends with a status other than 0 and leaves the others to mpirun, which ends them. */
static void join_ranks(mpi_adapter *mpi, mpt_context *ctx, options *o) {
    if (mpi_ranks(mpi, ctx, MPI_COMM_WORLD, &o->processes) != MPT_OK) FAIL(BAD_RUN, "--mpi: %s", mpt_why(ctx));
    o->ranks = o->processes;
    if (o->ranks.rank == 0) return;
    o->helps_save = o->shard && o->save;
    o->csv = o->save = NULL;
    if (!freopen("/dev/null", "w", stdout)) FAIL(BAD_RUN, "/dev/null: %s", strerror(errno));
}

static void leave_ranks(mpi_adapter *mpi) {
    mpi_ranks_free(mpi);
    MPI_Finalize();
}
#endif

#ifdef MPT_TRAINER_NCCL
/* A rank's GPU has the rank's number among those of its machine. */
static void choose_gpu(options *o) {
    MPI_Comm machine;
    cudaStream_t stream = NULL;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine);
    MPI_Comm_rank(machine, &o->gpu.device);
    MPI_Comm_free(&machine);
    if (cudaSetDevice(o->gpu.device) != cudaSuccess ||
        cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) != cudaSuccess)
        FAIL(BAD_USE, "--nccl: no GPU %d on this machine", o->gpu.device);
    o->gpu.stream = stream;
    setenv("NCCL_GRAPH_REGISTER", "0", 0); /* see nccl.cuh */
}

static void join_gpus(nccl_adapter *nccl, mpt_context *ctx, options *o) {
    const int rank = o->processes.rank, ranks = o->processes.ranks;
    ncclUniqueId id;
    if (rank == 0 && ncclGetUniqueId(&id) != ncclSuccess) FAIL(BAD_RUN, "--nccl: ncclGetUniqueId fails");
    MPI_Bcast(&id, (int)sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
    if (nccl_ranks(nccl, ctx, &o->gpu, id, rank, ranks, &o->ranks) != MPT_OK) FAIL(BAD_RUN, "--nccl: %s", mpt_why(ctx));
}
#endif

/* The context, joined to the other ranks if there are any */
typedef struct machine {
    mpt_context *ctx;
#ifdef MPT_TRAINER_MPI
    mpi_adapter mpi;
#endif
#ifdef MPT_TRAINER_NCCL
    nccl_adapter nccl;
#endif
} machine;

static void machine_open(machine *m, options *o) {
#ifdef MPT_TRAINER_MPI
    if (o->mpi && o->cuda && !o->nccl) FAIL(BAD_USE, "--mpi: on the CPU alone, not with --device cuda: see --nccl");
    if (o->mpi) start_mpi();
#else
    if (o->mpi) FAIL(BAD_USE, "--mpi: this build has no MPI: `make build/examples/train_mpi`");
#endif
#ifdef MPT_TRAINER_NCCL
    if (o->nccl) choose_gpu(o);
#else
    if (o->nccl) FAIL(BAD_USE, "--nccl: this build has no NCCL: `make build/examples/train_nccl`");
#endif
    m->ctx = open_context(o);
#ifdef MPT_TRAINER_MPI
    if (o->mpi) join_ranks(&m->mpi, m->ctx, o);
#endif
#ifdef MPT_TRAINER_NCCL
    if (o->nccl) join_gpus(&m->nccl, m->ctx, o);
#endif
}

static void machine_close(machine *m, const options *o) {
#ifdef MPT_TRAINER_NCCL
    if (o->nccl) nccl_ranks_free(&m->nccl);
#endif
#ifdef MPT_TRAINER_MPI
    if (o->mpi) leave_ranks(&m->mpi);
#endif
    (void)o;
    mpt_close(m->ctx);
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- Ctrl-C ---- */

static volatile sig_atomic_t interrupted, asked; /* asked: one of several ranks, and the others do not know yet */

static void interrupt(int number) {
    (void)number;
    interrupted = 1;
}

static void ask(int number) {
    (void)number;
    asked = 1;
}

/* The first Ctrl-C ends the training after its step; a second one ends the program at once. */
static void catch_interrupts(const options *o) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = o->mpi ? ask : interrupt;
    action.sa_flags = (int)(SA_RESTART | SA_RESETHAND);
    sigaction(o->mpi ? SIGUSR1 : SIGINT, &action, NULL);
}

/* Before each step: was a rank asked to end? Then all do. */
static mpt_result agree_to_end(const options *o) {
    float ranks_asked = (float)asked;
    mpt_result result;
    if (!o->mpi) return MPT_OK;
    result = o->processes.sum(o->processes.user, &ranks_asked, 1);
    if (ranks_asked > 0) interrupted = 1;
    return result;
}

/* ---- Training ---- */

/* One run under way. */
typedef struct loop {
    const options *o;
    const image_data *data;
    run *r;
    mpt_context *ctx;
    mpt_model *net;
    int epoch;     /* from 1 */
    size_t first;  /* step of it that comes first: 0, or where a resumed run goes on */
    int tested;    /* r->accuracy is told */
    size_t *order; /* of the training samples in this epoch */
    float *x;      /* a batch */
    int32_t *y;
    double before;  /* samples trained before resuming */
    double samples; /* and since, */
    double spent;   /* in so many seconds */
    double shown;   /* when progress was last shown */
} loop;

static void fail_run(const loop *t) {
    FAIL(BAD_RUN, "%s %s %s: %s", t->r->net->name, level_name(t->r->level), mpt_dtype_name(t->r->type),
         mpt_why(t->ctx));
}

/* Steps in one epoch: an incomplete last batch is left out. */
static size_t steps_per_epoch(const loop *t) { return t->data->train.count / step_samples(t->o); }

static double samples_per_second(const loop *t) { return t->spent > 0 ? t->samples / t->spent : 0; }

/* Columns of the terminal, but for the last, in which the cursor stands. */
static int terminal_columns(void) {
#ifdef TIOCGWINSZ
    struct winsize size;
    if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1) return size.ws_col - 1;
#endif
    return 79;
}

/* Adds a field to a line if it still fits into the columns. */
static void line_add(char *line, int columns, const char *field) {
    const size_t used = strlen(line), length = strlen(field);
    if (used + 1 + length > (size_t)columns) return;
    if (used) line[used] = ' ';
    memcpy(line + used + (used > 0), field, length + 1);
}

/* One line that updates in place on a terminal, the first fields first where it is narrow; elsewhere a plain line after
   the first epoch and every tenth of a run. ETA is the run's. */
static void show_progress(loop *t, int epoch_done) {
    enum { FIELDS = 8, ROOM = 32, COLUMNS = FIELDS * ROOM };
    const run *r = t->r;
    const int terminal = isatty(STDOUT_FILENO);
    const int columns = terminal ? terminal_columns() : COLUMNS - 1;
    const double rate = samples_per_second(t), now = seconds();
    const double all = (double)r->epochs * (double)steps_per_epoch(t) * (double)step_samples(t->o);
    const long eta = (long)((all - t->before - t->samples) / rate + 0.5);
    const int tenth = t->epoch == 1 || t->epoch * 10LL / r->epochs > (t->epoch - 1) * 10LL / r->epochs;
    char field[FIELDS][ROOM], line[COLUMNS] = "";
    if (terminal ? now - t->shown < 0.1 && !epoch_done : !epoch_done || !tenth) return;
    t->shown = now;
    snprintf(field[0], ROOM, "[%d/%d]", r->number, r->of);
    snprintf(field[1], ROOM, "%s %s %s", r->net->name, level_name(r->level), mpt_dtype_name(r->type));
    snprintf(field[2], ROOM, "epoch %d/%d", t->epoch, r->epochs);
    snprintf(field[3], ROOM, "ETA %ld:%02ld", eta / 60, eta % 60);
    snprintf(field[4], ROOM, t->tested ? "test %.1f%%" : "test -", 100 * r->accuracy);
    snprintf(field[5], ROOM, "loss %.3f", mpt_loss(t->net));
    snprintf(field[6], ROOM, "scale %.0f", (double)mpt_loss_scale(t->net));
    snprintf(field[7], ROOM, "%.0f/s", rate);
    for (int i = 0; i < FIELDS; i++) line_add(line, columns < COLUMNS ? columns : COLUMNS - 1, field[i]);
    if (terminal) printf("\r%s\033[K", line);
    else puts(line);
    fflush(stdout);
}

/* In the place of a tensor's id: numbers that no initial weight draws. */
enum { DRAW_SHUFFLE = 1 << 20, DRAW_AUGMENT };

/* A random order of 0..n-1, the same for the same seed and epoch (Fisher and Yates). */
static void shuffle(size_t *order, size_t n, uint64_t seed, int epoch) {
    for (size_t i = 0; i < n; i++) order[i] = i;
    for (size_t i = n - 1; i > 0; i--) {
        const uint64_t random = mpt_hash(seed, (uint64_t)epoch, DRAW_SHUFFLE, i);
        const size_t j = (size_t)((random * (i + 1)) >> 32), kept = order[i];
        order[i] = order[j];
        order[j] = kept;
    }
}

/* One sample as floats, down pixels lower and right pixels further right, after mirroring it if flip; bytes of 0 move
   in from outside. */
static void fill_sample(const image_data *data, const unsigned char *x, int flip, long down, long right, float *out) {
    const long H = (long)data->height, W = (long)data->width, C = (long)data->channels;
    for (long h = 0; h < H; h++)
        for (long w = 0; w < W; w++) {
            const long from_h = h - down, from_w = flip ? W - 1 - (w - right) : w - right;
            const int inside = from_h >= 0 && from_h < H && from_w >= 0 && from_w < W;
            for (long c = 0; c < C; c++) *out++ = data->value[inside ? x[(from_h * W + from_w) * C + c] : 0];
        }
}

/* A training sample, changed at random as the options say; the same for the same seed, epoch and sample. */
static void augment_sample(const loop *t, size_t sample, float *out) {
    const unsigned char *x = t->data->train.x + sample * sample_bytes(t->data);
    const uint64_t span = 2 * (uint64_t)t->o->shift + 1;
    uint64_t random[3];
    for (uint64_t i = 0; i < 3; i++) random[i] = mpt_hash(t->r->seed, (uint64_t)t->epoch, DRAW_AUGMENT, 3 * sample + i);
    fill_sample(t->data, x, t->o->flip && random[0] >> 31, (long)((random[1] * span) >> 32) - t->o->shift,
                (long)((random[2] * span) >> 32) - t->o->shift, out);
}

/* Up from a tenth of the learning rate in the first fifth of the steps, then down to 0, so that the end is calm. */
static mpt_optimizer_desc optimizer_desc(const loop *t) {
    mpt_optimizer_desc desc = mpt_adam(t->o->lr > 0 ? t->o->lr : t->r->net->lr);
    desc.schedule.kind = MPT_SCHEDULE_ONE_CYCLE_LINEAR;
    desc.schedule.steps = (uint64_t)t->r->epochs * steps_per_epoch(t);
    desc.schedule.start = 0.1;
    desc.schedule.peak = 0.2;
    desc.schedule.no_cycle_momentum = 1;
    return desc;
}

static mpt_model *build_model(const loop *t) {
    const image_data *data = t->data;
    mpt_train_desc train = MPT_ZERO;
    mpt_model *net = mpt_model_new(t->ctx, mpt_policy_preset(t->r->level, t->r->type));
    if (!net) fail_run(t);
    t->r->net->layers(net, mpt_input(net, (int)data->height, (int)data->width, (int)data->channels));
    train.batch = t->o->batch;
    train.accumulate = t->o->accumulate;
    train.ranks = t->o->ranks;
    train.shard_optimizer = t->o->shard && !t->r->gradients; /* these must be whole */
    train.optimizer = optimizer_desc(t);
    train.scaler.mode = t->r->scaler;
    train.seed = t->r->seed;
    if (mpt_model_build(net, &train) != MPT_OK) fail_run(t);
    return net;
}

/* The gradients of the last step, which stay until the next. */
static mpt_result count_gradients(loop *t) {
    mpt_params *params = mpt_model_params(t->net);
    return mpt_histogram_add(t->ctx, mpt_params_count(params, 0), mpt_f32_array(mpt_params_grad(params, 0)),
                             t->r->gradients);
}

/* One pass over the training samples in a new order, or what is left of it. Each rank has its share of a step. */
static mpt_result train_epoch(loop *t) {
    const size_t share = rank_samples(t->o), whole = step_samples(t->o), sample = sample_bytes(t->data);
    const size_t skipped = (size_t)t->o->ranks.rank * share, steps = steps_per_epoch(t);
    const double before = t->spent, start = seconds();
    mpt_result result = MPT_OK;
    shuffle(t->order, t->data->train.count, t->r->seed, t->epoch);
    for (size_t step = t->first; result == MPT_OK && step < steps; step++) {
        result = agree_to_end(t->o);
        if (result != MPT_OK || interrupted) break;
        for (size_t i = 0; i < share; i++) {
            const size_t from = t->order[step * whole + skipped + i];
            augment_sample(t, from, t->x + i * sample);
            t->y[i] = t->data->train.y[from];
        }
        result = mpt_train_step(t->net, t->x, t->y);
        if (result == MPT_OK && t->r->gradients && t->epoch == t->r->epochs) result = count_gradients(t);
        t->samples += (double)whole;
        t->spent = before + seconds() - start;
        show_progress(t, 0);
    }
    t->first = 0;
    return result;
}

/* How many of the test samples are right? In batches, so that Ctrl-C need not wait for all of them. */
static void test_model(loop *t) {
    const image_set *test = &t->data->test;
    const size_t batch = (size_t)t->o->batch, sample = sample_bytes(t->data);
    uint64_t correct = 0;
    for (size_t at = 0; at < test->count && !interrupted; at += batch) {
        const size_t n = test->count - at < batch ? test->count - at : batch;
        mpt_metrics metrics;
        for (size_t i = 0; i < n; i++) {
            fill_sample(t->data, test->x + (at + i) * sample, 0, 0, 0, t->x + i * sample);
            t->y[i] = test->y[at + i];
        }
        if (mpt_evaluate(t->net, t->x, t->y, n, &metrics) != MPT_OK) fail_run(t);
        correct += metrics.correct;
    }
    if (interrupted) return;
    t->r->correct = correct;
    t->r->accuracy = (double)correct / (double)test->count;
    t->tested = 1;
}

/* ---- Checkpoints ---- */

/* Before the first run, so that a wrong name costs no training. */
static void check_save(const char *save) {
    char *path = join(save, ".tmp", "");
    FILE *file = fopen(path, "w");
    if (!file) FAIL(BAD_USE, "%s: %s", path, strerror(errno));
    fclose(file);
    remove(path);
    free(path);
}

/* With --shard all ranks do this; only one has a name. */
static void save_run(const loop *t) {
    const mpt_result result = mpt_checkpoint_save(t->net, t->r->save);
    if (result == MPT_ERROR_FILE) FAIL(BAD_USE, "%s", mpt_why(t->ctx));
    if (result != MPT_OK) fail_run(t);
}

/* Order and changes of the samples are named by seed and epoch, so the steps done say where to go on. */
static void resume_run(loop *t) {
    const size_t steps = steps_per_epoch(t);
    uint64_t done;
    if (mpt_checkpoint_load(t->net, t->r->resume) != MPT_OK) FAIL(BAD_USE, "--resume: %s", mpt_why(t->ctx));
    done = mpt_steps_applied(t->net) + mpt_steps_skipped(t->net);
    if (done > steps * (uint64_t)t->r->epochs)
        FAIL(BAD_USE, "--resume: %s has done %" PRIu64 " steps, and %d epochs have %" PRIu64, t->r->resume, done,
             t->r->epochs, steps * (uint64_t)t->r->epochs);
    t->epoch = (int)(done / steps);
    t->first = (size_t)(done % steps);
    t->before = (double)done * (double)step_samples(t->o);
}

/* ---- A run ---- */

static loop begin_run(mpt_context *ctx, const options *o, const image_data *data, run *r) {
    loop t = MPT_ZERO;
    t.ctx = ctx;
    t.o = o;
    t.data = data;
    t.r = r;
    t.order = (size_t *)allocate(data->train.count, sizeof *t.order);
    t.x = (float *)allocate(rank_samples(o) * sample_bytes(data), sizeof *t.x);
    t.y = (int32_t *)allocate(rank_samples(o), sizeof *t.y);
    t.net = build_model(&t);
    if (r->resume) resume_run(&t);
    return t;
}

static void end_run(loop *t) {
    mpt_model_free(t->net);
    free(t->order);
    free(t->x);
    free(t->y);
}

/* Trains one run, tests it after each epoch, saves it. One that diverges is told and marked, and tested as it is. */
static void train_run(mpt_context *ctx, const options *o, const image_data *data, run *r) {
    loop t = begin_run(ctx, o, data, r);
    mpt_result result = MPT_OK;
    if (t.epoch == r->epochs) test_model(&t); /* resumed at its end */
    while (t.epoch < r->epochs && result == MPT_OK && !interrupted) {
        t.epoch++;
        result = train_epoch(&t);
        test_model(&t);
        if (result == MPT_OK && !interrupted) show_progress(&t, 1);
    }
    r->rate = samples_per_second(&t);
    r->diverged = result == MPT_ERROR_DIVERGED;
    if (r->diverged && o->ranks.rank == 0)
        complain("%s %s %s: %s", r->net->name, level_name(r->level), mpt_dtype_name(r->type), mpt_why(ctx));
    if (result != MPT_OK && !r->diverged) fail_run(&t);
    r->scale = mpt_loss_scale(t.net);
    r->skipped = mpt_steps_skipped(t.net);
    r->memory = mpt_model_memory(t.net);
    if (r->save || r->helps_save) save_run(&t);
    if (interrupted && o->ranks.rank == 0)
        complain("%s %s %s: interrupted in epoch %d of %d, %s%s", r->net->name, level_name(r->level),
                 mpt_dtype_name(r->type), t.epoch, r->epochs, r->save ? "saved to " : "not saved",
                 r->save ? r->save : "");
    end_run(&t);
}

/* ---- Results ---- */

static void print_table(const run *runs, int count) {
    wipe_line();
    printf("\n%33s%10s%8s%49s%10s\n", "test", "loss", "skipped", "bytes of                     ", "training");
    printf("%-7s%-7s%-5s%5s%9s%10s%8s%9s%9s%10s%9s%12s%10s\n", "model", "policy", "type", "seed", "accuracy", "scale",
           "steps", "weights", "masters", "gradients", "moments", "activations", "samples/s");
    for (int i = 0; i < count; i++) {
        const run *r = &runs[i];
        const mpt_memory *m = &r->memory;
        printf("%-7s%-7s%-5s%5" PRIu64, r->net->name, level_name(r->level), mpt_dtype_name(r->type), r->seed);
        if (r->diverged) printf("%9s", "diverged");
        else printf("%7.2f %%", 100 * r->accuracy);
        printf("%10.0f%8" PRIu64 "%9zu%9zu%10zu%9zu%12zu%10.0f\n", (double)r->scale, r->skipped, m->weights, m->masters,
               m->gradients, m->moments, m->activations, r->rate);
    }
}

static void csv_check(FILE *file, const char *path, int close) {
    if (ferror(file) || (close ? fclose(file) : fflush(file)) != 0) FAIL(BAD_USE, "%s: %s", path, strerror(errno));
}

/* Opens the CSV file before the first run, so that a wrong name costs no training. */
static FILE *csv_open(const char *path) {
    FILE *file = fopen(path, "w");
    if (!file) FAIL(BAD_USE, "%s: %s", path, strerror(errno));
    fputs("model,policy,type,seed,epochs,test_accuracy,loss_scale,skipped_steps,weight_bytes,master_bytes,"
          "gradient_bytes,moment_bytes,activation_bytes,samples_per_s\n",
          file);
    csv_check(file, path, 0);
    return file;
}

static void csv_row(FILE *file, const run *r) {
    const mpt_memory *m = &r->memory;
    fprintf(file, "%s,%s,%s,%" PRIu64 ",%d,%.6f,%.9g,%" PRIu64 ",%zu,%zu,%zu,%zu,%zu,%.1f\n", r->net->name,
            level_name(r->level), mpt_dtype_name(r->type), r->seed, r->epochs, r->accuracy, (double)r->scale,
            r->skipped, m->weights, m->masters, m->gradients, m->moments, m->activations, r->rate);
}

/* The runs of one net and policy, one for each seed. */
typedef struct spread {
    double mean, low, high;
    int diverged;
} spread;

static spread spread_of(const run *runs, int seeds) {
    spread s = {0, 1, 0, 0};
    for (int i = 0; i < seeds; i++) {
        s.mean += runs[i].accuracy / seeds;
        if (runs[i].accuracy < s.low) s.low = runs[i].accuracy;
        if (runs[i].accuracy > s.high) s.high = runs[i].accuracy;
        s.diverged |= runs[i].diverged;
    }
    return s;
}

/* Mean and spread over the seeds, and whether 16 bits learn what fp32 learns. */
static void compare_seeds(const run *runs, int count, int seeds, double within) {
    spread fp32 = MPT_ZERO;
    const recipe *net = NULL; /* whose fp32 that is */
    printf("\nTest accuracy over %d seeds in %%, and is the mean within %g points of fp32's?\n", seeds, within);
    printf("%-7s%-7s%-5s%8s%8s%9s%12s\n", "model", "policy", "type", "mean", "lowest", "highest", "to fp32");
    for (int i = 0; i + seeds <= count; i += seeds) {
        const run *r = &runs[i];
        const spread s = spread_of(r, seeds);
        const double points = 100 * (s.mean - fp32.mean);
        const int good = !s.diverged && !fp32.diverged && points <= within && points >= -within;
        printf("%-7s%-7s%-5s%8.2f%8.2f%9.2f", r->net->name, level_name(r->level), mpt_dtype_name(r->type), 100 * s.mean,
               100 * s.low, 100 * s.high);
        if (net == r->net) printf("%+12.2f  %s", points, good ? "yes" : "NO");
        printf("%s\n", s.diverged ? "  diverged" : "");
        if (r->level != MPT_O0) continue;
        fp32 = s;
        net = r->net;
    }
}

/* All runs, the CSV file and the table. Returns the exit status. */
static int train_all(mpt_context *ctx, const options *o, const image_data *data, double within, run *runs, int count) {
    FILE *csv = NULL;
    int status = 0, done = 0;
    if (step_samples(o) > data->train.count)
        FAIL(BAD_USE, "--batch %d, for a step %zu: there are %zu training samples", o->batch, step_samples(o),
             data->train.count);
    if (o->csv) csv = csv_open(o->csv);
    if (o->save) check_save(o->save);
    catch_interrupts(o);
    while (done < count) {
        train_run(ctx, o, data, &runs[done]);
        if (interrupted) break;
        if (runs[done].diverged) status = BAD_RUN;
        if (csv) {
            csv_row(csv, &runs[done]);
            csv_check(csv, o->csv, 0);
        }
        done++;
    }
    if (csv) csv_check(csv, o->csv, 1);
    if (done) print_table(runs, done);
    if (o->seeds > 1 && done >= o->seeds) compare_seeds(runs, done, o->seeds, within);
    return status;
}

/* ---- Does fp16 need its loss scale on the digits? ---- */

/* How many values have 2^low <= |x| < 2^high. */
static uint64_t count_between(const mpt_histogram *h, int low, int high) {
    uint64_t count = 0;
    for (int e = low; e < high; e++) count += h->exponent[e + 127];
    return count;
}

/* The histogram as bars of two exponents each, down to the smallest number that fp16 holds with the scale. */
static void print_bars(const mpt_histogram *h, int log2_scale) {
    static const char bar[] = "########################################";
    const int normal = -14, subnormal = -24, low = (subnormal - log2_scale) / 2 * 2 - 2, high = 128;
    const double all = (double)count_between(h, -127, high) + 1e-9; /* no division by 0 */
    uint64_t longest = 1;
    for (int e = low; e < high; e += 2)
        if (count_between(h, e, e + 2) > longest) longest = count_between(h, e, e + 2);
    for (int e = high - 2; e >= low; e -= 2) {
        const uint64_t count = count_between(h, e, e + 2);
        if (count_between(h, e, high) == 0) continue;
        printf("  2^%-4d%7.2f %%  %.*s", e, 100 * (double)count / all, (int)(40 * count / longest), bar);
        if (e == normal) printf("  smallest normal number of fp16");
        if (e == subnormal) printf("  smallest subnormal number of fp16");
        if (log2_scale && (e | 1) == ((normal - log2_scale) | 1)) printf("  smallest normal, scaled");
        if (log2_scale && (e | 1) == ((subnormal - log2_scale) | 1)) printf("  smallest subnormal, scaled");
        putchar('\n');
    }
    printf("  below %7.2f %%\n", 100 * (double)count_between(h, -127, low) / all);
}

static void print_verdict(const run *scaled, const run *bare, double flushed, size_t tested) {
    const double p = scaled->accuracy;
    const double noise = sqrt(2 * p * (1 - p) * (double)tested); /* deviation of a difference of two tests */
    printf("Of %zu test digits %" PRIu64 " are right with the scale, %" PRIu64
           " without; such a difference has a standard\n"
           "deviation of %.1f.\n",
           tested, scaled->correct, bare->correct, noise);
    if (bare->diverged || (double)scaled->correct - (double)bare->correct > 2 * noise)
        puts("So fp16 without loss scaling is worse here.");
    else
        printf("So fp16 without loss scaling is not measurably worse at this size: the %.1f %% that vanish are the\n"
               "smallest gradients, and the larger ones still train the net.\n",
               100 * flushed);
}

/* Trains the MLP in fp32, and in fp16 with the scale and without. Returns the exit status. */
static int compare_scaling(mpt_context *ctx, const options *o, const image_data *data) {
    run runs[3], *plain = &runs[0], *scaled = &runs[1], *bare = &runs[2];
    mpt_histogram *h = (mpt_histogram *)allocate(1, sizeof *h);
    lens_fit without, with;
    int log2_scale;
    memset(runs, 0, sizeof runs);
    for (int i = 0; i < 3; i++) {
        runs[i].net = &digits_task.nets[MLP];
        runs[i].level = i == 0 ? MPT_O0 : MPT_O2;
        runs[i].type = i == 0 ? MPT_F32 : MPT_F16;
        runs[i].seed = o->seed;
        runs[i].epochs = o->epochs ? o->epochs : digits_task.nets[MLP].epochs;
        runs[i].number = i + 1;
        runs[i].of = 3;
    }
    plain->gradients = h;
    bare->scaler = MPT_SCALER_OFF;
    printf("\nDoes fp16 need its loss scale here?\n");
    for (int i = 0; i < 3 && !interrupted; i++) train_run(ctx, o, data, &runs[i]);
    wipe_line();
    if (interrupted) {
        free(h);
        return 0;
    }
    log2_scale = (int)lround(log2((double)scaled->scale));
    without = lens_histogram_fit(h, MPT_F16, 0);
    with = lens_histogram_fit(h, MPT_F16, log2_scale);
    printf("mlp O2 f16: test accuracy %.2f %% with the scale, %.2f %% without.\n"
           "Gradients of the weights in the last epoch of fp32 training by size, the zeros left out:\n",
           100 * scaled->accuracy, 100 * bare->accuracy);
    print_bars(h, log2_scale);
    printf("fp16 would round %.2f %% of them to zero and make %.2f %% subnormal; times 2^%d, the scale in use,\n"
           "%.2f %% and %.2f %%, and %.2f %% overflow. (mpt sums gradients of weights in fp32; what passes through\n"
           "fp16 on the way are the gradients of activations.)\n",
           100 * without.flushed, 100 * without.subnormal, log2_scale, 100 * with.flushed, 100 * with.subnormal,
           100 * with.overflowed);
    print_verdict(scaled, bare, without.flushed, data->test.count);
    free(h);
    return plain->diverged || scaled->diverged || bare->diverged ? BAD_RUN : 0;
}

int main(int argc, char **argv) {
    options o = parse_options(argc, argv);
    machine m;
    machine_open(&m, &o);
    char *folder = o.data ? join(o.data, "", "") : find_digits(argv[0]);
    image_data data = image_data_load(folder);
    const task *work = data.small ? &digits_task : &images_task;
    int count, status, half = 0;
    run *runs = select_runs(&o, work, &count);
    if (!o.batch) o.batch = work->batch;
    status = train_all(m.ctx, &o, &data, work->within, runs, count);
    for (int i = 0; i < count; i++) half |= runs[i].type == MPT_F16;
    if (data.small && half && !interrupted) status |= compare_scaling(m.ctx, &o, &data);
    free(runs);
    free(folder);
    image_data_free(&data);
    machine_close(&m, &o);
    if (fflush(stdout) == 0 && !ferror(stdout)) return interrupted ? INTERRUPTED : status;
    complain("standard output: %s", strerror(errno));
    return BAD_USE;
}
