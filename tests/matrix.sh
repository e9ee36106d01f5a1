#!/bin/sh
# Compiles and links lorasync.h in every way that users do, with warnings as errors, and looks at what it leaves behind.
#
#     [MATRIX=quick] tests/matrix.sh      from the repository root
#
# GCC GXX CLANG CLANGXX NVCC CPPCHECK name the tools; one that cannot compile an empty program is one skipped case.
# Prints a line per failing or skipped case (whole output in build/matrix-*) and ends with "matrix: N passed, N failed,
# N skipped".

quick=; [ "$MATRIX" = quick ] && quick=1
GCC=${GCC:-gcc} GXX=${GXX:-g++} CLANG=${CLANG:-clang} CLANGXX=${CLANGXX:-clang++}
NVCC=${NVCC:-nvcc} CPPCHECK=${CPPCHECK:-cppcheck} NM=${NM:-nm}
LIBS=${LDLIBS:--lm -lpthread -lrt}
JOBS=${JOBS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)}
strict="-I. -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wundef -Wcast-qual -Wdouble-promotion"
strict="$strict -Werror"
strict_c="$strict -Wstrict-prototypes"
plain="-I. -Wall -Wextra -Werror"

T=${BUILD:-build}/matrix-${MATRIX:-full}
rm -rf "$T"
mkdir -p "$T" || exit 2

cat >"$T/shared_user.c" <<'END'
#include "lorasync.h"
#include <string.h>
int main(void)
{
    lorasync_desc     d;
    lorasync_session *session;
    memset(&d, 0, sizeof d);
    d.size       = sizeof d;
    d.lora_alpha = 16;
    if (lorasync_version() != LORASYNC_VERSION_NUMBER || lorasync_features() != 0) return 1;
    if (lorasync_open(&d, &session, NULL) != LORASYNC_OK) return 2;
    lorasync_close(session);
    return 0;
}
END

# ---- running cases: up to JOBS at a time; a case is a command (or function), its log $T/N.log, its result $T/N.rc

num=0 passed=0 failed=0 skipped=0

check() # NAME COMMAND...
{
    num=$((num + 1))
    echo "$1" >"$T/$num.name"
    shift
    ( "$@" >"$T/$num.log" 2>&1; echo $? >"$T/$num.rc" ) &
    [ $((num % JOBS)) -ne 0 ] || wait
}

skip() # NAME REASON
{
    skipped=$((skipped + 1))
    echo "skip $1: $2"
}

report()
{
    wait
    i=0
    while [ $i -lt $num ]; do
        i=$((i + 1))
        if [ "$(cat "$T/$i.rc" 2>/dev/null)" = 0 ]; then
            passed=$((passed + 1))
        else
            failed=$((failed + 1))
            first=$(grep -m 1 -E 'error|warning|undefined' "$T/$i.log" || head -n 1 "$T/$i.log")
            echo "FAIL $(cat "$T/$i.name"): $first ($T/$i.log)"
        fi
    done
    echo "matrix: $passed passed, $failed failed, $skipped skipped"
    [ $failed -eq 0 ]
}

# ---- the sources

source_file() { cat >"$T/$1"; }

source_file empty.c <<'END'
#include <stdlib.h>
int main(void) { return 0; }
END
source_file public.c <<'END'
#include "lorasync.h"
#include "lorasync.h"
END
source_file implementation.c <<'END'
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include "lorasync.h"
END
source_file public_first.c <<'END'
#include "lorasync.h"
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include "lorasync.h"
END
source_file system_first.c <<'END'
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
END
source_file system_last.c <<'END'
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
END
source_file user.c <<'END'
#include "lorasync.h"
int main(void) { return lorasync_is_lost(LORASYNC_OK) || !lorasync_status_text(LORASYNC_OK)[0]; }
END
source_file static_main.c <<'END'
#define LORASYNC_STATIC
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
int other(void);
int main(void) { return lorasync_is_lost(LORASYNC_OK) || other(); }
END
source_file static_other.c <<'END'
#define LORASYNC_STATIC
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
int other(void);
int other(void) { return lorasync_is_lost(LORASYNC_OK); }
END
source_file static_alone.c <<'END'
#define LORASYNC_STATIC
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
END

