/* Prodigy (Mishchenko & Defazio 2023), as its authors have it and optax: Adam with a learning rate d that grows with how far
 * all arrays together have come from where they started.
 *
 *     dlr = d lr      (times sqrt(1 - beta2^step) / (1 - beta1^step) with the correction)
 *     m = beta1 m + (1 - beta1) d g;  v = beta2 v + (1 - beta2) (d g)^2
 *     s = beta3 s + (d / d0) dlr g      (with the safeguard (d / d0) d g)
 *     r = beta3 r + sum of (d / d0) dlr g (p0 - p)
 *     d' = max(d, d_coef r / sum of |s|)      (d where that is no finite number)
 *     p = p - (dlr weight_decay p + dlr m / (sqrt(v) + d' eps))
 *
 * The numbers are d and r.
 */
#ifndef real

typedef struct {
    double lr, beta1, beta2, beta3, eps, d0, d_coef, weight_decay;    /* beta3: NaN for the root of beta2 */
    double use_bias_correction, safeguard_warmup;
} prodigy_hyper;
static const char prodigy_hyper_names[] =
    "lr beta1 beta2 beta3 eps d0 d_coef weight_decay use_bias_correction safeguard_warmup";

typedef struct {
    double beta1, one_minus_beta1, beta2, one_minus_beta2, beta3, lr;
    double d, dlr, numerator_rate, s_rate, decay, eps;
} prodigy_coefs;

static void prodigy_prepare(const prodigy_hyper *h, double step, prodigy_coefs *c)
{
    c->beta1 = h->beta1;
    c->one_minus_beta1 = 1.0 - h->beta1;
    c->beta2 = h->beta2;
    c->one_minus_beta2 = 1.0 - h->beta2;
    c->beta3 = or_else(h->beta3, sqrt(h->beta2));
    c->lr = h->lr;
    if (h->use_bias_correction != 0.0)
        c->lr *= sqrt(1.0 - pow(h->beta2, step)) / (1.0 - pow(h->beta1, step));
}

static void prodigy_begin(const prodigy_hyper *h, const double *numbers, prodigy_coefs *c)
{
    c->d = numbers[0];
    c->dlr = c->d * c->lr;
    c->numerator_rate = c->d / h->d0 * c->dlr;
    c->s_rate = h->safeguard_warmup != 0.0 ? c->d / h->d0 * c->d : c->numerator_rate;
    c->decay = c->dlr * h->weight_decay;
}

static void prodigy_scale(const prodigy_hyper *h, const fs_whole *whole, double *numbers, prodigy_coefs *c)
{
    numbers[1] = c->beta3 * numbers[1] + whole->sums[0];
    const double estimate = h->d_coef * numbers[1] / whole->sums[1];
    if (isfinite(estimate) && estimate > c->d)
        numbers[0] = estimate;
    c->eps = numbers[0] * h->eps;
}

#else

RULE(prodigy_measured)(real p, real g, real exp_avg, real exp_avg_sq, real s, real p0, real *gained, real *along,
                       const prodigy_coefs *c)
{
    const real next_s = (real)c->beta3 * s + (real)c->s_rate * g;
    (void)exp_avg, (void)exp_avg_sq;
    *gained = (real)c->numerator_rate * g * (p0 - p);
    *along = next_s < 0 ? 0 - next_s : next_s;
}

RULE(prodigy)(real *p, real g, real *exp_avg, real *exp_avg_sq, real *s, real *p0, const prodigy_coefs *c)
{
    real scaled = (real)c->d * g;
    (void)p0;
    *exp_avg = (real)c->beta1 * *exp_avg + (real)c->one_minus_beta1 * scaled;
    *exp_avg_sq = (real)c->beta2 * *exp_avg_sq + (real)c->one_minus_beta2 * scaled * scaled;
    *s = (real)c->beta3 * *s + (real)c->s_rate * g;
    *p = *p - ((real)c->decay * *p + (real)c->dlr * *exp_avg / (SQRT(*exp_avg_sq) + (real)c->eps));
}

#endif
