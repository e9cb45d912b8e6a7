/* Adamax (Kingma & Ba 2015), eps beside the gradient's magnitude, as in PyTorch:
 *
 *     m = m + (1 - beta1) (g - m)
 *     u = max(beta2 u, |g| + eps)
 *     p = p - lr / (1 - beta1^step) m / u
 *
 * Keras and TensorFlow add eps to u when they divide.
 */
#ifndef real

typedef struct { double lr, beta1, beta2, eps, convention; } adamax_hyper;
static const char adamax_hyper_names[] = "lr beta1 beta2 eps convention";

typedef struct { double one_minus_beta1, beta2, step_size, eps_inside, eps; } adamax_coefs;

static void adamax_prepare(const adamax_hyper *h, double step, adamax_coefs *c)
{
    c->one_minus_beta1 = 1.0 - h->beta1;
    c->beta2 = h->beta2;
    c->step_size = h->lr / (1.0 - pow(h->beta1, step));
    const bool inside = h->convention != FS_KERAS && h->convention != FS_TF;
    c->eps_inside = inside ? h->eps : 0.0;
    c->eps = inside ? 0.0 : h->eps;
}

#else

RULE(adamax)(real *p, real g, real *exp_avg, real *exp_inf, const adamax_coefs *c)
{
    *exp_avg = *exp_avg + (real)c->one_minus_beta1 * (g - *exp_avg);
    real before = (real)c->beta2 * *exp_inf, now = (g > 0 ? g : 0 - g) + (real)c->eps_inside;
    *exp_inf = before > now ? before : now;
    *p = *p - (real)c->step_size * *exp_avg / (*exp_inf + (real)c->eps);
}

#endif
