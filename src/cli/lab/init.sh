#!/bin/busybox sh
# The first process of the lab guest: makes the host's files, read-only and with a writable layer on top, the root of the guest, and runs
# one command there. What it prints goes to the kernel's console; the command's output and everything the host must know
# go over ports of their own, so neither disturbs the other.
/bin/busybox mkdir -p /proc /sys /dev /lower /upper /root /job
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do
    insmod "$module" || echo "lab: $module does not load"
done

# port NAME: the device of the virtio-serial port of that name.
port() {
    tries=0
    while [ $tries -lt 100 ]; do
        for folder in /sys/class/virtio-ports/*; do
            if [ "$(cat "$folder/name" 2>/dev/null)" = "$1" ]; then
                echo "/dev/${folder##*/}"
                return
            fi
        done
        tries=$((tries + 1))
        usleep 50000
    done
    echo "lab: there is no port $1"
}

exec 3<>"$(port ctl)"
echo alive >&3

fail() {
    echo "fail $*" >&3
    sleep 1
    poweroff -f
}

# plan9 TAG FOLDER OPTIONS: mounts what the host shares.
plan9() {
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=1048576,$3" "$1" "$2" || fail "the guest cannot mount '$1' on $2"
}

# share TAG FOLDER: the same path in the guest as at the host; writes go through.
share() {
    mkdir -p "/root$2" || fail "$2 cannot be made in the guest"
    plan9 "$1" "/root$2" rw,cache=mmap
}

plan9 host /lower ro,cache=loose
mount -t tmpfs -o mode=755 upper /upper
mkdir /upper/data /upper/work
chmod 755 /upper/data
mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work root /root || fail "the overlay cannot be mounted"
mkdir -p /root/proc /root/sys /root/dev /root/run
mount -t proc proc /root/proc
mount -t sysfs sys /root/sys
mount -t devtmpfs dev /root/dev
mkdir -p /root/dev/pts /root/dev/shm
mount -t devpts -o mode=620,ptmxmode=666 pts /root/dev/pts
mount -t tmpfs -o mode=1777 shm /root/dev/shm
mount -t tmpfs -o mode=755 run /root/run
ln -s /proc/self/fd /root/dev/fd
ln -s /proc/self/fd/0 /root/dev/stdin
ln -s /proc/self/fd/1 /root/dev/stdout
ln -s /proc/self/fd/2 /root/dev/stderr
plan9 job /job ro,cache=loose
mkdir /root/run/pageferry-lab
mount -o bind /job /root/run/pageferry-lab
# Names the guest and shares folders.
. /job/setup
if ! chroot /root /bin/sh /run/pageferry-lab/network </dev/null >/tmp.network 2>&1; then
    fail "the network or its RDMA device cannot be set up: $(tail -n 3 /tmp.network | tr '\n' ';')"
fi

echo ready >&3
read -r go <&3
# A host that went away takes its guest along.
(cat <&3 >/dev/null; poweroff -f) &
# The command writes into pipes: unlike the ports they can be opened by whoever inherits them.
mkfifo /out /err
cat </out >"$(port out)" &
out=$!
cat </err >"$(port err)" &
err=$!
chroot /root /bin/sh /run/pageferry-lab/command </dev/null >/out 2>/err 3>&-
status=$?
# What it left running may hold the pipes open.
(sleep 2; kill $out $err) 2>/dev/null &
wait $out $err
sync
echo "exit $status" >&3
# The other guest may still need this one: the host says when to end, by closing the port.
wait
poweroff -f
