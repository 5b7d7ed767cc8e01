// Python bindings: check shapes and dtypes, hand spans to the functions, nothing else.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string_view>

#include "adamw.hpp"
#include "blending.hpp"
#include "breaks.hpp"
#include "documents.hpp"
#include "json_lines.hpp"
#include "legacy_shuffle.hpp"
#include "sample_index.hpp"
#include "samples.hpp"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
aquila::Span<const T> read(const Array<T>& array) {
  if (array.ndim() != 1) throw std::invalid_argument("expected a one-dimensional array");
  return {array.data(), array.size()};
}

template <typename T>
aquila::Span<T> write(Array<T>& array) {
  return {array.mutable_data(), array.size()};
}

template <typename T>
aquila::Unaligned<T> read_anywhere(const Array<T>& array) {
  return {reinterpret_cast<const char*>(read(array).data), array.size()};
}

template <typename T>
void fill_sample_index(const Array<int32_t>& lengths, const Array<int32_t>& documents, int64_t seq_len,
                       std::array<int64_t, 2> start, Array<T>& out) {
  if (seq_len < 1 || start[0] < 0 || start[1] < 0) {
    throw std::invalid_argument("seq_len must be positive, the start not negative");
  }
  if (out.ndim() != 2 || out.shape(1) != 2) throw std::invalid_argument("expected rows of two");
  const auto lengths_view = read_anywhere(lengths);
  const auto documents_span = read(documents);
  const auto out_span = write(out);
  py::gil_scoped_release release;
  aquila::fill_sample_index<T>(lengths_view, documents_span, seq_len, {start[0], start[1]}, out_span);
}

// Calls report with the interpreter's lock; a Python exception in it ends the work.
aquila::Report reporting(const py::function& report) {
  return [&report](int64_t count) {
    py::gil_scoped_acquire acquire;
    report(count);
  };
}

template <typename T>
void shuffle(aquila::LegacyShuffle& self, Array<T>& values, const py::function& report) {
  read(values);  // its shape
  const auto span = write(values);
  const auto count = reporting(report);
  py::gil_scoped_release release;
  self.shuffle(span, count);
}

template <typename T, typename Fill>
py::tuple blending(const Array<T>& parts, int64_t size, Fill fill) {
  const auto parts_span = read(parts);
  if (parts_span.size < 1 || parts_span.size > std::numeric_limits<int16_t>::max() || size < 0) {
    throw std::invalid_argument("a blend takes 1 to 32767 data sets and a size that is not negative");
  }
  Array<int16_t> dataset(size);
  Array<int64_t> sample(size);
  const auto dataset_span = write(dataset);
  const auto sample_span = write(sample);
  {
    py::gil_scoped_release release;
    fill(parts_span, dataset_span, sample_span);
  }
  return py::make_tuple(dataset, sample);
}

py::tuple build_blending_indices(const Array<double>& weights, int64_t size) {
  return blending(weights, size, aquila::fill_blending);
}

py::tuple build_exhaustive_blending_indices(const Array<int64_t>& sizes) {
  const auto span = read(sizes);
  return blending(sizes, std::accumulate(span.data, span.data + span.size, int64_t{0}),
                  aquila::fill_exhaustive_blending);
}

py::bytes insert_breaks(const py::bytes& text, const Array<uint8_t>& table, uint8_t mark) {
  const auto table_span = read(table);
  if (table_span.size != aquila::kTableBytes) throw std::invalid_argument("a table of another size");
  const std::string_view given = text;
  const aquila::Span<const uint8_t> from{reinterpret_cast<const uint8_t*>(given.data()),
                                         static_cast<int64_t>(given.size())};
  std::unique_ptr<uint8_t[]> to(new uint8_t[2 * given.size() + 1]);
  int64_t written = 0;
  {
    py::gil_scoped_release release;
    written = aquila::insert_breaks(from, table_span, mark, {to.get(), 2 * from.size});
  }
  return py::bytes(reinterpret_cast<const char*>(to.get()), written);
}

