/* Names, sizes and conversions of element types, and the search for NaN and Inf. All F32 inputs: slow_dtype.c. */
#include "no_avx2.h"

#define LORASYNC_STATIC
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"

#include "test.h"

#include "dtype_reference.h"

/* -- names and sizes */

static void names(void)
{
    int i;
    CHECK_TEXT(lorasync_dtype_name(LORASYNC_BF16), "BF16");
    CHECK_TEXT(lorasync_dtype_name(LORASYNC_F8_E4M3FNUZ), "F8_E4M3FNUZ");
    CHECK_EQ(lorasync_dtype_bits(LORASYNC_F4), 4);
    CHECK_EQ(lorasync_dtype_bits(LORASYNC_F6_E3M2), 6);
    CHECK_EQ(lorasync_dtype_bits(LORASYNC_BOOL), 8);
    CHECK_EQ(lorasync_dtype_bits(LORASYNC_F16), 16);
    CHECK_EQ(lorasync_dtype_bits(LORASYNC_F32), 32);
    CHECK_EQ(lorasync_dtype_bits(LORASYNC_C64), 64);
    for (i = 1; i <= 22; i++) {
        CHECK(lorasync_dtype_name((lorasync_dtype)i) != NULL);
        CHECK_EQ(lorasync_dtype_from_name(lorasync_dtype_name((lorasync_dtype)i)), i);
    }
    CHECK(lorasync_dtype_name(LORASYNC_DTYPE_NONE) == NULL);
    CHECK(lorasync_dtype_name((lorasync_dtype)23) == NULL);
    CHECK_EQ(lorasync_dtype_bits(LORASYNC_DTYPE_NONE), 0);
    CHECK_EQ(lorasync_dtype_bits((lorasync_dtype)23), 0);
    CHECK_EQ(lorasync_dtype_from_name(""), LORASYNC_DTYPE_NONE);
    CHECK_EQ(lorasync_dtype_from_name("bf16"), LORASYNC_DTYPE_NONE);
    CHECK_EQ(lorasync_dtype_from_name("F3"), LORASYNC_DTYPE_NONE);
    CHECK_EQ(lorasync_dtype_from_name("F322"), LORASYNC_DTYPE_NONE);
    CHECK_EQ(lorasync_dtype_from_name(NULL), LORASYNC_DTYPE_NONE);
}

/* -- conversions of one element */

static uint32_t narrow(uint32_t bits, lorasync_dtype dtype)
{
    uint16_t half = 0;
    uint8_t  byte = 0;
    int      wide = lorasync_dtype_bits(dtype) == 16;
    CHECK_EQ(lorasync_convert(wide ? (void *)&half : (void *)&byte, dtype, &bits, LORASYNC_F32, 1, NULL), LORASYNC_OK);
    return wide ? half : byte;
}

