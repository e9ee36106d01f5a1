/* Generations: versions that begin again, by every door. What a session says of its own, what an engine makes of it. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1 /* nanosleep, under -std=c99 */
#endif
#include "lorasync.h"

#include "test.h"
#include "published.h"

/* -- an engine of a source that knows generations */

typedef struct shelf {
    lorasync_image *image;
    char           *bytes; /* of the image, as a file; kept until the next is put there */
    uint64_t        generation, version;
    int             hides_generation, hides_version; /* from looks */
    int             opened;
} shelf;

static lorasync_status shelf_look(void *user, size_t index, lorasync_published *out, lorasync_error *err)
{
    const shelf *s = (const shelf *)user;
    (void)err;
    if (index || !s->image) return LORASYNC_NOTHING_NEW;
    strcpy(out->adapter, "policy");
    if (!s->hides_version) out->version = s->version;
    if (!s->hides_generation) out->generation = s->generation;
    return LORASYNC_OK;
}

static void forget(void *user) { free(user); }

static lorasync_delivery shelf_delivery(const shelf *s)
{
    lorasync_delivery d;
    size_t            n     = s->image->header_bytes;
    char             *bytes = (char *)malloc(n + s->image->payload_bytes);
    memset(&d, 0, sizeof d);
    memcpy(bytes, s->image->header, n);
    memcpy(bytes + n, s->image->payload, s->image->payload_bytes);
    d.size = sizeof d, d.bytes = bytes, d.num_bytes = n + s->image->payload_bytes, d.config_json = CONFIG;
    d.release = forget, d.user = bytes, d.generation = s->generation;
    return d;
}

static lorasync_status shelf_open(void *user, const lorasync_published *what, const lorasync_image *served,
                                  lorasync_delivery *out, lorasync_error *err)
{
    shelf *s = (shelf *)user;
    (void)what;
    (void)served;
    (void)err;
    *out = shelf_delivery(s);
    s->opened++;
    return LORASYNC_OK;
}

/* An image of all `value`, stamped. */
static lorasync_image *filled(uint64_t version, float value)
{
    lorasync_image *image   = lay_out_rank("policy", 8, 4);
    float          *payload = (float *)malloc(image->payload_bytes);
    size_t          i;
    for (i = 0; i < image->payload_bytes / sizeof *payload; i++) payload[i] = value;
    lorasync_image_bind(image, payload);
    lorasync_image_stamp(image, version, lorasync_image_digest(image, NULL));
    return image;
}

static void put_there(shelf *s, uint64_t generation, uint64_t version, float value)
{
    if (s->image) drop_image(s->image);
    s->image = filled(version, value), s->generation = generation, s->version = version;
}

/* What is put there one after the other, and what an engine says to it. value: what it serves afterwards. */
typedef struct turn {
    uint64_t        generation, version;
    float           value;
    lorasync_status status;
    const char     *text;
    uint64_t        served_generation, served_version;
    float           served_value;
} turn;

static const turn turns[] = {
    {0, 40, 1, LORASYNC_OK, "", 0, 40, 1},
    {0, 1, 2, LORASYNC_E_VERSION, "is v1, v40 is served", 0, 40, 1}, /* a restart that says nothing */
    {0, 1, 2, LORASYNC_E_VERSION, "lorasync_desc.new_generation", 0, 40, 1},
    {7, 1, 3, LORASYNC_OK, "", 7, 1, 3}, /* and one that does */
    {7, 1, 3, LORASYNC_NOTHING_NEW, "", 7, 1, 3},
    {7, 1, 4, LORASYNC_NOTHING_NEW, "", 7, 1, 3}, /* by looks without a mark the version is all that counts */
    {7, 2, 5, LORASYNC_OK, "", 7, 2, 5},
    {7, 1, 3, LORASYNC_E_VERSION, "is v1, v2 is served", 7, 2, 5}, /* within one they count on */
    {0, 3, 6, LORASYNC_OK, "", 7, 3, 6},                           /* not said: the same */
    {0, 2, 6, LORASYNC_E_VERSION, "is v2, v3 is served", 7, 3, 6},
    {8, 3, 7, LORASYNC_OK, "", 8, 3, 7}, /* the same number, another version */
    {7, 9, 8, LORASYNC_E_VERSION, "v9 of an earlier generation than v3", 8, 3, 7},
    {9, 3, 7, LORASYNC_OK, "", 9, 3, 7}, /* even with the same bytes */
    {8, 4, 8, LORASYNC_E_VERSION, "another one has replaced", 9, 3, 7},
    {7, 50, 8, LORASYNC_E_VERSION, "earlier generation", 9, 3, 7},
    {9, 4, 9, LORASYNC_OK, "", 9, 4, 9}};

