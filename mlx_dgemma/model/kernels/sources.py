"""Sources of the custom kernels: one body for Metal and CUDA, in the C++ that both compile.

A kernel runs in groups of threads. A body may use `tid` (thread in its group), `group`, `lane` (thread in its wave of
32 threads), `wave`, SYNC(), and the functions of the prelude. Every thread of a group reaches every call of these
functions. Inputs and outputs are row-contiguous arrays under the names that `kernels` gives them. T is the dtype of
activations; names in capitals are integers that are fixed when the kernel is compiled.
"""

from __future__ import annotations

METAL_PRELUDE = """
template <typename T> struct alignas(4 * sizeof(T)) Four { T x[4]; };
#define GLOBAL device
#define SHARED threadgroup
#define DEVICE inline
#define SYNC() metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup)
DEVICE float wave_sum(float x) { return metal::simd_sum(x); }
DEVICE float wave_max(float x) { return metal::simd_max(x); }
DEVICE int wave_min(int x) { return metal::simd_min(x); }
DEVICE float exponential(float x) { return metal::precise::exp(x); }
DEVICE float hyperbolic_tangent(float x) { return metal::precise::tanh(x); }
DEVICE float inverse_root(float x) { return metal::precise::rsqrt(x); }
DEVICE float cosine(float x) { return metal::precise::cos(x); }
DEVICE float sine(float x) { return metal::precise::sin(x); }
"""

CUDA_PRELUDE = """
template <typename T> struct alignas(4 * sizeof(T)) Four { T x[4]; };
#define GLOBAL
#define SHARED __shared__
#define DEVICE __device__ inline
#define SYNC() __syncthreads()
DEVICE float wave_sum(float x) {
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffff, x, i);
  return x;
}
DEVICE float wave_max(float x) {
  for (int i = 16; i > 0; i /= 2) { float y = __shfl_xor_sync(0xffffffff, x, i); x = y > x ? y : x; }
  return x;
}
DEVICE int wave_min(int x) {
  for (int i = 16; i > 0; i /= 2) { int y = __shfl_xor_sync(0xffffffff, x, i); x = y < x ? y : x; }
  return x;
}
DEVICE float exponential(float x) { return expf(x); }
DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
DEVICE float inverse_root(float x) { return rsqrtf(x); }
DEVICE float cosine(float x) { return cosf(x); }
DEVICE float sine(float x) { return sinf(x); }
"""

# Metal passes a thread's place only to kernels whose source names these attributes.
METAL_PLACE = """
  int tid = int(thread_position_in_threadgroup.x), group = int(threadgroup_position_in_grid.x);
  int lane = int(thread_index_in_simdgroup), wave = int(simdgroup_index_in_threadgroup);
"""
CUDA_PLACE = "  int tid = threadIdx.x, group = blockIdx.x, lane = tid % 32, wave = tid / 32;\n"

# Declares `sum(x)`, the sum of x over all threads of a group of THREADS, up to 1,024.
GROUP_SUM = """
  SHARED float partial[32];
  #define GROUP_SUM(result, x) \\
    float result = 0; \\
    { \\
      float of_wave = wave_sum(x); \\
      if (lane == 0) partial[wave] = of_wave; \\
      SYNC(); \\
      for (int w = 0; w < THREADS / 32; w++) result += partial[w]; \\
      SYNC(); \\
    }
"""

# A group takes a row. x, y [N, H] -> total = x + norm(y), and three norms of it: for the dense branch, for the
# experts, and for the router, whose scale and root are separate roundings in the reference.
ADD_AND_NORM = (
    GROUP_SUM
    + """
  constexpr int EACH = (H + THREADS - 1) / THREADS;
  const long at = long(group) * H;
  float v[EACH];
  float squares = 0;
  for (int i = 0; i < EACH; i++) {
    int c = tid + i * THREADS;
    v[i] = c < H ? float(y[at + c]) : 0.0f;
    squares += v[i] * v[i];
  }
  GROUP_SUM(of_y, squares)
  float factor = inverse_root(of_y / H + EPS);
  squares = 0;
  for (int i = 0; i < EACH; i++) {
    int c = tid + i * THREADS;
    if (c < H) {
      T added = T(float(x[at + c]) + float(T(v[i] * factor * float(norm[c]))));
      total[at + c] = added;
      v[i] = float(added);
      squares += v[i] * v[i];
    }
  }
  GROUP_SUM(of_total, squares)
  factor = inverse_root(of_total / H + EPS);
  for (int i = 0; i < EACH; i++) {
    int c = tid + i * THREADS;
    if (c < H) {
      float scaled = v[i] * factor;
      for_dense[at + c] = T(scaled * float(dense_norm[c]));
      for_experts[at + c] = T(scaled * float(experts_norm[c]));
      for_router[at + c] = T(float(T(float(T(scaled)) * float(router_scale[c]))) * ROOT);
    }
  }
"""
)

