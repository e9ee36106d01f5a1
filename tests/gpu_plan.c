/* The random cases of test_plan in real device memory: `make test-gpu`. Ranks share the GPUs there are; NCCL needs one
   for each. gpu_plan [N [TEST...]]: N cases of each kind instead of 60, and only these tests (sanitizers are slow, and
   not all can see what other processes do). */
#define LORASYNCI_FULL 1 /* small tiles get small blocks although there are few */
#define LORASYNC_CUDA
#define LORASYNC_NCCL
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include "test.h"
#include "ranks.h"
#include "random_case.h"
#include "device_case.h"
#include "pieces.h"

#include <signal.h>
#include <time.h>

static int num_gpus, num_cases = 60;

/* Counted by a child: a process that has touched CUDA must not fork ranks that use it. */
static int count_gpus(void)
{
    int   status = 0, num = 0;
    pid_t pid = fork();
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
    static const lorasync_plan_kind kinds[] = {LORASYNC_GATHER, LORASYNC_RESHARD, LORASYNC_GATHER_ALL,
                                               LORASYNC_RESHARD};
    static random_case              c;
    int                             i, bad = 0;
    for (i = 0; i < (num_cases + 3) / 4; i++) {
        reset(WAY_DIRECT);
        device_options.keep_on_device = i % 2;
        make_case(&c, (unsigned long long)i * 31337, kinds[i % 4], 0);
        if (run_processes(c.world, run_device_process, &c)) {
            fprintf(stderr, "case %d: %d ranks\n", i, c.world);
            bad++;
        }
        free_case(&c);
    }
    CHECK_EQ(bad, 0);
}

static void over_nccl(int way)
{
    static random_case c;
    int                i, bad = 0, run = 0;
    for (i = 0; run < (num_cases + 3) / 4 && i < 1000; i++) {
        reset(way);
        make_case(&c, (unsigned long long)i * 7717, (lorasync_plan_kind)(i % 4), 0);
        if (c.world <= num_gpus && (num_gpus < 2 || c.world > 1)) {
            bad += run_processes(c.world, run_device_process, &c) != 0;
            run++;
        }
        free_case(&c);
    }
    CHECK_EQ(bad, 0);
}

/* NCCL, a process for each GPU; the bytes over it, or directly. */
static void processes_over_nccl(void) { over_nccl(WAY_NCCL); }
static void processes_with_nccl(void) { over_nccl(WAY_NCCL_DIRECT); }

/* -- a rank that is killed: the others are told before the deadline is long over, and can close */

enum {
    BEFORE_BEGIN,
    BEFORE_WAIT,
    AFTER_WAIT,
    NUM_MOMENTS
};

static void plan_with_one_that_dies(rank_context *x)
{
    enum {
        NUM = 1 << 20
    };
    const int          moment = *(const int *)x->user;
    device_rank        d;
    lorasync_plan_desc desc;
    lorasync_cuda      cuda;
    lorasync_piece     piece;
    lorasync_status    status = LORASYNC_OK;
    time_t             start;
    int                run;
    memset(&d, 0, sizeof d);
    memset(&desc, 0, sizeof desc);
    memset(&cuda, 0, sizeof cuda);
    d.context = x;
    cudaSetDevice(x->rank);
    CHECK_EQ(device_comm(&d), LORASYNC_OK);
    piece = shard_piece("t", 1, NUM, 0, x->rank, x->world, NULL);
    CHECK_EQ(cudaMalloc(&piece.data, NUM * 4), cudaSuccess);
    CHECK_EQ(cudaMemset(piece.data, 0, NUM * 4), cudaSuccess);
    desc.comm         = &d.comm;
    desc.have         = &piece;
    desc.num_have     = 1;
    desc.cuda         = &cuda;
    desc.no_direct    = 1;
    desc.bucket_bytes = 100000;
    desc.timeout_ms   = 3000;
    CHECK_EQ(lorasync_plan_create(&desc, &d.plan, &d.err), LORASYNC_OK);
    start = time(NULL);
    for (run = 0; run < 4 && status >= 0; run++) {
        start = time(NULL);
        if (x->rank == 1 && run == 2 && moment == BEFORE_BEGIN) raise(SIGKILL);
        status = lorasync_plan_begin(d.plan, &d.err);
        if (x->rank == 1 && run == 2 && moment == BEFORE_WAIT) raise(SIGKILL);
        if (status >= 0) status = lorasync_plan_wait(d.plan, &d.err);
        if (x->rank == 1 && run == 2 && moment == AFTER_WAIT) raise(SIGKILL);
    }
    CHECK(lorasync_is_lost(status));
    CHECK(run > 2);
    lorasync_plan_free(d.plan);
    lorasync_nccl_close(&d.comm);
    CHECK(time(NULL) - start < 15);
    cudaFree(piece.data);
}

static void killed_over_nccl(void)
{
    int moment;
    if (num_gpus < 2) SKIP("needs two GPUs");
    reset(WAY_NCCL);
    for (moment = 0; moment < NUM_MOMENTS; moment++)
        CHECK_EQ(run_processes(2, plan_with_one_that_dies, &moment), 1); /* the one that is killed */
}

/* As processes_over_nccl, each run a launch of a CUDA graph; or launches among runs. */
static void captured_over_nccl(void)
{
    static random_case c;
    int                i, bad = 0, run = 0;
    for (i = 0; run < (num_cases + 11) / 12 && i < 1000; i++) {
        reset(run % 2 ? WAY_NCCL_DIRECT : WAY_NCCL);
        device_options.capture = 1 + run / 2 % 2;
        device_options.runs    = run / 2 % 2 ? 7 : 0;
        make_case(&c, (unsigned long long)i * 5417, i % 3 == 2 ? LORASYNC_RESHARD : (lorasync_plan_kind)(i % 3), 0);
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

static int is_wanted(int argc, char **argv, const char *name)
{
    int i;
    for (i = 2; i < argc; i++)
        if (strcmp(argv[i], name) == 0) return 1;
    return argc < 3;
}

#define RUN_WANTED(function) (is_wanted(argc, argv, #function) ? RUN(function) : (void)0)

int main(int argc, char **argv)
{
    if (argc > 1) {
        num_cases          = atoi(argv[1]);
        device_patience_ms = 120000;
    }
    num_gpus = count_gpus();
    if (num_gpus == 0) {
        printf("skip gpu_plan: no GPU here\n");
        test_skipped++;
        return test_summary("gpu_plan");
    }
    RUN_WANTED(processes);
    RUN_WANTED(processes_over_nccl);
    RUN_WANTED(processes_with_nccl);
    RUN_WANTED(captured_over_nccl);
    RUN_WANTED(killed_over_nccl);
    RUN_WANTED(direct);
    RUN_WANTED(direct_kept_on_device);
    RUN_WANTED(over_the_host);
    RUN_WANTED(captured);
    return test_summary("gpu_plan");
}
