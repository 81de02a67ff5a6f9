// What XLA's CPU compiler has no fast form of: look-ups in 16-entry tables, products with rows
// chosen by number or stored in 8 or 4 bits, and the places of the largest entries. See __init__.py.
//
// Portable C++17; with AVX2 the look-ups are byte shuffles. Everything else is written so that
// compilers vectorise it.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// Shares `count` pieces of work with XLA's threads. The caller works too, and waits only for
// pieces that somebody has begun: a busy pool makes it slower, never stuck.
template <typename Work>
void InParallel(ffi::ThreadPool& pool, int64_t count, Work work) {
  struct State {
    Work work;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
    State(Work work, int64_t count) : work(std::move(work)), count(count) {}
    void Run() {
      for (int64_t i; (i = next.fetch_add(1)) < count;) {
        work(i);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  auto state = std::make_shared<State>(std::move(work), count);
  const int64_t helpers = std::min<int64_t>(pool.num_threads() - 1, count - 1);
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([state] { state->Run(); });
  state->Run();
  while (state->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

using Dimensions = decltype(std::declval<ffi::AnyBuffer>().dimensions());

// What was expected, and the shapes that came.
ffi::Error Expected(std::string message, std::initializer_list<Dimensions> shapes) {
  message += ", got";
  for (const auto& shape : shapes) {
    message += " [";
    for (size_t i = 0; i < shape.size(); ++i) {
      message += (i ? ", " : "") + std::to_string(shape[i]);
    }
    message += "]";
  }
  return ffi::Error::InvalidArgument(message);
}

// ---- Sums of table look-ups -----------------------------------------------------------------

constexpr int64_t kTokens = 32;     // of a block
constexpr int64_t kTable = 16;      // entries of a group's table
constexpr int64_t kMaxPairs = 128;  // pairs of groups whose sums fit 16 bits: 2 * 128 * 255

// One block's sums. A pair of groups is 32 bytes of codes, 16 a group: the low half of byte j is
// the code of token j, the high half that of token j + 16.
void BlockSums(const uint8_t* codes, const uint8_t* tables, int64_t pairs, int32_t* sums) {
#if defined(__AVX2__)
  const __m256i low = _mm256_set1_epi8(0x0f);
  // XLA hands over memory as it is: without a pair nobody else writes these.
  if (pairs == 0) std::fill(sums, sums + kTokens, 0);
  for (int64_t start = 0; start < pairs; start += kMaxPairs) {
    const int64_t stop = std::min(pairs, start + kMaxPairs);
    // `all` adds bytes of odd tokens 256-fold to even ones; they are taken away again at the end.
    __m256i all[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    __m256i odd[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t p = start; p < stop; ++p) {
      // A block or two ahead: codes come from memory, in order.
      __builtin_prefetch(codes + p * 2 * kTable + 3072);
      const __m256i code =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + p * 2 * kTable));
      const __m256i table =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tables + p * 2 * kTable));
      const __m256i first = _mm256_shuffle_epi8(table, _mm256_and_si256(code, low));
      const __m256i second =
          _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(code, 4), low));
      all[0] = _mm256_add_epi16(all[0], first);
      odd[0] = _mm256_add_epi16(odd[0], _mm256_srli_epi16(first, 8));
      all[1] = _mm256_add_epi16(all[1], second);
      odd[1] = _mm256_add_epi16(odd[1], _mm256_srli_epi16(second, 8));
    }
    for (int half = 0; half < 2; ++half) {
      alignas(32) uint16_t even_sums[16], odd_sums[16];
      _mm256_store_si256(
          reinterpret_cast<__m256i*>(even_sums),
          _mm256_sub_epi16(all[half], _mm256_slli_epi16(odd[half], 8)));
      _mm256_store_si256(reinterpret_cast<__m256i*>(odd_sums), odd[half]);
      for (int j = 0; j < 8; ++j) {
        int32_t* out = sums + half * 16 + 2 * j;
        const int32_t even_sum = even_sums[j] + even_sums[j + 8];
        const int32_t odd_sum = odd_sums[j] + odd_sums[j + 8];
        out[0] = even_sum + (start ? out[0] : 0);
        out[1] = odd_sum + (start ? out[1] : 0);
      }
    }
  }
#else
  std::fill(sums, sums + kTokens, 0);
  for (int64_t g = 0; g < 2 * pairs; ++g) {
    const uint8_t* code = codes + g * kTable;
    const uint8_t* table = tables + g * kTable;
    for (int64_t j = 0; j < 16; ++j) {
      sums[j] += table[code[j] & 0x0f];
      sums[j + 16] += table[code[j] >> 4];
    }
  }
#endif
}

