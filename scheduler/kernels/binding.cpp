// What Python sees. Tensors are checked here and become plain pointers; no kernel knows of torch.
#include <ATen/ops/empty.h>
#include <pybind11/stl.h>

#include "attention.h"
#include "binding.h"
#include "checks.h"
#include "decoder.h"

namespace carousel {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

DType dtype_of(const at::Tensor& tensor, const char* name) {
  if (tensor.scalar_type() == at::kFloat) return DType::f32;
  require(tensor.scalar_type() == at::kBFloat16, name, " must be float32 or bfloat16, not ", tensor.scalar_type());
  return DType::bf16;
}

// `latent_dim`, if it is not 0: so many numbers of a key are its value, and the values have no width.
KvCache kv_cache(const at::Tensor& keys, const at::Tensor& values, int64_t latent_dim = 0) {
  check_tensor(keys, "k_cache", {kAny, kAny, kAny, kAny});
  check_tensor(values, "v_cache", {keys.size(0), keys.size(1), keys.size(3), latent_dim == 0 ? kAny : 0});
  require(keys.scalar_type() == values.scalar_type(), "k_cache and v_cache must have one dtype");
  require(latent_dim >= 0 && latent_dim <= keys.size(2), "latent_dim must be in [0, ", keys.size(2), "], not ",
          latent_dim);
  return {dtype_of(keys, "k_cache"), keys.data_ptr(), values.data_ptr(), keys.size(0), keys.size(1), keys.size(2),
          latent_dim == 0 ? values.size(3) : latent_dim, keys.size(3), latent_dim != 0};
}

PagedBatch paged_batch(const at::Tensor& block_tables, const at::Tensor& query_start, const at::Tensor& context_lens) {
  const int32_t* lens = data<int32_t>(context_lens, "context_lens", {kAny});
  const int64_t sequences = context_lens.size(0);
  const int32_t* tables = data<int32_t>(block_tables, "block_tables", {sequences, kAny});
  return {sequences, block_tables.size(1), tables, data<int32_t>(query_start, "query_start", {sequences + 1}), lens};
}

at::Tensor paged_attention(const at::Tensor& queries, const at::Tensor& k_cache, const at::Tensor& v_cache,
                           const at::Tensor& block_tables, const at::Tensor& query_start,
                           const at::Tensor& context_lens, double scale, int64_t sliding_window, double softcap,
                           int num_threads, const OptionalTensor& sinks, const OptionalTensor& slopes, int64_t chunk,
                           int64_t latent_dim) {
  const KvCache cache = kv_cache(k_cache, v_cache, latent_dim);
  check_tensor(queries, "q", {kAny, kAny, cache.key_dim});
  const DType dtype = dtype_of(queries, "q");
  const PagedBatch batch = paged_batch(block_tables, query_start, context_lens);
  check_geometry(cache, queries.size(1));
  require(sliding_window >= 0 && softcap >= 0 && chunk >= 0,
          "sliding_window, softcap and chunk must not be negative");
  check_threads(num_threads);
  check_batch(batch, cache, queries.size(0), sliding_window, chunk);

  const int64_t heads = queries.size(1);
  at::Tensor outputs = at::empty({queries.size(0), heads, cache.value_dim}, queries.options());
  const AttentionRows rows{dtype, queries.data_ptr(), heads * cache.key_dim, outputs.data_ptr(),
                           heads * cache.value_dim};
  const AttentionOptions options{float(scale), sliding_window, chunk, float(softcap),
                                 sinks ? data<float>(*sinks, "sinks", {heads}) : nullptr,
                                 slopes ? data<float>(*slopes, "slopes", {heads}) : nullptr};
  AttentionPlan plan(batch, cache, heads, sliding_window, chunk, num_threads);
  parallel(num_threads, [&](Team& team) { plan.run(team, cache, options, rows); });
  return outputs;
}

void write_kv(const at::Tensor& keys, const at::Tensor& values, const at::Tensor& slot_mapping,
              const at::Tensor& k_cache, const at::Tensor& v_cache, int64_t latent_dim) {
  const KvCache cache = kv_cache(k_cache, v_cache, latent_dim);
  const int64_t* slots = data<int64_t>(slot_mapping, "slot_mapping", {kAny});
  const int64_t tokens = slot_mapping.size(0);
  const int64_t value_dim = cache.values_are_keys ? 0 : cache.value_dim;
  const int64_t key_width = cache.num_kv_heads * cache.key_dim, value_width = cache.num_kv_heads * value_dim;
  check_tensor(keys, "k", {tokens, cache.num_kv_heads, cache.key_dim});
  check_tensor(values, "v", {tokens, cache.num_kv_heads, value_dim});
  require(keys.scalar_type() == values.scalar_type(), "k and v must have one dtype");
  for (int64_t t = 0; t < tokens; ++t)
    require(slots[t] >= 0 && slots[t] < cache.num_blocks * cache.block_size, "slot ", slots[t], " is not in the cache");
  const auto write = [&](const auto* key, const auto* value) {
    for (int64_t t = 0; t < tokens; ++t) write_slot(cache, slots[t], key + t * key_width, value + t * value_width);
  };
  if (dtype_of(keys, "k") == DType::f32)
    write(static_cast<const float*>(keys.data_ptr()), static_cast<const float*>(values.data_ptr()));
  else
    write(static_cast<const bf16*>(keys.data_ptr()), static_cast<const bf16*>(values.data_ptr()));
}

Mode mode_of(const std::string& name) {
  if (name == "f32") return Mode::f32;
  if (name == "bf16") return Mode::bf16;
  if (name == "int8") return Mode::int8;
  if (name == "int4") return Mode::int4;
  require(name == "stored", "mode must be f32, bf16, int8, int4 or stored, not ", name);
  return Mode::stored;
}

Activation activation_of(const std::string& name) {
  require(name == "silu" || name == "gelu_tanh", "activation must be silu or gelu_tanh, not ", name);
  return name == "silu" ? Activation::silu : Activation::gelu_tanh;
}

// A weight in one of the block formats of GGUF files, and the tensor with its bytes.
class StoredMatrix {
 public:
  StoredMatrix(const at::Tensor& bytes, const std::string& type) : bytes_(bytes), type_(stored_type(type)) {
    check_tensor(bytes, "data", {kAny, kAny});
    require(bytes.scalar_type() == at::kByte, "data must be uint8");
    // Whole blocks have whole numbers of bytes, so the number of columns follows.
    constexpr int64_t kWidest = 256;
    const int64_t widest = row_bytes(type_, kWidest);
    columns_ = bytes.size(1) * kWidest / widest;
    require(columns_ > 0 && row_bytes(type_, columns_) == bytes.size(1), "rows of ", bytes.size(1),
            " bytes are no whole blocks of ", type);
  }

