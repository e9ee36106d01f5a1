/* Every F32 bit pattern to BF16, F16, F8_E5M2 and F8_E4M3 against the reference. Takes about a minute.
   usage: slow_dtype [part parts]: only the given one of `parts` equal parts, 0 to parts - 1. */
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"

#include "dtype_reference.h"

#define BLOCK 4096u

static uint32_t           in[BLOCK];
static unsigned char      out[BLOCK * 2];
static unsigned long long num_wrong;

static uint32_t code_at(size_t i, int bits)
{
    return bits == 8 ? out[i] : (uint32_t)out[2 * i] | (uint32_t)out[2 * i + 1] << 8; /* little-endian hosts */
}

static void check(const ref_type *t, uint32_t u, uint32_t expected, uint32_t found)
{
    int ok = ref_is_nan_code(t, expected) ? ref_is_nan_code(t, found) : expected == found;
    if (!ok && num_wrong++ < 20)
        fprintf(stderr, "%s: %08x (%g) is %x, expected %x\n", lorasync_dtype_name(t->dtype), (unsigned)u,
                (double)ref_float(u), (unsigned)found, (unsigned)expected);
}

static double middle_above(const ref_type *t, uint32_t k)
{
    return k < t->limit ? (ref_value(t, k) + ref_value(t, k + 1)) / 2 : HUGE_VAL;
}

/* Magnitudes come in rising order, so that the nearest code only ever moves up: code k holds until the middle between k
   and k + 1. */
static void sweep(const ref_type *t, uint32_t first, uint32_t last)
{
    static uint32_t expected[BLOCK];
    int             bits   = ref_bits(t);
    uint32_t        k      = ref_round(t, first) < t->limit ? ref_round(t, first) : t->limit, u, i, s;
    double          middle = middle_above(t, k);
    for (u = first; u < last; u += BLOCK) {
        for (i = 0; i < BLOCK; i++) {
            if (u + i < 0x7f800000u) {
                double x = (double)ref_float(u + i);
                for (; x > middle || (x >= middle && k % 2 != 0); middle = middle_above(t, k)) k++;
                expected[i] = k;
            } else {
                expected[i] = ref_round(t, u + i);
            }
        }
        for (s = 0; s < 2; s++) {
            for (i = 0; i < BLOCK; i++) in[i] = (u + i) | s << 31;
            lorasynci_convert_scaled(out, t->dtype, in, LORASYNC_F32, BLOCK, 1.0f);
            for (i = 0; i < BLOCK; i++) check(t, in[i], expected[i] | s << (bits - 1), code_at(i, bits));
        }
    }
}

int main(int argc, char **argv)
{
    uint32_t part = argc == 3 ? (uint32_t)atoi(argv[1]) : 0, parts = argc == 3 ? (uint32_t)atoi(argv[2]) : 1;
    uint32_t blocks = 0x80000000u / BLOCK;
    int      t;
    if (parts == 0 || part >= parts) return 2;
    for (t = 0; t < REF_NUM; t++)
        sweep(&ref_types[t], (uint32_t)((uint64_t)blocks * part / parts) * BLOCK,
              (uint32_t)((uint64_t)blocks * (part + 1) / parts) * BLOCK);
    printf("slow_dtype: %llu of 2^32 / %u inputs x %d types are wrong\n", num_wrong, (unsigned)parts, REF_NUM);
    return num_wrong != 0;
}
