#!/bin/bash
# Warm migration: a RAM file of random pages to a destination that has an older copy, of which 5 % of the pages were others.
#
#   benches/warm.sh [PAGEFERRY] [MIB]      as root, for a network namespace whose loopback carries nothing else
#
# The copy is an archive, and then a RAM file. A line for each: all bytes that crossed the loopback, both ways, with TCP's and IP's own;
# those of the frames by the report; time. The exit code is 1 where what arrived is not what was sent, or took more than 7 % of it.
set -euo pipefail
ferry=$(realpath "${1:-target/release/pageferry}") mib=${2:-2048}
if [ -z "${WARM_INSIDE:-}" ]; then
    WARM_INSIDE=1 exec unshare --net -- "$(realpath "$0")" "$ferry" "$mib"
fi
ip link set lo up
folder=$(mktemp -d /dev/shm/pageferry-warm-XXXXXX)
trap 'rm -rf "$folder"' EXIT
head -c "${mib}M" /dev/urandom > "$folder/new"
cp "$folder/new" "$folder/old.img"
python3 - "$folder/old.img" << 'PYTHON'
import os, random, sys
pages = os.stat(sys.argv[1]).st_size // 4096
with open(sys.argv[1], "r+b") as file:
    for page in random.Random(5).sample(range(pages), pages // 20):
        file.seek(page * 4096)
        file.write(os.urandom(4096))
PYTHON
"$ferry" send "file:$folder/old.pferry" --ram-file "$folder/old.img" --json > /dev/null 2>&1

crossed() { awk '$1 == "lo:" { print $2 }' /proc/self/net/dev; }
failed=0
for base in none "$folder/old.pferry" "$folder/old.img"; do
    before=$(crossed)
    more=()
    [ "$base" = none ] || more=(--base "$base")
    "$ferry" recv tcp:127.0.0.1:4444 --ram-file "$folder/arrived" --json "${more[@]}" > "$folder/recv.json" 2> "$folder/recv.err" &
    until grep -q listening "$folder/recv.err"; do sleep 0.05; done
    "$ferry" send tcp:127.0.0.1:4444 --ram-file "$folder/new" --json > "$folder/send.json" 2> /dev/null
    wait $!
    cmp "$folder/new" "$folder/arrived" || failed=1
    after=$(crossed)
    python3 - "$(basename "$base")" "$((after - before))" "$mib" "$folder/send.json" << 'PYTHON' || failed=1
import json, sys
base, crossed, mib, report = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.load(open(sys.argv[4]))
part = crossed / (mib << 20) * 100
print(f"base {base}: {crossed >> 20} MiB crossed, {part:.2f} % of the image; {report['wire_bytes'] >> 20} MiB of frames; "
      f"{report['pages']['unchanged']} of {report['pages']['total']} pages from the base; {report['total_ms']:.0f} ms, of which setup {report['setup_ms']:.0f}")
sys.exit(base != "none" and part > 7)
PYTHON
    rm -f "$folder/arrived"
done
exit $failed
