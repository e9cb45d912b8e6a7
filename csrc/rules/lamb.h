/* LAMB (You et al. 2020), as in its paper and in optax: steps in Adam's direction, of lr times the
 * norm of the parameter.
 *
 *     m, v as in Adam
 *     d = (m / (1 - beta1^step)) / (sqrt(v) / sqrt(1 - beta2^step) + eps) + weight_decay p
 *     p = p - lr |p| / |d| d      (lr d if either norm is 0)
 *
 * Keras has the decay decoupled. optax may add an eps_root to v / (1 - beta2^step).
 */
#ifndef real

typedef struct { double lr, beta1, beta2, eps, weight_decay, eps_root; } lamb_hyper;
static const char lamb_hyper_names[] = "lr beta1 beta2 eps weight_decay eps_root";

typedef struct {
    double one_minus_beta1, beta2, one_minus_beta2, correction1, eps_inside, rsqrt_correction2, eps, weight_decay, rate;
} lamb_coefs;

static void lamb_prepare(const lamb_hyper *h, double step, lamb_coefs *c)
{
    c->one_minus_beta1 = 1.0 - h->beta1;
    c->beta2 = h->beta2;
    c->one_minus_beta2 = 1.0 - h->beta2;
    c->correction1 = 1.0 / (1.0 - pow(h->beta1, step));
    const double correction2 = 1.0 - pow(h->beta2, step);
    c->eps_inside = or_else(h->eps_root, 0.0) * correction2;
    c->rsqrt_correction2 = 1.0 / sqrt(correction2);
    c->eps = h->eps;
    c->weight_decay = h->weight_decay;
}

static void lamb_scale(const lamb_hyper *h, const fs_whole *whole, double *numbers, lamb_coefs *c)
{
    const bool any_zero = whole->param_norm == 0.0 || whole->direction_norm == 0.0;
    (void)numbers;
    c->rate = any_zero ? h->lr : at_most(whole->largest, h->lr * (whole->param_norm / whole->direction_norm));
}

#else

HELPER(lamb_direction)(real p, real g, real *exp_avg, real *exp_avg_sq, const lamb_coefs *c)
{
    *exp_avg = *exp_avg + (real)c->one_minus_beta1 * (g - *exp_avg);
    *exp_avg_sq = (real)c->beta2 * *exp_avg_sq + (real)c->one_minus_beta2 * g * g;
    real root = SQRT(*exp_avg_sq + (real)c->eps_inside);
    return (real)c->correction1 * *exp_avg / (root * (real)c->rsqrt_correction2 + (real)c->eps) + (real)c->weight_decay * p;
}

RULE(lamb_measured)(real p, real g, real exp_avg, real exp_avg_sq, real *param, real *direction, const lamb_coefs *c)
{
    *param = p;
    *direction = FN(lamb_direction)(p, g, &exp_avg, &exp_avg_sq, c);
}

RULE(lamb)(real *p, real g, real *exp_avg, real *exp_avg_sq, const lamb_coefs *c)
{
    *p = *p - (real)c->rate * FN(lamb_direction)(*p, g, exp_avg, exp_avg_sq, c);
}

#endif