  Matrix matrix() const { return {type_, bytes_.const_data_ptr(), bytes_.size(0), columns_}; }
  int64_t rows() const { return bytes_.size(0); }
  int64_t columns() const { return columns_; }

  at::Tensor dequantize() const {
    at::Tensor values = at::empty({rows(), columns_}, at::kFloat);
    for (int64_t row = 0; row < rows(); ++row) read_values(matrix(), row, values.data_ptr<float>() + row * columns_);
    return values;
  }

 private:
  at::Tensor bytes_;
  Stored type_;
  int64_t columns_;
};

using AnyMatrix = std::variant<at::Tensor, StoredMatrix>;

Matrix matrix(const AnyMatrix& weight, const char* name) {
  if (const auto* stored = std::get_if<StoredMatrix>(&weight)) return stored->matrix();
  const at::Tensor& tensor = std::get<at::Tensor>(weight);
  check_tensor(tensor, name, {kAny, kAny});
  return {dtype_of(tensor, name) == DType::f32 ? Stored::f32 : Stored::bf16, tensor.const_data_ptr(), tensor.size(0),
          tensor.size(1)};
}

PackedWeights pack_weights(const std::vector<AnyMatrix>& parts, const OptionalTensor& bias, const std::string& mode,
                           bool gated) {
  std::vector<Matrix> matrices;
  int64_t channels = 0;
  for (const AnyMatrix& part : parts) channels += matrices.emplace_back(matrix(part, "weight")).rows;
  const float* biases = bias ? data<float>(*bias, "bias", {channels}) : nullptr;
  return PackedWeights(mode_of(mode), matrices, biases, gated);
}

// A product on its own, for the linear layers of any model.
class PackedLinear {
 public:
  explicit PackedLinear(PackedWeights weights) : weights_(std::move(weights)) {}

