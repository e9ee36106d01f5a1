/* The CUDA runtime that lorasync.h calls, without a GPU: include it behind lorasync.h (implementation, LORASYNC_CUDA)
   and link no libcudart.

   Device memory is memory that only the fake's own copies and kernels can touch. Its addresses are reserved and never
   accessible, so that a host that reads them crashes; the bytes lie elsewhere, at a fixed distance, and fake_bytes()
   knows where. (With the address sanitizer it is malloc's, and the sanitizer looks for overruns instead.) It is shared
   with processes forked later, so that a fake IPC handle can be opened there.

       device addresses, no access   | slice of process 0 | slice of process 1 | ..
       the bytes, shared             | slice of process 0 | slice of process 1 | ..

   A stream is a queue of items that run in order:

       head -> [ copy ] -> [ wait for event ] -> [ kernel ] -> [ exchange: asks until its peers are there ] -> tail

   Items run when they are enqueued, unless an item in front of them is not done, or fake_cuda.hold asks for a number of
   "not ready" answers first. One lock guards everything. The kernel is lorasync.h's own, compiled for the CPU and run
   thread by thread. */
#ifndef LORASYNC_TEST_FAKE_CUDA_H
#define LORASYNC_TEST_FAKE_CUDA_H

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#define FAKE_MALLOC 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FAKE_MALLOC 1
#endif
#endif
#ifndef FAKE_MALLOC
#define FAKE_MALLOC 0
#endif

/* -- the kernel: the block >>device of lorasync.h, as C */

#define LORASYNC_DEVICE_CODE
#define LORASYNC_DEVICE_EMULATED
#define LORASYNCD_FN TEST_UNUSED static
#define LORASYNCD_CALL TEST_UNUSED static
#define LORASYNCD_TABLE TEST_UNUSED static
#define LORASYNCD_KERNEL TEST_UNUSED static void
#define LORASYNCD_UNROLL
#define LORASYNCD_ROLLED
#define LORASYNCD_BITS(value) fake_bits(value)
#define LORASYNCD_FLOAT(bits) fake_float(bits)
#define blockIdx fake_block
#define threadIdx fake_thread
#define blockDim fake_dim
#define atomicMin fake_atomic_min
#define atomicAdd fake_atomic_add

typedef unsigned long long lorasyncd_u64;
typedef struct fake_index {
    unsigned x;
} fake_index;
static __thread fake_index fake_block, fake_thread, fake_dim;

TEST_UNUSED static unsigned fake_bits(float value)
{
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}