ffi::Error LookupSums(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> tables,
                      ffi::Buffer<ffi::U8> blocks, ffi::ResultBuffer<ffi::S32> sums) {
  const auto table_dims = tables.dimensions();
  const auto block_dims = blocks.dimensions();
  const auto sum_dims = sums->dimensions();
  if (table_dims.size() != 3 || block_dims.size() != 3 || table_dims[1] != 2 * block_dims[1] ||
      table_dims[2] != kTable || block_dims[2] != 2 * kTable) {
    return Expected("tables, blocks: expected [n, 2 pairs, 16] and [count, pairs, 32]",
                    {table_dims, block_dims});
  }
  if (sum_dims.size() != 2 || sum_dims[0] != table_dims[0] ||
      sum_dims[1] != kTokens * block_dims[0]) {
    return Expected("sums: expected [n, 32 count]", {sum_dims});
  }
  const int64_t positions = table_dims[0], count = block_dims[0], pairs = block_dims[1];
  const uint8_t* table = tables.typed_data();
  const uint8_t* code = blocks.typed_data();
  int32_t* out = sums->typed_data();
  // Pieces of some 20,000 shuffles: a few microseconds.
  const int64_t size = std::max<int64_t>(1, 10000 / std::max<int64_t>(1, pairs * positions));
  InParallel(pool, (count + size - 1) / size, [=](int64_t piece) {
    for (int64_t b = piece * size; b < std::min(count, (piece + 1) * size); ++b) {
      // A block's codes stay in the cache for all positions.
      for (int64_t n = 0; n < positions; ++n) {
        BlockSums(code + b * pairs * 2 * kTable, table + n * pairs * 2 * kTable, pairs,
                  out + (n * count + b) * kTokens);
      }
    }
  });
  return ffi::Error::Success();
}

// ---- Products with chosen rows --------------------------------------------------------------

