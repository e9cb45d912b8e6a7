/* FTRL-Proximal (McMahan et al. 2013), its l2 counted twice, as in Keras and TensorFlow:
 *
 *     z = z + g - (sqrt(n + g^2) - sqrt(n)) / lr p
 *     n = n + g^2
 *     p = (min(max(z, -l1), l1) - z) / ((beta + sqrt(n)) / lr + 2 l2);   p = 0 where |z| <= l1
 */
#ifndef real

typedef struct { double lr, beta, l1, l2; } ftrl_hyper;
static const char ftrl_hyper_names[] = "lr beta l1_regularization_strength l2_regularization_strength";

typedef struct { double rate, l1, l2; } ftrl_coefs;

static void ftrl_prepare(const ftrl_hyper *h, double step, ftrl_coefs *c)
{
    (void)step;
    c->rate = 1.0 / h->lr;
    c->l1 = h->l1;
    c->l2 = h->beta / h->lr + 2.0 * h->l2;
}

#else

RULE(ftrl)(real *p, real g, real *accumulator, real *linear, const ftrl_coefs *c)
{
    const real rate = (real)c->rate, l1 = (real)c->l1, before = SQRT(*accumulator);
    *accumulator = *accumulator + g * g;
    const real root = SQRT(*accumulator);
    *linear = *linear + (g - (root - before) * rate * *p);
    const real z = *linear, beyond = (z > l1 ? l1 : z < -l1 ? -l1 : z) - z;
    *p = beyond == 0 ? 0 : beyond / (root * rate + (real)c->l2);
}

#endif
