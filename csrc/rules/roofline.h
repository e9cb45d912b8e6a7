/* The roofline: as many arrays read and written as a rule with 0 to 4 states touches, with one addition each. No rule
 * can be faster than memory lets this be; benchmarks quote their speed as a share of it. */
#ifndef real

typedef struct { double unused; } roofline_hyper;
static const char roofline_hyper_names[] = "lr";

typedef struct { double unused; } roofline_coefs;

static void roofline_prepare(const roofline_hyper *h, double step, roofline_coefs *c)
{
    (void)step;
    c->unused = h->unused;
}

#else

RULE(roofline0)(real *p, real g, const roofline_coefs *c)
{
    (void)c;
    *p = *p + g;
}

RULE(roofline1)(real *p, real g, real *a, const roofline_coefs *c)
{
    (void)c;
    *p = *p + g;
    *a = *a + g;
}

RULE(roofline2)(real *p, real g, real *a, real *b, const roofline_coefs *c)
{
    (void)c;
    *p = *p + g;
    *a = *a + g;
    *b = *b + g;
}

RULE(roofline3)(real *p, real g, real *a, real *b, real *d, const roofline_coefs *c)
{
    (void)c;
    *p = *p + g;
    *a = *a + g;
    *b = *b + g;
    *d = *d + g;
}

RULE(roofline4)(real *p, real g, real *a, real *b, real *d, real *e, const roofline_coefs *c)
{
    (void)c;
    *p = *p + g;
    *a = *a + g;
    *b = *b + g;
    *d = *d + g;
    *e = *e + g;
}

#endif