/* The published table: F32 bits, then e4m3, f16, bf16. */
static void vectors(void)
{
    static const uint32_t table[][4] = {
        {0x00000000, 0x00, 0x0000, 0x0000}, {0x3a800000, 0x00, 0x1400, 0x3a80}, {0x3a800001, 0x01, 0x1400, 0x3a80},
        {0x3b000000, 0x01, 0x1800, 0x3b00}, {0x3b400000, 0x02, 0x1a00, 0x3b40}, {0x3ba00000, 0x02, 0x1d00, 0x3ba0},
        {0x3c7fffff, 0x08, 0x2400, 0x3c80}, {0x3c800000, 0x08, 0x2400, 0x3c80}, {0x3f800000, 0x38, 0x3c00, 0x3f80},
        {0x3f880000, 0x38, 0x3c40, 0x3f88}, {0x3f980000, 0x3a, 0x3cc0, 0x3f98}, {0x43e00000, 0x7e, 0x5f00, 0x43e0},
        {0x43e60000, 0x7e, 0x5f30, 0x43e6}, {0x43e80000, 0x7e, 0x5f40, 0x43e8}, {0x43e80001, 0x7f, 0x5f40, 0x43e8},
        {0x43f00000, 0x7f, 0x5f80, 0x43f0}, {0x7f800000, 0x7f, 0x7c00, 0x7f80}, {0xc3e84000, 0xff, 0xdf42, 0xc3e8},
        {0x7149f2ca, 0x7f, 0x7c00, 0x714a}, {0x3a83126f, 0x01, 0x1419, 0x3a83}, {0x40490fdb, 0x45, 0x4248, 0x4049},
        {0x80000000, 0x80, 0x8000, 0x8000}, {0xff800000, 0xff, 0xfc00, 0xff80},
    };
    static const uint32_t e5m2[][2] = {
        {0x37000000, 0x00}, {0x37000001, 0x01}, {0x37800000, 0x01}, {0x38800000, 0x04}, {0x3a83126f, 0x14},
        {0x3f800000, 0x3c}, {0x3f900000, 0x3c}, {0x3fb00000, 0x3e}, {0x40490fdb, 0x42}, {0x47600000, 0x7b},
        {0x476fffff, 0x7b}, {0x47700000, 0x7c}, {0x7f800000, 0x7c}, {0x80000000, 0x80},
    };
    static const uint32_t f16_edges[][2] = {
        {0x477fefff, 0x7bff}, {0x477ff000, 0x7c00}, {0x47800000, 0x7c00}, {0x33000000, 0x0000}, {0x33000001, 0x0001},
        {0xb3000001, 0x8001}, {0x33c00000, 0x0002}, {0x387fffff, 0x0400}, {0x00000001, 0x0000}, {0x7f7fffff, 0x7c00},
    };
    size_t i;
    for (i = 0; i < sizeof table / sizeof table[0]; i++) {
        CHECK_EQ(narrow(table[i][0], LORASYNC_F8_E4M3), table[i][1]);
        CHECK_EQ(narrow(table[i][0], LORASYNC_F16), table[i][2]);
        CHECK_EQ(narrow(table[i][0], LORASYNC_BF16), table[i][3]);
    }
    for (i = 0; i < sizeof e5m2 / sizeof e5m2[0]; i++) CHECK_EQ(narrow(e5m2[i][0], LORASYNC_F8_E5M2), e5m2[i][1]);
    for (i = 0; i < sizeof f16_edges / sizeof f16_edges[0]; i++)
        CHECK_EQ(narrow(f16_edges[i][0], LORASYNC_F16), f16_edges[i][1]);
    CHECK_EQ(narrow(0x7f7fffff, LORASYNC_BF16), 0x7f80); /* the largest finite value rounds to Inf */
}

static void nan_stays_nan(void)
{
    static const uint32_t nans[] = {0x7f800001, 0x7fc00000, 0x7fffffff, 0xff800001,
                                    0xffc00000, 0xffffffff, 0x7f80ffff, 0xff8fffff};
    size_t                i, t;
    for (i = 0; i < sizeof nans / sizeof nans[0]; i++)
        for (t = 0; t < REF_NUM; t++) CHECK(ref_is_nan_code(&ref_types[t], narrow(nans[i], ref_types[t].dtype)));
}

/* -- many elements: every code, random values */

static uint32_t load(const unsigned char *p, int num_bytes)
{
    uint16_t half;
    uint32_t word;
    if (num_bytes == 1) return *p;
    if (num_bytes == 2) {
        memcpy(&half, p, 2);
        return half;
    }
    memcpy(&word, p, 4);
    return word;
}

static void store(unsigned char *p, uint32_t value, int num_bytes)
{
    uint16_t half = (uint16_t)value;
    if (num_bytes == 1) *p = (unsigned char)value;
    else if (num_bytes == 2) memcpy(p, &half, 2);
    else memcpy(p, &value, 4);
}

/* What a code of a small type is in F32, by its value. */
static void check_wide(const ref_type *t, uint32_t code, uint32_t bits)
{
    uint32_t magnitude = code & ((1u << (ref_bits(t) - 1)) - 1u);
    uint32_t sign      = code >> (ref_bits(t) - 1);
    if (ref_is_nan_code(t, code)) {
        CHECK((bits & 0x7fffffffu) > 0x7f800000u);
    } else {
        CHECK_EQ(bits >> 31, sign);
        if (magnitude == t->limit) CHECK_EQ(bits & 0x7fffffffu, 0x7f800000u);
        else CHECK((double)ref_float(bits & 0x7fffffffu) == ref_value(t, magnitude));
    }
}