  at::Tensor call(const at::Tensor& input, const std::string& activation, int num_threads) const {
    check_tensor(input, "x", {kAny, weights_.in_features()});
    dtype_of(input, "x");
    check_threads(num_threads);
    const at::Tensor x = input.to(at::kFloat);
    const int64_t width = weights_.in_features(), rows = x.size(0);
    at::Tensor y = at::empty({rows, weights_.out_features()}, x.options());
    const float* values = x.const_data_ptr<float>();
    const Product product{y.data_ptr<float>(), weights_.out_features(), false, activation_of(activation)};
    const std::span<const PackedWeights> weights(&weights_, 1);
    Operand operand;
    operand.add_forms_of(weights);
    operand.reshape(rows, width);
    parallel(num_threads, [&](Team& team) {
      team.for_each(operand.num_blocks(), 1, [&](int64_t b) {
        const PackedRows::Block block = operand.block(b);
        for (int64_t row = block.first; row < block.last; ++row) operand.pack(weights, block, row, values + row * width);
      });
      multiply(team, operand, weights, product);
    });
    return y.to(input.scalar_type());
  }

 private:
  PackedWeights weights_;
};

// Products of rows that are sorted by their weights, as those of a mixture's experts are.
class GroupedLinear {
 public:
  explicit GroupedLinear(std::vector<PackedWeights> weights) : weights_(std::move(weights)) {
    require(!weights_.empty(), "there must be weights");
    for (const PackedWeights& each : weights_)
      require(each.in_features() == weights_[0].in_features() && each.out_features() == weights_[0].out_features() &&
                  each.mode() == weights_[0].mode(),
              "all weights must have one shape and one mode");
  }

  int64_t bytes() const {
    int64_t sum = 0;
    for (const PackedWeights& each : weights_) sum += each.bytes();
    return sum;
  }

  // Rows [starts[g], starts[g + 1]) are those of weights g.
  at::Tensor call(const at::Tensor& input, const std::vector<int64_t>& starts, int num_threads) const {
    const int64_t width = weights_[0].in_features();
    check_tensor(input, "x", {kAny, width});
    dtype_of(input, "x");
    check_threads(num_threads);
    require(starts.size() == weights_.size() + 1 && starts.front() == 0 && starts.back() == input.size(0),
            "starts must be ", weights_.size() + 1, " numbers from 0 to ", input.size(0));
    require(std::is_sorted(starts.begin(), starts.end()), "starts must not decrease");
    const at::Tensor x = input.to(at::kFloat);
    at::Tensor y = at::empty({x.size(0), weights_[0].out_features()}, x.options());
    const float* values = x.const_data_ptr<float>();
    std::vector<RowGroup> groups;
    std::vector<std::pair<size_t, int64_t>> blocks;  // of each group
    for (size_t g = 0; g < weights_.size(); ++g) {
      if (starts[g] == starts[g + 1]) continue;
      RowGroup& group = groups.emplace_back(RowGroup{Operand(), &weights_[g], starts[g]});
      group.operand.add_forms_of({&weights_[g], 1});
      group.operand.reshape(starts[g + 1] - starts[g], width);
      for (int64_t b = 0; b < group.operand.num_blocks(); ++b) blocks.emplace_back(groups.size() - 1, b);
    }
    parallel(num_threads, [&](Team& team) {
      team.for_each(int64_t(blocks.size()), 1, [&](int64_t i) {
        RowGroup& group = groups[blocks[i].first];
        const PackedRows::Block block = group.operand.block(blocks[i].second);
        for (int64_t row = block.first; row < block.last; ++row)
          group.operand.pack({group.weights, 1}, block, row, values + (group.first_row + row) * width);
      });
      multiply(team, groups, {y.data_ptr<float>(), y.size(1)});
    });
    return y.to(input.scalar_type());
  }

