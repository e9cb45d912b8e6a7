/* Tests of the C core by itself; run by `make test` in csrc. Bits are compared wherever bits are promised. */
#include "harness.h"

/* Every level, and number of threads where there is work for several, against the baseline with one thread. */
static void check_levels_and_threads(trio t, int rule, bool is_busy)
{
    const size_t size = t.initial->arrays[0].size;
    fs_options options = is_busy ? busy(t.initial, rule) : plain(t.initial, rule);
    t.initial->groups[0].decay_mode = size % 4;
    copy_plan(t.expected, t.initial);
    CONTEXT("%s, size %zu", fs_rule_name(rule), size);
    CHECK(fs_level_set(FS_BASELINE) == FS_OK);
    const fs_report expected = take_3_steps(t.expected, options);
    CHECK(size == 0 || !same_operand(t.expected, t.initial, FS_PARAM));
    FOR_LEVELS(level)
        for (options.n_threads = 1; options.n_threads <= (size > FS_BLOCK ? 3 : 1); options.n_threads++) {
            CONTEXT("%s, size %zu, real %d, busy %d, level %s, %d threads", fs_rule_name(rule), size,
                    t.initial->arrays[0].real, is_busy, fs_level_name(level), options.n_threads);
            copy_plan(t.plan, t.initial);
            const fs_report report = take_3_steps(t.plan, options);
            CHECK(report.applied);
            CHECK(report.has_norm == is_busy);
            CHECK(is_busy || report.clip_factor == 1);
            CHECK(report.grad_norm == expected.grad_norm);
            CHECK(report.clip_factor == expected.clip_factor);
            CHECK(same_plan(t.plan, t.expected));
        }
}

static void test_levels_and_threads(void)
{
    static const size_t large[] = {127, 128, 129, 1023, 1024, 1025, 5000, 30011};
    for (size_t s = 0; s < 71 + LENGTH(large); s += quick && s < 60 ? 17 : 1)
        for (fs_dtype real = FS_FLOAT32; real <= FS_FLOAT64; real++) {
            const size_t size = s <= 70 ? s : large[s - 71];
            const trio t = make_trio((int)real, 1, &size);
            FOR_RULES(rule) {
                check_levels_and_threads(t, rule, false);
                check_levels_and_threads(t, rule, true);
            }
            free_trio(t);
        }
}

/* Rules as the textbook has them, with states s, hyper-parameters h, in step t. */
static void textbook_sgd(wide *p, wide g, wide *s, const double *h, int t)
{
    (void)s, (void)t;
    *p -= h[0] * g;
}

static void textbook_nesterov(wide *p, wide g, wide *s, const double *h, int t)
{
    s[0] = t == 1 ? g : h[1] * s[0] + (1 - (wide)h[2]) * g;
    *p -= h[0] * (g + h[1] * s[0]);
}

static void textbook_adagrad(wide *p, wide g, wide *s, const double *h, int t)
{
    s[0] += g * g;
    *p -= h[0] / (1 + (t - 1) * (wide)h[1]) * g / (sqrtl(s[0]) + h[2]);
}

static void textbook_adadelta(wide *p, wide g, wide *s, const double *h, int t)
{
    (void)t;
    s[0] = h[1] * s[0] + (1 - (wide)h[1]) * g * g;
    const wide delta = sqrtl(s[1] + h[2]) / sqrtl(s[0] + h[2]) * g;
    s[1] = h[1] * s[1] + (1 - (wide)h[1]) * delta * delta;
    *p -= h[0] * delta;
}

static void textbook_momentum(wide *p, wide g, wide *s, const double *h, int t)
{
    s[0] = t == 1 ? g : h[1] * s[0] + (1 - (wide)h[2]) * g;
    *p -= h[0] * s[0];
}

static wide textbook_variance(wide g, wide *s, const double *h)
{
    s[0] = h[1] * s[0] + (1 - (wide)h[1]) * g * g;
    return s[0];
}

static wide textbook_centered_variance(wide g, wide *s, const double *h)
{
    s[1] = h[1] * s[1] + (1 - (wide)h[1]) * g;
    return textbook_variance(g, s, h) - s[1] * s[1];
}

static void textbook_rmsprop(wide *p, wide g, wide *s, const double *h, int t)
{
    (void)t;
    *p -= h[0] * g / (sqrtl(textbook_variance(g, s, h)) + h[2]);
}

static void textbook_rmsprop_momentum(wide *p, wide g, wide *s, const double *h, int t)
{
    (void)t;
    s[1] = h[3] * s[1] + g / (sqrtl(textbook_variance(g, s, h)) + h[2]);
    *p -= h[0] * s[1];
}

static void textbook_rmsprop_centered(wide *p, wide g, wide *s, const double *h, int t)
{
    (void)t;
    *p -= h[0] * g / (sqrtl(textbook_centered_variance(g, s, h)) + h[2]);
}

static void textbook_rmsprop_centered_momentum(wide *p, wide g, wide *s, const double *h, int t)
{
    (void)t;
    s[2] = h[3] * s[2] + g / (sqrtl(textbook_centered_variance(g, s, h)) + h[2]);
    *p -= h[0] * s[2];
}

static wide corrected(wide average, wide beta, int t)
{
    return average / (1 - powl(beta, t));
}

/* A hyper-parameter of which there may be none. */
static double given(double x) { return isnan(x) ? 0 : x; }

static void textbook_adam(wide *p, wide g, wide *s, const double *h, int t)
{
    s[0] = h[1] * s[0] + (1 - (wide)h[1]) * g;
    s[1] = h[2] * s[1] + (1 - (wide)h[2]) * g * g;
    *p -= h[0] * corrected(s[0], h[1], t) / (sqrtl(corrected(s[1], h[2], t) + given(h[5])) + h[3]);
}

static void textbook_amsgrad(wide *p, wide g, wide *s, const double *h, int t)
{
    s[0] = h[1] * s[0] + (1 - (wide)h[1]) * g;
    s[1] = h[2] * s[1] + (1 - (wide)h[2]) * g * g;
    s[2] = fmaxl(s[2], s[1]);
    *p -= h[0] * corrected(s[0], h[1], t) / (sqrtl(corrected(s[2], h[2], t) + given(h[5])) + h[3]);
}

static void textbook_adamax(wide *p, wide g, wide *s, const double *h, int t)
{
    s[0] = h[1] * s[0] + (1 - (wide)h[1]) * g;
    s[1] = fmaxl(h[2] * s[1], fabsl(g) + h[3]);
    *p -= h[0] * corrected(s[0], h[1], t) / s[1];
}

static void textbook_radam(wide *p, wide g, wide *s, const double *h, int t)
{
    t += h[4] == FS_THINC;
    const wide rho = 2 / (1 - (wide)h[2]) - 1, power = powl(h[2], t), rho_t = rho - 2 * t * power / (1 - power);
    const wide r = sqrtl((rho_t - 4) * (rho_t - 2) * rho / ((rho - 4) * (rho - 2) * rho_t));
    s[0] = h[1] * s[0] + (1 - (wide)h[1]) * g;
    s[1] = h[2] * s[1] + (1 - (wide)h[2]) * g * g;
    const wide on_root = h[4] == FS_OPTAX ? sqrtl(1 - power) : 1, root = sqrtl(s[1] + given(h[5]) * (1 - power));
    const wide rectified = r * sqrtl(1 - power) / on_root / (root / on_root + h[3]);
    *p -= h[0] * corrected(s[0], h[1], t) * (rho_t > 5 ? rectified : 1);
}

static wide sign(wide x) { return (x > 0) - (x < 0); }

static void textbook_lion(wide *p, wide g, wide *s, const double *h, int t)
{
    (void)t;
    *p -= h[0] * sign(h[1] * s[0] + (1 - (wide)h[1]) * g);
    s[0] = h[2] * s[0] + (1 - (wide)h[2]) * g;
}

static void textbook_signsgd(wide *p, wide g, wide *s, const double *h, int t)
{
    (void)s, (void)t;
    *p -= h[0] * sign(g);
}

static void textbook_signum(wide *p, wide g, wide *s, const double *h, int t)
{
    (void)t;
    s[0] = h[1] * s[0] + (1 - (wide)h[1]) * g;
    *p -= h[0] * sign(s[0]);
}

static void textbook_adabelief(wide *p, wide g, wide *s, const double *h, int t)
{
    s[0] = h[1] * s[0] + (1 - (wide)h[1]) * g;
    s[1] = h[2] * s[1] + (1 - (wide)h[2]) * (g - s[0]) * (g - s[0]) + (isnan(h[4]) ? h[3] : h[4]);
    *p -= h[0] * corrected(s[0], h[1], t) / (sqrtl(corrected(s[1], h[2], t)) + h[3]);
}

static void textbook_yogi(wide *p, wide g, wide *s, const double *h, int t)
{
    s[0] = h[1] * s[0] + (1 - (wide)h[1]) * g;
    s[1] -= (1 - (wide)h[2]) * sign(s[1] - g * g) * g * g;
    *p -= h[0] * corrected(s[0], h[1], t) / (sqrtl(corrected(s[1], h[2], t)) + h[3]);
}

static void textbook_rprop(wide *p, wide g, wide *s, const double *h, int t)
{
    const wide same = sign(g * s[0]);
    (void)t;
    s[1] = fminl(fmaxl(s[1] * (same > 0 ? h[2] : same < 0 ? h[1] : 1), h[3]), h[4]);
    s[0] = same < 0 ? 0 : g;
    *p -= sign(s[0]) * s[1];
}

/* With the step that is still to be taken in place of the gradient. */
static void textbook_late_rprop(wide *p, wide g, wide *s, const double *h, int t)
{
    const wide same = sign(g * s[0]);
    (void)t;
    *p -= same < 0 ? 0 : s[0];
    s[1] = same == 0 ? s[1] : fminl(fmaxl(s[1] * (same > 0 ? h[2] : h[1]), h[3]), h[4]);
    s[0] = same < 0 ? 0 : sign(g) * s[1];
}

static void textbook_asgd(wide *p, wide g, wide *s, const double *h, int t)
{
    const wide eta = h[0] / powl(1 + (wide)h[1] * h[0] * (t - 1), h[2]);
    *p -= eta * (g + h[1] * *p);
    s[0] += (*p - s[0]) / fmaxl(1, t - 1 - h[3]);
}

static void textbook_ftrl(wide *p, wide g, wide *s, const double *h, int t)
{
    (void)t;
    s[1] += g - (sqrtl(s[0] + g * g) - sqrtl(s[0])) / h[0] * *p;
    s[0] += g * g;
    const wide beyond = fmaxl(fabsl(s[1]) - h[2], 0);
    *p = beyond == 0 ? 0 : -sign(s[1]) * beyond / ((h[1] + sqrtl(s[0])) / h[0] + 2 * h[3]);
}

static void textbook_adan(wide *p, wide g, wide *s, const double *h, int t)
{
    const wide weight = h[5] == FS_OPTAX ? 1 - (wide)h[2] : h[2], diff = t == 1 ? 0 : g - s[3], ahead = g + weight * diff;
    s[0] = h[1] * s[0] + (1 - (wide)h[1]) * g;
    s[1] = h[2] * s[1] + (1 - (wide)h[2]) * diff;
    s[2] = h[3] * s[2] + (1 - (wide)h[3]) * ahead * ahead;
    s[3] = g;
    const wide root = sqrtl(corrected(s[2], h[3], t) + given(h[6]));
    *p -= h[0] * (corrected(s[0], h[1], t) + weight * corrected(s[1], h[2], t)) / (root + h[4]);
}

static wide nadam_mu(const double *h, int t) { return h[1] * (1 - powl(0.96L, t * (wide)h[4]) / 2); }