static void widening(void)
{
    static unsigned char codes[65536 * 2], back[65536 * 2];
    static uint32_t      wide[65536];
    size_t               t, i, num;
    for (t = 0; t < REF_NUM; t++) {
        int num_bytes = ref_bits(&ref_types[t]) / 8;
        num           = num_bytes == 2 ? 65536 : 256;
        for (i = 0; i < num; i++) store(codes + i * (size_t)num_bytes, (uint32_t)i, num_bytes);
        REQUIRE(lorasync_convert(wide, LORASYNC_F32, codes, ref_types[t].dtype, num, NULL) == LORASYNC_OK);
        for (i = 0; i < num; i++) check_wide(&ref_types[t], (uint32_t)i, wide[i]);
        REQUIRE(lorasync_convert(back, ref_types[t].dtype, wide, LORASYNC_F32, num, NULL) == LORASYNC_OK);
        for (i = 0; i < num; i++) {
            uint32_t code = load(back + i * (size_t)num_bytes, num_bytes);
            if (ref_is_nan_code(&ref_types[t], (uint32_t)i)) CHECK(ref_is_nan_code(&ref_types[t], code));
            else CHECK_EQ(code, i);
        }
    }
}

/* Between two small types: the same as through F32. */
static void small_to_small(void)
{
    static unsigned char codes[65536 * 2], direct[65536 * 2];
    static uint32_t      wide[65536];
    size_t               s, d, i;
    for (s = 0; s < REF_NUM; s++) {
        int    in_bytes = ref_bits(&ref_types[s]) / 8;
        size_t num      = in_bytes == 2 ? 65536 : 256;
        for (i = 0; i < num; i++) store(codes + i * (size_t)in_bytes, (uint32_t)i, in_bytes);
        lorasync_convert(wide, LORASYNC_F32, codes, ref_types[s].dtype, num, NULL);
        for (d = 0; d < REF_NUM; d++) {
            int out_bytes = ref_bits(&ref_types[d]) / 8;
            if (d == s) continue;
            REQUIRE(lorasync_convert(direct, ref_types[d].dtype, codes, ref_types[s].dtype, num, NULL) == LORASYNC_OK);
            for (i = 0; i < num; i++) {
                uint32_t expected = ref_round(&ref_types[d], wide[i]),
                         found    = load(direct + i * (size_t)out_bytes, out_bytes);
                if (ref_is_nan_code(&ref_types[d], expected)) CHECK(ref_is_nan_code(&ref_types[d], found));
                else CHECK_EQ(found, expected);
            }
        }
    }
}

/* Block scales: code c is 2^(c - 127), 255 is NaN. Every code to every value type, alone and among others. */
static void block_scales(void)
{
    unsigned char codes[256], out[256 * 2];
    uint32_t      wide[256];
    size_t        i, t;
    for (i = 0; i < 256; i++) codes[i] = (unsigned char)i;
    REQUIRE(lorasync_convert(wide, LORASYNC_F32, codes, LORASYNC_F8_E8M0, 256, NULL) == LORASYNC_OK);
    for (i = 0; i < 255; i++) CHECK((double)ref_float(wide[i]) == ldexp(1.0, (int)i - 127));
    CHECK((wide[255] & 0x7fffffffu) > 0x7f800000u);
    for (t = 0; t < REF_NUM; t++) {
        int num_bytes = ref_bits(&ref_types[t]) / 8;
        REQUIRE(lorasync_convert(out, ref_types[t].dtype, codes, LORASYNC_F8_E8M0, 256, NULL) == LORASYNC_OK);
        for (i = 0; i < 255; i++)
            CHECK_EQ(load(out + i * (size_t)num_bytes, num_bytes), ref_round(&ref_types[t], wide[i]));
        CHECK(ref_is_nan_code(&ref_types[t], load(out + 255 * (size_t)num_bytes, num_bytes)));
    }
    for (i = 0; i < 256; i++) {
        uint32_t one;
        lorasynci_convert_scaled(&one, LORASYNC_F32, codes + i, LORASYNC_F8_E8M0, 1, 3.0f);
        if (i < 254) CHECK((double)ref_float(one) == ldexp(3.0, (int)i - 127));
        else CHECK((one & 0x7fffffffu) >= 0x7f800000u); /* 3 x 2^127 is Inf */
        CHECK_EQ(lorasynci_find_nonfinite(codes + i, LORASYNC_F8_E8M0, 1), i == 255 ? 0 : SIZE_MAX);
    }
    CHECK_EQ(lorasynci_find_nonfinite(codes, LORASYNC_F8_E8M0, 256), 255);
    CHECK_EQ(lorasynci_find_nonfinite(codes, LORASYNC_F8_E8M0, 255), SIZE_MAX);
    CHECK_EQ(lorasynci_find_nonfinite(NULL, LORASYNC_F8_E8M0, 0), SIZE_MAX);
}

