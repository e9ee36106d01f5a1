/* Tests of the rooms publish and engine: two-phase publishing, the directory transport, polling, pinning, and what is
   left after a kill. */
#if !defined(_POSIX_C_SOURCE) && !defined(_GNU_SOURCE) && !defined(__APPLE__)
#define _POSIX_C_SOURCE 200809L
#define _DEFAULT_SOURCE 1
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Every system call of the library that touches the disk is a step. The step that step_at counts down to fails with
   EIO, or ends the process. */
static long step_at;
static int  step_ends;

static int test_step(void)
{
    if (!step_at || --step_at) return 0;
    if (step_ends) _exit(77);
    errno = EIO;
    return 1;
}

/* What a file system may refuse for good: each call of that kind fails with this errno; 0: it does not. */
static int no_links, no_locks, no_maps, no_directory_sync, no_file_sync;
static int no_reads; /* 1: files end where reading begins */
/* Called when a link is made, once. */
static void (*at_link)(void);

static int test_link(void)
{
    void (*call)(void) = at_link;
    at_link            = NULL;
    if (call) call();
    return 0;
}

static int refuse(int reason)
{
    errno = reason;
    return reason != 0;
}

static int refuse_sync(int fd)
{
    struct stat st;
    return fstat(fd, &st) == 0 && refuse(S_ISDIR(st.st_mode) ? no_directory_sync : no_file_sync);
}

/* What makes a version durable, in order: each line "write FILE" (once for all bytes of a file), "fsync FILE" or
   "rename FROM TO", if a test asks for it. */
static char   durable[4096];
static size_t num_durable;
static int    notes_durable;

static int note(const char *what, const char *name, const char *to)
{
    char   line[1200];
    size_t n;
    if (!notes_durable) return 0;
    n = (size_t)snprintf(line, sizeof line, "%s %.500s%s%.500s\n", what, name, to ? " " : "", to ? to : "");
    if (num_durable >= n && memcmp(durable + num_durable - n, line, n) == 0 && what[0] == 'w') return 0;
    if (n >= sizeof durable - num_durable) return 0;
    memcpy(durable + num_durable, line, n + 1);
    num_durable += n;
    return 0;
}

static int note_fd(const char *what, int fd)
{
    char    link[64], path[1000];
    ssize_t n;
    if (!notes_durable) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    n                   = readlink(link, path, sizeof path - 1);
    path[n < 0 ? 0 : n] = 0;
    return note(what, path, NULL);
}

#define openat(...) (test_step() ? -1 : openat(__VA_ARGS__))
#define mkdirat(...) (test_step() ? -1 : mkdirat(__VA_ARGS__))
#define write(fd, ...) (note_fd("write", fd), test_step() ? -1 : write(fd, __VA_ARGS__))
#define read(...) (test_step() ? -1 : no_reads ? 0 : read(__VA_ARGS__))
#define pwrite(fd, ...) (note_fd("write", fd), test_step() ? -1 : pwrite(fd, __VA_ARGS__))
#define flock(...) (test_step() || refuse(no_locks) ? -1 : flock(__VA_ARGS__))
#define fsync(fd) (note_fd("fsync", fd), test_step() || refuse_sync(fd) ? -1 : fsync(fd))
#define fstatat(...) (test_step() ? -1 : fstatat(__VA_ARGS__))
#define readlinkat(...) (test_step() ? -1 : readlinkat(__VA_ARGS__))
#define symlinkat(...) (test_link() || test_step() || refuse(no_links) ? -1 : symlinkat(__VA_ARGS__))
#define renameat(from_fd, from, to_fd, to)                                                                             \
    (note("rename", from, to), test_step() ? -1 : renameat(from_fd, from, to_fd, to))
#define unlinkat(...) (test_step() ? -1 : unlinkat(__VA_ARGS__))
#define mmap(...) (test_step() || refuse(no_maps) ? MAP_FAILED : mmap(__VA_ARGS__))

#define LORASYNC_STATIC
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include "test.h"
#include "published.h"

#include <pthread.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* Publishes to all of the transports or to none, as a session without quorum does. */
static lorasync_status publish_to_all(const lorasync_transport *given, size_t num, const lorasync_image *image,
                                      int *out_num, lorasync_error *err)
{
    lorasync_transport      t[4];
    lorasync_engine_outcome o[4];
    lorasynci_publication   p;
    lorasync_status         status;
    size_t                  i;
    memset(&p, 0, sizeof p);
    for (i = 0; i < num; i++) {
        if (lorasynci_transport_copy(&given[i], &t[i], err) < 0) return LORASYNC_E_ARGUMENT;
        o[i] = lorasynci_new_outcome(&t[i]);
    }
    p.transports = t;
    p.outcomes   = o;
    p.num = p.need = num;
    p.image        = image;
    status         = lorasynci_publish(&p, err);
    *out_num       = p.num_new;
    return status;
}

/* -- a folder of its own for each test */

static char root[200];

static void remove_tree(const char *path)
{
    DIR           *list = opendir(path);
    struct dirent *entry;
    if (!list) {
        unlink(path);
        return;
    }
    while ((entry = readdir(list)) != NULL) {
        char        below[1500];
        struct stat st;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        snprintf(below, sizeof below, "%.1000s/%.300s", path, entry->d_name);
        if (lstat(below, &st) == 0 && S_ISDIR(st.st_mode)) remove_tree(below);
        else unlink(below);
    }
    closedir(list);
    rmdir(path);
}

static void fresh_root(void)
{
    const char *tmp = getenv("TMPDIR");
    if (root[0]) remove_tree(root);
    snprintf(root, sizeof root, "%.100s/lorasync-test-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(root)) {
        perror(root);
        exit(1);
    }
}

/* A path below root. Lives until the 8th call after. */
static const char *at(const char *format, ...)
{
    static char paths[8][600];
    static int  next;
    va_list     args;
    size_t      n;
    next = (next + 1) % 8;
    n    = (size_t)snprintf(paths[next], sizeof paths[next], "%s/", root);
    va_start(args, format);
    vsnprintf(paths[next] + n, sizeof paths[next] - n, format, args);
    va_end(args);
    return paths[next];
}

static int there(const char *path)
{
    struct stat st;
    return lstat(path, &st) == 0;
}

static void write_text(const char *path, const void *bytes, size_t num_bytes)
{
    FILE *f = fopen(path, "wb");
    CHECK(f != NULL);
    if (!f) return;
    CHECK_EQ(fwrite(bytes, 1, num_bytes, f), num_bytes);
    fclose(f);
}

static void write_string(const char *path, const char *text) { write_text(path, text, strlen(text)); }

/* Names in a directory; ".", "..", .lock, which stays for ever, and what its readers leave there are not counted. */
static int count_names(const char *path)
{
    DIR           *list = opendir(path);
    struct dirent *entry;
    int            num = 0;
    if (!list) return -1;
    while ((entry = readdir(list)) != NULL)
        num += strcmp(entry->d_name, ".lock") != 0 && strcmp(entry->d_name, ".receipts") != 0;
    closedir(list);
    return num - 2;
}

/* The path of the one working name in a's directory that begins so; "" when there is none. */
static const char *working(const char *adapter, const char *begin)
{
    DIR           *list = opendir(at("%s", adapter));
    struct dirent *entry;
    const char    *found = "";
    while (list && (entry = readdir(list)) != NULL)
        if (strncmp(entry->d_name, begin, strlen(begin)) == 0) found = at("%s/%s", adapter, entry->d_name);
    if (list) closedir(list);
    return found;
}

/* -- images whose every byte follows from version and seed */

static unsigned char expected_byte(uint64_t version, int seed, size_t i)
{
    unsigned long long state = version * 1000003u + (unsigned)seed * 7919u + i / 8;
    return (unsigned char)(test_random(&state) >> (8 * (i % 8)) & 0x3f); /* small: no NaN */
}

static lorasync_image *make_image(const char *adapter, uint64_t version, int seed, size_t width)
{
    lorasync_image *image   = lay_out_rank(adapter, width, 4);
    unsigned char  *payload = (unsigned char *)malloc(image->payload_bytes);
    size_t          i;
    for (i = 0; i < image->payload_bytes; i++) payload[i] = expected_byte(version, seed, i);
    lorasync_image_bind(image, payload);
    if (adapter) lorasync_image_stamp(image, version, lorasync_image_digest(image, NULL));
    return image;
}

/* The number of wrong bytes in what a reader sees; -1 for a wrong shape. */
static long wrong_bytes(const lorasync_adapter *a, int seed)
{
    const lorasync_tensor *first, *second;
    const unsigned char   *p;
    size_t                 i;
    long                   wrong = 0;
    if (!a) return -1;
    first  = lorasync_find(a, KEY_A);
    second = lorasync_find(a, KEY_B);
    if (!first || !second || a->image->num_tensors != 2 || lorasync_config_view(a->config)->r != 4) return -1;
    p = (const unsigned char *)a->image->payload;
    for (i = 0; i < a->image->payload_bytes; i++) wrong += p[i] != expected_byte(a->version, seed, i);
    return wrong;
}

/* -- shorthands */

static lorasync_transport open_directory(int keep, int no_fsync)
{
    lorasync_directory_desc desc;
    lorasync_transport      t;
    memset(&desc, 0, sizeof desc);
    memset(&t, 0, sizeof t);
    desc.directory     = root;
    desc.keep_versions = keep;
    desc.no_fsync      = no_fsync;
    CHECK_EQ(lorasync_directory_open(&desc, &t, NULL), 0);
    return t;
}

static lorasync_status publish_seed(lorasync_transport *t, const char *adapter, uint64_t version, int seed,
                                    lorasync_error *err)
{
    lorasync_image *image = make_image(adapter, version, seed, 64);
    int             num   = -1;
    lorasync_status status;
    status = publish_to_all(t, 1, image, &num, err);
    CHECK_EQ(num, status == 0);
    drop_image(image);
    return status;
}

static lorasync_status publish(lorasync_transport *t, const char *adapter, uint64_t version, lorasync_error *err)
{
    return publish_seed(t, adapter, version, 0, err);
}

static lorasync_engine *open_engine(const char *adapter)
{
    lorasync_engine_desc desc;
    lorasync_engine     *e = NULL;
    memset(&desc, 0, sizeof desc);
    desc.directory = root;
    desc.adapter   = adapter;
    CHECK_EQ(lorasync_engine_open(&desc, &e, NULL), 0);
    return e;
}

static uint64_t served(lorasync_engine *e, const char *adapter)
{
    const lorasync_adapter *a = lorasync_acquire(e, adapter);
    uint64_t                v = a ? a->version : 0;
    if (a) CHECK_EQ(wrong_bytes(a, 0), 0);
    lorasync_release(a);
    return v;
}

static void read_link(const char *path, char out[100])
{
    ssize_t n          = readlink(path, out, 99);
    out[n < 0 ? 0 : n] = 0;
}

/* -- the directory transport */

static void files(void)
{
    lorasync_transport t;
    lorasync_image    *image;
    lorasync_error     err;
    struct stat        st;
    char              *bytes, target[100];
    size_t             n = 0;
    int                num;
    mode_t             old = umask(0027);
    fresh_root();
    rmdir(root);
    t     = open_directory(0, 0);
    image = make_image("default", 7, 0, 64);
    CHECK_TEXT(t.name, root);
    CHECK(!there(root));
    CHECK_EQ(t.stage(t.user, image, &err), 0);
    CHECK(!there(at("default/latest")));
    CHECK(!there(at("default/v7")));
    CHECK_EQ(t.commit(t.user, "default", 7, &err), 0);
    read_link(at("default/latest"), target);
    CHECK_TEXT(target, "v7");
    CHECK_EQ(count_names(at("default")), 2);
    CHECK_EQ(count_names(at("default/v7")), 2);
    bytes = test_read(at("default/latest/adapter_model.safetensors"), &n);
    REQUIRE(bytes);
    CHECK_EQ(n, image->header_bytes + image->payload_bytes);
    CHECK(memcmp(bytes, image->header, image->header_bytes) == 0);
    CHECK(memcmp(bytes + image->header_bytes, image->payload, image->payload_bytes) == 0);
    free(bytes);
    bytes = test_read(at("default/v7/adapter_config.json"), &n);
    REQUIRE(bytes);
    CHECK_TEXT(bytes, CONFIG);
    free(bytes);
    CHECK_EQ(stat(at("default/v7/adapter_model.safetensors"), &st), 0);
    CHECK_EQ(st.st_mode & 0777, 0640);
    CHECK_EQ(stat(at("default/v7"), &st), 0);
    CHECK_EQ(st.st_mode & 0777, 0750);
    CHECK_EQ(t.commit(t.user, "default", 7, &err), 0); /* again */
    t.abort(t.user, "default", 7);                     /* nothing staged */
    CHECK_EQ(publish_to_all(&t, 1, image, &num, &err), 0);
    CHECK_EQ(count_names(at("default")), 2);
    umask(old);
    drop_image(image);
    t.close(t.user);
}