py::tuple join_lines(const py::bytes& block, int64_t start, const py::bytes& key,
                     std::array<int64_t, 2> longest_and_enough, std::array<uint8_t, 2> border_and_mark,
                     const Array<uint8_t>& table) {
  const auto table_span = read(table);
  if (table_span.size != 0 && table_span.size != aquila::kTableBytes)
    throw std::invalid_argument("a table of another size");
  const std::string_view given = block, named = key;
  if (start < 0 || start > static_cast<int64_t>(given.size())) throw std::invalid_argument("a start outside the block");
  const aquila::Span<const uint8_t> from{reinterpret_cast<const uint8_t*>(given.data()) + start,
                                         static_cast<int64_t>(given.size()) - start};
  const auto [longest, enough] = longest_and_enough;
  const int64_t room = 2 * std::min(from.size, longest + enough + 1) + 1;
  std::unique_ptr<uint8_t[]> to(new uint8_t[static_cast<size_t>(room)]);
  aquila::Joined done;
  {
    py::gil_scoped_release release;
    done = aquila::join_lines(from, {named, longest, enough, border_and_mark[0], border_and_mark[1], table_span},
                              {to.get(), room});
  }
  return py::make_tuple(py::bytes(reinterpret_cast<const char*>(to.get()), done.written), done.documents, done.counted,
                        done.bytes, done.lines);
}

py::tuple split_documents(const Array<uint32_t>& ids, int64_t documents, int64_t border, int64_t mark, int64_t end) {
  const auto ids_span = read(ids);
  Array<uint32_t> tokens(ids_span.size);
  Array<int64_t> lengths(documents);
  const auto tokens_span = write(tokens);
  const auto lengths_span = write(lengths);
  int64_t written = 0;
  {
    py::gil_scoped_release release;
    written = aquila::split_documents(ids_span, {border, mark, end}, tokens_span, lengths_span);
  }
  return py::make_tuple(tokens[py::slice(0, written, 1)], lengths);
}

template <typename Token>
void read_sample(const Array<Token>& tokens, const Array<int64_t>& offsets, const Array<int32_t>& lengths,
                 const Array<int32_t>& order, std::array<int64_t, 4> range, Array<int64_t>& out) {
  read(out);  // its shape
  if (offsets.size() != lengths.size()) throw std::invalid_argument("as many offsets as lengths");
  const auto tokens_span = read(tokens);
  const auto order_span = read(order);
  const auto out_span = write(out);
  const auto offsets_view = read_anywhere(offsets);
  const auto lengths_view = read_anywhere(lengths);
  py::gil_scoped_release release;
  aquila::read_sample<Token>(tokens_span, offsets_view, lengths_view, order_span,
                             {range[0], range[1], range[2], range[3]}, out_span);
}

template <typename... Numbers>
void define_fill_sample_index(py::module_& module) {
  (module.def("fill_sample_index", &fill_sample_index<Numbers>, py::arg("lengths").noconvert(),
              py::arg("documents").noconvert(), py::arg("seq_len"), py::arg("start"), py::arg("out").noconvert()),
   ...);
}

template <typename... Tokens>
void define_read_sample(py::module_& module) {
  (module.def("read_sample", &read_sample<Tokens>, py::arg("tokens").noconvert(), py::arg("offsets").noconvert(),
              py::arg("lengths").noconvert(), py::arg("order").noconvert(), py::arg("range"),
              py::arg("out").noconvert()),
   ...);
}