static void textbook_nadam(wide *p, wide g, wide *s, const double *h, int t)
{
    wide mu = h[1], next_mu = h[1], product = powl(h[1], t);
    if (h[5] != FS_OPTAX) {
        product = 1;
        for (int i = 1; i <= t; i++)
            product *= nadam_mu(h, i);
        mu = nadam_mu(h, t);
        next_mu = nadam_mu(h, t + 1);
    }
    s[0] = h[1] * s[0] + (1 - (wide)h[1]) * g;
    s[1] = h[2] * s[1] + (1 - (wide)h[2]) * g * g;
    const wide direction = (1 - mu) * g / (1 - product) + next_mu * s[0] / (1 - product * next_mu);
    *p -= h[0] * direction / (sqrtl(corrected(s[1], h[2], t) + given(h[6])) + h[3]);
}

/* With the average x of z in place of what is done to y without it. */
static void textbook_schedule_free(wide *y, wide direction, wide *z, wide *x, wide *sum, double lr, double beta, wide weight)
{
    *sum += weight;
    *z -= lr * direction;
    *x += weight / *sum * (*z - *x);
    *y = (1 - (wide)beta) * *z + beta * *x;
}

static void textbook_schedule_free_sgd(wide *p, wide g, wide *s, const double *h, int t)
{
    textbook_schedule_free(p, g, &s[0], &s[1], &s[2], h[0], h[1], powl(t, h[2]) * powl(h[0], h[3]));
}

static void textbook_schedule_free_adamw(wide *p, wide g, wide *s, const double *h, int t)
{
    s[1] = h[2] * s[1] + (1 - (wide)h[2]) * g * g;
    const wide direction = g / (sqrtl(corrected(s[1], h[2], t)) + h[3]) + h[4] * *p;
    textbook_schedule_free(p, direction, &s[0], &s[2], &s[3], h[0], h[1], powl(t, h[5]) * powl(h[0], h[6]));
}

static void test_textbook(void)
{
    static const struct {
        const char *rule, *hyper_names;
        double hyper[FS_MAX_HYPER];
        void (*textbook)(wide *p, wide g, wide *s, const double *h, int t);
    } cases[] = {
        {"sgd", "lr momentum dampening convention", {0.1, 0.5, 0.5}, textbook_sgd},
        {"sgd_momentum", "lr momentum dampening convention", {0.1, 0.9, 0.25}, textbook_momentum},
        {"sgd_nesterov", "lr momentum dampening convention", {0.1, 0.9, 0.0}, textbook_nesterov},
        {"adagrad", "lr lr_decay eps convention", {0.1, 0.01, 1e-10}, textbook_adagrad},
        {"adadelta", "lr rho eps", {0.5, 0.9, 1e-6}, textbook_adadelta},
        {"rmsprop", "lr alpha eps momentum convention", {0.01, 0.9, 1e-3, 0.9}, textbook_rmsprop},
        {"rmsprop_momentum", "lr alpha eps momentum convention", {0.01, 0.9, 1e-3, 0.9}, textbook_rmsprop_momentum},
        {"rmsprop_centered", "lr alpha eps momentum convention", {0.01, 0.9, 1e-3, 0.9}, textbook_rmsprop_centered},
        {"rmsprop_centered_momentum", "lr alpha eps momentum convention", {0.01, 0.99, 1e-8, 0.9},
         textbook_rmsprop_centered_momentum},
        {"adam", "lr beta1 beta2 eps convention eps_root", {0.01, 0.9, 0.999, 1e-3, FS_TORCH, NAN}, textbook_adam},
        {"adam_amsgrad", "lr beta1 beta2 eps convention eps_root", {0.01, 0.8, 0.5, 1e-3, FS_TORCH, NAN}, textbook_amsgrad},
        {"adamax", "lr beta1 beta2 eps convention", {0.01, 0.9, 0.5, 1e-3}, textbook_adamax},
        {"lion", "lr beta1 beta2", {0.01, 0.5, 0.75}, textbook_lion},
        {"signsgd", "lr momentum", {0.01, 0.0}, textbook_signsgd},
        {"signum", "lr momentum", {0.01, 0.75}, textbook_signum},
        {"adabelief", "lr beta1 beta2 eps eps_root", {0.01, 0.9, 0.99, 1e-3, NAN}, textbook_adabelief},
        {"adabelief", "lr beta1 beta2 eps eps_root", {0.01, 0.9, 0.99, 1e-3, 0.125}, textbook_adabelief},
        {"yogi", "lr beta1 beta2 eps", {0.01, 0.9, 0.75, 1e-3}, textbook_yogi},
        {"rprop", "lr eta1 eta2 step_size1 step_size2 convention", {0.01, 0.5, 1.25, 0.01, 0.1}, textbook_rprop},
        {"rprop", "lr eta1 eta2 step_size1 step_size2 convention", {0.01, 0.5, 1.25, 0.01, 0.1, FS_OPTAX},
         textbook_late_rprop},
        {"asgd", "lr lambd alpha t0", {0.1, 0.5, 0.75, 4.5}, textbook_asgd},
        {"ftrl", "lr beta l1_regularization_strength l2_regularization_strength", {0.1, 0.5, 0.25, 0.125}, textbook_ftrl},
        {"ftrl", "lr beta l1_regularization_strength l2_regularization_strength", {0.1, 0.0, 0.25, 0.0}, textbook_ftrl},
        {"adan", "lr beta1 beta2 beta3 eps convention eps_root", {0.01, 0.9, 0.75, 0.99, 1e-3, FS_TORCH, NAN},
         textbook_adan},
        {"adan", "lr beta1 beta2 beta3 eps convention eps_root", {0.01, 0.9, 0.75, 0.99, 1e-3, FS_OPTAX, 0.125},
         textbook_adan},
        {"radam", "lr beta1 beta2 eps convention eps_root", {0.01, 0.9, 0.9, 1e-3, FS_TORCH, NAN}, textbook_radam},
        {"radam", "lr beta1 beta2 eps convention eps_root", {0.01, 0.9, 0.9, 1e-3, FS_OPTAX, 0.125}, textbook_radam},
        {"radam", "lr beta1 beta2 eps convention eps_root", {0.01, 0.9, 0.9, 1e-3, FS_THINC}, textbook_radam},
        {"nadam", "lr beta1 beta2 eps momentum_decay convention eps_root", {0.01, 0.9, 0.75, 1e-3, 0.5, FS_TORCH, NAN},
         textbook_nadam},
        {"nadam", "lr beta1 beta2 eps momentum_decay convention eps_root", {0.01, 0.9, 0.75, 1e-3, 0.5, FS_OPTAX, 0.125},
         textbook_nadam},
        {"schedule_free_sgd", "lr momentum r weight_lr_power", {0.1, 0.75, 0.5, 2.0}, textbook_schedule_free_sgd},
        {"schedule_free_adamw", "lr beta1 beta2 eps weight_decay r weight_lr_power",
         {0.01, 0.75, 0.99, 1e-3, 0.25, 1.0, 2.0}, textbook_schedule_free_adamw},
    };
    static const double tolerance[] = {[FS_FLOAT32] = 1e-5, [FS_FLOAT64] = 1e-12};
    enum { SIZE = 200, STEPS = 20 };
    const size_t size = SIZE;
    for (size_t c = 0; c < LENGTH(cases); c++)
        for (int storage = FS_FLOAT32; storage <= FS_FLOAT64; storage++) {
            CONTEXT("%s, storage %d", cases[c].rule, storage);
            const int rule = find_rule(cases[c].rule);
            fs_plan *plan = make_plan(storage, 1, &size);
            const fs_options options = plain(plan, rule);
            CHECK(strcmp(fs_rule_hyper_names(rule), cases[c].hyper_names) == 0);
            memcpy(plan->groups[0].hyper, cases[c].hyper, sizeof cases[c].hyper);
            /* From zero, so that errors are seen relative to the change; but steps of Rprop grow from what is there. */
            const double second_state = cases[c].textbook == textbook_late_rprop ? 0.25 : 0.0;
            wide expected[SIZE] = {0}, states[SIZE][FS_MAX_STATES] = {{0}};
            for (int o = 0; o < FS_RESIDUAL; o++)
                for (size_t e = 0; o != FS_GRAD && e < size; e++)
                    set(plan, 0, o, e, o == FS_STATE + 1 ? second_state : 0.0);
            for (size_t e = 0; e < size; e++)
                states[e][1] = second_state;
            for (int n = 0; n < FS_MAX_NUMBERS; n++)
                memset(plan->arrays[0].number[n], 0, sizeof(double));
            for (int t = 1; t <= STEPS; t++) {
                for (size_t e = 0; e < size; e++) {
                    set(plan, 0, FS_GRAD, e, e == 0 || (e < 8 && t % 3 == 0) ? 0.0 : random_signed() / t);
                    cases[c].textbook(&expected[e], get(plan, 0, FS_GRAD, e), states[e], cases[c].hyper, t);
                }
                CHECK(take_step(plan, options).applied);
            }
            wide largest = 0, error = 0;
            for (size_t e = 0; e < size; e++) {
                largest = fmaxl(largest, fabsl(expected[e]));
                const wide own = fabsl(get(plan, 0, FS_PARAM, e) - expected[e]);
                error = own > error || isnan(own) ? own : error;    /* where fmaxl would prefer any number to nan */
            }
            CHECK(largest > 1e-3);
            CHECK(error <= tolerance[storage] * largest);
            CHECK(plan->step == STEPS);
            free_plan(plan);
        }
}

/* The directions of scaled rules, and what they do with one. */
static wide lamb_direction(wide p, wide g, wide *s, const double *h, int t)
{
    s[0] = h[1] * s[0] + (1 - (wide)h[1]) * g;
    s[1] = h[2] * s[1] + (1 - (wide)h[2]) * g * g;
    return corrected(s[0], h[1], t) / (sqrtl(corrected(s[1], h[2], t) + given(h[5])) + h[3]) + h[4] * p;
}

static wide lars_direction(wide p, wide g, wide *s, const double *h, int t)
{
    (void)s, (void)t;
    return g + h[4] * p;
}

static wide novograd_direction(wide p, wide g, wide *s, const double *h, int t)
{
    (void)p, (void)s, (void)h, (void)t;
    return g;
}

/* What it is multiplied by, with a number that is kept from step to step. */
static wide lamb_rate(wide param_norm, wide direction_norm, wide *number, const double *h, int t)
{
    (void)number, (void)t;
    return h[0] * (param_norm == 0 || direction_norm == 0 ? 1 : param_norm / direction_norm);
}

static wide lars_rate(wide param_norm, wide direction_norm, wide *number, const double *h, int t)
{
    (void)number, (void)t;
    return h[0] * (param_norm == 0 || direction_norm == 0 ? 1 : h[2] * param_norm / (direction_norm + h[3]));
}

static wide novograd_rate(wide param_norm, wide direction_norm, wide *number, const double *h, int t)
{
    const wide square = direction_norm * direction_norm;
    (void)param_norm;
    *number = t == 1 ? square : h[2] * *number + (1 - (wide)h[2]) * square;
    return 1 / (sqrtl(*number + given(h[5])) + h[3]);
}

static void lamb_move(wide *p, wide step, wide *s, const double *h)
{
    (void)s, (void)h;
    *p -= step;
}

static void lars_move(wide *p, wide step, wide *s, const double *h)
{
    s[0] = h[1] * s[0] + step;
    *p -= s[0];
}

static void lars_nesterov_move(wide *p, wide step, wide *s, const double *h)
{
    s[0] = h[1] * s[0] + step;
    *p -= h[1] * s[0] + step;
}

static void novograd_move(wide *p, wide step, wide *s, const double *h)
{
    s[0] = h[1] * s[0] + step + h[4] * *p;
    *p -= h[0] * s[0];
}

/* Rules whose steps are scaled by the norms of each array: three arrays, of which the first stays 0 as long as its gradient
 * is; decay comes before the norm. */
