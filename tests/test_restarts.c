/* Trainers that are killed at random and started again in the same place, always two at a time, while engines look on.
   An engine never serves what is mixed, nothing once there was something, or anything older than what a trainer was
   told is published; what it has pinned does not change; and of two publishers one is told so.
   usage: test_restarts [rounds] */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1 /* nanosleep, MAP_ANONYMOUS, under -std=c99 */
#endif
#include "lorasync.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "test.h"
#include "published.h"

#ifndef ROUNDS
#define ROUNDS 60
#endif

enum {
    WIDTH      = 300,
    MAX_TRIES  = 1 << 22,
    NUM_PLACES = 2
};

static int rounds = ROUNDS;

/* What all processes see. A try is one image that is published once; its number is in every byte of it.

       acked    [ 1 | 2 | 5 | ...         tries, in the order in which trainers were told that they are published
       place    [ 0 | 1 | 2 | 0 | 0 | 3   of a try in `acked`, + 1; 0: a trainer was killed before it was told
       after    [ 0 | 0 | 1 | 2 | 2 | 2   num_acked when it was staged: its publisher had the place by then */
typedef struct board {
    unsigned stop, num_tries, num_acked;            /* atomic */
    unsigned num_looks, num_busy, num_anew, failed; /* atomic */
    char     text[600];                             /* of the first failure */
    unsigned acked[MAX_TRIES], place[MAX_TRIES], after[MAX_TRIES];
} board;

static board *b;
static char   root[200], name[60];
static int    in_memory; /* the place: 0 a directory, 1 shared memory */

