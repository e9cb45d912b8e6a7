/* Adam (Kingma & Ba 2015) and AMSGrad (Reddi, Kale & Kumar 2018), eps outside the corrected root, as in PyTorch:
 *
 *     m = m + (1 - beta1) (g - m)
 *     v = beta2 v + (1 - beta2) g^2
 *     p = p - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
 *
 * Keras, TensorFlow, scikit-learn and Thinc multiply lr by sqrt(1 - beta2^step) and add eps to sqrt(v) as it is.
 *
 * AMSGrad divides by w = max(w, v) in place of v; optax's maximum is of v / (1 - beta2^step), and it adds eps_root to this
 * corrected v, inside the root, if there is one. AdamW is Adam with decoupled
 * decay, which every rule has.
 */
#ifndef real

typedef struct { double lr, beta1, beta2, eps, convention, eps_root; } adam_hyper;
static const char adam_hyper_names[] = "lr beta1 beta2 eps convention eps_root";

typedef struct {
    double one_minus_beta1, beta2, one_minus_beta2, step_size, eps_inside, rsqrt_correction2, eps;
    double before_max, inside_max, after_max;    /* of AMSGrad: what v is multiplied by; and then as for Adam */
} adam_coefs;

static void adam_prepare(const adam_hyper *h, double step, adam_coefs *c)
{
    c->one_minus_beta1 = 1.0 - h->beta1;
    c->beta2 = h->beta2;
    c->one_minus_beta2 = 1.0 - h->beta2;
    const double correction1 = 1.0 - pow(h->beta1, step), correction2 = 1.0 - pow(h->beta2, step);
    const bool corrects_root = h->convention == FS_TORCH || h->convention == FS_OPTAX;
    c->step_size = corrects_root ? h->lr / correction1 : h->lr * sqrt(correction2) / correction1;
    c->rsqrt_correction2 = corrects_root ? 1.0 / sqrt(correction2) : 1.0;
    c->before_max = h->convention == FS_OPTAX ? 1.0 / correction2 : 1.0;
    c->after_max = h->convention == FS_OPTAX ? 1.0 : c->rsqrt_correction2;
    c->eps_inside = or_else(h->eps_root, 0.0) * correction2;
    c->inside_max = h->convention == FS_OPTAX ? or_else(h->eps_root, 0.0) : c->eps_inside;
    c->eps = h->eps;
}

#else

HELPER(adam_moments)(real g, real *exp_avg, real *exp_avg_sq, const adam_coefs *c)
{
    *exp_avg = *exp_avg + (real)c->one_minus_beta1 * (g - *exp_avg);
    return *exp_avg_sq = (real)c->beta2 * *exp_avg_sq + (real)c->one_minus_beta2 * g * g;
}

HELPER(adam_change)(real exp_avg, real second_moment, double inside, double rsqrt_correction, const adam_coefs *c)
{
    return (real)c->step_size * exp_avg / (SQRT(second_moment + (real)inside) * (real)rsqrt_correction + (real)c->eps);
}

RULE(adam)(real *p, real g, real *exp_avg, real *exp_avg_sq, const adam_coefs *c)
{
    FN(adam_moments)(g, exp_avg, exp_avg_sq, c);
    *p = *p - FN(adam_change)(*exp_avg, *exp_avg_sq, c->eps_inside, c->rsqrt_correction2, c);
}

RULE(adam_amsgrad)(real *p, real g, real *exp_avg, real *exp_avg_sq, real *max_exp_avg_sq, const adam_coefs *c)
{
    real v = FN(adam_moments)(g, exp_avg, exp_avg_sq, c) * (real)c->before_max;
    *max_exp_avg_sq = *max_exp_avg_sq > v ? *max_exp_avg_sq : v;
    *p = *p - FN(adam_change)(*exp_avg, *max_exp_avg_sq, c->inside_max, c->after_max, c);
}

#endif