static void test_scaled(void)
{
    static const struct {
        const char *rule;
        double hyper[FS_MAX_HYPER];
        wide (*direction)(wide p, wide g, wide *s, const double *h, int t);
        wide (*rate)(wide param_norm, wide direction_norm, wide *number, const double *h, int t);
        void (*move)(wide *p, wide step, wide *s, const double *h);
    } cases[] = {
        {"lamb", {0.05, 0.9, 0.75, 1e-3, 0.25, 0.125}, lamb_direction, lamb_rate, lamb_move},
        {"lars", {0.5, 0.75, 0.125, 0.5, 0.25}, lars_direction, lars_rate, lars_move},
        {"lars_nesterov", {0.5, 0.75, 0.125, 0.5, 0.25}, lars_direction, lars_rate, lars_nesterov_move},
        {"lamb", {0.05, 0.9, 0.75, 1e-3, 0.25, NAN}, lamb_direction, lamb_rate, lamb_move},
        {"novograd", {0.125, 0.75, 0.5, 1e-3, 0.25, 0.125}, novograd_direction, novograd_rate, novograd_move},
        {"novograd", {0.125, 0.75, 0.5, 1e-3, 0.25, NAN}, novograd_direction, novograd_rate, novograd_move},
    };
    enum { N_ARRAYS = 3, LARGEST = 3001, STEPS = 4 };
    static const size_t sizes[N_ARRAYS] = {5, LARGEST, 1024};
    static wide expected[N_ARRAYS][LARGEST], states[N_ARRAYS][LARGEST][FS_MAX_STATES], directions[LARGEST];
    wide numbers[N_ARRAYS];
    for (size_t c = 0; c < LENGTH(cases); c++)
        for (int n_threads = 1; n_threads <= 3; n_threads += 2)
            for (int decays = 0; decays <= 1; decays++) {
                CONTEXT("%s, %d threads, decay %d", cases[c].rule, n_threads, decays);
                const double *h = cases[c].hyper;
                fs_plan *plan = make_plan(FS_FLOAT64, N_ARRAYS, sizes);
                fs_options options = plain(plan, find_rule(cases[c].rule));
                options.n_threads = n_threads;
                const int used = n_threads / 2;
                fs_group *group = &plan->groups[used];
                use_rule(&plan->groups[!used], find_rule("sgd"));
                memcpy(group->hyper, h, sizeof cases[c].hyper);
                group->decay_mode = FS_INDEPENDENT;
                group->weight_decay = decays ? 0.125 : 0.0;
                memset(states, 0, sizeof states);
                for (size_t i = 0; i < N_ARRAYS; i++) {
                    plan->arrays[i].group = used;
                    for (size_t e = 0; e < sizes[i]; e++) {
                        for (int o = FS_STATE; o < FS_STATE + FS_MAX_STATES; o++)
                            set(plan, i, o, e, 0.0);
                        set(plan, i, FS_PARAM, e, i == 0 ? 0.0 : random_signed());
                        expected[i][e] = get(plan, i, FS_PARAM, e);
                    }
                }
                for (int t = 1; t <= STEPS; t++) {
                    for (size_t i = 0; i < N_ARRAYS; i++) {
                        wide param_norm = 0, direction_norm = 0;
                        for (size_t e = 0; e < sizes[i]; e++) {
                            set(plan, i, FS_GRAD, e, i == 0 && t == 1 ? 0.0 : random_signed());
                            expected[i][e] *= decays ? 0.875 : 1.0;
                            directions[e] = cases[c].direction(expected[i][e], get(plan, i, FS_GRAD, e), states[i][e], h, t);
                            param_norm += expected[i][e] * expected[i][e];
                            direction_norm += directions[e] * directions[e];
                        }
                        const wide rate = cases[c].rate(sqrtl(param_norm), sqrtl(direction_norm), &numbers[i], h, t);
                        for (size_t e = 0; e < sizes[i]; e++)
                            cases[c].move(&expected[i][e], rate * directions[e], states[i][e], h);
                    }
                    CHECK(take_step(plan, options).applied);
                }
                for (size_t i = 0; i < N_ARRAYS; i++)
                    for (size_t e = 0; e < sizes[i]; e++)
                        CHECK(fabsl(get(plan, i, FS_PARAM, e) - expected[i][e]) < 1e-13);
                free_plan(plan);
            }
}

/* Prodigy, whose steps are scaled by sums over all arrays: those of two groups with a learning rate each, or of one beside
 * another with LAMB. The first gradients are those of a square, for d to grow. */
static void test_summed(void)
{
    static const char names[] = "lr beta1 beta2 beta3 eps d0 d_coef weight_decay use_bias_correction safeguard_warmup";
    static const double cases[][10] = {
        {0.5, 0.75, 0.5, NAN, 1e-3, 0.125, 16.0, 0.25, 0.0, 0.0},
        {0.5, 0.75, 0.5, 0.875, 1e-3, 0.125, 16.0, 0.0, 1.0, 0.0},
        {0.5, 0.75, 0.5, 0.875, 1e-3, 0.125, 32.0, 0.25, 0.0, 1.0},
    };
    enum { N_ARRAYS = 4, LARGEST = 3001, STEPS = 5 };
    static const size_t sizes[N_ARRAYS] = {5, LARGEST, 300, 1024};
    static wide expected[N_ARRAYS][LARGEST], states[N_ARRAYS][LARGEST][4];
    for (size_t c = 0; c < LENGTH(cases); c++)
        for (int turn = 0; turn < 4; turn++) {
            const bool with_lamb = turn % 2;
            const int n_threads = turn / 2 ? 3 : 1;
            CONTEXT("case %zu, with LAMB %d, %d threads", c, with_lamb, n_threads);
            const double *h = cases[c];
            const wide lr[] = {h[0], with_lamb ? 0.0 : h[0] / 2};
            fs_plan *plan = make_plan(FS_FLOAT64, N_ARRAYS, sizes);
            fs_options options = plain(plan, find_rule("prodigy"));
            options.n_threads = n_threads;
            CHECK(strcmp(fs_rule_hyper_names(plan->groups[0].rule), names) == 0);
            for (int g = 0; g < 2; g++) {
                memcpy(plan->groups[g].hyper, h, sizeof cases[c]);
                plan->groups[g].hyper[0] = (double)lr[g];
            }
            if (with_lamb)
                use_rule(&plan->groups[1], find_rule("lamb"));
            for (size_t i = 0; i < N_ARRAYS; i++) {
                plan->arrays[i].group = i % 2;
                memcpy(plan->arrays[i].number[0], &h[5], sizeof(double));
                memset(plan->arrays[i].number[1], 0, sizeof(double));
                for (size_t e = 0; e < sizes[i]; e++) {
                    expected[i][e] = get(plan, i, FS_PARAM, e);
                    for (int o = 0; o < 4; o++) {
                        states[i][e][o] = o < 3 ? 0 : expected[i][e];
                        set(plan, i, FS_STATE + o, e, (double)states[i][e][o]);
                    }
                }
            }
            wide d = h[5], r = 0;
            for (int t = 1; t <= STEPS; t++) {
                const wide beta3 = isnan(h[3]) ? sqrtl(h[2]) : (wide)h[3], before = d;
                const wide correction = h[8] != 0 ? sqrtl(1 - powl(h[2], t)) / (1 - powl(h[1], t)) : 1;
                wide denominator = 0;
                r *= beta3;
                for (size_t i = 0; i < N_ARRAYS; i++)
                    for (size_t e = 0; e < sizes[i]; e++) {
                        set(plan, i, FS_GRAD, e, t <= 3 ? (double)expected[i][e] : random_signed());
                        const wide g = get(plan, i, FS_GRAD, e), dlr = d * lr[i % 2] * correction;
                        wide *s = states[i][e];
                        if (i % 2 && with_lamb)
                            continue;
                        s[0] = h[1] * s[0] + (1 - (wide)h[1]) * d * g;
                        s[1] = h[2] * s[1] + (1 - (wide)h[2]) * d * d * g * g;
                        s[2] = beta3 * s[2] + d / h[5] * (h[9] != 0 ? d : dlr) * g;
                        r += d / h[5] * dlr * g * (s[3] - expected[i][e]);
                        denominator += fabsl(s[2]);
                    }
                d = fmaxl(d, h[6] * r / denominator);
                for (size_t i = 0; i < N_ARRAYS; i += 1 + with_lamb)
                    for (size_t e = 0; e < sizes[i]; e++) {
                        const wide *s = states[i][e], dlr = before * lr[i % 2] * correction;
                        expected[i][e] -= dlr * (s[0] / (sqrtl(s[1]) + d * h[4]) + h[7] * expected[i][e]);
                    }
                CHECK(take_step(plan, options).applied);
            }
            CHECK(d > h[5]);
            for (size_t i = 0; i < N_ARRAYS; i += 1 + with_lamb) {
                double numbers[2];
                for (int n = 0; n < 2; n++)
                    memcpy(&numbers[n], plan->arrays[i].number[n], sizeof numbers[n]);
                CHECK(fabsl(numbers[0] - d) < 1e-13 * d);
                CHECK(fabsl(numbers[1] - r) < 1e-13 * fabsl(r));
                for (size_t e = 0; e < sizes[i]; e++)
                    CHECK(fabsl(get(plan, i, FS_PARAM, e) - expected[i][e]) < 1e-13);
            }
            free_plan(plan);
        }
}

/* Numbers that a rule keeps, where doubles should not lie: those of Schedule-Free in a warm-up from 0 and after it. */
static void test_numbers(void)
{
    static const struct { double lr, sum, largest; } steps[] = {
        {0.0, 0.0, 0.0}, {1e-200, 0.0, 1e-200}, {0.5, 0.25, 0.5}, {0.375, 0.5, 0.5}};    /* 1e-200 squared is 0 */
    const size_t size = 3;
    fs_plan *plan = make_plan(FS_FLOAT64, 1, &size);
    const fs_options options = plain(plan, find_rule("schedule_free_sgd"));
    char room[1 + 2 * sizeof(double)] = {0};
    for (int n = 0; n < 2; n++)
        fs_array_set_number(&plan->arrays[0], n, room + 1 + (size_t)n * sizeof(double));
    for (size_t t = 0; t < LENGTH(steps); t++) {
        const double before = get(plan, 0, FS_PARAM, 0), hyper[] = {steps[t].lr, 0.5, 0.0, 2.0};
        double numbers[2];
        memcpy(plan->groups[0].hyper, hyper, sizeof hyper);
        CHECK(take_step(plan, options).applied);
        memcpy(numbers, room + 1, sizeof numbers);
        CHECK(numbers[0] == steps[t].sum);
        CHECK(numbers[1] == steps[t].largest);
        CHECK((get(plan, 0, FS_PARAM, 0) == before) == (t < 2));
    }
    free_plan(plan);
}

/* Muon's direction is what the caller put into the second state. In Keras gradients enter the buffer whole. */
static void test_muon(void)
{
    const size_t size = 3;
    fs_plan *plan = make_plan(FS_FLOAT64, 1, &size);
    const fs_options options = plain(plan, find_rule("muon"));
    for (int convention = FS_TORCH; convention <= FS_OPTAX; convention++) {
        const double hyper[] = {0.25, 0.75, convention};
        memcpy(plan->groups[0].hyper, hyper, sizeof hyper);
        double param[3], buffer[3], direction[3];
        for (size_t e = 0; e < size; e++) {
            direction[e] = get(plan, 0, FS_STATE + 1, e);
            param[e] = get(plan, 0, FS_PARAM, e) - hyper[0] * direction[e];
            buffer[e] = 0.75 * get(plan, 0, FS_STATE, e);
            buffer[e] += (convention == FS_KERAS ? 1.0 : 0.25) * get(plan, 0, FS_GRAD, e);
        }
        CHECK(take_step(plan, options).applied);
        for (size_t e = 0; e < size; e++) {
            CHECK(get(plan, 0, FS_PARAM, e) == param[e]);
            CHECK(get(plan, 0, FS_STATE, e) == buffer[e]);
            CHECK(get(plan, 0, FS_STATE + 1, e) == direction[e]);
        }
    }
    free_plan(plan);
}

/* Where libraries differ in more than defaults, as the last hyper-parameter says: in whether the velocity has lr inside, and
 * the root eps. */
static bool is_one_of(double convention, unsigned conventions)
{
    return conventions >> (int)convention & 1;
}