# ---- the cases that are more than one command

# The header's flags for a compiler command: C or C++.
flags() { case $1 in *++*) echo "-x c++ $strict" ;; *) echo "$strict_c" ;; esac; }

# Two objects, each from its own compiler, linked by the third and run.
link_two() # NAME COMPILER_A A.c COMPILER_B B.c LINKER
{
    $2 $(flags "$2") -c "$T/$3" -o "$T/$1.a.o" && $4 $(flags "$4") -c "$T/$5" -o "$T/$1.b.o" &&
        $6 "$T/$1.a.o" "$T/$1.b.o" -o "$T/$1" $LIBS && "$T/$1"
}

object() # NAME COMPILER SOURCE: makes $T/NAME.o; the warnings are other cases
{
    case $2 in *++*) set -- "$1" "$2 -x c++" "$3" ;; esac
    $2 -w -I. -c "$T/$3" -o "$T/$1.o"
}

nothing() # WHAT: passes when stdin is empty
{
    found=$(cat)
    [ -n "$found" ] || return 0
    set -- "$1" "$(echo "$found" | wc -l)" $(echo "$found" | head -n 6)
    more=; [ "$2" -le 6 ] || more=" ... ($2 in all; below)"
    what=$1
    shift 2
    echo "error: $what: $*$more"
    echo "$found"
    return 1
}

# Names the object defines for others.
exported() { $NM -g --defined-only "$1" | awk 'NF == 3 { print $3 }' | sort -u; }

exports_are_public() # NAME COMPILER
{
    object "$1" "$2" implementation.c && exported "$T/$1.o" | grep -v '^lorasync_' | nothing "exported"
}

exports_nothing_static() # NAME COMPILER
{
    object "$1" "$2" static_alone.c && exported "$T/$1.o" | nothing "exported in static mode"
}

# GPU and NCCL entry points are found at run time; the library neither prints nor ends the process.
imports_are_allowed() # NAME COMPILER
{
    object "$1" "$2" implementation.c || return 1
    $NM -u "$T/$1.o" | awk '{ print $NF }' | sed 's/@.*//' | grep -E -x \
        -e 'cuda.*|nccl.*|cu[A-Z].*' \
        -e '(__)?v?f?printf(_chk)?|v?dprintf|puts|putchar|perror|psignal|syslog|stdout|stderr' \
        -e 'abort|exit|_exit|_Exit|quick_exit|__assert.*|err|errx|raise' | nothing "uses"
}

# Every declared function is defined, and the other way round.
declared_is_defined() # NAME COMPILER
{
    object "$1" "$2" implementation.c || return 1
    $2 -I. -E -P -DLORASYNC_API=LORASYNC_DECLARES "$T/public.c" | tr '\n' ' ' | sed 's/LORASYNC_DECLARES/\n&/g' |
        sed -n 's/^LORASYNC_DECLARES[^(;]*[ *]\(lorasync_[a-z0-9_]*\) *(.*/\1/p' | sort -u >"$T/$1.declared"
    exported "$T/$1.o" >"$T/$1.defined"
    [ -s "$T/$1.declared" ] || { echo "error: found no declaration"; return 1; }
    comm -23 "$T/$1.declared" "$T/$1.defined" | nothing "declared, not defined" &&
        comm -13 "$T/$1.declared" "$T/$1.defined" | nothing "defined, not declared"
}

no_macro_left() # COMPILER SOURCE
{
    $1 -I. -std=gnu99 -dM -E "$T/$2" >"$T/$2.macros" || return 1
    grep -E '^#define (LORASYNCI_|LORASYNC_X\b|LORASYNC_ASSERT\b)' "$T/$2.macros" |
        sed 's/^#define \([A-Za-z0-9_]*\).*/\1/' | nothing "still defined"
}

