#!/bin/sh
# Runs the examples, and the program that the README shows.
#
#     tests/examples.sh      from the repository root, after `make examples`
#
# CC STD LDLIBS PYTHON as in the Makefile. LORASYNC_TEST_DATA: the folder with the trained adapters (../shared/data).
# Prints a line per failing case and ends with "examples: N passed, N failed, N skipped".

E=${BUILD:-build}/examples
T=${BUILD:-build}/examples-test
CC=${CC:-cc} PYTHON=${PYTHON:-python3}
LIBS=${LDLIBS:--lm -lpthread -lrt}
passed=0 failed=0 skipped=0
rm -rf "$T"
mkdir -p "$T" || exit 2

ok() { passed=$((passed + 1)); echo "ok $1"; }
skip() { skipped=$((skipped + 1)); echo "skip $1: $2"; }

bad() # NAME REASON
{
    failed=$((failed + 1))
    echo "FAIL $1: $2"
    tail -n 5 "$T/out"
}

# Runs a command, its output in $T/out; it must end with a status and its last line must match a pattern of grep.
expect() # NAME STATUS PATTERN COMMAND...
{
    case=$1 want=$2 pattern=$3
    shift 3
    "$@" >"$T/out" 2>&1 </dev/null
    status=$?
    if [ $status -ne "$want" ]; then bad "$case" "exit status $status, expected $want"
    elif ! tail -n 1 "$T/out" | grep -q -e "$pattern"; then bad "$case" "last line is not: $pattern"
    else ok "$case"
    fi
}

for p in quickstart inspect demo; do
    [ -x "$E/$p" ] || { echo "FAIL examples: $E/$p was not built"; failed=$((failed + 1)); }
done
[ $failed -eq 0 ] || { echo "examples: 0 passed, $failed failed, 0 skipped"; exit 1; }

# ---- quickstart, README

quick_lines='rank 0 published version 1: 2 tensors, 2048 bytes, received by "engine-0"
rank 0 published version 2: 2 tensors, 2048 bytes, received by "engine-0"
rank 0 published version 3: 2 tensors, 2048 bytes, received by "engine-0"
the engine serves version 3: 2 tensors, every value as trained'
expect quickstart 0 'every value as trained$' "$E/quickstart"
if [ "$(cat "$T/out")" = "$quick_lines" ]; then ok quickstart-lines
else bad quickstart-lines "other lines than its comment says"; fi

# The first C block of the README, alone in a folder with the header, compiled as the README says.
sed -n '/^```c$/,/^```$/p' README.md | sed '1d;/^```$/,$d' >"$T/quick.c"
cp lorasync.h "$T/" && (cd "$T" && $CC $STD -Wall -Wextra -Werror -o quick quick.c $LIBS) >"$T/out" 2>&1 &&
    ok readme-compiles || bad readme-compiles "$CC fails"
expect readme-runs 0 "^$(sed -n 's/^    cc .*# prints: //p' README.md)\$" sh -c "cd '$T' && ./quick"
expect readme-runs-again 1 'is version 3, which is newer than 1; go on with a greater version' \
    sh -c "cd '$T' && ./quick"
expect readme-published 0 'q_proj$' "$E/inspect" "$T/adapters/default/latest"

# ---- transports of one's own: what they print is what their first comment says

for p in transport_minimal transport_lend transport_full; do
    if [ ! -x "$E/$p" ]; then bad "$p" "$E/$p was not built"; continue; fi
    sed -n '/^   output /,/^$/p' "examples/$p.c" | sed 's/^.\{13\}//;/^$/d' >"$T/$p.expected"
    TMPDIR=$T timeout 60 "$E/$p" >"$T/out" 2>&1
    status=$?
    if [ $status -ne 0 ]; then bad "$p" "exit status $status"
    elif [ ! -s "$T/$p.expected" ] || ! cmp -s "$T/out" "$T/$p.expected"; then
        bad "$p" "other lines than its comment says"
    else ok "$p"
    fi
    cp "$T/out" "$T/$p.out"
    if ls -d "$T"/lorasync-* >/dev/null 2>&1; then bad "$p-cleans-up" "its folder is still there"
    else ok "$p-cleans-up"; fi
