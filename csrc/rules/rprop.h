/* Rprop (Riedmiller & Braun 1993), without weight-backtracking, as in PyTorch:
 *
 *     same = sign(g) prev
 *     s = s eta2 if same > 0,  s eta1 if same < 0;  bounded to [step_size1, step_size2]
 *     g = 0 if same < 0
 *     p = p - sign(g) s
 *     prev = g
 *
 * The product of both gradients would vanish where they are small. lr is what s starts with.
 */
#ifndef real

typedef struct { double lr, eta1, eta2, step_size1, step_size2; } rprop_hyper;
static const char rprop_hyper_names[] = "lr eta1 eta2 step_size1 step_size2";

typedef struct { double shrink, grow, smallest, largest; } rprop_coefs;

static void rprop_prepare(const rprop_hyper *h, double step, rprop_coefs *c)
{
    (void)step;
    c->shrink = h->eta1;
    c->grow = h->eta2;
    c->smallest = h->step_size1;
    c->largest = h->step_size2;
}

#else

RULE(rprop)(real *p, real g, real *prev, real *step_size, const rprop_coefs *c)
{
    const real smallest = (real)c->smallest, largest = (real)c->largest;
    const real direction = FN(sign)(g), same = direction * *prev;
    real s = *step_size * (same > 0 ? (real)c->grow : same < 0 ? (real)c->shrink : 1);
    *step_size = s < smallest ? smallest : s > largest ? largest : s;
    *prev = same < 0 ? 0 : g;
    *p = *p - (same < 0 ? 0 : direction) * *step_size;
}

#endif
