/* Rules that hold for every function of the API: a creator that fails leaves NULL (a struct: zeros) behind, and one mistake
   has one text. */
#include "lorasync.h"

#include "test.h"

#include <stdint.h>

#define CONFIG "{\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":8,\"target_modules\":[\"q_proj\"]}"

/* Everything that a call may be given, right, but for what a case spoils. */
typedef struct arguments {
    lorasync_allocator         allocator;
    lorasync_comm              comm;
    lorasync_desc              session;
    lorasync_stream_desc       stream;
    lorasync_plan_desc         plan;
    lorasync_engine_desc       engine;
    lorasync_directory_desc    directory;
    lorasync_shm_desc          shm;
    lorasync_nccl_desc         nccl;
    lorasync_image_desc        image;
    lorasync_config_write_desc write;
    lorasync_tensor            tensor;
    float                      data[4];
    lorasync_piece             piece;
    void                      *handle;   /* what pointers become */
    lorasync_comm              comm_out; /* what structs become */
    lorasync_transport         transport_out;
} arguments;

static void *give(void *user, size_t n)
{
    (void)user;
    return malloc(n);
}

static void take(void *user, void *p)
{
    (void)user;
    free(p);
}

static void fill(arguments *a)
{
    static char name[60];
    memset(a, 0, sizeof *a);
    snprintf(name, sizeof name, "test-api-%ld", (long)(intptr_t)&name % 100000);
    a->allocator.alloc = give, a->allocator.free = take;
    a->comm         = lorasync_solo();
    a->session.comm = a->stream.comm = a->plan.comm = &a->comm;
    a->session.lora_alpha                           = 8;
    a->piece.name = "t", a->piece.dtype = LORASYNC_F32, a->piece.ndim = 1, a->piece.shape[0] = 4;
    a->piece.box = lorasync_whole(a->piece.shape, 1), a->piece.data = a->data;
    a->plan.have = &a->piece, a->plan.num_have = 1;
    a->engine.directory = a->directory.directory = "/tmp";
    a->shm.name                                  = name;
    a->tensor.name = "base_model.model.q_proj.lora_A.weight", a->tensor.dtype = LORASYNC_F32, a->tensor.ndim = 2;
    a->tensor.shape[0] = 4, a->tensor.shape[1] = 2;
    a->image.tensors = &a->tensor, a->image.num_tensors = 1;
    a->write.lora_alpha  = 8;
    a->session.allocator = a->stream.allocator = a->plan.allocator = a->engine.allocator = a->directory.allocator =
        a->shm.allocator                                                                 = &a->allocator;
}

/* -- the creators: how each is called, whether it has an allocator and a deadline */

typedef struct creator {
    const char *name;
    lorasync_status (*call)(arguments *a, void *out, lorasync_error *err);
    int *(*timeout)(arguments *a);
    size_t out_bytes; /* of a struct; 0: a pointer */
    int    has_allocator;
} creator;

#define CALL(name, call)                                                                                               \
    static lorasync_status name(arguments *a, void *out, lorasync_error *err)                                          \
    {                                                                                                                  \
        (void)a;                                                                                                       \
        return call;                                                                                                   \
    }

CALL(call_pattern, lorasync_pattern_compile("a.*", &a->allocator, (lorasync_pattern **)out, err))
CALL(call_matcher, lorasync_matcher_create(NULL, NULL, 0, &a->allocator, (lorasync_matcher **)out, err))
CALL(call_layout, lorasync_image_layout(&a->image, &a->allocator, (lorasync_image **)out, err))
CALL(call_parse, lorasync_image_parse("\2\0\0\0\0\0\0\0{}", 10, &a->allocator, (lorasync_image **)out, err))
CALL(call_plan, lorasync_plan_create(&a->plan, (lorasync_plan **)out, err))
CALL(call_config, lorasync_config_parse(CONFIG, sizeof CONFIG - 1, &a->allocator, (lorasync_config **)out, err))
CALL(call_write, lorasync_config_write(&a->write, NULL, 0, &a->allocator, (char **)out, err))
CALL(call_directory, lorasync_directory_open(&a->directory, (lorasync_transport *)out, err))
CALL(call_shm, lorasync_shm_open(&a->shm, (lorasync_transport *)out, err))
CALL(call_engine, lorasync_engine_open(&a->engine, (lorasync_engine **)out, err))
CALL(call_adapter, lorasync_open_adapter("/no/such/adapter", &a->allocator, (lorasync_image **)out, NULL, err))
CALL(call_session, lorasync_open(&a->session, (lorasync_session **)out, err))
CALL(call_stream, lorasync_stream_open(&a->stream, (lorasync_stream **)out, err))
CALL(call_local, lorasync_local_open(0, (lorasync_local **)out, err))
CALL(call_join, lorasync_local_join(NULL, 0, (lorasync_comm *)out, err))
CALL(call_nccl, lorasync_nccl_open(&a->nccl, (lorasync_comm *)out, err))

