/* AdaBelief (Zhuang et al. 2020), eps both in the average and outside the root:
 *
 *     m = m + (1 - beta1) (g - m)
 *     s = beta2 s + (1 - beta2) (g - m)^2 + eps
 *     p = p - lr / (1 - beta1^step) m / (sqrt(s) / sqrt(1 - beta2^step) + eps)
 *
 * optax has an eps_root in the average in place of eps.
 */
#ifndef real

typedef struct { double lr, beta1, beta2, eps, eps_root; } adabelief_hyper;
static const char adabelief_hyper_names[] = "lr beta1 beta2 eps eps_root";

typedef struct {
    double one_minus_beta1, beta2, one_minus_beta2, eps_inside, step_size, rsqrt_correction2, eps;
} adabelief_coefs;

static void adabelief_prepare(const adabelief_hyper *h, double step, adabelief_coefs *c)
{
    c->one_minus_beta1 = 1.0 - h->beta1;
    c->beta2 = h->beta2;
    c->one_minus_beta2 = 1.0 - h->beta2;
    c->eps_inside = or_else(h->eps_root, h->eps);
    c->step_size = h->lr / (1.0 - pow(h->beta1, step));
    c->rsqrt_correction2 = 1.0 / sqrt(1.0 - pow(h->beta2, step));
    c->eps = h->eps;
}

#else

RULE(adabelief)(real *p, real g, real *exp_avg, real *exp_avg_var, const adabelief_coefs *c)
{
    *exp_avg = *exp_avg + (real)c->one_minus_beta1 * (g - *exp_avg);
    real surprise = g - *exp_avg;
    *exp_avg_var = (real)c->beta2 * *exp_avg_var + (real)c->one_minus_beta2 * surprise * surprise + (real)c->eps_inside;
    *p = *p - (real)c->step_size * *exp_avg / (SQRT(*exp_avg_var) * (real)c->rsqrt_correction2 + (real)c->eps);
}

#endif
