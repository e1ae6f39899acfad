// What a function that host and device share is marked with.
#pragma once

#if defined(__CUDACC__)
#define LA2_HOST_DEVICE __host__ __device__
#else
#define LA2_HOST_DEVICE
#endif