# A group takes a row. x, dense [N, H], experts [S, H], slots and shares [N, K] -> out [N, H]: the weighted rows of the
# experts are summed, both branches normed, added, normed, added to x and scaled.
COMBINE = (
    GROUP_SUM
    + """
  constexpr int EACH = (H + THREADS - 1) / THREADS;
  const long at = long(group) * H;
  long from[K];
  float share[K];
  for (int k = 0; k < K; k++) {
    from[k] = long(slots[group * K + k]) * H;
    share[k] = float(shares[group * K + k]);
  }
  float v[EACH], u[EACH];
  float of_dense = 0, of_experts = 0;
  for (int i = 0; i < EACH; i++) {
    int c = tid + i * THREADS;
    v[i] = u[i] = 0;
    if (c < H) {
      v[i] = float(dense[at + c]);
      float mixed = 0;
      for (int k = 0; k < K; k++) mixed += share[k] * float(experts[from[k] + c]);
      u[i] = float(T(mixed));
    }
    of_dense += v[i] * v[i];
    of_experts += u[i] * u[i];
  }
  GROUP_SUM(dense_squares, of_dense)
  GROUP_SUM(experts_squares, of_experts)
  float dense_factor = inverse_root(dense_squares / H + EPS);
  float experts_factor = inverse_root(experts_squares / H + EPS);
  float of_both = 0;
  for (int i = 0; i < EACH; i++) {
    int c = tid + i * THREADS;
    if (c < H) {
      float first = float(T(v[i] * dense_factor * float(dense_norm[c])));
      float second = float(T(u[i] * experts_factor * float(experts_norm[c])));
      v[i] = float(T(first + second));
      of_both += v[i] * v[i];
    }
  }
  GROUP_SUM(both_squares, of_both)
  float factor = inverse_root(both_squares / H + EPS);
  for (int i = 0; i < EACH; i++) {
    int c = tid + i * THREADS;
    if (c < H) {
      float normed = float(T(v[i] * factor * float(norm[c])));
      out[at + c] = T(float(T(float(x[at + c]) + normed)) * float(scalar[0]));
    }
  }
"""
)

# A wave takes a head of a position. q [B, L, HEADS * D], k, v [B, L, KV_HEADS * D], cosines, sines [1 or B, L, D / 2]
# -> queries [B, HEADS, L, D] and keys, values [B, KV_HEADS, L, D]: normed, queries and keys rotated.
SPLIT_HEADS = """
  constexpr int HALF = D / 2, ALL = HEADS + 2 * KV_HEADS;
  const int length = q_shape[1];
  const int place = group / ALL, head = group % ALL;
  const int row = place / length, position = place % length;
  const long turn = (long(cosines_shape[0] > 1 ? row : 0) * length + position) * HALF;
  if (head < HEADS + KV_HEADS) {
    const bool query = head < HEADS;
    const int own = query ? head : head - HEADS;
    const long from = query ? (long(place) * HEADS + own) * D : (long(place) * KV_HEADS + own) * D;
    const long to = query ? ((long(row) * HEADS + own) * length + position) * D
                          : ((long(row) * KV_HEADS + own) * length + position) * D;
    float squares = 0;
    for (int i = lane; i < D; i += 32) {
      float x = query ? float(q[from + i]) : float(k[from + i]);
      squares += x * x;
    }
    float factor = inverse_root(wave_sum(squares) / D + EPS);
    for (int i = lane; i < HALF; i += 32) {
      float a = query ? float(q[from + i]) * factor * float(q_norm[i]) : float(k[from + i]) * factor * float(k_norm[i]);
      float b = query ? float(q[from + i + HALF]) * factor * float(q_norm[i + HALF])
                      : float(k[from + i + HALF]) * factor * float(k_norm[i + HALF]);
      a = float(T(a));
      b = float(T(b));
      T first = T(a * cosines[turn + i] - b * sines[turn + i]);
      T second = T(a * sines[turn + i] + b * cosines[turn + i]);
      if (query) {
        queries[to + i] = first;
        queries[to + i + HALF] = second;
      } else {
        keys[to + i] = first;
        keys[to + i + HALF] = second;
      }
    }
  } else {
    const int own = head - HEADS - KV_HEADS;
    const long from = (long(place) * KV_HEADS + own) * D;
    const long to = ((long(row) * KV_HEADS + own) * length + position) * D;
    float squares = 0;
    for (int i = lane; i < D; i += 32) squares += float(v[from + i]) * float(v[from + i]);
    float factor = inverse_root(wave_sum(squares) / D + EPS);
    for (int i = lane; i < D; i += 32) values[to + i] = T(float(v[from + i]) * factor);
  }
"""