TEST_UNUSED static float fake_float(unsigned bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

TEST_UNUSED static void fake_atomic_add(lorasyncd_u64 *at, lorasyncd_u64 value)
{
    __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

TEST_UNUSED static void fake_atomic_min(lorasyncd_u64 *at, lorasyncd_u64 value)
{
    lorasyncd_u64 old = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (value < old && !__atomic_compare_exchange_n(at, &old, value, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

#ifndef FAKE_DEVICE_TEXT
#define FAKE_DEVICE_TEXT "lorasync.h"
#endif
#include FAKE_DEVICE_TEXT
#undef blockIdx
#undef threadIdx
#undef blockDim

/* -- state */

enum {
    FAKE_DEVICES = 16,
    FAKE_BLOCKS  = 4096,
    FAKE_SLICES  = 64,
    FAKE_STUCK_S = 20
};
#define FAKE_SLICE ((size_t)256 << 20)

typedef struct fake_item fake_item;

typedef struct fake_memory {
    char  *data;
    size_t num_bytes;
    int    pinned, device;
} fake_memory;

typedef struct fake_arena {
    int taken; /* slices; a process takes one with its first cudaMalloc */
} fake_arena;

typedef struct fake_cuda_state {
    /* set by tests */
    int  devices;        /* 0 is taken for 1 */
    int  no_peer_access; /* between different devices */
    int  ipc_fails;      /* 1: no handle is made; 2: none can be opened */
    int  jit_fails;
    int  no_entry_points;
    int  hold;           /* "not ready" answers of cudaEventQuery before a stream goes on */
    int  delay;          /* times that a kernel is asked to run before it does: other streams run ahead */
    int  slow_device;    /* 1 more than the device that alone has the delay; 0: all have */
    int  launch_fails;   /* 1 more than the device whose next launch fails */
    int  launches_first; /* of it that do not */
    long fail_at;        /* the nth cudaMalloc, cudaHostAlloc, stream or event fails; counts down; 0: none */
    long query_fails_at; /* the nth cudaEventQuery answers that an address was illegal */
    /* looked at by tests */
    long live_memory, live_pinned, live_streams, live_events, live_modules, live_opened, allocations;
    long launches, overruns, errors; /* errors: wrong uses */
    long pageable_in, pageable_out;  /* asynchronous copies from and to memory that is neither the device's nor
                                        pinned */
    /* kept */
    fake_memory         memory[FAKE_BLOCKS];
    int                 num_memory, opened;
    fake_arena         *arena;
    char               *base, *bytes; /* device addresses, and where their bytes are */
    char               *slice;        /* device addresses of this process */
    pid_t               slice_pid;
    cudaStream_t        streams; /* all of them */
    struct CUstream_st *defaults[FAKE_DEVICES];
} fake_cuda_state;

static fake_cuda_state      fake_cuda;
static pthread_mutex_t      fake_lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int         fake_device;
static __thread cudaError_t fake_last_error;

struct CUevent_st {
    unsigned long long recorded, completed;
    int                refs; /* items on streams; freed behind the last */
    int                destroyed;
    cudaStream_t       stream;
    struct CUgraph_st *capture;
};

struct fake_item {
    fake_item *next;
    int (*run)(fake_item *item); /* 1: done */
    void              *dst;
    const void        *src;
    size_t             num_bytes;
    int                value;
    cudaEvent_t        event;
    unsigned long long number;
    void              *blob; /* malloc'ed with the item */
    size_t             blob_bytes;
    void (*end)(fake_item *item); /* before it is freed; may be NULL */
};

struct CUstream_st {
    fake_item          *head, *tail;
    int                 hold, busy, device;
    struct CUgraph_st  *capture;
    struct CUstream_st *next;
};

struct CUgraph_st { /* also the cudaGraphExec_t */
    fake_item *head, *tail;
};

TEST_UNUSED static void fake_error(const char *what)
{
    fake_cuda.errors++;
    fprintf(stderr, "fake CUDA: %s\n", what);
}

static cudaError_t fake_answer(cudaError_t e)
{
    if (e != cudaSuccess && e != cudaErrorNotReady) fake_last_error = e;
    return e;
}

static int fake_fails(void) /* locked */ { return fake_cuda.fail_at && --fake_cuda.fail_at == 0; }

/* -- memory */

static void fake_reserve(void)
{
    void *p;
    if (FAKE_MALLOC || fake_cuda.base) return;
    p = mmap(NULL, FAKE_SLICES * FAKE_SLICE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    fake_cuda.base = p == MAP_FAILED ? NULL : (char *)p;
    p = mmap(NULL, FAKE_SLICES * FAKE_SLICE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    fake_cuda.bytes = p == MAP_FAILED ? NULL : (char *)p;
    p               = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    fake_cuda.arena = p == MAP_FAILED ? NULL : (fake_arena *)p;
}

/* Before forking: device memory and handles are then good in all processes. */
TEST_UNUSED static void fake_cuda_share(void)
{
    pthread_mutex_lock(&fake_lock);
    fake_reserve();
    pthread_mutex_unlock(&fake_lock);
}

/* When all other processes have ended: what was theirs can be given out again. */
TEST_UNUSED static void fake_cuda_reclaim(void)
{
    pthread_mutex_lock(&fake_lock);
    if (fake_cuda.arena)
        fake_cuda.arena->taken =
            fake_cuda.slice_pid == getpid() ? (int)((size_t)(fake_cuda.slice - fake_cuda.base) / FAKE_SLICE) + 1 : 0;
    pthread_mutex_unlock(&fake_lock);
}

/* Where the bytes of an address are: of a device address elsewhere, of any other there. */
static void *fake_bytes(const void *p)
{
    size_t at = (size_t)((uintptr_t)p - (uintptr_t)fake_cuda.base);
    return fake_cuda.base && at < FAKE_SLICES * FAKE_SLICE ? fake_cuda.bytes + at : (void *)(uintptr_t)p;
}

static int fake_find(const void *p)
{
    int i;
    for (i = 0; i < fake_cuda.num_memory; i++)
        if ((const char *)p >= fake_cuda.memory[i].data &&
            (const char *)p < fake_cuda.memory[i].data + fake_cuda.memory[i].num_bytes)
            return i;
    return -1;
}

static char *fake_device_place(size_t num_bytes) /* first fit behind another block, with a gap */
{
    size_t at = 0;
    int    i, moved = 1;
    if (fake_cuda.slice_pid != getpid()) {
        fake_cuda.slice =
            fake_cuda.base + (size_t)(__atomic_fetch_add(&fake_cuda.arena->taken, 1, __ATOMIC_RELAXED)) * FAKE_SLICE;
        fake_cuda.slice_pid = getpid();
    }
    while (moved) {
        moved = 0;
        for (i = 0; i < fake_cuda.num_memory; i++) {
            const fake_memory *m    = &fake_cuda.memory[i];
            size_t             from = (size_t)(m->data - fake_cuda.slice);
            if (m->pinned || m->data < fake_cuda.slice || from >= FAKE_SLICE || at + num_bytes + 256 <= from ||
                at >= from + m->num_bytes + 256)
                continue;
            at    = (from + m->num_bytes + 256 + 255) / 256 * 256;
            moved = 1;
        }
    }
    if (at + num_bytes + 256 > FAKE_SLICE) return NULL;
    return fake_cuda.slice + at;
}

/* Both ends of it. */
static void fake_fill(void *device, int value, size_t num_bytes)
{
    size_t end = num_bytes < 65536 ? num_bytes : 65536;
    char  *p   = (char *)fake_bytes(device);
    memset(p, value, end);
    memset(p + num_bytes - end, value, end);
}

static cudaError_t fake_allocate(void **out, size_t num_bytes, int pinned)
{
    void *p = NULL;
    pthread_mutex_lock(&fake_lock);
    fake_reserve();
    fake_cuda.allocations++;
    *out = NULL;
    if (fake_fails() || fake_cuda.num_memory == FAKE_BLOCKS || num_bytes > FAKE_SLICE) {
    } else if (FAKE_MALLOC || pinned) {
        if (posix_memalign(&p, 256, num_bytes ? num_bytes : 1) != 0) p = NULL;
    } else {
        p = fake_device_place(num_bytes);
    }
    if (p) {
        fake_memory *m = &fake_cuda.memory[fake_cuda.num_memory++];
        m->data        = (char *)p;
        m->num_bytes   = num_bytes;
        m->pinned      = pinned;
        m->device      = fake_device;
        fake_fill(p, 0xCD, num_bytes + (FAKE_MALLOC || pinned ? 0 : 256));
        ++*(pinned ? &fake_cuda.live_pinned : &fake_cuda.live_memory);
        *out = p;
    }
    pthread_mutex_unlock(&fake_lock);
    return fake_answer(p ? cudaSuccess : cudaErrorMemoryAllocation);
}

static int fake_drain_device(void); /* locked, and it lets go of the lock in between */

static cudaError_t fake_release(void *p, int pinned)
{
    int i;
    if (!p) return cudaSuccess;
    pthread_mutex_lock(&fake_lock);
    fake_drain_device();
    i = fake_find(p);
    if (i < 0 || fake_cuda.memory[i].data != p || fake_cuda.memory[i].pinned != pinned) {
        fake_error("freed what was not allocated so");
        pthread_mutex_unlock(&fake_lock);
        return fake_answer(cudaErrorInvalidValue);
    }
    if (!FAKE_MALLOC && !pinned) {
        const unsigned char *end = (const unsigned char *)fake_bytes(p) + fake_cuda.memory[i].num_bytes;
        int                  k;
        for (k = 0; k < 256; k++)
            if (end[k] != 0xCD) {
                fake_cuda.overruns++;
                fake_error("written behind the end of device memory");
                break;
            }
        fake_fill(p, 0xDD, fake_cuda.memory[i].num_bytes);
    } else {
        free(p);
    }
    fake_cuda.memory[i] = fake_cuda.memory[--fake_cuda.num_memory];
    --*(pinned ? &fake_cuda.live_pinned : &fake_cuda.live_memory);
    pthread_mutex_unlock(&fake_lock);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t num_bytes) { return fake_allocate(p, num_bytes ? num_bytes : 1, 0); }
cudaError_t cudaFree(void *p) { return fake_release(p, 0); }
cudaError_t cudaFreeHost(void *p) { return fake_release(p, 1); }
cudaError_t cudaHostAlloc(void **p, size_t num_bytes, unsigned flags)
{
    (void)flags;
    return fake_allocate(p, num_bytes ? num_bytes : 1, 1);
}

/* -- streams */

static struct CUstream_st *fake_stream(cudaStream_t s) /* locked */
{
    int d = fake_device % FAKE_DEVICES;
    if (s) return s;
    if (!fake_cuda.defaults[d]) {
        fake_cuda.defaults[d]         = (struct CUstream_st *)calloc(1, sizeof *s);
        fake_cuda.defaults[d]->device = d;
        fake_cuda.defaults[d]->next   = fake_cuda.streams;
        fake_cuda.streams             = fake_cuda.defaults[d];
    }
    return fake_cuda.defaults[d];
}

static void fake_item_free(fake_item *item)
{
    if (item->end) item->end(item);
    if (item->event && --item->event->refs == 0 && item->event->destroyed) free(item->event);
    free(item->blob);
    free(item);
}

/* Runs what can run. */
static void fake_progress(struct CUstream_st *s) /* locked */
{
    if (s->busy || !s->head) return;
    s->busy = 1;
    while (s->head && s->head->run(s->head)) {
        fake_item *done = s->head;
        s->head         = done->next;
        if (!s->head) s->tail = NULL;
        fake_item_free(done);
    }
    s->busy = 0;
}

static fake_item *fake_copy_item(const fake_item *item)
{
    fake_item *copy = (fake_item *)malloc(sizeof *copy);
    *copy           = *item;
    copy->next      = NULL;
    if (item->blob) {
        copy->blob = malloc(item->blob_bytes);
        memcpy(copy->blob, item->blob, item->blob_bytes);
    }
    return copy;
}

static void fake_append(fake_item **head, fake_item **tail, fake_item *item)
{
    if (*tail) (*tail)->next = item;
    else *head = item;
    *tail = item;
}

/* A copy of the item (and of its blob) goes to the stream, or to the graph that captures it. */
static void fake_enqueue(cudaStream_t stream, const fake_item *item) /* locked */
{
    struct CUstream_st *s = fake_stream(stream);
    if (s->capture) {
        fake_append(&s->capture->head, &s->capture->tail, fake_copy_item(item));
        return;
    }
    if (!s->head) s->hold = fake_cuda.hold;
    if (item->event) item->event->refs++;
    fake_append(&s->head, &s->tail, fake_copy_item(item));
    if (s->hold <= 0) fake_progress(s);
}

static int fake_drain(struct CUstream_st *s) /* locked; waits for other threads */
{
    time_t end = time(NULL) + test_ms(FAKE_STUCK_S);
    while (s->head) {
        fake_progress(s);
        if (!s->head) break;
        if (time(NULL) > end) {
            fake_error("a stream never ended, and somebody waited for it");
            return 0;
        }
        pthread_mutex_unlock(&fake_lock);
        sched_yield();
        pthread_mutex_lock(&fake_lock);
    }
    return 1;
}

static int fake_drain_device(void)
{
    struct CUstream_st *s;
    int                 device = fake_device % FAKE_DEVICES;
    time_t              end    = time(NULL) + test_ms(FAKE_STUCK_S);
    for (;;) {
        int left = 0;
        for (s = fake_cuda.streams; s; s = s->next) {
            if (s->device == device) fake_progress(s);
            left |= s->device == device && s->head;
        }
        if (!left) return 1;
        if (time(NULL) > end) break;
        pthread_mutex_unlock(&fake_lock); /* others may come and go now */
        sched_yield();
        pthread_mutex_lock(&fake_lock);
    }
    fake_error("a device never became idle, and somebody waited for it");
    return 0;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags)
{
    struct CUstream_st *s = NULL;
    (void)flags;
    pthread_mutex_lock(&fake_lock);
    if (!fake_fails()) s = (struct CUstream_st *)calloc(1, sizeof *s);
    if (s) {
        s->device         = fake_device;
        s->next           = fake_cuda.streams;
        fake_cuda.streams = s;
        fake_cuda.live_streams++;
    }
    pthread_mutex_unlock(&fake_lock);
    *out = s;
    return fake_answer(s ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int priority)
{
    (void)priority;
    return cudaStreamCreateWithFlags(out, flags);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    *least = 0, *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t s)
{
    struct CUstream_st **at;
    pthread_mutex_lock(&fake_lock);
    fake_drain(s);
    for (at = &fake_cuda.streams; *at && *at != s; at = &(*at)->next) {}
    if (*at) *at = s->next;
    else fake_error("a stream was destroyed that does not exist");
    fake_cuda.live_streams--;
    pthread_mutex_unlock(&fake_lock);
    free(s);
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t s)
{
    cudaError_t e = cudaSuccess;
    pthread_mutex_lock(&fake_lock);
    s = fake_stream(s);
    if (s->capture) e = cudaErrorStreamCaptureUnsupported;
    else if (!fake_drain(s)) e = cudaErrorUnknown;
    pthread_mutex_unlock(&fake_lock);
    return fake_answer(e);
}

/* -- events */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags)
{
    (void)flags;
    pthread_mutex_lock(&fake_lock);
    *out = fake_fails() ? NULL : (cudaEvent_t)calloc(1, sizeof **out);
    if (*out) fake_cuda.live_events++;
    pthread_mutex_unlock(&fake_lock);
    return fake_answer(*out ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    pthread_mutex_lock(&fake_lock);
    fake_cuda.live_events--;
    event->destroyed = 1;
    if (event->refs == 0) free(event);
    pthread_mutex_unlock(&fake_lock);
    return cudaSuccess;
}

static int fake_run_record(fake_item *item)
{
    item->event->completed = item->number;
    return 1;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    fake_item item;
    memset(&item, 0, sizeof item);
    pthread_mutex_lock(&fake_lock);
    event->stream  = fake_stream(stream);
    event->capture = event->stream->capture;
    if (!event->capture) {
        item.run    = fake_run_record;
        item.event  = event;
        item.number = ++event->recorded;
        fake_enqueue(stream, &item);
    }
    pthread_mutex_unlock(&fake_lock);
    return cudaSuccess;
}

static int fake_run_wait(fake_item *item)
{
    if (item->event->completed >= item->number) return 1;
    fake_progress(item->event->stream);
    return item->event->completed >= item->number;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags)
{
    fake_item item;
    (void)flags;
    memset(&item, 0, sizeof item);
    pthread_mutex_lock(&fake_lock);
    stream = fake_stream(stream);
    if (event->capture) {
        stream->capture = event->capture; /* the stream joins the capture */
    } else if (event->recorded > event->completed) {
        item.run    = fake_run_wait;
        item.event  = event;
        item.number = event->recorded;
        fake_enqueue(stream, &item);
    }
    pthread_mutex_unlock(&fake_lock);
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    cudaError_t e = cudaSuccess;
    pthread_mutex_lock(&fake_lock);
    if (event->capture) e = cudaErrorCapturedEvent;
    else if (fake_cuda.query_fails_at && --fake_cuda.query_fails_at == 0) e = cudaErrorIllegalAddress;
    else if (event->completed < event->recorded) {
        struct CUstream_st *other;
        if (event->stream->hold > 0) event->stream->hold--;
        else fake_progress(event->stream);
        for (other = fake_cuda.streams; other; other = other->next) /* a GPU goes on without being asked */
            if (other->hold <= 0) fake_progress(other);
        if (event->completed < event->recorded) e = cudaErrorNotReady;
    }
    pthread_mutex_unlock(&fake_lock);
    if (e == cudaErrorNotReady) sched_yield();
    return fake_answer(e);
}

cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    cudaError_t e;
    pthread_mutex_lock(&fake_lock);
    fake_progress(fake_stream(stream));
    e = fake_stream(stream)->head ? cudaErrorNotReady : cudaSuccess;
    pthread_mutex_unlock(&fake_lock);
    return fake_answer(e);
}

/* -- copies */

static int fake_run_copy(fake_item *item)
{
    memmove(fake_bytes(item->dst), fake_bytes(item->src), item->num_bytes);
    return 1;
}

static int fake_run_set(fake_item *item)
{
    memset(fake_bytes(item->dst), item->value, item->num_bytes);
    return 1;
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t num_bytes, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    fake_item item;
    (void)kind;
    memset(&item, 0, sizeof item);
    item.run       = fake_run_copy;
    item.dst       = dst;
    item.src       = src;
    item.num_bytes = num_bytes;
    pthread_mutex_lock(&fake_lock);
    if (!fake_cuda.opened && num_bytes) { /* addresses opened from another process are not in the table */
        fake_cuda.pageable_in += fake_find(src) < 0;
        fake_cuda.pageable_out += fake_find(dst) < 0;
    }
    fake_enqueue(stream, &item);
    pthread_mutex_unlock(&fake_lock);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *dst, int value, size_t num_bytes, cudaStream_t stream)
{
    fake_item item;
    memset(&item, 0, sizeof item);
    item.run       = fake_run_set;
    item.dst       = dst;
    item.value     = value;
    item.num_bytes = num_bytes;
    pthread_mutex_lock(&fake_lock);
    fake_enqueue(stream, &item);
    pthread_mutex_unlock(&fake_lock);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *dst, int value, size_t num_bytes) { return cudaMemsetAsync(dst, value, num_bytes, NULL); }

cudaError_t cudaMemcpy(void *dst, const void *src, size_t num_bytes, enum cudaMemcpyKind kind)
{
    (void)kind;
    pthread_mutex_lock(&fake_lock);
    fake_drain(fake_stream(NULL));
    memmove(fake_bytes(dst), fake_bytes(src), num_bytes);
    pthread_mutex_unlock(&fake_lock);
    return cudaSuccess;
}

/* -- devices */

static int fake_devices(void) { return fake_cuda.devices ? fake_cuda.devices : 1; }

cudaError_t cudaGetDeviceCount(int *num)
{
    *num = fake_devices();
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device)
{
    *device = fake_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    if (device < 0 || device >= fake_devices()) return fake_answer(cudaErrorInvalidDevice);
    fake_device = device;
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *p)
{
    int i;
    memset(out, 0, sizeof *out);
    pthread_mutex_lock(&fake_lock);
    i         = fake_find(p);
    out->type = i < 0                        ? cudaMemoryTypeUnregistered
                : fake_cuda.memory[i].pinned ? cudaMemoryTypeHost
                                             : cudaMemoryTypeDevice;
    pthread_mutex_unlock(&fake_lock);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *out, int num_bytes, int device)
{
    if (device < 0 || device >= fake_devices()) return fake_answer(cudaErrorInvalidDevice);
    snprintf(out, (size_t)num_bytes, "0000:%02x:00.0", (unsigned)device & 255u);
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer)
{
    *can = device != peer && !fake_cuda.no_peer_access;
    return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags)
{
    (void)flags;
    return fake_answer(peer == fake_device        ? cudaErrorInvalidDevice
                       : fake_cuda.no_peer_access ? cudaErrorPeerAccessUnsupported
                                                  : cudaSuccess);
}

/* A handle is process, address and size. */
typedef struct fake_handle {
    char  *data;
    size_t num_bytes;
    pid_t  pid;
    int    magic;
} fake_handle;

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *p)
{
    fake_handle h;
    int         i;
    cudaError_t e = cudaSuccess;
    memset(&h, 0, sizeof h);
    pthread_mutex_lock(&fake_lock);
    i = fake_find(p);
    if (fake_cuda.ipc_fails == 1 || i < 0 || fake_cuda.memory[i].pinned) e = cudaErrorInvalidValue;
    else
        h.data = fake_cuda.memory[i].data, h.num_bytes = fake_cuda.memory[i].num_bytes, h.pid = getpid(),
        h.magic = 4711;
    pthread_mutex_unlock(&fake_lock);
    if (e == cudaSuccess) memcpy(handle, &h, sizeof h);
    return fake_answer(e);
}

cudaError_t cudaIpcOpenMemHandle(void **out, cudaIpcMemHandle_t handle, unsigned flags)
{
    fake_handle h;
    (void)flags;
    memcpy(&h, &handle, sizeof h);
    *out = NULL;
    if (FAKE_MALLOC || fake_cuda.ipc_fails == 2 || h.magic != 4711) return fake_answer(cudaErrorInvalidValue);
    if (h.pid == getpid()) return fake_answer(cudaErrorDeviceUninitialized); /* as the driver does */
    pthread_mutex_lock(&fake_lock);
    fake_cuda.live_opened++;
    fake_cuda.opened = 1;
    pthread_mutex_unlock(&fake_lock);
    *out = h.data;
    return cudaSuccess;
}

cudaError_t cudaIpcCloseMemHandle(void *p)
{
    (void)p;
    pthread_mutex_lock(&fake_lock);
    fake_cuda.live_opened--;
    pthread_mutex_unlock(&fake_lock);
    return cudaSuccess;
}

/* -- errors */

cudaError_t cudaGetLastError(void)
{
    cudaError_t e   = fake_last_error;
    fake_last_error = cudaSuccess;
    return e;
}

cudaError_t cudaPeekAtLastError(void) { return fake_last_error; }

const char *cudaGetErrorName(cudaError_t e)
{
    switch ((int)e) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    default: return "cudaErrorOther";
    }
}

const char *cudaGetErrorString(cudaError_t e)
{
    return e == cudaErrorMemoryAllocation ? "out of memory" : e == cudaSuccess ? "no error" : "some error";
}

/* -- driver: the kernel */

static CUresult fake_module_load(CUmodule *module, const void *image)
{
    const char *text = (const char *)image;
    if (fake_cuda.jit_fails || strncmp(text, ".version", 8) != 0 || !strstr(text, ".entry lorasyncd_copy("))
        return CUDA_ERROR_INVALID_PTX;
    *module = (CUmodule)malloc(1);
    pthread_mutex_lock(&fake_lock);
    fake_cuda.live_modules++;
    pthread_mutex_unlock(&fake_lock);
    return CUDA_SUCCESS;
}

static CUresult fake_module_unload(CUmodule module)
{
    free(module);
    pthread_mutex_lock(&fake_lock);
    fake_cuda.live_modules--;
    pthread_mutex_unlock(&fake_lock);
    return CUDA_SUCCESS;
}

static CUresult fake_module_function(CUfunction *function, CUmodule module, const char *name)
{
    *function = (CUfunction)(void *)module;
    return strcmp(name, "lorasyncd_copy") == 0 ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

typedef struct fake_launch {
    unsigned              blocks, threads;
    const lorasyncd_op   *ops;
    const lorasyncd_tile *tiles;
    lorasyncd_u64        *bad, image_shift;
} fake_launch;

/* The kernel reads its op and its tile by index and follows three addresses of the op: it is given one of each, with
   the addresses of the bytes. */
static void fake_run_block(const fake_launch *l, unsigned block)
{
    lorasyncd_tile tile = ((const lorasyncd_tile *)fake_bytes(l->tiles))[block];
    lorasyncd_op   op   = ((const lorasyncd_op *)fake_bytes(l->ops))[tile.op];
    op.src              = (uintptr_t)fake_bytes((const void *)(uintptr_t)op.src);
    op.dst              = (uintptr_t)fake_bytes((const void *)(uintptr_t)op.dst);
    op.sum              = (uintptr_t)fake_bytes((const void *)(uintptr_t)op.sum);
    tile.op             = 0;
    fake_block.x        = 0;
    for (fake_thread.x = 0; fake_thread.x < l->threads; fake_thread.x++)
        lorasyncd_copy(&op, &tile, (lorasyncd_u64 *)fake_bytes(l->bad), l->image_shift);
}

static int fake_run_kernel(fake_item *item)
{
    const fake_launch *l = (const fake_launch *)item->blob;
    unsigned           block;
    if (item->value-- > 0) return 0;
    fake_dim.x = l->threads;
    for (block = 0; block < l->blocks; block++) fake_run_block(l, block);
    return 1;
}

/* From now on, behind `first` launches that do not, the next launch on a device fails. */
TEST_UNUSED static void fake_fail_launch(int device, int first)
{
    pthread_mutex_lock(&fake_lock);
    fake_cuda.launch_fails   = device + 1;
    fake_cuda.launches_first = first;
    pthread_mutex_unlock(&fake_lock);
}

static int fake_launch_fails(void)
{
    int fails;
    pthread_mutex_lock(&fake_lock);
    fails = fake_cuda.launch_fails == fake_device + 1 && fake_cuda.launches_first-- <= 0;
    if (fails) fake_cuda.launch_fails = fake_cuda.launches_first = 0;
    pthread_mutex_unlock(&fake_lock);
    return fails;
}

static CUresult fake_launch_kernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty,
                                   unsigned tz, unsigned shared, CUstream stream, void **parameters, void **extra)
{
    fake_item   item;
    fake_launch l;
    (void)function, (void)shared, (void)extra;
    if (!x || y != 1 || z != 1 || !tx || tx > LORASYNCD_THREADS || tx % 32 || ty != 1 || tz != 1)
        return CUDA_ERROR_INVALID_VALUE;
    if (fake_launch_fails()) return CUDA_ERROR_LAUNCH_FAILED;
    memset(&item, 0, sizeof item);
    l.blocks  = x;
    l.threads = tx;
    memcpy(&l.ops, parameters[0], sizeof l.ops);
    memcpy(&l.tiles, parameters[1], sizeof l.tiles);
    memcpy(&l.bad, parameters[2], sizeof l.bad);
    memcpy(&l.image_shift, parameters[3], sizeof l.image_shift);
    item.run        = fake_run_kernel;
    item.value      = fake_cuda.slow_device && fake_cuda.slow_device != fake_device + 1 ? 0 : fake_cuda.delay;
    item.blob       = &l;
    item.blob_bytes = sizeof l;
    pthread_mutex_lock(&fake_lock);
    fake_cuda.launches++;
    fake_enqueue(stream, &item);
    pthread_mutex_unlock(&fake_lock);
    return CUDA_SUCCESS;
}

static cudaError_t fake_entry_point(const char *name, void **out, enum cudaDriverEntryPointQueryResult *found)
{
    void (*f)(void) = NULL;
    if (strcmp(name, "cuModuleLoadData") == 0) f = (void (*)(void))fake_module_load;
    if (strcmp(name, "cuModuleUnload") == 0) f = (void (*)(void))fake_module_unload;
    if (strcmp(name, "cuModuleGetFunction") == 0) f = (void (*)(void))fake_module_function;
    if (strcmp(name, "cuLaunchKernel") == 0) f = (void (*)(void))fake_launch_kernel;
    if (fake_cuda.no_entry_points) f = NULL;
    memcpy(out, &f, sizeof f);
    if (found) *found = f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

#if CUDART_VERSION >= 12050
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **out, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found)
{
    (void)version, (void)flags;
    return fake_entry_point(name, out, found);
}
#endif
#if CUDART_VERSION < 13000
cudaError_t cudaGetDriverEntryPoint(const char *name, void **out, unsigned long long flags,
                                    enum cudaDriverEntryPointQueryResult *found)
{
    (void)flags;
    return fake_entry_point(name, out, found);
}
#endif

/* -- graphs: what is enqueued on the capturing streams, in that order */

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *out)
{
    pthread_mutex_lock(&fake_lock);
    *out = fake_stream(stream)->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    pthread_mutex_unlock(&fake_lock);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    (void)mode;
    if (!stream) return fake_answer(cudaErrorStreamCaptureUnsupported);
    pthread_mutex_lock(&fake_lock);
    stream->capture = (struct CUgraph_st *)calloc(1, sizeof *stream->capture);
    pthread_mutex_unlock(&fake_lock);
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out)
{
    struct CUstream_st *s;
    pthread_mutex_lock(&fake_lock);
    *out = stream->capture;
    for (s = fake_cuda.streams; s; s = s->next)
        if (s->capture == *out) s->capture = NULL;
    pthread_mutex_unlock(&fake_lock);
    return cudaSuccess;
}

TEST_UNUSED static cudaError_t fake_graph_launch(cudaGraph_t graph, cudaStream_t stream)
{
    const fake_item *item;
    pthread_mutex_lock(&fake_lock);
    for (item = graph->head; item; item = item->next) fake_enqueue(stream, item);
    pthread_mutex_unlock(&fake_lock);
    return cudaSuccess;
}

TEST_UNUSED static void fake_graph_free(cudaGraph_t graph)
{
    while (graph->head) {
        fake_item *next = graph->head->next;
        free(graph->head->blob); /* not run: nothing to end */
        free(graph->head);
        graph->head = next;
    }
    free(graph);
}

/* Sets one of the settings while other ranks run. */
TEST_UNUSED static void fake_set(long *setting, long value)
{
    pthread_mutex_lock(&fake_lock);
    *setting = value;
    pthread_mutex_unlock(&fake_lock);
}

/* Back to the beginning: settings off, counters 0. What is alive stays. */
TEST_UNUSED static void fake_cuda_reset(void)
{
    fake_cuda.devices = fake_cuda.no_peer_access = fake_cuda.ipc_fails = fake_cuda.jit_fails =
        fake_cuda.no_entry_points = fake_cuda.hold = 0;
    fake_cuda.fail_at = fake_cuda.query_fails_at = fake_cuda.launches = fake_cuda.pageable_in = fake_cuda.pageable_out =
        fake_cuda.overruns = fake_cuda.errors = fake_cuda.allocations = 0;
    fake_last_error                                                   = cudaSuccess;
    fake_device                                                       = 0;
}

/* How many things are alive that should not be, and wrong uses. */
TEST_UNUSED static long fake_cuda_left(void)
{
    return fake_cuda.live_memory + fake_cuda.live_pinned + fake_cuda.live_streams + fake_cuda.live_events +
           fake_cuda.live_modules + fake_cuda.live_opened + fake_cuda.overruns + fake_cuda.errors +
           fake_cuda.pageable_in + fake_cuda.pageable_out;
}

#endif
