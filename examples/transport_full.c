/* A transport of one's own with all four functions: it has a server load every version over HTTP, as vLLM does.

   compile   cc -I. -o transport_full examples/transport_full.c -lm -lpthread            (from the folder that holds lorasync.h)
             cc -DUSE_CURL ... -lcurl     the same requests through libcurl, where TLS or a proxy is needed
   run       ./transport_full             against a small server inside this program
             ./transport_full HOST PORT   against a real one: vllm serve MODEL --enable-lora --max-loras 3 and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True
                                          in its environment. It must see the same files; and put your model's parameters in place of the
                                          toy ones below, or it will refuse them
   output    server: loads policy-v1
             version 1: requests go to policy-v1
             server: loads policy-v2
             version 2: requests go to policy-v2
             server: has no room for policy-v3
             version 3 failed: transport 'http' could not stage: POST /v1/load_lora_adapter: 507 no room
             requests still go to policy-v2
             server: loads policy-v3
             server: unloads policy-v1
             version 3: requests go to policy-v3
             server: unloads policy-v2
             server: unloads policy-v3

   Every version is loaded under a name of its own, so nothing that runs is disturbed, no cache goes stale, and loading early is harmless:

       stage    write <folder>/policy-v7/, POST /v1/load_lora_adapter        loaded, and nobody asks for it
       commit   from now on requests name policy-v7; unload the one before the last      one slot for requests that are still running
       abort    POST /v1/unload_lora_adapter, remove the files
       close    unload and remove what is left */
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
    err->status = status;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    return status;
}

/* -- one HTTP request. Returns the status code, or 0 with a reason in `reply`; `reply` gets the beginning of the body. At most 60 seconds. */

enum { REPLY = 200 };

#ifdef USE_CURL

static size_t collect(char *bytes, size_t size, size_t num, void *user)
{
    char  *reply = (char *)user;
    size_t used  = strlen(reply), n = size * num, room = REPLY - 1 - used;
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
    size_t      size, done = 0;
    ssize_t     got = 1;
    snprintf(reply, REPLY, "cannot connect to %.100s port %d", host, port);
    if (fd < 0) return 0;
    n = snprintf(text, sizeof text, "POST %s HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s",
                 path, host, port, (int)strlen(json), json);
    for (size = n > 0 && (size_t)n < sizeof text ? (size_t)n : 0; done < size && got > 0; done += got > 0 ? (size_t)got : 0)
        got = send(fd, text + done, size - done, MSG_NOSIGNAL);
    for (done = 0; got > 0 && done < sizeof text - 1; done += got > 0 ? (size_t)got : 0) got = recv(fd, text + done, sizeof text - 1 - done, 0);
    close(fd);
    text[done] = 0;
    body       = strstr(text, "\r\n\r\n");
    if (sscanf(text, "HTTP/1.%*d %d", &http) != 1 || !body) {
        snprintf(reply, REPLY, "no answer within 60 seconds");
        return 0;
    }
    snprintf(reply, REPLY, "%.199s", body + 4);
    return http;
}

#endif

/* -- the transport */

typedef struct http_engine {
    const char *host;
    int         port;
    char        folder[600];
    uint64_t    served;   /* requests name it */
    uint64_t    previous; /* requests that run may still use it */
} http_engine;

static void name_of(char out[64], uint64_t version) { snprintf(out, 64, "policy-v%llu", (unsigned long long)version); }

static void path_of(const http_engine *e, uint64_t version, const char *file, char out[800])
{
    snprintf(out, 800, "%s/policy-v%llu%s%s", e->folder, (unsigned long long)version, *file ? "/" : "", file);
}

static int write_file(const char *path, const void *first, size_t num_first, const void *second, size_t num_second)
{
    FILE *f = fopen(path, "wb");
    int   ok;
    if (!f) return 0;
    ok = fwrite(first, 1, num_first, f) == num_first && fwrite(second, 1, num_second, f) == num_second;
    return (fclose(f) == 0) && ok;
}

