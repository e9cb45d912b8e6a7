/* ASGD (Polyak & Juditsky 1992), with step sizes and decay as in PyTorch:
 *
 *     eta = lr / (1 + lambd lr (step - 1))^alpha
 *     p = (1 - lambd eta) p - eta g
 *     ax = ax + mu (p - ax),   mu = 1 / max(1, step - 1 - t0);   ax = p for mu = 1
 */
#ifndef real

typedef struct { double lr, lambd, alpha, t0; } asgd_hyper;
static const char asgd_hyper_names[] = "lr lambd alpha t0";

typedef struct { double eta, shrink, mu; } asgd_coefs;

static void asgd_prepare(const asgd_hyper *h, double step, asgd_coefs *c)
{
    const double n_averaged = step - 1.0 - h->t0;
    c->eta = h->lr / pow(1.0 + h->lambd * h->lr * (step - 1.0), h->alpha);
    c->shrink = 1.0 - h->lambd * c->eta;
    c->mu = 1.0 / (n_averaged > 1.0 ? n_averaged : 1.0);
}

#else

RULE(asgd)(real *p, real g, real *ax, const asgd_coefs *c)
{
    *p = *p * (real)c->shrink - (real)c->eta * g;
    *ax = c->mu < 1 ? *ax + (real)c->mu * (*p - *ax) : *p;
}

#endif
