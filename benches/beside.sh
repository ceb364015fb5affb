#!/usr/bin/env bash
# A guest of QEMU that runs while it is moved: by `pageferry qemu` from beside it, and by QEMU itself, by turns.
#
#   benches/beside.sh [PAGEFERRY] [RUNS]   as root, with /dev/kvm and QEMU; PAGEFERRY is target/release/pageferry unless given, RUNS 20;
#                                          beside it `peers` (cargo build --release -p pageferry-benches --bin peers)
#
#   downtime   1 GiB that writes 500 pages a second of 64 MiB, no limit on the link: how long the guest stood still by its own clock
#   1gbit      2 GiB that writes 50 MB/s of memory that compresses as text does, over 1 Gbit/s, with a downtime limit of 300 ms
#
# What the guest says is in milliseconds, medians of RUNS and of 3. The exit code is the number of expectations that were not met.
set -u
ferry=$(realpath "${1:-target/release/pageferry}")
runs=${2:-20}
peers=$(dirname "$ferry")/peers
work=$(mktemp -d)
failures=0
here=pageferry-a-$$ there=pageferry-b-$$

clean_up() {
    for name in "$here" "$there"; do ip netns del "$name" 2> /dev/null; done
    rm -rf "$work"
}
trap clean_up EXIT

[ "$(id -u)" = 0 ] || { echo "network namespaces take root" >&2; exit 2; }
[ -w /dev/kvm ] || { echo "/dev/kvm is not there, or may not be used" >&2; exit 2; }
[ -x "$peers" ] || { echo "$peers is not there: cargo build --release -p pageferry-benches --bin peers" >&2; exit 2; }

for name in "$here" "$there"; do ip netns add "$name"; ip -n "$name" link set lo up; done
ip link add ferry-a netns "$here" type veth peer name ferry-b netns "$there"
ip -n "$here" addr add 10.77.0.1/24 dev ferry-a
ip -n "$there" addr add 10.77.0.2/24 dev ferry-b
ip -n "$here" link set ferry-a up
ip -n "$there" link set ferry-b up

# limited RATE: from now on the link carries no more.
limited() {
    tc -n "$here" qdisc replace dev ferry-a root tbf rate "$1" burst 256kb latency 20ms
    tc -n "$there" qdisc replace dev ferry-b root tbf rate "$1" burst 256kb latency 20ms
}

# live CASE ARGUMENT...: one move; what became of it is printed.
live() {
    local case=$1
    shift
    "$peers" live "$case" --source "$here" --destination "$there" --address 10.77.0.2:4445 "$@" 2>&1
}

median() { sort -n | awk '{ all[NR] = $1 } END { print NR ? all[int((NR + 1) / 2)] : "?" }'; }

# The last number of a line: how long the guest stood still.
gaps() { sed -nE 's/.* stood still for ([0-9]+) ms$/\1/p'; }

# compare NAME RUNS CASE (GUEST...) -- OPTION...: both by turns.
compare() {
    local name=$1 count=$2 case=$3 guest=()
    shift 3
    while [ "$1" != -- ]; do guest+=("$1"); shift; done
    shift
    : > "$work/qemu"; : > "$work/beside"
    for _ in $(seq "$count"); do
        live "$case" "${guest[@]}" >> "$work/qemu"
        live "$case" "${guest[@]}" --beside "$ferry" -- "$@" >> "$work/beside"
    done
    for who in qemu beside; do
        sort "$work/$who" | uniq | sed "s/^/  /" | head -n 3
        echo "$name, $who: $(grep -c ' completed ' "$work/$who") of $count completed, the guest stood still for $(gaps < "$work/$who" | median) ms," \
            "$(sed -nE 's/.* completed after ([0-9]+) s.*/\1/p' "$work/$who" | median) s"
    done
}

expect() {
    if awk "BEGIN { exit !($2) }"; then echo "  ok: $1"; else echo "  NOT MET: $1 ($2)"; failures=$((failures + 1)); fi
}

compare downtime "$runs" plain --mem 1G --working-set 64M --rate 500 --warm-up 2 -- --streams 2
expect "at most QEMU's own and 20 ms" "$(gaps < "$work/beside" | median) <= $(gaps < "$work/qemu" | median) + 20"

limited 1gbit
seq 3000000 > "$work/content"
compare 1gbit 3 zstd --mem 2G --working-set 512M --rate 12207 --content "$work/content" --seconds 120 -- --streams 2
expect "it completes" "$(grep -c ' completed ' "$work/beside") == 3"
expect "within the limit" "$(gaps < "$work/beside" | median) <= 1.2 * 300"
exit "$failures"
