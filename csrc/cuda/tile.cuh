// Tiles and shares: the distribution of a sample's entries over the threads of a block.
//
// A tile is kShare entries for each thread of a team: the threads of a block, or a half of them. A thread's share is
// kShare / W packs of W neighbouring entries; pack p of thread t begins at entry (p * threads + t) * W of the tile, so
// that neighbouring threads read neighbouring packs. A thread's entries depend on neither alignment nor type, and so
// sums do not either. A row that is not aligned to packs is read entry by entry, into the same shares.
//
// Sums: a thread adds up its share, a warp its lanes, both in the compute type; the sums of warps are added up in
// double, in order.
#pragma once

#include "cuda/simt.cuh"

namespace pydeq {

// The threads that share a tile: a block holds one or two such teams.
struct Team {
  int threads;
  int index;   // in the block
  int thread;  // in the team

  static PYDEQ_DEVICE Team whole_block() { return {block_threads(), 0, thread_index()}; }
  static PYDEQ_DEVICE Team of(int size) {
    const int index = thread_index() / size;
    return {size, index, thread_index() - index * size};
  }
};

template <int W>
struct Tile {
  int64_t first;  // entry of this thread
  int64_t state;  // entries of the row, D
  int threads;    // of the team
  int index;      // of the tile among those whose staged rows a thread holds

  // Tile t of a row; one beyond the end of the row has no entries.
  PYDEQ_DEVICE Tile(const Team& team, int64_t t, int64_t row_state, int staged_index)
      : first(t * team.threads * kShare + team.thread * W),
        state(row_state),
        threads(team.threads),
        index(staged_index) {}

  PYDEQ_DEVICE int64_t pack(int p) const { return first + static_cast<int64_t>(p * threads) * W; }
  // Entries of pack p that the row has.
  PYDEQ_DEVICE int entries(int p) const {
    const int64_t left = state - pack(p);
    return left >= W ? W : left > 0 ? static_cast<int>(left) : 0;
  }
};

template <int W, class T>
PYDEQ_DEVICE bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (W * sizeof(T)) == 0;
}

// A thread's share of a row as it is stored, entry by entry or two halves to a word: see Word. Several of them are
// loaded before the first is widened, so that all these loads are under way at once.
template <class T>
using Share = Word<T>[kShare / kPerWord<T>];

// This thread's share of a row; 0 beyond the end of the row.
template <int W, class T>
PYDEQ_DEVICE void load_share(const T* row, const Tile<W>& tile, Share<T>& out) {
  constexpr int kEach = kPerWord<T>, kWords = W / kEach;
  const bool aligned = is_aligned<W>(row);
  PYDEQ_UNROLL_LOOP for (int p = 0; p < kShare / W; ++p) {
    const T* from = row + tile.pack(p);
    const int entries = tile.entries(p);
    if (aligned && entries == W) {
      const Pack<T, W> pack = load_pack<W>(from);
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kWords; ++i) out[p * kWords + i] = pack.words[i];
    } else {
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kWords; ++i) {
        T of_word[kEach];
        PYDEQ_UNROLL_LOOP for (int e = 0; e < kEach; ++e) {
          of_word[e] = i * kEach + e < entries ? load_one(from + i * kEach + e) : T{};
        }
        out[p * kWords + i] = join(of_word);
      }
    }
  }
}

template <int W, class T>
PYDEQ_DEVICE void store_share(T* row, const Tile<W>& tile, const Share<T>& in) {
  constexpr int kWords = W / kPerWord<T>;
  const bool aligned = is_aligned<W>(row);
  PYDEQ_UNROLL_LOOP for (int p = 0; p < kShare / W; ++p) {
    T* to = row + tile.pack(p);
    const int entries = tile.entries(p);
    if (aligned && entries == W) {
      Pack<T, W> pack;
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kWords; ++i) pack.words[i] = in[p * kWords + i];
      store_pack<W>(to, pack);
    } else {
      PYDEQ_UNROLL_LOOP for (int i = 0; i < W; ++i) {
        if (i < entries) store_one(to + i, entry<T>(in[p * kWords + i / kPerWord<T>], i));
      }
    }
  }
}

template <class T>
PYDEQ_DEVICE void widen_share(const Share<T>& in, Compute<T> (&out)[kShare]) {
  PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare; ++i) out[i] = widen(entry<T>(in[i / kPerWord<T>], i));
}

template <class T>
PYDEQ_DEVICE void narrow_share(const Compute<T> (&in)[kShare], Share<T>& out) {
  constexpr int kEach = kPerWord<T>;
  PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare / kEach; ++i) out[i] = narrow_word<T>(in + i * kEach);
}

