#!/bin/bash
# Loading on demand: how soon a guest runs, from the start of the process that loads it.
#
#   benches/on-demand.sh FOLDER [PAGEFERRY] [MEM] [RUNS]       with /dev/kvm; FOLDER has room for the archive
#
# A counter guest with MEM (4G) of random content in all of its memory is saved raw into FOLDER, and loaded again and again. A line for each
# run: milliseconds until its state is `running`, asked for all the time; until its console has something; and until all its pages are there.
set -euo pipefail
folder=$1 ferry=$(realpath "${2:-target/release/pageferry}") mem=${3:-4G} runs=${4:-7}
work=$(mktemp -d "$folder/pageferry-on-demand-XXXXXX")
trap 'rm -rf "$work"' EXIT
head -c 64M /dev/urandom > "$work/content"
python3 - "$ferry" "$work" "$mem" "$runs" << 'PYTHON'
import json, os, socket, subprocess, sys, time
ferry, work, mem, runs = sys.argv[1:4] + [int(sys.argv[4])]
archive = f"{work}/vm.pferry"

def start(name, *more):
    begun = time.monotonic()
    vm = subprocess.Popen([ferry, "vm", "--api", f"unix:{work}/{name}", "--mem", mem, "--working-set", "16M", "--rate", "0",
                           "--serial", f"{work}/{name}.serial", *more], stderr=subprocess.DEVNULL)
    return vm, begun

def ask(name, limit, done):
    """Asks for the status until it is so; returns it, and when that was."""
    until = time.monotonic() + limit
    link = None
    while time.monotonic() < until:
        try:
            if link is None:
                link = socket.socket(socket.AF_UNIX)
                link.connect(f"{work}/{name}")
                lines = link.makefile("rw")
            lines.write('{"execute":"status"}\n')
            lines.flush()
            status = json.loads(lines.readline())
            status = status.get("return", status)
            if done(status):
                return status, time.monotonic()
        except (OSError, ValueError):
            link = None
            time.sleep(0.0005)
    sys.exit(f"{name} does not come to it: {status}")

def state(status): return status.get("state") or status.get("status")

source, _ = start("source", "--guest", "counter", "--content", f"{work}/content")
ask("source", 120, lambda status: state(status) == "running")
subprocess.run([ferry, "ctl", f"unix:{work}/source", "migrate", f"file:{archive}", "--codec", "raw"], check=True, stdout=subprocess.DEVNULL)
source.kill()
source.wait()
print(f"archive: {os.stat(archive).st_size >> 20} MiB")
for run in range(runs):
    name = f"run{run}"
    vm, begun = start(name, "--incoming", f"file:{archive}", "--on-demand")
    _, running = ask(name, 60, lambda status: state(status) == "running")
    while os.stat(f"{work}/{name}.serial").st_size == 0:
        time.sleep(0.0005)
    spoke = time.monotonic()
    _, all_here = ask(name, 600, lambda status: (status.get("migration") or {}).get("status") == "completed")
    print(f"runs after {(running - begun) * 1e3:.0f} ms, says something after {(spoke - begun) * 1e3:.0f} ms, whole after {(all_here - begun) * 1e3:.0f} ms",
          flush=True)
    vm.kill()
    vm.wait()
PYTHON
