/* Who lives: locks that the kernel drops decide whose places may be taken. Processes are killed, stopped, forked, run
   other programs, and live in other pid and time namespaces; none that lives may lose what it has, and nothing of a
   dead one may be kept. */
#if !defined(_GNU_SOURCE) && !defined(__APPLE__)
#define _GNU_SOURCE 1 /* unshare */
#endif
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include "test.h"
#include "published.h"

#include <pthread.h>
#include <sys/wait.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* -- people: processes that do what they are told, a letter at a time, and answer with another */

typedef enum place {
    HERE,
    OTHER_PIDS, /* a pid namespace of its own: getpid() is 1 */
    OTHER_TIME, /* a time namespace whose clocks are hours ahead: other start times in /proc */
    NUM_PLACES
} place;

typedef struct person {
    pid_t pid, child; /* as this process sees it; child: to wait for */
    int   to, from;
} person;

static char        name[64];    /* of the shared memory */
static const char *trade;       /* what a person does: see live */
static pid_t       test_pid;    /* of the whole test */
static pid_t      *last_helper; /* shared: whom a person has forked */

static void fresh_name(void)
{
    static int number;
    if (name[0]) lorasync_shm_remove(name, NULL);
    snprintf(name, sizeof name, "lives-%ld-%d", (long)getpid(), number++);
}

/* 0 when the system does not let us. The next fork is in the new place. */
static int move_to(place where)
{
#if defined(__linux__)
    const int flag = where == OTHER_PIDS ? 0x20000000 : 0x80; /* CLONE_NEWPID, CLONE_NEWTIME */
    int       fd, ok;
    if (unshare(flag) != 0 && unshare(flag | 0x10000000) != 0) return 0; /* CLONE_NEWUSER: for who is not root */
    if (where == OTHER_PIDS) return 1;
    fd = open("/proc/self/timens_offsets", O_WRONLY);
    ok = fd >= 0 && write(fd, "monotonic 7200 0\nboottime 7200 0\n", 33) == 33;
    close(fd);
    return ok;
#else
    return where == HERE;
#endif
}

static void live(int from, int to);

/* One more process. pid is 0 where that place cannot be had. */
static person start(place where, const char *does)
{
    person p;
    int    to[2], from[2], told[2];
    memset(&p, 0, sizeof p);
    trade = does;
    if (pipe(to) != 0 || pipe(from) != 0 || pipe(told) != 0) exit(1);
    fflush(NULL);
    p.child = fork();
    if (p.child == 0) {
        pid_t pid = getpid();
        close(to[1]), close(from[0]), close(told[0]);
        if (where != HERE) pid = move_to(where) ? fork() : -1;
        if (where == HERE || pid == 0) {
            if (pid && write(told[1], &pid, sizeof pid) != sizeof pid) _exit(1);
            close(told[1]);
            live(to[0], from[1]);
        }
        close(to[0]), close(from[1]);
        if (write(told[1], &pid, sizeof pid) != sizeof pid) _exit(1);
        if (pid > 0) waitpid(pid, NULL, 0);
        _exit(0);
    }
    close(to[0]), close(from[1]), close(told[1]);
    p.to = to[1], p.from = from[0];
    if (read(told[0], &p.pid, sizeof p.pid) != sizeof p.pid || p.pid < 0) p.pid = 0;
    close(told[0]);
    return p;
}

static char tell(const person *p, char what)
{
    char answer = 0;
    if (write(p->to, &what, 1) != 1 || read(p->from, &answer, 1) != 1) return 0;
    return answer;
}

/* Kills it; it is a zombie, or gone, afterwards. */
static void kill_person(person *p)
{
    siginfo_t info;
    if (!p->pid) return;
    kill(p->pid, SIGKILL);
    while (waitid(P_PID, (id_t)p->child, &info, WEXITED | WNOWAIT) < 0 && errno == EINTR) {}
    p->pid = 0;
}

