/* NovoGrad (Ginsburg et al. 2019), as in its paper and in optax: momentum of gradients that are divided by how large those
 * of the whole array have been, a single number.
 *
 *     v = beta2 v + (1 - beta2) |g|^2      (the first step: |g|^2)
 *     m = beta1 m + g / (sqrt(v) + eps) + weight_decay p
 *     p = p - lr m
 *
 * optax may add an eps_root to v, inside the root.
 */
#ifndef real

typedef struct { double lr, beta1, beta2, eps, weight_decay, eps_root; } novograd_hyper;
static const char novograd_hyper_names[] = "lr beta1 beta2 eps weight_decay eps_root";

typedef struct { double lr, beta1, beta2, weight_decay, divisor; } novograd_coefs;

static void novograd_prepare(const novograd_hyper *h, double step, novograd_coefs *c)
{
    c->lr = h->lr;
    c->beta1 = h->beta1;
    c->beta2 = step > 1.0 ? h->beta2 : 0.0;
    c->weight_decay = h->weight_decay;
}

static void novograd_scale(const novograd_hyper *h, const fs_whole *whole, double *numbers, novograd_coefs *c)
{
    numbers[0] = c->beta2 * numbers[0] + (1.0 - c->beta2) * (whole->direction_norm * whole->direction_norm);
    c->divisor = sqrt(numbers[0] + or_else(h->eps_root, 0.0)) + h->eps;
}

#else

RULE(novograd_measured)(real p, real g, real exp_avg, real *param, real *direction, const novograd_coefs *c)
{
    (void)p, (void)exp_avg, (void)c;
    *param = *direction = g;    /* there is nothing to know of the parameter */
}

RULE(novograd)(real *p, real g, real *exp_avg, const novograd_coefs *c)
{
    *exp_avg = (real)c->beta1 * *exp_avg + (g / (real)c->divisor + (real)c->weight_decay * *p);
    *p = *p - (real)c->lr * *exp_avg;
}

#endif
