/* A trainer of three ranks keeps an engine up to date, in one program and without a GPU.

   compile   cc -I. -o quickstart examples/quickstart.c -lm          (from the folder that holds lorasync.h)
   run       ./quickstart
   output    rank 0 published version 1: 2 tensors, 2048 bytes, received by "engine-0"
             rank 0 published version 2: 2 tensors, 2048 bytes, received by "engine-0"
             rank 0 published version 3: 2 tensors, 2048 bytes, received by "engine-0"
             the engine serves version 3: 2 tensors, every value as trained

   Every rank holds some rows of lora_A [8, 64] and lora_B [64, 8], as FSDP2 would leave them: 8 rows over 3 ranks are
   3, 3 and 2. In version v element i of a tensor is v + i / 512; BF16 of it is what the engine must find. */
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    WORLD       = 3,
    VERSIONS    = 3,
    NUM_TENSORS = 2
};

static const char *const names[NUM_TENSORS]     = {"model.layers.0.self_attn.q_proj.lora_A.default.weight",
                                                   "model.layers.0.self_attn.q_proj.lora_B.default.weight"};
static const int64_t     shapes[NUM_TENSORS][2] = {{8, 64}, {64, 8}};

static float trained_value(uint64_t version, int64_t element) { return (float)version + (float)element / 512.0f; }

static int complain(const char *who, const lorasync_error *err)
{
    fprintf(stderr, "%s: %s: %s\n", who, lorasync_status_text(err->status), err->text);
    return 1;
}

/* One optimizer step on this rank's rows. */
static void train(float *rows, const lorasync_piece *piece, uint64_t version)
{
    int64_t first = piece->box.off[0] * piece->shape[1], num = piece->box.len[0] * piece->box.len[1], i;
    for (i = 0; i < num; i++) rows[i] = trained_value(version, first + i);
}

/* What every rank of the trainer does. */
static int trainer(lorasync_local *local, int rank, const char *directory)
{
    static float      memory[NUM_TENSORS][512];
    lorasync_piece    pieces[NUM_TENSORS], frozen;
    lorasync_comm     comm;
    lorasync_desc     desc;
    lorasync_session *session = NULL;
    lorasync_report   report;
    lorasync_receipt  receipt;
    lorasync_error    err;
    uint64_t          version;
    size_t            num_engines;
    int               t;

    if (lorasync_local_join(local, rank, &comm, &err) < 0) return complain("join", &err);
    memset(&desc, 0, sizeof desc);
    desc.comm       = &comm;
    desc.wire_dtype = LORASYNC_BF16;
    desc.lora_alpha = 16;
    desc.base_model = "toy";
    /* every version is waited for: one engine process must say that it serves it */
    desc.require_receipts = 1;
    if (lorasync_open(&desc, &session, &err) < 0) return complain("open", &err);

    memset(pieces, 0, sizeof pieces);
    for (t = 0; t < NUM_TENSORS; t++) {
        lorasync_piece *p = &pieces[t];
        p->name           = names[t];
        p->dtype          = LORASYNC_F32;
        p->ndim           = 2;
        p->shape[0]       = shapes[t][0];
        p->shape[1]       = shapes[t][1];
        p->box            = lorasync_shard(lorasync_whole(p->shape, p->ndim), 0, rank, WORLD);
        p->data           = memory[t];
        lorasync_add(session, p, NULL); /* an error is remembered: lorasync_compile reports it */
    }
    frozen          = pieces[0]; /* parameters of the base model may be passed too: they are dropped, and counted */
    frozen.name     = "model.layers.0.self_attn.q_proj.base_layer.weight";
    frozen.shape[0] = frozen.shape[1] = 64;               /* what the two are LoRA of */
    frozen.box                        = lorasync_none(2); /* this rank has nothing of it */
    lorasync_add(session, &frozen, NULL);
    lorasync_attach_directory(session, directory, NULL);
    if (lorasync_compile(session, &err) < 0) return complain("compile", &err);

    for (version = 1; version <= VERSIONS; version++) {
        for (t = 0; t < NUM_TENSORS; t++) train(memory[t], &pieces[t], version);
        if (lorasync_sync(session, version, &report, &err) < 0) return complain("sync", &err);
        if (rank != 0) continue;
        if (lorasync_get_receipts(session, &receipt, 1, &num_engines, &err) < 0) return complain("receipts", &err);
        printf("rank 0 published version %d: %d tensors, %d bytes, received by \"%s\"\n", (int)version,
               (int)report.num_tensors, (int)report.payload_bytes, num_engines ? receipt.engine : "nobody");
    }
    lorasync_close(session);
    return 0;
}