static void forget(person *p)
{
    if (p->pid) kill_person(p);
    while (waitpid(p->child, NULL, 0) < 0 && errno == EINTR) {}
    close(p->to), close(p->from);
}

static void drop_helper(void)
{
    if (*last_helper) kill(*last_helper, SIGKILL);
    *last_helper = 0;
}

/* -- trades */

/* Of version v every byte of the payload is v. */
static lorasync_status publish(lorasync_transport *t, uint64_t version, lorasync_error *err)
{
    lorasync_image *image   = lay_out_rank("default", 64, 4);
    void           *payload = malloc(image->payload_bytes);
    lorasync_status status;
    memset(payload, (int)version, image->payload_bytes);
    lorasync_image_bind(image, payload);
    lorasync_image_stamp(image, version, lorasync_image_digest(image, NULL));
    status = put(t, image, err);
    drop_image(image);
    return status;
}

static lorasync_status open_publisher(lorasync_transport *t, lorasync_error *err)
{
    lorasync_shm_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.name = name;
    return lorasync_shm_open(&desc, t, err);
}

static int is_whole(const lorasync_adapter *a)
{
    const char *p = (const char *)a->image->payload;
    size_t      i = 0;
    while (i < a->image->payload_bytes && p[i] == (char)a->version) i++;
    return i == a->image->payload_bytes;
}

static char says(int is) { return is ? 'y' : 'n'; }

/* What every trade knows: fork a helper that outlives it, run another program in this process, close what others
   cannot name. */
static char do_common(char what, int from, int to)
{
    char in[12], out[12], test[12];
    int  fd;
    switch (what) {
    case 'h':
        *last_helper = fork();
        if (*last_helper == 0)
            while (kill(test_pid, 0) == 0) test_sleep_ms(20); /* it does not outlive the test */
        if (*last_helper == 0) _exit(0);
        return says(*last_helper > 0);
    case 'x':
        snprintf(in, sizeof in, "%d", from), snprintf(out, sizeof out, "%d", to);
        snprintf(test, sizeof test, "%ld", (long)test_pid);
        execl("/proc/self/exe", "test_lives", trade, name, in, out, test, (char *)0);
        return 'n';
    case 'd': /* as daemons do */
        for (fd = 3; fd < 256; fd++)
            if (fd != from && fd != to) close(fd);
        return 'y';
    default: return '?';
    }
}

/* o: opens; y, b for busy, or n    p: publishes the next version    c: closes */
static void live_publisher(int from, int to)
{
    static uint64_t    version; /* the last one */
    lorasync_transport t;
    lorasync_error     err;
    char               what, answer;
    for (;;) {
        if (read(from, &what, 1) != 1) _exit(0);
        switch (what) {
        case 'o':
            answer = open_publisher(&t, &err) == 0 ? 'y' : err.status == LORASYNC_E_BUSY ? 'b' : 'n';
            if (answer == 'b' && strstr(err.text, "this very process")) answer = 't';
            break;
        case 'p': answer = says(publish(&t, ++version, &err) == 0); break;
        case 'c': t.close(t.user), answer = 'y'; break;
        default: answer = do_common(what, from, to);
        }
        if (write(to, &answer, 1) != 1) _exit(0);
    }
}

/* o: opens an engine and holds what is served; y or n    v: is what it holds whole?    c: closes it */
static void live_reader(int from, int to)
{
    lorasync_engine        *e = NULL;
    const lorasync_adapter *a = NULL;
    char                    what, answer;
    for (;;) {
        if (read(from, &what, 1) != 1) _exit(0);
        switch (what) {
        case 'o':
            e      = open_shm_engine(name, NULL, 0, 0);
            answer = says(lorasync_engine_poll(e, 0, NULL) == 0 && (a = lorasync_acquire(e, "default")) != NULL);
            break;
        case 'v': answer = says(is_whole(a)); break;
        case 'c': lorasync_release(a), lorasync_engine_close(e), answer = 'y'; break;
        default: answer = do_common(what, from, to);
        }
        if (write(to, &answer, 1) != 1) _exit(0);
    }
}