static void large_file(void)
{
    lorasync_transport t;
    lorasync_image    *image;
    lorasync_engine   *e;
    lorasync_error     err;
    int                num;
    fresh_root();
    t     = open_directory(0, 0);
    image = make_image("big", 1, 0, 60000); /* 2 x 960 KB */
    CHECK_EQ(publish_to_all(&t, 1, image, &num, &err), 0);
    CHECK_EQ(publish_to_all(&t, 1, image, &num, &err), 0); /* compares all of it */
    e = open_engine("big");
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "big"), 1);
    lorasync_engine_close(e);
    drop_image(image);
    t.close(t.user);
}

static void aborted_stage(void)
{
    lorasync_transport t;
    lorasync_image    *image;
    lorasync_error     err;
    fresh_root();
    t     = open_directory(0, 1);
    image = make_image("default", 3, 0, 8);
    CHECK_EQ(t.stage(t.user, image, &err), 0);
    CHECK_EQ(count_names(at("default")), 1);
    CHECK_EQ(t.stage(t.user, image, &err), 0); /* a retry */
    CHECK_EQ(count_names(at("default")), 1);
    t.abort(t.user, "default", 3);
    CHECK_EQ(count_names(at("default")), 0);
    CHECK_EQ(t.commit(t.user, "default", 3, &err), LORASYNC_E_STATE);
    CHECK_HAS(err.text, "not staged");
    t.abort(t.user, "../x", 3);
    drop_image(image);
    t.close(t.user);
}

static void bad_names(void)
{
    static const char *const names[] = {"", ".", "..", "latest", "../x", "a/b", "/etc", ".hidden", "x/"};
    char                     longer[300];
    lorasync_transport       t;
    lorasync_error           err;
    size_t                   i;
    fresh_root();
    t = open_directory(0, 1);
    memset(longer, 'a', sizeof longer);
    longer[sizeof longer - 1] = 0;
    for (i = 0; i <= COUNT(names); i++) {
        lorasync_image      *image = make_image("ok", 1, 0, 8);
        const char          *name  = i < COUNT(names) ? names[i] : longer;
        lorasync_engine_desc desc;
        lorasync_engine     *e = NULL;
        image->adapter         = name;
        CHECK_EQ(t.stage(t.user, image, &err), LORASYNC_E_NAME);
        CHECK_HAS(err.text, "adapter name");
        CHECK_EQ(t.commit(t.user, name, 1, &err), LORASYNC_E_NAME);
        memset(&desc, 0, sizeof desc);
        desc.directory = root;
        desc.adapter   = name;
        CHECK_EQ(lorasync_engine_open(&desc, &e, &err), LORASYNC_E_NAME);
        CHECK(e == NULL);
        image->adapter = "ok";
        drop_image(image);
    }
    CHECK_EQ(count_names(root), 0);
    t.close(t.user);
}