/* Random bits, or values near the edges of a type, or plain weights. */
static uint32_t random_f32(unsigned long long *state, int kind)
{
    uint32_t r = (uint32_t)(test_random(state) >> 16);
    switch (kind) {
    case 0: return r;
    case 1:
        return (r & 0x80000000u) | (0x38000000u + r % 0x01000000u);      /* around the smallest normals of f16 and
                                                                            e5m2 */
    case 2: return (r & 0x80000000u) | (0x3a000000u + r % 0x03000000u);  /* of e4m3 */
    case 3: return (r & 0x80000000u) | (0x43d00000u + r % 0x04000000u);  /* where they overflow */
    case 4: return r & 0xffff8000u;                                      /* ties of bf16 */
    case 5: return (r & 0xfffff000u) >> (r % 3);                         /* ties of f16 */
    default: return (r & 0x80000000u) | (0x30000000u + r % 0x10000000u); /* weights: 4.7e-10 to 2 */
    }
}

static void random_values(void)
{
    enum {
        NUM = 20000
    };
    static uint32_t      in[NUM];
    static unsigned char out[NUM * 2];
    unsigned long long   state = 1;
    size_t               t, i;
    int                  kind;
    for (kind = 0; kind < 7; kind++) {
        for (i = 0; i < NUM; i++) in[i] = random_f32(&state, kind);
        for (t = 0; t < REF_NUM; t++) {
            int num_bytes = ref_bits(&ref_types[t]) / 8;
            lorasync_convert(out, ref_types[t].dtype, in, LORASYNC_F32, NUM, NULL);
            for (i = 0; i < NUM; i++) {
                uint32_t expected = ref_round(&ref_types[t], in[i]),
                         found    = load(out + i * (size_t)num_bytes, num_bytes);
                if (ref_is_nan_code(&ref_types[t], expected)) CHECK(ref_is_nan_code(&ref_types[t], found));
                else CHECK_EQ(found, expected);
            }
        }
    }
}

/* -- any alignment, any length, nothing written behind the end; one NaN beside ordinary values changes none of them */

static const lorasync_dtype float_types[] = {LORASYNC_F32, LORASYNC_BF16, LORASYNC_F16, LORASYNC_F8_E5M2,
                                             LORASYNC_F8_E4M3};

static void one_by_one(unsigned char *dst, lorasync_dtype dt, const unsigned char *src, lorasync_dtype st, size_t n,
                       float scale)
{
    size_t i, ds = (size_t)lorasync_dtype_bits(dt) / 8, ss = (size_t)lorasync_dtype_bits(st) / 8;
    for (i = 0; i < n; i++) lorasynci_convert_scaled(dst + i * ds, dt, src + i * ss, st, 1, scale);
}

static void tails_and_alignment(void)
{
    unsigned char      in[4 * 400 + 8], out[4 * 400 + 16], expected[4 * 400 + 16];
    unsigned long long state = 2;
    size_t             n, s, d, i, in_at, out_at;
    for (s = 0; s < 5; s++) {
        for (d = 0; d < 5; d++) {
            for (n = 0; n <= 100; n++) {
                size_t size = (size_t)lorasync_dtype_bits(float_types[d]) / 8;
                in_at       = test_random(&state) % 8;
                out_at      = test_random(&state) % 8;
                for (i = 0; i < sizeof in; i++) in[i] = (unsigned char)test_random(&state);
                memset(out, 0xa5, sizeof out);
                memset(expected, 0xa5, sizeof expected);
                lorasynci_convert_scaled(out + out_at, float_types[d], in + in_at, float_types[s], n, 1.0f);
                one_by_one(expected + out_at, float_types[d], in + in_at, float_types[s], n, 1.0f);
                CHECK(memcmp(out, expected, sizeof out) == 0);
                CHECK_EQ(out[out_at + n * size], 0xa5);
            }
        }
    }
    for (in_at = 0; in_at < 8; in_at++) {
        for (out_at = 0; out_at < 8; out_at++) {
            memset(out, 0, sizeof out);
            memset(expected, 0, sizeof expected);
            lorasynci_convert_scaled(out + out_at, LORASYNC_BF16, in + in_at, LORASYNC_F32, 333, 1.0f);
            one_by_one(expected + out_at, LORASYNC_BF16, in + in_at, LORASYNC_F32, 333, 1.0f);
            CHECK(memcmp(out, expected, sizeof out) == 0);
        }
    }
}

