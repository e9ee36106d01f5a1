/* The part of NCCL that lorasync.h calls, for ranks that are threads of one process: include it behind fake_cuda.h and
   link no libnccl.

   A group becomes one item on the stream. When the stream reaches it, its sends lie open for their receivers; the item
   is done when all of its receives have copied and all of its sends were taken. Sizes that do not match never end, as
   in NCCL, and are counted. */
#ifndef LORASYNC_TEST_FAKE_NCCL_H
#define LORASYNC_TEST_FAKE_NCCL_H

#include <nccl.h>

enum {
    FAKE_RANKS = 16,
    FAKE_GROUP = 64
};

typedef struct fake_nccl_rank { /* set by tests, for one rank of every communicator */
    int          in_progress;   /* "in progress" answers behind each call of a non-blocking communicator */
    int          hang_at;       /* the nth group or collective never ends */
    int          broken_at;     /* at the nth, the communicator gets the error `broken` and the work never ends */
    ncclResult_t broken;
    int          hang_init, hang_finalize;
    ncclResult_t fail_init, fail_call; /* what ncclCommInitRankConfig, every ncclSend and ncclAllGather answer; 0:
                                          success */
    int          delay_us;             /* before each call */
} fake_nccl_rank;

typedef struct fake_nccl_state {
    fake_nccl_rank rank[FAKE_RANKS];
    int            peers_notice; /* 1: the others get ncclRemoteError when a rank aborts */
    ncclResult_t   fail_id;
    /* looked at */
    long live, aborts, destroys, mismatches, misuses, calls;
    int  next_id;
} fake_nccl_state;

static fake_nccl_state fake_nccl;

typedef struct fake_op {
    int           kind; /* 0 send, 1 receive, 2 all_gather */
    int           peer, done;
    const void   *src;
    void         *dst;
    size_t        num_bytes;
    unsigned long number; /* of the message between these two, or of the collective */
} fake_op;

typedef struct fake_group {
    struct ncclComm *comm;
    cudaStream_t     stream;
    fake_op          ops[FAKE_GROUP];
    int              num, hangs, numbered;
    int              turn; /* among the comm's calls, whatever their streams; 0: recorded in a graph */
} fake_group;

/* What the ranks of one unique id share. */
typedef struct fake_world {
    int                id, size, joined, left;
    struct ncclComm   *comms[FAKE_RANKS];
    struct fake_world *next;
} fake_world;

struct ncclComm {
    fake_world   *world;
    int           rank, size, device, blocking, polls, calls, hang, turns, ended;
    ncclResult_t  broken;
    unsigned long sent[FAKE_RANKS], received[FAKE_RANKS], collectives;
    fake_group   *active; /* at the head of its stream: its sends and contributions are open */
};

static fake_world           *fake_worlds;
static __thread int          fake_depth;
static __thread ncclResult_t fake_group_result;
static __thread fake_group   fake_groups[4];
static __thread int          fake_num_groups;

static fake_nccl_rank *fake_knobs(const struct ncclComm *c) { return &fake_nccl.rank[c->rank]; }

TEST_UNUSED static void fake_misuse(const char *what)
{
    fake_nccl.misuses++;
    fprintf(stderr, "fake NCCL: %s\n", what);
}

/* -- communicators */

ncclResult_t ncclGetUniqueId(ncclUniqueId *out)
{
    pthread_mutex_lock(&fake_lock);
    memset(out, 0, sizeof *out);
    fake_nccl.next_id++;
    memcpy(out->internal + 100, &fake_nccl.next_id, sizeof fake_nccl.next_id);
    pthread_mutex_unlock(&fake_lock);
    return fake_nccl.fail_id;
}

/* The world of an id, made by the first who comes. */
static fake_world *fake_world_of(const ncclUniqueId *id, int size) /* locked */
{
    fake_world *w;
    int         number;
    memcpy(&number, id->internal + 100, sizeof number);
    for (w = fake_worlds; w && w->id != number; w = w->next) {}
    if (w) return w;
    w           = (fake_world *)calloc(1, sizeof *w);
    w->id       = number;
    w->size     = size;
    w->next     = fake_worlds;
    fake_worlds = w;
    return w;
}