float FloatOf(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

float Wide(float x) { return x; }

float Wide(uint16_t bits) {  // of a bfloat16
  return FloatOf(static_cast<uint32_t>(bits) << 16);
}

template <size_t kLanes>
float Sum(float (&lanes)[kLanes]) {
  for (size_t half = kLanes / 2; half; half /= 2) {
    for (size_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

template <int64_t kLanes = 32, typename T>
float Dot(const float* vector, const T* row, const T* next, int64_t width) {
  float lanes[kLanes] = {0};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    // Rows lie anywhere in memory: the next one is on its way while this one is read.
    for (int64_t line = 0; line < kLanes; line += 64 / sizeof(T)) {
      __builtin_prefetch(next + i + line);
    }
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += vector[i + j] * Wide(row[i + j]);
  }
  float sum = 0;
  for (; i < width; ++i) sum += vector[i] * Wide(row[i]);
  return sum + Sum(lanes);
}

template <typename T>
void ChosenProducts(ffi::ThreadPool& pool, const float* vectors, const T* rows, const int32_t* ids,
                    float* out, int64_t positions, int64_t each, int64_t width, int64_t vocab) {
  const int64_t count = positions * each;
  const int64_t size = std::max<int64_t>(1, 20000 / std::max<int64_t>(1, width));
  const auto row_of = [=](int64_t i) {
    const int64_t id = std::min<int64_t>(std::max<int64_t>(ids[i], 0), vocab - 1);
    return rows + id * width;
  };
  InParallel(pool, (count + size - 1) / size, [=](int64_t piece) {
    const int64_t stop = std::min(count, (piece + 1) * size);
    for (int64_t i = piece * size; i < stop; ++i) {
      const T* next = row_of(i + 1 < stop ? i + 1 : i);
      out[i] = Dot(vectors + (i / each) * width, row_of(i), next, width);
    }
  });
}

ffi::Error RowProducts(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> vectors, ffi::AnyBuffer rows,
                       ffi::Buffer<ffi::S32> ids, ffi::ResultBuffer<ffi::F32> products) {
  const auto vector_dims = vectors.dimensions();
  const auto row_dims = rows.dimensions();
  const auto id_dims = ids.dimensions();
  const auto out_dims = products->dimensions();
  if (vector_dims.size() != 2 || row_dims.size() != 2 || id_dims.size() != 2 ||
      vector_dims[1] != row_dims[1] || vector_dims[0] != id_dims[0]) {
    return Expected("vectors, rows, ids: expected [n, d], [v, d] and [n, m]",
                    {vector_dims, row_dims, id_dims});
  }
  if (out_dims.size() != 2 || out_dims[0] != id_dims[0] || out_dims[1] != id_dims[1]) {
    return Expected("products: expected the shape of ids", {id_dims, out_dims});
  }
  // The nearest of no rows does not exist.
  if (row_dims[0] == 0 && ids.element_count() > 0) {
    return Expected("rows: expected at least one row for the ids", {row_dims});
  }
  const auto run = [&](const auto* typed) {
    ChosenProducts(pool, vectors.typed_data(), typed, ids.typed_data(), products->typed_data(),
                   id_dims[0], id_dims[1], row_dims[1], row_dims[0]);
    return ffi::Error::Success();
  };
  switch (rows.element_type()) {
    case ffi::F32:
      return run(static_cast<const float*>(rows.untyped_data()));
    case ffi::BF16:
      return run(static_cast<const uint16_t*>(rows.untyped_data()));
    default:
      return ffi::Error::InvalidArgument("rows: expected float32 or bfloat16");
  }
}

// ---- Products with rows of 8 or 4 bits ------------------------------------------------------

struct Half {
  uint16_t bits;
};

float Wide(Half x) {
  // As a float's, its exponent is 112 too small; a product also mends subnormal numbers.
  return FloatOf((x.bits & 0x8000u) << 16 | (x.bits & 0x7fffu) << 13) * 0x1p112f;
}

// A row is `values` times one scale for each `size` of them.
template <typename Step>
float ScaledDot(const float* x, const int8_t* values, const Step* scales, int64_t groups,
                int64_t size) {
  constexpr int64_t kLanes = 32;
  float lanes[kLanes] = {0};
  float sum = 0;
  for (int64_t group = 0; group < groups; ++group, x += size, values += size) {
    const float scale = Wide(scales[group]);
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) {
        lanes[j] += x[i + j] * (scale * static_cast<float>(values[i + j]));
      }
    }
    for (; i < size; ++i) sum += x[i] * (scale * static_cast<float>(values[i]));
  }
  return sum + Sum(lanes);
}

// The same of two values a byte, `size` bytes a group; a vector's odd numbers follow its even ones.
// With `kSize` for it, compilers keep the lanes in registers, which is nine times as fast.
template <int64_t kSize = 0, typename Step>
float ScaledDot(const float* even, const uint8_t* bytes, uint8_t flip, const Step* scales,
                int64_t groups, int64_t size) {
  if (kSize) size = kSize;
  constexpr int64_t kLanes = 16;
  const float* odd = even + groups * size;
  float lanes[kLanes] = {0};
  float sum = 0;
  for (int64_t group = 0; group < groups; ++group, even += size, odd += size, bytes += size) {
    const float scale = Wide(scales[group]);
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) {
        const int32_t byte = bytes[i + j] ^ flip;
        lanes[j] += scale * (even[i + j] * static_cast<float>(byte & 15) +
                             odd[i + j] * static_cast<float>(byte >> 4));
      }
    }
    for (; i < size; ++i) {
      const int32_t byte = bytes[i] ^ flip;
      sum += scale * (even[i] * (byte & 15) + odd[i] * (byte >> 4));
    }
  }
  return sum + Sum(lanes);
}