static lorasync_local *ranks; /* made before anybody is started */

/* o: joins as rank 1    r: waits for what the other never sends: y when it is known to be gone, t for too late
   f: forks who goes on as rank 0 */
static void live_rank(int from, int to)
{
    int              me = 1;
    lorasync_comm    c;
    lorasync_message m;
    lorasync_error   err;
    char             what, answer, data[8];
    for (;;) {
        if (read(from, &what, 1) != 1) _exit(0);
        switch (what) {
        case 'o': answer = says(lorasync_local_join(ranks, me, &c, &err) == 0); break;
        case 'r':
            m.peer = !me, m.data = data, m.num_bytes = sizeof data;
            c.exchange(c.user, NULL, 0, &m, 1, 200, &err);
            answer = err.status == LORASYNC_E_PEER ? 'y' : 't';
            break;
        case 'f':
            *last_helper = fork();
            if (*last_helper)
                for (;;) pause();
            *last_helper = getpid(), me = 0, answer = 'y';
            break;
        case 'c': lorasync_local_close(ranks), answer = 'y'; break;
        default: answer = do_common(what, from, to);
        }
        if (write(to, &answer, 1) != 1) _exit(0);
    }
}

static void live(int from, int to)
{
    if (strcmp(trade, "publisher") == 0) live_publisher(from, to);
    if (strcmp(trade, "reader") == 0) live_reader(from, to);
    if (strcmp(trade, "rank") == 0) live_rank(from, to);
    _exit(1);
}

/* -- the lock itself */

static int a_file(void)
{
    int fd = lorasynci_file_for_lives();
    if (fd < 0) exit(1);
    return fd;
}

static void one_life_a_byte(void)
{
    lorasynci_life a, b, c;
    int            fd = a_file(), i;
    uint64_t       me = lorasynci_process_self();
    CHECK_EQ(lorasynci_process_pid(me), (long)getpid());
    CHECK(!(me & lorasynci_process_unlocked) && lorasynci_process_self() == me);
    CHECK_EQ(lorasynci_process_lives(me, fd, 3), 0);
    CHECK(lorasynci_life_begin(&a, lorasynci_reopen(fd), fd, 3) == me);
    CHECK_EQ(lorasynci_process_lives(me, fd, 3), 1);
    CHECK_EQ(lorasynci_process_lives(me, fd, 2), 0);
    CHECK_EQ(lorasynci_process_lives(me, fd, 4), 0);
    CHECK_EQ(lorasynci_life_begin(&b, lorasynci_reopen(fd), fd, 3), 0); /* also of the same process */
    CHECK(lorasynci_life_begin_at(&b, fd, 3) == (me | lorasynci_process_unlocked) && !b.page);
    CHECK(lorasynci_life_begin(&c, lorasynci_reopen(fd), fd, INT64_C(0x0fffffffffffffff)) == me);
    for (i = 0; i < 3; i++) close(lorasynci_reopen(fd)); /* with locks of POSIX this would end it */
    lorasynci_life_end(&b);
    lorasynci_life_end(&c);
    CHECK_EQ(lorasynci_process_lives(me, fd, 3), 1);
    lorasynci_life_end(&a);
    lorasynci_life_end(&a);
    CHECK_EQ(lorasynci_process_lives(me, fd, 3), 0);
    close(fd);
}

/* Where there are no locks everybody lives. */
static void in_doubt(void)
{
    lorasynci_life life;
    uint64_t       me = lorasynci_process_self();
    int            fd = a_file();
    CHECK(lorasynci_life_begin(&life, -1, fd, 3) == (me | lorasynci_process_unlocked));
    CHECK_EQ(lorasynci_process_lives(me | lorasynci_process_unlocked, fd, 3), 1);
    lorasynci_life_end(&life);
    CHECK_EQ(lorasynci_process_lives(me, -1, 3), 1); /* cannot be asked */
    close(fd);
}

