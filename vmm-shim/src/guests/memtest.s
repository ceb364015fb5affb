# The mem-test guest: adds one to the first byte of each KiB of an array, for ever; a dot on the console for
# each pass. On entry: rdi = vCPU number, rsi = parameter block: 0 address of the array, 8 its length in
# bytes, 16 end of low memory, 24 gap after it. vCPUs other than 0 idle in user mode.
    .pushsection .rodata.pageferry_memtest, "a", @progbits
    .code64
    .globl pageferry_memtest_start
    .globl pageferry_memtest_end
    .balign 16
pageferry_memtest_start:
    test rdi, rdi
    jz 21f
20:
    pause
    jmp 20b
21:
    mov edx, 0x3f8
22:
    mov rbx, [rsi]
    mov rcx, [rsi + 8]
    add rcx, rbx
23:
    mov rax, rbx
    cmp rax, [rsi + 16]
    jb 24f
    add rax, [rsi + 24]
24:
    add byte ptr [rax], 1
    add rbx, 1024
    cmp rbx, rcx
    jb 23b
    mov al, '.'
    out dx, al
    jmp 22b
pageferry_memtest_end:
    .popsection
