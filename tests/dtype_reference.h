/* Rounding done differently from the library: the values of a type are listed as doubles, and the nearest one is looked
   up. */
#ifndef LORASYNC_DTYPE_REFERENCE_H
#define LORASYNC_DTYPE_REFERENCE_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* A float type: 1 sign bit, `exponent_bits`, `mantissa_bits`. All codes below `limit` (without sign) are finite;
   `limit` is what too large values become, and takes part in rounding with the value its bits would have. */
typedef struct ref_type {
    lorasync_dtype dtype;
    int            exponent_bits, mantissa_bits, bias;
    uint32_t       limit;
} ref_type;

#define REF_NUM 4
#if defined(__GNUC__)
#define REF_UNUSED __attribute__((unused))
#else
#define REF_UNUSED
#endif
REF_UNUSED static const ref_type ref_types[REF_NUM] = {{LORASYNC_BF16, 8, 7, 127, 0x7f80},
                                                       {LORASYNC_F16, 5, 10, 15, 0x7c00},
                                                       {LORASYNC_F8_E5M2, 5, 2, 15, 0x7c},
                                                       {LORASYNC_F8_E4M3, 4, 3, 7, 0x7f}};

REF_UNUSED static int ref_bits(const ref_type *t) { return 1 + t->exponent_bits + t->mantissa_bits; }

/* The value of a code without sign; also of `limit`. */
REF_UNUSED static double ref_value(const ref_type *t, uint32_t code)
{
    int exponent = (int)(code >> t->mantissa_bits);
    int mantissa = (int)(code & ((1u << t->mantissa_bits) - 1u));
    if (exponent == 0) return ldexp((double)mantissa, 1 - t->bias - t->mantissa_bits);
    return ldexp((double)mantissa + ldexp(1.0, t->mantissa_bits), exponent - t->bias - t->mantissa_bits);
}

REF_UNUSED static int ref_is_nan_code(const ref_type *t, uint32_t code)
{
    uint32_t magnitude = code & ((1u << (ref_bits(t) - 1)) - 1u);
    return t->dtype == LORASYNC_F8_E4M3 ? magnitude == 0x7f : magnitude > t->limit;
}

/* x >= 0, not NaN: the nearest code, the even one of two. */
REF_UNUSED static uint32_t ref_nearest(const ref_type *t, double x)
{
    uint32_t low = 0, high = t->limit; /* value(low) <= x < value(high) */
    double   below, above;
    if (x >= ref_value(t, high)) return high;
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (ref_value(t, middle) <= x) low = middle;
        else high = middle;
    }
    below = x - ref_value(t, low);
    above = ref_value(t, high) - x;
    if (below < above) return low;
    if (below > above) return high;
    return low % 2 == 0 ? low : high;
}

REF_UNUSED static float ref_float(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* F32 bits to a code; every NaN becomes `limit` + 1, or for e4m3 `limit`. Compare NaN with ref_is_nan_code. */
REF_UNUSED static uint32_t ref_round(const ref_type *t, uint32_t bits)
{
    uint32_t sign = bits >> 31 << (ref_bits(t) - 1), magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | (t->dtype == LORASYNC_F8_E4M3 ? t->limit : t->limit + 1);
    if (magnitude == 0x7f800000u) return sign | t->limit;
    return sign | ref_nearest(t, (double)ref_float(magnitude));
}

#endif
