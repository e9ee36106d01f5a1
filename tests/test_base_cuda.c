/* Base weights in (fake) device memory: over NCCL and over the host, with the image on the host and on the device. */
#if defined(__has_include)
#if __has_include(<cuda_runtime_api.h>) && __has_include(<nccl.h>)
#define HAVE_CUDA 1
#endif
#endif

#ifdef HAVE_CUDA
#define LORASYNC_CUDA
#define LORASYNC_NCCL
#endif
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include "test.h"

#ifndef HAVE_CUDA
int main(void)
{
    printf("skip test_base_cuda: no cuda_runtime_api.h and nccl.h here\n");
    test_skipped++;
    return test_summary("test_base_cuda");
}
#else

#include "fake_cuda.h"
#include "fake_nccl.h"
#include "ranks.h"
#include "pieces.h"

enum {
    TENSORS   = 24,
    ROWS      = 32,
    COLUMNS   = 16,
    MAX_WORLD = 4
};

typedef struct device_base {
    int             nccl, keep_on_device, spoil; /* the tensor that gets a NaN at version 2; -1: none */
    float           truth[TENSORS][ROWS * COLUMNS];
    int             seen[TENSORS], wrong[MAX_WORLD], num_buckets, num_aborts;
    uint64_t        version;
    lorasync_status status[MAX_WORLD];
    char            text[MAX_WORLD][512];
} device_base;

static device_base u;

static lorasync_status look(void *user, const lorasync_image *image, lorasync_error *err)
{
    char  *copy = (char *)malloc(image->payload_bytes);
    size_t i;
    int    k;
    (void)user, (void)err;
    if (!!image->on_device != !!u.keep_on_device) u.wrong[0] |= 1;
    if (image->on_device) cudaMemcpy(copy, image->payload, image->payload_bytes, cudaMemcpyDefault);
    else memcpy(copy, image->payload, image->payload_bytes);
    for (i = 0; i < image->num_tensors; i++) {
        if (sscanf(image->tensors[i].name, "model.layers.%d.weight", &k) != 1 ||
            image->tensors[i].num_bytes != sizeof u.truth[0])
            u.wrong[0] |= 2;
        else if (memcmp(copy + image->tensors[i].offset, u.truth[k], sizeof u.truth[0]) != 0) u.wrong[0] |= 4;
        else u.seen[k]++;
    }
    u.num_buckets = (int)image->num_buckets;
    free(copy);
    return LORASYNC_OK;
}

static lorasync_status take(void *user, const char *adapter, uint64_t version, lorasync_error *err)
{
    (void)user, (void)adapter, (void)err;
    u.version = version;
    return LORASYNC_OK;
}

static void forget(void *user, const char *adapter, uint64_t version)
{
    (void)user, (void)adapter, (void)version;
    u.num_aborts++;
}

static lorasync_status join_nccl(rank_context *c, lorasync_comm *out, lorasync_error *err)
{
    char               ids[8 * 128], id[128] = {0};
    lorasync_nccl_desc n;
    if (c->rank == 0 && lorasync_nccl_unique_id(id, err) < 0) return err->status;
    if (c->comm.all_gather(c->comm.user, id, ids, sizeof id, 20000, err) < 0) return err->status;
    memset(&n, 0, sizeof n);
    n.unique_id = ids, n.rank = c->rank, n.world = c->world, n.timeout_ms = test_ms(20000);
    return lorasync_nccl_open(&n, out, err);
}

