/* positional.h - operations by position, for tests that call them in tables of cases */
#ifndef MPT_POSITIONAL_H
#define MPT_POSITIONAL_H

static MPT__UNUSED mpt_result mpt_gemm(mpt_context *ctx, int trans_a, int trans_b, size_t m, size_t n, size_t k,
                                       float alpha, mpt_array a, size_t lda, mpt_array b, size_t ldb, float beta,
                                       mpt_array c, size_t ldc) {
    mpt_gemm_op op = MPT_ZERO;
    op.trans_a = trans_a;
    op.trans_b = trans_b;
    op.m = m;
    op.n = n;
    op.k = k;
    op.alpha = alpha;
    op.a = a;
    op.lda = lda;
    op.b = b;
    op.ldb = ldb;
    op.beta = beta;
    op.c = c;
    op.ldc = ldc;
    return mpt_op_gemm(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_linear_forward(mpt_context *ctx, size_t N, size_t D, size_t O, mpt_array x,
                                                 mpt_array w, mpt_array b, mpt_activation act, mpt_array y) {
    mpt_gemm_op op = MPT_ZERO;
    op.trans_b = 1;
    op.m = N;
    op.n = O;
    op.k = D;
    op.a = x;
    op.b = w;
    op.c = y;
    op.bias = b;
    op.act = act;
    return mpt_op_gemm(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_linear_backward_data(mpt_context *ctx, size_t N, size_t D, size_t O, mpt_array dy,
                                                       mpt_array w, float beta, mpt_array dx) {
    mpt_gemm_op op = MPT_ZERO;
    op.m = N;
    op.n = D;
    op.k = O;
    op.a = dy;
    op.b = w;
    op.c = dx;
    op.beta = beta;
    return mpt_op_gemm(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_linear_backward_weight(mpt_context *ctx, size_t N, size_t D, size_t O, mpt_array dy,
                                                         mpt_array x, float beta, mpt_array dw) {
    mpt_gemm_op op = MPT_ZERO;
    op.trans_a = 1;
    op.m = O;
    op.n = D;
    op.k = N;
    op.a = dy;
    op.b = x;
    op.c = dw;
    op.beta = beta;
    return mpt_op_gemm(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_conv2d_forward(mpt_context *ctx, const mpt_conv2d_shape *shape, mpt_array x,
                                                 mpt_array w, mpt_array b, mpt_activation act, mpt_array y) {
    mpt_conv2d_op op = MPT_ZERO;
    if (!shape) return mpt_op_conv2d(ctx, NULL);
    op.shape = *shape;
    op.x = x;
    op.w = w;
    op.bias = b;
    op.act = act;
    op.y = y;
    return mpt_op_conv2d(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_conv2d_backward_data(mpt_context *ctx, const mpt_conv2d_shape *shape, mpt_array dy,
                                                       mpt_array w, float beta, mpt_array dx) {
    mpt_conv2d_op op = MPT_ZERO;
    if (!shape) return mpt_op_conv2d(ctx, NULL);
    op.pass = MPT_BACKWARD_DATA;
    op.shape = *shape;
    op.y = dy;
    op.w = w;
    op.beta = beta;
    op.x = dx;
    return mpt_op_conv2d(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_conv2d_backward_weight(mpt_context *ctx, const mpt_conv2d_shape *shape, mpt_array dy,
                                                         mpt_array x, float beta, mpt_array dw) {
    mpt_conv2d_op op = MPT_ZERO;
    if (!shape) return mpt_op_conv2d(ctx, NULL);
    op.pass = MPT_BACKWARD_WEIGHT;
    op.shape = *shape;
    op.y = dy;
    op.x = x;
    op.beta = beta;
    op.w = dw;
    return mpt_op_conv2d(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_activation_forward(mpt_context *ctx, mpt_activation act, size_t n, mpt_array x,
                                                     mpt_array y) {
    mpt_map_op op = MPT_ZERO;
    op.map = MPT_MAP_ACTIVATION;
    op.act = act;
    op.n = n;
    op.a = x;
    op.out = y;
    return mpt_op_map(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_activation_backward(mpt_context *ctx, mpt_activation act, size_t n, mpt_array saved,
                                                      mpt_array dy, float beta, mpt_array dx) {
    mpt_map_op op = MPT_ZERO;
    op.map = MPT_MAP_ACTIVATION_GRADIENT;
    op.act = act;
    op.n = n;
    op.a = saved;
    op.b = dy;
    op.beta = beta;
    op.out = dx;
    return mpt_op_map(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_pool2d_forward(mpt_context *ctx, mpt_pool_kind kind, const mpt_pool2d_shape *shape,
                                                 mpt_array x, mpt_array y, uint16_t *index) {
    mpt_pool2d_op op = MPT_ZERO;
    if (!shape) return mpt_op_pool2d(ctx, NULL);
    op.kind = kind;
    op.shape = *shape;
    op.x = x;
    op.y = y;
    op.index = index;
    return mpt_op_pool2d(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_pool2d_backward(mpt_context *ctx, mpt_pool_kind kind, const mpt_pool2d_shape *shape,
                                                  mpt_array dy, const uint16_t *index, float beta, mpt_array dx) {
    mpt_pool2d_op op = MPT_ZERO;
    if (!shape) return mpt_op_pool2d(ctx, NULL);
    op.kind = kind;
    op.pass = MPT_BACKWARD_DATA;
    op.shape = *shape;
    op.y = dy;
    memcpy(&op.index, &index, sizeof index);
    op.beta = beta;
    op.x = dx;
    return mpt_op_pool2d(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_add_arrays(mpt_context *ctx, size_t n, mpt_array a, float beta, mpt_array b,
                                             mpt_activation act, mpt_array y) {
    mpt_map_op op = MPT_ZERO;
    op.map = MPT_MAP_ADD;
    op.act = act;
    op.n = n;
    op.a = a;
    op.b = b;
    op.beta = beta;
    op.out = y;
    return mpt_op_map(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_copy_columns(mpt_context *ctx, size_t rows, size_t C, mpt_array x, size_t x_stride,
                                               float beta, mpt_array y, size_t y_stride) {
    mpt_columns_op op = MPT_ZERO;
    op.rows = rows;
    op.C = C;
    op.x = x;
    op.x_stride = x_stride;
    op.beta = beta;
    op.y = y;
    op.y_stride = y_stride;
    return mpt_op_columns(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_dropout_array(mpt_context *ctx, size_t n, const mpt_mask *mask, mpt_array x,
                                                float beta, mpt_array y) {
    mpt_map_op op = MPT_ZERO;
    if (!mask) return mpt_op_map(ctx, NULL);
    op.map = MPT_MAP_DROPOUT;
    op.n = n;
    op.mask = *mask;
    op.a = x;
    op.beta = beta;
    op.out = y;
    return mpt_op_map(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_norm_stats(mpt_context *ctx, const mpt_norm_shape *shape, mpt_array x, float *stats) {
    mpt_norm_op op = MPT_ZERO;
    if (!shape) return mpt_op_norm(ctx, NULL);
    op.shape = *shape;
    op.x = x;
    op.stats = stats;
    return mpt_op_norm(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_norm_forward(mpt_context *ctx, const mpt_norm_shape *shape, mpt_array x,
                                               const float *stats, mpt_array gamma, mpt_array beta, mpt_activation act,
                                               mpt_array y) {
    mpt_norm_op op = MPT_ZERO;
    if (!shape) return mpt_op_norm(ctx, NULL);
    op.pass = MPT_NORM_FORWARD;
    op.shape = *shape;
    op.x = x;
    memcpy(&op.stats, &stats, sizeof stats);
    op.gamma = gamma;
    op.beta = beta;
    op.act = act;
    op.y = y;
    return mpt_op_norm(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_norm_backward(mpt_context *ctx, const mpt_norm_shape *shape, mpt_array x,
                                                float *stats, int frozen, mpt_array gamma, mpt_array dy, float scale_x,
                                                mpt_array dx, float scale, mpt_array dgamma, mpt_array dbeta) {
    mpt_norm_op op = MPT_ZERO;
    if (!shape) return mpt_op_norm(ctx, NULL);
    op.pass = MPT_NORM_BACKWARD;
    op.shape = *shape;
    op.x = x;
    op.stats = stats;
    op.frozen = frozen;
    op.gamma = gamma;
    op.y = dy;
    op.scale_x = scale_x;
    op.dx = dx;
    op.scale = scale;
    op.dgamma = dgamma;
    op.dbeta = dbeta;
    return mpt_op_norm(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_norm_running(mpt_context *ctx, const mpt_norm_shape *shape, float momentum,
                                               const float *stats, float *running) {
    mpt_norm_op op = MPT_ZERO;
    if (!shape) return mpt_op_norm(ctx, NULL);
    op.pass = MPT_NORM_RUNNING;
    op.shape = *shape;
    op.momentum = momentum;
    memcpy(&op.stats, &stats, sizeof stats);
    op.running = running;
    return mpt_op_norm(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_cross_entropy(mpt_context *ctx, const mpt_cross_entropy_desc *desc, size_t N,
                                                size_t C, mpt_array x, const int32_t *labels, float grad_scale,
                                                const float *loss_scale, mpt_array dx, mpt_loss_sum *sum) {
    mpt_loss_op op = MPT_ZERO;
    if (desc) op.cross_entropy = *desc;
    op.N = N;
    op.C = C;
    op.x = x;
    op.target = labels;
    op.grad_scale = grad_scale;
    op.loss_scale = loss_scale;
    op.dx = dx;
    op.sum = sum;
    return mpt_op_loss(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_elementwise_loss(mpt_context *ctx, mpt_loss_kind kind, size_t N, size_t C,
                                                   mpt_array x, const float *target, float grad_scale,
                                                   const float *loss_scale, mpt_array dx, mpt_loss_sum *sum) {
    mpt_loss_op op = MPT_ZERO;
    op.kind = kind;
    op.N = N;
    op.C = C;
    op.x = x;
    op.target = target;
    op.grad_scale = grad_scale;
    op.loss_scale = loss_scale;
    op.dx = dx;
    op.sum = sum;
    return mpt_op_loss(ctx, &op);
}

static MPT__UNUSED mpt_result mpt_bias_backward(mpt_context *ctx, size_t rows, size_t C, mpt_array dy, float beta,
                                                mpt_array db) {
    mpt_gemm_op op = MPT_ZERO; /* beside the product of dy with its first column, which nobody reads */
    float *rest = C ? (float *)mpt_alloc(ctx, C * sizeof *rest) : NULL;
    mpt_result r;
    op.trans_a = 1;
    op.m = C;
    op.n = 1;
    op.k = rows;
    op.a = op.b = dy;
    op.ldb = C;
    op.c = mpt_f32_array(rest);
    op.beta = beta;
    op.a_sums = db;
    r = mpt_op_gemm(ctx, &op);
    mpt_free(ctx, rest);
    return r;
}

#endif
