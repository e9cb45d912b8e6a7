/* Lion (Chen et al. 2023), with sign(0) = 0 as in its authors' implementations:
 *
 *     p = p - lr sign(beta1 m + (1 - beta1) g)
 *     m = beta2 m + (1 - beta2) g
 */
#ifndef real

typedef struct { double lr, beta1, beta2; } lion_hyper;
static const char lion_hyper_names[] = "lr beta1 beta2";

typedef struct { double lr, beta1, one_minus_beta1, beta2, one_minus_beta2; } lion_coefs;

static void lion_prepare(const lion_hyper *h, double step, lion_coefs *c)
{
    (void)step;
    c->lr = h->lr;
    c->beta1 = h->beta1;
    c->one_minus_beta1 = 1.0 - h->beta1;
    c->beta2 = h->beta2;
    c->one_minus_beta2 = 1.0 - h->beta2;
}

#else

RULE(lion)(real *p, real g, real *exp_avg, const lion_coefs *c)
{
    *p = *p - (real)c->lr * FN(sign)((real)c->beta1 * *exp_avg + (real)c->one_minus_beta1 * g);
    *exp_avg = (real)c->beta2 * *exp_avg + (real)c->one_minus_beta2 * g;
}

#endif
