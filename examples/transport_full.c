/* A transport of your own with all four functions, and its engine side: it has a server load every version over HTTP,
   as vLLM does.

   compile   cc -I. -o transport_full examples/transport_full.c -lm -lpthread    (from the folder that holds lorasync.h)
             cc -DUSE_CURL ... -lcurl     the same requests through libcurl, where TLS or a proxy is needed
   run       ./transport_full             against a small server inside this program
             ./transport_full HOST PORT   against a real one: vllm serve MODEL --enable-lora --max-loras 3, with
                                          VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment. It must see the same
                                          files. Replace the toy parameters below with your model's, or it refuses them
   output    server: loads policy-v1
             version 1: full image of 4736 bytes, requests go to policy-v1, received
             server: loads policy-v2 from a delta
             version 2: delta of 2624 bytes instead of 4736, requests go to policy-v2, received
             server: has no room for policy-v3
             version 3 failed: transport 'http' could not stage: POST /v1/load_lora_delta: 507 no room
             requests still go to policy-v2
             server: loads policy-v3 from a delta
             server: unloads policy-v1
             version 3: delta of 2624 bytes instead of 4736, requests go to policy-v3, received
             server: restarts with nothing
             server: cannot load policy-v4 from a delta: not the base of this delta
             server: loads policy-v4
             version 4: full image of 4736 bytes, a delta of 2624 was refused, requests go to policy-v4, received
             server: loads policy-v5
             version 5: full image of 4736 bytes, requests go to policy-v5, received
             server: restarts with policy-v4
             server: cannot load policy-v6 from a delta: not the base of this delta
             server: loads policy-v6
             server: unloads policy-v4
             version 6: full image of 4736 bytes, a delta of 2624 was refused, requests go to policy-v6, received
             server: unloads policy-v6

   Every version is loaded under a name of its own, so nothing that runs is disturbed, no cache goes stale, and loading
   early is harmless:

       stage    write <folder>/policy-v7/, POST /v1/load_lora_adapter: loaded, and nobody asks for it yet
       commit   requests name policy-v7 from now on; unload the one before the last: running requests go on
       abort    POST /v1/unload_lora_adapter, remove the files
       close    unload and remove what is left
       receipts what the server says that it holds: see below

   Only what changed is sent, if the engine has the rest. It says so in its answers: "holds policy-v6 <digest>",
   which is its receipt, too: a version is published with the commit, and received when the engine itself says so. If
   that is what was sent last, stage writes a delta instead, and POSTs /v1/load_lora_delta. The full image follows if
   the engine refuses (it was restarted, holds something else, or has no such call); it is sent at once if the engine
   says nothing, as vLLM does, or if nearly everything has changed. */
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef USE_CURL
#include <curl/curl.h>
#endif

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
static lorasync_status
fail(lorasync_error *err, lorasync_status status, const char *format, ...)
{
    va_list args;
    if (!err) return status;
    err->status = status;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    return status;
}

/* -- one HTTP request. Returns the status code, or 0 with a reason in `reply`; `reply` gets the beginning of the body.
   At most 60 seconds. */

enum {
    REPLY = 400
};

#ifdef USE_CURL

static size_t collect(char *bytes, size_t size, size_t num, void *user)
{
    char  *reply = (char *)user;
    size_t used = strlen(reply), n = size * num, room = REPLY - 1 - used;
    if (n < room) room = n;
    memcpy(reply + used, bytes, room);
    reply[used + room] = 0;
    return n;
}

static int post(const char *host, int port, const char *path, const char *json, char *reply)
{
    CURL              *curl = curl_easy_init();
    struct curl_slist *type = curl_slist_append(NULL, "Content-Type: application/json");
    CURLcode           code = CURLE_OUT_OF_MEMORY;
    long               http = 0;
    char               url[500];
    snprintf(url, sizeof url, "http://%.250s:%d%.200s", host, port, path);
    reply[0] = 0;
    if (curl && type) {
        curl_easy_setopt(curl, CURLOPT_URL, url);
        curl_easy_setopt(curl, CURLOPT_HTTPHEADER, type);
        curl_easy_setopt(curl, CURLOPT_POSTFIELDS, json);
        curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, collect);
        curl_easy_setopt(curl, CURLOPT_WRITEDATA, reply);
        curl_easy_setopt(curl, CURLOPT_TIMEOUT, 60L);
        curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
        code = curl_easy_perform(curl);
        curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &http);
    }
    if (code != CURLE_OK) {
        snprintf(reply, REPLY, "%s", curl_easy_strerror(code));
        http = 0;
    }
    curl_slist_free_all(type);
    curl_easy_cleanup(curl);
    return (int)http;
}

