/* A transport of your own that lends its memory: all ranks write the new version straight into it, and nothing is
   copied on the way to the engine.

   compile   cc -I. -o transport_lend examples/transport_lend.c -lm -lpthread    (from the folder that holds lorasync.h)
             cc -DDEMO_CUDA -I. -isystem /usr/local/cuda/include .. -lcudart     the same in device memory
   run       ./transport_lend [RANKS]            4 without it
   output    engine: serves version 1, every value as trained
             version 1: made in place by 4 ranks, lent 2 times, copied 0 times
             engine: serves version 2, every value as trained
             version 2: made in place by 4 ranks, lent 3 times, copied 0 times
             engine: serves version 3, every value as trained
             version 3: made in place by 4 ranks, lent 4 times, copied 0 times
             engine: refuses version 4
             version 4: commit failed, the engine goes on with version 3
             engine: serves version 5, every value as trained
             version 5: copied by rank 0, lent 5 times, copied 1 times
             engine: serves version 6, every value as trained
             version 6: made in place by 4 ranks, lent 6 times, copied 1 times

   The story: the memory is registered for RDMA, once, which is slow; then a NIC brings it to the engine's host without
   the CPU. Here NIC and other host are a process beside the ranks, and registered memory is memory with a name (with
   DEMO_CUDA: device memory that CUDA IPC opens, as GPUDirect RDMA would reach it).

       pool     | board | buffer 0: header, payload | buffer 1 | buffer 2 |        (DEMO_CUDA: payloads on the GPU)

       lend      a buffer that the engine does not use        the ranks gather into it: image header and payload
       stage     nothing to do when the image lies there; else copy it into such a buffer
       commit    tell the engine which buffer it is, and wait for its answer
       take_back the lent buffer is free again: the next version is made elsewhere, since publishing this one failed

   The engine gives each buffer to lorasync_engine_offer as it lies there; the engine's `release` marks it as free. */
#define LORASYNC_IMPLEMENTATION
#ifdef DEMO_CUDA
#ifndef LORASYNC_CUDA
#define LORASYNC_CUDA
#endif
#endif
#include "lorasync.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#ifdef DEMO_CUDA
#include <cuda_runtime_api.h>
#endif

enum {
    RANK        = 8, /* of the adapter */
    WIDTH       = 64,
    NUM_VALUES  = RANK * WIDTH, /* of lora_A, and of lora_B */
    VERSIONS    = 6,
    REFUSED     = 4, /* the engine does not take this one the first time */
    BUFFERS     = 3,
    HEAD        = 4096, /* a page: room for the header in front of the payload */
    BUFFER_SIZE = 65536
};

static const char *const keys[2] = {"base_model.model.model.layers.0.q_proj.lora_A.weight",
                                    "base_model.model.model.layers.0.q_proj.lora_B.weight"};

/* An optimizer step. */
static float value_of(uint64_t version, int i) { return (float)version + (float)i / (float)NUM_VALUES; }

/* -- the pool, which all processes see */

typedef struct slot {
    int           in_use; /* atomic. 1: the engine has it */
    size_t        header_bytes, payload_bytes;
    unsigned char ipc_handle[64]; /* DEMO_CUDA: of the payload */
    char          config_json[1024];
} slot;

typedef struct board {
    slot     slots[BUFFERS];
    int      offered;         /* buffer that commit names */
    uint64_t asked, answered; /* atomic: commits so far, and answers to them; the last commit says 0 to stop */
    int      accepted, stop;
} board;

typedef struct pool {
    char          name[64]; /* for shm_open */
    struct board *board;
    char         *memory;          /* the buffers, one behind the other */
    char         *device[BUFFERS]; /* DEMO_CUDA: payloads, in the process that made them or has opened them */
} pool;

static size_t pool_bytes(void) { return BUFFER_SIZE * (size_t)(1 + BUFFERS); }

static char *header_of(const pool *p, int i) { return p->memory + (size_t)i * BUFFER_SIZE; }

static char *payload_of(const pool *p, int i)
{
    return p->device[i] ? p->device[i] : header_of(p, i) + p->board->slots[i].header_bytes;
}

static void nap(void)
{
    struct timespec t;
    t.tv_sec  = 0;
    t.tv_nsec = 100000;
    nanosleep(&t, NULL);
}

