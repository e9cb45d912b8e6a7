/* Stochastic gradient descent, with classical (Polyak) or Nesterov momentum, as in PyTorch:
 *
 *     b = momentum b + (1 - dampening) g      (the first step does not dampen: b = g)
 *     p = p - lr d,   d = g (no momentum),  b (momentum),  g + momentum b (Nesterov)
 *
 * Keras, TensorFlow and scikit-learn have lr inside the velocity: b = momentum b + lr g,  p = p - d,  d = b (momentum),
 * lr g + momentum b (Nesterov).
 */
#ifndef real

typedef struct { double lr, momentum, dampening, convention; } sgd_hyper;
static const char sgd_hyper_names[] = "lr momentum dampening convention";

typedef struct { double lr, momentum, inside, outside; } sgd_coefs;

static void sgd_prepare(const sgd_hyper *h, double step, sgd_coefs *c)
{
    c->lr = h->lr;
    c->momentum = h->momentum;
    const bool lr_inside = h->convention == FS_KERAS || h->convention == FS_TF || h->convention == FS_SKLEARN;
    c->inside = lr_inside ? h->lr : step > 1.0 ? 1.0 - h->dampening : 1.0;
    c->outside = lr_inside ? 1.0 : h->lr;
}

#else

RULE(sgd)(real *p, real g, const sgd_coefs *c)
{
    *p = *p - (real)c->lr * g;
}

RULE(sgd_momentum)(real *p, real g, real *buffer, const sgd_coefs *c)
{
    *buffer = (real)c->momentum * *buffer + (real)c->inside * g;
    *p = *p - (real)c->outside * *buffer;
}

RULE(sgd_nesterov)(real *p, real g, real *buffer, const sgd_coefs *c)
{
    *buffer = (real)c->momentum * *buffer + (real)c->inside * g;
    *p = *p - (real)c->outside * ((real)c->inside * g + (real)c->momentum * *buffer);
}

#endif