static unsigned get(const unsigned *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static void     set(unsigned *p, unsigned v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
static unsigned count(unsigned *p) { return __atomic_fetch_add(p, 1, __ATOMIC_SEQ_CST); }

/* Ends a process for which something is wrong. */
static void fail(const char *format, ...)
{
    va_list args;
    if (count(&b->failed) == 0) {
        va_start(args, format);
        vsnprintf(b->text, sizeof b->text, format, args);
        va_end(args);
    }
    _exit(1);
}

static float value_of(unsigned attempt, size_t i)
{
    return i ? (float)(((uint64_t)attempt * 2654435761u + i * 40503u) >> 8 & 0xffff) : (float)attempt;
}

/* -- a trainer */

typedef struct trainer {
    lorasync_transport t;
    lorasync_image    *image;
    float             *payload;
    unsigned           attempt;
    uint64_t           version;
    char               config[200];
} trainer;

static lorasync_engine *open_place(void)
{
    lorasync_engine_desc desc;
    lorasync_engine     *e = NULL;
    memset(&desc, 0, sizeof desc);
    if (in_memory) desc.shm = name;
    else desc.directory = root;
    desc.adapter = "policy";
    if (lorasync_engine_open(&desc, &e, NULL) < 0) fail("an engine does not open");
    return e;
}

/* The everyday restart: a version above the one that is served. */
static uint64_t served_version(void)
{
    lorasync_engine        *e = open_place();
    const lorasync_adapter *a;
    lorasync_error          err;
    uint64_t                version;
    if (lorasync_engine_poll(e, 0, &err) < 0) fail("a trainer looks at what is served: %s", err.text);
    a       = lorasync_acquire(e, "policy");
    version = a ? a->version : 0;
    lorasync_release(a);
    lorasync_engine_close(e);
    return version;
}

/* In shared memory the place is taken here, in a directory with the first stage. */
static void take_place(trainer *r)
{
    lorasync_error err;
    for (;;) {
        lorasync_shm_desc       shm;
        lorasync_directory_desc directory;
        lorasync_status         status;
        memset(&shm, 0, sizeof shm);
        memset(&directory, 0, sizeof directory);
        shm.name            = name;
        directory.directory = root, directory.no_fsync = 1;
        status = in_memory ? lorasync_shm_open(&shm, &r->t, &err) : lorasync_directory_open(&directory, &r->t, &err);
        if (status == LORASYNC_OK) return;
        if (status != LORASYNC_E_BUSY) fail("a trainer opens its transport: %s", err.text);
        count(&b->num_busy);
        test_sleep_ms(1);
    }
}

static void next_image(trainer *r)
{
    size_t i;
    r->attempt = count(&b->num_tries);
    if (r->attempt >= MAX_TRIES) fail("too many tries");
    for (i = 0; i < r->image->payload_bytes / sizeof(float); i++) r->payload[i] = value_of(r->attempt, i);
    snprintf(r->config, sizeof r->config,
             "{\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":%u,\"target_modules\":[\"q_proj\"]}", r->attempt + 1);
    r->image->config_json = r->config;
    lorasync_image_bind(r->image, r->payload);
}

/* Publishes the image, and notes it. After a refusal the same image is tried again, as another version. */
static void publish_once(trainer *r)
{
    lorasync_error  err;
    lorasync_status status;
    unsigned        n;
    for (;;) {
        lorasync_image_stamp(r->image, r->version + 1, lorasync_image_digest(r->image, NULL));
        status = r->t.stage(r->t.user, r->image, &err);
        if (status >= 0) break;
        if (status != LORASYNC_E_BUSY && status != LORASYNC_E_VERSION) fail("a trainer stages: %s", err.text);
        r->t.abort(r->t.user, "policy", r->version + 1);
        if (status == LORASYNC_E_BUSY) count(&b->num_busy), test_sleep_ms(1);
        else if (r->image->generation) fail("a new generation is refused: %s", err.text);
        else r->version = served_version();
    }
    set(&b->after[r->attempt], get(&b->num_acked));
    if (r->t.commit(r->t.user, "policy", ++r->version, &err) < 0) fail("a trainer commits: %s", err.text);
    n           = get(&b->num_acked); /* one publisher: nobody else counts now */
    b->acked[n] = r->attempt;
    set(&b->place[r->attempt], n + 1);
    set(&b->num_acked, n + 1);
}

static pid_t start_trainer(unsigned long long seed, int anew)
{
    trainer r;
    pid_t   child = fork();
    if (child) return child;
    memset(&r, 0, sizeof r);
    r.image             = lay_out_rank("policy", WIDTH, 4);
    r.payload           = (float *)malloc(r.image->payload_bytes);
    r.image->generation = anew ? test_random(&seed) | 1 : 0;
    take_place(&r);
    if (!anew) r.version = served_version();
    for (;;) {
        next_image(&r);
        publish_once(&r);
        if (anew && r.version == 1) count(&b->num_anew);
    }
}

/* -- an engine */

/* Which try an adapter is, every byte of which is looked at. */
static unsigned read_try(const lorasync_adapter *a, const char *when)
{
    const float *p = (const float *)a->image->payload;
    size_t       i, n = a->image->payload_bytes / sizeof(float);
    unsigned     attempt = p[0] >= 0 && p[0] < (float)MAX_TRIES ? (unsigned)p[0] : (unsigned)MAX_TRIES;
    if (n != 2 * 4 * WIDTH || attempt >= get(&b->num_tries))
        fail("version %d is no image at all (%s)", (int)a->version, when);
    for (i = 0; i < n; i++)
        if (p[i] != value_of(attempt, i)) fail("version %d is mixed (%s)", (int)a->version, when);
    if (lorasync_config_view(a->config)->lora_alpha != (double)attempt + 1)
        fail("version %d has another version's config (%s)", (int)a->version, when);
    return attempt;
}

/* One look: what is served then is nothing older than what had been acknowledged before it. */
static const lorasync_adapter *look(lorasync_engine *e, int timeout_ms)
{
    const unsigned          before = get(&b->num_acked);
    const lorasync_adapter *a;
    lorasync_error          err;
    unsigned                attempt, place;
    if (lorasync_engine_poll(e, timeout_ms, &err) < 0) fail("an engine: %s", err.text);
    count(&b->num_looks);
    a = lorasync_acquire(e, "policy");
    if (!a && before) fail("nothing is served, after %u versions", before);
    if (!a) return NULL;
    attempt = read_try(a, "served");
    place   = get(&b->place[attempt]);
    if (place ? place < before : get(&b->after[attempt]) < before)
        fail("try %u is served (place %u, after %u), and %u had been acknowledged", attempt, place,
             get(&b->after[attempt]), before);
    return a;
}

static pid_t start_engine(unsigned long long seed)
{
    lorasync_engine        *e;
    const lorasync_adapter *pinned  = NULL, *a;
    unsigned                attempt = 0;
    pid_t                   child   = fork();
    if (child) return child;
    e = open_place();
    while (!get(&b->stop)) {
        a = look(e, (int)(test_random(&seed) % 3));
        if (pinned && test_random(&seed) % 4 == 0) {
            if (read_try(pinned, "pinned") != attempt) fail("a pinned version has changed");
            lorasync_release(pinned);
            pinned = NULL;
        }
        if (a && !pinned) pinned = a, attempt = read_try(a, "pinned");
        else lorasync_release(a);
    }
    lorasync_release(pinned);
    lorasync_release(look(e, 0));
    lorasync_engine_close(e);
    _exit(0);
}

/* -- the rounds */

static void end(pid_t child, int is_killed)
{
    int result = 0;
    if (is_killed) kill(child, SIGKILL);
    CHECK_EQ(waitpid(child, &result, 0), child);
    if (!is_killed) CHECK(WIFEXITED(result) && WEXITSTATUS(result) == 0);
}

static void restarts(void)
{
    unsigned long long seed = 11 + (unsigned)in_memory;
    pid_t              trainers[2], engines[2];
    int                i, round;
    memset(b, 0, offsetof(board, acked));
    memset(b->place, 0, sizeof b->place);
    for (i = 0; i < 2; i++) engines[i] = start_engine(test_random(&seed));
    for (i = 0; i < 2; i++) trainers[i] = start_trainer(test_random(&seed), i);
    for (round = 0; round < rounds && !get(&b->failed); round++) {
        const int       which = (int)(test_random(&seed) % 2);
        struct timespec t;
        t.tv_sec  = 0;
        t.tv_nsec = (long)(test_random(&seed) % 12000000);
        nanosleep(&t, NULL);
        end(trainers[which], 1);
        trainers[which] = start_trainer(test_random(&seed), test_random(&seed) % 3 == 0);
        if (round % 8 == 7) end(engines[round / 8 % 2], 1), engines[round / 8 % 2] = start_engine(test_random(&seed));
    }
    for (i = 0; i < 2; i++) end(trainers[i], 1);
    set(&b->stop, 1);
    for (i = 0; i < 2; i++) end(engines[i], 0);
    CHECK_TEXT(b->text, "");
    CHECK(b->num_acked > (unsigned)rounds / 4 && b->num_looks > (unsigned)rounds);
    CHECK(b->num_busy > 0 && b->num_anew > 0);
    printf("%u versions published, %u looks, %u times busy, %u generations begun\n", b->num_acked, b->num_looks,
           b->num_busy, b->num_anew);
}

static void directory(void)
{
    const char *tmp = getenv("TMPDIR");
    char        command[300];
    in_memory = 0;
    snprintf(root, sizeof root, "%.100s/lorasync-restarts-XXXXXX", tmp ? tmp : "/tmp");
    REQUIRE(mkdtemp(root));
    restarts();
    snprintf(command, sizeof command, "rm -rf '%s'", root);
    CHECK_EQ(system(command), 0);
}

static void shared_memory(void)
{
    in_memory = 1;
    snprintf(name, sizeof name, "test-restarts-%ld", (long)getpid());
    restarts();
    CHECK_EQ(lorasync_shm_remove(name, NULL), 0);
}

int main(int argc, char **argv)
{
    if (argc > 1) rounds = atoi(argv[1]);
    b = (board *)mmap(NULL, sizeof *b, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (b == MAP_FAILED) return perror("mmap"), 1;
    RUN(directory);
    RUN(shared_memory);
    return test_summary("test_restarts");
}
