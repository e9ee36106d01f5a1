/* A communicator of the host's own: MPI. The first part is all that a trainer needs; the second gathers a toy adapter
   and checks it.

   compile   mpicc -I. -o mpi_comm examples/mpi_comm.c -lm           (from the folder that holds lorasync.h)
   run       mpirun -n 4 ./mpi_comm                               (--no-direct: messages even between ranks of one host)
   output    mpi_comm: 4 ranks, 8 tensors, 98304 bytes, 3 versions, every byte right

   Works with any MPI of version 3 or later. No call blocks: everything is started with an I-call and then tested until
   it is done or the deadline has passed. */
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"

#define OMPI_SKIP_MPICXX 1 /* not the C++ classes of old: C is enough */
#include <mpi.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- the communicator */

/* MPI counts in int, so longer messages go in parts of this size; both sides cut alike, and MPI keeps their order. */
#ifndef MPI_PART
#define MPI_PART ((size_t)1 << 30)
#endif
enum {
    MAX_REQUESTS = 4096
};

typedef struct mpi_user {
    MPI_Comm    comm; /* a duplicate: its messages cannot be mistaken for the host's own */
    MPI_Request requests[MAX_REQUESTS];
    int         num;
} mpi_user;

static lorasync_status mpi_failed(lorasync_error *err, lorasync_status status, const char *what)
{
    err->status = status;
    snprintf(err->text, sizeof err->text, "MPI: %s", what);
    return status;
}

/* Tests until all requests are done. After a failure they are still under way, on memory that is about to be freed:
   mpi_abort must follow, which the library calls. */
static lorasync_status mpi_finish(mpi_user *u, int result, int timeout_ms, lorasync_error *err)
{
    double deadline = MPI_Wtime() + timeout_ms / 1000.0;
    int    done     = 0;
    while (result == MPI_SUCCESS && !done) {
        result = MPI_Testall(u->num, u->requests, &done, MPI_STATUSES_IGNORE);
        if (result == MPI_SUCCESS && !done && MPI_Wtime() > deadline)
            return mpi_failed(err, LORASYNC_E_TIMEOUT, "a rank did not answer before the deadline");
        if (!done) sched_yield();
    }
    return result == MPI_SUCCESS ? LORASYNC_OK : mpi_failed(err, LORASYNC_E_COMM, "a call failed");
}

static lorasync_status mpi_all_gather(void *user, const void *in, void *out, size_t num_bytes, int timeout_ms,
                                      lorasync_error *err)
{
    mpi_user *u = (mpi_user *)user;
    if (num_bytes > MPI_PART)
        return mpi_failed(err, LORASYNC_E_COMM, "an all_gather of more than MPI_PART bytes per rank"); /* the library's
                                                                                                          are small */
    u->num = 1;
    return mpi_finish(u,
                      MPI_Iallgather(in, (int)num_bytes, MPI_BYTE, out, (int)num_bytes, MPI_BYTE, u->comm, u->requests),
                      timeout_ms, err);
}

/* Starts one message, in parts. */
static int mpi_start(mpi_user *u, const lorasync_message *m, int is_send)
{
    int    result = MPI_SUCCESS;
    size_t at, n;
    for (at = 0; at < m->num_bytes && result == MPI_SUCCESS; at += n) {
        n = m->num_bytes - at < MPI_PART ? m->num_bytes - at : MPI_PART;
        if (u->num == MAX_REQUESTS) return MPI_ERR_OTHER;
        if (is_send)
            result = MPI_Isend((char *)m->data + at, (int)n, MPI_BYTE, m->peer, 0, u->comm, &u->requests[u->num++]);
        else result = MPI_Irecv((char *)m->data + at, (int)n, MPI_BYTE, m->peer, 0, u->comm, &u->requests[u->num++]);
    }
    return result;
}

static lorasync_status mpi_exchange(void *user, const lorasync_message *sends, size_t num_sends,
                                    const lorasync_message *receives, size_t num_receives, int timeout_ms,
                                    lorasync_error *err)
{
    mpi_user *u      = (mpi_user *)user;
    int       result = MPI_SUCCESS;
    size_t    i;
    u->num = 0;
    for (i = 0; i < num_receives && result == MPI_SUCCESS; i++) result = mpi_start(u, &receives[i], 0);
    for (i = 0; i < num_sends && result == MPI_SUCCESS; i++) result = mpi_start(u, &sends[i], 1);
    return mpi_finish(u, result, timeout_ms, err);
}

/* MPI has no gentler way to wake the other ranks. A host that wants to go on without MPI leaves `abort` out and exits
   by its own rules. */
static void mpi_abort(void *user, const char *why)
{
    fprintf(stderr, "lorasync gave up its communicator: %s\n", why);
    MPI_Abort(((mpi_user *)user)->comm, 1);
}

