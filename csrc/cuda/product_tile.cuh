// A block's tile of a matrix product, fp32 [M, N] in its threads' registers: steps of K along the sum, whose factors come through a ring of
// kStages places in shared memory. Where the numbers come from is the loaders' business (rows of a matrix in any order, 0 outside, or
// numbers that are made on the way), what becomes of the tile is the caller's. 16-bit factors are multiplied by tensor cores, fp32 ones
// by plain arithmetic in full precision.
#pragma once
#include <type_traits>

#include "device.h"
#include "mma.h"

namespace isdaa {

constexpr int kProductThreads = 256, kStages = 3;

// Whether neighbours in a row of shared memory lie along the sum: rows are then those of the tile (or its columns), else steps of the sum.
enum class Order { kAlongSum, kAcrossSum };

// One step of a factor in shared memory, in packs of 16 bytes. Packs change places within a row, such that the eight that are read at once
// lie in different banks: one of each of eight neighbouring rows of 16-bit numbers, one of every fourth of 32 rows of fp32 numbers.
template <class T_, int kRows_, int kColumns_>
struct SharedTile {
  using T = T_;
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kPack = 16 / sizeof(T), kPacks = kColumns / kPack, kSize = kRows * kColumns;
  static constexpr int kPeriod = sizeof(T) == 4 ? 32 : 8;  // rows after which packs change places as before
  static_assert(kPacks == 4 || kPacks % 8 == 0);

  static __device__ __forceinline__ int place(int row, int pack) {
    const int turn = sizeof(T) == 4 ? row >> 2 : kPacks == 4 ? row >> 1 : row;
    return row * kColumns + (pack ^ (turn & (kPacks == 4 ? 3 : 7))) * kPack;
  }
  static __device__ __forceinline__ int place_of(int row, int column) { return place(row, column / kPack) + column % kPack; }
};

template <class T, int kAcross, int kAlong, Order kOrder>
using FactorTile = SharedTile<T, kOrder == Order::kAlongSum ? kAcross : kAlong, kOrder == Order::kAlongSum ? kAlong : kAcross>;

// The sums of a tile. A thread holds those of kRows rows and kColumns columns, columns in neighbouring pairs: at(i, j) is that of row(i)
// and column(j), which are known after settle(), for they would sit in registers all through the product. Tensor cores: warps side by
// side, 32 columns each.
template <class T, int kM, int kN, int kK, Order kOrderA, Order kOrderB>
struct Product {
  using A = FactorTile<T, kM, kK, kOrderA>;
  using B = FactorTile<T, kN, kK, kOrderB>;
  static constexpr int M = kM, N = kN, K = kK, kWarpsN = N / 32, kWarpsM = kProductThreads / kWarp / kWarpsN;
  static constexpr int kHeight = M / kWarpsM, kRows = kHeight / 8, kColumns = 8;
  static_assert(kHeight % 16 == 0 && K % 16 == 0);

  float sums[kRows / 2][kColumns / 2][4];
  int first_row, first_column;  // since settle()

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) at(i, j) = 0.0f;
  }

  __device__ __forceinline__ float& at(int i, int j) { return sums[i / 2][j / 2][i % 2 * 2 + j % 2]; }
  __device__ __forceinline__ int row(int i) const { return first_row + i * 8; }
  __device__ __forceinline__ int column(int j) const { return first_column + j / 2 * 8 + j % 2; }
  __device__ __forceinline__ void settle() {
    const int thread = computed_anew(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
    first_row = warp / kWarpsN * kHeight + lane / 4;
    first_column = warp % kWarpsN * 32 + lane % 4 * 2;
  }

  // The place of what lies (across, along) the sum from what is at `place`: multiples of 16, within a stretch that begins at a multiple of
  // its length, and of kPeriod rows.
  template <class Tile, Order kOrder>
  static __device__ __forceinline__ int beyond(int place, int across, int along) {
    return kOrder == Order::kAlongSum ? (place ^ along) + across * Tile::kColumns : (place ^ across) + along * Tile::kColumns;
  }

  __device__ __forceinline__ void add(const T* a, const T* b) {
    constexpr bool kTransposeA = kOrderA == Order::kAcrossSum, kTransposeB = kOrderB == Order::kAcrossSum;
    const int lane = lane_index(), within = lane % 8, left = lane / 8 % 2, upper = lane / 16;
    const int first_m = warp_index() / kWarpsN * kHeight, first_n = warp_index() % kWarpsN * 32;
    const int place_a = kTransposeA ? A::place(upper * 8 + within, first_m / 8 + left) : A::place(first_m + left * 8 + within, upper);
    const int place_b = kTransposeB ? B::place(left * 8 + within, first_n / 8 + upper) : B::place(first_n + upper * 8 + within, left);
#pragma unroll 2  // no more: loads of factors would be moved ahead until registers run out
    for (int k = 0; k < K; k += 16) {
      uint32_t b_registers[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) load_matrices<kTransposeB>(b_registers[n], b + beyond<B, kOrderB>(place_b, n * 16, k));
#pragma unroll
      for (int m = 0; m < kHeight / 16; ++m) {
        uint32_t a_registers[4];
        load_matrices<kTransposeA>(a_registers, a + beyond<A, kOrderA>(place_a, m * 16, k));
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const uint32_t pair[2] = {b_registers[n / 2][n % 2 * 2], b_registers[n / 2][n % 2 * 2 + 1]};
          multiply_add<T>(sums[m][n], a_registers, pair);
        }
      }
    }
  }
};