/* Long enough for the prefetching loop. */
static void long_runs(void)
{
    enum {
        NUM = 10007
    };
    unsigned char *in = (unsigned char *)malloc(NUM * 4), *out = (unsigned char *)malloc(NUM * 4),
                  *expected  = (unsigned char *)malloc(NUM * 4);
    unsigned long long state = 3;
    size_t             s, d, i;
    REQUIRE(in && out && expected);
    for (i = 0; i < NUM * 4; i++) in[i] = (unsigned char)test_random(&state);
    for (s = 0; s < 5; s++) {
        for (d = 0; d < 5; d++) {
            size_t size = (size_t)lorasync_dtype_bits(float_types[d]) / 8;
            lorasynci_convert_scaled(out, float_types[d], in, float_types[s], NUM, 1.0f);
            one_by_one(expected, float_types[d], in, float_types[s], NUM, 1.0f);
            CHECK(memcmp(out, expected, NUM * size) == 0);
        }
    }
    free(in);
    free(out);
    free(expected);
}

static void scaling(void)
{
    static const float scales[] = {2.0f, 0.5f, 0.3f, -1.0f, 1.0000001f, 1e30f, 0.0f};
    uint32_t           in[200], product[200];
    unsigned char      out[800], expected[800];
    unsigned long long state = 4;
    size_t             k, d, i, n;
    for (k = 0; k < sizeof scales / sizeof scales[0]; k++) {
        for (i = 0; i < 200; i++) {
            float f;
            in[i] = random_f32(&state, 6);
            f     = ref_float(in[i]) * scales[k];
            memcpy(&product[i], &f, 4);
        }
        for (d = 0; d < 5; d++) {
            size_t size = (size_t)lorasync_dtype_bits(float_types[d]) / 8;
            for (n = 1; n <= 200; n++) {
                lorasynci_convert_scaled(out, float_types[d], in, LORASYNC_F32, n, scales[k]);
                lorasynci_convert_scaled(expected, float_types[d], product, LORASYNC_F32, n, 1.0f);
                CHECK(memcmp(out, expected, n * size) == 0);
            }
        }
    }
    { /* rounded once, after the product: 1.00390625 * 3 in F32, not of a value rounded before */
        uint32_t one_and = 0x3f808000u, found;
        uint16_t half;
        lorasynci_convert_scaled(&half, LORASYNC_BF16, &one_and, LORASYNC_F32, 1, 3.0f);
        CHECK_EQ(half, 0x4041); /* 3.01171875 is between 0x4040 and 0x4041; rounding 1.00390625 first gives 0x4040 */
        half = 0x3f80;
        lorasynci_convert_scaled(&half, LORASYNC_BF16, &one_and, LORASYNC_F32, 1, 1.0f);
        CHECK_EQ(half, 0x3f80);
        lorasynci_convert_scaled(&found, LORASYNC_F32, &one_and, LORASYNC_F32, 1, 2.0f);
        CHECK_EQ(found, 0x40008000u);
    }
}

/* -- copies and refusals */

static void copies(void)
{
    unsigned char in[64], out[64];
    size_t        i;
    int           t;
    for (i = 0; i < sizeof in; i++) in[i] = (unsigned char)(i * 37 + 11);
    for (t = 1; t <= 22; t++) {
        memset(out, 0, sizeof out);
        CHECK_EQ(lorasync_convert(out, (lorasync_dtype)t, in, (lorasync_dtype)t, 8, NULL), LORASYNC_OK);
        CHECK(memcmp(out, in, (size_t)lorasync_dtype_bits((lorasync_dtype)t)) == 0);
        for (i = (size_t)lorasync_dtype_bits((lorasync_dtype)t); i < sizeof out; i++) CHECK_EQ(out[i], 0);
    }
    CHECK_EQ(lorasync_convert(out, LORASYNC_F4, in, LORASYNC_F4, 2, NULL), LORASYNC_OK);
    CHECK_EQ(lorasync_convert(NULL, LORASYNC_BF16, NULL, LORASYNC_F32, 0, NULL), LORASYNC_OK);
    CHECK_EQ(lorasync_convert(NULL, LORASYNC_BF16, NULL, LORASYNC_BF16, 0, NULL), LORASYNC_OK);
}

