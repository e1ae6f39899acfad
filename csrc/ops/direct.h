// The C interface of the op libraries for calls that do not come through torch's dispatcher (csrc/python/direct.cpp).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../kernels/params.h"

namespace la2::ops {

// One token for each row, in place: whoever calls has checked the arguments. bytes: sizeof of params, which differs
// where the two come from different builds. False: nothing was done, and la2::decode is to be called, which does the
// same or says what is wrong. So is anything `la2_decode_is_plain_*` says no to, which is asked before autograd is
// told.
using DecodeIsPlain = bool (*)(const RecurrentParams* params, size_t bytes, int32_t device);
using DecodeDirectly = bool (*)(const RecurrentParams* params, int32_t device, void* stream);

}  // namespace la2::ops