// fp32: 16 x 16 threads, each with groups of 4 rows and 4 columns that lie 64 apart.
template <int kM, int kN, int kK, Order kOrderA, Order kOrderB>
struct Product<float, kM, kN, kK, kOrderA, kOrderB> {
  using A = FactorTile<float, kM, kK, kOrderA>;
  using B = FactorTile<float, kN, kK, kOrderB>;
  static constexpr int M = kM, N = kN, K = kK, kRows = M / 16, kColumns = N / 16;
  static_assert(M % 64 == 0 && N % 64 == 0 && K % 4 == 0 && kProductThreads == 256);

  float sums[kRows][kColumns];
  int first_row, first_column;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sums[i][j] = 0.0f;
  }

  static __device__ __forceinline__ int spread(int first, int i) { return first + i % 4 + i / 4 * 64; }
  __device__ __forceinline__ float& at(int i, int j) { return sums[i][j]; }
  __device__ __forceinline__ int row(int i) const { return spread(first_row, i); }
  __device__ __forceinline__ int column(int j) const { return spread(first_column, j); }
  __device__ __forceinline__ void settle() {
    const int thread = computed_anew(threadIdx.x);
    first_row = thread / 16 * 4;
    first_column = thread % 16 * 4;
  }

  __device__ __forceinline__ void add(const float* a, const float* b) {
#pragma unroll 2
    for (int k = 0; k < K; k += 4) {
      float of_a[kRows][4], of_b[kColumns][4];
      load_four<A, kOrderA>(of_a, a, threadIdx.x / 16 * 4, k);
      load_four<B, kOrderB>(of_b, b, threadIdx.x % 16 * 4, k);
#pragma unroll
      for (int step = 0; step < 4; ++step)
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int j = 0; j < kColumns; ++j) sums[i][j] += of_a[i][step] * of_b[j][step];
    }
  }

  // Steps k .. k + 3 of the rows spread(first, 0), spread(first, 1), ...
  template <class Tile, Order kOrder, int kCount>
  static __device__ __forceinline__ void load_four(float (&out)[kCount][4], const float* tile, int first, int k) {
    if constexpr (kOrder == Order::kAlongSum) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) load_wide<4>(tile + Tile::place(spread(first, i), k / 4), out[i]);
    } else {
#pragma unroll
      for (int step = 0; step < 4; ++step)
#pragma unroll
        for (int i = 0; i < kCount; i += 4) {
          float four[4];
          load_wide<4>(tile + Tile::place(k + step, spread(first, i) / 4), four);
#pragma unroll
          for (int e = 0; e < 4; ++e) out[i + e][step] = four[e];
        }
    }
  }
};

// When a loader asks its source for the rows of a step: once for all steps, a step before they are needed, for they are read from memory,
// or when they are needed.
enum class Ask { kOnce, kAhead, kNow };

// A matrix with rows of T at multiples of `stride`, neighbours `stride_inner` apart, and `columns` of them. A row, and the distance of two,
// has less than 2^31 bytes: one instruction then makes the 64 bits of an address.
template <class T>
struct Matrix {
  const T* data;
  int stride, stride_inner, columns;
  bool wide;  // copies of 16 bytes can be made from it, at columns that are multiples of 16 bytes

  __device__ __forceinline__ Matrix(const void* data, int64_t stride, int64_t stride_inner, int64_t columns)
      : data(static_cast<const T*>(data)), stride((int)stride), stride_inner((int)stride_inner), columns((int)columns),
        wide(stride_inner == 1 && stride * (int64_t)sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0) {}
};

// Steps of a factor from rows of a matrix. `Source` says which: row(step, r), that of the matrix which stands in row r of the tile, or -1
// for zeros, and column(step), the first of its columns. Every row of a step is asked for after begin(step).
template <class Tile_, class Source>
struct RowLoader {
  using Tile = Tile_;
  using T = typename Tile::T;
  static constexpr int kTiles = 1, kAtOnce = kProductThreads / Tile::kPacks, kTurns = Tile::kRows / kAtOnce;
  static_assert(Tile::kRows % kAtOnce == 0);

  Matrix<T> matrix;
  Source source;
  int rows[kTurns];

  __device__ __forceinline__ RowLoader(const Matrix<T>& matrix, const Source& source) : matrix(matrix), source(source) {}

