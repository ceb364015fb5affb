# The counter guest: 64-bit, user mode, position independent, no stack, no relocations.
# On entry: rdi = vCPU number, rsi = address of the parameter block. See counter.rs for what it does.
#
# Parameter block (64-bit words): 0 vCPUs, 8 working set address, 16 pages per vCPU, 24 end of low memory,
# 32 gap after it, 40 ticks per page (0: flat out), 48 pattern words per page, 56 most ticks to catch up,
# 64 address of the print lock; 64 bytes behind it a word for each vCPU: its longest gap in ticks.
#
# Registers that live through the loop:
#   r15 parameters   r14 vCPU    r13 step k      r12 chain of step k   rbp chain of step k - pages
#   r11 page index   r10 pages   r9 page address r8  pass              rbx due time of the next page
#   xmm6 last look at the clock
    .pushsection .rodata.pageferry_counter, "a", @progbits
    .code64
    .globl pageferry_counter_start
    .globl pageferry_counter_end
    .balign 16
pageferry_counter_start:
    mov r14, rdi
    mov r15, rsi
    mov r10, [r15 + 16]
    xor r13d, r13d
    xor r11d, r11d
    xor r8d, r8d
    # chain of step 0 = seed xor (vCPU + 1) * odd
    movabs rax, 0x9e3779b97f4a7c15
    lea r12, [r14 + 1]
    imul r12, rax
    movabs rax, 0x70616765666572ff
    xor r12, rax
    mov rbp, r12
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov rbx, rax
    movq xmm6, rax

.Lcounter_next_step:
    # page address = working set + (vCPU * pages + index) * 4096, past the gap when above low memory
    mov r9, r14
    imul r9, r10
    add r9, r11
    shl r9, 12
    add r9, [r15 + 8]
    cmp r9, [r15 + 24]
    jb 20f
    add r9, [r15 + 32]
20:
    # The first visit finds whatever memory held.
    test r8, r8
    jz .Lcounter_write_page
    # want in rdx, got in rcx
    movabs rdx, 0x5046434f554e5452
    mov rcx, [r9]
    cmp rcx, rdx
    jne .Lcounter_mismatch
    mov rdx, r13
    sub rdx, r10
    mov rcx, [r9 + 8]
    cmp rcx, rdx
    jne .Lcounter_mismatch
    mov rcx, [r9 + 4088]
    cmp rcx, rdx
    jne .Lcounter_mismatch
    mov rdx, rbp
    mov rcx, [r9 + 16]
    cmp rcx, rdx
    jne .Lcounter_mismatch
    # pattern = chain xor (step + 1), in every pattern word
    lea rax, [r13 + 1]
    sub rax, r10
    xor rax, rbp
    lea rdi, [r9 + 24]
    mov rcx, [r15 + 48]
    cmp rcx, rcx
    repe scasq
    je .Lcounter_verified
    mov rdx, rax
    mov rcx, [rdi - 8]
.Lcounter_mismatch:
    lea rsi, [rip + 30f]
    jmp .Lcounter_print_mismatch
30:
.Lcounter_verified:
    # chain of the step to be .Lcounter_verified next: the same chain, one pass behind
    mov rax, r13
    sub rax, r10
    xor rbp, rax
    movabs rax, 0x9e3779b97f4a7c15
    imul rbp, rax
    rol rbp, 29

.Lcounter_write_page:
    movabs rax, 0x5046434f554e5452
    mov [r9], rax
    mov [r9 + 8], r13
    mov [r9 + 16], r12
    lea rax, [r13 + 1]
    xor rax, r12
    lea rdi, [r9 + 24]
    mov rcx, [r15 + 48]
    rep stosq
    mov [r9 + 4088], r13
    # chain of step k + 1 = rol((chain xor k) * odd, 29)
    xor r12, r13
    movabs rax, 0x9e3779b97f4a7c15
    imul r12, rax
    rol r12, 29
    inc r13
    inc r11
    cmp r11, r10
    jb .Lcounter_pace
    xor r11d, r11d
    lea rsi, [rip + 31f]
    jmp .Lcounter_print_pass
31:
    inc r8

.Lcounter_pace:
    add rbx, [r15 + 40]
40:
    rdtsc
    shl rdx, 32
    or rax, rdx
    # The longest gap yet: no other vCPU writes this one's word.
    movq rcx, xmm6
    movq xmm6, rax
    mov rdx, rax
    sub rdx, rcx
    mov rcx, [r15 + 64]
    cmp rdx, [rcx + r14 * 8 + 64]
    jle 43f
    mov [rcx + r14 * 8 + 64], rdx