#else

static int connect_to(const char *host, int port)
{
    struct addrinfo hints, *list = NULL, *a;
    struct timeval  limit;
    char            service[16];
    int             fd = -1;
    memset(&hints, 0, sizeof hints);
    memset(&limit, 0, sizeof limit);
    hints.ai_socktype = SOCK_STREAM;
    limit.tv_sec      = 60;
    snprintf(service, sizeof service, "%d", port);
    if (getaddrinfo(host, service, &hints, &list) != 0) return -1;
    for (a = list; a && fd < 0; a = a->ai_next) {
        fd = socket(a->ai_family, a->ai_socktype, a->ai_protocol);
        if (fd < 0) continue;
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
        if (connect(fd, a->ai_addr, a->ai_addrlen) == 0) continue;
        close(fd);
        fd = -1;
    }
    freeaddrinfo(list);
    return fd;
}

static int post(const char *host, int port, const char *path, const char *json, char *reply)
{
    char        text[4096];
    const char *body;
    int         fd = connect_to(host, port), http = 0, n;
    size_t      size, done                        = 0;
    ssize_t     got = 1;
    snprintf(reply, REPLY, "cannot connect to %.100s port %d", host, port);
    if (fd < 0) return 0;
    n = snprintf(
        text, sizeof text,
        "POST %s HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: "
        "close\r\n\r\n%s",
        path, host, port, (int)strlen(json), json);
    for (size = n > 0 && (size_t)n < sizeof text ? (size_t)n : 0; done < size && got > 0;
         done += got > 0 ? (size_t)got : 0)
        got = send(fd, text + done, size - done, MSG_NOSIGNAL);
    for (done = 0; got > 0 && done<sizeof text - 1; done += got> 0 ? (size_t)got : 0)
        got = recv(fd, text + done, sizeof text - 1 - done, 0);
    close(fd);
    text[done] = 0;
    body       = strstr(text, "\r\n\r\n");
    if (sscanf(text, "HTTP/1.%*d %d", &http) != 1 || !body) {
        snprintf(reply, REPLY, "no answer within 60 seconds");
        return 0;
    }
    snprintf(reply, REPLY, "%.*s", REPLY - 1, body + 4);
    return http;
}

#endif

/* -- the transport */

#define FULL_FILE "adapter_model.safetensors" /* as vLLM wants it */
#define DELTA_FILE "adapter_delta.safetensors"

/* A version that was sent, as far as the next delta needs it. */
typedef struct sent_version {
    uint64_t  version, digest; /* version 0: none */
    uint64_t *tensor_digests;  /* NULL: there was no memory, so no delta */
} sent_version;

typedef struct http_engine {
    const char  *host;
    int          port;
    char         folder[600];
    uint64_t     previous; /* requests that run may still use it */
    sent_version served;   /* requests name it */
    sent_version staged;
    uint64_t     held_version, held_digest; /* what the engine says it holds; 0: it does not say */
    char         how[120];                  /* how the last version was sent */
} http_engine;

static void name_of(char out[64], uint64_t version) { snprintf(out, 64, "policy-v%llu", (unsigned long long)version); }

static void path_of(const http_engine *e, uint64_t version, const char *file, char out[800])
{
    snprintf(out, 800, "%s/policy-v%llu%s%s", e->folder, (unsigned long long)version, *file ? "/" : "", file);
}

static size_t size_of(const lorasync_image *image) { return image->header_bytes + image->payload_bytes; }

/* A full image or a delta: the header, then every tensor. */
static int write_image(const char *path, const lorasync_image *image)
{
    FILE  *f = fopen(path, "wb");
    size_t i;
    int    ok;
    if (!f) return 0;
    ok = fwrite(image->header, 1, image->header_bytes, f) == image->header_bytes;
    for (i = 0; i < image->num_tensors && ok; i++)
        ok = fwrite(image->tensors[i].data, 1, image->tensors[i].num_bytes, f) == image->tensors[i].num_bytes;
    return (fclose(f) == 0) && ok;
}

