// Who computes what, and where: jobs over threads, scratch memory, sequences.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"
#include "vec.h"

namespace la2::cpu {
namespace {

// Deals out one worker's scratch. Built over nothing, it only counts bytes.
class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + bytes_) : nullptr;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
    return p;
  }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kAlign = 64;  // a cache line, and a vector
  char* base_;
  int64_t bytes_ = 0;
};

// malloc'ed memory that starts at a cache line.
class Block {
 public:
  explicit Block(int64_t bytes)
      : raw_(__builtin_malloc(static_cast<size_t>(bytes) + 63)),
        data_(reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(raw_) + 63) & ~uintptr_t{63})) {}
  ~Block() { __builtin_free(raw_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  bool is_valid() const { return raw_ != nullptr; }
  char* data() const { return data_; }

 private:
  void* raw_;
  char* data_;
};

// Runs body(job, scratch) for every job. Workers draw jobs from one counter, so sequences of very different
// lengths still fill all threads; what a job computes does not depend on who draws it. `work` is the number
// of multiply-adds in all jobs together. False: no memory for the scratch, and nothing was done.
template <class Body>
bool run_jobs(const Parallel& parallel, int64_t jobs, double work, int64_t scratch_bytes, const Body& body) {
  constexpr double kWorkPerThread = 5e5;  // 10 us or so: a few times what waking a thread costs
  const double useful = 1 + work / kWorkPerThread;
  int64_t workers = min_of<int64_t>(jobs, max_of(parallel.num_threads, 1));
  if (useful < static_cast<double>(workers)) workers = static_cast<int64_t>(useful);

  const Block scratch(max_of<int64_t>(workers, 1) * scratch_bytes);
  if (!scratch.is_valid()) return false;

  struct Crew {
    const Body& body;
    char* scratch;
    int64_t scratch_bytes, jobs, next_job;
  } crew{body, scratch.data(), scratch_bytes, jobs, 0};
  auto work_through = [](void* context, int64_t begin, int64_t end) {
    Crew& crew = *static_cast<Crew*>(context);
    for (int64_t worker = begin; worker < end; ++worker) {
      char* own = crew.scratch + worker * crew.scratch_bytes;
      for (;;) {
        const int64_t job = __atomic_fetch_add(&crew.next_job, 1, __ATOMIC_RELAXED);
        if (job >= crew.jobs) break;
        crew.body(job, own);
      }
    }
  };
  if (workers > 1) {
    parallel.run(workers, work_through, &crew);
  } else {
    work_through(&crew, 0, 1);
  }
  return true;
}

// Multiply-adds, roughly, of one sweep over all tokens, and of getting every state in and out.
inline double sweep_work(const Sizes& s) {
  const double tokens = static_cast<double>(s.batch) * static_cast<double>(s.length);
  const double state = static_cast<double>(s.dim_k) * static_cast<double>(s.dim_v);
  return static_cast<double>(s.heads) * state * (3 * tokens + static_cast<double>(s.num_seqs));
}

// With fewer tasks than threads, each task is cut into slices of the columns it writes, whole panels each. The
// bits of a column do not depend on the cut.
struct Slices {
  int64_t tasks;
  int panels, count;

  Slices(int64_t tasks, int panels, int threads) : tasks(tasks), panels(panels), count(1) {
    if (tasks > 0 && tasks < threads) count = static_cast<int>(min_of<int64_t>(panels, (threads + tasks - 1) / tasks));
  }
  int64_t jobs() const { return tasks * count; }
  int begin(int64_t slice, int of_panels) const { return static_cast<int>(of_panels * slice / count); }
  int end(int64_t slice, int of_panels) const { return begin(slice + 1, of_panels); }
};

// Asks for huge pages behind an output. A large one is fresh memory from the system, mapped when it is first
// written: in 4 KiB pages that costs a third of a whole forward pass, in 2 MiB pages a tenth.
template <class E>
void expect_writes(const MutableRows& x, const Sizes& s, int dim) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const int64_t count = (s.batch - 1) * x.stride_b + (s.heads - 1) * x.stride_h + (s.length - 1) * x.stride_n + dim;
  const uintptr_t data = reinterpret_cast<uintptr_t>(x.data);
  const uintptr_t begin = (data + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (data + static_cast<uintptr_t>(max_of<int64_t>(count, 0)) * sizeof(E)) & ~(kHugePage - 1);
  // Only a hint: a system without huge pages refuses, and nothing is lost.
  if (begin + kHugePage < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)x, (void)s, (void)dim;
#endif
}

// The rows of one sequence and head.
template <class E>
struct SeqRows {
  E* data;
  int64_t stride;

  LA2_INLINE E* row(int64_t i) const { return data + i * stride; }
  LA2_INLINE SeqRows from(int64_t i) const { return {row(i), stride}; }
  SeqRows columns(int first) const { return {data + first, stride}; }
};

// A state of one sequence and head, [rows, cols].
template <class T>
struct StateView {
  T* data;  // nullptr: absent
  int64_t stride_row, stride_col;

  LA2_INLINE T* at(int64_t row, int64_t col) const { return data + row * stride_row + col * stride_col; }
  StateView columns(int first) const { return {data ? data + first * stride_col : nullptr, stride_row, stride_col}; }
  StateView transposed() const { return {data, stride_col, stride_row}; }
};

inline int64_t integer_at(const void* data, bool is_int64, int64_t i) {
  return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
}

template <class T>
double slope_at(const Slopes& s, int64_t seq, int64_t head) {
  return s.data ? static_cast<double>(static_cast<const T*>(s.data)[seq * s.stride_s + head * s.stride_h]) : 0;
}

// One sequence and head: where it lies in every tensor.
struct Span {
  int64_t seq, head;
  int64_t batch, first, length;  // its rows in a [B, H, N, dim] tensor

  Span(const Sizes& sizes, const SeqOffsets& cu, int64_t seq, int64_t head) : seq(seq), head(head) {
    batch = cu.data ? 0 : seq;
    first = cu.data ? integer_at(cu.data, cu.is_int64, seq) : 0;
    length = cu.data ? integer_at(cu.data, cu.is_int64, seq + 1) - first : sizes.length;
  }

  template <class E>
  SeqRows<const E> rows(const Rows& x) const {
    return {static_cast<const E*>(x.data) + offset(x), x.stride_n};
  }
  template <class E>
  SeqRows<E> rows(const MutableRows& x) const {
    return {static_cast<E*>(x.data) + offset(x), x.stride_n};
  }
  template <class T>
  StateView<const T> state(const State& s) const {
    return {s.data ? static_cast<const T*>(s.data) + offset(s) : nullptr, s.stride_d, s.stride_e};
  }
  template <class T>
  StateView<T> state(const MutableState& s) const {
    return {s.data ? static_cast<T*>(s.data) + offset(s) : nullptr, s.stride_d, s.stride_e};
  }
  template <class T>
  double slope(const Slopes& s) const {
    return slope_at<T>(s, seq, head);
  }

 private:
  int64_t offset(const Rows& x) const { return batch * x.stride_b + head * x.stride_h + first * x.stride_n; }
  int64_t offset(const MutableRows& x) const { return batch * x.stride_b + head * x.stride_h + first * x.stride_n; }
  int64_t offset(const State& s) const { return seq * s.stride_s + head * s.stride_h; }
  int64_t offset(const MutableState& s) const { return seq * s.stride_s + head * s.stride_h; }
};

}  // namespace
}  // namespace la2::cpu
