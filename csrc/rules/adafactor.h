/* Adafactor (Shazeer and Stern 2018), as in PyTorch: of the variance of a matrix only the means of its rows and columns are
 * kept. These move on, and rows are divided by their mean, before anything else; then
 *
 *     v = rows columns      (of arrays that are no matrices: v = v + (1 - beta2) (g^2 - v))
 *     d = g / max(sqrt(v), eps1)
 *     p = (1 - lr weight_decay) p - max(eps2, rms(p)) min(lr, 1 / sqrt(step)) / max(1, rms(d) / limit) d
 *
 * with 1 - beta2 = step^beta2_decay. Keras and optax have eps1 beside the squares of gradients in place of there; optax has
 * no limit of lr, and a decay that is not times lr. A v too small for the type, like the product of a row and a column that
 * saw no gradients, counts as the smallest normal number, since 0 / 0 would be nan; and what is kept is at most the largest
 * number, since inf / inf and inf - inf are.
 */
#ifndef real

typedef struct { double lr, beta2_decay, eps1, eps2, d, convention, weight_decay; } adafactor_hyper;
static const char adafactor_hyper_names[] = "lr beta2_decay eps1 eps2 d convention weight_decay";

/* least_v: for float and for double. */
typedef struct { fs_factoring factoring; double least_v[2], relative_lr, decay, rate; } adafactor_coefs;

static void adafactor_prepare(const adafactor_hyper *h, double step, adafactor_coefs *c)
{
    const bool is_optax = h->convention == FS_OPTAX, inside = is_optax || h->convention == FS_KERAS;
    const double limit = is_optax ? INFINITY : 1.0 / sqrt(step);
    c->factoring.weight = pow(step, h->beta2_decay);
    c->factoring.eps = inside ? h->eps1 : 0.0;
    c->factoring.least = inside ? 0.0 : h->eps1;
    for (int i = 0; i < 2; i++) {
        const double least = or_epsilon(c->factoring.least, i == 0 ? sizeof(float) : sizeof(double)), square = least * least;
        const double smallest = i == 0 ? 0x1p-126 : 0x1p-1022;
        c->least_v[i] = square < smallest ? smallest : square;
    }
    c->relative_lr = limit < h->lr ? limit : h->lr;
    c->decay = 1.0 - (is_optax ? 1.0 : h->lr) * h->weight_decay;
}

static void adafactor_scale(const adafactor_hyper *h, const fs_whole *whole, double *numbers, adafactor_coefs *c)
{
    const double root = sqrt(whole->size), rms = whole->param_norm / root;
    const double excess = whole->direction_norm / root / h->d;
    (void)numbers;
    c->rate = (rms < h->eps2 ? h->eps2 : rms) * c->relative_lr / (excess < 1.0 ? 1.0 : excess);
}

#else

HELPER(adafactor_along)(real g, real v, const adafactor_coefs *c)
{
    const real least_v = (real)c->least_v[sizeof(real) == sizeof(double)];
    return g / SQRT(v < least_v ? least_v : v);
}

HELPER(adafactor_moved)(real p, real direction, const adafactor_coefs *c)
{
    return (real)c->decay * p - (real)c->rate * direction;
}

RULE(adafactor_measured)(real p, real g, real row, real column, real *param, real *direction, const adafactor_coefs *c)
{
    *param = p;
    *direction = FN(adafactor_along)(g, row * column, c);
}

RULE(adafactor)(real *p, real g, const real *row, const real *column, const adafactor_coefs *c)
{
    *p = FN(adafactor_moved)(*p, FN(adafactor_along)(g, *row * *column, c), c);
}

HELPER(adafactor_of_vectors_direction)(real g, real *variance, const adafactor_coefs *c)
{
    const double eps = or_epsilon(c->factoring.eps, sizeof(real));
    const real largest = (real)fs_largest(sizeof(real));
    const real moved = *variance + (real)c->factoring.weight * ((g * g + (real)eps) - *variance);
    *variance = moved > largest ? largest : moved;
    return FN(adafactor_along)(g, *variance, c);
}

RULE(adafactor_of_vectors_measured)(real p, real g, real variance, real *param, real *direction, const adafactor_coefs *c)
{
    *param = p;
    *direction = FN(adafactor_of_vectors_direction)(g, &variance, c);
}

RULE(adafactor_of_vectors)(real *p, real g, real *variance, const adafactor_coefs *c)
{
    *p = FN(adafactor_moved)(*p, FN(adafactor_of_vectors_direction)(g, variance, c), c);
}

#endif