done
# What changed was sent alone, in fewer bytes; and the full image when the engine had nothing, something else, or when
# all had changed.
says() # NAME COUNT PATTERN
{
    if [ "$(grep -c -e "$3" "$T/transport_full.out")" -eq "$2" ]; then ok "$1"; else bad "$1" "not $2 lines of: $3"; fi
}
says transport_full-loads-deltas 2 '^server: loads policy-v[23] from a delta$'
says transport_full-refuses-deltas 2 '^server: cannot load policy-v[46] from a delta'
says transport_full-falls-back 2 '^version [46]: full image of .*, a delta of [0-9]* was refused'
says transport_full-all-changed 1 '^version 5: full image of [0-9]* bytes, requests'
if sed -n 's/^version [23]: delta of \([0-9]*\) bytes instead of \([0-9]*\),.*/\1 \2/p' "$T/transport_full.out" |
    awk '{ n += 1; small += $1 > 0 && 4 * $1 <= 3 * $2 } END { exit !(n == 2 && small == 2) }'; then
    ok transport_full-fewer-bytes
else bad transport_full-fewer-bytes "a delta is over 3/4 of the full image"; fi

expect transport_minimal-file 0 'read back and verified$' "$E/transport_minimal" "$T/mine.safetensors"
expect transport_minimal-inspect 0 '' "$E/inspect" "$T/mine.safetensors"
expect transport_minimal-nowhere 1 'cannot write' "$E/transport_minimal" "$T/no/such/folder"
expect transport_full-nobody 1 'go to policy-v0$' "$E/transport_full" 127.0.0.1 1

# ---- demo: every layout over 1, 3 and 4 ranks; what does not fit says so

for layout in fsdp2 tp tp+fsdp hsdp zero3 fsdp1 megatron mixed; do
    for ranks in 1 3 4; do
        case $layout/$ranks in
        tp+fsdp/3 | hsdp/3)
            expect "demo-$layout-$ranks" 2 'give an even number' \
                "$E/demo" --model tiny --steps 2 --layout $layout --ranks $ranks ;;
        *) expect "demo-$layout-$ranks" 0 '^demo: 42 tensors, 110592 bytes, verified 2/2 versions$' \
               "$E/demo" --model tiny --steps 2 --layout $layout --ranks $ranks
           [ $ranks -ne 4 ] || expect "demo-$layout-$ranks-messages" 0 'verified 2/2 versions$' \
               "$E/demo" --model tiny --steps 2 --layout $layout --ranks $ranks --no-direct ;;
        esac
    done
done
expect demo-tp-does-not-divide 2 'does not divide' "$E/demo" --model tiny --layout tp --ranks 5
expect demo-megatron-does-not-divide 2 'does not divide' "$E/demo" --model tiny --layout megatron --rank 9 --ranks 4
expect demo-more-ranks-than-rows 0 'verified 2/2 versions$' "$E/demo" --model tiny --rank 2 --steps 2 --ranks 7
for wire in f32 f16 bf16 e4m3; do
    expect "demo-$wire" 0 'verified 2/2 versions$' \
        "$E/demo" --model tiny --steps 2 --wire $wire --layout mixed --ranks 5
done
expect demo-default-model 0 '^demo: 392 tensors, 40370176 bytes, verified 2/2 versions$' "$E/demo" --steps 2
expect demo-help 0 'do not fit$' "$E/demo" --help
expect demo-unknown-option 2 'lists the options' "$E/demo" --nonsense
expect demo-unknown-layout 2 'give one of fsdp2' "$E/demo" --layout nonsense

# a process that dies ends all of them, with a message
for who in 0 2 engine; do
    expect "demo-kill-$who" 1 'verified 1/3 versions$' \
        timeout 60 "$E/demo" --model tiny --steps 3 --kill $who --timeout 20
    grep -q 'killed by signal 9' "$T/out" && ok "demo-kill-$who-says-so" || bad "demo-kill-$who-says-so" "no message"
done
TMPDIR=$T "$E/demo" --model tiny --steps 2 --out "$T/left" >"$T/out" 2>&1
if ls -d "$T"/lorasync-demo-* >/dev/null 2>&1; then bad demo-cleans-up "its folder is still there"
else ok demo-cleans-up; fi
expect demo-out 0 'q_proj, up_proj, v_proj$' "$E/inspect" "$T/left"
expect demo-again 0 'verified 2/2 versions$' "$E/demo" --adapter "$T/left" --steps 2 --layout mixed --ranks 3
grep -q 'byte-identical' "$T/out" && ok demo-again-identical || bad demo-again-identical "not said to be byte-identical"

# ---- inspect

