// peers.cpp - the products and convolutions of bench.c by mpt, OpenBLAS and oneDNN in turn: part of `make bench-peers`.
//
// A row for each case and each peer that was there when this was built (BENCH_OPENBLAS, BENCH_ONEDNN), in bench's form;
// peak is the peer's rate, ratio mpt/peer. oneDNN is given what suits it best: it chooses the layout of weights and
// images, and putting them there is not counted. Types that a peer has no code for on this CPU have no row.
//
// Usage: peers THREADS, with OMP_NUM_THREADS and OPENBLAS_NUM_THREADS set to the same.
#define _POSIX_C_SOURCE 199309L
#define MPT_IMPLEMENTATION
#include "bench.h"

static void row(timing t, double operations, const char *peer) {
    printf(" peer=%s value=%.4g unit=GFLOP/s peak=%.4g ratio=%.3f\n", peer, 1e-9 * operations / t.value,
           1e-9 * operations / t.peak, t.peak / t.value);
}

#ifdef BENCH_OPENBLAS
#include <cblas.h>

static void run_openblas(void *arg) {
    const mpt_gemm_op *p = &static_cast<const product *>(arg)->op;
    const auto m = static_cast<blasint>(p->m), n = static_cast<blasint>(p->n), k = static_cast<blasint>(p->k);
    cblas_sgemm(CblasRowMajor, p->trans_a ? CblasTrans : CblasNoTrans, p->trans_b ? CblasTrans : CblasNoTrans, m, n, k,
                1, static_cast<const float *>(p->a.data), p->trans_a ? m : k, static_cast<const float *>(p->b.data),
                p->trans_b ? k : n, 0, static_cast<float *>(p->c.data), n);
}
#endif

#ifdef BENCH_ONEDNN
#include <dnnl.hpp>
#include <unordered_map>

using dnnl::memory;
using tag = memory::format_tag;

// Versions 2 and 3 name the same things differently.
#if DNNL_VERSION_MAJOR >= 3
#define PLAN(op, ...) op::primitive_desc(engine(), __VA_ARGS__)
#define PLAN_AFTER(op, hint, ...) op::primitive_desc(engine(), __VA_ARGS__, hint)
#else
#define PLAN(op, ...) op::primitive_desc(op::desc(__VA_ARGS__), engine())
#define PLAN_AFTER(op, hint, ...) op::primitive_desc(op::desc(__VA_ARGS__), engine(), hint)
#endif

static dnnl::engine &engine() {
    static dnnl::engine e(dnnl::engine::kind::cpu, 0);
    return e;
}

struct onednn {
    dnnl::stream stream{engine()};
    dnnl::primitive primitive;
    std::unordered_map<int, memory> arguments;
};

static void run_onednn(void *arg) {
    onednn *o = static_cast<onednn *>(arg);
    o->primitive.execute(o->stream, o->arguments);
    o->stream.wait();
}

static memory::data_type type_of(mpt_array a) {
    return a.type == MPT_F32    ? memory::data_type::f32
           : a.type == MPT_BF16 ? memory::data_type::bf16
                                : memory::data_type::f16;
}

// `dims` of the user's data in the layout `from`, copied to the layout that oneDNN chose.
static memory placed(const memory::desc &chosen, const memory::dims &dims, mpt_array data, tag from) {
    memory user(memory::desc(dims, type_of(data), from), engine(), data.data), m(chosen, engine());
    dnnl::stream stream(engine());
    dnnl::reorder(user, m).execute(stream, user, m);
    stream.wait();
    return m;
}

static memory::dim dim(size_t n) { return static_cast<memory::dim>(n); }

static onednn matmul_of(const mpt_gemm_op *p) {
    const memory::dims a{dim(p->m), dim(p->k)}, b{dim(p->k), dim(p->n)}, c{dim(p->m), dim(p->n)};
    const tag tag_a = p->trans_a ? tag::ba : tag::ab, tag_b = p->trans_b ? tag::ba : tag::ab;
    const memory::desc any_b(b, type_of(p->b), tag::any), plain_a(a, type_of(p->a), tag_a);
    const memory::desc plain_c(c, type_of(p->c), tag::ab);
    const auto plan = PLAN(dnnl::matmul, plain_a, any_b, plain_c);
    onednn o;
    o.primitive = dnnl::matmul(plan);
    o.arguments = {{DNNL_ARG_SRC, placed(plan.src_desc(), a, p->a, tag_a)},
                   {DNNL_ARG_WEIGHTS, placed(plan.weights_desc(), b, p->b, tag_b)},
                   {DNNL_ARG_DST, memory(plan.dst_desc(), engine())}};
    return o;
}