static int pool_open(pool *p)
{
    void *map = MAP_FAILED;
    int   fd;
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "/lorasync-lend-%ld", (long)getpid());
    fd = shm_open(p->name, O_RDWR | O_CREAT | O_EXCL, 0600);
    if (fd < 0) return 0;
    if (ftruncate(fd, (off_t)pool_bytes()) == 0)
        map = mmap(NULL, pool_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (map == MAP_FAILED) shm_unlink(p->name);
    if (map == MAP_FAILED) return 0;
    p->board  = (board *)map;
    p->memory = (char *)map + BUFFER_SIZE;
    return 1;
}

/* In the story: ibv_reg_mr, once for all versions. On a GPU that is where the memory is made, in the root's process. */
static int pool_register(pool *p)
{
#ifdef DEMO_CUDA
    int i;
    for (i = 0; i < BUFFERS; i++) {
        void *made = NULL;
        if (cudaMalloc(&made, 4 << 20) != cudaSuccess) return 0;
        p->device[i] = (char *)made;
        if (cudaIpcGetMemHandle((cudaIpcMemHandle_t *)(void *)p->board->slots[i].ipc_handle, made) != cudaSuccess)
            return 0;
    }
#endif
    return p->board != NULL;
}

/* -- the transport, in the root's process */

typedef struct rdma_engine {
    pool *p;
    int   lent, staged; /* buffers, or -1 */
    int   num_lent, num_copied;
} rdma_engine;

static lorasync_status fail(lorasync_error *err, lorasync_status status, const char *text)
{
    snprintf(err->text, sizeof err->text, "%s", text);
    return err->status = status;
}

/* A buffer that neither the engine nor the session uses, or -1. */
static int find_free(const rdma_engine *e)
{
    int i;
    for (i = 0; i < BUFFERS; i++)
        if (i != e->lent && i != e->staged && !__atomic_load_n(&e->p->board->slots[i].in_use, __ATOMIC_ACQUIRE))
            return i;
    return -1;
}

static lorasync_status rdma_lend(void *user, const lorasync_loan_request *want, lorasync_loan *out, lorasync_error *err)
{
    rdma_engine          *e     = (rdma_engine *)user;
    const lorasync_image *image = want->image;
    int                   i     = find_free(e);
    (void)err;
    if (i < 0 || image->header_bytes > HEAD || image->payload_bytes > BUFFER_SIZE - HEAD) return LORASYNC_NOTHING_NEW;
    if (want->on_device != (e->p->device[i] != NULL)) return LORASYNC_NOTHING_NEW;
    e->p->board->slots[i].header_bytes = image->header_bytes; /* the payload begins behind it */
    out->payload                       = payload_of(e->p, i);
    out->id                            = (uint64_t)i + 1; /* buffers live as long as the transport */
    if (want->on_device) {
        out->reach = LORASYNC_REACH_IPC;
        memcpy(out->ipc_handle, e->p->board->slots[i].ipc_handle, sizeof out->ipc_handle);
    } else {
        out->reach  = LORASYNC_REACH_SHM;
        out->offset = (uint64_t)(payload_of(e->p, i) - (char *)e->p->board);
        snprintf(out->name, sizeof out->name, "%s", e->p->name);
    }
    e->lent = i;
    e->num_lent++;
    return LORASYNC_OK;
}

static void rdma_take_back(void *user, const char *adapter, const lorasync_loan *loan)
{
    (void)adapter, (void)loan;
    ((rdma_engine *)user)->lent = -1;
}

/* What was not made in place is copied into a buffer. */
static int copy_image(rdma_engine *e, const lorasync_image *image, int i)
{
    e->p->board->slots[i].header_bytes = image->header_bytes;
    e->num_copied++;
#ifdef DEMO_CUDA
    return cudaMemcpy(payload_of(e->p, i), image->payload, image->payload_bytes, cudaMemcpyDefault) == cudaSuccess;
#else
    memcpy(payload_of(e->p, i), image->payload, image->payload_bytes);
    return 1;
#endif
}

static lorasync_status rdma_stage(void *user, const lorasync_image *image, lorasync_error *err)
{
    rdma_engine *e = (rdma_engine *)user;
    slot        *to;
    int          i = e->lent;
    if (i < 0 || image->payload != payload_of(e->p, i)) {
        i = find_free(e);
        if (i < 0) return fail(err, LORASYNC_E_BUSY, "the engine holds every buffer");
        if (!copy_image(e, image, i)) return fail(err, LORASYNC_E_CUDA, "cudaMemcpy");
    }
    to                = &e->p->board->slots[i];
    to->payload_bytes = image->payload_bytes;
    if (image->header != header_of(e->p, i)) memcpy(header_of(e->p, i), image->header, image->header_bytes);
    snprintf(to->config_json, sizeof to->config_json, "%s", image->config_json);
    e->staged = i;
    return LORASYNC_OK;
}

