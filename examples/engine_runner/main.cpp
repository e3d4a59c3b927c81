// Run an engine without Python: reads manifest.json, weights.safetensors and the .pt2 programs.
//
//   engine_runner ENGINE calls.safetensors results.safetensors
//
// Inputs are named `<call>.<input>`, results `<call>.<number>`; the calls are those of one sampling
// run of one guidance branch, in order. An engine's programs are native code: run only what you
// trust. run.py beside this file does the same in Python.

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include "json.hpp"

using Tensors = std::map<std::string, at::Tensor>;
using Loader = torch::inductor::AOTIModelPackageLoader;
namespace fs = std::filesystem;

static std::string read_file(const fs::path& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error("cannot read " + path.string());
  std::ostringstream text;
  text << stream.rdbuf();
  return text.str();
}

static const std::map<std::string, std::pair<at::ScalarType, const char*>> kTypes = {
    {"float64", {at::kDouble, "F64"}},  {"float32", {at::kFloat, "F32"}},
    {"float16", {at::kHalf, "F16"}},    {"bfloat16", {at::kBFloat16, "BF16"}},
    {"int64", {at::kLong, "I64"}},      {"int32", {at::kInt, "I32"}},
    {"int16", {at::kShort, "I16"}},     {"int8", {at::kChar, "I8"}},
    {"uint8", {at::kByte, "U8"}},       {"bool", {at::kBool, "BOOL"}},
    {"complex64", {at::kComplexFloat, "C64"}},
    {"float8_e4m3fn", {at::kFloat8_e4m3fn, "F8_E4M3"}},
    {"float8_e5m2", {at::kFloat8_e5m2, "F8_E5M2"}},
};

static at::ScalarType type_of(const std::string& safetensors_name) {
  for (auto& entry : kTypes)
    if (safetensors_name == entry.second.second) return entry.second.first;
  throw std::runtime_error("unknown dtype " + safetensors_name);
}

static const char* name_of(at::ScalarType type) {
  for (auto& entry : kTypes)
    if (type == entry.second.first) return entry.second.second;
  throw std::runtime_error("dtype without a name in safetensors");
}

// A safetensors file: eight bytes of length, a JSON header, the data.
static Tensors load_tensors(const fs::path& path) {
  std::string data = read_file(path);
  uint64_t length = 0;
  if (data.size() < 8) throw std::runtime_error(path.string() + " is too short");
  std::memcpy(&length, data.data(), 8);
  if (length > data.size() - 8) throw std::runtime_error(path.string() + " is truncated");
  std::string text = data.substr(8, length);
  Json header = JsonReader(text).read();
  Tensors found;
  for (auto& [name, entry] : header.members) {
    if (name == "__metadata__") continue;
    auto range = entry["data_offsets"].integers();
    auto value = at::empty(entry["shape"].integers(), at::device(at::kCPU).dtype(type_of(entry["dtype"].text)));
    uint64_t size = value.nbytes(), first = 8 + length + range.at(0);
    if (uint64_t(range.at(1) - range.at(0)) != size || first + size > data.size())
      throw std::runtime_error(name + ": size and data differ");
    if (size) std::memcpy(value.data_ptr(), data.data() + first, size);
    found[name] = value;
  }
  return found;
}

static void save_tensors(const fs::path& path, const Tensors& tensors) {
  std::ostringstream header;
  uint64_t offset = 0;
  header << "{";
  for (auto& [name, value] : tensors) {
    header << (offset || header.tellp() > 1 ? "," : "") << "\"" << name << "\":{\"dtype\":\""
           << name_of(value.scalar_type()) << "\",\"shape\":[";
    for (int64_t d = 0; d < value.dim(); ++d) header << (d ? "," : "") << value.size(d);
    header << "],\"data_offsets\":[" << offset << "," << offset + value.nbytes() << "]}";
    offset += value.nbytes();
  }
  header << "}";
  std::string text = header.str();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  uint64_t length = text.size();
  std::ofstream stream(path, std::ios::binary);
  stream.write(reinterpret_cast<const char*>(&length), 8);
  stream << text;
  for (auto& [name, value] : tensors)
    stream.write(static_cast<const char*>(value.data_ptr()), value.nbytes());
  if (!stream) throw std::runtime_error("cannot write " + path.string());
}

class Engine {
 public:
  explicit Engine(const fs::path& folder)
      : text_(read_file(folder / "manifest.json")), manifest_(JsonReader(text_).read()) {
    if (manifest_["ditopt_engine"].integer() != 1 || manifest_["format"].text != "pt2")
      throw std::runtime_error("not a pt2 engine of version 1");
    if (!manifest_["schedule"].null() && manifest_["schedule"]["gated"].flag)
      throw std::runtime_error("the engine's plan has a gate: ditopt.Engine runs it");
    if (!manifest_["tensors"].members.empty())
      for (auto& [name, value] : load_tensors(folder / "weights.safetensors"))
        weights_[name] = place(value, manifest_["tensors"][name]);
    for (auto& program : manifest_["programs"].items)
      programs_.push_back(std::make_unique<Loader>((folder / program["file"].text).string()));
  }

