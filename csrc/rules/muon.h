/* Muon (Jordan et al. 2024), for matrices. The direction is made beforehand, of what the buffer is going to be, with NumPy.
 *
 *     b = momentum b + (1 - momentum) g
 *     p = p - lr direction
 *
 * In Keras b = momentum b + g.
 */
#ifndef real

typedef struct { double lr, momentum, convention; } muon_hyper;
static const char muon_hyper_names[] = "lr momentum convention";

typedef struct { double lr, momentum, weight; } muon_coefs;

static void muon_prepare(const muon_hyper *h, double step, muon_coefs *c)
{
    (void)step;
    c->lr = h->lr;
    c->momentum = h->momentum;
    c->weight = h->convention == FS_KERAS ? 1.0 : 1.0 - h->momentum;
}

#else

RULE(muon)(real *p, real g, real *buffer, real *direction, const muon_coefs *c)
{
    *buffer = (real)c->momentum * *buffer + (real)c->weight * g;
    *p = *p - (real)c->lr * *direction;
}

#endif
