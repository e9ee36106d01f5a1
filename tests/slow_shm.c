/* The tests of the shared-memory transport with ten times as many kills. */
#define ROUNDS 1000
#include "test_shm.c"
