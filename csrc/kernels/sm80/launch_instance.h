// The functions behind the instances that CMake lists, one in each translation unit.
#pragma once

#include <cuda_runtime_api.h>

#include "launch.h"

#define LA2_INSTANCE_FUNCTION_(name) launch_##name
#define LA2_INSTANCE_FUNCTION(name) LA2_INSTANCE_FUNCTION_(name)
