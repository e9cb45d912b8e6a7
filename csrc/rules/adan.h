/* Adan (Xie et al. 2022), betas as in the authors' implementation, which are 1 - beta in the paper:
 *
 *     d = g - g_before      (0 in the first step)
 *     m = m + (1 - beta1) (g - m)
 *     v = v + (1 - beta2) (d - v)
 *     n = beta3 n + (1 - beta3) (g + beta2 d)^2
 *     p = p - lr (m / (1 - beta1^step) + beta2 v / (1 - beta2^step)) / (sqrt(n) / sqrt(1 - beta3^step) + eps)
 *
 * optax has 1 - beta2 before d and v in place of beta2, and an eps_root added to n / (1 - beta3^step).
 */
#ifndef real

typedef struct { double lr, beta1, beta2, beta3, eps, convention, eps_root; } adan_hyper;
static const char adan_hyper_names[] = "lr beta1 beta2 beta3 eps convention eps_root";

typedef struct {
    double is_first, one_minus_beta1, ahead, one_minus_beta2, beta3, one_minus_beta3, step_size, diff_step_size, eps_inside,
        rsqrt_correction3, eps;
} adan_coefs;

static void adan_prepare(const adan_hyper *h, double step, adan_coefs *c)
{
    const double correction3 = 1.0 - pow(h->beta3, step);
    c->is_first = step == 1.0;
    c->one_minus_beta1 = 1.0 - h->beta1;
    c->ahead = h->convention == FS_OPTAX ? 1.0 - h->beta2 : h->beta2;
    c->one_minus_beta2 = 1.0 - h->beta2;
    c->beta3 = h->beta3;
    c->one_minus_beta3 = 1.0 - h->beta3;
    c->step_size = h->lr / (1.0 - pow(h->beta1, step));
    c->diff_step_size = h->lr * c->ahead / (1.0 - pow(h->beta2, step));
    c->eps_inside = or_else(h->eps_root, 0.0) * correction3;
    c->rsqrt_correction3 = 1.0 / sqrt(correction3);
    c->eps = h->eps;
}

#else

RULE(adan)(real *p, real g, real *exp_avg, real *exp_avg_diff, real *exp_avg_sq, real *pre_grad, const adan_coefs *c)
{
    const real diff = c->is_first != 0 ? 0 : g - *pre_grad, ahead = g + (real)c->ahead * diff;
    *exp_avg = *exp_avg + (real)c->one_minus_beta1 * (g - *exp_avg);
    *exp_avg_diff = *exp_avg_diff + (real)c->one_minus_beta2 * (diff - *exp_avg_diff);
    *exp_avg_sq = (real)c->beta3 * *exp_avg_sq + (real)c->one_minus_beta3 * ahead * ahead;
    *pre_grad = g;
    *p = *p - ((real)c->step_size * *exp_avg + (real)c->diff_step_size * *exp_avg_diff) /
              (SQRT(*exp_avg_sq + (real)c->eps_inside) * (real)c->rsqrt_correction3 + (real)c->eps);
}

#endif