static ncclResult_t fake_state(struct ncclComm *c) /* locked */
{
    if (c->broken != ncclSuccess) return c->broken;
    if (c->hang || c->world->joined < c->size) return ncclInProgress;
    if (c->polls > 0) {
        c->polls--;
        return ncclInProgress;
    }
    return ncclSuccess;
}

static ncclResult_t fake_init(ncclComm_t *out, int size, const ncclUniqueId *id, int rank, int blocking)
{
    struct ncclComm *c;
    ncclResult_t     r;
    *out = NULL;
    if (fake_nccl.rank[rank].fail_init != ncclSuccess) return fake_nccl.rank[rank].fail_init;
    c = (struct ncclComm *)calloc(1, sizeof *c);
    pthread_mutex_lock(&fake_lock);
    c->world    = fake_world_of(id, size);
    c->rank     = rank;
    c->size     = size;
    c->device   = fake_device;
    c->blocking = blocking;
    c->polls    = fake_knobs(c)->in_progress;
    c->hang     = fake_knobs(c)->hang_init;
    if (c->world->size != size || c->world->comms[rank]) fake_misuse("a rank joins twice, or with another size");
    c->world->comms[rank] = c;
    if (!c->hang) c->world->joined++;
    fake_nccl.live++;
    r = ncclInProgress;
    while (blocking && (r = fake_state(c)) == ncclInProgress) {
        pthread_mutex_unlock(&fake_lock);
        sched_yield();
        pthread_mutex_lock(&fake_lock);
    }
    pthread_mutex_unlock(&fake_lock);
    *out = c;
    return r;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int size, ncclUniqueId id, int rank, ncclConfig_t *config)
{
    if (config->magic != 0xcafebeef || config->size != sizeof *config) return ncclInvalidArgument;
    return fake_init(out, size, &id, rank, config->blocking != 0);
}

ncclResult_t ncclCommInitRank(ncclComm_t *out, int size, ncclUniqueId id, int rank)
{
    return fake_init(out, size, &id, rank, 1);
}

static void fake_comm_free(struct ncclComm *c) /* locked */
{
    fake_world  *w = c->world;
    fake_world **at;
    w->comms[c->rank] = NULL;
    w->left++;
    if (w->left == w->size) {
        for (at = &fake_worlds; *at != w; at = &(*at)->next) {}
        *at = w->next;
        free(w);
    }
    fake_nccl.live--;
    free(c);
}

/* The kernels of this rank end; those of others wait on. */
ncclResult_t ncclCommAbort(ncclComm_t c)
{
    struct CUstream_st *s;
    int                 r;
    pthread_mutex_lock(&fake_lock);
    fake_nccl.aborts++;
    for (r = 0; r < c->size && fake_nccl.peers_notice; r++)
        if (c->world->comms[r] && r != c->rank && c->world->comms[r]->broken == ncclSuccess)
            c->world->comms[r]->broken = ncclRemoteError;
    for (s = fake_cuda.streams; s; s = s->next) {
        fake_item *item;
        for (item = s->head; item; item = item->next)
            if (item->end && item->blob && item->blob_bytes == sizeof(fake_group) &&
                ((fake_group *)item->blob)->comm == c)
                ((fake_group *)item->blob)->comm = NULL;
    }
    fake_comm_free(c);
    pthread_mutex_unlock(&fake_lock);
    return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t c)
{
    pthread_mutex_lock(&fake_lock);
    c->polls = fake_knobs(c)->in_progress;
    c->hang  = fake_knobs(c)->hang_finalize;
    pthread_mutex_unlock(&fake_lock);
    return c->blocking ? ncclSuccess : ncclInProgress;
}

ncclResult_t ncclCommDestroy(ncclComm_t c)
{
    pthread_mutex_lock(&fake_lock);
    if (c->broken != ncclSuccess) fake_misuse("a broken communicator was destroyed");
    if (c->active) fake_misuse("a communicator was destroyed while it worked");
    fake_nccl.destroys++;
    fake_comm_free(c);
    pthread_mutex_unlock(&fake_lock);
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *out)
{
    pthread_mutex_lock(&fake_lock);
    *out = fake_state(c);
    pthread_mutex_unlock(&fake_lock);
    return ncclSuccess;
}

ncclResult_t ncclCommCount(const ncclComm_t c, int *out) { return *out = c->size, ncclSuccess; }
ncclResult_t ncclCommUserRank(const ncclComm_t c, int *out) { return *out = c->rank, ncclSuccess; }
ncclResult_t ncclCommCuDevice(const ncclComm_t c, int *out) { return *out = c->device, ncclSuccess; }