static int write_text(const char *path, const char *text)
{
    FILE *f  = fopen(path, "wb");
    int   ok = f && fputs(text, f) >= 0;
    return f && (fclose(f) == 0) && ok;
}

/* After every answer: what does the engine hold now? */
static void note(http_engine *e, const char *reply)
{
    unsigned long long version = 0, digest = 0;
    if (sscanf(reply, "holds policy-v%llu %llx", &version, &digest) != 2) version = digest = 0;
    e->held_version = version;
    e->held_digest  = digest;
}

/* Writes a PEFT directory, or one with a delta in it, and has the server load it. The HTTP code, or 0. */
static int load(http_engine *e, const lorasync_image *image, const char *file, const char *call, char *reply)
{
    char name[64], path[800], json[1000];
    int  http;
    name_of(name, image->version);
    path_of(e, image->version, "", path);
    mkdir(path, 0755);
    snprintf(json, sizeof json, "{\"lora_name\": \"%s\", \"lora_path\": \"%s\"}", name, path);
    path_of(e, image->version, "adapter_config.json", path);
    snprintf(reply, REPLY, "cannot write into %.300s", e->folder);
    if (!write_text(path, image->config_json)) return 0;
    path_of(e, image->version, file, path);
    if (!write_image(path, image)) return 0;
    http = post(e->host, e->port, call, json, reply);
    if (http == 200) note(e, reply);
    return http;
}

/* Takes a version from the server and from the disk. A name that is not loaded is no harm. */
static void drop(http_engine *e, uint64_t version)
{
    static const char *const files[] = {"adapter_config.json", FULL_FILE, DELTA_FILE};
    char                     name[64], json[100], reply[REPLY], path[800];
    int                      i;
    if (!version) return;
    name_of(name, version);
    snprintf(json, sizeof json, "{\"lora_name\": \"%s\"}", name);
    if (post(e->host, e->port, "/v1/unload_lora_adapter", json, reply) == 200) note(e, reply);
    for (i = 0; i < 3; i++) {
        path_of(e, version, files[i], path);
        remove(path);
    }
    path_of(e, version, "", path);
    rmdir(path);
}

/* What changed since the served version, if that is what the engine holds and if it is much less than all. NULL: send
   the full image. */
static lorasync_image *delta_for(const http_engine *e, const lorasync_image *image)
{
    const sent_version *s     = &e->served;
    lorasync_image     *delta = NULL;
    if (!s->version || !s->tensor_digests || s->version != e->held_version || s->digest != e->held_digest) return NULL;
    if (lorasync_image_delta(image, s->version, s->tensor_digests, NULL, &delta, NULL) < 0) return NULL;
    if (size_of(delta) <= size_of(image) / 4 * 3) return delta;
    lorasync_image_free(delta);
    return NULL;
}

static void keep(sent_version *s, const lorasync_image *image)
{
    size_t num_bytes = image->num_tensors * sizeof *s->tensor_digests;
    free(s->tensor_digests);
    s->version        = image->version;
    s->digest         = image->digest;
    s->tensor_digests = (uint64_t *)malloc(num_bytes);
    if (s->tensor_digests) memcpy(s->tensor_digests, image->tensor_digests, num_bytes);
}

static lorasync_status http_stage(void *user, const lorasync_image *image, lorasync_error *err)
{
    http_engine    *e    = (http_engine *)user;
    const char     *call = "/v1/load_lora_delta";
    lorasync_image *delta;
    char            reply[REPLY];
    int             http = 409;                                  /* no delta, and the engine refuses it: all the same */
    if (image->version == e->served.version) return LORASYNC_OK; /* a retry for the sake of another engine */
    delta = delta_for(e, image);
    if (delta) http = load(e, delta, DELTA_FILE, call, reply);
    if (http == 404 || http == 409) { /* no such call; not with what it holds */
        snprintf(e->how, sizeof e->how, "full image of %d bytes", (int)size_of(image));
        if (delta)
            snprintf(e->how, sizeof e->how, "full image of %d bytes, a delta of %d was refused", (int)size_of(image),
                     (int)size_of(delta));
        call = "/v1/load_lora_adapter";
        http = load(e, image, FULL_FILE, call, reply);
    } else {
        snprintf(e->how, sizeof e->how, "delta of %d bytes instead of %d", (int)size_of(delta), (int)size_of(image));
    }
    lorasync_image_free(delta);
    if (http != 200) return fail(err, LORASYNC_E_IO, "POST %s: %d %s", call, http, reply);
    keep(&e->staged, image);
    return LORASYNC_OK;
}