# The header's own recipe. The program that uses the library includes the header without macros.
shared_library() # NAME COMPILER
{
    $2 -O0 -shared -fPIC -fvisibility=hidden -I. -x c lorasync.h -DLORASYNC_IMPLEMENTATION \
        -DLORASYNC_API='__attribute__((visibility("default")))' -o "$T/$1.so" $LIBS &&
        $2 $plain "$T/shared_user.c" "$T/$1.so" -o "$T/$1" && "$T/$1" || return 1
    $NM --version >/dev/null 2>&1 || return 0
    $NM -D --defined-only "$T/$1.so" | awk '{ print $3 }' | grep -v '^lorasync_[a-z]' | nothing "visible, not public"
}

# Strict C99 with a system header first hides POSIX: that must be said, not end in a page of errors.
hidden_posix_is_said() # COMPILER
{
    $1 -I. -std=c99 -fsyntax-only "$T/system_first.c" 2>&1 | grep 'POSIX is hidden' ||
        { echo "error: no word about hidden POSIX"; return 1; }
}

static_check()
{
    # one configuration; the branches of others are compiled above
    $CPPCHECK --quiet --error-exitcode=1 --enable=warning,portability --inline-suppr --std=c99 --language=c -I. \
        -DLORASYNC_IMPLEMENTATION -D__GNUC__=12 -D__linux__=1 -D__x86_64__=1 -DSIZE_MAX=18446744073709551615UL \
        -DO_CLOEXEC=02000000 \
        -DCLOCK_MONOTONIC=1 -U__cplusplus -U__APPLE__ -ULORASYNC_STATIC \
        --suppress=missingInclude --suppress=missingIncludeSystem --suppress=unmatchedSuppression \
        --suppress=toomanyconfigs \
        --suppress=preprocessorErrorDirective "$T/implementation.c"
}

# ---- which compilers there are

works() { "$@" "$T/empty.c" -o "$T/empty.out" >/dev/null 2>&1; }

compilers_c= compilers_cxx=
for cc in $GCC $CLANG; do
    if works $cc; then compilers_c="$compilers_c $cc"; else skip "$cc" "cannot compile an empty C program"; fi
done
for cxx in $GXX $CLANGXX; do
    if works $cxx -x c++; then compilers_cxx="$compilers_cxx $cxx"
    else skip "$cxx" "cannot compile an empty C++ program"; fi