static int is_one_of(int dtype, const lorasync_dtype *list, size_t num)
{
    size_t i;
    for (i = 0; i < num; i++)
        if (dtype == (int)list[i]) return 1;
    return 0;
}

static void refusals(void)
{
    lorasync_error err;
    unsigned char  in[16] = {0}, out[16] = {0};
    int            s, d;
    for (s = 0; s <= 23; s++) {
        CHECK_EQ(lorasynci_is_value((lorasync_dtype)s), is_one_of(s, float_types, 5));
        for (d = 0; d <= 23; d++) {
            int widens = is_one_of(s, float_types, 5) || s == LORASYNC_F8_E8M0;
            int ok     = (widens && is_one_of(d, float_types, 5)) || (s == d && s >= 1 && s <= 22);
            CHECK_EQ(lorasynci_can_convert((lorasync_dtype)s, (lorasync_dtype)d), ok);
            CHECK_EQ(lorasync_convert(out, (lorasync_dtype)d, in, (lorasync_dtype)s, 0, &err),
                     ok ? LORASYNC_OK : LORASYNC_E_UNSUPPORTED);
        }
    }
    CHECK_EQ(lorasync_convert(out, LORASYNC_F16, in, LORASYNC_F64, 1, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_EQ(err.status, LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "cannot convert F64 (20) to F16 (14)");
    CHECK_HAS(err.text, "only F32, F16, BF16, F8_E4M3, F8_E5M2 are converted into one another");
    CHECK_EQ(lorasync_convert(out, LORASYNC_F8_E8M0, in, LORASYNC_F32, 1, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "F32 (18) to F8_E8M0 (9)");
    CHECK_HAS(err.text, "and into them F8_E8M0");
    CHECK_EQ(lorasync_convert(out, LORASYNC_F32, in, LORASYNC_I32, 1, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_EQ(lorasync_convert(out, (lorasync_dtype)99, in, LORASYNC_I32, 1, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "99");
    CHECK_EQ(lorasync_convert(out, LORASYNC_F4, in, LORASYNC_F4, 3, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "F4");
    CHECK_EQ(lorasync_convert(out, LORASYNC_F6_E2M3, in, LORASYNC_F6_E2M3, 2, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_EQ(lorasync_convert(NULL, LORASYNC_BF16, in, LORASYNC_F32, 1, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "dst");
    CHECK_EQ(lorasync_convert(out, LORASYNC_BF16, NULL, LORASYNC_F32, 1, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "src");
}

/* -- NaN and Inf */

static int is_nonfinite(lorasync_dtype dtype, const unsigned char *p)
{
    size_t   t;
    uint32_t code;
    double   d;
    if (dtype == LORASYNC_F64) {
        memcpy(&d, p, 8);
        return !(d - d == 0);
    }
    if (dtype == LORASYNC_F8_E8M0) return *p == 0xff;
    if (dtype == LORASYNC_F32) return (load(p, 4) & 0x7fffffffu) >= 0x7f800000u;
    for (t = 0; t < REF_NUM; t++) {
        if (ref_types[t].dtype != dtype) continue;
        code = load(p, ref_bits(&ref_types[t]) / 8);
        return (code & ((1u << (ref_bits(&ref_types[t]) - 1)) - 1u)) >= ref_types[t].limit;
    }
    return 0;
}

static size_t find_slowly(const unsigned char *p, lorasync_dtype dtype, size_t n)
{
    size_t i, size = (size_t)lorasync_dtype_bits(dtype) / 8;
    for (i = 0; i < n; i++)
        if (is_nonfinite(dtype, p + i * size)) return i;
    return SIZE_MAX;
}

/* Every code of 8 and 16 bits alone; the first and last that are not finite, and their neighbours, of 32 and 64. */
static void nonfinite_codes(void)
{
    size_t        t;
    uint32_t      i;
    unsigned char p[8];
    for (t = 0; t < REF_NUM; t++) {
        int num_bytes = ref_bits(&ref_types[t]) / 8;
        for (i = 0; i < (num_bytes == 2 ? 65536u : 256u); i++) {
            store(p, i, num_bytes);
            CHECK_EQ(lorasynci_find_nonfinite(p, ref_types[t].dtype, 1), find_slowly(p, ref_types[t].dtype, 1));
        }
    }
    for (t = 0; t < 8; t++) {
        static const uint64_t f64[4] = {UINT64_C(0x7fefffffffffffff), UINT64_C(0x7ff0000000000000),
                                        UINT64_C(0x7ff0000000000001), UINT64_C(0x7fffffffffffffff)};
        static const uint32_t f32[4] = {0x7f7fffffu, 0x7f800000u, 0x7f800001u, 0x7fffffffu};
        uint64_t              wide   = f64[t / 2] | (t % 2 ? UINT64_C(1) << 63 : 0);
        uint32_t              word   = f32[t / 2] | (t % 2 ? 1u << 31 : 0);
        memcpy(p, &wide, 8);
        CHECK_EQ(lorasynci_find_nonfinite(p, LORASYNC_F64, 1), t < 2 ? SIZE_MAX : 0);
        memcpy(p, &word, 4);
        CHECK_EQ(lorasynci_find_nonfinite(p, LORASYNC_F32, 1), t < 2 ? SIZE_MAX : 0);
    }
}

static void nonfinite_positions(void)
{
    static const lorasync_dtype types[] = {LORASYNC_F64,     LORASYNC_F32,     LORASYNC_BF16,   LORASYNC_F16,
                                           LORASYNC_F8_E5M2, LORASYNC_F8_E4M3, LORASYNC_F8_E8M0};
    unsigned char               data[8 * 300 + 8];
    unsigned long long          state = 5;
    size_t                      t, n, i, k;
    for (t = 0; t < sizeof types / sizeof types[0]; t++) {
        size_t size = (size_t)lorasync_dtype_bits(types[t]) / 8;
        for (k = 0; k < 300; k++) {
            unsigned char *p = data + test_random(&state) % 8;
            n                = test_random(&state) % 300;
            for (i = 0; i < n * size; i++)
                p[i] = (unsigned char)(test_random(&state) & 0x3b); /* finite in every
                                                                                                  type */
            CHECK_EQ(lorasynci_find_nonfinite(p, types[t], n), SIZE_MAX);
            memset(p + n * size, 0xff, 8 - (size_t)(p - data)); /* behind the end: must not be seen */
            CHECK_EQ(lorasynci_find_nonfinite(p, types[t], n), SIZE_MAX);
            if (!n) continue;
            memset(p + test_random(&state) % n * size, k % 2 ? 0x7f : 0xff, size);
            memset(p + test_random(&state) % n * size, 0xff, size);
            CHECK(find_slowly(p, types[t], n) != SIZE_MAX);
            CHECK_EQ(lorasynci_find_nonfinite(p, types[t], n), find_slowly(p, types[t], n));
        }
    }
    memset(data, 0xff, sizeof data);
    CHECK_EQ(lorasynci_find_nonfinite(data, LORASYNC_I32, 10), SIZE_MAX);
    CHECK_EQ(lorasynci_find_nonfinite(data, LORASYNC_U8, 10), SIZE_MAX);
    CHECK_EQ(lorasynci_find_nonfinite(data, LORASYNC_F4, 10), SIZE_MAX);
    CHECK_EQ(lorasynci_find_nonfinite(data, LORASYNC_DTYPE_NONE, 10), SIZE_MAX);
    CHECK_EQ(lorasynci_find_nonfinite(NULL, LORASYNC_F32, 0), SIZE_MAX);
}

int main(void)
{
    RUN(names);
    RUN(vectors);
    RUN(nan_stays_nan);
    RUN(widening);
    RUN(small_to_small);
    RUN(block_scales);
    RUN_BOTH_WAYS(random_values);
    RUN_BOTH_WAYS(tails_and_alignment);
    RUN_BOTH_WAYS(long_runs);
    RUN_BOTH_WAYS(scaling);
    RUN(copies);
    RUN(refusals);
    RUN(nonfinite_codes);
    RUN_BOTH_WAYS(nonfinite_positions);
    return test_summary("test_dtype");
}