static lorasync_status http_commit(void *user, const char *adapter, uint64_t version, lorasync_error *err)
{
    http_engine *e      = (http_engine *)user;
    sent_version before = e->served;
    (void)adapter, (void)err;
    if (version == before.version) return LORASYNC_OK;
    drop(e, e->previous);
    e->previous = before.version;
    e->served   = e->staged; /* the commit: nothing can go wrong here */
    e->staged   = before;    /* its memory is used again */
    return LORASYNC_OK;
}

/* The server's last answer is its receipt. One that says nothing, as vLLM, leaves none. */
static lorasync_status http_receipts(void *user, const char *adapter, size_t index, lorasync_receipt *out,
                                     lorasync_error *err)
{
    const http_engine *e = (const http_engine *)user;
    (void)adapter, (void)err;
    if (index > 0 || !e->held_version) return LORASYNC_NOTHING_NEW;
    snprintf(out->engine, sizeof out->engine, "%.50s:%d", e->host, e->port);
    out->version   = e->held_version;
    out->digest    = e->held_digest;
    out->num_bound = -1; /* it does not say */
    return LORASYNC_OK;
}

static void http_abort(void *user, const char *adapter, uint64_t version)
{
    http_engine *e = (http_engine *)user;
    (void)adapter;
    if (version != e->served.version) drop(e, version);
}

static void http_close(void *user)
{
    http_engine *e = (http_engine *)user;
    drop(e, e->previous);
    drop(e, e->served.version);
    rmdir(e->folder);
    free(e->served.tensor_digests);
    free(e->staged.tensor_digests);
}

/* -- a server for the demonstration: one request per connection, three calls, three slots, and once it has no room */

/* Its engine is lorasync's: that checks what comes, applies deltas, and lets requests pin the versions that they use. A
   version that is loaded is one that the server has pinned. */
typedef struct fake_server {
    int                     listener, port;
    pthread_mutex_t         lock; /* the rest: the trainer's thread looks, and restarts it */
    lorasync_engine        *engine;
    const lorasync_adapter *loaded[3]; /* pinned; NULL: empty */
    char                    paths[3][800];
    int                     refuse; /* 1: the next policy-v3 is refused */
} fake_server;

/* The text between the quotes of "key": "...". */
static void json_text(const char *json, const char *key, char *out, size_t size)
{
    const char *at = strstr(json, key);
    out[0]         = 0;
    if (at) at = strchr(at + strlen(key) + 1, '"');
    if (at) snprintf(out, size, "%.*s", (int)strcspn(at + 1, "\""), at + 1);
}

/* The whole file, and a NUL; NULL when it cannot be read. */
static char *read_file(const char *folder, const char *name, size_t *num_bytes)
{
    char        path[900];
    struct stat st;
    FILE       *f;
    char       *bytes;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    f          = fopen(path, "rb");
    bytes      = f && fstat(fileno(f), &st) == 0 ? (char *)malloc((size_t)st.st_size + 1) : NULL;
    *num_bytes = bytes ? fread(bytes, 1, (size_t)st.st_size, f) : 0;
    if (bytes) bytes[*num_bytes] = 0;
    if (f) fclose(f);
    return bytes;
}

static const lorasync_adapter *newest(const fake_server *s)
{
    const lorasync_adapter *found = NULL;
    int                     i;
    for (i = 0; i < 3; i++)
        if (s->loaded[i] && (!found || s->loaded[i]->version > found->version)) found = s->loaded[i];
    return found;
}

/* What was read of one version: the engine's until it calls release. */
typedef struct version_files {
    char *bytes, *config;
} version_files;

static void release_files(void *user)
{
    version_files *f = (version_files *)user;
    free(f->bytes);
    free(f->config);
    free(f);
}

