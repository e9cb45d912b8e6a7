/* Yogi (Zaheer et al. 2018), with Adam's corrections, eps outside the corrected root:
 *
 *     m = m + (1 - beta1) (g - m)
 *     v = v - (1 - beta2) sign(v - g^2) g^2
 *     p = p - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
 */
#ifndef real

typedef struct { double lr, beta1, beta2, eps; } yogi_hyper;
static const char yogi_hyper_names[] = "lr beta1 beta2 eps";

typedef struct { double one_minus_beta1, one_minus_beta2, step_size, rsqrt_correction2, eps; } yogi_coefs;

static void yogi_prepare(const yogi_hyper *h, double step, yogi_coefs *c)
{
    c->one_minus_beta1 = 1.0 - h->beta1;
    c->one_minus_beta2 = 1.0 - h->beta2;
    c->step_size = h->lr / (1.0 - pow(h->beta1, step));
    c->rsqrt_correction2 = 1.0 / sqrt(1.0 - pow(h->beta2, step));
    c->eps = h->eps;
}

#else

RULE(yogi)(real *p, real g, real *exp_avg, real *exp_avg_sq, const yogi_coefs *c)
{
    real square = g * g;
    *exp_avg = *exp_avg + (real)c->one_minus_beta1 * (g - *exp_avg);
    *exp_avg_sq = *exp_avg_sq - (real)c->one_minus_beta2 * FN(sign)(*exp_avg_sq - square) * square;
    *p = *p - (real)c->step_size * *exp_avg / (SQRT(*exp_avg_sq) * (real)c->rsqrt_correction2 + (real)c->eps);
}

#endif
