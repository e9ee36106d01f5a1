#!/bin/sh
# Looks at the calls between the sections of lorasync.h: each section's head must say which others it really uses, a
# section uses only sections above it but for those that its head declares, and no stretch is long without a sub-mark.
#
#     tests/sections.sh [-v] [lorasync.h]      from the repository root; -v prints what each uses of which
#
# The forms that it reads:
#
#     /* ---- ... >>image -- */                            a section; its head is the first comment after it, and has
#     Uses >>support, >>json and >>dtype.                  all sections above that it uses (or: Uses nothing.)
#     Calls ahead into >>move.                             all sections below
#     /* -- digest */ or /* -- digest: 64 bits that ..     a sub-mark
#
# A use is a private function, public function, macro, type or enumerator of another section anywhere in the code,
# called or not. Functions that a macro makes are not seen. Ends with "sections: N passed, N failed, N skipped".

verbose=0; [ "$1" = -v ] && verbose=1 && shift
header=${1:-lorasync.h}
max_stretch=200

awk -v verbose=$verbose -v max_stretch=$max_stretch -v header="$header" '
function fail(line, text) { print "FAIL " header (line ? ":" line : "") ": " text; num_failed++ }

# ---- the text without comments, strings and characters

function first_of(s,    at) { at = match(s, /"|\047|\/\*|\/\//); return at }

function code_of(s,    out, at, c) {
    out = ""
    for (;;) {
        if (in_comment) {
            at = index(s, "*/")
            if (!at) return out
            in_comment = 0
            s = substr(s, at + 2)
        }
        at = first_of(s)
        if (!at) return out s
        out = out substr(s, 1, at - 1)
        c = substr(s, at, 1)
        s = substr(s, at)
        if (c == "/" && substr(s, 2, 1) == "/") return out
        if (c == "/") {
            in_comment = 1
            s = substr(s, 3)
        } else if (match(s, c == "\"" ? /^"([^"\\]|\\.)*"/ : /^\047([^\047\\]|\\.)*\047/)) {
            s = substr(s, RLENGTH + 1)
            out = out " "
        } else return out
    }
}

# ---- what a line defines

function define(name) { if (name != "" && !(name in section_of)) section_of[name] = section }

function name_before_bracket(s) {
    if (!match(s, /lorasync[a-z]*_[a-z0-9_]+\(/)) return ""
    return substr(s, RSTART, RLENGTH - 1)
}

# Definitions begin at the left edge; a function is one when its first bracket opens before a semicolon comes.
function look(s,    name) {
    if (match(s, /^#[ \t]*define[ \t]+LORASYNC[A-Z]?_[A-Z0-9_]+/)) {
        name = substr(s, 1, RLENGTH)
        sub(/.*[ \t]/, "", name)
        define(name)
        return
    }
    if (s ~ /^#/) return
    if (pending == "" && s ~ /^(LORASYNC|static|__attribute__)/) pending = " "
    if (pending != "") {
        pending = pending s
        if (pending ~ /[{;=]/) {
            name = pending
            if (match(name, /[{;=]/)) {
                if (substr(name, RSTART, 1) == "{") define(name_before_bracket(name))
            }
            pending = ""
        }
    }
    if (s ~ /^(typedef )?enum/) in_enum = 1
    if (in_enum && match(s, /^ +LORASYNCI?_[A-Z0-9_]+/)) {
        name = substr(s, 1, RLENGTH)
        gsub(/ /, "", name)
        define(name)
    }
    if (s ~ /^}/) in_enum = 0
    if (match(s, /^typedef (struct|union|enum) lorasync[a-z]_[a-z0-9_]+/) ||
        match(s, /^} lorasync[a-z]_[a-z0-9_]+/) || match(s, /^struct lorasync[a-z]_[a-z0-9_]+ {/)) {
        name = substr(s, 1, RLENGTH)
        sub(/ {$/, "", name)
        sub(/.* /, "", name)
        define(name)
    } else if (s ~ /^typedef / && match(s, /lorasync[a-z]_[a-z0-9_]+\)\(/)) {
        define(substr(s, RSTART, RLENGTH - 2))
    } else if (s ~ /^typedef / && match(s, /lorasync[a-z]_[a-z0-9_]+;/)) define(substr(s, RSTART, RLENGTH - 1))
}

# ---- first reading: sections, heads, sub-marks, definitions

function one_space(s) { gsub(/[ \t\n]+/, " ", s); sub(/^ /, "", s); sub(/ $/, "", s); return s }

function mark_title(s) { sub(/^\/\* -- /, "", s); sub(/[:.;]( .*)?$/, "", s); sub(/ *\*\/.*/, "", s); return s }

function stretch(line) {
    if (last_mark && line - last_mark > max_stretch)
        fail(last_mark, (line - last_mark) " lines without a sub-mark in >>" section ", at most " max_stretch)
    last_mark = line
}

NR == FNR && /^\/\* =+ END OF THE PUBLIC PART/ { started = 1 }
NR == FNR && !started { next }
NR == FNR && /^\/\* -+ >>[a-z]+ -- \*\/$/ {
    stretch(FNR)
    section = $0
    sub(/.*>>/, "", section)
    sub(/ .*/, "", section)
    if (section in number) fail(FNR, "a second section >>" section)
    number[section] = ++num_sections
    named[num_sections] = section
    at[section] = FNR
    head[section] = marks[section] = ""
    want_head = 1
}
NR == FNR && /^\/\* >>> generated/ { stretch(FNR); last_mark = 0; saved = section; section = "device" }
NR == FNR && /^\/\* <<< generated/ { last_mark = FNR }
NR == FNR && /^#endif \/\* LORASYNC_IMPLEMENTATION \*\// { section = "" ; last_mark = 0 }
NR == FNR && /^\/\* -- / {
    stretch(FNR)
    title = mark_title($0)
    if (index("; " marks[section] "; ", "; " title "; ")) fail(FNR, "a second sub-mark \"" title "\" in >>" section)
    marks[section] = marks[section] (marks[section] == "" ? "" : "; ") title
}
NR == FNR && want_head && !/>>[a-z]+ -- \*\/$/ && (in_head || /^\/\*/) {
    in_head = 1
    head[section] = head[section] " " $0
    if (/\*\//) want_head = in_head = 0
}
NR == FNR { look(code_of($0)); num_lines = FNR; next }

# ---- second reading: what each section uses

FNR == 1 { section = "" ; started = in_comment = 0; saved = "" }
/^\/\* =+ END OF THE PUBLIC PART/ { started = 1 }
!started { next }
/^\/\* -+ >>[a-z]+ -- \*\/$/ { section = $0; sub(/.*>>/, "", section); sub(/ .*/, "", section) }
/^\/\* >>> generated/ { section = "device" }
/^#endif \/\* LORASYNC_IMPLEMENTATION \*\// { section = "" }
{
    s = code_of($0)
    if (section == "" || s ~ /^# *undef/) next
    while (match(s, /(lorasync|LORASYNC)[a-zA-Z0-9_]*/)) {
        name = substr(s, RSTART, RLENGTH)
        s = substr(s, RSTART + RLENGTH)
        if (!(name in section_of) || section_of[name] == section) continue
        q = section_of[name]
        if (!num_uses[section, q]++) first[section, q] = FNR ": " name
        if (!seen[section, q, name]++) names[section, q] = names[section, q] " " name
    }
}

# ---- the verdict

function listed(sentence, into,    i, n, part, found) {
    for (i in into) delete into[i]
    n = split(sentence, part, />>/)
    for (i = 2; i <= n; i++) {
        found = part[i]
        sub(/[^a-z].*/, "", found)
        into[found] = 1
    }
}

function sentence_of(text, begin,    from) {
    from = index(text, begin)
    if (!from) return ""
    text = substr(text, from)
    sub(/\..*/, ".", text)
    return text
}

# The rooms that `section` uses above (or below) itself, as the head should say them.
function should_say(section, below,    i, q, n, list, text) {
    n = 0
    for (i = 1; i <= num_sections; i++) {
        q = named[i]
        if (num_uses[section, q] && (number[q] > number[section]) == below) list[++n] = ">>" q
    }
    text = ""
    for (i = 1; i <= n; i++) text = text (i == 1 ? "" : i == n ? " and " : ", ") list[i]
    return text
}

function check_sentence(section, below,    begin, text, said, should, bad, i, q) {
    begin = below ? "Calls ahead into " : "Uses "
    text = sentence_of(one_space(head[section]), begin (below ? ">>" : ""))
    if (!below && text == "") text = sentence_of(one_space(head[section]), "Uses nothing")
    listed(text, said)
    should = should_say(section, below)
    bad = 0
    for (i = 1; i <= num_sections; i++) {
        q = named[i]
        if (q == section || (number[q] > number[section]) != below) continue
        if (num_uses[section, q] && !(q in said)) {
            fail(at[section], ">>" section " uses >>" q (below ? ", which is below it" : "") \
                 ", unsaid in its head (line " first[section, q] ")")
            bad = 1
        } else if (!num_uses[section, q] && (q in said)) {
            fail(at[section], ">>" section " says that it uses >>" q ", but does not")
            bad = 1
        }
    }
    if (text == "" && !below) bad = 1
    if (bad || (text == "" && !below)) {
        if (should == "" && below) should = "(no such sentence)"
        else should = begin (should == "" ? "nothing" : should) "."
        fail(at[section], "the head of >>" section " must say: " should)
    } else if (text != "") num_passed++
}

END {
    stretch(num_lines)
    if (num_sections < 10) fail(0, "only " num_sections + 0 " sections found")
    for (r = 1; r <= num_sections; r++) {
        check_sentence(named[r], 0)
        check_sentence(named[r], 1)
        if (verbose)
            for (q = 1; q <= num_sections; q++)
                if (num_uses[named[r], named[q]])
                    printf "%-8s -> %-8s %4d %s\n", named[r], named[q], num_uses[named[r], named[q]],
                           names[named[r], named[q]]
    }
    printf "sections: %d passed, %d failed, 0 skipped\n", num_passed, num_failed
    exit num_failed > 0
}
' "$header" "$header"