/* Offers the engine what is in a folder, a full image or a delta: it makes the full image of a delta and of what it
   serves. */
static lorasync_status offer_folder(fake_server *s, const char *folder, const char *file, lorasync_error *err)
{
    version_files    *f = (version_files *)calloc(1, sizeof *f);
    lorasync_delivery d;
    lorasync_status   status;
    size_t            config_bytes;
    if (!f) return fail(err, LORASYNC_E_MEMORY, "no memory");
    memset(&d, 0, sizeof d);
    d.size  = sizeof d;
    d.bytes = f->bytes = read_file(folder, file, &d.num_bytes);
    d.config_json = f->config = read_file(folder, "adapter_config.json", &config_bytes);
    d.where                   = folder;
    d.release                 = release_files;
    d.user                    = f;
    status                    = f->bytes && f->config ? lorasync_engine_offer(s->engine, &d, err)
                                                      : fail(err, LORASYNC_E_IO, "cannot read %.400s", folder);
    if (status != LORASYNC_OK) release_files(f); /* it was not taken */
    return status;
}

/* Both kinds of load. The HTTP code, and what the body says. */
static int fake_load(fake_server *s, const char *body, int is_delta, char *said)
{
    char            name[64], path[800];
    lorasync_error  err;
    lorasync_status status;
    int             i;
    json_text(body, "lora_name", name, sizeof name);
    json_text(body, "lora_path", path, sizeof path);
    for (i = 0; i < 3 && s->loaded[i];) i++; /* an empty slot */
    if (i == 3 || (s->refuse && strcmp(name, "policy-v3") == 0)) {
        s->refuse = 0;
        printf("server: has no room for %s\n", name);
        snprintf(said, REPLY, "no room");
        return 507;
    }
    status = offer_folder(s, path, is_delta ? DELTA_FILE : FULL_FILE, &err);
    if (status >= 0) { /* served now, or already */
        s->loaded[i] = lorasync_acquire(s->engine, "policy");
        snprintf(s->paths[i], sizeof s->paths[i], "%s", path);
        printf("server: loads %s%s\n", name, is_delta ? " from a delta" : "");
        return 200;
    }
    printf("server: cannot load %s%s: %s\n", name, is_delta ? " from a delta" : "", lorasync_status_text(status));
    snprintf(said, REPLY, "%.*s", REPLY - 1, err.text);
    return is_delta ? 409 : 400;
}

static int fake_unload(fake_server *s, const char *body)
{
    char name[64], loaded[64];
    int  i;
    json_text(body, "lora_name", name, sizeof name);
    for (i = 0; i < 3; i++) {
        if (!s->loaded[i]) continue;
        name_of(loaded, s->loaded[i]->version);
        if (strcmp(loaded, name) != 0) continue;
        lorasync_release(s->loaded[i]);
        s->loaded[i] = NULL;
        printf("server: unloads %s\n", name);
        return 200;
    }
    return 404;
}

/* The HTTP code. When all is well the body says what is held now. */
static int fake_answer(fake_server *s, const char *request, const char *body, char *said)
{
    int http = 404;
    snprintf(said, REPLY, "not found");
    pthread_mutex_lock(&s->lock);
    if (strncmp(request, "POST /v1/load_lora_adapter ", 27) == 0) http = fake_load(s, body, 0, said);
    else if (strncmp(request, "POST /v1/load_lora_delta ", 25) == 0) http = fake_load(s, body, 1, said);
    else if (strncmp(request, "POST /v1/unload_lora_adapter ", 29) == 0) http = fake_unload(s, body);
    if (http == 200 && newest(s)) {
        snprintf(said, REPLY, "holds policy-v%llu %016llx", (unsigned long long)newest(s)->version,
                 (unsigned long long)newest(s)->image->digest);
    } else if (http == 200) {
        snprintf(said, REPLY, "holds nothing");
    }
    pthread_mutex_unlock(&s->lock);
    return http;
}

static void stop_engine(fake_server *s)
{
    int i;
    for (i = 0; i < 3; i++) {
        lorasync_release(s->loaded[i]);
        s->loaded[i] = NULL;
    }
    lorasync_engine_close(s->engine);
    s->engine = NULL;
}