static onednn convolution_of(const mpt_conv2d_op *c) {
    const mpt_conv2d_shape *z = &c->shape;
    const auto direct = dnnl::algorithm::convolution_direct;
    const memory::dims x{dim(z->N), dim(z->C), dim(z->H), dim(z->W)}, y{dim(z->N), dim(z->K), dim(z->H), dim(z->W)};
    const memory::dims w{dim(z->K), dim(z->C), dim(z->R), dim(z->S)}, one{1, 1}, pad{dim(z->padding_h), dim(z->padding_w)};
    const memory::desc dx(x, type_of(c->x), tag::any), dw(w, type_of(c->w), tag::any), dy(y, type_of(c->y), tag::any);
    const memory::desc forward_w(w, type_of(c->x), tag::any);
    const auto forward =
        PLAN(dnnl::convolution_forward, dnnl::prop_kind::forward_training, direct, dx, forward_w, dy, one, pad, pad);
    onednn o;
    if (c->pass == MPT_FORWARD) {
        o.primitive = dnnl::convolution_forward(forward);
        o.arguments = {{DNNL_ARG_SRC, placed(forward.src_desc(), x, c->x, tag::nhwc)},
                       {DNNL_ARG_WEIGHTS, placed(forward.weights_desc(), w, c->w, tag::ohwi)},
                       {DNNL_ARG_DST, memory(forward.dst_desc(), engine())}};
    } else if (c->pass == MPT_BACKWARD_DATA) {
        const auto plan = PLAN_AFTER(dnnl::convolution_backward_data, forward, direct, dx, dw, dy, one, pad, pad);
        o.primitive = dnnl::convolution_backward_data(plan);
        o.arguments = {{DNNL_ARG_DIFF_DST, placed(plan.diff_dst_desc(), y, c->y, tag::nhwc)},
                       {DNNL_ARG_WEIGHTS, placed(plan.weights_desc(), w, c->w, tag::ohwi)},
                       {DNNL_ARG_DIFF_SRC, memory(plan.diff_src_desc(), engine())}};
    } else {
        const auto plan = PLAN_AFTER(dnnl::convolution_backward_weights, forward, direct, dx, dw, dy, one, pad, pad);
        o.primitive = dnnl::convolution_backward_weights(plan);
        o.arguments = {{DNNL_ARG_DIFF_DST, placed(plan.diff_dst_desc(), y, c->y, tag::nhwc)},
                       {DNNL_ARG_SRC, placed(plan.src_desc(), x, c->x, tag::nhwc)},
                       {DNNL_ARG_DIFF_WEIGHTS, memory(plan.diff_weights_desc(), engine())}};
    }
    return o;
}
#endif

static void product_row(product *p) {
#ifdef BENCH_OPENBLAS
    if (p->op.a.type == MPT_F32) {
        const timing t = measure(run_product, p, run_openblas, p);
        print_product(p);
        row(t, product_operations(p), "openblas");
    }
#endif
#ifdef BENCH_ONEDNN
    try {
        onednn o = matmul_of(&p->op);
        const timing t = measure(run_product, p, run_onednn, &o);
        print_product(p);
        row(t, product_operations(p), "onednn");
    } catch (const dnnl::error &) {}
#endif
}

static void convolution_row(convolution *c) {
#ifdef BENCH_ONEDNN
    try {
        onednn o = convolution_of(&c->op);
        const timing t = measure(run_convolution, c, run_onednn, &o);
        print_convolution(c);
        row(t, convolution_operations(c), "onednn");
    } catch (const dnnl::error &) {}
#endif
    (void)c;
}

int main(int argc, char **argv) {
    mpt_context *ctx = open_threads(argc > 1 ? atoi(argv[1]) : 1);
#ifdef BENCH_OPENBLAS
    printf("openblas %s\n", openblas_get_config());
#endif
#ifdef BENCH_ONEDNN
    printf("onednn %d.%d.%d\n", dnnl::version()->major, dnnl::version()->minor, dnnl::version()->patch);
#endif
    for (int type = MPT_F32; type <= MPT_BF16; type++) bench_products(ctx, static_cast<mpt_dtype>(type));
    mpt_close(ctx);
    return 0;
}
