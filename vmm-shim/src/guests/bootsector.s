# A boot sector for the mini VMM: real mode, loaded at 0000:7c00. Adds one to the first byte of each KiB from
# 64 KiB to 576 KiB, for ever, and prints a dot on the console for each pass.
    .pushsection .rodata.pageferry_boot, "a", @progbits
    .code16
    .globl pageferry_boot_start
    .globl pageferry_boot_end
    .balign 16
pageferry_boot_start:
    cli
    mov dx, 0x3f8
21:
    mov bx, 0x1000
22:
    mov ds, bx
    xor si, si
    # 64 steps of a KiB in each 64 KiB segment
    mov cx, 64
23:
    add byte ptr [si], 1
    add si, 1024
    dec cx
    jnz 23b
    add bx, 0x1000
    cmp bx, 0x9000
    jb 22b
    mov al, '.'
    out dx, al
    jmp 21b
    .zero 510 - (. - pageferry_boot_start)
    .byte 0x55, 0xaa
pageferry_boot_end:
    .code64
    .popsection
