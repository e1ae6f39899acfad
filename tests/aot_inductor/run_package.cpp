// Runs a model that AOTInductor packaged, without Python: the operators are in liblightning_attn2.so (and, with a CUDA
// build of torch, liblightning_attn2_cuda.so), which a process only has to load before it loads the package.
//
//   run_package <liblightning_attn2.so> <model.pt2> <arguments> <results> [calls]
//
// <arguments> is a list of tensors written by torch.save, <results> one for torch.load: what the model returns, then
// the arguments, some of which it updates in place (a cache). With calls, the model is run that many times.
//
// Build, with TORCH the folder of the torch package (python -c 'import torch; print(torch.__path__[0])'):
//
//   g++ -std=c++20 -O1 run_package.cpp -o run_package
//       -isystem TORCH/include -isystem TORCH/include/torch/csrc/api/include
//       -LTORCH/lib -Wl,-rpath,TORCH/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -ldl
//
// The package asks for libtorch.so by name, hence --no-as-needed: it must be in the process already.

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

namespace {

std::vector<char> read_file(const char* path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) {
    std::fprintf(stderr, "cannot read %s\n", path);
    std::exit(1);
  }
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "usage: %s <liblightning_attn2.so> <model.pt2> <arguments> <results> [calls]\n", argv[0]);
    return 2;
  }
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader loader(argv[2]);
  const c10::IValue saved = torch::jit::pickle_load(read_file(argv[3]));
  std::vector<at::Tensor> arguments;
  for (const c10::IValue& value : saved.toListRef()) arguments.push_back(value.toTensor());
  const int calls = argc > 5 ? std::atoi(argv[5]) : 1;
  std::vector<at::Tensor> results;
  for (int i = 0; i < calls; ++i) results = loader.run(arguments);
  results.insert(results.end(), arguments.begin(), arguments.end());
  const std::vector<char> bytes = torch::jit::pickle_save(c10::IValue(results));
  std::ofstream(argv[4], std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return 0;
}
