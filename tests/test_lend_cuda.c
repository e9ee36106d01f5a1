/* test_lend.c in device memory: the fake's, or with IN_PLACE_GPU (make test-gpu) that of the GPUs of this machine. */
#if defined(__has_include)
#if __has_include(<cuda_runtime_api.h>)
#define HAVE_CUDA 1
#endif
#endif

#ifndef HAVE_CUDA
#define _DEFAULT_SOURCE 1
#include "test.h"

int main(void)
{
    printf("skip test_lend_cuda: no cuda_runtime_api.h here\n");
    test_skipped++;
    return test_summary("test_lend_cuda");
}
#else

#define LORASYNC_CUDA
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#define LEND_CUDA "in_place_cuda.h"
#include "test_lend.c"

#endif
