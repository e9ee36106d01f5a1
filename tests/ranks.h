/* Runs a function on every rank of a local communicator: as threads, or as forked processes. */
#ifndef LORASYNC_TEST_RANKS_H
#define LORASYNC_TEST_RANKS_H

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_RANKS 64

typedef struct rank_context {
    lorasync_comm comm;
    int           rank, world;
    void         *user; /* the caller's, shared by threads */
    void (*function)(struct rank_context *context);
} rank_context;

static void *rank_thread(void *p)
{
    rank_context *c = (rank_context *)p;
    c->function(c);
    return NULL;
}

/* World threads; returns when all are done. */
TEST_UNUSED static void run_threads(int world, void (*function)(rank_context *), void *user)
{
    lorasync_local *local;
    lorasync_error  err;
    rank_context    c[MAX_RANKS];
    pthread_t       threads[MAX_RANKS];
    int             r;
    if (lorasync_local_open(world, &local, &err) < 0) {
        test_fail(__FILE__, __LINE__, err.text);
        return;
    }
    for (r = 0; r < world; r++) {
        c[r].rank     = r;
        c[r].world    = world;
        c[r].user     = user;
        c[r].function = function;
        if (lorasync_local_join(local, r, &c[r].comm, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    }
    for (r = 1; r < world; r++) pthread_create(&threads[r], NULL, rank_thread, &c[r]);
    function(&c[0]);
    for (r = 1; r < world; r++) pthread_join(threads[r], NULL);
    lorasync_local_close(local);
}

/* World child processes; each exits with the number of its failed checks (at most 99). Returns the number of ranks that
   failed. */
TEST_UNUSED static int run_processes(int world, void (*function)(rank_context *), void *user)
{
    lorasync_local *local;
    lorasync_error  err;
    pid_t           pids[MAX_RANKS];
    int             r, failed = 0, status;
    if (lorasync_local_open(world, &local, &err) < 0) return world;
    fflush(NULL);
    for (r = 0; r < world; r++) {
        pids[r] = fork();
        if (pids[r] == 0) {
            rank_context c;
            c.rank      = r;
            c.world     = world;
            c.user      = user;
            c.function  = function;
            test_errors = 0;
            if (lorasync_local_join(local, r, &c.comm, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
            function(&c);
            lorasync_local_close(local);
            _exit(test_errors > 99 ? 99 : test_errors);
        }
    }
    for (r = 0; r < world; r++)
        if (waitpid(pids[r], &status, 0) != pids[r] || !WIFEXITED(status) || WEXITSTATUS(status) != 0) failed++;
    lorasync_local_close(local);
    return failed;
}

#endif