static int start_engine(fake_server *s)
{
    lorasync_engine_desc d;
    memset(&d, 0, sizeof d);
    d.offers_only = 1;
    return lorasync_engine_open(&d, &s->engine, NULL) == LORASYNC_OK;
}

/* The server is gone and comes back with one version, which it reads again, or with none (0), as after a crash. */
static void fake_restart(fake_server *s, uint64_t version)
{
    char path[800] = "";
    int  i, good;
    pthread_mutex_lock(&s->lock);
    for (i = 0; i < 3; i++)
        if (s->loaded[i] && s->loaded[i]->version == version) snprintf(path, sizeof path, "%s", s->paths[i]);
    stop_engine(s);
    good = start_engine(s);
    if (good && version) good = offer_folder(s, path, FULL_FILE, NULL) == LORASYNC_OK;
    if (good && version) s->loaded[0] = lorasync_acquire(s->engine, "policy");
    if (!good) printf("server: does not start again\n");
    else if (version) printf("server: restarts with policy-v%d\n", (int)version);
    else printf("server: restarts with nothing\n");
    pthread_mutex_unlock(&s->lock);
}

/* Is the newest image of the server the trainer's, header and payload, to the byte? */
static int same_bytes(fake_server *s, const lorasync_image *image)
{
    const lorasync_image *got;
    int                   same;
    pthread_mutex_lock(&s->lock);
    got  = newest(s) ? newest(s)->image : NULL;
    same = got && got->header_bytes == image->header_bytes && got->payload_bytes == image->payload_bytes &&
           memcmp(got->header, image->header, image->header_bytes) == 0 &&
           memcmp(got->payload, image->payload, image->payload_bytes) == 0;
    pthread_mutex_unlock(&s->lock);
    return same;
}

/* The whole request: the head, and as many bytes as it announces. NULL when it ends before. */
static const char *receive(int fd, char *text, size_t size)
{
    size_t used = 0;
    for (;;) {
        ssize_t     n = recv(fd, text + used, size - 1 - used, 0);
        const char *body, *length;
        if (n <= 0) return NULL;
        used += (size_t)n;
        text[used] = 0;
        body       = strstr(text, "\r\n\r\n");
        length     = strstr(text, "Content-Length:");
        if (body && length && strlen(body + 4) >= strtoul(length + 15, NULL, 10)) return body + 4;
    }
}

static void *fake_main(void *user)
{
    fake_server *s = (fake_server *)user;
    for (;;) {
        char        text[4096], said[REPLY], answer[REPLY + 200];
        const char *body;
        int         http, fd = accept(s->listener, NULL, NULL);
        if (fd < 0) return NULL; /* shut down */
        body = receive(fd, text, sizeof text);
        http = body ? fake_answer(s, text, body, said) : 400;
        if (!body) snprintf(said, sizeof said, "bad request");
        snprintf(answer, sizeof answer, "HTTP/1.1 %d %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", http,
                 http == 200 ? "OK" : "Error", (int)strlen(said), said);
        send(fd, answer, strlen(answer), MSG_NOSIGNAL);
        close(fd);
    }
}

static int fake_open(fake_server *s)
{
    struct sockaddr_in address;
    socklen_t          size = sizeof address;
    memset(s, 0, sizeof *s);
    memset(&address, 0, sizeof address);
    address.sin_family      = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    s->refuse               = 1;
    pthread_mutex_init(&s->lock, NULL);
    if (!start_engine(s)) return 0;
    s->listener = socket(AF_INET, SOCK_STREAM, 0);
    if (s->listener < 0 || bind(s->listener, (struct sockaddr *)&address, size) != 0 || listen(s->listener, 8) != 0)
        return 0;
    if (getsockname(s->listener, (struct sockaddr *)&address, &size) != 0) return 0;
    s->port = ntohs(address.sin_port);
    return 1;
}

/* -- the trainer: one rank, a toy adapter */

static int complain(const lorasync_error *err)
{
    fprintf(stderr, "%s: %s\n", lorasync_status_text(err->status), err->text);
    return 1;
}

/* A and B of two layers. The first layer is trained in few steps only, so there is something to save. */
static float values[4][8 * 64];

