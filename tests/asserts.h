/* Included before everything else in tests: the library states its invariants, and one that does not hold ends the
   test. It includes nothing itself, so that lorasync.h still comes first. */
#ifndef LORASYNC_TEST_ASSERTS_H
#define LORASYNC_TEST_ASSERTS_H

int dprintf(int fd, const char *format, ...);

#define LORASYNC_ASSERT(condition)                                                                                     \
    ((condition) ? (void)0                                                                                             \
                 : (dprintf(2, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition), __builtin_abort()))

#endif
