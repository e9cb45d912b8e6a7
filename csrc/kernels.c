#include "kernels.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

/* ---- Storage types ------------------------------------------------------------------------------------------------
 * Conversions without branches, so that loops over them vectorise. Equal to NumPy's and ml_dtypes' bit for bit. */

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))

INLINE uint32_t float_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE float bfloat16_to_float32(uint16_t stored)
{
    return float_from_bits((uint32_t)stored << 16);
}

INLINE uint16_t float32_to_bfloat16(float x)
{
    const uint32_t bits = float_bits(x);
    const uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint32_t quiet_nan = (bits >> 16 & 0x8000) | 0x7fc0;
    return (uint16_t)(x != x ? quiet_nan : nearest_even);
}

INLINE float float16_to_float32(uint16_t stored)
{
    const uint32_t magnitude = stored & 0x7fff, sign = (uint32_t)(stored & 0x8000) << 16;
    /* Read with float32's exponent bias, 112 too low; the product mends normal and subnormal halves alike. */
    const float scaled = float_from_bits(magnitude << 13) * 0x1p112f;
    const uint32_t bits = magnitude >= 0x7c00 ? 0x7f800000 | magnitude << 13 : float_bits(scaled);
    return float_from_bits(bits | sign);
}

INLINE uint16_t float32_to_float16(float x)
{
    const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    /* Below 2^-14 the half is a multiple of 2^-24: adding 0.5, whose last bit is 2^-24, rounds to one. */
    const uint32_t subnormal = float_bits(float_from_bits(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t nan = 0x7e00;
    uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
    half = magnitude >= 0x47800000 ? 0x7c00 : half;    /* 65536 and above; 65520 has been rounded to infinity already */
    half = magnitude > 0x7f800000 ? nan : half;
    return (uint16_t)(half | sign);
}

/* Storage to run and back: n_outer rows of n_inner elements, strides in bytes. memcpy, because data may be unaligned.
 * Contiguous rows vectorise. A transposed block is walked along its columns, which are contiguous then, and turned in small
 * squares; columns are fetched AHEAD of time: they lie too far apart for the CPU to guess. */
enum { SIDE = 16, AHEAD = 32 };

#define CONVERSIONS(dtype, stored, to_real, from_real)                                                           \
    TARGET static void FN(load_square_##dtype)(size_t n_rows, size_t n_columns, real *to, size_t to_row,         \
                                               const char *from, ptrdiff_t from_column)                          \
    {                                                                                                            \
        real square[SIDE][SIDE];                                                                                 \
        for (size_t c = 0; c < n_columns; c++) {                                                                 \
            const char *column = from + (ptrdiff_t)c * from_column;                                              \
            __builtin_prefetch(column + AHEAD * from_column);                                                    \
            for (size_t r = 0; r < n_rows; r++) {                                                                \
                stored x;                                                                                        \
                memcpy(&x, column + r * sizeof x, sizeof x);                                                     \
                square[c][r] = (real)to_real(x);                                                                 \
            }                                                                                                    \
        }                                                                                                        \
        for (size_t r = 0; r < n_rows; r++)                                                                      \
            for (size_t c = 0; c < n_columns; c++)                                                               \
                to[r * to_row + c] = square[c][r];                                                               \
    }                                                                                                            \
    TARGET static void FN(load_##dtype)(size_t n_outer, size_t n_inner, void *run, const char *data,             \
                                        ptrdiff_t outer, ptrdiff_t inner)                                        \
    {                                                                                                            \
        if (outer == sizeof(stored) && inner != sizeof(stored) && inner != 0) {                                  \
            for (size_t o = 0; o < n_outer; o += SIDE)                                                           \
                for (size_t i = 0; i < n_inner; i += SIDE)                                                       \
                    FN(load_square_##dtype)(min_size(SIDE, n_outer - o), min_size(SIDE, n_inner - i),            \
                                            (real *)run + o * n_inner + i, n_inner,                              \
                                            data + (ptrdiff_t)o * outer + (ptrdiff_t)i * inner, inner);          \
            return;                                                                                              \
        }                                                                                                        \
        for (size_t o = 0; o < n_outer; o++) {                                                                   \
            real *restrict to = (real *)run + o * n_inner;                                                       \
            const char *restrict from = data + (ptrdiff_t)o * outer;                                             \
            stored x;                                                                                            \
            if (inner == sizeof x)                                                                               \
                for (size_t i = 0; i < n_inner; i++) {                                                           \
                    memcpy(&x, from + i * sizeof x, sizeof x);                                                   \
                    to[i] = (real)to_real(x);                                                                    \
                }                                                                                                \
            else if (inner == 0)    /* one for all */                                                            \
                for (size_t i = 0; i < n_inner; i++) {                                                           \
                    memcpy(&x, from, sizeof x);                                                                  \
                    to[i] = (real)to_real(x);                                                                    \
                }                                                                                                \
            else                                                                                                 \
                for (size_t i = 0; i < n_inner; i++) {                                                           \
                    memcpy(&x, from + (ptrdiff_t)i * inner, sizeof x);                                           \
                    to[i] = (real)to_real(x);                                                                    \
                }                                                                                                \
        }                                                                                                        \
    }                                                                                                            \
    TARGET static void FN(store_##dtype)(size_t n_outer, size_t n_inner, const void *run, char *data,            \
                                         ptrdiff_t outer, ptrdiff_t inner)                                       \
    {                                                                                                            \
        for (size_t o = 0; o < n_outer; o++) {                                                                   \
            const real *restrict from = (const real *)run + o * n_inner;                                         \
            char *restrict to = data + (ptrdiff_t)o * outer;                                                     \
            stored x;                                                                                            \
            if (inner == sizeof x)                                                                               \
                for (size_t i = 0; i < n_inner; i++) {                                                           \
                    x = (stored)from_real(from[i]);                                                              \
                    memcpy(to + i * sizeof x, &x, sizeof x);                                                     \
                }                                                                                                \
            else                                                                                                 \
                for (size_t i = 0; i < n_inner; i++) {                                                           \
                    x = (stored)from_real(from[i]);                                                              \
                    memcpy(to + (ptrdiff_t)i * inner, &x, sizeof x);                                             \
                }                                                                                                \
        }                                                                                                        \
    }

/* ---- Small states ---------------------------------------------------------------------------------------------------- */

INLINE uint32_t random_bits(uint32_t key)
{
    key = (key ^ key >> 16) * 0x7feb352du;
    return (key ^ key >> 15) * 0x846ca68bu;
}

/* To be rounded at random is to be rounded up if what is lost, of the distance to the next value, and a random fraction of
 * 2^20 make a whole. */
INLINE uint16_t float32_to_bfloat16_at_random(float x, uint32_t fraction)
{
    const uint32_t rounded = float_bits(x) + (fraction >> 4);    /* infinity has nothing to carry */
    return (uint16_t)((x != x ? 0x7fc00000 : rounded) >> 16);
}

INLINE uint16_t float32_to_float16_at_random(float x, uint32_t fraction)
{
    const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    const bool is_subnormal = magnitude < 0x38800000;
    const uint32_t normal = (magnitude - (112u << 23) + (fraction >> 7)) >> 13;
    const float multiple = float_from_bits(is_subnormal ? magnitude : 0) * 0x1p37f;    /* of 2^-13 of 2^-24 */
    const uint32_t subnormal = ((uint32_t)(int32_t)multiple + (fraction >> 7)) >> 13;
    const uint32_t half = is_subnormal ? subnormal : normal;
    return (uint16_t)(magnitude >= 0x477fe000 ? float32_to_float16(x) : half | sign);    /* from the largest on */
}

/* A code is what the upper bits, 3 of them mantissa, of a magnitude plus a base have more than those of the base: steps of
 * an eighth of it from 0 on, which double whenever the sum does. The base is `least` times a scale, a power of two of which
 * the largest of FS_SCALED elements is 7/8 to 7/4 times; least = 2^-31 makes codes of 8 bits, 2^-15 of 7 beside a `sign`,
 * the bit of negative numbers, which to be read is in all bits above, too. Differences of bytes take fewer operations. */
INLINE float from_code(uint32_t code, float base, uint32_t sign)
{
    const float magnitude = float_from_bits((code << 20 & (0xff ^ sign) << 20) + float_bits(base)) - base;
    return float_from_bits(float_bits(magnitude) | (code & sign << 24));
}

INLINE uint8_t to_code(float x, float base, uint32_t fraction, uint8_t smallest, uint32_t sign)
{
    const float magnitude = float_from_bits(float_bits(x) & 0x7fffffff);
    const uint32_t sum = float_bits(magnitude + base) + fraction;
    const uint8_t code = (uint8_t)((uint8_t)(sum >> 20) - (uint8_t)(float_bits(base) >> 20));
    return sign ? code | (float_bits(x) >> 24 & sign) : code > smallest ? code : smallest;
}

/* What a loop over FS_SCALED elements will meet later on: to the second-level cache, since the first has no room for so many
 * lines on their way. */
INLINE void fetch_ahead(const void *data, size_t n, size_t item)
{
    enum { AHEAD_OF_SCALED = 4 * FS_SCALED, LINE = 64 };
    const char *ahead = (const char *)data + AHEAD_OF_SCALED * item;
    for (size_t byte = 0; byte < n * item; byte += LINE)
        __builtin_prefetch(ahead + byte, 0, 2);
}

/* The scale for elements of at most this magnitude (its bits). It and the base are normal numbers. */
static float scale_of(uint32_t largest, float least)
{
    const uint32_t lowest = 0x40000000 - float_bits(least), highest = 0x7f000000;
    const uint32_t fitting = (largest + 0x1fffff) & 0x7f800000;
    return float_from_bits(fitting > highest ? highest : fitting < lowest ? lowest : fitting);
}

/* Of elements above 7/4 times the highest scale: the last code that there is; or, of those beside what is not finite, 0. */
static const uint32_t LAST_TO_FIT = 0x7f600000;

NOINLINE uint8_t to_last_code(float x, float base, uint32_t fraction, uint32_t sign, bool finite)
{
    const float magnitude = float_from_bits(float_bits(x) & 0x7fffffff);
    const uint32_t code = (float_bits(magnitude + base) + fraction - float_bits(base)) >> 20;
    const uint32_t first = sign ? 0 : 1, last = 0xff ^ sign;
    return finite ? (uint8_t)((code < first ? first : code > last ? last : code) | (float_bits(x) >> 24 & sign)) : 0;
}

/* ---- Parameters of 16 bits ------------------------------------------------------------------------------------------ */

/* `param` is a block of float32. The parts are what is stored of it, and the residual. */
#define HALVES(dtype, to_float, from_float, at_random)                                                           \
    TARGET static void FN(part_stochastic_##dtype)(size_t n, const void *param_, uint16_t *restrict stored,      \
                                                   void *residual, uint32_t key)                                 \
    {                                                                                                            \
        _Alignas(64) uint32_t fraction[FS_SCALED];                                                               \
        (void)residual;                                                                                          \
        for (size_t start = 0; start < n; start += FS_SCALED, key += FS_SCALED * FS_BETWEEN_KEYS) {              \
            const float *restrict param = (const float *)param_ + start;                                         \
            FN(random_fractions)(fraction, key);                                                                 \
            for (size_t i = 0; i < min_size(n - start, FS_SCALED); i++)                                          \
                stored[start + i] = at_random(param[i], fraction[i]);                                            \
        }                                                                                                        \
    }                                                                                                            \
    TARGET static void FN(join_kahan_##dtype)(size_t n, void *param_, const void *residual_)                     \
    {                                                                                                            \
        float *restrict param = param_;                                                                          \
        const uint16_t *restrict residual = residual_;                                                           \
        for (size_t i = 0; i < n; i++)                                                                           \
            param[i] = param[i] + to_float(residual[i]);                                                         \
    }                                                                                                            \
    TARGET static void FN(part_kahan_##dtype)(size_t n, const void *param_, uint16_t *restrict stored,           \
                                              void *residual_, uint32_t key)                                     \
    {                                                                                                            \
        const float *restrict param = param_;                                                                    \
        uint16_t *restrict residual = residual_;                                                                 \
        (void)key;                                                                                               \
        for (size_t i = 0; i < n; i++) {                                                                         \
            const uint16_t rounded = from_float(param[i]);                                                       \
            const float lost = param[i] - to_float(rounded);                                                     \
            residual[i] = from_float(lost - lost == 0 ? lost : 0);                                               \
            stored[i] = rounded;                                                                                 \
        }                                                                                                        \
    }

/* A bfloat16 is rounded to the nearest, up if there are two: then 16 bits with a sign say how far it is off. */
#define SPLIT                                                                                                    \
    TARGET static void FN(join_split)(size_t n, void *param_, const void *residual_)                             \
    {                                                                                                            \
        float *restrict param = param_;                                                                          \
        const int16_t *restrict residual = residual_;                                                            \
        for (size_t i = 0; i < n; i++)                                                                           \
            param[i] = float_from_bits(float_bits(param[i]) + (uint32_t)(int32_t)residual[i]);                   \
    }                                                                                                            \
    TARGET static void FN(part_split)(size_t n, const void *param_, uint16_t *restrict stored, void *residual_,  \
                                      uint32_t key)                                                              \
    {                                                                                                            \
        const float *restrict param = param_;                                                                    \
        int16_t *restrict residual = residual_;                                                                  \
        (void)key;                                                                                               \
        for (size_t i = 0; i < n; i++) {                                                                         \
            const uint32_t bits = float_bits(param[i]);                                                          \
            const uint32_t rounded = param[i] != param[i] ? 0x7fc00000 : (bits + 0x8000) & 0xffff0000;           \
            residual[i] = (int16_t)(param[i] != param[i] ? 0 : bits - rounded);                                  \
            stored[i] = (uint16_t)(rounded >> 16);                                                               \
        }                                                                                                        \
    }

/* ---- Rules -------------------------------------------------------------------------------------------------------- */

#include "rules.def"    /* hyper-parameters and coefficients */

#define RULE(name)   static inline __attribute__((always_inline)) void FN(name##_element)
#define HELPER(name) static inline __attribute__((always_inline)) real FN(name)

/* To be said before a loop: of many arrays GCC does not believe it by `restrict`, and would test each pair or give up. And
 * of a short loop: that it is to be made of vectors before it is unrolled; or that these, up to eight, are to be unrolled, for
 * what they add up to stay in registers. */
#ifdef __clang__
#define ELEMENTS_ARE_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#define IN_ONE_GO _Pragma("clang loop vectorize(assume_safety) unroll(disable)")
#define IN_REGISTERS ELEMENTS_ARE_INDEPENDENT
#else
#define ELEMENTS_ARE_INDEPENDENT _Pragma("GCC ivdep")
#define IN_ONE_GO ELEMENTS_ARE_INDEPENDENT _Pragma("GCC unroll 1")
#define IN_REGISTERS ELEMENTS_ARE_INDEPENDENT _Pragma("GCC unroll 8")
#endif

/* Do this to each of n elements. */
#define EACH_IN_TURN(item, i, n, ...)                                                                            \
    ELEMENTS_ARE_INDEPENDENT                                                                                     \
    for (size_t i = 0; i < n; i++)                                                                               \
        __VA_ARGS__

/* The same where compilers can mask the rest, which does not fill a register of the smallest items: one by one, seven square
 * roots and divisions take longer than forty in registers. */
#define EACH_IN_REGISTERS(item, i, n, ...)                                                                       \
    {                                                                                                            \
        enum { WIDTH = 64 / sizeof(item) };                                                                      \
        const size_t rest = n % WIDTH, whole = n - rest;                                                         \
        for (size_t start = 0; start < whole; start += WIDTH) {                                                  \
            IN_ONE_GO                                                                                            \
            for (size_t lane = 0; lane < WIDTH; lane++) {                                                        \
                const size_t i = start + lane;                                                                   \
                __VA_ARGS__                                                                                      \
            }                                                                                                    \
        }                                                                                                        \
        if (rest > 0) {                                                                                          \
            IN_ONE_GO                                                                                            \
            for (size_t lane = 0; lane < WIDTH; lane++)                                                          \
                if (lane < rest) {                                                                               \
                    const size_t i = whole + lane;                                                               \
                    __VA_ARGS__                                                                                  \
                }                                                                                                \
        }                                                                                                        \
    }

/* The loop around a rule, by its number of states: with all of the compute type; with states in bfloat16; or with parameter and
 * gradient in bfloat16, where the parameter is read from somewhere else than it is written to. */
#define LOOP(name, family, n_states)                                                                             \
    LOOP_OVER(name, name, family, n_states, real, real, AS_IT_IS, AS_IT_IS, real, param, AS_IT_IS)
#define BFLOAT16_LOOP(name, family, n_states)                                                                    \
    LOOP_OVER(name##_bfloat16, name, family, n_states, uint16_t, uint16_t, bfloat16_to_float32, AT_RANDOM, real, param, AS_IT_IS)
#define HALVES_LOOP(name, family, n_states)                                                                      \
    LOOP_OVER(name##_halves, name, family, n_states, uint16_t, real, AS_IT_IS, AS_IT_IS, uint16_t, from, bfloat16_to_float32)
#define AS_IT_IS(x) (x)
#define AT_RANDOM(x) float32_to_bfloat16_at_random(x, fraction[i])

#define LOOP_OVER(function, name, family, n_states, smallest, stored, get, put, given, place, to_real)           \
    TARGET static void FN(function)(size_t n, const void *from_, void *param_, const void *grad_,                \
                                    void *const *state, double factor_, double decay_, const void *coefs_,       \
                                    const uint32_t *fraction)                                                    \
    {                                                                                                            \
        const family##_coefs coefs = *(const family##_coefs *)coefs_;                                            \
        const real factor = (real)factor_, decay = (real)decay_;                                                 \
        real *restrict param = param_;                                                                           \
        const given *restrict from = from_, *restrict grad = grad_;                                              \
        LOOP_POINTERS_##n_states(stored)                                                                         \
        (void)from, (void)state, (void)fraction;                                                                 \
        EACH(smallest, i, n, {                                                                                   \
            real p = to_real(place[i]) * decay, g = to_real(grad[i]) * factor;                                   \
            LOOP_BODY_##n_states(FN(name##_element), get, put)                                                   \
            param[i] = p;                                                                                        \
        })                                                                                                       \
    }

#define LOOP_POINTERS_0(stored)
#define LOOP_POINTERS_1(stored) stored *restrict state0 = state[0];
#define LOOP_POINTERS_2(stored) LOOP_POINTERS_1(stored) stored *restrict state1 = state[1];
#define LOOP_POINTERS_3(stored) LOOP_POINTERS_2(stored) stored *restrict state2 = state[2];
#define LOOP_POINTERS_4(stored) LOOP_POINTERS_3(stored) stored *restrict state3 = state[3];

/* States are stored the last one first: those that a rule only reads are last, and the compiler sees that nothing has changed
 * since they were loaded. */
#define LOOP_BODY_0(element, get, put) element(&p, g, &coefs);
#define LOOP_BODY_1(element, get, put)                                                                           \
    real a = get(state0[i]);                                                                                     \
    element(&p, g, &a, &coefs);                                                                                  \
    state0[i] = put(a);
#define LOOP_BODY_2(element, get, put)                                                                           \
    real a = get(state0[i]), b = get(state1[i]);                                                                 \
    element(&p, g, &a, &b, &coefs);                                                                              \
    state1[i] = put(b);                                                                                          \
    state0[i] = put(a);
#define LOOP_BODY_3(element, get, put)                                                                           \
    real a = get(state0[i]), b = get(state1[i]), d = get(state2[i]);                                             \
    element(&p, g, &a, &b, &d, &coefs);                                                                          \
    state2[i] = put(d);                                                                                          \
    state1[i] = put(b);                                                                                          \
    state0[i] = put(a);
#define LOOP_BODY_4(element, get, put)                                                                           \
    real a = get(state0[i]), b = get(state1[i]), d = get(state2[i]), e = get(state3[i]);                         \
    element(&p, g, &a, &b, &d, &e, &coefs);                                                                      \
    state3[i] = put(e);                                                                                          \
    state2[i] = put(d);                                                                                          \
    state1[i] = put(b);                                                                                          \
    state0[i] = put(a);

/* ---- Stages ------------------------------------------------------------------------------------------------------- */

/* An expression in x for all elements x of a gradient, from one place to another or in place; then it is there. */
#define MAP(expression)                                                                                          \
    {                                                                                                            \
        ELEMENTS_ARE_INDEPENDENT                                                                                 \
        for (size_t i = 0; i < n; i++) {                                                                         \
            const real x = from[i];                                                                              \
            to[i] = expression;                                                                                  \
        }                                                                                                        \
        from = to;                                                                                               \
    }

/* ---- Sums ----------------------------------------------------------------------------------------------------------- */

_Static_assert(FS_LANES == 16, "folded by 8, 4, 2 and 1");

/* A sum in double and one more square. The square of a float32 is exact in double, so a fused multiply-add, which rounds but
 * once, gives the same bits, and sooner. */
#define ROUND_BOTH(sum, x) ((sum) + (x) * (x))
#define ROUND_ONCE(sum, x) __builtin_fma(x, x, sum)
#define ADD_ITSELF(sum, x) ((sum) + (x))

/* Sixteen zeros; a loop that is unrolled, since GCC would set an array to zero by an instruction that takes its time. */
#define LANES(name)                                                                                              \
    double name[FS_LANES];                                                                                       \
    _Pragma("GCC unroll 16")                                                                                     \
    for (int l = 0; l < FS_LANES; l++)                                                                           \
        name[l] = 0.0;

#define FOLD(lane, half)                                                                                         \
    for (int l = 0; l < half; l++)                                                                               \
        lane[l] += lane[l + half];
#define FOLD_ALL(lane) FOLD(lane, 8) FOLD(lane, 4) FOLD(lane, 2) FOLD(lane, 1)

/* Do this to each of the elements of a block, which belong to the lanes in turn. */
#define EACH_IN_LANES(i, lane, start, end, ...)                                                                  \
    {                                                                                                            \
        const size_t whole = start + (end - start) / FS_LANES * FS_LANES;                                        \
        for (size_t row = start; row < whole; row += FS_LANES) {                                                 \
            IN_REGISTERS                                                                                         \
            for (size_t lane = 0; lane < FS_LANES; lane++) {                                                     \
                const size_t i = row + lane;                                                                     \
                __VA_ARGS__                                                                                      \
            }                                                                                                    \
        }                                                                                                        \
        if (whole < end) {                                                                                       \
            IN_ONE_GO                                                                                            \
            for (size_t lane = 0; lane < FS_LANES; lane++)                                                       \
                if (lane < end - whole) {                                                                        \
                    const size_t i = whole + lane;                                                               \
                    __VA_ARGS__                                                                                  \
                }                                                                                                \
        }                                                                                                        \
    }

/* The loop around what is measured for a rule, two values of each element: sums over blocks of FS_BLOCK of themselves, or of
 * their squares. */
#define MEASURE(name, family, n_states, add)                                                                     \
    TARGET static void FN(measure_##name)(size_t n, const void *param_, const void *grad_, void *const *state,   \
                                          double factor_, double decay_, const void *coefs_,                     \
                                          const double *scales, double *first_sums, double *second_sums)         \
    {                                                                                                            \
        const family##_coefs coefs = *(const family##_coefs *)coefs_;                                            \
        const real factor = (real)factor_, decay = (real)decay_;                                                 \
        const double scale0 = sizeof(real) == sizeof(float) ? 1.0 : scales[0];                                   \
        const double scale1 = sizeof(real) == sizeof(float) ? 1.0 : scales[1];                                   \
        const real *restrict param = param_, *restrict grad = grad_;                                             \
        LOOP_POINTERS_##n_states(const real)                                                                     \
        for (size_t block = 0; block < n; block += FS_BLOCK) {                                                   \
            const size_t end = block + min_size(n - block, FS_BLOCK);                                            \
            LANES(first)                                                                                         \
            LANES(second)                                                                                        \
            EACH_IN_LANES(i, lane, block, end, {                                                                 \
                real x, y;                                                                                       \
                FN(name##_measured_element)(param[i] * decay, grad[i] * factor, LOOP_STATES_##n_states, &x, &y,  \
                                            &coefs);                                                             \
                first[lane] = add(first[lane], (double)x * scale0);                                              \
                second[lane] = add(second[lane], (double)y * scale1);                                            \
            })                                                                                                   \
            FOLD_ALL(first)                                                                                      \
            FOLD_ALL(second)                                                                                     \
            *first_sums++ = first[0];                                                                            \
            *second_sums++ = second[0];                                                                          \
        }                                                                                                        \
    }

#define LOOP_STATES_1 state0[i]
#define LOOP_STATES_2 LOOP_STATES_1, state1[i]
#define LOOP_STATES_4 LOOP_STATES_2, state2[i], state3[i]

/* ---- The tables --------------------------------------------------------------------------------------------------- */

#define real float
#define REAL_IS_FLOAT
#define SQRT __builtin_sqrtf
#ifdef __FP_FAST_FMA
#define ADD_SQUARE ROUND_ONCE
#else
#define ADD_SQUARE ROUND_BOTH
#endif
#define TARGET
#define FN(name) name##_float32_baseline
#define EACH EACH_IN_TURN
#include "kernels.inc"

#define real double
#define SQRT __builtin_sqrt
#define ADD_SQUARE ROUND_BOTH
#define TARGET
#define FN(name) name##_float64_baseline
#define EACH EACH_IN_TURN
#include "kernels.inc"

#ifdef __x86_64__
#define HAVE_X86_LEVELS

#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#if defined(__clang__)
#define TARGET_AVX512 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl"), min_vector_width(512)))
#else
#define TARGET_AVX512 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")))
#endif

#define real float
#define REAL_IS_FLOAT
#define SQRT __builtin_sqrtf
#define ADD_SQUARE ROUND_ONCE
#define TARGET TARGET_AVX2
#define FN(name) name##_float32_avx2
#define EACH EACH_IN_TURN
#include "kernels.inc"

#define real double
#define SQRT __builtin_sqrt
#define ADD_SQUARE ROUND_BOTH
#define TARGET TARGET_AVX2
#define FN(name) name##_float64_avx2
#define EACH EACH_IN_TURN
#include "kernels.inc"

#define real float
#define REAL_IS_FLOAT
#define SQRT __builtin_sqrtf
#define ADD_SQUARE ROUND_ONCE
#define TARGET TARGET_AVX512
#define FN(name) name##_float32_avx512
#define EACH EACH_IN_REGISTERS
#include "kernels.inc"

#define real double
#define SQRT __builtin_sqrt
#define ADD_SQUARE ROUND_BOTH
#define TARGET TARGET_AVX512
#define FN(name) name##_float64_avx512
#define EACH EACH_IN_REGISTERS
#include "kernels.inc"
#endif

const fs_kernels *fs_kernels_of(fs_level level, fs_dtype compute)
{
    static const fs_kernels *const tables[FS_N_LEVELS][2] = {
        [FS_BASELINE] = {&table_float32_baseline, &table_float64_baseline},
#ifdef HAVE_X86_LEVELS
        [FS_AVX2] = {&table_float32_avx2, &table_float64_avx2},
        [FS_AVX512] = {&table_float32_avx512, &table_float64_avx512},
#endif
    };
    return tables[level][compute];
}

int fs_rule_count(void) { return FS_N_RULES; }

const char *fs_rule_name(int rule)
{
    static const char *const names[] = {
#define FS_RULE(name, family, n_states) #name,
#include "rules.def"
#undef FS_RULE
    };
    return names[rule];
}

const char *fs_rule_hyper_names(int rule)
{
    static const char *const hyper_names[] = {
#define FS_RULE(name, family, n_states) family##_hyper_names,
#include "rules.def"
#undef FS_RULE
    };
    return hyper_names[rule];
}

int fs_rule_states(int rule)
{
    static const int states[] = {
#define FS_RULE(name, family, n_states) n_states,
#include "rules.def"
#undef FS_RULE
    };
    return states[rule];
}

#define FS_RULE(name, family, n_states)                                                                          \
    _Static_assert(sizeof(family##_hyper) <= FS_MAX_HYPER * sizeof(double), "raise FS_MAX_HYPER");               \
    _Static_assert(sizeof(family##_coefs) <= FS_MAX_COEFS * sizeof(double), "raise FS_MAX_COEFS");               \
    _Static_assert(n_states <= FS_MAX_STATES, "raise FS_MAX_STATES");
#include "rules.def"
#undef FS_RULE

void fs_rule_prepare(int rule, const double *hyper, double step, double *coefs)
{
    switch (rule) {
#define FS_RULE(name, family, n_states)                                                                          \
    case FS_RULE_##name:                                                                                         \
        family##_prepare((const family##_hyper *)hyper, step, (family##_coefs *)coefs);                          \
        break;
#include "rules.def"
#undef FS_RULE
    }
}

#define FS_RULE(name, family, n_states)

bool fs_rule_is_scaled(int rule)
{
    switch (rule) {
#define FS_NUMBERED_RULE(name, family, n_states, n_numbers) case FS_RULE_##name:
#include "rules.def"
        return true;
    default:
        return false;
    }
}

bool fs_rule_is_summed(int rule)
{
    switch (rule) {
#define FS_SUMMED_RULE(name, family, n_states, n_numbers) case FS_RULE_##name:
#include "rules.def"
        return true;
    default:
        return false;
    }
}

int fs_rule_numbers(int rule)
{
    switch (rule) {
#define FS_NUMBERED_RULE(name, family, n_states, n_numbers)                                                      \
    case FS_RULE_##name: {                                                                                       \
        _Static_assert(n_numbers <= FS_MAX_NUMBERS, "raise FS_MAX_NUMBERS");                                     \
        return n_numbers;                                                                                        \
    }
#include "rules.def"
    default:
        return 0;
    }
}

bool fs_rule_is_measured(int rule)
{
    switch (rule) {
#define FS_SCALED_RULE(name, family, n_states, n_numbers) case FS_RULE_##name:
#include "rules.def"
        return true;
    default:
        return false;
    }
}

bool fs_rule_is_factored(int rule)
{
    switch (rule) {
#define FS_FACTORED_RULE(name, family) case FS_RULE_##name:
#include "rules.def"
        return true;
    default:
        return false;
    }
}

void fs_rule_begin(int rule, const double *hyper, const double *numbers, double *coefs)
{
    switch (rule) {
#define FS_SUMMED_RULE(name, family, n_states, n_numbers)                                                        \
    case FS_RULE_##name:                                                                                         \
        family##_begin((const family##_hyper *)hyper, numbers, (family##_coefs *)coefs);                         \
        break;
#include "rules.def"
    }
}

void fs_rule_scale(int rule, const double *hyper, const fs_whole *whole, double *numbers, double *coefs)
{
    switch (rule) {
#define FS_NUMBERED_RULE(name, family, n_states, n_numbers)                                                      \
    case FS_RULE_##name:                                                                                         \
        family##_scale((const family##_hyper *)hyper, whole, numbers, (family##_coefs *)coefs);                  \
        break;
#include "rules.def"
    }
}