const char *ncclGetErrorString(ncclResult_t r)
{
    return r == ncclSystemError   ? "unhandled system error"
           : r == ncclRemoteError ? "remote process exited or there was a network error"
                                  : "fake error";
}

const char *ncclGetLastError(ncclComm_t c) { return c && c->broken != ncclSuccess ? "the fake broke it" : ""; }

/* -- groups */

static fake_op *fake_partner(const struct ncclComm *c, const fake_op *op) /* the open send for a receive */
{
    struct ncclComm *from = c->world->comms[op->peer];
    int              i;
    for (i = 0; from && from->active && i < from->active->num; i++) {
        fake_op *s = &from->active->ops[i];
        if (s->kind == 0 && s->peer == c->rank && s->number == op->number && !s->done) return s;
    }
    return NULL;
}

static void fake_run_receive(const struct ncclComm *c, fake_op *op)
{
    fake_op *s = fake_partner(c, op);
    if (!s) return;
    if (s->num_bytes != op->num_bytes) {
        if (s->number == op->number) fake_nccl.mismatches++, s->number = op->number = ~0ul; /* once, and never again */
        return;
    }
    memcpy(fake_bytes(op->dst), fake_bytes(s->src), op->num_bytes);
    s->done = op->done = 1;
}

/* Takes what others have contributed; their part is done when all have taken it. done counts those. */
static void fake_run_gather(const struct ncclComm *c, fake_op *op, unsigned *taken)
{
    int r, i;
    for (r = 0; r < c->size; r++) {
        struct ncclComm *from = c->world->comms[r];
        if (*taken & 1u << r) continue;
        for (i = 0; from && from->active && i < from->active->num; i++) {
            fake_op *s = &from->active->ops[i];
            if (s->kind != 2 || s->number != op->number) continue;
            if (s->num_bytes != op->num_bytes) {
                fake_nccl.mismatches++;
                op->number = ~0ul;
                return;
            }
            memmove((char *)fake_bytes(op->dst) + (size_t)r * op->num_bytes, fake_bytes(s->src), op->num_bytes);
            *taken |= 1u << r;
            s->done++;
        }
    }
}

/* When it is its turn: a group in a graph has other numbers at each launch. */
static void fake_number(fake_group *g)
{
    struct ncclComm *c = g->comm;
    int              i;
    for (i = 0; i < g->num && !g->numbered; i++) {
        fake_op *op = &g->ops[i];
        op->number  = op->kind == 0 ? c->sent[op->peer]++ : op->kind == 1 ? c->received[op->peer]++ : c->collectives++;
    }
    g->numbered = 1;
}

static int fake_run_group(fake_item *item)
{
    fake_group *g = (fake_group *)item->blob;
    int         i, left = 0;
    if (!g->comm) return 1; /* aborted */
    if (g->hangs || (g->comm->active && g->comm->active != g) || (g->turn && g->turn != g->comm->ended + 1)) return 0;
    g->comm->active = g;
    fake_number(g);
    for (i = 0; i < g->num; i++) {
        fake_op *op = &g->ops[i];
        if (op->kind == 1 && !op->done) fake_run_receive(g->comm, op);
        if (op->kind == 2) {
            unsigned taken = (unsigned)op->peer;
            fake_run_gather(g->comm, op, &taken);
            op->peer = (int)taken;
            left |= op->done < g->comm->size || op->peer != (1 << g->comm->size) - 1;
        } else {
            left |= !op->done;
        }
    }
    return !left;
}

static void fake_end_group(fake_item *item)
{
    fake_group *g = (fake_group *)item->blob;
    if (!g->comm || g->comm->active != g) return;
    g->comm->active = NULL;
    if (g->turn) g->comm->ended = g->turn;
}

