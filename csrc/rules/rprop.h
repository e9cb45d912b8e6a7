/* Rprop (Riedmiller & Braun 1993), without weight-backtracking, as in PyTorch:
 *
 *     same = sign(g) prev
 *     s = s eta2 if same > 0,  s eta1 if same < 0;  bounded to [step_size1, step_size2]
 *     g = 0 if same < 0
 *     p = p - sign(g) s
 *     prev = g
 *
 * The product of both gradients would vanish where they are small. lr is what s starts with. optax is a step late: prev is
 * the step it takes the next time, unless the sign changes; and it bounds s only where it grows or shrinks.
 */
#ifndef real

typedef struct { double lr, eta1, eta2, step_size1, step_size2, convention; } rprop_hyper;
static const char rprop_hyper_names[] = "lr eta1 eta2 step_size1 step_size2 convention";

typedef struct { double shrink, grow, smallest, largest, is_late; } rprop_coefs;

static void rprop_prepare(const rprop_hyper *h, double step, rprop_coefs *c)
{
    (void)step;
    c->shrink = h->eta1;
    c->grow = h->eta2;
    c->smallest = h->step_size1;
    c->largest = h->step_size2;
    c->is_late = h->convention == FS_OPTAX;
}

#else

RULE(rprop)(real *p, real g, real *prev, real *step_size, const rprop_coefs *c)
{
    const real smallest = (real)c->smallest, largest = (real)c->largest, before = *prev, size = *step_size;
    const real direction = FN(sign)(g), same = direction * before;
    real s = size * (same > 0 ? (real)c->grow : same < 0 ? (real)c->shrink : 1);
    s = s < smallest ? smallest : s > largest ? largest : s;
    s = c->is_late != 0 ? same == 0 ? size : s : s;
    const real step = (same < 0 ? 0 : direction) * s, late = same < 0 ? 0 : before;
    const real kept = same < 0 ? 0 : g;
    *step_size = s;
    *prev = c->is_late != 0 ? step : kept;
    *p = *p - (c->is_late != 0 ? late : step);
}

#endif