static void convention_momentum(wide *p, wide g, wide *s, const double *h, int t)
{
    const bool inside = is_one_of(h[3], 1 << FS_KERAS | 1 << FS_TF | 1 << FS_SKLEARN);
    s[0] = inside ? h[1] * s[0] + h[0] * g : t == 1 ? g : h[1] * s[0] + (1 - (wide)h[2]) * g;
    *p -= inside ? s[0] : h[0] * s[0];
}

static void convention_nesterov(wide *p, wide g, wide *s, const double *h, int t)
{
    const bool inside = is_one_of(h[3], 1 << FS_KERAS | 1 << FS_TF | 1 << FS_SKLEARN);
    s[0] = inside ? h[1] * s[0] + h[0] * g : t == 1 ? g : h[1] * s[0] + (1 - (wide)h[2]) * g;
    *p -= h[0] * g + (inside ? 1 : h[0]) * h[1] * s[0];
}

static wide convention_root(wide x, double eps, bool inside)
{
    return inside ? sqrtl(x + eps) : sqrtl(x) + eps;
}

static void convention_adagrad(wide *p, wide g, wide *s, const double *h, int t)
{
    s[0] += g * g;
    *p -= h[0] / (1 + (t - 1) * (wide)h[1]) * g /
          convention_root(s[0], h[2], is_one_of(h[3], 1 << FS_KERAS | 1 << FS_OPTAX));
}

static void convention_rmsprop(wide *p, wide g, wide *s, const double *h, int t)
{
    (void)t;
    *p -= h[0] * g / convention_root(textbook_variance(g, s, h), h[2], is_one_of(h[4], 1 << FS_KERAS | 1 << FS_OPTAX));
}

static void convention_rmsprop_momentum(wide *p, wide g, wide *s, const double *h, int t)
{
    const bool inside = is_one_of(h[4], 1 << FS_KERAS | 1 << FS_OPTAX | 1 << FS_TF);
    (void)t;
    s[1] = h[3] * s[1] + (inside ? h[0] : 1) * g / convention_root(textbook_variance(g, s, h), h[2], inside);
    *p -= (inside ? 1 : h[0]) * s[1];
}

static void convention_rmsprop_centered(wide *p, wide g, wide *s, const double *h, int t)
{
    (void)t;
    *p -= h[0] * g / convention_root(textbook_centered_variance(g, s, h), h[2],
                                     is_one_of(h[4], 1 << FS_KERAS | 1 << FS_OPTAX));
}

/* Adam's root is corrected before eps is added, or with lr. */
static wide convention_correction(const double *h, int t)
{
    return is_one_of(h[4], 1 << FS_TORCH | 1 << FS_OPTAX) ? 1 : sqrtl(1 - powl(h[2], t));
}

static void convention_adam(wide *p, wide g, wide *s, const double *h, int t)
{
    const wide with_lr = convention_correction(h, t);
    s[0] = h[1] * s[0] + (1 - (wide)h[1]) * g;
    s[1] = h[2] * s[1] + (1 - (wide)h[2]) * g * g;
    *p -= h[0] * with_lr * corrected(s[0], h[1], t) / (sqrtl(corrected(s[1], h[2], t) + given(h[5])) * with_lr + h[3]);
}

static void convention_amsgrad(wide *p, wide g, wide *s, const double *h, int t)
{
    const wide with_lr = convention_correction(h, t);
    const bool largest_corrected = is_one_of(h[4], 1 << FS_OPTAX);
    s[0] = h[1] * s[0] + (1 - (wide)h[1]) * g;
    s[1] = h[2] * s[1] + (1 - (wide)h[2]) * g * g;
    s[2] = fmaxl(s[2], largest_corrected ? corrected(s[1], h[2], t) : s[1]);
    const wide second = largest_corrected ? s[2] : corrected(s[2], h[2], t);
    *p -= h[0] * with_lr * corrected(s[0], h[1], t) / (sqrtl(second + given(h[5])) * with_lr + h[3]);
}

static void test_conventions(void)
{
    static const struct {
        const char *rule;
        int n_hyper;    /* before the convention */
        double hyper[FS_MAX_HYPER];
        void (*by_convention)(wide *p, wide g, wide *s, const double *h, int t);
    } cases[] = {
        {"sgd", 3, {0.1, 0.5, 0.25}, textbook_sgd},
        {"sgd_momentum", 3, {0.1, 0.9, 0.25}, convention_momentum},
        {"sgd_nesterov", 3, {0.1, 0.9, 0.0}, convention_nesterov},
        {"adagrad", 3, {0.1, 0.01, 0.125}, convention_adagrad},
        {"rmsprop", 4, {0.01, 0.9, 0.125, 0.0}, convention_rmsprop},
        {"rmsprop_momentum", 4, {0.01, 0.9, 0.125, 0.9}, convention_rmsprop_momentum},
        {"rmsprop_centered", 4, {0.01, 0.9, 0.125, 0.0}, convention_rmsprop_centered},
        {"adam", 4, {0.01, 0.9, 0.75, 0.125, 0.0, 0.25}, convention_adam},
        {"adam_amsgrad", 4, {0.01, 0.9, 0.75, 0.125, 0.0, 0.25}, convention_amsgrad},
        {"adam_amsgrad", 4, {0.01, 0.9, 0.75, 0.125, 0.0, NAN}, convention_amsgrad},
    };
    enum { STEPS = 5 };
    const size_t one = 1;
    fs_plan *plan = make_plan(FS_FLOAT64, 1, &one);
    for (size_t c = 0; c < LENGTH(cases); c++)
        for (int convention = FS_TORCH; convention <= FS_THINC; convention++) {
            wide expected = 0, states[FS_MAX_STATES] = {0};
            const fs_options options = plain(plan, find_rule(cases[c].rule));
            double *hyper = plan->groups[0].hyper;
            memcpy(hyper, cases[c].hyper, sizeof cases[c].hyper);
            hyper[cases[c].n_hyper] = convention;
            plan->step = 0;
            set(plan, 0, FS_PARAM, 0, 0);
            for (int o = FS_STATE; o < FS_AVERAGE; o++)
                set(plan, 0, o, 0, 0);
            for (int t = 1; t <= STEPS; t++) {
                set(plan, 0, FS_GRAD, 0, random_signed() / t);
                cases[c].by_convention(&expected, get(plan, 0, FS_GRAD, 0), states, hyper, t);
                CHECK(take_step(plan, options).applied);
                CONTEXT("%s, convention %d, step %d: %.17g, not %.17Lg", cases[c].rule, convention, t,
                        get(plan, 0, FS_PARAM, 0), expected);
                CHECK(fabsl(get(plan, 0, FS_PARAM, 0) - expected) <= 1e-14L);
            }
        }
    free_plan(plan);
}

/* Rounding can make the variance of centered RMSprop negative: it counts as 0. alpha of 1 keeps the averages as set here. */
static void test_negative_variance(void)
{
    const size_t size = 37;
    fs_plan *plan = make_plan(FS_FLOAT64, 1, &size);
    const fs_options options = plain(plan, find_rule("rmsprop_centered"));
    memcpy(plan->groups[0].hyper, (double[]){0.5, 1.0, 0.125, 0.0, FS_TORCH}, 5 * sizeof(double));
    for (size_t e = 0; e < size; e++) {
        set(plan, 0, FS_PARAM, e, 3.0);
        set(plan, 0, FS_GRAD, e, 0.25);
        set(plan, 0, FS_STATE, e, 0.25);
        set(plan, 0, FS_STATE + 1, e, e % 2 ? 1.0 : 0.0);
    }
    CHECK(take_step(plan, options).applied);
    for (size_t e = 0; e < size; e++)
        CHECK(get(plan, 0, FS_PARAM, e) == 3.0 - 0.5 * (0.25 / ((e % 2 ? 0.0 : 0.5) + 0.125)));
    free_plan(plan);
}

/* Every half there is, from storage and back, side by side and with gaps. */
static void check_all_halves(fs_dtype dtype, fs_dtype real, const fs_kernels *k, size_t gap)
{
    enum { N = 1 << 16, MAX_GAP = 3 };
    static uint16_t stored[MAX_GAP * N], back[MAX_GAP * N];
    static double run[N];
    for (size_t i = 0; i < N; i++)
        stored[i * gap] = (uint16_t)i;
    k->load[dtype](1, N, run, (char *)stored, 0, (ptrdiff_t)(gap * sizeof *stored));
    k->store[dtype](1, N, run, (char *)back, 0, (ptrdiff_t)(gap * sizeof *back));
    for (size_t i = 0; i < N; i++) {
        const double x = from_half(dtype, (unsigned)i), y = read_item(real, (char *)run + i * fs_dtype_size(real));
        CHECK(isnan(x) ? isnan(y) : x == y && signbit(x) == signbit(y));
        CHECK(same_half(dtype, back[i * gap], (uint16_t)i));
    }
}

static void test_halves_load_and_store(void)
{
    for (fs_dtype dtype = FS_FLOAT16; dtype <= FS_BFLOAT16; dtype++)
        for (fs_dtype real = FS_FLOAT32; real <= FS_FLOAT64; real++)
            FOR_LEVELS(level) {
                CONTEXT("dtype %d, real %d, level %s", dtype, real, fs_level_name(level));
                check_all_halves(dtype, real, fs_kernels_of(level, real), 1);
                check_all_halves(dtype, real, fs_kernels_of(level, real), 3);
            }
}

static void test_halves_round(void)
{
    enum { N = 4096, CHUNKS = 1024 };
    static uint32_t bits[N];
    static uint16_t expected[N], stored[N];
    random_state = 1;
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        for (size_t i = 0; i < N; i++)
            bits[i] = random_float_bits();
        for (fs_dtype dtype = FS_FLOAT16; dtype <= FS_BFLOAT16; dtype++) {
            for (size_t i = 0; i < N; i++)
                expected[i] = to_half(dtype, read_item(FS_FLOAT32, (char *)&bits[i]));
            FOR_LEVELS(level) {
                fs_kernels_of(level, FS_FLOAT32)->store[dtype](1, N, bits, (char *)stored, 0, sizeof *stored);
                for (size_t i = 0; i < N; i++)
                    if (!same_half(dtype, stored[i], expected[i])) {
                        CONTEXT("dtype %d, level %s, float32 %08x: %04x, not %04x", dtype, fs_level_name(level),
                                (unsigned)bits[i], stored[i], expected[i]);
                        CHECK(false);
                    }
            }
        }
    }
}

enum { N_TURNS = 3 * N_LAYOUTS };

/* The layout of an operand of an array: in the first turns each operand has another, then all have the same, then all but
 * one. */
static size_t choose_layout(size_t i, int o, size_t turn)
{
    const size_t layout = turn % N_LAYOUTS;
    switch (turn / N_LAYOUTS) {
    case 0:
        return (i + 3 * (size_t)o + layout) % N_LAYOUTS;
    case 1:
        return (i + layout) % N_LAYOUTS;
    default:
        return (i / FS_N_OPERANDS + layout + (i % FS_N_OPERANDS == (size_t)o)) % N_LAYOUTS;
    }
}

/* The operands of an array that a rule with so many uses. */
#define FOR_USED(plan, i, o, n_used)                                                                             \
    for (int o = 0; o < FS_N_OPERANDS; o++)                                                                      \
        if ((o < n_used || o == FS_AVERAGE) && operand(plan, i, o)->data)

/* A plan whose operands are spreads against a contiguous one, in four steps, the last of which clears
 * the gradients, or in clipping. It has the states that the rule needs. */
