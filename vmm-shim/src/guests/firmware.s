# What takes another VMM, which starts a vCPU at the reset vector, to a guest that the loader of this one has put into RAM. Two
# pieces: a firmware image of 64 KiB, and code that it jumps to, which lies at map::FIRMWARE_CODE and finds the global descriptor
# table that firmware.rs writes. Addresses are those of `map`.
    .pushsection .rodata.pageferry_firmware, "a", @progbits
    .code16
    .globl pageferry_firmware_start
    .globl pageferry_firmware_end
    .balign 16
pageferry_firmware_start:
    .zero 0xff00
# Real mode: to protected mode, and into RAM.
80:
    cli
    xor ax, ax
    mov ds, ax
    # lgdt with a base of 32 bits, out of map::FIRMWARE
    .byte 0x66
    lgdt [0x3000]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    # far jump: code selector 8, offset of 32 bits
    .byte 0x66, 0xea
    .long 0x3100
    .word 8
    .zero 0xfff0 - (. - pageferry_firmware_start)
# The reset vector, 16 bytes below 4 GiB.
    .byte 0xe9
    .word 80b - (. + 2)
    .zero 0x10000 - (. - pageferry_firmware_start)
pageferry_firmware_end:

    .globl pageferry_long_mode_start
    .globl pageferry_long_mode_end
    .code32
pageferry_long_mode_start:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, 0x4000
    # As boot.rs has them: PAE, OSFXSR, OSXMMEXCPT; the tables; LME; PG, WP, NE, ET, MP, PE
    mov eax, 0x620
    mov cr4, eax
    mov eax, 0x20000
    mov cr3, eax
    mov ecx, 0xc0000080
    mov eax, 0x100
    xor edx, edx
    wrmsr
    mov eax, 0x80010033
    mov cr0, eax
    # far jump into 64-bit code
    .byte 0xea
    .long 0x3100 + (81f - pageferry_long_mode_start)
    .word 0x38
    .code64
81:
    mov eax, 0x28
    ltr ax
    # vCPU 0 and its parameters; then, at CPL 3 with IOPL 3, the guest's code
    xor edi, edi
    mov esi, 0x1000
    push 0x23
    push 0x5000
    push 0x3002
    push 0x1b
    push 0x10000
    iretq
pageferry_long_mode_end:
    .popsection