static void *close_all(void *user)
{
    int fd;
    for (fd = 3; fd < 64; fd++)
        if (fd != *(int *)user) close(fd);
    return NULL;
}

/* A thread closes every descriptor; a fork ends its copy, closes everything, ends. */
static void closed_elsewhere(void)
{
    lorasynci_life life;
    pthread_t      thread;
    pid_t          child;
    int            fd = a_file();
    uint64_t       me = lorasynci_life_begin(&life, lorasynci_reopen(fd), fd, 0);
    pthread_create(&thread, NULL, close_all, &fd);
    pthread_join(thread, NULL);
    CHECK_EQ(lorasynci_process_lives(me, fd, 0), 1);
    fflush(NULL);
    child = fork();
    if (child == 0) {
        int none = -1, bad = lorasynci_process_lives(me, fd, 0) != 1;
        lorasynci_life_end(&life); /* the parent's */
        bad |= (lorasynci_process_lives(me, fd, 0) != 1) * 2;
        bad |= (lorasynci_process_self() == me) * 4;
        close_all(&none);
        _exit(bad);
    }
    {
        int result = 0;
        CHECK(waitpid(child, &result, 0) == child && WIFEXITED(result) && WEXITSTATUS(result) == 0);
    }
    CHECK_EQ(lorasynci_process_lives(me, fd, 0), 1);
    lorasynci_life_end(&life);
    CHECK_EQ(lorasynci_process_lives(me, fd, 0), 0);
    close(fd);
}

/* -- shared memory */

/* A reader that lives keeps its bytes, wherever it and the publisher are; one that is killed keeps nothing. */
static void pinned(place publisher, place reader)
{
    person p, r;
    int    i, there;
    fresh_name();
    p = start(publisher, "publisher"), r = start(reader, "reader");
    there = p.pid && r.pid;
    if (there) {
        lorasynci_shm_map map;
        CHECK_EQ(tell(&p, 'o'), 'y');
        CHECK_EQ(tell(&p, 'p'), 'y');
        CHECK_EQ(tell(&r, 'o'), 'y');
        for (i = 0; i < 8; i++) CHECK_EQ(tell(&p, 'p'), 'y');
        CHECK_EQ(tell(&p, 'c'), 'y');
        CHECK_EQ(tell(&p, 'o'), 'y'); /* opening looks for the dead */
        for (i = 0; i < 8; i++) CHECK_EQ(tell(&p, 'p'), 'y');
        CHECK_EQ(tell(&r, 'v'), 'y');
        kill(r.pid, SIGSTOP);
        CHECK_EQ(tell(&p, 'c'), 'y');
        CHECK_EQ(tell(&p, 'o'), 'y');
        for (i = 0; i < 8; i++) CHECK_EQ(tell(&p, 'p'), 'y');
        kill(r.pid, SIGCONT);
        CHECK_EQ(tell(&r, 'v'), 'y');
        REQUIRE(lorasynci_shm_attach(name, 0, &map, NULL) == LORASYNC_OK);
        CHECK(map.control->readers[0].owner != 0);
        kill_person(&r);
        CHECK_EQ(tell(&p, 'c'), 'y');
        CHECK_EQ(tell(&p, 'o'), 'y');
        CHECK(map.control->readers[0].owner == 0);
        lorasynci_shm_detach(&map);
        kill_person(&p);
    }
    if (!there) test_skip_reason = "this system makes no such namespace";
    forget(&p), forget(&r);
}

static void pinned_here(void) { pinned(HERE, HERE); }
static void pinned_in_other_time(void) { pinned(HERE, OTHER_TIME), pinned(OTHER_TIME, HERE); }
static void pinned_in_other_pids(void) { pinned(HERE, OTHER_PIDS), pinned(OTHER_PIDS, OTHER_PIDS); }

