// A fuzzer in one header, for compilers without libFuzzer: inputs that reach new code are kept and mutated further.
// The code under test is compiled with -fsanitize=address,undefined -fsanitize-coverage=trace-pc, the target itself
// without the latter. With clang: -fsanitize=fuzzer and -DLA2_LIBFUZZER, the entry point is libFuzzer's.
//
//     <target> <seconds> <seed>     prints "executions N, edges N, inputs N"
//     <target> --input <hex>        runs one input, as a failure printed it
#pragma once

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace la2::fuzz {

// Numbers out of an input; zeros behind its end.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}

  uint8_t byte() { return data_ < end_ ? *data_++ : 0; }
  bool flag() { return byte() & 1; }
  int64_t below(int64_t n) { return n <= 256 ? byte() % n : (byte() | byte() << 8) % n; }
  int64_t any() {
    uint64_t x = 0;
    for (int i = 0; i < 8; ++i) x = x << 8 | byte();
    return static_cast<int64_t>(x);
  }
  // Small, near a power of two, or anything at all.
  int64_t size() {
    const int kind = byte() % 8;
    if (kind < 4) return below(300);
    if (kind < 7) return (int64_t{1} << below(62)) + below(5) - 2;
    return any();
  }
  bool is_empty() const { return data_ == end_; }

 private:
  const uint8_t *data_, *end_;
};

inline std::vector<uint8_t>& current_input() {
  static std::vector<uint8_t> input;
  return input;
}

inline void print_input() {
  std::fprintf(stderr, "\nfailing input: ");
  for (const uint8_t b : current_input()) std::fprintf(stderr, "%02x", b);
  std::fprintf(stderr, "\n");
}

inline void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %s\n", what);
  std::abort();
}

}  // namespace la2::fuzz

#ifndef LA2_LIBFUZZER

namespace la2::fuzz {

constexpr size_t kEdges = 1 << 16;
inline uint8_t edges[kEdges];  // places reached by this input

inline std::vector<uint8_t> mutated(const std::vector<std::vector<uint8_t>>& corpus, std::mt19937_64& random,
                                    size_t max_size) {
  std::vector<uint8_t> input = corpus[random() % corpus.size()];
  for (uint64_t i = 1 + random() % 8; i-- > 0;) {
    const size_t at = input.empty() ? 0 : random() % input.size();
    switch (random() % 6) {
      case 0:
      case 1:
        if (!input.empty()) input[at] = static_cast<uint8_t>(random());
        break;
      case 2:
        if (!input.empty()) input[at] = static_cast<uint8_t>(input[at] ^ 1 << random() % 8);
        break;
      case 3:
        for (uint64_t n = 1 + random() % 16; n-- > 0;)
          input.insert(input.begin() + static_cast<int64_t>(at), static_cast<uint8_t>(random()));
        break;
      case 4:
        if (!input.empty()) input.erase(input.begin() + static_cast<int64_t>(at));
        break;
      default: {  // the rest of another one
        const std::vector<uint8_t>& other = corpus[random() % corpus.size()];
        input.resize(at);
        if (other.size() > at) input.insert(input.end(), other.begin() + static_cast<int64_t>(at), other.end());
      }
    }
  }
  if (input.size() > max_size) input.resize(max_size);
  return input;
}

inline int run(int argc, char** argv, size_t max_size) {
  if (argc == 3 && std::strcmp(argv[1], "--input") == 0) {
    std::vector<uint8_t>& input = current_input();
    for (const char* hex = argv[2]; hex[0] && hex[1]; hex += 2)
      input.push_back(static_cast<uint8_t>(std::strtol(std::string(hex, 2).c_str(), nullptr, 16)));
    return LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
  std::mt19937_64 random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
  std::vector<std::vector<uint8_t>> corpus(1);
  std::vector<uint8_t> seen(kEdges, 0);
  int64_t executions = 0, reached = 0;
  const auto begin = std::chrono::steady_clock::now();
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() < seconds) {
    std::vector<uint8_t>& input = current_input();
    if (random() % 8 == 0) {  // from nothing
      input.resize(1 + random() % max_size);
      for (uint8_t& b : input) b = static_cast<uint8_t>(random());
    } else {
      input = mutated(corpus, random, max_size);
    }
    std::memset(edges, 0, sizeof edges);
    LLVMFuzzerTestOneInput(input.data(), input.size());
    ++executions;
    bool is_new = false;
    for (size_t i = 0; i < kEdges; ++i)
      if (edges[i] && !seen[i]) seen[i] = 1, ++reached, is_new = true;
    if (is_new) corpus.push_back(input);
  }
  std::printf("executions %lld, edges %lld, inputs %zu\n", static_cast<long long>(executions),
              static_cast<long long>(reached), corpus.size());
  return 0;
}

}  // namespace la2::fuzz

// Every sanitizer ends in SIGABRT, whose handler prints the input.
extern "C" __attribute__((used)) inline const char* __asan_default_options() { return "abort_on_error=1"; }
extern "C" __attribute__((used)) inline const char* __ubsan_default_options() {
  return "abort_on_error=1:print_stacktrace=1";
}

// Called at every edge of the code under test.
extern "C" void __sanitizer_cov_trace_pc() {
  uint64_t at = reinterpret_cast<uint64_t>(__builtin_return_address(0));
  at ^= at >> 17;
  la2::fuzz::edges[at % la2::fuzz::kEdges] = 1;
}

#define LA2_FUZZ_MAIN(max_size)                                  \
  int main(int argc, char** argv) {                              \
    std::signal(SIGABRT, [](int) { la2::fuzz::print_input(); }); \
    return la2::fuzz::run(argc, argv, max_size);                 \
  }

#else
#define LA2_FUZZ_MAIN(max_size)
#endif
