// Switching between stacks: by hand on x86-64 (a few nanoseconds), by ucontext elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace quire_emu {

/// A stack and where its execution stopped.
struct Context {
    void* stack = nullptr;
    size_t stack_size = 0;
#if defined(__x86_64__)
    void* sp = nullptr;
#else
    ucontext_t saved;
#endif
    void* fake_stack = nullptr;
};

#if defined(__x86_64__)
extern "C" void quire_emu_switch(void** save_sp, void* load_sp);
asm(R"(
    .text
    .hidden quire_emu_switch
    .globl quire_emu_switch
    .type quire_emu_switch, @function
quire_emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size quire_emu_switch, . - quire_emu_switch
)");
#endif

/// Makes the next switch to `context` call `entry`, which must not return.
inline void prepare(Context& context, void (*entry)()) {
#if defined(__x86_64__)
    auto top = (reinterpret_cast<uintptr_t>(context.stack) + context.stack_size) & ~uintptr_t(15);
    auto* slot = reinterpret_cast<void**>(top);
    *--slot = nullptr;  // The return address of entry: none. Leaves the alignment the ABI wants at its first line.
    *--slot = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--slot = nullptr;
    context.sp = slot;
#else
    getcontext(&context.saved);
    context.saved.uc_stack.ss_sp = context.stack;
    context.saved.uc_stack.ss_size = context.stack_size;
    context.saved.uc_link = nullptr;
    makecontext(&context.saved, entry, 0);
#endif
    context.fake_stack = nullptr;
}

/// Saves the running stack in `from` and continues on `to`.
inline void switch_to(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_size);
#endif
#if defined(__x86_64__)
    quire_emu_switch(&from.sp, to.sp);
#else
    swapcontext(&from.saved, &to.saved);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

}  // namespace quire_emu
