// The threads of one emulated block: a fiber a CUDA thread, a scheduler that runs them in a chosen order, the meetings
// at which they wait (warp collectives, block barriers), and what the sanitizers are told about all that.
//
// Every thread runs until it waits or returns. The last lane to arrive at a warp collective lets its group go; a block
// barrier opens once no thread can run and all that are left wait at it. Anything else at that moment is a deadlock and
// is reported thread by thread. A report ends the launch: its threads are abandoned, never resumed.
//
// AddressSanitizer is told of every stack switch. For ThreadSanitizer each CUDA thread is a thread of its own,
// switching orders nothing, and a meeting orders its members only: a missing barrier is a data race although only one
// OS thread runs. The emulator's own functions are hidden from all sanitizers (ND_EMU_INTERNAL).
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define ND_EMU_ASAN 1
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* stack, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** stack, size_t* size);
void __asan_unpoison_memory_region(const volatile void* memory, size_t size);
}
#endif
#if defined(__SANITIZE_THREAD__)
#define ND_EMU_TSAN 1
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_atomic32_store(volatile int* address, int value, int order);
}
#endif
#define ND_EMU_INTERNAL __attribute__((no_sanitize("address,thread,undefined")))

// The stack switch is x86-64 assembly; elsewhere, or when ND_EMU_UCONTEXT is defined, it is swapcontext, 10x slower.
#if !defined(__x86_64__) && !defined(ND_EMU_UCONTEXT)
#define ND_EMU_UCONTEXT 1
#endif
#if defined(ND_EMU_UCONTEXT)
#include <ucontext.h>
#endif

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

namespace nd_emu {

constexpr unsigned kWarpSize = 32;

inline std::string environment(const char* name, const char* otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? text : otherwise;
}

[[noreturn]] inline void refuse(const char* name, const std::string& value, const char* expected) {
  throw std::invalid_argument(std::string(name) + "=" + value + ": expected one of " + expected);
}

// The order of the threads of a block and of the blocks of a launch.
struct Order {
  enum Kind { kForward, kReverse, kRandom } kind = kForward;
  uint64_t state = 0x9E3779B97F4A7C15u;

  static Order from_environment() {
    const std::string text = environment("ND_EMU_ORDER", "forward");
    Order order;
    if (text == "forward") return order;
    order.kind = text == "reverse" ? kReverse : kRandom;
    const bool seeded = text.rfind("random:", 0) == 0 && text.find_first_not_of("0123456789", 7) == std::string::npos;
    if (text != "reverse" && text != "random" && !seeded)
      refuse("ND_EMU_ORDER", text, "forward, reverse, random[:seed]");
    if (seeded) order.state *= 2 * std::strtoull(text.c_str() + 7, nullptr, 10) + 3;
    return order;
  }

  // Uniform in [0, count), by xorshift.
  ND_EMU_INTERNAL size_t random_below(size_t count) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<size_t>(state % count);
  }

  // 0..count-1 in this order.
  std::vector<uint64_t> permutation(uint64_t count) {
    std::vector<uint64_t> ids(count);
    std::iota(ids.begin(), ids.end(), uint64_t{0});
    if (kind == kReverse) std::reverse(ids.begin(), ids.end());
    if (kind == kRandom) {
      for (uint64_t i = count; i > 1; --i) std::swap(ids[i - 1], ids[random_below(i)]);
    }
    return ids;
  }
};

// ---- switching between stacks ----

// One flow of control: the scheduler (on the caller's stack) or a CUDA thread.
struct Context {
#if defined(ND_EMU_UCONTEXT)
  ucontext_t machine;
#else
  void* stack_pointer = nullptr;
#endif
  const char* stack = nullptr;  // lowest address
  size_t stack_size = 0;
  void* tsan_fiber = nullptr;
};