 private:
  std::vector<PackedWeights> weights_;
};

std::vector<float> norm_weights(const OptionalTensor& weights) {
  if (!weights) return {};
  const float* values = data<float>(*weights, "a norm's weight", {kAny});
  return std::vector<float>(values, values + weights->size(0));
}

// A Decoder, and the tensors that it borrows from.
class TensorDecoder {
 public:
  TensorDecoder(const AnyMatrix& embedding, const PackedWeights& head, const at::Tensor& final_norm,
                const std::vector<std::pair<at::Tensor, at::Tensor>>& ropes, int64_t num_heads, int64_t num_kv_heads,
                int64_t head_dim, double norm_epsilon, double attention_scale, double attention_softcap,
                double logit_softcap, double embedding_multiplier, const std::string& activation)
      : embedding_(embedding),
        ropes_(ropes),
        decoder_({matrix(embedding, "embedding").columns, num_heads, num_kv_heads, head_dim, float(norm_epsilon),
                  float(attention_scale), float(attention_softcap), float(logit_softcap), float(embedding_multiplier),
                  activation_of(activation)},
                 matrix(embedding, "embedding"), head, norm_weights(final_norm), rope_tables(ropes)) {}

  void add_layer(const std::vector<PackedWeights>& qkv, const PackedWeights& output, const PackedWeights& gate_up,
                 const PackedWeights& down, const at::Tensor& attention_norm, const at::Tensor& feed_forward_norm,
                 const OptionalTensor& query_norm, const OptionalTensor& key_norm,
                 const OptionalTensor& post_attention_norm, const OptionalTensor& post_feed_forward_norm,
                 int64_t sliding_window, int64_t rope) {
    decoder_.add_layer({qkv, output, gate_up, down, norm_weights(attention_norm), norm_weights(feed_forward_norm),
                        norm_weights(query_norm), norm_weights(key_norm), norm_weights(post_attention_norm),
                        norm_weights(post_feed_forward_norm), sliding_window, rope});
  }

  void bind_cache(const std::vector<at::Tensor>& k_caches, const std::vector<at::Tensor>& v_caches,
                  const std::vector<int64_t>& groups) {
    require(k_caches.size() == v_caches.size() && k_caches.size() == groups.size(),
            "there must be as many v_caches and groups as k_caches");
    std::vector<LayerCache> caches;
    for (size_t i = 0; i < k_caches.size(); ++i) caches.push_back({kv_cache(k_caches[i], v_caches[i]), groups[i]});
    caches_ = std::move(caches);
    cache_tensors_ = {k_caches, v_caches};
  }

  std::pair<at::Tensor, at::Tensor> forward(const at::Tensor& token_ids, const at::Tensor& positions,
                                            const at::Tensor& block_tables, const at::Tensor& query_start,
                                            const at::Tensor& context_lens, const at::Tensor& sampled_rows,
                                            const at::Tensor& read_rows, int num_threads) {
    check_tensor(block_tables, "block_tables", {kAny, kAny, kAny});
    require(block_tables.size(0) > 0, "there must be block tables");
    std::vector<PagedBatch> batches;
    for (int64_t group = 0; group < block_tables.size(0); ++group)
      batches.push_back(paged_batch(block_tables[group], query_start, context_lens));
    const int32_t* tokens = data<int32_t>(token_ids, "token_ids", {batches.front().num_rows()});
    const int64_t* places = data<int64_t>(positions, "positions", {batches.front().num_rows()});
    const int32_t* sampled = data<int32_t>(sampled_rows, "sampled_rows", {kAny});
    const int32_t* read = data<int32_t>(read_rows, "read_rows", {kAny});
    check_threads(num_threads);
    const int64_t num_sampled = sampled_rows.size(0), num_read = read_rows.size(0);
    at::Tensor logits = at::empty({num_sampled, decoder_.vocabulary()}, at::kFloat);
    at::Tensor states = at::empty({num_read, decoder_.config().hidden_size}, at::kFloat);
    decoder_.forward({tokens, places, std::move(batches), &caches_, sampled, num_sampled, logits.data_ptr<float>(), read,
                      num_read, states.data_ptr<float>()},
                     num_threads);
    return {logits, states};
  }

 private:
  static std::vector<RopeTable> rope_tables(const std::vector<std::pair<at::Tensor, at::Tensor>>& ropes) {
    std::vector<RopeTable> tables;
    for (const auto& [cos, sin] : ropes) {
      const float* cosines = data<float>(cos, "cos", {kAny, kAny});
      tables.push_back({cosines, data<float>(sin, "sin", {cos.size(0), cos.size(1)}), cos.size(0), cos.size(1)});
    }
    return tables;
  }

