// Runs the threads of a GPU kernel as fibers of one CPU thread: each goes on until a barrier or a SIMD-group
// operation, where it waits for the others. Which fiber goes first is a parameter, so that a result that depends on
// it (a race) shows. Threads that wait for others that never come end the program with a message.
//
// The program reads launches from standard input until it ends, and writes the outputs of each to standard output.
// Every array is a heap block of its own of exactly its size, for the address sanitizer to guard. Outputs and
// threadgroup memory hold NaN before they are written.
#ifdef __APPLE__
#define _XOPEN_SOURCE 700  // or its ucontext.h refuses
#define _DARWIN_C_SOURCE
#endif

#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "runner.h"

#include <sanitizer/common_interface_defs.h>

namespace harness {

// --- fibers ---------------------------------------------------------------------------------------------------------

void fail(const char* message) {
  std::fprintf(stderr, "harness: %s\n", message);
  std::fflush(stderr);
  _exit(3);  // from within a fiber; what exit would run expects the stack of the program
}

enum class State { ready, at_barrier, at_exchange, done };
constexpr size_t STACK = 1 << 16;

// Where a fiber, or the scheduler, goes on. swapcontext would do, but asks the operating system for the signal mask at
// each of some hundred thousand switches.
struct Place {
  ucontext_t context;
#ifdef __x86_64__
  void* registers[5];
  bool running = false;
#endif
};

#ifdef __x86_64__
[[noreturn]] __attribute__((noinline)) static void jump(Place& to) { __builtin_longjmp(to.registers, 1); }
#endif

__attribute__((noinline)) static void hop(Place& from, Place& to) {
#ifdef __x86_64__
  if (__builtin_setjmp(from.registers)) return;
  if (to.running) jump(to);
  to.running = true;
  setcontext(&to.context);
#else
  swapcontext(&from.context, &to.context);
#endif
}

struct Fiber {
  Place place;
  std::vector<char> stack = std::vector<char>(STACK);
  void* shadow = nullptr;
  State state = State::done;
  uint64_t slot = 0;  // what it hands to the others of its SIMD group
};

struct Machine {
  Place scheduler;
  void* shadow = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
  std::vector<Fiber> fibers;
  std::vector<uint64_t> handed;  // the slots at the last exchange
  int current = 0;
  Position group, groups;
  void (*kernel)(char**);
  char** addresses;
  std::vector<std::pair<void*, size_t>> shared;
};

static Machine machine;

Position in_group() { return {static_cast<unsigned>(machine.current), 0, 0}; }
Position group() { return machine.group; }
Position groups() { return machine.groups; }

static void enter(Fiber& fiber) {
  __sanitizer_start_switch_fiber(&machine.shadow, fiber.stack.data(), STACK);
  hop(machine.scheduler, fiber.place);
  __sanitizer_finish_switch_fiber(machine.shadow, nullptr, nullptr);
}

static void leave(State state) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = state;
  __sanitizer_start_switch_fiber(state == State::done ? nullptr : &fiber.shadow, machine.bottom, machine.size);
  hop(fiber.place, machine.scheduler);
  __sanitizer_finish_switch_fiber(fiber.shadow, &machine.bottom, &machine.size);
}

static void start() {
  __sanitizer_finish_switch_fiber(nullptr, &machine.bottom, &machine.size);
  machine.kernel(machine.addresses);
  leave(State::done);
}

void barrier() { leave(State::at_barrier); }

uint64_t exchange(uint64_t value, int from) {
  if (from < 0 || from >= 32) fail("a shuffle from a thread that the SIMD group does not have");
  const int first = machine.current / 32 * 32;
  machine.fibers[machine.current].slot = value;
  leave(State::at_exchange);
  return machine.handed[first + from];
}

void remember(void* address, size_t size) { machine.shared.push_back({address, size}); }

// Runs a SIMD group until each of its threads is done or at a barrier, before any other has its turn: what one SIMD
// group may see of another's work without a barrier between, it then sees or not according to their order.
static void run_simd_group(int first, bool backwards) {
  for (;;) {
    for (int k = 0; k < 32; ++k) {
      machine.current = first + (backwards ? 31 - k : k);
      Fiber& fiber = machine.fibers[machine.current];
      if (fiber.state == State::ready) enter(fiber);
    }
    int waiting = 0;
    for (int i = first; i < first + 32; ++i) waiting += machine.fibers[i].state == State::at_exchange;
    if (waiting == 0) return;
    if (waiting < 32) fail("threads of a SIMD group do not meet at the same operation");
    for (int i = first; i < first + 32; ++i) {
      machine.handed[i] = machine.fibers[i].slot;
      machine.fibers[i].state = State::ready;
    }
  }
}

static void run_group(int threads, bool backwards) {
  for (auto [address, size] : machine.shared) std::memset(address, 0xff, size);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    ucontext_t& context = fiber.place.context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.data();
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    fiber.state = State::ready;
#ifdef __x86_64__
    fiber.place.running = false;
#endif
    makecontext(&context, start, 0);
  }
  for (;;) {
    for (int k = 0; k < threads; k += 32) run_simd_group(backwards ? threads - 32 - k : k, backwards);
    int done = 0;
    for (int i = 0; i < threads; ++i) done += machine.fibers[i].state == State::done;
    if (done == threads) return;
    if (done) fail("threads of a group end while others wait at a barrier");
    for (int i = 0; i < threads; ++i) machine.fibers[i].state = State::ready;
  }
}

// --- launches from standard input -----------------------------------------------------------------------------------

template <typename T>
static T take() {
  T value;
  if (std::fread(&value, sizeof(T), 1, stdin) != 1) std::exit(0);
  return value;
}

// `call` runs the kernel for one thread; it takes the addresses of its arguments, in the order of the signature.
int serve(void (*call)(char**)) {
  for (;;) {
    const int count = take<int32_t>();
    const int threads = take<int32_t>();
    const bool backwards = take<int32_t>() != 0;
    machine.groups = {take<uint32_t>(), take<uint32_t>(), take<uint32_t>()};
    std::vector<char*> blocks(count), addresses(count);
    std::vector<int64_t> sizes(count), outputs(count);
    for (int i = 0; i < count; ++i) {
      outputs[i] = take<int64_t>();
      sizes[i] = take<int64_t>();
      const int64_t offset = take<int64_t>();
      blocks[i] = static_cast<char*>(std::malloc(sizes[i]));
      if (outputs[i]) {
        std::memset(blocks[i], 0xff, sizes[i]);
      } else if (sizes[i] && std::fread(blocks[i], sizes[i], 1, stdin) != 1) {
        fail("the launch is incomplete");
      }
      addresses[i] = blocks[i] + offset;
    }
    if (static_cast<int>(machine.fibers.size()) < threads) machine.fibers.resize(threads);
    machine.handed.resize(machine.fibers.size());
    machine.kernel = call;
#ifdef __x86_64__
    machine.scheduler.running = true;
#endif
    machine.addresses = addresses.data();
    for (unsigned z = 0; z < machine.groups.z; ++z) {
      for (unsigned y = 0; y < machine.groups.y; ++y) {
        for (unsigned x = 0; x < machine.groups.x; ++x) {
          machine.group = {x, y, z};
          run_group(threads, backwards);
        }
      }
    }
    for (int i = 0; i < count; ++i) {
      if (outputs[i] && sizes[i]) std::fwrite(blocks[i], sizes[i], 1, stdout);
      std::free(blocks[i]);
    }
    std::fflush(stdout);
  }
}

}  // namespace harness