/* A publisher that lives, or is stopped, keeps its place; one that is killed loses it at once, whoever it has
   forked. */
static void one_publisher(place first, place second)
{
    person a, b;
    int    there;
    fresh_name();
    a = start(first, "publisher"), b = start(second, "publisher");
    there = a.pid && b.pid;
    if (there) {
        CHECK_EQ(tell(&a, 'o'), 'y');
        CHECK_EQ(tell(&b, 'o'), 'b');
        CHECK_EQ(tell(&a, 'o'), 't');
        kill(a.pid, SIGSTOP);
        CHECK_EQ(tell(&b, 'o'), 'b');
        kill(a.pid, SIGCONT);
        CHECK_EQ(tell(&a, 'd'), 'y'); /* not even its own descriptors count */
        CHECK_EQ(tell(&b, 'o'), 'b');
        CHECK_EQ(tell(&a, 'h'), 'y');
        kill_person(&a);
        CHECK_EQ(tell(&b, 'o'), 'y');
        CHECK_EQ(tell(&b, 'p'), 'y');
        kill_person(&b);
        if (first != OTHER_PIDS) drop_helper(); /* there it ends with its first process */
    }
    if (!there) test_skip_reason = "this system makes no such namespace";
    forget(&a), forget(&b);
}

static void one_publisher_here(void) { one_publisher(HERE, HERE); }
static void one_publisher_in_other_time(void) { one_publisher(OTHER_TIME, HERE), one_publisher(HERE, OTHER_TIME); }
static void one_publisher_in_other_pids(void) { one_publisher(OTHER_PIDS, OTHER_PIDS); }

/* A process that runs another program has left: pid and start time stay the same. */
static void exec_in_place(void)
{
    person            p, r;
    lorasynci_shm_map map;
    int               i, num = 0;
    fresh_name();
    p = start(HERE, "publisher"), r = start(HERE, "reader");
    for (i = 0; i < 3; i++) {
        CHECK_EQ(tell(&p, 'o'), 'y');
        CHECK_EQ(tell(&p, 'h'), 'y'); /* a helper of the program before */
        CHECK_EQ(tell(&p, 'x'), 'y');
        drop_helper();
    }
    CHECK_EQ(tell(&p, 'o'), 'y');
    CHECK_EQ(tell(&p, 'p'), 'y');
    for (i = 0; i < 5; i++) {
        CHECK_EQ(tell(&r, 'o'), 'y');
        CHECK_EQ(tell(&r, 'x'), 'y');
    }
    REQUIRE(lorasynci_shm_attach(name, 0, &map, NULL) == LORASYNC_OK);
    for (i = 0; i < LORASYNCI_SHM_READERS; i++) num += map.control->readers[i].owner != 0;
    CHECK_EQ(num, 1); /* the place of the one before is taken again */
    lorasynci_shm_detach(&map);
    kill_person(&p), kill_person(&r);
    forget(&p), forget(&r);
}

/* Engines of one process have a place each. */
static void two_engines(void)
{
    lorasync_transport      t;
    lorasync_engine        *e[2];
    const lorasync_adapter *a[2];
    lorasync_error          err;
    uint64_t                v;
    int                     i;
    fresh_name();
    CHECK_EQ(open_publisher(&t, &err), 0);
    for (i = 0; i < 2; i++) {
        CHECK_EQ(publish(&t, (uint64_t)i + 1, &err), 0);
        e[i] = open_shm_engine(name, NULL, 0, 0);
        CHECK_EQ(lorasync_engine_poll(e[i], 0, &err), 0);
        a[i] = lorasync_acquire(e[i], "default");
        REQUIRE(a[i]);
    }
    CHECK(((lorasynci_shm *)t.user)->map.control->readers[1].owner != 0);
    lorasync_release(a[0]);
    lorasync_engine_close(e[0]); /* and with it descriptors of the same file */
    for (v = 3; v < 12; v++) CHECK_EQ(publish(&t, v, &err), 0);
    t.close(t.user);
    CHECK_EQ(open_publisher(&t, &err), 0);
    for (; v < 20; v++) CHECK_EQ(publish(&t, v, &err), 0);
    CHECK(is_whole(a[1]));
    CHECK_EQ(a[1]->version, 2);
    lorasync_release(a[1]);
    lorasync_engine_close(e[1]);
    t.close(t.user);
}