done
if [ -z "$compilers_c" ] && works "${CC:-cc}"; then compilers_c=${CC:-cc}; fi
first_c=${compilers_c# } first_c=${first_c%% *}
if [ -z "$compilers_cxx" ] && works "${CXX:-c++}" -x c++; then compilers_cxx=${CXX:-c++}; fi

# ---- one file: every compiler, every standard

standards_c="c99 gnu99 c11 c17" standards_cxx="c++11 c++17 c++20"
[ -z "$quick" ] || { standards_c="c99 gnu99" standards_cxx="c++11"; }

for cc in $compilers_c; do
    for std in $standards_c; do
        works $cc -std=$std || { skip "$cc $std" "unknown standard"; continue; }
        check "$cc $std implementation" $cc -std=$std $strict_c -fsyntax-only "$T/implementation.c"
        [ -n "$quick" ] || check "$cc $std public part" $cc -std=$std $strict_c -fsyntax-only "$T/public.c"
    done
    [ -n "$quick" ] && [ "$cc" != "$first_c" ] && continue
    check "$cc gnu99 system headers first" $cc -std=gnu99 $strict_c -fsyntax-only "$T/system_first.c"
    check "$cc c99 lorasync.h first" $cc -std=c99 $strict_c -fsyntax-only "$T/system_last.c"
    check "$cc gnu99 public part first" $cc -std=gnu99 $strict_c -fsyntax-only "$T/public_first.c"
    check "$cc c99 hidden POSIX is said" hidden_posix_is_said $cc
    [ -n "$quick" ] && continue
    for opt in -O1 -O2 -O3; do # the optimiser sees more
        check "$cc gnu99 $opt implementation" $cc -std=gnu99 $opt $strict_c -c "$T/implementation.c" \
            -o "$T/$(basename $cc)$opt.o"
    done
done

for cxx in $compilers_cxx; do
    for std in $standards_cxx; do
        works $cxx -x c++ -std=$std || { skip "$cxx $std" "unknown standard"; continue; }
        check "$cxx $std implementation" $cxx -x c++ -std=$std $strict -fsyntax-only "$T/implementation.c"
        [ -n "$quick" ] || check "$cxx $std public part" $cxx -x c++ -std=$std $strict -fsyntax-only "$T/public.c"
    done
    [ -n "$quick" ] && continue
    check "$cxx c++11 system headers first" $cxx -x c++ -std=c++11 $strict -fsyntax-only "$T/system_first.c"
    check "$cxx c++17 -O2 implementation" $cxx -x c++ -std=c++17 -O2 $strict -c "$T/implementation.c" \
        -o "$T/$(basename $cxx)-O2.o"
done

# ---- several files, and what the objects hold: gcc with g++, clang with clang++; quick: the first pair

set -- $compilers_cxx
for cc in $compilers_c; do
    n=$(basename $cc)
    cxx=$1
    check "$cc shared library" shared_library "shared-$n" $cc
    check "$cc two files" link_two "cc-$n" $cc implementation.c $cc user.c $cc
    check "$cc static in two files" link_two "static-$n" $cc static_main.c $cc static_other.c $cc
    if [ -n "$cxx" ]; then
        check "$cc user, $cxx implementation" link_two "cxx-$n" $cxx implementation.c $cc user.c $cxx
        check "$cxx user, $cc implementation" link_two "user-$n" $cc implementation.c $cxx user.c $cxx
        if [ -z "$quick" ]; then
            check "$cxx static in two files" link_two "staticxx-$n" $cxx static_main.c $cxx static_other.c $cxx
            check "$cxx exports only lorasync_*" exports_are_public "exportsxx-$n" $cxx
        fi
        [ $# -lt 2 ] || shift
    else
        skip "$cc with C++" "no C++ compiler"
    fi
    check "$cc leaves no private macro" no_macro_left $cc implementation.c
    if $NM --version >/dev/null 2>&1; then
        check "$cc exports only lorasync_*" exports_are_public "exports-$n" $cc
        check "$cc exports nothing in static mode" exports_nothing_static "exports0-$n" $cc
        check "$cc uses no GPU library, no printing, no exit" imports_are_allowed "imports-$n" $cc
        check "$cc declared is defined" declared_is_defined "declared-$n" $cc
    else
        skip "$cc symbols" "no $NM"
    fi
    [ -z "$quick" ] || break
done

# ---- only in full: the tests in strict C99 and in C++11, cppcheck, nvcc

if [ -z "$quick" ]; then
    set -- $compilers_c
    cc=$1
    set -- $compilers_cxx
    cxx=$1
    for file in tests/test_*.c; do
        [ -e "$file" ] || continue
        check "$cc c99 $file" $cc -std=c99 $plain -fsyntax-only "$file"
        [ -z "$cxx" ] || check "$cxx c++11 $file" $cxx -x c++ -std=c++11 $plain -fsyntax-only "$file"
    done
    if $CPPCHECK --version >/dev/null 2>&1; then check cppcheck static_check; else skip cppcheck "not here"; fi
    if works $NVCC -x cu; then
        check "nvcc implementation" $NVCC -x cu -I. -Werror all-warnings -c "$T/implementation.c" -o "$T/nvcc.o"
    else
        skip "$NVCC" "not here"
    fi
fi

report