/* A PEFT directory, as vLLM wants it. */
static lorasync_status write_directory(const http_engine *e, const lorasync_image *image, lorasync_error *err)
{
    char path[800];
    path_of(e, image->version, "", path);
    mkdir(path, 0755);
    path_of(e, image->version, "adapter_config.json", path);
    if (!write_file(path, image->config_json, strlen(image->config_json), "", 0)) return fail(err, LORASYNC_E_IO, "cannot write %s", path);
    path_of(e, image->version, "adapter_model.safetensors", path);
    if (!write_file(path, image->header, image->header_bytes, image->payload, image->payload_bytes))
        return fail(err, LORASYNC_E_IO, "cannot write %s", path);
    return LORASYNC_OK;
}

/* Takes a version from the server and from the disk. A name that is not loaded is no harm. */
static void drop(const http_engine *e, uint64_t version)
{
    char name[64], json[100], reply[REPLY], path[800];
    if (!version) return;
    name_of(name, version);
    snprintf(json, sizeof json, "{\"lora_name\": \"%s\"}", name);
    post(e->host, e->port, "/v1/unload_lora_adapter", json, reply);
    path_of(e, version, "adapter_config.json", path);
    remove(path);
    path_of(e, version, "adapter_model.safetensors", path);
    remove(path);
    path_of(e, version, "", path);
    rmdir(path);
}

static lorasync_status http_stage(void *user, const lorasync_image *image, lorasync_error *err)
{
    http_engine *e = (http_engine *)user;
    char         name[64], path[800], json[1000], reply[REPLY];
    int          http;
    if (image->version == e->served) return LORASYNC_OK; /* a retry for the sake of another engine */
    if (write_directory(e, image, err) < 0) return err->status;
    name_of(name, image->version);
    path_of(e, image->version, "", path);
    snprintf(json, sizeof json, "{\"lora_name\": \"%s\", \"lora_path\": \"%s\"}", name, path);
    http = post(e->host, e->port, "/v1/load_lora_adapter", json, reply);
    if (http == 200) return LORASYNC_OK;
    return fail(err, LORASYNC_E_IO, "POST /v1/load_lora_adapter: %d %s", http, reply);
}

static lorasync_status http_commit(void *user, const char *adapter, uint64_t version, lorasync_error *err)
{
    http_engine *e = (http_engine *)user;
    (void)adapter, (void)err;
    if (version == e->served) return LORASYNC_OK;
    drop(e, e->previous);
    e->previous = e->served;
    e->served   = version; /* the commit: nothing can go wrong here */
    return LORASYNC_OK;
}

static void http_abort(void *user, const char *adapter, uint64_t version)
{
    const http_engine *e = (const http_engine *)user;
    (void)adapter;
    if (version != e->served) drop(e, version);
}

static void http_close(void *user)
{
    http_engine *e = (http_engine *)user;
    drop(e, e->previous);
    drop(e, e->served);
    rmdir(e->folder);
}

/* -- a server for the demonstration: one request per connection, two calls, three slots, and once it has no room */

typedef struct fake_server {
    int  listener, port;
    char loaded[3][64];
    int  refuse; /* 1: the next policy-v3 is refused */
} fake_server;

/* The text between the quotes of "key": "...". */
static void json_text(const char *json, const char *key, char *out, size_t size)
{
    const char *at = strstr(json, key);
    out[0]         = 0;
    if (at) at = strchr(at + strlen(key) + 1, '"');
    if (at) snprintf(out, size, "%.*s", (int)strcspn(at + 1, "\""), at + 1);
}

static int fake_load(fake_server *s, const char *body)
{
    char            name[64], path[800];
    lorasync_image *image = NULL;
    int             i;
    json_text(body, "lora_name", name, sizeof name);
    json_text(body, "lora_path", path, sizeof path);
    for (i = 0; i < 3 && s->loaded[i][0];) i++;
    if (i == 3 || (s->refuse && strcmp(name, "policy-v3") == 0)) {
        s->refuse = 0;
        printf("server: has no room for %s\n", name);
        return 507;
    }
    if (lorasync_open_adapter(path, NULL, &image, NULL, NULL) < 0) return 400;
    lorasync_image_free(image);
    snprintf(s->loaded[i], sizeof s->loaded[i], "%s", name);
    printf("server: loads %s\n", name);
    return 200;
}