static void optimizer_step(uint64_t version)
{
    int i, k, first = version == 1 || version == 5 ? 0 : 2;
    for (k = first; k < 4; k++)
        for (i = 0; i < 8 * 64; i++) values[k][i] = (float)version + (float)i / 512.0f + (float)k;
}

static lorasync_status open_trainer(http_engine *e, lorasync_session **session, lorasync_error *err)
{
    lorasync_desc      desc;
    lorasync_transport transport;
    lorasync_status    status;
    char               name[100];
    int                i;
    memset(&desc, 0, sizeof desc);
    desc.adapter    = "policy";
    desc.lora_alpha = 16;
    desc.wire_dtype = LORASYNC_BF16;
    status          = lorasync_open(&desc, session, err);
    for (i = 0; i < 4 && status == LORASYNC_OK; i++) {
        lorasync_piece piece;
        memset(&piece, 0, sizeof piece);
        snprintf(name, sizeof name, "model.layers.%d.self_attn.q_proj.lora_%c.policy.weight", i / 2, "AB"[i % 2]);
        piece.name     = name;
        piece.dtype    = LORASYNC_F32;
        piece.ndim     = 2;
        piece.shape[0] = i % 2 == 0 ? 8 : 64;
        piece.shape[1] = i % 2 == 0 ? 64 : 8;
        piece.box      = lorasync_whole(piece.shape, piece.ndim);
        piece.data     = values[i];
        status         = lorasync_add(*session, &piece, err);
    }
    memset(&transport, 0, sizeof transport);
    transport.size     = sizeof transport;
    transport.name     = "http";
    transport.user     = e;
    transport.stage    = http_stage;
    transport.commit   = http_commit;
    transport.abort    = http_abort;
    transport.close    = http_close;
    transport.receipts = http_receipts;
    if (status == LORASYNC_OK) status = lorasync_attach(*session, &transport, err);
    return status == LORASYNC_OK ? lorasync_compile(*session, err) : status;
}

/* server: NULL for a real one, whose bytes nobody can look at. */
static int train(http_engine *e, fake_server *server)
{
    lorasync_session *session = NULL;
    lorasync_report   report;
    lorasync_error    err;
    uint64_t          version;
    int               tries = 0, failed = open_trainer(e, &session, &err) < 0 ? complain(&err) : 0;
    for (version = 1; version <= 6 && !failed; version += tries == 0) {
        optimizer_step(version);
        if (server && version == 4) fake_restart(server, 0);
        if (server && version == 6) fake_restart(server, 4);
        if (lorasync_sync(session, version, &report, &err) == LORASYNC_OK) {
            tries = 0;
            printf("version %d: %s, requests go to policy-v%d%s\n", (int)version, e->how, (int)e->served.version,
                   report.num_received ? ", received" : "");
            failed = server && !same_bytes(server, lorasync_session_image(session));
            if (failed) printf("version %d: the server has other bytes than the trainer\n", (int)version);
        } else {
            printf("version %d failed: %s\nrequests still go to policy-v%d\n", (int)version, err.text,
                   (int)e->served.version);
            failed = ++tries > 1; /* the same version may be tried again */
        }
    }
    lorasync_close(session);
    return failed;
}

int main(int argc, char **argv)
{
    http_engine e;
    fake_server server;
    pthread_t   thread;
    const char *tmp  = getenv("TMPDIR");
    int         real = argc == 3, failed;
    setvbuf(stdout, NULL, _IOLBF, 0);
    memset(&e, 0, sizeof e);
    e.host = real ? argv[1] : "127.0.0.1";
    e.port = real ? atoi(argv[2]) : 0;
    snprintf(e.folder, sizeof e.folder, "%.400s/lorasync-http-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(e.folder)) {
        perror(e.folder);
        return 1;
    }
    if (!real && (!fake_open(&server) || pthread_create(&thread, NULL, fake_main, &server) != 0)) {
        perror("server");
        return 1;
    }
    if (!real) e.port = server.port;
    failed = train(&e, real ? NULL : &server);
    if (!real) {
        shutdown(server.listener, SHUT_RDWR);
        pthread_join(thread, NULL);
        close(server.listener);
        stop_engine(&server);
        pthread_mutex_destroy(&server.lock);
    }
    return failed;
}