# A thread takes a word of the first half of a head, and its counterpart in the second half. codes [B, heads, slots,
# D * BITS / 32], scales, biases [B, heads, slots, D / SIZE], numbers [2 + B] -> values [B, heads, N, D] of N slots from
# `numbers[1]` on, and keys: the values times weight [D], rotated by frequencies [D / 2] times the position.
# `numbers` are N, the first slot, and each row's position of it.
UNPACK = """
  constexpr int HALF = D / 2, EACH = 32 / BITS, WORDS = D / EACH, GROUPS = D / SIZE;
  const long i = long(group) * THREADS + tid, row = i / (WORDS / 2);
  const int first = int(i % (WORDS / 2)) * EACH, count = numbers[0], n = int(row % count);
  const long head = row / count;
  if (head < long(codes_shape[0]) * codes_shape[1]) {
    const long at = head * codes_shape[2] + numbers[1] + n, to = row * D + first;
    const float position = float(numbers[2 + head / codes_shape[1]] + n);
    const unsigned low = codes[at * WORDS + first / EACH], high = codes[at * WORDS + (first + HALF) / EACH];
    const long near = at * GROUPS + first / SIZE, far = at * GROUPS + (first + HALF) / SIZE;
    for (int j = 0; j < EACH; j += 4) {
      Four<T> a, b, x, y;
      for (int k = 0; k < 4; k++) {
        const int c = first + j + k, shift = (j + k) * BITS;
        a.x[k] = T(float(scales[near]) * float((low >> shift) & ((1 << BITS) - 1)) + float(biases[near]));
        b.x[k] = T(float(scales[far]) * float((high >> shift) & ((1 << BITS) - 1)) + float(biases[far]));
        const float p = float(T(float(a.x[k]) * float(weight[c])));
        const float q = float(T(float(b.x[k]) * float(weight[c + HALF])));
        const float angle = position * float(frequencies[c]), along = cosine(angle), across = sine(angle);
        x.x[k] = T(p * along - q * across);
        y.x[k] = T(p * across + q * along);
      }
      *(GLOBAL Four<T>*)(values + (to + j)) = a;
      *(GLOBAL Four<T>*)(values + (to + j + HALF)) = b;
      *(GLOBAL Four<T>*)(keys + (to + j)) = x;
      *(GLOBAL Four<T>*)(keys + (to + j + HALF)) = y;
    }
  }
"""

# A wave takes a row. scores [N, EXPERTS], scales [EXPERTS] -> chosen [N, K], the best experts in descending order, and
# shares [N, K], the softmax of their scores times their scales. Of equal scores the first expert is taken.
ROUTE = """
  constexpr int EACH = (EXPERTS + 31) / 32;
  float s[EACH];
  for (int i = 0; i < EACH; i++) {
    int e = lane + i * 32;
    s[i] = e < EXPERTS ? float(scores[long(group) * EXPERTS + e]) : LOWEST;
  }
  float peak = 0, own = LOWEST, mass = 0;
  int mine = 0;
  for (int k = 0; k < K; k++) {
    float best = LOWEST;
    for (int i = 0; i < EACH; i++) best = s[i] > best ? s[i] : best;
    best = wave_max(best);
    int found = EXPERTS;
    for (int i = EACH - 1; i >= 0; i--) found = s[i] == best && lane + i * 32 < EXPERTS ? lane + i * 32 : found;
    found = wave_min(found);
    found = found < EXPERTS ? found : EXPERTS - 1;
    for (int i = 0; i < EACH; i++) s[i] = lane + i * 32 == found ? LOWEST : s[i];
    if (k == 0) peak = best;
    mass += exponential(best - peak);
    if (lane == k) { own = best; mine = found; }
  }
  if (lane < K) {
    chosen[group * K + lane] = mine;
    shares[group * K + lane] = T(float(T(exponential(own - peak) / mass)) * float(scales[mine]));
  }
"""

