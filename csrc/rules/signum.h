/* signSGD, and Signum with momentum (Bernstein et al. 2018):
 *
 *     b = momentum b + (1 - momentum) g
 *     p = p - lr sign(b),   or without momentum   p = p - lr sign(g)
 */
#ifndef real

typedef struct { double lr, momentum; } signum_hyper;
static const char signum_hyper_names[] = "lr momentum";

typedef struct { double lr, momentum, one_minus_momentum; } signum_coefs;

static void signum_prepare(const signum_hyper *h, double step, signum_coefs *c)
{
    (void)step;
    c->lr = h->lr;
    c->momentum = h->momentum;
    c->one_minus_momentum = 1.0 - h->momentum;
}

#else

RULE(signsgd)(real *p, real g, const signum_coefs *c)
{
    *p = *p - (real)c->lr * FN(sign)(g);
}

RULE(signum)(real *p, real g, real *buffer, const signum_coefs *c)
{
    *buffer = (real)c->momentum * *buffer + (real)c->one_minus_momentum * g;
    *p = *p - (real)c->lr * FN(sign)(*buffer);
}

#endif