static void check_layouts(trio t, fs_options options, bool clips, const ptrdiff_t *shape, size_t turn)
{
    const int n_used = FS_STATE + fs_rule_states(t.initial->groups[0].rule);
    bool apart = true;
    spread got[N_PAIRS][FS_N_OPERANDS], wanted[N_PAIRS][FS_N_OPERANDS];
    fs_plan *plan = make_plan_like(t.initial, 3, shape);
    copy_settings(plan, t.initial);
    copy_plan(t.expected, t.initial);
    for (size_t i = 0; i < N_PAIRS; i++)
        FOR_USED(t.initial, i, o, n_used) {
            const fs_operand *initial = operand(t.initial, i, o), *expected = operand(t.expected, i, o);
            const size_t item = fs_dtype_size(initial->dtype);
            size_t l = choose_layout(i, o, turn);
            if (l >= N_WRITABLE && (o != FS_GRAD || clips))
                l = 0;
            apart = apart && l < N_WRITABLE;
            spread *s = &got[i][o];
            *s = make_spread(shape, l, item);
            wanted[i][o] = make_spread(shape, l, item);
            copy_spread(s, shape, item, initial->data, false);
            copy_spread(s, shape, item, expected->data, true);    /* what broadcasting has left */
            const ptrdiff_t earlier[] = {s->strides[0], (ptrdiff_t)item, s->strides[1]};    /* no trace of it may be left */
            fs_array_set(&plan->arrays[i], o, s->first, initial->dtype, true, earlier);
            fs_array_set(&plan->arrays[i], o, s->first, initial->dtype, s->aligned, s->strides);
        }
    const fs_report wanted_report = clips ? clip(t.expected, options) : take_3_steps(t.expected, options);
    const fs_report report = clips ? clip(plan, options) : take_3_steps(plan, options);
    CHECK(report.applied);
    CHECK(report.grad_norm == wanted_report.grad_norm);
    if (!clips) {
        take_step(t.expected, options);
        options.clear_grads = apart;
        take_step(plan, options);
        if (!apart)
            fs_clear(plan, &options);
    }
    for (size_t i = 0; i < N_PAIRS; i++)
        FOR_USED(t.initial, i, o, n_used) {
            const fs_operand *expected = operand(t.expected, i, o);
            if (o == FS_GRAD && !clips)
                memset(expected->data, 0, operand_bytes(t.expected, i, o));
            copy_spread(&wanted[i][o], shape, fs_dtype_size(expected->dtype), expected->data, false);
            CHECK(memcmp(got[i][o].buffer, wanted[i][o].buffer, got[i][o].n_bytes) == 0);
            free(got[i][o].buffer);
            free(wanted[i][o].buffer);
        }
    fs_plan_free(plan);
}

/* All rules and turns on small arrays; on larger ones the rules share the turns among themselves, and always the levels. */
static void test_layouts(void)
{
    static const ptrdiff_t shapes[][3] = {{3, 37, 37}, {2, 40, 37}, {70, 2, 21}, {2, 70, 66}, {2, 1100, 3},
                                          {1, 2, 20},  {2, 2, 2},   {1, 5, 1},   {3, 0, 2},   {1, 1, 1}};
    enum { N_LARGE = 5 };
    int n_checked = 0;
    for (size_t s = 0; s < LENGTH(shapes); s++) {
        const ptrdiff_t *shape = shapes[s];
        const int stride = s >= N_LARGE ? 1 : quick ? N_TURNS / 2 : 3;
        size_t sizes[N_PAIRS];
        for (size_t i = 0; i < N_PAIRS; i++)
            sizes[i] = (size_t)(shape[0] * shape[1] * shape[2]);
        const trio t = make_trio(MIXED, N_PAIRS, sizes);
        FOR_RULES(rule)
            for (int turn = (rule + (int)s) % stride; turn < N_TURNS; turn += stride, n_checked++) {
                fs_level_set((fs_level)((rule / 3 + turn + (int)s) % FS_N_LEVELS));    /* if there is one */
                CONTEXT("%s, %td x %td x %td, turn %d, level %s", fs_rule_name(rule), shape[0], shape[1], shape[2], turn,
                        fs_level_name(fs_level_current()));
                fs_options options = n_checked % 4 ? busy(t.initial, rule) : plain(t.initial, rule);
                const bool clips = n_checked % 4 == 3;
                if (clips)
                    options.grad_scale = 1.0;
                options.n_threads = n_checked / 4 % 2 ? 3 : 1;    /* three cut some array in two */
                check_layouts(t, options, clips, shape, (size_t)turn);
            }
        free_trio(t);
    }
}

/* Between arrays without gaps and those of `spaced`, which has one of an element between neighbours. */
static void copy_spaced(fs_plan *spaced, fs_plan *plan, ptrdiff_t gap, bool to_spaced)
{
    for (int o = 0; o < FS_RESIDUAL; o++) {
        const ptrdiff_t item = (ptrdiff_t)fs_dtype_size(operand(plan, 0, o)->dtype);
        for (ptrdiff_t e = 0; e < (ptrdiff_t)plan->arrays[0].size; e++) {
            char *place = operand(spaced, 0, o)->data + e * gap * item, *other = operand(plan, 0, o)->data + e * item;
            memcpy(to_spaced ? place : other, to_spaced ? other : place, (size_t)item);
        }
    }
}

/* Bounds on the parameter, then its average, which sees what is stored. */
static void test_after_the_rule(void)
{
    static const size_t sizes[] = {1, 5, 1030, 77, 2, 300};
    for (int storage = 0; storage <= MIXED; storage++) {
        const trio t = make_trio(storage, LENGTH(sizes), sizes);
        fs_options options = plain(t.plan, find_rule("sgd"));
        plain(t.expected, find_rule("sgd"));
        for (int turn = 0; turn < 7; turn++) {
            const double lower = turn & 1 ? -1.25 : -INFINITY, upper = turn & 2 ? 1.5 : INFINITY;
            /* In turns 4 and 6 the first step is to copy the parameter, unless averages are not touched; in 5 it is over. */
            const bool copies_first = turn >= 4;
            const double given = turn == 6 ? 0.0 : turn < 4 && turn & 1 ? 1.0 : 0.25, weight = turn == 4 ? 1.0 : given;
            CONTEXT("storage %d, turn %d", storage, turn);
            copy_plan(t.plan, t.initial);
            copy_plan(t.expected, t.initial);
            plain(t.expected, find_rule("sgd"));
            plain(t.plan, find_rule("sgd"));
            for (int p = 0; p <= 1; p++) {
                fs_group *group = p ? t.plan->groups : t.expected->groups;
                group->hyper[0] = 2.0;
                group->weight_decay = 0.125;
                group->decay_mode = FS_DECOUPLED_AFTER;
            }
            t.plan->groups[0].lower = lower;
            t.plan->groups[0].upper = upper;
            t.plan->groups[0].average_weight = given;
            t.plan->groups[0].average_copies_first = copies_first;
            t.plan->step = turn == 5;
            options.clear_grads = turn == 3;
            take_step(t.plan, options);
            options.clear_grads = false;
            take_step(t.expected, options);
            for (size_t i = 0; i < LENGTH(sizes); i++)
                for (size_t e = 0; e < sizes[i]; e++) {
                    const double free = get(t.expected, i, FS_PARAM, e), param = get(t.plan, i, FS_PARAM, e);
                    CHECK(param == (free < lower ? lower : free > upper ? upper : free));
                    CHECK(get(t.plan, i, FS_GRAD, e) == (turn == 3 ? 0.0 : get(t.initial, i, FS_GRAD, e)));
                    if (!operand(t.plan, i, FS_AVERAGE)->data)
                        continue;
                    const double old = get(t.initial, i, FS_AVERAGE, e), new = get(t.plan, i, FS_AVERAGE, e);
                    const bool in_double = operand(t.plan, i, FS_PARAM)->dtype == FS_FLOAT64;
                    const float in_float = (float)old + (float)weight * ((float)param - (float)old);
                    double stored[1];
                    if (weight == 0.0)
                        CHECK(new == old);
                    write_item(operand(t.plan, i, FS_AVERAGE)->dtype, (char *)stored,
                               in_double ? old + weight * (param - old) : in_float);
                    CHECK(new == read_item(operand(t.plan, i, FS_AVERAGE)->dtype, (char *)stored));
                }
        }
        free_trio(t);
    }
}

/* A grad_scale of 2 and gradients twice as large change nothing. */
static void test_grad_scale(void)
{
    static const size_t sizes[] = {3000, 17};
    const trio t = make_trio(FS_FLOAT32, LENGTH(sizes), sizes);
    for (int is_busy = 0; is_busy <= 1; is_busy++) {
        CONTEXT("busy %d", is_busy);
        fs_options options = is_busy ? busy(t.initial, find_rule("adam")) : plain(t.initial, find_rule("adam"));
        copy_plan(t.expected, t.initial);
        copy_plan(t.plan, t.initial);
        for (size_t i = 0; i < LENGTH(sizes); i++)
            for (size_t e = 0; e < sizes[i]; e++)
                set(t.plan, i, FS_GRAD, e, 2 * get(t.initial, i, FS_GRAD, e));
        options.grad_scale = 1;
        const fs_report expected = take_3_steps(t.expected, options);
        options.grad_scale = 2;
        const fs_report report = take_3_steps(t.plan, options);
        CHECK(report.grad_norm == expected.grad_norm && report.clip_factor == expected.clip_factor);
        for (int o = 0; o < FS_N_OPERANDS; o++)
            CHECK(o == FS_GRAD || same_operand(t.plan, t.expected, o));
    }
    free_trio(t);
}

/* What works on a tile changes all of n elements and nothing beyond. */
static void test_runs_have_ends(void)
{
    enum { MAX_SIZE = 70, EDGE = 4 };
    const fs_stages stages = {.factor = -0.5, .clip_value = 100, .weight_decay = 0.5, .l1 = 0.25};
    double memory[MAX_SIZE + 2 * EDGE], param[MAX_SIZE];
    for (fs_dtype real = FS_FLOAT32; real <= FS_FLOAT64; real++)
        FOR_LEVELS(level)
            for (size_t n = 0; n <= MAX_SIZE; n++) {
                const fs_kernels *k = fs_kernels_of(level, real);
                const size_t item = fs_dtype_size(real);
                char *const run = (char *)memory + EDGE * item;
                CONTEXT("real %d, level %s, %zu elements", real, fs_level_name(level), n);
                for (int nonfinite = 0; nonfinite <= 1; nonfinite++) {
                    for (size_t i = 0; i < n + 2 * EDGE; i++)
                        write_item(real, (char *)memory + i * item, nonfinite ? NAN : 24);
                    for (size_t i = 0; i < n; i++)
                        write_item(real, (char *)param + i * item, 2);
                    size_t n_nan = 0, n_inf = 0;
                    k->count_nonfinite(n, run, &n_nan, &n_inf);
                    CHECK(n_nan == (nonfinite ? n : 0) && n_inf == 0);
                    CHECK(k->unscale(n, run, run, 3, true) == run);
                    for (size_t i = 0; i < n; i++)
                        CHECK(read_item(real, run + i * item) == (nonfinite ? 0 : 8));
                    CHECK(k->apply_stages(n, run, run, param, &stages) == run);
                    for (size_t i = 0; i < n; i++)
                        CHECK(read_item(real, run + i * item) == (nonfinite ? 1.25 : -2.75));
                    k->subtract(n, param, run);
                    for (size_t i = 0; i < n; i++)
                        CHECK(read_item(real, run + i * item) == (nonfinite ? 0.75 : 4.75));
                    for (size_t i = 0; i < EDGE; i++)
                        for (int after = 0; after <= 1; after++) {
                            const double x = read_item(real, (char *)memory + (i + (after ? n + EDGE : 0)) * item);
                            CHECK(nonfinite ? isnan(x) : x == 24);
                        }
                }
            }
}

