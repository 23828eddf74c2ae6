// The threads of a block. Included after language.h and before a kernel.
//
// With EMU_BARRIERS they are coroutines that take turns at __syncthreads, __syncwarp and shuffles;
// without it they run one after another. They begin with the last thread in the first block, with
// the first in the next, and so on, so that code which relies on an order shows. Not here: dynamic shared memory, cooperative groups, votes, tensor cores,
// masks of a part of a warp.
#pragma once

static void emu_set_thread(unsigned t) {
    threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
}

// The thread that runs at this place in the block's order.
static unsigned emu_thread_at(unsigned place, unsigned threads) {
    bool forwards = (blockIdx.x + blockIdx.y + blockIdx.z) % 2;
    return forwards ? place : threads - 1 - place;
}

#ifndef EMU_BARRIERS
static void emu_run_block(void (*body)(void**), void** parameters, unsigned threads) {
    for (unsigned place = 0; place < threads; place++) {
        emu_set_thread(emu_thread_at(place, threads));
        body(parameters);
    }
}
#else

// ---- coroutines: a stack for each thread ------------------------------------------------------

// Save what a call must preserve, leave this stack and continue on the other (x86-64, System V).
extern "C" void emu_switch(void** left, void* to);
asm(R"(
.text
.local emu_switch
.type emu_switch,@function
emu_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");

static const size_t EMU_STACK = 16384;
static const unsigned EMU_THREADS = 1024;
static void *emu_scheduler, *emu_stacks[EMU_THREADS];
static bool emu_done[EMU_THREADS];
static unsigned emu_now;  // the running thread
static void (*emu_body)(void**);
static void** emu_parameters;

static void emu_yield() { emu_switch(&emu_stacks[emu_now], emu_scheduler); }

// ---- barriers ---------------------------------------------------------------------------------

// The last thread to arrive releases the others. A thread that has returned is not waited for.
struct EmuBarrier {
    unsigned alive, arrived, generation;
    void open() {
        arrived = 0;
        generation++;
    }
    void wait() {
        unsigned mine = generation;
        if (++arrived == alive) open();
        do emu_yield();  // the last one too, so that it does not run ahead
        while (generation == mine);
    }
    void leave() {
        alive--;
        if (alive && arrived == alive) open();
    }
};
static EmuBarrier emu_block_barrier, emu_warp_barriers[EMU_THREADS / 32];

static void __syncthreads() { emu_block_barrier.wait(); }
static void __syncwarp(unsigned = ~0u) { emu_warp_barriers[emu_now / 32].wait(); }

// ---- shuffles among the 32 threads of a warp --------------------------------------------------

static long long emu_slots[EMU_THREADS];
static int emu_lane() { return emu_now & 31; }
template <class T>
static T emu_shuffle(T value, int lane) {
    static_assert(sizeof(T) <= 8, "");
    memcpy(&emu_slots[emu_now], &value, sizeof value);
    __syncwarp();
    if (lane >= 0 && lane < 32) memcpy(&value, &emu_slots[(emu_now & ~31u) + lane], sizeof value);
    __syncwarp();
    return value;
}
template <class T>
static T __shfl_sync(unsigned, T value, int lane, int = 32) { return emu_shuffle(value, lane); }
template <class T>
static T __shfl_xor_sync(unsigned, T value, int mask, int = 32) { return emu_shuffle(value, emu_lane() ^ mask); }
template <class T>
static T __shfl_down_sync(unsigned, T value, unsigned by, int = 32) { return emu_shuffle(value, emu_lane() + (int)by); }
template <class T>
static T __shfl_up_sync(unsigned, T value, unsigned by, int = 32) { return emu_shuffle(value, emu_lane() - (int)by); }

// ---- running a block --------------------------------------------------------------------------

static void emu_entry() {
    emu_body(emu_parameters);
    emu_done[emu_now] = true;
    emu_block_barrier.leave();
    emu_warp_barriers[emu_now / 32].leave();
    emu_yield();
}
static void emu_run_block(void (*body)(void**), void** parameters, unsigned threads) {
    static char* memory = (char*)aligned_alloc(4096, EMU_THREADS * EMU_STACK);
    emu_body = body;
    emu_parameters = parameters;
    for (unsigned t = 0; t < threads; t++) {
        void** top = (void**)(memory + (t + 1) * EMU_STACK - 64);
        *--top = nullptr;           // emu_entry has no caller
        *--top = (void*)emu_entry;  // the first switch returns to this
        for (int i = 0; i < 6; i++) *--top = nullptr;  // the six saved registers
        emu_stacks[t] = top;
        emu_done[t] = false;
    }
    emu_block_barrier = {threads, 0, 0};
    for (unsigned w = 0; w * 32 < threads; w++) emu_warp_barriers[w] = {std::min(32u, threads - w * 32), 0, 0};
    for (unsigned left = threads; left;)
        for (unsigned place = 0; place < threads; place++) {
            unsigned t = emu_thread_at(place, threads);
            if (emu_done[t]) continue;
            emu_now = t;
            emu_set_thread(t);
            emu_switch(&emu_scheduler, emu_stacks[t]);
            left -= emu_done[t];
        }
}
#endif
