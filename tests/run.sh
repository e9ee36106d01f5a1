#!/bin/sh
# Runs programs and adds up their last lines ("name: N passed, N failed, N skipped").
#
#     tests/run.sh PROGRAM...      from the repository root; .sh and .py files are given to sh and to $PYTHON
#
# JOBS     programs that run at a time (1), and one more, since many mostly wait
# RUN      words before every program (valgrind ...)
# TIMEOUT  seconds one program may take (300)
# LOGS     folder for NAME.log (build/logs)
# V=1      also prints the tests that passed
#
# A crash, a timeout, a program that was not built and a nonzero exit without a failed test count as one failure each. A
# script (.py) without a summary is one test: exit 0 passed, 77 skipped, otherwise failed. The last line is the sum.

LOGS=${LOGS:-build/logs}
TIMEOUT=${TIMEOUT:-300}
mkdir -p "$LOGS" || exit 2
limit=
timeout 5 true 2>/dev/null && limit="timeout -k 10 $TIMEOUT"

summary='[0-9][0-9]* passed, [0-9][0-9]* failed, [0-9][0-9]* skipped$'

count() { grep -c "$1" "$log"; }

# Sets p, f, s and why from the exit status and the log of a program.
judge()
{
    status=$1 why= p=0 f=0 s=0
    line=$(grep ": $summary" "$log" | tail -n 1)
    if [ -n "$line" ]; then
        set -- $(echo "$line" | sed 's/.*: \([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) skipped$/\1 \2 \3/')
        p=$1 f=$2 s=$3
    else
        case $program in
        *.py) case $status in
              0) p=1 ;;
              77) s=1; echo "skip $name: $(tail -n 1 "$log")" ;;
              esac ;;
        *) p=$(count '^ok ') f=$(count '^FAIL ') s=$(count '^skip ')
           [ "$status" -ne 0 ] || why="ended without a summary" ;;
        esac
    fi
    if [ ! -e "$program" ]; then
        why="was not built"
    elif [ -n "$limit" ] && { [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; }; then
        why="killed, or still running after $TIMEOUT s"
    elif [ "$status" -gt 128 ]; then
        why="killed by SIG$(kill -l $((status - 128)) 2>/dev/null || echo $((status - 128)))"
    elif [ "$status" -ne 0 ] && [ "$f" -eq 0 ] && ! { [ "$status" -eq 77 ] && [ "$s" -ne 0 ]; }; then
        why="exit status $status, though no test failed"
        case $program in *.py) [ -n "$line" ] || why="exit status $status" ;; esac
    fi
    [ -z "$why" ] || f=$((f + 1))
}

# Runs a program and prints what is to be said of it, at once; its numbers go to NAME.sum.
run_one()
{
    program=$1
    name=$(basename "$program")
    name=${name%.*}
    log=$LOGS/$name.log
    case $program in
    *.sh) start=sh ;;
    *.py) start=${PYTHON:-python3} ;;
    *) start= ;;
    esac
    # the outer subshell takes the shell's own "Segmentation fault" into the log
    ( ( exec $limit $RUN $start "$program" </dev/null ); exit $? ) >"$log" 2>&1
    judge $?
    {
        if [ "$f" -ne 0 ] || [ "$V" = 1 ]; then
            if [ "$V" = 1 ]; then cat "$log"; else grep -v '^ok ' "$log" | grep -v ": $summary" | tail -n 200; fi
        else
            grep '^skip ' "$log"
        fi
        [ -z "$why" ] || echo "FAIL $name: $why (log: $log)"
        echo "$name: $p passed, $f failed, $s skipped"
    } >"$LOGS/$name.out"
    cat "$LOGS/$name.out"
    echo "$p $f $s" >"$LOGS/$name.sum"
}

if [ "$1" = --one ]; then
    run_one "$2"
    exit 0
fi

passed=0 failed=0 skipped=0
for program; do
    name=$(basename "$program")
    rm -f "$LOGS/${name%.*}.sum"
done
[ $# -eq 0 ] || printf '%s\n' "$@" | xargs -P $((${JOBS:-1} + 1)) -n 1 sh "$0" --one
for program; do
    name=$(basename "$program")
    p=0 f=1 s=0
    read -r p f s <"$LOGS/${name%.*}.sum" || echo "FAIL ${name%.*}: was not run"
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
done

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
