/* Included before lorasync.h: AVX2 can be switched off, so that tests also run what CPUs without it run. */
#ifndef LORASYNC_TEST_NO_AVX2_H
#define LORASYNC_TEST_NO_AVX2_H

#if defined(__GNUC__)
__attribute__((unused))
#endif
static int with_avx2 = 1;

#define LORASYNCI_HAS_AVX2() (with_avx2 && __builtin_cpu_supports("avx2"))

/* A test with whatever the CPU has, and again without AVX2. */
#define RUN_BOTH_WAYS(function)                                                                                        \
    do {                                                                                                               \
        RUN(function);                                                                                                 \
        with_avx2 = 0;                                                                                                 \
        test_run(#function " without AVX2", function);                                                                 \
        with_avx2 = 1;                                                                                                 \
    } while (0)

#endif