static ncclResult_t fake_enqueue_group(fake_group *g)
{
    struct ncclComm *c = g->comm;
    fake_item        item;
    fake_nccl_rank  *k = fake_knobs(c);
    if (k->delay_us) usleep((useconds_t)k->delay_us);
    pthread_mutex_lock(&fake_lock);
    fake_nccl.calls++;
    c->calls++;
    c->polls = c->blocking ? 0 : k->in_progress;
    g->turn  = fake_stream(g->stream)->capture ? 0 : ++c->turns;
    g->hangs = k->hang_at == c->calls || k->broken_at == c->calls;
    if (k->broken_at == c->calls) c->broken = k->broken;
    memset(&item, 0, sizeof item);
    item.run        = fake_run_group;
    item.end        = fake_end_group;
    item.blob       = g;
    item.blob_bytes = sizeof *g;
    fake_enqueue(g->stream, &item);
    pthread_mutex_unlock(&fake_lock);
    return c->blocking ? ncclSuccess : ncclInProgress;
}

ncclResult_t ncclGroupStart(void)
{
    fake_depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void)
{
    ncclResult_t r = fake_group_result, one;
    int          i;
    if (fake_depth == 0) {
        fake_misuse("ncclGroupEnd without ncclGroupStart");
        return ncclInvalidUsage;
    }
    if (--fake_depth) return r;
    for (i = 0; i < fake_num_groups && (r == ncclSuccess || r == ncclInProgress); i++) {
        one = fake_enqueue_group(&fake_groups[i]);
        if (one != ncclSuccess) r = one;
    }
    fake_num_groups   = 0;
    fake_group_result = ncclSuccess;
    return r;
}

static ncclResult_t fake_add(struct ncclComm *c, cudaStream_t stream, const fake_op *op)
{
    fake_group  *g = NULL;
    ncclResult_t r;
    int          i;
    pthread_mutex_lock(&fake_lock);
    r = c->blocking                ? c->broken
        : c->broken != ncclSuccess ? c->broken
        : c->hang || c->polls > 0  ? ncclInvalidArgument
                                   : ncclSuccess;
    if (r == ncclInvalidArgument) fake_misuse("a call before the one in front of it has settled");
    if (fake_device != c->device) fake_misuse("another device is current");
    if (op->kind != 2 && (op->peer < 0 || op->peer >= c->size || op->peer == c->rank || op->num_bytes == 0))
        fake_misuse("a peer out of range, or an empty message");
    pthread_mutex_unlock(&fake_lock);
    if (r == ncclSuccess) r = fake_knobs(c)->fail_call;
    if (r != ncclSuccess) {
        fake_group_result = r;
        return r;
    }
    for (i = 0; i < fake_num_groups; i++)
        if (fake_groups[i].comm == c && fake_groups[i].stream == stream) g = &fake_groups[i];
    if (!g) {
        g = &fake_groups[fake_num_groups++];
        memset(g, 0, sizeof *g);
        g->comm   = c;
        g->stream = stream;
    }
    g->ops[g->num++] = *op;
    return ncclSuccess;
}

static fake_op fake_op_of(int kind, int peer, const void *src, void *dst, size_t num_bytes, ncclDataType_t type)
{
    fake_op op;
    memset(&op, 0, sizeof op);
    op.kind      = kind;
    op.peer      = peer;
    op.src       = src;
    op.dst       = dst;
    op.num_bytes = num_bytes;
    if (type != ncclUint8) fake_misuse("not bytes");
    return op;
}

ncclResult_t ncclSend(const void *data, size_t num, ncclDataType_t type, int peer, ncclComm_t c, cudaStream_t stream)
{
    fake_op op = fake_op_of(0, peer, data, NULL, num, type);
    if (!fake_depth) fake_misuse("a send without a group");
    return fake_add(c, stream, &op);
}

ncclResult_t ncclRecv(void *data, size_t num, ncclDataType_t type, int peer, ncclComm_t c, cudaStream_t stream)
{
    fake_op op = fake_op_of(1, peer, NULL, data, num, type);
    if (!fake_depth) fake_misuse("a receive without a group");
    return fake_add(c, stream, &op);
}

ncclResult_t ncclAllGather(const void *send, void *receive, size_t num, ncclDataType_t type, ncclComm_t c,
                           cudaStream_t stream)
{
    fake_op      op = fake_op_of(2, 0, send, receive, num, type);
    ncclResult_t r;
    ncclGroupStart();
    r = fake_add(c, stream, &op);
    if (r != ncclSuccess) {
        ncclGroupEnd();
        return r;
    }
    return ncclGroupEnd();
}

TEST_UNUSED static void fake_nccl_reset(void)
{
    int id = fake_nccl.next_id;
    memset(&fake_nccl, 0, sizeof fake_nccl);
    fake_nccl.next_id = id;
}

#endif