/* Kernels that read or write one element too many die here: `pages` lie between inaccessible ones. */
static void check_in_pages(char **pages, size_t page_size, fs_dtype storage, size_t size)
{
    const trio t = make_trio((int)storage, 1, &size);
    const ptrdiff_t shape = (ptrdiff_t)size, item = (ptrdiff_t)fs_dtype_size(storage);
    fs_plan *plan = make_plan_like(t.initial, 1, &shape);
    for (ptrdiff_t gap = -2; gap <= 2; gap++)    /* 1: none; negative: backwards from the end */
        for (int at_end = 0; at_end <= 1; at_end++) {
            const ptrdiff_t extent = (shape - 1) * gap * item, stride = gap * item;
            if (gap == 0 || gap == -1)
                continue;
            for (int o = 0; o < FS_RESIDUAL; o++) {
                const ptrdiff_t low = extent < 0 ? -extent : 0, high = extent < 0 ? 0 : extent;
                char *data = pages[o] + (at_end ? (ptrdiff_t)page_size - item - high : low);
                fs_array_set(&plan->arrays[0], o, data, storage, true, &stride);
            }
            FOR_RULES(rule)
                for (int is_busy = 0; is_busy <= 1; is_busy++)
                    FOR_LEVELS(level) {
                        CONTEXT("%s, storage %d, size %zu, gap %td, at end %d, busy %d, level %s", fs_rule_name(rule),
                                storage, size, gap, at_end, is_busy, fs_level_name(level));
                        const fs_options options = is_busy ? busy(t.initial, rule) : plain(t.initial, rule);
                        copy_plan(t.expected, t.initial);
                        copy_settings(plan, t.initial);
                        copy_spaced(plan, t.initial, gap, true);
                        take_step(t.expected, options);
                        CHECK(take_step(plan, options).applied);
                        copy_settings(t.plan, plan);
                        copy_spaced(plan, t.plan, gap, false);
                        CHECK(same_plan(t.plan, t.expected));
                    }
        }
    fs_plan_free(plan);
    free_trio(t);
}

static void test_guard_pages(void)
{
    const size_t page_size = (size_t)sysconf(_SC_PAGESIZE);
    char *pages[FS_RESIDUAL];
    for (int o = 0; o < FS_RESIDUAL; o++) {
        pages[o] = mmap(NULL, 3 * page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(pages[o] != MAP_FAILED);
        pages[o] += page_size;
        CHECK(mprotect(pages[o], page_size, PROT_READ | PROT_WRITE) == 0);
    }
    for (int storage = 0; storage < N_DTYPES; storage++)
        for (size_t size = 1; size <= 130; size += quick ? 21 : 1)
            check_in_pages(pages, page_size, (fs_dtype)storage, size);
    for (int o = 0; o < FS_RESIDUAL; o++)
        munmap(pages[o] - page_size, 3 * page_size);
}

static double measure_norm(fs_plan *plan, fs_options options)
{
    fs_report report;
    if (options.nonfinite == FS_NONFINITE_PROPAGATE)    /* would not measure it */
        options.nonfinite = FS_NONFINITE_STOP;
    fs_measure(plan, &options, &report);
    CHECK(report.has_norm);
    return report.grad_norm;
}

/* The root of a^2 + b^2, neither negative; more than a double holds stays that. (Under valgrind, hypotl overflows.) */
static wide wide_hypot(wide a, wide b)
{
    const wide large = fmaxl(a, b), ratio = fminl(a, b) / large;
    return large == 0 || large > DBL_MAX ? large : large * sqrtl(1 + ratio * ratio);
}

/* An array's norm, in units of so much. */
static wide wide_norm_of(fs_plan *plan, size_t i, double unit)
{
    const size_t size = plan->arrays[i].size;
    wide largest = 0, sum = 0;
    for (size_t e = 0; e < size; e++)
        largest = fmaxl(largest, fabsl(get(plan, i, FS_GRAD, e)));
    for (size_t start = 0; start < size && largest > 0; start += 1000) {
        wide part = 0;    /* under valgrind, wide is no wider than double */
        for (size_t e = start; e < size && e < start + 1000; e++) {
            const wide x = get(plan, i, FS_GRAD, e) / largest;
            part += x * x;
        }
        sum += part;
    }
    return largest / unit * sqrtl(sum);
}

static wide wide_norm(fs_plan *plan, double unit)
{
    wide norm = 0;
    for (size_t i = 0; i < plan->n_arrays; i++)
        norm = wide_hypot(norm, wide_norm_of(plan, i, unit));
    return norm;
}

static void test_norms(void)
{
    static const size_t sizes[] = {150000, 1023, 62507, 37243};
    static const struct {
        fs_dtype storage;
        double magnitude[LENGTH(sizes)];    /* of each array */
        double decades;                     /* over which the elements of each array spread */
    } cases[] = {
        {FS_FLOAT32, {1, 1, 1, 1}, 0},
        {FS_FLOAT32, {1e-3, 10, 1, 1}, 6},
        {FS_FLOAT32, {1e30, 1e30, 1e30, 1e30}, 0},
        {FS_FLOAT32, {1e-44, 1e-40, 1e-38, 0}, 0},
        {FS_FLOAT32, {1e38, 1e-38, 0, 1}, 0},
        {FS_FLOAT32, {0, 0, 0, 0}, 0},
        {FS_FLOAT64, {1, 1, 1, 1}, 0},
        {FS_FLOAT64, {1, 1, 1, 1}, 140},
        {FS_FLOAT64, {1e300, 1e300, 1e300, 1e300}, 0},
        {FS_FLOAT64, {1e-300, 1e-300, 1e-300, 1e-300}, 0},
        {FS_FLOAT64, {1e-310, 1e-312, 1e-314, 1e-316}, 0},
        {FS_FLOAT64, {1e300, 1e-300, 1, 0}, 0},
        {FS_FLOAT64, {1e-300, 1, 0, 0}, 0},
        {FS_FLOAT64, {0, 0, 1e-300, 1e-290}, 0},
        {FS_FLOAT64, {1e150, 1e151, 1e149, 1e148}, 0},
        {FS_FLOAT64, {1e-136, 1e-138, 1e-135, 1e-137}, 0},
        {FS_FLOAT64, {1e-160, 1e160, 1e154, 1e-154}, 10},
        {FS_FLOAT64, {0, 0, 0, 0}, 0},
        {FS_FLOAT64, {0, 1e308, 0, 1e308}, 0},    /* more than a double holds */
    };
    fs_plan *plans[] = {make_plan(FS_FLOAT32, LENGTH(sizes), sizes), make_plan(FS_FLOAT64, LENGTH(sizes), sizes)};
    for (size_t c = 0; c < LENGTH(cases); c++) {
        fs_plan *plan = plans[cases[c].storage];
        fs_options options = plain(plan, 0);
        for (size_t i = 0; i < LENGTH(sizes); i++)
            for (size_t e = 0; e < sizes[i]; e++)
                set(plan, i, FS_GRAD, e, cases[c].magnitude[i] * random_signed() *
                    (cases[c].decades ? pow(10, cases[c].decades * (random_unit() - 0.5)) : 1));
        CHECK(fs_level_set(FS_BASELINE) == FS_OK);
        const double norm = measure_norm(plan, options);
        const wide truth = wide_norm(plan, 1);
        CONTEXT("case %zu: %.17g, not %.17Lg", c, norm, truth);
        if (truth > DBL_MAX)
            CHECK(norm == INFINITY);
        else
            CHECK(fabsl(norm - truth) <= 1e-14 * truth + DBL_TRUE_MIN);
        FOR_LEVELS(level)
            for (options.n_threads = 1; options.n_threads <= 3; options.n_threads++) {
                CONTEXT("case %zu, level %s, %d threads", c, fs_level_name(level), options.n_threads);
                CHECK(measure_norm(plan, options) == norm);
            }
    }
    free_plan(plans[0]);
    free_plan(plans[1]);
}

static void check_norm_of_nonfinite(int storage, size_t bad, int n_nan, int n_inf)
{
    static const size_t sizes[] = {2000, 0, 37};
    fs_plan *plan = make_plan(storage, LENGTH(sizes), sizes);
    fs_options options = plain(plan, 0);
    for (int e = 0; e < n_nan + n_inf; e++)
        set(plan, bad, FS_GRAD, sizes[bad] - 1 - (size_t)e, e < n_nan ? NAN : e % 2 ? INFINITY : -INFINITY);
    for (int policy = FS_NONFINITE_STOP; policy <= FS_NONFINITE_PROPAGATE; policy++)
        FOR_LEVELS(level) {
            CONTEXT("storage %d, array %zu: %d nan, %d inf, policy %d, level %s", storage, bad, n_nan, n_inf, policy,
                    fs_level_name(level));
            options.nonfinite = (fs_nonfinite)policy;
            const double norm = measure_norm(plan, options);
            if (policy == FS_NONFINITE_ZERO || n_nan + n_inf == 0)
                CHECK(isfinite(norm) && norm > 0);
            else
                CHECK(n_nan ? isnan(norm) : norm == INFINITY);
            for (size_t i = 0; i < LENGTH(sizes); i++)
                CHECK(plan->norms[i].n_nonfinite == (i == bad ? (size_t)(n_nan + n_inf) : 0));
        }
    for (int e = 0; e < n_nan + n_inf; e++)
        set(plan, bad, FS_GRAD, sizes[bad] - 1 - (size_t)e, 0);
    CHECK(isfinite(measure_norm(plan, options)) && plan->norms[bad].n_nonfinite == 0);
    free_plan(plan);
}

static void test_norms_of_nonfinite(void)
{
    static const struct { int n_nan, n_inf; } cases[] = {{0, 0}, {1, 0}, {0, 1}, {1, 1}, {12, 0}, {0, 20}, {9, 7}};
    for (int storage = 0; storage < N_DTYPES; storage++)
        for (size_t c = 0; c < LENGTH(cases); c++) {
            check_norm_of_nonfinite(storage, 0, cases[c].n_nan, cases[c].n_inf);
            check_norm_of_nonfinite(storage, 2, cases[c].n_nan, cases[c].n_inf);
        }
}

/* One bad element, the first or last of the last array. */
static void check_nonfinite(trio t, double bad, bool is_first, int n_threads)
{
    const size_t n_arrays = t.initial->n_arrays, last = n_arrays - 1, e = is_first ? 0 : t.initial->arrays[last].size - 1;
    const double good = get(t.initial, last, FS_GRAD, e);
    CONTEXT("%zu arrays, %g, first %d, %d threads", n_arrays, bad, is_first, n_threads);
    fs_options options = plain(t.initial, find_rule("sgd_momentum"));
    options.n_threads = n_threads;
    t.initial->step = 7;
    set(t.initial, last, FS_GRAD, e, bad);

    options.nonfinite = FS_NONFINITE_STOP;
    copy_plan(t.plan, t.initial);
    fs_report report = take_step(t.plan, options);
    CHECK(!report.applied && report.has_norm && !isfinite(report.grad_norm));
    CHECK(same_plan(t.plan, t.initial));
    for (size_t i = 0; i < n_arrays; i++)
        CHECK(t.plan->norms[i].n_nonfinite == (i == last));

    options.nonfinite = FS_NONFINITE_ZERO;
    copy_plan(t.expected, t.initial);
    set(t.expected, last, FS_GRAD, e, 0.0);
    const fs_report expected_report = take_step(t.expected, options);
    report = take_step(t.plan, options);
    CHECK(report.applied && report.grad_norm == expected_report.grad_norm);
    CHECK(same_operand(t.plan, t.initial, FS_GRAD));
    set(t.plan, last, FS_GRAD, e, 0.0);
    CHECK(same_plan(t.plan, t.expected));

    options.nonfinite = FS_NONFINITE_PROPAGATE;
    copy_plan(t.plan, t.initial);
    report = take_step(t.plan, options);
    CHECK(report.applied && !report.has_norm);
    for (size_t i = 0; i < n_arrays; i++)
        CHECK(t.plan->norms[i].n_nonfinite == 0);
    CHECK(!isfinite(get(t.plan, last, FS_PARAM, e)) && !isfinite(get(t.plan, last, FS_STATE, e)));
    for (int o = 0; o < FS_N_OPERANDS; o++)
        if (operand(t.plan, last, o)->data)
            set(t.plan, last, o, e, get(t.expected, last, o, e));
    CHECK(same_plan(t.plan, t.expected));
    set(t.initial, last, FS_GRAD, e, good);
}

static void test_nonfinite(void)
{
    enum { MIN_ARRAYS = 33, MAX_ARRAYS = MIN_ARRAYS + N_PAIRS - 1 };    /* the last has each pair of types once */
    static const size_t some_sizes[] = {6000, 1, 0, 2048, 5000, 77, 9100};
    static const double bad[] = {NAN, INFINITY, -INFINITY};
    size_t sizes[MAX_ARRAYS];
    for (size_t n_arrays = MIN_ARRAYS; n_arrays <= MAX_ARRAYS; n_arrays++) {
        for (size_t i = 0; i < n_arrays; i++)
            sizes[i] = i == n_arrays - 1 ? 1500 : some_sizes[i % LENGTH(some_sizes)];
        const trio t = make_trio(MIXED, n_arrays, sizes);
        for (size_t b = 0; b < LENGTH(bad); b++)
            for (int n_threads = 1; n_threads <= 3; n_threads++)
                check_nonfinite(t, bad[b], n_threads == 2, n_threads);
        free_trio(t);
    }

    /* A finite gradient that unscaling makes infinite. */
    const size_t size = 40;
    const trio t = make_trio(FS_FLOAT32, 1, &size);
    fs_options options = plain(t.initial, find_rule("adam"));
    options.nonfinite = FS_NONFINITE_STOP;
    options.grad_scale = 1e-36;
    CONTEXT("grad_scale %g", options.grad_scale);
    set(t.initial, 0, FS_GRAD, 39, 1e4);
    copy_plan(t.plan, t.initial);
    CHECK(!take_step(t.plan, options).applied);
    CHECK(t.plan->norms[0].n_nonfinite == 1);
    CHECK(same_plan(t.plan, t.initial));
    free_trio(t);
}

/* What a step of plain gradient descent makes of a parameter and its gradient, stage by stage. */
#define STAGE_BY_STAGE(real)                                                                                     \
    static void stages_in_##real(const fs_group *group, double grad_scale, double clip_factor, double *param,    \
                                 double *grad)                                                                   \
    {                                                                                                            \
        const real bound = (real)group->clip_value;                                                              \
        real p = (real)*param, g = (real)*grad;                                                                  \
        g = g / (real)grad_scale;                                                                                \
        if (group->maximize)                                                                                     \
            g = -g;                                                                                              \
        g = g * (real)clip_factor;                                                                               \
        g = g > bound ? bound : g < -bound ? -bound : g;                                                         \
        if (group->weight_decay != 0 && group->decay_mode == FS_COUPLED)                                         \
            g = g + (real)group->weight_decay * p;                                                               \
        if (group->l1 != 0)                                                                                      \
            g = g + (p > 0 ? (real)group->l1 : p < 0 ? -(real)group->l1 : 0);                                    \
        if (group->decay_mode == FS_DECOUPLED)                                                                   \
            p = p * (real)(1.0 - group->hyper[0] * group->weight_decay);                                         \
        if (group->decay_mode == FS_INDEPENDENT)                                                                 \
            p = p * (real)(1.0 - group->weight_decay);                                                           \
        p = p - (real)group->hyper[0] * g;                                                                       \
        if (group->decay_mode == FS_DECOUPLED_AFTER)                                                             \
            p = p * (real)(1.0 - group->hyper[0] * group->weight_decay);                                         \
        *param = p;                                                                                              \
        *grad = g;                                                                                               \
    }