  // Call `number` of a sampling run.
  std::vector<at::Tensor> call(size_t number, const Tensors& inputs) {
    const Json& wiring = manifest_["wiring"];
    const Json& schedule = manifest_["schedule"];
    std::vector<at::Tensor> env(wiring["slots"].integer());
    size_t slot = 0;
    for (auto& item : manifest_["call"]["inputs"].items) {
      auto given = inputs.find(item["name"].text);
      if (given == inputs.end()) throw std::runtime_error("missing input " + item["name"].text);
      env.at(slot++) = place(given->second, item["spec"]);
    }
    static const Json none;
    const Json& sources = schedule.null() ? none : schedule["sources"][number];
    size_t phase = schedule.null() ? 0 : schedule["phases"][number].integer();
    bool skip = !sources.items.empty();
    const Json& kept = skip ? wiring["kept_always"] : wiring["kept_by_phase"][phase];
    for (auto& index : kept.items) steps(wiring["kept"][index.integer()]["steps"], env);
    steps(wiring["before"], env);
    const Json& stack = wiring["stack"];
    if (skip) {
      forecast(sources, stack, env);
    } else {
      std::vector<at::Tensor> bases;
      if (!stack.null())
        for (auto& base : stack["bases"].items)
          bases.push_back(base.null() ? at::Tensor() : env.at(base.integer()));
      steps(wiring["bodies"][phase], env);
      if (!stack.null() && manifest_["cached"].flag) store(number, stack, bases, env);
    }
    steps(wiring["after"], env);
    std::vector<at::Tensor> results;
    for (auto& returned : wiring["returned"].items) results.push_back(env.at(returned.integer()));
    return results;
  }

  const std::string& name() const { return manifest_["name"].text; }

 private:
  std::string text_;
  Json manifest_;
  Tensors weights_;
  std::vector<std::unique_ptr<Loader>> programs_;
  std::map<size_t, std::vector<at::Tensor>> stored_;
  std::vector<at::Tensor> like_;

  // The tensor on its device, with the strides that the programs were compiled for.
  static at::Tensor place(const at::Tensor& value, const Json& spec) {
    auto type = kTypes.at(spec["dtype"].text).first;
    auto device = spec["device"].text == "cuda" ? at::kCUDA : at::kCPU;
    if (value.sizes() != at::IntArrayRef(spec["shape"].integers()) || value.scalar_type() != type)
      throw std::runtime_error("a tensor has another shape or dtype than the engine was made for");
    auto placed = at::empty_strided(
        spec["shape"].integers(), spec["stride"].integers(), at::device(device).dtype(type));
    return placed.copy_(value);
  }

  void steps(const Json& list, std::vector<at::Tensor>& env) {
    for (auto& step : list.items) {
      std::vector<at::Tensor> inputs;
      for (auto& source : step["inputs"].items)
        inputs.push_back(
            source.kind == Json::String ? weights_.at(source.text) : env.at(source.integer()));
      auto results = programs_.at(step["program"].integer())->run(inputs);
      size_t k = 0;
      for (auto& slot : step["outputs"].items) env.at(slot.integer()) = results.at(k++);
    }
  }

  void store(size_t number, const Json& stack, const std::vector<at::Tensor>& bases,
             const std::vector<at::Tensor>& env) {
    std::vector<at::Tensor> residuals;
    like_.clear();
    for (size_t k = 0; k < bases.size(); ++k) {
      auto out = env.at(stack["outputs"][k].integer());
      residuals.push_back(bases[k].defined() ? out - bases[k] : out.clone());
      like_.push_back(out);
    }
    stored_[number] = residuals;
  }

  // Base plus weighted residuals of earlier full calls, in fp32.
  void forecast(const Json& sources, const Json& stack, std::vector<at::Tensor>& env) {
    for (size_t k = 0; k < stack["outputs"].items.size(); ++k) {
      const Json& base = stack["bases"][k];
      auto total = base.null() ? at::zeros_like(like_.at(k), at::kFloat)
                               : env.at(base.integer()).to(at::kFloat);
      for (auto& source : sources.items)
        total = total + stored_.at(source[0].integer()).at(k).to(at::kFloat) * source[1].number;
      env.at(stack["outputs"][k].integer()) = at::empty_like(like_.at(k)).copy_(total);
    }
  }
};

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: engine_runner ENGINE calls.safetensors results.safetensors\n";
    return 2;
  }
  try {
    c10::InferenceMode guard;
    Engine engine(argv[1]);
    std::map<size_t, Tensors> calls;
    for (auto& [name, value] : load_tensors(argv[2])) {
      auto dot = name.find('.');
      calls[std::stoul(name.substr(0, dot))][name.substr(dot + 1)] = value;
    }
    Tensors results;
    for (auto& [number, inputs] : calls) {
      size_t k = 0;
      for (auto& value : engine.call(number, inputs))
        results[std::to_string(number) + "." + std::to_string(k++)] = value.cpu().contiguous();
    }
    save_tensors(argv[3], results);
    std::cout << results.size() << " results of " << engine.name() << ", written to " << argv[3] << "\n";
  } catch (const std::exception& error) {
    std::cerr << "engine_runner: " << error.what() << "\n";
    return 2;
  }
}