  const AnyMatrix embedding_;
  const std::vector<std::pair<at::Tensor, at::Tensor>> ropes_;
  std::pair<std::vector<at::Tensor>, std::vector<at::Tensor>> cache_tensors_;
  std::vector<LayerCache> caches_;
  Decoder decoder_;
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using py::arg;
  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  module.def("paged_attention", &paged_attention, without_gil, arg("q"), arg("k_cache"), arg("v_cache"),
             arg("block_tables"), arg("query_start"), arg("context_lens"), arg("scale"), arg("sliding_window") = 0,
             arg("softcap") = 0.0, arg("num_threads") = 1, arg("sinks") = py::none(), arg("slopes") = py::none(),
             arg("chunk") = 0, arg("latent_dim") = 0);
  module.def("write_kv", &write_kv, without_gil, arg("k"), arg("v"), arg("slot_mapping"), arg("k_cache"),
             arg("v_cache"), arg("latent_dim") = 0);
  // Classes are module_local so that builds for several processors can be loaded side by side.
  py::class_<StoredMatrix>(module, "StoredMatrix", py::module_local())
      .def(py::init<const at::Tensor&, const std::string&>(), arg("data"), arg("type"))
      .def_property_readonly("rows", &StoredMatrix::rows)
      .def_property_readonly("columns", &StoredMatrix::columns)
      .def("dequantize", &StoredMatrix::dequantize, without_gil);
  py::class_<PackedWeights>(module, "PackedWeights", py::module_local())
      .def(py::init(&pack_weights), without_gil, arg("parts"), arg("bias") = py::none(), arg("mode") = "int8",
           arg("gated") = false)
      .def_property_readonly("in_features", &PackedWeights::in_features)
      .def_property_readonly("out_features", &PackedWeights::out_features)
      .def_property_readonly("nbytes", &PackedWeights::bytes);
  py::class_<PackedLinear>(module, "PackedLinear", py::module_local())
      .def(py::init<const PackedWeights&>(), arg("weights"))
      .def("__call__", &PackedLinear::call, without_gil, arg("x"), arg("activation") = "silu", arg("num_threads") = 1);
  py::class_<GroupedLinear>(module, "GroupedLinear", py::module_local())
      .def(py::init<std::vector<PackedWeights>>(), arg("weights"))
      .def_property_readonly("nbytes", &GroupedLinear::bytes)
      .def("__call__", &GroupedLinear::call, without_gil, arg("x"), arg("starts"), arg("num_threads") = 1);
  py::class_<TensorDecoder>(module, "Decoder", py::module_local())
      .def(py::init<const AnyMatrix&, const PackedWeights&, const at::Tensor&,
                    const std::vector<std::pair<at::Tensor, at::Tensor>>&, int64_t, int64_t, int64_t, double, double,
                    double, double, double, const std::string&>(),
           without_gil, arg("embedding"), arg("head"), arg("final_norm"), arg("ropes"), py::kw_only(),
           arg("num_heads"), arg("num_kv_heads"), arg("head_dim"), arg("norm_epsilon"), arg("attention_scale"),
           arg("attention_softcap") = 0.0, arg("logit_softcap") = 0.0, arg("embedding_multiplier") = 1.0,
           arg("activation") = "silu")
      .def("add_layer", &TensorDecoder::add_layer, without_gil, arg("qkv"), arg("output"), arg("gate_up"),
           arg("down"), arg("attention_norm"), arg("feed_forward_norm"), py::kw_only(),
           arg("query_norm") = py::none(), arg("key_norm") = py::none(), arg("post_attention_norm") = py::none(),
           arg("post_feed_forward_norm") = py::none(), arg("sliding_window") = 0, arg("rope") = 0)
      .def("bind_cache", &TensorDecoder::bind_cache, arg("k_caches"), arg("v_caches"), arg("groups"))
      .def("forward", &TensorDecoder::forward, without_gil, arg("token_ids"), arg("positions"),
           arg("block_tables"), arg("query_start"), arg("context_lens"), arg("sampled_rows"), arg("read_rows"),
           arg("num_threads") = 1);
  module.def(
      "limit_threads",
      [](int threads) {
        check_threads(threads);
        thread_limit.store(threads, std::memory_order_relaxed);
      },
      arg("threads"));
  bind_sampling(module);
}

}  // namespace carousel