#if defined(__AVX2__) && defined(__FMA__)
// Compilers make half as fast a program of the loops above, and a third where groups are not whole
// lanes. Groups have `size` numbers, a multiple of 8, and without `kRest` of 32: from a number on,
// `dot` multiplies 16 and adds them up to eight, and `few` multiplies 8.
template <bool kRest, typename Step, typename Dot, typename Few>
float ScaledDot8(const Step* scales, int64_t groups, int64_t size, Dot dot, Few few) {
  __m256 first = _mm256_setzero_ps(), second = _mm256_setzero_ps();
  for (int64_t group = 0, i = 0; group < groups; ++group) {
    const __m256 scale = _mm256_set1_ps(Wide(scales[group]));
    const int64_t stop = i + size;
    for (; kRest ? i + 32 <= stop : i < stop; i += 32) {
      first = _mm256_fmadd_ps(scale, dot(i), first);
      second = _mm256_fmadd_ps(scale, dot(i + 16), second);
    }
    if (kRest && i + 16 <= stop) {
      first = _mm256_fmadd_ps(scale, dot(i), first);
      i += 16;
    }
    if (kRest && i < stop) {
      second = _mm256_fmadd_ps(scale, few(i), second);
      i += 8;
    }
  }
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, _mm256_add_ps(first, second));
  return Sum(lanes);
}

template <typename Step>
float ScaledDot8(const float* x, const int8_t* values, const Step* scales, int64_t groups,
                 int64_t size) {
  const auto eight = [=](int64_t start) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values + start));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  };
  const auto few = [=](int64_t i) { return _mm256_mul_ps(eight(i), _mm256_loadu_ps(x + i)); };
  const auto dot = [=](int64_t i) {
    return _mm256_fmadd_ps(eight(i + 8), _mm256_loadu_ps(x + i + 8), few(i));
  };
  return size % 32 ? ScaledDot8<true>(scales, groups, size, dot, few)
                   : ScaledDot8<false>(scales, groups, size, dot, few);
}

template <typename Step>
float ScaledDot8(const float* even, const uint8_t* bytes, uint8_t flip, const Step* scales,
                 int64_t groups, int64_t size) {
  const float* odd = even + groups * size / 2;
  const __m256i flips = _mm256_set1_epi32(flip), low = _mm256_set1_epi32(15);
  const __m256i half = _mm256_setr_epi32(-1, -1, -1, -1, 0, 0, 0, 0);
  const auto product = [=](__m128i packed, __m256 evens, __m256 odds) {
    const __m256i both = _mm256_xor_si256(_mm256_cvtepu8_epi32(packed), flips);
    const __m256 sum = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_and_si256(both, low)), evens);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4)), odds, sum);
  };
  const auto dot = [=](int64_t i) {
    const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + i / 2));
    return product(packed, _mm256_loadu_ps(even + i / 2), _mm256_loadu_ps(odd + i / 2));
  };
  const auto few = [=](int64_t i) {
    int32_t packed;
    std::memcpy(&packed, bytes + i / 2, sizeof(packed));
    return product(_mm_cvtsi32_si128(packed), _mm256_maskload_ps(even + i / 2, half),
                   _mm256_maskload_ps(odd + i / 2, half));
  };
  return size % 32 ? ScaledDot8<true>(scales, groups, size, dot, few)
                   : ScaledDot8<false>(scales, groups, size, dot, few);
}
#else
template <typename Step>
float ScaledDot8(const float* x, const int8_t* values, const Step* scales, int64_t groups,
                 int64_t size) {
  return ScaledDot(x, values, scales, groups, size);
}

template <typename Step>
float ScaledDot8(const float* even, const uint8_t* bytes, uint8_t flip, const Step* scales,
                 int64_t groups, int64_t size) {
  return size == 32 ? ScaledDot<16>(even, bytes, flip, scales, groups, 16)
                    : ScaledDot(even, bytes, flip, scales, groups, size / 2);
}
#endif

