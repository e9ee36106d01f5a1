#!/bin/sh
# Compares the table of contents of lorasync.h with the marks in it.
#
#     tests/contents.sh          from the repository root: prints what differs and fails
#     tests/contents.sh --fix    writes the lists of marks into the table; its descriptions are kept
#
# A section begins with a line `/* --- >>name -- */` (or `>>api: name`), a part of it with `/* -- what it is: more */`.
# In the table each section is a line `>>name  description`, and the parts, where there are any, follow as `-- a; b; c`.

HEADER=${HEADER:-lorasync.h}
new=${TMPDIR:-/tmp}/contents-$$
trap 'rm -f "$new"' EXIT
trap 'exit 1' INT TERM

awk '
function part(line) # "/* -- reading: more" -> "reading"
{
    sub(/^\/\* -- /, "", line)
    sub(/ *(\*\/)?$/, "", line)
    if (match(line, /[.:;]( |$)/)) line = substr(line, 1, RSTART - 1)
    return line
}

function show(name,    words, n, i, line) # the parts of a section, in lines of at most 120 columns
{
    if (parts[name] == "") return
    n = split(parts[name], words, " ")
    line = indent "--"
    for (i = 1; i <= n; i++) {
        if (length(line) + 1 + length(words[i]) > 120) {
            print line
            line = indent "  "
        }
        line = line " " words[i]
    }
    print line
}

BEGIN { indent = "                    " }

NR == FNR { # first the marks
    if ($0 ~ /^\/\* -+ >>.* -- \*\/$/) {
        now = $0
        sub(/^.* >>/, "", now)
        sub(/ -- .*/, "", now)
        if (now ~ /^api: /) {
            found = substr(now, 6)
            now = "api"
        } else {
            found = ""
        }
        if (!(now in seen)) {
            seen[now] = 1
            order = order " " now
        }
    } else {
        found = now != "" && $0 ~ /^\/\* -- / ? part($0) : ""
    }
    if (found != "") parts[now] = parts[now] (parts[now] == "" ? "" : "; ") found
    next
}

/^   TABLE OF CONTENTS/ { inside = 1 }
/^   CONFIGURATION MACROS/ { inside = 0 }
inside && /^ +-- / { dropping = 1 }
dropping && (/^       >>/ || !/^                     /) && !/^ +-- / { dropping = 0 }
inside && /^       >>/ { if (entry != "") show(entry); entry = substr($1, 3); listed = listed " " entry }
inside && entry != "" && /^ *$/ { show(entry); entry = "" }
!dropping { print }

END {
    if (listed != order) {
        print "the table lists" listed ", the marks are" order >"/dev/stderr"
        exit 1
    }
}' "$HEADER" "$HEADER" >"$new" ||
    { echo "FAIL contents: other sections"; echo 'contents: 0 passed, 1 failed, 0 skipped'; exit 1; }

if [ "$1" = --fix ]; then
    cat "$new" >"$HEADER"
elif cmp -s "$HEADER" "$new"; then
    echo 'ok contents'
    echo 'contents: 1 passed, 0 failed, 0 skipped'
else
    echo "FAIL contents: the table of contents differs from the marks; sh tests/contents.sh --fix mends it"
    diff "$HEADER" "$new"
    echo 'contents: 0 passed, 1 failed, 0 skipped'
    exit 1
fi