static void check_served(lorasync_engine *e, const turn *t)
{
    const lorasync_adapter *a = lorasync_acquire(e, "policy");
    REQUIRE(a);
    CHECK_EQ(a->version, t->served_version);
    CHECK_EQ(a->image->generation, t->served_generation);
    CHECK(((const float *)a->image->payload)[0] == t->served_value);
    lorasync_release(a);
}

static void source_turns(int hides_generation, int hides_version)
{
    shelf                s;
    lorasync_source      source;
    lorasync_engine_desc desc;
    lorasync_engine     *e = NULL;
    size_t               i;
    memset(&s, 0, sizeof s);
    memset(&source, 0, sizeof source);
    memset(&desc, 0, sizeof desc);
    s.hides_generation = hides_generation, s.hides_version = hides_version;
    source.size = sizeof source, source.name = "shelf", source.user = &s;
    source.look = shelf_look, source.open = shelf_open;
    desc.source = &source;
    CHECK_EQ(lorasync_engine_open(&desc, &e, NULL), 0);
    for (i = 0; i < sizeof turns / sizeof turns[0]; i++) {
        const turn    *t = &turns[i];
        lorasync_error err;
        put_there(&s, t->generation, t->version, t->value);
        memset(&err, 0, sizeof err);
        if (hides_version && t->value != t->served_value && t->status == LORASYNC_NOTHING_NEW) continue;
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), t->status);
        CHECK_HAS(err.text, t->text);
        check_served(e, t);
        if (t->status < 0 && !hides_version && !hides_generation) {
            const int before = s.opened;
            CHECK_EQ(lorasync_engine_poll(e, 0, &err), t->status);
            CHECK_EQ(s.opened, before); /* refused unopened */
        }
    }
    lorasync_engine_close(e);
    drop_image(s.image);
}

static void looks_that_say_all(void) { source_turns(0, 0); }
static void looks_that_say_no_version(void) { source_turns(0, 1); }
static void looks_that_say_nothing(void) { source_turns(1, 1); }

static void offers(void)
{
    shelf                s;
    lorasync_engine_desc desc;
    lorasync_engine     *e = NULL;
    lorasync_error       err;
    lorasync_delivery    d;
    size_t               i;
    memset(&s, 0, sizeof s);
    memset(&desc, 0, sizeof desc);
    desc.offers_only = 1;
    CHECK_EQ(lorasync_engine_open(&desc, &e, NULL), 0);
    for (i = 0; i < sizeof turns / sizeof turns[0]; i++) {
        const turn     *t = &turns[i];
        lorasync_status status;
        if (t->value != t->served_value && t->status == LORASYNC_NOTHING_NEW) continue;
        put_there(&s, t->generation, t->version, t->value);
        memset(&err, 0, sizeof err);
        d      = shelf_delivery(&s);
        status = lorasync_engine_offer(e, &d, &err);
        CHECK_EQ(status, t->status);
        if (status != LORASYNC_OK) free(d.user);
        CHECK_HAS(err.text, t->text);
        check_served(e, t);
    }
    put_there(&s, 77, 1, 9); /* of a header that does not know the field: what lies there is not read */
    d      = shelf_delivery(&s);
    d.size = offsetof(lorasync_delivery, generation);
    CHECK_EQ(lorasync_engine_offer(e, &d, &err), LORASYNC_E_VERSION);
    free(d.user);
    lorasync_engine_close(e);
    drop_image(s.image);
}

/* -- what a session says */

typedef struct seen {
    uint64_t generations[8], versions[8];
    int      num;
} seen;

static lorasync_status see(void *user, const lorasync_image *image, lorasync_error *err)
{
    seen *s = (seen *)user;
    (void)err;
    if (s->num == 8) return LORASYNC_E_MEMORY;
    s->generations[s->num] = image->generation, s->versions[s->num++] = image->version;
    return LORASYNC_OK;
}

static lorasync_transport seeing(seen *s)
{
    lorasync_transport t;
    memset(s, 0, sizeof *s);
    memset(&t, 0, sizeof t);
    t.size = sizeof t, t.name = "seeing", t.user = s, t.stage = see, t.takes_buckets = 1;
    return t;
}

static const int64_t shape_a[2] = {4, 8}, shape_b[2] = {8, 4};
static float         data_a[32], data_b[32];

