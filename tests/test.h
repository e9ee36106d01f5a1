/* The whole test harness. A test program is a main() of RUN(...) lines that ends in `return test_summary("name");`. */
#ifndef LORASYNC_TEST_H
#define LORASYNC_TEST_H

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int         test_passed, test_failed, test_skipped;
static int         test_errors; /* failed checks of the running test */
static const char *test_skip_reason;

#if defined(__GNUC__)
#define TEST_UNUSED __attribute__((unused))
#else
#define TEST_UNUSED
#endif

/* A failed check is printed and counted; the test goes on. The first 20 of a test are printed. */
#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) test_fail(__FILE__, __LINE__, #condition);                                                   \
    } while (0)

/* Equal integers, printed when they differ. */
#define CHECK_EQ(a, b)                                                                                                 \
    do {                                                                                                               \
        long long test_a_ = (long long)(a), test_b_ = (long long)(b);                                                  \
        if (test_a_ != test_b_) test_fail_eq(__FILE__, __LINE__, #a, test_a_, #b, test_b_);                            \
    } while (0)

#define CHECK_TEXT(a, b)                                                                                               \
    do {                                                                                                               \
        const char *test_a_ = (a), *test_b_ = (b);                                                                     \
        if (!test_a_ || !test_b_ || strcmp(test_a_, test_b_) != 0)                                                     \
            test_fail_text(__FILE__, __LINE__, #a, test_a_, test_b_);                                                  \
    } while (0)

/* `text` must hold `part`: for error texts, which must name things. */
#define CHECK_HAS(text, part)                                                                                          \
    do {                                                                                                               \
        const char *test_a_ = (text), *test_b_ = (part);                                                               \
        if (!strstr(test_a_, test_b_)) test_fail_text(__FILE__, __LINE__, #text, test_a_, test_b_);                    \
    } while (0)

/* A failed requirement leaves the test function. */
#define REQUIRE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            test_fail(__FILE__, __LINE__, #condition);                                                                 \
            return;                                                                                                    \
        }                                                                                                              \
    } while (0)

#define SKIP(reason)                                                                                                   \
    do {                                                                                                               \
        test_skip_reason = (reason);                                                                                   \
        return;                                                                                                        \
    } while (0)

#define RUN(function) test_run(#function, function)

TEST_UNUSED static void test_fail(const char *file, int line, const char *what)
{
    if (test_errors++ < 20) fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
}

TEST_UNUSED static void test_fail_eq(const char *file, int line, const char *a, long long va, const char *b,
                                     long long vb)
{
    if (test_errors++ < 20) fprintf(stderr, "%s:%d: failed: %s is %lld, %s is %lld\n", file, line, a, va, b, vb);
}

TEST_UNUSED static void test_fail_text(const char *file, int line, const char *what, const char *found,
                                       const char *expected)
{
    if (test_errors++ < 20)
        fprintf(stderr, "%s:%d: failed: %s is \"%s\", expected \"%s\"\n", file, line, what, found ? found : "(null)",
                expected ? expected : "(null)");
}

TEST_UNUSED static void test_run(const char *name, void (*function)(void))
{
    test_errors      = 0;
    test_skip_reason = NULL;
    function();
    if (test_errors) {
        test_failed++;
        printf("FAIL %s (%d checks)\n", name, test_errors);
    } else if (test_skip_reason) {
        test_skipped++;
        printf("skip %s: %s\n", name, test_skip_reason);
    } else {
        test_passed++;
        printf("ok   %s\n", name);
    }
    fflush(stdout);
}

TEST_UNUSED static int test_summary(const char *program)
{
    printf("%s: %d passed, %d failed, %d skipped\n", program, test_passed, test_failed, test_skipped);
    return test_failed != 0;
}

/* Real adapters, configs and model shapes. They are not part of the repository: where the folder is absent, the tests
   of them are not run, and nobody is told to get what cannot be had. */
TEST_UNUSED static const char *test_data(void)
{
    const char *given = getenv("LORASYNC_TEST_DATA");
    return given ? given : "../shared/data";
}

/* A path below test_data(). The result lives until the 8th call after. */
TEST_UNUSED static const char *test_path(const char *below)
{
    static char paths[8][1024];
    static int  next;
    next = (next + 1) % 8;
    snprintf(paths[next], sizeof paths[next], "%s/%s", test_data(), below);
    return paths[next];
}

/* RUN, where there is real data of that kind. */
#define RUN_ON_DATA(below, function)                                                                                   \
    do {                                                                                                               \
        if (access(test_path(below), R_OK) == 0) RUN(function);                                                        \
    } while (0)

/* The whole file, with a NUL behind it; NULL when it cannot be read. free() it. */
TEST_UNUSED static char *test_read(const char *path, size_t *num_bytes)
{
    FILE *f = fopen(path, "rb");
    char *p = NULL;
    long  n;
    if (!f) return NULL;
    if (fseek(f, 0, SEEK_END) == 0 && (n = ftell(f)) >= 0 && fseek(f, 0, SEEK_SET) == 0) {
        p = (char *)malloc((size_t)n + 1);
        if (p && fread(p, 1, (size_t)n, f) != (size_t)n) {
            free(p);
            p = NULL;
        }
        if (p) {
            p[n] = 0;
            if (num_bytes) *num_bytes = (size_t)n;
        }
    }
    fclose(f);
    return p;
}

/* A random generator with its whole state in one variable, so that a failing case can be printed and repeated. */
TEST_UNUSED static unsigned long long test_random(unsigned long long *state)
{
    unsigned long long x = (*state += 0x9e3779b97f4a7c15ULL);
    x                    = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x                    = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

/* -- time

   LORASYNC_TEST_SLOWNESS says how many times slower than usual the machine may be; 1 without it. Every deadline, pause
   and bound of a test is multiplied by it, so that correct code also passes on a machine that has much else to do. */
TEST_UNUSED static int test_ms(int ms)
{
    const char *given  = getenv("LORASYNC_TEST_SLOWNESS");
    int         factor = given ? atoi(given) : 1;
    return factor > 1 ? ms * factor : ms;
}

/* The longest that a call with a deadline of a moment may take, in ns: on a busy machine it ends late, not never. */
TEST_UNUSED static long long test_no_hang_ns(void) { return test_ms(10000) * 1000000ll; }

TEST_UNUSED static void test_sleep_ms(int ms)
{
    struct timespec t;
    t.tv_sec  = test_ms(ms) / 1000;
    t.tv_nsec = test_ms(ms) % 1000 * 1000000l;
    nanosleep(&t, NULL);
}

TEST_UNUSED static unsigned long long test_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (unsigned long long)t.tv_sec * 1000000000u + (unsigned long long)t.tv_nsec;
}

#ifdef LORASYNC_H
/* What a callback returns that shall fail. */
TEST_UNUSED static lorasync_status test_refuse(lorasync_error *err, lorasync_status status, const char *format, ...)
{
    va_list args;
    if (!err) return status;
    err->status = status;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    return status;
}
#endif

/* An allocator that counts, and fails at the nth allocation (fail_at counts down from n; 0: never). Not for several
   threads. */
typedef struct test_memory {
    long live, total, fail_at;
} test_memory;

TEST_UNUSED static void *test_memory_alloc(void *user, size_t num_bytes)
{
    test_memory *m = (test_memory *)user;
    if (m->fail_at && --m->fail_at == 0) return NULL;
    m->live++;
    m->total++;
    return malloc(num_bytes);
}

TEST_UNUSED static void test_memory_free(void *user, void *p)
{
    test_memory *m = (test_memory *)user;
    m->live--;
    free(p);
}

#endif