// Values have the type S8, S4 or U4; without offsets there is no pointer to them.
template <typename Step>
void CodedProducts(ffi::ThreadPool& pool, const float* x, const void* values, ffi::DataType type,
                   const Step* scales, const Step* offsets, float* out, int64_t count,
                   int64_t width, int64_t rows, int64_t groups) {
  const int64_t size = width / groups;
  const bool nibbles = type != ffi::S8;
  // With the sign turned, four bits are the value and 8.
  const int shift = type == ffi::S4 ? -8 : 0;
  const uint8_t flip = type == ffi::S4 ? 0x88 : 0;
  // Of one vector: its sums over groups, and its even and odd numbers apart.
  std::vector<float> sums(groups), halves(nibbles ? width : 0);
  for (int64_t i = 0; count == 1 && nibbles && i < width; ++i) {
    halves[i / 2 + (i % 2) * (width / 2)] = x[i];
  }
  for (int64_t g = 0; count == 1 && (offsets || shift) && g < groups; ++g) {
    for (int64_t i = g * size; i < (g + 1) * size; ++i) sums[g] += x[i];
  }
  // A million numbers are a piece of work: smaller matrices are the caller's.
  const int64_t each = std::max<int64_t>(1, 1000000 / std::max<int64_t>(1, width));
  const auto* codes = static_cast<const int8_t*>(values);
  const auto* bytes = static_cast<const uint8_t*>(values);
  InParallel(pool, (rows + each - 1) / each, [=, &sums, &halves](int64_t piece) {
    std::vector<float> wide(count > 1 ? width : 0), offset(groups);
    for (int64_t i = piece * each; i < std::min(rows, (piece + 1) * each); ++i) {
      const Step* scale = scales + i * groups;
      for (int64_t g = 0; (offsets || shift) && g < groups; ++g) {
        offset[g] = (offsets ? Wide(offsets[i * groups + g]) : 0) + shift * Wide(scale[g]);
      }
      const int64_t start = i * width;
      if (count == 1) {
        const uint8_t* row = bytes + start / 2;
        out[i] = nibbles ? size % 8 ? ScaledDot(halves.data(), row, flip, scale, groups, size / 2)
                                    : ScaledDot8(halves.data(), row, flip, scale, groups, size)
                 : size % 8 ? ScaledDot(x, codes + start, scale, groups, size)
                            : ScaledDot8(x, codes + start, scale, groups, size);
        if (offsets || shift) out[i] += Dot<8>(sums.data(), offset.data(), offset.data(), groups);
        continue;
      }
      for (int64_t g = 0; g < groups; ++g) {
        for (int64_t k = g * size; k < (g + 1) * size; ++k) {
          const int byte = nibbles ? bytes[(start + k) / 2] ^ flip : 0;
          const int value = nibbles ? byte >> 4 * (k % 2) & 15 : codes[start + k];
          wide[k] = Wide(scale[g]) * value + offset[g];
        }
      }
      for (int64_t n = 0; n < count; ++n) {
        out[n * rows + i] = Dot(x + n * width, wide.data(), wide.data(), width);
      }
    }
  });
}

ffi::Error CodeProducts(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> vectors, ffi::AnyBuffer values,
                        ffi::AnyBuffer scales, ffi::AnyBuffer offsets,
                        ffi::ResultBuffer<ffi::F32> products) {
  const auto x = vectors.dimensions();
  const auto v = values.dimensions();
  const auto s = scales.dimensions();
  const auto o = offsets.dimensions();
  const auto out = products->dimensions();
  const auto type = values.element_type();
  const bool nibbles = type != ffi::S8;
  if (x.size() != 2 || v.size() != 2 || s.size() != 2 || out.size() != 2 || x[1] != v[1] ||
      v[0] != s[0] || !s[1] || v[1] % (s[1] * (nibbles ? 2 : 1)) || out[0] != x[0] ||
      out[1] != v[0] || o.size() != 2 || o[0] != s[0] || (o[1] && o[1] != s[1])) {
    return Expected("vectors, values, scales, offsets: expected [n, d], [o, d], [o, g] and [o, g] "
                    "or [o, 0], g dividing d, and d / 2 for four bits", {x, v, s, o});
  }
  if ((nibbles && type != ffi::S4 && type != ffi::U4) ||
      scales.element_type() != offsets.element_type()) {
    return ffi::Error::InvalidArgument("values: expected 8 or 4 bits, and steps of one type");
  }
  const auto run = [&](const auto* steps) {
    const auto* more = static_cast<decltype(steps)>(offsets.untyped_data());
    CodedProducts(pool, vectors.typed_data(), values.untyped_data(), type, steps,
                  o[1] ? more : nullptr, products->typed_data(), x[0], x[1], v[0], s[1]);
    return ffi::Error::Success();
  };
  switch (scales.element_type()) {
    case ffi::F32:
      return run(static_cast<const float*>(scales.untyped_data()));
    case ffi::F16:
      return run(static_cast<const Half*>(scales.untyped_data()));
    case ffi::BF16:
      return run(static_cast<const uint16_t*>(scales.untyped_data()));
    default:
      return ffi::Error::InvalidArgument("scales: expected floats of 32 or 16 bits");
  }
}