/* Collective. End with MPI_Comm_free(&u->comm), after the session is closed. */
static int mpi_comm_open(MPI_Comm parent, mpi_user *u, lorasync_comm *out)
{
    memset(out, 0, sizeof *out);
    u->num = 0;
    if (MPI_Comm_dup(parent, &u->comm) != MPI_SUCCESS) return 0;
    MPI_Comm_set_errhandler(u->comm, MPI_ERRORS_RETURN);
    MPI_Comm_rank(u->comm, &out->rank);
    MPI_Comm_size(u->comm, &out->world);
    out->size       = sizeof *out;
    out->user       = u;
    out->all_gather = mpi_all_gather;
    out->exchange   = mpi_exchange;
    out->abort      = mpi_abort;
    return 1;
}

/* ---- a toy trainer: four layers, every tensor cut into rows over all ranks */

enum {
    LAYERS   = 4,
    R        = 16,
    WIDTH    = 512,
    NUM      = 2 * LAYERS,
    VERSIONS = 3
};

static float value(int version, int tensor, int64_t element)
{
    return (float)(version * 1000 + tensor * 100) + (float)(element % 97) / 8.0f;
}

static int64_t rows_of(int t) { return t % 2 ? WIDTH / 2 : R; }
static int64_t columns_of(int t) { return t % 2 ? R : WIDTH; }

static void train(int version, const lorasync_piece *p, int t)
{
    int64_t first = p->box.off[0] * p->shape[1], num = p->box.len[0] * p->shape[1], i;
    for (i = 0; i < num; i++) ((float *)p->data)[i] = value(version, t, first + i);
}

/* On the root: 1 if every byte of the image is right. */
static int image_is_right(const lorasync_image *image, char (*names)[100], int version)
{
    static float    values[R * WIDTH];
    static uint16_t wire[R * WIDTH];
    int             t, right = image->num_tensors == NUM;
    for (t = 0; t < NUM && right; t++) {
        lorasync_name          name;
        const lorasync_tensor *found;
        int64_t                n = rows_of(t) * columns_of(t), i;
        lorasync_parse_name(names[t], &name, NULL);
        found = lorasync_image_find(image, name.key);
        for (i = 0; i < n; i++) values[i] = value(version, t, i);
        lorasync_convert(wire, LORASYNC_BF16, values, LORASYNC_F32, (size_t)n, NULL);
        right = found && found->num_bytes == 2 * (size_t)n && memcmp(found->data, wire, 2 * (size_t)n) == 0;
    }
    return right;
}

static int run(const lorasync_comm *comm, int no_direct)
{
    lorasync_piece    pieces[NUM];
    char              names[NUM][100];
    lorasync_desc     d;
    lorasync_session *s = NULL;
    lorasync_report   report;
    lorasync_error    err;
    int               t, version, right = 1;
    memset(&d, 0, sizeof d);
    memset(pieces, 0, sizeof pieces);
    memset(&report, 0, sizeof report);
    d.comm       = comm;
    d.wire_dtype = LORASYNC_BF16;
    d.lora_alpha = 32;
    d.timeout_ms = 10000;
    d.no_direct  = no_direct;
    if (lorasync_open(&d, &s, &err) < 0) return fprintf(stderr, "open: %s\n", err.text), 1;
    for (t = 0; t < NUM; t++) {
        lorasync_piece *p = &pieces[t];
        snprintf(names[t], sizeof names[t], "model.layers.%d.self_attn.q_proj.lora_%c.default.weight", t / 2,
                 t % 2 ? 'B' : 'A');
        p->name     = names[t];
        p->dtype    = LORASYNC_F32;
        p->ndim     = 2;
        p->shape[0] = rows_of(t);
        p->shape[1] = columns_of(t);
        p->box      = lorasync_shard(lorasync_whole(p->shape, 2), 0, comm->rank, comm->world);
        p->data     = malloc((size_t)(p->box.len[0] * p->shape[1]) * sizeof(float) + 1);
        lorasync_add(s, p, NULL); /* an error is remembered: lorasync_compile reports it */
    }
    if (lorasync_compile(s, &err) < 0) return fprintf(stderr, "rank %d: compile: %s\n", comm->rank, err.text), 1;
    for (version = 1; version <= VERSIONS; version++) {
        for (t = 0; t < NUM; t++) train(version, &pieces[t], t);
        if (lorasync_sync(s, (uint64_t)version, &report, &err) < 0)
            return fprintf(stderr, "rank %d: sync: %s\n", comm->rank, err.text), 1;
        if (comm->rank == 0) right = right && image_is_right(lorasync_session_image(s), names, version);
    }
    if (comm->rank == 0)
        printf("mpi_comm: %d ranks, %d tensors, %d bytes, %d versions, %s\n", comm->world, NUM,
               (int)report.payload_bytes, VERSIONS, right ? "every byte right" : "WRONG BYTES");
    lorasync_close(s);
    for (t = 0; t < NUM; t++) free(pieces[t].data);
    return !right;
}

int main(int argc, char **argv)
{
    static mpi_user user;
    lorasync_comm   comm;
    int             failed = 1;
    MPI_Init(&argc, &argv);
    if (mpi_comm_open(MPI_COMM_WORLD, &user, &comm)) {
        failed = run(&comm, argc > 1 && strcmp(argv[1], "--no-direct") == 0);
        MPI_Comm_free(&user.comm);
    }
    MPI_Finalize();
    return failed;
}
