/* NAdam (Dozat 2016), Adam with Nesterov's momentum, eps outside the corrected root, as in PyTorch:
 *
 *     mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2),   product_t = mu_1 ... mu_t
 *     m, v as in Adam
 *     p = p - lr ((1 - mu_t) / (1 - product_t) g + mu_(t+1) / (1 - product_(t+1)) m) / (sqrt(v) / sqrt(1 - beta2^t) + eps)
 *
 * optax has beta1 in place of mu, and may add an eps_root to v / (1 - beta2^t), inside the root. The product is a function
 * of t and the present beta1: with a schedule for beta1 PyTorch, which multiplies as it goes, has another.
 */
#ifndef real

typedef struct { double lr, beta1, beta2, eps, momentum_decay, convention, eps_root; } nadam_hyper;
static const char nadam_hyper_names[] = "lr beta1 beta2 eps momentum_decay convention eps_root";

typedef struct {
    double one_minus_beta1, beta2, one_minus_beta2, on_grad, on_average, eps_inside, rsqrt_correction2, eps;
    double counted, product, of_beta1, of_decay;    /* the product of that many, for the next step to go on from */
} nadam_coefs;

static double nadam_mu(const nadam_hyper *h, double step)
{
    return h->beta1 * (1.0 - 0.5 * pow(0.96, step * h->momentum_decay));
}

static void nadam_prepare(const nadam_hyper *h, double step, nadam_coefs *c)
{
    c->one_minus_beta1 = 1.0 - h->beta1;
    c->beta2 = h->beta2;
    c->one_minus_beta2 = 1.0 - h->beta2;
    const double correction2 = 1.0 - pow(h->beta2, step);
    c->eps_inside = or_else(h->eps_root, 0.0) * correction2;
    c->rsqrt_correction2 = 1.0 / sqrt(correction2);
    c->eps = h->eps;
    if (h->convention == FS_OPTAX) {
        c->on_grad = h->lr * (1.0 - h->beta1) / (1.0 - pow(h->beta1, step));
        c->on_average = h->lr * h->beta1 / (1.0 - pow(h->beta1, step + 1.0));
        return;
    }
    if (c->counted == 0.0 || c->counted > step || c->of_beta1 != h->beta1 || c->of_decay != h->momentum_decay) {
        c->counted = 0.0;
        c->product = 1.0;
        c->of_beta1 = h->beta1;
        c->of_decay = h->momentum_decay;
    }
    for (; c->counted < step && c->product != 0.0; c->counted++)    /* after some thousands it is 0 for good */
        c->product *= nadam_mu(h, c->counted + 1.0);
    c->counted = step;
    const double mu = nadam_mu(h, step), next_mu = nadam_mu(h, step + 1.0);
    c->on_grad = h->lr * (1.0 - mu) / (1.0 - c->product);
    c->on_average = h->lr * next_mu / (1.0 - c->product * next_mu);
}

#else

RULE(nadam)(real *p, real g, real *exp_avg, real *exp_avg_sq, const nadam_coefs *c)
{
    *exp_avg = *exp_avg + (real)c->one_minus_beta1 * (g - *exp_avg);
    *exp_avg_sq = (real)c->beta2 * *exp_avg_sq + (real)c->one_minus_beta2 * g * g;
    real direction = (real)c->on_grad * g + (real)c->on_average * *exp_avg;
    *p = *p - direction / (SQRT(*exp_avg_sq + (real)c->eps_inside) * (real)c->rsqrt_correction2 + (real)c->eps);
}

#endif