py::tuple lay_out(const Array<int64_t>& samples, int64_t eod, bool reset_positions, bool reset_attention,
                  bool mask_loss) {
  if (samples.ndim() != 2 || samples.shape(1) < 2)
    throw std::invalid_argument("expected samples of two tokens or more");
  const int64_t batch = samples.shape(0), seq_len = samples.shape(1) - 1;
  Array<int64_t> tokens({batch, seq_len}), labels({batch, seq_len}), positions({batch, seq_len});
  Array<float> loss_mask({batch, seq_len});
  Array<int32_t> bounds(reset_attention ? batch * seq_len + 1 : 0);
  const aquila::BatchView view{batch,
                               seq_len,
                               tokens.mutable_data(),
                               labels.mutable_data(),
                               loss_mask.mutable_data(),
                               positions.mutable_data(),
                               bounds.mutable_data()};
  const aquila::Span<const int64_t> samples_span{samples.data(), samples.size()};
  int64_t borders = 0;
  {
    py::gil_scoped_release release;
    borders = aquila::lay_out(samples_span, {eod, reset_positions, reset_attention, mask_loss}, view);
  }
  const py::object found = reset_attention ? py::object(bounds[py::slice(0, borders, 1)].attr("copy")()) : py::none();
  return py::make_tuple(tokens, labels, loss_mask, positions, found);
}

void adamw(Array<float>& param, const Array<float>& grad, Array<float>& exp_avg, Array<float>& exp_avg_sq, float factor,
           float decay, float one_minus_beta1, float beta2, float one_minus_beta2, float rate, float correction,
           float eps, int threads) {
  const auto grad_span = read(grad);
  const int64_t size = grad_span.size;
  if (read(param).size != size || read(exp_avg).size != size || read(exp_avg_sq).size != size) {
    throw std::invalid_argument("expected four arrays of one size");
  }
  const auto param_span = write(param), mean_span = write(exp_avg), square_span = write(exp_avg_sq);
  const aquila::AdamwScalars scalars{factor, decay, one_minus_beta1, beta2, one_minus_beta2, rate, correction, eps};
  py::gil_scoped_release release;
  aquila::adamw(param_span, grad_span, mean_span, square_span, scalars, threads);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() =
      "Index building, reading of samples and what an encoder needs around it in C++, of which "
      "megatron_aquila.data.reference holds the same functions; and the AdamW of megatron_aquila.kernels.adamw.";
  module.def("adamw", &adamw, py::arg("param").noconvert(), py::arg("grad").noconvert(), py::arg("exp_avg").noconvert(),
             py::arg("exp_avg_sq").noconvert(), py::kw_only(), py::arg("factor"), py::arg("decay"),
             py::arg("one_minus_beta1"), py::arg("beta2"), py::arg("one_minus_beta2"), py::arg("rate"),
             py::arg("correction"), py::arg("eps"), py::arg("threads"));
  define_fill_sample_index<int32_t, int64_t>(module);
  py::class_<aquila::LegacyShuffle>(module, "LegacyShuffle")
      .def(py::init<uint32_t>(), py::arg("seed"))
      .def("shuffle", &shuffle<int32_t>, py::arg("values").noconvert(), py::arg("report"))
      .def("shuffle", &shuffle<uint32_t>, py::arg("values").noconvert(), py::arg("report"))
      .def("shuffle", &shuffle<int64_t>, py::arg("values").noconvert(), py::arg("report"));
  module.def("build_blending_indices", &build_blending_indices, py::arg("weights").noconvert(), py::arg("size"));
  module.def("build_exhaustive_blending_indices", &build_exhaustive_blending_indices, py::arg("sizes").noconvert());
  define_read_sample<uint8_t, int8_t, uint16_t, int16_t, int32_t, int64_t, float, double>(module);
  module.def("lay_out", &lay_out, py::arg("samples").noconvert(), py::kw_only(), py::arg("eod"),
             py::arg("reset_positions"), py::arg("reset_attention"), py::arg("mask_loss"));
  module.def("split_documents", &split_documents, py::arg("ids").noconvert(), py::kw_only(), py::arg("documents"),
             py::arg("border"), py::arg("mark"), py::arg("end"));
  module.def("join_lines", &join_lines, py::arg("block"), py::arg("start"), py::kw_only(), py::arg("key"),
             py::arg("longest_and_enough"), py::arg("border_and_mark"), py::arg("table").noconvert());
  module.def("insert_breaks", &insert_breaks, py::arg("text"), py::arg("table").noconvert(), py::arg("mark"));
}
