/* Rules that hold for every function of the API: a creator that fails leaves NULL (a struct: zeros) behind, and one
   mistake has one text. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1 /* nanosleep, under -std=c99 */
#endif
#include "lorasync.h"

#include "test.h"

#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

#define CONFIG "{\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":8,\"target_modules\":[\"q_proj\"]}"

/* Everything that a call may be given, right, but for what a case spoils. */
typedef struct arguments {
    lorasync_allocator         allocator;
    lorasync_comm              comm;
    lorasync_desc              session;
    unsigned char              behind_session[16];
    lorasync_stream_desc       stream;
    unsigned char              behind_stream[16];
    lorasync_plan_desc         plan;
    unsigned char              behind_plan[16];
    lorasync_engine_desc       engine;
    unsigned char              behind_engine[16];
    lorasync_directory_desc    directory;
    unsigned char              behind_directory[16];
    lorasync_shm_desc          shm;
    unsigned char              behind_shm[16];
    lorasync_nccl_desc         nccl;
    lorasync_image_desc        image;
    unsigned char              behind_image[16];
    lorasync_config_write_desc write;
    unsigned char              behind_write[16];
    lorasync_tensor            tensor, pair[2];
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
    snprintf(name, sizeof name, "test-api-%ld", (long)getpid());
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
    a->pair[0] = a->pair[1] = a->tensor;
    a->pair[1].name         = "base_model.model.q_proj.lora_B.weight";
    a->pair[1].shape[0] = 2, a->pair[1].shape[1] = 4;
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

/* -- sizes: a desc of this header, of an older and of a newer one, and what is no size */

typedef struct described {
    const char *name;
    size_t      at, num_bytes, last; /* where the desc is in the arguments, its size, and where its last field is */
    lorasync_status (*call)(arguments *a, void *out, lorasync_error *err);
    void (*end)(void *out);
} described;

#define END(name, type, call)                                                                                          \
    static void name(void *out)                                                                                        \
    {                                                                                                                  \
        type *it = (type *)out;                                                                                        \
        call;                                                                                                          \
    }
END(end_layout, lorasync_image *, lorasync_image_free(*it))
END(end_plan, lorasync_plan *, lorasync_plan_free(*it))
END(end_write, char *, lorasync_free(NULL, *it)) /* the allocator is malloc's, too */
END(end_transport, lorasync_transport, it->close(it->user))
END(end_engine, lorasync_engine *, lorasync_engine_close(*it))
END(end_session, lorasync_session *, lorasync_close(*it))
END(end_stream, lorasync_stream *, lorasync_stream_close(*it))
CALL(call_write_one, lorasync_config_write(&a->write, a->pair, 2, &a->allocator, (char **)out, err))

/* The desc is followed by another of which the call knows nothing. */
#define DESCRIBED(field, type, last, call, end)                                                                        \
    {                                                                                                                  \
#type, offsetof(arguments, field), sizeof(type), offsetof(type, last), call, end                               \
    }
static const described descs[] = {
    DESCRIBED(image, lorasync_image_desc, adapter, call_layout, end_layout),
    DESCRIBED(plan, lorasync_plan_desc, allocator, call_plan, end_plan),
    DESCRIBED(write, lorasync_config_write_desc, fold_scale, call_write_one, end_write),
    DESCRIBED(directory, lorasync_directory_desc, allocator, call_directory, end_transport),
    DESCRIBED(shm, lorasync_shm_desc, cuda, call_shm, end_transport),
    DESCRIBED(engine, lorasync_engine_desc, offers_only, call_engine, end_engine),
    DESCRIBED(session, lorasync_desc, allocator, call_session, end_session),
    DESCRIBED(stream, lorasync_stream_desc, allocator, call_stream, end_stream),
};
enum {
    NUM_DESCS = (int)(sizeof descs / sizeof descs[0])
};

/* Calls with a desc of `size`, of whose bytes those from `spoilt` on are rubbish. */
static lorasync_status sized(const described *d, size_t size, size_t spoilt, lorasync_error *err)
{
    static arguments a;
    unsigned char    out[sizeof(lorasync_transport)], *desc;
    size_t           i;
    lorasync_status  status;
    fill(&a);
    desc = (unsigned char *)&a + d->at;
    if (spoilt) memset(desc + spoilt, 0xa5, d->num_bytes + sizeof a.behind_image - spoilt);
    memcpy(desc, &size, sizeof size);
    memset(err, 0, sizeof *err);
    memset(out, 0xa5, sizeof out);
    status = d->call(&a, out, err);
    if (status >= 0) d->end(out);
    else
        for (i = 0; i < sizeof(void *); i++) CHECK_EQ(out[i], 0);
    return status;
}

static void sizes(void)
{
    int            i;
    arguments      a;
    lorasync_error err;
    for (i = 0; i < NUM_DESCS; i++) {
        const described *d = &descs[i];
        size_t           n = d->num_bytes;
        if (sized(d, 0, 0, &err) != LORASYNC_OK) fprintf(stderr, "%s: %s\n", d->name, err.text);
        CHECK_EQ(sized(d, 0, 0, &err), LORASYNC_OK);
        CHECK_EQ(sized(d, n, 0, &err), LORASYNC_OK);
        CHECK_EQ(sized(d, n, n, &err), LORASYNC_OK); /* what is behind it is nobody's */
        CHECK_EQ(sized(d, 0, n, &err), LORASYNC_OK);
        CHECK_EQ(sized(d, d->last, d->last, &err), LORASYNC_OK); /* an older header, without the last field */
        CHECK_EQ(sized(d, n + 8, 0, &err), LORASYNC_OK);         /* a newer one, with fields left zero */
        CHECK_EQ(sized(d, n + 8, n, &err), LORASYNC_E_ARGUMENT); /* .. and set */
        CHECK_HAS(err.text, "use a library as new as the header");
        CHECK_EQ(sized(d, n + 1, n, &err), LORASYNC_E_ARGUMENT);
        CHECK_EQ(sized(d, 3, 0, &err), LORASYNC_E_ARGUMENT);
        CHECK_HAS(err.text, "desc.size is 3; fill the desc with zeros");
        CHECK_EQ(sized(d, SIZE_MAX, 0, &err), LORASYNC_E_ARGUMENT);
        CHECK_EQ(sized(d, (size_t)0xa5a5a5a5u, 0, &err), LORASYNC_E_ARGUMENT); /* never filled in */
    }
    fill(&a);
    lorasync_shm_remove(a.shm.name, NULL);
}

/* The library that is linked is the one of this header, and says what it can do. */
static void version_and_features(void)
{
    unsigned       features = lorasync_features();
    lorasync_comm  comm;
    lorasync_error err;
    arguments      a;
    CHECK_EQ(lorasync_version(), LORASYNC_VERSION_NUMBER);
    CHECK_EQ(LORASYNC_VERSION_NUMBER, 100);
    CHECK_EQ(features & ~(unsigned)(LORASYNC_FEATURE_CUDA | LORASYNC_FEATURE_NCCL), 0);
    fill(&a);
    CHECK_EQ(lorasync_nccl_open(&a.nccl, &comm, &err),
             features & LORASYNC_FEATURE_NCCL ? LORASYNC_E_ARGUMENT : LORASYNC_E_UNSUPPORTED);
}

int main(void)
{
    RUN(half_an_allocator);
    RUN(negative_timeouts);
    RUN(nothing_is_left);
    RUN(sizes);
    RUN(version_and_features);
    return test_summary("test_api");
}
