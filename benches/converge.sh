#!/usr/bin/env bash
# A guest that writes faster than its link carries, in every way that pageferry has to deal with it.
#
#   benches/converge.sh [PAGEFERRY]        as root, with /dev/kvm; PAGEFERRY is target/release/pageferry unless given
#
# Two network namespaces are joined by a link that is shaped to 1 Gbit/s at both ends. In one of them a guest rewrites 512 MiB at
# 200 MB/s; it is moved to the other with a downtime limit of 300 ms. What it cost the guest is the guest's own word: the longest
# time that it stood still by its own clock. The exit code is the number of expectations that were not met.
#
#   plain      reports the stall and does not switch over in 40 s
#   converge   completes; the guest stood still for at most 1.2 times the limit
#   postcopy   completes after 20 s of precopy; the guest stood still for less than 150 ms
#   zstd       the same guest, whose memory compresses well, over 100 Mbit/s: switches over as soon as the rest fits
#   slow-link  a guest whose memory compresses as text does, and that touches 6 MiB as fast as it can, over 100 Mbit/s: the same
#
# Where QEMU is installed and `peers` was built (cargo build --release -p pageferry-benches --bin peers), QEMU moves the same guest over
# the same link under the same limit each time, for comparison; nothing is expected of it.
set -u
ferry=$(realpath "${1:-target/release/pageferry}")
peers=$(dirname "$ferry")/peers
limit_ms=300
# Pages in a second: 200 MB/s.
writes=(--working-set 512M --rate 48828)
work=$(mktemp -d)
failures=0
here=pageferry-a-$$ there=pageferry-b-$$
vms=()

clean_up() {
    for pid in "${vms[@]}"; do kill "$pid" 2> /dev/null; done
    wait 2> /dev/null
    for name in "$here" "$there"; do ip netns del "$name" 2> /dev/null; done
    rm -rf "$work"
}
trap clean_up EXIT

[ "$(id -u)" = 0 ] || { echo "network namespaces take root" >&2; exit 2; }
[ -w /dev/kvm ] || { echo "/dev/kvm is not there, or may not be used" >&2; exit 2; }

# link RATE: (re)makes the link.
link() {
    for name in "$here" "$there"; do ip netns del "$name" 2> /dev/null; ip netns add "$name"; done
    ip link add ferry-a netns "$here" type veth peer name ferry-b netns "$there"
    ip -n "$here" addr add 10.77.0.1/24 dev ferry-a
    ip -n "$there" addr add 10.77.0.2/24 dev ferry-b
    ip -n "$here" link set ferry-a up
    ip -n "$there" link set ferry-b up
    # A burst of 2 ms of 1 Gbit/s; what waits longer than 20 ms is dropped, as a switch would.
    tc -n "$here" qdisc add dev ferry-a root tbf rate "$1" burst 256kb latency 20ms
    tc -n "$there" qdisc add dev ferry-b root tbf rate "$1" burst 256kb latency 20ms
}

# field NAME: a number or text of the JSON on standard input.
field() { sed -nE "s/.*\"$1\":\"?([^\",}]*).*/\1/p"; }

expect() {
    if awk "BEGIN { exit !($2) }"; then echo "  ok: $1"; else echo "  NOT MET: $1 ($2)"; failures=$((failures + 1)); fi
}

# move NAME SECONDS OPTION...: starts both VMs and moves the guest; leaves the source's status in $report, the guest's gap in $gap_ms.
move() {
    local name=$1 seconds=$2
    shift 2
    local guest=(--mem 1G "${writes[@]}")
    ip netns exec "$here" "$ferry" vm --api "unix:$work/a" "${guest[@]}" 2> "$work/a.err" &
    vms=($!)
    ip netns exec "$there" "$ferry" vm --api "unix:$work/b" "${guest[@]}" --insecure --incoming tcp:10.77.0.2:4444 2> "$work/b.err" &
    vms+=($!)
    # Two passes of the guest over its memory.
    sleep 6
    "$ferry" ctl "unix:$work/a" migrate tcp:10.77.0.2:4444 --downtime-limit "$limit_ms" "$@" --detach
    local begun=$SECONDS
    while :; do
        sleep 0.5
        report=$("$ferry" ctl "unix:$work/a" status --json)
        case $(sed -E 's/.*"migration":\{//' <<< "$report" | field status) in
            completed | failed | cancelled) break ;;
        esac
        [ $((SECONDS - begun)) -lt "$seconds" ] || break
    done
    report=$(sed -E 's/.*"migration":\{/{/' <<< "$report")
    gap_ms=$("$ferry" ctl "unix:$work/b" status --json | field longest_gap_ms)
    echo "$name: $(field status <<< "$report") after $((SECONDS - begun)) s and $(field rounds <<< "$report") rounds;" \
        "downtime $(field downtime_ms <<< "$report") ms, expected $(field expected_downtime_ms <<< "$report") ms;" \
        "the guest stood still for ${gap_ms:-?} ms"
    for pid in "${vms[@]}"; do kill "$pid" 2> /dev/null; done
    wait 2> /dev/null
}

# qemu NAME SECONDS: the same by QEMU.
qemu() {
    [ -x "$peers" ] && command -v qemu-system-x86_64 > /dev/null || return 0
    "$peers" live "$1" --seconds "$2" "${writes[@]}" --downtime-limit "$limit_ms" --source "$here" --destination "$there" \
        --address 10.77.0.2:4445
}

completed() { expect "it completes" "\"$(field status <<< "$report")\" == \"completed\""; }

link 1gbit
move plain 40 --codec raw
expect "it does not switch over" "\"$(field status <<< "$report")\" == \"active\""
stalled=$(field stalled <<< "$report")
echo "  it says: ${stalled:-nothing}"
expect "it reports the stall" "${#stalled} > 0"
qemu plain 40

move converge 120 --codec raw --auto-converge
completed
expect "the guest stood still for at most 1.2 x $limit_ms ms" "${gap_ms:-1e9} <= 1.2 * $limit_ms"
qemu converge 120

move postcopy 120 --codec raw --timeout 20 --on-timeout postcopy
completed
expect "the guest stood still for less than 150 ms" "${gap_ms:-1e9} < 150"
qemu postcopy 120

link 100mbit
seq 3000000 > "$work/content"
move zstd 120 --codec zstd
completed
expect "the guest stood still for at most 1.2 x $limit_ms ms" "${gap_ms:-1e9} <= 1.2 * $limit_ms"
qemu zstd 120

# Content that compresses tenfold, of which the guest touches 6 MiB all the time. Those are half a second
# of this link, and less than the limit when compressed: who compares bytes of memory with bytes on the wire waits for ever.
writes=(--working-set 6M --rate 0 --content "$work/content")
move slow-link 40 --codec zstd
completed
expect "the guest stood still for at most 1.2 x $limit_ms ms" "${gap_ms:-1e9} <= 1.2 * $limit_ms"
qemu slow-link 40

exit "$failures"
