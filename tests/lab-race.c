/*
 * Shows, without pageferry, why the lab's guests have one thread for all their CPUs.
 *
 * A virtual machine of 64 KiB counts, and writes the count to a port; so every KVM_RUN must return the next number. Meanwhile another
 * thread does nothing but FXRSTOR. In a guest of QEMU with `-accel tcg,thread=multi`, and with the virtual machine on the guest's first
 * CPU and the other thread on its second, the virtual machine shuts down or returns something else within seconds, or the guest's own
 * kernel panics. The other way round, on one CPU, or with `thread=single`, it does not. For FXRSTOR, XRSTOR and FLDENV on any CPU clear a bit
 * of a word of the first CPU without a lock (QEMU: target/i386/tcg, cpu_set_fpus and cpu_clear_ignne), and VMRUN and VMEXIT keep there
 * whether nested paging is on. Seen with QEMU 7.2; hosts need two CPUs that have nothing else to do.
 *
 *   cc -O2 -static -pthread tests/lab-race.c -o /tmp/lab-race
 *   target/release/pageferry lab run --parallel -- /tmp/lab-race 0 1    # fails
 *   target/release/pageferry lab run --parallel -- /tmp/lab-race 1 0    # passes
 *   target/release/pageferry lab run -- /tmp/lab-race 0 1               # passes
 *
 * Arguments: the CPU of the virtual machine, that of the other thread (-1: none), seconds (10).
 * Exit codes: 0 every number was the next; 1 one was not; 2 it could not run.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { RAM = 65536, CODE = 0x1000, PORT = 0x10 };

static void check(int good, const char *what)
{
    if (!good) {
        perror(what);
        exit(2);
    }
}

static void pin(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    check(sched_setaffinity(0, sizeof set, &set) == 0, "sched_setaffinity");
}

static void *restore_for_ever(void *cpu)
{
    static char area[512] __attribute__((aligned(16)));
    pin(*(int *)cpu);
    __asm__ volatile("fxsave %0" : "=m"(area));
    for (;;)
        __asm__ volatile("fxrstor %0" : : "m"(area));
    return NULL;
}

int main(int argc, char **argv)
{
    int kvm_cpu = argc > 1 ? atoi(argv[1]) : 0;
    int other_cpu = argc > 2 ? atoi(argv[2]) : 1;
    int seconds = argc > 3 ? atoi(argv[3]) : 10;

    int kvm = open("/dev/kvm", O_RDWR);
    check(kvm >= 0, "/dev/kvm");
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);
    check(vm >= 0, "KVM_CREATE_VM");
    unsigned char *ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    check(ram != MAP_FAILED, "mmap");
    /* inc ax; out PORT, ax; back to the first of them. */
    static const unsigned char code[] = { 0x40, 0xe7, PORT, 0xeb, 0xfb };
    memcpy(ram + CODE, code, sizeof code);
    struct kvm_userspace_memory_region region = { .memory_size = RAM, .userspace_addr = (uintptr_t)ram };
    check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0, "KVM_SET_USER_MEMORY_REGION");
    int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    check(vcpu >= 0, "KVM_CREATE_VCPU");
    int bytes = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    struct kvm_run *run = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    check(run != MAP_FAILED, "mmap of the vCPU");
    struct kvm_sregs sregs;
    check(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0, "KVM_GET_SREGS");
    sregs.cs.base = sregs.cs.selector = 0;
    check(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0, "KVM_SET_SREGS");
    struct kvm_regs regs = { .rip = CODE, .rflags = 2 };
    check(ioctl(vcpu, KVM_SET_REGS, &regs) == 0, "KVM_SET_REGS");

    pthread_t other;
    if (other_cpu >= 0)
        check(pthread_create(&other, NULL, restore_for_ever, &other_cpu) == 0, "pthread_create");
    pin(kvm_cpu);
    uint16_t next = 0;
    unsigned long exits = 0;
    for (time_t end = time(NULL) + seconds; time(NULL) < end; exits++) {
        check(ioctl(vcpu, KVM_RUN, 0) == 0 || errno == EINTR, "KVM_RUN");
        uint16_t got = *(uint16_t *)((char *)run + run->io.data_offset);
        next++;
        if (run->exit_reason != KVM_EXIT_IO || got != next) {
            check(ioctl(vcpu, KVM_GET_REGS, &regs) == 0, "KVM_GET_REGS");
            printf("exit reason %u at %#llx, with %u instead of %u, after %lu exits\n", run->exit_reason, regs.rip, got, next, exits);
            return 1;
        }
    }
    printf("%lu exits, all as expected\n", exits);
    return 0;
}