43:
    cmp qword ptr [r15 + 40], 0
    je .Lcounter_next_step
    mov rdx, rbx
    sub rdx, rax
    jle 41f
    # Due in the future, by more than a step and the catch-up limit: the clock went back. Start anew.
    mov rax, [r15 + 56]
    add rax, [r15 + 40]
    cmp rdx, rax
    ja 42f
    pause
    jmp 40b
41:
    # Late by more than the limit (the guest stood still): forget the rest of it.
    neg rdx
    sub rdx, [r15 + 56]
    jbe .Lcounter_next_step
    add rbx, rdx
    jmp .Lcounter_next_step
42:
    sub rbx, rdx
    jmp .Lcounter_next_step

# Prints "c<vCPU> p<pass> s<chain>\n" under the lock and jumps to rsi. Uses rax, rcx, rdx, rdi, r9.
.Lcounter_print_pass:
    mov rdi, [r15 + 64]
50:
    mov eax, 1
    xchg [rdi], eax
    test eax, eax
    jz 51f
    pause
    jmp 50b
51:
    mov edx, 0x3f8
    mov al, 'c'
    out dx, al
    lea eax, [r14 + '0']
    out dx, al
    mov al, ' '
    out dx, al
    mov al, 'p'
    out dx, al
    mov r9, r8
    lea rdi, [rip + 52f]
    jmp .Lcounter_print_hex
52:
    mov edx, 0x3f8
    mov al, ' '
    out dx, al
    mov al, 's'
    out dx, al
    mov r9, r12
    lea rdi, [rip + 53f]
    jmp .Lcounter_print_hex
53:
    mov edx, 0x3f8
    mov al, 10
    out dx, al
    mov rdi, [r15 + 64]
    mov dword ptr [rdi], 0
    jmp rsi

# Prints "E c<vCPU> p<page> want <rdx> got <rcx>\n" and jumps to rsi. Keeps r9.
# The SSE registers keep the values while the general ones print.
.Lcounter_print_mismatch:
    movq xmm0, rdx
    movq xmm1, rcx
    movq xmm2, r9
    mov rdi, [r15 + 64]
60:
    mov eax, 1
    xchg [rdi], eax
    test eax, eax
    jz 61f
    pause
    jmp 60b
61:
    mov edx, 0x3f8
    mov al, 'E'
    out dx, al
    mov al, ' '
    out dx, al
    mov al, 'c'
    out dx, al
    lea eax, [r14 + '0']
    out dx, al
    mov al, ' '
    out dx, al
    mov al, 'p'
    out dx, al
    mov r9, r11
    lea rdi, [rip + 62f]
    jmp .Lcounter_print_hex
62:
    lea rdi, [rip + .Lcounter_want_text]
    mov edx, 0x3f8
    mov ecx, 6
63:
    mov al, [rdi]
    inc rdi
    out dx, al
    dec ecx
    jnz 63b
    movq r9, xmm0
    lea rdi, [rip + 64f]
    jmp .Lcounter_print_hex
64:
    lea rdi, [rip + .Lcounter_got_text]
    mov edx, 0x3f8
    mov ecx, 5
65:
    mov al, [rdi]
    inc rdi
    out dx, al
    dec ecx
    jnz 65b
    movq r9, xmm1
    lea rdi, [rip + 66f]
    jmp .Lcounter_print_hex
66:
    mov edx, 0x3f8
    mov al, 10
    out dx, al
    movq r9, xmm2
    mov rdi, [r15 + 64]
    mov dword ptr [rdi], 0
    jmp rsi

# Prints r9 in hexadecimal without leading zeros and jumps to rdi. Uses rax, rcx, rdx, r9.
.Lcounter_print_hex:
    mov edx, 0x3f8
    mov ecx, 16
70:
    # Skip leading zero digits, but for the last.
    rol r9, 4
    dec ecx
    jz 72f
    test r9b, 15
    jz 70b
72:
    mov eax, r9d
    and eax, 15
    cmp al, 10
    jb 73f
    add al, 39
73:
    add al, 48
    out dx, al
    test ecx, ecx
    jz 74f
    rol r9, 4
    dec ecx
    jmp 72b
74:
    jmp rdi

.Lcounter_want_text:
    .ascii " want "
.Lcounter_got_text:
    .ascii " got "
pageferry_counter_end:
    .popsection
