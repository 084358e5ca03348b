// Classifies images by a model that export.py wrote. No Python takes part: libtorch runs the model, and
// posmlp_kernels' library, which this program is linked to, brings the ops that the model calls.
//
//   run MODEL [IMAGES [LOGITS]]
//
// IMAGES: float32 numbers, images [channels, height, width] one after the other, normalised; without it one of zeros.
// LOGITS: where to write the float32 logits [images, classes].
#include <ATen/core/Tensor.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Loader = torch::inductor::AOTIModelPackageLoader;
using Sizes = std::vector<int64_t>;

constexpr int kRuns = 20;

void require_file(const std::string& path) {
  if (!std::filesystem::is_regular_file(path)) throw std::runtime_error("no file " + path);
}

// The first line of an error: torch's go on with where it was.
std::string reason(const std::exception& error) {
  const std::string message = error.what();
  return message.substr(0, message.find('\n'));
}

std::unique_ptr<Loader> load(const std::string& path) {
  require_file(path);
  try {
    return std::make_unique<Loader>(path);
  } catch (const std::exception& error) {
    throw std::runtime_error(path + " is not a model that can be loaded: " + reason(error));
  }
}

// What export.py noted in the package under a name.
std::string note(Loader& model, const std::string& name) {
  const auto notes = model.get_metadata();
  const auto found = notes.find(name);
  if (found == notes.end()) throw std::runtime_error("export.py did not write this model: it says nothing on " + name);
  return found->second;
}

// `sizes` are one image's, [1, channels, height, width].
at::Tensor read_images(const std::string& path, Sizes sizes) {
  require_file(path);
  const int64_t image_bytes = sizes[1] * sizes[2] * sizes[3] * int64_t(sizeof(float));
  const int64_t bytes = int64_t(std::filesystem::file_size(path));
  if (bytes == 0 || bytes % image_bytes)
    throw std::runtime_error(path + " must hold images of " + std::to_string(image_bytes) + " bytes each, got " +
                             std::to_string(bytes) + " bytes");
  sizes[0] = bytes / image_bytes;
  at::Tensor images = at::empty(sizes);
  std::ifstream file(path, std::ios::binary);
  if (!file.read(static_cast<char*>(images.mutable_data_ptr()), bytes)) throw std::runtime_error("cannot read " + path);
  if (!at::isfinite(images).all().item<bool>()) throw std::runtime_error(path + " must hold finite float32 numbers");
  return images;
}

void write(const at::Tensor& values, const std::string& path) {
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(values.const_data_ptr()), std::streamsize(values.nbytes()));
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

void print_classes(const at::Tensor& logits, const std::string& names) {
  std::vector<std::string> classes;
  std::istringstream lines(names);
  for (std::string line; std::getline(lines, line);) classes.push_back(line);
  const at::Tensor probabilities = at::softmax(logits, 1), best = at::argmax(logits, 1);
  for (int64_t i = 0; i < logits.size(0); ++i) {
    const auto index = best[i].item<int64_t>();
    const std::string name = size_t(index) < classes.size() ? classes[index] : std::to_string(index);
    std::printf("image %lld: %s %.1f%%\n", static_cast<long long>(i), name.c_str(),
                100 * probabilities[i][index].item<double>());
  }
}

double median_milliseconds(Loader& model, const at::Tensor& images) {
  std::vector<double> times(kRuns);
  for (double& time : times) {
    const auto start = std::chrono::steady_clock::now();
    model.run({images});
    time = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }
  std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
  return times[kRuns / 2];
}

void run(const std::vector<std::string>& arguments) {
  if (arguments.empty() || arguments.size() > 3) throw std::runtime_error("usage: run MODEL [IMAGES [LOGITS]]");
  const c10::InferenceMode without_gradients;
  const auto loaded = load(arguments[0]);
  Loader& model = *loaded;
  Sizes sizes{1, 0, 0, 0};
  std::istringstream(note(model, "image")) >> sizes[1] >> sizes[2] >> sizes[3];
  const at::Tensor images = arguments.size() > 1 ? read_images(arguments[1], sizes) : at::zeros(sizes);
  const at::Tensor logits = model.run({images}).at(0).contiguous();
  if (arguments.size() > 2) write(logits, arguments[2]);
  print_classes(logits, note(model, "classes"));
  std::printf("%.2f ms, the median of %d runs\n", median_milliseconds(model, images), kRuns);
}

}  // namespace

int main(int count, char** values) {
  try {
    run({values + 1, values + count});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "run: error: %s\n", reason(error).c_str());
    return 2;
  }
}