// For a single row: the next load waits until this one has arrived.
template <int W, class T>
PYDEQ_DEVICE void load_wide(const T* row, const Tile<W>& tile, Compute<T> (&out)[kShare]) {
  Share<T> stored;
  load_share(row, tile, stored);
  widen_share<T>(stored, out);
}

template <int W, class T>
PYDEQ_DEVICE void store_wide(T* row, const Tile<W>& tile, const Compute<T> (&in)[kShare]) {
  Share<T> stored;
  narrow_share<T>(in, stored);
  store_share(row, tile, stored);
}

template <int W, class T>
PYDEQ_DEVICE void copy_share(T* to, const T* from, const Tile<W>& tile) {
  Share<T> stored;
  load_share(from, tile, stored);
  store_share(to, tile, stored);
}

template <class Sum, class A>
PYDEQ_DEVICE Sum dot_share(const A (&x)[kShare], const A (&y)[kShare]) {
  Sum total = 0;
  PYDEQ_UNROLL_LOOP for (int i = 0; i < kShare; ++i) total += static_cast<Sum>(x[i]) * static_cast<Sum>(y[i]);
  return total;
}

// Shares of rows that a block keeps in shared memory: rows [0, capacity) of every tile that a team visits. A thread
// reads only its own writes, so no barrier is needed.
template <int W, class T>
struct Stage {
  static constexpr int kWidth = 16 / static_cast<int>(sizeof(T));  // entries of a place
  static constexpr int kPacks = kShare / kWidth;
  static constexpr int kWords = kWidth / kPerWord<T>;
  using Place = Pack<T, kWidth>;

  Place* memory;
  int tiles, capacity;

  static PYDEQ_HOST_DEVICE int64_t row_bytes(int64_t tiles, int64_t threads) {
    return tiles * threads * kShare * static_cast<int64_t>(sizeof(T));
  }
  PYDEQ_DEVICE Place& place(int64_t row, int tile, int p) const {
    return memory[((row * tiles + tile) * kPacks + p) * block_threads() + thread_index()];
  }
  PYDEQ_DEVICE bool holds(int64_t row) const { return row < capacity; }
  PYDEQ_DEVICE void put(int64_t row, const Tile<W>& tile, const Share<T>& in) const {
    if (!holds(row)) return;
    PYDEQ_UNROLL_LOOP for (int p = 0; p < kPacks; ++p) {
      Place pack;
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kWords; ++i) pack.words[i] = in[p * kWords + i];
      place(row, tile.index, p) = pack;
    }
  }
  PYDEQ_DEVICE void get(int64_t row, const Tile<W>& tile, Share<T>& out) const {
    PYDEQ_UNROLL_LOOP for (int p = 0; p < kPacks; ++p) {
      const Place pack = place(row, tile.index, p);
      PYDEQ_UNROLL_LOOP for (int i = 0; i < kWords; ++i) out[p * kWords + i] = pack.words[i];
    }
  }
};

// Sums over a block, in double: totals[j] of everything that threads add under j. The same bits on every run.
struct Sums {
  double* by_warp;  // [warps, width] shared
  int width;

  // Begins: nothing is added yet.
  PYDEQ_DEVICE void clear() const {
    PYDEQ_ROLL_LOOP for (int j = lane_index(); j < width; j += kWarp) by_warp[warp_index() * width + j] = 0.0;
    warp_sync();
  }
  // Adds values[i] under first + i, for i < count.
  template <int N, class Sum>
  PYDEQ_DEVICE void add(int first, Sum (&values)[N], int count = N) const {
    warp_sum(values);
    if (lane_index() == 0) {
      PYDEQ_UNROLL_LOOP for (int i = 0; i < N; ++i) {
        if (i < count) by_warp[warp_index() * width + first + i] += static_cast<double>(values[i]);
      }
    }
  }
  // Ends: all threads may read the totals, and begin again.
  PYDEQ_DEVICE void finish(double* totals) const { finish(Team::whole_block(), totals, 1, width); }
  // Ends for each team separately: totals[j * stride], the team's own, gets what its threads added under j < count.
  PYDEQ_DEVICE void finish(const Team& team, double* totals, int stride, int count) const {
    block_sync();
    const int warps = team.threads / kWarp;
    const double* of_team = by_warp + team.index * warps * width;
    PYDEQ_ROLL_LOOP for (int j = team.thread; j < count; j += team.threads) {
      double total = 0.0;
      for (int w = 0; w < warps; ++w) total += of_team[w * width + j];
      totals[j * stride] = total;
    }
    block_sync();
  }
};

}  // namespace pydeq
