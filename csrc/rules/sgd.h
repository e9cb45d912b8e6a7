/* Stochastic gradient descent, with classical (Polyak) or Nesterov momentum, as in PyTorch:
 *
 *     b = momentum b + (1 - dampening) g      (the first step does not dampen: b = g)
 *     p = p - lr d,   d = g (no momentum),  b (momentum),  g + momentum b (Nesterov)
 */
#ifndef real

typedef struct { double lr, momentum, dampening; } sgd_hyper;
static const char sgd_hyper_names[] = "lr momentum dampening";

typedef struct { double lr, momentum, undamped; } sgd_coefs;

static void sgd_prepare(const sgd_hyper *h, double step, sgd_coefs *c)
{
    c->lr = h->lr;
    c->momentum = h->momentum;
    c->undamped = step > 1.0 ? 1.0 - h->dampening : 1.0;
}

#else

RULE(sgd)(real *p, real g, const sgd_coefs *c)
{
    *p = *p - (real)c->lr * g;
}

RULE(sgd_momentum)(real *p, real g, real *buffer, const sgd_coefs *c)
{
    *buffer = (real)c->momentum * *buffer + (real)c->undamped * g;
    *p = *p - (real)c->lr * *buffer;
}

RULE(sgd_nesterov)(real *p, real g, real *buffer, const sgd_coefs *c)
{
    *buffer = (real)c->momentum * *buffer + (real)c->undamped * g;
    *p = *p - (real)c->lr * (g + (real)c->momentum * *buffer);
}

#endif