printf 'garbage' >"$T/garbage.safetensors"
expect inspect-garbage 1 'garbage.safetensors' "$E/inspect" "$T/garbage.safetensors"
expect inspect-missing 1 'not found' "$E/inspect" "$T/nothing-here"
expect inspect-nothing 2 'exit status' "$E/inspect"
expect inspect-help 0 'exit status' "$E/inspect" --help
"$E/inspect" "$T/garbage.safetensors" "$T/left" >"$T/out" 2>/dev/null
[ $? -eq 1 ] && grep -q 'verified$' "$T/out" && ok inspect-goes-on || bad inspect-goes-on "the good one is not printed"
"$E/inspect" "$T/left" 2>"$T/out" | head -n 1 >/dev/null
[ -s "$T/out" ] && bad inspect-closed-pipe "says something" || ok inspect-closed-pipe
expect inspect-closed-stdout 1 'cannot write' sh -c "'$E/inspect' '$T/left' >&-"
# a damaged file: one byte of the payload changed
cp -r "$T/left" "$T/damaged"
damaged=$T/damaged/adapter_model.safetensors
printf 'X' | dd of="$damaged" bs=1 seek="$(($(wc -c <"$damaged") - 9))" conv=notrunc 2>/dev/null
expect inspect-damaged 1 'digest' "$E/inspect" "$T/damaged"

# a delta against version 6 in which nothing changed: shown for what it is, and no adapter
delta_file() # DIGEST
{
    text='{"__metadata__":{"format":"pt","lorasync.adapter":"policy","lorasync.base_digest":"00000000000000aa",'
    text=$text'"lorasync.base_version":"6",'
    text=$text'"lorasync.digest":"'$1'","lorasync.full_digest":"00000000000000aa","lorasync.version":"7"}}'
    printf "\\$(printf %o ${#text})"'\0\0\0\0\0\0\0%s' "$text"
}
mkdir "$T/delta"
delta_file 0000000000000000 >"$T/delta/adapter_model.safetensors"
expect inspect-delta 0 'verified$' "$E/inspect" "$T/delta"
grep -q 'a delta, no adapter: against version 6 with digest 00000000000000aa' "$T/out" && ok inspect-delta-says-so ||
    bad inspect-delta-says-so "no such line"
expect inspect-delta-file 0 'verified$' "$E/inspect" "$T/delta/adapter_model.safetensors"
expect inspect-delta-json 0 ']' "$E/inspect" --json "$T/delta"
grep -q '"delta": {"base_version": 6,' "$T/out" && ok inspect-delta-json-says-so ||
    bad inspect-delta-json-says-so "no such member"
delta_file 0000000000000001 >"$T/damaged-delta.safetensors"
expect inspect-damaged-delta 1 'digest' "$E/inspect" "$T/damaged-delta.safetensors"
expect demo-delta 2 'delta against version 6' "$E/demo" --adapter "$T/delta"

json_ok() # FILE NUMBER: an array of that many objects
{
    "$PYTHON" -c 'import json, sys
d = json.load(open(sys.argv[1]))
assert len(d) == int(sys.argv[2]) and all("path" in x for x in d)' "$1" "$2" >"$T/out" 2>&1
}
if "$PYTHON" -c '' 2>/dev/null; then
    "$E/inspect" --json "$T/left" "$T/garbage.safetensors" "$T/damaged" >"$T/json" 2>/dev/null
    json_ok "$T/json" 3 && ok inspect-json || bad inspect-json "is no JSON of 3 objects"
else
    skip inspect-json "$PYTHON does not run here"
fi

# ---- trained adapters

data=
for d in "$LORASYNC_TEST_DATA" ../shared/data shared/data; do
    [ -z "$data" ] && [ -n "$d" ] && [ -d "$d/adapters" ] && data=$d/adapters
done
if [ -n "$data" ]; then
    for a in "$data"/*/; do
        name=$(basename "$a")
        "$E/inspect" "$a" >"$T/out" 2>&1 && ok "inspect-$name" || bad "inspect-$name" "exit status is not 0"
        case $name in
        mlx* | not-lora*) expect "demo-$name" 2 'peft_type' "$E/demo" --adapter "$a" ;;
        *) expect "demo-$name" 0 'verified 2/2 versions$' "$E/demo" --adapter "$a" --steps 2 --layout mixed --ranks 4
           grep -q 'byte-identical' "$T/out" && ok "demo-$name-identical" ||
               bad "demo-$name-identical" "not said to be byte-identical" ;;
        esac
    done
    if "$PYTHON" -c '' 2>/dev/null; then
        set -- "$data"/*/
        "$E/inspect" --json "$@" >"$T/json" && json_ok "$T/json" $# && ok inspect-json-all ||
            bad inspect-json-all "is no JSON of $# objects"
    fi
fi

rm -rf "$T"
echo "examples: $passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