static int fake_unload(fake_server *s, const char *body)
{
    char name[64];
    int  i;
    json_text(body, "lora_name", name, sizeof name);
    for (i = 0; i < 3; i++) {
        if (strcmp(s->loaded[i], name) != 0) continue;
        s->loaded[i][0] = 0;
        printf("server: unloads %s\n", name);
        return 200;
    }
    return 404;
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
        char        text[4096], answer[200];
        const char *body, *word;
        int         http, fd = accept(s->listener, NULL, NULL);
        if (fd < 0) return NULL; /* shut down */
        body = receive(fd, text, sizeof text);
        http = !body ? 400 : strncmp(text, "POST /v1/load_lora_adapter ", 27) == 0 ? fake_load(s, body)
             : strncmp(text, "POST /v1/unload_lora_adapter ", 29) == 0 ? fake_unload(s, body) : 404;
        word = http == 200 ? "ok" : http == 507 ? "no room" : "bad request";
        snprintf(answer, sizeof answer, "HTTP/1.1 %d %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", http, word, (int)strlen(word), word);
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
    s->listener             = socket(AF_INET, SOCK_STREAM, 0);
    if (s->listener < 0 || bind(s->listener, (struct sockaddr *)&address, size) != 0 || listen(s->listener, 8) != 0) return 0;
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

static float values[2][8 * 64];

static lorasync_status open_trainer(http_engine *e, lorasync_session **session, lorasync_error *err)
{
    static const char *const names[2] = {"model.layers.0.self_attn.q_proj.lora_A.policy.weight", "model.layers.0.self_attn.q_proj.lora_B.policy.weight"};
    lorasync_desc            desc;
    lorasync_transport       transport;
    lorasync_status          status;
    int                      i;
    memset(&desc, 0, sizeof desc);
    desc.adapter    = "policy";
    desc.lora_alpha = 16;
    desc.wire_dtype = LORASYNC_BF16;
    status          = lorasync_open(&desc, session, err);
    for (i = 0; i < 2 && status == LORASYNC_OK; i++) {
        lorasync_piece piece;
        memset(&piece, 0, sizeof piece);
        piece.name     = names[i];
        piece.dtype    = LORASYNC_F32;
        piece.ndim     = 2;
        piece.shape[0] = i == 0 ? 8 : 64;
        piece.shape[1] = i == 0 ? 64 : 8;
        piece.box      = lorasync_whole(piece.shape, piece.ndim);
        piece.data     = values[i];
        status         = lorasync_add(*session, &piece, err);
    }
    memset(&transport, 0, sizeof transport);
    transport.size   = sizeof transport;
    transport.name   = "http";
    transport.user   = e;
    transport.stage  = http_stage;
    transport.commit = http_commit;
    transport.abort  = http_abort;
    transport.close  = http_close;
    if (status == LORASYNC_OK) status = lorasync_attach(*session, &transport, err);
    return status == LORASYNC_OK ? lorasync_compile(*session, err) : status;
}

static int train(http_engine *e)
{
    lorasync_session *session = NULL;
    lorasync_error    err;
    uint64_t          version;
    int               i, tries = 0, failed = open_trainer(e, &session, &err) < 0 ? complain(&err) : 0;
    for (version = 1; version <= 3 && !failed; version += tries == 0) {
        for (i = 0; i < 8 * 64; i++) values[0][i] = values[1][i] = (float)version + (float)i / 512.0f;
        if (lorasync_sync(session, version, NULL, &err) == LORASYNC_OK) {
            tries = 0;
            printf("version %d: requests go to policy-v%d\n", (int)version, (int)e->served);
        } else {
            printf("version %d failed: %s\nrequests still go to policy-v%d\n", (int)version, err.text, (int)e->served);
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
    failed = train(&e);
    if (!real) {
        shutdown(server.listener, SHUT_RDWR);
        pthread_join(thread, NULL);
        close(server.listener);
    }
    return failed;
}