// ---- Places of the largest entries ----------------------------------------------------------

// Integers in the order of `lax.top_k`, IEEE 754's total one: 0.0 before -0.0, nan above inf and
// one with its sign set below -inf.
int32_t OrderOf(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// The largest of each `kSize` neighbours.
template <int64_t kSize>
void Maxima(const float* values, int64_t groups, int32_t* maxima) {
  for (int64_t g = 0; g < groups; ++g) {
    int32_t best = INT32_MIN;
    for (int64_t i = 0; i < kSize; ++i) best = std::max(best, OrderOf(values[g * kSize + i]));
    maxima[g] = best;
  }
}

void Largest(const float* values, int64_t count, int64_t k, int32_t* out) {
  // The k-th largest of the maxima of neighbours is no larger than the k-th largest entry.
  const int64_t size = count >= 128 * k ? 64 : count >= 32 * k ? 16 : 1;
  const int64_t whole = count / size, groups = (count + size - 1) / size;
  std::vector<int32_t> maxima(groups, INT32_MIN);
  const auto find = size == 64 ? Maxima<64> : size == 16 ? Maxima<16> : Maxima<1>;
  find(values, whole, maxima.data());
  for (int64_t i = whole * size; i < count; ++i) {
    maxima[whole] = std::max(maxima[whole], OrderOf(values[i]));
  }
  std::vector<int32_t> sorted(maxima);
  std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<>());
  const int32_t least = sorted[k - 1];
  std::vector<std::pair<int32_t, int32_t>> found;
  found.reserve(4 * k);
  for (int64_t g = 0; g < groups; ++g) {
    if (maxima[g] < least) continue;
    for (int64_t i = g * size; i < std::min(count, (g + 1) * size); ++i) {
      const int32_t order = OrderOf(values[i]);
      if (order >= least) found.emplace_back(order, static_cast<int32_t>(i));
    }
  }
  const auto before = [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  };
  if (static_cast<int64_t>(found.size()) > k) {
    std::nth_element(found.begin(), found.begin() + k, found.end(), before);
  }
  std::sort(found.begin(), found.begin() + k, before);
  for (int64_t i = 0; i < k; ++i) out[i] = found[i].second;
}

ffi::Error LargestIds(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> values,
                      ffi::ResultBuffer<ffi::S32> ids) {
  const auto dims = values.dimensions();
  const auto out_dims = ids->dimensions();
  if (dims.size() != 2 || out_dims.size() != 2 || dims[0] != out_dims[0] ||
      out_dims[1] < 1 || out_dims[1] > dims[1]) {
    return Expected("values, ids: expected [n, v] and [n, k], 1 <= k <= v", {dims, out_dims});
  }
  if (dims[1] > INT32_MAX) return Expected("values: expected places that fit int32", {dims});
  const int64_t count = dims[1], k = out_dims[1];
  const float* in = values.typed_data();
  int32_t* out = ids->typed_data();
  InParallel(pool, dims[0], [=](int64_t n) { Largest(in + n * count, count, k, out + n * k); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(logitjax_lookup_sums, LookupSums,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(logitjax_row_products, RowProducts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(logitjax_code_products, CodeProducts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(logitjax_largest_ids, LargestIds,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());
