/* What everything else stands on: growing buffers, arenas, hashes, and whether a process has ended. */
#define LORASYNC_STATIC
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include "test.h"

static lorasync_allocator plain_allocator(void)
{
    lorasync_allocator a;
    lorasync_error     err;
    CHECK_EQ(lorasynci_take_allocator(NULL, &a, &err), LORASYNC_OK);
    return a;
}

/* What a buffer counts never passes its memory, whatever sizes are put, one behind the other. */
static void buffer_grows_in_time(void)
{
    lorasync_allocator a = plain_allocator();
    lorasynci_buffer   b;
    char               bytes[300];
    size_t             n, total = 0;
    memset(bytes, 'x', sizeof bytes);
    lorasynci_buffer_init(&b, &a);
    for (n = 0; n < sizeof bytes; n++) {
        lorasynci_put(&b, bytes, n % 7);
        total += n % 7;
        CHECK(b.size == total && b.size <= b.capacity);
    }
    while (b.size < b.capacity) lorasynci_put(&b, bytes, 1); /* full to the last byte */
    n = b.capacity;
    lorasynci_put(&b, bytes, 1);
    CHECK(b.size == n + 1 && b.capacity > n && !b.failed);
    lorasynci_buffer_free(&b);
}

/* A text that does not fit is no text that is cut. */
static void long_format_fails(void)
{
    lorasync_allocator a = plain_allocator();
    lorasynci_buffer   b;
    char               text[300];
    memset(text, 'x', sizeof text);
    text[255] = 0;
    lorasynci_buffer_init(&b, &a);
    lorasynci_put_format(&b, "%s", text);
    CHECK(!b.failed && b.size == 255);
    text[255] = 'x', text[256] = 0;
    lorasynci_put_format(&b, "%s", text);
    CHECK(b.failed && b.size == 255);
    lorasynci_put_format(&b, "%d", 1); /* and it stays so */
    CHECK(b.failed && b.size == 255);
    lorasynci_buffer_free(&b);
}

/* An arena notices every array that it has no memory for, also one of nothing, and a later success does not hide it. */
static void arena_notices(void)
{
    size_t num;
    for (num = 0; num < 2; num++) {
        test_memory        m = {0, 0, 2};
        lorasync_allocator a;
        lorasynci_meter    meter = {0, 0};
        lorasynci_arena    arena;
        lorasync_error     err;
        a.alloc = test_memory_alloc, a.free = test_memory_free, a.user = &m;
        lorasynci_arena_open(&arena, &a, &meter);
        CHECK(lorasynci_arena_array(&arena, 10, 8) != NULL);
        CHECK_EQ(lorasynci_arena_check(&arena, &err), LORASYNC_OK);
        CHECK(lorasynci_arena_array(&arena, num, 8) == NULL);
        CHECK(lorasynci_arena_array(&arena, 10, 8) != NULL);
        CHECK_EQ(lorasynci_arena_check(&arena, &err), LORASYNC_E_MEMORY);
        lorasynci_arena_close(&arena);
        CHECK_EQ(m.live, 0);
    }
}

/* Every byte counts, and so does the size. */
static void hash_sees_every_byte(void)
{
    unsigned char bytes[24] = {0};
    size_t        n, i;
    for (n = 0; n <= sizeof bytes; n++) {
        const uint64_t h = lorasynci_hash(bytes, n, 1);
        CHECK(h == lorasynci_hash(bytes, n, 1) && h != lorasynci_hash(bytes, n, 2));
        if (n < sizeof bytes) CHECK(h != lorasynci_hash(bytes, n + 1, 1)); /* zeros at the end count */
        for (i = 0; i < n; i++) {
            bytes[i] = 1;
            CHECK(h != lorasynci_hash(bytes, n, 1));
            bytes[i] = 0;
        }
    }
}

int main(void)
{
    RUN(buffer_grows_in_time);
    RUN(long_format_fails);
    RUN(arena_notices);
    RUN(hash_sees_every_byte);
    return test_summary("test_support");
}
