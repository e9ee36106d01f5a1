/* test_replicas.c in device memory: the fake's or, with REPLICAS_GPU, that of the GPUs here. */
#if defined(__has_include)
#if __has_include(<cuda_runtime_api.h>) && __has_include(<nccl.h>)
#define HAVE_CUDA 1
#endif
#endif

#ifndef HAVE_CUDA
#define _DEFAULT_SOURCE 1
#include "test.h"

int main(void)
{
    printf("skip test_replicas_cuda: no cuda_runtime_api.h and nccl.h here\n");
    test_skipped++;
    return test_summary("test_replicas_cuda");
}
#else

#define LORASYNC_CUDA
#define LORASYNC_NCCL
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#define REPLICAS_CUDA
#include "test_replicas.c"

#endif
