/* RAdam (Liu et al. 2020), eps outside the uncorrected root, as in PyTorch:
 *
 *     m = m + (1 - beta1) (g - m)
 *     v = beta2 v + (1 - beta2) g^2
 *     p = p - lr / (1 - beta1^step) m r sqrt(1 - beta2^step) / (sqrt(v) + eps)
 *
 * where r rectifies the variance of the denominator while v is an average of few: with rho = 2 / (1 - beta2) - 1 and
 * rho_t = rho - 2 step beta2^step / (1 - beta2^step), r^2 = (rho_t - 4) (rho_t - 2) rho / ((rho - 4) (rho - 2) rho_t).
 * As long as rho_t is at most 5, p = p - lr / (1 - beta1^step) m.
 *
 * optax has eps beside the corrected root, may add an eps_root inside it, and begins to rectify at 5; so does Thinc, which
 * is a step ahead in all powers.
 */
#ifndef real

typedef struct { double lr, beta1, beta2, eps, convention, eps_root; } radam_hyper;
static const char radam_hyper_names[] = "lr beta1 beta2 eps convention eps_root";

typedef struct {
    double one_minus_beta1, beta2, one_minus_beta2, step_size, eps_inside, on_root, eps, is_rectified;
} radam_coefs;

static void radam_prepare(const radam_hyper *h, double step, radam_coefs *c)
{
    step += h->convention == FS_THINC;
    const double power2 = pow(h->beta2, step), correction2 = 1.0 - power2;
    const double longest = 2.0 / (1.0 - h->beta2) - 1.0, length = longest - 2.0 * step * power2 / correction2;
    c->one_minus_beta1 = 1.0 - h->beta1;
    c->beta2 = h->beta2;
    c->one_minus_beta2 = 1.0 - h->beta2;
    c->step_size = h->lr / (1.0 - pow(h->beta1, step));
    c->eps = h->eps;
    c->is_rectified = h->convention == FS_TORCH ? length > 5.0 : length >= 5.0;
    c->eps_inside = or_else(h->eps_root, 0.0) * correction2;
    c->on_root = h->convention == FS_OPTAX ? 1.0 / sqrt(correction2) : 1.0;
    if (c->is_rectified != 0.0) {
        const double square = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length);
        c->step_size = c->step_size * sqrt(square) * (h->convention == FS_OPTAX ? 1.0 : sqrt(correction2));
    }
}

#else

RULE(radam)(real *p, real g, real *exp_avg, real *exp_avg_sq, const radam_coefs *c)
{
    *exp_avg = *exp_avg + (real)c->one_minus_beta1 * (g - *exp_avg);
    *exp_avg_sq = (real)c->beta2 * *exp_avg_sq + (real)c->one_minus_beta2 * g * g;
    real change = (real)c->step_size * *exp_avg;
    real root = SQRT(*exp_avg_sq + (real)c->eps_inside);
    *p = *p - (c->is_rectified != 0 ? change / (root * (real)c->on_root + (real)c->eps) : change);
}

#endif
