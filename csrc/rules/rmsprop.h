/* RMSprop (Tieleman & Hinton 2012), eps outside the root and lr outside the momentum buffer, as in PyTorch:
 *
 *     v = alpha v + (1 - alpha) g^2
 *     m = m + (1 - alpha) (g - m)                             (centered)
 *     d = g / (sqrt(v) + eps)   or, centered,   g / (sqrt(max(v - m^2, 0)) + eps)
 *     p = p - lr d              or, with momentum,   b = momentum b + d,   p = p - lr b
 *
 * Keras, optax and, with momentum, TensorFlow have eps inside the root and lr inside the buffer: b = momentum b + lr d.
 *
 * v - m^2 is a variance and never negative, but its rounding can be; PyTorch's step is NaN then. Here a negative value
 * counts as 0 and eps bounds the step. A NaN stays a NaN.
 */
#ifndef real

typedef struct { double lr, alpha, eps, momentum, convention; } rmsprop_hyper;
static const char rmsprop_hyper_names[] = "lr alpha eps momentum convention";

typedef struct { double lr, inside, outside, alpha, one_minus_alpha, eps_inside, eps, momentum; } rmsprop_coefs;

static void rmsprop_prepare(const rmsprop_hyper *h, double step, rmsprop_coefs *c)
{
    (void)step;
    c->lr = h->lr;
    c->alpha = h->alpha;
    c->one_minus_alpha = 1.0 - h->alpha;
    const bool lr_inside = h->convention == FS_KERAS || h->convention == FS_OPTAX || h->convention == FS_TF;
    const bool eps_inside = lr_inside && (h->convention != FS_TF || h->momentum != 0.0);
    c->inside = lr_inside ? h->lr : 1.0;
    c->outside = lr_inside ? 1.0 : h->lr;
    c->eps_inside = eps_inside ? h->eps : 0.0;
    c->eps = eps_inside ? 0.0 : h->eps;
    c->momentum = h->momentum;
}

#else

HELPER(rmsprop_direction)(real g, real *square_avg, const rmsprop_coefs *c)
{
    *square_avg = (real)c->alpha * *square_avg + (real)c->one_minus_alpha * g * g;
    return g / (SQRT(*square_avg + (real)c->eps_inside) + (real)c->eps);
}

HELPER(rmsprop_centered_direction)(real g, real *square_avg, real *grad_avg, const rmsprop_coefs *c)
{
    *square_avg = (real)c->alpha * *square_avg + (real)c->one_minus_alpha * g * g;
    *grad_avg = *grad_avg + (real)c->one_minus_alpha * (g - *grad_avg);
    real variance = *square_avg - *grad_avg * *grad_avg;
    variance = variance < 0 ? 0 : variance;
    return g / (SQRT(variance + (real)c->eps_inside) + (real)c->eps);
}

RULE(rmsprop)(real *p, real g, real *square_avg, const rmsprop_coefs *c)
{
    *p = *p - (real)c->lr * FN(rmsprop_direction)(g, square_avg, c);
}

RULE(rmsprop_momentum)(real *p, real g, real *square_avg, real *buffer, const rmsprop_coefs *c)
{
    *buffer = (real)c->momentum * *buffer + (real)c->inside * FN(rmsprop_direction)(g, square_avg, c);
    *p = *p - (real)c->outside * *buffer;
}

RULE(rmsprop_centered)(real *p, real g, real *square_avg, real *grad_avg, const rmsprop_coefs *c)
{
    *p = *p - (real)c->lr * FN(rmsprop_centered_direction)(g, square_avg, grad_avg, c);
}

RULE(rmsprop_centered_momentum)(real *p, real g, real *square_avg, real *grad_avg, real *buffer,
                                const rmsprop_coefs *c)
{
    *buffer = (real)c->momentum * *buffer + (real)c->inside * FN(rmsprop_centered_direction)(g, square_avg, grad_avg, c);
    *p = *p - (real)c->outside * *buffer;
}

#endif