#if !defined(ND_EMU_UCONTEXT)
// Saves the callee-saved registers and the stack pointer at *save, and continues what was saved at `load`.
__attribute__((naked, noinline)) ND_EMU_INTERNAL inline void swap_stacks([[maybe_unused]] void** save,
                                                                         [[maybe_unused]] void* load) {
  __asm__(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

// Makes `context` start at `entry` on its stack when it is first switched to.
ND_EMU_INTERNAL inline void prepare(Context& context, void (*entry)()) {
#if defined(ND_EMU_UCONTEXT)
  getcontext(&context.machine);
  context.machine.uc_stack.ss_sp = const_cast<char*>(context.stack);
  context.machine.uc_stack.ss_size = context.stack_size;
  context.machine.uc_link = nullptr;
  makecontext(&context.machine, entry, 0);
#else
  void** top = reinterpret_cast<void**>(const_cast<char*>(context.stack) + context.stack_size);
  *--top = nullptr;  // as if called: the ABI wants the stack 8 bytes off 16 at a function's first instruction
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
#endif
}

// Leaves `from`, for good if `last`, and continues `to`. Returns when something switches back to `from`.
ND_EMU_INTERNAL inline void switch_context(Context& from, Context& to, [[maybe_unused]] bool last = false) {
#if defined(ND_EMU_TSAN)
  __tsan_switch_to_fiber(to.tsan_fiber, 1);  // 1: the switch orders nothing
#endif
#if defined(ND_EMU_ASAN)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, to.stack, to.stack_size);
#endif
#if defined(ND_EMU_UCONTEXT)
  swapcontext(&from.machine, &to.machine);
#else
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#endif
#if defined(ND_EMU_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// Tells ThreadSanitizer that all the members did so far comes before all that any of them will do. The first release
// replaces what earlier meetings left in the token, so that a meeting orders its own members and nobody else.
ND_EMU_INTERNAL inline void order_members([[maybe_unused]] Context& self, [[maybe_unused]] Context* const* members,
                                          [[maybe_unused]] size_t count) {
#if defined(ND_EMU_TSAN)
  static int token;
  for (size_t i = 0; i < count; ++i) {
    __tsan_switch_to_fiber(members[i]->tsan_fiber, 1);
    if (i == 0)
      __tsan_atomic32_store(&token, 0, 3 /* release */);
    else
      __tsan_release(&token);
  }
  for (size_t i = 0; i < count; ++i) {
    __tsan_switch_to_fiber(members[i]->tsan_fiber, 1);
    __tsan_acquire(&token);
  }
  __tsan_switch_to_fiber(self.tsan_fiber, 1);
#endif
}

// ---- stacks, kept from launch to launch ----

class StackPool {
 public:
  // Gives `context` a stack with an inaccessible page below it, and its ThreadSanitizer fiber.
  void lend(Context& context) {
    if (free_.empty()) free_.push_back(create());
    context.stack = free_.back().stack;
    context.stack_size = kStackBytes;
    context.tsan_fiber = free_.back().tsan_fiber;
    free_.pop_back();
  }

  // Takes the stack back; an abandoned one still holds live frames and is thrown away.
  void take_back(Context& context, bool abandoned) {
    if (!abandoned) return free_.push_back({context.stack, context.tsan_fiber});
#if defined(ND_EMU_ASAN)
    __asan_unpoison_memory_region(context.stack, kStackBytes);
#endif
#if defined(ND_EMU_TSAN)
    __tsan_destroy_fiber(context.tsan_fiber);
#endif
    munmap(const_cast<char*>(context.stack) - kPage, kStackBytes + kPage);
  }

 private:
#if defined(ND_EMU_ASAN) || defined(ND_EMU_TSAN)
  static constexpr size_t kStackBytes = 256 << 10;
#else
  static constexpr size_t kStackBytes = 64 << 10;
#endif
  static constexpr size_t kPage = 64 << 10;  // a multiple of every page size in use

  struct Stack {
    const char* stack;
    void* tsan_fiber;
  };

  static Stack create() {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kPage, PROT_NONE);
#if defined(ND_EMU_TSAN)
    return {static_cast<char*>(memory) + kPage, __tsan_create_fiber(0)};
#else
    return {static_cast<char*>(memory) + kPage, nullptr};
#endif
  }

  std::vector<Stack> free_;
};

inline StackPool stack_pool;

// ---- threads, warps, blocks ----

// Where a thread waits: name of the intrinsic and the place of the call.
struct Place {
  const char* name = "";
  std::source_location location = {};

  bool operator==(const Place& other) const {
    return location.line() == other.location.line() && location.column() == other.location.column() &&
           std::strcmp(name, other.name) == 0 && std::strcmp(location.file_name(), other.location.file_name()) == 0;
  }
};

// What a thread runs: a function of what it is given.
using Call = void (*)(const void* body);

struct Thread;
// What a collective does for a group of lanes that has met: reads `sent`, writes `received`. lanes: the 32 of the warp.
using Combine = void (*)(Thread* lanes, unsigned mask);

// An asynchronous copy to shared memory on its way; `group` counts the commits of its thread before it.
struct Copy {
  void* shared;
  const void* global;
  size_t bytes, zero_fill;
  size_t group = 0;
};

struct Thread : Context {
  enum State : uint8_t { kReady, kAtWarp, kAtBlock, kExited } state = kReady;
  unsigned index = 0;  // x + blockDim.x * (y + blockDim.y * z)
  uint3 position{};
  Place place;
  unsigned mask = 0;  // lanes that must meet
  uint64_t sent = 0, received = 0;
  unsigned source = 0;  // lane whose value a shuffle takes
  Combine combine = nullptr;
  std::vector<Copy> copies;  // oldest first
  size_t commits = 0;

  unsigned lane() const { return index % kWarpSize; }
};

struct Warp {
  unsigned waiting = 0;  // lanes at a collective
  unsigned absent = 0;   // lanes that have returned or that the block does not have
};

class Block;
inline Block* current = nullptr;  // the block that runs; one launch at a time

class Block {
 public:
  Block(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, Order& order)
      : grid(grid),
        block(block),
        kernel_(kernel),
        shared_bytes_(shared_bytes),
        order_(order),
        threads_(block.x * block.y * block.z) {
    warps_.resize((threads_.size() + kWarpSize - 1) / kWarpSize);
    for (Thread& thread : threads_) {
      stack_pool.lend(thread);
      thread.index = static_cast<unsigned>(&thread - threads_.data());
      thread.position = {thread.index % block.x, thread.index / block.x % block.y, thread.index / (block.x * block.y)};
      everyone_.push_back(&thread);
    }
    everyone_.push_back(&scheduler_);
#if defined(ND_EMU_TSAN)
    scheduler_.tsan_fiber = __tsan_get_current_fiber();
#endif
  }

  ~Block() {
    for (Thread& thread : threads_) stack_pool.take_back(thread, failed_);
  }

  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Runs call(body) in every thread, as block `id` of the grid. False after a report.
  bool run(uint3 id, Call call, const void* body) {
    const std::unique_ptr<char[]> shared = fresh_shared();
    block_id = id;
    dynamic_shared = shared.get();
    call_ = call;
    body_ = body;
    start();
    current = this;
    order_members(scheduler_, everyone_.data(), everyone_.size());
    while (live_ > 0 && !failed_) {
      if (head_ < ready_.size()) {
        step(next_ready());
      } else {
        open_barrier();
      }
    }
    order_members(scheduler_, everyone_.data(), everyone_.size());
    current = nullptr;
    if (!failed_ && !guard_is_intact()) report("a thread wrote past the end of the dynamic shared memory");
    return !failed_;
  }

  // The running thread stops here, to wait in `state` or for good.
  ND_EMU_INTERNAL void leave(Thread::State state) {
    Thread& thread = *self;
    thread.state = state;
    switch_context(thread, scheduler_, state == Thread::kExited);
  }

  // Reports in the name of the running thread and ends the launch.
  [[noreturn]] ND_EMU_INTERNAL void fail(const char* message) {
    report(message, *self);
    switch_context(*self, scheduler_);
    std::abort();
  }

  Thread* self = nullptr;  // the thread that runs
  dim3 grid, block;
  uint3 block_id{};
  char* dynamic_shared = nullptr;

 private:
  // AddressSanitizer sees every access beyond the end; without it a guard that must keep its value shows close writes.
#if defined(ND_EMU_ASAN)
  static constexpr size_t kGuardBytes = 0;
#else
  static constexpr size_t kGuardBytes = 256;
#endif

  // Dynamic shared memory of one block: NaN patterns, so that values read before they are written show.
  std::unique_ptr<char[]> fresh_shared() const {
    if (shared_bytes_ == 0) return nullptr;
    std::unique_ptr<char[]> memory(new char[shared_bytes_ + kGuardBytes]);
    std::memset(memory.get(), 0xFF, shared_bytes_ + kGuardBytes);
    return memory;
  }

  bool guard_is_intact() const {
    if (!dynamic_shared) return true;
    const char* guard = dynamic_shared + shared_bytes_;
    return std::all_of(guard, guard + kGuardBytes, [](char byte) { return byte == static_cast<char>(0xFF); });
  }

  ND_EMU_INTERNAL static void thread_main() {
    Block& block = *current;
#if defined(ND_EMU_ASAN)
    const void* stack;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &block.scheduler_.stack_size);
    block.scheduler_.stack = static_cast<const char*>(stack);
#endif
    block.call_(block.body_);
    if (!block.self->copies.empty()) block.fail("a thread returns before its asynchronous copies are done");
    block.leave(Thread::kExited);
  }

  void start() {
    live_ = threads_.size();
    at_barrier_ = head_ = 0;
    ready_.clear();
    for (Warp& warp : warps_) warp = {};
    if (const unsigned lanes = threads_.size() % kWarpSize) warps_.back().absent = ~0u << lanes;
    for (Thread& thread : threads_) {
      prepare(thread, &thread_main);
      thread.state = Thread::kReady;
    }
    make_ready(threads_.data(), threads_.size());
  }

  // Adds those of `count` threads from `first` on that the mask names and that have not returned to the ready ones.
  ND_EMU_INTERNAL void make_ready(Thread* first, size_t count, unsigned mask = ~0u) {
    for (size_t i = 0; i < count; ++i) {
      if (!(mask >> (i % kWarpSize) & 1) || first[i].state == Thread::kExited) continue;
      first[i].state = Thread::kReady;
      ready_.push_back(&first[i]);
    }
  }

  // Forward: the one that has been ready longest, so that all keep level. Reverse: the last that became ready, so that
  // one warp runs as far as it can before any other. Random: any.
  ND_EMU_INTERNAL Thread& next_ready() {
    if (order_.kind == Order::kForward) {
      Thread* thread = ready_[head_++];
      if (head_ < ready_.size()) return *thread;
      ready_.clear();
      head_ = 0;
      return *thread;
    }
    if (order_.kind == Order::kRandom) std::swap(ready_[order_.random_below(ready_.size())], ready_.back());
    Thread* thread = ready_.back();
    ready_.pop_back();
    return *thread;
  }

  ND_EMU_INTERNAL void step(Thread& thread) {
    self = &thread;
    switch_context(scheduler_, thread);
    self = nullptr;
    if (failed_) return;
    if (thread.state == Thread::kAtWarp) arrive(thread);
    if (thread.state == Thread::kAtBlock) ++at_barrier_;
    if (thread.state == Thread::kExited) depart(thread);
  }

  // A lane has come to a warp collective: lets its group go if it is the last.
  ND_EMU_INTERNAL void arrive(Thread& thread) {
    Warp& warp = warps_[thread.index / kWarpSize];
    Thread* lanes = &thread - thread.lane();
    const unsigned mask = thread.mask;
    warp.waiting |= 1u << thread.lane();
    if (mask & warp.absent) return report("a warp collective names a lane that is not there or has returned", thread);
    if ((warp.waiting & mask) != mask) return;
    Context* members[kWarpSize];
    size_t count = 0;
    for (unsigned rest = mask; rest; rest &= rest - 1) {
      Thread& lane = lanes[__builtin_ctz(rest)];
      if (lane.mask != mask) return report("lanes of one warp disagree about the mask", thread, lane);
      if (!(lane.place == thread.place)) {
        return report("lanes of one warp meet at different collectives", thread, lane);
      }
      members[count++] = &lane;
    }
    thread.combine(lanes, mask);
    order_members(scheduler_, members, count);
    warp.waiting &= ~mask;
    make_ready(lanes, std::min<size_t>(kWarpSize, threads_.size() - lanes->index), mask);
  }

  // A thread has returned: no lane may still wait for it.
  ND_EMU_INTERNAL void depart(Thread& thread) {
    Warp& warp = warps_[thread.index / kWarpSize];
    Thread* lanes = &thread - thread.lane();
    --live_;
    warp.absent |= 1u << thread.lane();
    for (unsigned rest = warp.waiting; rest; rest &= rest - 1) {
      const Thread& lane = lanes[__builtin_ctz(rest)];
      if (lane.mask & warp.absent) return report("a warp collective names a lane that has returned", lane);
    }
  }

  // No thread can run: lets all go if all wait at one barrier.
  ND_EMU_INTERNAL void open_barrier() {
    if (at_barrier_ != live_) return report_deadlock();
    uint64_t votes = 0;
    const Thread* first = nullptr;
    for (const Thread& thread : threads_) {
      if (thread.state != Thread::kAtBlock) continue;
      if (!first) first = &thread;
      if (!(thread.place == first->place)) {
        return report("threads of one block meet at different barriers", *first, thread);
      }
      votes += thread.sent;
    }
    members_.clear();
    for (Thread& thread : threads_) {
      if (thread.state == Thread::kAtBlock) members_.push_back(&thread);
      thread.received = votes;
    }
    order_members(scheduler_, members_.data(), members_.size());
    at_barrier_ = 0;
    make_ready(threads_.data(), threads_.size());
  }

  ND_EMU_INTERNAL void report(const char* message) {
    failed_ = true;
    std::fprintf(stderr, "nd_emu: %s<<<(%u,%u,%u), (%u,%u,%u)>>>, block (%u,%u,%u): %s\n", kernel_, grid.x, grid.y,
                 grid.z, block.x, block.y, block.z, block_id.x, block_id.y, block_id.z, message);
  }

  template <class... Threads>
  ND_EMU_INTERNAL void report(const char* message, const Threads&... threads) {
    report(message);
    (print(threads, threads), ...);
  }

  ND_EMU_INTERNAL void report_deadlock() {
    report("deadlock");
    for (size_t i = 0, next; i < threads_.size(); i = next) {
      for (next = i + 1; next < threads_.size() && same_wait(threads_[i], threads_[next]);) ++next;
      print(threads_[i], threads_[next - 1]);
    }
  }

  static bool same_wait(const Thread& a, const Thread& b) {
    return a.state == b.state && (a.state == Thread::kExited || (a.mask == b.mask && a.place == b.place));
  }

  // One line on the threads first..last, which are all in the state of the first.
  ND_EMU_INTERNAL static void print(const Thread& first, const Thread& last) {
    const uint3 a = first.position, b = last.position;
    std::fprintf(stderr, "  thread (%u,%u,%u)", a.x, a.y, a.z);
    if (&first != &last) std::fprintf(stderr, " to (%u,%u,%u)", b.x, b.y, b.z);
    if (first.state == Thread::kExited) {
      std::fprintf(stderr, ": returned\n");
      return;
    }
    std::fprintf(stderr, ": %s", first.place.name);
    const auto& where = first.place.location;
    if (where.line()) std::fprintf(stderr, " at %s:%u", where.file_name(), static_cast<unsigned>(where.line()));
    std::fprintf(stderr, first.mask ? ", mask %08x\n" : "\n", first.mask);
  }

  const char* kernel_;
  size_t shared_bytes_;
  Order& order_;
  Context scheduler_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Context*> everyone_, members_;
  std::vector<Thread*> ready_;  // in the order in which they became so, from head_ on
  size_t head_ = 0, live_ = 0, at_barrier_ = 0;
  bool failed_ = false;
  Call call_ = nullptr;
  const void* body_ = nullptr;
};

// ---- what the running thread calls ----

[[noreturn]] ND_EMU_INTERNAL inline void fail(const char* message, Place place) {
  current->self->place = place;
  current->self->mask = 0;
  current->fail(message);
}

// Waits for the other lanes of `mask` to come to the same place; what combine() then left for this lane.
ND_EMU_INTERNAL inline uint64_t meet_warp(unsigned mask, uint64_t sent, unsigned source, Combine combine, Place place) {
  Thread& thread = *current->self;
  thread.place = place;
  thread.mask = mask;
  thread.sent = sent;
  thread.source = source;
  thread.combine = combine;
  if (!(mask >> thread.lane() & 1)) current->fail("the calling lane is not in its own mask");
  if (!(mask >> source & 1)) current->fail("a shuffle reads a lane outside its mask");
  current->leave(Thread::kAtWarp);
  return thread.received;
}

// Waits for all threads of the block that have not returned; the number of those that voted.
ND_EMU_INTERNAL inline uint64_t meet_block(bool vote, Place place) {
  Thread& thread = *current->self;
  thread.place = place;
  thread.mask = 0;
  thread.sent = vote;
  current->leave(Thread::kAtBlock);
  return thread.received;
}

ND_EMU_INTERNAL inline void add_copy(Copy copy) {
  Thread& thread = *current->self;
  copy.group = thread.commits;
  thread.copies.push_back(copy);
}

ND_EMU_INTERNAL inline void commit_copies() { ++current->self->commits; }

// Removes the oldest copy into *copy, unless it is of the last `groups` groups committed or of none yet.
ND_EMU_INTERNAL inline bool take_copy(size_t groups, Copy* copy) {
  Thread& thread = *current->self;
  if (thread.copies.empty() || thread.copies.front().group + groups >= thread.commits) return false;
  *copy = thread.copies.front();
  thread.copies.erase(thread.copies.begin());
  return true;
}

}  // namespace nd_emu