# One group. chosen [N, K] -> for rows in order of their experts: slots [N, K], where each row lies; source, the row
# of each slot; owners, the expert of each run of LENGTH slots. An expert's last run is filled up with row 0, which
# nobody reads. There are as many runs as may be needed, or LEAST; the rest belongs to the last expert.
LAY_OUT = """
  constexpr int PARTS = 4096 / EXPERTS < 32 ? 4096 / EXPERTS : 32;
  SHARED int counts[PARTS * EXPERTS], totals[EXPERTS], starts[EXPERTS + 1];
  const int count = chosen_shape[0] * chosen_shape[1], top_k = chosen_shape[1];
  const int most = count / LENGTH + (EXPERTS < count ? EXPERTS : count);
  const int runs = LENGTH > 1 ? most : count > LEAST ? count : LEAST;
  const int size = (count + PARTS - 1) / PARTS;
  const int begin = tid * size < count ? tid * size : count;
  const int end = begin + size < count ? begin + size : count;
  for (int i = tid; i < PARTS * EXPERTS; i += THREADS) counts[i] = 0;
  SYNC();
  if (tid < PARTS) {
    for (int i = begin; i < end; i++) counts[tid * EXPERTS + int(chosen[i])]++;
  }
  SYNC();
  if (tid < EXPERTS) {
    int before = 0;
    for (int p = 0; p < PARTS; p++) {
      int own = counts[p * EXPERTS + tid];
      counts[p * EXPERTS + tid] = before;
      before += own;
    }
    totals[tid] = before;
  }
  SYNC();
  if (tid < EXPERTS) {
    int before = 0;
    for (int e = 0; e < tid; e++) before += (totals[e] + LENGTH - 1) / LENGTH;
    starts[tid] = before;
    if (tid == EXPERTS - 1) starts[EXPERTS] = before + (totals[tid] + LENGTH - 1) / LENGTH;
  }
  SYNC();
  if (tid < EXPERTS) {
    for (int r = starts[tid]; r < starts[tid + 1]; r++) owners[r] = tid;
    for (int s = starts[tid] * LENGTH + totals[tid]; s < starts[tid + 1] * LENGTH; s++) source[s] = 0;
  }
  for (int r = starts[EXPERTS] + tid; r < runs; r += THREADS) owners[r] = EXPERTS - 1;
  for (int s = starts[EXPERTS] * LENGTH + tid; s < runs * LENGTH; s += THREADS) source[s] = 0;
  if (tid < PARTS) {
    for (int i = begin; i < end; i++) {
      int expert = chosen[i];
      int slot = starts[expert] * LENGTH + counts[tid * EXPERTS + expert]++;
      slots[i] = slot;
      source[slot] = i / top_k;
    }
  }
"""

# A group takes a row. scores [N, P], shape [3] -> shares [N, P]: the softmax of a row's first scores, then zeros;
# sums [N, 2]: the highest of these scores, and the sum of exp(score - highest).
# `shape` is (count, step, length): row i has count + step * (i % length) scores. P is a multiple of four.
# With SHORT a thread keeps its scores: P is at most 8 * THREADS.
SOFTMAX = """
  SHARED float peaks[32], masses[32];
  const int width = scores_shape[1], live = shape[0] + shape[1] * (group % shape[2]);
  const long at = long(group) * width;
  float peak = LOWEST, mass = 0, kept[8];
  if (SHORT) {
    for (int i = 0; i < 8; i++) {
      int c = tid + i * THREADS;
      kept[i] = c < live ? float(scores[at + c]) : LOWEST;
      peak = kept[i] > peak ? kept[i] : peak;
    }
  } else {
    for (int c = 4 * tid; c < live; c += 4 * THREADS) {
      Four<T> four = *(const GLOBAL Four<T>*)(scores + (at + c));
      float x[4], highest = peak;
      for (int i = 0; i < 4; i++) {
        x[i] = c + i < live ? float(four.x[i]) : LOWEST;
        highest = x[i] > highest ? x[i] : highest;
      }
      mass *= exponential(peak - highest);
      for (int i = 0; i < 4; i++) mass += exponential(x[i] - highest);
      peak = highest;
    }
  }
  float highest = wave_max(peak);
  if (SHORT) {
    for (int i = 0; i < 8; i++) {
      if (tid + i * THREADS < live) mass += kept[i] = exponential(kept[i] - highest);
    }
  } else mass *= exponential(peak - highest);
  mass = wave_sum(mass);
  if (lane == 0) { peaks[wave] = highest; masses[wave] = mass; }
  SYNC();
  peak = LOWEST;
  for (int w = 0; w < THREADS / 32; w++) peak = peaks[w] > peak ? peaks[w] : peak;
  mass = 0;
  for (int w = 0; w < THREADS / 32; w++) mass += masses[w] * exponential(peaks[w] - peak);
  if (SHORT) {
    float factor = exponential(highest - peak) / mass;
    for (int i = 0; i < 8; i++) {
      int c = tid + i * THREADS;
      if (c < width) shares[at + c] = T(c < live ? kept[i] * factor : 0.0f);
    }
  } else {
    float factor = 1 / mass;
    for (int c = 4 * tid; c < width; c += 4 * THREADS) {
      Four<T> four = *(const GLOBAL Four<T>*)(scores + (at + c));
      for (int i = 0; i < 4; i++) {
        four.x[i] = T(c + i < live ? exponential(float(four.x[i]) - peak) * factor : 0.0f);
      }
      *(GLOBAL Four<T>*)(shares + (at + c)) = four;
    }
  }
  if (tid == 0) { sums[2 * group] = peak; sums[2 * group + 1] = mass; }
"""