static void bad_arguments(void)
{
    lorasync_directory_desc desc;
    lorasync_allocator      half;
    lorasync_transport      t;
    lorasync_image         *image;
    lorasync_error          err;
    lorasync_engine_desc    ed;
    lorasync_engine        *e = NULL;
    const void             *payload;
    char                    path[3100];
    fresh_root();
    memset(&desc, 0, sizeof desc);
    memset(&half, 0, sizeof half);
    memset(&ed, 0, sizeof ed);
    half.alloc = test_memory_alloc;
    CHECK_EQ(lorasync_directory_open(NULL, &t, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_directory_open(&desc, NULL, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_directory_open(&desc, &t, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "directory is NULL");
    CHECK_EQ(lorasync_engine_open(&ed, &e, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_engine_open(NULL, &e, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_engine_open(&ed, NULL, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_engine_poll(NULL, 0, &err), LORASYNC_E_ARGUMENT);
    memset(path, 'x', sizeof path);
    path[3001]     = 0;
    desc.directory = path;
    CHECK_EQ(lorasync_directory_open(&desc, &t, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "3001 bytes");
    desc.directory     = root;
    desc.keep_versions = -1;
    CHECK_EQ(lorasync_directory_open(&desc, &t, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "keep_versions is -1");
    desc.keep_versions = 0;
    desc.allocator     = &half;
    CHECK_EQ(lorasync_directory_open(&desc, &t, &err), LORASYNC_E_ARGUMENT);
    ed.directory = root;
    ed.allocator = &half;
    CHECK_EQ(lorasync_engine_open(&ed, &e, &err), LORASYNC_E_ARGUMENT);

    t                  = open_directory(0, 1);
    image              = make_image("default", 1, 0, 8);
    payload            = image->payload;
    image->config_json = "";
    CHECK_EQ(t.stage(t.user, image, &err), LORASYNC_E_CONFIG);
    CHECK_HAS(err.text, "config_json");
    image->config_json = CONFIG;
    image->payload     = NULL;
    CHECK_EQ(t.stage(t.user, image, &err), LORASYNC_E_ARGUMENT);
    image->payload = payload;
    image->version = 0;
    CHECK_EQ(t.stage(t.user, image, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "version");
    image->version = 1;
    CHECK_EQ(count_names(root), 0);
    drop_image(image);
    t.close(t.user);
    lorasync_engine_close(NULL);
    lorasync_release(NULL);
    CHECK(lorasync_acquire(NULL, "x") == NULL);
    CHECK(lorasync_find(NULL, "x") == NULL);
}

static void versions(void)
{
    lorasync_transport t;
    lorasync_error     err;
    lorasync_image    *image;
    struct stat        before, after;
    char               stage[600];
    fresh_root();
    t = open_directory(0, 1);
    CHECK_EQ(publish(&t, "default", 10, &err), 0);
    CHECK_EQ(publish(&t, "default", 9, &err), LORASYNC_E_VERSION);
    CHECK_HAS(err.text, "latest is version 10");
    CHECK_EQ(t.commit(t.user, "default", 9, &err), LORASYNC_E_VERSION);
    CHECK_EQ(stat(at("default/v10/adapter_model.safetensors"), &before), 0);
    CHECK_EQ(publish(&t, "default", 10, &err), 0); /* a retry of the same bytes */
    CHECK_EQ(stat(at("default/v10/adapter_model.safetensors"), &after), 0);
    CHECK_EQ(before.st_ino, after.st_ino);
    CHECK_EQ(publish_seed(&t, "default", 10, 1, &err), LORASYNC_E_VERSION);
    CHECK_HAS(err.text, "other content");
    CHECK_EQ(count_names(at("default")), 2);
    image = make_image("default", 11, 0, 64); /* another publisher gets in between stage and commit */
    CHECK_EQ(t.stage(t.user, image, &err), 0);
    snprintf(stage, sizeof stage, "%s", working("default", ".stage-"));
    CHECK_EQ(rename(stage, at("staged")), 0);
    CHECK_EQ(publish_seed(&t, "default", 11, 1, &err), 0);
    CHECK_EQ(rename(at("staged"), stage), 0);
    CHECK_EQ(t.commit(t.user, "default", 11, &err), LORASYNC_E_VERSION);
    CHECK_HAS(err.text, "other content");
    drop_image(image);
    CHECK_EQ(publish(&t, "default", UINT64_MAX, &err), 0);
    CHECK(there(at("default/v18446744073709551615")));
    CHECK_EQ(publish(&t, "default", UINT64_MAX, &err), 0);
    t.close(t.user);
}

static void parse_version(void)
{
    static const char *const bad[] = {"",
                                      "v",
                                      "v0",
                                      "v01",
                                      "12",
                                      "v-1",
                                      "v1 ",
                                      "v1x",
                                      "V1",
                                      "v18446744073709551616",
                                      "v99999999999999999999",
                                      "v1/",
                                      "v1-",
                                      "v1-0000000000000000",
                                      "v1-00f1e2d3c4b5a69",
                                      "v1-00f1e2d3c4b5a6977",
                                      "v1-00F1e2d3c4b5a697",
                                      "v1-00f1e2d3c4b5a697x",
                                      "v0-00f1e2d3c4b5a697",
                                      "v1--0f1e2d3c4b5a697",
                                      "v1-0x0f1e2d3c4b5a69"};
    lorasynci_latest         v;
    unsigned long long       state = 1;
    size_t                   i;
    char                     name[48];
    for (i = 0; i < COUNT(bad); i++) CHECK(!lorasynci_parse_version(bad[i], &v));
    for (i = 0; i < 1000; i++) {
        const uint64_t version    = (uint64_t)test_random(&state) >> (i % 64);
        const uint64_t generation = i % 3 ? (uint64_t)test_random(&state) >> (i % 60) : 0;
        if (!version) continue;
        lorasynci_version_name(name, version, generation);
        CHECK(lorasynci_parse_version(name, &v) && v.version == version && v.generation == generation);
        CHECK_TEXT(v.name, name);
    }
}

static void leftovers(void)
{
    static const char *const old[]     = {".stage-1234-v9", ".old-99999-v1.0", ".stage-00f1e2d3c4b5a697-v9",
                                          ".old-00f1e2d3c4b5a697-v1-00f1e2d3c4b5a698.0"};
    static const char *const foreign[] = {".stage-x", ".stage-", ".stage-00f1e2d3c4b5a69-v9", ".stages-12-v1", ".old"};
    lorasync_transport       t;
    lorasync_engine         *e;
    lorasync_error           err;
    lorasync_image          *image;
    char                     target[100];
    size_t                   i;
    int                      num;
    fresh_root();
    t = open_directory(0, 1);
    CHECK_EQ(publish(&t, "default", 1, &err), 0);
    for (i = 0; i < COUNT(old); i++) {
        mkdir(at("default/%s", old[i]), 0755);
        write_text(at("default/%s/adapter_model.safetensors", old[i]), "x", 1);
    }
    for (i = 0; i < COUNT(foreign); i++) mkdir(at("default/%s", foreign[i]), 0755);
    mkdir(at("default/.old-00f1e2d3c4b5a699-v3.0"), 0755);
    write_text(at("default/.old-00f1e2d3c4b5a699-v3.0/foreign"), "x", 1);
    CHECK_EQ(symlink("v5", at("default/.latest-1234")), 0);
    CHECK_EQ(symlink("v5", at("default/.latest-00f1e2d3c4b5a697")), 0);
    mkdir(at("default/v3"), 0755); /* killed between making v3 and pointing to it; other content */
    write_text(at("default/v3/adapter_model.safetensors"), "x", 1);
    CHECK_EQ(publish(&t, "default", 2, &err), 0);
    CHECK(there(at("default/v3/adapter_model.safetensors")));
    for (i = 0; i < COUNT(old); i++) CHECK(!there(at("default/%s", old[i])));
    for (i = 0; i < COUNT(foreign); i++) CHECK(there(at("default/%s", foreign[i])));
    CHECK(there(at("default/.old-00f1e2d3c4b5a699-v3.0/foreign")));
    CHECK(!there(at("default/.latest-1234")));
    CHECK(!there(at("default/.latest-00f1e2d3c4b5a697")));
    CHECK_EQ(publish(&t, "default", 3, &err), 0); /* over the leftover */
    e = open_engine(NULL);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "default"), 3);

    image = make_image("default", 4, 0, 64); /* killed at the same place, same content */
    CHECK_EQ(t.stage(t.user, image, &err), 0);
    CHECK_EQ(rename(working("default", ".stage-"), at("default/v4")), 0);
    CHECK_EQ(publish_to_all(&t, 1, image, &num, &err), 0);
    read_link(at("default/latest"), target);
    CHECK_TEXT(target, "v4");
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "default"), 4);
    drop_image(image);
    lorasync_engine_close(e);
    t.close(t.user);
}

static void foreign_latest(void)
{
    lorasync_transport t;
    lorasync_engine   *e, *f;
    lorasync_error     err;
    fresh_root();
    t = open_directory(0, 1);
    e = open_engine("a");
    f = open_engine("b");
    mkdir(at("a"), 0755);
    mkdir(at("b"), 0755);
    mkdir(at("b/latest"), 0755);
    CHECK_EQ(symlink("../../etc", at("a/latest")), 0);
    CHECK_EQ(publish(&t, "a", 1, &err), LORASYNC_E_FORMAT);
    CHECK_HAS(err.text, "../../etc");
    CHECK_EQ(publish(&t, "b", 1, &err), LORASYNC_E_FORMAT);
    CHECK_HAS(err.text, "not a symbolic link");
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_FORMAT);
    CHECK(!there(at("a/v1")) && count_names(at("a")) == 1);
    CHECK_EQ(lorasync_engine_poll(f, 0, &err), LORASYNC_E_IO); /* it reads the copy, of which nothing is there yet */
    CHECK_HAS(err.text, "b/latest/adapter_model.safetensors");
    lorasync_engine_close(f);
    lorasync_engine_close(e);
    t.close(t.user);
}

static void prune(void)
{
    int keep;
    for (keep = 1; keep <= 4; keep++) {
        lorasync_transport t;
        lorasync_error     err;
        uint64_t           v, u;
        fresh_root();
        t = open_directory(keep, 1);
        mkdir(at("a"), 0755);
        mkdir(at("a/v1000"), 0755); /* newer than latest: not ours to delete */
        mkdir(at("a/other"), 0755);
        for (v = 1; v <= 10; v++) {
            CHECK_EQ(publish(&t, "a", v * v, &err), 0);
            for (u = 1; u <= v; u++) CHECK_EQ(there(at("a/v%d", (int)(u * u))), u + (uint64_t)keep > v);
            CHECK_EQ(count_names(at("a")), 3 + (v < (uint64_t)keep ? (int)v : keep));
        }
        t.close(t.user);
    }
}

static void unwritable(void)
{
    lorasync_transport      t;
    lorasync_directory_desc desc;
    lorasync_error          err;
    lorasync_image         *image;
    struct rlimit           limit, low;
    lorasync_engine        *e;
    pid_t                   child;
    int                     result = -1, num;
    fresh_root();
    t = open_directory(0, 0);
    memset(&desc, 0, sizeof desc);
    write_text(at("file"), "x", 1);
    CHECK_EQ(publish(&t, "file", 1, &err), LORASYNC_E_IO); /* a file in the way */
    CHECK_HAS(err.text, "file");
    CHECK_EQ(publish(&t, "a", 1, &err), 0);
    CHECK_EQ(getrlimit(RLIMIT_FSIZE, &limit), 0); /* as when the disk is full */
    signal(SIGXFSZ, SIG_IGN);
    low          = limit;
    low.rlim_cur = 1500;
    setrlimit(RLIMIT_FSIZE, &low);
    image = make_image("a", 2, 0, 64);
    num   = -1;
    CHECK_EQ(publish_to_all(&t, 1, image, &num, &err), LORASYNC_E_IO);
    setrlimit(RLIMIT_FSIZE, &limit);
    CHECK_HAS(err.text, "adapter_model.safetensors");
    CHECK_HAS(err.text, strerror(EFBIG));
    CHECK_EQ(num, 0);
    CHECK_EQ(count_names(at("a")), 2);
    e = open_engine("a");
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "a"), 1);
    CHECK_EQ(publish_to_all(&t, 1, image, &num, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "a"), 2);
    drop_image(image);
    t.close(t.user);
    lorasync_engine_close(e);

    desc.directory = at("absent/below");
    CHECK_EQ(lorasync_directory_open(&desc, &t, &err), 0);
    CHECK_EQ(publish(&t, "a", 1, &err), LORASYNC_E_IO);
    CHECK_HAS(err.text, "absent/below");
    t.close(t.user);

    CHECK_EQ(chmod(root, 0755), 0);
    child = fork(); /* as a user who may not write there */
    if (child == 0) {
        if (getuid() == 0 && setuid(65534) != 0) _exit(9);
        if (getuid() != 65534) chmod(root, 0555);
        t = open_directory(0, 0);
        _exit(publish(&t, "new", 1, &err) == LORASYNC_E_IO && strstr(err.text, "new") && publish(&t, "a", 3, &err) != 0
                  ? 0
                  : 1);
    }
    waitpid(child, &result, 0);
    chmod(root, 0755);
    CHECK(WIFEXITED(result) && WEXITSTATUS(result) == 0);
}

/* -- publishing to several */

typedef struct fake {
    int  fail_stage, fail_commit;
    int  staged, committed, aborted; /* how often */
    int  now;                        /* 1 staged, 0 nothing */
    long order;
} fake;

static long fake_clock;

static lorasync_status fake_stage(void *user, const lorasync_image *image, lorasync_error *err)
{
    fake *f = (fake *)user;
    (void)image;
    f->staged++;
    f->order = ++fake_clock;
    if (f->fail_stage) return lorasynci_fail(err, (lorasync_status)f->fail_stage, "stage is broken");
    f->now = 1;
    return LORASYNC_OK;
}

static lorasync_status fake_commit(void *user, const char *adapter, uint64_t version, lorasync_error *err)
{
    fake *f = (fake *)user;
    (void)adapter;
    (void)version;
    (void)err;
    CHECK_EQ(f->now, 1);
    if (f->fail_commit) return (lorasync_status)f->fail_commit; /* without a text */
    f->committed++;
    f->now = 0;
    return LORASYNC_OK;
}

static void fake_abort(void *user, const char *adapter, uint64_t version)
{
    fake *f = (fake *)user;
    CHECK_TEXT(adapter, "default");
    CHECK_EQ(version, 5);
    f->aborted++;
    f->order = ++fake_clock;
    f->now   = 0;
}

/* Every mix of 4 transports: with and without commit, failing at stage or at commit. */
static void two_phases(void)
{
    lorasync_image *image = make_image("default", 5, 0, 8);
    int             mix, i;
    for (mix = 0; mix < 625; mix++) { /* each: 0 good, 1 fails stage, 2 fails commit, 3 good without commit, 4 fails
                                         without commit */
        lorasync_transport t[4];
        fake               f[4];
        char               names[4][16];
        lorasync_error     err;
        int kind[4], m = mix, num = -1, stage_fails = 0, commit_fails = 0, one_phase_ok = 0, good = 0, expect_new = 0;
        lorasync_status status;
        int             first_two_phase = -1, stage_failed_two = 0;
        memset(t, 0, sizeof t);
        memset(f, 0, sizeof f);
        for (i = 0; i < 4; i++, m /= 5) {
            kind[i] = m % 5;
            snprintf(names[i], sizeof names[i], "eng%d", i);
            t[i].size        = sizeof t[i];
            t[i].name        = names[i];
            t[i].user        = &f[i];
            t[i].stage       = fake_stage;
            t[i].commit      = kind[i] < 3 ? fake_commit : NULL;
            t[i].abort       = fake_abort;
            f[i].fail_stage  = kind[i] == 1 || kind[i] == 4 ? LORASYNC_E_IO : 0;
            f[i].fail_commit = kind[i] == 2 ? LORASYNC_E_BUSY : 0;
            stage_fails += f[i].fail_stage != 0;
            stage_failed_two += kind[i] == 1;
            commit_fails += kind[i] == 2;
            good += kind[i] == 0;
            if (kind[i] < 3 && first_two_phase < 0) first_two_phase = i;
        }
        if (!stage_failed_two) { /* those without commit before the first of them that fails */
            for (i = 0; i < 4 && kind[i] != 4; i++) one_phase_ok += kind[i] == 3;
        }
        expect_new = one_phase_ok;
        if (!stage_fails && (one_phase_ok || first_two_phase < 0 || kind[first_two_phase] == 0)) expect_new += good;
        memset(&err, 0, sizeof err);
        status = publish_to_all(t, 4, image, &num, &err);
        CHECK_EQ(status, stage_fails ? LORASYNC_E_IO : commit_fails ? LORASYNC_E_BUSY : 0);
        CHECK_EQ(num, expect_new);
        for (i = 0; i < 4; i++) {
            CHECK(f[i].staged <= 1 && f[i].aborted <= 1 && f[i].committed <= 1);
            if (t[i].commit) CHECK_EQ(f[i].staged, f[i].committed + f[i].aborted);
            else CHECK_EQ(f[i].staged, f[i].now + f[i].aborted);
            if (t[i].commit) CHECK_EQ(f[i].now, 0);
            if (status < 0 && num && f[i].committed) CHECK_HAS(err.text, names[i]);
        }
        if (stage_fails) {
            CHECK_HAS(err.text, "could not stage: stage is broken");
            for (i = 0; i < 4; i++) CHECK_EQ(f[i].committed, 0);
        } else if (commit_fails) {
            CHECK_HAS(err.text, "could not commit: still in use");
            CHECK_HAS(err.text, num ? "publish 5 again" : "not committed anywhere else");
        } else {
            CHECK_EQ(err.text[0], 0);
        }
    }
    drop_image(image);
}

static void transport_struct(void)
{
    lorasync_image    *image = make_image("default", 5, 0, 8);
    lorasync_transport t[3];
    lorasync_error     err;
    fake               f[3];
    int                num = -1, i;
    memset(t, 0, sizeof t);
    memset(f, 0, sizeof f);
    for (i = 0; i < 3; i++) {
        t[i].size   = sizeof t[i];
        t[i].user   = &f[i];
        t[i].stage  = fake_stage;
        t[i].commit = fake_commit;
        t[i].abort  = fake_abort;
    }
    CHECK_EQ(publish_to_all(NULL, 0, image, &num, &err), 0);
    CHECK_EQ(num, 0);
    CHECK_EQ(publish_to_all(t, 3, image, &num, &err), 0);
    CHECK_EQ(num, 3);
    t[1].size = offsetof(lorasync_transport, commit); /* ends with stage */
    CHECK_EQ(publish_to_all(t, 3, image, &num, &err), 0);
    CHECK_EQ(num, 3);
    CHECK_EQ(f[1].committed, 1);
    t[1].size = offsetof(lorasync_transport, commit) + 1; /* half a field is no field */
    CHECK_EQ(publish_to_all(t, 3, image, &num, &err), 0);
    CHECK_EQ(f[1].committed, 1);
    f[2].fail_stage = LORASYNC_E_TIMEOUT; /* of the transport, not of the communicator */
    fake_clock      = 0;
    f[1].order      = 0;
    CHECK_EQ(publish_to_all(t, 3, image, &num, &err), LORASYNC_E_IO);
    CHECK_EQ(num, 0);
    CHECK_EQ(err.status, LORASYNC_E_IO);
    CHECK_HAS(err.text, "'unnamed'");
    CHECK_HAS(err.text, "deadline passed");
    CHECK_EQ(f[2].order, 3); /* stage 0, stage 2, abort 2, abort 0; 1 not reached */
    CHECK_EQ(f[0].order, 4);
    CHECK_EQ(f[1].order, 0);
    t[2].size   = offsetof(lorasync_transport, stage);
    f[0].staged = 0;
    CHECK_EQ(publish_to_all(t, 3, image, &num, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "sizeof(lorasync_transport)");
    t[2].size  = sizeof t[2];
    t[2].stage = NULL;
    CHECK_EQ(publish_to_all(t, 3, image, &num, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(f[0].staged, 0);
    CHECK_EQ(publish_to_all(t, 3, image, &num, NULL), LORASYNC_E_ARGUMENT);
    drop_image(image);
}

/* A commit that fails on the second of two directories is mended by publishing the same version again. */
static void retry_after_half(void)
{
    lorasync_transport t[2];
    lorasync_error     err;
    lorasync_image    *image = make_image("a", 2, 0, 64);
    char               first[200], target[100], home[200];
    fake               f;
    int                num;
    fresh_root();
    snprintf(home, sizeof home, "%.199s", root);
    memset(&f, 0, sizeof f);
    t[0] = open_directory(0, 1);
    memset(&t[1], 0, sizeof t[1]);
    t[1].size     = sizeof t[1];
    t[1].name     = "replica1";
    t[1].user     = &f;
    t[1].stage    = fake_stage;
    t[1].commit   = fake_commit;
    f.fail_commit = LORASYNC_E_IO;
    CHECK_EQ(publish_to_all(t, 2, image, &num, &err), LORASYNC_E_IO);
    CHECK_EQ(num, 1);
    snprintf(first, sizeof first, "served by: %.40s", root);
    CHECK_HAS(err.text, first);
    CHECK_HAS(err.text, "maybe still the old one by: replica1");
    read_link(at("a/latest"), target);
    CHECK_TEXT(target, "v2");
    f.fail_commit = 0;
    CHECK_EQ(publish_to_all(t, 2, image, &num, &err), 0);
    CHECK_EQ(num, 2);
    drop_image(image);
    t[0].close(t[0].user);
}

/* -- the engine */

static void serve(void)
{
    lorasync_transport      t;
    lorasync_engine        *one, *all;
    lorasync_error          err;
    const lorasync_adapter *a, *b;
    const lorasync_tensor  *x;
    fresh_root();
    rmdir(root);
    one = open_engine("a");
    all = open_engine(NULL);
    CHECK_EQ(lorasync_engine_poll(one, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(lorasync_engine_poll(all, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(lorasync_engine_poll(all, 20, &err), LORASYNC_NOTHING_NEW);
    CHECK(lorasync_acquire(all, "a") == NULL);
    t = open_directory(0, 1);
    CHECK_EQ(publish(&t, "b", 3, &err), 0);
    CHECK_EQ(lorasync_engine_poll(one, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(publish(&t, "a", 1, &err), 0);
    write_text(at("README"), "not an adapter", 14);
    mkdir(at("empty"), 0755);
    CHECK_EQ(lorasync_engine_poll(one, 0, &err), 0);
    CHECK_EQ(lorasync_engine_poll(all, 0, &err), 0);
    CHECK_EQ(lorasync_engine_poll(all, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(served(one, "a"), 1);
    CHECK_EQ(served(all, "a"), 1);
    CHECK_EQ(served(all, "b"), 3);
    CHECK_EQ(served(one, "b"), 0);
    CHECK_EQ(served(all, "empty"), 0);
    a = lorasync_acquire(all, "a");
    REQUIRE(a);
    CHECK_TEXT(a->name, "a");
    CHECK_TEXT(a->image->adapter, "a");
    CHECK_EQ(a->image->version, 1);
    CHECK_TEXT(a->image->config_json, CONFIG);
    x = lorasync_find(a, KEY_A);
    REQUIRE(x);
    CHECK_EQ(x->shape[0], 4);
    CHECK_EQ(x->shape[1], 64);
    CHECK(lorasync_find(a, "no such key") == NULL);
    CHECK(lorasync_find(a, NULL) == NULL);
    CHECK(lorasync_acquire(all, NULL) == NULL);
    CHECK_EQ(publish(&t, "a", 2, &err), 0);
    CHECK_EQ(lorasync_engine_poll(all, 0, &err), 0);
    b = lorasync_acquire(all, "a");
    CHECK(b && b != a && b->version == 2 && a->version == 1);
    CHECK_EQ(wrong_bytes(a, 0), 0);
    CHECK_EQ(wrong_bytes(b, 0), 0);
    lorasync_release(a);
    lorasync_release(b);
    CHECK_EQ(served(one, "a"), 1);
    CHECK_EQ(lorasync_engine_poll(one, 0, &err), 0);
    CHECK_EQ(served(one, "a"), 2);
    lorasync_engine_close(one);
    lorasync_engine_close(all);
    t.close(t.user);
}

static void poll_waits(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    uint64_t           start;
    pid_t              child;
    fresh_root();
    e     = open_engine("a");
    start = test_now_ns();
    CHECK_EQ(lorasync_engine_poll(e, 30, &err), LORASYNC_NOTHING_NEW);
    CHECK(test_now_ns() - start >= 30000000u);
    child = fork();
    if (child == 0) {
        struct timespec ms;
        ms.tv_sec  = 0;
        ms.tv_nsec = 30000000;
        nanosleep(&ms, NULL);
        t = open_directory(0, 1);
        _exit(publish(&t, "a", 1, &err) != 0);
    }
    CHECK_EQ(lorasync_engine_poll(e, 10000, &err), 0);
    CHECK_EQ(served(e, "a"), 1);
    waitpid(child, NULL, 0);
    lorasync_engine_close(e);
}

/* Takes the published v2 apart in one way after the other; the engine goes on serving v1 and says what is wrong. */
static void break_file(const char *path, size_t cut, size_t flip)
{
    size_t n = 0;
    char  *p = test_read(path, &n);
    CHECK(p != NULL);
    if (!p) return;
    if (flip) p[n - flip] = (char)(p[n - flip] ^ 1);
    unlink(path);
    write_text(path, p, n - cut);
    free(p);
}

static void break_two(int how)
{
    const char *model = at("a/v2/adapter_model.safetensors"), *config = at("a/v2/adapter_config.json");
    switch (how) {
    case 0: break_file(model, 1, 0); break;
    case 1: break_file(model, 0, 100); break;
    case 2: unlink(model); break;
    case 3: unlink(config); break;
    case 4: write_string(config, "{\"peft_type\":\"LOHA\",\"r\":4}"); break;
    case 5: write_string(config, "{\"peft_type\":\"LORA\","); break;
    case 6:
        write_string(config, "{\"peft_type\":\"LORA\",\"r\":8,\"lora_alpha\":8,\"target_modules\":[\"q_proj\"]}");
        break;
    case 7: unlink(model), mkdir(model, 0755); break;
    case 8: unlink(model), mkfifo(model, 0644); break;
    case 9: unlink(model), write_text(model, "", 0); break;
    case 10: rename(at("a/v2"), at("a/x")); break;
    case 11:
        unlink(at("a/latest")), rename(at("a/v2"), at("a/v3")), symlink("v3", at("a/latest")) ? (void)0 : (void)0;
        break;
    case 12: remove_tree(at("a/v2")), rename(at("b/v2"), at("a/v2")); break;
    case 13: unlink(config), mkdir(config, 0755); break;
    default: break;
    }
}

static void broken(void)
{
    static const struct {
        lorasync_status status;
        const char     *text;
    } expect[] = {{LORASYNC_E_FORMAT, "a/v2/adapter_model.safetensors"},
                  {LORASYNC_E_DIGEST, "a/v2/adapter_model.safetensors"},
                  {LORASYNC_E_IO, "a/v2/adapter_model.safetensors"},
                  {LORASYNC_E_IO, "a/v2/adapter_config.json"},
                  {LORASYNC_E_UNSUPPORTED, "LOHA"},
                  {LORASYNC_E_FORMAT, "a/v2/adapter_config.json"},
                  {LORASYNC_E_CONFIG, "a/v2/adapter_config.json"},
                  {LORASYNC_E_FORMAT, "not a regular file"},
                  {LORASYNC_E_FORMAT, "not a regular file"},
                  {LORASYNC_E_FORMAT, "a/v2/adapter_model.safetensors"},
                  {LORASYNC_E_IO, "a/v2"},
                  {LORASYNC_E_FORMAT, "version 2, expected 3"},
                  {LORASYNC_E_FORMAT, "adapter 'b', expected 'a'"},
                  {LORASYNC_E_FORMAT, "not a regular file"}};
    int how;
    for (how = 0; how < (int)COUNT(expect); how++) {
        lorasync_transport t;
        lorasync_engine   *e;
        lorasync_error     err;
        fresh_root();
        t = open_directory(0, 1);
        e = open_engine("a");
        CHECK_EQ(publish(&t, "a", 1, &err), 0);
        CHECK_EQ(publish(&t, "b", 2, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(publish(&t, "a", 2, &err), 0);
        break_two(how);
        memset(&err, 0, sizeof err);
        CHECK_EQ(lorasync_engine_poll(e, 50, &err), expect[how].status);
        CHECK_EQ(err.status, expect[how].status);
        CHECK_HAS(err.text, expect[how].text);
        CHECK_EQ(served(e, "a"), 1);
        CHECK_EQ(lorasync_engine_poll(e, 0, NULL), expect[how].status);
        CHECK_EQ(publish(&t, "a", 4, &err), 0); /* and what is whole again is served */
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(served(e, "a"), 4);
        lorasync_engine_close(e);
        t.close(t.user);
    }
}

static void unverified_engine(void)
{
    lorasync_transport   t;
    lorasync_engine_desc desc;
    lorasync_engine     *e = NULL;
    lorasync_error       err;
    fresh_root();
    memset(&desc, 0, sizeof desc);
    desc.directory = root;
    desc.no_verify = 1;
    t              = open_directory(0, 1);
    CHECK_EQ(lorasync_engine_open(&desc, &e, &err), 0);
    CHECK_EQ(publish(&t, "a", 1, &err), 0);
    break_file(at("a/v1/adapter_model.safetensors"), 0, 100);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    lorasync_engine_close(e);
    t.close(t.user);
}

/* One adapter that fails does not hold up another. */
static void one_fails(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    fresh_root();
    t = open_directory(0, 1);
    e = open_engine(NULL);
    CHECK_EQ(publish(&t, "a", 1, &err), 0);
    CHECK_EQ(publish(&t, "b", 1, &err), 0);
    CHECK_EQ(publish(&t, "c", 1, &err), 0);
    break_file(at("b/v1/adapter_model.safetensors"), 0, 100);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_DIGEST);
    CHECK_HAS(err.text, "b/v1");
    CHECK_EQ(served(e, "a"), 1);
    CHECK_EQ(served(e, "b"), 0);
    CHECK_EQ(served(e, "c"), 1);
    lorasync_engine_close(e);

    e = NULL;
    {
        lorasync_engine_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.directory = at("a");
        CHECK_EQ(lorasync_engine_open(&desc, &e, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_ARGUMENT);
        CHECK_HAS(err.text, "directory above");
        lorasync_engine_close(e);
    }
    t.close(t.user);
}

/* A PEFT directory that somebody else wrote: no metadata, the version is the directory's. */
static void plain(void)
{
    lorasync_image  *image = make_image(NULL, 6, 0, 64);
    lorasync_engine *e;
    lorasync_error   err;
    char            *bytes = (char *)malloc(image->header_bytes + image->payload_bytes);
    fresh_root();
    memcpy(bytes, image->header, image->header_bytes);
    memcpy(bytes + image->header_bytes, image->payload, image->payload_bytes);
    mkdir(at("a"), 0755);
    mkdir(at("a/v6"), 0755);
    write_text(at("a/v6/adapter_model.safetensors"), bytes, image->header_bytes + image->payload_bytes);
    write_text(at("a/v6/adapter_config.json"), CONFIG, strlen(CONFIG));
    CHECK_EQ(symlink("v6", at("a/latest")), 0);
    e = open_engine(NULL);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "a"), 6);
    lorasync_engine_close(e);
    write_text(at("a/v6/adapter_config.json"), CONFIG, sizeof CONFIG); /* and the NUL that ends the text here */
    e = open_engine(NULL);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_FORMAT);
    CHECK_HAS(err.text, "adapter_config.json has a NUL byte");
    lorasync_engine_close(e);
    free(bytes);
    drop_image(image);
}

static void same_version(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    int                i;
    fresh_root();
    t = open_directory(0, 1);
    e = open_engine("a");
    CHECK_EQ(publish(&t, "a", 5, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    remove_tree(at("a"));
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(served(e, "a"), 5);
    CHECK_EQ(publish_seed(&t, "a", 5, 1, &err), 0); /* a second run that began again */
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_VERSION);
    CHECK_HAS(err.text, "a/v5");
    CHECK_HAS(err.text, "second time");
    CHECK_EQ(served(e, "a"), 5);
    remove_tree(at("a"));
    CHECK_EQ(publish(&t, "a", 5, &err), 0); /* the same bytes in a new file */
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    remove_tree(at("a"));
    CHECK_EQ(publish(&t, "a", 4, &err), 0); /* older: said, at every poll */
    for (i = 0; i < 2; i++) {
        memset(&err, 0, sizeof err);
        CHECK_EQ(lorasync_engine_poll(e, 1000, &err), LORASYNC_E_VERSION);
        CHECK_HAS(err.text, " is v4, v5 is served: versions went back");
        CHECK_HAS(err.text, "publish versions above v5");
        CHECK_EQ(served(e, "a"), 5);
    }
    CHECK_EQ(publish(&t, "a", 6, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "a"), 6);
    lorasync_engine_close(e);
    t.close(t.user);
}

static void pins(void)
{
    lorasync_transport      t;
    lorasync_engine        *e;
    lorasync_error          err;
    const lorasync_adapter *pinned[8];
    int                     i;
    fresh_root();
    t = open_directory(1, 1);
    e = open_engine("a");
    for (i = 0; i < 8; i++) {
        CHECK_EQ(publish(&t, "a", (uint64_t)i + 1, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        pinned[i] = lorasync_acquire(e, "a");
        REQUIRE(pinned[i]);
    }
    CHECK_EQ(count_names(at("a")), 2); /* only the newest is on disk */
    CHECK_EQ(publish(&t, "a", 9, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_BUSY);
    CHECK_HAS(err.text, "version 9");
    CHECK_EQ(served(e, "a"), 8);
    for (i = 0; i < 8; i++) {
        CHECK_EQ(pinned[i]->version, i + 1);
        CHECK_EQ(wrong_bytes(pinned[i], 0), 0);
    }
    lorasync_release(pinned[7]); /* the served one: does not help */
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_BUSY);
    lorasync_release(pinned[3]);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "a"), 9);
    for (i = 0; i < 7; i++) {
        if (i == 3) continue;
        CHECK_EQ(wrong_bytes(pinned[i], 0), 0);
        lorasync_release(pinned[i]);
    }
    CHECK_EQ(publish(&t, "a", 10, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "a"), 10);
    lorasync_engine_close(e);
    t.close(t.user);
}

/* -- memory */

static lorasync_allocator counting(test_memory *m)
{
    lorasync_allocator a;
    memset(m, 0, sizeof *m);
    a.alloc = test_memory_alloc;
    a.free  = test_memory_free;
    a.user  = m;
    return a;
}

static void no_allocation(void)
{
    lorasync_directory_desc desc;
    lorasync_transport      t;
    lorasync_error          err;
    test_memory             m;
    lorasync_allocator      a = counting(&m);
    long                    n, before;
    uint64_t                v;
    fresh_root();
    memset(&desc, 0, sizeof desc);
    desc.directory = root;
    desc.allocator = &a;
    desc.no_fsync  = 1;
    for (n = 1;; n++) {
        m.fail_at = n;
        if (lorasync_directory_open(&desc, &t, &err) == 0) break;
        CHECK_EQ(err.status, LORASYNC_E_MEMORY);
        CHECK_EQ(m.live, 0);
    }
    CHECK_EQ(n, 3);
    m.fail_at = 0;
    before    = m.total;
    for (v = 1; v < 8; v++) CHECK_EQ(publish(&t, "a", v, &err), 0);
    CHECK_EQ(publish(&t, "a", 7, &err), 0);
    CHECK_EQ(m.total, before);
    t.close(t.user);
    CHECK_EQ(m.live, 0);
}

static void memory_fails(void)
{
    lorasync_transport   t;
    lorasync_engine_desc desc;
    lorasync_engine     *e = NULL;
    lorasync_error       err;
    test_memory          m;
    lorasync_allocator   a = counting(&m);
    lorasync_image      *image;
    lorasync_config     *config;
    long                 n, most = 0;
    uint64_t             v;
    fresh_root();
    memset(&desc, 0, sizeof desc);
    desc.directory = root;
    desc.adapter   = "a";
    desc.allocator = &a;
    t              = open_directory(0, 1);
    for (n = 1;; n++) {
        m.fail_at = n;
        if (lorasync_engine_open(&desc, &e, &err) == 0) break;
        CHECK_EQ(err.status, LORASYNC_E_MEMORY);
        CHECK_EQ(m.live, 0);
        CHECK(e == NULL);
    }
    CHECK_EQ(n, 6);
    for (v = 1; v <= 2; v++) {
        CHECK_EQ(publish(&t, "a", v, &err), 0);
        for (n = 1;; n++) {
            m.fail_at = n;
            if (lorasync_engine_poll(e, 0, &err) == 0) break;
            CHECK_EQ(err.status, LORASYNC_E_MEMORY);
            m.fail_at = 0;
            CHECK_EQ(served(e, "a"), v - 1);
            if (n > 10000) break;
        }
        m.fail_at = 0;
        CHECK(n > 4 && n < 10000);
        if (n > most) most = n;
        CHECK_EQ(served(e, "a"), v);
    }
    lorasync_engine_close(e);
    CHECK_EQ(m.live, 0);

    CHECK_EQ(publish(&t, "a", 3, &err), 0);
    for (n = 1; n < 10000; n++) {
        m.fail_at = n;
        image     = NULL;
        config    = NULL;
        if (lorasync_open_adapter(at("a/v3"), &a, &image, &config, &err) == 0) break;
        CHECK_EQ(err.status, LORASYNC_E_MEMORY);
        CHECK(!image && !config);
        CHECK_EQ(m.live, 0);
    }
    CHECK(n < 10000);
    m.fail_at = 0;
    lorasync_image_free(image);
    lorasync_config_free(config);
    CHECK_EQ(m.live, 0);
    t.close(t.user);
}

/* -- one adapter outside an engine */

static void opening(void)
{
    static const struct {
        const char     *name, *bytes;
        lorasync_status status;
        const char     *part;
    } pickled[] = {
        {"adapter_model.bin", "PK\3\4\0\0\10\10\0\0\0\0\0\0\0\0", LORASYNC_E_UNSUPPORTED,
         "pickled files are not supported"},
        {"weights", "PK\3\4\0\0\10\10\0\0\0\0\0\0\0\0", LORASYNC_E_UNSUPPORTED, "pickled files are not supported"},
        {"old", "\200\2\212\12\154\374\234\106\371\40\152\250\120\31\56\200", LORASYNC_E_UNSUPPORTED,
         "as safetensors with PEFT"},
        {"x.pt", "something of 16 b", LORASYNC_E_UNSUPPORTED, "pickled files are not supported"},
        {"cut.safetensors", "\200\2\0\0\0\0\0\0{\"a\":{\"b", LORASYNC_E_FORMAT, "640"}};
    lorasync_transport t;
    lorasync_image    *image  = NULL;
    lorasync_config   *config = NULL;
    lorasync_error     err;
    size_t             i;
    fresh_root();
    t = open_directory(0, 1);
    CHECK_EQ(publish(&t, "a", 1, &err), 0);
    CHECK_EQ(lorasync_open_adapter(at("a/latest"), NULL, &image, &config, &err), 0);
    REQUIRE(image && config);
    CHECK_EQ(image->version, 1);
    CHECK_TEXT(image->config_json, CONFIG);
    CHECK_EQ(lorasync_config_view(config)->r, 4);
    for (i = 0; i < image->payload_bytes; i++)
        CHECK(((const unsigned char *)image->payload)[i] == expected_byte(1, 0, i));
    lorasync_image_free(image);
    lorasync_config_free(config);
    CHECK_EQ(lorasync_open_adapter(at("a/v1"), NULL, &image, NULL, &err), 0);
    lorasync_image_free(image);
    config = (lorasync_config *)(void *)&t;
    CHECK_EQ(lorasync_open_adapter(at("a/v1/adapter_model.safetensors"), NULL, &image, &config, &err), 0);
    CHECK(config == NULL);
    CHECK_TEXT(image->config_json, "");
    lorasync_image_free(image);
    image = NULL;
    CHECK_EQ(lorasync_open_adapter(NULL, NULL, &image, NULL, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_open_adapter(root, NULL, NULL, NULL, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_open_adapter(at("nowhere"), NULL, &image, NULL, &err), LORASYNC_E_NOT_FOUND);
    CHECK_HAS(err.text, "nowhere");
    CHECK_EQ(lorasync_open_adapter(root, NULL, &image, NULL, &err), LORASYNC_E_NOT_FOUND);
    CHECK_HAS(err.text, "has no adapter_model.safetensors");
    write_text(at("adapter_model.bin"), "x", 1);
    CHECK_EQ(lorasync_open_adapter(root, NULL, &image, NULL, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "pickled");
    for (i = 0; i < sizeof pickled / sizeof pickled[0]; i++) { /* their own paths */
        write_text(at("%s", pickled[i].name), pickled[i].bytes, 16);
        CHECK_EQ(lorasync_open_adapter(at("%s", pickled[i].name), NULL, &image, NULL, &err), pickled[i].status);
        CHECK_HAS(err.text, pickled[i].part);
        CHECK_HAS(err.text, pickled[i].name);
    }
    unlink(at("a/v1/adapter_config.json"));
    CHECK_EQ(lorasync_open_adapter(at("a/v1"), NULL, &image, NULL, &err), LORASYNC_E_NOT_FOUND);
    CHECK_HAS(err.text, "a/v1/adapter_config.json");
    write_text(at("a/v1/adapter_config.json"), CONFIG, strlen(CONFIG));
    rename(at("a/v1/adapter_model.safetensors"), at("a/v1/adapters.safetensors")); /* another name, but the only one */
    CHECK_EQ(lorasync_open_adapter(at("a/v1"), NULL, &image, NULL, &err), 0);
    lorasync_image_free(image);
    image = NULL;
    write_text(at("a/v1/0000100_adapters.safetensors"), "x", 1);
    CHECK_EQ(lorasync_open_adapter(at("a/v1"), NULL, &image, NULL, &err), LORASYNC_E_NOT_FOUND);
    CHECK_HAS(err.text, "2 .safetensors files");
    CHECK_EQ(lorasync_open_adapter(at("a/v1/0000100_adapters.safetensors"), NULL, &image, NULL, &err),
             LORASYNC_E_FORMAT);
    CHECK_HAS(err.text, "0000100_adapters");
    break_file(at("a/v1/adapters.safetensors"), 0, 9);
    CHECK_EQ(lorasync_open_adapter(at("a/v1/adapters.safetensors"), NULL, &image, NULL, &err), LORASYNC_E_DIGEST);
    CHECK(image == NULL);
    t.close(t.user);
}

static void real_adapters(void)
{
    static const char *const good[] = {"opt-125m-bf16-r16",        "open-calm-f16-r1",   "gpt2-fan-in-fan-out-r8",
                                       "distilbert-classifier-r8", "minilm-run-step100", "minilm-run-step700"};
    size_t                   i;
    for (i = 0; i < COUNT(good); i++) {
        lorasync_image  *image  = NULL;
        lorasync_config *config = NULL;
        lorasync_error   err;
        char             path[1100];
        snprintf(path, sizeof path, "%s/%s", test_path("adapters"), good[i]);
        err.text[0] = 0;
        if (lorasync_open_adapter(path, NULL, &image, &config, &err) != 0) fprintf(stderr, "%s\n", err.text);
        CHECK(image && config && image->num_tensors > 0 && image->config_json[0] == '{');
        lorasync_image_free(image);
        lorasync_config_free(config);
    }
}

/* -- readers at work while versions come */

typedef struct reader {
    lorasync_engine *engine;
    int              quick; /* looks at one byte only, to be between two versions as often as possible */
    long             seen, wrong, backwards;
    int             *stop;
} reader;

static void *read_on(void *user)
{
    reader  *r    = (reader *)user;
    uint64_t last = 0;
    long     seen;
    while (!__atomic_load_n(r->stop, __ATOMIC_SEQ_CST)) {
        const lorasync_adapter *a = lorasync_acquire(r->engine, "a");
        if (!a) {
            usleep(1);
            continue;
        }
        seen = __atomic_add_fetch(&r->seen, 1, __ATOMIC_SEQ_CST);
        if (r->quick) r->wrong += *(const unsigned char *)a->image->payload != expected_byte(a->version, 0, 0);
        else if (wrong_bytes(a, 0) != 0) r->wrong++;
        if (a->version < last) r->backwards++;
        last = a->version;
        lorasync_release(a);
        if (seen % 16 == 0) {
            const lorasync_adapter *b = lorasync_acquire(r->engine, seen % 32 ? "b" : "no such");
            lorasync_release(b);
        }
        /* a blocking call: valgrind lets threads that spin keep the others waiting for minutes */
        if (!r->quick || seen % 64 == 0) usleep(1);
    }
    return NULL;
}

static void reader_threads(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    reader             r[3];
    pthread_t          threads[3];
    uint64_t           v;
    int                stop = 0, i;
    fresh_root();
    t = open_directory(1, 1);
    e = open_engine(NULL);
    memset(r, 0, sizeof r);
    for (i = 0; i < 3; i++) {
        r[i].engine = e;
        r[i].stop   = &stop;
        r[i].quick  = i > 0;
        CHECK_EQ(pthread_create(&threads[i], NULL, read_on, &r[i]), 0);
    }
    for (v = 1; v <= 300; v++) {
        lorasync_status status;
        char            name[8];
        CHECK_EQ(publish(&t, "a", v, &err), 0);
        snprintf(name, sizeof name, "n%d", (int)(v / 10)); /* the list of adapters grows meanwhile */
        if (v % 10 == 0) CHECK_EQ(publish(&t, name, 1, &err), 0);
        status = lorasync_engine_poll(e, 0, &err);
        CHECK(status == 0 || status == LORASYNC_E_BUSY);
    }
    while (__atomic_load_n(&r[0].seen, __ATOMIC_SEQ_CST) == 0) sched_yield();
    __atomic_store_n(&stop, 1, __ATOMIC_SEQ_CST);
    for (i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
        CHECK_EQ(r[i].wrong, 0);
        CHECK_EQ(r[i].backwards, 0);
    }
    lorasync_engine_close(e);
    t.close(t.user);
}

/* A reader process: polls until stop appears; exits 0 if all it ever saw was whole, and newer each time. */
static void reader_process(void)
{
    lorasync_engine *e    = open_engine("a");
    uint64_t         last = 0;
    lorasync_error   err;
    while (!there(at("stop"))) {
        lorasync_status         status = lorasync_engine_poll(e, 2, &err);
        const lorasync_adapter *a;
        if (status < 0) {
            fprintf(stderr, "reader: %s\n", err.text);
            _exit(2);
        }
        a = lorasync_acquire(e, "a");
        if (a && wrong_bytes(a, 0) != 0) _exit(3);
        if (a && a->version < last) _exit(4);
        if (a && status == LORASYNC_OK && a->version <= last) _exit(5);
        if (a) last = a->version;
        lorasync_release(a);
    }
    lorasync_engine_close(e);
    _exit(last > 0 && test_errors == 0 ? 0 : 6);
}

static uint64_t latest_version(void)
{
    char             target[100];
    lorasynci_latest v;
    read_link(at("a/latest"), target);
    return lorasynci_parse_version(target, &v) ? v.version : 0;
}

static void publish_until_killed(int no_fsync)
{
    lorasync_transport t = open_directory(1, no_fsync);
    uint64_t           v = latest_version();
    for (;;) {
        if (publish(&t, "a", ++v, NULL) != 0) _exit(1);
    }
}

static void killed_publisher(void)
{
    pid_t              readers[2], child;
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    unsigned long long state = 5;
    uint64_t           before;
    int                round, i, result;
    fresh_root();
    for (i = 0; i < 2; i++) {
        readers[i] = fork();
        if (readers[i] == 0) reader_process();
    }
    e = open_engine("a");
    for (round = 0; round < 150; round++) {
        struct timespec rest;
        rest.tv_sec  = 0;
        rest.tv_nsec = (long)(test_random(&state) % 3000000);
        before       = latest_version();
        child        = fork();
        if (child == 0) publish_until_killed(round % 4 != 0);
        nanosleep(&rest, NULL);
        kill(child, SIGKILL);
        waitpid(child, &result, 0);
        CHECK(WIFSIGNALED(result));
        CHECK(latest_version() >= before);
        result = lorasync_engine_poll(e, 0, &err);
        CHECK(result == LORASYNC_OK || result == LORASYNC_NOTHING_NEW);
        CHECK_EQ(served(e, "a"), latest_version());
        before = latest_version() + 1;
        t      = open_directory(1, 1);
        CHECK_EQ(publish(&t, "a", before, &err), 0);
        t.close(t.user);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(served(e, "a"), before);
        if (round % 2) CHECK_EQ(count_names(at("a")), 2); /* nothing is left of the dead */
    }
    write_text(at("stop"), "", 0);
    for (i = 0; i < 2; i++) {
        waitpid(readers[i], &result, 0);
        CHECK(WIFEXITED(result));
        CHECK_EQ(WEXITSTATUS(result), 0);
    }
    lorasync_engine_close(e);
}

/* The lowest free file descriptor: equal before and after, or one leaked. */
static int lowest_fd(void)
{
    int fd = open("/dev/null", O_RDONLY);
    close(fd);
    return fd;
}

/* Publishes version 2 with the k-th step failing or fatal. 1 if there was such a step. */
static int publish_with_step(lorasync_transport *t, long k, int ends, lorasync_status *out, int *out_seen)
{
    lorasync_error err;
    int            result = 0;
    pid_t          child  = ends ? fork() : 0;
    *out                  = LORASYNC_OK;
    if (child == 0) {
        long left;
        if (ends) *t = open_directory(1, 0);
        step_at   = k;
        step_ends = ends;
        *out      = publish(t, "a", 2, &err);
        left      = step_at;
        step_at   = 0;
        if (ends) _exit(*out == 0 && left > 0 ? 0 : 1);
        if (*out < 0) CHECK_EQ(*out, LORASYNC_E_IO);
        if (*out < 0) CHECK_HAS(err.text, root);
        *out_seen = *out < 0 && strstr(err.text, "version 2 can be seen");
        return left == 0;
    }
    waitpid(child, &result, 0);
    CHECK(WIFEXITED(result) && (WEXITSTATUS(result) == 77 || WEXITSTATUS(result) == 0));
    *t = open_directory(1, 0);
    return WEXITSTATUS(result) == 77;
}

/* Whichever step of publishing is the last one, readers have one version or the other, and publishing goes on. With
   leftover 1 an earlier try was cut off between making v2 and pointing to it, with other content; with 2, with the same
   content. */
static void every_step(int ends, int leftover)
{
    long k;
    int  more = 1, num_old = 0, num_new = 0;
    for (k = 1; more && k < 1000; k++) {
        static lorasync_engine *e; /* in a child that ends, valgrind finds it here */
        lorasync_transport      t;
        lorasync_error          err;
        lorasync_status         status;
        int                     fd = lowest_fd();
        uint64_t                now;
        int                     seen = 0;
        fresh_root();
        t = open_directory(1, 0);
        e = open_engine("a");
        if (leftover) {
            CHECK_EQ(publish_seed(&t, "a", 2, leftover == 1, &err), 0);
            unlink(at("a/latest"));
        }
        CHECK_EQ(publish(&t, "a", 1, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        if (ends) t.close(t.user); /* the child publishes, and then the next one */
        more = publish_with_step(&t, k, ends, &status, &seen);
        now  = latest_version();
        num_old += now == 1;
        num_new += now == 2;
        CHECK(now == 1 || now == 2);
        if (!ends) CHECK_EQ(status == 0 || seen, now == 2); /* what can be seen is what the status says */
        if (!ends && now == 1) CHECK(!there(at("a/v2")) || leftover);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), now == 1 ? LORASYNC_NOTHING_NEW : LORASYNC_OK);
        CHECK_EQ(served(e, "a"), now);
        CHECK_EQ(publish(&t, "a", 2, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), now == 2 ? LORASYNC_NOTHING_NEW : LORASYNC_OK);
        CHECK_EQ(served(e, "a"), 2);
        CHECK_EQ(publish(&t, "a", 3, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
        CHECK_EQ(served(e, "a"), 3);
        CHECK_EQ(count_names(at("a")), 2);
        lorasync_engine_close(e);
        t.close(t.user);
        CHECK_EQ(lowest_fd(), fd);
        if (test_errors) {
            fprintf(stderr, "at step %ld, ends %d, leftover %d\n", k, ends, leftover);
            return;
        }
    }
    CHECK(num_old > 10 && num_new > 3);
}

static void every_step_fails(void)
{
    every_step(0, 0);
    every_step(0, 1);
    every_step(0, 2);
}

static void every_step_ends(void)
{
    every_step(1, 0);
    every_step(1, 1);
    every_step(1, 2);
}

/* A poll with any step failing keeps the old version, or serves the new one; the next poll has it. */
static void poll_steps(void)
{
    long k;
    int  more = 1, all;
    for (all = 0; all < 2; all++) {
        lorasync_transport t;
        lorasync_engine   *e;
        lorasync_error     err;
        uint64_t           v = 1;
        int                fd;
        fresh_root();
        t = open_directory(1, 1);
        e = open_engine(all ? NULL : "a");
        CHECK_EQ(publish(&t, "a", v, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        fd = lowest_fd();
        for (k = 1, more = 1; more && k < 1000; k++) {
            lorasync_status status;
            CHECK_EQ(publish(&t, "a", ++v, &err), 0);
            step_ends = 0;
            step_at   = k;
            status    = lorasync_engine_poll(e, 0, &err);
            more      = step_at == 0;
            step_at   = 0;
            CHECK(status == LORASYNC_OK || status == LORASYNC_E_IO);
            CHECK_EQ(served(e, "a"), status == LORASYNC_OK ? v : v - 1);
            if (status < 0) CHECK_HAS(err.text, root);
            CHECK_EQ(lorasync_engine_poll(e, 0, &err), status == LORASYNC_OK ? LORASYNC_NOTHING_NEW : LORASYNC_OK);
            CHECK_EQ(served(e, "a"), v);
            CHECK_EQ(lowest_fd(), fd);
        }
        CHECK(k > 6 && k < 1000);
        lorasync_engine_close(e);
        t.close(t.user);
    }
}

/* -- file systems as they are */

static const int refusals[] = {EINVAL, ENOTSUP, EOPNOTSUPP, ENOSYS, EPERM};

static void no_symbolic_links(void)
{
    size_t i;
    for (i = 0; i < COUNT(refusals); i++) {
        lorasync_transport t;
        lorasync_engine   *e;
        lorasync_image    *image = NULL;
        lorasync_error     err;
        struct stat        st;
        char              *text;
        size_t             n;
        fresh_root();
        t        = open_directory(2, i % 2);
        e        = open_engine(i % 2 ? "a" : NULL);
        no_links = refusals[i];
        CHECK_EQ(publish(&t, "a", 1, &err), 0);
        CHECK_EQ(publish(&t, "a", 2, &err), 0);
        CHECK_EQ(publish(&t, "a", 2, &err), 0); /* again */
        CHECK_EQ(lstat(at("a/latest"), &st), 0);
        CHECK(S_ISREG(st.st_mode));
        text = test_read(at("a/latest"), &n);
        CHECK_TEXT(text, "v2\n");
        free(text);
        CHECK_EQ(publish(&t, "a", 1, &err), LORASYNC_E_VERSION);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(served(e, "a"), 2);
        CHECK_EQ(lorasync_open_adapter(at("a/latest"), NULL, &image, NULL, &err), 0);
        CHECK(image && image->version == 2);
        lorasync_image_free(image);
        CHECK_EQ(publish(&t, "a", 3, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(served(e, "a"), 3);
        CHECK_EQ(count_names(at("a")), 3);
        no_links = 0; /* moved to a file system that has them */
        CHECK_EQ(publish(&t, "a", 4, &err), 0);
        CHECK_EQ(lstat(at("a/latest"), &st), 0);
        CHECK(S_ISLNK(st.st_mode));
        unlink(at("a/latest"));
        write_string(at("a/latest"), "v3"); /* as Git writes a link where there are none */
        CHECK_EQ(lorasync_open_adapter(at("a/latest"), NULL, &image, NULL, &err), 0);
        CHECK(image && image->version == 3);
        lorasync_image_free(image);
        write_string(at("a/latest"), "v3 and more");
        CHECK_EQ(publish(&t, "a", 5, &err), LORASYNC_E_FORMAT);
        CHECK_HAS(err.text, "a/latest points to 'v3 and more', expected v<number>");
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_FORMAT);
        CHECK_EQ(lorasync_open_adapter(at("a/latest"), NULL, &image, NULL, &err), LORASYNC_E_FORMAT);
        lorasync_engine_close(e);
        t.close(t.user);
    }
}

/* A link that fails for another reason is a failure, and leaves nothing. */
static void links_that_fail(void)
{
    lorasync_transport t;
    lorasync_error     err;
    fresh_root();
    t        = open_directory(0, 1);
    no_links = EIO;
    CHECK_EQ(publish(&t, "a", 1, &err), LORASYNC_E_IO);
    CHECK_HAS(err.text, "cannot make the link ");
    CHECK_HAS(err.text, "a/latest: ");
    CHECK_EQ(count_names(at("a")), 0);
    no_links = 0;
    CHECK_EQ(publish(&t, "a", 1, &err), 0);
    t.close(t.user);
}

static void fsync_as_it_is(void)
{
    static const int errors[] = {EIO, ENOSPC, EDQUOT};
    size_t           i;
    for (i = 0; i < COUNT(refusals); i++) {
        lorasync_transport t;
        lorasync_error     err;
        fresh_root();
        rmdir(root);
        t                 = open_directory(0, 0);
        no_directory_sync = refusals[i];
        CHECK_EQ(publish(&t, "a", 1, &err), 0);
        CHECK_EQ(publish(&t, "a", 2, &err), 0);
        no_directory_sync = 0;
        t.close(t.user);
    }
    for (i = 0; i < COUNT(errors); i++) {
        lorasync_transport t;
        lorasync_error     err;
        char               reason[100];
        fresh_root();
        t = open_directory(0, 0);
        CHECK_EQ(publish(&t, "a", 1, &err), 0);
        snprintf(reason, sizeof reason, ": %s", strerror(errors[i]));
        no_file_sync = errors[i];
        CHECK_EQ(publish(&t, "a", 2, &err), LORASYNC_E_IO);
        CHECK_HAS(err.text, "cannot fsync ");
        CHECK_HAS(err.text, "-v2/adapter_model.safetensors: ");
        CHECK_HAS(err.text, reason);
        no_file_sync      = 0;
        no_directory_sync = errors[i];
        CHECK_EQ(publish(&t, "a", 2, &err), LORASYNC_E_IO);
        CHECK_HAS(err.text, "cannot fsync the directory ");
        CHECK_HAS(err.text, reason);
        no_directory_sync = 0;
        CHECK_EQ(count_names(at("a")), 2);
        t.close(t.user);
        no_file_sync = errors[i]; /* of the lease, as it is the first */
        t            = open_directory(0, 0);
        CHECK_EQ(publish(&t, "a", 2, &err), LORASYNC_E_IO);
        CHECK_HAS(err.text, "cannot fsync ");
        CHECK_HAS(err.text, "a/.lock: ");
        no_file_sync = 0;
        CHECK_EQ(publish(&t, "a", 2, &err), 0);
        t.close(t.user);
    }
}

static void read_where_nothing_is_mapped(void)
{
    static const int   errors[] = {ENODEV, EACCES, EPERM, ENOMEM};
    lorasync_transport t;
    size_t             i;
    fresh_root();
    t = open_directory(0, 1);
    CHECK_EQ(publish(&t, "a", 1, NULL), 0);
    for (i = 0; i < COUNT(errors); i++) {
        const lorasync_adapter *pinned;
        lorasync_engine_desc    desc;
        lorasync_engine        *e     = NULL;
        lorasync_image         *image = NULL;
        test_memory             m;
        lorasync_allocator      a = counting(&m);
        lorasync_error          err;
        memset(&desc, 0, sizeof desc);
        desc.directory = root, desc.adapter = "a", desc.allocator = &a;
        CHECK_EQ(lorasync_engine_open(&desc, &e, &err), 0);
        no_maps = errors[i];
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        pinned = lorasync_acquire(e, "a");
        CHECK_EQ(publish(&t, "a", i + 2, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
        CHECK_EQ(served(e, "a"), i + 2);
        CHECK_EQ(wrong_bytes(pinned, 0), 0);
        lorasync_release(pinned);
        lorasync_engine_close(e);
        CHECK_EQ(m.live, 0);
        CHECK_EQ(lorasync_open_adapter(at("a/latest"), &a, &image, NULL, &err), 0);
        CHECK(image && lorasync_image_verify(image, &err) == 0);
        lorasync_image_free(image);
        CHECK_EQ(m.live, 0);
        no_reads = 1; /* it was cut meanwhile */
        CHECK_EQ(lorasync_open_adapter(at("a/latest"), &a, &image, NULL, &err), LORASYNC_E_IO);
        CHECK_HAS(err.text, "bytes and 0 when they were read");
        no_reads  = 0;
        m.fail_at = 1;
        CHECK_EQ(lorasync_open_adapter(at("a/latest"), &a, &image, NULL, &err), LORASYNC_E_MEMORY);
        m.fail_at = 0;
        break_file(at("a/latest/adapter_model.safetensors"), 0, 9);
        CHECK_EQ(lorasync_open_adapter(at("a/latest"), &a, &image, NULL, &err), LORASYNC_E_DIGEST);
        CHECK_EQ(m.live, 0);
        no_maps = 0;
        remove_tree(at("a"));
        CHECK_EQ(publish(&t, "a", i + 2, NULL), 0);
    }
    t.close(t.user);
}

/* `latest` after cp -rL or rsync -L: a directory. */
static void copied_latest(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_image    *image = NULL;
    lorasync_error     err;
    FILE              *f;
    uint64_t           v;
    fresh_root();
    t = open_directory(0, 1);
    e = open_engine(NULL);
    mkdir(at("copy"), 0755);
    for (v = 3; v <= 4; v++) { /* what is copied lies beside it until it is whole */
        CHECK_EQ(publish(&t, "a", v, &err), 0);
        unlink(at("a/latest"));
        CHECK_EQ(rename(at("a/v%d", (int)v), at("copy/next")), 0);
        if (v > 3) CHECK_EQ(rename(at("copy/latest"), at("copy/before")), 0);
        CHECK_EQ(rename(at("copy/next"), at("copy/latest")), 0);
        CHECK_EQ(rename(at("copy"), at("a/copy")), 0);
        CHECK_EQ(rename(at("a/copy/latest"), at("a/latest")), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(served(e, "a"), v);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
        CHECK_EQ(lorasync_open_adapter(at("a/latest"), NULL, &image, NULL, &err), 0);
        CHECK_EQ(image->version, v);
        lorasync_image_free(image);
        CHECK_EQ(publish(&t, "a", 9, &err), LORASYNC_E_FORMAT);
        CHECK_HAS(err.text, "a/latest is not a symbolic link to a version, but a directory");
        CHECK_EQ(rename(at("a/latest"), at("a/copy/latest")), 0);
        CHECK_EQ(rename(at("a/copy"), at("copy")), 0);
    }
    CHECK_EQ(rename(at("copy/latest"), at("a/latest")), 0);
    CHECK_EQ(publish(&t, "b", 5, &err), 0); /* what rsync does: one file in it after the other, each by a rename */
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    image = make_image("a", 5, 0, 64);
    f     = fopen(at("copy/next"), "wb");
    CHECK(f && fwrite(image->header, 1, image->header_bytes, f) == image->header_bytes &&
          fwrite(image->payload, 1, image->payload_bytes, f) == image->payload_bytes);
    if (f) fclose(f);
    drop_image(image);
    CHECK_EQ(rename(at("copy/next"), at("a/latest/adapter_model.safetensors")), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "a"), 5);
    remove_tree(at("a/latest"));
    CHECK_EQ(rename(at("copy/before"), at("a/latest")), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_VERSION);
    CHECK_HAS(err.text, "is v3, v5 is served");
    unlink(at("a/latest/adapter_config.json"));
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_IO);
    CHECK_HAS(err.text, "a/latest/adapter_config.json");
    CHECK_EQ(served(e, "a"), 5);
    lorasync_engine_close(e);
    t.close(t.user);
}

static void lfs_pointers(void)
{
    static const char        pointer[] = "version https://git-lfs.github.com/spec/v1\n"
                                         "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
                                         "size 12345\n";
    static const char *const files[]   = {"adapter_model.safetensors", "adapter_config.json"};
    size_t                   i;
    for (i = 0; i < COUNT(files); i++) {
        lorasync_transport t;
        lorasync_engine   *e;
        lorasync_image    *image = NULL;
        lorasync_error     err;
        fresh_root();
        t = open_directory(0, 1);
        e = open_engine("a");
        CHECK_EQ(publish(&t, "a", 1, &err), 0);
        unlink(at("a/v1/%s", files[i]));
        write_string(at("a/v1/%s", files[i]), pointer);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_FORMAT);
        CHECK_HAS(err.text, files[i]);
        CHECK_HAS(err.text, "is a Git-LFS pointer");
        CHECK_HAS(err.text, "git lfs pull");
        CHECK_EQ(lorasync_open_adapter(at("a/v1"), NULL, &image, NULL, &err), LORASYNC_E_FORMAT);
        CHECK_HAS(err.text, files[i]);
        CHECK_HAS(err.text, "is a Git-LFS pointer");
        lorasync_engine_close(e);
        t.close(t.user);
    }
}

/* -- one publisher */

/* What the error of one that must wait says of the holder. */
static void check_told(const lorasync_error *err, long pid)
{
    char who[120], host[65] = "";
    gethostname(host, sizeof host - 1);
    if (pid == (long)getpid()) snprintf(who, sizeof who, "another transport of this very process (%ld), since 20", pid);
    else snprintf(who, sizeof who, "process %ld on %s, since 20", pid, host);
    CHECK_EQ(err->status, LORASYNC_E_BUSY);
    CHECK_HAS(err->text, "/a is published to by ");
    CHECK_HAS(err->text, who);
    CHECK_HAS(err->text, "one publisher at a time");
}

static void second_publisher(void)
{
    lorasync_transport t, u;
    lorasync_image    *image;
    lorasync_error     err;
    int                told[2], result = 0;
    pid_t              child;
    char               target[100], who[100];
    fresh_root();
    t = open_directory(0, 1);
    u = open_directory(0, 1);
    CHECK_EQ(publish(&t, "a", 1, &err), 0);
    CHECK_EQ(publish(&u, "a", 2, &err), LORASYNC_E_BUSY);
    check_told(&err, (long)getpid());
    CHECK_EQ(publish(&u, "b", 1, &err), 0); /* another adapter is another place */
    CHECK_EQ(publish(&t, "b", 2, &err), LORASYNC_E_BUSY);
    image = make_image("a", 2, 0, 64);
    CHECK_EQ(t.stage(t.user, image, &err), 0);
    CHECK_EQ(pipe(told), 0);
    child = fork();
    if (child == 0) {
        lorasync_transport own = open_directory(0, 1);
        memset(&err, 0, sizeof err);
        publish(&own, "a", 2, &err);
        _exit(write(told[1], &err, sizeof err) != (ssize_t)sizeof err);
    }
    CHECK_EQ(read(told[0], &err, sizeof err), sizeof err);
    waitpid(child, &result, 0);
    CHECK_EQ(err.status, LORASYNC_E_BUSY);
    snprintf(who, sizeof who, "published to by process %ld on ", (long)getpid());
    CHECK_HAS(err.text, who);
    CHECK_EQ(t.commit(t.user, "a", 2, &err), 0); /* what was staged is untouched */
    read_link(at("a/latest"), target);
    CHECK_TEXT(target, "v2");
    drop_image(image);
    t.close(t.user);
    CHECK_EQ(publish(&u, "a", 3, &err), 0);
    u.close(u.user);
    close(told[0]), close(told[1]);
}

/* Publishes as a child until killed; the pipe says when it has begun. */
static pid_t publish_in_child(uint64_t first, int leaves_child)
{
    int   ready[2];
    char  byte = 0;
    pid_t child;
    CHECK_EQ(pipe(ready), 0);
    child = fork();
    if (child == 0) {
        lorasync_transport t = open_directory(0, 1);
        uint64_t           v = first;
        if (publish(&t, "a", v, NULL) != 0) _exit(1);
        if (leaves_child && fork() == 0) { /* as a loader's worker does: it has the file open as long as it lives */
            if (write(ready[1], &byte, 1) != 1) _exit(2);
            close(ready[1]);
            while (there(root) && !there(at("stop"))) test_sleep_ms(1);
            _exit(0);
        }
        if (!leaves_child && write(ready[1], &byte, 1) != 1) _exit(2);
        while (leaves_child) test_sleep_ms(1000);
        for (;;)
            if (publish(&t, "a", ++v, NULL) != 0) _exit(1);
    }
    close(ready[1]);
    CHECK_EQ(read(ready[0], &byte, 1), 1);
    close(ready[0]);
    return child;
}

/* Not so in an overlay, which maps another file in its place. */
static int mapping_keeps_locks(void)
{
    const int first = open(at("probe"), O_RDWR | O_CREAT, 0600), second = open(at("probe"), O_RDWR);
    void     *page = mmap(NULL, 1, PROT_NONE, MAP_SHARED, first, 0);
    int       kept;
    CHECK_EQ(flock(first, LOCK_EX | LOCK_NB), 0);
    close(first);
    kept = flock(second, LOCK_EX | LOCK_NB) != 0;
    close(second);
    if (page != MAP_FAILED) munmap(page, 1);
    return kept;
}

static void killed_holder(void)
{
    lorasync_transport t;
    lorasync_error     err;
    pid_t              child;
    int                turns;
    fresh_root();
    t     = open_directory(0, 1);
    child = publish_in_child(1, 0);
    CHECK_EQ(publish(&t, "a", 1000000, &err), LORASYNC_E_BUSY);
    check_told(&err, (long)child);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    CHECK_EQ(publish(&t, "a", 1000000, &err), 0);
    CHECK_EQ(working("a", ".stage-")[0], 0);
    t.close(t.user);

    fresh_root(); /* what a killed one has forked does not hold its lock */
    t     = open_directory(0, 1);
    child = publish_in_child(1, 1);
    CHECK_EQ(publish(&t, "a", 2, &err), LORASYNC_E_BUSY);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    CHECK_EQ(publish(&t, "a", 2, &err), mapping_keeps_locks() ? 0 : LORASYNC_E_BUSY);
    write_text(at("stop"), "", 0);
    t.close(t.user);

    fresh_root(); /* unless the file cannot be mapped; then it is told of */
    t       = open_directory(0, 1);
    no_maps = ENODEV;
    child   = publish_in_child(1, 1);
    no_maps = 0;
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    CHECK_EQ(publish(&t, "a", 2, &err), LORASYNC_E_BUSY);
    check_told(&err, (long)child);
    CHECK_HAS(err.text, "what it has forked");
    write_text(at("stop"), "", 0);
    for (turns = 0; turns < 10000 && publish(&t, "a", 2, &err) != 0; turns++) test_sleep_ms(1);
    CHECK_EQ(latest_version(), 2);
    t.close(t.user);
}

static void use_in_fork(void)
{
    lorasync_transport t, u;
    lorasync_error     err;
    int                told[2], go[2], result = 0;
    char               byte = 0;
    pid_t              child;
    fresh_root();
    t = open_directory(0, 1);
    u = open_directory(0, 1);
    CHECK_EQ(publish(&t, "a", 1, &err), 0);
    CHECK_EQ(pipe(told) + pipe(go), 0);
    child = fork();
    if (child == 0) {
        memset(&err, 0, sizeof err);
        publish(&t, "a", 2, &err);
        if (write(told[1], &err, sizeof err) != (ssize_t)sizeof err || read(go[0], &byte, 1) != 1) _exit(1);
        _exit(publish(&t, "a", 5, &err) != 0); /* when the parent has closed it, it is anybody's */
    }
    CHECK_EQ(read(told[0], &err, sizeof err), sizeof err);
    CHECK_EQ(err.status, LORASYNC_E_BUSY);
    CHECK_HAS(err.text, "published to by process ");
    CHECK_EQ(publish(&t, "a", 2, &err), 0); /* the parent's lock is still held, by it */
    CHECK_EQ(publish(&u, "a", 3, &err), LORASYNC_E_BUSY);
    t.close(t.user); /* and given up, though the fork lives */
    CHECK_EQ(publish(&u, "a", 3, &err), 0);
    u.close(u.user);
    CHECK_EQ(write(go[1], &byte, 1), 1);
    waitpid(child, &result, 0);
    CHECK(WIFEXITED(result) && WEXITSTATUS(result) == 0);
    CHECK_EQ(latest_version(), 5);
    close(told[0]), close(told[1]), close(go[0]), close(go[1]);
}

static void forked_transport(void)
{
    use_in_fork();
    no_maps = ENODEV; /* the fork has the lock's descriptor */
    use_in_fork();
    no_maps = 0;
}

/* Without locks the newest has the place, and the one before is told so before it publishes anything. */
static void without_locks(void)
{
    static const int errors[] = {ENOLCK, ENOSYS, EINVAL, EOPNOTSUPP};
    size_t           i;
    for (i = 0; i < COUNT(errors); i++) {
        lorasync_transport t, u;
        lorasync_image    *image;
        lorasync_engine   *e;
        lorasync_error     err;
        fresh_root();
        t        = open_directory(0, 1);
        u        = open_directory(0, 1);
        e        = open_engine("a");
        image    = make_image("a", 2, 1, 64);
        no_locks = errors[i];
        CHECK_EQ(publish(&t, "a", 1, &err), 0);
        CHECK_EQ(t.stage(t.user, image, &err), 0);
        CHECK_EQ(publish(&u, "a", 2, &err), 0);
        CHECK_EQ(t.commit(t.user, "a", 2, &err), LORASYNC_E_BUSY);
        check_told(&err, (long)getpid());
        t.abort(t.user, "a", 2);
        CHECK_EQ(publish(&t, "a", 3, &err), LORASYNC_E_BUSY); /* and it does not take it back */
        check_told(&err, (long)getpid());
        CHECK_EQ(publish(&u, "a", 3, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(served(e, "a"), 3);
        CHECK_EQ(count_names(at("a")), 4);
        no_locks = EIO; /* this is no answer of a file system without locks */
        t.close(t.user);
        t = open_directory(0, 1);
        CHECK_EQ(publish(&t, "a", 4, &err), LORASYNC_E_IO);
        CHECK_HAS(err.text, "cannot lock ");
        CHECK_HAS(err.text, "a/.lock: ");
        no_locks = 0;
        drop_image(image);
        lorasync_engine_close(e);
        t.close(t.user);
        u.close(u.user);
    }
}

/* Another's lease in the file, as after a lock that a network file system has broken. */
static void take_over(void)
{
    static const char lease[] = "lorasync publisher\nnonce 00f1e2d3c4b5a697\nhost elsewhere\npid 4711\nsince "
                                "2026-11-28T03:40:02Z\n";
    FILE             *f       = fopen(at("a/.lock"), "r+");
    CHECK(f && fwrite(lease, 1, sizeof lease - 1, f) == sizeof lease - 1);
    if (f) fclose(f);
}

static void lost_lease(void)
{
    lorasync_transport t;
    lorasync_image    *image;
    lorasync_error     err;
    char               target[100];
    int                late;
    for (late = 0; late < 2; late++) { /* before the commit, and in the middle of it */
        fresh_root();
        t     = open_directory(0, 1);
        image = make_image("a", 2, 0, 64);
        CHECK_EQ(publish(&t, "a", 1, &err), 0);
        CHECK_EQ(t.stage(t.user, image, &err), 0);
        if (late) at_link = take_over;
        else take_over();
        CHECK_EQ(t.commit(t.user, "a", 2, &err), LORASYNC_E_BUSY);
        CHECK(at_link == NULL);
        CHECK_HAS(err.text, "process 4711 on elsewhere, since 2026-11-28T03:40:02Z");
        t.abort(t.user, "a", 2);
        read_link(at("a/latest"), target);
        CHECK_TEXT(target, "v1");          /* the one that is stale never moves it */
        CHECK_EQ(there(at("a/v2")), late); /* nor touches what may be the other's by now */
        CHECK_EQ(working("a", ".latest-")[0], 0);
        CHECK_EQ(publish(&t, "a", 2, &err), 0); /* the lock is to be had: the other has ended */
        read_link(at("a/latest"), target);
        CHECK_TEXT(target, "v2");
        drop_image(image);
        t.close(t.user);
    }
}

static void unreadable_lease(void)
{
    static const char *const texts[] = {"", "lorasync", "lorasync publisher\nnonce 0\nhost x\npid 1\nsince y\n"};
    size_t                   i;
    for (i = 0; i < COUNT(texts); i++) {
        lorasync_transport t, u;
        lorasync_error     err;
        fresh_root();
        t = open_directory(0, 1);
        u = open_directory(0, 1);
        CHECK_EQ(publish(&t, "a", 1, &err), 0);
        write_string(at("a/.lock"), texts[i]);
        CHECK_EQ(publish(&u, "a", 2, &err), LORASYNC_E_BUSY); /* the lock says so, whatever is written there */
        CHECK_HAS(err.text, "another process, which has not said yet who it is");
        CHECK_EQ(publish(&t, "a", 2, &err), 0); /* and it writes it anew */
        CHECK_EQ(publish(&u, "a", 3, &err), LORASYNC_E_BUSY);
        check_told(&err, (long)getpid());
        unlink(at("a/.lock"));
        CHECK_EQ(publish(&u, "a", 3, &err), 0); /* whoever removes it says that there is no publisher */
        CHECK_EQ(publish(&t, "a", 4, &err), LORASYNC_E_BUSY);
        u.close(u.user);
        CHECK_EQ(publish(&t, "a", 4, &err), 0);
        t.close(t.user);
        mkdir(at("b"), 0755);
        mkdir(at("b/.lock"), 0755);
        t = open_directory(0, 1);
        CHECK_EQ(publish(&t, "b", 1, &err), LORASYNC_E_IO);
        CHECK_HAS(err.text, "cannot open ");
        CHECK_HAS(err.text, "b/.lock: ");
        t.close(t.user);
    }
}

/* Publishes from v on as process 1 of a pid namespace of its own, as in a container, until the returned pipe is closed;
   -1 where there are no namespaces. *out: to be waited for then. */
static int publish_in_container(uint64_t v, pid_t *out)
{
    int   ready[2], life[2];
    char  byte = 1;
    pid_t inner;
    CHECK_EQ(pipe(ready) + pipe(life), 0);
    *out = fork();
    if (*out == 0) {
        close(life[1]);
        inner = syscall(SYS_unshare, 0x20000000 /* CLONE_NEWPID */) == 0 ? fork() : -1;
        if (inner == 0) {
            lorasync_transport t = open_directory(1, 1);
            if (getpid() != 1 || publish(&t, "a", v, NULL) != 0 || write(ready[1], &byte, 1) != 1) _exit(1);
            for (;;)
                if (publish(&t, "a", ++v, NULL) != 0) _exit(1);
        }
        close(ready[1]);
        if (inner > 0 && read(life[0], &byte, 1) == 0) kill(inner, SIGKILL);
        if (inner > 0) waitpid(inner, NULL, 0);
        _exit(0);
    }
    close(ready[1]), close(life[0]);
    if (read(ready[0], &byte, 1) == 1) byte = 2;
    close(ready[0]);
    if (byte == 2) return life[1];
    close(life[1]);
    waitpid(*out, NULL, 0);
    return -1;
}

static void containers(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    uint64_t           v = 1;
    int                round;
    fresh_root();
    e = open_engine("a");
    for (round = 0; round < 5; round++) {
        pid_t     outer;
        const int life = publish_in_container(v, &outer);
        if (life < 0) {
            lorasync_engine_close(e);
            SKIP("pid namespaces are not to be had here");
        }
        t = open_directory(1, 1);
        CHECK_EQ(publish(&t, "a", v + 1000000, &err), LORASYNC_E_BUSY);
        CHECK_HAS(err.text, "is published to by process 1 on ");
        CHECK(lorasync_engine_poll(e, 100, &err) >= 0);
        CHECK(served(e, "a") >= v);
        close(life);
        waitpid(outer, NULL, 0);
        v = latest_version() + 1;
        CHECK_EQ(publish(&t, "a", v, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(served(e, "a"), v);
        v++;
        t.close(t.user);
    }
    lorasync_engine_close(e);
}

/* -- durable: every file and every name reaches the disk before the name that makes it visible */

/* What was noted, without the root's path and the publisher's nonce. */
static const char *noted(void)
{
    static char text[sizeof durable];
    char       *out = text, real[400];
    const char *p   = durable;
    size_t      n;
    if (!realpath(root, real)) return "";
    n = strlen(real);
    while (*p) {
        if (strncmp(p, real, n) == 0) p += n;
        else if (p > durable && p[-1] == '-' && strspn(p, "0123456789abcdef") == 16) p += 16, *out++ = 'N';
        else *out++ = *p++;
    }
    *out = 0;
    return text;
}

static const char *publish_noted(lorasync_transport *t, uint64_t version)
{
    lorasync_status status;
    num_durable = 0, durable[0] = 0, notes_durable = 1;
    status        = publish(t, "policy", version, NULL);
    notes_durable = 0;
    CHECK_EQ(status, LORASYNC_OK);
    return noted();
}

static void durable_in_order(void)
{
    lorasync_transport t;
    if (access("/proc/self/fd", R_OK) != 0) SKIP("no /proc here, which names open files");
    fresh_root();
    t = open_directory(8, 0);
    CHECK_TEXT(publish_noted(&t, 1), "fsync \n" /* the adapter's new name */
                                     "write /policy/.lock\n"
                                     "fsync /policy/.lock\n"
                                     "write /policy/.stage-N-v1/adapter_model.safetensors\n"
                                     "fsync /policy/.stage-N-v1/adapter_model.safetensors\n"
                                     "write /policy/.stage-N-v1/adapter_config.json\n"
                                     "fsync /policy/.stage-N-v1/adapter_config.json\n"
                                     "fsync /policy/.stage-N-v1\n"
                                     "rename .stage-N-v1 v1\n"
                                     "fsync /policy\n"
                                     "rename .latest-N latest\n"
                                     "fsync /policy\n");
    CHECK_TEXT(publish_noted(&t, 2), "write /policy/.stage-N-v2/adapter_model.safetensors\n"
                                     "fsync /policy/.stage-N-v2/adapter_model.safetensors\n"
                                     "write /policy/.stage-N-v2/adapter_config.json\n"
                                     "fsync /policy/.stage-N-v2/adapter_config.json\n"
                                     "fsync /policy/.stage-N-v2\n"
                                     "rename .stage-N-v2 v2\n"
                                     "fsync /policy\n"
                                     "rename .latest-N latest\n"
                                     "fsync /policy\n");
    t.close(t.user);
    t = open_directory(8, 1);
    CHECK_TEXT(publish_noted(&t, 3), "write /policy/.lock\n"
                                     "fsync /policy/.lock\n" /* for other hosts, which are to see it */
                                     "write /policy/.stage-N-v3/adapter_model.safetensors\n"
                                     "write /policy/.stage-N-v3/adapter_config.json\n"
                                     "rename .stage-N-v3 v3\n"
                                     "rename .latest-N latest\n");
    t.close(t.user);
}

int main(void)
{
    RUN(parse_version);
    RUN(files);
    RUN(large_file);
    RUN(aborted_stage);
    RUN(bad_names);
    RUN(bad_arguments);
    RUN(versions);
    RUN(leftovers);
    RUN(foreign_latest);
    RUN(prune);
    RUN(unwritable);
    RUN(two_phases);
    RUN(transport_struct);
    RUN(retry_after_half);
    RUN(serve);
    RUN(poll_waits);
    RUN(broken);
    RUN(unverified_engine);
    RUN(one_fails);
    RUN(plain);
    RUN(same_version);
    RUN(pins);
    RUN(no_allocation);
    RUN(memory_fails);
    RUN(opening);
    RUN_ON_DATA("adapters", real_adapters);
    RUN(every_step_fails);
    RUN(every_step_ends);
    RUN(poll_steps);
    RUN(reader_threads);
    RUN(killed_publisher);
    RUN(durable_in_order);
    RUN(no_symbolic_links);
    RUN(links_that_fail);
    RUN(fsync_as_it_is);
    RUN(read_where_nothing_is_mapped);
    RUN(copied_latest);
    RUN(lfs_pointers);
    RUN(second_publisher);
    RUN(killed_holder);
    RUN(forked_transport);
    RUN(without_locks);
    RUN(lost_lease);
    RUN(unreadable_lease);
    RUN(containers);
    remove_tree(root);
    return test_summary("test_directory");
}
