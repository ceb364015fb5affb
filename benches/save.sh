#!/bin/bash
# Saving a RAM file by turns: dd, `pageferry send file:` raw and auto, and QEMU's own `migrate file:` with mapped-ram and multifd.
#
#   benches/save.sh RAM.img FOLDER [ROUNDS]
#
# FOLDER is on a tmpfs or on a disk, where all but tmpfs go past the page cache. QEMU: $QEMU, 9.0 or later; left out where it is older.
# A line for each way: median and all, in ms, and the bytes of what was written. Loading comes behind it.
set -euo pipefail
image=$1 folder=$2 rounds=${3:-5}
cd "$(dirname "$0")/.."
pageferry=${PAGEFERRY:-target/release/pageferry}
qemu=${QEMU:-qemu-system-x86_64}
size=$(stat -c %s "$image")
direct=() qemu_direct=false
if [ "$(stat -f -c %T "$folder")" != tmpfs ]; then direct=(oflag=direct) qemu_direct=true; fi
out=$folder/pageferry-save-bench
times=$(mktemp -d)
trap 'rm -rf "$times" "$out"*' EXIT

now() { date +%s%N; }
note() { # WAY NANOSECONDS
    echo $(($2 / 1000)) >> "$times/$1"
}
run_dd() {
    rm -f "$out"
    local begun; begun=$(now)
    dd if="$image" of="$out" bs=4M "${direct[@]}" status=none
    note dd $(($(now) - begun))
    stat -c %s "$out" > "$times/dd.bytes"
}
run_send() { # CODEC
    rm -f "$out"
    "$pageferry" send "file:$out" --ram-file "$image" --codec "$1" --json 2> /dev/null |
        python3 -c 'import json,sys; print(int(json.load(sys.stdin)["total_ms"] * 1e6))' > "$times/now"
    note "save-$1" "$(cat "$times/now")"
    stat -c %s "$out" > "$times/save-$1.bytes"
    "$pageferry" recv "file:$out" --ram-file "/dev/shm/pageferry-save-bench.img" --json 2> /dev/null |
        python3 -c 'import json,sys; print(int(json.load(sys.stdin)["total_ms"] * 1e6))' > "$times/now"
    note "load-$1" "$(cat "$times/now")"
    rm -f /dev/shm/pageferry-save-bench.img
}
run_read() {
    local begun; begun=$(now)
    dd if="$out" of=/dev/shm/pageferry-save-bench.img bs=4M ${direct:+iflag=direct} status=none
    note dd-back $(($(now) - begun))
    rm -f /dev/shm/pageferry-save-bench.img
}
run_qemu() {
    rm -f "$out"
    python3 - "$qemu" "$image" "$size" "$out" "$qemu_direct" > "$times/now" << 'PYTHON' || return 0
import json, os, socket, subprocess, sys, tempfile, time
qemu, image, size, out, direct = sys.argv[1:]
folder = tempfile.mkdtemp()
more = ["-L", os.environ["QEMU_DATA"]] if "QEMU_DATA" in os.environ else []
vm = subprocess.Popen([qemu, "-accel", "tcg", "-machine", "q35,memory-backend=pc.ram", "-m", f"size={size}B",
    "-object", f"memory-backend-file,id=pc.ram,size={size},mem-path={image},share=on,readonly=off",
    "-nodefaults", "-display", "none", "-S", "-qmp", f"unix:{folder}/q,server=on,wait=off"] + more, stderr=subprocess.DEVNULL)
try:
    for _ in range(200):
        try:
            s = socket.socket(socket.AF_UNIX); s.connect(f"{folder}/q"); break
        except OSError: time.sleep(0.02)
    f = s.makefile("rw"); f.readline()
    def cmd(name, **args):
        f.write(json.dumps({"execute": name, "arguments": args}) + "\n"); f.flush()
        while True:
            r = json.loads(f.readline())
            if "return" in r: return r["return"]
            if "error" in r: raise SystemExit(f"{name}: {r['error']}")
    cmd("qmp_capabilities")
    cmd("migrate-set-capabilities", capabilities=[{"capability": c, "state": True} for c in ("mapped-ram", "multifd")])
    p = {"max-bandwidth": 100 << 30, "multifd-channels": 4}
    if direct == "true": p["direct-io"] = True
    cmd("migrate-set-parameters", **p)
    begun = time.monotonic_ns()
    cmd("migrate", uri=f"file:{out}")
    while True:
        m = cmd("query-migrate")
        if m.get("status") == "completed": break
        if m.get("status") in ("failed", "cancelled"): raise SystemExit(str(m))
        time.sleep(0.002)
    print(time.monotonic_ns() - begun)
finally:
    vm.kill(); vm.wait()
PYTHON
    note qemu "$(cat "$times/now")"
    # Its file has holes for zeros and for what was never touched.
    echo $(($(stat -c '%b * %B' "$out"))) > "$times/qemu.bytes"
}
for round in $(seq 0 "$rounds"); do
    run_dd; run_read; run_send raw; run_send auto; run_qemu
    # The first only brings memory in.
    if [ "$round" = 0 ]; then rm -f "$times"/*; fi
done
for way in dd save-raw save-auto qemu dd-back load-raw load-auto; do
    [ -f "$times/$way" ] || continue
    median=$(sort -n "$times/$way" | sed -n "$(((rounds + 1) / 2))p")
    bytes=$(cat "$times/$way.bytes" 2> /dev/null || echo -)
    echo "$way: $((median / 1000)) ms; bytes $bytes; all: $(awk '{printf "%d ", $1 / 1000}' "$times/$way")"
done