# A thread takes an element. gate, up [N, S], or with PACKED both in gate [N, 2 * S] -> out [N, S]: tanh-approximated
# GELU of gate, times up.
GEGLU = """
  const long i = long(group) * THREADS + tid, row = i / S, column = i % S;
  if (row < gate_shape[0]) {
    const long at = PACKED ? row * 2 * S + column : i;
    float x = float(gate[at]);
    float by = PACKED ? float(gate[at + S]) : float(up[at]);
    float bent = 0.5f * x * (1 + hyperbolic_tangent(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    out[i] = T(float(T(bent)) * by);
  }
"""

# A group takes a slot. x [N, H], source [S] -> rows [S, H].
TAKE_ROWS = """
  const long from = long(source[group]) * H, to = long(group) * H;
  for (int c = tid; c < H; c += THREADS) rows[to + c] = x[from + c];
"""

# A thread takes a tile. products [N, V] (of hidden states and embeddings), temperature [1 or R], cap [1] -> of each
# tile its largest logit, that one's token (counted from the first of the chunk), and three sums over
# exp(logit - largest): of itself, of its product with logit - largest, and of logits rounded to T.
# A tile has HEIGHT tokens, STRIDE apart.
TILES = """
  const int vocabulary = products_shape[1];
  const int blocks = (vocabulary + HEIGHT * STRIDE - 1) / (HEIGHT * STRIDE), tiles = blocks * STRIDE;
  const int groups = (tiles + THREADS - 1) / THREADS;
  const int row = group / groups, tile = group % groups * THREADS + tid;
  const int first = tile / STRIDE * HEIGHT * STRIDE + tile % STRIDE;
  const float softcap = cap[0];
  const float t = temperature[row / (products_shape[0] / temperature_shape[0])];
  if (tile < tiles) {
    const int left = (vocabulary - first + STRIDE - 1) / STRIDE;
    const int height = left < HEIGHT ? left : HEIGHT;
    const long at = long(row) * vocabulary + first;
    float largest = LOWEST;
    int best = 0;
    for (int j = 0; j < height; j++) {
      float x = float(products[at + j * STRIDE]);
      if (x > largest) { largest = x; best = j; }
    }
    float peak = PAD, mass = 1, depth = 0, rounded = 1;
    if (height > 0) {
      peak = softcap * hyperbolic_tangent(largest / softcap) / t;
      float low_peak = float(T(peak));
      mass = rounded = 0;
      for (int j = 0; j < height; j++) {
        float z = softcap * hyperbolic_tangent(float(products[at + j * STRIDE]) / softcap) / t;
        float share = exponential(z - peak);
        mass += share;
        depth += share * (z - peak);
        rounded += exponential(float(T(z)) - low_peak);
      }
    }
    const long to = long(row) * tiles + tile;
    top[to] = peak;
    token[to] = first + best * STRIDE;
    masses[to] = mass;
    depths[to] = depth;
    roundeds[to] = rounded;
  }
"""
