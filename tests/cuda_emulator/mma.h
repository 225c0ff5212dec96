// csrc/cuda/mma.h on the CPU. A copy's target is NaN from the moment that the copy begins until its thread waits for it, so that a missing
// wait shows, and a place that is filled while somebody still reads it.
#pragma once

namespace isdaa {
namespace emulator {

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  bool zeros;
};

struct Copies {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

// Of each thread of the block that runs; they end with it.
inline std::vector<Copies>& all_copies() {
  static std::vector<Copies> all;
  return all;
}

inline Copies& copies() {
  struct End {
    ~End() { all_copies().clear(); }
  };
  if (all_copies().empty()) {
    all_copies().resize(block().size.x);
    defer([end = std::make_shared<End>()] {});
  }
  return all_copies()[linear_thread()];
}

inline void expect_sixteen(const void* address, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % 16) throw std::runtime_error(std::string(what) + ": an address is no multiple of 16");
}

}  // namespace emulator

inline int computed_anew(int x) { return x; }

template <class T>
inline T* row_address(T* from, int row, int stride) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(from) + (int64_t)row * stride);
}

inline void copy_async(void* shared, const void* global, bool zeros) {
  emulator::expect_sixteen(shared, "copy_async");
  emulator::expect_sixteen(global, "copy_async");
  std::memset(shared, 0xff, 16);
  emulator::copies().open.push_back({(unsigned char*)shared, (const unsigned char*)global, zeros});
}

inline void commit_copies() {
  auto& copies = emulator::copies();
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}

template <int kNewest>
inline void wait_copies() {
  auto& groups = emulator::copies().groups;
  for (; groups.size() > kNewest; groups.pop_front())
    for (const auto& copy : groups.front()) {
      if (copy.zeros) std::memset(copy.to, 0, 16);
      else std::memcpy(copy.to, copy.from, 16);
    }
}

template <bool kTransposed>
inline void load_matrices(uint32_t (&out)[4], const void* row) {
  emulator::expect_sixteen(row, "load_matrices");
  const emulator::Shown rows = emulator::show(static_cast<const uint16_t*>(row));
  const int lane = threadIdx.x % 32, outer = lane / 4, inner = 2 * (lane % 4);
  for (int j = 0; j < 4; ++j) {
    const auto at = [&](int i) {
      const auto* row = rows.of<const uint16_t*>(8 * j + (kTransposed ? inner + i : outer));
      return (uint32_t)row[kTransposed ? outer : inner + i];
    };
    out[j] = at(1) << 16 | at(0);
  }
  __syncwarp();  // nobody writes to the rows before all have read them
}

namespace emulator {

struct Fragments {
  float a[8], b[4];  // the two numbers of each register, one after the other
};

template <class T>
inline float half_word(const uint32_t* words, int i) {
  return widen(T{(uint16_t)(words[i / 2] >> (i % 2 * 16))});
}

}  // namespace emulator

template <class T>
inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::Fragments own;
  for (int i = 0; i < 8; ++i) own.a[i] = emulator::half_word<T>(a, i);
  for (int i = 0; i < 4; ++i) own.b[i] = emulator::half_word<T>(b, i);
  const emulator::Shown all = emulator::show(own);
  const int lane = threadIdx.x % 32, row = lane / 4, column = 2 * (lane % 4);
  for (int quad = 0; quad < 4; ++quad) {  // columns 2 quad, 2 quad + 1, 2 quad + 8, 2 quad + 9 of a
    const auto of_row = all.of<emulator::Fragments>(row * 4 + quad);
    for (int j = 0; j < 4; ++j) {
      const auto of_column = all.of<emulator::Fragments>((column + j % 2) * 4 + quad);
      for (int k = 0; k < 4; ++k) sum[j] += of_row.a[k / 2 * 4 + j / 2 * 2 + k % 2] * of_column.b[k];
    }
  }
}

}  // namespace isdaa
