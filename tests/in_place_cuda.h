/* What test_in_place.c and test_lend.c need of CUDA. */
#ifdef IN_PLACE_GPU

#include <cuda_runtime_api.h>

static void choose_gpu(int rank)
{
    int num = 0;
    CHECK_EQ(cudaGetDeviceCount(&num), cudaSuccess);
    CHECK_EQ(cudaSetDevice(num ? rank % num : 0), cudaSuccess);
}

/* Asked in a child: a process that has touched CUDA must not fork ranks that use it. */
static int can_run(void)
{
    int   status = 0, num = 0;
    pid_t pid = fork();
    if (pid == 0) _exit(cudaGetDeviceCount(&num) == cudaSuccess && num > 0 ? 0 : 1);
    if (pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0) return 1;
    printf("skip: no GPU here\n");
    return 0;
}

#else

#include "fake_cuda.h"

static void choose_gpu(int rank)
{
    fake_cuda.devices = 2;
    CHECK_EQ(cudaSetDevice(rank % 2), cudaSuccess);
}

static int can_run(void)
{
    if (!FAKE_MALLOC) return 1;
    printf("skip: the address sanitizer's device memory is not shared between processes\n");
    return 0;
}

#endif