static void device_rank(rank_context *c)
{
    lorasync_stream_desc d;
    lorasync_cuda        cuda;
    lorasync_comm        comm = c->comm;
    lorasync_transport   t;
    lorasync_stream     *s = NULL;
    lorasync_stream_info info;
    lorasync_error       err;
    lorasync_status      status = LORASYNC_OK;
    void                *data[TENSORS];
    char                 word[96];
    size_t               num_bytes = 0;
    float                spoilt;
    int                  i;
    memset(&d, 0, sizeof d), memset(&cuda, 0, sizeof cuda), memset(&t, 0, sizeof t);
    if (u.nccl) status = join_nccl(c, &comm, &err);
    cudaStreamCreateWithFlags(&cuda.stream, cudaStreamNonBlocking);
    cuda.keep_on_device = u.keep_on_device;
    d.comm = &comm, d.cuda = &cuda, d.bucket_bytes = 5 * sizeof u.truth[0], d.timeout_ms = test_ms(20000);
    if (status == LORASYNC_OK) status = lorasync_stream_open(&d, &s, &err);
    for (i = 0; i < TENSORS; i++) {
        lorasync_piece p;
        char           name[64];
        snprintf(name, sizeof name, "model.layers.%d.weight", i);
        p         = shard_piece(name, 2, ROWS, COLUMNS, c->rank, c->world, NULL);
        num_bytes = (size_t)(p.box.len[0] * COLUMNS) * sizeof(float);
        cudaMalloc(&data[i], num_bytes + 1);
        cudaMemcpy(data[i], &u.truth[i][p.box.off[0] * COLUMNS], num_bytes, cudaMemcpyDefault);
        p.data = data[i];
        if (status == LORASYNC_OK) status = lorasync_stream_add(s, &p, &err);
    }
    t.size = sizeof t, t.name = "engine", t.stage = look, t.commit = take, t.abort = forget, t.takes_buckets = 1;
    if (status == LORASYNC_OK) status = lorasync_stream_attach(s, &t, &err);
    if (status == LORASYNC_OK) status = lorasync_stream_compile(s, &err);
    if (status == LORASYNC_OK) status = lorasync_stream_sync(s, 1, NULL, &err);
    if (status == LORASYNC_OK) {
        lorasync_stream_get_info(s, &info);
        if (info.direct || (c->rank && info.image_bytes) || info.num_buckets != 5) u.wrong[c->rank] |= 8;
        if (u.spoil >= 0) {
            spoilt = (float)(1e300 * 1e300);
            if (c->rank == c->world - 1)
                cudaMemcpy((char *)data[u.spoil] + num_bytes - 4, &spoilt, 4, cudaMemcpyDefault);
            snprintf(word, sizeof word, "model.layers.%d.weight: NaN or Inf at element [31", u.spoil);
            if (lorasync_stream_sync(s, 2, NULL, &err) != LORASYNC_E_NAN || !strstr(err.text, word))
                u.wrong[c->rank] |= 16;
            if (c->rank == c->world - 1)
                cudaMemcpy((char *)data[u.spoil] + num_bytes - 4, &u.truth[u.spoil][ROWS * COLUMNS - 1], 4,
                           cudaMemcpyDefault);
            if (u.version != 1 && c->rank == 0) u.wrong[0] |= 32;
        }
        status = lorasync_stream_sync(s, 2, NULL, &err);
    }
    u.status[c->rank] = status;
    snprintf(u.text[c->rank], 512, "%s", status < 0 ? err.text : "");
    lorasync_stream_close(s);
    for (i = 0; i < TENSORS; i++) cudaFree(data[i]);
    cudaStreamDestroy(cuda.stream);
    if (u.nccl) lorasync_nccl_close(&comm);
}

static void run_device(int world, int nccl, int keep_on_device, int spoil)
{
    int i, k;
    fake_cuda_reset();
    fake_nccl_reset();
    memset(&u, 0, sizeof u);
    u.nccl = nccl, u.keep_on_device = keep_on_device, u.spoil = spoil;
    for (k = 0; k < TENSORS; k++)
        for (i = 0; i < ROWS * COLUMNS; i++) u.truth[k][i] = (float)(k * 1000 + i);
    run_threads(world, device_rank, NULL);
    for (i = 0; i < world; i++) {
        if (u.status[i] < 0)
            fprintf(stderr, "world %d nccl %d keep %d spoil %d, rank %d: %s\n", world, nccl, keep_on_device, spoil, i,
                    u.text[i]);
        CHECK_EQ(u.status[i], LORASYNC_OK);
        CHECK_EQ(u.wrong[i], 0);
    }
    for (k = 0; k < TENSORS; k++) CHECK_EQ(u.seen[k], 2 + (spoil >= 0 && k / 5 < spoil / 5));
    CHECK_EQ(u.num_aborts, spoil >= 5);
    CHECK_EQ(u.version, 2);
    CHECK_EQ(fake_cuda_left(), 0);
    CHECK_EQ(fake_nccl.live, 0);
}

static void device_streams(void)
{
    int nccl, keep, world;
    for (world = 1; world < 4; world++)
        for (nccl = 0; nccl < 2; nccl++)
            for (keep = 0; keep < 2; keep++) {
                run_device(world, nccl, keep, -1);
                run_device(world, nccl, keep, 2);
                run_device(world, nccl, keep, 23);
            }
}

int main(void)
{
    RUN(device_streams);
    return test_summary("test_base_cuda");
}
#endif