STAGE_BY_STAGE(float)
STAGE_BY_STAGE(double)

/* Bits of `on` in the tests below; where nothing but clipping is on, fs_clip is tested too. */
enum {
    CLIP_VALUE = 1, CLIP_PER_ARRAY = 2, CLIP_GLOBAL = 4, CLIPPING = 7,
    MAXIMIZE = 8, GRAD_SCALE = 16, CLIP_FACTOR = 32, DECAY = 64, L1 = 128, MODE = 256, ALL = 1023    /* of four modes */
};

/* Values of what can be on. */
typedef struct { double clip_value, per_array, global, eps, grad_scale, clip_factor, decay, l1; } stage_values;

static void check_stages(trio t, fs_plan *clipped, int on, const stage_values *values)
{
    fs_options options = plain(t.initial, find_rule("sgd"));
    fs_group *group = &t.initial->groups[0];
    group->maximize = on & MAXIMIZE;
    group->clip_value = on & CLIP_VALUE ? values->clip_value : INFINITY;
    group->clip_norm_per_array = on & CLIP_PER_ARRAY ? values->per_array : INFINITY;
    group->weight_decay = on & DECAY ? values->decay : 0.0;
    group->decay_mode = (fs_decay)(on / MODE);
    group->l1 = on & L1 ? values->l1 : 0.0;
    options.nonfinite = FS_NONFINITE_STOP;
    options.grad_scale = on & GRAD_SCALE ? values->grad_scale : 1.0;
    options.clip_norm = on & CLIP_GLOBAL ? values->global : INFINITY;
    options.clip_eps = values->eps;
    options.clip_factor = on & CLIP_FACTOR ? values->clip_factor : 1.0;
    options.n_threads = on % 7 ? 1 : 3;
    copy_plan(t.plan, t.initial);
    copy_plan(t.expected, t.initial);
    copy_plan(clipped, t.initial);
    const fs_report report = take_step(t.plan, options);
    CHECK(report.applied);

    double squares[3], factors[3], smallest = 1.0;
    for (int i = 0; i < 3; i++) {
        squares[i] = t.plan->norms[i].sum_squares;
        CHECK(t.plan->norms[i].exponent == 0);
        factors[i] = fmin(1.0, group->clip_norm_per_array / (sqrt(squares[i]) + values->eps));
    }
    CHECK(report.grad_norm == sqrt(squares[0] + squares[1] + squares[2]));
    for (int i = 0; i < 3 && on & CLIP_PER_ARRAY; i++) {
        const double clipped_norm = sqrt(squares[i]) * factors[i];
        squares[i] = clipped_norm * clipped_norm;
    }
    const double norm = sqrt(squares[0] + squares[1] + squares[2]);
    for (size_t i = 0; i < 3; i++) {
        factors[i] *= fmin(1.0, options.clip_norm / (norm + values->eps));
        smallest = fmin(smallest, factors[i]);
        for (size_t e = 0; e < t.initial->arrays[i].size; e++) {
            double p = get(t.initial, i, FS_PARAM, e), g = get(t.initial, i, FS_GRAD, e);
            const double factor = factors[i] * options.clip_factor;
            if (t.initial->arrays[i].real == FS_FLOAT32)
                stages_in_float(group, options.grad_scale, factor, &p, &g);
            else
                stages_in_double(group, options.grad_scale, factor, &p, &g);
            set(t.expected, i, FS_PARAM, e, p);
            set(clipped, i, FS_GRAD, e, g);
        }
    }
    CHECK(report.clip_factor == smallest);
    t.expected->step = 1;
    CHECK(same_plan(t.plan, t.expected));

    if ((on & ~CLIPPING) == 0) {
        fs_report clip_report;
        copy_plan(t.plan, t.initial);
        clip_report = clip(t.plan, options);
        CHECK(clip_report.applied && clip_report.grad_norm == report.grad_norm);
        CHECK(same_plan(t.plan, clipped));
    }
}

static void test_stages(void)
{
    static const size_t sizes[] = {1030, 5, 70};
    static const stage_values values[] = {
        {.clip_value = 0.03, .per_array = 2.0, .global = 1.5, .eps = 1e-6,
         .grad_scale = 3.0, .clip_factor = 0.7, .decay = 0.1, .l1 = 0.01},
        {.clip_value = 2.0, .per_array = 3.0, .global = 4.0, .eps = 0.5,
         .grad_scale = 0.125, .clip_factor = 2.0, .decay = 1.0, .l1 = 1.0},
        {.clip_value = 1.0, .per_array = 1.0, .global = 1.0, .eps = 0.0,
         .grad_scale = 0.125, .clip_factor = 0.0, .decay = 2.0, .l1 = 2.0},
    };
    for (int storage = 0; storage < N_DTYPES; storage++) {
        const trio t = make_trio(storage, 3, sizes);
        fs_plan *clipped = make_plan(storage, 3, sizes);
        set(t.initial, 0, FS_PARAM, 1, 0.0);
        set(t.initial, 0, FS_PARAM, 2, -0.0);
        set(t.initial, 0, FS_GRAD, 2, -0.0);
        set(t.initial, 0, FS_GRAD, 3, -0.0);
        set(t.initial, 0, FS_PARAM, 4, 1.0);
        set(t.initial, 1, FS_GRAD, 0, 3.0);
        for (int on = 0; on <= ALL; on++)
            for (size_t v = 0; v < LENGTH(values); v++) {
                CONTEXT("storage %d, stages %x, values %zu", storage, (unsigned)on, v);
                check_stages(t, clipped, on, &values[v]);
            }
        free_trio(t);
        free_plan(clipped);
    }
}

static void test_clip_nonfinite(void)
{
    static const size_t sizes[] = {3, 10};
    const trio t = make_trio(FS_FLOAT64, 2, sizes);
    fs_options options = plain(t.initial, 0);
    fs_report report;
    t.initial->groups[0].clip_value = 0.5;
    set(t.initial, 0, FS_GRAD, 0, NAN);
    set(t.initial, 0, FS_GRAD, 1, INFINITY);
    set(t.initial, 0, FS_GRAD, 2, -INFINITY);
    copy_plan(t.plan, t.initial);
    options.nonfinite = FS_NONFINITE_STOP;
    report = clip(t.plan, options);
    CHECK(!report.applied);
    CHECK(same_plan(t.plan, t.initial));
    options.nonfinite = FS_NONFINITE_PROPAGATE;
    report = clip(t.plan, options);
    CHECK(report.applied);
    CHECK(isnan(get(t.plan, 0, FS_GRAD, 0)));
    CHECK(get(t.plan, 0, FS_GRAD, 1) == 0.5 && get(t.plan, 0, FS_GRAD, 2) == -0.5);

    /* What is wrong in one array does not concern the other. */
    t.initial->groups[0].clip_value = INFINITY;
    t.initial->groups[0].clip_norm_per_array = 1.0;
    copy_plan(t.plan, t.initial);
    report = clip(t.plan, options);
    CHECK(report.applied && isnan(report.grad_norm) && isnan(report.clip_factor));
    CHECK(isnan(get(t.plan, 0, FS_GRAD, 1)) && fabsl(wide_norm_of(t.plan, 1, 1) - 1) < 1e-5L);
    free_trio(t);
}

/* What clipping makes of the norms of two arrays, with its `small` of 1e-6; returns that of both together. */
static wide clipped_norm(const wide *norms, wide per_array, wide global, wide small)
{
    wide clipped[2], both;
    for (int i = 0; i < 2; i++)
        clipped[i] = norms[i] * fminl(1, per_array / (norms[i] + small));
    both = wide_hypot(clipped[0], clipped[1]);
    return both * fminl(1, global / (both + small));
}

/* Squares that a double does not hold; with DBL_MAX, not even the norm. */
static void test_clip_magnitudes(void)
{
    static const size_t sizes[] = {3, 1000};
    static const double magnitudes[] = {DBL_MAX, 1e300, 1e160, 100, 1e-160, 1e-300}, limits[] = {1, 1e200};
    static const int cases[] = {CLIP_PER_ARRAY, CLIP_GLOBAL, CLIP_PER_ARRAY | CLIP_GLOBAL};
    const trio t = make_trio(FS_FLOAT64, 2, sizes);
    for (size_t m = 0; m < LENGTH(magnitudes); m++)
        for (size_t c = 0; c < LENGTH(limits) * LENGTH(cases); c++) {
            const double limit = limits[c % 2], unit = magnitudes[m] > 1 ? 0x1p64 : 1;    /* for norms a double holds */
            const int on = cases[c / 2];
            const double per_array = on & CLIP_PER_ARRAY ? 3 * limit : INFINITY;
            const double global = on & CLIP_GLOBAL ? 2 * limit : INFINITY;
            wide norms[2];
            fs_options options = plain(t.initial, 0);
            options.clip_norm = global;
            t.initial->groups[0].clip_norm_per_array = per_array;
            for (size_t i = 0; i < LENGTH(sizes); i++) {
                for (size_t e = 0; e < sizes[i]; e++)
                    set(t.initial, i, FS_GRAD, e, magnitudes[m] * random_signed());
                norms[i] = wide_norm_of(t.initial, i, unit);
            }
            copy_plan(t.plan, t.initial);
            const fs_report report = clip(t.plan, options);
            const wide norm = wide_norm(t.plan, unit);
            const wide wanted = clipped_norm(norms, per_array / unit, global / unit, 1e-6L / unit);
            CONTEXT("magnitude %g, clipping %x to %g: norm %.17Lg, not %.17Lg", magnitudes[m], (unsigned)on, limit, norm,
                    wanted);
            CHECK(fabsl(norm - wanted) <= 1e-13L * wanted);
            if (magnitudes[m] < limit)
                CHECK(report.clip_factor == 1 && same_plan(t.plan, t.initial));
        }
    free_trio(t);
}