static void declare(lorasync_session *session, lorasync_stream *stream, const char *name, const int64_t *shape,
                    float *data)
{
    lorasync_piece p;
    memset(&p, 0, sizeof p);
    p.name = name, p.dtype = LORASYNC_F32, p.ndim = 2, p.data = data;
    memcpy(p.shape, shape, 2 * sizeof *shape);
    p.box = lorasync_whole(p.shape, 2);
    if (session) CHECK_EQ(lorasync_add(session, &p, NULL), 0);
    else CHECK_EQ(lorasync_stream_add(stream, &p, NULL), 0);
}

static lorasync_session *open_session(lorasync_transport *t, int new_generation)
{
    lorasync_session *s = NULL;
    lorasync_desc     d;
    lorasync_error    err;
    memset(&d, 0, sizeof d);
    d.config_json = CONFIG, d.new_generation = new_generation;
    CHECK_EQ(lorasync_open(&d, &s, &err), 0);
    declare(s, NULL, KEY_A, shape_a, data_a);
    declare(s, NULL, KEY_B, shape_b, data_b);
    CHECK_EQ(lorasync_attach(s, t, &err), 0);
    CHECK_EQ(lorasync_compile(s, &err), 0);
    return s;
}

static void sessions(void)
{
    uint64_t first = 0;
    int      round, i;
    for (round = 0; round < 3; round++) {
        seen               what;
        lorasync_transport t = seeing(&what);
        lorasync_session  *s = open_session(&t, round > 0);
        for (i = 1; i <= 3; i++) CHECK_EQ(lorasync_sync(s, (uint64_t)i, NULL, NULL), 0);
        CHECK_EQ(what.num, 3);
        for (i = 0; i < 3; i++) CHECK_EQ(what.generations[i], what.generations[0]);
        CHECK_EQ(what.generations[0] != 0, round > 0);
        if (round == 1) first = what.generations[0];
        if (round == 2) CHECK(what.generations[0] != first);
        lorasync_close(s);
    }
}

static void streams(void)
{
    int anew;
    for (anew = 0; anew < 2; anew++) {
        seen                 what;
        lorasync_transport   t = seeing(&what);
        lorasync_stream_desc d;
        lorasync_stream     *s = NULL;
        int                  i;
        memset(&d, 0, sizeof d);
        d.bucket_bytes = 128, d.new_generation = anew;
        CHECK_EQ(lorasync_stream_open(&d, &s, NULL), 0);
        declare(NULL, s, "a.weight", shape_a, data_a);
        declare(NULL, s, "b.weight", shape_b, data_b);
        CHECK_EQ(lorasync_stream_attach(s, &t, NULL), 0);
        CHECK_EQ(lorasync_stream_compile(s, NULL), 0);
        CHECK_EQ(lorasync_stream_sync(s, 1, NULL, NULL), 0);
        CHECK_EQ(what.num, 2);
        for (i = 0; i < 2; i++) CHECK_EQ(what.generations[i], what.generations[0]);
        CHECK_EQ(what.generations[0] != 0, anew);
        lorasync_stream_close(s);
    }
}

/* -- trainers that are started again, and the directory that they publish to */

static char root[200];

