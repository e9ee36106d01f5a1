#!/bin/sh
# Checks tests/shm.pml, the model of the shared-memory transport's slot protocol, with spin: every reachable state of
# it, and that the model finds what is broken on purpose. About half a minute and 2 GB. Ends with "model: N passed, N
# failed, N skipped"; 77 without spin.

CC=${CC:-cc}
T=${BUILD:-build}/model
here=$(cd "$(dirname "$0")" && pwd)
passed=0 failed=0

command -v spin >/dev/null || {
    echo 'skip model: there is no spin'
    echo 'model: 0 passed, 0 failed, 1 skipped'
    exit 77
}

# Sets errors to what the checker counts; empty when it did not get through.
explore() # FLAGS...
{
    rm -rf "$T" && mkdir -p "$T" || exit 2
    errors=
    (cd "$T" && spin -a "$@" "$here/shm.pml" && $CC -O2 -w -DSAFETY -DCOLLAPSE -DMEMLIM=4000 -o pan pan.c &&
        ./pan -m100000) >"$T.log" 2>&1
    grep -qE 'too small|Interrupted|out of memory|not enough memory' "$T.log" && return
    errors=$(sed -n 's/.*, errors: \([0-9]*\)$/\1/p' "$T.log")
}

holds() # NAME FLAGS...
{
    name=$1
    shift
    explore "$@"
    if [ "$errors" = 0 ]; then
        passed=$((passed + 1))
        echo "ok   $name: $(sed -n 's/^ *\([0-9.e+]*\) states, stored.*/\1/p' "$T.log") states"
    else
        failed=$((failed + 1))
        echo "FAIL $name: $(grep -m 1 -E 'assertion|error|too small|memory' "$T.log") ($T.log)"
    fi
}

breaks() # NAME FLAGS...
{
    name=$1
    shift
    explore "$@"
    if [ "${errors:-0}" != 0 ] && grep -q 'assertion violated' "$T.log"; then
        passed=$((passed + 1))
        echo "ok   $name is found"
    else
        failed=$((failed + 1))
        echo "FAIL $name is not found ($T.log)"
    fi
}

holds 'two readers, one kill' -DPUBLISHED
holds 'one reader, two kills' -DREADERS=1 -DKILLS=2
holds 'one reader that opens again, one kill' -DREADERS=1 -DCLOSES=1
holds 'two publishers, one reader, one kill' -DPUBLISHERS=2 -DREADERS=1
breaks 'a pin that is not checked again' -DPUBLISHED -DNO_RECHECK
breaks 'clearing the pins of a place that is free' -DPUBLISHED -DCLEAR_PINS
breaks 'taking a place away without its lock' -DPUBLISHED -DREADERS=1 -DCLOSES=1 -DBURY_UNLOCKED
breaks 'committing before all is written' -DPUBLISHED -DEARLY_COMMIT
breaks 'looking at the pins before the commit' -DPUBLISHED -DLOOK_BEFORE
echo "model: $passed passed, $failed failed, 0 skipped"
[ $failed -eq 0 ]