static lorasync_status rdma_commit(void *user, const char *adapter, uint64_t version, lorasync_error *err)
{
    rdma_engine *e = (rdma_engine *)user;
    board       *b = e->p->board;
    uint64_t     number;
    int          turns = 0;
    (void)adapter, (void)version;
    if (e->staged < 0) return LORASYNC_OK; /* the engine has it already */
    b->offered = e->staged;
    number     = __atomic_add_fetch(&b->asked, 1, __ATOMIC_RELEASE);
    while (__atomic_load_n(&b->answered, __ATOMIC_ACQUIRE) != number) {
        if (++turns > 200000) return fail(err, LORASYNC_E_IO, "the engine did not answer within 20 seconds");
        nap();
    }
    if (!b->accepted) return fail(err, LORASYNC_E_IO, "the engine refused it");
    if (e->staged == e->lent) e->lent = -1; /* the loan has ended: the engine has it now */
    e->staged = -1;
    return LORASYNC_OK;
}

static void rdma_abort(void *user, const char *adapter, uint64_t version)
{
    (void)adapter, (void)version;
    ((rdma_engine *)user)->staged = -1;
}

/* Without `left_behind` no rank touches the pool any more; with it, it would have to stay registered. */
static void rdma_detach(void *user, const void *session, const char *adapter, int left_behind)
{
    rdma_engine *e = (rdma_engine *)user;
    (void)session, (void)adapter;
    e->lent = -1;
#ifdef DEMO_CUDA
    {
        int i;
        for (i = 0; i < BUFFERS && !left_behind; i++) cudaFree(e->p->device[i]);
    }
#else
    (void)left_behind;
#endif
}

static lorasync_transport rdma_transport(rdma_engine *e)
{
    lorasync_transport t;
    memset(&t, 0, sizeof t);
    t.size      = sizeof t;
    t.name      = "rdma";
    t.user      = e;
    t.stage     = rdma_stage;
    t.commit    = rdma_commit;
    t.abort     = rdma_abort;
    t.lend      = rdma_lend;
    t.take_back = rdma_take_back;
    t.detach    = rdma_detach;
    t.carries   = LORASYNC_CARRIES_ADAPTER | LORASYNC_CARRIES_DEVICE;
    return t;
}

/* -- a rank: holds some rows of each tensor */

static int complain(const lorasync_error *err)
{
    fprintf(stderr, "%s: %s\n", lorasync_status_text(err->status), err->text);
    return 1;
}

static lorasync_box box_of(int b, int rank, int world)
{
    int64_t shape[2];
    shape[0] = b ? WIDTH : RANK;
    shape[1] = b ? RANK : WIDTH;
    return lorasync_shard(lorasync_whole(shape, 2), 0, rank, world);
}

static int set_values(float *where, uint64_t version, int rank, int world)
{
    static float values[2 * NUM_VALUES];
    int          b, i;
    for (b = 0; b < 2; b++) {
        lorasync_box box = box_of(b, rank, world);
        int          row = b ? RANK : WIDTH, first = (int)box.off[0] * row;
        for (i = 0; i < (int)box.len[0] * row; i++) values[b * NUM_VALUES + i] = value_of(version, first + i);
    }
#ifdef DEMO_CUDA
    return cudaMemcpy(where, values, sizeof values, cudaMemcpyDefault) == cudaSuccess;
#else
    memcpy(where, values, sizeof values);
    return 1;
#endif
}

static float *parameters(void)
{
    void *p = NULL;
#ifdef DEMO_CUDA
    if (cudaMalloc(&p, 2 * NUM_VALUES * sizeof(float)) != cudaSuccess) return NULL;
#else
    p = calloc(2 * NUM_VALUES, sizeof(float));
#endif
    return (float *)p;
}

