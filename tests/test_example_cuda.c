/* examples/transport_lend.c with DEMO_CUDA, on the fake's device memory: it prints what its first comment says. */
#if defined(__has_include)
#if __has_include(<cuda_runtime_api.h>)
#define HAVE_CUDA 1
#endif
#endif

#ifndef HAVE_CUDA
#include "test.h"

int main(void)
{
    printf("skip test_example_cuda: no cuda_runtime_api.h here\n");
    test_skipped++;
    return test_summary("test_example_cuda");
}
#else

#define DEMO_CUDA
#define main example_main
#include "../examples/transport_lend.c"
#undef main
#include "test.h"
#include "fake_cuda.h"

/* What the example prints, run in a process of its own; "" when it fails. */
static void run_example(char *out, size_t size)
{
    char  *argv[] = {(char *)(uintptr_t) "transport_lend", NULL};
    int    ends[2], status = 0;
    size_t used = 0;
    pid_t  pid;
    out[0] = 0;
    REQUIRE(pipe(ends) == 0);
    fflush(NULL);
    pid = fork();
    if (pid == 0) {
        dup2(ends[1], 1);
        close(ends[0]);
        fake_cuda_share();
        fake_cuda_reset();
        fake_cuda_reclaim();
        status = example_main(1, argv);
        fflush(NULL);
        _exit(status);
    }
    close(ends[1]);
    for (;;) {
        ssize_t n = read(ends[0], out + used, size - 1 - used);
        if (n <= 0) break;
        used += (size_t)n;
    }
    out[used] = 0;
    close(ends[0]);
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void prints_what_it_says(void)
{
    char out[4096], line[200];
    int  v;
    if (FAKE_MALLOC) SKIP("the address sanitizer's device memory is not shared between processes");
    run_example(out, sizeof out);
    for (v = 1; v <= VERSIONS; v++) {
        snprintf(line, sizeof line, "engine: serves version %d, every value as trained\n", v);
        CHECK((strstr(out, line) != NULL) == (v != REFUSED));
        snprintf(line, sizeof line, "version %d: made in place by 4 ranks", v);
        CHECK((strstr(out, line) != NULL) == (v != REFUSED && v != REFUSED + 1));
    }
    CHECK_HAS(out, "version 5: copied by rank 0, lent 5 times, copied 1 times\n");
}

int main(void)
{
    RUN(prints_what_it_says);
    return test_summary("test_example_cuda");
}

#endif
