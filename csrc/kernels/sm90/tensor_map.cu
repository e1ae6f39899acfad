#include <atomic>

#include "tensor_map.h"

namespace la2::sm90 {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Through the runtime: the library links no libcuda, which a machine without a GPU does not have.
Encode find_encode() {
  static std::atomic<Encode> found{nullptr};
  Encode encode = found.load(std::memory_order_acquire);
  if (encode != nullptr) return encode;
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult result;
  constexpr int kSinceCuda = 12000;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, kSinceCuda, cudaEnableDefault, &result) !=
          cudaSuccess ||
      result != cudaDriverEntryPointSuccess)
    return nullptr;
  encode = reinterpret_cast<Encode>(entry);
  found.store(encode, std::memory_order_release);
  return encode;
}

}  // namespace

template <class AnyRows>
cudaError_t make_tensor_map(CUtensorMap* map, const AnyRows& rows, const Sizes& sizes, DType dtype, int64_t dim,
                            int box_rows) {
  const Encode encode = find_encode();
  if (encode == nullptr) return cudaErrorCallRequiresNewerDriver;
  constexpr cuuint64_t kBytes = 2;
  const cuuint64_t extents[4] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(sizes.length),
                                 static_cast<cuuint64_t>(sizes.heads), static_cast<cuuint64_t>(sizes.batch)};
  // The stride of an axis with one element is nobody's business, and may be anything.
  auto stride = [&](int64_t elements, int64_t extent) {
    return extent == 1 ? cuuint64_t{16} : static_cast<cuuint64_t>(elements) * kBytes;
  };
  const cuuint64_t strides[3] = {stride(rows.stride_n, sizes.length), stride(rows.stride_h, sizes.heads),
                                 stride(rows.stride_b, sizes.batch)};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(map, dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
             const_cast<void*>(static_cast<const void*>(rows.data)), extents, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template cudaError_t make_tensor_map(CUtensorMap*, const Rows&, const Sizes&, DType, int64_t, int);
template cudaError_t make_tensor_map(CUtensorMap*, const MutableRows&, const Sizes&, DType, int64_t, int);

}  // namespace la2::sm90
