# The writer guest: writes the pages of a list, tells so, and waits for the next list. On entry: rdi = vCPU
# number, rsi = parameter block: 0 sequence number, 8 number of addresses, 16 address of the list. It reads
# the block and the list, and writes nothing but the pages. vCPUs other than 0 idle.
    .pushsection .rodata.pageferry_writer, "a", @progbits
    .code64
    .globl pageferry_writer_start
    .globl pageferry_writer_end
    .balign 16
pageferry_writer_start:
    xor ebx, ebx
    test rdi, rdi
    jz 22f
20:
    pause
    jmp 20b
21:
    pause
22:
    mov rax, [rsi]
    cmp rax, rbx
    je 21b
    mov rbx, rax
    mov rcx, [rsi + 8]
    mov rdi, [rsi + 16]
    test rcx, rcx
    jz 24f
23:
    mov rax, [rdi]
    mov [rax], rbx
    add rdi, 8
    dec rcx
    jnz 23b
24:
    mov edx, 0x4f8
    mov eax, ebx
    out dx, eax
    jmp 22b
pageferry_writer_end:
    .popsection