/* Between the publisher's look at a reader's word and its taking away, the reader closes and another engine of that
   process takes the place: it keeps it. */
static void came_back(void)
{
    lorasync_transport    t;
    lorasync_engine      *e;
    lorasync_error        err;
    lorasynci_shm_reader *r;
    uint64_t              owner;
    fresh_name();
    CHECK_EQ(open_publisher(&t, &err), 0);
    CHECK_EQ(publish(&t, 1, &err), 0);
    r = &((lorasynci_shm *)t.user)->map.control->readers[0];
    e = open_shm_engine(name, NULL, 0, 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    owner = r->owner;
    lorasync_engine_close(e);
    CHECK(r->owner == 0);
    e = open_shm_engine(name, NULL, 0, 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK(r->owner == owner);
    CHECK_EQ(lorasynci_shm_reader_lives((lorasynci_shm *)t.user, 0, owner), 1);
    CHECK(r->owner == owner);
    lorasync_engine_close(e);
    r->owner = owner; /* as if killed */
    CHECK_EQ(lorasynci_shm_reader_lives((lorasynci_shm *)t.user, 0, owner), 0);
    CHECK(r->owner == 0);
    e = open_shm_engine(name, NULL, 0, 0); /* the lock was given back */
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK(r->owner == owner);
    lorasync_engine_close(e);
    t.close(t.user);
}

/* A place whose owner had no lock is never taken: nothing says whether it lives. */
static void places_without_a_lock(void)
{
    lorasync_transport     t, second;
    lorasync_engine       *e;
    lorasync_error         err;
    lorasynci_shm_control *c;
    uint64_t               other = UINT64_C(4000000) << 40 | lorasynci_process_unlocked | 5;
    lorasynci_shm_map      map;
    fresh_name();
    CHECK_EQ(open_publisher(&t, &err), 0);
    CHECK_EQ(publish(&t, 1, &err), 0);
    c                     = ((lorasynci_shm *)t.user)->map.control;
    c->readers[0].owner   = other;
    c->readers[0].pins[0] = 1;
    e                     = open_shm_engine(name, NULL, 0, 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    lorasynci_shm_bury((lorasynci_shm *)t.user);
#if defined(__linux__)
    CHECK(c->readers[0].owner == other && c->readers[1].owner != 0);
#endif
    REQUIRE(lorasynci_shm_attach(name, 0, &map, NULL) == LORASYNC_OK);
    t.close(t.user);
    map.control->publisher = other;
#if defined(__linux__)
    CHECK_EQ(open_publisher(&second, &err), LORASYNC_E_BUSY);
    CHECK_HAS(err.text, "process 4000000, of which this system cannot tell whether it has ended");
#endif
    map.control->publisher = other & ~lorasynci_process_unlocked;
    CHECK_EQ(open_publisher(&second, &err), 0);
    lorasynci_shm_detach(&map);
    lorasync_engine_close(e);
    second.close(second.user);
}

/* -- ranks of one host */

/* How a rank ends, or does not. */
static void rank_ends(place where, const char *how, lorasync_status expected)
{
    lorasync_comm    c;
    lorasync_message m;
    lorasync_error   err;
    person           p;
    char             data[8];
    int              there;
    REQUIRE(lorasync_local_open(2, &ranks, &err) == 0);
    p     = start(where, "rank");
    there = p.pid != 0;
    CHECK_EQ(lorasync_local_join(ranks, 0, &c, &err), 0);
    if (there) {
        CHECK_EQ(tell(&p, 'o'), 'y');
        for (; *how; how++) {
            if (*how == 'k') kill_person(&p);
            else if (*how == 's') kill(p.pid, SIGSTOP);
            else CHECK_EQ(tell(&p, *how), 'y');
        }
        m.peer = 1, m.data = data, m.num_bytes = sizeof data;
        CHECK_EQ(c.exchange(c.user, NULL, 0, &m, 1, expected == LORASYNC_E_TIMEOUT ? 100 : test_ms(5000), &err),
                 expected);
        if (expected == LORASYNC_E_PEER) CHECK_HAS(err.text, "is gone");
        kill_person(&p); /* also one that is stopped */
        drop_helper();
    }
    lorasync_local_close(ranks);
    if (!there) test_skip_reason = "this system makes no such namespace";
    forget(&p);
}

static void ranks_here(void)
{
    rank_ends(HERE, "", LORASYNC_E_TIMEOUT);
    rank_ends(HERE, "s", LORASYNC_E_TIMEOUT);
    rank_ends(HERE, "d", LORASYNC_E_TIMEOUT);
    rank_ends(HERE, "k", LORASYNC_E_PEER);
    rank_ends(HERE, "hk", LORASYNC_E_PEER);
    rank_ends(HERE, "x", LORASYNC_E_PEER);
    rank_ends(HERE, "c", LORASYNC_E_PEER);
}

static void ranks_in_other_time(void)
{
    rank_ends(OTHER_TIME, "", LORASYNC_E_TIMEOUT);
    rank_ends(OTHER_TIME, "k", LORASYNC_E_PEER);
}

static void ranks_in_other_pids(void)
{
    rank_ends(OTHER_PIDS, "", LORASYNC_E_TIMEOUT);
    rank_ends(OTHER_PIDS, "k", LORASYNC_E_PEER);
}

/* A rank that was forked by another one does not keep that alive. */
static void forked_by_a_rank(void)
{
    lorasync_error err;
    person         p;
    siginfo_t      info;
    REQUIRE(lorasync_local_open(2, &ranks, &err) == 0);
    p = start(HERE, "rank");
    CHECK_EQ(tell(&p, 'o'), 'y');
    CHECK_EQ(tell(&p, 'f'), 'y'); /* from here the fork answers */
    CHECK_EQ(tell(&p, 'o'), 'y');
    CHECK_EQ(tell(&p, 'r'), 't');
    kill(p.pid, SIGKILL);
    while (waitid(P_PID, (id_t)p.child, &info, WEXITED | WNOWAIT) < 0 && errno == EINTR) {}
    CHECK_EQ(tell(&p, 'r'), 'y');
    drop_helper();
    forget(&p);
    lorasync_local_close(ranks);
}

int main(int argc, char **argv)
{
    last_helper = (pid_t *)mmap(NULL, sizeof *last_helper, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    test_pid    = argc == 6 ? (pid_t)atol(argv[5]) : getpid();
    if (argc == 6) { /* see do_common: the same trade in another program */
        int  from = atoi(argv[3]), to = atoi(argv[4]);
        char yes = 'y';
        trade    = argv[1];
        snprintf(name, sizeof name, "%s", argv[2]);
        if (write(to, &yes, 1) != 1) return 1;
        live(from, to);
    }
    signal(SIGPIPE, SIG_IGN);
    RUN(one_life_a_byte);
    RUN(in_doubt);
    RUN(closed_elsewhere);
    RUN(pinned_here);
    RUN(pinned_in_other_time);
    RUN(pinned_in_other_pids);
    RUN(one_publisher_here);
    RUN(one_publisher_in_other_time);
    RUN(one_publisher_in_other_pids);
    RUN(exec_in_place);
    RUN(two_engines);
    RUN(came_back);
    RUN(places_without_a_lock);
    RUN(ranks_here);
    RUN(ranks_in_other_time);
    RUN(ranks_in_other_pids);
    RUN(forked_by_a_rank);
    fresh_name();
    return test_summary("test_lives");
}