/* 1 if the tensor holds what was trained, rounded to BF16. */
static int tensor_is_right(const lorasync_adapter *adapter, const char *key, uint64_t version)
{
    const lorasync_tensor *tensor = lorasync_find(adapter, key);
    float                  values[512];
    uint16_t               expected[512];
    int                    i;
    if (!tensor || tensor->dtype != LORASYNC_BF16 || tensor->num_bytes != sizeof expected) return 0;
    for (i = 0; i < 512; i++) values[i] = trained_value(version, i);
    lorasync_convert(expected, LORASYNC_BF16, values, LORASYNC_F32, 512, NULL);
    return memcmp(tensor->data, expected, sizeof expected) == 0;
}

/* What the engine does: takes each new version until it has the last one. It may skip some: the newest is what
   counts. The caller closes *out, also after a failure. */
static int engine(const char *directory, lorasync_engine **out, char *verdict, size_t verdict_size)
{
    lorasync_engine_desc    desc;
    lorasync_engine        *e;
    const lorasync_adapter *adapter;
    lorasync_error          err;
    lorasync_status         status;
    uint64_t                version = 0;
    int                     right   = 1;
    size_t                  num     = 0;

    memset(&desc, 0, sizeof desc);
    desc.directory = directory;
    desc.name      = "engine-0"; /* as its receipts call it */
    if (lorasync_engine_open(&desc, out, &err) < 0) return complain("engine", &err);
    e = *out;
    while (right && version < VERSIONS) {
        status = lorasync_engine_poll(e, 10000, &err);
        if (status < 0) return complain("poll", &err);
        if (status == LORASYNC_NOTHING_NEW) {
            fprintf(stderr, "poll: no new version for 10 seconds\n");
            return 1;
        }
        adapter = lorasync_acquire(e, "default"); /* pinned: it cannot change while it is looked at */
        version = adapter->version;
        num     = adapter->image->num_tensors;
        right   = tensor_is_right(adapter, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", version) &&
                tensor_is_right(adapter, "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", version);
        lorasync_release(adapter);
    }
    snprintf(verdict, verdict_size, "the engine serves version %d: %d tensors, %s", (int)version, (int)num,
             right ? "every value as trained" : "WRONG VALUES");
    return right ? 0 : 1;
}

/* Removes the three versions, the link and the folders. */
static void clean_up(const char *directory)
{
    char path[300];
    int  v;
    for (v = 1; v <= VERSIONS; v++) {
        snprintf(path, sizeof path, "%s/default/v%d/adapter_model.safetensors", directory, v), unlink(path);
        snprintf(path, sizeof path, "%s/default/v%d/adapter_config.json", directory, v), unlink(path);
        snprintf(path, sizeof path, "%s/default/v%d", directory, v), rmdir(path);
    }
    snprintf(path, sizeof path, "%s/default/latest", directory), unlink(path);
    snprintf(path, sizeof path, "%s/default", directory), rmdir(path);
    rmdir(directory);
}

int main(void)
{
    char             directory[] = "/tmp/quickstart-XXXXXX", verdict[100] = "";
    lorasync_local  *local = NULL;
    lorasync_engine *e     = NULL;
    lorasync_error   err;
    pid_t            ranks[WORLD];
    int              rank, status, failed = 0;

    if (!mkdtemp(directory)) return perror("mkdtemp"), 1;
    if (lorasync_local_open(WORLD, &local, &err) < 0) return complain("local", &err);
    for (rank = 0; rank < WORLD; rank++) {
        ranks[rank] = fork();
        if (ranks[rank] == 0) {
            status = trainer(local, rank, directory);
            lorasync_local_close(local);
            exit(status);
        }
        if (ranks[rank] < 0) return perror("fork"), 1;
    }
    /* The engine is this process; usually it is another program that knows nothing but the name of the directory. */
    failed = engine(directory, &e, verdict, sizeof verdict);
    for (rank = 0; rank < WORLD; rank++) {
        waitpid(ranks[rank], &status, 0);
        failed |= status;
    }
    lorasync_engine_close(e); /* takes its receipt away: not before the trainers have seen it */
    lorasync_local_close(local);
    if (verdict[0]) printf("%s\n", verdict);
    clean_up(directory);
    return failed ? 1 : 0;
}
