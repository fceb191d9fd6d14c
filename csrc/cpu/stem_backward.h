// The whole stem, backward. A wave of tokens goes through two phases: first, group by group, what each token's gradients
// are; then, a strip of rows of the weights' gradients at a time, their sums over the wave's tokens. Every sum runs over
// tokens in their order, in chunks and parts of fixed sizes: the same bits on any number of threads.

#pragma once

#include <vector>

#include "stem_adjoint.h"

namespace aape {
inline namespace AAPE_NAMESPACE {

constexpr int64_t kChunk = 288;  // tokens: whole groups for every instruction set and type

// A matrix of gradients, [rows][columns] = Σ_tokens left[token][row] · right[token][column], and Σ_tokens left.
template <class T>
struct Gradient {
  View left;  // of any type, its rows next to each other
  int64_t rows;
  struct Part {
    T* out = nullptr;
    const Panels<T>* right = nullptr;
  } part[2];
  T* bias;
  int64_t strips() const {
    return part[0].out || part[1].out || bias ? (rows + Block<T>::kStrip - 1) / Block<T>::kStrip : 0;
  }
  int64_t panels() const {
    int64_t count = 0;
    for (const Part& p : part) count += p.out ? (p.right->columns + Block<T>::kPanel - 1) / Block<T>::kPanel : 0;
    return count;
  }
};

// to[k] = Σ_tokens from[token][k]: every fourth token's for themselves, as additions in a row wait for each other.
template <int kRows, class T>
inline void sum_tokens(T* to, const T* from, int64_t tokens) {
  constexpr int apart = 4;
  T sums[apart * kRows] = {};
  const T* const end = from + tokens * kRows;
  for (; end - from >= apart * kRows; from += apart * kRows)
    for (int k = 0; k < apart * kRows; ++k) sums[k] += from[k];
  for (int n = 0; from < end; ++n, from += kRows)
    for (int k = 0; k < kRows; ++k) sums[n * kRows + k] += from[k];
  for (int k = 0; k < kRows; ++k) to[k] = (sums[k] + sums[kRows + k]) + (sums[2 * kRows + k] + sums[3 * kRows + k]);
}

// Strips that are packed together, as their rows are neighbours in memory: those of four are whole lines of the cache.
constexpr int kStrips = 4;

// Up to kStrips strips of its rows, of one chunk of tokens; kAdd from the second chunk on. What the next strips are packed
// from is asked for meanwhile: it is a page of memory a token, and no processor looks ahead from one to the next.
template <class T, bool kAdd>
inline void sum_strips(const Gradient<T>& g, int64_t strip, int64_t strips, int64_t from, int64_t tokens, T* packed) {
  constexpr int64_t rows = Block<T>::kStrip, panel = Block<T>::kPanel;
  const int64_t first = strip * rows, count = smaller(strips * rows, g.rows - first);
  const int64_t size = size_of(g.left.type), line = g.rows * size;
  const char* left = g.left.data + (from * g.rows + first) * size;
  T converted[kStrips * rows];
  for (int64_t m = 0; m < tokens; ++m) {
    const T* row = reinterpret_cast<const T*>(left + m * line);
    if (g.left.type != kTypeOf<T>) {
      load_row(converted, left + m * line, g.left.type, 1, count);
      row = converted;
    }
    for (int64_t n = 0; n < strips; ++n, row += rows) {
      T* to = packed + (n * tokens + m) * rows;
      if (n * rows + rows <= count) std::memcpy(to, row, rows * sizeof(T));
      else for (int64_t k = 0; k < rows; ++k) to[k] = n * rows + k < count ? row[k] : T(0);
    }
  }
  const char* next = left + strips * rows * size;
  const int64_t ahead = smaller(strips * rows, g.rows - first - strips * rows) * size;
  const int64_t panels = larger(1, strips * g.panels()), share = (tokens + panels - 1) / panels;
  int64_t fetched = 0;  // tokens
  for (int64_t n = 0; n < strips; ++n, packed += tokens * rows) {
    const int64_t row = first + n * rows, some = smaller(rows, g.rows - row);
    if (g.bias) {
      T sums[rows];
      sum_tokens<rows>(sums, packed, tokens);
      for (int64_t k = 0; k < some; ++k) g.bias[row + k] = sums[k] + (kAdd ? g.bias[row + k] : T(0));
    }
    for (const auto& part : g.part) {
      if (!part.out) continue;
      const int64_t columns = part.right->columns;
      const T* right = part.right->numbers.data + from * panel;
      for (int64_t c = 0; c < columns; c += panel, right += part.right->step) {
        for (const int64_t end = smaller(tokens, fetched + share); fetched < end; ++fetched)
          fetch(next + fetched * line, ahead);
        const Term<T> term[] = {{{packed, rows}, right, panel, tokens}};
        product_panel<T, kAdd>(some, columns - c, part.out + row * columns + c, columns, term);
      }
    }
  }
}

// The pixels of one line (c, mel bin) of x that the wave's tokens have, in the tokens' order.
template <class T>
inline void add_pixels(const EmbedCall& call, const StemSizes& z, const Wave<T>& wave, int64_t first, int64_t tokens,
                       int64_t c, int64_t mel) {
  const Grid& g = call.grid;
  const View& x = call.grad_x;
  T* to = reinterpret_cast<T*>(x.data) + c * x.stride[1] + mel * x.stride[2];
  const int64_t inner = call.time_major ? g.n_f : g.n_t, outer = call.time_major ? g.n_t : g.n_f;
  for (int64_t m = 0; m < tokens; ++m) {
    const int64_t row = first + m, fast = row % inner, slow = row / inner % outer, b = row / inner / outer;
    const int64_t p = mel - (call.time_major ? fast : slow) * g.stride_f;
    if (p < 0 || p >= g.patch_f) continue;
    T* clip = to + b * x.stride[0];
    const int64_t frame = (call.time_major ? slow : fast) * g.stride_t;
    const T* pixels = wave.pixels.data + m * wave.pixel_line;
    const T* patch = pixels + (c * g.patch_f + p) * g.patch_t;
    for (int64_t f = 0; f < g.patch_t; ++f) clip[(frame + f) * x.stride[3]] += patch[f];
    if (z.within) continue;
    const T* window = pixels + z.patch + (c * g.patch_f + p) * g.window;
    for (int64_t k = 0; k < g.window; ++k) {
      const int64_t t = frame + z.window_offset + k;
      if (t >= 0 && t < g.frames) clip[t * x.stride[3]] += window[k];
    }
  }
}

// to[k] = (add: to[k] +) Σ_groups Σ_lanes from[group][k][lane], of `size` numbers a group.
template <class T>
inline void sum_groups(const T* from, int64_t size, int64_t groups, bool add, T* to) {
  using M = Math<Vec<T>>;
  constexpr int lanes = Simd<T>::kLanes;
  for (int64_t k = 0; k < size / lanes; ++k, from += lanes) {
    Vec<T> sum = M::load(from);
    for (int64_t group = 1; group < groups; ++group) sum += M::load(from + group * size);
    T total = add ? to[k] : T(0);
    for (int lane = 0; lane < lanes; ++lane) total += sum[lane];
    to[k] = total;
  }
}

// Tokens are summed up in one or two parts, whose threads read nothing that the other part's have written until the two
// sums are added: between cores that share no cache such reads took a third of the time. Two where the operands to be
// read are more than the sums, and each part has a group at least: what no token adds to would not be written.
template <class T>
inline int64_t parts_of(const StemSizes& z, const StemNeeds& need) {
  // pixels of x may be added to from any part
  return !need.x && z.rows >= 2 * larger(z.dim, Block<T>::kTokens) ? 2 : 1;
}

// The weights' gradients of a call, and how many numbers each has.
struct WeightGradients {
  static constexpr int kCount = 8;
  View* views[kCount];
  int64_t sizes[kCount], total = 0;

  WeightGradients(EmbedCall& c, const StemSizes& z)
      : views{&c.grad_proj_w, &c.grad_proj_b, &c.grad_fusion_w, &c.grad_w1, &c.grad_b1, &c.grad_w2, &c.grad_b2, &c.grad_sblu_w},
        sizes{z.dim * z.patch, z.dim, z.dim * z.features, z.hidden * z.patch, z.hidden, 2 * z.states * z.hidden, 2 * z.states,
              z.states * z.projected} {
    for (int k = 0; k < kCount; ++k) total += sizes[k] = views[k]->data ? sizes[k] : 0;
  }
  template <class T>
  void move_to(T* numbers) {
    for (int k = 0; k < kCount; numbers += sizes[k++])
      if (views[k]->data) views[k]->data = reinterpret_cast<char*>(numbers);
  }
};

// Where a part of the tokens sums them, in an order of three matrices and SBLU's projection.
template <class T>
struct Gradients {
  Gradient<T> of[3];
  T* sblu;

  Gradients(const EmbedCall& c, const StemSizes& z, const Wave<T>& wave)
      : of{{c.grad, z.dim, {{at(c.grad_proj_w), &wave.patches}, {at(c.grad_fusion_w), &wave.features}}, at(c.grad_proj_b)},
           {own(wave.hidden), z.hidden, {{at(c.grad_w1), &wave.patches}, {}}, at(c.grad_b1)},
           {own(wave.logits), 2 * z.states, {{at(c.grad_w2), &wave.active}, {}}, at(c.grad_b2)}},
        sblu(at(c.grad_sblu_w)) {}
  static View own(const Buffer<T>& numbers) { return {reinterpret_cast<char*>(numbers.data), {}, kTypeOf<T>}; }
  static T* at(const View& view) { return reinterpret_cast<T*>(view.data); }
};

// What the second phase does with a part's tokens, piece by piece: `count` strips of a matrix from the `first` on, the pixels of
// a line, or the sums for SBLU's projection. Costs are about those of a panel.
struct Job {
  enum Of : int64_t { kMatrices = 3, kPixels = kMatrices, kSblu };
  int64_t of, first, count, cost;
};

template <class T>
std::vector<Job> jobs_of(const Gradients<T>& gradients, int64_t lines, bool sblu, int64_t threads) {
  int64_t strips = 0;
  for (const auto& gradient : gradients.of) strips += gradient.strips();
  // few enough that every thread has several
  const int64_t at_once = larger(1, smaller(kStrips, strips / (6 * threads)));
  std::vector<Job> jobs;
  for (int64_t k = 0; k < Job::kMatrices; ++k) {
    const auto& gradient = gradients.of[k];
    for (int64_t first = 0; first < gradient.strips(); first += at_once) {
      const int64_t count = smaller(at_once, gradient.strips() - first);
      jobs.push_back({k, first, count, count * larger(1, gradient.panels())});
    }
  }
  for (int64_t first = 0; first < lines; ++first) jobs.push_back({Job::kPixels, first, 1, 1});
  if (sblu) jobs.push_back({Job::kSblu, 0, 1, 1});
  return jobs;
}

template <class T, bool Quadrature>
inline void stem_backward(const EmbedCall& call) {
  constexpr int64_t line = Block<T>::kTokens;
  const Grid& g = call.grid;
  const StemSizes z(call);
  const StemNeeds need(call);
  const StemWeights<T> w(call);
  const int64_t work = 2 * z.rows * ((z.patch + z.features) * z.dim + z.patch * (z.hidden + z.states));
  const int64_t threads = threads_for(work, (z.rows + line - 1) / line, call.threads);
  const int64_t parts = parts_of<T>(z, need), part_rows = round_up((z.rows + parts - 1) / parts, Simd<T>::kLanes);
  // of the parts that are summed up at the same time, so that a thread alone has one's sums in its cache; a wave's tokens of
  // each: as many chunks as give every thread three groups
  const int64_t together = smaller(parts, threads), per_thread = (3 * threads * line + together - 1) / together;
  const int64_t tokens = round_up(smaller(part_rows, larger(1, per_thread)), kChunk), groups = tokens / line;
  Wave<T> wave(z, need, g, together * tokens);
  EmbedCall second = call;
  WeightGradients sums(second, z);
  Buffer<T> others((parts - 1) * sums.total);
  sums.move_to(others.data);
  const Gradients<T> gradients[] = {{call, z, wave}, {second, z, wave}};
  const int64_t lines = need.x ? g.channels * g.mel_bins : 0;
  const std::vector<Job> jobs = jobs_of(gradients[0], lines, need.sblu, (threads + together - 1) / together);
  int64_t cost = 0;
  for (const Job& job : jobs) cost += together * job.cost;
  // tokens from `first` on, which are the wave's from `place` on; `add` to what earlier waves have left
  const auto run = [&](const Job& job, const Gradients<T>& to, bool add, int64_t first, int64_t place, int64_t count, T* packed) {
    if (job.of == Job::kSblu) {
      // chunk by chunk, as a wave's tokens depend on the number of threads
      for (int64_t from = 0; from < count; from += kChunk) {
        const int64_t chunk = smaller(kChunk, count - from);
        const T* numbers = wave.sblu.data + (place + from) / line * wave.sblu_size;
        sum_groups(numbers, wave.sblu_size, (chunk + line - 1) / line, add || from, to.sblu);
      }
      return;
    }
    if (job.of == Job::kPixels) return add_pixels(call, z, wave, first, count, job.first / g.mel_bins, job.first % g.mel_bins);
    Gradient<T> gradient = to.of[job.of];
    // the first lies in the caller's memory, the others in the wave's
    if (job.of == 0) gradient.left.data += (first - place) * z.dim * size_of(gradient.left.type);
    for (int64_t from = 0; from < count; from += kChunk) {
      const int64_t chunk = smaller(kChunk, count - from);
      if (add || from) sum_strips<T, true>(gradient, job.first, job.count, place + from, chunk, packed);
      else sum_strips<T, false>(gradient, job.first, job.count, place + from, chunk, packed);
    }
  };
#pragma omp parallel num_threads(int(threads))
  {
    BackwardTiles<T> m(z, need, g);
    Buffer<T> packed(kChunk * kStrips * Block<T>::kStrip);
    const int64_t waves = (part_rows + tokens - 1) / tokens;
    for (int64_t turn = 0; turn < parts / together * waves; ++turn) {
      const int64_t base = turn / waves * together, start = turn % waves * tokens;
      // static: the threads of a part stay its own
#pragma omp for schedule(static)
      for (int64_t n = 0; n < together * groups; ++n) {
        const int64_t part = base + n / groups, first = part * part_rows + start + n % groups * line;
        const int64_t count = smaller(line, smaller(z.rows, (part + 1) * part_rows) - first);
        if (count <= 0) continue;
        const Group<T> group(g, call.x, call.time_major, first, count);
        group_backward<T, Quadrature>(call, w, z, need, group, n * line, m, wave);
      }
      // neighbouring jobs for every thread, of the same cost in all
#pragma omp for schedule(static)
      for (int64_t share = 0; share < threads; ++share) {
        int64_t before = 0;
        for (int64_t n = 0; n < together * int64_t(jobs.size()); ++n) {
          const Job& job = jobs[n % jobs.size()];
          const bool own = (2 * before + job.cost) * threads / (2 * cost) == share;
          before += job.cost;
          const int64_t which = n / int64_t(jobs.size()), part = base + which;
          const int64_t first = part * part_rows + start, place = which * tokens;
          const int64_t count = smaller(tokens, smaller(z.rows, (part + 1) * part_rows) - first);
          if (own && count > 0) run(job, gradients[part], start > 0, first, place, count, packed.data);
        }
      }
    }
  }
  if (parts == 1) return;
  EmbedCall first = call;
  const WeightGradients totals(first, z);
#pragma omp parallel num_threads(int(threads))
  for (int k = 0; k < WeightGradients::kCount; ++k) {
    T* to = reinterpret_cast<T*>(totals.views[k]->data);
    const T* from = reinterpret_cast<const T*>(sums.views[k]->data);
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < totals.sizes[k]; ++n) to[n] += from[n];
  }
}

}  // namespace AAPE_NAMESPACE
}  // namespace aape