static lorasync_status open_session(const lorasync_comm *comm, rdma_engine *e, float *values, lorasync_session **out,
                                    lorasync_error *err)
{
    static const char *const names[2] = {"model.layers.0.q_proj.lora_A.default.weight",
                                         "model.layers.0.q_proj.lora_B.default.weight"};
    lorasync_desc            d;
    lorasync_transport       t      = rdma_transport(e);
    lorasync_status          status = LORASYNC_OK;
    int                      b;
#ifdef DEMO_CUDA
    lorasync_cuda cuda;
    memset(&cuda, 0, sizeof cuda);
    cuda.keep_on_device = 1;
#endif
    memset(&d, 0, sizeof d);
    d.comm       = comm;
    d.lora_alpha = 16;
#ifdef DEMO_CUDA
    d.cuda = &cuda;
#endif
    status = lorasync_open(&d, out, err);
    for (b = 0; b < 2 && status == LORASYNC_OK; b++) {
        lorasync_piece p;
        memset(&p, 0, sizeof p);
        p.name     = names[b];
        p.dtype    = LORASYNC_F32;
        p.ndim     = 2;
        p.shape[0] = b ? WIDTH : RANK;
        p.shape[1] = b ? RANK : WIDTH;
        p.box      = box_of(b, comm->rank, comm->world);
        p.data     = values + b * NUM_VALUES;
        status     = lorasync_add(*out, &p, err);
    }
    if (status == LORASYNC_OK && comm->rank == 0) status = lorasync_attach(*out, &t, err);
    if (status == LORASYNC_OK) status = lorasync_compile(*out, err);
    return status;
}

/* Returns 1 when something went otherwise than it should. */
static int train(const lorasync_comm *comm, rdma_engine *e, float *values, lorasync_session *session)
{
    uint64_t v;
    for (v = 1; v <= VERSIONS; v++) {
        lorasync_report report;
        lorasync_error  err;
        lorasync_status status;
        if (!set_values(values, v, comm->rank, comm->world)) return 1;
        status = lorasync_sync(session, v, &report, &err);
        if (status < 0 && v != REFUSED) return complain(&err);
        if (comm->rank != 0) continue;
        printf("version %d: ", (int)v);
        if (status < 0) printf("commit failed, the engine goes on with version %d\n", (int)v - 1);
        else if (report.in_place) printf("made in place by %d ranks, ", comm->world);
        else printf("copied by rank 0, ");
        if (status >= 0) printf("lent %d times, copied %d times\n", e->num_lent, e->num_copied);
        fflush(stdout);
    }
    return 0;
}

static int rank_main(lorasync_local *local, int rank, pool *p)
{
    lorasync_comm     comm;
    lorasync_session *session = NULL;
    lorasync_error    err;
    rdma_engine       e;
    float            *values = parameters();
    int               failed = values == NULL;
    memset(&e, 0, sizeof e);
    e.p    = p;
    e.lent = e.staged = -1;
    if (rank == 0 && !failed) failed = !pool_register(p);
    if (failed) fprintf(stderr, "rank %d: no memory\n", rank);
    if (!failed && lorasync_local_join(local, rank, &comm, &err) < 0) failed = complain(&err);
    if (!failed && open_session(&comm, &e, values, &session, &err) < 0) failed = complain(&err);
    if (!failed) failed = train(&comm, &e, values, session);
    lorasync_close(session);
    if (rank == 0) __atomic_store_n(&p->board->stop, 1, __ATOMIC_RELEASE);
    return failed;
}

/* -- the engine's process, at the other end */

typedef struct taken {
    pool *p;
    int   buffer;
} taken;

/* No reader has the buffer any more. */
static void release_buffer(void *user)
{
    taken *t = (taken *)user;
    __atomic_store_n(&t->p->board->slots[t->buffer].in_use, 0, __ATOMIC_RELEASE);
}

/* Where the engine finds the payload of a buffer; NULL when it cannot be opened. */
static char *open_payload(pool *p, int i)
{
#ifdef DEMO_CUDA
    void *opened = NULL;
    if (p->device[i]) return p->device[i];
    if (cudaIpcOpenMemHandle(&opened, *(const cudaIpcMemHandle_t *)(const void *)p->board->slots[i].ipc_handle,
                             cudaIpcMemLazyEnablePeerAccess) != cudaSuccess)
        return NULL;
    p->device[i] = (char *)opened;
#endif
    return payload_of(p, i);
}

