/* mpt.h - mixed-precision training in one C header.                                  version 0.2.0, MIT licence

   Do this in ONE source file, and a plain #include "mpt.h" in all others:

       #define MPT_IMPLEMENTATION
       #include "mpt.h"

   and compile it with   cc -O2 program.c -lm -pthread   (C99 or later, or C++11 or later; nothing else to install).
   GPU: mpt_cuda.cuh beside this file opens the same API on CUDA.

   CONTENTS   search for "==== NAME"
     MANUAL            what mixed precision is, the training loop, rules for errors, memory, threads and numbers
     CONFIGURATION     every macro that may be defined before the include
     CONTEXT           results, allocator, reason text, device memory
     NUMBERS           floor 0: half types, scalar casts, rounding, counter-based random numbers
     ARRAYS            floor 1: typed arrays; bulk cast, scan, exponent histogram
     OPERATIONS        floor 2: gemm, conv2d, pooling, elementwise, norms, losses, forward and backward
     TRAINING          floor 3: loss scaler, parameter block, optimizers, clipping, the step protocol
     MODEL             floor 4: graph of layers, precision policy, memory plan, training and evaluation
     FILES             floor 5: the plan and its bytes; weights and checkpoints as safetensors
     BACKEND           the seam: the table of operations that a device implements
     - stop here if you only want the API -
     RULES             element rules shared by host and device: casts, hash, scaler, optimizers
     CORE              errors, memory, threads
     SIMD              bulk loops for each instruction set, chosen once by cpuid; the context
     CHECKS            arrays and operations: arguments are checked, the backend does the work
     REFERENCE         the operations as plain loops, a backend of their own
     ENGINE            the CPU backend: packed matrix product, convolution, elementwise loops
     TRAINING PARTS    scaler, parameter block, optimizer
     LAYERS            one block for each kind of layer
     MODEL PARTS       graph, plan, forward, backward, step
     FILE PARTS        the plan and its bytes as tables; safetensors read and written
     REVISIONS         what changed for users
     LICENCE

   ==== MANUAL ====

   1. Why. A 16-bit number takes half the memory and, on most chips, multiplies at twice to sixteen times the rate of
   fp32. Two formats are in use:

                 bits (sign exponent fraction)   largest      smallest normal   smallest subnormal   gap after 1
       fp32      1  8 23                         3.4e38       1.2e-38           1.4e-45              1.2e-7
       bf16      1  8  7                         3.4e38       1.2e-38           9.2e-41              7.8e-3
       fp16      1  5 10                         65504        6.1e-5            6.0e-8               9.8e-4
       e5m2      1  5  2                         57344        6.1e-5            1.5e-5               0.25
       e4m3      1  4  3                         448          1.6e-2            2.0e-3               0.125

   Training in them as they stand fails in three ways, and each has one remedy (Micikevicius et al., "Mixed Precision
   Training", 2018, arXiv 1710.03740):

     - Small gradients vanish: fp16 flushes everything under 6e-8 to zero. Remedy: multiply the loss by a scale S. By
       the chain rule every gradient grows by S; divide by S again in fp32 before the update. S is found by trial:
       halve it when a gradient overflows (and skip that step), double it after 2000 clean steps. See mpt_scaler.
     - Small updates vanish: 1 + 0.0004 is 1 in fp16, so a weight stops moving when lr * gradient falls under half its
       gap. Remedy: keep an fp32 master of every weight, update that, and round it to 16 bits for the products. See
       mpt_params.
     - Long sums lose their tail: adding 0.5 to 2048 in fp16 gives 2048. Remedy: multiply in 16 bits, accumulate in
       fp32. Every product, norm, softmax and loss here does.

   bf16 has the range of fp32, so it needs no loss scale (mpt still checks every step); it needs masters even more.

   2. A whole program. Shapes are known when the model is built; a step allocates nothing.

       mpt_context *ctx = mpt_open(NULL);
       mpt_model *net = mpt_model_new(ctx, mpt_policy_preset(MPT_O2, MPT_F16));
       int h = mpt_input(net, 8, 8, 1);                         height, width, channels
       h = mpt_relu(net, mpt_conv2d(net, h, 16, 3, NULL));      16 filters, 3x3, stride 1, no padding
       h = mpt_max_pool2d(net, h, 2, NULL);
       h = mpt_linear(net, h, 10, NULL);
       mpt_softmax_cross_entropy(net, h, NULL);

       mpt_train_desc train = MPT_ZERO;
       train.batch = 32;
       train.optimizer = mpt_adam(1e-3);
       if (mpt_model_build(net, &train) != MPT_OK) puts(mpt_why(ctx));

       for (int step = 0; step < 1000; step++)
           mpt_train_step(net, images, labels);                 32 x 8 x 8 floats, 32 int32_t
       printf("loss %g scale %g skipped %d\n", mpt_loss(net), mpt_loss_scale(net), (int)mpt_steps_skipped(net));
       mpt_model_free(net);
       mpt_close(ctx);

   mpt_train_step is these calls; make them yourself to look between them or to change them:

       mpt_forward(net, images, labels, 32);                    loss, and all that backward needs
       mpt_backward(net);                                       adds S * dloss/dw to the fp32 gradients
       mpt_unscale(opt);                                        all finite? norm? (opt = mpt_model_optimizer(net))
       mpt_clip_norm(opt, 1.0);
       mpt_step(opt);                                           update the masters, round the 16-bit copies; or skip
       mpt_scaler_update(scaler);                               S for the next step (scaler = mpt_model_scaler(net))

   Every floor is usable without those above it: convert arrays with mpt_cast, train your own model with mpt_params,
   mpt_optimizer and mpt_scaler alone.

   3. A step is a transaction. If any gradient is inf or NaN, mpt_step changes nothing: not the weights, the moments,
   the step count of Adam's bias correction, nor the learning-rate schedule. Only S and the counters change, and the
   journal in mpt_optimizer_state says which tensor it was. The same holds for a step that would leave a moment or a
   running statistic inf or NaN, and for one in which no sample has any weight: see mpt_skip_reason.

   A step is defined by its samples, not by how they are split: it follows the gradient of the sum of their losses
   divided by the sum of their weights, whether they come in one pass or accumulate over several.

   4. Errors. Calls return an mpt_result; MPT_OK is 0. The context keeps the reason with names and values: mpt_why(ctx).
   Calls that return a node or tensor id return 0 on failure; later calls accept 0 and return 0, and the build reports
   the first reason. Nothing prints, exits, aborts, or reads errno; a failed call leaves everything as it was.

   5. Memory. All of it comes from the allocator in mpt_context_desc (malloc by default) and is returned by the _free
   and _close calls. Free what was made from a context before the context, and optimizers before their scaler and
   params. No function needs more than 1 KiB of stack for its locals (gcc 12 and clang 14 at -O2).

   6. Threads. One context belongs to one thread at a time; two contexts share nothing. A context owns a pool of worker
   threads that sleep when idle. Results are the same bits for any number of threads; workers take over the caller's
   rounding mode and treatment of subnormals for each job (except on x87). After fork, a context also works in the
   child, without its workers.

   7. Layout is NHWC for images (batch, height, width, channels), [K][R][S][C] for convolution weights (filters, kernel
   height, kernel width, channels), [outputs][inputs] for linear weights, all row-major and dense.

   8. Numbers. 16-bit storage, fp32 arithmetic. Casts, scans and the scaler test and round with integer operations, so
   -ffast-math in your build cannot break them. Activations and losses are right under -ffast-math for every finite
   input, but only without it do they propagate inf and NaN (ReLU always does). Optimizers follow PyTorch's formulas
   operation by operation; moments below 2^-126 become 0.

   9. Inputs. Images can be given as bytes, a quarter of the data to copy; the device computes x = byte * scale[c] +
   shift[c]. Batches that are in the device's memory already need no copy at all (in.in_device):

         mpt_input_desc in = MPT_ZERO;
         in.bytes = 1;                                          0..1 by default
         int h = mpt_input_with(net, 28, 28, 1, &in);
         ...
         mpt_train_step(net, pixels, labels);                   32 x 28 x 28 uint8_t

   Losses take an mpt_loss_desc: class weights, an ignored label, pos_weight, Huber's delta and more. For segmentation,
   loss.per_position gives every position a label of its own. For mixup, loss.probabilities makes the targets 32 x 10
   floats instead of 32 labels. Weights of samples come with their batch:

       mpt_loss_desc loss = MPT_ZERO;
       loss.per_position = 1;                                   3 classes, labels 32 x height x width
       loss.weighted = 1;
       mpt_softmax_cross_entropy(net, mpt_conv2d(net, h, 3, 1, NULL), &loss);
       ...
       mpt_sample_weights(net, weights);                        32 floats, for the next step alone
       mpt_train_step(net, images, masks);

   10. Your own loss, inputs and layers. A model without a loss node ends in heads, the nodes that no other node reads;
   compute a loss of your own from their values:

         mpt_forward(net, images, NULL, n);
         mpt_node_value(net, head, y);                            n x elements floats
         ...                                                      grad = dloss/dy
         mpt_output_grad(net, head, grad);                        for each head
         mpt_backward(net);                                       then mpt_unscale, ... as in 2

   Several inputs: a sample is one array that holds them one after another, mpt_slice takes it apart, and mpt_reshape
   gives each part its shape. Together with several heads, any number of inputs and outputs can be had:

       int both = mpt_input(net, 1, 1, 8 * 8 * 1 + 5);          an image, then 5 numbers
       int image = mpt_reshape(net, mpt_slice(net, both, 0, 64), 8, 8, 1);
       int extra = mpt_linear(net, mpt_slice(net, both, 64, 5), 16, NULL);
       image = mpt_linear(net, mpt_conv2d(net, image, 4, 3, NULL), 16, NULL);
       int h = mpt_relu(net, mpt_concat(net, image, extra));

   mpt_multiply scales channels (squeeze-and-excite); mpt_upsample enlarges an image again:

         int s = mpt_global_avg_pool2d(net, h);                   one pixel of C channels
         s = mpt_sigmoid(net, mpt_linear(net, s, C, NULL));
         h = mpt_multiply(net, h, s);

   A layer of your own is two functions on arrays: see mpt_layer. mpt_keep makes the value and the gradient of any node
   readable, also of the input; mpt_name names a node, and mpt_find finds it by that name.

   11. Fine-tuning and inference. desc.tuning freezes a layer or gives it its own learning rate; mpt_optimizer_tensor
   changes the rate of a tensor later, by its name: mpt_params_find(params, "conv1.weight"). mpt_weights_load takes a
   prefix and, if asked to, loads only what fits and reports the rest. train.inference = 1 builds a model that only
   predicts: no masters, gradients or moments, and a layer's activations are freed once the next layer has read them.
   With train.fold = 1, loading folds batch norms into the weights of the layers before them; mpt_model_print shows
   which. examples/resnet18.h loads torchvision's ResNet-18.

   Averaging. With train.ema_decay = 0.999 the model keeps moving averages of its weights; after mpt_use_average(net, 1)
   it evaluates, predicts and saves with them.

   12. Several ranks. Processes on one machine or on many train one model together: train.ranks gives this process's
   rank and a function that sums an array over all ranks. The steps are bit for bit those of one process; see mpt_ranks.
   With train.shard_optimizer each rank keeps and updates only its part of the optimizer's arrays, with the same bits.

   13. Not here: recurrent nets and attention.                                                                        */

#ifndef MPT_H
#define MPT_H

/* ==== CONFIGURATION ====

   Everywhere the header is included, the same in all files:
     MPT_STATIC          every function is static: one private copy per source file
     MPT_DEF             linkage of every function, for example __declspec(dllexport); default extern

   Only where MPT_IMPLEMENTATION is defined:
     MPT_NO_THREADS      no worker threads, no pthread.h; implied by MSVC, which has none
     MPT_NO_SIMD         plain C only, no intrinsics
     MPT_NO_STDIO        no stdio.h: files are saved to memory and loaded from it; what takes a path returns
                         MPT_ERROR_UNSUPPORTED
     MPT_SMALL           for little memory: a CPU context takes 70 KB a thread instead of 1.4 MB. Products are computed
                         in smaller blocks, so they are slower and add in another order. XOR on a Cortex-M4
                         (tests/compile/xor.c, arm-none-eabi-gcc -Os): text 106 KB, including the C library and
                         printf; RAM 89 KB without the stack

   No macro changes a public struct.                                                                                  */

#include <stddef.h>
#include <stdint.h>

#define MPT_VERSION 200 /* major * 10000 + minor * 100 + patch */
#define MPT_VERSION_STRING "0.2.0"

#if defined(__GNUC__) || defined(__clang__)
#define MPT__UNUSED __attribute__((unused))
#else
#define MPT__UNUSED
#endif

/* Has the compiler check a call like printf: parameter `format` is the format, parameter `first` the first argument. */
#if defined(__MINGW32__) && !defined(__clang__) /* gcc checks against Microsoft's printf by default, without %zu */
#define MPT__PRINTF(format, first) __attribute__((__format__(__gnu_printf__, format, first)))
#elif defined(__GNUC__) || defined(__clang__)
#define MPT__PRINTF(format, first) __attribute__((__format__(__printf__, format, first)))
#else
#define MPT__PRINTF(format, first)
#endif

#ifndef MPT_DEF
#ifdef MPT_STATIC
#define MPT_DEF static MPT__UNUSED
#else
#define MPT_DEF extern
#endif
#endif

/* Inline functions that nvcc compiles for host and device. */
#ifdef __CUDACC__
#define MPT_HD static inline __host__ __device__
#else
#define MPT_HD static inline
#endif

/* mpt_train_desc d = MPT_ZERO;   all-zero descriptors mean "defaults" in C and in C++. */
/* clang-format off */
#ifdef __cplusplus
#define MPT_ZERO {}
#else
#define MPT_ZERO {0}
#endif
/* clang-format on */

#ifdef __cplusplus
extern "C" {
#endif

/* ==== CONTEXT ==== */

/* Result codes. One list makes the enum and the texts. Numbers never change; new codes go last. */
#define MPT_RESULTS(X)                                                               \
    X(OK, "success")                                                                 \
    X(ERROR_ARGUMENT, "an argument is NULL or out of range")                         \
    X(ERROR_NO_MEMORY, "the allocator returned NULL")                                \
    X(ERROR_SHAPE, "shapes do not fit together, or a size overflows")                \
    X(ERROR_TYPE, "a data type is not allowed here")                                 \
    X(ERROR_ORDER, "a call came in the wrong order")                                 \
    X(ERROR_VALUE, "a label is out of range, or an input is not finite")             \
    X(ERROR_DIVERGED, "gradients stay inf or NaN at the smallest loss scale")        \
    X(ERROR_UNSUPPORTED, "not available in this build, on this device or this file") \
    X(ERROR_DEVICE, "the device reported an error")                                  \
    X(ERROR_FILE, "a file cannot be read or written, or it is damaged")

/* clang-format off */
typedef enum mpt_result {
#define MPT__X(id, text) MPT_##id,
    MPT_RESULTS(MPT__X)
#undef MPT__X
    MPT_RESULT_COUNT
} mpt_result;
/* clang-format on */

typedef struct mpt_context mpt_context; /* one device, its allocator, its worker threads, the last reason */

typedef enum mpt_log_level {
    MPT_LOG_ERROR = 1, /* the reason of a failed call, as mpt_why has it */
    MPT_LOG_INFO       /* what was opened, and anything that makes it slower or less exact than it could be */
} mpt_log_level;

/* Instruction sets. Casts, scans, scaler and optimizers give the same bits on all of them. */
typedef enum mpt_isa {
    MPT_ISA_BEST = 0, /* the best one that this CPU and this build have */
    MPT_ISA_PLAIN,    /* C as the compiler's flags have it */
    MPT_ISA_AVX2,     /* x86-64 with AVX2, FMA and F16C */
    MPT_ISA_AVX512,   /* and AVX-512 F, BW, DQ, VL */
    MPT_ISA_NEON,     /* aarch64 */
    MPT_ISA_COUNT
} mpt_isa;

typedef struct mpt_context_desc {
    void *(*alloc)(size_t bytes, void *user);           /* NULL: malloc. Set both or neither. Aligned as malloc's */
    void (*release)(void *p, size_t bytes, void *user); /* NULL: free. bytes: what alloc was asked for */
    void (*log)(mpt_log_level level, const char *text, void *user); /* NULL: silent */
    void *user;                                                     /* passed to the three functions above */

    int threads;   /* 0: one per processor that the process, or its container, may use; 1: only the caller's */
    int reference; /* 1: operations are the plain loops of REFERENCE: slow, easy to read, something to compare with */
    mpt_isa isa;   /* instruction set of the bulk loops; mpt_open returns NULL if the CPU does not have it */
} mpt_context_desc;

/* Opens a CPU context. desc may be NULL (all defaults); it is copied. Returns NULL if there is no memory, if a thread
   cannot be started, or if the descriptor is wrong; desc->log then gets the reason. */
MPT_DEF mpt_context *mpt_open(const mpt_context_desc *desc);
/* Stops the worker threads and frees the context. NULL is allowed. */
MPT_DEF void mpt_close(mpt_context *ctx);
/* The reason why the last call failed, with names and values; "" after one that did not. Valid until the next call. */
MPT_DEF const char *mpt_why(const mpt_context *ctx);
/* Static English text of a result code. */
MPT_DEF const char *mpt_result_text(mpt_result result);
/* MPT_VERSION of the compiled implementation. */
MPT_DEF int mpt_version(void);
/* "cpu" or "cuda"; "none" for NULL, which a failed mpt_open returns. */
MPT_DEF const char *mpt_device_name(const mpt_context *ctx);
/* "plain", "avx2", "avx512" or "neon"; "none" for NULL. */
MPT_DEF const char *mpt_isa_name(const mpt_context *ctx);
/* The descriptor it was opened with, for code that wants the same allocator and log. All zero for NULL. */
MPT_DEF mpt_context_desc mpt_context_get_desc(const mpt_context *ctx);
/* Threads that work for this context, including the caller's; 0 for NULL. */
MPT_DEF int mpt_thread_count(const mpt_context *ctx);

/* Memory of the context's device, 64-byte aligned, zeroed: where the arrays of floors 1 and 2 must be. On the CPU it is
   ordinary memory, and any other pointer will do as well. mpt_alloc returns NULL when out of memory, and for 0
   bytes. */
MPT_DEF void *mpt_alloc(mpt_context *ctx, size_t bytes);
MPT_DEF void mpt_free(mpt_context *ctx, void *p);
MPT_DEF mpt_result mpt_upload(mpt_context *ctx, void *device, const void *host, size_t bytes);
MPT_DEF mpt_result mpt_download(mpt_context *ctx, void *host, const void *device, size_t bytes);

/* ==== NUMBERS ==== floor 0

   Half types are one-member structs, so that mixing them up or adding them as integers does not compile. */

/* clang-format off */
typedef struct mpt_f16 { uint16_t bits; } mpt_f16;   /* IEEE binary16 */
typedef struct mpt_bf16 { uint16_t bits; } mpt_bf16; /* upper half of a binary32 */
typedef struct mpt_e4m3 { uint8_t bits; } mpt_e4m3;  /* OCP FP8 E4M3: no inf, one NaN per sign, largest 448 */
typedef struct mpt_e5m2 { uint8_t bits; } mpt_e5m2;  /* OCP FP8 E5M2: upper byte of a binary16 */
/* clang-format on */

typedef enum mpt_dtype { MPT_F32 = 0, MPT_F16, MPT_BF16, MPT_E4M3, MPT_E5M2, MPT_DTYPE_COUNT } mpt_dtype;

MPT_DEF size_t mpt_dtype_size(mpt_dtype type);      /* bytes of one element; 0 for an unknown type */
MPT_DEF const char *mpt_dtype_name(mpt_dtype type); /* "f32", "f16", "bf16", "e4m3", "e5m2" */

typedef enum mpt_round {
    MPT_ROUND_NEAREST = 0, /* to the nearest value, ties to the even one (IEEE 754 roundTiesToEven) */
    MPT_ROUND_ZERO,        /* toward zero; a finite value never becomes inf */
    MPT_ROUND_STOCHASTIC   /* up with probability (x - below) / (above - below): right on average */
} mpt_round;

typedef enum mpt_overflow {
    MPT_OVERFLOW_INF = 0, /* past the largest finite value: inf, or NaN in e4m3, which has no inf */
    MPT_OVERFLOW_SATURATE /* past the largest finite value, and for inf itself: the largest finite value */
} mpt_overflow;

/* fp32 to `type`, as its bits in the low bytes. Integer arithmetic only.
   `random` supplies the random bits of MPT_ROUND_STOCHASTIC and is otherwise not used. Subnormals are kept.
   NaN stays NaN, quiet, with its sign and the upper payload bits (e4m3: its one NaN). -0 stays -0.
   Error: nearest: at most half a gap, so |y - x| <= 2^-(p) |x| for normal y with p significant bits (fp16 11, bf16 8,
   e5m2 3, e4m3 4); toward zero and stochastic: under one gap. */
MPT_HD uint32_t mpt_narrow(float x, mpt_dtype type, mpt_round round, mpt_overflow overflow, uint32_t random);
/* Bits of `type` to fp32. Exact for every value; subnormals are kept; NaN stays NaN with sign and payload, made
   quiet. */
MPT_HD float mpt_widen(uint32_t bits, mpt_dtype type);

/* The common cases: nearest even, overflow to inf (e4m3: NaN). Otherwise as above. */
MPT_HD mpt_f16 mpt_f16_from_f32(float x);
MPT_HD mpt_bf16 mpt_bf16_from_f32(float x);
MPT_HD mpt_e4m3 mpt_e4m3_from_f32(float x);
MPT_HD mpt_e5m2 mpt_e5m2_from_f32(float x);
MPT_HD float mpt_f32_from_f16(mpt_f16 x);
MPT_HD float mpt_f32_from_bf16(mpt_bf16 x);
MPT_HD float mpt_f32_from_e4m3(mpt_e4m3 x);
MPT_HD float mpt_f32_from_e5m2(mpt_e5m2 x);

/* 32 random bits named by four numbers: the same on every device, thread count and launch shape, and independent for
   different names. Initialisation and stochastic rounding draw from it. (splitmix64's finalizer, Steele, Lea, Flood
   2014, once for each number.) */
MPT_HD uint32_t mpt_hash(uint64_t seed, uint64_t step, uint64_t tensor, uint64_t element);
/* Uniform in [0, 1), 24 bits. */
MPT_HD float mpt_uniform(uint64_t seed, uint64_t step, uint64_t tensor, uint64_t element);

/* ==== ARRAYS ==== floor 1

   A typed pointer into the memory of the context's device. */
typedef struct mpt_array {
    void *data; /* NULL where an operation says "optional" */
    mpt_dtype type;
} mpt_array;

/* A pointer as an mpt_array. An operation never writes through an array that is its input. */
MPT_HD mpt_array mpt_f32_array(const float *p);
MPT_HD mpt_array mpt_f16_array(const mpt_f16 *p);
MPT_HD mpt_array mpt_bf16_array(const mpt_bf16 *p);
MPT_HD mpt_array mpt_typed_array(const void *p, mpt_dtype type);

/* How mpt_cast rounds. All zero: nearest even, overflow to inf. */
typedef struct mpt_rounding {
    mpt_round round;
    mpt_overflow overflow;
    uint64_t seed, step, tensor; /* stochastic: element i uses mpt_hash(seed, step, tensor, i) */
} mpt_rounding;

/* dst[i] = src[i] for n elements, between any two types; rounds once, from the value of src (through fp32, which holds
   every value of every type). rounding may be NULL. src and dst must not overlap unless they are the same array. */
MPT_DEF mpt_result mpt_cast(mpt_context *ctx, size_t n, mpt_array src, mpt_array dst, const mpt_rounding *rounding);

typedef struct mpt_scan {
    double sum_squares; /* over the finite elements, in a fixed order: the same bits on any number of threads */
    uint64_t inf, nan;  /* how many elements are inf, NaN */
    uint64_t first;     /* index of the first of them; n if there is none */
} mpt_scan;

/* Scans an array of any type in one pass. Recognises inf and NaN by their bits. Waits for the device. */
MPT_DEF mpt_result mpt_scan_array(mpt_context *ctx, size_t n, mpt_array x, mpt_scan *out);
/* x[i] *= factor, rounded to x's type, and the scan of the products in the same pass: unscales gradients in place
   (torch's _amp_foreach_non_finite_check_and_unscale_). */
MPT_DEF mpt_result mpt_scale_array(mpt_context *ctx, size_t n, float factor, mpt_array x, mpt_scan *out);

typedef struct mpt_histogram {
    uint64_t zero, inf, nan;
    uint64_t exponent[256]; /* [e]: elements with 2^(e-127) <= |x| < 2^(e-126); [0]: fp32 subnormals */
} mpt_histogram;

/* Counts the n elements of x in *h by their binary exponent. Zero *h first. Waits for the device. */
MPT_DEF mpt_result mpt_histogram_add(mpt_context *ctx, size_t n, mpt_array x, mpt_histogram *h);

/* ==== OPERATIONS ==== floor 2

   One struct and one call for each operation. Start the struct from MPT_ZERO, fill it in and call; a member that stays
   0 has the default that its comment names. The same struct is checked here and used by the CPU, CUDA and models: see
   BACKEND.

   Operations take raw arrays in the memory of the context's device, take sizes, and keep no state. Each array is F32,
   F16 or BF16; arithmetic and sums are in fp32. Gradients are named as in papers: dy is dloss/dy. `beta` says what
   happens to the old content of an output, as in BLAS: out = new + beta * out; with 0 it is not read.
   Letters: N batch, H W height and width, C channels, K filters, R S kernel height and width, P Q output height and
   width. Every call returns MPT_ERROR_ARGUMENT for a NULL array that is not optional, MPT_ERROR_SHAPE for sizes that do
   not fit together or overflow, and MPT_ERROR_TYPE for fp8 arrays. A size may be 0 where that leaves nothing to do. */

/* Activations, and which saved value the gradient needs: y or x. */
typedef enum mpt_activation {
    MPT_IDENTITY = 0,
    MPT_RELU,       /* y: max(x, 0) */
    MPT_LEAKY_RELU, /* y: x, or 0.01 x below 0; see mpt_map_op for other slopes */
    MPT_TANH,       /* y */
    MPT_SIGMOID,    /* y: 1 / (1 + exp(-x)) */
    MPT_GELU,       /* x: x Phi(x), by erf (Hendrycks and Gimpel 2016) */
    MPT_GELU_TANH,  /* x: its approximation by tanh */
    MPT_SILU,       /* x: x sigmoid(x) */
    MPT_ACTIVATION_COUNT
} mpt_activation;

/* c(m,n) = act(alpha op(a)(m,k) op(b)(k,n) + beta c + bias(n)). op(x) is x, or its transpose with trans_x. Row-major:
   lda is the distance between rows, in elements, of a as it is stored. A linear layer (torch.nn.functional.linear) is
     y(N,O)  = act(x(N,D) w(O,D)^T + b(O))    trans_b
     dx(N,D) = dy(N,O) w(O,D)
     dw(O,D) = dy(N,O)^T x(N,D), and db(O)    trans_a, a_sums */
typedef struct mpt_gemm_op {
    int trans_a, trans_b;
    size_t m, n, k;
    mpt_array a, b, c;
    size_t lda, ldb, ldc; /* 0: rows follow each other without a gap */
    float alpha;          /* 0: 1 */
    float beta;
    mpt_array bias; /* (n), optional */
    mpt_activation act;
    mpt_array a_sums; /* (m), optional; needs trans_a and no gap between rows. Gets the sums of the columns of a as it
                         is stored, + beta * a_sums: the gradient of a bias, computed along with dw */
} mpt_gemm_op;

MPT_DEF mpt_result mpt_op_gemm(mpt_context *ctx, const mpt_gemm_op *op);

typedef enum mpt_pass { MPT_FORWARD = 0, MPT_BACKWARD_DATA, MPT_BACKWARD_WEIGHT } mpt_pass;

/* Shape of a convolution; _h is down, _w across. Output P = (H + 2 padding_h - dilation_h (R - 1) - 1) / stride_h + 1,
   Q likewise. Filters K/groups g .. read channels C/groups g ..; groups = C = K is depthwise. */
typedef struct mpt_conv2d_shape {
    size_t N, H, W, C, K, R, S;
    size_t stride_h, stride_w;     /* 0: 1 */
    size_t padding_h, padding_w;   /* rows and columns of zeros on each side */
    size_t dilation_h, dilation_w; /* 0: 1 */
    size_t groups;                 /* 0: 1 */
    int same; /* 1: P = H, Q = W. Pads with dilation (kernel - 1) zeros in all, the odd one on the lower or right side.
                 Needs stride 1 and padding 0; padding='same' in torch */
} mpt_conv2d_shape;

/* x(N,H,W,C), w(K,R,S,C/groups), y(N,P,Q,K). torch.nn.functional.conv2d
     MPT_FORWARD            y = act(conv(x, w) + beta y + bias(K))
     MPT_BACKWARD_DATA      x is dx, y is dy: dx = dloss/dx from dy and w, + beta dx
     MPT_BACKWARD_WEIGHT    w is dw, y is dy: dw = dloss/dw from dy and x, + beta dw; bias: db = sums of dy + beta db */
typedef struct mpt_conv2d_op {
    mpt_pass pass;
    mpt_conv2d_shape shape;
    mpt_array x, w, y;
    mpt_array bias;     /* optional; not read by MPT_BACKWARD_DATA */
    mpt_activation act; /* MPT_FORWARD only */
    float beta;
    size_t P, Q; /* filled in by the call, as is the padding above and on the left with `same` */
} mpt_conv2d_op;

MPT_DEF mpt_result mpt_op_conv2d(mpt_context *ctx, const mpt_conv2d_op *op);
/* Output height and width. MPT_ERROR_SHAPE (and *P = *Q = 0) if the kernel does not fit. ctx may be NULL. */
MPT_DEF mpt_result mpt_conv2d_output(mpt_context *ctx, const mpt_conv2d_shape *shape, size_t *P, size_t *Q);

typedef enum mpt_pool_kind { MPT_POOL_MAX = 0, MPT_POOL_AVERAGE } mpt_pool_kind;

/* Shape of a pooling window R x S; _h is down, _w across. Max ignores the padding. Global pooling: R = H, S = W. R S at
   most 65536 for max. */
typedef struct mpt_pool2d_shape {
    size_t N, H, W, C, R, S;
    size_t stride_h, stride_w;   /* 0: R, S */
    size_t padding_h, padding_w; /* on each side; at most half the window */
    int exclude_padding; /* average: 0 divides by R S, 1 by the number of pixels in the window that are not padding;
                            count_include_pad=False in torch */
} mpt_pool2d_shape;

/* x(N,H,W,C), y(N,P,Q,C). torch.nn.functional.max_pool2d, avg_pool2d
     MPT_FORWARD          y from x. Max: index gets r * S + s of the first largest element; NaN counts as largest
     MPT_BACKWARD_DATA    x is dx, y is dy: dx = the gradient of x + beta dx */
typedef struct mpt_pool2d_op {
    mpt_pool_kind kind;
    mpt_pass pass;
    mpt_pool2d_shape shape;
    mpt_array x, y;
    uint16_t *index; /* (N,P,Q,C), written forward, read backward; average: NULL */
    float beta;      /* MPT_BACKWARD_DATA only */
    size_t P, Q;     /* filled in by the call */
} mpt_pool2d_op;

MPT_DEF mpt_result mpt_op_pool2d(mpt_context *ctx, const mpt_pool2d_op *op);
/* Output height and width, as mpt_conv2d_output. */
MPT_DEF mpt_result mpt_pool2d_output(mpt_context *ctx, const mpt_pool2d_shape *shape, size_t *P, size_t *Q);

/* A dropout mask that is never stored: element i is dropped if mpt_hash(seed, *step, tensor, i) < p 2^32, the same on
   every device and any number of threads. */
typedef struct mpt_mask {
    float p; /* in 0..1, 1 excluded */
    uint64_t seed, tensor;
    const uint64_t *step; /* device memory; NULL: 0 */
} mpt_mask;

/* How an element of the output is computed from the elements of the same index. */
typedef enum mpt_map {
    MPT_MAP_CAST = 0,            /* out = a, rounded as mpt_cast does; any type, fp8 too */
    MPT_MAP_ACTIVATION,          /* out = act(a) */
    MPT_MAP_ACTIVATION_GRADIENT, /* out = b * act'(x) + beta * out; a: the saved value that the list names, b: dy */
    MPT_MAP_ADD,                 /* out = act(a + beta * b); with beta 0 b is not read */
    MPT_MAP_DROPOUT,             /* out = a / (1 - p) if kept, 0 * a if dropped, + beta * out; the same call on dy
                                    gives the gradient (Srivastava et al. 2014; torch.nn.functional.dropout) */
    MPT_MAP_BYTES                /* out = a * scale + shift of its channel; a.data: uint8_t(n), whatever a.type */
} mpt_map;

typedef struct mpt_map_op {
    mpt_map map;
    size_t n;
    mpt_array a, b;
    mpt_array out; /* may be a or b, but not overlap them otherwise */
    float beta;
    mpt_activation act;
    float negative_slope;  /* of MPT_LEAKY_RELU, not negative; 0: 0.01 */
    mpt_rounding rounding; /* MPT_MAP_CAST */
    mpt_mask mask;         /* MPT_MAP_DROPOUT */
    size_t C;              /* MPT_MAP_BYTES: element i belongs to channel i % C */
    const float *channels; /* MPT_MAP_BYTES: (2, C), device memory: scales, then shifts. The product and the sum are
                              each rounded to fp32 */
} mpt_map_op;

MPT_DEF mpt_result mpt_op_map(mpt_context *ctx, const mpt_map_op *op);

/* y(rows,C) = x(rows,C) + beta * y: concatenates channels, and is its own gradient. */
typedef struct mpt_columns_op {
    size_t rows, C;
    mpt_array x, y;
    size_t x_stride, y_stride; /* distances between rows in elements; 0: C */
    float beta;
} mpt_columns_op;

MPT_DEF mpt_result mpt_op_columns(mpt_context *ctx, const mpt_columns_op *op);

/* A small image x(N,H,W,C), each of whose pixels stands for R x S pixels of a large one, y(N,H R,W S,C). */
typedef struct mpt_broadcast_shape {
    size_t N, H, W, C, R, S;
} mpt_broadcast_shape;

/* Nearest-neighbour upsampling. With a factor, an array as large as y, it multiplies that by the smaller image:
   R = S = 1 multiplies two arrays, H = W = 1 scales channels (squeeze-and-excite; Hu et al. 2018).
     MPT_FORWARD          y = x, each pixel repeated R x S times, times factor, + beta y
     MPT_BACKWARD_DATA    x is dx, y is dy: dx = sums of dy times factor over R x S pixels, in double, + beta dx
   The gradient of the factor is MPT_FORWARD with dy as the factor. */
typedef struct mpt_broadcast_op {
    mpt_pass pass;
    mpt_broadcast_shape shape;
    mpt_array x, y;
    mpt_array factor; /* optional; may be y, but not overlap it otherwise */
    float beta;
} mpt_broadcast_op;

MPT_DEF mpt_result mpt_op_broadcast(mpt_context *ctx, const mpt_broadcast_op *op);

/* Shape of a normalisation: x(N,pixels,C), with the C channels in groups of equal size. Each group of each sample has a
   mean and a variance over its pixels and channels:
     group norm      N samples, pixels H W           layer norm over the channels    N = all rows, pixels 1, groups 1
     instance norm   the same with groups = C        batch norm    N 1, pixels = all rows, groups = C */
typedef struct mpt_norm_shape {
    size_t N, pixels, C, groups;
    float eps; /* 0: 1e-5 */
} mpt_norm_shape;

typedef enum mpt_norm_pass {
    MPT_NORM_STATS = 0, /* stats = means and variances of x; sums in double */
    MPT_NORM_FORWARD,   /* y = act((x - mean) / sqrt(variance + eps) * gamma + beta), with any statistics */
    MPT_NORM_BACKWARD,  /* dx, dgamma, dbeta from y, which is dy */
    MPT_NORM_RUNNING    /* running = (1 - momentum) running + momentum (mean, variance), with the unbiased variance */
} mpt_norm_pass;

/* torch.nn.functional.batch_norm, layer_norm and group_norm, one pass of them. */
typedef struct mpt_norm_op {
    mpt_norm_pass pass;
    mpt_norm_shape shape;
    mpt_array x;
    float *stats; /* (4, N groups) fp32, device: means, then biased variances; BACKWARD uses the rest as scratch */
    mpt_array gamma, beta; /* (C), optional: all 1, all 0; FORWARD both, BACKWARD gamma */
    mpt_array y;           /* as x; FORWARD may write it over x */
    mpt_activation act;    /* FORWARD: any */
    /* BACKWARD: MPT_IDENTITY, or MPT_RELU: y is then the gradient of a ReLU that read the norm and whose output is
       `saved`. It is multiplied by the ReLU's slope first, perhaps in place; beta is read as well. */
    mpt_array saved;
    int frozen;   /* BACKWARD: 1: stats (2, N groups) are constants; 0: they depend on x, and dx accounts for that */
    mpt_array dx; /* BACKWARD, optional: new + scale_x * dx */
    mpt_array dgamma, dbeta; /* BACKWARD, optional, both or neither: (C), new + scale * old */
    float scale_x, scale;
    float *running; /* RUNNING: (2, N groups) fp32, device: mean, variance */
    float momentum; /* RUNNING: in 0..1 */
} mpt_norm_op;

MPT_DEF mpt_result mpt_op_norm(mpt_context *ctx, const mpt_norm_op *op);

/* Sums that loss calls add to, in the memory of the context's device; zero them first. The mean is loss / weight. */
typedef struct mpt_loss_sum {
    double loss;      /* sum over rows of the row's loss, weighted */
    double weight;    /* sum over rows of the label's class weight (1 if there are none, or no labels) times the
                         sample's weight */
    uint64_t rows;    /* rows that were not ignored */
    uint64_t correct; /* cross-entropy: how many of them have their (first) largest logit at the label, or at the
                         largest probability */
} mpt_loss_sum;

/* Options of losses, named as in PyTorch. A loss refuses an option that it does not have. Weights are in device memory;
   those of a model in host memory, and the build copies them. */
typedef struct mpt_loss_desc {
    /* cross-entropy */
    float label_smoothing;      /* in 0..1: this share of the target is spread evenly over all classes */
    const float *class_weights; /* (C); NULL: all 1 */
    int ignore;                 /* 1: rows whose label is ignore_index are left out */
    int32_t ignore_index;
    int probabilities; /* 1: targets are not labels but class probabilities, float(N,C), not negative (mixup) */
    /* binary cross-entropy with logits */
    const float *pos_weight; /* (C), multiplies the term with t; NULL: all 1 */
    /* Huber */
    float delta; /* 0: 1 */
    /* any loss of a model */
    int per_position; /* 0: the H W C elements of a sample are one row. 1: each of its H x W positions is a row of C
                         elements, as in segmentation: labels are int32_t(N,H,W), class weights (C), and means and
                         metrics are over all positions */
    int weighted;     /* 1: samples have weights: see mpt_sample_weights */
} mpt_loss_desc;

/* The loss of a row. Cross-entropy: sum_j t_j (log(sum_i exp x_i) - x_j), where t_j is the class weight times the
   target probability of j (for a label 1, else 0, then smoothed); the row's largest value is subtracted from all x
   first, so nothing overflows. The others: the mean over the row's C elements. */
typedef enum mpt_loss_kind {
    MPT_LOSS_CROSS_ENTROPY = 0,
    MPT_LOSS_SQUARED_ERROR,   /* mse_loss: (x - t)^2 */
    MPT_LOSS_BCE_WITH_LOGITS, /* binary_cross_entropy_with_logits: -pos_weight t log s - (1 - t) log(1 - s) with
                                 s = sigmoid(x) */
    MPT_LOSS_ABSOLUTE_ERROR,  /* l1_loss: |x - t| */
    MPT_LOSS_HUBER,           /* huber_loss: (x - t)^2 / 2 up to |x - t| = delta, delta (|x - t| - delta / 2) beyond */
    MPT_LOSS_GRADIENT, /* your own: target is dloss/dx; dx = target * grad_scale * *loss_scale, and the loss is 0 */
    MPT_LOSS_KIND_COUNT
} mpt_loss_kind;

/* A loss of x(N,C), added to *sum, and its gradient, in fp32. The mean of one call is the sum of its rows' losses
   divided by the sum of their weights, and dx = d mean / dx * grad_scale * *loss_scale. If the weights add up to 0, dx
   is 0. sample_weights multiply both the loss and the weight of a sample's rows. In PyTorch: reduction="none", then
   (w * loss).sum() / w.sum(), or with class weights / (w * class_weights[target]).sum(). */
typedef struct mpt_loss_op {
    mpt_loss_kind kind;
    size_t N, C;
    size_t positions; /* 0: 1. Rows of a sample: x, dx and float targets are then (N, positions, C) */
    mpt_array x;
    const void *target; /* device. Cross-entropy: int32_t(rows) in 0..C-1, or probabilities; any other label that is not
                           ignored makes its row's loss and gradient NaN. All other losses: float(N,C) */
    const float *sample_weights; /* (N), device, not negative; NULL: all 1 */
    mpt_loss_desc desc;
    mpt_array dx;            /* (N,C), optional */
    float grad_scale;        /* 0: 1 */
    const float *loss_scale; /* device; NULL: 1 */
    mpt_loss_sum *sum;       /* device */
    double unit;             /* 0: dx is the gradient of the mean; else of the sum of the rows' losses / unit */
} mpt_loss_op;

MPT_DEF mpt_result mpt_op_loss(mpt_context *ctx, const mpt_loss_op *op);

/* ==== TRAINING ==== floor 3

   Loss scaler, parameter block and optimizer work on flat arrays and know nothing of models.

   -- The loss scaler -- */

typedef enum mpt_scaler_mode {
    MPT_SCALER_DEFAULT = 0, /* dynamic; in a model: dynamic for fp16, off for fp32, bf16 and O3 */
    MPT_SCALER_DYNAMIC,     /* grows and backs off */
    MPT_SCALER_STATIC,      /* stays at init_scale; steps that are not finite are still skipped */
    MPT_SCALER_OFF          /* stays at 1; steps that are not finite are still skipped */
} mpt_scaler_mode;

/* All zero: the rule of torch.amp.GradScaler, with the scale kept between 1 and 2^24. */
typedef struct mpt_scaler_desc {
    mpt_scaler_mode mode;
    float init_scale;      /* 0: 65536 */
    double growth_factor;  /* 0: 2 */
    double backoff_factor; /* 0: 0.5 */
    float min_scale;       /* 0: 1 */
    float max_scale;       /* 0: 2^24 */
    int growth_interval;   /* clean updates before growth; 0: 2000 */
    int hysteresis;        /* overflows before the scale backs off; 0: 1 */
    int patience;          /* overflows in a row at the smallest scale before MPT_ERROR_DIVERGED; 0: 10 */
    int refill_when_clean; /* 1: a clean update restores hysteresis (Apex kernel); 0: only growth does (Megatron) */
    int late_growth;       /* 1: growth after an overflow and at the start takes interval + 1 (DeepSpeed) */
    int unguarded;         /* 1: growth may reach inf (Keras, Megatron, DeepSpeed); from there every update is an
                              error */
    int no_min;            /* 1: no smallest scale (torch, Keras) except 2^-126, so that 1 / scale stays finite */
    int no_max;            /* 1: no largest scale */
} mpt_scaler_desc;

/* The scaler as plain data: copy it, write it to a file, restore it. It holds no pointers. */
#define MPT_SCALER_STATE_VERSION 1u
typedef struct mpt_scaler_state {
    uint32_t version;        /* MPT_SCALER_STATE_VERSION */
    float scale;             /* multiply the loss by this */
    int32_t growth_tracker;  /* clean updates since the last change */
    int32_t hysteresis_left; /* overflows until the scale backs off */
    int32_t stuck;           /* skips in a row that no smaller scale can cure; at least patience if the scale is inf */
    int32_t reserved;        /* 0 */
    uint64_t updates;        /* calls of the rule */
    uint64_t overflows;      /* of them with found = 1 */
    mpt_scaler_desc desc;    /* with the defaults filled in */
} mpt_scaler_state;

/* desc with its defaults filled in. desc may be NULL. */
MPT_DEF mpt_scaler_desc mpt_scaler_defaults(const mpt_scaler_desc *desc);
/* The state before the first update. */
MPT_DEF mpt_scaler_state mpt_scaler_start(const mpt_scaler_desc *desc);
/* One update of the scale; found: 1 if a gradient was inf or NaN. A pure function that needs no context. Its switches
   cover the rules of torch, Apex, jmp, Keras, Megatron and DeepSpeed. */
MPT_HD void mpt_scaler_rule(mpt_scaler_state *state, int found);

typedef struct mpt_scaler mpt_scaler; /* a state in device memory, and the optimizers that share its scale */

enum { MPT_OPTIMIZERS = 16 }; /* how many optimizers may share one scaler */

/* desc may be NULL. Returns NULL if out of memory or for a bad descriptor (see mpt_why). Free it after its
   optimizers. */
MPT_DEF mpt_scaler *mpt_scaler_new(mpt_context *ctx, const mpt_scaler_desc *desc);
MPT_DEF void mpt_scaler_free(mpt_scaler *scaler);
/* The scale now. Waits for the device. */
MPT_DEF float mpt_scaler_scale(mpt_scaler *scaler);
/* Sets the scale to a finite number above 0 and starts the trackers again. torch: update(new_scale) */
MPT_DEF mpt_result mpt_scaler_set_scale(mpt_scaler *scaler, float scale);
MPT_DEF mpt_result mpt_scaler_get_state(mpt_scaler *scaler, mpt_scaler_state *out);
MPT_DEF mpt_result mpt_scaler_set_state(mpt_scaler *scaler, const mpt_scaler_state *state);

/* -- The parameter block --

   One flat array per role: fp32 masters, 16-bit copies, fp32 gradients; the optimizer adds its moments. Tensors are
   slices of it, each starting at a multiple of 16 elements. */

/* How 16-bit weights are updated. Bytes per parameter beside the 16-bit copy: 4, 0, 2, 2, 0. A split master rounds ties
   of the copy away from zero, so that the two halves can be joined again (as in Transformer Engine); compensation and
   stochastic rounding: arXiv 2010.06192. */
typedef enum mpt_master {
    MPT_MASTER_F32 = 0,   /* fp32 masters are updated and rounded to the copies */
    MPT_MASTER_NONE,      /* no masters: the copies themselves are updated, to nearest (to show what breaks) */
    MPT_MASTER_SPLIT,     /* bf16 only: the copy and the 16 bits below it together are an exact fp32 master */
    MPT_MASTER_KAHAN,     /* a 16-bit compensation keeps what rounding cut off and adds it at the next update */
    MPT_MASTER_STOCHASTIC /* the copies themselves are updated, with stochastic rounding */
} mpt_master;

typedef struct mpt_params_desc {
    mpt_dtype type;    /* of the copies that products read; MPT_F32: no copies, the masters are read */
    mpt_master master; /* ignored when type is MPT_F32 */
    uint64_t seed;     /* of MPT_MASTER_STOCHASTIC */
} mpt_params_desc;

typedef struct mpt_params mpt_params;

/* What a tensor is for; optimizer groups select tensors by it. Further bits, up to 1 << 15, are yours to define. Frozen
   tensors have no gradient and no moments, and must be added after all others. */
enum { MPT_GROUP_WEIGHT = 1, MPT_GROUP_BIAS = 2, MPT_GROUP_NORM = 4, MPT_GROUP_FROZEN = 8 };

/* desc may be NULL: fp32. Returns NULL if out of memory or for a bad descriptor (see mpt_why). */
MPT_DEF mpt_params *mpt_params_new(mpt_context *ctx, const mpt_params_desc *desc);
MPT_DEF void mpt_params_free(mpt_params *params);
/* Adds a tensor of `count` elements in one MPT_GROUP_ (0: weight). The name is copied (63 characters). Returns its id
   1, 2, ...; 0 if it failed or the block is built already. */
MPT_DEF int mpt_params_add(mpt_params *params, const char *name, size_t count, unsigned group);
/* Allocates all arrays, zeroed. Reports the first mpt_params_add that failed. */
MPT_DEF mpt_result mpt_params_build(mpt_params *params);
/* Slices of the flat arrays, in device memory; they belong to params. Tensor 1.. is one tensor, 0 the whole array; NULL
   where there is none. The master; the weight that products read (the copy, or in fp32 the master); the gradient, still
   multiplied by S, of tensors that are not frozen. */
MPT_DEF float *mpt_params_master(mpt_params *params, int tensor);
MPT_DEF mpt_array mpt_params_weight(mpt_params *params, int tensor);
MPT_DEF float *mpt_params_grad(mpt_params *params, int tensor);
/* The 16 bits beside each copy: the low bits of a split master, or Kahan's compensation in the copy's type; else
   NULL. */
MPT_DEF uint16_t *mpt_params_low(mpt_params *params, int tensor);
/* Number of tensors. */
MPT_DEF int mpt_params_tensors(const mpt_params *params);
/* The tensor of this name; 0 if there is none. */
MPT_DEF int mpt_params_find(const mpt_params *params, const char *name);
/* Elements and name of a tensor. Tensor 0: elements of a flat array, padding included, and "". */
MPT_DEF size_t mpt_params_count(const mpt_params *params, int tensor);
MPT_DEF const char *mpt_params_name(const mpt_params *params, int tensor);
/* Copies host fp32 values into a tensor, and back: exact with masters, else as exact as the mode keeps them. */
MPT_DEF mpt_result mpt_params_set(mpt_params *params, int tensor, const float *host);
MPT_DEF mpt_result mpt_params_get(mpt_params *params, int tensor, float *host);
/* Sets all gradients to 0. (A model's first backward pass of a step does so by itself.) */
MPT_DEF mpt_result mpt_params_zero_grad(mpt_params *params);

typedef enum mpt_init {
    MPT_INIT_DEFAULT = 0,     /* PyTorch's for linear and conv2d: uniform in +-1 / sqrt(fan_in), bias too */
    MPT_INIT_KAIMING_UNIFORM, /* +-sqrt(6 / fan_in), for ReLU (He et al. 2015); bias 0 in this and all below */
    MPT_INIT_KAIMING_NORMAL,  /* deviation sqrt(2 / fan_in) */
    MPT_INIT_XAVIER_UNIFORM,  /* +-sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010) */
    MPT_INIT_XAVIER_NORMAL,   /* deviation sqrt(2 / (fan_in + fan_out)) */
    MPT_INIT_ZERO,
    MPT_INIT_COUNT
} mpt_init;

/* Fills a tensor with values named by (seed, tensor, element). */
MPT_DEF mpt_result mpt_params_init(mpt_params *params, int tensor, mpt_init init, size_t fan_in, size_t fan_out,
                                   uint64_t seed);

/* -- Optimizers -- */

/* Learning-rate schedule: a factor of lr as a function of the number of applied steps, so a skipped step does not
   advance it. It rises linearly from warmup_start to 1 in `warmup` steps (LinearLR); then, counted from there: */
typedef enum mpt_schedule_kind {
    MPT_SCHEDULE_CONSTANT = 0,
    MPT_SCHEDULE_COSINE,          /* from 1 down to `low` in `steps`, where it stays (CosineAnnealingLR) */
    MPT_SCHEDULE_STEP,            /* times `low` every `steps` (StepLR) */
    MPT_SCHEDULE_ONE_CYCLE,       /* from `start` up to 1 at the share `peak` of `steps`, down to `low` (OneCycleLR) */
    MPT_SCHEDULE_ONE_CYCLE_LINEAR /* the same with linear rise and fall */
} mpt_schedule_kind;

typedef struct mpt_schedule {
    mpt_schedule_kind kind;
    uint64_t warmup; /* applied steps */
    double warmup_start;
    uint64_t steps; /* at least 1 where it is used */
    double low, start, peak;
    /* In one cycle the momentum of SGD, or Adam's beta1, moves the other way: from max_momentum down to base_momentum
       at the peak, and up again. A momentum of 0 stays 0. */
    int no_cycle_momentum;              /* 1: momentum is constant (cycle_momentum=False) */
    double base_momentum, max_momentum; /* 0: 0.85 and 0.95 */
} mpt_schedule;

MPT_HD double mpt_schedule_factor(const mpt_schedule *schedule, uint64_t applied);
/* The momentum or beta1 of that step; `momentum` is the optimizer's own. */
MPT_HD double mpt_schedule_momentum(const mpt_schedule *schedule, uint64_t applied, double momentum);

typedef enum mpt_optimizer_kind { MPT_OPTIMIZER_DEFAULT = 0, MPT_SGD, MPT_ADAM, MPT_ADAMW } mpt_optimizer_kind;

/* Hyperparameters with PyTorch's names, in double as there. Start from mpt_sgd, mpt_adam or mpt_adamw, which hold
   PyTorch's defaults, and change what you like; every number then means itself. Or start from zeros: kind 0 is Adam,
   and as long as eps is 0 (no optimizer has that), a 0 in lr (1e-3), beta1, beta2, eps or AdamW's weight_decay means
   the default. All zero: mpt_adam(1e-3). */
typedef struct mpt_optimizer_desc {
    mpt_optimizer_kind kind;
    int nesterov;               /* SGD; needs momentum > 0 and dampening 0 */
    int amsgrad;                /* Adam, AdamW: divide by the root of the largest second moment so far */
    int maximize;               /* go up the gradient instead of down */
    int meter;                  /* count lost updates: mpt_optimizer_state.moved and .lost */
    double lr;                  /* >= 0 */
    double momentum, dampening; /* SGD */
    double beta1, beta2, eps;   /* Adam, AdamW */
    double weight_decay;        /* SGD, Adam: added to the gradient (L2); AdamW: decoupled */
    mpt_schedule schedule;      /* all zero: lr stays as it is */
} mpt_optimizer_desc;

MPT_DEF mpt_optimizer_desc mpt_sgd(double lr, double momentum); /* torch.optim.SGD */
MPT_DEF mpt_optimizer_desc mpt_adam(double lr);                 /* torch.optim.Adam: 0.9, 0.999, 1e-8 */
MPT_DEF mpt_optimizer_desc mpt_adamw(double lr);                /* torch.optim.AdamW: weight_decay 0.01 */

typedef struct mpt_optimizer mpt_optimizer;

/* An optimizer over built params that shares the scale of `scaler`. Allocates its moments, fp32 arrays: none for SGD
   without momentum, one with it, two for Adam, three with amsgrad. desc may be NULL. Returns NULL on failure: see
   mpt_why. Free it before both. */
MPT_DEF mpt_optimizer *mpt_optimizer_new(mpt_params *params, mpt_scaler *scaler, const mpt_optimizer_desc *desc);
MPT_DEF void mpt_optimizer_free(mpt_optimizer *opt);
/* The descriptor it was made with, with the lr that was set last. */
MPT_DEF mpt_optimizer_desc mpt_optimizer_get_desc(const mpt_optimizer *opt);
/* Changes lr for the steps to come. */
MPT_DEF mpt_result mpt_optimizer_set_lr(mpt_optimizer *opt, double lr);
/* Tensors whose group is in the mask `groups` use lr * lr_factor and weight_decay from now on. No decay for biases and
   norms: mpt_optimizer_group(opt, MPT_GROUP_BIAS | MPT_GROUP_NORM, 1, 0). */
MPT_DEF mpt_result mpt_optimizer_group(mpt_optimizer *opt, unsigned groups, double lr_factor, double weight_decay);

/* The same for one tensor, by its id: mpt_params_find(params, "conv1.weight"). */
MPT_DEF mpt_result mpt_optimizer_tensor(mpt_optimizer *opt, int tensor, double lr_factor, double weight_decay);

/* -- The step --

   For each optimizer mpt_unscale, perhaps mpt_clip_norm, then mpt_step; then mpt_scaler_update once. A call out of this
   order returns MPT_ERROR_ORDER and changes nothing. That is two passes over memory: unscale reads the gradients, step
   reads and writes everything. The gradients in memory stay multiplied by S; step divides them as it reads. */

/* Checks that all gradients are finite and computes their norm; decides whether mpt_step will skip, and why: see
   mpt_skip_reason. torch: GradScaler.unscale_ */
MPT_DEF mpt_result mpt_unscale(mpt_optimizer *opt);
/* Scales the gradients by min(1, max_norm / (norm + 1e-6)). torch.nn.utils.clip_grad_norm_ */
MPT_DEF mpt_result mpt_clip_norm(mpt_optimizer *opt, double max_norm);
/* Clamps every gradient to -value..value, after mpt_clip_norm if both are used. torch.nn.utils.clip_grad_value_ */
MPT_DEF mpt_result mpt_clip_value(mpt_optimizer *opt, double value);
/* Updates masters, moments and copies; or nothing, if there is a reason to skip. Unscales first if you did not. */
MPT_DEF mpt_result mpt_step(mpt_optimizer *opt);
/* Adapts the scale to what its optimizers found. Some skips no smaller scale can cure: an overflow at the smallest
   scale, statistics or moments that would not be finite. From the `patience`th of them in a row on, and whenever the
   scale is inf, the call returns MPT_ERROR_DIVERGED and names the tensor; the scale is updated all the same. */
MPT_DEF mpt_result mpt_scaler_update(mpt_scaler *scaler);

/* Why a step is skipped. */
typedef enum mpt_skip_reason {
    MPT_SKIP_NONE = 0,   /* it is not skipped */
    MPT_SKIP_GRADIENT,   /* a gradient is inf or NaN, or their norm is too large for fp32: the scale backs off */
    MPT_SKIP_EMPTY,      /* the samples of a model's step weigh 0, for example all labels ignored: the scale stays */
    MPT_SKIP_STATISTICS, /* a value of mpt_optimizer_commit, such as a running variance, would be inf or NaN */
    MPT_SKIP_MOMENT      /* the gradients are so large that a moment could become inf: their norm is over 2^63 (Adam,
                            which squares them) or 2^124 (1 - momentum) (SGD with momentum) */
} mpt_skip_reason;

/* One skipped step. */
typedef struct mpt_skip {
    uint64_t step;     /* number of the attempt, from 1 */
    float scale;       /* the loss scale of the attempt */
    int32_t tensor;    /* first tensor with an inf or NaN: mpt_params_name(params, tensor); 0: none */
    uint64_t inf, nan; /* how many in all tensors */
    int32_t reason;    /* mpt_skip_reason */
    int32_t reserved;  /* 0 */
} mpt_skip;

enum { MPT_JOURNAL = 64 };

/* An optimizer's counters as plain data, in device memory while it runs. */
#define MPT_OPTIMIZER_STATE_VERSION 2u
typedef struct mpt_optimizer_state {
    uint32_t version;                     /* MPT_OPTIMIZER_STATE_VERSION */
    int32_t found;                        /* last check: mpt_skip_reason, 0 if the step will be applied */
    uint64_t attempted, applied, skipped; /* steps; attempted = applied + skipped */
    double beta1_power, beta2_power;      /* beta^applied, for Adam's bias correction where betas are constant */
    double grad_norm;                     /* last check: L2 norm of the unscaled gradients before clipping */
    double inv_scale;                     /* last check: what gradients are multiplied by: 1 / S; of a model also by
                                             accumulate * batch / the weight of all samples */
    double schedule;                      /* last check: factor of desc.schedule */
    double clip;                          /* factor of mpt_clip_norm; 1 without */
    double clip_value;                    /* limit of mpt_clip_value; 0 without */
    /* With desc.meter, last applied step: parameters whose update was not 0, and how many of these updates rounding to
       16 bits (in an fp32 block: to bf16) would lose. */
    uint64_t moved, lost;
    mpt_scan scan;                 /* last check: of the scaled gradients; scan.first is a tensor id, 0: none */
    mpt_skip journal[MPT_JOURNAL]; /* skipped step number i (from 0) is in [i % MPT_JOURNAL] */
} mpt_optimizer_state;

/* Waits for the device. */
MPT_DEF mpt_result mpt_optimizer_get_state(mpt_optimizer *opt, mpt_optimizer_state *out);
/* MPT_ERROR_ARGUMENT, naming the member, for a state that no step could continue from; mpt_scaler_set_state
   likewise. */
MPT_DEF mpt_result mpt_optimizer_set_state(mpt_optimizer *opt, const mpt_optimizer_state *state);
/* From now on an applied step copies `count` floats of device memory from `pending` to `committed`, and a skipped one
   copies them back, so statistics that a forward pass gathered count only if its step is applied. A step whose pending
   values are not all finite at mpt_unscale is skipped. count 0 ends this. */
MPT_DEF mpt_result mpt_optimizer_commit(mpt_optimizer *opt, size_t count, float *pending, float *committed);
/* Moment 1, 2 or 3 of a tensor in device memory (momentum; or Adam's m, v, amsgrad's largest v); NULL if there is
   none. */
MPT_DEF float *mpt_optimizer_moment(mpt_optimizer *opt, int moment, int tensor);

/* ==== MODEL ==== floor 4

   -- Precision policy -- */

typedef enum mpt_level {
    MPT_O0 = 0, /* everything fp32 */
    MPT_O1,     /* autocast: fp32 weights and biases; products read 16-bit copies of them, made once per step */
    MPT_O2,     /* 16-bit weights and biases with fp32 masters */
    MPT_O3      /* 16-bit weights without masters, 16-bit logits, no loss scale: to show what breaks */
} mpt_level;

/* Which type where. Sums, losses and gradients of weights are fp32 in all of them. */
typedef struct mpt_policy {
    mpt_dtype param;   /* type the parameters are kept in between steps */
    mpt_dtype compute; /* type products read and activations are stored in */
    mpt_dtype output;  /* type of the value that the loss reads */
    mpt_master master; /* how 16-bit parameters are updated */
} mpt_policy;

/* type: MPT_F16 or MPT_BF16; ignored by O0. An invalid pair gives a policy that mpt_model_build rejects. */
MPT_DEF mpt_policy mpt_policy_preset(mpt_level level, mpt_dtype type);

/* -- Building --

   Every layer call takes the id of its input node and returns the id of its own: 1, 2, ..., or 0 on failure. A call
   that is given 0 returns 0, and mpt_model_build reports the first reason. Descriptors may be NULL. Names are copied:
   up to 31 characters of plain ASCII without " and \, unique in the model, and not beginning with "mpt.". */

typedef struct mpt_model mpt_model;

/* Returns NULL if out of memory. */
MPT_DEF mpt_model *mpt_model_new(mpt_context *ctx, mpt_policy policy);
MPT_DEF void mpt_model_free(mpt_model *net);

/* How the tensors of a layer are trained. A frozen layer has no gradients and no moments, and backward stops at the
   lowest layer that is not frozen. A frozen batch norm uses its running statistics in training as well and does not
   change them (torchvision's FrozenBatchNorm2d). mpt_optimizer_tensor changes rates later. */
typedef struct mpt_tuning {
    int frozen;
    double lr_factor;           /* of the optimizer's lr; 0: 1 */
    double weight_decay_factor; /* of the optimizer's weight_decay; 0: 1, below 0: no decay */
} mpt_tuning;

typedef struct mpt_linear_desc {
    const char *name; /* NULL: "linear1", "linear2", ... in order of creation */
    int no_bias;
    mpt_init init;
    mpt_tuning tuning;
} mpt_linear_desc;

typedef struct mpt_conv2d_desc {
    const char *name; /* NULL: "conv1", ... */
    int stride;       /* 0: 1 */
    int padding;      /* zeros on each side */
    int same;         /* 1: pads so that the size stays the same; needs stride 1. padding='same' in torch */
    int dilation;     /* 0: 1 */
    int groups;       /* 0: 1; the number of channels: depthwise */
    int no_bias;
    int kernel_w, stride_w, dilation_w; /* horizontal; 0: as vertical */
    int padding_w;                      /* left and right; 0: as above and below; -1: none */
    mpt_init init;
    mpt_tuning tuning;
} mpt_conv2d_desc;

typedef struct mpt_norm_desc {
    const char *name; /* NULL: "batch_norm1", ... */
    float eps;        /* 0: 1e-5 */
    float momentum;   /* share of a batch in the running statistics of batch norm; 0: 0.1 */
    int no_affine;    /* 1: without gamma and beta (affine=False) */
    mpt_tuning tuning;
} mpt_norm_desc;

typedef struct mpt_pool2d_desc {
    int stride;             /* 0: the window */
    int padding;            /* at most half the window */
    int window_w, stride_w; /* horizontal; 0: as vertical (where both strides are 0: window_w) */
    int padding_w;          /* left and right; 0: as above and below; -1: none */
    int exclude_padding;    /* average: see mpt_pool2d_shape */
} mpt_pool2d_desc;

/* The form in which all calls that take x are given their samples. */
typedef struct mpt_input_desc {
    int bytes; /* 0: x(samples,H,W,C) is float. 1: it is uint8_t, and a value is byte * scale[c] + shift[c], the product
                  and the sum each rounded to fp32 */
    const float *scale; /* (C), host memory, read by the build; NULL: 1/255 */
    const float *shift; /* (C), host memory, read by the build; NULL: 0 */
    int in_device;      /* 1: x is in the memory of the context's device. It is read in the order of the context's
                           stream and not checked: a float that is not finite leads to a skipped step */
} mpt_input_desc;

/* The model's one input: samples of H x W x C floats. A flat vector of n features is (1, 1, n). It stays fp32 until a
   product reads it (except in O3), so a norm that comes first sees the exact values. */
MPT_DEF int mpt_input(mpt_model *net, int H, int W, int C);
/* The same with a descriptor, which may be NULL. */
MPT_DEF int mpt_input_with(mpt_model *net, int H, int W, int C, const mpt_input_desc *desc);
/* Flattens its input in H, W, C order. */
MPT_DEF int mpt_linear(mpt_model *net, int node, int outputs, const mpt_linear_desc *desc);
MPT_DEF int mpt_conv2d(mpt_model *net, int node, int filters, int kernel, const mpt_conv2d_desc *desc);
/* Normalisations. gamma starts at 1 and beta at 0; both are kept in fp32 wherever the policy has fp32 masters. Batch
   norm uses each channel's statistics over the batch in training and running statistics in evaluation, which change
   only if the step is applied. Layer norm is over the channels of each position, group norm over groups of channels of
   each sample. (Ioffe and Szegedy 2015; Ba et al. 2016; Wu and He 2018) */
MPT_DEF int mpt_batch_norm(mpt_model *net, int node, const mpt_norm_desc *desc);
MPT_DEF int mpt_layer_norm(mpt_model *net, int node, const mpt_norm_desc *desc);
MPT_DEF int mpt_group_norm(mpt_model *net, int node, int groups, const mpt_norm_desc *desc);
/* Drops elements with probability p in training, none in evaluation. The mask is a function of train.seed, the number
   of applied steps, the micro-batch, the node and the element. */
MPT_DEF int mpt_dropout(mpt_model *net, int node, float p);
/* See mpt_activation. negative_slope must not be negative; 0 means 0.01, the only slope that the layer before can
   compute in its own pass. */
MPT_DEF int mpt_relu(mpt_model *net, int node);
MPT_DEF int mpt_leaky_relu(mpt_model *net, int node, float negative_slope);
MPT_DEF int mpt_tanh(mpt_model *net, int node);
MPT_DEF int mpt_sigmoid(mpt_model *net, int node);
MPT_DEF int mpt_gelu(mpt_model *net, int node);
MPT_DEF int mpt_gelu_tanh(mpt_model *net, int node);
MPT_DEF int mpt_silu(mpt_model *net, int node);
MPT_DEF int mpt_max_pool2d(mpt_model *net, int node, int window, const mpt_pool2d_desc *desc);
MPT_DEF int mpt_avg_pool2d(mpt_model *net, int node, int window, const mpt_pool2d_desc *desc);
MPT_DEF int mpt_global_max_pool2d(mpt_model *net, int node);
MPT_DEF int mpt_global_avg_pool2d(mpt_model *net, int node);
MPT_DEF int mpt_flatten(mpt_model *net, int node);
/* The same elements, in the same order, as an image of H x W x C. */
MPT_DEF int mpt_reshape(mpt_model *net, int node, int H, int W, int C);
/* Channels first .. first + count - 1. torch.narrow */
MPT_DEF int mpt_slice(mpt_model *net, int node, int first, int count);
/* a + b, of the same shape: a skip connection. */
MPT_DEF int mpt_add(mpt_model *net, int a, int b);
/* a * b, of the same shape; or b is 1 x 1 x C and scales the channels of a (squeeze-and-excite). */
MPT_DEF int mpt_multiply(mpt_model *net, int a, int b);
/* Repeats each pixel scale x scale times. torch.nn.Upsample(scale_factor=scale) */
MPT_DEF int mpt_upsample(mpt_model *net, int node, int scale);
/* a's channels, then b's, of the same height and width. */
MPT_DEF int mpt_concat(mpt_model *net, int a, int b);

/* -- Your own layer -- */

/* What its functions are given: arrays in the memory of the context's device, of the types that their nodes have. */
typedef struct mpt_layer_pass {
    mpt_context *ctx;
    void *user;
    size_t N;         /* samples */
    int train;        /* 0: mpt_evaluate, mpt_predict */
    mpt_array x, y;   /* (N, elements): the input's value, and the layer's own, which forward writes */
    mpt_array weight; /* (weights): fp32 where there are fp32 masters; data NULL: there are no weights */
    /* backward only */
    mpt_array dy, dx; /* backward writes dx = gradient + beta_x * dx; data NULL: dx is not needed */
    float beta_x;
    float *dweight; /* backward writes dweight = gradient + beta * dweight; NULL: there are no weights, or frozen
                       ones */
    float beta;
} mpt_layer_pass;

typedef struct mpt_layer_desc {
    const char *name;   /* NULL: "layer1", "layer2", ... */
    int H, W, C;        /* of its value; all 0: as its input */
    size_t weights;     /* number of weights; 0: none */
    const float *start; /* (weights), host memory, read by the build: initial weights; NULL: 0 */
    mpt_tuning tuning;
    /* Any result but MPT_OK ends the pass, which returns it. Both may read x and y; backward is not called where
       neither dx nor dweight is needed. */
    mpt_result (*forward)(const mpt_layer_pass *pass);
    mpt_result (*backward)(const mpt_layer_pass *pass);
    void *user;
} mpt_layer_desc;

/* A layer of your own. On CUDA its functions may launch kernels on the context's stream; the steps of such a model are
   not recorded as a graph. */
MPT_DEF int mpt_layer(mpt_model *net, int node, const mpt_layer_desc *desc);

/* -- Looking into a model -- */

/* Keeps a node's value and its gradient until the next pass: see mpt_node_value, mpt_node_grad. The gradient of an
   input is computed only if it is kept. This costs memory, and keeps an activation from being fused into a layer whose
   value is kept. Returns the node. */
MPT_DEF int mpt_keep(mpt_model *net, int node);
/* Gives a node of any kind this name instead of the one it has ("relu1"). Returns the node. */
MPT_DEF int mpt_name(mpt_model *net, int node, const char *name);
/* The node of this name, as in mpt_node_grad(net, mpt_find(net, "features"), grad); 0 if there is none. */
MPT_DEF int mpt_find(const mpt_model *net, const char *name);

/* -- Losses --

   At most one in a model, as its last node: the mean over the batch. A model without one ends in heads, the nodes that
   no other node reads: see mpt_output_grad. */

/* Targets are int32_t classes, one per sample or, with desc.per_position, per position. With desc.probabilities they
   are floats, as many per sample as the node has elements. */
MPT_DEF int mpt_softmax_cross_entropy(mpt_model *net, int node, const mpt_loss_desc *desc);
/* Targets are floats, as many per sample as the node has elements. The formulas: see mpt_loss_kind. */
MPT_DEF int mpt_mse(mpt_model *net, int node, const mpt_loss_desc *desc);
MPT_DEF int mpt_bce_with_logits(mpt_model *net, int node, const mpt_loss_desc *desc);
MPT_DEF int mpt_l1(mpt_model *net, int node, const mpt_loss_desc *desc);
MPT_DEF int mpt_huber(mpt_model *net, int node, const mpt_loss_desc *desc);

/* -- Another policy for some layers -- */

/* Nodes made from here until mpt_policy_pop follow this policy instead of the model's, for example to keep some layers
   in fp32. A model has one 16-bit type and one kind of masters; an fp32 layer among 16-bit ones needs fp32 masters. At
   most 8 deep. */
MPT_DEF mpt_result mpt_policy_push(mpt_model *net, mpt_policy policy);
MPT_DEF mpt_result mpt_policy_pop(mpt_model *net);

/* -- Several ranks -- */

/* Several ranks, processes on one machine or on many, train one model together, each on its own samples. mpt_train_step
   on R ranks with batch B makes the same step, bit for bit, as one rank with accumulate R that is given the samples of
   rank 0, then those of rank 1, and so on; and as any mix of the two whose `accumulate` is a power of two. Only batch
   norm's running statistics differ: the passes of one rank move them one after another, whereas several ranks take the
   mean of their results. Every rank makes the same calls. mpt itself opens no connection: examples/mpi.h provides the
   calls over MPI, examples/nccl.cuh over NCCL. */
typedef struct mpt_ranks {
    int rank, ranks; /* rank in 0..ranks-1; ranks 0: 1, alone */
    /* x[i] = the sum over all ranks of their x[i], the same bits on all: added in fp32 as a balanced tree,
       ((0 + 1) + (2 + 3)) + ..., where a subtree has the largest power of two of ranks to its left. n floats in the
       memory of the context's device. If it does not return MPT_OK, the step ends with MPT_ERROR_DEVICE. */
    mpt_result (*sum)(void *user, float *x, size_t n);
    /* Only train.shard_optimizer needs these two. x is in the memory of the context's device, begin(ranks + 1) in host
       memory; begin[0] is 0. Rank r owns x[begin[r]] .. x[begin[r + 1] - 1], which may be no element at all.
       reduce_scatter: the part that this rank owns becomes the sum over all ranks, added as in `sum`; the rest of x is
       undefined afterwards. all_gather: every rank receives the parts of all others; elements have `size` bytes. */
    mpt_result (*reduce_scatter)(void *user, float *x, const size_t *begin);
    mpt_result (*all_gather)(void *user, void *x, const size_t *begin, size_t size);
    void *user;
    int local_statistics; /* 1: each rank keeps running statistics of its own samples, as PyTorch's DDP does; 0: all
                             keep the mean of them */
    /* 1: the calls put work on the context's stream and do not wait, as NCCL's do. CUDA then records them as a part of
       the step. When it replays a recorded step, and after an error of the device, it calls sum once with n = 0, so
       that the engine can report an error. */
    int on_stream;
    /* With on_stream and without train.shard_optimizer, gradients are summed in ranges of at least this many bytes, the
       last layers first, and CUDA continues the backward pass while a range is summed. Must be the same on all ranks.
       0: 25 MiB, as PyTorch's bucket_cap_mb */
    size_t bucket_bytes;
} mpt_ranks;

/* -- The build -- */

typedef struct mpt_train_desc {
    int batch;                    /* most samples in one forward pass; 0: 32 */
    int accumulate;               /* micro-batches whose gradients make one step; 0: 1 */
    mpt_optimizer_desc optimizer; /* all zero: mpt_adam(1e-3) */
    mpt_scaler_desc scaler;       /* all zero: dynamic where the policy computes in fp16, else off */
    double clip_norm;             /* of mpt_train_step; 0: no clipping. In the parts, mpt_clip_norm does it */
    double clip_value;            /* the same of mpt_clip_value */
    uint64_t seed;                /* of the initial weights */
    double ema_decay;             /* of moving averages of the weights, see mpt_use_average; 0: none are kept */
    int inference; /* 1: only for mpt_predict and mpt_evaluate. Everything is frozen, and 16-bit weights have no
                      masters; gamma and beta of norms have that type, too */
    int fold; /* 1, with inference: mpt_weights_load folds a batch norm that has gamma and beta into the weights of the
                 convolution or linear layer before it, if nothing else reads or keeps that layer's value */
    mpt_ranks ranks; /* all zero: one rank */
    /* 1: each of R ranks keeps and updates only its part, an R-th in whole chunks of 4096 parameters, of the moments,
       averages and fp32 masters (or what a 16-bit weight has instead): ZeRO-1 (Rajbhandari et al. 2020). The bits are
       the same as without it. In a step each rank receives its part of the summed gradients, and later the weights that
       the others have updated. mpt_params_grad then holds the sum over all ranks only in this rank's part;
       mpt_params_master, mpt_params_low and mpt_optimizer_moment return NULL where a rank has only a part. Calls that
       need a whole array collect it from all ranks, so all ranks must make them, between steps, and they overwrite the
       gradients: mpt_params_get, mpt_weights_save, mpt_checkpoint_save, and mpt_evaluate and mpt_predict with
       mpt_use_average. */
    int shard_optimizer;
} mpt_train_desc;

/* Checks the graph, plans and allocates everything, initialises the weights. train may be NULL. After an error nothing
   is allocated and the model can still be freed. */
MPT_DEF mpt_result mpt_model_build(mpt_model *net, const mpt_train_desc *train);

/* -- Training -- */

/* One step on accumulate * batch samples in host memory: x(samples,H,W,C), floats unless mpt_input_desc says
   otherwise; target: see the loss.
   MPT_ERROR_VALUE, naming sample and value, if a label is out of range, an input or a target is not finite, a target of
   binary cross-entropy is not in 0..1, a probability is negative, or float targets look like integers; nothing has
   changed then. MPT_ERROR_DIVERGED: see mpt_scaler_update. A skipped step returns MPT_OK, for that is how the scale is
   found. So does a step whose labels are all ignored or of weight 0, or whose samples all weigh 0: it changes nothing,
   not even the scale. */
MPT_DEF mpt_result mpt_train_step(mpt_model *net, const void *x, const void *target);
/* The same on 1 to accumulate * batch samples, for example the last ones of an epoch: passes of `batch` samples, and
   one of the rest. The step follows the mean over these samples. */
MPT_DEF mpt_result mpt_train_samples(mpt_model *net, const void *x, const void *target, size_t samples);
/* Weights of samples for the next mpt_train_step, mpt_train_samples, mpt_forward, mpt_evaluate or mpt_replay only,
   whether it succeeds or not: weights(samples) in host memory, which must stay until then. The mean loss becomes the
   sum of weight times loss divided by the sum of the weights: see mpt_loss_op. `correct` counts all samples alike.
   NULL, or no call: all 1. MPT_ERROR_ORDER if the loss was not made with desc.weighted. The call that uses the weights
   returns MPT_ERROR_VALUE if one is negative or not finite. Weights should be about 1, because 16-bit gradients contain
   them. */
MPT_DEF mpt_result mpt_sample_weights(mpt_model *net, const float *weights);

/* The same in parts. mpt_forward computes at most `batch` samples and their loss. mpt_backward adds the gradients of
   the sum of their losses, times scale / (accumulate * batch) and, per position, / (H W), to the parameter gradients;
   the first call after a step overwrites them. mpt_unscale corrects this by the actual weight of all passes, so passes
   may have different numbers of samples, and there may be more or fewer of them than `accumulate`. */
MPT_DEF mpt_result mpt_forward(mpt_model *net, const void *x, const void *target, size_t samples);
MPT_DEF mpt_result mpt_backward(mpt_model *net);

/* A loss of your own: in a model without a loss node call mpt_forward with target NULL, read the heads with
   mpt_node_value, compute dloss/dhead, pass it to mpt_output_grad for each head, and call mpt_backward.
   grad(samples, elements), in host memory, is the gradient of this pass's loss as you define it (the mean over its
   samples, say); mpt multiplies it by the loss scale and by 1 / accumulate. MPT_ERROR_VALUE if an element is not
   finite. torch: output.backward(grad) */
MPT_DEF mpt_result mpt_output_grad(mpt_model *net, int node, const float *grad);
/* out(samples, elements) in host memory, as fp32: the value of a node in the last mpt_forward, or in the last batch of
   mpt_evaluate or mpt_predict. A head can be read until mpt_backward, a node of mpt_keep at any time. Waits for the
   device. */
MPT_DEF mpt_result mpt_node_value(mpt_model *net, int node, float *out);
/* dloss/dvalue of a node of mpt_keep, after mpt_backward and before mpt_scaler_update, without the loss scale. The loss
   here is the sum of the losses of the pass, divided by `batch` and, per position, by H W; or your own. */
MPT_DEF mpt_result mpt_node_grad(mpt_model *net, int node, float *out);
/* Discards all passes since the last step: the next mpt_backward overwrites the gradients. torch:
   optimizer.zero_grad() */
MPT_DEF mpt_result mpt_zero_grad(mpt_model *net);
/* The model's own; mpt_model_free frees them. NULL if the model is not built. */
MPT_DEF mpt_params *mpt_model_params(mpt_model *net);
MPT_DEF mpt_optimizer *mpt_model_optimizer(mpt_model *net);
MPT_DEF mpt_scaler *mpt_model_scaler(mpt_model *net);

/* Mean loss over the samples of the last step, or of the last mpt_forward: 0 if they weigh nothing or there is no loss
   node, NaN on failure. Waits for the device, as do the next three. */
MPT_DEF double mpt_loss(mpt_model *net);
/* The loss scale; 0 on failure. */
MPT_DEF float mpt_loss_scale(mpt_model *net);
/* Steps since the build; UINT64_MAX on failure. */
MPT_DEF uint64_t mpt_steps_applied(mpt_model *net);
MPT_DEF uint64_t mpt_steps_skipped(mpt_model *net);

/* -- Evaluation --

   Any number of samples, in batches; weights and the training state stay as they are. MPT_ERROR_ORDER between
   mpt_forward and mpt_backward, because the activations would be lost. */

typedef struct mpt_metrics {
    double loss;               /* mean over the samples */
    double accuracy;           /* correct / samples; cross-entropy only */
    uint64_t samples, correct; /* without ignored ones; positions, if the loss is per position */
} mpt_metrics;

MPT_DEF mpt_result mpt_evaluate(mpt_model *net, const void *x, const void *target, size_t samples, mpt_metrics *out);
/* out(samples, outputs): what the loss would read (logits), as fp32. */
MPT_DEF mpt_result mpt_predict(mpt_model *net, const void *x, size_t samples, float *out);
/* With train.ema_decay an applied step sets average = decay average + (1 - decay) weight, in fp32, for every weight
   that is not frozen; the first step copies the weights. use 1: from now on mpt_evaluate, mpt_predict and
   mpt_weights_save use these averages (before the first step the weights); use 0: the weights again. Nothing else
   changes, and batch norm's running statistics are the model's either way. MPT_ERROR_ORDER if there are no averages.
   torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay)) */
MPT_DEF mpt_result mpt_use_average(mpt_model *net, int use);
/* Elements per sample of the value that the loss reads. */
MPT_DEF size_t mpt_model_outputs(const mpt_model *net);

/* Forward and backward of at most `batch` samples at a given loss scale, to be watched through a table that stands
   before the context's own (see mpt_context_backend). It changes nothing but the parameter gradients, which the next
   step overwrites. MPT_ERROR_ORDER within a step. */
MPT_DEF mpt_result mpt_replay(mpt_model *net, const void *x, const void *target, size_t samples, float scale);

/* The context that it was made from; NULL for NULL. */
MPT_DEF mpt_context *mpt_model_context(const mpt_model *net);
/* Number of nodes, and the descriptor that the model was built with, with its defaults filled in. */
MPT_DEF int mpt_model_nodes(const mpt_model *net);
MPT_DEF mpt_train_desc mpt_model_train_desc(const mpt_model *net);
/* Running mean and variance (2,C) of a batch norm, fp32 in device memory; NULL for another node or before the build.
   Set them by mpt_model_set_running, between steps: MPT_ERROR_VALUE if one is not finite, or a variance below 0. */
MPT_DEF const float *mpt_model_running(const mpt_model *net, int node);
MPT_DEF mpt_result mpt_model_set_running(mpt_model *net, int node, const float *host);

/* ==== FILES ==== floor 5

   -- What a build made -- */

/* What the build decided for a node. The strings are constant; the name belongs to the model. */
typedef struct mpt_node_info {
    const char *name, *kernel, *reason; /* how it is computed; why its value has its type */
    int in[2];                          /* nodes that it reads; 0: none */
    int weight, bias;                   /* tensors of mpt_model_params; 0: none */
    mpt_conv2d_shape conv;              /* of a convolution, one sample; else all 0 */
    int H, W, C;                        /* of a sample */
    mpt_dtype type, grad_type;          /* of its value and of that value's gradient */
    int needs_gradient;                 /* 1: backward computes the gradient of its value */
    mpt_dtype weight_type;              /* its product reads weights of this type; MPT_DTYPE_COUNT: it has none */
    int fused_into;                     /* node that computes it along with its own value; 0: none */
    size_t parameters;                  /* elements */
    size_t bytes;                       /* of its own buffers in the activation block, for a whole batch */
    size_t multiply_adds;               /* of the products, forward, one sample */
} mpt_node_info;

/* node 1.. of a built model */
MPT_DEF mpt_result mpt_model_node(const mpt_model *net, int node, mpt_node_info *out);

/* Bytes by role. On the CPU their sum is exactly what the model holds from the allocator; on a device the arrays are in
   its memory. */
typedef struct mpt_memory {
    size_t weights;     /* what the forward pass reads: fp32 weights, 16-bit weights; O1: both */
    size_t masters;     /* fp32 masters of 16-bit weights; or the low bits or compensation instead */
    size_t gradients;   /* of the parameters */
    size_t moments;     /* of the optimizer; and averages of the weights, both as kept and as read */
    size_t activations; /* values kept for backward, and their gradients, after reuse */
    size_t workspace;   /* staging of inputs and targets, sums, running statistics, state */
    size_t bookkeeping; /* the graph itself, names, tables; always host memory */
} mpt_memory;

MPT_DEF mpt_memory mpt_model_memory(const mpt_model *net);

/* -- Printers --

   Aligned text for people, or CSV for programs: a line of names, then the rows. `write` is given one line at a time,
   with its line end; numbers do not depend on the locale. Shares are in percent. All wait for the device. */

typedef enum mpt_style { MPT_TEXT = 0, MPT_CSV } mpt_style;
typedef void (*mpt_write)(const char *line, void *user);

/* The plan: a line for each node under a header: name, shape, types and why, kernel, fused into, parameters, bytes,
   multiply-adds. */
MPT_DEF mpt_result mpt_model_print(const mpt_model *net, mpt_write write, void *user);
/* mpt_model_memory, a line for each role: bytes, share of the total, bytes per parameter. */
MPT_DEF mpt_result mpt_memory_print(const mpt_model *net, mpt_style style, mpt_write write, void *user);

/* -- Weights and checkpoints --

   Files are in the safetensors format: the length of a JSON header; the header, with a name, type, shape and offset for
   each tensor; the data, little-endian on every machine (huggingface.co/docs/safetensors).

   Names and layouts are PyTorch's: node name + .weight, .bias, .running_mean, .running_var; linear [outputs][inputs],
   with the inputs in C, H, W order where it reads an image; convolution [K][C / groups][R][S]. So a torch.nn.Module
   whose layers are named like the nodes loads a file of weights by load_state_dict, strictly, and its state_dict loads
   here.

   Saving writes a file path + a number of this writer + ".tmp", flushes it to the disk where the system has a way to,
   and renames it to path. If anything fails, it is removed and an older file stays. If two writers save to one path at
   the same time, the result is one writer's file. A symbolic link stays one, and on POSIX the file keeps its
   permissions.

   Loading reads and checks everything before it changes the model, so a file is loaded whole or not at all; the header
   alone shows what does not fit, before any data is read. It accepts the same files as the safetensors library, except
   that it refuses names that contain a zero byte and two tensors of one name. The model must be built and between
   steps: MPT_ERROR_ORDER after mpt_backward until mpt_step and mpt_scaler_update.

   With train.shard_optimizer all ranks must call a save together; the file has the same bytes as without it. A rank
   that is not to write a file passes path NULL. In memory each rank passes its own buffer; a call that only counts
   needs no other rank. If one rank fails, the others still finish.

   The calls that end in _memory read or write the same bytes in the caller's memory. Saving sets *size to their number;
   with buffer NULL it only counts them; if capacity is less it writes nothing and returns MPT_ERROR_ARGUMENT. After
   another error the buffer may hold a part of the file.

   MPT_ERROR_FILE: the file cannot be opened, read or written, or it is damaged: lengths, offsets, JSON, names, or a
   checkpoint's checksum. For a sound file: MPT_ERROR_TYPE or MPT_ERROR_SHAPE if a tensor has another type or shape than
   in the model, is missing, or is not in the model; MPT_ERROR_VALUE if a setting differs, a running statistic is inf or
   NaN, or a variance is negative; MPT_ERROR_UNSUPPORTED for an unknown type or version, or for a path in a build with
   MPT_NO_STDIO. */

/* Saves only the weights, as type F32, F16 or BF16, rounded to nearest even; running statistics as F32.
   MPT_ERROR_VALUE, naming tensor, element and value, if a weight is too large for the type. Saving and mpt_weights_load
   return MPT_ERROR_UNSUPPORTED, naming the layer, for a model that PyTorch would compute differently with the same
   weights: PyTorch flattens an image in C, H, W order, which matters where the flat array is then sliced, reshaped,
   divided into groups of channels, or added to or multiplied by an array in another order. */
MPT_DEF mpt_result mpt_weights_save(mpt_model *net, const char *path, mpt_dtype type);
MPT_DEF mpt_result mpt_weights_save_memory(mpt_model *net, void *buffer, size_t capacity, size_t *size, mpt_dtype type);

typedef enum mpt_load_outcome {
    MPT_LOADED = 0,    /* a tensor of the model that is in the file */
    MPT_LOAD_MISSING,  /* a tensor of the model that is not in the file */
    MPT_LOAD_UNFIT,    /* a tensor of both whose shape differs, or whose type is not F32, F16 or BF16 */
    MPT_LOAD_LEFT_OVER /* a tensor of the file that is not in the model */
} mpt_load_outcome;

typedef struct mpt_load_desc {
    const char *prefix; /* in the file, this stands before the model's names, for example "module."; NULL: nothing */
    int partly;         /* 1: loads what fits and leaves the rest as it is; 0: all or nothing */
    /* Called for each tensor before any is read; or NULL. */
    void (*tell)(const char *name, mpt_load_outcome outcome, void *user);
    void *user;
} mpt_load_desc;

/* Loads weights of any of the three types, from a file of weights or a checkpoint. Moments, scaler and counters stay as
   they are. Ignores num_batches_tracked. desc may be NULL.
   With train.fold it then computes w = w gamma / sqrt(variance + eps), in the type of the weights, for each batch norm
   that mpt_model_print shows as folded; if a result is too large for that type, that norm is computed as usual. The
   weights and the norms' biases are then no longer those of the file, so mpt_weights_save, mpt_model_set_running and
   partial loading return MPT_ERROR_ORDER, naming the norm. Loading again starts from the file. */
MPT_DEF mpt_result mpt_weights_load(mpt_model *net, const char *path, const mpt_load_desc *desc);
MPT_DEF mpt_result mpt_weights_load_memory(mpt_model *net, const void *bytes, size_t size, const mpt_load_desc *desc);

/* Saves the whole training state: weights as the policy keeps them (masters, or 16-bit weights and what belongs to
   them), moments, averages, running statistics, the optimizer's counters, journal and lr, lr_factor and weight_decay of
   its groups, and the scaler. A run that continues from it on the same kind of device, with any number of threads, has
   the same bits as one that never stopped. */
MPT_DEF mpt_result mpt_checkpoint_save(mpt_model *net, const char *path);
MPT_DEF mpt_result mpt_checkpoint_save_memory(mpt_model *net, void *buffer, size_t capacity, size_t *size);
/* Loads it into a model built with the same nodes, policy, batch, accumulate x ranks, clip limits, seed and optimizer:
   every setting that is not in the file must be equal, down to each member of each layer's descriptor. Of several ranks
   one saves (with train.shard_optimizer all of them do), and all load. shard_optimizer and ema_decay may differ; if the
   file has no averages, they start anew. */
MPT_DEF mpt_result mpt_checkpoint_load(mpt_model *net, const char *path);
MPT_DEF mpt_result mpt_checkpoint_load_memory(mpt_model *net, const void *bytes, size_t size);

/* ==== BACKEND ====

   A device is one table of operations; floors 3 to 5 call nothing else. The public functions above check every argument
   before they call the table. Operations may be asynchronous; download waits. mpt_cuda.cuh is another such table. */

typedef struct mpt_tensor_slice { /* a tensor in the flat arrays, and how its group is updated */
    size_t offset, count;
    double lr, lr_factor, weight_decay; /* lr: the optimizer's times the factor */
    float *wide; /* device (count): its fp32 values, if masters are sharded but the net reads this one in fp32; else
                    NULL */
} mpt_tensor_slice;

/* Which parts of the flat arrays the ranks own with train.shard_optimizer. The four arrays of bounds have ranks + 1
   entries in host memory: rank r owns entry r up to, not including, entry r + 1. */
typedef struct mpt_shard {
    const mpt_ranks *ranks;
    const size_t *begin;      /* of the elements */
    const size_t *chunks;     /* of `parts`, one for each 4096 elements */
    const size_t *wide_begin; /* of `wide` */
    const size_t *counting;   /* of `meters`: 0, 1, 2, ... */
    mpt_scan *parts;          /* device (chunks of all ranks) */
    float *wide;              /* device: the arrays that slices point to, end to end; NULL: there are none */
    uint64_t *meters;         /* device (ranks, 2): moved and lost */
} mpt_shard;

typedef struct mpt_update_op { /* everything a step reads and writes; all pointers are device memory */
    mpt_optimizer_desc desc;
    mpt_optimizer_state *state;
    const mpt_scaler_state *scaler;
    const mpt_tensor_slice *slices; /* (tensors) */
    int tensors;
    size_t count; /* elements of the flat arrays, padding included */
    /* If shard is not NULL, this rank updates elements first .. first + own and sends them to the others; master, low,
       moment and average then begin with element `first`. */
    const mpt_shard *shard;
    size_t first, own; /* shard NULL: 0, count */
    const float *grad;
    const mpt_loss_sum *loss;   /* of a model's step; NULL: grad is 1 / S of what it should be */
    double unit;                /* with loss: grad is of the sum of losses / unit */
    double max_norm, max_value; /* clip limits of this step; 0: none */
    mpt_master mode;
    uint64_t seed;    /* STOCHASTIC */
    float *master;    /* F32 */
    mpt_array copy;   /* data NULL: fp32 only */
    uint16_t *low;    /* SPLIT: the low bits; KAHAN: the compensation, in the copy's type */
    float *moment[3]; /* NULL from the first that is not there */
    size_t commits;   /* see mpt_optimizer_commit */
    float *pending, *committed;
    float *average; /* (own), or NULL: an applied step moves it, the first after number average_from copies */
    double average_decay;
    uint64_t average_from;
} mpt_update_op;

typedef struct mpt_feed_op { /* a batch of inputs; only the next map reads it */
    const void *x; /* in host memory; with in_device in device memory, written by earlier work on the stream */
    int in_device;
    size_t bytes;
    size_t floats;  /* of x, to be checked on the way; 0: not checked */
    size_t first;   /* filled in: index of the first float that is inf or NaN; `floats` if there is none */
    void *staging;  /* device (bytes): x may be copied here */
    const void *at; /* filled in: where to read it */
} mpt_feed_op;

typedef struct mpt_ranks_op { /* what a step exchanges with the other ranks */
    const mpt_ranks *ranks;   /* host memory; all other pointers are device memory */
    int early;                /* 1: only grad(count) is summed, and only the next ranks_op with early 0 has to wait for
                                 it */
    float *slots;             /* (ranks,16), scratch */
    mpt_loss_sum *sum;        /* of this rank's samples; becomes that of all */
    float *grad;              /* (count), becomes the sum over all ranks */
    size_t count;             /* 0: none */
    const mpt_shard *shard;   /* not NULL: only the part of grad that this rank owns is summed */
    float *pending;           /* (statistics), becomes the mean */
    size_t statistics;        /* 0: none */
} mpt_ranks_op;

/* What is being computed: for a table that stands before another and watches. */
typedef struct mpt_place {
    int node;      /* of a model; 0: no pass of a model */
    mpt_pass pass; /* of a loss: MPT_BACKWARD_DATA */
    int output;    /* node whose value, gradient (backward data; norms: always) or weight gradient is written */
} mpt_place;

typedef struct mpt_backend {
    const char *name;
    void *user;      /* for a table that stands before another */
    size_t overhead; /* bytes that one alloc takes from the host's allocator beyond what was asked */
    void (*close)(mpt_context *ctx);
    void *(*alloc)(mpt_context *ctx, size_t bytes); /* zeroed, 64-byte aligned; NULL and a reason if it fails */
    void (*release)(mpt_context *ctx, void *p);
    mpt_result (*upload)(mpt_context *ctx, void *device, const void *host, size_t bytes);
    mpt_result (*feed)(mpt_context *ctx, mpt_feed_op *op);
    mpt_result (*download)(mpt_context *ctx, void *host, const void *device, size_t bytes);
    mpt_result (*copy)(mpt_context *ctx, void *to, const void *from, size_t bytes); /* both of the device */
    mpt_result (*zero)(mpt_context *ctx, void *device, size_t bytes);
    mpt_result (*scan)(mpt_context *ctx, size_t n, float factor, mpt_array x, mpt_scan *host); /* mpt_scale_array */
    mpt_result (*histogram)(mpt_context *ctx, size_t n, mpt_array x, mpt_histogram *host);
    mpt_result (*map)(mpt_context *ctx, const mpt_map_op *op);
    mpt_result (*gemm)(mpt_context *ctx, const mpt_gemm_op *op);
    mpt_result (*conv2d)(mpt_context *ctx, const mpt_conv2d_op *op);
    mpt_result (*columns)(mpt_context *ctx, const mpt_columns_op *op);
    mpt_result (*broadcast)(mpt_context *ctx, const mpt_broadcast_op *op);
    mpt_result (*pool2d)(mpt_context *ctx, const mpt_pool2d_op *op);
    mpt_result (*norm)(mpt_context *ctx, const mpt_norm_op *op);
    mpt_result (*loss)(mpt_context *ctx, const mpt_loss_op *op);
    mpt_result (*ranks)(mpt_context *ctx, const mpt_ranks_op *op);
    mpt_result (*check)(mpt_context *ctx, const mpt_update_op *op);
    mpt_result (*update)(mpt_context *ctx, const mpt_update_op *op);
    /* Updates the scale by the found flags, in device memory, of the `count` optimizers that took part (at most
       MPT_OPTIMIZERS); see mpt__scaler_follow. Sets *stuck, on the host, to scaler->stuck after this update, or after
       an earlier one if the device is still busy. */
    mpt_result (*scale)(mpt_context *ctx, mpt_scaler_state *scaler, const int32_t *const *found, int count,
                        int32_t *stuck);
    /* Both or neither. Between them come the calls of a training step, scale last. As long as the bytes of *op are the
       same, so are the calls and their arguments, except for the data that uploads and feeds bring; so a device may
       record them and execute them when scale comes. Only the next map or loss reads what is fed or uploaded as targets
       or weights of samples. A feed that finds a bad float ends the step with MPT_ERROR_VALUE before any other call.
       end is given the calls' result and returns it; *again = 1: nothing was done, make all calls once more. */
    mpt_result (*begin)(mpt_context *ctx, const mpt_update_op *op, const void *staging);
    mpt_result (*end)(mpt_context *ctx, mpt_result result, int *again);
} mpt_backend;

/* A context on another device. *backend is copied. `device` is the backend's own state; backend->close frees it.
   NULL: out of memory, or desc is wrong; `device` is then still the caller's. */
MPT_DEF mpt_context *mpt_open_backend(const mpt_context_desc *desc, const mpt_backend *backend, void *device);
/* The `device` that mpt_open_backend was given. */
MPT_DEF void *mpt_context_device(const mpt_context *ctx);
/* The context's own copy of the table. To watch its calls, keep a copy and replace functions by your own, which call
   those of the copy. */
MPT_DEF mpt_backend *mpt_context_backend(mpt_context *ctx);
MPT_DEF mpt_place mpt_context_place(const mpt_context *ctx);
/* Stores a reason for mpt_why, logs it, and returns `result`. format is as in printf, with only %s, %d, %zu and %g,
   without width or precision. Numbers do not depend on the locale. */
MPT_DEF mpt_result mpt_fail(mpt_context *ctx, mpt_result result, const char *format, ...) MPT__PRINTF(3, 4);

#ifdef __cplusplus
} /* extern "C" */
#endif

/* ---------------------------- stop here if you only want the API ---------------------------- */

/* ==== RULES ====

   The element rules: inline, the same source for host and device, so that both give the same bits. */

#include <math.h>
#include <string.h>

#if defined(__cplusplus) && defined(__GNUC__) /* the casts here are C's, which both languages have */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wold-style-cast"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wuseless-cast"
#endif
#endif

/* Makes the compiler compute x as written, whatever the build's flags: no contraction into a fused multiply-add, no
   reassociation, no reciprocal. Costs something only in builds whose flags allow these. */
#if !defined(__CUDA_ARCH__) && defined(__GNUC__) && \
    (defined(__FAST_MATH__) || (defined(__FP_FAST_FMAF) && !defined(__clang__)))
#if defined(__x86_64__) || defined(__SSE2__)
#define MPT__KEEP(x) __asm__("" : "+x"(x))
#elif defined(__aarch64__) || defined(__ARM_FP)
#define MPT__KEEP(x) __asm__("" : "+w"(x))
#else
#define MPT__KEEP(x) __asm__("" : "+m"(x))
#endif
#else
#define MPT__KEEP(x) ((void)0)
#endif

/* clang's -Ofast goes further: it recognises a test of a float's bits as a test for NaN and removes it, splits a call
   of fmaf into a product and a sum, and replaces sqrtf by an approximation. */
#if defined(__clang__) && defined(__FAST_MATH__) && !defined(__CUDA_ARCH__)
#define MPT__KEEP_BITS(u) __asm__("" : "+r"(u))
#define MPT__OPAQUE volatile
#else
#define MPT__KEEP_BITS(u) ((void)0)
#define MPT__OPAQUE
#endif

/* Operations in fp32, each rounded once to nearest, under the names of CUDA's intrinsics. */
#ifdef __CUDA_ARCH__
MPT_HD float mpt__mul_rn(float a, float b) { return __fmul_rn(a, b); }
MPT_HD float mpt__add_rn(float a, float b) { return __fadd_rn(a, b); }
MPT_HD float mpt__div_rn(float a, float b) { return __fdiv_rn(a, b); }
MPT_HD float mpt__sqrt_rn(float a) { return __fsqrt_rn(a); }
MPT_HD float mpt__fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
MPT_HD double mpt__mul_add(double a, double b, double c) { return __dadd_rn(__dmul_rn(a, b), c); }
#else
MPT_HD float mpt__mul_rn(float a, float b) {
    float r = a * b;
    MPT__KEEP(r);
    return r;
}
MPT_HD float mpt__add_rn(float a, float b) {
    float r = a + b;
    MPT__KEEP(r);
    return r;
}
MPT_HD float mpt__div_rn(float a, float b) {
    float r;
    MPT__KEEP(b);
    r = a / b;
    MPT__KEEP(r);
    return r;
}
MPT_HD float mpt__sqrt_rn(float a) {
    float (*MPT__OPAQUE root)(float) = sqrtf;
    float r = root(a);
    MPT__KEEP(r);
    return r;
}
#ifdef __MINGW32__ /* its fmaf is 1 ulp off one time in four. The product is exact in double; the sum is rounded to odd,
                      so that rounding it again to fp32 gives the same as a single rounding */
MPT_HD float mpt__fma_rn(float a, float b, float c) {
    const volatile double product = (double)a * (double)b, sum = product + (double)c, part = sum - product;
    const volatile double rest = (double)c - part + (product - (sum - part));
    double odd = sum;
    uint64_t u;
    memcpy(&u, &odd, sizeof u);
    if (!(u & 1) && (rest > 0 || rest < 0)) {
        if ((rest > 0) == (sum > 0)) u++;
        else u--;
    }
    memcpy(&odd, &u, sizeof u);
    return (float)odd;
}
#else
MPT_HD float mpt__fma_rn(float a, float b, float c) { /* a b + c, rounded once */
    float (*MPT__OPAQUE fused)(float, float, float) = fmaf;
    float r = fused(a, b, c);
    MPT__KEEP(r);
    return r;
}
#endif
MPT_HD double mpt__mul_add(double a, double b, double c) { /* a b + c in double, rounded twice */
    double r = a * b;
    MPT__KEEP(r);
    return r + c;
}
#endif

MPT_HD uint32_t mpt__bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    MPT__KEEP_BITS(u);
    return u;
}

MPT_HD float mpt__float(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* These test the bits, because -ffast-math assumes that there is neither inf nor NaN. */
MPT_HD int mpt__finite(float x) { return (mpt__bits(x) & 0x7f800000u) != 0x7f800000u; }
MPT_HD int mpt__is_zero(float x) { return (mpt__bits(x) & 0x7fffffffu) == 0; }
MPT_HD int mpt__is_nan(float x) { return (mpt__bits(x) & 0x7fffffffu) > 0x7f800000u; }

/* x limited to -limit .. limit; NaN stays. */
MPT_HD float mpt__clamp(float x, float limit) {
    if (x > limit) return limit;
    if (x < -limit) return -limit;
    return x;
}

/* -- Activations -- */

/* x <= 0. False for NaN: ReLU passes NaN on, so that it shows in the loss. */
MPT_HD int mpt__not_positive(float x) {
    const uint32_t u = mpt__bits(x);
    return u == 0 || u - 0x80000000u <= 0x7f800000u;
}

/* Whether the gradient needs x rather than y. Then x is saved, so the product before it cannot apply the activation. */
MPT_HD int mpt__act_saves_input(mpt_activation act) { return act >= MPT_GELU; }

/* None of these formulas overflows for a finite x: 0 * inf would be NaN, as would an approximate reciprocal of inf
   under -ffast-math. */

/* 1 / (1 + exp(-x)), from exp(-|x|), which is at most 1 */
MPT_HD float mpt__sigmoid(float x) {
    const float e = expf(-fabsf(x)), s = 1 / (1 + e);
    if (x < 0) return e * s;
    return s;
}

/* Beyond 16 GELU is x or 0 in fp32, and x^3 could overflow. */
MPT_HD float mpt__gelu_clamp(float x) { return mpt__clamp(x, 16); }

/* The argument of GELU's tanh: sqrt(2 / pi) (x + 0.044715 x^3) */
MPT_HD float mpt__gelu_argument(float x) {
    const float near = mpt__gelu_clamp(x);
    return 0.7978845608f * (near + 0.044715f * near * near * near);
}

/* x, times the slope of a leaky ReLU where `saved`, the ReLU's input or output, is not positive */
MPT_HD float mpt__leaky(float slope, float saved, float x) { return mpt__not_positive(saved) ? slope * x : x; }

MPT_HD float mpt__activate(mpt_activation act, float x) {
    switch (act) {
    case MPT_RELU: return mpt__not_positive(x) ? 0.0f : x;
    case MPT_LEAKY_RELU: return mpt__leaky(0.01f, x, x);
    case MPT_TANH: return tanhf(x);
    case MPT_SIGMOID: return mpt__sigmoid(x);
    case MPT_GELU: return 0.5f * x * (1 + erff(0.7071067812f * x));
    case MPT_GELU_TANH: return 0.5f * x * (1 + tanhf(mpt__gelu_argument(x)));
    case MPT_SILU: return x * mpt__sigmoid(x);
    default: return x;
    }
}

MPT_HD float mpt__map_slope(const mpt_map_op *op) {
    if (mpt__bits(op->negative_slope) << 1) return op->negative_slope;
    return 0.01f;
}

MPT_HD float mpt__map_activate(const mpt_map_op *op, float x) {
    if (op->act == MPT_LEAKY_RELU) return mpt__leaky(mpt__map_slope(op), x, x);
    return mpt__activate(op->act, x);
}

/* d/dx of GELU: Phi(x) + x phi(x), and of its approximation */
MPT_HD float mpt__gelu_slope(mpt_activation act, float x) {
    const float near = mpt__gelu_clamp(x);
    float t, inner;
    if (act == MPT_GELU) return 0.5f * (1 + erff(0.7071067812f * x)) + 0.3989422804f * near * expf(-0.5f * near * near);
    t = tanhf(mpt__gelu_argument(x));
    inner = 0.7978845608f * (1 + 3 * 0.044715f * near * near);
    return 0.5f * (1 + t) + 0.5f * near * (1 - t * t) * inner;
}

/* dy times the derivative at the saved value: x if mpt__act_saves_input, else y */
MPT_HD float mpt__activate_backward(mpt_activation act, float saved, float dy) {
    float s;
    switch (act) {
    case MPT_RELU: return mpt__not_positive(saved) ? 0.0f : dy;
    case MPT_LEAKY_RELU: return mpt__leaky(0.01f, saved, dy);
    case MPT_TANH: return dy * (1 - saved * saved);
    case MPT_SIGMOID: return dy * saved * (1 - saved);
    case MPT_GELU:
    case MPT_GELU_TANH: return dy * mpt__gelu_slope(act, saved);
    case MPT_SILU: s = mpt__sigmoid(saved); return dy * s * (1 + saved * mpt__sigmoid(-saved));
    default: return dy;
    }
}

MPT_HD float mpt__map_activate_backward(const mpt_map_op *op, float saved, float dy) {
    if (op->act == MPT_LEAKY_RELU) return mpt__leaky(mpt__map_slope(op), saved, dy);
    return mpt__activate_backward(op->act, saved, dy);
}

/* -- Casts -- */

typedef struct mpt__format {
    int exponent, fraction; /* bits */
    uint32_t largest;       /* bits of the largest finite value */
    uint32_t inf;           /* the next larger bits: inf, or e4m3's NaN */
} mpt__format;

MPT_HD mpt__format mpt__format_of(mpt_dtype type) {
    mpt__format f = {8, 23, 0x7f7fffffu, 0x7f800000u};
    if (type == MPT_F16) {
        f.exponent = 5;
        f.fraction = 10;
        f.largest = 0x7bffu;
        f.inf = 0x7c00u;
    }
    if (type == MPT_BF16) {
        f.exponent = 8;
        f.fraction = 7;
        f.largest = 0x7f7fu;
        f.inf = 0x7f80u;
    }
    if (type == MPT_E5M2) {
        f.exponent = 5;
        f.fraction = 2;
        f.largest = 0x7bu;
        f.inf = 0x7cu;
    }
    if (type == MPT_E4M3) {
        f.exponent = 4;
        f.fraction = 3;
        f.largest = 0x7eu;
        f.inf = 0x7fu;
    }
    return f;
}

MPT_HD uint32_t mpt_narrow(float x, mpt_dtype type, mpt_round round, mpt_overflow overflow, uint32_t random) {
    const mpt__format f = mpt__format_of(type);
    const uint32_t u = mpt__bits(x), magnitude = u & 0x7fffffffu;
    const uint32_t sign = (u >> 31) << (f.exponent + f.fraction);
    const int lowest = 129 - (1 << (f.exponent - 1)); /* fp32 exponent field of the format's smallest normal */
    int exponent = (int)(magnitude >> 23), shift = 23 - f.fraction;
    uint32_t significand = magnitude & 0x7fffffu, above = f.inf, quotient, rest; /* above: what an overflow becomes */

    if (f.fraction == 23) return u; /* fp32, or an unknown type */
    if (overflow == MPT_OVERFLOW_SATURATE) above = f.largest;
    if (magnitude == 0x7f800000u) return sign | above;
    if (magnitude > 0x7f800000u) { /* NaN: quiet bit and the payload that fits; e4m3 has one NaN only */
        if (type == MPT_E4M3) return sign | f.inf;
        return sign | f.inf | 1u << (f.fraction - 1) | significand >> shift;
    }

    /* The value in units of the result's last place: quotient and rest. Adding the exponent field of a normal result,
       less one, completes it, because the significand's leading 1 adds the other one; a carry from rounding does the
       same. */
    if (exponent) significand |= 0x800000u;
    else exponent = 1;
    if (exponent < lowest) shift += lowest - exponent;
    if (shift > 31) { /* far below the smallest subnormal */
        significand = shift < 55 ? significand >> (shift - 31) : 0;
        shift = 31;
    }
    quotient = significand >> shift;
    rest = significand & ((1u << shift) - 1);
    if (exponent > lowest) quotient += (uint32_t)(exponent - lowest) << f.fraction;

    if (round == MPT_ROUND_NEAREST) {
        const uint32_t half = 1u << (shift - 1);
        quotient += rest > half || (rest == half && (quotient & 1));
    } else if (round == MPT_ROUND_STOCHASTIC) {
        quotient += (random >> (32 - shift)) < rest;
    }
    if (quotient > f.largest) quotient = round == MPT_ROUND_ZERO ? f.largest : above;
    return sign | quotient;
}

MPT_HD float mpt_widen(uint32_t bits, mpt_dtype type) {
    const mpt__format f = mpt__format_of(type);
    const uint32_t sign = (bits >> (f.exponent + f.fraction)) << 31, ones = (1u << f.exponent) - 1;
    uint32_t fraction = bits & ((1u << f.fraction) - 1), magnitude = bits & ((1u << (f.exponent + f.fraction)) - 1);
    int exponent = (int)(magnitude >> f.fraction);

    if (type == MPT_E4M3 && magnitude == f.inf) return mpt__float(sign | 0x7fc00000u); /* its NaN has no payload */
    if (magnitude > f.inf) return mpt__float(sign | 0x7fc00000u | fraction << (23 - f.fraction));
    if ((uint32_t)exponent == ones && type != MPT_E4M3) return mpt__float(sign | 0x7f800000u);
    if (f.exponent == 8) return mpt__float(sign | magnitude << (23 - f.fraction)); /* same exponents as fp32 */
    if (exponent == 0) {
        if (fraction == 0) return mpt__float(sign);
        for (exponent = 1; !(fraction >> f.fraction); exponent--) fraction <<= 1;
        fraction &= (1u << f.fraction) - 1;
    }
    exponent += 128 - (1 << (f.exponent - 1));
    return mpt__float(sign | (uint32_t)exponent << 23 | fraction << (23 - f.fraction));
}

#define MPT__SCALAR_CASTS(name, TYPE, bits_type)                                         \
    MPT_HD mpt_##name mpt_##name##_from_f32(float x) {                                   \
        mpt_##name h;                                                                    \
        h.bits = (bits_type)mpt_narrow(x, TYPE, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0); \
        return h;                                                                        \
    }                                                                                    \
    MPT_HD float mpt_f32_from_##name(mpt_##name x) { return mpt_widen(x.bits, TYPE); }
MPT__SCALAR_CASTS(f16, MPT_F16, uint16_t)
MPT__SCALAR_CASTS(bf16, MPT_BF16, uint16_t)
MPT__SCALAR_CASTS(e4m3, MPT_E4M3, uint8_t)
MPT__SCALAR_CASTS(e5m2, MPT_E5M2, uint8_t)

MPT_HD mpt_array mpt_typed_array(const void *p, mpt_dtype type) {
    mpt_array a;
    memcpy(&a.data, &p, sizeof p); /* drops const: an operation's inputs are never written */
    a.type = type;
    return a;
}
MPT_HD mpt_array mpt_f32_array(const float *p) { return mpt_typed_array(p, MPT_F32); }
MPT_HD mpt_array mpt_f16_array(const mpt_f16 *p) { return mpt_typed_array(p, MPT_F16); }
MPT_HD mpt_array mpt_bf16_array(const mpt_bf16 *p) { return mpt_typed_array(p, MPT_BF16); }

/* -- Random numbers -- */

MPT_HD uint64_t mpt__mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

MPT_HD uint32_t mpt_hash(uint64_t seed, uint64_t step, uint64_t tensor, uint64_t element) {
    const uint64_t golden = 0x9e3779b97f4a7c15u; /* odd, near 2^64 / golden ratio: spreads neighbours over all bits */
    const uint64_t stream = mpt__mix(mpt__mix(mpt__mix(seed + golden) + step * golden) + tensor * golden);
    return (uint32_t)(mpt__mix(stream + element * golden) >> 32);
}

MPT_HD float mpt_uniform(uint64_t seed, uint64_t step, uint64_t tensor, uint64_t element) {
    return (float)(mpt_hash(seed, step, tensor, element) >> 8) * (1.0f / 16777216.0f);
}

/* -- Dropout -- */

/* The factor of an element: 0, or 1 / (1 - p) */
MPT_HD float mpt__mask_factor(const mpt_mask *mask, uint64_t step, uint64_t element) {
    const uint32_t threshold = (uint32_t)((double)mask->p * 4294967296.0);
    if (mpt_hash(mask->seed, step, mask->tensor, element) < threshold) return 0;
    return 1 / (1 - mask->p);
}

/* -- Inputs -- */

/* Index of the first element that is inf or NaN; n if there is none. An exponent of all ones carries into the top bit.
   A constant number of elements at a time, so that compilers use vectors. */
MPT_HD size_t mpt__first_bad(const float *x, size_t n) {
    uint32_t u[64], carry;
    size_t i, e;
    for (i = 0; i + 64 <= n; i += 64) {
        memcpy(u, x + i, sizeof u);
        carry = 0;
        for (e = 0; e < 64; e++) carry |= (u[e] & 0x7f800000u) + 0x00800000u;
        if (carry >> 31) break;
    }
    while (i < n && mpt__finite(x[i])) i++;
    return i;
}

/* The value of a byte in channel c of C; channels: see mpt_map_op */
MPT_HD float mpt__of_byte(float byte, const float *channels, size_t C, size_t c) {
    return mpt__add_rn(mpt__mul_rn(byte, channels[c]), channels[C + c]);
}

/* -- Normalisation -- */

MPT_HD float mpt__norm_inverse(float variance, float eps) { return 1 / sqrtf(variance + eps); }

/* Updates element i of running(2, sets): the means, then the variances, made unbiased. count: values in a set */
MPT_HD void mpt__norm_average(const mpt_norm_op *op, size_t count, size_t i) {
    float x = op->stats[i];
    if (i >= op->shape.N * op->shape.groups) x *= (float)((double)count / (double)(count - 1));
    const float old = mpt__mul_rn(1 - op->momentum, op->running[i]);
    op->running[i] = mpt__add_rn(old, mpt__mul_rn(op->momentum, x));
}

/* -- Losses -- */

MPT_HD int mpt__label_ignored(const mpt_loss_desc *d, int32_t label) { return d->ignore && label == d->ignore_index; }

/* The target of a row of cross-entropy */
typedef struct mpt__aim {
    const float *probabilities; /* (C); NULL: a label */
    int32_t label;
    int ignored;
    int valid; /* the label is a class, or the target is probabilities */
} mpt__aim;

MPT_HD mpt__aim mpt__aim_of(const mpt_loss_op *op, size_t row) {
    mpt__aim aim = MPT_ZERO;
    aim.valid = 1;
    if (op->desc.probabilities) {
        aim.probabilities = (const float *)op->target + row * op->C;
        return aim;
    }
    aim.label = ((const int32_t *)op->target)[row];
    aim.valid = aim.label >= 0 && (size_t)aim.label < op->C;
    aim.ignored = mpt__label_ignored(&op->desc, aim.label);
    return aim;
}

MPT_HD float mpt__class_weight(const mpt_loss_desc *d, size_t c) {
    if (!d->class_weights) return 1;
    return d->class_weights[c];
}

/* The weight of the sample that a row belongs to */
MPT_HD float mpt__sample_weight(const mpt_loss_op *op, size_t row) {
    if (!op->sample_weights) return 1;
    return op->sample_weights[row / op->positions];
}

/* Weight of a row in the mean. An invalid label counts, because it must make the loss NaN. */
MPT_HD float mpt__row_weight(const mpt_loss_op *op, size_t row) {
    const float weight = mpt__sample_weight(op, row);
    mpt__aim aim;
    if (op->kind != MPT_LOSS_CROSS_ENTROPY) return weight;
    aim = mpt__aim_of(op, row);
    if (aim.ignored) return 0;
    if (aim.probabilities || !aim.valid) return weight;
    return weight * mpt__class_weight(&op->desc, (size_t)aim.label);
}

/* The target of class c: its probability, smoothed, times its weight */
MPT_HD float mpt__class_target(const mpt_loss_op *op, const mpt__aim *aim, size_t c) {
    const float smooth = op->desc.label_smoothing;
    float share = (float)(aim->valid && (size_t)aim->label == c);
    if (aim->probabilities) share = aim->probabilities[c];
    return mpt__class_weight(&op->desc, c) * (share * (1 - smooth) + smooth / (float)op->C);
}

/* The factor of every row's gradient in a call whose rows weigh `weight` in all */
MPT_HD float mpt__loss_factor(const mpt_loss_op *op, double weight) {
    const float scale = op->loss_scale ? *op->loss_scale : 1.0f;
    double divisor = weight;
    if (!(weight > 0)) return 0;
    if (op->unit > 0) divisor = op->unit;
    if (op->kind == MPT_LOSS_GRADIENT) divisor = 1;
    return (float)((double)op->grad_scale / divisor) * scale;
}

/* The share of an element in its row's loss */
MPT_HD float mpt__loss_share(const mpt_loss_op *op) {
    if (op->kind == MPT_LOSS_GRADIENT) return 1;
    return 1 / (float)op->C;
}

/* -1, 0 or 1; NaN stays. */
MPT_HD float mpt__sign(float x) {
    if (mpt__is_nan(x)) return x;
    return (float)((x > 0) - (x < 0));
}

/* Binary cross-entropy, by log(1 + exp(-|x|)), which cannot overflow; and no two terms cancel. */
MPT_HD float mpt__bce_element(const mpt_loss_op *op, size_t c, float x, float t, float *slope) {
    const float tail = log1pf(expf(-fabsf(x))), above = x > 0 ? x : 0;
    const float *weights = op->desc.pos_weight;
    float w = 1;
    if (weights) w = weights[c];
    *slope = (1 - t) * mpt__sigmoid(x) - w * t * mpt__sigmoid(-x);
    if (!weights) return above - x * t + tail;
    return (1 - t) * (above + tail) + w * t * (above - x + tail);
}

/* An elementwise loss of prediction x and target t of output c, and its derivative by x */
MPT_HD float mpt__loss_element(const mpt_loss_op *op, size_t c, float x, float t, float *slope) {
    const float d = x - t, size = fabsf(d), delta = op->desc.delta;
    switch (op->kind) {
    case MPT_LOSS_BCE_WITH_LOGITS: return mpt__bce_element(op, c, x, t, slope);
    case MPT_LOSS_ABSOLUTE_ERROR: *slope = mpt__sign(d); return size;
    case MPT_LOSS_GRADIENT: *slope = t; return 0;
    case MPT_LOSS_HUBER:
        *slope = delta * mpt__sign(d);
        if (!(size <= delta)) return delta * (size - 0.5f * delta);
        *slope = d;
        return 0.5f * d * d;
    default: *slope = 2 * d; return d * d;
    }
}

/* -- Scaler -- */

/* count + 1, for a counter that stops before it overflows */
MPT_HD int32_t mpt__more(int32_t count) { return count + (count < 0x7fffffff); }

/* What the growth tracker starts from */
MPT_HD int mpt__growth_start(const mpt_scaler_desc *d) { return d->late_growth ? -1 : 0; }

MPT_HD void mpt_scaler_rule(mpt_scaler_state *s, int found) {
    const mpt_scaler_desc *d = &s->desc;
    const float floor = d->no_min ? mpt__float(0x00800000u) : d->min_scale; /* 2^-126 */
    const int lowest = d->mode != MPT_SCALER_DYNAMIC || s->scale <= floor;
    s->updates++;
    s->overflows += found != 0;
    if (found && lowest) s->stuck = mpt__more(s->stuck);
    else s->stuck = 0;
    if (d->mode != MPT_SCALER_DYNAMIC) return;

    if (found) {
        const float smaller = (float)((double)s->scale * d->backoff_factor);
        s->growth_tracker = mpt__growth_start(d);
        if (s->hysteresis_left > 0) s->hysteresis_left--;
        if (s->hysteresis_left == 0) s->scale = fmaxf(smaller, floor);
        if (!mpt__finite(s->scale) && s->stuck < d->patience) s->stuck = d->patience; /* inf stays inf */
        return;
    }
    if (d->refill_when_clean) s->hysteresis_left = d->hysteresis;
    if (++s->growth_tracker == d->growth_interval) {
        const float larger = (float)((double)s->scale * d->growth_factor);
        if (d->unguarded || mpt__finite(larger)) s->scale = d->no_max ? larger : fminf(larger, d->max_scale);
        if (!mpt__finite(s->scale)) s->stuck = d->patience;
        s->growth_tracker = 0;
        s->hysteresis_left = d->hysteresis;
    }
}

/* The update after each optimizer has found an mpt_skip_reason. An overflow in one of them is an overflow. Without one,
   neither a fault that a smaller scale cannot cure nor a step without weight changes the scale. */
MPT_HD void mpt__scaler_follow(mpt_scaler_state *s, const int32_t *const *found, int count) {
    int i, overflow = 0, hopeless = 0, clean = 0;
    for (i = 0; i < count; i++) {
        overflow |= *found[i] == MPT_SKIP_GRADIENT;
        hopeless |= *found[i] >= MPT_SKIP_STATISTICS;
        clean |= *found[i] == MPT_SKIP_NONE;
    }
    if (hopeless && !overflow) {
        s->updates++;
        s->overflows++;
        s->stuck = mpt__more(s->stuck);
    } else if (overflow || clean) {
        mpt_scaler_rule(s, overflow);
    }
}

/* -- Learning-rate schedules -- */

/* The Taylor series of cos x, whose last term has x^18, or of sin x / x, with x^19: last is 18 or 19. */
MPT_HD double mpt__taylor(double x, int last) {
    const double square = x * x;
    double sum = 1;
    for (; last > 1; last -= 2) sum = mpt__mul_add(-square / (last * (last - 1)), sum, 1);
    return sum;
}

/* cos(pi t) for t in 0..1: not libm's, to have the same bits everywhere. Error below 2^-52. */
MPT_HD double mpt__cos_pi(double t) {
    const double pi = 3.14159265358979323846, u = t > 0.5 ? 1 - t : t; /* cos(pi t) = -cos(pi (1 - t)) */
    const double x = pi * (0.5 - u);
    const double cosine = u > 0.25 ? mpt__taylor(x, 19) * x : mpt__taylor(pi * u, 18); /* cos y = sin(pi / 2 - y) */
    if (t > 0.5) return -cosine;
    return cosine;
}

/* Goes from `from` to `to` as share goes from 0 to 1. */
MPT_HD double mpt__anneal(int cosine, double from, double to, double share) {
    if (cosine) return mpt__mul_add((from - to) * 0.5, 1 + mpt__cos_pi(share), to);
    return mpt__mul_add(to - from, share, from);
}

/* x to the power of n, by squaring: the same bits everywhere, as libm's are not */
MPT_HD double mpt__power(double x, uint64_t n) {
    double product = 1;
    for (; n; n /= 2) {
        if (n % 2) product *= x;
        x *= x;
    }
    return product;
}

MPT_HD int mpt__is_one_cycle(const mpt_schedule *s) {
    return s->kind == MPT_SCHEDULE_ONE_CYCLE || s->kind == MPT_SCHEDULE_ONE_CYCLE_LINEAR;
}

/* A value that is `first` when the cycle begins, `middle` at its peak, `last` at its end. t: steps since its begin */
MPT_HD double mpt__one_cycle(const mpt_schedule *s, double t, double first, double middle, double last) {
    const double steps = (double)s->steps, top = mpt__mul_add(s->peak, steps, -1);
    const int cosine = s->kind == MPT_SCHEDULE_ONE_CYCLE;
    if (t <= top) return mpt__anneal(cosine, first, middle, t / top);
    return mpt__anneal(cosine, middle, last, fmin((t - top) / (steps - 1 - top), 1.0));
}

MPT_HD int mpt__cycles_momentum(const mpt_schedule *s, double momentum) {
    return mpt__is_one_cycle(s) && !s->no_cycle_momentum && momentum > 0;
}

MPT_HD double mpt__max_momentum(const mpt_schedule *s) { return s->max_momentum > 0 ? s->max_momentum : 0.95; }

MPT_HD double mpt_schedule_momentum(const mpt_schedule *s, uint64_t applied, double momentum) {
    const double high = mpt__max_momentum(s), low = s->base_momentum > 0 ? s->base_momentum : 0.85;
    if (!mpt__cycles_momentum(s, momentum)) return momentum;
    if (applied < s->warmup) return high;
    return mpt__one_cycle(s, (double)(applied - s->warmup), high, low, high);
}

MPT_HD double mpt_schedule_factor(const mpt_schedule *s, uint64_t applied) {
    double t;
    if (applied < s->warmup) return mpt__anneal(0, s->warmup_start, 1, (double)applied / (double)s->warmup);
    t = (double)(applied - s->warmup);
    switch (s->kind) {
    case MPT_SCHEDULE_COSINE: return mpt__anneal(1, 1, s->low, fmin(t / (double)s->steps, 1.0));
    case MPT_SCHEDULE_STEP: return mpt__power(s->low, (applied - s->warmup) / (s->steps ? s->steps : 1));
    case MPT_SCHEDULE_ONE_CYCLE:
    case MPT_SCHEDULE_ONE_CYCLE_LINEAR: return mpt__one_cycle(s, t, s->start, 1, s->low);
    default: return 1;
    }
}

/* -- Weights without fp32 masters: the fp32 value of a 16-bit weight, and back -- */

MPT_HD float mpt__weight_load(mpt_master mode, mpt_dtype type, uint16_t copy, uint16_t low) {
    if (mode == MPT_MASTER_SPLIT) return mpt__float(((uint32_t)copy - (low >> 15)) << 16 | low);
    if (mode == MPT_MASTER_KAHAN) return mpt__add_rn(mpt_widen(copy, type), mpt_widen(low, type));
    return mpt_widen(copy, type);
}

MPT_HD void mpt__weight_store(mpt_master mode, mpt_dtype type, float value, uint32_t random, uint16_t *copy,
                              uint16_t *low) {
    const mpt_round round = mode == MPT_MASTER_STOCHASTIC ? MPT_ROUND_STOCHASTIC : MPT_ROUND_NEAREST;
    const uint32_t u = mpt__bits(value);
    if (mode == MPT_MASTER_SPLIT && mpt__finite(value)) {
        *copy = (uint16_t)((u + 0x8000u) >> 16);
        *low = (uint16_t)u;
        return;
    }
    *copy = (uint16_t)mpt_narrow(value, type, round, MPT_OVERFLOW_INF, random);
    *low = 0; /* what is not finite has no low part */
    if (mode == MPT_MASTER_KAHAN && mpt__finite(mpt_widen(*copy, type)))
        *low = (uint16_t)mpt_narrow(mpt__add_rn(value, -mpt_widen(*copy, type)), type, round, MPT_OVERFLOW_INF, 0);
}

/* Whether a weight of 16-bit `type`, rounded to nearest, would not change: a lost update, for the meter. */
MPT_HD int mpt__update_lost(mpt_dtype type, float before, float after) {
    return mpt_narrow(before, type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0) ==
           mpt_narrow(after, type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0);
}

/* -- Optimizers: one element --

   PyTorch's formulas (torch/optim/sgd.py, adam.py; foreach and fused off), with the fused multiply-adds of its
   vectorised CPU kernels. Each operation is rounded as there, except that PyTorch's square root may be 1 ulp off. */

typedef struct mpt__rates { /* constants of one step for one tensor, rounded to fp32 where PyTorch rounds them */
    mpt_optimizer_kind kind;
    int nesterov, first, has_momentum, amsgrad, maximize;
    float inv_scale, clip, clip_value; /* a gradient is multiplied by the first two, clamped to the third if not 0 */
    float lr, decay;                   /* AdamW: decay = 1 - lr * weight_decay */
    float momentum, undamped;
    float lerp, beta2, square;  /* 1 - beta1, beta2, 1 - beta2 */
    float step_size, root, eps; /* lr / (1 - beta1^t), sqrt(1 - beta2^t) */
} mpt__rates;

/* torch.nn.utils.clip_grad_norm_, which takes the reciprocal first */
MPT_HD double mpt__clip_factor(const mpt_optimizer_state *s, double max_norm) {
    const float factor = mpt__mul_rn(mpt__div_rn(1, mpt__add_rn((float)s->grad_norm, 1e-6f)), (float)max_norm);
    if (max_norm > 0 && factor < 1) return (double)factor;
    return 1;
}

MPT_HD mpt__rates mpt__rates_of(const mpt_update_op *op, const mpt_tensor_slice *slice) {
    const mpt_optimizer_desc *d = &op->desc;
    const mpt_optimizer_state *s = op->state;
    const double lr = slice->lr * s->schedule;
    const double beta1 = mpt_schedule_momentum(&d->schedule, s->applied, d->beta1);
    double power = s->beta1_power; /* of beta1 in the steps before this one */
    mpt__rates r;
    if (mpt__cycles_momentum(&d->schedule, d->beta1)) power = mpt__power(beta1, s->applied);
    r.kind = d->kind;
    r.nesterov = d->nesterov;
    r.first = s->applied == 0;
    r.has_momentum = d->momentum != 0;
    r.inv_scale = (float)s->inv_scale;
    r.clip = (float)mpt__clip_factor(s, op->max_norm);
    r.clip_value = (float)op->max_value;
    r.amsgrad = d->amsgrad;
    r.maximize = d->maximize;
    r.lr = (float)lr;
    r.decay = (float)slice->weight_decay;
    if (d->kind == MPT_ADAMW) r.decay = (float)mpt__mul_add(-lr, slice->weight_decay, 1);
    r.momentum = (float)mpt_schedule_momentum(&d->schedule, s->applied, d->momentum);
    r.undamped = (float)(1 - d->dampening);
    r.lerp = (float)(1 - beta1);
    r.beta2 = (float)d->beta2;
    r.square = (float)(1 - d->beta2);
    r.step_size = (float)(lr / mpt__mul_add(-power, beta1, 1));
    r.root = (float)sqrt(mpt__mul_add(-s->beta2_power, d->beta2, 1));
    r.eps = (float)d->eps;
    return r;
}

/* Moments below the smallest normal number become 0: many CPUs take a hundred cycles for a subnormal. Tests the bits,
   for -ffast-math. */
MPT_HD float mpt__flush(float x) {
    if (!(mpt__bits(x) & 0x7f800000u)) return 0;
    return x;
}

MPT_HD float mpt__sgd_element(const mpt__rates *r, float p, float g, float *buffer) {
    if (r->decay != 0) g = mpt__fma_rn(r->decay, p, g);
    if (r->has_momentum) {
        float b = g;
        if (!r->first) b = mpt__fma_rn(r->undamped, g, mpt__mul_rn(*buffer, r->momentum));
        b = mpt__flush(b);
        *buffer = b;
        if (r->nesterov) b = mpt__fma_rn(r->momentum, b, g);
        g = b;
    }
    return mpt__fma_rn(-r->lr, g, p);
}

/* torch.lerp, which starts from the nearer end */
MPT_HD float mpt__lerp(float from, float to, float share) {
    const float distance = mpt__add_rn(to, -from);
    if (share < 0.5f) return mpt__fma_rn(share, distance, from);
    return mpt__fma_rn(share - 1, distance, to);
}

MPT_HD float mpt__adam_element(const mpt__rates *r, float p, float g, float *m, float *v, float *largest) {
    float denominator, square;
    if (r->kind == MPT_ADAMW) p = mpt__mul_rn(p, r->decay);
    else if (r->decay != 0) g = mpt__fma_rn(r->decay, p, g);
    *m = mpt__flush(mpt__lerp(*m, g, r->lerp));
    *v = mpt__flush(mpt__fma_rn(mpt__mul_rn(r->square, g), g, mpt__mul_rn(*v, r->beta2)));
    square = *v;
    if (r->amsgrad) {
        if (!(square > *largest)) square = *largest;
        *largest = square;
    }
    denominator = mpt__add_rn(mpt__div_rn(mpt__sqrt_rn(square), r->root), r->eps);
    return mpt__add_rn(p, mpt__div_rn(mpt__mul_rn(-r->step_size, *m), denominator));
}

/* The new value of parameter p from its scaled gradient g. Updates the moments that the kind has. */
MPT_HD float mpt__update_element(const mpt__rates *r, float p, float g, float *m, float *v, float *largest) {
    g = mpt__mul_rn(mpt__mul_rn(g, r->inv_scale), r->clip);
    if (r->clip_value > 0) g = mpt__clamp(g, r->clip_value);
    if (r->maximize) g = -g;
    if (r->kind == MPT_SGD) return mpt__sgd_element(r, p, g, m);
    return mpt__adam_element(r, p, g, m, v, largest);
}

/* -- Ranks --

   Each rank tells the others MPT__SLOT_WORDS words of 64 bits. They go through the sum of floats as 16 bits per float,
   in a slot for each rank, to which the other ranks add zeros, so nothing is rounded. */

enum { MPT__SLOT_WORDS = 4, MPT__SLOT = 4 * MPT__SLOT_WORDS };

/* Element i of slots(ranks,SLOT) when this rank tells `words` */
MPT_HD float mpt__slot_put(const uint64_t *words, int rank, size_t i) {
    const size_t part = i % MPT__SLOT;
    if (i / MPT__SLOT == (size_t)rank) return (float)(words[part / 4] >> part % 4 * 16 & 0xffff);
    return 0.0f;
}

/* Word i of those that a rank told */
MPT_HD uint64_t mpt__slot_word(const float *slots, int rank, int i) {
    const float *slot = slots + (size_t)rank * MPT__SLOT + (size_t)i * 4;
    uint64_t word = 0;
    int part;
    for (part = 3; part >= 0; part--) word = word << 16 | (uint64_t)slot[part];
    return word;
}

/* Word i of the mpt_loss_sum of all ranks, of which each told its own: added in the order of ranks */
MPT_HD uint64_t mpt__slot_total(const float *slots, int ranks, int i) {
    const int real = i < 2; /* loss and weight; rows and correct are integers */
    double sum = 0;
    uint64_t total = 0;
    int r;
    for (r = 0; r < ranks; r++) {
        const uint64_t word = mpt__slot_word(slots, r, i);
        double x;
        memcpy(&x, &word, sizeof x);
        if (real) sum += x;
        total += word;
    }
    if (real) memcpy(&total, &sum, sizeof total);
    return total;
}

/* The result of an exchange with the other ranks as a result of mpt, with a reason */
static inline mpt_result mpt__exchanged(mpt_context *ctx, const mpt_ranks *r, mpt_result result) {
    char why[256];
    size_t length;
    if (result == MPT_OK) return MPT_OK;
    length = strlen(mpt_why(ctx));
    if (length >= sizeof why) length = sizeof why - 1;
    memcpy(why, mpt_why(ctx), length);
    why[length] = 0;
    return mpt_fail(ctx, MPT_ERROR_DEVICE, "rank %d of %d: an exchange with all ranks failed: %s", r->rank, r->ranks,
                    why);
}

static inline mpt_result mpt__all_gather(mpt_context *ctx, const mpt_ranks *r, void *x, const size_t *begin,
                                         size_t size) {
    return mpt__exchanged(ctx, r, r->all_gather(r->user, x, begin, size));
}

/* After an update each rank receives the weights that the others have updated. */
static inline mpt_result mpt__share_weights(mpt_context *ctx, const mpt_update_op *op) {
    const mpt_shard *s = op->shard;
    void *weights = op->copy.data;
    size_t size = sizeof(uint16_t);
    mpt_result r;
    if (!weights) {
        weights = op->master - op->first;
        size = sizeof(float);
    }
    r = mpt__all_gather(ctx, s->ranks, weights, s->begin, size);
    if (r == MPT_OK && s->wide) r = mpt__all_gather(ctx, s->ranks, s->wide, s->wide_begin, sizeof(float));
    if (r == MPT_OK && op->desc.meter)
        r = mpt__all_gather(ctx, s->ranks, s->meters, s->counting, 2 * sizeof *s->meters);
    return r;
}

/* moved and lost of all ranks */
MPT_HD void mpt__meters_add(mpt_optimizer_state *state, const uint64_t *meters, int ranks) {
    int r;
    state->moved = state->lost = 0;
    for (r = 0; r < ranks; r++) {
        state->moved += meters[2 * r];
        state->lost += meters[2 * r + 1];
    }
}

/* -- Optimizers: one step -- */

/* *sum += part, of elements that follow those of sum */
MPT_HD void mpt__scan_join(mpt_scan *sum, const mpt_scan *part) {
    if (sum->inf + sum->nan == 0 && part->inf + part->nan) sum->first = part->first;
    sum->sum_squares += part->sum_squares;
    sum->inf += part->inf;
    sum->nan += part->nan;
}

/* Index of the last slice that starts at or before `element`. */
MPT_HD int mpt__slice_at(const mpt_tensor_slice *slices, int tensors, size_t element) {
    int low = 0, high = tensors - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (slices[middle].offset <= element) low = middle;
        else high = middle - 1;
    }
    return low;
}

/* Sets the state after a check. scan: of the scaled gradients, its `first` an element of the flat arrays. sound: the
   pending values of mpt_optimizer_commit are finite */
MPT_HD void mpt__state_checked(const mpt_update_op *op, const mpt_scan *scan, int sound) {
    mpt_optimizer_state *s = op->state;
    double weight = 1, share = 1;
    int t = 0;
    if (op->loss) weight = op->loss->weight;
    if (op->loss && weight > 0) share = op->unit / weight;
    s->scan = *scan;
    s->inv_scale = (float)(share / op->scaler->scale);
    s->schedule = mpt_schedule_factor(&op->desc.schedule, s->applied);
    s->grad_norm = sqrt(scan->sum_squares) * s->inv_scale;
    s->clip = 1;
    s->clip_value = 0;
    s->found = MPT_SKIP_NONE;
    if (!sound) s->found = MPT_SKIP_STATISTICS;
    /* A finite gradient may still overflow when it is divided by a scale below 1; the norm then overflows, too. */
    if (scan->inf || scan->nan || !mpt__finite((float)s->grad_norm)) s->found = MPT_SKIP_GRADIENT;
    if (!(weight > 0)) s->found = MPT_SKIP_EMPTY;
    if (scan->inf || scan->nan)
        while (t < op->tensors && op->slices[t].offset <= scan->first) t++;
    s->scan.first = (uint64_t)t;
}

/* Why the step will be skipped: what the check found, or, now that the clip limits are known, a moment that might
   become inf. The norm bounds every gradient; moments are averages of gradients, or sums of at most 1 / (1 - momentum)
   of them. The limits leave room for rounding and for Nesterov's extra term. */
MPT_HD int32_t mpt__step_found(const mpt_update_op *op) {
    const mpt_optimizer_desc *d = &op->desc;
    const double undamped = 1 - fmin(d->dampening, 0.0);
    const int cycles = mpt__cycles_momentum(&d->schedule, d->momentum);
    const double momentum = cycles ? mpt__max_momentum(&d->schedule) : d->momentum;
    double largest = op->state->grad_norm * mpt__clip_factor(op->state, op->max_norm);
    double limit = 9223372036854775808.0; /* 2^63 */
    if (op->max_value > 0) largest = fmin(largest, op->max_value);
    if (op->state->found || (d->kind == MPT_SGD && (momentum <= 0 || momentum >= 1))) return op->state->found;
    if (d->kind == MPT_SGD) limit *= limit * (1 - momentum) / (4 * undamped);
    if (largest > limit) return MPT_SKIP_MOMENT;
    return MPT_SKIP_NONE;
}

/* Sets the state after a step: counts it if it was applied, else writes it to the journal. */
MPT_HD void mpt__state_stepped(const mpt_update_op *op) {
    mpt_optimizer_state *s = op->state;
    s->found = mpt__step_found(op);
    s->attempted++;
    s->clip = mpt__clip_factor(s, op->max_norm);
    s->clip_value = op->max_value;
    if (!s->found) {
        s->applied++;
        s->beta1_power *= op->desc.beta1;
        s->beta2_power *= op->desc.beta2;
    } else {
        mpt_skip *skip = &s->journal[s->skipped % MPT_JOURNAL];
        s->skipped++;
        skip->step = s->attempted;
        skip->scale = op->scaler->scale;
        skip->tensor = (int32_t)s->scan.first;
        skip->inf = s->scan.inf;
        skip->nan = s->scan.nan;
        skip->reason = s->found;
        skip->reserved = 0;
    }
}

/* The average a of a weight, after a step has changed the weight to p. torch.lerp with 1 - decay */
MPT_HD float mpt__average(const mpt_update_op *op, float a, float p) {
    const float weight = (float)(1 - op->average_decay), way = mpt__add_rn(p, -a);
    if (op->state->applied <= op->average_from + 1) return p;
    if (weight < 0.5f) return mpt__add_rn(a, mpt__mul_rn(weight, way));
    return mpt__add_rn(p, -mpt__mul_rn(way, 1 - weight));
}

/* -- Windows -- */

/* Does each output read a single pixel, the one at its own position? */
MPT_HD int mpt__conv2d_is_product(const mpt_conv2d_shape *s) {
    return s->R == 1 && s->S == 1 && s->stride_h == 1 && s->stride_w == 1 && !s->padding_h && !s->padding_w;
}

/* Pixels of an axis, of `size` pixels, in the window of output `out`; the padding is at most half the window */
MPT_HD size_t mpt__window_inside(size_t out, size_t stride, size_t padding, size_t window, size_t size) {
    const size_t begin = out * stride, end = begin + window; /* in the padded axis, where the image begins at
                                                                `padding` */
    size_t inside = window;
    if (begin < padding) inside -= padding - begin;
    if (end > size + padding) inside -= end - (size + padding);
    return inside;
}

/* What the sum of output (p,q) of an average pool is divided by */
MPT_HD size_t mpt__pool2d_divisor(const mpt_pool2d_shape *s, size_t p, size_t q) {
    if (!s->exclude_padding) return s->R * s->S;
    return mpt__window_inside(p, s->stride_h, s->padding_h, s->R, s->H) *
           mpt__window_inside(q, s->stride_w, s->padding_w, s->S, s->W);
}

#if defined(__cplusplus) && defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

#endif /* MPT_H */

#if defined(MPT_IMPLEMENTATION) && !defined(MPT__IMPLEMENTED)
#define MPT__IMPLEMENTED

/* ==== CORE ==== */

#include <stdarg.h>
#include <stdlib.h>
#if defined(_MSC_VER) && !defined(MPT_NO_THREADS)
#define MPT_NO_THREADS
#endif
#ifndef MPT_NO_THREADS
#include <pthread.h> /* on Windows: winpthreads, which comes with MinGW */
#endif

/* Declares as mpt__sys_NAME a system function that its header hides under -std=c99; the other name keeps it from
   conflicting with the header's declaration. */
#if (defined(__unix__) || defined(__APPLE__)) && defined(__GNUC__)
#define MPT__POSIX
#include <unistd.h>
#define MPT__LABEL_OF(prefix, name) MPT__LABEL_TEXT(prefix, name)
#define MPT__LABEL_TEXT(prefix, name) #prefix #name
#ifdef __cplusplus
#define MPT__SYSTEM(type, name, parameters) \
    extern "C" type mpt__sys_##name parameters __asm__(MPT__LABEL_OF(__USER_LABEL_PREFIX__, name));
#else
#define MPT__SYSTEM(type, name, parameters) \
    type mpt__sys_##name parameters __asm__(MPT__LABEL_OF(__USER_LABEL_PREFIX__, name));
#endif
#endif

enum {
    MPT__ALIGN = 64,                 /* of every allocation, in bytes: a cache line, an AVX-512 register */
    MPT__OVERHEAD = MPT__ALIGN + 16, /* bytes added to an allocation for alignment and mpt__header */
    MPT__RUN = 32,                   /* elements that elementwise loops process at a time, in fp32 on the stack */
    MPT__MAX_THREADS = 64,
    MPT__SCAN_BLOCKS = 64, /* parts of a scan */
    MPT__LANES = 32        /* interleaved sums in each part */
};

typedef struct mpt__threads mpt__threads;

/* The left operand of a product: word d of run r of row i is at base + rows[i] + runs[r] + d * stride, in bytes. A word
   is a float, or a pair of bf16 that are neighbours in depth. Rows may be anywhere, in an array of the caller or in the
   workspace. */
typedef struct mpt__left {
    const char *base;
    const size_t *rows, *runs;
    size_t count, length, stride; /* runs, words of each, bytes from one word to the next */
} mpt__left;

typedef void (*mpt__tile)(const mpt__left *left, size_t row, const float *b, size_t b_stride, float *sums,
                          size_t stride, int add);

typedef struct mpt__simd { /* bulk loops of one instruction set, see SIMD */
    const char *name;
    void (*load_f16)(const uint16_t *src, size_t n, float *dst);
    void (*load_bf16)(const uint16_t *src, size_t n, float *dst);
    void (*store_f16)(uint16_t *dst, size_t n, const float *src);
    void (*store_bf16)(uint16_t *dst, size_t n, const float *src);
    /* lanes[i % 32] += x[i]^2 in double, n a multiple of 32; returns 1 if some x is inf or NaN. Indexed by the type of
       x; F16 and BF16 may be NULL */
    int (*squares[3])(const void *x, size_t n, double *lanes);
    /* new values of n parameters from their scaled gradients and moments, see mpt__update_element */
    void (*update)(const mpt__rates *rates, size_t n, float *p, const float *g, float *m, float *v, float *largest);
    /* sums(tile_m,tile_n) = rows row.. of left times the panel b(words,tile_n), + sums if add; rows of b are `b_stride`
       apart, rows of sums `stride`. [0]: words are floats; [1]: pairs of bf16, or NULL. [.][1]: only the first half_n
       columns. AMX would be another row. (AVX512-FP16 does not help, because it adds in fp16.) */
    mpt__tile tile[2][2];
    /* out[e] = low[e] and high[e] as a pair */
    void (*pair)(const uint16_t *low, const uint16_t *high, size_t n, uint32_t *out);
    /* panel(depth,n) = the transpose of x(n,depth), whose rows are `stride` words apart; n a multiple of 4 */
    void (*transpose)(const float *x, size_t stride, size_t depth, size_t n, float *panel);
    size_t tile_m, tile_n, half_n;
    int avx2; /* the CPU can run the tasks' AVX2 clones, see MPT__TASKS */
} mpt__simd;

typedef struct mpt__meter { /* lost updates that one thread saw */
    uint64_t moved, lost;
} mpt__meter;

struct mpt_context {
    mpt_context_desc desc;
    mpt_backend backend;
    void *device; /* the backend's own state */
    mpt_place place;
    mpt__simd simd;
    int threads;
    mpt__threads *pool;                  /* NULL with one thread */
    float *workspace;                    /* of the CPU engine: MPT__WORKSPACE floats a thread */
    mpt_scan scans[MPT__SCAN_BLOCKS];    /* partial results of the running scan */
    mpt__meter meters[MPT__MAX_THREADS]; /* and of the running update */
    mpt_result failed;                   /* result and reason of the last failure */
    char why[256];
};

/* What fails, builds models, opens or handles files: compiled for size by gcc, with what only it calls and the branches
   that lead to it. Allocating is a part of it, since a training step never does. */
#ifdef __GNUC__
#define MPT__COLD __attribute__((cold))
#else
#define MPT__COLD
#endif

/* -- Errors -- */

typedef struct mpt__text { /* bounded text under construction */
    char *at, *end;        /* *end is the terminating 0 */
} mpt__text;

static void mpt__put_char(mpt__text *t, char c) {
    if (t->at < t->end) *t->at++ = c;
    *t->at = 0;
}

static void mpt__put_string(mpt__text *t, const char *s) {
    if (!s) s = "(null)";
    for (; *s; s++) mpt__put_char(t, *s);
}

static void mpt__put_unsigned(mpt__text *t, uint64_t u) {
    char digits[20];
    int n = 0;
    do digits[n++] = (char)('0' + (int)(u % 10));
    while (u /= 10);
    while (n) mpt__put_char(t, digits[--n]);
}

static void mpt__put_int(mpt__text *t, int64_t i) {
    if (i < 0) mpt__put_char(t, '-');
    mpt__put_unsigned(t, (uint64_t)(i < 0 ? -i : i));
}

/* Six significant digits, as %g. */
static void mpt__put_double(mpt__text *t, double x) {
    const float f = (float)x;
    int exponent = 0, shown = 0, digits = 6, i; /* shown: the part of the exponent that the point's place shows */
    uint64_t mantissa;
    char text[6];
    if (mpt__bits(f) >> 31 && !mpt__is_nan(f)) {
        mpt__put_char(t, '-');
        x = -x;
    }
    if (!mpt__finite(f) || !(x > 0)) {
        if (mpt__is_nan(f)) mpt__put_string(t, "nan");
        else if (mpt__finite(f)) mpt__put_string(t, "0");
        else mpt__put_string(t, "inf");
        return;
    }
    for (; x >= 10; exponent++) x /= 10;
    for (; x < 1; exponent--) x *= 10;
    mantissa = (uint64_t)(x * 1e5 + 0.5);
    if (mantissa >= 1000000) {
        mantissa /= 10;
        exponent++;
    }
    for (i = 6; i-- > 0; mantissa /= 10) text[i] = (char)('0' + (int)(mantissa % 10));
    while (digits > 1 && text[digits - 1] == '0') digits--;
    if (exponent >= -4 && exponent < 6) shown = exponent;
    if (shown < 0) mpt__put_string(t, "0.");
    for (i = shown; i < -1; i++) mpt__put_char(t, '0');
    for (i = 0; i < digits || i <= shown; i++) {
        mpt__put_char(t, text[i]);
        if (i == shown && i + 1 < digits) mpt__put_char(t, '.');
    }
    if (shown == exponent) return;
    mpt__put_char(t, 'e');
    mpt__put_int(t, exponent);
}

/* By hand: printf's numbers depend on the locale, and there may be no stdio.h. */
MPT__COLD MPT__PRINTF(3, 0) static void mpt__format_list(char *out, size_t size, const char *format, va_list args) {
    mpt__text t;
    t.at = out;
    t.end = out + size - 1;
    *out = 0;
    for (; *format; format++) {
        if (*format != '%') {
            mpt__put_char(&t, *format);
            continue;
        }
        switch (*++format) {
        case 's': mpt__put_string(&t, va_arg(args, const char *)); break;
        case 'z':
            format++; /* the u */
            mpt__put_unsigned(&t, va_arg(args, size_t));
            break;
        case 'g': mpt__put_double(&t, va_arg(args, double)); break;
        default: mpt__put_int(&t, va_arg(args, int)); /* 'd' */
        }
    }
}

MPT__PRINTF(3, 4)
static void mpt__print(char *out, size_t size, const char *format, ...) {
    va_list args;
    va_start(args, format);
    mpt__format_list(out, size, format, args);
    va_end(args);
}

MPT__COLD MPT_DEF mpt_result mpt_fail(mpt_context *ctx, mpt_result result, const char *format, ...) {
    va_list args;
    if (!ctx) return result;
    ctx->failed = result;
    va_start(args, format);
    mpt__format_list(ctx->why, sizeof ctx->why, format, args);
    va_end(args);
    if (ctx->desc.log) ctx->desc.log(MPT_LOG_ERROR, ctx->why, ctx->desc.user);
    return result;
}

/* Returns from the calling function when a call did not succeed. */
#define MPT__TRY(call)                       \
    do {                                     \
        const mpt_result mpt__r = (call);    \
        if (mpt__r != MPT_OK) return mpt__r; \
    } while (0)

/* A call that can fail begins with this, so that no older reason is taken for its own. */
static void mpt__forget(mpt_context *ctx) {
    if (ctx) *ctx->why = 0;
}

MPT_DEF const char *mpt_why(const mpt_context *ctx) {
    if (!ctx) return "the context is NULL";
    return ctx->why;
}

MPT_DEF const char *mpt_result_text(mpt_result result) {
    switch (result) {
#define MPT__X(id, text) \
    case MPT_##id: return text;
        MPT_RESULTS(MPT__X)
#undef MPT__X
    default: return "unknown result code";
    }
}

MPT_DEF int mpt_version(void) { return MPT_VERSION; }

/* -- Memory -- */

static size_t mpt__min(size_t a, size_t b) { return a < b ? a : b; }
static size_t mpt__max(size_t a, size_t b) { return a > b ? a : b; }

/* *out = a b; returns 0 if that does not fit. */
static int mpt__size_mul(size_t *out, size_t a, size_t b) {
    if (b && a > (size_t)-1 / b) return 0;
    *out = a * b;
    return 1;
}

static void *mpt__desc_alloc(const mpt_context_desc *desc, size_t bytes) {
    if (desc->alloc) return desc->alloc(bytes, desc->user);
    return malloc(bytes);
}

static void mpt__desc_release(const mpt_context_desc *desc, void *p, size_t bytes) {
    if (desc->release) desc->release(p, bytes, desc->user);
    else free(p);
}

typedef struct mpt__header { /* just below every aligned block */
    void *raw;
    size_t bytes;
} mpt__header;

/* Zeroed host memory, 64-byte aligned. */
MPT__COLD static void *mpt__host_alloc(mpt_context *ctx, size_t bytes) {
    mpt__header header;
    char *p;
    header.bytes = bytes + MPT__OVERHEAD;
    header.raw = NULL;
    if (bytes <= (size_t)-1 / 2) header.raw = mpt__desc_alloc(&ctx->desc, header.bytes);
    if (!header.raw) {
        mpt_fail(ctx, MPT_ERROR_NO_MEMORY, "out of memory: the allocator refused %zu bytes", bytes);
        return NULL;
    }
    p = (char *)header.raw + sizeof header;
    p += (MPT__ALIGN - (uintptr_t)p % MPT__ALIGN) % MPT__ALIGN;
    memcpy(p - sizeof header, &header, sizeof header);
    memset(p, 0, bytes);
    return p;
}

static void mpt__host_free(mpt_context *ctx, void *p) {
    mpt__header header;
    if (!p) return;
    memcpy(&header, (char *)p - sizeof header, sizeof header);
    mpt__desc_release(&ctx->desc, header.raw, header.bytes);
}

MPT_DEF void *mpt_alloc(mpt_context *ctx, size_t bytes) {
    if (!ctx || !bytes) return NULL;
    return ctx->backend.alloc(ctx, bytes);
}

MPT_DEF void mpt_free(mpt_context *ctx, void *p) {
    if (ctx && p) ctx->backend.release(ctx, p);
}

MPT_DEF mpt_result mpt_upload(mpt_context *ctx, void *device, const void *host, size_t bytes) {
    mpt__forget(ctx);
    if (!ctx || !device || !host) return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "upload: an argument is NULL");
    return ctx->backend.upload(ctx, device, host, bytes);
}

MPT_DEF mpt_result mpt_download(mpt_context *ctx, void *host, const void *device, size_t bytes) {
    mpt__forget(ctx);
    if (!ctx || !device || !host) return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "download: an argument is NULL");
    return ctx->backend.download(ctx, host, device, bytes);
}

/* -- Threads --

   mpt__parallel hands [0, count) out to the threads, piece by piece, and waits only for threads that took a piece: not
   for a worker that a busy machine does not schedule. What a task computes for an index must not depend on how the
   range is cut; then the bits are the same for any number of threads. */

typedef void (*mpt__task)(void *arg, size_t begin, size_t end, int worker);

#ifdef MPT_NO_THREADS

static mpt_result mpt__threads_start(mpt_context *ctx) {
    ctx->threads = 1;
    return MPT_OK;
}

static void mpt__threads_stop(mpt_context *ctx) { (void)ctx; }

static void mpt__threads_do(mpt_context *ctx, size_t count, int threads, mpt__task task, void *arg) {
    (void)ctx;
    (void)threads;
    task(arg, 0, count, 0);
}

#else

/* The rounding mode and the handling of subnormals are per thread: a worker takes over its caller's. */
#if defined(__SSE__) && defined(__GNUC__)
static unsigned mpt__float_mode(void) { return __builtin_ia32_stmxcsr() & 0xffc0u; } /* without the status */
static void mpt__float_mode_set(unsigned mode) { __builtin_ia32_ldmxcsr(mode); }
#elif defined(__aarch64__) && defined(__GNUC__)
static unsigned mpt__float_mode(void) {
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return (unsigned)mode;
}
static void mpt__float_mode_set(unsigned mode) {
    const uint64_t wide = mode;
    __asm__ volatile("msr fpcr, %0" : : "r"(wide));
}
#else
static unsigned mpt__float_mode(void) { return 0; }
static void mpt__float_mode_set(unsigned mode) { (void)mode; }
#endif

#ifdef __GNUC__ /* for flags that are written under the lock and may be read without it */
#define MPT__SPINS 200
#define MPT__PEEK(x) __atomic_load_n(&(x), __ATOMIC_RELAXED)
#define MPT__POKE(x, value) __atomic_store_n(&(x), value, __ATOMIC_RELAXED)
#else
#define MPT__SPINS 0
#define MPT__PEEK(x) (x)
#define MPT__POKE(x, value) (x) = (value)
#endif

typedef struct mpt__worker {
    pthread_t thread;
    mpt__threads *pool;
    int index; /* 1.. ; the caller is 0 */
} mpt__worker;

struct mpt__threads {
    pthread_mutex_t lock;
    pthread_cond_t start, done;
    mpt__worker workers[MPT__MAX_THREADS];
    int started;  /* number of workers */
    int stopping; /* tells them to end */
    mpt__task task;
    void *arg;
    size_t count, next; /* next: the first index that no thread has taken */
    size_t least;       /* indices in a piece at least */
    int threads;        /* how many the job is worth */
    int busy;           /* threads that have taken a piece and not finished it */
    int open, idle;     /* next < count; busy == 0 */
    unsigned mode;      /* the caller's mpt__float_mode */
    long process;       /* the process that the workers run in */
};

#ifdef _WIN32 /* has no fork */
static long mpt__process(void) { return 0; }
#else
static long mpt__process(void) { return (long)getpid(); }
#endif

/* Waits for open or idle; called with the lock held. The next job usually comes sooner than a sleeping thread could
   wake, so the thread spins at first and yields the core to others that want it. */
static void mpt__threads_await(mpt__threads *pool, const int *flag, pthread_cond_t *told) {
    int spins = MPT__SPINS;
    pthread_mutex_unlock(&pool->lock);
    while (spins-- && !MPT__PEEK(*flag)) sched_yield();
    pthread_mutex_lock(&pool->lock);
    while (!*flag) pthread_cond_wait(told, &pool->lock);
}

/* Takes pieces of the job, each a share of what is left, and does them until none are left. Called with the lock held,
   which is released during the task. */
static void mpt__threads_share(mpt__threads *pool, int index) {
    unsigned mode;
    pool->busy++;
    MPT__POKE(pool->idle, 0);
    while (pool->next < pool->count) {
        const size_t begin = pool->next, left = pool->count - begin, share = left / (2 * (size_t)pool->threads);
        const size_t some = mpt__min(left, mpt__max(share, pool->least));
        pool->next += some;
        MPT__POKE(pool->open, some < left);
        mode = pool->mode;
        pthread_mutex_unlock(&pool->lock);
        if (index) mpt__float_mode_set(mode);
        pool->task(pool->arg, begin, begin + some, index);
        pthread_mutex_lock(&pool->lock);
    }
    if (--pool->busy) return;
    MPT__POKE(pool->idle, 1);
    pthread_cond_signal(&pool->done);
}

static void *mpt__threads_main(void *arg) {
    mpt__worker *worker = (mpt__worker *)arg;
    mpt__threads *pool = worker->pool;
    pthread_mutex_lock(&pool->lock);
    while (!pool->stopping) {
        mpt__threads_await(pool, &pool->open, &pool->start);
        mpt__threads_share(pool, worker->index);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

static void mpt__threads_do(mpt_context *ctx, size_t count, int threads, mpt__task task, void *arg) {
    mpt__threads *pool = ctx->pool;
    int i;
    if (pool->process != mpt__process()) { /* after fork the child has no workers */
        task(arg, 0, count, 0);
        return;
    }
    pthread_mutex_lock(&pool->lock);
    pool->task = task;
    pool->arg = arg;
    pool->threads = threads;
    pool->mode = mpt__float_mode();
    pool->next = 0;
    pool->count = count;
    pool->least = count / (16 * (size_t)threads) + 1;
    MPT__POKE(pool->open, 1);
    for (i = 1; i < threads; i++) pthread_cond_signal(&pool->start);
    mpt__threads_share(pool, 0);
    mpt__threads_await(pool, &pool->idle, &pool->done);
    pthread_mutex_unlock(&pool->lock);
}

static void mpt__threads_stop(mpt_context *ctx) {
    mpt__threads *pool = ctx->pool;
    int i;
    if (!pool) return;
    if (pool->process == mpt__process()) {
        pthread_mutex_lock(&pool->lock);
        pool->stopping = 1;
        MPT__POKE(pool->open, 1);
        pthread_cond_broadcast(&pool->start);
        pthread_mutex_unlock(&pool->lock);
        for (i = 0; i < pool->started; i++) pthread_join(pool->workers[i].thread, NULL);
        pthread_cond_destroy(&pool->done);
        pthread_cond_destroy(&pool->start);
        pthread_mutex_destroy(&pool->lock);
    }
    mpt__host_free(ctx, pool);
    ctx->pool = NULL;
}

#if defined(__linux__) && !defined(MPT_NO_STDIO)
#include <stdio.h>
#endif

/* Processors that this process may run on, by its affinity where that is known */
#if defined(__linux__) && defined(MPT__POSIX)
MPT__SYSTEM(int, sched_getaffinity, (int process, size_t bytes, void *mask))
static long mpt__processors(void) {
    unsigned char mask[512] = {0};
    long count = 0;
    size_t i;
    if (mpt__sys_sched_getaffinity(0, sizeof mask, mask) != 0) return sysconf(_SC_NPROCESSORS_ONLN);
    for (i = 0; i < 8 * sizeof mask; i++) count += mask[i / 8] >> i % 8 & 1;
    return count;
}
#elif defined(_WIN32)
static long mpt__processors(void) { return pthread_num_processors_np(); } /* respects the affinity */
#else
static long mpt__processors(void) { return sysconf(_SC_NPROCESSORS_ONLN); }
#endif

/* How many processors' time a control group grants, rounded up, from its cpu.max: "150000 100000" gives 2; "max
   100000", no limit, gives 0. */
static long mpt__quota_of(const char *text) {
    long number[2] = {0, 0};
    int i;
    for (i = 0; i < 2; i++) {
        while (*text == ' ') text++;
        for (; *text >= '0' && *text <= '9' && number[i] < 0x7fffffff / 10; text++)
            number[i] = 10 * number[i] + (*text - '0');
    }
    if (number[0] <= 0 || number[1] <= 0) return 0;
    return (number[0] + number[1] - 1) / number[1];
}

/* The limit of a container, which sees its own group at this path; 0 if there is none, or it cannot be read. */
static long mpt__quota(void) {
    char text[64] = {0};
#if defined(__linux__) && !defined(MPT_NO_STDIO)
    FILE *file = fopen("/sys/fs/cgroup/cpu.max", "r");
    if (file && !fgets(text, sizeof text, file)) text[0] = 0;
    if (file) fclose(file);
#endif
    return mpt__quota_of(text);
}

static mpt_result mpt__threads_start(mpt_context *ctx) {
    mpt__threads *pool;
    if (ctx->threads == 0) {
        const long quota = mpt__quota(), processors = mpt__processors();
        const long online = quota > 0 && quota < processors ? quota : processors;
        ctx->threads = 1;
        if (online > 1) ctx->threads = (int)mpt__min((size_t)online, MPT__MAX_THREADS);
    }
    if (ctx->threads == 1) return MPT_OK;
    pool = ctx->pool = (mpt__threads *)mpt__host_alloc(ctx, sizeof *pool);
    if (!pool) return MPT_ERROR_NO_MEMORY;
    pool->process = mpt__process();
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->start, NULL);
    pthread_cond_init(&pool->done, NULL);
    for (; pool->started < ctx->threads - 1; pool->started++) {
        mpt__worker *worker = &pool->workers[pool->started];
        worker->pool = pool;
        worker->index = pool->started + 1;
        if (pthread_create(&worker->thread, NULL, mpt__threads_main, worker))
            return mpt_fail(ctx, MPT_ERROR_UNSUPPORTED, "open: thread %d of %d could not be started", worker->index,
                            ctx->threads);
    }
    return MPT_OK;
}

#endif

/* How many threads are worth waking, which takes some microseconds each. work: multiplications or element visits of the
   whole call, roughly */
static size_t mpt__threads_for(const mpt_context *ctx, size_t work) {
    return mpt__min(work / 65536, (size_t)ctx->threads);
}

static void mpt__parallel(mpt_context *ctx, size_t count, size_t work, mpt__task task, void *arg) {
    const size_t threads = mpt__min(count, mpt__threads_for(ctx, work));
    if (threads > 1) mpt__threads_do(ctx, count, (int)threads, task, arg);
    else if (count) task(arg, 0, count, 0);
}

/* ==== SIMD ====

   Bulk loops, once for each instruction set. Plain C is always compiled. The others give the same bits, except in
   products, whose sums they order and fuse in their own way. (AVX512-FP16 would not convert faster than F16C.) */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(MPT_NO_SIMD)
#define MPT__X86
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__GNUC__) && !defined(MPT_NO_SIMD)
#define MPT__ARM
#include <arm_neon.h>
#endif

#ifdef __GNUC__
#define MPT__INLINE static inline __attribute__((always_inline))
#define MPT__RESTRICT __restrict__
#else
#define MPT__INLINE static inline
#define MPT__RESTRICT
#endif

/* -- Plain C -- */

static void mpt__load_f16_plain(const uint16_t *src, size_t n, float *dst) {
    size_t i;
    for (i = 0; i < n; i++) dst[i] = mpt_widen(src[i], MPT_F16);
}

static void mpt__store_f16_plain(uint16_t *dst, size_t n, const float *src) {
    size_t i;
    for (i = 0; i < n; i++) dst[i] = mpt_f16_from_f32(src[i]).bits;
}

static void mpt__load_bf16_plain(const uint16_t *src, size_t n, float *dst) {
    size_t i;
    for (i = 0; i < n; i++) {
        const uint32_t u = (uint32_t)src[i] << 16;
        dst[i] = mpt__float(u | (uint32_t)((u & 0x7fffffffu) > 0x7f800000u) << 22); /* makes a NaN quiet */
    }
}

static void mpt__store_bf16_plain(uint16_t *dst, size_t n, const float *src) {
    size_t i;
    for (i = 0; i < n; i++) {
        const uint32_t u = mpt__bits(src[i]), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, nan = u >> 16 | 0x40u;
        dst[i] = (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
    }
}

static int mpt__squares_plain(const void *array, size_t n, double *lanes) {
    const float *x = (const float *)array;
    uint32_t bad = 0;
    size_t i, l;
    for (i = 0; i < n; i += MPT__LANES)
        for (l = 0; l < MPT__LANES; l++) {
            bad |= (uint32_t)!mpt__finite(x[i + l]);
            lanes[l] += (double)x[i + l] * (double)x[i + l]; /* exact products */
        }
    return bad != 0;
}

/* Element i of an array that may be absent: NULL stays NULL. */
MPT__INLINE float *mpt__floats_at(float *array, size_t i) { return array ? array + i : NULL; }

static void mpt__update_plain(const mpt__rates *rates, size_t n, float *p, const float *g, float *m, float *v,
                              float *largest) {
    size_t i;
    for (i = 0; i < n; i++)
        p[i] = mpt__update_element(rates, p[i], g[i], mpt__floats_at(m, i), mpt__floats_at(v, i),
                                   mpt__floats_at(largest, i));
}

enum { MPT__PLAIN_M = 4, MPT__PLAIN_N = 8 };

static void mpt__tile_plain(const mpt__left *left, size_t row, const float *b, size_t b_stride, float *sums,
                            size_t stride, int add) {
    float tile[MPT__PLAIN_M][MPT__PLAIN_N] = {{0}}, a;
    const char *rows[MPT__PLAIN_M];
    size_t r, d;
    int i, j;
    for (i = 0; i < MPT__PLAIN_M; i++) rows[i] = left->base + left->rows[row + (size_t)i];
    for (r = 0; r < left->count; r++)
        for (d = 0; d < left->length; d++, b += b_stride)
            for (i = 0; i < MPT__PLAIN_M; i++) {
                memcpy(&a, rows[i] + left->runs[r] + d * left->stride, sizeof a);
                for (j = 0; j < MPT__PLAIN_N; j++) tile[i][j] += a * b[j];
            }
    for (i = 0; i < MPT__PLAIN_M; i++, sums += stride)
        for (j = 0; j < MPT__PLAIN_N; j++) {
            if (add) tile[i][j] += sums[j];
            sums[j] = tile[i][j];
        }
}

static void mpt__pair_plain(const uint16_t *low, const uint16_t *high, size_t n, uint32_t *out) {
    size_t e;
    for (e = 0; e < n; e++) out[e] = low[e] | (uint32_t)high[e] << 16;
}

static void mpt__transpose_plain(const float *x, size_t stride, size_t depth, size_t n, float *panel) {
    size_t d, r;
    for (r = 0; r < n; r++)
        for (d = 0; d < depth; d++) panel[d * n + r] = x[r * stride + d];
}

static mpt__simd mpt__simd_plain(void) {
    mpt__simd s = MPT_ZERO;
    s.name = "plain";
    s.load_f16 = mpt__load_f16_plain;
    s.store_f16 = mpt__store_f16_plain;
    s.load_bf16 = mpt__load_bf16_plain;
    s.store_bf16 = mpt__store_bf16_plain;
    s.squares[MPT_F32] = mpt__squares_plain;
    s.update = mpt__update_plain;
    s.tile[0][0] = s.tile[0][1] = mpt__tile_plain;
    s.tile_m = MPT__PLAIN_M;
    s.tile_n = s.half_n = MPT__PLAIN_N;
    s.pair = mpt__pair_plain;
    s.transpose = mpt__transpose_plain;
    return s;
}

#ifdef MPT__X86

/* -- AVX2, FMA, F16C -- */

#define MPT__AVX2 __attribute__((target("avx2,fma,f16c")))

MPT__AVX2 static void mpt__load_f16_avx2(const uint16_t *src, size_t n, float *dst) {
    for (; n >= 8; n -= 8, src += 8, dst += 8)
        _mm256_storeu_ps(dst, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)src)));
    mpt__load_f16_plain(src, n, dst);
}

MPT__AVX2 static void mpt__store_f16_avx2(uint16_t *dst, size_t n, const float *src) {
    for (; n >= 8; n -= 8, src += 8, dst += 8)
        _mm_storeu_si128((__m128i *)(void *)dst, _mm256_cvtps_ph(_mm256_loadu_ps(src), _MM_FROUND_TO_NEAREST_INT));
    mpt__store_f16_plain(dst, n, src);
}

/* All ones where u is a NaN's bits. Compares integers, for -Ofast. */
MPT__AVX2 static inline __m256i mpt__nan8(__m256i u) {
    return _mm256_cmpgt_epi32(_mm256_and_si256(u, _mm256_set1_epi32(0x7fffffff)), _mm256_set1_epi32(0x7f800000));
}

MPT__AVX2 static void mpt__load_bf16_avx2(const uint16_t *src, size_t n, float *dst) {
    const __m256i quiet = _mm256_set1_epi32(0x400000);
    for (; n >= 8; n -= 8, src += 8, dst += 8) {
        const __m256i half = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)src));
        const __m256i u = _mm256_slli_epi32(half, 16);
        _mm256_storeu_si256((__m256i *)(void *)dst, _mm256_or_si256(u, _mm256_and_si256(mpt__nan8(u), quiet)));
    }
    mpt__load_bf16_plain(src, n, dst);
}

MPT__AVX2 static inline __m256i mpt__round_bf16x8(__m256i u) {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
}

/* Sixteen at a time, in plain C if one of them is NaN. */
MPT__AVX2 static void mpt__store_bf16_avx2(uint16_t *dst, size_t n, const float *src) {
    for (; n >= 16; n -= 16, src += 16, dst += 16) {
        const __m256i low = _mm256_loadu_si256((const __m256i *)(const void *)src);
        const __m256i high = _mm256_loadu_si256((const __m256i *)(const void *)(src + 8));
        const __m256i both = _mm256_packus_epi32(mpt__round_bf16x8(low), mpt__round_bf16x8(high));
        if (_mm256_movemask_epi8(_mm256_or_si256(mpt__nan8(low), mpt__nan8(high)))) mpt__store_bf16_plain(dst, 16, src);
        else _mm256_storeu_si256((__m256i *)(void *)dst, _mm256_permute4x64_epi64(both, 0xd8));
    }
    mpt__store_bf16_plain(dst, n, src);
}

/* MPT__EACH_6(X, with) is X(0, with) X(1, with) ... X(5, with): a loop over registers, one variable each, pasted by
   number. With an array and a loop instead, gcc -O2 keeps the sums in memory. */
#define MPT__EACH_6(X, with) X(0, with) X(1, with) X(2, with) X(3, with) X(4, with) X(5, with)
#define MPT__EACH_8(X, with) MPT__EACH_6(X, with) X(6, with) X(7, with)

/* Whether a lane is inf or NaN. One bad element makes its lane bad; finite elements cannot, because their squares are
   below 2^256. */
static int mpt__lanes_bad(const double *lanes) {
    int bad = 0, l;
    for (l = 0; l < MPT__LANES; l++) {
        uint64_t u;
        memcpy(&u, &lanes[l], sizeof u);
        bad |= (u >> 52 & 0x7ff) == 0x7ff;
    }
    return bad;
}

/* MPT__SQUARES generates a function of mpt__simd.squares for AVX2: three of them, 1.4 KB. FOUR(x) loads four elements
   as floats; sum<i> holds lanes 4 i .. 4 i + 3. Products are exact, so fusing them changes nothing. It prefetches
   because the long chains of additions keep the CPU from running ahead. */
#define MPT__SUM(i, FOUR) __m256d sum##i = _mm256_loadu_pd(lanes + 4 * i);
#define MPT__SQUARE(i, FOUR)              \
    v = _mm256_cvtps_pd(FOUR(x + 4 * i)); \
    sum##i = _mm256_fmadd_pd(v, v, sum##i);
#define MPT__KEEP_SUM(i, FOUR) _mm256_storeu_pd(lanes + 4 * i, sum##i);
#define MPT__SQUARES(name, type, FOUR)                                      \
    MPT__AVX2 static int name(const void *array, size_t n, double *lanes) { \
        const type *x = (const type *)array;                                \
        __m256d v;                                                          \
        MPT__EACH_8(MPT__SUM, FOUR)                                         \
        for (; n; n -= MPT__LANES, x += MPT__LANES) {                       \
            _mm_prefetch((const char *)x + 1024, _MM_HINT_T0);              \
            _mm_prefetch((const char *)x + 1088, _MM_HINT_T0);              \
            MPT__EACH_8(MPT__SQUARE, FOUR)                                  \
        }                                                                   \
        MPT__EACH_8(MPT__KEEP_SUM, FOUR)                                    \
        return mpt__lanes_bad(lanes);                                       \
    }
#define MPT__FOUR_16(x) _mm_loadl_epi64((const __m128i *)(const void *)(x))
#define MPT__FOUR_BF16(x) _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(MPT__FOUR_16(x)), 16))
#define MPT__FOUR_F16(x) _mm_cvtph_ps(MPT__FOUR_16(x))
MPT__SQUARES(mpt__squares_f32_avx2, float, _mm_loadu_ps)
MPT__SQUARES(mpt__squares_f16_avx2, uint16_t, MPT__FOUR_F16)
MPT__SQUARES(mpt__squares_bf16_avx2, uint16_t, MPT__FOUR_BF16)

/* Operations that no compiler flag changes: a product that is neither fused nor reordered; a quotient and a root that
   -Ofast does not approximate. */
MPT__AVX2 static inline __m256 mpt__mul8(__m256 a, __m256 b) {
    __m256 r = _mm256_mul_ps(a, b);
    __asm__("" : "+x"(r));
    return r;
}

MPT__AVX2 static inline __m256 mpt__div8(__m256 a, __m256 b) {
    __m256 r;
    __asm__("vdivps {%2, %1, %0|%0, %1, %2}" : "=x"(r) : "x"(a), "x"(b));
    return r;
}

MPT__AVX2 static inline __m256 mpt__sqrt8(__m256 a) {
    __m256 r;
    __asm__("vsqrtps {%1, %0|%0, %1}" : "=x"(r) : "x"(a));
    return r;
}

/* mpt__flush, eight at a time */
MPT__AVX2 static inline __m256 mpt__flush8(__m256 x) {
    const __m256i exponent = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7f800000));
    const __m256i small = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
    return _mm256_andnot_ps(_mm256_castsi256_ps(small), x);
}

/* mpt__sgd_element, eight at a time */
MPT__AVX2 static inline __m256 mpt__sgd8(const mpt__rates *r, __m256 p, __m256 g, float *buffer) {
    if (r->decay != 0) g = _mm256_fmadd_ps(_mm256_set1_ps(r->decay), p, g);
    if (r->has_momentum) {
        const __m256 momentum = _mm256_set1_ps(r->momentum);
        const __m256 old = mpt__mul8(_mm256_loadu_ps(buffer), momentum);
        __m256 b = g;
        if (!r->first) b = _mm256_fmadd_ps(_mm256_set1_ps(r->undamped), g, old);
        b = mpt__flush8(b);
        _mm256_storeu_ps(buffer, b);
        if (r->nesterov) b = _mm256_fmadd_ps(momentum, b, g);
        g = b;
    }
    return _mm256_fmadd_ps(_mm256_set1_ps(-r->lr), g, p);
}

/* mpt__lerp, eight at a time */
MPT__AVX2 static inline __m256 mpt__lerp8(__m256 from, __m256 to, float share) {
    const __m256 distance = _mm256_sub_ps(to, from);
    if (share < 0.5f) return _mm256_fmadd_ps(_mm256_set1_ps(share), distance, from);
    return _mm256_fmadd_ps(_mm256_set1_ps(share - 1), distance, to);
}

/* mpt__adam_element, eight at a time */
MPT__AVX2 static inline __m256 mpt__adam8(const mpt__rates *r, __m256 p, __m256 g, float *m, float *v, float *largest) {
    __m256 first, square, denominator;
    if (r->kind == MPT_ADAMW) p = mpt__mul8(p, _mm256_set1_ps(r->decay));
    else if (r->decay != 0) g = _mm256_fmadd_ps(_mm256_set1_ps(r->decay), p, g);
    first = mpt__lerp8(_mm256_loadu_ps(m), g, r->lerp);
    square = mpt__mul8(_mm256_loadu_ps(v), _mm256_set1_ps(r->beta2));
    square = mpt__flush8(_mm256_fmadd_ps(mpt__mul8(_mm256_set1_ps(r->square), g), g, square));
    first = mpt__flush8(first);
    _mm256_storeu_ps(m, first);
    _mm256_storeu_ps(v, square);
    if (r->amsgrad) {
        square = _mm256_max_ps(square, _mm256_loadu_ps(largest));
        _mm256_storeu_ps(largest, square);
    }
    denominator = _mm256_add_ps(mpt__div8(mpt__sqrt8(square), _mm256_set1_ps(r->root)), _mm256_set1_ps(r->eps));
    return _mm256_add_ps(p, mpt__div8(mpt__mul8(_mm256_set1_ps(-r->step_size), first), denominator));
}

/* Updates as many elements as a multiple of eight allows, and returns their number. Inlined into each call, where some
   rates are constants. */
MPT__AVX2 __attribute__((always_inline)) static inline size_t
mpt__update8(const mpt__rates *r, size_t n, float *p, const float *g, float *m, float *v, float *largest) {
    const __m256 limit = _mm256_set1_ps(r->clip_value), zero = _mm256_setzero_ps();
    size_t i;
    for (i = 0; i + 8 <= n; i += 8) {
        __m256 x = mpt__mul8(_mm256_loadu_ps(g + i), _mm256_set1_ps(r->inv_scale)), w = _mm256_loadu_ps(p + i);
        if (r->clip != 1) x = mpt__mul8(x, _mm256_set1_ps(r->clip));
        if (r->clip_value > 0) x = _mm256_max_ps(_mm256_min_ps(x, limit), _mm256_sub_ps(zero, limit));
        if (r->maximize) x = _mm256_xor_ps(x, _mm256_set1_ps(-0.0f));
        if (r->kind == MPT_SGD) w = mpt__sgd8(r, w, x, mpt__floats_at(m, i));
        else w = mpt__adam8(r, w, x, m + i, v + i, mpt__floats_at(largest, i));
        _mm256_storeu_ps(p + i, w);
    }
    return i;
}

/* Works on a copy of the rates that no store can change; otherwise each would be read again after every store. Options
   that most steps do not use are set to constants in the copy, so that the loop has no branches. */
MPT__AVX2 static void mpt__update_avx2(const mpt__rates *rates, size_t n, float *p, const float *g, float *m, float *v,
                                       float *largest) {
    mpt__rates r = *rates;
    const int clips = r.clip != 1 || r.clip_value > 0 || r.decay != 0;
    size_t i;
    if (clips || r.maximize || r.first || r.nesterov || r.amsgrad) i = mpt__update8(&r, n, p, g, m, v, largest);
    else {
        r.clip = 1;
        r.clip_value = r.decay = 0;
        r.maximize = r.first = r.nesterov = r.amsgrad = 0;
        if (r.kind == MPT_SGD && r.has_momentum) {
            r.kind = MPT_SGD;
            r.has_momentum = 1;
            i = mpt__update8(&r, n, p, g, m, NULL, NULL);
        } else i = mpt__update8(&r, n, p, g, m, v, NULL);
    }
    mpt__update_plain(rates, n - i, p + i, g + i, mpt__floats_at(m, i), mpt__floats_at(v, i),
                      mpt__floats_at(largest, i));
}

/* MPT__TILE generates a kernel of mpt__simd.tile: AVX2 6 rows by 16 columns, AVX-512 8 by 32, the same on pairs of bf16
   (vdpbf16ps, which treats subnormals as zeros), and each once more for half as many columns. Six functions, 7 KB.

   EACH is MPT__EACH_6 or MPT__EACH_8 and pastes a line for each row; V is _mm256 or _mm512; VECTORS is 2, or 1 for half
   a tile. Row i's sums stay in the registers left<i> and right<i>. For each word of the depth a kernel loads the
   panel's vectors left and right, and by FMA adds the word of row i times them. A word may lie at an odd multiple of
   two bytes. Four copies of the loop's body are 4 to 8 % faster if each word of a row is in another cache line. */
#if defined(__CUDACC__) || (__GNUC__ < 8 && !defined(__clang__)) /* do not know the pragma */
#define MPT__UNROLL_4
#else
#define MPT__UNROLL_4 _Pragma("GCC unroll 4")
#endif
typedef __m256 mpt__vector_mm256;
typedef float mpt__unaligned __attribute__((may_alias, aligned(1)));
#define MPT__TILE(name, target, EACH, FMA, V, VECTORS)                                                     \
    target static void name(const mpt__left *l, size_t row, const float *b, size_t b_stride, float *sums,  \
                            size_t stride, int add) {                                                      \
        enum { WIDTH = sizeof(mpt__vector##V) / sizeof *b, two = VECTORS == 2 };                           \
        const size_t word = l->stride;                                                                     \
        size_t r, d, end;                                                                                  \
        EACH(MPT__TILE_ROW, V)                                                                             \
        for (r = 0; r < l->count; r++) {                                                                   \
            d = l->runs[r];                                                                                \
            end = d + l->length * word;                                                                    \
            MPT__UNROLL_4 for (; d < end; d += word, b += b_stride) {                                      \
                const mpt__vector##V left = V##_loadu_ps(b), right = two ? V##_loadu_ps(b + WIDTH) : left; \
                EACH(FMA, V)                                                                               \
            }                                                                                              \
        }                                                                                                  \
        EACH(MPT__TILE_KEEP, V)                                                                            \
    }
#define MPT__TILE_ROW(i, V)                        \
    const char *a##i = l->base + l->rows[row + i]; \
    mpt__vector##V left##i = V##_setzero_ps(), right##i = left##i;
#define MPT__TILE_WORD(i, V) V##_set1_ps(*(const mpt__unaligned *)(const void *)(a##i + d))
#define MPT__TILE_FLOATS(i, V)                                \
    {                                                         \
        const mpt__vector##V x = MPT__TILE_WORD(i, V);        \
        left##i = V##_fmadd_ps(x, left, left##i);             \
        if (two) right##i = V##_fmadd_ps(x, right, right##i); \
    }
#define MPT__TILE_PAIRS(i, V)                                            \
    {                                                                    \
        const __m512bh x = (__m512bh)MPT__TILE_WORD(i, V);               \
        left##i = V##_dpbf16_ps(left##i, x, (__m512bh)left);             \
        if (two) right##i = V##_dpbf16_ps(right##i, x, (__m512bh)right); \
    }
#define MPT__TILE_KEEP(i, V)                                                     \
    if (add) left##i = V##_add_ps(V##_loadu_ps(sums), left##i);                  \
    V##_storeu_ps(sums, left##i);                                                \
    if (two && add) right##i = V##_add_ps(V##_loadu_ps(sums + WIDTH), right##i); \
    if (two) V##_storeu_ps(sums + WIDTH, right##i);                              \
    sums += stride;
MPT__TILE(mpt__tile_avx2, MPT__AVX2, MPT__EACH_6, MPT__TILE_FLOATS, _mm256, 2)
MPT__TILE(mpt__half_avx2, MPT__AVX2, MPT__EACH_6, MPT__TILE_FLOATS, _mm256, 1)

MPT__AVX2 static void mpt__pair_avx2(const uint16_t *low, const uint16_t *high, size_t n, uint32_t *out) {
    for (; n >= 16; n -= 16, low += 16, high += 16, out += 16) {
        const __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)low);
        const __m256i y = _mm256_loadu_si256((const __m256i *)(const void *)high);
        const __m256i a = _mm256_unpacklo_epi16(x, y), b = _mm256_unpackhi_epi16(x, y);
        _mm256_storeu_si256((__m256i *)(void *)out, _mm256_permute2x128_si256(a, b, 0x20));
        _mm256_storeu_si256((__m256i *)(void *)(out + 8), _mm256_permute2x128_si256(a, b, 0x31));
    }
    mpt__pair_plain(low, high, n, out);
}

/* panel(4,8) = the transpose of x(8,4); rows are n and `stride` apart. A vector holds rows i and i + 4 of x, one in
   each half, so that no shuffle has to cross the halves. */
MPT__AVX2 static inline void mpt__transpose_8x4_avx2(const float *x, size_t stride, size_t n, float *panel) {
    __m256 rows[4], low[2], high[2];
    size_t i;
    for (i = 0; i < 4; i++) {
        const __m128 row = _mm_loadu_ps(x + i * stride), fourth = _mm_loadu_ps(x + (i + 4) * stride);
        rows[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(row), fourth, 1);
    }
    for (i = 0; i < 2; i++) {
        low[i] = _mm256_unpacklo_ps(rows[i], rows[i + 2]);
        high[i] = _mm256_unpackhi_ps(rows[i], rows[i + 2]);
    }
    _mm256_storeu_ps(panel, _mm256_unpacklo_ps(low[0], low[1]));
    _mm256_storeu_ps(panel + n, _mm256_unpackhi_ps(low[0], low[1]));
    _mm256_storeu_ps(panel + 2 * n, _mm256_unpacklo_ps(high[0], high[1]));
    _mm256_storeu_ps(panel + 3 * n, _mm256_unpackhi_ps(high[0], high[1]));
}

/* Takes 16 words of all rows, so that each cache line is read once, and prefetches the words 32 further on: the rows
   lie so far apart that the CPU does not do it by itself. */
MPT__AVX2 static void mpt__transpose_avx2(const float *x, size_t stride, size_t depth, size_t n, float *panel) {
    const size_t whole = depth / 4 * 4;
    size_t begin, d, r;
    for (begin = 0; begin < whole; begin += 16) {
        const float *ahead = x + mpt__min(begin + 32, depth - 1);
        for (r = 0; r < n; r++) _mm_prefetch((const char *)(ahead + r * stride), _MM_HINT_T0);
        for (r = 0; r < n; r += 8)
            for (d = begin; d < mpt__min(begin + 16, whole); d += 4)
                mpt__transpose_8x4_avx2(x + r * stride + d, stride, n, panel + d * n + r);
    }
    for (r = 0; r < n; r++)
        for (d = whole; d < depth; d++) memcpy(panel + d * n + r, x + r * stride + d, sizeof *panel);
}

static mpt__simd mpt__simd_avx2(void) {
    mpt__simd s = MPT_ZERO;
    s.name = "avx2";
    s.load_f16 = mpt__load_f16_avx2;
    s.store_f16 = mpt__store_f16_avx2;
    s.load_bf16 = mpt__load_bf16_avx2;
    s.store_bf16 = mpt__store_bf16_avx2;
    s.squares[MPT_F32] = mpt__squares_f32_avx2;
    s.squares[MPT_F16] = mpt__squares_f16_avx2;
    s.squares[MPT_BF16] = mpt__squares_bf16_avx2;
    s.update = mpt__update_avx2;
    s.tile[0][0] = mpt__tile_avx2;
    s.tile[0][1] = mpt__half_avx2;
    s.tile_m = 6;
    s.tile_n = 16;
    s.half_n = 8;
    s.pair = mpt__pair_avx2;
    s.transpose = mpt__transpose_avx2;
    s.avx2 = 1;
    return s;
}

/* -- AVX-512: wider casts and tiles; the rest as with AVX2 -- */

#define MPT__AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#define MPT__AVX512_BF16 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

MPT__AVX512 static void mpt__load_f16_avx512(const uint16_t *src, size_t n, float *dst) {
    for (; n >= 16; n -= 16, src += 16, dst += 16)
        _mm512_storeu_ps(dst, _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i *)(const void *)src)));
    mpt__load_f16_plain(src, n, dst);
}

MPT__AVX512 static void mpt__store_f16_avx512(uint16_t *dst, size_t n, const float *src) {
    for (; n >= 16; n -= 16, src += 16, dst += 16)
        _mm256_storeu_si256((__m256i *)(void *)dst,
                            _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(src), _MM_FROUND_TO_NEAREST_INT));
    mpt__store_f16_plain(dst, n, src);
}

/* Rounded to bf16, in the upper half of each word */
MPT__AVX512 static inline __m512i mpt__round_bf16x16(__m512i u) {
    const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(0xffff, u, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan =
        _mm512_cmpgt_epi32_mask(_mm512_and_si512(u, _mm512_set1_epi32(0x7fffffff)), _mm512_set1_epi32(0x7f800000));
    return _mm512_mask_or_epi32(sum, nan, u, _mm512_set1_epi32(0x400000));
}

MPT__AVX512 static void mpt__store_bf16_avx512(uint16_t *dst, size_t n, const float *src) {
    static const uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                       33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i halves = _mm512_loadu_si512((const void *)upper);
    for (; n >= 32; n -= 32, src += 32, dst += 32)
        _mm512_storeu_si512(
            (void *)dst, _mm512_permutex2var_epi16(mpt__round_bf16x16(_mm512_loadu_si512((const void *)src)), halves,
                                                   mpt__round_bf16x16(_mm512_loadu_si512((const void *)(src + 16)))));
    mpt__store_bf16_avx2(dst, n, src);
}

MPT__AVX512 static void mpt__load_bf16_avx512(const uint16_t *src, size_t n, float *dst) {
    for (; n >= 16; n -= 16, src += 16, dst += 16) {
        const __m256i half = _mm256_loadu_si256((const __m256i *)(const void *)src);
        const __m512i u = _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, half), 16);
        const __mmask16 nan =
            _mm512_cmpgt_epi32_mask(_mm512_and_si512(u, _mm512_set1_epi32(0x7fffffff)), _mm512_set1_epi32(0x7f800000));
        _mm512_storeu_si512((void *)dst, _mm512_mask_or_epi32(u, nan, u, _mm512_set1_epi32(0x400000)));
    }
    mpt__load_bf16_avx2(src, n, dst);
}

/* vcvtne2ps2bf16 treats subnormals as zeros: blocks with a subnormal are converted by integer operations. */
MPT__AVX512_BF16 static void mpt__store_bf16_native(uint16_t *dst, size_t n, const float *src) {
    const __m512i one = _mm512_set1_epi32(1), least = _mm512_set1_epi32(0x00fffffe);
    for (; n >= 32; n -= 32, src += 32, dst += 32) {
        const __m512i low = _mm512_loadu_si512((const void *)src), high = _mm512_loadu_si512((const void *)(src + 16));
        const __m512i a = _mm512_sub_epi32(_mm512_add_epi32(low, low), one);
        const __m512i b = _mm512_sub_epi32(_mm512_add_epi32(high, high), one);
        const __mmask16 rare = _mm512_cmple_epu32_mask(a, least) | _mm512_cmple_epu32_mask(b, least);
        if (rare) mpt__store_bf16_avx2(dst, 32, src);
        else _mm512_storeu_si512((void *)dst, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    }
    mpt__store_bf16_avx2(dst, n, src);
}

/* MPT__SQUARES for AVX-512: three functions, 1 KB. EIGHT(x) loads eight elements; sum<i> holds lanes 8 i .. 8 i + 7. */
#define MPT__EACH_4(X, with) X(0, with) X(1, with) X(2, with) X(3, with)
#define MPT__SUM_8(i, EIGHT) __m512d sum##i = _mm512_loadu_pd(lanes + 8 * i);
#define MPT__SQUARE_8(i, EIGHT)                        \
    v = _mm512_maskz_cvtps_pd(0xff, EIGHT(x + 8 * i)); \
    sum##i = _mm512_fmadd_pd(v, v, sum##i);
#define MPT__KEEP_SUM_8(i, EIGHT) _mm512_storeu_pd(lanes + 8 * i, sum##i);
#define MPT__SQUARES_8(name, type, EIGHT)                                     \
    MPT__AVX512 static int name(const void *array, size_t n, double *lanes) { \
        const type *x = (const type *)array;                                  \
        __m512d v;                                                            \
        MPT__EACH_4(MPT__SUM_8, EIGHT)                                        \
        for (; n; n -= MPT__LANES, x += MPT__LANES) {                         \
            _mm_prefetch((const char *)x + 1024, _MM_HINT_T0);                \
            _mm_prefetch((const char *)x + 1088, _MM_HINT_T0);                \
            MPT__EACH_4(MPT__SQUARE_8, EIGHT)                                 \
        }                                                                     \
        MPT__EACH_4(MPT__KEEP_SUM_8, EIGHT)                                   \
        return mpt__lanes_bad(lanes);                                         \
    }
#define MPT__EIGHT_16(x) _mm_loadu_si128((const __m128i *)(const void *)(x))
#define MPT__EIGHT_BF16(x) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(MPT__EIGHT_16(x)), 16))
#define MPT__EIGHT_F16(x) _mm256_cvtph_ps(MPT__EIGHT_16(x))
MPT__SQUARES_8(mpt__squares_f32_avx512, float, _mm256_loadu_ps)
MPT__SQUARES_8(mpt__squares_f16_avx512, uint16_t, MPT__EIGHT_F16)
MPT__SQUARES_8(mpt__squares_bf16_avx512, uint16_t, MPT__EIGHT_BF16)

typedef __m512 mpt__vector_mm512;
MPT__TILE(mpt__tile_avx512, MPT__AVX512, MPT__EACH_8, MPT__TILE_FLOATS, _mm512, 2)
MPT__TILE(mpt__half_avx512, MPT__AVX512, MPT__EACH_8, MPT__TILE_FLOATS, _mm512, 1)
MPT__TILE(mpt__pairs_avx512, MPT__AVX512_BF16, MPT__EACH_8, MPT__TILE_PAIRS, _mm512, 2)
MPT__TILE(mpt__half_pairs_avx512, MPT__AVX512_BF16, MPT__EACH_8, MPT__TILE_PAIRS, _mm512, 1)

static int mpt__cpu_has_bf16(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

/* Whether products of bf16 pairs are faster than those of the same numbers widened to fp32. In a cycle AMD's CPUs do
   twice the operations of fp32 in bf16 pairs (measured on Zen 4), and Intel's do half (measured on Emerald Rapids). */
static int mpt__cpu_has_fast_pairs(void) {
    const unsigned genu = 0x756e6547; /* of GenuineIntel */
    unsigned a, b, c, d;
    return mpt__cpu_has_bf16() && __get_cpuid(0, &a, &b, &c, &d) && b != genu;
}

static mpt__simd mpt__simd_avx512(void) {
    mpt__simd s = mpt__simd_avx2();
    s.name = "avx512";
    s.load_f16 = mpt__load_f16_avx512;
    s.store_f16 = mpt__store_f16_avx512;
    s.load_bf16 = mpt__load_bf16_avx512;
    s.store_bf16 = mpt__store_bf16_avx512;
    s.squares[MPT_F32] = mpt__squares_f32_avx512;
    s.squares[MPT_F16] = mpt__squares_f16_avx512;
    s.squares[MPT_BF16] = mpt__squares_bf16_avx512;
    s.tile[0][0] = mpt__tile_avx512;
    s.tile[0][1] = mpt__half_avx512;
    s.tile_m = 8;
    s.tile_n = 32;
    s.half_n = 16;
    if (mpt__cpu_has_bf16()) s.store_bf16 = mpt__store_bf16_native;
    if (mpt__cpu_has_fast_pairs()) {
        s.tile[1][0] = mpt__pairs_avx512;
        s.tile[1][1] = mpt__half_pairs_avx512;
    }
    return s;
}

/* The register states that the operating system saves: bits 1, 2 for AVX, and 5, 6, 7 for AVX-512 */
static unsigned mpt__saved_states(void) {
    unsigned low;
    __asm__ volatile("xgetbv" : "=a"(low) : "c"(0) : "edx");
    return low;
}

static mpt_isa mpt__cpu_isa(void) {
    const unsigned fma = 1u << 12, osxsave = 1u << 27, f16c = 1u << 29;                /* leaf 1, ecx */
    const unsigned avx2 = 1u << 5, avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* leaf 7, ebx: F DQ BW VL */
    unsigned a, b, c, d, states;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & (fma | osxsave | f16c)) != (fma | osxsave | f16c)) return MPT_ISA_PLAIN;
    states = mpt__saved_states();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & avx2) || (states & 0x6) != 0x6) return MPT_ISA_PLAIN;
    if ((b & avx512) != avx512 || (states & 0xe6) != 0xe6) return MPT_ISA_AVX2;
    return MPT_ISA_AVX512;
}

#elif defined(MPT__ARM)

/* -- NEON: part of every aarch64; only fp16 needs more than the compiler's own vectors -- */

static void mpt__load_f16_neon(const uint16_t *src, size_t n, float *dst) {
    for (; n >= 4; n -= 4, src += 4, dst += 4) vst1q_f32(dst, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(src))));
    mpt__load_f16_plain(src, n, dst);
}

static void mpt__store_f16_neon(uint16_t *dst, size_t n, const float *src) {
    for (; n >= 4; n -= 4, src += 4, dst += 4) vst1_u16(dst, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(src))));
    mpt__store_f16_plain(dst, n, src);
}

static mpt__simd mpt__simd_neon(void) {
    mpt__simd s = mpt__simd_plain();
    s.name = "neon";
    s.load_f16 = mpt__load_f16_neon;
    s.store_f16 = mpt__store_f16_neon;
    return s;
}

static mpt_isa mpt__cpu_isa(void) { return MPT_ISA_NEON; }

#else

static mpt_isa mpt__cpu_isa(void) { return MPT_ISA_PLAIN; }

#endif

/* The loops of an instruction set; 0 if this CPU or this build does not have it. */
static int mpt__simd_of(mpt_isa isa, mpt__simd *out) {
    const mpt_isa best = mpt__cpu_isa();
    *out = mpt__simd_plain();
    if (isa == MPT_ISA_BEST) isa = best;
    if (isa == MPT_ISA_PLAIN) return 1;
#ifdef MPT__X86
    if (isa > best) return 0;
    if (isa == MPT_ISA_AVX2) *out = mpt__simd_avx2();
    else *out = mpt__simd_avx512();
    return isa <= MPT_ISA_AVX512;
#elif defined(MPT__ARM)
    *out = mpt__simd_neon();
    return isa == MPT_ISA_NEON;
#else
    return 0;
#endif
}

/* -- Arrays in fp32 -- */

MPT_DEF size_t mpt_dtype_size(mpt_dtype type) {
    static const unsigned char sizes[MPT_DTYPE_COUNT] = {4, 2, 2, 1, 1};
    if ((unsigned)type >= MPT_DTYPE_COUNT) return 0;
    return sizes[type];
}

MPT_DEF const char *mpt_dtype_name(mpt_dtype type) {
    static const char names[MPT_DTYPE_COUNT][5] = {"f32", "f16", "bf16", "e4m3", "e5m2"};
    if ((unsigned)type >= MPT_DTYPE_COUNT) return "unknown type";
    return names[type];
}

/* dst(n) = a[i..i+n) as fp32 */
static void mpt__load(const mpt_context *ctx, mpt_array a, size_t i, size_t n, float *dst) {
    const uint8_t *byte = (const uint8_t *)a.data + i;
    size_t j;
    switch (a.type) {
    case MPT_F32: memcpy(dst, (const float *)a.data + i, n * sizeof *dst); break;
    case MPT_F16: ctx->simd.load_f16((const uint16_t *)a.data + i, n, dst); break;
    case MPT_BF16: ctx->simd.load_bf16((const uint16_t *)a.data + i, n, dst); break;
    default:
        for (j = 0; j < n; j++) dst[j] = mpt_widen(byte[j], a.type);
    }
}

/* a[i..i+n) = src(n), rounded to nearest even */
static void mpt__store(const mpt_context *ctx, mpt_array a, size_t i, size_t n, const float *src) {
    uint8_t *byte = (uint8_t *)a.data + i;
    size_t j;
    switch (a.type) {
    case MPT_F32: memcpy((float *)a.data + i, src, n * sizeof *src); break;
    case MPT_F16: ctx->simd.store_f16((uint16_t *)a.data + i, n, src); break;
    case MPT_BF16: ctx->simd.store_bf16((uint16_t *)a.data + i, n, src); break;
    default:
        for (j = 0; j < n; j++) byte[j] = (uint8_t)mpt_narrow(src[j], a.type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0);
    }
}

/* -- Runs: MPT__RUN elements, a constant count, so that compilers vectorise these loops --

   A run is read in place if possible, else from a copy in `room`. An unnecessary copy would cost more than its
   instructions: loading a vector whose halves were just stored separately stalls. */

static const float mpt__zeros[MPT__RUN] = {0};

/* A signalling NaN stays one: the arithmetic or rounding that follows makes it quiet. */
MPT__INLINE void mpt__widen_run(const uint16_t *MPT__RESTRICT x, float *MPT__RESTRICT out) {
    size_t e;
    for (e = 0; e < MPT__RUN; e++) out[e] = mpt__float((uint32_t)x[e] << 16);
}

MPT__INLINE void mpt__narrow_run(const float *MPT__RESTRICT x, uint16_t *MPT__RESTRICT out) {
    size_t e;
    for (e = 0; e < MPT__RUN; e++) {
        const uint32_t u = mpt__bits(x[e]), nan = 0u - (uint32_t)((int32_t)(u & 0x7fffffffu) > 0x7f800000);
        out[e] = (uint16_t)((((u + 0x7fffu + ((u >> 16) & 1u)) & ~nan) | ((u | 0x400000u) & nan)) >> 16);
    }
}

/* Elements i .. i+n of a as fp32, filled up with zeros to a whole run */
MPT__INLINE const float *mpt__read_run(const mpt_context *ctx, mpt_array a, size_t i, size_t n, float *room) {
    if (a.type == MPT_F32 && n == MPT__RUN) return (const float *)a.data + i;
    if (a.type == MPT_BF16 && n == MPT__RUN) {
        mpt__widen_run((const uint16_t *)a.data + i, room);
        return room;
    }
    if (n < MPT__RUN) memset(room, 0, MPT__RUN * sizeof *room);
    mpt__load(ctx, a, i, n, room);
    return room;
}

MPT__INLINE void mpt__write_run(const mpt_context *ctx, mpt_array a, size_t i, size_t n, const float *x) {
    if (a.type == MPT_F32 && n == MPT__RUN) memcpy((float *)a.data + i, x, MPT__RUN * sizeof *x);
    else if (a.type == MPT_BF16 && n == MPT__RUN) mpt__narrow_run(x, (uint16_t *)a.data + i);
    else mpt__store(ctx, a, i, n, x);
}

/* out = factor x */
MPT__INLINE void mpt__scale_run(float *MPT__RESTRICT out, float factor, const float *MPT__RESTRICT x) {
    size_t e;
    for (e = 0; e < MPT__RUN; e++) out[e] = factor * x[e];
}

/* sum += factor x */
MPT__INLINE void mpt__axpy_run(float *MPT__RESTRICT sum, float factor, const float *MPT__RESTRICT x) {
    size_t e;
    for (e = 0; e < MPT__RUN; e++) sum[e] += factor * x[e];
}

/* sum += x y */
MPT__INLINE void mpt__mul_add_run(float *MPT__RESTRICT sum, const float *MPT__RESTRICT x,
                                  const float *MPT__RESTRICT y) {
    size_t e;
    for (e = 0; e < MPT__RUN; e++) sum[e] += x[e] * y[e];
}

/* A plain function: its time is in expf and its like. */
static void mpt__activate_other(mpt_activation act, float *x) {
    size_t e;
    for (e = 0; e < MPT__RUN; e++) x[e] = mpt__activate(act, x[e]);
}

MPT__INLINE void mpt__activate_run(mpt_activation act, float *x) {
    size_t e;
    if (act == MPT_RELU)
        for (e = 0; e < MPT__RUN; e++) x[e] = mpt__activate(MPT_RELU, x[e]);
    else if (act) mpt__activate_other(act, x);
}

/* dx = dy act'(saved) */
MPT__INLINE void mpt__gradient_run(mpt_activation act, float *MPT__RESTRICT dx, const float *MPT__RESTRICT saved,
                                   const float *MPT__RESTRICT dy) {
    size_t e;
    if (act == MPT_RELU)
        for (e = 0; e < MPT__RUN; e++) dx[e] = mpt__activate_backward(MPT_RELU, saved[e], dy[e]);
    else
        for (e = 0; e < MPT__RUN; e++) dx[e] = mpt__activate_backward(act, saved[e], dy[e]);
}

/* MPT__TASKS(NAME) compiles the inlined NAME_body into the task NAME for any CPU and, on x86, into NAME_avx2 (without
   fused multiply-adds, so both give the same bits): there the run loops are vectors of eight instead of four. MPT__TASK
   picks one. The nine AVX2 clones are 26 KB. By them max pooling, depthwise convolutions and batch norm gain about 30
   to 60 %, sums and ReLU of bf16 60 to 90 %, a product of depth 64 3 to 18 %. Tasks whose time is not spent in runs are
   plain functions. */
#define MPT__TASK_AS(target, task, body) \
    target static void task(void *arg, size_t begin, size_t end, int worker) { body(arg, begin, end, worker); }
#ifdef MPT__X86
#define MPT__TASKS(name)              \
    MPT__TASK_AS(, name, name##_body) \
    MPT__TASK_AS(__attribute__((target("avx2"))), name##_avx2, name##_body)
#define MPT__TASK(ctx, name) ((ctx)->simd.avx2 ? name##_avx2 : name)
#else
#define MPT__TASKS(name) MPT__TASK_AS(, name, name##_body)
#define MPT__TASK(ctx, name) name
#endif

static float mpt__get(const mpt_context *ctx, mpt_array a, size_t i) {
    float x;
    mpt__load(ctx, a, i, 1, &x);
    return x;
}

/* -- Opening -- */

static mpt_backend mpt__cpu_backend(void);
static void mpt__ref_backend(mpt_backend *backend);
static mpt_result mpt__cpu_workspace(mpt_context *ctx);

MPT_DEF void mpt_close(mpt_context *ctx) {
    mpt_context_desc desc;
    if (!ctx) return;
    if (ctx->backend.close) ctx->backend.close(ctx);
    mpt__threads_stop(ctx);
    mpt__host_free(ctx, ctx->workspace);
    desc = ctx->desc;
    mpt__desc_release(&desc, ctx, sizeof *ctx);
}

static mpt_context *mpt__open_failed(const mpt_context_desc *desc, const char *why) {
    if (desc->log) desc->log(MPT_LOG_ERROR, why, desc->user);
    return NULL;
}

MPT__COLD MPT_DEF mpt_context *mpt_open_backend(const mpt_context_desc *user, const mpt_backend *backend,
                                                void *device) {
    mpt_context_desc desc = MPT_ZERO;
    mpt_context *ctx;
    mpt__simd simd;
    if (user) desc = *user;
    if (!backend) return mpt__open_failed(&desc, "open: backend is NULL");
    if (!desc.alloc != !desc.release) return mpt__open_failed(&desc, "open: set both alloc and release, or neither");
    if ((unsigned)desc.isa >= MPT_ISA_COUNT || !mpt__simd_of(desc.isa, &simd))
        return mpt__open_failed(&desc, "open: isa is unknown, or not one of this CPU and this build");
    if (desc.threads < 0 || desc.threads > MPT__MAX_THREADS)
        return mpt__open_failed(&desc, "open: threads is not in 0..64");
    ctx = (mpt_context *)mpt__desc_alloc(&desc, sizeof *ctx);
    if (!ctx) return mpt__open_failed(&desc, "open: out of memory");
    memset(ctx, 0, sizeof *ctx);
    ctx->desc = desc;
    ctx->backend = *backend;
    ctx->device = device;
    ctx->simd = simd;
    ctx->threads = desc.threads;
    return ctx;
}

MPT_DEF mpt_context *mpt_open(const mpt_context_desc *desc) {
    mpt_backend backend = mpt__cpu_backend();
    mpt_context *ctx;
    char text[64];
    if (desc && desc->reference) mpt__ref_backend(&backend);
    ctx = mpt_open_backend(desc, &backend, NULL);
    if (!ctx) return NULL;
    if (mpt__threads_start(ctx) != MPT_OK || mpt__cpu_workspace(ctx) != MPT_OK) {
        mpt_close(ctx);
        return NULL;
    }
    mpt__print(text, sizeof text, "open: cpu, %s, %d threads", ctx->simd.name, ctx->threads);
    if (ctx->desc.log) ctx->desc.log(MPT_LOG_INFO, text, ctx->desc.user);
    return ctx;
}

MPT_DEF mpt_context_desc mpt_context_get_desc(const mpt_context *ctx) {
    mpt_context_desc desc = MPT_ZERO;
    if (ctx) desc = ctx->desc;
    return desc;
}

MPT_DEF void *mpt_context_device(const mpt_context *ctx) {
    if (!ctx) return NULL;
    return ctx->device;
}

MPT_DEF mpt_backend *mpt_context_backend(mpt_context *ctx) {
    if (!ctx) return NULL;
    return &ctx->backend;
}

MPT_DEF mpt_place mpt_context_place(const mpt_context *ctx) {
    mpt_place place = MPT_ZERO;
    if (ctx) place = ctx->place;
    return place;
}

MPT_DEF const char *mpt_isa_name(const mpt_context *ctx) {
    if (!ctx) return "none";
    return ctx->simd.name;
}

MPT_DEF const char *mpt_device_name(const mpt_context *ctx) {
    if (!ctx) return "none";
    return ctx->backend.name;
}

MPT_DEF int mpt_thread_count(const mpt_context *ctx) {
    if (!ctx) return 0;
    return (int)mpt__max((size_t)ctx->threads, 1); /* 0 where a device has no workers */
}

/* ==== CHECKS ====

   Arrays and operations: arguments are checked here, the backend does the work. */

static mpt_result mpt__need_any(mpt_context *ctx, const char *call, const char *name, mpt_array a) {
    if (!a.data) return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "%s: %s is NULL", call, name);
    if ((unsigned)a.type < MPT_DTYPE_COUNT) return MPT_OK;
    return mpt_fail(ctx, MPT_ERROR_TYPE, "%s: %s has the unknown type %d", call, name, (int)a.type);
}

/* An array that operations compute with: not fp8. */
static mpt_result mpt__need(mpt_context *ctx, const char *call, const char *name, mpt_array a) {
    MPT__TRY(mpt__need_any(ctx, call, name, a));
    if (a.type <= MPT_BF16) return MPT_OK;
    return mpt_fail(ctx, MPT_ERROR_TYPE, "%s: %s has type %s; f32, f16 and bf16 are allowed", call, name,
                    mpt_dtype_name(a.type));
}

/* The arrays of an operation on images: x and y, or dx and dy. */
static mpt_result mpt__need_images(mpt_context *ctx, const char *call, mpt_pass pass, mpt_array x, mpt_array y) {
    MPT__TRY(mpt__need(ctx, call, pass == MPT_BACKWARD_DATA ? "x (dx)" : "x", x));
    return mpt__need(ctx, call, pass == MPT_FORWARD ? "y" : "y (dy)", y);
}

static mpt_result mpt__need_act(mpt_context *ctx, const char *call, mpt_activation act) {
    if ((unsigned)act < MPT_ACTIVATION_COUNT) return MPT_OK;
    return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "%s: unknown activation %d", call, (int)act);
}

/* The bytes of an array of a x b x c x d elements must fit into size_t. */
static mpt_result mpt__need_size(mpt_context *ctx, const char *call, const char *name, size_t a, size_t b, size_t c,
                                 size_t d) {
    size_t n;
    if (mpt__size_mul(&n, a, b) && mpt__size_mul(&n, n, c) && mpt__size_mul(&n, n, d) && n <= (size_t)-1 / 16)
        return MPT_OK;
    return mpt_fail(ctx, MPT_ERROR_SHAPE, "%s: %s of %zu x %zu x %zu x %zu elements, whose bytes overflow size_t", call,
                    name, a, b, c, d);
}

static mpt_result mpt__need_context(mpt_context *ctx) {
    mpt__forget(ctx);
    if (ctx) return MPT_OK;
    return MPT_ERROR_ARGUMENT;
}

static mpt_result mpt__need_op(mpt_context *ctx, const char *call, const void *op) {
    MPT__TRY(mpt__need_context(ctx));
    if (op) return MPT_OK;
    return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "%s: op is NULL", call);
}

MPT_DEF mpt_result mpt_scale_array(mpt_context *ctx, size_t n, float factor, mpt_array x, mpt_scan *out) {
    MPT__TRY(mpt__need_context(ctx));
    if (n) MPT__TRY(mpt__need_any(ctx, "scan", "x", x));
    MPT__TRY(mpt__need_size(ctx, "scan", "x", n, 1, 1, 1));
    if (!out) return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "scan: out is NULL");
    return ctx->backend.scan(ctx, n, factor, x, out);
}

MPT_DEF mpt_result mpt_scan_array(mpt_context *ctx, size_t n, mpt_array x, mpt_scan *out) {
    return mpt_scale_array(ctx, n, 1, x, out);
}

MPT_DEF mpt_result mpt_histogram_add(mpt_context *ctx, size_t n, mpt_array x, mpt_histogram *h) {
    MPT__TRY(mpt__need_context(ctx));
    if (n) MPT__TRY(mpt__need_any(ctx, "histogram", "x", x));
    MPT__TRY(mpt__need_size(ctx, "histogram", "x", n, 1, 1, 1));
    if (!h) return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "histogram: h is NULL");
    return ctx->backend.histogram(ctx, n, x, h);
}

MPT_DEF mpt_result mpt_op_gemm(mpt_context *ctx, const mpt_gemm_op *user) {
    mpt_gemm_op op = MPT_ZERO;
    size_t a_rows, a_row, b_rows, b_row; /* number of rows, and elements of a row */
    MPT__TRY(mpt__need_op(ctx, "gemm", user));
    op = *user;
    if (!op.m || !op.n) return MPT_OK;
    a_rows = op.m;
    a_row = op.k;
    b_rows = op.k;
    b_row = op.n;
    if (op.trans_a) {
        a_rows = op.k;
        a_row = op.m;
    }
    if (op.trans_b) {
        b_rows = op.n;
        b_row = op.k;
    }
    if (!op.lda) op.lda = a_row;
    if (!op.ldb) op.ldb = b_row;
    if (!op.ldc) op.ldc = op.n;
    if (mpt__is_zero(op.alpha)) op.alpha = 1;
    MPT__TRY(mpt__need(ctx, "gemm", "a", op.a));
    MPT__TRY(mpt__need(ctx, "gemm", "b", op.b));
    MPT__TRY(mpt__need(ctx, "gemm", "c", op.c));
    if (op.bias.data) MPT__TRY(mpt__need(ctx, "gemm", "bias", op.bias));
    MPT__TRY(mpt__need_act(ctx, "gemm", op.act));
    if (op.lda < a_row || op.ldb < b_row || op.ldc < op.n)
        return mpt_fail(ctx, MPT_ERROR_SHAPE,
                        "gemm: lda %zu, ldb %zu or ldc %zu is shorter than its row (m %zu, n %zu, k %zu)", op.lda,
                        op.ldb, op.ldc, op.m, op.n, op.k);
    MPT__TRY(mpt__need_size(ctx, "gemm", "a", a_rows, op.lda, 1, 1));
    MPT__TRY(mpt__need_size(ctx, "gemm", "b", b_rows, op.ldb, 1, 1));
    MPT__TRY(mpt__need_size(ctx, "gemm", "c", op.m, op.ldc, 1, 1));
    if (op.a_sums.data) {
        MPT__TRY(mpt__need(ctx, "gemm", "a_sums", op.a_sums));
        if (!op.trans_a || op.lda != op.m)
            return mpt_fail(ctx, MPT_ERROR_SHAPE,
                            "gemm: a_sums needs trans_a (it is %d) and lda (%zu) equal to m (%zu)", op.trans_a, op.lda,
                            op.m);
    }
    return ctx->backend.gemm(ctx, &op);
}

enum { MPT__MOST = 0x7fffffff }; /* largest stride or dilation: its sum with a size cannot wrap */

/* Output positions of a window of `reach` along `size`: 0 if it does not fit even once. */
static size_t mpt__window_count(size_t size, size_t padding, size_t reach, size_t stride) {
    if (size + 2 * padding < reach) return 0;
    return (size + 2 * padding - reach) / stride + 1;
}

/* One axis of a convolution: `kernel` taps on `size` inputs. Returns 0 if that does not fit; else fills in the defaults
   and finds the number of outputs. */
static int mpt__conv2d_axis(size_t size, size_t kernel, int same, size_t *stride, size_t *padding, size_t *dilation,
                            size_t *outputs) {
    size_t reach;
    if (!*stride) *stride = 1;
    if (!*dilation) *dilation = 1;
    if (*stride > MPT__MOST || *dilation > MPT__MOST || *padding > (size_t)-1 / 64) return 0;
    if (!mpt__size_mul(&reach, *dilation, kernel - 1) || reach > (size_t)-1 / 4) return 0;
    if (!same) {
        *outputs = mpt__window_count(size, *padding, reach + 1, *stride);
        return *outputs > 0;
    }
    if (*stride > 1 || (*padding && *padding != reach / 2)) return 0;
    *padding = reach / 2;
    *outputs = size;
    return 1;
}

/* Checks the shape, fills in its defaults, and finds P and Q. */
static mpt_result mpt__conv2d_plan(mpt_context *ctx, const char *call, mpt_conv2d_op *op) {
    mpt_conv2d_shape *s = &op->shape;
    int fits_h, fits_w;
    if (!s->groups) s->groups = 1;
    if (!s->H || !s->W || !s->C || !s->K || !s->R || !s->S)
        return mpt_fail(ctx, MPT_ERROR_SHAPE, "%s: a size is 0 (H %zu, W %zu, C %zu, K %zu, R %zu, S %zu)", call, s->H,
                        s->W, s->C, s->K, s->R, s->S);
    if (s->C % s->groups || s->K % s->groups)
        return mpt_fail(ctx, MPT_ERROR_SHAPE, "%s: %zu groups do not divide %zu channels and %zu filters", call,
                        s->groups, s->C, s->K);
    MPT__TRY(mpt__need_size(ctx, call, "x", s->N, s->H, s->W, s->C));
    MPT__TRY(mpt__need_size(ctx, call, "w", s->K, s->R, s->S, s->C / s->groups));
    fits_h = mpt__conv2d_axis(s->H, s->R, s->same, &s->stride_h, &s->padding_h, &s->dilation_h, &op->P);
    fits_w = mpt__conv2d_axis(s->W, s->S, s->same, &s->stride_w, &s->padding_w, &s->dilation_w, &op->Q);
    if (!fits_h || !fits_w)
        return mpt_fail(
            ctx, MPT_ERROR_SHAPE,
            "%s: kernel %zux%zu, stride %zux%zu, dilation %zux%zu on a %zux%zu input with padding %zux%zu%s", call,
            s->R, s->S, s->stride_h, s->stride_w, s->dilation_h, s->dilation_w, s->H, s->W, s->padding_h, s->padding_w,
            s->same ? " and same" : "");
    MPT__TRY(mpt__need_size(ctx, call, "y", s->N, op->P, op->Q, s->K));
    return mpt__need_size(ctx, call, "taps", s->R, s->S, mpt__max(s->C, s->K), 1);
}

MPT_DEF mpt_result mpt_conv2d_output(mpt_context *ctx, const mpt_conv2d_shape *shape, size_t *P, size_t *Q) {
    mpt_conv2d_op op = MPT_ZERO;
    mpt_result r;
    if (P) *P = 0;
    if (Q) *Q = 0;
    if (!shape || !P || !Q) return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "conv2d_output: shape, P or Q is NULL");
    op.shape = *shape;
    r = mpt__conv2d_plan(ctx, "conv2d", &op);
    if (r != MPT_OK) return r;
    *P = op.P;
    *Q = op.Q;
    return MPT_OK;
}

MPT_DEF mpt_result mpt_op_conv2d(mpt_context *ctx, const mpt_conv2d_op *user) {
    mpt_conv2d_op op = MPT_ZERO;
    MPT__TRY(mpt__need_op(ctx, "conv2d", user));
    op = *user;
    if ((unsigned)op.pass > MPT_BACKWARD_WEIGHT)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "conv2d: unknown pass %d", (int)op.pass);
    MPT__TRY(mpt__conv2d_plan(ctx, "conv2d", &op));
    MPT__TRY(mpt__need_images(ctx, "conv2d", op.pass, op.x, op.y));
    MPT__TRY(mpt__need(ctx, "conv2d", op.pass == MPT_BACKWARD_WEIGHT ? "w (dw)" : "w", op.w));
    if (op.pass == MPT_BACKWARD_DATA) op.bias.data = NULL;
    if (op.bias.data) MPT__TRY(mpt__need(ctx, "conv2d", "bias", op.bias));
    MPT__TRY(mpt__need_act(ctx, "conv2d", op.act));
    if (op.act && op.pass != MPT_FORWARD)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "conv2d: activation %d in a backward pass", (int)op.act);
    return ctx->backend.conv2d(ctx, &op);
}

static mpt_result mpt__need_share(mpt_context *ctx, const char *call, const char *name, float x, int below_1) {
    if (mpt__finite(x) && x >= 0 && x <= 1 && !(below_1 && x >= 1)) return MPT_OK;
    return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "%s: %s %g is not in 0..1%s", call, name, (double)x,
                    below_1 ? ", 1 excluded" : "");
}

static mpt_result mpt__cast_check(mpt_context *ctx, const mpt_map_op *op) {
    MPT__TRY(mpt__need_any(ctx, "cast", "src", op->a));
    MPT__TRY(mpt__need_any(ctx, "cast", "dst", op->out));
    if ((unsigned)op->rounding.round <= MPT_ROUND_STOCHASTIC &&
        (unsigned)op->rounding.overflow <= MPT_OVERFLOW_SATURATE)
        return MPT_OK;
    return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "cast: unknown rounding %d or overflow %d", (int)op->rounding.round,
                    (int)op->rounding.overflow);
}

static mpt_result mpt__bytes_check(mpt_context *ctx, const mpt_map_op *op) {
    MPT__TRY(mpt__need(ctx, "map", "out", op->out));
    if (op->a.data && op->channels && op->C) return MPT_OK;
    return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "map: a or channels is NULL, or C (%zu) is 0", op->C);
}

static mpt_result mpt__map_check(mpt_context *ctx, const mpt_map_op *op) {
    if ((unsigned)op->map > MPT_MAP_BYTES)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "map: unknown map %d", (int)op->map);
    MPT__TRY(mpt__need_size(ctx, "map", "n", op->n, 1, 1, 1));
    if (op->map == MPT_MAP_CAST) return mpt__cast_check(ctx, op);
    if (op->map == MPT_MAP_BYTES) return mpt__bytes_check(ctx, op);
    MPT__TRY(mpt__need(ctx, "map", "a", op->a));
    if (op->map == MPT_MAP_ACTIVATION_GRADIENT || op->map == MPT_MAP_ADD) MPT__TRY(mpt__need(ctx, "map", "b", op->b));
    MPT__TRY(mpt__need(ctx, "map", "out", op->out));
    MPT__TRY(mpt__need_act(ctx, "map", op->act));
    if (!mpt__finite(op->negative_slope) || op->negative_slope < 0)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "map: negative_slope %g is not a finite number from 0 on",
                        (double)op->negative_slope);
    if (op->map == MPT_MAP_DROPOUT) return mpt__need_share(ctx, "map", "mask.p", op->mask.p, 1);
    return MPT_OK;
}

MPT_DEF mpt_result mpt_op_map(mpt_context *ctx, const mpt_map_op *op) {
    MPT__TRY(mpt__need_op(ctx, "map", op));
    if (!op->n) return MPT_OK;
    MPT__TRY(mpt__map_check(ctx, op));
    return ctx->backend.map(ctx, op);
}

MPT_DEF mpt_result mpt_cast(mpt_context *ctx, size_t n, mpt_array src, mpt_array dst, const mpt_rounding *rounding) {
    mpt_map_op op = MPT_ZERO; /* MPT_MAP_CAST */
    op.n = n;
    op.a = src;
    op.out = dst;
    if (rounding) op.rounding = *rounding;
    return mpt_op_map(ctx, &op);
}

MPT_DEF mpt_result mpt_op_columns(mpt_context *ctx, const mpt_columns_op *user) {
    mpt_columns_op op = MPT_ZERO;
    MPT__TRY(mpt__need_op(ctx, "columns", user));
    op = *user;
    if (!op.rows || !op.C) return MPT_OK;
    if (!op.x_stride) op.x_stride = op.C;
    if (!op.y_stride) op.y_stride = op.C;
    MPT__TRY(mpt__need(ctx, "columns", "x", op.x));
    MPT__TRY(mpt__need(ctx, "columns", "y", op.y));
    if (op.x_stride < op.C || op.y_stride < op.C)
        return mpt_fail(ctx, MPT_ERROR_SHAPE, "columns: x_stride %zu or y_stride %zu is shorter than C, %zu",
                        op.x_stride, op.y_stride, op.C);
    MPT__TRY(mpt__need_size(ctx, "columns", "x", op.rows, op.x_stride, 1, 1));
    MPT__TRY(mpt__need_size(ctx, "columns", "y", op.rows, op.y_stride, 1, 1));
    return ctx->backend.columns(ctx, &op);
}

MPT_DEF mpt_result mpt_op_broadcast(mpt_context *ctx, const mpt_broadcast_op *op) {
    const mpt_broadcast_shape *z;
    size_t height, width;
    MPT__TRY(mpt__need_op(ctx, "broadcast", op));
    z = &op->shape;
    if (op->pass != MPT_FORWARD && op->pass != MPT_BACKWARD_DATA)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "broadcast: pass %d", (int)op->pass);
    if (!z->R || !z->S) return mpt_fail(ctx, MPT_ERROR_SHAPE, "broadcast: a size is 0 (R %zu, S %zu)", z->R, z->S);
    if (!mpt__size_mul(&height, z->H, z->R) || !mpt__size_mul(&width, z->W, z->S))
        return mpt_fail(ctx, MPT_ERROR_SHAPE, "broadcast: %zu x %zu by %zu x %zu overflows size_t", z->H, z->W, z->R,
                        z->S);
    MPT__TRY(mpt__need_size(ctx, "broadcast", "y", z->N, height, width, z->C));
    if (!z->N || !z->H || !z->W || !z->C) return MPT_OK;
    MPT__TRY(mpt__need_images(ctx, "broadcast", op->pass, op->x, op->y));
    if (op->factor.data) MPT__TRY(mpt__need(ctx, "broadcast", "factor", op->factor));
    return ctx->backend.broadcast(ctx, op);
}

static mpt_result mpt__norm_shape_check(mpt_context *ctx, mpt_norm_pass pass, const mpt_norm_shape *s) {
    if (!mpt__finite(s->eps) || s->eps < 0)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "norm: eps %g is not a finite number above 0", (double)s->eps);
    if (!s->N || !s->pixels || !s->C || !s->groups || s->C % s->groups)
        return mpt_fail(ctx, MPT_ERROR_SHAPE,
                        "norm: a size is 0, or groups does not divide C (N %zu, pixels %zu, C %zu, groups %zu)", s->N,
                        s->pixels, s->C, s->groups);
    MPT__TRY(mpt__need_size(ctx, "norm", "x", s->N, s->pixels, s->C, 1));
    if (pass == MPT_NORM_RUNNING && s->pixels * (s->C / s->groups) < 2)
        return mpt_fail(ctx, MPT_ERROR_SHAPE, "norm: one value has no variance");
    return MPT_OK;
}

static mpt_result mpt__norm_forward_check(mpt_context *ctx, const mpt_norm_op *op) {
    MPT__TRY(mpt__need(ctx, "norm", "x", op->x));
    if (op->gamma.data) MPT__TRY(mpt__need(ctx, "norm", "gamma", op->gamma));
    if (op->beta.data) MPT__TRY(mpt__need(ctx, "norm", "beta", op->beta));
    MPT__TRY(mpt__need(ctx, "norm", "y", op->y));
    return mpt__need_act(ctx, "norm", op->act);
}

static mpt_result mpt__norm_backward_check(mpt_context *ctx, const mpt_norm_op *op) {
    MPT__TRY(mpt__need(ctx, "norm", "x", op->x));
    if (op->gamma.data) MPT__TRY(mpt__need(ctx, "norm", "gamma", op->gamma));
    MPT__TRY(mpt__need(ctx, "norm", "y (dy)", op->y));
    if (op->dx.data) MPT__TRY(mpt__need(ctx, "norm", "dx", op->dx));
    if (op->dgamma.data || op->dbeta.data) MPT__TRY(mpt__need(ctx, "norm", "dgamma", op->dgamma));
    if (op->dgamma.data || op->dbeta.data) MPT__TRY(mpt__need(ctx, "norm", "dbeta", op->dbeta));
    if (op->act == MPT_IDENTITY) return MPT_OK;
    if (op->act != MPT_RELU)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "norm: activation %d behind a backward pass; it may be ReLU (%d)",
                        (int)op->act, (int)MPT_RELU);
    MPT__TRY(mpt__need(ctx, "norm", "saved", op->saved));
    if (op->beta.data) return mpt__need(ctx, "norm", "beta", op->beta);
    return MPT_OK;
}

MPT_DEF mpt_result mpt_op_norm(mpt_context *ctx, const mpt_norm_op *user) {
    mpt_norm_op op = MPT_ZERO;
    MPT__TRY(mpt__need_op(ctx, "norm", user));
    op = *user;
    if (mpt__is_zero(op.shape.eps)) op.shape.eps = 1e-5f;
    if (!op.stats) return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "norm: stats is NULL");
    MPT__TRY(mpt__norm_shape_check(ctx, op.pass, &op.shape));
    switch (op.pass) {
    case MPT_NORM_STATS:
        MPT__TRY(mpt__need(ctx, "norm", "x", op.x));
        op.gamma.data = op.dx.data = NULL; /* other passes have them, and a backend may test them without the pass */
        break;
    case MPT_NORM_FORWARD: MPT__TRY(mpt__norm_forward_check(ctx, &op)); break;
    case MPT_NORM_BACKWARD: MPT__TRY(mpt__norm_backward_check(ctx, &op)); break;
    case MPT_NORM_RUNNING:
        MPT__TRY(mpt__need_share(ctx, "norm", "momentum", op.momentum, 0));
        if (!op.running) return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "norm: running is NULL");
        break;
    default: return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "norm: unknown pass %d", (int)op.pass);
    }
    return ctx->backend.norm(ctx, &op);
}

/* Checks the shape, fills in the strides, and finds P and Q. */
static mpt_result mpt__pool2d_plan(mpt_context *ctx, const char *call, mpt_pool2d_op *op) {
    mpt_pool2d_shape *s = &op->shape;
    if (!s->H || !s->W || !s->C || !s->R || !s->S)
        return mpt_fail(ctx, MPT_ERROR_SHAPE, "%s: a size is 0 (H %zu, W %zu, C %zu, R %zu, S %zu)", call, s->H, s->W,
                        s->C, s->R, s->S);
    MPT__TRY(mpt__need_size(ctx, call, "x", s->N, s->H, s->W, s->C));
    MPT__TRY(mpt__need_size(ctx, call, "window", s->R, s->S, 1, 1));
    if (!s->stride_h) s->stride_h = s->R;
    if (!s->stride_w) s->stride_w = s->S;
    if ((s->stride_h > MPT__MOST && s->stride_h != s->R) || (s->stride_w > MPT__MOST && s->stride_w != s->S))
        return mpt_fail(ctx, MPT_ERROR_SHAPE, "%s: stride %zux%zu is over 2^31 - 1", call, s->stride_h, s->stride_w);
    if (s->R > 65536 / s->S && (s->R / 3 > s->H || s->S / 3 > s->W))
        return mpt_fail(ctx, MPT_ERROR_SHAPE,
                        "%s: window %zux%zu of over 65536 elements on an image of %zux%zu, mostly padding", call, s->R,
                        s->S, s->H, s->W);
    if (s->padding_h > s->R / 2 || s->padding_w > s->S / 2)
        return mpt_fail(ctx, MPT_ERROR_SHAPE, "%s: padding %zux%zu is more than half the window %zux%zu", call,
                        s->padding_h, s->padding_w, s->R, s->S);
    op->P = mpt__window_count(s->H, s->padding_h, s->R, s->stride_h);
    op->Q = mpt__window_count(s->W, s->padding_w, s->S, s->stride_w);
    if (!op->P || !op->Q)
        return mpt_fail(ctx, MPT_ERROR_SHAPE, "%s: window %zux%zu on a %zux%zu input with padding %zux%zu", call, s->R,
                        s->S, s->H, s->W, s->padding_h, s->padding_w);
    if (op->kind == MPT_POOL_MAX && s->R > 65536 / s->S)
        return mpt_fail(ctx, MPT_ERROR_SHAPE, "%s: max window %zux%zu has more than 65536 elements", call, s->R, s->S);
    return mpt__need_size(ctx, call, "y", s->N, op->P, op->Q, s->C);
}

MPT_DEF mpt_result mpt_pool2d_output(mpt_context *ctx, const mpt_pool2d_shape *shape, size_t *P, size_t *Q) {
    mpt_pool2d_op op = MPT_ZERO;
    mpt_result r;
    if (P) *P = 0;
    if (Q) *Q = 0;
    if (!shape || !P || !Q) return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "pool2d_output: shape, P or Q is NULL");
    op.kind = MPT_POOL_AVERAGE;
    op.shape = *shape;
    r = mpt__pool2d_plan(ctx, "pool2d", &op);
    if (r != MPT_OK) return r;
    *P = op.P;
    *Q = op.Q;
    return MPT_OK;
}

MPT_DEF mpt_result mpt_op_pool2d(mpt_context *ctx, const mpt_pool2d_op *user) {
    mpt_pool2d_op op = MPT_ZERO;
    MPT__TRY(mpt__need_op(ctx, "pool2d", user));
    op = *user;
    if ((unsigned)op.kind > MPT_POOL_AVERAGE || (unsigned)op.pass > MPT_BACKWARD_DATA)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "pool2d: unknown kind %d or pass %d", (int)op.kind, (int)op.pass);
    MPT__TRY(mpt__pool2d_plan(ctx, "pool2d", &op));
    MPT__TRY(mpt__need_images(ctx, "pool2d", op.pass, op.x, op.y));
    if (op.kind == MPT_POOL_MAX && !op.index) return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "pool2d: index is NULL");
    return ctx->backend.pool2d(ctx, &op);
}

/* Fills in the defaults, and refuses options that this loss would ignore. */
static mpt_result mpt__loss_desc_check(mpt_context *ctx, const char *name, mpt_loss_kind kind, mpt_loss_desc *d) {
    const char *other = NULL;
    if (kind != MPT_LOSS_CROSS_ENTROPY && d->ignore) other = "ignore";
    if (kind != MPT_LOSS_CROSS_ENTROPY && d->probabilities) other = "probabilities";
    if (kind != MPT_LOSS_CROSS_ENTROPY && d->class_weights) other = "class_weights";
    if (kind != MPT_LOSS_CROSS_ENTROPY && !mpt__is_zero(d->label_smoothing)) other = "label_smoothing";
    if (kind != MPT_LOSS_BCE_WITH_LOGITS && d->pos_weight) other = "pos_weight";
    if (kind != MPT_LOSS_HUBER && !mpt__is_zero(d->delta)) other = "delta";
    if (other) return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "%s: %s is an option of another loss", name, other);
    if (d->probabilities && d->ignore)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "%s: ignore is for labels, and targets are probabilities", name);
    if (!mpt__finite(d->delta) || d->delta < 0)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "%s: delta %g is not a finite number above 0", name, (double)d->delta);
    if (kind == MPT_LOSS_HUBER && mpt__is_zero(d->delta)) d->delta = 1;
    return mpt__need_share(ctx, name, "label_smoothing", d->label_smoothing, 0);
}

MPT_DEF mpt_result mpt_op_loss(mpt_context *ctx, const mpt_loss_op *user) {
    mpt_loss_op op = MPT_ZERO;
    MPT__TRY(mpt__need_op(ctx, "loss", user));
    op = *user;
    if (mpt__is_zero(op.grad_scale)) op.grad_scale = 1;
    if ((unsigned)op.kind >= MPT_LOSS_KIND_COUNT)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "loss: unknown kind %d", (int)op.kind);
    MPT__TRY(mpt__need(ctx, "loss", "x", op.x));
    if (op.dx.data) MPT__TRY(mpt__need(ctx, "loss", "dx", op.dx));
    if (!op.target) return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "loss: target is NULL");
    if (!op.sum) return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "loss: sum is NULL");
    if (!op.C) return mpt_fail(ctx, MPT_ERROR_SHAPE, "loss: C is 0");
    MPT__TRY(mpt__loss_desc_check(ctx, "loss", op.kind, &op.desc));
    if (op.kind == MPT_LOSS_GRADIENT && op.sample_weights)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "loss: sample_weights of a gradient, which has no mean");
    if (!op.positions) op.positions = 1;
    MPT__TRY(mpt__need_size(ctx, "loss", "x", op.N, op.positions, op.C, 1));
    return ctx->backend.loss(ctx, &op);
}

/* ==== REFERENCE ====

   Every operation as the plain loop that defines it: shapes in a comment, then the loop. A context opened with
   desc.reference = 1 runs whole models with these loops, on one thread; "fast:" names the same operation in ENGINE.
   Tests compare ENGINE and CUDA with them, and a new backend starts from them. Sums are taken in double and rounded
   once, so their order does not matter. Losses, the check and the update are not here: ENGINE's are plain loops.

   Letters as everywhere: N batch, H W input, C channels, K filters, R S kernel, P Q output. */

/* Element i of an array. */
static double mpt__ref_get(mpt_array a, size_t i) {
    if (a.type == MPT_F32) return (double)((const float *)a.data)[i];
    if (mpt_dtype_size(a.type) == 2) return (double)mpt_widen(((const uint16_t *)a.data)[i], a.type);
    return (double)mpt_widen(((const uint8_t *)a.data)[i], a.type);
}

/* beta times element i; with beta 0 the element is not read, because it may not be initialised. */
static double mpt__ref_old(mpt_array a, size_t i, float beta) {
    if (beta == 0) return 0;
    return (double)beta * mpt__ref_get(a, i);
}

/* x rounded to fp32, then to the array's type; rounding NULL: to nearest */
static void mpt__ref_set(mpt_array a, size_t i, double x, const mpt_rounding *rounding) {
    mpt_rounding r = MPT_ZERO;
    uint32_t bits, random = 0;
    if (a.type == MPT_F32) {
        ((float *)a.data)[i] = (float)x;
        return;
    }
    if (rounding) r = *rounding;
    if (r.round == MPT_ROUND_STOCHASTIC) random = mpt_hash(r.seed, r.step, r.tensor, i);
    bits = mpt_narrow((float)x, a.type, r.round, r.overflow, random);
    if (mpt_dtype_size(a.type) == 2) ((uint16_t *)a.data)[i] = (uint16_t)bits;
    else ((uint8_t *)a.data)[i] = (uint8_t)bits;
}

/* out[i] = act(sum + beta out[i] + bias[channel]) */
static void mpt__ref_put(mpt_array out, size_t i, double sum, float beta, mpt_array bias, size_t channel,
                         mpt_activation act) {
    sum += mpt__ref_old(out, i, beta);
    if (bias.data) sum += mpt__ref_get(bias, channel);
    mpt__ref_set(out, i, (double)mpt__activate(act, (float)sum), NULL);
}

/* sums(C) = sums over the rows of x(rows,C) + beta sums. fast: mpt__column_sums */
static void mpt__ref_column_sums(size_t rows, size_t C, mpt_array x, float beta, mpt_array sums) {
    size_t row, c;
    for (c = 0; c < C; c++) {
        double sum = mpt__ref_old(sums, c, beta);
        for (row = 0; row < rows; row++) sum += mpt__ref_get(x, row * C + c);
        mpt__ref_set(sums, c, sum, NULL);
    }
}

/* c(m,n) = act(alpha op(a)(m,k) op(b)(k,n) + beta c + bias(n)); rows of a, b, c are lda, ldb, ldc apart. First
   a_sums(m), the column sums of a(k,m), if asked for. fast: mpt__cpu_gemm */
static mpt_result mpt__ref_gemm(mpt_context *ctx, const mpt_gemm_op *op) {
    size_t i, j, l;
    (void)ctx;
    if (op->a_sums.data) mpt__ref_column_sums(op->k, op->m, op->a, op->beta, op->a_sums);
    for (i = 0; i < op->m; i++)
        for (j = 0; j < op->n; j++) {
            double sum = 0;
            for (l = 0; l < op->k; l++) {
                const double a = mpt__ref_get(op->a, op->trans_a ? l * op->lda + i : i * op->lda + l);
                const double b = mpt__ref_get(op->b, op->trans_b ? j * op->ldb + l : l * op->ldb + j);
                sum += a * b;
            }
            mpt__ref_put(op->c, i * op->ldc + j, (double)op->alpha * sum, op->beta, op->bias, j, op->act);
        }
    return MPT_OK;
}

/* The input that output `out` reads by a tap: in = out stride + tap - padding, where tap is r dilation or s dilation.
   Returns 0 if it lies in the padding. */
static int mpt__ref_input_of(size_t out, size_t stride, size_t tap, size_t padding, size_t inputs, size_t *in) {
    const ptrdiff_t at = (ptrdiff_t)(out * stride + tap) - (ptrdiff_t)padding;
    *in = (size_t)at;
    return at >= 0 && *in < inputs;
}

/* The reverse: the output that reads input `in` by that tap. Returns 0 if there is none. */
static int mpt__ref_output_of(size_t in, size_t stride, size_t tap, size_t padding, size_t outputs, size_t *out) {
    const ptrdiff_t at = (ptrdiff_t)(in + padding) - (ptrdiff_t)tap;
    *out = (size_t)at / stride;
    return at >= 0 && (size_t)at % stride == 0 && *out < outputs;
}

/* y(n,p,q,k) = sum over r, s, c of x(n,h,w,c) w(k,r,s,c), where taps r and s read h and w, and c are the C/groups
   channels of k's group */
static double mpt__ref_conv2d_y(const mpt_conv2d_op *op, size_t n, size_t p, size_t q, size_t k) {
    const mpt_conv2d_shape *shape = &op->shape;
    const size_t C = shape->C / shape->groups, first = k / (shape->K / shape->groups) * C;
    double sum = 0;
    size_t r, s, c, h, w;
    for (r = 0; r < shape->R; r++)
        for (s = 0; s < shape->S; s++) {
            if (!mpt__ref_input_of(p, shape->stride_h, r * shape->dilation_h, shape->padding_h, shape->H, &h)) continue;
            if (!mpt__ref_input_of(q, shape->stride_w, s * shape->dilation_w, shape->padding_w, shape->W, &w)) continue;
            for (c = 0; c < C; c++)
                sum += mpt__ref_get(op->x, ((n * shape->H + h) * shape->W + w) * shape->C + first + c) *
                       mpt__ref_get(op->w, ((k * shape->R + r) * shape->S + s) * C + c);
        }
    return sum;
}

/* dx(n,h,w,c) = sum over r, s, k of dy(n,p,q,k) w(k,r,s,c), over the outputs that read it */
static double mpt__ref_conv2d_dx(const mpt_conv2d_op *op, size_t n, size_t h, size_t w, size_t c) {
    const mpt_conv2d_shape *shape = &op->shape;
    const size_t C = shape->C / shape->groups, K = shape->K / shape->groups, first = c / C * K;
    double sum = 0;
    size_t r, s, k, p, q;
    for (r = 0; r < shape->R; r++)
        for (s = 0; s < shape->S; s++) {
            if (!mpt__ref_output_of(h, shape->stride_h, r * shape->dilation_h, shape->padding_h, op->P, &p)) continue;
            if (!mpt__ref_output_of(w, shape->stride_w, s * shape->dilation_w, shape->padding_w, op->Q, &q)) continue;
            for (k = first; k < first + K; k++)
                sum += mpt__ref_get(op->y, ((n * op->P + p) * op->Q + q) * shape->K + k) *
                       mpt__ref_get(op->w, ((k * shape->R + r) * shape->S + s) * C + c % C);
        }
    return sum;
}

/* dw(k,r,s,c) = sum over n, p, q of dy(n,p,q,k) x(n,h,w,c) */
static double mpt__ref_conv2d_dw(const mpt_conv2d_op *op, size_t k, size_t r, size_t s, size_t c) {
    const mpt_conv2d_shape *shape = &op->shape;
    const size_t C = shape->C / shape->groups, first = k / (shape->K / shape->groups) * C;
    double sum = 0;
    size_t n, p, q, h, w;
    for (n = 0; n < shape->N; n++)
        for (p = 0; p < op->P; p++)
            for (q = 0; q < op->Q; q++) {
                if (!mpt__ref_input_of(p, shape->stride_h, r * shape->dilation_h, shape->padding_h, shape->H, &h))
                    continue;
                if (!mpt__ref_input_of(q, shape->stride_w, s * shape->dilation_w, shape->padding_w, shape->W, &w))
                    continue;
                sum += mpt__ref_get(op->y, ((n * op->P + p) * op->Q + q) * shape->K + k) *
                       mpt__ref_get(op->x, ((n * shape->H + h) * shape->W + w) * shape->C + first + c);
            }
    return sum;
}

/* y(N,P,Q,K) = act(conv(x(N,H,W,C), w(K,R,S,C/groups)) + beta y + bias(K)) */
static void mpt__ref_conv2d_forward(const mpt_conv2d_op *op) {
    const mpt_conv2d_shape *shape = &op->shape;
    size_t n, p, q, k, i = 0;
    for (n = 0; n < shape->N; n++)
        for (p = 0; p < op->P; p++)
            for (q = 0; q < op->Q; q++)
                for (k = 0; k < shape->K; k++, i++)
                    mpt__ref_put(op->y, i, mpt__ref_conv2d_y(op, n, p, q, k), op->beta, op->bias, k, op->act);
}

/* dx(N,H,W,C), + beta dx */
static void mpt__ref_conv2d_backward_data(const mpt_conv2d_op *op) {
    const mpt_conv2d_shape *shape = &op->shape;
    const mpt_array none = MPT_ZERO;
    size_t n, h, w, c, i = 0;
    for (n = 0; n < shape->N; n++)
        for (h = 0; h < shape->H; h++)
            for (w = 0; w < shape->W; w++)
                for (c = 0; c < shape->C; c++, i++)
                    mpt__ref_put(op->x, i, mpt__ref_conv2d_dx(op, n, h, w, c), op->beta, none, 0, MPT_IDENTITY);
}

/* dw(K,R,S,C/groups), + beta dw, and db(K), the column sums of dy(NPQ,K) */
static void mpt__ref_conv2d_backward_weight(const mpt_conv2d_op *op) {
    const mpt_conv2d_shape *shape = &op->shape;
    const mpt_array none = MPT_ZERO;
    size_t k, r, s, c, i = 0;
    if (op->bias.data) mpt__ref_column_sums(shape->N * op->P * op->Q, shape->K, op->y, op->beta, op->bias);
    for (k = 0; k < shape->K; k++)
        for (r = 0; r < shape->R; r++)
            for (s = 0; s < shape->S; s++)
                for (c = 0; c < shape->C / shape->groups; c++, i++)
                    mpt__ref_put(op->w, i, mpt__ref_conv2d_dw(op, k, r, s, c), op->beta, none, 0, MPT_IDENTITY);
}

/* fast: mpt__cpu_conv2d */
static mpt_result mpt__ref_conv2d(mpt_context *ctx, const mpt_conv2d_op *op) {
    (void)ctx;
    if (op->pass == MPT_FORWARD) mpt__ref_conv2d_forward(op);
    else if (op->pass == MPT_BACKWARD_DATA) mpt__ref_conv2d_backward_data(op);
    else mpt__ref_conv2d_backward_weight(op);
    return MPT_OK;
}

/* y(rows,C) = x(rows,C) + beta y, rows x_stride and y_stride apart. fast: mpt__cpu_columns */
static mpt_result mpt__ref_columns(mpt_context *ctx, const mpt_columns_op *op) {
    size_t row, c;
    (void)ctx;
    for (row = 0; row < op->rows; row++)
        for (c = 0; c < op->C; c++) {
            const size_t to = row * op->y_stride + c;
            mpt__ref_set(op->y, to, mpt__ref_get(op->x, row * op->x_stride + c) + mpt__ref_old(op->y, to, op->beta),
                         NULL);
        }
    return MPT_OK;
}

/* What an element of x(N,H,W,C) contributes to y; or its dx, from the elements of dy that it contributed to */
static void mpt__ref_broadcast_element(const mpt_broadcast_op *op, size_t n, size_t h, size_t w, size_t c) {
    const mpt_broadcast_shape *shape = &op->shape;
    const size_t in = ((n * shape->H + h) * shape->W + w) * shape->C + c;
    const mpt_array none = MPT_ZERO;
    double sum = 0;
    size_t r, s;
    for (r = 0; r < shape->R; r++)
        for (s = 0; s < shape->S; s++) {
            const size_t row = (n * shape->H + h) * shape->R + r, column = w * shape->S + s;
            const size_t at = (row * shape->W * shape->S + column) * shape->C + c;
            const double factor = op->factor.data ? mpt__ref_get(op->factor, at) : 1;
            if (op->pass == MPT_FORWARD)
                mpt__ref_put(op->y, at, mpt__ref_get(op->x, in) * factor, op->beta, none, 0, MPT_IDENTITY);
            else sum += mpt__ref_get(op->y, at) * factor;
        }
    if (op->pass != MPT_FORWARD) mpt__ref_put(op->x, in, sum, op->beta, none, 0, MPT_IDENTITY);
}

/* y(N,H R,W S,C) from x(N,H,W,C), or dx from dy. fast: mpt__cpu_broadcast */
static mpt_result mpt__ref_broadcast(mpt_context *ctx, const mpt_broadcast_op *op) {
    const mpt_broadcast_shape *shape = &op->shape;
    size_t n, h, w, c;
    (void)ctx;
    for (n = 0; n < shape->N; n++)
        for (h = 0; h < shape->H; h++)
            for (w = 0; w < shape->W; w++)
                for (c = 0; c < shape->C; c++) mpt__ref_broadcast_element(op, n, h, w, c);
    return MPT_OK;
}

/* out(n), each element computed by op->map from those of the same index. fast: mpt__cpu_map */
static mpt_result mpt__ref_map(mpt_context *ctx, const mpt_map_op *op) {
    const uint64_t step = op->mask.step ? *op->mask.step : 0;
    size_t i;
    (void)ctx;
    for (i = 0; i < op->n; i++) {
        const mpt_rounding *rounding = NULL;
        float x = op->map == MPT_MAP_BYTES ? (float)((const uint8_t *)op->a.data)[i] : (float)mpt__ref_get(op->a, i);
        switch (op->map) {
        case MPT_MAP_CAST: rounding = &op->rounding; break;
        case MPT_MAP_ACTIVATION: x = mpt__map_activate(op, x); break;
        case MPT_MAP_ACTIVATION_GRADIENT:
            x = mpt__map_activate_backward(op, x, (float)mpt__ref_get(op->b, i));
            x = (float)((double)x + mpt__ref_old(op->out, i, op->beta));
            break;
        case MPT_MAP_ADD: x = mpt__map_activate(op, (float)((double)x + mpt__ref_old(op->b, i, op->beta))); break;
        case MPT_MAP_DROPOUT:
            x = mpt__mul_rn(x, mpt__mask_factor(&op->mask, step, i));
            x = (float)((double)x + mpt__ref_old(op->out, i, op->beta));
            break;
        case MPT_MAP_BYTES: x = mpt__of_byte(x, op->channels, op->C, i % op->C); break;
        }
        mpt__ref_set(op->out, i, (double)x, rounding);
    }
    return MPT_OK;
}

/* y(n,p,q,c) of a window of x: the largest element, whose tap r S + s goes to index, or the sum / (R S). NaN counts as
   the largest. */
static void mpt__ref_pool2d_y(const mpt_pool2d_op *op, size_t n, size_t p, size_t q, size_t c) {
    const mpt_pool2d_shape *shape = &op->shape;
    const size_t at = ((n * op->P + p) * op->Q + q) * shape->C + c;
    double sum = 0;
    float largest = 0;
    int any = 0;
    size_t r, s, h, w;
    for (r = 0; r < shape->R; r++)
        for (s = 0; s < shape->S; s++) {
            float x;
            if (!mpt__ref_input_of(p, shape->stride_h, r, shape->padding_h, shape->H, &h)) continue;
            if (!mpt__ref_input_of(q, shape->stride_w, s, shape->padding_w, shape->W, &w)) continue;
            x = (float)mpt__ref_get(op->x, ((n * shape->H + h) * shape->W + w) * shape->C + c);
            sum += (double)x;
            if (any && (mpt__is_nan(largest) || !(x > largest || mpt__is_nan(x)))) continue;
            any = 1;
            largest = x;
            if (op->kind == MPT_POOL_MAX) op->index[at] = (uint16_t)(r * shape->S + s);
        }
    if (op->kind == MPT_POOL_MAX) mpt__ref_set(op->y, at, (double)largest, NULL);
    else mpt__ref_set(op->y, at, sum / (double)mpt__pool2d_divisor(shape, p, q), NULL);
}

/* dx(n,h,w,c) = a sum over the windows that contain it. Max: dy, if it was the largest element. Average: dy / (R S) */
static double mpt__ref_pool2d_dx(const mpt_pool2d_op *op, size_t n, size_t h, size_t w, size_t c) {
    const mpt_pool2d_shape *shape = &op->shape;
    double sum = 0;
    size_t r, s, p, q;
    for (r = 0; r < shape->R; r++)
        for (s = 0; s < shape->S; s++) {
            size_t at;
            if (!mpt__ref_output_of(h, shape->stride_h, r, shape->padding_h, op->P, &p)) continue;
            if (!mpt__ref_output_of(w, shape->stride_w, s, shape->padding_w, op->Q, &q)) continue;
            at = ((n * op->P + p) * op->Q + q) * shape->C + c;
            if (op->kind == MPT_POOL_AVERAGE) sum += mpt__ref_get(op->y, at) / (double)mpt__pool2d_divisor(shape, p, q);
            else if (op->index[at] == r * shape->S + s) sum += mpt__ref_get(op->y, at);
        }
    return sum;
}

/* y(N,P,Q,C) from x(N,H,W,C), or dx from dy and index. fast: mpt__cpu_pool2d */
static mpt_result mpt__ref_pool2d(mpt_context *ctx, const mpt_pool2d_op *op) {
    const mpt_pool2d_shape *shape = &op->shape;
    const mpt_array none = MPT_ZERO;
    size_t n, h, w, p, q, c, i = 0;
    (void)ctx;
    if (op->pass == MPT_FORWARD) {
        for (n = 0; n < shape->N; n++)
            for (p = 0; p < op->P; p++)
                for (q = 0; q < op->Q; q++)
                    for (c = 0; c < shape->C; c++) mpt__ref_pool2d_y(op, n, p, q, c);
        return MPT_OK;
    }
    for (n = 0; n < shape->N; n++)
        for (h = 0; h < shape->H; h++)
            for (w = 0; w < shape->W; w++)
                for (c = 0; c < shape->C; c++, i++)
                    mpt__ref_put(op->x, i, mpt__ref_pool2d_dx(op, n, h, w, c), op->beta, none, 0, MPT_IDENTITY);
    return MPT_OK;
}

/* Index in x(N,pixels,C) of element e of set (n,g), which has pixels C/groups elements, and its channel */
static size_t mpt__ref_norm_at(const mpt_norm_shape *shape, size_t set, size_t e, size_t *channel) {
    const size_t each = shape->C / shape->groups, n = set / shape->groups, g = set % shape->groups;
    *channel = g * each + e % each;
    return (n * shape->pixels + e / each) * shape->C + *channel;
}

/* stats[set] = mean, stats[sets + set] = variance, the biased one */
static void mpt__ref_norm_stats(const mpt_norm_op *op, size_t sets, size_t count) {
    size_t set, e, c;
    for (set = 0; set < sets; set++) {
        double mean = 0, variance = 0;
        for (e = 0; e < count; e++) mean += mpt__ref_get(op->x, mpt__ref_norm_at(&op->shape, set, e, &c));
        mean /= (double)count;
        for (e = 0; e < count; e++) {
            const double d = mpt__ref_get(op->x, mpt__ref_norm_at(&op->shape, set, e, &c)) - mean;
            variance += d * d;
        }
        op->stats[set] = (float)mean;
        op->stats[sets + set] = (float)(variance / (double)count);
    }
}

/* gamma or beta of a channel; `otherwise` if there is none */
static double mpt__ref_affine(mpt_array a, size_t c, double otherwise) {
    if (a.data) return mpt__ref_get(a, c);
    return otherwise;
}

/* (x - mean) / sqrt(variance + eps) of an element */
static double mpt__ref_normal(const mpt_norm_op *op, size_t sets, size_t set, size_t at) {
    const double variance = (double)op->stats[sets + set], eps = (double)op->shape.eps;
    return (mpt__ref_get(op->x, at) - (double)op->stats[set]) / sqrt(variance + eps);
}

/* y = act(normal gamma(C) + beta(C)) */
static void mpt__ref_norm_forward(const mpt_norm_op *op, size_t sets, size_t count) {
    size_t set, e, c;
    for (set = 0; set < sets; set++)
        for (e = 0; e < count; e++) {
            const size_t at = mpt__ref_norm_at(&op->shape, set, e, &c);
            const double gamma = mpt__ref_affine(op->gamma, c, 1), beta = mpt__ref_affine(op->beta, c, 0);
            const double y = mpt__ref_normal(op, sets, set, at) * gamma + beta;
            mpt__ref_set(op->y, at, (double)mpt__activate(op->act, (float)y), NULL);
        }
}

/* dy, times the derivative of the activation that follows, if one does */
static double mpt__ref_norm_dy(const mpt_norm_op *op, size_t at) {
    float dy = (float)mpt__ref_get(op->y, at);
    if (op->act) dy = mpt__activate_backward(op->act, (float)mpt__ref_get(op->saved, at), dy);
    return (double)dy;
}

/* dgamma(C) = sum of dy normal, dbeta(C) = sum of dy, each + scale times its old value */
static void mpt__ref_norm_parameters(const mpt_norm_op *op, size_t sets, size_t count) {
    size_t set, e, c, channel;
    for (c = 0; c < op->shape.C; c++) {
        double dgamma = mpt__ref_old(op->dgamma, c, op->scale), dbeta = mpt__ref_old(op->dbeta, c, op->scale);
        for (set = 0; set < sets; set++)
            for (e = 0; e < count; e++) {
                const size_t at = mpt__ref_norm_at(&op->shape, set, e, &channel);
                if (channel != c) continue;
                dgamma += mpt__ref_norm_dy(op, at) * mpt__ref_normal(op, sets, set, at);
                dbeta += mpt__ref_norm_dy(op, at);
            }
        mpt__ref_set(op->dgamma, c, dgamma, NULL);
        mpt__ref_set(op->dbeta, c, dbeta, NULL);
    }
}

/* With v = dy gamma: dx = (v - mean of v - normal * mean of (v normal)) / sqrt(variance + eps), means over the set.
   frozen: the statistics are constants, so both means count as 0. */
static void mpt__ref_norm_dx(const mpt_norm_op *op, size_t sets, size_t count) {
    size_t set, e, c;
    for (set = 0; set < sets; set++) {
        const double inverse = 1 / sqrt((double)op->stats[sets + set] + (double)op->shape.eps);
        double mean = 0, mean_normal = 0;
        if (!op->frozen)
            for (e = 0; e < count; e++) {
                const size_t at = mpt__ref_norm_at(&op->shape, set, e, &c);
                const double v = mpt__ref_norm_dy(op, at) * mpt__ref_affine(op->gamma, c, 1);
                mean += v / (double)count;
                mean_normal += v * mpt__ref_normal(op, sets, set, at) / (double)count;
            }
        for (e = 0; e < count; e++) {
            const size_t at = mpt__ref_norm_at(&op->shape, set, e, &c);
            const double v = mpt__ref_norm_dy(op, at) * mpt__ref_affine(op->gamma, c, 1);
            const double dx = (v - mean - mpt__ref_normal(op, sets, set, at) * mean_normal) * inverse;
            mpt__ref_set(op->dx, at, dx + mpt__ref_old(op->dx, at, op->scale_x), NULL);
        }
    }
}

/* x(N,pixels,C) as N groups sets of pixels C/groups elements. fast: mpt__cpu_norm */
static mpt_result mpt__ref_norm(mpt_context *ctx, const mpt_norm_op *op) {
    const size_t sets = op->shape.N * op->shape.groups, count = op->shape.pixels * (op->shape.C / op->shape.groups);
    size_t i;
    (void)ctx;
    switch (op->pass) {
    case MPT_NORM_STATS: mpt__ref_norm_stats(op, sets, count); break;
    case MPT_NORM_FORWARD: mpt__ref_norm_forward(op, sets, count); break;
    case MPT_NORM_BACKWARD:
        if (op->dgamma.data) mpt__ref_norm_parameters(op, sets, count); /* before dx, which may overwrite dy */
        if (op->dx.data) mpt__ref_norm_dx(op, sets, count);
        break;
    case MPT_NORM_RUNNING:
        for (i = 0; i < 2 * sets; i++) mpt__norm_average(op, count, i);
        break;
    }
    return MPT_OK;
}

/* Replaces the CPU backend's operations by the loops above. */
static void mpt__ref_backend(mpt_backend *backend) {
    backend->gemm = mpt__ref_gemm;
    backend->conv2d = mpt__ref_conv2d;
    backend->columns = mpt__ref_columns;
    backend->broadcast = mpt__ref_broadcast;
    backend->map = mpt__ref_map;
    backend->pool2d = mpt__ref_pool2d;
    backend->norm = mpt__ref_norm;
}

/* ==== ENGINE ====

   The CPU backend; REFERENCE has the same operations as plain loops. One driver computes every matrix product,
   including convolutions. It cuts the result into blocks, and the depth (the dimension that is summed) into parts. For
   each part it packs the right operand into panels as wide as a tile. It reads the left operand in place, in the
   caller's array, or from a copy that holds each element once; it never builds a patch matrix. A kernel keeps a tile of
   the result in registers. The epilogue (scale, add, bias, activation, rounding) is applied to a group of rows while
   their sums are in L1. The order of a sum, and so the bits, depend only on the sizes and the kernel, not on the number
   of threads or the CPU's caches. */

enum {
#ifdef MPT_SMALL
    MPT__BLOCK_M = 96,
    MPT__BLOCK_N = 32,
    MPT__DEEP = 32,
    MPT__DEEPEST = 128,
    MPT__LEFT_WORDS = 96 * 32,
    MPT__RIGHT_WORDS = 32 * 128,
    MPT__LINE = 32,
#else
    MPT__BLOCK_M = 576,           /* rows of a block of the result at most, */
    MPT__BLOCK_N = 256,           /* and columns */
    MPT__DEEP = 576,              /* words of a part's depth at most if the left operand is copied, */
    MPT__DEEPEST = 1536,          /* and if it is read in place */
    MPT__LEFT_WORDS = 96 * 576,   /* of the left operand's copy: 216 KiB, */
    MPT__RIGHT_WORDS = 256 * 512, /* and of panels, 512 KiB: both stay in an L2 of 1 MiB */
    MPT__LINE = 256,              /* depth that is transposed at a time */
#endif
    MPT__GROUP = 96,     /* rows of an epilogue at most: a multiple of every tile_m, and of RUN */
    MPT__FEW_TILES = 24, /* rows of one in deep and wide products: a multiple of every tile_m, too */
    MPT__TILE_N = 32,    /* columns of the widest tile */
    MPT__LINE_WORDS = MPT__TILE_N * MPT__LINE,
    MPT__TABLE = MPT__DEEPEST + 2 * MPT__RUN, /* offsets; a block has fewer rows than DEEPEST */
    MPT__ROOM = 32 * MPT__RUN,                /* floats, for runs that would make a stack frame too large */
    MPT__WORKSPACE = MPT__RIGHT_WORDS + MPT__LEFT_WORDS + MPT__LINE_WORDS + MPT__BLOCK_M * MPT__BLOCK_N +
                     MPT__GROUP * MPT__BLOCK_N + 3 * MPT__TABLE * 2 + MPT__ROOM
};

/* The parts of a worker's workspace */
typedef struct mpt__workspace {
    float *panels, *left, *line, *sums, *transposed, *room;
    size_t *rows, *runs, *strips; /* see mpt__left, mpt__right */
} mpt__workspace;

static float *mpt__worker_space(const mpt_context *ctx, int worker) {
    return ctx->workspace + (size_t)worker * MPT__WORKSPACE;
}

static float *mpt__worker_room(const mpt_context *ctx, int worker) {
    return mpt__worker_space(ctx, worker) + MPT__WORKSPACE - MPT__ROOM;
}

static mpt__workspace mpt__workspace_of(const mpt_context *ctx, int worker) {
    mpt__workspace d;
    d.panels = mpt__worker_space(ctx, worker);
    d.left = d.panels + MPT__RIGHT_WORDS;
    d.line = d.left + MPT__LEFT_WORDS;
    d.sums = d.line + MPT__LINE_WORDS;
    d.transposed = d.sums + MPT__BLOCK_M * MPT__BLOCK_N;
    d.rows = (size_t *)(void *)(d.transposed + MPT__GROUP * MPT__BLOCK_N);
    d.runs = d.rows + MPT__TABLE;
    d.strips = d.runs + MPT__TABLE;
    d.room = mpt__worker_room(ctx, worker);
    return d;
}

static mpt_result mpt__cpu_workspace(mpt_context *ctx) {
    ctx->workspace = (float *)mpt__host_alloc(ctx, (size_t)ctx->threads * MPT__WORKSPACE * sizeof(float));
    if (!ctx->workspace) return MPT_ERROR_NO_MEMORY;
    return MPT_OK;
}

/* How many pieces of at most `most` n makes: the quotient, rounded up */
static size_t mpt__pieces(size_t n, size_t most) { return (n + most - 1) / most; }

static size_t mpt__round_up(size_t n, size_t unit) { return mpt__pieces(n, unit) * unit; }

/* The size of one of the fewest nearly equal pieces of n, each at most `most`, rounded up to a multiple of `unit` */
static size_t mpt__evenly(size_t n, size_t most, size_t unit) {
    return mpt__round_up(mpt__pieces(n, mpt__pieces(n, most)), unit);
}

/* -- Operands --

   The depth of the right operand is `count` strips of `length` elements; with pairs of bf16 an odd strip ends in a pair
   with 0. Element e of strip r in column j is element strips[r] + e * stride + j * column_stride of the array. Strips
   and the left operand's runs (see mpt__left) list the same words in the same order. */
typedef struct mpt__right {
    const size_t *strips;
    size_t count, length, stride, column_stride;
} mpt__right;

typedef struct mpt__matrix {
    mpt_array data;
    size_t stride; /* between rows */
    int along;     /* rows run along the depth, else along the rows or columns of the result */
} mpt__matrix;

/* The left operand of a convolution. Outputs (N,P,Q) read taps (R,S) of an image (N,H,W,C), or of some of its channels.
   For the gradient of x the image is dy, spread to every up_h-th row and up_w-th column with zeros in between and
   padded so that every x is an output, and the filters are flipped.

   A band of outputs and a slice of the kernel need one rectangle of each image. It is copied once, with its padding,
   into the halo buffer: here for two rows of three outputs and a 3x3 kernel with stride 1 (. is padding, x a pixel of
   the image; each has the slice's channels side by side):

       . . . . .      The tile reads every tap in place. Output (p,q) finds tap (r,s), channel c at
       . x x x .
       . x x x .     p * stride_h * pitch + q * stride_w * pixel  +  r * dilation_h * pitch + s * dilation_w * pixel + c
       . x x x .     \____________ rows[(p,q)] ________________/     \___ runs[r] ______/   \_ S * C words in a row, if
                                                                                             dilation_w is 1; else each
   `pitch` is the bytes of a row, `pixel` of a pixel.                                        tap is a run of C words

   The gradient of w reads the same buffer with the roles exchanged: rows[(r,s,c)] is the second half of the sum, a run
   is a row of outputs, and its words are stride_w * pixel apart. Pairs of bf16 are then pairs of neighbouring outputs:
   at each pixel the buffer holds the pair of it and the pixel stride_w to its right, and the next word is two outputs
   on. If the last output of a row has no partner, it becomes a band of its own: a partner of 0 would give 0 * inf if
   the image has an inf there. */
typedef enum mpt__outputs { MPT__NO_OUTPUTS, MPT__OUTPUTS_ARE_ROWS, MPT__OUTPUTS_ARE_DEPTH } mpt__outputs;

typedef struct mpt__image {
    mpt__outputs kind; /* MPT__NO_OUTPUTS: of a product of matrices */
    mpt_array data;
    size_t N, H, W, C, first, channels; /* channels first .. first+channels of C */
    size_t up_h, up_w;                  /* distance between rows and columns once they are spread */
    ptrdiff_t pad_top, pad_left;        /* zeros above and left of the image; below 0: rows and columns left out */
    size_t P, Q, R, S, stride_h, stride_w, dilation_h, dilation_w;
    size_t images, lines, columns;    /* of a band: whole images or some lines of one; outputs of a line */
    size_t alone;                     /* 1: the last output of a line is a band of its own */
    size_t slice_R, slice_S, slice_C; /* of a slice: tap rows, taps of one, channels */
    size_t widest;                    /* elements of a halo's row at most */
    int flipped;                      /* the filters are turned by 180 degrees */
} mpt__image;

typedef struct mpt__band { /* outputs, rows counted over all images */
    size_t row, rows, q, columns;
} mpt__band;

typedef struct mpt__kernel_slice { /* of the kernel and its channels */
    size_t r, R, s, S, c, C;
} mpt__kernel_slice;

static size_t mpt__bands_across(const mpt__image *image) {
    return mpt__pieces(image->Q - image->alone, image->columns) + image->alone;
}

static mpt__band mpt__band_of(const mpt__image *image, size_t b) {
    const size_t across = mpt__bands_across(image), last = image->Q - image->alone;
    const size_t down = mpt__pieces(image->P, image->lines), p = b / across % down * image->lines;
    mpt__band band;
    band.row = b / across / down * image->images * image->P + p;
    band.rows = mpt__min(image->lines, image->P - p);
    if (image->images > 1) band.rows = mpt__min(image->images * image->P, image->N * image->P - band.row);
    band.q = mpt__min(b % across * image->columns, last);
    band.columns = 1;
    if (band.q < last) band.columns = mpt__min(image->columns, last - band.q);
    return band;
}

static size_t mpt__bands(const mpt__image *image) {
    return mpt__pieces(image->N, image->images) * mpt__pieces(image->P, image->lines) * mpt__bands_across(image);
}

static mpt__kernel_slice mpt__kernel_slice_of(const mpt__image *image, size_t b) {
    const size_t along = mpt__pieces(image->channels, image->slice_C), across = mpt__pieces(image->S, image->slice_S);
    mpt__kernel_slice slice;
    slice.c = b % along * image->slice_C;
    slice.C = mpt__min(image->slice_C, image->channels - slice.c);
    slice.s = b / along % across * image->slice_S;
    slice.S = mpt__min(image->slice_S, image->S - slice.s);
    slice.r = b / along / across * image->slice_R;
    slice.R = mpt__min(image->slice_R, image->R - slice.r);
    return slice;
}

static size_t mpt__kernel_slices(const mpt__image *image) {
    return mpt__pieces(image->channels, image->slice_C) * mpt__pieces(image->S, image->slice_S) *
           mpt__pieces(image->R, image->slice_R);
}

/* -- Halo buffers -- */

typedef struct mpt__halo { /* for a band and a slice */
    size_t rows, width;    /* of one image: padded rows, pixels of a row */
    size_t size, channels; /* bytes of an element and elements of a pixel, padding included */
    size_t pixel, pitch;   /* bytes */
    int pairs;             /* of neighbouring outputs */
} mpt__halo;

/* Rows of one image that `lines` lines of outputs need, and pixels of a row */
static size_t mpt__halo_rows(const mpt__image *image, size_t lines, size_t R) {
    return (lines - 1) * image->stride_h + (R - 1) * image->dilation_h + 1;
}

static size_t mpt__halo_width(const mpt__image *image, size_t columns, size_t S) {
    return (columns - 1) * image->stride_w + (S - 1) * image->dilation_w + 1;
}

/* Channels of a pixel are filled up to a multiple of `multiple`. */
static mpt__halo mpt__halo_of(const mpt__image *image, const mpt__band *band, const mpt__kernel_slice *slice, int pairs,
                              size_t multiple) {
    mpt__halo h;
    h.rows = mpt__halo_rows(image, mpt__min(band->rows, image->lines), slice->R);
    h.width = mpt__halo_width(image, band->columns, slice->S);
    h.pairs = pairs && image->kind == MPT__OUTPUTS_ARE_DEPTH;
    h.size = sizeof(float);
    if (pairs && !h.pairs) h.size = sizeof(uint16_t);
    h.channels = mpt__round_up(slice->C, multiple);
    h.pixel = h.channels * h.size;
    h.pitch = h.width * h.pixel;
    return h;
}

/* dst(n) = elements i .. i+n of an array; size 2: copied unchanged, 4: as fp32 */
static void mpt__fetch(const mpt_context *ctx, mpt_array data, size_t i, size_t n, size_t size, void *dst) {
    if (size == sizeof(uint16_t)) memcpy(dst, (const uint16_t *)data.data + i, n * size);
    else mpt__load(ctx, data, i, n, (float *)dst);
}

/* Copies `count` pixels of n elements: from element i of an array on, `stride` elements apart, to `to`, `to_stride`
   bytes apart */
static void mpt__scatter(const mpt_context *ctx, mpt_array data, size_t i, size_t n, size_t stride, size_t count,
                         size_t size, size_t to_stride, char *to) {
    const uint16_t *half = (const uint16_t *)data.data + i;
    size_t c;
    if (size == sizeof *half && n < MPT__RUN)
        for (; count; count--, half += stride, to += to_stride)
            for (c = 0; c < n; c++) ((uint16_t *)(void *)to)[c] = half[c];
    else
        for (; count; count--, i += stride, to += to_stride) mpt__fetch(ctx, data, i, n, size, to);
}

/* to(width,channels) = row y of the padded image n, from its column x on. Here width is 10, up_w is 3, and the row
   holds the image's pixels w, w + 1 and w + 2:

       |<-- h->width -->|
       . . w . . x . . x .      column: where the row begins in the spread image; below 0 in the padding
       |<->| skip               skip = w up_w - column                                                         */
static void mpt__halo_row(const mpt_context *ctx, const mpt__image *image, const mpt__kernel_slice *slice,
                          const mpt__halo *h, size_t n, size_t y, size_t x, char *to) {
    const size_t down = image->up_h, up = image->up_w;
    const size_t size = h->pairs ? sizeof(uint16_t) : h->size, pixel = h->channels * size;
    const ptrdiff_t row = (ptrdiff_t)y - image->pad_top, column = (ptrdiff_t)x - image->pad_left;
    const size_t w = column > 0 ? mpt__pieces((size_t)column, up) : 0;
    const size_t skip = (size_t)((ptrdiff_t)(w * up) - column);
    size_t count, at;
    if (row < 0 || (size_t)row % down || (size_t)row / down >= image->H || w >= image->W || skip >= h->width) {
        memset(to, 0, h->width * pixel);
        return;
    }
    count = mpt__min(image->W - w, (h->width - skip - 1) / up + 1);
    at = ((n * image->H + (size_t)row / down) * image->W + w) * image->C + image->first + slice->c;
    if (up == 1 && h->channels == image->C && slice->C == image->C) { /* pixels are contiguous */
        memset(to, 0, skip * pixel);
        mpt__fetch(ctx, image->data, at, count * image->C, size, to + skip * pixel);
        memset(to + (skip + count) * pixel, 0, (h->width - skip - count) * pixel);
    } else {
        memset(to, 0, h->width * pixel);
        mpt__scatter(ctx, image->data, at, slice->C, image->C, count, size, up * pixel, to + skip * pixel);
    }
}

/* to(width,channels) = each of the n elements of line paired with the one `next` on, or with 0 at the end */
static void mpt__halo_pairs(const mpt_context *ctx, const uint16_t *line, size_t n, size_t next, char *to) {
    const size_t both = n - mpt__min(next, n);
    uint32_t *out = (uint32_t *)(void *)to;
    size_t e;
    ctx->simd.pair(line, line + next, both, out);
    for (e = both; e < n; e++) out[e] = line[e];
}

/* Fills the buffer of a band, one image after the other. */
static void mpt__halo_fill(const mpt_context *ctx, const mpt__image *image, const mpt__band *band,
                           const mpt__kernel_slice *slice, const mpt__halo *h, const mpt__workspace *ws) {
    const size_t x = band->q * image->stride_w + slice->s * image->dilation_w;
    const size_t line_size = h->width * h->channels;
    const size_t next = band->columns > 1 ? image->stride_w * h->channels : line_size;
    char *to = (char *)ws->left;
    size_t row, t;
    for (row = band->row; row < band->row + band->rows; row += image->lines)
        for (t = 0; t < h->rows; t++, to += h->pitch) {
            char *line = h->pairs ? (char *)ws->line : to;
            mpt__halo_row(ctx, image, slice, h, row / image->P,
                          row % image->P * image->stride_h + slice->r * image->dilation_h + t, x, line);
            if (h->pairs) mpt__halo_pairs(ctx, (const uint16_t *)(const void *)line, line_size, next, to);
        }
}

/* Bytes from the start of the buffer to the first tap of the band's row `row` */
static size_t mpt__halo_line(const mpt__image *image, const mpt__halo *h, size_t row) {
    return (row / image->lines * h->rows + row % image->lines * image->stride_h) * h->pitch;
}

/* The left operand with the band's outputs as rows and the slice's taps as depth */
static void mpt__image_rows(const mpt__image *image, const mpt__band *band, const mpt__kernel_slice *slice,
                            const mpt__halo *h, const mpt__workspace *ws, mpt__left *left) {
    const size_t across = image->dilation_w > 1 ? slice->S : 1; /* runs of a tap row */
    const size_t step = image->stride_w * h->pixel;
    size_t *rows = ws->rows, row, q, r, s;
    for (row = 0; row < band->rows; row++) {
        const size_t line = mpt__halo_line(image, h, row);
        for (q = 0; q < band->columns; q++) *rows++ = line + q * step;
    }
    for (r = 0; r < slice->R; r++)
        for (s = 0; s < across; s++)
            ws->runs[r * across + s] = r * image->dilation_h * h->pitch + s * image->dilation_w * h->pixel;
    left->count = slice->R * across;
    left->length = slice->S / across * h->pixel / sizeof(float);
    left->stride = sizeof(float);
}

/* The left operand with the slice's taps as rows and the band's outputs as depth */
static void mpt__image_taps(const mpt__image *image, const mpt__band *band, const mpt__kernel_slice *slice,
                            const mpt__halo *h, const mpt__workspace *ws, mpt__left *left) {
    const size_t each = h->pairs ? 2 : 1;
    size_t *rows = ws->rows, row, r, s, c;
    for (r = 0; r < slice->R; r++)
        for (s = 0; s < slice->S; s++)
            for (c = 0; c < slice->C; c++)
                *rows++ = r * image->dilation_h * h->pitch + s * image->dilation_w * h->pixel + c * sizeof(float);
    for (row = 0; row < band->rows; row++) ws->runs[row] = mpt__halo_line(image, h, row);
    left->count = band->rows;
    left->length = mpt__pieces(band->columns, each);
    left->stride = image->stride_w * h->pixel * each;
}

/* -- The driver -- */

typedef struct mpt__product { /* c(m,n) = act(alpha a(m,k) b(k,n) + beta c + bias(n)) */
    mpt_context *ctx;
    size_t m, n, k;
    mpt__matrix a, b;
    mpt__image image; /* of a convolution: in a's place */
    float alpha, beta;
    mpt_array c, bias;
    size_t ldc;
    mpt_activation act;
    int transposed;              /* the product is c's transpose */
    int plain;                   /* c is fp32 and needs no epilogue except beta 1: kernels write whole tiles to it */
    int pairs;                   /* words are pairs of bf16, else floats */
    size_t rows, columns, group; /* of a block of c; rows of an epilogue */
    size_t parts, deepest;       /* of the depth; elements of one, if it is a matrix. They fix the order of sums */
} mpt__product;

static size_t mpt__each(const mpt__product *p) { return p->pairs ? 2 : 1; } /* elements of a word */

/* Whether the left matrix is read in place. If the depth runs across its rows, each word of it is in another cache
   line, and few lines stay in L1. */
static int mpt__in_place(const mpt__product *p) {
    if (!p->a.along) return p->a.data.type == MPT_F32 && p->k <= 64;
    return mpt_dtype_size(p->a.data.type) * mpt__each(p) == sizeof(float) && p->k % mpt__each(p) == 0;
}

/* For dw: dy(outputs,K); a strip is a row of the band's outputs. */
static mpt__right mpt__right_outputs(const mpt__product *p, const mpt__band *band, const mpt__workspace *ws) {
    mpt__right right;
    size_t r;
    for (r = 0; r < band->rows; r++) ws->strips[r] = ((band->row + r) * p->image.Q + band->q) * p->b.stride;
    right.strips = ws->strips;
    right.count = band->rows;
    right.length = band->columns;
    right.stride = p->b.stride;
    right.column_stride = 1;
    return right;
}

/* For y: filters w(K,R,S,C); columns are filters. A strip is a tap, or all taps if they are contiguous. */
static mpt__right mpt__right_filters(const mpt__product *p, const mpt__kernel_slice *slice, const mpt__workspace *ws) {
    const size_t S = p->image.S, C = p->image.channels;
    mpt__right right;
    size_t r, s;
    for (r = 0; r < slice->R; r++)
        for (s = 0; s < slice->S; s++)
            ws->strips[r * slice->S + s] = ((slice->r + r) * S + slice->s + s) * C + slice->c;
    right.strips = ws->strips;
    right.count = slice->R * slice->S;
    right.length = slice->C;
    right.stride = 1;
    right.column_stride = p->b.stride;
    if (slice->S == S && slice->C == C && C % mpt__each(p) == 0) {
        right.count = 1;
        right.length = slice->R * S * C;
    }
    return right;
}

/* For dx: the same filters flipped; columns are w's channels, the depth is its filters. */
static mpt__right mpt__right_flipped(const mpt__product *p, const mpt__kernel_slice *slice, const mpt__workspace *ws) {
    const size_t S = p->image.S, last = p->image.R * S - 1, filter = p->b.stride;
    mpt__right right;
    size_t r, s;
    for (r = 0; r < slice->R; r++)
        for (s = 0; s < slice->S; s++) {
            const size_t tap = (slice->r + r) * S + slice->s + s;
            ws->strips[r * slice->S + s] = slice->c * filter + (last - tap) * p->n;
        }
    right.strips = ws->strips;
    right.count = slice->R * slice->S;
    right.length = slice->C;
    right.stride = filter;
    right.column_stride = 1;
    return right;
}

/* Elements l .. l+depth of the right matrix: one strip */
static mpt__right mpt__right_matrix(const mpt__product *p, size_t l, size_t depth, const mpt__workspace *ws) {
    mpt__right right;
    right.strips = ws->strips;
    right.count = 1;
    right.length = depth;
    if (p->b.along) {
        ws->strips[0] = l;
        right.stride = 1;
        right.column_stride = p->b.stride;
    } else {
        ws->strips[0] = l * p->b.stride;
        right.stride = p->b.stride;
        right.column_stride = 1;
    }
    return right;
}

/* Packs `count` columns of `length` contiguous elements, the first at element i, `column` apart, into rows of a
   panel. */
static void mpt__pack_transposed(const mpt__product *p, size_t i, size_t length, size_t column, size_t count,
                                 float *panel, float *lines) {
    const mpt_context *ctx = p->ctx;
    const size_t tile = ctx->simd.tile_n, each = mpt__each(p), size = sizeof(float) / each;
    size_t e, some, words, c;
    if (count == tile && mpt_dtype_size(p->b.data.type) == size && length % each == 0 && column % each == 0) {
        const float *from = (const float *)(const void *)((const char *)p->b.data.data + i * size);
        ctx->simd.transpose(from, column / each, length / each, tile, panel);
        return;
    }
    for (e = 0; e < length; e += some, panel += words * tile) {
        some = mpt__min(length - e, MPT__LINE_WORDS / MPT__TILE_N);
        words = mpt__pieces(some, each);
        memset(lines, 0, tile * words * sizeof *lines);
        for (c = 0; c < count; c++) mpt__fetch(ctx, p->b.data, i + c * column + e, some, size, lines + c * words);
        ctx->simd.transpose(lines, words, words, tile, panel);
    }
}

/* Packs one row of a panel: n columns from element i on. If words are pairs, their second elements are `next` further
   on, or zeros if next is 0. */
static void mpt__pack_row(const mpt__product *p, size_t i, size_t next, size_t n, float *panel) {
    static const uint16_t zeros[MPT__TILE_N] = {0};
    const uint16_t *low = (const uint16_t *)p->b.data.data + i;
    const float *whole = (const float *)p->b.data.data + i;
    size_t c;
    if (p->pairs) p->ctx->simd.pair(low, next ? low + next : zeros, n, (uint32_t *)(void *)panel);
    else if (p->b.data.type == MPT_F32 && n % 16 == 0)
        for (c = 0; c < n; c += 16) memcpy(panel + c, whole + c, 16 * sizeof *panel);
    else mpt__load(p->ctx, p->b.data, i, n, panel);
    if (n < p->ctx->simd.tile_n) memset(panel + n, 0, (p->ctx->simd.tile_n - n) * sizeof *panel);
}

/* Packs whole columns, each contiguous, a panel at a time. */
static void mpt__pack_columns(const mpt__product *p, const mpt__right *right, size_t j, size_t columns, size_t words,
                              const mpt__workspace *ws) {
    const size_t tile = p->ctx->simd.tile_n, strip = mpt__pieces(right->length, mpt__each(p));
    size_t c, r;
    for (c = 0; c < columns; c += tile)
        for (r = 0; r < right->count; r++)
            mpt__pack_transposed(p, right->strips[r] + (j + c) * right->column_stride, right->length,
                                 right->column_stride, mpt__min(tile, columns - c),
                                 ws->panels + c * words + r * strip * tile, ws->line);
}

/* Packs whole rows, each contiguous, a few rows at a time for all panels. Both the rows and the ends of the panels are
   far apart in memory, so taking few of each touches fewer pages. */
static void mpt__pack_rows(const mpt__product *p, const mpt__right *right, size_t j, size_t columns, size_t words,
                           const mpt__workspace *ws) {
    const size_t tile = p->ctx->simd.tile_n, each = mpt__each(p), strip = mpt__pieces(right->length, each), few = 16;
    size_t c, r, e, i;
    for (r = 0; r < right->count; r++)
        for (i = 0; i < strip; i += few)
            for (c = 0; c < columns; c += tile)
                for (e = i; e < mpt__min(i + few, strip); e++) {
                    const size_t at = right->strips[r] + e * each * right->stride + j + c;
                    const size_t next = e * each + 1 < right->length ? right->stride : 0;
                    float *row = ws->panels + c * words + (r * strip + e) * tile;
                    mpt__pack_row(p, at, next, mpt__min(tile, columns - c), row);
                }
}

/* Packs columns j .. j+columns of a part into panels (words,tile_n), filled up with zeros to whole ones. */
static void mpt__pack_right(const mpt__product *p, const mpt__right *right, size_t j, size_t columns, size_t words,
                            const mpt__workspace *ws) {
    if (right->stride == 1) mpt__pack_columns(p, right, j, columns, words, ws);
    else mpt__pack_rows(p, right, j, columns, words, ws);
}

/* left(rows,words) = elements l .. l+depth of rows i .. of a left matrix whose rows run along the depth */
static void mpt__copy_rows(const mpt__product *p, size_t i, size_t rows, size_t l, size_t depth,
                           const mpt__workspace *ws) {
    const size_t each = mpt__each(p), words = mpt__pieces(depth, each);
    size_t r;
    for (r = 0; r < rows; r++) {
        float *row = ws->left + r * words;
        if (depth % each) row[words - 1] = 0;
        mpt__fetch(p->ctx, p->a.data, (i + r) * p->a.stride + l, depth, sizeof(float) / each, row);
    }
}

/* left(words,rows) = the same for a matrix whose rows run along the rows of the result */
static void mpt__copy_columns(const mpt__product *p, size_t i, size_t rows, size_t l, size_t depth,
                              const mpt__workspace *ws) {
    static const uint16_t zeros[MPT__BLOCK_M] = {0};
    const size_t each = mpt__each(p), words = mpt__pieces(depth, each);
    size_t d;
    for (d = 0; d < words; d++) {
        const size_t at = (l + d * each) * p->a.stride + i;
        const uint16_t *low = (const uint16_t *)p->a.data.data + at;
        const uint16_t *high = 2 * d + 1 < depth ? low + p->a.stride : zeros;
        float *column = ws->left + d * rows;
        if (p->pairs) p->ctx->simd.pair(low, high, rows, (uint32_t *)(void *)column);
        else mpt__load(p->ctx, p->a.data, at, rows, column);
    }
}

/* Sets *left to elements l .. l+depth of at most `rows` rows of a matrix, from row i on: in place, or copied. Returns
   how many rows. */
static size_t mpt__left_matrix(const mpt__product *p, size_t i, size_t rows, size_t l, size_t depth,
                               const mpt__workspace *ws, mpt__left *left) {
    const size_t each = mpt__each(p), size = sizeof(float) / each, words = mpt__pieces(depth, each);
    size_t r, row = sizeof(float), line; /* bytes between rows of the result, and between rows of what is read */
    left->count = 1;
    left->length = words;
    left->stride = sizeof(float);
    ws->runs[0] = 0;
    if (mpt__in_place(p)) {
        const size_t first = p->a.along ? i * p->a.stride + l : l * p->a.stride + i;
        left->base = (const char *)p->a.data.data + first * size;
        line = p->a.stride * size;
    } else {
        rows = mpt__min(rows, MPT__LEFT_WORDS / words / MPT__GROUP * MPT__GROUP);
        line = (p->a.along ? words : rows) * sizeof(float);
        if (p->a.along) mpt__copy_rows(p, i, rows, l, depth, ws);
        else mpt__copy_columns(p, i, rows, l, depth, ws);
    }
    if (p->a.along) row = line;
    else left->stride = line;
    for (r = 0; r < rows; r++) ws->rows[r] = r * row;
    return rows;
}

/* -- Epilogue -- */

typedef struct mpt__epilogue { /* of rows i .. of c, columns j .. j+columns, whose sums are `stride` apart */
    const mpt__product *p;
    const mpt__workspace *ws;
    float *sums;
    size_t stride, i, j, columns;
} mpt__epilogue;

/* x += bias, then ReLU if asked for: all that most products need */
MPT__INLINE void mpt__bias_run(float *MPT__RESTRICT x, const float *MPT__RESTRICT bias, int relu) {
    size_t e;
    if (relu)
        for (e = 0; e < MPT__RUN; e++) x[e] = mpt__activate(MPT_RELU, x[e] + bias[e]);
    else
        for (e = 0; e < MPT__RUN; e++) x[e] += bias[e];
}

/* Scale, old content, bias and activation of a whole run of sums at (i,j), of which the first n belong to c */
MPT__INLINE void mpt__epilogue_run(const mpt__product *p, size_t i, size_t j, size_t n, float *x, const float *bias,
                                   float *room) {
    if (p->alpha != 1) {
        mpt__scale_run(room, p->alpha, x);
        memcpy(x, room, MPT__RUN * sizeof *x);
    }
    if (p->beta != 0) mpt__axpy_run(x, p->beta, mpt__read_run(p->ctx, p->c, i * p->ldc + j, n, room));
    if (bias) mpt__bias_run(x, bias, p->act == MPT_RELU);
    if (!bias || p->act != MPT_RELU) mpt__activate_run(p->act, x);
}

/* Computes rows begin .. end in place, then rounds and stores them, all at once if they are contiguous in c. */
MPT__INLINE void mpt__epilogue_task_body(void *arg, size_t begin, size_t end, int worker) {
    const mpt__epilogue *f = (const mpt__epilogue *)arg;
    const mpt__product *p = f->p;
    const size_t columns = f->columns, stride = f->stride;
    float *room = f->ws->room, *bias = NULL; /* of BLOCK_N columns at most */
    const int as_is = p->alpha == 1 && p->beta == 0 && p->act <= MPT_RELU, relu = p->act == MPT_RELU;
    size_t r, e;
    (void)worker;
    if (p->bias.data) {
        bias = room + 2 * MPT__RUN;
        mpt__load(p->ctx, p->bias, f->j, columns, bias);
    }
    if (as_is && bias && columns % MPT__RUN == 0) /* the usual case */
        for (r = begin; r < end; r++)
            for (e = 0; e < columns; e += MPT__RUN) mpt__bias_run(f->sums + r * stride + e, bias + e, relu);
    else if (!as_is || bias || relu)
        for (r = begin; r < end; r++)
            for (e = 0; e < columns; e += MPT__RUN) {
                const size_t n = mpt__min(columns - e, MPT__RUN);
                float *x = f->sums + r * stride + e, *run = n == MPT__RUN ? x : room + MPT__RUN;
                if (run != x) memcpy(run, x, n * sizeof *x); /* the next columns do not belong to this block */
                mpt__epilogue_run(p, f->i + r, f->j + e, n, run, mpt__floats_at(bias, e), room);
                if (run != x) memcpy(x, run, n * sizeof *x);
            }
    if (stride == columns && p->ldc == columns)
        mpt__store(p->ctx, p->c, (f->i + begin) * p->ldc + f->j, (end - begin) * columns, f->sums + begin * stride);
    else
        for (r = begin; r < end; r++)
            mpt__store(p->ctx, p->c, (f->i + r) * p->ldc + f->j, columns, f->sums + r * stride);
}
MPT__TASKS(mpt__epilogue_task)

static void mpt__epilogue_rows(const mpt__product *p, size_t i, size_t rows, size_t j, size_t columns, float *sums,
                               size_t stride, const mpt__workspace *ws) {
    mpt__epilogue f;
    f.p = p;
    f.ws = ws;
    f.sums = sums;
    f.stride = stride;
    f.i = i;
    f.j = j;
    f.columns = columns;
    MPT__TASK(p->ctx, mpt__epilogue_task)(&f, 0, rows, 0);
}

/* The epilogue of sums (rows,columns) whose transpose is stored in c: from row `first` on of a matrix, or of the taps
   of a slice. A slice with all channels and tap columns is contiguous in a filter; otherwise each tap is a piece. */
static void mpt__epilogue_transposed(const mpt__product *p, const mpt__kernel_slice *slice, size_t first, size_t rows,
                                     size_t j, size_t columns, const float *sums, const mpt__workspace *ws) {
    const size_t along = mpt__round_up(rows, MPT__RUN), C = p->image.channels, S = p->image.S;
    size_t r, some;
    p->ctx->simd.transpose(sums, p->columns, columns, along, ws->transposed);
    if (slice->C == C && slice->S == S) {
        const size_t at = slice->r * S * C + first;
        mpt__epilogue_rows(p, j, columns, at, rows, ws->transposed, along, ws);
        return;
    }
    for (r = 0; r < rows; r += some) {
        const size_t tap = (first + r) / slice->C, c = (first + r) % slice->C;
        const size_t at = ((slice->r + tap / slice->S) * S + slice->s + tap % slice->S) * C + slice->c + c;
        some = mpt__min(rows - r, slice->C - c);
        mpt__epilogue_rows(p, j, columns, at, some, ws->transposed + r, along, ws);
    }
}

/* -- Blocks -- */

typedef struct mpt__block { /* of the result: at (i,j) */
    size_t i, rows, j, columns;
    mpt__band band;          /* of a convolution, whose rows or depth are a band, */
    mpt__kernel_slice slice; /* and whose depth or rows are a slice */
} mpt__block;

/* Where tiles find a block's right operand: word w of column c, the first of a panel, is base[c * column + w * stride],
   and the panel's other columns follow it. */
typedef struct mpt__panels {
    const float *base;
    size_t column, stride;
} mpt__panels;

/* Whether tiles read the right operand in place, in the caller's array. Its words must be fp32 rows at one distance, of
   whole vectors. It pays if few tiles read a panel; if many do, a copy pays, because its words follow each other in
   memory. An L2 of 1 MiB with 8 ways holds 2^(20-i) rows whose distance is an odd multiple of 2^i bytes. */
static int mpt__right_in_place(const mpt__product *p, const mpt__right *right, const mpt__block *b) {
    const size_t apart = right->stride * sizeof(float), power = apart & (0 - apart), few = 8;
    size_t r;
    if (p->b.data.type != MPT_F32 || right->column_stride != 1 || b->columns % p->ctx->simd.half_n) return 0;
    if (b->rows > few * p->ctx->simd.tile_m || right->count * right->length > (1u << 20) / power) return 0;
    for (r = 1; r < right->count; r++)
        if (right->strips[r] - right->strips[r - 1] != right->length * right->stride) return 0;
    return 1;
}

/* The block's columns of a part, in place or packed. *packed: the panels already hold them */
static mpt__panels mpt__panels_of(const mpt__product *p, const mpt__right *right, const mpt__block *b, int *packed,
                                  const mpt__workspace *ws) {
    const size_t words = right->count * mpt__pieces(right->length, mpt__each(p));
    mpt__panels panels;
    panels.base = ws->panels;
    panels.column = words;
    panels.stride = p->ctx->simd.tile_n;
    if (mpt__right_in_place(p, right, b)) {
        panels.base = (const float *)p->b.data.data + right->strips[0] + b->j;
        panels.column = 1;
        panels.stride = right->stride;
    } else if (!*packed) {
        mpt__pack_right(p, right, b->j, b->columns, words, ws);
        *packed = 1;
    }
    return panels;
}

static void mpt__epilogue_block(const mpt__product *p, const mpt__block *b, size_t r, size_t rows, float *sums,
                                const mpt__workspace *ws) {
    if (p->transposed) mpt__epilogue_transposed(p, &b->slice, b->i + r, rows, b->j, b->columns, sums, ws);
    else mpt__epilogue_rows(p, b->i + r, rows, b->j, b->columns, sums, p->columns, ws);
}

/* Multiplies `rows` rows of left, rows r .. of a block, with all panels. After the last part comes the epilogue. */
static void mpt__product_tiles(const mpt__product *p, const mpt__block *b, const mpt__left *left, size_t r, size_t rows,
                               const mpt__panels *panels, size_t part, const mpt__workspace *ws) {
    const mpt__simd *simd = &p->ctx->simd;
    const int last = part + 1 == p->parts;
    size_t g, c, t;
    for (g = 0; g < rows; g += p->group) {
        const size_t group = mpt__min(p->group, rows - g);
        float *sums = ws->sums;
        if (p->parts > 1) sums += (r + g) * p->columns; /* sums are kept from part to part */
        for (c = 0; c < b->columns; c += simd->tile_n) {
            const size_t across = mpt__min(simd->tile_n, b->columns - c);
            const float *panel = panels->base + c * panels->column;
            const mpt__tile tile = simd->tile[p->pairs][across <= simd->half_n];
            for (t = 0; t < group; t += simd->tile_m) {
                const size_t down = mpt__min(simd->tile_m, group - t);
                float *out = sums + t * p->columns + c;
                if (p->plain && across == simd->tile_n && down == simd->tile_m)
                    tile(left, g + t, panel, panels->stride,
                         (float *)p->c.data + (b->i + r + g + t) * p->ldc + b->j + c, p->ldc, part || p->beta != 0);
                else {
                    tile(left, g + t, panel, panels->stride, out, p->columns, part > 0);
                    if (p->plain && last) /* the edges of a block */
                        mpt__epilogue_rows(p, b->i + r + g + t, down, b->j + c, across, out, p->columns, ws);
                }
            }
        }
        if (last && !p->plain) mpt__epilogue_block(p, b, r + g, group, sums, ws);
    }
}

/* Adds a part to a block of a convolution. *packed: the panels hold this part from an earlier block */
static void mpt__image_part(const mpt__product *p, mpt__block *b, size_t part, int *packed, const mpt__workspace *ws) {
    const mpt__image *image = &p->image;
    mpt__left left;
    mpt__right right;
    mpt__panels panels;
    mpt__halo h;
    size_t r;
    if (image->kind == MPT__OUTPUTS_ARE_DEPTH) {
        b->band = mpt__band_of(image, part);
        right = mpt__right_outputs(p, &b->band, ws);
    } else {
        b->slice = mpt__kernel_slice_of(image, part);
        if (image->flipped) right = mpt__right_flipped(p, &b->slice, ws);
        else right = mpt__right_filters(p, &b->slice, ws);
    }
    panels = mpt__panels_of(p, &right, b, packed, ws);
    h = mpt__halo_of(image, &b->band, &b->slice, p->pairs, image->kind == MPT__OUTPUTS_ARE_ROWS ? mpt__each(p) : 1);
    mpt__halo_fill(p->ctx, image, &b->band, &b->slice, &h, ws);
    left.base = (const char *)ws->left;
    left.rows = ws->rows;
    left.runs = ws->runs;
    if (image->kind == MPT__OUTPUTS_ARE_ROWS) mpt__image_rows(image, &b->band, &b->slice, &h, ws, &left);
    else mpt__image_taps(image, &b->band, &b->slice, &h, ws, &left);
    for (r = b->rows; r % p->ctx->simd.tile_m; r++) ws->rows[r] = ws->rows[b->rows - 1];
    mpt__product_tiles(p, b, &left, 0, b->rows, &panels, part, ws);
}

static void mpt__matrix_part(const mpt__product *p, const mpt__block *b, size_t part, int *packed,
                             const mpt__workspace *ws) {
    const size_t l = part * p->deepest, depth = mpt__min(p->deepest, p->k - l);
    const mpt__right right = mpt__right_matrix(p, l, depth, ws);
    const mpt__panels panels = mpt__panels_of(p, &right, b, packed, ws);
    size_t r, some, t;
    for (r = 0; r < b->rows; r += some) {
        mpt__left left;
        left.base = (const char *)ws->left;
        left.rows = ws->rows;
        left.runs = ws->runs;
        some = mpt__left_matrix(p, b->i + r, b->rows - r, l, depth, ws, &left);
        for (t = some; t % p->ctx->simd.tile_m; t++) ws->rows[t] = ws->rows[some - 1];
        mpt__product_tiles(p, b, &left, r, some, &panels, part, ws);
    }
}

/* A block of a product without depth: all sums are 0. */
static void mpt__block_empty(const mpt__product *p, const mpt__block *b, const mpt__workspace *ws) {
    size_t r;
    for (r = 0; r < b->rows; r += p->group) {
        memset(ws->sums, 0, p->group * p->columns * sizeof *ws->sums);
        mpt__epilogue_block(p, b, r, mpt__min(p->group, b->rows - r), ws->sums, ws);
    }
}

static size_t mpt__blocks_down(const mpt__product *p) {
    if (p->image.kind == MPT__OUTPUTS_ARE_ROWS) return mpt__bands(&p->image);
    if (p->image.kind == MPT__OUTPUTS_ARE_DEPTH) return mpt__kernel_slices(&p->image);
    return mpt__pieces(p->m, p->rows);
}

static mpt__block mpt__block_of(const mpt__product *p, size_t index, size_t down) {
    const size_t row = index % down;
    mpt__block b = MPT_ZERO;
    b.j = index / down * p->columns;
    b.columns = mpt__min(p->columns, p->n - b.j);
    if (p->image.kind == MPT__OUTPUTS_ARE_ROWS) {
        b.band = mpt__band_of(&p->image, row);
        b.i = b.band.row * p->image.Q + b.band.q;
        b.rows = b.band.rows * b.band.columns;
    } else if (p->image.kind == MPT__OUTPUTS_ARE_DEPTH) {
        b.slice = mpt__kernel_slice_of(&p->image, row);
        b.rows = b.slice.R * b.slice.S * b.slice.C;
    } else {
        b.i = row * p->rows;
        b.rows = mpt__min(p->rows, p->m - b.i);
    }
    return b;
}

/* The end of the blocks from `begin` on that share packed panels: those of the same columns. If the depth has several
   parts, blocks can share only if each keeps its sums in c, which whole tiles of a plain matrix do. */
static size_t mpt__blocks_together(const mpt__product *p, size_t begin, size_t end, size_t down) {
    const int tiled = p->plain && p->m % p->ctx->simd.tile_m == 0 && p->n % p->ctx->simd.tile_n == 0;
    if (p->parts > 1 && (!tiled || p->image.kind)) return begin + 1;
    return mpt__min(end, (begin / down + 1) * down);
}

static void mpt__product_task(void *arg, size_t begin, size_t end, int worker) {
    const mpt__product *p = (const mpt__product *)arg;
    const size_t down = mpt__blocks_down(p);
    const mpt__workspace ws = mpt__workspace_of(p->ctx, worker);
    size_t last, i, part;
    for (; begin < end; begin = last) {
        last = mpt__blocks_together(p, begin, end, down);
        for (part = 0; part < p->parts; part++) {
            int packed = 0;
            for (i = begin; i < last; i++) {
                mpt__block b = mpt__block_of(p, i, down);
                if (p->image.kind) mpt__image_part(p, &b, part, &packed, &ws);
                else mpt__matrix_part(p, &b, part, &packed, &ws);
            }
        }
        if (!p->parts)
            for (i = begin; i < last; i++) {
                const mpt__block b = mpt__block_of(p, i, down);
                mpt__block_empty(p, &b, &ws);
            }
    }
}

/* -- Sizes of blocks and parts -- */

/* Whether the halo of a slice and of so many lines and columns of outputs fits, with `some` elements per pixel */
static int mpt__halo_fits(const mpt__image *image, size_t lines, size_t columns, size_t some) {
    const size_t width = mpt__halo_width(image, columns, image->slice_S);
    return width <= image->widest / some &&
           mpt__halo_rows(image, lines, image->slice_R) <= MPT__LEFT_WORDS / width / some;
}

/* Sets the size of bands: `most` outputs, or as many as fit. Outputs that are rows of the result must be consecutive
   there, so a band is either a part of one line or whole lines. */
static void mpt__choose_band(mpt__image *image, size_t most, size_t some) {
    size_t lines = 1, images = 1;
    while (image->columns > 1 && !mpt__halo_fits(image, 1, image->columns, some))
        image->columns = mpt__max(image->columns / 4 * 2, 1);
    if (image->columns == image->Q || image->kind == MPT__OUTPUTS_ARE_DEPTH) {
        lines = mpt__min(most / image->columns, image->P);
        while (lines > 1 && !mpt__halo_fits(image, lines, image->columns, some)) lines--;
        lines = mpt__evenly(image->P, lines, 1);
        if (lines == image->P) {
            const size_t rows = mpt__halo_rows(image, lines, image->slice_R);
            const size_t width = mpt__halo_width(image, image->columns, image->slice_S);
            images = mpt__min(most / image->columns / lines, MPT__LEFT_WORDS / width / some / rows);
            images = mpt__min(mpt__max(images, 1), image->N);
        }
    }
    image->lines = lines;
    image->images = images;
}

/* Sets the size of slices: at most `words` words of taps and channels, `each` channels in a word. */
static void mpt__choose_slice(mpt__image *image, size_t words, size_t each) {
    const size_t taps = image->R * image->S, least = 8;
    size_t pixel;
    image->slice_R = image->R;
    image->slice_S = image->S;
    image->slice_C = image->channels;
    if (taps <= words / mpt__pieces(image->channels, each)) return;
    image->slice_C = mpt__evenly(image->channels, mpt__max(words / taps, least) * each, each);
    image->slice_C = mpt__min(image->slice_C, image->channels);
    pixel = mpt__pieces(image->slice_C, each);
    if (taps <= words / pixel) return;
    image->slice_S = mpt__min(image->S, words / pixel);
    image->slice_R = words / pixel / image->slice_S;
}

/* Takes fewer channels, tap rows or taps, until the halo of `columns` outputs fits. */
static void mpt__narrow_slice(mpt__image *image, size_t columns, size_t each) {
    while (!mpt__halo_fits(image, 1, columns, mpt__pieces(image->slice_C, each)))
        if (image->slice_C > 8 * each) image->slice_C = mpt__evenly(image->slice_C, (image->slice_C + 1) / 2, each);
        else if (image->slice_R > 1) image->slice_R = (image->slice_R + 1) / 2;
        else if (image->slice_S > 1) image->slice_S = (image->slice_S + 1) / 2;
        else return; /* a single tap: bands will be short */
}

/* Rows of an epilogue: as many as keep their sums in L1 (8 KiB). If panels are deep and many, a few tiles, which then
   read a panel together (with more of them the writes would be scattered). If they are transposed, whole runs. */
static size_t mpt__group(const mpt__product *p) {
    const size_t tile = p->ctx->simd.tile_m, fit = mpt__min(2048 / p->columns, MPT__GROUP) / tile * tile;
    if (p->transposed && MPT__RUN % tile == 0) return MPT__RUN;
    if (p->transposed) return MPT__GROUP;
    if (!p->image.kind && p->k > 512 && p->columns > 64) return MPT__FEW_TILES;
    return mpt__max(fit, tile);
}

/* Whether there are so few blocks that some threads would get more work than others */
static int mpt__few(size_t blocks, size_t threads) { return blocks < 4 * threads && blocks % threads; }

/* Blocks are bands, parts of the depth are slices. */
static void mpt__partition_rows(mpt__product *p, size_t threads) {
    mpt__image *image = &p->image;
    const size_t each = mpt__each(p), taps = image->R * image->S;
    const size_t all = taps * mpt__pieces(image->channels, each);
    size_t across, words = MPT__DEEP, pixel;
    if (all <= MPT__DEEPEST) words = MPT__DEEPEST;
    image->widest = MPT__LEFT_WORDS;
    image->columns = mpt__evenly(image->Q, MPT__BLOCK_M, 1);
    mpt__choose_slice(image, words, each);
    mpt__narrow_slice(image, mpt__min(image->columns, 16), each);
    pixel = mpt__pieces(image->slice_C, each);
    words = image->slice_R * image->slice_S * pixel;
    mpt__choose_band(image, MPT__BLOCK_M, pixel);
    p->columns = mpt__evenly(p->n, mpt__min(MPT__BLOCK_N, MPT__RIGHT_WORDS / words / MPT__RUN * MPT__RUN), MPT__RUN);
    p->parts = mpt__kernel_slices(image);
    across = mpt__pieces(p->n, p->columns);
    while ((image->images > 1 || image->lines > 1) && mpt__few(mpt__bands(image) * across, threads))
        if (image->images > 1) image->images = (image->images + 1) / 2;
        else image->lines = (image->lines + 1) / 2;
}

/* Blocks are slices, parts of the depth are bands. */
static void mpt__partition_depth(mpt__product *p, size_t threads) {
    mpt__image *image = &p->image;
    size_t most, blocks, some;
    p->columns = mpt__evenly(p->n, MPT__BLOCK_N, MPT__RUN);
    most = mpt__min(MPT__BLOCK_M, MPT__RIGHT_WORDS / p->columns);
    image->widest = p->pairs ? 2 * MPT__LINE_WORDS : MPT__LEFT_WORDS;
    if (p->pairs && image->Q > 1) image->alone = image->Q % 2;
    image->columns = mpt__evenly(image->Q - image->alone, most / 2 * 2, 2);
    image->columns = mpt__min(image->columns, image->Q - image->alone);
    mpt__choose_slice(image, MPT__BLOCK_M, 1);
    mpt__narrow_slice(image, mpt__min(image->columns, 16), 1);
    mpt__choose_band(image, most, image->slice_C);
    p->parts = mpt__bands(image);
    blocks = mpt__kernel_slices(image) * mpt__pieces(p->n, p->columns);
    if (!mpt__few(blocks, threads)) return;
    some = mpt__pieces(image->channels, mpt__pieces(mpt__kernel_slices(image), threads) * threads);
    if (some >= 8) image->slice_C = mpt__min(some, image->slice_C);
    else if (p->columns > MPT__RUN) p->columns = mpt__evenly(p->columns, mpt__pieces(p->columns, threads), MPT__RUN);
}

/* Blocks are rectangles of c. If they are few, the longer side gets as many of them as the threads share equally. */
static void mpt__partition_matrix(mpt__product *p, size_t threads) {
    const size_t each = mpt__each(p), down = mpt__pieces(p->m, MPT__BLOCK_M), across = mpt__pieces(p->n, MPT__BLOCK_N);
    size_t most = mpt__in_place(p) ? MPT__DEEPEST : MPT__DEEP;
    p->rows = MPT__BLOCK_M;
    p->columns = mpt__evenly(mpt__max(p->n, 1), MPT__BLOCK_N, MPT__RUN);
    most = mpt__min(MPT__RIGHT_WORDS / p->columns, most);
    if (p->k) {
        p->deepest = mpt__evenly(p->k, most / 8 * 8 * each, 8); /* whole pairs and transposes */
        p->parts = mpt__pieces(p->k, p->deepest);
    }
    if (!mpt__few(down * across, threads)) return;
    if (across > down) p->columns = mpt__round_up(mpt__pieces(p->n, mpt__round_up(across, threads)), MPT__RUN);
    else p->rows = mpt__round_up(mpt__pieces(p->m, mpt__round_up(down, threads)), p->ctx->simd.tile_m);
}

/* Exchanges the operands. The right one is packed, and transposed where necessary, so it should be the smaller one. */
static void mpt__product_transpose(mpt__product *p) {
    const mpt__matrix a = p->a;
    const size_t m = p->m;
    p->a = p->b;
    p->b = a;
    p->m = p->n;
    p->n = m;
    p->transposed = !p->transposed;
}

static mpt_result mpt__product_do(mpt__product *p) {
    const mpt__outputs image = p->image.kind;
    mpt_dtype left;
    size_t work, threads;
    if (!image && p->a.along && p->b.along &&
        p->n * mpt__pieces(p->m, MPT__BLOCK_M) > p->m * mpt__pieces(p->n, MPT__BLOCK_M))
        mpt__product_transpose(p);
    left = image ? p->image.data.type : p->a.data.type;
    p->plain = !p->transposed && p->k && p->c.type == MPT_F32 && p->alpha == 1 && (p->beta == 0 || p->beta == 1) &&
               !p->bias.data && p->act == MPT_IDENTITY;
    p->pairs = p->ctx->simd.tile[1][0] && left == MPT_BF16 && p->b.data.type == MPT_BF16;
    if (!mpt__size_mul(&work, p->m * p->n, p->k / 4 + 1)) work = (size_t)-1;
    threads = mpt__threads_for(p->ctx, work);
    if (image == MPT__OUTPUTS_ARE_ROWS) mpt__partition_rows(p, threads);
    else if (image == MPT__OUTPUTS_ARE_DEPTH) mpt__partition_depth(p, threads);
    else mpt__partition_matrix(p, threads);
    p->group = mpt__group(p);
    mpt__parallel(p->ctx, mpt__blocks_down(p) * mpt__pieces(p->n, p->columns), work, mpt__product_task, p);
    return MPT_OK;
}

static mpt__matrix mpt__matrix_of(mpt_array data, size_t stride, int along) {
    mpt__matrix matrix;
    matrix.data = data;
    matrix.stride = stride;
    matrix.along = along;
    return matrix;
}

static mpt__product mpt__gemm_product(mpt_context *ctx, const mpt_gemm_op *op) {
    mpt__product p = MPT_ZERO;
    p.ctx = ctx;
    p.m = op->m;
    p.n = op->n;
    p.k = op->k;
    p.a = mpt__matrix_of(op->a, op->lda, !op->trans_a);
    p.b = mpt__matrix_of(op->b, op->ldb, op->trans_b != 0);
    p.alpha = op->alpha;
    p.beta = op->beta;
    p.c = op->c;
    p.ldc = op->ldc;
    p.bias = op->bias;
    p.act = op->act;
    return p;
}

static void mpt__column_sums(mpt_context *ctx, size_t rows, size_t C, mpt_array x, float beta, mpt_array sums);

static mpt_result mpt__cpu_gemm(mpt_context *ctx, const mpt_gemm_op *op) {
    mpt__product p = mpt__gemm_product(ctx, op);
    if (op->a_sums.data) mpt__column_sums(ctx, op->k, op->m, op->a, op->beta, op->a_sums);
    return mpt__product_do(&p);
}

/* The array from its element i on. */
static mpt_array mpt__array_at(mpt_array a, size_t i) {
    if (a.data) a.data = (char *)a.data + i * mpt_dtype_size(a.type);
    return a;
}

/* -- Convolutions -- */

/* The image that a pass reads through the kernel: x, or dy for the gradient of x. Channels of one group. */
static mpt__image mpt__image_of(const mpt_conv2d_op *op, size_t group) {
    const mpt_conv2d_shape *shape = &op->shape;
    mpt__image image = MPT_ZERO;
    image.kind = MPT__OUTPUTS_ARE_ROWS;
    if (op->pass == MPT_BACKWARD_WEIGHT) image.kind = MPT__OUTPUTS_ARE_DEPTH;
    image.N = shape->N;
    image.R = shape->R;
    image.S = shape->S;
    image.dilation_h = shape->dilation_h;
    image.dilation_w = shape->dilation_w;
    if (op->pass == MPT_BACKWARD_DATA) {
        image.data = op->y;
        image.H = op->P;
        image.W = op->Q;
        image.C = shape->K;
        image.P = shape->H;
        image.Q = shape->W;
        image.stride_h = 1;
        image.stride_w = 1;
        image.up_h = shape->stride_h;
        image.up_w = shape->stride_w;
        image.pad_top = (ptrdiff_t)((shape->R - 1) * shape->dilation_h) - (ptrdiff_t)shape->padding_h;
        image.pad_left = (ptrdiff_t)((shape->S - 1) * shape->dilation_w) - (ptrdiff_t)shape->padding_w;
        image.flipped = 1;
    } else {
        image.data = op->x;
        image.H = shape->H;
        image.W = shape->W;
        image.C = shape->C;
        image.P = op->P;
        image.Q = op->Q;
        image.stride_h = shape->stride_h;
        image.stride_w = shape->stride_w;
        image.up_h = 1;
        image.up_w = 1;
        image.pad_top = (ptrdiff_t)shape->padding_h;
        image.pad_left = (ptrdiff_t)shape->padding_w;
    }
    image.channels = image.C / shape->groups;
    image.first = group * image.channels;
    return image;
}

/* One group of channels of a convolution as a product; C and K are those of the group. A 1x1 kernel that reads every
   pixel needs no image. */
static mpt__product mpt__conv2d_product(mpt_context *ctx, const mpt_conv2d_op *op, size_t group) {
    const mpt_conv2d_shape *shape = &op->shape;
    const size_t C = shape->C / shape->groups, K = shape->K / shape->groups, patch = shape->R * shape->S * C;
    const mpt_array w = mpt__array_at(op->w, group * K * patch);
    const mpt_array x = mpt__array_at(op->x, group * C), y = mpt__array_at(op->y, group * K);
    mpt__product p = MPT_ZERO;
    p.ctx = ctx;
    p.alpha = 1;
    p.beta = op->beta;
    if (op->pass == MPT_FORWARD) p.bias = mpt__array_at(op->bias, group * K);
    p.act = op->act;
    if (!mpt__conv2d_is_product(shape)) p.image = mpt__image_of(op, group);
    if (op->pass == MPT_FORWARD) { /* y(NPQ,K) = patches(NPQ,RSC) w(K,RSC)^T */
        p.m = shape->N * op->P * op->Q;
        p.n = K;
        p.k = patch;
        p.a = mpt__matrix_of(x, shape->C, 1);
        p.b = mpt__matrix_of(w, patch, 1);
        p.c = y;
        p.ldc = shape->K;
    } else if (op->pass == MPT_BACKWARD_DATA) { /* dx(NHW,C) = patches of dy(NHW,RSK) filters turned about(RSK,C) */
        p.m = shape->N * shape->H * shape->W;
        p.n = C;
        p.k = shape->R * shape->S * K;
        p.a = mpt__matrix_of(y, shape->K, 1);
        p.b = mpt__matrix_of(w, patch, 0);
        p.c = x;
        p.ldc = shape->C;
    } else { /* dw(K,RSC) = (patches(NPQ,RSC)^T dy(NPQ,K))^T */
        p.m = patch;
        p.n = K;
        p.k = shape->N * op->P * op->Q;
        p.a = mpt__matrix_of(x, shape->C, 0);
        p.b = mpt__matrix_of(y, shape->K, 0);
        p.c = w;
        p.ldc = patch;
        p.transposed = 1;
    }
    return p;
}

/* -- Depthwise convolution: with one filter per channel there is no product. A run of channels at a time. -- */

typedef struct mpt__depthwise { /* bands of outputs, whose halos have whole runs of channels */
    mpt_context *ctx;
    const mpt_conv2d_op *op;
    const mpt__product *finish; /* holds the image, and how y, dx or dw is stored */
} mpt__depthwise;

/* Most taps: their filters, or their sums in double, are kept where panels would be. */
enum { MPT__DEPTHWISE_TAPS = MPT__RIGHT_WORDS / (2 * MPT__RUN) };

/* The halo of a band: channels c .. of a run, in fp32 */
static mpt__halo mpt__depthwise_halo(const mpt__depthwise *d, const mpt__band *band, size_t c,
                                     const mpt__workspace *ws) {
    mpt__kernel_slice slice = MPT_ZERO;
    mpt__halo h;
    slice.R = d->finish->image.R;
    slice.S = d->finish->image.S;
    slice.c = c;
    slice.C = mpt__min(d->op->shape.C - c, MPT__RUN);
    h = mpt__halo_of(&d->finish->image, band, &slice, 0, MPT__RUN);
    mpt__halo_fill(d->ctx, &d->finish->image, band, &slice, &h, ws);
    return h;
}

/* sum += the taps of an output, the first of them at x, each channel times its filter */
MPT__INLINE void mpt__depthwise_taps(const mpt__image *image, const mpt__halo *h, const char *x, const float *w,
                                     float *sum) {
    const size_t down = image->dilation_h * h->pitch, right = image->dilation_w * h->pixel;
    size_t r, s;
    for (r = 0; r < image->R; r++)
        for (s = 0; s < image->S; s++, w += MPT__RUN)
            mpt__mul_add_run(sum, (const float *)(const void *)(x + r * down + s * right), w);
}

/* y or dx */
MPT__INLINE void mpt__depthwise_task_body(void *arg, size_t begin, size_t end, int worker) {
    const mpt__depthwise *d = (const mpt__depthwise *)arg;
    const mpt__image *image = &d->finish->image;
    const size_t C = d->op->shape.C, taps = image->R * image->S, bands = mpt__bands(image);
    const mpt__workspace ws = mpt__workspace_of(d->ctx, worker);
    float *w = ws.panels; /* (taps, RUN): channels side by side */
    size_t row, q, t, e;
    for (; begin < end; begin++) {
        const size_t c = begin / bands * MPT__RUN, run = mpt__min(C - c, MPT__RUN);
        const mpt__band band = mpt__band_of(image, begin % bands);
        const mpt__halo h = mpt__depthwise_halo(d, &band, c, &ws);
        float *sums = ws.sums;
        for (e = 0; e < run; e++)
            for (t = 0; t < taps; t++)
                w[t * MPT__RUN + e] = mpt__get(d->ctx, d->op->w, (c + e) * taps + (image->flipped ? taps - 1 - t : t));
        for (row = 0; row < band.rows; row++) {
            const char *line = (char *)ws.left + mpt__halo_line(image, &h, row);
            for (q = 0; q < band.columns; q++, sums += MPT__RUN) {
                float sum[MPT__RUN] = {0};
                mpt__depthwise_taps(image, &h, line + q * image->stride_w * h.pixel, w, sum);
                memcpy(sums, sum, sizeof sum);
            }
        }
        mpt__epilogue_rows(d->finish, band.row * image->Q + band.q, band.rows * band.columns, c, run, ws.sums, MPT__RUN,
                           &ws);
    }
}
MPT__TASKS(mpt__depthwise_task)

/* total += sum, then sum = 0 */
MPT__INLINE void mpt__total_run(double *MPT__RESTRICT total, float *MPT__RESTRICT sum) {
    size_t e;
    for (e = 0; e < MPT__RUN; e++) {
        total[e] += (double)sum[e];
        sum[e] = 0;
    }
}

/* dw(c,taps) of runs of channels: few outputs are summed in fp32, and these sums in double */
MPT__INLINE void mpt__depthwise_weights_task_body(void *arg, size_t begin, size_t end, int worker) {
    const mpt__depthwise *d = (const mpt__depthwise *)arg;
    const mpt__image *image = &d->finish->image;
    const size_t C = d->op->shape.C, S = image->S, taps = image->R * S, bands = mpt__bands(image);
    const mpt__workspace ws = mpt__workspace_of(d->ctx, worker);
    double *total = (double *)(void *)ws.panels; /* (taps, RUN) */
    float *room = ws.room;
    size_t b, row, q, t, e, few;
    for (; begin < end; begin++) {
        const size_t c = begin * MPT__RUN, run = mpt__min(C - c, MPT__RUN);
        memset(total, 0, taps * MPT__RUN * sizeof *total);
        for (b = 0; b < bands; b++) {
            const mpt__band band = mpt__band_of(image, b);
            const mpt__halo h = mpt__depthwise_halo(d, &band, c, &ws);
            for (row = 0; row < band.rows; row++)
                for (q = 0; q < band.columns; q += few) {
                    const char *first =
                        (char *)ws.left + mpt__halo_line(image, &h, row) + q * image->stride_w * h.pixel;
                    const size_t at = ((band.row + row) * image->Q + band.q + q) * C + c;
                    float sum[MPT__RUN] = {0}, *dy = ws.sums;
                    few = mpt__min(band.columns - q, 8);
                    for (e = 0; e < few; e++)
                        memcpy(dy + e * MPT__RUN, mpt__read_run(d->ctx, d->op->y, at + e * C, run, room),
                               MPT__RUN * sizeof *dy);
                    for (t = 0; t < taps; t++) {
                        const char *x =
                            first + t / S * image->dilation_h * h.pitch + t % S * image->dilation_w * h.pixel;
                        for (e = 0; e < few; e++)
                            mpt__mul_add_run(sum, (const float *)(const void *)(x + e * image->stride_w * h.pixel),
                                             dy + e * MPT__RUN);
                        mpt__total_run(total + t * MPT__RUN, sum);
                    }
                }
        }
        for (e = 0; e < run; e++)
            for (t = 0; t < taps; t++) ws.sums[e * taps + t] = (float)total[t * MPT__RUN + e];
        mpt__epilogue_rows(d->finish, c, run, 0, taps, ws.sums, taps, &ws);
    }
}
MPT__TASKS(mpt__depthwise_weights_task)

/* Returns 0 if the halo of one output does not fit: then each channel is a product. */
static int mpt__depthwise_do(mpt_context *ctx, const mpt_conv2d_op *op) {
    const mpt_conv2d_shape *shape = &op->shape;
    const size_t runs = mpt__pieces(shape->C, MPT__RUN),
                 work = shape->N * op->P * op->Q * shape->C * shape->R * shape->S;
    mpt__product finish = mpt__conv2d_product(ctx, op, 0);
    mpt__image *image = &finish.image;
    mpt__depthwise d;
    d.ctx = ctx;
    d.op = op;
    d.finish = &finish;
    *image = mpt__image_of(op, 0);
    image->channels = shape->C;
    image->slice_R = shape->R;
    image->slice_S = shape->S;
    image->widest = MPT__LEFT_WORDS;
    image->columns = mpt__evenly(image->Q, MPT__BLOCK_M, 1);
    mpt__choose_band(image, MPT__BLOCK_M, MPT__RUN);
    if (!mpt__halo_fits(image, 1, image->columns, MPT__RUN) || shape->R * shape->S > MPT__DEPTHWISE_TAPS) return 0;
    if (op->pass == MPT_BACKWARD_WEIGHT)
        mpt__parallel(ctx, runs, work, MPT__TASK(ctx, mpt__depthwise_weights_task), &d);
    else mpt__parallel(ctx, runs * mpt__bands(image), work, MPT__TASK(ctx, mpt__depthwise_task), &d);
    return 1;
}

static mpt_result mpt__cpu_conv2d(mpt_context *ctx, const mpt_conv2d_op *op) {
    const mpt_conv2d_shape *shape = &op->shape;
    size_t group;
    if (op->pass == MPT_BACKWARD_WEIGHT && op->bias.data)
        mpt__column_sums(ctx, shape->N * op->P * op->Q, shape->K, op->y, op->beta, op->bias);
    if (shape->groups > 1 && shape->groups == shape->C && shape->C == shape->K && mpt__depthwise_do(ctx, op))
        return MPT_OK;
    for (group = 0; group < shape->groups; group++) {
        mpt__product p = mpt__conv2d_product(ctx, op, group);
        MPT__TRY(mpt__product_do(&p));
    }
    return MPT_OK;
}

/* -- Elementwise -- */

/* The argument of the tasks below. */
typedef struct mpt__work {
    mpt_context *ctx;
    const void *op;
} mpt__work;

/* out[i..i+n) = x(n) with any rounding, to a type narrower than fp32 */
static void mpt__store_rounded(const mpt_map_op *op, size_t i, size_t n, const float *x) {
    const mpt_rounding r = op->rounding;
    uint8_t *byte = (uint8_t *)op->out.data + i;
    uint16_t *half = (uint16_t *)op->out.data + i;
    size_t e;
    for (e = 0; e < n; e++) {
        uint32_t bits, random = 0;
        if (r.round == MPT_ROUND_STOCHASTIC) random = mpt_hash(r.seed, r.step, r.tensor, i + e);
        bits = mpt_narrow(x[e], op->out.type, r.round, r.overflow, random);
        if (op->out.type <= MPT_BF16) half[e] = (uint16_t)bits;
        else byte[e] = (uint8_t)bits;
    }
}

/* One side of nearly every cast is fp32: the bulk loops then work on the arrays themselves. Other casts go through
   fp32, a run at a time. */
static void mpt__cast_elements(const mpt_context *ctx, const mpt_map_op *op, size_t i, size_t n) {
    const int usual = op->rounding.round == MPT_ROUND_NEAREST && op->rounding.overflow == MPT_OVERFLOW_INF;
    float run[MPT__RUN];
    size_t some;
    if (op->out.type == MPT_F32) mpt__load(ctx, op->a, i, n, (float *)op->out.data + i);
    else if (op->a.type == MPT_F32 && usual) mpt__store(ctx, op->out, i, n, (const float *)op->a.data + i);
    else
        for (; n; n -= some, i += some) {
            some = mpt__min(n, MPT__RUN);
            mpt__load(ctx, op->a, i, some, run);
            if (usual) mpt__store(ctx, op->out, i, some, run);
            else mpt__store_rounded(op, i, some, run);
        }
}

/* out[e] = x[e], times the slope of a leaky ReLU where saved[e] is not positive; out may be x. */
MPT__INLINE void mpt__leaky_run(const mpt_map_op *op, float *out, const float *saved, const float *x) {
    const float slope = mpt__map_slope(op);
    size_t e;
    for (e = 0; e < MPT__RUN; e++) out[e] = mpt__leaky(slope, saved[e], x[e]);
}

/* Any map except casts and bytes. In an addition beta scales b, otherwise the old content; an activation ignores it. */
MPT__INLINE void mpt__map_run(const mpt_context *ctx, const mpt_map_op *op, size_t i, size_t n) {
    const mpt_array old = op->map == MPT_MAP_ADD ? op->b : op->out;
    const uint64_t step = op->mask.step ? *op->mask.step : 0;
    float out[MPT__RUN], room[2][MPT__RUN];
    const float *a = mpt__read_run(ctx, op->a, i, n, room[0]);
    size_t e;
    if (op->map == MPT_MAP_ACTIVATION_GRADIENT) {
        const float *dy = mpt__read_run(ctx, op->b, i, n, room[1]);
        if (op->act == MPT_LEAKY_RELU) mpt__leaky_run(op, out, a, dy);
        else mpt__gradient_run(op->act, out, a, dy);
    } else mpt__scale_run(out, 1, a);
    if (op->map == MPT_MAP_DROPOUT)
        for (e = 0; e < n; e++) out[e] *= mpt__mask_factor(&op->mask, step, i + e);
    if (op->beta != 0 && op->map != MPT_MAP_ACTIVATION)
        mpt__axpy_run(out, op->beta, mpt__read_run(ctx, old, i, n, room[0]));
    if (op->map == MPT_MAP_ACTIVATION || op->map == MPT_MAP_ADD) {
        if (op->act == MPT_LEAKY_RELU) mpt__leaky_run(op, out, out, out);
        else mpt__activate_run(op->act, out);
    }
    mpt__write_run(ctx, op->out, i, n, out);
}

/* out[i..i+n) from bytes. The channels of a run follow one another, starting again after the last. */
MPT__INLINE void mpt__bytes_run(const mpt_context *ctx, const mpt_map_op *op, size_t i, size_t n) {
    const uint8_t *byte = (const uint8_t *)op->a.data + i;
    float out[MPT__RUN];
    size_t e, c = i % op->C;
    if (op->C == 1 && n == MPT__RUN) {
        const float scale = op->channels[0], shift = op->channels[1];
        for (e = 0; e < MPT__RUN; e++) out[e] = mpt__add_rn(mpt__mul_rn((float)byte[e], scale), shift);
    } else {
        for (e = 0; e < n; e++) {
            out[e] = mpt__of_byte((float)byte[e], op->channels, op->C, c);
            if (++c == op->C) c = 0;
        }
    }
    mpt__write_run(ctx, op->out, i, n, out);
}

static void mpt__cast_task(void *arg, size_t begin, size_t end, int worker) {
    const mpt__work *w = (const mpt__work *)arg;
    const mpt_map_op *op = (const mpt_map_op *)w->op;
    (void)worker;
    mpt__cast_elements(w->ctx, op, begin * MPT__RUN, mpt__min(end * MPT__RUN, op->n) - begin * MPT__RUN);
}

MPT__INLINE void mpt__map_task_body(void *arg, size_t begin, size_t end, int worker) {
    const mpt__work *w = (const mpt__work *)arg;
    const mpt_map_op *op = (const mpt_map_op *)w->op;
    (void)worker;
    for (; begin < end; begin++) {
        const size_t n = mpt__min(op->n - begin * MPT__RUN, MPT__RUN);
        if (op->map == MPT_MAP_BYTES) mpt__bytes_run(w->ctx, op, begin * MPT__RUN, n);
        else mpt__map_run(w->ctx, op, begin * MPT__RUN, n);
    }
}
MPT__TASKS(mpt__map_task)

/* Whether each element of the result is 0 or dy, bit for bit: the gradient of a ReLU, all in one 16-bit type */
static int mpt__map_selects(const mpt_map_op *op) {
    return op->map == MPT_MAP_ACTIVATION_GRADIENT && op->act == MPT_RELU && op->beta == 0 && op->a.type == op->b.type &&
           op->b.type == op->out.type && (op->a.type == MPT_F16 || op->a.type == MPT_BF16);
}

/* to = dy where the saved value is over 0 or NaN (see mpt__not_positive), else 0 */
MPT__INLINE void mpt__slope_run(int16_t inf, const int16_t *MPT__RESTRICT saved, const int16_t *MPT__RESTRICT dy,
                                int16_t *MPT__RESTRICT to) {
    size_t e;
    for (e = 0; e < MPT__RUN; e++) {
        const int16_t above = (int16_t) - (saved[e] > 0), nan = (int16_t) - ((int16_t)(saved[e] & 0x7fff) > inf);
        to[e] = (int16_t)(dy[e] & (above | nan));
    }
}

MPT__INLINE void mpt__slope_task_body(void *arg, size_t begin, size_t end, int worker) {
    const mpt__work *w = (const mpt__work *)arg;
    const mpt_map_op *op = (const mpt_map_op *)w->op;
    const int16_t *saved = (const int16_t *)op->a.data, *dy = (const int16_t *)op->b.data;
    const int16_t inf = op->a.type == MPT_F16 ? 0x7c00 : 0x7f80;
    int16_t *out = (int16_t *)op->out.data, to[MPT__RUN], room[2][MPT__RUN] = {{0}, {0}};
    size_t i = begin * MPT__RUN, last = mpt__min(end * MPT__RUN, op->n);
    (void)worker;
    for (; i + MPT__RUN <= last; i += MPT__RUN) {
        mpt__slope_run(inf, saved + i, dy + i, to); /* out may be dy */
        memcpy(out + i, to, sizeof to);
    }
    if (i == last) return;
    memcpy(room[0], saved + i, (last - i) * sizeof *saved);
    memcpy(room[1], dy + i, (last - i) * sizeof *dy);
    mpt__slope_run(inf, room[0], room[1], to);
    memcpy(out + i, to, (last - i) * sizeof *to);
}
MPT__TASKS(mpt__slope_task)

static mpt_result mpt__cpu_map(mpt_context *ctx, const mpt_map_op *op) {
    mpt__work w = {ctx, op};
    const size_t runs = op->n / MPT__RUN + (op->n % MPT__RUN != 0);
    if (op->map == MPT_MAP_CAST) mpt__parallel(ctx, runs, op->n, mpt__cast_task, &w);
    else if (mpt__map_selects(op)) mpt__parallel(ctx, runs, op->n, MPT__TASK(ctx, mpt__slope_task), &w);
    else mpt__parallel(ctx, runs, op->n, MPT__TASK(ctx, mpt__map_task), &w);
    return MPT_OK;
}

MPT__INLINE void mpt__columns_task_body(void *arg, size_t begin, size_t end, int worker) {
    const mpt__work *w = (const mpt__work *)arg;
    const mpt_columns_op *op = (const mpt_columns_op *)w->op;
    float out[MPT__RUN], room[MPT__RUN];
    size_t c;
    (void)worker;
    for (; begin < end; begin++)
        for (c = 0; c < op->C; c += MPT__RUN) {
            const size_t n = mpt__min(op->C - c, MPT__RUN), at = begin * op->y_stride + c;
            mpt__scale_run(out, 1, mpt__read_run(w->ctx, op->x, begin * op->x_stride + c, n, room));
            if (op->beta != 0) mpt__axpy_run(out, op->beta, mpt__read_run(w->ctx, op->y, at, n, room));
            mpt__write_run(w->ctx, op->y, at, n, out);
        }
}
MPT__TASKS(mpt__columns_task)

/* The same if nothing is rounded or added */
static void mpt__columns_copy_task(void *arg, size_t begin, size_t end, int worker) {
    const mpt_columns_op *op = (const mpt_columns_op *)((const mpt__work *)arg)->op;
    const size_t bytes = op->C * mpt_dtype_size(op->x.type);
    (void)worker;
    for (; begin < end; begin++)
        memcpy(mpt__array_at(op->y, begin * op->y_stride).data, mpt__array_at(op->x, begin * op->x_stride).data, bytes);
}

static mpt_result mpt__cpu_columns(mpt_context *ctx, const mpt_columns_op *op) {
    const int copies = op->x.type == op->y.type && op->beta == 0;
    mpt__work w = {ctx, op};
    if (copies) mpt__parallel(ctx, op->rows, op->rows * op->C, mpt__columns_copy_task, &w);
    else mpt__parallel(ctx, op->rows, op->rows * op->C, MPT__TASK(ctx, mpt__columns_task), &w);
    return MPT_OK;
}

/* y, lines begin .. end of its N H R lines of W S pixels */
static void mpt__broadcast_task(void *arg, size_t begin, size_t end, int worker) {
    const mpt__work *work = (const mpt__work *)arg;
    const mpt_broadcast_op *op = (const mpt_broadcast_op *)work->op;
    const mpt_broadcast_shape *shape = &op->shape;
    const size_t C = shape->C, width = shape->W * shape->S;
    float room[2][MPT__RUN];
    size_t q, c;
    (void)worker;
    for (; begin < end; begin++)
        for (q = 0; q < width; q++)
            for (c = 0; c < C; c += MPT__RUN) {
                const size_t n = mpt__min(C - c, MPT__RUN), at = (begin * width + q) * C + c;
                const size_t in = (begin / shape->R * shape->W + q / shape->S) * C + c;
                const float *x = mpt__read_run(work->ctx, op->x, in, n, room[0]);
                float out[MPT__RUN] = {0};
                if (op->factor.data) mpt__mul_add_run(out, x, mpt__read_run(work->ctx, op->factor, at, n, room[1]));
                else mpt__scale_run(out, 1, x);
                if (op->beta != 0) mpt__axpy_run(out, op->beta, mpt__read_run(work->ctx, op->y, at, n, room[0]));
                mpt__write_run(work->ctx, op->y, at, n, out);
            }
}

/* dx, runs begin .. end of the runs of channels of its N H W pixels */
static void mpt__broadcast_sums_task(void *arg, size_t begin, size_t end, int worker) {
    const mpt__work *work = (const mpt__work *)arg;
    const mpt_broadcast_op *op = (const mpt_broadcast_op *)work->op;
    const mpt_broadcast_shape *shape = &op->shape;
    const size_t C = shape->C, runs = mpt__pieces(C, MPT__RUN), width = shape->W * shape->S;
    float room[2][MPT__RUN], ones[MPT__RUN], out[MPT__RUN];
    size_t i, e;
    (void)worker;
    for (e = 0; e < MPT__RUN; e++) ones[e] = 1;
    for (; begin < end; begin++) {
        const size_t pixel = begin / runs, c = begin % runs * MPT__RUN, n = mpt__min(C - c, MPT__RUN);
        const size_t first = pixel / shape->W * shape->R * width + pixel % shape->W * shape->S;
        double sum[MPT__RUN] = {0};
        for (i = 0; i < shape->R * shape->S; i++) {
            const size_t at = (first + i / shape->S * width + i % shape->S) * C + c;
            const float *dy = mpt__read_run(work->ctx, op->y, at, n, room[0]), *factor = ones;
            if (op->factor.data) factor = mpt__read_run(work->ctx, op->factor, at, n, room[1]);
            for (e = 0; e < MPT__RUN; e++) sum[e] += (double)dy[e] * (double)factor[e];
        }
        if (op->beta != 0) {
            const float *old = mpt__read_run(work->ctx, op->x, pixel * C + c, n, room[0]);
            for (e = 0; e < MPT__RUN; e++) sum[e] += (double)op->beta * (double)old[e];
        }
        for (e = 0; e < MPT__RUN; e++) out[e] = (float)sum[e];
        mpt__write_run(work->ctx, op->x, pixel * C + c, n, out);
    }
}

static mpt_result mpt__cpu_broadcast(mpt_context *ctx, const mpt_broadcast_op *op) {
    const mpt_broadcast_shape *shape = &op->shape;
    const size_t lines = shape->N * shape->H * shape->R, count = lines * shape->W * shape->S * shape->C;
    const size_t runs = shape->N * shape->H * shape->W * mpt__pieces(shape->C, MPT__RUN);
    mpt__work w = {ctx, op};
    if (op->pass == MPT_FORWARD) mpt__parallel(ctx, lines, count, mpt__broadcast_task, &w);
    else mpt__parallel(ctx, runs, count, mpt__broadcast_sums_task, &w);
    return MPT_OK;
}

/* -- Normalisation --

   Sums are in double, in an order that does not depend on the threads: over columns in a fixed number of blocks of
   rows; over a group of one sample in one thread. Mean and variance are computed from distances to the set's first
   value, so neither a large mean nor a constant set costs precision. Every pass reads memory row by row; what it needs
   to know about each channel is computed once per sample, into lines of MPT__COLUMNS channels. */

enum {
    MPT__COLUMN_BLOCKS = 16,
    MPT__NORM_LINES = 6,
#ifdef MPT_SMALL
    MPT__COLUMNS = 192
#else
    MPT__COLUMNS = 4096           /* channels at a time: their lines and the sums of all blocks fit into a workspace */
#endif
};

typedef enum mpt__sum_kind {
    MPT__SUM_VALUES,   /* x */
    MPT__SUM_SQUARES,  /* x - shift, and its square */
    MPT__SUM_GRADIENTS /* dy, and dy xhat */
} mpt__sum_kind;

typedef struct mpt__norm_work {
    mpt_context *ctx;
    const mpt_norm_op *op;
    mpt__sum_kind kind;
    size_t rows, count;    /* rows: N pixels. count: values that a mean is taken over */
    size_t first, columns; /* channels that are summed now */
    double *sums;          /* (MPT__COLUMN_BLOCKS, 2, MPT__COLUMNS) */
    int32_t zero;          /* bits of the largest y that is stored as 0: a ReLU after the norm passes only larger
                              ones */
} mpt__norm_work;

/* For channels first .. first+columns of a sample: statistics, gamma / deviation, beta, and the two means for dx. Whole
   runs, padded with zeros. */
typedef struct mpt__norm_lines {
    float *mean, *inverse, *gamma, *beta, *means[2], *room;
} mpt__norm_lines;

/* The lines come after the sums, which are in the first worker's space. */
static mpt__norm_lines mpt__norm_lines_of(const mpt_context *ctx, int worker) {
    mpt__norm_lines l;
    l.mean = mpt__worker_space(ctx, worker) + 2 * 2 * MPT__COLUMN_BLOCKS * MPT__COLUMNS;
    l.inverse = l.mean + MPT__COLUMNS;
    l.gamma = l.inverse + MPT__COLUMNS;
    l.beta = l.gamma + MPT__COLUMNS;
    l.means[0] = l.beta + MPT__COLUMNS;
    l.means[1] = l.means[0] + MPT__COLUMNS;
    l.room = mpt__worker_room(ctx, worker);
    return l;
}

/* gamma or beta of n channels; `otherwise` for all of them if there is none */
static void mpt__norm_affine(const mpt__norm_work *w, mpt_array a, size_t c, size_t n, float otherwise, float *out) {
    size_t e;
    if (a.data) mpt__load(w->ctx, a, c, n, out);
    else
        for (e = 0; e < n; e++) out[e] = otherwise;
}

/* Computes the lines of n channels from c on, in a sample. */
static void mpt__norm_prepare(const mpt__norm_work *w, size_t sample, size_t c, size_t n, const mpt__norm_lines *l) {
    const mpt_norm_op *op = w->op;
    const size_t groups = op->shape.groups, each = op->shape.C / groups, sets = op->shape.N * groups;
    const int through = op->pass == MPT_NORM_BACKWARD && !op->frozen;
    size_t e;
    mpt__norm_affine(w, op->gamma, c, n, 1, l->gamma);
    mpt__norm_affine(w, op->beta, c, n, 0, l->beta);
    for (e = 0; e < n; e++) {
        const size_t set = sample * groups + (c + e) / each;
        const int again = e && (c + e) % each;
        l->mean[e] = op->stats[set];
        if (again) l->inverse[e] = l->inverse[e - 1];
        else l->inverse[e] = mpt__norm_inverse(op->stats[sets + set], op->shape.eps);
        l->gamma[e] *= l->inverse[e];
        l->means[0][e] = through ? op->stats[2 * sets + set] : 0;
        l->means[1][e] = through ? op->stats[3 * sets + set] : 0;
    }
    for (; e % MPT__RUN; e++)
        l->mean[e] = l->inverse[e] = l->gamma[e] = l->beta[e] = l->means[0][e] = l->means[1][e] = 0;
}

/* Sums over a run of one row, or of four rows so that the totals are read and written only once. a += x */
MPT__INLINE void mpt__sum_values(const float *MPT__RESTRICT x, double *MPT__RESTRICT a) {
    size_t e;
    for (e = 0; e < MPT__RUN; e++) a[e] += (double)x[e];
}

MPT__INLINE void mpt__sum_values_4(const float *MPT__RESTRICT x0, const float *MPT__RESTRICT x1,
                                   const float *MPT__RESTRICT x2, const float *MPT__RESTRICT x3,
                                   double *MPT__RESTRICT a) {
    size_t e;
    for (e = 0; e < MPT__RUN; e++) a[e] += ((double)x0[e] + (double)x1[e]) + ((double)x2[e] + (double)x3[e]);
}

/* a += x - shift, b += its square */
MPT__INLINE void mpt__sum_squares(const float *MPT__RESTRICT x, const float *MPT__RESTRICT shift,
                                  double *MPT__RESTRICT a, double *MPT__RESTRICT b) {
    size_t e;
    for (e = 0; e < MPT__RUN; e++) {
        const double d = (double)x[e] - (double)shift[e];
        a[e] += d;
        b[e] += d * d;
    }
}

MPT__INLINE void mpt__sum_squares_4(const float *MPT__RESTRICT x0, const float *MPT__RESTRICT x1,
                                    const float *MPT__RESTRICT x2, const float *MPT__RESTRICT x3,
                                    const float *MPT__RESTRICT shift, double *MPT__RESTRICT a,
                                    double *MPT__RESTRICT b) {
    size_t e;
    for (e = 0; e < MPT__RUN; e++) {
        const double s = (double)shift[e];
        const double d0 = (double)x0[e] - s, d1 = (double)x1[e] - s, d2 = (double)x2[e] - s, d3 = (double)x3[e] - s;
        a[e] += (d0 + d1) + (d2 + d3);
        b[e] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
    }
}

/* a += dy, b += dy xhat */
MPT__INLINE void mpt__sum_gradients(const float *MPT__RESTRICT x, const float *MPT__RESTRICT dy,
                                    const float *MPT__RESTRICT mean, const float *MPT__RESTRICT inverse,
                                    double *MPT__RESTRICT a, double *MPT__RESTRICT b) {
    size_t e;
    for (e = 0; e < MPT__RUN; e++) {
        a[e] += (double)dy[e];
        b[e] += (double)dy[e] * (double)((x[e] - mean[e]) * inverse[e]);
    }
}

MPT__INLINE void mpt__sum_gradients_4(const float *MPT__RESTRICT x0, const float *MPT__RESTRICT x1,
                                      const float *MPT__RESTRICT x2, const float *MPT__RESTRICT x3,
                                      const float *MPT__RESTRICT y0, const float *MPT__RESTRICT y1,
                                      const float *MPT__RESTRICT y2, const float *MPT__RESTRICT y3,
                                      const float *MPT__RESTRICT mean, const float *MPT__RESTRICT inverse,
                                      double *MPT__RESTRICT a, double *MPT__RESTRICT b) {
    size_t e;
    for (e = 0; e < MPT__RUN; e++) {
        const double n0 = (double)((x0[e] - mean[e]) * inverse[e]), n1 = (double)((x1[e] - mean[e]) * inverse[e]);
        const double n2 = (double)((x2[e] - mean[e]) * inverse[e]), n3 = (double)((x3[e] - mean[e]) * inverse[e]);
        const double d0 = (double)y0[e], d1 = (double)y1[e], d2 = (double)y2[e], d3 = (double)y3[e];
        a[e] += (d0 + d1) + (d2 + d3);
        b[e] += (d0 * n0 + d1 * n1) + (d2 * n2 + d3 * n3);
    }
}

/* y without its activation */
MPT__INLINE void mpt__norm_y(const mpt__norm_lines *l, size_t c, const float *MPT__RESTRICT x, float *MPT__RESTRICT y) {
    const float *MPT__RESTRICT mean = l->mean + c, *MPT__RESTRICT gamma = l->gamma + c,
                               *MPT__RESTRICT beta = l->beta + c;
    size_t e;
    for (e = 0; e < MPT__RUN; e++) y[e] = (x[e] - mean[e]) * gamma[e] + beta[e];
}

/* dy where a ReLU after the norm passes it, else 0: y is computed again instead of being read. */
MPT__INLINE void mpt__norm_slope(const mpt__norm_lines *l, size_t c, int32_t zero, const float *MPT__RESTRICT x,
                                 const float *MPT__RESTRICT dy, float *MPT__RESTRICT out) {
    const float *MPT__RESTRICT mean = l->mean + c, *MPT__RESTRICT gamma = l->gamma + c;
    const float *MPT__RESTRICT beta = l->beta + c;
    size_t e;
    for (e = 0; e < MPT__RUN; e++) {
        const int32_t y = (int32_t)mpt__bits((x[e] - mean[e]) * gamma[e] + beta[e]); /* in the order of the values */
        out[e] = mpt__float(mpt__bits(dy[e]) & (0u - (uint32_t)(y > zero)));
    }
}

/* dx */
MPT__INLINE void mpt__norm_dx(const mpt__norm_lines *l, size_t c, const float *MPT__RESTRICT x,
                              const float *MPT__RESTRICT dy, float *MPT__RESTRICT dx) {
    const float *MPT__RESTRICT mean = l->mean + c, *MPT__RESTRICT inverse = l->inverse + c;
    const float *MPT__RESTRICT gamma = l->gamma + c;
    const float *MPT__RESTRICT m0 = l->means[0] + c, *MPT__RESTRICT m1 = l->means[1] + c;
    size_t e;
    for (e = 0; e < MPT__RUN; e++) {
        const float normal = (x[e] - mean[e]) * inverse[e];
        dx[e] = gamma[e] * dy[e] - inverse[e] * (m0[e] + normal * m1[e]);
    }
}

/* Adds the two quantities of one or four rows from row i on, of n channels from w->first + c on. Whole runs are added,
   with zeros beyond n. */
MPT__INLINE void mpt__norm_sum(const mpt__norm_work *w, size_t i, size_t rows, size_t c, size_t n,
                               const mpt__norm_lines *l, double *a, double *b) {
    const size_t C = w->op->shape.C, at = i * C + w->first + c;
    const float *x[4], *dy[4];
    size_t r;
    for (r = 0; r < rows; r++) x[r] = mpt__read_run(w->ctx, w->op->x, at + r * C, n, l->room + r * MPT__RUN);
    if (w->kind == MPT__SUM_GRADIENTS)
        for (r = 0; r < rows; r++) {
            dy[r] = mpt__read_run(w->ctx, w->op->y, at + r * C, n, l->room + (4 + r) * MPT__RUN);
            if (!w->op->act) continue;
            mpt__norm_slope(l, c, w->zero, x[r], dy[r], l->room + (8 + r) * MPT__RUN);
            dy[r] = l->room + (8 + r) * MPT__RUN;
        }
    if (rows == 4 && w->kind == MPT__SUM_GRADIENTS)
        mpt__sum_gradients_4(x[0], x[1], x[2], x[3], dy[0], dy[1], dy[2], dy[3], l->mean + c, l->inverse + c, a, b);
    else if (rows == 4 && w->kind == MPT__SUM_SQUARES) mpt__sum_squares_4(x[0], x[1], x[2], x[3], l->mean + c, a, b);
    else if (rows == 4) mpt__sum_values_4(x[0], x[1], x[2], x[3], a);
    else if (w->kind == MPT__SUM_GRADIENTS) mpt__sum_gradients(x[0], dy[0], l->mean + c, l->inverse + c, a, b);
    else if (w->kind == MPT__SUM_SQUARES) mpt__sum_squares(x[0], l->mean + c, a, b);
    else mpt__sum_values(x[0], a);
}

/* Rows to sum at a time: four, or one near the end of the block or of a sample */
static size_t mpt__norm_four(size_t i, size_t last, size_t pixels) {
    if (i + 4 <= last && i % pixels + 4 <= pixels) return 4;
    return 1;
}

MPT__INLINE void mpt__norm_columns_task_body(void *arg, size_t begin, size_t end, int worker) {
    const mpt__norm_work *w = (const mpt__norm_work *)arg;
    const size_t each = mpt__pieces(w->rows, MPT__COLUMN_BLOCKS), pixels = w->op->shape.pixels;
    const mpt__norm_lines l = mpt__norm_lines_of(w->ctx, worker);
    for (; begin < end; begin++) {
        const size_t last = mpt__min((begin + 1) * each, w->rows);
        const size_t bytes = mpt__pieces(w->columns, MPT__RUN) * MPT__RUN * sizeof(double);
        double *sums = w->sums + begin * 2 * MPT__COLUMNS;
        size_t i, c, some;
        memset(sums, 0, bytes);
        memset(sums + MPT__COLUMNS, 0, bytes);
        if (w->kind == MPT__SUM_SQUARES) { /* shift: the first row */
            memset(l.mean, 0, MPT__COLUMNS * sizeof *l.mean);
            mpt__load(w->ctx, w->op->x, w->first, w->columns, l.mean);
        }
        for (i = begin * each; i < last; i += some) {
            if (w->kind == MPT__SUM_GRADIENTS && (i == begin * each || i % pixels == 0))
                mpt__norm_prepare(w, i / pixels, w->first, w->columns, &l);
            some = mpt__norm_four(i, last, pixels);
            for (c = 0; c < w->columns; c += MPT__RUN)
                mpt__norm_sum(w, i, some, c, mpt__min(w->columns - c, MPT__RUN), &l, sums + c, sums + MPT__COLUMNS + c);
        }
    }
}
MPT__TASKS(mpt__norm_columns_task)

/* The two sums over all rows, of w->columns channels from w->first on: in the sums of block 0 */
static void mpt__norm_columns(mpt__norm_work *w) {
    size_t b, c;
    mpt__parallel(w->ctx, MPT__COLUMN_BLOCKS, w->rows * w->columns, MPT__TASK(w->ctx, mpt__norm_columns_task), w);
    for (b = 1; b < MPT__COLUMN_BLOCKS; b++)
        for (c = 0; c < w->columns; c++) {
            w->sums[c] += w->sums[b * 2 * MPT__COLUMNS + c];
            w->sums[MPT__COLUMNS + c] += w->sums[b * 2 * MPT__COLUMNS + MPT__COLUMNS + c];
        }
}

/* Stores, from the two sums of a set, its mean and variance, or the two means that its dx needs. */
static void mpt__norm_set_stats(const mpt__norm_work *w, size_t set, double a, double b, float shift) {
    const size_t sets = w->op->shape.N * w->op->shape.groups;
    float *stats = w->op->stats + set;
    a /= (double)w->count;
    b /= (double)w->count;
    if (w->op->pass == MPT_NORM_BACKWARD) stats += 2 * sets;
    else {
        b = b < a * a ? 0 : b - a * a;
        a += (double)shift;
    }
    stats[0] = (float)a;
    stats[sets] = (float)b;
}

/* The sums of sets that each belong to one sample, in the backward pass weighted by gamma. Not one of MPT__TASKS: a
   clone for AVX2 took 1.4 times as long over the statistics of layer norms. */
static void mpt__norm_samples_task(void *arg, size_t begin, size_t end, int worker) {
    const mpt__norm_work *arg_work = (const mpt__norm_work *)arg;
    const mpt_norm_op *op = arg_work->op;
    const size_t groups = op->shape.groups, each = op->shape.C / groups, pixels = op->shape.pixels;
    const mpt__norm_lines l = mpt__norm_lines_of(arg_work->ctx, worker);
    double *a = (double *)(void *)(l.room + 12 * MPT__RUN), *b = a + MPT__RUN;
    mpt__norm_work w = *arg_work;
    for (; begin < end; begin++) {
        const size_t sample = begin / groups, first = begin % groups * each;
        const float shift = mpt__get(w.ctx, op->x, sample * pixels * op->shape.C + first);
        double sums[2] = {0, 0};
        size_t c, i, e;
        for (c = 0; c < each; c += MPT__RUN) {
            const size_t n = mpt__min(each - c, MPT__RUN);
            w.first = first + c;
            memset(a, 0, 2 * MPT__RUN * sizeof *a);
            if (w.kind == MPT__SUM_GRADIENTS) mpt__norm_prepare(&w, sample, w.first, n, &l);
            if (w.kind == MPT__SUM_SQUARES) {
                memset(l.mean, 0, MPT__RUN * sizeof *l.mean);
                for (e = 0; e < n; e++) l.mean[e] = shift;
            }
            for (i = 0; i < pixels; i++) mpt__norm_sum(&w, sample * pixels + i, 1, 0, n, &l, a, b);
            for (e = 0; e < n; e++) {
                float gamma = 1;
                if (w.kind == MPT__SUM_GRADIENTS) mpt__norm_affine(&w, op->gamma, w.first + e, 1, 1, &gamma);
                sums[0] += (double)gamma * a[e];
                sums[1] += (double)gamma * b[e];
            }
        }
        mpt__norm_set_stats(&w, begin, sums[0], sums[1], shift);
    }
}

static void mpt__norm_put(const mpt__norm_work *w, mpt_array out, size_t c, double sum) {
    float x = 0;
    if (!out.data) return;
    if (w->op->scale != 0) x = mpt__get(w->ctx, out, c);
    x = (float)(sum + (double)w->op->scale * (double)x);
    mpt__store(w->ctx, out, c, 1, &x);
}

/* Sums of all sets, and in the backward pass dgamma and dbeta. Batch norm's sets are columns. */
static void mpt__norm_reduce(mpt__norm_work *w) {
    const mpt_norm_op *op = w->op;
    const int batch = op->shape.N == 1 && op->shape.groups == op->shape.C, backward = op->pass == MPT_NORM_BACKWARD;
    size_t c;
    if (!batch && !op->frozen)
        mpt__parallel(w->ctx, op->shape.N * op->shape.groups, w->rows * op->shape.C, mpt__norm_samples_task, w);
    if (!batch && !backward) return;
    for (w->first = 0; w->first < op->shape.C; w->first += MPT__COLUMNS) {
        w->columns = mpt__min(op->shape.C - w->first, MPT__COLUMNS);
        mpt__norm_columns(w);
        for (c = 0; c < w->columns; c++) {
            const double a = w->sums[c], b = w->sums[MPT__COLUMNS + c];
            float gamma = 1;
            if (backward) mpt__norm_affine(w, op->gamma, w->first + c, 1, 1, &gamma);
            if (batch && !op->frozen)
                mpt__norm_set_stats(w, w->first + c, (double)gamma * a, (double)gamma * b,
                                    mpt__get(w->ctx, op->x, w->first + c));
            if (!backward) continue;
            mpt__norm_put(w, op->dbeta, w->first + c, a);
            mpt__norm_put(w, op->dgamma, w->first + c, b);
        }
    }
}

/* y or dx of row i, of n channels from first + c on */
MPT__INLINE void mpt__norm_row(const mpt__norm_work *w, size_t i, size_t first, size_t c, size_t n,
                               const mpt__norm_lines *l) {
    const mpt_norm_op *op = w->op;
    const size_t at = i * op->shape.C + first + c;
    const float *x = mpt__read_run(w->ctx, op->x, at, n, l->room), *dy;
    float out[MPT__RUN];
    if (op->pass == MPT_NORM_FORWARD) {
        mpt__norm_y(l, c, x, out);
        mpt__activate_run(op->act, out);
        mpt__write_run(w->ctx, op->y, at, n, out);
        return;
    }
    dy = mpt__read_run(w->ctx, op->y, at, n, l->room + MPT__RUN);
    if (op->act) {
        mpt__norm_slope(l, c, w->zero, x, dy, l->room + 2 * MPT__RUN);
        dy = l->room + 2 * MPT__RUN;
    }
    mpt__norm_dx(l, c, x, dy, out);
    if (op->scale_x != 0) mpt__axpy_run(out, op->scale_x, mpt__read_run(w->ctx, op->dx, at, n, l->room));
    mpt__write_run(w->ctx, op->dx, at, n, out);
}

MPT__INLINE void mpt__norm_rows_task_body(void *arg, size_t begin, size_t end, int worker) {
    const mpt__norm_work *w = (const mpt__norm_work *)arg;
    const size_t C = w->op->shape.C, pixels = w->op->shape.pixels;
    const mpt__norm_lines l = mpt__norm_lines_of(w->ctx, worker);
    size_t first, i, c;
    for (first = 0; first < C; first += MPT__COLUMNS) {
        const size_t columns = mpt__min(C - first, MPT__COLUMNS);
        for (i = begin; i < end; i++) {
            if (i == begin || i % pixels == 0) mpt__norm_prepare(w, i / pixels, first, columns, &l);
            for (c = 0; c < columns; c += MPT__RUN) mpt__norm_row(w, i, first, c, mpt__min(columns - c, MPT__RUN), &l);
        }
    }
}
MPT__TASKS(mpt__norm_rows_task)

static mpt__norm_work mpt__norm_work_of(mpt_context *ctx, const mpt_norm_op *op, mpt__sum_kind kind) {
    static const int32_t zeros[3] = {0, 0x33000000, 0x8000}; /* half the smallest subnormal of f16 and bf16 */
    const mpt_norm_shape *shape = &op->shape;
    mpt__norm_work w = MPT_ZERO;
    w.ctx = ctx;
    w.op = op;
    w.kind = kind;
    w.rows = shape->N * shape->pixels;
    w.count = shape->pixels * (shape->C / shape->groups);
    w.sums = (double *)(void *)ctx->workspace;
    if (op->saved.data && op->saved.type <= MPT_BF16) w.zero = zeros[op->saved.type];
    return w;
}

static mpt_result mpt__cpu_norm(mpt_context *ctx, const mpt_norm_op *op) {
    const size_t sets = op->shape.N * op->shape.groups;
    mpt__norm_work w =
        mpt__norm_work_of(ctx, op, op->pass == MPT_NORM_BACKWARD ? MPT__SUM_GRADIENTS : MPT__SUM_SQUARES);
    size_t i;
    if (op->pass == MPT_NORM_RUNNING) {
        for (i = 0; i < 2 * sets; i++) mpt__norm_average(op, w.count, i);
        return MPT_OK;
    }
    if (op->pass == MPT_NORM_STATS || (op->pass == MPT_NORM_BACKWARD && (!op->frozen || op->dgamma.data)))
        mpt__norm_reduce(&w);
    if (op->pass == MPT_NORM_FORWARD || op->dx.data)
        mpt__parallel(ctx, w.rows, w.rows * op->shape.C, MPT__TASK(ctx, mpt__norm_rows_task), &w);
    return MPT_OK;
}

/* sums(C) = sums over the rows of x(rows,C) + beta sums */
static void mpt__column_sums(mpt_context *ctx, size_t rows, size_t C, mpt_array x, float beta, mpt_array sums) {
    mpt_norm_op op = MPT_ZERO;
    mpt__norm_work w;
    size_t c;
    op.shape.N = 1;
    op.shape.pixels = rows;
    op.shape.C = op.shape.groups = C;
    op.x = x;
    op.scale = beta;
    w = mpt__norm_work_of(ctx, &op, MPT__SUM_VALUES);
    for (w.first = 0; w.first < C; w.first += MPT__COLUMNS) {
        w.columns = mpt__min(C - w.first, MPT__COLUMNS);
        mpt__norm_columns(&w);
        for (c = 0; c < w.columns; c++) mpt__norm_put(&w, sums, w.first + c, w.sums[c]);
    }
}

/* -- Pooling: each output, or in the gradient each input, gathers what it needs, a run of channels at a time -- */

/* Where x is larger than best, or the first NaN: best = x and tap = here. Uses masks, because a branch would prevent
   vectorisation. */
MPT__INLINE void mpt__max_run(float *MPT__RESTRICT best, uint32_t *MPT__RESTRICT tap, const float *MPT__RESTRICT x,
                              uint32_t here) {
    size_t e;
    for (e = 0; e < MPT__RUN; e++) {
        const uint32_t u = mpt__bits(x[e]), v = mpt__bits(best[e]);
        const int nan = (u & 0x7fffffffu) > 0x7f800000u, was = (v & 0x7fffffffu) > 0x7f800000u;
        const uint32_t take = 0u - (uint32_t)((x[e] > best[e]) | (nan & !was));
        best[e] = mpt__float((u & take) | (v & ~take));
        tap[e] = (here & take) | (tap[e] & ~take);
    }
}

/* The same on the bits of 16-bit values: keys are integers in the order of the values, with equal keys for -0 and 0 and
   NaN above all. inf: the type's bits. The first tap is always taken. */
MPT__INLINE void mpt__max_halves(uint16_t *MPT__RESTRICT best, int16_t *MPT__RESTRICT key, uint16_t *MPT__RESTRICT tap,
                                 const uint16_t *MPT__RESTRICT x, uint16_t inf, uint16_t here, int first) {
    const uint16_t any = (uint16_t)(0 - first);
    size_t e;
    for (e = 0; e < MPT__RUN; e++) {
        const int16_t size = (int16_t)(x[e] & 0x7fff), sign = (int16_t)((int16_t)x[e] >> 15);
        const int16_t ordered = (int16_t)((size ^ sign) - sign), is = size > (int16_t)inf ? (int16_t)0x7fff : ordered;
        const uint16_t take = (uint16_t)((uint16_t)(0 - (is > key[e])) | any);
        key[e] = (int16_t)(((uint16_t)is & take) | ((uint16_t)key[e] & (uint16_t)~take));
        best[e] = (uint16_t)((x[e] & take) | (best[e] & (uint16_t)~take));
        tap[e] = (uint16_t)((here & take) | (tap[e] & (uint16_t)~take));
    }
}

MPT__INLINE void mpt__taps_read(const uint16_t *index, size_t n, uint32_t *MPT__RESTRICT tap) {
    size_t e;
    if (n == MPT__RUN)
        for (e = 0; e < MPT__RUN; e++) tap[e] = index[e];
    else
        for (e = 0; e < MPT__RUN; e++) tap[e] = e < n ? index[e] : 0xffffffffu;
}

MPT__INLINE void mpt__taps_write(const uint32_t *MPT__RESTRICT tap, size_t n, uint16_t *MPT__RESTRICT index) {
    size_t e;
    if (n == MPT__RUN)
        for (e = 0; e < MPT__RUN; e++) index[e] = (uint16_t)tap[e];
    else
        for (e = 0; e < n; e++) index[e] = (uint16_t)tap[e];
}

/* sum += dy where tap is `here` */
MPT__INLINE void mpt__unpool_run(float *MPT__RESTRICT sum, const uint32_t *MPT__RESTRICT tap, uint32_t here,
                                 const float *MPT__RESTRICT dy) {
    size_t e;
    for (e = 0; e < MPT__RUN; e++) sum[e] += mpt__float(mpt__bits(dy[e]) & (0u - (uint32_t)(tap[e] == here)));
}

typedef struct mpt__window { /* of one output, inside the image: rows r .. R of the window, columns s .. S */
    size_t r, R, s, S;
    size_t divisor; /* for the mean */
    ptrdiff_t at;   /* element of the image under (0,0); below 0 if that is padding above the first image */
} mpt__window;

MPT__INLINE mpt__window mpt__window_of(const mpt_pool2d_op *op, size_t n, size_t p, size_t q) {
    const mpt_pool2d_shape *shape = &op->shape;
    const ptrdiff_t H = (ptrdiff_t)shape->H, W = (ptrdiff_t)shape->W;
    const ptrdiff_t h = (ptrdiff_t)(p * shape->stride_h) - (ptrdiff_t)shape->padding_h; /* of the window's first row */
    const ptrdiff_t w = (ptrdiff_t)(q * shape->stride_w) - (ptrdiff_t)shape->padding_w;
    mpt__window window;
    window.r = h < 0 ? (size_t)-h : 0;
    window.R = mpt__min(shape->R, (size_t)(H - h));
    window.s = w < 0 ? (size_t)-w : 0;
    window.S = mpt__min(shape->S, (size_t)(W - w));
    window.divisor = mpt__pool2d_divisor(shape, p, q);
    window.at = (((ptrdiff_t)n * H + h) * W + w) * (ptrdiff_t)shape->C;
    return window;
}

/* Element of the image under tap (r,s) of a window */
MPT__INLINE size_t mpt__window_tap(const mpt__window *window, const mpt_pool2d_shape *shape, size_t r, size_t s) {
    return (size_t)(window->at + (ptrdiff_t)((r * shape->W + s) * shape->C));
}

/* Maxima of 16-bit values. Whole runs are read and written in place. */
MPT__INLINE void mpt__pool2d_max16_run(const mpt_pool2d_op *op, const mpt__window *window, size_t out, size_t c,
                                       size_t n, float *room) {
    const mpt_pool2d_shape *shape = &op->shape;
    const uint16_t *image = (const uint16_t *)op->x.data + c, inf = op->x.type == MPT_F16 ? 0x7c00 : 0x7f80;
    uint16_t *y = (uint16_t *)op->y.data + out, *index = op->index + out, *line = (uint16_t *)(void *)room;
    uint16_t *best = y, *tap = index;
    int16_t key[MPT__RUN] = {0};
    size_t r, s;
    int first = 1;
    if (n < MPT__RUN) {
        best = line + MPT__RUN;
        tap = line + 2 * MPT__RUN;
    }
    for (r = window->r; r < window->R; r++)
        for (s = window->s; s < window->S; s++) {
            const uint16_t *x = image + mpt__window_tap(window, shape, r, s);
            if (n < MPT__RUN) memcpy(line, x, n * sizeof *x);
            if (n < MPT__RUN) x = line;
            if (first) mpt__max_halves(best, key, tap, x, inf, (uint16_t)(r * shape->S + s), 1);
            else mpt__max_halves(best, key, tap, x, inf, (uint16_t)(r * shape->S + s), 0);
            first = 0;
        }
    if (n == MPT__RUN) return;
    memcpy(y, best, n * sizeof *best);
    memcpy(index, tap, n * sizeof *tap);
}

/* Means, whose sums are double; maxima in fp32 */
MPT__INLINE void mpt__pool2d_forward_run(const mpt_context *ctx, const mpt_pool2d_op *op, const mpt__window *window,
                                         size_t out, size_t c, size_t n, float *room) {
    const mpt_pool2d_shape *shape = &op->shape;
    const int mean = op->kind == MPT_POOL_AVERAGE;
    double *sum = (double *)(void *)(room + MPT__RUN);
    float best[MPT__RUN];
    uint32_t tap[MPT__RUN];
    size_t r, s, e;
    int first = 1;
    memset(sum, 0, MPT__RUN * sizeof *sum);
    for (r = window->r; r < window->R; r++)
        for (s = window->s; s < window->S; s++) {
            const float *x = mpt__read_run(ctx, op->x, mpt__window_tap(window, shape, r, s) + c, n, room);
            const uint32_t here = (uint32_t)(r * shape->S + s);
            if (mean) mpt__sum_values(x, sum);
            else if (first) {
                for (e = 0; e < MPT__RUN; e++) tap[e] = here;
                mpt__scale_run(best, 1, x);
            } else mpt__max_run(best, tap, x, here);
            first = 0;
        }
    if (mean)
        for (e = 0; e < MPT__RUN; e++) best[e] = (float)(sum[e] / (double)window->divisor);
    else mpt__taps_write(tap, n, op->index + out);
    mpt__write_run(ctx, op->y, out, n, best);
}

MPT__INLINE void mpt__pool2d_backward_run(const mpt_context *ctx, const mpt_pool2d_op *op, size_t n, size_t h, size_t w,
                                          size_t c, size_t run, float *room) {
    const mpt_pool2d_shape *shape = &op->shape;
    const size_t in = ((n * shape->H + h) * shape->W + w) * shape->C + c;
    const size_t y = h + shape->padding_h, x = w + shape->padding_w;
    float sum[MPT__RUN];
    size_t p, q, e;
    mpt__scale_run(sum, op->beta, op->beta != 0 ? mpt__read_run(ctx, op->x, in, run, room) : mpt__zeros);
    for (p = mpt__min(y / shape->stride_h + 1, op->P); p-- > 0;) {
        if (y - p * shape->stride_h >= shape->R) break; /* this window and those before it end above y */
        for (q = mpt__min(x / shape->stride_w + 1, op->Q); q-- > 0;) {
            if (x - q * shape->stride_w >= shape->S) break;
            const uint32_t here = (uint32_t)((y - p * shape->stride_h) * shape->S + x - q * shape->stride_w);
            const float divisor = (float)mpt__pool2d_divisor(shape, p, q);
            const size_t out = ((n * op->P + p) * op->Q + q) * shape->C + c;
            const float *dy = mpt__read_run(ctx, op->y, out, run, room);
            uint32_t tap[MPT__RUN];
            if (op->kind == MPT_POOL_AVERAGE)
                for (e = 0; e < MPT__RUN; e++) sum[e] += dy[e] / divisor;
            else {
                mpt__taps_read(op->index + out, run, tap);
                mpt__unpool_run(sum, tap, here, dy);
            }
        }
    }
    mpt__write_run(ctx, op->x, in, run, sum);
}

/* Whether windows do not overlap. An input's gradient is then that of one output, or zero, so outputs can scatter their
   gradients instead, with the same bits. */
static int mpt__pool2d_scatters(const mpt_pool2d_op *op) {
    return op->pass != MPT_FORWARD && op->beta == 0 && !op->shape.padding_h && !op->shape.padding_w &&
           op->shape.stride_h >= op->shape.R && op->shape.stride_w >= op->shape.S && op->x.type == op->y.type &&
           op->x.type <= MPT_BF16;
}

/* MPT__SELECT generates to(n) = y where index is `here`, else 0, for y of 16 and of 32 bits. Both are inlined into the
   two copies of mpt__pool2d_task, about 0.3 KB each time. */
#define MPT__SELECT(name, type)                                                                                     \
    MPT__INLINE void name(type *MPT__RESTRICT to, const type *MPT__RESTRICT y, const uint16_t *MPT__RESTRICT index, \
                          uint16_t here, size_t n) {                                                                \
        size_t e;                                                                                                   \
        if (n == MPT__RUN)                                                                                          \
            for (e = 0; e < MPT__RUN; e++) to[e] = (type)(y[e] & (type)(0 - (type)(index[e] == here)));             \
        else                                                                                                        \
            for (e = 0; e < n; e++) to[e] = (type)(y[e] & (type)(0 - (type)(index[e] == here)));                    \
    }
MPT__SELECT(mpt__select_halves, uint16_t)
MPT__SELECT(mpt__select_words, uint32_t)

/* The gradients of all inputs in the window of output `out`, of n channels */
MPT__INLINE void mpt__pool2d_scatter_run(const mpt_context *ctx, const mpt_pool2d_op *op, size_t at, size_t out,
                                         size_t n, float *room) {
    const mpt_pool2d_shape *shape = &op->shape;
    const size_t size = mpt_dtype_size(op->x.type);
    const char *dy = (const char *)op->y.data + out * size;
    float *share = room + MPT__RUN; /* dy / window, in the type of dy */
    size_t r, s, e;
    if (op->kind == MPT_POOL_AVERAGE) {
        float mean[MPT__RUN];
        const float *x = mpt__read_run(ctx, op->y, out, n, room);
        for (e = 0; e < MPT__RUN; e++) mean[e] = x[e] / (float)(shape->R * shape->S);
        mpt__write_run(ctx, mpt_typed_array(share, op->x.type), 0, n, mean);
    }
    for (r = 0; r < shape->R; r++)
        for (s = 0; s < shape->S; s++) {
            char *to = (char *)op->x.data + (at + (r * shape->W + s) * shape->C) * size;
            const uint16_t here = (uint16_t)(r * shape->S + s);
            if (op->kind == MPT_POOL_AVERAGE) memcpy(to, share, n * size);
            else if (size == sizeof here)
                mpt__select_halves((uint16_t *)(void *)to, (const uint16_t *)(const void *)dy, op->index + out, here,
                                   n);
            else
                mpt__select_words((uint32_t *)(void *)to, (const uint32_t *)(const void *)dy, op->index + out, here, n);
        }
}

/* Zeroes the inputs under row (n,p) of outputs, up to the next row: some of them may be in no window. */
static void mpt__pool2d_clear(const mpt_pool2d_op *op, size_t n, size_t p) {
    const mpt_pool2d_shape *shape = &op->shape;
    const size_t top = p * shape->stride_h, bottom = p + 1 < op->P ? top + shape->stride_h : shape->H;
    const size_t line = shape->W * shape->C * mpt_dtype_size(op->x.type);
    if (shape->stride_h == shape->R && shape->stride_w == shape->S && op->P * shape->R == shape->H &&
        op->Q * shape->S == shape->W)
        return;
    memset((char *)op->x.data + (n * shape->H + top) * line, 0, (bottom - top) * line);
}

/* Rows (n,p) of outputs, or (n,h) of inputs */
MPT__INLINE void mpt__pool2d_task_body(void *arg, size_t begin, size_t end, int worker) {
    const mpt__work *w = (const mpt__work *)arg;
    const mpt_pool2d_op *op = (const mpt_pool2d_op *)w->op;
    const int scatters = mpt__pool2d_scatters(op), outputs = op->pass == MPT_FORWARD || scatters;
    const int halves =
        op->kind == MPT_POOL_MAX && op->x.type == op->y.type && (op->x.type == MPT_F16 || op->x.type == MPT_BF16);
    const size_t rows = outputs ? op->P : op->shape.H;
    const size_t columns = outputs ? op->Q : op->shape.W, C = op->shape.C;
    float *room = mpt__worker_room(w->ctx, worker);
    size_t i, c;
    for (; begin < end; begin++) {
        const size_t n = begin / rows, p = begin % rows;
        if (scatters) mpt__pool2d_clear(op, n, p);
        for (i = 0; i < columns; i++) {
            const size_t out = (begin * columns + i) * C;
            mpt__window window = MPT_ZERO;
            if (outputs) window = mpt__window_of(op, n, p, i);
            for (c = 0; c < C; c += MPT__RUN) {
                const size_t run = mpt__min(C - c, MPT__RUN);
                if (scatters) mpt__pool2d_scatter_run(w->ctx, op, (size_t)window.at + c, out + c, run, room);
                else if (!outputs) mpt__pool2d_backward_run(w->ctx, op, n, p, i, c, run, room);
                else if (halves) mpt__pool2d_max16_run(op, &window, out + c, c, run, room);
                else mpt__pool2d_forward_run(w->ctx, op, &window, out + c, c, run, room);
            }
        }
    }
}
MPT__TASKS(mpt__pool2d_task)

static mpt_result mpt__cpu_pool2d(mpt_context *ctx, const mpt_pool2d_op *op) {
    const mpt_pool2d_shape *shape = &op->shape;
    const int outputs = op->pass == MPT_FORWARD || mpt__pool2d_scatters(op);
    mpt__work w = {ctx, op};
    mpt__parallel(ctx, shape->N * (outputs ? op->P : shape->H), shape->N * shape->H * shape->W * shape->C,
                  MPT__TASK(ctx, mpt__pool2d_task), &w);
    return MPT_OK;
}

/* -- Losses: one row after another, so that the sum has one order; with several positions per sample, in parts -- */

enum { MPT__LOSS_PARTS = 16 };

typedef struct mpt__loss_work {
    mpt_context *ctx;
    const mpt_loss_op *op;
    size_t rows;
    float scale;
    mpt_loss_sum sums[MPT__LOSS_PARTS];
} mpt__loss_work;

/* The target class of a row: the label, or the first of the largest probabilities */
static size_t mpt__aim_class(const mpt_loss_op *op, const mpt__aim *aim) {
    size_t c, best = 0;
    if (!aim->probabilities) return (size_t)aim->label;
    for (c = 1; c < op->C; c++)
        if (aim->probabilities[c] > aim->probabilities[best]) best = c;
    return best;
}

static double mpt__cross_entropy_row(const mpt_context *ctx, const mpt_loss_op *op, size_t row, float scale,
                                     uint64_t *correct) {
    const mpt__aim aim = mpt__aim_of(op, row);
    const int unsure = op->desc.class_weights || aim.probabilities;
    float largest = mpt__get(ctx, op->x, row * op->C);
    double sum = 0, aimed = 0, targets = unsure ? 0 : 1; /* the sum of all targets */
    size_t c, best = 0;
    for (c = 1; c < op->C; c++) {
        const float x = mpt__get(ctx, op->x, row * op->C + c);
        if (x > largest) {
            largest = x;
            best = c;
        }
    }
    for (c = 0; c < op->C; c++) {
        const float x = mpt__get(ctx, op->x, row * op->C + c) - largest, t = mpt__class_target(op, &aim, c);
        sum += (double)expf(x);
        if (t > 0) aimed += (double)(t * x); /* 0 * -inf would be NaN */
        if (unsure) targets += (double)t;
    }
    if (op->dx.data)
        for (c = 0; c < op->C; c++) {
            const float p = expf(mpt__get(ctx, op->x, row * op->C + c) - largest) / (float)sum;
            float dx = (p * (float)targets - mpt__class_target(op, &aim, c)) * scale;
            if (!aim.valid) dx = mpt__float(0x7fc00000u);
            mpt__store(ctx, op->dx, row * op->C + c, 1, &dx);
        }
    /* with NaN no logit is the largest */
    *correct += aim.valid && best == mpt__aim_class(op, &aim) && !mpt__is_nan((float)sum);
    if (!aim.valid) return (double)mpt__float(0x7fc00000u);
    return targets * log(sum) - aimed;
}

static double mpt__elementwise_row(const mpt_context *ctx, const mpt_loss_op *op, size_t row, float scale) {
    const float *target = (const float *)op->target + row * op->C;
    const float each = mpt__loss_share(op);
    double sum = 0;
    float slope;
    size_t c;
    for (c = 0; c < op->C; c++) {
        sum += (double)mpt__loss_element(op, c, mpt__get(ctx, op->x, row * op->C + c), target[c], &slope);
        slope *= each * scale;
        if (op->dx.data) mpt__store(ctx, op->dx, row * op->C + c, 1, &slope);
    }
    return sum / (double)op->C;
}

/* Adds rows begin .. end to *sum, except for their weights. */
static void mpt__loss_rows(const mpt__loss_work *w, size_t begin, size_t end, mpt_loss_sum *sum) {
    const mpt_loss_op *op = w->op;
    const int entropy = op->kind == MPT_LOSS_CROSS_ENTROPY;
    const float zero = 0;
    size_t row, c;
    for (row = begin; row < end; row++) {
        const float weight = mpt__sample_weight(op, row);
        double loss;
        if (entropy && mpt__aim_of(op, row).ignored) {
            if (op->dx.data)
                for (c = 0; c < op->C; c++) mpt__store(w->ctx, op->dx, row * op->C + c, 1, &zero);
            continue;
        }
        if (entropy) loss = mpt__cross_entropy_row(w->ctx, op, row, w->scale * weight, &sum->correct);
        else loss = mpt__elementwise_row(w->ctx, op, row, w->scale * weight);
        sum->loss += loss * (double)weight;
        sum->rows++;
    }
}

static void mpt__loss_task(void *arg, size_t begin, size_t end, MPT__UNUSED int worker) {
    mpt__loss_work *w = (mpt__loss_work *)arg;
    const size_t each = (w->rows + MPT__LOSS_PARTS - 1) / MPT__LOSS_PARTS;
    for (; begin < end; begin++)
        mpt__loss_rows(w, mpt__min(begin * each, w->rows), mpt__min((begin + 1) * each, w->rows), &w->sums[begin]);
}

static mpt_result mpt__cpu_loss(mpt_context *ctx, const mpt_loss_op *op) {
    mpt__loss_work w = MPT_ZERO;
    double weight = 0;
    size_t i;
    w.ctx = ctx;
    w.op = op;
    w.rows = op->N * op->positions;
    for (i = 0; i < w.rows; i++) weight += (double)mpt__row_weight(op, i);
    w.scale = mpt__loss_factor(op, weight);
    op->sum->weight += weight;
    if (op->positions == 1) {
        mpt__loss_rows(&w, 0, w.rows, op->sum);
        return MPT_OK;
    }
    mpt__parallel(ctx, MPT__LOSS_PARTS, w.rows * op->C * 8, mpt__loss_task, &w);
    for (i = 0; i < MPT__LOSS_PARTS; i++) {
        op->sum->loss += w.sums[i].loss;
        op->sum->rows += w.sums[i].rows;
        op->sum->correct += w.sums[i].correct;
    }
    return MPT_OK;
}

/* -- Scan and histogram --

   The sum of squares has one order on every machine: 32 interleaved sums in double over a chunk of 4096 elements, added
   pairwise; then the chunks of a block in order; then the 64 blocks in order. A warp of 32 threads can do the same. */

enum { MPT__CHUNK = 4096 };

typedef struct mpt__scan_work {
    mpt_context *ctx;
    float factor;
    mpt_array x;
    size_t n, chunks;
    const mpt_update_op *update; /* the update that these gradients are for, or NULL */
} mpt__scan_work;

/* Whether some of elements i .. i+n of the gradients are padding between tensors. Padding counts as 0, because a sum
   over ranks may write there; if run(n) is not NULL, it is set to 0 there. */
static int mpt__scan_padding(const mpt_update_op *op, size_t i, size_t n, float *run) {
    int any = 0, t = mpt__slice_at(op->slices, op->tensors, i);
    for (; t < op->tensors; t++) {
        const size_t from = op->slices[t].offset + op->slices[t].count;
        const size_t to = t + 1 < op->tensors ? op->slices[t + 1].offset : op->count;
        size_t e;
        if (op->slices[t].offset >= i + n) break;
        for (e = mpt__max(from, i); e < mpt__min(to, i + n); e++) {
            any = 1;
            if (run) run[e - i] = 0;
        }
    }
    return any;
}

/* Counts inf and NaN in x(n), whose first element has index i, and sets them to 0. */
static void mpt__scan_bad(float *x, size_t n, size_t i, mpt_scan *out) {
    size_t e;
    for (e = 0; e < n; e++) {
        if (mpt__finite(x[e])) continue;
        if (out->inf + out->nan == 0) out->first = i + e;
        if (mpt__is_nan(x[e])) out->nan++;
        else out->inf++;
        x[e] = 0;
    }
}

/* Scans elements i .. i+n, one chunk: in place, or in a copy in `run` if they are to be scaled, contain padding, do not
   fill whole lanes, have a type without a kernel, or turn out to contain inf or NaN. */
static void mpt__scan_chunk(const mpt__scan_work *w, size_t i, size_t n, float *run, mpt_scan *out) {
    const int padded = w->update && mpt__scan_padding(w->update, i, n, NULL);
    const int simple = w->factor == 1 && n % MPT__LANES == 0 && !padded;
    const int direct = simple && w->x.type <= MPT_BF16 && w->ctx->simd.squares[w->x.type];
    const mpt_array x = direct ? mpt__array_at(w->x, i) : mpt_f32_array(run);
    double lanes[MPT__LANES] = {0};
    size_t e, whole = n, width;
    if (!direct) mpt__load(w->ctx, w->x, i, n, run);
    if (padded) mpt__scan_padding(w->update, i, n, run);
    if (w->factor != 1) {
        for (e = 0; e < n; e++) run[e] = mpt__mul_rn(run[e], w->factor);
        mpt__store(w->ctx, w->x, i, n, run);
        mpt__load(w->ctx, w->x, i, n, run);
    }
    for (; whole % MPT__LANES; whole++) run[whole] = 0;
    if (w->ctx->simd.squares[x.type](x.data, whole, lanes)) {
        if (direct) mpt__load(w->ctx, w->x, i, n, run);
        mpt__scan_bad(run, n, i, out);
        memset(lanes, 0, sizeof lanes);
        w->ctx->simd.squares[MPT_F32](run, whole, lanes);
    }
    for (width = MPT__LANES / 2; width; width /= 2)
        for (e = 0; e < width; e++) lanes[e] += lanes[e + width];
    out->sum_squares += lanes[0];
}

static void mpt__scan_task(void *arg, size_t begin, size_t end, int worker) {
    const mpt__scan_work *w = (const mpt__scan_work *)arg;
    const size_t each = (w->chunks + MPT__SCAN_BLOCKS - 1) / MPT__SCAN_BLOCKS;
    float *run = mpt__worker_space(w->ctx, worker);
    size_t c;
    for (; begin < end; begin++)
        for (c = begin * each; c < mpt__min((begin + 1) * each, w->chunks); c++)
            mpt__scan_chunk(w, c * MPT__CHUNK, mpt__min(w->n - c * MPT__CHUNK, MPT__CHUNK), run, &w->ctx->scans[begin]);
}

static mpt_result mpt__scan_do(mpt_context *ctx, size_t n, float factor, mpt_array x, const mpt_update_op *update,
                               mpt_scan *out) {
    mpt__scan_work w = {ctx, factor, x, n, n / MPT__CHUNK + (n % MPT__CHUNK != 0), update};
    size_t b;
    memset(ctx->scans, 0, sizeof ctx->scans);
    mpt__parallel(ctx, MPT__SCAN_BLOCKS, n, mpt__scan_task, &w);
    memset(out, 0, sizeof *out);
    out->first = n;
    for (b = 0; b < MPT__SCAN_BLOCKS; b++) mpt__scan_join(out, &ctx->scans[b]);
    return MPT_OK;
}

/* Each chunk by itself */
static void mpt__scan_own_task(void *arg, size_t begin, size_t end, int worker) {
    const mpt__scan_work *w = (const mpt__scan_work *)arg;
    const mpt_shard *s = w->update->shard;
    float *run = mpt__worker_space(w->ctx, worker);
    for (; begin < end; begin++) {
        const size_t c = s->chunks[s->ranks->rank] + begin;
        memset(&s->parts[c], 0, sizeof *s->parts);
        mpt__scan_chunk(w, c * MPT__CHUNK, mpt__min(w->n - c * MPT__CHUNK, MPT__CHUNK), run, &s->parts[c]);
    }
}

/* Each rank scans the chunks that it owns; then every rank adds up the chunks of all, in the order of a single rank. */
static mpt_result mpt__scan_shards(mpt_context *ctx, const mpt_update_op *op, mpt_scan *out) {
    const mpt_shard *s = op->shard;
    const size_t *chunks = s->chunks + s->ranks->rank, all = s->chunks[s->ranks->ranks];
    const size_t each = (all + MPT__SCAN_BLOCKS - 1) / MPT__SCAN_BLOCKS;
    mpt__scan_work w = {ctx, 1, mpt_f32_array(op->grad), op->count, all, op};
    size_t b, c;
    mpt__parallel(ctx, chunks[1] - chunks[0], op->own, mpt__scan_own_task, &w);
    MPT__TRY(mpt__all_gather(ctx, s->ranks, s->parts, s->chunks, sizeof *s->parts));
    memset(out, 0, sizeof *out);
    out->first = op->count;
    for (b = 0; b < all; b += each) {
        mpt_scan block = MPT_ZERO;
        for (c = b; c < mpt__min(b + each, all); c++) mpt__scan_join(&block, &s->parts[c]);
        mpt__scan_join(out, &block);
    }
    return MPT_OK;
}

static mpt_result mpt__cpu_scan(mpt_context *ctx, size_t n, float factor, mpt_array x, mpt_scan *out) {
    return mpt__scan_do(ctx, n, factor, x, NULL, out);
}

static mpt_result mpt__cpu_histogram(mpt_context *ctx, size_t n, mpt_array x, mpt_histogram *h) {
    size_t i;
    for (i = 0; i < n; i++) {
        const uint32_t magnitude = mpt__bits(mpt__get(ctx, x, i)) & 0x7fffffffu;
        if (magnitude == 0) h->zero++;
        else if (magnitude < 0x7f800000u) h->exponent[magnitude >> 23]++;
        else if (magnitude == 0x7f800000u) h->inf++;
        else h->nan++;
    }
    return MPT_OK;
}

/* -- Optimizer -- */

static mpt_result mpt__cpu_check(mpt_context *ctx, const mpt_update_op *op) {
    mpt_scan scan;
    size_t i = 0;
    while (i < op->commits && mpt__finite(op->pending[i])) i++;
    if (op->shard) MPT__TRY(mpt__scan_shards(ctx, op, &scan));
    else MPT__TRY(mpt__scan_do(ctx, op->count, 1, mpt_f32_array(op->grad), op, &scan));
    mpt__state_checked(op, &scan, i == op->commits);
    return MPT_OK;
}

typedef struct mpt__update_work {
    mpt_context *ctx;
    const mpt_update_op *op;
    int tensor;      /* index of the slice... */
    size_t from, to; /* ...and elements of it that are updated */
    mpt__rates rates;
} mpt__update_work;

/* p(n) = the fp32 values of weights from element i of the flat arrays on */
static void mpt__weights_read(const mpt_context *ctx, const mpt_update_op *op, size_t i, size_t n, float *p) {
    const uint16_t *copy = (const uint16_t *)op->copy.data;
    const size_t own = i - op->first;
    size_t e;
    if (op->master) memcpy(p, op->master + own, n * sizeof *p);
    else if (!op->low) mpt__load(ctx, op->copy, i, n, p);
    else
        for (e = 0; e < n; e++) p[e] = mpt__weight_load(op->mode, op->copy.type, copy[i + e], op->low[own + e]);
}

/* The reverse. first: index of element i in its tensor, which selects its random number */
static void mpt__weights_write(const mpt_context *ctx, const mpt_update_op *op, size_t i, size_t n, const float *p,
                               int tensor, size_t first) {
    uint16_t *copy = (uint16_t *)op->copy.data, none = 0;
    float *wide = op->slices[tensor].wide;
    const size_t own = i - op->first;
    size_t e;
    if (op->master) memcpy(op->master + own, p, n * sizeof *p);
    if (wide) memcpy(wide + first, p, n * sizeof *p);
    if (op->mode == MPT_MASTER_F32 || op->mode == MPT_MASTER_NONE) {
        if (copy) mpt__store(ctx, op->copy, i, n, p);
        return;
    }
    for (e = 0; e < n; e++) {
        uint32_t random = 0;
        if (op->mode == MPT_MASTER_STOCHASTIC)
            random = mpt_hash(op->seed, op->state->applied, (uint64_t)tensor + 1, first + e);
        mpt__weight_store(op->mode, op->copy.type, p[e], random, &copy[i + e], op->low ? &op->low[own + e] : &none);
    }
}

/* Updates p(n), whose moments start at element `own` of this rank's arrays. */
static void mpt__update_some(const mpt__update_work *w, size_t own, size_t n, float *p) {
    float *const *moment = w->op->moment;
    w->ctx->simd.update(&w->rates, n, p, w->op->grad + w->op->first + own, mpt__floats_at(moment[0], own),
                        mpt__floats_at(moment[1], own), mpt__floats_at(moment[2], own));
}

/* Updates masters in place, a piece at a time, so that the copy is made from values still in cache. */
static void mpt__update_masters(const mpt__update_work *w, size_t i, size_t n) {
    const mpt_update_op *op = w->op;
    const mpt_tensor_slice *slice = &op->slices[w->tensor];
    size_t some;
    for (; n; n -= some, i += some) {
        float *master = op->master + (i - op->first);
        some = mpt__min(n, 1024);
        mpt__update_some(w, i - op->first, some, master);
        if (op->copy.data) mpt__store(w->ctx, op->copy, i, some, master);
        if (slice->wide) memcpy(slice->wide + (i - slice->offset), master, some * sizeof *master);
    }
}

static void mpt__update_task(void *arg, size_t begin, size_t end, int worker) {
    const mpt__update_work *w = (const mpt__update_work *)arg;
    const mpt_update_op *op = w->op;
    const mpt_dtype type = op->copy.data ? op->copy.type : MPT_BF16; /* for the meter */
    mpt__meter *meter = &w->ctx->meters[worker];
    float before[MPT__RUN], p[MPT__RUN];
    if (op->master && !op->desc.meter) {
        const size_t first = w->from + begin * MPT__RUN, last = mpt__min(w->from + end * MPT__RUN, w->to);
        mpt__update_masters(w, first, last - first);
        return;
    }
    for (; begin < end; begin++) {
        const size_t i = w->from + begin * MPT__RUN, n = mpt__min(w->to - i, MPT__RUN);
        size_t e;
        mpt__weights_read(w->ctx, op, i, n, p);
        memcpy(before, p, n * sizeof *p);
        mpt__update_some(w, i - op->first, n, p);
        mpt__weights_write(w->ctx, op, i, n, p, w->tensor, i - op->slices[w->tensor].offset);
        if (!op->desc.meter) continue;
        for (e = 0; e < n; e++) {
            if (p[e] == before[e]) continue;
            meter->moved++;
            meter->lost += mpt__update_lost(type, before[e], p[e]) != 0;
        }
    }
}

/* The averages of all weights, padding included, after the update */
static void mpt__average_task(void *arg, size_t begin, size_t end, int worker) {
    const mpt__update_work *w = (const mpt__update_work *)arg;
    const mpt_update_op *op = w->op;
    float p[MPT__RUN];
    size_t e;
    (void)worker;
    for (; begin < end; begin++) {
        const size_t own = begin * MPT__RUN, n = mpt__min(op->own - own, MPT__RUN);
        mpt__weights_read(w->ctx, op, op->first + own, n, p);
        for (e = 0; e < n; e++) op->average[own + e] = mpt__average(op, op->average[own + e], p[e]);
    }
}

/* The elements that this rank owns, tensor by tensor */
static void mpt__update_tensors(mpt__update_work *w) {
    const mpt_update_op *op = w->op;
    mpt_optimizer_state *state = op->state;
    mpt_context *ctx = w->ctx;
    int t;
    memset(ctx->meters, 0, sizeof ctx->meters);
    for (t = 0; t < op->tensors; t++) {
        const mpt_tensor_slice *slice = &op->slices[t];
        size_t count;
        w->tensor = t;
        w->from = mpt__max(slice->offset, op->first);
        w->to = mpt__min(slice->offset + slice->count, op->first + op->own);
        if (w->from >= w->to) continue;
        count = w->to - w->from;
        w->rates = mpt__rates_of(op, slice);
        mpt__parallel(ctx, (count + MPT__RUN - 1) / MPT__RUN, count * 4, mpt__update_task, w);
    }
    state->moved = state->lost = 0;
    for (t = 0; t < mpt_thread_count(ctx); t++) {
        state->moved += ctx->meters[t].moved;
        state->lost += ctx->meters[t].lost;
    }
}

/* Ranks exchange their weights even after a skipped step, so that no rank waits for another in vain. */
static mpt_result mpt__update_share(mpt_context *ctx, const mpt_update_op *op) {
    const mpt_ranks *r = op->shard->ranks;
    uint64_t *meter = op->shard->meters + 2 * r->rank;
    meter[0] = op->state->moved;
    meter[1] = op->state->lost;
    MPT__TRY(mpt__share_weights(ctx, op));
    if (op->desc.meter && !op->state->found) mpt__meters_add(op->state, op->shard->meters, r->ranks);
    return MPT_OK;
}

static mpt_result mpt__cpu_update(mpt_context *ctx, const mpt_update_op *op) {
    const int found = mpt__step_found(op) != 0;
    mpt__update_work w;
    w.ctx = ctx;
    w.op = op;
    if (!found) mpt__update_tensors(&w);
    if (op->commits && found) memcpy(op->pending, op->committed, op->commits * sizeof *op->pending);
    else if (op->commits) memcpy(op->committed, op->pending, op->commits * sizeof *op->pending);
    mpt__state_stepped(op);
    if (op->average && !found)
        mpt__parallel(ctx, (op->own + MPT__RUN - 1) / MPT__RUN, op->own * 2, mpt__average_task, &w);
    if (op->shard) return mpt__update_share(ctx, op);
    return MPT_OK;
}

static mpt_result mpt__cpu_scale(mpt_context *ctx, mpt_scaler_state *scaler, const int32_t *const *found, int count,
                                 int32_t *stuck) {
    (void)ctx;
    mpt__scaler_follow(scaler, found, count);
    *stuck = scaler->stuck;
    return MPT_OK;
}

/* -- Ranks -- */

static mpt_result mpt__cpu_ranks(mpt_context *ctx, const mpt_ranks_op *op) {
    const mpt_ranks *r = op->ranks;
    const size_t slots = (size_t)r->ranks * MPT__SLOT;
    const float share = 1.0f / (float)r->ranks;
    uint64_t words[MPT__SLOT_WORDS];
    size_t i;
    int w;
    (void)ctx;
    if (op->early) return r->sum(r->user, op->grad, op->count);
    memcpy(words, op->sum, sizeof words);
    for (i = 0; i < slots; i++) op->slots[i] = mpt__slot_put(words, r->rank, i);
    MPT__TRY(r->sum(r->user, op->slots, slots));
    if (op->shard) MPT__TRY(r->reduce_scatter(r->user, op->grad, op->shard->begin));
    else if (op->count) MPT__TRY(r->sum(r->user, op->grad, op->count));
    if (op->statistics) MPT__TRY(r->sum(r->user, op->pending, op->statistics));
    for (i = 0; i < op->statistics; i++) op->pending[i] = mpt__mul_rn(op->pending[i], share);
    for (w = 0; w < MPT__SLOT_WORDS; w++) words[w] = mpt__slot_total(op->slots, r->ranks, w);
    memcpy(op->sum, words, sizeof words);
    return MPT_OK;
}

/* -- The table -- */

static mpt_result mpt__cpu_copy(mpt_context *ctx, void *dst, const void *src, size_t bytes) {
    (void)ctx;
    memcpy(dst, src, bytes);
    return MPT_OK;
}

/* Host memory is device memory: nothing is copied. */
static mpt_result mpt__cpu_feed(mpt_context *ctx, mpt_feed_op *op) {
    (void)ctx;
    op->at = op->x;
    if (op->floats) op->first = mpt__first_bad((const float *)op->x, op->floats);
    return MPT_OK;
}

static mpt_result mpt__cpu_zero(mpt_context *ctx, void *p, size_t bytes) {
    (void)ctx;
    memset(p, 0, bytes);
    return MPT_OK;
}

static mpt_backend mpt__cpu_backend(void) {
    mpt_backend b = MPT_ZERO;
    b.name = "cpu";
    b.overhead = MPT__OVERHEAD;
    b.alloc = mpt__host_alloc;
    b.release = mpt__host_free;
    b.upload = mpt__cpu_copy;
    b.feed = mpt__cpu_feed;
    b.download = mpt__cpu_copy;
    b.copy = mpt__cpu_copy;
    b.zero = mpt__cpu_zero;
    b.scan = mpt__cpu_scan;
    b.histogram = mpt__cpu_histogram;
    b.map = mpt__cpu_map;
    b.gemm = mpt__cpu_gemm;
    b.conv2d = mpt__cpu_conv2d;
    b.columns = mpt__cpu_columns;
    b.broadcast = mpt__cpu_broadcast;
    b.pool2d = mpt__cpu_pool2d;
    b.norm = mpt__cpu_norm;
    b.loss = mpt__cpu_loss;
    b.ranks = mpt__cpu_ranks;
    b.check = mpt__cpu_check;
    b.update = mpt__cpu_update;
    b.scale = mpt__cpu_scale;
    return b;
}

/* ==== TRAINING PARTS ====

   -- Scaler -- */

struct mpt_scaler {
    mpt_context *ctx;
    mpt_scaler_state *state;                   /* device */
    mpt_optimizer *optimizers[MPT_OPTIMIZERS]; /* those that share the scale; free places are NULL */
};

typedef enum mpt__phase { MPT__READY = 0, MPT__UNSCALED, MPT__STEPPED } mpt__phase;

struct mpt_optimizer {
    mpt_context *ctx;
    mpt_params *params;
    mpt_scaler *scaler;
    mpt_update_op op; /* given to the backend; pointers into device memory */
    double lr;
    mpt_tensor_slice *slices; /* host copy of op.slices */
    mpt__phase phase;
    uint64_t steps;                   /* calls of mpt_step that succeeded */
    mpt_optimizer_state mirror;       /* room for a copy of the state on the host */
    mpt_result (*gather)(void *user); /* completes the gradients before they are checked; NULL: they are complete */
    void *gather_user;
};

/* x, or `otherwise` where x is 0. Tests the bits: under -ffast-math NaN might pass for 0. */
static double mpt__or(double x, double otherwise) {
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    if (u << 1) return x;
    return otherwise;
}

static int mpt__or_int(int x, int otherwise) {
    if (x) return x;
    return otherwise;
}

MPT_DEF mpt_scaler_desc mpt_scaler_defaults(const mpt_scaler_desc *desc) {
    mpt_scaler_desc d = MPT_ZERO;
    if (desc) d = *desc;
    if (d.mode == MPT_SCALER_DEFAULT) d.mode = MPT_SCALER_DYNAMIC;
    d.init_scale = (float)mpt__or(d.init_scale, 65536);
    if (d.mode == MPT_SCALER_OFF) d.init_scale = 1;
    d.growth_factor = mpt__or(d.growth_factor, 2);
    d.backoff_factor = mpt__or(d.backoff_factor, 0.5);
    d.min_scale = (float)mpt__or(d.min_scale, 1);
    d.max_scale = (float)mpt__or(d.max_scale, 16777216);
    d.growth_interval = mpt__or_int(d.growth_interval, 2000);
    d.hysteresis = mpt__or_int(d.hysteresis, 1);
    d.patience = mpt__or_int(d.patience, 10);
    return d;
}

MPT_DEF mpt_scaler_state mpt_scaler_start(const mpt_scaler_desc *desc) {
    mpt_scaler_state s = MPT_ZERO;
    s.version = MPT_SCALER_STATE_VERSION;
    s.desc = mpt_scaler_defaults(desc);
    s.scale = s.desc.init_scale;
    s.growth_tracker = mpt__growth_start(&s.desc);
    s.hysteresis_left = s.desc.hysteresis;
    return s;
}

static int mpt__positive(float x) { return mpt__finite(x) && x > 0; }

/* Checks that the rule can continue from a state of unknown origin. */
static mpt_result mpt__scaler_state_check(mpt_context *ctx, const mpt_scaler_state *s) {
    const mpt_scaler_desc *d = &s->desc;
    if (s->version != MPT_SCALER_STATE_VERSION)
        return mpt_fail(ctx, MPT_ERROR_UNSUPPORTED, "scaler: state of version %d, this is version %d", (int)s->version,
                        (int)MPT_SCALER_STATE_VERSION);
    if ((unsigned)d->mode > MPT_SCALER_OFF)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "scaler: unknown mode %d", (int)d->mode);
    if (!mpt__positive(s->scale))
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "scaler: scale %g is not a finite number above 0", (double)s->scale);
    if (!mpt__positive(d->init_scale) || !mpt__positive(d->min_scale) || !mpt__positive(d->max_scale))
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT,
                        "scaler: init_scale %g, min_scale %g, max_scale %g must be finite and above 0",
                        (double)d->init_scale, (double)d->min_scale, (double)d->max_scale);
    if (!mpt__positive((float)d->growth_factor) || d->growth_factor < 1 || !mpt__positive((float)d->backoff_factor) ||
        d->backoff_factor > 1)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT,
                        "scaler: growth_factor %g must be at least 1, backoff_factor %g in (0, 1]", d->growth_factor,
                        d->backoff_factor);
    if (d->growth_interval < 1 || d->hysteresis < 1 || d->patience < 1)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT,
                        "scaler: growth_interval %d, hysteresis %d, patience %d must be positive", d->growth_interval,
                        d->hysteresis, d->patience);
    if (d->mode == MPT_SCALER_DYNAMIC &&
        ((!d->no_min && s->scale < d->min_scale) || (!d->no_max && s->scale > d->max_scale)))
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "scaler: scale %g is not between min_scale %g and max_scale %g",
                        (double)s->scale, (double)d->min_scale, (double)d->max_scale);
    if (s->growth_tracker < -1 || s->growth_tracker >= d->growth_interval || s->hysteresis_left < 0 ||
        s->hysteresis_left > d->hysteresis || s->stuck < 0 || s->overflows > s->updates)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT,
                        "scaler: growth_tracker %d of %d, hysteresis_left %d of %d, stuck %d, or more overflows than "
                        "updates",
                        (int)s->growth_tracker, d->growth_interval, (int)s->hysteresis_left, d->hysteresis,
                        (int)s->stuck);
    return MPT_OK;
}

MPT_DEF mpt_scaler *mpt_scaler_new(mpt_context *ctx, const mpt_scaler_desc *desc) {
    const mpt_scaler_state start = mpt_scaler_start(desc);
    mpt_scaler *scaler;
    if (!ctx || mpt__scaler_state_check(ctx, &start) != MPT_OK) return NULL;
    scaler = (mpt_scaler *)mpt__host_alloc(ctx, sizeof *scaler);
    if (!scaler) return NULL;
    scaler->ctx = ctx;
    scaler->state = (mpt_scaler_state *)mpt_alloc(ctx, sizeof start);
    if (!scaler->state || mpt_upload(ctx, scaler->state, &start, sizeof start) != MPT_OK) {
        mpt_scaler_free(scaler);
        return NULL;
    }
    return scaler;
}

MPT_DEF void mpt_scaler_free(mpt_scaler *scaler) {
    if (!scaler) return;
    mpt_free(scaler->ctx, scaler->state);
    mpt__host_free(scaler->ctx, scaler);
}

MPT_DEF mpt_result mpt_scaler_get_state(mpt_scaler *scaler, mpt_scaler_state *out) {
    if (!scaler) return MPT_ERROR_ARGUMENT;
    return mpt_download(scaler->ctx, out, scaler->state, sizeof *out);
}

MPT_DEF mpt_result mpt_scaler_set_state(mpt_scaler *scaler, const mpt_scaler_state *state) {
    if (!scaler) return MPT_ERROR_ARGUMENT;
    if (!state) return mpt_fail(scaler->ctx, MPT_ERROR_ARGUMENT, "scaler_set_state: state is NULL");
    MPT__TRY(mpt__scaler_state_check(scaler->ctx, state));
    return mpt_upload(scaler->ctx, scaler->state, state, sizeof *state);
}

MPT_DEF float mpt_scaler_scale(mpt_scaler *scaler) {
    mpt_scaler_state s = MPT_ZERO;
    if (mpt_scaler_get_state(scaler, &s) != MPT_OK) return 0;
    return s.scale;
}

MPT_DEF mpt_result mpt_scaler_set_scale(mpt_scaler *scaler, float scale) {
    mpt_scaler_state s = MPT_ZERO;
    MPT__TRY(mpt_scaler_get_state(scaler, &s));
    if (!mpt__positive(scale))
        return mpt_fail(scaler->ctx, MPT_ERROR_ARGUMENT, "scaler_set_scale: %g is not a finite number above 0",
                        (double)scale);
    s.scale = scale;
    s.growth_tracker = mpt__growth_start(&s.desc);
    s.hysteresis_left = s.desc.hysteresis;
    s.stuck = 0;
    return mpt_scaler_set_state(scaler, &s);
}

/* Reports what keeps steps from being applied, if one of these optimizers skipped its last step. */
static mpt_result mpt__diverged(mpt_scaler *scaler, mpt_optimizer *const *stepped, int count, int stuck) {
    int i;
    for (i = 0; i < count; i++) {
        mpt_optimizer_state *s = &stepped[i]->mirror;
        MPT__TRY(mpt_optimizer_get_state(stepped[i], s));
        if (s->found == MPT_SKIP_GRADIENT)
            return mpt_fail(scaler->ctx, MPT_ERROR_DIVERGED,
                            "scaler_update: %d steps in a row with inf or NaN at the smallest scale %g; gradient of "
                            "'%s', %zu inf, %zu NaN",
                            stuck, (double)s->journal[(s->skipped - 1) % MPT_JOURNAL].scale,
                            mpt_params_name(stepped[i]->params, (int)s->scan.first), (size_t)s->scan.inf,
                            (size_t)s->scan.nan);
        if (s->found >= MPT_SKIP_STATISTICS)
            return mpt_fail(scaler->ctx, MPT_ERROR_DIVERGED, "scaler_update: %d steps in a row after which %s", stuck,
                            s->found == MPT_SKIP_MOMENT ? "a moment of the optimizer could be inf"
                                                        : "a running statistic would be inf or NaN");
    }
    return MPT_OK; /* the device reported an earlier `stuck`: this step was finite */
}

MPT_DEF mpt_result mpt_scaler_update(mpt_scaler *scaler) {
    const int32_t *found[MPT_OPTIMIZERS];
    mpt_optimizer *stepped[MPT_OPTIMIZERS];
    mpt_scaler_state s = MPT_ZERO;
    int32_t stuck = 0;
    int i, count = 0;
    if (!scaler) return MPT_ERROR_ARGUMENT;
    mpt__forget(scaler->ctx);
    for (i = 0; i < MPT_OPTIMIZERS; i++) {
        mpt_optimizer *opt = scaler->optimizers[i];
        if (!opt || opt->phase == MPT__READY) continue;
        if (opt->phase == MPT__UNSCALED)
            return mpt_fail(scaler->ctx, MPT_ERROR_ORDER, "scaler_update: an optimizer was unscaled but not stepped");
        found[count] = &opt->op.state->found;
        stepped[count++] = opt;
    }
    if (!count)
        return mpt_fail(scaler->ctx, MPT_ERROR_ORDER, "scaler_update: no optimizer was stepped since the last update");
    MPT__TRY(scaler->ctx->backend.scale(scaler->ctx, scaler->state, found, count, &stuck));
    for (i = 0; i < count; i++) stepped[i]->phase = MPT__READY;
    if (!stuck) return MPT_OK;
    MPT__TRY(mpt_scaler_get_state(scaler, &s));
    if (!mpt__positive(s.scale))
        return mpt_fail(scaler->ctx, MPT_ERROR_DIVERGED,
                        "scaler_update: the scale is %g and cannot change; set it with mpt_scaler_set_scale",
                        (double)s.scale);
    if (s.stuck < s.desc.patience) return MPT_OK; /* `stuck` may be an earlier value, s.stuck is not */
    return mpt__diverged(scaler, stepped, count, s.stuck);
}

/* -- Parameter block -- */

typedef struct mpt__tensor {
    char name[64];
    size_t offset, count;
    unsigned group;
    int wide;       /* the net reads its fp32 values */
    size_t wide_at; /* where they begin in the shard's `wide`; if wide is 0, where those of the next tensor do */
} mpt__tensor;

/* The sharded arrays, in the order in which they are collected to be saved; 0 is none. */
enum { MPT__MOMENTS = 1, MPT__AVERAGES = 4, MPT__MASTERS, MPT__LOWS, MPT__ROLES };

struct mpt_params {
    mpt_context *ctx;
    mpt_params_desc desc;
    mpt__tensor *tensors;
    int count, capacity;
    mpt_result failed; /* of the first mpt_params_add that failed, with the reason */
    char why[256];
    size_t elements; /* of the flat arrays; 0 until built */
    size_t trained;  /* elements of the first trained_count tensors, which are not frozen */
    int trained_count;
    float *master, *grad; /* device */
    mpt_array copy;
    uint16_t *low;     /* see mpt_update_op */
    size_t first, own; /* trained elements that this rank updates: 0, trained without a shard */
    mpt_shard *shard;  /* NULL: none */
    /* Collects a role in `grad`. All ranks must call it together. */
    mpt_result (*collect)(void *user, int role);
    void *collect_user;
};

enum { MPT__TENSOR_ALIGN = 16 }; /* elements: 32 bytes in 16 bits, enough for cuBLAS's 16-byte rule */

MPT_DEF mpt_params *mpt_params_new(mpt_context *ctx, const mpt_params_desc *desc) {
    mpt_params *params;
    if (!ctx) return NULL;
    if (desc && (unsigned)desc->type > MPT_BF16) {
        mpt_fail(ctx, MPT_ERROR_TYPE, "params: copies of type %s; f32, f16 and bf16 are allowed",
                 mpt_dtype_name(desc->type));
        return NULL;
    }
    if (desc && ((unsigned)desc->master > MPT_MASTER_STOCHASTIC ||
                 (desc->master == MPT_MASTER_SPLIT && desc->type == MPT_F16))) {
        mpt_fail(ctx, MPT_ERROR_ARGUMENT, "params: master %d with copies of type %s", (int)desc->master,
                 mpt_dtype_name(desc->type));
        return NULL;
    }
    params = (mpt_params *)mpt__host_alloc(ctx, sizeof *params);
    if (!params) return NULL;
    params->ctx = ctx;
    if (desc) params->desc = *desc;
    if (params->desc.type == MPT_F32) params->desc.master = MPT_MASTER_F32;
    return params;
}

static void mpt__shard_free(mpt_params *params) {
    if (!params->shard) return;
    mpt_free(params->ctx, params->shard->parts);
    mpt_free(params->ctx, params->shard->wide);
    mpt_free(params->ctx, params->shard->meters);
    mpt__host_free(params->ctx, params->shard);
    params->shard = NULL;
}

static void mpt__params_clear(mpt_params *params) {
    mpt__shard_free(params);
    mpt_free(params->ctx, params->master);
    mpt_free(params->ctx, params->grad);
    mpt_free(params->ctx, params->copy.data);
    mpt_free(params->ctx, params->low);
    params->master = params->grad = NULL;
    params->copy.data = NULL;
    params->low = NULL;
}

MPT_DEF void mpt_params_free(mpt_params *params) {
    if (!params) return;
    mpt__params_clear(params);
    mpt__host_free(params->ctx, params->tensors);
    mpt__host_free(params->ctx, params);
}

/* Makes room for one more element in a table, doubling it when it is full. NULL: out of memory; the table stays. */
static void *mpt__grow(mpt_context *ctx, void *table, int count, int *capacity, size_t size) {
    const int wanted = mpt__or_int(*capacity * 2, 16);
    void *bigger;
    if (count < *capacity) return table;
    bigger = mpt__host_alloc(ctx, (size_t)wanted * size);
    if (!bigger) return NULL;
    if (table) memcpy(bigger, table, (size_t)count * size);
    mpt__host_free(ctx, table);
    *capacity = wanted;
    return bigger;
}

static mpt_result mpt__params_try_add(mpt_params *params, const char *name, size_t count, unsigned group) {
    mpt__tensor *table, *t;
    if (params->elements) return mpt_fail(params->ctx, MPT_ERROR_ORDER, "params_add '%s': already built", name);
    if (!name || !*name || strlen(name) >= sizeof t->name)
        return mpt_fail(params->ctx, MPT_ERROR_ARGUMENT, "params_add: the name '%s' is empty or over 63 characters",
                        name);
    if (!count) return mpt_fail(params->ctx, MPT_ERROR_SHAPE, "params_add '%s': count is 0", name);
    if (group >= 1u << 16)
        return mpt_fail(params->ctx, MPT_ERROR_ARGUMENT, "params_add '%s': group %d is above 1 << 15", name,
                        (int)group);
    if (!(group & MPT_GROUP_FROZEN) && params->trained_count < params->count)
        return mpt_fail(params->ctx, MPT_ERROR_ORDER, "params_add '%s': it is not frozen, but the tensor before it is",
                        name);
    MPT__TRY(mpt__need_size(params->ctx, "params_add", name, count, 1, 1, 1));
    table = (mpt__tensor *)mpt__grow(params->ctx, params->tensors, params->count, &params->capacity, sizeof *table);
    if (!table) return MPT_ERROR_NO_MEMORY;
    params->tensors = table;
    t = &table[params->count++];
    memcpy(t->name, name, strlen(name) + 1);
    t->count = count;
    t->group = group;
    if (!group) t->group = MPT_GROUP_WEIGHT;
    if (!(group & MPT_GROUP_FROZEN)) params->trained_count = params->count;
    return MPT_OK;
}

MPT_DEF int mpt_params_add(mpt_params *params, const char *name, size_t count, unsigned group) {
    mpt_result r;
    if (!params) return 0;
    r = mpt__params_try_add(params, name, count, group);
    if (r != MPT_OK && params->failed == MPT_OK && !params->elements) {
        params->failed = r;
        memcpy(params->why, params->ctx->why, sizeof params->why);
    }
    if (r != MPT_OK) return 0;
    return params->count;
}

/* Elements of tensor t, from 0, with the padding behind it */
static size_t mpt__padded(const mpt__tensor *tensor) {
    return (tensor->count + MPT__TENSOR_ALIGN - 1) / MPT__TENSOR_ALIGN * MPT__TENSOR_ALIGN;
}

/* Elements of `wide` that lie before element i of the flat arrays */
static size_t mpt__wide_before(const mpt_params *params, size_t i) {
    size_t before = 0;
    int t;
    for (t = 0; t < params->trained_count; t++) {
        const mpt__tensor *tensor = &params->tensors[t];
        if (tensor->wide && i > tensor->offset) before += mpt__min(i - tensor->offset, mpt__padded(tensor));
    }
    return before;
}

/* Whether masters, or what a weight has instead, are sharded. fp32 masters without 16-bit copies are not: all ranks
   read them. */
static int mpt__weights_sharded(const mpt_params *params) { return params->shard && params->copy.data; }

/* Deals the chunks out evenly, in the order of ranks. */
static void mpt__shard_deal(mpt_params *params, const mpt_ranks *ranks, size_t *begin, size_t chunks) {
    const size_t R = (size_t)ranks->ranks, few = chunks / R, rest = chunks % R;
    size_t r;
    for (r = 0; r <= R; r++) {
        const size_t chunk = r * few + mpt__min(r, rest), element = mpt__min(chunk * MPT__CHUNK, params->trained);
        begin[r] = element;
        begin[R + 1 + r] = chunk;
        begin[2 * (R + 1) + r] = mpt__wide_before(params, element);
        begin[3 * (R + 1) + r] = r;
    }
    params->first = begin[ranks->rank];
    params->own = begin[ranks->rank + 1] - params->first;
}

static size_t mpt__shard_bytes(const mpt_ranks *ranks) {
    return sizeof(mpt_shard) + 4 * ((size_t)ranks->ranks + 1) * sizeof(size_t);
}

static mpt_result mpt__shard_new(mpt_params *params, const mpt_ranks *ranks, int has_wide) {
    const size_t each = (size_t)ranks->ranks + 1, chunks = (params->trained + MPT__CHUNK - 1) / MPT__CHUNK;
    mpt_shard *s = (mpt_shard *)mpt__host_alloc(params->ctx, mpt__shard_bytes(ranks));
    size_t *begin = (size_t *)(void *)(s + 1), wide;
    int t;
    if (!s) return MPT_ERROR_NO_MEMORY;
    params->shard = s;
    for (t = 0; t < params->trained_count; t++) {
        params->tensors[t].wide &= has_wide;
        params->tensors[t].wide_at = mpt__wide_before(params, params->tensors[t].offset);
    }
    mpt__shard_deal(params, ranks, begin, chunks);
    wide = begin[3 * each - 1];
    s->ranks = ranks;
    s->begin = begin;
    s->chunks = begin + each;
    s->wide_begin = begin + 2 * each;
    s->counting = begin + 3 * each;
    s->parts = (mpt_scan *)mpt_alloc(params->ctx, chunks * sizeof *s->parts);
    s->meters = (uint64_t *)mpt_alloc(params->ctx, 2 * (size_t)ranks->ranks * sizeof *s->meters);
    if (wide) s->wide = (float *)mpt_alloc(params->ctx, wide * sizeof(float));
    if (s->parts && s->meters && (!wide || s->wide)) return MPT_OK;
    return MPT_ERROR_NO_MEMORY;
}

/* Elements of a sharded array on this rank: never 0, so that an array exists on all ranks or on none */
static size_t mpt__own_room(const mpt_params *params) { return mpt__max(params->own, MPT__TENSOR_ALIGN); }

/* Elements of the arrays of masters and low bits. If they are sharded, frozen tensors follow this rank's part. */
static size_t mpt__kept_room(const mpt_params *params, size_t elements, int sharded) {
    if (!sharded) return elements;
    return mpt__max(params->own + elements - params->trained, MPT__TENSOR_ALIGN);
}

/* ranks: those among which the optimizer is sharded, or NULL */
static mpt_result mpt__params_build(mpt_params *params, const mpt_ranks *ranks) {
    const mpt_params_desc *d;
    size_t elements = 0, bytes, kept;
    int t, masters, lows;
    if (!params) return MPT_ERROR_ARGUMENT;
    d = &params->desc;
    if (params->elements) return mpt_fail(params->ctx, MPT_ERROR_ORDER, "params_build: already built");
    if (params->failed != MPT_OK) return mpt_fail(params->ctx, params->failed, "%s", params->why);
    if (!params->count) return mpt_fail(params->ctx, MPT_ERROR_ORDER, "params_build: there is no tensor");
    for (t = 0; t < params->count; t++) {
        mpt__tensor *tensor = &params->tensors[t];
        tensor->offset = elements;
        elements += mpt__padded(tensor);
        MPT__TRY(mpt__need_size(params->ctx, "params_build", tensor->name, elements, 1, 1, 1));
        if (t < params->trained_count) params->trained = elements;
    }
    bytes = elements * sizeof(float);
    masters = d->master == MPT_MASTER_F32;
    lows = d->master == MPT_MASTER_SPLIT || d->master == MPT_MASTER_KAHAN;
    params->own = params->trained;
    if (ranks && params->trained && mpt__shard_new(params, ranks, masters && d->type != MPT_F32) != MPT_OK) {
        mpt__params_clear(params);
        return MPT_ERROR_NO_MEMORY;
    }
    kept = mpt__kept_room(params, elements, params->shard && d->type != MPT_F32);
    if (params->trained) params->grad = (float *)mpt_alloc(params->ctx, params->trained * sizeof(float));
    if (masters) params->master = (float *)mpt_alloc(params->ctx, kept * sizeof(float));
    if (d->type != MPT_F32) params->copy = mpt_typed_array(mpt_alloc(params->ctx, bytes / 2), d->type);
    if (lows) params->low = (uint16_t *)mpt_alloc(params->ctx, kept * sizeof(uint16_t));
    if ((params->trained && !params->grad) || (masters && !params->master) ||
        (d->type != MPT_F32 && !params->copy.data) || (lows && !params->low)) {
        mpt__params_clear(params);
        return MPT_ERROR_NO_MEMORY;
    }
    params->elements = elements;
    return MPT_OK;
}

MPT_DEF mpt_result mpt_params_build(mpt_params *params) { return mpt__params_build(params, NULL); }

/* Whether a block is built and has the tensor; tensor 0 is all of it. */
static int mpt__params_has(const mpt_params *params, int tensor) {
    return params && params->elements && tensor >= 0 && tensor <= params->count;
}

static size_t mpt__params_offset(const mpt_params *params, int tensor) {
    if (!tensor) return 0;
    return params->tensors[tensor - 1].offset;
}

static float *mpt__params_slice(const mpt_params *params, float *array, int tensor) {
    if (!mpt__params_has(params, tensor) || !array) return NULL;
    return array + mpt__params_offset(params, tensor);
}

/* The place of element i of the flat arrays in masters and low bits, if this rank has it */
static size_t mpt__kept_at(const mpt_params *params, size_t i) {
    if (!mpt__weights_sharded(params)) return i;
    if (i < params->trained) return i - params->first;
    return params->own + i - params->trained;
}

/* Whether this rank has only a part of a tensor's masters or low bits */
static int mpt__tensor_sharded(const mpt_params *params, int tensor) {
    return mpt__weights_sharded(params) && tensor <= params->trained_count;
}

MPT_DEF float *mpt_params_master(mpt_params *params, int tensor) {
    if (!mpt__params_has(params, tensor) || !params->master || mpt__tensor_sharded(params, tensor)) return NULL;
    return params->master + mpt__kept_at(params, mpt__params_offset(params, tensor));
}

/* The fp32 values of a tensor that the net reads; NULL: it has none */
static float *mpt__params_f32(mpt_params *params, int tensor) {
    if (!tensor || !mpt__tensor_sharded(params, tensor)) return mpt_params_master(params, tensor);
    if (!params->tensors[tensor - 1].wide) return NULL;
    return params->shard->wide + params->tensors[tensor - 1].wide_at;
}

MPT_DEF float *mpt_params_grad(mpt_params *params, int tensor) {
    if (!params || tensor > params->trained_count) return NULL;
    return mpt__params_slice(params, params->grad, tensor);
}

MPT_DEF uint16_t *mpt_params_low(mpt_params *params, int tensor) {
    if (!mpt__params_has(params, tensor) || !params->low || mpt__tensor_sharded(params, tensor)) return NULL;
    return params->low + mpt__kept_at(params, mpt__params_offset(params, tensor));
}

MPT_DEF mpt_array mpt_params_weight(mpt_params *params, int tensor) {
    mpt_array a = MPT_ZERO;
    if (!mpt__params_has(params, tensor)) return a;
    if (!params->copy.data) return mpt_f32_array(mpt_params_master(params, tensor));
    a = params->copy;
    a.data = (uint16_t *)a.data + mpt__params_offset(params, tensor);
    return a;
}

MPT_DEF int mpt_params_tensors(const mpt_params *params) {
    if (!params) return 0;
    return params->count;
}

MPT_DEF size_t mpt_params_count(const mpt_params *params, int tensor) {
    if (!params || tensor < 0 || tensor > params->count) return 0;
    if (!tensor) return params->elements;
    return params->tensors[tensor - 1].count;
}

MPT_DEF const char *mpt_params_name(const mpt_params *params, int tensor) {
    if (!params || tensor <= 0 || tensor > params->count) return "";
    return params->tensors[tensor - 1].name;
}

MPT_DEF int mpt_params_find(const mpt_params *params, const char *name) {
    int t;
    if (!name) return 0;
    for (t = 1; t <= mpt_params_tensors(params); t++)
        if (strcmp(mpt_params_name(params, t), name) == 0) return t;
    return 0;
}

static mpt_result mpt__params_need(mpt_params *params, const char *call, int tensor, const void *host) {
    if (!params) return MPT_ERROR_ARGUMENT;
    mpt__forget(params->ctx);
    if (!params->elements) return mpt_fail(params->ctx, MPT_ERROR_ORDER, "%s: the parameter block is not built", call);
    if (tensor < 0 || tensor > params->count)
        return mpt_fail(params->ctx, MPT_ERROR_ARGUMENT, "%s: tensor %d is not in 0..%d", call, tensor, params->count);
    if (!host) return mpt_fail(params->ctx, MPT_ERROR_ARGUMENT, "%s: host is NULL", call);
    return MPT_OK;
}

/* Host memory to masters, low bits, moments or averages, elements of `size` bytes: what this rank has of a tensor. */
static mpt_result mpt__part_upload(mpt_params *params, void *array, size_t size, int tensor, const void *host) {
    const size_t at = mpt__params_offset(params, tensor), end = at + mpt_params_count(params, tensor);
    const size_t from = mpt__max(at, params->first), to = mpt__min(end, params->first + params->own);
    const size_t frozen = mpt__max(at, params->trained);
    char *first = (char *)array;
    if (from < to)
        MPT__TRY(mpt_upload(params->ctx, first + (from - params->first) * size, (const char *)host + (from - at) * size,
                            (to - from) * size));
    if (frozen >= end) return MPT_OK;
    return mpt_upload(params->ctx, first + (params->own + frozen - params->trained) * size,
                      (const char *)host + (frozen - at) * size, (end - frozen) * size);
}

/* The reverse, for masters or low bits. If they are sharded, those of trained tensors have been collected. */
static mpt_result mpt__part_download(mpt_params *params, const void *array, size_t size, int tensor, void *host) {
    const size_t at = mpt__params_offset(params, tensor), end = at + mpt_params_count(params, tensor);
    const size_t to = mpt__min(end, params->trained), frozen = mpt__max(at, params->trained);
    const char *trained = (const char *)array;
    if (mpt__weights_sharded(params)) trained = (const char *)params->grad;
    if (at < to) MPT__TRY(mpt_download(params->ctx, host, trained + at * size, (to - at) * size));
    if (frozen >= end) return MPT_OK;
    return mpt_download(params->ctx, (char *)host + (frozen - at) * size,
                        (const char *)array + mpt__kept_at(params, frozen) * size, (end - frozen) * size);
}

/* What is read of a tensor that has been given these values, in 16 bits, and the low bits with it */
static mpt_result mpt__params_set_halves(mpt_params *params, int tensor, const float *host) {
    mpt_context *ctx = params->ctx;
    const size_t count = mpt_params_count(params, tensor), bytes = count * sizeof(uint16_t);
    uint16_t *copy = (uint16_t *)mpt__host_alloc(ctx, 2 * bytes), *low;
    mpt_master mode = params->desc.master;
    mpt_result r;
    size_t i;
    if (!copy) return MPT_ERROR_NO_MEMORY;
    low = copy + count;
    if (mode == MPT_MASTER_STOCHASTIC) mode = MPT_MASTER_NONE; /* values from outside are rounded to nearest */
    for (i = 0; i < count; i++) mpt__weight_store(mode, params->desc.type, host[i], 0, &copy[i], &low[i]);
    r = mpt_upload(ctx, mpt_params_weight(params, tensor).data, copy, bytes);
    if (r == MPT_OK && params->low) r = mpt__part_upload(params, params->low, sizeof *low, tensor, low);
    mpt__host_free(ctx, copy);
    return r;
}

/* lows: with the low bits, where there are some */
static mpt_result mpt__params_get_halves(mpt_params *params, int tensor, int lows, float *host) {
    mpt_context *ctx = params->ctx;
    const size_t count = mpt_params_count(params, tensor), bytes = count * sizeof(uint16_t);
    const mpt_master mode = lows ? params->desc.master : MPT_MASTER_NONE;
    uint16_t *copy = (uint16_t *)mpt__host_alloc(ctx, 2 * bytes), *low;
    mpt_result r;
    size_t i;
    if (!copy) return MPT_ERROR_NO_MEMORY;
    low = copy + count;
    r = mpt_download(ctx, copy, mpt_params_weight(params, tensor).data, bytes);
    if (r == MPT_OK && lows && params->low) r = mpt__part_download(params, params->low, sizeof *low, tensor, low);
    if (r == MPT_OK)
        for (i = 0; i < count; i++) host[i] = mpt__weight_load(mode, params->desc.type, copy[i], low[i]);
    mpt__host_free(ctx, copy);
    return r;
}

/* Masters of a tensor, or of all, as far as this rank has them, and the fp32 values that are read */
static mpt_result mpt__params_set_masters(mpt_params *params, int tensor, const float *host) {
    const int last = tensor ? tensor : params->trained_count;
    int t;
    MPT__TRY(mpt__part_upload(params, params->master, sizeof *host, tensor, host));
    for (t = tensor ? tensor : 1; t <= last && t <= params->trained_count; t++) {
        const mpt__tensor *tensors = &params->tensors[t - 1];
        const size_t from = tensors->offset - mpt__params_offset(params, tensor);
        if (!tensors->wide) continue;
        MPT__TRY(mpt_upload(params->ctx, params->shard->wide + tensors->wide_at, host + from,
                            tensors->count * sizeof *host));
    }
    return MPT_OK;
}

MPT_DEF mpt_result mpt_params_set(mpt_params *params, int tensor, const float *host) {
    float *master;
    MPT__TRY(mpt__params_need(params, "params_set", tensor, host));
    master = mpt_params_master(params, tensor);
    if (!master) {
        if (params->master) MPT__TRY(mpt__params_set_masters(params, tensor, host));
        return mpt__params_set_halves(params, tensor, host);
    }
    MPT__TRY(mpt_upload(params->ctx, master, host, mpt_params_count(params, tensor) * sizeof *host));
    if (!params->copy.data) return MPT_OK;
    return mpt_cast(params->ctx, mpt_params_count(params, tensor), mpt_f32_array(master),
                    mpt_params_weight(params, tensor), NULL);
}

/* If masters or low bits are sharded, they have been collected. */
static mpt_result mpt__params_read(mpt_params *params, int tensor, float *host) {
    if (!params->master) return mpt__params_get_halves(params, tensor, 1, host);
    return mpt__part_download(params, params->master, sizeof *host, tensor, host);
}

MPT_DEF mpt_result mpt_params_get(mpt_params *params, int tensor, float *host) {
    MPT__TRY(mpt__params_need(params, "params_get", tensor, host));
    if (mpt__tensor_sharded(params, tensor) && params->master)
        MPT__TRY(params->collect(params->collect_user, MPT__MASTERS));
    if (mpt__tensor_sharded(params, tensor) && params->low) MPT__TRY(params->collect(params->collect_user, MPT__LOWS));
    return mpt__params_read(params, tensor, host);
}

MPT_DEF mpt_result mpt_params_zero_grad(mpt_params *params) {
    MPT__TRY(mpt__params_need(params, "params_zero_grad", 0, params));
    if (!params->trained) return MPT_OK;
    return params->ctx->backend.zero(params->ctx, params->grad, params->trained * sizeof(float));
}

/* Standard normal from two uniforms (Box and Muller 1958); 1 - u keeps the logarithm finite. */
static double mpt__normal(uint64_t seed, uint64_t tensor, uint64_t element) {
    const double u = 1.0 - (double)mpt_uniform(seed, 0, tensor, 2 * element);
    const double angle = 6.283185307179586 * (double)mpt_uniform(seed, 0, tensor, 2 * element + 1);
    return sqrt(-2 * log(u)) * cos(angle);
}

/* The bound of a uniform distribution, or the standard deviation of a normal one */
static double mpt__init_bound(mpt_init init, int bias, double fan_in, double fan_out) {
    if (init == MPT_INIT_DEFAULT) return 1 / sqrt(fan_in);
    if (bias) return 0;
    switch (init) {
    case MPT_INIT_KAIMING_UNIFORM: return sqrt(6 / fan_in);
    case MPT_INIT_KAIMING_NORMAL: return sqrt(2 / fan_in);
    case MPT_INIT_XAVIER_UNIFORM: return sqrt(6 / (fan_in + fan_out));
    case MPT_INIT_XAVIER_NORMAL: return sqrt(2 / (fan_in + fan_out));
    default: return 0;
    }
}

MPT_DEF mpt_result mpt_params_init(mpt_params *params, int tensor, mpt_init init, size_t fan_in, size_t fan_out,
                                   uint64_t seed) {
    const int normal = init == MPT_INIT_KAIMING_NORMAL || init == MPT_INIT_XAVIER_NORMAL;
    double bound, x;
    float *host;
    size_t i, count;
    int bias;
    mpt_result r;
    MPT__TRY(mpt__params_need(params, "params_init", tensor, params));
    if (tensor < 1 || (unsigned)init >= MPT_INIT_COUNT || !fan_in || !fan_out)
        return mpt_fail(params->ctx, MPT_ERROR_ARGUMENT, "params_init: tensor %d, init %d, fan_in %zu, fan_out %zu",
                        tensor, (int)init, fan_in, fan_out);
    count = mpt_params_count(params, tensor);
    host = (float *)mpt__host_alloc(params->ctx, count * sizeof *host);
    if (!host) return MPT_ERROR_NO_MEMORY;
    bias = (params->tensors[tensor - 1].group & MPT_GROUP_BIAS) != 0;
    bound = mpt__init_bound(init, bias, (double)fan_in, (double)fan_out);
    if (bound > 0) /* else all are 0, as allocated */
        for (i = 0; i < count; i++) {
            if (normal) x = mpt__normal(seed, (uint64_t)tensor, i);
            else x = 2 * (double)mpt_uniform(seed, 0, (uint64_t)tensor, i) - 1;
            host[i] = (float)(bound * x);
        }
    r = mpt_params_set(params, tensor, host);
    mpt__host_free(params->ctx, host);
    return r;
}

/* -- Optimizer -- */

MPT_DEF mpt_optimizer_desc mpt_sgd(double lr, double momentum) {
    mpt_optimizer_desc d = MPT_ZERO;
    d.kind = MPT_SGD;
    d.lr = lr;
    d.momentum = momentum;
    return d;
}

MPT_DEF mpt_optimizer_desc mpt_adam(double lr) {
    mpt_optimizer_desc d = MPT_ZERO;
    d.kind = MPT_ADAM;
    d.lr = lr;
    d.beta1 = 0.9;
    d.beta2 = 0.999;
    d.eps = 1e-8;
    return d;
}

MPT_DEF mpt_optimizer_desc mpt_adamw(double lr) {
    mpt_optimizer_desc d = mpt_adam(lr);
    d.kind = MPT_ADAMW;
    d.weight_decay = 0.01;
    return d;
}

/* Finite and at least 0 in fp32, to which hyperparameters are rounded */
static int mpt__not_negative(double x) { return mpt__finite((float)x) && x >= 0; }

static mpt_result mpt__schedule_check(mpt_context *ctx, const mpt_schedule *s) {
    const double low = s->base_momentum, high = s->max_momentum;
    if ((unsigned)s->kind > MPT_SCHEDULE_ONE_CYCLE_LINEAR)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "schedule: unknown kind %d", (int)s->kind);
    if (!mpt__not_negative(s->warmup_start) || !mpt__not_negative(s->low) || !mpt__not_negative(s->start))
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT,
                        "schedule: warmup_start %g, low %g, start %g must be finite and at least 0", s->warmup_start,
                        s->low, s->start);
    if (s->kind != MPT_SCHEDULE_CONSTANT && !s->steps) return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "schedule: steps is 0");
    if (!mpt__not_negative(low) || !mpt__not_negative(high) || low >= 1 || high >= 1)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "schedule: base_momentum %g and max_momentum %g must be in [0, 1)",
                        low, high);
    if (mpt__is_one_cycle(s) &&
        !(mpt__mul_add(s->peak, (double)s->steps, -1) > 0 && s->peak < 1)) /* see mpt_schedule_factor */
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "schedule: peak %g of %zu steps is not between the first and the last",
                        s->peak, (size_t)s->steps);
    return MPT_OK;
}

static mpt_result mpt__optimizer_check(mpt_context *ctx, const mpt_optimizer_desc *d) {
    if ((unsigned)d->kind > MPT_ADAMW)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "optimizer: unknown kind %d", (int)d->kind);
    if (!mpt__not_negative(d->lr) || !mpt__not_negative(d->weight_decay))
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "optimizer: lr %g and weight_decay %g must be finite and at least 0",
                        d->lr, d->weight_decay);
    MPT__TRY(mpt__schedule_check(ctx, &d->schedule));
    if (d->kind == MPT_SGD) {
        if (!mpt__not_negative(d->momentum) || !mpt__finite((float)d->dampening))
            return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "optimizer: momentum %g, dampening %g", d->momentum, d->dampening);
        if (d->nesterov && (!(d->momentum > 0) || d->dampening != 0))
            return mpt_fail(ctx, MPT_ERROR_ARGUMENT,
                            "optimizer: nesterov needs momentum > 0 (it is %g) and dampening 0 (%g)", d->momentum,
                            d->dampening);
        return MPT_OK;
    }
    if (!mpt__not_negative(d->beta1) || !mpt__not_negative(d->beta2) || d->beta1 >= 1 || d->beta2 >= 1)
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "optimizer: beta1 %g and beta2 %g must be in [0, 1)", d->beta1,
                        d->beta2);
    if (!mpt__not_negative(d->eps) || !((float)d->eps > 0))
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "optimizer: eps %g is not above 0 in fp32", d->eps);
    return MPT_OK;
}

/* Fills in the defaults of a descriptor that was not made by mpt_adam or mpt_adamw. */
static mpt_optimizer_desc mpt__optimizer_defaults(const mpt_optimizer_desc *desc) {
    const mpt_optimizer_desc adam = mpt_adam(1e-3), adamw = mpt_adamw(1e-3);
    mpt_optimizer_desc d = adam;
    if (!desc) return d;
    d = *desc;
    if (d.kind == MPT_OPTIMIZER_DEFAULT) d.kind = MPT_ADAM;
    if ((d.kind != MPT_ADAM && d.kind != MPT_ADAMW) || mpt__or(d.eps, 0) != 0) return d;
    d.eps = adam.eps;
    d.lr = mpt__or(d.lr, adam.lr);
    d.beta1 = mpt__or(d.beta1, adam.beta1);
    d.beta2 = mpt__or(d.beta2, adam.beta2);
    if (d.kind == MPT_ADAMW) d.weight_decay = mpt__or(d.weight_decay, adamw.weight_decay);
    return d;
}

/* Learning rates are on the device, so that a recorded step reads new ones. */
static mpt_result mpt__slices_upload(mpt_optimizer *opt) {
    int t;
    if (!opt->op.tensors) return MPT_OK;
    for (t = 0; t < opt->op.tensors; t++) opt->slices[t].lr = opt->lr * opt->slices[t].lr_factor;
    return mpt_upload(opt->ctx, mpt_typed_array(opt->op.slices, MPT_F32).data, opt->slices,
                      (size_t)opt->op.tensors * sizeof *opt->slices);
}

static int mpt__moment_count(const mpt_optimizer_desc *d) {
    if (d->kind == MPT_SGD) return d->momentum != 0;
    return 2 + (d->amsgrad != 0);
}

/* Allocates and fills the arrays of a new optimizer. */
static mpt_result mpt__optimizer_fill(mpt_optimizer *opt) {
    mpt_context *ctx = opt->ctx;
    mpt_update_op *op = &opt->op;
    const mpt_params *params = opt->params;
    const size_t table = (size_t)params->trained_count * sizeof(mpt_tensor_slice);
    const size_t array = mpt__own_room(params) * sizeof(float);
    const int moments = params->trained ? mpt__moment_count(&op->desc) : 0;
    int t;
    op->state = (mpt_optimizer_state *)mpt_alloc(ctx, sizeof *op->state);
    if (table) opt->slices = (mpt_tensor_slice *)mpt__host_alloc(ctx, table);
    op->slices = (mpt_tensor_slice *)mpt_alloc(ctx, table);
    if (!op->state || (table && (!opt->slices || !op->slices))) return MPT_ERROR_NO_MEMORY;
    for (t = 0; t < moments; t++) {
        op->moment[t] = (float *)mpt_alloc(ctx, array);
        if (!op->moment[t]) return MPT_ERROR_NO_MEMORY;
    }
    for (t = 0; t < params->trained_count; t++) {
        opt->slices[t].offset = params->tensors[t].offset;
        opt->slices[t].count = params->tensors[t].count;
        opt->slices[t].lr_factor = 1;
        opt->slices[t].weight_decay = op->desc.weight_decay;
        if (params->tensors[t].wide) opt->slices[t].wide = mpt__params_f32(opt->params, t + 1);
    }
    op->scaler = opt->scaler->state;
    op->tensors = params->trained_count;
    op->count = params->trained;
    op->grad = params->grad;
    op->mode = params->desc.master;
    op->seed = params->desc.seed;
    op->shard = params->shard;
    op->first = params->first;
    op->own = params->own;
    op->master = params->master;
    if (params->master && !mpt__weights_sharded(params)) op->master += params->first;
    op->copy = params->copy;
    op->low = params->low;
    opt->mirror.version = MPT_OPTIMIZER_STATE_VERSION;
    opt->mirror.beta1_power = opt->mirror.beta2_power = opt->mirror.clip = opt->mirror.schedule = 1;
    MPT__TRY(mpt__slices_upload(opt));
    return mpt_upload(ctx, op->state, &opt->mirror, sizeof opt->mirror);
}

MPT__COLD MPT_DEF mpt_optimizer *mpt_optimizer_new(mpt_params *params, mpt_scaler *scaler,
                                                   const mpt_optimizer_desc *desc) {
    const mpt_optimizer_desc d = mpt__optimizer_defaults(desc);
    mpt_optimizer *opt;
    int place = 0;
    if (!params || !scaler) return NULL;
    if (desc && desc->kind == MPT_OPTIMIZER_DEFAULT && (d.nesterov || d.momentum != 0 || d.dampening != 0)) {
        mpt_fail(params->ctx, MPT_ERROR_ARGUMENT,
                 "optimizer: momentum %g, dampening %g or nesterov without kind MPT_SGD", d.momentum, d.dampening);
        return NULL;
    }
    if (mpt__optimizer_check(params->ctx, &d) != MPT_OK) return NULL;
    if (scaler->ctx != params->ctx || !params->elements) {
        mpt_fail(params->ctx, MPT_ERROR_ORDER, "optimizer: %s",
                 params->elements ? "params and scaler have different contexts" : "params are not built");
        return NULL;
    }
    while (place < MPT_OPTIMIZERS && scaler->optimizers[place]) place++;
    if (place == MPT_OPTIMIZERS) {
        mpt_fail(params->ctx, MPT_ERROR_ARGUMENT, "optimizer: the scaler has %d optimizers already", MPT_OPTIMIZERS);
        return NULL;
    }
    opt = (mpt_optimizer *)mpt__host_alloc(params->ctx, sizeof *opt);
    if (!opt) return NULL;
    opt->ctx = params->ctx;
    opt->params = params;
    opt->scaler = scaler;
    opt->op.desc = d;
    opt->lr = d.lr;
    scaler->optimizers[place] = opt;
    if (mpt__optimizer_fill(opt) == MPT_OK) return opt;
    mpt_optimizer_free(opt);
    return NULL;
}

MPT_DEF void mpt_optimizer_free(mpt_optimizer *opt) {
    int i;
    if (!opt) return;
    for (i = 0; i < MPT_OPTIMIZERS; i++)
        if (opt->scaler->optimizers[i] == opt) opt->scaler->optimizers[i] = NULL;
    mpt_free(opt->ctx, opt->op.state);
    mpt_free(opt->ctx, mpt_typed_array(opt->op.slices, MPT_F32).data);
    for (i = 0; i < 3; i++) mpt_free(opt->ctx, opt->op.moment[i]);
    mpt__host_free(opt->ctx, opt->slices);
    mpt__host_free(opt->ctx, opt);
}

MPT_DEF mpt_optimizer_desc mpt_optimizer_get_desc(const mpt_optimizer *opt) {
    mpt_optimizer_desc d = MPT_ZERO;
    if (opt) {
        d = opt->op.desc;
        d.lr = opt->lr;
    }
    return d;
}

MPT_DEF mpt_result mpt_optimizer_set_lr(mpt_optimizer *opt, double lr) {
    if (!opt) return MPT_ERROR_ARGUMENT;
    if (!mpt__not_negative(lr)) return mpt_fail(opt->ctx, MPT_ERROR_ARGUMENT, "optimizer_set_lr: %g", lr);
    opt->lr = lr;
    return mpt__slices_upload(opt);
}

MPT_DEF mpt_result mpt_optimizer_group(mpt_optimizer *opt, unsigned groups, double lr_factor, double weight_decay) {
    int t;
    if (!opt) return MPT_ERROR_ARGUMENT;
    if (!mpt__not_negative(lr_factor) || !mpt__not_negative(weight_decay))
        return mpt_fail(opt->ctx, MPT_ERROR_ARGUMENT, "optimizer_group: lr_factor %g, weight_decay %g", lr_factor,
                        weight_decay);
    for (t = 0; t < opt->op.tensors; t++) {
        if (!(opt->params->tensors[t].group & groups)) continue;
        opt->slices[t].lr_factor = lr_factor;
        opt->slices[t].weight_decay = weight_decay;
    }
    return mpt__slices_upload(opt);
}

MPT_DEF mpt_result mpt_optimizer_tensor(mpt_optimizer *opt, int tensor, double lr_factor, double weight_decay) {
    if (!opt) return MPT_ERROR_ARGUMENT;
    if (tensor < 1 || tensor > opt->op.tensors || !mpt__not_negative(lr_factor) || !mpt__not_negative(weight_decay))
        return mpt_fail(opt->ctx, MPT_ERROR_ARGUMENT,
                        "optimizer_tensor: tensor %d of %d that train, lr_factor %g, weight_decay %g", tensor,
                        opt->op.tensors, lr_factor, weight_decay);
    opt->slices[tensor - 1].lr_factor = lr_factor;
    opt->slices[tensor - 1].weight_decay = weight_decay;
    return mpt__slices_upload(opt);
}

MPT_DEF mpt_result mpt_unscale(mpt_optimizer *opt) {
    if (!opt) return MPT_ERROR_ARGUMENT;
    mpt__forget(opt->ctx);
    if (opt->phase != MPT__READY)
        return mpt_fail(opt->ctx, MPT_ERROR_ORDER, "unscale: already %s since the last scaler_update",
                        opt->phase == MPT__UNSCALED ? "unscaled" : "stepped");
    if (!opt->op.tensors) return mpt_fail(opt->ctx, MPT_ERROR_ORDER, "unscale: every tensor is frozen");
    if (opt->gather) MPT__TRY(opt->gather(opt->gather_user));
    MPT__TRY(opt->ctx->backend.check(opt->ctx, &opt->op));
    opt->phase = MPT__UNSCALED;
    return MPT_OK;
}

static int mpt__is_clip_limit(double limit) { return mpt__not_negative(limit) && (float)limit > 0; }

static mpt_result mpt__clip_check(mpt_optimizer *opt, const char *call, const char *argument, double limit) {
    if (!opt) return MPT_ERROR_ARGUMENT;
    mpt__forget(opt->ctx);
    if (opt->phase != MPT__UNSCALED)
        return mpt_fail(opt->ctx, MPT_ERROR_ORDER, "%s: the gradients are %s", call,
                        opt->phase == MPT__READY ? "still scaled; call mpt_unscale first"
                                                 : "used up; the step is done");
    if (!mpt__is_clip_limit(limit))
        return mpt_fail(opt->ctx, MPT_ERROR_ARGUMENT, "%s: %s %g is not a finite number above 0", call, argument,
                        limit);
    return MPT_OK;
}

MPT_DEF mpt_result mpt_clip_norm(mpt_optimizer *opt, double max_norm) {
    MPT__TRY(mpt__clip_check(opt, "clip_norm", "max_norm", max_norm));
    opt->op.max_norm = max_norm;
    return MPT_OK;
}

MPT_DEF mpt_result mpt_clip_value(mpt_optimizer *opt, double value) {
    MPT__TRY(mpt__clip_check(opt, "clip_value", "value", value));
    opt->op.max_value = value;
    return MPT_OK;
}

MPT_DEF mpt_result mpt_step(mpt_optimizer *opt) {
    if (!opt) return MPT_ERROR_ARGUMENT;
    mpt__forget(opt->ctx);
    if (opt->phase == MPT__STEPPED)
        return mpt_fail(opt->ctx, MPT_ERROR_ORDER, "step: already stepped since the last scaler_update");
    if (opt->phase == MPT__READY) MPT__TRY(mpt_unscale(opt));
    MPT__TRY(opt->ctx->backend.update(opt->ctx, &opt->op));
    opt->op.max_norm = opt->op.max_value = 0;
    opt->phase = MPT__STEPPED;
    opt->steps++;
    return MPT_OK;
}

MPT_DEF mpt_result mpt_optimizer_get_state(mpt_optimizer *opt, mpt_optimizer_state *out) {
    if (!opt) return MPT_ERROR_ARGUMENT;
    MPT__TRY(mpt_download(opt->ctx, out, opt->op.state, sizeof *out));
    if (opt->phase == MPT__UNSCALED) { /* as the step will set them */
        mpt_update_op op = opt->op;
        op.state = out;
        out->found = mpt__step_found(&op);
        out->clip = mpt__clip_factor(out, op.max_norm);
        out->clip_value = op.max_value;
    }
    return MPT_OK;
}

/* In 0..1, as the powers of beta are */
static int mpt__is_share(double x) { return mpt__not_negative(x) && x <= 1; }

/* Checks that training can continue from a state of unknown origin. */
static mpt_result mpt__optimizer_state_check(const mpt_optimizer *opt, const mpt_optimizer_state *s) {
    const int tensors = opt->params->count;
    int i;
    if (s->version != MPT_OPTIMIZER_STATE_VERSION)
        return mpt_fail(opt->ctx, MPT_ERROR_UNSUPPORTED, "optimizer: state of version %d, this is version %d",
                        (int)s->version, (int)MPT_OPTIMIZER_STATE_VERSION);
    if (s->applied > s->attempted || s->skipped != s->attempted - s->applied)
        return mpt_fail(opt->ctx, MPT_ERROR_ARGUMENT, "optimizer: %zu attempts, but %zu applied and %zu skipped",
                        (size_t)s->attempted, (size_t)s->applied, (size_t)s->skipped);
    if (!mpt__is_share(s->beta1_power) || !mpt__is_share(s->beta2_power))
        return mpt_fail(opt->ctx, MPT_ERROR_ARGUMENT, "optimizer: beta1_power %g or beta2_power %g is not in 0..1",
                        s->beta1_power, s->beta2_power);
    if (s->found < MPT_SKIP_NONE || s->found > MPT_SKIP_MOMENT || s->scan.first > (uint64_t)tensors)
        return mpt_fail(opt->ctx, MPT_ERROR_ARGUMENT, "optimizer: found %d, first tensor %zu", (int)s->found,
                        (size_t)s->scan.first);
    if (!s->found && !(mpt__not_negative(s->inv_scale) && mpt__not_negative(s->grad_norm) &&
                       mpt__not_negative(s->schedule))) /* mpt_step reads them */
        return mpt_fail(opt->ctx, MPT_ERROR_ARGUMENT, "optimizer: inv_scale %g, grad_norm %g, schedule %g",
                        s->inv_scale, s->grad_norm, s->schedule);
    for (i = 0; i < MPT_JOURNAL; i++) {
        const mpt_skip *skip = &s->journal[i];
        if (skip->reason < MPT_SKIP_NONE || skip->reason > MPT_SKIP_MOMENT || skip->tensor < 0 ||
            skip->tensor > tensors)
            return mpt_fail(opt->ctx, MPT_ERROR_ARGUMENT, "optimizer: journal entry %d has reason %d, tensor %d", i,
                            (int)skip->reason, (int)skip->tensor);
    }
    return MPT_OK;
}

MPT_DEF mpt_result mpt_optimizer_set_state(mpt_optimizer *opt, const mpt_optimizer_state *state) {
    if (!opt) return MPT_ERROR_ARGUMENT;
    if (!state) return mpt_fail(opt->ctx, MPT_ERROR_ARGUMENT, "optimizer_set_state: state is NULL");
    MPT__TRY(mpt__optimizer_state_check(opt, state));
    return mpt_upload(opt->ctx, opt->op.state, state, sizeof *state);
}

MPT_DEF mpt_result mpt_optimizer_commit(mpt_optimizer *opt, size_t count, float *pending, float *committed) {
    if (!opt) return MPT_ERROR_ARGUMENT;
    if (count && (!pending || !committed))
        return mpt_fail(opt->ctx, MPT_ERROR_ARGUMENT, "optimizer_commit: %s is NULL",
                        pending ? "committed" : "pending");
    opt->op.commits = count;
    opt->op.pending = pending;
    opt->op.committed = committed;
    return MPT_OK;
}

MPT_DEF float *mpt_optimizer_moment(mpt_optimizer *opt, int moment, int tensor) {
    if (!opt || moment < 1 || moment > 3 || opt->op.shard) return NULL;
    return mpt__params_slice(opt->params, opt->op.moment[moment - 1], tensor);
}

/* ==== LAYERS ====

   One block for each kind of layer: its call, its tensors, what it keeps from the forward to the backward pass, the
   passes themselves, and how the report describes it. A layer knows nothing about its neighbours or the memory plan: a
   pass gives it its arrays in an mpt__visit. The table of kinds comes after the blocks. */

typedef enum mpt__node_kind {
    MPT__INPUT = 0,
    MPT__LINEAR,
    MPT__CONV2D,
    MPT__ACTIVATION,
    MPT__POOL,
    MPT__RESHAPE,
    MPT__ADD,
    MPT__CONCAT,
    MPT__NORM,
    MPT__DROPOUT,
    MPT__LOSS,
    MPT__OWN,
    MPT__SLICE,
    MPT__MULTIPLY,
    MPT__UPSAMPLE,
    MPT__KINDS
} mpt__node_kind;

typedef enum mpt__norm_kind { MPT__NORM_BATCH = 0, MPT__NORM_LAYER, MPT__NORM_GROUP } mpt__norm_kind;

typedef struct mpt__node {
    mpt__node_kind kind;
    char name[32];
    int in[2];         /* node ids; 0: none */
    int H, W, C;       /* of a sample */
    size_t inputs;     /* elements of a sample of in[0] */
    mpt_policy policy; /* in force when it was made */
    /* from its layer call */
    mpt_input_desc input;
    int no_bias;
    mpt_init init;
    mpt_tuning tuning;
    mpt_conv2d_shape conv; /* N = 1 */
    mpt__norm_kind norm;
    mpt_norm_shape norm_shape; /* of one sample */
    float momentum;            /* batch norm */
    int no_affine;
    float p; /* dropout */
    mpt_pool_kind pool_kind;
    mpt_pool2d_shape pool;
    int first;                  /* channel of a slice */
    mpt_broadcast_shape spread; /* N = 1 */
    float negative_slope;       /* of a leaky ReLU; 0: 0.01 */
    mpt_activation act;         /* of an activation node; of any other node, the activation fused into it */
    mpt_loss_kind loss;
    mpt_loss_desc loss_desc;
    mpt_layer_desc own; /* of mpt_layer */
    int keep;           /* set by mpt_keep */
    /* from the build */
    int weight, bias;     /* tensor ids; 0: none */
    size_t running;       /* batch norm: where its mean is in the statistics */
    int trains;           /* it has tensors that are not frozen */
    int consumers;        /* number of nodes that read this one */
    int shaped;           /* linear layer: the reshape that makes its value an image; see mpt__torch_index */
    int in_place;         /* batch norm: its value overwrites its input's, and it may be folded into that layer */
    int folds;            /* product: the batch norm that is folded into its weights; 0: none */
    int kept;             /* its value outlives the pass, because of mpt_keep or as a head */
    int logits;           /* computes what the loss, or the user, reads... */
    int behind_logits;    /* ...or derives it from there by activations, reshapes and slices */
    int given;            /* a head whose gradient has been given */
    int fused;            /* an activation that its input node computes */
    mpt_activation slope; /* its derivative is applied in this node's backward pass: act, or a ReLU's before a max
                             pool */
    int needs_gradient;   /* it or a node below it has parameters that are trained */
    mpt_dtype type, grad_type;
    const char *reason; /* of the type */
    int value, grad;    /* buffers; 0: none */
    int index;          /* buffer of a max pool */
    int stats;          /* buffer of a norm */
    int cast;           /* buffer for its input in the type that its product reads */
    int grad_started;   /* in this backward pass: add to the gradient instead of writing it */
} mpt__node;

/* A node in a pass over N samples: what its layer reads and writes. */
typedef struct mpt__visit {
    mpt_context *ctx;
    const mpt__node *node;
    size_t N;
    int train;                /* 0: evaluation */
    mpt_array x[2], y;        /* values of its inputs (for a product in the type that it reads), and its own */
    mpt_array weight, bias;   /* data NULL: none */
    mpt_activation act;       /* fused into a product */
    uint16_t *index;          /* (y) of a max pool */
    float *stats;             /* of a norm, see mpt_norm_op */
    float *running, *pending; /* batch norm, (2,C): as of the last applied step; with this step's statistics */
    mpt_mask mask;            /* dropout */
    /* backward */
    mpt_array dy;
    mpt_array dx[2];          /* data NULL: it is not needed, or dy itself serves as dx */
    float beta_x[2];          /* dx = new + beta_x dx */
    mpt_array dweight, dbias; /* fp32 */
    float beta;               /* dweight = new + beta dweight, dbias likewise */
} mpt__visit;

/* What the build and the passes need to know about a kind of layer. A function may be NULL: there is nothing to do, or
   the answer is 0. */
typedef struct mpt__kind {
    int product;        /* 1: it multiplies by its weights, and reads its input in the type that it computes in */
    int fuses;          /* 1: it can compute the activation after it along with its own value */
    int as_input;       /* 1: its value has the type of its input */
    int shares_dy;      /* 1: dx is dy, so an input's gradient may share the memory of its own */
    int reads_y;        /* 1: its backward pass reads its own value, whatever its activation */
    int weight_dims;    /* of its weights in a file: [outputs][inputs] 2, [K][C][R][S] 4, one per channel 1; none 0 */
    const char *reason; /* why its value has its type; NULL: because of the policy */
    const char *how;    /* how it is computed, for the report... */
    const char *(*describe)(const mpt_model *net, const mpt__node *node); /* ...if that depends on the node or model */
    size_t (*fan_in)(const mpt__node *node);                              /* weights of one of its C outputs */
    size_t (*weights_in_all)(const mpt__node *node);                      /* if they are not fan_in for each output */
    mpt_result (*init)(mpt_model *net, const mpt__node *node);            /* initialises its tensors */
    void (*keep)(mpt_model *net, mpt__node *node, int first, int last);   /* adds buffers kept between the passes */
    int (*reads_x)(const mpt__node *node);      /* does its backward pass read the value of its input? */
    int (*takes_slope)(const mpt__node *node);  /* does its backward pass apply node->slope by itself? */
    int (*delays_slope)(const mpt__node *node); /* may the slope of a ReLU before it be applied to its dy instead? */
    size_t (*groups)(const mpt__node *node);    /* groups of channels that are treated separately */
    int (*follows)(const mpt_model *net, const mpt__node *node, size_t *i); /* see mpt__torch_index */
    int (*matches_torch)(const mpt_model *net, const mpt__node *node);      /* see mpt__check_orders; NULL: it does */
    mpt_result (*forward)(const mpt__visit *v);                             /* y from x */
    mpt_result (*weights)(const mpt__visit *v);        /* dweight and dbias from dy; if there is no `data`, also
                                                          dx[0] */
    mpt_result (*data)(const mpt__visit *v, int side); /* dx[side] from dy */
    mpt_result (*statistics)(const mpt__visit *v);     /* replaces both where no gradient reaches the node */
} mpt__kind;

static mpt__kind mpt__kind_of(const mpt__node *node);

/* A piece of the activation block, in use from one moment of a training step to another. */
typedef struct mpt__buffer {
    size_t bytes, offset;
    int first, last;
} mpt__buffer;

/* What a step of the model is in the middle of. The legal transitions, where mpt_step leads back to BETWEEN from all:

     BETWEEN -- mpt_forward --> BEGUN -- mpt_backward --> GATHERED
     GATHERED -- mpt_forward --> RESUMED -- mpt_backward --> GATHERED

   A forward pass in BEGUN or RESUMED replaces the one before. */
typedef enum mpt__stage {
    MPT__BETWEEN = 0, /* nothing: the gradients belong to a finished step */
    MPT__BEGUN,       /* the first forward pass waits for its backward pass */
    MPT__GATHERED,    /* every forward pass has had its backward pass */
    MPT__RESUMED      /* a further forward pass waits */
} mpt__stage;

enum { MPT__POLICIES = 8, MPT__BUFFERS = 5 /* of a node */, MPT__SUMS = 3, MPT__SUM_DEPTH = 32 };

struct mpt_model {
    mpt_context *ctx;
    mpt_policy policy;
    mpt_policy pushed[MPT__POLICIES];
    int depth;            /* how many are pushed */
    mpt_dtype half;       /* the 16-bit type that nodes use; F32 if none does */
    mpt_train_desc train; /* defaults filled in */
    mpt__node *nodes;     /* node id i is nodes[i - 1] */
    int count, capacity;
    mpt_result failed; /* of the first layer call that failed, with the reason */
    char why[256];
    int built;
    mpt__buffer *buffers; /* buffer i is buffers[i - 1] */
    int buffer_count;
    mpt_params *params;
    mpt_scaler *scaler;
    mpt_optimizer *opt;
    size_t block_bytes, staging_bytes, target_bytes;
    char *block;              /* device: all activations and their gradients */
    float *staging;           /* device: a batch in fp32, where inputs and outputs need a cast */
    void *target;             /* device: a batch of targets */
    mpt_loss_sum *sums;       /* device: [0] of this step, [1] of an evaluation, [2] of this step's earlier passes */
    float *loss_weights;      /* device: class weights, or pos_weight */
    uint32_t weights_sum;     /* a hash of them; 0: none */
    float *channels;          /* device: for an input of bytes, see mpt_map_op */
    uint32_t bytes_sum;       /* a hash of them */
    size_t statistics;        /* floats of all running means and variances */
    float *running, *pending; /* device: as of the last applied step; with this step's statistics */
    mpt_array averages;       /* device: the averages of opt->op as products read them, made by each evaluation */
    int use_average;          /* set by mpt_use_average */
    int averaged;             /* the current or last pass reads the averages */
    mpt__stage stage;         /* as of step number `stage_step`: see mpt__stage_of */
    uint64_t stage_step;
    int micro; /* backward passes in this step */
    /* Their gradients are added as a balanced tree: sums of powers of two passes, the first in the gradients of params,
       the others one after another in `sums_apart`; see mpt__gather_gradients. */
    float *sums_apart;                /* device */
    int sums_apart_count, sums_count; /* how many there is room for; how many sums there are */
    int sums_of[MPT__SUM_DEPTH];      /* passes in each */
    size_t apart;                     /* gradients, from the first, that are not yet summed over all ranks */
    float *slots, *slots_host;        /* with ranks: (ranks, MPT__SLOT), what each tells the others; device and host.
                                         On the device one more slot follows, for this rank's own words */
    size_t rows;                      /* samples of the last forward pass of any kind */
    size_t forward_rows;              /* samples of the forward pass that waits for its backward pass; 0: none does */
    /* Weights of samples, if the loss has them: those of a batch, in device memory; the host's for the next call, and
       for the remaining passes of this one. */
    float *sample_weights;
    const float *given, *weights;
};

static mpt__node *mpt__node_of(const mpt_model *net, int id) { return &net->nodes[id - 1]; }

/* NULL: there is no such node. */
static const mpt__node *mpt__known_node(const mpt_model *net, int id) {
    if (!net || id < 1 || id > net->count) return NULL;
    return mpt__node_of(net, id);
}

/* NULL: it reads none. */
static mpt__node *mpt__input_of(const mpt_model *net, const mpt__node *node) {
    if (!node->in[0]) return NULL;
    return mpt__node_of(net, node->in[0]);
}

static size_t mpt__node_count(const mpt__node *node) { return (size_t)node->H * (size_t)node->W * (size_t)node->C; }

/* The loss node; NULL: the model ends in heads. */
static const mpt__node *mpt__loss_of(const mpt_model *net) {
    const mpt__node *last = net->count ? mpt__node_of(net, net->count) : NULL;
    if (last && last->kind == MPT__LOSS) return last;
    return NULL;
}

/* The last node that has a value: the last one, or the one before the loss. */
static int mpt__last_value(const mpt_model *net) { return mpt__loss_of(net) ? net->count - 1 : net->count; }

/* Is the node's value an output of the model: does the loss read it, or no node at all? */
static int mpt__is_output(const mpt_model *net, int id) {
    const mpt__node *loss = mpt__loss_of(net);
    if (loss) return id == loss->in[0];
    return !mpt__node_of(net, id)->consumers;
}

/* Passes of all ranks whose gradients make one step. */
static double mpt__passes(const mpt_model *net) {
    return (double)net->train.accumulate * (double)net->train.ranks.ranks;
}

/* The node that mpt_predict returns: the only output, or the last. */
static int mpt__output_of(const mpt_model *net) {
    const mpt__node *loss = mpt__loss_of(net);
    if (loss) return loss->in[0];
    return net->count;
}

/* -- Adding a node -- */

/* Stores the first failure of a layer call; mpt_model_build reports it. */
static int mpt__layer_failed(mpt_model *net, mpt_result result) {
    if (net->failed == MPT_OK) {
        net->failed = result;
        memcpy(net->why, net->ctx->why, sizeof net->why);
    }
    return 0;
}

MPT_DEF int mpt_find(const mpt_model *net, const char *name) {
    int id;
    if (!net || !name) return 0;
    for (id = 1; id <= net->count; id++)
        if (strcmp(mpt__node_of(net, id)->name, name) == 0) return id;
    return 0;
}

/* Tensors in files are named after layers: so names must be unique, need no escape in JSON, and must not be those of
   mpt's own entries. id: the node to be named; 0: a new one */
static mpt_result mpt__name_check(mpt_model *net, const char *word, const char *name, int id) {
    const int taken = mpt_find(net, name);
    const char *c;
    if (!*name || strlen(name) >= sizeof net->nodes->name)
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "%s: the name '%s' is empty or over 31 characters", word, name);
    for (c = name; *c; c++)
        if (*c < 32 || *c > 126 || *c == '"' || *c == '\\')
            return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "%s: the name '%s' is not plain ASCII without \" and \\",
                            word, name);
    if (strncmp(name, "mpt.", 4) == 0)
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "%s: the name '%s' begins with mpt., as only mpt's own do", word,
                        name);
    if (taken && taken != id)
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "%s: another layer is named '%s'", word, name);
    return MPT_OK;
}

/* Checks that a node of this name that reads node `in` may be added, and makes room for it. */
static mpt_result mpt__layer_check(mpt_model *net, const char *word, const char *name, int in) {
    mpt__node *table;
    if (name) MPT__TRY(mpt__name_check(net, word, name, 0));
    if (net->built) return mpt_fail(net->ctx, MPT_ERROR_ORDER, "%s: the model is built already", word);
    if (in < 0 || in > net->count) return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "%s: there is no node %d", word, in);
    if (in && mpt__node_of(net, in)->kind == MPT__LOSS)
        return mpt_fail(net->ctx, MPT_ERROR_ORDER, "%s: node %d is a loss; nothing can follow it", word, in);
    table = (mpt__node *)mpt__grow(net->ctx, net->nodes, net->count, &net->capacity, sizeof *table);
    if (!table) return MPT_ERROR_NO_MEMORY;
    net->nodes = table;
    return MPT_OK;
}

/* Starts a node with the shape of its input, and makes up a name if it has none. NULL: it failed, and the reason is
   stored. The node counts only after mpt__layer_done. */
MPT__COLD static mpt__node *mpt__node_new(mpt_model *net, mpt__node_kind kind, const char *word, const char *name,
                                          int in) {
    mpt__node *node;
    const mpt__node *input;
    int i, number = 1;
    mpt_result r;
    if (!net || (in == 0 && kind != MPT__INPUT)) return NULL;
    r = mpt__layer_check(net, word, name, in);
    if (r != MPT_OK) {
        mpt__layer_failed(net, r);
        return NULL;
    }
    node = &net->nodes[net->count];
    memset(node, 0, sizeof *node);
    node->kind = kind;
    node->in[0] = in;
    node->policy = net->depth ? net->pushed[net->depth - 1] : net->policy;
    if (name) {
        memcpy(node->name, name, strlen(name) + 1);
    } else {
        for (i = 0; i < net->count; i++) number += !strncmp(net->nodes[i].name, word, strlen(word));
        do mpt__print(node->name, sizeof node->name, "%s%d", word, number++);
        while (mpt_find(net, node->name));
    }
    if (!in) return node;
    input = mpt__node_of(net, in);
    node->H = input->H;
    node->W = input->W;
    node->C = input->C;
    node->inputs = mpt__node_count(input);
    return node;
}

/* Ends what mpt__node_new began. Returns the node's id, or 0. */
static int mpt__layer_done(mpt_model *net, mpt_result r) {
    if (r == MPT_OK) return ++net->count;
    return mpt__layer_failed(net, r);
}

/* Sizes of a sample are ints; those that would overflow are refused here. */
static mpt_result mpt__layer_size(mpt_model *net, mpt__node *node, size_t H, size_t W, size_t C) {
    const size_t most = 0x7fffffff;
    if (!H || !W || !C || H > most || W > most / H || C > most / (H * W))
        return mpt_fail(net->ctx, MPT_ERROR_SHAPE, "%s: samples of %zu x %zu x %zu are empty or over 2^31 elements",
                        node->name, H, W, C);
    node->H = (int)H;
    node->W = (int)W;
    node->C = (int)C;
    return MPT_OK;
}

static mpt_result mpt__layer_positive(mpt_model *net, const mpt__node *node, const char *what, int value, int least) {
    if (value >= least) return MPT_OK;
    return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "%s: %s is %d, must be at least %d", node->name, what, value, least);
}

/* Never 0 */
static uint32_t mpt__weights_hash(const float *weights, size_t count) {
    uint32_t hash = 1;
    size_t i;
    for (i = 0; i < count; i++) hash = mpt_hash(hash, 0, i, mpt__bits(weights[i])) | 1;
    return hash;
}

static mpt_result mpt__init_check(mpt_model *net, const mpt__node *node) {
    if ((unsigned)node->init < MPT_INIT_COUNT) return MPT_OK;
    return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "%s: unknown init %d", node->name, (int)node->init);
}

/* Weights and bias of a product, each of whose outputs reads `taps` positions of C channels. */
static mpt_result mpt__product_init(mpt_model *net, const mpt__node *node, size_t taps) {
    const size_t fan_in = mpt__kind_of(node).fan_in(node), fan_out = (size_t)node->C * taps;
    MPT__TRY(mpt_params_init(net->params, node->weight, node->init, fan_in, fan_out, net->train.seed));
    if (!node->bias) return MPT_OK;
    return mpt_params_init(net->params, node->bias, node->init, fan_in, fan_out, net->train.seed);
}

static int mpt__product_reads_x(const mpt__node *node) { return node->trains && !node->cast; }

/* The operation of an elementwise layer: out = map(a). */
static mpt_map_op mpt__map_op(const mpt__visit *v, mpt_map map, mpt_array a, mpt_array out) {
    mpt_map_op op = MPT_ZERO;
    op.map = map;
    op.n = v->N * mpt__node_count(v->node);
    op.a = a;
    op.out = out;
    return op;
}

/* dx = dy + beta dx */
static mpt_result mpt__pass_on(const mpt__visit *v, int side) {
    mpt_map_op op = mpt__map_op(v, MPT_MAP_ADD, v->dy, v->dx[side]);
    op.b = v->dx[side];
    op.beta = v->beta_x[side];
    return mpt_op_map(v->ctx, &op);
}

static int mpt__follows_input(MPT__UNUSED const mpt_model *net, const mpt__node *node, MPT__UNUSED size_t *i) {
    return node->in[0];
}

MPT_DEF int mpt_keep(mpt_model *net, int id) {
    if (!net || !id) return 0;
    if (net->built)
        return mpt__layer_failed(net, mpt_fail(net->ctx, MPT_ERROR_ORDER, "keep: the model is built already"));
    if (id < 0 || id > net->count || mpt__node_of(net, id)->kind == MPT__LOSS)
        return mpt__layer_failed(net,
                                 mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "keep: there is no node %d with a value", id));
    mpt__node_of(net, id)->keep = 1;
    return id;
}

static mpt_result mpt__rename(mpt_model *net, int id, const char *name) {
    if (net->built) return mpt_fail(net->ctx, MPT_ERROR_ORDER, "name: the model is built already");
    if (id < 0 || id > net->count || !name)
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "name: there is no node %d, or name is NULL", id);
    MPT__TRY(mpt__name_check(net, "name", name, id));
    memmove(mpt__node_of(net, id)->name, name, strlen(name) + 1); /* name may be the node's own */
    return MPT_OK;
}

MPT_DEF int mpt_name(mpt_model *net, int id, const char *name) {
    mpt_result r;
    if (!net || !id) return 0;
    r = mpt__rename(net, id, name);
    if (r == MPT_OK) return id;
    return mpt__layer_failed(net, r);
}

/* -- Input -- the forward pass fills in its value */

static float mpt__input_scale(const mpt_input_desc *d, size_t c) { return d->scale ? d->scale[c] : 1.0f / 255; }
static float mpt__input_shift(const mpt_input_desc *d, size_t c) { return d->shift ? d->shift[c] : 0.0f; }

/* Checks that every byte becomes a finite value. */
static mpt_result mpt__input_check(mpt_model *net, const mpt__node *node) {
    const mpt_input_desc *d = &node->input;
    size_t c;
    if (!d->bytes && !d->scale && !d->shift) return MPT_OK;
    if (!d->bytes) return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "input: scale or shift without bytes");
    for (c = 0; c < (size_t)node->C; c++) {
        const float channel[2] = {mpt__input_scale(d, c), mpt__input_shift(d, c)};
        if (!mpt__finite(channel[1]) || !mpt__finite(mpt__of_byte(255, channel, 1, 0)))
            return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "input: scale %g, shift %g of channel %zu",
                            (double)channel[0], (double)channel[1], c);
    }
    return MPT_OK;
}

/* Uploads scales and shifts. */
static mpt_result mpt__input_init(mpt_model *net, const mpt__node *node) {
    const size_t C = (size_t)node->C;
    float *host;
    mpt_result r;
    size_t c;
    if (!net->channels) return MPT_OK;
    host = (float *)mpt__host_alloc(net->ctx, 2 * C * sizeof *host);
    if (!host) return MPT_ERROR_NO_MEMORY;
    for (c = 0; c < C; c++) {
        host[c] = mpt__input_scale(&node->input, c);
        host[C + c] = mpt__input_shift(&node->input, c);
    }
    net->bytes_sum = mpt__weights_hash(host, 2 * C);
    r = mpt_upload(net->ctx, net->channels, host, 2 * C * sizeof *host);
    mpt__host_free(net->ctx, host);
    return r;
}

MPT_DEF int mpt_input(mpt_model *net, int H, int W, int C) { return mpt_input_with(net, H, W, C, NULL); }

MPT_DEF int mpt_input_with(mpt_model *net, int H, int W, int C, const mpt_input_desc *desc) {
    mpt__node *node = mpt__node_new(net, MPT__INPUT, "input", NULL, 0);
    mpt_result r;
    if (!node) return 0;
    if (net->count)
        return mpt__layer_done(net,
                               mpt_fail(net->ctx, MPT_ERROR_ORDER, "input: must be the first node, and the only one"));
    if (H < 1 || W < 1 || C < 1)
        return mpt__layer_done(
            net, mpt_fail(net->ctx, MPT_ERROR_SHAPE, "input: H %d, W %d, C %d must be at least 1", H, W, C));
    if (desc) node->input = *desc;
    r = mpt__layer_size(net, node, (size_t)H, (size_t)W, (size_t)C);
    return mpt__layer_done(net, r == MPT_OK ? mpt__input_check(net, node) : r);
}

static const char *mpt__input_describe(MPT__UNUSED const mpt_model *net, const mpt__node *node) {
    if (node->input.bytes) return "bytes";
    return "cast";
}

static mpt__kind mpt__kind_input(void) {
    mpt__kind k = MPT_ZERO;
    k.describe = mpt__input_describe;
    k.init = mpt__input_init;
    return k;
}

/* -- Linear -- y(N,K) = act(x(N,inputs) w(K,inputs)^T + b(K)), where K is the node's C */

MPT_DEF int mpt_linear(mpt_model *net, int in, int outputs, const mpt_linear_desc *desc) {
    mpt_linear_desc d = MPT_ZERO;
    mpt__node *node;
    mpt_result r;
    if (desc) d = *desc;
    node = mpt__node_new(net, MPT__LINEAR, "linear", d.name, in);
    if (!node) return 0;
    node->no_bias = d.no_bias;
    node->init = d.init;
    node->tuning = d.tuning;
    r = mpt__layer_positive(net, node, "outputs", outputs, 1);
    if (r == MPT_OK) r = mpt__init_check(net, node);
    if (r == MPT_OK) r = mpt__layer_size(net, node, 1, 1, (size_t)outputs);
    return mpt__layer_done(net, r);
}

static size_t mpt__linear_fan_in(const mpt__node *node) { return node->inputs; }

static mpt_result mpt__linear_init(mpt_model *net, const mpt__node *node) { return mpt__product_init(net, node, 1); }

static mpt_result mpt__linear_forward(const mpt__visit *v) {
    mpt_gemm_op op = MPT_ZERO;
    op.trans_b = 1;
    op.m = v->N;
    op.n = (size_t)v->node->C;
    op.k = v->node->inputs;
    op.a = v->x[0];
    op.b = v->weight;
    op.c = v->y;
    op.bias = v->bias;
    op.act = v->act;
    return mpt_op_gemm(v->ctx, &op);
}

/* dw(K,inputs) = dy(N,K)^T x(N,inputs) */
static mpt_result mpt__linear_weights(const mpt__visit *v) {
    mpt_gemm_op op = MPT_ZERO;
    op.trans_a = 1;
    op.m = (size_t)v->node->C;
    op.n = v->node->inputs;
    op.k = v->N;
    op.a = v->dy;
    op.b = v->x[0];
    op.c = v->dweight;
    op.a_sums = v->dbias;
    op.beta = v->beta;
    return mpt_op_gemm(v->ctx, &op);
}

/* dx(N,inputs) = dy(N,K) w(K,inputs) */
static mpt_result mpt__linear_data(const mpt__visit *v, int side) {
    mpt_gemm_op op = MPT_ZERO;
    op.m = v->N;
    op.n = v->node->inputs;
    op.k = (size_t)v->node->C;
    op.a = v->dy;
    op.b = v->weight;
    op.c = v->dx[side];
    op.beta = v->beta_x[side];
    return mpt_op_gemm(v->ctx, &op);
}

static mpt__kind mpt__kind_linear(void) {
    mpt__kind k = MPT_ZERO;
    k.product = 1;
    k.fuses = 1;
    k.weight_dims = 2;
    k.how = "product";
    k.fan_in = mpt__linear_fan_in;
    k.init = mpt__linear_init;
    k.reads_x = mpt__product_reads_x;
    k.forward = mpt__linear_forward;
    k.weights = mpt__linear_weights;
    k.data = mpt__linear_data;
    return k;
}

/* -- Convolution -- see mpt_conv2d_op */

/* The horizontal value of a descriptor: 0 means that it equals the vertical one. */
static int mpt__across(int across, int down) { return mpt__or_int(across, down); }

/* For padding, -1 means none. */
static size_t mpt__padding_across(int across, int down) {
    if (across == -1) return 0;
    return (size_t)mpt__across(across, down);
}

/* Shape of a convolution node from its descriptor. */
static mpt_result mpt__conv2d_layer(mpt_model *net, mpt__node *node, int filters, int kernel,
                                    const mpt_conv2d_desc *d) {
    mpt_conv2d_op op = MPT_ZERO;
    mpt_conv2d_shape *s = &op.shape;
    MPT__TRY(mpt__layer_positive(net, node, "filters", filters, 1));
    MPT__TRY(mpt__layer_positive(net, node, "kernel", kernel, 1));
    MPT__TRY(mpt__layer_positive(net, node, "stride", d->stride, 0));
    MPT__TRY(mpt__layer_positive(net, node, "padding", d->padding, 0));
    MPT__TRY(mpt__layer_positive(net, node, "dilation", d->dilation, 0));
    MPT__TRY(mpt__layer_positive(net, node, "groups", d->groups, 0));
    MPT__TRY(mpt__layer_positive(net, node, "kernel_w", d->kernel_w, 0));
    MPT__TRY(mpt__layer_positive(net, node, "stride_w", d->stride_w, 0));
    MPT__TRY(mpt__layer_positive(net, node, "dilation_w", d->dilation_w, 0));
    MPT__TRY(mpt__layer_positive(net, node, "padding_w", d->padding_w, -1));
    MPT__TRY(mpt__init_check(net, node));
    s->N = 1;
    s->H = (size_t)node->H;
    s->W = (size_t)node->W;
    s->C = (size_t)node->C;
    s->K = (size_t)filters;
    s->R = (size_t)kernel;
    s->S = (size_t)mpt__across(d->kernel_w, kernel);
    s->stride_h = (size_t)d->stride;
    s->stride_w = (size_t)mpt__across(d->stride_w, d->stride);
    s->padding_h = (size_t)d->padding;
    s->padding_w = mpt__padding_across(d->padding_w, d->padding);
    s->dilation_h = (size_t)d->dilation;
    s->dilation_w = (size_t)mpt__across(d->dilation_w, d->dilation);
    s->groups = (size_t)d->groups;
    s->same = d->same;
    if (s->same && (s->padding_h || s->padding_w))
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "%s: padding %d, padding_w %d and same", node->name, d->padding,
                        d->padding_w);
    MPT__TRY(mpt__conv2d_plan(net->ctx, node->name, &op));
    node->conv = op.shape;
    return mpt__layer_size(net, node, op.P, op.Q, s->K);
}

MPT_DEF int mpt_conv2d(mpt_model *net, int in, int filters, int kernel, const mpt_conv2d_desc *desc) {
    mpt_conv2d_desc d = MPT_ZERO;
    mpt__node *node;
    if (desc) d = *desc;
    node = mpt__node_new(net, MPT__CONV2D, "conv", d.name, in);
    if (!node) return 0;
    node->no_bias = d.no_bias;
    node->init = d.init;
    node->tuning = d.tuning;
    return mpt__layer_done(net, mpt__conv2d_layer(net, node, filters, kernel, &d));
}

static size_t mpt__conv2d_fan_in(const mpt__node *node) {
    return node->conv.R * node->conv.S * (node->conv.C / node->conv.groups);
}

static size_t mpt__conv2d_groups(const mpt__node *node) { return node->conv.groups; }

static mpt_result mpt__conv2d_init(mpt_model *net, const mpt__node *node) {
    return mpt__product_init(net, node, node->conv.R * node->conv.S);
}

/* What the three passes have in common; each sets the array that it writes. */
static mpt_conv2d_op mpt__conv2d_op(const mpt__visit *v, mpt_pass pass) {
    mpt_conv2d_op op = MPT_ZERO;
    op.pass = pass;
    op.shape = v->node->conv;
    op.shape.N = v->N;
    op.x = v->x[0];
    op.w = v->weight;
    op.y = pass == MPT_FORWARD ? v->y : v->dy;
    return op;
}

static mpt_result mpt__conv2d_forward(const mpt__visit *v) {
    mpt_conv2d_op op = mpt__conv2d_op(v, MPT_FORWARD);
    op.bias = v->bias;
    op.act = v->act;
    return mpt_op_conv2d(v->ctx, &op);
}

static mpt_result mpt__conv2d_weights(const mpt__visit *v) {
    mpt_conv2d_op op = mpt__conv2d_op(v, MPT_BACKWARD_WEIGHT);
    op.w = v->dweight;
    op.bias = v->dbias;
    op.beta = v->beta;
    return mpt_op_conv2d(v->ctx, &op);
}

static mpt_result mpt__conv2d_data(const mpt__visit *v, int side) {
    mpt_conv2d_op op = mpt__conv2d_op(v, MPT_BACKWARD_DATA);
    op.x = v->dx[side];
    op.beta = v->beta_x[side];
    return mpt_op_conv2d(v->ctx, &op);
}

static const char *mpt__conv2d_describe(MPT__UNUSED const mpt_model *net, const mpt__node *node) {
    const mpt_conv2d_shape *s = &node->conv;
    if (s->groups == 1) return "convolution";
    if (s->groups == s->C && s->C == s->K) return "depthwise";
    return "grouped";
}

static mpt__kind mpt__kind_conv2d(void) {
    mpt__kind k = MPT_ZERO;
    k.product = 1;
    k.fuses = 1;
    k.weight_dims = 4;
    k.describe = mpt__conv2d_describe;
    k.fan_in = mpt__conv2d_fan_in;
    k.init = mpt__conv2d_init;
    k.reads_x = mpt__product_reads_x;
    k.groups = mpt__conv2d_groups;
    k.forward = mpt__conv2d_forward;
    k.weights = mpt__conv2d_weights;
    k.data = mpt__conv2d_data;
    return k;
}

/* -- Activations -- y = act(x); if it is fused into the layer before it, both share one value */

static int mpt__activation_layer(mpt_model *net, int in, const char *word, mpt_activation act) {
    mpt__node *node = mpt__node_new(net, MPT__ACTIVATION, word, NULL, in);
    if (!node) return 0;
    node->act = act;
    return mpt__layer_done(net, MPT_OK);
}

MPT_DEF int mpt_relu(mpt_model *net, int in) { return mpt__activation_layer(net, in, "relu", MPT_RELU); }
MPT_DEF int mpt_leaky_relu(mpt_model *net, int in, float negative_slope) {
    mpt__node *node = mpt__node_new(net, MPT__ACTIVATION, "leaky_relu", NULL, in);
    const int usual = mpt__bits(negative_slope) == mpt__bits(0.01f);
    if (!node) return 0;
    node->act = MPT_LEAKY_RELU;
    node->negative_slope = usual ? 0 : negative_slope;
    if (mpt__finite(negative_slope) && negative_slope >= 0) return mpt__layer_done(net, MPT_OK);
    return mpt__layer_done(net, mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "%s: negative_slope %g is not from 0 on",
                                         node->name, (double)negative_slope));
}
MPT_DEF int mpt_tanh(mpt_model *net, int in) { return mpt__activation_layer(net, in, "tanh", MPT_TANH); }
MPT_DEF int mpt_sigmoid(mpt_model *net, int in) { return mpt__activation_layer(net, in, "sigmoid", MPT_SIGMOID); }
MPT_DEF int mpt_gelu(mpt_model *net, int in) { return mpt__activation_layer(net, in, "gelu", MPT_GELU); }
MPT_DEF int mpt_gelu_tanh(mpt_model *net, int in) { return mpt__activation_layer(net, in, "gelu_tanh", MPT_GELU_TANH); }
MPT_DEF int mpt_silu(mpt_model *net, int in) { return mpt__activation_layer(net, in, "silu", MPT_SILU); }

static int mpt__activation_reads_x(const mpt__node *node) { return mpt__act_saves_input(node->act); }
static int mpt__activation_takes_slope(MPT__UNUSED const mpt__node *node) { return 1; }

static mpt_result mpt__activation_forward(const mpt__visit *v) {
    mpt_map_op op = mpt__map_op(v, MPT_MAP_ACTIVATION, v->x[0], v->y);
    op.act = v->node->act;
    op.negative_slope = v->node->negative_slope;
    if (v->node->fused) return MPT_OK;
    return mpt_op_map(v->ctx, &op);
}

static mpt_result mpt__activation_data(const mpt__visit *v, int side) {
    const mpt_array saved = mpt__act_saves_input(v->node->act) ? v->x[0] : v->y;
    mpt_map_op op = mpt__map_op(v, MPT_MAP_ACTIVATION_GRADIENT, saved, v->dx[side]);
    op.b = v->dy;
    op.act = v->node->act;
    op.negative_slope = v->node->negative_slope;
    op.beta = v->beta_x[side];
    return mpt_op_map(v->ctx, &op);
}

static const char *mpt__activation_describe(MPT__UNUSED const mpt_model *net, const mpt__node *node) {
    if (node->fused) return "epilogue";
    return "elementwise";
}

static mpt__kind mpt__kind_activation(void) {
    mpt__kind k = MPT_ZERO;
    k.describe = mpt__activation_describe;
    k.reads_x = mpt__activation_reads_x;
    k.takes_slope = mpt__activation_takes_slope;
    k.follows = mpt__follows_input;
    k.forward = mpt__activation_forward;
    k.data = mpt__activation_data;
    return k;
}

/* -- Pooling -- see mpt_pool2d_op */

/* Shape of a pooling node with a window R x S, from the rest of its descriptor. */
static mpt_result mpt__pool_shape(mpt_model *net, mpt__node *node, int R, int S, const mpt_pool2d_desc *d) {
    mpt_pool2d_op op = MPT_ZERO;
    mpt_pool2d_shape *s = &op.shape;
    MPT__TRY(mpt__layer_positive(net, node, "window", R, 1));
    MPT__TRY(mpt__layer_positive(net, node, "window_w", S, 1));
    MPT__TRY(mpt__layer_positive(net, node, "stride", d->stride, 0));
    MPT__TRY(mpt__layer_positive(net, node, "stride_w", d->stride_w, 0));
    MPT__TRY(mpt__layer_positive(net, node, "padding", d->padding, 0));
    MPT__TRY(mpt__layer_positive(net, node, "padding_w", d->padding_w, -1));
    op.kind = node->pool_kind;
    s->N = 1;
    s->H = (size_t)node->H;
    s->W = (size_t)node->W;
    s->C = (size_t)node->C;
    s->R = (size_t)R;
    s->S = (size_t)S;
    s->stride_h = (size_t)d->stride;
    s->stride_w = (size_t)mpt__across(d->stride_w, d->stride);
    s->padding_h = (size_t)d->padding;
    s->padding_w = mpt__padding_across(d->padding_w, d->padding);
    s->exclude_padding = d->exclude_padding;
    MPT__TRY(mpt__pool2d_plan(net->ctx, node->name, &op));
    node->pool = op.shape;
    return mpt__layer_size(net, node, op.P, op.Q, s->C);
}

static int mpt__pool_layer(mpt_model *net, int in, mpt_pool_kind kind, int window, const mpt_pool2d_desc *desc) {
    mpt__node *node = mpt__node_new(net, MPT__POOL, kind == MPT_POOL_MAX ? "max_pool" : "avg_pool", NULL, in);
    mpt_pool2d_desc d = MPT_ZERO;
    if (!node) return 0;
    if (desc) d = *desc;
    node->pool_kind = kind;
    return mpt__layer_done(net, mpt__pool_shape(net, node, window, mpt__across(d.window_w, window), &d));
}

/* A window of all pixels */
static int mpt__global_pool_layer(mpt_model *net, int in, mpt_pool_kind kind) {
    mpt_pool2d_desc d = MPT_ZERO;
    const mpt__node *input = mpt__known_node(net, in);
    if (input) d.window_w = input->W;
    return mpt__pool_layer(net, in, kind, input ? input->H : 1, &d);
}

MPT_DEF int mpt_max_pool2d(mpt_model *net, int in, int window, const mpt_pool2d_desc *desc) {
    return mpt__pool_layer(net, in, MPT_POOL_MAX, window, desc);
}
MPT_DEF int mpt_avg_pool2d(mpt_model *net, int in, int window, const mpt_pool2d_desc *desc) {
    return mpt__pool_layer(net, in, MPT_POOL_AVERAGE, window, desc);
}
MPT_DEF int mpt_global_max_pool2d(mpt_model *net, int in) { return mpt__global_pool_layer(net, in, MPT_POOL_MAX); }
MPT_DEF int mpt_global_avg_pool2d(mpt_model *net, int in) { return mpt__global_pool_layer(net, in, MPT_POOL_AVERAGE); }

static int mpt__plan_add(mpt_model *net, size_t count, size_t size, int first, int last);

static void mpt__pool_keep(mpt_model *net, mpt__node *node, int first, int last) {
    const size_t count = (size_t)net->train.batch * mpt__node_count(node);
    if (node->pool_kind == MPT_POOL_MAX) node->index = mpt__plan_add(net, count, sizeof(uint16_t), first, last);
}

/* A maximum is above 0 exactly where the element that it was taken from is, and there are fewer maxima. */
static int mpt__pool_delays_slope(const mpt__node *node) { return node->pool_kind == MPT_POOL_MAX; }

static mpt_pool2d_op mpt__pool2d_op(const mpt__visit *v, mpt_pass pass) {
    mpt_pool2d_op op = MPT_ZERO;
    op.kind = v->node->pool_kind;
    op.pass = pass;
    op.shape = v->node->pool;
    op.shape.N = v->N;
    op.index = v->index;
    return op;
}

static mpt_result mpt__pool_forward(const mpt__visit *v) {
    mpt_pool2d_op op = mpt__pool2d_op(v, MPT_FORWARD);
    op.x = v->x[0];
    op.y = v->y;
    return mpt_op_pool2d(v->ctx, &op);
}

static mpt_result mpt__pool_data(const mpt__visit *v, int side) {
    mpt_pool2d_op op = mpt__pool2d_op(v, MPT_BACKWARD_DATA);
    op.x = v->dx[side];
    op.y = v->dy;
    op.beta = v->beta_x[side];
    return mpt_op_pool2d(v->ctx, &op);
}

/* It keeps the order of an input of one pixel. */
static int mpt__pool_follows(const mpt_model *net, const mpt__node *node, MPT__UNUSED size_t *i) {
    const mpt__node *in = mpt__node_of(net, node->in[0]);
    if (in->H * in->W > 1) return 0;
    return node->in[0];
}

static mpt__kind mpt__kind_pool(void) {
    mpt__kind k = MPT_ZERO;
    k.how = "pooling";
    k.keep = mpt__pool_keep;
    k.delays_slope = mpt__pool_delays_slope;
    k.follows = mpt__pool_follows;
    k.forward = mpt__pool_forward;
    k.data = mpt__pool_data;
    return k;
}

/* -- Reshape -- shares its input's memory, and also the gradient if no other node reads the input */

static int mpt__reshape_layer(mpt_model *net, int in, const char *word, int H, int W, int C) {
    mpt__node *node = mpt__node_new(net, MPT__RESHAPE, word, NULL, in);
    const mpt__node *input;
    mpt_result r;
    if (!node) return 0;
    r = mpt__layer_positive(net, node, "H", H, 1);
    if (r == MPT_OK) r = mpt__layer_positive(net, node, "W", W, 1);
    if (r == MPT_OK) r = mpt__layer_positive(net, node, "C", C, 1);
    if (r == MPT_OK) r = mpt__layer_size(net, node, (size_t)H, (size_t)W, (size_t)C);
    input = mpt__node_of(net, in);
    if (r == MPT_OK && mpt__node_count(node) != node->inputs)
        r = mpt_fail(net->ctx, MPT_ERROR_SHAPE, "%s: %dx%dx%d of '%s', which is %dx%dx%d", node->name, H, W, C,
                     input->name, input->H, input->W, input->C);
    return mpt__layer_done(net, r);
}

MPT_DEF int mpt_reshape(mpt_model *net, int in, int H, int W, int C) {
    return mpt__reshape_layer(net, in, "reshape", H, W, C);
}
MPT_DEF int mpt_flatten(mpt_model *net, int in) {
    const mpt__node *input = mpt__known_node(net, in);
    return mpt__reshape_layer(net, in, "flatten", 1, 1, input ? (int)mpt__node_count(input) : 1);
}

static int mpt__same_order(const mpt_model *net, int id, int other);

/* The elements of an input that is a vector have the order in which the user gives them. */
static int mpt__reshape_matches_torch(const mpt_model *net, const mpt__node *node) {
    const mpt__node *from = node;
    while (from->kind == MPT__RESHAPE || from->kind == MPT__SLICE) from = mpt__node_of(net, from->in[0]);
    if (from->kind == MPT__INPUT && from->H * from->W == 1) return 1;
    return mpt__same_order(net, (int)(node - net->nodes) + 1, node->in[0]);
}

static mpt__kind mpt__kind_reshape(void) {
    mpt__kind k = MPT_ZERO;
    k.as_input = 1;
    k.how = "shared memory";
    k.follows = mpt__follows_input;
    k.matches_torch = mpt__reshape_matches_torch;
    k.data = mpt__pass_on;
    return k;
}

/* -- Slice -- y = some channels of x, pixel by pixel; dx is 0 in all other channels */

MPT_DEF int mpt_slice(mpt_model *net, int in, int first, int count) {
    mpt__node *node = mpt__node_new(net, MPT__SLICE, "slice", NULL, in);
    if (!node) return 0;
    if (first < 0 || count < 1 || first >= node->C || count > node->C - first)
        return mpt__layer_done(net,
                               mpt_fail(net->ctx, MPT_ERROR_SHAPE, "%s: %d channels from %d on of '%s', which has %d",
                                        node->name, count, first, mpt__node_of(net, in)->name, node->C));
    node->first = first;
    node->C = count;
    return mpt__layer_done(net, MPT_OK);
}

/* Channels of its input */
static size_t mpt__slice_width(const mpt__node *node) { return node->inputs / ((size_t)node->H * (size_t)node->W); }

static mpt_columns_op mpt__slice_op(const mpt__visit *v) {
    mpt_columns_op op = MPT_ZERO;
    op.rows = v->N * (size_t)v->node->H * (size_t)v->node->W;
    op.C = (size_t)v->node->C;
    return op;
}

static mpt_result mpt__slice_forward(const mpt__visit *v) {
    mpt_columns_op op = mpt__slice_op(v);
    op.x = mpt__array_at(v->x[0], (size_t)v->node->first);
    op.x_stride = mpt__slice_width(v->node);
    op.y = v->y;
    return mpt_op_columns(v->ctx, &op);
}

static mpt_result mpt__slice_data(const mpt__visit *v, int side) {
    const mpt_array dx = v->dx[side];
    const size_t bytes = v->N * v->node->inputs * mpt_dtype_size(dx.type);
    mpt_columns_op op = mpt__slice_op(v);
    if (!(v->beta_x[side] > 0)) MPT__TRY(v->ctx->backend.zero(v->ctx, dx.data, bytes));
    op.x = v->dy;
    op.y = mpt__array_at(dx, (size_t)v->node->first);
    op.y_stride = mpt__slice_width(v->node);
    op.beta = v->beta_x[side];
    return mpt_op_columns(v->ctx, &op);
}

static int mpt__slice_follows(MPT__UNUSED const mpt_model *net, const mpt__node *node, size_t *i) {
    *i += (size_t)node->first;
    return node->in[0];
}

static size_t mpt__torch_index(const mpt_model *net, int id, size_t i);

/* Are its elements also a slice in PyTorch's order? */
static int mpt__slice_matches_torch(const mpt_model *net, const mpt__node *node) {
    const size_t count = mpt__node_count(node);
    size_t i;
    for (i = 0; i < count; i++)
        if (mpt__torch_index(net, (int)(node - net->nodes) + 1, i) >= count) return 0;
    return 1;
}

static mpt__kind mpt__kind_slice(void) {
    mpt__kind k = MPT_ZERO;
    k.as_input = 1;
    k.how = "copy";
    k.follows = mpt__slice_follows;
    k.matches_torch = mpt__slice_matches_torch;
    k.forward = mpt__slice_forward;
    k.data = mpt__slice_data;
    return k;
}

/* -- Sum -- y = act(a + b) */

/* A node with two inputs of the same height and width. channels: they must have the same channels, too. pixel: the
   second may have a single pixel instead. NULL: it failed, and the reason is stored. */
static mpt__node *mpt__join(mpt_model *net, mpt__node_kind kind, const char *word, int a, int b, int channels,
                            int pixel) {
    mpt__node *node = b ? mpt__node_new(net, kind, word, NULL, a) : NULL;
    const mpt__node *other;
    int fits;
    if (!node) return NULL;
    if (b < 0 || b > net->count || mpt__node_of(net, b)->kind == MPT__LOSS) {
        mpt__layer_failed(net, mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "%s: there is no node %d", node->name, b));
        return NULL;
    }
    other = mpt__node_of(net, b);
    fits = (other->H == node->H && other->W == node->W) || (pixel && other->H * other->W == 1);
    if (!fits || (channels && other->C != node->C)) {
        mpt__layer_failed(net, mpt_fail(net->ctx, MPT_ERROR_SHAPE, "%s: %s is %dx%dx%d but %s is %dx%dx%d", node->name,
                                        mpt__node_of(net, a)->name, node->H, node->W, node->C, other->name, other->H,
                                        other->W, other->C));
        return NULL;
    }
    node->in[1] = b;
    return node;
}

MPT_DEF int mpt_add(mpt_model *net, int a, int b) {
    if (mpt__join(net, MPT__ADD, "add", a, b, 1, 0)) return mpt__layer_done(net, MPT_OK);
    return 0;
}

static mpt_result mpt__sum_forward(const mpt__visit *v) {
    mpt_map_op op = mpt__map_op(v, MPT_MAP_ADD, v->x[0], v->y);
    op.b = v->x[1];
    op.beta = 1;
    op.act = v->node->act;
    return mpt_op_map(v->ctx, &op);
}

static int mpt__sum_matches_torch(const mpt_model *net, const mpt__node *node) {
    return node->H * node->W > 1 || mpt__same_order(net, node->in[0], node->in[1]);
}

static int mpt__shared_side(const mpt_model *net, int id);

static const char *mpt__sum_describe(const mpt_model *net, const mpt__node *node) {
    if (mpt__shared_side(net, (int)(node - net->nodes) + 1) < 0) return "elementwise";
    return "sum, dy shared";
}

static mpt__kind mpt__kind_sum(void) {
    mpt__kind k = MPT_ZERO;
    k.fuses = 1;
    k.shares_dy = 1;
    k.describe = mpt__sum_describe;
    k.follows = mpt__follows_input;
    k.matches_torch = mpt__sum_matches_torch;
    k.forward = mpt__sum_forward;
    k.data = mpt__pass_on;
    return k;
}

/* -- Concatenation -- y = a's channels, then b's, pixel by pixel */

MPT_DEF int mpt_concat(mpt_model *net, int a, int b) {
    mpt__node *node = mpt__join(net, MPT__CONCAT, "concat", a, b, 0, 0);
    size_t C;
    if (!node) return 0;
    C = (size_t)node->C + (size_t)mpt__node_of(net, b)->C;
    return mpt__layer_done(net, mpt__layer_size(net, node, (size_t)node->H, (size_t)node->W, C));
}

/* Copies the channels of one side, which begin at channel *first of the concatenation. */
static mpt_columns_op mpt__concat_op(const mpt__visit *v, int side, size_t *first) {
    const size_t pixels = (size_t)v->node->H * (size_t)v->node->W, C = (size_t)v->node->C;
    const size_t left = v->node->inputs / pixels;
    mpt_columns_op op = MPT_ZERO;
    op.rows = v->N * pixels;
    op.C = left;
    *first = 0;
    if (side) {
        op.C = C - left;
        *first = left;
    }
    return op;
}

static mpt_result mpt__concat_forward(const mpt__visit *v) {
    int side;
    for (side = 0; side < 2; side++) {
        size_t first;
        mpt_columns_op op = mpt__concat_op(v, side, &first);
        op.x = v->x[side];
        op.y = mpt__array_at(v->y, first);
        op.y_stride = (size_t)v->node->C;
        MPT__TRY(mpt_op_columns(v->ctx, &op));
    }
    return MPT_OK;
}

static mpt_result mpt__concat_data(const mpt__visit *v, int side) {
    size_t first;
    mpt_columns_op op = mpt__concat_op(v, side, &first);
    op.x = mpt__array_at(v->dy, first);
    op.x_stride = (size_t)v->node->C;
    op.y = v->dx[side];
    op.beta = v->beta_x[side];
    return mpt_op_columns(v->ctx, &op);
}

static int mpt__concat_follows(const mpt_model *net, const mpt__node *node, size_t *i) {
    const size_t left = (size_t)mpt__node_of(net, node->in[0])->C;
    if (*i < left) return node->in[0];
    *i -= left;
    return node->in[1];
}

static mpt__kind mpt__kind_concat(void) {
    mpt__kind k = MPT_ZERO;
    k.how = "copy";
    k.follows = mpt__concat_follows;
    k.forward = mpt__concat_forward;
    k.data = mpt__concat_data;
    return k;
}

/* -- Product -- y = a b, where b has the pixels of a, or a single one for all of them */

static mpt_broadcast_shape mpt__spread_shape(const mpt__node *small, const mpt__node *large) {
    mpt_broadcast_shape shape = MPT_ZERO;
    shape.N = 1;
    shape.H = (size_t)small->H;
    shape.W = (size_t)small->W;
    shape.C = (size_t)small->C;
    shape.R = (size_t)(large->H / small->H);
    shape.S = (size_t)(large->W / small->W);
    return shape;
}

MPT_DEF int mpt_multiply(mpt_model *net, int a, int b) {
    mpt__node *node = mpt__join(net, MPT__MULTIPLY, "multiply", a, b, 1, 1);
    if (!node) return 0;
    node->spread = mpt__spread_shape(mpt__node_of(net, b), node);
    return mpt__layer_done(net, MPT_OK);
}

static mpt_broadcast_op mpt__spread_op(const mpt__visit *v, mpt_pass pass) {
    mpt_broadcast_op op = MPT_ZERO;
    op.pass = pass;
    op.shape = v->node->spread;
    op.shape.N = v->N;
    return op;
}

static int mpt__multiply_reads_x(MPT__UNUSED const mpt__node *node) { return 1; }

static mpt_result mpt__multiply_forward(const mpt__visit *v) {
    mpt_broadcast_op op = mpt__spread_op(v, MPT_FORWARD);
    op.x = v->x[1];
    op.factor = v->x[0];
    op.y = v->y;
    return mpt_op_broadcast(v->ctx, &op);
}

/* da = dy b, db = sums of dy a */
static mpt_result mpt__multiply_data(const mpt__visit *v, int side) {
    mpt_broadcast_op op = mpt__spread_op(v, MPT_FORWARD);
    op.x = v->x[1];
    op.y = v->dx[0];
    op.factor = v->dy;
    if (side) {
        op.pass = MPT_BACKWARD_DATA;
        op.x = v->dx[1];
        op.y = v->dy;
        op.factor = v->x[0];
    }
    op.beta = v->beta_x[side];
    return mpt_op_broadcast(v->ctx, &op);
}

/* A factor of one pixel must have its channels in the order of the image's channels. */
static int mpt__multiply_matches_torch(const mpt_model *net, const mpt__node *node) {
    const mpt__node *b = mpt__node_of(net, node->in[1]);
    if (b->H * b->W > 1) return 1;
    return mpt__same_order(net, node->in[1], node->H * node->W > 1 ? 0 : node->in[0]);
}

static mpt__kind mpt__kind_multiply(void) {
    mpt__kind k = MPT_ZERO;
    k.how = "elementwise";
    k.reads_x = mpt__multiply_reads_x;
    k.follows = mpt__follows_input;
    k.matches_torch = mpt__multiply_matches_torch;
    k.forward = mpt__multiply_forward;
    k.data = mpt__multiply_data;
    return k;
}

/* -- Upsampling -- y(H scale, W scale) = x, each pixel repeated scale x scale times */

MPT_DEF int mpt_upsample(mpt_model *net, int in, int scale) {
    mpt__node *node = mpt__node_new(net, MPT__UPSAMPLE, "upsample", NULL, in);
    mpt_result r;
    if (!node) return 0;
    r = mpt__layer_positive(net, node, "scale", scale, 1);
    if (r == MPT_OK && (node->H > MPT__MOST / scale || node->W > MPT__MOST / scale))
        r = mpt_fail(net->ctx, MPT_ERROR_SHAPE, "%s: %dx%d times %d", node->name, node->H, node->W, scale);
    if (r == MPT_OK)
        r = mpt__layer_size(net, node, (size_t)node->H * (size_t)scale, (size_t)node->W * (size_t)scale,
                            (size_t)node->C);
    if (r == MPT_OK) node->spread = mpt__spread_shape(mpt__node_of(net, in), node);
    return mpt__layer_done(net, r);
}

static mpt_result mpt__upsample_forward(const mpt__visit *v) {
    mpt_broadcast_op op = mpt__spread_op(v, MPT_FORWARD);
    op.x = v->x[0];
    op.y = v->y;
    return mpt_op_broadcast(v->ctx, &op);
}

static mpt_result mpt__upsample_data(const mpt__visit *v, int side) {
    mpt_broadcast_op op = mpt__spread_op(v, MPT_BACKWARD_DATA);
    op.x = v->dx[side];
    op.y = v->dy;
    op.beta = v->beta_x[side];
    return mpt_op_broadcast(v->ctx, &op);
}

static int mpt__upsample_matches_torch(const mpt_model *net, const mpt__node *node) {
    const mpt__node *in = mpt__node_of(net, node->in[0]);
    return in->H * in->W > 1 || node->H * node->W == 1 || mpt__same_order(net, node->in[0], 0);
}

static mpt__kind mpt__kind_upsample(void) {
    mpt__kind k = MPT_ZERO;
    k.how = "copy";
    k.follows = mpt__follows_input;
    k.matches_torch = mpt__upsample_matches_torch;
    k.forward = mpt__upsample_forward;
    k.data = mpt__upsample_data;
    return k;
}

/* -- Norms -- see mpt_norm_op. Batch norm uses the statistics of the batch in training, and otherwise the running ones;
   the others always use those of the sample. gamma is `weight`, beta is `bias`. */

static mpt_result mpt__norm_layer_check(mpt_model *net, const mpt__node *node, int groups) {
    const float eps = node->norm_shape.eps;
    if (!mpt__finite(eps) || eps < 0)
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "%s: eps %g is not a finite number above 0", node->name,
                        (double)eps);
    if (groups < 1 || node->C % groups)
        return mpt_fail(net->ctx, MPT_ERROR_SHAPE, "%s: %d groups do not divide %d channels", node->name, groups,
                        node->C);
    return mpt__need_share(net->ctx, node->name, "momentum", node->momentum, 0);
}

static int mpt__norm_layer(mpt_model *net, int in, mpt__norm_kind kind, int groups, const mpt_norm_desc *desc) {
    static const char *const words[] = {"batch_norm", "layer_norm", "group_norm"};
    mpt_norm_desc d = MPT_ZERO;
    mpt__node *node;
    mpt_norm_shape *s;
    if (desc) d = *desc;
    node = mpt__node_new(net, MPT__NORM, words[kind], d.name, in);
    if (!node) return 0;
    if (kind == MPT__NORM_BATCH) groups = node->C;
    s = &node->norm_shape;
    s->N = 1;
    s->pixels = (size_t)node->H * (size_t)node->W;
    if (kind == MPT__NORM_LAYER) { /* each position separately */
        s->N = s->pixels;
        s->pixels = 1;
    }
    s->C = (size_t)node->C;
    s->groups = (size_t)groups;
    s->eps = d.eps; /* 0: the operation's default */
    node->norm = kind;
    node->no_affine = d.no_affine != 0;
    node->tuning = d.tuning;
    node->momentum = mpt__is_zero(d.momentum) ? 0.1f : d.momentum;
    return mpt__layer_done(net, mpt__norm_layer_check(net, node, groups));
}

MPT_DEF int mpt_batch_norm(mpt_model *net, int in, const mpt_norm_desc *desc) {
    return mpt__norm_layer(net, in, MPT__NORM_BATCH, 1, desc);
}
MPT_DEF int mpt_layer_norm(mpt_model *net, int in, const mpt_norm_desc *desc) {
    return mpt__norm_layer(net, in, MPT__NORM_LAYER, 1, desc);
}
MPT_DEF int mpt_group_norm(mpt_model *net, int in, int groups, const mpt_norm_desc *desc) {
    return mpt__norm_layer(net, in, MPT__NORM_GROUP, groups, desc);
}

static int mpt__is_batch_norm(const mpt__node *node) {
    return node->kind == MPT__NORM && node->norm == MPT__NORM_BATCH;
}

/* Does it normalise by its running statistics instead of those of its input? */
static int mpt__norm_by_running(const mpt__node *node, int train) {
    return mpt__is_batch_norm(node) && (!train || node->tuning.frozen);
}

/* In a pass over N samples */
static mpt_norm_shape mpt__norm_shape_of(const mpt__node *node, size_t N) {
    mpt_norm_shape shape = node->norm_shape;
    if (node->norm == MPT__NORM_BATCH) shape.pixels *= N;
    else shape.N *= N;
    return shape;
}

static size_t mpt__norm_fan_in(const mpt__node *node) { return !node->no_affine; }

/* A ReLU's slope is applied within norm backward. */
static int mpt__norm_takes_slope(const mpt__node *node) { return node->slope == MPT_RELU && node->type <= MPT_BF16; }

/* Frozen statistics are constants: then dx is dy times a factor of the channel. */
static int mpt__norm_reads_x(const mpt__node *node) {
    return node->trains || !mpt__norm_by_running(node, 1) || mpt__norm_takes_slope(node);
}

static size_t mpt__norm_groups(const mpt__node *node) {
    if (node->norm == MPT__NORM_GROUP) return node->norm_shape.groups;
    return 1;
}

/* gamma and the running variances start at 1; beta and the running means at 0, like all memory. */
static mpt_result mpt__norm_init(mpt_model *net, const mpt__node *node) {
    const size_t C = (size_t)node->C;
    float *ones = (float *)mpt__host_alloc(net->ctx, C * sizeof *ones);
    mpt_result r;
    size_t c;
    if (!ones) return MPT_ERROR_NO_MEMORY;
    for (c = 0; c < C; c++) ones[c] = 1;
    r = node->weight ? mpt_params_set(net->params, node->weight, ones) : MPT_OK;
    if (r == MPT_OK && mpt__is_batch_norm(node))
        r = mpt_upload(net->ctx, net->running + node->running + C, ones, C * sizeof *ones);
    mpt__host_free(net->ctx, ones);
    return r;
}

static void mpt__norm_keep(mpt_model *net, mpt__node *node, int first, int last) {
    const mpt_norm_shape shape = mpt__norm_shape_of(node, (size_t)net->train.batch);
    node->stats = mpt__plan_add(net, 4 * shape.N * shape.groups, sizeof(float), first, last);
}

static mpt_result mpt__norm_forward(const mpt__visit *v) {
    const int by_running = mpt__norm_by_running(v->node, v->train);
    mpt_norm_op op = MPT_ZERO; /* MPT_NORM_STATS */
    op.shape = mpt__norm_shape_of(v->node, v->N);
    op.x = v->x[0];
    op.stats = by_running ? v->running : v->stats;
    if (!by_running) MPT__TRY(mpt_op_norm(v->ctx, &op));
    op.pass = MPT_NORM_FORWARD;
    op.y = v->y;
    op.gamma = v->weight;
    op.beta = v->bias;
    op.act = v->node->act;
    return mpt_op_norm(v->ctx, &op);
}

/* The statistics of a batch are added to the pending ones in the backward pass: only then does the pass count. */
static mpt_result mpt__norm_statistics(const mpt__visit *v) {
    mpt_norm_op op = MPT_ZERO;
    if (!mpt__is_batch_norm(v->node) || mpt__norm_by_running(v->node, 1)) return MPT_OK;
    op.pass = MPT_NORM_RUNNING;
    op.shape = mpt__norm_shape_of(v->node, v->N);
    op.stats = v->stats;
    op.momentum = v->node->momentum;
    op.running = v->pending;
    return mpt_op_norm(v->ctx, &op);
}

/* Gradients of gamma, beta and the input at once */
static mpt_result mpt__norm_backward(const mpt__visit *v) {
    mpt_norm_op op = MPT_ZERO;
    MPT__TRY(mpt__norm_statistics(v));
    op.pass = MPT_NORM_BACKWARD;
    op.shape = mpt__norm_shape_of(v->node, v->N);
    op.frozen = mpt__norm_by_running(v->node, 1);
    op.stats = op.frozen ? v->running : v->stats;
    op.x = v->x[0];
    op.y = v->dy;
    op.gamma = v->weight;
    op.beta = v->bias;
    if (mpt__norm_takes_slope(v->node)) {
        op.act = v->node->slope;
        op.saved = v->y;
    }
    op.dx = v->dx[0];
    op.scale_x = v->beta_x[0];
    op.dgamma = v->dweight;
    op.dbeta = v->dbias;
    op.scale = v->beta;
    return mpt_op_norm(v->ctx, &op);
}

/* Is this batch norm folded into the layer before it? */
static int mpt__is_folded(const mpt_model *net, const mpt__node *node) {
    return node->in_place && mpt__node_of(net, node->in[0])->folds;
}

static const char *mpt__norm_describe(const mpt_model *net, const mpt__node *node) {
    if (net->train.fold && mpt__is_folded(net, node)) return "folded";
    if (net->train.fold && mpt__is_batch_norm(node)) return node->in_place ? "norm in place" : "norm apart";
    if (mpt__norm_takes_slope(node)) return "norm with slope";
    return "normalisation";
}

static mpt__kind mpt__kind_norm(void) {
    mpt__kind k = MPT_ZERO;
    k.fuses = 1;
    k.weight_dims = 1;
    k.reason = "policy; statistics, gamma, beta f32";
    k.describe = mpt__norm_describe;
    k.fan_in = mpt__norm_fan_in;
    k.init = mpt__norm_init;
    k.keep = mpt__norm_keep;
    k.reads_x = mpt__norm_reads_x;
    k.takes_slope = mpt__norm_takes_slope;
    k.groups = mpt__norm_groups;
    k.follows = mpt__follows_input;
    k.forward = mpt__norm_forward;
    k.weights = mpt__norm_backward;
    k.statistics = mpt__norm_statistics;
    return k;
}

/* -- Dropout -- */

MPT_DEF int mpt_dropout(mpt_model *net, int in, float p) {
    mpt__node *node = mpt__node_new(net, MPT__DROPOUT, "dropout", NULL, in);
    if (!node) return 0;
    node->p = p;
    return mpt__layer_done(net, mpt__need_share(net->ctx, node->name, "p", p, 1));
}

static mpt_result mpt__dropout_forward(const mpt__visit *v) {
    mpt_map_op op = mpt__map_op(v, v->train ? MPT_MAP_DROPOUT : MPT_MAP_ADD, v->x[0], v->y);
    op.b = v->x[0]; /* an evaluation copies: y = x + 0 x */
    op.mask = v->mask;
    return mpt_op_map(v->ctx, &op);
}

static mpt_result mpt__dropout_data(const mpt__visit *v, int side) {
    mpt_map_op op = mpt__map_op(v, MPT_MAP_DROPOUT, v->dy, v->dx[side]);
    op.mask = v->mask;
    op.beta = v->beta_x[side];
    return mpt_op_map(v->ctx, &op);
}

static mpt__kind mpt__kind_dropout(void) {
    mpt__kind k = MPT_ZERO;
    k.how = "elementwise";
    k.follows = mpt__follows_input;
    k.forward = mpt__dropout_forward;
    k.data = mpt__dropout_data;
    return k;
}

/* -- Losses -- the last node; it computes the loss and its gradient in the forward pass */

/* The weights of the loss, one for each of its outputs; NULL: it has none */
static const float *mpt__loss_weights(const mpt__node *node) {
    const mpt_loss_desc *d = &node->loss_desc;
    if (d->pos_weight) return d->pos_weight;
    return d->class_weights;
}

/* Rows of a sample, and elements of a row */
static size_t mpt__loss_positions(const mpt__node *node) {
    if (node->loss_desc.per_position) return (size_t)node->H * (size_t)node->W;
    return 1;
}
static size_t mpt__loss_outputs(const mpt__node *node) { return mpt__node_count(node) / mpt__loss_positions(node); }

static mpt_result mpt__loss_check(mpt_model *net, mpt__node *node) {
    const float *weights = mpt__loss_weights(node);
    const size_t outputs = mpt__loss_outputs(node);
    size_t c;
    MPT__TRY(mpt__loss_desc_check(net->ctx, node->name, node->loss, &node->loss_desc));
    if (!weights) return MPT_OK;
    for (c = 0; c < outputs; c++)
        if (!mpt__finite(weights[c]) || weights[c] < 0)
            return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "%s: %s %zu is %g, not a finite number from 0 on", node->name,
                            node->loss_desc.pos_weight ? "pos_weight" : "class weight", c, (double)weights[c]);
    return MPT_OK;
}

static int mpt__loss_layer(mpt_model *net, int in, const char *word, mpt_loss_kind loss, const mpt_loss_desc *desc) {
    mpt__node *node = mpt__node_new(net, MPT__LOSS, word, NULL, in);
    if (!node) return 0;
    node->loss = loss;
    if (desc) node->loss_desc = *desc;
    return mpt__layer_done(net, mpt__loss_check(net, node));
}

MPT_DEF int mpt_softmax_cross_entropy(mpt_model *net, int in, const mpt_loss_desc *desc) {
    return mpt__loss_layer(net, in, "cross_entropy", MPT_LOSS_CROSS_ENTROPY, desc);
}
MPT_DEF int mpt_mse(mpt_model *net, int in, const mpt_loss_desc *desc) {
    return mpt__loss_layer(net, in, "mse", MPT_LOSS_SQUARED_ERROR, desc);
}
MPT_DEF int mpt_bce_with_logits(mpt_model *net, int in, const mpt_loss_desc *desc) {
    return mpt__loss_layer(net, in, "bce_with_logits", MPT_LOSS_BCE_WITH_LOGITS, desc);
}
MPT_DEF int mpt_l1(mpt_model *net, int in, const mpt_loss_desc *desc) {
    return mpt__loss_layer(net, in, "l1", MPT_LOSS_ABSOLUTE_ERROR, desc);
}
MPT_DEF int mpt_huber(mpt_model *net, int in, const mpt_loss_desc *desc) {
    return mpt__loss_layer(net, in, "huber", MPT_LOSS_HUBER, desc);
}

/* Are targets labels? */
static int mpt__has_labels(const mpt__node *loss) {
    return loss->loss == MPT_LOSS_CROSS_ENTROPY && !loss->loss_desc.probabilities;
}

/* Elements, of 4 bytes, of a sample's target: labels, or as many floats as the node has elements. In a model without a
   loss, those of the widest head's gradient. */
static size_t mpt__target_width(const mpt_model *net) {
    const mpt__node *loss = mpt__loss_of(net);
    size_t widest = 0;
    int id;
    if (loss) return mpt__has_labels(loss) ? mpt__loss_positions(loss) : mpt__node_count(loss);
    for (id = 1; id <= net->count; id++)
        if (mpt__is_output(net, id)) widest = mpt__max(widest, mpt__node_count(mpt__node_of(net, id)));
    return widest;
}

static mpt_result mpt__labels_check(mpt_context *ctx, const char *call, const mpt__node *loss, const int32_t *labels,
                                    size_t samples) {
    const size_t classes = mpt__loss_outputs(loss), positions = mpt__loss_positions(loss);
    char position[40] = "";
    size_t i;
    for (i = 0; i < samples * positions; i++) {
        if (labels[i] >= 0 && (size_t)labels[i] < classes) continue;
        if (mpt__label_ignored(&loss->loss_desc, labels[i])) continue;
        if (positions > 1) mpt__print(position, sizeof position, ", position %zu,", i % positions);
        return mpt_fail(ctx, MPT_ERROR_VALUE, "%s: '%s': label %d of sample %zu%s is not in 0..%zu", call, loss->name,
                        (int)labels[i], i / positions, position, classes - 1);
    }
    return MPT_OK;
}

static mpt_result mpt__targets_check(mpt_context *ctx, const char *call, const mpt__node *loss, const float *targets,
                                     size_t samples) {
    const int shares = loss->loss == MPT_LOSS_BCE_WITH_LOGITS, positive = shares || loss->loss_desc.probabilities;
    const size_t outputs = mpt__node_count(loss);
    size_t i;
    for (i = 0; i < samples * outputs; i++) {
        const uint32_t magnitude = mpt__bits(targets[i]) & 0x7fffffffu;
        if (magnitude && magnitude < 0x00800000u) /* a small integer, read as a float */
            return mpt_fail(ctx, MPT_ERROR_VALUE,
                            "%s: '%s': target %zu of sample %zu has the bits of the integer %d; targets are float",
                            call, loss->name, i % outputs, i / outputs, (int)magnitude);
        if (!mpt__finite(targets[i]) || (positive && targets[i] < 0) || (shares && targets[i] > 1))
            return mpt_fail(ctx, MPT_ERROR_VALUE, "%s: '%s': target %zu of sample %zu is %g%s", call, loss->name,
                            i % outputs, i / outputs, (double)targets[i], shares ? ", not in 0..1" : "");
    }
    return MPT_OK;
}

static mpt_result mpt__weights_check(mpt_context *ctx, const char *call, const mpt__node *loss, const float *weights,
                                     size_t samples) {
    size_t i;
    for (i = 0; i < samples; i++)
        if (!mpt__finite(weights[i]) || weights[i] < 0)
            return mpt_fail(ctx, MPT_ERROR_VALUE, "%s: '%s': the weight of sample %zu is %g, not finite or negative",
                            call, loss->name, i, (double)weights[i]);
    return MPT_OK;
}

static mpt__kind mpt__kind_loss(void) {
    mpt__kind k = MPT_ZERO;
    k.how = "loss and gradient";
    return k;
}

/* -- Your own layer -- see mpt_layer_desc; its weights are one row in a file */

static mpt_result mpt__own_check(mpt_model *net, mpt__node *node, const mpt_layer_desc *d) {
    if (!d || !d->forward || !d->backward)
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "%s: desc, forward or backward is NULL", node->name);
    if (!d->H && !d->W && !d->C) return MPT_OK;
    MPT__TRY(mpt__layer_positive(net, node, "H", d->H, 1));
    MPT__TRY(mpt__layer_positive(net, node, "W", d->W, 1));
    MPT__TRY(mpt__layer_positive(net, node, "C", d->C, 1));
    return mpt__layer_size(net, node, (size_t)d->H, (size_t)d->W, (size_t)d->C);
}

MPT_DEF int mpt_layer(mpt_model *net, int in, const mpt_layer_desc *desc) {
    mpt__node *node = mpt__node_new(net, MPT__OWN, "layer", desc ? desc->name : NULL, in);
    mpt_result r;
    if (!node) return 0;
    r = mpt__own_check(net, node, desc);
    if (r != MPT_OK) return mpt__layer_done(net, r);
    node->own = *desc;
    node->own.name = NULL; /* it is copied */
    node->tuning = desc->tuning;
    node->no_bias = 1;
    return mpt__layer_done(net, MPT_OK);
}

static size_t mpt__own_weights(const mpt__node *node) { return node->own.weights; }

static mpt_result mpt__own_init(mpt_model *net, const mpt__node *node) {
    if (!node->weight || !node->own.start) return MPT_OK;
    return mpt_params_set(net->params, node->weight, node->own.start);
}

static int mpt__own_reads_x(MPT__UNUSED const mpt__node *node) { return 1; }

static mpt_layer_pass mpt__own_pass(const mpt__visit *v) {
    mpt_layer_pass p = MPT_ZERO;
    p.ctx = v->ctx;
    p.user = v->node->own.user;
    p.N = v->N;
    p.train = v->train;
    p.x = v->x[0];
    p.y = v->y;
    p.weight = v->weight;
    return p;
}

static mpt_result mpt__own_forward(const mpt__visit *v) {
    const mpt_layer_pass p = mpt__own_pass(v);
    return v->node->own.forward(&p);
}

static mpt_result mpt__own_backward(const mpt__visit *v) {
    mpt_layer_pass p = mpt__own_pass(v);
    p.dy = v->dy;
    p.dx = v->dx[0];
    p.beta_x = v->beta_x[0];
    p.dweight = (float *)v->dweight.data;
    p.beta = v->beta;
    if (p.dx.data || p.dweight) return v->node->own.backward(&p);
    return MPT_OK;
}

static mpt__kind mpt__kind_own(void) {
    mpt__kind k = MPT_ZERO;
    k.how = "your own";
    k.weights_in_all = mpt__own_weights;
    k.init = mpt__own_init;
    k.reads_x = mpt__own_reads_x;
    k.reads_y = 1;
    k.forward = mpt__own_forward;
    k.weights = mpt__own_backward;
    return k;
}

/* -- The kinds -- */

static mpt__kind mpt__kind_of(const mpt__node *node) {
    static mpt__kind (*const kinds[MPT__KINDS])(void) = {
        mpt__kind_input,   mpt__kind_linear, mpt__kind_conv2d, mpt__kind_activation, mpt__kind_pool,
        mpt__kind_reshape, mpt__kind_sum,    mpt__kind_concat, mpt__kind_norm,       mpt__kind_dropout,
        mpt__kind_loss,    mpt__kind_own,    mpt__kind_slice,  mpt__kind_multiply,   mpt__kind_upsample};
    return kinds[node->kind]();
}

/* ==== MODEL PARTS ==== */

MPT_DEF mpt_policy mpt_policy_preset(mpt_level level, mpt_dtype type) {
    mpt_policy p = MPT_ZERO; /* O0 */
    if (level == MPT_O0) return p;
    p.compute = type;
    if (level != MPT_O1) p.param = type;
    if (level == MPT_O3) {
        p.output = type;
        p.master = MPT_MASTER_NONE;
    }
    if ((unsigned)level > MPT_O3 || (type != MPT_F16 && type != MPT_BF16)) p.compute = MPT_DTYPE_COUNT;
    return p;
}

MPT_DEF mpt_model *mpt_model_new(mpt_context *ctx, mpt_policy policy) {
    mpt_model *net;
    if (!ctx) return NULL;
    net = (mpt_model *)mpt__host_alloc(ctx, sizeof *net);
    if (!net) return NULL;
    net->ctx = ctx;
    net->policy = policy;
    return net;
}

/* Frees what a build allocated. */
static void mpt__model_clear(mpt_model *net) {
    mpt_context *ctx = net->ctx;
    if (net->opt) mpt_free(ctx, net->opt->op.average);
    mpt_optimizer_free(net->opt);
    mpt_scaler_free(net->scaler);
    mpt_params_free(net->params);
    mpt__host_free(ctx, net->buffers);
    mpt_free(ctx, net->block);
    mpt_free(ctx, net->staging);
    mpt_free(ctx, net->target);
    mpt_free(ctx, net->sums);
    mpt_free(ctx, net->loss_weights);
    mpt_free(ctx, net->sample_weights);
    mpt_free(ctx, net->channels);
    mpt_free(ctx, net->averages.data);
    net->averages.data = NULL;
    mpt_free(ctx, net->running);
    mpt_free(ctx, net->pending);
    mpt_free(ctx, net->sums_apart);
    mpt_free(ctx, net->slots);
    mpt__host_free(ctx, net->slots_host);
    net->sample_weights = net->loss_weights = net->channels = net->running = net->pending = net->sums_apart = NULL;
    net->slots = net->slots_host = NULL;
    net->opt = NULL;
    net->scaler = NULL;
    net->params = NULL;
    net->buffers = NULL;
    net->block = NULL;
    net->staging = NULL;
    net->target = NULL;
    net->sums = NULL;
    net->buffer_count = 0;
}

MPT_DEF void mpt_model_free(mpt_model *net) {
    if (!net) return;
    mpt__model_clear(net);
    mpt__host_free(net->ctx, net->nodes);
    mpt__host_free(net->ctx, net);
}

MPT_DEF mpt_result mpt_policy_push(mpt_model *net, mpt_policy policy) {
    if (!net) return MPT_ERROR_ARGUMENT;
    if (net->built) return mpt_fail(net->ctx, MPT_ERROR_ORDER, "policy_push: the model is built already");
    if (net->depth == MPT__POLICIES)
        return mpt_fail(net->ctx, MPT_ERROR_ORDER, "policy_push: %d are pushed already", MPT__POLICIES);
    net->pushed[net->depth++] = policy;
    return MPT_OK;
}

MPT_DEF mpt_result mpt_policy_pop(mpt_model *net) {
    if (!net) return MPT_ERROR_ARGUMENT;
    if (!net->depth) return mpt_fail(net->ctx, MPT_ERROR_ORDER, "policy_pop: none is pushed");
    net->depth--;
    return MPT_OK;
}

/* -- Building: check, types, parameters, memory plan -- */

/* Is x still finite when it is rounded to this type? */
static int mpt__type_holds(float x, mpt_dtype type) {
    return mpt__finite(mpt_widen(mpt_narrow(x, type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0), type));
}

/* Checks that the node's policy is valid and fits to those of the nodes before it; finds the model's 16-bit type. */
static mpt_result mpt__policy_check(mpt_model *net, const mpt__node *node) {
    const mpt_policy *p = &node->policy;
    const int half = p->compute == MPT_F16 || p->compute == MPT_BF16;
    if (!((p->compute == MPT_F32 || half) && (p->param == MPT_F32 || p->param == p->compute) &&
          (p->output == MPT_F32 || p->output == p->compute) &&
          (p->master == MPT_MASTER_F32 || (half && p->param == p->compute))))
        return mpt_fail(net->ctx, MPT_ERROR_TYPE,
                        "%s: policy of param %s, compute %s, output %s, master %d; compute is f32, f16 or bf16, the "
                        "others f32 or the same, no masters only for 16-bit parameters",
                        node->name, mpt_dtype_name(p->param), mpt_dtype_name(p->compute), mpt_dtype_name(p->output),
                        (int)p->master);
    if (half && net->half != MPT_F32 && net->half != p->compute)
        return mpt_fail(net->ctx, MPT_ERROR_TYPE, "%s: compute %s in a model with %s", node->name,
                        mpt_dtype_name(p->compute), mpt_dtype_name(net->half));
    if (half) net->half = p->compute;
    if (p->master != net->policy.master)
        return mpt_fail(net->ctx, MPT_ERROR_TYPE, "%s: master %d in a model with master %d", node->name, (int)p->master,
                        (int)net->policy.master);
    return MPT_OK;
}

/* With a loss, another node must read every node's value; without one, those that no node reads are the heads. */
static mpt_result mpt__outputs_check(mpt_model *net) {
    int id;
    for (id = 1; id <= mpt__last_value(net); id++) {
        mpt__node *node = mpt__node_of(net, id);
        if (node->consumers) continue;
        if (mpt__loss_of(net) || node->kind == MPT__INPUT)
            return mpt_fail(net->ctx, MPT_ERROR_ORDER, "model_build: nothing reads '%s'", node->name);
        node->kept = 1;
    }
    return MPT_OK;
}

static mpt_result mpt__ranks_check(mpt_context *ctx, mpt_ranks *r) {
    r->ranks = mpt__or_int(r->ranks, 1);
    if (!r->bucket_bytes) r->bucket_bytes = (size_t)25 << 20;
    if (r->ranks < 1 || r->ranks > 1 << 20 || r->rank < 0 || r->rank >= r->ranks || (r->ranks > 1 && !r->sum))
        return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "model_build: rank %d of %d, or sum is NULL", r->rank, r->ranks);
    return MPT_OK;
}

static mpt_result mpt__build_check(mpt_model *net, const mpt_train_desc *train) {
    mpt_train_desc *t = &net->train;
    int i, losses = 0;
    if (net->built) return mpt_fail(net->ctx, MPT_ERROR_ORDER, "model_build: the model is built already");
    if (net->failed != MPT_OK) return mpt_fail(net->ctx, net->failed, "%s", net->why);
    memset(t, 0, sizeof *t);
    if (train) *t = *train;
    if (t->fold && !t->inference) return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "model_build: fold without inference");
    if (!mpt__not_negative(t->ema_decay) || t->ema_decay >= 1 || (t->ema_decay > 0 && t->inference))
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "model_build: ema_decay %g%s", t->ema_decay,
                        t->inference ? " with inference" : ", not in 0..1, 1 excluded");
    t->batch = mpt__or_int(t->batch, 32);
    t->accumulate = mpt__or_int(t->accumulate, 1);
    if (t->batch < 1 || t->accumulate < 1)
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "model_build: batch %d, accumulate %d", t->batch, t->accumulate);
    if (!mpt__is_clip_limit(mpt__or(t->clip_norm, 1)) || !mpt__is_clip_limit(mpt__or(t->clip_value, 1)))
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "model_build: clip_norm %g, clip_value %g", t->clip_norm,
                        t->clip_value);
    MPT__TRY(mpt__ranks_check(net->ctx, &t->ranks));
    MPT__TRY(
        mpt__need_size(net->ctx, "model_build", "batch x accumulate", (size_t)t->batch, (size_t)t->accumulate, 1, 1));
    net->half = MPT_F32;
    for (i = 0; i < net->count; i++) {
        if (t->inference) net->nodes[i].tuning.frozen = 1;
        MPT__TRY(mpt__policy_check(net, &net->nodes[i]));
        net->nodes[i].consumers = 0;
        net->nodes[i].kept = net->nodes[i].keep;
        losses += net->nodes[i].kind == MPT__LOSS;
    }
    if (losses > 1 || (losses && !mpt__loss_of(net)))
        return mpt_fail(net->ctx, MPT_ERROR_ORDER, "model_build: a model has one loss, as its last node; this has %d",
                        losses);
    if (mpt__last_value(net) < 2) return mpt_fail(net->ctx, MPT_ERROR_ORDER, "model_build: the model has no layer");
    for (i = 0; i < net->count; i++) {
        const mpt__node *node = &net->nodes[i];
        if (node->in[0]) mpt__node_of(net, node->in[0])->consumers++;
        if (node->in[1]) mpt__node_of(net, node->in[1])->consumers++;
    }
    return mpt__outputs_check(net);
}

/* Do only products read a node's value, directly or through a reshape? Then it can be stored in the type they read. */
static int mpt__only_products(const mpt_model *net, int id) {
    int i;
    for (i = id; i < net->count; i++) {
        const mpt__node *node = &net->nodes[i];
        if (node->in[0] != id && node->in[1] != id) continue;
        if (mpt__kind_of(node).product) continue;
        if (!mpt__kind_of(node).as_input || !mpt__only_products(net, i + 1)) return 0;
    }
    return 1;
}

/* A node's value has the compute type of its policy. The input stays fp32 until a product reads it, except in O3. What
   the loss reads has the output type, and so have the activations before it. */
static void mpt__node_type(mpt_model *net, int id) {
    mpt__node *node = mpt__node_of(net, id);
    const mpt__node *in = mpt__input_of(net, node);
    const mpt__kind kind = mpt__kind_of(node);
    node->type = node->grad_type = node->policy.compute;
    node->reason = "policy";
    if (kind.reason) node->reason = kind.reason;
    if (node->kind == MPT__INPUT && node->policy.output == MPT_F32 && !mpt__only_products(net, id)) {
        node->type = MPT_F32;
        node->reason = "not only products read it";
    }
    if (node->logits && in) {
        node->type = node->policy.output;
        node->reason = "a head";
        if (mpt__loss_of(net)) node->reason = "the loss reads it";
    } else if (kind.as_input || node->behind_logits) {
        node->type = in->type;
        node->grad_type = in->grad_type;
        node->reason = "as its input";
    }
}

/* Can this node and its input share one value and one gradient? */
static int mpt__one_value(const mpt__node *node, const mpt__node *in) {
    return in->consumers == 1 && node->type == in->type && node->grad_type == in->grad_type;
}

/* Fuses an activation into the layer before it, if that can compute it and no other node reads the layer's value.
   Layers can only compute the leaky ReLU whose slope is 0.01. */
static void mpt__fuse(mpt__node *node, mpt__node *in) {
    if (!mpt__one_value(node, in) || !mpt__kind_of(in).fuses || in->kept || node->kept) return;
    if (in->act || mpt__act_saves_input(node->act) || !mpt__is_zero(node->negative_slope)) return;
    node->fused = 1;
    in->act = in->slope = node->act;
}

/* The derivative of a ReLU before a max pool is applied to the pool's dy, which is smaller. */
static void mpt__delay_slope(mpt_model *net, mpt__node *node, mpt__node *in) {
    const mpt__kind kind = mpt__kind_of(node);
    if (!kind.delays_slope || !kind.delays_slope(node)) return;
    if (!in->fused || in->act != MPT_RELU || !mpt__one_value(node, in) || node->kept) return;
    node->slope = MPT_RELU;
    in->slope = mpt__node_of(net, in->in[0])->slope = MPT_IDENTITY;
}

/* A batch norm may overwrite a product's value that only it reads. (Without beta there is no place for the bias of its
   folding.) */
static int mpt__goes_in_place(const mpt_model *net, const mpt__node *node, const mpt__node *in) {
    if (!net->train.fold || !in || !mpt__is_batch_norm(node) || !mpt__kind_of(in).product) return 0;
    return mpt__one_value(node, in) && !in->kept && !node->no_affine;
}

/* Marks the node that computes output `id`, and the activations, reshapes and slices between it and the output. */
static void mpt__mark_logits(mpt_model *net, int id) {
    mpt__node *node = mpt__node_of(net, id);
    const int output = id;
    while (node->consumers <= (id != output || mpt__loss_of(net) != NULL) &&
           (node->kind == MPT__ACTIVATION || mpt__kind_of(node).as_input)) {
        node->behind_logits = 1;
        id = node->in[0];
        node = mpt__node_of(net, id);
    }
    node->logits = 1;
}

/* *count: elements of its weight. Returns 0 if they overflow size_t. */
static int mpt__weights_of(const mpt__node *node, size_t *count) {
    const mpt__kind kind = mpt__kind_of(node);
    *count = 0;
    if (kind.weights_in_all) *count = kind.weights_in_all(node);
    return !kind.fan_in || mpt__size_mul(count, kind.fan_in(node), (size_t)node->C);
}

/* Finds the linear layer whose outputs reshape `id` turns into an image. */
static void mpt__mark_shaped(mpt_model *net, int id) {
    const mpt__node *image = mpt__node_of(net, id);
    int at = image->in[0];
    if (image->kind != MPT__RESHAPE) return;
    while (at) {
        mpt__node *node = mpt__node_of(net, at);
        const mpt__kind kind = mpt__kind_of(node);
        size_t i = 0;
        if (node->H * node->W > 1 || mpt__node_count(node) != mpt__node_count(image)) return;
        if (kind.weight_dims == 2 && !node->shaped) node->shaped = id;
        if (!kind.follows) return;
        at = kind.follows(net, node, &i);
    }
}

/* Types of values and gradients, what needs a gradient, which activations their input node computes. */
static void mpt__build_types(mpt_model *net) {
    size_t weights;
    int id;
    for (id = 1; id <= net->count; id++) mpt__node_of(net, id)->logits = mpt__node_of(net, id)->behind_logits = 0;
    for (id = 1; id <= mpt__last_value(net); id++)
        if (mpt__is_output(net, id)) mpt__mark_logits(net, id);
    for (id = 1; id <= net->count; id++) {
        mpt__node *node = mpt__node_of(net, id), *in = mpt__input_of(net, node);
        node->fused = 0;
        if (node->kind != MPT__ACTIVATION) node->act = MPT_IDENTITY;
        mpt__node_type(net, id);
        node->trains = (!mpt__weights_of(node, &weights) || weights) && !node->tuning.frozen;
        node->needs_gradient = node->trains || node->kept;
        if (in) node->needs_gradient |= in->needs_gradient;
        if (node->in[1]) node->needs_gradient |= mpt__node_of(net, node->in[1])->needs_gradient;
        if (node->kind == MPT__ACTIVATION) mpt__fuse(node, in);
        node->slope = node->act;
        if (in) mpt__delay_slope(net, node, in);
        node->in_place = mpt__goes_in_place(net, node, in);
        node->folds = 0;
        node->shaped = 0;
    }
    for (id = 1; id <= net->count; id++) mpt__mark_shaped(net, id);
}

/* Adds weight and bias of a node, if it has them. */
static mpt_result mpt__node_params(mpt_model *net, mpt__node *node) {
    const mpt__kind kind = mpt__kind_of(node);
    const int norm = kind.weight_dims == 1;
    int group = norm ? MPT_GROUP_NORM : MPT_GROUP_WEIGHT;
    char name[64];
    size_t count;
    if (!mpt__weights_of(node, &count))
        return mpt_fail(net->ctx, MPT_ERROR_SHAPE, "%s: its weights overflow size_t", node->name);
    node->weight = node->bias = 0;
    if (!count) return MPT_OK;
    if (!node->trains) group |= MPT_GROUP_FROZEN;
    mpt__print(name, sizeof name, "%s.weight", node->name);
    node->weight = mpt_params_add(net->params, name, count, (unsigned)group);
    if (node->no_bias) return MPT_OK;
    if (!norm) group ^= MPT_GROUP_WEIGHT | MPT_GROUP_BIAS;
    mpt__print(name, sizeof name, "%s.bias", node->name);
    node->bias = mpt_params_add(net->params, name, (size_t)node->C, (unsigned)group);
    return MPT_OK;
}

/* Whether each rank keeps only a part of the optimizer */
static int mpt__shards(const mpt_model *net) {
    return net->train.shard_optimizer && net->train.ranks.ranks > 1 && !net->train.inference;
}

/* Whether the net reads the fp32 values of a node's tensors. Only products in 16 bits read the copies instead. */
static int mpt__reads_f32(const mpt__node *node) {
    return !mpt__kind_of(node).product || node->policy.compute == MPT_F32;
}

static void mpt__mark_wide(mpt_model *net, const mpt__node *node) {
    const int wide = mpt__reads_f32(node);
    if (node->weight) net->params->tensors[node->weight - 1].wide = wide;
    if (node->bias) net->params->tensors[node->bias - 1].wide = wide;
}

static mpt_result mpt__collect(void *user, int role);

static mpt_result mpt__build_params(mpt_model *net) {
    mpt_params_desc desc = MPT_ZERO;
    int id, frozen;
    desc.type = net->half;
    desc.master = net->policy.master;
    if (net->train.inference && net->policy.param == net->half) desc.master = MPT_MASTER_NONE;
    desc.seed = net->train.seed;
    net->params = mpt_params_new(net->ctx, &desc);
    if (!net->params) return net->ctx->failed;
    for (frozen = 0; frozen < 2; frozen++) /* these come last */
        for (id = 1; id <= net->count; id++)
            if (mpt__node_of(net, id)->trains == !frozen) MPT__TRY(mpt__node_params(net, mpt__node_of(net, id)));
    if (!mpt__shards(net)) return mpt_params_build(net->params);
    for (id = 1; id <= net->count; id++) mpt__mark_wide(net, mpt__node_of(net, id));
    net->params->collect = mpt__collect;
    net->params->collect_user = net;
    return mpt__params_build(net->params, &net->train.ranks);
}

/* The statistics of a step start from those of the last applied step. */
static mpt_result mpt__reset_statistics(mpt_model *net) {
    if (!net->statistics) return MPT_OK;
    return net->ctx->backend.copy(net->ctx, net->pending, net->running, net->statistics * sizeof *net->running);
}

static mpt_result mpt__build_init(mpt_model *net) {
    int id;
    for (id = 1; id <= net->count; id++) {
        const mpt__node *node = mpt__node_of(net, id);
        const mpt__kind kind = mpt__kind_of(node);
        if (kind.init) MPT__TRY(kind.init(net, node));
    }
    return mpt__reset_statistics(net);
}

/* Adds a buffer of `count` elements that is in use from `first` to `last`. Returns its number. */
static int mpt__plan_add(mpt_model *net, size_t count, size_t size, int first, int last) {
    mpt__buffer *b = &net->buffers[net->buffer_count++];
    b->bytes = (count * size + MPT__ALIGN - 1) / MPT__ALIGN * MPT__ALIGN;
    b->first = first;
    b->last = last;
    return net->buffer_count;
}

static void mpt__plan_extend(mpt_model *net, int buffer, int moment) {
    mpt__buffer *b = buffer ? &net->buffers[buffer - 1] : NULL;
    if (b && moment > b->last) b->last = moment;
    if (b && moment < b->first) b->first = moment;
}

/* Places buffers in one block, each at the lowest offset where it overlaps none that is in use at the same time. */
static void mpt__plan_offsets(mpt_model *net) {
    int i, j, moved;
    net->block_bytes = 0;
    for (i = 0; i < net->buffer_count; i++) {
        mpt__buffer *b = &net->buffers[i];
        b->offset = 0;
        do {
            moved = 0;
            for (j = 0; j < i; j++) {
                const mpt__buffer *o = &net->buffers[j];
                if (b->first > o->last || o->first > b->last) continue;
                if (b->offset >= o->offset + o->bytes || o->offset >= b->offset + b->bytes) continue;
                b->offset = o->offset + o->bytes;
                moved = 1;
            }
        } while (moved);
        if (b->offset + b->bytes > net->block_bytes) net->block_bytes = b->offset + b->bytes;
    }
}

/* The side of a sum whose input can have its gradient in the sum's own buffer, so that it need not be copied; or -1. No
   later node may read that input, because it would add to the gradient too early. */
static int mpt__shared_side(const mpt_model *net, int id) {
    const mpt__node *node = &net->nodes[id - 1];
    int side, reader;
    if (!mpt__kind_of(node).shares_dy || node->in[0] == node->in[1]) return -1;
    for (side = 0; side < 2; side++) {
        const mpt__node *in = &net->nodes[node->in[side] - 1];
        int last = id;
        for (reader = id + 1; reader <= net->count; reader++)
            if (net->nodes[reader - 1].in[0] == node->in[side] || net->nodes[reader - 1].in[1] == node->in[side])
                last = reader;
        if (in->kept || node->kept) continue;
        if (last == id && in->needs_gradient && in->grad_type == node->grad_type) return side;
    }
    return -1;
}

/* Adds the buffers of node `id`, which runs forward at moment `first` and backward at `last`. */
static void mpt__plan_node(mpt_model *net, int id, int first, int last) {
    mpt__node *node = mpt__node_of(net, id);
    const mpt__node *in = mpt__input_of(net, node);
    const mpt__kind kind = mpt__kind_of(node);
    const size_t batch = (size_t)net->train.batch, count = batch * mpt__node_count(node);
    const int shares = node->fused || node->in_place || (in && !kind.forward), side = mpt__shared_side(net, id);
    node->index = node->cast = node->stats = node->grad = 0;
    if (shares) node->value = in->value;
    else node->value = mpt__plan_add(net, count, mpt_dtype_size(node->type), first, first);
    if (kind.keep) kind.keep(net, node, first, last);
    if (kind.product && in->type != node->policy.compute)
        node->cast = mpt__plan_add(net, batch * node->inputs, mpt_dtype_size(node->policy.compute), first, last);
    if (!node->needs_gradient) return;
    if (shares && in->consumers == 1 && !in->kept && !node->kept) node->grad = in->grad;
    else if (side >= 0) node->grad = mpt__node_of(net, node->in[side])->grad;
    else node->grad = mpt__plan_add(net, count, mpt_dtype_size(node->grad_type), last, last);
}

/* Batch norm cannot train on one value per channel. */
static mpt_result mpt__check_norms(mpt_model *net, size_t rows) {
    int i;
    for (i = 0; i < net->count; i++) {
        const mpt__node *node = &net->nodes[i];
        if (mpt__is_batch_norm(node) && mpt__norm_shape_of(node, rows).pixels < 2)
            return mpt_fail(net->ctx, MPT_ERROR_SHAPE, "%s: a batch of %zu with one value per channel cannot train it",
                            node->name, rows);
    }
    return MPT_OK;
}

/* Extends the lives of the buffers that `node` reads and writes; it runs forward at `first` and backward at `last`. */
static void mpt__plan_lives(mpt_model *net, const mpt__node *node, int first, int last) {
    const mpt__kind kind = mpt__kind_of(node);
    const int before = net->count - 1, after = 2 * net->count; /* before and after the backward pass */
    int side;
    if (node->kept) {
        mpt__plan_extend(net, node->value, after);
        if (node->needs_gradient) mpt__plan_extend(net, node->grad, after);
        if (!node->consumers && node->needs_gradient) mpt__plan_extend(net, node->grad, before);
    }
    if (node->slope && !mpt__act_saves_input(node->slope) && node->needs_gradient)
        mpt__plan_extend(net, node->value, last);
    if (kind.reads_y && node->needs_gradient) mpt__plan_extend(net, node->value, last);
    for (side = 0; side < 2 && node->in[side]; side++) {
        const mpt__node *in = mpt__node_of(net, node->in[side]);
        mpt__plan_extend(net, in->value, first);
        if (node->needs_gradient && kind.reads_x && kind.reads_x(node)) mpt__plan_extend(net, in->value, last);
        if (in->needs_gradient) mpt__plan_extend(net, in->grad, node->kind == MPT__LOSS ? first : last);
    }
}

/* Moments of a step: node i (from 0) runs forward at i and backward at 2 count - 1 - i. A value lives until its last
   reader in either pass, a gradient from its first writer to its node's backward pass. Flatten and fused activations
   share the buffers of their input, and a sum may share its gradient with an input. */
static mpt_result mpt__build_plan(mpt_model *net) {
    const int n = net->count, end = 2 * n - 1;
    int i;
    net->buffers = (mpt__buffer *)mpt__host_alloc(net->ctx, (size_t)n * MPT__BUFFERS * sizeof *net->buffers);
    if (!net->buffers) return MPT_ERROR_NO_MEMORY;
    for (i = 0; i < mpt__last_value(net); i++) {
        MPT__TRY(mpt__need_size(net->ctx, "model_build", net->nodes[i].name, mpt__node_count(&net->nodes[i]),
                                (size_t)net->train.batch, (size_t)n * 4, 1));
        mpt__plan_node(net, i + 1, i, end - i);
    }
    for (i = 0; i < n; i++) mpt__plan_lives(net, &net->nodes[i], i, end - i);
    mpt__plan_offsets(net);
    return MPT_OK;
}

/* Device memory of `bytes`; NULL for 0 bytes. Sets *failed if there was none. */
static void *mpt__build_alloc(mpt_model *net, size_t bytes, int *failed) {
    void *p = mpt_alloc(net->ctx, bytes);
    *failed |= bytes && !p;
    return p;
}

static int mpt__input_is_f32(const mpt_model *net) {
    const mpt__node *node = &net->nodes[0];
    return node->type == MPT_F32 && !node->input.bytes && !node->input.in_device;
}

static size_t mpt__input_bytes(const mpt_model *net) { /* of a sample */
    return mpt__node_count(&net->nodes[0]) * (net->nodes[0].input.bytes ? 1 : sizeof(float));
}

/* Elements of a sample that staging must hold on the way in or out; 0 if it is not needed. */
static size_t mpt__staging_width(const mpt_model *net) {
    const size_t in = (mpt__input_bytes(net) + sizeof(float) - 1) / sizeof(float);
    const int brought = !mpt__input_is_f32(net);
    size_t widest = in;
    int id, needed = brought;
    for (id = 2; id <= mpt__last_value(net); id++) {
        const mpt__node *node = mpt__node_of(net, id);
        if (!mpt__is_output(net, id) && !node->kept) continue;
        widest = mpt__max(widest, mpt__node_count(node));
        needed |= node->type != MPT_F32 || node->grad_type != MPT_F32;
    }
    if (needed) return widest;
    return 0;
}

static size_t mpt__channels_bytes(const mpt_model *net) {
    if (net->nodes[0].input.bytes) return 2 * (size_t)net->nodes[0].C * sizeof(float);
    return 0;
}

static mpt_result mpt__gather_gradients(void *user);

/* Before pass i (from 0) there are as many sums as i has ones in binary. */
static size_t mpt__sums_apart_bytes(mpt_model *net) {
    int passes;
    net->sums_apart_count = 0;
    for (passes = net->train.accumulate; passes > 1; passes /= 2) net->sums_apart_count++;
    return (size_t)net->sums_apart_count * net->params->trained * sizeof(float);
}

static size_t mpt__sample_weights_bytes(const mpt_model *net) {
    const mpt__node *loss = mpt__loss_of(net);
    if (loss && loss->loss_desc.weighted) return (size_t)net->train.batch * sizeof(float);
    return 0;
}

/* Averages as products read them; fp32 ones are read as they are. */
static size_t mpt__averages_bytes(const mpt_model *net) {
    if (net->params->copy.data) return net->params->trained * mpt_dtype_size(net->params->copy.type);
    return 0;
}

static void mpt__build_averages(mpt_model *net, int *failed) {
    mpt_update_op *op = &net->opt->op;
    if (!(net->train.ema_decay > 0)) return;
    op->average_decay = net->train.ema_decay;
    op->average = (float *)mpt__build_alloc(net, mpt__own_room(net->params) * sizeof(float), failed);
    net->averages = mpt_typed_array(mpt__build_alloc(net, mpt__averages_bytes(net), failed), net->params->copy.type);
}

static mpt_result mpt__build_memory(mpt_model *net) {
    const mpt__node *loss = mpt__loss_of(net);
    const size_t batch = (size_t)net->train.batch;
    const float *weights = NULL; /* (outputs) */
    size_t outputs = 0, positions = 1;
    int i, failed = 0;
    if (loss) {
        outputs = mpt__loss_outputs(loss);
        positions = mpt__loss_positions(loss);
        weights = mpt__loss_weights(loss);
    }
    net->statistics = 0; /* of all batch norms: mean(C) and variance(C) of one after the other */
    for (i = 0; i < net->count; i++) {
        mpt__node *node = &net->nodes[i];
        if (!mpt__is_batch_norm(node)) continue;
        node->running = net->statistics;
        net->statistics += 2 * (size_t)node->C;
    }
    net->staging_bytes = batch * mpt__staging_width(net) * sizeof(float);
    net->target_bytes = batch * mpt__target_width(net) * sizeof(float);
    net->block = (char *)mpt__build_alloc(net, net->block_bytes, &failed);
    net->target = mpt__build_alloc(net, net->target_bytes, &failed);
    net->sums = (mpt_loss_sum *)mpt__build_alloc(net, MPT__SUMS * sizeof *net->sums, &failed);
    net->staging = (float *)mpt__build_alloc(net, net->staging_bytes, &failed);
    net->loss_weights = (float *)mpt__build_alloc(net, weights ? outputs * sizeof *weights : 0, &failed);
    net->sample_weights = (float *)mpt__build_alloc(net, mpt__sample_weights_bytes(net), &failed);
    net->channels = (float *)mpt__build_alloc(net, mpt__channels_bytes(net), &failed);
    net->running = (float *)mpt__build_alloc(net, net->statistics * sizeof(float), &failed);
    net->pending = (float *)mpt__build_alloc(net, net->statistics * sizeof(float), &failed);
    net->sums_apart = (float *)mpt__build_alloc(net, mpt__sums_apart_bytes(net), &failed);
    mpt__build_averages(net, &failed);
    if (failed) return MPT_ERROR_NO_MEMORY;
    if (weights) MPT__TRY(mpt_upload(net->ctx, net->loss_weights, weights, outputs * sizeof *weights));
    net->weights_sum = 0;
    if (weights) net->weights_sum = mpt__weights_hash(weights, outputs);
    if (loss) net->opt->op.loss = &net->sums[0];
    net->opt->op.unit = mpt__passes(net) * (double)(batch * positions);
    net->opt->gather = mpt__gather_gradients;
    net->opt->gather_user = net;
    net->apart = net->params->trained;
    return mpt_optimizer_commit(net->opt, net->statistics, net->pending, net->running);
}

static mpt_result mpt__node_tuning(mpt_model *net, const mpt__node *node) {
    const double lr = mpt__or(node->tuning.lr_factor, 1), factor = node->tuning.weight_decay_factor;
    double decay = net->opt->op.desc.weight_decay * mpt__or(factor, 1);
    if (factor < 0) decay = 0;
    if (!node->trains || (lr >= 1 && lr <= 1 && !(factor < 0 || factor > 0))) return MPT_OK;
    MPT__TRY(mpt_optimizer_tensor(net->opt, node->weight, lr, decay));
    if (node->bias) return mpt_optimizer_tensor(net->opt, node->bias, lr, decay);
    return MPT_OK;
}

static mpt_result mpt__build_training(mpt_model *net) {
    mpt_scaler_desc scaler = net->train.scaler;
    int id;
    if (scaler.mode == MPT_SCALER_DEFAULT && (net->half != MPT_F16 || net->policy.master == MPT_MASTER_NONE))
        scaler.mode = MPT_SCALER_OFF;
    net->scaler = mpt_scaler_new(net->ctx, &scaler);
    if (!net->scaler) return net->ctx->failed;
    net->opt = mpt_optimizer_new(net->params, net->scaler, &net->train.optimizer);
    if (!net->opt) return net->ctx->failed;
    for (id = 1; id <= net->count; id++) MPT__TRY(mpt__node_tuning(net, mpt__node_of(net, id)));
    return MPT_OK;
}

static mpt_result mpt__ranks_compare(mpt_model *net, mpt_result built);

static mpt_result mpt__build_slots(mpt_model *net) {
    const size_t slot = MPT__SLOT * sizeof(float), bytes = (size_t)net->train.ranks.ranks * slot;
    if (net->train.ranks.ranks < 2) return MPT_OK;
    net->slots = (float *)mpt_alloc(net->ctx, bytes + slot);
    net->slots_host = (float *)mpt__host_alloc(net->ctx, bytes);
    if (net->slots && net->slots_host) return MPT_OK;
    return MPT_ERROR_NO_MEMORY;
}

static mpt_result mpt__model_try_build(mpt_model *net, const mpt_train_desc *train) {
    MPT__TRY(mpt__build_check(net, train));
    MPT__TRY(mpt__build_slots(net));
    if (mpt__shards(net) && (!net->train.ranks.reduce_scatter || !net->train.ranks.all_gather))
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT,
                        "model_build: shard_optimizer without ranks.reduce_scatter or ranks.all_gather");
    mpt__build_types(net);
    MPT__TRY(mpt__build_params(net));
    MPT__TRY(mpt__build_training(net));
    MPT__TRY(mpt__build_plan(net));
    MPT__TRY(mpt__check_norms(net, (size_t)net->train.batch));
    MPT__TRY(mpt__build_memory(net));
    return mpt__build_init(net);
}

MPT__COLD MPT_DEF mpt_result mpt_model_build(mpt_model *net, const mpt_train_desc *train) {
    mpt_result r;
    if (!net) return MPT_ERROR_ARGUMENT;
    mpt__forget(net->ctx);
    r = mpt__model_try_build(net, train);
    if (!net->built && net->slots_host) r = mpt__ranks_compare(net, r);
    if (r == MPT_OK) net->built = 1;
    else if (!net->built) mpt__model_clear(net);
    return r;
}

/* -- Running nodes -- */

static mpt_array mpt__buffer_array(const mpt_model *net, int buffer, mpt_dtype type) {
    return mpt_typed_array(buffer ? net->block + net->buffers[buffer - 1].offset : NULL, type);
}

static mpt_array mpt__value(const mpt_model *net, int id) {
    return mpt__buffer_array(net, mpt__node_of(net, id)->value, mpt__node_of(net, id)->type);
}

static mpt_array mpt__grad(const mpt_model *net, int id) {
    return mpt__buffer_array(net, mpt__node_of(net, id)->grad, mpt__node_of(net, id)->grad_type);
}

/* Averages of all trained weights. If they are sharded, they have been collected. */
static float *mpt__averages(const mpt_model *net) {
    if (net->params->shard) return net->params->grad;
    return net->opt->op.average;
}

/* A tensor as its node reads it. Products read weights and biases in their compute type, as torch.autocast casts both;
   norms read gamma and beta in fp32 if there are masters. */
static mpt_array mpt__tensor_array(const mpt_model *net, const mpt__node *node, int tensor) {
    const mpt_array none = MPT_ZERO;
    const int averaged = net->averaged && tensor <= net->opt->op.tensors;
    float *master;
    if (!tensor) return none;
    master = mpt__params_f32(net->params, tensor);
    if (!mpt__reads_f32(node)) master = NULL;
    if (averaged && master) return mpt_f32_array(mpt__averages(net) + mpt__params_offset(net->params, tensor));
    if (averaged) return mpt__array_at(net->averages, mpt__params_offset(net->params, tensor));
    if (master) return mpt_f32_array(master);
    return mpt_params_weight(net->params, tensor);
}

/* Where this pass adds the gradient of a tensor: in the last of the sums. data NULL: the tensor is frozen. */
static mpt_array mpt__tensor_grad(const mpt_model *net, int tensor) {
    float *grad = tensor ? mpt_params_grad(net->params, tensor) : NULL;
    if (!grad || net->sums_count < 2) return mpt_f32_array(grad);
    grad = net->sums_apart + (size_t)(net->sums_count - 2) * net->params->trained;
    return mpt_f32_array(grad + mpt__params_offset(net->params, tensor));
}

static void mpt__enter(mpt_model *net, int node, mpt_pass pass, int output) {
    mpt_place *p = &net->ctx->place;
    p->node = node;
    p->pass = pass;
    p->output = output;
}

/* Number of this pass among the passes of all ranks in this step. */
static uint64_t mpt__pass_number(const mpt_model *net) {
    return (uint64_t)net->train.ranks.rank * (uint64_t)net->train.accumulate + (uint64_t)net->micro;
}

/* What node `id` reads and writes in a pass over N samples, except for the gradients of its inputs. */
static mpt__visit mpt__visit_of(const mpt_model *net, int id, size_t N, int train) {
    const mpt__node *node = mpt__node_of(net, id), *last = node; /* last: a norm that is folded into node, or node */
    mpt__visit v = MPT_ZERO;
    if (node->folds) last = mpt__node_of(net, node->folds);
    v.ctx = net->ctx;
    v.node = node;
    v.N = N;
    v.train = train;
    v.x[0] = node->cast ? mpt__buffer_array(net, node->cast, node->policy.compute) : mpt__value(net, node->in[0]);
    if (node->in[1]) v.x[1] = mpt__value(net, node->in[1]);
    v.y = mpt__value(net, id);
    v.weight = mpt__tensor_array(net, node, node->weight);
    v.bias = mpt__tensor_array(net, node, last->bias);
    v.act = last->act;
    v.index = (uint16_t *)mpt__buffer_array(net, node->index, MPT_F32).data;
    v.stats = (float *)mpt__buffer_array(net, node->stats, MPT_F32).data;
    if (mpt__is_batch_norm(node)) {
        v.running = net->running + node->running;
        v.pending = net->pending + node->running;
    }
    v.mask.p = node->p; /* the mask depends on step, micro-batch and node */
    v.mask.seed = net->train.seed;
    v.mask.tensor = mpt__pass_number(net) << 32 | (uint64_t)id;
    v.mask.step = &net->opt->op.state->applied;
    v.dy = mpt__grad(net, id);
    v.dweight = mpt__tensor_grad(net, node->weight);
    v.dbias = mpt__tensor_grad(net, node->bias);
    if (net->sums_count) v.beta = net->sums_of[net->sums_count - 1] ? 1.0f : 0.0f;
    return v;
}

/* For all nodes except the input and the loss, which need the batch. */
static mpt_result mpt__node_forward(mpt_model *net, int id, size_t N, int train) {
    const mpt__node *node = mpt__node_of(net, id);
    const mpt__kind kind = mpt__kind_of(node);
    const mpt__visit v = mpt__visit_of(net, id, N, train);
    if (mpt__is_folded(net, node)) return MPT_OK;
    mpt__enter(net, id, MPT_FORWARD, id);
    if (node->cast) MPT__TRY(mpt_cast(net->ctx, N * node->inputs, mpt__value(net, node->in[0]), v.x[0], NULL));
    if (kind.forward) return kind.forward(&v);
    return MPT_OK;
}

/* Where a node writes the gradient of an input. The first node to do so in this pass writes it, later ones add to it;
   if it is shared with dy, there is nothing to do. */
static void mpt__visit_input(mpt_model *net, mpt__visit *v, int side) {
    const int to = v->node->in[side];
    mpt__node *in = to ? mpt__node_of(net, to) : NULL;
    if (!in || !in->needs_gradient) return;
    v->dx[side] = mpt__grad(net, to);
    v->beta_x[side] = (float)in->grad_started;
    in->grad_started = 1;
    if (v->dx[side].data == v->dy.data) v->dx[side].data = NULL;
}

/* Multiplies dy, in place, by the slope of the activation that is fused into the node. */
static mpt_result mpt__slope_backward(const mpt__visit *v) {
    mpt_map_op op = mpt__map_op(v, MPT_MAP_ACTIVATION_GRADIENT, v->y, v->dy);
    op.b = v->dy;
    op.act = v->node->slope;
    return mpt_op_map(v->ctx, &op);
}

static mpt_result mpt__node_backward(mpt_model *net, int id, size_t N) {
    const mpt__node *node = mpt__node_of(net, id);
    const mpt__kind kind = mpt__kind_of(node);
    mpt__visit v = mpt__visit_of(net, id, N, 1);
    int side;
    if (node->fused) return MPT_OK;
    mpt__enter(net, id, MPT_BACKWARD_DATA, id);
    if (!node->needs_gradient) return kind.statistics ? kind.statistics(&v) : MPT_OK;
    if (node->slope && !(kind.takes_slope && kind.takes_slope(node))) MPT__TRY(mpt__slope_backward(&v));
    for (side = 0; side < 2; side++) mpt__visit_input(net, &v, side);
    mpt__enter(net, id, MPT_BACKWARD_WEIGHT, kind.data ? id : node->in[0]);
    if (kind.weights && (node->trains || !kind.data)) MPT__TRY(kind.weights(&v));
    for (side = 0; side < 2; side++) {
        if (!kind.data || !v.dx[side].data) continue;
        mpt__enter(net, id, MPT_BACKWARD_DATA, node->in[side]);
        MPT__TRY(kind.data(&v, side));
    }
    return MPT_OK;
}

/* -- Passes -- */

static mpt_result mpt__need_built(const mpt_model *net, const char *call) {
    if (!net) return MPT_ERROR_ARGUMENT;
    mpt__forget(net->ctx);
    if (net->built) return MPT_OK;
    return mpt_fail(net->ctx, MPT_ERROR_ORDER, "%s: the model is not built", call);
}

/* The samples of x from number `samples` on; x may have any type */
static const void *mpt__samples_at(const mpt_model *net, const void *x, size_t samples) {
    return (const char *)x + samples * mpt__input_bytes(net);
}

static mpt_result mpt__bad_input(mpt_model *net, const char *call, const float *x, size_t i) {
    const size_t features = mpt__node_count(&net->nodes[0]);
    return mpt_fail(net->ctx, MPT_ERROR_VALUE, "%s: '%s': sample %zu, element %zu is %g", call, net->nodes[0].name,
                    i / features, i % features, (double)x[i]);
}

/* Checks, before anything changes, that inputs are finite and labels in range. target NULL: there is none. The first
   batch of inputs is left to mpt__feed, unless that copies it straight into a value that a backward pass may still
   read. */
static mpt_result mpt__check_batch(mpt_model *net, const char *call, const void *x, const void *target,
                                   size_t samples) {
    const mpt__node *input = &net->nodes[0], *loss = mpt__loss_of(net);
    const size_t features = mpt__node_count(input), left = mpt__input_is_f32(net) ? 0 : (size_t)net->train.batch;
    size_t i;
    if (!x) return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "%s: x is NULL", call);
    MPT__TRY(mpt__need_size(net->ctx, call, "x", samples, features, 1, 1));
    if (!input->input.bytes && !input->input.in_device && samples > left) {
        i = left * features;
        i += mpt__first_bad((const float *)x + i, samples * features - i);
        if (i < samples * features) return mpt__bad_input(net, call, (const float *)x, i);
    }
    if (!target) return MPT_OK;
    if (net->weights) MPT__TRY(mpt__weights_check(net->ctx, call, loss, net->weights, samples));
    if (mpt__has_labels(loss)) return mpt__labels_check(net->ctx, call, loss, (const int32_t *)target, samples);
    return mpt__targets_check(net->ctx, call, loss, (const float *)target, samples);
}

/* Brings the inputs of a pass to the device, *at, for mpt__run_forward. If they are not finite nothing has changed;
   call NULL: they were checked before. */
static mpt_result mpt__feed(mpt_model *net, const char *call, const void *x, size_t rows, const void **at) {
    const mpt_input_desc *in = &net->nodes[0].input;
    mpt_feed_op op = MPT_ZERO;
    mpt__enter(net, 1, MPT_FORWARD, 1);
    *at = mpt__value(net, 1).data;
    op.x = x;
    op.bytes = rows * mpt__input_bytes(net);
    if (mpt__input_is_f32(net)) return mpt_upload(net->ctx, mpt__value(net, 1).data, x, op.bytes);
    op.in_device = in->in_device;
    if (call && !in->bytes && !in->in_device) op.floats = op.bytes / sizeof(float);
    op.staging = net->staging;
    MPT__TRY(net->ctx->backend.feed(net->ctx, &op));
    *at = op.at;
    if (op.first < op.floats) return mpt__bad_input(net, call, (const float *)x, op.first);
    return MPT_OK;
}

/* Computes the value of the input from what was fed. */
static mpt_result mpt__input_forward(mpt_model *net, const void *fed, size_t rows) {
    const mpt__node *node = &net->nodes[0];
    const mpt_array value = mpt__value(net, 1);
    mpt_map_op op = MPT_ZERO; /* MPT_MAP_CAST */
    if (fed == value.data) return MPT_OK;
    op.n = rows * mpt__node_count(node);
    op.a = mpt_typed_array(fed, MPT_F32);
    op.out = value;
    if (node->input.bytes) {
        op.map = MPT_MAP_BYTES;
        op.C = (size_t)node->C;
        op.channels = net->channels;
    }
    return mpt_op_map(net->ctx, &op);
}

/* Adds the loss of `rows` samples to a sum. train: with its gradient. */
static mpt_result mpt__run_loss(mpt_model *net, const void *target, size_t rows, int train) {
    const mpt__node *loss = mpt__loss_of(net);
    mpt_loss_op op = MPT_ZERO;
    if (net->weights) {
        MPT__TRY(mpt_upload(net->ctx, net->sample_weights, net->weights, rows * sizeof *net->weights));
        op.sample_weights = net->sample_weights;
        net->weights += rows;
    }
    MPT__TRY(mpt_upload(net->ctx, net->target, target, rows * mpt__target_width(net) * sizeof(float)));
    op.kind = loss->loss;
    op.N = rows;
    op.positions = mpt__loss_positions(loss);
    op.C = mpt__loss_outputs(loss);
    op.x = mpt__value(net, loss->in[0]);
    op.target = net->target;
    op.desc = loss->loss_desc;
    if (op.desc.class_weights) op.desc.class_weights = net->loss_weights;
    if (op.desc.pos_weight) op.desc.pos_weight = net->loss_weights;
    if (train) op.dx = mpt__grad(net, loss->in[0]);
    op.grad_scale = (float)(1 / mpt__passes(net));
    op.loss_scale = &net->scaler->state->scale;
    op.sum = &net->sums[train ? 0 : 1];
    if (train) op.unit = (double)((size_t)net->train.batch * op.positions);
    return mpt_op_loss(net->ctx, &op);
}

/* Forward over rows <= batch samples that were checked and fed. target NULL: no loss. train: as training does, and
   with the gradient of the loss. */
static mpt_result mpt__run_forward(mpt_model *net, const void *fed, const void *target, size_t rows, int train) {
    mpt_result r = MPT_OK;
    int id;
    mpt__enter(net, 1, MPT_FORWARD, 1);
    MPT__TRY(mpt__input_forward(net, fed, rows));
    for (id = 2; id <= mpt__last_value(net); id++) MPT__TRY(mpt__node_forward(net, id, rows, train));
    net->rows = rows;
    mpt__enter(net, net->count, MPT_BACKWARD_DATA, mpt__output_of(net));
    if (target) r = mpt__run_loss(net, target, rows, train);
    mpt__enter(net, 0, MPT_FORWARD, 0);
    return r;
}

/* mpt_step ends a step in any stage, but only the optimizer knows of it. */
static mpt__stage mpt__stage_of(const mpt_model *net) {
    if (net->opt->steps == net->stage_step) return net->stage;
    return MPT__BETWEEN;
}

static void mpt__stage_set(mpt_model *net, mpt__stage stage) {
    net->stage = stage;
    net->stage_step = net->opt->steps;
}

/* Have backward passes been made since the last step, so that the next one would add to their gradients? */
static int mpt__has_gradients(const mpt_model *net) { return mpt__stage_of(net) >= MPT__GATHERED; }

/* Discards all passes since the last step. */
static mpt_result mpt__forget_passes(mpt_model *net) {
    if (mpt__has_gradients(net)) MPT__TRY(mpt__reset_statistics(net));
    mpt__stage_set(net, MPT__BETWEEN);
    net->micro = 0;
    net->forward_rows = 0;
    return MPT_OK;
}

/* Of the sums of losses, [0] includes the new pass and [2] only the passes before it. */
static mpt_result mpt__start_forward(mpt_model *net) {
    mpt_backend *backend = &net->ctx->backend;
    mpt_loss_sum *sum = &net->sums[0], *before = &net->sums[2];
    const mpt__stage stage = mpt__stage_of(net);
    int id;
    net->forward_rows = 0;
    net->averaged = 0;
    for (id = 1; id <= net->count; id++) mpt__node_of(net, id)->given = 0;
    if (!mpt__has_gradients(net)) {
        net->micro = 0;
        mpt__stage_set(net, MPT__BEGUN);
        if (mpt__loss_of(net)) net->opt->op.loss = sum;
        return backend->zero(net->ctx, sum, sizeof *sum);
    }
    if (mpt__loss_of(net)) net->opt->op.loss = before; /* until a backward pass follows */
    if (stage == MPT__GATHERED) MPT__TRY(backend->copy(net->ctx, before, sum, sizeof *sum));
    else MPT__TRY(backend->copy(net->ctx, sum, before, sizeof *sum));
    mpt__stage_set(net, MPT__RESUMED);
    return MPT_OK;
}

static mpt_result mpt__train_forward(mpt_model *net, const void *fed, const void *target, size_t rows) {
    MPT__TRY(mpt__start_forward(net));
    MPT__TRY(mpt__run_forward(net, fed, target, rows, 1));
    net->forward_rows = rows;
    return MPT_OK;
}

MPT_DEF mpt_result mpt_sample_weights(mpt_model *net, const float *weights) {
    const mpt__node *loss;
    MPT__TRY(mpt__need_built(net, "sample_weights"));
    loss = mpt__loss_of(net);
    if (!loss || !loss->loss_desc.weighted)
        return mpt_fail(net->ctx, MPT_ERROR_ORDER, "sample_weights: the loss was not made with desc.weighted");
    net->given = weights;
    return MPT_OK;
}

/* The weights that were given are for this call only. */
static void mpt__take_weights(mpt_model *net) {
    net->weights = net->given;
    net->given = NULL;
}

/* Is there anything to train? */
static mpt_result mpt__need_training(const mpt_model *net, const char *call) {
    if (net->train.inference) return mpt_fail(net->ctx, MPT_ERROR_ORDER, "%s: the model was built for inference", call);
    return MPT_OK;
}

MPT_DEF mpt_result mpt_forward(mpt_model *net, const void *x, const void *target, size_t samples) {
    const void *fed;
    MPT__TRY(mpt__need_built(net, "forward"));
    mpt__take_weights(net);
    MPT__TRY(mpt__need_training(net, "forward"));
    if (samples < 1 || samples > (size_t)net->train.batch)
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "forward: samples is %zu, not in 1..%d (the batch)", samples,
                        net->train.batch);
    if (!target != !mpt__loss_of(net))
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "forward: target is %s",
                        target ? "given, but the model has no loss" : "NULL");
    MPT__TRY(mpt__check_batch(net, "forward", x, target, samples));
    MPT__TRY(mpt__check_norms(net, samples));
    MPT__TRY(mpt__feed(net, "forward", x, samples, &fed));
    return mpt__train_forward(net, fed, target, samples);
}

/* Does a forward pass of this step wait for its backward pass? */
static int mpt__waits(const mpt_model *net) { return net->forward_rows && mpt__stage_of(net) != MPT__BETWEEN; }

/* Each pass starts a sum, or adds to the last one if there are more passes than `accumulate`. */
static void mpt__sums_begin(mpt_model *net) {
    if (!net->micro) net->sums_count = 0;
    if (net->sums_count > net->sums_apart_count) return;
    net->sums_of[net->sums_count++] = 0;
}

/* Adds elements first .. first+n of sum `last` to the one before it. */
static mpt_result mpt__sums_add(mpt_model *net, int last, size_t first, size_t n) {
    const size_t all = net->params->trained;
    float *sum = net->sums_apart + (size_t)(last - 1) * all + first;
    mpt_map_op op = MPT_ZERO;
    op.map = MPT_MAP_ADD;
    op.n = n;
    op.b = mpt_f32_array(sum);
    op.a = op.out = mpt_f32_array(last > 1 ? sum - all : mpt_params_grad(net->params, 0) + first);
    op.beta = 1;
    return mpt_op_map(net->ctx, &op);
}

/* Adds the last sum to the one before it, except for what has been added already. */
static mpt_result mpt__sums_join(mpt_model *net) {
    const int last = --net->sums_count;
    net->sums_of[last - 1] += net->sums_of[last];
    return mpt__sums_add(net, last, 0, net->apart);
}

/* Joins sums of equally many passes; when the step has all its passes, joins all sums. */
static mpt_result mpt__sums_end(mpt_model *net) {
    int last;
    net->sums_of[net->sums_count - 1]++;
    for (last = net->sums_count - 1; last > 0; last = net->sums_count - 1) {
        if (net->micro < net->train.accumulate && net->sums_of[last] < net->sums_of[last - 1]) break;
        MPT__TRY(mpt__sums_join(net));
    }
    return MPT_OK;
}

/* Without a loss node all heads need a gradient. */
static mpt_result mpt__need_given(const mpt_model *net) {
    int id;
    if (mpt__loss_of(net)) return MPT_OK;
    for (id = 1; id <= net->count; id++)
        if (mpt__is_output(net, id) && !mpt__node_of(net, id)->given)
            return mpt_fail(net->ctx, MPT_ERROR_ORDER, "backward: mpt_output_grad has not been called for '%s'",
                            mpt__node_of(net, id)->name);
    return MPT_OK;
}

MPT_DEF mpt_result mpt_output_grad(mpt_model *net, int id, const float *grad) {
    mpt_loss_op op = MPT_ZERO;
    mpt__node *node;
    size_t i;
    MPT__TRY(mpt__need_built(net, "output_grad"));
    if (!mpt__waits(net)) return mpt_fail(net->ctx, MPT_ERROR_ORDER, "output_grad: no forward pass waits for it");
    if (id < 1 || id > net->count || mpt__loss_of(net) || !mpt__is_output(net, id) || !grad)
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "output_grad: node %d is no head, or grad is NULL", id);
    node = mpt__node_of(net, id);
    op.kind = MPT_LOSS_GRADIENT;
    op.N = net->forward_rows;
    op.C = mpt__node_count(node);
    for (i = 0; i < op.N * op.C; i++)
        if (!mpt__finite(grad[i]))
            return mpt_fail(net->ctx, MPT_ERROR_VALUE, "output_grad: '%s': sample %zu, element %zu is %g", node->name,
                            i / op.C, i % op.C, (double)grad[i]);
    MPT__TRY(mpt_upload(net->ctx, net->target, grad, op.N * op.C * sizeof *grad));
    op.x = mpt__value(net, id);
    op.target = net->target;
    op.dx = mpt__grad(net, id);
    op.grad_scale = (float)(1 / mpt__passes(net));
    op.loss_scale = &net->scaler->state->scale;
    op.sum = &net->sums[0];
    mpt__enter(net, id, MPT_BACKWARD_DATA, id);
    MPT__TRY(mpt_op_loss(net->ctx, &op));
    mpt__enter(net, 0, MPT_FORWARD, 0);
    node->given = 1;
    return MPT_OK;
}

static mpt_result mpt__gather_range(mpt_model *net, int id);

/* last: no pass follows in this step. */
static mpt_result mpt__run_backward(mpt_model *net, int last) {
    int id;
    if (!mpt__waits(net))
        return mpt_fail(net->ctx, MPT_ERROR_ORDER, "backward: there is no forward pass that it could follow");
    if (net->opt->phase != MPT__READY)
        return mpt_fail(net->ctx, MPT_ERROR_ORDER,
                        "backward: the gradients are unscaled; step and update the scaler first");
    MPT__TRY(mpt__need_given(net));
    mpt__stage_set(net, MPT__GATHERED);
    mpt__sums_begin(net);
    if (mpt__loss_of(net)) net->opt->op.loss = &net->sums[0];
    for (id = 1; id <= net->count; id++) mpt__node_of(net, id)->grad_started = 0;
    for (id = mpt__last_value(net); id > 1; id--) {
        MPT__TRY(mpt__node_backward(net, id, net->forward_rows));
        if (last) MPT__TRY(mpt__gather_range(net, id));
    }
    mpt__enter(net, 0, MPT_FORWARD, 0);
    net->forward_rows = 0;
    net->micro++;
    return mpt__sums_end(net);
}

MPT_DEF mpt_result mpt_backward(mpt_model *net) {
    MPT__TRY(mpt__need_built(net, "backward"));
    return mpt__run_backward(net, 0);
}

MPT_DEF mpt_result mpt_zero_grad(mpt_model *net) {
    MPT__TRY(mpt__need_built(net, "zero_grad"));
    if (net->opt->phase != MPT__READY)
        return mpt_fail(net->ctx, MPT_ERROR_ORDER,
                        "zero_grad: the gradients are unscaled; step and update the scaler first");
    return mpt__forget_passes(net);
}

static mpt_result mpt__need_loss(const mpt_model *net, const char *call) {
    if (mpt__loss_of(net)) return MPT_OK;
    return mpt_fail(net->ctx, MPT_ERROR_ORDER, "%s: the model has no loss; see mpt_output_grad", call);
}

static mpt_result mpt__train_calls(mpt_model *net, const char *call, const void *x, const float *target,
                                   size_t samples) {
    const size_t width = mpt__target_width(net);
    size_t i, rows;
    for (i = 0; i < samples; i += rows) {
        const void *fed;
        rows = mpt__min(samples - i, (size_t)net->train.batch);
        MPT__TRY(mpt__feed(net, i ? NULL : call, mpt__samples_at(net, x, i), rows, &fed));
        if (!i) MPT__TRY(mpt__forget_passes(net));
        MPT__TRY(mpt__train_forward(net, fed, target + i * width, rows));
        MPT__TRY(mpt__run_backward(net, i + rows == samples));
    }
    MPT__TRY(mpt_unscale(net->opt));
    if (net->train.clip_norm > 0) MPT__TRY(mpt_clip_norm(net->opt, net->train.clip_norm));
    if (net->train.clip_value > 0) MPT__TRY(mpt_clip_value(net->opt, net->train.clip_value));
    MPT__TRY(mpt_step(net->opt));
    return mpt_scaler_update(net->scaler);
}

/* Will a step make the same calls as the one before? Not after backward passes without a step, nor if the scaler has
   other optimizers. */
static int mpt__step_known(const mpt_model *net) {
    int i;
    if (!net->ctx->backend.begin || net->opt->phase != MPT__READY || mpt__has_gradients(net)) return 0;
    if (mpt__sample_weights_bytes(net) && !net->weights) return 0; /* a recorded step uploads them */
    if (net->train.ranks.ranks > 1 && !net->train.ranks.on_stream) return 0;
    for (i = 1; i <= net->count; i++)
        if (mpt__node_of(net, i)->kind == MPT__OWN) return 0;
    for (i = 0; i < MPT_OPTIMIZERS; i++)
        if (net->scaler->optimizers[i] && net->scaler->optimizers[i] != net->opt) return 0;
    return 1;
}

/* Checks that the model's optimizer is between steps, and that no other optimizer keeps the scaler from its update. */
static mpt_result mpt__need_between(const mpt_model *net, const char *call) {
    int i;
    if (net->opt->phase != MPT__READY)
        return mpt_fail(net->ctx, MPT_ERROR_ORDER, "%s: the gradients are %s", call,
                        net->opt->phase == MPT__UNSCALED ? "unscaled; mpt_step and mpt_scaler_update come first"
                                                         : "used up; mpt_scaler_update comes first");
    for (i = 0; i < MPT_OPTIMIZERS; i++)
        if (net->scaler->optimizers[i] && net->scaler->optimizers[i]->phase == MPT__UNSCALED)
            return mpt_fail(net->ctx, MPT_ERROR_ORDER, "%s: another optimizer of the scaler is unscaled, not stepped",
                            call);
    return MPT_OK;
}

/* recorded: the device may record the step, or execute a recorded one. */
static mpt_result mpt__train_once(mpt_model *net, const char *call, const void *x, const float *target, size_t samples,
                                  int recorded, int *again) {
    mpt_backend *backend = &net->ctx->backend;
    mpt_result r = recorded ? backend->begin(net->ctx, &net->opt->op, net->staging) : MPT_OK;
    const int begun = r == MPT_OK;
    *again = 0;
    if (begun) r = mpt__train_calls(net, call, x, target, samples);
    if (recorded) {
        const mpt_result ended = backend->end(net->ctx, r, again);
        if (begun) r = ended;
        else *again = 0; /* the device is lost */
    }
    if (!*again) return r;
    net->opt->phase = MPT__READY;
    net->apart = net->params->trained;
    return r;
}

/* -- Ranks -- */

/* The device failed: an engine on its stream may know why. */
static mpt_result mpt__ranks_ask(mpt_model *net, mpt_result failed) {
    const mpt_ranks *r = &net->train.ranks;
    if (failed != MPT_ERROR_DEVICE || !r->on_stream) return failed;
    if (r->sum(r->user, NULL, 0) == MPT_OK) return failed;
    return mpt__exchanged(net->ctx, r, failed);
}

/* Tells words(SLOT_WORDS) to all ranks; those that each rank told are then in slots_host. */
static mpt_result mpt__ranks_tell(mpt_model *net, const uint64_t *words) {
    const size_t n = (size_t)net->train.ranks.ranks * MPT__SLOT;
    mpt_ranks_op op = MPT_ZERO;
    op.ranks = &net->train.ranks;
    op.slots = net->slots;
    op.sum = (mpt_loss_sum *)(void *)(net->slots + n);
    MPT__TRY(mpt_upload(net->ctx, op.sum, words, MPT__SLOT_WORDS * sizeof *words));
    MPT__TRY(mpt__exchanged(net->ctx, op.ranks, net->ctx->backend.ranks(net->ctx, &op)));
    return mpt_download(net->ctx, net->slots_host, net->slots, n * sizeof(float));
}

static uint64_t mpt__settings_hash(const mpt_model *net);

/* A hash of what must be equal on all ranks: layers, settings, initial weights (their copies, where each rank has only
   a part of the masters). *failed: there was no memory for it. */
static uint64_t mpt__model_hash(mpt_model *net, int *failed) {
    const size_t count = mpt_params_count(net->params, 0);
    float *weights = (float *)mpt__host_alloc(net->ctx, count * sizeof *weights);
    uint64_t hash = mpt__settings_hash(net);
    size_t i;
    *failed = !weights;
    if (weights && mpt__weights_sharded(net->params))
        *failed = mpt__params_get_halves(net->params, 0, 0, weights) != MPT_OK;
    else if (weights) *failed = mpt_params_get(net->params, 0, weights) != MPT_OK;
    if (!*failed)
        for (i = 0; i < count; i++) hash = hash << 24 ^ mpt_hash(hash, i, 0, mpt__bits(weights[i]));
    mpt__host_free(net->ctx, weights);
    return hash;
}

/* Checks that all ranks have built the same model. `built`: this rank's result; a rank that failed tells the others. */
static mpt_result mpt__ranks_compare(mpt_model *net, mpt_result built) {
    const int ranks = net->train.ranks.ranks, rank = net->train.ranks.rank;
    uint64_t mine[MPT__SLOT_WORDS] = {0};
    char why[sizeof net->ctx->why];
    uint64_t hash = 0;
    mpt_result r;
    int failed = built != MPT_OK, i;
    memcpy(why, net->ctx->why, sizeof why);
    if (!failed) hash = mpt__model_hash(net, &failed);
    mine[0] = !failed;
    mine[1] = hash;
    r = mpt__ranks_tell(net, mine);
    if (built != MPT_OK) {
        memcpy(net->ctx->why, why, sizeof why);
        net->ctx->failed = built;
        return built;
    }
    MPT__TRY(r);
    if (failed) return MPT_ERROR_NO_MEMORY;
    for (i = 0; i < ranks; i++) {
        if (!mpt__slot_word(net->slots_host, i, 0))
            return mpt_fail(net->ctx, MPT_ERROR_DEVICE, "model_build: rank %d could not build its model", i);
        if (mpt__slot_word(net->slots_host, i, 1) != mpt__slot_word(net->slots_host, 0, 1))
            return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT,
                            "model_build: rank %d has another model, seed or setting than rank 0 (this is rank %d)", i,
                            rank);
    }
    return MPT_OK;
}

/* This rank's part of a role; NULL: the model does not have that role. */
static void *mpt__role_of(const mpt_model *net, int role) {
    if (role < MPT__AVERAGES) return net->opt->op.moment[role - MPT__MOMENTS];
    if (role == MPT__AVERAGES) return net->opt->op.average;
    if (role == MPT__MASTERS) return net->params->master;
    return net->params->low;
}

/* Collects a role in the array of gradients, which is as long and not in use between steps. */
static mpt_result mpt__collect(void *user, int role) {
    mpt_model *net = (mpt_model *)user;
    const mpt_params *p = net->params;
    const size_t size = role == MPT__LOWS ? sizeof(uint16_t) : sizeof(float);
    char *whole = (char *)p->grad;
    if (net->opt->phase != MPT__READY || mpt__has_gradients(net))
        return mpt_fail(net->ctx, MPT_ERROR_ORDER,
                        "shard_optimizer: a step is under way, whose gradients would be overwritten");
    if (p->own)
        MPT__TRY(net->ctx->backend.copy(net->ctx, whole + p->first * size, mpt__role_of(net, role), p->own * size));
    return mpt__all_gather(net->ctx, p->shard->ranks, whole, p->shard->begin, size);
}

/* Called when the backward pass has reached node `id`: sums the gradients from this node's on, if there are enough of
   them for a range. mpt__gather_gradients sums what is left at the end. The ranges are the same on all ranks and in all
   steps. */
static mpt_result mpt__gather_range(mpt_model *net, int id) {
    const mpt__node *node = mpt__node_of(net, id);
    const mpt_ranks *r = &net->train.ranks;
    const size_t first = node->trains && node->weight ? mpt__params_offset(net->params, node->weight) : 0;
    mpt_ranks_op op = MPT_ZERO;
    int last;
    if (r->ranks < 2 || !r->on_stream || net->params->shard || !first || first >= net->apart) return MPT_OK;
    op.ranks = r;
    op.early = 1;
    op.grad = mpt_params_grad(net->params, 0) + first;
    op.count = net->apart - first;
    if (op.count < r->bucket_bytes / sizeof(float)) return MPT_OK;
    for (last = net->sums_count - 1; net->micro && last > 0; last--)
        MPT__TRY(mpt__sums_add(net, last, first, op.count));
    net->apart = first;
    return mpt__exchanged(net->ctx, r, net->ctx->backend.ranks(net->ctx, &op));
}

/* Called before the gradients are checked: adds up the sums of all passes, then those of all ranks. */
static mpt_result mpt__gather_gradients(void *user) {
    mpt_model *net = (mpt_model *)user;
    mpt_ranks_op op = MPT_ZERO;
    int id;
    for (id = mpt__last_value(net); id > 1; id--) MPT__TRY(mpt__gather_range(net, id));
    while (net->micro && net->sums_count > 1) MPT__TRY(mpt__sums_join(net));
    if (net->train.ranks.ranks < 2) return MPT_OK;
    op.ranks = &net->train.ranks;
    op.slots = net->slots;
    op.sum = &net->sums[net->opt->op.loss == &net->sums[2] ? 2 : 0];
    op.grad = mpt_params_grad(net->params, 0);
    op.count = net->apart;
    op.shard = net->params->shard;
    op.pending = net->pending;
    if (!op.ranks->local_statistics) op.statistics = net->statistics;
    net->apart = net->params->trained;
    return mpt__exchanged(net->ctx, op.ranks, net->ctx->backend.ranks(net->ctx, &op));
}

/* A rank that cannot make its passes joins the others with a NaN gradient, so that none of them waits and all skip the
   step. */
static void mpt__join_failed(mpt_model *net) {
    const float nan = mpt__float(0x7fc00000u);
    float *grad = mpt_params_grad(net->params, 0);
    char why[sizeof net->ctx->why];
    const mpt_result failed = net->ctx->failed;
    mpt_result r;
    memcpy(why, net->ctx->why, sizeof why);
    r = mpt__forget_passes(net);
    net->opt->op.loss = &net->sums[0];
    if (r == MPT_OK) r = net->ctx->backend.zero(net->ctx, &net->sums[0], sizeof *net->sums);
    if (r == MPT_OK) r = net->ctx->backend.zero(net->ctx, grad, net->apart * sizeof *grad);
    if (r == MPT_OK) r = mpt_upload(net->ctx, grad, &nan, sizeof nan);
    if (r == MPT_OK) r = mpt_unscale(net->opt);
    if (r == MPT_OK) r = mpt_step(net->opt);
    if (r == MPT_OK) mpt_scaler_update(net->scaler);
    memcpy(net->ctx->why, why, sizeof why);
    net->ctx->failed = failed;
}

/* Checks samples and targets of a step before it begins. */
static mpt_result mpt__check_samples(mpt_model *net, const char *call, const void *x, const void *target,
                                     size_t samples) {
    const size_t batch = (size_t)net->train.batch, whole = batch * (size_t)net->train.accumulate;
    if (!target) return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "%s: target is NULL", call);
    if (!samples || samples > whole)
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "%s: samples %zu, not in 1..%zu (accumulate * batch)", call,
                        samples, whole);
    MPT__TRY(mpt__check_batch(net, call, x, target, samples));
    if (samples % batch) return mpt__check_norms(net, samples % batch);
    return MPT_OK;
}

static mpt_result mpt__train(mpt_model *net, const char *call, const void *x, const void *target, size_t samples) {
    const size_t whole = (size_t)net->train.batch * (size_t)net->train.accumulate;
    const float *weights;
    mpt_result r;
    int known, tries, again = 1;
    mpt__take_weights(net);
    weights = net->weights;
    MPT__TRY(mpt__need_training(net, call));
    if (!net->params->trained) return mpt_fail(net->ctx, MPT_ERROR_ORDER, "%s: every layer is frozen", call);
    MPT__TRY(mpt__need_loss(net, call));
    MPT__TRY(mpt__need_between(net, call));
    r = mpt__check_samples(net, call, x, target, samples);
    known = samples == whole && mpt__step_known(net);
    net->opt->op.loss = &net->sums[0];
    for (tries = 0; r == MPT_OK && again; tries++) { /* a recording that fails twice is given up */
        net->weights = weights;
        r = mpt__train_once(net, call, x, (const float *)target, samples, known && tries < 3, &again);
    }
    if (r == MPT_OK || net->train.ranks.ranks < 2) return r;
    r = mpt__ranks_ask(net, r);
    if (net->opt->phase == MPT__READY && r != MPT_ERROR_DIVERGED) mpt__join_failed(net);
    return r;
}

MPT_DEF mpt_result mpt_train_step(mpt_model *net, const void *x, const void *target) {
    MPT__TRY(mpt__need_built(net, "train_step"));
    return mpt__train(net, "train_step", x, target, (size_t)net->train.batch * (size_t)net->train.accumulate);
}

MPT_DEF mpt_result mpt_train_samples(mpt_model *net, const void *x, const void *target, size_t samples) {
    MPT__TRY(mpt__need_built(net, "train_samples"));
    return mpt__train(net, "train_samples", x, target, samples);
}

MPT_DEF mpt_params *mpt_model_params(mpt_model *net) {
    if (!net) return NULL;
    return net->params;
}

MPT_DEF mpt_optimizer *mpt_model_optimizer(mpt_model *net) {
    if (!net) return NULL;
    return net->opt;
}

MPT_DEF mpt_scaler *mpt_model_scaler(mpt_model *net) {
    if (!net) return NULL;
    return net->scaler;
}

MPT_DEF double mpt_loss(mpt_model *net) {
    mpt_loss_sum sum = MPT_ZERO;
    int left_out;
    if (!net || !net->built) return (double)mpt__float(0x7fc00000u);
    left_out = net->stage == MPT__RESUMED && mpt__stage_of(net) == MPT__BETWEEN; /* the step ignored its last pass */
    if (mpt_download(net->ctx, &sum, &net->sums[left_out ? 2 : 0], sizeof sum) != MPT_OK)
        return (double)mpt__float(0x7fc00000u);
    if (sum.weight > 0) return sum.loss / sum.weight;
    return 0;
}

MPT_DEF float mpt_loss_scale(mpt_model *net) {
    if (!net || !net->built) return 0;
    return mpt_scaler_scale(net->scaler);
}

static uint64_t mpt__steps(mpt_model *net, int skipped) {
    mpt_optimizer_state *s;
    if (!net || !net->built) return UINT64_MAX;
    s = &net->opt->mirror;
    if (mpt_optimizer_get_state(net->opt, s) != MPT_OK) return UINT64_MAX;
    if (skipped) return s->skipped;
    return s->applied;
}

MPT_DEF uint64_t mpt_steps_applied(mpt_model *net) { return mpt__steps(net, 0); }
MPT_DEF uint64_t mpt_steps_skipped(mpt_model *net) { return mpt__steps(net, 1); }

/* -- Evaluation -- */

MPT_DEF size_t mpt_model_outputs(const mpt_model *net) {
    if (net && net->built) return mpt__node_count(mpt__node_of(net, mpt__output_of(net)));
    return 0;
}

/* An evaluation overwrites the activations that a backward pass would read. */
static mpt_result mpt__need_activations(const mpt_model *net, const char *call) {
    if (!mpt__waits(net)) return MPT_OK;
    return mpt_fail(net->ctx, MPT_ERROR_ORDER,
                    "%s: a forward pass waits for mpt_backward; call that, or mpt_zero_grad to forget it", call);
}

/* Are there averages, and do evaluations read them? */
static int mpt__uses_average(const mpt_model *net, uint64_t applied) {
    return net->use_average && applied > net->opt->op.average_from;
}

/* Decides which weights an evaluation reads, and rounds averages for it. */
static mpt_result mpt__choose_weights(mpt_model *net) {
    mpt_optimizer_state *state = &net->opt->mirror;
    net->averaged = 0;
    if (!net->use_average) return MPT_OK;
    MPT__TRY(mpt_optimizer_get_state(net->opt, state));
    net->averaged = mpt__uses_average(net, state->applied);
    if (net->averaged && net->params->shard) MPT__TRY(mpt__collect(net, MPT__AVERAGES));
    if (!net->averaged || !net->averages.data) return MPT_OK;
    return mpt_cast(net->ctx, net->params->trained, mpt_f32_array(mpt__averages(net)), net->averages, NULL);
}

MPT_DEF mpt_result mpt_use_average(mpt_model *net, int use) {
    MPT__TRY(mpt__need_built(net, "use_average"));
    if (!net->opt->op.average)
        return mpt_fail(net->ctx, MPT_ERROR_ORDER, "use_average: built without ema_decay, or all is frozen");
    net->use_average = use;
    return MPT_OK;
}

MPT_DEF mpt_result mpt_evaluate(mpt_model *net, const void *x, const void *target, size_t samples, mpt_metrics *out) {
    mpt_loss_sum sum = MPT_ZERO;
    const void *fed;
    size_t i, rows, width;
    MPT__TRY(mpt__need_built(net, "evaluate"));
    mpt__take_weights(net);
    MPT__TRY(mpt__need_activations(net, "evaluate"));
    MPT__TRY(mpt__choose_weights(net)); /* first: other ranks may wait */
    if (!target || !out || !samples)
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "evaluate: target or out is NULL, or there are no samples");
    MPT__TRY(mpt__need_loss(net, "evaluate"));
    MPT__TRY(mpt__check_batch(net, "evaluate", x, target, samples));
    width = mpt__target_width(net);
    MPT__TRY(net->ctx->backend.zero(net->ctx, &net->sums[1], sizeof sum));
    for (i = 0; i < samples; i += rows) {
        rows = mpt__min(samples - i, (size_t)net->train.batch);
        MPT__TRY(mpt__feed(net, i ? NULL : "evaluate", mpt__samples_at(net, x, i), rows, &fed));
        MPT__TRY(mpt__run_forward(net, fed, (const float *)target + i * width, rows, 0));
    }
    MPT__TRY(mpt_download(net->ctx, &sum, &net->sums[1], sizeof sum));
    out->loss = sum.weight > 0 ? sum.loss / sum.weight : 0;
    out->accuracy = sum.rows ? (double)sum.correct / (double)sum.rows : 0;
    out->samples = sum.rows;
    out->correct = sum.correct;
    return MPT_OK;
}

/* Copies an array of n elements to host memory, as fp32. */
static mpt_result mpt__read_array(mpt_model *net, size_t n, mpt_array x, float *out) {
    if (x.type != MPT_F32) {
        MPT__TRY(mpt_cast(net->ctx, n, x, mpt_f32_array(net->staging), NULL));
        x = mpt_f32_array(net->staging);
    }
    return mpt_download(net->ctx, out, x.data, n * sizeof *out);
}

MPT_DEF mpt_result mpt_predict(mpt_model *net, const void *x, size_t samples, float *out) {
    const void *fed;
    size_t i, rows, outputs;
    MPT__TRY(mpt__need_built(net, "predict"));
    MPT__TRY(mpt__need_activations(net, "predict"));
    MPT__TRY(mpt__choose_weights(net)); /* first: other ranks may wait */
    if (!out) return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "predict: out is NULL");
    MPT__TRY(mpt__check_batch(net, "predict", x, NULL, samples));
    outputs = mpt_model_outputs(net);
    for (i = 0; i < samples; i += rows) {
        mpt_array logits = mpt__value(net, mpt__output_of(net));
        rows = mpt__min(samples - i, (size_t)net->train.batch);
        MPT__TRY(mpt__feed(net, i ? NULL : "predict", mpt__samples_at(net, x, i), rows, &fed));
        MPT__TRY(mpt__run_forward(net, fed, NULL, rows, 0));
        MPT__TRY(mpt__read_array(net, rows * outputs, logits, out + i * outputs));
    }
    return MPT_OK;
}

/* -- Looking in -- */

static mpt_result mpt__need_kept(const mpt_model *net, const char *call, int id, const float *out) {
    MPT__TRY(mpt__need_built(net, call));
    if (id < 1 || id > mpt__last_value(net) || !out)
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "%s: there is no node %d, or out is NULL", call, id);
    if (mpt__node_of(net, id)->kept) return MPT_OK;
    return mpt_fail(net->ctx, MPT_ERROR_ORDER, "%s: '%s' was not kept: call mpt_keep before the build", call,
                    mpt__node_of(net, id)->name);
}

MPT_DEF mpt_result mpt_node_value(mpt_model *net, int id, float *out) {
    MPT__TRY(mpt__need_kept(net, "node_value", id, out));
    if (!net->rows) return mpt_fail(net->ctx, MPT_ERROR_ORDER, "node_value: there was no forward pass");
    return mpt__read_array(net, net->rows * mpt__node_count(mpt__node_of(net, id)), mpt__value(net, id), out);
}

MPT_DEF mpt_result mpt_node_grad(mpt_model *net, int id, float *out) {
    size_t i, n;
    double factor;
    MPT__TRY(mpt__need_kept(net, "node_grad", id, out));
    if (mpt__stage_of(net) != MPT__GATHERED)
        return mpt_fail(net->ctx, MPT_ERROR_ORDER, "node_grad: the last call was not a backward pass");
    n = net->rows * mpt__node_count(mpt__node_of(net, id));
    MPT__TRY(mpt__read_array(net, n, mpt__grad(net, id), out));
    factor = mpt__passes(net) / (double)mpt_scaler_scale(net->scaler);
    for (i = 0; i < n; i++) out[i] = (float)((double)out[i] * factor);
    return MPT_OK;
}

/* -- Folding -- y = (w x + b - mean) gamma / deviation + beta = w' x + b', with b' stored in beta */

static mpt_result mpt__need_unfolded(const mpt_model *net, const char *call) {
    int id;
    for (id = 1; id <= net->count; id++)
        if (mpt__is_folded(net, mpt__node_of(net, id)))
            return mpt_fail(net->ctx, MPT_ERROR_ORDER, "%s: '%s' is folded into the weights before it", call,
                            mpt__node_of(net, id)->name);
    return MPT_OK;
}

/* The host arrays for folding a norm */
typedef struct mpt__fold {
    size_t C, count; /* channels, weights */
    float *w, *bias, *gamma, *beta, *mean, *variance;
} mpt__fold;

static mpt__fold mpt__fold_places(float *room, size_t C, size_t count) {
    mpt__fold f;
    f.C = C;
    f.count = count;
    f.w = room;
    f.bias = room + count;
    f.gamma = f.bias + C;
    f.beta = f.gamma + C;
    f.mean = f.beta + C;
    f.variance = f.mean + C;
    return f;
}

static mpt_result mpt__fold_read(mpt_model *net, const mpt__node *norm, const mpt__node *in, const mpt__fold *f) {
    MPT__TRY(mpt_params_get(net->params, in->weight, f->w));
    memset(f->bias, 0, f->C * sizeof(float));
    if (in->bias) MPT__TRY(mpt_params_get(net->params, in->bias, f->bias));
    MPT__TRY(mpt_params_get(net->params, norm->weight, f->gamma));
    MPT__TRY(mpt_params_get(net->params, norm->bias, f->beta));
    return mpt_download(net->ctx, f->mean, net->running + norm->running, 2 * f->C * sizeof(float));
}

/* Folds w and beta. Returns 0 if a result is too large for `type`. */
static int mpt__fold_rule(const mpt__fold *f, double eps, mpt_dtype type) {
    const size_t each = f->count / f->C;
    int fits = 1;
    size_t c, i;
    for (c = 0; c < f->C; c++) {
        const double factor = (double)f->gamma[c] / sqrt((double)f->variance[c] + eps);
        f->beta[c] = (float)((double)f->beta[c] + ((double)f->bias[c] - (double)f->mean[c]) * factor);
        for (i = c * each; i < (c + 1) * each; i++) f->w[i] = (float)((double)f->w[i] * factor);
    }
    for (i = 0; i < f->count; i++) fits &= mpt__type_holds(f->w[i], type);
    for (c = 0; c < f->C; c++) fits &= mpt__type_holds(f->beta[c], type);
    return fits;
}

/* Folds a norm into the layer before it, if its type holds the results. */
static mpt_result mpt__fold_norm(mpt_model *net, int id, float *room) {
    const mpt__node *norm = mpt__node_of(net, id);
    mpt__node *in = mpt__node_of(net, norm->in[0]);
    const mpt__fold f = mpt__fold_places(room, (size_t)norm->C, mpt_params_count(net->params, in->weight));
    const double eps = (double)(mpt__is_zero(norm->norm_shape.eps) ? 1e-5f : norm->norm_shape.eps);
    MPT__TRY(mpt__fold_read(net, norm, in, &f));
    if (!mpt__fold_rule(&f, eps, net->params->desc.type)) return MPT_OK;
    MPT__TRY(mpt_params_set(net->params, in->weight, f.w));
    MPT__TRY(mpt_params_set(net->params, norm->bias, f.beta));
    in->folds = id;
    return MPT_OK;
}

/* May this node be folded into the one before it? */
static int mpt__folds_away(const mpt__node *node) { return node->in_place && node->bias; }

/* Host floats needed to fold the largest norm; 0 if there is none to fold */
static size_t mpt__fold_room(const mpt_model *net) {
    size_t most = 0;
    int id;
    for (id = 1; id <= net->count; id++) {
        const mpt__node *norm = mpt__node_of(net, id);
        if (!mpt__folds_away(norm)) continue;
        most =
            mpt__max(most, mpt_params_count(net->params, mpt__node_of(net, norm->in[0])->weight) + 5 * (size_t)norm->C);
    }
    return most;
}

/* Folds every norm that can be folded; the weights are those just loaded. */
static mpt_result mpt__fold_all(mpt_model *net, float *room) {
    int id;
    for (id = 1; id <= net->count; id++)
        if (mpt__folds_away(mpt__node_of(net, id))) MPT__TRY(mpt__fold_norm(net, id, room));
    return MPT_OK;
}

/* -- Inspection -- */

MPT_DEF int mpt_model_nodes(const mpt_model *net) {
    if (!net) return 0;
    return net->count;
}

MPT_DEF mpt_train_desc mpt_model_train_desc(const mpt_model *net) {
    const mpt_train_desc none = MPT_ZERO;
    if (net && net->built) return net->train;
    return none;
}

MPT_DEF const float *mpt_model_running(const mpt_model *net, int id) {
    const mpt__node *node = mpt__known_node(net, id);
    if (node && net->built && mpt__is_batch_norm(node)) return net->running + node->running;
    return NULL;
}

/* Checks that means(C) and the variances(C) after them are finite, and the variances not negative. */
static mpt_result mpt__running_check(mpt_context *ctx, const char *call, const mpt__node *node, const float *host) {
    const size_t C = (size_t)node->C;
    size_t i;
    for (i = 0; i < 2 * C; i++)
        if (!mpt__finite(host[i]) || (i >= C && host[i] < 0))
            return mpt_fail(ctx, MPT_ERROR_VALUE, "%s: '%s': running %s %zu is %g", call, node->name,
                            i < C ? "mean" : "variance", i % C, (double)host[i]);
    return MPT_OK;
}

MPT_DEF mpt_result mpt_model_set_running(mpt_model *net, int id, const float *host) {
    const float *running = mpt_model_running(net, id);
    size_t at, bytes;
    MPT__TRY(mpt__need_built(net, "model_set_running"));
    if (!running || !host)
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "model_set_running: node %d is no batch norm, or no host", id);
    MPT__TRY(mpt__need_unfolded(net, "model_set_running"));
    MPT__TRY(mpt__running_check(net->ctx, "model_set_running", mpt__node_of(net, id), host));
    at = (size_t)(running - net->running);
    bytes = 2 * (size_t)mpt__node_of(net, id)->C * sizeof *host;
    MPT__TRY(mpt_upload(net->ctx, net->running + at, host, bytes));
    return mpt_upload(net->ctx, net->pending + at, host, bytes);
}

MPT_DEF mpt_context *mpt_model_context(const mpt_model *net) {
    if (!net) return NULL;
    return net->ctx;
}

/* A pass without a step must not count: everything that it changes is restored. */
MPT_DEF mpt_result mpt_replay(mpt_model *net, const void *x, const void *target, size_t samples, float scale) {
    mpt_scaler_state scaler;
    mpt_loss_sum sums[MPT__SUMS];
    char why[sizeof net->ctx->why];
    mpt__stage stage;
    uint64_t step;
    int micro;
    mpt_result r, kept;
    MPT__TRY(mpt__need_built(net, "replay"));
    if (net->opt->phase != MPT__READY || mpt__has_gradients(net))
        return mpt_fail(net->ctx, MPT_ERROR_ORDER, "replay: it would overwrite the gradients of an unfinished step");
    stage = net->stage;
    step = net->stage_step;
    micro = net->micro;
    MPT__TRY(mpt_scaler_get_state(net->scaler, &scaler));
    MPT__TRY(mpt_download(net->ctx, sums, net->sums, sizeof sums));
    MPT__TRY(mpt_scaler_set_scale(net->scaler, scale));
    r = mpt_forward(net, x, target, samples);
    if (r == MPT_OK) r = mpt_backward(net);
    memcpy(why, net->ctx->why, sizeof why);
    kept = mpt_scaler_set_state(net->scaler, &scaler);
    if (kept == MPT_OK) kept = mpt_upload(net->ctx, net->sums, sums, sizeof sums);
    if (kept == MPT_OK) kept = mpt__reset_statistics(net);
    net->stage = stage;
    net->stage_step = step;
    net->micro = micro;
    net->forward_rows = 0;
    if (r == MPT_OK) return kept;
    net->ctx->failed = r; /* instead of a later failure */
    memcpy(net->ctx->why, why, sizeof why);
    return r;
}

/* ==== FILE PARTS ====

   -- The plan and its bytes -- */

MPT_DEF mpt_result mpt_model_node(const mpt_model *net, int id, mpt_node_info *out) {
    const mpt__node *node;
    mpt__kind kind;
    int i;
    MPT__TRY(mpt__need_built(net, "model_node"));
    if (id < 1 || id > net->count || !out)
        return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "model_node: node %d is not in 1..%d, or out is NULL", id,
                        net->count);
    node = mpt__node_of(net, id);
    memset(out, 0, sizeof *out);
    out->name = node->name;
    kind = mpt__kind_of(node);
    out->kernel = kind.describe ? kind.describe(net, node) : kind.how;
    out->reason = node->kind == MPT__LOSS ? "losses are fp32" : node->reason;
    out->in[0] = node->in[0];
    out->in[1] = node->in[1];
    out->weight = node->weight;
    out->bias = node->bias;
    out->conv = node->conv;
    out->H = node->H;
    out->W = node->W;
    out->C = node->C;
    out->type = node->kind == MPT__LOSS ? MPT_F32 : node->type;
    out->grad_type = node->grad_type;
    out->needs_gradient = node->needs_gradient;
    out->weight_type = kind.product ? node->policy.compute : MPT_DTYPE_COUNT;
    out->fused_into = node->fused || mpt__is_folded(net, node) ? node->in[0] : 0;
    if (node->weight) out->parameters += mpt_params_count(net->params, node->weight);
    if (node->bias) out->parameters += mpt_params_count(net->params, node->bias);
    if (kind.product)
        out->multiply_adds = mpt_params_count(net->params, node->weight) * (size_t)node->H * (size_t)node->W;
    if (node->kind == MPT__LOSS) return MPT_OK;
    for (i = 0; i < MPT__BUFFERS; i++) {
        const int own[MPT__BUFFERS] = {node->value, node->grad, node->index, node->stats, node->cast};
        const mpt__node *in = mpt__input_of(net, node);
        if (own[i] && !(in && (own[i] == in->value || own[i] == in->grad)))
            out->bytes += net->buffers[own[i] - 1].bytes;
    }
    return MPT_OK;
}

/* Number of arrays that a built model has on its device. */
static size_t mpt__device_arrays(const mpt_model *net) {
    const mpt_params *p = net->params;
    size_t count = 5; /* block, targets, sums; states of scaler and optimizer */
    int i;
    if (p->trained) count += 2; /* gradients, slices */
    if (net->sums_apart) count++;
    if (net->slots) count++;
    for (i = 0; i < 3; i++)
        if (net->opt->op.moment[i]) count++;
    if (p->copy.data) count++;
    if (p->master) count++;
    if (p->low) count++;
    if (p->shard) count += p->shard->wide ? 3 : 2; /* parts and meters, too */
    if (net->staging) count++;
    if (net->loss_weights) count++;
    if (net->sample_weights) count++;
    if (net->channels) count++;
    if (net->opt->op.average) count++;
    if (net->averages.data) count++;
    if (net->statistics) count += 2; /* running and pending */
    return count;
}

MPT_DEF mpt_memory mpt_model_memory(const mpt_model *net) {
    const size_t host = MPT__OVERHEAD;
    mpt_memory m = MPT_ZERO;
    const mpt_params *p;
    size_t slices, kept;
    int i;
    if (!net) return m;
    m.bookkeeping = sizeof *net + host;
    if (net->capacity) m.bookkeeping += (size_t)net->capacity * sizeof *net->nodes + host;
    if (!net->built) return m;
    p = net->params;
    slices = (size_t)p->trained_count * sizeof(mpt_tensor_slice);
    kept = mpt__kept_room(p, p->elements, mpt__weights_sharded(p));
    m.gradients = p->trained * 4 * (size_t)(1 + net->sums_apart_count);
    for (i = 0; i < 3; i++)
        if (net->opt->op.moment[i]) m.moments += mpt__own_room(p) * 4;
    if (net->opt->op.average) m.moments += mpt__own_room(p) * 4 + mpt__averages_bytes(net);
    if (net->policy.param == MPT_F32) {
        m.weights = kept * 4;
        if (p->copy.data) m.weights += p->elements * 2; /* O1 */
    } else {
        m.weights = p->elements * 2;
        if (p->master) m.masters = kept * 4;
        if (p->low) m.masters = kept * 2;
    }
    if (p->shard) {
        const int ranks = net->train.ranks.ranks;
        m.weights += p->shard->wide_begin[ranks] * sizeof(float);
        m.workspace += p->shard->chunks[ranks] * sizeof(mpt_scan) + 2 * (size_t)ranks * sizeof(uint64_t);
        m.bookkeeping += mpt__shard_bytes(&net->train.ranks) + host;
    }
    m.activations = net->block_bytes;
    m.workspace += net->staging_bytes + net->target_bytes + MPT__SUMS * sizeof *net->sums;
    m.workspace += sizeof *net->scaler->state + sizeof *net->opt->op.state + slices;
    m.workspace += 2 * net->statistics * sizeof(float);
    if (net->loss_weights) m.workspace += mpt__loss_outputs(mpt__loss_of(net)) * sizeof(float);
    m.workspace += mpt__sample_weights_bytes(net);
    m.workspace += mpt__channels_bytes(net);
    if (net->slots) {
        m.workspace += ((size_t)net->train.ranks.ranks + 1) * MPT__SLOT * sizeof(float);
        m.bookkeeping += (size_t)net->train.ranks.ranks * MPT__SLOT * sizeof(float) + host;
    }
    m.bookkeeping += mpt__device_arrays(net) * net->ctx->backend.overhead;
    m.bookkeeping += (p->trained ? 6 : 5) * host + sizeof *net->scaler + sizeof *p + sizeof *net->opt + slices;
    m.bookkeeping += (size_t)p->capacity * sizeof *p->tensors;
    m.bookkeeping += (size_t)net->count * MPT__BUFFERS * sizeof *net->buffers;
    return m;
}

typedef struct mpt__column {
    const char *name;
    int end; /* where the next one starts in a line of text; 0: the last */
} mpt__column;

typedef struct mpt__table { /* a line at a time */
    mpt_style style;
    mpt_write write;
    void *user;
    const mpt__column *columns;
    int at; /* column of the next cell */
    mpt__text text;
    char line[256];
} mpt__table;

/* A cell of CSV, in quotes where necessary. */
static void mpt__put_csv(mpt__text *t, const char *cell) {
    const int quoted = strpbrk(cell, ",\"\n") != NULL;
    if (quoted) mpt__put_char(t, '"');
    for (; *cell; cell++) {
        if (*cell == '"') mpt__put_char(t, '"');
        mpt__put_char(t, *cell);
    }
    if (quoted) mpt__put_char(t, '"');
}

/* Adds a cell to the line; in text, with blanks up to its column's end. */
MPT__PRINTF(2, 3)
static void mpt__cell(mpt__table *t, const char *format, ...) {
    const int end = t->columns[t->at].end;
    char cell[128];
    va_list args;
    va_start(args, format);
    mpt__format_list(cell, sizeof cell, format, args);
    va_end(args);
    if (t->style == MPT_CSV && t->at) mpt__put_char(&t->text, ',');
    t->at++;
    if (t->style == MPT_CSV) {
        mpt__put_csv(&t->text, cell);
        return;
    }
    mpt__put_string(&t->text, cell);
    if (!end) return;
    do mpt__put_char(&t->text, ' ');
    while (t->text.at < t->line + end && t->text.at < t->text.end);
}

static void mpt__row_end(mpt__table *t) {
    mpt__put_char(&t->text, '\n');
    t->text.at[-1] = '\n'; /* also if the line was cut */
    t->write(t->line, t->user);
    t->text.at = t->line;
    t->at = 0;
}

/* Writes the header. The last column is the one whose end is 0. */
static void mpt__table_start(mpt__table *t, const mpt__column *columns, mpt_style style, mpt_write write, void *user) {
    int i = 0;
    t->style = style;
    t->write = write;
    t->user = user;
    t->columns = columns;
    t->at = 0;
    t->text.at = t->line;
    t->text.end = t->line + sizeof t->line - 1;
    do mpt__cell(t, "%s", columns[i].name);
    while (columns[i++].end);
    mpt__row_end(t);
}

static mpt_result mpt__need_write(mpt_context *ctx, const char *call, mpt_style style, mpt_write write) {
    if (!write) return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "%s: write is NULL", call);
    if (style == MPT_TEXT || style == MPT_CSV) return MPT_OK;
    return mpt_fail(ctx, MPT_ERROR_ARGUMENT, "%s: unknown style %d", call, (int)style);
}

static double mpt__percent(double part, double whole) { return whole > 0 ? 100 * part / whole : 0; }

static void mpt__print_node(const mpt_model *net, int id, mpt__table *t) {
    mpt_node_info n;
    if (mpt_model_node(net, id, &n) != MPT_OK) return;
    mpt__cell(t, "%d", id);
    mpt__cell(t, "%s", n.name);
    mpt__cell(t, "%dx%dx%d", n.H, n.W, n.C);
    mpt__cell(t, "%s", mpt_dtype_name(n.type));
    mpt__cell(t, "%s", n.weight_type == MPT_DTYPE_COUNT ? "-" : mpt_dtype_name(n.weight_type));
    mpt__cell(t, "%s", n.kernel);
    mpt__cell(t, "%s", n.fused_into ? mpt__node_of(net, n.fused_into)->name : "-");
    mpt__cell(t, "%zu", n.parameters);
    mpt__cell(t, "%zu", n.bytes);
    mpt__cell(t, "%zu", n.multiply_adds);
    mpt__cell(t, "%s", n.reason);
    mpt__row_end(t);
}

MPT_DEF mpt_result mpt_model_print(const mpt_model *net, mpt_write write, void *user) {
    static const mpt__column columns[] = {
        {"", 4},        {"node", 20},           {"shape", 34},      {"type", 40},
        {"reads", 46},  {"kernel", 65},         {"fused into", 82}, {"parameters", 93},
        {"bytes", 104}, {"multiply-adds", 117}, {"why the type", 0}};
    mpt__table t;
    int id;
    MPT__TRY(mpt__need_built(net, "model_print"));
    MPT__TRY(mpt__need_write(net->ctx, "model_print", MPT_TEXT, write));
    mpt__table_start(&t, columns, MPT_TEXT, write, user);
    for (id = 1; id <= net->count; id++) mpt__print_node(net, id, &t);
    return MPT_OK;
}

MPT_DEF mpt_result mpt_memory_print(const mpt_model *net, mpt_style style, mpt_write write, void *user) {
    static const mpt__column columns[] = {{"role", 14}, {"bytes", 26}, {"share", 36}, {"a parameter", 0}};
    static const char *const names[] = {"weights",     "masters",   "gradients",   "moments",
                                        "activations", "workspace", "bookkeeping", "all"};
    size_t bytes[8] = {0}, parameters = 0;
    mpt__table t;
    mpt_memory m;
    int i;
    MPT__TRY(mpt__need_built(net, "memory_print"));
    MPT__TRY(mpt__need_write(net->ctx, "memory_print", style, write));
    m = mpt_model_memory(net);
    bytes[0] = m.weights;
    bytes[1] = m.masters;
    bytes[2] = m.gradients;
    bytes[3] = m.moments;
    bytes[4] = m.activations;
    bytes[5] = m.workspace;
    bytes[6] = m.bookkeeping;
    for (i = 0; i < 7; i++) bytes[7] += bytes[i];
    for (i = 1; i <= mpt_params_tensors(net->params); i++) parameters += mpt_params_count(net->params, i);
    mpt__table_start(&t, columns, style, write, user);
    for (i = 0; i < 8; i++) {
        mpt__cell(&t, "%s", names[i]);
        mpt__cell(&t, "%zu", bytes[i]);
        mpt__cell(&t, "%g", mpt__percent((double)bytes[i], (double)bytes[7]));
        mpt__cell(&t, "%g", parameters ? (double)bytes[i] / (double)parameters : 0.0);
        mpt__row_end(&t);
    }
    return MPT_OK;
}

/* -- File systems -- a table: for the disk, where files are FILE *, for memory, or for a test that makes each of these
   fail. Each returns 0 if it failed. */

typedef struct mpt__disk {
    void *(*open)(const char *path, int writing);
    int (*size)(void *file, uint64_t *bytes); /* called first after open */
    int (*read)(void *file, void *to, size_t bytes);
    int (*write)(void *file, const void *from, size_t bytes);
    int (*close)(void *file, int flush); /* flush: writes what is buffered to the disk first; closes in any case */
    int (*rename)(const char *from, const char *to);
    int (*remove)(const char *path);
} mpt__disk;

typedef struct mpt__memory_file { /* a file in memory */
    const unsigned char *from;    /* that is read... */
    unsigned char *to;            /* ...or written; NULL: only counted */
    size_t size, at;
} mpt__memory_file;

static int mpt__memory_size(void *file, uint64_t *bytes) {
    *bytes = ((const mpt__memory_file *)file)->size;
    return 1;
}

static int mpt__memory_read(void *file, void *to, size_t bytes) {
    mpt__memory_file *buffer = (mpt__memory_file *)file;
    if (bytes > buffer->size - buffer->at) return 0;
    if (bytes) memcpy(to, buffer->from + buffer->at, bytes);
    buffer->at += bytes;
    return 1;
}

static int mpt__memory_write(void *file, const void *from, size_t bytes) {
    mpt__memory_file *buffer = (mpt__memory_file *)file;
    if (bytes > buffer->size - buffer->at) return 0;
    if (bytes) memcpy(buffer->to + buffer->at, from, bytes);
    buffer->at += bytes;
    return 1;
}

/* Nothing opens, closes or renames it. */
static const mpt__disk mpt__in_memory = {NULL, mpt__memory_size, mpt__memory_read, mpt__memory_write, NULL, NULL, NULL};

#ifndef MPT_NO_STDIO
#include <stdio.h>

#if defined(_WIN32)
#include <io.h>
#include <process.h>
#ifdef __cplusplus
extern "C"
#endif
    __declspec(dllimport) int __stdcall MoveFileExA(const char *from, const char *to, unsigned long flags);
static int mpt__file_sync(FILE *file) { return _commit(_fileno(file)) == 0; }
/* replace, flush */
static int mpt__file_rename(const char *from, const char *to) { return MoveFileExA(from, to, 1 | 8); }
#else
#ifdef MPT__POSIX
#include <sys/stat.h>
MPT__SYSTEM(int, fileno, (FILE * file)) /* -std=c99 hides them */
MPT__SYSTEM(int, fsync, (int file))
MPT__SYSTEM(char *, realpath, (const char *path, char *out))
static int mpt__file_sync(FILE *file) { return mpt__sys_fsync(mpt__sys_fileno(file)) == 0; }
/* Keeps the permissions of the file that it replaces. */
static int mpt__file_rename(const char *from, const char *to) {
    struct stat old;
    if (stat(to, &old) == 0 && chmod(from, old.st_mode & 07777) != 0) return 0;
    return rename(from, to) == 0;
}
#else
static int mpt__file_sync(FILE *file) { return file != NULL; }
static int mpt__file_rename(const char *from, const char *to) { return rename(from, to) == 0; }
#endif
#endif

#ifdef MPT__POSIX /* x: must not exist */
static void *mpt__file_open(const char *path, int writing) { return fopen(path, writing ? "wbx" : "rb"); }
#else
static void *mpt__file_open(const char *path, int writing) { return fopen(path, writing ? "wb" : "rb"); }
#endif
#ifdef _WIN32 /* long has 32 bits */
static int mpt__seek_end(FILE *file) { return _fseeki64(file, 0, SEEK_END) == 0; }
static int64_t mpt__tell(FILE *file) { return _ftelli64(file); }
#else /* if long has 32 bits, fopen refuses files over 2 GiB, or with a larger off_t ftell fails */
static int mpt__seek_end(FILE *file) { return fseek(file, 0, SEEK_END) == 0; }
static int64_t mpt__tell(FILE *file) { return ftell(file); }
#endif
static int mpt__file_size(void *file, uint64_t *bytes) {
    const int64_t end = mpt__seek_end((FILE *)file) ? mpt__tell((FILE *)file) : -1;
    if (end < 0) return 0;
    *bytes = (uint64_t)end;
    return fseek((FILE *)file, 0, SEEK_SET) == 0;
}
static int mpt__file_read(void *file, void *to, size_t bytes) { return fread(to, 1, bytes, (FILE *)file) == bytes; }
static int mpt__file_write(void *file, const void *from, size_t bytes) {
    return fwrite(from, 1, bytes, (FILE *)file) == bytes;
}
static int mpt__file_close(void *file, int flush) {
    const int flushed = !flush || (fflush((FILE *)file) == 0 && mpt__file_sync((FILE *)file));
    return fclose((FILE *)file) == 0 && flushed;
}
static int mpt__file_remove(const char *path) { return remove(path) == 0; }
static const mpt__disk mpt__stdio = {mpt__file_open,  mpt__file_size,   mpt__file_read,  mpt__file_write,
                                     mpt__file_close, mpt__file_rename, mpt__file_remove};
#endif

/* -- Bytes -- */

static void mpt__put_bytes(unsigned char *at, uint64_t value, size_t bytes) {
    for (; bytes--; value >>= 8) *at++ = (unsigned char)value;
}

static uint64_t mpt__get_bytes(const unsigned char *at, size_t bytes) {
    uint64_t value = 0;
    while (bytes--) value = value << 8 | at[bytes];
    return value;
}

/* Element i of an array of 16- or 32-bit elements, in this machine's byte order. */
static uint32_t mpt__get_element(const void *array, size_t i, size_t size) {
    if (size == 2) return ((const uint16_t *)array)[i];
    return ((const uint32_t *)array)[i];
}

static void mpt__put_element(void *array, size_t i, size_t size, uint32_t bits) {
    if (size == 2) ((uint16_t *)array)[i] = (uint16_t)bits;
    else ((uint32_t *)array)[i] = bits;
}

/* FNV-1a over the bytes. */
static uint64_t mpt__sum_bytes(uint64_t sum, const unsigned char *bytes, size_t count) {
    while (count--) sum = (sum ^ *bytes++) * 0x100000001b3u;
    return sum;
}

/* -- What saving and loading work on -- */

typedef struct mpt__file_type {
    const char *name;
    size_t size;
} mpt__file_type;

/* Element types that a file may have; the first ones are those of mpt_dtype. */
enum { MPT__U8 = MPT_DTYPE_COUNT, MPT__U16, MPT__I64, MPT__FILE_TYPES = 16, MPT__DIMS = 8, MPT__HEADER = 100000000 };
static const mpt__file_type mpt__file_types[MPT__FILE_TYPES] = {
    {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"U8", 1},  {"U16", 2}, {"I64", 8},
    {"F64", 8}, {"I8", 1},  {"I16", 2},  {"I32", 4},     {"U32", 4},     {"U64", 8}, {"C64", 8}, {"BOOL", 1}};

typedef struct mpt__entry { /* a tensor in the header of a file that is read */
    const char *name;
    int type, dims, used;
    uint64_t shape[MPT__DIMS], begin, end;
} mpt__entry;

typedef enum mpt__part_kind {
    MPT__STATE = 0, /* counters and settings: 64-bit words, see mpt__walk */
    MPT__RAW,       /* elements as they are on the device */
    MPT__RUNNING,   /* running means or variances of a batch norm */
    MPT__VALUES,    /* a tensor of parameters, as the numbers that mpt_params_get returns */
    MPT__SUM        /* checksum of all bytes before it */
} mpt__part_kind;

typedef struct mpt__part { /* a tensor of the model that is saved or loaded */
    char name[80];
    mpt__part_kind kind;
    int id;         /* which state; node of a running statistic; tensor of values */
    int role;       /* RAW: what may be in shards, as MPT__MOMENTS; 0: none of that */
    int type, dims; /* in the file */
    uint64_t shape[4];
    size_t count;            /* of all elements */
    size_t columns, inner;   /* elements of a row; filters: channels, innermost here but not in PyTorch */
    int reads;               /* node whose elements the columns belong to; 0: columns are in the model's order */
    int makes;               /* the same for the rows */
    void *device;            /* RAW, RUNNING */
    int half;                /* partial loading: of a pair of running statistics, the other one is missing */
    const mpt__entry *entry; /* loading: the tensor in the file... */
    char *staging;           /* ...and its elements, ready to be uploaded */
} mpt__part;

typedef struct mpt__state { /* everything except arrays */
    mpt_optimizer_state optimizer;
    mpt_scaler_state scaler;
    double lr;
    mpt_tensor_slice *slices; /* of each tensor; allocated behind this struct */
} mpt__state;

typedef struct mpt__job {
    mpt_model *net;
    mpt_load_desc load; /* of weights; all zero: whole */
    mpt_context *ctx;
    const char *call, *path; /* path NULL: in memory */
    const mpt__disk *disk;
    void *file;
    int full; /* 1: a checkpoint; 0: weights of this type */
    int type;
    int averages;   /* the checkpoint has them */
    int saves;      /* a file is written: with a shard all ranks do it together... */
    int collected;  /* ...and have put the roles up to this one together */
    float *folding; /* room for folding a norm */
    mpt__part *parts;
    int count;
    mpt__state *state;
    char *header, *at; /* the header; reading: the next byte of it */
    size_t header_bytes;
    mpt__entry *entries;
    int entry_count, entry_capacity;
    unsigned char *data; /* reading: of the file; writing: of one part */
    size_t data_bytes;
    char *staging;
} mpt__job;

MPT__PRINTF(3, 4)
static mpt_result mpt__job_fail(const mpt__job *job, mpt_result result, const char *format, ...) {
    char text[192];
    va_list args;
    va_start(args, format);
    mpt__format_list(text, sizeof text, format, args);
    va_end(args);
    if (!job->path) return mpt_fail(job->ctx, result, "%s: %s", job->call, text);
    return mpt_fail(job->ctx, result, "%s: %s, '%s'", job->call, text, job->path);
}

static size_t mpt__part_bytes(const mpt__part *part) { return part->count * mpt__file_types[part->type].size; }

/* -- Which tensors a model has -- */

/* The index in PyTorch, which flattens images in C, H, W order, of element i of a node's value. A value of one pixel
   has the order of the input that its layer follows; a concatenation follows the input that *i falls into, and changes
   *i. The outputs of a linear layer have the order of the image that they are reshaped to. id 0: the model's order */
static size_t mpt__torch_index(const mpt_model *net, int id, size_t i) {
    size_t before = 0; /* elements of the inputs to the left */
    while (id) {
        const mpt__node *node = mpt__node_of(net, id), *image = mpt__node_of(net, node->shaped ? node->shaped : id);
        const size_t pixels = (size_t)image->H * (size_t)image->W, C = (size_t)image->C, here = i;
        const mpt__kind kind = mpt__kind_of(node);
        if (pixels > 1) return before + i % C * pixels + i / C;
        id = kind.follows ? kind.follows(net, node, &i) : 0;
        before += here - i;
    }
    return before + i;
}

/* Are the elements of two values in the same order in PyTorch? `other` 0: the model's order. */
static int mpt__same_order(const mpt_model *net, int id, int other) {
    const size_t count = mpt__node_count(mpt__node_of(net, id));
    size_t i;
    for (i = 0; i < count; i++)
        if (mpt__torch_index(net, id, i) != mpt__torch_index(net, other, i)) return 0;
    return 1;
}

/* Refuses models with a layer that computes something else than PyTorch because a flattened image has another order
   there, which no order of the layer's weights makes up for: sums and products with a value in another order, groups of
   channels, slices, and reshapes. */
static mpt_result mpt__check_orders(const mpt__job *job) {
    const mpt_model *net = job->net;
    int id;
    for (id = 2; id <= net->count; id++) {
        const mpt__node *node = mpt__node_of(net, id), *in = mpt__node_of(net, node->in[0]);
        const mpt__kind kind = mpt__kind_of(node);
        const int groups = kind.groups && kind.groups(node) > 1 && in->H * in->W == 1;
        if ((kind.matches_torch && !kind.matches_torch(net, node)) || (groups && !mpt__same_order(net, node->in[0], 0)))
            return mpt__job_fail(job, MPT_ERROR_UNSUPPORTED,
                                 "'%s' reads a flattened image, which is in C, H, W order in PyTorch: it would compute "
                                 "something else there",
                                 node->name);
    }
    return MPT_OK;
}

/* The index in the file of element i of a tensor of the model. */
static size_t mpt__part_index(const mpt_model *net, const mpt__part *part, size_t i) {
    const size_t column = i % part->columns, number = i / part->columns;
    const size_t row = mpt__torch_index(net, part->makes, number) * part->columns;
    if (part->inner) {
        const size_t channel = column % part->inner, tap = column / part->inner;
        return row + mpt__torch_index(net, part->reads, channel) * (part->columns / part->inner) + tap;
    }
    return row + mpt__torch_index(net, part->reads, column);
}

/* Adds a tensor of one dimension. */
static mpt__part *mpt__part_add(mpt__job *job, const char *prefix, const char *name, const char *suffix,
                                mpt__part_kind kind, int type, size_t count) {
    mpt__part *part = &job->parts[job->count++];
    mpt__print(part->name, sizeof part->name, "%s%s%s", prefix, name, suffix);
    part->kind = kind;
    part->type = type;
    part->dims = 1;
    part->shape[0] = count;
    part->count = count;
    part->columns = count;
    return part;
}

/* Adds a tensor of a node, with PyTorch's shape; elements: the flat array on the device. */
static void mpt__list_tensor(mpt__job *job, const char *prefix, const mpt__node *node, int tensor, mpt__part_kind kind,
                             int type, void *elements) {
    const mpt_params *params = job->net->params;
    const size_t at = mpt__params_offset(params, tensor) * mpt__file_types[type].size;
    mpt__part *part =
        mpt__part_add(job, prefix, mpt_params_name(params, tensor), "", kind, type, mpt_params_count(params, tensor));
    const mpt__node *in = mpt__node_of(job->net, node->in[0]);
    const int dims = mpt__kind_of(node).weight_dims;
    part->id = tensor;
    part->device = elements ? (char *)elements + at : NULL;
    if (dims == 1 && node->H * node->W == 1) part->reads = node->in[0];
    if (node->shaped && tensor == node->bias) part->reads = (int)(node - job->net->nodes) + 1;
    if (node->shaped && tensor == node->weight) part->makes = (int)(node - job->net->nodes) + 1;
    if (dims < 2 || tensor == node->bias) return;
    part->dims = dims;
    part->shape[0] = (size_t)node->C;
    part->shape[1] = part->columns = part->count / (size_t)node->C;
    if (dims == 2) part->reads = node->in[0];
    if (dims == 2) return;
    if (in->H * in->W == 1 && node->conv.groups == 1) part->reads = node->in[0];
    part->shape[1] = part->inner = node->conv.C / node->conv.groups;
    part->shape[2] = node->conv.R;
    part->shape[3] = node->conv.S;
}

/* Adds the tensors up to `last`, in the order of the nodes. */
static void mpt__list_some(mpt__job *job, const char *prefix, mpt__part_kind kind, int type, void *elements, int last) {
    int id, i;
    for (id = 1; id <= job->net->count; id++) {
        const mpt__node *node = mpt__node_of(job->net, id);
        const int tensor[2] = {node->weight, node->bias};
        for (i = 0; i < 2; i++)
            if (tensor[i] && tensor[i] <= last) mpt__list_tensor(job, prefix, node, tensor[i], kind, type, elements);
    }
}

static void mpt__list_tensors(mpt__job *job, const char *prefix, mpt__part_kind kind, int type, void *elements) {
    const int tensors = mpt_params_tensors(job->net->params);
    mpt__list_some(job, prefix, kind, type, elements, tensors);
}

static void mpt__list_running(mpt__job *job) {
    static const char *const suffixes[] = {".running_mean", ".running_var"};
    int id, half;
    for (id = 1; id <= job->net->count; id++) {
        const mpt__node *node = mpt__node_of(job->net, id);
        const size_t C = (size_t)node->C;
        if (!mpt_model_running(job->net, id)) continue;
        for (half = 0; half < 2; half++) {
            mpt__part *part = mpt__part_add(job, "", node->name, suffixes[half], MPT__RUNNING, MPT_F32, C);
            part->id = id;
            part->device = job->net->running + node->running + (half ? C : 0);
            if (node->H * node->W == 1) part->reads = node->in[0];
        }
    }
}

enum { MPT__SETTINGS = 0, MPT__OPTIMIZER, MPT__SCALER, MPT__STATES, MPT__SETTINGS_VERSION = 2 };
enum { MPT__STATE_BYTES = 1 << 24 }; /* of a state that is read although its size is wrong, for its version */
static size_t mpt__state_words(const mpt__job *job, int which);

static void mpt__list_states(mpt__job *job) {
    static const char *const names[] = {"mpt.settings", "mpt.optimizer", "mpt.scaler"};
    int i;
    for (i = 0; i < MPT__STATES; i++)
        mpt__part_add(job, names[i], "", "", MPT__STATE, MPT__I64, mpt__state_words(job, i))->id = i;
}

/* Is a role in shards? */
static int mpt__role_sharded(const mpt_model *net, int role) {
    if (role >= MPT__MASTERS) return mpt__weights_sharded(net->params);
    return role && net->params->shard;
}

/* Tensors up to `last` of a role, if the model has it */
static void mpt__list_role(mpt__job *job, const char *prefix, int role, int type, int last) {
    const mpt_model *net = job->net;
    int i = job->count;
    void *elements = mpt__role_of(net, role);
    if (elements && mpt__role_sharded(net, role)) elements = net->params->grad;
    if (elements) mpt__list_some(job, prefix, MPT__RAW, type, elements, last);
    for (; i < job->count; i++) job->parts[i].role = role;
}

static void mpt__list_moments(mpt__job *job) {
    static const char *const names[] = {"mpt.moment1.", "mpt.moment2.", "mpt.moment3."};
    int i;
    for (i = 0; i < 3; i++) mpt__list_role(job, names[i], MPT__MOMENTS + i, MPT_F32, job->net->opt->op.tensors);
}

static int mpt__has_averages(const mpt__job *job) {
    static const char first[] = "mpt.average.";
    int i;
    if (!job->entries) return job->state->optimizer.applied > job->net->opt->op.average_from; /* to be saved */
    for (i = 0; i < job->entry_count; i++)
        if (strncmp(job->entries[i].name, first, sizeof first - 1) == 0) return 1;
    return 0;
}

static void mpt__list_averages(mpt__job *job) {
    const mpt_update_op *op = &job->net->opt->op;
    job->averages = op->average && mpt__has_averages(job);
    if (job->averages) mpt__list_role(job, "mpt.average.", MPT__AVERAGES, MPT_F32, op->tensors);
}

/* Adds the weights of a checkpoint as the policy keeps them: masters, or 16-bit weights and what belongs to them. */
static void mpt__list_kept(mpt__job *job) {
    const mpt_params *params = job->net->params;
    const int split = params->desc.master == MPT_MASTER_SPLIT;
    if (params->master) mpt__list_tensors(job, "", MPT__VALUES, MPT_F32, NULL);
    else mpt__list_tensors(job, "", MPT__RAW, (int)params->copy.type, params->copy.data);
    mpt__list_role(job, "mpt.low.", MPT__LOWS, split ? (int)MPT__U16 : (int)params->copy.type, params->count);
}

/* Lists all tensors, those with wide elements first, so that each begins at a multiple of its element's size. */
static mpt_result mpt__list(mpt__job *job) {
    const size_t nodes = (size_t)job->net->count, tensors = (size_t)job->net->params->count;
    const size_t most = MPT__STATES + 1 + 2 * nodes + 6 * tensors;
    job->parts = (mpt__part *)mpt__host_alloc(job->ctx, most * sizeof *job->parts);
    if (!job->parts) return MPT_ERROR_NO_MEMORY;
    if (!job->full) {
        mpt__list_running(job);
        mpt__list_tensors(job, "", MPT__VALUES, job->type, NULL);
        return mpt__check_orders(job);
    }
    mpt__list_states(job);
    mpt__list_moments(job);
    mpt__list_averages(job);
    mpt__list_running(job);
    mpt__list_kept(job);
    mpt__part_add(job, "mpt.sum", "", "", MPT__SUM, MPT__U8, 8);
    return MPT_OK;
}

/* -- Counters and settings -- one list of members each, walked to count, write, read or hash the words */

typedef struct mpt__walk {
    unsigned char *at; /* the next 8 bytes; NULL: only counted */
    int reading;
    size_t words;
    uint64_t hash;              /* of the words */
    const char *node, *differs; /* the first member whose value in the file differs, and its node, or ""... */
    double theirs, ours;        /* ...its value in the file and in the model */
    const char *unfit;          /* a member that cannot hold the file's value */
} mpt__walk;

static uint64_t mpt__walk_word(mpt__walk *w, uint64_t ours) {
    uint64_t theirs = ours;
    w->words++;
    w->hash = w->hash << 24 ^ mpt_hash(w->hash, ours, 0, 0);
    if (!w->at) return ours;
    if (w->reading) theirs = mpt__get_bytes(w->at, 8);
    else mpt__put_bytes(w->at, ours, 8);
    w->at += 8;
    return theirs;
}

/* A number in memory as a word: a float by its bits. One byte: an enum of -fshort-enums. */
static uint64_t mpt__word_of(const void *at, size_t size) {
    uint64_t word = 0;
    int32_t narrow = 0;
    if (size == sizeof word) {
        memcpy(&word, at, sizeof word);
        return word;
    }
    if (size == sizeof narrow) memcpy(&narrow, at, sizeof narrow);
    else narrow = *(const uint8_t *)at;
    return (uint64_t)(int64_t)narrow;
}

static void mpt__word_store(void *at, size_t size, uint64_t word) {
    const uint32_t narrow = (uint32_t)word;
    if (size == sizeof word) memcpy(at, &word, sizeof word);
    else if (size == sizeof narrow) memcpy(at, &narrow, sizeof narrow);
    else *(uint8_t *)at = (uint8_t)word;
}

/* For a message */
static double mpt__word_value(uint64_t word, size_t size, int real) {
    double value;
    if (real && size == sizeof(float)) return (double)mpt__float((uint32_t)word);
    if (real) {
        memcpy(&value, &word, sizeof value);
        return value;
    }
    if (size == sizeof word) return (double)word;
    return (double)(int64_t)word;
}

/* One number. Reading, it takes the file's value. */
static void mpt__walk_number(mpt__walk *w, const char *name, void *at, size_t size, int real) {
    const uint64_t ours = mpt__word_of(at, size), theirs = mpt__walk_word(w, ours);
    if (theirs == ours) return;
    mpt__word_store(at, size, theirs);
    if (mpt__word_of(at, size) != theirs) w->unfit = name;
    if (w->differs) return;
    w->differs = name;
    w->theirs = mpt__word_value(theirs, size, real);
    w->ours = mpt__word_value(ours, size, real);
}

static void mpt__walk_int(mpt__walk *w, const char *name, int value) {
    mpt__walk_number(w, name, &value, sizeof value, 0);
}

static void mpt__walk_uint64(mpt__walk *w, const char *name, uint64_t value) {
    mpt__walk_number(w, name, &value, sizeof value, 0);
}

static void mpt__walk_double(mpt__walk *w, const char *name, double value) {
    mpt__walk_number(w, name, &value, sizeof value, 1);
}

typedef struct mpt__member { /* a number in a struct */
    char name[40];           /* no pointer, so that tables need no relocation */
    uint16_t at;
    uint8_t size, real;
} mpt__member;

/* clang-format off */
#define MPT__INT(owner, member) {#member, offsetof(owner, member), sizeof(((owner *)0)->member), 0}
#define MPT__REAL(owner, member) {#member, offsetof(owner, member), sizeof(((owner *)0)->member), 1}
static const mpt__member mpt__scaler_members[] = {
    MPT__INT(mpt_scaler_state, version), MPT__REAL(mpt_scaler_state, scale), MPT__INT(mpt_scaler_state, growth_tracker),
    MPT__INT(mpt_scaler_state, hysteresis_left), MPT__INT(mpt_scaler_state, stuck), MPT__INT(mpt_scaler_state, updates),
    MPT__INT(mpt_scaler_state, overflows), MPT__INT(mpt_scaler_state, desc.mode),
    MPT__REAL(mpt_scaler_state, desc.init_scale), MPT__REAL(mpt_scaler_state, desc.growth_factor),
    MPT__REAL(mpt_scaler_state, desc.backoff_factor), MPT__REAL(mpt_scaler_state, desc.min_scale),
    MPT__REAL(mpt_scaler_state, desc.max_scale), MPT__INT(mpt_scaler_state, desc.growth_interval),
    MPT__INT(mpt_scaler_state, desc.hysteresis), MPT__INT(mpt_scaler_state, desc.patience),
    MPT__INT(mpt_scaler_state, desc.refill_when_clean), MPT__INT(mpt_scaler_state, desc.late_growth),
    MPT__INT(mpt_scaler_state, desc.unguarded), MPT__INT(mpt_scaler_state, desc.no_min),
    MPT__INT(mpt_scaler_state, desc.no_max)};
static const mpt__member mpt__counter_members[] = {
    MPT__INT(mpt_optimizer_state, version), MPT__INT(mpt_optimizer_state, found),
    MPT__INT(mpt_optimizer_state, attempted), MPT__INT(mpt_optimizer_state, applied),
    MPT__INT(mpt_optimizer_state, skipped), MPT__REAL(mpt_optimizer_state, beta1_power),
    MPT__REAL(mpt_optimizer_state, beta2_power), MPT__REAL(mpt_optimizer_state, grad_norm),
    MPT__REAL(mpt_optimizer_state, inv_scale), MPT__REAL(mpt_optimizer_state, schedule),
    MPT__REAL(mpt_optimizer_state, clip), MPT__REAL(mpt_optimizer_state, clip_value),
    MPT__INT(mpt_optimizer_state, moved), MPT__INT(mpt_optimizer_state, lost),
    MPT__REAL(mpt_optimizer_state, scan.sum_squares), MPT__INT(mpt_optimizer_state, scan.inf),
    MPT__INT(mpt_optimizer_state, scan.nan), MPT__INT(mpt_optimizer_state, scan.first)};
static const mpt__member mpt__skip_members[] = {
    MPT__INT(mpt_skip, step), MPT__REAL(mpt_skip, scale), MPT__INT(mpt_skip, tensor), MPT__INT(mpt_skip, inf),
    MPT__INT(mpt_skip, nan), MPT__INT(mpt_skip, reason)};
static const mpt__member mpt__train_members[] = {
    MPT__REAL(mpt_train_desc, clip_norm), MPT__REAL(mpt_train_desc, clip_value), MPT__INT(mpt_train_desc, seed),
    MPT__INT(mpt_train_desc, optimizer.kind), MPT__INT(mpt_train_desc, optimizer.nesterov),
    MPT__INT(mpt_train_desc, optimizer.amsgrad), MPT__INT(mpt_train_desc, optimizer.maximize),
    MPT__INT(mpt_train_desc, optimizer.meter), MPT__REAL(mpt_train_desc, optimizer.momentum),
    MPT__REAL(mpt_train_desc, optimizer.dampening), MPT__REAL(mpt_train_desc, optimizer.beta1),
    MPT__REAL(mpt_train_desc, optimizer.beta2), MPT__REAL(mpt_train_desc, optimizer.eps),
    MPT__INT(mpt_train_desc, optimizer.schedule.kind), MPT__INT(mpt_train_desc, optimizer.schedule.warmup),
    MPT__REAL(mpt_train_desc, optimizer.schedule.warmup_start), MPT__INT(mpt_train_desc, optimizer.schedule.steps),
    MPT__REAL(mpt_train_desc, optimizer.schedule.low), MPT__REAL(mpt_train_desc, optimizer.schedule.start),
    MPT__REAL(mpt_train_desc, optimizer.schedule.peak), MPT__INT(mpt_train_desc, optimizer.schedule.no_cycle_momentum),
    MPT__REAL(mpt_train_desc, optimizer.schedule.base_momentum),
    MPT__REAL(mpt_train_desc, optimizer.schedule.max_momentum)};
static const mpt__member mpt__node_members[] = {
    MPT__INT(mpt__node, kind), MPT__INT(mpt__node, in[0]), MPT__INT(mpt__node, in[1]), MPT__INT(mpt__node, no_bias),
    MPT__INT(mpt__node, init), MPT__INT(mpt__node, act), MPT__REAL(mpt__node, p), MPT__INT(mpt__node, conv.R),
    MPT__INT(mpt__node, conv.S), MPT__INT(mpt__node, conv.stride_h), MPT__INT(mpt__node, conv.stride_w),
    MPT__INT(mpt__node, conv.padding_h), MPT__INT(mpt__node, conv.padding_w), MPT__INT(mpt__node, conv.dilation_h),
    MPT__INT(mpt__node, conv.dilation_w), MPT__INT(mpt__node, conv.groups), MPT__INT(mpt__node, norm),
    MPT__INT(mpt__node, norm_shape.groups), MPT__REAL(mpt__node, norm_shape.eps), MPT__REAL(mpt__node, momentum),
    MPT__INT(mpt__node, no_affine), MPT__INT(mpt__node, pool_kind), MPT__INT(mpt__node, pool.R),
    MPT__INT(mpt__node, pool.S), MPT__INT(mpt__node, pool.stride_h), MPT__INT(mpt__node, pool.stride_w),
    MPT__INT(mpt__node, pool.padding_h), MPT__INT(mpt__node, pool.padding_w), MPT__INT(mpt__node, pool.exclude_padding),
    MPT__INT(mpt__node, first), MPT__REAL(mpt__node, negative_slope), MPT__INT(mpt__node, loss),
    MPT__REAL(mpt__node, loss_desc.label_smoothing), MPT__INT(mpt__node, loss_desc.ignore),
    MPT__INT(mpt__node, loss_desc.probabilities), MPT__INT(mpt__node, loss_desc.per_position),
    MPT__INT(mpt__node, loss_desc.weighted), MPT__INT(mpt__node, loss_desc.ignore_index),
    MPT__REAL(mpt__node, loss_desc.delta), MPT__INT(mpt__node, policy.param), MPT__INT(mpt__node, policy.compute),
    MPT__INT(mpt__node, type), MPT__INT(mpt__node, grad_type), MPT__INT(mpt__node, H), MPT__INT(mpt__node, W),
    MPT__INT(mpt__node, C)};
static const mpt__member mpt__slice_members[] = {
    MPT__REAL(mpt_tensor_slice, lr_factor), MPT__REAL(mpt_tensor_slice, weight_decay)};
/* clang-format on */

/* to NULL: they are not restored, only compared. */
static void mpt__walk_members(mpt__walk *w, const void *from, void *to, const mpt__member *members, size_t count) {
    const mpt__member *m;
    for (m = members; m < members + count; m++) {
        char number[8];
        memcpy(number, (const char *)from + m->at, m->size);
        mpt__walk_number(w, m->name, number, m->size, m->real);
        if (to) memcpy((char *)to + m->at, number, m->size);
    }
}
#define MPT__WALK(w, from, to, members) mpt__walk_members(w, from, to, members, sizeof members / sizeof *members)

/* Settings that are not restored but must be equal */
static void mpt__walk_settings(mpt__walk *w, const mpt_model *net) {
    mpt_train_desc train = net->train;
    int id;
    train.optimizer = mpt_optimizer_get_desc(net->opt);
    mpt__walk_int(w, "version", MPT__SETTINGS_VERSION);
    mpt__walk_int(w, "batch", train.batch);
    mpt__walk_uint64(w, "accumulate x ranks", (uint64_t)train.accumulate * (uint64_t)train.ranks.ranks);
    MPT__WALK(w, &train, NULL, mpt__train_members);
    mpt__walk_int(w, "kind of masters", (int)net->params->desc.master);
    for (id = 1; id <= net->count; id++) {
        const mpt__node *node = mpt__node_of(net, id);
        if (!w->differs) w->node = node->name;
        MPT__WALK(w, node, NULL, mpt__node_members);
    }
    mpt__walk_uint64(w, "class_weights or pos_weight", net->weights_sum);
    if (net->channels) mpt__walk_uint64(w, "scale and shift of bytes", net->bytes_sum);
}

/* A hash of these, and of settings that a checkpoint restores or that may differ from it. */
static uint64_t mpt__settings_hash(const mpt_model *net) {
    mpt_scaler_state scaler = mpt_scaler_start(&net->train.scaler);
    mpt__walk w = MPT_ZERO;
    mpt__walk_settings(&w, net);
    MPT__WALK(&w, &scaler, NULL, mpt__scaler_members);
    mpt__walk_int(&w, "accumulate", net->train.accumulate);
    mpt__walk_double(&w, "lr", net->train.optimizer.lr);
    mpt__walk_double(&w, "ema_decay", net->train.ema_decay);
    mpt__walk_int(&w, "shard_optimizer", net->train.shard_optimizer);
    mpt__walk_uint64(&w, "bucket_bytes", net->train.ranks.bucket_bytes);
    return w.hash;
}

static void mpt__walk_optimizer(mpt__walk *w, mpt__state *state, int tensors) {
    int i;
    MPT__WALK(w, &state->optimizer, &state->optimizer, mpt__counter_members);
    for (i = 0; i < MPT_JOURNAL; i++)
        MPT__WALK(w, &state->optimizer.journal[i], &state->optimizer.journal[i], mpt__skip_members);
    mpt__walk_number(w, "lr", &state->lr, sizeof state->lr, 1);
    for (i = 0; i < tensors; i++) MPT__WALK(w, &state->slices[i], &state->slices[i], mpt__slice_members);
}

static mpt__walk mpt__walk_state(const mpt__job *job, int which, unsigned char *at, int reading) {
    mpt__walk w = MPT_ZERO;
    w.at = at;
    w.reading = reading;
    w.node = "";
    if (which == MPT__SETTINGS) mpt__walk_settings(&w, job->net);
    if (which == MPT__OPTIMIZER) mpt__walk_optimizer(&w, job->state, job->net->opt->op.tensors);
    if (which == MPT__SCALER) MPT__WALK(&w, &job->state->scaler, &job->state->scaler, mpt__scaler_members);
    return w;
}

static size_t mpt__state_words(const mpt__job *job, int which) { return mpt__walk_state(job, which, NULL, 0).words; }

/* Allocates the state and fills it from the model. */
static mpt_result mpt__state_new(mpt__job *job) {
    const mpt_optimizer *opt = job->net->opt;
    const size_t table = (size_t)job->net->opt->op.tensors * sizeof(mpt_tensor_slice);
    mpt__state *state = (mpt__state *)mpt__host_alloc(job->ctx, sizeof *state + table);
    if (!state) return MPT_ERROR_NO_MEMORY;
    job->state = state;
    state->slices = (mpt_tensor_slice *)(state + 1);
    state->lr = mpt_optimizer_get_desc(opt).lr;
    if (table) memcpy(state->slices, opt->slices, table);
    MPT__TRY(mpt_optimizer_get_state(job->net->opt, &state->optimizer));
    return mpt_scaler_get_state(job->net->scaler, &state->scaler);
}

/* -- Saving -- */

static void mpt__put_shape(mpt__text *t, int dims, const uint64_t *shape) {
    int d;
    mpt__put_char(t, '[');
    for (d = 0; d < dims; d++) {
        if (d) mpt__put_char(t, ',');
        mpt__put_unsigned(t, shape[d]);
    }
    mpt__put_char(t, ']');
}

/* {"__metadata__":{"format":"pt"},"fc.weight":{"dtype":"F32","shape":[3,2],"data_offsets":[0,24]}}, and blanks to a
   multiple of 8 */
static size_t mpt__header_text(const mpt__job *job, char *out, size_t size) {
    size_t at = 0;
    mpt__text t;
    int i;
    t.at = out;
    t.end = out + size - 1;
    mpt__put_string(&t, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (i = 0; i < job->count; i++) {
        const mpt__part *part = &job->parts[i];
        mpt__put_string(&t, ",\"");
        mpt__put_string(&t, part->name);
        mpt__put_string(&t, "\":{\"dtype\":\"");
        mpt__put_string(&t, mpt__file_types[part->type].name);
        mpt__put_string(&t, "\",\"shape\":");
        mpt__put_shape(&t, part->dims, part->shape);
        mpt__put_string(&t, ",\"data_offsets\":[");
        mpt__put_unsigned(&t, at);
        mpt__put_char(&t, ',');
        at += mpt__part_bytes(part);
        mpt__put_unsigned(&t, at);
        mpt__put_string(&t, "]}");
    }
    mpt__put_char(&t, '}');
    while ((t.at - out) % 8) mpt__put_char(&t, ' ');
    return (size_t)(t.at - out);
}

static mpt_result mpt__make_header(mpt__job *job) {
    const size_t size = 64 + (size_t)job->count * 320;
    job->header = (char *)mpt__host_alloc(job->ctx, size);
    if (!job->header) return MPT_ERROR_NO_MEMORY;
    job->header_bytes = mpt__header_text(job, job->header, size);
    return MPT_OK;
}

static mpt_result mpt__need_written(const mpt__job *job, const void *bytes, size_t count) {
    if (job->disk->write(job->file, bytes, count)) return MPT_OK;
    return mpt__job_fail(job, MPT_ERROR_FILE, "%zu bytes could not be written to the temporary file", count);
}

static mpt_result mpt__write_header(const mpt__job *job) {
    unsigned char length[8];
    mpt__put_bytes(length, job->header_bytes, sizeof length);
    MPT__TRY(mpt__need_written(job, length, sizeof length));
    return mpt__need_written(job, job->header, job->header_bytes);
}

/* Converts elements of the model, in `raw`, to bytes of the file, in job->data. */
static mpt_result mpt__pack(const mpt__job *job, const mpt__part *part, const void *raw) {
    const size_t size = mpt__file_types[part->type].size, from = part->kind == MPT__VALUES ? sizeof(float) : size;
    size_t i;
    for (i = 0; i < part->count; i++) {
        uint32_t bits = mpt__get_element(raw, i, from);
        const float value = mpt__float(bits);
        if (from != size) bits = mpt_narrow(value, (mpt_dtype)part->type, MPT_ROUND_NEAREST, MPT_OVERFLOW_INF, 0);
        if (from != size && mpt__finite(value) && !mpt__finite(mpt_widen(bits, (mpt_dtype)part->type)))
            return mpt__job_fail(job, MPT_ERROR_VALUE, "element %zu of '%s' is %g, which %s does not hold", i,
                                 part->name, (double)value, mpt__file_types[part->type].name);
        mpt__put_bytes(job->data + mpt__part_index(job->net, part, i) * size, bits, size);
    }
    return MPT_OK;
}

/* What the values of trained weights are written from; 0: from the copies */
static int mpt__values_role(const mpt__job *job) {
    const mpt_model *net = job->net;
    if (!job->full && mpt__uses_average(net, net->opt->mirror.applied)) return MPT__AVERAGES;
    if (net->params->master) return MPT__MASTERS;
    if (net->params->low) return MPT__LOWS;
    return 0;
}

/* Is a role written that must be put together? */
static int mpt__must_collect(const mpt__job *job, int role) {
    const mpt_model *net = job->net;
    if (!job->saves || !mpt__role_sharded(net, role) || !mpt__role_of(net, role)) return 0;
    if (!job->full) return role == mpt__values_role(job);
    return role != MPT__AVERAGES || net->opt->mirror.applied > net->opt->op.average_from;
}

/* Puts together what is written next, and what comes before it on all ranks. */
static mpt_result mpt__collect_up_to(mpt__job *job, int role) {
    while (job->collected < role)
        if (mpt__must_collect(job, ++job->collected)) MPT__TRY(mpt__collect(job->net, job->collected));
    return MPT_OK;
}

/* The numbers of a tensor that are to be saved */
static mpt_result mpt__read_weights(mpt__job *job, const mpt__part *part, float *out) {
    const mpt_model *net = job->net;
    const int frozen = part->id > net->opt->op.tensors, role = frozen ? 0 : mpt__values_role(job);
    MPT__TRY(mpt__collect_up_to(job, role));
    if (role != MPT__AVERAGES) return mpt__params_read(net->params, part->id, out);
    return mpt_download(job->ctx, out, mpt__averages(net) + mpt__params_offset(net->params, part->id),
                        part->count * sizeof *out);
}

static mpt_result mpt__read_raw(mpt__job *job, const mpt__part *part, void *out) {
    mpt_params *params = job->net->params;
    MPT__TRY(mpt__collect_up_to(job, part->role));
    if (part->role == MPT__LOWS) return mpt__part_download(params, params->low, sizeof *params->low, part->id, out);
    return mpt_download(job->ctx, out, part->device, mpt__part_bytes(part));
}

static mpt_result mpt__write_part(mpt__job *job, const mpt__part *part, uint64_t *sum) {
    const size_t bytes = mpt__part_bytes(part);
    void *raw = job->staging;
    if (part->kind == MPT__STATE) mpt__walk_state(job, part->id, job->data, 0);
    else if (part->kind == MPT__SUM) mpt__put_bytes(job->data, *sum, bytes);
    else {
        if (part->kind == MPT__VALUES) MPT__TRY(mpt__read_weights(job, part, (float *)raw));
        else MPT__TRY(mpt__read_raw(job, part, raw));
        MPT__TRY(mpt__pack(job, part, raw));
    }
    *sum = mpt__sum_bytes(*sum, job->data, bytes);
    return mpt__need_written(job, job->data, bytes);
}

MPT__COLD static mpt_result mpt__write_all(mpt__job *job) {
    size_t most = 0;
    uint64_t sum = 0;
    int i;
    for (i = 0; i < job->count; i++)
        if (job->parts[i].count > most) most = job->parts[i].count;
    job->data = (unsigned char *)mpt__host_alloc(job->ctx, most * 8); /* no element has more */
    job->staging = (char *)mpt__host_alloc(job->ctx, most * sizeof(float));
    if (!job->data || !job->staging) return MPT_ERROR_NO_MEMORY;
    MPT__TRY(mpt__write_header(job));
    for (i = 0; i < job->count; i++) MPT__TRY(mpt__write_part(job, &job->parts[i], &sum));
    return MPT_OK;
}

/* Collects what is to be saved. */
static mpt_result mpt__save_prepare(mpt__job *job) {
    MPT__TRY(mpt__need_unfolded(job->net, job->call));
    MPT__TRY(mpt__state_new(job));
    MPT__TRY(mpt__list(job));
    return mpt__make_header(job);
}

static mpt_result mpt__save_to_buffer(mpt__job *job) {
    mpt__memory_file *buffer = (mpt__memory_file *)job->file;
    const size_t capacity = buffer->size;
    int i;
    MPT__TRY(mpt__save_prepare(job));
    buffer->size = 8 + job->header_bytes;
    for (i = 0; i < job->count; i++) buffer->size += mpt__part_bytes(&job->parts[i]);
    if (!buffer->to) return MPT_OK;
    if (buffer->size > capacity)
        return mpt__job_fail(job, MPT_ERROR_ARGUMENT, "the file has %zu bytes, capacity is %zu", buffer->size,
                             capacity);
    return mpt__write_all(job);
}

#ifndef MPT_NO_STDIO
/* Writes the temporary file, then renames it, or removes it on failure. */
static mpt_result mpt__save_to(mpt__job *job, const char *temporary) {
    const mpt__disk *disk = job->disk;
    mpt_result r;
    int closed;
    job->file = disk->open(temporary, 1);
    if (!job->file) return mpt__job_fail(job, MPT_ERROR_FILE, "'%s' cannot be opened to be written", temporary);
    r = mpt__write_all(job);
    closed = disk->close(job->file, r == MPT_OK);
    if (r == MPT_OK && !closed) r = mpt__job_fail(job, MPT_ERROR_FILE, "'%s' cannot be brought to the disk", temporary);
    if (r == MPT_OK && !disk->rename(temporary, job->path))
        r = mpt__job_fail(job, MPT_ERROR_FILE, "'%s' cannot be renamed to it", temporary);
    if (r != MPT_OK) disk->remove(temporary);
    return r;
}

/* A number that differs from that of any other writer of the same file at the same time: a hash of the process and of
   the address of this job on its stack. */
static uint32_t mpt__writer(const mpt__job *job) {
#if defined(_WIN32)
    const uint64_t process = (uint64_t)_getpid();
#elif defined(MPT__POSIX)
    const uint64_t process = (uint64_t)getpid();
#else
    const uint64_t process = 0;
#endif
    return mpt_hash(process, (uint64_t)(uintptr_t)job, (uint64_t)(uintptr_t)job->net, 0);
}

/* The file that a symbolic link leads to, so that the link stays one; NULL: the path is no link, or leads nowhere. */
static char *mpt__linked(const mpt__job *job, mpt_result *r) {
#ifdef MPT__POSIX
    enum { LONGEST = 4096 };
    char *target = job->disk == &mpt__stdio ? (char *)mpt__host_alloc(job->ctx, LONGEST + 1) : NULL;
    *r = target || job->disk != &mpt__stdio ? MPT_OK : MPT_ERROR_NO_MEMORY;
    if (!target || mpt__sys_realpath(job->path, target)) return target;
    mpt__host_free(job->ctx, target);
    return NULL;
#else
    (void)job;
    *r = MPT_OK;
    return NULL;
#endif
}

static mpt_result mpt__save_file(mpt__job *job) {
    const char *given = job->path;
    size_t size;
    char *temporary, *target;
    mpt_result r;
    MPT__TRY(mpt__save_prepare(job));
    target = mpt__linked(job, &r);
    MPT__TRY(r);
    if (target) job->path = target;
    size = strlen(job->path) + 16;
    temporary = (char *)mpt__host_alloc(job->ctx, size);
    if (temporary) mpt__print(temporary, size, "%s.%d.tmp", job->path, (int)(mpt__writer(job) >> 1));
    r = temporary ? mpt__save_to(job, temporary) : MPT_ERROR_NO_MEMORY;
    job->path = given;
    mpt__host_free(job->ctx, temporary);
    mpt__host_free(job->ctx, target);
    return r;
}
#endif /* MPT_NO_STDIO */

/* -- Reading a header -- JSON, of this one form. A 0 follows the header, and replaces the quote that ends a string. */

static mpt_result mpt__json_fail(const mpt__job *job, const char *what) {
    return mpt__job_fail(job, MPT_ERROR_FILE, "byte %zu of the header: %s", (size_t)(job->at - job->header), what);
}

static int mpt__json_take(mpt__job *job, char c) {
    while (*job->at && strchr(" \t\r\n", *job->at)) job->at++;
    if (*job->at != c || !c) return 0;
    job->at++;
    return 1;
}

static mpt_result mpt__json_need(mpt__job *job, char c) {
    char what[] = "want '?'";
    what[6] = c;
    if (mpt__json_take(job, c)) return MPT_OK;
    return mpt__json_fail(job, what);
}

/* The four digits of a \u escape at job->at, or -1 */
static int mpt__json_unit(mpt__job *job) {
    int unit = 0, i;
    for (i = 0; i < 4; i++, job->at++) {
        const char c = *job->at;
        int digit = -1;
        if (c >= '0' && c <= '9') digit = c - '0';
        if (c >= 'a' && c <= 'f') digit = c - 'a' + 10;
        if (c >= 'A' && c <= 'F') digit = c - 'A' + 10;
        if (digit < 0) return -1;
        unit = unit * 16 + digit;
    }
    return unit;
}

/* Converts a \u escape, or a surrogate pair of two, to UTF-8 at *out; the result is never longer than the escape. */
static mpt_result mpt__json_unicode(mpt__job *job, char **out) {
    int unit = mpt__json_unit(job), low = 0;
    char *to = *out;
    if (unit >= 0xd800 && unit < 0xdc00 && job->at[0] == '\\' && job->at[1] == 'u') {
        job->at += 2;
        low = mpt__json_unit(job);
        if (low < 0xdc00 || low > 0xdfff) return mpt__json_fail(job, "half a pair of surrogates");
        unit = 0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00);
    }
    if (unit <= 0 || (unit >= 0xd800 && unit < 0xe000))
        return mpt__json_fail(job, "an escape that is no character, half a pair of surrogates, or 0");
    if (unit < 0x80) *to++ = (char)unit;
    else {
        if (unit < 0x800) *to++ = (char)(0xc0 | unit >> 6);
        else {
            if (unit < 0x10000) *to++ = (char)(0xe0 | unit >> 12);
            else {
                *to++ = (char)(0xf0 | unit >> 18);
                *to++ = (char)(0x80 | (unit >> 12 & 63));
            }
            *to++ = (char)(0x80 | (unit >> 6 & 63));
        }
        *to++ = (char)(0x80 | (unit & 63));
    }
    *out = to;
    return MPT_OK;
}

/* Reads a string, replacing its escapes in place. */
static mpt_result mpt__json_string(mpt__job *job, const char **out) {
    static const char escapes[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    char *to;
    MPT__TRY(mpt__json_need(job, '"'));
    to = job->at;
    *out = to;
    while (*job->at != '"') {
        const char c = *job->at++;
        const char *escape;
        if ((unsigned char)c < 32) {
            job->at--;
            return mpt__json_fail(job, "a string with a control code, or without an end");
        }
        if (c != '\\') {
            *to++ = c;
            continue;
        }
        if (*job->at == 'u') {
            job->at++;
            MPT__TRY(mpt__json_unicode(job, &to));
            continue;
        }
        escape = *job->at ? strchr(escapes, *job->at) : NULL;
        if (!escape) return mpt__json_fail(job, "an unknown escape");
        *to++ = meant[escape - escapes];
        job->at++;
    }
    job->at++;
    *to = 0;
    return MPT_OK;
}

static int mpt__json_word(mpt__job *job, const char *word) {
    const size_t length = strlen(word);
    mpt__json_take(job, 0); /* blanks */
    if (strncmp(job->at, word, length) != 0) return 0;
    job->at += length;
    return 1;
}

/* A JSON number such as -1.5e+3 */
static int mpt__json_real(mpt__job *job) {
    const char *first;
    int part;
    if (*job->at == '-') job->at++;
    for (part = 0; part < 3; part++) {
        if (part == 1 && *job->at != '.') continue;
        if (part == 2 && *job->at != 'e' && *job->at != 'E') continue;
        if (part) job->at++;
        if (part == 2 && (*job->at == '+' || *job->at == '-')) job->at++;
        first = job->at;
        while (*job->at >= '0' && *job->at <= '9') job->at++;
        if (job->at == first || (!part && *first == '0' && job->at > first + 1)) return 0;
    }
    return 1;
}

/* Skips any value. Nested lists and objects are kept on a stack of bits, 64 deep: 1 is an object. */
static mpt_result mpt__json_value(mpt__job *job) {
    uint64_t objects = 0;
    int depth = 0;
    const char *text;
    for (;;) {
        const int opened = mpt__json_take(job, '{') ? 2 : mpt__json_take(job, '[');
        if (opened) {
            if (depth == 64) return mpt__json_fail(job, "over 64 lists and objects in one another");
            objects = objects << 1 | (uint64_t)(opened == 2);
            depth++;
            if (!mpt__json_take(job, opened == 2 ? '}' : ']')) {
                if (opened == 1) continue;
                MPT__TRY(mpt__json_string(job, &text));
                MPT__TRY(mpt__json_need(job, ':'));
                continue;
            }
            objects >>= 1;
            depth--;
        } else if (*job->at == '"') MPT__TRY(mpt__json_string(job, &text));
        else if (!mpt__json_word(job, "null") && !mpt__json_word(job, "true") && !mpt__json_word(job, "false") &&
                 !mpt__json_real(job))
            return mpt__json_fail(job, "want a value");
        while (depth && !mpt__json_take(job, ',')) {
            MPT__TRY(mpt__json_need(job, objects & 1 ? '}' : ']'));
            objects >>= 1;
            depth--;
        }
        if (!depth) return MPT_OK;
        if (!(objects & 1)) continue;
        MPT__TRY(mpt__json_string(job, &text));
        MPT__TRY(mpt__json_need(job, ':'));
    }
}

/* How many bytes follow the first byte of a character; -1: no character begins with it */
static int mpt__utf8_follow(unsigned char first) {
    if (first < 0x80) return 0;
    if (first < 0xc2 || first > 0xf4) return -1;
    if (first < 0xe0) return 1;
    if (first < 0xf0) return 2;
    return 3;
}

/* Is it all UTF-8 by RFC 3629: shortest forms, no surrogates, nothing above 0x10ffff? */
static int mpt__is_utf8(const char *text, size_t bytes) {
    const unsigned char *at = (const unsigned char *)text, *end = at + bytes;
    while (at < end) {
        const unsigned char c = *at++;
        const int more = mpt__utf8_follow(c);
        int i;
        if (more < 0 || end - at < more) return 0;
        if ((c == 0xe0 && *at < 0xa0) || (c == 0xed && *at > 0x9f)) return 0;
        if ((c == 0xf0 && *at < 0x90) || (c == 0xf4 && *at > 0x8f)) return 0;
        for (i = 0; i < more; i++)
            if ((*at++ & 0xc0) != 0x80) return 0;
    }
    return 1;
}

static mpt_result mpt__json_number(mpt__job *job, uint64_t *out) {
    const char *first;
    mpt__json_take(job, 0); /* blanks */
    first = job->at;
    *out = 0;
    for (; *job->at >= '0' && *job->at <= '9'; job->at++) {
        const uint64_t digit = (uint64_t)(*job->at - '0');
        if (*out > ((uint64_t)-1 - digit) / 10) return mpt__json_fail(job, "a number of over 64 bits");
        *out = *out * 10 + digit;
    }
    if (job->at == first || (*first == '0' && job->at > first + 1)) return mpt__json_fail(job, "want a whole number");
    return MPT_OK;
}

static mpt_result mpt__json_numbers(mpt__job *job, uint64_t *out, int most, int *count) {
    *count = 0;
    MPT__TRY(mpt__json_need(job, '['));
    if (mpt__json_take(job, ']')) return MPT_OK;
    do {
        if (*count == most) return mpt__json_fail(job, "too many numbers");
        MPT__TRY(mpt__json_number(job, &out[(*count)++]));
    } while (mpt__json_take(job, ','));
    return mpt__json_need(job, ']');
}

/* Skips the metadata, an object of strings. */
static mpt_result mpt__json_metadata(mpt__job *job) {
    const char *text;
    if (mpt__json_word(job, "null")) return MPT_OK;
    MPT__TRY(mpt__json_need(job, '{'));
    if (mpt__json_take(job, '}')) return MPT_OK;
    do {
        MPT__TRY(mpt__json_string(job, &text));
        MPT__TRY(mpt__json_need(job, ':'));
        MPT__TRY(mpt__json_string(job, &text));
    } while (mpt__json_take(job, ','));
    return mpt__json_need(job, '}');
}

static mpt_result mpt__json_type(mpt__job *job, mpt__entry *entry) {
    const char *name;
    MPT__TRY(mpt__json_string(job, &name));
    for (entry->type = 0; entry->type < MPT__FILE_TYPES; entry->type++)
        if (strcmp(name, mpt__file_types[entry->type].name) == 0) return MPT_OK;
    return mpt__job_fail(job, MPT_ERROR_UNSUPPORTED, "'%s' has the unknown type '%s'", entry->name, name);
}

/* The index of a word in a list; `count` if it is not in it */
static int mpt__word_index(const char *word, const char *const *words, int count) {
    int i;
    for (i = 0; i < count; i++)
        if (strcmp(word, words[i]) == 0) return i;
    return count;
}

/* Reads the three members, in any order, each once; skips others. */
static mpt_result mpt__json_tensor(mpt__job *job, mpt__entry *entry) {
    static const char *const members[] = {"dtype", "shape", "data_offsets"};
    uint64_t places[2] = {0, 0};
    const char *key;
    int seen = 0, count = 0, member;
    MPT__TRY(mpt__json_need(job, '{'));
    do {
        MPT__TRY(mpt__json_string(job, &key));
        MPT__TRY(mpt__json_need(job, ':'));
        member = mpt__word_index(key, members, 3);
        if (member == 3) {
            MPT__TRY(mpt__json_value(job));
            continue;
        }
        if (seen & 1 << member) return mpt__json_fail(job, "a member that is there twice");
        seen |= 1 << member;
        if (member == 0) MPT__TRY(mpt__json_type(job, entry));
        if (member == 1) MPT__TRY(mpt__json_numbers(job, entry->shape, MPT__DIMS, &entry->dims));
        if (member == 2) MPT__TRY(mpt__json_numbers(job, places, 2, &count));
    } while (mpt__json_take(job, ','));
    MPT__TRY(mpt__json_need(job, '}'));
    if (seen != 7 || count != 2) return mpt__json_fail(job, "a tensor without type, shape or both its places");
    entry->begin = places[0];
    entry->end = places[1];
    return MPT_OK;
}

static mpt_result mpt__json_member(mpt__job *job, int *metadata) {
    mpt__entry *entry, *table;
    const char *name;
    MPT__TRY(mpt__json_string(job, &name));
    MPT__TRY(mpt__json_need(job, ':'));
    if (strcmp(name, "__metadata__") == 0) {
        if ((*metadata)++) return mpt__json_fail(job, "__metadata__ is there twice");
        return mpt__json_metadata(job);
    }
    table = (mpt__entry *)mpt__grow(job->ctx, job->entries, job->entry_count, &job->entry_capacity, sizeof *table);
    if (!table) return MPT_ERROR_NO_MEMORY;
    job->entries = table;
    entry = &table[job->entry_count++];
    memset(entry, 0, sizeof *entry);
    entry->name = name;
    return mpt__json_tensor(job, entry);
}

static mpt_result mpt__json_header(mpt__job *job, size_t bytes) {
    int metadata = 0;
    job->at = job->header;
    if (!mpt__is_utf8(job->header, bytes)) return mpt__json_fail(job, "it is not UTF-8");
    MPT__TRY(mpt__json_need(job, '{'));
    if (!mpt__json_take(job, '}')) {
        do MPT__TRY(mpt__json_member(job, &metadata));
        while (mpt__json_take(job, ','));
        MPT__TRY(mpt__json_need(job, '}'));
    }
    mpt__json_take(job, 0);
    if (job->at == job->header + bytes) return MPT_OK;
    return mpt__json_fail(job, "want the end");
}

/* -- Reading a file -- */

static int mpt__lies_before(const mpt__entry *a, const mpt__entry *b) {
    if (a->begin != b->begin) return a->begin < b->begin;
    return a->end < b->end;
}

/* Sorts by position in the file. Heapsort needs no memory, and no file can make it slow. */
static void mpt__sort(mpt__entry *entries, size_t count) {
    size_t start = count / 2, end = count, parent, child;
    mpt__entry kept;
    while (end > 1) {
        if (start) kept = entries[--start];
        else {
            kept = entries[--end];
            entries[end] = entries[0];
        }
        for (parent = start; (child = 2 * parent + 1) < end; parent = child) {
            if (child + 1 < end && mpt__lies_before(&entries[child], &entries[child + 1])) child++;
            if (!mpt__lies_before(&kept, &entries[child])) break;
            entries[parent] = entries[child];
        }
        entries[parent] = kept;
    }
}

/* Checks that a tensor has as many bytes as its type and shape say. */
static mpt_result mpt__check_entry(const mpt__job *job, const mpt__entry *entry) {
    uint64_t bytes = mpt__file_types[entry->type].size;
    int d;
    for (d = 0; d < entry->dims; d++)
        if (!entry->shape[d]) bytes = 0;
    for (d = 0; d < entry->dims; d++) {
        if (bytes && entry->shape[d] > (uint64_t)-1 / bytes)
            return mpt__job_fail(job, MPT_ERROR_FILE, "the size of '%s' overflows", entry->name);
        bytes *= entry->shape[d];
    }
    if (entry->end < entry->begin || entry->end - entry->begin != bytes)
        return mpt__job_fail(job, MPT_ERROR_FILE, "'%s' has %zu bytes by its shape, but lies from %zu to %zu",
                             entry->name, (size_t)bytes, (size_t)entry->begin, (size_t)entry->end);
    return MPT_OK;
}

/* Checks that the tensors fill the data one after another. */
static mpt_result mpt__check_layout(mpt__job *job) {
    uint64_t at = 0;
    int i;
    mpt__sort(job->entries, (size_t)job->entry_count);
    for (i = 0; i < job->entry_count; i++) {
        const mpt__entry *entry = &job->entries[i];
        MPT__TRY(mpt__check_entry(job, entry));
        if (entry->begin != at)
            return mpt__job_fail(job, MPT_ERROR_FILE, "'%s' starts at %zu, but the data before it ends at %zu",
                                 entry->name, (size_t)entry->begin, (size_t)at);
        at = entry->end;
    }
    if (at == job->data_bytes) return MPT_OK;
    return mpt__job_fail(job, MPT_ERROR_FILE, "the tensors have %zu bytes, but %zu follow the header", (size_t)at,
                         job->data_bytes);
}

/* Reads the header in growing pieces, so that a false length does not ask for much more memory than the file
   justifies. */
static mpt_result mpt__read_json(mpt__job *job, size_t bytes) {
    size_t have = 0, room = 0;
    while (have < bytes) {
        const size_t some = mpt__min(bytes - have, have ? have : 4096);
        char *bigger = (char *)mpt__host_alloc(job->ctx, have + some + 1);
        if (!bigger) return MPT_ERROR_NO_MEMORY;
        if (have) memcpy(bigger, job->header, have);
        mpt__host_free(job->ctx, job->header);
        job->header = bigger;
        room = have + some;
        if (!job->disk->read(job->file, job->header + have, some))
            return mpt__job_fail(job, MPT_ERROR_FILE, "the header cannot be read");
        have = room;
        job->at = job->header;
        if (!strchr(" \t\r\n{", *job->at) || !*job->at) return mpt__json_fail(job, "want '{'");
    }
    return mpt__json_header(job, bytes);
}

/* Reads and checks the header. */
static mpt_result mpt__read_header(mpt__job *job) {
    static const struct {
        const char *starts, *what;
    } others[] = {{"PK\3\4", "a zip file, as torch.save writes; safetensors.torch.save_file writes what is read here"},
                  {"\x80\2}q", "a pickle of an old torch.save; safetensors.torch.save_file writes what is read here"},
                  {"version ", "a git-lfs pointer, not the file; `git lfs pull` fetches it"},
                  {"<!DOCTYP", "a web page, not the file; a download went wrong"},
                  {"<!doctyp", "a web page, not the file; a download went wrong"},
                  {"<html", "a web page, not the file; a download went wrong"},
                  {"\x1f\x8b", "compressed; gzip -d unpacks it"}};
    const mpt__disk *disk = job->disk;
    unsigned char length[8];
    uint64_t size, header;
    int i;
    if (!disk->size(job->file, &size) || size < sizeof length || !disk->read(job->file, length, sizeof length))
        return mpt__job_fail(job, MPT_ERROR_FILE, "cannot be read, or has under 8 bytes");
    header = mpt__get_bytes(length, sizeof length);
    size -= sizeof length;
    for (i = 0; i < (int)(sizeof others / sizeof *others); i++)
        if (memcmp(length, others[i].starts, strlen(others[i].starts)) == 0)
            return mpt__job_fail(job, MPT_ERROR_FILE, "this is %s", others[i].what);
    if (header > size || header > MPT__HEADER || size - header > (size_t)-1 / 2)
        return mpt__job_fail(job, MPT_ERROR_FILE, "a header of %zu bytes (at most %d), and %zu bytes follow",
                             (size_t)header, (int)MPT__HEADER, (size_t)size);
    if (!header) return mpt__job_fail(job, MPT_ERROR_FILE, "the header has 0 bytes: want '{'");
    job->data_bytes = (size_t)(size - header);
    MPT__TRY(mpt__read_json(job, (size_t)header));
    return mpt__check_layout(job);
}

/* Reads `bytes` to `to`, or skips them if that is NULL. */
static mpt_result mpt__read_some(mpt__job *job, unsigned char *to, uint64_t bytes) {
    unsigned char passed[512];
    while (bytes) {
        const size_t some = to || bytes < sizeof passed ? (size_t)bytes : sizeof passed;
        if (!job->disk->read(job->file, to ? to : passed, some))
            return mpt__job_fail(job, MPT_ERROR_FILE, "its %zu bytes of data cannot be read", job->data_bytes);
        bytes -= some;
    }
    return MPT_OK;
}

/* Reads the tensors that were matched, which are no more than the model has, one after another. Their begin and end are
   positions in job->data from here on. */
static mpt_result mpt__read_data(mpt__job *job) {
    uint64_t bytes = 0;
    int i;
    for (i = 0; i < job->entry_count; i++)
        if (job->entries[i].used) bytes += job->entries[i].end - job->entries[i].begin;
    job->data = (unsigned char *)mpt__host_alloc(job->ctx, (size_t)bytes);
    if (!job->data) return MPT_ERROR_NO_MEMORY;
    bytes = 0;
    for (i = 0; i < job->entry_count; i++) {
        mpt__entry *entry = &job->entries[i];
        const uint64_t size = entry->end - entry->begin;
        MPT__TRY(mpt__read_some(job, entry->used ? job->data + bytes : NULL, size));
        if (!entry->used) continue;
        entry->begin = bytes;
        entry->end = bytes + size;
        bytes += size;
    }
    return MPT_OK;
}

/* -- Loading -- */

static const unsigned char *mpt__part_source(const mpt__job *job, const mpt__part *part) {
    return job->data + part->entry->begin;
}

/* Each state begins with its version. */
static mpt_result mpt__match_version(const mpt__job *job, const mpt__part *part) {
    static const unsigned versions[] = {MPT__SETTINGS_VERSION, MPT_OPTIMIZER_STATE_VERSION, MPT_SCALER_STATE_VERSION};
    const uint64_t version =
        part->entry->end - part->entry->begin < 8 ? 0 : mpt__get_bytes(mpt__part_source(job, part), 8);
    if (version == versions[part->id]) return MPT_OK;
    return mpt__job_fail(job, MPT_ERROR_UNSUPPORTED, "'%s' has version %zu, this is version %d", part->name,
                         (size_t)version, (int)versions[part->id]);
}

static int mpt__fits_shape(const mpt__part *part) {
    const mpt__entry *entry = part->entry;
    return entry->dims == part->dims &&
           memcmp(entry->shape, part->shape, (size_t)part->dims * sizeof *part->shape) == 0;
}

static mpt_result mpt__match_shape(const mpt__job *job, const mpt__part *part) {
    const mpt__entry *entry = part->entry;
    char shapes[2][64];
    mpt__text t;
    if (mpt__fits_shape(part)) return MPT_OK;
    t.at = shapes[0];
    t.end = shapes[0] + sizeof shapes[0] - 1;
    mpt__put_shape(&t, entry->dims, entry->shape);
    t.at = shapes[1];
    t.end = shapes[1] + sizeof shapes[1] - 1;
    mpt__put_shape(&t, part->dims, part->shape);
    return mpt__job_fail(job, MPT_ERROR_SHAPE, "'%s' is %s, the model's is %s", part->name, shapes[0], shapes[1]);
}

/* Does this entry of the file have the name of a tensor of the model? */
static int mpt__is_named(const mpt__job *job, const mpt__entry *entry, const char *name) {
    const char *prefix = job->load.prefix ? job->load.prefix : "";
    const size_t length = strlen(prefix);
    return strncmp(entry->name, prefix, length) == 0 && strcmp(entry->name + length, name) == 0;
}

/* Finds the only tensor with the name of the part; entry stays NULL if there is none. */
static mpt_result mpt__match_name(const mpt__job *job, mpt__part *part) {
    int i;
    for (i = 0; i < job->entry_count; i++) {
        if (!mpt__is_named(job, &job->entries[i], part->name)) continue;
        if (part->entry) return mpt__job_fail(job, MPT_ERROR_FILE, "two tensors are named '%s'", part->name);
        part->entry = &job->entries[i];
        job->entries[i].used = 1;
    }
    return MPT_OK;
}

/* A tensor must have the part's type; weights may have any of the three. */
static int mpt__fits_type(const mpt__job *job, const mpt__part *part) {
    return part->entry->type == part->type || (!job->full && part->entry->type <= (int)MPT_BF16);
}

static mpt_result mpt__match(const mpt__job *job, mpt__part *part) {
    MPT__TRY(mpt__match_name(job, part));
    if (!part->entry) return mpt__job_fail(job, MPT_ERROR_SHAPE, "'%s' is missing", part->name);
    if (mpt__fits_type(job, part)) return MPT_OK;
    return mpt__job_fail(job, MPT_ERROR_TYPE, "'%s' is %s, not %s", part->name, mpt__file_types[part->entry->type].name,
                         mpt__file_types[part->type].name);
}

static void mpt__tell_outcome(const mpt__job *job, const char *name, mpt_load_outcome outcome) {
    if (job->load.tell) job->load.tell(name, outcome, job->load.user);
}

/* A running mean without its variance, or the other way round: neither is loaded. */
static int mpt__is_half(const mpt__job *job, int i) {
    const mpt__part *part = &job->parts[i];
    int other;
    if (part->kind != MPT__RUNNING) return 0;
    for (other = 0; other < job->count; other++)
        if (other != i && job->parts[other].kind == MPT__RUNNING && job->parts[other].id == part->id)
            return !job->parts[other].entry;
    return 1;
}

/* Drops the parts that are missing in the file or do not fit. */
static mpt_result mpt__match_partly(mpt__job *job) {
    int i, kept = 0;
    for (i = 0; i < job->count; i++) {
        mpt__part *part = &job->parts[i];
        MPT__TRY(mpt__match_name(job, part));
        if (!part->entry) mpt__tell_outcome(job, part->name, MPT_LOAD_MISSING);
        if (!part->entry || (mpt__fits_type(job, part) && mpt__fits_shape(part))) continue;
        mpt__tell_outcome(job, part->name, MPT_LOAD_UNFIT);
        part->entry = NULL;
    }
    for (i = 0; i < job->entry_count; i++) job->entries[i].used = 0;
    for (i = 0; i < job->count; i++)
        if (job->parts[i].entry && mpt__is_half(job, i)) job->parts[i].half = 1;
    for (i = 0; i < job->count; i++) {
        if (!job->parts[i].entry || job->parts[i].half) continue;
        mpt__tell_outcome(job, job->parts[i].name, MPT_LOADED);
        job->entries[job->parts[i].entry - job->entries].used = 1;
        job->parts[kept++] = job->parts[i];
    }
    job->count = kept;
    return MPT_OK;
}

/* Is it a state of another size? Then its version, which is in the data, gives the better reason. */
static int mpt__unlike(const mpt__part *part) {
    const mpt__entry *entry = part->entry;
    return part->kind == MPT__STATE && (entry->dims != 1 || entry->shape[0] != part->shape[0]) &&
           entry->end - entry->begin <= MPT__STATE_BYTES;
}

/* Checks versions and sizes of the states, once the data is read. */
static mpt_result mpt__match_states(mpt__job *job) {
    int i;
    for (i = 0; i < MPT__STATES; i++) {
        MPT__TRY(mpt__match_version(job, &job->parts[i]));
        MPT__TRY(mpt__match_shape(job, &job->parts[i]));
    }
    return MPT_OK;
}

/* May the file have this tensor though the model does not use it? Weights may be in a checkpoint, or beside the counts
   of PyTorch's batch norms. */
static int mpt__may_stay(const mpt__job *job, const mpt__entry *entry) {
    static const char batches[] = ".num_batches_tracked";
    const size_t length = strlen(entry->name), end = sizeof batches - 1;
    if (entry->used) return 1;
    return !job->full &&
           (strncmp(entry->name, "mpt.", 4) == 0 || (length > end && strcmp(entry->name + length - end, batches) == 0));
}

static mpt_result mpt__match_all(mpt__job *job) {
    int i;
    if (job->load.partly) {
        MPT__TRY(mpt__match_partly(job));
    } else {
        for (i = 0; i < job->count; i++) {
            MPT__TRY(mpt__match(job, &job->parts[i]));
            if (mpt__unlike(&job->parts[i])) return MPT_OK; /* see mpt__match_states */
            MPT__TRY(mpt__match_shape(job, &job->parts[i]));
            mpt__tell_outcome(job, job->parts[i].name, MPT_LOADED);
        }
    }
    for (i = 0; i < job->entry_count; i++) {
        if (mpt__may_stay(job, &job->entries[i])) continue;
        mpt__tell_outcome(job, job->entries[i].name, MPT_LOAD_LEFT_OVER);
        if (!job->load.partly)
            return mpt__job_fail(job, MPT_ERROR_SHAPE, "'%s' is not in the model", job->entries[i].name);
    }
    return MPT_OK;
}

static mpt_result mpt__check_sum(const mpt__job *job) {
    const mpt__part *part = &job->parts[job->count - 1];
    const unsigned char *at = mpt__part_source(job, part);
    uint64_t sum = 0;
    int i;
    for (i = 0; i < job->count - 1; i++)
        sum = mpt__sum_bytes(sum, mpt__part_source(job, &job->parts[i]), mpt__part_bytes(&job->parts[i]));
    if (sum == mpt__get_bytes(at, 8)) return MPT_OK;
    return mpt__job_fail(job, MPT_ERROR_FILE, "the data is damaged: its sum is another");
}

/* Reads and checks the states. */
static mpt_result mpt__read_states(mpt__job *job) {
    const mpt_optimizer_state *o = &job->state->optimizer;
    int i, sound;
    for (i = 0; i < MPT__STATES; i++) {
        mpt__part *part = &job->parts[i];
        const mpt__walk w = mpt__walk_state(job, i, job->data + part->entry->begin, 1);
        if (w.unfit) return mpt__job_fail(job, MPT_ERROR_FILE, "%s of '%s' is no int", w.unfit, part->name);
        if (i == MPT__SETTINGS && w.differs)
            return mpt__job_fail(job, MPT_ERROR_VALUE, "%s%s%s is %g there and %g in the model", w.node,
                                 *w.node ? "." : "", w.differs, w.theirs, w.ours);
    }
    sound = mpt__not_negative(job->state->lr);
    for (i = 0; i < job->net->opt->op.tensors; i++)
        sound &=
            mpt__not_negative(job->state->slices[i].lr_factor) && mpt__not_negative(job->state->slices[i].weight_decay);
    if (!sound)
        return mpt__job_fail(job, MPT_ERROR_FILE, "'mpt.optimizer' has lr %g, or an lr_factor or weight_decay below 0",
                             job->state->lr);
    if (mpt__optimizer_state_check(job->net->opt, o) != MPT_OK ||
        mpt__scaler_state_check(job->ctx, &job->state->scaler) != MPT_OK)
        return mpt__job_fail(job, MPT_ERROR_FILE, "%s", mpt_why(job->ctx));
    return MPT_OK;
}

/* Converts bytes of the file to what will be uploaded: elements unchanged, or numbers as the block keeps them. */
static void mpt__unpack(const mpt__job *job, const mpt__part *part) {
    const mpt_params *params = job->net->params;
    const mpt_master mode = params->desc.master == MPT_MASTER_STOCHASTIC ? MPT_MASTER_NONE : params->desc.master;
    const size_t size = mpt__file_types[part->entry->type].size;
    uint16_t *copy = (uint16_t *)(void *)part->staging;
    size_t i;
    for (i = 0; i < part->count; i++) {
        const unsigned char *at = mpt__part_source(job, part) + mpt__part_index(job->net, part, i) * size;
        uint32_t bits = (uint32_t)mpt__get_bytes(at, size);
        if (part->kind != MPT__RAW && size == 2) bits = mpt__bits(mpt_widen(bits, (mpt_dtype)part->entry->type));
        if (part->kind == MPT__VALUES && !params->master)
            mpt__weight_store(mode, params->desc.type, mpt__float(bits), 0, &copy[i], &copy[part->count + i]);
        else mpt__put_element(part->staging, i, part->kind == MPT__RAW ? size : sizeof(float), bits);
    }
}

/* Checks the staged values of a part. Running statistics are checked in pairs, with the first half. */
static mpt_result mpt__part_check(const mpt__job *job, const mpt__part *part) {
    const int moment = part->role >= MPT__MOMENTS && part->role <= MPT__AVERAGES;
    const int squares =
        moment && part->role != MPT__MOMENTS && part->role != MPT__AVERAGES && job->net->opt->op.desc.kind != MPT_SGD;
    const float *values = (const float *)(const void *)part->staging;
    size_t i;
    if (part->kind == MPT__RUNNING && part->device == mpt_model_running(job->net, part->id))
        return mpt__running_check(job->ctx, job->call, mpt__node_of(job->net, part->id), values);
    if (!moment) return MPT_OK;
    for (i = 0; i < part->count; i++)
        if (!mpt__finite(values[i]) || (squares && values[i] < 0))
            return mpt__job_fail(job, MPT_ERROR_FILE, "element %zu of '%s' is %g, which no moment can be", i,
                                 part->name, (double)values[i]);
    return MPT_OK;
}

/* Stages all arrays, one after another, so that the halves of running statistics are side by side. */
static mpt_result mpt__part_stage(mpt__job *job) {
    size_t bytes = 0;
    int i;
    for (i = 0; i < job->count; i++) bytes += job->parts[i].kind ? job->parts[i].count * sizeof(float) : 0;
    job->staging = (char *)mpt__host_alloc(job->ctx, bytes);
    if (!job->staging) return MPT_ERROR_NO_MEMORY;
    bytes = 0;
    for (i = 0; i < job->count; i++) {
        mpt__part *part = &job->parts[i];
        if (part->kind == MPT__STATE || part->kind == MPT__SUM) continue;
        part->staging = job->staging + bytes;
        bytes += part->count * sizeof(float);
        mpt__unpack(job, part);
    }
    for (i = 0; i < job->count; i++) MPT__TRY(mpt__part_check(job, &job->parts[i]));
    return MPT_OK;
}

/* Staged fp32 values become those of the copy, in place. */
static void mpt__narrow_staged(const mpt_params *params, const mpt__part *part) {
    uint16_t *copy = (uint16_t *)(void *)part->staging, low;
    size_t i;
    for (i = 0; i < part->count; i++) {
        float value;
        memcpy(&value, part->staging + i * sizeof value, sizeof value);
        mpt__weight_store(MPT_MASTER_F32, params->desc.type, value, 0, &copy[i], &low);
    }
}

static mpt_result mpt__upload_values(mpt_params *params, const mpt__part *part) {
    const mpt_array weight = mpt_params_weight(params, part->id);
    const size_t bytes = part->count * sizeof(uint16_t);
    float *master = mpt_params_master(params, part->id);
    if (!master && params->master) {
        float *values = (float *)(void *)part->staging;
        MPT__TRY(mpt__params_set_masters(params, part->id, values));
        mpt__narrow_staged(params, part);
    }
    if (master) {
        MPT__TRY(mpt_upload(params->ctx, master, part->staging, 2 * bytes));
        if (!params->copy.data) return MPT_OK;
        return mpt_cast(params->ctx, part->count, mpt_f32_array(master), weight, NULL);
    }
    MPT__TRY(mpt_upload(params->ctx, weight.data, part->staging, bytes));
    if (params->low) return mpt__part_upload(params, params->low, sizeof(uint16_t), part->id, part->staging + bytes);
    return MPT_OK;
}

static mpt_result mpt__upload_part(mpt__job *job, const mpt__part *part) {
    const int first = part->kind == MPT__RUNNING && part->device == mpt_model_running(job->net, part->id);
    if (part->role)
        return mpt__part_upload(job->net->params, mpt__role_of(job->net, part->role), mpt__file_types[part->type].size,
                                part->id, part->staging);
    if (part->kind == MPT__RAW) return mpt_upload(job->ctx, part->device, part->staging, mpt__part_bytes(part));
    if (part->kind == MPT__VALUES) return mpt__upload_values(job->net->params, part);
    if (!first) return MPT_OK; /* uploaded with the other half */
    return mpt_model_set_running(job->net, part->id, (const float *)(const void *)part->staging);
}

/* Changes the model. From here on only the device can fail. */
static mpt_result mpt__upload_all(mpt__job *job) {
    mpt_optimizer *opt = job->net->opt;
    const mpt__state *state = job->state;
    const size_t table = (size_t)job->net->opt->op.tensors * sizeof(mpt_tensor_slice);
    int i;
    mpt__stage_set(job->net, MPT__BETWEEN); /* no backward pass can follow */
    for (i = 1; i <= job->net->count; i++) mpt__node_of(job->net, i)->folds = 0;
    for (i = 0; i < job->count; i++) MPT__TRY(mpt__upload_part(job, &job->parts[i]));
    if (!job->full) return mpt__fold_all(job->net, job->folding);
    if (table) memcpy(opt->slices, state->slices, table);
    MPT__TRY(mpt_optimizer_set_lr(opt, state->lr)); /* uploads them */
    MPT__TRY(mpt_optimizer_set_state(opt, &state->optimizer));
    opt->op.average_from = job->averages ? 0 : state->optimizer.applied;
    return mpt_scaler_set_state(job->net->scaler, &state->scaler);
}

MPT__COLD static mpt_result mpt__read_all(mpt__job *job) {
    if (job->load.partly) MPT__TRY(mpt__need_unfolded(job->net, job->call));
    MPT__TRY(mpt__read_header(job));
    MPT__TRY(mpt__state_new(job));
    MPT__TRY(mpt__list(job));
    MPT__TRY(mpt__match_all(job));
    return mpt__read_data(job);
}

static mpt_result mpt__load_all(mpt__job *job) {
    if (job->full) {
        MPT__TRY(mpt__match_states(job));
        MPT__TRY(mpt__check_sum(job));
        MPT__TRY(mpt__read_states(job));
    }
    MPT__TRY(mpt__part_stage(job));
    job->folding = (float *)mpt__host_alloc(job->ctx, mpt__fold_room(job->net) * sizeof(float));
    if (job->folding) return mpt__upload_all(job);
    return MPT_ERROR_NO_MEMORY;
}

static mpt_result mpt__load_buffer(mpt__job *job) {
    MPT__TRY(mpt__read_all(job));
    return mpt__load_all(job);
}

#ifndef MPT_NO_STDIO
static mpt_result mpt__load_file(mpt__job *job) {
    mpt_result r;
    job->file = job->disk->open(job->path, 0);
    if (!job->file) return mpt__job_fail(job, MPT_ERROR_FILE, "cannot be opened");
    r = mpt__read_all(job);
    job->disk->close(job->file, 0);
    if (r == MPT_OK) return mpt__load_all(job);
    return r;
}
#endif

/* -- The calls -- */

/* A rank that did not write all of the file gives what it owns to those who do. */
static mpt_result mpt__collect_rest(mpt__job *job, mpt_result r) {
    char why[sizeof job->ctx->why];
    const mpt_result failed = job->ctx->failed;
    mpt_result joined;
    memcpy(why, job->ctx->why, sizeof why);
    joined = mpt__collect_up_to(job, MPT__ROLES - 1);
    if (r == MPT_OK) return joined;
    memcpy(job->ctx->why, why, sizeof why);
    job->ctx->failed = failed;
    return r;
}

/* full: a checkpoint; else weights of this type. The caller has set the path, or the buffer as the file, and the
   disk. run NULL: only other ranks write the file. */
static mpt_result mpt__job_run(mpt__job *job, mpt_result (*run)(mpt__job *), mpt_model *net, int full, mpt_dtype type) {
    mpt_result r;
    job->net = net;
    job->ctx = net->ctx;
    job->full = full;
    job->type = (int)type;
    if ((unsigned)type > MPT_BF16)
        return mpt__job_fail(job, MPT_ERROR_TYPE, "weights as type %s", mpt_dtype_name(type));
    if (full) MPT__TRY(mpt__need_training(net, job->call));
    if (net->opt->phase != MPT__READY || mpt__has_gradients(net))
        return mpt__job_fail(job, MPT_ERROR_ORDER, "in the middle of a step; mpt_step and mpt_scaler_update end it");
    MPT__TRY(mpt_optimizer_get_state(net->opt, &net->opt->mirror));
    r = run ? run(job) : MPT_OK;
    r = mpt__collect_rest(job, r);
    mpt__host_free(job->ctx, job->parts);
    mpt__host_free(job->ctx, job->state);
    mpt__host_free(job->ctx, job->header);
    mpt__host_free(job->ctx, job->entries);
    mpt__host_free(job->ctx, job->data);
    mpt__host_free(job->ctx, job->staging);
    mpt__host_free(job->ctx, job->folding);
    return r;
}

static mpt_result mpt__save_memory(const char *call, mpt_model *net, void *to, size_t capacity, size_t *size, int full,
                                   mpt_dtype type) {
    mpt__memory_file buffer = MPT_ZERO;
    mpt__job job = MPT_ZERO;
    mpt_result r;
    MPT__TRY(mpt__need_built(net, call));
    if (!size) return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "%s: size is NULL", call);
    buffer.to = (unsigned char *)to;
    buffer.size = capacity;
    job.call = call;
    job.disk = &mpt__in_memory;
    job.file = &buffer;
    job.saves = to != NULL;
    *size = 0;
    r = mpt__job_run(&job, mpt__save_to_buffer, net, full, type);
    if (job.header_bytes) *size = buffer.size; /* it was computed */
    return r;
}

static mpt_result mpt__load_memory(const char *call, mpt_model *net, const void *bytes, size_t size, int full,
                                   const mpt_load_desc *load) {
    mpt__memory_file buffer = MPT_ZERO;
    mpt__job job = MPT_ZERO;
    MPT__TRY(mpt__need_built(net, call));
    if (!bytes) return mpt_fail(net->ctx, MPT_ERROR_ARGUMENT, "%s: bytes is NULL", call);
    buffer.from = (const unsigned char *)bytes;
    buffer.size = size;
    if (load) job.load = *load;
    job.call = call;
    job.disk = &mpt__in_memory;
    job.file = &buffer;
    return mpt__job_run(&job, mpt__load_buffer, net, full, MPT_F32);
}

MPT_DEF mpt_result mpt_weights_save_memory(mpt_model *net, void *buffer, size_t capacity, size_t *size,
                                           mpt_dtype type) {
    return mpt__save_memory("weights_save_memory", net, buffer, capacity, size, 0, type);
}
MPT_DEF mpt_result mpt_weights_load_memory(mpt_model *net, const void *bytes, size_t size, const mpt_load_desc *desc) {
    return mpt__load_memory("weights_load_memory", net, bytes, size, 0, desc);
}
MPT_DEF mpt_result mpt_checkpoint_save_memory(mpt_model *net, void *buffer, size_t capacity, size_t *size) {
    return mpt__save_memory("checkpoint_save_memory", net, buffer, capacity, size, 1, MPT_F32);
}
MPT_DEF mpt_result mpt_checkpoint_load_memory(mpt_model *net, const void *bytes, size_t size) {
    return mpt__load_memory("checkpoint_load_memory", net, bytes, size, 1, NULL);
}

#ifdef MPT_NO_STDIO
static mpt_result mpt__no_files(mpt_model *net, const char *call) {
    MPT__TRY(mpt__need_built(net, call));
    return mpt_fail(net->ctx, MPT_ERROR_UNSUPPORTED, "%s: this build has no files (MPT_NO_STDIO)", call);
}

MPT_DEF mpt_result mpt_weights_save(mpt_model *net, const char *path, mpt_dtype type) {
    (void)path;
    (void)type;
    return mpt__no_files(net, "weights_save");
}
MPT_DEF mpt_result mpt_weights_load(mpt_model *net, const char *path, const mpt_load_desc *desc) {
    (void)path;
    (void)desc;
    return mpt__no_files(net, "weights_load");
}
MPT_DEF mpt_result mpt_checkpoint_save(mpt_model *net, const char *path) {
    (void)path;
    return mpt__no_files(net, "checkpoint_save");
}
MPT_DEF mpt_result mpt_checkpoint_load(mpt_model *net, const char *path) {
    (void)path;
    return mpt__no_files(net, "checkpoint_load");
}
#else
static mpt_result mpt__no_path(mpt__job *job) {
    return mpt_fail(job->ctx, MPT_ERROR_ARGUMENT, "%s: path is NULL or empty", job->call);
}

static mpt_result mpt__path_run(const char *call, mpt_result (*run)(mpt__job *), mpt_model *net, const char *path,
                                int full, mpt_dtype type, const mpt_load_desc *load, const mpt__disk *disk) {
    mpt__job job = MPT_ZERO;
    MPT__TRY(mpt__need_built(net, call));
    job.saves = run == mpt__save_file;
    if (!path && job.saves && net->params->shard) run = NULL;
    else if (!path || !*path) run = mpt__no_path;
    if (load) job.load = *load;
    job.call = call;
    job.path = path;
    job.disk = disk;
    return mpt__job_run(&job, run, net, full, type);
}

MPT_DEF mpt_result mpt_weights_save(mpt_model *net, const char *path, mpt_dtype type) {
    return mpt__path_run("weights_save", mpt__save_file, net, path, 0, type, NULL, &mpt__stdio);
}
MPT_DEF mpt_result mpt_weights_load(mpt_model *net, const char *path, const mpt_load_desc *desc) {
    return mpt__path_run("weights_load", mpt__load_file, net, path, 0, MPT_F32, desc, &mpt__stdio);
}
MPT_DEF mpt_result mpt_checkpoint_save(mpt_model *net, const char *path) {
    return mpt__path_run("checkpoint_save", mpt__save_file, net, path, 1, MPT_F32, NULL, &mpt__stdio);
}
MPT_DEF mpt_result mpt_checkpoint_load(mpt_model *net, const char *path) {
    return mpt__path_run("checkpoint_load", mpt__load_file, net, path, 1, MPT_F32, NULL, &mpt__stdio);
}
#endif

#endif /* MPT_IMPLEMENTATION */

/* ==== REVISIONS ====

   0.2.0  mpt_tools.h is gone. Its files are part of mpt.h, and can also be saved to and loaded from memory; its
          instruments are in examples/lens.h.
          Each operation is one struct and one call, such as mpt_op_gemm(ctx, &op), instead of a call with many
          arguments; the operation of a weight gradient also computes the bias gradient.
          desc.reference = 1 opens a context that computes by plain loops.
          A convolution has no padding by default; `same` keeps the size, for kernels of any size. Code that relied on
          the old default needs padding = kernel / 2. Kernels, windows, strides, padding, dilation may differ by axis.
          mpt_node_info has the shape of a convolution as an mpt_conv2d_shape.
          New: your own losses and layers, several heads, mpt_keep, frozen layers and rates by layer, inference builds,
          mpt_train_samples, mpt_zero_grad, loading weights by prefix and in part, several ranks, inputs as bytes or in
          device memory, batch norms folded for prediction, moving averages of the weights.
          New nodes: mpt_slice and mpt_reshape, by which a model can have several inputs; mpt_multiply and mpt_upsample,
          on mpt_op_broadcast; mpt_global_max_pool2d. New: mpt_name and mpt_find, average pooling that excludes padding,
          norms without gamma and beta, train.clip_value. mpt_leaky_relu takes its slope.
          With a one-cycle schedule, momentum (or beta1) follows the cycle, as in PyTorch; no_cycle_momentum = 1
          restores the old behaviour.
          Gradients are divided by `batch` instead of the weight of a step's first samples; the step is the same. The
          passes of a step are added as a tree, which takes memory for log2(accumulate) more gradients.
          mpt_evaluate and mpt_predict return an error instead of losing a forward pass that waits for mpt_backward.
          mpt_forward and mpt_replay take the number of samples as size_t, like all other calls.
          On failure mpt_loss returns NaN, and the counts of steps return UINT64_MAX. Renamed: mpt_model_train to
          mpt_model_train_desc, mpt_pool to mpt_pool_kind. mpt_weights_load takes a descriptor.
          All losses take an mpt_loss_desc, which replaces mpt_cross_entropy_desc; it adds pos_weight, delta,
          probabilities as targets, losses per position (segmentation), and weights of samples: mpt_sample_weights.
          train.shard_optimizer, with two more calls in mpt_ranks; mpt_update_op names the part that a rank updates.
          mpt_ranks.bucket_bytes: on CUDA gradients are summed over the ranks during the backward pass.
          Checkpoints of 0.1.0 are refused; its files of weights can be loaded.
          On CUDA, own_convolutions runs convolutions of 16 to 128 channels as one kernel; cuBLAS stays the default.
   0.1.0  The first one.                                                                                              */

/* ==== LICENCE ====

   MIT License. Copyright (c) 2026 the mpt authors.

   Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
   documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
   rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
   permit persons to whom the Software is furnished to do so, subject to the following conditions:

   The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
   Software.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
   WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
   COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
   OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
   */
