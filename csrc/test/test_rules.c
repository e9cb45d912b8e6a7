/* Tests of the rules: against the textbook, in long double. */
#include "harness.h"

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

void test_textbook(void)
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
void test_scaled(void)
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
                options.clip_factor = 0.25;
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
                            const wide grad = get(plan, i, FS_GRAD, e) * 0.25;
                            directions[e] = cases[c].direction(expected[i][e], grad, states[i][e], h, t);
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

/* LARS without eps and decay: a parameter 2^p times as large and a gradient 2^g times lead to a result 2^p times as large,
 * also where squares are more than a double holds. */
void test_scaled_magnitudes(void)
{
    /* NovoGrad, which has no ratio in which factors would cancel out, squares its norm. */
    static const struct { const char *rule; int param, grad; double hyper[6]; } cases[] = {
        {"lars", 0, 0, {0.5, 0.0, 0.125, 0.0, 0.0}},    {"lars", 700, 700, {0.5, 0.0, 0.125, 0.0, 0.0}},
        {"lars", 700, 0, {0.5, 0.0, 0.125, 0.0, 0.0}},  {"lars", 0, 700, {0.5, 0.0, 0.125, 0.0, 0.0}},
        {"lars", -700, 0, {0.5, 0.0, 0.125, 0.0, 0.0}}, {"lars", 0, -700, {0.5, 0.0, 0.125, 0.0, 0.0}},
        {"novograd", 0, 0, {0.5, 0.5, 0.5, 0.0, 0.0, NAN}}, {"novograd", 0, -470, {0.5, 0.5, 0.5, 0.0, 0.0, NAN}},
    };
    static const size_t sizes[] = {5, 3001};
    const trio t = make_trio(FS_FLOAT64, LENGTH(sizes), sizes);
    for (size_t c = 0; c < LENGTH(cases); c++) {
        CONTEXT("%s, parameter 2^%d, gradient 2^%d", cases[c].rule, cases[c].param, cases[c].grad);
        const bool is_plain = cases[c].param == 0 && cases[c].grad == 0;
        fs_plan *plan = is_plain ? t.expected : t.plan;
        copy_plan(plan, t.initial);
        const fs_options options = plain(plan, find_rule(cases[c].rule));
        memcpy(plan->groups[0].hyper, cases[c].hyper, sizeof cases[c].hyper);
        for (size_t i = 0; i < LENGTH(sizes); i++)
            for (size_t e = 0; e < sizes[i]; e++) {
                set(plan, i, FS_PARAM, e, ldexp(get(plan, i, FS_PARAM, e), cases[c].param));
                set(plan, i, FS_GRAD, e, ldexp(get(plan, i, FS_GRAD, e), cases[c].grad));
            }
        CHECK(take_step(plan, options).applied);
        for (size_t i = 0; i < LENGTH(sizes); i++)
            for (size_t e = 0; e < sizes[i]; e++)
                CHECK(get(plan, i, FS_PARAM, e) == ldexp(get(t.expected, i, FS_PARAM, e), cases[c].param));
    }
    CHECK(!same_operand(t.expected, t.initial, FS_PARAM));
    free_trio(t);
}

/* Prodigy, whose steps are scaled by sums over all arrays: those of two groups with a learning rate each, or of one beside
 * another with LAMB. The first gradients are those of a square, for d to grow. */
void test_summed(void)
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
void test_numbers(void)
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
void test_muon(void)
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

void test_conventions(void)
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
void test_negative_variance(void)
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
