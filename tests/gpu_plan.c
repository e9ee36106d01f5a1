/* The random cases of test_plan in real device memory: `make test-gpu`. Ranks share the GPUs there are; NCCL needs one for each.
   With an argument N: N cases of each kind instead of 60 (sanitizers are slow). */
#define LORASYNC_CUDA
#define LORASYNC_NCCL
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include "test.h"
#include "ranks.h"
#include "random_case.h"
#include "device_case.h"

static int num_gpus, num_cases = 60;

/* Counted by a child: a process that has touched CUDA must not fork ranks that use it. */
static int count_gpus(void)
{
    int   status = 0, num = 0;
    pid_t pid    = fork();
    if (pid == 0) _exit(cudaGetDeviceCount(&num) == cudaSuccess ? num : 0);
    return pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

static void reset(int way)
{
    memset(&device_options, 0, sizeof device_options);
    device_options.way = way;
}

/* Ranks are processes: the image is opened through CUDA IPC. */
static void processes(void)
{
    static random_case c;
    int                i, bad = 0;
    for (i = 0; i < (num_cases + 5) / 6; i++) {
        reset(WAY_DIRECT);
        device_options.keep_on_device = i % 2;
        make_case(&c, (unsigned long long)i * 31337, i % 3 == 2 ? LORASYNC_GATHER_ALL : LORASYNC_GATHER, 0);
        if (run_processes(c.world, run_device_process, &c)) {
            fprintf(stderr, "case %d: %d ranks\n", i, c.world);
            bad++;
        }
        free_case(&c);
    }
    CHECK_EQ(bad, 0);
}

/* NCCL, a process for each GPU. */
static void processes_over_nccl(void)
{
    static random_case c;
    int                i, bad = 0, run = 0;
    for (i = 0; run < (num_cases + 5) / 6 && i < 1000; i++) {
        reset(WAY_NCCL);
        make_case(&c, (unsigned long long)i * 7717, (lorasync_plan_kind)(i % 4), 0);
        if (c.world <= num_gpus && (num_gpus < 2 || c.world > 1)) {
            bad += run_processes(c.world, run_device_process, &c) != 0;
            run++;
        }
        free_case(&c);
    }
    CHECK_EQ(bad, 0);
}

static void threads(int way, int keep_on_device, int capture)
{
    int kind;
    for (kind = LORASYNC_GATHER; kind <= LORASYNC_RESHARD; kind++) {
        if (capture && kind >= LORASYNC_SCATTER) continue; /* those exchange through the host without NCCL */
        reset(way);
        device_options.keep_on_device = keep_on_device;
        device_options.capture        = capture;
        random_cases((lorasync_plan_kind)kind, num_cases, 0, run_device_case);
    }
}

static void direct(void) { threads(WAY_FALLBACK, 0, 0); }
static void direct_kept_on_device(void) { threads(WAY_FALLBACK, 1, 0); }
static void over_the_host(void) { threads(WAY_HOST, 0, 0); }
static void captured(void) { threads(WAY_DIRECT, 1, 1); }

int main(int argc, char **argv)
{
    if (argc > 1) num_cases = atoi(argv[1]);
    num_gpus = count_gpus();
    if (num_gpus == 0) {
        printf("skip gpu_plan: no GPU here\n");
        test_skipped++;
        return test_summary("gpu_plan");
    }
    RUN(processes);
    RUN(processes_over_nccl);
    RUN(direct);
    RUN(direct_kept_on_device);
    RUN(over_the_host);
    RUN(captured);
    return test_summary("gpu_plan");
}