static lorasync_status take(lorasync_engine *engine, pool *p, taken *users, lorasync_error *err)
{
    board            *b = p->board;
    slot             *s = &b->slots[b->offered];
    lorasync_delivery d;
    lorasync_status   status;
    memset(&d, 0, sizeof d);
    d.size          = sizeof d;
    d.bytes         = header_of(p, b->offered);
    d.num_bytes     = s->header_bytes;
    d.payload       = open_payload(p, b->offered);
    d.payload_bytes = s->payload_bytes;
    d.config_json   = s->config_json;
    d.release       = release_buffer;
    d.user          = &users[b->offered];
#ifdef DEMO_CUDA
    d.on_device = 1;
#endif
    if (!d.payload) return fail(err, LORASYNC_E_CUDA, "cannot open the payload");
    users[b->offered].p      = p;
    users[b->offered].buffer = b->offered;
    __atomic_store_n(&s->in_use, 1, __ATOMIC_RELEASE);
    status = lorasync_engine_offer(engine, &d, err);
    if (status != LORASYNC_OK) __atomic_store_n(&s->in_use, 0, __ATOMIC_RELEASE);
    return status;
}

/* Every value of what is served, as a model would read it. */
static int check_values(lorasync_engine *engine, uint64_t *out_version)
{
    const lorasync_adapter *a = lorasync_acquire(engine, "default");
    float                   values[NUM_VALUES];
    int                     b, i, wrong = a == NULL;
    for (b = 0; b < 2 && !wrong; b++) {
        const lorasync_tensor *t = lorasync_find(a, keys[b]);
#ifdef DEMO_CUDA
        wrong = cudaMemcpy(values, t->data, sizeof values, cudaMemcpyDefault) != cudaSuccess;
#else
        memcpy(values, t->data, sizeof values);
#endif
        for (i = 0; i < NUM_VALUES; i++) wrong += values[i] != value_of(a->version, i);
    }
    *out_version = a ? a->version : 0;
    lorasync_release(a);
    return !wrong;
}

static int engine_main(pool *p)
{
    lorasync_engine_desc d;
    lorasync_engine     *engine = NULL;
    lorasync_error       err;
    taken                users[BUFFERS];
    uint64_t             answered = 0, version = 0;
    int                  good = 1, refuse = 1;
    memset(&d, 0, sizeof d);
    d.offers_only = 1;
#ifdef DEMO_CUDA
    d.accept_device = 1;
#endif
    if (lorasync_engine_open(&d, &engine, &err) < 0) return complain(&err);
    while (!__atomic_load_n(&p->board->stop, __ATOMIC_ACQUIRE)) {
        if (__atomic_load_n(&p->board->asked, __ATOMIC_ACQUIRE) == answered) {
            nap();
            continue;
        }
        if (version + 1 == REFUSED && refuse) {
            printf("engine: refuses version %d\n", REFUSED);
            refuse             = 0;
            p->board->accepted = 0;
        } else {
            p->board->accepted = take(engine, p, users, &err) == LORASYNC_OK;
            if (!p->board->accepted) complain(&err);
            good = good && p->board->accepted && check_values(engine, &version);
            printf("engine: serves version %d, %s\n", (int)version, good ? "every value as trained" : "WRONG");
        }
        fflush(stdout);
        __atomic_store_n(&p->board->answered, ++answered, __ATOMIC_RELEASE);
    }
    lorasync_engine_close(engine);
    return !good;
}

int main(int argc, char **argv)
{
    int             world = argc > 1 ? atoi(argv[1]) : 4, rank, failed = 0, status;
    pool            p;
    pid_t           pids[64];
    lorasync_local *local = NULL;
    lorasync_error  err;
    if (world < 1 || world > 64) {
        fprintf(stderr, "RANKS is 1 to 64\n");
        return 1;
    }
    if (!pool_open(&p)) {
        perror("shared memory");
        return 1;
    }
    if (lorasync_local_open(world, &local, &err) < 0) failed = complain(&err);
    fflush(NULL);
    for (rank = 0; rank < world && !failed; rank++) {
        pids[rank] = fork(); /* before this process touches a GPU */
        if (pids[rank] == 0) _exit(rank_main(local, rank, &p));
    }
    if (!failed) failed = engine_main(&p);
    for (rank = 0; local && rank < world; rank++)
        if (waitpid(pids[rank], &status, 0) != pids[rank] || !WIFEXITED(status) || WEXITSTATUS(status) != 0) failed = 1;
    lorasync_local_close(local);
    munmap(p.board, pool_bytes());
    shm_unlink(p.name);
    return failed;
}
