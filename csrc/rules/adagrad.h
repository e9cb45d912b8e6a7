/* Adagrad (Duchi, Hazan & Singer 2011), eps outside the root, as in PyTorch:
 *
 *     s = s + g^2
 *     p = p - lr / (1 + (step - 1) lr_decay) g / (sqrt(s) + eps)
 *
 * Keras and optax have it inside: sqrt(s + eps).
 */
#ifndef real

typedef struct { double lr, lr_decay, eps, convention; } adagrad_hyper;
static const char adagrad_hyper_names[] = "lr lr_decay eps convention";

typedef struct { double lr, eps_inside, eps; } adagrad_coefs;

static void adagrad_prepare(const adagrad_hyper *h, double step, adagrad_coefs *c)
{
    c->lr = h->lr / (1.0 + (step - 1.0) * h->lr_decay);
    const bool inside = h->convention == FS_KERAS || h->convention == FS_OPTAX;
    c->eps_inside = inside ? h->eps : 0.0;
    c->eps = inside ? 0.0 : h->eps;
}

#else

RULE(adagrad)(real *p, real g, real *sum, const adagrad_coefs *c)
{
    *sum = *sum + g * g;
    *p = *p - (real)c->lr * g / (SQRT(*sum + (real)c->eps_inside) + (real)c->eps);
}

#endif
