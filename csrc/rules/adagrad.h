/* Adagrad (Duchi, Hazan & Singer 2011), eps outside the root, as in PyTorch:
 *
 *     s = s + g^2
 *     p = p - lr / (1 + (step - 1) lr_decay) g / (sqrt(s) + eps)
 */
#ifndef real

typedef struct { double lr, lr_decay, eps; } adagrad_hyper;
static const char adagrad_hyper_names[] = "lr lr_decay eps";

typedef struct { double lr, eps; } adagrad_coefs;

static void adagrad_prepare(const adagrad_hyper *h, double step, adagrad_coefs *c)
{
    c->lr = h->lr / (1.0 + (step - 1.0) * h->lr_decay);
    c->eps = h->eps;
}

#else

RULE(adagrad)(real *p, real g, real *sum, const adagrad_coefs *c)
{
    *sum = *sum + g * g;
    *p = *p - (real)c->lr * g / (SQRT(*sum) + (real)c->eps);
}

#endif