  __device__ __forceinline__ void ask(int step) {
    source.begin(step);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) rows[turn] = source.row(step, row_of(turn));
  }

  __device__ __forceinline__ void start() {
    if (Source::kAsk != Ask::kNow) ask(0);
  }

  __device__ __forceinline__ void fetch(int step, T* tile) {
    if (Source::kAsk == Ask::kNow) ask(step);
    const int column = source.column(step) + (int)threadIdx.x % Tile::kPacks * Tile::kPack, there = matrix.columns - column;
    if (matrix.wide && (there >= Tile::kPack || there <= 0)) copy_packs(column, there <= 0, tile);
    else copy_numbers(column, there, tile);
    if (Source::kAsk == Ask::kAhead) ask(step + 1);
  }

  __device__ __forceinline__ void place(T*) {}

  static __device__ __forceinline__ int row_of(int turn) { return threadIdx.x / Tile::kPacks + turn * kAtOnce; }
  static __device__ __forceinline__ int place_of(int turn) {
    const int pack = threadIdx.x % Tile::kPacks;
    return kAtOnce % Tile::kPeriod ? Tile::place(row_of(turn), pack) : Tile::place(row_of(0), pack) + turn * kAtOnce * Tile::kColumns;
  }

  __device__ __forceinline__ void copy_packs(int column, bool outside, T* tile) {
    const T* const from = matrix.data + column;
    const int stride = computed_anew(matrix.stride * (int)sizeof(T));  // else every row's address sits in registers
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn)
      copy_async(tile + place_of(turn), row_address(from, rows[turn], stride), outside || rows[turn] < 0);
  }

  // Rows that lie anyhow, or end within a pack.
  __device__ __forceinline__ void copy_numbers(int column, int there, T* tile) {
    const T* const from = matrix.data + (int64_t)column * matrix.stride_inner;
    const int stride = computed_anew(matrix.stride * (int)sizeof(T)), stride_inner = computed_anew(matrix.stride_inner * (int)sizeof(T));
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const T* const row = row_address(from, rows[turn], stride);
      T* const to = tile + place_of(turn);
#pragma unroll 1
      for (int e = 0; e < Tile::kPack; ++e) to[e] = rows[turn] >= 0 && e < there ? *row_address(row, e, stride_inner) : narrow<T>(0.0f);
    }
  }
};

struct NothingBetween {
  __device__ __forceinline__ void operator()(int) const {}
};

// sum += the product of `steps` steps. A loader begins a step with fetch(step, tile) and ends it with place(tile), after the numbers that
// it fetched have had the time of a product to come. A factor of two tiles is the sum of two, the smaller one second: small times small
// is left out. `between` is called after each step, with all threads between the same two barriers. The shared memory is free afterwards.
template <class Product, class LoaderA, class LoaderB, class Between = NothingBetween>
__device__ __forceinline__ void product_tile(
    Product& product, LoaderA& a, LoaderB& b, int steps, unsigned char* shared, Between&& between = Between()) {
  using T = typename LoaderA::T;
  constexpr int kSizeA = Product::A::kSize, kSizeB = Product::B::kSize;
  constexpr int kStage = LoaderA::kTiles * kSizeA + LoaderB::kTiles * kSizeB;
  static_assert(std::is_same_v<typename LoaderA::Tile, typename Product::A> && std::is_same_v<typename LoaderB::Tile, typename Product::B>);
  static_assert(LoaderA::kTiles >= LoaderB::kTiles);
  T* const stages = reinterpret_cast<T*>(shared);
  if (steps > 0) a.start(), b.start();
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) {
    T* const tiles = stages + step * kStage;
    if (step < steps) {
      a.fetch(step, tiles), b.fetch(step, tiles + LoaderA::kTiles * kSizeA);
      a.place(tiles), b.place(tiles + LoaderA::kTiles * kSizeA);
    }
    commit_copies();
  }
  int stage = 0;
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    const int next = step + kStages - 1;
    T* const free = stages + (stage == 0 ? kStages - 1 : stage - 1) * kStage;
    if (next < steps) a.fetch(next, free), b.fetch(next, free + LoaderA::kTiles * kSizeA);
    commit_copies();
    const T *of_a = stages + stage * kStage, *of_b = of_a + LoaderA::kTiles * kSizeA;
    if constexpr (LoaderB::kTiles == 2) product.add(of_a, of_b + kSizeB);
    if constexpr (LoaderA::kTiles == 2) product.add(of_a + kSizeA, of_b);
    product.add(of_a, of_b);
    between(step);
    if (next < steps) a.place(free), b.place(free + LoaderA::kTiles * kSizeA);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  product.settle();
  __syncthreads();
}

template <class Product>
constexpr size_t shared_bytes(int tiles_a = 1, int tiles_b = 1) {
  return kStages * sizeof(typename Product::A::T) * (size_t)(tiles_a * Product::A::kSize + tiles_b * Product::B::kSize);
}

}  // namespace isdaa
