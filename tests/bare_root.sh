#!/bin/sh
# README's two commands, `make demo` and `make test`, where there is nothing but gcc, make and the C library's headers:
# no C++, CUDA, Python, git or clang. The root is made by debootstrap from the mirror that apt uses here, and thrown
# away.
#
#     tests/bare_root.sh      from the repository root, as root
#
# Ends with the line of `make test`. Exit status 77, with a word, where such a root cannot be made.

skip() { echo "skip bare root: $1"; exit 77; }

[ "$(id -u)" = 0 ] || skip "it takes root"
command -v debootstrap >/dev/null || skip "no debootstrap"
release=$(. /etc/os-release 2>/dev/null && echo "$VERSION_CODENAME")
mirror=$(apt-get indextargets --format '$(CREATED_BY) $(COMPONENT) $(RELEASE) $(REPO_URI)' 2>/dev/null |
    awk -v release="$release" '$1 == "Packages" && $2 == "main" && $3 == release { print $4; exit }')
[ -n "$mirror" ] || skip "apt has no mirror for ${release:-this system}"
proxy=$(apt-config shell p Acquire::http::Proxy) && eval "$proxy" && [ -n "$p" ] && export http_proxy="$p"

root=$(mktemp -d) && chmod 755 "$root" || exit 2 # some tests give up being root
trap 'umount "$root/dev/shm" "$root/proc" 2>/dev/null; rm -rf --one-file-system "$root"' EXIT
trap 'exit 1' HUP INT TERM

debootstrap --variant=minbase --include=gcc,make,libc6-dev "$release" "$root" "$mirror" >"$root.log" 2>&1 || {
    tail -n 3 "$root.log"
    rm -f "$root.log"
    skip "debootstrap could not make it"
}
rm -f "$root.log"
mkdir "$root/work" && tar c --exclude=./build --exclude=./.git --exclude=./shared . | tar x -C "$root/work" || exit 2
mkdir -p "$root/dev/shm"
mount -t proc proc "$root/proc" && mount -t tmpfs tmpfs "$root/dev/shm" || skip "nothing may be mounted here"

run() { chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root ${WARN:+WARN="$WARN"} make -C /work "$@"; }

for tool in g++ clang python3 git; do
    if chroot "$root" sh -c "command -v $tool" >/dev/null; then echo "FAIL bare root: it has $tool"; exit 1; fi
done
run demo || { echo "FAIL bare root: make demo"; exit 1; }
run test