/* Many arrays in two groups step as each would alone. */
static void test_many_arrays(void)
{
    enum { N_ARRAYS = 160 };
    static const size_t some_sizes[] = {0, 1, 1023, 3000, 0, 7, 1024, 1025, 2049, 16, 500, 5000};
    size_t sizes[N_ARRAYS];
    for (size_t i = 0; i < N_ARRAYS; i++)
        sizes[i] = some_sizes[i % LENGTH(some_sizes)];
    const trio t = make_trio(MIXED, N_ARRAYS, sizes);
    fs_options options = plain(t.initial, find_rule("adam"));
    use_rule(&t.initial->groups[1], find_rule("sgd_momentum"));
    t.initial->groups[1].hyper[0] = 0.5;
    t.initial->groups[1].l1 = 0.125;
    t.initial->groups[1].clip_norm_per_array = 0.5;
    for (size_t i = 0; i < N_ARRAYS; i++)
        t.initial->arrays[i].group = i % 3 == 0;

    copy_plan(t.expected, t.initial);
    for (size_t i = 0; i < N_ARRAYS; i++) {
        fs_plan *alone = fs_plan_new(1, 1, false);
        init_flat(&alone->arrays[0], sizes[i]);
        alone->groups[0] = t.expected->groups[t.expected->arrays[i].group];
        for (int o = 0; o < FS_N_OPERANDS; o++) {
            const fs_operand *expected = operand(t.expected, i, o);
            set_contiguous(&alone->arrays[0], o, expected->data, expected->dtype);
        }
        CHECK(fs_plan_finish(alone) == FS_OK);
        CHECK(take_3_steps(alone, options).applied);
        fs_plan_free(alone);
    }
    t.expected->step = 3;
    FOR_LEVELS(level)
        for (options.n_threads = 1; options.n_threads <= 4; options.n_threads++) {  /* for more, LLVM's OpenMP leaks */
            CONTEXT("level %s, %d threads", fs_level_name(level), options.n_threads);
            copy_plan(t.plan, t.initial);
            CHECK(take_3_steps(t.plan, options).applied);
            CHECK(same_plan(t.plan, t.expected));
        }
    free_trio(t);
}

static void test_empty_plans(void)
{
    static const size_t nothing[] = {0, 0, 0};
    for (size_t n_arrays = 0; n_arrays <= 3; n_arrays++) {
        CONTEXT("%zu arrays", n_arrays);
        fs_plan *plan = make_plan(MIXED, n_arrays, nothing);
        const fs_options options = busy(plan, find_rule("adam"));
        fs_report report = take_step(plan, options);
        CHECK(report.applied && report.has_norm && report.grad_norm == 0 && report.clip_factor == 1);
        CHECK(plan->step == 1);
        report = clip(plan, options);
        CHECK(report.applied);
        free_plan(plan);
    }
}

/* One element without dimensions, aligned or not. */
static void test_scalar(void)
{
    const size_t one = 1;
    const trio t = make_trio(FS_FLOAT32, 1, &one);
    char memory[FS_RESIDUAL][9];
    FOR_RULES(rule)
        for (int shift = 0; shift <= 1; shift++) {
            CONTEXT("%s, shift %d", fs_rule_name(rule), shift);
            fs_plan *plan = make_plan_like(t.initial, 0, NULL);
            const fs_options options = busy(t.initial, rule);
            copy_settings(plan, t.initial);
            copy_plan(t.expected, t.initial);
            for (int o = 0; o < FS_RESIDUAL; o++) {
                memcpy(memory[o] + shift, operand(t.initial, 0, o)->data, sizeof(float));
                fs_array_set(&plan->arrays[0], o, memory[o] + shift, FS_FLOAT32, false, NULL);
            }
            take_3_steps(plan, options);
            take_3_steps(t.expected, options);
            CHECK(same_plan(plan, t.expected));
            fs_plan_free(plan);
        }
    free_trio(t);
}

static void test_half_made_plans(void)
{
    float data[6] = {0};
    const ptrdiff_t shape[] = {2, 3}, strides[] = {4, 8};
    fs_plan_free(NULL);
    fs_plan_free(fs_plan_new(0, 0, false));
    for (int n_set = 0; n_set <= FS_N_OPERANDS; n_set++) {
        fs_plan *plan = fs_plan_new(2, 1, false);
        CHECK(plan != NULL && fs_array_init(&plan->arrays[1], 2, shape) == FS_OK);
        for (int o = 0; o < n_set; o++)
            for (int times = 0; times < 2; times++)
                fs_array_set(&plan->arrays[1], o, data, FS_FLOAT32, true, strides);
        fs_plan_free(plan);
    }
}

/* Each allocation fails once: the caller is told, and nothing leaks. */
static void test_out_of_memory(void)
{
    double data[6] = {0};
    const ptrdiff_t shape[] = {2, 3}, strides[] = {24, 8};
    for (int kind = 0; kind < 8; kind++) {
        const bool has_stats = kind % 2, has_units = kind / 2 % 2, has_factors = kind / 4;
        int n_failed = 0;
        for (bool done = false; !done; n_failed += !done) {
            callocs_left = n_failed;
            fs_plan *plan = fs_plan_new(2, 1, has_stats);
            bool complete = plan != NULL;
            for (int i = 0; complete && i < 2; i++)
                complete = fs_array_init(&plan->arrays[i], 2, shape) == FS_OK;
            if (complete)
                fs_array_set(&plan->arrays[1], FS_PARAM, data, FS_FLOAT64, true, strides);
            if (complete && has_units)
                fs_array_set_units(&plan->arrays[1], 0, NULL);
            if (complete && has_factors)
                fs_array_set_factors(&plan->arrays[1], data, data);
            complete = complete && fs_plan_finish(plan) == FS_OK;
            done = callocs_left >= 0;
            CONTEXT("stats %d, units %d, factors %d, allocation %d", has_stats, has_units, has_factors, n_failed);
            CHECK(complete == done);
            callocs_left = -1;
            fs_plan_free(plan);
        }
        CHECK(n_failed == 18 + has_units + has_factors);
    }
}

enum { PARALLEL_SIZE = 100003 };

static void test_fork(void)
{
    const size_t size = PARALLEL_SIZE;
    const trio t = make_trio(FS_FLOAT32, 1, &size);
    fs_options options = busy(t.initial, find_rule("adam"));
    options.n_threads = 3;
    copy_plan(t.expected, t.initial);
    copy_plan(t.plan, t.initial);
    take_step(t.expected, options);
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);
        take_step(t.plan, options);
        _exit(same_plan(t.plan, t.expected) && fs_threads_get() == 1 ? 0 : 1);
    }
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CONTEXT("wait status %x", (unsigned)status);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    take_step(t.plan, options);
    CHECK(same_plan(t.plan, t.expected));
    free_trio(t);
}

static void *take_20_steps(void *plan)
{
    fs_options options = busy(plan, find_rule("adam"));
    options.n_threads = 2;
    for (int t = 0; t < 20; t++)
        take_step(plan, options);
    return NULL;
}

/* Different plans in different threads at the same time: ours, and those of a parallel region. */
static void test_plans_are_independent(void)
{
    enum { N_PLANS = 5 };
    const size_t size = PARALLEL_SIZE;
    fs_plan *plans[N_PLANS];
    pthread_t threads[2];
    for (int i = 0; i < N_PLANS; i++)
        plans[i] = make_plan(FS_FLOAT32, 1, &size);
    take_20_steps(plans[0]);
    for (int i = 0; i < 2; i++)
        CHECK(pthread_create(&threads[i], NULL, take_20_steps, plans[1 + i]) == 0);
    for (int i = 0; i < 2; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
#ifdef _OPENMP
#pragma omp parallel for num_threads(2)
#endif
    for (int i = 3; i < N_PLANS; i++)
        take_20_steps(plans[i]);
    for (int i = 1; i < N_PLANS; i++) {
        CONTEXT("plan %d", i);
        CHECK(same_plan(plans[i], plans[0]));
    }
    for (int i = 0; i < N_PLANS; i++)
        free_plan(plans[i]);
}

static void test_settings(void)
{
    static const size_t sizes[] = {[FS_FLOAT32] = 4, [FS_FLOAT64] = 8, [FS_FLOAT16] = 2, [FS_BFLOAT16] = 2};
    for (int dtype = 0; dtype < N_DTYPES; dtype++)
        CHECK(fs_dtype_size((fs_dtype)dtype) == sizes[dtype]);
    CHECK(fs_rule_numbers(fs_rule_count()) == 0);
    CHECK(fs_level_available(FS_BASELINE));
    for (fs_level level = FS_BASELINE; level < FS_N_LEVELS; level++) {
        const fs_level before = fs_level_current();
        CONTEXT("level %s", fs_level_name(level));
        CHECK(fs_level_set(level) == (fs_level_available(level) ? FS_OK : FS_BAD_LEVEL));
        CHECK(fs_level_current() == (fs_level_available(level) ? level : before));
        CHECK(fs_level_compiled(level) || !fs_level_available(level));
    }
    const int n_default = fs_threads_get();
    CHECK(n_default >= 1);
    fs_threads_limit(1);
    CHECK(fs_threads_get() == 1);
    fs_threads_set(3);    /* the limit is one on the default only */
    CHECK(fs_threads_get() == (fs_openmp() ? 3 : 1));
    fs_threads_limit(0);
    fs_threads_set(0);
    CHECK(fs_threads_get() == n_default);
}

static bool is_wanted(const char *name, int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], name) == 0)
            return true;
    return argc == 1;
}

/* Runs all tests, or those that are named. With QUICK set in the environment, only some cases of slow ones, and up
 * to the first failure. */
int main(int argc, char **argv)
{
    quick = getenv("QUICK") != NULL;
    fs_threads_insist(true);
#define TEST(name) {#name, test_##name}
    static const struct { const char *name; void (*run)(void); } tests[] = {
        TEST(textbook), TEST(scaled), TEST(summed), TEST(numbers), TEST(muon), TEST(conventions), TEST(negative_variance),
        TEST(stages),
        TEST(after_the_rule), TEST(small_states),
        TEST(join_and_part), TEST(blocks), TEST(stats), TEST(units), TEST(factored), TEST(nonfinite), TEST(out_of_memory),
        TEST(many_arrays), TEST(empty_plans),
        TEST(half_made_plans), TEST(scalar), TEST(norms_of_nonfinite), TEST(clip_nonfinite), TEST(clip_magnitudes),
        TEST(norms), TEST(layouts), TEST(runs_have_ends), TEST(grad_scale), TEST(guard_pages), TEST(fork),
        TEST(plans_are_independent), TEST(levels_and_threads), TEST(halves_load_and_store), TEST(halves_round),
        TEST(settings),
    };
    const fs_level best = fs_level_current();
    int n_run = 0, n_failed = 0;
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ);    /* so that nothing is lost in a crash or said twice after a fork */
    for (size_t t = 0; t < LENGTH(tests); t++) {
        if (!is_wanted(tests[t].name, argc, argv))
            continue;
        n_failures = 0;
        context[0] = '\0';
        fs_level_set(best);
        tests[t].run();
        printf("%s %s\n", n_failures ? "FAILED" : "ok    ", tests[t].name);
        n_run++;
        n_failed += n_failures > 0;
    }
    printf("%d passed, %d failed\n", n_run - n_failed, n_failed);
    return n_failed > 0 || n_run == 0;
}
