/* LARS (You, Gitman & Ginsburg 2017), as in its paper and in optax: momentum of steps of trust_coefficient lr times the
 * norm of the parameter.
 *
 *     d = g + weight_decay p
 *     r = trust_coefficient |p| / (|d| + eps)      (1 if either norm is 0)
 *     b = momentum b + lr r d
 *     p = p - b,  or  p - (momentum b + lr r d)  (Nesterov)
 */
#ifndef real

typedef struct { double lr, momentum, trust_coefficient, eps, weight_decay; } lars_hyper;
static const char lars_hyper_names[] = "lr momentum trust_coefficient eps weight_decay";

typedef struct { double momentum, weight_decay, rate; } lars_coefs;

static void lars_prepare(const lars_hyper *h, double step, lars_coefs *c)
{
    (void)step;
    c->momentum = h->momentum;
    c->weight_decay = h->weight_decay;
}

static void lars_scale(const lars_hyper *h, const fs_whole *whole, double *numbers, lars_coefs *c)
{
    const bool any_zero = whole->param_norm == 0.0 || whole->direction_norm == 0.0;
    const double ratio = h->trust_coefficient * whole->param_norm / (whole->direction_norm + h->eps);
    (void)numbers;
    c->rate = any_zero ? h->lr : at_most(whole->largest, h->lr * ratio);
}

#else

HELPER(lars_direction)(real p, real g, const lars_coefs *c)
{
    return g + (real)c->weight_decay * p;
}

RULE(lars_measured)(real p, real g, real buffer, real *param, real *direction, const lars_coefs *c)
{
    (void)buffer;
    *param = p;
    *direction = FN(lars_direction)(p, g, c);
}

RULE(lars)(real *p, real g, real *buffer, const lars_coefs *c)
{
    *buffer = (real)c->momentum * *buffer + (real)c->rate * FN(lars_direction)(*p, g, c);
    *p = *p - *buffer;
}

RULE(lars_nesterov_measured)(real p, real g, real buffer, real *param, real *direction, const lars_coefs *c)
{
    FN(lars_measured_element)(p, g, buffer, param, direction, c);
}

RULE(lars_nesterov)(real *p, real g, real *buffer, const lars_coefs *c)
{
    const real direction = FN(lars_direction)(*p, g, c);
    *buffer = (real)c->momentum * *buffer + (real)c->rate * direction;
    *p = *p - ((real)c->momentum * *buffer + (real)c->rate * direction);
}

#endif