static int *plan_timeout(arguments *a) { return &a->plan.timeout_ms; }
static int *session_timeout(arguments *a) { return &a->session.timeout_ms; }
static int *publish_timeout(arguments *a) { return &a->session.publish_timeout_ms; }
static int *stream_timeout(arguments *a) { return &a->stream.timeout_ms; }

static const creator creators[] = {
    {"pattern", call_pattern, NULL, 0, 1},
    {"matcher", call_matcher, NULL, 0, 1},
    {"image_layout", call_layout, NULL, 0, 1},
    {"image_parse", call_parse, NULL, 0, 1},
    {"plan", call_plan, plan_timeout, 0, 1},
    {"config_parse", call_config, NULL, 0, 1},
    {"config_write", call_write, NULL, 0, 1},
    {"directory", call_directory, NULL, sizeof(lorasync_transport), 1},
    {"shm", call_shm, NULL, sizeof(lorasync_transport), 1},
    {"engine", call_engine, NULL, 0, 1},
    {"open_adapter", call_adapter, NULL, 0, 1},
    {"session", call_session, session_timeout, 0, 1},
    {"session", call_session, publish_timeout, 0, 1},
    {"stream", call_stream, stream_timeout, 0, 1},
    {"local_open", call_local, NULL, 0, 0},
    {"local_join", call_join, NULL, sizeof(lorasync_comm), 0},
    {"nccl", call_nccl, NULL, sizeof(lorasync_comm), 0},
};
enum {
    NUM_CREATORS = (int)(sizeof creators / sizeof creators[0])
};

/* Calls it with rubbish in `out`; after a failure nothing of that may be left. */
static lorasync_status try_it(const creator *c, arguments *a, lorasync_error *err)
{
    unsigned char   out[sizeof(lorasync_transport) + sizeof(lorasync_comm)];
    size_t          i, n = c->out_bytes ? c->out_bytes : sizeof(void *);
    lorasync_status status;
    memset(out, 0xa5, sizeof out);
    memset(err, 0, sizeof *err);
    status = c->call(a, out, err);
    CHECK_EQ(err->status, status);
    CHECK(status < 0);
    for (i = 0; i < n; i++)
        if (out[i]) {
            fprintf(stderr, "%s leaves something in out: %s\n", c->name, err->text);
            CHECK(!"out is left as it was");
            break;
        }
    return status;
}

/* Half an allocator: one text. */
static void half_an_allocator(void)
{
    int            i, half;
    arguments      a;
    lorasync_error err;
    for (i = 0; i < NUM_CREATORS; i++) {
        for (half = 0; half < 2; half++) {
            fill(&a);
            if (half) a.allocator.alloc = NULL;
            else a.allocator.free = NULL;
            if (!creators[i].has_allocator) continue;
            CHECK_EQ(try_it(&creators[i], &a, &err), LORASYNC_E_ARGUMENT);
            CHECK_TEXT(err.text, half ? "allocator: alloc is NULL; give both alloc and free, or neither"
                                      : "allocator: free is NULL; give both alloc and free, or neither");
        }
    }
}

/* A negative deadline: one text, but for whose it is. */
static void negative_timeouts(void)
{
    int              i;
    arguments        a;
    lorasync_error   err;
    lorasync_engine *engine = NULL;
    for (i = 0; i < NUM_CREATORS; i++) {
        if (!creators[i].timeout) continue;
        fill(&a);
        *creators[i].timeout(&a) = -7;
        CHECK_EQ(try_it(&creators[i], &a, &err), LORASYNC_E_ARGUMENT);
        CHECK_HAS(err.text, "timeout_ms is -7, must not be negative");
    }
    fill(&a);
    REQUIRE(lorasync_engine_open(&a.engine, &engine, &err) == LORASYNC_OK);
    CHECK_EQ(lorasync_engine_poll(engine, -7, &err), LORASYNC_E_ARGUMENT);
    CHECK_TEXT(err.text, "timeout_ms is -7, must not be negative");
    lorasync_engine_close(engine);
}

/* No memory, and what only some calls can fail of: nothing is left in out. */
static void *no_memory(void *user, size_t n)
{
    (void)user, (void)n;
    return NULL;
}

static void nothing_is_left(void)
{
    int            i;
    arguments      a;
    lorasync_error err;
    for (i = 0; i < NUM_CREATORS; i++) {
        fill(&a);
        a.allocator.alloc = no_memory;
        try_it(&creators[i], &a, &err);
        CHECK(creators[i].has_allocator == (err.status == LORASYNC_E_MEMORY || creators[i].call == call_adapter));
    }
    fill(&a);
    a.engine.directory = NULL;
    CHECK_EQ(lorasync_engine_open(&a.engine, (lorasync_engine **)&a.handle, &err), LORASYNC_E_ARGUMENT);
    CHECK(a.handle == NULL);
}

int main(void)
{
    RUN(half_an_allocator);
    RUN(negative_timeouts);
    RUN(nothing_is_left);
    return test_summary("test_api");
}
