/* Schedule-Free SGD and AdamW (Defazio et al. 2024), as its authors have them: the parameter is y, where gradients
 * are taken.
 *
 *     d = g,  or  g / (sqrt(v) / sqrt(1 - beta2^step) + eps) + weight_decay y,  v = beta2 v + (1 - beta2) g^2
 *     w = step^r max(lr so far)^weight_lr_power
 *     c = w / (sum of all w so far)      (0 if that is 0)
 *     y = y + c (z - y) - lr (1 - beta (1 - c)) d
 *     z = z - lr d
 *
 * That keeps y = (1 - beta) z + beta x for the average x = (1 - c) x + c z, the result, which is nowhere stored. beta is
 * called momentum, or beta1.
 */
#ifndef real

typedef struct { double lr, momentum, r, weight_lr_power; } schedule_free_sgd_hyper;
static const char schedule_free_sgd_hyper_names[] = "lr momentum r weight_lr_power";

typedef struct { double lr, beta1, beta2, eps, weight_decay, r, weight_lr_power; } schedule_free_adamw_hyper;
static const char schedule_free_adamw_hyper_names[] = "lr beta1 beta2 eps weight_decay r weight_lr_power";

typedef struct { double step, lr, weight, rate; } schedule_free_sgd_coefs;

typedef struct {
    schedule_free_sgd_coefs average;
    double beta2, one_minus_beta2, rsqrt_correction2, eps, weight_decay;
} schedule_free_adamw_coefs;

/* The numbers are the sum of the weights, and the largest lr. */
static void schedule_free_average(double beta, double r, double weight_lr_power, double *numbers, schedule_free_sgd_coefs *c)
{
    numbers[1] = c->lr > numbers[1] ? c->lr : numbers[1];
    const double weight = pow(c->step, r) * pow(numbers[1], weight_lr_power);
    numbers[0] = numbers[0] + weight;
    c->weight = numbers[0] == 0.0 ? 0.0 : weight / numbers[0];
    c->rate = c->lr * (1.0 - beta * (1.0 - c->weight));
}

static void schedule_free_sgd_prepare(const schedule_free_sgd_hyper *h, double step, schedule_free_sgd_coefs *c)
{
    c->step = step;
    c->lr = h->lr;
}

static void schedule_free_sgd_scale(const schedule_free_sgd_hyper *h, const fs_whole *whole, double *numbers,
                                    schedule_free_sgd_coefs *c)
{
    (void)whole;
    schedule_free_average(h->momentum, h->r, h->weight_lr_power, numbers, c);
}

static void schedule_free_adamw_prepare(const schedule_free_adamw_hyper *h, double step, schedule_free_adamw_coefs *c)
{
    c->average.step = step;
    c->average.lr = h->lr;
    c->beta2 = h->beta2;
    c->one_minus_beta2 = 1.0 - h->beta2;
    c->rsqrt_correction2 = 1.0 / sqrt(1.0 - pow(h->beta2, step));
    c->eps = h->eps;
    c->weight_decay = h->weight_decay;
}

static void schedule_free_adamw_scale(const schedule_free_adamw_hyper *h, const fs_whole *whole, double *numbers,
                                      schedule_free_adamw_coefs *c)
{
    (void)whole;
    schedule_free_average(h->beta1, h->r, h->weight_lr_power, numbers, &c->average);
}

#else

RULE(schedule_free_sgd)(real *y, real g, real *z, const schedule_free_sgd_coefs *c)
{
    *y = *y + (real)c->weight * (*z - *y) - (real)c->rate * g;
    *z = *z - (real)c->lr * g;
}

RULE(schedule_free_adamw)(real *y, real g, real *z, real *exp_avg_sq, const schedule_free_adamw_coefs *c)
{
    *exp_avg_sq = (real)c->beta2 * *exp_avg_sq + (real)c->one_minus_beta2 * g * g;
    real direction = g / (SQRT(*exp_avg_sq) * (real)c->rsqrt_correction2 + (real)c->eps) + (real)c->weight_decay * *y;
    FN(schedule_free_sgd_element)(y, direction, z, &c->average);
}

#endif