static void fresh_root(void)
{
    const char *tmp = getenv("TMPDIR");
    char        command[300];
    if (root[0]) {
        snprintf(command, sizeof command, "rm -rf '%s'", root);
        if (system(command) != 0) perror(root);
    }
    snprintf(root, sizeof root, "%.100s/lorasync-generation-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(root)) perror(root), exit(1);
}

static lorasync_session *start(int new_generation)
{
    lorasync_directory_desc d;
    lorasync_transport      t;
    memset(&d, 0, sizeof d);
    d.directory = root, d.no_fsync = 1;
    CHECK_EQ(lorasync_directory_open(&d, &t, NULL), 0);
    return open_session(&t, new_generation);
}

static lorasync_status sync_value(lorasync_session *s, uint64_t version, float value, lorasync_error *err)
{
    size_t i;
    for (i = 0; i < 32; i++) data_a[i] = value;
    return lorasync_sync(s, version, NULL, err);
}

/* What is served, after a look that finds something: the version, its value and its generation. */
static uint64_t follow(lorasync_engine *e, uint64_t version, float value)
{
    const lorasync_adapter *a;
    const lorasync_tensor  *t;
    lorasync_error          err;
    uint64_t                generation = 0;
    err.text[0]                        = 0;
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    if (err.text[0]) fprintf(stderr, "%s\n", err.text);
    a = lorasync_acquire(e, "default");
    CHECK(a != NULL);
    if (!a) return 0;
    t          = lorasync_find(a, KEY_A);
    generation = a->image->generation;
    CHECK_EQ(a->version, version);
    CHECK(t && ((const float *)t->data)[0] == value);
    lorasync_release(a);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    return generation;
}

static void check_latest(uint64_t version, uint64_t generation)
{
    char    path[300], target[100], expected[100];
    ssize_t n;
    snprintf(path, sizeof path, "%s/default/latest", root);
    n                     = readlink(path, target, sizeof target - 1);
    target[n < 0 ? 0 : n] = 0;
    snprintf(expected, sizeof expected, generation ? "v%d-%016llx" : "v%d", (int)version,
             (unsigned long long)generation);
    CHECK_TEXT(target, expected);
}

static int num_versions(void)
{
    char  command[300], line[20] = "";
    FILE *f;
    snprintf(command, sizeof command, "ls -d '%s'/default/v* | wc -l", root);
    f = popen(command, "r");
    if (!f || !fgets(line, sizeof line, f)) return -1;
    pclose(f);
    return atoi(line);
}

static void directory_restarts(void)
{
    lorasync_engine_desc    desc;
    lorasync_engine        *e = NULL, *later = NULL;
    const lorasync_adapter *pinned;
    lorasync_session       *s, *other;
    lorasync_error          err;
    uint64_t                first, second;
    fresh_root();
    memset(&desc, 0, sizeof desc);
    desc.directory = root;
    CHECK_EQ(lorasync_engine_open(&desc, &e, NULL), 0);
    s = start(0);
    CHECK_EQ(sync_value(s, 39, 39, &err), 0);
    CHECK_EQ(sync_value(s, 40, 40, &err), 0);
    CHECK_EQ(follow(e, 40, 40), 0);
    pinned = lorasync_acquire(e, "default");
    lorasync_close(s);

    s = start(0); /* the everyday restart: the error says what is served, and both ways out */
    CHECK_EQ(sync_value(s, 1, 1, &err), LORASYNC_E_VERSION);
    CHECK_HAS(err.text, "/default/latest is version 40, which is newer than 1");
    CHECK_HAS(err.text, "go on with a greater version, or begin again with lorasync_desc.new_generation");
    CHECK_EQ(sync_value(s, 41, 41, &err), 0);
    CHECK_EQ(follow(e, 41, 41), 0);
    check_latest(41, 0);

    other = start(1);
    CHECK_EQ(sync_value(other, 1, 1, &err), LORASYNC_E_BUSY); /* the one before still has the place */
    CHECK_HAS(err.text, "is published to by another transport of this very process");
    lorasync_close(s);
    CHECK_EQ(sync_value(other, 1, 1, &err), 0); /* the same version again */
    first = follow(e, 1, 1);
    CHECK(first != 0);
    check_latest(1, first);
    CHECK_EQ(num_versions(), 3); /* of the generations before the newest are kept */
    CHECK_EQ(sync_value(other, 1, 7, &err), LORASYNC_E_VERSION);
    CHECK_EQ(sync_value(other, 2, 2, &err), 0);
    CHECK_EQ(follow(e, 2, 2), first);
    lorasync_close(other);

    s = start(0); /* goes on in the generation that it finds */
    CHECK_EQ(sync_value(s, 2, 3, &err), LORASYNC_E_VERSION);
    CHECK_EQ(sync_value(s, 1, 3, &err), LORASYNC_E_VERSION);
    CHECK_EQ(sync_value(s, 3, 3, &err), 0);
    CHECK_EQ(follow(e, 3, 3), first);
    check_latest(3, first);
    CHECK_EQ(num_versions(), 3);
    lorasync_close(s);

    s = start(1);
    CHECK_EQ(sync_value(s, 3, 30, &err), 0); /* the same number, another version */
    second = follow(e, 3, 30);
    CHECK(second && second != first);
    check_latest(3, second);
    CHECK_EQ(num_versions(), 3);
    CHECK_EQ(lorasync_engine_open(&desc, &later, NULL), 0); /* one that has seen nothing of all this */
    CHECK_EQ(follow(later, 3, 30), second);
    CHECK(pinned && pinned->version == 40 && ((const float *)lorasync_find(pinned, KEY_A)->data)[0] == 40);
    lorasync_close(s);
    lorasync_release(pinned);
    lorasync_engine_close(e);
    lorasync_engine_close(later);
}

/* -- shared memory */

static char shm[64];

static lorasync_session *start_shm(int new_generation)
{
    lorasync_shm_desc  d;
    lorasync_transport t;
    memset(&d, 0, sizeof d);
    d.name = shm;
    CHECK_EQ(lorasync_shm_open(&d, &t, NULL), 0);
    return open_session(&t, new_generation);
}

static void shm_restarts(void)
{
    lorasync_engine_desc    desc;
    lorasync_engine        *e = NULL, *later = NULL;
    const lorasync_adapter *pinned;
    lorasync_session       *s;
    lorasync_error          err;
    uint64_t                first, second, v;
    snprintf(shm, sizeof shm, "generation-%ld", (long)getpid());
    memset(&desc, 0, sizeof desc);
    desc.shm = shm;
    CHECK_EQ(lorasync_engine_open(&desc, &e, NULL), 0);
    s = start_shm(0);
    CHECK_EQ(sync_value(s, 40, 40, &err), 0);
    CHECK_EQ(follow(e, 40, 40), 0);
    pinned = lorasync_acquire(e, "default");
    lorasync_close(s);

    s = start_shm(0);
    CHECK_EQ(sync_value(s, 1, 1, &err), LORASYNC_E_VERSION);
    CHECK_HAS(err.text, "is version 40, which is newer than 1");
    CHECK_HAS(err.text, "go on with a greater version, or begin again with lorasync_desc.new_generation");
    CHECK_EQ(sync_value(s, 41, 41, &err), 0);
    CHECK_EQ(follow(e, 41, 41), 0);
    lorasync_close(s);

    s = start_shm(1);
    CHECK_EQ(sync_value(s, 1, 1, &err), 0);
    first = follow(e, 1, 1);
    CHECK(first != 0);
    CHECK_EQ(sync_value(s, 1, 7, &err), LORASYNC_E_VERSION);
    for (v = 2; v < 9; v++) { /* slots of the generation before come round */
        CHECK_EQ(sync_value(s, v, (float)v, &err), 0);
        CHECK_EQ(follow(e, v, (float)v), first);
    }
    lorasync_close(s);

    s = start_shm(0); /* goes on in the generation that it finds */
    CHECK_EQ(sync_value(s, 8, 9, &err), LORASYNC_E_VERSION);
    CHECK_EQ(sync_value(s, 9, 9, &err), 0);
    CHECK_EQ(follow(e, 9, 9), first);
    lorasync_close(s);

    s = start_shm(1);
    CHECK_EQ(sync_value(s, 9, 9, &err), 0); /* the same number and bytes, another version */
    second = follow(e, 9, 9);
    CHECK(second && second != first);
    CHECK_EQ(lorasync_engine_open(&desc, &later, NULL), 0);
    CHECK_EQ(follow(later, 9, 9), second);
    CHECK(pinned && pinned->version == 40 && ((const float *)lorasync_find(pinned, KEY_A)->data)[0] == 40);
    lorasync_close(s);
    lorasync_release(pinned);
    lorasync_engine_close(e);
    lorasync_engine_close(later);
    CHECK_EQ(lorasync_shm_remove(shm, NULL), 0);
}

static void base_restarts(void)
{
    lorasync_directory_desc d;
    lorasync_stream_desc    sd;
    int                     round;
    fresh_root();
    memset(&d, 0, sizeof d);
    memset(&sd, 0, sizeof sd);
    d.directory = root, d.no_fsync = 1;
    sd.bucket_bytes = 128, sd.name = "default";
    for (round = 0; round < 3; round++) {
        lorasync_transport t;
        lorasync_stream   *s = NULL;
        lorasync_error     err;
        sd.new_generation = round == 2;
        CHECK_EQ(lorasync_directory_open(&d, &t, NULL), 0);
        CHECK_EQ(lorasync_stream_open(&sd, &s, NULL), 0);
        declare(NULL, s, "a.weight", shape_a, data_a);
        declare(NULL, s, "b.weight", shape_b, data_b);
        CHECK_EQ(lorasync_stream_attach(s, &t, NULL), 0);
        CHECK_EQ(lorasync_stream_compile(s, NULL), 0);
        CHECK_EQ(lorasync_stream_sync(s, round ? 1 : 5, NULL, &err), round == 1 ? LORASYNC_E_VERSION : 0);
        CHECK_EQ(num_versions(), round == 2 ? 2 : 1);
        lorasync_stream_close(s);
    }
}

int main(void)
{
    RUN(looks_that_say_all);
    RUN(looks_that_say_no_version);
    RUN(looks_that_say_nothing);
    RUN(offers);
    RUN(sessions);
    RUN(streams);
    RUN(directory_restarts);
    RUN(shm_restarts);
    RUN(base_restarts);
    fresh_root();
    rmdir(root);
    return test_summary("test_generation");
}
