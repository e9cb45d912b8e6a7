/* Adadelta (Zeiler 2012), both eps inside the roots:
 *
 *     v = rho v + (1 - rho) g^2
 *     d = sqrt(u + eps) / sqrt(v + eps) g
 *     u = rho u + (1 - rho) d^2
 *     p = p - lr d
 */
#ifndef real

typedef struct { double lr, rho, eps; } adadelta_hyper;
static const char adadelta_hyper_names[] = "lr rho eps";

typedef struct { double lr, rho, one_minus_rho, eps; } adadelta_coefs;

static void adadelta_prepare(const adadelta_hyper *h, double step, adadelta_coefs *c)
{
    (void)step;
    c->lr = h->lr;
    c->rho = h->rho;
    c->one_minus_rho = 1.0 - h->rho;
    c->eps = h->eps;
}

#else

RULE(adadelta)(real *p, real g, real *square_avg, real *acc_delta, const adadelta_coefs *c)
{
    *square_avg = (real)c->rho * *square_avg + (real)c->one_minus_rho * g * g;
    real delta = SQRT(*acc_delta + (real)c->eps) / SQRT(*square_avg + (real)c->eps) * g;
    *acc_delta = (real)c->rho * *acc_delta + (real)c->one_minus_rho * delta * delta;
    *p = *p - (real)c->lr * delta;
}

#endif
