/* The test of restarts with a thousand of them. */
#define ROUNDS 1000
#include "lorasync.h"

#include "test_restarts.c"
