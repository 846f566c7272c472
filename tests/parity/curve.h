/* curve.h - the losses of a training beside PyTorch's. Include it after golden.h.

   How far the losses of a step may lie apart, to first order. u is the unit roundoff, z the logits, g the gradient.

   Values. A net multiplies and rounds in stages, and a relative error of one stage passes the next about as it is.
   Errors of different roundings are independent, so n of them add up to sqrt(n) u (Higham and Mary 2019). In fp32 n
   counts the terms of all products on the way, in bf16 the arrays on the way that are kept in it. Both sides are off:
       relative error of the logits      e = 2 u sqrt(n of the forward pass)
       relative error of the gradient    d = 2 u sqrt(n of both passes)
   In the first step of `policy` both sides round the same numbers at the same places, and a stored value differs only
   where a boundary lies between two fp32 results, which are a distance f apart: a difference of 2 u with the chance
   f / 2u, of sqrt(2 u f) in the root mean square, which takes the place of 2 u. Later the weights lie apart, and with
   them the values, by up to 2 u.

   Loss. Its slope to a sample's logits is at most sqrt(2), so e makes it sqrt(2) e |z|. Every step before has moved the
   weights by lr / (1 - momentum) d |g| too far, in the end; steps, too, err independently, so the weights have drifted
   by the root of the sum of the squares of these, as long as a step does not drive two nets apart, and that makes
   |g of this step| times the drift: the bound grows as the root of the steps, and as the gradients. A value that
   crosses a kink of ReLU or max pooling has no other loss, and another gradient only for its share of it; e and d hold
   for shares, too. The loss itself is a mean of N rows, each of C exponentials: N + C + 13 roundings in fp32. */
#ifndef CURVE_H
#define CURVE_H

/* Roundings on the way through a net, by the mode that is compared with. */
typedef struct roundings {
    double terms; /* of products, one after the other */
    /* arrays kept in bf16: copies of weights and biases, values; in the backward pass gradients of values */
    double policy;
    double autocast; /* and logits; in the backward pass also what rounds a weight's gradient */
} roundings;

/* What came of it: the norm is that of the first step's gradient. */
typedef struct curve {
    size_t steps;
    double *loss, norm;
} curve;

/* Of the gradient of the last step */
static inline double curve_norm(mpt_context *ctx, mpt_model *net) {
    mpt_optimizer_state *state = (mpt_optimizer_state *)test_memory(sizeof *state);
    double norm;
    CHECK_OK(ctx, mpt_optimizer_get_state(mpt_model_optimizer(net), state));
    norm = state->grad_norm;
    free(state);
    return norm;
}

/* Root mean square of the relative errors of n roundings on both sides. */
static inline double curve_relative_error(const char *mode, size_t step, double terms, double policy, double autocast) {
    const double u = test_unit(MPT_BF16), fp32 = 2 * test_unit(MPT_F32) * sqrt(terms);
    if (strcmp(mode, "f32") == 0) return fp32;
    if (strcmp(mode, "autocast") == 0) return 2 * u * sqrt(autocast);
    return (step ? 2 * u : sqrt(2 * u * fp32)) * sqrt(policy);
}

static inline void curve_compare(const golden *g, const char *mode, const roundings *f, const roundings *b, int classes,
                                 const curve *ours) {
    const golden_line *loss = golden_need(g, mode, "output", "loss"), *norm = golden_need(g, mode, "output", "norm");
    const golden_line *logits = golden_need(g, mode, "output", "logits");
    const double pace = golden_number(g, "lr") / (1 - golden_number(g, "momentum"));
    const double rows = golden_number(g, "batch") + (double)classes + 13;
    double *tolerance = test_doubles(ours->steps), squares = 0; /* of the drift */
    int ok = 1;
    size_t t;
    for (t = 0; t < ours->steps; t++) {
        const double e = curve_relative_error(mode, t, f->terms, f->policy, f->autocast);
        const double d =
            curve_relative_error(mode, t, f->terms + b->terms, f->policy + b->policy, f->autocast + b->autocast);
        tolerance[t] = sqrt(2.0) * e * logits->value[t] + norm->value[t] * sqrt(squares);
        tolerance[t] += rows * test_unit(MPT_F32) * (loss->value[t] + logits->value[t]);
        squares += pace * d * norm->value[t] * pace * d * norm->value[t];
        if (!t) ok = CHECK_NEAR(ours->norm, norm->value[t], d * norm->value[t]);
    }
    ok &= CHECK_ALL(ours->loss, ours->steps, loss->value, tolerance);
    if (!ok) printf("    %s, mode %s\n", g->name, mode);
    free(tolerance);
}

#endif
