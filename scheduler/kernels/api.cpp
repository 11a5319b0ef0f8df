// What is seen from outside: attention, products, and the decoder. Nothing that is passed in is kept but what a decoder
// says that it borrows.
#include "api.h"

#include <algorithm>
#include <span>
#include <vector>

#include "attention.h"
#include "checks.h"
#include "decoder.h"

namespace carousel {
namespace {

DType dtype_of(const Array& array, const char* name) {
  if (array.type == kFloat32) return DType::f32;
  require(array.type == kBfloat16, name, " must be float32 or bfloat16, not ", kTypeNames[array.type]);
  return DType::bf16;
}

// `latent_dim`, if it is not 0: so many numbers of a key are its value, and the values have no width.
KvCache kv_cache(const Array& keys, const Array& values, int64_t latent_dim = 0) {
  check_array(keys, "k_cache", {kAny, kAny, kAny, kAny});
  check_array(values, "v_cache", {keys.sizes[0], keys.sizes[1], keys.sizes[3], latent_dim == 0 ? kAny : 0});
  require(keys.type == values.type, "k_cache and v_cache must have one dtype");
  require(latent_dim >= 0 && latent_dim <= keys.sizes[2], "latent_dim must be in [0, ", keys.sizes[2], "], not ",
          latent_dim);
  return {dtype_of(keys, "k_cache"), keys.data, values.data, keys.sizes[0], keys.sizes[1], keys.sizes[2],
          latent_dim == 0 ? values.sizes[3] : latent_dim, keys.sizes[3], latent_dim != 0};
}

PagedBatch paged_batch(const Array& block_tables, const Array& query_start, const Array& context_lens) {
  const int32_t* lens = data<int32_t>(context_lens, "context_lens", {kAny});
  const int64_t sequences = context_lens.sizes[0];
  const int32_t* tables = data<int32_t>(block_tables, "block_tables", {sequences, kAny});
  return {sequences, block_tables.sizes[1], tables, data<int32_t>(query_start, "query_start", {sequences + 1}), lens};
}

Matrix matrix_of(const MatrixArray& from, const char* name) {
  const Array& array = from.array;
  check_array(array, name, {kAny, kAny});
  if (from.stored == 0)
    return {dtype_of(array, name) == DType::f32 ? Stored::f32 : Stored::bf16, array.data, array.sizes[0],
            array.sizes[1]};
  require(array.type == kUint8, name, " must be uint8, not ", kTypeNames[array.type]);
  const Stored type = Stored(from.stored);
  // Whole blocks have whole numbers of bytes, so the number of columns follows.
  constexpr int64_t kWidest = 256;
  const int64_t columns = array.sizes[1] * kWidest / row_bytes(type, kWidest);
  require(columns > 0 && row_bytes(type, columns) == array.sizes[1], "rows of ", array.sizes[1],
          " bytes are no whole blocks of this type");
  return {type, array.data, array.sizes[0], columns};
}

const PackedWeights& weights_of(const void* handle) { return *static_cast<const PackedWeights*>(handle); }

std::vector<PackedWeights> all_weights(void* const* handles, int64_t count) {
  std::vector<PackedWeights> weights;
  for (int64_t i = 0; i < count; ++i) weights.push_back(weights_of(handles[i]));
  return weights;
}

std::vector<float> norm_weights(const Array& weights) {
  if (!weights) return {};
  const float* values = data<float>(weights, "a norm's weight", {kAny});
  return std::vector<float>(values, values + weights.sizes[0]);
}

std::vector<RopeTable> rope_tables(const Array* cosines, const Array* sines, int64_t count) {
  std::vector<RopeTable> tables;
  for (int64_t i = 0; i < count; ++i) {
    const Array &cos = cosines[i], &sin = sines[i];
    const float* values = data<float>(cos, "cos", {kAny, kAny});
    tables.push_back({values, data<float>(sin, "sin", {cos.sizes[0], cos.sizes[1]}), cos.sizes[0], cos.sizes[1]});
  }
  return tables;
}

// A Decoder, and where its layers keep what they computed.
struct BoundDecoder {
  Decoder decoder;
  std::vector<LayerCache> caches;
};

BoundDecoder& decoder_of(void* handle) { return *static_cast<BoundDecoder*>(handle); }

}  // namespace

CAROUSEL_API const char* carousel_error() { return last_error().c_str(); }

CAROUSEL_API int carousel_limit_threads(const int64_t* threads) {
  return guarded([threads] {
    check_threads(*threads);
    thread_limit.store(int(*threads), std::memory_order_relaxed);
  });
}

struct PagedAttentionCall {
  Array queries, k_cache, v_cache, block_tables, query_start, context_lens;
  double scale, softcap;
  int64_t window, chunk, latent_dim, threads;
  Array sinks, slopes;  // if there are any
  Array outputs;
};

CAROUSEL_API int carousel_paged_attention(const PagedAttentionCall* call) {
  return guarded([call] {
    const KvCache cache = kv_cache(call->k_cache, call->v_cache, call->latent_dim);
    const Array &queries = call->queries, &outputs = call->outputs, &sinks = call->sinks, &slopes = call->slopes;
    check_array(queries, "q", {kAny, kAny, cache.key_dim});
    const DType dtype = dtype_of(queries, "q");
    const PagedBatch batch = paged_batch(call->block_tables, call->query_start, call->context_lens);
    const int64_t heads = queries.sizes[1], window = call->window, chunk = call->chunk, threads = call->threads;
    check_geometry(cache, heads);
    require(window >= 0 && call->softcap >= 0 && chunk >= 0,
            "sliding_window, softcap and chunk must not be negative");
    check_threads(threads);
    check_batch(batch, cache, queries.sizes[0], window, chunk);
    check_array(outputs, "outputs", {queries.sizes[0], heads, cache.value_dim});
    require(outputs.type == queries.type, "q and outputs must have one dtype");
    const AttentionRows rows{dtype, queries.data, heads * cache.key_dim, outputs.data, heads * cache.value_dim};
    const AttentionOptions options{float(call->scale), window, chunk, float(call->softcap),
                                   sinks ? data<float>(sinks, "sinks", {heads}) : nullptr,
                                   slopes ? data<float>(slopes, "slopes", {heads}) : nullptr};
    AttentionPlan plan(batch, cache, heads, window, chunk, threads);
    parallel(threads, [&](Team& team) { plan.run(team, cache, options, rows); });
  });
}

struct WriteKvCall {
  Array keys, values, slot_mapping, k_cache, v_cache;
  int64_t latent_dim;
};

CAROUSEL_API int carousel_write_kv(const WriteKvCall* call) {
  return guarded([call] {
    const KvCache cache = kv_cache(call->k_cache, call->v_cache, call->latent_dim);
    const Array &keys = call->keys, &values = call->values;
    const int64_t* slots = data<int64_t>(call->slot_mapping, "slot_mapping", {kAny});
    const int64_t tokens = call->slot_mapping.sizes[0];
    const int64_t value_dim = cache.values_are_keys ? 0 : cache.value_dim;
    const int64_t key_width = cache.num_kv_heads * cache.key_dim, value_width = cache.num_kv_heads * value_dim;
    check_array(keys, "k", {tokens, cache.num_kv_heads, cache.key_dim});
    check_array(values, "v", {tokens, cache.num_kv_heads, value_dim});
    require(keys.type == values.type, "k and v must have one dtype");
    for (int64_t t = 0; t < tokens; ++t)
      require(slots[t] >= 0 && slots[t] < cache.num_blocks * cache.block_size, "slot ", slots[t],
              " is not in the cache");
    const auto write = [&](const auto* key, const auto* value) {
      for (int64_t t = 0; t < tokens; ++t) write_slot(cache, slots[t], key + t * key_width, value + t * value_width);
    };
    if (dtype_of(keys, "k") == DType::f32)
      write(static_cast<const float*>(keys.data), static_cast<const float*>(values.data));
    else
      write(static_cast<const bf16*>(keys.data), static_cast<const bf16*>(values.data));
  });
}

struct ColumnsCall {
  MatrixArray matrix;
  int64_t* columns;
};

// Numbers in a row of blocks.
CAROUSEL_API int carousel_columns(const ColumnsCall* call) {
  return guarded([call] { *call->columns = matrix_of(call->matrix, "data").columns; });
}

struct DequantizeCall {
  MatrixArray matrix;
  Array values;
};

CAROUSEL_API int carousel_dequantize(const DequantizeCall* call) {
  return guarded([call] {
    const Matrix matrix = matrix_of(call->matrix, "data");
    float* to = data<float>(call->values, "values", {matrix.rows, matrix.columns});
    for (int64_t row = 0; row < matrix.rows; ++row) read_values(matrix, row, to + row * matrix.columns);
  });
}

struct PackCall {
  const MatrixArray* parts;
  int64_t num_parts;
  Array bias;  // if there is one
  int64_t mode, gated;
  void** made;
};

// Weights, to be freed.
CAROUSEL_API int carousel_pack(const PackCall* call) {
  return guarded([call] {
    std::vector<Matrix> matrices;
    int64_t channels = 0;
    for (int64_t i = 0; i < call->num_parts; ++i)
      channels += matrices.emplace_back(matrix_of(call->parts[i], "weight")).rows;
    const float* biases = call->bias ? data<float>(call->bias, "bias", {channels}) : nullptr;
    *call->made = new PackedWeights(Mode(call->mode), matrices, biases, call->gated != 0);
  });
}

CAROUSEL_API void carousel_free_weights(void* weights) { delete static_cast<PackedWeights*>(weights); }

struct SizesCall {
  const void* weights;
  int64_t* sizes;  // in_features, out_features, bytes
};

CAROUSEL_API int carousel_sizes(const SizesCall* call) {
  const PackedWeights& weights = weights_of(call->weights);
  call->sizes[0] = weights.in_features();
  call->sizes[1] = weights.out_features();
  call->sizes[2] = weights.bytes();
  return 0;
}

struct LinearCall {
  const void* weights;
  Array x;
  int64_t activation, threads;
  Array y;
};

// A product on its own, for the linear layers of any model.
CAROUSEL_API int carousel_linear(const LinearCall* call) {
  return guarded([call] {
    const std::span<const PackedWeights> weights(&weights_of(call->weights), 1);
    const int64_t width = weights[0].in_features(), channels = weights[0].out_features();
    const float* values = data<float>(call->x, "x", {kAny, width});
    const int64_t rows = call->x.sizes[0];
    check_threads(call->threads);
    const Product product{data<float>(call->y, "y", {rows, channels}), channels, false,
                          Activation(call->activation)};
    Operand operand;
    operand.add_forms_of(weights);
    operand.reshape(rows, width);
    parallel(call->threads, [&](Team& team) {
      team.for_each(operand.num_blocks(), 1, [&](int64_t b) {
        const PackedRows::Block block = operand.block(b);
        for (int64_t row = block.first; row < block.last; ++row)
          operand.pack(weights, block, row, values + row * width);
      });
      multiply(team, operand, weights, product);
    });
  });
}

struct AlikeCall {
  void* const* weights;
  int64_t count;
};

// Whether products of rows with several weights can be one call.
CAROUSEL_API int carousel_check_alike(const AlikeCall* call) {
  return guarded([call] {
    const PackedWeights& first = weights_of(call->weights[0]);
    for (int64_t i = 0; i < call->count; ++i) {
      const PackedWeights& each = weights_of(call->weights[i]);
      require(each.in_features() == first.in_features() && each.out_features() == first.out_features() &&
                  each.mode() == first.mode(),
              "all weights must have one shape and one mode");
    }
  });
}

struct GroupedLinearCall {
  void* const* weights;
  int64_t num_weights;
  Array x;
  const int64_t* starts;
  int64_t num_starts, threads;
  Array y;
};

// Products of rows that are sorted by their weights, as those of a mixture's experts are: rows [starts[g], starts[g + 1])
// are those of weights g.
CAROUSEL_API int carousel_grouped_linear(const GroupedLinearCall* call) {
  return guarded([call] {
    const PackedWeights& first = weights_of(call->weights[0]);
    const int64_t width = first.in_features(), count = call->num_weights, rows = call->x.sizes[0];
    const int64_t* const starts = call->starts;
    const float* values = data<float>(call->x, "x", {kAny, width});
    float* to = data<float>(call->y, "y", {rows, first.out_features()});
    check_threads(call->threads);
    require(call->num_starts == count + 1 && starts[0] == 0 && starts[count] == rows, "starts must be ", count + 1,
            " numbers from 0 to ", rows);
    require(std::is_sorted(starts, starts + count + 1), "starts must not decrease");
    std::vector<RowGroup> groups;
    std::vector<std::pair<size_t, int64_t>> blocks;  // of each group
    for (int64_t g = 0; g < count; ++g) {
      if (starts[g] == starts[g + 1]) continue;
      RowGroup& group = groups.emplace_back(RowGroup{Operand(), &weights_of(call->weights[g]), starts[g]});
      group.operand.add_forms_of({group.weights, 1});
      group.operand.reshape(starts[g + 1] - starts[g], width);
      for (int64_t b = 0; b < group.operand.num_blocks(); ++b) blocks.emplace_back(groups.size() - 1, b);
    }
    parallel(call->threads, [&](Team& team) {
      team.for_each(int64_t(blocks.size()), 1, [&](int64_t i) {
        RowGroup& group = groups[blocks[i].first];
        const PackedRows::Block block = group.operand.block(blocks[i].second);
        for (int64_t row = block.first; row < block.last; ++row)
          group.operand.pack({group.weights, 1}, block, row, values + (group.first_row + row) * width);
      });
      multiply(team, groups, {to, first.out_features()});
    });
  });
}

struct DecoderCall {
  MatrixArray embedding;
  const void* head;
  Array final_norm;
  const Array *cosines, *sines;
  int64_t num_ropes, num_heads, num_kv_heads, head_dim, activation;
  double norm_epsilon, attention_scale, attention_softcap, logit_softcap, embedding_multiplier;
  void** made;
};

// A decoder, to be freed. It borrows the embedding and the tables of its rotary positions, and shares its weights.
CAROUSEL_API int carousel_decoder(const DecoderCall* call) {
  return guarded([call] {
    const Matrix table = matrix_of(call->embedding, "embedding");
    const DecoderConfig config{table.columns,
                               call->num_heads,
                               call->num_kv_heads,
                               call->head_dim,
                               float(call->norm_epsilon),
                               float(call->attention_scale),
                               float(call->attention_softcap),
                               float(call->logit_softcap),
                               float(call->embedding_multiplier),
                               Activation(call->activation)};
    *call->made = new BoundDecoder{{config, table, weights_of(call->head), norm_weights(call->final_norm),
                                    rope_tables(call->cosines, call->sines, call->num_ropes)},
                                   {}};
  });
}

CAROUSEL_API void carousel_free_decoder(void* decoder) { delete static_cast<BoundDecoder*>(decoder); }

struct AddLayerCall {
  void* decoder;
  void* const* qkv;
  int64_t num_qkv;
  const void *output, *gate_up, *down;
  // Those that the family has.
  Array attention_norm, feed_forward_norm, query_norm, key_norm, post_attention_norm, post_feed_forward_norm;
  int64_t window, rope;
};

CAROUSEL_API int carousel_add_layer(const AddLayerCall* call) {
  return guarded([call] {
    decoder_of(call->decoder)
        .decoder.add_layer({all_weights(call->qkv, call->num_qkv), weights_of(call->output), weights_of(call->gate_up),
                            weights_of(call->down), norm_weights(call->attention_norm),
                            norm_weights(call->feed_forward_norm), norm_weights(call->query_norm),
                            norm_weights(call->key_norm), norm_weights(call->post_attention_norm),
                            norm_weights(call->post_feed_forward_norm), call->window, call->rope});
  });
}

struct BindCacheCall {
  void* decoder;
  const Array *k_caches, *v_caches;
  const int64_t* groups;
  int64_t count;
};

// It borrows them until others take their place.
CAROUSEL_API int carousel_bind_cache(const BindCacheCall* call) {
  return guarded([call] {
    std::vector<LayerCache> caches;
    for (int64_t i = 0; i < call->count; ++i)
      caches.push_back({kv_cache(call->k_caches[i], call->v_caches[i]), call->groups[i]});
    decoder_of(call->decoder).caches = std::move(caches);
  });
}

struct ForwardCall {
  void* decoder;
  Array token_ids, positions, block_tables, query_start, context_lens, sampled_rows, read_rows;
  int64_t threads;
  Array logits, states;
};

CAROUSEL_API int carousel_forward(const ForwardCall* call) {
  return guarded([call] {
    auto& [decoder, caches] = decoder_of(call->decoder);
    const int32_t* tables = data<int32_t>(call->block_tables, "block_tables", {kAny, kAny, kAny});
    const int64_t groups = call->block_tables.sizes[0], sequences = call->block_tables.sizes[1];
    const int64_t width = call->block_tables.sizes[2];
    require(groups > 0, "there must be block tables");
    std::vector<PagedBatch> batches;
    for (int64_t group = 0; group < groups; ++group) {
      const Array table{const_cast<int32_t*>(tables + group * sequences * width), kInt32, 2, {sequences, width}};
      batches.push_back(paged_batch(table, call->query_start, call->context_lens));
    }
    const int64_t rows = batches.front().num_rows();
    const int32_t* tokens = data<int32_t>(call->token_ids, "token_ids", {rows});
    const int64_t* places = data<int64_t>(call->positions, "positions", {rows});
    const int32_t* sampled = data<int32_t>(call->sampled_rows, "sampled_rows", {kAny});
    const int32_t* read = data<int32_t>(call->read_rows, "read_rows", {kAny});
    const int64_t num_sampled = call->sampled_rows.sizes[0], num_read = call->read_rows.sizes[0];
    check_threads(call->threads);
    float* logits = data<float>(call->logits, "logits", {num_sampled, decoder.vocabulary()});
    float* states = data<float>(call->states, "states", {num_read, decoder.config().hidden_size});
    decoder.forward({tokens, places, std::move(batches), &caches, sampled, num_sampled, logits, read, num_read, states},
                    call->threads);
  });
}

}  // namespace carousel
